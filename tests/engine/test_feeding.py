"""Rows in order and in micro-batches; a step that ran out of memory is done again in smaller ones, to the same end."""

import sys
import warnings
from collections import Counter

import pytest
import torch
from test_fit import before_steps, make_rows, quick, same, steps, weights
from torch.testing import assert_close

from ftlib.engine import distributed, feeding
from ftlib.engine.feeding import Feed, Step
from ftlib.engine.fit import fit
from ftlib.engine.recovery import out_of_memory
from ftlib.engine.settings import Run
from ftlib.inputs.agreement import Padding
from ftlib.inputs.rows import parts_for
from ftlib.methods import speedups
from ftlib.methods.unpadding import unpad
from ftlib.tasks.task import tasks_of

CPU = torch.device("cpu")


def feed_of(model, rows, total=9, **options):
    config = quick(shuffle=False, **options)
    sizes = dict(micro_batch_size=config.micro_batch_size, max_tokens=config.max_tokens)
    feed = Feed(parts_for(rows, model, name="rows"), tasks_of(model), Run(config, **sizes), Padding(), CPU)
    feed.start(0, total)
    return feed


def limited(model, rows=10**9, tokens=10**9, error=None, backward=False):
    """A model whose memory holds so many rows, or padded tokens, at a time; the shapes it was called with."""
    seen = []
    error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail(gradient):
        raise error

    def check(module, args, kwargs, output):
        if not module.training:
            return
        shape = kwargs["input_ids"].shape
        seen.append(tuple(shape))
        if shape[0] > rows or shape.numel() > tokens:
            if not backward:
                raise error
            output.logits.register_hook(fail)

    model.register_forward_hook(check, with_kwargs=True)
    return model, seen


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_step_without_memory_is_done_again_in_halves(tiny_model, backward, unpadded):
    rows, config = make_rows(22), quick(batch_size=10, epochs=2, optimizer="sgd", learning_rate=0.1)
    model, seen = limited(tiny_model(), rows=3, backward=backward)
    twin = tiny_model()
    if unpadded:
        unpad(model), unpad(twin)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        run = fit(model, rows, config=config)
    first, second = (str(warning.message) for warning in warned)
    assert "micro_batch_size 5 instead of 10" in first and "micro_batch_size 2 instead of 5" in second
    assert [count for count, _ in seen[:3]] == [10, 5, 2]  # nothing larger than 2 after the first step
    assert max(count for count, _ in seen[3:]) == 2
    asked = fit(twin, rows, config=quick(**{**vars(config), "micro_batch_size": 2}))
    assert steps(run, "micro_batches") == steps(asked, "micro_batches") == [5, 5, 1, 5, 5, 1]
    assert run.micro_batch_size == 2 and run.config.micro_batch_size is None
    assert_close(torch.tensor(steps(run)), torch.tensor(steps(asked)), atol=1e-6, rtol=1e-6)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(found, expected, atol=1e-6, rtol=0, msg=name)


def test_with_dropout_the_step_starts_from_the_same_random_state(tiny_model):
    rows, runs = make_rows(16), []
    for size in (None, 4):
        model = tiny_model(hidden_dropout_prob=0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(limited(model, rows=4)[0], rows, config=quick(batch_size=16, micro_batch_size=size))
        runs.append(weights(model))
    assert same(*runs)


def test_a_token_budget_is_halved_down_to_the_longest_row_and_then_the_rows_are(tiny_model):
    rows = make_rows(32, longest=9)
    longest = max(len(row["input_ids"]) for row in rows)
    model, seen = limited(tiny_model(), tokens=40)
    with pytest.warns(UserWarning, match="max_tokens"):
        run = fit(model, rows, config=quick(batch_size=32, max_tokens=200, epochs=1))
    assert longest <= run.max_tokens <= 100 and run.micro_batch_size is None
    twin = tiny_model()
    asked = fit(twin, rows, config=quick(batch_size=32, max_tokens=run.max_tokens, epochs=1))
    assert steps(run) == pytest.approx(steps(asked), abs=1e-6)
    model, seen = limited(tiny_model(), rows=1)
    with pytest.warns(UserWarning, match="micro_batch_size 1 instead of"):
        run = fit(model, rows, config=quick(batch_size=32, max_tokens=longest, epochs=1))
    assert run.max_tokens == longest and run.micro_batch_size == 1 and seen[-1][0] == 1


def test_a_single_row_that_does_not_fit_says_what_helps(tiny_model):
    model, _ = limited(tiny_model(), rows=0)
    before, modes = weights(model), model.training
    message = r"one row of \d+ tokens at a time; try gradient_checkpointing=True, precision='bf16', .*'lora'"
    with warnings.catch_warnings(), pytest.raises(MemoryError, match=message):
        warnings.simplefilter("ignore")
        fit(model, make_rows(8), config=quick(batch_size=8))
    assert same(weights(model), before) and model.training == modes
    assert all(p.grad is None for p in model.parameters())


def test_several_processes_are_told_the_size_to_start_with(tiny_model, monkeypatch):
    feed = feed_of(tiny_model(), make_rows(8), batch_size=8)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    step = next(iter(feed))
    with pytest.raises(MemoryError, match=r"process 0 is out of memory with 4 rows at a time; .*micro_batch_size=2"):
        step.halve()
    assert feed.run.micro_batch_size is None


def test_what_counts_as_out_of_memory(tiny_model):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("x")) and not out_of_memory(RuntimeError("shapes differ"))
    model, seen = limited(tiny_model(), rows=2, error=raised.value)
    with pytest.warns(UserWarning, match="out of memory"):
        assert fit(model, make_rows(4), config=quick(epochs=1)).micro_batch_size == 2
    model, seen = limited(tiny_model(), rows=2, error=RuntimeError("another trouble"))
    with pytest.raises(RuntimeError, match="another trouble"):
        fit(model, make_rows(4), config=quick())
    assert len(seen) == 1


def test_a_resumed_run_goes_on_in_the_smaller_size(tiny_model, tmp_path, monkeypatch):
    rows, states, runs = make_rows(24), [], []
    for stop in (None, 2):
        options = dict(batch_size=8, checkpoint_dir=str(tmp_path / str(stop)), checkpoint_every=1, resume="auto")
        for limit in [stop, None] if stop else [None]:

            def stopped(number, step, limit=limit):
                if number == limit:
                    raise ValueError("stopped")

            model, _ = limited(tiny_model(hidden_dropout_prob=0.2), rows=3)
            with warnings.catch_warnings(), monkeypatch.context() as patch:
                before_steps(patch, stopped)
                warnings.simplefilter("error" if stop and not limit else "ignore")  # no second halving
                try:
                    runs.append(fit(model, rows, config=quick(**options)))
                except ValueError as error:
                    assert str(error) == "stopped"
        states.append(weights(model))
    assert same(*states) and [run.micro_batch_size for run in runs] == [2, 2]
    assert steps(runs[0]) == steps(runs[1])


# ------------------------------------------------------------------------------------------------------- look-ahead


def test_the_next_batches_are_there_before_a_result_is_looked_at(tiny_model, monkeypatch):
    events = []
    cut, norm = Step.cut, torch.nn.utils.get_total_norm
    monkeypatch.setattr(Step, "cut", lambda self: (events.append(len(self.rows)), cut(self))[1])
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *args: (events.append("norm"), norm(*args))[1])
    fit(tiny_model(), make_rows(9), config=quick(epochs=1))
    assert events == [4, 4, "norm", 1, "norm", "norm"]  # the last step looks at nothing beyond the run


def test_batches_made_for_another_size_are_made_again(tiny_model):
    feed = feed_of(tiny_model(), make_rows(16), batch_size=8)
    feed.ahead()
    feed.run.micro_batch_size = 3
    taken = iter(feed)
    step = next(taken)
    assert [len(batch["input_ids"]) for batch in step] == [3, 3, 2] and step.weights == [1.0] * 3
    found = [ids[mask.bool()].tolist() for batch in next(taken)
             for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert sorted(found) == sorted(row["input_ids"] for row in make_rows(16)[8:]) and feed.ready is None


def test_every_process_gets_its_rows_once(tiny_model, monkeypatch):
    model, rows, seen = tiny_model(), make_rows(7), []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        step = next(iter(feed_of(model, rows, batch_size=7, micro_batch_size=2)))
        assert len(step) == 2 and max(len(batch["input_ids"]) for batch in step) <= 2  # as many for all: one has 3 rows
        seen += [ids[mask.bool()].tolist() for batch, weight in zip(step, step.weights, strict=True) if weight
                 for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert sorted(seen) == sorted(row["input_ids"] for row in rows)
    alone = next(iter(feed_of(model, rows[:1], batch_size=7)))
    assert alone.weights == [0.0]  # rank 2 has no rows of its own: it takes part, and counts nothing


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_memory_that_runs_out_for_the_next_step_costs_no_rows(tiny_model, monkeypatch):
    rows, counted, real = make_rows(24), [], feeding.to_device

    def full(batch, device):
        counted.append(1)
        if len(counted) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batch, device)

    expected = fit(tiny_model(), rows, config=quick(epochs=1))
    monkeypatch.setattr(feeding, "to_device", full)
    run = fit(tiny_model(), rows, config=quick(epochs=1))
    assert steps(run, "tokens") == steps(expected, "tokens") and steps(run) == steps(expected)


def test_a_bad_row_of_a_stream_costs_no_step_before_it(tiny_model):
    seen = []
    rows = [*make_rows(8), {"input_ids": [], "labels": 0}, *make_rows(3)]
    with pytest.raises(ValueError, match="row 8, column 'input_ids': no tokens"):
        fit(tiny_model(), iter(rows), config=quick(max_steps=3, shuffle=False), on_record=seen.append)
    assert [record["step"] for record in seen] == [1, 2]


def test_a_stream_that_is_shorter_than_what_was_trained(tiny_model, tmp_path):
    config = quick(max_steps=4, checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    fit(tiny_model(), iter(make_rows(16)), config=config)
    with pytest.raises(ValueError, match="train_dataset ends before step 4, which a checkpoint has"):
        fit(tiny_model(), iter(make_rows(4)), config=config)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"precision": "bf16"}])
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_step_waits_for_the_gpu_once(tiny_model, monkeypatch, unpadded, options):
    """Whatever asks a tensor for its numbers waits for a GPU; only what came from the CPU is looked at there."""
    asked, rows = [], make_rows(40)

    def counting(name):
        ask = getattr(torch.Tensor, name)

        def call(tensor, *args, **kwargs):
            caller = sys._getframe(1)
            while caller.f_code.co_name in ("call", "<listcomp>"):
                caller = caller.f_back
            if not (caller.f_code.co_name == "of" and caller.f_locals.get("host") is not None):
                asked.append((name, caller.f_code.co_filename, caller.f_lineno))
            return ask(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, call)

    def moved(batch, device):
        if isinstance(batch, dict):
            return {key: moved(value, device) for key, value in batch.items()}
        there = batch.clone()
        there.host = batch
        return there

    monkeypatch.setattr(feeding, "to_device", moved)
    monkeypatch.setattr(speedups, "computed_in", lambda x: None)  # the CPU's shortcuts serve no GPU
    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        counting(name)
    counts = []
    for total in (3, 8):
        asked.clear()
        model = tiny_model(hidden_dropout_prob=0.1)
        fit(unpad(model) if unpadded else model, rows, config=quick(max_steps=total, batch_size=5, **options))
        counts.append(sum(unpadded or "masking_utils" not in file for _, file, _ in asked))  # where stock models ask
    assert counts[1] - counts[0] == 5, Counter(asked)
