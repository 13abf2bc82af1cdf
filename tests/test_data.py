"""Packing loses nothing, batches depend on the step alone, and unusable data is refused by name."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_jax.data import NO_TARGET, Corpus, PackedText, pack, read_corpus, standard_library

SEQ_LEN = 32


def _corpus(folder: Path, *texts: bytes) -> Corpus:
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text)
    return read_corpus([folder])


def _text(corpus: Corpus, batch_size: int = 1, seed: int = 0) -> PackedText:
    return PackedText(corpus, seq_len=SEQ_LEN, batch_size=batch_size, seed=seed)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 40))
def test_packing_holds_every_byte_once(sizes, seq_len):
    rows = pack(sizes, seq_len)
    held = sorted((piece.document, piece.start + i) for row in rows for piece in row for i in range(piece.length))
    assert held == [(document, i) for document, size in enumerate(sizes) for i in range(size)]
    assert all(sum(piece.length for piece in row) <= seq_len for row in rows)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(2, 40))
def test_only_documents_longer_than_the_context_are_cut(sizes, seq_len):
    pieces = [piece for row in pack(sizes, seq_len) for piece in row]
    for document, size in enumerate(sizes):
        assert sum(piece.document == document for piece in pieces) == -(-size // seq_len)
    # Best fit leaves at most one row half empty: two such rows would have been one.
    filled = [sum(piece.length for piece in row) for row in pack(sizes, seq_len)]
    assert sum(2 * length <= seq_len for length in filled) <= 1


def test_a_batch_holds_bytes_targets_and_segments(tmp_path):
    batch = _text(_corpus(tmp_path, b"hello", b"packed documents")).batch(0)
    # The longest first, then padding; the last byte of a document has no target.
    assert bytes(batch.tokens[0].astype(np.uint8)) == b"packed documents" + b"hello" + b"\0" * 11
    assert batch.segment_ids[0].tolist() == [1] * 16 + [2] * 5 + [0] * 11
    has_target = batch.targets[0] != NO_TARGET
    assert np.flatnonzero(~has_target).tolist() == [15, *range(20, 32)]
    assert bytes(batch.targets[0][has_target].astype(np.uint8)) == b"acked documents" + b"ello"
    assert {batch.tokens.dtype, batch.targets.dtype, batch.segment_ids.dtype} == {np.dtype(np.int32)}


def test_a_long_document_goes_on_in_the_target_of_its_pieces_last_byte(tmp_path):
    document = bytes(range(1, 80))
    text = _text(_corpus(tmp_path, document))
    batches = [text.batch(step) for step in range(3)]
    pieces = sorted(tuple(batch.tokens[0, batch.segment_ids[0] > 0]) for batch in batches)
    assert [byte for piece in pieces for byte in piece] == list(document)
    for batch in batches:
        trained = batch.targets[0] != NO_TARGET
        assert (batch.targets[0][trained] == batch.tokens[0][trained] + 1).all()
    assert sum(int((batch.targets != NO_TARGET).sum()) for batch in batches) == len(document) - 1


def test_an_epoch_has_every_row_once_and_the_next_another_order(tmp_path):
    text = _text(_corpus(tmp_path, *(bytes([i]) * SEQ_LEN for i in range(1, 21))), batch_size=2)
    first, second = ([int(row) for step in range(10) for row in text.batch(step + e).tokens[:, 0]] for e in (0, 10))
    assert sorted(first) == sorted(second) == list(range(1, 21))
    assert first != second


def test_a_batch_depends_on_step_and_seed_alone(tmp_path):
    corpus = _corpus(tmp_path, *(bytes([i]) * SEQ_LEN for i in range(1, 21)))
    text = _text(corpus)
    later = text.batch(7)
    for step in (3, 7, 29):
        text.batch(step)
    np.testing.assert_array_equal(_text(corpus).batch(7).tokens, later.tokens)
    assert any((_text(corpus, seed=1).batch(step).tokens != text.batch(step).tokens).any() for step in range(5))


def test_fewer_rows_than_the_batch_are_repeated(tmp_path):
    batch = _text(_corpus(tmp_path, b"short"), batch_size=3).batch(0)
    assert (batch.tokens == batch.tokens[0]).all()


def test_the_standard_library_is_there_in_a_fixed_order():
    corpus = standard_library()
    names = [document.name for document in corpus.documents]
    assert "json/decoder.py" in names
    assert len(names) == len(set(names))
    assert not [name for name in names if {"test", "site-packages", "encodings"} & set(Path(name).parts)]
    assert not [name for name in names if "_sysconfigdata" in name]  # differs between machines, and tells of them
    assert corpus.num_bytes > 5_000_000
    assert standard_library() == corpus


def test_folders_leave_out_hidden_and_binary_files_and_files_given_by_name_are_taken(tmp_path):
    files = {"b.txt": b"text", "a/c.md": b"more", ".hidden": b"no", ".git/x": b"no", "p.bin": b"\0\1"}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    assert [document.name for document in read_corpus([tmp_path]).documents] == ["b.txt", "a/c.md"]
    assert [document.name for document in read_corpus([tmp_path / "p.bin"]).documents] == ["p.bin"]


def test_the_fingerprint_tells_other_data(tmp_path):
    before = _corpus(tmp_path, b"hello", b"world").fingerprint
    assert read_corpus([tmp_path]).fingerprint == before
    (tmp_path / "001.txt").write_bytes(b"earth")
    assert read_corpus([tmp_path]).fingerprint != before


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data path '.*nowhere' does not exist"):
        read_corpus([tmp_path / "nowhere"])


@pytest.mark.parametrize("content", [b"", b"x"])
def test_nothing_to_train_on_is_an_error(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no text to train on in .*: give files or folders"):
        read_corpus([tmp_path])


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_bytes(b"secret")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # the permission bits do not stop root
    with pytest.raises(ValueError, match=r"cannot read '.*secret\.txt': Permission denied"):
        read_corpus([tmp_path])


def test_a_file_that_shrinks_or_goes_during_training_is_named(tmp_path):
    text = _text(_corpus(tmp_path, b"some words"))
    (tmp_path / "000.txt").write_bytes(b"some")
    with pytest.raises(ValueError, match=r"000\.txt' has become shorter since training began \(it had 10 bytes\)"):
        text.batch(0)
    (tmp_path / "000.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read '.*000\.txt': No such file"):
        text.batch(0)
