"""The command, as a user runs it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_jax.data.sources import SOURCES

from .conftest import ROOT, Command

PAIRS = ROOT / "dpo_jax" / "tiny" / "pairs.parquet"


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dpo_jax.prepare", *arguments], capture_output=True, text=True)


def test_the_bundled_pairs(tmp_path: Path, command: Command) -> None:
    arguments = "--source=pickapic", f"--input={PAIRS}", "--validation_fraction=0.1", f"--output={tmp_path}/out"
    done = prepare(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = pq.ParquetFile(PAIRS).metadata.num_rows
    assert (summary["records"], summary["pairs"], summary["quarantined"]) == (rows, rows, 0)
    assert done.stdout.splitlines()[0] == f"rows read    {rows}"
    assert done.stdout.splitlines()[-3:] == [
        f"look at      {tmp_path}/out/contact_sheet.png (is the winner the better image?)",
        f"held out     {tmp_path}/out/heldout_prompts.jsonl (for sample --prompts)",
        f"written to   {tmp_path}/out",
    ]
    prompts = (tmp_path / "out" / "heldout_prompts.jsonl").read_text().splitlines()
    assert len(prompts) == summary["prompts"]["validation"]
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == ""
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = command("prepare", *arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"already prepared: {tmp_path}/out ({rows} records)\n"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    file = tmp_path / "out" / "summary.json"
    file.write_text(file.read_text().replace("Pick-a-Pic v1 and v2: ", "as an earlier version put it: "))
    assert command("prepare", *arguments).returncode == 0
    file.write_bytes(before[file])
    for other in ("--validation_fraction=0.2", "--source=open_image_preferences", f"--input={PAIRS},{PAIRS}"):
        again = command("prepare", *arguments, other)
        assert again.returncode == 1
        assert again.stderr.startswith(f"error: {tmp_path}/out was prepared before, from another --input, --source or")
        assert len(again.stderr.splitlines()) == 1


def test_input_that_changed_is_not_taken_for_prepared(tmp_path: Path, command: Command) -> None:
    """The preferred image becomes the other one, and the file keeps its length."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8), "red" if name == "0.png" else "blue").save(tmp_path / name)
    row = '{"prompt": "a", "images": ["0.png", "1.png"], "preferred": 0}'
    (tmp_path / "pairs.jsonl").write_text(row)
    arguments = f"--input={tmp_path}/pairs.jsonl", f"--output={tmp_path}/out", "--workers=0"
    assert command("prepare", *arguments).returncode == 0
    assert command("prepare", *arguments).returncode == 0
    time.sleep(0.05)  # the clock of file systems is coarse
    (tmp_path / "pairs.jsonl").write_text(row.replace(": 0", ": 1"))
    again = command("prepare", *arguments)
    assert again.returncode == 1
    assert again.stderr.startswith(
        f"error: {tmp_path}/out was prepared before {tmp_path}/pairs.jsonl last changed; name"
    )


def test_says_that_it_continues(tmp_path: Path) -> None:
    table = pq.read_table(PAIRS).slice(0, 50)
    damaged = table.set_column(
        table.schema.get_field_index("jpg_0"), "jpg_0", [[b"bad"] * 10 + table["jpg_0"].to_pylist()[10:]]
    )
    pq.write_table(damaged, tmp_path / "pairs.parquet")
    arguments = f"--input={tmp_path}/*.parquet", f"--output={tmp_path}/out", "--workers=0"
    stopped = prepare(*arguments)
    assert stopped.returncode == 1
    assert stopped.stderr.startswith("error: 10 of 50 records are damaged")
    done = prepare(*arguments, "--max_damaged_fraction=0.2")
    assert done.returncode == 0
    assert done.stderr == "continuing: 1 of 1 parts are finished\n"
    assert "quarantined  10 (10 not an image)" in done.stdout


def test_verify(tmp_path: Path, command: Command) -> None:
    pq.write_table(pq.read_table(PAIRS).slice(0, 20), tmp_path / "pairs.parquet")
    output = f"--output={tmp_path}/out"
    assert command("prepare", f"--input={tmp_path}/pairs.parquet", output, "--workers=0").returncode == 0
    done = command("prepare", "--verify", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"verified 6 files, [\d,]+ bytes, \d+ images in {tmp_path}/out\n", done.stdout)
    (shard,) = (tmp_path / "out" / "images").glob("*parquet*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    done = command("prepare", "--verify", output)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"error: {tmp_path}/out is damaged (2 in all): {shard} (its checksum is not the one in checksu"
    )
    assert len(done.stderr.splitlines()) == 1
    assert command("prepare", "--verify", output, "--input=x").stderr.startswith("error: --verify reads what is in")
    assert command("prepare", "--verify", f"--output={tmp_path}").stderr.startswith("error: no prepared data set at")


def test_a_damaged_summary_is_named(tmp_path: Path, command: Command) -> None:
    for content, message in (
        ("[]", r"summary.json: the whole: input should be"),
        ('{"files": "x", "source": 3}', r"files: .*; source: .*; validation_fraction: field required"),
        ("", r"summary.json is empty"),
    ):
        (tmp_path / "summary.json").write_text(content)
        config = f"--config={ROOT}/configs/sd15.py:tiny"
        done = command("prepare", f"--input={PAIRS}", f"--output={tmp_path}", "--encode", config)
        assert done.returncode == 1
        assert re.search(message, done.stderr)


def test_help_lists_the_sources() -> None:
    shown = " ".join(prepare("--help").stdout.split())
    for name, source in SOURCES.items():
        assert f"{name}: {source.help}" in shown


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--input=nowhere/*.parquet", "no file matches --input=nowhere/*.parquet"),
        ("--source=mine", "flag --source=mine: the layouts are pickapic, open_image_preferences"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, argument: str, message: str) -> None:
    done = prepare(f"--input={PAIRS}", f"--output={tmp_path}/out", argument)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_encodes_in_the_same_command_and_again(tmp_path: Path) -> None:
    """New data, then what is there; a second time nothing is left to do. Nothing but the plan is said."""
    table = pq.read_table(PAIRS).slice(0, 40)
    pq.write_table(table, tmp_path / "pairs.parquet")
    config = "--encode", f"--config={ROOT}/configs/tiny.py", "--config.data.encoded_views=1"
    arguments = f"--input={tmp_path}/pairs.parquet", f"--output={tmp_path}/out"
    done = prepare(*arguments, "--workers=2", *config)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out" / "encoded").iterdir()
    assert done.stdout.splitlines()[-1] == f"latents and embeddings are in {folder}"
    # A slow machine reports some of them more than once.
    first_words = dict.fromkeys(line.split()[0] for line in done.stderr.splitlines())
    assert list(first_words) == ["captions", "images", "to", "time"]
    again = prepare(*arguments, *config)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"latents and embeddings are in {folder}\n", "")
    assert prepare(arguments[1], *config).stdout == again.stdout
    other = prepare(*arguments, "--validation_fraction=0.5", *config)
    assert other.stderr.startswith(f"error: {tmp_path}/out was prepared before, from another --input, --source or")
    assert prepare(*arguments, "--encode").stderr.startswith("error: --encode and --config go together")
    assert prepare(*arguments, "--encode", config[2]).stderr.startswith(
        f"error: {config[2]} replaces a field of a config"
    )
