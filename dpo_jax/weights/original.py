"""The original layout: one file for the whole model, for example `v1-5-pruned.safetensors` or
`sd_xl_base_1.0.safetensors`.

The names of each component begin with a prefix of its own. After it, UNet and VAE have the names of CompVis' `ldm` and
Stability's `sgm`, CLIP-L has those of transformers, and the text encoders of SD2 and SDXL have those of OpenCLIP. The
judges HPSv2 (a whole CLIP of OpenCLIP) and ImageReward (a BLIP of Salesforce) are published in similar layouts.

The mapping starts from dpo_jax's names here too. A table holds the beginnings of names that differ, and the longest
match is replaced. Sizes of the model, for example the number of layers of a level, are counted in its names.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import Specs, to_torch, torch_name
from dpo_jax.weights.mapped_file import fetch

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
BLIP_IMAGE_LAYER = {
    "layer_norm1": "norm1",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm2": "norm2",
    "mlp": "mlp",
}

# Tensors in files that are not in a network: the rest of OpenCLIP and BLIP, and leftovers of training.
NO_PART = re.compile(
    r"^(logit_scale|attn_mask|text_projection)$|^blip\.(text|vision)_proj\.|\bposition_ids$|^(loss|model_ema)\."
)
# For a text encoder also the image half of its CLIP, and the projection that not every model uses.
NO_TEXT = re.compile(r"^(visual_projection|text_projection)\.weight$|^(vision_model|visual)\.")
# Prefixes of a component's names in files of that component alone, in addition to the prefix in a whole model.
ALONE = {"model.diffusion_model.": ("diffusion_model.",)}
WHOLE_MODEL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")

SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$")
CONVERT_SCALED = (
    "multiply them out once in PyTorch: python -c \"import safetensors.torch as s; x = s.load_file('{file}'); "
    "g = lambda n: x.get(n[:-6] + 'scale_weight', x.get(n + '_scale')); s.save_file({{n: t if g(n) is None else "
    "(t.float() * g(n).float()).half() for n, t in x.items() if 'scale' not in n.split('.')[-1]}}, "
    "'{stem}-fp16.safetensors')\""
)


def is_no_part(name: str, specs: Specs) -> bool:
    """Return whether a tensor called `name`, which the network of `specs` has no place for, may be left out."""
    is_text = "text_model.embeddings.token_embedding.embedding" in specs and "logit_scale" not in specs
    return bool(NO_PART.search(name) or (is_text and NO_TEXT.search(name)))


def refuse_scaled(names: Iterable[str], path: epath.Path) -> None:
    """Raise a UserError if weights have to be multiplied by scales that are stored next to them."""
    scales = [name for name in names if SCALE.search(name)]
    if scales:
        convert = CONVERT_SCALED.format(file=path, stem=path.with_suffix(""))
        raise UserError(f"{path} holds fp8 weights with scales (such as {scales[0]}), which are not read; {convert}")


def read(path: epath.Path, specs: Specs, prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays of one component by their names in PyTorch diffusers and transformers, as views of the file.

    `prefix` is the beginning of the component's names; a file without such a name is taken to be the component alone.
    Tensors that are not part of the network are left out, including the last layer of SD2's text encoder, which
    diffusers' folders drop. Any other array whose name is not an original one keeps its name, which may be the current
    one already.

    Raises a UserError if the file holds other components of a whole model but not this one.
    """
    stored = safetensors_file.read(path)
    refuse_scaled(stored, path)
    arrays = stored
    for beginning in (prefix, *ALONE.get(prefix, ())):
        found = {name.removeprefix(beginning): array for name, array in stored.items() if name.startswith(beginning)}
        if found:
            arrays = found
            break
    if arrays is stored and any(name.startswith(WHOLE_MODEL) for name in stored):
        raise UserError(f"{path} lacks a part of the model: none of its tensors begins with {prefix}")
    originals = _original_names(specs)
    theirs = set(originals.values())
    renamed = {name: _from_original(name, arrays[of]) for name, of in originals.items() if of in arrays}
    dropped_layer = f"transformer.resblocks.{_count(originals, 'text_model.encoder.layers')}."
    others = {
        name: array
        for name, array in arrays.items()
        if name not in theirs
        and (name in originals or not is_no_part(name, specs))
        and not name.startswith(dropped_layer)
    }
    return others | renamed


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
    sources: dict[str, list] = {}
    for prefix, (params, specs) in components.items():
        # The original holds CLIP-L as transformers' own model; the end of the prefix shows it.
        is_transformers = prefix.endswith(".transformer.")
        originals = {name: name for name in map(torch_name, specs)} if is_transformers else _original_names(specs)
        for name in specs:
            sources.setdefault(prefix + originals[torch_name(name)], []).append((params, name, specs[name]))
    header = {}
    for original, parts in sources.items():
        parts.sort(key=lambda part: _third(part[1]))
        # Arrays of the right shape that take no memory.
        shape = _to_original(original, [np.broadcast_to(np.int8(0), spec.torch_shape) for _, _, spec in parts]).shape
        params, name, _ = parts[0]
        header[original] = (shape, np.dtype(dtype or params[name].dtype))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for original, parts in sources.items():
            arrays = [to_torch(fetch(params[name]), spec) for params, name, spec in parts]
            yield original, _to_original(original, arrays).astype(header[original][1])

        yield from ((mark, np.zeros(0, np.float32)) for mark in marks)

    header |= {mark: ((0,), np.dtype(np.float32)) for mark in marks}
    safetensors_file.write(path, tensors(), header, metadata, allow_nonfinite=allow_nonfinite)


def unet_module_names(specs: Iterable[str]) -> dict[str, str]:
    """Map the names of a UNet's layers to their original names; `specs` holds the names of all of its parameters."""
    return {ours.rpartition(".")[0]: of.rpartition(".")[0] for ours, of in unet_names(specs).items()}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Map the PyTorch names of a UNet's parameters to their original names; `names` are all of its parameters here."""
    names = [torch_name(name) for name in names]
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    # The original numbers the layers of all levels consecutively, and a downsampler counts as a layer.
    place = 1
    for level in range(_count(names, "down_blocks")):
        block = f"down_blocks.{level}"
        for layer in range(_count(names, f"{block}.resnets")):
            resnets[f"{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            table[f"{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        table[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for level in range(_count(names, "up_blocks")):
        block = f"up_blocks.{level}"
        for layer in range(_count(names, f"{block}.resnets")):
            resnets[f"{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            table[f"{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        # It follows the level's last layer, which is a resnet and possibly its attention.
        after = 2 if _count(names, f"{block}.attentions") else 1
        table[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    table |= {f"{ours}.{part}": f"{of}.{name}" for ours, of in resnets.items() for part, name in UNET_RESNET.items()}
    return {name: _renamed(name, table) for name in names}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Like `unet_names`, for a VAE."""
    names = [torch_name(name) for name in names]
    table = {}
    for half in ("encoder", "decoder"):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        table[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        for part, name in VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{part}"] = f"{half}.mid.attn_1.{name}"
    levels = _count(names, "encoder.down_blocks")
    for level in range(levels):
        table[f"encoder.down_blocks.{level}.resnets"] = f"encoder.down.{level}.block"
        table[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        # The original counts the decoder's levels by resolution, so the last one is 0.
        table[f"decoder.up_blocks.{level}.resnets"] = f"decoder.up.{levels - 1 - level}.block"
        table[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    return {name: _renamed(name, table).replace("conv_shortcut", "nin_shortcut") for name in names}


def openclip_names(names: Iterable[str]) -> dict[str, str]:
    """Like `unet_names`, for a text encoder or a whole CLIP. Queries, keys and values have the same original name: they
    are concatenated in one tensor."""
    names = [torch_name(name) for name in names]
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "visual_projection.weight": "visual.proj",
    }
    for ours, of in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(_count(names, f"{ours}.encoder.layers")):
            for part, name in OPENCLIP_LAYER.items():
                table[f"{ours}.encoder.layers.{layer}.{part}"] = f"{of}.resblocks.{layer}.{name}"
    return {name: _renamed(name, table) for name in names}


def image_reward_names(names: Iterable[str]) -> dict[str, str]:
    """Like `unet_names`, for ImageReward: the image half has timm's names, the text half the current ones."""
    names = [torch_name(name) for name in names]
    image = "blip.visual_encoder"
    table = {
        "vision_model.embeddings.class_embedding": f"{image}.cls_token",
        "vision_model.embeddings.position_embedding": f"{image}.pos_embed",
        "vision_model.embeddings.patch_embedding": f"{image}.patch_embed.proj",
        "vision_model.post_layernorm": f"{image}.norm",
        "text_encoder": "blip.text_encoder",
    }
    for layer in range(_count(names, "vision_model.encoder.layers")):
        for part, name in BLIP_IMAGE_LAYER.items():
            table[f"vision_model.encoder.layers.{layer}.{part}"] = f"{image}.blocks.{layer}.{name}"
    return {name: _renamed(name, table) for name in names}


NAMES = {
    "text_model": openclip_names,
    "text_encoder": image_reward_names,
    "decoder": vae_names,
    "down_blocks": unet_names,
}
"""Functions that map names, by a part of the names that only one component has."""


def _original_names(names: Iterable[str]) -> dict[str, str]:
    """Map names with the function of their component; names without one map to their PyTorch names."""
    parts = {name.split(".")[0] for name in names}
    of = (of for part, of in NAMES.items() if part in parts)
    return next(of, lambda names: {name: name for name in map(torch_name, names)})(names)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Return `name` with the longest prefix that is in `table` replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        beginning = ".".join(parts[:end])
        if beginning in table:
            return ".".join([table[beginning], *parts[end:]])
    return name


def _count(names: Iterable[str], of: str) -> int:
    """Return the number of items in the list of layers called `of`."""
    return len({name.removeprefix(f"{of}.").split(".")[0] for name in names if name.startswith(f"{of}.")})


def _third(name: str) -> int:
    """Return which third of OpenCLIP's joint projection a parameter is; 0 if it is not part of one."""
    return next((third for third, layer in enumerate(("q_proj", "k_proj", "v_proj")) if f".{layer}." in name), 0)


def _from_original(name: str, array: np.ndarray) -> np.ndarray:
    """Return the array that PyTorch now calls `name`, as a view of the original tensor that holds it."""
    if re.search(r"\.[qkv]_proj\.", name):
        return np.array_split(array, 3)[_third(name)]
    return array.T if name in ("text_projection.weight", "visual_projection.weight") else array


def _to_original(original: str, arrays: list[np.ndarray]) -> np.ndarray:
    """Return the tensor that the original stores: one current tensor, or three of them concatenated."""
    if len(arrays) > 1:
        return np.concatenate(arrays)
    (array,) = arrays
    if original.endswith(("text_projection", "visual.proj")):
        return array.T
    if re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", original):  # 1x1 convolutions
        return array[:, :, None, None]
    return array
