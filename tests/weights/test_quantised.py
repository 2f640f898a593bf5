"""Quantised weights are those of the published schemes, written here in NumPy, and as near to the originals as these
say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from dpo_jax.planning.sizes import stored_bytes
from dpo_jax.weights.layout import ParamSpec
from dpo_jax.weights.quantised import BLOCK, NF4, QTYPES, dequantise, is_quantised, quantise, quantised_shape, rounded

LINEAR, CONV = (192, 40), (3, 3, 64, 24)
TABLE = np.array(NF4, np.float32)


@pytest.fixture(scope="module", params=[LINEAR, CONV], ids=["linear", "convolution"])
def kernel(request: pytest.FixtureRequest) -> np.ndarray:
    """A kernel whose outputs differ in size, one of which is 0."""
    random = np.random.default_rng(0)
    kernel = random.normal(size=request.param) * random.uniform(0.01, 1, request.param[-1])
    kernel[..., 3] = 0
    return kernel.astype(np.float32)


def test_the_table_of_nf4_is_that_of_normal_quantiles() -> None:
    """QLoRA (arXiv 2305.14314, section 3): quantiles of each half of a normal distribution, and zero."""
    offset = 0.9677083  # of bitsandbytes' create_normal_map
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, 0, *below])
    np.testing.assert_allclose(TABLE, values / values.max(), atol=2e-7)


def test_int8_is_the_nearest_of_255_steps_of_an_output(kernel: np.ndarray) -> None:
    """Steps as in qwix, where the largest is 127.5 steps, rounded to 127 or -128; bitsandbytes has 127 steps."""
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    step = np.where(largest > 0, largest / np.float32(127.5), 1)
    expected = np.round(kernel / step)
    held = quantise(jnp.asarray(kernel), QTYPES["int8"])
    places = np.asarray(held.qvalue).astype(int)
    np.testing.assert_array_equal(np.clip(places, -127, 127), np.clip(expected, -127, 127))
    found = dequantise(held, jnp.float32)
    np.testing.assert_allclose(found, places * step, rtol=1e-6)
    assert (np.abs(found - kernel) <= 0.501 * step).all()


def test_nf4_is_the_nearest_value_of_a_block(kernel: np.ndarray) -> None:
    *outer, inputs, outputs = kernel.shape
    blocks = kernel.reshape(*outer, inputs // BLOCK, BLOCK, outputs)
    largest = np.abs(blocks).max(axis=-2, keepdims=True)
    part = blocks / np.where(largest > 0, largest, 1)
    places = np.abs(part[..., None] - TABLE).argmin(axis=-1)
    held = quantise(jnp.asarray(kernel), "nf4")
    np.testing.assert_array_equal(np.asarray(held.qvalue).astype(int), places.reshape(kernel.shape))
    found = np.asarray(dequantise(held, jnp.float32))
    np.testing.assert_allclose(found, (TABLE[places] * largest).reshape(kernel.shape), rtol=1e-6)
    widest = np.diff(TABLE).max() / 2
    assert (np.abs(found.reshape(blocks.shape) - blocks) <= 1.001 * widest * largest).all()


def test_float8_keeps_three_bits_after_the_first(kernel: np.ndarray) -> None:
    held = quantise(jnp.asarray(kernel), QTYPES["float8"])
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    smallest = largest / 448 * 2**-9  # the step of subnormal numbers
    assert held.qvalue.dtype == jnp.float8_e4m3fn
    assert (np.abs(dequantise(held, jnp.float32) - kernel) <= 1.001 * (np.abs(kernel) * 2**-4 + smallest)).all()


@pytest.mark.parametrize("kind", QTYPES)
def test_it_is_rounded_once_and_its_scales_never(kind: str) -> None:
    kernel = jax.random.normal(jax.random.key(0), LINEAR)
    held = quantise(kernel, QTYPES[kind])
    assert rounded(held, jnp.bfloat16) is held
    np.testing.assert_array_equal(
        dequantise(held, jnp.bfloat16), dequantise(held, jnp.float32).astype(jnp.bfloat16), strict=True
    )
    assert rounded(kernel, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4), ("float8", 8)])
def test_two_numbers_of_four_bits_share_a_byte(kind: str, bits: int) -> None:
    shape = (256, 128)
    held = quantised_shape(shape, QTYPES[kind])
    scales = (256 // BLOCK if kind == "nf4" else 1) * 128
    assert [stored_bytes(x) for x in jax.tree.leaves(held)] == [256 * 128 * bits // 8, 4 * scales]
    compiled = jax.jit(lambda x: quantise(x, QTYPES[kind])).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    table = 2 * 8  # of the pointers to both results
    assert compiled.memory_analysis().output_size_in_bytes <= 256 * 128 * bits // 8 + 4 * scales + table


def test_blocks_are_as_large_as_inputs_allow() -> None:
    assert quantised_shape((96, 8), "nf4").scale.shape == (3, 8)
    assert quantised_shape((3, 3, 10, 8), "nf4").scale.shape == (3, 3, 5, 8)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel", True),
        ("mid_block.resnets.0.conv1.kernel", True),
        ("up_blocks.1.upsamplers.0.conv.kernel", True),
        ("single_transformer_blocks.3.norm.linear.kernel", True),
        ("transformer_blocks.0.attn.add_q_proj.kernel", True),
        ("layers.0.feed_forward.w1.kernel", True),
        ("noise_refiner.0.attention.to_q.kernel", True),
        ("context_refiner.0.attention.to_q.kernel", True),
        ("transformer_blocks.0.attn.norm_q.scale", False),
        ("transformer_blocks.0.attn.to_q.bias", False),
        ("conv_in.kernel", False),
        ("conv_out.kernel", False),
        ("time_embedding.linear_1.kernel", False),
        ("add_embedding.linear_1.kernel", False),
        ("time_text_embed.timestep_embedder.linear_1.kernel", False),
        ("x_embedder.kernel", False),
        ("context_embedder.kernel", False),
        ("norm_out.linear.kernel", False),
        ("proj_out.kernel", False),
        ("all_final_layer.2-1.linear.kernel", False),
        ("cap_embedder.1.kernel", False),
    ],
)
def test_large_kernels_within_blocks_are_quantised(name: str, is_one: bool) -> None:
    assert is_quantised(name, ParamSpec((1024, 1024), (1, 0))) == is_one
    assert not is_quantised(name, ParamSpec((32, 64), (1, 0)))
