from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    language: str
    problem_folder: str
    bddl_file: str


class Suite:
    n_tasks = 2

    def get_task(self, number: int) -> Task:
        return Task(f"do task {number}", "folder", f"task_{number}.bddl")

    def get_task_init_states(self, number: int) -> np.ndarray:
        return np.arange(6.0).reshape(3, 2)


def get_benchmark_dict() -> dict[str, type]:
    return dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"), Suite)
