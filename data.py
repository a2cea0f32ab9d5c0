"""Texts as batches of token ids, without any model.

Two corpora come with every Python, so nothing is downloaded:

    code     the sources of the standard library, on which base.pt was pretrained
    prose    the language reference behind help("assert"), to which it is adapted

A UTF-8 file works as well. A text becomes documents, their tokens in three splits, windows of
tokens as examples, and batches. Other kinds of data are entries in TASKS: see extras/tasks.py.
"""

import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

END_OF_TEXT = "<|endoftext|>"
NO_TARGET = -(2**24)  # marks positions without a target; -100 could be a target of a regression
SPLITS = ("train",) * 8 + ("val", "test")  # document i belongs to SPLITS[i % 10]

Example = tuple[Tensor, Tensor]  # inputs (time,) and targets (time,)


@dataclass
class Task:
    """Texts to continue. A subclass overrides what another kind of task does differently.

    texts: the documents. A base from scratch trains its tokenizer on them.
    """

    name: str
    texts: list[str]

    def examples(self, tokenizer: Tokenizer, context: int) -> dict[str, Sequence[Example]]:
        """{"train", "val" and "test": examples of at most `context` tokens}.

        Training windows begin at any token. Evaluation windows do not overlap.
        Raises ValueError if a split is not longer than a context.
        """
        tokens = {split: [] for split in SPLITS}
        for i, text in enumerate(self.texts):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens[SPLITS[i % 10]] += [*ids, end_token(tokenizer)]
        for split, ids in tokens.items():
            if len(ids) <= context:
                raise ValueError(
                    f"data {self.name}: only {len(ids)} tokens in its {split} split: give more text"
                )
        return {
            split: Windows(torch.tensor(ids, dtype=torch.int32), context, split == "train")
            for split, ids in tokens.items()
        }

    def add_head(self, model: nn.Module) -> None:
        """Put a head on the model, in place. Language modelling needs none."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of a batch: logits (batch, time, outputs), targets (batch, time). Here it
        is the negative log likelihood, in nats."""
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
        )

    def collect(self, logits: Tensor, targets: Tensor):
        """What `metrics` needs of each batch of a split. Language modelling needs nothing."""

    def metrics(self, loss: float, collected: list) -> dict[str, float]:
        """What is reported with the mean loss of a split. `collected` has one item per batch."""
        return {"perplexity": math.exp(min(loss, 700))}

    def sample(self, write, tokenizer: Tokenizer, examples: Sequence[Example]) -> str | None:
        """How the model continues a text (None for a task without text). write: ids -> more ids."""
        return tokenizer.decode(write(examples[0][0][:16].tolist()))


class Windows(Sequence):
    """Windows of `context` tokens. The targets of each are its tokens one position later."""

    def __init__(self, tokens: Tensor, context: int, overlap: bool):
        self.tokens = tokens  # (size,) int32
        self.context = context
        self.stride = 1 if overlap else context

    def __len__(self) -> int:
        return (len(self.tokens) - self.context - 1) // self.stride + 1

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)  # so that a for loop ends
        start = i * self.stride
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def batch(examples: Sequence[Example], indices: Iterable[int]) -> Example:
    """(inputs, targets) of these examples, (batch, longest time) each, on the CPU.

    Shorter examples are padded on the right, where causal attention never looks.
    """
    inputs, targets = zip(*(examples[i] for i in indices), strict=True)
    padded_targets = pad_sequence(targets, batch_first=True, padding_value=NO_TARGET)
    return pad_sequence(inputs, batch_first=True), padded_targets


# Folders and files that are left out: tests, generated tables, installed packages.
NOT_CODE = re.compile(
    r"tests?|idle_test|(site|dist)-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*"
)


def code_files() -> Iterator[tuple[Path, str]]:
    """(path, text) of each source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        path = path.relative_to(root)
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.parts):
            yield path, (root / path).read_text(encoding="utf-8", errors="replace")


def prose_documents(size: int = 20) -> list[str]:
    """The language reference, `size` paragraphs a document. Each paragraph comes once, because a
    repeated one could leak from training into the test split."""
    paragraphs = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs[paragraph.strip("\n")] = None
    paragraphs = list(paragraphs)
    return ["\n\n".join(paragraphs[i : i + size]) for i in range(0, len(paragraphs), size)]


def file_documents(path: Path) -> list[str]:
    """A UTF-8 file in about 60 pieces, so that each split gets some."""
    text = read_text(path)
    size = len(text) // 60 + 1
    return [text[i : i + size] for i in range(0, len(text), size)]


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte-order mark, its line ends unchanged."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data {path}: not UTF-8 text ({error}); convert it to UTF-8") from error


# What --data knows, by NAME or NAME:ARGUMENT: functions of the argument (here unused).
TASKS = {
    "prose": lambda argument: Task("prose", prose_documents()),
    "code": lambda argument: Task("code", [text for _, text in code_files()]),
}


def open_task(spec: str) -> Task:
    """The task of --data: NAME or NAME:ARGUMENT of TASKS, or else a UTF-8 file."""
    name, _, argument = spec.partition(":")
    if name in TASKS:
        return TASKS[name](os.path.expanduser(argument))
    if not Path(spec).is_file():
        raise ValueError(f"--data {spec}: not a file, and not one of {', '.join(TASKS)}")
    return Task(spec, file_documents(Path(spec)))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's. It has every byte, so it can encode every text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return open_tokenizer(tokenizer.to_str())


def open_tokenizer(json: str) -> Tokenizer:
    """A tokenizer from its JSON."""
    tokenizer = Tokenizer.from_str(json)
    tokenizer.encode_special_tokens = (
        True  # a text that contains "<|endoftext|>" does not end there
    )
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer of --base has no token {END_OF_TEXT}")
    return end
