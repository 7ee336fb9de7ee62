"""A demonstration of the package on a small model and real text, without downloads.

Three parts, each usable alone: `corpus` (text from Python's standard library), `model` (a tokenizer
and a small Llama trained on it), and `run` (everything in one command, with `directory`, `configs`,
`commands` and `answers`). Tests use the first two as well.
"""
