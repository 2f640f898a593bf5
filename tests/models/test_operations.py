"""Operations with hand-written derivatives match PyTorch's; and the bytes that they keep for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.models import attention as attention_module
from dpo_jax.models import operations
from dpo_jax.models.attention import attention
from dpo_jax.models.operations import (
    gated_add,
    geglu,
    gelu_tanh,
    group_norm,
    layer_norm,
    modulated_layer_norm,
    rms_norm,
    swiglu,
)

Arrays = list[np.ndarray]


def numbers(*shapes: tuple[int, ...], offset: float = 0.0, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(0)
    return [offset + scale * rng.normal(size=shape) for shape in shapes]


def torch_group_norm(silu: bool) -> Callable[..., torch.Tensor]:
    def apply(x: torch.Tensor, scale_C: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.group_norm(x.movedim(-1, 1), 4, scale_C, bias_C, 1e-5).movedim(1, -1)
        return torch.nn.functional.silu(y) if silu else y

    return apply


def torch_attention(is_causal: bool, num_keys: list[int] | None = None) -> Callable[..., torch.Tensor]:
    def apply(*of_all: torch.Tensor) -> torch.Tensor:
        split = [x_NLD.unflatten(-1, (2, -1)).transpose(1, 2) for x_NLD in of_all]
        mask = None
        if num_keys is not None:
            is_key_NS = torch.arange(split[1].shape[2]) < torch.tensor(num_keys)[:, None]
            mask = is_key_NS[:, None, None, :]
        y = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=mask, is_causal=is_causal)
        return y.transpose(1, 2).flatten(-2)

    return apply


def torch_geglu(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def torch_modulated_layer_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def torch_gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


IMAGE, CHANNELS, QUERIES, KEYS = (2, 6, 5, 16), (16,), (2, 7, 12), (2, 3, 12)
OF_IMAGE = (2, 1, 12)
CASES: dict[str, tuple[Callable[..., jax.Array], Callable[..., torch.Tensor], Arrays]] = {
    "group norm": (
        lambda *a: group_norm(*a, 4, 1e-5),
        torch_group_norm(False),
        numbers(IMAGE, CHANNELS, CHANNELS, offset=3),
    ),
    "group norm and silu": (
        lambda *a: group_norm(*a, 4, 1e-5, silu=True),
        torch_group_norm(True),
        numbers(IMAGE, CHANNELS, CHANNELS, scale=3),
    ),
    "group norm of what is constant": (
        lambda *a: group_norm(*a, 4, 1e-5, silu=True),
        torch_group_norm(True),
        [np.ones(IMAGE), *numbers(CHANNELS, CHANNELS)],
    ),
    "layer norm": (
        lambda *a: layer_norm(*a, 1e-5),
        lambda x, *a: torch.nn.functional.layer_norm(x, CHANNELS, *a),
        numbers(IMAGE, CHANNELS, CHANNELS, offset=-2),
    ),
    "modulated layer norm": (
        modulated_layer_norm,
        torch_modulated_layer_norm,
        numbers(QUERIES, OF_IMAGE, OF_IMAGE, offset=2),
    ),
    "layer norm with a modulated scale alone": (
        lambda x, scale: modulated_layer_norm(x, None, scale),
        lambda x, scale: torch_modulated_layer_norm(x, torch.zeros(()), scale),
        numbers(QUERIES, OF_IMAGE, offset=2),
    ),
    "rms norm": (
        lambda *a: rms_norm(*a, 1e-6),
        lambda x, scale_C: torch.nn.functional.rms_norm(x, CHANNELS, scale_C, 1e-6),
        numbers(IMAGE, CHANNELS, offset=1),
    ),
    "rms norm with a scale per image": (
        lambda *a: rms_norm(*a, 1e-6),
        lambda x, scale: torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * scale,
        numbers(QUERIES, OF_IMAGE, offset=1),
    ),
    "rms norm without a scale": (
        lambda x: rms_norm(x, None, 1e-6),
        lambda x: torch.nn.functional.rms_norm(x, CHANNELS, eps=1e-6),
        numbers(IMAGE, offset=1),
    ),
    "gated add": (gated_add, lambda x, gate, y: x + gate * y, numbers(QUERIES, OF_IMAGE, QUERIES)),
    "gelu": (gelu_tanh, torch_gelu_tanh, numbers(IMAGE, scale=4)),
    "geglu": (geglu, torch_geglu, numbers(IMAGE, scale=4)),
    "swiglu": (swiglu, lambda gate, value: torch.nn.functional.silu(gate) * value, numbers(IMAGE, IMAGE, scale=4)),
    "self-attention": (lambda *a: attention(*a, 2), torch_attention(False), numbers(QUERIES, QUERIES, QUERIES)),
    "cross-attention": (lambda *a: attention(*a, 2), torch_attention(False), numbers(QUERIES, KEYS, KEYS, scale=5)),
    "causal attention": (
        lambda *a: attention(*a, 2, is_causal=True),
        torch_attention(True),
        numbers(QUERIES, QUERIES, QUERIES, scale=2),
    ),
    "attention to the first keys": (
        lambda *a: attention(*a, 2, num_keys_N=jnp.array([7, 2])),
        torch_attention(False, [7, 2]),
        numbers(QUERIES, QUERIES, QUERIES, scale=2),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_pytorch(name: str) -> None:
    ours, theirs, arrays = CASES[name]
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    oracle = theirs(*tensors)
    upstream = np.random.default_rng(1).normal(size=oracle.shape)
    oracle.backward(torch.from_numpy(upstream))
    value, pull = jax.vjp(jax.jit(ours), *map(jnp.asarray, arrays))
    np.testing.assert_allclose(value, oracle.detach().numpy(), rtol=1e-12, atol=1e-12)
    for gradient, tensor in zip(jax.jit(pull)(upstream), tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("mean", [30.0, 3e3])
def test_a_large_mean_does_not_hide_the_variance(dtype: jnp.dtype, error: float, mean: float) -> None:
    """The mean of the squares is up to 10^7 times the variance here, which float32 cannot tell from it."""
    x, scale, bias, upstream = numbers((2, 32, 32, 16), CHANNELS, CHANNELS, (2, 32, 32, 16))
    means_C = mean * np.repeat([1.0, -0.5, 0.25, 1.0], 4)  # each group has one of its own
    arrays = [jnp.asarray(a, dtype) for a in (x + means_C, scale, bias, upstream)]
    exact = [torch.from_numpy(np.asarray(a, np.float64)).requires_grad_() for a in arrays]
    oracle = torch_group_norm(True)(*exact[:3])
    oracle.backward(exact[3].detach())
    value, pull = jax.vjp(lambda *a: group_norm(*a, 4, 1e-5, silu=True), *arrays[:3])
    error += mean * 2**-24  # a mean in float32
    for found, wanted in zip((value, *pull(arrays[3])), (oracle, *(x.grad for x in exact[:3])), strict=True):
        expected = wanted.detach().numpy()
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=error * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("silu", [False, True])
def test_the_sums_for_gpus_are_those_for_other_devices(silu: bool) -> None:
    x, dy, mean, inverse_std, scale, bias = map(
        jnp.asarray, numbers((2, 30, 16), (2, 30, 16), (2, 1, 16), (2, 1, 16), CHANNELS, CHANNELS)
    )
    for at_once, one_by_one in zip(
        operations.sums_of_slopes_at_once(x, dy, mean, inverse_std, scale, bias, silu=silu),
        operations.sums_of_slopes(x, dy, mean, inverse_std, scale, bias, silu=silu),
        strict=True,
    ):
        np.testing.assert_allclose(at_once, one_by_one, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_slopes_of_geglu_for_gpus_are_those_for_other_devices() -> None:
    x, dy = map(jnp.asarray, numbers((3, 5, 16), (3, 5, 8)))
    slopes = operations.geglu_slopes(x, dy)
    np.testing.assert_allclose(operations.geglu_slopes_at_once(x, dy), slopes, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("limit", "blocks"),
    # Seven queries make two blocks with one row of zeros; five are needed, but seven are near and need no zeros.
    [(2 * 7 * 7 * 8, 1), (2 * 7 * 7 * 8 - 1, 2), (2 * 7 * 7 * 8 // 5 + 1, 7), (1, 7)],
)
def test_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, limit: int, blocks: int) -> None:
    _, _, arrays = CASES["attention to the first keys"]
    monkeypatch.setattr(attention_module, "LOGITS_BYTES", limit)
    pull = jax.make_jaxpr(lambda *a: jax.vjp(lambda *a: attention(*a, 2), *a)[1](a[0]))(*map(jnp.asarray, arrays))
    loops = {eqn.params["length"] for eqn in pull.eqns if eqn.primitive.name == "scan"}
    assert loops == ({blocks} if blocks > 1 else set())
    test_values_and_gradients_are_those_of_pytorch("attention to the first keys")
    test_values_and_gradients_are_those_of_pytorch("self-attention")


def test_an_image_without_keys_gets_numbers() -> None:
    arrays = [jnp.asarray(x, jnp.float32) for x in CASES["self-attention"][2]]
    value, pull = jax.vjp(lambda *a: attention(*a, 2, num_keys_N=jnp.array([0, 7])), *arrays)
    assert all(np.isfinite(x).all() for x in (value, *pull(value)))


def kept_bytes(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> int:
    """Return the number of bytes of everything that the backward pass is given."""
    kept = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def test_norms_keep_their_input_and_statistics() -> None:
    x, channels = bfloat16(2, 8, 8, 64), jax.ShapeDtypeStruct((64,), jnp.float32)
    parameters = 2 * 64 * 4
    of_image, of_group, of_cell = 2 * 8 * 8 * 64 * 2, 2 * 4 * 2 * 4, 2 * 8 * 8 * 2 * 4
    for silu in (False, True):
        kept = kept_bytes(lambda *a, silu=silu: group_norm(*a, 4, 1e-5, silu=silu), x, channels, channels)
        assert kept == of_image + of_group + parameters
    assert kept_bytes(lambda *a: layer_norm(*a, 1e-5), x, channels, channels) == of_image + of_cell + parameters


def test_modulation_keeps_its_input_and_statistics() -> None:
    x, of_image = bfloat16(2, 64, 128), bfloat16(2, 1, 128)
    tokens, modulation, of_token = 2 * 64 * 128 * 2, 2 * 128 * 2, 2 * 64 * 4
    kept = kept_bytes(modulated_layer_norm, x, of_image, of_image)
    assert kept == tokens + modulation + 2 * modulation + 2 * of_token  # the scale plus 1 is float32
    assert kept_bytes(lambda *a: rms_norm(*a, 1e-6), x, bfloat16(128)) == tokens + 128 * 2 + of_token
    assert kept_bytes(gated_add, x, of_image, x) == tokens + modulation


@pytest.mark.parametrize("activation", [geglu, gelu_tanh])
def test_activations_keep_their_input(activation: Callable[..., Any]) -> None:
    assert kept_bytes(activation, bfloat16(2, 64, 128)) == 2 * 64 * 128 * 2


def test_a_gate_keeps_its_inputs() -> None:
    assert kept_bytes(swiglu, bfloat16(2, 64, 128), bfloat16(2, 64, 128)) == 2 * 2 * 64 * 128 * 2


def test_attention_keeps_nothing_of_queries_by_keys() -> None:
    query, key = bfloat16(2, 512, 64), bfloat16(2, 256, 64)
    sums = 2 * 512 * 4 * 4
    assert kept_bytes(lambda *a: attention(*a, 4), query, key, key) == 2 * (2 * 512 + 2 * 256) * 64 * 2 + sums
