"""How much memory a traced program needs while it runs, from shapes alone.

A model of what a compiler makes of it: element-wise work is fused into whoever uses the result, so only some values
become buffers: results of matrix products, loops, gathers and the like; and what those take in. A buffer lives from the
operation that makes it to the last that reads it, in the order of the program. Loops keep what they carry and stack,
besides the peak of one iteration. Compilers reorder and fuse differently, so this is an estimate; how good a one is in
`benchmarks/memory_plan.md`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Size = Callable[[Any], int]  # bytes of an abstract value on one device

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_LOOPS = ("scan", "while", "cond")
# Another look at the same bytes.
_VIEWS = frozenset(("reshape", "squeeze", "expand_dims", "copy", "optimization_barrier", "name", "stop_gradient"))
# Reads and writes whole arrays, and is not fused.
_BARRIERS = frozenset(
    (
        "dot_general",
        "conv_general_dilated",
        "gather",
        "scatter",
        "scatter-add",
        "scatter_add",
        "sort",
        "concatenate",
        "cumsum",
        "random_bits",
        "threefry2x32",
        *_LOOPS,
    )
)
# Compilers keep some operands of a layer's matrix products twice, transposed (benchmarks/memory_plan.md).
_LAYER_COPIES = 1.4
# Too expensive to compute again for each of several readers.
_EXPENSIVE = frozenset(("exp", "exp2", "tanh", "logistic", "log", "log1p", "erf", "pow", "sin", "cos", "tan"))


def peak_bytes(program: Any, size: Size) -> int:
    """Peak of the buffers that a `ClosedJaxpr` needs besides its arguments.

    Its results are taken to be written over donated arguments, as a train step's are.

    Args:
        size: bytes that an abstract value takes on one device.
    """
    return _Frame(program.jaxpr, size, is_whole=True).peak()


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many inputs of a `scan` are the same in each iteration, and how many after them are carried on; those that
    are left are sliced. Found by shapes: what the operation calls them differs between versions of JAX.
    """
    body = eqn.params["jaxpr"].jaxpr

    def num_alike(outer: list[Any], inner: list[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    num_carry = num_alike(eqn.outvars, body.outvars)
    return num_alike(eqn.invars, body.invars) - num_carry, num_carry


class _Frame:
    """One straight list of operations: a program, the body of a loop, or a branch.

    Attributes:
        eqns: with calls written out in place.
        roots: per value that is no buffer of its own, the buffers that have to be there to compute it.
    """

    def __init__(self, jaxpr: Any, size: Size, *, is_whole: bool = False, sliced: Iterable[Any] = ()) -> None:
        self.size = size
        self.eqns: list[Any] = []
        self._names: dict[Any, Any] = {}
        self._flatten(jaxpr)
        self.inputs = set(jaxpr.invars) | set(jaxpr.constvars)
        self.sliced = set(sliced)
        self.outputs = [] if is_whole else [self._name(v) for v in jaxpr.outvars if not _is_literal(v)]
        self._made_by = {v: eqn for eqn, _, outs in self.eqns for v in outs}
        self.buffers = self._buffers()

    def peak(self) -> int:
        """Bytes at the fullest moment; inputs belong to the caller."""
        first, last = self._lifetimes()
        starts: dict[int, list[Any]] = {}
        for value, at in first.items():
            starts.setdefault(at, []).append(value)
        live, fullest = 0, 0
        ends: dict[int, int] = {}
        for at, (eqn, _, _) in enumerate(self.eqns):
            in_place = eqn.primitive.name not in _BARRIERS or eqn.primitive.name in ("scan", "while")
            dying = ends.pop(at, 0)
            live -= dying if in_place else 0
            for value in starts.get(at, ()):
                live += self.size(value.aval)
                ends[last[value]] = ends.get(last[value], 0) + self.size(value.aval)
            fullest = max(fullest, live + self._inside(eqn))
            live -= ends.pop(at, 0) + (0 if in_place else dying)
        return fullest

    def _lifetimes(self) -> tuple[dict[Any, int], dict[Any, int]]:
        """Per buffer, the operation at which it appears, and the last that reads it."""
        roots: dict[Any, frozenset] = {}
        first: dict[Any, int] = {}
        last: dict[Any, int] = {}

        def roots_of(value: Any) -> frozenset:
            return roots.get(value, frozenset())

        for at, (eqn, ins, outs) in enumerate(self.eqns):
            needed: frozenset = frozenset().union(*map(roots_of, ins)) if ins else frozenset()
            for value in ins:
                if value in self.sliced and value in self.buffers and value not in first:
                    first[value] = at
                    roots[value] = frozenset((value,))
                    needed |= roots[value]
            makes_buffer = eqn.primitive.name in _BARRIERS
            for value in outs:
                if value in self.buffers:
                    first[value], last[value], roots[value] = at, at, frozenset((value,))
                    makes_buffer = True
                else:
                    roots[value] = needed
            if makes_buffer:
                last.update(dict.fromkeys(needed, at))
        for value in self.outputs:
            last.update(dict.fromkeys(roots_of(value), len(self.eqns) - 1))
        return first, last

    def _buffers(self) -> set[Any]:
        """Values that are written to memory."""
        buffers: set[Any] = set()
        num_readers = collections.Counter(value for _, ins, _ in self.eqns for value in set(ins))
        for eqn, ins, outs in self.eqns:
            name = eqn.primitive.name
            if name in _BARRIERS:
                buffers.update(outs)
                buffers.update(self._source(value) for value in ins)
            elif name.startswith(("reduce_", "arg")) or (name in _EXPENSIVE and num_readers[outs[0]] > 1):
                buffers.update(outs)
        buffers.update(self._source(value) for value in self.outputs)
        return buffers - (self.inputs - self.sliced)

    def _source(self, value: Any) -> Any:
        """Behind views."""
        while value in self._made_by and self._made_by[value].primitive.name in _VIEWS:
            inner = next((v for v in self._inputs_of(value)), None)
            if inner is None:
                break
            value = inner
        return value

    def _inputs_of(self, value: Any) -> list[Any]:
        return self._ins_by_out.get(value, [])

    def _inside(self, eqn: Any) -> int:
        """What a loop or a branch needs besides what goes in and comes out."""
        name, params = eqn.primitive.name, eqn.params
        if name in ("scan", "while"):
            body = params["jaxpr" if name == "scan" else "body_jaxpr"].jaxpr
            sliced = body.invars[sum(scan_sizes(eqn)) :] if name == "scan" else ()
            frame = _Frame(body, self.size, sliced=sliced)
            is_layer = all(eqn.primitive.name not in ("scan", "while") for eqn, _, _ in frame.eqns)
            return int(frame.peak() * (_LAYER_COPIES if is_layer else 1))
        if name == "cond":
            return max(_Frame(branch.jaxpr, self.size).peak() for branch in params["branches"])
        return 0

    # --- calls written out ------------------------------------------------------------------------------------

    def _flatten(self, jaxpr: Any) -> None:
        self._ins_by_out: dict[Any, list[Any]] = {}
        self._append(jaxpr, {})

    def _append(self, jaxpr: Any, names: Mapping[Any, Any]) -> dict[Any, Any]:
        """Adds the operations; returns what the program's variables are called here."""
        here = dict(names)
        for eqn in jaxpr.eqns:
            ins = [here.get(v, v) for v in eqn.invars if not _is_literal(v)]
            inner = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
            if eqn.primitive.name in _LOOPS or inner is None:
                outs = [_Value(v.aval) for v in eqn.outvars]
                self.eqns.append((eqn, ins, outs))
                self._ins_by_out.update(dict.fromkeys(outs, ins))
                here.update(zip(eqn.outvars, outs, strict=True))
                continue
            inner = getattr(inner, "jaxpr", inner)
            given = [None if _is_literal(v) else here.get(v, v) for v in eqn.invars]
            bound = {v: g for v, g in zip(inner.invars, given, strict=True) if g is not None}
            found = self._append(inner, bound)
            here.update({out: found.get(v, v) for out, v in zip(eqn.outvars, inner.outvars, strict=True)
                         if not _is_literal(v)})  # fmt: skip
        self._names.update(here)
        return here

    def _name(self, variable: Any) -> Any:
        return self._names.get(variable, variable)


class _Value:
    """A result of one operation, of which a called program may have many."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def plain_size(aval: Any) -> int:
    """Bytes of an abstract value that is not split."""
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 8)
    return math.prod(getattr(aval, "shape", ())) * itemsize
