"""The fastest way to run a config on a machine, among those that fit."""

from collections.abc import Callable

from ml_collections import ConfigDict

from dpo_jax.planning.estimate import Holdings, Plan, make_plan, measure_holdings, measure_work
from dpo_jax.planning.structure import open_structure
from dpo_jax.planning.topology import Topology

REMAT = ("none", "dots", "attention", "block")


def with_settings(config: ConfigDict, *, remat: str, accumulation: int, data: int, fsdp: int) -> ConfigDict:
    """A copy of the config with another way to run it, which changes nothing of what it computes."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.remat = remat
        changed.data.accumulation = accumulation
        changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor = data, fsdp, 1
    return changed


def fit(
    config: ConfigDict, topology: Topology, utilisation: float | None, say: Callable[[str], None]
) -> tuple[ConfigDict, Plan]:
    """Tries every remat policy, fsdp degree and micro-batch; returns the fastest that fits, as a config and its plan.

    Of plans that are equally fast to 1% the one that takes least memory is returned. Raises ValueError where none fits.
    """
    devices, batch = topology.num_devices, config.data.batch_size
    if batch % devices:
        raise ValueError(
            f"data.batch_size={batch} does not divide over the {devices} devices of {topology.name}; take a multiple "
            f"of {devices}, or a topology with fewer"
        )
    pipeline = open_structure(config)
    holdings: list[Holdings] = []
    for fsdp in _divisors(devices):
        one = with_settings(config, remat="none", accumulation=1, data=devices // fsdp, fsdp=fsdp)
        holdings.append(measure_holdings(one, pipeline, topology))
    plans: list[Plan] = []
    model_flops: float | None = None
    for remat in REMAT:
        say(f"counting what a pair costs with remat={remat}")
        one = with_settings(config, remat=remat, accumulation=1, data=devices, fsdp=1)
        work = measure_work(one, open_structure(one), model_flops)
        model_flops = work.model_flops
        plans += [
            make_plan(held, work, topology, batch_size=batch, accumulation=accumulation, utilisation=utilisation)
            for held in holdings
            for accumulation in _divisors(batch // devices)
        ]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(plans, key=lambda plan: plan.hbm_bytes)
        raise ValueError(
            f"nothing fits {topology.name}: the least is {least.hbm_bytes / 2**30:.1f} GiB of its "
            f"{topology.device.hbm_gib} GiB a device; take more devices, or ones with more memory"
        )
    fastest = min(plan.step_seconds for plan in fitting)
    best = min((plan for plan in fitting if plan.step_seconds <= 1.01 * fastest), key=lambda plan: plan.hbm_bytes)
    chosen = with_settings(
        config, remat=best.remat, accumulation=best.accumulation, data=best.mesh["data"], fsdp=best.mesh["fsdp"]
    )
    return chosen, best


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
