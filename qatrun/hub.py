"""The Hugging Face hub is asked once whether it is there. Left to itself its client retries every request: a minute and a
half for a model and a data set before a word is said."""

from __future__ import annotations

import functools
import sys

from huggingface_hub import constants, get_session

PROBE_TIMEOUT_S = 5.0


@functools.cache
def hub_is_reachable() -> bool:
    """One short request, once a process; False without one where HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except Exception:  # whatever the HTTP client in use raises, the hub is out of reach
        return False
    return True


def ask_once() -> None:
    """To be called before anything is asked of the hub: without an answer, models and data come from its local cache for the
    rest of the process, or fail at once."""
    if hub_is_reachable():
        return
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # else it takes the value over when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
