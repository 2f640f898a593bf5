"""Searches for the settings with which a config fits a machine and runs fastest there."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax.cli import flatten, replaced
from dpo_jax.errors import UserError
from dpo_jax.models import kernels
from dpo_jax.models.execution import POLICIES
from dpo_jax.planning.estimate import (
    SPARE,
    Holdings,
    Plan,
    Work,
    drawing_by_kind,
    make_plan,
    measure_holdings,
    measure_work,
    memory_by_kind,
)
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.topology import GIB, Topology
from dpo_jax.training.config import resolve
from dpo_jax.training.optim import WITH_MOMENTS


def with_settings(config: ConfigDict, *, remat: str, pairs: int, data: int, fsdp: int) -> ConfigDict:
    """Return a copy of the config that computes the same with other settings, `pairs` at a time on each device."""
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": 1}
    return replaced(config, {"remat": remat, "data.micro_batch": pairs, **mesh})


def fit(
    config: ConfigDict, topology: Topology, utilisation: float | None, say: Callable[[str], None]
) -> tuple[ConfigDict, Plan]:
    """Return the fastest combination of remat, mesh.fsdp and micro-batch that fits, as a config and its plan."""
    plan = choose(config, measure_all(config, topology.device.kind, say), topology, utilisation)
    chosen = with_settings(
        config, remat=plan.remat, pairs=plan.micro_batch_per_device, data=plan.mesh["data"], fsdp=plan.mesh["fsdp"]
    )
    return chosen, plan


def measure_all(config: ConfigDict, kind: str, say: Callable[[str], None]) -> list[Work]:
    """Return the cost of a pair on that kind of device with each remat policy."""
    works: list[Work] = []
    for remat in POLICIES:
        say(f"counting the work of a pair with remat={remat}")
        one = replaced(config, {"remat": remat})
        works.append(measure_work(one, kind, works[0].model_flops if works else None))
    return works


def choose(config: ConfigDict, works: Sequence[Work], topology: Topology, utilisation: float | None = None) -> Plan:
    """Return the fastest plan that fits.

    Of plans within 1% of the fastest it takes the one with the least memory. Rematerialization must save 5% of the
    memory, since only the products that it repeats are counted as time.

    Raises:
        UserError: no plan fits, or the devices do not divide the batch.
    """
    devices, batch = topology.num_devices, config.data.batch_size
    if batch % devices:
        raise UserError(
            f"config.data.batch_size={batch} is not divisible by the {devices} devices of {topology.name}. Set it to a "
            f"multiple of {devices}, or choose a smaller topology"
        )
    pipeline = open_structure(replaced(config, {"remat": "none"}))
    holdings: list[Holdings] = []
    for fsdp in _divisors(devices):
        one = with_settings(config, remat="none", pairs=1, data=devices // fsdp, fsdp=fsdp)
        holdings.append(measure_holdings(one, pipeline, topology.num_devices))
    plans = [
        make_plan(held, work, topology, batch_size=batch, pairs=pairs, utilisation=utilisation)
        for work in works
        for held in holdings
        for pairs in _divisors(batch // devices)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(plans, key=lambda plan: plan.hbm_bytes)
        raise UserError(
            f"no settings fit {topology.name}: the least memory is {least.hbm_bytes / GIB:.1f} GiB per device, more "
            f"than {1 - SPARE:.0%} of its {topology.device.usable_gib:.1f} GiB. Choose more devices, or larger ones"
        )
    fastest = min(plan.step_seconds for plan in fitting)
    fast = [plan for plan in fitting if plan.step_seconds <= 1.01 * fastest]
    least_bytes = min(plan.hbm_bytes for plan in fast)
    small = [plan for plan in fast if plan.hbm_bytes <= 1.05 * least_bytes]
    return min(small, key=lambda plan: (list(POLICIES).index(plan.remat), plan.hbm_bytes))


def settle(config: ConfigDict, say: Callable[[str], None]) -> ConfigDict:
    """Return the config with what depends on memory replaced by what fits the devices of this run.

    These are `remat="auto"`, `data.micro_batch=0` and, with `memory.auto`, how weights and moments are stored. All
    processes of a run must call it. Devices without memory of their own, such as CPUs, rematerialize nothing and have
    no limits.
    """
    if not depends_on_memory(config):
        return config
    limits = multihost_utils.process_allgather(
        np.array([(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()[:1]])
    )
    if not limits.min():
        return replaced(config, {"remat": "none"}) if config.remat == "auto" else config
    attending = replaced(config, {"attention": kernels.choose(config.attention, config.dtype)})
    found = choose_settings(attending, jax.default_backend(), jax.device_count(), float(limits.min()))
    chosen = replaced(found, {"attention": config.attention})
    if jax.process_index() == 0:
        say(f"{describe_choice(config, chosen)} fit the {limits.min() / GIB:.1f} GiB of each device")
    return chosen


def depends_on_memory(config: ConfigDict) -> bool:
    """Return whether a config leaves settings to be chosen by the memory of the devices."""
    return config.memory.auto or config.remat == "auto" or not config.data.micro_batch


def describe_choice(config: ConfigDict, chosen: ConfigDict) -> str:
    """Return the fields that `choose_settings` has set, and what they cost."""
    before, after = flatten(config), flatten(chosen)
    names = ["remat", "data.micro_batch", *(name for name in PRECISION if after[name] != before[name])]
    told = [f"{name}={after[name]}" for name in names]
    costs = [PRECISION[name] for name in names if name in PRECISION]
    if config.memory.auto and chosen.remat != "none":
        costs.append("rematerialization repeats a part of the operations")
    return f"{', '.join(told[:-1])} and {told[-1]}" + (f" ({'; '.join(costs)})" if costs else "")


def choose_settings(config: ConfigDict, kind: str, num_devices: int, hbm_bytes: float) -> ConfigDict:
    """Return the config with what depends on memory replaced by what leaves `SPARE` of `hbm_bytes` free.

    The first of `storages` is taken that fits; then the remat policy that repeats least, even if only one pair at a
    time fits with it; then the largest micro-batch that fits.

    Raises:
        UserError: nothing fits.
    """
    plain = replaced(config, {"remat": "none"})
    derived = resolve(plain, device_count=num_devices, process_count=1)
    share = derived.micro_batch_per_device * derived.accumulation
    sizes = [derived.micro_batch_per_device] if config.data.micro_batch else _divisors(share)[::-1]
    policies = list(POLICIES) if config.remat == "auto" or config.memory.auto else [config.remat]
    works: dict[tuple[str, str], Work] = {}
    for storage in storages(config):
        stored = replaced(plain, storage)
        held = measure_holdings(stored, open_structure(stored), num_devices)
        for remat in policies:
            key = remat, stored.memory.frozen  # how weights and moments are stored changes no other operation
            if key not in works:
                works[key] = measure_work(replaced(stored, {"remat": remat}), kind, model_flops=0.0)
            for pairs in sizes:
                memory = memory_by_kind(held, works[key], kind, pairs=pairs, accumulation=share // pairs)
                needed = max(sum(memory.values()), sum(drawing_by_kind(held, works[key]).values()))
                if needed <= (1 - SPARE) * hbm_bytes:
                    return replaced(config, {"remat": remat, "data.micro_batch": pairs, **storage})
    remedies = [
        "Lower config.data.micro_batch, or raise config.mesh.fsdp" if sizes[-1] > 1 else "Raise config.mesh.fsdp"
    ]
    remedies += [] if config.memory.auto else ["set config.memory.auto=True"]
    remedies += [] if len(policies) > 1 else ["set config.remat=auto"]
    raise UserError(
        f"with config.remat={remat} and {sizes[-1]} pairs at a time a device needs {needed / GIB:.1f} GiB, more than "
        f"{1 - SPARE:.0%} of its {hbm_bytes / GIB:.1f} GiB. {', or '.join(remedies)}"
    )


PRECISION = {
    "memory.masters": "updates are rounded stochastically",
    "optimizer.moments": "moments are rounded to 8 bits at every step",
    "memory.frozen": "the base is rounded once, and multiplied out wherever it is used",
}
"""The fields that `memory.auto` may set besides remat and the micro-batch, with what each costs."""


def storages(config: ConfigDict) -> list[dict[str, str]]:
    """Return what `memory.auto` may store how, from what the config has to the least memory."""
    found: list[dict[str, str]] = [{}]
    if not config.memory.auto:
        return found
    if config.lora.rank or config.lora.init:
        return found + [{"memory.frozen": kind} for kind in ("int8", "nf4") if not config.memory.frozen]
    if config.optimizer.name in WITH_MOMENTS and config.optimizer.moments == "float32":
        found.append({"optimizer.moments": "int8"})
    if config.dtype == "bfloat16" and config.memory.masters == "float32":
        found += [before | {"memory.masters": "bfloat16"} for before in found]
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
