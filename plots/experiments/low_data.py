"""How much text does growth need? LoRA and three growths on the first 5 000, 20 000, 50 000 and all tokens of prose.

    python plots/low_data.py            # 3 seeds; 20 minutes of one core, as two of the sizes are in compare.jsonl
    # and for four times as many tokens seen, 40 minutes:
    python plots/low_data.py --sizes 20000 --seeds 5 --known /dev/null --results plots/low_data_600.jsonl \\
        --steps 600 --batch-size 8

By the rules of compare.py: the learning rate of each size and row is the one with the best validation loss of seed 0. A
finished run is a line of plots/low_data.jsonl, so that a stopped sweep goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from plots import compare  # noqa: E402

ROWS = ("LoRA", "linear", "linear, random", "linear, worth", "linear, worth, equal numbers")
SIZES = {
    "prose, 5 000 tokens": 5_000,
    "prose, 20 000 tokens": 20_000,
    "prose, 50 000 tokens": 50_000,
    "prose": 99_062,
}  # the last is all of its training split
RATES = (6.25e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[*SIZES.values()], choices=SIZES.values()
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--known",
        type=Path,
        default=HERE / "compare.jsonl",
        help="runs that need not be done again",
    )
    parser.add_argument("--results", type=Path, default=HERE / "low_data.jsonl")
    args, options = parser.parse_known_args()
    args.results.touch()
    for task, tokens in SIZES.items():
        compare.TASKS.setdefault(task, [])
        if task != "prose":
            compare.TOKENS[task] = tokens
    known = {
        (cell["task"], cell["row"], cell["rate"], cell["seed"]): cell
        for cell in map(json.loads, args.known.read_text().splitlines())
    }
    for seed in range(args.seeds):
        for task, tokens in SIZES.items():
            for row in ROWS if tokens in args.sizes else ():
                cells = [
                    cell
                    for cell in map(json.loads, args.results.read_text().splitlines())
                    if (cell["tokens"], cell["row"]) == (tokens, row)
                ]
                done = {(cell["rate"], cell["seed"]) for cell in cells}
                rates = compare.RATES.get(task, RATES)
                for rate in rates if seed == 0 else compare.best_rate(cells, rates):
                    if (rate, seed) not in done:
                        line = known.get((task, row, rate, seed)) or compare.measure(
                            task, row, rate, seed, options
                        )
                        with open(args.results, "a") as file:
                            file.write(json.dumps({"tokens": tokens} | line) + "\n")
                        print(
                            f"{tokens} tokens; {row}; rate {rate:g}; seed {seed}; test {line['test']['loss']:.4f}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
