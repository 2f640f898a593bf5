"""The configs of published flow models that the package holds: every network has diffusers' or transformers' names and
shapes, and the published number of parameters."""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import pytest
import torch
import transformers

from dpo_jax.cli import load_config, replaced
from dpo_jax.models.families import FAMILIES, PUBLISHED
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.save import unlike_published
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.weights.layout import torch_aliases

ROOT = Path(__file__).parents[2]
VAE, CLIP_L, T5, QWEN3 = 83_819_683, 123_060_480, 4_762_310_656, 4_022_468_096
CLIPS = (CLIP_L + 768 * 768, 694_659_840)
FLUX, Z_IMAGE = 11_901_408_320, 6_154_908_736
SD3_TABLE = 384**2 * 1536
# Parameters by family: denoiser, VAE, text encoders.
SIZES = {
    "sd3": (2_243_171_520 + SD3_TABLE, VAE, *CLIPS, T5),
    "flux": (FLUX, VAE, CLIP_L, T5),
    "flux_schnell": (11_891_178_560, VAE, CLIP_L, T5),
    "z_image": (Z_IMAGE, VAE, QWEN3),
    "z_image_turbo": (Z_IMAGE, VAE, QWEN3),
}
# What the denoiser reads of a caption: tokens and features, and pooled features.
TEXTS = {"sd3": ((77 + 256, 4096), (2048,)), "flux": ((512, 4096), (768,)), "flux_schnell": ((256, 4096), (768,))}
OTHER_SD3 = {
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520 + 192**2 * 2432,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000 + 192**2 * 1536,
}


@functools.cache
def torch_shapes(class_name: str, config_json: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that the PyTorch class has with this config."""
    config: dict[str, Any] = json.loads(config_json)
    with torch.device("meta"):
        if "model_type" in config:
            kind = getattr(transformers, class_name)
            model = kind(kind.config_class.from_dict(config))
        else:
            model = getattr(diffusers, class_name).from_config(config)
    # T5's second name of its embedding.
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


SLOW = {"flux_schnell", "stabilityai/stable-diffusion-3-medium-diffusers"}


def each(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("family", each(SIZES))
def test_networks_have_the_names_and_shapes_of_pytorch(family: str) -> None:
    pipeline = load_pipeline(PUBLISHED / family, family=family, dtype=jnp.bfloat16)
    model_index = json.loads((PUBLISHED / family / "model_index.json").read_text())
    for (component, network), size in zip(pipeline.components.items(), SIZES[family], strict=True):
        assert sum(math.prod(spec.shape) for spec in network.specs.values()) == size, component
        theirs = torch_shapes(model_index[component][1], json.dumps(pipeline.config(component)))
        ours = {
            next(alias for alias in torch_aliases(name) if alias in theirs): spec.torch_shape
            for name, spec in network.specs.items()
        }
        assert ours == theirs, component
    assert hasattr(diffusers, model_index["_class_name"])
    assert pipeline.text_shapes == TEXTS.get(family, ((512, 2560), (0,)))
    assert pipeline.is_of_published_size
    assert not any(unlike_published(pipeline).values())


@pytest.mark.parametrize("hub_id", each(OTHER_SD3))
def test_other_versions_of_sd3_have_transformers_of_their_own(hub_id: str) -> None:
    folder = FAMILIES["sd3"].published_denoiser(hub_id)
    config = replaced(load_config(str(ROOT / "configs/sd35.py")), {"model": hub_id})
    pipeline = open_structure(config)  # as plan does, without the hub
    specs = pipeline.denoiser.specs
    assert sum(math.prod(spec.shape) for spec in specs.values()) == OTHER_SD3[hub_id]
    theirs = torch_shapes("SD3Transformer2DModel", (folder / "config.json").read_text())
    assert {torch_aliases(name)[0]: spec.torch_shape for name, spec in specs.items()} == theirs
    assert pipeline.is_of_published_size


def test_every_folder_is_of_a_family_or_of_a_model_that_it_names() -> None:
    others = {hub_id.partition("/")[2] for family in FAMILIES.values() for hub_id in family.also_published}
    assert {path.name for path in PUBLISHED.iterdir()} <= FAMILIES.keys() | others
    assert Path(FAMILIES["sd15"].published_denoiser("runwayml/stable-diffusion-v1-5")) == PUBLISHED / "sd15" / "unet"
