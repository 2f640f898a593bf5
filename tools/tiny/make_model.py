"""Make the tiny SDXL-shaped model with an untrained UNet, a diffusers folder; training it gives the shipped model.

    python -m tools.tiny.make_model --vae=runs/tiny/vae --output=runs/tiny/untrained

The text encoders stay random and frozen, as DPO freezes those of real models. Large token embeddings keep words apart,
which is all that the UNet's cross-attention needs to learn what each word means.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from dpo_jax import cli
from dpo_jax.errors import MissingFileError
from dpo_jax.files import new_folder, write_whole
from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.network import Network, init_params
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.tiny import world
from dpo_jax.weights.io import save_component
from dpo_jax.weights.layout import Params
from tools.tiny import tokenizer

VAE = flags.DEFINE_string("vae", None, "The trained VAE's folder, made by tools.tiny.train_vae.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write the model to.", required=True)

TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": tokenizer.NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": tokenizer.MAX_LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": tokenizer.NUM_TOKENS - 2,
    "eos_token_id": tokenizer.NUM_TOKENS - 1,
    "pad_token_id": tokenizer.NUM_TOKENS - 1,
}
TEXT_ENCODER_2: dict[str, Any] = {
    **TEXT_ENCODER,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
TIME_ID_FEATURES = 8
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": world.SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_ENCODER["hidden_size"] + TEXT_ENCODER_2["hidden_size"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_FEATURES,
    "projection_class_embeddings_input_dim": TEXT_ENCODER_2["projection_dim"] + 6 * TIME_ID_FEATURES,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    # The unconditional prediction is that of the empty caption, which training sees when it drops the caption.
    "force_zeros_for_empty_prompt": False,
    "add_watermarker": None,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def main() -> None:
    """Write all components, or nothing."""
    vae = epath.Path(VAE.value)
    if not (vae / "config.json").exists():
        raise MissingFileError(f"there is no VAE in {vae}; make one with python -m tools.tiny.train_vae --output={vae}")
    with new_folder(OUTPUT.value) as folder:
        (folder / "vae").mkdir()
        for file in vae.iterdir():
            file.copy(folder / "vae" / file.name)
        unet = UNetConfig.from_dict(UNET, "the tiny UNet")
        _save(folder / "unet", UNET, unet, lambda rngs: UNet2DConditionModel(unet, dtype=jnp.float32, rngs=rngs), 0)
        text_encoders = {"text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2}
        for seed, (name, fields) in enumerate(text_encoders.items()):
            text = CLIPTextConfig.from_dict(fields, f"the tiny {name}")

            def make(rngs, text=text):
                return CLIPTextModel(text, dtype=jnp.float32, rngs=rngs)

            _save(folder / name, fields, text, make, seed, spread_words)
        tokenizer.save(folder / "tokenizer")
        tokenizer.save(folder / "tokenizer_2", pad_token="!")
        _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        _write_json(folder / "model_index.json", MODEL_INDEX)
    print(f"wrote {OUTPUT.value}")


def spread_words(params: Params) -> Params:
    """Return random text weights that keep words apart: token embeddings of unit variance, small position embeddings.

    Linear layers keep the variance of their input, so that the end-of-text token depends on the words before it.
    """
    scale_of = {"token_embedding.embedding": 50.0, "position_embedding.embedding": 5.0, "kernel": 3**0.5}
    return {
        name: param * next((scale for end, scale in scale_of.items() if name.endswith(end)), 1.0)
        for name, param in params.items()
    }


def _save(
    folder: epath.Path,
    config: Mapping[str, Any],
    parsed: Any,
    make: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    change: Callable[[Params], Params] = lambda params: params,
) -> None:
    network = Network.build(make, parsed)
    params = change(init_params(make, seed))
    print(f"{folder.name}: {sum(np.prod(spec.shape) for spec in network.specs.values()):,} parameters")
    save_component(folder, config, params, network.specs, dtype=jnp.float16)


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
