"""The fields of configurations by their dotted names, such as `data.max_tokens`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def dotted(
    nested: Any, prefix: str = "", is_group: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """A nested mapping as one level of dotted names; {"a": {"b": 1}} becomes {"a.b": 1}.

    Args:
        nested: The mapping; anything else is a value itself.
        prefix: What names begin with, a dot at its end.
        is_group: Whether a mapping of some dotted name is a group of fields, and not a value.
    """
    name = prefix.removesuffix(".")
    if not isinstance(nested, Mapping) or not (name == "" or is_group(name)):
        return {name: nested}
    values: dict[str, Any] = {}
    for key, value in nested.items():
        values |= dotted(value, f"{prefix}{key}.", is_group)
    return values


def field_types(config_class: type) -> dict[str, Any]:
    """The type of every field of a configuration class that is no group, by its dotted name."""
    return dotted(_nested_types(config_class))


def _nested_types(config_class: type) -> dict[str, Any]:
    return {
        f.name: _nested_types(f.type)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
        else f.type
        for f in dataclasses.fields(config_class)
    }
