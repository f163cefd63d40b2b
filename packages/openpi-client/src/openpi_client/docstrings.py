"""What the docstring of a dataclass says of its fields: the help of command lines that are made from one."""

import inspect
import re
from typing import Dict


def attributes(docstring: str) -> Dict[str, str]:
    """Name -> text, of the section `Attributes:`. From Python 3.13 on docstrings have lost their common indentation."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
