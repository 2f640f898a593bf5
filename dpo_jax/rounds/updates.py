"""The batches of a round: which prompts, timesteps and candidates each optimizer step trains on.

Axes: P prompts of a round, B prompts of an optimizer step, T timesteps of it, K candidates, S learned steps, R rewards,
L tokens. A batch has B * T rows, the timesteps of a prompt one after the other.
"""

import itertools

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.batch import DrawnImages, EncodedText, PreferenceBatch, Sampled, Transitions
from dpo_jax.cli import flatten
from dpo_jax.methods import find_method
from dpo_jax.rounds.config import RoundSizes
from dpo_jax.rounds.feedback import is_decided
from dpo_jax.rounds.folder import RoundFolder


class Updates:
    """This process's share of the batches of a round; all random choices follow from the seed and the round.

    Args:
        config: the experiment's config.
        plan: sizes of its rounds.
        folder: folder of the round.
        steps_S: rows of the sampler's table that can be trained on, as `learned_steps` or `window_steps` returns them.
        text_P: token ids or features of the round's prompts, [P, ...].
        rewards_PSKR: rewards by which candidates are preferred; S is 1 if all steps share them.
        advantages_PSK: advantages; S is 1 if all steps share them.
        step: number of optimizer steps made so far.
    """

    def __init__(
        self,
        config: ConfigDict,
        plan: RoundSizes,
        folder: RoundFolder,
        steps_S: np.ndarray,
        text_P: np.ndarray | EncodedText,
        rewards_PSKR: np.ndarray,
        advantages_PSK: np.ndarray,
        step: int,
    ):
        self._config, self._plan, self._folder, self._steps_S = config, plan, folder, steps_S
        self._text_P = text_P
        self._rewards_PSKR, self._advantages_PSK = rewards_PSKR.astype(np.float32), advantages_PSK.astype(np.float32)
        self._step = step
        self._read_P = np.zeros(0, int)
        """The prompts of the batch that was read last."""

    def get_state(self) -> dict[str, int]:
        return {"position": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self._step = state["position"]

    def describe(self, batch: PreferenceBatch) -> list[str]:
        """The prompt of each example of the batch that was read last."""
        prompts = [f"round {self._folder.number}, prompt {p} {self._folder.prompts[p]!r}" for p in self._read_P]
        return [prompt for prompt in prompts for _ in range(self._plan.timesteps)]

    def __next__(self) -> PreferenceBatch:
        plan, config, round_number = self._plan, self._config, self._folder.number
        update = self._step - round_number * plan.updates
        epoch, rest = divmod(update, plan.updates // config.online.epochs)
        batch, pair = divmod(rest, plan.pairs)
        B = config.data.batch_size
        rng = np.random.default_rng([config.seed, round_number, epoch])
        chosen = rng.permutation(len(self._folder.prompts))[batch * B : (batch + 1) * B]
        here = np.array_split(chosen, jax.process_count())[jax.process_index()]
        K = config.online.candidates
        of_pair = list(itertools.combinations(range(K), 2))[pair] if plan.pairs > 1 else range(K)
        rows = [self._rows(p, epoch, np.array(of_pair)) for p in here]
        self._step, self._read_P = self._step + 1, here
        joined: PreferenceBatch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
        index_B = np.arange(len(joined.weight_B), dtype=np.int32) + jax.process_index() * plan.derived.local_batch_size
        return joined._replace(index_B=index_B)

    def _rows(self, p: int, epoch: int, candidates_K: np.ndarray) -> PreferenceBatch:
        """The T rows of one prompt."""
        T, S, size = self._plan.timesteps, len(self._steps_S), float(self._config.data.resolution)
        chosen_T = np.arange(S)
        if T < S:
            rng = np.random.default_rng([self._config.seed, self._folder.number, epoch, p])
            chosen_T = np.sort(rng.choice(S, T, replace=False))
        rewards_SKR, advantages_SK = self._rewards_PSKR[p][:, candidates_K], self._advantages_PSK[p][:, candidates_K]
        each_T = chosen_T if len(rewards_SKR) > 1 else np.zeros(T, int)
        preference_TKR = rewards_SKR[each_T]
        # Nothing is learned of what people, or an update's only pair, leave undecided. Where judges leave it so, it
        # counts in its update, as in D3PO's released code.
        skips = self._plan.pairs > 1 or not self._config.online.judges
        is_undecided = skips and not self._decides(rewards_SKR[0])
        return PreferenceBatch(
            inputs=self._inputs(p, chosen_T, candidates_K, advantages_SK[each_T]),
            size_cond_BK6=np.tile(np.array([size, size, 0, 0, size, size], np.float32), (T, len(candidates_K), 1)),
            preference_BK=preference_TKR,
            valid_BK=np.ones((T, len(candidates_K)), bool),
            weight_B=np.full(T, 0.0 if is_undecided else 1.0, np.float32),
            index_B=np.zeros(T, np.int32),
        )

    def _inputs(
        self, p: int, chosen_T: np.ndarray, candidates_K: np.ndarray, advantage_TK: np.ndarray
    ) -> Sampled | DrawnImages:
        """What the step reads of a prompt's candidates: their transitions at the chosen steps, or the images alone."""
        T, S, K = len(chosen_T), len(self._steps_S), self._config.online.candidates
        text_TM = jax.tree.map(lambda x_P: np.broadcast_to(x_P[p], (T, 1, *x_P.shape[1:])), self._text_P)
        method = find_method(self._config.loss.name)
        if not method.reads_transitions:
            x0_KhwC = self._folder.read_latents(p, K)[candidates_K]
            x0_TKhwC = np.broadcast_to(x0_KhwC, (T, *x0_KhwC.shape))
            return DrawnImages(x0_TKhwC, self._steps_S[chosen_T], text_TM, advantage_TK)
        J, with_means = 1 if self._config.online.branching else K, method.reads_old_means(flatten(self._config))
        trajectory = self._folder.read_trajectory(p, S, K, J, with_means=with_means)
        of_J = candidates_K if J == K else np.zeros(1, int)  # with branching, candidates share x and the mean
        transitions = Transitions(
            trajectory.x_SJhwC[chosen_T][:, of_J],
            trajectory.next_x_SKhwC[chosen_T][:, candidates_K],
            self._steps_S[chosen_T],
            trajectory.log_prob_SK[chosen_T][:, candidates_K],
            trajectory.mean_SJhwC[chosen_T][:, of_J] if with_means else None,
        )
        return Sampled(transitions, text_TM, advantage_TK)

    def _decides(self, rewards_KR: np.ndarray) -> bool:
        """Whether a candidate is better than another (`preferences.is_preferred`); for advantages, known."""
        if find_method(self._config.loss.name).reads_advantages:
            return not bool(np.isnan(rewards_KR).all())
        return is_decided(rewards_KR[None])
