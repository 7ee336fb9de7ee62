"""Fields by the names that a request has for them, in sentences that refuse it.

What refuses a question while it is answered also answers the command line, so that its sentences
name fields of `query`'s configuration, such as scores.rescore; who asked over HTTP wrote rescore.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ekfac_dist.config import ScoresConfig, field_types
from ekfac_dist.errors import UserError
from ekfac_dist.serve.models import DampingRequest, QuestionRequest

_FIELD = re.compile(r"(?<![\w.])[a-z]\w*\.[a-z]\w*(?!\w)")


def field_names(request: QuestionRequest) -> dict[str, str]:
    """The request's name of each field that `query`'s configuration has under another one."""
    shared = field_types(ScoresConfig).keys() & QuestionRequest.model_fields.keys()
    names = {f"scores.{name}": name for name in shared}
    names["scores.normalize"] = request.spelling_of_normalise
    if not isinstance(request.damping, DampingRequest):
        names["damping.value"] = "damping"
    return names


def renamed(sentence: str, names: Mapping[str, str]) -> str:
    """A sentence with the fields that it names under other names.

    Args:
        sentence: The sentence.
        names: The new names, by the old ones, both dotted.
    """
    return _FIELD.sub(lambda field: names.get(field.group(), field.group()), sentence)


@contextmanager
def named_as_in(request: QuestionRequest) -> Iterator[None]:
    """Lets errors name fields as a request does."""
    try:
        yield
    except UserError as error:
        error.args = (renamed(str(error), field_names(request)),)
        raise
