"""Documents to packed batches, with a position that can be saved and a hash of everything handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatrun.data.columns import Document
from qatrun.data.documents import Documents, open_documents
from qatrun.data.encoding import Tokens, encoder
from qatrun.errors import InputError, Problem
from qatrun.recipe import DataConfig, Source

IGNORE_INDEX = -100
TOKENIZE_AT_ONCE = 64


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes:
        input_ids: [num, seq_len] int64.
        labels: [num, seq_len] int64, not shifted: input_ids where the loss counts a token, IGNORE_INDEX elsewhere.
    """

    input_ids: Tensor
    labels: Tensor

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` sequences."""
        return [Batch(*part) for part in zip(self.input_ids.split(size), self.labels.split(size), strict=True)]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.input_ids.to(device), self.labels.to(device))

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted and counted; the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


class PackedStream:
    """Sequences of `seq_len` tokens, cut from documents laid end to end.

    Attributes:
        data_hash: SHA-256 chained over every batch taken so far, hexadecimal.
        num_rows: documents read so far, for one that is never sought.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[Sequence[Document]], list[Tokens]],
        seq_len: int,
        rows_at_once: int = TOKENIZE_AT_ONCE,
    ) -> None:
        self.documents, self.encode, self.seq_len, self.rows_at_once = documents, encode, seq_len, rows_at_once
        self.num_rows = 0
        self.data_hash = hashlib.sha256(b"").hexdigest()
        self._ids: list[int] = []
        self._counted: list[bool] = []

    def take(self, count: int) -> Batch:
        """The next `count` sequences.

        Raises:
            InputError: a whole pass over the documents gave not one token.
        """
        size = count * self.seq_len
        self._read(size)
        ids = torch.tensor(self._ids[:size]).view(count, self.seq_len)
        counted = torch.tensor(self._counted[:size]).view(count, self.seq_len)
        del self._ids[:size], self._counted[:size]
        batch = Batch(ids, torch.where(counted, ids, IGNORE_INDEX))
        content = (part.numpy().tobytes() for part in (batch.input_ids, batch.labels))
        self.data_hash = hashlib.sha256(b"".join((bytes.fromhex(self.data_hash), *content))).hexdigest()
        return batch

    def _read(self, size: int) -> None:
        """Tokenise documents until `size` tokens are there."""
        epoch_with_text = self.documents.epoch
        while len(self._ids) < size:
            rows = self.documents.take(self.rows_at_once)
            self.num_rows += len(rows)
            before = len(self._ids)
            for ids, mask in self.encode([row for row in rows if row is not None]):
                self._ids += ids
                self._counted += mask
            if len(self._ids) > before:
                epoch_with_text = self.documents.epoch
            elif self.documents.epoch > epoch_with_text + 1:
                raise InputError(Problem("it has rows but no text to train on", f"{self.documents.key}.path"))

    def peek(self, num_tokens: int) -> Tensor:
        """[num, seq_len] token ids of the next sequences, as many as hold so many tokens; the stream stays where it is."""
        here = self.state_dict()
        ids = self.take(-(-num_tokens // self.seq_len)).input_ids
        self.load_state_dict(here)
        return ids

    def state_dict(self) -> dict[str, Any]:
        """Where it is: all that it needs to go on bit for bit, as plain data."""
        return {
            "documents": self.documents.position(),
            "ids": list(self._ids),
            "counted": [int(flag) for flag in self._counted],
            "data_hash": self.data_hash,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a stream of the same data was."""
        self.documents.seek(state["documents"])
        self._ids = list(state["ids"])
        self._counted = [bool(flag) for flag in state["counted"]]
        self.data_hash = state["data_hash"]

    adopt = load_state_dict  # an arm reads on where its trunk stopped


@dataclass(frozen=True)
class Data:
    """What a training run reads: endless training sequences, and held-out ones."""

    train: PackedStream
    valid: Batch


def open_data(config: DataConfig, tokenizer: Any, seed: int) -> Data:
    """Training and held-out sequences of a recipe. Without `data.valid` the first documents of the training text are
    held out, the same ones whatever the seed.

    Raises:
        InputError: no such data set, split or column; no chat template; too little text, or none that the loss counts.
    """
    valid, skip = hold_out(config, tokenizer, _in_order)
    documents = open_documents(config.train, "data.train", seed=seed, skip=skip)
    return Data(PackedStream(documents, encoder(config.train, "data.train", tokenizer), config.seq_len), valid)


def open_probe(config: DataConfig, tokenizer: Any, count: int) -> Tensor | None:
    """[num, seq_len] int64, num <= count: the first sequences of `data.probe`; None where the recipe gives none.

    Raises:
        InputError: as `open_data`.
    """
    if config.probe is None:
        return None
    return _first_sequences(config.probe, "data.probe", count, config.seq_len, tokenizer, _in_order)[0].input_ids


def hold_out(config: DataConfig, tokenizer: Any, open_: Callable[[Source, str], Documents]) -> tuple[Batch, int]:
    """The held-out sequences of a recipe, and how many rows of the training text they take.

    Args:
        open_: the documents of a source, by its key, in their order.
    Raises:
        InputError: too little text, or none that the loss counts.
    """
    name = "train" if config.valid is None else "valid"
    source, key = config.valid or config.train, f"data.{name}"
    valid, num_rows = _first_sequences(source, key, config.valid_sequences, config.seq_len, tokenizer, open_)
    if not valid.num_targets:
        message = f"no token of the {len(valid.input_ids)} held-out sequences is counted by the loss; hold out more"
        raise InputError(Problem(message, key="data.valid_sequences"))
    if config.valid is not None:
        return valid, 0
    if len(valid.input_ids) < config.valid_sequences:
        message = (
            f"{source.path} fills {len(valid.input_ids)} sequences of {config.seq_len} tokens, not the "
            f"{config.valid_sequences} that are held out of it: hold out fewer, or give data.valid"
        )
        raise InputError(Problem(message, key="data.valid_sequences"))
    return valid, num_rows


def _in_order(source: Source, key: str) -> Documents:
    return open_documents(source.model_copy(update={"shuffle": False}), key, seed=0)


def _first_sequences(
    source: Source, key: str, count: int, seq_len: int, tokenizer: Any, open_: Callable[[Source, str], Documents]
) -> tuple[Batch, int]:
    """The first sequences of a source, at most one pass over it, and how many rows they took."""
    documents = open_(source, key)
    # Row by row, so that no more documents are held out than these sequences come from.
    stream = PackedStream(documents, encoder(source, key, tokenizer), seq_len, rows_at_once=1)
    taken: list[Batch] = []
    while len(taken) < count:
        batch = stream.take(1)
        if documents.epoch > 0:
            break
        taken.append(batch)
    if not taken:
        raise InputError(Problem(f"{source.path} does not fill one sequence of {seq_len} tokens", key=f"{key}.path"))
    return Batch(torch.cat([b.input_ids for b in taken]), torch.cat([b.labels for b in taken])), stream.num_rows
