"""Conversations: the chat template applied, and the loss on the answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import word_tokenizer
from packed_text import TOKENIZER, message_of, opened, write_rows

from qatrun.data import IGNORE_INDEX
from qatrun.data.encoding import encode_conversation
from qatrun.recipe import Source

pytestmark = pytest.mark.usefixtures("datasets_cache")

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
