"""The places of parameters in files of the original layout, where one tensor may hold several of them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.weights.layout import ParamSpec, Specs, torch_name
from dpo_jax.weights.mapped_file import fetch
from dpo_jax.weights.original_names import Form, Original, image_reward_names, openclip_names, unet_names, vae_names
from dpo_jax.weights.original_transformers import flux_names, sd3_names, z_image_names

NAMES: dict[str, Callable[[Iterable[str]], dict[str, Original]]] = {
    "text_model": openclip_names,
    "text_encoder": image_reward_names,
    "decoder": vae_names,
    "down_blocks": unet_names,
    "pos_embed": sd3_names,
    "single_transformer_blocks": flux_names,
    "noise_refiner": z_image_names,
}
"""Functions that map names, by a part of the names that only one network has."""


class Slot(NamedTuple):
    """An `Original` with the rows that the parameter has in the tensor."""

    tensor: str
    form: Form
    rows: slice
    total: int
    """Rows of the whole tensor."""

    @classmethod
    def whole(cls, tensor: str, spec: ParamSpec) -> "Slot":
        """Return the slot of a parameter that has a tensor of its own, in PyTorch's layout."""
        return cls(tensor, "", slice(0, (*spec.torch_shape, 1)[0]), (*spec.torch_shape, 1)[0])

    @property
    def is_fused(self) -> bool:
        """True if the tensor also holds other parameters."""
        return self.rows != slice(0, self.total)

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return the parameter in PyTorch's layout from the tensor, as a view unless halves are swapped.

        Also takes other arrays with the tensor's rows, such as a factor of a LoRA. Raises a UserError if the parameter
        is a part of them, and their number is not `total`.
        """
        if self.form == "transposed":
            return array.T
        if self.is_fused:
            if array.shape[:1] != (self.total,):
                raise UserError(f"stored as {array.shape}, the model needs {self.total} rows")
            array = array[self.rows]
        return _with_halves_swapped(array) if self.form == "swapped" else array

    def put(self, array: np.ndarray) -> np.ndarray:
        """Return the rows of the tensor that hold a parameter, given in PyTorch's layout."""
        if self.form == "transposed":
            return array.T
        if self.form == "1x1":
            return array[:, :, None, None]
        return _with_halves_swapped(array) if self.form == "swapped" else array


def slots_of(specs: Specs) -> dict[str, Slot]:
    """Return the slot of each parameter by its name in PyTorch; networks without a table have their PyTorch names."""
    shapes = {torch_name(name): spec.torch_shape for name, spec in specs.items()}
    parts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    originals = original_names(shapes)
    for name, original in originals.items():
        parts[original.tensor].append((original.order, name))
    found = {}
    for tensor, of_tensor in parts.items():
        # A number has no rows, and nothing is concatenated to it.
        rows = [shapes[name][0] if shapes[name] else 1 for _, name in sorted(of_tensor)]
        ends = np.cumsum(rows).tolist()
        for (_, name), count, end in zip(sorted(of_tensor), rows, ends, strict=True):
            found[name] = Slot(tensor, originals[name].form, slice(end - count, end), ends[-1])
    return {name: found[name] for name in shapes}


def layer_slots(specs: Specs) -> dict[str, Slot]:
    """Return the slots of the layers that the parameters belong to, where a slot's tensor is the name of a layer."""
    return {
        name.rpartition(".")[0]: slot._replace(tensor=slot.tensor.rpartition(".")[0])
        for name, slot in slots_of(specs).items()
        if name.endswith(".weight")
    }


def original_names(names: Iterable[str]) -> dict[str, Original]:
    """Map names with the function of their network; names without one map to their PyTorch names."""
    parts = {name.split(".")[0] for name in names}
    of = next((of for part, of in NAMES.items() if part in parts), None)
    return of(names) if of else {name: Original(name) for name in map(torch_name, names)}


def _with_halves_swapped(array: np.ndarray) -> np.ndarray:
    half = len(array) // 2
    return np.concatenate([np.asarray(fetch(array[half:])), np.asarray(fetch(array[:half]))])
