"""The time of a step is sorted by work, for instructions written by hand and for a real step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.planning.measured import busy_seconds

ROOT = Path(__file__).parents[2]

TEXT = """HloModule made_up

%scaled (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%q)
}

%body (c: f32[8,4]) -> f32[8,4] {
  %c = f32[8,4]{1,0} parameter(0)
  %s = f32[8]{0} reduce(%c, %zero), dimensions={1}, to_apply=%add
  ROOT %b = f32[8,4]{1,0} fusion(%c), kind=kLoop, calls=%scaled
}

ENTRY %main (x: f32[8,4], w: f32[4,16]) -> f32[8,16] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,16]{1,0} parameter(1)
  %a = f32[8,4]{0,1} copy(%x)
  %l = f32[8,4]{1,0} while(%x), condition=%condition, body=%body
  %f = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %r = f32[8,4]{1,0} all-reduce(%x), to_apply=%add
  ROOT %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_time_by_what_instructions_do() -> None:
    # A loop's time is that of its body.
    events = [("a", 1.0), ("l", 6.0), ("b", 2.0), ("b", 2.0), ("s", 2.0), ("f", 8.0), ("y", 16.0), ("r", 32.0)]
    assert busy_seconds([*events, ("not there", 64.0)], TEXT) == {
        "copies": 1.0,
        "elementwise": 4.0,
        "reductions": 2.0,
        "attention kernels": 8.0,
        "linear": 16.0,
        "collectives": 32.0,
        "unknown": 64.0,
    }


@pytest.mark.slow
def test_profile_of_a_real_step(tmp_path: Path) -> None:
    arguments = ["--config=configs/sd15.py:tiny", f"--output={tmp_path}", "--steps=2", "--config.data.micro_batch=4"]
    command = [sys.executable, "-m", "dpo_jax.profile", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert list(tmp_path.glob("**/*.xplane.pb"))
    assert found["step_seconds"] > 0
    assert {"convolution", "linear", "attention", "elementwise"} <= set(found["busy"])
    assert "unknown" not in found["busy"]
    # Threads of a CPU may be busy at the same time, but no instruction longer than the step was while it was traced.
    assert 0.05 * found["step_seconds"] < sum(found["busy"].values()) < 20 * found["step_seconds"]
    assert f"{found['pairs'] / found['step_seconds']:.2f} pairs/s" in done.stdout


@pytest.mark.parametrize("flag", ["--steps=0", "--config=nowhere.py"])
def test_profile_refuses(flag: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_jax.profile", f"--output={tmp_path / 'out'}", flag]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
