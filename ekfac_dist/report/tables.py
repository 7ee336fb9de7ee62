"""Plain text tables."""

from collections.abc import Sequence


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None
) -> str:
    """Columns as wide as they need to be; the first aligned left, the others right.

    Args:
        header: A word for each column.
        rows: Cells, one for each column.
        last: What follows each row, as it is.
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    body = [line(row) for row in rows]
    if last is not None:
        body = [f"{row}  {text}" for row, text in zip(body, last, strict=True)]
    return "\n".join([line(header), "  ".join("-" * w for w in widths), *body])
