"""Faults planted in runs of models that know different things, and what the diagnosis says of each.

models    who is trained, on which texts, and at which rates
code      the model that is made here: the standard library's source, learned in two minutes
planted   what is broken: scales, weights, texts, tokenizers
studies   the arms of each study, and how they are run
cells     one cell: what was planted, measured, answered
labels    what is harmful, by a rule that sees nothing of what the diagnosis sees; what is a right answer
summary   the matrix, the table, faults.csv
"""
