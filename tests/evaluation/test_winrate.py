"""Win rates and their intervals."""

import numpy as np
import pytest
from scipy import stats

from dpo_jax.evaluation.compare import compare, judged_samples, read_prompts
from dpo_jax.evaluation.winrate import win_rate
from dpo_jax.rewards import open_judge


def test_ties_count_half_and_are_reported():
    result = win_rate(np.array([[1, 0, 0.5], [1, 1, 1]]), np.array([[0, 1, 0.5], [0, 0, 1]]))
    assert result.rate == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 0.5) / 6)
    assert (result.ties, result.comparisons) == (2, 6)


def test_interval_is_students_t_over_prompts():
    rng = np.random.default_rng(0)
    tuned, base = rng.random((30, 5)), rng.random((30, 5))
    result = win_rate(tuned, base)
    per_prompt = (tuned > base).mean(axis=1)
    low, high = stats.t.interval(0.95, 29, loc=per_prompt.mean(), scale=stats.sem(per_prompt))
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


def test_correlated_seeds_widen_the_interval():
    wins_P1 = np.random.default_rng(0).integers(0, 2, (40, 1))
    repeated = np.repeat(wins_P1, 25, axis=1)
    clustered, once = win_rate(repeated, 1 - repeated), win_rate(wins_P1, 1 - wins_P1)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low)


def test_interval_stays_within_0_and_1_and_needs_two_prompts():
    result = win_rate(np.array([[1.0], [1.0], [0.4]]), np.array([[0.0], [0.0], [0.5]]))
    assert result.high == 1
    with pytest.raises(ValueError, match="at least 2 prompts"):
        win_rate(np.ones((1, 4)), np.zeros((1, 4)))


def test_both_models_get_the_same_seeds_and_every_pair_its_own():
    calls = []

    def generate(params, captions, seeds):
        calls.append((list(captions), list(seeds)))
        return np.full((len(captions), 32, 32, 3), 200, np.uint8)

    prompts = ["a red circle at the top left", "a blue square at the top left"]
    (base, base_scores), (tuned, scores) = (
        judged_samples(generate, {"w": w}, prompts, seeds=3, judge=open_judge("shapes")) for w in (0, 1)
    )
    assert calls[0] == calls[1]
    assert calls[0][0] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert len(set(calls[0][1])) == 6
    assert base.shape == tuned.shape == (2, 3, 32, 32, 3)
    figures = compare(scores, base_scores)
    assert (figures["win_rate"], figures["ties"], figures["comparisons"]) == (0.5, 6, 6)


def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompt"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        read_prompts(tmp_path / "absent.txt")
