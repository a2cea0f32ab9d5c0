"""Published GPT-2 as the base, read by transformers.

python -m extras --base gpt2                      # or gpt2-medium, gpt2-large, gpt2-xl
python -m extras --base gpt2:FOLDER               # fine-tuned: config.json, weights, tokenizer.json

The weights become those of model.GPT, and the logits are the same. If the token that ends a text
is not <|endoftext|>, tokenizer_config.json must name it as eos_token.
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
    try:
        source = Path(folder).resolve(strict=True) if folder else f"openai-community/{name}"
        return load_gpt2(source)
    except Exception as error:  # a package, a network or a file can fail in many ways
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        needs = "needs pip install transformers, and plain GPT-2 from the network or gpt2:FOLDER"
        raise ValueError(f"{base}: {reason:.200}; {needs}") from error


def load_gpt2(source: str | Path) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer. Fails if model.GPT would compute something else."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # slow to import

    config, _ = GPT2Config.get_config_dict(source)
    size = GPT2Config.from_dict(config)
    for key, values in (FIXED | {"n_inner": [4 * size.n_embd, None]}).items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"config.json has {key} {config[key]}, and only {values[0]} works")
    theirs, report = GPT2LMHeadModel.from_pretrained(source, output_loading_info=True)
    if report["missing_keys"] or not theirs.lm_head.weight.equal(theirs.transformer.wte.weight):
        raise ValueError("some weights are missing, or lm_head is not wte")
    gpt = GPT(GPTConfig(size.vocab_size, size.n_positions, size.n_layer, size.n_head, size.n_embd))
    gpt.load_state_dict(convert(theirs.transformer.state_dict()))

    wrapper = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer = wrapper.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    json = tokenizer.to_str()
    if data.END_OF_TEXT not in wrapper.get_vocab():
        json = json.replace(f'"{wrapper.eos_token}"', f'"{data.END_OF_TEXT}"')
    return gpt, data.open_tokenizer(json)


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


for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
    BASES[name] = partial(open_gpt2, name)
