import json

import numpy as np
from transformers import CLIPTokenizer

from dpo_jax.tiny import world
from tools.tiny import tokenizer


def test_merges_join_the_most_frequent_pair_first():
    # Counts: b-c</w> 3 (abc twice, bc once), a-b 2; then a-bc</w> 2.
    assert tokenizer.learn_merges(["abc", "abc", "bc"], 9) == [("b", "c</w>"), ("a", "bc</w>")]
    assert tokenizer.learn_merges(["abc", "abc", "bc"], 1) == [("b", "c</w>")]


def test_transformers_reads_it_and_every_word_of_the_world_is_one_token(tmp_path):
    assert tokenizer.save(tmp_path) == tokenizer.NUM_TOKENS
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    ids = clip(world.captions(), padding="max_length", truncation=True, return_tensors="np").input_ids
    assert clip.model_max_length == 16
    assert ids.shape == (96, 16)
    start, end = tokenizer.NUM_TOKENS - 2, tokenizer.NUM_TOKENS - 1
    np.testing.assert_array_equal(ids[:, 0], start)
    np.testing.assert_array_equal(ids[:, 9:], end)
    np.testing.assert_array_equal(ids[:, 8], end)
    assert ids[:, :8].max() == start
    assert clip.convert_ids_to_tokens(ids[0, 1:8]) == [f"{word}</w>" for word in world.captions()[0].split()]


def test_any_text_is_spelled_and_comes_back(tmp_path):
    tokenizer.save(tmp_path)
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    text = "an astronaut rides a café 馬 !"
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True) == text


def test_second_tokenizer_pads_with_an_exclamation_mark(tmp_path):
    tokenizer.save(tmp_path, pad_token="!")
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    ids = clip("", padding="max_length", max_length=4).input_ids
    assert ids == [tokenizer.NUM_TOKENS - 2, tokenizer.NUM_TOKENS - 1, 0, 0]
    assert json.loads((tmp_path / "vocab.json").read_text())["!"] == 0
