"""Make the shipped preference pairs: samples of the base model, labelled by the exact judge.

    python -m tools.tiny.make_pairs --model=dpo_jax/tiny/model --output=dpo_jax/tiny/pairs.parquet

The base draws many images per training caption. Two images of unequal score make a pair, and no image is used twice.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import flags

from dpo_jax import cli
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.models.pipeline import load_pipeline
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.tiny import world
from tools.tiny import pairs

MODEL = flags.DEFINE_string("model", None, "The base model's folder.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Parquet file to write.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 1000, "Maximum number of pairs.")
SEEDS = flags.DEFINE_integer("seeds", 36, "Images to draw per caption.")
STEPS = flags.DEFINE_integer("steps", 20, "Sampling steps, of DDIM or, for a flow model, of its own sampler.")
GUIDANCE = flags.DEFINE_float("guidance", 2.5, "Classifier-free guidance scale.")


def main() -> None:
    """Draw the images, judge them, and write the pairs."""
    pipeline = load_pipeline(MODEL.value, dtype=jnp.float32)
    weights = {component: pipeline.load(component, dtype=jnp.float32) for component in pipeline.components}
    denoiser = weights.pop(pipeline.denoiser_name)
    tokenizers = load_tokenizers(MODEL.value, pipeline.tokenizers)
    generator = Generator(
        pipeline,
        lambda: weights,
        tokenizers,
        Placement(make_mesh()),
        Sampling(STEPS.value, GUIDANCE.value, "" if pipeline.schedule.is_flow else "ddim"),
        resolution=world.SIZE,
        batch_size=64,
    )

    def sample(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return generator(denoiser, captions, seeds)

    captions, _ = world.split()
    judged = pairs.judged_pairs(sample, captions, SEEDS.value, PAIRS.value)
    pairs.write(OUTPUT.value, judged)
    print(f"wrote {len(judged)} pairs to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
