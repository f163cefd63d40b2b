"""Statistics of success counts."""

import math

_Z_95 = 1.959964


def wilson_interval(successes: int, trials: int, *, z: float = _Z_95) -> tuple[float, float]:
    """Interval that holds the true success rate with 95 % confidence (or that of another `z`).

    Unlike the plain normal interval it stays inside [0, 1] and is sound for few trials and rates near 0 or 1.

    Raises:
        ValueError: `trials` is not positive or `successes` not within it.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} of trials={trials}; expected 0 <= successes <= trials >= 1.")
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
