"""What is harmful, and what is a right answer.

The rule was written down before the cells that it labels were run. It looks at text and questions that the diagnosis does
not see (other documents, other items), and at point estimates alone:

    forgetting      training without quantizers, start -> twin, costs 0.05 nats a token of text of the kind that the start
                    model was trained on, or 0.10 nats an answer
    quantization    twin -> arm costs 0.02 nats a token of text of the kind that the start model was trained on, or of the
                    kind that it is trained on now, or 0.04 an answer, more than the same format costs the same model,
                    trained on the same text, without a fault. The cause is then what was planted: saturation or
                    resolution; where nothing was, any of saturation, resolution and divergence will do
    input           the text is garbage, or in tokens of another tokenizer: always harmful, and beside it nothing is judged.
                    It is found, too, by what is said of the text before or at the first step

Answers count where questions are asked: of models that can answer any. The thresholds of the diagnosis were set on seeds 0
to 2 of the demo and on what the formats cost gut3m and stories260K after training; seed 0 of every model was looked at
while its rule was mended, and once changed this one: text that neither the start model nor training saw no longer counts,
nor must harm without clipping be called saturation. Of seed 1, `own` and `new` were looked at once more: one cell of 18
harmful ones was hid (gut3m, 0.070 nats a token of forgetting). Since then whole texts have half of the level, twice the
known text is read, and the line of forgetting is at 0.04. Seed 2 of these four judges. Then `gpt2` was added: on its seed 2
the new text, so foreign that token frequencies do better than the model, was taken for none; since then a text with order is
one, unless the model is surer of other tokens than 1 nat above any guess. Seed 3 still had the alarm of before; seed 4
judges. An answer is wrong where the diagnosis

    missed     rules a harmful cause out
    accused    finds a cause that is not harmful, or another than the one that is
    hid        does not show a harmful cause that costs more than 0.05 nats a token, or says that less could hide
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from faults.cells import Cell, Nats
from faults.models import Question, Subject
from qatrun.data import IGNORE_INDEX, open_probe
from qatrun.evaluate.text import mean_nll
from qatrun.export import artifact
from qatrun.model import load_model
from qatrun.recipe import DataConfig, ModelConfig
from qatrun.tokenizer import load_tokenizer

# Nats a token of text, nats an answer.
FORGETTING, QUANTIZATION = (0.05, 0.10), (0.02, 0.04)
MUST_SHOW = 0.05
OF_QUANTIZATION = ("saturation", "resolution", "divergence")
ANY = "quantization"  # one of these, where none was planted
INPUT, DAMAGED = "input", "damaged"
UNREADABLE = ("words", "characters", "tokenizer")  # faults that make text none to the model
JUDGED_SEQUENCES = 64

Wrong = Literal["missed", "accused", "hid"]


class Judge:
    """What the rule looks at, for one subject."""

    def __init__(self, subject: Subject, seq_len: int) -> None:
        tokenizer = load_tokenizer(subject.config)
        self.texts: dict[str, Tensor] = {}
        for kind in ("own", "new"):
            data = DataConfig(train=subject.text(kind, "train"), probe=subject.text(kind, "judge"), seq_len=seq_len)
            text = open_probe(data, tokenizer, JUDGED_SEQUENCES)
            assert text is not None  # it is given
            self.texts[kind] = text
        self.asked = questions(tokenizer, subject.questions) if subject.questions else None
        self.plain = cache(self._plain)

    def _plain(self, path: str) -> Nats:
        """Of a plain folder, in bfloat16."""
        return self._nats(load_model(ModelConfig(path=path), torch.bfloat16))

    def quantized(self, folder: Path) -> Nats:
        """Of an arm as it is deployed."""
        return self._nats(artifact.load(folder)[0])

    def _nats(self, model: Any) -> Nats:
        own, new = (mean_nll(model, self.texts[kind], batch_size=16) for kind in ("own", "new"))
        answer = 0.0
        if self.asked is not None:
            ids, labels = self.asked
            of_token = mean_nll(model, ids, batch_size=64, labels=labels)
            answer = of_token * int((labels[:, 1:] != IGNORE_INDEX).sum()) / len(ids)
        return Nats(own=own, new=new, answer=answer)


def questions(tokenizer: Any, items: Iterable[Question]) -> tuple[Tensor, Tensor]:
    """([num_items, longest] token ids, labels of the right answers); what is padded lies after them."""
    ids, labels = [], []
    for item in items:
        query = tokenizer(item["query"])["input_ids"]
        whole = tokenizer(f"{item['query']} {item['choices'][item['answer']]}")["input_ids"]
        shared = len(query) - (whole[: len(query)] != query)
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([IGNORE_INDEX] * shared + whole[shared:]))
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


class Cost(NamedTuple):
    """Nats a token, nats an answer."""

    token: float
    answer: float

    def harms(self, limits: tuple[float, float]) -> bool:
        return self.token >= limits[0] or self.answer >= limits[1]


class Label(NamedTuple):
    """What the rule says of a cell.

    Attributes:
        truth: the harmful causes; `ANY` stands for one of OF_QUANTIZATION.
        forgetting, quantization: what they cost; the latter beyond the healthy format.
    """

    truth: tuple[str, ...]
    forgetting: Cost
    quantization: Cost


def label(cell: Cell, planted: Sequence[str], healthy: Nats) -> Label:
    """
    Args:
        planted: causes of quantization that the cell's fault may become.
        healthy: what the format costs the model without a fault, as `costs` has it.
    """
    forgetting = Cost(cell.twin.own - cell.start.own, cell.twin.answer - cell.start.answer)
    here = costs(cell)
    of_text = [here.own - healthy.own, *([here.new - healthy.new] if cell.text == "new" else [])]
    quantization = Cost(max(of_text), here.answer - healthy.answer)
    if cell.fault == DAMAGED or cell.fault in UNREADABLE:
        return Label((DAMAGED if cell.fault == DAMAGED else INPUT,), forgetting, quantization)
    truth = ["forgetting"] if forgetting.harms(FORGETTING) else []
    truth += (list(planted) or [ANY]) if quantization.harms(QUANTIZATION) else []
    return Label(tuple(truth), forgetting, quantization)


def costs(cell: Cell) -> Nats:
    """What quantization costs an arm."""
    return Nats(
        own=cell.on.own - cell.twin.own, new=cell.on.new - cell.twin.new, answer=cell.on.answer - cell.twin.answer
    )


def healthy_costs(cells: Iterable[Cell]) -> Mapping[tuple[str, int, str, str], Nats]:
    """(model, seed, text, format) -> what the format costs without a fault."""
    return {
        (cell.model, cell.seed, cell.text, cell.format): costs(cell)
        for cell in cells
        if cell.fault == "none" and cell.study == cell.text
    }


def mistakes(cell: Cell, found: Label) -> Iterator[tuple[Wrong, str]]:
    """What the diagnosis says wrongly of a cell: how, and of which cause."""
    if found.truth == (DAMAGED,):
        if not cell.refused:
            yield "missed", DAMAGED
        return
    answers = {cause: each.answer for cause, each in cell.answers.items()}
    if cell.warned or INPUT in cell.alarms:
        answers[INPUT] = "found"
    harmful: set[str] = set()
    for cause in found.truth:
        among = OF_QUANTIZATION if cause == ANY else (cause,)
        harmful |= set(among)
        given = {answers[name] for name in among}
        cost = found.forgetting.token if cause == "forgetting" else found.quantization.token
        if given == {"ruled out"}:
            yield "missed", cause
        elif "found" not in given and (cause == INPUT or cost > MUST_SHOW or _hidden(cell, among) < cost):
            yield "hid", cause
    if found.truth == (INPUT,):
        return
    for cause, answer in answers.items():
        if answer == "found" and cause not in harmful:
            yield "accused", cause


def _hidden(cell: Cell, causes: Sequence[str]) -> float:
    """Nats a token that could hide in those that are not shown."""
    open_ = [cell.answers[cause] for cause in causes if cell.answers[cause].answer == "not shown"]
    return max((each.could_hide or 0.0 for each in open_ if each.unit == "nats a token"), default=0.0)
