"""Time the training step on this machine and show where the time goes.

  python -m dpo_jax.profile --config=configs/sdxl.py --output=runs/profile

It needs neither weights nor data: both are random numbers of the right shapes. To time training from stored encodings
add --config.data.encoded_views=1 --config.data.random_flip=False. OUTPUT receives profile.json and a trace, which
TensorBoard (pip install xprof) and Perfetto open.
"""

import json
from pathlib import Path

from absl import flags

from dpo_jax import cli
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.training.config import check_values
from dpo_jax.training.defaults import choose_method

section("Experiment and output")
CONFIG = cli.define_config("Experiment to time:", choose_method)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write profile.json and the trace to.", required=True)
STEPS = flags.DEFINE_integer("steps", 5, "Optimizer steps to time.", lower_bound=1)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing. Name a config or a file, for example --config=sdxl")
    check_values(CONFIG.value)
    import jax

    from dpo_jax.files import write_whole
    from dpo_jax.planning.measured import measure
    from dpo_jax.planning.search import settle

    config, folder = settle(CONFIG.value, print), Path(OUTPUT.value)
    device = jax.devices()[0]
    print(f"compiling the step for {jax.device_count()} x {device.device_kind}", flush=True)
    measured = measure(config, folder, STEPS.value)
    pairs = config.data.batch_size
    in_all = sum(measured.busy.values())
    print(
        f"compiled in {measured.compile_seconds:.1f} s; {measured.step_seconds:.3f} s per step of {pairs} pairs: "
        f"{pairs / measured.step_seconds:.2f} pairs/s\n"
    )
    print(f"{'Busy time per device and step':27} {'ms':>5} {'share':>7} {'TFLOP/s':>9}")
    for kind, seconds in sorted(measured.busy.items(), key=lambda item: -item[1]):
        flops = measured.flops.get(kind, 0.0)
        rate = f"{flops / seconds / 1e12:9.2f}" if flops and seconds else ""
        print(f"  {kind:24} {1000 * seconds:8.2f} {seconds / in_all:7.1%} {rate}")
    figures = measured._asdict() | {"device": device.device_kind, "devices": jax.device_count(), "pairs": pairs}
    write_whole(folder / "profile.json", json.dumps(figures, indent=1) + "\n")
    print(f"\nwritten to {folder}")


if __name__ == "__main__":
    cli.run(main)
