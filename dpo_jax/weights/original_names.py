"""The names of parameters in files of the original layout, after the prefix of their component; a function per network.

UNet and VAE have the names of CompVis' `ldm` and Stability's `sgm`, and the text encoders of SD2 and SDXL have those of
OpenCLIP. The judges HPSv2 (a whole CLIP of OpenCLIP) and ImageReward (a BLIP of Salesforce) are published in similar
layouts. Other text encoders have the names of transformers; `original_transformers` has those of SD3, FLUX.1 and
Z-Image.

The mapping starts from dpo_jax's names here too. A table holds the beginnings of names that differ, and the longest
match is replaced. Sizes of the model, for example the number of layers of a level, are counted in its names.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from dpo_jax.weights.layout import torch_name

Form = Literal["", "transposed", "1x1", "swapped"]
"""How a tensor holds a parameter: as it is, transposed, as a 1x1 convolution, or with the halves of its rows swapped
(shift and scale of an adaptive norm)."""


class Original(NamedTuple):
    """Where a file of the original layout holds a parameter."""

    tensor: str
    order: int = 0
    """Position of the parameter among those that are concatenated, along rows, in this tensor."""
    form: Form = ""


Table = dict[str, str | Original]
"""Originals of names or of their beginnings."""

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_LINEAR = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ATTENTION: Table = {
    "group_norm": Original("norm"),
    **{f"{ours}.bias": Original(f"{of}.bias") for ours, of in _VAE_LINEAR.items()},
    **{f"{ours}.weight": Original(f"{of}.weight", form="1x1") for ours, of in _VAE_LINEAR.items()},
}
OPENCLIP_LAYER: Table = {
    "layer_norm1": "ln_1",
    **{
        f"self_attn.{part}_proj.{kind}": Original(f"attn.in_proj_{kind}", order)
        for kind in ("weight", "bias")
        for order, part in enumerate("qkv")
    },
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


def unet_names(names: Iterable[str]) -> dict[str, Original]:
    """Map the PyTorch names of a UNet's parameters to their originals; `names` are all of its parameters here."""
    names = [torch_name(name) for name in names]
    table: Table = {
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
    for level in range(count(names, "down_blocks")):
        block = f"down_blocks.{level}"
        for layer in range(count(names, f"{block}.resnets")):
            resnets[f"{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            table[f"{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        table[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for level in range(count(names, "up_blocks")):
        block = f"up_blocks.{level}"
        for layer in range(count(names, f"{block}.resnets")):
            resnets[f"{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            table[f"{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        # It follows the level's last layer, which is a resnet and possibly its attention.
        after = 2 if count(names, f"{block}.attentions") else 1
        table[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    table |= {f"{ours}.{part}": f"{of}.{name}" for ours, of in resnets.items() for part, name in UNET_RESNET.items()}
    return {name: renamed(name, table) for name in names}


def vae_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for a VAE."""
    names = [torch_name(name) for name in names]
    table: Table = {}
    for half in ("encoder", "decoder"):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        table[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        for part, name in VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{part}"] = inside(f"{half}.mid.attn_1", name)
    levels = count(names, "encoder.down_blocks")
    for level in range(levels):
        table[f"encoder.down_blocks.{level}.resnets"] = f"encoder.down.{level}.block"
        table[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        # The original counts the decoder's levels by resolution, so the last one is 0.
        table[f"decoder.up_blocks.{level}.resnets"] = f"decoder.up.{levels - 1 - level}.block"
        table[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    for name in names:
        if ".conv_shortcut." in name:
            table[name] = renamed(name, table).tensor.replace("conv_shortcut", "nin_shortcut")
    return {name: renamed(name, table) for name in names}


def openclip_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for a text encoder or a whole CLIP."""
    names = [torch_name(name) for name in names]
    table: Table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": Original("text_projection", form="transposed"),
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "visual_projection.weight": Original("visual.proj", form="transposed"),
    }
    for ours, of in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(count(names, f"{ours}.encoder.layers")):
            for part, name in OPENCLIP_LAYER.items():
                table[f"{ours}.encoder.layers.{layer}.{part}"] = inside(f"{of}.resblocks.{layer}", name)
    return {name: renamed(name, table) for name in names}


def image_reward_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for ImageReward: the image half has timm's names, the text half the current ones."""
    names = [torch_name(name) for name in names]
    image = "blip.visual_encoder"
    table: Table = {
        "vision_model.embeddings.class_embedding": f"{image}.cls_token",
        "vision_model.embeddings.position_embedding": f"{image}.pos_embed",
        "vision_model.embeddings.patch_embedding": f"{image}.patch_embed.proj",
        "vision_model.post_layernorm": f"{image}.norm",
        "text_encoder": "blip.text_encoder",
    }
    for layer in range(count(names, "vision_model.encoder.layers")):
        for part, name in BLIP_IMAGE_LAYER.items():
            table[f"vision_model.encoder.layers.{layer}.{part}"] = f"{image}.blocks.{layer}.{name}"
    return {name: renamed(name, table) for name in names}


def renamed(name: str, table: Table) -> Original:
    """Return the original of `name`: its longest prefix that is in `table` replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        beginning = ".".join(parts[:end])
        if beginning in table:
            found = inside("", table[beginning])
            return found._replace(tensor=".".join([found.tensor, *parts[end:]]))
    return Original(name)


def inside(prefix: str, entry: str | Original) -> Original:
    """Return an entry of a table as an original whose name begins with a prefix."""
    original = Original(entry) if isinstance(entry, str) else entry
    return original._replace(tensor=f"{prefix}.{original.tensor}".removeprefix("."))


def count(names: Iterable[str], of: str) -> int:
    """Return the number of items in the list of layers called `of`."""
    return len({name.removeprefix(f"{of}.").split(".")[0] for name in names if name.startswith(f"{of}.")})
