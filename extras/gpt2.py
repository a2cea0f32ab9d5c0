"""Published GPT-2 as the base, read by transformers.

python -m extras --base gpt2                      # or gpt2-medium, gpt2-large, gpt2-xl
python -m extras --base gpt2:FOLDER               # fine-tuned: config.json, weights, tokenizer.json

The weights become those of model.GPT, and the logits are the same.
"""

from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

import data
from model import GPT, GPTConfig
from train import BASES

# Keys of config.json, and the values that model.GPT computes. The first one is the default.
FIXED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
    "add_cross_attention": [False],
}


def open_gpt2(name: str, folder: str, texts: list[str]) -> tuple[GPT, Tokenizer]:
    """load_gpt2, of a folder or else of a published name. A failure is a ValueError of one line."""
    base = f"--base {name}:{folder}" if folder else f"--base {name}"
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{base}: there is no such folder")
    try:
        return load_gpt2(folder or f"openai-community/{name}")
    except ImportError as error:
        raise ValueError(f"{base}: needs transformers; pip install transformers") from error
    except Exception as error:  # a network or a file can fail in many ways
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        files = "config.json, model.safetensors and tokenizer.json of a plain GPT-2"
        raise ValueError(f"{base}: {reason:.200}; give gpt2:FOLDER with {files}") from error


def load_gpt2(source: str) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer. Fails if model.GPT would compute something else."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import
    from transformers.utils import cached_file

    config, _ = GPT2Config.get_config_dict(source)
    size = GPT2Config.from_dict(config)
    for key, values in (FIXED | {"n_inner": [4 * size.n_embd, None]}).items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"config.json has {key} {config[key]}, and only {values[0]} works")
    theirs, report = GPT2LMHeadModel.from_pretrained(source, output_loading_info=True)
    odd = report["missing_keys"] | report["unexpected_keys"]
    odd = {key for key in odd if not key.endswith("masked_bias")}  # a constant of old files
    if odd or not theirs.lm_head.weight.equal(theirs.transformer.wte.weight):
        raise ValueError(f"{min(odd, default='lm_head.weight')} is missing, or not GPT-2's")
    tokenizer = Tokenizer.from_file(cached_file(source, "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() > size.vocab_size:
        raise ValueError("its tokenizer has more tokens than its model")
    ours = GPTConfig(size.vocab_size, size.n_positions, size.n_layer, size.n_head, size.n_embd)
    gpt = GPT(ours)
    gpt.load_state_dict(convert(theirs.transformer.state_dict()))
    return gpt, rename_end(tokenizer, config.get("eos_token_id"))


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and layout. GPT2Model's matrices are (in, out), those of Linear (out, in)."""
    renamed = {"h.": "blocks.", "ln_f": "ln", "ln_": "ln", "attn.c_proj": "o", "mlp.c_": ""}
    state = {}
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        if name.startswith("blocks") and tensor.dim() == 2:
            tensor = tensor.T
        if "attn.c_attn" in name:  # q, k and v in one
            for ours, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.c_attn", ours)] = part
        else:
            state[name] = tensor
    return state


def rename_end(tokenizer: Tokenizer, config_end: int | None) -> Tokenizer:
    """The tokenizer with its end token, which config.json may know, named as in the core."""
    known = None if config_end is None else tokenizer.id_to_token(config_end)
    names = [data.END_OF_TEXT, "</s>", "<eos>", known]
    end = next((name for name in names if name and tokenizer.token_to_id(name) is not None), None)
    if end is None:
        raise ValueError(f"its tokenizer has no token that ends a text, {data.END_OF_TEXT}")
    return data.open_tokenizer(tokenizer.to_str().replace(f'"{end}"', f'"{data.END_OF_TEXT}"'))


for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
    BASES[name] = partial(open_gpt2, name)
