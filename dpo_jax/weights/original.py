"""The original layout: one file for the whole model, for example `v1-5-pruned.safetensors` or
`sd_xl_base_1.0.safetensors`.

The names of each component begin with a prefix of its own; a file of one component may hold them without it. After
the prefix, `original_names` and `original_transformers` tell which tensor holds a parameter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import ParamSpec, Specs, to_torch, torch_name
from dpo_jax.weights.mapped_file import fetch
from dpo_jax.weights.original_names import count
from dpo_jax.weights.original_slots import Slot, slots_of
from dpo_jax.weights.scaled import multiplied

# Tensors in files that are not in a network: the rest of OpenCLIP and BLIP, copies, and leftovers of training.
NO_PART = re.compile(
    r"^(logit_scale|attn_mask|text_projection)$|^blip\.(text|vision)_proj\.|\bposition_ids$|^(loss|model_ema)\."
    r"|^norm_final\.weight$|^encoder\.embed_tokens\.weight$"  # Z-Image's unused norm; T5's table once more
    r"|^spiece_model$"  # T5's tokenizer, which ComfyUI stores beside it
    r"|^lm_head\.weight$"  # of Qwen3's language model
)
# For a text encoder also the image half of its CLIP, and the projection that not every model uses.
NO_TEXT = re.compile(r"^(visual_projection|text_projection)\.weight$|^(vision_model|visual)\.")
# Other prefixes of a component's names: in files of that component alone, and in ComfyUI's files of flow models.
ALIASES = {
    "model.diffusion_model.": ("diffusion_model.",),
    "first_stage_model.": ("vae.",),
    "vae.": ("first_stage_model.",),
}
WHOLE_MODEL = (
    *("model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders."),
    *("cond_stage_model.", "conditioner.embedders."),
)
# SD3 takes the caption from CLIP-L without a projection. Its files hold none; diffusers' folders hold an identity.
CLIP_L_OF_SD3, PROJECTION = "text_encoders.clip_l.transformer.", "text_projection.weight"

# T5's table is in files under both names that transformers ties; diffusers reads files with one of them wrongly.
TWICE = {"shared.weight": ("encoder.embed_tokens.weight",)}


def is_no_part(name: str, specs: Specs) -> bool:
    """Return whether a tensor called `name`, which the network of `specs` has no place for, may be left out."""
    is_text = "text_model.embeddings.token_embedding.embedding" in specs and "logit_scale" not in specs
    return bool(NO_PART.search(name) or (is_text and NO_TEXT.search(name)))


def read(path: epath.Path, specs: Specs, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, Slot]]:
    """Return the tensors of one component by parameters' names in PyTorch diffusers and transformers, as views of the
    file, and the slots of those parameters that the original layout holds in another form or in a tensor with others.

    `prefix` is the beginning of the component's names; a file without such a name is taken to be the component alone.
    Tensors that are not part of the network are left out, including the last layer of SD2's text encoder, which
    diffusers' folders drop. Any other array whose name is not an original one keeps its name, which may be the current
    one already.

    Raises a UserError if the file holds other components of a whole model but not this one.
    """
    stored = safetensors_file.read(path)
    arrays = stored
    for beginning in (prefix, *ALIASES.get(prefix, ())):
        found = {name.removeprefix(beginning): array for name, array in stored.items() if name.startswith(beginning)}
        if found:
            arrays = found
            break
    if arrays is stored and any(name.startswith(WHOLE_MODEL) for name in stored):
        raise UserError(f"{path} lacks a part of the model: none of its tensors begins with {prefix}")
    arrays, slots = multiplied(arrays, path), slots_of(specs)
    dropped_layer = f"transformer.resblocks.{count(specs, 'text_model.encoder.layers')}."
    found = {name: arrays[slot.tensor] for name, slot in slots.items() if slot.tensor in arrays}
    theirs = {slots[name].tensor for name in found}
    others = {
        name: array
        for name, array in arrays.items()
        if name not in theirs and (name in slots or not is_no_part(name, specs)) and not name.startswith(dropped_layer)
    }
    if prefix == CLIP_L_OF_SD3 and PROJECTION in slots:
        beside = next(iter((others | found).values()), np.zeros(0, np.float32))
        others[PROJECTION] = np.eye(slots[PROJECTION].total, dtype=beside.dtype)
    return others | found, {name: slots[name] for name in found}


def write(
    path: epath.Path,
    components: Mapping[str, tuple[Mapping[str, jax.Array | np.ndarray], Specs]],
    *,
    dtype: DTypeLike | None,
    allow_nonfinite: bool = False,
    marks: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file with several components, each given by its prefix as (parameters, specs), tensor by tensor.

    A `dtype` of None keeps each tensor's own. `marks` are names of empty tensors by which web UIs recognise models;
    `metadata` is added to the file's metadata. The last layer of SD2's text encoder does not exist here, so it is not
    written. ComfyUI prints that it is missing, but nothing uses it: diffusers ignores it, and web UIs take the output
    of the layer before.
    """
    sources: dict[str, list[_Source]] = {}
    for prefix, (params, specs) in components.items():
        # The original holds some text encoders as transformers' own models; the end of the prefix shows it.
        own_names = prefix.endswith(".transformer.")
        slots = slots_of(specs)
        for name, spec in specs.items():
            if prefix == CLIP_L_OF_SD3 and torch_name(name) == PROJECTION:
                _check_identity(params[name])
                continue
            slot = Slot.whole(torch_name(name), spec) if own_names else slots[torch_name(name)]
            for tensor in (slot.tensor, *TWICE.get(slot.tensor, ())):
                sources.setdefault(prefix + tensor, []).append(_Source(params, name, spec, slot))
    header: dict[str, tuple] = {mark: ((0,), np.dtype(np.float32)) for mark in marks}
    for tensor, parts in sources.items():
        parts.sort(key=lambda part: part.slot.rows.start)
        # Arrays of the right shape that take no memory.
        shape = _joined([part.slot.put(np.broadcast_to(np.int8(0), part.spec.torch_shape)) for part in parts]).shape
        header[tensor] = (shape, np.dtype(dtype or parts[0].params[parts[0].name].dtype))

    header = safetensors_file.in_order(header)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor, (_, of_tensor) in header.items():
            if tensor in sources:
                parts = sources[tensor]
                arrays = [part.slot.put(to_torch(fetch(part.params[part.name]), part.spec)) for part in parts]
                yield tensor, _joined(arrays).astype(of_tensor)
            else:
                yield tensor, np.zeros(0, of_tensor)

    safetensors_file.write(path, tensors(), header, metadata, allow_nonfinite=allow_nonfinite)


def _check_identity(projection: jax.Array | np.ndarray) -> None:
    if not np.array_equal(fetch(projection), np.eye(len(projection))):
        raise UserError(
            "the first text encoder has a text_projection that is not the identity, and files of SD3 in the original "
            "layout hold none; choose --format=diffusers"
        )


class _Source(NamedTuple):
    """A parameter that is written."""

    params: Mapping[str, jax.Array | np.ndarray]
    name: str
    spec: ParamSpec
    slot: Slot


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
