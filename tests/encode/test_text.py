"""Embeddings of captions become conditioning."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.encode.text import condition
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.models.text_encoders import TextEmbedding
from dpo_jax.training.defaults import FIELDS


@pytest.mark.parametrize("family", ["flux", "flux_schnell", "sd3"])
def test_only_a_distilled_model_is_told_guidance_and_by_default_what_training_tells_it(
    tmp_path: Path, family: str
) -> None:
    """The implicit judge gives no scale, and must judge a model as it was trained."""
    write_random_model(family, tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model", dtype="float32")
    text = TextEmbedding(jnp.zeros((2, 3, 8)), jnp.zeros((2, 4)))
    conditioning = condition(pipeline, text, jnp.zeros((2, 6)))
    assert conditioning.time_ids_NT is None
    if family != "flux":
        assert conditioning.guidance_N is None
        return
    np.testing.assert_array_equal(conditioning.guidance_N, [FIELDS["guidance"].default] * 2)
    chosen = condition(pipeline, text, jnp.zeros((2, 6)), guidance=2.0)
    np.testing.assert_array_equal(chosen.guidance_N, [2.0] * 2)
