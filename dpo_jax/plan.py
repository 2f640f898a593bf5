"""Estimate the memory and the time that a config needs on a machine, without the machine.

  python -m dpo_jax.plan --config=configs/sdxl.py --topology=v5p:4x4x4

Memory, operations and traffic are computed from shapes and shardings, in seconds. The speed follows from an assumed
share of the chip's peak rate. --fit searches for the fastest settings that fit. --compile compiles the real training
step for these TPUs or GPUs, which takes tens of minutes for a whole model; it needs no chip, but the compiler:
pip install "jax[tpu]" or "jax[cuda12]". A config for dpo_jax.online is planned with the memory and the time of drawing
a round's images.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import cli
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.training.config import check_values, resolve
from dpo_jax.training.defaults import choose_method

if TYPE_CHECKING:
    from dpo_jax.planning.compiled import Compiled
    from dpo_jax.planning.estimate import Plan
    from dpo_jax.planning.topology import Topology

section("Experiment and chips")
CONFIG = cli.define_config("Experiment to plan:", choose_method)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips to plan for, for example v5e:16x16, v5p:4x4x4, h200:8, h100:8x4 (4 hosts of 8) or rtx4090:1; this for those "
    "of this machine.",
    required=True,
)

section("Planning")
FIT = flags.DEFINE_bool(
    "fit", False, "Find the fastest remat, data.micro_batch and mesh.fsdp that fit, in place of the config's own."
)
COMPILE = flags.DEFINE_bool("compile", False, "Compile the step for these chips and print XLA's figures too.")
UTILISATION = flags.DEFINE_float(
    "utilisation",
    None,
    "Share of the chips' peak rate to assume. Default: 0.4; 0.25 for v6e and tpu7x.",
    lower_bound=0.01,
    upper_bound=1,
)
JSON = flags.DEFINE_bool("json", False, "Print the plan as JSON and nothing else.")


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing. Name a config or a file, for example --config=sdxl")
    # Without an accelerator JAX offers the compiler for GPUs only if the platform is named.
    if TOPOLOGY.value != "this":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dpo_jax.models.kernels import choose
    from dpo_jax.planning.compiled import compile_step
    from dpo_jax.planning.estimate import make_plan, measure_holdings, measure_work
    from dpo_jax.planning.model_shapes import open_structure
    from dpo_jax.planning.report import as_text
    from dpo_jax.planning.search import choose_settings, depends_on_memory, describe_choice, fit
    from dpo_jax.planning.topology import GIB, parse_topology

    config, topology = CONFIG.value, parse_topology(TOPOLOGY.value)
    if "online" in config:
        return main_of_rounds(config, topology)
    check_values(config)
    attention = choose(config.attention, config.dtype, topology.device.platform)
    config = cli.replaced(config, {"attention": attention})
    if FIT.value:
        config, plan = fit(config, topology, UTILISATION.value, say)
    else:
        if depends_on_memory(config):
            device, asked = topology.device, config
            config = choose_settings(config, device.kind, topology.num_devices, device.usable_gib * GIB)
            if config.memory.auto:
                say(f"{describe_choice(asked, config)} fit {topology.name}")
        pipeline = open_structure(config)
        derived = resolve(config, device_count=topology.num_devices, process_count=1)
        holdings = measure_holdings(config, pipeline, topology.num_devices)
        work = measure_work(config, topology.device.kind)
        plan = make_plan(
            holdings,
            work,
            topology,
            batch_size=config.data.batch_size,
            pairs=derived.micro_batch_per_device,
            utilisation=UTILISATION.value,
        )
    result: dict[str, Any] = plan.to_json()
    if not JSON.value:
        print(as_text(config, plan))
    if COMPILE.value:
        add_compiled(result, plan, functools.partial(compile_step, config, open_structure(config), topology))
    if JSON.value:
        print(json.dumps(result, indent=2))


def main_of_rounds(config: ConfigDict, topology: "Topology") -> None:
    """Print the plan of a config for `dpo_jax.online`."""
    from dpo_jax.models.kernels import choose
    from dpo_jax.planning.compiled import compile_update
    from dpo_jax.planning.model_shapes import open_structure
    from dpo_jax.planning.report import rounds_text
    from dpo_jax.planning.rounds import plan_rounds
    from dpo_jax.rounds.config import check

    if FIT.value:
        raise UserError("--fit is for dpo_jax.train; an online config is planned with the settings that it has")
    check(config)
    plan = plan_rounds(config, topology, UTILISATION.value)
    result: dict[str, Any] = plan.to_json()
    if not JSON.value:
        print(rounds_text(config, plan))
    if COMPILE.value:
        attention = choose(config.attention, config.dtype, topology.device.platform)
        config = cli.replaced(config, {"attention": attention})
        add_compiled(result, plan.step, functools.partial(compile_update, config, open_structure(config), topology))
    if JSON.value:
        print(json.dumps(result, indent=2))


def add_compiled(result: dict[str, Any], plan: "Plan", compile_it: Callable[[], "Compiled"]) -> None:
    """Compile a step, and add XLA's figures to the plan's JSON or print them beside its own."""
    from dpo_jax.planning.compiled import summarize
    from dpo_jax.planning.report import compiled_text

    say(f"compiling the step for {plan.topology.name}")
    began = time.monotonic()
    compiled = compile_it()
    result["compiled"] = summarize(compiled) | {"seconds": time.monotonic() - began}
    if not JSON.value:
        print(compiled_text(plan, compiled))


def say(message: str) -> None:
    if not JSON.value:
        print(f"... {message}", flush=True)


if __name__ == "__main__":
    cli.run(main)
