"""Captions to token ids, with the tokenizers of a diffusers folder."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch, at every start
from transformers import CLIPTokenizer

from dpo_jax.data.tokenizer_files import check_tokenizer, read_length
from dpo_jax.errors import UserError

CAPTIONS_KEPT = 2**16
"""Captions whose token ids stay in memory, 1.2 kB each for SDXL. Pick-a-Pic has 59,000, with some 15 pairs each."""


class Tokenizers:
    """One tokenizer per text encoder; safe to share between threads.

    Holds the compiled tokenizers with padding and truncation set once: transformers' wrapper sets them at each call,
    which fails when two threads do it together.
    """

    def __init__(self, tokenizers: Sequence[Tokenizer]):
        self._tokenizers = tuple(tokenizers)
        self._token_ids = functools.lru_cache(CAPTIONS_KEPT)(self._tokenize)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return token_ids_BL int32: for each text encoder begin, caption, end and padding, one encoder's after the
        other's; long captions are cut before the end token."""
        return np.stack([self._token_ids(caption) for caption in captions])

    def count_cut(self, captions: Iterable[str]) -> int:
        """Return how many of these captions are too long for the model, which then does not see their end."""
        return sum(any(t.encode(caption).overflowing for t in self._tokenizers) for caption in captions)

    def _tokenize(self, caption: str) -> np.ndarray:
        return np.concatenate([np.asarray(t.encode(caption).ids, np.int32) for t in self._tokenizers])


def load_tokenizers(folder: str | Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] = ()) -> Tokenizers:
    """Read `folder/name` for each name, for example `("tokenizer", "tokenizer_2")` of SDXL.

    Captions are padded to the tokenizer's `model_max_length` with its own padding token; SDXL's second pads with "!".

    Args:
        folder: folder that holds the tokenizers.
        names: their subfolders.
        sizes: (tokens, positions) for which each text encoder has embeddings; by default they are not compared.

    Raises:
        FileNotFoundError: a tokenizer is missing.
        ValueError: a tokenizer cannot be read, states no length, or has more tokens than its text encoder knows.
    """
    loaded = {name: _load(Path(folder) / name) for name in names}
    for (name, tokenizer), (tokens, positions) in zip(loaded.items(), sizes, strict=False):
        token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if largest >= tokens:
            raise UserError(
                f"the tokenizer {Path(folder) / name} has more tokens than its text encoder has embeddings: {token!r} "
                f"is number {largest}, and the encoder's vocab_size is {tokens}; take the two from one model"
            )
        if tokenizer.model_max_length > positions:
            raise UserError(
                f"the tokenizer {Path(folder) / name} makes {tokenizer.model_max_length} tokens of a caption, and its "
                f"text encoder has {positions} positions (max_position_embeddings); take the two from one model"
            )
    for tokenizer in loaded.values():
        tokenizer.backend_tokenizer.enable_truncation(tokenizer.model_max_length)
        tokenizer.backend_tokenizer.enable_padding(
            length=tokenizer.model_max_length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
        )
    return Tokenizers([tokenizer.backend_tokenizer for tokenizer in loaded.values()])


def _load(folder: Path) -> CLIPTokenizer:
    # from_pretrained would take a missing folder for a name on the hub, and missing files for an empty vocabulary.
    check_tokenizer(folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise any class of error, also plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer at {folder} cannot be read ({reason}); download it again") from error
    length = read_length(folder)
    if length is None:
        raise UserError(f"{folder}/tokenizer_config.json does not state model_max_length; download the tokenizer again")
    tokenizer.model_max_length = length
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if begin is None or end is None or padding is None or begin == end:
        raise UserError(
            f"the tokenizer at {folder} cannot mark where a caption begins and ends: bos_token is "
            f"{tokenizer.bos_token!r}, eos_token {tokenizer.eos_token!r}, pad_token {tokenizer.pad_token!r}"
        )
    return tokenizer
