"""Command-line arguments and YAML files, parsed into configurations by jsonargparse.

An error names the field, the value that was given and what would do, in one sentence. The field is
found by parsing each given field alone, never by reading jsonargparse's own messages.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from ekfac_dist.config import dotted, field_types
from ekfac_dist.errors import ConfigError

T = TypeVar("T")

# What a value of a type is called in a sentence.
_TYPES_IN_WORDS = {
    int: "a whole number",
    bool: "true or false",
    str: "text",
    float: "a number",
    dict[str, float]: "a group of names, each with a number",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    type(None): "null",
}


class _UnparsableError(Exception):
    """Arguments that jsonargparse cannot parse, with its own message."""


class _Parser(ArgumentParser):
    """Raises `_UnparsableError` instead of printing a usage text and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _UnparsableError(message) from ex


class _HelpFormatter(DefaultHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _expand_help(self, action: argparse.Action) -> str:
        text: str = super()._expand_help(action)
        # Not said: types of text, types that the default shows, and choices, listed before already.
        plain = r"type: (Literal\[[^]]*\]|(bool|int|float|str)( \| null)?), "
        text = re.sub(plain, "", text)
        text = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace("'", ""), text)
        text = re.sub(r"Optional\[(.*)\](?=, default)", r"\1, null", text)
        return re.sub(r"Union\[(.*)\](?=, default)", r"\1", text)


def command_parser(usage: str, description: str) -> ArgumentParser:
    """A parser of one command's arguments.

    Args:
        usage: The command's name, and how it is called.
        description: What it does.
    """
    parser = _Parser(
        prog=f"ekfac-dist {usage.partition(' ')[0]}",
        description=description,
        allow_abbrev=False,
        usage=f"ekfac-dist {usage}",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of these options.")
    return parser


def parse_config(parser: ArgumentParser, config_class: type[T], arguments: list[str]) -> T:
    """A configuration, checked, from a command's arguments.

    Args:
        parser: The command's parser, with the fields of `config_class`.
        config_class: A dataclass of `config`.
        arguments: What follows the command.

    Raises:
        ConfigError: If a field is unknown, or a value is not what it can be.
    """
    parsed = parse(parser, arguments, field_types(config_class))
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    return config_class(**{field.name: parsed[field.name] for field in fields})


def parse(
    parser: ArgumentParser,
    arguments: list[str],
    types: Mapping[str, Any],
    *,
    positionals: Sequence[str] = (),
    switches: Sequence[str] = (),
) -> dict[str, Any]:
    """The values of a command's fields.

    Args:
        parser: The command's parser.
        arguments: What follows the command.
        types: The type of each field that takes a value, by its dotted name.
        positionals: Names of arguments that are given by their place.
        switches: Names of options without a value.

    Raises:
        ConfigError: If a field is unknown, or a value is not what it can be.
    """
    options = _options(arguments)
    known = [*types, *positionals, *switches]
    for name, _ in options:
        if name.rstrip("+") not in (*known, "config", "help", "print_config"):
            raise ConfigError(f"There is no option --{name}{nearest_name(name, known, '--')}")
    groups = {name.partition(".")[0] for name in types if "." in name}
    files = [file or "" for name, file in options if name == "config"]
    contents = {file: _content(file) for file in files}
    for file, content in contents.items():
        _require_known_fields(file, content, known, groups)
    try:
        return vars(parser.instantiate(parser.parse_args(arguments)))
    except _UnparsableError as error:
        required = dict.fromkeys(positionals, "-")
        for name, value, attempt in _attempts(parser, options, contents.values(), groups, required):
            if name in types and not _parses(attempt):
                wanted = _type_in_words(types[name])
                raise ConfigError(
                    f"{name} is {value}; it must be {wanted}. See {parser.prog} --help."
                ) from error
        message = " ".join(str(error).split())
        raise ConfigError(
            f"{message[:1].upper()}{message[1:]}. See {parser.prog} --help."
        ) from error


def nearest_name(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: the nearest known one, or a full stop."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # perhaps the right word without, or under, the wrong group
        by_word = {field.rpartition(".")[2]: field for field in known}
        words = difflib.get_close_matches(name.rpartition(".")[2], by_word, n=1, cutoff=0.6)
        close = [by_word[word] for word in words]
    return f"; did you mean {prefix}{close[0]}?" if close else "."


def _options(arguments: list[str]) -> list[tuple[str, str | None]]:
    """Name and value of each option; None is the value of one that no value follows."""
    options: list[tuple[str, str | None]] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if argument.startswith("--") and argument != "--":
            name, equals, value = argument[2:].partition("=")
            has_value = bool(equals) or not following.startswith("--")
            options.append((name, (value if equals else following) if has_value else None))
    return options


def _content(file: str) -> Mapping[Any, Any]:
    """The fields of a YAML file."""
    try:
        with open(file, encoding="utf-8") as opened:
            content = yaml.safe_load(opened)
    except OSError as error:
        raise ConfigError(
            f"The configuration {file!r} cannot be read: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration {file} is not YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"The configuration {file} holds no fields; see `ekfac-dist --help`.")
    return content


def _require_known_fields(
    file: str, content: Mapping[Any, Any], known: Iterable[str], groups: set[str]
) -> None:
    for name, value in dotted(content, is_group=groups.__contains__).items():
        if name in groups:
            raise ConfigError(f"The field {name} is {value!r}; it must hold fields of its own.")
        if name not in known:
            nearest = nearest_name(name, [*known, *groups])
            raise ConfigError(f"The configuration {file} has an unknown field {name}{nearest}")


def _attempts(
    parser: ArgumentParser,
    options: Iterable[tuple[str, str | None]],
    contents: Iterable[Mapping[Any, Any]],
    groups: set[str],
    required: Mapping[str, str],
) -> Iterator[tuple[str, Any, Callable[[], object]]]:
    """Each field that was given, with its value and a function that parses it alone.

    Args:
        parser: The command's parser.
        options: Name and value of each option.
        contents: The fields of each YAML file.
        groups: Names of groups of fields.
        required: A value for each argument that the parser requires.
    """
    for content in contents:
        for name, value in dotted(content, is_group=groups.__contains__).items():
            nested: Any = value
            for key in reversed(name.split(".")):
                nested = {key: nested}
            yield name, value, partial(parser.parse_object, {**required, **nested})
    for name, value in options:
        if name != "config" and value is not None:
            yield name, value, partial(parser.parse_args, [*required.values(), f"--{name}={value}"])


def _parses(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except _UnparsableError:
        return False
    return True


def _type_in_words(kind: Any) -> str:
    """What a field of some type can be."""
    if kind in _TYPES_IN_WORDS:
        return _TYPES_IN_WORDS[kind]
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return " or ".join(map(_type_in_words, get_args(kind)))
