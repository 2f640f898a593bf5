"""Uploading an export to a small hub that speaks the real one's protocol to huggingface_hub."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import dpo_jax
from dpo_jax.errors import UserError
from dpo_jax.weights.hub_upload import check_upload, upload

from ..hub_server import Hub

MODEL = "dpo_jax/tiny/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that huggingface_hub asks, with a token that may write."""
    hub = Hub()
    hub.uploads = tmp_path / "uploads"
    hub.be_asked(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    yield hub
    hub.switch_off()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_uploaded_whole_with_its_card(hub: Hub, tmp_path: Path) -> None:
    exported = dpo_jax.export(MODEL, tmp_path / "local", format="unet", push_to_hub="me/mine")
    assert exported.url == f"{hub.url}/me/mine"
    assert hub.created == {"me/mine": True}
    assert files(hub.uploads / "me" / "mine") == files(tmp_path / "local")
    card = (tmp_path / "local" / "README.md").read_text()
    assert "# mine\n" in card
    assert "UNet2DConditionModel.from_pretrained('me/mine'" in card
    with pytest.raises(UserError, match=r"^--push_to_hub=me/mine: the repository already holds files \(README\.md, "):
        dpo_jax.export(MODEL, tmp_path / "again", format="unet", push_to_hub="me/mine")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("token", "repo", "output", "message"),
    [
        (
            "hf_write",
            "mine",
            "out",
            "^--push_to_hub=mine is not the name of a repository on the hub; write OWNER/NAME$",
        ),
        ("hf_write", "me/my--lora", "out", r"^--push_to_hub=me/my--lora is not the name of .* \(Cannot have --"),
        ("hf_write", "a/b/c", "out", "^--push_to_hub=a/b/c is not the name"),
        (
            "hf_write",
            "me/mine",
            "gs://bucket/out",
            "uploads a local folder, but --output=gs://bucket/out is not local",
        ),
        (
            "hf_read",
            "me/mine",
            "out",
            "^--push_to_hub=me/mine: the token of me may only read; log in with `hf auth login`",
        ),
        ("hf_none", "me/mine", "out", "^--push_to_hub=me/mine: the hub does not accept this machine's token; log in "),
    ],
)
def test_what_cannot_be_uploaded_is_refused_first(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, output: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        check_upload(repo, output)
    assert hub.created == {}


def test_a_machine_without_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=r"^--push_to_hub=me/mine: this machine has no token for the hub; "):
        check_upload("me/mine", "out")


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    folder = re.escape(str(tmp_path))
    message = (
        rf"^exported to {folder}, but could not upload it to other/mine \(.*\); your token must be allowed to write "
    )
    with pytest.raises(UserError, match=rf"{message}to other: run hf upload other/mine {folder} \. --private$"):
        upload(tmp_path, "other/mine", private=True, message="Upload a model")
    assert (tmp_path / "README.md").read_text() == "a card"


def test_a_public_repository_and_a_hub_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("a card")
    upload(tmp_path / "out", "me/open", private=False, message="Upload a model")
    assert hub.created == {"me/open": False}
    hub.switch_off()
    with pytest.raises(UserError, match=r"^--push_to_hub=me/new: the hub cannot be asked \(.*; export without --push"):
        check_upload("me/new", "out")
