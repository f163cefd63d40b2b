"""The code of a user's own that a recipe names, with what it imports: copied beside the checkpoint, and run from there.

`sources` in `recipe.json` maps modules to the copies. A copy runs when the folder was made on this machine, or when
whoever downloaded it says so with `--trust-code`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from openpi.shared.downloaded import is_downloaded
from openpi.training.recipe import copies

# Set by `--trust-code` of every command; workers and further processes of a run inherit it.
TRUST_VARIABLE = "OPENPI_TRUST_CODE"

_FILE_NAME = re.compile(r"recipe_source(_[1-9]\d{0,2})?\.py")
_MAX_SOURCE_BYTES = 2**20


def is_code_trusted() -> bool:
    """Whether code beside a downloaded checkpoint may run."""
    return os.environ.get(TRUST_VARIABLE, "0") not in ("", "0")


class Collected:
    """Files that the values of a recipe come from, found while it is written."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}

    def name(self, value: object, field: str) -> str:
        """`module:QualName` of a class or function, after checking that it leads back to it; `module:lambda ...` of a
        lambda that can be made again from what it says.

        Raises:
            ValueError: it does not.
        """
        module, name = str(getattr(value, "__module__", None)), getattr(value, "__qualname__", "<unnamed>")
        home = sys.modules.get(module) if module != "__main__" else None
        if module == "__main__":
            raise ValueError(f"{field} holds {name} of a script; move it to a file that can be imported")
        if home is not None and (text := _text_of_lambda(value, home)) is not None:
            name = text
        elif "<" in name:
            raise ValueError(
                f"{field} holds {name}, which has no import path; define a function at the top level of the recipe's "
                "file and name it instead"
            )
        elif home is None or _look_up(home, name) is not value:
            raise ValueError(f"{field} holds {name}, but '{name}' of {module} is something else; give it another name")
        written = copies.name_of(home)
        self._files |= {written: Path(inspect.getfile(home))} | copies.needed(home)
        return f"{written}:{name}"

    def copy_to(self, directory: Path) -> dict[str, str]:
        """Copies the files, with those of the user's own that they import; returns their names by module."""
        names = {}
        for i, (module, file) in enumerate(self._files.items()):
            names[module] = "recipe_source.py" if i == 0 else f"recipe_source_{i + 1}.py"
            (directory / names[module]).write_bytes(copies.text_of(file))
        return names


class OwnCode:
    """The modules beside a checkpoint."""

    def __init__(self, directory: Path, sources: Mapping[str, str]) -> None:
        """
        Raises:
            ValueError: `sources` names other files than a checkpoint's writer does, or they came from elsewhere and
                nobody vouches for them.
        """
        self._files = {module: _checked_file(directory, module, name) for module, name in sources.items()}
        if self._files and is_downloaded(directory) and not is_code_trusted():
            raise ValueError(
                f"{directory} was downloaded and brings code of its own ({', '.join(sources.values())}), which would "
                f"run on this machine. Read it, and if you trust it, pass --trust-code (or set {TRUST_VARIABLE}=1); or "
                "name a recipe of your own with --config"
            )

    def names(self) -> list[str]:
        """Of the modules."""
        return list(self._files)

    def find(self, name: str) -> object:
        """The class or function called `module:QualName`; None = it has no such module.

        Raises:
            ValueError: the module lacks it, or cannot be imported.
        """
        module, _, qualname = name.partition(":")
        if module not in self._files:
            return None
        home = copies.run(module, self._files)
        if qualname.startswith(("lambda ", "lambda:")):
            return _lambda_of(qualname, home, self._files[module])
        value = _look_up(home, qualname)
        if getattr(value, "__module__", None) != home.__name__ or getattr(value, "__qualname__", None) != qualname:
            raise ValueError(f"{self._files[module]} defines no class or function '{qualname}'")
        return value


def _look_up(home: ModuleType, qualname: str) -> object:
    return functools.reduce(lambda value, part: getattr(value, part, None), qualname.split("."), home)


def _text_of_lambda(value: object, home: ModuleType) -> str | None:
    """Of one in the module's file that knows nothing but the module's names; None for anything else."""
    if not isinstance(value, FunctionType) or value.__name__ != "<lambda>":
        return None
    if value.__closure__ or value.__defaults__ or value.__kwdefaults__:
        return None
    at = _place_of(value.__code__)
    texts = {text for text, code in _lambdas(Path(inspect.getfile(home))) if _place_of(code) == at}
    return texts.pop() if len(texts) == 1 else None


def _place_of(code: CodeType) -> tuple[object, ...]:
    """Line, and what is named there: of a file's lambdas, those that share it are seldom two."""
    values = [value for value in code.co_consts if not isinstance(value, CodeType)]
    return code.co_firstlineno, code.co_names, code.co_varnames, values


def _lambda_of(text: str, home: ModuleType, file: Path) -> object:
    """The one that says so in the module's file. What is asked for is compared with that, and never run."""
    for found, code in _lambdas(file):
        if found == text:
            return FunctionType(code, vars(home), "<lambda>")
    raise ValueError(f"{file} has no '{text[:120]}'")


def _lambdas(file: Path) -> Iterator[tuple[str, CodeType]]:
    """What each says, and its code."""
    for node in ast.walk(ast.parse(copies.text_of(file))):
        if isinstance(node, ast.Lambda):
            whole = compile(ast.Expression(node), str(file), "eval", dont_inherit=True)
            yield ast.unparse(node), next(part for part in reversed(whole.co_consts) if isinstance(part, CodeType))


def _checked_file(directory: Path, module: str, name: str) -> Path:
    """A source's path.

    Raises:
        ValueError: not of the form that the writer of checkpoints gives it, or it leads out of the folder.
    """
    if not (isinstance(name, str) and _FILE_NAME.fullmatch(name)):
        raise ValueError(f"{directory}: sources of recipe.json names {str(name)[:80]!r}; expected recipe_source.py")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{directory}: sources of recipe.json has the module {module[:80]!r}; expected a dotted name")
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{file} is missing from the checkpoint; recipe.json names it as the code of '{module}'")
    if not any(file.resolve().is_relative_to(place) for place in _own_places(directory.resolve())):
        raise ValueError(f"{file} is a link to {file.resolve()}, out of the checkpoint's folder; copy the file there")
    if file.stat().st_size > _MAX_SOURCE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; expected a recipe's code of 1 MiB at most")
    return file


def _own_places(directory: Path) -> list[Path]:
    """The folder; in the hub's cache, where all files are links, those of the same repository, too."""
    snapshots = [folder for folder in directory.parents if folder.name == "snapshots"]
    return [directory, *(folder.parent / "blobs" for folder in snapshots)]
