"""The finished cells of a sweep, one line each in a .jsonl file of plots/results/.

A stopped sweep reads what is there and goes on where it was. A line is never edited.
"""

import argparse
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


def parse(parser: argparse.ArgumentParser, file: str) -> tuple[argparse.Namespace, list[str]]:
    """(the parser's arguments with --share and --results, options of train.py that came with them).

    Results of other options do not belong into the file in plots/results/.
    """
    default = RESULTS / file
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help="i n: every nth run")
    parser.add_argument("--results", type=Path, default=default)
    args, options = parser.parse_known_args()
    if options and args.results == default:
        parser.error(f"{' '.join(options)}: give --results FILE, too, to keep them apart")
    return args, options


def work_off(args: argparse.Namespace, wanted: list, ran: list, measure: Callable) -> None:
    """Measure what has not run yet, add its cells to the file, and say how long the rest takes."""
    first, step = args.share
    left = [run for run in wanted[first::step] if run not in ran]
    took = []
    for done, run in enumerate(left, 1):
        began = time.perf_counter()
        append(args.results, measure(*run))
        took.append(time.perf_counter() - began)
        rest = statistics.mean(took) * (len(left) - done) / 60
        print(f"{', '.join(map(str, run))}: done; {rest:.0f} min left", flush=True)
