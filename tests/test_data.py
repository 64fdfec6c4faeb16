"""Documents to packed sequences: nothing lost, one order a seed, positions that resume, sequences held out for good."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import word_tokenizer
from training import write_texts

import qatrun.data.documents
from qatrun import demo
from qatrun.data import IGNORE_INDEX, Batch, PackedStream, check_data, open_data, open_dataset
from qatrun.data.encoding import encode_conversation
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, Source

SEQ_LEN = 16
TOKENIZER = word_tokenizer()
EOS = TOKENIZER.eos_token_id


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(autouse=True)
def small_stream_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so short that a stream of some documents crosses their borders."""
    monkeypatch.setattr(qatrun.data.documents, "STREAM_BLOCK", 7)


def opened(path: Path | str, *, seed: int = 0, tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    valid = settings.pop("valid", None)
    config: dict[str, Any] = {"seq_len": SEQ_LEN, "valid_sequences": settings.pop("valid_sequences", 2), "valid": valid}
    return open_data(DataConfig(train=Source(path=str(path), **settings), **config), tokenizer, seed)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def other_text(folder: Path) -> Source:
    return Source(path=str(write_texts(folder / "other.jsonl", 10, seed=1)))


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


def tokens_of(*batches: Batch) -> list[int]:
    return [token for batch in batches for token in batch.input_ids.flatten().tolist()]


# Where text comes from

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def as_txt(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return file


def as_json(folder: Path) -> Path:
    file = folder / "text.json"
    file.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    return file


def as_jsonl(folder: Path) -> Path:
    return write_rows(folder / "text.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "text.parquet")
    return folder / "text.parquet"


def as_folder(folder: Path) -> Path:
    (folder / "set").mkdir()
    write_rows(folder / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "set" / "test.jsonl", [{"text": "w99"}])
    return folder / "set"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [as_txt, as_json, as_jsonl, as_parquet, as_folder])
def test_every_kind_of_local_source_gives_the_same_tokens(
    tmp_path: Path, write: Callable[[Path], Path], streaming: bool
) -> None:
    valid = other_text(tmp_path)
    data = opened(write(tmp_path), valid=valid, valid_sequences=1, shuffle=False, streaming=streaming)
    words = " <eos> ".join([*TEXTS, TEXTS[0]]) + " <eos>"
    assert tokens_of(data.train.take(1)) == TOKENIZER(words)["input_ids"][:SEQ_LEN]


def message_of(path: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        opened(path, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [{"split": "finetune"}, {"split": "train"}, {"split": "valid", "text_column": "txet"}]
    + [{"split": "valid", "messages_column": name} for name in ("text", "turns")],
)
def test_a_check_of_the_demo_says_what_opening_it_says(settings: dict[str, Any]) -> None:
    source = Source(path=demo.BUILTIN, **settings)
    try:
        open_dataset(source, "data.train")
        said = []
    except InputError as error:
        said = [*error.problems]
    assert check_data(DataConfig(train=source), None) == said
    assert (not said) == (settings == {"split": "finetune"})


def test_a_check_of_the_demo_writes_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    texts = demo.documents("valid")
    monkeypatch.setattr(demo, "documents", lambda _: (written.append(text) or text for text in texts))
    check_data(DataConfig(train=Source(path=demo.BUILTIN, split="valid")), TOKENIZER)
    assert len(written) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"texts": "w1", "label": 3}])
    message = message_of(file, streaming=streaming)
    assert message == f"data.train.text_column -- no column 'text' in {file} (did you mean 'texts'?)"
    assert "columns: texts, label" in message_of(file, text_column="zzz", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "w1", "label": 3}])
    assert message_of(file, text_column="label", streaming=streaming).startswith("data.train.text_column -- ")
    message = message_of(file, messages_column="text", streaming=streaming)
    assert message.startswith("data.train.messages_column -- ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "parquet"])
def test_a_missing_file(tmp_path: Path, ending: str, streaming: bool) -> None:
    file = tmp_path / f"splits.{ending}"
    assert message_of(file, streaming=streaming) == f"data.train.path -- no such file '{file}'"


def test_a_file_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.docx"
    file.write_text("text\nw1\n", encoding="utf-8")
    assert message_of(file).startswith(
        f"data.train.path -- '{file}' is none of .txt, .json, .jsonl, .csv, .tsv, .parquet ("
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_split(tmp_path: Path, streaming: bool) -> None:
    message = message_of(as_folder(tmp_path), split="vaild", streaming=streaming)
    assert message.startswith("data.train.split -- ")
    assert "vaild" in message
    assert "'test'" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", ""), ("a.jsonl", ""), ("a.txt", ""), ("a.json", "{not json\n"), ("a.jsonl", "{not json\n")],
)
def test_an_empty_or_broken_file(tmp_path: Path, name: str, content: str, streaming: bool) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message_of(tmp_path / name, streaming=streaming).startswith(f"data.train.path -- {tmp_path / name}")


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "w1 w2"}] * 3)
    assert "does not fill one sequence of 16 tokens" in message_of(file, streaming=streaming)
    file = write_rows(tmp_path / "b.jsonl", [{"text": "w1 w2"}] * 30)
    message = message_of(file, valid_sequences=50, streaming=streaming)
    assert message.startswith("data.valid_sequences -- ")
    assert "fills 5 sequences" in message
    file = write_rows(tmp_path / "c.jsonl", [{"text": "w1 w2 w3"}] * 4)
    message = message_of(file, valid_sequences=1, streaming=streaming)
    assert message.startswith("data.train.path -- ")
    assert "held out" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_no_documents(tmp_path: Path, streaming: bool) -> None:
    valid = other_text(tmp_path)
    rows = [{"text": text} for text in ("w1 w2", None, "", "w3", None)]
    settings: dict[str, Any] = {"valid": valid, "valid_sequences": 1, "shuffle": False, "streaming": streaming}
    data = opened(write_rows(tmp_path / "a.jsonl", rows), **settings)
    assert TOKENIZER.decode(tokens_of(data.train.take(1))[:6]) == "w1 w2 <eos> w3 <eos> w1"
    nothing = write_rows(tmp_path / "b.jsonl", [{"text": ""}, {"text": None}] * 10)
    with pytest.raises(InputError, match=r"data.train.path -- .* no text"):
        opened(nothing, **settings).train.take(1)


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


# Conversations

USER, ASSISTANT, END = "w91", "w92", "w93"
PLAIN = (
    "{% for m in messages %}{{ 'w91 ' if m.role == 'user' else 'w92 ' }}{{ m.content }} w93 {% endfor %}"
    "{% if add_generation_prompt %}w92 {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}w91 {{ m.content }} w93 "
    "{% else %}{{ 'w92 ' }}{% generation %}{{ m.content }} w93{% endgeneration %} {% endif %}{% endfor %}"
)
REWRITING = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else 'w99' }}")
CONVERSATION = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def with_template(template: str | None) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template", [PLAIN, MARKED, MARKED.replace("{% generation", "{%- generation"), MARKED.replace("% gen", "%gen")]
)
def test_the_loss_counts_the_answers_alone(template: str) -> None:
    ids, counted = encode_conversation(with_template(template), template, CONVERSATION)
    assert TOKENIZER.decode(ids) == "w91 w1 w2 w93 w92 w3 w93 w91 w4 w93 w92 w5 w6 w93"
    assert [TOKENIZER.decode([token]) for token, flag in zip(ids, counted, strict=True) if flag] == [
        *("w3", "w93"),
        *("w5", "w6", "w93"),
    ]


def test_an_answer_may_share_a_token_with_its_prompt() -> None:
    """A prompt that ends in a line feed before an answer that begins with one: many tokenizers have a token for both."""
    glued = PLAIN.replace("w92 {% endif %}", "w9{% endif %}").replace("'w92 ' }}", "'w9' }}")
    ids, counted = encode_conversation(
        with_template(glued), glued, [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "8 w2"}]
    )
    assert TOKENIZER.decode(ids) == "w91 w1 w93 w98 w2 w93"
    assert counted == [False, False, False, False, True, True]


def test_a_template_that_rewrites_is_refused_unless_marked(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": CONVERSATION}] * 20)
    message = message_of(file, messages_column="messages", tokenizer=with_template(REWRITING))
    assert message.startswith(f"data.train.messages_column -- {file}, row 1: the chat template rewrites")
    marked = MARKED.replace("{{ m.content }} w93 {% else", "{{ m.content if loop.last else 'w99' }} w93 {% else")
    opened(file, messages_column="messages", tokenizer=with_template(marked))


def test_no_chat_template(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])
    message = message_of(file, messages_column="messages", tokenizer=with_template(None))
    assert message == "data.train.messages_column -- the tokenizer has no chat template"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_conversations_are_packed_with_their_mask(tmp_path: Path, template: str, streaming: bool) -> None:
    rows: list[dict[str, Any]] = [{"messages": CONVERSATION}, {"messages": None}, {"messages": []}]
    rows.append({"messages": CONVERSATION[:2]})
    file = write_rows(tmp_path / "a.jsonl", rows * 10)
    settings: dict[str, Any] = {"messages_column": "messages", "shuffle": False, "streaming": streaming}
    data = opened(file, tokenizer=with_template(template), valid=Source(path=str(file), **settings), **settings)
    batch = data.train.take(21 * 2)  # 21 tokens to the 2 conversations of 4 rows, 16 to a sequence
    per_pass = [IGNORE_INDEX] * 5 + [f"w{i}" for i in (3, 93)] + [IGNORE_INDEX] * 4 + [f"w{i}" for i in (5, 6, 93)]
    per_pass += [IGNORE_INDEX] * 5 + ["w3", "w93"]
    expected = [IGNORE_INDEX if word == IGNORE_INDEX else TOKENIZER.vocab[word] for word in per_pass * 32]
    assert batch.labels.flatten().tolist() == expected[: 42 * 16]
    assert data.valid.num_targets == int((data.valid.labels[:, 1:] != IGNORE_INDEX).sum()) > 0
