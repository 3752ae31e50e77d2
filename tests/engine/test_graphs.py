"""A run with CUDA graphs takes the steps of one without; on a CPU a tape of operations stands in for CUDA's."""

import types
from contextlib import nullcontext

import pytest
import torch
from test_fit import LABELS, make_rows, quick, steps, weights
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftlib.core.batches import collate
from ftlib.engine import fit as training
from ftlib.engine import graphs
from ftlib.engine.fit import fit
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class Tape(TorchDispatchMode):
    """What runs inside is written down, with the tensors it reads and writes, and leaves nothing behind, as in CUDA."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.replays = [], {}, 0

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if function in WAITS or (function is aten.index.Tensor and masks):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.is_write:
                for tensor in tree_leaves(value):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            for kept, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)

    def pool(self):
        return "pool"


@pytest.fixture
def tapes(monkeypatch):
    """All that was recorded, in order; what `check` refuses is tested without this."""
    made = []

    class Capture:
        def __init__(self, tape, pool):
            assert pool == ("pool" if made else None)
            self.tape, self.capture_stream = tape, types.SimpleNamespace(wait_stream=lambda other: None)

        def __enter__(self):
            made.append(self.tape)
            self.tape.__enter__()

        def __exit__(self, *error):
            self.tape.__exit__(*error)

    for name, value in {"graph": Capture, "CUDAGraph": Tape, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(made) and not made[-1].replays)
    monkeypatch.setattr(graphs, "check", lambda *_: None)
    monkeypatch.setattr(training, "choose_device", lambda: torch.device("cpu"))  # also where a GPU is
    return made


def rows_of(*lengths, task="sequence-classification"):
    return [make_rows(1, task, seed=i, shortest=n, longest=n)[0] for i, n in enumerate(lengths)]


def both(make, rows, **options):
    """The runs without and with graphs, and their models."""
    models = [make(), make()]
    return [fit(m, rows, config=quick(cuda_graphs=m is models[1], **options)) for m in models], models


def assert_equal(runs, models, **tolerance):
    for key in ("loss", "grad_norm", "learning_rate"):
        assert steps(runs[1], key) == pytest.approx(steps(runs[0], key), rel=1e-5, abs=1e-6), key
    before, after = map(weights, models)
    for name in before:
        assert_close(after[name], before[name], atol=1e-6, rtol=1e-5, msg=name)
    assert all(p.grad is None for p in models[1].parameters())


CASES = {
    **{task: (task, None, {}) for task in LABELS},
    **{f"{task}, micro-batches": (task, None, {"micro_batch_size": 3}) for task in LABELS},
    "smoothing": ("sequence-classification", None, {"label_smoothing": 0.1, "weight_decay": 0.1}),
    **{
        how: ("token-classification", lambda model, how=how: tune(model, how), {"epochs": 3})
        for how in ("lora", "bitfit", "last-layers", "gradual-unfreezing", "l2-sp")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_without_graphs(tiny_model, tapes, name):
    task, change, options = CASES[name]

    def make():
        model = tiny_model(task, LABELS[task])
        if change:
            change(model)
        return model

    # with SGD a difference in the gradients is one of the weights; AdamW makes much of rounding near 0
    runs, models = both(make, make_rows(14, task, longest=37), optimizer="sgd", **options)
    assert_equal(runs, models)
    assert tapes and sum(tape.replays for tape in tapes) == sum(steps(runs[1], "micro_batches"))


def test_adamw_and_other_models(tiny_model, tapes):
    for model_type in ("distilbert", "albert"):
        runs, models = both(lambda kind=model_type: tiny_model(model_type=kind), make_rows(10), learning_rate=1e-3)
        assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-6)
        for name, value in weights(models[0]).items():
            assert_close(weights(models[1])[name], value, atol=1e-4, rtol=0, msg=name)
        tapes.clear()


def test_answers_and_further_columns(tapes):
    """Labels are two positions a row, `token_type_ids` a number a token."""
    from conftest import tiny_config
    from transformers import BertForQuestionAnswering

    rows = [row | {"labels": [1, len(row["input_ids"]) - 1]} for row in make_rows(10, shortest=4, longest=30)]
    rows = [row | {"token_type_ids": [0] + [1] * (len(row["input_ids"]) - 1)} for row in rows]

    def make():
        torch.manual_seed(0)
        return BertForQuestionAnswering(tiny_config())

    assert_equal(*both(make, rows, optimizer="sgd"))


def test_few_shapes_are_recorded_once(tiny_model, tapes, monkeypatch):
    monkeypatch.setattr(graphs, "MULTIPLE", 8)
    rows = rows_of(8, 9, 3, 1, 20, 2, 16, 5, 17, 11)  # by twos: 9, 3, 20, 16, 17 -> 16, 8, 24 but no row has it: 20
    runs, models = both(tiny_model, rows, batch_size=2, shuffle=False, optimizer="sgd")
    assert_equal(runs, models)
    read = [[x for _, args, *_ in tape.operations for x in tree_leaves(args) if hasattr(x, "shape")] for tape in tapes]
    ids = [{tuple(x.shape) for x in tensors if x.dtype == torch.int64} for tensors in read]
    assert [[long for long in (8, 16, 20) if (2, long) in shapes] for shapes in ids] == [[16], [8], [20]]
    assert [tape.replays for tape in tapes] == [4, 2, 4]  # of two epochs


def test_a_last_batch_is_filled_up_and_counts_as_it_is(tiny_model, tapes):
    rows = rows_of(5, 6, 7, 8, 4)
    runs, models = both(tiny_model, rows, batch_size=4, shuffle=False, optimizer="sgd")
    assert_equal(runs, models)
    assert len(tapes) == 1 and steps(runs[1], "examples") == [4, 1, 4, 1]


def test_shapes_beyond_the_most_run_without(tiny_model, tapes, monkeypatch):
    monkeypatch.setattr(graphs, "MULTIPLE", 4)
    monkeypatch.setattr(graphs, "MOST", 2)
    rows = make_rows(12, "token-classification", longest=30)
    runs, models = both(
        lambda: tiny_model("token-classification", 3), rows, batch_size=4, micro_batch_size=1, optimizer="sgd"
    )
    assert_equal(runs, models)
    assert len(tapes) == 2 and sum(tape.replays for tape in tapes) < sum(steps(runs[1], "micro_batches"))


def feed_of(rows, size=None, pad=0):
    config, padding = types.SimpleNamespace(batch_size=rows), types.SimpleNamespace(id=pad)
    run = types.SimpleNamespace(config=config)
    return types.SimpleNamespace(run=run, pad=padding, device=torch.device("cpu"), sizes=lambda: (size, None))


def test_a_padded_batch_by_hand(monkeypatch):
    monkeypatch.setattr(graphs, "MULTIPLE", 4)
    rows = [{"input_ids": [5, 6, 7], "labels": [1, -100, 0], "box": [[1, 2]] * 3}, {"input_ids": [8], "labels": [1],
            "box": [[3, 4]]}]  # fmt: skip
    found = graphs.padded(collate(rows), feed_of(3, pad=9), longest=100)
    assert found["input_ids"].tolist() == [[5, 6, 7, 9], [8, 0, 0, 9], [5, 6, 7, 9]]  # the zeros are collate's own
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert found["labels"].tolist() == [[1, -100, 0, -100], [1, -100, -100, -100], [-100] * 4]
    assert found["box"].tolist() == [[[1, 2]] * 3 + [[0, 0]], [[3, 4]] + [[0, 0]] * 3, [[1, 2]] * 3 + [[0, 0]]]
    assert graphs.padded(collate(rows), feed_of(9, size=2), longest=3)["input_ids"].shape == (2, 3)


def test_numbers_are_neither_filled_up_nor_padded(monkeypatch):
    monkeypatch.setattr(graphs, "MULTIPLE", 4)
    rows = [{"input_ids": [5, 6, 7], "labels": [1.0, 0.0, 1.0]}, {"input_ids": [8], "labels": [0.0, 0.0, 1.0]}]
    found = graphs.padded(collate(rows), feed_of(3), longest=100)  # as many labels as tokens
    assert found["input_ids"].shape == (2, 4) and found["labels"].tolist() == [[1, 0, 1], [0, 0, 1]]


def test_a_stream_is_padded_no_further_than_the_model_goes(tiny_model, tapes):
    rows = rows_of(37, 35, 40, 38)
    runs, models = both(tiny_model, (row for _ in range(9) for row in rows), max_steps=2, shuffle_buffer=1)
    assert len(runs[1].history) == 2 and len(tapes) == 1  # 40 positions
    assert all(torch.isfinite(value).all() for value in weights(models[1]).values())


def test_evaluation_and_the_way_it_was(tiny_model, tapes):
    rows, state = make_rows(12), torch.get_rng_state()
    metrics, model = [], None
    for on in (False, True):
        model = tiny_model()
        run = fit(model, rows, eval_dataset=rows, config=quick(cuda_graphs=on, eval_every=2, optimizer="sgd"))
        metrics.append([record for record in run.history if "eval_loss" in record])
    for one, other in zip(*metrics, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and not model.training


def test_a_resumed_run_is_the_whole_one(tiny_model, tapes, tmp_path):
    rows, options = make_rows(16), dict(cuda_graphs=True, checkpoint_every=1, resume="auto")

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    whole, model = tiny_model(), tiny_model()
    expected = fit(whole, rows, config=quick(cuda_graphs=True))
    for interrupt in (stop, None):
        tapes.clear()  # they were of another call
        run = fit(model, rows, config=quick(**options, checkpoint_dir=str(tmp_path)), on_record=interrupt)
    assert steps(run) == steps(expected) and weights(model).keys() == weights(whole).keys()
    assert all(torch.equal(weights(model)[name], value) for name, value in weights(whole).items())


def test_memory_that_runs_out(tiny_model, tapes):
    """While recording a second shape: the first is forgotten, and the step is done again, halved."""
    rows, calls = rows_of(5, 6, 7, 8, 33, 34, 35, 36), []

    def make(fails):
        model = tiny_model()

        def look(module, args, kwargs):
            calls.append(tuple(kwargs["input_ids"].shape))
            if fails and calls[-1] == (4, 36):
                tapes.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(look, with_kwargs=True)
        return model

    options = dict(epochs=1, shuffle=False, optimizer="sgd", batch_size=4)
    models = [make(False), make(True)]
    plain = fit(models[0], rows, config=quick(**options))
    with pytest.warns(UserWarning, match="micro_batch_size 2 instead of 4"):
        run = fit(models[1], rows, config=quick(cuda_graphs=True, **options))
    assert_equal([plain, run], models)
    assert run.micro_batch_size == 2 and len(tapes) == 1 and (2, 36) in calls


def test_what_can_not_be_recorded_is_said(tiny_model, tapes):
    model = tiny_model()
    model.register_forward_hook(lambda module, args, out: [out, float(out.logits.detach().sum())][0])
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing") as found:
        fit(model, make_rows(8), config=quick(cuda_graphs=True))
    assert "asks the GPU for a number" in found.value.__notes__[0]


def test_random_numbers_of_the_cpu_are_refused(tiny_model, tapes):
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: [None, torch.rand(())][0])
    with pytest.raises(ValueError, match="repeat what the model draws on the CPU"):
        fit(model, make_rows(8), config=quick(cuda_graphs=True))
    assert not tapes


REFUSED = {
    "needs a CUDA GPU, and the device is 'cpu'": {},
    "does not go with compile": {"compile": True},
    "does not go with gradient_checkpointing": {"gradient_checkpointing": True},
    "does not go with max_tokens": {"max_tokens": 64},
    "does not go with r_drop": {"r_drop": 1.0, "dropout": 0.1},
    "is for one process": {"distributed": "fsdp"},
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the first one works")
def test_options_that_are_refused(tiny_model, tmp_path, reason):
    model, folder = tiny_model(), tmp_path / "run"
    before = weights(model)
    with pytest.raises(ValueError, match=f"cuda_graphs=True {reason}.*leave cuda_graphs off"):
        fit(model, make_rows(8), config=quick(cuda_graphs=True, checkpoint_dir=str(folder), **REFUSED[reason]))
    assert not folder.exists() and all(torch.equal(weights(model)[name], value) for name, value in before.items())


def test_models_and_losses_that_are_refused(tiny_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, config = make_rows(8, shortest=2), quick(cuda_graphs=True)
    own = lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels, reduction="sum")  # noqa: E731
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=40, pad_token_id=0))
    several = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head()})
    for reason, model, data, options in (
        ("no unpadded batch has", unpad(tiny_model()), rows, {}),
        ("the task's own loss", tiny_model(), rows, {"loss": own}),
        ("language model's loss picks", decoder, [row | {"labels": row["input_ids"]} for row in rows], {}),
        ("the gradient of one task", several, {"a": rows, "b": rows}, {}),
    ):
        with pytest.raises(ValueError, match=f"cuda_graphs=True .*{reason}.*leave cuda_graphs off"):
            fit(model, data, config=config, **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "fp16"}, "no loss scaling"),
        ({"side": "left"}, "pads further on the right"),
        ({"alike": True}, "pads further on the right"),
        ({"world": 2}, "for one process"),
        ({}, None),
    ],
)
def test_what_a_feed_says_is_refused(monkeypatch, change, reason):
    run = types.SimpleNamespace(config=quick(), precision=change.get("precision", "bf16"))
    pad = types.SimpleNamespace(side=change.get("side", "right"), alike=change.get("alike", False))
    tasks, device = {"": ("sequence-classification", 2)}, torch.device("cuda")
    feed = types.SimpleNamespace(run=run, pad=pad, tasks=tasks, device=device, packed=False)
    monkeypatch.setattr(graphs.distributed, "world_size", lambda: change.get("world", 1))
    with pytest.raises(ValueError, match=reason) if reason else nullcontext():
        graphs.check(types.SimpleNamespace(unseen=set()), feed)
