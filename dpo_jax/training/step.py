"""The training step: batch -> latents -> log-ratios -> loss -> update, one jitted function of arrays.

Read it together with `objectives/denoising.py` (what a log-ratio is) and `objectives/losses.py` (what is minimised).
Gradients are taken here and nowhere else.

Axes: B prompts of a batch, A micro-batches, K candidates.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.batch import Conditioning, LogRatios, PreferenceBatch
from dpo_jax.diffusion.schedule import Schedule
from dpo_jax.objectives.denoising import Denoise, candidate_log_ratios, draw, keys_for, perturb
from dpo_jax.objectives.losses import implicit_accuracy, margin
from dpo_jax.weights.layout import Params

Metrics = dict[str, jax.Array]
Encode = Callable[[Mapping[str, Params], PreferenceBatch, jax.Array], tuple[jax.Array, Conditioning]]
"""(encoders, batch, keys_B) -> (latents_BKHWC, conditioning of the candidates); `encoders` as in `Frozen`."""
ComputeLogRatios = Callable[..., LogRatios]
"""(params, frozen, batch, step, training=False) -> log-ratios; `training` turns a LoRA's dropout on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The weights that are never trained, in the compute dtype."""

    base: Params = dataclasses.field(default_factory=dict)
    """The UNet that a LoRA is added to; empty if the whole UNet is trained."""
    reference: Params = dataclasses.field(default_factory=dict)
    """The weights of the reference that differ from `base`."""
    encoders: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    """The VAE and the text encoders by component; empty if training reads stored latents and embeddings."""

    def policy(self, params: Params) -> Params:
        """Return the weights of the policy: the trained ones and, with a LoRA, those that it is added to."""
        return self.base | params

    def whole_reference(self) -> Params:
        """Return all weights that the policy is compared with."""
        return self.base | self.reference


class TrainState(NamedTuple):
    """Everything that changes from step to step. A checkpoint holds this and the position in the data."""

    step: Any
    """int32 scalar: the number of optimizer steps made."""
    params: Any
    """The trained weights (`Params`), float32: the whole UNet, or a LoRA."""
    opt_state: optax.OptState
    ema: Any
    """Moving average of the trained weights; empty where `ema.decay` is 0."""


def pair_metrics(log_ratios: LogRatios, preference_BK: jax.Array) -> Metrics:
    """Return, per prompt, the errors of the best and worst candidate and, if there are two, accuracy and margin."""
    metrics = {"error/winner": log_ratios.error_BK[:, 0]}
    if log_ratios.error_BK.shape[1] > 1:
        metrics["error/loser"] = log_ratios.error_BK[:, -1]
        metrics["pair/accuracy"] = implicit_accuracy(log_ratios)
        metrics["reward/margin"] = margin(log_ratios)
    if log_ratios.reference_error_BK is not None:
        metrics["error/reference_winner"] = log_ratios.reference_error_BK[:, 0]
        if log_ratios.error_BK.shape[1] > 1:
            metrics["error/reference_loser"] = log_ratios.reference_error_BK[:, -1]
    return metrics


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective: a loss of log-ratios, and the candidates and models that it needs."""

    loss: Callable[[LogRatios, jax.Array], jax.Array]
    """Maps (log_ratios, preference_BK) to loss_B."""
    needs_reference: bool = True
    num_candidates: int | None = None
    """Number of candidates that enter the step, the best ones (SFT: 1); None for all."""
    metrics: Callable[[LogRatios, jax.Array], Metrics] = pair_metrics
    """Maps (log_ratios, preference_BK) to numbers to watch, one per prompt."""


def make_log_ratios(
    encode: Encode,
    denoise: Denoise,
    schedule: Schedule,
    objective: Objective,
    seed: int,
    *,
    dropout: bool = False,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    constrain: Callable[[Any], Any] = lambda tree: tree,
    gather: Callable[[str, Params], Params] = lambda component, params: params,
) -> ComputeLogRatios:
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
        constrain: keeps the inputs of the networks split over devices along their leading axis, as the batch is.
        gather: brings the weights of a component that are split over devices together where they are used.
    """

    def compute_log_ratios(
        params: Params, frozen: Frozen, batch: PreferenceBatch, step: jax.Array, training: bool = False
    ) -> LogRatios:
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
        )
        perturbed_BHWC = None
        if training and input_perturbation:
            perturbation_key = jax.random.fold_in(diffusion_key, 2**32 - 1)  # no sample has this index
            perturbed_BHWC = perturb(perturbation_key, batch.index_B, noise_BHWC, input_perturbation)
        latents_BKHWC, conditioning, t_B, noise_BHWC, perturbed_BHWC = constrain(
            (latents_BKHWC, conditioning, t_B, noise_BHWC, perturbed_BHWC)
        )
        policy = gather("unet", frozen.policy(params))
        reference = gather("unet", frozen.whole_reference()) if objective.needs_reference else None
        return candidate_log_ratios(
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
        )

    return compute_log_ratios


def make_train_step(
    compute_log_ratios: ComputeLogRatios,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Frozen, PreferenceBatch], tuple[TrainState, Metrics]]:
    """Return `step(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    The loss is the mean over the batch weighted by `weight_B`. With accumulation the batch is cut into micro-batches
    whose gradients are summed before the one update, which gives the gradient of the whole batch.

    A batch whose weights are all 0, such as one pair of candidates that people find equally good, makes no update: only
    the step number changes, not the momentum, weight decay, averages or the optimizer's own count of steps.
    """

    def summed_loss(
        params: Params, frozen: Frozen, batch: PreferenceBatch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        log_ratios = compute_log_ratios(params, frozen, batch, step, training=True)
        preference_BK = batch.preference_BK[:, : log_ratios.log_ratio_BK.shape[1]]
        loss_B = objective.loss(log_ratios, preference_BK)
        metrics = {"train/loss": loss_B} | objective.metrics(log_ratios, preference_BK)
        weight_B = prompt_weights(batch, objective)
        sums = {name: jnp.sum(value * weight_B) for name, value in metrics.items()}
        return sums["train/loss"], sums

    gradient = jax.grad(summed_loss, has_aux=True)

    def step(state: TrainState, frozen: Frozen, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        def of_batch(batch: PreferenceBatch) -> tuple[Params, Metrics]:
            return gradient(state.params, frozen, batch, state.step)

        if accumulation == 1:  # XLA's CPU backend runs convolution gradients inside a scan far slower
            grads, sums = of_batch(batch)
        else:
            micro = jax.tree.map(lambda x: split_micro_batches(x, accumulation), batch)
            _, no_sums = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[0], micro))
            # zeros_like keeps the sharding of the parameters.
            zeros = jax.tree.map(jnp.zeros_like, (state.params, no_sums))
            add = jax.tree_util.Partial(jax.tree.map, jnp.add)
            (grads, sums), _ = jax.lax.scan(lambda total, one: (add(total, of_batch(one)), None), zeros, micro)

        weight = jnp.sum(prompt_weights(batch, objective))
        total_weight = jnp.maximum(weight, 1e-8)
        grads, metrics = jax.tree.map(lambda x: x / total_weight.astype(x.dtype), (grads, sums))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["train/gradient_norm"] = optax.tree.norm(grads)
        metrics["train/update_norm"] = jnp.where(weight > 0, optax.tree.norm(updates), 0)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, params, state.step, ema_decay) if ema_decay else state.ema
        kept = jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), (params, opt_state, ema), tuple(state[1:])
        )
        return TrainState(state.step + 1, *kept), metrics

    return step


def moving_average(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Return the moving average after `step` + 1 updates, as `diffusers.training_utils.EMAModel` computes it.

    The decay grows during the run, `min(decay, (1 + step) / (10 + step))`, and the first update replaces the average,
    so that early averages do not depend on the initial weights.
    """
    now = jnp.where(step > 0, jnp.minimum(decay, (1 + step) / (10 + step)), 0.0)
    return jax.tree.map(lambda average, value: average - (1 - now).astype(value.dtype) * (average - value), ema, params)


def make_eval_step(
    compute_log_ratios: ComputeLogRatios, objective: Objective
) -> Callable[[Params, Frozen, PreferenceBatch, jax.Array], tuple[Metrics, jax.Array]]:
    """Return `evaluate(params, frozen, batch, draw_number) -> (weighted sums, total weight)`, without a gradient."""

    def evaluate(
        params: Params, frozen: Frozen, batch: PreferenceBatch, number: jax.Array
    ) -> tuple[Metrics, jax.Array]:
        log_ratios = compute_log_ratios(params, frozen, batch, number)
        metrics, weight_B = pair_metrics(log_ratios, batch.preference_BK), prompt_weights(batch, objective)
        return {name: jnp.sum(value * weight_B) for name, value in metrics.items()}, jnp.sum(weight_B)

    return evaluate


def prompt_weights(batch: PreferenceBatch, objective: Objective) -> jax.Array:
    """Return weight_B, with 0 where a candidate that the objective needs is only padding."""
    return batch.weight_B * batch.valid_BK[:, : objective.num_candidates].all(axis=1)


def keep_candidates(batch: PreferenceBatch, count: int | None) -> PreferenceBatch:
    """Return the batch with only its best `count` candidates; None keeps all."""
    return batch._replace(
        inputs=jax.tree.map(lambda x_BN: x_BN[:, :count], batch.inputs),  # N candidates, or their captions
        size_cond_BK6=batch.size_cond_BK6[:, :count],
        preference_BK=batch.preference_BK[:, :count],
        valid_BK=batch.valid_BK[:, :count],
    )


def split_micro_batches(x: Any, count: int) -> Any:
    """Return x as [count, B / count, ...], divided by stride: each device keeps its examples and nothing is moved."""
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
