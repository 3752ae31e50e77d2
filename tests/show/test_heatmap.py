"""Colored text: nothing of it is lost, nothing is run, and the sign is seen without color."""

import re

import pytest

import ftlib

TEXT = "a <b>bad</b> & {good} film"
WORDS = [
    {"text": "good", "start": 16, "end": 20, "score": 2.0},
    {"text": "bad", "start": 5, "end": 8, "score": -1.0},
    {"text": "film", "start": 22, "end": 26, "score": 0.0},
]


def contrast(first, second):
    """WCAG 2.2, of two colors (r, g, b) from 0 to 1."""

    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_parts_are_the_whole_text():
    heat = ftlib.TextHeatmap(TEXT, WORDS)
    assert "".join(text for text, _ in heat.parts) == TEXT
    assert [part for part in heat.parts if part[1]] == [("bad", -0.5), ("good", 1.0)]
    assert [part for part in ftlib.TextHeatmap(TEXT, WORDS, largest=4).parts if part[1]] == [
        ("bad", -0.25),
        ("good", 0.5),
    ]
    assert ftlib.TextHeatmap("none", []).parts == [("none", 0.0)]


def test_html_is_escaped_and_shows_the_sign_without_colour():
    html = ftlib.TextHeatmap(TEXT, WORDS)._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html and "&amp; {" in html
    looks = dict(
        zip(re.findall(r">(\w+)</span>", html), re.findall(r'<span title="(.*?)" style="(.*?)"', html), strict=True)
    )
    assert set(looks) == {"bad", "good"}
    assert looks["bad"][0] == "-0.50" and "dashed" in looks["bad"][1]
    assert looks["good"][0] == "+1.00" and "solid" in looks["good"][1]
    for _, style in looks.values():
        color = [int(part, 16) / 255 for part in re.findall("..", re.search("background:#(......)", style)[1])]
        assert contrast(color, (0, 0, 0)) >= 7


def test_figure_wraps_words_and_has_an_alt_text(tmp_path):
    pytest.importorskip("matplotlib")
    heat = ftlib.TextHeatmap(TEXT + "\n" + "word " * 40, WORDS)
    narrow, wide = heat.figure(width=300), heat.figure(width=900)
    assert narrow.get_size_inches()[1] > wide.get_size_inches()[1]
    assert narrow.get_label() == "A text, and its words' scores: bad -0.50, good +1.00"
    assert repr(heat) == "bad -0.50, good +1.00"
    shown = [text.get_text() for text in narrow.axes[0].texts]
    assert "".join(shown).replace(" ", "") == (TEXT + "word" * 40).replace(" ", "")
    narrow.canvas.draw()
    edge = narrow.bbox.x1
    assert all(text.get_window_extent().x1 <= edge for text in narrow.axes[0].texts)
    narrow.savefig(tmp_path / "text.png")
    assert (tmp_path / "text.png").read_bytes()[:4] == b"\x89PNG"
