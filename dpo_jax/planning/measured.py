"""Times the training step on the devices of this machine and sorts the time by what they do."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from dpo_jax.errors import UserError
from dpo_jax.planning.hlo import NOT_DONE, Module, products, work_of
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.products import sums_by_kind
from dpo_jax.planning.synthetic import random_batch, random_state
from dpo_jax.sharding import Placement, make_mesh, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose


class Measured(NamedTuple):
    """The figures of one device per optimizer step."""

    compile_seconds: float
    step_seconds: float
    """Measured without tracing."""
    busy: dict[str, float]
    """Seconds by what instructions do; instructions may overlap. Products are listed by `products.KINDS`."""
    flops: dict[str, float]
    """Operations of products, by kind."""


def measure(config: ConfigDict, folder: Path, steps: int) -> Measured:
    """Time the step on all devices, with random weights and batches, and write a trace of it into `folder`."""
    derived = resolve(config, device_count=jax.device_count(), process_count=jax.process_count())
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    experiment = compose(config, derived, open_structure(config), Placement(mesh, rules_of(config.mesh.rules)))
    state, frozen = random_state(experiment)
    batch = random_batch(experiment, seed=0)
    began = time.perf_counter()
    step = experiment.train_step().lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - began

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    run()  # the first steps are slower
    began = time.perf_counter()
    run()
    step_seconds = (time.perf_counter() - began) / steps
    with jax.profiler.trace(str(folder)):
        run()
    text = step.as_text()
    if text is None:
        raise UserError(
            f"the compiler for {jax.devices()[0].device_kind} does not show its program, so the time of the step "
            "cannot be sorted. Profile on another kind of device"
        )
    trace = max(folder.glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    return Measured(
        compile_seconds,
        step_seconds,
        busy={kind: seconds / steps for kind, seconds in busy_seconds(read_trace(trace), text).items()},
        flops={kind: sums.flops for kind, sums in sums_by_kind(products(text)).items()},
    )


def read_trace(file: Path) -> list[tuple[str, float]]:
    """Return the instructions that the first device executed, and the seconds of each."""
    of_planes: dict[str, list[tuple[str, float]]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not re.fullmatch(r"/device:(GPU|TPU):0|/host:CPU", plane.name):
            continue
        events = ((event, dict(event.stats)) for line in plane.lines for event in line.events)
        found = [
            (str(stats["hlo_op"]), event.duration_ns / 1e9)
            for event, stats in events
            if "hlo_op" in stats and not stats.get("device_ordinal")  # CPUs share a plane
        ]
        if found:
            of_planes[plane.name] = found
    if not of_planes:
        raise UserError(f"the trace {file} lists no instruction of a device. Profile on another kind of device")
    return of_planes[min(of_planes)]  # "/device" sorts before "/host"


def busy_seconds(events: Iterable[tuple[str, float]], text: str) -> dict[str, float]:
    """Return the seconds of instructions by what they do in the compiled program `text`."""
    module = Module(text)
    instructions = {
        name: instruction
        for computation in module.computations.values()
        for name, instruction in computation.instructions.items()
    }
    found: dict[str, float] = {}
    for name, seconds in events:
        instruction = instructions.get(name)
        if instruction and instruction.operation in NOT_DONE:
            continue  # the instructions in the body of a loop have events of their own
        work, kind = work_of(module, instruction) if instruction else ("unknown", "")
        found[kind or work] = found.get(kind or work, 0.0) + seconds
    return found
