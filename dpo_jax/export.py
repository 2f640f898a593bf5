"""Writes the tuned model as a complete PyTorch diffusers folder; everything but the UNet is copied from the base.

  python -m dpo_jax.export --workdir=runs/sdxl --output=exported/sdxl [--dtype=float16]

The result opens with diffusers.DiffusionPipeline.from_pretrained("exported/sdxl").
"""

from absl import flags

from dpo_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "New folder for the exported model.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Dtype of the UNet's weights.")


def main() -> None:
    from dpo_jax.models.pipeline import save_pipeline
    from dpo_jax.training.experiment import open_run

    run = open_run(WORKDIR.value)
    save_pipeline(run.pipeline, OUTPUT.value, run.params, dtype=DTYPE.value)
    print(f"exported the model after step {run.step} to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
