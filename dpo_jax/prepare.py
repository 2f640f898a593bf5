"""Turn preference data into the data set that training reads: verified, each image stored once, split by prompt.

  python -m dpo_jax.prepare --input='data/*.parquet' --output=data/pickapic
  python -m dpo_jax.prepare --input=pairs.jsonl --output=data/mine
  python -m dpo_jax.prepare --source=hub:data-is-better-together/open-image-preferences-v1-binarized --output=data/oip

--output then also holds contact_sheet.png, to see at a glance whether winners and losers are the right way round, and
heldout_prompts.jsonl, the prompts of the validation split, for sample --prompts and evaluate --prompts.

With --encode the command also runs the VAE and the text encoders of a config once over the data set, which may have
been prepared before, and stores their outputs. Training with the same config then keeps neither in memory, and decodes
no image:

  python -m dpo_jax.prepare --output=data/pickapic --encode --config=configs/sdxl.py --config.data.encoded_views=2

Run the same command again to continue after an interruption. To read everything that was prepared and encoded, and
compare it with its checksums:

  python -m dpo_jax.prepare --verify --output=data/pickapic
"""

import functools
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import cli
from dpo_jax.api.preparation import prepare
from dpo_jax.command_help import section
from dpo_jax.data.sources import SOURCES, hub
from dpo_jax.errors import UserError

section("Input and output")
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Layout of the input. Default: the one that fits the files and their columns.\n"
    "hub:OWNER/NAME: a data set on the Hugging Face hub, in place of --input.\n"
    + "\n".join(f"{name}: {source.help}" for name, source in SOURCES.items()),
)
INPUT = flags.DEFINE_list(
    "input",
    None,
    "Files or folders to read; comma-separated, wildcards allowed. hub:OWNER/NAME[@REVISION][/PATTERN] fetches the "
    "parquet and tar files of a data set on the hub (by default those of the train split).",
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write: new or empty; with --encode or --verify a prepared one.", required=True
)

section("Preparing")
WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that read (with --encode: threads). Default: one per core; 0 reads in this process.",
    0,
    2**10,
)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.05, "Fraction of the prompts to hold out for validation.", lower_bound=0, upper_bound=1
)
MAX_DAMAGED_FRACTION = flags.DEFINE_float(
    "max_damaged_fraction",
    0.01,
    "Fraction of the records that may be damaged; more stop the command.",
    lower_bound=0,
    upper_bound=1,
)

section("Encoding and checking")
ENCODE = flags.DEFINE_bool(
    "encode", False, "Store the latents and embeddings that the models of --config make of the data set in --output."
)
VERIFY = flags.DEFINE_bool("verify", False, "Only compare everything in --output with its checksums.")


def choose_method(config: ConfigDict, name: str) -> None:
    from dpo_jax.training import defaults  # it imports JAX, which takes seconds

    defaults.choose_method(config, name)


CONFIG = cli.define_config("With --encode: config of the training to encode for:", choose_method)


def main() -> None:
    if ENCODE.value != (CONFIG.value is not None):
        raise UserError(
            "--encode and --config go together: the config states the models and the resolution to encode with. Give "
            "both, or neither."
        )
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
        if (INPUT.value is not None or SOURCE.value is not None) and cluster.is_first():
            build(output)
    encode(output)


def build(output: Path) -> None:
    from dpo_jax.data.prepare import review

    prepared = prepare(
        INPUT.value,
        output,
        source=SOURCE.value,
        workers=WORKERS.value,
        validation_fraction=VALIDATION_FRACTION.value,
        max_damaged_fraction=MAX_DAMAGED_FRACTION.value,
    )
    if prepared.summary is None:
        if not ENCODE.value:
            print(f"already prepared: {output} ({prepared.records} records)")
        return
    print(f"{prepared.summary}\nlook at      {output / review.CONTACT_SHEET} (is the winner the better image?)")
    if "validation" in prepared.summary.prompts:
        print(f"held out     {output / review.HELDOUT_PROMPTS} (for sample --prompts)")
    print(f"written to   {output}")


@flags.validator("source", "the layouts are " + ", ".join(SOURCES) + ", or hub:OWNER/NAME")
def is_source(source: str | None) -> bool:
    return source is None or source in SOURCES or source.startswith(hub.PREFIX)


def compare(output: Path) -> None:
    from dpo_jax.data.prepare.verify import verify
    from dpo_jax.progress import ProgressBar

    if ENCODE.value or INPUT.value is not None or SOURCE.value is not None:
        raise UserError("--verify reads what is in --output; leave --input, --source and --encode out")
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
        print(f"latents and embeddings are in {folder}")


if __name__ == "__main__":
    cli.run(main)
