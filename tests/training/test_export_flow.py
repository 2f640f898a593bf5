"""Exported flow models open in diffusers, which draws the same images as dpo_jax for the same noise."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.training.export import Exportable, export, exportable_model, exportable_run
from dpo_jax.training.model import load_tokenizers_of, open_model
from dpo_jax.training.trainer import train
from dpo_jax.weights.layout import Specs
from dpo_jax.weights.lora_files import Adapter
from dpo_jax.weights.lora_write import write_peft

CAPTIONS, SEEDS = ["a red circle", "a blue square of the photo"], [3, 4]
SAMPLING = Sampling(steps=4, guidance=3.0)
LENGTH = 20  # tokens of T5 and Qwen3, whose chat has 8 beside the caption
# Class of the pipeline, and what it is given for SAMPLING; FLUX.1 is told the scale.
PIPELINES: dict[str, tuple[Any, float]] = {
    "sd3": (diffusers.StableDiffusion3Pipeline, 3.0),
    "flux": (diffusers.FluxPipeline, 3.0),
    "z_image": (diffusers.ZImagePipeline, 2.0),
}
FORMATS = ("diffusers", "transformer", "single", "lora", "kohya")
MARKS = {
    "sd3": ("5-medium", "stable-diffusion-3-5-medium", "https://github.com/Stability-AI/generative-models"),
    "flux": ("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
    "z_image": ("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
}


class Exported(NamedTuple):
    """A random model with a LoRA, and its exports in folders called by their formats beside it."""

    family: str
    folder: Path
    tuned: Exportable
    images: np.ndarray
    """What dpo_jax draws with the LoRA."""
    plain: np.ndarray
    """What it draws without."""
    noise_NhwC: np.ndarray

    def draw(self, pipe: Any, guidance: float | None = None) -> np.ndarray:
        """Return what diffusers draws from the same noise."""
        noise = torch.tensor(self.noise_NhwC.transpose(0, 3, 1, 2))
        if self.family == "flux":  # takes packed noise
            noise = pipe._pack_latents(noise, *noise.shape)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(
            list(CAPTIONS),  # ZImagePipeline changes it
            latents=noise,
            num_inference_steps=SAMPLING.steps,
            guidance_scale=PIPELINES[self.family][1] if guidance is None else guidance,
            height=32,
            width=32,
            max_sequence_length=LENGTH,
            output_type="np",
        )
        return np.round(result.images * 255)

    def opened(self) -> Any:
        return PIPELINES[self.family][0].from_pretrained(self.folder / "base")


def random_lora(specs: Specs) -> Adapter:
    """A LoRA of some attention and MLP layers, strong enough to be seen."""
    random, params, alphas = np.random.default_rng(0), {}, {}
    for name, spec in specs.items():
        if re.search(r"(to_q|to_out\.0|net\.2|w2)\.kernel$", name):
            layer, (inputs, outputs) = name.removesuffix(".kernel"), spec.shape
            params[f"{layer}.lora_A.kernel"] = random.normal(0, inputs**-0.5, (inputs, 2)).astype(np.float32)
            params[f"{layer}.lora_B.kernel"] = random.normal(0, 0.5, (2, outputs)).astype(np.float32)
            alphas[layer] = 4.0
    return Adapter(params, alphas)


@pytest.fixture(scope="module", params=list(PIPELINES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    write_random_model(request.param, folder / "base")
    pipeline = load_pipeline(folder / "base", dtype=jnp.float32, text_length=LENGTH)
    options = {"dtype": "float32", "component": "transformer"}
    write_peft(folder / "lora.safetensors", random_lora(pipeline.denoiser.specs), pipeline.denoiser.specs, **options)
    tuned = exportable_model(str(folder / "base"), lora=str(folder / "lora.safetensors"))
    for format in FORMATS:
        export(tuned, folder / format, format=format, dtype=None, max_shard_bytes=10**10)

    weights = {name: pipeline.load(name, dtype=jnp.float32) for name in pipeline.components}
    generator = Generator(
        pipeline,
        lambda: weights,
        load_tokenizers_of(pipeline),
        Placement(make_mesh()),
        SAMPLING,
        resolution=32,
        batch_size=len(SEEDS),
    )
    merged = {name: jnp.asarray(value) for name, value in tuned.denoiser.items()}
    images, plain = (generator(params, CAPTIONS, SEEDS) for params in (merged, weights["transformer"]))
    noise = np.asarray(generator.starting_noise(SEEDS))
    return Exported(request.param, folder, tuned, images.astype(int), plain.astype(int), noise)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "diffusion_pytorch_model.safetensors")


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def code_of(card: str, replaced: Mapping[str, str]) -> dict[str, Any]:
    """Run a card's code, and return its variables."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    for old, new in replaced.items():
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_diffusers_draws_what_dpo_jax_draws(exported: Exported) -> None:
    theirs = PIPELINES[exported.family][0].from_pretrained(exported.folder / "diffusers")
    assert np.abs(exported.images - exported.draw(theirs)).max() <= 2
    assert np.abs(exported.images - exported.plain).max() > 20  # the LoRA is seen
    assert exported.images.std() > 10  # images, not plain colours
    assert np.abs(exported.images - exported.draw(theirs, guidance=1.0)).max() > 2  # and so is guidance


@pytest.mark.parametrize("format", ["lora", "kohya"])
def test_loras_change_the_image_in_diffusers_as_here(format: str, exported: Exported) -> None:
    if format == "kohya" and exported.family != "z_image":
        pytest.skip("diffusers does not read kohya's names for SD3, and for FLUX.1 at its own width alone")
    theirs = exported.opened()
    theirs.load_lora_weights(exported.folder / format)
    assert np.abs(exported.images - exported.draw(theirs)).max() <= 2
    theirs.unload_lora_weights()
    assert np.abs(exported.plain - exported.draw(theirs)).max() <= 2


def test_the_transformer_is_the_same_in_every_format(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.folder)
    whole = state_of(exported.folder / "diffusers" / "transformer")
    assert_same(state_of(exported.folder / "transformer"), whole)
    reopened = load_pipeline(
        exported.folder / "single" / "single.safetensors", dtype="float32", model_config=str(exported.folder / "base")
    )
    merged = reopened.read("transformer")
    assert all(np.array_equal(merged[name], value) for name, value in exported.tuned.denoiser.items())


@pytest.mark.parametrize("format", FORMATS)
def test_the_cards_code_opens_the_model(format: str, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    family, folder = exported.family, exported.folder
    monkeypatch.chdir(folder)
    card = (folder / format / "README.md").read_text()
    assert "prediction" not in card
    assert "rescale_betas" not in card
    assert "Scheduler: FlowMatchEulerDiscreteScheduler, `shift=" in card
    assert ("guidance of dpo_jax minus 1" in card) == (family == "z_image")
    if family == "flux" and format in ("single", "kohya"):
        pytest.skip("diffusers reads them at FLUX.1's own width alone")
    if family == "sd3" and format == "kohya":
        assert "but not of SD3; --format=lora writes one for it" in card
        return
    # Configs of single files come from the hub.
    file = "'single/single.safetensors'"
    local = {f"from_single_file({file})": f"from_single_file({file}, config='base', local_files_only=True)"}
    pipe = code_of(card, local)["pipe"]
    assert type(pipe) is PIPELINES[family][0]
    if format in ("diffusers", "transformer", "single"):
        assert_same(pipe.transformer.state_dict(), state_of(folder / "diffusers" / "transformer"))
    else:
        assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


def test_files_say_what_they_are(exported: Exported) -> None:
    base_model_version, architecture, implementation = MARKS[exported.family]
    for format, file in (
        ("single", "single.safetensors"),
        ("lora", "pytorch_lora_weights.safetensors"),
        ("kohya", "kohya.safetensors"),
    ):
        with safe_open(exported.folder / format / file, "np") as opened:
            found, names = opened.metadata(), set(opened.keys())
        assert not names & {"v_pred", "ztsnr"}
        assert "modelspec.prediction_type" not in found
        assert found["modelspec.architecture"] == architecture + ("" if format == "single" else "/lora")
        assert found["modelspec.implementation"] == ("diffusers" if format == "lora" else implementation)
        assert found.get("ss_base_model_version") == (base_model_version if format == "kohya" else None)
    whole = {"model.diffusion_model", "first_stage_model", "text_encoders"} if exported.family == "sd3" else set()
    with safe_open(exported.folder / "single" / "single.safetensors", "np") as opened:
        beginnings = {re.match(r"(model\.)?\w+", name)[0] for name in opened.keys()}  # noqa: SIM118
    assert (beginnings == whole) if whole else not beginnings & {"vae", "text_encoders", "first_stage_model"}


@pytest.mark.usefixtures("no_network")
def test_a_run_of_all_weights_is_exported_with_its_fixed_table(tiny_config: Callable, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    train(tiny_config("sd35", steps=1, **{"ema.decay": 0.0}), workdir)
    tuned = exportable_run(workdir)
    folder = export(tuned, tmp_path / "tuned", format="diffusers", dtype=None, max_shard_bytes=10**10)
    base, state = state_of(workdir / "model" / "transformer"), state_of(Path(folder) / "transformer")
    assert state.keys() == base.keys()
    assert torch.equal(state["pos_embed.pos_embed"], base["pos_embed.pos_embed"])
    assert sum(not torch.equal(state[name], base[name]) for name in base) == 1
    opened = diffusers.SD3Transformer2DModel.from_pretrained(Path(folder) / "transformer")
    assert_same(opened.state_dict(), state)
    card = (Path(folder) / "README.md").read_text()
    assert "All weights of the transformer of random:sd3, trained by" in card
    single = export(tuned, tmp_path / "one", format="single", dtype=None, max_shard_bytes=10**10)
    assert torch.equal(load_file(single)["model.diffusion_model.pos_embed"], base["pos_embed.pos_embed"])


def test_a_scale_for_a_model_that_is_not_told_one(tiny_config: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.guidance=1.0 is for models that are told .* this sd3 is not. Leave"):
        open_model(tiny_config("sd35", guidance=1.0), tmp_path)
