import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import Tokenizers, load_tokenizers

NAMES = ("tokenizer", "tokenizer_2")
SPECS = [*map(TokenizerSpec, NAMES)]


def test_ids_by_hand(tokenizer_folder: Path) -> None:
    vocabulary = json.loads((tokenizer_folder / "tokenizer" / "vocab.json").read_text())
    begin, cat, dog, end, mark = (
        vocabulary[token] for token in ("<|startoftext|>", "cat</w>", "dog</w>", "<|endoftext|>", "!")
    )
    ids_BL = load_tokenizers(tokenizer_folder, SPECS)(["Cat  DOG", ""])
    assert ids_BL.dtype == np.int32
    np.testing.assert_array_equal(
        ids_BL,
        [
            [begin, cat, dog, end, end, end, end, end, begin, cat, dog, end, mark, mark, mark, mark],
            [begin, end, end, end, end, end, end, end, begin, end, mark, mark, mark, mark, mark, mark],
        ],
    )


def test_same_as_transformers(tokenizer_folder: Path) -> None:
    captions = ["a cat", "", "dog dog dog dog dog dog dog dog dog", "Ünïcode — 猫!", "it's 42"]
    ids_BL = load_tokenizers(tokenizer_folder, SPECS)(captions)
    for e, name in enumerate(NAMES):
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder / name)
        expected = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np").input_ids
        np.testing.assert_array_equal(ids_BL[:, 8 * e : 8 * e + 8], expected)


def test_shared_by_threads(tokenizer_folder: Path) -> None:
    tokenizers = load_tokenizers(tokenizer_folder, SPECS)
    captions = [f"cat {i} " * (i % 7) for i in range(50)]
    expected_BL = tokenizers(captions)
    others = load_tokenizers(tokenizer_folder, SPECS)  # they have seen none of the captions yet
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda caption: others([caption])[0], captions))
    np.testing.assert_array_equal(got, expected_BL)


def test_a_caption_is_tokenized_once_and_its_ids_cannot_be_spoilt() -> None:
    calls = []

    def tokenize(caption: str) -> tuple[np.ndarray, bool]:
        calls.append(caption)
        return np.array([len(calls)]), False

    tokenizers = Tokenizers([tokenize])  # type: ignore[list-item]
    tokenizers(["a", "b"])[:] = 0
    assert tokenizers(["b", "a", "a"]).tolist() == [[2], [1], [1]]
    assert calls == ["a", "b"]


def test_missing_and_unlike_tokenizers(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer_3: it needs vocab.json"):
        load_tokenizers(tokenizer_folder, [TokenizerSpec("tokenizer_3")])
    shutil.copytree(tokenizer_folder, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 9}))
    assert load_tokenizers(tmp_path / "m", SPECS)(["cat"]).shape == (1, 8 + 9)
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not state model_max_length"):
        load_tokenizers(tmp_path / "m", SPECS[1:])


def test_needs_neither_torch_nor_jax(tokenizer_folder: Path) -> None:
    code = (
        "import sys, dpo_jax.batch; from dpo_jax.data import tokenizer_files; "
        "from dpo_jax.data.tokenizers import load_tokenizers; "
        f"load_tokenizers({str(tokenizer_folder)!r}, [tokenizer_files.TokenizerSpec('tokenizer')])(['cat']); "
        "print([name for name in ('torch', 'jax', 'tensorflow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
