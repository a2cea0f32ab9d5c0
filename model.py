"""A small GPT-2: the model that train.py pretrains on code and then adapts. It knows nothing of adapters.

The architecture is GPT-2's to the last constant: learned positions, layer norm before each sub-layer, tanh GELU, a head
tied to the token embedding. But q, k and v are three Linear modules instead of one c_attn, so that each of the six
matrices of a block can be adapted, grown and named: blocks.0.q, blocks.0.k, blocks.0.v, .o, .fc and .proj.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    """Sizes. The defaults suit a pretraining of a minute and a half on two CPU cores: a wider model sees less text in
    that time, and ends worse."""
    vocab_size: int = 2048
    context: int = 128   # the longest input, in tokens
    layers: int = 4
    heads: int = 4
    width: int = 128     # of the residual stream

class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.ln1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ln2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        h = self.ln1(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, width / heads)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        return x + self.proj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). forward: token numbers (batch, time) -> logits (batch, time, vocab_size)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # GPT-2 starts the two matrices that write to the residual stream smaller, as 2 x layers terms add up.
                writes = name.endswith(("o.weight", "proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, time), time <= context
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)                              # (batch, time, width)
        return F.linear(self.ln(x), self.wte.weight)  # (batch, time, vocab_size), the head tied to the embedding

@torch.no_grad()
def generate(model: GPT, ids: Tensor, length: int, temperature: float = 0.8, top_k: int = 50,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue token numbers ids (batch, time) by `length` sampled tokens: (batch, time + length)."""
    for _ in range(length):
        logits = model(ids[:, -model.config.context:])[:, -1].float() / temperature  # (batch, vocab_size)
        best, tokens = logits.topk(min(top_k, logits.shape[-1]))
        # Drawn on the CPU, so that one seed gives one text on every device.
        choice = torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        ids = torch.cat((ids, tokens.gather(-1, choice)), dim=1)
    return ids
