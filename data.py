"""Text in, batches out: bytes -> documents -> tokens -> (inputs, targets).

Two corpora and a task come with every Python, so that nothing is downloaded: `code`, the standard library's sources, on
which the base model is pretrained; `prose`, the language reference behind help("assert"), to which it is adapted; and
`modules`, docstrings to be told apart by the package they come from. Any UTF-8 text file serves as well, and any .tsv
file in GLUE's layout.
"""
import ast
import contextlib
import csv
import hashlib
import itertools
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from triadapt import need, needing

CACHE = Path("cache")
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train",) * 8 + ("val", "test")                  # document i is for SPLITS[i % 10]
TASK_SPLITS = ("train", "val", "test", "train", "train")  # so is, in each class, source i of texts, the largest first
EVAL_EXAMPLES = 512  # an evaluation reads no more windows or texts of a split, so that it takes seconds
NO_TARGET = -100  # what cross_entropy leaves out
# Not source that a person wrote to be read: tests, generated tables, installed packages.
NOT_CODE = re.compile(r"tests?|idle_test|(site|dist)-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*")

@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when the block ends: the file is there whole, or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    os.replace(temporary, path)

def save(path: Path, content: str | dict) -> None:
    """Write a text, or what torch.save takes."""
    with whole(path) as temporary:
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)

def load(path: Path, *keys: str) -> dict:
    """A .pt file with these keys: tensors and plain values only, so that nothing in it can run."""
    with needing(f"{path}: missing, damaged, or not written by train.py"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in keys or content}

def read_lines(path: Path, option: str) -> Iterator[str]:
    """The lines of a UTF-8 file of any size, longer ones in parts of 64 Ki characters. Raises InputError without it."""
    with needing(f"{option} {path}: not a UTF-8 file; convert it with iconv, or see --help for what else to give"):
        with open(path, encoding="utf-8") as file:
            yield from iter(lambda: file.readline(1 << 16), "")

def code_files() -> Iterator[tuple[Path, str]]:
    """(path, text) of every source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        path = path.relative_to(root)
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.parts):
            yield path, (root / path).read_text(encoding="utf-8", errors="replace")

def documents(name: str) -> Iterator[str]:
    """The documents of `code`, of `prose`, or of the text file `name`, whose pieces have whole lines."""
    if name == "code":
        yield from (text for _, text in code_files())
    elif name == "prose":
        # Each paragraph once, as a repeat could leak into the test split; 20 a document.
        paragraphs = [*dict.fromkeys(p.strip("\n") for topic in sorted(topics) for p in topics[topic].split("\n\n"))]
        yield from ("\n\n".join(paragraphs[i:i + 20]) for i in range(0, len(paragraphs), 20))
    else:
        piece = ""
        for line in read_lines(Path(name), "--data"):
            piece += line
            if len(piece) > min(1 << 16, os.path.getsize(name) // 40):  # at least 40 documents
                yield piece
                piece = ""
        if piece:
            yield piece

def text_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]

def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's: it has every byte, so no text is unknown to it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())

class Windows:
    """A text as a sequence of (inputs, targets), each (context,), int64: windows that begin `stride` tokens apart."""

    def __init__(self, tokens: np.ndarray, context: int, stride: int):
        self.tokens, self.context, self.stride = tokens, context, stride

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.context, self.stride))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[i * self.stride:i * self.stride + self.context + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])

def text_examples(name: str, tokenizer: Tokenizer, context: int) -> tuple[dict[str, Windows], list]:
    """({split: windows}, no classes) of a corpus. In training they begin anywhere, in evaluation they do not overlap.

    The tokens are memory-mapped from the cache, under a name that hashes text and tokenizer; made there at need.
    Raises InputError when a split is not longer than one context.
    """
    examples, end = {}, tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    key = text_hash(itertools.chain([tokenizer.to_str()], documents(name)))
    for split in dict.fromkeys(SPLITS):
        path = CACHE / f"tokens-{key}-{split}.bin"
        if not path.exists():
            with whole(path) as temporary, open(temporary, "wb") as file:
                for document in (text for i, text in enumerate(documents(name)) if SPLITS[i % 10] == split):
                    ids = tokenizer.encode(document, add_special_tokens=False).ids + [end]
                    file.write(np.array(ids, dtype).tobytes())
        size = path.stat().st_size // dtype().itemsize
        need(size > context, f"--data {name}: its {split} split has {size} tokens, shorter than one context of "
             f"{context} + 1; give a longer text")
        examples[split] = Windows(np.memmap(path, dtype, "r"), context, 1 if split == "train" else context)
    return examples, []

def task_examples(name: str, tokenizer: Tokenizer, context: int) -> tuple[dict[str, list], list[str]]:
    """({split: [(inputs, targets)]}, classes) of texts to classify; inputs and targets are (time,), int64.

    A text is cut to the context and closed by an end token, where the model has read all of it: there the target is the
    number of its class, and everywhere else NO_TARGET. Raises InputError for too few texts or classes.
    """
    rows = module_rows() if name == "modules" else table_rows(Path(name))
    sources = {text: (label, source) for text, label, source in rows}  # each text once
    classes = sorted({label for label, _ in sources.values()})
    deals = {label: itertools.cycle(TASK_SPLITS) for label in classes}
    splits = {source: next(deals[source[0]]) for source, _ in Counter(sources.values()).most_common()}
    examples, end = {split: [] for split in TASK_SPLITS}, tokenizer.token_to_id(END_OF_TEXT)
    for text, source in sources.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:context - 1]
        targets = [NO_TARGET] * len(ids) + [classes.index(source[0])]
        examples[splits[source]].append((torch.tensor(ids + [end]), torch.tensor(targets)))
    for texts in examples.values():
        random.Random(0).shuffle(texts)
    need(len(classes) > 1 and all(examples.values()), f"--task {name}: {len(sources)} different texts of {len(classes)} "
         "classes are too few; give 2 classes or more, of 3 texts or more")
    return examples, classes

def collate(examples: Sequence, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of some examples, each (batch, time of the longest), on the CPU.

    What fills the shorter ones stands behind them, where causal attention never looks, and has NO_TARGET.
    """
    inputs, targets = zip(*(examples[i] for i in numbers))
    return pad_sequence(inputs, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=NO_TARGET)

def training_batch(examples: Sequence, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, a function of (seed, step) alone: resuming needs no position."""
    return collate(examples, np.random.default_rng((seed, step)).integers(len(examples), size=size))

def batches(examples: Sequence, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out examples in order, EVAL_EXAMPLES at most."""
    numbers = range(min(len(examples), EVAL_EXAMPLES))
    for i in numbers[::size]:
        yield collate(examples, numbers[i:i + size])

def table_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(text, label, text) of a .tsv file with a header as GLUE's: label, sentence or text, and perhaps sentence2."""
    reader = csv.DictReader(read_lines(path, "--task"), delimiter="\t", quoting=csv.QUOTE_NONE)
    with needing(f"--task {path}: not a table with columns named label and sentence, and a tab between"):
        columns = {"sentence", "sentence1", "text", "sentence2"} & {*reader.fieldnames}
        for row in reader:
            text = END_OF_TEXT.join(row[name] for name in sorted(columns))
            yield text, row["label"].strip(), text

def module_rows() -> Iterator[tuple[str, str, str]]:
    """(docstring, package, file) of the 8 packages in the standard library that hold the most docstrings."""
    rows = {}
    for path, text in code_files():
        for node in ast.walk(ast.parse(text)) if len(path.parts) > 1 else []:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (docstring := ast.get_docstring(node)):
                rows[docstring] = (path.parts[0], str(path))
    largest = Counter(package for package, _ in rows.values()).most_common(8)
    yield from ((text, *row) for text, row in rows.items() if row[0] in dict(largest))
