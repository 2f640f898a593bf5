"""Writes rendered pictures of the world as pairs, to train the base on: the right picture wins over a wrong one.

    python -m dpo_jax.tiny.make_world --output=runs/tiny/world.parquet

Only training captions are used: those held out stay unseen by everything that is shipped.
"""

from absl import flags

from dpo_jax import cli
from dpo_jax.tiny import pairs, world

OUTPUT = flags.DEFINE_string("output", None, "Parquet file to write.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 2048, "Number of pairs.")


def main() -> None:
    """Writes the file."""
    captions, _ = world.split()
    pairs.write(OUTPUT.value, pairs.rendered_pairs(captions, PAIRS.value))
    print(f"wrote {PAIRS.value} pairs to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
