"""`qatrun inspect`: how the values of a model's tensors are spread on some text, and what that says of scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qatrun.data import open_probe
from qatrun.errors import InputError, Problem
from qatrun.files import content_sha256, write_json
from qatrun.formats import Role, get_format
from qatrun.layout import HISTOGRAMS_FILE, StudyFolder
from qatrun.model import DTYPES, architecture, check_model, load_model, on_device, text_config
from qatrun.numerics import bfloat16_products
from qatrun.quant import survey
from qatrun.quant.inspection import LOG2_EDGES, Spread, asymmetric, spreads
from qatrun.recipe import DataConfig, ModelConfig, Source
from qatrun.records.inspection import Inspection, TensorInspection
from qatrun.records.quantized import HistogramRecord, Histograms
from qatrun.report.page.inspection_page import inspection_document
from qatrun.scheme import Scaling, Scheme, Slot
from qatrun.study.display import ScoringDisplay
from qatrun.study.output import claimed_output
from qatrun.study.page import write_document
from qatrun.tokenizer import load_tokenizer

RESULT = "inspection.json"
OWN = (RESULT, HISTOGRAMS_FILE)
AT_ONCE = 4  # sequences
OUTLIER = 8.0  # times the median channel
LISTED = 5  # outliers
# Decibels: what a change must give to be advised (6 are one bit), what a tensor keeps that needs none, and below which it is
# said to lose much. Normally distributed values keep 31.6 in HiF8 and E4M3, 39.5 in INT8 (one scale, 400,000 of them).
WORTH, ENOUGH, POOR = 3.0, 30.0, 25.0
DRAWN, DRAWN_BINS = 8, 4  # histograms, and how many bins are one there


def inspect_model(
    path: str,
    data: str,
    display: ScoringDisplay,
    *,
    format_name: str = "int8",
    text_column: str | None = None,
    sequences: int = 16,
    seq_len: int = 512,
    output: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Path, Inspection]:
    """One pass over the text.

    Args:
        path: folder or hub id of a model in full precision.
        data: file, folder or hub id of a text.
        sequences, seq_len: how much of it is read, packed; shorter where the model's context is.
        output: folder; None: `<model>-inspect-<format>` here.
    Returns:
        (folder, what was found; also written there).
    Raises:
        InputError: no such model, text or format, a model without linears that can be quantized, or a folder that is not
            free.
    """
    get_format(format_name)
    model_config = ModelConfig(path=path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model_config)
    empty = architecture(model_config)
    check_model(model_config, empty)
    seen = survey(empty)
    if not seen.first_reader.keys() - seen.unfit.keys():
        raise InputError(f"{path}: it has no linear that can be quantized")
    context = getattr(text_config(empty), "max_position_embeddings", None) or seq_len
    source = Source(path=data, text_column=text_column)
    length = min(seq_len, context if context > 0 else seq_len)
    try:
        ids = open_probe(DataConfig(train=source, probe=source, seq_len=length), tokenizer, sequences)
    except InputError as error:
        raise InputError([Problem(f"--data {problem.message}") for problem in error.problems]) from None
    assert ids is not None
    folder = output or Path(f"{Path(path).resolve().name.replace(':', '-')}-inspect-{format_name}")
    settings = {
        "model": path,
        "data": data,
        "format": format_name,
        "text_column": text_column,
        "sequences": sequences,
        "seq_len": length,
        "data_sha256": content_sha256(Path(data)) if Path(data).is_file() else None,
    }
    with claimed_output(folder, settings, OWN, overwrite=overwrite):
        found: Mapping[Slot, Spread] = {}
        display.begin_reading(data)
        model: Any = on_device(load_model(model_config, DTYPES["float32"]))
        batches = [batch.to(model.device) for batch in ids.split(AT_ONCE)]
        with bfloat16_products():
            schemes: dict[Role, Scheme] = {role: _scheme(role, format_name) for role in ("input", "weight")}
            by_rows = {role: _by_rows(role, scheme) for role, scheme in schemes.items()}
            for number, so_far in enumerate(spreads(model, seen, batches, by_rows)):
                display.on_scored("batches", number, len(batches))
                found = so_far
        tensors = [_inspected(slot, spread, schemes[slot.role]) for slot, spread in found.items()]
        tensors.sort(key=_kept)
        result = Inspection(
            model=path,
            data=data,
            format=format_name,
            num_tokens=ids.numel(),
            tensors=tensors,
            answer=_answer(tensors, format_name),
        )
        histograms = [
            _histogram(each, found[Slot.parse(each.tensor)], schemes[each.role])
            for each in tensors
            if _has_values(each)
        ]
        write_json(folder / HISTOGRAMS_FILE, Histograms(tensors=histograms))
        write_document(StudyFolder(folder), inspection_document(folder.name, result, histograms[:DRAWN]))
        write_json(folder / RESULT, result)
    return folder, result


def _scheme(role: Role, format_name: str) -> Scheme:
    return Scheme(format_name, "per_tensor", get_format(format_name).target_amax[role], Scaling())


def _by_rows(role: Role, scheme: Scheme) -> Scheme:
    granularity = "per_token" if role == "input" else "per_channel"
    return Scheme(scheme.format, granularity, scheme.target_amax, Scaling(type="dynamic"))


def _has_values(tensor: TensorInspection) -> bool:
    return tensor.low != 0 or tensor.high != 0


def _inspected(slot: Slot, spread: Spread, scheme: Scheme) -> TensorInspection:
    fit = spread.fit(scheme)
    best = spread.best_amax(scheme)
    ranged = asymmetric(scheme) if slot.role == "input" else None
    range_fit = None if ranged is None else spread.fit(ranged)
    median = spread.typical_amax
    order = spread.channels.argsort(descending=True)
    far = int((spread.channels > OUTLIER * median).sum()) if median > 0 else 0
    found = TensorInspection(
        tensor=str(slot),
        role="input" if slot.role == "input" else "weight",
        low=float(spread.low),
        high=float(spread.high),
        num_channels=len(spread.channels),
        outlier_ratio=float(spread.channels.max()) / median if median > 0 else None,
        outliers=order[: min(far, LISTED)].tolist(),
        num_outliers=far,
        scale=float(fit[0]),
        sqnr_db=spread.sqnr_db(scheme, fit),
        typical_sqnr_db=spread.sqnr_db(scheme, fit, up_to=median) if median > 0 else None,
        best_amax=best,
        best_sqnr_db=spread.sqnr_db(scheme, spread.fit(scheme, best)),
        best_clips=spread.share_beyond(best),
        row_sqnr_db=spread.row_sqnr_db,
        zero_point=None if range_fit is None or range_fit[2] is None else int(range_fit[2]),
        asymmetric_sqnr_db=None if ranged is None or range_fit is None else spread.sqnr_db(ranged, range_fit),
        advice=[],
    )
    return found.model_copy(update={"advice": _advice(found)})


def _kept(tensor: TensorInspection) -> float:
    """What a tensor keeps with one scale, decibels: all of its values, or those of its typical channels if that is less."""
    return min(math.inf if value is None else value for value in (tensor.sqnr_db, tensor.typical_sqnr_db))


def _advice(tensor: TensorInspection) -> list[str]:
    """What gives a tensor that keeps too little more than WORTH decibels, the most first; of outlier channels that they are
    there."""
    if tensor.sqnr_db is None or _kept(tensor) >= ENOUGH:
        return []
    key = "input: {granularity: per_token}" if tensor.role == "input" else "weight: {granularity: per_channel}"
    clipped = tensor.best_sqnr_db if tensor.role == "input" else None  # of a weight no key says so
    ways = {
        key: tensor.row_sqnr_db,
        f"calibration: {{input: mse}}, amax {tensor.best_amax:.3g} clips {100 * tensor.best_clips:.2g} %": clipped,
        f"input: {{symmetric: false}}, zero-point {tensor.zero_point}": tensor.asymmetric_sqnr_db,
    }
    gains = {way: value - tensor.sqnr_db for way, value in ways.items() if value is not None}
    said = [f"{way}: {gain:+.0f} dB" for way, gain in sorted(gains.items(), key=lambda each: -each[1]) if gain >= WORTH]
    if tensor.role == "input" and tensor.num_outliers and tensor.num_outliers <= tensor.num_channels / 10:
        channels = ", ".join(map(str, tensor.outliers)) + (" ..." if tensor.num_outliers > LISTED else "")
        ratio = f"{tensor.outlier_ratio:.0f}x the median"
        said.insert(0, f"outlier channels {channels}, {ratio}: calibration: {{smooth: 0.5}}")
    return said


def _answer(tensors: list[TensorInspection], format_name: str) -> str:
    inputs = [each for each in tensors if each.role == "input"]
    poor = [each for each in tensors if _kept(each) < POOR]
    with_outliers = sum(any(text.startswith("outlier") for text in each.advice) for each in inputs)
    said = (
        f"{len(poor)} of {len(tensors)} tensors keep less than {POOR:g} dB in {format_name} with one scale a tensor"
        if poor
        else f"every tensor keeps at least {POOR:g} dB in {format_name} with one scale a tensor"
    )
    worst = tensors[0]
    if math.isfinite(_kept(worst)):
        said += f"; the worst is {worst.tensor} with {_kept(worst):.1f} dB"
        said += f" ({worst.advice[0]})" if worst.advice else ""
    if with_outliers:
        said += f"; {with_outliers} of {len(inputs)} inputs have outlier channels"
    return f"{said}. What a tensor costs the model this does not say: qatrun sensitivity does"


def _histogram(tensor: TensorInspection, spread: Spread, scheme: Scheme) -> HistogramRecord:
    counts = spread.counts.sum(0).cpu().view(-1, DRAWN_BINS).sum(1)
    edges = LOG2_EDGES[::DRAWN_BINS] - torch.tensor(tensor.scale).log2()
    there = torch.nonzero(counts).flatten()
    first, last = int(there[0]), int(there[-1]) + 1
    return HistogramRecord(
        tensor=tensor.tensor,
        format=scheme.format,
        scale=tensor.scale,
        target_amax=scheme.target_amax,
        log2_edges=edges[first : last + 1].tolist(),
        counts=counts[first:last].tolist(),
        num_zero=int(spread.num_zero),
        num_values=spread.num_values,
    )
