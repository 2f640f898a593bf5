"""Tokenizers of tiny random models: a few hundred tokens, the same at each call, in the files of published ones."""

import json
from collections.abc import Iterable
from typing import Any

from etils import epath
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dpo_jax.files import write_whole

MAX_TOKENS = 16
WORDS = ("a", "red", "green", "blue", "circle", "square", "photo", "of", "the")
START, END = "<|startoftext|>", "<|endoftext|>"
SPACE = "▁"
"""T5's mark of the beginning of a word."""
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's template does with messages of a user."""
# GPT-2 maps the 68 bytes that are blanks or control characters to the characters from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = [chr(byte) for byte in PRINTABLE] + [chr(256 + number) for number in range(256 - len(PRINTABLE))]
"""GPT-2's characters for all bytes."""


def byte_vocabulary(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a CLIP tokenizer that knows every byte and `words`, merged from left to
    right.

    The order is that of CLIP: the byte characters, the same at the end of a word, the merges, the two special tokens.
    """
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    tokens = [*BYTES, *(character + "</w>" for character in BYTES), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_clip_tokenizer(
    folder: epath.Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    pad_token: str = END,
    max_tokens: int = MAX_TOKENS,
) -> None:
    """Write the files that transformers' CLIPTokenizer reads."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": max_tokens, **special}
    _write_byte_pairs(folder, vocabulary, merges)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)


def write_t5_tokenizer(folder: epath.Path, words: Iterable[str] = WORDS, *, max_tokens: int = 512) -> int:
    """Write the files that transformers' T5Tokenizer reads, and return the number of tokens.

    It knows the letters of Latin-1 and `words`; other letters are unknown tokens, as they are for T5.
    """
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [(token, 0.0) for token in special.values()]
    pieces += [(SPACE + word, -2.0) for word in words] + [(SPACE, -4.0)] + [(chr(byte), -6.0) for byte in PRINTABLE]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([*special.values()])
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": max_tokens, **special}
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)
    return len(pieces)


def write_qwen_tokenizer(folder: epath.Path) -> int:
    """Write the files that transformers' Qwen2Tokenizer reads, with a chat template, and return the number of tokens.

    It knows every byte and `WORDS`. The template adds 8 tokens to those of a caption.
    """
    space = BYTES[len(PRINTABLE) + ord(" ")]
    merges = _merges([[*"user"], [*"assistant"], *([space, *word] for word in WORDS), *map(list, WORDS)])
    tokens = list(dict.fromkeys([*BYTES, *map("".join, merges)]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    added = {len(tokens) + i: token for i, token in enumerate((END, "<|im_start|>", "<|im_end|>"))}
    config = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in added.items()},
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": END,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_byte_pairs(folder, vocabulary, merges)
    write_json(folder / "tokenizer_config.json", config)
    return len(tokens) + len(added)


def write_json(path: epath.Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Return the merges that make each word of its letters, from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for letters in words:
        for end in range(1, len(letters)):
            merges["".join(letters[:end]), letters[end]] = None
    return list(merges)


def _write_byte_pairs(folder: epath.Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    write_json(folder / "vocab.json", vocabulary)
    write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
