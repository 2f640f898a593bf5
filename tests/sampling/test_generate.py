"""The same weights, noise and scheduler give the same image as the pipelines of PyTorch diffusers."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.utils import torch_utils

from dpo_jax.diffusion.samplers import SAMPLERS
from dpo_jax.diffusion.steps import step_noise
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.training.defaults import FIELDS
from dpo_jax.training.model import load_tokenizers_of

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red circle", "a blue square of the photo", "the green circle"]
SEEDS = [3, 4, 2**32 - 1]
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


class Model:
    """A random model, ours and in PyTorch."""

    def __init__(self, family: str, folder: Path):
        write_random_model(family, folder)
        self.pipeline: Pipeline = load_pipeline(folder, dtype=jnp.float32, family=family)
        self.weights = {name: self.pipeline.load(name, dtype=jnp.float32) for name in self.pipeline.components}
        self.theirs = diffusers.DiffusionPipeline.from_pretrained(folder)

    def generator(self, sampling: Sampling, batch_size: int = 3) -> Generator:
        tokenizers, placement = load_tokenizers_of(self.pipeline), Placement(make_mesh())
        options = {"resolution": 32, "batch_size": batch_size}
        return Generator(self.pipeline, lambda: self.weights, tokenizers, placement, sampling, **options)

    def draw(self, sampling: Sampling, images: np.ndarray | None = None) -> np.ndarray:
        return self.generator(sampling)(self.weights["unet"], CAPTIONS, SEEDS, images)

    def draw_theirs(self, sampling: Sampling, images: np.ndarray | None = None) -> np.ndarray:
        pipe = self.theirs
        options = {"height": 32, "width": 32}
        if images is not None:
            kind = "XLImg2Img" if self.pipeline.family.num_time_ids else "Img2Img"
            names = ("requires_safety_checker", "requires_aesthetics_score", "force_zeros_for_empty_prompt")
            extra = {name: pipe.config[name] for name in names if name in pipe.config}
            pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**pipe.components, **extra)
            options = {"image": torch.tensor(images.transpose(0, 3, 1, 2) / 255.0), "strength": sampling.strength}
        if sampling.guidance_rescale:
            options["guidance_rescale"] = sampling.guidance_rescale
        own = pipe.scheduler
        try:
            if sampling.sampler:
                extra = {"clip_sample": False} if sampling.sampler == "ddim" else {}
                pipe.scheduler = getattr(diffusers, CLASSES[sampling.sampler]).from_config(own.config, **extra)
            pipe.set_progress_bar_config(disable=True)
            result = pipe(
                CAPTIONS,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                negative_prompt=[sampling.negative_prompt] * 3 if sampling.negative_prompt else None,
                output_type="np",
                **options,
            ).images
        finally:
            pipe.scheduler = own
        return np.round(result * 255)


def our_noise(of_image: bool) -> Iterator[jax.Array]:
    """Our noise in the order in which diffusers asks for it: posterior, start, steps."""
    keys_N = jax.vmap(jax.random.key)(np.array(SEEDS, np.uint32))
    like_NHWC = jnp.zeros((3, 8, 8, 4))
    if of_image:
        yield jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (1, 8, 8, 4)))(keys_N)[:, 0]
    yield jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(keys_N)
    for i in range(1000):
        yield step_noise(jax.vmap(jax.random.fold_in, (0, None))(keys_N, 1), i, like_NHWC)


@pytest.fixture
def with_our_noise() -> Iterator[Callable[[bool], None]]:
    """Make PyTorch return our noise as its random numbers."""
    original = torch_utils.randn_tensor

    def set_everywhere(draw: Callable[..., torch.Tensor]) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and "randn_tensor" in vars(module):
                module.randn_tensor = draw  # type: ignore[attr-defined]

    def replace(of_image: bool = False) -> None:
        noises = our_noise(of_image)

        def draw(*_: object, **__: object) -> torch.Tensor:
            return torch.from_numpy(np.array(next(noises)).transpose(0, 3, 1, 2))

        set_everywhere(draw)

    yield replace
    set_everywhere(original)  # also where a module was imported meanwhile, which monkeypatch would not know of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    opened: dict[str, Model] = {}

    def open_once(family: str) -> Model:
        if family not in opened:
            opened[family] = Model(family, tmp_path_factory.mktemp("models") / family)
        return opened[family]

    return open_once


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2
    assert ours.std() > 10  # images, not one colour


@pytest.mark.parametrize("sampler", CLASSES)
def test_each_sampler_draws_what_diffusers_draws(models, with_our_noise, sampler):
    sampling = Sampling(steps=5, guidance=3.0, sampler=sampler)
    with_our_noise()
    assert_same(models("sdxl").draw(sampling), models("sdxl").draw_theirs(sampling))


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        ("sd15", Sampling(5, 7.5, negative_prompt="a photo")),
        ("sd21", Sampling(5, 7.5, "euler", guidance_rescale=0.7)),
        ("sdxl", Sampling(4, 5.0, negative_prompt="the red", guidance_rescale=0.3)),
        ("sdxl_turbo", Sampling(1, 0.0)),
        ("sdxl_turbo", Sampling(4, 0.0)),
    ],
)
def test_each_family_draws_what_diffusers_draws(models, with_our_noise, family, sampling):
    with_our_noise()
    assert_same(models(family).draw(sampling), models(family).draw_theirs(sampling))


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        ("sd15", Sampling(6, 4.0, "ddim", strength=0.6)),
        pytest.param("sd21", Sampling(6, 4.0, "dpmsolver++", strength=1.0), marks=pytest.mark.slow),
        pytest.param("sdxl", Sampling(6, 4.0, "euler", strength=0.5), marks=pytest.mark.slow),
        pytest.param("sdxl_turbo", Sampling(4, 0.0, strength=0.5), marks=pytest.mark.slow),
        pytest.param("sdxl_refiner", Sampling(10, 4.0, strength=0.3), marks=pytest.mark.slow),
    ],
)
def test_an_image_goes_on_as_in_diffusers(models, with_our_noise, family, sampling):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    with_our_noise(of_image=True)
    assert_same(models(family).draw(sampling, images), models(family).draw_theirs(sampling, images))


def test_an_image_depends_on_its_prompt_and_seed_alone(models):
    model = models("sd15")
    sampling = Sampling(5, 4.0, "euler_ancestral")
    captions, seeds = [CAPTIONS[i % 3] for i in range(8)], list(range(8))
    together = model.generator(sampling, batch_size=8)
    alone = model.generator(sampling, batch_size=1)
    images = together(model.weights["unet"], captions, seeds)
    one_by_one = alone(model.weights["unet"], captions, seeds)
    assert np.abs(images.astype(int) - one_by_one).max() <= 1
    shuffled = together(model.weights["unet"], captions[::-1][:5], seeds[::-1][:5])  # and a batch that isn't full
    assert np.abs(images[::-1][:5].astype(int) - shuffled).max() <= 1
    np.testing.assert_array_equal(together.starting_noise(seeds)[3:4], alone.starting_noise([3]))
    assert np.abs(images[0].astype(int) - images[3]).max() > 20  # the same caption, another seed


def test_devices_change_no_image(models, tmp_path):
    """Eight devices, the model split over four, in a process of its own, because JAX counts devices only once."""
    code = f"""
import sys
import jax.numpy as jnp, numpy as np
from dpo_jax import sharding
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.training.model import load_tokenizers_of
sharding.SMALL = 1024  # or nothing of this model would be split
pipeline = load_pipeline(sys.argv[1], dtype=jnp.float32)
placement = sharding.Placement(sharding.make_mesh(-1, 4))
weights = {{name: pipeline.load(name, dtype=jnp.float32, sharding=placement) for name in pipeline.components}}
generator = Generator(pipeline, lambda: weights, load_tokenizers_of(pipeline), placement,
                      Sampling(5, 4.0, "euler_ancestral"), resolution=32, batch_size=3)
assert generator.batch_size == 8
np.save(sys.argv[2], generator(weights["unet"], {CAPTIONS!r}, {SEEDS!r}))
"""
    model = models("sdxl")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", code, str(model.pipeline.folder), str(tmp_path / "images.npy")]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    on_one = model.draw(Sampling(5, 4.0, "euler_ancestral"))
    assert np.abs(on_one.astype(int) - np.load(tmp_path / "images.npy")).max() <= 1


def test_compiles_once_for_all_batches(models):
    model = models("sd15")
    generator = model.generator(Sampling(2, 4.0), batch_size=2)
    batches = list(generator.batches(model.weights["unet"], CAPTIONS, SEEDS))
    assert [len(batch) for batch in batches] == [2, 1]
    assert generator._generate._cache_size() == 1


@pytest.mark.parametrize(
    ("sampling", "resolution", "message"),
    [
        (Sampling(5, 4.0, "heun"), 32, "there is no sampler 'heun'; choose one of ddim"),
        (Sampling(5, 4.0), 36, "resolution=36 must be a multiple of 8 pixels"),
        (Sampling(5, 4.0, strength=0.1), 32, "less than one"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(models, sampling, resolution, message):
    pipeline = models("sd15").pipeline
    with pytest.raises(ValueError, match=message):
        Generator(
            pipeline,
            dict,
            load_tokenizers_of(pipeline),
            Placement(make_mesh()),
            sampling,
            resolution=resolution,
            batch_size=1,
        )


def test_a_seed_out_of_range_is_an_error(models):
    model = models("sd15")
    with pytest.raises(ValueError, match=r"seeds -1 to 2 must be from 0 to 4294967295"):
        model.generator(Sampling(2, 1.0))(model.weights["unet"], CAPTIONS, [-1, 2, 0])


def test_configs_offer_the_samplers_there_are():
    assert FIELDS["sample.sampler"].choices == ("", *SAMPLERS)
