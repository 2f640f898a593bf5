"""From rewards to advantages: how much better an image is than was to be expected of its prompt.

On the host, in float64 NumPy. Axes: N images, B prompts, K candidates of a prompt.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpo_jax.errors import UserError


@dataclasses.dataclass
class PromptStatistics:
    """Rewards are normalised by the last ones of their own prompt, so that easy prompts don't drown hard ones.

    DDPO's per-prompt statistics (arXiv 2305.13301), with the sizes and the 1e-6 of its released code.
    """

    buffer_size: int = 16
    """How many rewards of a prompt are remembered."""
    min_count: int = 16
    """A prompt with fewer is normalised by the mean and the deviation of the whole batch."""
    rewards: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """What is remembered, oldest first."""

    def __post_init__(self) -> None:
        if not 0 < self.min_count <= self.buffer_size:
            raise UserError(f"min_count={self.min_count} must be in 1..{self.buffer_size}, the rewards remembered")

    def advantages(self, prompts: Sequence[str], rewards_N: np.ndarray) -> np.ndarray:
        """`(reward - mean) / (std + 1e-6)` of each image, after remembering the rewards of all.

        Args:
            prompts: of each image.
            rewards_N: theirs; of the images of all devices, since all of them count.
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


def group_advantages(rewards_BK: np.ndarray, *, epsilon: float = 1e-4) -> np.ndarray:
    """`(reward - mean) / (std + epsilon)` over the candidates of a prompt (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation is that of the K rewards themselves, divided by K. Where all candidates are as good nobody has an
    advantage.
    """
    rewards_BK = np.asarray(rewards_BK, np.float64)
    mean_B1, std_B1 = rewards_BK.mean(axis=1, keepdims=True), rewards_BK.std(axis=1, keepdims=True)
    return (rewards_BK - mean_B1) / (std_B1 + epsilon)
