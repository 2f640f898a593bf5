"""Images are returned unchanged and in one piece, by TFDS and by direct access."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from pyarrow import parquet

from dpo_jax.data.images import DamagedImage
from dpo_jax.data.store import image_store
from dpo_jax.data.store.image_store import ImageFiles, Writer, by_xxh3, locate, read_in_order

SIZES = [1, 127, 128, 60_000, 5, 5, 700_000, 2_100_000, 16_383]


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [np.random.default_rng(i).bytes(size) for i, size in enumerate(SIZES)]


def write(folder: Path, *files: list[bytes]) -> ImageFiles:
    paths = [folder / f"{number}.parquet" for number in range(len(files))]
    for path, images in zip(paths, files, strict=True):
        with Writer(path) as writer:
            for image in images:
                writer.add(image)
    offsets = np.concatenate([locate(path) for path in paths])
    lengths = np.array([len(image) for images in files for image in images], np.int32)
    digests = np.array([xxhash.xxh3_64_intdigest(image) for images in files for image in images], np.uint64)
    return ImageFiles(paths, [len(images) for images in files], offsets, lengths, by_xxh3(digests))


@pytest.mark.parametrize("group_bytes", [1, 100_000, 2**22])
def test_as_they_went_in(
    images: list[bytes], tmp_path: Path, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "GROUP_BYTES", group_bytes)
    stored = write(tmp_path, images[:4], images[4:5], images[5:])
    stored.check()
    assert len(stored) == len(images)
    for position in np.random.default_rng(0).permutation(2 * len(images)) % len(images):
        assert stored[int(position)] == images[position]
        assert stored[int(position)].readonly
    assert list(read_in_order(tmp_path / "2.parquet")) == images[5:]


def test_equal_images_are_told_apart(tmp_path: Path) -> None:
    with Writer(tmp_path / "file") as writer:
        for _ in range(3):
            writer.add(b"the same")
    first, second, third = locate(tmp_path / "file")
    assert first < second < third


def test_no_images(tmp_path: Path) -> None:
    Writer(tmp_path / "file").close()
    assert parquet.read_metadata(tmp_path / "file").num_rows == 0
    assert locate(tmp_path / "file") == []


def test_a_file_that_does_not_fit(images: list[bytes], tmp_path: Path) -> None:
    stored = write(tmp_path, images[:4], images[4:])
    write(tmp_path, images[:4], images[:5])
    with pytest.raises(ValueError, match=r"1.parquet is damaged \(its last image ends at byte 28\d*, after its end\)"):
        stored.check()
    write(tmp_path, images[:4], images[:4])
    with pytest.raises(ValueError, match=r"1.parquet holds 4 images instead of 5"):
        stored.check()
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(ValueError, match=r"0.parquet is missing or damaged"):
        stored.check()


def test_a_changed_bit_is_told_when_the_image_is_read(images: list[bytes], tmp_path: Path) -> None:
    stored = write(tmp_path, images[:4], images[4:])
    (first, *_, last) = locate(tmp_path / "1.parquet")
    for offset in (first, last + len(images[-1]) - 1):
        with open(tmp_path / "1.parquet", "r+b") as file:
            file.seek(offset)
            flipped = file.read(1)[0] ^ 1
            file.seek(offset)
            file.write(bytes([flipped]))
    stored.check()  # reads no image
    for position, image in enumerate(images):
        if position in (4, len(images) - 1):
            with pytest.raises(DamagedImage, match=rf"the bytes of image {position} in .*1.parquet have changed"):
                stored[position]
        else:
            assert stored[position] == image


PEAK = """
import sys
import subprocess
import sys
from pathlib import Path
from dpo_jax.data.store.image_store import read_in_order

def held() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) // 1024

images = read_in_order(Path(sys.argv[1]))
next(images)
before = held()
print(max(held() - before for _ in images))
"""


def test_images_that_were_read_are_not_kept(tmp_path: Path) -> None:
    """Not even in pyarrow's buffers: a file of 100 MB is read with a tenth of that."""
    with Writer(tmp_path / "images.parquet") as writer:
        for number in range(100):
            writer.add(number.to_bytes(8) + bytes(2**20))
    command = [sys.executable, "-c", PEAK, tmp_path / "images.parquet"]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 30
