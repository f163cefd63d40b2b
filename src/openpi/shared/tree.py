"""Parameter trees as flat `{'a/b/c': leaf}` maps, and how two of them differ."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Tree: TypeAlias = Mapping[str, Any]
"""Nested mappings by name, to be read: a sample, a batch, inputs of a model, parameters. The leaves are arrays."""

Params: TypeAlias = dict[str, Any]
"""Nested dicts by name whose leaves are the arrays of a model, or what else there is once for each of them."""

Leaves: TypeAlias = dict[str, Any]
"""The leaves of a tree by their '/'-joined paths."""


def flatten(tree: Mapping[str, object]) -> Leaves:
    """Nested dicts -> one dict keyed by '/'-joined paths; of two leaves with one path, the later."""
    flat: dict[str, Any] = {}
    _collect(tree, "", flat)
    return flat


def check_paths_differ(tree: Mapping[str, object]) -> None:
    """Raises ValueError where two values have one path, as of `{"a/b": 1, "a": {"b": 2}}`: readers of what somebody
    else has sent would take one or the other. One value under both names is fine.
    """
    _check_apart(tree, "", {})


def unflatten(flat: Mapping[str, object]) -> Params:
    """Inverse of `flatten`.

    Raises:
        ValueError: a path leads through a leaf, as of `{"a": 1, "a/b": 2}`.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"'{path[:200]}' lies within a value, '{parent[:200]}'")
        node[name] = leaf
    return tree


def differences(expected: Tree, found: Tree) -> list[str]:
    """One line per leaf that is missing, unexpected or of another shape; leaves need only a `shape`."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            lines.append(f"{path}: missing, expected shape {tuple(expected[path].shape)}")
        elif path not in expected:
            lines.append(f"{path}: unexpected, shape {tuple(found[path].shape)}")
        elif tuple(expected[path].shape) != tuple(found[path].shape):
            lines.append(f"{path}: shape {tuple(found[path].shape)}, expected {tuple(expected[path].shape)}")
    return lines


def _collect(tree: Mapping[str, object], prefix: str, flat: Leaves) -> None:
    """A loop without generators: every request passes here several times."""
    for key, value in tree.items():
        if isinstance(value, (dict, Mapping)):  # asked of a dict first, it is answered at once
            _collect(value, f"{prefix}{key}/", flat)
        else:
            flat[prefix + key] = value


def _check_apart(tree: Mapping[str, object], prefix: str, found: Leaves) -> None:
    for key, value in tree.items():
        path = prefix + key
        if isinstance(value, (dict, Mapping)):
            _check_apart(value, f"{path}/", found)
        elif found.setdefault(path, value) is not value:
            raise ValueError(f"'{path}' is there twice, in full and within a map; send it once")
