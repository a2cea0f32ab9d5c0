"""What figures and tables say of results: paired differences and their 95 % intervals."""

import statistics

# The .975 quantile of Student's t with 1, 2, ..., 30 degrees of freedom.
T = (
    (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    + (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
    + (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
)
FEWEST = 3  # values that an interval needs


def half_width(values: list[float]) -> float:
    """t s / sqrt(n): the 95 % interval is the mean, plus and minus this. Below 3 values: nan."""
    n = len(values)
    if n < FEWEST:
        return float("nan")
    t = T[min(n - 1, len(T)) - 1]
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
