"""Documents to token ids, and which of them the loss counts. What tokenizer or chat template do not take is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from qatrun.data.columns import Document, column_key
from qatrun.data.turns import Turn
from qatrun.errors import InputError, Problem
from qatrun.recipe import Source

GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\b")
# Token ids of a document, and which of them the loss counts.
Tokens = tuple[list[int], list[bool]]


def encoder(source: Source, key: str, tokenizer: Any) -> Callable[[Sequence[Document]], list[Tokens]]:
    """The function that turns documents of a source into tokens; it raises InputError for one that cannot be.

    Args:
        key: the source's key in the recipe, for messages.
    Raises:
        InputError: the source holds conversations, and the tokenizer cannot template them.
    """
    key = column_key(source, key)
    template = _chat_template(tokenizer, key) if source.messages_column is not None else None

    def encode(documents: Sequence[Document]) -> list[Tokens]:
        if template is None:
            encoded = encode_texts(tokenizer, [str(document.content) for document in documents])
            tokens = [(ids, [True] * len(ids)) for ids in encoded]
        else:
            tokens = [_encoded(tokenizer, template, document, key) for document in documents]
        for document, (ids, _) in zip(documents, tokens, strict=True):
            _check_rows(ids, tokenizer, document, key)
        return tokens

    return encode


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own special tokens and one EOS at the end."""
    eos = tokenizer.eos_token_id
    # A document may be longer than the model's context: it is cut into sequences afterwards.
    encoded: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def encode_conversation(tokenizer: Any, template: str, conversation: Sequence[Turn]) -> Tokens:
    """Token ids of a conversation under a chat template; the loss counts the assistant's answers only.

    Answers are found by the template's generation markers where it has them, else by templating the conversation up to
    each answer, which needs a template that never rewrites what went before.

    Raises:
        ValueError: the template has no markers and does rewrite.
        Exception: whatever the template raises.
    """
    conversation = list(conversation)
    if GENERATION_MARKER.search(template):
        encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    text, answers = "", []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(conversation[:turn], add_generation_prompt=True, tokenize=False)
        answered = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        if not asked.startswith(text) or not answered.startswith(asked):
            raise ValueError("the chat template rewrites earlier turns; mark the answers in it with {% generation %}")
        answers.append(range(len(asked), len(answered)))
        text = answered
    # Tokenised as a whole: cut at an answer, a token that spans prompt and answer would fall apart.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(start in answer for answer in answers) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), counted


def _chat_template(tokenizer: Any, key: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(Problem("the tokenizer has no chat template", key=key))
    if not tokenizer.is_fast:
        raise InputError(
            Problem("the tokenizer does not say which text a token is from: tokenizer.json is needed", key=key)
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise InputError(Problem(str(error).splitlines()[0], key=key)) from None
    return template


def _encoded(tokenizer: Any, template: str, document: Document, key: str) -> Tokens:
    try:
        return encode_conversation(tokenizer, template, document.content)  # type: ignore[arg-type]  # a conversation
    except Exception as error:  # a template is a program of the model's authors
        said = str(error) if type(error) is ValueError else f"the chat template does not take it: {error}"
        raise InputError(Problem(f"{document.where}: {said}", key=key)) from error


def _check_rows(ids: Sequence[int], tokenizer: Any, document: Document, key: str) -> None:
    num_rows = getattr(tokenizer, "num_embeddings", None)  # noted by `load_tokenizer`
    if num_rows is not None and ids and max(ids) >= num_rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        message = f"its token '{token}' has the id {max(ids)}, and the model's embedding {num_rows} rows"
        raise InputError(Problem(f"{document.where}: {message}", key=key))
