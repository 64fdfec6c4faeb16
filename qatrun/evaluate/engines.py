"""Engines that open exported folders: each gives a model that is called as one of transformers is.

An engine is another program's arithmetic on the same codes and scales. None is needed by the rest of qatrun; those that are
not installed are named with what installs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qatrun.errors import InputError, RunError
from qatrun.export import onnx
from qatrun.model import text_config
from qatrun.model.config import sentence

EXTRA = "pip install 'qatrun[export]'"
TRACED_BYTES = 2**30  # of inputs and outputs held at once

# (linear, x, y, token scales of x that the engine found by a rule of its own, else None)
Seen = Callable[[str, Tensor, Tensor, Tensor | None], None]


class Open(Protocol):
    """How an engine opens a folder."""

    def __call__(
        self, folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        packages: that it needs, by the names they are imported by.
        install: how to get them.
        open: (folder, dtype) -> a model in eval mode, called with `input_ids`, whose result has `logits`.
        trace: runs that model and tells of each of these linears (name -> in + out features) what went in and came out;
            None: it tells nothing.
        is_torch: whether all but the quantized linears is computed as it was when scored; else in float32.
        codes_as_scored: whether it rounds inputs to the codes that were scored, those at the edges too.
    """

    packages: tuple[str, ...]
    install: str
    open: Open
    trace: Callable[[Any, Mapping[str, int], Tensor, Seen], None] | None
    is_torch: bool
    codes_as_scored: bool

    def missing(self) -> str | None:
        """Why it cannot be used here; None where it can."""
        lacking = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(lacking)} is not installed ({self.install})" if lacking else None


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        InputError: it is not installed.
    """
    found = ENGINES[name]
    if (missing := found.missing()) is not None:
        raise InputError(f"engine {name}: {missing}")
    return found


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder.

    Raises:
        InputError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises no other type for a file that it does not understand
        raise InputError(f"{folder}: no tokenizer: {sentence(error)}") from error


def _open_transformers(
    folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
) -> Any:
    """The folder as `AutoModelForCausalLM.from_pretrained` gives it: weights kept compressed until the first forward, inputs
    quantized.

    Raises:
        InputError: it cannot be opened.
        RunError: keys are missing or not expected.
    """
    with _quiet_library():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever files and values lead to
            raise InputError(f"{folder}: transformers cannot open it: {sentence(error)}") from error
        text_config(model).use_cache = model.config.use_cache = False
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward decompresses
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RunError(f"{folder}: transformers reports {kind.replace('_', ' ')}, such as {min(info[kind])}")
    return model


@contextmanager
def _quiet_library() -> Iterator[None]:
    """compressed-tensors tells of its work by loguru and by progress bars, to which it has no switch."""
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")


def _trace_transformers(model: Any, linears: Mapping[str, int], input_ids: Tensor, seen: Seen) -> None:
    """Runs the model once, and looks at its linears."""
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    def look(name: str, linear: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x, arguments = inputs[0], linear.quantization_scheme.input_activations
        seen(name, x, y, compute_dynamic_scales_and_zp(x, arguments, linear)[0] if arguments.dynamic else None)

    handles = [model.get_submodule(name).register_forward_hook(partial(look, name)) for name in linears]
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


class _OnnxModel(PreTrainedModel):  # type: ignore[misc]
    """An ONNX graph as a model of transformers: logits alone, without a cache, on the CPU."""

    def __init__(self, config: Any, file: Path) -> None:
        super().__init__(config)
        self.file, self.session = file, _session(file)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """[batch, sequence] token ids -> logits."""
        (logits,) = self.session.run(["logits"], {"input_ids": input_ids.numpy()})
        return CausalLMOutput(logits=torch.from_numpy(logits))


class OwnModel(nn.Module):
    """A folder that an engine runs by itself, and that only its model class of lm-eval's can ask.

    Attributes:
        dtype: that it computes in.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | Literal["auto"], *, trust_remote_code: bool) -> None:
        super().__init__()
        self.folder, self.trust_remote_code = folder, trust_remote_code
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.dtype = config.dtype if dtype == "auto" else dtype
        self.context = config.get_text_config().max_position_embeddings

    def lm_eval_model(self) -> tuple[type, Mapping[str, Any]]:
        """The class, and what to make it with."""
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM, {
            "pretrained": str(self.folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "trust_remote_code": self.trust_remote_code,
            "max_model_len": self.context,
            "enforce_eager": True,  # nothing is asked often enough to be worth compiling
        }


def _open_vllm(
    folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
) -> Any:
    """vLLM brings its own attention.

    Raises:
        InputError: no config.json there.
    """
    try:
        return OwnModel(folder, dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: vllm cannot open it: {sentence(error)}") from error


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _open_onnx(
    folder: Path, dtype: torch.dtype | Literal["auto"], *, attn_implementation: str, trust_remote_code: bool
) -> Any:
    """A graph computes in the dtype and with the attention that it was made with.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return _OnnxModel(config, folder / onnx.FILE).eval()
    except Exception as error:  # a damaged file, or one that is missing
        raise InputError(f"{folder}: onnxruntime cannot open it: {sentence(error)}") from error


def _trace_onnx(model: _OnnxModel, linears: Mapping[str, int], input_ids: Tensor, seen: Seen) -> None:
    """Runs the graph again, with the inputs and outputs of its linears among its results."""
    import onnx as library

    graph = library.load(model.file, load_external_data=False)
    ends = onnx.ends_of_linears(graph.graph, linears)
    results = [output.name for output in graph.graph.output]
    for names in _in_parts(linears, input_ids.numel()):
        wanted = list(dict.fromkeys(value for name in names for value in ends[name]))
        del graph.graph.output[:]
        graph.graph.output.extend(library.ValueInfoProto(name=value) for value in [*results, *wanted])
        traced = model.file.with_name(f".traced.{model.file.name}")  # beside the weights, which it refers to
        try:
            library.save(graph, traced)
            found = dict(zip(wanted, _session(traced).run(wanted, {"input_ids": input_ids.numpy()}), strict=True))
        finally:
            traced.unlink(missing_ok=True)
        for name in names:
            x, y = (torch.from_numpy(found[end]) for end in ends[name])
            seen(name, x, y, None)


def _in_parts(linears: Mapping[str, int], num_tokens: int) -> Iterator[list[str]]:
    """Names of linears in runs whose inputs and outputs take at most `TRACED_BYTES` together."""
    run: list[str] = []
    size = 0
    for name, width in linears.items():
        size += 4 * width * num_tokens
        if run and size > TRACED_BYTES:
            yield run
            run, size = [], 4 * width * num_tokens
        run.append(name)
    yield run


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "transformers": Engine(
            ("compressed_tensors",),
            EXTRA,
            _open_transformers,
            _trace_transformers,
            is_torch=True,
            codes_as_scored=False,
        ),
        "vllm": Engine(("vllm",), "pip install vllm", _open_vllm, None, is_torch=False, codes_as_scored=False),
        "onnxruntime": Engine(
            ("onnx", "onnxruntime"), EXTRA, _open_onnx, _trace_onnx, is_torch=False, codes_as_scored=True
        ),
    }
)
