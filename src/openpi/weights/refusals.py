"""Weights that would load and be another policy: of another family, with parts that nobody applies, as integers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from openpi.weights import spelling
from openpi.weights.compare import LoadReport
from openpi.weights.names import Row
from openpi.weights.stored import ArrayWeights, TensorWeights

_QUANTISED = "If the file is quantised, convert it back to bfloat16 or float32 with the tool that made it"


def refuse_strangers(table: Sequence[Row], found: Collection[str], shown: Collection[str], source: str) -> None:
    """Weights of another family, or of none; the names say what is there, its path does not.

    Args:
        found: names of the table's kind, released ones or paths of the tree.
        shown: those in the file.
    """
    wanted = [row.released for row in table] + [row.tree for row in table]
    if table and not set(wanted) & set(found):
        raise ValueError(
            f"{source} holds no weights of these models: it has {_three(shown)}; expected names such as "
            f"{_three([row.released for row in table])}, or arrays such as {_three([row.tree for row in table])}"
        )
    family, expected = spelling.family(found), spelling.family({row.released for row in table})
    if family is not None and expected is not None and family != expected:
        alone = " (or PaliGemma alone: no name of an action expert)" if family == "pi0-FAST" else ""
        raise ValueError(
            f"{source} holds {family}{alone}, and the recipe's model is {expected}; name another recipe (--config)"
        )


def _three(listed: Collection[str]) -> str:
    return ", ".join(list(dict.fromkeys(listed))[:3]) or "nothing"


def refuse_adapters(report: LoadReport) -> None:
    adapters = [name for name in report.unused if "lora" in name]
    if adapters:
        raise ValueError(
            f"{report.source} has adapters that the model has not, such as {adapters[0]}: without them it is another "
            "policy. Name the LoRA recipe that it was trained with, or merge them first: `openpi export --merge`"
        )


def refuse_integers(weights: ArrayWeights | TensorWeights, source: str) -> None:
    for row in weights.table:
        if weights.has(row) and (dtype := weights.dtype(row)).kind in "iub":
            raise ValueError(f"{source} has '{row.released}' as {dtype}; expected floating point numbers. {_QUANTISED}")


def refuse_companions(read: Collection[str], unused: Iterable[str], source: str) -> None:
    """Tensors of modules that the model has, which it would compute without: scales of a quantisation, a bias.

    Args:
        read, unused: names in the file.
    """
    modules = {name.rpartition(".")[0] for name in read}.union(read)
    for name in unused:
        if name.rpartition(".")[0] in modules and "lora" not in name:
            raise ValueError(
                f"{source} has '{name}' beside what the model reads of this module, and the model does not apply it: "
                f"it would be another policy. {_QUANTISED}"
            )
