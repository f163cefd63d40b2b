"""Which models a server has: one policy, or the checkpoints of an experiment and others beside them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from openpi.checkpoints.find import step_number
from openpi.serving.errors import UnknownModelError
from openpi_client.base_policy import BasePolicy


class Catalog(Protocol):
    """What a server has to offer. A model's id is text."""

    def ids(self) -> list[str]:
        """All models, those of an experiment by ascending step."""
        ...

    def resolve(self, requested: str | None) -> str:
        """The id of what a client asks for; None = the default.

        Raises:
            UnknownModelError: there is none.
        """
        ...

    def load(self, model_id: str) -> BasePolicy:
        """The policy, warm. Slow; runs in the model's own thread."""
        ...

    def describe(self, model_id: str) -> Mapping[str, object]:
        """What Positronic's clients are told: `config_name`, `checkpoint_path`, `experiment_name`, ..."""
        ...


@dataclasses.dataclass(frozen=True)
class OnePolicy:
    """A server with a single policy."""

    make: Callable[[], BasePolicy]
    name: str = "default"

    def ids(self) -> list[str]:
        return [self.name]

    def resolve(self, requested: str | None) -> str:
        if requested not in (None, self.name):
            raise UnknownModelError(requested, self.ids())
        return self.name

    def load(self, model_id: str) -> BasePolicy:
        return self.make()

    def describe(self, model_id: str) -> Mapping[str, object]:
        return {}


@dataclasses.dataclass(frozen=True)
class CheckpointCatalog:
    """The checkpoints of an experiment (folders such as `10000` or `checkpoint-10000`), and others by name.

    Attributes:
        load_place: a checkpoint's folder or URL -> its policy.
        steps: lists the experiment's checkpoints, name -> place, ascending; called anew each time, so that those of a
            running training show up.
        named: further checkpoints, such as the adapters of another task.
        default: id that clients get who ask for none; None = the latest step, else the first named.
        description: see `Catalog.describe`.
    """

    load_place: Callable[[str], BasePolicy]
    steps: Callable[[], Mapping[str, str]] = dict
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default: str | None = None
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def ids(self) -> list[str]:
        return [*self.steps(), *self.named]

    def resolve(self, requested: str | None) -> str:
        """By name; steps by number as well: `5000`, `005000` and `checkpoint-5000` are the same.

        Raises:
            UnknownModelError: there is no such checkpoint.
        """
        requested = self.default if requested is None else requested
        steps = self.steps()
        if requested is None:
            if not steps and not self.named:
                raise UnknownModelError(None)
            return list(steps)[-1] if steps else next(iter(self.named))
        if requested in self.named or requested in steps:
            return requested
        number = step_number(requested)
        for model_id in steps:
            if number is not None and step_number(model_id) == number:
                return model_id
        raise UnknownModelError(requested, self.ids())

    def load(self, model_id: str) -> BasePolicy:
        return self.load_place(self.named[model_id] if model_id in self.named else self.steps()[model_id])

    def describe(self, model_id: str) -> Mapping[str, object]:
        return self.description
