"""The machines that a run can be planned for: the rate, memory and links of their devices.

The figures of TPUs are from Google's system architecture pages, except the memory, which is what XLA's compiler for the
chip reports. The figures of GPUs are from NVIDIA's data sheets.
"""

import math
import re
from typing import NamedTuple

from dpo_jax.errors import UserError

GIB = 2**30


class Device(NamedTuple):
    """A device, as JAX counts them."""

    kind: str
    """Platform in JAX's topologies: "tpu" or "gpu"."""
    hbm_gib: float
    """Memory that a program can use."""
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


# 256-wide matrix units are idle more often at Stable Diffusion's widths of 320 to 1280 and heads of 40 to 160.
DEVICES = {
    "v5e": Device("tpu", 15.75, 197, 819, 200, dimensions=2, wraps_at=16, utilisation=0.4),
    "v5p": Device("tpu", 95.74, 459, 2765, 600, dimensions=3, wraps_at=4, utilisation=0.4),
    "v6e": Device("tpu", 31.25, 918, 1638, 400, dimensions=2, wraps_at=16, utilisation=0.25),
    "tpu7x": Device("tpu", 94.75, 1153, 3690, 300, dimensions=3, wraps_at=4, utilisation=0.25, per_chip=2),
    "h100": Device("gpu", 79.0, 989, 3350, 450, 2, wraps_at=1, utilisation=0.4, network_gb_s=50),
    "h200": Device("gpu", 139.0, 989, 4800, 450, 2, wraps_at=1, utilisation=0.4, network_gb_s=50),
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

    Raises:
        UserError: the kind or the size is not known.
    """
    kind, _, size = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(
            f"--topology={name} is not known. Give one of {', '.join(DEVICES)} and a size, for example v5e:16x16, "
            "v5p:4x4x4, or h100:8x4 (4 hosts of 8 GPUs)"
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
