"""Search against scikit-learn's grids and halving, Hyperband's table and Optuna itself; resuming, processes, errors."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import ftlib
from ftlib.engine.search import rungs, search

QUIET = {"progress": False}
SPACE = {"rate": (1e-5, 1e-2, "log"), "layers": (1, 6), "drop": [0.0, 0.1, 0.2], "kind": ["a", None, True]}


def hill(settings, budget=1):
    """Best at rate 1e-3, 3 layers, kind a; a larger budget gives more."""
    far = (math.log10(settings["rate"]) + 3) ** 2 + (settings["layers"] - 3) ** 2 / 10 + (settings["kind"] != "a")
    return budget - far


def settings_of(found):
    return [{name: row[name] for name in row if name not in ("score", "seconds", "error")} for row in found.trials]


def without_times(found):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found.trials]


# ------------------------------------------------------------------------------------------- what is tried


def test_a_grid_tries_what_scikit_learn_tries():
    from sklearn.model_selection import ParameterGrid

    space = {"a": [1, 2, 3], "b": ["x", "y"]}
    found = search(lambda s: s["a"] - (s["b"] == "x"), space, method="grid", seed=5, **QUIET)
    key = json.dumps
    assert sorted(map(key, settings_of(found))) == sorted(key(one) for one in ParameterGrid(space))
    assert found.best == {"a": 3, "b": "y"} and found.score == 3 and found.trials[0] == found.trials[0] | found.best
    assert [row["score"] for row in found.trials] == [3, 2, 2, 1, 1, 0]


@pytest.mark.parametrize("count", [4, 50])
def test_of_lists_as_many_are_drawn_as_scikit_learn_draws_and_none_twice(count):
    from sklearn.model_selection import ParameterSampler

    space = {"a": [1, 2, 3], "b": ["x", "y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are only 6
        theirs = list(ParameterSampler(space, count, random_state=0))
        found = search(lambda s: 0.0, space, trials=count, **QUIET)
    assert len(found.trials) == len(theirs) == len({json.dumps(one) for one in settings_of(found)})


def test_ranges_are_drawn_over_their_whole_width_and_no_further():
    space = {"log": (1e-4, 1.0, "log"), "whole": (2, 5), "both": (1, 8, "log"), "plain": (-1.0, 3.0)}
    rows = search(lambda s: 0.0, space, trials=2000, **QUIET).trials
    draws = {name: np.array([row[name] for row in rows]) for name in space}
    for name, (low, high, *_) in space.items():
        assert low <= draws[name].min() and draws[name].max() <= high
    shares = [np.mean(draws["log"] < 10.0**power) for power in (-3, -2, -1)]
    assert np.allclose(shares, [0.25, 0.5, 0.75], atol=0.04)  # 3.6 standard errors of a share
    assert np.allclose(np.bincount(draws["whole"])[2:] / 2000, 0.25, atol=0.04)
    # of whole numbers on a logarithmic scale 1 has ln(1.5 / 0.5) of ln(8.5 / 0.5), 8 has ln(8.5 / 7.5)
    wanted = [math.log((n + 0.5) / (n - 0.5)) / math.log(17) for n in range(1, 9)]
    assert np.allclose(np.bincount(draws["both"])[1:] / 2000, wanted, atol=0.04)
    assert all(type(row["whole"]) is type(row["both"]) is int for row in rows)


def test_the_seed_decides_and_nothing_else_draws():
    first, again, other = (settings_of(search(hill, SPACE, trials=9, seed=s, **QUIET)) for s in (1, 1, 2))
    assert first == again != other


def test_rungs_by_hand_and_hyperbands_table():
    assert rungs(None, 1, 81) == [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]  # Li et al. 2018, table 1, s = 4
    assert rungs(6, 27, 81) == [(6, 27), (2, 81)]  # s = 1
    assert rungs(5, 81, 81) == [(5, 81)]  # s = 0
    assert rungs(20, 1, 10, eta=2) == [(20, 1), (10, 2), (5, 5), (2, 10)]  # 10 / 8 = 1.25, 2.5, 5, 10, rounded
    with pytest.raises(ValueError, match="trials=8: need a whole number of at least 9"):
        rungs(8, 1, 9)


def test_rungs_are_those_of_scikit_learns_halving():
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingRandomSearchCV
    from sklearn.tree import DecisionTreeClassifier

    x = np.random.default_rng(0).normal(size=(540, 2))
    options = dict(n_candidates=20, min_resources=20, max_resources=540, factor=3, cv=2, random_state=0)
    theirs = HalvingRandomSearchCV(DecisionTreeClassifier(), {"max_depth": list(range(1, 40))}, **options)
    theirs.fit(x, x[:, 0] > 0)
    ours = rungs(27, 20, 540)
    assert [budget for _, budget in ours][: len(theirs.n_resources_)] == theirs.n_resources_
    # scikit-learn rounds up where Hyperband rounds down, and stops sooner
    assert theirs.n_candidates_ == [20, 7, 3] and [n for n, _ in ours] == [27, 9, 3, 1]


def test_halving_goes_on_with_the_best():
    calls = []

    def train(settings, budget):
        calls.append((settings["x"], budget))
        return settings["x"] if budget < 4 else -settings["x"]  # the last rung judges otherwise

    found = search(train, {"x": [0, 1, 2, 3, 4, 5, 6, 7]}, method="halving", budget=(1, 4), eta=2, trials=8, **QUIET)
    assert sorted(calls[:8]) == [(x, 1) for x in range(8)]
    assert calls[8:] == [(7, 2), (6, 2), (5, 2), (4, 2), (7, 4), (6, 4)]
    assert found.best == {"x": 6} and found.score == -6  # -6 is best with the largest budget, if 7 is more with a small
    assert [row["budget"] for row in found.trials] == [4, 4, 2, 2, 2, 2, *[1] * 8]


def test_less_is_better_if_asked_for():
    space = {"x": [0, 1, 2, 3, 4]}
    found = search(lambda s: (s["x"] - 1) ** 2, space, method="grid", maximize=False, **QUIET)
    assert found.best == {"x": 1} and [row["score"] for row in found.trials] == [0, 1, 1, 4, 9]
    halved = search(
        lambda s, b: (s["x"] - 1) ** 2 / b, {"x": [0, 1, 2, 3]}, method="halving", budget=(1, 4), eta=2,
        maximize=False, **QUIET,
    )  # fmt: skip
    assert halved.best == {"x": 1}


# ---------------------------------------------------------------------------------------- failures, ends, tables


def test_a_trial_that_fails_is_kept_with_its_error_and_ends_nothing(tmp_path):
    def train(settings):
        if settings["x"] == 2:
            raise MemoryError("too large")
        return math.nan if settings["x"] == 1 else settings["x"]

    found = search(train, {"x": [0, 1, 2, 3, 4]}, method="grid", file=tmp_path / "t.jsonl", **QUIET)
    assert found.best == {"x": 4}
    errors = {row["x"]: (row["score"], row["error"]) for row in found.trials}
    assert errors[2] == (None, "MemoryError: too large") and errors[1] == (None, "the score is nan")
    assert errors[3] == (3.0, None) and [row["x"] for row in found.trials][:3] == [4, 3, 0]
    table = str(ftlib.results_table(found.trials, ["x", "score", "error"]))
    assert "MemoryError" in table and "–" in table


def test_in_halving_what_failed_goes_no_further():
    def train(settings, budget):
        if settings["x"] > 1:
            raise ValueError(f"x is {settings['x']}")
        return settings["x"]

    found = search(train, {"x": [0, 1, 2, 3]}, method="halving", budget=(1, 4), eta=2, **QUIET)
    assert found.best == {"x": 1} and [row["budget"] for row in found.trials] == [4, 2, 2, 1, 1, 1, 1]


def test_where_all_fail_the_first_error_is_said():
    with pytest.raises(RuntimeError, match="no trial of 3 gave a score; the first error: KeyError: 'y'"):
        search(lambda s: s["y"], {"x": [1, 2, 3]}, method="grid", **QUIET)


def test_no_trial_starts_after_the_time_is_over(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("ftlib.engine.search.time.monotonic", lambda: next(clock))
    found = search(lambda s: s["x"], {"x": list(range(9))}, method="grid", seconds=3, **QUIET)
    assert len(found.trials) == 2  # asked at 1 and 2, over at 3
    with pytest.raises(RuntimeError, match="none was done in 0 seconds"):
        search(lambda s: s["x"], {"x": [1, 2]}, method="grid", seconds=0, **QUIET)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "how, best, told",
    [
        ([1, 2, 3], 3, True), ([1, 2, 3], 2, False), ([0, 1, 2], 0, False), ([2, 1], 2, False),
        (["a", "b", "c"], "a", False), ((0.0, 1.0), 0.97, True), ((0.0, 1.0), 0.94, False), ((0.0, 1.0), 0.01, False),
        ((1e-4, 1.0, "log"), 1.2e-4, True), ((1e-4, 1.0, "log"), 0.03, False), ((1, 4), 4, True),
    ],
)  # fmt: skip
def test_a_best_value_at_an_end_is_told(how, best, told):
    def train(settings):
        return -abs(settings["x"] - best) if isinstance(best, (int, float)) else -(settings["x"] != best)

    asked = dict(method="random", trials=400, **QUIET)
    if not told:
        assert search(train, {"x": how}, **asked).edges == []
        return
    with pytest.warns(UserWarning, match="x=.* is best, at an end of .*: search beyond it"):
        assert search(train, {"x": how}, **asked).edges == ["x"]


# --------------------------------------------------------------------------------- resuming, several processes


def test_what_is_in_the_file_is_not_done_again(tmp_path):
    file, calls = tmp_path / "deep" / "trials.jsonl", []

    def train(settings, stop=None):
        calls.append(settings)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return hill(settings)

    with pytest.raises(KeyboardInterrupt):
        search(lambda s: train(s, 5), SPACE, trials=9, file=file, **QUIET)
    assert len(file.read_text().splitlines()) == 4
    found = search(train, SPACE, trials=9, file=file, **QUIET)
    assert len(calls) == 5 + 5
    assert without_times(found) == without_times(search(hill, SPACE, trials=9, **QUIET))
    more = search(train, SPACE, trials=12, file=file, **QUIET)  # a longer search begins with the shorter one
    assert len(calls) == 13 and len(more.trials) == 12


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "trials.jsonl"
    search(hill, SPACE, trials=2, file=file, **QUIET)
    with pytest.raises(ValueError, match=r"trials.jsonl line 1: .* is no trial of x; delete it, or take another file"):
        search(lambda s: 1.0, {"x": [1, 2]}, method="grid", file=file, **QUIET)
    file.write_text(file.read_text() + '{"settings": {"rate"')
    with pytest.raises(ValueError, match=r"line 3: .* is no trial of drop, kind, layers, rate"):
        search(hill, SPACE, trials=2, file=file, **QUIET)


PROGRAM = """
import json, sys, time
from ftlib.engine.search import search

def train(settings, budget):
    with open({log!r}, "a") as log:
        log.write(json.dumps([settings["x"], budget]) + "\\n")
    time.sleep(0.02)
    if {die} and settings["x"] == 5:
        time.sleep(60)
    return -abs(settings["x"] - 6) * budget

space = {{"x": list(range(9))}}
found = search(train, space, method="halving", budget=(1, 9), file={file!r}, progress=False)
print(json.dumps([{{k: v for k, v in row.items() if k != "seconds"}} for row in found.trials]))
"""


def started(tmp_path, die=False):
    code = PROGRAM.format(log=str(tmp_path / "log"), file=str(tmp_path / "trials.jsonl"), die=die)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(ftlib.__file__).parents[1])
    return subprocess.Popen([sys.executable, "-c", code], **options)


def test_processes_share_the_work_and_find_what_one_finds(tmp_path):
    both = [started(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), outputs
    (first, _), (second, _) = outputs
    done = (tmp_path / "log").read_text().splitlines()
    assert len(done) == len(set(done)) == 9 + 3 + 1  # nobody did what the other did
    (alone := tmp_path / "alone").mkdir()
    assert first == second == started(alone).communicate(timeout=120)[0]


def test_a_process_that_is_killed_leaves_its_trial_to_the_others(tmp_path):
    import time

    killed = started(tmp_path, die=True)
    for _ in range(1200):
        if (tmp_path / "log").exists() and "[5, 1]" in (tmp_path / "log").read_text():
            break
        time.sleep(0.05)
    other = started(tmp_path)
    time.sleep(0.5)
    killed.kill()
    output, error = other.communicate(timeout=120)
    killed.communicate()
    assert other.returncode == 0, error
    assert (tmp_path / "log").read_text().splitlines().count("[5, 1]") == 2 and len(json.loads(output)) == 13


# --------------------------------------------------------------------------------------------------- Optuna


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("maximize", [True, False])
def test_optuna_finds_what_it_finds_by_itself(maximize):
    optuna = pytest.importorskip("optuna")
    sign = 1 if maximize else -1

    def objective(trial):
        low, high, _ = SPACE["rate"]
        drawn = {"rate": trial.suggest_float("rate", low, high, log=True), "layers": trial.suggest_int("layers", 1, 6)}
        drawn |= {name: trial.suggest_categorical(name, SPACE[name]) for name in ("drop", "kind")}
        return sign * hill(drawn)

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=3), direction="maximize" if maximize else "minimize"
    )
    study.optimize(objective, n_trials=25)
    sampler = optuna.samplers.TPESampler(seed=3)
    found = search(lambda s: sign * hill(s), SPACE, method=sampler, trials=25, maximize=maximize, **QUIET)
    assert found.best == study.best_params and found.score == study.best_value
    asked = {json.dumps(trial.params, sort_keys=True) for trial in study.trials}
    assert {json.dumps(one, sort_keys=True) for one in settings_of(found)} == asked


@pytest.mark.filterwarnings("ignore")
def test_optuna_goes_on_where_it_stopped(tmp_path):
    optuna = pytest.importorskip("optuna")
    calls = []

    def train(settings):
        calls.append(settings)
        if settings["layers"] == 6:
            raise ValueError("too deep")
        return hill(settings)

    def run(trials, file):
        return search(train, SPACE, method=optuna.samplers.TPESampler(seed=0), trials=trials, file=file, **QUIET)

    whole = run(24, None)
    assert any(row["error"] for row in whole.trials)
    calls.clear()
    run(14, tmp_path / "a.jsonl")
    assert without_times(run(24, tmp_path / "a.jsonl")) == without_times(whole)
    assert len(calls) == len(whole.trials) == len({json.dumps(one) for one in calls})


def test_without_optuna_a_sampler_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna"):
        search(hill, SPACE, method=object(), **QUIET)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "space, options, match",
    [
        ({}, {}, "space is empty"),
        ({"score": [1]}, {}, "'score': a column of the trials has this name"),
        ({"x": 3}, {}, "'x': 3: need a list of words"),
        ({"x": (1,)}, {}, r"'x': \(1,\): need a list"),
        ({"x": (1, 2, "ln")}, {}, "need a list of words"),
        ({"x": [(1, 2)]}, {}, "need a list of words, plain numbers"),
        ({"x": []}, {}, "need values, each once"),
        ({"x": [1, 1]}, {}, "need values, each once"),
        ({"x": (2, 1)}, {}, r"\(2, 1\): need low < high"),
        ({"x": (0, 1.0, "log")}, {}, "above 0 if 'log'"),
        ({"x": (0, 1)}, {"method": "grid"}, "a grid needs lists; x has a range"),
        ({"x": [0, 1]}, {"method": "grid", "trials": 3}, "trials=3: a grid tries all"),
        ({"x": [0, 1]}, {"method": "sobol"}, "method='sobol': choose one of grid, random, halving"),
        ({"x": [0, 1]}, {"method": "halving"}, "only 'halving' has a budget"),
        ({"x": [0, 1]}, {"budget": (1, 3)}, "only 'halving' has a budget"),
        ({"x": [0, 1]}, {"method": "halving", "budget": (3, 1)}, "most=1: need a whole number of at least 3"),
        ({"x": [0, 1]}, {"trials": 0}, "trials=0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_first_trial(space, options, match):
    with pytest.raises(ValueError, match=match):
        search(lambda *_: pytest.fail("a trial began"), space, **QUIET, **options)
