"""The finished cells of a sweep, one line each in a .jsonl file of plots/results/.

A stopped sweep reads what is there and goes on where it was. A line is never edited.
"""

import json
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
