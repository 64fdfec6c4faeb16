"""Conversations as other tools write them: made what templates take, or refused with what to write in the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from builders import word_tokenizer

from qatrun.data import check_data, open_data
from qatrun.data.turns import conversation
from qatrun.errors import InputError
from qatrun.recipe import DataConfig, Source

pytestmark = pytest.mark.usefixtures("datasets_cache")

PLAIN = "{% for m in messages %}{{ 'w91 ' if m.role == 'user' else 'w92 ' }}{{ m.content }} w93 {% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} w93{% endgeneration %} "
    "{% else %}w91 {{ m.content }} w93 {% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt, please') }}{% endif %}" + PLAIN
ADDING = "{% for m in messages %}{{ m.role + ': ' + m.content + m.mood }}{% endfor %}"
REWRITING = PLAIN.replace("{{ m.content }}", "{{ 'w99 ' if m.role == 'assistant' and loop.last }}{{ m.content }}")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


ASKED = [user("w1"), assistant("w2")]
CALL = {"tool_calls": [{"function": {"name": "f"}}]}
TAKEN: dict[str, tuple[list[Any], Mapping[str, str] | None, list[dict[str, Any]]]] = {
    "as it is": (ASKED, None, ASKED),
    "ShareGPT": ([{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}], None, ASKED),
    "ShareGPT with a system prompt": (
        [{"from": "system", "value": "w0"}, {"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}],
        None,
        [{"role": "system", "content": "w0"}, *ASKED],
    ),
    "roles that the recipe maps": (
        [{"role": "human", "content": "w1"}, {"role": "bot", "content": "w2"}],
        {"human": "user", "bot": "assistant"},
        ASKED,
    ),
    "parts": ([user([{"type": "text", "text": "w"}, {"text": "1"}]), assistant(["w2"])], None, ASKED),
    "a call without words": ([user("w1"), assistant(None, **CALL)], None, [user("w1"), assistant(None, **CALL)]),
    "nulls of Arrow": ([user("w1") | {"name": None}, assistant("w2", tool_calls=None)], None, ASKED),
    "roles of templates": (
        [{"role": role, "content": "w1"} for role in ("developer", "tool")],
        None,
        [{"role": role, "content": "w1"} for role in ("developer", "tool")],
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_turns_that_are_taken(case: str) -> None:
    turns, roles, expected = TAKEN[case]
    assert conversation(turns, roles) == expected


SPEAKER = "names no speaker: 'role' and 'content' expected, or 'from' and 'value'"
REFUSED: dict[str, tuple[Any, Mapping[str, str] | None, str]] = {
    "foreign roles": (
        [{"role": "human", "content": "w1"}, {"role": "gpt", "content": "w2"}],
        None,
        "roles 'human' and 'gpt' are none that chat templates know: write `roles: {human: user, gpt: assistant}` there",
    ),
    "capitals": (
        [{"role": "User", "content": "w1"}, assistant("w2")],
        None,
        "roles 'User' are none that chat templates know: write `roles: {User: user}` there",
    ),
    "a mapping that misses one": (
        [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}],
        {"human": "user"},
        "roles 'gpt' are none that chat templates know: write `roles: {gpt: assistant}` there",
    ),
    "words": (["w1", "w2"], None, "turn 1 is no mapping with 'role' and 'content' (got 'w1')"),
    "text": ('[{"role": "user"}]', None, "a conversation must be a list of turns (got"),
    "a mapping of lists": ({"role": ["user"], "content": ["w1"]}, None, "a conversation must be a list of turns (got"),
    "other keys": ([{"speaker": "A", "text": "w1"}], None, f"turn 1 {SPEAKER} (keys: speaker, text)"),
    "a role that is a number": ([{"role": 1, "content": "w1"}], None, f"turn 1 {SPEAKER} (keys: role, content)"),
    "no content": (
        [user("w1"), {"role": "assistant"}],
        None,
        "turn 2 (assistant) has no text as its content (got None)",
    ),
    "null": ([user(None)], None, "turn 1 (user) has no text as its content (got None)"),
    "a number": ([user(5)], None, "turn 1 (user) has no text as its content (got 5)"),
    "an image": (
        [user([{"type": "image", "url": "u"}])],
        None,
        "turn 1 (user) has a part that is no text (got {'type': 'image', 'url': 'u'})",
    ),
    "half a character": ([user("\ud800")], None, "'utf-8' codec can't encode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_turns_that_are_refused(case: str) -> None:
    turns, roles, expected = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as caught:
        conversation(turns, roles)
    assert str(caught.value).startswith(expected)


def checked(folder: Path, rows: Sequence[Any], template: str | dict[str, str], **settings: Any) -> list[str]:
    """What check says, and where that is something of the data, training before its first step."""
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    source = Source(path=str(file), messages_column="messages", shuffle=False, **settings)
    config = DataConfig(train=source, seq_len=8, valid_sequences=2)
    said = [str(problem).replace(str(file), "FILE") for problem in check_data(config, tokenizer)]
    with pytest.raises(InputError) if said else nullcontext():
        open_data(config, tokenizer, 0).train.take(2 * len(rows))
    return said


def key(message: str) -> list[str]:
    return [f"data.train.messages_column -- {message}"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_sharegpt_is_trained_on_as_it_is(tmp_path: Path, template: str) -> None:
    rows = [[{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4"}]] * 40
    assert checked(tmp_path, rows, template) == []


@pytest.mark.parametrize(
    ("odd_row", "template", "expected"),
    [
        ([{"role": "system", "content": "w9"}, *ASKED], STRICT,
         "the chat template does not take it: no system prompt, please"),
        ([*ASKED, *ASKED], REWRITING, "the chat template rewrites earlier turns; mark the answers in it with"),
    ],
)  # fmt: skip
def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, odd_row: Any, template: str, expected: str) -> None:
    (problem,) = checked(tmp_path, [*[ASKED] * 30, odd_row], template)
    assert problem.startswith(key(f"FILE, row 31: {expected}")[0])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ADDING, "FILE, row 1: the chat template does not take it: 'dict object' has no attribute 'mood'"),
        ("{% for m in messages %}", "FILE, row 1: the chat template does not take it: Unexpected end of template"),
        ({"tool_use": PLAIN, "rag": PLAIN}, "This model has multiple chat templates with no default"),
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str | dict[str, str], expected: str) -> None:
    (problem,) = checked(tmp_path, [ASKED] * 20, template)
    assert problem.startswith(key(expected)[0])


def test_conversations_without_an_answer_are_refused(tmp_path: Path) -> None:
    """Every step would train on no target, and the held-out perplexity be infinite."""
    rows = [[user("w1 w2 w3"), {"role": "narrator", "content": "w4 w5"}]] * 20
    (problem,) = checked(tmp_path, rows, MARKED)
    assert (
        problem
        == key(
            "no token of the conversations in FILE is counted by the loss (roles found: user, narrator; "
            "'assistant' expected: write `roles: {<role of the answers>: assistant}`)"
        )[0]
    )
    assert checked(tmp_path, rows, MARKED, roles={"narrator": "assistant"}) == []
    unmarked = MARKED.replace("== 'assistant'", "== 'nobody'")
    assert checked(tmp_path, [ASKED] * 20, unmarked)[0].endswith("by the loss: the chat template marks no answer")


def test_held_out_sequences_without_an_answer_are_refused(tmp_path: Path) -> None:
    rows = [[user("w1 " * 60), assistant("w2")], *[ASKED] * 40]
    message = "no token of the 2 held-out sequences is counted by the loss; hold out more"
    assert checked(tmp_path, rows, MARKED) == [f"data.valid_sequences -- {message}"]
