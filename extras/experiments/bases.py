"""The three bases of the evidence, in float32: --base long:0, long:1 and long:2.

Each is our small GPT after 30,000 steps on the code of the standard library, from another seed.
`base.pt` is long:0 in half precision. ../results/SOURCES.md says which script made them.

python -m extras --base long:1
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
import train
from model import GPT, GPTConfig

FOLDER = Path(__file__).parents[1] / "results" / "bases"


def long_base(seed: str, texts: list[str]) -> tuple[GPT, Tokenizer]:
    """The base that was pretrained with this seed. Raises ValueError for another seed."""
    files = list(FOLDER.glob(f"long-{seed}-*.pt"))
    if len(files) != 1:
        raise ValueError(f"--base long:{seed}: give long:0, long:1 or long:2")
    saved = torch.load(files[0], map_location="cpu")
    del saved["config"]["classes"]  # the second edition's config had one more setting
    gpt = GPT(GPTConfig(**saved["config"]))
    gpt.load_state_dict(saved["model"])
    return gpt, data.open_tokenizer(saved["tokenizer"])


train.BASES["long"] = long_base
