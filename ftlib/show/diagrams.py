"""Diagrams drawn by code: what happens in attention, in a layer, in a head, in an adapter, in a batch, in DPO.

    ftlib.diagrams.attention_head(["the", "film", "is", "funny"])  # at the end of a cell: shown with its alt text

To copy: this file, show/sheet.py and show/plots.py.

A diagram takes the sizes it names and returns a Figure: dark ink on a white sheet, so that it is legible on a dark page
too.  Its docstring is its alt text, with the sizes filled in.  Names are those of Transformers; dropout is left out.
There is room for a text of six tokens, five texts, six tasks.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import numpy as np

from .sheet import BLUE, GREEN, GREY, LINE, ORANGE, PINK, RED, SKY, Sheet, pale

COLORS = (BLUE, RED, GREEN, ORANGE, SKY, PINK)
SHAPE, TOKENS = "(batch, tokens, hidden)", ("the", "film", "is", "funny")
TEXTS = tuple(f"[CLS] {text} [SEP]".split() for text in ("dull", "a warm and funny film", "so so"))
TASKS = {"intent": "(rows, 24)", "slots": "(rows, tokens, 127)", "spam": "(rows, 2)"}


def _weights(tokens: int, color: str, seed: int) -> list:
    """Colours of a map of attention weights, of no model: drawn at random, the same each time."""
    shares = np.random.default_rng(seed).dirichlet([0.7] * tokens, tokens)  # (queries, keys)
    return [[pale(color, share) for share in row] for row in shares]


def attention_head(tokens: Sequence[str] = TOKENS, hidden: int = 384, head_dim: int = 32):
    """One attention head, left to right: x, {hidden} numbers for each token, goes through three linear layers, which
    give query, key and value, q, k and v, {head_dim} numbers a token each. The scores, a row a query and a column a
    key, are q times k transposed, over the root of {head_dim}; the mask enters here, and softmax makes each row weights
    that sum to 1. The weights times v are the output, {head_dim} numbers a token.
    """
    sheet, n = Sheet(800, 440, attention_head.__doc__, locals()), len(tokens)
    tall, square = min(16, 91 / n), dict(cell=(min(18, 74 / n),) * 2, mark=n - 1)
    each = dict(cell=(14, tall), shape="(batch, tokens, head_dim)", mark=n - 1)
    x = sheet.grid(120, 210, [[pale(GREY)] * 6] * n, **each | dict(name="x", shape=SHAPE))
    for i, token in enumerate(tokens):
        sheet.say(71, 210 + tall * (i + 0.5 - n / 2), token, ha="right")
    scores, times = sheet.grid(565, 145, [[pale(PINK)] * n] * n, **square), sheet.sign(630, 290, "@")
    ways = {"query": (BLUE, 70, (482, 70), (482, 130), scores), "key": (RED, 210, (482, 210), (482, 160), scores),
            "value": (GREEN, 350, (630, 350), times)}  # fmt: skip
    for name, (color, y, *way) in ways.items():
        linear = sheet.box(270, y, 116, 44, f"{name}\nLinear {hidden} → {head_dim}", color)
        look = each | dict(mark=n - 1 if name == "query" else None, name=name[0], color=color)
        made = sheet.grid(400, y, [[pale(color)] * 3] * n, **look)
        sheet.arrow(x, (197, x.y), (197, y), linear)
        sheet.arrow(linear, made)
        sheet.arrow(made, *way)
    sheet.say(575, 116 - scores.h / 2, f"scores = q @ kᵀ / √{head_dim}", 9.5, weight="bold")
    sheet.say(575, 133 - scores.h / 2, "(batch, queries, keys)", 8, LINE)
    sheet.arrow(sheet.box(710, 145, 120, 60, "mask\nFalse: score −∞,\nso weight 0", share=0.08), scores)
    weights = sheet.grid(565, 290, _weights(n, PINK, 3), **square, shape="weights")
    sheet.arrow(scores, weights, text="softmax over keys:\neach row sums to 1")
    sheet.chain(weights, times, sheet.grid(715, 290, [[pale(GREEN)] * 3] * n, name="output", **each))
    notes = f"tokens {n}, hidden {hidden}, head_dim {head_dim}. Outlined: what “{tokens[-1]}” asks, and gets."
    sheet.note(425, notes)
    return sheet.figure


def multi_head(tokens: Sequence[str] = TOKENS, hidden: int = 384, heads: int = 12):
    """Several heads: x goes through the layers query, key and value, each {hidden} to {hidden} numbers a token. The
    results are cut into {heads} slices, one a head. Every head makes weights of its own q and k and multiplies them
    with its own v. What the heads give stands side by side, {hidden} numbers again, and the layer output mixes it.
    """
    sheet, n, linear = Sheet(800, 415, multi_head.__doc__, locals()), len(tokens), f"Linear {hidden} → {hidden}"
    tall, small = min(16, 64 / n), (12, min(12, 48 / n))
    x = sheet.grid(73, 180, [[pale(GREY)] * 6] * n, (14, tall), name="x", shape=SHAPE)
    project = sheet.box(205, 180, 128, 66, f"query, key, value:\nthree times\n{linear}", size=8)
    sheet.arrow(x, project)
    shown = [*zip(sorted({0, min(1, heads - 1), heads - 1}), (BLUE, RED, GREEN), (68, 180, 312), strict=False)]
    slices = [[pale(color)] * 2 for _, color, _ in shown]
    if heads > 3:
        slices[2:2] = [["white"]]
        sheet.say(440, 246, "⋮", 14, GREY)
    joined = sheet.grid(662, 68, [[*chain(*slices)]] * n, (14, tall), name="side by side", shape=SHAPE)
    for head, color, y in shown:
        sheet.arrow(project, (278, 180), (278, y), sheet.panel(290, y - 46, 577, y + 46, color=color))
        sheet.say(297, y + 9, f"head {head + 1}", color=color, ha="left", weight="bold")
        part = dict(fills=[[pale(color)] * 2] * n, cell=small)
        _, k, _ = (sheet.grid(at, y + 9, name=name, **part) for at, name in ((375, "q"), (408, "k"), (517, "v")))
        sheet.arrow(k, sheet.grid(465, y + 9, _weights(n, color, head), (48 / n, small[1]), name="weights"))
        sheet.say(497, y + 9, "@")
        sheet.say(537, y + 9, "=")
        sheet.arrow(sheet.grid(556, y + 9, **part), (587, y + 9), (587, 68), joined)
    mix = sheet.box(662, 180, 130, 44, f"output\n{linear}", size=8)
    sheet.arrow((662, 92 + joined.h / 2), mix)
    sheet.arrow(mix, sheet.grid(662, 312, [[pale(GREY)] * 6] * n, (14, tall), shape=SHAPE))
    shapes = "q, k, v (batch, heads, tokens, head_dim); weights (batch, heads, queries, keys)"
    sheet.note(397, f"{shapes}; heads {heads}, head_dim {hidden} / {heads} = {hidden // heads}")
    return sheet.figure


def bert_block(hidden=384, heads=12, intermediate=1536, layers=6, vocab_size=30522, positions=512):
    """BERT. Above, three embeddings of a token are added, of its word piece, its position and its segment; LayerNorm
    makes x of the sum. Below, one of {layers} layers: x goes through self-attention with {heads} heads, where the
    attention mask enters; the residual, x itself, is added; LayerNorm; a feed-forward network, {hidden} to
    {intermediate} to {hidden} numbers with GELU; its own input is added; LayerNorm.
    """
    sheet, y = Sheet(800, 400, bert_block.__doc__, locals()), 272
    added, norm = sheet.sign(510, 70), sheet.box(600, 70, 84, 36, "LayerNorm", GREEN)
    tables = (("word", vocab_size, "input_ids (batch, tokens)"), ("position", positions, "position_ids: 0, 1, 2, …"),
              ("token_type", 2, "token_type_ids: 0 or 1"))  # fmt: skip
    for (name, rows, ids), at in zip(tables, (30, 70, 110), strict=True):
        table = sheet.box(345, at, 260, 30, f"{name}_embeddings ({rows}, {hidden})", ORANGE)
        sheet.say(178, at, ids, 8, LINE, "right")
        sheet.arrow((184, at), table)
        sheet.arrow(table, *[(added.x, at)] * (at != added.y), added)
    sheet.arrow(added, norm)
    sheet.panel(45, 175, 765, 318, f"one of {layers} layers")
    attention = sheet.box(160, y, 120, 52, f"self-attention\n{heads} heads", BLUE)
    forward = f"feed-forward\nLinear {hidden} → {intermediate}, GELU\nLinear {intermediate} → {hidden}"
    forward, first, second = sheet.box(478, y, 164, 62, forward, PINK, 8), sheet.sign(250, y), sheet.sign(592, y)
    norms = [sheet.box(at, y, 84, 36, "LayerNorm", GREEN) for at in (325, 667)]
    sheet.arrow(norm, (780, 70), (780, 152), (25, 152), (25, y), attention, text=f"x {SHAPE}")
    sheet.chain(attention, first, norms[0], forward, second, norms[1], (790, y))
    sheet.residual(75, first, 57, "residual: + x", color=RED)
    sheet.residual(381, second, 57, color=RED)
    sheet.arrow((160, 345), attention)
    sheet.say(160, 355, "attention_mask (batch, tokens): 0 at padding", 8, LINE)
    notes = (
        "Residual: a part's input is added to its output. LayerNorm: mean 0, variance 1, then learned scale and shift."
    )
    sheet.note(382, notes)
    return sheet.figure


def decoder_block(hidden=576, heads=9, kv_heads=3, intermediate=1536, layers=30, vocab_size=49152):
    """A decoder as SmolLM2 and Llama are: embed_tokens, {layers} layers, RMSNorm, lm_head, {vocab_size} logits a token.
    In a layer x goes through RMSNorm and self-attention, and the residual, x, is added; then through RMSNorm and a
    gated MLP, and the residual is added again. Self-attention: {heads} query heads, {kv_heads} key and value heads;
    rotary turns q and k by position; a causal mask on the scores; softmax; times v; o_proj. The MLP: SiLU of gate_proj
    times up_proj, then down_proj.
    """
    sheet, y, dim, wide = Sheet(800, 575, decoder_block.__doc__, locals()), 185, hidden // heads, intermediate
    embed = sheet.box(120, 60, 200, 30, f"embed_tokens ({vocab_size}, {hidden})", ORANGE)
    sheet.say(120, 16, "input_ids (batch, tokens)", 8, LINE)
    sheet.arrow((120, 27), embed)
    sheet.say(232, 60, f"x {SHAPE}; positions come in by rotary", 8, LINE, "left")
    sheet.panel(50, 88, 645, 222, f"one of {layers} layers")
    attention, mlp = sheet.box(258, y, 104, 42, "self-attention", BLUE), sheet.box(508, y, 96, 42, "gated MLP", PINK)
    norms = [sheet.box(at, y, 76, 34, "RMSNorm", GREEN) for at in (142, 402, 722)]
    first, second = sheet.sign(334, y), sheet.sign(586, y)
    head = sheet.box(722, 275, 130, 42, f"lm_head\nLinear {hidden} → {vocab_size}", ORANGE, 8)
    sheet.arrow((32, 75), (32, y), norms[0])
    sheet.chain(norms[0], attention, first, norms[1], mlp, second, norms[2], head, (722, 345))
    sheet.residual(80, first, 57, "residual: + x", color=RED)
    sheet.residual(353, second, 57, color=RED)
    sheet.say(722, 365, "logits\n(batch, tokens, vocab)", 8, LINE)
    sheet.say(722, 480, "pre-norm: a norm stands\nbefore each part, and\nnone on the residual", 8, GREY)

    sheet.panel(15, 250, 440, 560, f"self-attention: {heads} heads for q, {kv_heads} for k and v", BLUE)
    sheet.arrow(attention, (attention.x, 250), arrowstyle="-", linestyle=":")
    q = sheet.box(163, 305, 98, 40, f"q_proj\n{hidden} → {heads} × {dim}", BLUE, 8)
    k = sheet.box(271, 305, 98, 40, f"k_proj\n{hidden} → {kv_heads} × {dim}", RED, 8)
    v = sheet.box(379, 305, 98, 40, f"v_proj\n{hidden} → {kv_heads} × {dim}", GREEN, 8)
    rotary = sheet.box(217, 362, 206, 28, "rotary: turned by position", SKY)
    scores = sheet.box(217, 414, 206, 28, f"scores = q @ kᵀ / √{dim}", PINK)
    weights, times = sheet.box(217, 466, 206, 28, "softmax: weights", PINK), sheet.sign(217, 527, "@")
    out = sheet.box(90, 527, 110, 40, f"o_proj\n{heads} × {dim} → {hidden}", size=8)
    sheet.arrow(q, rotary)
    sheet.chain(k, rotary, scores, weights, times, out)
    sheet.arrow(v, (v.x, 527), times)
    triangle = [[pale(GREY) if j <= i else "white" for j in range(5)] for i in range(5)]
    sheet.arrow(sheet.grid(62, 414, triangle, (9, 9), shape="causal mask"), scores)

    sheet.panel(455, 250, 645, 560, "gated MLP", PINK)
    sheet.arrow(mlp, (mlp.x, 250), arrowstyle="-", linestyle=":")
    gate = sheet.box(506, 305, 84, 40, f"gate_proj\n{hidden} → {wide}", PINK, 8)
    up = sheet.box(598, 305, 84, 40, f"up_proj\n{hidden} → {wide}", PINK, 8)
    silu, gated = sheet.box(506, 380, 60, 28, "SiLU", PINK), sheet.sign(506, 450, "×")
    sheet.chain(gate, silu, gated, sheet.box(506, 527, 84, 40, f"down_proj\n{wide} → {hidden}", PINK, 8))
    sheet.arrow(up, (up.x, 450), gated)
    return sheet.figure


def classification_head(tokens=("[CLS]", "a", "dull", "film", "[SEP]"), hidden=384, layers=6, labels=("neg", "pos")):
    """A classifier on [CLS]: an encoder of {layers} layers gives a vector for each of {n} tokens, last_hidden_state.
    The first alone goes on: through the pooler, {hidden} to {hidden} with tanh, and the classifier, {hidden} to
    {classes} logits; softmax makes them probabilities of {names}.
    """
    n, classes, names = len(tokens), len(labels), ", ".join(labels)
    sheet, w = Sheet(800, 325, classification_head.__doc__, locals()), 400 / n
    sheet.grid(220, 35, [[pale(ORANGE, 0.2)] * n], (w, 26), [tokens])
    encoder = sheet.box(220, 100, 400, 40, f"encoder: {layers} layers, every token sees every other", BLUE)
    vectors = [sheet.grid(20 + w * (i + 0.5), 175, [[pale(GREY if i else RED)]] * 4, (14, 12)) for i in range(n)]
    for vector in vectors:
        sheet.arrow((vector.x, 48), encoder)
        sheet.arrow(encoder, vector)
    sheet.say(440, 35, "input_ids (batch, tokens)", 8, LINE, "left")
    sheet.say(440, 175, f"last_hidden_state\n{SHAPE}", 8, LINE, "left")
    pooler = sheet.box(100, 275, 160, 44, f"pooler\nLinear {hidden} → {hidden}, tanh", size=8)
    classifier = sheet.box(310, 275, 130, 44, f"classifier\nLinear {hidden} → {classes}", RED, 8)
    cells = dict(fills=[[pale(RED)] * classes], cell=(min(44, 132 / classes), 24), texts=[labels])
    logits = sheet.grid(500, 275, **cells, name="logits", shape="(batch, num_labels)")
    sheet.arrow(vectors[0], pooler, text="[:, 0] (batch, hidden)")
    sheet.chain(pooler, classifier, logits)
    sheet.arrow(logits, sheet.grid(700, 275, **cells, name="probabilities"), text="softmax")
    sheet.say(310, 309, "new: drawn at random", 8, RED)
    return sheet.figure


def lora_and_adapters(hidden: int = 384, rank: int = 8, size: int = 24):
    """Where LoRA and adapters sit in a frozen BERT layer. LoRA stands beside the linear layers query and value: x goes
    through W, {hidden} by {hidden} and frozen, and through A, {rank} by {hidden}, then B, {hidden} by {rank}, times
    alpha / r; both results are added. An adapter follows the last linear layer of self-attention and of the
    feed-forward network (Pfeiffer's of the latter alone), before the residual: {hidden} down to {size}, GELU, up to
    {hidden}, added to its input. With Houlsby's, LayerNorm is trained too.
    """
    sheet, y = Sheet(800, 460, lora_and_adapters.__doc__, locals()), 92
    sheet.panel(15, 15, 785, 170, "a BERT layer, grey frozen, colored trained: LoRA or adapters")
    attention = sheet.box(247, y, 84, 82, "attention,\noutput")
    for name, at, color in (("query + LoRA", 62, RED), ("key", y, GREY), ("value + LoRA", 122, RED)):
        linear = sheet.box(127, at, 104, 22, name, color)
        sheet.arrow((25, y), (57, y), (57, at), linear)
        sheet.arrow(linear, attention)
    adapters = [sheet.box(x, y, 62, 30, "adapter", RED) for x in (338, 626)]
    first, second = sheet.sign(393, y), sheet.sign(681, y)
    norms = [sheet.box(x, y, 72, 30, "LayerNorm", size=8) for x in (452, 739)]
    forward = sheet.box(541, y, 78, 46, "feed-\nforward")
    sheet.chain(attention, adapters[0], first, norms[0], forward, adapters[1], second, norms[1], (796, y))
    sheet.residual(40, first, -53, below=True)
    sheet.residual(495, second, -53, below=True)

    y, low = 250, 340
    sheet.panel(15, 185, 395, 422, "LoRA beside a linear layer", RED)
    frozen, added = sheet.box(190, y, 150, 48, f"W ({hidden}, {hidden})\nfrozen"), sheet.sign(352, y)
    a = sheet.box(116, low, 104, 48, f"A ({rank}, {hidden})\nrandom at first", RED)
    b = sheet.box(272, low, 104, 48, f"B ({hidden}, {rank})\nzero at first", RED)
    sheet.arrow((25, y), frozen, text="x")
    sheet.chain(frozen, added, (388, y))
    sheet.arrow((45, y), (45, low), a)
    sheet.arrow(a, b, text=f"(…, {rank})")
    sheet.arrow(b, (352, low), added, text="· α / r", below=True)
    total = f"{rank} · ({hidden} + {hidden}) = {2 * rank * hidden}"
    sheet.say(205, 398, f"trained: {total} numbers; frozen: {hidden**2}", 8, GREY)

    sheet.panel(410, 185, 785, 422, "adapter after a linear layer", RED)
    down = sheet.box(500, low, 112, 48, f"down\nLinear {hidden} → {size}", RED, 8)
    up = sheet.box(680, low, 112, 48, f"up, zero at first\nLinear {size} → {hidden}", RED, 8)
    added = sheet.sign(759, low)
    sheet.chain((418, low), down, sheet.box(590, low, 44, 30, "GELU", RED, 8), up, added, (782, low))
    sheet.residual(433, added, low - y, "its input")
    total = f"2 · {hidden} · {size} + {size} + {hidden} = {2 * hidden * size + size + hidden}"
    sheet.say(597, 398, f"trained: {total} numbers", 8, GREY)
    sheet.note(
        441,
        "Adapters of Houlsby: after both parts, and LayerNorm is trained too. Of Pfeiffer: after feed-forward alone.",
    )
    return sheet.figure


def packing(texts: Sequence[Sequence[str]] = TEXTS, causal: bool = False):
    """Unpadding: {rows} texts, padded to {longest} tokens each, become one row of their {total} real tokens, example
    after example; cu_seqlens, {ends}, says where each begins and ends. The map of who sees whom has a {shape} for each
    example and nothing between them. After the last layer the padded shape is put back, with zeros at padding.
    """
    lengths, shape = [len(text) for text in texts], "triangle" if causal else "square"
    rows, longest, total, ends = len(texts), max(lengths), sum(lengths), [0, *accumulate(lengths)]
    sheet, color = Sheet(800, 450, packing.__doc__, locals()), [pale(color) for color in COLORS]
    fills = [[color[i]] * n + ["0.93"] * (longest - n) for i, n in enumerate(lengths)]
    words = [[*text] + ["[PAD]"] * (longest - len(text)) for text in texts]
    zeros = [[""] * n + ["0"] * (longest - n) for n in lengths]
    owner, w = [i for i, n in enumerate(lengths) for _ in range(n)], min(46, 330 / longest)
    half = max(w * longest / 2, 110)  # the labels are as wide
    look = dict(name="input_ids", shape=f"(batch, tokens) = ({rows}, {longest})")
    padded = sheet.grid(20 + half, 31 + 11 * rows, fills, (w, 22), words, **look)
    look = dict(name="last_hidden_state", shape=f"(batch, tokens, hidden) = ({rows}, {longest}, hidden)")
    again = sheet.grid(780 - half, 31 + 11 * rows, fills, (w, 22), zeros, **look)
    left, w, y = 100, min(44, 640 / total), 56 + 22 * rows
    packed = sheet.grid(left + w * total / 2, 210, [[color[i] for i in owner]], (w, 24), [[*chain(*texts)]])
    sheet.arrow((padded.x, y), packed, text="unpad", below=True)
    sheet.arrow(packed, *[(again.x, 210)] * (again.x > left + w * total), (again.x, y), text="pad again")
    sheet.say(400, 176, f"real tokens (1, N_tokens, hidden), N_tokens = {total}", 8, LINE)
    positions = [(i + 0.5, n) for i, n in enumerate(chain(*map(range, lengths)))]
    for name, at, numbers in (("positions", 235, positions), ("cu_seqlens", 257, zip(ends, ends, strict=True))):
        sheet.say(left - 14, at, name, 8, LINE, "right")
        for place, number in numbers:
            sheet.say(left + w * place, at, str(number), 8, LINE)
    seen = [[i == j and (not causal or b <= a) for b, j in enumerate(owner)] for a, i in enumerate(owner)]
    fills = [[color[i] if sees else "white" for sees in row] for i, row in zip(owner, seen, strict=True)]
    sheet.grid(150, 360, fills, (126 / total, 126 / total), name="who sees whom", shape="queries × keys")
    pairs = rows * (longest * (longest + 1) // 2 if causal else longest**2)
    facts = (f"Linear layers, norms and activations: {total} places instead of {rows * longest}.",
             f"Attention is told by cu_seqlens where an example ends: {sum(map(sum, seen))} pairs instead of {pairs}.",
             "A token sees its own example only" + (", up to itself." if causal else "."))  # fmt: skip
    sheet.say(262, 360, "\n".join(facts), ha="left")
    return sheet.figure


def multitask(tasks: Mapping[str, str] = TASKS):
    """Several tasks on one encoder: a batch mixes rows of {names}; all go through the shared encoder once; each task's
    head takes its own rows and gives logits; the losses, each times its weight w, are added, and the gradients of all
    tasks meet in the encoder.
    """
    names, order, y = ", ".join(tasks), [[*tasks][i % len(tasks)] for i in range(6)], 150
    sheet, color = Sheet(800, 345, multitask.__doc__, locals()), dict(zip(tasks, COLORS, strict=False))
    look = dict(texts=[[f"{i}  {task}"] for i, task in enumerate(order)], name="a mixed batch", shape="(batch, tokens)")
    batch = sheet.grid(72, y, [[pale(color[task])] for task in order], (104, 26), **look)
    encoder, total = sheet.box(200, y, 96, 156, "shared\nencoder,\nruns once"), sheet.sign(728, y)
    sheet.arrow(batch, encoder)
    sheet.say(318, y - 9, SHAPE, 8, LINE)
    for i, (task, logits) in enumerate(tasks.items()):
        at = y + 280 / len(tasks) * (i - (len(tasks) - 1) / 2)
        rows = ", ".join(str(row) for row, other in enumerate(order) if other == task)
        head = sheet.box(495, at, 192, 42, f"{task} head: rows {rows}\nlogits {logits}", color[task])
        loss = sheet.box(653, at, 74, 30, "w · loss", color[task])
        sheet.arrow(encoder, (387, y), (387, at), head)
        sheet.arrow(head, loss)
        sheet.arrow(loss, *[(total.x, at)] * (at != y), total)
    way = (total, (775, y), (775, 310), (200, 310), encoder)
    sheet.arrow(*way, text="loss of the step; the gradients of all tasks meet in the encoder", linestyle="--")
    return sheet.figure


def dpo(beta: float = 0.1):
    """DPO: each prompt has a chosen and a rejected answer. The policy, which is trained, and the reference, which is
    frozen, both give each answer a log-probability. Policy less reference is the gain g of an answer; the margin is
    beta, {beta}, times the gain of the chosen less that of the rejected; the loss is minus the log of its sigmoid.
    """
    sheet, both, y = Sheet(800, 360, dpo.__doc__, locals()), [[pale(BLUE)], [pale(RED)]], 150
    words = [["prompt", "chosen"], ["prompt", "rejected"]]
    look = dict(cell=(72, 28), texts=words, name="pairs", shape="(2 · pairs, tokens)")
    batch, less = sheet.grid(92, y, [[pale(GREY), *fill] for fill in both], **look), sheet.sign(545, y, "−")
    for name, what, pi, color, at in (("policy", "trained", "π", RED, 55), ("reference", "frozen", "π_ref", GREY, 245)):
        model = sheet.box(262, at, 104, 48, f"{name} {pi}\n{what}", color)
        look = dict(texts=[[f"log {pi}(chosen)"], [f"log {pi}(rejected)"]], shape="(2 · pairs,)")
        values = sheet.grid(425, at, both, (122, 26), **look)
        sheet.arrow(batch, (186, y), (186, at), model)
        sheet.arrow(model, values)
        sheet.arrow(values, (545, at), less)
    sheet.say(262, 295, "a copy from before, or the\npolicy without its adapters", 8, GREY)
    sheet.say(425, y, "log-probability of the answer\nafter the prompt: the sum\nover its tokens", 8, GREY)
    gains = sheet.grid(675, y, both, (122, 26), [["g chosen"], ["g rejected"]], name="gain")
    margin = sheet.box(675, 236, 190, 46, f"margin, with β = {beta}\nβ · (g chosen − g rejected)")
    sheet.arrow(less, gains)
    sheet.arrow(gains, margin, text="(2 · pairs,)")
    sheet.arrow(margin, sheet.box(675, 318, 190, 46, "loss = −log σ(margin),\nmean over pairs", RED), text="(pairs,)")
    return sheet.figure
