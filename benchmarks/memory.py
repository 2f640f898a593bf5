"""Computes the memory that training takes on one GPU, one pair at a time, for the tables of the documentation.

  python benchmarks/memory.py
  python benchmarks/memory.py --choices

It is the most of a step and of drawing an image grid. The first writes benchmarks/memory.json and prints the table of
docs/memory.md, of which README.md has a part. The second writes benchmarks/memory_choices.json and prints what each way
to store weights and moments takes, and costs. A few minutes each on two CPU cores, without a GPU. Nothing here is
measured: shapes are counted and the step is traced, as `dpo_jax plan` does it, for 16 pairs per step.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import cli
from dpo_jax.planning.estimate import (
    Work,
    drawing_by_kind,
    make_plan,
    measure_holdings,
    measure_work,
    memory_by_kind,
)
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import GIB, parse_topology
from dpo_jax.training.optim import OPTIMIZERS

OF_CHOICES = flags.DEFINE_bool("choices", False, "Compute what each way to store weights and moments takes.")
FILE = Path(__file__).with_suffix(".json")
CHOICES_FILE = FILE.with_stem("memory_choices")
PAIRS = 16
"""Pairs per step."""
MODELS = {"sd15:lora": "SD1.5", "sd15": "SD1.5", "sd21": "SD2.1", "sdxl:lora": "SDXL", "sdxl": "SDXL"}
"""Name of the model by config: a row each."""
SETTINGS = {
    "default": {"remat": "none"},
    "`--config.remat=block`": {"remat": "block"},
    "and from [encodings](data.md#encode-once)": {
        "remat": "block",
        "data.encoded_views": 1,
        "data.random_flip": False,
    },
}
"""Fields by column."""
STORED = SETTINGS["and from [encodings](data.md#encode-once)"] | {"sample.every": 0}
INT8, BFLOAT16 = {"optimizer.moments": "int8"}, {"memory.masters": "bfloat16"}
WHOLE = {"float32": {}, "8-bit moments": INT8, "bfloat16 weights": BFLOAT16, "both": BFLOAT16 | INT8}
FROZEN = {"bfloat16 base": {}, "int8 base": {"memory.frozen": "int8"}, "nf4 base": {"memory.frozen": "nf4"}}
FLUX = {"data.resolution": 512, "optimizer.name": "adamw"}
CHOICES = {
    "SD1.5, whole, AdamW": ("sd15", {}, WHOLE),
    "SDXL, whole, AdamW": ("sdxl", {"optimizer.name": "adamw"}, WHOLE),
    "SDXL, whole, Adafactor": ("sdxl", {}, {"float32": {}, "bfloat16 weights": BFLOAT16}),
    "SD3.5 medium, whole, AdamW": ("sd35", {"optimizer.name": "adamw"}, WHOLE),
    "SDXL, LoRA": ("sdxl:lora", {}, FROZEN),
    "FLUX.1, LoRA, 512 pixels": ("flux", FLUX, FROZEN),
}
"""Config, fields, and fields by choice; all with remat=block, from encodings and without grids."""
CARD = "h200:1"
"""Where speeds are predicted: one card for all rows, whether or not they fit it."""


def main() -> None:
    if OF_CHOICES.value:
        rows = list(choices())
        CHOICES_FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(table_of_choices(rows))
        return
    gib: dict[str, dict[str, float]] = {}
    for name in MODELS:
        gib[name] = {}
        for column, fields in SETTINGS.items():
            print(f"... {name}, {fields}", flush=True)
            gib[name][column] = needed(name, fields) / GIB
    FILE.write_text(json.dumps(gib, indent=1) + "\n")
    print(table(gib))


def config_of(name: str, fields: Mapping[str, object]) -> ConfigDict:
    """Return a config with one pair at a time on one device."""
    one = {"data.batch_size": PAIRS, "data.micro_batch": 1, "mesh.data": 1, "mesh.fsdp": 1}
    return cli.replaced(cli.load_config(name), one | dict(fields))


def needed(name: str, fields: Mapping[str, object]) -> float:
    """Return the bytes that a GPU needs to train by a config with these fields."""
    config = config_of(name, fields)
    holdings = measure_holdings(config, open_structure(config), num_devices=1)
    work = measure_work(config, "gpu", model_flops=0.0)  # operations are not asked for
    training = memory_by_kind(holdings, work, "gpu", pairs=1, accumulation=PAIRS)
    return max(sum(training.values()), sum(drawing_by_kind(holdings, work).values()))


def table(gib: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table in Markdown.

    Args:
        gib: memory in GiB, by config and column.
    """
    heads = ("model", "pixels", "trained", *SETTINGS)
    lines = [heads, ["---"] * len(heads)]
    for name, model in MODELS.items():
        config = config_of(name, {})
        rank, optimizer = config.lora.rank, OPTIMIZERS[config.optimizer.name]
        trained = f"LoRA, rank {rank}" if rank else f"whole UNet, {optimizer}"
        lines.append((model, config.data.resolution, trained, *(f"{gib[name][column]:.1f}" for column in SETTINGS)))
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines).replace(" --- ", "---")


def choices() -> Iterator[dict[str, object]]:
    """Yield a row per choice: its memory, and what it costs."""
    topology = parse_topology(CARD)
    for model, (name, fields, ways) in CHOICES.items():
        works: dict[str, Work] = {}  # stored alike, the same operations
        for way, stored in ways.items():
            print(f"... {model}, {way}", flush=True)
            config = config_of(name, STORED | fields | stored)
            frozen = config.memory.frozen
            if frozen not in works:
                works[frozen] = measure_work(config, "gpu")
            holdings = measure_holdings(config, open_structure(config), num_devices=1)
            plan = make_plan(holdings, works[frozen], topology, batch_size=PAIRS, pairs=1)
            yield {
                "model": model,
                "stored": way,
                "gib": plan.hbm_bytes / GIB,
                "tflop_per_pair": plan.work.flops / 1e12,
                "update_gb": plan.update_seconds * topology.device.hbm_gb_s,
                "pairs_per_second": plan.pairs_per_second_per_chip,
            }


def table_of_choices(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of `choices` in Markdown."""
    lines = ["| model | stored | GiB | TFLOP per pair | GB per update | pairs/s |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['stored']} | {r['gib']:.1f} | {r['tflop_per_pair']:.1f} | {r['update_gb']:.1f} | "
        f"{r['pairs_per_second']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
