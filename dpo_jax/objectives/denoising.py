"""Log-ratios of a batch of latents, which losses read: how well policy and reference denoise each candidate.

Axes: B prompts, K candidates of a prompt, N = B * K images, H x W latent cells, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from dpo_jax.batch import Conditioning, LossInputs
from dpo_jax.diffusion.inversion import invert
from dpo_jax.diffusion.schedule import Schedule, add_noise, log_snr, network_times, training_target

Denoise = Callable[..., Float[Array, "N H W C"]]
"""`denoise(params, x_NHWC, t_N, conditioning, dropout_keys_N=None) -> prediction_NHWC`, with t_N of `network_times`."""


def keys_for(key: Key[Array, ""], index_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """Return one key per example, a function of `key` and the example's index alone.

    No draw depends on the number of devices or micro-batches, therefore. `key` must belong to this step and purpose.
    """
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


def draw(
    key: Key[Array, ""],
    index_B: Int[Array, " B"],
    schedule: Schedule,
    latent_shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    offset: float = 0.0,
    shares: Float[np.ndarray, " _"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, "B H W C"]]:
    """Draw one timestep and one noise image per prompt, shared by its candidates (arXiv 2311.12908, section 4).

    Args:
        key: key of this step for this purpose.
        index_B: positions of the prompts in the training stream.
        schedule: tells which timesteps are trained on; see `shares`.
        latent_shape: (H, W, C).
        dtype: dtype of the noise.
        offset: size of offset noise: one more draw per channel, the same for all cells, which is part of the noise and
            of the target (`noise_offset` of the official Diffusion-DPO trainer).
        shares: probability of each training timestep, such as `densities.even_shares`; None draws them uniformly.

    Returns:
        t_B (int32) and noise_BHWC.
    """

    p = None if shares is None else jnp.asarray(shares, float)

    def draw_one(sample_key: Key[Array, ""]) -> tuple[Int[Array, ""], Float[Array, "H W C"]]:
        t_key, noise_key = jax.random.split(sample_key)
        t = jax.random.choice(t_key, jnp.asarray(schedule.training_timesteps), p=p)
        noise_HWC = jax.random.normal(noise_key, latent_shape, dtype)
        if offset:
            offset_key = jax.random.fold_in(noise_key, 0)
            noise_HWC += offset * jax.random.normal(offset_key, (1, 1, latent_shape[-1]), dtype)
        return t, noise_HWC

    return jax.vmap(draw_one)(keys_for(key, index_B))


def perturb(
    key: Key[Array, ""], index_B: Int[Array, " B"], noise_BHWC: Float[Array, "B H W C"], size: float
) -> Float[Array, "B H W C"]:
    """Return the noise to make x_t with; `noise_BHWC` remains the target (input perturbation, arXiv 2301.11706).

    It is `noise + size * N(0, 1)`, with one more draw per prompt, which its candidates share. The official
    Diffusion-DPO trainer draws once per image, so that the two images of a pair no longer share their noise.
    """
    draw_one = jax.vmap(lambda sample_key: jax.random.normal(sample_key, noise_BHWC.shape[1:], noise_BHWC.dtype))
    return noise_BHWC + size * draw_one(keys_for(key, index_B))


def compare_denoising(
    denoise: Denoise,
    policy: Any,
    reference: Any | None,
    schedule: Schedule,
    latents_BKHWC: Float[Array, "B K H W C"],
    noise_BHWC: Float[Array, "B H W C"],
    t_B: Int[Array, " B"],
    conditioning: Conditioning,
    dropout_keys_B: Key[Array, " B"] | None = None,
    perturbed_noise_BHWC: Float[Array, "B H W C"] | None = None,
    cell_weight_BKHW: Float[Array, "B K H W"] | None = None,
    *,
    inversion_steps: int = 0,
) -> LossInputs:
    """Return the denoising errors of all candidates and their log-ratios (arXiv 2311.12908, equation 14).

    `log_ratio = -(e_policy - e_reference) / 2`, where e is the MEAN squared error over H, W and C. The paper's released
    code has the same unit, so its beta of 5000 holds here. (The paper's equation sums, without the 1/2.)

    Candidates are folded into the batch by a reshape, `[B, K, ...] -> [B * K, ...]`, which needs no communication when
    B is sharded. Errors are computed in float32 or wider.

    Args:
        denoise: the network, called once with each set of weights.
        policy: weights that are trained.
        reference: frozen weights, or None if the loss needs no reference; then `log_ratio = -e_policy / 2`.
        schedule: the noise schedule.
        latents_BKHWC: clean latents, scaled as the network expects.
        noise_BHWC: noise, shared by the candidates of a prompt.
        t_B: timesteps, shared by the candidates of a prompt.
        conditioning: each field with B rows (shared by the candidates) or B * K (one per candidate).
        dropout_keys_B: keys of the policy's dropout, shared by the candidates, because different dropout would add
            noise to their difference. None turns dropout off.
        perturbed_noise_BHWC: noise to make x_t with, if not `noise_BHWC`; see `perturb`.
        cell_weight_BKHW: weights of the latent cells in the mean over H, W and C, with a mean of 1 for each image.
        inversion_steps: if not 0, the noise is not `noise_BHWC`, but for each candidate what so many steps of inversion
            with the policy, without a gradient, find; see `invert` and `methods/inpo.py`.
    """
    B, K = latents_BKHWC.shape[:2]
    x0_NHWC = latents_BKHWC.reshape(B * K, *latents_BKHWC.shape[2:])
    noise_NHWC, t_N, conditioning, dropout_keys_N = per_candidate((noise_BHWC, t_B, conditioning, dropout_keys_B), B, K)
    if inversion_steps:
        own = jax.lax.stop_gradient(policy)
        found_NHWC = invert(lambda *x_t: denoise(own, *x_t, conditioning), schedule, x0_NHWC, t_N, inversion_steps)
        noise_NHWC = jax.lax.stop_gradient(found_NHWC)
    added_NHWC = noise_NHWC if perturbed_noise_BHWC is None else per_candidate(perturbed_noise_BHWC, B, K)
    x_NHWC = add_noise(schedule, x0_NHWC, added_NHWC, t_N)
    target_NHWC = training_target(schedule, x0_NHWC, noise_NHWC, t_N)
    time_N = network_times(schedule, t_N)

    def weighted(x: Float[Array, "*images H W C"]) -> Float[Array, "*images H W C"]:
        """Return numbers of each cell times its weight; their mean is then the weighted mean."""
        return x if cell_weight_BKHW is None else x * cell_weight_BKHW.reshape(*x.shape[:-1], 1)

    def predict(params: Any, *dropout_keys: Key[Array, " N"]) -> tuple[Float[Array, "B K H W C"], Float[Array, "B K"]]:
        """The prediction, [B, K, H, W, C], and its mean squared error, [B, K]."""
        prediction_NHWC = denoise(params, x_NHWC, time_N, conditioning, *dropout_keys).astype(target_NHWC.dtype)
        error_N = weighted(jnp.square(prediction_NHWC - target_NHWC)).mean(axis=(1, 2, 3))
        return prediction_NHWC.reshape(latents_BKHWC.shape), error_N.reshape(B, K)

    prediction_BKHWC, error_BK = predict(policy) if dropout_keys_N is None else predict(policy, dropout_keys_N)
    inputs = LossInputs(
        log_ratio_BK=-error_BK / 2,
        error_BK=error_BK,
        t_B=t_B,
        log_snr_B=log_snr(schedule, t_B),
        prediction_BKHWC=prediction_BKHWC,
        target_BKHWC=target_NHWC.reshape(latents_BKHWC.shape),
        cell_weight_BKHW=cell_weight_BKHW,
    )
    if reference is None:
        return inputs
    reference_prediction_BKHWC, reference_error_BK = jax.lax.stop_gradient(predict(reference))
    apart_BKHWC = prediction_BKHWC - reference_prediction_BKHWC
    # e_policy - e_reference, without the rounding of two sums that beta multiplies: equal predictions give exactly 0.
    products_BKHWC = apart_BKHWC * (prediction_BKHWC + reference_prediction_BKHWC - 2 * inputs.target_BKHWC)
    return inputs._replace(
        log_ratio_BK=-weighted(products_BKHWC).mean(axis=(2, 3, 4)) / 2,
        reference_error_BK=reference_error_BK,
        reference_prediction_BKHWC=reference_prediction_BKHWC,
        drift_BK=weighted(jnp.square(jax.lax.stop_gradient(apart_BKHWC))).mean(axis=(2, 3, 4)),
    )


def weighted_residual(inputs: LossInputs) -> Float[Array, "B K H W C"]:
    """Return the gradient of the errors by the policy's predictions, but for the factor 2 / (H W C)."""
    residual_BKHWC = inputs.prediction_BKHWC - inputs.target_BKHWC
    weight_BKHW = inputs.cell_weight_BKHW
    return residual_BKHWC if weight_BKHW is None else residual_BKHWC * weight_BKHW[..., None]


def per_candidate(tree: Any, B: int, K: int) -> Any:
    """Repeat each prompt's row for its candidates, [B, ...] -> [B * K, ...]; keep arrays that have B * K rows."""
    return jax.tree.map(lambda x: x if x.shape[0] == B * K else jnp.repeat(x, K, axis=0), tree)
