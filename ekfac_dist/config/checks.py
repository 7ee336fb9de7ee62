"""Checks of configured values; a wrong one raises `ConfigError` with a sentence."""

import math
import string
from collections.abc import Iterable, Mapping

from ekfac_dist.errors import ConfigError, first_line


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuses a value that is none of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def require_positive(name: str, value: object) -> None:
    """Refuses everything but a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of 1 or more.")


def require_count(name: str, value: object) -> None:
    """Refuses everything but a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of 0 or more.")


def require_pass_settings(batch_tokens: object, save_minutes: object) -> None:
    """Refuses a token budget, or an interval between saved states, that is out of range.

    Raises:
        ConfigError: If one is.
    """
    require_positive("batch_tokens", batch_tokens)
    is_interval = isinstance(save_minutes, (int, float)) and 0 <= save_minutes < math.inf
    if save_minutes is not None and not is_interval:
        raise ConfigError(
            f"save_minutes is {save_minutes!r}; it must be a finite number of 0 or more, or null."
        )


def require_given(values: Mapping[str, object]) -> None:
    """Refuses a field without a value, by its dotted name."""
    for name, value in values.items():
        if not value:
            raise ConfigError(f"{name} is not given; set it in the YAML file or as --{name}.")


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "{title}: {text}" names, in its order.

    Raises:
        ValueError: If it is no such template.
    """
    columns = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or form or conversion or not set(name).isdisjoint(".[]"):
            raise ValueError("a column's name alone goes between { and }")
        columns.append(name)
    return columns


def require_template(name: str, template: str) -> None:
    """Refuses a template that names no columns, or more than their names."""
    try:
        if template_columns(template):
            return
        fault = "it names no column"
    except ValueError as error:
        fault = first_line(error)
    raise ConfigError(
        f"{name} is {template!r} ({fault}); give text with columns in braces, such as "
        "'{title}: {text}', and {{ or }} for a brace."
    )


def require_checkpointing(name: str, value: object) -> None:
    """Refuses everything but true, false and auto."""
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"{name} is {value!r}; give true, false or auto.")
