"""Weights of pairs against loops over pairs and NumPy's histogram, and in batches of a prepared data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpo_jax.cli import flatten
from dpo_jax.data.load.inputs import RawInputs
from dpo_jax.data.load.pair_weights import BINS, MAX_RATIO, WEIGHTS, PairWeights, by_gap, by_rarity
from dpo_jax.data.load.pipeline import validation_batches
from dpo_jax.data.load.records import open_records
from dpo_jax.data.store.prepared import open_prepared
from dpo_jax.data.store.scores import candidates, write_scores
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.training.config import Derived, check_same_experiment
from dpo_jax.training.data import data_fingerprints, open_training_batches
from dpo_jax.training.defaults import default_config, with_fields
from dpo_jax.training.pair_scores import score_judge

from .conftest import encode, write_prepared

examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)
some_scores = st.integers(1, 30).flatmap(
    lambda n: arrays(np.float32, (n, 2), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
)


@examples
@given(some_scores)
def test_by_gap(scores_N2: np.ndarray) -> None:
    weights = by_gap(scores_N2)
    gaps = [float(winner) - float(loser) for winner, loser in scores_N2]
    expected = [2 * np.mean([(other < gap) + 0.5 * (other == gap) for other in gaps]) for gap in gaps]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert 0 < weights.min() <= weights.max() < 2
    np.testing.assert_array_equal(by_gap(4 * scores_N2), weights)  # the judge's unit does not matter


@examples
@given(some_scores)
def test_by_rarity(scores_N2: np.ndarray) -> None:
    weights = by_rarity(scores_N2)
    assert weights.max() <= MAX_RATIO * weights.min() * (1 + 1e-12)
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_by_rarity_against_a_histogram(seed: int) -> None:
    scores_N2 = np.random.default_rng(seed).normal(size=(500, 2))
    counts, edges = np.histogram(scores_N2, BINS)
    shares = counts / counts.sum()

    def share(score: float) -> float:
        return float(shares[min(int((score - edges[0]) / (edges[1] - edges[0])), BINS - 1)])

    often = np.asarray([np.sqrt(share(winner) * share(loser)) for winner, loser in scores_N2])
    expected = 1 / np.maximum(often, often.max() / MAX_RATIO)
    np.testing.assert_allclose(by_rarity(scores_N2), expected / expected.mean(), rtol=1e-9)
    assert by_rarity(scores_N2)[np.argmin(often)] > 2 > by_rarity(scores_N2)[np.argmax(often)] * 2


@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_pairs_have_weight_1(name: PairWeights) -> None:
    np.testing.assert_allclose(WEIGHTS[name](np.full((5, 2), 0.25, np.float32)), 1)


SCORES = [[3.0, 1.0], [1.0, 2.0], [0.5, 0.0], [9.0, 5.0, 1.0], [0.0, 0.0], None, [1.0, 0.0]]
TIE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a list of three with scores by "a"; "b" gives the opposite, and none to the last."""
    numbers = [2, 2, 2, 3, 2, 2, 2]
    records: list[dict[str, Any]] = [
        {
            "caption": f"prompt {i}",
            "images": [encode(np.full((8, 8, 3), 20 * i + k, np.uint8), "PNG") for k in range(number)],
            "split": "validation" if i == 6 else "train",
        }
        | ({"preference": [0.5, 0.5]} if i == TIE else {})
        for i, number in enumerate(numbers)
    ]
    folder = write_prepared(tmp_path_factory.mktemp("weights") / "data", records)
    of = candidates(open_prepared(folder).records["images"])
    rows = zip(SCORES, numbers, strict=True)
    scores_M = np.concatenate([np.full(number, np.nan) if row is None else row for row, number in rows])
    for judge, scale in (("a", 1), ("b", -1)):
        write_scores(folder, judge, "by hand", (scale * scores_M).astype(np.float32), of, {})
    return folder


def spell(captions: Sequence[str]) -> np.ndarray:
    """A stand-in for a tokenizer."""
    return np.zeros((len(captions), 2), np.int32)


def weights_of(folder: Path, split: str = "train", **options: Any) -> dict[str, float]:
    records = open_records(folder, split, **options)
    (batch,) = validation_batches(records, RawInputs(8, spell), batch_size=len(records))
    captions = [records[i]["captions"][0] for i in range(len(records))]
    return dict(zip(captions, batch.weight_B.astype(float).tolist(), strict=True))


def test_weights_reach_the_batch(folder: Path) -> None:
    """Gaps are 2, -1, 0.5 and 8; the record without scores is left out, the best and worst of three are compared."""
    assert weights_of(folder) == {f"prompt {i}": 1 for i in (0, 1, 2, 3, 5)}
    by_a = {"score_judge": "a", "pair_weights": "gap"}
    assert weights_of(folder, **by_a) == {"prompt 0": 1.25, "prompt 1": 0.25, "prompt 2": 0.75, "prompt 3": 1.75}
    tied = weights_of(folder, **by_a, ties="zero_weight")
    assert tied.keys() == {f"prompt {i}" for i in range(5)}
    assert tied["prompt 4"] == 0
    assert weights_of(folder, "validation") == {"prompt 6": 1}
    rarity = weights_of(folder, score_judge="a", pair_weights="rarity")
    expected = by_rarity(np.float32([[3, 1], [1, 2], [0.5, 0], [9, 1]]))
    np.testing.assert_allclose(list(rarity.values()), expected, rtol=1e-6)


def test_gaps_follow_the_order_of_judges(folder: Path) -> None:
    """Judge "b" reverses all orders but that of the second pair, so that its winners have the lower score by "a"."""
    found = weights_of(folder, judges=("b",), score_judge="a", pair_weights="gap")
    assert found == {"prompt 0": 0.75, "prompt 1": 1.25, "prompt 2": 1.75, "prompt 3": 0.25}


def test_a_run_reads_what_its_config_says(folder: Path) -> None:
    """The first of two stages has the two pairs with the largest gaps of four, in their weights."""
    fields = {"data.score_judge": "a", "data.pair_weights": "gap", "data.order": "curriculum"}
    sizes = {"steps": 6, "data.batch_size": 2, "data.curriculum_blocks": 2, "data.caption_dropout": 0.0}
    config = with_fields(default_config(), {"data.path": str(folder)} | fields | sizes)
    derived = Derived(local_batch_size=2, micro_batch_per_device=2, accumulation=1, learning_rate=1e-3)
    with open_training_batches(config, derived, RawInputs(8, spell)) as batches:
        weights = [next(batches).weight_B.tolist() for _ in range(6)]
    assert [sorted(of_batch) for of_batch in weights[:3]] == [[1.25, 1.75]] * 3
    assert {weight for of_batch in weights[3:5] for weight in of_batch} == {0.25, 0.75, 1.25, 1.75}
    assert data_fingerprints(config).keys() == {"fingerprints.data", "fingerprints.pair_scores"}


def test_missing_scores_name_the_command(folder: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no scores by 'c' .*python -m dpo_jax.score --data=.* --judge=c"):
        open_records(folder, "train", score_judge="c", pair_weights="gap")
    with pytest.raises(UserError, match=r"data path random:4: random pairs have no scores by a\."):
        open_records("random:4", "train", score_judge="a", pair_weights="gap")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.score_judge": "a"}, r"score_judge=a has no effect: only data\.pair_weights and"),
        ({"data.pair_weights": "gap"}, r"pair_weights=gap compares .* no judge is named. Set data\.score_judge"),
        ({"data.order": "curriculum"}, r"order=curriculum compares .* no judge is named. Set data\.score_judge"),
        ({"loss.name": "kto", "data.order": "curriculum"}, r"learns from votes\. Set data\.order=shuffled"),
        ({"data.pair_weights": "gap", "data.judges": ("a", "b")}, r"no judge is named"),
        ({"loss.name": "kto", "data.pair_weights": "gap", "data.score_judge": "a"}, r"but kto learns from votes"),
        ({"loss.name": "sft", "data.pair_weights": "gap", "data.score_judge": "a"}, r"but sft learns from images"),
        ({"data.pair_weights": "gap", "data.score_judge": "a", "data.batch_size": 1}, r"config\.data\.batch_size=1"),
    ],
)
def test_what_the_config_must_say(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_judge(with_fields(default_config(), {"data.path": "data"} | fields))


def test_the_judge_of_the_order_is_the_judge_of_the_weights() -> None:
    fields = {"data.pair_weights": "gap", "data.judges": ("a",)}
    assert score_judge(with_fields(default_config(), fields)) == "a"
    assert score_judge(with_fields(default_config(), fields | {"data.score_judge": "b"})) == "b"
    assert score_judge(default_config()) == ""
    assert score_judge(with_fields(default_config(), {"data.order": "curriculum", "data.judges": ("a",)})) == "a"


def test_the_steps_of_a_curriculum_stay() -> None:
    """Its order of pairs depends on them. Other runs may become longer, and older ones were shuffled."""
    now = flatten(default_config())
    before = json.loads(json.dumps(now | {"steps": 10}))  # as in config.json
    check_same_experiment(now, {name: before[name] for name in now.keys() - {"data.order"}}, "W", default_config())
    curriculum = {"data.order": "curriculum"}
    with pytest.raises(UserError, match=r"W holds a run with another config \(steps was 10, now 2000\)"):
        check_same_experiment(now | curriculum, before | curriculum, "W", default_config())
