def get_env_state_for_initial_condition(initial: dict) -> tuple[list[float], list[float]]:
    return [float(initial["led"])] * 15, [0.0] * 24
