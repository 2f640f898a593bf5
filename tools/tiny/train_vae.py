"""Train the tiny model's VAE on images of its world; this takes about 4 minutes on 2 CPU cores.

    python -m tools.tiny.train_vae --output=runs/tiny/vae

Writes a diffusers AutoencoderKL folder whose scaling_factor brings the latents to unit variance, and prints how well
it reconstructs images of held-out captions.

Axes: N images, H x W pixels, h x w latent cells, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from dpo_jax import cli
from dpo_jax.models.network import Network, init_params
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.tiny import judge, world
from dpo_jax.weights.io import save_component
from dpo_jax.weights.layout import Params

OUTPUT = flags.DEFINE_string("output", None, "Folder to write the VAE to.", required=True)
STEPS = flags.DEFINE_integer("steps", 900, "Number of training steps.")
BATCH = flags.DEFINE_integer("batch", 32, "Images per step.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Peak learning rate of Adam.")

CONFIG = {
    "_class_name": "AutoencoderKL",
    "sample_size": world.SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 24, 32],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 8,
    "force_upcast": False,
}
KL_WEIGHT = 1e-6  # as in Rombach et al.: just enough to keep the latents bounded


def main() -> None:
    """Train the VAE, measure it, and write it."""
    config = VAEConfig.from_dict(CONFIG, "the tiny VAE")

    def make(rngs):
        return AutoencoderKL(config, dtype=jnp.float32, rngs=rngs)

    vae = Network.build(make, config)
    train_captions, held_out_captions = world.split()
    params = train(vae, init_params(make, seed=0), train_captions)

    images_NHWC = images(held_out_captions * 20, np.random.default_rng(1))
    latents_NhwC, decoded_NHWC = reconstruct(vae, params, images_NHWC)
    error = np.mean((decoded_NHWC.astype(np.float64) - images_NHWC) ** 2)
    right = np.mean(judge.score(decoded_NHWC, held_out_captions * 20) == 1)
    scaling_factor = float(1 / latents_NhwC.std())
    save_component(
        OUTPUT.value, {**CONFIG, "scaling_factor": round(scaling_factor, 5)}, params, vae.specs, dtype=jnp.float16
    )
    print(
        f"{OUTPUT.value}: PSNR {10 * np.log10(255**2 / error):.1f} dB, judged fully right {right:.1%} of "
        f"{len(images_NHWC)} reconstructions, scaling_factor {scaling_factor:.4f}"
    )


def train(vae: Network, params: Params, captions: list[str]) -> Params:
    """Train by Adam on the squared error of the reconstruction plus a small Kullback-Leibler divergence."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE.value, STEPS.value // 20, STEPS.value)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(params, images_NHWC, key):
        mean_NhwC, logvar_NhwC = vae(params, images_NHWC, method="encode")
        noise_NhwC = jax.random.normal(key, mean_NhwC.shape)
        decoded_NHWC = vae(params, mean_NhwC + jnp.exp(logvar_NhwC / 2) * noise_NhwC, method="decode")
        kl_NhwC = (jnp.square(mean_NhwC) + jnp.exp(logvar_NhwC) - 1 - logvar_NhwC) / 2
        error = jnp.mean(jnp.square(decoded_NHWC - images_NHWC))
        return error + KL_WEIGHT * kl_NhwC.sum(axis=(1, 2, 3)).mean(), error

    @jax.jit
    def step(params, opt_state, images_NHWC, key):
        (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, images_NHWC, key)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, error

    rng, key, opt_state = np.random.default_rng(0), jax.random.key(0), tx.init(params)
    for i in range(STEPS.value):
        images_NHWC = images(rng.choice(captions, BATCH.value).tolist(), rng)
        params, opt_state, error = step(params, opt_state, to_signed(images_NHWC), jax.random.fold_in(key, i))
        if (i + 1) % 100 == 0:
            print(f"step {i + 1}: PSNR {10 * np.log10(4 / float(error)):.1f} dB", flush=True)
    return params


def reconstruct(vae: Network, params: Params, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents (posterior means) of uint8 images, and the uint8 images that they decode to."""

    @jax.jit
    def run(images_NHWC):
        mean_NhwC, _ = vae(params, images_NHWC, method="encode")
        return mean_NhwC, vae(params, mean_NhwC, method="decode")

    latents_NhwC, decoded_NHWC = run(to_signed(images_NHWC))
    pixels_NHWC = (127.5 * np.asarray(decoded_NHWC) + 127.5).round().clip(0, 255)
    return np.asarray(latents_NhwC), pixels_NHWC.astype(np.uint8)


def images(captions: list[str], rng: np.random.Generator) -> np.ndarray:
    """Return one new image per caption, uint8 [N, H, W, C]."""
    return np.stack([world.render(caption, rng) for caption in captions])


def to_signed(images_NHWC: np.ndarray) -> jax.Array:
    """Return uint8 images scaled to [-1, 1]."""
    return jnp.asarray(images_NHWC, jnp.float32) / 127.5 - 1


if __name__ == "__main__":
    cli.run(main)
