"""Diagrams: nothing overlaps or is clipped or crossed, numbers are those of real modules; and how figures are shown."""

import re
from base64 import b64decode
from io import BytesIO
from itertools import combinations

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from matplotlib.transforms import Bbox
from PIL import Image
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from ftlib.methods.adapters import Bottleneck, LoRA
from ftlib.methods.packing import unpad_input
from ftlib.show import diagrams
from ftlib.show.sheet import Box, Sheet, show_figure

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # those of matplotlib

WORDS = "[CLS] an entirely joyless film [SEP]".split()
DRAWN = [  # each as it comes, then at other sizes
    ("attention_head", {}),
    ("attention_head", {"tokens": ["a", "b"], "hidden": 8, "head_dim": 4}),
    ("attention_head", {"tokens": WORDS, "hidden": 4096, "head_dim": 128}),
    ("multi_head", {}),
    ("multi_head", {"heads": 1}),
    ("multi_head", {"tokens": WORDS, "hidden": 4096, "heads": 2}),
    ("multi_head", {"tokens": ["a"], "hidden": 12, "heads": 3}),
    ("bert_block", {}),
    ("bert_block", {"hidden": 1024, "heads": 16, "intermediate": 4096, "layers": 24, "vocab_size": 250002}),
    ("decoder_block", {}),
    ("decoder_block", {"hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocab_size": 128256}),
    ("classification_head", {}),
    ("classification_head", {"tokens": WORDS, "hidden": 1024, "layers": 24, "labels": ["neg", "mid", "pos"]}),
    ("lora_and_adapters", {}),
    ("lora_and_adapters", {"hidden": 1024, "rank": 64, "size": 128}),
    ("packing", {}),
    ("packing", {"texts": [WORDS, WORDS[:2]], "causal": True}),
    ("packing", {"texts": [WORDS[:2]] * 4}),
    ("multitask", {}),
    ("multitask", {"tasks": {"one": "(rows, 2)"}}),
    ("multitask", {"tasks": {name: "(rows, tokens, 9)" for name in "abcdef"}}),
    ("dpo", {}),
    ("dpo", {"beta": 0.05}),
]
NAMES = list(dict.fromkeys(name for name, _ in DRAWN))


def draw(name, **sizes):
    figure = getattr(diagrams, name)(**sizes)
    figure.set_dpi(200)  # as it is shown
    figure.canvas.draw()
    return figure, figure.axes[0]


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def arrows_of(ax):
    return [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]


def line_of(arrow):
    """The points of an arrow without its head, (points, 2)."""
    path = arrow.get_path()
    return path.vertices[: np.flatnonzero(np.append(path.codes, Path.MOVETO) == Path.MOVETO)[1]]


def overlap(a: Bbox, b: Bbox) -> bool:
    """Whether the letters of two texts meet: of the 32 pixels that a line is high, 8 are air."""
    return min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0) + 8


def test_every_diagram_is_drawn_here():
    own = [name for name, f in vars(diagrams).items() if getattr(f, "__module__", "") == diagrams.__name__]
    assert [name for name in own if not name.startswith("_")] == NAMES


@pytest.mark.parametrize(("name", "sizes"), DRAWN)
def test_no_text_overlaps_leaves_the_sheet_or_its_box_or_is_crossed(name, sizes):
    figure, ax = draw(name, **sizes)
    places = [(text.get_text(), text.get_window_extent()) for text in ax.texts]
    for (one, a), (other, b) in combinations(places, 2):
        assert not overlap(a, b), f"{one!r} and {other!r}"
    lines = [ax.transData.transform(line_of(patch)) for patch in arrows_of(ax)]
    shapes = [patch for patch in ax.patches if patch not in arrows_of(ax)]
    width, height = figure.bbox.size
    frames = np.array([shape.get_window_extent().extents for shape in shapes])  # (shapes, 4)
    assert (frames[:, :2] >= -1).all() and (frames[:, 2:] <= [width + 1, height + 1]).all()
    for text, place in places:
        assert place.x0 >= 8 and place.y0 >= 8 and place.x1 <= width - 8 and place.y1 <= height - 8, text
        assert not any(Path(line).intersects_bbox(place, filled=False) for line in lines), f"{text!r} is crossed"
        middle = (place.min + place.max) / 2
        around = frames[((frames[:, :2] < middle) & (middle < frames[:, 2:])).all(1)]
        assert (around[:, 0] <= place.x0).all() and (place.x1 <= around[:, 2]).all(), f"{text!r} is wider than its box"


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "attention_head": "query, key, value, 384, 32, scores, mask, softmax, weights, output",
        "multi_head": "query, key, value, 12, side by side, output",
        "bert_block": "embeddings, position, LayerNorm, self-attention, mask, residual, feed-forward, 1536, GELU",
        "decoder_block": "embed_tokens, RMSNorm, residual, rotary, causal mask, o_proj, gate_proj, SiLU, lm_head",
        "classification_head": "[CLS], encoder, last_hidden_state, pooler, classifier, softmax, neg, pos",
        "lora_and_adapters": "LoRA, query, value, frozen, alpha / r, adapter, residual, GELU",
        "packing": "3 texts; 7 tokens; 14 real; [0, 3, 10, 14]; zeros at padding",
        "multitask": "intent, slots, spam, shared encoder, head, weight, gradients",
        "dpo": "policy, reference, frozen, chosen, rejected, margin, 0.1, loss",
    }.items(),
)
def test_alt_text_names_the_parts(name, parts):
    alt = draw(name)[0].get_label()
    assert not re.search(r"[{}\n]|  ", alt) and len(alt) < 600
    for part in parts.split("; " if name == "packing" else ", "):
        assert part in alt, part


# --------------------------------------------------------------------- the numbers are those of real modules


def test_attention_shows_the_sizes_asked_for():
    _, ax = draw("attention_head", tokens=["a", "b", "c"], hidden=64, head_dim=16)
    said = texts_of(ax)
    assert [text for text in said if "Linear" in text] == [f"{n}\nLinear 64 → 16" for n in ("query", "key", "value")]
    assert {"a", "b", "c", "scores = q @ kᵀ / √16"} <= set(said)
    _, ax = draw("multi_head", tokens=["a"], hidden=64, heads=4)
    assert {"head 1", "head 2", "head 4"} <= set(texts_of(ax)) and "head_dim 64 / 4 = 16" in texts_of(ax)[-1]


def test_shades_of_a_map_are_weights():
    shades = np.array(diagrams._weights(5, "black", seed=1))[..., 0]  # (queries, keys), 1 - weight
    np.testing.assert_allclose((1 - shades).sum(1), 1)


def test_bert_is_as_transformers_builds_it():
    sizes = dict(vocab_size=31, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=40)
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=17, num_labels=3)).eval()
    said = texts_of(draw("bert_block", hidden=24, heads=3, intermediate=40, layers=2, vocab_size=31, positions=17)[1])
    for name, table in model.bert.embeddings.named_children():
        assert not isinstance(table, nn.Embedding) or f"{name} {tuple(table.weight.shape)}" in said
    layer, x = model.bert.encoder.layer[0], torch.randn(1, 5, 24)
    assert "feed-forward\nLinear 24 → 40, GELU\nLinear 40 → 24" in said
    with torch.no_grad():  # the picture, read as code
        attended = layer.attention.output.LayerNorm(x + layer.attention.output.dense(layer.attention.self(x)[0]))
        inner = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(attended)))
        torch.testing.assert_close(layer.output.LayerNorm(attended + inner), layer(x))
    said = texts_of(draw("classification_head", hidden=24, labels=["a", "b", "c"])[1])
    dense, classifier = model.bert.pooler.dense, model.classifier
    assert f"pooler\nLinear {dense.in_features} → {dense.out_features}, tanh" in said
    assert f"classifier\nLinear {classifier.in_features} → {classifier.out_features}" in said


def test_decoder_is_as_transformers_builds_it():
    sizes = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40, vocab_size=31)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    _, ax = draw("decoder_block", hidden=24, heads=6, kv_heads=2, intermediate=40, layers=1, vocab_size=31)
    said, layer, x = texts_of(ax), model.model.layers[0], torch.randn(1, 5, 24)
    for name, linear in {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}.items():
        if isinstance(linear, nn.Linear):
            (label,) = (text for text in said if text.startswith(name))
            before, after = (eval(side.replace("×", "*")) for side in label.split("\n")[1].split("→"))
            assert (before, after) == (linear.in_features, linear.out_features), name
    assert "embed_tokens (31, 24)" in said and "lm_head\nLinear 24 → 31" in said and "scores = q @ kᵀ / √4" in said
    with torch.no_grad():
        turn = model.model.rotary_emb(x, torch.arange(5)[None])
        added = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=turn, attention_mask=None)[0]
        inner, mlp = layer.post_attention_layernorm(added), layer.mlp
        gated = mlp.down_proj(nn.functional.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
        torch.testing.assert_close(added + gated, layer(x, position_embeddings=turn))


def test_trained_numbers_are_those_of_the_modules():
    said = "\n".join(texts_of(draw("lora_and_adapters", hidden=48, rank=4, size=6)[1]))
    own = LoRA(nn.Linear(48, 48), rank=4, alpha=8, dropout=0.0, rslora=False).own()
    assert f"4 · (48 + 48) = {sum(map(torch.numel, own.values()))} numbers; frozen: {48 * 48}" in said
    assert f"A {tuple(own['lora_A.weight'].shape)}" in said and f"B {tuple(own['lora_B.weight'].shape)}" in said
    own = Bottleneck(nn.Linear(48, 48), size=6).own()
    assert f"2 · 48 · 6 + 6 + 48 = {sum(map(torch.numel, own.values()))} numbers" in said


@pytest.mark.parametrize("causal", [False, True])
def test_packing_is_what_unpad_input_does(causal):
    lengths = torch.tensor([3, 7, 4])
    mask = torch.arange(7) < lengths[:, None]  # (batch, tokens)
    packed, packing = unpad_input(torch.zeros(3, 7, 2), mask)
    figure, ax = draw("packing", causal=causal)
    said = texts_of(ax)
    assert f"real tokens (1, N_tokens, hidden), N_tokens = {packed.shape[1]}" in said
    at = said.index("cu_seqlens")
    assert said[at + 1 : at + 5] == [str(end) for end in packing.cu_seqlens.tolist()]
    assert said.count("[PAD]") == said.count("0") - 4 == (~mask).sum()  # 0 is also three positions and the first end
    pairs, places = (6 + 28 + 10, 3 * 28) if causal else (9 + 49 + 16, 3 * 49)
    assert f"{pairs} pairs instead of {places}." in said[-1]
    assert ("triangle" if causal else "square") in figure.get_label()


def test_heads_share_out_the_rows():
    said = texts_of(draw("multitask", tasks={"a": "(rows, 2)", "b": "(rows, tokens, 5)"})[1])
    assert {"a head: rows 0, 2, 4\nlogits (rows, 2)", "b head: rows 1, 3, 5\nlogits (rows, tokens, 5)"} <= set(said)


# ---------------------------------------------------------------------------------------- lines, and showing


def test_lines_leave_a_box_straight():
    box = Box(10, 10, 8, 4)
    assert box.towards(30, 11) == (14, 11) and box.towards(-5, 10) == (6, 10)
    assert box.towards(12, 40) == (12, 12) and box.towards(9, -3) == (9, 8)
    assert box.towards(30, 40) == (14, 10)  # neither beside nor below: from the middle of a side
    sheet = Sheet(200, 100, "", {})
    sheet.arrow(sheet.box(60, 20, 100, 20), sheet.box(30, 80, 20, 20))
    sheet.arrow(sheet.box(30, 80, 20, 20), sheet.box(60, 20, 100, 20))
    down, up = map(line_of, arrows_of(sheet.ax))
    assert {*down[:, 0]} == {*up[:, 0]} == {30}


@pytest.fixture
def shown(monkeypatch):
    """What reaches the notebook: the outputs' data."""
    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: outputs.append(data))
    return outputs


def picture(data):
    alt, width, source = re.fullmatch(
        r'<img alt="(.*)" width="(\d+)" style=.* src="data:.*,(.*)">', data["text/html"]
    ).groups()
    return alt, int(width), Image.open(BytesIO(b64decode(source)))


def test_a_figure_is_shown_with_its_text_at_two_pixels_a_pixel(shown):
    figure, ax = plt.subplots(figsize=(4, 3), dpi=90)
    ax.imshow(np.random.default_rng(0).random((20, 20)))
    show_figure(figure, 'Rows "a" < b')
    (data,) = shown
    alt, width, image = picture(data)
    assert alt == "Rows &quot;a&quot; &lt; b" and data["text/plain"] == 'Rows "a" < b'
    assert image.width == pytest.approx(2 * width, abs=1) and 250 < width < 360
    assert image.mode == "P" and not plt.fignum_exists(figure.number)
    show_figure(figure, 'Rows "a" < b')
    assert shown[1] == data  # so that running it again leaves no diff
    full = BytesIO()
    figure.savefig(full, format="png", dpi=180, bbox_inches="tight")
    off = np.asarray(image.convert("RGB"), int) - np.asarray(Image.open(full).convert("RGB"), int)
    assert np.abs(off).max() < 20  # of 255


def test_a_figure_without_a_text_is_refused(shown):
    with pytest.raises(ValueError, match="needs an alt text"):
        show_figure(plt.figure())
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_that_ends_in_a_diagram_shows_it_once_and_small(name, shown):
    from IPython.core.formatters import DisplayFormatter

    figure = getattr(diagrams, name)()
    assert DisplayFormatter().format(figure) == ({}, {})  # it showed itself
    (data,) = shown
    assert len(data["text/html"]) < 75_000 and picture(data)[1] < 830
    assert data["text/plain"] == figure.get_label()
