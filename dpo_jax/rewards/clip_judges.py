"""The judges that use a CLIP: CLIPScore, PickScore, HPSv2, and LAION's aesthetic predictor on CLIP's image features.

Axes: N images or captions, P projected width, L tokens.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.errors import UserError
from dpo_jax.files import read_json
from dpo_jax.models.clip_vision import CLIPConfig, CLIPModel, CLIPVisionTransformer
from dpo_jax.models.config_json import MAX_BYTES
from dpo_jax.models.layers import Linear
from dpo_jax.models.network import Network, network_of
from dpo_jax.models.score_head import ScoreMLP
from dpo_jax.rewards import Images, Reward, Settings
from dpo_jax.rewards.batches import Batches, fitted, normalised
from dpo_jax.rewards.files import CLIP_TOKENIZER, find_beside, find_file, find_weights
from dpo_jax.rewards.images import Fit, crop_like_transformers, letterbox
from dpo_jax.weights.io import load_params, read_params
from dpo_jax.weights.layout import Params

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
LARGEST_LOG_SCALE = 80.0
"""Scores that are multiplied by e to this power can still be added up in float32."""
CAPTIONS_KEPT = 2**14
"""Captions whose features stay in memory (4 kB each), because several images have the same caption."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a judge differs from others that use a CLIP."""

    rate: Callable[[jax.Array, float], jax.Array]
    """(cosines of the features of image and caption, CLIP's learned scale) -> scores."""
    processor: str
    """The hub id of config and tokenizer, for weights that have none beside them."""
    fit: Fit = crop_like_transformers
    clean: Callable[[str], str] = str
    """Cleans a caption before it is tokenized."""


def clean_like_open_clip(caption: str) -> str:
    """Return the caption as OpenCLIP's tokenizer cleans it: ftfy, HTML entities resolved, single spaces, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


CLIPSCORE = Kind(lambda cosine_N, scale: 100 * jnp.maximum(cosine_N, 0), CLIP_L)
PICKSCORE = Kind(lambda cosine_N, scale: scale * cosine_N, CLIP_H)
HPS = Kind(lambda cosine_N, scale: cosine_N, CLIP_H, letterbox, clean_like_open_clip)


def open_clipscore(source: str, settings: Settings) -> Reward:
    """Open CLIPScore as torchmetrics defines it: max(100 cos, 0), with the caption as it is.

    Hessel et al. (arXiv 2104.08718) use 2.5 instead of 100, ViT-B/32, and put "A photo depicts" before the caption.
    """
    return CLIPJudge(source, settings, CLIPSCORE)


def open_pickscore(source: str, settings: Settings) -> Reward:
    """Open PickScore (Kirstain et al., arXiv 2305.01569): the cosine times the learned scale, about 15 to 25."""
    return CLIPJudge(source, settings, PICKSCORE)


def open_hps(source: str, settings: Settings) -> Reward:
    """Open HPSv2 (Wu et al., arXiv 2306.09341) or HPSv2.1, which differ only in their weights.

    The score is the cosine, as github.com/tgxs002/HPSv2 reports it, about 0.2 to 0.35. Scores of the two versions are
    not comparable.
    """
    return CLIPJudge(source, settings, HPS)


class CLIPJudge:
    """The cosine of CLIP's features of image and caption, as a reward. Each caption is encoded once."""

    def __init__(self, source: str, settings: Settings, kind: Kind):
        weights = find_weights(source)
        config = _read_config(find_beside(weights, ("config.json",), ("config.json",), kind.processor))
        tokenizer = find_beside(weights, CLIP_TOKENIZER, ("tokenizer.json", "vocab.json"), kind.processor)
        num_tokens, num_positions = config.text.vocab_size, config.text.max_position_embeddings
        spec = TokenizerSpec(".", num_tokens=num_tokens, num_positions=num_positions)
        self._tokenizer = load_tokenizers(str(tokenizer), [spec])
        self._batches = Batches(settings)
        network, self._params, scale = _load_clip(weights, config, settings, self._batches)
        self._kind, self._size = kind, config.vision.image_size
        self._text_features: dict[str, np.ndarray] = {}

        def encode_text(params: Params, token_ids_NL: jax.Array) -> jax.Array:
            return unit_length(network(params, token_ids_NL, method="text_features"))

        def rate(params: Params, images_NHWC: jax.Array, text_NP: jax.Array) -> jax.Array:
            image_NP = unit_length(network(params, normalised(images_NHWC), method="image_features"))
            return kind.rate((image_NP * text_NP).sum(-1), scale)

        self._encode_text = self._batches.jit(encode_text, network.specs)
        self._rate = self._batches.jit(rate, network.specs)

    def __call__(self, images: Images, captions: Sequence[str]) -> np.ndarray:
        features = self._features_of(captions)

        def load(some: slice) -> tuple[np.ndarray, np.ndarray]:
            texts_NP = np.stack([features[caption] for caption in captions[some]])
            return fitted(images[some], self._kind.fit, self._size), texts_NP

        return self._batches(self._rate, self._params, len(captions), load)

    def _features_of(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the features of each caption."""
        known = self._text_features
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]

        def load(some: slice) -> tuple[np.ndarray]:
            return (self._tokenizer([self._kind.clean(caption) for caption in new[some]]),)

        if new:
            features_NP = self._batches(self._encode_text, self._params, len(new), load)
            known = known | dict(zip(new, features_NP, strict=True))
            self._text_features = dict(list(known.items())[-CAPTIONS_KEPT:])
        return known


def open_aesthetic(source: str, settings: Settings) -> Reward:
    """Open LAION's aesthetic predictor v2 (github.com/christophschuhmann/improved-aesthetic-predictor).

    It is an MLP on the normalised image features of CLIP ViT-L/14. Images are preprocessed as transformers does it, as
    in DDPO and D3PO.
    """
    head = find_file(source)
    clip = find_beside(head, ("config.json", "model.safetensors"), ("config.json",), CLIP_L)
    batches = Batches(settings)
    config = _read_config(clip)
    _, clip_params, _ = _load_clip(clip, config, settings, batches)
    network = network_of(AestheticPredictor, config, dtype=settings.dtype)
    head_specs = {name.removeprefix("mlp."): spec for name, spec in network.specs.items() if name.startswith("mlp.")}
    head_params = load_params(head, head_specs, dtype="float32", sharding=batches.placement)
    params = {f"mlp.{name}": x for name, x in head_params.items()}
    params |= {name: clip_params[name] for name in network.specs if name in clip_params}
    rate = batches.jit(lambda params, images_NHWC: network(params, normalised(images_NHWC)), network.specs)

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        def load(some: slice) -> tuple[np.ndarray]:
            return (fitted(images[some], crop_like_transformers, config.vision.image_size),)

        return batches(rate, params, len(images), load)

    return score


def open_image_features(source: str, settings: Settings) -> Callable[[Images], np.ndarray]:
    """Return a function from images to CLIP's features_NP, of length 1, for distances between images."""
    weights = find_weights(source or CLIP_L)
    config = _read_config(find_beside(weights, ("config.json",), ("config.json",), CLIP_L))
    batches = Batches(settings)
    network, params, _ = _load_clip(weights, config, settings, batches)

    def encode(params: Params, images_NHWC: jax.Array) -> jax.Array:
        return unit_length(network(params, normalised(images_NHWC), method="image_features"))

    jitted = batches.jit(encode, network.specs)

    def features(images: Images) -> np.ndarray:
        def load(some: slice) -> tuple[np.ndarray]:
            return (fitted(images[some], crop_like_transformers, config.vision.image_size),)

        return batches(jitted, params, len(images), load)

    return features


class AestheticPredictor(nnx.Module):
    """The vision half of a CLIP, followed by an MLP."""

    def __init__(self, config: CLIPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, width = config.vision, config.projection_dim
        self.vision_model = CLIPVisionTransformer(vision, dtype=dtype, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp = ScoreMLP(width, dtype="float32", rngs=rngs)

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        return self.mlp(unit_length(self.visual_projection(self.vision_model(pixels_NHWC))))


def unit_length(features_NP: jax.Array) -> jax.Array:
    """Return the features scaled to length 1, in float32."""
    features_NP = features_NP.astype(jnp.float32)
    return features_NP / jnp.linalg.norm(features_NP, axis=-1, keepdims=True)


def _read_config(folder: epath.Path) -> CLIPConfig:
    file = folder / "config.json"
    return CLIPConfig.from_dict(read_json(file, dict[str, Any], MAX_BYTES), str(file))


def _load_clip(
    weights: epath.Path, config: CLIPConfig, settings: Settings, batches: Batches
) -> tuple[Network, Params, float]:
    """Return a CLIP, its parameters, and its scale, which bfloat16 would round by up to 1%."""
    network = network_of(CLIPModel, config, dtype=settings.dtype)
    params = load_params(weights, network.specs, dtype=settings.dtype, sharding=batches.placement)
    log_scale = float(read_params(weights, network.specs)["logit_scale"])
    if log_scale > LARGEST_LOG_SCALE:
        raise UserError(
            f"{weights} is damaged: logit_scale = {log_scale:g}, and CLIPs have about 4.6; download it again"
        )
    return network, params, math.exp(log_scale)
