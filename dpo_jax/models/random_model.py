"""Tiny random models: complete diffusers folders with each family's structure, for tests and the `:tiny` configs.

They have images of 32x32 pixels, latents of 8x8x4 (flow models: 8x8x16), captions of at most 16 tokens (T5 and Qwen3:
the length of the family), and a few hundred thousand parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.files import new_folder
from dpo_jax.models.families import FAMILIES
from dpo_jax.models.network import network_of
from dpo_jax.models.random_tokenizers import (
    END,
    MAX_TOKENS,
    START,
    WORDS,
    byte_vocabulary,
    write_clip_tokenizer,
    write_json,
    write_qwen_tokenizer,
    write_t5_tokenizer,
)
from dpo_jax.models.text_encoders import KINDS
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.weights.io import save_component
from dpo_jax.weights.layout import Specs

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [16, 32],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_SD21 = UNET | {"attention_head_dim": [1, 2], "cross_attention_dim": 48, "use_linear_projection": True}
UNET_SDXL = UNET_SD21 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 32 + 48,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
UNET_REFINER = UNET_SDXL | {
    "attention_head_dim": [1, 2, 2],
    "block_out_channels": [16, 32, 32],
    "cross_attention_dim": 48,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 40 + 5 * 8,
    "transformer_layers_per_block": 2,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_TOKENS,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 32,
}
OPEN_CLIP = CLIP_L | {"hidden_act": "gelu", "hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 40}
CLIP_BIG_G = OPEN_CLIP | {"architectures": ["CLIPTextModelWithProjection"]}

T5 = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 96,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "num_heads": 4,
    "num_layers": 2,
    "tie_word_embeddings": False,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
SD3_CLIPS = (CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 32}, CLIP_BIG_G)
VAE_FLOW = VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "dual_attention_layers": [0],
    "in_channels": 16,
    "joint_attention_dim": 96,
    "num_attention_heads": 2,
    "num_layers": 3,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 32 + 40,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
    "sample_size": 8,
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 96,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 2,
    "patch_size": 1,
    "pooled_projection_dim": 32,
}
Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [4, 6, 6],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 48,
    "dim": 32,
    "in_channels": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}

SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
DDIM = SCHEDULER | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
EULER = SCHEDULER | {"_class_name": "EulerDiscreteScheduler"}
TURBO = SCHEDULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = FLOW | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": True,
}

SD3_PIPELINE = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}
FLUX_PIPELINE = SD3_PIPELINE | {"_class_name": "FluxPipeline"}
SDXL_PIPELINE = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
REFINER_PIPELINE = {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "text_encoder": [None, None],
    "tokenizer": [None, None],
}
SD_PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}

Config = dict[str, Any]
# By family: model_index.json without its components, denoiser, text encoders, scheduler.
RANDOM_MODELS: dict[str, tuple[Config, Config, tuple[Config, ...], Config]] = {
    "sd15": (SD_PIPELINE, UNET, (CLIP_L,), DDIM),
    "sd21": (SD_PIPELINE, UNET_SD21, (OPEN_CLIP,), DDIM | {"prediction_type": "v_prediction"}),
    "sdxl": (SDXL_PIPELINE, UNET_SDXL, (CLIP_L, CLIP_BIG_G), EULER),
    "sdxl_turbo": (SDXL_PIPELINE, UNET_SDXL, (CLIP_L, CLIP_BIG_G), TURBO),
    "sdxl_refiner": (REFINER_PIPELINE, UNET_REFINER, (CLIP_BIG_G,), EULER),
    "sd3": (SD3_PIPELINE, SD3, (*SD3_CLIPS, T5), FLOW),
    "flux": (FLUX_PIPELINE, FLUX, (CLIP_L, T5), DYNAMIC),
    "flux_schnell": (FLUX_PIPELINE, FLUX | {"guidance_embeds": False}, (CLIP_L, T5), FLOW | {"shift": 1.0}),
    "z_image": ({"_class_name": "ZImagePipeline"}, Z_IMAGE, (QWEN3,), FLOW | {"shift": 6.0}),
    "z_image_turbo": ({"_class_name": "ZImagePipeline"}, Z_IMAGE, (QWEN3,), FLOW),
}


def write_random_model(family: str, folder: epath.PathLike, *, seed: int = 0, dtype: DTypeLike = "float32") -> None:
    """Write a complete diffusers folder of the named family. Raises a UserError if `folder` exists and is not empty."""
    if family not in RANDOM_MODELS:
        raise UserError(f"unknown model family {family!r}, expected one of {', '.join(RANDOM_MODELS)}")
    model_index, denoiser, text_encoders, scheduler = RANDOM_MODELS[family]
    vae = VAE if FAMILIES[family].denoiser.folder == "unet" else VAE_FLOW
    model_index = model_index | {
        FAMILIES[family].denoiser.folder: ["diffusers", denoiser["_class_name"]],
        "vae": ["diffusers", vae["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    with new_folder(folder) as target:
        vae_config = VAEConfig.from_dict(vae, "vae")
        kind = FAMILIES[family].denoiser
        config = kind.config.from_dict(denoiser, kind.folder)
        _write(target / kind.folder, denoiser, kind.module, config, seed, dtype)
        _write(target / "vae", vae, AutoencoderKL, vae_config, seed + 1, dtype)
        for number, (encoder, text) in enumerate(zip(FAMILIES[family].text_encoders, text_encoders, strict=True)):
            text = text | WRITE_TOKENIZER[encoder.kind](target / encoder.tokenizer)
            text_kind = KINDS[encoder.kind]
            text_config = text_kind.config.from_dict(text, encoder.folder)
            _write(target / encoder.folder, text, text_kind.module, text_config, seed + 2 + number, dtype)
            model_index[encoder.folder] = ["transformers", text["architectures"][0]]
            model_index[encoder.tokenizer] = ["transformers", text_kind.tokenizers[0]]
        write_json(target / "scheduler" / "scheduler_config.json", scheduler)
        write_json(target / "model_index.json", model_index)


def _write_clip_tokenizer(folder: epath.Path) -> Config:
    """Write a tokenizer, and return the fields of the text encoder's config that follow from it."""
    vocabulary, merges = byte_vocabulary(WORDS)
    # SDXL's second tokenizer pads with "!", the first token of its vocabulary.
    write_clip_tokenizer(folder, vocabulary, merges, pad_token="!" if folder.name == "tokenizer_2" else END)
    ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    return ids | {"vocab_size": len(vocabulary)}


WRITE_TOKENIZER: dict[str, Callable[[epath.Path], Config]] = {
    "clip": _write_clip_tokenizer,
    "t5": lambda folder: {"vocab_size": write_t5_tokenizer(folder), "eos_token_id": 1, "pad_token_id": 0},
    "qwen3": lambda folder: {"vocab_size": write_qwen_tokenizer(folder)},
}


def random_params(specs: Specs, seed: int) -> dict[str, np.ndarray]:
    """Return kernels with variance 1 / fan_in, and scales and biases away from 1 and 0, so that tests notice each.

    A square text_projection is the identity, as that of SD3's first text encoder, whose single files hold none.
    """
    random = np.random.default_rng(seed)
    params = {}
    for name, spec in specs.items():
        std = math.prod(spec.shape[:-1]) ** -0.5 if name.endswith(".kernel") else 0.1
        center = 1.0 if name.endswith(".scale") else 0.0
        params[name] = random.normal(center, std, spec.shape).astype(np.float32)
        if name == "text_projection.kernel" and len(set(spec.shape)) == 1:
            params[name] = np.eye(len(params[name]), dtype=np.float32)
    return params


def _write(
    folder: epath.Path, config_json: dict[str, Any], module: Any, config: Any, seed: int, dtype: DTypeLike
) -> None:
    specs = network_of(module, config, dtype="float32").specs
    save_component(folder, config_json, random_params(specs, seed), specs, dtype=dtype)
