"""A sheet to draw diagrams on, with boxes, arrows and cells; and how any figure is shown with an alt text.

    ftlib.show_figure(figure, "Loss falls for 30 steps, then rises.")  # a figure of Matplotlib
To copy: this file and show/plots.py.
"""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from itertools import pairwise, product
from math import copysign, dist
from typing import Any, NamedTuple

from .plots import PALETTE

BLUE, RED, GREEN, PINK, SKY, ORANGE, _ = PALETTE
INK, GREY, LINE = "#1F2937", "#6B7280", "#4B5563"


def show_figure(figure, alt: str = "") -> None:
    """Show a figure in a notebook with a text for those who can't see it, at two pixels for each of the page's.

    alt: what the figure shows, in a sentence or two; a diagram has its own.  Raises ValueError for a figure without.
    """
    # As an <img>: JupyterLab 4.6 and VS Code have no place for an alt text beside image/png, and nbconvert 7.17's "lab"
    # template leaves it out.  In 256 colors it is no larger than a PNG of half the pixels in all of them.
    import matplotlib.pyplot as plt
    from IPython.display import display
    from PIL import Image

    if not (alt := alt or figure.get_label()):
        raise ValueError("a figure needs an alt text: show_figure(figure, 'what it shows')")
    full, small = BytesIO(), BytesIO()
    figure.savefig(full, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    image = Image.open(full).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True)
    source = f"data:image/png;base64,{b64encode(small.getvalue()).decode()}"
    html = f'<img alt="{escape(alt)}" width="{image.width // 2}" style="border-radius: 6px" src="{source}">'
    display({"text/html": html, "text/plain": alt}, raw=True)
    plt.close(figure)


class Box(NamedTuple):
    """A rectangle on the sheet, by its centre."""

    x: float
    y: float
    w: float
    h: float

    def towards(self, x: float, y: float) -> tuple[float, float]:
        """The point on its edge from which a line leaves for (x, y), straight where that can be."""
        beside = abs(y - self.y) <= self.h / 2
        if not beside and abs(x - self.x) <= self.w / 2:
            return x, self.y + copysign(self.h / 2, y - self.y)
        return self.x + copysign(self.w / 2, x - self.x), y if beside else self.y


def pale(color: str, share: float = 0.38, into: float = 1.0) -> tuple:
    """The color, mixed into white; `into` 0: into black."""
    from matplotlib.colors import to_rgb

    return tuple(into + share * (part - into) for part in to_rgb(color))


class Sheet:
    """A white figure of width x height pixels of the page: a unit is such a pixel, y grows downwards."""

    def __init__(self, width: float, height: float, alt: str, sizes: Mapping[str, Any]):
        from matplotlib import patches
        from matplotlib.figure import Figure

        figure = self.figure = Figure((width / 100, height / 100), dpi=100, facecolor="white")
        figure.set_label(" ".join(alt.format_map(sizes).split()))
        figure._ipython_display_ = lambda: show_figure(figure)  # a cell that ends in a diagram shows it with its text
        self.ax, self.patches = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0)), patches
        self.ax.axis("off")
        self.rectangle(0, 0, width, height, facecolor="white", zorder=-1)

    def rectangle(self, left, top, w, h, **look) -> None:
        self.ax.add_patch(self.patches.Rectangle((left, top), w, h, **look))

    def say(self, x, y, text: str, size=8.5, color=INK, ha="center", weight="normal") -> None:
        """Text around (x, y); ha="left" or "right": from there, or up to there."""
        lines = "\n" in text
        look = dict(va="center" if lines else "baseline", linespacing=1.35, parse_math=False, family="DejaVu Sans")
        y = y if lines else y + size / 2  # so that letters stand on one line, whatever hangs below it
        color = pale(color, 0.7, 0) if color in PALETTE else color  # dark enough for letters on white
        if text:
            self.ax.text(x, y, text, fontsize=size, color=color, ha=ha, weight=weight, **look)

    def note(self, y: float, text: str) -> None:
        self.say(20, y, text, 8, GREY, "left")

    def box(self, x, y, w, h, text="", color=GREY, size=8.5, share=0.18, style="round,pad=0,rounding_size=5", **look):
        look = dict(facecolor=pale(color, share), edgecolor=color, linewidth=1.1) | look
        self.ax.add_patch(self.patches.FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, **look))
        self.say(x, y, text, size)
        return Box(x, y, w, h)

    def panel(self, left, top, right, bottom, title="", color=GREY) -> Box:
        """A field behind a few boxes, its title in the left upper corner."""
        self.say(left + 10, top + 14, title, 9, color, "left", "bold")
        place = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        return self.box(*place, color=color, share=0.06, zorder=0, linewidth=0.8)

    def sign(self, x, y, text="+") -> Box:
        """A circle: what comes in is added, or multiplied."""
        return self.box(x, y, 20, 20, text, INK, 10, share=0, style="circle,pad=0")

    def grid(self, x, y, fills, cell=(14, 16), texts=None, *, name="", shape="", color=INK, mark=None) -> Box:
        """Cells in the colors `fills` (rows, columns): a matrix, a mask, tokens; `mark`: a row to outline."""
        (w, h), rows, columns = cell, len(fills), len(fills[0])
        left, top = x - columns * w / 2, y - rows * h / 2
        for i, j in product(range(rows), range(columns)):
            self.rectangle(left + j * w, top + i * h, w, h, facecolor=fills[i][j], edgecolor=GREY, linewidth=0.6)
            self.say(left + (j + 0.5) * w, top + (i + 0.5) * h, texts[i][j] if texts else "", 8)
        if mark is not None:
            outline = dict(facecolor="none", edgecolor=INK, linewidth=1.8, zorder=2)
            self.rectangle(left, top + mark * h, columns * w, h, **outline)
        self.say(x, top - 12, name, 9.5, color, weight="bold")
        self.say(x, top + rows * h + 13, shape, 8, LINE)
        return Box(x, y, columns * w, rows * h)

    def arrow(self, *points, text="", color=LINE, below=False, **look) -> None:
        """A line through boxes or points (x, y), with a head at the last; the text stands at its longest part."""
        way, ends = [point[:2] for point in points], [(0, 1), (-1, -2)]
        if len(points) == 2 and points[0][2:] < points[1][2:]:  # the wider box ends where the other's centre is
            ends = ends[::-1]
        for end, inner in (*ends, ends[0]):
            if isinstance(points[end], Box):
                way[end] = points[end].towards(*way[inner])
        look = dict(arrowstyle="-|>", mutation_scale=9, linewidth=1.2, color=color, shrinkA=0, shrinkB=0) | look
        self.ax.add_patch(self.patches.FancyArrowPatch(path=self.patches.Path(way), joinstyle="round", **look))
        (x, y), (to_x, to_y) = max(pairwise(way), key=lambda part: dist(*part))
        flat, away = abs(to_x - x) > abs(to_y - y), -9 if below else 9
        x, y, ha = (x + to_x) / 2, (y + to_y) / 2, "center" if flat else "right" if below else "left"
        self.say(x + away * (not flat), y - away * flat, text, 8, color, ha)

    def chain(self, *boxes) -> None:
        """An arrow from each to the next."""
        for pair in pairwise(boxes):
            self.arrow(*pair)

    def residual(self, x: float, end: Box, height: float, text: str = "residual", **look) -> None:
        """From (x, end.y) up by `height`, over and down to a sum."""
        y = end.y - height
        self.arrow((x, end.y), (x, y), (end.x, y), end, text=text, **look)
