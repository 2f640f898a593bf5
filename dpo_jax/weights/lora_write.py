"""Writes LoRAs for other tools: diffusers, PEFT and OneTrainer, or web UIs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.weights import lora_layouts, safetensors_file
from dpo_jax.weights.layout import Specs, to_torch
from dpo_jax.weights.lora_files import Adapter, low_rank_specs
from dpo_jax.weights.lora_fused import join
from dpo_jax.weights.lora_metadata import DIFFUSERS_METADATA

Number = TypeVar("Number", int, float)


def write_peft(
    path: epath.PathLike,
    adapter: Adapter,
    base_specs: Specs,
    *,
    dtype: DTypeLike,
    component: str = "unet",
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the file that diffusers' `pipe.load_lora_weights` reads; in a folder it looks for FILES[0].

    alpha / rank is multiplied into the weights, so that alpha = rank, both for tools that read the metadata and for
    those that do not (diffusers before 0.34, OneTrainer). `component` is the denoiser, unet or transformer, and
    `metadata` is added to the file's metadata.
    """
    ranks = {layer: adapter.rank(layer) for layer in sorted(adapter.alphas)}
    adapter = _with_alphas(adapter, ranks)
    rank = _most_common(ranks.values())
    # A pattern matches the end of a name unless it begins with ^.
    others = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    stated = json.dumps({f"{component}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    tensors = {
        f"{component}.{layer}.{part}.weight": array
        for layer in ranks
        for part, array in _torch_arrays(adapter, layer, base_specs, dtype).items()
    }
    _write(epath.Path(path), tensors, {DIFFUSERS_METADATA: stated} | dict(metadata))


def write_kohya(
    path: epath.PathLike,
    adapter: Adapter,
    base_specs: Specs,
    *,
    dtype: DTypeLike,
    original_names: bool,
    component: str = "unet",
    base_model_version: str | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the file that web UIs read, and also diffusers and OneTrainer.

    `original_names` uses the layers of the original layout, which they expect for SDXL and flow models (LoRAs of layers
    that it concatenates are joined); otherwise diffusers' names. Web UIs recognise the family by `base_model_version`:
    `sd_v1`, `sd_v2`, `sd_v2_v` (predicts v), `sdxl_base_v1-0`, `5-medium`, `flux1`.

    All layers of a UNet get the same alpha (the most common rank) because diffusers takes one for all attention layers.
    Those of a transformer get their rank because diffusers takes none for FLUX.1's last layer. The differences are
    multiplied into the weights. `metadata` is added to the file's metadata.
    """
    layers = sorted(adapter.alphas)
    ranks = {layer: adapter.rank(layer) for layer in layers}
    alpha = _most_common(ranks.values())
    adapter = _with_alphas(adapter, dict.fromkeys(layers, alpha) if component == "unet" else ranks)
    tensors: dict[str, np.ndarray] = {}
    for name, slots in lora_layouts.original_layers(base_specs).items():
        parts = {layer: _torch_arrays(adapter, layer, base_specs, dtype) for layer in slots if layer in ranks}
        if original_names and parts and not lora_layouts.is_same(slots):
            A, B = join({layer: (own["lora_A"], own["lora_B"]) for layer, own in parts.items()}, slots)
            _add_kohya(tensors, name, A, B, len(A))
            continue
        for layer, own in parts.items():
            of_layer = alpha if component == "unet" else ranks[layer]
            _add_kohya(tensors, name if original_names else layer, own["lora_A"], own["lora_B"], of_layer)
    stated = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(alpha),
        "ss_network_alpha": str(float(alpha)),
    }
    if base_model_version:
        is_v2 = base_model_version.startswith("sd_v2")
        stated |= {"ss_base_model_version": base_model_version, "ss_v2": str(is_v2)}
    _write(epath.Path(path), tensors, stated | dict(metadata))


def _add_kohya(tensors: dict[str, np.ndarray], layer: str, A: np.ndarray, B: np.ndarray, alpha: int) -> None:
    name = f"lora_unet_{lora_layouts.joined(layer)}"
    tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    tensors[f"{name}.lora_down.weight"] = A
    tensors[f"{name}.lora_up.weight"] = B


def _with_alphas(adapter: Adapter, alphas: Mapping[str, float]) -> Adapter:
    """Return the same LoRA with other alphas. The A matrices are rescaled, in at least float32: they are larger than
    the B matrices and so lose less in half precision."""
    params = dict(adapter.params)
    for layer, alpha in alphas.items():
        if adapter.alphas[layer] != alpha:
            name = f"{layer}.lora_A.kernel"
            A = np.asarray(params[name])
            params[name] = A.astype(np.promote_types(A.dtype, np.float32)) * (adapter.alphas[layer] / alpha)
    return Adapter(params, alphas)


def _torch_arrays(adapter: Adapter, layer: str, base_specs: Specs, dtype: DTypeLike) -> dict[str, np.ndarray]:
    arrays = {}
    for part, spec in low_rank_specs(base_specs[f"{layer}.kernel"], adapter.rank(layer)).items():
        array = to_torch(np.asarray(adapter.params[f"{layer}.{part}.kernel"]), spec)
        with np.errstate(over="ignore"):  # writing the file refuses infinity
            arrays[part] = array.astype(dtype)
    return arrays


def _write(path: epath.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    header = safetensors_file.in_order({name: (array.shape, array.dtype) for name, array in tensors.items()})
    safetensors_file.write(path, ((name, tensors[name]) for name in header), header, metadata)


def _most_common(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]
