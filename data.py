"""Text in, batches out: bytes -> documents -> tokens -> examples -> (inputs, targets). An example is (2, time), integers.

Nothing is downloaded, as every Python brings: `code`, the standard library's sources, on which the base is pretrained;
`prose`, the language reference behind help("assert"), to which it is adapted; and `modules`, docstrings to be told
apart by package. A UTF-8 text, or a .tsv in GLUE's layout, serves too.
"""

import ast
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
from torch import Tensor, nn
from triadapt import need, needing

PROCESS, WORLD = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # set by torchrun
CACHE = Path("cache")
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train",) * 8 + ("val", "test")  # document i is for SPLITS[i % 10]
TASK_SPLITS = (
    "train",
    "val",
    "test",
    "train",
    "train",
)  # in each class, the source with the i-th most texts likewise
NO_TARGET = -100  # what cross_entropy leaves out
# Not source that a person wrote to be read: tests, generated tables, installed packages.
NOT_CODE = re.compile(
    r"tests?|idle_test|(site|dist)-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*"
)


def save(path: Path, content: dict | Iterable[bytes], anew: bool = True) -> None:
    """Write what torch.save takes, or pieces of bytes, in the first process; the others wait. The file gets a temporary
    name first: it is there whole, or not. anew: also where there is one already."""
    if PROCESS == 0 and (anew or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            torch.save(content, file) if isinstance(content, dict) else file.writelines(content)
        os.replace(temporary, path)
    if WORLD > 1:
        torch.distributed.barrier()


def load(path: Path, *keys: str) -> dict:
    """A .pt file with these keys: tensors and plain values only, so that nothing in it can run."""
    with needing(f"{path}: missing, damaged, or not written by train.py"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in keys or content}


def code_files() -> Iterator[tuple[Path, str]]:
    """(path, text) of every source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        path = path.relative_to(root)
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.parts):
            yield path, (root / path).read_text(encoding="utf-8", errors="replace")


def documents(name: str) -> Iterator[str]:
    """The documents of `code`, of `prose`, or of a UTF-8 file of any size: whole lines, about 40 pieces or more."""
    if name == "code":
        yield from (text for _, text in code_files())
    elif name == "prose":
        # Each paragraph once, as a repeat could leak into the test split; 20 a document.
        paragraphs = [
            *dict.fromkeys(
                p.strip("\n") for topic in sorted(topics) for p in topics[topic].split("\n\n")
            )
        ]
        yield from ("\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20))
    else:
        with (
            needing(f"--data {name}: not a UTF-8 file; try iconv, or see --help"),
            open(name, encoding="utf-8") as file,
        ):
            size = min(1 << 16, os.path.getsize(name) // 60 + 1)
            yield from iter(lambda: file.read(size) + file.readline(size), "")


def text_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's: it has every byte, so no text is unknown to it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return Tokenizer.from_str(tokenizer.to_str())


def text_examples(name: str, tokenizer: Tokenizer, context: int) -> tuple[dict[str, Tensor], list]:
    """({split: windows (n, 2, context)}, no classes). In training they begin anywhere, else they don't overlap. Tokens are
    memory-mapped, from a cache named by text and tokenizer. Raises InputError if a split is not longer than a context."""
    examples, dtype = {}, np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    key = text_hash(itertools.chain([tokenizer.to_str()], documents(name)))
    for split in dict.fromkeys(SPLITS):
        path = CACHE / f"tokens-{key}-{split}.bin"
        texts = (
            text + END_OF_TEXT for i, text in enumerate(documents(name)) if SPLITS[i % 10] == split
        )
        save(
            path,
            (np.array(tokenizer.encode(text).ids, dtype).tobytes() for text in texts),
            anew=False,
        )
        size, stride = path.stat().st_size // dtype().itemsize, 1 if split == "train" else context
        need(
            size > context,
            f"--data {name}: its {split} split has {size} tokens, fewer than one context of {context} + 1",
        )
        tokens = torch.from_numpy(np.memmap(path, dtype, "c"))
        # A view that reads nothing yet: of each window of context + 1 tokens the first and the last `context`.
        examples[split] = tokens.unfold(0, context + 1, stride).unfold(1, context, 1)
    return examples, []


def task_examples(
    name: str, tokenizer: Tokenizer, context: int
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """({split: [(2, time)]}, classes). A text is cut to the context and closed by an end token, where the model has read it:
    there the target is the number of its class, elsewhere NO_TARGET. Raises InputError for too few texts or classes."""
    rows = module_rows() if name == "modules" else table_rows(name)
    classes = sorted({label for label, _ in rows.values()})
    deals = {label: itertools.cycle(TASK_SPLITS) for label in classes}
    splits = {source: next(deals[source[0]]) for source, _ in Counter(rows.values()).most_common()}
    examples, end = {split: [] for split in TASK_SPLITS}, tokenizer.token_to_id(END_OF_TEXT)
    for text, row in rows.items():
        ids = tokenizer.encode(text).ids[: context - 1]
        targets = [NO_TARGET] * len(ids) + [classes.index(row[0])]
        examples[splits[row]].append(torch.tensor([ids + [end], targets]))
    for split in examples.values():
        random.Random(0).shuffle(split)
    need(
        len(classes) > 1 and all(examples.values()),
        f"--task {name}: {len(rows)} different texts of {len(classes)} "
        "classes are too few; give 2 classes or more, of 3 texts or more",
    )
    return examples, classes


def table_rows(name: str) -> dict[str, tuple[str, str]]:
    """{text: (label, text)} of a .tsv file with a header as GLUE's: label, sentence or text, and perhaps sentence2."""
    with (
        needing(f"--task {name}: not a UTF-8 table of label and sentence, with tabs"),
        open(name, encoding="utf-8") as file,
    ):
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = sorted({"sentence", "sentence1", "text", "sentence2"} & {*reader.fieldnames})
        return {
            (text := END_OF_TEXT.join(row[name] for name in columns)): (row["label"].strip(), text)
            for row in reader
        }


def module_rows() -> dict[str, tuple[str, str]]:
    """{docstring: (package, file)} of the 8 packages in the standard library that hold the most docstrings."""
    rows = {}
    for path, text in code_files():
        for node in ast.walk(ast.parse(text)) if len(path.parts) > 1 else []:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                docstring := ast.get_docstring(node)
            ):
                rows[docstring] = (path.parts[0], str(path))
    largest = Counter(package for package, _ in rows.values()).most_common(8)
    return {text: row for text, row in rows.items() if row[0] in dict(largest)}


def batch(examples: Sequence[Tensor], numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of the examples with these numbers, each (batch, time of the longest), int64, on the CPU.
    What fills the shorter ones stands behind them, where causal attention never looks, and has NO_TARGET."""
    pairs = [examples[i].long().t() for i in numbers]  # (time, 2)
    inputs, targets = nn.utils.rnn.pad_sequence(
        pairs, batch_first=True, padding_value=NO_TARGET
    ).unbind(-1)
    return inputs.clamp(min=0), targets
