"""Draw one traced response of the demo as an SVG picture: the token view of the README.

    proxytune eval gsm --system demo --as all --limit 24 --trace --out results/picture
    python docs/make_picture.py results/picture 23 docs/images/token_view.svg

The first argument is the folder of the runs, the second the id of an example. Everything drawn is read from
predictions.jsonl and trace.jsonl.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, LINE, SIZE = 960, 112, 34, 15
CHAR = 9.0
"""Width of a character of the monospaced font at `SIZE`, fixed by `textLength`."""
ROLES = ("base", "expert", "proxy", "tuned")
TRACED = ("base", "expert", "antiexpert", "proxy")
INK, DIM, PAPER, EDGE, MORE, LESS = "#1f2430", "#68707f", "#ffffff", "#d7dbe2", "#1a7f5a", "#b3401f"

Token = dict[str, Any]


def row_of(folder: Path, file: str, wanted: str) -> dict[str, Any]:
    """The line of a run's file that belongs to an example."""
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    return next(row for row in map(json.loads, lines) if row["id"] == wanted)


def text(x: float, y: float, words: str, colour: str = INK, *, size: int = SIZE, extra: str = "") -> str:
    """A line of text in the sans-serif font."""
    style = f'font-family="system-ui, sans-serif" font-size="{size}" fill="{colour}" {extra}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def mono(x: float, y: float, words: str, colour: str = INK, extra: str = "") -> str:
    """Monospaced text of a known width."""
    style = (
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{SIZE}" fill="{colour}" {extra}'
    )
    fixed = f'textLength="{len(words) * CHAR:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} {fixed}>{escape(words)}</text>'


def is_changed(token: Token) -> bool:
    """Whether the base's first choice was another token."""
    return bool(token["text"] != token["top"]["base"])


def shown(tokens: list[Token]) -> list[Token]:
    """The tokens that have a text: end-of-sequence has none in the response."""
    return [token for token in tokens if not token["text"].startswith("</")]


def response(tokens: list[Token], y: float) -> list[str]:
    """The proxy's tokens as boxes, shaded by how far the proxy moved their probability."""
    parts, x = [], float(LEFT)
    for token in tokens:
        width = len(token["text"]) * CHAR
        shift = token["probability"]["proxy"] - token["probability"]["base"]
        colour = MORE if shift > 0 else LESS
        edge = f'stroke="{MORE}" stroke-width="1.6"' if is_changed(token) else f'stroke="{EDGE}"'
        box = f'x="{x + 0.5:.1f}" y="{y - 18:.1f}" width="{width - 1:.1f}" height="25" rx="3"'
        parts.append(f'<rect {box} fill="{colour}" fill-opacity="{min(abs(shift), 1) * 0.55:.2f}" {edge}/>')
        parts.append(mono(x, y, token["text"]))
        x += width
    return parts


def card(token: Token, number: int, x: float, y: float) -> list[str]:
    """What the token view shows about one token: its probability under each role and their first choices."""
    heading = f"token {number}: "
    parts = [
        text(x, y, heading, DIM, size=13),
        mono(x + 62, y, token["text"].strip(), INK, 'font-weight="600"'),
    ]
    for place, role in enumerate(TRACED):
        top, share = y + 22 + place * 21, token["probability"][role]
        parts.append(text(x, top, role, DIM, size=13))
        parts.append(
            f'<rect x="{x + 76}" y="{top - 10}" width="{max(130 * share, 1):.1f}" height="11" fill="{MORE}"/>'
        )
        parts.append(text(x + 76 + 130 * share + 6, top, f"{100 * share:.1f}%", size=12))
        first = token["top"][role].strip()
        if first != token["text"].strip():
            parts.append(text(x + 76 + 130 * share + 58, top, f"first choice: {first}", DIM, size=12))
    return parts


def picture(folder: Path, wanted: str) -> str:
    """The whole picture."""
    rows = {role: row_of(folder / role, "predictions.jsonl", wanted) for role in ROLES}
    tokens = shown(row_of(folder / "proxy", "trace.jsonl", wanted)["tokens"])
    changed = [place for place, token in enumerate(tokens) if is_changed(token)]
    parts = [text(24, 34, str(rows["proxy"]["question"]), INK, size=16, extra='font-weight="600"')]
    y = 72.0
    for role in ROLES:
        right = rows[role]["scores"]["exact_match"] == 1
        parts.append(text(24, y, role, INK, extra='font-weight="600"' if role == "proxy" else ""))
        if role == "proxy":
            parts += response(tokens, y)
        else:
            parts.append(mono(LEFT, y, rows[role]["responses"][0]["text"]))
        parts.append(text(WIDTH - 66, y, "right" if right else "wrong", MORE if right else LESS, size=14))
        y += LINE
    caption = (
        f"{len(changed)} of {len(tokens)} tokens of the proxy are not the base's first choice (outlined). "
        "Shade: how far the proxy moved the token's probability, up or down."
    )
    parts.append(text(24, y, caption, DIM, size=13))
    for number, x in zip(changed, (24, 500), strict=False):  # the first two
        parts += card(tokens[number], number + 1, x, y + 36)
    height = int(y + 36 + 22 + 4 * 21)
    label = escape(f"{rows['proxy']['question']} The answers of base, expert, proxy and tuned.", quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{label}">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{PAPER}" stroke="{EDGE}"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def main(folder: str, wanted: str, target: str) -> None:
    """Write the picture."""
    Path(target).write_text(picture(Path(folder), wanted), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
