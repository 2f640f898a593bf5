"""Views of images for `prepare --encode`, decoded by threads.

Axes: V views of an image, H x W pixels, C channels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dpo_jax.data import images
from dpo_jax.data.store.prepared import AGAIN, PreparedData
from dpo_jax.errors import UserError


def view_batches(
    prepared: PreparedData,
    views: Sequence[images.View],
    shape: images.Shape,
    num_workers: int,
    positions: np.ndarray,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yield all views of the images at these positions, uint8 [batch_size, V, H, W, 3]; the last may be shorter."""
    begun: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(num_workers) as threads:
        for start in range(0, len(positions), batch_size):
            some = positions[start : start + batch_size]
            images_NVHWC = np.empty((len(some), len(views), *shape, 3), np.uint8)
            rows = [
                threads.submit(_read_views, prepared, int(position), views, images_VHWC)
                for position, images_VHWC in zip(some, images_NVHWC, strict=True)
            ]
            begun.append((images_NVHWC, rows))
            if len(begun) > 2:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())


def _read_views(prepared: PreparedData, position: int, views: Sequence[images.View], images_VHWC: np.ndarray) -> None:
    try:
        data = prepared.images[position]
        for view, image_HWC in zip(views, images_VHWC, strict=True):
            images.read(data, view, image_HWC)
    except images.DamagedImage as error:
        raise UserError(f"image {position} of {prepared.folder} cannot be encoded: {error}; {AGAIN}") from None


def _finished(batch: np.ndarray, rows: Sequence[Future[None]]) -> np.ndarray:
    for row in rows:
        row.result()
    return batch
