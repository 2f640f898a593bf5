"""The fastest way to run a config on a machine, among those that fit."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax.cli import replaced
from dpo_jax.errors import UserError
from dpo_jax.models.execution import POLICIES
from dpo_jax.planning.estimate import (
    SPARE,
    Holdings,
    Plan,
    Work,
    measure_holdings,
    measure_work,
    memory_by_kind,
    round_sizes,
)
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import GIB, Topology


def with_settings(config: ConfigDict, *, remat: str, accumulation: int, data: int, fsdp: int) -> ConfigDict:
    """A copy of the config with another way to run it, which changes nothing of what it computes."""
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": 1}
    return replaced(config, {"remat": remat, "data.accumulation": accumulation, **mesh})


def fit(
    config: ConfigDict, topology: Topology, utilisation: float | None, say: Callable[[str], None]
) -> tuple[ConfigDict, Plan]:
    """The fastest of every remat policy, fsdp degree and micro-batch that fits, as a config and its plan."""
    plan = choose(config, measure_all(config, topology.device.kind, say), topology, utilisation)
    chosen = with_settings(
        config, remat=plan.remat, accumulation=plan.accumulation, data=plan.mesh["data"], fsdp=plan.mesh["fsdp"]
    )
    return chosen, plan


def measure_all(config: ConfigDict, kind: str, say: Callable[[str], None]) -> list[Work]:
    """What a pair costs with each policy on that kind of device."""
    works: list[Work] = []
    for remat in POLICIES:
        say(f"counting what a pair costs with remat={remat}")
        one = replaced(config, {"remat": remat})
        works.append(measure_work(one, kind, works[0].model_flops if works else None))
    return works


def choose(config: ConfigDict, works: Sequence[Work], topology: Topology, utilisation: float | None = None) -> Plan:
    """The fastest plan that fits; of those equally fast to 1% the one that takes least memory, but rematerialization
    must save 5%: only the products that it repeats are counted as time.

    Raises ValueError where none fits, or the batch does not divide over the devices.
    """
    devices, batch = topology.num_devices, config.data.batch_size
    if batch % devices:
        raise UserError(
            f"data.batch_size={batch} does not divide over the {devices} devices of {topology.name}; take a multiple "
            f"of {devices}, or a topology with fewer"
        )
    pipeline = open_structure(replaced(config, {"remat": "none"}))
    holdings: list[Holdings] = []
    for fsdp in _divisors(devices):
        one = with_settings(config, remat="none", accumulation=1, data=devices // fsdp, fsdp=fsdp)
        holdings.append(measure_holdings(one, pipeline, topology.num_devices))
    plans = [
        round_sizes(held, work, topology, batch_size=batch, accumulation=accumulation, utilisation=utilisation)
        for work in works
        for held in holdings
        for accumulation in _divisors(batch // devices)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(plans, key=lambda plan: plan.hbm_bytes)
        raise UserError(
            f"nothing fits {topology.name}: the least is {least.hbm_bytes / 2**30:.1f} GiB of its "
            f"{topology.device.hbm_gib} GiB a device; take more devices, or ones with more memory"
        )
    fastest = min(plan.step_seconds for plan in fitting)
    fast = [plan for plan in fitting if plan.step_seconds <= 1.01 * fastest]
    least_bytes = min(plan.hbm_bytes for plan in fast)
    small = [plan for plan in fast if plan.hbm_bytes <= 1.05 * least_bytes]
    return min(small, key=lambda plan: (list(POLICIES).index(plan.remat), plan.hbm_bytes))


def settle_remat(config: ConfigDict, say: Callable[[str], None]) -> ConfigDict:
    """`remat="auto"` made one of the policies: the best for the devices that are here. Of processes, all must ask.

    Where devices have no memory of their own, as CPUs, nothing is rematerialized.
    """
    if config.remat != "auto":
        return config
    limits = multihost_utils.process_allgather(
        np.array([(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()[:1]])
    )
    if not limits.min():
        return replaced(config, {"remat": "none"})
    remat = choose_remat(config, jax.default_backend(), jax.device_count(), float(limits.min()))
    say(f"remat={remat} is what the {limits.min() / GIB:.1f} GiB of a device allow")
    return replaced(config, {"remat": remat})


def choose_remat(config: ConfigDict, kind: str, num_devices: int, hbm_bytes: float) -> str:
    """The policy that repeats least, of those with which the config leaves the usual share of a device's memory free.

    Raises ValueError where none does.
    """
    plain = replaced(config, {"remat": "none"})
    held = measure_holdings(plain, open_structure(plain), num_devices)
    accumulation = config.data.accumulation
    pairs = config.data.batch_size // (held.mesh["data"] * held.mesh["fsdp"] * accumulation)
    for remat in POLICIES:
        one = replaced(config, {"remat": remat})
        work = measure_work(one, kind, model_flops=0.0)
        needed = sum(memory_by_kind(held, work, kind, pairs=pairs, accumulation=accumulation).values())
        if needed <= (1 - SPARE) * hbm_bytes:
            return remat
    raise UserError(
        f"config.remat=auto: even with {remat} a device needs {needed / GIB:.1f} GiB of its {hbm_bytes / GIB:.1f}, of "
        f"which a tenth should stay free, for {pairs} pairs at a time; raise data.accumulation or mesh.fsdp"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
