"""What `openpi doctor` has found, stage by stage."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

from openpi.evaluation.difference import STAGES, Difference

_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Attributes:
    about: what was compared.
    differences: in the order of the stages.
    not_compared: stages, and why.
    """

    about: str
    differences: Sequence[Difference]
    not_compared: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> Difference | None:
        return min(self.differences, key=lambda found: STAGES.index(found.stage), default=None)

    def as_json(self) -> dict[str, object]:
        return {
            "about": self.about,
            "stages": {stage: self._verdict(stage) for stage in STAGES},
            "first": None if self.first is None else dataclasses.asdict(self.first),
            "differences": [dataclasses.asdict(found) for found in self.differences],
            "not_compared": dict(self.not_compared),
        }

    def as_text(self) -> str:
        lines = [self.about, ""]
        for stage in STAGES:
            lines.append(f"  {stage:<11} {self._verdict(stage)}")
            for found in self.differences:
                if found.stage == stage:
                    lines += _indented(f"{found.subject}: {found.found}")
                    lines += _indented(f"likely cause: {found.cause}")
                    lines += _indented(f"fix: {found.fix}")
            if stage in self.not_compared:
                lines += _indented(self.not_compared[stage])
        lines += [f"  {what}: not compared, {why}" for what, why in self.not_compared.items() if what not in STAGES]
        if self.first is None:
            ending = "no difference was found" + (" in what could be compared" if self.not_compared else "")
        else:
            ending = f"the first difference is at the stage '{self.first.stage}': {self.first.cause}"
        return "\n".join([*lines, "", ending])

    def _verdict(self, stage: str) -> str:
        if any(found.stage == stage for found in self.differences):
            return "DIFFERENT"
        return "not compared" if stage in self.not_compared else "same"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 14, subsequent_indent=" " * 16, break_long_words=False)
