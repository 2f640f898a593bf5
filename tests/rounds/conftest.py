"""Configs of online learning, and rounds that nothing sampled.

P prompts, K candidates, S random steps, J shared or own beginnings of a step, L tokens.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax.cli import flatten, load_config
from dpo_jax.methods import find_method
from dpo_jax.rounds.config import round_sizes
from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.rounds.rollout import StoredTrajectory
from dpo_jax.rounds.updates import Updates
from dpo_jax.training.defaults import with_fields

ROOT = Path(__file__).parents[2]
L = 6


@pytest.fixture(scope="session")
def online() -> Callable[..., ConfigDict]:
    """`online("tiny_online:ddpo", **{"online.candidates": 3})`: a config with fields replaced."""

    def make(name: str = "tiny_online:tiny", **fields: object) -> ConfigDict:
        file, _, variant = name.partition(":")
        return with_fields(load_config(f"{ROOT}/configs/{file}.py:{variant}"), fields)

    return make


class Made:
    """A round whose latents tell what they are of: prompt p, step s, candidate k."""

    def __init__(self, workdir: Path, config: ConfigDict, num_steps: int = 5, *, number: int = 0):
        P, K = config.online.prompts_per_round, config.online.candidates
        self.config = config
        self.steps_S = np.arange(num_steps, dtype=np.int32) + 2  # rows of the sampler's table
        self.plan = round_sizes(config, self.steps_S, device_count=1, process_count=1)
        self.folder = RoundFolder(workdir, number, [f"prompt {p}" for p in range(P)])
        self.text_P = np.arange(P * L, dtype=np.int32).reshape(P, L)
        self.with_means = find_method(config.loss.name).reads_old_means(flatten(config))
        J = 1 if config.online.branching else K
        for p in range(P):
            of_SK = 100 * p + 10 * np.arange(num_steps)[:, None] + np.arange(K)
            x_SKhwC, next_x_SKhwC = (
                np.broadcast_to((of_SK + shift)[..., None, None, None], (num_steps, K, 2, 2, 4)).astype(np.float32)
                for shift in (0.25, 0.5)
            )
            mean_SJhwC = x_SKhwC[:, :J] + 0.125 if self.with_means else None
            trajectory = StoredTrajectory(x_SKhwC[:, :J], next_x_SKhwC, -of_SK.astype(np.float32), mean_SJhwC)
            self.folder.write_trajectory(p, trajectory, None)

    def updates(self, rewards_PSKR: np.ndarray | None = None, *, advantages=None, step: int = 0) -> Updates:
        P, K = len(self.folder.prompts), self.config.online.candidates
        if rewards_PSKR is None:
            rewards_PSKR = np.arange(float(P * K)).reshape(P, 1, K, 1)
        if advantages is None:
            advantages = np.zeros(rewards_PSKR.shape[:3])
        return Updates(
            self.config,
            self.plan,
            self.folder,
            self.steps_S,
            self.text_P,
            rewards_PSKR,
            advantages,
            step=step + self.folder.number * self.plan.updates,
        )


@pytest.fixture
def made_round(tmp_path: Path, online: Callable[..., ConfigDict]) -> Callable[..., Made]:
    """`made_round(number=1, **{"online.candidates": 3})`: 6 prompts, 2 in an update, 5 random steps, all trained on."""

    def make(number: int = 0, num_steps: int = 5, **fields: object) -> Made:
        defaults = {
            "online.prompts_per_round": 6,
            "data.batch_size": 2,
            "online.timesteps": 1.0,
            "online.reference": "initial",
        }
        return Made(tmp_path, online(**defaults | fields), num_steps, number=number)

    return make
