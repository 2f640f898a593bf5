"""Figures read from the text of compiled programs match programs written by hand and traced programs."""

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.cli import load_config
from dpo_jax.planning.hlo import count_collectives, count_traffic, products
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.products import Product, Sums, sums_by_kind
from dpo_jax.planning.program import Program
from dpo_jax.sharding import Placement, make_mesh, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose

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


def entry(instructions: str) -> str:
    return f"HloModule made_up\n\nENTRY %main (x: f32[1]) -> f32[1] {{\n{instructions}\n}}\n"


# As the compilers print them, shortened. Each multiplies [2 x 64, 320] by [320, 640].
LINEAR = {
    "cpu": """
  %x = bf16[2,64,320]{2,1,0} parameter(0)
  %w = bf16[320,640]{1,0} parameter(1)
  ROOT %y = bf16[2,64,640]{2,1,0} dot(%x, %w), lhs_contracting_dims={2}, rhs_contracting_dims={0}""",
    "gpu": """
  %x = bf16[128,320]{1,0} parameter(0)
  %w = bf16[320,640]{1,0} parameter(1)
  ROOT %y = (bf16[128,640]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", """
    """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"""
    """"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}""",
    "tpu": """
  %x = bf16[2,64,320]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[320,640,1]{1,0,2:T(8,128)(2,1)} parameter(1)
  ROOT %y = bf16[2,64,640]{2,1,0:T(8,128)(2,1)} convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf""",
}


@pytest.mark.parametrize("device", LINEAR)
def test_a_product_in_each_compilers_words(device: str) -> None:
    dtypes = frozenset(["bf16"])
    expected = Product("linear", 2 * 128 * 320 * 640, 2 * (128 * 320 + 320 * 640 + 128 * 640), dtypes)
    assert list(products(entry(LINEAR[device]))) == [expected]


BATCHED = {
    "cpu": """
  %q = f32[2,20,64,64]{3,2,1,0} parameter(0)
  %k = f32[2,20,77,64]{3,2,1,0} parameter(1)
  ROOT %y = f32[2,20,64,77]{3,2,1,0} dot(%q, %k), lhs_batch_dims={0,1}, lhs_contracting_dims={3}, """
    """rhs_batch_dims={0,1}, rhs_contracting_dims={3}, metadata={op_name="jit(f)/attention/dot_general"}""",
    "tpu": """
  %q = f32[2,64,20,64]{3,1,2,0:T(8,128)} parameter(0)
  %k = f32[2,77,20,64]{3,1,2,0:T(8,128)} parameter(1)
  ROOT %y = f32[2,20,64,77]{3,2,1,0:T(8,128)} convolution(%q, %k), window={size=2x20 stride=1x19 lhs_dilate=2x20}, """
    """dim_labels=0b1f_0o1i->01bf, metadata={op_name="jit(f)/transpose(jvp(attention))/dot_general"}""",
}


@pytest.mark.parametrize("device", BATCHED)
def test_attentions_product_in_each_compilers_words(device: str) -> None:
    """TPUs write batch axes as a window that reads one input at a time, between zeros."""
    found = sums_by_kind(products(entry(BATCHED[device])))
    size = 4 * 2 * 20 * 64 * (64 + 77 + 77)
    assert found["attention"] == Sums(2 * 2 * 20 * 64 * 77 * 64, size)
    assert found["linear"] == Sums(0, 0)


def test_a_product_with_batch_axes_whose_name_was_lost_is_attentions() -> None:
    nameless = BATCHED["cpu"].replace(', metadata={op_name="jit(f)/attention/dot_general"}', "")
    assert "metadata" not in nameless
    assert sums_by_kind(products(entry(nameless))) == sums_by_kind(products(entry(BATCHED["cpu"])))


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)


CONVOLUTION = """
  %x = bf16[4,8,8,16]{3,2,1,0} parameter(0)
  %k = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %dy = bf16[4,4,8,32]{3,2,1,0} parameter(2)
  %y = (bf16[4,4,8,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), WINDOW, """ + (
    """custom_call_target="__cudnn$convForward", metadata={op_name="jvp()/conv_general_dilated"}
  %dk = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), WINDOW, """
    """custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="transpose(jvp())/conv_general_dilated"}
  %dx = (bf16[4,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %k), WINDOW, """
    """custom_call_target="__cudnn$convBackwardInput", metadata={op_name="transpose(jvp())/conv_general_dilated"}"""
)


def test_operands_after_the_fifth_are_read() -> None:
    text = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%a, %a, %a, %a, %a, /*index=5*/%a), kind=kLoop, calls=%add
}
"""
    assert sum(count_traffic(text).values()) == 7 * 8 * 4


def test_convolutions_of_cudnn_are_those_that_were_traced() -> None:
    window = "window={size=3x3 stride=2x1 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
    found = sums_by_kind(products(entry(CONVOLUTION.replace("WINDOW", window))))

    def gradient(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(convolve, x, kernel)
        return y, *pull(y)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 8, 8, 16), (3, 3, 16, 32))]
    traced = sums_by_kind(Program(jax.make_jaxpr(gradient)(*shapes)).products())
    assert found["convolution"] == traced["convolution"]
    # 4 rows are seen 3 times each but for the padding above the first; 8 columns but for the two at the ends.
    assert found["convolution"].flops == 3 * 2 * 4 * 32 * 16 * (4 * 3 - 1) * (8 * 3 - 2)


def test_what_is_done_again_is_told_apart() -> None:
    for name in ("again", "rematted_computation"):
        text = BATCHED["cpu"].replace("jit(f)/attention", f"jit(f)/transpose(jvp(attention))/{name}")
        found = sums_by_kind(products(entry(text)))
        assert found["done again"].flops > 0 == found["attention"].flops


TRAFFIC = """HloModule made_up

%turned (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %t = f32[4,8]{1,0} transpose(%p), dimensions={1,0}
}

%scaled (q: f32[8,4]) -> f32[4,8] {
  %q = f32[8,4]{1,0} parameter(0)
  %u = f32[4,8]{1,0} transpose(%q), dimensions={1,0}
  ROOT %n = f32[4,8]{1,0} negate(%u)
}

%cut (r: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} parameter(0)
  %same = f32[8,4]{1,0} bitcast(%r)
  %v = f32[2,4]{1,0} slice(%same), slice={[2:4], [0:4]}
  ROOT %m = f32[2,4]{1,0} negate(%v)
}

ENTRY %main (x: f32[8,4], w: f32[4,16]) -> f32[8,16] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,16]{1,0} parameter(1)
  %a = f32[4,8]{1,0} fusion(%x), kind=kInput, calls=%turned
  %b = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%scaled
  %d = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%cut
  %c = f32[8,4]{0,1} copy(%x)
  %f = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %s = f32[8]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add
  %r = f32[8,4]{1,0} all-reduce(%x), to_apply=%add
  ROOT %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_traffic_is_what_instructions_read_and_write_by_what_they_do() -> None:
    x = 8 * 4 * 4
    assert count_traffic(TRAFFIC) == {
        "products": x + 4 * 16 * 4 + 8 * 16 * 4,
        "attention kernels": 3 * x + 8 * 4 * 2,
        "reductions": x + 8 * 4,
        "elementwise": 2 * x + 2 * x / 4,
        "copies": 2 * x + 2 * x,
        "collectives": 2 * x,
    }


KERNEL = """HloModule kernel

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %near = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %kernel = bf16[8,4]{1,0} custom-call(%near), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"blocks": "512"
}}, metadata={op_name="jit(step)/pallas_call"}
  ROOT %away = bf16[8,4]{0,1} copy(%kernel), metadata={op_name="jit(step)/transpose"}
}
"""


def test_what_follows_a_kernel_counts_and_what_lies_on_the_chip_does_not() -> None:
    """A kernel's metadata has line breaks, which end no computation."""
    traffic = {work: size for work, size in count_traffic(KERNEL).items() if size}
    array = 8 * 4 * 2
    assert traffic == {"copies": array + 2 * array, "attention kernels": array}


@pytest.mark.slow
def test_the_compiled_step_multiplies_as_often_as_the_traced_one() -> None:
    """The compiled step repeats exactly the products that the traced one repeats.

    A compiler that finds that the backward pass repeats a product of the forward pass would keep its large result.
    """
    config = load_config("configs/sdxl.py:tiny")
    pipeline, derived = open_structure(config), resolve(config, device_count=1, process_count=1)
    placement = Placement(make_mesh(1, 1, 1, jax.devices()[:1]), rules_of(config.mesh.rules))
    experiment = compose(config, derived, pipeline, placement)
    step = experiment.train_step()
    arguments = experiment.abstract_state(), experiment.frozen, experiment.abstract_batch()
    text = step.lower(*arguments).compile().as_text()
    assert text is not None
    compiled, traced = (
        {kind: sums.flops for kind, sums in sums_by_kind(found).items()}
        for found in (products(text), Program(jax.make_jaxpr(step)(*arguments)).products())
    )
    assert compiled["done again"] == traced["done again"] > 0
    assert compiled["attention"] == pytest.approx(traced["attention"], rel=0.03)
    both = compiled["convolution"] + compiled["linear"]  # of one pixel or with one feature either becomes the other
    assert both == pytest.approx(traced["convolution"] + traced["linear"], rel=0.003)
