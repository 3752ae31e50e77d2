"""Rows that stream by and rows that stay in Arrow: the same training, without a list of them all."""

import itertools
import math
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict
from test_fit import LABELS, before_steps, make_rows, quick, same, steps, weights

from ftlib.engine import prediction
from ftlib.engine.fit import fit
from ftlib.engine.prediction import batches_of, evaluate, predict
from ftlib.inputs.rows import Rows, parts_for, rows_for
from ftlib.inputs.tokenizing import tokenize
from ftlib.methods.multitask import Head, MultiTaskModel

TEXTS = ["the film is good", "bad", "a dull plot", "not very fun", "great film", "we book a flight"]


class Source:
    """Rows that can be read again from the start, and how many were read."""

    def __init__(self, rows):
        self.rows, self.pulled, self.begun = rows, 0, 0

    def __iter__(self):
        self.begun += 1
        for row in self.rows:
            self.pulled += 1
            yield row


def iterable(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def once(rows):
    return (row for row in rows)


def texts(count=24):
    return [{"text": TEXTS[i % 6], "label": i % 2, "note": "x"} for i in range(count)]


# ---------------------------------------------------------------------------------------------------- tokenizing


def test_a_stream_is_tokenized_as_it_is_read(tiny_tokenizer):
    pulled = []

    def source():
        for row in texts(3_000):
            pulled.append(row)
            yield row

    stream = tokenize(IterableDataset.from_generator(source), tiny_tokenizer)
    assert isinstance(stream, IterableDataset) and len(pulled) <= 1  # its columns, at most
    rows = list(itertools.islice(stream, 5))
    assert len(pulled) <= 1_001 + 1_000
    table = tokenize(Dataset.from_list(texts(5)), tiny_tokenizer)
    assert [dict(row) for row in rows] == [dict(row) for row in table]
    assert list(itertools.islice(stream, 5)) == rows  # again from the start


def test_streams_by_split_and_of_tags(tiny_tokenizer):
    words = [{"tokens": ["films", "is", "fun"], "tags": [1, 0, 2]}] * 3
    (first, *_) = tokenize(iterable(words), tiny_tokenizer, label="tags")
    assert first["labels"] == [-100, 1, -100, 0, 2, -100]
    several = IterableDatasetDict(train=iterable(texts(4)), test=iterable(texts(2)))
    done = tokenize(several, tiny_tokenizer, max_length=3)
    assert isinstance(done, IterableDatasetDict)
    assert [len(row["input_ids"]) for row in done["test"]] == [3, 3]


def test_a_bad_text_of_a_stream_is_named_when_it_comes(tiny_tokenizer):
    rows = texts(2_003)
    rows[2_002]["text"] = " "
    stream = iter(tokenize(iterable(rows), tiny_tokenizer))
    assert len(list(itertools.islice(stream, 1_000))) == 1_000
    with pytest.raises(ValueError, match="row 2002, column 'text': the text is empty"):
        list(stream)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("make", [iterable, once, Source])
def test_an_unshuffled_stream_trains_as_its_rows_do(tiny_model, make):
    rows = make_rows(20)
    model, twin = tiny_model(), tiny_model()
    run = fit(model, make(rows), config=quick(max_steps=5, shuffle=False))
    expected = fit(twin, rows, config=quick(max_steps=5, shuffle=False))
    assert steps(run) == steps(expected) and same(weights(model), weights(twin))
    assert run.stopped == "finished" and run.steps == 5


def test_a_tokenized_stream_trains_and_is_evaluated(tiny_model, tiny_tokenizer):
    stream = tokenize(iterable(texts()), tiny_tokenizer)
    held_out = tokenize(Dataset.from_list(texts(6)), tiny_tokenizer)
    run = fit(
        tiny_model(), stream, eval_dataset=held_out, tokenizer=tiny_tokenizer,
        config=quick(max_steps=8, eval_every=4, shuffle_buffer=8),
    )  # fmt: skip
    assert run.steps == 8 and [r["step"] for r in run.history if "eval_loss" in r] == [4, 8]
    assert all(map(math.isfinite, steps(run)))


@pytest.mark.parametrize("kind", ["sequence-classification", "token-classification", "regression"])
def test_every_kind_streams(tiny_model, kind):
    rows = make_rows(12, kind)
    model = tiny_model(kind, LABELS[kind])
    before = evaluate(model, rows)["loss"]
    run = fit(model, Source(rows), config=quick(max_steps=9, micro_batch_size=2))
    assert run.steps == 9 and evaluate(model, rows)["loss"] < before


def test_rows_are_read_when_a_step_needs_them(tiny_model, monkeypatch):
    """A step's own and the buffer's, and those of the step after it, which is made ahead."""
    rows, seen = Source(make_rows(500)), []
    before_steps(monkeypatch, lambda number, step: seen.append(rows.pulled))
    fit(tiny_model(), rows, config=quick(max_steps=6, shuffle_buffer=20))
    assert seen == [23 + 4 * number for number in range(6)] and rows.begun == 1
    assert rows.pulled == 23 + 4 * 5  # nothing is read for a step that does not come


def test_without_shuffling_nothing_is_held(tiny_model, monkeypatch):
    rows, seen = Source(make_rows(500)), []
    before_steps(monkeypatch, lambda number, step: seen.append(rows.pulled))
    fit(tiny_model(), rows, config=quick(max_steps=4, shuffle=False))
    assert seen == [4, 8, 12, 16]


def test_the_buffer_and_the_seed_say_the_order(tiny_model):
    rows = [{"input_ids": [5 + i], "labels": 0} for i in range(40)]

    def order(**options):
        model, seen = tiny_model(), []
        model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.extend(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
        )
        fit(model, once(rows), config=quick(max_steps=10, **options))
        return seen

    first = order(shuffle_buffer=10)
    assert sorted(first) == [5 + i for i in range(40)] and first == order(shuffle_buffer=10)
    assert first != order(shuffle_buffer=10, seed=1) and first != sorted(first)
    assert all(place - 5 < i + 10 for i, place in enumerate(first))  # none before it was read
    assert order(shuffle_buffer=1) == sorted(first) == order(shuffle=False)


def test_a_stream_begins_again_where_it_ends(tiny_model):
    rows = Source(make_rows(10))
    run = fit(tiny_model(), rows, config=quick(max_steps=10))
    assert run.steps == 10 and run.stopped == "finished" and rows.begun >= 4
    assert steps(run, "examples") == [4] * 10


def test_a_generator_that_ends_ends_the_run(tiny_model, tmp_path):
    held_out = make_rows(4, seed=1)
    config = quick(max_steps=10, checkpoint_dir=str(tmp_path), checkpoint_every=100)
    run = fit(tiny_model(), once(make_rows(10)), eval_dataset=held_out, config=config)
    assert run.stopped == "no more rows" and run.steps == 3 and steps(run, "examples") == [4, 4, 2]
    assert run.history[-1]["step"] == 3 and "eval_loss" in run.history[-1] and "loss" in run.metrics
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("options", [{}, {"eval_dataset": make_rows(3)}])
def test_a_stream_without_a_row(tiny_model, options):
    for source in (once([]), Source([])):
        with pytest.raises(ValueError, match="train_dataset has zero examples"):
            fit(tiny_model(), source, config=quick(max_steps=3), **options)


def test_a_stream_of_unknown_length_needs_max_steps(tiny_model, tiny_tokenizer):
    for stream in (iterable(make_rows(8)), tokenize(iterable(texts()), tiny_tokenizer)):
        with pytest.raises(ValueError, match=r"train_dataset is a .*IterableDataset, of unknown length; .*max_steps"):
            fit(tiny_model(), stream, config=quick())
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head()})
    with pytest.raises(ValueError, match=r"train_dataset\['b'\] is a stream; .* load it whole"):
        fit(model, {"a": make_rows(4), "b": iterable(make_rows(4))}, config=quick(max_steps=2))


def test_a_generator_without_max_steps_is_read_to_its_end(tiny_model):
    rows = make_rows(10)
    model, twin = tiny_model(), tiny_model()
    run = fit(model, once(rows), config=quick())
    fit(twin, rows, config=quick())
    assert run.steps == 6 and same(weights(model), weights(twin))


@pytest.mark.parametrize("place", [0, 9, 17])
def test_a_bad_row_is_named_by_its_number_when_it_comes(tiny_model, place):
    rows = make_rows(24)
    rows[place] = rows[place] | {"labels": 7}
    model = tiny_model()
    before = weights(model)
    with pytest.raises(ValueError, match=f"train_dataset row {place}, column 'labels': label 7 is outside 0..1"):
        fit(model, once(rows), config=quick(max_steps=6, shuffle=False, warmup_fraction=0.0))
    assert same(weights(model), before) == (place < 8)  # of the steps before it, and the one made ahead of it


def test_a_row_of_a_stream_that_is_not_finite_has_no_number(tiny_model):
    bad = iter([False, True, False])

    def loss(logits, labels):
        value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return value * math.nan if logits.requires_grad and next(bad) else value

    with pytest.warns(UserWarning, match="step 2: loss nan"):
        run = fit(tiny_model(), Source(make_rows(12)), config=quick(max_steps=3), loss=loss)
    assert run.steps == 3 and run.history[1]["skipped"] == [-1] * 4


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize("shuffle_buffer", [1, 6, 1000])
def test_resuming_a_stream_is_exact(tiny_model, tmp_path, monkeypatch, stop, shuffle_buffer):
    """Over the end of a pass too: it is read again to where it stopped."""
    rows, build = make_rows(22), lambda: tiny_model(hidden_dropout_prob=0.1)
    options = dict(max_steps=12, shuffle_buffer=shuffle_buffer)
    whole = build()
    undisturbed = fit(whole, Source(rows), config=quick(**options))

    def interrupt(number, step):
        if number == stop:
            raise KeyboardInterrupt

    config = quick(**options, checkpoint_dir=str(tmp_path), resume="auto")
    model = build()
    with monkeypatch.context() as patch:
        before_steps(patch, interrupt)
        stopped = fit(model, Source(rows), config=config)
    assert stopped.stopped == "interrupted" and stopped.steps == stop
    model = build()
    run = fit(model, Source(rows), config=config)
    assert run.steps == 12 and steps(run) == steps(undisturbed)
    assert same(weights(model), weights(whole))


def test_a_stream_for_evaluation_is_read_whole(tiny_model):
    rows = make_rows(9)
    model = tiny_model()
    assert evaluate(model, once(rows)) == evaluate(model, rows)
    run = fit(tiny_model(), make_rows(8), eval_dataset=once(rows), config=quick(eval_every=1))
    assert len([record for record in run.history if "eval_loss" in record]) == 4
    assert predict(model, once(rows)).tolist() == predict(model, rows).tolist()


# --------------------------------------------------------------------------------------------------------- Arrow


def padded_by_hand(rows, kind, width=12):
    """Filled up to a width, on either side, with a mask that says so."""
    out = []
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        before, after = ([0] * (width - length), [])[:: 1 if i % 2 else -1]
        mask = [*before, *[1] * length, *after]
        labels = row["labels"]
        if kind == "token-classification":
            labels = [-100] * len(before) + labels + [-100] * len(after)
        out.append({"input_ids": [*before, *row["input_ids"], *after], "attention_mask": mask, "labels": labels})
    return out


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("how", ["plain", "selected", "shuffled", "formatted", "masked"])
def test_a_dataset_trains_as_the_list_of_its_rows(tiny_model, kind, how):
    rows = make_rows(18, kind)
    if how == "masked":
        data = Dataset.from_list(padded_by_hand(rows, kind))
    else:
        data = Dataset.from_list([row | {"text": "x"} for row in rows])
    if how == "selected":
        picked = [17, 3, 3, 8, 0, 11, 5]
        data, rows = data.select(picked), [rows[i] for i in picked]
    elif how == "shuffled":
        data = data.add_column("place", list(range(18))).shuffle(seed=5)
        rows = [rows[i] for i in data["place"]]
    elif how == "formatted":
        data = data.with_format("torch")
    models, runs = [], []
    for source in (rows, data):
        model = tiny_model(kind, LABELS[kind])
        runs.append(fit(model, source, eval_dataset=source, config=quick(micro_batch_size=3)))
        models.append(model)
    assert steps(runs[0]) == steps(runs[1]) and runs[0].metrics == runs[1].metrics
    assert same(*map(weights, models))


def test_struct_labels_of_several_tasks_train_as_dicts_do(tiny_model):
    heads = {"a": Head(), "b": Head("token-classification", 3)}
    rows = [row | {"labels": {"a": row["labels"]}} for row in make_rows(6)]
    rows += [row | {"labels": {"b": row["labels"]}} for row in make_rows(6, "token-classification", seed=1)]
    data = Dataset.from_list([r | {"labels": {"a": r["labels"].get("a"), "b": r["labels"].get("b")}} for r in rows])
    states, runs = [], []
    for source in (rows, data):
        model = MultiTaskModel(tiny_model("encoder"), heads)
        runs.append(fit(model, source, eval_dataset=source, config=quick(batch_size=5)))
        states.append(weights(model))
    assert steps(runs[0]) == steps(runs[1]) and runs[0].metrics == runs[1].metrics and same(*states)


def test_rows_of_a_dataset_stay_where_they_are(tiny_model):
    model, rows = tiny_model(), make_rows(50)
    data = Dataset.from_list([row | {"text": "x" * 1000} for row in rows])
    (part,) = parts_for(data, model, name="rows").values()
    assert isinstance(part, Rows) and part.kept == [] and part.table is not None
    assert part.table.column_names == ["input_ids", "labels"]
    assert part.lengths.dtype == np.int32 and part.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    first = part[0]
    assert first["input_ids"].tolist() == rows[0]["input_ids"] and first["labels"] == rows[0]["labels"]
    assert not first["input_ids"].flags.owndata  # a view of Arrow's memory
    (listed,) = parts_for(rows, model, name="rows").values()
    assert listed.table is None and len(listed.kept) == 50


def test_any_order_of_rows_is_read(tiny_model):
    rows = make_rows(30)
    (part,) = rows_for(Dataset.from_list(rows).select(range(29, -1, -1)), tiny_model(), name="rows")
    plain = lambda found: [row["input_ids"].tolist() for row in found]  # noqa: E731
    back = [row["input_ids"] for row in rows[::-1]]
    assert plain(part.take([3, 3, 0, 29])) == [back[3], back[3], back[0], back[29]]
    assert plain(part[5:9]) == back[5:9] and plain([part[-1]]) == [back[-1]]
    assert plain(part) == back and part.take([]) == [] and len(part) == 30
    with pytest.raises(IndexError):
        part[30]


def test_the_rows_of_a_run_are_not_held_as_lists(tiny_model):
    """A row of 30 tokens as Python's objects would take a kilobyte and more; Arrow's views are made for a step."""
    count = 20_000
    ids = [[5 + (i + k) % 50 for k in range(30)] for i in range(count)]
    data = Dataset.from_dict({"input_ids": ids, "labels": [i % 2 for i in range(count)]})
    del ids
    model = tiny_model()
    fit(model, data.select(range(100)), config=quick(max_steps=2))
    tracemalloc.start()
    try:
        fit(model, data, config=quick(max_steps=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400 * count


# ---------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_of_tags_holds_no_logits_but_a_batch_of_them(tiny_model, monkeypatch):
    """The logits of 1,500 rows of 30 tokens and 50 classes are 9 MB; decisions and labels are a tenth of it."""
    rows = [
        {"input_ids": [5 + (i + k) % 50 for k in range(30)], "labels": [k % 50 for k in range(30)]} for i in range(1500)
    ]
    model, alive, most = tiny_model("token-classification", 50), [], 0
    real = batches_of

    def counted(*args, **options):
        nonlocal most
        for indices, own, logits in real(*args, **options):
            alive.append(weakref.ref(logits))
            most = max(most, sum(ref() is not None for ref in alive))
            yield indices, own, logits
            del logits

    (part,) = rows_for(Dataset.from_list(rows), model, name="rows")
    evaluate(model, rows[:10])
    monkeypatch.setattr(prediction, "batches_of", counted)
    tracemalloc.start()
    try:
        found = prediction.scores(model, [part])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(alive) > 20 and most <= 2 and peak < 1500 * 30 * 50 * 4
    monkeypatch.undo()
    assert evaluate(model, rows) == found
