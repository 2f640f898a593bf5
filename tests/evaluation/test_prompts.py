"""Lists of prompts in the forms that benchmarks publish."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.evaluation.prompts import Prompt, read_prompts


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
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        read_prompts(tmp_path / "a.txt")
