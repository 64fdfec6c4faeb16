"""The tokenizer of a model, held against the model's embedding: an id without a row is an index error in the middle of a
run, and one that parts no documents trains on text that nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qatrun.errors import InputError, Problem
from qatrun.model import PANGU_MODEL_TYPE, code_not_trusted, config_json, load_config, location
from qatrun.model.config import refuse
from qatrun.recipe import ModelConfig


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer. A model without a pad token keeps none: packed sequences need no padding. Its `num_embeddings` is the
    number of rows that the model has for its ids.

    Raises:
        InputError: there is none that can be read, or it is not this model's.
    """
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        if config_json(model).get("model_type") == PANGU_MODEL_TYPE and not model.trust_remote_code:
            # Its tokenizer class is remote code too; tokenizer.json holds the same tokenizer.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(location(model), revision=model.revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(location(model), **options)
        tokenizer(["a text"])
    except InputError:
        raise
    except Exception as error:  # `tokenizers` raises no other type for a file that it does not understand
        if "trust_remote_code=True" in str(error):
            raise InputError(code_not_trusted(model)) from error
        raise InputError(Problem(f"{model.path}: no tokenizer: {_reason(model, error)}", key="model.path")) from error
    num_rows = getattr(load_config(model).get_text_config(), "vocab_size", None)
    refuse(model, _mistakes(tokenizer, num_rows))
    tokenizer.num_embeddings = num_rows
    return tokenizer


def _reason(model: ModelConfig, error: Exception) -> str:
    folder = Path(location(model))
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        return "the folder holds no tokenizer.json, and no other vocabulary that transformers reads"
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"its files are damaged, or of a newer version ({said[0]})"


def _mistakes(tokenizer: Any, num_rows: int | None) -> Iterator[str]:
    """Why texts cannot be encoded for a model with so many rows in its embedding (None: it does not say)."""
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        yield "no tokenizer: it knows no token"
        return
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None and bos is None:
        yield "the tokenizer has neither BOS nor EOS, so nothing parts documents: name an eos_token in tokenizer_config.json"
    if num_rows is None:
        return
    # A special token that is only for padding, or for images, often has no row and never comes up in text.
    unused = set(tokenizer.all_special_ids) | {
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    unused -= {eos, bos, tokenizer.unk_token_id}
    beyond = {token: id_ for token, id_ in vocabulary.items() if id_ >= num_rows and id_ not in unused}
    if beyond:
        token = max(beyond, key=lambda token: beyond[token])
        yield (
            f"the tokenizer knows {len(vocabulary)} tokens, and the model's embedding has {num_rows} rows: {len(beyond)} of "
            f"them, such as '{token}' ({beyond[token]}), have none. It is another model's tokenizer, or tokens were added "
            "to it without model.resize_token_embeddings"
        )
