"""Counts the operations and the memory of a traced JAX program from its jaxpr, without a compiler or a device.

One rule models the compiler. It fuses elementwise operations into the operations that read them, products and
convolutions included, so their results take no memory: they are computed again from their sources wherever they are
read, and the sources stay in memory until then. Only where an operation joins several values that are larger together
(a sum, a difference) is the result kept in their place. On GPUs products and convolutions are kernels of libraries,
which read their operands from memory.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jax.extend import core

from dpo_jax.planning.products import Product, Window, convolution_flops, kind_of
from dpo_jax.planning.sizes import stored_bytes

HLO_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "sign", "max", "min", "pow", "integer_pow", "square", "sqrt", "rsqrt", "exp"),
    *("exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erfc", "sin", "cos", "abs", "floor", "round", "rem"),
    *("convert_element_type", "select_n", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor"),
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "iota", "pad", "slice", "copy"),
    *("stop_gradient", "name", "optimization_barrier", "reduce_precision", "add_any", "is_finite", "split"),
    *("shift_left", "shift_right_logical", "bitcast_convert_type", "sharding_constraint", "random_wrap"),
    *("stack", "unstack"),  # they join the weights of a loop's blocks, and cut their gradients
}

LAYOUT = {"reshape", "squeeze", "expand_dims", "transpose", "name", "optimization_barrier", "sharding_constraint"}
"""Elementwise operations that only change how an array is read."""
PRODUCTS = {"dot_general", "conv_general_dilated"}


class Operation(NamedTuple):
    """One equation of a program without calls; its variables are numbers."""

    name: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str
    """Names of the scopes it was traced in."""


class Program:
    """A jaxpr with all calls inlined, without the operations that no output needs."""

    def __init__(self, closed: core.ClosedJaxpr):
        self.avals: list[Any] = []
        self.operations: list[Operation] = []
        jaxpr = closed.jaxpr
        self.inputs = [self._new(var.aval) for var in jaxpr.invars]
        self.outputs = self._inline(jaxpr, self.inputs)
        self._remove_dead()

    def bytes(self, variable: int) -> int:
        """Return the bytes of a variable."""
        aval = self.avals[variable]
        return stored_bytes(aval)

    def flops(self, *, without: str | None = None) -> float:
        """Return the floating point operations of products and convolutions, 2 per multiplication and addition.

        `without` leaves out operations that were traced in a scope of that name (`jax.named_scope`).
        """
        counted = (op for op in self.operations if not (without and _is_within(op, without)))
        return sum(self._flops(operation, without) for operation in counted)

    def _flops(self, operation: Operation, without: str | None) -> float:
        shapes = [self.avals[variable].shape for variable in (*operation.inputs, *operation.outputs)]
        if operation.name == "dot_general":
            (contracted, _), _ = operation.params["dimension_numbers"]
            return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        if operation.name == "conv_general_dilated":
            return 2 * math.prod(shapes[-1]) * _taps(operation.params, shapes[1])
        if operation.name == "scan":
            return operation.params["length"] * Program(operation.params["jaxpr"]).flops(without=without)
        return 0

    def products(self, times: float = 1.0, called_in: str = "") -> Iterator[Product]:
        """Yield the products and convolutions; those in a loop are counted as often as it repeats."""
        for operation in self.operations:
            avals = [self.avals[variable] for variable in (*operation.inputs, *operation.outputs)]
            scope = f"{called_in}/{operation.scope}"
            if operation.name == "scan":
                yield from Program(operation.params["jaxpr"]).products(times * operation.params["length"], scope)
            if operation.name not in PRODUCTS:
                continue
            is_convolution = operation.name == "conv_general_dilated"
            flops = _convolution_flops(operation.params, avals) if is_convolution else self._flops(operation, None)
            size = sum(map(self.bytes, (*operation.inputs, *operation.outputs)))
            dtypes = frozenset(HLO_NAMES.get(aval.dtype.name, aval.dtype.name) for aval in avals[:2])
            yield Product(kind_of(scope, is_convolution), times * flops, times * size, dtypes)

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _inline(self, jaxpr: core.Jaxpr, inputs: Iterable[int], called_in: str = "") -> list[int]:
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            numbers[var] = self._new(var.aval)

        def number(atom: Any) -> int:
            return self._new(atom.aval) if isinstance(atom, core.Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            given = [number(atom) for atom in eqn.invars]
            scope = f"{called_in}/{eqn.source_info.name_stack}"
            inner = _called(eqn)
            if inner is not None:
                results = self._inline(inner, given, scope)
            else:
                results = [self._new(var.aval) for var in eqn.outvars]
                self.operations.append(Operation(eqn.primitive.name, eqn.params, tuple(given), tuple(results), scope))
            numbers.update(zip(eqn.outvars, results, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _remove_dead(self) -> None:
        needed, kept = set(self.outputs), []
        for operation in reversed(self.operations):
            if needed.intersection(operation.outputs):
                needed.update(operation.inputs)
                kept.append(operation)
        self.operations = kept[::-1]


def _called(eqn: Any) -> core.Jaxpr | None:
    """Return the body of a call that is executed once, or None for a loop, a kernel or another operation."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            inner = eqn.params[name]
            return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    return None


def _taps(params: dict[str, Any], kernel: tuple[int, ...]) -> float:
    """Return the multiplications per element of a convolution's result, without those with zeros between inputs."""
    numbers = params["dimension_numbers"]
    space = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    channels = kernel[numbers.rhs_spec[1]]
    return channels * math.prod(space) / math.prod(params["lhs_dilation"])


def _convolution_flops(params: dict[str, Any], avals: list[Any]) -> float:
    x, kernel, y = (aval.shape for aval in avals)
    numbers = params["dimension_numbers"]
    along = [
        Window(stride, low, input_dilation, kernel_dilation)
        for stride, (low, _), input_dilation, kernel_dilation in zip(
            params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True
        )
    ]
    inputs, taps, out = (
        [shape[axis] for axis in spec[2:]] for shape, spec in zip((x, kernel, y), numbers, strict=True)
    )
    outputs = math.prod(y[axis] for axis in numbers.out_spec[:2])
    return convolution_flops(outputs, kernel[numbers.rhs_spec[1]], inputs, taps, out, along)


def peak_bytes(program: Program, weights: Iterable[int], *, by_library: bool = False, fused: str | None = None) -> int:
    """Return the most bytes that intermediate values take at any time, without the inputs and the outputs.

    Args:
        program: whose values are counted.
        weights: inputs that are parameters. Values computed from them alone (rounded weights), and values that become
            outputs by elementwise operations alone (gradients), are not counted: they depend on the sharding.
        by_library: whether products read their operands from memory, as on GPUs.
        fused: a scope (`jax.named_scope`) whose operations are one kernel, which keeps what only they read to itself.
    """
    uncounted = set(program.inputs) | _made_of(program, set(weights)) | _gradients(program)
    inside = _only_within(program, fused) if fused else set()
    existing = _read_by_products(program) if by_library else set()
    sources = _sources(program, uncounted, existing, inside)
    last_read: dict[int, int] = {}
    for time, operation in enumerate(program.operations):
        for variable in operation.inputs:
            for source in sources.get(variable, ()):
                last_read[source] = time
    for variable in program.outputs:
        for source in sources.get(variable, ()):
            last_read[source] = len(program.operations)
    freed: dict[int, list[int]] = {}
    for source, time in last_read.items():
        freed.setdefault(time, []).append(source)
    held = peak = 0
    for time, operation in enumerate(program.operations):
        held += sum(program.bytes(v) for v in operation.outputs if v in last_read)
        is_loop = operation.name == "scan" and not (fused and _is_within(operation, fused))
        loop = peak_bytes(Program(operation.params["jaxpr"]), (), by_library=by_library, fused=fused) if is_loop else 0
        peak = max(peak, held + loop)
        held -= sum(program.bytes(v) for v in freed.get(time, []))
    return peak


def kept_bytes(program: Program, weights: Iterable[int], *, by_library: bool = False) -> int:
    """Return the bytes of the values from which a program's outputs are computed elementwise, without its inputs.

    For a forward pass that returns its derivative (`jax.vjp`) these are the values kept for the backward pass.
    `weights` and `by_library` are those of `peak_bytes`.
    """
    uncounted = set(program.inputs) | _made_of(program, set(weights))
    sources = _sources(program, uncounted, _read_by_products(program) if by_library else set(), set())
    kept = frozenset().union(*(sources.get(variable, frozenset()) for variable in program.outputs))
    return sum(program.bytes(variable) for variable in kept)


def _read_by_products(program: Program) -> set[int]:
    """Return the variables that products and convolutions read, before changes of layout."""
    read = {variable for op in program.operations if op.name in PRODUCTS for variable in op.inputs}
    for operation in reversed(program.operations):
        if operation.name in LAYOUT:
            for before, after in zip(operation.inputs, operation.outputs, strict=False):
                if after in read:
                    read.remove(after)
                    read.add(before)
    return read


def _is_within(operation: Operation, scope: str) -> bool:
    return re.search(rf"\b{scope}\b", operation.scope) is not None  # of a derivative it reads transpose(jvp(scope))


def _only_within(program: Program, scope: str) -> set[int]:
    """Return the variables that only operations of a scope make and read."""
    within = [operation for operation in program.operations if _is_within(operation, scope)]
    made = {variable for operation in within for variable in operation.outputs}
    others = (operation for operation in program.operations if not _is_within(operation, scope))
    return made.difference(program.outputs, *(operation.inputs for operation in others))


def _sources(program: Program, uncounted: set[int], existing: set[int], inside: set[int]) -> dict[int, frozenset[int]]:
    """Return for each variable the variables in memory it comes from: itself, or those it is computed from again.

    Variables in `existing` are in memory in any case, those in `inside` never.
    """
    sources: dict[int, frozenset[int]] = {}
    for operation in program.operations:
        made_of = frozenset().union(*(sources.get(variable, frozenset()) for variable in operation.inputs))
        sizes = [program.bytes(variable) for variable in made_of]
        for variable in operation.outputs:
            if variable in uncounted:
                continue
            joins = max(sizes, default=0) <= program.bytes(variable) < 0.75 * sum(sizes)
            exists = joins or operation.name not in ELEMENTWISE or variable in existing
            sources[variable] = frozenset([variable]) if exists and variable not in inside else made_of
    return sources


def _made_of(program: Program, variables: set[int]) -> set[int]:
    """Return the variables that elementwise operations compute from `variables` and constants alone."""
    known = set(variables)
    computed = {v for op in program.operations for v in op.outputs}
    for operation in program.operations:
        relevant = [v for v in operation.inputs if v in computed or v in program.inputs]
        if operation.name in ELEMENTWISE and relevant and known.issuperset(relevant):
            known.update(operation.outputs)
    return known


def _gradients(program: Program) -> set[int]:
    """Return the variables that become outputs by elementwise operations alone, back to a product."""
    known = set(program.outputs)
    readers = Counter(variable for operation in program.operations for variable in operation.inputs)
    for operation in reversed(program.operations):
        if operation.name in ELEMENTWISE and known.intersection(operation.outputs):
            readers.subtract(operation.inputs)
            known.update(v for v in operation.inputs if readers[v] == 0)  # results of a loop have several readers
    return known
