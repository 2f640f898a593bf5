"""ImageReward (Xu et al., arXiv 2304.05977; github.com/THUDM/ImageReward): a reward of mean 0 and standard deviation 1.

Axes: N images, L tokens.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from tokenizers import BertWordPieceTokenizer

from dpo_jax.errors import UserError
from dpo_jax.files import read_lines
from dpo_jax.models.blip import ImageReward, ImageRewardConfig
from dpo_jax.models.network import network_of
from dpo_jax.rewards import Images, Reward, Settings
from dpo_jax.rewards.batches import Batches, fitted, normalised
from dpo_jax.rewards.files import find_beside, find_file
from dpo_jax.rewards.images import crop_like_torchvision
from dpo_jax.weights.io import load_params
from dpo_jax.weights.layout import Params

BERT = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
CAPTIONS_KEPT = 2**14
PUBLISHED = ImageRewardConfig()


def open_image_reward(source: str, settings: Settings, config: ImageRewardConfig = PUBLISHED) -> Reward:
    """Open the published file, converted to .safetensors, with BERT's vocab.txt from its folder or from the hub."""
    file = find_file(source)
    vocabulary = find_beside(file, ("vocab.txt",), ("vocab.txt",), BERT) / "vocab.txt"
    tokenizer = BertWordPieceTokenizer(vocab=_read_vocabulary(vocabulary, config), lowercase=True)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    batches = Batches(settings)
    network = network_of(ImageReward, config, dtype=settings.dtype)
    params = load_params(file, network.specs, dtype=settings.dtype, sharding=batches.placement)

    @functools.lru_cache(CAPTIONS_KEPT)
    def tokens(caption: str) -> tuple[list[int], int]:
        encoded = tokenizer.encode(caption)
        return encoded.ids, sum(encoded.attention_mask)

    def rate(params: Params, images_NHWC: jax.Array, token_ids_NL: jax.Array, lengths_N: jax.Array) -> jax.Array:
        return network(params, normalised(images_NHWC), token_ids_NL, lengths_N)

    compiled = batches.jit(rate, network.specs)

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        def load(some: slice) -> tuple[np.ndarray, ...]:
            ids, lengths = zip(*map(tokens, captions[some]), strict=True)
            images_NHWC = fitted(images[some], crop_like_torchvision, config.vision.image_size)
            return images_NHWC, np.asarray(ids, np.int32), np.asarray(lengths, np.int32)

        return batches(compiled, params, len(captions), load)

    return score


def _read_vocabulary(path: epath.Path, config: ImageRewardConfig) -> dict[str, int]:
    """Return the number (the line) of each token of BERT's vocab.txt; raises UserError for another vocabulary."""
    tokens = read_lines(path)
    absent = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if absent or not len(set(tokens)) == len(tokens) <= config.text.vocab_size:
        problem = f"lacks {absent[0]}" if absent else f"has {len(tokens)} tokens, {len(set(tokens))} of them distinct"
        raise UserError(
            f"{path} is not BERT's vocabulary of at most {config.text.vocab_size} tokens: it {problem}; use the "
            f"vocab.txt of {BERT}"
        )
    return {token: number for number, token in enumerate(tokens)}
