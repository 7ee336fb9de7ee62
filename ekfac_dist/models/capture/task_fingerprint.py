"""By what a task of a user's own is known again: its code and its settings."""

import ast
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.models.capture import tasks
from ekfac_dist.models.capture.tasks import Task


def task_fingerprint(task: Task) -> str | None:
    """SHA-256 of the source of a task's classes, and of its attributes; None of a built-in task.

    Comments, docstrings and layout do not count. What the classes call outside themselves is not
    seen. Where a class has no source, as in an interpreter, it is its bytecode, which is of one
    version of Python.

    Args:
        task: The task.
    """
    own = [cls for cls in type(task).__mro__ if not _is_known(cls)]
    if not own:
        return None
    digest = hashlib.sha256()
    for part in (*map(_code, own), *_content(_attributes(task))):
        digest.update(f"{len(part)}|{part}".encode())
    return digest.hexdigest()


def _is_known(cls: type) -> bool:
    """Whether a class is one of this package's or of Python's, known by its name."""
    return cls.__module__ in (tasks.__name__, "builtins", "abc", "typing")


def _attributes(task: Task) -> dict[str, Any]:
    slots = [name for cls in type(task).__mro__ for name in getattr(cls, "__slots__", ())]
    of_slots = {name: getattr(task, name) for name in slots if hasattr(task, name)}
    return of_slots | getattr(task, "__dict__", {})


def _code(thing: Any) -> str:
    """The source of a class or function, normalised; or its bytecode."""
    if thing.__name__ != "<lambda>":  # whose lines may hold others
        with suppress(OSError, TypeError, SyntaxError, IndexError):
            return _normalised(inspect.getsource(thing))
    if isinstance(thing, type):
        return "\n".join([thing.__name__, *_content(dict(vars(thing)))])
    return "\n".join(_of_bytecode(thing.__code__, thing.__doc__))


def _normalised(source: str) -> str:
    """Source without comments, docstrings and layout."""
    indented = source[:1].isspace()
    tree = ast.parse(f"if True:\n{source}" if indented else source)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree.body[0].body if indented else tree)  # type: ignore[attr-defined]


def _of_bytecode(code: CodeType, docstring: str | None) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_bytecode(constant, None)
        else:  # without a docstring there is None in its place
            yield from _content(None if constant == docstring else constant)


# What Python itself puts into a class.
_OF_PYTHON = {
    "__module__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
    "__abstractmethods__",
    "_abc_impl",
    "__annotations__",
}


def _content(value: Any, within: tuple[int, ...] = ()) -> Iterator[str]:
    """A value as text: numbers and strings, containers of them, tensors by their SHA-256.

    Args:
        value: The value.
        within: The `id` of each thing that it is part of.
    """
    kind = type(value).__name__
    if id(value) in within:
        yield f"{kind} again"
        return
    within = (*within, id(value))
    if isinstance(value, Mapping):
        yield f"{kind} {len(value)}"
        for key in sorted(value, key=repr):
            if key not in _OF_PYTHON:
                yield repr(key)
                yield from _content(value[key], within)
    elif isinstance(value, (list, tuple)):
        yield f"{kind} {len(value)}"
        for part in value:
            yield from _content(part, within)
    elif isinstance(value, (set, frozenset)):
        yield f"{kind} {sorted(map(repr, value))}"  # their order is another in each process
    elif isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content.data).hexdigest()}"
    elif isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        yield f"{value.dtype} {value.shape} {digest}"
    elif isinstance(value, nn.Module):
        yield kind
        yield from _content(dict(value.state_dict()), within)
    elif isinstance(value, (staticmethod, classmethod)):
        yield kind
        yield from _content(value.__func__, within)
    elif isinstance(value, property):
        yield from _content([value.fget, value.fset], within)
    elif isinstance(value, FunctionType):
        yield _code(value)
        yield from _content([value.__defaults__, value.__kwdefaults__], within)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                yield from _content(cell.cell_contents, within)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        yield f"{kind} {value!r}"
    else:
        yield kind  # of anything else no more is known than what it is
