"""The sample command, in a process of its own."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.images import read_image
from dpo_jax.diffusion.samplers import SAMPLERS
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.image_folder import read_list
from dpo_jax.tiny import world

from .conftest import Command


@pytest.fixture
def sample(command: Command) -> Command:
    return functools.partial(command, "sample")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_random_model("sd15", folder / "model")
    long = "a photo of " * 20
    (folder / "prompts.txt").write_text(f"a red circle\na blue square\n\n{long}\n")
    return folder


def test_draws_goes_on_and_refuses_other_settings(sample: Command, folder: Path, tmp_path: Path) -> None:
    arguments = [f"--model={folder / 'model'}", f"--prompts={folder / 'prompts.txt'}", f"--output={tmp_path / 'out'}"]
    arguments += ["--steps=2", "--seeds=2", "--seed=4", "--batch_size=4"]
    first = sample(*arguments)
    assert first.returncode == 0, first.stderr
    scheduler = "sampler ddim (the model's scheduler is DDIMScheduler), 2 steps"
    assert f"6 images (3 prompts) of 32 x 32 pixels in batches of 4: {scheduler}" in first.stderr
    assert "1 of 3 prompts are longer than the model can read" in first.stderr
    assert first.stdout.startswith(f"6 images in {tmp_path / 'out'}: 6 drawn in ")
    entries = read_list(tmp_path / "out")
    assert [(entry.prompt, entry.seed) for entry in entries[:2]] == [("a red circle", 4), ("a red circle", 5)]
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert settings["model"].startswith("sd15-")
    assert (settings["sampler"], settings["steps"], settings["dtype"]) == ("ddim", 2, "float32")

    lost = tmp_path / "out" / entries[3].image
    before = read_image(lost)
    lost.unlink()
    second = sample(*arguments)
    assert second.returncode == 0, second.stderr
    assert ": 1 drawn in " in second.stdout
    assert second.stdout.endswith(" s, 5 existed already\n")
    assert np.abs(read_image(lost).astype(int) - before).max() <= 1  # in a batch of another number

    third = sample(*arguments, "--sampler=euler", "--guidance=2")
    assert third.returncode == 1
    assert "(guidance: 7.5 there, 2.0 now; sampler: 'ddim' there, 'euler' now)" in third.stderr
    assert len(third.stderr.strip().splitlines()) == 1


def test_a_given_image_is_gone_on_from(sample: Command, tmp_path: Path) -> None:
    """A lower strength stays nearer to the image: a few steps leave most of a black cross, whatever the prompt."""
    arguments = ["--model=dpo_jax/tiny/model", "--steps=10", "--guidance=2.5"]
    image = tmp_path / "cross.png"
    Image.fromarray(world.render("a black cross at the top left", np.random.default_rng(0))).save(image)
    distances = []
    for strength in (0.2, 1.0):
        output = tmp_path / f"{strength}"
        given = [
            "--prompts=a red circle at the top left",
            f"--init_image={image}",
            f"--strength={strength}",
            "--seed=9",
        ]
        done = sample(*arguments, f"--output={output}", *given)
        assert done.returncode == 0, done.stderr
        drawn = read_image(output / read_list(output)[0].image)
        distances.append(np.abs(drawn.astype(float) - read_image(image)).mean())
    assert distances[0] < 0.5 * distances[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model or --workdir"),
        (["--model=M", "--workdir=W"], "give either --model or --workdir"),
        (["--workdir=W", "--dtype=float32"], "--dtype goes with --model"),
        (["--workdir=W"], "no training run at W"),
        (["--model=M", "--strength=0.5"], "--init_image is missing"),
        (["--model=M", "--sampler=heun"], "value should be one of <ddim|euler|"),
        (["--model=M", "--steps=0"], "--steps=0: 0 is not a positive integer"),
        (["--model=M", "--resolution=30"], "resolution=30 must be a multiple of 8 pixels"),
        (
            ["--model=M", "--init_image=I", "--strength=1.5"],
            "1.5 is not a number in the range [0.0, 1.0]",
        ),
        (["--model=M", "--prompts=absent.txt"], "no prompts at absent.txt"),
        (["--model=M", "--lora=absent.safetensors"], "absent.safetensors"),
        (["--model=M", "--seed=4294967295", "--seeds=2"], "goes past the largest seed"),
        (["--model=absent"], "no folder or file absent"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    sample: Command, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [argument.replace("=M", f"={folder / 'model'}") for argument in arguments]
    given = [argument.replace("=I", f"={folder / 'prompts.txt'}") for argument in given]
    done = sample(f"--prompts={folder / 'prompts.txt'}", f"--output={tmp_path / 'out'}", *given)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_flag_offers_the_samplers_there_are(sample: Command) -> None:
    said = " ".join(sample("--help").stdout.split())
    assert f"One of {', '.join(SAMPLERS)}." in said
    assert "<ddim|" not in said
    assert "repeat this option" not in said


def test_a_damaged_model_is_one_sentence(sample: Command, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "model", tmp_path / "model")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    done = sample(f"--model={broken}", f"--prompts={folder / 'prompts.txt'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
