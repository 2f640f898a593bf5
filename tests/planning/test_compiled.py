"""The real step is compiled for devices that this machine does not have."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dpo_jax.cli import load_config
from dpo_jax.models.execution import Execution
from dpo_jax.models.layers import LINEAR_AXES, Linear
from dpo_jax.models.lora import LowRank, add_lora, lora_specs
from dpo_jax.models.network import Network
from dpo_jax.planning.compiled import compile_step, compile_update, described_devices
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import parse_topology
from dpo_jax.sharding import make_mesh, replicated
from dpo_jax.training.optim import make_optimizer
from dpo_jax.training.rounding import store, widened
from dpo_jax.training.step import with_norm
from dpo_jax.weights.layout import ParamSpec
from dpo_jax.weights.quantised import QTYPES, quantised_shape

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
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4.5)])
def test_quantised_weights_are_multiplied_out_one_by_one(kind: str, bits: float, remat: str) -> None:
    """Of twelve layers with a LoRA, in a loop over micro-batches, at most one each of policy and reference is whole.

    Without the barriers of `layers.product_with` all twelve are.
    """
    layers, width = 12, 1024
    mesh = make_mesh(1, 1, 1, described_devices(parse_topology("h200:1")))

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    def make() -> nnx.List:
        return nnx.List(
            [Linear(width, width, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for _ in range(layers)]
        )

    def make_adapted() -> nnx.List:
        module = make()
        add_lora(module, {str(i): LowRank(4, 4) for i in range(layers)}, 0.0, nnx.Rngs(0))
        return module

    plain, adapted = (Network.build(lambda _, make=make: make(), None) for make in (make, make_adapted))
    adapter = {
        name: shape(jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)) for name, spec in lora_specs(adapted).items()
    }
    kernels = {name: shape(jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)) for name, spec in plain.specs.items()}
    base = {name: jax.tree.map(shape, quantised_shape(x.shape, QTYPES[kind])) for name, x in kernels.items()}

    def output(network: Network, params: Any, x: jax.Array) -> jax.Array:
        return Execution(remat).run_chain(
            [lambda x, layer=layer: jnp.tanh(layer(x)) for layer in network.bind(params)], x
        )

    def gradient(adapter: Any, base: Any, micro_batches: jax.Array) -> Any:
        def add(total: Any, x: jax.Array) -> tuple[Any, None]:
            def loss(adapter: Any) -> jax.Array:
                difference = output(adapted, base | adapter, x) - output(plain, base, x)
                return jnp.square(difference.astype(jnp.float32)).sum()

            return jax.tree.map(jnp.add, total, jax.grad(loss)(adapter)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapter), micro_batches)[0]

    micro_batches = shape(jax.ShapeDtypeStruct((4, 16, width), jnp.bfloat16))
    of_kernels, of_base = (
        jax.jit(gradient)
        .lower(adapter, held, micro_batches)
        .compile({"xla_gpu_enable_triton_gemm": False})
        .memory_analysis()
        for held in (kernels, base)
    )
    in_bfloat16 = 2 * width**2
    saved = layers * in_bfloat16 * (1 - bits / 16)
    assert of_kernels.argument_size_in_bytes - of_base.argument_size_in_bytes == pytest.approx(saved, rel=0.01)
    assert of_base.temp_size_in_bytes - of_kernels.temp_size_in_bytes < 2.5 * in_bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs jax_cuda12_plugin")
@pytest.mark.parametrize(
    ("name", "masters", "moments"),
    [("adamw", "float32", "float32"), ("adamw", "bfloat16", "int8"), ("adafactor", "bfloat16", "float32")],
)
def test_an_update_has_few_parameters_in_float32_at_a_time(name: str, masters: str, moments: str) -> None:
    """Of 12 parameters; without the barriers of `step.with_norm`, 8-bit moments take as much as 19."""
    mesh = make_mesh(1, 1, 1, described_devices(parse_topology("h200:1")))
    specs = {f"{i}.kernel": ParamSpec((4096, 4096), LINEAR_AXES) for i in range(12)}
    optimizer = make_optimizer(name, optax.constant_schedule(1e-4), specs, moments=moments)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    params = {name: shape(jax.ShapeDtypeStruct(spec.shape, jnp.dtype(masters))) for name, spec in specs.items()}
    state = jax.tree.map(shape, jax.eval_shape(optimizer.init, params))

    def update(params: Any, state: Any, grads: Any, weight: jax.Array) -> Any:  # as the step does it
        grads = jax.tree.map(lambda x: x / weight, widened(grads))
        changes = jnp.isfinite(optax.tree.norm(grads))
        updates, moved = optimizer.update(grads, state, params)
        updates, norm = with_norm(updates, params)
        updated = jax.tree.map(jnp.add, widened(params), updates)
        moved = store(updated, params, jax.random.key(0)), moved
        return jax.tree.map(lambda new, old: jnp.where(changes, new, old), moved, (params, state)), norm

    options = {"xla_gpu_enable_triton_gemm": False}
    compiled = (
        jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params, shape(jnp.zeros(()))).compile(options)
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * (4 * 4096**2)


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
