"""The order of a curriculum, stage by stage, against a sorted list of gaps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.load.curriculum import CurriculumOrder

examples = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def stages_of(order: CurriculumOrder, blocks: int, positions: int, until: int) -> list[list[int]]:
    """Return the indices that each stage sees; stage b has the positions from b/B of the run to (b + 1)/B."""
    stages: list[list[int]] = [[] for _ in range(blocks)]
    for position in range(until):
        stages[min(math.floor(blocks * position / positions), blocks - 1)].append(order[position])
    return stages


@examples
@given(
    gaps=st.lists(st.integers(-3, 9), min_size=1, max_size=15),
    blocks=st.integers(1, 8),
    positions=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_stage_sees_all_pairs_up_to_its_own(gaps: list[int], blocks: int, positions: int, seed: int) -> None:
    order = CurriculumOrder(np.asarray(gaps, float), seed, blocks=blocks, positions=positions)
    easiest = sorted(range(len(gaps)), key=lambda n: (-gaps[n], n))
    for stage, seen in enumerate(stages_of(order, blocks, positions, positions + 15), 1):
        known = sorted(easiest[: math.ceil(stage * len(gaps) / blocks)])
        for begin in range(0, len(seen), len(known)):
            once = seen[begin : begin + len(known)]
            assert sorted(once) == known or (len(once) < len(known) and set(once) < set(known))
            assert len(set(once)) == len(once)


def test_stages_have_equal_length_and_are_shuffled() -> None:
    gap_N = np.random.default_rng(0).normal(size=60)
    order = CurriculumOrder(gap_N, 3, blocks=3, positions=300)
    stages = stages_of(order, 3, 300, 300)
    assert [len(seen) for seen in stages] == [100, 100, 100]
    assert [len(set(seen)) for seen in stages] == [20, 40, 60]
    assert np.sort(gap_N)[::-1][:20].tolist() == sorted(gap_N[stages[0][:20]], reverse=True)
    assert stages[0][:20] != stages[0][20:40]
    again, other = (CurriculumOrder(gap_N, seed, blocks=3, positions=300) for seed in (3, 4))
    assert stages_of(again, 3, 300, 300) == stages
    assert stages_of(other, 3, 300, 300) != stages
    one_block = CurriculumOrder(gap_N, 3, blocks=1, positions=300)
    assert sorted(one_block[position] for position in range(60)) == list(range(60))


@pytest.mark.parametrize("positions", [1, 2, 7])
def test_a_run_shorter_than_its_stages_has_an_order(positions: int) -> None:
    order = CurriculumOrder(np.arange(5.0), 0, blocks=6, positions=positions)
    assert order[0] == 4  # the first stage has one pair, the easiest
    assert {order[position] for position in range(positions, positions + 15)} == set(range(5))
