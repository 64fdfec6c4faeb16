"""What is harmful, and what is a right answer.

The rule looks at text and questions that the diagnosis does not see (other documents, other items):

    forgetting      training without quantizers, start -> twin, costs 0.05 nats a token of text of the kind that the start
                    model was trained on, or 0.10 nats an answer; it is harmless below 0.04 and 0.10
    quantization    twin -> arm costs 0.02 nats a token of text of the kind that the start model was trained on, or of the
                    kind that it is trained on now, or 0.04 an answer, more than the same format costs the same model,
                    trained on the same text, without a fault. The cause is then what was planted: saturation or
                    resolution; where nothing was, any of saturation, resolution and divergence will do. Where training
                    forgot, harm begins a twentieth of that higher: two runs that forget part by themselves
    input           the text is garbage, or in tokens of another tokenizer: always harmful, and beside it nothing is judged.
                    It is found, too, by what is said of the text before or at the first step

A cause is harmful where the whole 95 % interval over sequences or questions lies above its line, harmless where it lies
below, and *open* between: there any answer will do. Answers count of tasks that the start model surely answers better than
by chance; where they are long, their line is that of a text of so many tokens.

What was changed after looking: on seed 0 (text that neither the start model nor training saw no longer counts; harm without
clipping need not be called saturation; forgetting is found from 0.04, so that 0.05 is), and on seeds 1 and 2 (intervals in
place of point estimates, answers near chance no longer count, two ruined runs may part, and the demo's questions are drawn:
its first hundred are those that it knows best). On seed 2 of `gpt2` and 0 of `opt`, the diagnosis took text for none that
was only foreign; on seed 0 of `mixtral` and 5 of `gpt2`, answers of 20 tokens had the line of one. A seed that
prompted a change does not judge: `faults.tally` names them. An answer is wrong where the diagnosis

    missed     rules a harmful cause out
    accused    finds a cause that is harmless, or another than the one that is not
    hid        does not show a harmful cause that costs more than 0.05 nats a token, or says that less could hide
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest
from torch.nn.utils.rnn import pad_sequence

from faults.cells import Cell, Nats
from faults.models import Question, Subject
from qatrun.data import IGNORE_INDEX, Batch, open_probe
from qatrun.evaluate.causes import A_TOKEN, AN_ANSWER
from qatrun.evaluate.paired import t_interval
from qatrun.evaluate.text import score_texts
from qatrun.export import artifact
from qatrun.model import load_model
from qatrun.recipe import DataConfig, ModelConfig
from qatrun.tokenizer import load_tokenizer

# Nats a token of text, nats an answer.
HARMLESS = {"forgetting": (0.04, 0.10), "quantization": (0.02, 0.04)}
HARMFUL = {"forgetting": (0.05, 0.10), "quantization": (0.02, 0.04)}
PARTING = 0.05  # of what training lost
MUST_SHOW = 0.05
OF_QUANTIZATION = ("saturation", "resolution", "divergence")
ANY = "quantization"  # one of these, where none was planted
INPUT, DAMAGED = "input", "damaged"
UNREADABLE = ("words", "characters", "tokenizer")  # faults that make text none to the model
JUDGED_SEQUENCES = 128
KNOWS = 0.001  # that a task is answered as well by chance

Array = npt.NDArray[np.float64]
Wrong = Literal["missed", "accused", "hid"]


class Judge:
    """What the rule looks at, for one subject."""

    def __init__(self, subject: Subject, seq_len: int) -> None:
        tokenizer = load_tokenizer(subject.config)
        self.read: dict[str, Batch] = {}
        self.answer_tokens = 0.0
        for kind in ("own", "new"):
            data = DataConfig(train=subject.text(kind, "train"), probe=subject.text(kind, "judge"), seq_len=seq_len)
            text = open_probe(data, tokenizer, JUDGED_SEQUENCES)
            assert text is not None  # it is given
            self.read[kind] = Batch(text, text)
        start = load_model(subject.config, torch.bfloat16)
        known = [items for items in subject.questions.values() if knows(start, tokenizer, items)]
        if known:
            self.read["answer"] = questions(tokenizer, [item for items in known for item in items])
            self.answer_tokens = self.read["answer"].num_targets / len(self.read["answer"].input_ids)
        self.plain = cache(self._plain)

    def _plain(self, path: str) -> Nats:
        """Of a plain folder, in bfloat16."""
        return self._nats(load_model(ModelConfig(path=path), torch.bfloat16))

    def quantized(self, folder: Path) -> Nats:
        """Of an arm as it is deployed."""
        return self._nats(artifact.load(folder)[0])

    def _nats(self, model: Any) -> Nats:
        nats = {name: nats_of_each(model, batch) for name, batch in self.read.items()}
        num_tokens = self.read["own"].input_ids.shape[1] - 1
        return Nats(
            own=(nats["own"] / num_tokens).tolist(),
            new=(nats["new"] / num_tokens).tolist(),
            answer=nats["answer"].tolist() if "answer" in nats else [],
        )


def nats_of_each(model: Any, batch: Batch) -> Array:
    """[num_sequences], of all tokens that count."""
    of_strata: Array = np.array(score_texts(model, {"it": batch}, batch_size=32).texts["it"].nats)
    return np.asarray(of_strata.sum(axis=1))


def questions(tokenizer: Any, items: Iterable[Question], choice: int | None = None) -> Batch:
    """Questions with an answer that counts alone; what is padded lies after it.

    Args:
        choice: which; None: the right one.
    """
    ids, labels = [], []
    for item in items:
        answer = item["choices"][item["answer"] if choice is None else choice]
        query = tokenizer(item["query"])["input_ids"]
        whole = tokenizer(f"{item['query']} {answer}")["input_ids"]
        shared = len(query) - (whole[: len(query)] != query)
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([IGNORE_INDEX] * shared + whole[shared:]))
    return Batch(
        pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    )


def knows(model: Any, tokenizer: Any, items: Sequence[Question]) -> bool:
    """Whether the likeliest choice is surely right more often than one that is drawn."""
    num_choices = len(items[0]["choices"])
    cost = np.stack([nats_of_each(model, questions(tokenizer, items, choice)) for choice in range(num_choices)])
    right = int((cost.argmin(axis=0) == [item["answer"] for item in items]).sum())
    return bool(binomtest(right, len(items), 1.0 / num_choices, alternative="greater").pvalue < KNOWS)


class Cost(NamedTuple):
    """What something costs: mean, and 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> Cost:
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        return cls(float(values.mean()), *(t_interval(values) or (-np.inf, np.inf)))


class Costs(NamedTuple):
    """Nats a token, nats an answer."""

    token: Cost
    answer: Cost

    def harm(
        self, cause: Literal["forgetting", "quantization"], tokens: float, more: tuple[float, float]
    ) -> bool | None:
        """Whether they do; None: open.

        Args:
            tokens: of an answer.
            more: that the line of harm lies higher.
        """
        harmful, harmless = (_lines(*lines[cause], tokens) for lines in (HARMFUL, HARMLESS))
        if any(cost.low > line + higher for cost, line, higher in zip(self, harmful, more, strict=True)):
            return True
        return None if any(cost.high > line for cost, line in zip(self, harmless, strict=True)) else False


def _lines(of_token: float, of_answer: float, tokens: float) -> tuple[float, float]:
    return of_token, max(of_answer, of_token * tokens)


class Label(NamedTuple):
    """What the rule says of a cell.

    Attributes:
        truth: the harmful causes; `ANY` stands for one of OF_QUANTIZATION.
        open: those of which the rule cannot tell.
        forgetting, quantization: what they cost; the latter beyond the healthy format.
    """

    truth: tuple[str, ...]
    open: tuple[str, ...]
    forgetting: Costs
    quantization: Costs


def label(cell: Cell, planted: Sequence[str], healthy: Cell) -> Label:
    """
    Args:
        planted: causes of quantization that the cell's fault may become.
        healthy: of the same format, model and text, without a fault.
    """
    forgetting = Costs(*(Cost.of(lost(cell.start, cell.twin, name)) for name in ("own", "answer")))
    beyond = {
        name: Cost.of(lost(cell.twin, cell.on, name) - lost(healthy.twin, healthy.on, name))
        for name in ("own", "new", "answer")
    }
    of_text = [beyond["own"], *([beyond["new"]] if cell.text == "new" else [])]
    quantization = Costs(max(of_text, key=lambda cost: cost.low), beyond["answer"])
    if cell.fault == DAMAGED or cell.fault in UNREADABLE:
        return Label((DAMAGED if cell.fault == DAMAGED else INPUT,), (), forgetting, quantization)
    parting = tuple(PARTING * max(cost.mean, 0.0) for cost in forgetting)
    harm = {
        ("forgetting",): forgetting.harm("forgetting", cell.answer_tokens, (0.0, 0.0)),
        tuple(planted) or (ANY,): quantization.harm("quantization", cell.answer_tokens, (parting[0], parting[1])),
    }
    truth, open_ = ([name for names, does in harm.items() if does is which for name in names] for which in (True, None))
    return Label(tuple(truth), tuple(open_), forgetting, quantization)


def lost(before: Nats, after: Nats, name: str) -> Array:
    """Nats a token of each sequence of a text, or nats of each answer."""
    difference: Array = np.array(getattr(after, name)) - np.array(getattr(before, name))
    return difference


def healthy_cells(cells: Iterable[Cell]) -> Mapping[tuple[str, int, str, str], Cell]:
    """(model, seed, text, format) -> the one without a fault."""
    return {
        (cell.model, cell.seed, cell.text, cell.format): cell
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
    for cause in found.truth:
        among = causes_of(cause)
        given = {answers[name] for name in among}
        costs = found.forgetting if cause == "forgetting" else found.quantization
        if given == {"ruled out"}:
            yield "missed", cause
        elif "found" not in given and (
            cause == INPUT or costs.token.low > MUST_SHOW or _less_could_hide(cell, among, costs)
        ):
            yield "hid", cause
    if found.truth == (INPUT,):
        return
    spared = {name for cause in (*found.truth, *found.open) for name in causes_of(cause)}
    for cause, answer in answers.items():
        if answer == "found" and cause not in spared:
            yield "accused", cause


def causes_of(cause: str) -> tuple[str, ...]:
    """Those that a harmful one may be found as."""
    return OF_QUANTIZATION if cause == ANY else (cause,)


def _less_could_hide(cell: Cell, causes: Sequence[str], costs: Costs) -> bool:
    """Whether what is not shown surely costs more than each of them is said to hide, in the unit in which it is said."""
    open_ = [cell.answers[cause] for cause in causes if cell.answers[cause].answer == "not shown"]
    of_unit = {A_TOKEN: costs.token.low, AN_ANSWER: costs.answer.low}
    return all(
        each.could_hide is not None and each.could_hide < of_unit.get(each.unit or "", -np.inf) for each in open_
    )
