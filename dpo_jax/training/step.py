"""The training step: batch -> latents -> errors and log-ratios -> loss -> update, one jitted function of arrays.

Read it together with `objectives/denoising.py` (what a log-ratio is) and `methods/dpo.py` (what is minimised).
Gradients are taken here and in `micro_batches.py`, and nowhere else.

Axes: B prompts of a batch, A micro-batches, K candidates.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning, EncodedText, LossInputs, PreferenceBatch
from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.methods.method import Objective
from dpo_jax.methods.metrics import Metrics, pair_metrics, sums_by_noise
from dpo_jax.objectives.denoising import Denoise, compare_denoising, draw, keys_for, perturb
from dpo_jax.training.micro_batches import gradient_of_whole_batch, split_micro_batches, sum_over
from dpo_jax.training.moving_reference import MovingReference, follow
from dpo_jax.training.rounding import store, widened
from dpo_jax.training.side_gradients import side_norms, squares_of_loss
from dpo_jax.weights.layout import Params

Encode = Callable[[Mapping[str, Params], PreferenceBatch, jax.Array], tuple[jax.Array, Conditioning]]
"""(encoders, batch, keys_B) -> (latents_BKHWC, conditioning of the candidates); `encoders` as in `Frozen`."""
Compare = Callable[..., LossInputs]
"""(params, frozen, batch, step, training=False) -> what the loss reads; `training` turns a LoRA's dropout on."""


RUNNING_DECAY = 0.99
"""How much of a running mean remains after a step."""
GRADIENT_NORM = "train/gradient_norm"
"""Name of the running mean of the gradient's norm."""
ROUNDING = 2**32 - 1
"""Stands for rounding among the draws of a seed; no step has this number."""
STEPS_BEFORE_SPIKES = 10
"""Steps that the running mean has to know before a norm is compared with it."""


PARAMETER_GROUPS = {
    "feed_forward": r"\.ff(_context)?\.|\.feed_forward\.|^single_transformer_blocks\.\d+\.proj_",
    "attention": r"attentions\.|\.attn2?\.|\.attention\.",
    "modulation": r"norm\w*\.linear\.|\.adaLN_modulation\.",
    "embeddings": r"emb",
    "convolutions": r"conv|resnets\.",
    "other": r"",
}
"""Groups of parameters whose gradients have a norm of their own: patterns of names, of which the first match counts."""


def group_of(name: str) -> str:
    """Return the group of a parameter; a vector that holds all parameters of a group has the name of the group."""
    return next(group for group, pattern in PARAMETER_GROUPS.items() if group == name or re.search(pattern, name))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The weights that are never trained, in the compute dtype; with a LoRA, `base` may be quantised."""

    base: Params = dataclasses.field(default_factory=dict)
    """What is not trained of the denoiser: all of it with a LoRA, otherwise at most fixed tables."""
    reference: Params = dataclasses.field(default_factory=dict)
    """The weights of the reference that differ from `base`."""
    encoders: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    """The VAE and the text encoders by component; without those whose outputs training reads instead."""
    negative_text: EncodedText | None = None
    """What guidance leads away from, [1, ...], if training reads encoded captions and is guided."""
    old: Params = dataclasses.field(default_factory=dict)
    """The weights of the policy that drew the images that differ from `base`, if it is not the trained one."""

    def policy(self, params: Params) -> Params:
        """Return the weights of the policy: the trained ones and, with a LoRA, those that it is added to."""
        return self.base | params

    def whole_reference(self) -> Params:
        """Return all weights that the policy is compared with."""
        return self.base | self.reference

    def whole_old(self) -> Params:
        """Return all weights that drew the images."""
        return self.base | self.old

    def with_reference(self, moving: MovingReference | None) -> "Frozen":
        """Return the weights with a reference that moves, if there is one, at its present place."""
        return dataclasses.replace(self, reference=self.reference | moving.params) if moving else self

    def with_state(self, state: "TrainState") -> "Frozen":
        """Return the weights with what moves of them at its present place."""
        frozen = self.with_reference(state.reference)
        return frozen if state.old is None else dataclasses.replace(frozen, old=state.old)


class TrainState(NamedTuple):
    """Everything that changes from step to step. A checkpoint holds this and the position in the data."""

    step: Any
    """int32 scalar: the number of optimizer steps made."""
    params: Any
    """The trained weights (`Params`), float32 or bfloat16: the whole denoiser, or a LoRA."""
    opt_state: optax.OptState
    ema: Any
    """Moving average of the trained weights; empty where `ema.decay` is 0."""
    running: Mapping[str, Any] = {}
    """Running means over steps that the method reads, each as (weighted sum, total weight); see `Method.running`."""
    reference: MovingReference | None = None
    """The reference, if it moves; otherwise it is a part of `Frozen`."""
    old: Any = None
    """The policy that draws the images (`Params`), if the method keeps one beside the trained policy."""

    @property
    def drawing(self) -> Any:
        """The weights that images of a round are drawn with."""
        return self.params if self.old is None else self.old


def make_compare(
    encode: Encode,
    denoise: Denoise,
    schedule: Schedule,
    objective: Objective,
    seed: int,
    *,
    dropout: bool = False,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    inversion_steps: int = 0,
    shares: np.ndarray | None = None,
    constrain: Callable[[Any], Any] = lambda tree: tree,
    gather: Callable[[str, Params], Params] = lambda component, params: params,
) -> Compare:
    """Return a function that encodes a batch, draws t and noise, and compares policy and reference on each candidate.

    Every draw is a function of (seed, step, global sample index) alone, so it is the same on 1 or 64 devices and with
    any accumulation.

    Args:
        encode: makes latents and conditioning of a batch.
        denoise: the network.
        schedule: the noise schedule.
        objective: says whether a reference is needed and how many candidates are looked at.
        seed: of all draws.
        dropout: give `denoise` keys for dropout while training.
        noise_offset: see `denoising.draw`; while training only.
        input_perturbation: see `denoising.perturb`; while training only.
        inversion_steps: see `denoising.compare_denoising`; while training only.
        shares: see `denoising.draw`; while training only.
        constrain: keeps the inputs of the networks split over devices along their leading axis, as the batch is.
        gather: brings the weights of a component that are split over devices together where they are used.
    """

    def compare(
        params: Params, frozen: Frozen, batch: PreferenceBatch, step: jax.Array, training: bool = False
    ) -> LossInputs:
        batch = keep_candidates(batch, objective.num_candidates)
        encoders = {name: gather(name, weights) for name, weights in frozen.encoders.items()}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
        posterior_key, diffusion_key, dropout_key = keys
        dropout_keys_B = keys_for(dropout_key, batch.index_B) if training and dropout else None
        latents_BKHWC, conditioning = encode(encoders, batch, keys_for(posterior_key, batch.index_B))
        t_B, noise_BHWC = draw(
            diffusion_key,
            batch.index_B,
            schedule,
            latents_BKHWC.shape[2:],
            latents_BKHWC.dtype,
            offset=noise_offset if training else 0.0,
            shares=shares if training else None,
        )
        perturbed_BHWC = None
        if training and input_perturbation:
            perturbation_key = jax.random.fold_in(diffusion_key, 2**32 - 1)  # no sample has this index
            perturbed_BHWC = perturb(perturbation_key, batch.index_B, noise_BHWC, input_perturbation)
        latents_BKHWC, conditioning, t_B, noise_BHWC, perturbed_BHWC, cell_weight_BKHW = constrain(
            (latents_BKHWC, conditioning, t_B, noise_BHWC, perturbed_BHWC, batch.cell_weight_BKhw)
        )
        policy = gather("denoiser", frozen.policy(params))
        reference = gather("denoiser", frozen.whole_reference()) if objective.needs_reference else None
        inputs = compare_denoising(
            denoise,
            policy,
            reference,
            schedule,
            latents_BKHWC,
            noise_BHWC,
            t_B,
            conditioning,
            dropout_keys_B,
            perturbed_BHWC,
            cell_weight_BKHW,
            inversion_steps=inversion_steps if training else 0,
        )
        return with_batch(inputs, batch)

    return compare


def make_train_step(
    compare: Compare,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: DTypeLike | None = None,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    skip_spikes: float = 0.0,
    frozen_names: Collection[str] = (),
    reference_every: int = 0,
    reference_decay: float = 0.0,
    old_every: int = 0,
    old_decay: Callable[[jax.Array], jax.Array] | None = None,
    seed: int = 0,
) -> Callable[[TrainState, Frozen, PreferenceBatch], tuple[TrainState, Metrics]]:
    """Return `step(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    The trained weights are rounded once to `compute_dtype`, the dtype of the model's layers, if it is given; gradients
    are taken there, and summed in the dtype of the weights. Weights in bfloat16, and sums of their gradients, are
    rounded stochastically, by `seed` and step.

    The loss is the mean over the batch weighted by `weight_B`. With accumulation the batch is cut into micro-batches
    whose gradients are summed before the one update, which gives the gradient of the whole batch.

    A batch whose weights are all 0, such as one pair of candidates that people find equally good, makes no update: only
    the step number changes, not the momentum, weight decay, averages or the optimizer's own count of steps. The same
    holds for a batch whose loss or gradient is not finite; the metric `train/skipped` is then 1. With `skip_spikes`, it
    also holds for a gradient whose norm is more than that many times its running mean over the steps that were not
    skipped, which `state.running` has under `GRADIENT_NORM`.

    The parameters of `frozen_names` keep their values. They have no gradient, so that no norm counts them, and the
    optimizer must give no update for them.

    If `state.reference` is set, it moves before the step that follows `reference_every` updates; see
    `moving_reference.follow`. A step that makes no update does not count.

    If `state.old` is set, `old_decay(step + 1)` of it remains after every `old_every` steps, and the policy replaces
    the rest.
    """

    def summed(inputs: LossInputs) -> tuple[jax.Array, Metrics]:
        """The loss, and all numbers to watch, summed over the prompts with their weights; also `squares_of_loss`."""
        numbers = {"train/loss": objective.loss(inputs)} | objective.metrics(inputs)
        numbers |= {f"running/{name}": number(inputs) for name, number in objective.running.items()}
        sums = {name: jnp.sum(value * inputs.weight_B) for name, value in numbers.items()}
        sums |= squares_of_loss(lambda inputs: jnp.sum(objective.loss(inputs) * inputs.weight_B), inputs)
        return sums["train/loss"], sums | sums_by_noise(numbers, inputs)

    def step(state: TrainState, frozen: Frozen, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        running = current_means(state.running)
        rounded = round_once(state.params, compute_dtype)
        changing, rounded_changing = (
            {name: x for name, x in params.items() if name not in frozen_names} for params in (state.params, rounded)
        )
        if state.reference:
            reference = follow(state.reference, state.params, every=reference_every, decay=reference_decay)
            state, frozen = state._replace(reference=reference), frozen.with_reference(reference)
        if state.old is not None:
            frozen = dataclasses.replace(frozen, old=round_once(state.old, compute_dtype))

        def inputs_of(params: Params, batch: PreferenceBatch) -> LossInputs:
            return compare(rounded | params, frozen, batch, state.step, training=True)._replace(running=running)

        def gradient(batch: PreferenceBatch) -> tuple[Params, Metrics]:
            return jax.grad(lambda params: summed(inputs_of(params, batch)), has_aux=True)(rounded_changing)

        rounding_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUNDING), state.step)
        if accumulation == 1:  # XLA's CPU backend runs convolution gradients inside a scan far slower
            grads, sums = gradient(batch)
        else:
            micro = jax.tree.map(lambda x: split_micro_batches(x, accumulation), batch)
            if objective.over_whole_batch:
                grads, sums = gradient_of_whole_batch(
                    inputs_of, summed, rounded_changing, micro, like=changing, key=rounding_key
                )
            else:
                grads, sums = sum_over(gradient, micro, like=changing, key=rounding_key)

        grads = widened(jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, changing))
        weight = jnp.sum(prompt_weights(batch, objective.num_candidates))
        total_weight = jnp.maximum(weight, 1e-8)
        grads, metrics = jax.tree.map(lambda x: x / total_weight.astype(x.dtype), (grads, sums))
        means = {name: metrics.pop(f"running/{name}") for name in objective.running}
        norm = optax.tree.norm(grads)
        skips = ~(jnp.isfinite(metrics["train/loss"]) & jnp.isfinite(norm))
        if skip_spikes:
            skips |= is_spike(norm, state.running, skip_spikes)
            means[GRADIENT_NORM] = norm
        skips &= weight > 0
        changes = (weight > 0) & ~skips
        metrics["train/skipped"] = skips.astype(jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, changing)
        metrics["train/gradient_norm"] = norm
        metrics |= gradient_norms(grads) | side_norms(metrics, total_weight)
        updates, update_norm = with_norm(updates, changing)
        metrics["train/update_norm"] = jnp.where(weight > 0, update_norm, 0)
        updated = jax.tree.map(jnp.add, widened(changing), updates)
        params = state.params | store(updated, changing, jax.random.fold_in(rounding_key, 0))
        ema = moving_average(state.ema, params, state.step, ema_decay) if ema_decay else state.ema
        new = state._replace(params=params, opt_state=opt_state, ema=ema, running=running_means(state.running, means))
        if state.reference:
            new = new._replace(reference=state.reference._replace(updates=state.reference.updates + 1))
        kept = jax.tree.map(lambda new, old: jnp.where(changes, new, old), new, state)
        kept = kept._replace(step=state.step + 1)
        if old_decay is not None:
            remains = jnp.where(kept.step % old_every == 0, old_decay(kept.step), 1.0)
            kept = kept._replace(old=interpolate(kept.params, kept.old, remains))
        return kept, metrics

    return step


def interpolate(start: Params, end: Params, share: jax.Array) -> Params:
    """Return `(1 - share) start + share end`, exactly the one or the other where the share is 0 or 1."""

    def between(x: jax.Array, y: jax.Array) -> jax.Array:
        mixed = x + share.astype(x.dtype) * (y - x)
        return jnp.where(share == 1, y, mixed)

    return jax.tree.map(between, start, end)


def round_once(params: Params, dtype: DTypeLike | None) -> Params:
    """Return the weights in the dtype of the model's layers, as one array each for all micro-batches and devices.

    Without the barrier the compiler rounds again wherever a weight is read, and devices exchange float32.
    """
    if dtype is None or all(x.dtype == dtype for x in params.values()):
        return params
    return jax.lax.optimization_barrier({name: x.astype(dtype) for name, x in params.items()})


def with_norm(updates: Any, params: Params) -> tuple[Params, jax.Array]:
    """Return the updates and their norm.

    Where weights are in bfloat16, the update of a parameter is tied to the squares of those before it. Otherwise XLA
    computes all updates before it rounds the first, which takes 6.5 bytes for each weight, as compiled for an H200 with
    moments in 8 bits; tied, no more than three parameters have one at a time.
    """
    if all(x.dtype != jnp.bfloat16 for x in params.values()):
        return updates, optax.tree.norm(updates)
    square, tied = jnp.zeros(()), {}
    for name, x in updates.items():
        tied[name], square = jax.lax.optimization_barrier((x, square))
        square += jnp.sum(jnp.square(tied[name]))
    return tied, jnp.sqrt(square)


def is_spike(norm: jax.Array, running: Any, factor: float) -> jax.Array:
    """Return whether a gradient's norm is more than `factor` times its running mean, once that knows enough steps."""
    known = running[GRADIENT_NORM][1] >= 0.999 * (1 - RUNNING_DECAY**STEPS_BEFORE_SPIKES)
    return known & (norm > factor * current_means(running)[GRADIENT_NORM])


def gradient_norms(grads: Params) -> Metrics:
    """Return the norm of the gradient of each group of parameters; empty if there is one group."""
    groups: dict[str, Params] = {}
    for name, grad in grads.items():
        groups.setdefault(group_of(name), {})[name] = grad
    if len(groups) == 1:
        return {}
    return {f"gradient_norm/{group}": optax.tree.norm(of_group) for group, of_group in groups.items()}


def current_means(running: Any) -> dict[str, jax.Array]:
    """Return the running means, 0 before the first step."""
    return {name: total / jnp.maximum(weight, 1e-30) for name, (total, weight) in running.items()}


def running_means(running: Any, means: Metrics) -> Any:
    """Return (weighted sum, total weight) of each number after one more step; older steps count less and less."""
    return {
        name: (RUNNING_DECAY * total + (1 - RUNNING_DECAY) * means[name], RUNNING_DECAY * weight + 1 - RUNNING_DECAY)
        for name, (total, weight) in running.items()
    }


def moving_average(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Return the moving average after `step` + 1 updates, as `diffusers.training_utils.EMAModel` computes it.

    The decay grows during the run, `min(decay, (1 + step) / (10 + step))`, and the first update replaces the average,
    so that early averages do not depend on the initial weights.
    """
    now = jnp.where(step > 0, jnp.minimum(decay, (1 + step) / (10 + step)), 0.0)
    return jax.tree.map(lambda average, value: average - (1 - now).astype(value.dtype) * (average - value), ema, params)


def make_eval_step(
    compare: Compare,
    metrics: Callable[[LossInputs], Metrics] = pair_metrics,
) -> Callable[[Params, Frozen, PreferenceBatch, jax.Array], tuple[Metrics, jax.Array]]:
    """Return `evaluate(params, frozen, batch, draw_number) -> (weighted sums, total weight)`, without a gradient."""

    def evaluate(
        params: Params, frozen: Frozen, batch: PreferenceBatch, number: jax.Array
    ) -> tuple[Metrics, jax.Array]:
        inputs = compare(params, frozen, batch, number)
        numbers = metrics(inputs)
        sums = {name: jnp.sum(value * inputs.weight_B) for name, value in numbers.items()}
        return sums | sums_by_noise(numbers, inputs), jnp.sum(inputs.weight_B)

    return evaluate


def prompt_weights(batch: PreferenceBatch, count: int | None = None) -> jax.Array:
    """Return weight_B, with 0 where nothing can be compared: of the best `count` candidates all but one are padding.

    One candidate is enough where `count`, or the number of candidates of the batch, is 1.
    """
    valid_BK = batch.valid_BK[:, :count]
    return batch.weight_B * (valid_BK.sum(axis=1) >= min(2, valid_BK.shape[1]))


def with_batch(inputs: LossInputs, batch: PreferenceBatch) -> LossInputs:
    """Add what a loss reads of the batch itself."""
    return inputs._replace(preference_BK=batch.preference_BK, valid_BK=batch.valid_BK, weight_B=prompt_weights(batch))


def keep_candidates(batch: PreferenceBatch, count: int | None) -> PreferenceBatch:
    """Return the batch with only its best `count` candidates; None keeps all."""
    return batch._replace(
        inputs=jax.tree.map(lambda x_BN: x_BN[:, :count], batch.inputs),  # N candidates, or their captions
        size_cond_BK6=batch.size_cond_BK6[:, :count],
        preference_BK=batch.preference_BK[:, :count],
        valid_BK=batch.valid_BK[:, :count],
        cell_weight_BKhw=jax.tree.map(lambda x_BKhw: x_BKhw[:, :count], batch.cell_weight_BKhw),
    )
