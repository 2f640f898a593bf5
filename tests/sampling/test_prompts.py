"""Lists of prompts in the forms of published benchmarks, and prompts given as flags."""

import json
import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.sampling.prompts import BUNDLED, Prompt, distinct, given_prompts, read_prompts
from dpo_jax.tiny import world

ROOT = Path(__file__).parents[2]


def test_text_has_a_prompt_a_line_each_once(tmp_path):
    (tmp_path / "a.txt").write_text("a red square\n\n  a blue é square \na red square\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [
        Prompt("a red square"),
        Prompt("a blue é square", "", 2),
    ]


def test_partiprompts_keep_their_quotes_and_categories(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\na "stop" sign\tSigns\tBasic\t\nbond\tAbstract\t\t\n'
    )
    assert read_prompts(tmp_path / "p.tsv") == [
        Prompt('a "stop" sign', "Signs"),
        Prompt("bond", "Abstract", 1),
    ]


def test_tags_of_genevals_metadata_are_categories(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a red cow"}\n'
        '{"tag": "x", "category": "animals", "prompt": "a cow"}\n{"tag": null, "prompt": "a cat"}\n'
    )
    assert read_prompts(tmp_path / "m.jsonl") == [
        Prompt("a red cow", "colors"),
        Prompt("a cow", "animals", 1),
        Prompt("a cat", "", 2),
    ]


def test_a_folder_of_hpsv2_lists_has_a_category_for_each(tmp_path):
    (tmp_path / "anime.json").write_text('["a girl", "a boy"]')
    (tmp_path / "photo.json").write_text('["a dog"]')
    (tmp_path / "README.md").write_text("not read")
    expected = [Prompt("a girl", "anime", 0), Prompt("a boy", "anime", 1), Prompt("a dog", "photo", 2)]
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


def test_the_published_animals_and_activities():
    """As in the released code of DDPO and D3PO: 45 bare names, and each animal with its article at each activity."""
    animals = [prompt.text for prompt in read_prompts("ddpo_animals")]
    assert (len(animals), animals[0], animals[20], animals[-1]) == (45, "cat", "ant", "kangaroo")
    prompts = read_prompts("ddpo_animal_activities")
    articles = [f"{'an' if animal == 'ant' else 'a'} {animal}" for animal in animals]
    activities = ("washing the dishes", "riding a bike", "playing chess")
    assert [prompt.text for prompt in prompts] == [f"{one} {doing}" for doing in activities for one in articles]
    assert all(prompt.text.endswith(prompt.category) for prompt in prompts)


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
        ("a.txt", b"\n \n", "contains no prompt"),
        ("a.txt", b"a\nb\ncaf\xe9\n", r"a.txt, line 3 is not valid UTF-8 \(byte 0xe9\)"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "a.txt is a PNG image"),
        ("a.txt", "a\nb".encode("utf-16-le"), "a.txt, line 1 has a null byte: it is damaged, or UTF-16 without"),
        ("a.txt", bytes(9), "a.txt is nothing but zero bytes"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', "line 2: prompt: field required"),
        ("a.jsonl", b'{"prompt": \n', "line 1 is not valid JSON"),
        ("a.jsonl", b'{"prompt": "\\ud83d"}\n', "line 1 is not valid JSON"),
        ("a.json", b'{"a": 1}', "should be a valid list"),
        ("a.json", b'["a", 1]', "1: input should be a valid string, not 1"),
        ("a.tsv", b"title\tCategory\nx\ty\n", "no column Prompt or text; its columns are title, Category"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000 + b'"\n', "a.csv, line 2 cannot be read as a table"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.yaml", b"x", "does not end in .txt, "),
    ],
)
def test_what_is_no_list_is_refused_in_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompts at .* or one of the lists bundled, ddpo_animals, "):
        read_prompts(tmp_path / "a.txt")


def test_a_flag_gives_prompts_themselves_or_files_of_them(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n\na cat\n")
    values = ["a cat", str(tmp_path / "a.txt"), "a photo, f1.8", "x" * 5000 + "\n\n a cow. "]
    expected = ["a cat", "a dog", "a photo, f1.8", "x" * 5000, "a cow."]
    assert [prompt.text for prompt in given_prompts(values)] == expected
    assert [prompt.number for prompt in given_prompts(values[:2], repeated=True)] == [0, 1, 3]
    assert given_prompts(["hands"]) == read_prompts("hands")


@pytest.mark.parametrize("value", ["absent.txt", "a cat/dog", "prompts.yaml", "~/absent", "animlas"])
def test_what_looks_like_a_path_or_a_list_is_not_a_prompt(value):
    with pytest.raises(FileNotFoundError, match=f"there are no prompts at {value}; (name a file|did you mean animals)"):
        given_prompts([value])


@pytest.mark.parametrize(("value", "message"), [("", "is empty"), (" \n", "is empty"), ("a \udce4", "not valid UTF-8")])
def test_a_prompt_without_text_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        given_prompts([value])


LINES = ["a red square", "a blue é square", "", "a red square", "two\u2028lines\x0c in one"]
NUMBERED = [Prompt(text, "", number) for number, text in enumerate(LINES) if text]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".json"])
def test_marks_and_line_ends_of_other_systems_change_nothing(tmp_path, suffix, encoding, end):
    texts = {
        ".txt": end.join(LINES),
        ".jsonl": end.join(json.dumps({"prompt": line}) if line else "" for line in LINES) + end,
        ".tsv": end.join(["Prompt\tNote", *(line and f"{line}\tx" for line in LINES)]) + end,
        ".json": json.dumps(LINES, indent=1).replace("\n", end),
    }
    (tmp_path / f"a{suffix}").write_bytes(texts[suffix].encode(encoding))
    expected = [prompt._replace(category="a" if suffix == ".json" else "") for prompt in NUMBERED]
    assert read_prompts(tmp_path / f"a{suffix}", repeated=True) == expected
    assert read_prompts(tmp_path / f"a{suffix}") == distinct(expected) == [*expected[:2], expected[3]]


def test_csv_has_quotes_and_rows_of_several_lines(tmp_path):
    rows = '1,"red, ""big""",x\r\n2,"two\r\nlines",\r\n3,b,y\r\n'
    (tmp_path / "a.csv").write_bytes(f"id,prompt,category\r\n{rows}".encode("utf-8-sig"))
    expected = [Prompt('red, "big"', "x", 0), Prompt("two\nlines", "", 1), Prompt("b", "y", 2)]
    assert read_prompts(tmp_path / "a.csv") == expected


def test_dpg_bench_has_a_row_per_question_and_a_file_per_prompt(tmp_path):
    rows = ['a,"a dog, on a rug",1,0,entity,Is there a dog?', 'a,"a dog, on a rug",2,1,entity,On a rug?']
    rows += ["b,a cat,1,0,entity,Is there a cat?"]
    columns = "item_id,text,proposition_id,dependency,category_broad,question_natural_language"
    (tmp_path / "dpg_bench.csv").write_text("\n".join([columns, *rows]))
    assert given_prompts([str(tmp_path / "dpg_bench.csv")]) == [Prompt("a dog, on a rug"), Prompt("a cat", "", 2)]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("a dog, on a rug")
    (tmp_path / "prompts" / "b.txt").write_text("a cat")
    assert read_prompts(tmp_path / "prompts") == [Prompt("a dog, on a rug"), Prompt("a cat", "", 1)]


def test_the_files_of_a_folder_are_numbered_on(tmp_path):
    (tmp_path / "1.txt").write_text("a\n\nb\n")
    (tmp_path / "2.json").write_text('["b", "c"]')
    numbers = [(prompt.text, prompt.number) for prompt in read_prompts(tmp_path, repeated=True)]
    assert numbers == [("a", 0), ("b", 2), ("b", 3), ("c", 4)]


@pytest.mark.parametrize("type", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_captions_of_any_type_of_text(tmp_path, type):
    table = pa.table({"prompt": pa.array(["a", None, "b"], pa.string()).cast(type)})
    parquet.write_table(table, tmp_path / "v.parquet")
    assert read_prompts(tmp_path / "v.parquet") == [Prompt("a", "", 0), Prompt("b", "", 2)]
