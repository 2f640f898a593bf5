"""A posterior is sampled as diffusers samples it, shared by nothing but the key, of images mirrored where told so."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageOps

from dpo_jax.encode.images import encode_images, sample_posterior


@pytest.mark.parametrize("shift", [None, 0.3])
def test_a_sample_is_what_diffusers_makes_of_the_same_noise(shift: float | None) -> None:
    moments_BKhwC = np.random.default_rng(0).normal(0, 2, (3, 2, 4, 5, 8)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(1), 3)
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18, shift_factor=shift))
    found = sample_posterior(vae, moments_BKhwC, keys_B)
    for b, key in enumerate(keys_B):
        noise_KhwC = np.asarray(jax.random.normal(key, (2, 4, 5, 4)))
        posterior = DiagonalGaussianDistribution(torch.from_numpy(moments_BKhwC[b]).permute(0, 3, 1, 2))
        mean, std = (x.permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.std))
        np.testing.assert_allclose(found[b], (mean + std * noise_KhwC - (shift or 0)) * 0.18, rtol=1e-5, atol=1e-6)


def test_images_are_mirrored_where_told_so() -> None:
    def vae(params, images_NHWC, method):
        return images_NHWC, np.full_like(images_NHWC, -np.inf)  # latents are the pixels

    vae.config = SimpleNamespace(scaling_factor=1.0, shift_factor=None)
    images_BKHWC = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 5, 3), np.uint8)
    mirrored_BK = np.asarray([[False, True], [True, False]])
    found_BKHWC = encode_images(vae, {}, images_BKHWC, mirrored_BK, jax.random.split(jax.random.key(0), 2))
    for found_HWC, image_HWC, mirrored in zip(
        *(x.reshape(4, *x.shape[2:]) for x in (found_BKHWC, images_BKHWC, mirrored_BK)), strict=True
    ):
        image = Image.fromarray(image_HWC)
        expected_HWC = np.asarray(ImageOps.mirror(image) if mirrored else image)
        np.testing.assert_allclose(found_HWC, expected_HWC / 127.5 - 1, atol=1e-6)
