"""Plans the published run on TPU slices, and estimates how speed changes with the number of chips.

  python benchmarks/plan.py --output=benchmarks/plan

Writes OUTPUT.json and OUTPUT.md in half an hour on two CPU cores, without an accelerator. Each line has the settings
that `python -m dpo_jax.plan --fit` chooses, with images and captions encoded in advance (`data.encoded_views=2`): for
2048 pairs per step or, of flow models, for their config's 128. Nothing here is measured on a TPU: memory, operations
and traffic are computed, and the speed follows from an assumed share of the peak rate. `--models` makes the rows of
some models anew and keeps the others.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import cli
from dpo_jax.cli import replaced
from dpo_jax.models.execution import POLICIES
from dpo_jax.planning.estimate import Work, measure_works
from dpo_jax.planning.search import choose
from dpo_jax.planning.topology import parse_topology

OUTPUT = flags.DEFINE_string("output", None, "Files to write, without .json and .md.", required=True)
MODELS = flags.DEFINE_list("models", None, "Models whose rows to make, by their names in the table. Default: all.")

PUBLISHED_BATCH = 2048
UNETS = {
    "SD1.5": "configs/sd15.py",
    "SD1.5 LoRA": "configs/sd15.py:lora",
    "SDXL": "configs/sdxl.py",
    "SDXL LoRA": "configs/sdxl.py:lora",
}
FLOWS = {
    "SD3.5-medium": "configs/sd35.py",
    "SD3.5-medium LoRA": "configs/sd35.py:lora",
    "FLUX.1-dev LoRA": "configs/flux.py",
    "Z-Image LoRA": "configs/zimage.py",
}
SLICES = ("v5e:16x16", "v5p:4x4x4", "v6e:8x8")
FLOW_SLICES = ("h200:1", "h200:8", "v5p:2x2x2", "v6e:4x4")
SCALING = {
    "v5e": ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    "v5p": ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"),
}
Row = dict[str, Any]
"""A plan as JSON, with the name of its model."""


def main() -> None:
    output = Path(OUTPUT.value).with_suffix(".json")
    names = MODELS.value or [*UNETS, *FLOWS]
    made: dict[str, list[Row]] = {"slices": [], "scaling": []}
    for name in names:
        config = cli.load_config((UNETS | FLOWS)[name])
        config.data.encoded_views = 2
        if name in UNETS:
            config.data.batch_size = PUBLISHED_BATCH
        slices = [parse_topology(text) for text in (SLICES if name in UNETS else FLOW_SLICES)]
        works = measure_kinds(config, {topology.device.kind for topology in slices})
        made["slices"] += [
            {"model": name} | choose(config, works[topology.device.kind], topology).to_json() for topology in slices
        ]
        if name in UNETS and "LoRA" not in name:
            made["scaling"] += [
                {"model": name} | choose(config, works["tpu"], parse_topology(text)).to_json()
                for kind in SCALING.values()
                for text in kind
            ]
    kept: Mapping[str, list[Row]] = json.loads(output.read_text()) if MODELS.value else {}
    order = [*UNETS, *FLOWS]
    figures = {
        kind: sorted(
            [row for row in kept.get(kind, []) if row["model"] not in names] + rows,
            key=lambda row: order.index(row["model"]),
        )
        for kind, rows in made.items()
    }
    output.write_text(json.dumps(figures, indent=1) + "\n")
    text = f"{slices_table(figures['slices'])}\n\n{scaling_table(figures['scaling'])}\n"
    output.with_suffix(".md").write_text(text)
    print(text)


def measure_kinds(config: ConfigDict, kinds: Iterable[str]) -> dict[str, list[Work]]:
    """Return the cost of a pair with each remat policy, on each kind of device."""
    found: dict[str, list[Work]] = {kind: [] for kind in kinds}
    model_flops = None
    for remat in POLICIES:
        print(f"counting the work of a pair of {config.model} with remat={remat}", flush=True)
        for kind, work in measure_works(replaced(config, {"remat": remat}), found, model_flops).items():
            found[kind].append(work)
            model_flops = work.model_flops
    return found


def slices_table(rows: Iterable[Row]) -> str:
    settings = ("model", "slice", "remat", "fsdp", "pairs at a time")
    heads = (*settings, "GiB", "TFLOP per pair", "pairs/s per chip", "chip-hours")
    lines = [
        (
            *(row["model"], row["topology"], row["remat"], row["mesh"]["fsdp"], row["micro_batch_per_device"]),
            f"{row['hbm_gib']:.1f} of {row['hbm_limit_gib']}",
            f"{row['tflop_per_pair']:.2f}",
            f"{row['pairs_per_second_per_chip']:.2f}",
            f"{row['chip_hours']:,.0f}",
        )
        for row in rows
    ]
    return table(heads, lines)


def scaling_table(rows: Iterable[Row]) -> str:
    """Return a table of pairs/s per chip and of the collectives' share of the step, also without what overlaps."""
    heads = ("model", "slice", "chips", "fsdp", "pairs/s per chip", "collectives", "of these not overlapped")
    lines = [
        (
            *(row["model"], row["topology"], row["chips"], row["mesh"]["fsdp"]),
            f"{row['pairs_per_second_per_chip']:.2f}",
            f"{row['collective_seconds'] / row['step_seconds']:.1%}",
            f"{row['exposed_collective_seconds'] / row['step_seconds']:.1%}",
        )
        for row in rows
    ]
    return table(heads, lines)


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, rule, *lines))


if __name__ == "__main__":
    cli.run(main)
