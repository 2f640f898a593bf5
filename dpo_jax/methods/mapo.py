"""MaPO: fine-tuning on the winner with a preference term, without a reference (arXiv 2406.06424)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import LossInputs
from dpo_jax.fields import Field
from dpo_jax.methods.method import Method


def mapo(inputs: LossInputs, *, beta: float, temperature: float, snr: float) -> Float[Array, " B"]:
    """Return `e_w - beta log sigmoid(temperature (phi(e_w) - phi(e_l)))`, `phi(e) = snr e / (exp(snr e) - 1)`.

    These are the formula and the values of the released code (mapo-t2i/mapo, utils.py), in which `snr` is a constant:
    beta 0.1, temperature 1000, snr 0.5, with a learning rate of 1e-5. phi falls as 1 - snr e / 2, so that the second
    term is that of DPO with a beta near temperature snr = 500 and no reference. Soft labels take the expectation.
    """
    error_BK, preference_BK = inputs.error_BK[:, :2], inputs.preference_BK[:, :2]
    scaled_BK = jnp.maximum(snr * error_BK, 1e-12)  # phi(0) is 1
    phi_BK = scaled_BK * jnp.exp(-scaled_BK) / -jnp.expm1(-scaled_BK)  # written so that it does not overflow
    better_BK = jax.nn.log_sigmoid(temperature * (phi_BK - phi_BK[:, ::-1]))
    return (preference_BK * (error_BK - beta * better_BK)).sum(axis=1)


MAPO = Method(
    name="mapo",
    title="MaPO",
    paper="2406.06424",
    loss=mapo,
    fields={
        "beta": Field(0.1, "Weight of the preference term beside fine-tuning on the winner.", above=0),
        "temperature": Field(1000.0, "Factor of the difference inside the sigmoid.", above=0),
        "snr": Field(
            0.5, "Factor of the errors inside phi, a constant in place of the signal-to-noise ratio.", above=0
        ),
    },
    needs_reference=False,
)
