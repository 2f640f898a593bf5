"""What is read off a compiled program, and a step compiled for TPUs that are not there."""

import importlib.util

import pytest

from dpo_jax.cli import load_config
from dpo_jax.planning.compiled import compile_step, count_collectives
from dpo_jax.planning.structure import open_structure
from dpo_jax.planning.topology import parse_topology

TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  %part = bf16[2,4]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%part), dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  %both = (f32[8,4]{1,0}, f32[16]{0}) all-reduce(%x, %y), to_apply=%add
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %z)
}

%condition (carry: (s32[], f32[8,4])) -> pred[] {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%fused (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %scattered = f32[16]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %loop = (s32[], f32[8,4]{1,0}) while(%init), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %once = f32[16]{0} fusion(%flat), kind=kCustom, calls=%fused
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_goes_round() -> None:
    assert count_collectives(TEXT) == {
        "all-gather": {"times": 5, "bytes": 5 * 8 * 4 * 2},
        "all-reduce": {"times": 5, "bytes": 5 * (8 * 4 + 16) * 4},
        "reduce-scatter": {"times": 1, "bytes": 16 * 4},
    }


def test_rounds_that_only_the_condition_tells() -> None:
    counted = """
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %five.clone.2 = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %five.clone.2), direction=LT, metadata={op_name="while/cond/lt"}"""
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', ", condition=%condition")
    text = text.replace("\n  ROOT %less = pred[] compare(%i, %n), direction=LT", counted)
    assert "known_trip_count" not in text
    assert count_collectives(text) == count_collectives(TEXT)


def test_pieces_of_one_collective_count_once() -> None:
    pieces = "".join(
        f"""
  %piece{i} = bf16[8,4]{{1,0}} all-gather(%x), channel_id={channel}, dimensions={{0}}"""
        for i, channel in enumerate((7, 7, 8))
    )
    text = TEXT.replace("ENTRY %main (x: f32[8,4]) -> f32[8,4] {", "ENTRY %main (x: f32[8,4]) -> f32[8,4] {" + pieces)
    gathers, before = count_collectives(text)["all-gather"], count_collectives(TEXT)["all-gather"]
    assert gathers["times"] == before["times"] + 2
    assert gathers["bytes"] == before["bytes"] + 2 * 8 * 4 * 2


def test_only_tpus_can_be_compiled_for() -> None:
    config = load_config("configs/sd15.py:tiny")
    with pytest.raises(ValueError, match="--compile is for TPUs, and h200:8 is none"):
        compile_step(config, open_structure(config), parse_topology("h200:8"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs pip install "jax[tpu]"')
def test_a_tpu_is_compiled_for_without_one() -> None:
    config = load_config("configs/sd15.py:tiny")
    config.data.batch_size, config.data.accumulation = 16, 2
    compiled = compile_step(config, open_structure(config), parse_topology("v5e:2x2"))
    assert 0 < compiled.argument_bytes < compiled.hbm_bytes < 2**30
    assert compiled.collectives["all-reduce"]["times"] > 0
