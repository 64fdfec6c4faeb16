"""Values that several records hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, lt=2**31)]
Verdict = Literal["within", "inconclusive", "exceeds"]
Answer = Literal["ruled out", "not shown", "found"]  # of a cause
VERDICTS: tuple[Verdict, ...] = ("within", "inconclusive", "exceeds")  # the best first
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]  # low, high; 95 %
