"""Plain text tables."""

from collections.abc import Sequence

from ekfac_dist.runtime.terminal import visible


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None
) -> str:
    """A table with columns as wide as their cells, the first aligned left, the others right.

    Cells are made safe for a terminal by `visible`, line ends included.

    Args:
        header: Heading of each column.
        rows: Cells of each row, one for each column.
        last: Text after the last column of each row, not aligned; None for none.
    """
    cells = [[visible(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    body = [line(row) for row in cells[1:]]
    if last is not None:
        body = [f"{row}  {visible(text)}" for row, text in zip(body, last, strict=True)]
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *body])
