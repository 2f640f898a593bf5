"""The tokenizers of T5 and Qwen give the ids that diffusers gets from transformers, whatever files a folder has."""

import json
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer, T5Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils.sentencepiece_model_pb2_new import ModelProto

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.errors import UserError

T5, QWEN = TokenizerSpec("tokenizer", "t5", length=24), TokenizerSpec("tokenizer", "qwen", length=40)
CORPUS = ["a photo of a cat", "two dogs and a red circle", "the cat sat on the mat", "Unicode: ünïcödé, naïve café"] * 3
CAPTIONS = [
    "",
    "a cat",
    "  two   dogs ",
    "A CAT",
    "it's 42, isn't it?",
    "Ünïcode — 猫! 😀👩‍👩‍👧 é é",
    "tab\tnew\r\nline\x00\x07\x7f\u200b",
    "</s> <pad> <unk> <extra_id_3> <|im_end|> <|endoftext|>",
    "a cat " * 200,
    "猫" * 300,
    "<|endoftext|>" * 100,
]
CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def upper_a_becomes_lower() -> bytes:
    """Return a sentencepiece table that normalises "A" to "a": a trie as a double array, and the texts."""
    units = [0] * 512
    units[0] = 256 << 10  # offset of the root
    units[256 ^ ord("A")] = ord("A") | 1 << 8 | (256 ^ ord("A") ^ 0x1F0) << 10  # a leaf, whose value is at 0x1F0
    units[0x1F0] = 0  # where the text begins
    return struct.pack("<I512I", 4 * 512, *units) + b"a\0"


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Precompiled(upper_a_becomes_lower())
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("t5")
    (folder / "tokenizer").mkdir()
    whole = json.loads(tokenizer.to_str())
    whole["model"]["vocab"] += [[f"<extra_id_{number}>", 0.0] for number in reversed(range(100))]
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    settings = {
        "eos_token": "</s>",
        "extra_ids": 100,
        "model_max_length": 24,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", **settings})
    )
    return folder


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "tokenizer").mkdir()
    tokenizer.model.save(str(folder / "tokenizer"))
    number = tokenizer.get_vocab_size()
    special = {number + i: token for i, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    settings = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in special.items()},
        "bos_token": None,
        "chat_template": CHAT,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def of_transformers(kind: str, folder: Path, length: int) -> np.ndarray:
    """Return the ids that the pipelines of diffusers make of `CAPTIONS`, with -1 for what Z-Image's masks."""
    options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
    if kind == "t5":
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
        return tokenizer(CAPTIONS, add_special_tokens=True, return_tensors="np", **options).input_ids
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in CAPTIONS
    ]
    found = tokenizer(prompts, return_tensors="np", **options)
    return np.where(found.attention_mask, found.input_ids, -1)


@pytest.fixture(params=["t5", "qwen"])
def spec(request: pytest.FixtureRequest) -> TokenizerSpec:
    return T5 if request.param == "t5" else QWEN


@pytest.fixture
def folder(spec: TokenizerSpec, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(request.getfixturevalue(f"{spec.kind}_folder"), tmp_path / "model"))


@pytest.mark.parametrize("saved", [False, True], ids=["as published", "saved by transformers"])
def test_same_as_transformers(spec: TokenizerSpec, folder: Path, saved: bool) -> None:
    expected = of_transformers(spec.kind, folder, spec.length or 0)
    if saved:
        wrapper = (T5Tokenizer if spec.kind == "t5" else Qwen2Tokenizer).from_pretrained(folder / "tokenizer")
        shutil.rmtree(folder / "tokenizer")
        wrapper.save_pretrained(folder / "tokenizer")
        assert (folder / "tokenizer" / "tokenizer.json").exists()
    tokenizers = load_tokenizers(folder, [spec])
    ids_BL = tokenizers(CAPTIONS)
    assert ids_BL.dtype == np.int32
    np.testing.assert_array_equal(ids_BL, expected)
    assert tokenizers.count_cut(CAPTIONS) == sum(cut_by_hand(folder, spec, caption) for caption in CAPTIONS) >= 3
    longer = load_tokenizers(folder, [spec._replace(length=7000)])(CAPTIONS)
    np.testing.assert_array_equal(longer, of_transformers(spec.kind, folder, 7000))


def cut_by_hand(folder: Path, spec: TokenizerSpec, caption: str) -> bool:
    """Return whether a caption has more tokens than fit."""
    whole_L = load_tokenizers(folder, [spec._replace(length=7000)])([caption])[0]
    padding = 0 if spec.kind == "t5" else -1
    return np.count_nonzero(np.cumsum((whole_L != padding)[::-1])) > (spec.length or 0)


def test_begin_and_end_by_hand(t5_folder: Path, qwen_folder: Path) -> None:
    (none_L,) = load_tokenizers(t5_folder, [T5])([""])
    assert none_L.tolist() == [1, *[0] * 23]
    (long_L,) = load_tokenizers(t5_folder, [T5])(["a cat " * 99])
    assert long_L[-1] == 1
    wrapper = Qwen2Tokenizer.from_pretrained(qwen_folder / "tokenizer")
    (caption_L,) = load_tokenizers(qwen_folder, [QWEN])(["a cat <|endoftext|>"])
    text = wrapper.decode(caption_L[caption_L >= 0])
    assert text == "<|im_start|>user\na cat <|endoftext|><|im_end|>\n<|im_start|>assistant\n"


def test_shared_by_threads(spec: TokenizerSpec, folder: Path) -> None:
    captions = [f"a cat {i} " * (i % 7) for i in range(50)]
    expected_BL = load_tokenizers(folder, [spec])(captions)
    others = load_tokenizers(folder, [spec])  # they have seen none of the captions yet
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda caption: others([caption])[0], captions))
    np.testing.assert_array_equal(got, expected_BL)


def test_encoders_of_different_lengths_follow_each_other(t5_folder: Path, qwen_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(qwen_folder / "tokenizer", tmp_path / "tokenizer_2")
    both = load_tokenizers(tmp_path, [T5, QWEN._replace(name="tokenizer_2")])
    alone = load_tokenizers(t5_folder, [T5])(CAPTIONS), load_tokenizers(qwen_folder, [QWEN])(CAPTIONS)
    np.testing.assert_array_equal(both(CAPTIONS), np.concatenate(alone, axis=1))


def test_a_caption_is_cut_if_no_encoder_sees_its_end(t5_folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(t5_folder / "tokenizer", tmp_path / name)
    tokenizers = load_tokenizers(tmp_path, [T5, T5._replace(name="tokenizer_2", length=60)])
    assert tokenizers.count_cut(["a cat", "a cat " * 10, "a cat " * 100]) == 1


def write_spiece(folder: Path, **changes: Any) -> Path:
    """Replace tokenizer.json by the sentencepiece model that holds the same."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    model: Any = ModelProto()
    for number, (piece, score) in enumerate(stored["model"]["vocab"][:-100]):
        model.pieces.add(piece=piece, score=score, type=(3, 3, 2)[number] if number < 3 else 1)
    model.trainer_spec.model_type = changes.get("model_type", 1)
    model.normalizer_spec.precompiled_charsmap = upper_a_becomes_lower()
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(changes.get("data", model.SerializeToString()))
    return folder / "spiece.model"


@pytest.fixture
def t5_copy(t5_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5_folder, tmp_path / "model"))


def test_spiece_alone_is_read_without_sentencepiece(t5_copy: Path) -> None:
    expected = of_transformers("t5", t5_copy, 24)
    write_spiece(t5_copy / "tokenizer")
    np.testing.assert_array_equal(load_tokenizers(t5_copy, [T5])(CAPTIONS), expected)
    (t5_copy / "tokenizer" / "tokenizer_config.json").unlink()
    np.testing.assert_array_equal(load_tokenizers(t5_copy, [T5])(CAPTIONS), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": b"\xff\xff"}, "is not a sentencepiece model, or is damaged"),
        ({"data": b""}, "is empty"),
        ({"data": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"}, "is a Git LFS pointer"),
        ({"model_type": 2}, "is not the unigram model of T5"),
    ],
)
def test_damaged_spiece(t5_copy: Path, changes: dict[str, Any], message: str) -> None:
    write_spiece(t5_copy / "tokenizer", **changes)
    with pytest.raises(UserError, match=f"tokenizer/spiece.model {message}") as error:
        load_tokenizers(t5_copy, [T5])
    assert "\n" not in str(error.value)


def reversed_vocabulary(whole: dict[str, Any]) -> dict[str, Any]:
    return whole | {"model": whole["model"] | {"vocab": whole["model"]["vocab"][::-1]}}


@pytest.mark.parametrize(
    ("spec", "file", "change", "message"),
    [
        (T5, "tokenizer.json", None, "no tokenizer at .*tokenizer: it needs tokenizer.json or spiece.model"),
        (T5, "tokenizer.json", lambda whole: [], "tokenizer.json: the whole: "),
        (
            T5,
            "tokenizer.json",
            lambda whole: {"model": {"vocab": {"a": 0}}},
            "model.vocab: input should be a valid list",
        ),
        (
            T5,
            "tokenizer.json",
            lambda whole: {"model": {"vocab": [["a"]] * 3}},
            "model.vocab.0: list should have at le",
        ),
        (T5, "tokenizer.json", reversed_vocabulary, "does not begin with the tokens <pad>, </s>, <unk>, so it is not"),
        (T5, "tokenizer.json", lambda whole: whole | {"normalizer": {"type": "X"}}, r"tokenizer cannot be read \("),
        (T5, "tokenizer_config.json", lambda said: said | {"eos_token": "<end>"}, "eos_token is '<end>', which is not"),
        (T5, "tokenizer_config.json", lambda said: said | {"pad_token": "</s>"}, "cannot mark where a caption ends"),
        (
            QWEN,
            "merges.txt",
            None,
            "no tokenizer at .*tokenizer: it needs vocab.json and merges.txt, or tokenizer.json",
        ),
        (
            QWEN,
            "tokenizer_config.json",
            lambda said: said | {"chat_template": None},
            "lacks a pad_token or a chat_templ",
        ),
        (QWEN, "tokenizer_config.json", lambda said: said | {"chat_template": "{{ a b }}"}, r"cannot be read \("),
        (
            QWEN,
            "tokenizer_config.json",
            lambda said: said | {"pad_token": "<x>"},
            "pad_token is '<x>', which is not in",
        ),
    ],
)
def test_damaged_files(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    spec: TokenizerSpec,
    file: str,
    change: Callable[[Any], Any] | None,
    message: str,
) -> None:
    model = Path(shutil.copytree(request.getfixturevalue(f"{spec.kind}_folder"), tmp_path / "model"))
    path = model / "tokenizer" / file
    path.write_text(json.dumps(change(json.loads(path.read_text())))) if change else path.unlink()
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        load_tokenizers(model, [spec])
    assert "\n" not in str(error.value)


def test_more_tokens_than_embeddings(spec: TokenizerSpec, folder: Path) -> None:
    count = len((T5Tokenizer if spec.kind == "t5" else Qwen2Tokenizer).from_pretrained(folder / "tokenizer"))
    load_tokenizers(folder, [spec._replace(num_tokens=count)])
    with pytest.raises(
        UserError, match=rf"has more tokens than .* is number {count - 1}, .*vocab_size is {count - 1};"
    ):
        load_tokenizers(folder, [spec._replace(num_tokens=count - 1)])
    with pytest.raises(UserError, match=r"makes 40 tokens of a caption, and its text encoder has 39 positions"):
        load_tokenizers(folder, [spec._replace(length=40, num_positions=39)])


def test_a_tokenizer_of_more_than_a_thousand_tokens_needs_a_length(qwen_folder: Path) -> None:
    with pytest.raises(UserError, match="does not state model_max_length"):
        load_tokenizers(qwen_folder, [QWEN._replace(length=None)])
