"""Text as bytes, packed into rows of the context length with segment ids.

A file is a document. One longer than the context is cut into pieces of the context length; what is left of it and all
shorter documents are packed into rows by best fit, longest first (arXiv:2404.10830: no document is cut without need).
A batch is a pure function of the step, so the step is all there is to know of the data position.
"""

import bisect
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

VOCAB_SIZE = 256
"""Tokens are bytes."""

NO_TARGET = -1
"""The target of padding and of the last byte of a document: no loss is taken there."""

_HEAD_BYTES = 8192
# Installed packages, tests, and the generated tables of character encodings.
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


@dataclass(frozen=True)
class Document:
    """A file whose bytes are one document; `name` is what identifies it, `size` its length in bytes."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `fingerprint` (hex) covers each one's name, size and first 8 KiB."""

    documents: tuple[Document, ...]
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        return sum(document.size for document in self.documents)


@dataclass(frozen=True)
class Piece:
    """`length` bytes of document number `document`, from byte `start`."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Rows in natural order. `segment_ids` count the pieces of a row from 1, 0 is padding; targets are `NO_TARGET`
    where there is no next byte."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]


def standard_library() -> Corpus:
    """The source files of this Python's own standard library: text that every Python has.

    Left out are its tests and what a program wrote: tables of encodings, and the settings of this Python's own build.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path.relative_to(root) for path in _walk(root) if path.suffix == ".py")
    names = (n for n in sources if not _LEFT_OUT_FOLDERS & set(n.parts) and not n.name.startswith("_sysconfigdata"))
    return _corpus(((root / name, name.as_posix()) for name in names), f"the standard library in {root}")


def read_corpus(paths: Sequence[Path]) -> Corpus:
    """The documents in files and folders. Folders are read in sorted order, without hidden and binary files.

    Raises:
        ValueError: a path that does not exist or cannot be read, or nothing to train on in all of them.
    """
    return _corpus(_named_files(paths), ", ".join(str(path) for path in paths))


def _named_files(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    for path in paths:
        if path.is_dir():
            yield from ((file, file.relative_to(path).as_posix()) for file in _walk(path) if not _is_binary(file))
        elif path.exists():
            yield path, path.name
        else:
            raise ValueError(f"data path {str(path)!r} does not exist")


def _walk(folder: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename!r}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in visible if path.is_file())


def _is_binary(path: Path) -> bool:
    # A zero byte near the start, as git judges it.
    return b"\0" in _read(path, 0, _HEAD_BYTES)


def _read(path: Path, start: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _corpus(named_files: Iterable[tuple[Path, str]], where: str) -> Corpus:
    documents = []
    digest = hashlib.sha256()
    try:
        for path, name in named_files:
            head = _read(path, 0, _HEAD_BYTES)
            size = path.stat().st_size
            if size < 2:  # a single byte has no next byte to predict
                continue
            documents.append(Document(path, name, size))
            digest.update(f"{name}\0{size}\0".encode())
            digest.update(head)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename!r}: {error.strerror}") from error
    if not documents:
        raise ValueError(f"no text to train on in {where}: give files or folders with at least 2 bytes of text")
    return Corpus(tuple(documents), digest.hexdigest())


def pack(sizes: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Rows of at most `seq_len` bytes that together hold every byte of documents of these sizes once."""
    rows: list[list[Piece]] = []
    short: list[Piece] = []
    for document, size in enumerate(sizes):
        for start in range(0, size - seq_len + 1, seq_len):
            rows.append([Piece(document, start, seq_len)])
        if size % seq_len:
            short.append(Piece(document, size - size % seq_len, size % seq_len))
    short.sort(key=lambda piece: -piece.length)
    # (free bytes, row) in ascending order, so that the first entry with room enough is the best fit.
    free: list[tuple[int, int]] = []
    for piece in short:
        place = bisect.bisect_left(free, (piece.length, 0))
        if place == len(free):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room, row = free.pop(place)
        rows[row].append(piece)
        if room > piece.length:
            bisect.insort(free, (room - piece.length, row))
    return rows


class PackedText:
    """Batches of packed rows of a corpus, shuffled anew in each epoch.

    Args:
        corpus: the documents.
        seq_len: bytes per row.
        batch_size: rows per batch.
        seed: of the order of rows.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int):
        self.corpus = corpus
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.rows = pack([document.size for document in corpus.documents], seq_len)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0; always the same one for the same arguments.

        Raises:
            ValueError: a file cannot be read any more, or has become shorter.
        """
        shape = (self.batch_size, self.seq_len)
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        targets = np.full(shape, NO_TARGET, np.int32)
        for index in range(self.batch_size):
            epoch, place = divmod(step * self.batch_size + index, len(self.rows))
            column = 0
            for segment, piece in enumerate(self.rows[self._order(epoch)[place]], start=1):
                text = self._bytes(piece)
                end = column + piece.length
                tokens[index, column:end] = text[: piece.length]
                targets[index, column : column + len(text) - 1] = text[1:]
                segment_ids[index, column:end] = segment
                column = end
        return Batch(tokens, targets, segment_ids)

    def _bytes(self, piece: Piece) -> np.ndarray:
        """The bytes of a piece, and the one after it if the document goes on: the target of the last."""
        document = self.corpus.documents[piece.document]
        length = min(piece.length + 1, document.size - piece.start)
        text = _read(document.path, piece.start, length)
        if len(text) < length:
            raise ValueError(
                f"{str(document.path)!r} has become shorter since training began (it had {document.size} bytes): "
                "restore it, or start a new run"
            )
        return np.frombuffer(text, np.uint8)
