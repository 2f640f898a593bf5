"""Encodes a prepared data set once, for every later run: the work of `prepare --encode`.

Each process fills its share of the files with its own devices, in a folder that all processes see, so none of them
waits for another before the end. A file appears when it is complete; a stopped run continues with the missing files.

Axes: N images or captions of a batch, V views of an image, M = N * V, H x W pixels, h x w latent cells, C channels, L
tokens.
"""

import datetime
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax import files
from dpo_jax.data import buckets
from dpo_jax.data.images import Shape, View
from dpo_jax.data.load.views import view_batches
from dpo_jax.data.store import checksums
from dpo_jax.data.store.latents import (
    CAPTIONS,
    INDEX,
    LatentsFile,
    distinct_captions,
    file_name,
    images_kind,
    images_of,
    rows_a_file,
    with_checksums,
    write_captions,
    write_whole,
)
from dpo_jax.data.store.prepared import PreparedData
from dpo_jax.data.tokenizers import Tokenizers
from dpo_jax.encode.images import mirror, posterior_moments
from dpo_jax.encode.text import encode_text
from dpo_jax.errors import EnvironmentFault, UserError
from dpo_jax.files import readable_bytes
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sharding import batch_sharding
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.layout import Params

PIXELS_A_DEVICE = 2**22
"""Pixels that a device encodes at a time: four images of 1024 x 1024."""
CAPTIONS_A_DEVICE = 32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Read = Callable[[np.ndarray, int], Iterable[np.ndarray]]
"""Maps (positions, batch size) to the inputs of the encoder, in batches; the last one may be shorter."""
OnProgress = Callable[[str, int, int], None]
"""Called with the table's name, the rows done, and the total rows of this process's share."""


class File(NamedTuple):
    """Rows `start` to `stop` of a table."""

    path: Path
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        try:
            return LatentsFile(self.path).rows == self.stop - self.start
        except (OSError, ValueError):  # missing or damaged
            return False


class Table:
    """The images or the captions of a data set: how they are read and encoded, and the files with the results.

    It compiles and times `encode`, a function of `params` and a batch of this `shape` and `dtype`.
    """

    def __init__(
        self,
        name: str,
        count: int,
        read: Read,
        encode: Callable[[Any, jax.Array], Mapping[str, jax.Array]],
        params: Any,
        shape: tuple[int, ...],
        dtype: Any,
        mesh: Mesh,
        folder: Path,
    ):
        self.name, self.count, self.read, self.batch_size = name, count, read, shape[0]
        self._params, self._sharding = params, batch_sharding(mesh)
        jitted = jax.jit(
            lambda params, x: {name: value.astype(jnp.bfloat16) for name, value in encode(params, x).items()},
            out_shardings=self._sharding,
        )
        self._encode = jitted.lower(params, jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)).compile()
        nothing = np.zeros(shape, dtype)
        jax.block_until_ready(self.encode(nothing))
        started = time.monotonic()
        outputs = jax.block_until_ready(self.encode(nothing))
        self.seconds = (time.monotonic() - started) / self.batch_size
        """Seconds per row on this process's devices."""
        flop_a_device = (self._encode.cost_analysis() or {}).get("flops", math.nan)
        self.flop = flop_a_device * mesh.size / self.batch_size
        """Floating-point operations per row, as XLA counts them."""
        self.row_shapes = {name: value.shape[1:] for name, value in outputs.items()}
        self.row_bytes = sum(math.prod(shape) for shape in self.row_shapes.values()) * BFLOAT16.itemsize
        self.rows_a_file = rows_a_file(self.row_bytes)
        starts = range(0, count, self.rows_a_file)
        self.files = [
            File(folder / file_name(name, number), start, min(start + self.rows_a_file, count))
            for number, start in enumerate(starts)
        ]

    def encode(self, batch: np.ndarray) -> Mapping[str, jax.Array]:
        """Encode a batch of at most `batch_size` rows, padded to `batch_size`."""
        padded = np.resize(batch, (self.batch_size, *batch.shape[1:]))
        return self._encode(self._params, jax.device_put(padded, self._sharding))

    @property
    def missing(self) -> list[File]:
        return [file for file in self.files if not file.is_whole]

    @property
    def missing_rows(self) -> int:
        return sum(file.stop - file.start for file in self.missing)

    def fill(self, files: Sequence[File], on_progress: OnProgress) -> None:
        """Encode and write the rows of these files."""
        if not files:
            return
        positions = np.concatenate([np.arange(file.start, file.stop) for file in files])
        rows, done = self._rows(positions), 0
        for file in files:
            number = file.stop - file.start
            tensors = {name: np.empty((number, *shape), BFLOAT16) for name, shape in self.row_shapes.items()}
            for i in range(number):
                for name, value in next(rows).items():
                    tensors[name][i] = value
                done += 1
                if done % self.batch_size == 0 or done == len(positions):
                    on_progress(self.name, done, len(positions))
            for name, tensor in tensors.items():
                _check_finite(tensor, f"{name} of {self.name} {file.start} to {file.stop}")
            tensors = with_checksums(tensors)
            header = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

            def write(path: Path, tensors: Any = tensors, header: Any = header) -> None:
                safetensors_file.write(epath.Path(path), tensors.items(), header)

            write_whole(file.path, write)

    def _rows(self, positions: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yield rows on the host; while one batch is handed out, the devices encode the next."""

        def fetched(pending: tuple[Mapping[str, jax.Array], int]) -> Iterator[dict[str, np.ndarray]]:
            outputs = jax.device_get(pending[0])
            for i in range(pending[1]):
                yield {name: value[i] for name, value in outputs.items()}

        pending = None
        for batch in self.read(positions, self.batch_size):
            encoded = (self.encode(batch), len(batch))
            if pending is not None:
                yield from fetched(pending)
            pending = encoded
        if pending is not None:
            yield from fetched(pending)


class DatasetEncoder:
    """Everything that is encoded of a data set. Its string says how much that is, and the space and time it takes.

    Args:
        encoders: weights of the VAE and the text encoders, on every device of `mesh`.
        mesh: the mesh of this process's devices.
        folder: folder that the encodings are written to.
        resolution: side of the square that images are cropped to.
        views: views that are encoded of each image.
        num_workers: threads that decode images.
        shapes: the shapes of buckets, which images are cropped to in place of the square.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        encoders: Mapping[str, Params],
        tokenizers: Tokenizers,
        prepared: PreparedData,
        mesh: Mesh,
        folder: Path,
        *,
        resolution: int,
        views: Sequence[View],
        num_workers: int,
        caption_lines: bool = False,
        shapes: Sequence[Shape] = (),
    ):
        self.folder = folder
        self._captions = captions = distinct_captions(prepared, caption_lines=caption_lines)
        self._lengths = lines_on_lengths(pipeline, tokenizers, captions.to_pylist())
        mirrored_V = jnp.asarray([view.flip for view in views])

        def moments(params: Params, images_NVHWC: jax.Array) -> Mapping[str, jax.Array]:
            images_MHWC = images_NVHWC.reshape(-1, *images_NVHWC.shape[2:])
            mirrored_M = jnp.tile(mirrored_V, len(images_NVHWC))
            moments_MhwC = posterior_moments(pipeline.vae, params, mirror(images_MHWC, mirrored_M))
            return {"moments": moments_MhwC.reshape(-1, len(views), *moments_MhwC.shape[1:])}

        def embeddings(params: Mapping[str, Params], token_ids_NL: jax.Array) -> Mapping[str, jax.Array]:
            text = encode_text(pipeline, params, token_ids_NL)
            return {"context": text.context_NLD, "pooled": text.pooled_NP}

        def read_captions(positions: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
            for start in range(0, len(positions), batch_size):
                yield tokenizers(captions.take(pa.array(positions[start : start + batch_size])).to_pylist())

        def images_table(kind: str, images_R: np.ndarray, shape: Shape) -> Table:
            def read(positions: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
                return view_batches(prepared, views, shape, num_workers, images_R[positions], batch_size)

            count = len(images_R)
            a_device = min(max(1, PIXELS_A_DEVICE // (len(views) * math.prod(shape))), -(-count // mesh.size))
            batch_shape = (a_device * mesh.size, len(views), *shape, 3)
            return Table(kind, count, read, moments, encoders["vae"], batch_shape, np.uint8, mesh, folder)

        captions_a_device = min(CAPTIONS_A_DEVICE, -(-len(captions) // mesh.size))
        token_shape = (captions_a_device * mesh.size, *tokenizers([""]).shape[1:])
        text = {name: params for name, params in encoders.items() if name != "vae"}
        self._shapes = shapes
        self.tables = [
            Table("captions", len(captions), read_captions, embeddings, text, token_shape, np.int32, mesh, folder)
        ]
        if shapes:
            found = zip(shapes, images_of(prepared, shapes), strict=True)
            self.tables += [images_table(images_kind(shape), images_R, shape) for shape, images_R in found]
        else:
            self.tables.append(images_table("images", np.arange(len(prepared.images)), (resolution, resolution)))

    def __str__(self) -> str:
        lines = [*self._lengths]
        for table in self.tables:
            done = f", {table.count - table.missing_rows} done" if table.missing_rows < table.count else ""
            lines.append(
                f"{table.name:12} {table.count} x {readable_bytes(table.row_bytes)} = "
                f"{readable_bytes(table.count * table.row_bytes)}, {table.count * table.flop / 1e12:.4g} TFLOP{done}"
            )
        seconds = sum(table.missing_rows * table.seconds for table in self.tables) / jax.process_count()
        lines.append(f"to write     {readable_bytes(self._missing_bytes)}; {readable_bytes(self._free)} are free")
        lines.append(
            f"time         about {datetime.timedelta(seconds=math.ceil(seconds))} on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}, if images are read as fast"
        )
        return "\n".join(lines)

    def run(self, facts: Mapping[str, Any], on_progress: OnProgress) -> None:
        """Write what is missing, and finally `facts`, which identify the encodings.

        Raises an EnvironmentFault, before anything is written, if the disk is too small.
        """
        if self._missing_bytes > self._free:
            raise EnvironmentFault(
                f"the encodings need another {readable_bytes(self._missing_bytes)}, but {readable_bytes(self._free)} "
                f"are free in {self.folder.parent}; make room, or encode fewer views or a lower resolution"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_captions(self.folder, self._captions)
        for table in self.tables:
            share = table.files[jax.process_index() :: jax.process_count()]
            table.fill([file for file in share if not file.is_whole], on_progress)
        multihost_utils.sync_global_devices("data set encoded")
        if jax.process_index() == 0:
            captions, *images = [{"files": len(table.files), "rows_a_file": table.rows_a_file} for table in self.tables]
            layouts: dict[str, Any] = {"captions": captions}
            if self._shapes:
                layouts["buckets"] = dict(zip(map(buckets.shown, self._shapes), images, strict=True))
            else:
                (layouts["images"],) = images
            digest = checksums.checksum(self.folder / CAPTIONS)
            written = {"facts": dict(facts), **layouts, "captions_checksum": digest}
            files.write_whole(self.folder / INDEX, json.dumps(written, indent=1) + "\n")
            for unfinished in self.folder.glob(".*"):  # left by runs that were killed
                unfinished.unlink(missing_ok=True)

    @property
    def _missing_bytes(self) -> int:
        return sum(table.missing_rows * table.row_bytes for table in self.tables)

    @property
    def _free(self) -> int:
        existing = next(folder for folder in self.folder.parents if folder.exists())
        return shutil.disk_usage(existing).free


def lines_on_lengths(pipeline: Pipeline, tokenizers: Tokenizers, captions: Sequence[str]) -> list[str]:
    """Return a line on the longest caption for each text encoder whose number of tokens users choose: CLIP's is fixed.

    All tokens are stored, padding too, so a smaller `data.text_length` takes less space.
    """
    encoders = pipeline.family.text_encoders
    if not any(encoder.length for encoder in encoders):
        return []
    return [
        f"tokens       at most {longest} in a caption, of the {length} that are stored (data.text_length)"
        for encoder, longest, length in zip(encoders, tokenizers.longest(captions), pipeline.text_lengths, strict=True)
        if encoder.length
    ]


def _check_finite(tensor: np.ndarray, what: str) -> None:
    if not np.isfinite(tensor).all():
        raise UserError(
            f"the {what} are not finite: the model overflows in its dtype; set vae_dtype (or dtype) to float32, or "
            "take a VAE made for half precision"
        )
