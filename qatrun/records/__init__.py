"""What lies in files of a study, and what a verb prints as JSON: a type for each, a name for each quantity.

comparison.py    comparison.json           scores.py       eval/scores.json, `qatrun eval`
diagnosis.py     diagnosis.json            training.py     metrics.jsonl, alarms.jsonl, result.json, progress.json
seeds.py         seeds.json                quantized.py    plan.json, histograms.json
environment.py   environment.json          dryrun.py       `qatrun check`
export.py        export.json

`files.read_json` checks and makes them. Fields are in the order of the file; those with a default are what a folder of an
earlier version, or of another kind of arm, lacks.
"""
