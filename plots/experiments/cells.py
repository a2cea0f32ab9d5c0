"""The finished cells of a sweep, one line each in a .jsonl file of plots/results/.

A stopped sweep reads what is there and goes on where it was. A line is never edited.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def read(path: Path) -> list[dict]:
    """The cells of a file, oldest first; none if there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, cell: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")


def work_off(path: Path, left: list[tuple], measure: Callable[..., dict]) -> None:
    """Measure each run that is left, add its cell to the file, and say how long the rest takes."""
    took = []
    for done, run in enumerate(left, 1):
        began = time.perf_counter()
        append(path, measure(*run))
        took.append(time.perf_counter() - began)
        rest = statistics.mean(took) * (len(left) - done) / 60
        print(f"{', '.join(map(str, run))}: done; {rest:.0f} min left", flush=True)
