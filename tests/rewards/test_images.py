"""Preprocessed images of odd sizes equal those of transformers and of the originals' transforms in PyTorch."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from dpo_jax.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from dpo_jax.rewards.batches import fitted, normalised
from dpo_jax.rewards.images import crop_like_torchvision, crop_like_transformers, letterbox

SHAPES = [(1, 1), (37, 53), (53, 37), (224, 224), (225, 224), (224, 227), (20, 900), (900, 20), (512, 512), (301, 499)]
SIZE = 224


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def image(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*request.param, 3), np.uint8)


def test_crop_is_that_of_transformers(image: np.ndarray) -> None:
    processor = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)
    expected = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    ours = crop_like_transformers(image, SIZE)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected.transpose(1, 2, 0))


def test_normalisation_is_that_of_transformers(image: np.ndarray) -> None:
    expected = CLIPImageProcessorPil()(image, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    ours = normalised(crop_like_transformers(image, SIZE)[None])
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-6)


def torchvision_crop(image: np.ndarray) -> Image.Image:
    """torchvision.transforms.Resize(224, BICUBIC) and CenterCrop(224) of a Pillow image, as ImageReward's and OpenAI's
    transforms begin (torchvision/transforms/functional.py: _compute_resized_output_size, center_crop)."""
    image = Image.fromarray(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(SIZE * long / short)
    width, height = (SIZE, new_long) if width <= height else (new_long, SIZE)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - SIZE) / 2.0), round((width - SIZE) / 2.0)
    return image.crop((left, top, left + SIZE, top + SIZE))


def test_crop_is_that_of_torchvision(image: np.ndarray) -> None:
    np.testing.assert_array_equal(crop_like_torchvision(image, SIZE), np.asarray(torchvision_crop(image)))


def test_the_two_crops_differ_by_a_pixel_somewhere() -> None:
    image = np.arange(227, dtype=np.uint8)[:, None, None].repeat(224, 1).repeat(3, 2)
    assert (crop_like_transformers(image, SIZE)[0, 0, 0], crop_like_torchvision(image, SIZE)[0, 0, 0]) == (1, 2)


def hps_transform(image: np.ndarray) -> np.ndarray:
    """ToTensor, ResizeMaxSize(224) and Normalize of github.com/tgxs002/HPSv2, hpsv2/src/open_clip/transform.py."""
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    height, width = x.shape[1:]
    scale = SIZE / float(max(height, width))
    new = [max(round(side * scale), 1) for side in (height, width)]
    x = torch.nn.functional.interpolate(x[None], new, mode="bicubic", align_corners=False, antialias=True)[0]
    down, right = SIZE - new[0], SIZE - new[1]
    x = torch.nn.functional.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2], value=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return ((x - mean) / std).permute(1, 2, 0).numpy()


def test_letterbox_is_that_of_hps(image: np.ndarray) -> None:
    ours = letterbox(image, SIZE)
    assert (ours.shape, ours.dtype) == ((SIZE, SIZE, 3), np.float32)
    np.testing.assert_allclose(normalised(ours), hps_transform(image), atol=1e-4)


def test_images_of_several_sizes_keep_their_order() -> None:
    images = [np.full((8 + n, 30 - n, 3), n, np.uint8) for n in range(20)]
    assert fitted(images, crop_like_transformers, 8)[:, 0, 0, 0].tolist() == list(range(20))
