"""Places arrays on the device mesh.

The mesh has three axes: `data` holds copies of the model, `fsdp` splits every large parameter, and `tensor` splits the
work inside layers. The batch is split over the first two. jit inserts the collectives (GSPMD), so the same step runs on
a laptop and on a pod.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dpo_jax.errors import UserError
from dpo_jax.weights.layout import ParamSpec, Specs
from dpo_jax.weights.quantised import Held

AXES = ("data", "fsdp", "tensor")
DATA_AXES = ("data", "fsdp")
SMALL = 2**16
"""Parameters with fewer elements are copied to every device, since splitting them costs more than it saves."""

Rules = Sequence[tuple[str, Sequence[str | None]]]
"""(regular expression found in a parameter's name, mesh axis or None for each of its axes); the first match counts."""

TENSOR_RULES: Rules = (
    # Heads and hidden features are split where they are computed and summed where they are used.
    (r"\.att(n\d?|ention)\.(to_[qkv]|add_[qkv]_proj)\.kernel$", (None, "tensor")),
    (r"\.att(n\d?|ention)\.(to_[qkv]|add_[qkv]_proj)\.bias$", ("tensor",)),
    (r"\.att(n\d?|ention)\.(to_out\.0|to_add_out)\.kernel$", ("tensor", None)),
    (r"\.(ff(_context)?\.net\.0\.proj|proj_mlp)\.kernel$", (None, "tensor")),
    (r"\.(ff(_context)?\.net\.0\.proj|proj_mlp)\.bias$", ("tensor",)),
    (r"\.ff(_context)?\.net\.2\.kernel$", ("tensor", None)),
    (r"\bsingle_transformer_blocks\.\d+\.proj_out\.kernel$", ("tensor", None)),
    (r"\.feed_forward\.w[13]\.kernel$", (None, "tensor")),
    (r"\.feed_forward\.w2\.kernel$", ("tensor", None)),
    # The layers that make modulations hold a third of a joint transformer's weights. Their inputs are split, because a
    # sum without tokens costs nothing, and split modulations would have the tokens split as they are and moved.
    (r"\.(norm1?(_context)?\.linear|adaLN_modulation\.\d)\.kernel$", ("tensor", None)),
    (r"\.resnets\.\d+\.conv1\.kernel$", (None, None, None, "tensor")),
    (r"\.resnets\.\d+\.time_emb_proj\.kernel$", (None, "tensor")),
    (r"\.resnets\.\d+\.(conv1|time_emb_proj|norm2)\.(bias|scale)$", ("tensor",)),
    (r"\.resnets\.\d+\.conv2\.kernel$", (None, None, "tensor", None)),
)


def rules_of(own: Rules) -> Rules:
    """Return the config's own rules followed by `TENSOR_RULES`."""
    return (*own, *TENSOR_RULES)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a `data` x `fsdp` x `tensor` mesh over `devices`, by default all.

    One of the three sizes may be -1 and takes the devices that are left. Where the devices are in several slices, which
    a slower network connects, only `data` spans slices: it sums gradients once per step and sends nothing else.

    Raises:
        UserError: the sizes do not fit the devices, the slices or the processes.
    """
    devices = jax.devices() if devices is None else devices
    shape, auto = mesh_shape(data, fsdp, tensor, len(devices)), (AxisType.Auto,) * len(AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        # Explicit axis types, JAX's default, would make every FSDP matmul name its output sharding.
        mesh = jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
        if any(len({device.process_index for device in group}) > 1 for group in mesh.devices.reshape(-1, shape[2])):
            raise UserError(
                f"config.mesh.tensor={shape[2]} spans several processes, which read different images. Set it to a "
                f"divisor of {jax.local_device_count()}, the devices per process"
            )
        return mesh
    if shape[0] % len(slices):
        raise UserError(
            f"config.mesh.data={shape[0]} is not a multiple of {len(slices)}, the number of slices; fsdp and "
            f"tensor must stay within a slice. Set it to a multiple of {len(slices)}"
        )
    within = (shape[0] // len(slices), *shape[1:])
    array = mesh_utils.create_hybrid_device_mesh(within, (len(slices), 1, 1), devices)
    return Mesh(array, AXES, axis_types=auto)


def mesh_shape(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, int, int]:
    """Return the three sizes of a mesh of `count` devices, one of which may be given as -1.

    Raises:
        UserError: their product is not `count`.
    """
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(count // -math.prod(sizes), 1)
    if math.prod(sizes) != count or min(sizes) < 1:
        given = " x ".join(f"mesh.{name}={size}" for name, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise UserError(f"{given} does not make {count} devices. Set one of them to -1, which takes the devices left")
    return sizes[0], sizes[1], sizes[2]


def batch_parts(mesh: Mesh) -> int:
    """Return the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading axis is split over all copies and parts of the model."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def batch_constraint(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function for use inside jit that keeps the arrays of a pytree split as the batch is."""
    return lambda tree: jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for jit, in which kernels that split their own work over devices find the mesh."""

    @functools.wraps(function)
    def on_it(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_it


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Placement:
    """The shardings of parameters, and of arrays that belong to them, on a mesh.

    It is called with `(name, spec)` when weights are loaded.
    """

    mesh: Mesh
    rules: Rules = TENSOR_RULES

    def __call__(self, name: str, spec: ParamSpec) -> NamedSharding:
        """Return the sharding of a parameter: what a rule says, and one more axis that is split by fsdp.

        That is PyTorch's first axis if fsdp divides it, otherwise the largest that it divides. Small parameters are
        copied along fsdp, as are tables that are not trained: layers read a part of them, but would gather the whole.
        All parameters are copied along axes that the mesh does not divide. A part of PyTorch's first axis is contiguous
        in a safetensors file, so a process reads its share only. In legacy Flax files such a part is spread over the
        tensor, and each process reads all of it.
        """
        return self._named(self._axes(name, spec))

    def of_parts(self, name: str, spec: ParamSpec, parts: Any) -> Any:
        """Return the shardings of arrays that hold a parameter together, such as its numbers and their scales.

        They have its axes, some of them shorter. An axis that the devices do not divide is copied.
        """
        return jax.tree.map(lambda part: self._named(self._axes_of_part(name, spec, part.shape)), parts)

    def gathered(self, name: str, spec: ParamSpec, x: Held) -> Held:
        """Return, inside jit, a parameter as layers use it: whole along fsdp. Its gradient is scattered again.

        Without this the partitioner splits activations as the weights are split, not as the batch is, and then moves
        them: SDXL on 64 devices would need ten times their memory.
        """
        return jax.tree.map(functools.partial(self._gathered, name, spec), x)

    def _gathered(self, name: str, spec: ParamSpec, x: jax.Array) -> jax.Array:
        axes = self._axes_of_part(name, spec, x.shape)
        own, whole = self._named(axes), self._named([None if axis == "fsdp" else axis for axis in axes])
        if own == whole:
            return x

        @jax.custom_vjp
        def gather(x: jax.Array) -> jax.Array:
            # Split first, or the compiler may exchange what x was rounded from, in float32.
            return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, own), whole)

        gather.defvjp(
            lambda x: (gather(x), None), lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, own),)
        )
        return gather(x)

    def state(self, specs: Specs, state: Any, *, over_data: bool = False) -> Any:
        """Return shardings for a pytree of shapes in which the statistics of a parameter are keyed by its name.

        An array with the axes of its parameter (parameter, moment, factored moment with reduced axes of size 1, scales
        of blocks) is split as the parameter is, where its own axes divide; others (step counters) are copied. With
        `over_data` the arrays are also split over the copies of the model, each of which keeps and updates its part
        (ZeRO, arXiv 1910.02054, stage 1).
        """

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
            if not names or leaf.ndim != len(specs[names[-1]].shape):
                return replicated(self.mesh)
            spec = specs[names[-1]]
            axes = self._axes_of_part(names[-1], spec, leaf.shape)
            if over_data and math.prod(leaf.shape) >= SMALL:
                self._split(axes, "data", ParamSpec(leaf.shape, spec.torch_axes))
            return self._named(axes)

        return jax.tree_util.tree_map_with_path(place, state)

    def table(self, specs: Specs, dtype: DTypeLike) -> str:
        """Return a table of name, shape, split and bytes per device of each parameter, the sum first."""
        dtype, rows = jnp.dtype(dtype), []
        for name, spec in specs.items():
            sharding = self(name, spec)
            size = math.prod(sharding.shard_shape(spec.shape)) * dtype.itemsize
            split = ", ".join("-" if axis is None else str(axis) for axis in sharding.spec) or "copied"
            rows.append((size, name, " x ".join(map(str, spec.shape)), split))
        whole = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize
        held = sum(size for size, *_ in rows)
        lines = [f"{held / 2**20:,.1f} MiB per device of {whole / 2**20:,.1f} MiB in total ({dtype.name})"]
        width = max(len(name) for _, name, *_ in rows)
        lines += [f"{name:{width}}  {shape:24} {split:24} {size:>13,}" for size, name, shape, split in rows]
        return "\n".join(lines)

    def _axes(self, name: str, spec: ParamSpec) -> list[Any]:
        """Return for each axis of a parameter the mesh axis that splits it, or None."""
        axes: list[Any] = [None] * len(spec.shape)
        for pattern, rule in self.rules:
            if re.search(pattern, name):
                if len(rule) != len(axes) or not set(rule) <= {*self.mesh.shape, None}:
                    raise UserError(
                        f"the rule {pattern!r}: {tuple(rule)} of config.mesh.rules does not fit {name} of shape "
                        f"{spec.shape}. Give it {len(axes)} entries, each None or one of {', '.join(self.mesh.shape)}"
                    )
                axes = [
                    axis if axis and self.mesh.shape[axis] > 1 and size % self.mesh.shape[axis] == 0 else None
                    for axis, size in zip(rule, spec.shape, strict=True)
                ]
                break
        if "fsdp" not in axes and math.prod(spec.shape) >= SMALL and spec.is_trainable:
            self._split(axes, "fsdp", spec)
        return axes

    def _axes_of_part(self, name: str, spec: ParamSpec, shape: Sequence[int]) -> list[Any]:
        """Return the same for an array with these axes, some of them shorter; what does not divide is copied."""
        return [
            axis if axis and size % self.mesh.shape[axis] == 0 else None
            for axis, size in zip(self._axes(name, spec), shape, strict=True)
        ]

    def _split(self, axes: list[Any], name: str, spec: ParamSpec) -> None:
        """Split one more axis by the mesh axis `name`, if it divides one."""
        count = self.mesh.shape[name]
        by_size = sorted(range(len(spec.shape)), key=lambda axis: -spec.shape[axis])
        for axis in (spec.torch_axes[0], *by_size):
            if count > 1 and axes[axis] is None and spec.shape[axis] % count == 0:
                axes[axis] = name
                return

    def _named(self, axes: list[Any]) -> NamedSharding:
        while axes and axes[-1] is None:
            axes = axes[:-1]
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def to_devices(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function that turns this process's examples (NumPy) into the global, sharded batch."""
    sharding = batch_sharding(mesh)
    return lambda batch: jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
