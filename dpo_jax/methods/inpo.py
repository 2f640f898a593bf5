"""InPO: DPO at latents that the policy itself would pass through on its way to an image (arXiv 2503.18454).

The loss is DPO's. What is its own is `loss.inversion_steps`, which any method on a data set can have: the noise of an
image is not drawn but found by steps of inverted DDIM, with the policy and the caption and without guidance.

The released code (JaydenLyh/InPO) inverts to the last of the timesteps 1, 101, ..., 901 below the drawn t, but solves
the noise for t, so that x_t has too little of it: at t = 150, a perfect network would give noise of deviation 0.73.
Here the last step leads to t itself. The code also adds some fresh noise in each step, 0.1 of DDPM's, and inverts all
images on a device to the timestep of the first; here inversion is deterministic, and each pair has its own timestep.
Published for SD1.5, from a UNet after SFT: beta 2000, 400 steps of 1024 pairs, 200 of them warm-up. SDXL has beta 5000.
"""

from dpo_jax.fields import Field
from dpo_jax.methods.dpo import DPO, dpo
from dpo_jax.methods.method import Method

BETA = Field(2000.0, "Strength of the pull towards the reference; published: 5000 for SDXL.", above=0)
INPO = Method(
    name="inpo",
    title="InPO",
    paper="2503.18454",
    loss=dpo,
    fields={**DPO.fields, "beta": BETA},
    sets={"loss.inversion_steps": 10},
    margin_scale="beta",
    reads_log_ratios_alone=True,
)
