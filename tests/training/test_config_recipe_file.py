"""A recipe is data: it survives `recipe.json`, and what is not data is refused by name."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forked
import paths
from openpi import transforms
from openpi.shared.normalize import NormStats
from openpi.training.config import TrainConfig, config_names, get_config
from openpi.training.data_config import DataConfig, SimpleDataConfig
from openpi.training.freeze import All, Any, Not, PathRegex, freeze_nothing
from openpi.training.recipe_io import changes_since, load_recipe, save_recipe
from openpi.training.weight_loaders import NoOpWeightLoader

USER_RECIPE = """
    import dataclasses
    from openpi import transforms
    from openpi.models.pi0_config import Pi0Config
    from openpi.training.config import TrainConfig
    from openpi.training.data_config import SimpleDataConfig

    @dataclasses.dataclass(frozen=True)
    class FlipGripper:
        axis: int = 6

        def __call__(self, data):
            return data

    def my_transforms(model_config):
        return transforms.Group(inputs=(FlipGripper(),))

    def my_recipe():
        return recipe

    recipe = TrainConfig(
        name="my_robot",
        exp_name="first",
        model=Pi0Config(action_horizon=7),
        data=SimpleDataConfig(repo_id="me/mine", data_transforms=my_transforms),
    )
    published = dataclasses.replace(
        recipe,
        freeze_filter=lambda path: "llm" in path,
        data=SimpleDataConfig(
            data_transforms=lambda model: transforms.Group(
                inputs=[FlipGripper(axis=model.action_horizon)],
            ),
        ),
    )
"""


@pytest.mark.parametrize("name", config_names())
def test_every_registered_recipe_survives_the_file(name, tmp_path):
    config = get_config(name)
    save_recipe(tmp_path, config)
    assert load_recipe(tmp_path) == config


def test_values_of_every_kind_survive(tmp_path):
    stats = NormStats(mean=np.arange(3.0), std=np.ones(3))
    config = TrainConfig(
        name="x",
        policy_metadata={"a": [1, (2.5, None)], "b": np.float32(0.5), "c": Path("/x"), "$odd": {3: "three"}},
        freeze_filter=Any(All(PathRegex(".*llm.*"), Not(PathRegex(".*lora.*"))), PathRegex("img")),
        data=SimpleDataConfig(
            base_config=DataConfig(
                norm_stats={"state": stats},
                repack_transforms=transforms.Group(inputs=[transforms.RepackTransform({"a": "b"})]),
            )
        ),
    )
    save_recipe(tmp_path, config)
    assert load_recipe(tmp_path) == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_plain_metadata_survives(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("recipe")
    config = TrainConfig(name="x", policy_metadata={"value": value})
    save_recipe(directory, config)
    assert load_recipe(directory) == config


def test_a_lambda_that_the_file_alone_does_not_give_is_refused_and_its_field_is_named(tmp_path):
    group = transforms.Group()
    twins = {"a": lambda m: transforms.Group(m + 1), "b": lambda m: transforms.Group(m - 1)}  # one line, two meanings
    for made in (lambda _: group, lambda _, group=group: group, *twins.values(), eval("lambda _: transforms.Group()")):
        config = TrainConfig(name="x", data=SimpleDataConfig(data_transforms=made))
        with pytest.raises(ValueError, match=r"config\.data\.data_transforms holds .*lambda.*top level"):
            save_recipe(tmp_path, config)
        assert not (tmp_path / "recipe.json").exists()


def test_an_open_object_is_refused_and_its_field_is_named(tmp_path):
    config = TrainConfig(name="x", policy_metadata={"camera": object()})
    with pytest.raises(ValueError, match=r"config\.policy_metadata\.camera holds"):
        save_recipe(tmp_path, config)


@pytest.mark.parametrize(
    "entry",
    [
        {"$ref": "os:system"},
        {"$type": "subprocess:Popen", "args": "id"},
        {"$enum": "signal:Signals", "name": "SIGINT"},
    ],
)
def test_a_file_that_names_things_outside_openpi_is_refused(entry, tmp_path):
    save_recipe(tmp_path, TrainConfig(name="x"))
    document = json.loads((tmp_path / "recipe.json").read_text())
    document["config"]["policy_metadata"] = {"harmless": entry}
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"policy_metadata\.harmless refers to .* only name what openpi lists"):
        load_recipe(tmp_path)


def test_a_field_of_another_version_is_named(tmp_path):
    save_recipe(tmp_path, TrainConfig(name="x"))
    document = json.loads((tmp_path / "recipe.json").read_text())
    document["config"]["optimizer"]["momentum"] = 1.0
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"config\.optimizer has the fields \['momentum'\]"):
        load_recipe(tmp_path)


def test_what_has_changed_since_a_checkpoint_is_named_by_field(tmp_path):
    config = get_config("pi0_libero_low_mem_finetune")
    save_recipe(tmp_path, config)
    assert changes_since(tmp_path, get_config("pi0_libero_low_mem_finetune")) == []
    changed = dataclasses.replace(
        config,
        seed=7,
        model=dataclasses.replace(config.model, action_dim=24),
        freeze_filter=freeze_nothing,
        weight_loader=NoOpWeightLoader(),
        policy_metadata={"reset_pose": [0, 1]},
    )
    changes = {field: (old, new) for field, old, new in changes_since(tmp_path, changed)}
    assert changes["seed"] == (42, 7)
    assert changes["model.action_dim"] == (32, 24)
    assert changes["weight_loader"][1] == "weights.NoOpWeightLoader"
    assert changes["weight_loader.params_path"] == (config.weight_loader.params_path, None)
    assert changes["freeze_filter"][1] == "freeze.freeze_nothing"
    assert changes["policy_metadata"] == (None, {"reset_pose": [0, 1]})
    assert len(changes) == 6


def test_a_recipe_from_before_a_field_was_there_loads_and_has_not_changed(tmp_path):
    config = get_config("debug")
    file = save_recipe(tmp_path, config)
    document = json.loads(file.read_text())
    del document["config"]["backend"]
    file.write_text(json.dumps(document))
    assert load_recipe(tmp_path) == config
    assert changes_since(tmp_path, config) == []


def test_a_checkpoint_without_recipe_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.json does not exist"):
        load_recipe(tmp_path)


def test_a_user_file_travels_with_the_checkpoint(tmp_path):
    """In another process, on a machine that does not have the file."""
    source = tmp_path / "my_robot_recipe.py"
    source.write_text(textwrap.dedent(USER_RECIPE))
    checkpoint = tmp_path / "checkpoint"
    _run(
        f"""
        from openpi.training import config, recipe_io
        recipe = config.get_config({str(source)!r} + ":recipe")
        assert recipe == config.get_config({str(source)!r} + ":my_recipe")
        recipe_io.save_recipe({str(checkpoint)!r}, recipe)
        assert recipe_io.load_recipe({str(checkpoint)!r}) == recipe
        published = config.get_config({str(source)!r} + ":published")
        recipe_io.save_recipe({str(tmp_path / "published")!r}, published)
        assert recipe_io.changes_since({str(tmp_path / "published")!r}, published) == []
        """
    )
    source.unlink()
    output = _run(
        f"""
        import logging; logging.basicConfig(level=logging.INFO)
        from openpi.training import recipe_io
        recipe = recipe_io.load_recipe({str(checkpoint)!r})
        assert recipe.model.action_horizon == 7
        print(recipe.data.data_transforms(recipe.model).inputs[0])
        recipe_io.save_recipe({str(tmp_path / "copy")!r}, recipe)
        published = recipe_io.load_recipe({str(tmp_path / "published")!r})
        print(published.data.data_transforms(recipe.model).inputs[0])
        assert published.freeze_filter("PaliGemma/llm/w") and not published.freeze_filter("PaliGemma/img/w")
        recipe_io.save_recipe({str(tmp_path / "published copy")!r}, published)
        """
    )
    for copy, first in (("copy", "checkpoint"), ("published copy", "published")):
        assert (tmp_path / copy / "recipe.json").read_text() == (tmp_path / first / "recipe.json").read_text()
    assert "FlipGripper(axis=6)" in output.stdout and "FlipGripper(axis=7)" in output.stdout
    assert "running the recipe's own code" in output.stderr


TWO_FILES = {
    "lab/__init__.py": "",
    "lab/recipes/arm.py": """
        import dataclasses
        from openpi.training.config import TrainConfig, SimpleDataConfig
        from openpi.transforms import Group
        from ..robots import arm as arm_policy
        import lab.scales

        data = SimpleDataConfig(data_transforms=lambda m: Group([arm_policy.ArmInputs()]))
        recipe = TrainConfig(name="arm", data=data)
        """,
    "lab/robots/arm.py": """
        import dataclasses
        import numpy as np
        from lab import scales

        @dataclasses.dataclass(frozen=True)
        class ArmInputs:
            def __call__(self, data):
                from ..later import DOUBLE  # when it is called

                return {"state": data["state"] * scales.SCALE * DOUBLE}
        """,
    "lab/scales.py": "import lab.robots.arm  # in a circle\nSCALE = 2\n",
    "lab/later.py": "DOUBLE = 2\n",
    "lab/unused.py": "",
}


def test_what_a_user_s_file_imports_from_its_folder_travels_with_it_and_stays_what_it_was(tmp_path):
    """Two runs, before and after an edit, served by one process, which sees neither."""
    for name, text in TWO_FILES.items():
        file = tmp_path / "home" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    scales = tmp_path / "home" / "lab" / "scales.py"
    for scale in (2, 3):
        scales.write_text(scales.read_text().replace("SCALE = 2", f"SCALE = {scale}"))
        _run(
            f"""
            import pathlib, sys
            sys.path.insert(0, {str(tmp_path / "home")!r})
            from openpi.training import config, recipe_io
            recipe = config.get_config("lab.recipes.arm:recipe")
            recipe_io.recipe_values(recipe)  # as training starts; the author goes on
            file = pathlib.Path({str(scales)!r})
            before = file.read_text()
            file.write_text("SCALE = (")
            recipe_io.save_recipe({str(tmp_path / str(scale))!r}, recipe)
            file.write_text(before)
            """
        )
    shutil.rmtree(tmp_path / "home")
    output = _run(
        f"""
        import sys
        from openpi.training import recipe_io
        recipes = [recipe_io.load_recipe({str(tmp_path)!r} + f"/{{scale}}") for scale in (2, 3, 2)]
        recipe_io.save_recipe({str(tmp_path / "again")!r}, recipes[1])
        for recipe in (*recipes, recipe_io.load_recipe({str(tmp_path / "again")!r})):
            print(recipe.data.data_transforms(None).inputs[0]({{"state": 10}}))
        from openpi.data.batch_loader import BatchLoader
        from openpi.data.dataset import TransformedDataset
        dataset = TransformedDataset([{{"state": 10}}], [recipes[1].data.data_transforms(None).inputs[0]])
        loader = BatchLoader(dataset, batch_size=1, num_workers=1)
        print(*next(iter(loader))["state"], "of a worker")
        loader.close()
        assert not [name for name in sys.modules if name.partition(".")[0] == "lab"]
        """
    )
    assert [line for line in output.stdout.splitlines() if "state" in line] == [
        f"{{'state': {20 * scale}}}" for scale in (2, 3, 2, 3)
    ]
    assert "60 of a worker" in output.stdout
    sources = json.loads((tmp_path / "2" / "recipe.json").read_text())["sources"]
    assert set(sources) == {"lab", "lab.recipes.arm", "lab.robots.arm", "lab.scales", "lab.later"}


def test_freeze_filters_match_whole_paths():
    assert PathRegex(".*llm.*")("PaliGemma/llm/layers/mlp/linear")
    assert not PathRegex("llm")("PaliGemma/llm/layers/mlp/linear")
    assert All()("x")
    assert not Any()("x")
    with pytest.raises(ValueError, match="not a regular expression"):
        PathRegex("(")


def test_equal_recipes_are_equal_after_a_change_and_back():
    config = get_config("pi05_libero")
    assert dataclasses.replace(dataclasses.replace(config, seed=1), seed=config.seed) == config


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = forked.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = (\n", r"broken_0\.py, line 2: SyntaxError"),
        ("x = 1\n\nfirst = undefined\n", r"broken_1\.py, line 3: NameError: name 'undefined' is not defined"),
        ("x = {}\ny = x['actions']\n", r"broken_\d\.py, line 2: KeyError: 'actions' in `y = x\['actions'\]`"),
        ("import no_such_package\n", r"broken_\d\.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_an_error_in_a_recipe_file_comes_in_one_line(text, message, request, tmp_path):
    number = request.node.callspec.indices["text"]
    file = tmp_path / f"broken_{number}.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as failure:
        get_config(f"{file}:recipe")
    assert "\n" not in str(failure.value)


def test_a_recipe_file_without_an_attribute_lists_its_recipes():
    file = paths.SUPPORT / "tiny_arm.py"
    with pytest.raises(ValueError, match=r"is a file of recipes; name one of its recipes: .*tiny_arm\.py:recipe"):
        get_config(str(file))
