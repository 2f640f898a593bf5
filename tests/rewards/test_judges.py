"""The table of judges, the specs that open them, and the judges without a network."""

import importlib.util
import io
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

from dpo_jax.rewards import JUDGES, JudgeKind, find_judge, open_judge

from ..conftest import ROOT

BLACK = np.zeros((4, 6, 3), np.uint8)


def test_importing_the_table_starts_no_jax() -> None:
    code = "import sys, dpo_jax.rewards; print({'jax', 'flax', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("beauty", "there is no judge 'beauty'; choose one of shapes, clipscore, "),
        ("shapes=models/x", "the judge 'shapes=models/x' takes nothing after its name; write shapes"),
        (
            "hpsv2",
            "the judge hpsv2 needs HPS_v2_compressed.pt of xswu/HPSv2 on the hub, converted to .safetensors; write ",
        ),
        ("imagereward=", "the judge imagereward needs ImageReward.pt of "),
        ("command", "the judge command needs a command line; write command=..."),
    ],
)
def test_specs_that_name_no_judge(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*\Z"):
        open_judge(spec)


def test_a_missing_package_and_its_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "rapidocr") else find(name))
    for spec, message in (
        ("ocr", "run pip install rapidocr, or install dpo_jax with its extra ocr"),
        ("geneval=x.jsonl", "run pip install torch, or install dpo_jax with its extra torch"),
    ):
        with pytest.raises(ValueError, match=rf"^the judge \w+ needs packages that are not installed; {message}$"):
            find_judge(spec)


def test_extras_install_what_judges_import() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for judge in JUDGES.values():
        installed = {re.split("[<>=]", requirement)[0] for requirement in extras.get(judge.extra, ())}
        assert set(judge.packages) <= installed


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([BLACK, BLACK], "there are 2 images but 1 captions; give one caption per image"),
        ([BLACK / 255], r"reads uint8 images \[H, W, 3\], not float64 \[4, 6, 3\]"),
        ([BLACK[..., :1]], r"not uint8 \[4, 6, 1\]"),
        ([BLACK[:0]], r"not uint8 \[0, 6, 3\]"),
    ],
)
def test_what_is_no_image_is_refused(images: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_judge("jpeg_compressibility").score(images, ["a caption"])


def test_jpeg_judges_give_pillows_sizes() -> None:
    rng = np.random.default_rng(0)
    images = [BLACK, rng.integers(0, 256, (64, 48, 3), np.uint8), np.full((64, 48, 3), 77, np.uint8)]
    sizes = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert sizes[1] > 2 * sizes[2]
    captions = [""] * 3
    for name, sign in (("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)):
        scores = open_judge(name).score(images, captions)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, sign * np.asarray(sizes))


def test_no_images_are_no_scores() -> None:
    assert open_judge("jpeg_compressibility").score([], []).shape == (0,)


def test_defaults_are_hub_ids_of_judges_that_need_something() -> None:
    for judge in JUDGES.values():
        assert not judge.default or (judge.needs and judge.default.count("/") == 1)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = JudgeKind(lambda source, settings: lambda images, captions: np.array([1, score, score]), "broken")
    monkeypatch.setitem(JUDGES, "broken", broken)
    with pytest.raises(
        ValueError, match=rf"the judge broken gave the score {score} to an image of 'b' and 1 more images"
    ):
        open_judge("broken").score([BLACK] * 3, ["a", "b", "c"])
