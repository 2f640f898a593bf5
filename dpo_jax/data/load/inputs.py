"""Makes the inputs of a batch: pixels and tokens, or the latents and embeddings that `prepare --encode` stored.

Everything is written straight into its place in the batch.

Axes: B prompts, K candidates, M captions (one shared by the candidates, or K), H x W pixels, h x w latent cells,
C channels.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from dpo_jax.batch import Cached, Raw
from dpo_jax.data import images
from dpo_jax.data.load.buffer_pool import Pool
from dpo_jax.data.store.latents import StoredLatents

TokenizeCaptions = Callable[[Sequence[str]], np.ndarray]
"""Maps captions to token_ids_ML."""
ReadImages = Callable[[dict[str, Any]], Sequence[images.ImageBytes]]
"""Maps a record to the bytes of its image files."""


class ViewDraws(NamedTuple):
    """Random numbers in [0, 1) that choose the view of a record's images."""

    top: float
    left: float
    flip: float


class Example(NamedTuple):
    """One element of a batch: its record, captions and view."""

    number: int
    """Its index in the batch."""
    record_number: int
    """Index of the record among those to train on."""
    record: dict[str, Any]
    captions: Sequence[str]
    draws: ViewDraws | None
    """None in validation: the crop is the centre, not mirrored."""
    shape: images.Shape
    """(height, width) of its images in the batch, in pixels."""


class Inputs(Protocol):
    """Makes the inputs of a batch. Methods are called from several threads."""

    @property
    def shapes(self) -> Sequence[images.Shape]:
        """The shapes that images of a batch may have: one square, or those of the buckets."""
        ...

    @property
    def pixels_a_cell(self) -> int:
        """Pixels along the side of a latent cell."""
        ...

    def view(self, draws: ViewDraws | None) -> images.View:
        """Return the view of the images of an example."""
        ...

    def allocate(
        self, pool: Pool, batch_size: int, num_candidates: int, num_captions: int, shape: images.Shape
    ) -> Raw | Cached:
        """Return memory for a batch of images of one shape."""
        ...

    def fill(self, batch: Any, examples: Sequence[Example], read_images: ReadImages) -> list[np.ndarray]:
        """Write examples into a batch, with 0 for candidates that a record lacks.

        Return (height, width, crop top, crop left) of the images of each example.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RawInputs:
    """Decode, resize and crop images, and tokenise captions; the training step encodes them.

    Args:
        resolution: side of the square that images are cropped to, in pixels.
        tokenizers: the tokenizers of the model.
        random_crop: draw the crop, once for all candidates of a prompt; otherwise take the centre.
        random_flip: mirror half of the examples, all their candidates alike.
        pixels_a_cell: pixels along the side of a latent cell.
        buckets: the shapes that images are cropped to in place of the square.
    """

    resolution: int
    tokenizers: TokenizeCaptions
    random_crop: bool = False
    random_flip: bool = False
    pixels_a_cell: int = 8
    buckets: Sequence[images.Shape] = ()

    @property
    def shapes(self) -> Sequence[images.Shape]:
        return self.buckets or ((self.resolution, self.resolution),)

    def allocate(self, pool: Pool, batch_size: int, num_candidates: int, num_captions: int, shape: images.Shape) -> Raw:
        L = self.tokenizers([""]).shape[1]
        images_BKHWC = pool.empty((batch_size, num_candidates, *shape, 3), np.uint8)
        token_ids_BML = np.empty((batch_size, num_captions, L), np.int32)
        return Raw(images_BKHWC, np.empty((batch_size, num_candidates), bool), token_ids_BML)

    def fill(self, batch: Raw, examples: Sequence[Example], read_images: ReadImages) -> list[np.ndarray]:
        # Decoding comes last: it empties a core's caches, so Python code after it takes several times as long.
        token_ids_NL = self.tokenizers([caption for example in examples for caption in example.captions])
        numbers = [example.number for example in examples]
        batch.token_ids_BML[numbers] = token_ids_NL.reshape(len(examples), -1, token_ids_NL.shape[1])
        encoded: list[tuple[images.ImageBytes, images.View, np.ndarray]] = []
        for example in examples:
            view, images_KHWC = self.view(example.draws), batch.images_BKHWC[example.number]
            found = read_images(example.record)
            encoded += [(data, view, image) for data, image in zip(found, images_KHWC, strict=False)]
            batch.mirrored_BK[example.number] = view.flip
            images_KHWC[len(found) :] = 0
        places = iter([(*size, *offsets) for size, offsets in images.read_all(encoded)])
        return [
            np.asarray(list(itertools.islice(places, len(example.record["images"]))), np.float32)
            for example in examples
        ]

    def view(self, draws: ViewDraws | None) -> images.View:
        if draws is None:
            return images.View()
        top, left = (draws.top, draws.left) if self.random_crop else (None, None)
        return images.View(top, left, self.random_flip and draws.flip < 0.5)


@dataclasses.dataclass(frozen=True)
class CachedInputs:
    """Look up the latents of one of the stored views of the images, and the embeddings of the captions."""

    stored: StoredLatents

    @property
    def shapes(self) -> Sequence[images.Shape]:
        return self.stored.shapes

    @property
    def pixels_a_cell(self) -> int:
        shape = self.shapes[0]
        return shape[0] // self.stored.moments_shape(shape)[0]

    def view(self, draws: ViewDraws | None) -> images.View:
        return self.stored.views[self._number(draws)]

    def _number(self, draws: ViewDraws | None) -> int:
        """Return the number of the stored view; if there are two, the mirrored one where `RawInputs` would flip."""
        return 0 if draws is None else len(self.stored.views) - 1 - int(draws.flip * len(self.stored.views))

    def allocate(
        self, pool: Pool, batch_size: int, num_candidates: int, num_captions: int, shape: images.Shape
    ) -> Cached:
        texts = self.stored.text_shapes
        return Cached(
            pool.empty((batch_size, num_candidates, *self.stored.moments_shape(shape)), ml_dtypes.bfloat16),
            pool.empty((batch_size, num_captions, *texts["context"]), ml_dtypes.bfloat16),
            pool.empty((batch_size, num_captions, *texts["pooled"]), ml_dtypes.bfloat16),
        )

    def fill(self, batch: Cached, examples: Sequence[Example], read_images: ReadImages) -> list[np.ndarray]:
        return [self._fill_example(batch, example) for example in examples]

    def _fill_example(self, batch: Cached, example: Example) -> np.ndarray:
        stored, record, number = self.stored, example.record, self._number(example.draws)
        moments_KhwC = batch.moments_BKhwC[example.number]
        moments_KhwC[len(record["images"]) :] = 0
        for k, image in enumerate(record["images"]):
            stored.read_moments(image, number, moments_KhwC[k], example.shape)
        for m, caption in enumerate(example.captions):
            stored.read_text(caption, batch.context_BMLD[example.number, m], batch.pooled_BMP[example.number, m])
        view = stored.views[number]
        offsets = [images.crop_offsets(height, width, example.shape, view) for height, width in record["sizes"]]
        return np.concatenate([record["sizes"], offsets], axis=1).astype(np.float32)
