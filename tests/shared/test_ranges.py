"""Numbers of a recipe have ranges: what is out of them is refused when it is made, before anything is loaded."""

import dataclasses
import importlib
import math
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import openpi.models
import openpi.training
from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.shared import ranges
from openpi.training import optimizer
from openpi.training.config import DataConfig, DataConfigFactory, TrainConfig, cli, config_names, get_config
from openpi.training.droid_rlds_dataset import RLDSDataset
from openpi.training.weight_loaders import WeightLoader

RECIPE = TrainConfig(name="x", exp_name="y")
PARTS = (BaseModelConfig, DataConfigFactory, optimizer.LRScheduleConfig, optimizer.OptimizerConfig, WeightLoader)
NAN, INF = math.nan, math.inf


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _subclasses(each)


def _parts_of(value: Any) -> Iterator[type]:
    """The dataclasses that a recipe is made of."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _parts_of(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts_of(item)


def _configurations() -> set[type]:
    """Every dataclass that is, or may be, a part of a recipe; a module that is added is found."""
    for package in (openpi.models, openpi.training):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.name.endswith(("_config", ".optimizer", ".weight_loaders", ".recipes")):
                importlib.import_module(module.name)
    found = {TrainConfig, DataConfig, LoRAConfig, GemmaConfig, SiglipConfig, RLDSDataset}
    found |= {kind for part in PARTS for kind in _subclasses(part) if kind.__module__.startswith("openpi.")}
    found |= {kind for name in config_names() for kind in _parts_of(get_config(name))}
    return {kind for kind in found if dataclasses.is_dataclass(kind)}


def _without_range(kind: type) -> list[str]:
    declared = ranges.ranges_of(kind)
    return [
        f"{kind.__name__}.{field.name}"
        for field in dataclasses.fields(kind)
        if field.name in declared and _has_number(declared[field.name]) and not ranges.is_bounded(declared[field.name])
    ]


def _has_number(hint: Any) -> bool:
    return hint in (int, float) or any(_has_number(part) for part in typing.get_args(hint))


def test_every_number_of_every_configuration_has_a_range():
    kinds = _configurations()
    assert {TrainConfig, Pi0Config, optimizer.Muon, optimizer.RsqrtDecaySchedule} <= kinds
    assert sorted(name for kind in kinds for name in _without_range(kind)) == []


def test_a_number_without_a_range_would_be_named():
    @dataclasses.dataclass(frozen=True)
    class Careless(optimizer.AdamW):
        power: float = 2.0
        b1: float = 0.5  # another default keeps the range

    assert _without_range(Careless) == ["Careless.power"]
    del Careless  # no subclass for other tests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_interval": -1}, r"save_interval=-1; expected a whole number of at least 0 \(0 = only at the end"),
        ({"log_interval": 0}, r"log_interval=0; expected a whole number of at least 1; set --log-interval"),
        ({"num_train_steps": 0}, "num_train_steps=0; expected a whole number of at least 1"),
        ({"num_train_steps": 1e4}, "num_train_steps=10000.0; expected a whole number"),
        ({"num_workers": -1}, r"num_workers=-1; expected .* \(0 = threads of this process\); set --num-workers"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0; expected a number of at least 0 and below 1, or None"),
        ({"ema_decay": NAN}, "ema_decay=nan"),
        ({"fsdp_devices": 0}, "fsdp_devices=0"),
        ({"cpu_devices": 0}, "cpu_devices=0"),
        ({"seed": -1}, "seed=-1"),
        ({"keep_period": 0}, "keep_period=0; expected a whole number of at least 1, or None"),
        ({"holdout_episodes": -0.5}, "holdout_episodes=-0.5"),
        ({"holdout_episodes": 1.5}, r"holdout_episodes=1.5; .* below 1 that share of them"),
        ({"eval_interval": -1}, "eval_interval=-1"),
        ({"eval_batches": 0}, "eval_batches=0"),
        ({"backend": "tensorflow"}, "backend='tensorflow'; expected one of 'jax', 'pytorch'"),
        ({"lr_schedule": optimizer.CosineDecaySchedule(peak_lr=NAN)}, "lr_schedule.peak_lr=nan; expected a finite"),
        ({"lr_schedule": optimizer.CosineDecaySchedule(decay_lr=-1.0)}, r"decay_lr=-1.0.*; set --lr-schedule.decay-lr"),
        ({"lr_schedule": optimizer.RsqrtDecaySchedule(timescale=0)}, "lr_schedule.timescale=0"),
        ({"optimizer": optimizer.AdamW(weight_decay=-1e-3)}, "optimizer.weight_decay=-0.001"),
        ({"optimizer": optimizer.AdamW(b2=1.0)}, "optimizer.b2=1.0"),
        ({"optimizer": optimizer.AdamW(clip_gradient_norm=0.0)}, r"clip_gradient_norm=0.0.*infinity = no clipping"),
        ({"batch_size": 0, "num_workers": -2}, "batch_size=0.*\n.*num_workers=-2"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"save_interval": 0, "eval_interval": 0, "keep_period": None},
        {"holdout_episodes": 0.25},
        {"holdout_episodes": 3},
        {"optimizer": optimizer.AdamW(clip_gradient_norm=INF)},
        {"ema_decay": None, "num_workers": 0},
    ],
)
def test_the_ends_of_the_ranges_are_taken(changes):
    dataclasses.replace(RECIPE, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pi0Config(action_horizon=0), "action_horizon=0"),
        (lambda: Pi0Config(image_resolution=(0, 224)), r"image_resolution=\(0, 224\)"),
        (lambda: Pi0Config(loss_draws=0), "loss_draws=0"),
        (lambda: LoRAConfig(rank=0), "rank=0"),
        (lambda: SiglipConfig(16, 1, 16, 0), "num_heads=0"),
        (lambda: optimizer.CosineDecaySchedule(decay_steps=100), r"decay_steps=100 .* warmup_steps=1000"),
    ],
)
def test_a_part_that_is_made_alone_is_checked_alone(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_flag_out_of_range_ends_the_command_before_anything_is_loaded(capsys):
    with pytest.raises(SystemExit) as end:
        cli(["pi0_libero", "--save-interval=-5"])
    assert end.value.code == 2
    assert "save_interval=-5; expected a whole number of at least 0" in " ".join(capsys.readouterr().err.split())
