"""Scores of a model, and what two of them, item by item, say about each other.

plan.py        what the tasks of a recipe would score, and what is missing
leaves.py      one task: its splits, its metrics
registry.py    names of tasks -> lm-eval's configurations
task_file.py   a user's task file: checked, and searched for code
templates.py   their templates in Jinja's sandbox
trust.py       whether code that comes with a task file may run
tasks.py       names in a recipe -> lm-eval tasks
sources.py     where their questions come from: built in, a local folder, the hub
harness.py     lm-eval around a model in memory -> Scores; context.py is what the process looks like meanwhile
scores.py      per-item results, saved and loaded
perplexity.py  held-out perplexity
paired.py      statistics of paired right-or-wrong answers: pure functions; replication.py the same over seeds
comparison.py  arm against twin, task by task, and the verdict
attribution.py what a drop is made of, and the rule that names the cause
"""
