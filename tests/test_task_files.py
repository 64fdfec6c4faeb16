"""Task files of others: nothing of theirs runs unasked, and what is wrong with one is said before anything is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_evaluate_tasks import write_colours
from tiny_world import run_qatrun

from qatrun.errors import InputError
from qatrun.evaluate.plan import plan_tasks
from qatrun.evaluate.tasks import build_task
from qatrun.evaluate.trust import trusting_task_code

ALLOW = "read it, then allow it with --trust-task-code"
BASE = """\
task: colours
dataset_path: me/colours
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
CODE = "open('RAN', 'w').close()\n\ndef f(doc, *_):\n    return doc['question']\n\ndef same(docs):\n    return docs\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with data for `BASE`, and `code.py` that leaves `RAN` behind where it is imported."""
    write_colours(tmp_path, train="pqrst", test="abcdefg")
    (tmp_path / "code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(name: str = "t.yaml") -> str | None:
    [plan] = plan_tasks({name: 0}, data_dir=Path("data"))
    if plan.missing is None:
        return None
    with pytest.raises(InputError) as raised:
        build_task(name, 0, data_dir=Path("data"))
    again = raised.value.problems[0].message
    assert again == plan.missing or again.startswith("lm-eval cannot ask it: ")  # it renders a question before we do
    return plan.missing


def shell(template: str) -> str:
    return BASE.replace("{{question}}", template)


RUNS_CODE = {
    "a function": (
        BASE.replace('"{{question}}"', "!function code.f"),
        "t.yaml:6: doc_to_text is code (!function code.f)",
    ),
    "of documents": (
        f"{BASE}process_docs: !function code.same\n",
        "t.yaml:10: process_docs is code (!function code.same)",
    ),
    "of a filter": (
        f"{BASE}filter_list: [{{name: x, filter: [{{function: custom, filter_fn: !function code.f}}]}}]\n",
        "t.yaml:10: filter_fn is code (!function code.f)",
    ),
    "of a package": (
        f"{BASE}process_docs: !function os.system\n",
        "t.yaml:10: process_docs is code (!function os.system)",
    ),
    "as a key": (f"{BASE}metadata: {{!function code.f : 1}}\n", "t.yaml:10: metadata is code (!function code.f)"),
    "in an include": ("include: inner.yaml\ntask: outer\n", "inner.yaml:1: process_docs is code (!function code.same)"),
    "in a group": (
        "group: g\ntask:\n- task: arc_easy\n  doc_to_text: !function code.f\n",
        "t.yaml:4: doc_to_text is code (!function code.f)",
    ),
    "a template": (
        shell("{{ cycler.__init__.__globals__.os.system('touch RAN') }}"),
        "t.yaml:6: doc_to_text is code (its template reaches for '__globals__')",
    ),
    "a template's filter": (
        shell("{{ cycler|attr('__init__') }}"),
        "t.yaml:6: doc_to_text is code (its template reaches for '__init__')",
    ),
    "a template's index": (
        shell("{{ question['__class__'] }}"),
        "t.yaml:6: doc_to_text is code (its template reaches for '__class__')",
    ),
    "a metric": (
        BASE.replace("metric: acc", "metric: ./code"),
        "t.yaml: metric_list: './code' is not a metric of lm-eval's, it is a script",
    ),
    "a metric by flag": (
        BASE.replace("metric: acc", "metric: acc, hf_evaluate: true"),
        "t.yaml: metric_list: 'acc' is not a metric of lm-eval's, it is a script",
    ),
    "a prompt": (f"{BASE}use_prompt: 'promptsource:x'\n", "t.yaml:10: use_prompt is a prompt of another package"),
}


@pytest.mark.parametrize("case", RUNS_CODE)
def test_code_is_named_with_its_line_and_none_of_it_runs(folder: Path, case: str) -> None:
    text, message = RUNS_CODE[case]
    (folder / "inner.yaml").write_text(f"process_docs: !function code.same\n{BASE}")
    (folder / "t.yaml").write_text(text)
    assert refusal() == f"{message}: {ALLOW}"
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler|attr('__in' ~ 'it__') }}",
        "{{ question['__cl' ~ 'ass__'] }}",
        "{{ ('{0.__cla' ~ 'ss__}').format(question) }}",
    ],
)
def test_a_name_made_while_rendering_stays_in_the_sandbox(folder: Path, template: str) -> None:
    (folder / "t.yaml").write_text(shell(template))
    said = refusal()
    assert said is not None
    assert said.startswith("'colours': doc_to_text: access to attribute '__")
    assert said.endswith(f"({ALLOW})")


def test_trusted_code_runs(folder: Path) -> None:
    text = BASE.replace('"{{question}}"', "!function code.f").replace("colours\n", "trusted\n", 1)
    (folder / "t.yaml").write_text(text)
    assert refusal() is not None
    with trusting_task_code():
        [plan] = plan_tasks({"t.yaml": 0}, data_dir=Path("data"))
        assert plan.missing is None
        [task] = build_task("t.yaml", 0, data_dir=Path("data")).lm_eval_tasks["tasks"].values()
        assert task.doc_to_text(task.eval_docs[0]) == task.eval_docs[0]["question"]
    assert (folder / "RAN").exists()
    assert refusal() is not None


def test_a_file_that_changes_after_it_was_checked_is_scored_as_it_was(folder: Path) -> None:
    (folder / "t.yaml").write_text(BASE)
    assert plan_tasks({"t.yaml": 0}, data_dir=Path("data"))[0].missing is None
    (folder / "t.yaml").write_text(f"{BASE}process_docs: !function code.same\n")
    assert build_task("t.yaml", 0, data_dir=Path("data")).metric == "acc"
    assert not (folder / "RAN").exists()


def test_lm_eval_s_own_tasks_and_their_functions_need_no_trust(folder: Path, shared: Path) -> None:
    (folder / "g.yaml").write_text("group: mine\ntask: [arc_challenge, hellaswag]\n")
    for name in ("hellaswag", "g.yaml"):
        assert plan_tasks({name: 0}, data_dir=shared / "data")[0].missing is None
    [task] = build_task("hellaswag", 0, data_dir=shared / "data", limit=2).lm_eval_tasks["tasks"].values()
    assert callable(task.config.process_docs)


FAULTY = {
    "../../x": "t.yaml:1: task: '../../x' is no plain name (no separators, no leading dot)",
    "a\\b": "t.yaml:1: task: 'a\\\\b' is no plain name (no separators, no leading dot)",
    ".hidden": "t.yaml:1: task: '.hidden' is no plain name (no separators, no leading dot)",
    '"a\\nb"': "t.yaml:1: task: 'a\\nb' is no plain name (no separators, no leading dot)",
    "n" * 300: f"t.yaml:1: task: '{'n' * 300}' is no plain name (no separators, no leading dot)",
    "[x]": "t.yaml: task: missing, or no text: a task file names its task or group",
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_task_s_name_leads_nowhere(folder: Path, name: str) -> None:
    (folder / "t.yaml").write_text(BASE.replace("colours", name, 1))
    assert refusal() == FAULTY[name]


def test_a_folder_is_no_task(folder: Path) -> None:
    (folder / "evil").mkdir()
    (folder / "evil" / "t.yaml").write_text(BASE.replace("colours", str(folder / "evil"), 1))
    said = refusal(str(folder / "evil"))
    assert said is not None
    assert said.startswith("unknown task")


MISTAKES = {
    "no mapping": ("- x\n", "t.yaml: it is no task: a task file is a mapping of keys"),
    "a key": (f"{BASE}doc_to_txt: x\n", "t.yaml: doc_to_txt: unknown key (did you mean 'doc_to_text'?)"),
    "a type": (
        BASE.replace("test_split: test", "test_split: 3"),
        "t.yaml: test_split: input should be a valid string (got 3)",
    ),
    "no split": (
        BASE.replace("test_split: test\n", ""),
        "t.yaml: test_split: missing (or validation_split): nothing to score",
    ),
    "a template": (
        shell("{{ question"),
        "t.yaml:6: doc_to_text: unexpected end of template, expected 'end of print statement'.",
    ),
    "a column": (shell("{{ qestion }}"), "'colours': doc_to_text: 'qestion' is undefined"),
    "an include": ("include: t.yaml\ntask: x\n", "t.yaml: include: it includes itself"),
    "no include": ("include: no.yaml\ntask: x\n", "no.yaml: No such file or directory"),
    "groups in a ring": ("group: g\ntask: [g]\n", "t.yaml: its groups hold each other"),
    "a kind that is a list": (
        BASE.replace("output_type: multiple_choice", "output_type: []"),
        "t.yaml: output_type: input should be a valid string (got [])",
    ),
    "an unknown member": ("group: g\ntask: [nope-such]\n", "t.yaml: no task 'nope-such' in it or among lm-eval's"),
    "a number as member": ("group: g\ntask: [5]\n", "a group lists names, or mappings with one, not 5"),
    "a cache": (
        f"{BASE}dataset_kwargs: {{cache_dir: /}}\n",
        "t.yaml:10: cache_dir: a task does not say where data is kept; set HF_HOME",
    ),
    "aliases": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True))
        + BASE,
        "t.yaml: its aliases stand for more than 100,000 values",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_faulty_file_is_refused_by_check(folder: Path, case: str) -> None:
    text, message = MISTAKES[case]
    (folder / "t.yaml").write_text(text)
    assert refusal() == message


OWN_FILE = BASE.replace("me/colours", "json\ndataset_kwargs: {data_files: {test: items.jsonl}}").replace(
    "training_split: train\n", ""
)
ROW = '{"question": "What is it?", "choices": ["red", "blue"], "answer": 1}\n'


@pytest.mark.parametrize(
    ("rows", "shots", "said"),
    [
        (ROW * 5, 0, None),
        (ROW * 5, 2, "5 of the 5 few-shot examples in split 'test' are also scored items of 'colours'"),
        (ROW.replace("question", "q"), 0, "'colours': doc_to_text: 'question' is undefined"),
        (ROW + "{", 0, "json: split 'test' cannot be read (JSON parse error"),
    ],
)
def test_a_file_of_questions_is_counted_and_looked_at_before_the_run(
    folder: Path, rows: str, shots: int, said: str | None
) -> None:
    (folder / "t.yaml").write_text(OWN_FILE)
    (folder / "items.jsonl").write_text(rows)
    [plan] = plan_tasks({"t.yaml": shots})
    if said is None:
        assert (plan.num_items, plan.missing) == (5, None)
    else:
        assert plan.missing is not None
        assert plan.missing.startswith(said)


def test_an_answer_that_is_no_choice_is_refused_before_anything_is_scored(folder: Path) -> None:
    (folder / "t.yaml").write_text(
        BASE.replace("doc_to_target: answer", "doc_to_target: '{{ 5 if question.endswith(\"c?\") else answer }}'")
    )
    with pytest.raises(InputError) as raised:
        build_task("t.yaml", 0, data_dir=Path("data"))
    assert raised.value.problems[0].message == "'colours': the answer to item 2 (5) is none of its choices"


@pytest.mark.parametrize("verb", ["check", "train", "eval"])
def test_the_option_is_named_with_the_recipe_s_line_and_works(world: Path, verb: str) -> None:
    likes = (world / "likes.yaml").read_text().replace("doc_to_text: query", "doc_to_text: !function code.f")
    (world / "likes.yaml").write_text(likes)
    (world / "code.py").write_text("def f(doc):\n    open('RAN', 'w').close()\n    return doc['query']\n")
    command = [
        verb,
        *(["model", "--tasks", "likes.yaml", "--limit", "2"] if verb == "eval" else ["tiny.yaml", "--set", "name=new"]),
    ]
    ran = run_qatrun(*command, cwd=world)
    assert ran.code == 2
    where = "" if verb == "eval" else "tiny.yaml:27: "
    assert ran.err == f"{where}eval.tasks.likes.yaml -- likes.yaml:6: doc_to_text is code (!function code.f): {ALLOW}\n"
    assert not (world / "RAN").exists()
    if verb != "train":
        assert run_qatrun(*command, "--trust-task-code", cwd=world).code == 0
        assert (world / "RAN").exists() == (verb == "eval")
