"""Three queries about the standard library's code, and the modules that their answers come from.

Nobody can say beforehand which text taught a model what; but whoever reads these queries knows
where in the library to look. Their modules have the same names in every Python, and rows among the
first of the corpus.
"""

import textwrap
from typing import Any

from ekfac_dist.demo.corpus import read_corpus
from ekfac_dist.demo.directory import DemoPaths
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.tables import table

# In the manner of decimal (its source is _pydecimal), of urllib.parse, and of xml.dom.minidom; but
# no text of the corpus holds these lines.
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

ROWS_SHOWN = 5
_QUERY_WIDTH = 96
_TEXT_WIDTH = 56


def answers_with_modules(paths: DemoPaths) -> str:
    """The most positive texts of each query, with the modules that they come from.

    Args:
        paths: The demo's directory; its corpus and its scores are whole.

    Raises:
        DataError: The corpus cannot be read.
        StoreError: The scores cannot.
    """
    rows = read_corpus(paths.corpus)
    reader = ResultsReader(paths.scores)
    top = reader.lines(results.TOP)
    blocks = []
    for query in reader.lines(results.QUERIES):
        listed = [line for line in top if line["query"] == query["query"]][:ROWS_SHOWN]
        found = [rows[line["index"]] for line in listed]  # a row's index is its line in the file
        cells = [
            [row.module, row.kind, f"{line['score']:+.4g}", f"{line['share']:+.2%}"]
            for row, line in zip(found, listed, strict=True)
        ]
        texts = [_short(row.text, _TEXT_WIDTH) for row in found]
        (member,) = query["members"]
        blocks.append(
            f"query {query['query']}   {_in_a_line(member)}\n"
            + textwrap.indent(table(["module", "kind", "score", "share"], cells, last=texts), "  ")
        )
    return "\n\n".join(blocks)


def _in_a_line(member: dict[str, Any]) -> str:
    prompt, completion = (_short(member[name], _QUERY_WIDTH) for name in ("prompt", "completion"))
    return f"{prompt}\n      →   {completion}"


def _short(text: str, width: int) -> str:
    """One line's worth of a text."""
    return textwrap.shorten(text, width, placeholder=" …")
