"""Shows the images of a contest to judges, and keeps what they said."""

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
"""Images in memory at a time."""
READERS = 8
"""Threads that read them."""
OnProgress = Callable[[str, int, int], None]
"""(what is done, images done, of how many)."""


class _Kept(TypedDict):
    scores: list[float]
    checksum: str


def judge_all(
    specs: Sequence[str], settings: Settings, contest: Contest, folder: epath.Path, on_progress: OnProgress
) -> dict[str, dict[str, np.ndarray]]:
    """scores_N by judge and model, of judges as `rewards.open_judge` names them; two of a name are told apart.

    Each judge's scores of a model are written to `folder` when it has seen all images; where they are there, whole and
    of the same images, they are read.
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
    """The scores of a file; None where it is not there, damaged, or of other images: then they are judged again."""
    if not kept.exists():
        return None
    try:
        found: _Kept = read_json(kept, _Kept)
    except ValueError:
        return None
    return found["scores"] if found["checksum"] == _digest([digest, found["scores"]]) else None


def features_of(spec: str, settings: Settings, contest: Contest, on_progress: OnProgress) -> dict[str, np.ndarray]:
    """features_ND by model: of `thumbnails`, or of a CLIP, `clip=` and what it is opened from."""
    describe: Callable[[Images], np.ndarray] = thumbnails
    if spec != "thumbnails":
        from dpo_jax.rewards.clip_judges import open_image_features

        name, _, source = spec.partition("=")
        if name != "clip":
            raise UserError(f"--features={spec}: take thumbnails, or clip=FOLDER_OR_ID")
        describe = open_image_features(source, settings)
    return {
        model: np.concatenate([describe(images) for _, images in _chunks(files, f"looking at {model}", on_progress)])
        for model, files in contest.images.items()
    }


def _chunks(files: Sequence[epath.Path], doing: str, on_progress: OnProgress) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first, images) of some images at a time."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), CHUNK):
            yield start, list(readers.map(read_image, files[start : start + CHUNK]))
            on_progress(doing, min(start + CHUNK, len(files)), len(files))


def _contents(files: Sequence[epath.Path]) -> list[tuple[str, str]]:
    """The name of each file and the digest of what is in it."""
    with ThreadPoolExecutor(READERS) as readers:
        digests = list(readers.map(lambda file: hashlib.sha256(read_bytes(file, MAX_BYTES)).hexdigest(), files))
    return [(str(file), digest) for file, digest in zip(files, digests, strict=True)]


def _digest(of: list[object]) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()
