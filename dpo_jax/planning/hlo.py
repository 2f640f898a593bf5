"""Reads the text of a compiled XLA program: collectives, products and convolutions, and memory traffic.

Instructions in the body of a loop count as often as the loop repeats.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.models.attention import ATTENTION
from dpo_jax.planning.products import Product, Window, convolution_flops, kind_of

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
"""Bytes of the element types that do not take 4."""
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    """Shape as printed, with its layout; a tuple is in parentheses."""
    operation: str
    operands: tuple[str, ...]
    line: str

    @property
    def scope(self) -> str:
        """Names of the scopes it was traced in; "" if the compiler added it."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    @property
    def custom_call(self) -> str:
        """Target of a `custom-call`, or ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.line)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Return an attribute of the instruction up to the next space, comma or brace, or ""."""
        found = re.search(rf"\b{name}=\{{?([^\s,}}]*)", self.line)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A function of a program."""

    is_entry: bool
    instructions: dict[str, Instruction]


class Visit(NamedTuple):
    """An instruction where the program executes it."""

    instruction: Instruction
    computation: Computation
    """Computation that contains it."""
    times: float
    """How often it is executed."""
    is_fused: bool
    """Whether it is part of a fusion, so that its result is not in memory."""


class Module:
    """A compiled program."""

    def __init__(self, text: str):
        self.computations = _computations(text)

    def visits(self) -> Iterator[Visit]:
        """Yield every instruction that is executed, in no particular order."""
        entry = next(computation for computation in self.computations.values() if computation.is_entry)
        yield from self._visits(entry, 1.0, False)

    def _visits(self, computation: Computation, times: float, is_fused: bool) -> Iterator[Visit]:
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, is_fused)
            if instruction.operation in ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "map"):
                continue  # they call a function of two numbers
            rounds = self._rounds(instruction) if instruction.operation == "while" else 1
            called = re.findall(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+)", instruction.line)
            for name in called:
                if name in self.computations:
                    inside = is_fused or instruction.operation == "fusion"
                    yield from self._visits(self.computations[name], times * rounds, inside)

    def _rounds(self, loop: Instruction) -> int:
        """Return how often a loop repeats: as stated, or as JAX's loops count, from 0 to below a constant."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
        if stated:
            return int(stated[1])
        condition = self.computations.get(loop.attribute("condition").removeprefix("%"))
        for compared in condition.instructions.values() if condition else ():
            if "direction=LT" in compared.line and compared.line.lstrip().startswith("ROOT"):
                limit = condition.instructions.get(compared.operands[1]) if condition else None
                constant = re.search(r"constant\((\d+)\)", limit.line) if limit else None
                return int(constant[1]) if constant else 1
        return 1


def _computations(text: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in _joined_lines(text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], Computation(header[1] is not None, {}))
        elif END.match(line):
            current = None
        elif current is not None:
            line = re.sub(r"/\*index=\d+\*/", "", line)  # printed before every fifth operand
            found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\(([^)]*)", line)
            if found:
                operands = tuple(operand.strip().removeprefix("%") for operand in found[4].split(","))
                current.instructions[found[1]] = Instruction(found[1], found[2], found[3], operands, line)
    return computations


END = re.compile(r"\}($|, )")
"""The line after a computation."""


def _joined_lines(text: str) -> Iterator[str]:
    """Yield the lines of a program, each instruction in one: the metadata of Pallas kernels has line breaks."""
    held = ""
    for line in text.splitlines():
        if re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = |(?:ENTRY )?%?[\w.\-]+ \(.*\{$", line) or END.match(line):
            yield held
            held = line
        else:
            held += line
    yield held


def shapes(printed: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the element types and sizes of a shape as HLO prints it."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", printed)
    return [(dtype, tuple(int(size) for size in axes.split(",") if size)) for dtype, axes in parts]


def num_bytes(dtype: str, axes: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    return DTYPE_BYTES.get(dtype, 4) * math.prod(axes)


def count_collectives(text: str) -> dict[str, dict[str, float]]:
    """Return how often each kind of collective is executed, and the bytes of the results.

    A collective that a TPU executes in pieces, overlapping with other work, appears in several fusions with the same
    channel; it counts once.
    """
    found: dict[str, dict[str, float]] = {}
    channels: set[str] = set()
    for instruction, _, times, _ in Module(text).visits():
        kind = instruction.operation.removesuffix("-start")
        channel = instruction.attribute("channel_id")
        if kind not in COLLECTIVES or channel in channels:
            continue
        channels.update([channel] if channel else [])
        sizes = [num_bytes(*shape) for shape in shapes(instruction.shape)]
        # The start of an asynchronous one returns its operands as well.
        size = max(sizes, default=0) if instruction.operation.endswith("-start") else sum(sizes)
        entry = found.setdefault(kind, {"times": 0, "bytes": 0})
        entry["times"] += times
        entry["bytes"] += times * size
    return found


def products(text: str) -> Iterator[Product]:
    """Yield the products and convolutions of a program for CPUs, GPUs or TPUs; compilers turn one into the other."""
    for instruction, computation, times, _ in Module(text).visits():
        library = re.fullmatch(r"__(cudnn\$conv|cublas\$).*", instruction.custom_call)
        if instruction.operation in ("dot", "convolution") or library:
            operands = [shapes(computation.instructions[name].shape)[0] for name in instruction.operands[:2]]
            arrays = [*operands, shapes(instruction.shape)[0]]
            is_dot = instruction.operation == "dot" or (library and library[1] == "cublas$")
            flops = (_dot_flops if is_dot else _convolution_flops)(instruction, arrays)
            size = sum(num_bytes(*array) for array in arrays)
            dtypes = frozenset(dtype for dtype, _ in operands)
            yield Product(_kind(instruction), times * flops, times * size, dtypes)


def _kind(product: Instruction) -> str:
    scope = product.scope
    if not scope and "batch_dims" in product.line:  # the scope was lost, and linear layers have no such axes
        scope = ATTENTION
    return kind_of(scope, "conv_general_dilated" in scope)


NOT_DONE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call"}
"""Instructions that do not access memory themselves."""
CUTS = {"slice", "dynamic-slice"}
ONLY_MOVES = {"copy", "transpose", "pad", "concatenate"} | CUTS
FOR_FREE = {"parameter", "bitcast", "reshape", "tuple", "constant", "get-tuple-element", "convert"}


ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^{}]*S\(1\)[^{}]*\}")
"""An array in a TPU's memory space 1, its vector memory."""


WORK = ("products", "attention kernels", "reductions", "elementwise", "copies", "collectives")
"""Kinds of work of instructions."""


def work_of(module: Module, instruction: Instruction) -> tuple[str, str]:
    """Return the work of an instruction with all that is fused into it, one of WORK, and the kind of a product.

    The kind is one of `products.KINDS`, and "" for other instructions.
    """
    called = module.computations.get(instruction.attribute("calls").removeprefix("%"))
    parts = list(called.instructions.values()) if called else [instruction]
    inside = {part.operation.removesuffix("-start") for part in parts}
    product = next((part for part in parts if part.operation in ("dot", "convolution")), None)
    if product or re.match(r"__(cudnn\$conv|cublas\$)", instruction.custom_call):
        return "products", _kind(product or instruction)
    if "fmha" in instruction.custom_call or instruction.custom_call == "tpu_custom_call":
        return "attention kernels", ""
    if instruction.operation.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return "collectives", ""
    if inside & ONLY_MOVES and inside <= ONLY_MOVES | FOR_FREE:
        return "copies", ""
    return "reductions" if "reduce" in inside else "elementwise", ""


def count_traffic(text: str) -> dict[str, float]:
    """Return the bytes that a program's instructions read and write, by their work (WORK).

    A fusion reads each operand once, and only the slices that it takes from it. Arrays that a TPU holds on the chip, in
    another memory space, cost nothing; moving one there reads it once.
    """
    found = dict.fromkeys(WORK, 0.0)
    module = Module(text)
    for instruction, computation, times, is_fused in module.visits():
        if is_fused or instruction.operation in NOT_DONE or instruction.operation.endswith("-done"):
            continue
        called = module.computations.get(instruction.attribute("calls").removeprefix("%"))
        read = [part.shape for name in instruction.operands if (part := computation.instructions.get(name))]
        if called:
            read = [_read_of(called, number, shape) for number, shape in enumerate(read)]
        # The start of an asynchronous copy returns the destination, its operand and a context.
        written = instruction.shape
        if instruction.operation == "copy-start":
            written = written.partition("},")[0] + "}"
        printed = (ON_CHIP.sub("", shape) for shape in (written, *read))
        sizes = [num_bytes(*array) for shape in printed for array in shapes(shape)]
        found[work_of(module, instruction)[0]] += times * sum(sizes)
    return found


def _read_of(fused: Computation, number: int, shape: str) -> str:
    """Return the shapes that a fusion reads of an operand: its slices, or all of it."""
    parts = fused.instructions.values()
    parameter = next((p for p in parts if p.operation == "parameter" and p.operands == (str(number),)), None)
    same = {parameter.name} if parameter else set()
    same |= {part.name for part in parts if part.operation == "bitcast" and part.operands[0] in same}
    users = [part for part in parts if same & {*part.operands} and part.name not in same]
    return " ".join(user.shape for user in users) if users and all(u.operation in CUTS for u in users) else shape


Array = tuple[str, tuple[int, ...]]


def _dot_flops(instruction: Instruction, arrays: list[Array]) -> float:
    (_, left), _, (_, result) = arrays
    # The first form is HLO's, the second that of the configuration of a call to cuBLAS.
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.line)
    contracted = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(instruction: Instruction, arrays: list[Array]) -> float:
    (_, x), (_, kernel), (_, y) = arrays
    # cuDNN's derivatives are printed with the dimensions of the convolution that they differentiate.
    if instruction.custom_call.endswith("convBackwardFilter"):
        kernel, y = y, kernel
    elif instruction.custom_call.endswith("convBackwardInput"):
        x, y = y, x
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    assert labels, instruction.line
    window = re.search(r"window=\{([^}]*)\}", instruction.line)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = "".join(sorted(c for c in labels[3] if c.isdigit()))

    def space(shape: tuple[int, ...], label: str) -> list[int]:
        return [shape[label.index(axis)] for axis in axes]

    def along(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * len(axes)

    windows = [
        Window(int(stride), int(padding.split("_")[0]), int(input_dilation), int(kernel_dilation))
        for stride, padding, input_dilation, kernel_dilation in zip(
            along("stride", "1"), along("pad", "0_0"), along("lhs_dilate", "1"), along("rhs_dilate", "1"), strict=True
        )
    ]
    outputs = math.prod(y[labels[3].index(label)] for label in "bf")
    channels = kernel[labels[2].index("i")]
    inputs, taps, out = space(x, labels[1]), space(kernel, labels[2]), space(y, labels[3])
    return convolution_flops(outputs, channels, inputs, taps, out, windows)
