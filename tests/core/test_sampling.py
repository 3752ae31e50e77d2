"""Which rows a step computes on: epochs, tasks drawn, streams shuffled in a buffer; all of it by a seed."""

import collections
import itertools
from types import SimpleNamespace

import pytest
import torch

from ftlib.core.sampling import plan, stream_plan
from ftlib.methods.multitask import SAMPLERS, TaskSampler


def settings(**options):
    plain = dict(
        shuffle=True, seed=0, batch_size=4, shuffle_buffer=8, epochs=1, max_steps=None, temperature=1.0,
        task_sampler="temperature",
    )  # fmt: skip
    return SimpleNamespace(**plain | options)


def rows_of(steps):
    return [row for step in steps for _, row in step]


# --------------------------------------------------------------------------------------------------- one dataset


def test_a_plan_passes_over_every_row_once_an_epoch():
    steps = list(itertools.islice(plan({"": 10}, settings()), 6))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2] and {name for step in steps for name, _ in step} == {""}
    first, second = rows_of(steps[:3]), rows_of(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second != list(range(10))
    assert steps == list(itertools.islice(plan({"": 10}, settings()), 6))
    assert steps != list(itertools.islice(plan({"": 10}, settings(seed=1)), 6))
    assert rows_of(itertools.islice(plan({"": 10}, settings(shuffle=False)), 6)) == [*range(10)] * 2


def test_a_plan_of_several_datasets_passes_over_each():
    sizes = {"a": 6, "b": 3}
    mixed = lambda config: plan(sizes, config, TaskSampler.of(sizes, config).draw)  # noqa: E731
    steps = list(itertools.islice(mixed(settings(batch_size=3, task_sampler="remaining")), 6))
    for epoch in (steps[:3], steps[3:]):
        for name, size in sizes.items():
            assert sorted(i for step in epoch for task, i in step if task == name) == list(range(size))
    plain = itertools.islice(mixed(settings(batch_size=3, shuffle=False)), 6)
    seen = [i for step in plain for task, i in step if task == "a"]
    assert seen == [i % 6 for i in range(len(seen))]


@pytest.mark.parametrize("seed", [0, -3, 2**31])
def test_plans_take_any_seed_and_leave_the_global_state(seed):
    state = torch.get_rng_state()
    assert len(next(plan({"": 9}, settings(seed=seed)))) == len(next(stream_plan([1] * 9, settings(seed=seed)))) == 4
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- streams


class Counted:
    """Rows 0, 1, … that can be read again, and how many were."""

    def __init__(self, count):
        self.count, self.pulled, self.begun = count, 0, 0

    def __iter__(self):
        self.begun += 1
        for i in range(self.count):
            self.pulled += 1
            yield i


def test_a_generator_ends_and_gives_every_row_once():
    steps = list(stream_plan(iter(range(22)), settings()))
    assert [len(step) for step in steps] == [4] * 5 + [2]
    assert sorted(rows_of(steps)) == list(range(22)) and rows_of(steps) != list(range(22))
    assert {name for step in steps for name, _ in step} == {""}


@pytest.mark.parametrize("count", [0, 1, 4, 7, 8, 9])
def test_streams_about_as_long_as_a_step_or_the_buffer(count):
    steps = list(stream_plan(iter(range(count)), settings()))
    assert sorted(rows_of(steps)) == list(range(count)) and all(steps)
    assert [len(step) for step in steps[:-1]] == [4] * (len(steps) - 1)


def test_without_shuffling_a_stream_keeps_its_order_and_reads_nothing_in_advance():
    rows = Counted(9)
    steps = stream_plan(rows, settings(shuffle=False))
    assert rows_of([next(steps)]) == [0, 1, 2, 3] and rows.pulled == 4
    assert rows_of(itertools.islice(steps, 4)) == [4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]
    assert rows.begun == 3


def test_a_row_is_drawn_from_the_buffer():
    rows = Counted(1000)
    steps = stream_plan(rows, settings(shuffle_buffer=50))
    first = next(steps)
    assert rows.pulled == 53  # the buffer full, a row drawn, another read …
    assert max(rows_of([first])) < 53
    for number in range(2, 20):
        found = rows_of([next(steps)])
        assert rows.pulled == 49 + 4 * number and max(found) < rows.pulled


def test_a_stream_that_can_be_read_again_begins_again():
    rows = Counted(10)
    found = rows_of(itertools.islice(stream_plan(rows, settings()), 25))  # 100 rows: ten passes
    counts = collections.Counter(found)
    # some of the last passes may wait in the buffer
    assert set(counts) == set(range(10)) and min(counts.values()) >= 8 and rows.begun >= 10
    assert list(stream_plan(Counted(0), settings())) == []


def test_the_seed_says_how_a_stream_is_shuffled():
    draw = lambda seed: rows_of(stream_plan(iter(range(40)), settings(seed=seed)))  # noqa: E731
    assert draw(3) == draw(3) != draw(4)


def test_a_large_buffer_shuffles_all_of_a_stream_alike():
    """Chi-square: where row 0 comes is spread evenly over the places."""
    places = [rows_of(stream_plan(iter(range(8)), settings(seed=s, shuffle_buffer=8))).index(0) for s in range(800)]
    counts = collections.Counter(places)
    assert set(counts) == set(range(8)) and sum((n - 100) ** 2 / 100 for n in counts.values()) < 24.3  # p = 0.001


# ------------------------------------------------------------------------------------------------- tasks drawn


def test_probabilities_by_hand():
    assert TaskSampler({"a": 300, "b": 100}).probabilities == pytest.approx({"a": 0.75, "b": 0.25})
    assert TaskSampler({"a": 900, "b": 100}, temperature=2).probabilities == pytest.approx({"a": 0.75, "b": 0.25})
    assert TaskSampler({"a": 9, "b": 1}, temperature=float("inf")).probabilities == {"a": 0.5, "b": 0.5}
    assert TaskSampler({"a": 10**6, "b": 1}, temperature=1e9).probabilities == pytest.approx({"a": 0.5, "b": 0.5})
    sharp = TaskSampler({"a": 10**9, "b": 1}, temperature=0.001).probabilities  # no overflow
    assert sharp == pytest.approx({"a": 1.0, "b": 0.0})


def test_draws_follow_the_probabilities_and_the_seed():
    sizes = {"a": 700, "b": 200, "c": 100}
    drawn = TaskSampler(sizes, seed=5).draw(5000)
    counts = collections.Counter(drawn)
    assert {task: counts[task] / 5000 for task in sizes} == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1}, abs=0.03)
    assert TaskSampler(sizes, seed=5).draw(5000) == drawn
    assert TaskSampler(sizes, seed=6).draw(5000) != drawn
    assert TaskSampler({"only": 1}).draw(3) == ["only"] * 3
    state = torch.get_rng_state()
    TaskSampler(sizes).draw(10)
    assert torch.equal(torch.get_rng_state(), state)


def epochs_of(sampler, sizes, epochs):
    """{task: draws} of every epoch, drawn seven at a time where they do not fit."""
    drawn = []
    while len(drawn) < epochs * sum(sizes.values()):
        drawn += sampler.draw(7)
    size = sum(sizes.values())
    return [dict(collections.Counter(drawn[i * size : (i + 1) * size])) for i in range(epochs)]


def test_the_remaining_sampler_gives_every_example_once_an_epoch():
    sizes = {"big": 50, "small": 9, "single": 1}
    sampler = TaskSampler(sizes, how="remaining", seed=3)
    assert sampler.probabilities == pytest.approx({"big": 50 / 60, "small": 9 / 60, "single": 1 / 60})
    first = sampler.draw(20)
    left = {task: size - first.count(task) for task, size in sizes.items()}
    assert sampler.probabilities == pytest.approx({task: count / 40 for task, count in left.items()})
    found = epochs_of(TaskSampler(sizes, how="remaining", seed=3), sizes, 4)
    assert found == [sizes] * 4
    assert TaskSampler(sizes, how="remaining", seed=3).draw(60) != TaskSampler(sizes, how="remaining", seed=4).draw(60)


def test_the_uniform_sampler_draws_alike():
    sizes = {"big": 5000, "small": 1}
    assert TaskSampler(sizes, how="uniform").probabilities == {"big": 0.5, "small": 0.5}
    assert TaskSampler(sizes, how="uniform").draw(4000).count("small") == pytest.approx(2000, abs=150)


def test_the_annealed_sampler_starts_in_proportion_and_ends_nearly_alike():
    """Stickland & Murray 2019: size ** a, a = 1 - 0.8 (epoch - 1) / (epochs - 1)."""
    sizes = {"big": 900, "small": 100}
    sampler = TaskSampler(sizes, how="annealed", epochs=3)
    for power in (1.0, 0.6, 0.2, 0.2):  # the last epoch's goes on
        share = 900**power / (900**power + 100**power)
        assert sampler.probabilities == pytest.approx({"big": share, "small": 1 - share})
        assert sampler.draw(1000).count("big") == pytest.approx(1000 * share, abs=60)
    assert TaskSampler(sizes, how="annealed", epochs=1).probabilities["big"] == pytest.approx(0.9)


@pytest.mark.parametrize("how", SAMPLERS)
def test_every_sampler_is_a_function_of_the_seed_and_goes_on(how):
    sizes = {"a": 40, "b": 9, "c": 3}
    whole: list[str] = []
    first, second = (TaskSampler(sizes, seed=1, how=how, epochs=3) for _ in range(2))
    for _ in range(13):
        whole += first.draw(12)  # three epochs of 52
    for _ in range(4):
        second.draw(12)
    assert [task for _ in range(9) for task in second.draw(12)] == whole[48:]
    assert TaskSampler(sizes, seed=2, how=how, epochs=3).draw(156) != whole
    counts = {task: whole.count(task) for task in sizes}
    assert sum(counts.values()) == 156 and counts["c"] > 0
    if how == "remaining":
        assert counts == {"a": 120, "b": 27, "c": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(how="random"), "sampler='random': choose one of temperature, uniform, annealed, remaining"),
        (dict(epochs=0), "epochs=0: need a whole number"),
        (dict(epochs=2.0), "epochs=2.0"),
    ],
)
def test_a_sampler_checks_how(options, message):
    with pytest.raises(ValueError, match=message):
        TaskSampler({"a": 1}, **options)


@pytest.mark.parametrize(
    ("sizes", "temperature", "message"),
    [
        ({}, 1.0, "sizes is empty"),
        ({"a": 0}, 1.0, "examples of the task 'a'=0: need a whole number of at least 1"),
        ({"a": 1.5}, 1.0, "examples of the task 'a'=1.5"),
        ({"a": True}, 1.0, "examples of the task 'a'=True"),
        ({"a": 1}, 0, "temperature=0: need a number from 1e-06, finite"),
        ({"a": 1}, float("nan"), "temperature=nan"),
    ],
)
def test_a_sampler_checks_itself(sizes, temperature, message):
    with pytest.raises(ValueError, match=message):
        TaskSampler(sizes, temperature)
