"""fp8 weights that are stored next to scales, as ComfyUI writes them: multiplied out when they are read.

A layer has one scale (`LAYER.scale_weight`, or `LAYER.weight_scale` since 2025), or one per output. The scales of its
inputs serve products in fp8, which are not computed here, so they are left out. Other ways to quantise a model are
refused.
"""

import re
from typing import Any, cast

import numpy as np
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.weights.mapped_file import fetch

WEIGHT_SCALE = re.compile(r"^(?P<layer>.+)\.(scale_weight|weight_scale)$")
LEFT_OUT = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
OTHER_METHODS = {
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+|SCB|weight_format)$": "bitsandbytes",
    r"\.(qweight|qzeros|g_idx|wscales|smooth_factor)$": "GPTQ, AWQ or SVDQuant",
    r"\.(weight_scale_2|pre_quant_scale|weight_scale_inv)$": "scales of blocks",
}
REMEDY = (
    "use the same model in bfloat16, float16 or fp8, or multiply it out in PyTorch diffusers: call dequantize() on the "
    "model that is quantised, and save_pretrained() on the pipeline"
)


class Scaled:
    """A view of stored numbers times a view of their scales, both of the same shape; multiplied when it is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, values: np.ndarray, scales: np.ndarray):
        self._values, self._scales = values, scales

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both."""
        return self._values.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._values.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._values.size

    @property
    def T(self) -> "Scaled":
        """The transposed view."""
        return self.transpose()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> "Scaled":
        return Scaled(self._values[index], self._scales[index])

    def transpose(self, *axes: Any) -> "Scaled":
        """Return the view with other axes, as NumPy does."""
        return Scaled(self._values.transpose(*axes), self._scales.transpose(*axes))

    def reshape(self, shape: tuple[int, ...]) -> "Scaled":
        """Return the view in another shape, as NumPy does."""
        return Scaled(self._values.reshape(shape), self._scales.reshape(shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = fetch(self._values).astype(self.dtype) * fetch(self._scales).astype(self.dtype)
        return values if dtype is None else values.astype(dtype)


def multiplied(stored: dict[str, np.ndarray], where: epath.Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file or folder without scales, and with weights that are multiplied by theirs.

    Raises a UserError if tensors show that weights are quantised in another way.
    """
    for sign, method in OTHER_METHODS.items():
        found = next((name for name in stored if re.search(sign, name)), None)
        if found:
            raise UserError(
                f"{where} holds weights that are quantised in a way that is not read ({method}: {found}); {REMEDY}"
            )
    arrays = {name: array for name, array in stored.items() if not LEFT_OUT.search(name)}
    for name in [name for name in arrays if WEIGHT_SCALE.match(name)]:
        scale, weight_name = arrays.pop(name), name.rpartition(".")[0] + ".weight"
        weight = arrays.get(weight_name)
        if weight is None:
            raise UserError(f"{where} is incomplete: it holds the scale {name}, but not {weight_name}; copy it again")
        is_scalar, is_per_output = (
            scale.size == 1,
            weight.ndim == 2 and scale.shape in ((len(weight),), (len(weight), 1)),
        )
        if not weight.dtype.name.startswith("float8") or not (is_scalar or is_per_output):
            raise UserError(
                f"{where} holds weights that are quantised in a way that is not read ({weight_name} is {weight.dtype} "
                f"of shape {weight.shape}, its scale {scale.dtype} of shape {scale.shape}); {REMEDY}"
            )
        scales = np.broadcast_to(scale.reshape((-1,) + (1,) * (weight.ndim - 1)), weight.shape)
        # It has all of an array that layouts, `fetch` and the writers use.
        arrays[weight_name] = cast(np.ndarray, Scaled(weight, scales))
    return arrays
