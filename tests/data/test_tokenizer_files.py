"""Damaged tokenizer files give one sentence that names the file, whatever error transformers would raise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from dpo_jax.data.tokenizer_files import TokenizerSpec, check_tokenizer
from dpo_jax.data.tokenizers import load_tokenizers

SPEC = TokenizerSpec("tokenizer")


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder / "tokenizer", tmp_path / "tokenizer"))


def change(path: Path, function: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        *((file, LFS, "is a Git LFS pointer") for file in ("vocab.json", "tokenizer_config.json")),
        *((file, "", "is empty") for file in ("vocab.json", "special_tokens_map.json", "added_tokens.json")),
        ("merges.txt", LFS, "is a Git LFS pointer"),
        ("merges.txt", "#version: 0.2\na b c\n", "merge 1, 'a b c'"),
        ("merges.txt", "#version: 0.2\nq\n", "merge 1, 'q'"),
        ("merges.txt", "#version: 0.2\nzz z\n", "merge 1, 'zz z'"),
        ("vocab.json", '{"a": 1', "is not valid JSON"),
        ("vocab.json", '["a"]', "the whole: input should be a valid dictionary"),
        ("vocab.json", "{}", "dictionary should have at least 1 item"),
        ("vocab.json", '{"a": "1"}', "a: input should be a valid integer, not '1'"),
        ("vocab.json", '{"a": -1}', "a: input should be greater than or equal to 0"),
        ("vocab.json", '{"a": 1e400}', "a: input should be a valid integer"),
        ("vocab.json", '{"a": 1000000000000}', "a: input should be less than"),
        ("vocab.json", '{"a": 1, "b": 1}', "is damaged: 2 tokens have 1 numbers"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length.*not '77'"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": 2}', "model_max_length is 2, not a number from 3 to 1024"),
        ("tokenizer_config.json", '{"model_max_length": 9.5}', "model_max_length is 9.5, not a number"),
        ("tokenizer_config.json", '{"pad_token": 3}', "pad_token"),
        ("tokenizer_config.json", '{"vocab": {"a": 0}, "merges": []}', "vocab: .*; merges: "),
        ("tokenizer_config.json", '{"pad_token": "<pad>"}', "pad_token is '<pad>', which is not in the vocabulary"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "'x' is not the number of a token",
        ),
        ("special_tokens_map.json", '{"bos_token": {}}', "bos_token.*content: field required"),
        ("tokenizer_config.json", '{"bos_token": null}', "bos_token.str: input should be a valid string, not None"),
        ("vocab.json", '\ufeff{"a": 1}', "begins with a byte order mark; save it as UTF-8 without"),
        ("special_tokens_map.json", '{"eos_token": "<end>"}', "eos_token is '<end>', which is not in the vocabulary"),
        ("added_tokens.json", '{"<x>": null}', "<x>: input should be a valid integer"),
        ("tokenizer.json", '{"model": {"vocab": [], "merges": []}}', "model.vocab: input should be a valid dictionary"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}', "merge 1, 'a b'"),
    ],
)
def test_damaged_files(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer/{file}.*{message}") as error:
        load_tokenizers(folder.parent, [SPEC])
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"#version: 0.2\nc\xff a\n")
    with pytest.raises(ValueError, match=r"merges.txt, line 2 is not valid UTF-8 \(byte 0xff\)"):
        load_tokenizers(folder.parent, [SPEC])


def test_what_only_the_library_finds(folder: Path) -> None:
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    change(folder / "tokenizer.json", lambda whole: whole | {"normalizer": {"type": "Unheard"}})
    with pytest.raises(ValueError, match=r"the tokenizer at .*tokenizer cannot be read \("):
        load_tokenizers(folder.parent, [SPEC])


def test_a_caption_that_has_no_end(folder: Path) -> None:
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    change(folder / "tokenizer_config.json", lambda settings: settings | specials)
    with pytest.raises(ValueError, match=r"cannot mark where a caption begins and ends: bos_token is '<\|endoftext"):
        load_tokenizers(folder.parent, [SPEC])


def test_more_tokens_than_embeddings(folder: Path) -> None:
    count = len(json.loads((folder / "vocab.json").read_text()))
    load_tokenizers(folder.parent, [SPEC._replace(num_tokens=count, num_positions=8)])
    with pytest.raises(
        ValueError, match=rf"tokenizer has more tokens .*'.*' is number {count - 1}, .* is {count - 1};"
    ):
        load_tokenizers(folder.parent, [SPEC._replace(num_tokens=count - 1, num_positions=8)])
    with pytest.raises(
        ValueError, match=r"makes 8 tokens of a caption, .* has 7 positions \(max_position_embeddings\)"
    ):
        load_tokenizers(folder.parent, [SPEC._replace(num_tokens=count, num_positions=7)])
    (folder / "added_tokens.json").write_text(json.dumps({"<sks>": count}))
    with pytest.raises(ValueError, match=rf"'<sks>' is number {count}, and the encoder's vocab_size is {count}"):
        load_tokenizers(folder.parent, [SPEC._replace(num_tokens=count, num_positions=8)])


@pytest.mark.parametrize("kind", ["as it is", "saved by transformers", "CRLF"])
def test_sound_files_are_taken_however_they_are_written(folder: Path, kind: str) -> None:
    expected = load_tokenizers(folder.parent, [SPEC])(["cat dog"])
    if kind == "saved by transformers":
        CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    if kind == "CRLF":
        for file in ("vocab.json", "merges.txt"):
            (folder / file).write_bytes((folder / file).read_bytes().replace(b"\n", b"\r\n"))
    check_tokenizer(folder)
    assert (load_tokenizers(folder.parent, [SPEC])(["cat dog"]) == expected).all()
