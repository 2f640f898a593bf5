"""Supervised fine-tuning: plain denoising of the preferred images, or of single images."""

from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.methods.method import Method


def sft(inputs: LossInputs) -> Float[Array, " B"]:
    """Return the winner's denoising error (arXiv 2006.11239, equation 14)."""
    return inputs.error_BK[:, 0]


SFT = Method(
    name="sft",
    title="supervised fine-tuning on preferred images",
    loss=sft,
    learns_from="images",
    needs_reference=False,
    num_candidates=1,
)
