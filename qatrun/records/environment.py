"""environment.json: what a study ran on, and what it was made from."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qatrun.files import Record


class Environment(Record):
    """As the page shows it.

    Attributes:
        date: ISO 8601, UTC.
        packages: name -> version.
        processes: that trained together, where it was more than one.
        git: commit of the working folder, and whether it had changes; None outside a repository.
        inputs: path of a text or model -> SHA-256 of its content when the study began.
        arms: arm -> its seed and the hash of the data that it consumed.
    """

    date: str = ""
    command: list[str] = Field(default_factory=list)
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    platform: str = ""
    cpu: dict[str, Any] = Field(default_factory=dict)
    memory_gib: float = 0.0
    gpus: list[str] = Field(default_factory=list)
    processes: int = 1
    git: dict[str, Any] | None = None
    inputs: dict[str, str] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)


class StudyEnvironment(Environment):
    """As only qatrun writes it."""

    date: str
    command: list[str]
    packages: dict[str, str]
    platform: str
