"""Plans the published run on TPU slices, and estimates how speed changes with the number of chips.

  python benchmarks/plan.py --output=benchmarks/plan

Writes OUTPUT.json and OUTPUT.md in a quarter of an hour on two CPU cores, without an accelerator. Each line has the
settings that `python -m dpo_jax.plan --fit` chooses for 2048 pairs per step, with images and captions encoded in
advance (`data.encoded_views=2`). Nothing here is measured on a TPU: memory, operations and traffic are computed, and
the speed follows from an assumed share of the peak rate.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax import cli
from dpo_jax.planning.estimate import Plan
from dpo_jax.planning.search import choose, measure_all
from dpo_jax.planning.topology import parse_topology

OUTPUT = flags.DEFINE_string("output", None, "Files to write, without .json and .md.", required=True)

MODELS = {
    "SD1.5": "configs/sd15.py",
    "SD1.5 LoRA": "configs/sd15.py:lora",
    "SDXL": "configs/sdxl.py",
    "SDXL LoRA": "configs/sdxl.py:lora",
}
SLICES = ("v5e:16x16", "v5p:4x4x4", "v6e:8x8")
SCALING = {
    "v5e": ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    "v5p": ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"),
}


def main() -> None:
    rows: list[tuple[str, Plan]] = []
    scaling: list[tuple[str, Plan]] = []
    for name, file in MODELS.items():
        config = cli.load_config(file)
        config.data.batch_size, config.data.encoded_views = 2048, 2
        works = measure_all(config, "tpu", print)
        rows += [(name, choose(config, works, parse_topology(topology))) for topology in SLICES]
        if "LoRA" not in name:
            scaling += [
                (name, choose(config, works, parse_topology(topology)))
                for kind in SCALING.values()
                for topology in kind
            ]
    figures = {
        kind: [{"model": name} | plan.to_json() for name, plan in plans]
        for kind, plans in (("slices", rows), ("scaling", scaling))
    }
    output = Path(OUTPUT.value)
    output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    output.with_suffix(".md").write_text(f"{slices_table(rows)}\n\n{scaling_table(scaling)}\n")
    print(output.with_suffix(".md").read_text())


def slices_table(rows: list[tuple[str, Plan]]) -> str:
    settings = ("model", "slice", "remat", "fsdp", "pairs at a time")
    heads = (*settings, "GiB", "TFLOP per pair", "pairs/s per chip", "chip-hours")
    lines = [
        (
            *(name, plan.topology.name, plan.remat, plan.mesh["fsdp"], plan.micro_batch_per_device),
            f"{plan.hbm_bytes / 2**30:.1f} of {plan.topology.device.hbm_gib}",
            f"{plan.work.model_flops / 1e12:.2f}",
            f"{plan.pairs_per_second_per_chip:.2f}",
            f"{plan.chip_hours:,.0f}",
        )
        for name, plan in rows
    ]
    return table(heads, lines)


def scaling_table(rows: list[tuple[str, Plan]]) -> str:
    """Return a table of pairs/s per chip and of the collectives' share of the step, also without what overlaps."""
    heads = ("model", "slice", "chips", "fsdp", "pairs/s per chip", "collectives", "of these not overlapped")
    lines = [
        (
            *(name, plan.topology.name, plan.topology.num_chips, plan.mesh["fsdp"]),
            f"{plan.pairs_per_second_per_chip:.2f}",
            f"{plan.collective_seconds / plan.step_seconds:.1%}",
            f"{plan.exposed_seconds / plan.step_seconds:.1%}",
        )
        for name, plan in rows
    ]
    return table(heads, lines)


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, rule, *lines))


if __name__ == "__main__":
    cli.run(main)
