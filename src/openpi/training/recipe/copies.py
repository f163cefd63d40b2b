"""Modules of a user's own: which of them a recipe needs, and how copies of them run in their place.

A recipe's file is seldom alone: it imports robots' conventions from a file beside it. Both travel.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType

from openpi.shared import worker_process

logger = logging.getLogger(__name__)

# Attributes of a module that runs from a copy: what it was called when it was written, and all copies that came along.
_NAME, _FILES = "__openpi_module__", "__openpi_files__"
# What a loaded submodule is called where nothing asks for it by a name.
_UNUSED = "_openpi_loaded"


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

    Copies have names of their own in `sys.modules`, below a package for each set of them, because checkpoints with
    other code under the same names may be served beside.

    Raises:
        ValueError: it has an error.
    """
    if all(_is_imported(each, file) for each, file in files.items()):
        return sys.modules[name]
    content = b"".join(each.encode() + b"\0" + files[each].read_bytes() for each in sorted(files))
    package = f"openpi_recipe_{hashlib.sha256(content).hexdigest()[:12]}"
    if package not in sys.modules:
        worker_process.add_finder(_Copies(package, dict(files)))
    try:
        return importlib.import_module(f"{package}.{name}")
    except Exception as error:
        lacks = isinstance(error, ModuleNotFoundError)
        fix = ". Install it, or set PYTHONPATH to the folder that it is in" if lacks else ""
        raise ValueError(f"{files[name]} (was {name}) cannot be run: {type(error).__name__}: {error}{fix}") from error


def _is_imported(name: str, file: Path) -> bool:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return loaded is not None and Path(loaded).exists() and Path(loaded).read_bytes() == file.read_bytes()


class _Copies(importlib.abc.MetaPathFinder):
    """Finds the copies of one set below their package."""

    def __init__(self, package: str, files: dict[str, Path]) -> None:
        self._package, self._files = package, files
        self._folders = {name.rsplit(".", i)[0] for name in files for i in range(1, name.count(".") + 1)}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname == self._package:
            return ModuleSpec(fullname, None, is_package=True)
        name = fullname.removeprefix(f"{self._package}.")
        if name in self._files and name != fullname:
            loader = _Copy(fullname, name, self._package, self._files)
            spec = importlib.util.spec_from_loader(fullname, loader)
            assert spec is not None
            spec.submodule_search_locations = [] if name in self._folders else None  # nowhere but here
            return spec
        return ModuleSpec(fullname, None, is_package=True) if name in self._folders and name != fullname else None


class _Copy(importlib.abc.SourceLoader):
    """One of them, whose imports of the others lead to copies."""

    def __init__(self, fullname: str, name: str, package: str, files: dict[str, Path]) -> None:
        self._fullname, self._name, self._package, self._files = fullname, name, package, files

    def get_filename(self, fullname: str) -> str:
        del fullname
        return str(self._files[self._name])

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def source_to_code(self, data: bytes, path: str) -> CodeType:  # pyright: ignore[reportIncompatibleMethodOverride]
        logger.info("running the recipe's own code: %s (was %s)", path, self._name)
        tree = _Redirected(self._package, self._files).visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _NAME, self._name)
        setattr(module, _FILES, self._files)
        super().exec_module(module)


class _Redirected(ast.NodeTransformer):
    """Import statements, with those of copies below their package; relative ones are there by themselves."""

    def __init__(self, package: str, files: Mapping[str, Path]) -> None:
        self._package = package
        self._tops = {name.partition(".")[0] for name in files}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if not node.level and node.module and node.module.partition(".")[0] in self._tops:
            node.module = f"{self._package}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        statements: list[ast.stmt] = []
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if top not in self._tops:
                statements.append(ast.Import([alias]))
            elif alias.asname is None:  # `import a.b` loads a.b, and names a
                statements += [ast.Import([ast.alias(f"{self._package}.{alias.name}", _UNUSED)])] if rest else []
                statements.append(ast.ImportFrom(self._package, [ast.alias(top)], 0))
            else:
                statements.append(ast.Import([ast.alias(f"{self._package}.{alias.name}", alias.asname)]))
        return [ast.copy_location(statement, node) for statement in statements]
