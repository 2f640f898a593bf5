"""Tiny random models: complete diffusers folders with each family's structure, for tests and the `:tiny` configs.

They have images of 32x32 pixels, latents of 8x8x4, captions of at most 16 tokens, and a few hundred thousand
parameters.
"""

import math
from typing import Any

import numpy as np
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.files import new_folder
from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
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
)
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

# By family: model_index.json without its components, denoiser, text encoders, scheduler.
RANDOM_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "sd15": (SD_PIPELINE, UNET, (CLIP_L,), DDIM),
    "sd21": (SD_PIPELINE, UNET_SD21, (OPEN_CLIP,), DDIM | {"prediction_type": "v_prediction"}),
    "sdxl": (SDXL_PIPELINE, UNET_SDXL, (CLIP_L, CLIP_BIG_G), EULER),
    "sdxl_turbo": (SDXL_PIPELINE, UNET_SDXL, (CLIP_L, CLIP_BIG_G), TURBO),
    "sdxl_refiner": (REFINER_PIPELINE, UNET_REFINER, (CLIP_BIG_G,), EULER),
}


def write_random_model(family: str, folder: epath.PathLike, *, seed: int = 0, dtype: DTypeLike = "float32") -> None:
    """Write a complete diffusers folder of the named family. Raises a UserError if `folder` exists and is not empty."""
    if family not in RANDOM_MODELS:
        raise UserError(f"unknown model family {family!r}, expected one of {', '.join(RANDOM_MODELS)}")
    model_index, denoiser, text_encoders, scheduler = RANDOM_MODELS[family]
    vocabulary, merges = byte_vocabulary(WORDS)
    model_index = model_index | {
        FAMILIES[family].denoiser.folder: ["diffusers", denoiser["_class_name"]],
        "vae": ["diffusers", VAE["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    with new_folder(folder) as target:
        vae_config = VAEConfig.from_dict(VAE, "vae")
        kind = FAMILIES[family].denoiser
        config = kind.config.from_dict(denoiser, kind.folder)
        _write(target / kind.folder, denoiser, kind.module, config, seed, dtype)
        _write(target / "vae", VAE, AutoencoderKL, vae_config, seed + 1, dtype)
        for number, (encoder, clip) in enumerate(zip(FAMILIES[family].text_encoders, text_encoders, strict=True)):
            ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
            clip = clip | ids | {"vocab_size": len(vocabulary)}
            clip_config = CLIPTextConfig.from_dict(clip, encoder.folder)
            _write(target / encoder.folder, clip, CLIPTextModel, clip_config, seed + 2 + number, dtype)
            # SDXL's second tokenizer pads with "!", the first token of its vocabulary.
            pad_token = "!" if encoder.tokenizer == "tokenizer_2" else END
            write_clip_tokenizer(target / encoder.tokenizer, vocabulary, merges, pad_token=pad_token)
            model_index[encoder.folder] = ["transformers", clip["architectures"][0]]
            model_index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
        write_json(target / "scheduler" / "scheduler_config.json", scheduler)
        write_json(target / "model_index.json", model_index)


def random_params(specs: Specs, seed: int) -> dict[str, np.ndarray]:
    """Return kernels with variance 1 / fan_in, and scales and biases away from 1 and 0, so that tests notice each."""
    random = np.random.default_rng(seed)
    params = {}
    for name, spec in specs.items():
        std = math.prod(spec.shape[:-1]) ** -0.5 if name.endswith(".kernel") else 0.1
        center = 1.0 if name.endswith(".scale") else 0.0
        params[name] = random.normal(center, std, spec.shape).astype(np.float32)
    return params


def _write(
    folder: epath.Path, config_json: dict[str, Any], module: Any, config: Any, seed: int, dtype: DTypeLike
) -> None:
    specs = network_of(module, config, dtype="float32").specs
    save_component(folder, config_json, random_params(specs, seed), specs, dtype=dtype)
