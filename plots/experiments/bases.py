"""Bases that have read more: the small GPT pretrained 30 times as long as train.py does, per seed.

    python plots/experiments/bases.py                 # three, about an hour of two cores each
    python plots/experiments/bases.py --seeds 0       # one of them

Each is kept in plots/results/bases/ under a name that changes with all that it is made from, so a
finished one is not made again, and a stopped one goes on where it was: at most five minutes are
lost. The last line for each is its file, for --base. Those of the published results are there, as
another kind of machine, or release of Python, torch or tokenizers, may make others.
"""

import argparse
import functools
import inspect
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import model
import train
from model import GPT, GPTConfig
from plots.experiments import cells

STEPS = 30_000  # of 8 windows of 128 tokens: each token of the code is read about ten times
RATE = 2e-3  # train.py's
SAVE_EVERY = 300  # seconds


@functools.cache
def prepare(seed: int, steps: int) -> tuple[Path, Tokenizer, dict]:
    """(the file of a base, its tokenizer, {split: windows of code})."""
    config = GPTConfig()
    documents = data.documents("code")
    tokenizer = data.train_tokenizer(documents, config.vocab_size)
    windows = data.text_examples("code", documents, tokenizer, config.context)
    code = [model.Block, model.GPT, pretrain, train.train_step, train.predict]
    code += [train.learning_rate, train.draw_batch]
    settings = (config, seed, steps, RATE, train.pick_device(None).type, torch.__version__)
    facts = [*map(inspect.getsource, code), repr(settings)]
    name = train.digest([tokenizer.to_str(), windows["train"].tokens, *facts])
    return cells.RESULTS / "bases" / f"long-{seed}-{name}.pt", tokenizer, windows


def pretrain(seed: int, steps: int) -> Path:
    """Make a base, or what is missing of it."""
    path, tokenizer, windows = prepare(seed, steps)
    if path.exists():
        return path
    device = train.pick_device(None)
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig()).to(device)
    groups = [{"params": list(gpt.parameters()), "lr_ratio": 1.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    done = 0
    part = path.with_suffix(".part")
    if part.exists():
        saved = train.load_file(part, "step", "model", "optimizer")
        gpt.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]

    began = saved_at = time.perf_counter()
    for step in range(done + 1, steps + 1):
        examples = train.draw_batch(windows["train"], seed, step, size=8)
        rate = train.learning_rate(step, steps, RATE)
        loss = train.train_step(gpt, optimizer, rate, examples, device)
        now = time.perf_counter()
        if now - saved_at > SAVE_EVERY or step == steps:
            state = {"model": gpt.state_dict(), "optimizer": optimizer.state_dict()}
            train.save_file(part, {"step": step, **state})
            left = (now - began) / (step - done) * (steps - step) / 60
            print(
                f"base {seed}: step {step}/{steps}  loss {loss:.3f}  {left:.0f} min left",
                flush=True,
            )
            saved_at = now
    content = {"config": asdict(gpt.config), "tokenizer": tokenizer.to_str()}
    train.save_file(path, content | {"model": gpt.state_dict()})
    part.unlink()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for seed in args.seeds:
        print(pretrain(seed, STEPS), flush=True)


if __name__ == "__main__":
    main()
