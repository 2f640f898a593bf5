"""The machines that a run can be planned for: the rate, memory and links of their devices.

The figures of TPUs are from Google's system architecture pages, except the memory, which is what XLA's compiler for the
chip reports. The figures of GPUs are from the makers' data sheets: products of dense matrices that are summed in
float32, and the memory that the driver reports. Cards without NVLink exchange data over PCI Express.
"""

import math
import re
from typing import NamedTuple

import jax

from dpo_jax.backend import MEMORY_FRACTION
from dpo_jax.errors import UserError

GIB = 2**30


class Device(NamedTuple):
    """A device, as JAX counts them."""

    kind: str
    """Platform in JAX's topologies: "tpu" or "gpu"."""
    hbm_gib: float
    """Its memory; see `usable_gib`."""
    tflops: float
    """Peak rate of bfloat16 products, in 10^12 operations/s."""
    hbm_gb_s: float
    """Memory bandwidth, in 10^9 bytes/s."""
    link_gb_s: float
    """What it can receive from its neighbours over all links together, in 10^9 bytes/s."""
    dimensions: int
    """Dimensions of the torus of TPU chips; 2 for GPUs: GPUs per host, and hosts."""
    wraps_at: int
    """Fewest chips along a dimension whose two ends are joined, so that data travels both ways."""
    utilisation: float
    """Share of the peak rate that a training step is assumed to reach."""
    per_chip: int = 1
    """Devices per chip, as chips are sold."""
    network_gb_s: float = 0.0
    """What a GPU can receive from other hosts, in 10^9 bytes/s."""
    is_amd: bool = False

    @property
    def platform(self) -> str:
        """Its platform for `kernels.choose`."""
        return "other gpu" if self.is_amd else self.kind

    @property
    def usable_gib(self) -> float:
        """Memory that a program can use: on GPUs what JAX takes at its start; see `backend.MEMORY_FRACTION`."""
        return self.hbm_gib * (MEMORY_FRACTION if self.kind == "gpu" else 1)


def _gpu(
    hbm_gib: float, tflops: float, hbm_gb_s: float, link_gb_s: float, network_gb_s: float = 50.0, is_amd: bool = False
) -> Device:
    return Device("gpu", hbm_gib, tflops, hbm_gb_s, link_gb_s, 2, 1, 0.4, 1, network_gb_s, is_amd)


# 256-wide matrix units are idle more often at Stable Diffusion's widths of 320 to 1280 and heads of 40 to 160.
DEVICES = {
    "v5e": Device("tpu", 15.75, 197, 819, 200, dimensions=2, wraps_at=16, utilisation=0.4),
    "v5p": Device("tpu", 95.74, 459, 2765, 600, dimensions=3, wraps_at=4, utilisation=0.4),
    "v6e": Device("tpu", 31.25, 918, 1638, 400, dimensions=2, wraps_at=16, utilisation=0.25),
    "tpu7x": Device("tpu", 94.75, 1153, 3690, 300, dimensions=3, wraps_at=4, utilisation=0.25, per_chip=2),
    "h100": _gpu(79.6, 989, 3350, 450),
    "h200": _gpu(139.8, 989, 4800, 450),
    "b200": _gpu(178, 2250, 8000, 900),
    "a100-40": _gpu(39.5, 312, 1555, 300, 25),
    "a100-80": _gpu(79.2, 312, 2039, 300, 25),
    "l4": _gpu(22.5, 121, 300, 32, 12),
    "l40s": _gpu(44.5, 362, 864, 32, 12),
    "rtx6000ada": _gpu(47.4, 364, 960, 32, 12),
    "rtxpro6000": _gpu(94.9, 504, 1792, 64, 12),
    "rtx3090": _gpu(23.6, 71, 936, 32, 1),
    "rtx4090": _gpu(23.5, 165, 1008, 32, 1),
    "rtx5090": _gpu(31.4, 210, 1792, 64, 1),
    "mi300x": _gpu(191.5, 1307, 5300, 448, is_amd=True),
}


class Topology(NamedTuple):
    """Devices of one kind and how they are connected."""

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.device.per_chip

    def gather_seconds(self, received: float, members: int) -> float:
        """Seconds until each of `members` devices has received `received` bytes from the others.

        A group of TPUs uses the share of the links that corresponds to its extent along the torus, and half of that
        where the ends are not joined. The GPUs of a host share what each of them receives from other hosts.
        """
        if members == 1 or not received:
            return 0.0
        device, rate = self.device, self.device.link_gb_s * 1e9
        if device.kind == "gpu":
            hosts = max(1, members // self.shape[0])
            outside = received * (hosts - 1) / hosts / min(members, self.shape[0])
            return received / rate + outside / (device.network_gb_s * 1e9)
        extent = max(math.log(members) / math.log(self.num_devices), 1 / device.dimensions)
        wrapped = sum(math.log(size) for size in self.shape if size >= device.wraps_at) / math.log(self.num_devices)
        return received / (rate * extent * (1 + wrapped) / 2)


def parse_topology(name: str) -> Topology:
    """Return the topology named `v5p:4x4x4`, `v5e:16x16`, `h200:8` (one host) or `h100:8x4` (four hosts).

    `this` is the machine that runs the command.

    Raises:
        UserError: the kind or the size is not known.
    """
    if name == "this":
        return this_machine()
    kind, _, size = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(
            f"--topology={name} is not known. Give one of {', '.join(DEVICES)} and a size, for example v5e:16x16, "
            "v5p:4x4x4, or h100:8x4 (4 hosts of 8 GPUs); this for the machine that you are on"
        )
    device, shape = DEVICES[kind], tuple(int(part) for part in size.split("x"))
    if device.kind == "gpu" and len(shape) == 1:
        shape = (*shape, 1)
    if len(shape) != device.dimensions:
        example = "x".join(["4"] * device.dimensions)
        raise UserError(
            f"--topology={name} has {len(shape)} dimensions, and {kind} has {device.dimensions}. "
            f"Give, for example, {kind}:{example}"
        )
    return Topology(name, device, shape)


def this_machine() -> Topology:
    """Return the accelerators of this process and their number; UserError if there are none that the table has."""
    devices = jax.devices()
    kind = kind_of(devices[0].device_kind)
    if kind is None:
        raise UserError(
            f"--topology=this: {devices[0].device_kind} is not in the table of devices. Name one, for example h200:8"
        )
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    device = DEVICES[kind]
    if limit and device.kind == "gpu":  # as the user's variables have it
        device = device._replace(hbm_gib=limit / GIB / MEMORY_FRACTION)
    if device.kind == "gpu":
        shape: tuple[int, ...] = (jax.local_device_count(), len(devices) // jax.local_device_count())
    else:
        coordinates = [device.coords for device in devices]
        shape = tuple(len(set(along)) for along in zip(*coordinates, strict=True))[: device.dimensions]
    return Topology(f"{kind}:{'x'.join(map(str, shape))}", device, shape)


def kind_of(device_kind: str) -> str | None:
    """Return the name in `DEVICES` of a device as JAX calls it, such as "NVIDIA A100-SXM4-80GB" or "TPU v5 lite"."""
    text = re.sub(r"[^a-z0-9]", "", device_kind.lower())
    tpus = {"tpuv5lite": "v5e", "tpuv5e": "v5e", "tpuv5": "v5p", "tpuv5p": "v5p", "tpuv6lite": "v6e", "tpuv6e": "v6e"}
    if text in tpus:
        return tpus[text]
    names = {name.replace("-", ""): name for name in DEVICES}
    text = re.sub(r"(a100).*?(40|80)gb", r"\1\2", text)
    return next((names[name] for name in sorted(names, key=len, reverse=True) if name in text), None)
