"""The export command: each format opens in PyTorch, says how it was made, and refuses what can't be."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from dpo_jax.cli import flatten, load_config
from dpo_jax.methods import METHODS
from dpo_jax.models.random_model import write_random_model
from dpo_jax.training.checkpoint import read_config
from dpo_jax.training.export import export, exportable_model, exportable_run
from dpo_jax.training.model_card import model_card
from dpo_jax.training.model_origin import Origin
from dpo_jax.training.run import open_run
from dpo_jax.training.trainer import train

ROOT = Path(__file__).parents[2]
BIG = 10**10


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """All weights of an SD1.5 UNet trained for 2 steps."""
    workdir = tmp_path_factory.mktemp("run")
    train(tiny_config("sd15", steps=2, **{"validation.every": 2}), workdir)
    return workdir


def unet_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_every_format_of_a_tuned_model_holds_the_same_unet(run, tmp_path):
    tuned = exportable_run(run)
    paths = {
        f: export(tuned, tmp_path / f, format=f, dtype=None, max_shard_bytes=BIG)
        for f in ("diffusers", "unet", "single")
    }
    assert paths["single"] == tmp_path / "single" / "single.safetensors"
    unets = [
        diffusers.StableDiffusionPipeline.from_pretrained(paths["diffusers"]).unet.state_dict(),
        diffusers.UNet2DConditionModel.from_pretrained(paths["unet"]).state_dict(),
        diffusers.StableDiffusionPipeline.from_single_file(
            paths["single"], config=str(run / "model"), local_files_only=True
        ).unet.state_dict(),
    ]
    assert same(unets[0], unets[1])
    assert same(unets[0], unets[2])
    assert not same(unets[0], unet_of(run / "model" / "unet"))
    half = export(tuned, tmp_path / "half", format="diffusers", dtype="float16", max_shard_bytes=BIG)
    for component in ("unet", "vae"):
        assert {str(x.dtype) for x in unet_of(half / component).values()} == {"torch.float16"}


def test_model_card_says_how_it_was_made_and_what_was_measured(run, tmp_path):
    (run / "result.json").write_text(
        json.dumps(
            {"win_rate": 0.625, "win_rate_low": 0.5, "win_rate_high": 0.75, "ties": 2, "comparisons": 40}
            | {"base_score": 0.5, "tuned_score": 0.75}
        )
    )
    try:
        export(exportable_run(run), tmp_path / "mine", format="unet", dtype=None, max_shard_bytes=BIG)
    finally:
        (run / "result.json").unlink()
    card = (tmp_path / "mine" / "README.md").read_text()
    front, text = re.fullmatch(r"---\n(.*?)---\n(.*)", card, re.DOTALL).groups()
    front = yaml.safe_load(front)
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert "base_model" not in front  # a made model has no hub id
    assert "trained by [Diffusion-DPO](https://arxiv.org/abs/2311.12908) for 2 steps" in text
    assert "62.5%, 95% confidence interval [50.0%, 75.0%], 40 comparisons" in text
    assert "| pair_accuracy |" in text
    config = json.loads(re.search(r"```json\n(.*)```", text, re.DOTALL)[1])
    assert config == read_config(run)


@pytest.mark.parametrize(
    ("spec", "tag"),
    [
        *(("sd15:tiny", "dpo"), ("d3po:tiny", "d3po"), ("d3po:ddpo,tiny", "ddpo"), ("d3po:dpok,tiny", "dpok")),
        *(("d3po:grpo,tiny", "grpo"), ("d3po:spo,tiny", "spo"), ("d3po:lpo", "lpo"), ("flow_grpo:tiny", "flow_grpo")),
    ],
)
def test_model_card_names_the_method(run, spec, tag):
    file, _, variant = spec.partition(":")
    facts = {"config": flatten(load_config(f"{ROOT}/configs/{file}.py:{variant}")), "step": 1, "validation": {}}
    card = model_card(facts, open_run(run).pipeline, "unet", "mine", "float32", Origin(None, None))
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["text-to-image", tag, "dpo_jax"]
    assert f"trained by {METHODS[tag].citation} for" in card


def test_the_cards_code_opens_the_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for format, dtype in (("diffusers", None), ("unet", None), ("diffusers", "float16")):
        shutil.rmtree(tmp_path / format, ignore_errors=True)
        export(exportable_run(run), tmp_path / format, format=format, dtype=dtype, max_shard_bytes=BIG)
        code = re.search(r"```python\n(.*?)```", (tmp_path / format / "README.md").read_text(), re.DOTALL)[1]
        names: dict[str, object] = {}
        # The run's model is "random:sd15", made in its work directory.
        exec(code.replace("random:sd15", str(run / "model")), names)
        assert isinstance(names["pipe"], diffusers.StableDiffusionPipeline)
        assert names["pipe"].text_encoder.dtype == names["pipe"].unet.dtype  # or it could not draw
        assert same(
            names["pipe"].unet.state_dict(), unet_of(tmp_path / ("diffusers/unet" if format == "diffusers" else "unet"))
        )


@pytest.mark.parametrize("format", ["lora", "kohya"])
def test_a_fully_trained_model_has_no_lora_to_write(run, tmp_path, format):
    with pytest.raises(ValueError, match=rf"--format={format} writes a LoRA, but .* has none"):
        export(exportable_run(run), tmp_path / "out", format=format, dtype=None, max_shard_bytes=BIG)
    assert not list(tmp_path.iterdir())


def test_command_converts_without_training_there_and_back(command, tmp_path):
    write_random_model("sdxl", tmp_path / "model", dtype="float16")
    single = command("export", f"--model={tmp_path}/model", f"--output={tmp_path}/one", "--format=single")
    assert single.returncode == 0, single.stderr
    assert f"exported {tmp_path}/model to {tmp_path}/one/one.safetensors" in single.stdout
    back = command(
        "export",
        f"--model={tmp_path}/one/one.safetensors",
        f"--model_config={tmp_path}/model",
        f"--output={tmp_path}/back",
    )
    assert back.returncode == 0, back.stderr
    for component in ("unet", "vae"):
        assert same(unet_of(tmp_path / "back" / component), unet_of(tmp_path / "model" / component))

    # Without its configs at hand, the file's family is known and so is what to fetch.
    offline = command("export", f"--model={tmp_path}/one/one.safetensors", f"--output={tmp_path}/never")
    assert offline.returncode == 1
    assert offline.stderr.count("\n") == 1
    assert "stabilityai/stable-diffusion-xl-base-1.0" in offline.stderr
    assert "--local-dir" in offline.stderr
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --workdir (a training run) or --model"),
        (["--workdir=a", "--model=b"], "either --workdir (a training run) or --model"),
        (["--workdir=a", "--lora=b"], "--lora goes with --model"),
        (["--model=b", "--step=2"], "--step goes with --workdir; a model has no steps"),
        (["--workdir=a"], "no training run at a"),
        (["--model=b"], "no folder or file b, and it is not a hub id"),
    ],
)
def test_command_refuses(command, tmp_path, flags, message):
    result = command("export", f"--output={tmp_path}/out", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_lora_converts_to_every_format(tmp_path):
    """One LoRA in kohya's and diffusers' format merges to the same float32 weights, whatever dtype the base has."""
    write_random_model("sd15", tmp_path / "model", dtype="float16")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    state = {f"unet.{n}".replace(".default", ""): p.detach() for n, p in pipe.unet.named_parameters() if "lora_" in n}
    assert len(state) > 10
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        {n.removeprefix("unet."): p for n, p in state.items()},
        unet_lora_adapter_metadata=config.to_dict(),
    )
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    fused = pipe.unet.state_dict()

    first = exportable_model(str(tmp_path / "model"), lora=str(tmp_path / "lora"))
    file = export(first, tmp_path / "web", format="kohya", dtype=None, max_shard_bytes=BIG)
    for lora, output in ((tmp_path / "lora", "a"), (file, "b")):
        tuned = exportable_model(str(tmp_path / "model"), lora=str(lora))
        folder = export(tuned, tmp_path / output, format="unet", dtype=None, max_shard_bytes=BIG)
        merged = unet_of(folder)
        assert merged.keys() == fused.keys()
        for name in merged:
            np.testing.assert_allclose(merged[name], fused[name], rtol=1e-5, atol=1e-6)
