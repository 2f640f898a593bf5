"""All commands share one reader of images: the same pixels and limits everywhere, and no image starts a program."""

import ast
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import EpsImagePlugin, Image

import dpo_jax
from dpo_jax.data.images import View, read, read_image
from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES
from dpo_jax.evaluation import html_report, judge_contest
from dpo_jax.sampling import draw
from dpo_jax.voting import study

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
NAMES = "0.png", "0.jpg", "0.webp", "0.eps"


def test_only_the_reader_opens_images() -> None:
    """`Image.open` without a closed list of formats starts Ghostscript for a PostScript file of any name."""
    opening = []
    for file in Path(dpo_jax.__file__).parent.rglob("*.py"):
        tree = list(ast.walk(ast.parse(file.read_text())))
        imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            alias.asname or alias.name: getattr(node, "module", None) or alias.name
            for node in imports
            for alias in node.names
        }
        assert not [name for name, module in names.items() if module == "PIL.Image" or name in ("cv2", "imageio")], file
        assert "simplejpeg" not in names or file.name == "images.py"
        called = [node.func for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        for call in called:
            owner = ast.unparse(call.value).split(".")[0]
            opens = call.attr == "open" and names.get(owner, "").split(".")[0] == "PIL"
            opening += [file.name] * (opens or call.attr in ("imread", "decode_image"))
    assert opening == ["images.py"] * 3


def prepare(file: Path) -> None:
    folder = file.parent / "pairs"
    for place in ("w", "l"):
        (folder / place).mkdir(parents=True)
        (folder / place / file.name).write_bytes(file.read_bytes())
    (folder / "0.txt").write_text("a caption")
    builder.prepare(SOURCES["pairs_folder"], [folder], file.parent / "data", workers=0)


def evaluate(file: Path) -> None:
    list(judge_contest._chunks([epath.Path(file)], "", lambda *_: None))


def vote(file: Path) -> None:
    file.with_suffix(".txt").write_text("a caption")
    study.read_folder(file.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "read_image": read_image,
    "training": lambda file: read(file.read_bytes(), View(), np.empty((8, 8, 3), np.uint8)),
    "prepare": prepare,
    "evaluate": evaluate,
    "report": lambda file: html_report._data_url(epath.Path(file)),
    "vote": vote,
    "init_image": lambda file: draw._Squares([epath.Path(file)], 8)[0],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", READERS)
def test_no_image_starts_a_program(reader: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {marker}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / name).write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match=r"not an image|no images|is not supported|can be used"):
        READERS[reader](folder / name)
    assert not marker.exists()
    with contextlib.suppress(OSError), Image.open(folder / name) as image:
        image.load()  # shows that the test can fail: Pillow alone starts it
    assert marker.exists()


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match=r"not a regular file|is a folder"):
            read_image(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image(tmp_path / "gone.png")
    with open(tmp_path / "huge.png", "wb") as sparse:
        sparse.truncate(300 * 10**9)
    with pytest.raises(ValueError, match=r"huge.png has 300,000,000,000 bytes"):
        read_image(tmp_path / "huge.png")


def test_judges_see_what_training_sees(tmp_path: Path) -> None:
    """An image that is turned by EXIF, transparent or of 16 bits gives the same pixels as the plain file."""
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, clear, grey = tmp_path / "turned.png", tmp_path / "clear.png", tmp_path / "grey.png"
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    alpha = np.dstack([pixels, np.full((6, 9), 255, np.uint8)])
    alpha[:3, :, 3] = 0
    Image.fromarray(alpha).save(clear)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(grey)
    ((_, images),) = judge_contest._chunks(list(map(epath.Path, (turned, clear, grey))), "", lambda *_: None)
    np.testing.assert_array_equal(images[0], pixels)
    np.testing.assert_array_equal(images[1], np.where(np.arange(6)[:, None, None] < 3, 255, pixels))
    np.testing.assert_array_equal(images[2], np.broadcast_to(pixels[..., :1], pixels.shape))
