"""Text with its words colored by a score, as HTML and as a figure.  To copy: this file and show/{sheet,plots}.py."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .sheet import Sheet

FOR, AGAINST = ((0, 0.447, 0.698), "solid"), ((0.835, 0.369, 0), "dashed")  # PALETTE's blue and orange; line below


class TextHeatmap:
    """A text whose words are blue where their score is above 0, orange over a broken line below 0; deep: far from 0.

    words: [{"start", "end", "score"}, …] in characters of the text, as `words_of` gives them.  largest: the score with
    the deepest color, the same for texts that are compared; default: the largest here.  A notebook shows the object;
    `html`: for a page, the text escaped; `figure()`: for `show_figure`, or `figure().savefig("text.png")`.

    >>> TextHeatmap("a < b", [{"start": 0, "end": 1, "score": 1.0}]).parts
    [('a', 1.0), (' < b', 0.0)]
    """

    def __init__(self, text: str, words: Sequence[Mapping], *, largest: float | None = None):
        top = largest or max((abs(word["score"]) for word in words), default=0.0) or 1.0
        self.parts, at = [], 0  # (text, share of the deepest color, from -1 to 1)
        for start, end, score in sorted((word["start"], word["end"], word["score"]) for word in words):
            self.parts += [(text[at:start], 0.0), (text[start:end], max(-1.0, min(1.0, score / top)))]
            at = end
        self.parts = [part for part in [*self.parts, (text[at:], 0.0)] if part[0]]

    @property
    def html(self) -> str:
        shown, look = "", "color:#000;background:#{:02x}{:02x}{:02x};border-bottom:2px {} #{:02x}{:02x}{:02x}"
        for text, share in self.parts:
            fill, edge, line = _look(share)
            style = look.format(*(round(255 * part) for part in fill), line, *(round(255 * part) for part in edge))
            shown += f'<span title="{share:+.2f}" style="{style}">{escape(text)}</span>' if share else escape(text)
        return f'<div style="line-height:2;white-space:pre-wrap">{shown}</div>'

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return ", ".join(f"{text} {share:+.2f}" for text, share in self.parts if share)

    def figure(self, width: int = 640) -> Any:
        """A white Matplotlib figure, `width` pixels wide, with the words and their shares as its alt text."""
        column, row, places, wide = 0, 0, [], 8.4  # wide: pixels of a sign
        for text, share in self.parts:
            for piece in re.findall(r"\S+|\s", text):
                if piece == "\n" or (column and column + len(piece) > (width - 40) / wide):
                    column, row = 0, row + 1
                if column or not piece.isspace():
                    places.append((20 + wide * column, 25 + 30 * row, piece, share))
                    column += len(piece)
        said = f"A text, and its words' scores: {self}"
        sheet = Sheet(width, 50 + 30 * row, "{said}", {"said": said})
        for x, y, piece, share in places:
            fill, edge, line = _look(share)
            if share:
                sheet.rectangle(x, y - 12, wide * len(piece), 24, facecolor=fill)
                sheet.ax.plot([x, x + wide * len(piece)], [y + 12, y + 12], color=edge, linestyle=line, linewidth=1.5)
            sheet.ax.text(x, y, piece, fontsize=10, va="center", family="DejaVu Sans Mono", parse_math=False)
        return sheet.figure


def _look(share: float) -> tuple[tuple, tuple, str]:
    """(color behind the word, color and form of the line below); black on the first has a contrast of 7 or more."""
    color, line = FOR if share > 0 else AGAINST
    return tuple(1 - 0.6 * abs(share) * (1 - part) for part in color), color, line
