"""Align rows of cells as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1, rule: bool = True) -> str:
    """Return rows of cells as aligned text.

    Args:
        rows: rows of the same length, the first the head.
        left: how many columns, from the first, are aligned to the left; the others to the right.
        rule: draw a line under the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
