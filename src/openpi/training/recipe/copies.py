"""Modules of a user's own: which of them a recipe needs, and how copies of them run in their place.

A recipe's file is seldom alone: it imports robots' conventions from a file beside it. Both travel.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

# Attributes of a module that runs from a copy: what it was called when it was written, and all copies that came along.
_NAME, _FILES = "__openpi_module__", "__openpi_files__"
_running = threading.RLock()


def name_of(home: ModuleType) -> str:
    """What the module was called where it was written."""
    return getattr(home, _NAME, home.__name__)


@functools.cache
def text_of(file: Path) -> bytes:
    """What the file said when it was first asked for, soon after it was imported: a run takes days, and its author goes
    on editing.
    """
    return file.read_bytes()


def needed(home: ModuleType) -> dict[str, Path]:
    """Files by module: the module's, and those of what it imports from the folder that it is in."""
    files: dict[str, Path] = {}
    waiting = {name_of(home): home}
    while waiting:
        name, module = waiting.popitem()
        files |= getattr(module, _FILES, None) or {name: Path(inspect.getfile(module))}
        waiting |= {each: found for each, found in _imported(module).items() if each not in files}
    return files


@functools.cache
def _imported(home: ModuleType) -> dict[str, ModuleType]:
    """What a module imports of its author's own: what its folder has under that name."""
    file = Path(inspect.getfile(home)).resolve()
    root = file.parents[home.__name__.count(".") + (file.name == "__init__.py")]
    if root.name in ("site-packages", "dist-packages") or hasattr(home, _FILES):
        return {}
    found = {}
    for name in _names_of_imports(file, home.__package__ or ""):
        module, place = sys.modules.get(name), root / name.replace(".", "/")
        its_file = getattr(module, "__file__", None)
        if module is None or its_file is None or name.partition(".")[0] == "openpi":
            continue
        if Path(its_file).resolve() in (place.with_suffix(".py"), place / "__init__.py"):
            found[name] = module
    return found


def _names_of_imports(file: Path, package: str) -> Iterator[str]:
    """Every name that may be a module, with the packages around it."""
    for node in ast.walk(ast.parse(text_of(file))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def run(name: str, files: Mapping[str, Path]) -> ModuleType:
    """A module from its copy, which sees the others of the copies; those that are imported, if they say the same.

    Raises:
        ValueError: it has an error.
    """
    if all(_is_imported(each, file) for each, file in files.items()):
        return sys.modules[name]
    content = b"".join(each.encode() + b"\0" + files[each].read_bytes() for each in sorted(files))
    prefix = f"openpi_recipe_{hashlib.sha256(content).hexdigest()[:12]}"
    finder = _Copies(prefix, files)
    with _running, finder.found_by_name():
        return finder.run(name)


def _is_imported(name: str, file: Path) -> bool:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return loaded is not None and Path(loaded).exists() and Path(loaded).read_bytes() == file.read_bytes()


class _Copies(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds copies by the names that their originals had; in `sys.modules` they have names of their own, because
    checkpoints with other code under the same names may be served beside.
    """

    def __init__(self, prefix: str, files: Mapping[str, Path]) -> None:
        self._prefix, self._files = prefix, files

    def run(self, name: str) -> ModuleType:
        alias = f"{self._prefix}.{name}"
        if alias in sys.modules:  # perhaps it is running: imports may go in a circle
            return sys.modules[alias]
        file = self._files[name]
        logger.info("running the recipe's own code: %s (was %s)", file, name)
        spec = importlib.util.spec_from_file_location(alias, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        is_package = any(other.startswith(f"{name}.") for other in self._files)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        setattr(module, _NAME, name)
        setattr(module, _FILES, dict(self._files))
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[alias]
            if isinstance(error, Exception):
                lacks = isinstance(error, ModuleNotFoundError)
                fix = ". Install it, or set PYTHONPATH to the folder that it is in" if lacks else ""
                raise ValueError(f"{file} (was {name}) cannot be run: {type(error).__name__}: {error}{fix}") from error
            raise
        return module

    @contextlib.contextmanager
    def found_by_name(self) -> Iterator[None]:
        """While this lasts, imports give the copies."""
        names = {name.rsplit(".", i)[0] for name in self._files for i in range(name.count(".") + 1)}
        sys.modules.setdefault(self._prefix, ModuleType(self._prefix))  # imports look for the parents of names
        before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(before)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        name = self._original(fullname)
        is_package = any(other.startswith(f"{name}.") for other in self._files)
        return ModuleSpec(fullname, self, is_package=is_package) if is_package or name in self._files else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        name = self._original(spec.name)
        return self.run(name) if name in self._files else None  # a folder without a file of its own

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""

    def _original(self, name: str) -> str:
        """`from package import module` asks for what the package is called now."""
        return name.removeprefix(f"{self._prefix}.")
