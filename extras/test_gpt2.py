"""Tests of published GPT-2 as the base. transformers itself computes the expected logits."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import data
import extras.gpt2  # noqa: F401, because it fills train.BASES
import train

GPT2_OTHERS = {"activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-12}
GPT2_OTHERS |= {"scale_attn_weights": False, "tie_word_embeddings": False, "model_type": "gpt_neo"}
GPT2_OTHERS |= {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True}


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """A random GPT2LMHeadModel, which is also in the folder `tiny`, where a token is a byte."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_layer": 2, "n_head": 3, "n_embd": 12}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained("tiny")
    data.train_tokenizer([], 300).save("tiny/tokenizer.json")
    return model


def refuses_gpt2(base: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^--base {base}: .*{reason}.*; needs pip install"):
        train.open_base(base)


def test_gpt2_logits_are_those_of_transformers(gpt2):
    ids = torch.randint(300, (3, 16))
    logits = train.open_base("gpt2:tiny")[0](ids)
    torch.testing.assert_close(logits, gpt2(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", GPT2_OTHERS)
def test_other_gpt2_is_refused_by_key(gpt2, key):
    config = json.dumps(gpt2.config.to_dict() | {key: GPT2_OTHERS[key]})
    Path("tiny/config.json").write_text(config)
    refuses_gpt2("gpt2:tiny", f"config.json has {key} {GPT2_OTHERS[key]}, and only")


def test_missing_gpt2_weights_folder_or_package(gpt2, monkeypatch):
    weights = {name: w for name, w in gpt2.state_dict().items() if "h.1.mlp.c_fc.bias" not in name}
    gpt2.save_pretrained("tiny", state_dict=weights)
    refuses_gpt2("gpt2:tiny", "some weights are missing")
    gpt2.lm_head.weight = torch.nn.Parameter(torch.ones(300, 12))
    gpt2.save_pretrained("tiny")
    refuses_gpt2("gpt2:tiny", "lm_head is not wte")
    refuses_gpt2("gpt2:nowhere", "No such file or directory: 'nowhere'")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses_gpt2("gpt2-xl", "import of transformers halted")


def test_gpt2_tokenizer_forgets_truncation_and_names_its_end(gpt2):
    tokens = Path("tiny/tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    other = data.Tokenizer.from_str(tokens)
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.save("tiny/tokenizer.json")
    Path("tiny/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    _, tokenizer = train.open_base("gpt2:tiny")
    assert data.end_token(tokenizer) == 0
    assert len(tokenizer.encode("<|endoftext|></s>").ids) == 17  # letters that end no text
