"""Advantages: how much better the reward of an image is than expected for its prompt.

Computed on the host in float64 with NumPy. Axes: N images, B prompts, K candidates of a prompt.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Real

from dpo_jax.errors import UserError


@dataclasses.dataclass
class PromptStatistics:
    """Normalise rewards by the latest rewards of the same prompt, so that easy prompts do not outweigh hard ones.

    These are DDPO's per-prompt statistics (arXiv 2305.13301), with the sizes and the 1e-6 of its released code.
    """

    buffer_size: int = 16
    """Number of rewards that are remembered per prompt."""
    min_count: int = 16
    """A prompt with fewer rewards is normalised by the mean and the standard deviation of the whole batch."""
    rewards: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The remembered rewards by prompt, oldest first."""

    def __post_init__(self) -> None:
        if not 0 < self.min_count <= self.buffer_size:
            raise UserError(f"min_count={self.min_count} must be between 1 and buffer_size={self.buffer_size}")

    def advantages(self, prompts: Sequence[str], rewards_N: Real[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Remember the rewards of all images, then return `(reward - mean) / (std + 1e-6)` of each.

        Args:
            prompts: prompt of each image.
            rewards_N: reward of each image, of the images of all devices.
        """
        rewards_N = np.asarray(rewards_N, np.float64)
        for prompt, reward in zip(prompts, rewards_N, strict=True):
            self.rewards[prompt] = [*self.rewards.get(prompt, []), float(reward)][-self.buffer_size :]
        advantages_N = np.empty_like(rewards_N)
        for n, prompt in enumerate(prompts):
            enough = len(self.rewards[prompt]) >= self.min_count
            known = np.array(self.rewards[prompt]) if enough else rewards_N
            advantages_N[n] = (rewards_N[n] - known.mean()) / (known.std() + 1e-6)
        return advantages_N


def group_advantages(
    rewards_BK: Real[np.ndarray, "B K"], *, std: float | None = None, epsilon: float = 1e-4
) -> Float[np.ndarray, "B K"]:
    """Return `(reward - mean) / (std + epsilon)` over the candidates of a prompt (arXiv 2402.03300, section 4.1.2).

    This is GRPO's advantage; the standard deviation divides by K. Equal rewards give zero advantages.

    Args:
        rewards_BK: rewards of the candidates.
        std: standard deviation to divide by; None for that of the prompt's own candidates. With that of all rewards, as
            Flow-GRPO's code has it, a prompt whose candidates hardly differ has small advantages.
        epsilon: what is added to the standard deviation.
    """
    rewards_BK = np.asarray(rewards_BK, np.float64)
    mean_B1 = rewards_BK.mean(axis=1, keepdims=True)
    std_B1 = rewards_BK.std(axis=1, keepdims=True) if std is None else std
    return (rewards_BK - mean_B1) / (std_B1 + epsilon)
