"""Inputs that nobody would write on purpose, and what the command line makes of them.

world    a folder as a user has it: model, text, task, recipe, a finished study
mutate   faults for bytes, text, JSON, YAML and tensors
inputs   what is broken and which command meets it, kind by kind
run      one input in a process of its own, and the verdict on it
"""
