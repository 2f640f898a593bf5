"""Finds NaN and infinity in weights while the weights pass through the host.

Each process checks its own part of the weights as it passes, so nothing is compiled, gathered or read twice.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from dpo_jax.errors import UserError

BYTES_AT_A_TIME = 2**18
"""Bytes checked at a time; they stay in the processor's cache meanwhile."""

# The smallest bit pattern of a non-finite number, shifted left by one to drop the sign.
_LEAST: dict[str, np.unsignedinteger] = {
    "float64": np.uint64(0xFFE0_0000_0000_0000),
    "float32": np.uint32(0xFF00_0000),
    "float16": np.uint16(0xF800),
    "bfloat16": np.uint16(0xFF00),
    "float8_e5m2": np.uint8(0xF8),
    "float8_e4m3fn": np.uint8(0xFE),
}


def is_finite(array: np.ndarray) -> bool:
    """Return whether an array holds neither NaN nor infinity; always True for integers."""
    least = _LEAST.get(array.dtype.name)
    if least is None or not array.size:
        return True
    bits = array.ravel(order="K").view(least.dtype)
    step = BYTES_AT_A_TIME // least.dtype.itemsize
    return all(np.left_shift(bits[i : i + step], 1).max() < least for i in range(0, len(bits), step))


def refuse_nonfinite(names: Iterable[str], path: epath.PathLike, dtype: object = "") -> None:
    """Raise a UserError if `names` is not empty: these tensors of the file or folder are not finite (as `dtype`)."""
    names = list(names)
    if not names:
        return
    several = f" and {len(names) - 3} more" if len(names) > 3 else ""
    held = f" as {dtype}" if dtype else ""
    raise UserError(
        f"{path} holds numbers that are not finite{held} (NaN or infinity) in {', '.join(names[:3])}{several}; "
        "download or convert it again, or take another (sample, evaluate and export use a diffusion model all the same "
        "with --allow_nonfinite; a judge has to be whole)"
    )


def refuse_nonfinite_arrays(arrays: Mapping[str, np.ndarray], path: epath.PathLike) -> None:
    """Raise a UserError if any of the named arrays is not finite."""
    refuse_nonfinite((name for name, array in arrays.items() if not is_finite(np.asarray(array))), path)
