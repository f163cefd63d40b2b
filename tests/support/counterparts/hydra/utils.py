class Oracle:
    def get_task_info_for_set(self, start: dict, now: dict, tasks: set[str]) -> set[str]:
        is_easy = tasks <= {"open_drawer", "push_red"}
        return tasks if is_easy and now["count"] - start["count"] >= 10 else set()


def instantiate(rules: dict) -> Oracle:
    assert rules == {"_target_": "calvin_env.envs.tasks.Tasks"}
    return Oracle()
