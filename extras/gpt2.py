"""Published GPT-2 as the base, read by transformers.

python -m extras --base gpt2                      # or gpt2-medium, gpt2-large, gpt2-xl
python -m extras --base gpt2:FOLDER               # fine-tuned: config.json, weights, tokenizer.json

The weights become those of model.GPT. Its logits are the same, so adapters, growth and merging are
those of the core.
"""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

import data
from model import GPT, GPTConfig
from train import BASES

# Keys of config.json that change the function, and the values that model.GPT computes. A key that
# is missing has the first of these values.
FIXED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
    "add_cross_attention": [False],
}


def load_gpt2(name: str, folder: str, texts: list[str]) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of a folder, or else of the published GPT-2 of this name.

    Raises ValueError if they are not available, or if model.GPT would compute something else.
    """
    base = f"--base {name}:{folder}" if folder else f"--base {name}"
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{base}: there is no such folder")
    source = folder or f"openai-community/{name}"

    with errors_in_one_line(base):
        from transformers import GPT2Config, GPT2LMHeadModel  # slow to import
        from transformers.utils import cached_file

        settings, _ = GPT2Config.get_config_dict(source)
        sizes = GPT2Config.from_dict(settings)
    for key, values in (FIXED | {"n_inner": [None, 4 * sizes.n_embd]}).items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(
                f"{base}: config.json has {key} {settings[key]}, and only {values[0]} works here"
            )

    with errors_in_one_line(base):
        theirs, report = GPT2LMHeadModel.from_pretrained(source, output_loading_info=True)
        tokenizer = Tokenizer.from_file(cached_file(source, "tokenizer.json"))
    masks = {key for key in report["unexpected_keys"] if key.endswith("masked_bias")}
    odd = report["missing_keys"] | report["unexpected_keys"] - masks
    if odd:
        what = "missing" if min(odd) in report["missing_keys"] else "of another kind of model"
        raise ValueError(f"{base}: {min(odd)} is {what}; give a plain GPT-2")
    if not theirs.lm_head.weight.equal(theirs.transformer.wte.weight):
        raise ValueError(f"{base}: its lm_head is not the token embedding; give a plain GPT-2")
    if tokenizer.get_vocab_size() > sizes.vocab_size:
        tokens = f"{tokenizer.get_vocab_size()} tokens and its model {sizes.vocab_size}"
        raise ValueError(f"{base}: its tokenizer has {tokens}; give those of one model")

    gpt = GPT(
        GPTConfig(sizes.vocab_size, sizes.n_positions, sizes.n_layer, sizes.n_head, sizes.n_embd)
    )
    gpt.load_state_dict(convert(theirs.transformer.state_dict()))
    return gpt, prepare(base, tokenizer)


@contextmanager
def errors_in_one_line(base: str):
    """Turns the errors of transformers into a ValueError of one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{base}: needs transformers; pip install transformers") from error
    except Exception as error:  # a network or a file can fail in many ways
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{base}: {reason:.200}; give gpt2:FOLDER with its config.json, model.safetensors and "
            "tokenizer.json"
        ) from error


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layout of a GPT2Model as ours. Its matrices are (in, out), those of Linear
    (out, in)."""
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


def prepare(base: str, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without settings of earlier calls, and its end token named as in the core."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    names = [data.END_OF_TEXT, "</s>", "<eos>", *(special if len(special) == 1 else [])]
    end = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
    if end is None:
        raise ValueError(f"{base}: its tokenizer has no token that ends a text, {data.END_OF_TEXT}")
    old, new = (json.dumps(name, ensure_ascii=False) for name in (end, data.END_OF_TEXT))
    return data.open_tokenizer(tokenizer.to_str().replace(old, new))


for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
    BASES[name] = partial(load_gpt2, name)
