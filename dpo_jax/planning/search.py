"""Searches for the settings with which a config fits a machine and runs fastest there."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax.cli import replaced
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
    """Return the config with `remat="auto"` and `data.micro_batch=0` replaced by what fits the devices of this run.

    All processes of a run must call it. Devices without memory of their own, such as CPUs, rematerialize nothing and
    have no limit on micro-batches.
    """
    if config.remat != "auto" and config.data.micro_batch:
        return config
    limits = multihost_utils.process_allgather(
        np.array([(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()[:1]])
    )
    if not limits.min():
        return replaced(config, {"remat": "none"}) if config.remat == "auto" else config
    attending = replaced(config, {"attention": kernels.choose(config.attention, config.dtype)})
    found = choose_settings(attending, jax.default_backend(), jax.device_count(), float(limits.min()))
    chosen = replaced(config, {"remat": found.remat, "data.micro_batch": found.data.micro_batch})
    if jax.process_index() == 0:
        settings = f"remat={chosen.remat} and data.micro_batch={chosen.data.micro_batch}"
        say(f"{settings} fit the {limits.min() / GIB:.1f} GiB of each device")
    return chosen


def choose_settings(config: ConfigDict, kind: str, num_devices: int, hbm_bytes: float) -> ConfigDict:
    """Return the config with `remat="auto"` and `data.micro_batch=0` replaced by what leaves `SPARE` of memory free.

    The policy is the one that repeats least, even if only one pair at a time fits with it; then the micro-batch is the
    largest that fits.

    Raises:
        UserError: nothing fits.
    """
    plain = replaced(config, {"remat": "none"})
    held = measure_holdings(plain, open_structure(plain), num_devices)
    derived = resolve(plain, device_count=num_devices, process_count=1)
    share = derived.micro_batch_per_device * derived.accumulation
    sizes = [derived.micro_batch_per_device] if config.data.micro_batch else _divisors(share)[::-1]
    for remat in POLICIES if config.remat == "auto" else [config.remat]:
        work = measure_work(replaced(config, {"remat": remat}), kind, model_flops=0.0)
        for pairs in sizes:
            memory = memory_by_kind(held, work, kind, pairs=pairs, accumulation=share // pairs)
            needed = max(sum(memory.values()), sum(drawing_by_kind(held, work).values()))
            if needed <= (1 - SPARE) * hbm_bytes:
                return replaced(config, {"remat": remat, "data.micro_batch": pairs})
    raise UserError(
        f"with config.remat={remat} and {sizes[-1]} pairs at a time a device needs {needed / GIB:.1f} GiB, more than "
        f"{1 - SPARE:.0%} of its {hbm_bytes / GIB:.1f} GiB. "
        + ("Lower config.data.micro_batch, or raise config.mesh.fsdp" if sizes[-1] > 1 else "Raise config.mesh.fsdp")
        + ("" if config.remat == "auto" else ", or set config.remat=auto")
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
