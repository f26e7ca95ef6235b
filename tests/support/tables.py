"""Tables as they are printed, read back."""

from __future__ import annotations


def cells(printed: str) -> list[list[str]]:
    """The cells of every line of a printed table with edges, its heading first; an empty cell is no word."""
    lines = [line for line in printed.splitlines() if line[:1] in ("│", "┃")]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
