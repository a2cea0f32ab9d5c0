"""What figures and tables say of results: paired differences and their 95 % intervals."""

import functools
import math
import statistics

FEWEST = 3  # values that an interval needs


def p_of_t(t: float, freedom: int, parts: int = 200) -> float:
    """The chance of a value of Student's t that is farther from 0 than this one: two-sided p."""
    # With t = sqrt(freedom) tan(a) the density is cos(a)^(freedom - 1), but for a constant.
    end = math.atan(abs(t) / freedom**0.5)
    heights = [math.cos(end * i / parts) ** (freedom - 1) for i in range(parts + 1)]
    area = heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2])
    area *= end / parts / 3  # Simpson's rule
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


def half_width(values: list[float], level: float = 0.95) -> float:
    """t s / sqrt(n): the interval is the mean, plus and minus this. Below 3 values: nan."""
    n = len(values)
    if n < FEWEST:
        return float("nan")
    return t_quantile(level, n - 1) * statistics.stdev(values) / n**0.5


def p_value(values: list[float]) -> float:
    """Of a paired t test: that a mean as far from 0 comes by chance."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return p_of_t(statistics.mean(values) / error, len(values) - 1)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted for the number of tests, step by step (Holm 1979): below .05 is clear."""
    adjusted = {}
    largest = 0.0
    ordered = sorted(p_values, key=p_values.get)
    for i, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - i) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def smallest_visible(values: list[float], level: float = 0.95, power: float = 0.8) -> float:
    """The mean that values of this spread would show as clear of zero with this chance."""
    n = len(values)
    t = t_quantile(level, n - 1) + t_quantile(2 * power - 1, n - 1)
    return t * statistics.stdev(values) / n**0.5


def interval(values: list[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean."""
    mean = statistics.mean(values)
    half = half_width(values)
    return mean - half, mean + half


def clear_side(values: list[float]) -> int:
    """1 or -1 if the whole interval is on that side of zero; 0 if not, or if there is none."""
    low, high = interval(values)
    return int(low > 0) - int(high < 0)


# Cells of compare.jsonl and the like. `Rows` are those of one task: {row: {seed: cell}}.

Rows = dict[str, dict[int, dict]]


def chosen_cells(cells: list[dict]) -> Rows:
    """Of one task: each row's cells at its learning rate of lowest validation loss on seed 0.

    A row whose seed 0 has not run yet is left out.
    """
    rows = {}
    for row in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell for cell in cells if cell["row"] == row]
        first = [cell for cell in own if cell["seed"] == 0]
        if first:
            best = min(first, key=lambda cell: cell["val"]["loss"])
            rows[row] = {cell["seed"]: cell for cell in own if cell["rate"] == best["rate"]}
    return rows


def per_task(cells: list[dict], key: str = "task") -> dict[str, Rows]:
    """{task: rows} at chosen rates, for the tasks that have LoRA to compare with."""
    tasks = {}
    for task in dict.fromkeys(cell[key] for cell in cells):
        rows = chosen_cells([cell for cell in cells if cell[key] == task])
        if "LoRA" in rows:
            tasks[task] = rows
    return tasks


def metric_of(rows: Rows) -> str:
    """What a task is judged by: accuracy if it has one, else loss."""
    cell = next(iter(rows["LoRA"].values()))
    return "accuracy" if "accuracy" in cell["test"] else "loss"


def better_sign(rows: Rows) -> int:
    """The sign of what is better: 1 for accuracy, -1 for loss."""
    return 1 if metric_of(rows) == "accuracy" else -1


def shared_seeds(rows: Rows, row: str, other: str = "LoRA") -> list[int]:
    return sorted(rows.get(row, {}).keys() & rows.get(other, {}).keys())


def results_of(rows: Rows, row: str, seeds: list[int]) -> list[float]:
    metric = metric_of(rows)
    return [rows[row][seed]["test"][metric] for seed in seeds]


def paired(rows: Rows, row: str, other: str = "LoRA") -> list[float]:
    """Test results of one row minus another's, of the seeds that both have."""
    seeds = shared_seeds(rows, row, other)
    pairs = zip(results_of(rows, row, seeds), results_of(rows, other, seeds), strict=True)
    return [one - two for one, two in pairs]
