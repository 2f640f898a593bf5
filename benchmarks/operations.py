"""Times each distinct operation of a UNet on this device and compares it with the device's limits.

  python benchmarks/operations.py --mode=sdxl-full --json=benchmarks/results/h200-sdxl-operations.json

The UNet's forward pass is traced for the images that a step has at a time. Every convolution, matrix product, norm,
GEGLU and attention with a distinct shape is timed alone, forward and with its derivatives, on random numbers; attention
also with the library's kernel for this kind of device. Elementwise operations that a compiler fuses into these are not
timed. The floor is the larger of two times: the operations at the measured rate of large matrix products, and the bytes
of operands and results at the measured rate of copies. The sum over all operations, forward and with derivatives for
the policy and forward for the reference, predicts the step.
"""

import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from fresh_process import in_fresh_process
from step_contestants import MODES, Mode, ceilings, load

from dpo_jax import cli

MODE = flags.DEFINE_enum("mode", "tiny", list(MODES), "Model and number of pairs at a time.")
PAIRS = flags.DEFINE_integer("pairs", 0, "Pairs at a time; 0 takes those of the mode.")
SECONDS = flags.DEFINE_float("seconds", 0.2, "Seconds to repeat each operation.")
JSON = flags.DEFINE_string("json", None, "File to write the figures to.")

PRODUCTS = {"conv_general_dilated": "convolution", "dot_general": "linear"}
BY_HAND = {"_norm": "norm", "_group_norm": "norm", "geglu": "geglu", "_attention": "attention"}
"""Functions of `models/` with derivatives of their own, each timed as one operation."""


class Operation(NamedTuple):
    """An operation with a distinct shape."""

    kind: str
    shapes: str
    function: Callable[..., Any]
    avals: tuple[Any, ...]


def main() -> None:
    mode = MODES[MODE.value]
    if PAIRS.value:
        mode = mode._replace(pairs=PAIRS.value, batch_size=PAIRS.value)
    limits = in_fresh_process(ceilings)
    print(f"{limits['device']}: products {limits['tflops']:.4g} TFLOP/s, copies {limits['copy_gb_s']:.4g} GB/s")
    rows = in_fresh_process(measure, mode, SECONDS.value, limits)
    figures = {
        "mode": MODE.value,
        "pairs_at_a_time": mode.pairs,
        "date": time.strftime("%Y-%m-%d"),
        "jax": importlib.metadata.version("jax"),
        **limits,
        "operations": rows,
        "step_ms_a_pair": {of: sum_of(rows, of) / mode.pairs for of in ("ms", "floor_ms")},
    }
    print(table(rows))
    predicted, floor = figures["step_ms_a_pair"]["ms"], figures["step_ms_a_pair"]["floor_ms"]
    print(f"sum of a pair, policy and reference: {predicted:.1f} ms; of the floors {floor:.1f} ms")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def measure(mode: Mode, seconds: float, limits: dict[str, Any]) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from dpo_jax.planning.program import Program

    def forward_and_back(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(cotangents: Any, *arguments: Any) -> Any:
            results, pull = jax.vjp(function, *arguments)
            return results, pull(cotangents)

        return both

    def timed(function: Callable[..., Any], avals: Any) -> dict[str, float]:
        """Return the milliseconds of one execution, and the floor."""
        results = jax.eval_shape(function, *avals)
        flops = Program(jax.make_jaxpr(function)(*avals)).flops()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((avals, results)))
        leaves, structure = jax.tree.flatten(avals)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        numbers = [jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, leaves, strict=True)]
        jitted, arguments = jax.jit(function), jax.tree.unflatten(structure, numbers)
        jax.block_until_ready(jitted(*arguments))
        once = -time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        once += time.perf_counter()
        times = max(1, round(seconds / 5 / once))
        found = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready([jitted(*arguments) for _ in range(times)][-1])
            found.append((time.perf_counter() - started) / times)
        floor = max(flops / limits["tflops"] / 1e12, size / limits["copy_gb_s"] / 1e9)
        return {"ms": 1e3 * min(found), "floor_ms": 1e3 * floor, "gflop": flops / 1e9, "mb": size / 1e6}

    rows = []
    for operation, times in distinct_operations(mode).items():
        shape_of = jax.eval_shape(operation.function, *operation.avals)
        cotangents = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), shape_of)
        rows.append(
            {
                "kind": operation.kind,
                "shapes": operation.shapes,
                "times": times,
                "forward": timed(operation.function, operation.avals),
                "with_derivatives": timed(forward_and_back(operation.function), (cotangents, *operation.avals)),
            }
        )
    return rows


def distinct_operations(mode: Mode) -> dict[Operation, int]:
    """Return the operations of the UNet's forward pass and their counts; alternative kernels have a count of 0."""
    import jax
    import jax.numpy as jnp

    from dpo_jax.models.kernels import KERNELS
    from dpo_jax.planning.model_shapes import open_structure

    config = load(mode)
    config.attention = "xla"  # the library's kernel is timed beside it
    pipeline = open_structure(config)
    unet, images = pipeline.denoiser.config, 2 * mode.pairs
    cells = config.data.resolution // pipeline.vae_factor
    weights = {name: jax.ShapeDtypeStruct(spec.shape, pipeline.dtype) for name, spec in pipeline.denoiser.specs.items()}
    x_NHWC = jax.ShapeDtypeStruct((images, cells, cells, unet.in_channels), pipeline.dtype)
    conditioning = abstract_conditioning(pipeline, images)
    traced = jax.make_jaxpr(pipeline.denoise)(weights, x_NHWC, jax.ShapeDtypeStruct((images,), jnp.int32), conditioning)
    library = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend())
    found: Counter[Operation] = Counter()
    known: dict[Any, Operation] = {}
    for kind, eqn in equations(traced.jaxpr):
        avals = tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars)
        key = (kind, str(eqn.params.get("call_jaxpr", eqn.params)), avals)
        if key not in known:
            shapes = " x ".join("[" + ",".join(map(str, aval.shape)) + "]" for aval in avals)
            known[key] = Operation(kind, shapes, alone(eqn), avals)
            if kind == "attention" and library:
                known[(library, *key)] = kernel(KERNELS[library], library, eqn, known[key])
                found[known[(library, *key)]] = 0
        found[known[key]] += 1
    return dict(found)


def abstract_conditioning(pipeline: Any, images: int) -> Any:
    """Return the shapes of the captions' embeddings and of SDXL's sizes, as the text encoders make them."""
    import jax
    import jax.numpy as jnp

    from dpo_jax.encode.text import condition, encode_text

    tokens = jax.ShapeDtypeStruct((images, sum(pipeline.text_lengths)), jnp.int32)
    frozen = {
        name: {key: jax.ShapeDtypeStruct(spec.shape, pipeline.dtype) for key, spec in network.specs.items()}
        for name, network in pipeline.components.items()
    }

    def make(frozen: Any, tokens: Any, sizes: Any) -> Any:
        return condition(pipeline, encode_text(pipeline, frozen, tokens), sizes)

    return jax.eval_shape(make, frozen, tokens, jax.ShapeDtypeStruct((images, 6), jnp.float32))


def equations(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Yield the equations to time, with their kinds, of a jaxpr and of the jaxprs that it calls."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in PRODUCTS:
            yield PRODUCTS[name], eqn
        elif name == "custom_vjp_call" and (kind := BY_HAND.get(function_of(eqn))):
            yield kind, eqn
        else:
            for inner in eqn.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)


def function_of(eqn: Any) -> str:
    """Return the name of a function with a derivative of its own."""
    return eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info.split(" at ")[0]


def alone(eqn: Any) -> Callable[..., Any]:
    """Return one equation of a traced program as a function."""
    from jax.extend import core

    jaxpr = core.Jaxpr((), eqn.invars, eqn.outvars, [eqn], debug_info=eqn.ctx and None)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))


def kernel(of_library: Any, name: str, eqn: Any, ours: Operation) -> Operation:
    """Return the same attention with a library's kernel."""
    split = next(inner for inner in eqn.params["call_jaxpr"].eqns if inner.primitive.name == "reshape")
    heads = split.outvars[0].aval.shape[2]
    return Operation(f"attention, {name}", ours.shapes, lambda *a: of_library.attend(*a, heads), ours.avals)


def sum_of(rows: list[dict[str, Any]], of: str) -> float:
    """Return the milliseconds for all images at a time: the policy with derivatives, the reference without."""
    return sum(row["times"] * (row["forward"][of] + row["with_derivatives"][of]) for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table, the longest operations first."""
    lines = [f"{'':18} {'times':>5} {'forward ms':>10} {'floor':>6} {'all ms':>9} {'floor':>6} {'of all':>6}  shapes"]
    in_all = sum_of(rows, "ms")
    for row in sorted(rows, key=lambda row: -sum_of([row], "ms")):
        forward, both = row["forward"], row["with_derivatives"]
        lines.append(
            f"{row['kind']:18} {row['times']:5} {forward['ms']:10.3f} {forward['floor_ms'] / forward['ms']:6.0%} "
            f"{both['ms']:9.3f} {both['floor_ms'] / both['ms']:6.0%} {sum_of([row], 'ms') / in_all:6.1%}  "
            f"{row['shapes']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
