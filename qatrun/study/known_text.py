"""Text of what the start model knew, on which a rise of the loss is forgetting; one a study, chosen before training:

    given         `data.probe`
    held-out      the held-out text, where the model knows it as well as what it writes: then training brings nothing new
    own writing   else what the start model writes, sampled once

Text that is new to the model would show what it learns instead of what it forgets. Its own writing has a flaw, too: on it
the rise is KL(start || now) in expectation, so a model that becomes better at its own kind of text rises as well. Hence the
second choice before the third. Held-out text is known as well as the own writing where the Jensen-Shannon divergence of
their token frequencies is hardly beyond that of two halves of the own writing, and the loss on it is hardly higher: new
facts in familiar words differ in nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatrun.data import open_data, open_probe
from qatrun.errors import DamagedFileError, InputError
from qatrun.evaluate.attribution import KNEW
from qatrun.evaluate.text import mean_nll
from qatrun.files import reading, whole_file
from qatrun.layout import ArmFolder, StudyFolder
from qatrun.model import DTYPES, load_model, on_device, text_config, write_text
from qatrun.recipe import Arm, Recipe
from qatrun.study.inputs import check_inputs
from qatrun.study.tokenizer_fit import fits
from qatrun.tokenizer import load_tokenizer

Source = Literal["given", "held-out", "own writing"]

# As much is read as is held out, and twice that up to here: 8,000 tokens left 0.02 nats open, where 0.01 may decide.
ENOUGH_TOKENS = 16_384
KNOWN_TEXT = "what the start model knows"
SEED = 0  # of the writing, whatever the training's: seeds of a study are compared on one text
# Nats of divergence beyond the noise. Measured, 4,000 to 16,000 tokens each: text of the model's own kind 0 to 0.02, of
# another from 0.08.
SAME_KIND = 0.04
# Nats a token of loss beyond that on the own writing. Measured: own kind -0.1 to 0.4, half of it about new facts 1.0.
AS_FAMILIAR = 0.6
LEAST_TOKENS = 1000  # of each sample compared
LEAST_COUNT = 10  # of a token, over all texts compared; rarer ones are counted as one, else they are mostly noise


@dataclass(frozen=True)
class KnownText:
    """The text and where it is from.

    Attributes:
        input_ids: [num, seq_len] int64.
        divergence: Jensen-Shannon, nats, between the own writing and the held-out text; None where the text was given, or is
            too little to tell.
        noise: the same between halves of the own writing.
        surprise: of the start model, nats a token that it loses on the held-out text beyond those on the own writing.
        fits: whether the tokenizer is known to be the model's by what it writes; asked where the held-out text is hardly
            better than a guess.
    """

    input_ids: Tensor
    source: Source
    divergence: float | None = None
    noise: float | None = None
    surprise: float | None = None
    fits: bool = False

    def shows_fit(self, knew: bool) -> bool:
        """Whether the tokenizer is known to be the model's: with it, the model reads its own writing, or text that is given.

        Args:
            knew: whether the start model reads this text better than a guess.
        """
        return self.fits or (self.source == "given" and knew)

    def __str__(self) -> str:
        num, seq_len = self.input_ids.shape
        size = f"{num} sequences of {seq_len} tokens"
        if self.source == "given":
            return f"data.probe, {size}"
        if self.divergence is None or self.noise is None or self.surprise is None:
            return f"what the start model writes itself, {size}; there is too little held-out text to tell its kind"
        how = (
            f"token frequencies {self.divergence:.3f} nats apart, halves of its writing {self.noise:.3f}; loss "
            f"{self.surprise:+.2f} nats beyond that on its writing"
        )
        if self.source == "held-out":
            return f"the held-out text, {size}, which the start model knows as well as what it writes ({how})"
        return f"what the start model writes itself, {size}; the held-out text is of another kind, or new ({how})"

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        ids = self.input_ids.int().contiguous()
        about = {key: value for key, value in vars(self).items() if key != "input_ids"} | {"sha256": _digest(ids)}
        with whole_file(file) as partial:
            save_file({"input_ids": ids}, partial, metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, start: ArmFolder) -> KnownText:
        """What the folder of the start model holds.

        Raises:
            DamagedFileError: it is missing, torn or something else.
        """
        with reading(start.known_text), safe_open(start.known_text, "pt") as stored:
            about = json.loads(stored.metadata()["about"])
            ids = stored.get_tensor("input_ids")
            if about.pop("sha256") != _digest(ids):
                raise ValueError("its token ids are not those that were written")
            return cls(ids.long(), **about)


def known_text(folder: StudyFolder, recipe: Recipe, warn: Callable[[str], None]) -> KnownText | None:
    """The study's; chosen, and kept, where that has not been done or it is damaged, which gives the same. None where there
    is none to be had, and why is said.

    Raises:
        InputError: model or text have changed, or cannot be read.
    """
    try:
        return KnownText.load(folder.start)
    except DamagedFileError as error:
        if folder.start.known_text.is_file():
            warn(f"{error}; made again")
    check_inputs(folder, recipe)
    chosen = _choose(recipe.arm_by_name[recipe.arm_names[0]], recipe.eval.batch_size, warn)
    if chosen is not None:
        chosen.save(folder.start.known_text)
    return chosen


def _choose(arm: Arm, batch_size: int, warn: Callable[[str], None]) -> KnownText | None:
    data, tokenizer = arm.data, load_tokenizer(arm.model)
    num = max(data.valid_sequences, min(2 * data.valid_sequences, ENOUGH_TOKENS // data.seq_len))
    given = open_probe(data, tokenizer, num)
    if given is not None:
        return KnownText(given, "given")
    held_out = open_data(data, tokenizer, arm.train.seed).valid.input_ids
    model = on_device(load_model(arm.model, DTYPES[arm.model.compute_dtype]))
    first = next(
        token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, int(held_out[0, 0])) if token is not None
    )
    try:
        own = write_text(model, first, num, data.seq_len, seed=SEED, batch_size=batch_size)
    except InputError as error:
        warn(
            f"the start model writes no text of its own ({error}), so that what it forgets is not watched: give data.probe, "
            "text of the kind that it was pretrained on"
        )
        return None
    of_held_out, of_own = (mean_nll(model, text, batch_size=batch_size) for text in (held_out, own))
    foreign = of_held_out > KNEW * math.log(text_config(model).vocab_size)
    its_own = foreign and fits(model, tokenizer, own, batch_size=batch_size)
    compared = kinship(own, held_out, tokenizer.all_special_ids)
    if compared is None:
        return KnownText(own, "own writing", fits=its_own)
    (divergence, noise), surprise = compared, of_held_out - of_own
    if divergence - noise <= max(noise, SAME_KIND) and surprise <= AS_FAMILIAR:
        return KnownText(held_out, "held-out", divergence, noise, surprise, its_own)
    return KnownText(own, "own writing", divergence, noise, surprise, its_own)


def kinship(own: Tensor, other: Tensor, special: list[int]) -> tuple[float, float] | None:
    """How far another text is from own writing, and halves of the own writing from each other: Jensen-Shannon divergences of
    token frequencies, nats, over samples of one size.

    Args:
        own: [num, seq_len] token ids, whose first of each sequence nobody wrote.
        other: [num_other, seq_len].
        special: token ids that part or pad texts, and are none of them.
    Returns:
        (between the two, noise); None where there is too little text to tell.
    """
    texts = [text[~torch.isin(text, torch.tensor(special))] for text in (own[:, 1:], other[:, 1:])]
    half = min(len(text) for text in texts) // 2
    if half < LEAST_TOKENS:
        return None
    counts = torch.stack(
        [
            torch.bincount(part, minlength=int(max(map(torch.max, texts))) + 1)
            for text in texts
            for part in text[: 2 * half].split(half)
        ]
    ).double()
    common = counts.sum(0) >= LEAST_COUNT
    shares = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1) / half
    first, second, *others = shares
    between = [_divergence(*pair) for pair in product((first, second), others)]
    return sum(between) / len(between), _divergence(first, second)


def _divergence(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon, nats, of two distributions, [num_outcomes] each."""
    middle = (p + q) / 2
    return float(sum(torch.xlogy(each, each / middle.clamp(min=1e-300)).sum() for each in (p, q)) / 2)


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
