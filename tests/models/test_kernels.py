"""Attention kernels of libraries: arguments, agreement with dpo_jax's attention, compilation for absent devices."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import kernels
from dpo_jax.models.attention import attention
from dpo_jax.planning.compiled import described_devices
from dpo_jax.planning.topology import parse_topology


def numbers(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def with_gradients(attend: Callable[..., jax.Array], *arrays: jax.Array) -> list[np.ndarray]:
    y, pull = jax.vjp(attend, *arrays)
    return [np.asarray(x, np.float64) for x in (y, *pull(y))]


@pytest.mark.parametrize(("queries", "keys"), [(96, 77), (101, 64)])
def test_arguments_of_cudnns_attention(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs only on GPUs; JAX computes the same result from the same arguments."""
    kernel, called_with = jax.nn.dot_product_attention, []

    def in_its_place(*arrays: jax.Array, implementation: str, **settings: Any) -> jax.Array:
        called_with.append((implementation, arrays[0].shape[1], arrays[1].shape[1]))
        return kernel(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    arrays = numbers((2, queries, 32), (2, keys, 32), (2, keys, 32), dtype=jnp.bfloat16)

    for num_keys_N in (None, jnp.array([keys - 9, 5])):
        of_both = [
            with_gradients(
                lambda *a, name=name, num=num_keys_N: attention(*a, 2, num_keys_N=num, implementation=name), *arrays
            )
            for name in ("cudnn", "xla")
        ]
        for fused, plain in zip(*of_both, strict=True):
            assert np.linalg.norm(fused - plain) < 0.01 * np.linalg.norm(plain)
    assert called_with == [("cudnn", -(-queries // 8) * 8, -(-keys // 8) * 8)] * 2  # even numbers


@pytest.mark.parametrize(
    ("platform", "dtype", "chosen"),
    [
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("tpu", "bfloat16", "splash"),
        ("other gpu", "bfloat16", "xla"),
        (None, "bfloat16", "xla"),
    ],
)
def test_auto_chooses_the_kernel_of_the_platform(platform: str | None, dtype: str, chosen: str) -> None:
    assert kernels.choose("auto", dtype, platform) == chosen
    assert kernels.choose("xla", dtype, platform) == "xla"


class Card(NamedTuple):
    """What `kernels.choose` asks of a device."""

    compute_capability: str
    platform_version: str = "PJRT C API cuda 12090"

    @property
    def client(self) -> "Card":
        return self


@pytest.mark.parametrize(
    ("card", "chosen"),
    [
        (Card("9.0"), "cudnn"),
        (Card("12.0"), "cudnn"),
        (Card("8.0"), "cudnn"),
        (Card("7.5"), "xla"),
        (Card("gfx942", "PJRT C API rocm 60300"), "xla"),
    ],
)
def test_auto_chooses_for_the_devices_of_this_process(monkeypatch: pytest.MonkeyPatch, card: Card, chosen: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert kernels.choose("auto", jnp.bfloat16) == chosen


@pytest.mark.parametrize(("features", "dtype"), [(2 * 160, jnp.bfloat16), (2 * 20, jnp.bfloat16), (32, jnp.float32)])
def test_what_cudnn_does_not_take_is_left_to_xla(features: int, dtype: jnp.dtype) -> None:
    (x,) = numbers((1, 8, features), dtype=dtype)
    np.testing.assert_array_equal(attention(x, x, x, 2, implementation="cudnn"), attention(x, x, x, 2))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason='needs pip install "jax[cuda12]"')
@pytest.mark.parametrize("keys", [1024, 77])
def test_cudnns_attention_compiles_for_a_gpu_that_is_not_there(keys: int) -> None:
    device = described_devices(parse_topology("h200:1"))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct((8, n, 640), jnp.bfloat16, sharding=place) for n in (1024, keys, keys)]
    gradient = jax.grad(lambda *a: attention(*a, 10, implementation="cudnn").sum(), argnums=(0, 1, 2))
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()
    # Less than the products of queries and keys take in 16 bits.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 10 * 1024 * max(keys, 512) * 2


@pytest.mark.parametrize(("features", "queries", "keys"), [(40, 256, 640), (64, 250, 640), (40, 256, 630)])
def test_splash_attention_is_our_own(features: int, queries: int, keys: int) -> None:
    """Pallas' interpreter runs it; 640 keys are two and a half blocks of 256 queries."""
    arrays = numbers((2, queries, 2 * features), *[(2, keys, 2 * features)] * 2)
    num_keys_N = None if features == 40 else jnp.array([640, 130])
    of_both = with_gradients(lambda *a: kernels.splash(*a, 2, num_keys_N, interpret=True), *arrays)
    plainly = with_gradients(lambda *a: attention(*a, 2, num_keys_N=num_keys_N), *arrays)
    for fused, plain in zip(of_both, plainly, strict=True):
        np.testing.assert_allclose(fused, plain, atol=2e-6 * np.abs(plain).max())


def test_short_rows_are_left_to_xla() -> None:
    query, caption, cells = numbers((1, 128, 32), (1, 77, 32), (1, 64, 32))
    for key in (caption, cells):
        np.testing.assert_array_equal(
            attention(query, key, key, 2, implementation="splash"), attention(query, key, key, 2)
        )
    assert kernels.splash_takes(query, query, 2)
    (of_both,) = numbers((1, 1024 + 333, 32))  # Stable Diffusion 3's image and caption at 512 pixels
    assert kernels.splash_takes(of_both, of_both, 2)


ON_A_MESH = """
import dpo_jax, jax, functools
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from dpo_jax.models import kernels
from dpo_jax.models.attention import attention
from dpo_jax.sharding import batch_sharding, make_mesh, on_mesh
mesh = make_mesh(2, 2, 2)
keys = jax.random.split(jax.random.key(0), 3)
arrays = jax.device_put([jax.random.normal(key, (4, 128, 64)) for key in keys], batch_sharding(mesh))

def gradients(attend, num_keys_N):
    return jax.jit(jax.grad(lambda arrays: jnp.square(attend(*arrays, 4, num_keys_N=num_keys_N)).sum()))(arrays)

for num_keys_N in (None, jnp.array([128, 1, 77, 100])):
    on_devices = gradients(on_mesh(mesh, functools.partial(kernels.splash, interpret=True)), num_keys_N)
    compared = zip(on_devices, gradients(attention, num_keys_N), strict=True)
    print(max(float(jnp.abs(one - other).max() / jnp.abs(other).max()) for one, other in compared))
"""


def test_splash_attention_splits_its_work_over_a_mesh() -> None:
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], check=True, capture_output=True, text=True)
    of_all_keys, of_some = map(float, done.stdout.split())
    assert max(of_all_keys, of_some) < 2e-6


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs pip install "jax[tpu]"')
@pytest.mark.parametrize("features", [40, 64, 80, 160])
def test_splash_attention_compiles_for_a_tpu_that_is_not_there(features: int) -> None:
    place = jax.sharding.SingleDeviceSharding(described_devices(parse_topology("v5e:2x2"))[0])
    shape = jax.ShapeDtypeStruct((2, 1024, 8 * features), jnp.bfloat16, sharding=place)
    gradient = jax.grad(lambda *a: attention(*a, 8, implementation="splash").sum(), argnums=(0, 1, 2))
    compiled = jax.jit(gradient).lower(shape, shape, shape).compile()
    # The bound excludes the products of queries and keys in 16 bits, but allows heads padded to 128 features in
    # float32.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 8 * 1024 * 128 * 4 * 4
    assert compiled.as_text().count("tpu_custom_call") >= 3
