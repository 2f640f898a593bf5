"""One Diffusion-DPO gradient of the full-size SD1.5 UNet at 256 pixels, random weights, float32: PyTorch's and ours.

The frameworks run one after the other, each in a process of its own that starts this file and reports its loss, the
gradient norm of every top-level block and its peak memory: about 14 GB, with 3.5 GB of disk, for four minutes.
"""

import json
import os
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
UNET = json.loads((HERE.parents[1] / "dpo_jax/models/published/sd15/unet/config.json").read_text())
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
BETA = 1000.0
TIMESTEP = 400
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """latents_BKHWC, noise_BHWC, context_BLD of one pair."""
    rng = np.random.default_rng(0)
    shapes = (1, 2, 32, 32, 4), (1, 32, 32, 4), (1, 77, 768)
    latents, noise, context = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return latents, noise, context


def policy_factor(torch_name: str) -> float:
    """The policy is the reference with each tensor scaled by its own few percent, so that gradients tell something."""
    return 1 + 0.05 * (zlib.crc32(torch_name.encode()) / 2**32 - 0.5)


def block_norms(squares: dict[str, float]) -> dict[str, float]:
    """Squared gradient norms by torch name -> norms by top-level block (`down_blocks.1`, `mid_block`, `conv_in`)."""
    totals: dict[str, float] = {}
    for name, square in squares.items():
        head, second = name.split(".")[:2]
        block = f"{head}.{second}" if second.isdigit() else head
        totals[block] = totals.get(block, 0.0) + square
    return {block: total**0.5 for block, total in totals.items()}


def run_torch(folder: Path) -> tuple[float, dict[str, float]]:
    """Makes the weights, then computes with them."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(UNET)
    unet.save_pretrained(folder, max_shard_size="100GB")
    latents_BKHWC, noise_BHWC, context_BLD = map(torch.from_numpy, make_inputs())
    latents, noise = latents_BKHWC[0].permute(0, 3, 1, 2), noise_BHWC.permute(0, 3, 1, 2).repeat(2, 1, 1, 1)
    timesteps = torch.full((2,), TIMESTEP)
    noisy_latents = diffusers.DDPMScheduler(**SCHEDULER).add_noise(latents, noise, timesteps)

    def errors() -> torch.Tensor:
        prediction = unet(noisy_latents, timesteps, context_BLD.repeat(2, 1, 1)).sample
        return (prediction - noise).pow(2).mean(dim=[1, 2, 3])

    with torch.no_grad():
        ref_losses_w, ref_losses_l = errors()
        for name, parameter in unet.named_parameters():
            parameter *= policy_factor(name)
    model_losses_w, model_losses_l = errors()
    inside = -0.5 * BETA * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
    loss = -torch.nn.functional.logsigmoid(inside)
    loss.backward()
    return loss.item(), {name: float(p.grad.double().square().sum()) for name, p in unet.named_parameters()}


def run_jax(folder: Path) -> tuple[float, dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from dpo_jax.batch import Conditioning
    from dpo_jax.diffusion.schedule import make_schedule
    from dpo_jax.methods.dpo import dpo
    from dpo_jax.models.network import Network
    from dpo_jax.models.unet import UNet2DConditionModel
    from dpo_jax.models.unet_config import UNetConfig
    from dpo_jax.objectives.denoising import compare_denoising
    from dpo_jax.weights.io import load_params
    from dpo_jax.weights.layout import torch_name

    config = UNetConfig.from_dict(UNET, "UNET")
    network = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=jnp.float32, rngs=rngs), config)
    reference = load_params(folder, network.specs, dtype=jnp.float32)
    policy = {name: value * policy_factor(torch_name(name)) for name, value in reference.items()}
    latents_BKHWC, noise_BHWC, context_BLD = map(jnp.asarray, make_inputs())
    schedule = make_schedule(SCHEDULER)

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(policy, reference):
        t_B, conditioning = jnp.array([TIMESTEP]), Conditioning(context_BLD)
        inputs = compare_denoising(network, policy, reference, schedule, latents_BKHWC, noise_BHWC, t_B, conditioning)
        return dpo(inputs._replace(preference_BK=jnp.array([[1.0, 0.0]])), beta=BETA).mean()

    loss, grads = loss_and_grads(policy, reference)
    return float(loss), {torch_name(name): np.square(np.float64(grad)).sum() for name, grad in grads.items()}


def main(framework: str, folder: str) -> None:
    loss, squares = {"torch": run_torch, "jax": run_jax}[framework](Path(folder))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"loss": loss, "norms": block_norms(squares), "peak_gb": peak_gb}))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_real_size_step_agrees_with_pytorch(tmp_path):
    results = {}
    for framework in ("torch", "jax"):
        command = [sys.executable, __file__, framework, str(tmp_path)]
        environment = {**os.environ, "XLA_FLAGS": ""}
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=environment)
        assert done.returncode == 0, done.stderr
        results[framework] = json.loads(done.stdout.splitlines()[-1])
        print(framework, results[framework])

    oracle, ours = results["torch"], results["jax"]
    assert abs(oracle["loss"] - np.log(2)) > 0.01, "the policy should differ from the reference"
    assert ours["loss"] == pytest.approx(oracle["loss"], rel=1e-3)
    assert ours["norms"] == pytest.approx(oracle["norms"], rel=1e-3)
    assert min(oracle["norms"].values()) > 0
    assert max(oracle["peak_gb"], ours["peak_gb"]) < 20


if __name__ == "__main__":
    main(*sys.argv[1:])
