"""GPT-2, small or as published: the model to adapt. It knows nothing of adapters.

It is GPT-2 to the last constant, but for dropout: learned positions, layer norm before each
sub-layer, tanh GELU, a head tied to the token embedding. q, k and v are three Linears instead of
one c_attn, so that each of a block's six matrices can be adapted, grown and named:
blocks.0.q, .k, .v, .o, .fc and .proj.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """Sizes. The defaults suit 90 s of pretraining on two CPU cores: a wider model sees less text
    in that time and ends worse."""

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
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln = nn.LayerNorm(config.width)
        self.classify(config.classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o.weight", "proj.weight")):
                # GPT-2 starts the matrices that write to the residual stream smaller, as the
                # terms of 2 x layers of them add up there.
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def classify(self, classes: int) -> None:
        """Become a classifier with a new head, which starts at zero; or, at 0 classes, a language
        model again, with the head tied to the embedding."""
        self.config = replace(self.config, classes=classes)
        self.head = None
        if classes > 0:
            self.head = nn.Parameter(self.wte.weight.new_zeros(classes, self.config.width))

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers (batch, time), time <= context -> logits (batch, time, vocab_size), or of
        a classifier (batch, time, classes)."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)  # (batch, time, width)
        head = self.wte.weight if self.head is None else self.head
        return nn.functional.linear(self.ln(x), head)


@torch.no_grad()
def generate(
    model: GPT,
    ids: list[int],
    length: int = 60,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> list[int]:
    """`ids` and `length` tokens more, each drawn from the top_k likeliest."""
    # On the CPU, so that one seed gives one text on every device.
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([ids], device=model.wte.weight.device)  # (1, time)
    for _ in range(length):
        seen = text[:, -model.config.context :]
        logits = model(seen)[:, -1].float() / temperature  # (1, vocab_size)
        best, tokens = logits.topk(min(top_k, logits.shape[-1]))  # (1, top_k)
        choice = torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator)  # (1, 1)
        text = torch.cat((text, tokens.gather(-1, choice.to(tokens.device))), dim=1)
    return text[0].tolist()


# Published GPT-2.

GPT2_FILES = ["config.json", "tokenizer.json", "pytorch_model.bin"]

# What GPT can't compute otherwise. A key that config.json lacks has the first of these values.
GPT2_FIXED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
    "add_cross_attention": [False],
}


def load_gpt2(name: str) -> dict:
    """Published GPT-2 weights as {"config": sizes, "tokenizer": json, "model": state dict}.

    name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, to be downloaded once, or a folder with these
    files. Raises OSError or ValueError if they can't be had or used.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = download_gpt2(name)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights = folder / "pytorch_model.bin"
    if not weights.exists() and [*folder.glob("*.index.json")]:
        raise ValueError(f"base {name}: its weights are in several shards; save them as one file")
    for path in (folder / "config.json", folder / "tokenizer.json", weights):
        if not path.exists():
            raise FileNotFoundError(f"base {name}: {path.name} is missing in that folder")
        with path.open("rb") as file:
            if file.read(30).startswith(b"version https://git-lfs"):
                raise ValueError(f"base {name}: {path.name} only points to it; run git lfs pull")

    try:
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"base {name}: tokenizer.json is not UTF-8 text ({error})") from error
    try:
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = GPTConfig(
            vocab_size=sizes["vocab_size"],
            context=sizes["n_positions"],
            layers=sizes["n_layer"],
            heads=sizes["n_head"],
            width=sizes["n_embd"],
        )
        fixed = GPT2_FIXED | {"n_inner": [None, 4 * config.width]}
        unlike = {key for key in fixed if sizes.get(key, fixed[key][0]) not in fixed[key]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"base {name}: config.json does not give GPT-2's sizes ({error!r})"
        ) from error
    numbers = [config.vocab_size, config.context, config.layers, config.heads, config.width]
    if not all(isinstance(n, int) and n > 0 for n in numbers) or config.width % config.heads:
        raise ValueError(f"base {name}: config.json has sizes that no GPT-2 has: {config}")
    if unlike:
        key = min(unlike)
        raise ValueError(
            f"base {name}: config.json has {key} {sizes[key]}, and only {fixed[key][0]} works here"
        )
    return {
        "config": asdict(config),
        "tokenizer": tokenizer,
        "model": convert_gpt2(name, read_weights(weights)),
    }


def download_gpt2(name: str) -> Path:
    """The folder that the published files of this name were downloaded to."""
    remedy = f"give gpt2, or a folder that holds its {', '.join(GPT2_FILES)}"
    try:
        from huggingface_hub import snapshot_download  # slow to import, and seldom needed

        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=GPT2_FILES))
    except Exception as error:  # of many kinds: no network, no such name, not installed
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"base {name}: can't be downloaded ({reason}); {remedy}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file of weights, .bin or .safetensors; nothing in it can run."""
    try:  # torch.load tells the two apart, and needs the package safetensors for the second
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"base {path}: not weights that can be read ({reason})") from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"base {path}: holds something else than tensors by their names")
    return weights


def convert_gpt2(base: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names and layout as ours. Their matrices are (in, out), Linear's (out, in)."""
    renamed = {
        "transformer.": "",  # some files hold a GPT2LMHeadModel, some the GPT2Model in it
        "h.": "blocks.",
        "ln_f": "ln",
        "ln_": "ln",
        "attn.c_proj": "o",
        "mlp.c_": "",
    }
    state = {}
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        if name == "lm_head.weight" or tensor.dim() not in (1, 2):
            continue  # the tied head is the embedding; the causal masks are not trained
        if name.startswith(("wte", "wpe", "ln.")):
            state[name] = tensor
        elif not name.startswith("blocks"):
            raise ValueError(f"base {base}: {name} is of another kind of model; give a plain GPT-2")
        elif "attn.c_attn" in name:  # q, k and v in one: (width, 3 width), or its bias
            for ours, part in zip("qkv", tensor.chunk(3, dim=-1), strict=False):
                state[name.replace("attn.c_attn", ours)] = part.T if part.dim() == 2 else part
        else:
            state[name] = tensor.T if tensor.dim() == 2 else tensor
    if "wte.weight" not in state:
        raise ValueError(f"base {base}: its weights have no wte.weight, as GPT-2's have")
    if not torch.equal(weights.get("lm_head.weight", state["wte.weight"]), state["wte.weight"]):
        raise ValueError(f"base {base}: its lm_head is not the token embedding, as in GPT-2")
    return state
