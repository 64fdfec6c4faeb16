"""From names to tasks: what is found, what is planned, what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from qatrun import demo
from qatrun.errors import InputError
from qatrun.evaluate import sources
from qatrun.evaluate.leaves import demo_leaf
from qatrun.evaluate.plan import plan_tasks
from qatrun.evaluate.registry import find_task
from qatrun.evaluate.tasks import build_task, check_available

TASK_FILE = """
task: colours
dataset_path: me/colours
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "choices"
doc_to_target: answer
"""


def colour_rows(names: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{i}", "question": f"Which colour is {name}?", "choices": ["red", "blue"], "answer": i % 2}
        for i, name in enumerate(names)
    ]


def write_colours(folder: Path, train: str, test: str, shards: int = 1) -> Path:
    """A task file and its data, laid out like the hub below `folder`."""
    data = folder / "data" / "me" / "colours"
    data.mkdir(parents=True)
    for split, names in (("train", train), ("test", test)):
        for shard in range(shards):
            path = data / f"{split}-{shard:05}-of-{shards:05}.parquet"
            pq.write_table(pa.Table.from_pylist(colour_rows(names)[shard::shards]), path)
    (folder / "colours.yaml").write_text(TASK_FILE)
    return folder / "data"


def missing(name: str, num_fewshot: int = 0, **options: Any) -> str | None:
    [plan] = plan_tasks({name: num_fewshot}, **options)
    return plan.missing


def test_demo_tasks_need_nothing() -> None:
    plans = plan_tasks(dict.fromkeys(demo.TASKS, 0))
    assert [(plan.name, plan.metric, plan.source, plan.missing) for plan in plans] == [
        (name, "acc", "builtin", None) for name in demo.TASKS
    ]
    assert [plan.num_items for plan in plans] == [len(demo.items(name)) for name in demo.TASKS]


@pytest.mark.parametrize("name", demo.TASKS)
def test_demo_task_is_planned_as_lm_eval_sees_it(name: str) -> None:
    assert find_task(name).leaves == (demo_leaf(name),)


def test_demo_task_is_built_from_the_demo_s_items() -> None:
    built = build_task("demo_facts", 0)
    [task] = built.lm_eval_tasks["tasks"].values()
    item, doc = demo.items("demo_facts")[7], task.eval_docs[7]
    assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == (
        item["query"],
        item["choices"],
        item["answer"],
    )


def test_limit_counts_items() -> None:
    [plan] = plan_tasks({"demo_facts": 0}, limit=20)
    assert plan.num_items == 20


@pytest.mark.parametrize("name", ["hellaswagg", "demo_fact"])
def test_unknown_task_names_the_nearest(name: str) -> None:
    nearest = {"hellaswagg": "hellaswag", "demo_fact": "demo_facts"}[name]
    with pytest.raises(InputError) as refusal:
        build_task(name, 0)
    assert str(refusal.value) == f"eval.tasks.{name} -- unknown task '{name}' (did you mean '{nearest}'?)"


def test_generated_answers_cannot_be_compared() -> None:
    assert (
        missing("gsm8k")
        == "'gsm8k' has output_type generate_until; only loglikelihood and multiple_choice can be compared"
    )


def test_all_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    problems = check_available({"hellaswag": 0, "demo_facts": 0, "arc_challenge": 25}, data_dir=tmp_path)
    assert [problem.key for problem in problems] == ["eval.tasks.hellaswag", "eval.tasks.arc_challenge"]
    assert problems[0].message.startswith(f"no data: 'Rowan/hellaswag' is not below {tmp_path}, and it cannot be had")


def test_item_counts_of_the_hub_come_from_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    card = DatasetCard(
        "---\ndataset_info:\n"
        "- config_name: ARC-Challenge\n  splits:\n"
        "  - name: train\n    num_examples: 1119\n    num_bytes: 1\n"
        "  - name: test\n    num_examples: 1172\n    num_bytes: 1\n---\n"
    )
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(sources, "_card_sizes", sources._card_sizes.__wrapped__)
    monkeypatch.setattr(sources.DatasetCard, "load", lambda _: card)
    [plan] = plan_tasks({"arc_challenge": 25})
    assert (plan.num_items, plan.source, plan.missing) == (1172, "hub: allenai/ai2_arc", None)


def test_task_file_and_sharded_local_data(tmp_path: Path) -> None:
    data_dir = write_colours(tmp_path, train="pqrst", test="abcdefg", shards=2)
    name = str(tmp_path / "colours.yaml")
    [plan] = plan_tasks({name: 2}, data_dir=data_dir, limit=5)
    assert (plan.num_items, plan.metric, plan.missing) == (5, "acc_norm", None)
    assert plan.source == str(data_dir / "me" / "colours")
    [task] = build_task(name, 2, data_dir=data_dir).lm_eval_tasks["tasks"].values()
    assert sorted(doc["question"] for doc in task.eval_docs) == [row["question"] for row in colour_rows("abcdefg")]
    assert task.config.num_fewshot == 2


def test_few_shot_examples_that_are_scored_are_refused(tmp_path: Path) -> None:
    data_dir = write_colours(tmp_path, train="xyab", test="abcdefg")
    name = str(tmp_path / "colours.yaml")
    assert missing(name, 0, data_dir=data_dir) is None
    message = (
        "2 of the 4 few-shot examples in split 'train' are also scored items of 'colours'; "
        "score it with 0 few-shot examples, or from data with a split of its own for them"
    )
    assert missing(name, 1, data_dir=data_dir) == message
    with pytest.raises(InputError) as refusal:
        build_task(name, 1, data_dir=data_dir)
    assert refusal.value.problems[0].message == message


def test_a_stray_shared_row_is_the_benchmark_s_own(tmp_path: Path) -> None:
    letters = "".join(chr(0x3B1 + i) for i in range(300))
    data_dir = write_colours(tmp_path, train=letters[:200], test=letters[199:])
    assert missing(str(tmp_path / "colours.yaml"), 1, data_dir=data_dir) is None


def test_few_shot_examples_of_the_scored_split_are_refused() -> None:
    reason = missing("demo_facts", 1)
    assert reason is not None
    assert reason.startswith(
        f"{len(demo.items('demo_facts'))} of the {len(demo.items('demo_facts'))} few-shot examples"
    )


def test_more_few_shot_examples_than_there_are(tmp_path: Path) -> None:
    data_dir = write_colours(tmp_path, train="xyz", test="abcdefg")
    assert missing(str(tmp_path / "colours.yaml"), 4, data_dir=data_dir) == (
        "4 few-shot examples wanted, 'colours' has 3 in split 'train'"
    )


def test_split_without_a_file_is_named(tmp_path: Path) -> None:
    data_dir = write_colours(tmp_path, train="xyz", test="abc")
    (data_dir / "me" / "colours" / "test-00000-of-00001.parquet").unlink()
    assert missing(str(tmp_path / "colours.yaml"), data_dir=data_dir) == (
        f"no parquet file of split 'test' in {data_dir / 'me' / 'colours'} (there: train)"
    )


def test_missing_task_file() -> None:
    assert missing("nowhere/task.yaml") == "no such file: nowhere/task.yaml"


def test_real_benchmarks_from_a_folder(shared: Path) -> None:
    plans = plan_tasks({"mmlu": 5, "hellaswag": 0, "arc_challenge": 25}, data_dir=shared / "data")
    assert [(plan.num_items, plan.metric, plan.missing) for plan in plans] == [
        (14_042, "acc", None),
        (10_042, "acc_norm", None),
        (1_172, "acc_norm", None),
    ]


def test_hellaswag_without_a_train_split_of_its_own_is_zero_shot_only(shared: Path) -> None:
    reason = missing("hellaswag", 10, data_dir=shared / "data")
    assert reason is not None
    assert reason.startswith("16 of the 16 few-shot examples in split 'train' are also scored items of 'hellaswag'")
