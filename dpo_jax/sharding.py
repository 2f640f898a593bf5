"""Where arrays live on the device mesh.

Two axes: `data` holds copies of the model, `fsdp` splits every large parameter; the batch is split over both. jit
inserts the collectives (GSPMD), so the same step runs on one device and on a pod.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.weights.layout import ParamSpec, Specs

DATA_AXES = ("data", "fsdp")
SMALL = 2**16
"""Parameters with fewer elements than this are copied to every device: splitting them costs more than it saves."""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `data` x `fsdp` mesh over these devices, or all; one of the two may be -1 and takes what is left."""
    count = len(devices or jax.devices())
    sizes = [data, fsdp]
    if -1 in sizes:
        known = -int(np.prod(sizes)) if sizes.count(-1) == 1 else 1
        sizes[sizes.index(-1)] = max(count // known, 1)
    if int(np.prod(sizes)) != count or min(sizes) < 1:
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not make {count} devices; "
            "set one of them to -1 to let it take what is left"
        )
    # Explicit axis types, JAX's default, would make every FSDP matmul name its output sharding.
    return jax.make_mesh(tuple(sizes), DATA_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(mesh: Mesh, spec: ParamSpec) -> NamedSharding:
    """Splits one axis that the fsdp axis divides: PyTorch's first, or else the largest. Small parameters are copied.

    A part of PyTorch's first axis is one piece of a safetensors file, so a process can read its share and no more. In
    legacy Flax files the same part lies in strips all over the tensor, and each process reads all of it.
    """
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1 or math.prod(spec.shape) < SMALL:
        return replicated(mesh)
    by_size = sorted(range(len(spec.shape)), key=lambda axis: -spec.shape[axis])
    for axis in (spec.torch_axes[0], *by_size):
        if spec.shape[axis] % fsdp == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
    return replicated(mesh)


def placement(mesh: Mesh) -> Callable[[str, ParamSpec], NamedSharding]:
    """`param_sharding` in the form that loading weights asks for."""
    return lambda name, spec: param_sharding(mesh, spec)


def state_sharding(mesh: Mesh, specs: Specs, state: Any) -> Any:
    """Shardings for a pytree of shapes in which a parameter's statistics are keyed by the parameter's name.

    Whatever has its parameter's axes (parameter, moment, factored moment with reduced axes of size 1) lies as the
    parameter does; the rest (step counters) is copied.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
        if not names or leaf.ndim != len(specs[names[-1]].shape):
            return replicated(mesh)
        axes = param_sharding(mesh, specs[names[-1]]).spec
        kept = [axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(place, state)


def to_devices(mesh: Mesh) -> Callable[[Any], Any]:
    """A function that places this process's rows of a batch (NumPy) as the global, sharded batch."""
    sharding = batch_sharding(mesh)
    return lambda batch: jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
