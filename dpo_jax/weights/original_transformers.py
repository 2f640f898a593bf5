"""The names of SD3's, FLUX.1's and Z-Image's transformers in files of the original layout.

They have the names of Stability's `sd3-ref`, of Black Forest Labs' `flux`, and of Z-Image's first release. All three
concatenate queries, keys and values, and the output layers of the first two give shift before scale.
"""

from collections.abc import Iterable

from dpo_jax.weights.layout import torch_name
from dpo_jax.weights.original_names import Original, Table, count, inside, renamed


def _fused(tensor: str, *layers: str) -> dict[str, Original]:
    """Return the originals of layers that are concatenated in one layer called `tensor`."""
    return {layer: Original(tensor, order) for order, layer in enumerate(layers)}


_OUTPUT: Table = {
    "proj_out": Original("final_layer.linear"),
    "norm_out.linear": Original("final_layer.adaLN_modulation.1", form="swapped"),
}
SD3_BLOCK: Table = {
    **_fused("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **_fused("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    **_fused("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FLUX_DOUBLE_BLOCK: Table = {
    **_fused("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **_fused("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE_BLOCK: Table = {
    **_fused("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}
Z_IMAGE_ATTENTION: Table = {
    **_fused("qkv", "to_q", "to_k", "to_v"),
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def sd3_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for the transformer of SD3 and SD3.5."""
    names = [torch_name(name) for name in names]
    table: Table = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        **_OUTPUT,
    }
    blocks = count(names, "transformer_blocks")
    for block in range(blocks):
        for part, original in SD3_BLOCK.items():
            table[f"transformer_blocks.{block}.{part}"] = inside(f"joint_blocks.{block}", original)
    # The last block only scales and shifts its text, as the output layer does its input.
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear"
    table[last] = Original(f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1", form="swapped")
    return {name: renamed(name, table) for name in names}


def flux_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for the transformer of FLUX.1."""
    names = [torch_name(name) for name in names]
    table: Table = {"context_embedder": "txt_in", "x_embedder": "img_in", **_OUTPUT}
    for ours, of in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        table[f"time_text_embed.{ours}_embedder.linear_1"] = f"{of}.in_layer"
        table[f"time_text_embed.{ours}_embedder.linear_2"] = f"{of}.out_layer"
    for ours, of, parts in (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE_BLOCK),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE_BLOCK),
    ):
        for block in range(count(names, ours)):
            for part, original in parts.items():
                table[f"{ours}.{block}.{part}"] = inside(f"{of}.{block}", original)
    return {name: renamed(name, table) for name in names}


def z_image_names(names: Iterable[str]) -> dict[str, Original]:
    """Like `unet_names`, for the transformer of Z-Image."""
    names = [torch_name(name) for name in names]
    # The keys are patch sizes; there is one in all published models.
    table: Table = {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"}
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for block in range(count(names, stack)):
            for part, original in Z_IMAGE_ATTENTION.items():
                table[f"{stack}.{block}.attention.{part}"] = inside(f"{stack}.{block}.attention", original)
    return {name: renamed(name, table) for name in names}
