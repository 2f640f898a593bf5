"""Compares the speed of sampling with PyTorch diffusers on the same device, from the same model folder.

  python benchmarks/sample.py --mode=sdxl --json=benchmarks/results/h200-sample-sdxl.json

Both draw the same prompts with the same sampler, steps, guidance and batch, from captions to pixels: text encoders,
UNet and VAE. On the first GPU, or on CPUs: with --cores=1 where others use them too, for PyTorch's threads wait for
each other.

  ours      `dpo_jax.sampling.generate.Generator`; on GPUs in bfloat16 with cuDNN's attention
  pipeline  diffusers' pipeline as it comes, in the same dtype
  compiled  the same, channels last, UNet and VAE's decoder by torch.compile

Each figure is the median over rounds in which the contestants take turns, each in a process of its own, after a batch
to warm up (`first`: what that took, with compiling). `--mode=tiny` is the bundled model at 32 pixels in float32, which
CPUs draw with; the others are of full size with random weights, written to a temporary folder first (SDXL: 7 GB).
"""

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from fresh_process import in_fresh_process

from dpo_jax import cli
from dpo_jax.errors import UserError

ROOT = Path(__file__).parents[1]


class Mode(NamedTuple):
    """A model and the settings to sample with."""

    family: str
    resolution: int
    batch_size: int
    guidance: float
    dtype: str
    is_random: bool = True


MODES = {
    "tiny": Mode("sdxl", 32, 16, 2.5, "float32", is_random=False),
    "sd15": Mode("sd15", 512, 16, 7.5, "bfloat16"),
    "sdxl": Mode("sdxl", 1024, 8, 5.0, "bfloat16"),
}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}

MODE = flags.DEFINE_enum("mode", "tiny", list(MODES), "Model to sample from.")
PEERS = flags.DEFINE_list("peers", ["pipeline"], "Contestants in PyTorch: pipeline, compiled.")
SAMPLER = flags.DEFINE_enum("sampler", "euler", list(SCHEDULERS), "Sampler of all contestants.")
STEPS = flags.DEFINE_integer("steps", 30, "Denoising steps.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each contestant is timed.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Seconds per contestant and round, after its first batch.")
CORES = flags.DEFINE_integer("cores", 0, "Processor cores that a contestant may use; 0 takes all.", lower_bound=0)
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main() -> None:
    unknown = set(PEERS.value) - {"pipeline", "compiled"}
    if unknown:
        raise UserError(
            f"--peers={','.join(PEERS.value)}: {', '.join(sorted(unknown))} is neither pipeline nor compiled"
        )
    mode = MODES[MODE.value]
    with tempfile.TemporaryDirectory() as temporary:
        folder = ROOT / "dpo_jax" / "tiny" / "model"
        if mode.is_random:
            folder = Path(temporary, "model")
            in_fresh_process(write_full_size, mode.family, folder)
        work = str(folder), mode, SAMPLER.value, STEPS.value, SECONDS.value
        runs: dict[str, Callable[[], dict[str, Any]]] = {"ours": functools.partial(ours, *work)}
        runs |= {name: functools.partial(peer, name, *work) for name in PEERS.value}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for _ in range(ROUNDS.value):
            for name, run in runs.items():
                found[name].append(in_fresh_process(on_cores, CORES.value, run))
                print(f"{name}: {json.dumps(found[name][-1])}", flush=True)
    contestants = {name: summary(figures) for name, figures in found.items()}
    results = {
        "mode": MODE.value,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "diffusers")},
        "python": platform.python_version(),
        "device": found["ours"][0]["device"],
        "cores": found["ours"][0]["cores"],
        **{"sampler": SAMPLER.value, "steps": STEPS.value, **mode._asdict()},
        "contestants": contestants,
        "ours_over": {
            name: contestants["ours"]["images_a_second"] / contestants[name]["images_a_second"] for name in PEERS.value
        },
    }
    print(f"{'':10} {'images/s':>9} {'first s':>8}")
    for name, figures in contestants.items():
        print(f"{name:10} {figures['images_a_second']:9.3f} {figures['first_seconds']:8.1f}")
    for name, ratio in results["ours_over"].items():
        print(f"ours / {name}: {ratio:.2f}")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=1) + "\n")


def on_cores(cores: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run the function on that many cores, chosen before JAX and PyTorch count them; 0 keeps all."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    return run() | {"cores": len(os.sched_getaffinity(0))}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the rounds."""
    speeds = [figures["images_a_second"] for figures in found]
    return {
        "images_a_second": statistics.median(speeds),
        "first_seconds": statistics.median(figures["first_seconds"] for figures in found),
        "rounds_images_a_second": speeds,
    }


def timed(draw: Callable[[list[str], int], Any], mode: Mode, seconds: float, device: str) -> dict[str, Any]:
    """Time `draw(captions, seed)`, which returns a batch of uint8 images."""
    captions = [f"a photo of {number} red circles" for number in range(mode.batch_size)]
    started = time.perf_counter()
    images = draw(captions, 0)
    first = time.perf_counter() - started
    assert images.shape == (mode.batch_size, mode.resolution, mode.resolution, 3), images.shape
    started, batches = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        batches += 1
        draw(captions, batches)
    return {"images_a_second": batches * mode.batch_size / passed, "first_seconds": first, "device": device}


def ours(folder: str, mode: Mode, sampler: str, steps: int, seconds: float) -> dict[str, Any]:
    import jax

    from dpo_jax.sampling.generate import Sampling
    from dpo_jax.sampling.loaded_model import open_model

    device = jax.devices()[0]
    opened = open_model(folder, dtype=mode.dtype)
    sampling = Sampling(steps, mode.guidance, sampler)
    generator = opened.generator(sampling, resolution=mode.resolution, batch_size=mode.batch_size)

    unet, _ = opened.denoiser, opened.encoders  # loaded before the clock starts

    def draw(captions: list[str], seed: int) -> Any:
        return generator(unet, captions, range(seed * len(captions), (seed + 1) * len(captions)))

    return timed(draw, mode, seconds, device.device_kind)


def peer(name: str, folder: str, mode: Mode, sampler: str, steps: int, seconds: float) -> dict[str, Any]:
    import diffusers
    import numpy as np
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, mode.dtype)).to(device)
    extra = {"clip_sample": False} if sampler == "ddim" else {}
    pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipe.scheduler.config, **extra)
    pipe.set_progress_bar_config(disable=True)
    if name == "compiled":
        pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
        pipe.vae.decode = torch.compile(pipe.vae.to(memory_format=torch.channels_last).decode)

    def draw(captions: list[str], seed: int) -> Any:
        images = pipe(
            captions,
            num_inference_steps=steps,
            guidance_scale=mode.guidance,
            height=mode.resolution,
            width=mode.resolution,
            generator=torch.Generator(device).manual_seed(seed),
            output_type="np",
        ).images
        return np.round(images * 255).astype(np.uint8)

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return timed(draw, mode, seconds, kind)


def write_full_size(family: str, folder: Path) -> None:
    """Return the published model of the family with random weights, in bfloat16."""
    import shutil

    from dpo_jax.models.families import FAMILIES, PUBLISHED
    from dpo_jax.models.pipeline import load_pipeline
    from dpo_jax.models.random_model import random_params
    from dpo_jax.models.random_tokenizers import WORDS, byte_vocabulary, write_clip_tokenizer
    from dpo_jax.weights.io import save_component

    shutil.copytree(PUBLISHED / family, folder)
    pipeline = load_pipeline(folder, dtype="bfloat16", family=family)
    for seed, (name, network) in enumerate(pipeline.components.items()):
        config = pipeline.config(name)
        shutil.rmtree(folder / name)
        params = random_params(network.specs, seed)
        save_component(pipeline.folder / name, config, params, network.specs, dtype="bfloat16")
    vocabulary, merges = byte_vocabulary(WORDS)
    for encoder in FAMILIES[family].text_encoders:
        # SDXL's second tokenizer pads with "!", its first token.
        padding = {"pad_token": "!"} if encoder.tokenizer == "tokenizer_2" else {}
        write_clip_tokenizer(pipeline.folder / encoder.tokenizer, vocabulary, merges, max_tokens=77, **padding)


if __name__ == "__main__":
    cli.run(main)
