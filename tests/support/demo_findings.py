"""What a demo may find, made up, with real films: for tests of the report."""

from pathlib import Path

import numpy as np

from openpi.evaluation.stats import Tally
from openpi.evaluation.video import write_video
from openpi_demo.tabletop import PLACE, PROMPTS

STAGES = ("record", "stats", "evaluate_before", "train", "evaluate_after", "prompt_swap", "from_scratch")


def findings(folder: Path) -> dict:
    """The contents of `report.json`; writes one film per evaluation to where the report looks for it."""
    evaluations = {
        "before": evaluation(folder, "before", successes=0, trials=12),
        "after": evaluation(folder, "after", successes=11, trials=12),
        "swapped": evaluation(folder, "swapped", successes=1, trials=6),
    }
    return {
        "success_before": 0.0,
        "success_after": 11 / 12,
        "success_prompt_swapped": 1 / 6,
        "success_from_scratch": None,
        "episodes": 12,
        "demonstrations": 180,
        "seconds_per_stage": dict.fromkeys(STAGES, 10.0) | {"from_scratch": 0.001},
        "total_seconds": 245.4,
        "peak_memory_mb": 1234.0,
        "peak_memory_mb_per_stage": dict.fromkeys(STAGES, 1234.0),
        "quick": False,
        "backend": "pytorch",
        "commands": ["openpi demo record --output='a & b/dataset'", "openpi train tabletop_place --exp-name=demo"],
        "evaluations": evaluations,
        "training": {
            "finetuned": [
                {"step": 0, "loss": 0.8, "learning_rate": 1e-5},
                {"step": 10, "loss": 0.4, "learning_rate": 5e-4},
                {"step": 10, "validation_loss": 0.5, "action_error": 0.0625},
                {"step": 19, "loss": float("nan"), "learning_rate": 2e-4},
            ]
        },
        "machine": {"processor": "A <fast> one", "cores": "2", "memory": "8.0 GiB", "system": "Linux"},
        "versions": {"python": "3.11.9", "jax": "0.6.0"},
    }


def evaluation(folder: Path, name: str, *, successes: int, trials: int) -> dict:
    """All successes belong to the first episodes; the first episode is filmed."""
    prompts = PROMPTS[PLACE]
    episodes = [
        {
            "seed": i,
            "prompt": prompts[i % 6],
            "told_prompt": prompts[(i + (name == "swapped")) % 6],
            "success": i < successes,
            "num_steps": 31,
            "seconds": 0.5,
        }
        for i in range(trials)
    ]
    path = write_video(folder / "evaluations" / f"{name}_videos" / "00.mp4", np.zeros((3, 16, 32, 3), np.uint8), fps=10)
    return {
        "total": Tally(successes, trials).to_dict(),
        "per_prompt": {prompt: _tally([e for e in episodes if e["prompt"] == prompt]) for prompt in prompts},
        "execute_horizon": 6,
        "seconds": 20.0,
        "episodes": episodes,
        "task": PLACE,
        "told": Tally(5, trials).to_dict(),
        "round_trip_ms": {"p50": 17.0, "p95": 23.0},
        "videos": [{**episodes[0], "path": f"{path.parent.name}/{path.name}"}],
    }


def _tally(episodes: list[dict]) -> dict:
    return Tally(sum(episode["success"] for episode in episodes), len(episodes)).to_dict()
