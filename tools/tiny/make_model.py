"""Make a tiny model with an untrained denoiser, a diffusers folder; training it gives a shipped model.

    python -m tools.tiny.make_model --vae=runs/tiny/vae --output=runs/tiny/untrained

The model has the structure of SDXL, or with --flow that of Stable Diffusion 3, which takes the same VAE. The text
encoders stay random and frozen, as DPO freezes those of real models. Large token embeddings keep words apart, which is
all that the denoiser's attention needs to learn what each word means.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from dpo_jax import cli
from dpo_jax.errors import MissingFileError
from dpo_jax.files import new_folder, read_json
from dpo_jax.models.families import FAMILIES
from dpo_jax.models.network import Network, init_params
from dpo_jax.models.random_tokenizers import write_json
from dpo_jax.models.text_encoders import KINDS
from dpo_jax.tiny import world
from dpo_jax.weights.io import save_component
from dpo_jax.weights.layout import Params
from tools.tiny import tokenizer

VAE = flags.DEFINE_string("vae", None, "The trained VAE's folder, made by tools.tiny.train_vae.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write the model to.", required=True)
FLOW = flags.DEFINE_bool("flow", False, "Make a flow model of the family of Stable Diffusion 3.")

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
SDXL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    # The unconditional prediction is that of the empty caption, which training sees when it drops the caption.
    "force_zeros_for_empty_prompt": False,
    "add_watermarker": None,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}
PROJECTED: dict[str, Any] = {**TEXT_ENCODER, "architectures": ["CLIPTextModelWithProjection"]}
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": TEXT_ENCODER["hidden_size"] + TEXT_ENCODER_2["hidden_size"],
    "d_ff": 96,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": world.SIZE // 4,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "joint_attention_dim": T5["d_model"],
    "caption_projection_dim": 80,
    "pooled_projection_dim": PROJECTED["projection_dim"] + TEXT_ENCODER_2["projection_dim"],
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
FLOW_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}
TOKENIZERS: dict[str, Callable[[epath.Path], int]] = {
    "tokenizer": tokenizer.save,
    "tokenizer_2": lambda folder: tokenizer.save(folder, pad_token="!"),
    "tokenizer_3": tokenizer.save_t5,
}
LATENT_MEAN = 0.29
"""Mean of the VAE's latents, which the denoisers of flow models see without it."""


class Parts(NamedTuple):
    """The configs of a model."""

    family: str
    index: dict[str, Any]
    """model_index.json without the components."""
    denoiser: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any]
    vae: dict[str, Any]
    """What differs from the config of the VAE that is given."""


SDXL = Parts("sdxl", SDXL_INDEX, UNET, (TEXT_ENCODER, TEXT_ENCODER_2), SCHEDULER, {})
SD3 = Parts(
    "sd3", FLOW_INDEX, TRANSFORMER, (PROJECTED, TEXT_ENCODER_2, T5), FLOW_SCHEDULER, {"shift_factor": LATENT_MEAN}
)


def main() -> None:
    """Write all components, or nothing."""
    parts, vae = SD3 if FLOW.value else SDXL, epath.Path(VAE.value)
    if not (vae / "config.json").exists():
        raise MissingFileError(f"there is no VAE in {vae}; make one with python -m tools.tiny.train_vae --output={vae}")
    family = FAMILIES[parts.family]
    kind = family.denoiser
    index = parts.index | {
        kind.folder: ["diffusers", parts.denoiser["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", parts.scheduler["_class_name"]],
    }
    with new_folder(OUTPUT.value) as folder:
        (folder / "vae").mkdir()
        for file in vae.iterdir():
            file.copy(folder / "vae" / file.name)
        if parts.vae:
            config = read_json(folder / "vae" / "config.json", dict[str, Any])
            (folder / "vae" / "config.json").unlink()
            write_json(folder / "vae" / "config.json", config | parts.vae)
        _save(folder / kind.folder, parts.denoiser, kind.config, kind.module, 0, begin_as_identity)
        for seed, (encoder, fields) in enumerate(zip(family.text_encoders, parts.text_encoders, strict=True)):
            text = KINDS[encoder.kind]
            fields = fields | {"vocab_size": TOKENIZERS[encoder.tokenizer](folder / encoder.tokenizer)}
            _save(folder / encoder.folder, fields, text.config, text.module, seed, spread_words)
            index[encoder.folder] = ["transformers", fields["architectures"][0]]
            index[encoder.tokenizer] = ["transformers", text.tokenizers[0]]
        write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
        write_json(folder / "model_index.json", index)
    print(f"wrote {OUTPUT.value}")


def spread_words(params: Params) -> Params:
    """Return random text weights that keep words apart: token embeddings of unit variance, small position embeddings.

    Linear layers keep the variance of their input, so that the end-of-text token depends on the words before it.
    """
    scale_of = {
        "token_embedding.embedding": 50.0,
        "shared.embedding": 50.0,
        "position_embedding.embedding": 5.0,
        "kernel": 3**0.5,
    }
    return {
        name: param * next((scale for end, scale in scale_of.items() if name.endswith(end)), 1.0)
        for name, param in params.items()
    }


def begin_as_identity(params: Params) -> Params:
    """Return weights of a transformer whose blocks begin as identities, which it then learns from faster.

    All modulations, and so all gates, begin at 0, and so does the prediction (arXiv 2212.09748). A UNet stays as it is.
    """
    zeros = re.compile(r"\b(norm1|norm1_context|norm_out)\.linear\.|^proj_out\.")
    return {name: param * 0 if zeros.search(name) else param for name, param in params.items()}


def _save(
    folder: epath.Path,
    fields: Mapping[str, Any],
    config: Any,
    module: Callable[..., nnx.Module],
    seed: int,
    change: Callable[[Params], Params],
) -> None:
    parsed = config.from_dict(fields, f"the tiny {folder.name}")

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return module(parsed, dtype=jnp.float32, rngs=rngs)

    network = Network.build(make, parsed)
    params = change(init_params(make, seed))
    print(f"{folder.name}: {sum(np.prod(spec.shape) for spec in network.specs.values()):,} parameters")
    save_component(folder, fields, params, network.specs, dtype=jnp.float16)


if __name__ == "__main__":
    cli.run(main)
