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


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A random GPT2LMHeadModel, which is also in the folder `tiny`."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_layer": 2, "n_head": 3, "n_embd": 12}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained("tiny")
    BYTES.save("tiny/tokenizer.json")
    return model


def save_weights(weights: dict) -> None:
    """The weights in the older format."""
    Path("tiny/model.safetensors").unlink(missing_ok=True)
    torch.save(weights, "tiny/pytorch_model.bin")


def change_config(**changes) -> None:
    path = Path("tiny/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_tiny():
    return train.BASES["gpt2"]("tiny", [])


def refusal() -> str:
    with pytest.raises(ValueError, match="^--base gpt2:tiny: ") as error:
        open_tiny()
    return str(error.value)


@pytest.mark.parametrize("files", ["safetensors", "shards", "bin", "without prefix", "half"])
def test_logits_are_those_of_transformers(theirs, files):
    if files == "shards":
        Path("tiny/model.safetensors").unlink()
        theirs.save_pretrained("tiny", max_shard_size="10KB")
        assert len([*Path("tiny").glob("*.safetensors")]) > 1
    elif files == "bin":  # with the masks that old files hold
        masks = {"bias": torch.ones(1, 1, 16, 16), "masked_bias": torch.tensor(-1e4)}
        masks = {f"transformer.h.0.attn.{name}": mask for name, mask in masks.items()}
        save_weights(theirs.state_dict() | masks)
    elif files == "without prefix":
        save_weights(theirs.transformer.state_dict())
    elif files == "half":
        theirs.half().save_pretrained("tiny")
        theirs.float()
    gpt, tokenizer = open_tiny()
    ids = torch.randint(300, (3, 16))
    torch.testing.assert_close(gpt(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.encode("rank").ids == BYTES.encode("rank").ids


def test_gpt2_is_adapted(theirs, monkeypatch):
    monkeypatch.setattr(train, "draw_run", lambda log: b"")
    Path("t.txt").write_text("the rank of the core grows\n" * 200)
    line = "--base gpt2:tiny --data t.txt --device cpu --steps 60 --rank 2 --lr 0.02 --out out"
    log = train.main(line.split()).log
    assert log[-1]["test_loss"] < log[0]["test_loss"]
    assert log[-1]["total_rank"] == 2 * 12


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-12),
        ("n_inner", 40),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("model_type", "gpt_neo"),
    ],
)
def test_other_functions_are_refused_by_key(theirs, key, value):
    change_config(n_inner=48, reorder_and_upcast_attn=True)  # which compute the same
    open_tiny()
    change_config(**{key: value})
    assert f"config.json has {key} {value}, and only" in refusal()


def test_other_weights_are_refused_by_name(theirs):
    weights = theirs.state_dict()
    save_weights(weights | {"score.weight": torch.ones(2, 12)})
    assert "score.weight is of another kind of model" in refusal()
    save_weights(weights | {"lm_head.weight": torch.ones(300, 12)})
    assert "its lm_head is not the token embedding" in refusal()
    save_weights({name: weights[name] for name in weights if "h.1.mlp.c_fc.bias" not in name})
    assert "transformer.h.1.mlp.c_fc.bias is missing" in refusal()


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid 1", ""),
        ("model.safetensors", None, "no file named"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", '{"Ġ'.encode()[:3], ""),
        ("config.json", b'{"model_type": "gpt2", "n_head": 5}', ""),
    ],
)
def test_damaged_folders_are_one_line(theirs, file, content, reason):
    path = Path("tiny", file)
    path.unlink() if content is None else path.write_bytes(content)
    said = refusal()
    assert reason in said and "; give gpt2:FOLDER with its config.json" in said
    assert "\n" not in said


def test_a_larger_tokenizer_is_refused(theirs):
    larger = data.train_tokenizer([], 300)
    larger.add_tokens([f"word {i}" for i in range(320 - larger.get_vocab_size())])
    larger.save("tiny/tokenizer.json")
    assert "its tokenizer has 320 tokens and its model 300" in refusal()


def test_missing_folder_network_or_package(monkeypatch):
    def offline(*_):
        raise OSError("no route\nto the host")

    with pytest.raises(ValueError, match="^--base gpt2:nowhere: there is no such folder"):
        train.BASES["gpt2"]("nowhere", [])
    monkeypatch.setattr("transformers.GPT2Config.get_config_dict", offline)
    with pytest.raises(ValueError, match="^--base gpt2-xl: no route; give gpt2:FOLDER with its"):
        train.BASES["gpt2-xl"]("", [])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^--base gpt2: needs transformers; pip install"):
        train.BASES["gpt2"]("", [])


def test_truncation_and_padding_are_forgotten(theirs):
    text = "the rank of the core grows <|endoftext|> and more"
    again = data.Tokenizer.from_file("tiny/tokenizer.json")
    again.enable_truncation(4)
    again.enable_padding(length=64)
    again.save("tiny/tokenizer.json")
    tokenizer = open_tiny()[1]
    assert tokenizer.encode(text).ids == BYTES.encode(text).ids
    assert data.end_token(tokenizer) not in tokenizer.encode(text).ids


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<over>"])
def test_another_end_token_is_renamed(theirs, name):
    words = Path("tiny/tokenizer.json").read_text()
    other = data.Tokenizer.from_str(words.replace("<|endoftext|>", name))
    if name != "<over>":  # which is known only if it is the only special token
        other.add_special_tokens(["<pad>"])
    other.save("tiny/tokenizer.json")
    tokenizer = open_tiny()[1]
    assert data.end_token(tokenizer) == 0
    assert tokenizer.encode(f"rank {name}").ids[:5] == BYTES.encode("rank ").ids
    assert 0 not in tokenizer.encode("<|endoftext|>").ids


def test_no_end_token_is_refused(theirs):
    words = json.loads(Path("tiny/tokenizer.json").read_text().replace("<|endoftext|>", "<over>"))
    words["added_tokens"][0]["special"] = False
    Path("tiny/tokenizer.json").write_text(json.dumps(words))
    assert "its tokenizer has no token that ends a text" in refusal()
