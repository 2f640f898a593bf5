"""The batches of a round: what each optimizer step trains on, of rounds whose latents tell what they are of."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from ..array_checks import agrees

NAN = np.nan


def drawn(updates, count):
    return [next(updates) for _ in range(count)]


def rows_of(batch):
    """(prompt, step, candidates) of each row, by its latents; and all its other fields belong to those."""
    transitions = batch.inputs.transitions
    J, K = transitions.x_BKHWC.shape[1], transitions.next_x_BKHWC.shape[1]
    found = []
    for b in range(len(batch.weight_B)):
        of_K = transitions.next_x_BKHWC[b, :, 0, 0, 0] - 0.5
        prompt, step = int(of_K[0]) // 100, int(of_K[0]) % 100 // 10
        candidates = [int(of) % 10 for of in of_K]
        assert [int(of) // 10 for of in of_K] == [10 * prompt + step] * K
        np.testing.assert_array_equal(transitions.log_prob_BK[b], -of_K)
        begun = candidates if J == K else [0]
        expected = [100 * prompt + 10 * step + k + 0.25 for k in begun]
        np.testing.assert_array_equal(transitions.x_BKHWC[b, :, 0, 0, 0], expected)
        assert transitions.step_B[b] == step + 2
        assert batch.inputs.text[b, 0, 0] == prompt * 6
        found.append((prompt, step, tuple(candidates)))
    return found


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_prompt_once_an_epoch_and_none_twice(made_round):
    made = made_round(**{"online.epochs": 3})
    assert made.plan.updates == 9
    batches = drawn(made.updates(), 9)

    epochs = [[rows_of(batch) for batch in batches[3 * e : 3 * e + 3]] for e in range(3)]
    orders = []
    for epoch in epochs:
        for rows in epoch:  # the timesteps of a prompt one after the other
            assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4] * 2
            assert [prompt for prompt, _, _ in rows] == [p for p in (rows[0][0], rows[5][0]) for _ in range(5)]
        orders.append([rows[i][0] for rows in epoch for i in (0, 5)])
        assert sorted(orders[-1]) == list(range(6))
    assert len(set(map(tuple, orders))) == 3, "each epoch has an order of its own"
    assert {candidates for epoch in epochs for rows in epoch for _, _, candidates in rows} == {(0, 1, 2)}


def test_shapes_types_and_sizes(made_round):
    batch = next(made_round(**{"data.resolution": 64}).updates())
    assert agrees(batch)
    assert batch.inputs.transitions.x_BKHWC.shape == (10, 3, 2, 2, 4)
    assert batch.inputs.text.shape == (10, 1, 6)
    assert batch.preference_BK.shape == (10, 3, 1)
    assert batch.inputs.advantage_BK.shape == (10, 3)
    np.testing.assert_array_equal(batch.size_cond_BK6, np.tile([64.0, 64, 0, 0, 64, 64], (10, 3, 1)))
    np.testing.assert_array_equal(batch.index_B, np.arange(10))
    assert batch.valid_BK.all()
    types = {np.asarray(x).dtype for x in jax.tree.leaves(batch)}
    assert types == {np.dtype(name) for name in ("float32", "int32", "bool")}


def test_some_of_the_steps_are_drawn_anew_for_each_prompt_and_epoch(made_round):
    made = made_round(num_steps=10, **{"online.timesteps": 0.4, "online.epochs": 2})
    assert made.plan.timesteps == 4
    chosen = {}
    for i, batch in enumerate(drawn(made.updates(), 6)):
        for prompt, of_prompt in itertools.groupby(rows_of(batch), key=lambda row: row[0]):
            steps = [step for _, step, _ in of_prompt]
            assert steps == sorted(set(steps))
            assert len(steps) == 4
            chosen[prompt, i // 3] = tuple(steps)
    assert len(chosen) == 12
    assert len(set(chosen.values())) > 6
    assert set(itertools.chain(*chosen.values())) == set(range(10))


def test_rounds_and_seeds_differ_and_a_round_is_always_the_same(made_round):
    fields = {"online.timesteps": 0.6}
    batches = drawn(made_round(**fields).updates(), 3)
    assert_same(batches, drawn(made_round(**fields).updates(), 3))
    for other in (made_round(number=1, **fields), made_round(seed=1, **fields)):
        assert [rows_of(batch) for batch in drawn(other.updates(), 3)] != [rows_of(batch) for batch in batches]


def test_each_pair_once_and_ties_weigh_nothing(made_round):
    rewards_PSKR = np.array([[0, 1, 2], [1, 1, 0], [4, 4, 4], [NAN, 1, 2], [3, 1, 1], [NAN, NAN, 0]], float)
    made = made_round(**{"online.update_by": "pair", "online.reference": "round", "online.epochs": 2})
    assert (made.plan.pairs, made.plan.updates) == (3, 18)
    updates = made.updates(rewards_PSKR[:, None, :, None])

    for _ in range(2):
        seen = {}
        for batch in drawn(updates, 9):
            assert batch.valid_BK.shape == batch.size_cond_BK6.shape[:2] == (10, 2)
            for (prompt, step, pair), weight, preference in zip(
                rows_of(batch), batch.weight_B, batch.preference_BK[..., 0], strict=True
            ):
                assert (prompt, step, pair) not in seen
                seen[prompt, step, pair] = weight
                np.testing.assert_array_equal(preference, rewards_PSKR[prompt, list(pair)])
        assert seen.keys() == set(itertools.product(range(6), range(5), itertools.combinations(range(3), 2)))
        for (prompt, _, pair), weight in seen.items():
            first, second = rewards_PSKR[prompt, list(pair)]
            assert weight == float(first > second or second > first)


def test_a_pair_that_neither_judge_decides_alone_weighs_nothing(made_round):
    """Two judges, Pareto: (1, 0) against (0, 1) is a tie, (1, 1) against (1, 0) is not."""
    rewards_PSKR = np.tile([[1.0, 0], [0, 1], [1, 1]], (6, 1, 1, 1))
    made = made_round(**{"online.update_by": "pair", "online.reference": "round"})
    for batch in drawn(made.updates(rewards_PSKR), 9):
        for (_, _, pair), weight in zip(rows_of(batch), batch.weight_B, strict=True):
            assert weight == (0 if pair == (0, 1) else 1)


@pytest.mark.parametrize(
    ("fields", "weights_P"),
    [
        ({"online.judges": ()}, [1, 1, 0, 1, 0, 0]),
        ({"online.judges": (), "loss.name": "ddpo"}, [1, 1, 1, 1, 1, 0]),
        ({}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_what_people_leave_undecided_weighs_nothing(made_round, fields, weights_P):
    """With two candidates or more of a prompt, all pairs at once."""
    rewards_PK = np.array([[0, 1, 2], [1, 1, 0], [4, 4, 4], [NAN, 1, 2], [NAN, NAN, 0], [NAN, NAN, NAN]])
    for batch in drawn(made_round(**fields).updates(rewards_PK[:, None, :, None]), 3):
        for (prompt, _, _), weight in zip(rows_of(batch), batch.weight_B, strict=True):
            assert weight == weights_P[prompt]


def test_rewards_and_advantages_of_the_prompt_that_all_steps_share(made_round):
    made, rng = made_round(**{"online.timesteps": 0.6}), np.random.default_rng(0)
    rewards_PSKR, advantages_PSK = rng.normal(size=(6, 1, 3, 2)), rng.normal(size=(6, 1, 3))
    for batch in drawn(made.updates(rewards_PSKR, advantages=advantages_PSK), 3):
        for b, (prompt, _, _) in enumerate(rows_of(batch)):
            np.testing.assert_array_equal(batch.preference_BK[b], rewards_PSKR[prompt, 0].astype(np.float32))
            np.testing.assert_array_equal(batch.inputs.advantage_BK[b], advantages_PSK[prompt, 0].astype(np.float32))
        assert (batch.weight_B == 1).all()


def test_branching_has_rewards_of_each_step_and_one_beginning(made_round):
    made, rng = made_round(**{"online.branching": True, "online.timesteps": 0.6}), np.random.default_rng(0)
    rewards_PSKR, advantages_PSK = rng.normal(size=(6, 5, 3, 1)), rng.normal(size=(6, 5, 3))
    for batch in drawn(made.updates(rewards_PSKR, advantages=advantages_PSK), 3):
        assert batch.inputs.transitions.x_BKHWC.shape == (6, 1, 2, 2, 4)
        assert batch.inputs.transitions.next_x_BKHWC.shape == (6, 3, 2, 2, 4)
        for b, (prompt, step, _) in enumerate(rows_of(batch)):
            np.testing.assert_array_equal(batch.preference_BK[b], rewards_PSKR[prompt, step].astype(np.float32))
            np.testing.assert_array_equal(batch.inputs.advantage_BK[b], advantages_PSK[prompt, step].astype(np.float32))


@pytest.mark.parametrize("branching", [False, True])
def test_means_of_the_policy_that_sampled_are_read_if_the_method_reads_them(made_round, branching):
    fields = {"loss.name": "flow_grpo", "online.candidates": 3, "online.branching": branching}
    for ratio in ("clip", "guard"):
        batch = next(made_round(**fields, **{"loss.ratio": ratio}).updates())
        transitions = batch.inputs.transitions
        if ratio == "clip":
            assert transitions.old_mean_BKHWC is None
        else:
            assert transitions.old_mean_BKHWC.shape == (2 * 5, 1 if branching else 3, 2, 2, 4)
            np.testing.assert_array_equal(transitions.old_mean_BKHWC, transitions.x_BKHWC + 0.125)


@pytest.mark.parametrize("update", ["prompt", "pair"])
def test_from_any_step_on_the_batches_are_those_of_a_run_without_a_stop(made_round, update):
    fields = {"online.update_by": update, "online.reference": "round", "online.timesteps": 0.6, "online.epochs": 2}
    made = made_round(number=2, **fields)
    whole = drawn(made.updates(), made.plan.updates)
    assert len(whole) == (6 if update == "prompt" else 18)
    for step in range(len(whole)):
        updates = made.updates(step=step)
        assert updates.get_state() == {"position": 2 * len(whole) + step}
        assert_same(drawn(updates, len(whole) - step), whole[step:])


@pytest.mark.parametrize("update", ["prompt", "pair"])
def test_two_processes_share_a_batch(made_round, monkeypatch, update):
    made = made_round(**{"online.update_by": update, "online.reference": "round", "data.batch_size": 6})
    alone = drawn(made.updates(), made.plan.updates)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    derived = dataclasses.replace(made.plan.derived, local_batch_size=15)
    made.plan = dataclasses.replace(made.plan, derived=derived)
    shares = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(drawn(made.updates(), made.plan.updates))

    joined = [jax.tree.map(lambda *parts: np.concatenate(parts), *parts) for parts in zip(*shares, strict=True)]
    assert_same(joined, alone)
    for one, other in zip(*shares, strict=True):
        prompts = [{prompt for prompt, _, _ in rows_of(share)} for share in (one, other)]
        assert [len(of_process) for of_process in prompts] == [3, 3]
        assert not prompts[0] & prompts[1]
