"""Makes `legacy_flax/`: checkpoints written by the last libraries that had Flax models, and what they computed.

    python -m venv old && old/bin/pip install diffusers==0.39.0 transformers==4.57.6 huggingface_hub==0.36.2 \
        flax==0.12.8 jax==0.10.2 torch==2.13.0
    old/bin/python tests/weights/make_legacy_flax.py tests/weights/legacy_flax

Each folder holds what save_pretrained wrote, the msgpack compressed; `twin.json` the shape and a hash of every tensor
of the PyTorch model that the libraries' own converters made of it (float32, little endian); `outputs.npz` inputs, and
the outputs of the Flax model and of its PyTorch twin, which agree to 3e-5 (tanh GELU in Flax, exact in PyTorch).
Flax fixed 32 groups, and a group of one channel would hide the time embedding: so the UNets are 32 and 64 wide.
4 distinct values a tensor, in bfloat16, make the files compress well.
"""

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from diffusers.models.modeling_pytorch_flax_utils import load_flax_checkpoint_in_pytorch_model as diffusers_twin
from transformers.modeling_flax_pytorch_utils import load_flax_checkpoint_in_pytorch_model as transformers_twin
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModelWithProjection

UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
UNET_SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "sample_size": 16,
}
CLIP = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 24,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 63,
}

random = np.random.default_rng(0)


def few_values(path: tuple, array: jax.Array) -> jax.Array:
    center = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(center + random.integers(-2, 2, array.shape) / 16, jnp.bfloat16)


def save(folder: Path, flax_model: object, params: dict, torch_class: type) -> tuple[dict, torch.nn.Module]:
    params = jax.tree_util.tree_map_with_path(few_values, jax.tree.map(jnp.asarray, dict(params)))
    flax_model.save_pretrained(folder, params=params)
    (path,) = folder.glob("*.msgpack")
    # from_pretrained(from_flax=True) is broken in both of these last versions, the converters it called are not.
    if issubclass(torch_class, transformers.PreTrainedModel):
        twin = transformers_twin(torch_class(torch_class.config_class.from_pretrained(folder)), path)
    else:
        twin = diffusers_twin(torch_class.from_config(torch_class.load_config(folder)), path)
        for linear, layer in left_random(twin, params):
            linear.weight.data = torch.tensor(np.asarray(layer["kernel"], np.float32).T)
            linear.bias.data = torch.tensor(np.asarray(layer["bias"], np.float32))
    twin = twin.float().eval()
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    path.unlink()
    return jax.tree.map(lambda x: x.astype(jnp.float32), params), twin


def left_random(twin: torch.nn.Module, params: dict) -> Iterator[tuple[torch.nn.Linear, dict]]:
    """The layers that diffusers' converter does not find; that the outputs agree shows that these pairs are right."""
    if "add_embedding" in params:
        for name, layer in params["add_embedding"].items():
            yield getattr(twin.add_embedding, name), layer
    for half in {"encoder", "decoder"} & params.keys():
        attention, layers = getattr(twin, half).mid_block.attentions[0], params[half]["mid_block"]["attentions_0"]
        for linear, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            yield attention.get_submodule(linear), layers[name]


def digests(twin: torch.nn.Module) -> dict:
    return {
        name: [list(tensor.shape), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]]
        for name, tensor in twin.state_dict().items()
        if not name.endswith("position_ids")
    }


@torch.no_grad()
def main(output: Path) -> None:
    twins, arrays = {}, {}
    x_NCHW = random.standard_normal((1, 4, 8, 8), np.float32)
    context_NLD = random.standard_normal((1, 5, 32), np.float32)
    pooled_NP = random.standard_normal((1, 24), np.float32)
    time_ids_NT = np.array([[64, 64, 0, 0, 32, 32]], np.float32)
    arrays |= {"x_NCHW": x_NCHW, "context_NLD": context_NLD, "pooled_NP": pooled_NP, "time_ids_NT": time_ids_NT}
    for name, config in (("unet", UNET), ("unet_sdxl", UNET_SDXL)):
        model = diffusers.FlaxUNet2DConditionModel(**config)
        params, twin = save(output / name, model, model.init_weights(jax.random.key(0)), diffusers.UNet2DConditionModel)
        added = {"text_embeds": pooled_NP, "time_ids": time_ids_NT} if "addition_embed_type" in config else None
        added_torch = {key: torch.tensor(value) for key, value in added.items()} if added else None
        t_N = np.array([500])
        arrays[f"{name}_flax"] = model.apply({"params": params}, x_NCHW, jnp.asarray(t_N), context_NLD, added).sample
        arrays[f"{name}_torch"] = twin(
            torch.tensor(x_NCHW), torch.tensor(t_N), torch.tensor(context_NLD), added_cond_kwargs=added_torch
        ).sample
        twins[name] = digests(twin)

    model = diffusers.FlaxAutoencoderKL(**VAE)
    params, twin = save(output / "vae", model, model.init_weights(jax.random.key(0)), diffusers.AutoencoderKL)
    images_NCHW = random.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    arrays["images_NCHW"] = images_NCHW
    arrays["vae_flax"] = model.apply({"params": params}, x_NCHW, method=model.decode).sample
    arrays["vae_torch"] = twin.decode(torch.tensor(x_NCHW)).sample
    arrays["vae_mean_torch"] = twin.encode(torch.tensor(images_NCHW)).latent_dist.mean
    twins["vae"] = digests(twin)

    ids_NL = np.array([[62, 5, 17, 33, 8, 63, 63, 63]])
    arrays["ids_NL"] = ids_NL
    for name, flax_class, torch_class, act in (
        ("text_encoder", transformers.FlaxCLIPTextModel, transformers.CLIPTextModel, "quick_gelu"),
        ("text_encoder_2", FlaxCLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection, "gelu"),
    ):
        model = flax_class(transformers.CLIPTextConfig(**CLIP, hidden_act=act), input_shape=(1, 8))
        params, twin = save(output / name, model, model.params, torch_class)
        flax_output = model(ids_NL, params=params)
        torch_output = twin(torch.tensor(ids_NL))
        pooled = "text_embeds" if name == "text_encoder_2" else "pooler_output"
        for library, result in (("flax", flax_output), ("torch", torch_output)):
            arrays[f"{name}_{library}"] = result.last_hidden_state
            arrays[f"{name}_pooled_{library}"] = result[pooled]
        twins[name] = digests(twin)

    (output / "twin.json").write_text(json.dumps(twins, indent=0) + "\n")
    np.savez_compressed(output / "outputs.npz", **{name: np.asarray(array) for name, array in arrays.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
