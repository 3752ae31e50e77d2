"""What the figures contain: lines, bars, labels, ticks; and the errors for data that cannot be drawn."""

import math
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ftlib.show import plots
from ftlib.show.plots import (
    attention_map,
    compare_tasks,
    confusion_matrix,
    embedding_map,
    heat_map,
    learning_curves,
    points_with_errors,
    reliability_diagram,
)

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def run(losses, every=2):
    history = []
    for step, loss in enumerate(losses, 1):
        history.append({"step": step, "loss": loss, "learning_rate": 1e-5})
        if step % every == 0:
            history.append({"step": step, "eval_loss": loss + 0.1, "eval_accuracy": 0.5})
    return SimpleNamespace(history=history)


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_legend_beside_the_data(ax):
    ax.figure.canvas.draw()
    legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.x0 >= frame.x1
    assert legend.x1 <= ax.figure.bbox.x1 + 1


# ---------------------------------------------------------------------------------------- learning curves


def test_learning_curve_of_one_run_shows_every_value():
    ax = learning_curves(run([3.0, 2.0, 4.0, 1.0]))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3.0, 2.0, 4.0, 1.0]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss")
    assert ax.get_legend() is None


def test_learning_curves_of_named_runs_and_keys():
    ax = learning_curves({"full": run([3, 2]), "LoRA": run([4, 3]).history}, keys=("loss", "eval_loss"))
    assert legend_of(ax) == ["full, loss", "full, eval_loss", "LoRA, loss", "LoRA, eval_loss"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    assert ax.lines[1].get_xdata().tolist() == [2]
    assert ax.get_ylabel() == "loss"
    assert_legend_beside_the_data(ax)


def test_a_single_key_may_be_a_string():
    ax = learning_curves({"full": run([3, 2, 1, 1])}, keys="eval_accuracy")
    assert (ax.get_ylabel(), legend_of(ax)) == ("accuracy", ["full"])


def test_smoothing_is_asked_for_and_said():
    for smooth, wanted in ((3, [3.0, 2.0, 1.0, 0.5]), (2, [3.0, 1.0, 0.5, 1.0])):
        ax = learning_curves(run([4.0, 2.0, 0.0, 1.0]), smooth=smooth)
        raw, mean = ax.lines
        assert raw.get_ydata().tolist() == [4.0, 2.0, 0.0, 1.0]
        assert mean.get_ydata().tolist() == wanted
        assert f"running mean of {smooth} records" in ax.get_title()


def test_a_diverged_run_is_named():
    ax = learning_curves({"hot": run([1.0, math.nan, math.inf, 1.0])})
    assert legend_of(ax) == ["hot (not finite from step 2)"]
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True, True, False]


def test_long_legend_leaves_room_for_the_curves():
    ax = learning_curves({"a very long name of a method with many words " * 2: run([1, 2]), "b": run([2, 3])})
    assert_legend_beside_the_data(ax)
    assert ax.get_window_extent().width > 0.5 * ax.figure.bbox.width


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([], {}, "it has no records"),
        (SimpleNamespace(history=[]), {}, "it has no records"),
        ({}, {}, "0 runs"),
        (
            {"full": run([1, 2])},
            {"keys": ("f1",)},
            "run 'full' has no 'f1' in its history; it has eval_accuracy",
        ),
        (run([1, 2]), {"smooth": 0}, "smooth=0"),
        (run([1, 2]), {"keys": ()}, r"keys=\(\)"),
    ],
)
def test_learning_curves_refuses(runs, options, message):
    with pytest.raises(ValueError, match=message):
        learning_curves(runs, **options)


# ---------------------------------------------------------------------------------------- confusion matrix


def test_confusion_matrix_shares():
    ax = confusion_matrix([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], ["ham", "spam"])
    assert [text.get_text() for text in ax.texts] == ["0.75", "0.25", "0.50", "0.50"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ham", "spam"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ham", "spam"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert ax.get_title() == "6 examples, 66.7% right\ncells: share of the true class"


def test_confusion_matrix_counts_and_a_class_that_never_occurs():
    ax = confusion_matrix([0, 0, 1], [0, 2, 1], ["a", "b", "c"], normalize=False)
    assert [text.get_text() for text in ax.texts] == ["1", "0", "1", "0", "1", "0"]
    assert np.ma.getmaskarray(ax.images[0].get_array())[2].all()


def test_numbers_in_cells_can_be_read():
    ax = confusion_matrix([0] * 4 + [1] * 4, [0, 0, 0, 0, 0, 1, 1, 1], ["a", "b"])
    assert [text.get_color() for text in ax.texts] == ["white", "black", "black", "white"]


def test_large_confusion_matrix_shows_ids_without_numbers():
    ids, names = np.arange(20), [f"class {i}" for i in range(20)]
    figure, ax = plt.subplots(layout="constrained")
    assert confusion_matrix(ids, ids, names, ax=ax) is ax
    assert len(figure.axes) == 2  # the matrix and its color bar
    assert len(ax.texts) == 0 and "class" not in ax.get_xticklabels()[1].get_text()
    assert confusion_matrix(ids, ids, names).get_title() == "20 examples, 100.0% right"


@pytest.mark.parametrize(
    ("labels", "predictions", "names", "message"),
    [
        ([0, 1], [0, 2], ["a", "b"], "predictions row 1 is 2: expected an id from 0 to 1"),
        ([0, -100], [0, 1], ["a", "b"], "labels row 1 is -100"),
        ([0, 1], [0], ["a", "b"], r"labels \(2,\) and predictions \(1,\)"),
        ([], [], ["a", "b"], "expected the same"),
        ([0], [0], [], "names must list"),
        ([0], [0], None, "names must list"),
    ],
)
def test_confusion_matrix_refuses(labels, predictions, names, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, predictions, names)


# ------------------------------------------------------------------------------------------- attention map


def test_attention_map_labels_rows_and_columns():
    tokens = ["[CLS]", "good", "$5$", "[SEP]"]
    weights = torch.eye(4, requires_grad=True)
    ax = attention_map(weights, tokens, title="layer 1")
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == tokens
    assert [label.get_text() for label in ax.get_yticklabels()] == tokens
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {90}
    assert np.array_equal(ax.images[0].get_array(), np.eye(4))
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (
        "layer 1",
        "key (attended to)",
        "query (attending)",
    )


@pytest.mark.parametrize(
    ("weights", "tokens", "message"),
    [
        (np.ones((2, 2, 2)), ["a", "b"], r"shape \(2, 2, 2\): expected finite \(queries, keys\)"),
        (np.ones((2, 2)), ["a", "b", "c"], r"shape \(2, 2\).* as many tokens, got 3"),
        (np.ones((3, 2)), ["a", "b", "c"], r"shape \(3, 2\).* as many tokens, got 3"),
        (np.ones((2, 2)), "ab", "list of as many tokens, got 2"),
        ([[0.5, math.nan]], ["a", "b"], "expected finite"),
    ],
)
def test_attention_map_refuses(weights, tokens, message):
    with pytest.raises(ValueError, match=message):
        attention_map(weights, tokens)


# ------------------------------------------------------------------------------------------- embedding map


def test_pca_twin():
    from sklearn.decomposition import PCA

    features = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    ax = embedding_map(features, np.repeat([0, 1], 20), ["ham", "spam"])
    twin = PCA(2).fit(features)
    points = np.concatenate([dots.get_offsets() for dots in ax.collections])
    np.testing.assert_allclose(np.abs(points), np.abs(twin.transform(features)), atol=1e-8)
    assert ax.get_xlabel() == f"component 1 ({twin.explained_variance_ratio_[0]:.0%} of the variance)"
    assert legend_of(ax) == ["ham", "spam"]
    assert_legend_beside_the_data(ax)


def test_tsne_keeps_groups_apart_and_repeats():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12)
    features = rng.normal(size=(24, 5)) + 30 * labels[:, None]
    first, second = (embedding_map(features, labels, ["a", "b"], method="tsne", seed=3) for _ in range(2))
    a, b = (dots.get_offsets() for dots in first.collections)
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > max(a.std(), b.std())
    assert np.array_equal(a, second.collections[0].get_offsets())
    assert first.get_xlabel() == "t-SNE 1 (no unit)"


def test_many_labels_leave_the_rare_ones_grey():
    labels = [i for i in range(10) for _ in range(10 - i)]
    features = np.random.default_rng(0).normal(size=(len(labels), 3))
    ax = embedding_map(features, labels, [f"label {i}" for i in range(10)], top=3)
    assert legend_of(ax) == ["7 other labels", "label 0", "label 1", "label 2"]
    assert len(ax.collections[0].get_offsets()) == 7 * 8 // 2


@pytest.mark.parametrize(
    ("features", "labels", "method", "message"),
    [
        (np.ones(5), [0] * 5, "pca", r"features \(5,\)"),
        (np.ones((2, 3)), [0, 1], "pca", "or more"),
        (np.ones((3, 2)), [0, 1], "pca", ", 2 labels"),
        (np.ones((3, 2)), [0, 1, 2], "pca", "labels row 2 is 2"),
        ([[0, 1], [1, math.nan], [1, 1]], [0, 1, 1], "pca", "features row 1 is not finite"),
        (np.ones((3, 2)), [0, 1, 1], "umap", "unknown method 'umap': expected 'pca' or 'tsne'"),
    ],
)
def test_embedding_map_refuses(features, labels, method, message):
    with pytest.raises(ValueError, match=message):
        embedding_map(features, labels, ["a", "b"], method=method)


# --------------------------------------------------------------------------------- methods and sizes compared


def test_compare_tasks_draws_a_bar_for_each_cell():
    table = {"alone": {"sst2": (0.8, 0.01), "cola": (0.7, None)}, "together": {"sst2": (0.85, math.nan)}}
    ax = compare_tasks(table, ylabel="test accuracy")
    assert [bar.get_height() for bar in ax.patches] == [0.8, 0.7, 0.85]
    assert [text.get_text() for text in ax.texts] == ["0.80", "0.70", "0.85"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sst2", "cola"]
    assert legend_of(ax) == ["alone", "together"]
    assert ax.get_ylabel() == "test accuracy" and ax.get_ylim()[0] == 0
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([-0.2, 0.8, 0.2])
    assert_legend_beside_the_data(ax)


def test_error_lines_are_one_std_long_and_absent_for_one_seed():
    ax = compare_tasks({"alone": {"a": (0.8, 0.05), "b": (0.5, math.nan)}})
    with_std, without = ax.containers[-1].errorbar.lines[2][0].get_segments()
    assert with_std[:, 1].tolist() == pytest.approx([0.75, 0.85])
    assert len(without) == 0 or np.isnan(without[:, 1]).all()


@pytest.mark.parametrize(
    "table", [{}, {"a": {}}, {"a": {"t": 0.5}}, {"a": {"t": (None, 0.1)}}, {"a": {"t": (1, 2, 3)}}]
)
def test_compare_tasks_refuses(table):
    with pytest.raises(ValueError, match=r"nothing to compare|expected \(mean, std\)"):
        compare_tasks(table)


def test_points_with_errors_adds_lines_and_turns_logarithmic():
    ax = points_with_errors([500, 100, 200], [0.7, 0.5, 0.6], [0.01, 0.02, None], "probe")
    assert ax.get_xscale() == "linear"
    assert points_with_errors([100, 2000], [0.4, 0.8], [0.1, 0.1], "fine-tuning", ax=ax) is ax
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["100", "200", "500", "2,000"]
    assert legend_of(ax) == ["probe", "fine-tuning"]
    first, second = (container.lines[0] for container in ax.containers)
    assert first.get_ydata().tolist() == [0.5, 0.6, 0.7]
    assert first.get_color() != second.get_color() and first.get_marker() != second.get_marker()
    assert_legend_beside_the_data(ax)


@pytest.mark.parametrize("values", [([1], [1, 2], [0, 0]), ([], [], []), ([1], [math.nan], [0])])
def test_points_with_errors_refuses(values):
    with pytest.raises(ValueError, match=r"equally long, x and means finite"):
        points_with_errors(*values, "probe")


def test_heat_map_writes_numbers_and_spreads_around_zero():
    values = np.array([[np.nan, 0.02], [-0.05, np.nan]])
    ax = heat_map(values, ["a", "b"], ["a", "b"], spreads=[[0.0, 0.01], [math.nan, 0.0]], label="gain")
    assert [text.get_text() for text in ax.texts] == ["+0.020\n± 0.010", "-0.050"]
    assert [text.get_position() for text in ax.texts] == [(1, 0), (0, 1)]
    low, high = ax.images[0].get_clim()
    assert low == -high == -0.05  # zero is in the middle of the colors
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "spreads"),
    [([[1.0, 2.0]], None), ([1.0, 2.0], None), ([[1.0], [2.0]], [[1.0, 2.0]]), ([[math.nan], [math.inf]], None)],
)
def test_heat_map_refuses(values, spreads):
    with pytest.raises(ValueError, match=r"expected \(2, 1\), with a finite number"):
        heat_map(values, ["a", "b"], ["c"], spreads=spreads)


# ------------------------------------------------------------------------------------------- reliability


def test_reliability_diagram_shows_bins_diagonal_and_error():
    sure = ([0.55, 0.9], [0.5, 0.6], [10, 40])
    fair = ([0.6], [0.6], [40])
    ax = reliability_diagram({"before": sure, "after": fair})
    diagonal, *curves = [line.get_xydata().tolist() for line in ax.lines]
    assert diagonal == [[0, 0], [1, 1]] and curves == [[[0.55, 0.5], [0.9, 0.6]], [[0.6, 0.6]]]
    small, large = ax.collections[0].get_sizes()
    assert large > small and ax.collections[0].get_offsets().tolist() == curves[0]
    # 10/50 * 0.05 + 40/50 * 0.3
    before, after = "before: calibration error 0.250", "after: calibration error 0.000"
    assert [label.replace("\n", " ") for label in legend_of(ax)] == ["as right as sure", before, after]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")
    assert_legend_beside_the_data(ax)
    assert "calibration error 0.250" in " ".join(legend_of(reliability_diagram(sure))).replace("\n", " ")


@pytest.mark.parametrize("curve", [([0.5], [0.5, 0.6], [1]), ([0.5], [math.nan], [1]), ([0.5], [0.5], [0])])
def test_reliability_diagram_refuses_what_it_cannot_draw(curve):
    with pytest.raises(ValueError, match="'x' needs confidence, accuracy, rows"):
        reliability_diagram({"x": curve})


def test_every_function_draws_into_a_given_axes():
    _, axes = plt.subplots(2, 3, layout="constrained")
    a, b, c, d, e, f = axes.flat
    assert learning_curves(run([1, 2]), ax=a) is a
    assert confusion_matrix([0, 1], [0, 1], ["a", "b"], ax=b) is b
    assert attention_map(np.eye(2), ["a", "b"], ax=c) is c
    assert embedding_map(np.eye(3), [0, 1, 1], ["a", "b"], ax=d) is d
    assert compare_tasks({"m": {"t": (1, 0)}}, ax=e) is e
    assert points_with_errors([1], [1], [0], "m", ax=f) is f
    assert plt.get_fignums() == [1]


def test_figures_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 77, 3000)
    ax = embedding_map(rng.normal(size=(3000, 8)) + labels[:, None], labels, [f"name_{i}" for i in range(77)])
    ax.figure.savefig(tmp_path / "map.png")
    assert 2_000 < (tmp_path / "map.png").stat().st_size < 60_000
    assert len(set(plots.PALETTE)) == 7
