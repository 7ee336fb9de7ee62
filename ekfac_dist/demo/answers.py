"""Three queries in the style of standard library modules, and the modules of their top texts.

It is not known beforehand which training texts influence a completion most, but a reader of these
queries knows which modules to expect. Those modules have the same names in every Python version,
and texts among the first of the corpus.
"""

import textwrap
from typing import Any

from ekfac_dist.demo.corpus import read_corpus
from ekfac_dist.demo.directory import DemoPaths
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.tables import table

# In the style of decimal (whose source is _pydecimal), urllib.parse and xml.dom.minidom. No text of
# the corpus contains these lines.
QUERIES = [
    {
        "prompt": "    >>> ExtendedContext.multiply(Decimal('1.5'), Decimal('3'))\n",
        "completion": (
            "    Decimal('4.5')\n"
            "    >>> ExtendedContext.multiply(Decimal('-2'), 7)\n"
            "    Decimal('-14')\n"
        ),
    },
    {
        "prompt": 'def host_of(url):\n    """Return the part of a URL that names the host."""\n',
        "completion": (
            "    scheme, netloc, path, query, fragment = urlsplit(url)\n"
            "    return netloc.rpartition('@')[2]\n"
        ),
    },
    {
        "prompt": "def first_element(parent):\n",
        "completion": (
            "    for node in parent.childNodes:\n"
            "        if node.nodeType == Node.ELEMENT_NODE:\n"
            "            return node\n"
        ),
    },
]

TEXTS_SHOWN = 5
_QUERY_WIDTH = 96
_TEXT_WIDTH = 56


def answers_with_modules(paths: DemoPaths) -> str:
    """Tables of each query's most positive texts and the modules that these come from.

    Args:
        paths: The demo's directory, with finished corpus and scores.

    Raises:
        DataError: If the corpus cannot be read.
        StoreError: If the scores cannot be read.
    """
    corpus = read_corpus(paths.corpus)
    reader = ResultsReader(paths.scores)
    top = reader.lines(results.TOP)
    blocks = []
    for query in reader.lines(results.QUERIES):
        shown = [line for line in top if line["query"] == query["query"]][:TEXTS_SHOWN]
        rows = [corpus[line["index"]] for line in shown]
        cells = [
            [row.module, row.kind, f"{line['score']:+.4g}", f"{line['share']:+.2%}"]
            for row, line in zip(rows, shown, strict=True)
        ]
        texts = [_shortened(row.text, _TEXT_WIDTH) for row in rows]
        (member,) = query["members"]
        blocks.append(
            f"query {query['query']}   {_query_text(member)}\n"
            + textwrap.indent(table(["module", "kind", "score", "share"], cells, last=texts), "  ")
        )
    return "\n\n".join(blocks)


def _query_text(member: dict[str, Any]) -> str:
    """Prompt and completion of a query, each on one line."""
    prompt = _shortened(member["prompt"], _QUERY_WIDTH)
    completion = _shortened(member["completion"], _QUERY_WIDTH)
    return f"{prompt}\n      →   {completion}"


def _shortened(text: str, width: int) -> str:
    """A text with white space collapsed, cut between words to at most `width` characters."""
    return textwrap.shorten(text, width, placeholder=" …")
