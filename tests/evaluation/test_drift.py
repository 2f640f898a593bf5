"""Diversity and drift agree with closed forms."""

import numpy as np
import pytest
from scipy import linalg

from dpo_jax.evaluation.drift import diversity, frechet_distance, thumbnails


def test_diversity_is_the_mean_distance_within_prompts():
    features = np.array([[0.0, 0], [3, 4], [0, 0], [10, 10], [9, 9]])
    assert diversity(features, np.array([0, 0, 0, 1, 2])) == pytest.approx((5 + 0 + 5) / 3)
    assert diversity(features, np.arange(5)) is None


@pytest.mark.parametrize("images", [5, 200])
def test_frechet_distance_is_the_textbook_formula(images):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(images, 12)), 0.3 + rng.normal(size=(images + 3, 12)) * rng.random(12)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariance_a) @ linalg.sqrtm(covariance_b)
    shared = np.linalg.svd(root, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 12)


def test_thumbnails_are_mean_colours():
    image = np.zeros((16, 24, 3), np.uint8)
    image[:8, :, 0] = 255
    features = thumbnails([image, image[:, :16]])
    assert features.shape == (2, 192)
    np.testing.assert_array_equal(features[0], features[1])
    assert features[0].reshape(8, 8, 3)[:, :, 0].mean() == pytest.approx(0.5)
