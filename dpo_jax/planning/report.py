"""Writes a plan as text."""

from ml_collections import ConfigDict

from dpo_jax.cli import flatten
from dpo_jax.methods import find_method
from dpo_jax.planning.compiled import Compiled
from dpo_jax.planning.estimate import PAPER_PAIRS, SPARE, Plan
from dpo_jax.planning.rounds import RoundPlan
from dpo_jax.planning.search import PRECISION
from dpo_jax.planning.topology import GIB
from dpo_jax.training.defaults import FIELDS


def rounds_text(config: ConfigDict, plan: RoundPlan) -> str:
    """Return the plan of an online run as text."""
    step, sizes, rounds = plan.step, plan.sizes, config.online.rounds
    seconds, device = plan.sampling_seconds + plan.training_seconds, step.topology.device
    advice = f"does not fit with {SPARE:.0%} free. Lower online.prompts_at_a_time or online.candidates"
    lines = [
        *_of_step(config, step, "prompts x timesteps"),
        "",
        "Memory per device while images are drawn  GiB",
        *(f"  {kind:34} {size / GIB:9.2f}" for kind, size in plan.sampling.items() if size),
        f"  {'total':34} {sum(plan.sampling.values()) / GIB:9.2f}",
        f"  {'the most at any time':34} {plan.hbm_bytes / GIB:9.2f} of {device.usable_gib:.1f}: "
        + ("fits" if plan.fits else advice),
        "",
        f"A round: {sizes.images} images, {sizes.evaluations:,} evaluations of the denoiser, {sizes.updates} updates",
        f"  drawn in {plan.sampling_seconds:.1f} s and trained on in {plan.training_seconds:.1f} s, at the assumed "
        "share of the peak rate and without judges",
        f"  {rounds} rounds: {rounds * seconds / 3600:,.1f} hours on {step.topology.name}",
    ]
    return "\n".join(lines)


def as_text(config: ConfigDict, plan: Plan) -> str:
    """Return the plan as text, which says what is computed and what is assumed."""
    topology, unit = plan.topology, find_method(config.loss.name).unit
    fields = flatten(config)
    chosen = {name: fields[name] for name in PRECISION if fields[name] != FIELDS[name].default}
    stored = "".join(f" --config.{name}={value}" for name, value in chosen.items())
    lines = [
        *_of_step(config, plan, unit),
        f"  the paper's {PAPER_PAIRS:,} {unit} (2000 steps of 2048): {plan.chip_hours:,.0f} chip-hours, "
        f"{plan.chip_hours / topology.num_chips:.1f} hours on {topology.name}",
        "",
        "Run it with",
        f"  --config.remat={plan.remat} --config.data.micro_batch={plan.micro_batch_per_device} "
        f"--config.mesh.data={plan.mesh['data']} --config.mesh.fsdp={plan.mesh['fsdp']}" + stored,
    ]
    return "\n".join(lines)


def _of_step(config: ConfigDict, plan: Plan, unit: str) -> list[str]:
    """The lines about an optimizer step, whose examples are called `unit`."""
    topology, device = plan.topology, plan.topology.device
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    devices = plan.mesh["data"] * plan.mesh["fsdp"]
    is_drawing = sum(plan.drawing.values()) > sum(plan.memory.values())
    advice = ". Lower sample.seeds, or set sample.every=0" if is_drawing else ""
    lines = [
        f"{config.model} on {topology.name}: {topology.num_chips} chips, mesh {mesh}, remat={plan.remat}",
        f"{plan.parameters:,} parameters, {plan.trained_parameters:,} of them trained",
        f"{plan.batch_size} {unit} per step = {devices} devices x {plan.accumulation} micro-batches "
        f"x {plan.micro_batch_per_device}",
        "",
        "Memory per device (computed)              GiB",
        *(f"  {kind:34} {size / GIB:9.2f}" for kind, size in plan.memory.items() if size),
        f"  {'total':34} {sum(plan.memory.values()) / GIB:9.2f}",
        f"  {'while image grids are drawn':34} {sum(plan.drawing.values()) / GIB:9.2f}" if plan.drawing else None,
        f"  {'the most of these':34} {plan.hbm_bytes / GIB:9.2f} of {device.usable_gib:.1f}: "
        + ("fits" if plan.fits else f"does not fit with {SPARE:.0%} free{advice}"),
        "",
        f"Work per {_one_of(unit)} (computed): {plan.work.model_flops / 1e12:.2f} TFLOP"
        + (f", {plan.work.flops / 1e12:.2f} including what remat repeats" if plan.remat != "none" else ""),
        "",
        f"{'Traffic per step (computed)':28}  {'axis':6} {'received':>12} {'times':>6} {'seconds at full rate':>21}",
        *(
            f"  {c.name:26}  {c.axis:6} {c.received_bytes / GIB:8.3f} GiB {c.times:6} {c.seconds:21.3f}"
            for c in plan.collectives
        ),
        "",
        f"Time per step, if products reach {plan.utilisation:.0%} of the peak rate (assumed) and links all of theirs:",
        f"  computation {plan.compute_seconds:.3f} s, collectives {plan.collective_seconds:.3f} s of which "
        f"{plan.exposed_seconds:.3f} s do not overlap with it, update {plan.update_seconds:.3f} s",
        f"  {plan.step_seconds:.3f} s per step: {plan.pairs_per_second_per_chip:.2f} {unit}/s per chip, "
        f"{plan.pairs_per_second_per_chip * topology.num_chips:.1f} in total",
    ]
    return [line for line in lines if line is not None]


def _one_of(unit: str) -> str:
    return "prompt and timestep" if unit == "prompts x timesteps" else unit.removesuffix("s")


def compiled_text(plan: Plan, compiled: Compiled) -> str:
    """Return XLA's figures as text, beside the estimate's."""
    ratio = plan.hbm_bytes / compiled.hbm_bytes
    rows = [
        f"XLA's memory per device: {compiled.hbm_bytes / GIB:.2f} GiB ({compiled.argument_bytes / GIB:.2f} arguments, "
        f"{compiled.temporary_bytes / GIB:.2f} temporaries); the estimate is {ratio:.2f} of it",
        "XLA's collectives per step:",
    ]
    rows += [
        f"  {kind:20} {counts['times']:8.0f} times {counts['bytes'] / GIB:10.3f} GiB"
        for kind, counts in sorted(compiled.collectives.items())
    ]
    rows += [f"{'Products per device and step':32} {'TFLOP traced':>12} compiled {'GB traced':>12} compiled"]
    for kind, traced in compiled.traced_products.items():
        found = compiled.products[kind]
        rows.append(
            f"  {kind:30} {traced.flops / 1e12:12.3f} {found.flops / 1e12:8.3f} "
            f"{traced.bytes / 1e9:12.1f} {found.bytes / 1e9:8.1f}"
        )
    share = compiled.float32_flops / sum(sums.flops for sums in compiled.products.values())
    rows.append(f"  {share:.2%} of their operations read float32")
    total = sum(compiled.traffic.values())
    rows.append(f"Memory traffic per device and step: {total / 1e9:.1f} GB")
    rows += [f"  {kind:20} {size / 1e9:10.1f} GB {size / total:6.1%}" for kind, size in compiled.traffic.items()]
    return "\n".join(rows)
