"""Conditions on episodes, as text: `length < 50 or max(abs(action["shoulder"])) > 2.5 or "cup" in task`.

A text from a recipe, a command line or a file is data: it is parsed, compared with a list of what may stand in it, and
worked out here. Nothing in it is ever run.

    length, seconds, episode, task      of an episode: frames, duration, number, and the text of its first frame
    action, observation.state           a column, every frame and dimension of it; column["a/b"] for other names
    action["shoulder"], action[1]       one dimension, by name or number
    min max mean std any all count      of all frames and dimensions: one value
    first last                          of the first or last frame
    abs diff                            of each; `diff` is the change from frame to frame
    + - * /   < <= > >= == !=   in, not in   and, or, not
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi.shared.errors import closest_name, listed

OF_EPISODES = ("length", "seconds", "episode", "task")
_MAX_CHARS = 2000
_MAX_DEPTH = 100  # of terms within each other
_COLUMN = "column"
_REDUCTIONS: Mapping[str, Callable[[np.ndarray], Any]] = {
    "min": np.min,
    "max": np.max,
    "mean": np.mean,
    "std": np.std,
    "first": lambda values: values[:1] if values.shape[1] > 1 else values[0, 0],
    "last": lambda values: values[-1:] if values.shape[1] > 1 else values[-1, 0],
    "any": np.any,
    "all": np.all,
    "count": np.count_nonzero,
}
_OF_NOTHING: Mapping[str, Any] = {"any": False, "all": True, "count": 0}
_EACH: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": np.abs,
    "diff": lambda values: np.diff(values, axis=0),
}
_FUNCTIONS = (*_REDUCTIONS, *_EACH)
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MEMBERSHIP = (ast.In, ast.NotIn)


@dataclass(frozen=True)
class EpisodeValues:
    """What a condition is asked about.

    Attributes:
        of_episode: a value for each of `OF_EPISODES`.
        columns: by name, [n, ...], one row per frame.
        names: by column, of its dimensions.
    """

    of_episode: Mapping[str, float | str]
    columns: Mapping[str, np.ndarray]
    names: Mapping[str, Sequence[str]]


class EpisodeCondition:
    """One condition.

    Attributes:
        text: as it was written.
        columns: that it reads, besides `OF_EPISODES`.
        reads_frames: whether it asks for what only the tables of frames say: these columns, and the task.
    Raises:
        ValueError: it is no condition; the message says which part, and what may stand there.
    """

    def __init__(self, text: str):
        self.text = text
        if len(text) > _MAX_CHARS:
            raise ValueError(f"a condition of {len(text)} characters; expected at most {_MAX_CHARS}")
        try:
            self._root = ast.parse(text.strip(), mode="eval").body
            if _depth(self._root) > _MAX_DEPTH:
                raise RecursionError
            names = set(self._names(self._root))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, _RefusedError):
                raise
            reason = getattr(error, "msg", None) or "it is nested too deeply"
            raise ValueError(
                f"the condition {_shortened(text)} cannot be read: {reason}; expected such as 'length < 50'"
            ) from None
        self.columns = frozenset(names - set(OF_EPISODES))
        self.reads_frames = bool(self.columns) or "task" in names

    def __call__(self, episode: EpisodeValues) -> bool:
        """Whether the episode is meant.

        Raises:
            KeyError: no such dimension.
            ValueError: values that cannot be compared, or a result that is not yes or no.
        """
        with np.errstate(all="ignore"):  # 0 / 0 is NaN, which is in no relation to anything
            found = self._value(self._root, episode)
        if isinstance(found, np.ndarray) and found.ndim:
            raise self._refused(self._root, "has a value for each frame or dimension; say any(...) or all(...) of it")
        if not isinstance(found, bool | np.bool_):
            raise self._refused(self._root, f"is {found!r}, neither true nor false; compare it with something")
        return bool(found)

    # --- what may stand in it ---------------------------------------------------------------------------------

    def _names(self, node: ast.expr) -> Iterator[str]:
        """All that it reads; refuses what is not listed."""
        match node:
            case ast.Name() | ast.Attribute():
                yield self._dotted(node)
            case ast.Subscript():
                self._check_subscript(node)
                yield self._column_of(node)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
                yield from self._names(argument)
            case ast.BoolOp():
                for value in node.values:
                    yield from self._names(value)
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd()):
                yield from self._names(node.operand)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                yield from (*self._names(node.left), *self._names(node.right))
            case ast.Compare():
                yield from self._names_of_comparison(node)
            case ast.Constant(value=bool() | int() | float() | str()):
                if isinstance(node.value, int) and abs(node.value) > 2**53:
                    raise self._refused(node, "is too large a number")
            case _:
                raise self._refused(node, f"is not for conditions; functions are {', '.join(_FUNCTIONS)} of one value")

    def _names_of_comparison(self, node: ast.Compare) -> Iterator[str]:
        yield from self._names(node.left)
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, _MEMBERSHIP) and isinstance(right, ast.List | ast.Tuple):
                for item in right.elts:
                    yield from self._names(item)
            elif isinstance(op, _MEMBERSHIP) or type(op) in _OPERATORS:
                yield from self._names(right)
            else:
                raise self._refused(node, "compares in a way that is not for conditions; use == or !=")

    def _check_subscript(self, node: ast.Subscript) -> None:
        key = _index(node)
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise self._refused(node, "names no dimension; write its name or number, as action[1]")
        if isinstance(node.value, ast.Subscript):
            self._check_subscript(node.value)

    def _column_of(self, node: ast.expr) -> str:
        if isinstance(node, ast.Subscript):
            if isinstance(node.value, ast.Name) and node.value.id == _COLUMN and isinstance(_index(node), str):
                return str(_index(node))
            if isinstance(node.value, ast.Subscript) and not _is_column_call(node.value):
                raise self._refused(node, "has two dimensions; one is enough")
            return self._column_of(node.value)
        return self._dotted(node)

    def _dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            return node.id
        raise self._refused(node, "is no name of a column")

    # --- its value --------------------------------------------------------------------------------------------

    def _value(self, node: ast.expr, episode: EpisodeValues) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [self._value(item, episode) for item in node.elts]
            case ast.Name() | ast.Attribute() | ast.Subscript():
                return self._looked_up(node, episode)
            case ast.Call(func=ast.Name(id=name)):
                return self._applied(name, node.args[0], episode)
            case ast.BoolOp():
                combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                parts = [self._truth(value, episode) for value in node.values]
                return self._tried(node, lambda: combine.reduce(np.broadcast_arrays(*parts)))
            case ast.UnaryOp(op=ast.Not()):
                return np.logical_not(self._truth(node.operand, episode))
            case ast.UnaryOp():
                value = self._number(node.operand, episode)
                return -value if isinstance(node.op, ast.USub) else value
            case ast.BinOp():
                left, right = self._number(node.left, episode), self._number(node.right, episode)
                return self._tried(node, lambda: _OPERATORS[type(node.op)](left, right))
            case ast.Compare():
                return self._compared(node, episode)
        raise AssertionError(node)

    def _looked_up(self, node: ast.expr, episode: EpisodeValues) -> object:
        name = self._column_of(node)
        if name in OF_EPISODES and not isinstance(node, ast.Subscript):
            return episode.of_episode[name]
        values = episode.columns[name]
        values = values.reshape(len(values), -1)
        if not isinstance(node, ast.Subscript) or _is_column_call(node):
            return values
        key, names = _index(node), list(episode.names.get(name, ()))
        if isinstance(key, str):
            if key not in names:
                close = closest_name(key, names)
                meant = f" Did you mean '{close}'?" if close else ""
                raise KeyError(f"'{name}' has no dimension '{key}'; it has {listed(names)}.{meant}")
            key = names.index(key)
        if not -values.shape[1] <= key < values.shape[1]:
            raise KeyError(f"'{name}' has {values.shape[1]} dimensions, so none with the number {key}")
        return values[:, key, None]

    def _applied(self, name: str, argument: ast.expr, episode: EpisodeValues) -> object:
        value = self._value(argument, episode)
        if name == "abs" and not isinstance(value, np.ndarray) and not isinstance(value, str | list):
            return abs(value)
        if not isinstance(value, np.ndarray) or value.ndim != 2:
            raise self._refused(argument, f"has one value, and {name}(...) is of all the frames of a column")
        if name in _EACH:
            return self._tried(argument, lambda: _EACH[name](value))
        if not value.size:  # of a single frame there is no change
            return _OF_NOTHING.get(name, np.nan)
        return self._tried(argument, lambda: _REDUCTIONS[name](value))

    def _compared(self, node: ast.Compare, episode: EpisodeValues) -> object:
        left, results = self._value(node.left, episode), []
        for op, side in zip(node.ops, node.comparators, strict=True):
            right = self._value(side, episode)
            results.append(self._tried(node, _comparison(op, left, right)))
            left = right
        return self._tried(node, lambda: np.logical_and.reduce(np.broadcast_arrays(*results)))

    def _number(self, node: ast.expr, episode: EpisodeValues) -> np.ndarray:
        value = self._value(node, episode)
        if isinstance(value, str | list) or np.asarray(value).dtype.kind not in "biuf":
            raise self._refused(node, "is no number")
        return np.asarray(value, np.float64)

    def _truth(self, node: ast.expr, episode: EpisodeValues) -> np.ndarray:
        value = np.asarray(self._value(node, episode))
        if value.dtype.kind != "b":
            raise self._refused(node, "is neither true nor false; compare it with something")
        return value

    def _tried(self, node: ast.expr, work: Callable[[], object]) -> object:
        try:
            return work()
        except (TypeError, ValueError) as error:
            raise self._refused(node, f"cannot be worked out ({error})") from None

    def _refused(self, node: ast.expr, why: str) -> _RefusedError:
        part = ast.get_source_segment(self.text.strip(), node) or self.text
        return _RefusedError(f"the condition {_shortened(self.text)}: {_shortened(part)} {why}")


class _RefusedError(ValueError):
    """Says which part of a condition, and why."""


def _comparison(op: ast.cmpop, left: Any, right: Any) -> Callable[[], object]:
    if not isinstance(op, _MEMBERSHIP):
        return lambda: _OPERATORS[type(op)](left, right)
    if isinstance(right, str):
        return lambda: (left in right) is isinstance(op, ast.In)
    return lambda: np.isin(left, right, invert=isinstance(op, ast.NotIn))


def _depth(node: ast.AST) -> int:
    levels = 0
    level = [node]
    while level:
        level = [child for each in level for child in ast.iter_child_nodes(each)]
        levels += 1
    return levels


def _index(node: ast.Subscript) -> Any:
    """The name or number in the brackets."""
    inside = node.slice
    if isinstance(inside, ast.UnaryOp) and isinstance(inside.op, ast.USub) and isinstance(inside.operand, ast.Constant):
        return -inside.operand.value if isinstance(inside.operand.value, int) else None
    return inside.value if isinstance(inside, ast.Constant) else None


def _is_column_call(node: ast.Subscript) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == _COLUMN


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return f"'{text if len(text) <= 80 else text[:77] + '...'}'"
