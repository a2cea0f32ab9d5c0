"""A small GPT-2, the model to adapt. It knows nothing of adapters.

It has GPT-2's architecture without dropout: learned positions, layer norm before each sublayer and
tanh GELU. The output weights are the token embedding. Instead of one c_attn there are three
nn.Linear for q, k and v. So each block has six matrices that add_adapters can find by their names
and replace: blocks.0.q, .k, .v, .o, .fc and .proj.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """Sizes. The defaults are those of base.pt: about one million parameters."""

    vocab_size: int = 2048
    context: int = 128  # the longest input, in tokens
    layers: int = 4
    heads: int = 4
    width: int = 128  # of the residual stream


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.ln1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        x = x + self.attention(self.ln1(x))
        h = nn.functional.gelu(self.fc(self.ln2(x)), approximate="tanh")  # (batch, time, 4 width)
        return x + self.proj(h)

    def attention(self, x: Tensor) -> Tensor:
        """Causal self-attention: (batch, time, width) -> (batch, time, width)."""
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(x))
        v = self.split_heads(self.v(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, heads, time, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)  # tokens
        self.wpe = nn.Embedding(config.context, config.width)  # positions
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln = nn.LayerNorm(config.width)
        self.head = None  # a task may put a module here: (..., width) -> (..., outputs)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o.weight", "proj.weight")):
                # These add to the residual stream, 2 x layers times, so GPT-2 starts them smaller.
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, time), time <= context -> logits (batch, time, vocab_size), or what a
        task's head returns for each token."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)  # (batch, time, width)
        x = self.ln(x)
        if self.head is not None:
            return self.head(x)
        return nn.functional.linear(x, self.wte.weight)


@torch.no_grad()
def generate(
    model: GPT, ids: list[int], length: int = 60, temperature=0.8, top_k: int = 50, seed: int = 0
) -> list[int]:
    """`ids` and `length` more tokens, each sampled from the top_k most likely ones."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices sample alike
    text = torch.tensor([ids], device=model.wte.weight.device)  # (1, time)
    for _ in range(length):
        logits = model(text[:, -model.config.context :])[:, -1].float()  # (1, vocab_size)
        best, tokens = logits.topk(min(top_k, logits.shape[-1]))  # (1, top_k)
        probabilities = (best / temperature).softmax(-1).cpu()
        choice = torch.multinomial(probabilities, 1, generator=generator)  # (1, 1)
        text = torch.cat((text, tokens.gather(-1, choice.to(tokens.device))), dim=1)
    return text[0].tolist()
