"""Figures of the series: learning curves, confusions, attention, embeddings, methods side by side.

To copy: this file alone.

Every function draws into `ax`, by default a new figure of notebook size, and returns the Matplotlib Axes. Legends
stand beside the axes, never on the data: make figures of your own with `layout="constrained"`.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

# Okabe & Ito, "Color Universal Design" (2008): color-blind readers can tell them apart; without yellow, too pale
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"
MAX_CELLS = 12  # classes up to which a confusion matrix shows numbers and names


def axes_of(ax, width: float, height: float):
    """The given Axes or a new figure's; width and height in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(width, height), dpi=90, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _describe(ax, title: str, xlabel: str = "", ylabel: str = "", *, legend: bool = False, **look):
    """The Axes, with a title, names of the axes and, if asked for, a legend beside them."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=11)
    if legend:
        handles, labels = ax.get_legend_handles_labels()
        labels = [textwrap.fill(label, 28, break_long_words=False) for label in labels]
        place = dict(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False)
        ax.legend(handles, labels, fontsize=9, **place, **look)
    return ax


def _style(i: int) -> dict:
    """How the i-th of several is told from the others."""
    return dict(color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)])


def _cells(ax, values: np.ndarray, size: tuple[float, float], bar: str | None, texts=None, dark=np.inf, **look):
    """Axes with values (rows, columns) as colored cells, grey where they are not finite; bar: label of a color bar.

    texts: (value, row, column) -> what a cell says, in white where its value is beyond `dark`.
    """
    ax = axes_of(ax, *size)
    ax.spines[["top", "right"]].set_visible(True)
    ax.set_facecolor("0.92")
    image = ax.imshow(values, interpolation="nearest", **look)
    if bar:
        ax.figure.colorbar(image, ax=ax, label=bar, shrink=0.8)
    for row, column in np.argwhere(np.isfinite(values)) if texts else ():
        value = values[row, column]
        color = "white" if abs(value) > dark else "black"
        ax.text(column, row, texts(value, row, column), ha="center", va="center", fontsize=9, color=color)
    return ax


def _numbers(values) -> np.ndarray:
    """A list, array or tensor as float64."""
    values = values.detach().float().cpu().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def learning_curves(runs, ax=None, keys: Sequence[str] = ("loss",), *, smooth: int = 1):
    """Values of a run's history against the optimizer step; a color for each run, a line style for each key.

    runs: a Run (anything with `.history`), a list of history records (dicts with "step" and values), or {name: either}.
    `smooth` > 1 averages so many training values around each; the raw values stay as a pale line. One that is nan or
    infinite leaves a gap, and the legend names it. Raises ValueError for a key that a run has nowhere.
    """
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    named = runs if isinstance(runs, Mapping) else {"": runs}
    if not keys or not named or smooth < 1:
        raise ValueError(f"needs a run, a key and smooth >= 1: {len(named)} runs, keys={keys}, smooth={smooth}")
    histories = {name: getattr(run, "history", run) for name, run in named.items()}
    lines = []  # of (run's place, key's place, label, key, points)
    for (i, (name, history)), (j, key) in product(enumerate(histories.items()), enumerate(keys)):
        points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
        if not points:
            known = ", ".join(sorted({k for record in history for k in record} - {"step"})) or "no records"
            raise ValueError(f"run {name!r} has no {key!r} in its history; it has {known}")
        lines.append((i, j, f"{name}, {key}" if name and len(keys) > 1 else name or key, key, points))
    ax = axes_of(ax, 6.0 if len(lines) == 1 else 7.5, 3.6)
    for i, j, label, key, points in lines:
        steps, values = np.array(points, dtype=float).T
        color = PALETTE[(i if len(named) > 1 else j) % len(PALETTE)]
        if (broken := ~np.isfinite(values)).any():
            label += f" (not finite from step {steps[broken][0]:g})"
            values = np.where(broken, np.nan, values)
        if smooth > 1 and not key.startswith("eval_"):
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, zorder=1, antialiased=False)
            around = [slice(max(0, k - (smooth - 1) // 2), k + smooth // 2 + 1) for k in range(len(values))]
            values = np.array([values[part].mean() for part in around])
        marker = MARKERS[i % len(MARKERS)] if key.startswith("eval_") or len(values) == 1 else None
        style = dict(linestyle=("-", "--", ":", "-.")[j % 4], marker=marker, markersize=5, linewidth=1.6)
        ax.plot(steps, values, color=color, label=label, **style)
    pale = f"\n(running mean of {smooth} records, raw values pale)" if smooth > 1 else ""
    title, ylabel = " and ".join(keys), " / ".join(sorted({key.removeprefix("eval_") for key in keys}))
    legend = len(lines) > 1 or label != keys[0]
    return _describe(ax, f"{title} while training{pale}", "optimizer step", ylabel, legend=legend)


def _counts(labels, predictions, names: Sequence[str]) -> np.ndarray:
    """Checked counts, int64 (true, predicted)."""
    if names is None or isinstance(names, str) or len(names) == 0:
        raise ValueError(f"names must list the class names in the order of their ids, got {names!r}")
    labels, predictions = map(_numbers, (labels, predictions))
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape}: expected the same (n,)")
    for what, ids in (("labels", labels), ("predictions", predictions)):
        if len(bad := np.flatnonzero(~np.isin(ids, range(len(names))))):
            raise ValueError(f"{what} row {bad[0]} is {ids[bad[0]]:g}: expected an id from 0 to {len(names) - 1}")
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    return counts


def confusion_matrix(labels, predictions, names: Sequence[str], ax=None, normalize: bool = True):
    """True classes in rows, predicted in columns; shares of each row, or counts when `normalize` is False.

    labels, predictions: class ids (n,). A class that never occurs in `labels` leaves a grey row. Above 12 classes cells
    carry no numbers, and axes show ids. Raises ValueError for ids outside `names`.
    """
    from matplotlib.colors import PowerNorm

    counts = _counts(labels, predictions, names)
    total, small = counts.sum(axis=1, keepdims=True), len(names) <= MAX_CELLS
    side = min(max(3.4, 1.6 + 0.55 * len(names)), 7.5)  # inches
    shown = np.where(total > 0, counts / np.maximum(total, 1) if normalize else counts, np.nan)
    top, unit = (1, "share of the true class") if normalize else (counts.max(), "examples")
    look = dict(norm=PowerNorm(1 if small else 0.5, 0, top), cmap="Blues")
    title = f"{counts.sum():,} examples, {counts.trace() / counts.sum():.1%} right"
    if not small:
        ax = _cells(ax, shown, (side + 0.8, side), unit, **look)
        return _describe(ax, title, "predicted class (id)", "true class (id)")
    form = ".2f" if normalize else ".0f"
    ax = _cells(ax, shown, (side + 0.8, side), None, lambda value, *_: f"{value:{form}}", 0.55 * top, **look)
    wide = max(map(len, map(str, names))) * 0.1 > (side - 1.4) / len(names)  # inches a name, a cell
    ax.set_xticks(range(len(names)), names, **dict(rotation=45, ha="right") if wide else {})
    ax.set_yticks(range(len(names)), names)
    return _describe(ax, f"{title}\ncells: {unit}", "predicted class", "true class")


def attention_map(weights, tokens: Sequence[str], ax=None, *, title: str | None = None):
    """One head's attention as a picture: a row a query, a column a key, darker where more weight goes.

    weights: (tokens, tokens).  Raises ValueError for another shape or number of tokens, and for what is not finite.
    """
    weights = _numbers(weights)  # (queries, keys)
    fits = weights.shape == (len(tokens), len(tokens)) and weights.size and not isinstance(tokens, str)
    if not fits or not np.isfinite(weights).all():
        given = f"finite (queries, keys) of one head, and a list of as many tokens, got {len(tokens)}"
        raise ValueError(f"weights have shape {weights.shape}: expected {given}")
    size = min(max(3.2, 1.4 + 0.27 * max(weights.shape)), 7.5)
    ax = _cells(ax, weights, (size + 0.9, size), "attention weight", cmap="Blues", vmin=0, aspect="auto")
    look = dict(fontsize=9 if max(weights.shape) <= 24 else 6.5, parse_math=False)  # "$" is a token like any other
    ax.set_xticks(range(len(tokens)), tokens, rotation=90 if max(map(len, tokens)) > 2 else 0, **look)
    ax.set_yticks(range(len(tokens)), tokens, **look)
    ax.set(xlabel="key (attended to)", ylabel="query (attending)", title=title or "attention weights")
    return ax


def heat_map(values, rows: Sequence[str], columns: Sequence[str], ax=None, *, spreads=None, label: str = "gain"):
    """Numbers in cells, blue above zero and red below: what trains with what (a transfer matrix), cosines of tasks.

    values: (rows, columns), nan for a cell to leave grey; spreads: the same shape, written as ±. `label` says what the
    numbers are. Raises ValueError for other shapes, and where no value is finite.
    """
    values = _numbers(values)  # (rows, columns)
    spreads = np.full(values.shape, np.nan) if spreads is None else _numbers(spreads)
    wanted = (len(rows), len(columns))
    if values.shape != wanted or spreads.shape != wanted or not np.isfinite(values).any():
        raise ValueError(f"values {values.shape}, spreads {spreads.shape}: expected {wanted}, with a finite number")

    def text(value, row, column):
        spread = spreads[row, column]
        return f"{value:+.3f}" + (f"\n± {spread:.3f}" if np.isfinite(spread) else "")

    size, top = (2.2 + 1.1 * len(columns), 1.4 + 0.6 * len(rows)), max(np.abs(values[np.isfinite(values)]).max(), 1e-12)
    ax = _cells(ax, values, size, label, text, 0.6 * top, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 10 else 0)
    ax.set_yticks(range(len(rows)), rows)
    return _describe(ax, label)


def embedding_map(features, labels, names: Sequence[str], method="pca", ax=None, *, seed: int = 0, top: int = 7):
    """Vectors in two dimensions, a color and a marker for each label.

    features: (n, dimensions) floats, n of at least 3; labels: class ids (n,). `method` is "pca" (the directions of most
    variance) or "tsne" (keeps neighbors together; its axes and distances between groups mean nothing). Beyond `top`
    the rarer labels are grey. Raises ValueError for another method, shapes, values not finite, ids outside `names`.
    """
    features, labels = _numbers(features), _numbers(labels)
    if features.ndim != 2 or len(labels) != len(features) or len(features) < 3 or features.shape[1] < 2:
        raise ValueError(f"features {features.shape}, {len(labels)} labels: need (n, dimensions), (3, 2) or more, n")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    kind = {"pca": "PCA", "tsne": f"t-SNE (seed {seed})"}.get(method)
    if len(bad) or kind is None:
        unknown = f"unknown method {method!r}: expected 'pca' or 'tsne'"
        raise ValueError(f"features row {bad[0]} is not finite" if len(bad) else unknown)
    _counts(labels, labels, names)
    centered = features - features.mean(axis=0)  # (n, dimensions)
    if method == "pca":
        left, singular, _ = np.linalg.svd(centered, full_matrices=False)
        points = left[:, :2] * singular[:2]  # (n, 2)
        share = singular**2 / max((singular**2).sum(), 1e-30)
        axes = [f"component {i + 1} ({share[i]:.0%} of the variance)" for i in (0, 1)]
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)  # about the number of neighbors kept
        points = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(centered)
        axes = ["t-SNE 1 (no unit)", "t-SNE 2 (no unit)"]
    ax = axes_of(ax, 7.0, 4.2)
    dots = dict(s=float(np.clip(16_000 / len(points), 5, 16)), linewidths=0)
    shown = sorted(label for label, _ in Counter(labels.tolist()).most_common(top))
    if (rest := ~np.isin(labels, shown)).any():
        ax.scatter(*points[rest].T, color="0.85", label=f"{len(np.unique(labels[rest]))} other labels", **dots)
    for i, label in enumerate(shown):
        ax.scatter(*points[labels == label].T, label=str(names[int(label)]), **_style(i), **dots)
    title = f"{len(features):,} vectors of {features.shape[1]} numbers, {kind}"
    return _describe(ax, title, *axes, legend=True, markerscale=2.0)


def compare_tasks(table: Mapping[str, Mapping[str, tuple]], ax=None, *, ylabel: str = "accuracy"):
    """Grouped bars: a group for each task, a color for each method; thin lines are one std over seeds.

    table: {method: {task: (mean, std)}}; a std of nan or None (one seed) draws no line, a task that a method lacks
    leaves a gap. Bars begin at 0. Raises ValueError for an empty table or a cell that is not (mean, std).
    """
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    cells = [(method, task, cell) for method, row in table.items() for task, cell in row.items()]
    wrong = [cell for cell in cells if np.shape(cell[2]) != (2,) or not np.isfinite(_numbers(cell[2])[0])]
    if wrong or not cells:
        raise ValueError(f"{wrong[0] if wrong else 'nothing to compare'}: expected (mean, std) a method and task")
    width = 0.8 / len(table)
    ax = axes_of(ax, min(3.5 + 0.45 * len(tasks) * len(table), 9.0), 3.6)
    for i, (method, row) in enumerate(table.items()):
        x = np.array([j for j, task in enumerate(tasks) if task in row]) + (i - (len(table) - 1) / 2) * width
        means, stds = np.array([_numbers(row[task]) for task in tasks if task in row]).reshape(-1, 2).T
        bar = dict(label=method, color=PALETTE[i % len(PALETTE)], error_kw=dict(elinewidth=1.1, capsize=2.5))
        ax.bar(x, means, 0.92 * width, yerr=stds, **bar)
        if len(tasks) * len(table) <= 16:
            above = dict(xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
            for left, mean, std in zip(x, means, np.nan_to_num(stds), strict=True):
                ax.annotate(f"{mean:.2f}", (left, mean + std), **above)
    turned = dict(rotation=30, ha="right") if max(map(len, tasks)) > 12 else {}
    ax.set_xticks(range(len(tasks)), tasks, **turned)
    ax.margins(y=0.1)
    return _describe(ax, f"{ylabel} by task, mean ± std over seeds", ylabel=ylabel, legend=True)


def reliability_diagram(curves, ax=None):
    """How often a classifier is right against how sure it is; below the diagonal it is too sure.

    curves: what `calibration.reliability` gives, (confidence, accuracy, rows), each (bins,); or {name: that}. A point's
    area grows with its bin's rows. Raises ValueError for other shapes and for numbers that are not finite.
    """
    named = curves if isinstance(curves, Mapping) else {"": curves}
    ax = axes_of(ax, 6.4, 3.8)
    ax.plot((0, 1), (0, 1), color="0.6", linestyle="--", linewidth=1.2, label="as right as sure")
    for i, (name, (sure, right, rows)) in enumerate(named.items()):
        sure, right, rows = map(_numbers, (sure, right, rows))
        if not sure.shape == right.shape == rows.shape or not np.isfinite([sure, right, rows]).all() or not rows.sum():
            raise ValueError(f"{name!r} needs confidence, accuracy, rows, equally long: {sure}, {right}, {rows}")
        label = f"calibration error {np.average(abs(right - sure), weights=rows):.3f}"
        ax.plot(sure, right, linewidth=1.4, color=_style(i)["color"])
        ax.scatter(sure, right, 20 + 160 * rows / rows.sum(), label=f"{name}: {label}" if name else label, **_style(i))
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return _describe(ax, "how often right by how sure", "confidence", "accuracy", legend=True)


def points_with_errors(x, means, stds, label: str, ax=None, *, xlabel="training examples", ylabel="accuracy"):
    """A line of means over sizes with one std up and down; call it again with `ax` to add a line.

    x, means, stds: (n,); a std of nan or None (one seed) draws no error bar. The x axis turns logarithmic when sizes
    span a factor of ten. Raises ValueError for unequal lengths, and for x or means not finite.
    """
    x, means, stds = _numbers(x), _numbers(means), _numbers(stds)
    if not x.shape == means.shape == stds.shape or x.size == 0 or not np.isfinite([x, means]).all():
        raise ValueError(f"{label!r} needs x, means, stds equally long, x and means finite: {x}, {means}, {stds}")
    x, means, stds = (values[np.argsort(x)] for values in (x, means, stds))
    ax = axes_of(ax, 7.0, 3.8)
    look = dict(markersize=5, linewidth=1.6, elinewidth=1.1, capsize=3)
    ax.errorbar(x, means, stds, label=label, **look, **_style(len(ax.containers)))
    ticks = np.unique(np.concatenate([line.lines[0].get_xdata() for line in ax.containers]))
    if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
        ax.set_xscale("log")
    ax.minorticks_off()
    if len(ticks) <= 10:
        ax.set_xticks(ticks, [f"{tick:,g}" if tick < 1e4 else f"{tick:,.0f}" for tick in ticks])
    return _describe(ax, f"{ylabel} by {xlabel}, mean ± std over seeds", xlabel, ylabel, legend=True)
