"""What was said of images becomes what a loss reads; checked by hand and against plain loops."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dpo_jax.objectives.advantages import PromptStatistics
from dpo_jax.objectives.preferences import is_preferred
from dpo_jax.rounds.feedback import advantages, best_and_worst, combined, decided, is_decided, learnable, read_feedback

NAN = np.nan


def write(path, rows):
    file = epath.Path(path)
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_annotators_are_averaged_where_they_said_something(tmp_path):
    ann = write(tmp_path / "ann.json", [[5, 1, None], [2, None, 0.5], [1, 1, 1]])
    bob = write(tmp_path / "bob.json", [[4, None, None], [1, None, 1.5], [0, 2, 1]])
    eve = write(tmp_path / "eve.json", [[3, 4, None], [None, None, None], [-4, 0, 1]])

    np.testing.assert_array_equal(read_feedback([ann, bob, eve], 3, 3), [[4, 2.5, NAN], [1.5, NAN, 1], [-1, 1, 1]])
    np.testing.assert_array_equal(read_feedback([ann], 3, 3), [[5, 1, NAN], [2, NAN, 0.5], [1, 1, 1]])


def test_numbers_as_other_programs_write_them(tmp_path):
    file = write(tmp_path / "a.json", '\ufeff[["1", 2.0, NaN],\r\n[true, null, "-0.5"]]')
    np.testing.assert_array_equal(read_feedback([file], 2, 3), [[1, 2, NAN], [1, NAN, -0.5]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2]], "scores for 1 prompts with 2 candidates each, but this round has 2 prompts with 2 candidates each"),
        ([[1, 2, 3], [1, 2, 3]], "scores for 2 prompts with 3 candidates each, but this round has 2 prompts with 2"),
        ([], "this round has 2 prompts with 2"),
        ([[[1], [2]], [[3], [4]]], "must be a list of lists of numbers"),
        ([[1, 2], [1]], "scores for 2 prompts with 1 to 2 candidates each"),
        ([[1, 2], [1, 10**400]], "must be a list of lists of numbers"),
        ([[1, 2], [1, "good"]], "must be a list of lists of numbers"),
        ([1, 2], "must be a list of lists of numbers"),
        ({"a": 1}, "must be a list of lists of numbers"),
        ("[[1, 2], [1,", "is not valid JSON"),
        ("[[1, 2], [1, Infinity]]", "the score inf for prompt 1"),
        ([[1, 2], [1, 1e300]], "the score 1e\\+300 for prompt 1"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ([[None, None], [None, None]], "no score"),
    ],
)
def test_other_feedback_is_refused_in_a_sentence_that_names_the_file(tmp_path, rows, message):
    file = write(tmp_path / "feedback.json", rows)
    with pytest.raises(ValueError, match=message) as error:
        read_feedback([file], 2, 2)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the feedback file .*gone\.json does not exist"):
        read_feedback([epath.Path(tmp_path / "gone.json")], 2, 2)


def test_rewards_of_several_judges_are_averaged_in_units_of_their_spread():
    rng = np.random.default_rng(0)
    rewards_PSKR = rng.normal(size=(3, 2, 4, 2)) * [1, 1000]
    one, other = rewards_PSKR[..., 0], rewards_PSKR[..., 1]

    expected = (one / one.std() + other / other.std()) / 2
    np.testing.assert_allclose(combined(rewards_PSKR), expected, rtol=1e-12)
    rewards_PSKR[1, 0, 2, 1] = NAN  # said by one judge only: not comparable
    assert np.argwhere(np.isnan(combined(rewards_PSKR))).tolist() == [[1, 0, 2]]


@pytest.mark.filterwarnings("error")
def test_rewards_that_are_all_alike_stay_finite():
    np.testing.assert_array_equal(combined(np.full((2, 1, 3, 1), 7.0)), np.full((2, 1, 3), 7.0))


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_best_and_worst_make_the_one_pair_of_the_extremes(K):
    rewards_PSKR = np.random.default_rng(K).normal(size=(4, 3, K, 2))

    kept_PSKR = best_and_worst(rewards_PSKR)

    for p, s in np.ndindex(4, 3):
        first_K = rewards_PSKR[p, s, :, 0]
        ends = {int(first_K.argmax()), int(first_K.argmin())}
        for k in range(K):
            expected = rewards_PSKR[p, s, k] if k in ends else [NAN, NAN]
            np.testing.assert_array_equal(kept_PSKR[p, s, k], expected)
    pairs = np.asarray(is_preferred(jnp.asarray(kept_PSKR[..., 0].reshape(12, K))))
    assert (pairs.sum(axis=(1, 2)) == 1).all()


@pytest.mark.parametrize(
    ("rewards_K", "pairs"),
    [
        ([2, 2, 2], set()),
        ([NAN, NAN, NAN], set()),
        ([NAN, 3, NAN, NAN], set()),
        ([NAN, 3, 1, 2], {(1, 2)}),  # the unknown one is neither
        ([3, 1, 2, NAN], {(0, 1)}),
        ([NAN, 1, NAN, 2, 3], {(4, 1)}),
    ],
)
def test_best_and_worst_of_what_is_known(rewards_K, pairs):
    kept_K = best_and_worst(np.array(rewards_K, float)[None, None, :, None])[0, 0, :, 0]
    preferred_KK = np.asarray(is_preferred(jnp.asarray(kept_K[None])))[0]
    assert set(zip(*np.nonzero(preferred_KK), strict=True)) == pairs


def test_nearly_tied_ends_are_dropped_as_in_spo():
    """`softmax([best, worst])` differs by more than 0.3 where they do by more than 0.619."""
    rewards_PSKR = np.array([[20.0, 20.3, 20.61], [20, 20.3, 20.63], [NAN, 20, 21]])[None, :, :, None]
    kept_SK = ~np.isnan(best_and_worst(rewards_PSKR, 0.3)[0, :, :, 0])
    np.testing.assert_array_equal(kept_SK, [[0, 0, 0], [1, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("rewards_K", [[5, 5, 1], [1, 5, 5, 3], [1, 1, 4], [0, 0, 3, 3]])
def test_ties_at_an_end_leave_one_pair_of_a_best_and_a_worst(rewards_K):
    kept_K = best_and_worst(np.array(rewards_K, float)[None, None, :, None])[0, 0, :, 0]
    known = kept_K[~np.isnan(kept_K)]
    assert sorted(known) == [min(rewards_K), max(rewards_K)]


def test_advantages_over_the_candidates_of_a_prompt():
    rewards_PSK = np.array([[[1.0, 2, 6]], [[4, 4, 4]], [[NAN, 1, 3]], [[NAN, NAN, 8]], [[NAN] * 3]])

    found = advantages(rewards_PSK, ["a", "b", "c", "d", "e"], None)

    spread = np.std([1, 2, 6]) + 1e-4
    np.testing.assert_allclose(found[0, 0], [-2 / spread, -1 / spread, 3 / spread], rtol=1e-12)
    np.testing.assert_array_equal(found[[1, 3, 4]], np.zeros((3, 1, 3)))
    np.testing.assert_allclose(found[2, 0], [0, -1 / 1.0001, 1 / 1.0001], rtol=1e-12)


def test_advantages_of_each_step_by_itself_in_a_group():
    rewards_PSK = np.random.default_rng(0).normal(size=(2, 3, 4))
    found = advantages(rewards_PSK, ["a", "b"], None)
    for p, s in np.ndindex(2, 3):
        of_group = rewards_PSK[p, s]
        np.testing.assert_allclose(found[p, s], (of_group - of_group.mean()) / (of_group.std() + 1e-4), rtol=1e-12)


def test_advantages_over_the_deviation_of_all_rewards_of_the_round(online):
    """As `global_std` of Flow-GRPO's code has it; a prompt whose candidates hardly differ has small advantages."""
    rewards_PSK = np.array([[[1.0, 2, 6]], [[4, 4, 4.01]], [[NAN, 1, 3]], [[NAN, NAN, 8]]])
    config = online("tiny_online:grpo,tiny", **{"online.advantage": "round"})

    _, found = learnable(config, rewards_PSK[..., None], ["a", "b", "c", "d"], [])

    spread = np.std(rewards_PSK[~np.isnan(rewards_PSK)]) + 1e-4
    np.testing.assert_allclose(found[0, 0], np.array([-2, -1, 3]) / spread, rtol=1e-12)
    assert np.abs(found[1]).max() < 0.01
    np.testing.assert_allclose(found[2, 0], [0, -1 / spread, 1 / spread], rtol=1e-12)
    np.testing.assert_array_equal(found[3], np.zeros((1, 3)))


def test_advantages_by_the_last_rewards_of_the_prompt():
    """In the order of prompts, steps and candidates, NaN left out; a prompt that is there twice is one."""
    prompts, statistics = ["a", "b", "a"], PromptStatistics(buffer_size=6, min_count=3)
    remembered: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    for round_number, expected_counts in enumerate([(4, 2), (6, 3), (6, 4)]):
        rewards_PSK = rng.normal(size=(3, 1, 2)) + round_number
        if round_number:
            rewards_PSK[1, 0, 0] = rewards_PSK[2, 0, 1] = NAN

        found_PSK = advantages(rewards_PSK, prompts, statistics)

        known = [i for i in itertools.product(range(3), [0], range(2)) if not np.isnan(rewards_PSK[i])]
        for i in known:
            text = prompts[i[0]]
            remembered[text] = [*remembered.get(text, []), rewards_PSK[i]][-6:]
        assert (len(remembered["a"]), len(remembered["b"])) == expected_counts
        for i in itertools.product(range(3), [0], range(2)):
            if i not in known:
                assert found_PSK[i] == 0
                continue
            last = remembered[prompts[i[0]]]
            base = last if len(last) >= 3 else [rewards_PSK[j] for j in known]
            assert found_PSK[i] == pytest.approx((rewards_PSK[i] - np.mean(base)) / (np.std(base) + 1e-6), rel=1e-12)


@pytest.mark.parametrize("judges", [1, 2])
def test_advantages_of_rounds_of_another_spread_are_those_of_the_rewards_themselves(online, judges):
    """As DDPO's released code remembers them; several judges' advantages are averaged."""
    config, rng = online("tiny_online:ddpo,tiny"), np.random.default_rng(0)
    names = [f"prompt {p}" for p in range(3)]
    statistics_R, references = ([PromptStatistics() for _ in range(judges)] for _ in range(2))
    remembered = 0
    for spread in (1, 10, 0.1):
        rewards_PSKR = spread * rng.normal(size=(3, 1, 8, judges)) * [1, 1000][:judges] + 2

        _, found_PSK = learnable(config, rewards_PSKR, names, statistics_R)

        expected = [
            reference.advantages([name for name in names for _ in range(8)], rewards_PSKR[..., r].ravel())
            for r, reference in enumerate(references)
        ]
        np.testing.assert_allclose(found_PSK, np.mean(expected, axis=0).reshape(3, 1, 8), rtol=1e-12)
        remembered += 8
        assert all(len(statistics.rewards["prompt 0"]) == min(remembered, 16) for statistics in statistics_R)


def test_advantages_in_a_group_by_several_judges_are_averaged(online):
    config = online("tiny_online:grpo,tiny")
    rewards_PSKR = np.random.default_rng(0).normal(size=(2, 3, 4, 2)) * [1, 1000]

    _, found_PSK = learnable(config, rewards_PSKR, ["a", "b"], [])

    each = [advantages(rewards_PSKR[..., r], ["a", "b"], None) for r in range(2)]
    np.testing.assert_allclose(found_PSK, np.mean(each, axis=0), rtol=1e-12)


def test_what_d3po_prefers(online):
    rewards_PSKR = np.random.default_rng(0).normal(size=(2, 1, 3, 2))
    for fields, expected in (
        ({}, rewards_PSKR),
        ({"online.combine": "mean"}, combined(rewards_PSKR)[..., None]),
        ({"online.best_and_worst": True}, best_and_worst(rewards_PSKR)),
    ):
        preferred_PSKR, advantages_PSK = learnable(online(**fields), rewards_PSKR, ["a", "b"], [])
        np.testing.assert_array_equal(preferred_PSKR, expected)
        np.testing.assert_array_equal(advantages_PSK, np.zeros((2, 1, 3)))


def test_decided_is_what_the_loss_prefers():
    """Of all pairs of two candidates by two judges, with and without words."""
    for a, b, c, d in itertools.product((0.0, 1.0, NAN), repeat=4):
        pair_KR = np.array([[a, b], [c, d]])
        unknown_K = np.isnan(pair_KR).any(axis=1)
        preferred_KK = np.asarray(is_preferred(jnp.asarray(pair_KR[None], jnp.float32)))[0]
        assert is_decided(pair_KR[None]) == bool(preferred_KK.any() and not unknown_K.any()), pair_KR


@pytest.mark.parametrize("method", ["", "ddpo,", "grpo,"])
def test_prompts_whose_candidates_are_alike_are_undecided(online, method):
    config = online(f"tiny_online:{method}tiny", **{"online.candidates": 3})
    same_KR, better_KR = np.full((3, 1), 0.1), np.array([[0.1], [0.2], [0.1]])
    statistics = [PromptStatistics()] if method == "ddpo," else []
    rewards_PSKR = np.stack([same_KR, same_KR])[:, None]
    learned = learnable(config, rewards_PSKR, ["a", "b"], statistics)
    assert decided(config, *learned).tolist() == [False, False]
    if method != "ddpo,":  # which compares with the whole batch
        learned = learnable(config, np.stack([same_KR, better_KR])[:, None], ["a", "b"], statistics)
        assert decided(config, *learned).tolist() == [False, True]
