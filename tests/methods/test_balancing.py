"""Gradients joined and losses weighted as in the papers: by hand, by other people's code, by optimality conditions."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ftlib.methods.balancing import GRADIENTS, WEIGHTINGS, TaskWeights, Weighting, cagrad, cosines, mgda, pcgrad


def make_jacobian(tasks=4, parameters=30, seed=0, kind="random"):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = draw(tasks, parameters)
    if kind == "conflict":
        rows[1:] -= 0.8 * rows[0]
    elif kind == "alike":
        rows = draw(1, parameters) + 0.05 * rows
    elif kind == "dependent":
        rows = draw(tasks, 2) @ draw(2, parameters)
    return rows * torch.logspace(-1, 1, tasks, dtype=torch.float64)[:, None]


KINDS = ["random", "conflict", "alike", "dependent"]
JACOBIANS = [(kind, tasks) for kind in KINDS for tasks in (2, 3, 5, 12)]

# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0], [0, 1]], [1, 1]),  # at right angles: the sum
        ([[1, 0], [1, 1]], [2, 1]),
        ([[1, 0], [-1, 1]], [0.5, 1.5]),  # (1/2, 1/2) + (0, 1)
        ([[2, 0], [-1, 0]], [0, 0]),  # each loses all it has
        ([[2, 0], [-1, 0], [0, 5]], [0, 5]),
        ([[0, 0], [3, 4]], [3, 4]),  # a task without a gradient changes nothing
        ([[3, 4]], [3, 4]),
    ],
)
def test_pcgrad_by_hand(rows, expected):
    assert_close(pcgrad(torch.tensor(rows, dtype=torch.float32)), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[2, 0], [0, 1]], [0.4, 0.8]),  # weights 1 : 4, the squared lengths the other way round
        ([[1, 0], [1, 1]], [1, 0]),  # the shorter row, where the other one goes along with it
        ([[1, 1], [-1, 1]], [0, 1]),
        ([[1, 0], [-2, 0]], [0, 0]),  # no direction helps both
        ([[1, 0], [1, 0]], [1, 0]),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1 / 3, 1 / 3, 1 / 3]),
        ([[3, 4]], [3, 4]),
    ],
)
def test_mgda_by_hand(rows, expected):
    assert_close(mgda(torch.tensor(rows, dtype=torch.float32)), torch.tensor(expected, dtype=torch.float32))


def test_cagrad_by_hand():
    # mean (1, 1/2), the second task is worst off; all of the allowed c * |mean| goes along its row
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert_close(cagrad(rows, c=0.2), torch.tensor([1.0, 0.5 + 0.2 * math.sqrt(1.25)]))
    assert_close(cagrad(rows, c=0.0), torch.tensor([1.0, 0.5]))
    # opposite rows, mean -1: towards the first, which loses
    assert_close(cagrad(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), c=0.5), torch.tensor([-0.5, 0.0]))
    # nothing helps the first two, and the mean (1/6, 1/3) harms the second; (0, 1/3) harms none, and is near enough
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    found = cagrad(rows, c=0.6)
    assert found[0].abs() < 1e-5 and (rows @ found > -1e-5).all() and found[1] > 0.1
    # a single task moves along its own gradient, as far as it may
    assert_close(cagrad(torch.tensor([[3.0, 4.0]]), c=0.5), torch.tensor([4.5, 6.0]))


def test_cosines_by_hand():
    found = cosines(torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, -2.0], [0.0, 0.0]]))
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    assert_close(found[:3, :3], expected)
    assert found[3].isnan().all() and found[:, 3].isnan().all()


# ------------------------------------------------------------------------------------------- what they promise


@pytest.mark.parametrize(("kind", "tasks"), JACOBIANS)
def test_mgda_is_the_shortest_vector_and_helps_every_task(kind, tasks):
    rows = make_jacobian(tasks, kind=kind)
    found = mgda(rows)
    square = found @ found
    # the condition of optimality (Désidéri 2012): every row goes along with it at least as far as it is long
    assert (rows @ found >= square - 1e-8 * rows.norm() ** 2).all()


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 3.0])
@pytest.mark.parametrize(("kind", "tasks"), JACOBIANS)
def test_cagrad_does_most_for_the_task_it_does_least_for(kind, tasks, c):
    rows = make_jacobian(tasks, kind=kind)
    mean, found = rows.mean(0), cagrad(rows, c)
    radius = c * mean.norm()
    assert (found - mean).norm() <= radius * (1 + 1e-6) + 1e-12
    if c < 1:
        assert found @ mean > 0  # the mean loss falls
    # the dual gives an upper bound of what any direction can do: no gap, no better direction (paper, equation 4)
    worst = (rows @ found).min()
    push = (found - mean) / max(radius, 1e-300)  # along the weighted mean of the rows
    weights = torch.linalg.lstsq(rows.T, push).solution
    if c > 0 and kind != "dependent":
        weights = weights / weights.sum()
        bound = weights @ rows @ mean + radius * (weights @ rows).norm()
        assert (weights > -1e-5).all() and worst == pytest.approx(float(bound), abs=1e-6 * float(rows.norm() ** 2))


def test_cagrad_against_a_general_solver():
    """The paper's problem as it stands, max over d and t of t with <row i, d> >= t and |d - mean| <= c |mean|."""
    optimize = pytest.importorskip("scipy.optimize", reason="the solver; comes with scikit-learn")
    for seed in range(4):
        rows = make_jacobian(3, 5, seed, "conflict").numpy()
        mean = rows.mean(0)
        constraints = [
            {"type": "ineq", "fun": lambda x, rows=rows: rows @ x[:-1] - x[-1]},
            {"type": "ineq", "fun": lambda x, m=mean: 0.25 * (m @ m) - ((x[:-1] - m) ** 2).sum()},
        ]
        start = np.append(mean, (rows @ mean).min())
        options = dict(ftol=1e-14, maxiter=1000)
        solved = optimize.minimize(lambda x: -x[-1], start, constraints=constraints, options=options)
        assert solved.success
        assert_close(cagrad(torch.from_numpy(rows), 0.5), torch.from_numpy(solved.x[:-1]), atol=1e-5, rtol=1e-5)


def test_pcgrad_by_the_papers_algorithm():
    """Projections of whole vectors one after the other, in the same random order."""
    for kind, tasks in JACOBIANS:
        rows = make_jacobian(tasks, kind=kind)
        generator, expected = torch.Generator().manual_seed(3), torch.zeros(30, dtype=torch.float64)
        for i in range(tasks):
            rest = rows[i].clone()
            for j in torch.randperm(tasks, generator=generator).tolist():
                if j != i and rest @ rows[j] < 0:
                    rest -= (rest @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
            expected += rest
        found = pcgrad(rows, torch.Generator().manual_seed(3))
        assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_of_two_tasks_harms_neither(seed):
    rows = make_jacobian(2, seed=seed, kind="conflict")
    assert rows[0] @ rows[1] < 0
    assert (rows @ pcgrad(rows) >= -1e-12).all()
    assert (rows @ rows.sum(0) < 0).any() or seed  # the plain sum harms one, at least once


def test_pcgrad_is_the_sum_where_nothing_conflicts():
    rows = make_jacobian(6, kind="alike")
    assert (rows @ rows.T > 0).all()
    assert_close(pcgrad(rows), rows.sum(0))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_keep_scale_type_and_global_state(name):
    combine = GRADIENTS[name]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        rows = make_jacobian(3, kind="conflict").to(dtype)
        torch.manual_seed(0)
        found = combine(rows)
        assert found.dtype == dtype and found.shape == (30,)
        torch.manual_seed(0)
        assert_close(combine(rows * 8), found * 8, rtol=tolerance, atol=tolerance)
    assert_close(combine(rows[:1]) / combine(rows[:1]).norm(), rows[0] / rows[0].norm())
    assert combine(torch.zeros(3, 5)).tolist() == [0.0] * 5
    wide = torch.randn(2, 3_000_000)  # more columns than are multiplied at a time
    assert combine(wide).shape == (3_000_000,)
    if name != "pcgrad":
        rows = make_jacobian(5, kind="conflict")
        assert_close(combine(rows[[3, 1, 4, 0, 2]]), combine(rows), atol=1e-8, rtol=1e-6)


def test_numbers_that_are_not_finite_come_to_an_end():
    for combine in GRADIENTS.values():
        with np.errstate(invalid="ignore"):
            assert not combine(torch.tensor([[1.0, math.nan], [1.0, 2.0]])).isfinite().all()
            assert not combine(torch.tensor([[math.inf, 1.0], [1.0, 2.0]])).isfinite().all()


@pytest.mark.parametrize("combine", [*GRADIENTS.values(), cosines])
@pytest.mark.parametrize(
    ("jacobian", "message"),
    [
        (torch.ones(3), r"torch.float32 \(3,\); pass a float tensor \(tasks, parameters\)"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.ones(2, 3, dtype=torch.int64), r"torch.int64 \(2, 3\)"),
        ([[1.0, 2.0]], "the jacobian is <class 'list'>"),
        (torch.ones(0, 3), r"torch.float32 \(0, 3\); pass a float tensor \(tasks, parameters\), at least a row"),
    ],
)
def test_what_is_no_jacobian(combine, jacobian, message):
    with pytest.raises(ValueError, match=message):
        combine(jacobian)


@pytest.mark.parametrize("c", [-0.1, math.nan, math.inf])
def test_cagrad_checks_its_radius(c):
    with pytest.raises(ValueError, match=r"c=.*need a number of at least 0"):
        cagrad(torch.ones(2, 3), c)


# ---------------------------------------------------------------------------------------------------- TorchJD


def torchjd(*parts):
    return pytest.importorskip("torchjd." + ".".join(parts), reason="compared with, an extra: pip install torchjd")


@pytest.mark.parametrize(("kind", "tasks"), JACOBIANS)
def test_torchjd_gives_the_same_pcgrad(kind, tasks):
    theirs = torchjd("aggregation")
    rows = make_jacobian(tasks, kind=kind)
    torch.manual_seed(5)
    expected = theirs.PCGrad()(rows)
    torch.manual_seed(5)
    assert_close(pcgrad(rows) / rows.norm(), expected / rows.norm(), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("kind", "tasks"), JACOBIANS)
def test_torchjd_gives_the_same_mgda(kind, tasks):
    theirs = torchjd("aggregation")
    rows = make_jacobian(tasks, kind=kind)
    expected = theirs.MGDA(epsilon=1e-12, max_iters=2000)(rows)  # Frank-Wolfe: the nearer, the longer one waits
    found, scale = mgda(rows), rows.norm()
    assert found.norm() <= expected.norm() + 1e-8 * scale
    if tasks <= 3:
        assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "tasks"), JACOBIANS)
def test_torchjd_gives_the_same_for_cagrad(kind, tasks):
    theirs = torchjd("aggregation")
    pytest.importorskip("cvxpy", reason="TorchJD solves CAGrad's inner problem with it: pip install 'torchjd[cagrad]'")
    rows = make_jacobian(tasks, kind=kind)
    expected = theirs.CAGrad(c=0.4, norm_eps=1e-10)(rows)
    found, scale = cagrad(rows, c=0.4), rows.norm()
    gain = (rows @ found).min() - (rows @ expected).min()
    assert gain >= -1e-8 * scale**2  # no worse for the worst-off task than what a cone solver finds
    assert_close(found / scale, expected / scale, atol=1e-4, rtol=1e-4)


def test_torchjd_weighs_the_same():
    theirs = torchjd("scalarization")
    losses = torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    uw, dwa, famo = theirs.UW(3).double(), theirs.DWA(), theirs.FAMO(3).double()
    adam = torch.optim.Adam(uw.parameters(), lr=0.025)
    ours = {how: TaskWeights(Weighting(how), [0.5] * 3) for how in ("uncertainty", "dwa", "famo")}
    for step, (before, after) in enumerate(zip(losses, losses.roll(-1, 0), strict=True)):
        for how, scalar, factor in (("uncertainty", uw, 1), ("dwa", dwa, 1), ("famo", famo, 3)):
            values = before.clone().requires_grad_()
            total = scalar(values)
            (expected,) = torch.autograd.grad(total, values, retain_graph=True)
            assert_close(ours[how].weights(step, before), factor * expected, rtol=1e-6, atol=1e-9)
            if how == "uncertainty":
                adam.zero_grad()
                total.backward()
                adam.step()
            elif how == "famo":
                famo.update(after)
            ours[how].learn(before, after=after)
        if step % 10 == 9:
            dwa.step()
            ours["dwa"].end_epoch()
    assert (ours["famo"].state["value"].abs() > 1e-3).all()  # it did learn


# --------------------------------------------------------------------------------------------- weights of losses


def test_uncertainty_is_the_papers_likelihood_by_autograd():
    """Kendall et al., equations 7 and 10: L / 2σ² + log σ for numbers, L / σ² + log σ for classes; Adam on log σ²."""
    kinds = [0.5, 1.0, 1.0, 1.0]
    ours = TaskWeights(Weighting("uncertainty", rate=0.1), kinds)
    log_variance = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_variance], lr=0.1)
    factor = torch.tensor([0.5, 1, 1, 1])
    for step in range(300):
        losses = torch.tensor([4.0, 2.0, 0.5, 0.1], dtype=torch.float64) * (1 + 0.1 * math.sin(step))
        assert_close(ours.weights(step), (factor * torch.exp(-log_variance)).detach())
        adam.zero_grad()
        (factor * losses * torch.exp(-log_variance) + log_variance / 2).sum().backward()
        adam.step()
        ours.learn(losses)
    # at the optimum every weighted loss is one half: σ² is the mean squared error, twice the cross-entropy
    weighted = ours.weights(0) * torch.tensor([4.0, 2.0, 0.5, 0.1])
    assert weighted.tolist() == pytest.approx([0.5] * 4, abs=0.05)


def test_gradnorm_is_the_papers_algorithm_by_autograd():
    """Chen et al., algorithm 1, with the weights as 3 softmax, and its gradient loss differentiated by PyTorch."""
    ours = TaskWeights(Weighting("gradnorm", alpha=0.7), [0.5] * 3)
    value = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([value], lr=0.025)
    generator = torch.Generator().manual_seed(0)
    first = None
    for step in range(50):
        losses, lengths = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
        first = losses if first is None else first
        weights = 3 * value.softmax(0)
        assert_close(ours.weights(step), weights.detach())
        norms = weights * lengths
        rate = losses / first
        target = (norms.mean() * (rate / rate.mean()) ** 0.7).detach()
        adam.zero_grad()
        (norms - target).abs().sum().backward()
        adam.step()
        ours.learn(losses, lengths=lengths)
    assert float(ours.weights(0).sum()) == pytest.approx(3) and ours.weights(0).std() > 0.01


def test_gradnorm_evens_out_lengths():
    ours = TaskWeights(Weighting("gradnorm", alpha=0.0), [0.5] * 2)
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for _ in range(400):
        ours.learn(torch.ones(2, dtype=torch.float64), lengths=lengths)
    assert_close(ours.weights(0), torch.tensor([1.5, 0.5], dtype=torch.float64), atol=0.05, rtol=0)


def test_dwa_by_hand():
    ours = TaskWeights(Weighting("dwa", temperature=2.0), [0.5] * 2)
    for epoch, losses in enumerate([[4.0, 1.0], [2.0, 1.0], [1.0, 1.0]]):
        if epoch < 2:
            assert ours.weights(0).tolist() == [1.0, 1.0]
        for factor in (0.5, 1.5):  # the mean over the steps of an epoch counts
            ours.learn(torch.tensor(losses, dtype=torch.float64) * factor)
        ours.end_epoch()
        if epoch == 1:  # fell to 1/2 and stayed: 2 softmax((1/2, 1) / 2)
            expected = 2 / (1 + math.exp(0.25))
            assert ours.weights(0).tolist() == pytest.approx([expected, 2 - expected])
    assert ours.weights(0).tolist() == pytest.approx([expected, 2 - expected])


def test_random_weights_are_a_function_of_seed_and_step():
    ours, other = (TaskWeights(Weighting("random"), [0.5] * 3, seed=seed) for seed in (0, 1))
    drawn = torch.stack([ours.weights(step) for step in range(4000)])
    assert torch.equal(ours.weights(7), drawn[7]) and not torch.equal(other.weights(7), drawn[7])
    assert (drawn > 0).all() and torch.allclose(drawn.sum(1), torch.tensor(3.0).double())
    logs = (drawn[:, 0] / drawn[:, 1]).log()  # the difference of two normal draws
    assert abs(logs.mean()) < 0.1 and logs.std().item() == pytest.approx(math.sqrt(2), rel=0.05)


def test_famo_by_hand():
    ours = TaskWeights(Weighting("famo", rate=0.1, decay=0.0), [0.5] * 2)
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    # equal shares: weights as 1/loss, of mean 1, so both losses fall by the same factor
    assert_close(ours.weights(0, losses), torch.tensor([1.5, 0.5], dtype=torch.float64))
    ours.learn(losses, after=torch.tensor([0.5, 3.0], dtype=torch.float64))  # the first fell, the second did not
    # softmax's gradient (1/4)(log 2, -log 2), and a first step of Adam is the rate times its sign
    assert_close(ours.state["value"], torch.tensor([-0.1, 0.1], dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="'famo' takes logarithms of losses, and one is -2"):
        ours.weights(0, torch.tensor([-2.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("how", WEIGHTINGS)
def test_a_task_that_is_not_in_the_step_is_left_alone(how):
    """The others learn as if they were alone, and its own state has no gradient."""
    kinds = [0.5, 1.0, 1.0]
    ours, alone = TaskWeights(Weighting(how, decay=0.0), kinds), TaskWeights(Weighting(how, decay=0.0), kinds[:2])
    for losses in ([1.0, 2.0], [0.7, 1.9], [0.3, 1.0]):
        pair = torch.tensor(losses, dtype=torch.float64)
        three = torch.tensor([*losses, math.nan], dtype=torch.float64)
        for weights, now in ((ours, three), (alone, pair)):
            weights.learn(now, lengths=now * 2, after=now * 0.9 - 0.1)
            weights.end_epoch()
    found, expected = ours.weights(3, three), alone.weights(3, pair)
    assert found.isfinite().all()
    if how in ("fixed", "uncertainty"):
        assert_close(found[:2], expected)
        assert found[2] == 1.0
    elif how == "famo":
        assert_close(found[:2], expected)
        assert found[2] == 0.0
    elif how == "dwa":  # the third counts as one whose loss stayed
        assert found[2] > found[0] and float(found.sum()) == pytest.approx(3)


def test_state_put_back_goes_on_alike():
    for how in WEIGHTINGS:
        ours = TaskWeights(Weighting(how), [0.5, 1.0])
        losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
        step = dict(lengths=losses * 3, after=losses * torch.tensor([0.5, 0.9]))
        for _ in range(3):
            ours.learn(losses, **step)
            ours.end_epoch()
        other = TaskWeights(Weighting(how), [0.5, 1.0])
        other.state = dict(ours.state)
        for weights in (ours, other):
            weights.learn(losses * 0.7, **step)
            weights.end_epoch()
        assert torch.equal(ours.weights(9, losses), other.weights(9, losses))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(how="kendall"), "task weighting 'kendall': choose one of fixed, uncertainty, gradnorm"),
        (dict(how=None), "task weighting None"),
        (dict(rate=-1.0), "rate=-1.0: need a number from 0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(alpha=math.nan), "alpha=nan"),
        (dict(decay=math.inf), "decay=inf"),
    ],
)
def test_a_weighting_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        Weighting(**options)


def test_rows_that_nearly_cancel_end_the_search_early(monkeypatch):
    """There the slope is all rounding: the search stops when its steps move nothing, after a few, not after 20,000."""
    calls = []
    root = math.sqrt
    monkeypatch.setattr(math, "sqrt", lambda x: calls.append(1) or root(x))
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        row = torch.randn(2, generator=draw)
        jacobian = torch.stack([row, -row * (1 + 1e-4 * torch.randn(2, generator=draw))])
        assert mgda(jacobian).norm() < 1e-3 * row.norm() and cagrad(jacobian).isfinite().all()
    assert len(calls) < 50 * 100
