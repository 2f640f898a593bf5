"""What losses read of images that the model drew: its predictions after noise is added again.

Neither the steps that drew an image nor their probabilities matter, so any sampler may draw it.

Axes: B prompts, K candidates of a prompt, N = B * K images, H x W latent cells, C channels.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dpo_jax.batch import LossInputs
from dpo_jax.diffusion.steps import SamplerTable
from dpo_jax.diffusion.trajectories import steps_at
from dpo_jax.objectives.denoising import Denoise, per_candidate


def compare_predictions(
    denoise: Denoise,
    policy: Any,
    old: Any,
    reference: Any | None,
    table: SamplerTable,
    x0_BKHWC: Float[Array, "B K H W C"],
    noise_BKHWC: Float[Array, "B K H W C"],
    step_B: Int[Array, " B"],
    conditioning: Any,
) -> LossInputs:
    """Return what policy, the policy that drew, and reference predict of the same noisy latents, and the target.

    Args:
        denoise: the network, called once with each set of weights.
        policy: weights that are trained.
        old: weights that drew the images.
        reference: frozen weights, or None if the loss needs no reference.
        table: the sampler that drew the images, at whose noise levels they are looked at.
        x0_BKHWC: clean latents.
        noise_BKHWC: noise, standard normal.
        step_B: rows of the table, shared by the candidates of a prompt; it has noise there.
        conditioning: conditioning of `denoise`, each array with B rows (shared by the candidates) or B * K.
    """
    B, K = x0_BKHWC.shape[:2]
    step = steps_at(table, step_B, x0_BKHWC)
    x_BKHWC = step.signal * x0_BKHWC + step.noise * noise_BKHWC
    # Of x0 = p x + q target, with x as above; the factors are exact in the table's own precision.
    target_BKHWC = ((1 - step.p * step.signal) * x0_BKHWC - step.p * step.noise * noise_BKHWC) / step.q
    t_N, conditioning = per_candidate((step.t, conditioning), B, K)

    def predict(params: Any) -> Float[Array, "B K H W C"]:
        prediction_NHWC = denoise(params, x_BKHWC.reshape(B * K, *x_BKHWC.shape[2:]), t_N, conditioning)
        return prediction_NHWC.astype(target_BKHWC.dtype).reshape(x_BKHWC.shape)

    prediction_BKHWC = predict(policy)
    error_BK = ((prediction_BKHWC - target_BKHWC) ** 2).mean(axis=(2, 3, 4))
    return LossInputs(
        log_ratio_BK=-error_BK / 2,
        error_BK=error_BK,
        prediction_BKHWC=prediction_BKHWC,
        old_prediction_BKHWC=jax.lax.stop_gradient(predict(old)),
        reference_prediction_BKHWC=None if reference is None else jax.lax.stop_gradient(predict(reference)),
        target_BKHWC=target_BKHWC,
        x0_per_prediction_B=step.q.reshape(B),
    )
