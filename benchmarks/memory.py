"""Computes the memory that training takes on one GPU, one pair at a time, for the table of the documentation.

  python benchmarks/memory.py

It is the most of a step and of drawing an image grid. Writes benchmarks/memory.json and prints the table of
docs/memory.md, of which README.md has a part; a few minutes on two CPU cores, without a GPU. Nothing here is measured:
shapes are counted and the step is traced, as `dpo_jax plan` does it, for 16 pairs per step.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from dpo_jax import cli
from dpo_jax.planning.estimate import drawing_by_kind, measure_holdings, measure_work, memory_by_kind
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import GIB
from dpo_jax.training.optim import OPTIMIZERS

FILE = Path(__file__).with_suffix(".json")
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


def main() -> None:
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


if __name__ == "__main__":
    cli.run(main)
