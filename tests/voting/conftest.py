"""Fixtures: folders of small images, and clients of the pages in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from dpo_jax.sampling.image_folder import Entry, write_list
from dpo_jax.voting.app import make_app, results_token
from dpo_jax.voting.store import open_study
from dpo_jax.voting.study import QUESTIONS, read_folder
from dpo_jax.voting.survey import Survey

MakeFolders = Callable[..., list[Path]]


@pytest.fixture
def make_folders(tmp_path: Path) -> MakeFolders:
    """`make_folders("base", "tuned", prompts=3, seeds=1)`: grey images; each folder is brighter by 40 than the last."""

    def make(*names: str, prompts: int = 3, seeds: int = 1, side: int = 8) -> list[Path]:
        for quality, name in enumerate(names):
            folder = tmp_path / name
            folder.mkdir()
            entries = []
            for prompt in range(prompts):
                for seed in range(seeds):
                    entries.append(Entry(f"{prompt}-{seed}.png", f"prompt {prompt}", seed))
                    pixels = np.full((side, side, 3), 40 * quality, np.uint8)
                    pixels[0, 0] = prompt, seed, 0  # no two files are equal
                    Image.fromarray(pixels).save(folder / entries[-1].image)
            write_list(folder, entries)
        return [tmp_path / name for name in names]

    return make


@pytest.fixture
def survey(make_folders: MakeFolders, tmp_path: Path) -> Iterator[Callable[..., Survey]]:
    """`survey(mode="rank", folders=("a", "b"), prompts=3, **fields of Survey)`: a survey on new folders."""
    opened = []

    def make(
        mode: str = "pairs",
        folders: tuple[str, ...] = ("base", "tuned"),
        prompts: int = 3,
        seeds: int = 1,
        questions: tuple[str, ...] = ("preference",),
        **fields: object,
    ) -> Survey:
        read = [read_folder(path) for path in make_folders(*folders, prompts=prompts, seeds=seeds)]
        opened.append(open_study(tmp_path / "votes.sqlite", mode, read))
        return Survey(opened[-1], {name: QUESTIONS[name] for name in questions}, **fields)

    yield make
    for store in opened:
        store.close()


def client(survey: Survey, rater: str = "", token: str | None = None, **fields: object) -> TestClient:
    """A browser without JavaScript. Exceptions in the app are raised here."""
    made = TestClient(make_app(survey, token, **fields), base_url="http://127.0.0.1:8000")
    if rater:
        assert made.post("/api/start", json={"name": rater}).status_code == 200
    return made


def owner(survey: Survey, token: str | None = None) -> TestClient:
    """The browser of the person who runs the study, which has opened the results link."""
    made = client(survey, token=token)
    assert made.get(f"/results?token={results_token(survey.store)}").status_code == 200
    return made
