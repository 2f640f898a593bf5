import numpy as np
import pytest

from dpo_jax.tiny import world


def test_captions_and_their_split():
    train, held_out = world.split()
    assert len(set(world.captions())) == 96
    assert sorted(train + held_out) == sorted(world.captions())
    assert len(train) == 67
    assert len(held_out) == 29
    assert set(" ".join(held_out).split()) <= set(" ".join(train).split())
    assert world.split() == (train, held_out)


def test_parse_inverts_every_caption_and_refuses_others():
    assert world.parse("a red circle at the top left") == ("circle", "red", "top left")
    parsed = [world.parse(caption) for caption in world.captions()]
    assert len(set(parsed)) == 96
    with pytest.raises(ValueError, match="'a red dog' is not of the tiny world"):
        world.parse("a red dog")


def test_images_vary_with_the_generator_only():
    caption = "a green cross at the bottom right"
    first, again, other = (world.render(caption, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 1


def test_drawings_cover_what_geometry_says():
    centre, radius = (16.0, 16.0), 6.0
    areas = {shape: world.draw(shape, centre, radius).sum() for shape in world.SHAPES}
    expected = {"circle": np.pi * 36, "square": 10.2**2, "triangle": 72, "cross": 2 * 13.2 * 3.96 - 3.96**2}
    for shape, area in expected.items():
        assert areas[shape] == pytest.approx(area, rel=0.05), shape
