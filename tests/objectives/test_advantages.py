"""Advantages against the released tracker's rules, written plainly."""

from collections import deque

import numpy as np
import pytest

from dpo_jax.objectives.advantages import PromptStatistics, group_advantages


def plain_update(stats, prompts, rewards, buffer_size, min_count):
    """Reference: one deque per prompt, which forgets by itself, in a loop over prompts."""
    prompts, rewards = np.array(prompts), np.array(rewards)
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        own = rewards[prompts == prompt]
        stats.setdefault(prompt, deque(maxlen=buffer_size)).extend(own)
        used = rewards if len(stats[prompt]) < min_count else stats[prompt]
        advantages[prompts == prompt] = (own - np.mean(used)) / (np.std(used) + 1e-6)
    return advantages


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 16), (5, 2), (3, 1)])
def test_rewards_are_normalised_as_in_the_released_code(buffer_size, min_count):
    rng = np.random.default_rng(0)
    ours, theirs = PromptStatistics(buffer_size, min_count), {}
    by_batch = by_prompt = 0
    for _ in range(12):
        prompts = [str(rng.choice(["cat", "dog", "rare"], p=[0.5, 0.45, 0.05])) for _ in range(8)]
        rewards = rng.normal(size=8) + [{"cat": 3, "dog": -2, "rare": 0}[prompt] for prompt in prompts]
        expected = plain_update(theirs, prompts, rewards, buffer_size, min_count)
        np.testing.assert_allclose(ours.advantages(prompts, rewards), expected, rtol=1e-9, atol=1e-9)
        seen = [len(theirs[prompt]) for prompt in prompts]
        by_prompt += sum(count >= min_count for count in seen)
        by_batch += sum(count < min_count for count in seen)
    assert by_prompt > 10
    assert by_batch > 0 or min_count == 1
    assert {prompt: list(known) for prompt, known in theirs.items()} == ours.rewards


def test_what_is_remembered_can_be_kept_and_given_back():
    first = PromptStatistics(4, 2)
    first.advantages(["a", "b", "a"], np.array([1.0, 2.0, 3.0]))

    again = PromptStatistics(4, 2, {prompt: list(rewards) for prompt, rewards in first.rewards.items()})

    batch = ["a", "b"], np.array([0.5, 0.25])
    np.testing.assert_array_equal(again.advantages(*batch), first.advantages(*batch))


def test_whole_numbers_as_rewards_have_fractions_as_advantages():
    np.testing.assert_allclose(PromptStatistics().advantages(["a", "a"], np.array([1, 4])), [-1, 1], rtol=1e-5)


@pytest.mark.parametrize(("buffer_size", "min_count"), [(8, 9), (8, 0), (0, 0)])
def test_statistics_that_never_hold_are_refused(buffer_size, min_count):
    with pytest.raises(ValueError, match=f"min_count={min_count} must be between 1 and buffer_size={buffer_size}"):
        PromptStatistics(buffer_size, min_count)


def test_rewards_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="zip"):
        PromptStatistics().advantages(["a", "b"], np.array([1.0]))


def test_group_advantages_are_standard_scores_over_the_candidates():
    rewards_BK = np.random.default_rng(0).normal(size=(3, 5)) * [[1], [10], [100]] + 7

    advantages_BK = group_advantages(rewards_BK, epsilon=0)

    for b in range(3):
        mean = sum(rewards_BK[b]) / 5
        deviation = (sum((reward - mean) ** 2 for reward in rewards_BK[b]) / 5) ** 0.5
        np.testing.assert_allclose(advantages_BK[b], (rewards_BK[b] - mean) / deviation, rtol=1e-9)


def test_equal_candidates_have_no_advantage():
    np.testing.assert_array_equal(group_advantages(np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])), np.zeros((2, 3)))


def test_epsilon_keeps_tiny_differences_small():
    np.testing.assert_allclose(group_advantages(np.array([[0.0, 2e-6]])), [[-1 / 101, 1 / 101]], rtol=1e-9)
