"""What flows between the parts: a batch of preferences, the text conditioning, and the scores a loss reads.

Axes: B prompts, K candidates of a prompt (best first), H x W pixels, h x w latent cells, C channels, M captions of a
prompt (one shared by its candidates, or K of their own), E text encoders, L tokens, D context width, P pooled width.
NamedTuples, so that they are pytrees without importing JAX here: what reads and prepares data does without it.
"""

from typing import Any, NamedTuple

# NumPy on the host, jax.Array inside a step.
Array = Any


class Raw(NamedTuple):
    """Images and captions, for the step to encode."""

    images_BKHWC: Array
    """uint8 RGB, best candidate first."""
    mirrored_BK: Array
    """bool, which images the step is to mirror; devices do it for nothing."""
    token_ids_BMEL: Array
    """int32 token ids, one row per text encoder."""


class Cached(NamedTuple):
    """What the VAE and the text encoders made of them, stored by `prepare --encode`; all bfloat16."""

    moments_BKhwC: Array
    """Mean and log variance of the VAE's posterior, one after the other along C."""
    context_BMLD: Array
    """Token embeddings of all text encoders, one after the other along D."""
    pooled_BMP: Array
    """Pooled text embedding; of width 0 where the family has none."""


class Transitions(NamedTuple):
    """One step of a sampled trajectory for each candidate, the same step for all of a prompt."""

    x_BKHWC: Array
    """Latents that the step begins with; K is 1 where all candidates begin alike."""
    next_x_BKHWC: Array
    """What it made of them."""
    step_B: Array
    """int32 row of the sampler's table."""
    log_prob_BK: Array
    """Of the transition under the weights that sampled it."""


class Sampled(NamedTuple):
    """Steps of images that the model itself sampled, for online learning."""

    transitions: Transitions
    token_ids_BMEL: Array
    """int32 token ids, one row per text encoder; M = 1."""
    advantage_BK: Array
    """How much better an image is than was to be expected of its prompt."""


class PreferenceBatch(NamedTuple):
    """One batch of prompts with K ranked candidates each; of sampled ones K in any order."""

    inputs: Raw | Cached | Sampled
    size_cond_BK6: Array
    """float32 (original height, original width, crop top, crop left, target height, target width)."""
    preference_BK: Array
    """float32, sums to 1 over K: (1, 0) for a clear winner; soft labels and votes are fractions. Of sampled images
    their rewards, NaN where there is none; with one more axis those of several judges."""
    valid_BK: Array
    """bool, False for a padded candidate."""
    weight_B: Array
    """float32 weight of a prompt in the loss; 0 gives no gradient."""
    index_B: Array
    """int32 position of the sample in the endless training stream: with the seed and the step it determines every
    random draw for this sample, whatever the number of devices or the accumulation."""


class Conditioning(NamedTuple):
    """What the UNet is conditioned on, one row per prompt (N = B) or per candidate (N = B * K)."""

    context_NLD: Array
    """Token embeddings for cross-attention, all text encoders concatenated along D."""
    pooled_NP: Array | None = None
    """Pooled text embedding (SDXL family only)."""
    time_ids_NT: Array | None = None
    """Size conditioning as added time ids (SDXL: 6 numbers, refiner: 5)."""


class LogRatios(NamedTuple):
    """What the losses are functions of; all float32 (float64 in tests), all per candidate."""

    log_ratio_BK: Array
    """log policy / reference. Offline: -(e_policy - e_reference) / 2, with e the mean squared denoising error. Online:
    that of a transition's probabilities, clamped."""
    error_BK: Array = None
    """e_policy, the raw denoising error; None for transitions."""
    reference_error_BK: Array | None = None
    """e_reference; None where the objective needs no reference."""
    log_prob_BK: Array = None
    """Of a transition under the policy, the mean over its dimensions; None offline, as all that follows."""
    old_log_prob_BK: Array = None
    """The same under the weights that sampled it."""
    advantage_BK: Array = None
    """How much better an image's reward is than was to be expected; None where the loss wants none."""
    kl_BK: Array = None
    """Divergence of the policy's transition from the reference's, reduced as the log-probabilities are."""
