#!/usr/bin/env bash
# Makes the base model and the preference pairs in dpo_jax/tiny. It takes about ten minutes on 2 CPU cores.
# With --flow it makes the flow model beside them, from the VAE of that base.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
work=runs/make_tiny

if [ "${1:-}" = --flow ]; then
  python -m tools.tiny.make_model --flow --vae=dpo_jax/tiny/model/vae --output=$work/flow_untrained
  python -m tools.tiny.make_world --output=$work/world.parquet --train=$work/train.txt --heldout=$work/heldout.txt
  python -m dpo_jax.prepare --source=pickapic --input=$work/world.parquet --output=$work/flow_data \
    --encode --config=configs/tiny_flow.py:base --config.model=$work/flow_untrained
  python -m dpo_jax.train --config=configs/tiny_flow.py:base --workdir=$work/flow_base \
    --config.model=$work/flow_untrained --config.data.path=$work/flow_data
  python -m dpo_jax.export --workdir=$work/flow_base --output=$work/flow_model --dtype=float16
  python -m tools.tiny.make_pairs --seeds=16 --pairs=260 --model=$work/flow_model --output=$work/flow_pairs.parquet
  rm -rf dpo_jax/tiny/flow_model
  cp -r $work/flow_model dpo_jax/tiny/flow_model
  rm dpo_jax/tiny/flow_model/README.md
  cp $work/flow_pairs.parquet dpo_jax/tiny/
  exit
fi

# The VAE, then a model folder with this VAE and a random UNet.
python -m tools.tiny.train_vae --output=$work/vae
python -m tools.tiny.make_model --vae=$work/vae --output=$work/untrained

# The base: plain denoising of captioned images, by this trainer's SFT mode.
python -m tools.tiny.make_world --output=$work/world.parquet --train=$work/train.txt --heldout=$work/heldout.txt
python -m dpo_jax.prepare --source=pickapic --input=$work/world.parquet --output=$work/data
python -m dpo_jax.train --config=configs/tiny.py:base --workdir=$work/base \
  --config.model=$work/untrained --config.data.path=$work/data
python -m dpo_jax.export --workdir=$work/base --output=$work/model --dtype=float16

# Pairs of its own samples, labelled by the exact judge.
python -m tools.tiny.make_pairs --seeds=40 --model=$work/model --output=$work/pairs.parquet

rm -rf dpo_jax/tiny/model
cp -r $work/model dpo_jax/tiny/model
cp $work/pairs.parquet $work/train.txt $work/heldout.txt dpo_jax/tiny/
