"""Has judges score the images of a contest, and keeps the scores in files."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from typing_extensions import TypedDict

from dpo_jax import cluster
from dpo_jax.data.images import MAX_BYTES, read_image
from dpo_jax.errors import UserError
from dpo_jax.evaluation.compare import Contest
from dpo_jax.evaluation.drift import thumbnails
from dpo_jax.files import read_bytes, read_json, write_whole
from dpo_jax.rewards import Images, Settings, open_judge

CHUNK = 64
"""Images that are in memory at a time."""
READERS = 8
"""Threads that read images."""
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, the number of images done, and the total."""


class _Kept(TypedDict):
    scores: list[float]
    checksum: str


def check_judges(specs: Sequence[str], features: str, settings: Settings, image_HWC: np.ndarray, caption: str) -> None:
    """Open all judges and the features, and try each of them on one image, so that later none of them is missing.

    Raises UserError for what cannot be opened, or cannot judge such images or captions.
    """
    for spec in specs:
        judge = open_judge(spec, dtype=settings.dtype, batch_size=settings.batch_size)
        judge.score([image_HWC], [caption])
    open_features(features, settings)([image_HWC])


def judge_contest(
    specs: Sequence[str], settings: Settings, contest: Contest, folder: epath.Path, on_progress: OnProgress
) -> dict[str, dict[str, np.ndarray]]:
    """Return scores_N by judge and by model. Where two judges have one name, the second has its whole spec for a name.

    A judge's scores of a model are written to `folder` once it has seen all images. Scores of the same images that are
    already there are read instead.

    Args:
        specs: the judges, as `rewards.open_judge` takes them.
        settings: how they compute.
        contest: the images.
        folder: for the files of scores, `JUDGE/MODEL.json`.
        on_progress: called after each chunk of images.
    """
    scores: dict[str, dict[str, np.ndarray]] = {}
    contents = {model: _contents(files) for model, files in contest.images.items()}
    for spec in specs:
        name = spec.partition("=")[0]
        name = name if name not in scores else spec.replace("/", "_")
        scores[name], judge = {}, None
        for model, files in contest.images.items():
            kept = folder / name / f"{model}.json"
            digest = _digest([spec, settings.dtype, contents[model], contest.captions])
            found = _read(kept, digest)
            if found is None:
                judge = judge or open_judge(spec, dtype=settings.dtype, batch_size=settings.batch_size)
                show = f"{name} judges {model}"
                chunks = [
                    judge.score(images, contest.captions[start : start + CHUNK])
                    for start, images in _chunks(files, show, on_progress)
                ]
                found = np.concatenate(chunks).tolist()
                if cluster.is_first():
                    fields = {"digest": digest, "images": [file.name for file in files], "scores": found}
                    write_whole(kept, json.dumps(fields | {"checksum": _digest([digest, found])}))
            scores[name][model] = np.array(found)
    return scores


def _read(kept: epath.Path, digest: str) -> list[float] | None:
    """Return the scores of a file, or None if it does not exist, is damaged, or is about other images."""
    if not kept.exists():
        return None
    try:
        found: _Kept = read_json(kept, _Kept)
    except ValueError:
        return None
    return found["scores"] if found["checksum"] == _digest([digest, found["scores"]]) else None


def open_features(spec: str, settings: Settings) -> Callable[[Images], np.ndarray]:
    """Return a function from images to features_ND, for `thumbnails` or for `clip=` and what a CLIP is opened from."""
    if spec == "thumbnails":
        return thumbnails
    from dpo_jax.rewards.clip_judges import open_image_features

    name, _, source = spec.partition("=")
    if name != "clip":
        raise UserError(f"--features={spec} must be thumbnails or clip=FOLDER_OR_ID")
    return open_image_features(source, settings)


def features_of(spec: str, settings: Settings, contest: Contest, on_progress: OnProgress) -> dict[str, np.ndarray]:
    """Return features_ND of each model's images; see `open_features`."""
    describe = open_features(spec, settings)
    return {
        model: np.concatenate([describe(images) for _, images in _chunks(files, f"features of {model}", on_progress)])
        for model, files in contest.images.items()
    }


def _chunks(files: Sequence[epath.Path], doing: str, on_progress: OnProgress) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield chunks of images, each with the number of its first image."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), CHUNK):
            yield start, list(readers.map(read_image, files[start : start + CHUNK]))
            on_progress(doing, min(start + CHUNK, len(files)), len(files))


def _contents(files: Sequence[epath.Path]) -> list[tuple[str, str]]:
    """Return the name of each file and the SHA-256 of its contents."""
    with ThreadPoolExecutor(READERS) as readers:
        digests = list(readers.map(lambda file: hashlib.sha256(read_bytes(file, MAX_BYTES)).hexdigest(), files))
    return [(str(file), digest) for file, digest in zip(files, digests, strict=True)]


def _digest(of: list[object]) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()
