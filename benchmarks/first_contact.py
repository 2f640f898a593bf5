"""Spends a few minutes of a GPU on the figures that say most about dpo_jax there, within a budget.

  python benchmarks/first_contact.py --output=figures --budget=640
  python benchmarks/first_contact.py --output=figures --tiny          # a rehearsal on CPUs, in three minutes

The stages, in this order: the rates of large products and copies; the full fine-tuning of SD1.5 and SDXL (first loss,
pairs per second, memory beside the plan's, seconds by kind of work); SDXL in the code of `--before`; PyTorch's fastest
loop on SDXL, then dpo_jax once more, so that the two take turns; the same for SD1.5; LoRAs; SD1.5 without a fused
attention kernel; the published loop. Contestants are those of benchmarks/step.py.

Each stage is a process of its own with a limit of its own. While the GPU measures one program, another process compiles
the next, which finds it in OUTPUT/compiled. A stage's line is in OUTPUT/results.jsonl as soon as it ends, with what it
had found if its time was up, so a run that is killed loses one stage; the same command continues with the stages that
are missing. Stages for which too little time is left are left out. A line says which device and mode it is of, and has
the MFU of the products' measured rate.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from first_contact_stages import BUDGET as DEFAULT_BUDGET
from first_contact_stages import STAGES, Lines, Stage, spend
from step_contestants import MODES, Mode, ceilings, count_work, load, peer, timed

from dpo_jax import cli

OUTPUT = flags.DEFINE_string("output", None, "Folder of the figures, new or to be continued.", required=True)
BUDGET = flags.DEFINE_float("budget", DEFAULT_BUDGET, "Seconds for everything.", lower_bound=10)
BEFORE = flags.DEFINE_string("before", "", "Older checkout of this project, whose SDXL step is timed as well.")
TINY = flags.DEFINE_bool("tiny", False, "Small models, to rehearse on CPUs.")
ONLY = flags.DEFINE_list("only", [], "Stages to run. Default: all.")
STAGE = flags.DEFINE_string("stage", "", "Run this stage in this process, as the command does for each.")
COMPILE = flags.DEFINE_bool("compile", False, "With --stage: compile its program and do nothing else.")

RESULT = "RESULT "
"""Begins a line with what a stage has found; the last one counts."""
MEMORY = "0.8"
"""Share of the GPU's memory for a stage; the process that compiles the next program tries kernels in the rest."""


def main() -> None:
    if STAGE.value:
        stage = next(stage for stage in STAGES if stage.name == STAGE.value)
        return run_stage(stage)
    output = Path(OUTPUT.value).absolute()
    output.mkdir(parents=True, exist_ok=True)
    spend(
        [s for s in STAGES if (not ONLY.value or s.name in ONLY.value) and (BEFORE.value or not s.before)],
        BUDGET.value,
        Lines(output / "results.jsonl"),
        Processes(output),
        share=0.1 if TINY.value else 1.0,
    )


class Processes:
    """Runs stages as processes of this script, and compiles the program of the next one beside each."""

    def __init__(self, output: Path):
        self.output = output
        self.compiling: tuple[Stage, subprocess.Popen[str]] | None = None

    def measure(self, stage: Stage, following: Stage | None, seconds: float) -> dict[str, Any]:
        """Return what the stage found within the time, or why it found nothing; begin to compile the following one."""
        if stage.kind.startswith("P") and not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
            return {"left_out": "torch or diffusers is missing"}
        ends = time.monotonic() + seconds
        if self.compiling and self.compiling[0] == stage:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.compiling[1].wait(seconds)
            self.stop()
        process = self._start(stage)
        if following and not self.compiling:
            self.compiling = following, self._start(following, "--compile")
        try:
            process.wait(max(1.0, ends - time.monotonic()))
            ended: dict[str, Any] = {"exit_code": process.returncode} if process.returncode else {}
        except subprocess.TimeoutExpired:
            stop(process)
            ended = {"out_of_time": True}
        text = self._log(stage).read_text()
        found = [line.removeprefix(RESULT) for line in text.splitlines() if line.startswith(RESULT)]
        return json.loads(found[-1]) | ended if found else {"failed": text[-500:]} | ended

    def stop(self) -> None:
        """End the process that compiles, if there is one."""
        if self.compiling:
            stop(self.compiling[1])
            self.compiling = None

    def _log(self, stage: Stage, *arguments: str) -> Path:
        return self.output / f"{stage.name}{''.join(arguments)}.log"

    def _start(self, stage: Stage, *arguments: str) -> "subprocess.Popen[str]":
        environment, own = dict(os.environ), Path(__file__).parents[1]
        root = Path(BEFORE.value).absolute() if stage.before else own
        environment |= {
            "PYTHONPATH": f"{root}:{own / 'benchmarks'}:{environment.get('PYTHONPATH', '')}",
            "JAX_COMPILATION_CACHE_DIR": str(self.output / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY,
        }
        if arguments:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if TINY.value:  # most of a rehearsal would be the compilers' time
            environment["TORCHDYNAMO_DISABLE"] = "1"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        command = [sys.executable, __file__, f"--output={self.output}", f"--stage={stage.name}", *arguments]
        command += ["--tiny"] if TINY.value else []
        with self._log(stage, *arguments).open("w") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: Stage) -> None:
    """Print what the stage finds, as soon as it is found."""
    mode, seconds = MODES[mode_of(stage)], 1.0 if TINY.value else 8.0
    if COMPILE.value:
        prepare_step(stage, mode)
    elif stage.kind == "ceilings":
        say(ceilings())
    elif stage.kind == "ours":
        for found in measure_step(stage, mode, seconds):
            say(found)
    else:
        found = {"mode": stage.mode} | peer(stage.kind, mode, seconds)
        say(found if "failed" in found else found | {"tflop_a_pair": count_work(mode) / 1e12})


def say(found: dict[str, Any]) -> None:
    print(RESULT + json.dumps(found), flush=True)


def mode_of(stage: Stage) -> str:
    """Return the name of the mode that the stage runs: its own, or the small one of its kind."""
    if TINY.value:
        return "tiny-sd15-lora" if "lora" in stage.mode else "tiny-sd15"
    return stage.mode or "tiny"


class Step(NamedTuple):
    """A compiled training step with its arguments."""

    compiled: Any
    config: Any
    experiment: Any
    trace_seconds: float
    compile_seconds: float


def prepare_step(stage: Stage, mode: Mode) -> Step:
    """Compile the step of a mode for the first device, or take it from the cache."""
    import jax

    from dpo_jax.planning.model_shapes import open_structure
    from dpo_jax.sharding import Placement, make_mesh, rules_of
    from dpo_jax.training.config import resolve
    from dpo_jax.training.experiment import compose

    config = load(mode)
    if stage.attention != "auto" and jax.default_backend() == "gpu":
        config.attention = stage.attention
    placement = Placement(make_mesh(1, 1, 1, jax.devices()[:1]), rules_of(config.mesh.rules))
    derived = resolve(config, device_count=1, process_count=1)
    experiment = compose(config, derived, open_structure(config), placement)
    began = time.perf_counter()
    lowered = experiment.train_step().lower(experiment.abstract_state(), experiment.frozen, experiment.abstract_batch())
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Step(compiled, config, experiment, traced - began, time.perf_counter() - traced)


def measure_step(stage: Stage, mode: Mode, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of a step: first loss, rate and memory; then, also, the seconds by kind of work."""
    import jax

    from dpo_jax.planning.measured import busy_seconds, read_trace
    from dpo_jax.planning.synthetic import random_batch, random_state

    made = prepare_step(stage, mode)
    state, frozen = random_state(made.experiment)
    batches = [random_batch(made.experiment, seed) for seed in range(2)]

    def step(number: int) -> Any:
        nonlocal state
        state, metrics = made.compiled(state, frozen, batches[number % len(batches)])
        return metrics

    figures = timed(step, lambda metrics: float(metrics["train/loss"]), seconds)
    device = jax.devices()[0]
    pairs_a_second = figures["steps_a_second"] * mode.batch_size
    analysis = made.compiled.memory_analysis()
    found = {
        "mode": stage.mode,
        "device": device.device_kind,
        "attention": made.experiment.pipeline.execution.attention,
        "first_loss": figures["loss"],
        "pairs_a_second": pairs_a_second,
        "pairs_at_a_time": mode.pairs,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "compiled_gib": (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / 2**30,
        "planned_gib": planned_bytes(made.config) / 2**30,
        "trace_seconds": made.trace_seconds,
        "compile_seconds": made.compile_seconds,
        "first_step_seconds": figures["first_step_seconds"],
    }
    found["tflop_a_pair"] = count_work(mode) / 1e12
    yield found
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step(number) for number in range(2)])
        trace = max(Path(folder).glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
        busy = busy_seconds(read_trace(trace), made.compiled.as_text())
    found["busy_ms_a_pair"] = {kind: 1e3 * value / 2 / mode.batch_size for kind, value in busy.items()}
    # Kernels of CUDA graphs can carry no name: how much of the step's time the trace shows.
    found["busy_share"] = sum(busy.values()) / 2 * figures["steps_a_second"]
    yield found


def planned_bytes(config: Any) -> float:
    """Return the memory that `dpo_jax.plan` computes for the config on one GPU."""
    from dpo_jax.planning.estimate import measure_holdings, measure_work, memory_by_kind
    from dpo_jax.planning.model_shapes import open_structure
    from dpo_jax.training.config import resolve

    derived = resolve(config, device_count=1, process_count=1)
    holdings, work = measure_holdings(config, open_structure(config), 1), measure_work(config, "gpu")
    pairs, accumulation = derived.micro_batch_per_device, derived.accumulation
    return float(sum(memory_by_kind(holdings, work, "gpu", pairs=pairs, accumulation=accumulation).values()))


if __name__ == "__main__":
    cli.run(main)
