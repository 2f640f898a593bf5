"""Compares the speed of the training step with PyTorch's on the same device, at the same shapes.

  python benchmarks/step.py --mode=sdxl-full --peers=P0,P1,P2 --json=benchmarks/results/h200-sdxl-full.json

A step includes noise, policy forward and backward, reference forward, loss and optimizer for a batch of pairs. Weights,
latents and embeddings are random, never zero, and new for each run. It runs on the first GPU, or on CPUs.

  ours  dpo_jax's own step (`Experiment.train_step`), from stored encodings, in bfloat16
  P0    the loop of diffusers' and Salesforce's Diffusion-DPO scripts as they ship: one pair at a time, VAE and text
        encoders in each step, gradient checkpointing, float16 autocast and float32 masters
  P1    the same in bfloat16 autocast, from stored latents and embeddings
  P2    the fastest PyTorch that we could tune: bfloat16 weights, channels last, torch.compile, fused attention, no
        checkpointing, as many pairs at a time as fit

Each figure is the median over rounds in which the contestants take turns, each in a process of its own. The figures are
pairs per second, the share of the rate of matrix products measured in the same run (MFU; operations are counted
analytically, recomputation is not credited), peak memory, the time to compile and to the first step, and the first
loss, which must be log 2 = 0.693. `--mode=tiny` is a small random UNet in float32 that CPUs run in seconds, to check
that everything works.
"""

import functools
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from fresh_process import in_fresh_process
from step_contestants import MODES, ceilings, count_work, ours, peer

from dpo_jax import cli
from dpo_jax.errors import UserError

MODE = flags.DEFINE_enum("mode", "tiny", list(MODES), "Model and method to train.")
PEERS = flags.DEFINE_list("peers", [], "Contestants in PyTorch: P0, P1, P2.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each contestant is timed.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Seconds per contestant and round, after its first steps.")
PAIRS = flags.DEFINE_integer("pairs", 0, "Pairs at a time in the step of dpo_jax; 0 takes those of the mode.")


def main() -> None:
    unknown = set(PEERS.value) - {"P0", "P1", "P2"}
    if unknown:
        raise UserError(f"--peers={','.join(PEERS.value)}: {', '.join(sorted(unknown))} is not one of P0, P1, P2")
    mode = MODES[MODE.value]
    if PAIRS.value:
        if mode.batch_size % PAIRS.value:
            raise UserError(f"--pairs={PAIRS.value} does not divide the batch of {mode.batch_size}. Give a divisor")
        mode = mode._replace(pairs=PAIRS.value)
    runs: dict[str, Callable[[], dict[str, Any]]] = {"ours": functools.partial(ours, mode, SECONDS.value)}
    runs |= {name: functools.partial(peer, name, mode, SECONDS.value) for name in PEERS.value}
    limits = in_fresh_process(ceilings)
    say(f"{limits['device']}: products {limits['tflops']:.4g} TFLOP/s, copies {limits['copy_gb_s']:.4g} GB/s")
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(ROUNDS.value):
        for name, run in runs.items():
            figures[name].append(in_fresh_process(run))
            say(f"{name}: {json.dumps(figures[name][-1])}")
    flops = in_fresh_process(count_work, mode)
    results = {
        "mode": MODE.value,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "diffusers")},
        "python": platform.python_version(),
        **limits,
        "tflop_a_pair": flops / 1e12,
        "contestants": {name: summary(found, flops, limits["tflops"]) for name, found in figures.items()},
    }
    medians = {name: found["pairs_a_second"] for name, found in results["contestants"].items()}
    results["ours_over"] = {name: medians["ours"] / medians[name] for name in PEERS.value if medians[name]}
    print(table(results))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=1) + "\n")


def say(line: str) -> None:
    print(line, flush=True)


def summary(found: list[dict[str, Any]], flops: float, tflops: float) -> dict[str, Any]:
    """Return the medians over the rounds, or the reason why a contestant failed."""
    failed = [figures["failed"] for figures in found if "failed" in figures]
    if failed:
        return {"failed": failed[0], "pairs_a_second": 0.0}
    medians = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
    spread = [figures["pairs_a_second"] for figures in found]
    return medians | {"mfu": medians["pairs_a_second"] * flops / (tflops * 1e12), "rounds_pairs_a_second": spread}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{'':6} {'pairs/s':>9} {'MFU':>6} {'GiB':>6} {'at a time':>9} {'compile s':>9} {'first s':>8} {'loss':>7}"
    ]
    for name, figures in results["contestants"].items():
        if "failed" in figures:
            lines.append(f"{name:6} {figures['failed']}")
            continue
        peak = f"{figures['peak_gib']:.1f}" if "peak_gib" in figures else "-"
        lines.append(
            "{:6} {pairs_a_second:9.3f} {mfu:6.1%} {peak_gib:>6} {pairs_at_a_time:9.0f} {compile_seconds:9.1f} "
            "{first_step_seconds:8.1f} {loss:7.4f}".format(name, **figures | {"peak_gib": peak})
        )
    lines += [f"ours / {name}: {ratio:.2f}" for name, ratio in results["ours_over"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
