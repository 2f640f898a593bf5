"""LoRAs of layers that the original layout concatenates, such as queries, keys and values.

One LoRA of such a layer is several LoRAs that share A. Several LoRAs are one with the As one below the other and a
block-diagonal B, as kohya's scripts write it. Both directions keep the product.

Arrays are in PyTorch's layout: A is (rank, inputs), B is (outputs, rank).
"""

from collections.abc import Mapping

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.weights.original_slots import Slot

LowRank = tuple[np.ndarray, np.ndarray]
"""A and B."""


def divide(A: np.ndarray, B: np.ndarray, slots: Mapping[str, Slot]) -> dict[str, LowRank]:
    """Return the LoRA of each layer in `slots` (in the order of their rows) from that of the layer that holds them.

    If B is block-diagonal, every layer gets its own block without the rank-1 terms that `join` filled up with zeros,
    and layers for which nothing is left are absent. Otherwise they share A. Raises a UserError if shapes do not fit.
    """
    total = next(iter(slots.values())).total
    if A.ndim != 2 or B.shape != (total, len(A)):
        raise UserError(f"A is stored as {A.shape} and B as {B.shape}, the model needs {total} outputs")
    own = _own_terms(B, slots)
    found = {}
    for layer, slot in slots.items():
        terms = own.get(layer, slice(None))
        a, b = A[terms], B[:, terms][slot.rows]
        if own:
            used = a.any(axis=1) | b.any(axis=0)
            a, b = a[used], b[:, used]
        if len(a):
            # The rows are taken already, so that only a swap is left.
            found[layer] = a, slot._replace(rows=slice(0, slot.total)).take(b)
    return found


def join(parts: Mapping[str, LowRank], slots: Mapping[str, Slot]) -> LowRank:
    """Return one LoRA for the layer that holds those in `slots`, from the LoRAs of some or all of them.

    All get the same number of terms, so that other programs recognise the blocks.
    """
    rank = max(len(A) for A, _ in parts.values())
    first, _ = next(iter(parts.values()))
    total = next(iter(slots.values())).total
    A = np.zeros((len(slots) * rank, first.shape[1]), first.dtype)
    B = np.zeros((total, len(A)), first.dtype)
    for place, (layer, slot) in enumerate(slots.items()):
        if layer in parts:
            own_A, own_B = parts[layer]
            terms = slice(place * rank, place * rank + len(own_A))
            A[terms], B[slot.rows, terms] = own_A, slot.put(own_B)
    return A, B


def _own_terms(B: np.ndarray, slots: Mapping[str, Slot]) -> dict[str, slice]:
    """Return which columns of B belong to each layer if B is block-diagonal with equal ranks; {} if it is not."""
    rank, rest = divmod(B.shape[1], len(slots))
    terms = {layer: slice(place * rank, (place + 1) * rank) for place, layer in enumerate(slots)}
    others = B.copy()
    for layer, slot in slots.items():
        others[slot.rows, terms[layer]] = 0
    return {} if rest or others.any() else terms
