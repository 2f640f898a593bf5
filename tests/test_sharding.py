"""Which axis of a parameter is split, and that what belongs to it lies with it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dpo_jax.sharding import DATA_AXES, make_mesh, param_sharding, state_sharding
from dpo_jax.weights.layout import ParamSpec

LINEAR, CONV, EMBEDDING = (1, 0), (3, 2, 0, 1), (0, 1)


@pytest.mark.parametrize(
    ("shape", "torch_axes", "axes"),
    [
        ((1280, 320), LINEAR, (None, "fsdp")),  # PyTorch's first axis, though the other is larger
        ((3, 3, 640, 320), CONV, (None, None, None, "fsdp")),
        ((49408, 768), EMBEDDING, ("fsdp",)),
        ((3, 3, 512, 510), CONV, (None, None, "fsdp")),
        ((1024, 770), LINEAR, ("fsdp",)),
        ((77, 1280), EMBEDDING, (None, "fsdp")),
        ((8, 512, 256, 6), CONV, (None, "fsdp")),  # the largest of the rest
        ((1023, 1023), LINEAR, ()),
        ((256, 128), LINEAR, ()),  # small
    ],
)
def test_splits_what_lies_together_on_disk(shape, torch_axes, axes):
    mesh = AbstractMesh((1, 4), DATA_AXES)
    assert param_sharding(mesh, ParamSpec(shape, torch_axes)).spec == PartitionSpec(*axes)


def test_copies_everything_where_nothing_is_to_be_split():
    mesh = AbstractMesh((4, 1), DATA_AXES)
    assert param_sharding(mesh, ParamSpec((1280, 320), LINEAR)).spec == PartitionSpec()


def test_statistics_lie_where_their_parameter_lies():
    specs = {"big.kernel": ParamSpec((512, 256), LINEAR), "bias": ParamSpec((8,), (0,))}
    mesh = AbstractMesh((1, 4), DATA_AXES)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    adam = jax.eval_shape(optax.adam(1e-3).init, params)
    placed = state_sharding(mesh, specs, adam)
    assert placed[0].mu["big.kernel"].spec == PartitionSpec(None, "fsdp")
    assert placed[0].mu["bias"].spec == PartitionSpec()
    assert placed[0].count.spec == PartitionSpec()
    conv = {"conv.kernel": ParamSpec((3, 3, 512, 256), CONV)}
    factors = {"row": {"conv.kernel": jax.ShapeDtypeStruct((3, 1, 512, 256), jnp.float32)}}
    assert state_sharding(mesh, conv, factors)["row"]["conv.kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    vector = {"row": {"big.kernel": jax.ShapeDtypeStruct((512, 1), jnp.float32)}}
    assert state_sharding(mesh, specs, vector)["row"]["big.kernel"].spec == PartitionSpec(None, None)


def test_a_mesh_takes_what_is_left():
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": jax.device_count()}
    with pytest.raises(ValueError, match=r"mesh.data=3 x mesh.fsdp=5 does not make \d+ devices; set one of them to -1"):
        make_mesh(data=3, fsdp=5)
