"""Documents to packed batches, with a position that can be saved and a hash of everything handed out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatrun.data.columns import Row
from qatrun.data.documents import Documents, open_documents
from qatrun.errors import InputError, Problem
from qatrun.recipe import DataConfig, Source

IGNORE_INDEX = -100
TOKENIZE_AT_ONCE = 64
GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\b")
# Token ids of a document, and which of them the loss counts.
Tokens = tuple[list[int], list[bool]]


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
        encode: Callable[[Sequence[Row]], list[Tokens]],
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
        digest = hashlib.sha256(bytes.fromhex(self.data_hash))
        digest.update(batch.input_ids.numpy().tobytes())
        digest.update(batch.labels.numpy().tobytes())
        self.data_hash = digest.hexdigest()
        return batch

    def _read(self, size: int) -> None:
        """Tokenise documents until `size` tokens are there."""
        epoch_with_text = self.documents.epoch
        while len(self._ids) < size:
            rows = self.documents.take(self.rows_at_once)
            self.num_rows += len(rows)
            before = len(self._ids)
            for document, mask in self.encode(rows):
                self._ids += document
                self._counted += mask
            if len(self._ids) > before:
                epoch_with_text = self.documents.epoch
            elif self.documents.epoch > epoch_with_text + 1:
                raise InputError(Problem("the data set has rows but no text to train on", f"{self.documents.key}.path"))

    def position(self) -> dict[str, Any]:
        """Everything that `seek` needs to go on bit for bit, as plain data."""
        return {
            "documents": self.documents.position(),
            "ids": list(self._ids),
            "counted": [int(flag) for flag in self._counted],
            "data_hash": self.data_hash,
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        self.documents.seek(position["documents"])
        self._ids = list(position["ids"])
        self._counted = [bool(flag) for flag in position["counted"]]
        self.data_hash = position["data_hash"]


@dataclass(frozen=True)
class Data:
    """What a training run reads: endless training sequences, and held-out ones."""

    train: PackedStream
    valid: Batch


def open_data(config: DataConfig, tokenizer: Any, seed: int) -> Data:
    """Training and held-out sequences of a recipe. Without `data.valid` the first documents of the training text are
    held out, the same ones whatever the seed.

    Raises:
        InputError: no such data set, split or column; no chat template; too little text.
    """
    if config.valid is not None:
        valid, _ = _held_out(config, config.valid, "data.valid", tokenizer)
        skip = 0
    else:
        valid, skip = _held_out(config, config.train, "data.train", tokenizer)
        if len(valid.input_ids) < config.valid_sequences:
            message = (
                f"{config.train.path} fills {len(valid.input_ids)} sequences of {config.seq_len} tokens, not the "
                f"{config.valid_sequences} that are held out of it: hold out fewer, or give data.valid"
            )
            raise InputError(Problem(message, key="data.valid_sequences"))
    documents = open_documents(config.train, "data.train", seed=seed, skip=skip)
    return Data(PackedStream(documents, _encoder(config.train, "data.train", tokenizer), config.seq_len), valid)


def open_probe(config: DataConfig, tokenizer: Any, count: int) -> Tensor:
    """[num, seq_len] int64, num <= count: the first sequences of `data.probe`, else of the held-out text.

    Raises:
        InputError: as `open_data`.
    """
    chosen = next((name for name in ("probe", "valid", "train") if getattr(config, name) is not None), "train")
    held_out = count if chosen == "probe" else min(count, config.valid_sequences)
    enough = config.model_copy(update={"valid_sequences": held_out})
    return _held_out(enough, getattr(config, chosen), f"data.{chosen}", tokenizer)[0].input_ids


def _held_out(config: DataConfig, source: Source, key: str, tokenizer: Any) -> tuple[Batch, int]:
    """The first sequences of a source, at most one pass over it, and how many rows they took."""
    documents = open_documents(source.model_copy(update={"shuffle": False}), key, seed=0)
    # Row by row, so that no more documents are held out than these sequences come from.
    stream = PackedStream(documents, _encoder(source, key, tokenizer), config.seq_len, rows_at_once=1)
    taken: list[Batch] = []
    while len(taken) < config.valid_sequences:
        batch = stream.take(1)
        if documents.epoch > 0:
            break
        taken.append(batch)
    if not taken:
        raise InputError(
            Problem(f"{source.path} does not fill one sequence of {config.seq_len} tokens", key=f"{key}.path")
        )
    held_out = Batch(torch.cat([b.input_ids for b in taken]), torch.cat([b.labels for b in taken]))
    return held_out, stream.num_rows


def _encoder(source: Source, key: str, tokenizer: Any) -> Callable[[Sequence[Row]], list[Tokens]]:
    if source.messages_column is None:
        column = source.text_column

        def encode(rows: Sequence[Row]) -> list[Tokens]:
            texts = [row[column] for row in rows if row[column]]  # empty and missing ones are no documents
            return [(ids, [True] * len(ids)) for ids in encode_texts(tokenizer, texts)]

        return encode
    if not tokenizer.chat_template:
        raise InputError(Problem("the tokenizer has no chat template", key=f"{key}.messages_column"))
    messages = source.messages_column
    return lambda rows: [
        encode_conversation(tokenizer, row[messages], f"{key}.messages_column") for row in rows if row[messages]
    ]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own special tokens and one EOS at the end."""
    eos = tokenizer.eos_token_id
    # A document may be longer than the model's context: it is cut into sequences afterwards.
    encoded: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]], key: str) -> Tokens:
    """Token ids of a conversation under the chat template; the loss counts the assistant's answers only.

    Answers are found by the template's generation markers where it has them, else by templating the conversation up to
    each answer, which needs a template that never rewrites what went before.

    Raises:
        InputError: the template has no markers and does rewrite.
    """
    conversation = list(messages)
    if GENERATION_MARKER.search(tokenizer.chat_template):
        encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    text, answers = "", []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(conversation[:turn], add_generation_prompt=True, tokenize=False)
        answered = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        if not asked.startswith(text) or not answered.startswith(asked):
            message_ = "the chat template rewrites earlier turns; mark the answers in it with {% generation %}"
            raise InputError(Problem(message_, key=key))
        answers.append(range(len(asked), len(answered)))
        text = answered
    # Tokenised as a whole: cut at an answer, a token that spans prompt and answer would fall apart.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(start in answer for answer in answers) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), counted
