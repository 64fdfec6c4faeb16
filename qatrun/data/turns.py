"""Conversations of other tools, as chat templates take them: turns of `role` and `content`, in plain data.

Who speaks is never guessed: a template prints `gpt` as readily as `assistant`, and the loss would count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = dict[str, Any]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# What user and assistant are called elsewhere; these are suggested, not taken for granted.
OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter", "customer", "question", "instruction", "input"), "user"),
    **dict.fromkeys(
        ("gpt", "bot", "chatbot", "chatgpt", "ai", "model", "agent", "answer", "response", "output"), "assistant"
    ),
}


def conversation(turns: Any, roles: Mapping[str, str] | None) -> list[Turn]:
    """The turns of one row, checked.

    Args:
        turns: `{role, content}` each, or `{from, value}` as ShareGPT writes them; content is text, or parts of text.
        roles: role in the data -> role of the template.
    Raises:
        ValueError: they are something else; the message says what, and what to write in the recipe.
    """
    if not isinstance(turns, list):
        raise ValueError(f"a conversation must be a list of turns (got {turns!r:.60})")
    checked = [_turn(turn, f"turn {number}", roles) for number, turn in enumerate(turns, 1)]
    roles_found = dict.fromkeys(turn["role"] for turn in checked)
    if foreign := {role: other for role in roles_found if (other := suggested(role))}:
        mapping = ", ".join(f"{role}: {other}" for role, other in foreign.items())
        names = " and ".join(f"'{role}'" for role in foreign)
        raise ValueError(f"roles {names} are none that chat templates know: write `roles: {{{mapping}}}` there")
    return checked


def suggested(role: str) -> str | None:
    """The role of chat templates that is probably meant; None for one of theirs, or one that tells nothing."""
    lowered = role.lower()
    return OTHER_NAMES.get(lowered) or (lowered if lowered != role and lowered in ("user", "assistant") else None)


def _turn(turn: Any, where: str, roles: Mapping[str, str] | None) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is no mapping with 'role' and 'content' (got {turn!r:.60})")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str):
        keys = ", ".join(map(str, turn))
        raise ValueError(
            f"{where} names no speaker: 'role' and 'content' expected, or 'from' and 'value' (keys: {keys})"
        )
    known = SHAREGPT_ROLES if roles is None and role_key == "from" else roles or {}
    # Arrow gives every turn the keys of all, with nulls.
    others = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    content = _content(turn.get(content_key), bool(others.get("tool_calls")), f"{where} ({role})")
    return {"role": known.get(role, role), "content": content, **others}


def _content(content: Any, calls_a_tool: bool, where: str) -> str | None:
    if content is None and calls_a_tool:
        return None
    text = "".join(_part(part, where) for part in content) if isinstance(content, list) else content
    if isinstance(text, str):
        text.encode()  # half of a surrogate pair, which JSON can spell, is no character
        return text
    raise ValueError(f"{where} has no text as its content (got {content!r:.60})")


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise ValueError(f"{where} has a part that is no text (got {part!r:.60})")
    return text
