"""What files call the tensors of `openpi.weights.names`.

A name may lie behind wrappers that trainers leave in it, be that of another version of the transformers library, or be
one of two that a tensor has. All of them are read as the released name, and all that mean one tensor are known, so that
none is silently preferred. Source: the checkpoint specification, sections 4.1 and 5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

LEROBOT_PREFIX = "model."
_P = "paligemma_with_expert.paligemma"
# The token table is also the output layer; files hold it under one of two names, or both.
TABLE = f"{_P}.lm_head.weight"
TABLE_ALIAS = f"{_P}.model.language_model.embed_tokens.weight"
# Written by the reference converter, and needed by its strict loader; nobody reads it, nor its second name.
UNUSED_TABLE = "paligemma_with_expert.gemma_expert.lm_head.weight"
_UNUSED = {UNUSED_TABLE, "paligemma_with_expert.gemma_expert.model.embed_tokens.weight"}

# Parts of names that wrappers of modules put there, at any place.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# Parts before a name: of LeRobot's policies and Lightning's modules, and of programs around a policy.
_LEADING = {"model", "policy"}


@dataclasses.dataclass(frozen=True)
class _Version:
    """A rule for names of another version of a library."""

    library: str
    pattern: re.Pattern[str]
    replacement: str


# https://github.com/huggingface/transformers/pull/37033, and what LeRobot does about it (its pull request 1415).
_BEFORE_4_52 = "transformers before 4.52"
# SiglipVisionModel lost a level: https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/4220 tells of it.
_FROM_5_8 = "transformers 5.8 and later"
_VERSIONS = [
    _Version(library, re.compile(pattern), replacement)
    for library, pattern, replacement in (
        (_BEFORE_4_52, rf"^{re.escape(_P)}\.language_model\.model\.", f"{_P}.model.language_model."),
        (_BEFORE_4_52, rf"^{re.escape(_P)}\.language_model\.lm_head\.", f"{_P}.lm_head."),
        (_BEFORE_4_52, rf"^{re.escape(_P)}\.(vision_tower|multi_modal_projector)\.", rf"{_P}.model.\1."),
        (_FROM_5_8, rf"^({re.escape(_P)}\.model\.vision_tower)\.(?!vision_model\.)", r"\1.vision_model."),
    )
]

_ADAPTERS_OF_PEFT = re.compile(r"\.lora_[AB]\.|\.base_layer\.")

# Names that only one family has, in the released layout, by our modules, and as paths of the published tree.
_EXPERT = r"(.*gemma_expert\.model\..*|.*experts\.1\..*)"
_MARKS = {
    "pi0": re.compile(rf"state_proj[./]|action_time_mlp_(in|out)[./]|{_EXPERT}norm\.weight$|.*norm_1/scale$"),
    "pi0.5": re.compile(rf"time_mlp_(in|out)[./]|{_EXPERT}norm\.dense\.|.*norm_1/Dense_0/"),
}
_FLOW = re.compile(r"action_(in|out)_proj[./]|.*gemma_expert\.|.*experts\.1\.|.*(_einsum_1|mlp_1)/")
_LANGUAGE = re.compile(rf"{re.escape(_P)}\.|language\.|PaliGemma/llm/")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the names of a file are read.

    Attributes:
        names: released name, or one that no model has -> the names in the file that mean it; usually one.
        remarks: what was taken off, or is of another version, a sentence each.
    """

    names: Mapping[str, Sequence[str]]
    remarks: Sequence[str] = ()

    @classmethod
    def of(cls, stored: Iterable[str], by_module: Mapping[str, str]) -> Spelling:
        """
        Args:
            by_module: name in our PyTorch modules -> released name.
        """
        names: dict[str, list[str]] = {}
        wrappers: dict[str, None] = {}
        versions: dict[str, None] = {}
        for name in stored:
            bare, taken_off = _unwrapped(name)
            wrappers |= dict.fromkeys(taken_off)
            released, library = _of_now(bare)
            versions |= {} if library is None else {library: None}
            names.setdefault(by_module.get(released, released), []).append(name)
        remarks = [
            f"the names have '{prefix}' in them ({source}), which is taken off" for prefix, source in _said(wrappers)
        ]
        remarks += [f"the names are those of {library}; they are read as today's" for library in versions]
        return cls(names, remarks)


def unwrapped(name: str) -> str:
    """Without the parts that wrappers of modules put into it; LeRobot's prefix stays."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(name: str) -> tuple[str, list[str]]:
    """The bare name, and the parts that were taken off, of which one `model` is LeRobot's layout and not told."""
    parts = name.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    taken_off = [part for part in parts if part in _WRAPPERS]
    depth = next((i for i, part in enumerate(kept) if part not in _LEADING), 0)
    leading = kept[:depth]
    return ".".join(kept[depth:]), taken_off + (leading if leading != ["model"] else [])


def _said(parts: Iterable[str]) -> list[tuple[str, str]]:
    return [(f"{part}.", _WRAPPERS.get(part, "a module around the model")) for part in parts]


def _of_now(name: str) -> tuple[str, str | None]:
    """The released name of a bare one, and the version of a library that calls it otherwise."""
    found = None
    for version in _VERSIONS:
        name, count = version.pattern.subn(version.replacement, name)
        found = version.library if count else found
    return TABLE if name == TABLE_ALIAS else name, found


def family(stored: Collection[str]) -> str | None:
    """Which of the models has tensors of these released names, or arrays of these paths; None: there is no telling.

    Told from names that are there. pi0-FAST has none that the others have not, so it is what has a language model and
    nothing at all of an action expert, as PaliGemma itself.
    """
    counts = {name: sum(bool(mark.match(other)) for other in stored) for name, mark in _MARKS.items()}
    if counts["pi0"] != counts["pi0.5"]:
        return max(counts, key=lambda name: counts[name])
    if any(counts.values()) or any(_FLOW.match(name) for name in stored):
        return None
    return "pi0-FAST" if any(_LANGUAGE.match(name) for name in stored) else None


def is_known_unused(released: str) -> bool:
    """Names that files may hold and no model reads: the action expert's token table."""
    return released in _UNUSED


def adapters_of_peft(stored: Iterable[str]) -> list[str]:
    """Names of the library peft's adapters."""
    return [name for name in stored if _ADAPTERS_OF_PEFT.search(name)]


def tied_names(*, prefix: str = "") -> dict[str, str]:
    """Second name -> name in the file, as the released files say in their metadata."""
    return {prefix + TABLE_ALIAS: prefix + TABLE}
