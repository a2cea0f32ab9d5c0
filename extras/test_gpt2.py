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

BYTES = data.train_tokenizer([], 300)  # a token is a byte
OTHERS = {"activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-12}
OTHERS |= {"scale_attn_weights": False, "tie_word_embeddings": False, "model_type": "gpt_neo"}
OTHERS |= {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A random GPT2LMHeadModel, which is also in the folder `tiny`."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_layer": 2, "n_head": 3, "n_embd": 12}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=7)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained("tiny")
    BYTES.save("tiny/tokenizer.json")
    return model


def save_weights(weights: dict) -> None:
    Path("tiny/model.safetensors").unlink(missing_ok=True)
    torch.save(weights, "tiny/pytorch_model.bin")


def change_config(**changes) -> None:
    path = Path("tiny/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal() -> str:
    with pytest.raises(ValueError, match="^--base gpt2:tiny: ") as error:
        train.open_base("gpt2:tiny")
    assert "\n" not in str(error.value) and "; give gpt2:FOLDER with " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("files", ["new", "old"])
def test_logits_are_those_of_transformers(theirs, files):
    if files == "old":
        masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.ones(1)}
        save_weights(theirs.transformer.state_dict() | masks)
    gpt, _ = train.open_base("gpt2:tiny")
    ids = torch.randint(300, (3, 16))
    torch.testing.assert_close(gpt(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", OTHERS)
def test_other_functions_are_refused_by_key(theirs, key):
    change_config(n_inner=48, reorder_and_upcast_attn=True)  # which compute the same
    train.open_base("gpt2:tiny")
    change_config(**{key: OTHERS[key]})
    assert f"config.json has {key} {OTHERS[key]}, and only" in refusal()


def test_other_files_are_refused_by_name(theirs):
    weights = theirs.state_dict()
    save_weights(weights | {"score.weight": torch.ones(2, 12)})
    assert "score.weight is missing, or not GPT-2's" in refusal()
    save_weights(weights | {"lm_head.weight": torch.ones(300, 12)})
    assert "lm_head.weight is missing, or not GPT-2's" in refusal()
    save_weights({name: weights[name] for name in weights if "h.1.mlp.c_fc.bias" not in name})
    assert "transformer.h.1.mlp.c_fc.bias is missing" in refusal()
    larger = data.open_tokenizer(BYTES.to_str())
    larger.add_tokens([f"word {i}" for i in range(99)])
    save_weights(weights)
    larger.save("tiny/tokenizer.json")
    assert "its tokenizer has more tokens than its model" in refusal()


def test_missing_folder_network_or_package(theirs, monkeypatch):
    def offline(*_):
        raise OSError("no route\nto the host")

    with pytest.raises(ValueError, match="^--base gpt2:nowhere: there is no such folder"):
        train.open_base("gpt2:nowhere")
    monkeypatch.setattr("transformers.GPT2Config.get_config_dict", offline)
    assert "gpt2:tiny: no route; " in refusal()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^--base gpt2-xl: needs transformers; pip install"):
        train.open_base("gpt2-xl")


@pytest.mark.parametrize("name", ["</s>", "<over>"])
def test_another_end_token_is_found(theirs, name):
    other = data.Tokenizer.from_str(BYTES.to_str().replace("<|endoftext|>", name))
    other.enable_truncation(4)  # both are forgotten
    other.enable_padding(length=64)
    other.save("tiny/tokenizer.json")
    if name == "<over>":  # only config.json knows what ends a text
        change_config(eos_token_id=10_000)
        assert "its tokenizer has no token that ends a text" in refusal()
        change_config(eos_token_id=0)
    tokenizer = train.open_base("gpt2:tiny")[1]
    assert data.end_token(tokenizer) == 0
    for text in ("the rank grows", "<|endoftext|>"):  # whose letters are no end token
        assert tokenizer.encode(text).ids == BYTES.encode(text).ids
