"""Compares the speed of reading preference data: this loader, PyTorch's in diffusers' SDXL DPO script, bare decoding.

  python benchmarks/loader.py --json=loader.json

Makes two data sets in Pick-a-Pic's parquet schema, of photo-like JPEGs (noise whose amplitude falls as 1 / f^1.3, with
ellipses; quality 95) of 512 and of 1024 pixels: 102 and 339 kB per image; Pick-a-Pic v2 has 197 kB on average. Each is
prepared by `dpo_jax.prepare` and read at its own resolution: centre crop, random flip (on the device in dpo_jax), two
tokenizers of 77 tokens, 8 pairs per batch, files in the page cache, on all cores. Each caption occurs 20 times, in
Pick-a-Pic 15 times. The contestants are

  bare            JPEG to an RGB array and nothing else, one process per core, with the loader's decoder (simplejpeg);
                  writing into one array instead of a new one each time makes no difference
  bare pillow     the same with Pillow
  ours            `make_iterator`
  cache           `make_iterator` over latents and embeddings of SDXL's shapes, as `prepare --encode` stores them
  shipped         PyTorch's DataLoader over a Hugging Face `datasets` table, as diffusers' script
                  examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py has it: it decodes the first
                  image of a pair twice, and all in the training process
  shipped workers the same with one worker process per core
  fixed           that without the second decode: the fastest version that does not rewrite it

torchvision is not needed: what its transforms do to tensors (resize, crop, flip, normalise) is written in PyTorch.
First the pixels of the loaders are compared for all records, at the data's resolution and at three quarters of it.

Each figure is the median of several rounds, in which the contestants take turns, each in a new process and timed after
six seconds. By then dpo_jax has read most captions once and kept their tokens, as for all but a fifteenth of the first
epoch of Pick-a-Pic; PyTorch's loaders tokenise every caption again. Beside pairs per second the table has the CPU time
that all processes of a contestant take per pair, which other work on the machine disturbs less. It needs 6 GB of disk
in the temporary folder (TMPDIR) and about 25 minutes on two cores. The last result is committed beside this file.

  python benchmarks/loader.py --memory

measures instead whether the loader's memory grows with the data, or with time; see `memory_growth`.
"""

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from fresh_process import in_fresh_process
from loader_contestants import BATCH_SIZE, CORES, bare, cache, largest_difference, ours, theirs
from loader_data import Case, make_data, write_records

from dpo_jax import cli

TINY = flags.DEFINE_bool("tiny", False, "Run one short round with a few small images, to check that everything works.")
MEMORY = flags.DEFINE_bool("memory", False, "Measure memory instead of speed.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each contestant is timed.")
ONLY = flags.DEFINE_list("only", None, "Contestants to time, without ratios. Default: all.")
SECONDS = flags.DEFINE_float("seconds", 8.0, "Seconds per contestant and round.")

RUN_UP = 6.0
"""Seconds that a contestant reads before it is timed."""

# Pairs a second that devices train on (SDXL at 1024, all of its weights), at the shares of their peak rates that
# `dpo_jax.plan` assumes; VAE and text encoders take some 15% of a step. Predicted, not measured.
CONSUMERS = {  # name: (hosts, pairs/s from the cache, pairs/s with VAE and text encoders in the step)
    "8 x H200": (1, 8 * 7.3, 8 * 6.2),
    "v5p-128": (16, 64 * 3.35, 64 * 2.85),
}


def main() -> None:
    if MEMORY.value:
        return report(memory_growth(*((400, 3, 6) if TINY.value else (20_000, 50, 500))))
    results: dict[str, Any] = {"cores": CORES, "batch_size": BATCH_SIZE}
    for side in (64,) if TINY.value else (512, 1024):
        with tempfile.TemporaryDirectory() as root:
            case = Case(Path(root), side)
            results[str(side)] = {
                "bytes_an_image": make_data(case, *((48, 4) if TINY.value else (1000, 64))),
                "largest_difference_of_255": {
                    str(resolution): largest_difference(case._replace(resolution=resolution))
                    for resolution in (side, side * 3 // 4)
                },
                **race(case, *((1, 0.2, 0.2) if TINY.value else (ROUNDS.value, RUN_UP, SECONDS.value))),
            }
            print(table(side, results[str(side)]), flush=True)
    if not ONLY.value:
        results["feeding"] = feeding(results[str(side)])
        print(table_of_consumers(results["feeding"]))
    report(results)


def report(results: Any) -> None:
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(results, indent=1) + "\n")


# The race.


def race(case: Case, rounds: int, run_up: float, seconds: float) -> dict[str, Any]:
    """Return the medians of pairs per second and of CPU milliseconds per pair, and their ratios."""
    write_records(case.folder / "prepared", 20_000)  # shuffling few takes Grain longer than shuffling many
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "bare": lambda: bare(case, seconds),
        "bare pillow": lambda: bare(case._replace(pillow=True), seconds),
    }
    readers: dict[str, tuple[Any, Case]] = {
        "ours": (ours, case),
        "cache": (cache, case),
        "shipped": (theirs, case._replace(decode_twice=True)),
        "shipped workers": (theirs, case._replace(decode_twice=True, workers=CORES)),
        "fixed": (theirs, case._replace(workers=CORES)),
    }
    for name, (reader, how) in readers.items():
        runs[name] = functools.partial(in_fresh_process, timed, reader, how, run_up, seconds)
    if ONLY.value:
        runs = {name: runs[name] for name in ONLY.value}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(run())
    medians = {
        name: {key: round(statistics.median(figure[key] for figure in found), 3) for key in found[0]}
        for name, found in figures.items()
    }
    if ONLY.value:
        return {"contestants": medians, "ratios": {}}
    ratios = {
        "ours / shipped": ("ours", "shipped"),
        "ours / shipped workers": ("ours", "shipped workers"),
        "ours / fixed": ("ours", "fixed"),
        "ours / bare": ("ours", "bare"),
        "ours / bare pillow": ("ours", "bare pillow"),
        "cache / shipped": ("cache", "shipped"),
        "cache / ours": ("cache", "ours"),
    }
    return {
        "contestants": medians,
        "ratios": {
            name: {
                "pairs_a_second": round(medians[a]["pairs_a_second"] / medians[b]["pairs_a_second"], 3),
                "cpu": round(medians[b]["cpu_ms_a_pair"] / medians[a]["cpu_ms_a_pair"], 3),
            }
            for name, (a, b) in ratios.items()
        },
    }


def timed(reader: Callable[[Case], Any], case: Case, run_up: float, seconds: float) -> dict[str, float]:
    """Time a contestant after `run_up` seconds, when the batches read ahead are used up."""
    with reader(case) as batches:
        started = time.monotonic()
        while time.monotonic() - started < run_up:
            next(batches)
        pairs, started, cpu_started = 0, time.monotonic(), cpu_seconds()
        while (passed := time.monotonic() - started) < seconds:
            next(batches)
            pairs += BATCH_SIZE
        cpu = cpu_seconds() - cpu_started
    return {"pairs_a_second": pairs / passed, "cpu_ms_a_pair": 1000 * cpu / pairs}


# CPU time and memory of this process and those that it started.


def family() -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(folder.name)] = int(stat(folder)[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def stat(folder: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; the second, in parentheses, may contain spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def cpu_seconds() -> float:
    ticks = [sum(map(int, stat(Path("/proc", str(process)))[11:13])) for process in family()]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> int:
    """Return the bytes of a process alone plus its part of shared ones, without files, which can be dropped."""
    rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith(("Pss_Anon", "Pss_Shmem")))


def memory_growth(records: int, early: int, late: int) -> list[dict[str, Any]]:
    """Return the memory of the loader with `records` records and ten times as many, after `early` and `late` batches.

    The records refer to a few hundred images of 64 pixels.
    """
    results = []
    with tempfile.TemporaryDirectory() as root:
        case = Case(Path(root), 64)
        make_data(case, 200, 50)
        for times in (1, 10):
            write_records(case.folder / "prepared", records * times)
            figures = in_fresh_process(held, case, (early, late))
            results.append({"records": records * times, "bytes_after_batches": figures})
            print(json.dumps(results[-1]), flush=True)
    return results


def held(case: Case, after: Sequence[int]) -> dict[str, int]:
    figures = {}
    with ours(case) as batches:
        for number in range(1, max(after) + 1):
            next(batches)
            if number in after:
                figures[str(number)] = memory(os.getpid())
    return figures


# What it means.


def feeding(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what a host of each consumer reads, and on how many cores like these."""
    contestants = results["contestants"]
    moments, context, pooled = 2 * 128 * 128 * 8 * 2, 77 * 2048 * 2, 1280 * 2
    found = {}
    for name, (hosts, from_cache, from_images) in CONSUMERS.items():
        ways = {
            "images": (from_images, "ours", 2 * results["bytes_an_image"]),
            "cache": (from_cache, "cache", moments + context + pooled),
        }
        for way, (pairs_a_second, reader, bytes_a_pair) in ways.items():
            cpu = contestants[reader]["cpu_ms_a_pair"]
            found[f"{name} from {way}"] = {
                "pairs_a_second_and_host": round(pairs_a_second / hosts, 2),
                "cores_a_host": round(pairs_a_second / hosts * cpu / 1000, 2),
                "megabytes_a_second_and_host": round(pairs_a_second / hosts * bytes_a_pair / 1e6, 1),
            }
    return found


def table(side: int, results: dict[str, Any]) -> str:
    lines = [
        f"{side} x {side} pixels, {results['bytes_an_image'] / 1000:.0f} kB an image, {CORES} cores; "
        f"pixels differ by at most {max(results['largest_difference_of_255'].values())} of 255",
        f"  {'':24} {'pairs/s':>8} {'CPU ms a pair':>14}",
    ]
    for name, figures in results["contestants"].items():
        lines.append(f"  {name:24} {figures['pairs_a_second']:8.1f} {figures['cpu_ms_a_pair']:14.2f}")
    lines.append(f"  {'ratio':24} {'pairs/s':>8} {'CPU':>14}")
    for name, figures in results["ratios"].items():
        lines.append(f"  {name:24} {figures['pairs_a_second']:8.2f} {figures['cpu']:14.2f}")
    return "\n".join(lines)


def table_of_consumers(found: dict[str, dict[str, float]]) -> str:
    lines = ["What devices that train SDXL at 1024 (predicted) ask of each of their hosts, with cores like these:"]
    for name, figures in found.items():
        lines.append(
            "  {:22} {pairs_a_second_and_host:7.1f} pairs/s, {cores_a_host:5.2f} cores, "
            "{megabytes_a_second_and_host:6.1f} MB/s".format(name, **figures)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
