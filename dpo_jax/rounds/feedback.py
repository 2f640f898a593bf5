"""Turn the scores that judges or people gave to the images of a round into rewards and advantages for the loss.

Axes: P prompts, K candidates of a prompt, R rewards, S steps (1 where all steps of an image share its reward).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import conform, parse_json, read_text
from dpo_jax.methods import find_method
from dpo_jax.objectives.advantages import PromptStatistics, group_advantages

MAX_BYTES = 2**27
"""Largest size of a feedback file, which is enough for millions of scores."""

MAX_SCORE = 1e18
"""Largest size of a score: its square, which a standard deviation needs, is still a float32."""


def read_feedback(files: Sequence[epath.Path], prompts: int, candidates: int) -> np.ndarray:
    """Return rewards_PK, the mean over files; NaN where no file has a score.

    Each file holds the scores of one person or of a whole vote as `[prompt][candidate]`: numbers, higher is better, and
    null where there is none. This is D3PO's human feedback (arXiv 2311.13231), as `dpo_jax.vote --export=FILE.json`
    writes it.

    Raises:
        UserError: a file is missing, damaged or of another shape.
    """
    all_FPK = np.stack([_read(file, prompts, candidates) for file in files])
    known_FPK = ~np.isnan(all_FPK)
    if not known_FPK.any():
        raise UserError(f"{', '.join(map(str, files))} contains no score. Let people vote first")
    sums_PK, counts_PK = np.where(known_FPK, all_FPK, 0).sum(axis=0), known_FPK.sum(axis=0)
    return np.where(counts_PK > 0, sums_PK / np.maximum(counts_PK, 1), np.nan)


def _read(file: epath.Path, prompts: int, candidates: int) -> np.ndarray:
    if not file.exists():
        raise MissingFileError(f"the feedback file {file} does not exist")
    value = parse_json(read_text(file, MAX_BYTES), str(file))
    where = f"{file} must be a list of lists of numbers, [prompt][candidate]"
    rows: list[list[float | None]] = conform(value, list[list[float | None]], where, strict=False)
    found = sorted({len(row) for row in rows})
    scores_PK = np.array([[np.nan if score is None else score for score in row] for row in rows if len(found) == 1])
    if scores_PK.shape != (prompts, candidates):
        each = " to ".join(str(count) for count in dict.fromkeys([*found[:1], *found[-1:]])) or "0"
        raise UserError(
            f"{file} has scores for {len(rows)} prompts with {each} candidates each, but this round has {prompts} "
            f"prompts with {candidates} candidates each"
        )
    too_large_PK = np.abs(scores_PK) > MAX_SCORE
    if too_large_PK.any():
        p, k = np.argwhere(too_large_PK)[0]
        raise UserError(
            f"{file} has the score {scores_PK[p, k]:g} for prompt {p}; a score must be between {-MAX_SCORE:g} and "
            f"{MAX_SCORE:g}"
        )
    return scores_PK


def combined(rewards_R: np.ndarray) -> np.ndarray:
    """Return the mean over judges, [..., R] -> [...], of rewards divided by the standard deviation of their judge."""
    axes = tuple(range(rewards_R.ndim - 1))
    spread_R = np.nanstd(rewards_R, axis=axes)
    return (rewards_R / np.where(spread_R > 0, spread_R, 1)).mean(axis=-1)


def best_and_worst(rewards_PSKR: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Keep the rewards of the best and the worst candidate of each step, by the first judge; all others become NaN.

    SPO compares only these two (arXiv 2406.04314, section 4.2), and in its released code where
    `softmax([best, worst])` differs by more than the margin.
    """
    first_PSK = rewards_PSKR[..., 0]
    unknown_PSK = np.isnan(first_PSK)
    best_PS1 = np.where(unknown_PSK, -np.inf, first_PSK).argmax(axis=-1, keepdims=True)
    worst_PS1 = np.where(unknown_PSK, np.inf, first_PSK).argmin(axis=-1, keepdims=True)
    kept_PSK = np.zeros(first_PSK.shape, bool)
    for end_PS1 in (best_PS1, worst_PS1):
        np.put_along_axis(kept_PSK, end_PS1, True, axis=-1)
    if margin:
        best_PS1, worst_PS1 = (np.take_along_axis(first_PSK, end_PS1, axis=-1) for end_PS1 in (best_PS1, worst_PS1))
        kept_PSK &= np.tanh((best_PS1 - worst_PS1) / 2) > margin
    return np.where(kept_PSK[..., None], rewards_PSKR, np.nan)


def learnable(
    config: ConfigDict,
    rewards_PSKR: np.ndarray,
    prompts: Sequence[str],
    statistics_R: Sequence[PromptStatistics],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the preferred rewards, [P, S, K, R or 1], and the advantages, [P, S, K].

    Methods that compare candidates read the rewards; the others read the advantages, the mean over judges. These are
    computed from each judge's own scores: scores in units of the spread of one round could not be compared with the
    statistics of earlier rounds.

    Args:
        config: the experiment's config.
        rewards_PSKR: rewards of the round.
        prompts: prompts of the round.
        statistics_R: statistics of each judge's earlier rewards, to which these are added; empty for methods that
            compare candidates and for advantages over groups.
    """
    if find_method(config.loss.name).reads_advantages:
        each_R = itertools.zip_longest(np.moveaxis(rewards_PSKR, -1, 0), statistics_R)
        over_round = config.online.advantage == "round"
        each = [advantages(rewards_PSK, prompts, known, over_round=over_round) for rewards_PSK, known in each_R]
        mean_PSK = np.mean(each, axis=0)
        return combined(rewards_PSKR)[..., None], mean_PSK
    if config.online.combine == "mean":
        rewards_PSKR = combined(rewards_PSKR)[..., None]
    if config.online.best_and_worst:
        rewards_PSKR = best_and_worst(rewards_PSKR, config.online.margin)
    return rewards_PSKR, np.zeros(rewards_PSKR.shape[:-1])


def is_decided(rewards_SKR: np.ndarray) -> bool:
    """Whether a candidate is better than another one at any step, as `preferences.is_preferred` defines it."""
    known_SK1 = ~np.isnan(rewards_SKR).any(axis=-1, keepdims=True)
    rewards_SKR = np.where(known_SK1, rewards_SKR, np.nan)  # or a pair would be compared by what both have
    is_higher_SKK = np.any(rewards_SKR[:, :, None] > rewards_SKR[:, None], axis=-1)
    return bool((is_higher_SKK != np.swapaxes(is_higher_SKK, 1, 2)).any())


def decided(config: ConfigDict, rewards_PSKR: np.ndarray, advantages_PSK: np.ndarray) -> np.ndarray:
    """Return for each prompt whether it teaches anything: a candidate is better, or an advantage is not zero."""
    if find_method(config.loss.name).reads_advantages:
        return (np.abs(advantages_PSK) > 1e-6).any(axis=(1, 2))  # rounding alone makes 1e-9 of equal rewards
    return np.array([is_decided(rewards_SKR) for rewards_SKR in rewards_PSKR])


def advantages(
    rewards_PSK: np.ndarray, prompts: Sequence[str], statistics: PromptStatistics | None, *, over_round: bool = False
) -> np.ndarray:
    """Return the advantage of each reward by the statistics of its prompt, or of its group of candidates without any.

    Unknown rewards (NaN) have advantage 0. The rewards are added to the statistics. With `over_round`, the standard
    deviation is that of all rewards and not of the group's.
    """
    P, S, K = rewards_PSK.shape
    known_PSK = ~np.isnan(rewards_PSK)
    result_PSK = np.zeros((P, S, K))
    if statistics is not None:
        named = [prompts[p] for p, _, _ in np.argwhere(known_PSK)]
        result_PSK[known_PSK] = statistics.advantages(named, rewards_PSK[known_PSK])
        return result_PSK
    std = float(np.std(rewards_PSK[known_PSK])) if over_round and known_PSK.any() else None
    for p, s in np.argwhere(known_PSK.sum(axis=-1) > 1):
        known_K = known_PSK[p, s]
        result_PSK[p, s, known_K] = group_advantages(rewards_PSK[p, s, known_K][None], std=std)[0]
    return result_PSK
