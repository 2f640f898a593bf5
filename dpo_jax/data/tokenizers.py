"""Captions to token ids, with the tokenizers of a diffusers folder."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dpo_jax.data.tokenizer_files import TokenizerSpec, check_tokenizer, read_length, read_spiece
from dpo_jax.errors import UserError

CAPTIONS_KEPT = 2**16
"""Captions whose token ids stay in memory, 1.2 kB each for SDXL. Pick-a-Pic has 59,000, with some 15 pairs each."""
PADDING = -1
"""Token id of padding that nothing attends to (Qwen). That of CLIP and T5 is attended to and has an id of its own."""


@dataclasses.dataclass(frozen=True)
class CompiledTokenizer:
    """A tokenizer with padding and truncation set once: transformers' wrapper sets them at each call, which fails when
    two threads do it together."""

    tokenizer: Tokenizer
    to_text: Callable[[str], str] = str
    """Maps a caption to the text that is tokenized."""
    is_padding_masked: bool = False
    """True replaces the ids of padding by `PADDING`."""

    def __call__(self, caption: str) -> tuple[np.ndarray, bool]:
        """Return the ids of a caption, int32, and whether it was cut."""
        encoding = self.tokenizer.encode(self.to_text(caption))
        ids_L = np.asarray(encoding.ids, np.int32)
        if self.is_padding_masked:
            ids_L = np.where(np.asarray(encoding.attention_mask, bool), ids_L, np.int32(PADDING))
        return ids_L, bool(encoding.overflowing)

    def count(self, caption: str) -> int:
        """Return the tokens of a caption without padding, after it is cut."""
        return sum(self.tokenizer.encode(self.to_text(caption)).attention_mask)


class Tokenizers:
    """One tokenizer per text encoder, each mapping a caption to (ids, whether it was cut); safe to share between
    threads."""

    def __init__(self, tokenizers: Sequence[CompiledTokenizer]):
        self._tokenizers = tuple(tokenizers)
        self._token_ids = functools.lru_cache(CAPTIONS_KEPT)(self._tokenize)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return token_ids_BL int32: for each text encoder caption and padding, one encoder's after the other's, with
        its own tokens at begin and end.

        Long captions are cut: CLIP's and T5's before the end token, and of Qwen's chat the end.
        """
        return np.stack([self._token_ids(caption) for caption in captions])

    def count_cut(self, captions: Iterable[str]) -> int:
        """Return how many of these captions are too long for every text encoder, so that the model does not see their
        end."""
        return sum(all(tokenizer(caption)[1] for tokenizer in self._tokenizers) for caption in captions)

    def longest(self, captions: Sequence[str]) -> tuple[int, ...]:
        """Return for each text encoder the tokens of the longest caption without padding, after it is cut."""
        return tuple(max(map(tokenizer.count, captions), default=0) for tokenizer in self._tokenizers)

    def _tokenize(self, caption: str) -> np.ndarray:
        return np.concatenate([tokenizer(caption)[0] for tokenizer in self._tokenizers])


def load_tokenizers(folder: str | Path, specs: Sequence[TokenizerSpec]) -> Tokenizers:
    """Read `folder/name` for each spec, for example those of "tokenizer" and "tokenizer_2" of SDXL.

    Captions are padded with the tokenizer's own padding token; SDXL's second pads with "!".

    Raises:
        FileNotFoundError: a tokenizer is missing.
        ValueError: a tokenizer cannot be read, states no length, or has more tokens than its text encoder knows.
    """
    return Tokenizers([_load(Path(folder) / spec.name, spec) for spec in specs])


def _load(folder: Path, spec: TokenizerSpec) -> CompiledTokenizer:
    kind = KINDS[spec.kind]
    # from_pretrained would take a missing folder for a name on the hub, and missing files for an empty vocabulary.
    check_tokenizer(folder, spec.kind)
    with _reading(folder):
        wrapper = kind.read(folder)
    kind.check(wrapper, folder)
    to_text = kind.to_text(wrapper)
    with _reading(folder):
        to_text("")
    length = spec.length or read_length(folder)
    if length is None:
        raise UserError(f"{folder}/tokenizer_config.json does not state model_max_length; download the tokenizer again")
    _check_size(wrapper, folder, spec, length)
    tokenizer: Tokenizer = wrapper.backend_tokenizer
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=wrapper.pad_token_id, pad_token=wrapper.pad_token)
    return CompiledTokenizer(tokenizer, to_text, kind.is_padding_masked)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the libraries raise any class of error, also plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer at {folder} cannot be read ({reason}); download it again") from error


def _check_size(wrapper: Any, folder: Path, spec: TokenizerSpec, length: int) -> None:
    token, largest = max(wrapper.get_vocab().items(), key=lambda item: item[1])
    if spec.num_tokens is not None and largest >= spec.num_tokens:
        raise UserError(
            f"the tokenizer {folder} has more tokens than its text encoder has embeddings: {token!r} is number "
            f"{largest}, and the encoder's vocab_size is {spec.num_tokens}; take the two from one model"
        )
    if spec.num_positions is not None and length > spec.num_positions:
        raise UserError(
            f"the tokenizer {folder} makes {length} tokens of a caption, and its text encoder has "
            f"{spec.num_positions} positions (max_position_embeddings); take the two from one model"
        )


def _check_begin_and_end(wrapper: Any, folder: Path) -> None:
    begin, end, padding = wrapper.bos_token_id, wrapper.eos_token_id, wrapper.pad_token_id
    if begin is None or end is None or padding is None or begin == end:
        raise UserError(
            f"the tokenizer at {folder} cannot mark where a caption begins and ends: bos_token is "
            f"{wrapper.bos_token!r}, eos_token {wrapper.eos_token!r}, pad_token {wrapper.pad_token!r}"
        )


def _check_end(wrapper: Any, folder: Path) -> None:
    if wrapper.eos_token_id is None or wrapper.pad_token_id is None or wrapper.eos_token_id == wrapper.pad_token_id:
        raise UserError(
            f"the tokenizer at {folder} cannot mark where a caption ends: eos_token is {wrapper.eos_token!r}, "
            f"pad_token {wrapper.pad_token!r}"
        )


def _check_chat(wrapper: Any, folder: Path) -> None:
    if wrapper.pad_token_id is None or not wrapper.chat_template:
        raise UserError(
            f"the tokenizer at {folder} lacks a pad_token or a chat_template, which tokenizer_config.json or "
            "chat_template.jinja states; download the tokenizer again"
        )


def _class(name: str) -> Any:
    """Return a class of transformers, whose import takes a second and which embeddings that are stored do not need."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    import transformers

    return getattr(transformers, name)


def _from_pretrained(name: str, folder: Path) -> Any:
    return _class(name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_t5(folder: Path) -> Any:
    """Read tokenizer.json or, without the package sentencepiece, which transformers asks for, spiece.model."""
    if (folder / "tokenizer.json").exists():
        return _from_pretrained("T5Tokenizer", folder)
    pieces, normalization = read_spiece(folder / "spiece.model")
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    return _class("T5Tokenizer")([*pieces, *extra], _spm_precompiled_charsmap=normalization)


def _chat(wrapper: Any) -> Callable[[str], str]:
    """Return a function that makes a caption the message of a user to which an answer begins, as Z-Image takes it."""

    def to_text(caption: str) -> str:
        message = [{"role": "user", "content": caption}]
        text = wrapper.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return str(text)

    return to_text


class Kind(NamedTuple):
    """One kind of tokenizers; `wrapper` is an object of transformers."""

    read: Callable[[Path], Any]
    """Return the wrapper of a folder."""
    check: Callable[[Any, Path], None]
    """Raise a UserError unless the wrapper, read from the folder, has the special tokens that are needed."""
    to_text: Callable[[Any], Callable[[str], str]] = lambda wrapper: str
    """Return the wrapper's `CompiledTokenizer.to_text`."""
    is_padding_masked: bool = False


KINDS = {
    "clip": Kind(functools.partial(_from_pretrained, "CLIPTokenizer"), _check_begin_and_end),
    "t5": Kind(_read_t5, _check_end),
    "qwen": Kind(functools.partial(_from_pretrained, "Qwen2Tokenizer"), _check_chat, _chat, is_padding_masked=True),
}
