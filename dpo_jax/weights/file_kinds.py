"""Tells from the names of tensors what a file of weights holds, so that errors can say it."""

import re
from collections.abc import Collection, Iterable

_KINDS = {  # the first match counts
    r"^lora_|^lycoris_|\blora_(A|B|up|down)\b|\.lora\.": "a LoRA, which is trained on top of a model",
    r"^control_model\.|controlnet|^control_(layers|all_x_embedder)": "a ControlNet",
    r"single_stream_modulation\.": "the transformer of FLUX.2",
    r"distilled_guidance_layer\.": "the transformer of Chroma",
    r"txt_norm\.|txt_in\.text_norm\.": "the transformer of Qwen-Image",
    r"double_blocks\.|single_transformer_blocks\.": "the transformer of FLUX.1",
    r"joint_blocks\.|transformer_blocks\.0\.norm1_context": "the transformer of SD3",
    r"noise_refiner\.": "the transformer of Z-Image",
    r"input_blocks\.|^down_blocks\.": "a UNet",
    r"^(first_stage_model\.|vae\.)?decoder\.": "a VAE",
    r"\bencoder\.block\.\d+\.layer\.": "a T5 text encoder",
    r"layers\.\d+\.mlp\.gate_proj\.": "a language model such as Qwen3",
    r"text_model\.|resblocks\.": "a CLIP text encoder",
}

# Patterns of layers of LoRAs that only the transformers of one family have.
_FAMILIES = {
    "FLUX.1": r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]",
    "SD3": r"(^|[._])(joint_blocks[._]|transformer_blocks[._]\d+[._]attn2[._])",
    "Z-Image": r"(^|[._])(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN)",
}


def kind_of(names: Collection[str]) -> str | None:
    """Return what a file with tensors of these names holds, or None if it is not known."""
    return next((kind for sign, kind in _KINDS.items() if any(re.search(sign, name) for name in names)), None)


def family_of_lora(keys: Iterable[str]) -> str | None:
    """Return the family whose transformer alone has the layers of a LoRA, or None."""
    keys = list(keys)
    return next((family for family, sign in _FAMILIES.items() if any(re.search(sign, key) for key in keys)), None)
