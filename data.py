"""Text in, batches out: bytes -> documents -> tokens -> windows.

Two corpora come with every Python, so that nothing is downloaded: `code`, the standard library's sources, on which the
base model is pretrained, and `prose`, the language reference behind help("assert"), to which it is adapted. Any UTF-8
text file serves as well. Of every ten documents, the ninth is for validation and the tenth for testing. Tokens are
cached on disk under a name that hashes the text and the tokenizer.
"""
import contextlib
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from triadapt import InputError

CACHE = Path("cache")
SPLITS, END_OF_TEXT = ("train", "val", "test"), "<|endoftext|>"
EVAL_WINDOWS = 256  # an evaluation reads no more of a split, so that it takes seconds on any text
# Not source that a person wrote to be read: tests, generated tables, installed packages.
NOT_CODE = re.compile(r"tests?|idle_test|(site|dist)-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*")

def save(path: Path, content: str | dict) -> None:
    """Write a text, or what torch.save takes, under a temporary name and rename it: the file is there whole, or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)

def load(path: Path, *keys: str) -> dict:
    """A .pt file that save wrote, with these keys: tensors and plain values only, so that nothing in it can run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in keys}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise InputError(f"{path}: damaged, or not written by train.py ({type(error).__name__})") from None

def code_documents() -> Iterator[str]:
    """Every source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")

def prose_documents() -> Iterator[str]:
    """The language reference, 20 paragraphs a piece, each paragraph once: a repeat could leak into the test split."""
    paragraphs = [*dict.fromkeys(p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))]
    for i in range(0, len(paragraphs), 20):
        yield "\n\n".join(paragraphs[i:i + 20])

def file_documents(path: Path) -> Iterator[str]:
    """A UTF-8 text file of any size, in about 40 pieces of whole lines; of 64 Ki characters if it is large.

    Raises InputError when the file is missing or not UTF-8.
    """
    try:
        size = min(1 << 16, path.stat().st_size // 40 + 1)
        with open(path, encoding="utf-8") as file:
            while piece := file.read(size):
                yield piece + file.readline(size)
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 ({error.reason}); convert it, for example with iconv") from None
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror}; give a text file, or one of: prose, code") from None

def documents(name: str) -> Iterator[str]:
    """The documents of `code`, of `prose`, or of the text file `name`."""
    return {"code": code_documents, "prose": prose_documents}.get(name, lambda: file_documents(Path(name)))()

def text_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]

def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's: it has every byte, so no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer

def load_tokens(name: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """{split: token numbers} of a corpus, memory-mapped from the cache; made there document by document at need."""
    key = text_hash(itertools.chain([tokenizer.to_str()], documents(name)))
    paths = {split: CACHE / f"tokens-{key}-{split}.bin" for split in SPLITS}
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    if not all(path.exists() for path in paths.values()):
        CACHE.mkdir(exist_ok=True)
        end = tokenizer.token_to_id(END_OF_TEXT)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(f"{path}.{os.getpid()}", "wb")) for path in paths.values()]
            for i, document in enumerate(documents(name)):
                ids = tokenizer.encode(document, add_special_tokens=False).ids + [end]
                files[max(0, i % 10 - 7)].write(np.array(ids, dtype).tobytes())
        for file, path in zip(files, paths.values()):
            os.replace(file.name, path)
    # A file without bytes can't be mapped.
    return {split: np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
            for split, path in paths.items()}

class TextData:
    """Batches of a corpus: (inputs, targets), each (batch, context), int64, on the CPU.

    Raises InputError when a split is not longer than one context.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, context: int, batch_size: int, seed: int):
        self.tokens = load_tokens(name, tokenizer)
        self.context, self.batch_size, self.seed, self.batch_tokens = context, batch_size, seed, batch_size * context
        for split, ids in self.tokens.items():
            if len(ids) <= context:
                raise InputError(f"--data {name}: its {split} split has {len(ids)} tokens, shorter than one context of "
                                 f"{context} + 1; give a longer text")

    def _windows(self, split: str, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        windows = torch.from_numpy(self.tokens[split][starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The training batch of a step, a function of (seed, step) alone: resuming needs no position."""
        generator = np.random.default_rng((self.seed, step))
        starts = generator.integers(len(self.tokens["train"]) - self.context, size=self.batch_size)
        return self._windows("train", starts)

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The split in order, in windows that do not overlap, EVAL_WINDOWS at most."""
        starts = np.arange(0, len(self.tokens[split]) - self.context, self.context)[:EVAL_WINDOWS]
        for i in range(0, len(starts), self.batch_size):
            yield self._windows(split, starts[i:i + self.batch_size])
