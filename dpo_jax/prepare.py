"""Turns files of preference pairs into the data set that training reads.

python -m dpo_jax.prepare --source=pickapic --input='data/*.parquet' --output=data/pickapic
"""

import glob
from pathlib import Path

from absl import flags

from dpo_jax import cli

SOURCE = flags.DEFINE_string(
    "source", "pickapic", "Schema of the input: pickapic (parquet: jpg_0, jpg_1, caption, label_0 ...)."
)
INPUT = flags.DEFINE_list("input", None, "Files to read; comma-separated, wildcards allowed.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet, or be empty.", required=True)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.05, "Share of the prompts to hold out for validation.", lower_bound=0, upper_bound=1
)
MAX_DAMAGED_FRACTION = flags.DEFINE_float(
    "max_damaged_fraction", 0.01, "Share of the pairs that may have a damaged image.", lower_bound=0, upper_bound=1
)
PAIRS_PER_SHARD = flags.DEFINE_integer("pairs_per_shard", 2000, "Pairs in one file of the output.", lower_bound=1)


def main() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dpo_jax.data import builder
    from dpo_jax.data.sources import SOURCES

    if SOURCE.value not in SOURCES:
        raise ValueError(f"--source={SOURCE.value} is unknown; choose from {', '.join(SOURCES)}")
    files = []
    for pattern in INPUT.value:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise FileNotFoundError(f"no file matches --input={pattern}")
        files += [Path(match) for match in matches]

    columns = "pairs", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, rate="reading captions")

        def show(done: int, total: int) -> None:
            speed = progress.tasks[task].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:.0f} pairs/s" if speed else "")

        summary = builder.prepare(
            SOURCES[SOURCE.value],
            files,
            Path(OUTPUT.value),
            validation_fraction=VALIDATION_FRACTION.value,
            max_damaged_fraction=MAX_DAMAGED_FRACTION.value,
            pairs_per_shard=PAIRS_PER_SHARD.value,
            on_progress=show,
        )
    print(f"{summary}\nwritten to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
