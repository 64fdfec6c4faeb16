"""The `monitor` and `diagnose` sections: what is watched while training, and what is asked afterwards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from qatrun.recipe.qat import Count, Section


class ProbeConfig(Section):
    """The forgetting probe: the loss on fixed text of what the start model knew (`data.probe`), and the KL divergence from
    the start model there, in nats per token, with quantizers off and on."""

    every: Count = Field(50, description="optimizer steps between probes")
    sequences: Count = Field(16, description="packed sequences of `data.seq_len` tokens")
    top_k: Count = Field(64, description="likeliest next tokens kept of the start model; the others count as one")
    items: Count | None = Field(
        None, description="items per leaf task of a mini-benchmark at each probe; null: none (it costs time)"
    )


class AlarmConfig(Section):
    """When to raise an alarm; a threshold of null never does."""

    clip_fraction: PositiveFloat | None = Field(
        0.001, description="share of a tensor's values that saturate, on average"
    )
    patience: Count = Field(20, description="optimizer steps that `clip_fraction` is averaged over")
    sqnr_db: float | None = Field(10.0, description="signal to quantization noise of a tensor, in dB, twice in a row")
    forgetting_nats: PositiveFloat | None = Field(
        0.05,
        description="rise of the loss on what the start model knew, nats per token, quantizers off, twice in a row",
    )
    quantization_nats: PositiveFloat | None = Field(
        0.05, description="nats per token that quantizers add to that loss, twice in a row"
    )
    forgetting_kl: PositiveFloat | None = Field(
        None, description="KL from the start model, nats per token, quantizers off, twice in a row: moved, if not lost"
    )
    quantization_kl: PositiveFloat | None = Field(
        None, description="nats per token that quantizers add to that divergence, twice in a row: likewise"
    )


class MonitorConfig(Section):
    """What is recorded of every quantized tensor, the forgetting probe, and alarms. No number of the training depends
    on it."""

    every: Count = Field(1, description="optimizer steps between rows of tensor statistics")
    sqnr_every: Count | None = Field(50, description="optimizer steps between measurements of SQNR; null: never")
    probe: ProbeConfig | None = Field(ProbeConfig(), description="the forgetting probe; null: none")
    alarms: AlarmConfig = Field(AlarmConfig(), description="thresholds")
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="`stop`: save a checkpoint and end with exit code 3 at the first alarm"
    )


class DiagnoseConfig(Section):
    """The diagnosis: further models are scored to tell forgetting, quantization noise and stale scales apart."""

    at_end: bool = Field(True, description="diagnose each quantized arm at the end of `qatrun train`")
    calibration_sequences: Count = Field(
        64, description="training sequences that fresh scales, and those of PTQ, are calibrated on"
    )
    items: Count | None = Field(
        None,
        description="items per leaf task, spread evenly, that the further models are scored on; null: all that are scored",
    )
