"""The whole job on a small model and real text that need no download.

Three parts, each usable alone: `corpus` (text from Python's standard library), `model` (a tokenizer
and a small Llama trained on it), `run` (all of it in one command, with `directory`, `configs`,
`commands` and `answers`). Tests use the first two as well.
"""
