"""Reading a compiled program's text: its collectives, matrix products and largest buffers.

Loops are multiplied out: what stands in a loop of 36 layers counts 36 times. A loop whose number
of turns is decided at run time (the loss's, over chunks) counts as often as the caller says.
"""

import math
import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16}  # of others: the number in their name
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NO_TRAFFIC = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "iota",
    "conditional",
    "call",
    "after-all",
    "partition-id",
)
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array of a program; `kind` as HLO names it. near: it lies in the chip's own memory."""

    kind: str
    sizes: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.kind)
        bits = BITS.get(self.kind) or (int(digits.group()) if digits else 0)
        return math.prod(self.sizes) * bits // 8


class Op(NamedTuple):
    """One line of a computation. shapes: of its results; rest: all behind the operands."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str


class Collective(NamedTuple):
    """A collective: how often a step runs it, over how many devices, and the whole array's bytes.

    group: the first of its groups, by place in the mesh. wire: an all-reduce counts twice (it is a
    scatter and a gather).
    """

    kind: str
    times: int
    group: tuple[int, ...]
    bytes: int
    in_loop: bool
    name: str

    @property
    def wire(self) -> int:
        return self.bytes * self.times * (2 if self.kind == "all-reduce" else 1)


class Program:
    """A program's computations, and how often each runs.

    Args:
      text: `compiled.as_text()`.
      unknown_turns: of loops whose number of turns the text does not tell.
    """

    def __init__(self, text: str, unknown_turns: int = 1):
        self.computations: dict[str, list[Op]] = {}
        self.entry = ""
        self.unknown_turns = unknown_turns
        here: list[Op] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                here = self.computations.setdefault(header.group(2), [])
                self.entry = header.group(2) if header.group(1) else self.entry
            elif line.rstrip() == "}":  # a kernel's attributes may begin a line with it
                here = None
            elif here is not None and (found := _LINE.match(line)):
                here.append(_op(found.group(1), found.group(2)))
        self.turns = self._count()

    def _count(self) -> dict[str, tuple[int, bool]]:
        """Of each computation that runs: how often, and whether in a loop."""
        turns: dict[str, tuple[int, bool]] = {}

        def visit(name: str, times: int, looped: bool) -> None:
            before = turns.get(name, (0, False))
            turns[name] = (before[0] + times, before[1] or looped)
            for op in self.computations.get(name, ()):
                if op.kind.endswith(("-done", "-update")):  # its start has been counted
                    continue
                loop = op.kind == "while"
                more = self._turns_of(op) if loop else 1
                for callee in _callees(op):
                    visit(callee, times * more, looped or loop)

        visit(self.entry, 1, False)
        return turns

    def _turns_of(self, loop: Op) -> int:
        """Turns of a `while`: told by the compiler, or by a comparison with a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        ops = {op.name: op for op in self.computations.get(condition.group(1), ())}
        for op in ops.values():
            if op.kind == "compare" and "direction=LT" in op.rest:
                limit = ops.get(op.operands[1])
                if limit is not None and limit.kind == "constant":
                    return int(limit.operands[0])
        return self.unknown_turns

    def running(self):
        """(op, its computation's ops by name, times, in a loop) of everything that runs."""
        for name, (times, looped) in self.turns.items():
            ops = {op.name: op for op in self.computations.get(name, ())}
            for op in ops.values():
                yield op, ops, times, looped

    def collectives(self) -> list[Collective]:
        found = []
        for op, ops, times, looped in self.running():
            kind = op.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            given = sum(s.bytes for o in op.operands if o in ops for s in ops[o].shapes)
            group = first_group(op.rest)
            # What is gathered or scattered, whole: a start's results repeat its operands.
            size = given * len(group) if kind == "all-gather" else given
            found.append(Collective(kind, times, group, size, looped, op.name))
        return found

    def matmul_flops(self) -> float:
        """Floating point operations of matrix products (Pallas kernels are not seen)."""
        total = 0.0
        for op, ops, times, _ in self.running():
            operands = [ops[o].shapes[0] for o in op.operands[:2] if o in ops]
            if len(operands) < 2:
                continue
            if op.kind == "convolution":
                total += times * _convolution_flops(op, *operands)
            elif op.kind == "dot":
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
                inner = [operands[0].sizes[int(a)] for a in axes.group(1).split(",") if a]
                total += times * 2.0 * math.prod(op.shapes[0].sizes) * math.prod(inner)
        return total

    def hbm_bytes(self) -> float:
        """Bytes read and written by operations outside of fusions: more than must be, since what
        one leaves in the chip's own memory the next need not read again.

        Of what is sliced or updated in place only the slice counts.
        """
        inner = {
            c
            for ops in self.computations.values()
            for op in ops
            if op.kind
            in (
                "fusion",
                "reduce",
                "sort",
                "all-reduce",
                "reduce-scatter",
                "scatter",
                "custom-call",
            )
            for c in _callees(op)
        }
        total = 0.0
        for name, (times, _) in self.turns.items():
            if name in inner:
                continue
            ops = {op.name: op for op in self.computations.get(name, ())}
            total += times * sum(self._moved(op, ops) for op in ops.values())
        return total

    def _moved(self, op: Op, ops: dict[str, Op]) -> float:
        if op.kind in _NO_TRAFFIC or op.kind.endswith(("-done", "-update")):
            return 0.0
        results = sum(s.bytes for s in op.shapes if not s.near)
        operands = [ops[o].shapes[0] for o in op.operands if o in ops and ops[o].shapes]
        if op.kind in ("copy-start", "slice-start"):  # into the chip's own memory, or out of it
            return float(op.shapes[op.kind == "slice-start"].bytes)
        if op.kind == "dynamic-slice":
            return 2.0 * results
        if op.kind == "dynamic-update-slice":
            return 2.0 * operands[1].bytes
        inside = self.computations.get((_callees(op) or [""])[0], []) if op.kind == "fusion" else []
        sliced = _sliced(inside)
        total = 0.0
        for at, shape in enumerate(operands):
            total += 0 if shape.near else min(shape.bytes, sliced.get(at, shape.bytes))
        root = inside[-1] if inside else None
        if root is not None and root.kind == "dynamic-update-slice":
            named = {o.name: o for o in inside}
            return float(total + named[root.operands[1]].shapes[0].bytes)
        return float(total + results)

    def shapes(self) -> set[Shape]:
        """Every shape of every operation."""
        return {s for ops in self.computations.values() for op in ops for s in op.shapes}


def _matching(text: str, at: int) -> int:
    """Where the bracket that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _op(name: str, text: str) -> Op:
    end = _matching(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shapes = tuple(
        Shape(kind, tuple(int(n) for n in sizes.split(",") if n), "S(1)" in layout)
        for kind, sizes, layout in _ARRAY.findall(text[:end])
    )
    opening = text.find("(", end)
    closing = _matching(text, opening)
    inside = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
    return Op(name, text[end:opening].strip(), shapes, operands, text[closing + 1 :])


def _sliced(inside: list[Op]) -> dict[int, int]:
    """Of a fusion's parameters that are only sliced or updated: the bytes that are touched."""
    named = {op.name: op for op in inside}
    touched: dict[int, int] = {}
    for op in inside:
        if op.kind != "parameter":
            continue
        users = [u for u in inside if op.name in u.operands]
        sizes = []
        for user in users:
            if user.kind == "dynamic-slice":
                sizes.append(user.shapes[0].bytes)
            elif user.kind == "dynamic-update-slice" and user.operands[0] == op.name:
                sizes.append(named[user.operands[1]].shapes[0].bytes)
        if users and len(sizes) == len(users):
            touched[int(op.operands[0])] = sum(sizes)
    return touched


def _callees(op: Op) -> list[str]:
    names = _CALLS.findall(op.rest)
    for group in _BRANCHES.findall(op.rest):
        names += re.findall(r"[\w.\-]+", group)
    return names


def first_group(rest: str) -> tuple[int, ...]:
    """The first of a collective's groups of devices, in any of the three ways to write it."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return tuple(int(n) for n in listed.group(1).split(","))
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs.group(1)), int(pairs.group(2))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        sizes = [int(n) for n in iota.group(3).split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if iota.group(4):
            ids = ids.transpose([int(n) for n in iota.group(4).split(",")])
        return tuple(ids.reshape(int(iota.group(1)), -1)[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        axes = re.findall(r"'([^']+)'=(\d+)", mesh.group(1))
        inside = re.findall(r"'([^']+)'", mesh.group(2))
        ids = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
        return tuple(
            ids[tuple(slice(None) if a in inside else 0 for a, _ in axes)].ravel().tolist()
        )
    return (0,)


def _convolution_flops(op: Op, left: Shape, right: Shape) -> float:
    """2 · multiplications, those with padding left out (matrix products with batches come so)."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    a, b, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}
    total = 2.0 * left.sizes[a.index("b")] * right.sizes[b.index("i")] * right.sizes[b.index("o")]
    for d in (c for c in out if c.isdigit()):
        n = int(d)

        def field(name: str, default: str, n: int = n) -> str:
            return fields[name].split("x")[n] if name in fields else default

        size, taps = left.sizes[a.index(d)], right.sizes[b.index(d)]
        stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
        spread, reach = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
        total *= _pairs(op.shapes[0].sizes[out.index(d)], taps, size, stride, low, spread, reach)
    return total


def _pairs(outputs, taps, size, stride, low, spread, reach) -> int:
    """(output, tap) pairs of one axis that meet a number of the input, not padding."""
    count = 0
    for o in range(outputs):
        for t in range(taps):
            at = o * stride - low + t * reach
            count += at % spread == 0 and 0 <= at < (size - 1) * spread + 1
    return count
