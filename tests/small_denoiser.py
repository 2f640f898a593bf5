"""A small denoiser, its encoder and batches, in double precision: for properties of losses and of the training step.

Its weights are the fixture `params`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import Conditioning, PreferenceBatch, Raw
from dpo_jax.diffusion.schedule import make_schedule
from dpo_jax.training.step import Frozen

SCHEDULE = make_schedule(
    {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


def denoise(params, x_NHWC, t_N, conditioning):
    """A small nonlinear denoiser that depends on timestep and caption."""
    h = x_NHWC @ params["in"] + conditioning.context_NLD.mean(1)[:, None, None, :] + t_N[:, None, None, None] / 1000
    return jnp.tanh(h) @ params["out"]


def encode(encoders, batch, keys_B):
    noise = jax.vmap(lambda key: jax.random.normal(key, (*batch.inputs.images_BKHWC.shape[1:-1], 4)))(keys_B)
    pixels = batch.inputs.images_BKHWC.astype(noise.dtype).mean(-1, keepdims=True) / 127.5 - 1
    return pixels + 0.1 * noise, Conditioning(encoders["text"]["table"][batch.inputs.token_ids_BML.reshape(-1, 3)])


def make_batch(B=8, K=2, M=1, start=0):
    rng = np.random.default_rng(start)
    batch = PreferenceBatch(
        inputs=Raw(
            images_BKHWC=rng.integers(0, 256, (B, K, 8, 8, 3), dtype=np.uint8),
            mirrored_BK=np.zeros((B, K), bool),
            token_ids_BML=rng.integers(0, 5, (B, M, 3)).astype(np.int32),
        ),
        size_cond_BK6=np.zeros((B, K, 6), np.float32),
        preference_BK=np.tile(np.float32([1, 0]), (B, 1)),
        valid_BK=np.ones((B, K), bool),
        weight_B=np.ones(B, np.float32),
        index_B=jnp.arange(start, start + B, dtype=jnp.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


def frozen_like(params):
    return Frozen(reference=params, encoders={"text": {"table": jnp.linspace(-1, 1, 40).reshape(5, 8)}})


def perturbed(params):
    return jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
