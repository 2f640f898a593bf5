"""Data sets by their name on the hub, and detection of the source that reads given files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_jax.data.sources import hub, missing
from dpo_jax.data.sources.detect import detect_source
from dpo_jax.errors import UserError

from ..hub_server import Hub

Write = Callable[..., Path]
OPEN = {"prompt": ["a"], "chosen": [b"x"], "rejected": [b"y"]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that holds somebody/pairs: two splits, a README, and files that are not read."""
    server = Hub()
    (tmp_path / "pairs" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table(OPEN), tmp_path / "pairs" / "data" / f"{split}-00000-of-00001.parquet")
    for name in ("README.md", ".gitattributes", "train.csv"):
        (tmp_path / "pairs" / name).write_text(name)
    server.put("somebody/pairs", tmp_path / "pairs")
    server.be_asked(monkeypatch, tmp_path / "cache")
    yield server
    server.switch_off()


def test_the_train_split_is_fetched_and_stays_when_the_hub_is_gone(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = hub.fetch("hub:somebody/pairs")
    assert file.name == "train-00000-of-00001.parquet"
    assert server.fetched == {"README.md", ".gitattributes", "data/train-00000-of-00001.parquet"}
    assert detect_source([file]) == "open_image_preferences"
    server.switch_off()
    assert hub.fetch("hub:somebody/pairs") == [file]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch("hub:somebody/pairs") == [file]
    with pytest.raises(FileNotFoundError, match=r"neither in the cache nor reachable on the hub"):
        hub.fetch("hub:somebody/pairs/data/validation*")
    with pytest.raises(
        FileNotFoundError, match=r"neither in the cache nor reachable.*hf download --repo-type dataset a/b"
    ):
        hub.fetch("hub:a/b")


def test_patterns_and_revisions(server: Hub, tmp_path: Path) -> None:
    names = [file.name for file in hub.fetch("hub:somebody/pairs/data/*.parquet")]
    assert names == ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    shutil.copytree(tmp_path / "pairs" / "data", tmp_path / "other" / "default" / "train")
    server.put("somebody/pairs", tmp_path / "other", "refs/convert/parquet")
    found = hub.fetch("hub:somebody/pairs@refs/convert/parquet")
    assert [file.parent.name for file in found] == ["train", "train"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:pairs", r"hub:pairs does not name a data set on the hub; write hub:OWNER/NAME"),
        ("hub:somebody/pairs.git", r"hub:somebody/pairs.git does not name a data set on the hub \(Repo_id cannot end"),
        ("hub:somebody/my--pairs", r"does not name a data set on the hub \(Cannot have -- or \.\. in repo_id"),
        ("hub:somebody/none", r"there is no data set somebody/none on the hub that you may read"),
        ("hub:somebody/pairs@v7", r"the data set somebody/pairs on the hub has no revision 'v7'"),
        (
            "hub:somebody/pairs/*.tar",
            r"has no file \*\.tar \(it has .*README\.md.*hf download .* --local-dir data/pairs",
        ),
    ],
)
def test_names_that_lead_nowhere(server: Hub, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hub.fetch(name)


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": "y"}, "jsonl"),
        ({"prompt": "a", "images": ["x", "y"], "preferred": 0}, "jsonl"),
        ({"prompt": "a", "path1": "x", "path2": "y", "choice_dist": [1, 2]}, "hpdv3"),
        ({"prompt": "a", "image_path": ["x", "y"], "rank": [1, 2]}, "hpdv3"),
        ({"prompt_id": "1", "prompt": "a", "image_path": "x", "rank": 1}, "imagerewarddb"),
    ],
)
def test_json_is_told_by_its_keys(tmp_path: Path, row: dict[str, object], source: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row))
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert detect_source([tmp_path / "a.jsonl", tmp_path / "a.json"]) == source


def test_tables_and_folders_are_told_apart(tmp_path: Path, write_pairs: Write) -> None:
    pairs = write_pairs(1)
    (tmp_path / "table").mkdir()
    shutil.copy(pairs, tmp_path / "table" / "part.0.parquet")
    assert detect_source([pairs, tmp_path / "table"]) == "pickapic"
    for source, places in (("pairs_folder", ("w", "l")), ("liked", ("liked", "disliked"))):
        for place in places:
            (tmp_path / source / place).mkdir(parents=True)
        assert detect_source([tmp_path / source]) == source
    (tmp_path / "single").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "single" / "a.PNG")
    assert detect_source([tmp_path / "single"]) == "captioned_folder"
    assert detect_source([tmp_path / "a.tsv"]) == "csv"
    assert detect_source([tmp_path / "a.tar"]) == "pickapic_tar"


def test_what_fits_no_layout_is_told_with_its_columns(tmp_path: Path, write_pairs: Write) -> None:
    pq.write_table(pa.table({"url": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    message = r"a\.parquet has the columns url, text, which no layout fits.*jpg_0, jpg_1, caption, label_0 \(pickapic\)"
    with pytest.raises(ValueError, match=message):
        detect_source([tmp_path / "a.parquet"])
    with pytest.raises(
        ValueError, match=r"pairs\.parquet looks like --source=pickapic, but .*a\.csv like --source=csv"
    ):
        detect_source([write_pairs(1), tmp_path / "a.csv"])
    with pytest.raises(ValueError, match=r"a\.txt: its ending does not tell what it is"):
        detect_source([tmp_path / "a.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.parquet files, no folders w and l"):
        detect_source([tmp_path / "empty"])


def test_a_missing_input_says_what_to_download() -> None:
    message = str(missing("yuvalkirstain/pickapic_v2"))
    assert "no file matches --input=yuvalkirstain/pickapic_v2. A data set on the " in message
    assert "--input=hub:yuvalkirstain/pickapic_v2" in message
    assert "hf download --repo-type dataset yuvalkirstain/pickapic_v2 --local-dir data/pickapic_v2" in message
    assert "Pick-a-Pic left the hub in 2025" in message
    for name in ("open-image-preferences-v1-binarized", "MizzenAI/HPDv3", "zai-org/ImageRewardDB"):
        assert name in message
    assert "hub:OWNER/NAME" in str(missing("data/*.parquet"))
