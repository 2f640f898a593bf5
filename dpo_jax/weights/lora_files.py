"""Reads LoRA files in all common layouts and merges them into models; `lora_write` writes them.

A LoRA adds `alpha / rank * A B` to the kernels of some layers (arXiv 2106.09685). All layouts hold the same two
matrices per layer, in PyTorch's axes. `lora_layouts` knows their names, `lora_metadata` where alpha is stated, and
`lora_methods` what relatives of LoRA add.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.streams import warn
from dpo_jax.weights import file_kinds, lora_layouts, safetensors_file
from dpo_jax.weights.finite import is_finite
from dpo_jax.weights.io import PICKLES, first_several
from dpo_jax.weights.layout import ParamSpec, Specs, from_torch
from dpo_jax.weights.lora_fused import divide
from dpo_jax.weights.lora_layouts import Place
from dpo_jax.weights.lora_metadata import FILES, PEFT_CONFIG, Stated
from dpo_jax.weights.lora_methods import Change, fold_mid, method_of, rank_of, read_change
from dpo_jax.weights.mapped_file import fetch
from dpo_jax.weights.original_slots import Slot

Array = np.ndarray | jax.Array
LACKING = "layers that it lacks"
NO_RANK = "of rank 0, so it has no weights"


class Adapter(NamedTuple):
    """A LoRA in dpo_jax's layout, by the names of the layers that it changes."""

    params: Mapping[str, Array]
    """`LAYER.lora_A.kernel` and `LAYER.lora_B.kernel`. Linear: (in, rank) and (rank, out); convolution: (height, width,
    in, rank) and (1, 1, rank, out)."""
    alphas: Mapping[str, float]
    """LAYER -> alpha; the product is scaled by alpha / rank."""

    changes: Mapping[str, Change] = MappingProxyType({})
    """Changes by other methods than LoRA (`lora_methods`), by the name of the parameter; they can only be merged."""

    @property
    def is_empty(self) -> bool:
        """True if it changes nothing."""
        return not self.alphas and not self.changes

    def rank(self, layer: str) -> int:
        """Return the rank of a layer's LoRA; KeyError if it has none."""
        return self.params[f"{layer}.lora_A.kernel"].shape[-1]


def read_lora(path: epath.PathLike, base_specs: Specs, component: str = "unet") -> Adapter:
    """Return the LoRA for a denoiser in the file or folder at `path`, in the stored dtype, to be trained further or
    rewritten.

    Raises the errors of `read_adapters`, and a UserError if the file holds something that can only be merged.
    """
    adapter = read_adapters(path, {component: base_specs})[component]
    check_low_rank(adapter, str(path))
    return adapter


def check_low_rank(adapter: Adapter, what: str) -> None:
    """Raise a UserError if the adapter uses other methods than LoRA, which can only be merged."""
    methods = Counter(change.method for change in adapter.changes.values())
    if methods:
        found = ", ".join(f"{method} ({count} weights)" for method, count in methods.items())
        raise UserError(
            f"{what} holds {found}, which can be merged into a model but not trained or rewritten as a LoRA; merge it "
            "with dpo_jax.export --model=MODEL --lora=FILE --format=diffusers, and use that folder"
        )


def read_adapters(
    path: epath.PathLike, specs: Mapping[str, Specs], *, allow_nonfinite: bool = False
) -> dict[str, Adapter]:
    """Return the adapter of each component (unet, text_encoder, ...) in `specs` from the file or folder at `path`.

    If nothing states alpha, it is the rank. Tensors for no component in `specs` (other text encoders, embeddings) are
    left out with a warning.

    Raises:
        UserError: one message with everything that does not fit: layers that the denoiser lacks or that have another
            shape, unknown methods, A without B. Also if nothing is for the denoiser, or a value is not finite and not
            `allow_nonfinite`.
    """
    path = _find_file(epath.Path(path))
    denoiser = next(component for component in specs if component in lora_layouts.DENOISERS)
    names: dict[str, Place] = {}
    for component, its_specs in specs.items():
        names |= lora_layouts.stored_names(component, its_specs)
    layers: dict[Place, dict[str, np.ndarray]] = defaultdict(dict)
    problems: dict[str, list[str]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    read: dict[str, np.ndarray] = {}
    for key, array in safetensors_file.read(path).items():
        stored, part = lora_layouts.split(key)
        place = names.get(stored)
        owner, method = lora_layouts.for_others(key, denoiser), lora_layouts.unsupported(key)
        if place is None and owner:
            left_out[owner].append(stored)
        elif method:
            problems["of a method that is not supported"].append(f"{key} ({method})")
        elif place is None or not part:
            problems[LACKING].append(stored)
        elif part in layers[place]:
            problems["stored twice"].append(key)
        else:
            layers[place][part] = read[key] = fetch(array)
    _check_values(read, path, allow_nonfinite)

    stated = Stated(path, has_alphas=any("alpha" in parts for parts in layers.values()))
    found = {component: _Found({}, {}, {}) for component in specs}
    originals = lora_layouts.original_layers(specs[denoiser])
    for place, parts in sorted(layers.items()):
        slots = originals.get(place.layer, {}) if place.component == denoiser else {}
        try:
            if slots and not lora_layouts.is_same(slots):
                _read_original_layer(found[denoiser], place, parts, slots, specs[denoiser], stated)
            else:
                _read_layer(found[place.component], place, parts, specs[place.component], stated)
        except _Incomplete as error:
            problems["incomplete"].append(f"{place.layer} ({error})")
        except _Misshapen as error:
            problems["misshapen"].append(f"{place.layer} ({error})")
        except _StoredTwice as error:
            problems["stored twice"].append(str(error))
    made_for = stated.made_for or file_kinds.family_of_lora(problems.get(LACKING, ()))
    is_for_denoiser = any(place.component == denoiser for place in layers)
    _check_found(path, made_for, problems, left_out, "UNet" if denoiser == "unet" else denoiser, is_for_denoiser)
    return {component: Adapter(*parts) for component, parts in found.items()}


def lora_files_of(path: epath.Path) -> list[epath.Path]:
    """Return the files that `read_lora` reads: the weights, and peft's config if it holds alpha."""
    file = _find_file(path)
    beside = file.parent / PEFT_CONFIG
    return [file, *([beside] if file.name == FILES[1] and beside.exists() else [])]


class Merged(Mapping[str, np.ndarray]):
    """A model's parameters with `strength` times an adapter added to them, in float32 or wider.

    Each parameter is computed on the host when it is read (a TPU would multiply in bfloat16), and none is kept.
    """

    def __init__(self, params: Mapping[str, Array], adapter: Adapter, strength: float = 1.0):
        self._params, self._adapter, self._strength = params, adapter, strength

    def __getitem__(self, name: str) -> np.ndarray:
        stored = fetch(self._params[name])
        value = stored.astype(np.promote_types(stored.dtype, np.float32))
        adapter, layer = self._adapter, name.removesuffix(".kernel")
        if name in adapter.changes:
            return adapter.changes[name](value, self._strength)
        if layer == name or layer not in adapter.alphas:
            return value
        A, B = (np.asarray(adapter.params[f"{layer}.{part}.kernel"], value.dtype) for part in ("lora_A", "lora_B"))
        # The 1 x 1 window of a convolution's B broadcasts over A's.
        return value + self._strength * adapter.alphas[layer] / adapter.rank(layer) * (A @ B)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


class _Found(NamedTuple):
    """An `Adapter` that is being read."""

    params: dict[str, np.ndarray]
    alphas: dict[str, float]
    changes: dict[str, Change]


class _Incomplete(UserError):
    """A layer lacks one of the matrices that its method needs."""


class _Misshapen(UserError):
    """A stored array has another shape than the layer needs."""


class _StoredTwice(UserError):
    """A layer is stored under two names."""


def _read_layer(
    found: _Found, place: Place, parts: Mapping[str, np.ndarray], specs: Specs, stated: Stated, slot: Slot | None = None
) -> None:
    """Add to `found` the change that `parts` make to a layer; with a `slot`, they are those of an original layer."""
    layer, parts = place.layer, dict(parts)
    stored_alpha = parts.pop("alpha", None)
    norms_and_biases = {"diff_b": "bias", "b_norm": "bias", "w_norm": "scale"}.items()
    of_weight = {part: array for part, array in parts.items() if part not in dict(norms_and_biases)}
    for part, name in norms_and_biases:
        if part in parts:
            _add_change(found, f"{layer}.{name}", {"diff": parts[part]}, 1.0, specs, slot)
    if "diff" in of_weight:
        name = "scale" if f"{layer}.scale" in specs else "kernel"
        _add_change(found, f"{layer}.{name}", of_weight, 1.0, specs, slot)
    if "diff" in of_weight or (parts and not of_weight):
        return
    method = method_of(of_weight)
    if method in ("LoRA", "DoRA") and not {"lora_A", "lora_B"} <= of_weight.keys():
        raise _Incomplete(f"only {', '.join(sorted(of_weight)) or 'alpha'}")
    rank = rank_of(of_weight)
    if rank == 0:
        raise _Misshapen(NO_RANK)
    alpha, rank = (1.0, 1) if rank is None else (_alpha(stored_alpha, place, rank, stated), rank)
    if "lora_mid" in of_weight:
        down, mid = of_weight["lora_A"], of_weight.pop("lora_mid")
        *window, inputs, _ = specs[f"{layer}.kernel"].shape
        # Check the ranks before multiplying, because the product could have any size.
        if mid.shape != (rank, rank, *window) or down.shape[:2] != (rank, inputs) or down.size != rank * inputs:
            raise _Misshapen(f"lora_mid {mid.shape} and lora_down {down.shape} do not fit each other and the layer")
        of_weight["lora_A"] = fold_mid(down, mid)
    if method != "LoRA":
        _add_change(found, f"{layer}.kernel", of_weight, alpha / rank, specs, slot)
        return
    if f"{layer}.kernel" not in specs:
        raise _Misshapen("it is neither a linear layer nor a convolution")
    if layer in found.alphas:
        raise _StoredTwice(layer)
    for part, spec in low_rank_specs(specs[f"{layer}.kernel"], rank).items():
        try:
            value = from_torch(of_weight[part], spec)
        except ValueError as error:
            raise _Misshapen(str(error)) from None
        found.params[f"{layer}.{part}.kernel"] = np.array(value, order="C")
    found.alphas[layer] = alpha


def _read_original_layer(
    found: _Found,
    place: Place,
    parts: Mapping[str, np.ndarray],
    slots: Mapping[str, Slot],
    specs: Specs,
    stated: Stated,
) -> None:
    """Like `_read_layer`, for a layer of the original layout that stands for those in `slots`."""
    low_rank = ("lora_A", "lora_B", "alpha")
    rest = {part: array for part, array in parts.items() if part not in low_rank}
    if not {"lora_A", "lora_B"} <= parts.keys() or method_of(parts) != "LoRA":
        divided, rest = {}, dict(parts)
    elif "lora_mid" in parts:
        raise _Misshapen("a lora_mid of several layers at once is not supported")
    else:
        rank = rank_of(parts)
        if not rank:
            raise _Misshapen(NO_RANK)
        scale = _alpha(parts.get("alpha"), place, rank, stated) / rank
        try:
            divided = divide(parts["lora_A"], parts["lora_B"], slots)
        except ValueError as error:
            raise _Misshapen(str(error)) from None
    for layer, (A, B) in divided.items():
        own = {"lora_A": A, "lora_B": B, "alpha": np.array(scale * len(A))}
        _read_layer(found, Place(place.component, layer), own, specs, stated)
    if rest:
        for layer, slot in slots.items():
            _read_layer(found, Place(place.component, layer), rest, specs, stated, slot)


def _alpha(stored: np.ndarray | None, place: Place, rank: int, stated: Stated) -> float:
    if stored is None:
        return stated.alpha(place.component, place.layer, rank)
    if stored.size != 1:
        raise _Misshapen(f"alpha is stored as {stored.shape}, and one number is needed")
    return float(stored.item())


def _add_change(
    found: _Found, name: str, arrays: dict[str, np.ndarray], scale: float, specs: Specs, slot: Slot | None
) -> None:
    if name not in specs:
        raise _Misshapen(f"the model has no {name}")
    if name in found.changes:
        raise _StoredTwice(name)
    try:
        found.changes[name] = read_change(arrays, scale, specs[name], slot)
    except ValueError as error:
        raise _Misshapen(str(error)) from None


def _check_values(arrays: Mapping[str, np.ndarray], path: epath.Path, allow_nonfinite: bool) -> None:
    """Raise a UserError for tensors that are not floating point or not finite."""
    # diffusers' own conversion to kohya's names writes alpha as integers.
    others = [
        f"{key} ({array.dtype})"
        for key, array in arrays.items()
        if not _is_float(array.dtype) and not (key.endswith("alpha") and array.dtype.kind == "i")
    ]
    if others:
        raise UserError(f"{path} holds {first_several(others, 'tensors that are not floating point')}")
    bad = [key for key, array in arrays.items() if not is_finite(array)]
    if bad and not allow_nonfinite:
        raise UserError(
            f"{path} holds values that are not finite (NaN or infinity), so its training diverged or the file is "
            f"damaged; use an earlier or another copy. {first_several(bad, 'such tensors')}"
        )


def _is_float(dtype: np.dtype) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, np.floating))


def _check_found(
    path: epath.Path,
    made_for: str | None,
    problems: Mapping[str, list[str]],
    left_out: Mapping[str, list[str]],
    denoiser: str,
    is_for_denoiser: bool,
) -> None:
    """Raise a UserError with all problems, or if nothing is for the denoiser; warn about tensors that are left out."""
    not_a_lora = f"{path}{f', made for {made_for},' if made_for else ''} is not a LoRA for this {denoiser}"
    if problems:
        raise UserError(f"{not_a_lora}: {'; '.join(first_several(names, kind) for kind, names in problems.items())}")
    others = "; ".join(first_several(names, f"layers for {owner}") for owner, names in left_out.items())
    if not is_for_denoiser:
        raise UserError(f"{not_a_lora}: {f'it holds only {others}' if others else 'it is empty'}")
    if others:
        warn(f"{path}: left out {others}")


def _find_file(path: epath.Path) -> epath.Path:
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        found = [name for name in FILES if name in names] + sorted(name for name in names if name.endswith(PICKLES))
        if not found:
            raise MissingFileError(f"{path} has no file {' or '.join(FILES)}; give the path of the file itself")
        path /= found[0]
    if not path.exists():
        raise MissingFileError(
            f"there is no LoRA at {path}; give a .safetensors file, or a folder that holds {FILES[0]}"
        )
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; opening a pickle can run code, so convert it once in PyTorch: "
            "safetensors.torch.save_file(torch.load('FILE', weights_only=True), 'NEW.safetensors')"
        )
    return path


def low_rank_specs(base: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    """Return the shapes and layouts of the two matrices of a layer, given the spec of its kernel."""
    *window, inputs, outputs = base.shape
    return {
        "lora_A": ParamSpec((*window, inputs, rank), base.torch_axes),
        "lora_B": ParamSpec((*[1] * len(window), rank, outputs), base.torch_axes),
    }
