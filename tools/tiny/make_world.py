"""Render images of the world as pairs to train the base on: the image of the caption wins over that of another.

    python -m tools.tiny.make_world --output=world.parquet --train=train.txt --heldout=heldout.txt

Only training captions are used, so that nothing that is shipped has seen the held-out ones. The text files list both.
"""

from absl import flags

from dpo_jax import cli
from dpo_jax.files import write_whole
from dpo_jax.tiny import world
from tools.tiny import pairs

OUTPUT = flags.DEFINE_string("output", None, "Parquet file to write.", required=True)
TRAIN = flags.DEFINE_string("train", None, "Text file to write the training captions to.", required=True)
HELDOUT = flags.DEFINE_string("heldout", None, "Text file to write the held-out captions to.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 2048, "Number of pairs.")


def main() -> None:
    """Write the pairs and the lists of captions."""
    captions, heldout = world.split()
    pairs.write(OUTPUT.value, pairs.rendered_pairs(captions, PAIRS.value))
    for file, listed in ((TRAIN.value, captions), (HELDOUT.value, heldout)):
        write_whole(file, "\n".join(listed) + "\n")
    print(f"wrote {PAIRS.value} pairs to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
