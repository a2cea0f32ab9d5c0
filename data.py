"""Text in, batches out: bytes -> documents -> tokens -> windows.

Two corpora come with every Python, so that nothing is downloaded:

    code    the standard library's sources; the base model is pretrained on it
    prose   the language reference behind `help("assert")`; the base model is adapted to it

and any UTF-8 text file serves as a third. Of every ten documents, the ninth is for validation and the tenth
for testing. Tokens are cached on disk under a name that hashes the text and the tokenizer.
"""
import contextlib
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from triadapt import InputError

SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
CACHE = Path("cache")
# Not source that a person wrote to be read: tests, generated tables, installed packages.
NOT_CODE = re.compile(r"tests?|idle_test|site-packages|dist-packages|encodings|pydoc_data|_sysconfigdata.*|config-.*")


@contextlib.contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path` and rename it to `path` at the end: a file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def code_documents() -> Iterator[str]:
    """Every source file of the standard library, in sorted order: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not any(NOT_CODE.fullmatch(part.removesuffix(".py")) for part in path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def prose_documents() -> Iterator[str]:
    """The language reference, each paragraph once (topics repeat each other, and a repeat would leak into the
    test split), in pieces of about 4000 characters."""
    paragraphs = dict.fromkeys(p for name in sorted(topics) for p in topics[name].split("\n\n"))
    piece = ""
    for paragraph in paragraphs:
        piece += paragraph + "\n\n"
        if len(piece) >= 4000:
            yield piece
            piece = ""
    yield piece


def file_documents(path: Path) -> Iterator[str]:
    """A UTF-8 text file of any size, in pieces of whole lines: at least 40 of them, none above 64 Ki characters.

    Raises InputError when the file is missing, empty or not UTF-8.
    """
    try:
        size = min(1 << 16, path.stat().st_size // 40 + 1)
        with open(path, encoding="utf-8") as file:
            if not file.read(1):
                raise InputError(f"--data {path}: the file is empty; give a file with text")
            file.seek(0)
            while piece := file.read(size):
                yield piece + file.readline(size)
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 at byte {error.start} of a piece; convert it, for example with iconv")
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror}; give a readable text file, or one of: code, prose")


def corpus(name: str) -> Callable[[], Iterator[str]]:
    """The documents of `code`, `prose` or the text file called `name`, as a function that reads them afresh."""
    embedded = {"code": code_documents, "prose": prose_documents}
    return embedded.get(name, lambda: file_documents(Path(name)))


def text_hash(documents: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def load_tokenizer(documents: Callable[[], Iterator[str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the documents, or the cached one."""
    path = CACHE / f"tokenizer-{text_hash(documents())}-{vocab_size}.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(documents(), trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        with atomic(path) as temporary:
            tokenizer.save(str(temporary))
    return Tokenizer.from_file(str(path))


def load_tokens(documents: Callable[[], Iterator[str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """{split: token numbers}, memory-mapped from the cache; encoded document by document when they are not there."""
    key = text_hash(iter([text_hash(documents()), tokenizer.to_str()]))
    paths = {split: CACHE / f"tokens-{key}-{split}.bin" for split in SPLITS}
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    if not all(path.exists() for path in paths.values()):
        end = tokenizer.token_to_id(END_OF_TEXT)
        with contextlib.ExitStack() as stack:
            files = [open(stack.enter_context(atomic(path)), "wb") for path in paths.values()]
            for i, document in enumerate(documents()):
                ids = tokenizer.encode(document, add_special_tokens=False).ids
                files[max(0, i % 10 - 7)].write(np.array(ids + [end], dtype=dtype).tobytes())
            for file in files:
                file.close()
    # A file of no bytes can't be mapped; TextData says what is wrong with it.
    return {split: np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
            for split, path in paths.items()}


class TextData:
    """Batches of windows of context + 1 tokens: (inputs, targets), each (batch, context), int64 on the CPU.

    Raises InputError when a split is shorter than one window.
    """

    def __init__(self, tokens: dict[str, np.ndarray], context: int, batch_size: int, seed: int, name: str):
        for split, ids in tokens.items():
            if len(ids) <= context:
                raise InputError(f"--data {name}: {len(ids)} tokens in its {split} split, shorter than one context "
                                 f"({context + 1}); give a longer text")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.batch_tokens = batch_size * context

    def _windows(self, split: str, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        windows = self.tokens[split][starts[:, None] + np.arange(self.context + 1)]
        windows = torch.from_numpy(windows.astype(np.int64))  # (batch, context + 1)
        return windows[:, :-1], windows[:, 1:]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The training batch of a step. It depends on (seed, step) alone, so that a resumed run needs no reader state."""
        starts = np.random.default_rng((self.seed, step)).integers(
            len(self.tokens["train"]) - self.context, size=self.batch_size)
        return self._windows("train", starts)

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The whole split once, in order, in windows that do not overlap (a rest shorter than a window is left out)."""
        starts = np.arange(0, len(self.tokens[split]) - self.context, self.context)
        for i in range(0, len(starts), self.batch_size):
            yield self._windows(split, starts[i:i + self.batch_size])
