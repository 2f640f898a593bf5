"""Turns preference data into the data set that training reads: verified, images stored once, split by prompt.

  python -m dpo_jax.prepare --source=pickapic --input='data/*.parquet' --output=data/pickapic

With --encode it goes on to run the VAE and the text encoders of a config once over the data set, new or prepared
before, and stores what they make of it. Training with the same config then has neither in memory, and reads no image:

  python -m dpo_jax.prepare --output=data/pickapic --encode --config=configs/sdxl.py --config.data.encoded_views=2

Run the same command again to continue where a run stopped. To read all that was prepared and encoded, and compare it
with its checksums:

  python -m dpo_jax.prepare --verify --output=data/pickapic
"""

import functools
import glob
from pathlib import Path

import pydantic
from absl import flags

from dpo_jax import cli
from dpo_jax.data.sources import SOURCES, missing
from dpo_jax.errors import ExistingFileError, UserError
from dpo_jax.files import read_json

SOURCE = flags.DEFINE_enum(
    "source",
    "pickapic",
    list(SOURCES),
    "What the input is.\n" + "\n".join(f"{name}: {source.help}" for name, source in SOURCES.items()),
)
INPUT = flags.DEFINE_list("input", None, "Files or folders to read; comma-separated, wildcards allowed.")
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write: a new or empty one; with --encode also one that was prepared.", required=True
)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes (to encode: threads) that read; one a core if not given, 0 for none.", 0, 2**10
)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.05, "Share of the prompts to hold out for validation.", lower_bound=0, upper_bound=1
)
MAX_DAMAGED_FRACTION = flags.DEFINE_float(
    "max_damaged_fraction", 0.01, "Share of the records that may be damaged.", lower_bound=0, upper_bound=1
)
ENCODE = flags.DEFINE_bool(
    "encode", False, "Store latents and embeddings by the models of --config (whose data.path is --output)."
)
VERIFY = flags.DEFINE_bool("verify", False, "Compare all of --output with its checksums, and do nothing else.")
CONFIG = cli.define_config("With --encode: config of the training to encode for:")


def main() -> None:
    if ENCODE.value != (CONFIG.value is not None):
        raise UserError("--encode and --config go together: the config says by which models and at which resolution")
    output = Path(OUTPUT.value)
    if VERIFY.value:
        compare(output)
        return
    if not ENCODE.value:
        build(output)
        return
    from dpo_jax import cluster

    cluster.join()
    with cluster.together("to prepare the data set"):
        if INPUT.value is not None and cluster.is_first():
            build(output)
    encode(output)


def build(output: Path) -> None:
    from dpo_jax.data.prepare import builder
    from dpo_jax.progress import ProgressBar

    if INPUT.value is None:
        raise UserError("--input is missing; name the files or folders to read")
    files = []
    for pattern in INPUT.value:
        # Brackets may be part of a name.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise missing(pattern)
        files += [Path(match) for match in matches]
    if ENCODE.value and is_prepared(output, files):
        return
    with ProgressBar("parts") as bar:
        is_first = True

        def show(progress: builder.Progress) -> None:
            nonlocal is_first
            if is_first and progress.done:
                bar.say(f"continuing: {progress.done} of {progress.total} parts are finished")
            is_first = False
            bar.show(progress.step, progress.done, progress.total, records=progress.records)

        summary = builder.prepare(
            SOURCES[SOURCE.value],
            files,
            output,
            workers=WORKERS.value,
            validation_fraction=VALIDATION_FRACTION.value,
            max_damaged_fraction=MAX_DAMAGED_FRACTION.value,
            on_progress=show,
        )
    print(f"{summary}\nwritten to {output}")


class Inputs(pydantic.BaseModel):
    """The part of `summary.json` that says what was prepared."""

    files: list[str]
    source: str
    validation_fraction: float


def is_prepared(output: Path, files: list[Path]) -> bool:
    """Whether an earlier run has prepared just this. Raises FileExistsError if it was something else."""
    if not (output / "summary.json").is_file():
        return False
    summary: Inputs = read_json(output / "summary.json", Inputs)
    given = [str(file) for file in files], SOURCES[SOURCE.value].help, VALIDATION_FRACTION.value
    if (summary.files, summary.source, summary.validation_fraction) != given:
        raise ExistingFileError(
            f"{output} was prepared before, from other --input, or with another --source or --validation_fraction; "
            "leave --input out to encode what is there"
        )
    return True


def compare(output: Path) -> None:
    from dpo_jax.data.prepare.verify import verify
    from dpo_jax.progress import ProgressBar

    if ENCODE.value or INPUT.value is not None:
        raise UserError("--verify reads what is in --output; give neither --input nor --encode with it")
    with ProgressBar("bytes") as bar:
        verified = verify(output, functools.partial(bar.show, "verifying"))
    print(verified)


def encode(output: Path) -> None:
    from dpo_jax import cluster
    from dpo_jax.progress import ProgressBar
    from dpo_jax.training.encoding import encode_data

    config = CONFIG.value
    config.data.path = str(output)
    with ProgressBar("rows", quiet=not cluster.is_first()) as bar:
        folder = encode_data(config, WORKERS.value, bar.say, bar.show)
    if cluster.is_first():
        print(f"encodings are in {folder}")


if __name__ == "__main__":
    cli.run(main)
