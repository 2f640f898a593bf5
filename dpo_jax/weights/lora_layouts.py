"""The names of tensors in LoRA files: in every layout, a name is a prefix, the name of a layer, and a part.

    prefix    `unet.`, `transformer.`, `diffusion_model.`, `base_model.model.`, `lora_unet_` and others, or none
    layer     diffusers' name, or that of the original checkpoint; after `lora_unet_` joined by underscores
    part      `.lora_A.weight`, `.lora_down.weight`, `.lora.down.weight`, `.lora_A.default.weight`, `.alpha`, ...

    diffusers, PEFT             unet.LAYER.lora_A.weight, base_model.model.LAYER.lora_A.default.weight
    old diffusers               unet.LAYER.lora.down.weight, unet.ATTENTION.processor.to_q_lora.down.weight
    ComfyUI, ai-toolkit         diffusion_model.ORIGINAL_LAYER.lora_A.weight
    OneTrainer                  unet.ORIGINAL_LAYER.lora_down.weight
    kohya, LyCORIS              lora_unet_LAYER_JOINED_BY_UNDERSCORES.lora_down.weight

Joining by underscores cannot be undone, so every mapping starts from dpo_jax's names.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dpo_jax.weights.layout import Specs
from dpo_jax.weights.original_slots import Slot, layer_slots

DENOISERS = ("unet", "transformer")
"""The components that denoise; a model has one of them."""
_OF_DENOISER = ("", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
DOTTED = {  # prefixes by component; files without a component's prefix are for the denoiser
    **{
        name: (*_OF_DENOISER, f"{name}.", f"{name}.base_model.model.", f"base_model.model.{name}.")
        for name in DENOISERS
    },
    "text_encoder": ("text_encoder.", "text_encoder.base_model.model.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": (
        *("text_encoder_2.", "text_encoder_2.base_model.model."),
        *("text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer."),
    ),
    "text_encoder_3": ("text_encoder_3.", "text_encoder_3.base_model.model.", "text_encoders.t5xxl.transformer."),
}
JOINED = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),  # T5 is the third in ComfyUI, also beside one CLIP
    "text_encoder_3": ("lora_te3_",),
}

# Patterns for the end of a tensor's name, by part. Adapter names (`default`) stand before the last word.
_PARTS = {
    "lora_A": r"(?:[._]lora|\.lora_linear_layer)[._](?:A|down)(?:\.\w+)?\.weight",
    "lora_B": r"(?:[._]lora|\.lora_linear_layer)[._](?:B|up)(?:\.\w+)?\.weight",
    "lora_mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",  # LyCORIS, along inputs or outputs
    "magnitude": r"\.lora_magnitude_vector(?:\.\w+)*",  # PEFT, always along outputs
    **{f"hada_{name}": rf"\.hada_{name}(?:\.\w+)?" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": rf"\.lokr_{name}(?:\.\w+)?" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "w_norm": r"\.w_norm",
    "b_norm": r"\.b_norm",
}
_NAME = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _PARTS.items()) + ")")

UNSUPPORTED = {
    r"\.lora_(A|B|up|down)(\.\w+)?\.bias$": "LoRA with biases",
    r"\.(oft|boft)_|\.oft_R": "OFT",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.lora_embedding_": "LoRA of an embedding",
}

# Patterns of tensors that are for something else than the model's denoiser, by what they are for.
FOR_OTHERS = {
    "text encoders": (
        r"lora_te\d?_|lora_prior_te|(base_model\.model\.)?text_encoders?(_\d)?\.|te\d?\.|clip_[lgh]\.|cond_stage_model\."
        r"|conditioner\."
    ),
    "embeddings": r"bundle_emb|emb_params|(clip_[lgh]|t5)(_out)?$|string_to_param|embeddings?\.",
    "the VAE": r"lora_vae_|vae\.|first_stage_model\.",
}
_FOR_DENOISERS = {
    "unet": ("a UNet", r"(.*[._])?((down|up|input|output)_blocks|mid_block|middle_block)[._]"),
    "transformer": (
        "a transformer",
        r"lora_transformer_|(base_model\.model\.)?transformer\.|.*(double|single|joint)_(transformer_)?blocks[._]",
    ),
}


class Place(NamedTuple):
    """The component and layer that a tensor of a LoRA file belongs to."""

    component: str
    layer: str
    """The layer, or one of the original layout that holds several or has its rows in another order."""


def split(key: str) -> tuple[str, str]:
    """Split a tensor's name into (stored name of the layer, part); the part is "" if it is not a part of a LoRA."""
    match = _NAME.fullmatch(key)
    if match is None:
        return key, ""
    return match["layer"], next(part for part in _PARTS if match[part] is not None)


def unsupported(key: str) -> str | None:
    """Return the unsupported method that a tensor's name shows, or None."""
    return next((method for sign, method in UNSUPPORTED.items() if re.search(sign, key)), None)


def for_others(key: str, denoiser: str) -> str | None:
    """Return what a tensor is for if its name shows that it is not for `denoiser`, or None."""
    signs = FOR_OTHERS | dict(of for name, of in _FOR_DENOISERS.items() if name != denoiser)
    return next((owner for owner, sign in signs.items() if re.match(sign, key)), None)


def stored_names(component: str, specs: Specs) -> dict[str, Place]:
    """Return every name under which a file may hold a layer, with the place that it stands for."""
    names: dict[str, Place] = {}

    def add(place: Place, *layers: str) -> None:
        names.update({prefix + name: place for prefix in DOTTED[component] for name in layers})
        names.update({prefix + joined(name): place for prefix in JOINED[component] for name in layers})

    for layer in layers_of(name for name in specs if "." in name):
        # Old diffusers attached the LoRA of an attention layer to the attention's processor.
        processor = re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1", layer)
        short = layer.removeprefix("text_model.")  # name in transformers 5
        add(Place(component, layer), layer, processor, short)
    if component in DENOISERS:
        for layer, slots in original_layers(specs).items():
            own = next(iter(slots)) if is_same(slots) else layer
            add(Place(component, own), layer)
    return names


def original_layers(specs: Specs) -> dict[str, dict[str, Slot]]:
    """Return the layers of the original layout, each with the layers that it holds, in the order of their rows."""
    found: dict[str, dict[str, Slot]] = {}
    for layer, slot in sorted(layer_slots(specs).items(), key=lambda item: item[1].rows.start):
        found.setdefault(slot.tensor, {})[layer] = slot
    return found


def is_same(slots: Mapping[str, Slot]) -> bool:
    """Return whether a layer of the original layout is one layer in the same form."""
    return not any(slot.is_fused or slot.form == "swapped" for slot in slots.values())


def joined(layer: str) -> str:
    """Return a layer's name as kohya writes it."""
    return layer.replace(".", "_")


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers that the parameters with these names belong to."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
