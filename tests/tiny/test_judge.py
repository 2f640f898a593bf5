import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dpo_jax.rewards import open_judge
from dpo_jax.tiny import judge, world


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    captions = world.captions() * 5
    return np.stack([world.render(caption, rng) for caption in captions]), captions


def test_every_clean_image_is_read_right(images):
    images, captions = images
    assert (open_judge("shapes").score(images, captions) == 1).all()
    assert [tuple(reading) for reading in judge.read(images)] == [world.parse(caption) for caption in captions]


def test_blur_and_noise_as_from_a_small_vae_change_little(images):
    images, captions = images
    noise = np.random.default_rng(0).normal(0, 6, images.shape)
    blurred = gaussian_filter(images.astype(float), (0, 0.8, 0.8, 0)) + noise
    assert (judge.score(blurred.clip(0, 255).astype(np.uint8), captions) == 1).mean() > 0.99


def test_each_wrong_attribute_costs_a_third():
    image = world.render("a red circle at the top left", np.random.default_rng(0))[None]
    for caption, expected in {
        "a red circle at the top left": 1,
        "a blue circle at the top left": 2 / 3,
        "a red square at the top left": 2 / 3,
        "a red circle at the bottom left": 2 / 3,
        "a red square at the top right": 1 / 3,
        "a black cross at the bottom right": 0,
    }.items():
        assert judge.score(image, [caption])[0] == pytest.approx(expected), caption


def test_what_is_no_object_has_no_name():
    rng = np.random.default_rng(0)
    blank = np.full((32, 32, 3), 220, np.uint8)
    static = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    two = world.render("a red circle at the top left", rng)
    two[16:] = world.render("a red circle at the bottom right", rng)[16:]
    stretched = blank.copy()
    stretched[5:11, 3:29] = (210, 35, 40)
    centred = blank.copy()
    centred[11:21, 11:21] = (210, 35, 40)
    assert judge.read(blank[None]) == [(None, None, None)]
    for image in (static, two, stretched):
        assert judge.read(image[None])[0].shape is None
    assert judge.read(centred[None]) == [("square", "red", None)]


def test_wrong_input_is_refused(images):
    images, captions = images
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        judge.score(images[:2], captions[:1])
    with pytest.raises(ValueError, match="reads uint8 images"):
        judge.score(images[:2] / 255.0, captions[:2])
