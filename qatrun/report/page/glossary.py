"""Words of the field that a page explains where they stand: on hover, and all together at its end."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "pp": "percentage points: the difference of two accuracies that are themselves percentages",
    "nats": "the unit of the loss: 0.1 nats a token more is a perplexity 10.5 % higher",
    "twin": "the same training, on the same tokens in the same order, without quantizers",
    "fresh": "quantized with scales taken anew from text at hand, in place of those that training left",
    "PTQ": "post-training quantization: the twin, quantized without having been trained for it",
    "amax": "the largest magnitude in a tensor; its scale is made from it",
    "overshoot": "amax now over the amax that the scale stands for: above 1 the tensor is too large for its scale",
    "clipped": "rounded to the largest value that the format holds, because it was beyond it",
    "SQNR": "signal to quantization noise ratio in dB: 6 dB more is half the noise",
    "APE": "absolute percentage error of the training loss against the twin's",
    "KL": "Kullback-Leibler divergence: how far what the model predicts is from what the start model predicted",
    "95% interval": "had the study been done with other items, it would hold the true value in 95 of 100 cases",
    "beyond ptq": "what quantization lost beyond what the same weights lose with fitting scales",
    "stale scale": "what fresh scales win back: the loss of scales that lag behind",
    "granularity": "what finer scales, one a row, win back: the loss of a grid that is too coarse",
    "saturation": "values beyond the scale are clipped: it lags behind, or was set too small",
    "resolution": "the grid is too coarse for the values, whatever the scale, or because the scale is too large",
    "divergence": "training under quantization went astray, and neither clipping nor the grid explains it",
    "flips": "items that one model answers right and the other wrong",
    "McNemar p": "how likely so uneven flips are where the two models are equally good",
}
_WORDS = re.compile(rf"(?<![\w.:/-])({'|'.join(map(re.escape, GLOSSARY))})(?![\w:/-]|\.\w)")


def explained(text: object, escaped: Markup | None = None) -> Markup:
    """Escaped text in which each word of the glossary, where it first stands, says on hover what it means."""
    seen: set[str] = set()

    def explain(found: re.Match[str]) -> str:
        word = found[1]
        if word in seen:
            return word
        seen.add(word)
        return f'<abbr title="{escape(GLOSSARY[word])}">{word}</abbr>'

    return Markup(_WORDS.sub(explain, str(escape(text) if escaped is None else escaped)))
