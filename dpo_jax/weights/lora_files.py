"""LoRA files: every layout that people hold, read; the two that tools open, written; and an adapter merged.

A LoRA adds `alpha / rank * A B` to the kernels of some layers (arXiv 2106.09685). All layouts hold the same two
matrices per layer, in PyTorch's axes, and differ in names and in where alpha is:

    diffusers, PEFT    unet.LAYER.lora_A.weight               alpha in the file's metadata or adapter_config.json
    older diffusers    unet.LAYER.lora.down.weight            alpha = rank
    oldest diffusers   unet.ATTN.processor.to_q_lora.down.weight    alpha = rank
    kohya              lora_unet_LAYER.lora_down.weight       alpha in lora_unet_LAYER.alpha

kohya joins a layer's name by underscores, which can't be undone, so every layout maps from our names outward. For SDXL
it takes the names of the original checkpoint, otherwise those of diffusers.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.weights import original, safetensors_file
from dpo_jax.weights.io import PICKLES, first_several
from dpo_jax.weights.layout import ParamSpec, Specs, from_torch, to_torch
from dpo_jax.weights.mapped_file import fetch

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"

LAYER_AND_PART = re.compile(r"(?P<layer>.+?)([._]lora[._](?P<part>A|B|down|up)\.weight|\.alpha)")
PARTS = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B", None: "alpha"}
TEXT_ENCODERS = ("lora_te", "text_encoder")
FOR_TEXT_ENCODERS = (
    "for text encoders, which are not adapted here (fuse the whole LoRA in PyTorch: pipe.load_lora_weights(FILE); "
    "pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(FOLDER), and start from that folder)"
)
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "Tucker decomposition",
    "lora_B.bias": "LoRA with biases",
}
MADE_FOR = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")

Array = np.ndarray | jax.Array
Number = TypeVar("Number", int, float)


class Adapter(NamedTuple):
    """A LoRA in our layout, by the names of the layers that it adds to."""

    params: Mapping[str, Array]
    """`LAYER.lora_A.kernel` and `LAYER.lora_B.kernel`. Linear: (in, rank) and (rank, out); a convolution: (height,
    width, in, rank) and (1, 1, rank, out)."""
    alphas: Mapping[str, float]
    """LAYER -> alpha; what is added is scaled by alpha / rank."""

    def rank(self, layer: str) -> int:
        return self.params[f"{layer}.lora_A.kernel"].shape[-1]


def read_lora(path: epath.PathLike, base_specs: Specs) -> Adapter:
    """The LoRA in the file or folder at `path`, in the dtype stored, checked against the UNet of `base_specs`.

    Where nothing says alpha it is the rank. Raises one ValueError with all that does not fit: layers that the UNet
    lacks or that have another shape, parts for text encoders, other methods than LoRA, A without B.
    """
    path = _find_file(epath.Path(path))
    config = _peft_config(path)
    names = _stored_names(base_specs)
    layers: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    problems: dict[str, list[str]] = defaultdict(list)
    for key, array in safetensors_file.read(path).items():
        match = LAYER_AND_PART.fullmatch(key)
        stored, part = (match["layer"], PARTS[match["part"]]) if match else (key, "")
        method = next((method for mark, method in OTHER_METHODS.items() if mark in key), None)
        if key.startswith(TEXT_ENCODERS):
            problems[FOR_TEXT_ENCODERS].append(stored)
        elif method:
            problems["of a method that is not supported"].append(f"{key} ({method})")
        elif stored not in names:
            problems["layers that it lacks"].append(stored)
        elif part in layers[names[stored]]:
            problems["stored twice"].append(key)
        else:
            layers[names[stored]][part] = array

    params, alphas = {}, {}
    for layer, parts in sorted(layers.items()):
        if not {"lora_A", "lora_B"} <= parts.keys():
            problems["incomplete"].append(f"{layer} (only {', '.join(sorted(parts))})")
            continue
        rank = parts["lora_A"].shape[0] if parts["lora_A"].ndim else 0
        try:
            for part, spec in _low_rank_specs(base_specs[f"{layer}.kernel"], rank).items():
                params[f"{layer}.{part}.kernel"] = np.array(from_torch(parts[part], spec), order="C")
            alphas[layer] = float(parts["alpha"].item()) if "alpha" in parts else _peft_alpha(config, layer, rank)
        except ValueError as error:
            problems["misshapen"].append(f"{layer} ({error})")
    if problems or not alphas:
        metadata = config | safetensors_file.read_metadata(path)
        made_for = next((f", made for {metadata[key]}," for key in MADE_FOR if metadata.get(key)), "")
        listed = "; ".join(first_several(names, kind) for kind, names in problems.items())
        raise ValueError(f"{path}{made_for} is no LoRA for this UNet: {listed or 'it is empty'}")
    return Adapter(params, alphas)


def write_peft(path: epath.PathLike, adapter: Adapter, base_specs: Specs, *, dtype: DTypeLike) -> None:
    """Writes the file that diffusers' `pipe.load_lora_weights` opens; it looks for FILES[0] in a folder.

    Alphas are in the metadata, which diffusers reads since 0.34; what does not read it takes alpha = rank.
    """
    ranks = {layer: adapter.rank(layer) for layer in sorted(adapter.alphas)}
    rank, alpha = _most_common(ranks.values()), _most_common(adapter.alphas[layer] for layer in ranks)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        # Patterns fit the ends of names, but for the ^.
        "rank_pattern": {f"^{layer}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{layer}": adapter.alphas[layer] for layer in ranks if adapter.alphas[layer] != alpha},
    }
    metadata = json.dumps({f"unet.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    tensors = {
        f"unet.{layer}.{part}.weight": array
        for layer in ranks
        for part, array in _torch_arrays(adapter, layer, base_specs, dtype).items()
    }
    _write(epath.Path(path), tensors, {DIFFUSERS_METADATA: metadata})


def write_kohya(
    path: epath.PathLike,
    adapter: Adapter,
    base_specs: Specs,
    *,
    dtype: DTypeLike,
    original_names: bool,
    base_model_version: str | None = None,
) -> None:
    """Writes the file that web UIs open. `original_names` as they expect for SDXL; diffusers' own otherwise.

    Web UIs tell families apart by `base_model_version`: `sd_v1`, `sd_v2`, `sd_v2_v` (predicts v), `sdxl_base_v1-0`.
    diffusers opens these files too, but takes one alpha for all attention layers.
    """
    layers = sorted(adapter.alphas)
    names = original.unet_module_names(base_specs) if original_names else {layer: layer for layer in layers}
    tensors: dict[str, np.ndarray] = {}
    for layer in layers:
        name = _kohya(names[layer])
        arrays = _torch_arrays(adapter, layer, base_specs, dtype)
        tensors[f"{name}.alpha"] = np.array(adapter.alphas[layer], np.float32)
        tensors[f"{name}.lora_down.weight"] = arrays["lora_A"]
        tensors[f"{name}.lora_up.weight"] = arrays["lora_B"]
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(_most_common(map(adapter.rank, layers))),
        "ss_network_alpha": str(_most_common(adapter.alphas[layer] for layer in layers)),
    }
    if base_model_version:
        is_v2 = base_model_version.startswith("sd_v2")
        metadata |= {"ss_base_model_version": base_model_version, "ss_v2": str(is_v2)}
    _write(epath.Path(path), tensors, metadata)


def lora_files_of(path: epath.Path) -> list[epath.Path]:
    """The files that `read_lora` reads: the weights, and peft's config where alpha is there."""
    file = _find_file(path)
    beside = file.parent / PEFT_CONFIG
    return [file, *([beside] if file.name == FILES[1] and beside.exists() else [])]


class Merged(Mapping[str, np.ndarray]):
    """A model's parameters with an adapter added to its kernels, in float32 at least.

    Each is made when it is asked for, on the host (a TPU would multiply in bfloat16), and none is kept.
    """

    def __init__(self, params: Mapping[str, Array], adapter: Adapter):
        self._params, self._adapter = params, adapter

    def __getitem__(self, name: str) -> np.ndarray:
        stored = fetch(self._params[name])
        value = stored.astype(np.promote_types(stored.dtype, np.float32))
        layer = name.removesuffix(".kernel")
        if layer == name or layer not in self._adapter.alphas:
            return value
        A, B = (
            np.asarray(self._adapter.params[f"{layer}.{part}.kernel"], value.dtype) for part in ("lora_A", "lora_B")
        )
        # The 1 x 1 window of a convolution's B broadcasts over A's.
        return value + self._adapter.alphas[layer] / self._adapter.rank(layer) * (A @ B)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _find_file(path: epath.Path) -> epath.Path:
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        found = [name for name in FILES if name in names] + sorted(name for name in names if name.endswith(PICKLES))
        if not found:
            raise FileNotFoundError(f"no {' or '.join(FILES)} in {path}; give the path of the file itself")
        path /= found[0]
    if not path.exists():
        raise FileNotFoundError(f"no LoRA at {path}; give a .safetensors file, or a folder that holds {FILES[0]}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file; opening a pickle can run code, so convert it once in PyTorch: "
            "safetensors.torch.save_file(torch.load('FILE', weights_only=True), 'NEW.safetensors')"
        )
    return path


def _stored_names(base_specs: Specs) -> dict[str, str]:
    """Every name under which a file may hold a layer -> our name of it."""
    original_names = original.unet_module_names(base_specs)
    layers: dict[str, str] = {}
    for layer in (name.removesuffix(".kernel") for name in base_specs if name.endswith(".kernel")):
        processor = re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1", layer)
        layers |= {prefix + name: layer for prefix in ("unet.", "base_model.model.", "") for name in (layer, processor)}
        layers |= {_kohya(name): layer for name in (layer, original_names[layer])}
    return layers


def _kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def _peft_config(path: epath.Path) -> dict[str, Any]:
    """peft's LoraConfig from the file's metadata, as diffusers writes it, or from beside the file, as peft does."""
    metadata = safetensors_file.read_metadata(path)
    if DIFFUSERS_METADATA in metadata:
        config = json.loads(metadata[DIFFUSERS_METADATA])
        return {key.removeprefix("unet."): value for key, value in config.items()}
    beside = path.parent / PEFT_CONFIG
    return json.loads(beside.read_text()) if path.name == FILES[1] and beside.exists() else {}


def _peft_alpha(config: dict[str, Any], layer: str, rank: int) -> float:
    """As peft finds it: the first pattern that fits the end of the layer's name, else what is said of all."""
    patterns = config.get("alpha_pattern") or {}
    fits = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = float(next(fits, config.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # which scales by alpha / sqrt(rank)


def _low_rank_specs(base: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    *window, inputs, outputs = base.shape
    return {
        "lora_A": ParamSpec((*window, inputs, rank), base.torch_axes),
        "lora_B": ParamSpec((*[1] * len(window), rank, outputs), base.torch_axes),
    }


def _torch_arrays(adapter: Adapter, layer: str, base_specs: Specs, dtype: DTypeLike) -> dict[str, np.ndarray]:
    return {
        part: to_torch(np.asarray(adapter.params[f"{layer}.{part}.kernel"]), spec).astype(dtype)
        for part, spec in _low_rank_specs(base_specs[f"{layer}.kernel"], adapter.rank(layer)).items()
    }


def _write(path: epath.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    safetensors_file.write(path, tensors.items(), header, metadata)


def _most_common(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]
