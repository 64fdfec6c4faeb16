"""Templates of tasks in Jinja's sandbox: what they may reach, and what their first question says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import lm_eval.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qatrun.evaluate.leaves import LeafTask
from qatrun.evaluate.sources import TaskError
from qatrun.evaluate.trust import OPTION, task_code_is_trusted

# As lm-eval's own environment; all templates that ship with it render the same in here.
SANDBOX = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
SANDBOX.filters["regex_replace"] = lm_eval.utils.regex_replace

_RENDERED = ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix")


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let lm-eval render in the sandbox, unless code of task files is trusted."""
    environment = lm_eval.utils.env
    if not task_code_is_trusted():
        lm_eval.utils.env = SANDBOX
    try:
        yield
    finally:
        lm_eval.utils.env = environment


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def check_templates(leaf: LeafTask, row: Mapping[str, Any]) -> None:
    """Render a task's templates for one row of its data; where a function makes the questions there is nothing to see."""
    if leaf.config.get("process_docs") is not None:
        return
    for key in _RENDERED:
        text = leaf.config.get(key)
        if isinstance(text, str) and is_template(text):
            try:
                SANDBOX.from_string(text).render(**row)
            except Exception as error:  # whatever an expression in it does to the row's values
                raise template_error(f"'{leaf.name}': {key}", error) from error


def template_error(what: str, error: Exception) -> TaskError:
    """What a template that failed says to its user."""
    more = f" (read it, then allow it with {OPTION})" if isinstance(error, SecurityError) else ""
    return TaskError(f"{what}: {error}{more}")
