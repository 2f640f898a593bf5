"""Flow transformers of PyTorch diffusers, as the tests of files need them: names and shapes, or tiny ones."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel, ZImageTransformer2DModel
from diffusers.loaders import single_file_utils

from dpo_jax.weights.layout import ParamSpec, Specs, torch_name

SD3 = {"pos_embed_max_size": 4, "qk_norm": "rms_norm", "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
FULL_SIZE = {
    "sd3_medium": (
        SD3Transformer2DModel,
        SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": None},
    ),
    "sd35_medium": (
        SD3Transformer2DModel,
        SD3
        | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        | {"dual_attention_layers": tuple(range(13))},
    ),
    "sd35_large": (
        SD3Transformer2DModel,
        SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    ),
    "flux_dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "flux_schnell": (FluxTransformer2DModel, {}),
    "z_image": (ZImageTransformer2DModel, {}),
}
"""Classes and configs of published models; the table of positions is small."""
TINY = {
    "sd3": (
        SD3Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 6,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "flux": (
        FluxTransformer2DModel,
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": (4, 4, 4),
            "axes_lens": (32, 32, 32),
        },
    ),
}

CONVERTERS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}
"""Functions that read files of the original layout; FLUX.1's only at its own width."""


@cache
def full_size_shapes(name: str) -> dict[str, torch.Size]:
    """The names and shapes of a published model's parameters, without memory."""
    kind, config = FULL_SIZE[name]
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in kind(**config).state_dict().items()}


def tiny(name: str) -> ModelMixin:
    """A tiny model with random weights."""
    kind, config = TINY[name]
    torch.manual_seed(0)
    return kind(**config).eval()


def specs_of(shapes: dict[str, torch.Size]) -> Specs:
    """The specs of a network with these parameters."""
    return dict(_specs(shapes))


def params_of(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameters in dpo_jax's layout."""
    specs = specs_of({name: tensor.shape for name, tensor in state.items()})
    return {
        name: state[torch_name(name)].numpy().transpose(np.argsort(spec.torch_axes)) for name, spec in specs.items()
    }


def _specs(shapes: dict[str, torch.Size]) -> Iterator[tuple[str, ParamSpec]]:
    for name, shape in shapes.items():
        layer, _, last = name.rpartition(".")
        if last != "weight":
            yield name, ParamSpec(tuple(shape), tuple(range(len(shape))))
        elif len(shape) == 1:
            yield f"{layer}.scale", ParamSpec(tuple(shape), (0,))
        else:
            outputs, inputs, *window = shape
            axes = (1, 0) if not window else (3, 2, 0, 1)
            yield f"{layer}.kernel", ParamSpec((*window, inputs, outputs), axes)
