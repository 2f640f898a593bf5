"""The tokenizers of tiny random models are small, know what they should, and are the same at each call."""

from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2Tokenizer, T5Tokenizer

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.models.random_tokenizers import BYTES, PRINTABLE, write_qwen_tokenizer, write_t5_tokenizer

WRITE = {"t5": write_t5_tokenizer, "qwen": write_qwen_tokenizer}
CLASSES = {"t5": T5Tokenizer, "qwen": Qwen2Tokenizer}


@pytest.mark.parametrize("kind", ["t5", "qwen"])
def test_small_and_the_same_at_each_call(tmp_path: Path, kind: str) -> None:
    counts = {WRITE[kind](tmp_path / name) for name in ("a", "b")}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    (count,) = counts
    assert 100 < count < 400
    tokenizer = CLASSES[kind].from_pretrained(tmp_path / "a")
    assert sorted(tokenizer.get_vocab().values()) == list(range(count))
    load_tokenizers(tmp_path, [TokenizerSpec("a", kind, 32, num_tokens=count)])


def test_t5_knows_words_and_letters(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "t", max_tokens=16)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.tokenize("a red circle") == ["▁a", "▁red", "▁circle"]
    letters = "".join(map(chr, PRINTABLE))
    assert tokenizer.decode(tokenizer(letters).input_ids, skip_special_tokens=True) == letters
    ids_L = load_tokenizers(tmp_path, [TokenizerSpec("t", "t5")])(["a 猫"])[0]
    assert ids_L.tolist() == [*tokenizer.convert_tokens_to_ids(["▁a", "▁", "<unk>", "</s>"]), *[0] * 12]


def test_qwen_knows_words_and_bytes(tmp_path: Path) -> None:
    write_qwen_tokenizer(tmp_path / "t")
    tokenizer = Qwen2Tokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.tokenize("a red circle") == ["a", "Ġred", "Ġcircle"]
    odd = "猫 😀 \x00\x07 ünïcödé"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert set(BYTES) <= tokenizer.get_vocab().keys()
    ids_L = load_tokenizers(tmp_path, [TokenizerSpec("t", "qwen", 32)])(["a red circle"])[0]
    assert np.count_nonzero(ids_L >= 0) == 8 + 3
    assert tokenizer.decode(ids_L[ids_L >= 0]) == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
