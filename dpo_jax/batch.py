"""Data that the parts pass to each other: batches of preferences, text conditioning, and what losses read.

Axes: B prompts, K candidates of a prompt (best first), H x W pixels, h x w latent cells, C channels, M captions of a
prompt (one shared by its candidates, or one per candidate), L tokens, D context width, P pooled width.
These are NamedTuples, which are pytrees without importing JAX: the code that reads and prepares data must not start it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, UInt8

Array = Any
"""A NumPy array on the host, a jax.Array inside a step."""


class Raw(NamedTuple):
    """Images and captions, which the training step encodes."""

    images_BKHWC: UInt8[Array, "B K H W C"]
    """uint8 RGB, best candidate first."""
    mirrored_BK: Bool[Array, "B K"]
    """bool: which images the training step mirrors; on devices this costs nothing."""
    token_ids_BML: Int[Array, "B M L"]
    """int32 token ids for all text encoders, one encoder's after the other's along L."""


class Cached(NamedTuple):
    """Images and captions encoded by the VAE and the text encoders, as `prepare --encode` stores them; all bfloat16."""

    moments_BKhwC: Float[Array, "B K h w C"]
    """Mean and log variance of the VAE's posterior, concatenated along C."""
    context_BMLD: Float[Array, "B M L D"]
    """Token embeddings of all text encoders, concatenated along D."""
    pooled_BMP: Float[Array, "B M P"]
    """Pooled text embedding; its width is 0 if the family has none."""


class EncodedText(NamedTuple):
    """Captions encoded by the text encoders, in the compute dtype."""

    context_BMLD: Float[Array, "B M L D"]
    """Token embeddings, as the family composes them of all text encoders; 0 for padding that is not attended to."""
    pooled_BMP: Float[Array, "B M P"]
    """Pooled text embedding; its width is 0 if the family has none."""


class Transitions(NamedTuple):
    """One step of the trajectory of each candidate; the candidates of a prompt share the step."""

    x_BKHWC: Float[Array, " B #K H W C"]
    """Latents before the step; K is 1 if all candidates share them."""
    next_x_BKHWC: Float[Array, "B K H W C"]
    """Latents after the step."""
    step_B: Int[Array, " B"]
    """int32: row of the sampler's table."""
    log_prob_BK: Float[Array, "B K"]
    """Log-probability of the transition with the weights that sampled it."""
    old_mean_BKHWC: Float[Array, " B #K H W C"] | None = None
    """Mean of the latents after the step with the weights that sampled; None if the method does not read it."""


class Sampled(NamedTuple):
    """Transitions of images that the model itself sampled, for online learning."""

    transitions: Transitions
    text: Int[Array, "B M L"] | EncodedText
    """The prompt, M = 1: encoded, or int32 token ids for all text encoders, one encoder's after the other's along L."""
    advantage_BK: Float[Array, "B K"]
    """Advantage of each image: its reward compared with the rewards expected for its prompt."""


class DrawnImages(NamedTuple):
    """Images that the model itself drew, without the way that led to them, for online learning."""

    x0_BKhwC: Float[Array, "B K h w C"]
    """Clean latents."""
    step_B: Int[Array, " B"]
    """int32: row of the sampler's table whose noise level is added."""
    text: Int[Array, "B M L"] | EncodedText
    """The prompt, as in `Sampled`."""
    advantage_BK: Float[Array, "B K"]
    """Advantage of each image, as in `Sampled`."""


class PreferenceBatch(NamedTuple):
    """One batch of prompts with K candidates each: best first, or in any order if the model sampled them."""

    inputs: Raw | Cached | Sampled | DrawnImages
    size_cond_BK6: Float[Array, "B K 6"]
    """float32 (original height, original width, crop top, crop left, target height, target width)."""
    preference_BK: Float[Array, "B K *R"]
    """float32, sums to 1 over K: (1, 0) for a clear winner; soft labels and votes are fractions. In a list of ranked
    candidates, a larger share is better, and equal ones are ties. A single image has 1 if it was liked, 0 if not; 0
    stands in place of padding. For sampled images, it holds their rewards instead, NaN for a missing one; several
    judges add an axis."""
    valid_BK: Bool[Array, "B K"]
    """bool: False for padding in place of a candidate."""
    weight_B: Float[Array, " B"]
    """float32: weight of a prompt in the loss; 0 gives no gradient."""
    index_B: Int[Array, " B"]
    """int32: position of the example in the endless training stream. With the seed and the step, it determines every
    random draw for this example, on any number of devices and micro-batches."""
    cell_weight_BKhw: Float[Array, "B K h w"] | None = None
    """float32: weight of each latent cell in the error of its image, with a mean of 1; None if all count alike."""


TOLD_GUIDANCE = 3.5
"""Guidance scale that released scripts tell FLUX.1-dev in training."""


class Conditioning(NamedTuple):
    """Conditioning of the denoiser, one row per prompt (N = B) or per candidate (N = B * K)."""

    context_NLD: Float[Array, "N L D"]
    """Token embeddings that the denoiser attends to, as the family composes them of its text encoders' outputs."""
    pooled_NP: Float[Array, "N P"] | None = None
    """Pooled text embedding (SDXL, SD3 and FLUX)."""
    time_ids_NT: Float[Array, "_ _"] | None = None
    """Size conditioning as added time ids (SDXL: 6 numbers, refiner: 5)."""
    is_token_NL: Bool[Array, "N L"] | None = None
    """bool: False for padding, which nothing attends to (Z-Image); None if padding is attended to like a caption."""
    guidance_N: Float[Array, " N"] | None = None
    """Guidance scale that a model distilled from guidance is told (FLUX.1-dev)."""


class LossInputs(NamedTuple):
    """Everything that a loss may read of a batch; what it does not read is not computed.

    Numbers are float32 (float64 in tests). Fields of the other kinds of learning are None: offline, from images of a
    data set, there are errors and predictions; online, from steps that drew an image, probabilities; online, from
    the drawn images alone, predictions and advantages.
    """

    log_ratio_BK: Float[Array, "B K"]
    """log(policy / reference). Offline: -(e_policy - e_reference) / 2, where e is the mean squared denoising error.
    Online: the clamped log-ratio of a transition's probabilities."""
    preference_BK: Float[Array, "B K *R"] = None
    """Offline: sums to 1 over K, (1, 0) for a clear winner. Online: rewards, also [B, K, R]. Higher is better."""
    valid_BK: Bool[Array, "B K"] = None
    """bool: False for padding in place of a candidate."""
    weight_B: Float[Array, " B"] = None
    """Weight of a prompt in the mean over the batch."""
    error_BK: Float[Array, "B K"] = None
    """e_policy, the denoising error of the policy."""
    reference_error_BK: Float[Array, "B K"] | None = None
    """e_reference; None if the method keeps no reference."""
    t_B: Int[Array, " B"] = None
    """Timestep, shared by the candidates."""
    log_snr_B: Float[Array, " B"] = None
    """Logarithm of the signal-to-noise ratio at the timestep; -inf for pure noise."""
    prediction_BKHWC: Float[Array, "B K H W C"] = None
    """What the policy predicts."""
    reference_prediction_BKHWC: Float[Array, "B K H W C"] | None = None
    """What the reference predicts; None if the method keeps no reference."""
    drift_BK: Float[Array, "B K"] | None = None
    """Mean squared difference of the two predictions, without a gradient; None if the method keeps no reference."""
    target_BKHWC: Float[Array, "B K H W C"] = None
    """What both should predict: noise, velocity or flow, as the model's schedule has it."""
    cell_weight_BKHW: Float[Array, "B K H W"] | None = None
    """Weight of each latent cell in errors, log-ratios and drift, with a mean of 1; None if all cells count alike."""
    log_prob_BK: Float[Array, "B K"] = None
    """Log-probability of a transition with the policy, the mean over its dimensions."""
    old_log_prob_BK: Float[Array, "B K"] = None
    """Log-probability of the transition with the weights that sampled it."""
    advantage_BK: Float[Array, "B K"] = None
    """Advantage of the image."""
    old_prediction_BKHWC: Float[Array, "B K H W C"] = None
    """What the policy that drew the images predicts, without a gradient."""
    x0_per_prediction_B: Float[Array, " B"] = None
    """By how much the image that follows from a prediction changes with the prediction, a negative number."""
    kl_BK: Float[Array, " B #K"] = None
    """KL divergence of the policy's transition from the reference's, the mean over its dimensions; K is 1 if all
    candidates share the latents before the step."""
    old_kl_BK: Float[Array, " B #K"] | None = None
    """The same divergence from the transition of the weights that sampled; None if the method reads no old means."""
    standard_log_ratio_BK: Float[Array, "B K"] | None = None
    """How far the mean has moved along the noise that was drawn, the mean over its dimensions: a log-ratio whose scale
    does not depend on the step (GRPO-Guard); None if the method reads no old means."""
    level_fall_B: Float[Array, " B"] = None
    """By how much a transition lowers the noise level: the length |dt| of a flow model's step."""
    is_clamped_BK: Bool[Array, "B K"] = None
    """bool: whether the log-ratio is at or beyond the bounds that it is clamped to."""
    running: Mapping[str, Array] = {}
    """Running means over earlier steps of numbers that the method asks for; see `dpo_jax.methods.Method.running`."""
