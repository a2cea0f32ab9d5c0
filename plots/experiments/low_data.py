"""How much text does growth need? LoRA and growth on 5 000, 20 000, 50 000 and all tokens of prose.

    python plots/experiments/low_data.py       # 3 seeds: 20 minutes of one core, as two of the
                                               # sizes are in compare.jsonl
    # and for four times as many tokens seen, 40 minutes:
    python plots/experiments/low_data.py --sizes 20000 --seeds 5 --known /dev/null \\
        --results plots/results/low_data_600.jsonl --steps 600 --batch-size 8

By the rules of compare.py: the learning rate of each size and row is the one with the best
validation loss on seed 0. A finished run is a line of plots/results/low_data.jsonl.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from plots.experiments import cells, compare

ROWS = ["LoRA", "linear", "linear, random", "linear, worth", "linear, worth, equal numbers"]
SIZES = {
    "prose, 5 000 tokens": 5_000,
    "prose, 20 000 tokens": 20_000,
    "prose, 50 000 tokens": 50_000,
    "prose": 99_062,  # all of its training split
}
RATES = [6.25e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2]  # where compare.py has none


def run_name(cell: dict) -> tuple:
    """What tells a run from another."""
    return cell["task"], cell["row"], cell["rate"], cell["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = list(SIZES.values())
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, choices=sizes)
    parser.add_argument("--seeds", type=int, default=3)
    ran = cells.RESULTS / "compare.jsonl"
    parser.add_argument("--known", type=Path, default=ran, help="runs that need not be repeated")
    parser.add_argument("--results", type=Path, default=cells.RESULTS / "low_data.jsonl")
    args, options = parser.parse_known_args()

    tasks = {task: tokens for task, tokens in SIZES.items() if tokens in args.sizes}
    for task, tokens in tasks.items():
        compare.TASKS[task] = []
        if task != "prose":
            compare.TOKENS[task] = tokens
    known = {run_name(cell): cell for cell in cells.read(args.known)}
    for seed in range(args.seeds):
        for task, tokens in tasks.items():
            for row in ROWS:
                done = [cell for cell in cells.read(args.results) if cell["tokens"] == tokens]
                done = [cell for cell in done if cell["row"] == row]
                rates = compare.RATES.get(task, RATES)
                for rate in compare.rates_to_run(done, rates, seed):
                    cell = known.get((task, row, rate, seed))
                    if cell is None:
                        cell = compare.measure(task, row, rate, seed, options)
                    cells.append(args.results, {"tokens": tokens} | cell)
                    told = f"rate {rate:g}; seed {seed}; test {cell['test']['loss']:.4f}"
                    print(f"{tokens} tokens; {row}; {told}", flush=True)


if __name__ == "__main__":
    main()
