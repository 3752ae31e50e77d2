"""Figures of the series: learning curves, confusions, attention, embeddings, methods side by side.

Every function draws into `ax`, or into a new figure of a size that reads well in a notebook when `ax` is None, and
returns the Matplotlib Axes. Colours are Okabe and Ito's palette, which colour-blind readers can tell apart, and
markers or line styles differ as well. Legends stand beside the axes, never on the data; figures of your own should
be made with `layout="constrained"` so that there is room for them. Nothing is smoothed unless you ask for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

# Okabe & Ito, "Color Universal Design" (2008), without yellow, which is too pale for thin lines on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"
MAX_CELLS = 12  # classes up to which a confusion matrix shows numbers and names


def _axes(ax, width: float, height: float):
    """The given Axes or a new figure's; width and height in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(width, height), dpi=100, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend(ax, title: str | None = None) -> None:
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize=9, title=title
    )


def learning_curves(runs, ax=None, keys: Sequence[str] = ("loss",), *, smooth: int = 1):
    """Values of a run's history against the optimizer step; one colour a run, one line style a key.

    `runs` is a Run (anything with `.history`), a list of history records (dicts with "step" and values), or a dict
    {name: either}. Keys that begin with "eval_" are drawn with markers. `smooth` > 1 averages each training value
    with the `smooth` - 1 before it, says so in the legend, and keeps the raw values as a pale line. A value that
    is nan or infinite leaves a gap, and the legend names the first such step.
    Raises ValueError for an empty history and for a key that no record of a run has.

    >>> learning_curves([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]).get_xlabel()
    'optimizer step'
    """
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if not keys or smooth < 1:
        raise ValueError(
            f"learning_curves needs a key or more and smooth >= 1, got keys={keys}, smooth={smooth}"
        )
    named = runs if isinstance(runs, Mapping) else {"": runs}
    if not named:
        raise ValueError("learning_curves got an empty dict of runs")
    lines = []
    for i, (name, run) in enumerate(named.items()):
        history = getattr(run, "history", run)
        if not isinstance(history, Sequence) or len(history) == 0:
            raise ValueError(f"run {name!r} has no history records to draw: {history!r}")
        for j, key in enumerate(keys):
            points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
            if not points:
                known = sorted({k for record in history for k in record} - {"step"})
                raise ValueError(f"run {name!r} has no {key!r} in its history; it has {', '.join(known)}")
            lines.append((i, j, name, key, np.array(points, dtype=float)))
    ax = _axes(ax, 7.5 if len(lines) > 1 else 6.0, 3.6)
    for i, j, name, key, points in lines:
        steps, values = points.T
        color = PALETTE[(i if len(named) > 1 else j) % len(PALETTE)]
        style = ("-", "--", ":", "-.")[j % 4]
        label = ", ".join(part for part in (name, key if len(keys) > 1 else "") if part) or key
        broken = ~np.isfinite(values)
        if broken.any():
            label += f" (not finite from step {steps[broken][0]:g})"
        values = np.where(broken, np.nan, values)
        width = 1 if key.startswith("eval_") else min(smooth, len(values))
        if width > 1:
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = np.array([values[max(0, k - width + 1) : k + 1].mean() for k in range(len(values))])
            label += f" (mean of {width} records)"
        marker = MARKERS[i % len(MARKERS)] if key.startswith("eval_") or len(values) == 1 else None
        ax.plot(steps, values, style, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
    what = {key.removeprefix("eval_") for key in keys}
    ax.set(
        xlabel="optimizer step", ylabel=" / ".join(sorted(what)), title=f"{' and '.join(keys)} while training"
    )
    if len(lines) > 1 or lines[0][2] or ax.lines[-1].get_label() != keys[0]:
        _legend(ax)
    return ax


def _class_pairs(labels, predictions, names: Sequence[str]) -> np.ndarray:
    """Counts (true, predicted) of class ids, checked."""
    if names is None or isinstance(names, str) or len(names) == 0:
        raise ValueError(f"names must list the class names in the order of their ids, got {names!r}")
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape} must be two equal lists of ids"
        )
    for what, ids in (("labels", labels), ("predictions", predictions)):
        bad = np.flatnonzero((ids < 0) | (ids >= len(names)) | (ids != np.floor(ids)))
        if len(bad):
            raise ValueError(
                f"{what} row {bad[0]} is {ids[bad[0]]}: expected an id from 0 to {len(names) - 1}"
            )
    counts = np.zeros((len(names), len(names)), dtype=np.int64)  # (true, predicted)
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    return counts


def most_confused(
    labels, predictions, names: Sequence[str], top: int = 10
) -> list[tuple[str, str, int, float]]:
    """The commonest errors as (true name, predicted name, count, share of the true class), most frequent first.

    >>> most_confused([0, 0, 1], [0, 1, 1], ["ham", "spam"])
    [('ham', 'spam', 1, 0.5)]
    """
    counts = _class_pairs(labels, predictions, names)
    wrong = counts * (1 - np.eye(len(names), dtype=np.int64))
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:top]]
    return [
        (names[t], names[p], int(wrong[t, p]), float(wrong[t, p] / counts[t].sum()))
        for t, p in order
        if wrong[t, p]
    ]


def confusion_matrix(labels, predictions, names: Sequence[str], ax=None, normalize: bool = True):
    """True classes in rows, predicted in columns; shares of each row, or counts when `normalize` is False.

    labels, predictions: class ids (n,). A class that never occurs in `labels` leaves a blank row. Above 12 classes
    the cells carry no numbers and the axes show ids; with `ax` None a second panel then lists the commonest errors
    by name (`most_confused`). Returns the Axes of the matrix. Raises ValueError for ids outside `names`.

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], ["ham", "spam"]).get_ylabel()
    'true class'
    """
    counts = _class_pairs(labels, predictions, names)
    total, small = counts.sum(axis=1, keepdims=True), len(names) <= MAX_CELLS
    if ax is None and not small:
        import matplotlib.pyplot as plt

        figure, (ax, side) = plt.subplots(
            1, 2, figsize=(9.5, 4.4), dpi=100, layout="constrained", width_ratios=(1, 0.75)
        )
        _error_bars_of_pairs(side, most_confused(labels, predictions, names, 12))
    side_length = max(3.2, 1.6 + 0.55 * len(names)) if small else 5.0
    ax = _axes(ax, side_length + 1.2, side_length)
    ax.spines[["top", "right"]].set_visible(True)
    shown = np.where(total > 0, counts / np.maximum(total, 1) if normalize else counts, np.nan)
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=1 if normalize else None, interpolation="nearest")
    unit = "share of the true class" if normalize else "examples"
    if small:
        long = max(map(len, map(str, names))) > 6
        ax.set_xticks(range(len(names)), names, rotation=45 if long else 0, ha="right" if long else "center")
        ax.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(np.isfinite(shown)):
            value = shown[row, column]
            ax.text(
                column, row, f"{value:.2f}" if normalize else f"{value:.0f}", ha="center", va="center", fontsize=9,
                color="white" if value > 0.55 * np.nanmax(shown) else "black",
            )  # fmt: skip
    else:
        ax.figure.colorbar(image, ax=ax, label=unit, shrink=0.8)
    right = counts.trace() / counts.sum()
    ax.set(
        xlabel="predicted class" + ("" if small else " (id)"),
        ylabel="true class" + ("" if small else " (id)"),
    )
    ax.set_title(
        f"{counts.sum():,} examples, {right:.1%} right" + (f"\ncells: {unit}" if small else ""), fontsize=11
    )
    return ax


def _error_bars_of_pairs(ax, pairs) -> None:
    """Horizontal bars of `most_confused` pairs, names inside the axis labels."""
    ax.barh(range(len(pairs)), [count for _, _, count, _ in pairs], color=PALETTE[0])
    ax.set_yticks(range(len(pairs)), [f"{true} → {guess}" for true, guess, _, _ in pairs], fontsize=8)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="examples", title="commonest errors, true → predicted")


def attention_map(
    weights, tokens: Sequence[str], ax=None, *, query_tokens: Sequence[str] | None = None, title=None
):
    """One head's attention as a picture: a row a query, a column a key, darker where more weight goes.

    weights: (queries, keys), from 0 to 1; tokens: one a key; query_tokens: one a query, when the queries are not the
    keys. Raises ValueError for weights that are not 2-D or not finite and for a wrong number of tokens.

    >>> attention_map([[1.0, 0.0], [0.5, 0.5]], ["a", "film"]).get_xlabel()
    'key (attended to)'
    """
    weights = np.asarray(
        weights.detach().float().cpu() if hasattr(weights, "detach") else weights, dtype=float
    )
    if weights.ndim != 2 or weights.size == 0:
        raise ValueError(
            f"weights have shape {weights.shape}: expected (queries, keys), so choose a layer and a head"
        )
    if not np.isfinite(weights).all():
        row, column = np.argwhere(~np.isfinite(weights))[0]
        raise ValueError(f"weights row {row}, column {column} is {weights[row, column]}")
    queries = tokens if query_tokens is None else query_tokens
    for what, given, wanted in (
        ("tokens", tokens, weights.shape[1]),
        ("query tokens", queries, weights.shape[0]),
    ):
        if isinstance(given, str) or len(given) != wanted:
            raise ValueError(f"{len(given)} {what} for weights of shape {weights.shape}: expected {wanted}")
    longest = max(weights.shape)
    size = min(max(3.2, 1.4 + 0.27 * longest), 8.5)
    ax = _axes(ax, size + 0.9, size)
    ax.spines[["top", "right"]].set_visible(True)
    image = ax.imshow(weights, cmap="Blues", vmin=0, interpolation="nearest", aspect="auto")
    small = 9 if longest <= 24 else 6.5
    ax.set_xticks(range(len(tokens)), tokens, rotation=90 if max(map(len, tokens)) > 2 else 0, fontsize=small)
    ax.set_yticks(range(len(queries)), queries, fontsize=small)
    ax.set(xlabel="key (attended to)", ylabel="query (attending)", title=title or "attention weights")
    ax.figure.colorbar(image, ax=ax, label="weight (each row adds up to 1)", shrink=0.8)
    return ax


def embedding_map(
    features, labels, names: Sequence[str], method: str = "pca", ax=None, *, seed: int = 0, top: int = 7
):
    """Vectors in two dimensions, a colour and a marker per label.

    features: (n, dimensions) floats, n of at least 3; labels: class ids (n,). `method` is "pca" (the two directions
    of most variance; the axes say how much they hold) or "tsne" (keeps neighbours together; distances between
    groups and the axes mean nothing). Beyond `top` labels the most frequent are coloured and the rest are grey.
    Raises ValueError for another method, wrong shapes, values that are not finite, ids outside `names`.

    >>> embedding_map([[0, 1], [1, 0], [4, 4]], [0, 0, 1], ["ham", "spam"]).get_title()
    '3 vectors of 2 numbers, PCA'
    """
    features = np.asarray(features.detach().cpu() if hasattr(features, "detach") else features, dtype=float)
    if features.ndim != 2 or len(features) < 3 or features.shape[1] < 2:
        raise ValueError(f"features have shape {features.shape}: expected (n, dimensions), at least (3, 2)")
    if not np.isfinite(features).all():
        raise ValueError(f"features row {np.argwhere(~np.isfinite(features))[0][0]} is not finite")
    if len(labels) != len(features):
        raise ValueError(f"{len(labels)} labels for {len(features)} rows of features")
    labels = np.asarray(labels)
    _class_pairs(labels, labels, names)
    centred = features - features.mean(axis=0)
    if method == "pca":
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        points = left[:, :2] * singular[:2]
        share = singular**2 / max((singular**2).sum(), 1e-30)
        axes = [f"component {i + 1} ({share[i]:.0%} of the variance)" for i in (0, 1)]
    elif method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(centred)
        axes = ["t-SNE 1 (no unit)", "t-SNE 2 (no unit)"]
    else:
        raise ValueError(f"unknown method {method!r}: expected 'pca' or 'tsne'")
    ax = _axes(ax, 7.0, 4.4)
    dots = dict(s=14 if len(points) < 1000 else 7, alpha=0.75, linewidths=0)
    shown = [label for label, _ in Counter(labels.tolist()).most_common(top)]
    rest = ~np.isin(labels, shown)
    if rest.any():
        ax.scatter(*points[rest].T, color="0.8", label=f"{len(set(labels[rest].tolist()))} others", **dots)
    for i, label in enumerate(sorted(shown)):
        style = dict(color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)])
        ax.scatter(*points[labels == label].T, label=str(names[int(label)]), **style, **dots)
    kind = "PCA" if method == "pca" else f"t-SNE (perplexity {perplexity:g}, seed {seed})"
    title = f"{len(features):,} vectors of {features.shape[1]} numbers, {kind}"
    ax.set(xlabel=axes[0], ylabel=axes[1], title=title)
    _legend(ax)
    return ax


def compare_tasks(
    table: Mapping[str, Mapping[str, tuple[float, float]]], ax=None, *, ylabel: str = "accuracy"
):
    """Grouped bars: a group a task, a colour a method; thin lines are one standard deviation over seeds.

    table: {method: {task: (mean, std)}}; a std of nan or None (one seed) draws no line, a task that a method lacks
    leaves a gap. Bars begin at 0. Raises ValueError for an empty table and for a cell that is not (mean, std).

    >>> compare_tasks({"alone": {"sst2": (0.8, 0.01)}, "together": {"sst2": (0.82, 0.02)}}).get_ylabel()
    'accuracy'
    """
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    if not tasks:
        raise ValueError(f"nothing to compare: {table!r}")
    for method, row in table.items():
        for task, cell in row.items():
            if (
                not isinstance(cell, Sequence)
                or len(cell) != 2
                or cell[0] is None
                or not np.isfinite(cell[0])
            ):
                raise ValueError(f"table[{method!r}][{task!r}] is {cell!r}: expected (mean, std)")
    width = 0.8 / len(table)
    ax = _axes(ax, min(3.5 + 0.45 * len(tasks) * len(table), 9.5), 3.6)
    for i, (method, row) in enumerate(table.items()):
        here = [j for j, task in enumerate(tasks) if task in row]
        x = [j + (i - (len(table) - 1) / 2) * width for j in here]
        means = [row[tasks[j]][0] for j in here]
        stds = [row[tasks[j]][1] if row[tasks[j]][1] is not None else np.nan for j in here]
        ax.bar(
            x, means, 0.92 * width, label=method, color=PALETTE[i % len(PALETTE)],
            yerr=np.nan_to_num(stds), error_kw=dict(elinewidth=1.1, capsize=2.5),
        )  # fmt: skip
        if len(tasks) * len(table) <= 16:
            for left, mean, std in zip(x, means, np.nan_to_num(stds), strict=True):
                ax.annotate(
                    f"{mean:.2f}",
                    (left, mean + std),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    long = max(map(len, tasks)) > 12
    ax.set_xticks(range(len(tasks)), tasks, rotation=30 if long else 0, ha="right" if long else "center")
    ax.set(ylabel=ylabel, title=f"{ylabel} by task, mean ± std over seeds")
    ax.margins(y=0.1)
    _legend(ax)
    return ax


def points_with_errors(x, means, stds, label: str, ax=None, *, xlabel="training examples", ylabel="accuracy"):
    """A line of means over sizes with one standard deviation up and down; call it again with `ax` to add a line.

    x: (n,) sizes; means, stds: (n,); a std of nan or None (one seed) draws no error bar. The x axis turns
    logarithmic when the sizes span a factor of ten or more. Raises ValueError for lists of unequal length.

    >>> points_with_errors([100, 200], [0.7, 0.8], [0.02, 0.01], "probe").get_xlabel()
    'training examples'
    """
    if not len(x) == len(means) == len(stds) or len(x) == 0:
        raise ValueError(f"x, means and stds must be equally long: {len(x)}, {len(means)}, {len(stds)}")
    x, means, stds = (np.array(values, dtype=float) for values in (x, means, stds))
    if not (np.isfinite(x).all() and np.isfinite(means).all()):
        raise ValueError(f"x and means of {label!r} must be finite: {x.tolist()}, {means.tolist()}")
    order = np.argsort(x)
    ax = _axes(ax, 7.0, 3.8)
    i = len(ax.containers)
    ax.errorbar(
        x[order], means[order], np.nan_to_num(stds[order]), label=label, color=PALETTE[i % len(PALETTE)],
        marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.6, elinewidth=1.1, capsize=3,
    )  # fmt: skip
    ticks = np.unique(np.concatenate([line.lines[0].get_xdata() for line in ax.containers]))
    if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
        ax.set_xscale("log")
    ax.minorticks_off()
    if len(ticks) <= 10:
        ax.set_xticks(ticks, [f"{tick:,g}" if tick < 1e4 else f"{tick:,.0f}" for tick in ticks])
    ax.set(xlabel=xlabel, ylabel=ylabel, title=f"{ylabel} by {xlabel}, mean ± std over seeds")
    _legend(ax)
    return ax
