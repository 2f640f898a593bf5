#!/usr/bin/env bash
# Runs the tiny example from start to end on any machine with Python and git: prepare, train, export, evaluate.
# With --flow the model is a flow model with the structure of Stable Diffusion 3.5, otherwise it has that of SDXL.
started=$(date +%s)
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
name=tiny kind=
if [ "${1:-}" = --flow ]; then
  name=tiny_flow kind=flow_
  shift
fi
workdir=${1:-runs/$name}
if [ -e "$workdir" ]; then
  echo "error: $workdir already exists; remove it, or name another folder: bash launch/demo.sh [--flow] FOLDER" >&2
  exit 1
fi

python -m dpo_jax.prepare --source=pickapic --input="dpo_jax/tiny/${kind}pairs.parquet" --output="$workdir/data" \
  --validation_fraction=0.1
python -m dpo_jax.train --config="configs/$name.py" --workdir="$workdir" --config.data.path="$workdir/data"
python -m dpo_jax.export --workdir="$workdir" --output="$workdir/exported"
python -m dpo_jax.evaluate --models=base="dpo_jax/tiny/${kind}model",tuned="$workdir/exported" \
  --prompts=dpo_jax/tiny/heldout.txt --judges=shapes --seeds=20 --steps=20 --guidance=2.5 --batch_size=32 \
  --output="$workdir" --curves="$workdir" --since="$started"

echo
echo "the tuned model, a diffusers folder: $workdir/exported"
echo "curves: pip install tensorboard && tensorboard --logdir $workdir/tensorboard"
