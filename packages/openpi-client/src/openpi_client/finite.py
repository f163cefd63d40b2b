"""Actions are finite numbers, whichever server they come from: a robot carries out whatever else it is given."""

import math

import numpy as np


def check_finite(value: object, name: str) -> None:
    """Raises ValueError where a number in it, in arrays, maps and lists of any depth, is NaN or infinite."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "fc" and not np.isfinite(value).all():
            place = np.argwhere(~np.isfinite(value))[0].tolist()
            raise ValueError(f"the answer has {value[tuple(place)]} in '{name}' at {place}; expected finite numbers")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_finite(item, f"{name}/{index}")
    elif isinstance(value, (float, np.floating)) and not math.isfinite(value):
        raise ValueError(f"the answer has {value} in '{name}'; expected finite numbers")
