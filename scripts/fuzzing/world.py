"""A folder as a user has it, so small that a command takes a second: a model, text, a task, a recipe, a finished study."""

from __future__ import annotations

import json
import random
from pathlib import Path

VOCABULARY = 60
COLOURS = ["w51", "w52", "w53", "w54"]

RECIPE = """\
name: tiny
model:
  path: model
  compute_dtype: float32
data:
  train: {path: text.jsonl, text_column: text}
  valid: {path: valid.txt}
  seq_len: 16
  valid_sequences: 2
train:
  steps: 4
  global_batch_size: 2
  micro_batch_size: 1
  learning_rate: 1.0e-3
  lr_warmup_steps: 1
  save_every: 2
warmup: {steps: 1}
monitor: {sqnr_every: 2, probe: {every: 2, sequences: 2}}
qat:
  format: hif8
  scaling: {type: delayed, algorithm: max, window: 2}
arms:
  bf16: {qat: null}
  hif8: {}
eval:
  tasks: {likes.yaml: 0}
  data_dir: questions
  limit: 4
  batch_size: 4
budget: {likes.yaml: 1.0}
output_dir: runs
"""

TASK = """\
task: likes
dataset_path: me/likes
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""

# What a model folder or a task may bring along; a run leaves CANARY behind in the folder that holds the user's.
CODE = "import pathlib\npathlib.Path('../canary').touch()\n\n\ndef question(doc):\n    return doc['query']\n"


def write_world(folder: Path) -> None:
    """Everything but the study, which `qatrun train tiny.yaml` makes."""
    folder.mkdir(parents=True)
    _write_model(folder / "model")
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(1, 50)}" for _ in range(20)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "valid.txt").write_text("\n".join(lines[:10]))
    _write_questions(folder / "questions/me/likes/test.parquet", rng)
    (folder / "likes.yaml").write_text(TASK)
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "code.py").write_text(CODE)


def _write_questions(file: Path, rng: random.Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"query": f"w{i} w{i + 1}", "choices": COLOURS, "answer": rng.randrange(4)} for i in range(1, 9)]
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(1, VOCABULARY - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
