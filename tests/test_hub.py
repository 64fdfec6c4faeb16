"""A hub that does not answer is asked once, for models and data alike."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from qatrun import hub
from qatrun.data import check_data
from qatrun.errors import InputError, SourceError
from qatrun.model import load_config
from qatrun.recipe import DataConfig, ModelConfig, Source
from qatrun.tokenizer import load_tokenizer


class DeadSession:
    """A network that drops everything."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def head(self, url: str, **_: Any) -> None:
        self.requests.append(url)
        raise OSError("no route")


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadSession]:
    session = DeadSession()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    hub.hub_is_reachable.cache_clear()
    yield session
    hub.hub_is_reachable.cache_clear()


def test_a_dead_hub_is_asked_once(dead: DeadSession) -> None:
    model = ModelConfig(path="nobody/no-such-model")
    for load in (load_config, load_tokenizer):
        with pytest.raises(
            InputError, match="no model folder 'nobody/no-such-model' here, and the hub did not give one"
        ):
            load(model)
    for streaming in (False, True):
        source = Source(path="nobody/no-such-data", streaming=streaming)
        (problem,) = check_data(DataConfig(train=source), None)
        said = "data.train.path -- nobody/no-such-data: no such file or folder, and the hub cannot be reached"
        assert str(problem) == said
    assert dead.requests == [constants.ENDPOINT]


def broken(reason: Exception) -> Iterator[dict[str, Any]]:
    """A row, and then what `datasets` and the formats that it reads may raise."""
    yield {"text": "a text"}
    raise reason


REASONS = [
    ConnectionError("Server Disconnected"),
    zlib.error("Error -3 while decompressing data"),
    datasets.exceptions.DatasetGenerationError("Server Disconnected"),
    RuntimeError("Dataset scripts are no longer supported\nbut found x.py"),
]


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: type(reason).__name__)
def test_what_the_hub_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch, reason: Exception) -> None:
    monkeypatch.setattr("qatrun.data.dataset.hub_is_reachable", lambda: True)
    monkeypatch.setattr("qatrun.data.dataset.ask_once", lambda: None)
    source = Source(path="somebody/some-data", streaming=True)
    said = str(reason).split("\n")[0]
    stream = datasets.IterableDataset.from_generator(broken, gen_kwargs={"reason": reason})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(SourceError) as broke:
        check_data(DataConfig(train=source), None)
    assert str(broke.value) == f"data.train -- somebody/some-data broke off while it was read: {said}"

    def refuse(*_: Any, **__: Any) -> None:
        raise reason

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (problem,) = check_data(DataConfig(train=source), None)
    assert str(problem) == f"data.train.path -- somebody/some-data: {said}"


def test_what_is_local_asks_nothing(dead: DeadSession) -> None:
    load_tokenizer(ModelConfig(path="builtin:demo"))
    assert check_data(DataConfig(train=Source(path="builtin:demo", split="valid")), None) == []
    (problem,) = check_data(DataConfig(train=Source(path="./no-such-folder")), None)
    assert str(problem) == "data.train.path -- no such file or folder 'no-such-folder'"
    assert dead.requests == []
