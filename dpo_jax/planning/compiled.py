"""What the compiler makes of the real training step, for TPUs that are not there.

XLA compiles for a described slice as for a real one: libtpu must be installed (`pip install "jax[tpu]"`), but no TPU
has to be there.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.topology import Topology
from dpo_jax.sharding import Placement, make_mesh, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """XLA's own figures for one device."""

    hbm_bytes: float
    """Arguments, results that don't take an argument's place, temporaries and code."""
    argument_bytes: float
    temporary_bytes: float
    collectives: dict[str, dict[str, float]]
    """By kind: how many times one is done in an optimizer step, and the bytes of their results."""


def compile_step(config: ConfigDict, pipeline: Pipeline, topology: Topology) -> Compiled:
    """Compiles the step that `dpo_jax.train` would run. Tens of minutes for a whole model on a few cores.

    Raises ValueError where the compiler for that device is missing, or finds the memory too small.
    """
    if topology.device.kind != "tpu":
        raise ValueError(f"--compile is for TPUs, and {topology.name} is none; leave it out for the estimate alone")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('--compile needs the TPU compiler, libtpu: pip install "jax[tpu]"; no TPU has to be there')
    # Off the cloud there is no metadata server to ask which TPU this is; and another process may have libtpu open.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    derived = resolve(config, device_count=len(devices), process_count=1)
    experiment = compose(config, derived, pipeline, Placement(mesh, rules_of(config.mesh.rules)))
    arguments = experiment.abstract_state(), experiment.frozen, experiment.abstract_batch()
    try:
        compiled = experiment.train_step().lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        raise ValueError(
            f"the step does not fit {topology.name}: {reason} Take more micro-batches (data.accumulation), another "
            "remat, or a larger mesh.fsdp; --fit finds what fits"
        ) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # nor is the text, of a TPU
    assert text is not None
    return Compiled(
        hbm_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=count_collectives(text),
    )


def count_collectives(text: str) -> dict[str, dict[str, float]]:
    """How often each kind of collective is done by a compiled program, and the bytes of the results.

    A collective in the body of a loop counts as often as the loop goes round. One that TPUs do in pieces beside other
    work stands in several fusions, with the same channel; it counts once.
    """
    computations = _computations(text)
    entry = next(name for name, lines in computations.items() if lines[0].startswith("ENTRY"))
    found: dict[str, dict[str, float]] = {}
    channels: set[str] = set()

    def visit(name: str, times: float) -> None:
        for line in computations[name][1:]:
            operation = re.search(r"= (.+?) ([a-z\-]+)\(", line)
            if operation is None:
                continue
            shape, kind = operation.groups()
            is_collective = kind.removesuffix("-start") in COLLECTIVES
            channel = re.search(r"channel_id=\d+", line) if is_collective else None
            if is_collective and not (channel and channel[0] in channels):
                if channel:
                    channels.add(channel[0])
                entry = found.setdefault(kind.removesuffix("-start"), {"times": 0, "bytes": 0})
                entry["times"] += times
                entry["bytes"] += times * _bytes(shape, is_start=kind.endswith("-start"))
            rounds = _rounds(line, computations) if kind == "while" else 1
            for called in re.findall(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                if called in computations and kind not in ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort"):
                    visit(called, times * rounds)

    visit(entry, 1.0)
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO module, the header first."""
    computations: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = computations.setdefault(header[1], [line])
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations


def _rounds(loop: str, computations: dict[str, list[str]]) -> int:
    """How often a loop goes round: as stated, or as JAX's loops count, from 0 to less than a constant."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    if stated:
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = "\n".join(computations[condition[1]]) if condition else ""
    compared = re.search(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", lines)
    limit = re.search(rf"%?{re.escape(compared[1])} = s32\[\]\S* constant\((\d+)\)", lines) if compared else None
    return int(limit[1]) if limit else 1


def _bytes(shape: str, *, is_start: bool) -> float:
    """Bytes of a shape as HLO prints it. The start of an asynchronous collective returns its operands as well."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    sizes: list[float] = [
        DTYPE_BYTES.get(dtype, 4) * math.prod(int(size) for size in axes.split(",") if size) for dtype, axes in parts
    ]
    return max(sizes, default=0) if is_start else sum(sizes)


def summarize(compiled: Compiled) -> dict[str, Any]:
    """For the plan's JSON."""
    gib = 2**30
    return {
        "hbm_gib": compiled.hbm_bytes / gib,
        "argument_gib": compiled.argument_bytes / gib,
        "temporary_gib": compiled.temporary_bytes / gib,
        "collectives": compiled.collectives,
    }
