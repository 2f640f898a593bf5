"""Draw the image of the README: held-out captions by the tiny base model and by the demo's tuned one.

  python docs/before_after.py --tuned=runs/tiny/exported --output=docs/images/before_after.png

Both models draw a caption from the same noise. The captions are evenly spaced in the list of those that neither has
seen, so nobody chose them. A minute on two CPU cores, after the demo.
"""

from pathlib import Path

from absl import flags

from dpo_jax import cli

BASE = flags.DEFINE_string("base", "dpo_jax/tiny/model", "The model before.")
TUNED = flags.DEFINE_string("tuned", "runs/tiny/exported", "The model after.")
OUTPUT = flags.DEFINE_string("output", "docs/images/before_after.png", "PNG file to write.")
CAPTIONS = flags.DEFINE_integer("captions", 4, "Captions to draw.", 1)
SEEDS = flags.DEFINE_integer("seeds", 4, "Images per caption and model.", 1)


def main() -> None:
    from dpo_jax.sampling.generate import Sampling
    from dpo_jax.sampling.grid import image_grid
    from dpo_jax.sampling.loaded_model import open_model
    from dpo_jax.sampling.prompts import read_prompts

    prompts = [prompt.text for prompt in read_prompts("dpo_jax/tiny/heldout.txt")]
    chosen = prompts[:: len(prompts) // CAPTIONS.value][: CAPTIONS.value]
    captions = [caption for caption in chosen for _ in range(SEEDS.value)]
    drawn = []
    for path in (BASE.value, TUNED.value):
        model = open_model(path, dtype="float32")
        sampling = Sampling(sampler="ddim", steps=20, guidance=2.5)
        generator = model.generator(sampling, resolution=model.resolution, batch_size=len(captions))
        drawn.append(generator(model.unet, captions, list(range(len(captions)))))
    rows = []
    for number, caption in enumerate(chosen):
        cells = slice(number * SEEDS.value, (number + 1) * SEEDS.value)
        rows.append((caption, [*drawn[0][cells], *drawn[1][cells]]))
    grid = image_grid(rows, ["before"] * SEEDS.value + ["after"] * SEEDS.value)
    Path(OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    grid.save(OUTPUT.value, optimize=True)
    print(f"written to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
