"""What `prepare --encode` stores beside a data set and training reads in place of images and captions.

PREPARED/encoded/NAME/
    encoding.json              what it was made of and how; written last, so the folder is complete
    images-00000.safetensors   "moments" of the VAE's posteriors, in the order of images.arrow
    captions.arrow             the distinct captions and the empty one, sorted
    captions-00000.safetensors their "context" and "pooled", in that order

Rows of images and captions are spread over files evenly, all but the last of equal length. Everything is bfloat16.

Axes: I images, V views of each, S captions, h x w latent cells, C channels (the mean's, then the log variance's),
L tokens, D context width, P pooled width.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from dpo_jax.data.images import View
from dpo_jax.data.parts import sync
from dpo_jax.data.prepared import Prepared
from dpo_jax.files import partial_name
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.mapped_file import read_into

FACTS = "encoding.json"
CAPTIONS = "captions.arrow"
FILE_BYTES = 2**28
"""What is lost at most when encoding is stopped, and is dealt to one of several processes."""


@dataclasses.dataclass(frozen=True)
class Encodings:
    """A finished folder."""

    folder: Path

    @property
    def resolution(self) -> int:
        return self._written["facts"]["resolution"]

    @functools.cached_property
    def views(self) -> list[View]:
        return [View(**view) for view in self._written["facts"]["views"]]

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the moments of one view, and of a caption's context and pooled embedding."""
        image, text = self._images[0], self._texts[0]
        return {"moments": image.shapes["moments"][2:]} | {name: shape[1:] for name, shape in text.shapes.items()}

    def read_moments(self, image: int, view: int, moments_hwC: np.ndarray) -> None:
        """Reads those of one view of an image from disk, into `moments_hwC`."""
        file, row = divmod(image, self._written["images"]["rows_a_file"])
        self._images[file].read("moments", row * len(self.views) + view, moments_hwC)

    def read_text(self, caption: str, context_LD: np.ndarray, pooled_P: np.ndarray) -> None:
        """Likewise the embeddings of a caption. Raises KeyError if it is none of the data set's."""
        position = bisect.bisect_left(self._captions, caption)
        if position == len(self._captions) or self._captions[position] != caption:
            raise KeyError(caption)
        file, row = divmod(position, self._written["captions"]["rows_a_file"])
        self._texts[file].read("context", row, context_LD)
        self._texts[file].read("pooled", row, pooled_P)

    def check(self) -> None:
        """Raises ValueError where a file is missing or cut short; some 0.1 ms a file."""
        try:
            _ = self.views, self._images, self._texts, self._captions
        except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
            reason, data = str(error).splitlines()[0], self.folder.parents[1]
            raise ValueError(
                f"the encodings in {self.folder} are damaged ({reason}); mend them by {_command(data)}"
            ) from None

    @functools.cached_property
    def _written(self) -> dict[str, Any]:
        return json.loads((self.folder / FACTS).read_text())

    @functools.cached_property
    def _images(self) -> list["EncodedFile"]:
        return self._open("images")

    @functools.cached_property
    def _texts(self) -> list["EncodedFile"]:
        return self._open("captions")

    def _open(self, kind: str) -> list["EncodedFile"]:
        return [EncodedFile(self.folder / file_name(kind, i)) for i in range(self._written[kind]["files"])]

    @functools.cached_property
    def _captions(self) -> "_Strings":
        return _Strings(pa.ipc.open_file(pa.memory_map(str(self.folder / CAPTIONS))).read_all()["caption"])


class EncodedFile:
    """Where the rows of one file lie. It isn't kept open: there may be more than a process may open.

    Raises ValueError or FileNotFoundError if the file is missing or damaged.
    """

    def __init__(self, path: Path):
        located = safetensors_file.locate(epath.Path(path))
        self._path, self._offsets = path, {name: offset for name, (offset, _) in located.items()}
        self.shapes = {name: shape for name, (_, shape) in located.items()}
        self.rows = min(shape[0] for shape in self.shapes.values())

    def read(self, name: str, row: int, out: np.ndarray) -> None:
        """A row of as many bytes as `out` has."""
        read_into(self._path, self._offsets[name] + row * out.nbytes, out)


class _Strings:
    """A column as a sequence of strings that stays on disk."""

    def __init__(self, column: pa.ChunkedArray):
        (self._array,) = column.chunks

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:
        return self._array[index].as_py()


def folder_of(data: Path, facts: dict[str, Any]) -> Path:
    """Where the encodings with these facts belong, of the data set in `data`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return data / "encoded" / f"{facts['family']}-{facts['resolution']}-{digest}"


def open_encodings(data: Path, facts: dict[str, Any]) -> Encodings:
    """The finished encodings with these facts.

    Raises:
        FileNotFoundError: there are none; says how those that are there differ.
        ValueError: a file is missing or damaged.
    """
    folder = folder_of(data, facts)
    if is_finished(folder):
        encodings = Encodings(folder)
        encodings.check()
        return encodings
    if folder.exists():
        raise FileNotFoundError(f"the encodings in {folder} are not finished; go on by {_command(data)}")
    others = []
    for other in sorted((data / "encoded").glob(f"*/{FACTS}")):
        found = json.loads(other.read_text())["facts"]
        differing = [name for name in facts if found.get(name) != facts[name]]
        shown = [f"{name} was {_shown(found.get(name))}, now {_shown(facts[name])}" for name in differing]
        others.append(f"{other.parent.name}: {'; '.join(shown)}")
    there = f" (there are {', and '.join(others)})" if others else ""
    raise FileNotFoundError(
        f"{data} has no encodings by this model with these settings{there}; make them by {_command(data)}"
    )


def _command(data: Path) -> str:
    return f"python -m dpo_jax.prepare --output={data} --encode with this --config and its overrides"


def _shown(fact: Any) -> str:
    """A fact as the config states it: the views, which it states by their number and kinds, among them."""
    if not isinstance(fact, list):
        return repr(fact)
    kinds = {"crops": any(view["top"] is not None for view in fact), "flips": any(view["flip"] for view in fact)}
    return f"{len(fact)} views {' and '.join(kind for kind, used in kinds.items() if used) or 'of the centre'}"


def is_finished(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def choose_views(count: int, *, random_crop: bool, random_flip: bool) -> list[View]:
    """The views that are stored of every image. The first is what validation sees: the centre, not mirrored.

    All images have the same, so that candidates of a prompt can share one, as they share a random crop.
    """
    views = [View()]
    for number in range(1, count):
        top, left = np.random.default_rng(number).random(2)
        view = View(top=float(top), left=float(left)) if random_crop else View()
        views.append(view._replace(flip=random_flip and number % 2 == 1))
    return views


def distinct_captions(prepared: Prepared) -> pa.Array:
    """All captions that training may ask for, sorted: those of records, of single candidates, and the empty one."""
    columns = [prepared.records["caption"], pc.list_flatten(prepared.records["captions"])]
    captions = pa.chunked_array([*(chunk for column in columns for chunk in column.chunks), pa.array([""])])
    captions = pc.unique(captions.drop_null())
    return captions.take(pc.sort_indices(captions))


def write_captions(folder: Path, captions: pa.Array) -> None:
    table = pa.table({"caption": captions})

    def write(path: Path) -> None:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)

    write_whole(folder / CAPTIONS, write)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file that then becomes `path`, also for a machine that crashes."""
    unfinished = path.with_name(partial_name(path.name))
    write(unfinished)
    sync(unfinished)
    os.replace(unfinished, path)


def file_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05}.safetensors"


def rows_a_file(row_bytes: int) -> int:
    return max(1, FILE_BYTES // row_bytes)
