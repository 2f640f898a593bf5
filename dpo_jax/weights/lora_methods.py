"""Adapters other than LoRA. Their change of a weight can be merged into a model, but not trained further.

    DoRA    magnitude * (W + alpha / rank * B A) / |W + alpha / rank * B A|       arXiv 2402.09353
    LoHa    W + alpha / rank * (B1 A1) o (B2 A2), o elementwise                   arXiv 2108.06098, LyCORIS
    LoKr    W + alpha / rank * W1 (x) W2, (x) Kronecker's product                 arXiv 2309.14859, LyCORIS
    full    W + D

Axes are PyTorch's, as in the files: (outputs, inputs, ...). r = rank.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.weights.layout import ParamSpec, from_torch, to_torch
from dpo_jax.weights.original_slots import Slot

Arrays = Mapping[str, np.ndarray]
"""The arrays of one layer, by the parts that `lora_layouts` names."""


class Change(NamedTuple):
    """The change of one parameter; `read_change` has checked `arrays` and `scale`."""

    method: str
    arrays: Arrays
    scale: float
    """alpha / rank."""
    spec: ParamSpec
    slot: Slot | None = None
    """Set if the arrays are those of a layer of the original layout: where it holds the parameter."""

    def __call__(self, value: np.ndarray, strength: float) -> np.ndarray:
        """Return the parameter, in dpo_jax's layout, with `strength` times the method's difference added."""
        weight = to_torch(value, self.spec)
        difference = self.scale * _difference(self.arrays, weight.dtype)
        if self.slot:
            difference = self.slot.take(difference.reshape(self.slot.total, -1))
        changed = weight + difference.reshape(weight.shape)
        if self.method == "DoRA":
            changed *= _magnitude(self.arrays, weight) / _norm(changed, self.arrays)
        return from_torch(weight + strength * (changed - weight), self.spec)


def method_of(arrays: Arrays) -> str:
    """Return the name of the method that a layer has these arrays of."""
    if any(part.startswith("hada_") for part in arrays):
        return "LoHa"
    if any(part.startswith("lokr_") for part in arrays):
        return "LoKr"
    if "diff" in arrays:
        return "full difference"
    return "DoRA" if arrays.keys() & {"dora_scale", "magnitude"} else "LoRA"


def rank_of(arrays: Arrays) -> int | None:
    """Return the rank that alpha is divided by; None if there is no low-rank product, so nothing is scaled."""
    # Two-dimensional factors are (outputs, r) and (r, inputs). In a Tucker decomposition the first one is (r, outputs).
    return next(
        (
            arrays[part].shape[0] if arrays[part].ndim else 0
            for part in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
            if part in arrays
        ),
        None,
    )


def read_change(arrays: Arrays, scale: float, spec: ParamSpec, slot: Slot | None = None) -> Change:
    """Return the change of one weight; UserError if arrays are missing or do not fit each other or the weight.

    With a `slot`, the arrays are those of a layer of the original layout.
    """
    method = method_of(arrays)
    outputs, *rest = spec.torch_shape
    if slot:
        outputs = slot.total
    found, needed = _shape(arrays, method), (outputs, math.prod(rest))
    if found != needed:
        raise UserError(f"{method} of shape {found}, the model needs {needed}")
    if method == "DoRA":
        scales = arrays["magnitude"] if "magnitude" in arrays else arrays["dora_scale"]
        if scales.size != (outputs if _is_along_outputs(arrays, outputs) else rest[0]):
            raise UserError(f"DoRA with {scales.size} magnitudes, the model needs {spec.torch_shape}")
        if slot:
            if not _is_along_outputs(arrays, outputs):
                raise UserError("DoRA along the inputs of several layers at once is not supported")
            # Each row has its own norm, so the rows of one layer are a DoRA.
            name = "magnitude" if "magnitude" in arrays else "dora_scale"
            arrays = {**arrays, "lora_B": slot.take(arrays["lora_B"]), name: slot.take(arrays[name])}
            slot = None
    return Change(method, arrays, scale, spec, slot)


def fold_mid(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """Return LoCon's Tucker decomposition, `down` then `mid`, as A of a plain LoRA: (r, inputs, height, width)."""
    return np.einsum("pqhw,qi->pihw", mid.astype(np.float32), down.reshape(down.shape[:2]).astype(np.float32))


def _shape(arrays: Arrays, method: str) -> tuple[int, int]:
    """Return (outputs, all other axes) of the difference. Raises a UserError if arrays are missing or do not fit."""
    if method == "full difference":
        return _shape_of_whole(arrays, "diff")
    if method == "DoRA":
        return _shape_of_product(arrays, "lora_B", "lora_A")
    if method == "LoHa":
        first, second = (_shape_of_product(arrays, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
        if first != second:
            raise UserError(f"the products of LoHa have the shapes {first} and {second}")
        return first
    first, second = (
        _shape_of_whole(arrays, name) if name in arrays else _shape_of_product(arrays, f"{name}_a", f"{name}_b", t)
        for name, t in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )
    return first[0] * second[0], first[1] * second[1]


def _shape_of_whole(arrays: Arrays, part: str) -> tuple[int, int]:
    shape = arrays[part].shape
    if not shape or (part != "diff" and len(shape) < 2) or (part == "lokr_w1" and math.prod(shape[2:]) > 1):
        raise UserError(f"{part} is stored as {shape}")
    return shape[0], math.prod(shape[1:])


def _shape_of_product(arrays: Arrays, a: str, b: str, t: str = "") -> tuple[int, int]:
    for part in (a, b):
        if part not in arrays:
            raise UserError(f"{part} is missing")
        if arrays[part].ndim < 2:
            raise UserError(f"{part} is stored as {arrays[part].shape}")
    A, B, T = arrays[a].shape, arrays[b].shape, arrays[t].shape if t in arrays else None
    if T is not None:
        if (len(A), len(B), len(T)) != (2, 2, 4) or T[:2] != (A[0], B[0]):
            raise UserError(f"{t}, {a} and {b} are stored as {T}, {A} and {B}")
        return A[1], B[1] * T[2] * T[3]
    if math.prod(A[1:]) != B[0]:
        raise UserError(f"{a} and {b} are stored as {A} and {B}")
    return A[0], math.prod(B[1:])


def _difference(arrays: Arrays, dtype: np.dtype) -> np.ndarray:
    """Return the unscaled difference, in any shape with the order of elements of the weight."""
    of = {part: np.asarray(array, dtype) for part, array in arrays.items()}
    method = method_of(arrays)
    if method == "full difference":
        return of["diff"]
    if method == "DoRA":
        return _product(of["lora_B"], of["lora_A"])
    if method == "LoHa":
        first, second = (_product(of[f"hada_w{n}_a"], of[f"hada_w{n}_b"], of.get(f"hada_t{n}")) for n in (1, 2))
        return first * second
    w1 = of["lokr_w1"] if "lokr_w1" in of else _product(of["lokr_w1_a"], of["lokr_w1_b"])
    w2 = of["lokr_w2"] if "lokr_w2" in of else _product(of["lokr_w2_a"], of["lokr_w2_b"], of.get("lokr_t2"))
    # The window of a convolution belongs to the second factor.
    return np.kron(w1.reshape(*w1.shape[:2], *[1] * (w2.ndim - 2)), w2)


def _product(a: np.ndarray, b: np.ndarray, t: np.ndarray | None = None) -> np.ndarray:
    if t is None:
        return a.reshape(a.shape[0], -1) @ b.reshape(b.shape[0], -1)
    return np.einsum("ijkl,jr,ip->prkl", t, b, a, optimize=True)


def _is_along_outputs(arrays: Arrays, outputs: int) -> bool:
    return "magnitude" in arrays or arrays["dora_scale"].shape[:1] == (outputs,)


def _magnitude(arrays: Arrays, weight: np.ndarray) -> np.ndarray:
    scales = np.asarray(arrays.get("magnitude", arrays.get("dora_scale")), weight.dtype)
    along = 0 if _is_along_outputs(arrays, weight.shape[0]) else 1
    return scales.reshape([-1 if axis == along else 1 for axis in range(weight.ndim)])


def _norm(weight: np.ndarray, arrays: Arrays) -> np.ndarray:
    along = 0 if _is_along_outputs(arrays, weight.shape[0]) else 1
    others = tuple(axis for axis in range(weight.ndim) if axis != along)
    norm = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
    return norm + np.finfo(np.float32).eps  # as in LyCORIS, because a weight may be zero
