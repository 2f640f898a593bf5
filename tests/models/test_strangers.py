"""A model from somebody else starts no code: neither its Python files nor the classes that its files name."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.generate import Sampling
from dpo_jax.sampling.loaded_model import open_model
from dpo_jax.training.export import export, exportable_model


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a module in every place that may be searched, which is named in every file that may name a class."""
    model = tmp_path / "model"
    write_random_model("sd15", model)
    evil = f"open({str(tmp_path / 'marker')!r}, 'a').write('imported')\n"
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        (folder / "evil.py").write_text(evil)
    (model / "pipeline.py").write_text(evil)
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")}
    edit(model / "text_encoder/config.json", _auto_map=auto_map, tokenizer_class="evil.Evil")
    edit(model / "tokenizer/tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil", processor_class="Evil")
    edit(model / "model_index.json", _class_name="EvilPipeline", custom_pipeline="evil", extra=["evil", "Evil"])
    (model / "extra").mkdir()
    (model / "extra" / "evil.py").write_text(evil)
    (model / "extra" / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(str(model))
    return model


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nothing_ran(model: Path) -> bool:
    return not (model.parent / "marker").exists() and "evil" not in sys.modules


def test_drawing_and_exporting_run_nothing_of_it(stranger: Path, tmp_path: Path) -> None:
    opened = open_model(str(stranger), dtype=jnp.float32)
    generator = opened.generator(Sampling(1, 0.0, "ddim"), resolution=32, batch_size=1)
    generator(opened.denoiser, ["a red circle"], [0])
    options: dict[str, Any] = {"dtype": None, "max_shard_bytes": 10**9}
    export(exportable_model(str(stranger), lora=None), tmp_path / "exported", format="diffusers", **options)
    assert nothing_ran(stranger)
    assert not list((tmp_path / "exported").rglob("*.py"))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "exported"}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_classes_are_of_a_closed_list(stranger: Path, component: str) -> None:
    if component == "scheduler":
        edit(stranger / "scheduler/scheduler_config.json", _class_name="evil.Evil")
    else:
        edit(stranger / "model_index.json", **{component: ["evil", "Evil"]})
    with pytest.raises(ValueError, match=r"evil\.Evil"):
        load_pipeline(stranger, dtype="float32")
    assert nothing_ran(stranger)


def test_auto_map_in_a_network_s_config_is_refused(stranger: Path) -> None:
    for folder in ("unet", "vae", "text_encoder"):
        path = stranger / folder / "config.json"
        before = path.read_text()
        edit(path, auto_map={"AutoModel": "evil.Evil"})
        with pytest.raises(ValueError, match=f"{folder}/config.json: .*unknown field auto_map"):
            load_pipeline(stranger, dtype="float32")
        path.write_text(before)
    assert nothing_ran(stranger)


class Evil:
    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_pickles_are_not_opened_whatever_they_are_called(stranger: Path, tmp_path: Path, name: str) -> None:
    (stranger / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (stranger / "unet" / name).write_bytes(pickle.dumps(Evil(str(tmp_path / "marker"))))
    with pytest.raises(ValueError, match="can run code"):
        load_pipeline(stranger, dtype="float32").load("unet", dtype="float32")
    assert nothing_ran(stranger)
