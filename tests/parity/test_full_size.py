"""Networks at full size, random weights, float32: PyTorch's outputs and ours, of every network of SD1.5 and SDXL, and
of SD3.5-medium's transformer.

The model is a folder as published ones are, 4 to 7 GB large. The frameworks run one after the other, a process for
each network that starts this file and reports its number of parameters and its peak memory. SD1.5 takes three minutes
and 4 GB of memory, SDXL seven and 12, SD3.5-medium's transformer three and 13.

N samples, H x W pixels or latent cells, C channels, L tokens, D context width, P pooled width, T time ids.
"""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.batch import Conditioning
from dpo_jax.models import random_model
from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.network import Network, network_of
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.models.random_model import random_params, write_random_model
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig
from dpo_jax.weights.io import load_params, save_component
from dpo_jax.weights.layout import Specs

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
MEMORY_GB = 20

UNETS = {family: json.loads((PUBLISHED / family / "unet" / "config.json").read_text()) for family in ("sd15", "sdxl")}
VAE = random_model.VAE | {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L = random_model.CLIP_L | {
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published, though the token is 49407
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_BIG_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
START, END = 49406, 49407

# Family -> component -> config.json, and how many parameters the published model has.
MODELS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "sd15": {
        "unet": (UNETS["sd15"], 859_520_964),
        "vae": (VAE, 83_653_863),
        "text_encoder": (CLIP_L, 123_060_480),
    },
    "sdxl": {
        "unet": (UNETS["sdxl"], 2_567_463_684),
        "vae": (VAE, 83_653_863),
        "text_encoder": (CLIP_L, 123_060_480),
        "text_encoder_2": (CLIP_BIG_G, 694_659_840),
    },
    "sd35_medium": {"transformer": (SD35_MEDIUM, 2_243_171_520 + 384**2 * 1536)},
}
# Family -> dtype on disk, and the largest file: SDXL's UNet, stored in half the size, comes in two.
STORED = {"sd15": ("float32", 10 * 10**9), "sdxl": ("float16", 3 * 10**9), "sd35_medium": ("float16", 3 * 10**9)}


class RandomParams(Mapping[str, np.ndarray]):
    """`random_params` made one at a time, when asked for."""

    def __init__(self, specs: Specs):
        self.specs = specs

    def __getitem__(self, name: str) -> np.ndarray:
        return random_params({name: self.specs[name]}, seed=zlib.crc32(name.encode()))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def sd3_transformer() -> Network:
    config = SD3TransformerConfig.from_dict(SD35_MEDIUM, "transformer")
    return network_of(SD3Transformer2DModel, config, dtype="float32")


def write_model(family: str, folder: Path) -> None:
    """A tiny model in which every network is replaced by that of full size, or one network alone."""
    dtype, max_shard_bytes = STORED[family]
    if family == "sd35_medium":
        specs = sd3_transformer().specs
        params = RandomParams(specs)
        save_component(folder / "transformer", SD35_MEDIUM, params, specs, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return
    write_random_model(family, folder)
    for name, (config, _) in MODELS[family].items():
        (folder / name / "config.json").write_text(json.dumps(config))
    for name, network in load_pipeline(folder, dtype="float32").components.items():
        shutil.rmtree(folder / name)
        config, params = MODELS[family][name][0], RandomParams(network.specs)
        save_component(folder / name, config, params, network.specs, dtype=dtype, max_shard_bytes=max_shard_bytes)


def make_inputs(family: str, component: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    if component == "unet":
        context_NLD = normal(2, 77, UNETS[family]["cross_attention_dim"])
        inputs = {"x_NHWC": normal(2, 32, 32, 4), "t_N": np.array([20, 981]), "context_NLD": context_NLD}
        if family == "sdxl":
            time_ids_NT = np.array([[1024, 1024, 0, 0, 1024, 1024], [768, 1152, 16, 32, 832, 1216]], np.float32)
            inputs |= {"pooled_NP": normal(2, 1280), "time_ids_NT": time_ids_NT}
        return inputs
    if component == "transformer":
        context_NLD, pooled_NP = normal(2, 77 + 128, 4096), normal(2, 2048)
        t_N = np.array([20.5, 981.25], np.float32)
        return {"x_NHWC": normal(2, 32, 32, 16), "t_N": t_N, "context_NLD": context_NLD, "pooled_NP": pooled_NP}
    if component == "vae":
        return {"images_NHWC": np.tanh(normal(1, 256, 256, 3)), "latents_NHWC": normal(1, 32, 32, 4)}
    # SDXL's second tokenizer pads with its first token.
    token_ids_NL = np.full((2, 77), 0 if component == "text_encoder_2" else END)
    for row, length in zip(token_ids_NL, (12, 75), strict=True):
        row[: length + 2] = START, *random.integers(START, size=length), END
    return {"token_ids_NL": token_ids_NL}


def run_torch(folder: Path, component: str, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    import torch

    library, class_name = "diffusers", "SD3Transformer2DModel"
    if component != "transformer":
        library, class_name = json.loads((folder / "model_index.json").read_text())[component]
    model_class = getattr(importlib.import_module(library), class_name)
    model = model_class.from_pretrained(folder, subfolder=component, torch_dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors = {name: x.permute(0, 3, 1, 2) if name.endswith("NHWC") else x for name, x in tensors.items()}
    with torch.no_grad():
        if component == "unet":
            added = {"text_embeds": tensors.get("pooled_NP"), "time_ids": tensors.get("time_ids_NT")}
            output = model(tensors["x_NHWC"], tensors["t_N"], tensors["context_NLD"], added_cond_kwargs=added)
            outputs = {"prediction_NHWC": output.sample}
        elif component == "transformer":
            x_NCHW, t_N, context_NLD, pooled_NP = tensors.values()
            outputs = {"prediction_NHWC": model(x_NCHW, context_NLD, pooled_NP, t_N).sample}
        elif component == "vae":
            posterior = model.encode(tensors["images_NHWC"]).latent_dist
            images = model.decode(tensors["latents_NHWC"]).sample
            outputs = {"mean_NHWC": posterior.mean, "logvar_NHWC": posterior.logvar, "images_NHWC": images}
        else:
            output = model(tensors["token_ids_NL"], output_hidden_states=True)
            pooled_NP = output.text_embeds if "text_embeds" in output else output.pooler_output
            states = {"last_hidden_NLD": output.last_hidden_state, "penultimate_NLD": output.hidden_states[-2]}
            outputs = states | {"pooled_NP": pooled_NP}
    outputs = {name: x.permute(0, 2, 3, 1) if name.endswith("NHWC") else x for name, x in outputs.items()}
    count = sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.endswith("position_ids"))
    return {name: x.numpy() for name, x in outputs.items()}, count


def run_jax(folder: Path, component: str, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    if component == "transformer":
        network, (x_NHWC, t_N, *conditioning) = sd3_transformer(), inputs.values()
        params = load_params(folder / component, network.specs, dtype="float32")
        prediction_NHWC = jax.jit(network)(params, x_NHWC, t_N, Conditioning(*conditioning))
        return {"prediction_NHWC": np.asarray(prediction_NHWC)}, sum(value.size for value in params.values())
    pipeline = load_pipeline(folder, dtype="float32")
    params = pipeline.load(component, dtype="float32")
    if component == "unet":
        x_NHWC, t_N, *conditioning = inputs.values()
        prediction_NHWC = jax.jit(pipeline.denoise)(params, x_NHWC, t_N, Conditioning(*conditioning))
        outputs = {"prediction_NHWC": prediction_NHWC}
    elif component == "vae":
        vae = jax.jit(pipeline.vae, static_argnames="method")
        mean_NHWC, logvar_NHWC = vae(params, inputs["images_NHWC"], method="encode")
        images_NHWC = vae(params, inputs["latents_NHWC"], method="decode")
        outputs = {"mean_NHWC": mean_NHWC, "logvar_NHWC": logvar_NHWC, "images_NHWC": images_NHWC}
    else:
        outputs = jax.jit(pipeline.components[component])(params, inputs["token_ids_NL"])._asdict()
    return {name: np.asarray(x) for name, x in outputs.items()}, sum(value.size for value in params.values())


def main(framework: str, folder: str, family: str, component: str, output: str) -> None:
    run_framework = {"torch": run_torch, "jax": run_jax}[framework]
    start = time.perf_counter()
    outputs, count = run_framework(Path(folder), component, make_inputs(family, component))
    seconds = time.perf_counter() - start
    np.savez(output, **outputs)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"parameters": count, "peak_gb": peak_gb, "seconds": seconds}))


def run(*arguments: object) -> dict[str, Any]:
    """What `main` reports, in a process of its own and with XLA as users run it."""
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def relative_errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The largest difference over the largest value, and the norm of all differences over that of all values."""
    assert ours.shape == theirs.shape
    difference = np.float64(ours) - theirs
    return np.abs(difference).max() / np.abs(theirs).max(), np.linalg.norm(difference) / np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("family", MODELS)
def test_every_network_at_full_size_agrees_with_pytorch(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    try:
        write_model(family, folder)
        errors, peaks_gb = [], []
        for component, (_, parameters) in MODELS[family].items():
            outputs = {}
            for framework in ("torch", "jax"):
                report = run(framework, folder, family, component, tmp_path / "outputs.npz")
                with np.load(tmp_path / "outputs.npz") as arrays:
                    outputs[framework] = dict(arrays)
                print(f"{family} {component} {framework}:", {name: round(x, 1) for name, x in report.items()})
                assert report["parameters"] == parameters
                peaks_gb.append(report["peak_gb"])
            assert outputs["jax"].keys() == outputs["torch"].keys()
            for name, theirs in outputs["torch"].items():
                assert theirs.std() > 0.1
                by_maximum, by_norm = relative_errors(outputs["jax"][name], theirs)
                print(f"{family} {component} {name}: {by_maximum:.1e} of the maximum, {by_norm:.1e} of the norm")
                errors += [by_maximum, by_norm]
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # pytest would keep it for days
    assert np.less(errors, TOLERANCE).all()
    assert max(peaks_gb) < MEMORY_GB


if __name__ == "__main__":
    main(*sys.argv[1:])
