"""dpo_jax: align text-to-image diffusion models with human preferences, in JAX."""

import os
import sys

from dpo_jax import interrupts

if sys.argv[:1] == ["-m"]:  # `python -m dpo_jax.NAME` begins: cli.run takes over when all is imported
    interrupts.leave_at_once()

# Without this flag XLA keeps bfloat16 intermediates in float32 wherever a fusion likes to, so the policy's and the
# reference's forward pass round differently although their weights are equal, and beta = 5000 turns that into a
# step-0 loss of 2.3 instead of log 2. XLA reads the variable when the first backend starts, so it is set on import.
# On CPUs YNNPACK's fusions do it all the same in larger batches; configs for CPUs are in float32.
_EXACT_BF16 = "--xla_allow_excess_precision"
if _EXACT_BF16 not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EXACT_BF16}=false".strip()

__version__ = "0.1.0"
