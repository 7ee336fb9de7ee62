"""SHA-256 fingerprints of the users' own tasks, from their code and settings."""

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
    """SHA-256 of the source of a task's classes and of its attributes; None for a built-in task.

    Comments, docstrings and layout do not count. Functions that the classes call outside themselves
    are not included. A class without source, as in an interactive session, is represented by its
    bytecode, which depends on the version of Python.

    Args:
        task: The task.
    """
    own_classes = [cls for cls in type(task).__mro__ if not _is_built_in(cls)]
    if not own_classes:
        return None
    digest = hashlib.sha256()
    for part in (*map(_code_text, own_classes), *_content_text(_attributes(task))):
        digest.update(f"{len(part)}|{part}".encode())
    return digest.hexdigest()


def _is_built_in(cls: type) -> bool:
    """Whether a class is this package's or Python's, by the name of its module."""
    return cls.__module__ in (tasks.__name__, "builtins", "abc", "typing")


def _attributes(task: Task) -> dict[str, Any]:
    """A task's attributes by name, those in `__slots__` included."""
    slots = [name for cls in type(task).__mro__ for name in getattr(cls, "__slots__", ())]
    slot_values = {name: getattr(task, name) for name in slots if hasattr(task, name)}
    return slot_values | getattr(task, "__dict__", {})


def _code_text(thing: Any) -> str:
    """The normalised source of a class or function; its bytecode where there is no source."""
    if thing.__name__ != "<lambda>":  # a lambda's source lines may hold other code
        with suppress(OSError, TypeError, SyntaxError, IndexError):
            return _normalised(inspect.getsource(thing))
    if isinstance(thing, type):
        return "\n".join([thing.__name__, *_content_text(dict(vars(thing)))])
    return "\n".join(_bytecode_text(thing.__code__, thing.__doc__))


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


def _bytecode_text(code: CodeType, docstring: str | None) -> Iterator[str]:
    """A code object as text, without its docstring and line numbers."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode_text(constant, None)
        else:  # a function without a docstring has None in its place
            yield from _content_text(None if constant == docstring else constant)


# Attributes that Python itself adds to a class.
_ADDED_BY_PYTHON = {
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


def _content_text(value: Any, within: tuple[int, ...] = ()) -> Iterator[str]:
    """A value as text: scalars and strings, containers of them, tensors by their SHA-256.

    Args:
        value: The value.
        within: The `id` of each object that contains it, to detect cycles.
    """
    kind = type(value).__name__
    if id(value) in within:
        yield f"{kind} again"
        return
    within = (*within, id(value))
    if isinstance(value, Mapping):
        yield f"{kind} {len(value)}"
        for key in sorted(value, key=repr):
            if key not in _ADDED_BY_PYTHON:
                yield repr(key)
                yield from _content_text(value[key], within)
    elif isinstance(value, (list, tuple)):
        yield f"{kind} {len(value)}"
        for part in value:
            yield from _content_text(part, within)
    elif isinstance(value, (set, frozenset)):
        yield f"{kind} {sorted(map(repr, value))}"  # their order differs between processes
    elif isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content.data).hexdigest()}"
    elif isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        yield f"{value.dtype} {value.shape} {digest}"
    elif isinstance(value, nn.Module):
        yield kind
        yield from _content_text(dict(value.state_dict()), within)
    elif isinstance(value, (staticmethod, classmethod)):
        yield kind
        yield from _content_text(value.__func__, within)
    elif isinstance(value, property):
        yield from _content_text([value.fget, value.fset], within)
    elif isinstance(value, FunctionType):
        yield _code_text(value)
        yield from _content_text([value.__defaults__, value.__kwdefaults__], within)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                yield from _content_text(cell.cell_contents, within)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        yield f"{kind} {value!r}"
    else:
        yield kind  # of any other value only its type counts
