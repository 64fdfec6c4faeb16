"""Documents to packed sequences: nothing lost, one order a seed, positions that resume, sequences held out for good."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from packed_text import SEQ_LEN, TOKENIZER, opened, other_text, tokens_of, write_rows
from training import write_texts

import qatrun.data.documents
from qatrun.data import IGNORE_INDEX, Batch, PackedStream
from qatrun.recipe import Source

EOS = TOKENIZER.eos_token_id

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(autouse=True)
def small_stream_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so short that a stream of some documents crosses their borders."""
    monkeypatch.setattr(qatrun.data.documents, "STREAM_BLOCK", 7)


def documents_of(tokens: list[int]) -> list[tuple[int, ...]]:
    """Token ids cut after each EOS; what is left at the end is dropped."""
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    for token in tokens:
        current.append(token)
        if token == EOS:
            found.append(tuple(current))
            current = []
    return found


def encoded(file: Path) -> list[tuple[int, ...]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(*TOKENIZER(row["text"])["input_ids"], EOS) for row in rows]


# Packing


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_loses_no_token_and_parts_documents_by_eos(tmp_path: Path, streaming: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    documents = encoded(file)
    valid = Source(path=str(file))
    data = opened(file, shuffle=False, valid=valid, streaming=streaming)
    num_sequences = sum(map(len, documents)) * 2 // SEQ_LEN
    batches = [data.train.take(count) for count in (1, 3, num_sequences - 4)]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(n, SEQ_LEN) for n in (1, 3, num_sequences - 4)]
    laid_end_to_end = [token for document in documents * 2 for token in document]
    assert tokens_of(*batches) == laid_end_to_end[: num_sequences * SEQ_LEN]
    assert all(torch.equal(batch.labels, batch.input_ids) for batch in batches), "labels are not shifted here"


def test_a_document_is_not_ended_twice(tmp_path: Path) -> None:
    valid = other_text(tmp_path)
    file = write_rows(tmp_path / "a.jsonl", [{"text": "w1 w2 <eos>"}, {"text": "w3"}])
    data = opened(file, shuffle=False, valid=valid, valid_sequences=1)
    assert TOKENIZER.decode(tokens_of(data.train.take(1))[:5]) == "w1 w2 <eos> w3 <eos>"


def test_targets_are_counted_past_the_first_token() -> None:
    labels = torch.tensor([[1, 2, IGNORE_INDEX, 3], [4, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    assert Batch(torch.zeros_like(labels), labels).num_targets == 2


# Order, position, hash


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_a_function_of_the_seed_alone(tmp_path: Path, streaming: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)

    def order(seed: int) -> list[int]:
        return tokens_of(opened(file, seed=seed, streaming=streaming).train.take(60))

    torch.manual_seed(1)
    first = order(3)
    torch.manual_seed(2)
    assert order(3) == first
    assert order(4) != first


@pytest.mark.parametrize("streaming", [False, True])
def test_who_peeks_moves_nothing(tmp_path: Path, streaming: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    looked_at, other = (opened(file, streaming=streaming).train for _ in range(2))
    ids = looked_at.peek(3 * SEQ_LEN - 1)
    assert torch.equal(ids, looked_at.take(3).input_ids)
    other.take(3)
    assert looked_at.state_dict() == other.state_dict()


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_has_every_document_once_in_another_order(tmp_path: Path, streaming: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    documents = encoded(file)
    valid = Source(path=str(file))
    data = opened(file, valid=valid, streaming=streaming)
    num_tokens = sum(map(len, documents))
    seen = documents_of(tokens_of(data.train.take(3 * num_tokens // SEQ_LEN + 1)))
    epochs = [seen[i * 40 : (i + 1) * 40] for i in range(3)]
    assert all(sorted(epoch) == sorted(documents) for epoch in epochs)
    assert documents != epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_position_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """At every place of three epochs, with blocks of 7 documents and 5 tokenised at once."""
    file = write_texts(tmp_path / "a.jsonl", 40)

    def stream() -> PackedStream:
        opened_stream: PackedStream = opened(file, streaming=streaming).train
        opened_stream.rows_at_once = 5
        return opened_stream

    uninterrupted = stream()
    batches, hashes, positions = [], [], []
    while uninterrupted.documents.epoch < 3:
        positions.append(json.loads(json.dumps(uninterrupted.state_dict())))
        batches.append(uninterrupted.take(2))
        hashes.append(uninterrupted.data_hash)
    assert len(positions) > 30
    resumed = stream()
    for place, position in enumerate(positions):
        resumed.load_state_dict(position)
        for batch, data_hash in zip(batches[place : place + 3], hashes[place : place + 3], strict=True):
            again = resumed.take(2)
            assert torch.equal(again.input_ids, batch.input_ids)
            assert torch.equal(again.labels, batch.labels)
            assert resumed.data_hash == data_hash


def test_a_position_is_a_copy(tmp_path: Path) -> None:
    stream = opened(write_texts(tmp_path / "a.jsonl", 40), streaming=True).train
    stream.take(3)
    position = stream.state_dict()
    before = copy.deepcopy(position)
    stream.take(20)
    assert position == before


def test_the_hash_is_chained_over_batches_and_tells_data_apart(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)

    def hashes(seed: int = 0, path: Path = file) -> list[str]:
        stream = opened(path, seed=seed).train
        return [stream.data_hash] + [stream.take(2).input_ids.numel() and stream.data_hash for _ in range(3)]

    assert hashes() == hashes()
    assert len(set(hashes())) == 4
    other_order = hashes(seed=1)
    assert other_order[0] == hashes()[0]
    assert not set(other_order[1:]) & set(hashes()[1:])
    # One word of the last batch changed: only the last hash differs.
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    stream = opened(file, shuffle=False).train
    last = documents_of(tokens_of(*[stream.take(2) for _ in range(3)]))[-1]
    changed = [
        {"text": row["text"].rsplit(" ", 1)[0] + " w99"} if (*TOKENIZER(row["text"])["input_ids"], EOS) == last else row
        for row in rows
    ]
    one, other = (opened(path, shuffle=False).train for path in (file, write_rows(tmp_path / "b.jsonl", changed)))
    pairs = [(one.take(2) and one.data_hash, other.take(2) and other.data_hash) for _ in range(3)]
    assert [mine == theirs for mine, theirs in pairs] == [True, True, False]


# Held out


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_never_come_up_in_training(tmp_path: Path, streaming: bool) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    data = opened(file, valid_sequences=5, streaming=streaming)
    documents = encoded(file)
    held_out = {document for document in documents if set(documents_of(tokens_of(data.valid))) & {document}}
    trained = set(documents_of(tokens_of(data.train.take(200))))
    assert len(held_out) > 4
    assert held_out.isdisjoint(trained)
    # All but the document that the last held-out sequence ends in are on one side or the other.
    assert len(held_out | trained) >= 39
    assert data.train.documents.epoch >= 3


def test_held_out_sequences_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    one, other = opened(file, seed=1).valid, opened(file, seed=2, streaming=True).valid
    assert torch.equal(one.input_ids, other.input_ids)
    assert one.input_ids.shape == (2, SEQ_LEN)


def test_no_more_documents_are_held_out_than_needed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": " ".join([f"w{i}"] * 20)} for i in range(1, 6)])
    data = opened(file, valid_sequences=2)
    assert {TOKENIZER.decode([token]) for token in tokens_of(data.train.take(10))} == {"w3", "w4", "w5", "<eos>"}


def test_a_valid_source_of_its_own_holds_nothing_out(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", 40)
    data = opened(file, valid=other_text(tmp_path), valid_sequences=9)
    other = [token for document in encoded(tmp_path / "other.jsonl") for token in document]
    assert tokens_of(data.valid) == other[: len(other) - len(other) % SEQ_LEN], "one pass over it, though 9 were asked"
    assert set(documents_of(tokens_of(data.train.take(60)))) == set(encoded(file))
