"""A diagnosis on the terminal: the sentence, then what it stands on."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from qatrun.records.diagnosis import ArmDiagnosis, TensorRecord
from qatrun.report.grid import Flow, Grid
from qatrun.text import interval


def diagnosis_table(arm: ArmDiagnosis) -> RenderableType:
    """One arm of diagnosis.json."""
    style = "bold red" if arm.findings else "bold green"
    parts: list[RenderableType] = [Text(arm.sentence, style=style), Text()]
    effects = Grid("", "lost", "from", "to", "pp", "95% interval", "nats", "95% interval")
    for effect in arm.effects:
        effects.add_row(
            *(effect.name, effect.source, effect.target, f"{effect.drop_pp:+.2f}", interval(effect.ci95_pp)),
            *(f"{effect.loglikelihood:+.3f}", interval(effect.ci95_loglikelihood, 3)),
        )
    parts += [effects, Text()]
    costs = [
        f"{effect.name} {effect.text_loglikelihood:+.3f} ({interval(effect.ci95_text_loglikelihood, 3)})"
        for effect in arm.effects
        if effect.name in ("whole", "ptq", "beyond ptq")  # that the rule for saturation looks at
    ]
    words = ["nats a token of the right answer's text:", *(f"{cost}," for cost in costs[:-1]), *costs[-1:]]
    parts.append(Flow([Text(word) for word in words], indent="", blank=" "))
    parts.append(Text("perplexity: " + ", ".join(f"{key} {value:.3f}" for key, value in arm.perplexity.items())))
    parts += [Text(line) for line in _tensor_lines(arm.worst_tensors)]
    return Group(*parts)


def _tensor_lines(tensors: list[TensorRecord]) -> Iterator[str]:
    for tensor in tensors[:3]:
        sqnr = "" if tensor.sqnr_db is None else f", SQNR {tensor.sqnr_db:.1f} dB"
        since = "" if tensor.since_step is None else f" since step {tensor.since_step}"
        yield (
            f"{tensor.tensor}: clips {100 * tensor.clip_fraction:.2g} %{since}, "
            f"overshoot up to {tensor.overshoot:.1f}x{sqnr}"
        )
