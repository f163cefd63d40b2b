"""`openpi demo`: its command line, its folder, and once the whole way."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openpi.cli import _world_words
from openpi.cli.evaluation import evaluate
from openpi.cli.serving import server
from openpi.training import config
from openpi_demo import command as demo
from openpi_demo import pipeline
from openpi_demo.pipeline import DemoOptions, run_demo
from openpi_demo.plan import BASE, FULL, QUICK, Plan

HAS_BASE = (BASE / "params").is_dir()
NO_BASE = "the base checkpoint is not in this installation"


def test_printed_commands_are_commands_that_exist_with_flags_they_know(tmp_path):
    plan = Plan(tmp_path / "out", QUICK)
    train = plan.train("tabletop_place")
    parsed = config.cli(train.args[1:])
    assert parsed.num_train_steps == QUICK.train_steps
    assert parsed.data.repo_id == str(plan.dataset)
    assert parsed.checkpoint_dir == plan.run_dir("tabletop_place")
    command = plan.evaluate("after", server="base", episodes=8, films=1, swap_prompts=True)
    _, world, evaluated = _world_words.parse(command.args[1:], evaluate.Args, "openpi evaluate", "")
    assert world.swap_prompts and (evaluated.episodes, evaluated.trials) == (8, 2)
    assert (evaluated.output, evaluated.videos) == (plan.evaluation("after"), 1)


def test_with_pytorch_the_commands_that_train_and_serve_say_so_and_no_others(tmp_path):
    plan = Plan(tmp_path / "out", QUICK, backend="pytorch")
    parsed = config.cli(plan.train("tabletop_place").args[1:])
    assert (parsed.backend, parsed.cpu_devices) == ("pytorch", 1)
    assert server.parse(list(plan.serve("base", plan.base).args[1:])).backend == "pytorch"
    plain = Plan(tmp_path / "out", QUICK)
    commands = [plain.train("tabletop_place"), plain.serve("base", plain.base), plain.record(), plan.record()]
    assert not any("backend" in str(command) or "cpu" in str(command) for command in commands)


def test_a_missing_pytorch_is_one_line_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main([f"--output={tmp_path / 'out'}", "--backend=pytorch"]) == 1
    message = capsys.readouterr().err
    assert "--extra torch" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_full_demo_trains_for_as_long_as_the_recipe_says(tmp_path):
    assert not any("num-train-steps" in arg for arg in Plan(tmp_path, FULL).train("tabletop_place").args)


def test_the_comparison_is_the_same_recipe_without_the_base():
    scratch = config.get_config(pipeline.SCRATCH_RECIPE)
    recipe = config.get_config("tabletop_place")
    assert scratch.weight_loader != recipe.weight_loader
    assert (scratch.model, scratch.num_train_steps, scratch.lr_schedule) == (
        recipe.model,
        recipe.num_train_steps,
        recipe.lr_schedule,
    )


def test_sizes_on_the_command_line_replace_those_of_the_plan(tmp_path):
    sizes = DemoOptions(output=tmp_path, quick=True, episodes=7).plan().sizes
    assert (sizes.episodes, sizes.demonstrations) == (7, QUICK.demonstrations)
    with pytest.raises(ValueError, match=r"train_steps is 0; expected at least 1"):
        DemoOptions(train_steps=0).plan()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path, capsys, flags):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert demo.main([f"--output={tmp_path}", *flags]) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_output_of_an_earlier_demo_is_replaced_only_when_asked(tmp_path):
    (tmp_path / pipeline.MARKER_FILE).touch()
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"):
        pipeline.open_output(DemoOptions(output=tmp_path))
    assert (tmp_path / "report.html").read_text() == "old"
    pipeline.open_output(DemoOptions(output=tmp_path, overwrite=True))
    assert [entry.name for entry in tmp_path.iterdir()] == [pipeline.MARKER_FILE]


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    pipeline.open_output(DemoOptions(output=tmp_path))
    assert (tmp_path / pipeline.MARKER_FILE).is_file()


def test_a_full_disk_is_noticed_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "NEEDED_BYTES", 2**80)
    with pytest.raises(OSError, match="Make room"):
        run_demo(DemoOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[Path, str]:
    """Output folder and terminal output of one quick demo."""
    return run_quick(tmp_path_factory.mktemp("quick") / "out")


def run_quick(output: Path, *flags: str) -> tuple[Path, str]:
    demo = [sys.executable, "-m", "openpi.cli.main", "demo", f"--output={output}", "--quick", "--from-scratch=no"]
    less = ["--demonstrations=4"]  # of which two are held out
    done = subprocess.run(
        [*demo, *less, *flags], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.mark.skipif(not HAS_BASE, reason=NO_BASE)
class TestQuickDemo:
    def test_it_leaves_a_report_with_what_it_promises(self, quick_run):
        output, _ = quick_run
        found = json.loads((output / "report.json").read_text())
        assert found["episodes"] == QUICK.episodes
        assert 0.0 <= found["success_before"] <= 1.0
        assert 0.0 <= found["success_after"] <= 1.0
        assert found["peak_memory_mb"] > 100
        assert {"record", "stats", "evaluate_before", "train", "evaluate_after"} <= set(found["seconds_per_stage"])
        assert sum(found["seconds_per_stage"].values()) <= found["total_seconds"]
        assert "data:video/mp4;base64," in (output / "report.html").read_text()

    def test_it_prints_the_commands_that_it_ran(self, quick_run):
        output, printed = quick_run
        found = json.loads((output / "report.json").read_text())
        assert [line.partition(" ")[0] for line in found["commands"]] == ["openpi"] * len(found["commands"])
        assert all(f"  $ {command}\n" in printed for command in found["commands"])

    def test_both_evaluations_played_the_same_scenes(self, quick_run):
        output, _ = quick_run
        evaluations = json.loads((output / "report.json").read_text())["evaluations"]
        played = {
            name: [(episode["seed"], episode["prompt"]) for episode in evaluations[name]["episodes"]]
            for name in ("before", "after")
        }
        assert played["before"] == played["after"]
        assert len(played["after"]) == QUICK.episodes

    def test_the_checkpoint_stands_alone(self, quick_run):
        output, _ = quick_run
        assert QUICK.train_steps is not None
        checkpoint = output / "checkpoints" / "tabletop_place" / "demo" / str(QUICK.train_steps - 1)
        assert (checkpoint / "params").is_dir()
        assert (checkpoint / "recipe.json").is_file()
        assert list((checkpoint / "assets").glob("**/norm_stats.json"))


@pytest.mark.skipif(not HAS_BASE, reason=NO_BASE)
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: --extra torch")
def test_the_whole_way_with_pytorch(tmp_path):
    output, printed = run_quick(tmp_path / "out", "--backend=pytorch", "--episodes=1")
    found = json.loads((output / "report.json").read_text())
    assert found["backend"] == "pytorch"
    assert "torch" in found["versions"]
    assert "with PyTorch" in printed
    assert "trained and served with PyTorch" in (output / "report.html").read_text()
    assert [row["step"] for row in found["training"]["finetuned"]][-1] == 3
    assert QUICK.train_steps is not None
    checkpoint = output / "checkpoints" / "tabletop_place" / "demo" / str(QUICK.train_steps - 1)
    assert (checkpoint / "model.safetensors").is_file()
    assert not (checkpoint / "params").exists()
    assert " is ready after " in (output / "logs" / "serve_finetuned.log").read_text()
    assert "Warning" not in (output / "logs" / "serve_finetuned.log").read_text()
