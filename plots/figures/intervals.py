"""Student's t: intervals, p values, Holm's correction, and what could have been seen."""

import functools
import math
import statistics

FEWEST = 3  # values that an interval needs
PARTS = 200  # of an integral


def p_of_t(t: float, freedom: int) -> float:
    """The chance of a value of Student's t that is farther from 0 than this one: two-sided p."""
    # With t = sqrt(freedom) tan(a) the density is cos(a)^(freedom - 1), but for a constant.
    end = math.atan(abs(t) / freedom**0.5)
    heights = [math.cos(end * i / PARTS) ** (freedom - 1) for i in range(PARTS + 1)]
    area = heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2])
    area *= end / PARTS / 3  # Simpson's rule
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return max(0.0, 1 - 2 * constant / math.pi**0.5 * area)


@functools.cache
def t_quantile(level: float, freedom: int) -> float:
    """The t that is passed, on either side, with the chance 1 - level: 12.7 of .95 and 1."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        if p_of_t(middle, freedom) > 1 - level:
            low = middle
        else:
            high = middle
    return low


def half_width(values: list[float]) -> float:
    """t s / sqrt(n): the interval is the mean, plus and minus this. Below 3 values: nan."""
    n = len(values)
    if n < FEWEST:
        return float("nan")
    return t_quantile(0.95, n - 1) * statistics.stdev(values) / n**0.5


def p_value(values: list[float]) -> float:
    """Of a paired t test: that a mean as far from 0 comes by chance."""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    if error == 0:
        return float(mean == 0)
    return p_of_t(mean / error, len(values) - 1)


def holm(p_values: dict[str, float], tests: int) -> dict[str, float]:
    """Adjusted for the number of tests, step by step (Holm 1979): below .05 is clear."""
    adjusted = {}
    largest = 0.0
    ordered = sorted(p_values, key=p_values.get)
    for i, name in enumerate(ordered):
        largest = max(largest, min(1.0, (tests - i) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def smallest_visible(values: list[float], tests: int) -> float:
    """The mean that values of this spread would show as clear of zero with a chance of 80 %, if the
    first of so many tests were to be passed."""
    n = len(values)
    t = t_quantile(1 - 0.05 / tests, n - 1) + t_quantile(2 * 0.8 - 1, n - 1)
    return t * statistics.stdev(values) / n**0.5


def deviation_interval(deviation: float, freedom: int) -> tuple[float, float]:
    """The 95 % interval of a standard deviation, of values that are normal: from chi-square, by
    Wilson and Hilferty (1931), whose error is below 1 % from 9 degrees of freedom on."""

    def chi_square(z: float) -> float:  # over its degrees of freedom
        return (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3

    return deviation / chi_square(1.96) ** 0.5, deviation / chi_square(-1.96) ** 0.5


def interval(values: list[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean."""
    mean = statistics.mean(values)
    half = half_width(values)
    return mean - half, mean + half


def clear_side(values: list[float]) -> int:
    """1 or -1 if the whole interval is on that side of zero; 0 if not, or if there is none."""
    low, high = interval(values)
    return int(low > 0) - int(high < 0)
