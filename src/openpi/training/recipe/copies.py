"""Modules of a user's own: which of them a recipe needs, and how copies of them run in their place.

A recipe's file is seldom alone: it imports robots' conventions from a file beside it. Both travel.
"""

from __future__ import annotations

import ast
import builtins
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
from typing import Any

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
    """Files by module: the module's, and those of what it imports, now or later, from the folder that it is in."""
    if hasattr(home, _FILES):
        return getattr(home, _FILES)
    file = Path(inspect.getfile(home)).resolve()
    root = file.parents[home.__name__.count(".") + (file.name == "__init__.py")]
    files: dict[str, Path] = {}
    waiting = {home.__name__: file}
    while waiting:
        name, file = waiting.popitem()
        files[name] = file
        if root.name not in ("site-packages", "dist-packages"):  # what is installed is not copied
            waiting |= {each: path for each, path in _imported(name, file, root).items() if each not in files}
    return files


@functools.cache
def _imported(name: str, file: Path, root: Path) -> dict[str, Path]:
    """What a module imports of its author's own: what is in the folder, unless the name means something else."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = {}
    try:
        names = set(_names_of_imports(file, package))
    except (SyntaxError, ImportError):  # of a file that has not been imported yet
        return {}
    for each in sorted(names):
        place = root / each.replace(".", "/")
        path = next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)
        loaded = getattr(sys.modules.get(each), "__file__", None)
        if path is not None and (each not in sys.modules or (loaded and Path(loaded).resolve() == path)):
            found[each] = path
    return {each: path for each, path in found.items() if each.partition(".")[0] != "openpi"}


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
    with _running:
        return _Copies(prefix, files).run(name)


def _is_imported(name: str, file: Path) -> bool:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return loaded is not None and Path(loaded).exists() and Path(loaded).read_bytes() == file.read_bytes()


class _Copies(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds copies by the names that their originals had; in `sys.modules` they have names of their own, because
    checkpoints with other code under the same names may be served beside.
    """

    def __init__(self, prefix: str, files: Mapping[str, Path]) -> None:
        self._prefix, self._files = prefix, files
        self._is_found = False

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
        # Asked by the import statements of this module alone, those that run later, too.
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import}
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

    def _import(self, *arguments: Any, **options: Any) -> ModuleType:
        """`import` as these modules know it."""
        with _running, contextlib.nullcontext() if self._is_found else self._found_by_name():
            return builtins.__import__(*arguments, **options)

    @contextlib.contextmanager
    def _found_by_name(self) -> Iterator[None]:
        names = {name.rsplit(".", i)[0] for name in self._files for i in range(name.count(".") + 1)}
        sys.modules.setdefault(self._prefix, ModuleType(self._prefix))  # imports look for the parents of names
        before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        sys.meta_path.insert(0, self)
        self._is_found = True
        try:
            yield
        finally:
            self._is_found = False
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
