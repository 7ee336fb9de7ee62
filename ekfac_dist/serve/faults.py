"""What is wrong with a request, in sentences, from what the checks of its fields have found."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ekfac_dist.runtime.terminal import visible

_MOST = 3  # faults that are told
_NO_JSON = "The body is no JSON that can be read"
_NO_OBJECT = (
    'The body is no JSON object that is sent as such; give one like {"prompt": …, "completion": …} '
    "with Content-Type: application/json"
)
# What a field that is either a number or an object is checked as.
_KINDS = ("float", "DampingRequest")


def is_no_json(faults: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a body is no JSON.

    Args:
        faults: The faults, as pydantic has them.
    """
    return any(fault["type"] == "json_invalid" for fault in faults)


def in_words(faults: Sequence[Mapping[str, Any]]) -> str:
    """A request's first faults, each with its place, and without what was given.

    Args:
        faults: The faults, as pydantic has them.
    """
    told = [fault for fault in faults if not _is_of_another_kind(fault)]
    return "; ".join(map(_fault, told[:_MOST])) + "."


def _is_of_another_kind(fault: Mapping[str, Any]) -> bool:
    """Whether a fault is that a value is not of the other of two kinds."""
    kind, is_object = fault["loc"][-1], isinstance(fault.get("input"), Mapping)
    return (kind == "float" and is_object) or (kind == "DampingRequest" and not is_object)


def _fault(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "json_invalid":
        return _NO_JSON
    if fault["loc"] == ("body",):
        return _NO_OBJECT
    place = ".".join(str(part) for part in fault["loc"] if part not in ("body", *_KINDS))
    message = re.sub(r"\s+", " ", str(fault["msg"])).rstrip(".")
    return visible(f"{place[:80]}: {message}" if place else message)
