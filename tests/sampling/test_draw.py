"""Folders of drawn images are whole, resumable, and drawn with one set of settings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.sampling.draw import begin_folder, draw, find_images, list_entries
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.sampling.prompts import Prompt, read_prompts

PROMPTS = [Prompt("a red square", "shapes", 0), Prompt("a / circle", "", 1), Prompt("nothing", "", 2)]


class FakeGenerator:
    """Draws images whose colours encode caption, seed and the image they started from; keeps its arguments."""

    resolution, batch_size = 8, 2

    def __init__(self):
        self.asked = []

    def batches(self, unet, captions, seeds, images=None):
        for start in range(0, len(captions), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(captions)))
            self.asked += [(captions[i], seeds[i]) for i in rows]
            yield np.stack([image_of(captions[i], seeds[i], 0 if images is None else images[i].mean()) for i in rows])


def image_of(caption, seed, began_from=0):
    return np.full((8, 8, 3), [len(caption), seed, round(began_from)], np.uint8)


def colours(folder):
    return {entry.image: tuple(read_image(folder / entry.image)[0, 0]) for entry in read_list(folder)}


def test_images_their_list_and_a_grid(tmp_path):
    entries = list_entries(PROMPTS, 5, 2)
    told = []
    drawn = draw(FakeGenerator(), {}, entries, tmp_path, on_progress=lambda *numbers: told.append(numbers))

    assert drawn == 6
    assert told == [(2, 6), (4, 6), (6, 6)]
    assert read_list(tmp_path) == entries
    assert [(entry.prompt, entry.seed, entry.category) for entry in entries[:3]] == [
        ("a red square", 5, "shapes"),
        ("a red square", 6, "shapes"),
        ("a / circle", 5, ""),
    ]
    for entry in entries:
        np.testing.assert_array_equal(read_image(tmp_path / entry.image), image_of(entry.prompt, entry.seed))
    assert Image.open(tmp_path / "grid.png").size[0] > 2 * 128
    assert not list(tmp_path.glob("*.partial"))


def test_only_what_is_missing_is_drawn(tmp_path):
    entries = list_entries(PROMPTS, 0, 2)
    draw(FakeGenerator(), {}, entries, tmp_path)
    whole = colours(tmp_path)
    for entry in (entries[1], entries[4]):
        (tmp_path / entry.image).rename(tmp_path / f"{entry.image}.partial")  # as if killed while writing them
    generator = FakeGenerator()

    assert draw(generator, {}, entries, tmp_path) == 2
    assert generator.asked == [("a red square", 1), ("nothing", 0)]
    assert colours(tmp_path) == whole
    assert draw(generator, {}, list_entries(PROMPTS, 0, 3), tmp_path) == 3
    assert len(read_list(tmp_path)) == 9


def test_an_interrupted_folder_goes_on(tmp_path):
    entries = list_entries(PROMPTS, 0, 2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(FakeGenerator(), {}, entries, tmp_path, on_progress=stop)
    assert not (tmp_path / "prompts.jsonl").exists()
    there = len(list(tmp_path.glob("*.png")))
    assert there == 4
    assert draw(FakeGenerator(), {}, entries, tmp_path) == 2
    assert read_list(tmp_path) == entries


def test_images_to_begin_from(tmp_path):
    folder = tmp_path / "from"
    folder.mkdir()
    for name, value in {"00000.png": 10, "1-sketch.png": 20, "00002.jpg": 30, "notes.txt": 0}.items():
        if name.endswith("txt"):
            (folder / name).write_text("no image")
        else:
            Image.new("RGB", (20, 12), (value,) * 3).save(folder / name)
    (tmp_path / "out").mkdir()
    entries = list_entries(PROMPTS, 0, 1)
    files = find_images(folder, range(3))

    draw(FakeGenerator(), {}, entries, tmp_path / "out", begin_from=files)

    assert [colour[2] for colour in colours(tmp_path / "out").values()] == [10, 20, 30]
    assert find_images(files[0], range(3)) == [files[0]] * 3
    with pytest.raises(FileNotFoundError, match=r"no image for number 3 of the prompts; .* as in 00003.png"):
        find_images(folder, range(4))
    with pytest.raises(FileNotFoundError, match="no image and no folder of images at"):
        find_images(tmp_path / "absent", [0])
    files[0].write_bytes(b"no image")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"00000.png cannot be read as an image: not an image"):
        draw(FakeGenerator(), {}, entries, tmp_path / "other", begin_from=files)


def test_lines_that_repeat_a_prompt_begin_from_their_own_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\na\nbcd\n")
    folder, output = tmp_path / "from", tmp_path / "out"
    for path in (folder, output):
        path.mkdir()
    for number, value in {0: 10, 2: 20, 3: 30}.items():
        Image.new("RGB", (8, 8), (value,) * 3).save(folder / f"{number:05d}.png")
    prompts = read_prompts(tmp_path / "prompts.txt", repeated=True)
    files = find_images(folder, [prompt.number for prompt in prompts])
    draw(FakeGenerator(), {}, list_entries(prompts, 5, 1), output, begin_from=files)
    expected = {"00000_a_5.png": (1, 5, 10), "00002_a_5.png": (1, 5, 20), "00003_bcd_5.png": (3, 5, 30)}
    assert colours(output) == expected


def test_a_folder_is_of_one_way_of_drawing(tmp_path):
    begin_folder(tmp_path / "new" / "one", {"steps": 4, "sampler": "ddim"})
    begin_folder(tmp_path / "new" / "one", {"steps": 4, "sampler": "ddim"})
    assert json.loads((tmp_path / "new" / "one" / "sampling.json").read_text()) == {"steps": 4, "sampler": "ddim"}
    with pytest.raises(
        FileExistsError, match=r"with other settings \(steps: 4 there, 5 now; eta: None there, 0.1 now\)"
    ):
        begin_folder(tmp_path / "new" / "one", {"steps": 5, "sampler": "ddim", "eta": 0.1})
    with pytest.raises(FileExistsError, match="contains files that dpo_jax did not write"):
        begin_folder(tmp_path / "new", {"steps": 4})


def test_an_image_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        draw(FakeGenerator(), {}, [SimpleNamespace(image="x" * 300 + ".png", prompt="a", seed=0)], tmp_path)
    assert not (tmp_path / "prompts.jsonl").exists()
