"""What a record's images and captions become: pixels and tokens, or what `prepare --encode` stored of them.

Axes: K candidates, M captions (one shared by the candidates, or K), H x W pixels, C channels.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dpo_jax.batch import Encoded, Raw
from dpo_jax.data import images
from dpo_jax.data.encoded import Encodings

TokenizeCaptions = Callable[[Sequence[str]], np.ndarray]
"""Captions -> token_ids_MEL."""


class Draws(NamedTuple):
    """Random numbers in [0, 1) that choose the view of a record's images."""

    top: float
    left: float
    flip: float


class Inputs(Protocol):
    """How inputs are made. Called in worker processes, into which it is pickled."""

    @property
    def resolution(self) -> int:
        """Side of the square images in pixels."""
        ...

    def __call__(
        self, record: dict[str, Any], captions: Sequence[str], num_candidates: int, draws: Draws | None
    ) -> tuple[Raw | Encoded, np.ndarray]:
        """One row of inputs, padded to `num_candidates`; and (height, width, crop top, crop left) of each image.

        Without `draws` images are seen as they are in validation: from the centre, not mirrored.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Images decoded, resized and cropped, captions tokenised; the step encodes them.

    Args:
        tokenizers: of the model.
        random_crop: where to crop, drawn once for all candidates of a prompt; otherwise the centre.
        random_flip: mirror half of the prompts, all candidates alike.
    """

    resolution: int
    tokenizers: TokenizeCaptions
    random_crop: bool = False
    random_flip: bool = False

    def __call__(
        self, record: dict[str, Any], captions: Sequence[str], num_candidates: int, draws: Draws | None
    ) -> tuple[Raw, np.ndarray]:
        view = images.View()
        if draws is not None and self.random_crop:
            view = view._replace(top=draws.top, left=draws.left)
        if draws is not None and self.random_flip:
            view = view._replace(flip=draws.flip < 0.5)
        images_KHWC = np.zeros((num_candidates, self.resolution, self.resolution, 3), np.uint8)
        places_K4 = np.zeros((num_candidates, 4), np.float32)
        for k, data in enumerate(record["images"]):
            size, offsets = images.read(data, view, images_KHWC[k])
            places_K4[k] = *size, *offsets
        return Raw(images_KHWC, self.tokenizers(captions)), places_K4


@dataclasses.dataclass(frozen=True)
class Stored:
    """Looked up: one of the stored views of the images, and the captions' embeddings."""

    encodings: Encodings

    @property
    def resolution(self) -> int:
        return self.encodings.resolution

    def __call__(
        self, record: dict[str, Any], captions: Sequence[str], num_candidates: int, draws: Draws | None
    ) -> tuple[Encoded, np.ndarray]:
        encodings = self.encodings
        number = 0
        if draws is not None:  # of two views the mirrored one where `Decoded` would flip
            number = len(encodings.views) - 1 - int(draws.flip * len(encodings.views))
        moments = [encodings.moments_hwC(image, number) for image in record["images"]]
        moments += [np.zeros_like(moments[0])] * (num_candidates - len(moments))
        view = encodings.views[number]
        offsets = [images.crop_offsets(height, width, self.resolution, view) for height, width in record["sizes"]]
        places_K4 = np.zeros((num_candidates, 4), np.float32)
        places_K4[: len(offsets)] = np.concatenate([record["sizes"], offsets], axis=1)
        context_MLD, pooled_MP = zip(*map(encodings.text, captions), strict=True)
        return Encoded(np.stack(moments), np.stack(context_MLD), np.stack(pooled_MP)), places_K4
