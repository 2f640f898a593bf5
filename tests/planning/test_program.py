"""Figures of traced programs match PyTorch's counter and sums computed by hand."""

import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch
from jax.experimental import pallas as pl
from torch.utils.flop_counter import FlopCounterMode

from dpo_jax.batch import Conditioning
from dpo_jax.models import attention as attention_module
from dpo_jax.models.attention import AGAIN, attention
from dpo_jax.models.execution import Execution
from dpo_jax.models.families import PUBLISHED
from dpo_jax.models.network import Network, network_of
from dpo_jax.models.random_model import UNET_SDXL
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.planning.program import Program, kept_bytes, peak_bytes

SD3 = {
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "dual_attention_layers": [0],
    "in_channels": 4,
    "joint_attention_dim": 80,
    "num_attention_heads": 4,
    "num_layers": 3,
    "out_channels": 4,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "sample_size": 32,
}


def trace(function, *shapes, dtype=jnp.float32) -> Program:
    return Program(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)))


def unet_program(
    transform=lambda loss: loss, config=UNET_SDXL, cells=16, tokens=5, features=(80, 40), dtype=jnp.float32
) -> Program:
    """Return the program of the sum of a UNet's output for two images, or of a `transform` of it."""
    config = UNetConfig.from_dict(config, "config.json")
    unet = Network.build(lambda rngs: UNet2DConditionModel(config, dtype=dtype, rngs=rngs), config)
    return denoiser_program(unet, transform, cells, tokens, features)


def denoiser_program(network, transform, cells=16, tokens=5, features=(80, 40)) -> Program:
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in network.specs.items()}
    shapes = [(2, cells, cells, 4), (2,), (2, tokens, features[0]), (2, features[1]), (2, 6)]
    x, t, context, pooled, ids = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def loss(params, x, t, conditioning):
        return network(params, x, t, conditioning).sum()

    return Program(jax.make_jaxpr(transform(loss))(params, x, t, Conditioning(context, pooled, ids)))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_operations_of_a_joint_transformer_are_those_that_pytorch_counts(gradient: bool) -> None:
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel.from_config(SD3)
        inputs = torch.zeros(2, 4, 32, 32), torch.zeros(2, 5, 80), torch.zeros(2, 40), torch.zeros(2)
        with FlopCounterMode(display=False) as counter:
            y = model(*inputs).sample
            if gradient:
                y.sum().backward()
    config = SD3TransformerConfig.from_dict(SD3, "config.json")
    network = network_of(SD3Transformer2DModel, config, execution=Execution(scan=True), dtype="float32")
    program = denoiser_program(network, jax.grad if gradient else lambda loss: loss, cells=32)
    assert program.flops(without=AGAIN) == pytest.approx(counter.get_total_flops(), rel=2e-3 if gradient else 1e-9)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_operations_of_the_unet_are_those_that_pytorch_counts(gradient: bool) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(UNET_SDXL)
        added = {"text_embeds": torch.zeros(2, 40), "time_ids": torch.zeros(2, 6)}
        with FlopCounterMode(display=False) as counter:
            y = unet(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 5, 80), added_cond_kwargs=added).sample
            if gradient:
                y.sum().backward()
    expected = counter.get_total_flops()
    program = unet_program(jax.grad) if gradient else unet_program()
    assert program.flops(without=AGAIN) == pytest.approx(expected, rel=2e-3 if gradient else 1e-9)
    # The products of queries and keys, a second time in the backward pass.
    again = program.flops() - program.flops(without=AGAIN)
    assert 0 < again < 0.02 * expected if gradient else again == 0


@pytest.mark.parametrize(
    ("family", "cells", "features", "gib"),
    [("sd15", 64, (768, 0), 0.77), pytest.param("sdxl", 128, (2048, 1280), 5.8, marks=pytest.mark.slow)],
)
def test_what_an_image_keeps_for_the_backward_pass(
    family: str, cells: int, features: tuple[int, int], gib: float
) -> None:
    """At full size; autodiff of plain norms, gates and attention kept 3.2 and 15.1 GiB."""
    config = json.loads((PUBLISHED / family / "unet" / "config.json").read_text())

    def forward(loss):
        return lambda params, *inputs: jax.vjp(lambda params: loss(params, *inputs), params)[1]

    program = unet_program(forward, config, cells, 77, features, jnp.bfloat16)
    joined, by_library = (kept_bytes(program, program.inputs[:-5], by_library=where) / 2**31 for where in (False, True))
    assert 0.6 * gib < joined < by_library < gib


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)], ids=["plain", "strided", "dilated"])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(stride: int, dilation: int) -> None:
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "VALID",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    x, kernel = (2, 65, 65, 3), (3, 3, 3, 5)
    size = (65 - 2 * dilation - 1) // stride + 1
    once = 2 * (2 * size * size * 5) * (3 * 3 * 3)
    assert trace(convolve, x, kernel).flops() == once
    gradient = jax.grad(lambda x, kernel: convolve(x, kernel).sum(), argnums=(0, 1))
    # Of positions at the edge, where a transposed convolution meets padding, all taps are counted.
    assert trace(gradient, x, kernel).flops() == pytest.approx(2 * once, rel=0.1)


def test_a_loop_counts_as_often_as_it_goes_round_and_what_nobody_reads_not_at_all() -> None:
    def loop(x, w):
        jnp.sum(x @ w)
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=7)[0], 2 * x

    assert trace(loop, (3, 4), (4, 4)).flops() == 7 * 2 * 3 * 4 * 4


def test_rematerialization_computes_the_forward_pass_twice() -> None:
    def block(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(policy, w, x):
        return Execution(policy).run(block, w, x).sum()

    once = 2 * 8 * 16 * 16
    traced = {p: jax.value_and_grad(functools.partial(loss, p)) for p in ("none", "block")}
    flops = {p: trace(function, (16, 16), (8, 16)).flops() for p, function in traced.items()}
    # Two products forward; backward two for the weights and one for the values between, x needing none.
    assert flops == {"none": 5 * once, "block": 7 * once}


def test_most_bytes_at_a_time() -> None:
    """y = x W; z = tanh(y) V: y exists while tanh(y) is made, and that while z is."""

    def two_products(w, v, x):
        return jnp.sum(jnp.tanh(x @ w) @ v)

    program = trace(two_products, (16, 32), (32, 64), (8, 16))
    y, z = 8 * 32 * 4, 8 * 64 * 4
    assert peak_bytes(program, program.inputs[:2]) == y + z


def test_what_a_librarys_product_reads_is_in_memory() -> None:
    """Of y = x W and y^2 V the derivative needs y, and y^2, which need not last where it can be made again of y."""

    def with_pull(w, v, x):
        return jax.vjp(lambda w, v: jnp.sum(jnp.square(x @ w).T.reshape(8, 32) @ v), w, v)

    program = trace(with_pull, (16, 32), (32, 64), (8, 16))
    y, result = 8 * 32 * 4, 4
    assert kept_bytes(program, program.inputs[:2]) == y + result
    assert kept_bytes(program, program.inputs[:2], by_library=True) == 2 * y + result


def test_a_loop_holds_what_its_body_does() -> None:
    def loop(w, x):
        return jax.lax.scan(lambda x, _: (jnp.sum((x @ w) @ w.T) + x, None), x, None, length=7)[0]

    program = trace(loop, (16, 512), (8, 16))
    result, in_body = 8 * 16 * 4, 8 * 512 * 4 + 8 * 16 * 4
    assert in_body <= peak_bytes(program, program.inputs[:1]) <= 2 * result + in_body


def test_elementwise_results_that_no_product_reads_take_no_memory() -> None:
    def plain(w, x):
        return (x @ w).sum()

    def long_chain(w, x):
        y = x @ w
        return (jnp.exp(jnp.tanh(y.astype(jnp.float32)) * 2) + y).sum()

    shapes = (16, 16), (8, 16)
    plain_program, chain = trace(plain, *shapes), trace(long_chain, *shapes)
    assert peak_bytes(chain, chain.inputs[:1]) == peak_bytes(plain_program, plain_program.inputs[:1]) == 8 * 16 * 4


def test_rounded_weights_and_gradients_are_not_activations() -> None:
    def loss(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).sum()

    program = trace(jax.grad(loss), (1000, 16), (8, 1000))
    assert peak_bytes(program, program.inputs[:1]) < 1000 * 16


@pytest.mark.parametrize("limit", [2**27, 2**14], ids=["whole", "in blocks"])
def test_a_kernel_of_attention_keeps_what_only_it_reads(monkeypatch, limit):
    """Which is more than all that is read outside: the products of 512 queries and keys."""
    monkeypatch.setattr(attention_module, "LOGITS_BYTES", limit)

    def loss(x_NLD, kernel):
        query, key, value = jnp.split(x_NLD @ kernel, 3, axis=-1)
        return jnp.square(attention(query, key, value, 2)).sum()

    program = trace(jax.grad(loss), (1, 512, 32), (32, 96))
    weights = program.inputs[1:]
    (written_out, fused) = (
        peak_bytes(program, weights, by_library=True, fused=fused) for fused in (None, attention_module.ATTENTION)
    )
    array = 512 * 32 * 4
    products_of_block = min(limit, 2 * 512 * 512 * 4)
    assert 6 * array < fused < 10 * array  # q, k, v, the result and gradients
    assert written_out > fused + products_of_block / 2


def test_a_kernel_in_pallas_is_one_operation() -> None:
    """Its body has arguments of its own, such as results and scratch memory."""

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    double = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True)
    program = trace(lambda x, w: double(x) @ w, (8, 128), (128, 4))
    assert [operation.name for operation in program.operations] == ["pallas_call", "dot_general"]
    assert peak_bytes(program, ()) == 8 * 128 * 4
