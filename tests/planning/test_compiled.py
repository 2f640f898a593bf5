"""The real step is compiled for devices that this machine does not have."""

import importlib.util
import math

import pytest

from dpo_jax.cli import load_config
from dpo_jax.planning.compiled import compile_step, compile_update
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import parse_topology

COMPILERS = {"v5e:2x2": "libtpu", "h200:4": "jax_cuda12_plugin"}
INSTALLED = [
    pytest.param(topology, marks=pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}"))
    for topology, package in COMPILERS.items()
]


@pytest.mark.parametrize("topology", COMPILERS)
def test_a_compiler_that_is_missing_is_named(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config("configs/sd15.py:tiny")
    extra = "tpu" if COMPILERS[topology] == "libtpu" else "cuda12"
    with pytest.raises(ValueError, match=rf'pip install "jax\[{extra}\]"'):
        compile_step(config, open_structure(config), parse_topology(topology))


@pytest.mark.slow
@pytest.mark.parametrize("topology", INSTALLED)
def test_an_update_of_online_learning_is_compiled_too(topology: str) -> None:
    config = load_config("configs/nft.py:tiny")
    config.data.batch_size = config.online.prompts_per_round = 4
    config.dtype = config.vae_dtype = "bfloat16"
    compiled = compile_update(config, open_structure(config), parse_topology(topology))
    assert 0 < compiled.argument_bytes < compiled.hbm_bytes < 2**30
    assert sum(s.flops for s in compiled.products.values()) == pytest.approx(
        sum(s.flops for s in compiled.traced_products.values()), rel=0.03
    )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs jax_cuda12_plugin")
@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4.5)])
def test_quantised_weights_are_multiplied_out_one_by_one(kind: str, bits: float) -> None:
    """The LoRA of SD1.5 with two micro-batches: the whole UNet in bfloat16 would be 1.6 GiB of the temporary values."""
    config = load_config("configs/sd15.py:lora")
    config.memory.frozen, config.remat = kind, "block"
    config.data.batch_size, config.data.micro_batch, config.data.resolution = 2, 1, 256
    config.data.encoded_views, config.data.random_flip = 1, False
    pipeline = open_structure(config)
    numbers = sum(math.prod(spec.shape) for spec in pipeline.denoiser.specs.values())
    compiled = compile_step(config, pipeline, parse_topology("h200:1"))
    assert bits / 8 * numbers < compiled.argument_bytes < 1.1 * bits / 8 * numbers
    assert compiled.temporary_bytes < 0.6 * 2 * numbers


@pytest.mark.slow
@pytest.mark.parametrize("topology", INSTALLED)
def test_a_device_is_compiled_for_without_one(topology: str) -> None:
    config = load_config("configs/sd15.py:tiny")
    config.data.batch_size, config.data.micro_batch = 64, 8
    config.dtype = config.vae_dtype = "bfloat16"
    compiled = compile_step(config, open_structure(config), parse_topology(topology))
    assert 0 < compiled.argument_bytes < compiled.hbm_bytes < 2**30
    assert compiled.collectives["all-reduce"]["times"] > 0
    assert compiled.traffic["copies"] < 0.15 * sum(compiled.traffic.values())
    assert compiled.float32_flops < 0.01 * sum(s.flops for s in compiled.products.values())  # the time embedding
    assert compiled.products["done again"].flops == pytest.approx(compiled.traced_products["done again"].flops)
    assert sum(s.flops for s in compiled.products.values()) == pytest.approx(
        sum(s.flops for s in compiled.traced_products.values()), rel=0.03
    )
