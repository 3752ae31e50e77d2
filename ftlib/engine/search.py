"""Hyper-parameter search: a plain function of settings, tried on a grid, at random, by halving, or as Optuna says.

To copy: this file and core/batches.py.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None  # type: ignore[no-redef]

from ..core.batches import one_of, refuse, short, whole

_MADE = ("budget", "score", "seconds", "error")  # columns of a trial beside its settings
Job = tuple[dict[str, Any], int | None]  # settings, and what may be spent on them
Batches = Generator[list[Job], list[float], None]  # sent its jobs' scores, larger is better, -inf: failed


@dataclass(frozen=True)
class Found:
    """What `search` found: the best settings and their score, all trials, and which settings are best at an end."""

    best: dict[str, Any]
    score: float
    trials: list[dict[str, Any]]  # best first: settings, score, seconds, error, of "halving" budget: `results_table`
    edges: list[str]


def search(
    train: Callable[..., float], space: Mapping[str, Any], *, method: Any = "random", trials: int | None = None,
    seconds: float = math.inf, budget: tuple[int, int] | None = None, eta: int = 3, seed: int = 0,
    file: str | os.PathLike | None = None, maximize: bool = True, progress: bool = True,
) -> Found:  # fmt: skip
    """Try settings; train(settings) -> score, on validation rows: the test rows stay out of it.

    Args:
        train: any function of a dict, for "halving" of (dict, budget); it seeds what it draws.
        space: {name: list of values, or a range (low, high) or (low, high, "log")}; of two ints ints are drawn.
        method: "grid", of lists; "random"; "halving": `rungs`, each with the best of the one before; or a fresh Optuna
            sampler, optuna.samplers.TPESampler(seed=0) say, which is told every score.
        trials: how many settings; default: 20, for "halving" as many as leave one for the last rung.
        seconds: no trial starts later than this after the call.
        budget: (least, most) of "halving": epochs, steps or rows, whatever `train` takes it for.
        file: JSON lines, one a finished trial.  A search that starts again takes from it what is there, failures too
            (delete a line to try again).  Several processes with the same arguments share the work, of Optuna's a trial
            at a time, and give the same result; one that dies leaves its trial to the others.  On Windows one a file.

    A trial that raises, or whose score is not finite, is kept with its error.  Of "halving" trials with the largest
    budget alone compete.  Warns of a best value in the outer 5 % of a range, or the least or most of three or more
    numbers, 0 aside: a better one may lie beyond.
    Raises ValueError for a space, options or a file that don't fit, RuntimeError where no trial gave a score.
    Source: Bergstra and Bengio 2012 (random); Jamieson and Talwalkar 2016, Li et al. 2018 (Hyperband).

    >>> search(lambda s: -(s["x"] - 2) ** 2, {"x": [0, 1, 2, 3]}, method="grid", progress=False).best
    {'x': 2}
    """
    from tqdm.auto import tqdm

    space, until, sign = _checked(space), time.monotonic() + seconds, 1 if maximize else -1
    halving, count = isinstance(method, str) and method == "halving", whole("trials", 20 if trials is None else trials)
    refuse((halving != (budget is not None), f"method={short(method)}, budget={budget}: only 'halving' has a budget"))
    if not isinstance(method, str):
        batches = _optuna(space, method, count, maximize)
    else:
        ranges = [name for name, how in space.items() if isinstance(how, tuple)]
        grid = one_of("method", method, ("grid", "random", "halving")) == "grid"
        refuse(
            (grid and ranges, f"a grid needs lists; {', '.join(ranges)} has a range"),
            (grid and trials, f"trials={trials}: a grid tries all; method='random' draws so many of them"),
        )
        steps = rungs(trials, *budget, eta=eta) if budget else [(None if grid else count, None)]
        batches = _halving(_settings(space, steps[0][0], seed), steps)
    asked: dict[str, Job] = {}
    bar = tqdm(desc="search", unit="trial", disable=not progress, leave=False)
    with bar, closing(_Trials(file, set(space))) as known, suppress(StopIteration):
        jobs = next(batches)
        while (asked := asked | {_key(*job): job for job in jobs}) and known.do(train, jobs, until, bar.update):
            scores = [known.rows[_key(*job)]["score"] for job in jobs]
            jobs = batches.send([-math.inf if score is None else sign * score for score in scores])
    rows = [known.rows[key] for key in asked if key in known.rows]
    if all(row["score"] is None for row in rows):
        why = f"the first error: {rows[0]['error']}" if rows else f"none was done in {seconds} seconds"
        raise RuntimeError(f"no trial of {len(rows)} gave a score; {why}")
    rows.sort(key=lambda row: (row["score"] is None, -(row["budget"] or 0), -sign * (row["score"] or 0)))
    best = rows[0]["settings"]
    edges = [name for name, how in space.items() if _at_an_end(how, best[name])]
    for name in edges:
        warnings.warn(f"{name}={best[name]!r} is best, at an end of {space[name]}: search beyond it", stacklevel=2)
    shown = [name for name in _MADE if name != "budget" or budget]
    return Found(best, rows[0]["score"], [row["settings"] | {n: row[n] for n in shown} for row in rows], edges)


def rungs(trials: int | None, least: int, most: int, *, eta: int = 3) -> list[tuple[int, int]]:
    """Successive halving's (settings, budget): n // eta^i with most / eta^(s - i), s = floor(log_eta(most / least)).

    Hyperband's bracket of s; trials: n, default eta^s, which leaves one; ValueError for fewer.

    >>> rungs(None, 1, 81)
    [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]
    """
    whole("most", most, whole("least", least))
    s = next(s for s in range(32) if least * whole("eta", eta, 2) ** (s + 1) > most)
    n = whole("trials", eta**s if trials is None else trials, eta**s)
    return [(n // eta**i, round(most / eta ** (s - i))) for i in range(s + 1)]


def _checked(space: Mapping[str, Any]) -> dict[str, Any]:
    refuse((not space, "space is empty; name a setting, {'learning_rate': (1e-5, 1e-3, 'log')}"))
    for name, how in space.items():
        pair = isinstance(how, tuple) and len(how) in (2, 3) and how[2:] in ((), ("log",))
        pair = pair and {type(end) for end in how[:2]} <= {int, float}
        plain = isinstance(how, list) and {type(one) for one in how} <= {str, int, float, bool, type(None)}
        refuse(
            (name in _MADE, "a column of the trials has this name; take another"),
            (not plain and not pair,
             f"{short(how)}: need a list of words, plain numbers, True, False, None; or (low, high), with 'log'"),
            (plain and not 0 < len(how) == len({*map(repr, how)}), f"{short(how)}: need values, each once"),
            (pair and not (0 if how[2:] else -math.inf) < how[0] < how[1] < math.inf,
             f"{how}: need low < high, finite, and above 0 if 'log'"),
            what=f"space, {name!r}: ",
        )  # fmt: skip
    return dict(space)


def _settings(space: dict[str, Any], count: int | None, seed: int) -> list[dict[str, Any]]:
    """The whole grid (None), or so many settings, each once; where all are lists no more than there are."""
    generator = np.random.default_rng(seed)
    if all(isinstance(how, list) for how in space.values()):
        grid = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
        return grid if count is None else [grid[place] for place in generator.permutation(len(grid))[:count]]
    drawn = ({name: _value(how, generator) for name, how in space.items()} for _ in range(10 * (count or 0) + 100))
    return list({_key(one, None): one for one in drawn}.values())[:count]


def _value(how: Any, generator: np.random.Generator) -> Any:
    if isinstance(how, list):
        return how[generator.integers(len(how))]
    low, high, ints = *how[:2], {*map(type, how[:2])} == {int}
    half = 0.5 if ints else 0  # so that the ends are as likely as what lies between
    if len(how) == 2:
        return int(generator.integers(low, high + 1)) if ints else float(generator.uniform(low, high))
    value = math.exp(generator.uniform(math.log(low - half), math.log(high + half)))
    return min(max(round(value) if ints else value, low), high)


def _halving(left: list[dict[str, Any]], steps: list[tuple]) -> Batches:
    for count, budget in steps:
        scores = yield [(settings, budget) for settings in left[:count]]
        left = [left[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i]) if scores[i] > -math.inf]


def _optuna(space: dict[str, Any], sampler: Any, trials: int, maximize: bool) -> Batches:
    """Asked and told in an order that is always the same, so that a search that goes on asks for what it has."""
    try:
        from optuna import create_study, distributions, trial
    except ImportError as error:
        raise ImportError(f"method={short(sampler)}: an Optuna sampler needs Optuna; pip install optuna") from error
    kinds = {int: distributions.IntDistribution, float: distributions.FloatDistribution}
    asks = {
        name: distributions.CategoricalDistribution(how) if isinstance(how, list)
        else kinds[type(how[0] + how[1])](*how[:2], log=len(how) == 3) for name, how in space.items()
    }  # fmt: skip
    study = create_study(sampler=sampler, direction="maximize" if maximize else "minimize")
    for _ in range(trials):
        one = study.ask(asks)
        (score,) = yield [({name: one.params[name] for name in space}, None)]
        told = {"state": trial.TrialState.FAIL} if math.isinf(score) else {"values": score if maximize else -score}
        study.tell(one, **told)


def _at_an_end(how: Any, value: Any) -> bool:
    if isinstance(how, list):
        ends = [min(how), max(how)] if len(how) > 2 and {*map(type, how)} <= {int, float} else []
        return value in ends and value != 0
    low, high, at = map(math.log, (*how[:2], value)) if how[2:] else (*how, value)
    share = (at - low) / (high - low)
    return (share < 0.05 and how[0] != 0) or (share > 0.95 and how[1] != 0)


def _key(settings: dict[str, Any], budget: int | None) -> str:
    return json.dumps([settings, budget], sort_keys=True)


def _tried(train: Callable[..., float], settings: dict[str, Any], budget: int | None) -> dict[str, Any]:
    begin, score, error = time.perf_counter(), None, None
    try:
        score = float(train(dict(settings)) if budget is None else train(dict(settings), budget))
        score, error = (score, None) if math.isfinite(score) else (None, f"the score is {score}")
    except Exception as fault:
        error = f"{type(fault).__name__}: {fault}"
    spent = time.perf_counter() - begin
    return {"settings": settings, "budget": budget, "score": score, "seconds": spent, "error": error}


class _Trials:
    """The finished trials, of all processes if they have a file, and whose turn the others are."""

    def __init__(self, file: str | os.PathLike | None, names: set[str]):
        self.path, self.names, self.lock = file and Path(file), names, None
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = fcntl and self.path.with_name(f"{self.path.name}.lock").open("ab")

    def close(self) -> None:
        self.lock and self.lock.close()

    def do(self, train: Callable[..., float], jobs: list[Job], until: float, tell: Callable[[], Any]) -> bool:
        """Do these jobs, or wait for whoever does; False where the time is over before all are done."""
        named = {_key(*job): job for job in jobs}
        while True:
            self.read()
            undone = [key for key in named if key not in self.rows]
            if not undone or time.monotonic() >= until:
                return not undone
            for key in undone:
                with self.held(1 + int(hashlib.sha256(key.encode()).hexdigest()[:7], 16), wait=False) as mine:
                    if mine:
                        self.read()
                        if key not in self.rows:
                            self.add(key, _tried(train, *named[key]))
                            tell()
                        break
            else:
                time.sleep(0.1)

    @contextmanager
    def held(self, place: int, wait: bool = True) -> Iterator[bool]:
        """A lock on one byte of the lock file, which ends with the process at the latest; gives whether it is ours."""
        try:
            self.lock and fcntl.lockf(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            self.lock and fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, place)

    def read(self) -> None:
        lines = self.path.read_text("utf-8").splitlines() if self.path and self.path.exists() else ()
        for number, line in enumerate(lines, 1):
            with suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                if row["settings"].keys() == self.names:
                    self.rows[_key(row["settings"], row["budget"])] = row
                    continue
            need = f"no trial of {', '.join(sorted(self.names))}; delete it, or take another file"
            raise ValueError(f"{self.path} line {number}: {short(line)} is {need}")

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        if self.path:
            with self.held(0), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
