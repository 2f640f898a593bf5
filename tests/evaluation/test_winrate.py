"""Win rates and their intervals."""

import numpy as np
import pytest
from scipy import stats

from dpo_jax.evaluation.winrate import WinRate, describe_win_rate, mean_over_prompts, rate_over_prompts, verdict


def win_rate(scores_PS: np.ndarray, base_scores_PS: np.ndarray) -> WinRate:
    """The win rate of scores compared one by one."""
    return rate_over_prompts((1 + np.sign(scores_PS - base_scores_PS)) / 2)


def test_ties_count_half_and_are_reported():
    result = win_rate(np.array([[1, 0, 0.5], [1, 1, 1]]), np.array([[0, 1, 0.5], [0, 0, 1]]))
    assert result.rate == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 0.5) / 6)
    assert (result.ties, result.comparisons) == (2, 6)


def test_with_many_prompts_the_interval_is_that_of_the_normal_law():
    rng = np.random.default_rng(0)
    tuned, base = rng.random((300, 5)), rng.random((300, 5))
    result = win_rate(tuned, base)
    per_prompt = (tuned > base).mean(axis=1)
    low, high = stats.norm.interval(0.95, loc=per_prompt.mean(), scale=stats.sem(per_prompt))
    assert (result.low, result.high) == (pytest.approx(low, abs=0.003), pytest.approx(high, abs=0.003))


def test_correlated_seeds_widen_the_interval():
    wins_P1 = np.random.default_rng(0).integers(0, 2, (40, 1))
    repeated = np.repeat(wins_P1, 25, axis=1)
    clustered, once = win_rate(repeated, 1 - repeated), win_rate(wins_P1, 1 - wins_P1)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        rate_P = rng.beta(3, 2, size=60)  # prompts differ: the truth is their mean, 0.6
        result = rate_over_prompts([rng.random(4) < rate for rate in rate_P])
        held += result.low <= 0.6 <= result.high
    assert 0.9 <= held / 200 <= 0.99


def test_prompts_count_alike_however_many_images_each_has():
    mean, low, high = mean_over_prompts([np.zeros(1), np.ones(9)])
    assert (mean, low, high) == (0.5, 0, 1)
    assert mean_over_prompts([np.zeros(1), np.ones(9)]) == (mean, low, high)


def test_interval_stays_within_0_and_1_and_needs_two_prompts():
    result = win_rate(np.array([[1.0], [1.0], [0.4]]), np.array([[0.0], [0.0], [0.5]]))
    assert result.high == 1
    with pytest.raises(ValueError, match="at least 2 prompts"):
        win_rate(np.ones((1, 4)), np.zeros((1, 4)))


def test_a_win_rate_is_written_in_one_way():
    clear = WinRate(0.6181, 0.5716, 0.6629, ties=3, comparisons=580)
    assert describe_win_rate("tuned", "base", clear) == "tuned over base: win rate 61.8% [57.2%, 66.3%]"
    preferred = "tuned is clearly preferred over base by pickscore: win rate 61.8% [57.2%, 66.3%]."
    assert verdict("tuned", "base", clear, "pickscore") == preferred
    assert verdict("base", "tuned", clear.reverse(), "pickscore") == preferred


@pytest.mark.parametrize(
    "rate", [WinRate(0.53, 0.48, 0.58, 0, 9), WinRate(0.6, 0.5, 0.7, 0, 9), WinRate(*[0.5] * 3, 4, 4)]
)
def test_an_interval_that_contains_a_half_is_no_clear_difference(rate):
    said = verdict("tuned", "base", rate, "raters")
    assert said == f"There is no clear difference by raters: tuned over base: win rate {rate}."
