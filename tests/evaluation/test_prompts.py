"""Lists of prompts in the forms that benchmarks publish."""

import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.evaluation.prompts import BUNDLED, Prompt, read_prompts
from dpo_jax.tiny import world

ROOT = Path(__file__).parents[2]


def test_text_has_a_prompt_a_line_each_once(tmp_path):
    (tmp_path / "a.txt").write_text("a red square\n\n  a blue é square \na red square\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [Prompt("a red square"), Prompt("a blue é square")]


def test_partiprompts_keep_their_quotes_and_categories(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\na "stop" sign\tSigns\tBasic\t\nbond\tAbstract\t\t\n'
    )
    assert read_prompts(tmp_path / "p.tsv") == [Prompt('a "stop" sign', "Signs"), Prompt("bond", "Abstract")]


def test_a_folder_of_hpsv2_lists_has_a_category_for_each(tmp_path):
    (tmp_path / "anime.json").write_text('["a girl", "a boy"]')
    (tmp_path / "photo.json").write_text('["a dog"]')
    (tmp_path / "README.md").write_text("not read")
    expected = [Prompt("a girl", "anime"), Prompt("a boy", "anime"), Prompt("a dog", "photo")]
    assert read_prompts(tmp_path) == expected


def test_pick_a_pic_parquet_gives_each_caption_once(tmp_path):
    parquet.write_table(
        pa.table({"caption": ["b", "a", None, "b"], "jpg_0": [b"", b"", b"", b""]}), tmp_path / "v.parquet"
    )
    assert [prompt.text for prompt in read_prompts(tmp_path / "v.parquet")] == ["b", "a"]


def test_the_bundled_list_is_balanced():
    prompts = read_prompts("bundled")
    categories = {prompt.category for prompt in prompts}
    assert len(prompts) == 64
    assert {sum(prompt.category == c for prompt in prompts) for c in categories} == {8}


def test_animals_alone_and_each_of_24_at_each_of_8_activities():
    animals = [prompt.text for prompt in read_prompts("animals")]
    assert len(animals) == 45
    assert all(re.fullmatch("an [aeiou][a-z]+|a [^aeiou][a-z]+", animal) for animal in animals)
    prompts = read_prompts("animal_activities")
    who = {prompt.text.removesuffix(f" {prompt.category}") for prompt in prompts}
    doing = {prompt.category for prompt in prompts}
    assert (len(who), len(doing)) == (24, 8)
    assert who < set(animals)
    assert {prompt.text for prompt in prompts} == {f"{animal} {activity}" for animal in who for activity in doing}


def test_forty_hands_or_people_at_what_hands_do():
    assert len(read_prompts("hands")) == 40


def test_the_lists_of_the_tiny_world_are_its_split():
    lists = [[prompt.text for prompt in read_prompts(name)] for name in ("tiny_train", "tiny_heldout")]
    assert tuple(lists) == world.split()


def test_every_list_is_among_the_files_that_are_installed():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for file in map(Path, BUNDLED.values()):
        assert any(Path(file.name).match(pattern) for pattern in shipped[f"dpo_jax.{file.parent}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompt"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', 'line 2: expected {"prompt"'),
        ("a.jsonl", b'{"prompt": \n', "line 1: no valid JSON"),
        ("a.json", b'{"a": 1}', "expected a JSON list"),
        ("a.tsv", b"text\tCategory\nx\ty\n", "no column Prompt"),
        ("a.parquet", b"PAR1 but not really", "no whole parquet file"),
        ("a.csv", b"x", "prompts are read from"),
        ("a.txt", b"\xff\xfe\x00", "not in UTF-8"),
    ],
)
def test_what_is_no_list_is_refused_in_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompts at .* or one of bundled, animals, "):
        read_prompts(tmp_path / "a.txt")
