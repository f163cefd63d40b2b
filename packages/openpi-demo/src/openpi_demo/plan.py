"""What the demo will run: its sizes, its folder, and every command, known before the first one starts.

Each stage is a public command, printed as it runs, so that it can be repeated by hand or on other data.
"""

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from openpi.shared.children import Command
from openpi.shared.frameworks import Backend
from openpi_demo.tabletop import PLACE, PROMPTS

RECIPE = "tabletop_place"
SCRATCH_RECIPE = "openpi_demo.scratch:tabletop_place_scratch"
BASE = Path(str(resources.files("openpi_demo").joinpath("base")))
EXP_NAME = "demo"
RECORD_SEED = 0
EVALUATION_SEED = 1_000_000  # scenes that no demonstration has shown


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        demonstrations: recorded episodes.
        episodes: closed-loop episodes before, and after.
        swapped_episodes: closed-loop episodes in which the policy is told something else.
        films, films_of_failure: of an evaluation; the latter before training and with swapped prompts, where every
            episode runs to its time limit, and drawing takes longer than playing.
        train_steps, batch_size, holdout_episodes: None = the recipe's.
    """

    demonstrations: int
    episodes: int
    swapped_episodes: int
    films: int
    films_of_failure: int
    train_steps: int | None = None
    batch_size: int | None = None
    holdout_episodes: int | None = None


FULL = Sizes(demonstrations=400, episodes=50, swapped_episodes=24, films=6, films_of_failure=3)
QUICK = Sizes(
    demonstrations=8,
    episodes=2,
    swapped_episodes=1,
    films=1,
    films_of_failure=1,
    train_steps=4,
    batch_size=4,
    holdout_episodes=2,
)
"""The same path in about a minute, to see that everything works; it learns nothing."""


@dataclass(frozen=True)
class Plan:
    """The demo in one folder. Paths are as the user gave them, so that printed commands work where they are read.

    Attributes:
        backend: what trains, and what serves, the base included.
    """

    output: Path
    sizes: Sizes
    base: Path = BASE
    recipe: str = RECIPE
    backend: Backend = "jax"

    @property
    def dataset(self) -> Path:
        return self.output / "dataset"

    def evaluation(self, name: str) -> Path:
        return self.output / "evaluations" / name

    def port_file(self, name: str) -> Path:
        return self.output / "servers" / f"{name}.port"

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    def run_dir(self, recipe_name: str) -> Path:
        """The training run's folder: checkpoints by step (`openpi serve` takes the latest), and `metrics.jsonl`."""
        return self.output / "checkpoints" / recipe_name / EXP_NAME

    def record(self) -> Command:
        return _command("demo", "record", output=self.dataset, episodes=self.sizes.demonstrations, seed=RECORD_SEED)

    def stats(self, recipe: str) -> Command:
        command = _command("stats", recipe, **self._data_flags())
        return replace(command, args=(*command.args, "--compare"))

    def train(self, recipe: str) -> Command:
        sizes = {
            "num_train_steps": self.sizes.train_steps,
            "batch_size": self.sizes.batch_size,
            "holdout_episodes": self.sizes.holdout_episodes,
        }
        return _command(
            "train",
            recipe,
            exp_name=EXP_NAME,
            **self._data_flags(),
            checkpoint_base_dir=self.output / "checkpoints",
            # The recipe's `cpu_devices` split the processor for JAX.
            **({} if self.backend == "jax" else {"backend": self.backend, "cpu_devices": 1}),
            **{name: value for name, value in sizes.items() if value is not None},
        )

    def serve(self, name: str, checkpoint: Path) -> Command:
        flags = {} if self.backend == "jax" else {"backend": self.backend}
        command = _command("serve", str(checkpoint), port=0, port_file=self.port_file(name), **flags)
        return replace(command, in_background=True)

    def evaluate(self, name: str, *, server: str, episodes: int, films: int, swap_prompts: bool = False) -> Command:
        """`name` of the evaluation, `server` the name that `serve` was given."""
        command = _command(
            "evaluate",
            "tabletop",
            port_file=self.port_file(server),
            episodes=episodes,
            trials=-(-episodes // len(PROMPTS[PLACE])),  # that many at most; prompts take turns
            seed=EVALUATION_SEED,
            output=self.evaluation(name),
            videos=min(films, episodes),
        )
        return replace(command, args=(*command.args, "--swap-prompts")) if swap_prompts else command

    def _data_flags(self) -> dict[str, object]:
        return {"data.repo_id": self.dataset, "assets_base_dir": self.output / "assets"}


def _command(*words: str, **flags: object) -> Command:
    return Command((*words, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())))
