"""GPT-2, small or as published: the model that train.py pretrains or loads, then adapts. It knows nothing of adapters.

It is GPT-2 to the last constant, but for dropout: learned positions, layer norm before each sub-layer, tanh GELU, a
head tied to the token embedding. q, k and v are three Linears instead of one c_attn, so that each of a block's six
matrices can be adapted, grown and named: blocks.0.q, .k, .v, .o, .fc and .proj.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor, nn
from data import END_OF_TEXT, load
from triadapt import needing

# Parts of published names, and ours. Some files have the names of a GPT2LMHeadModel, some of the GPT2Model in it.
RENAMED = {
    "transformer.": "",
    "h.": "blocks.",
    "ln_f": "ln",
    "ln_": "ln",
    "attn.c_proj": "o",
    "mlp.c_": "",
}


@dataclass
class GPTConfig:
    """Sizes. The defaults suit 90 s of pretraining on two CPU cores: a wider model sees less text and ends worse."""

    vocab_size: int = 2048
    context: int = 128  # the longest input, in tokens
    layers: int = 4
    heads: int = 4
    width: int = 128  # of the residual stream
    classes: int = 0  # 0: a language model; else a classifier, with a head of its own


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.ln1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ln2 = nn.LayerNorm(width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        h = self.ln1(x)
        q, k, v = (
            m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        h = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        )  # (batch, heads, time, width / heads)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        return x + self.proj(nn.functional.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). forward: token numbers (batch, time) -> logits (batch, time, vocab_size or classes)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln = nn.LayerNorm(config.width)
        self.classify(config.classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # GPT-2 starts the two matrices that write to the residual stream smaller, as 2 x layers terms add up.
                writes = name.endswith(("o.weight", "proj.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02
                )

    def classify(self, classes: int) -> None:
        """Turn into a classifier: a new head, which starts at zero, takes the place of the one tied to the embedding."""
        self.config = replace(self.config, classes=classes)
        self.head = (
            nn.Parameter(self.wte.weight.new_zeros(classes, self.config.width)) if classes else None
        )

    def forward(self, ids: Tensor) -> Tensor:  # (batch, time), time <= context
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)  # (batch, time, width)
        return nn.functional.linear(self.ln(x), self.wte.weight if self.head is None else self.head)


@torch.no_grad()
def generate(
    model: GPT, tokenizer: Tokenizer, prompt: str, temperature=0.8, top_k=50, seed=0, length=60
) -> str:
    """The prompt, and how the model goes on from it: `length` tokens, each drawn from the top_k likeliest."""
    generator = torch.Generator().manual_seed(
        seed
    )  # on the CPU, so that one seed gives one text on every device
    ids = torch.tensor(
        [tokenizer.encode(prompt or END_OF_TEXT).ids], device=model.wte.weight.device
    )  # (1, time)
    for _ in range(length):
        logits = (
            model(ids[:, -model.config.context :])[:, -1].float() / temperature
        )  # (1, vocab_size)
        best, tokens = logits.topk(min(top_k, logits.shape[-1]))
        choice = torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        ids = torch.cat((ids, tokens.gather(-1, choice)), dim=1)
    return tokenizer.decode(ids[0].tolist())


def load_gpt2(name: str) -> dict:
    """Published GPT-2 weights as the content of a base file: {"config", "tokenizer", "model"}. name: gpt2[-medium, -large,
    -xl], to be downloaded once, or a folder with these files. Raises InputError if that fails, or if a file is missing."""
    files = ["config.json", "tokenizer.json", "pytorch_model.bin"]
    with needing(
        f"--base {name}: not to be had; give a folder that holds GPT-2's {', '.join(files)}"
    ):
        folder = Path(
            name
            if Path(name).is_dir()
            else snapshot_download(f"openai-community/{name}", allow_patterns=files)
        )
        sizes, tokenizer = (
            json.loads((folder / files[0]).read_text()),
            (folder / files[1]).read_text(),
        )
        config = [
            sizes[key] for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        ]
    safe, state = folder / "model.safetensors", {}
    for key, tensor in load(safe if safe.exists() else folder / files[2]).items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        if "c_attn" in key:  # q, k and v in one: (width, 3 width), or its bias
            state |= {
                key.replace("attn.c_attn", ours): part.t()
                for ours, part in zip("qkv", tensor.chunk(3, dim=-1))
            }
        elif (
            0 < tensor.dim() < 3 and key != "lm_head.weight"
        ):  # not the causal masks, nor the tied head
            state[key] = tensor.t() if key.startswith("blocks") else tensor  # theirs are (in, out)
    return {"config": asdict(GPTConfig(*config)), "tokenizer": tokenizer, "model": state}
