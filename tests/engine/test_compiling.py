"""Gradient checkpointing and compiled layers change time and memory; the numbers and the model stay."""

import copy
import pickle

import pytest
import torch
import torch._dynamo
from test_fit import LABELS, make_rows, quick, raising, steps, weights
from torch._dynamo.utils import counters
from torch.testing import assert_close

from ftlib.engine.compiling import training_modes
from ftlib.engine.fit import fit
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.unpadding import unpad

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile captures its graphs as ever, and runs them uncompiled: quick, and to the bit as without."""
    real, asked = torch.compile, []

    def compile_(function, **options):
        asked.append(options)
        return real(function, backend="eager", dynamic=options.get("dynamic"))

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", compile_)
    yield asked
    torch._dynamo.reset()


def attributes(model):
    """All that hangs on the modules themselves, hooks and parameters aside."""
    names = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func", "_compiled_call_impl", "training")
    return [(name, {key: vars(m).get(key) for key in names}) for name, m in model.named_modules()]


# ------------------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_gradient_checkpointing_changes_no_number(tiny_model, model_type, unpadded):
    dropout = {"dropout": 0.2} if model_type == "distilbert" else {"hidden_dropout_prob": 0.2}
    runs, states, calls = [], [], []
    for wanted in (False, True):
        model = tiny_model(model_type=model_type, **dropout)
        if unpadded:
            unpad(model)
        ends, count = ("layer.0.output.dense", "layer.0.ffn.lin2"), []
        dense = next(module for name, module in model.named_modules() if name.endswith(ends))
        dense.register_forward_hook(lambda *args, count=count: count.append(1))
        before = attributes(model)
        runs.append(fit(model, make_rows(12), config=quick(gradient_checkpointing=wanted)))
        states.append(weights(model))
        calls.append(len(count))
        assert attributes(model) == before
    assert calls == [6, 12]  # every layer's forward pass runs a second time
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=1e-6)
    for name in states[0]:
        assert_close(states[1][name], states[0][name], atol=1e-5, rtol=0, msg=name)


def test_gradient_checkpointing_of_several_tasks_and_of_peft(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head()})
    with training_modes(model, quick(gradient_checkpointing=True)):
        assert model.encoder.encoder.layer[0].gradient_checkpointing
    assert not model.encoder.encoder.layer[0].gradient_checkpointing
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    run = fit(model, make_rows(8), config=quick(gradient_checkpointing=True, warmup_fraction=0.0))
    assert run.steps == 4 and max(steps(run, "grad_norm")) > 0


def test_what_the_caller_had_switched_on_stays_on(tiny_model):
    model = tiny_model()
    for layer in model.bert.encoder.layer:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, print
    with training_modes(model, quick(gradient_checkpointing=True)):
        assert model.bert.encoder.layer[0]._gradient_checkpointing_func is not print
    assert all(x.gradient_checkpointing and x._gradient_checkpointing_func is print for x in model.bert.encoder.layer)


def test_a_model_without_gradient_checkpointing_is_refused(tiny_model):
    with pytest.raises(ValueError, match="albert models have no gradient checkpointing"):
        fit(tiny_model(model_type="albert"), make_rows(4), config=quick(gradient_checkpointing=True))


# ---------------------------------------------------------------------------------------------------- TF32 and words


def test_tf32_is_on_for_the_run_and_back_afterwards(tiny_model):
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError, match="mine"), training_modes(tiny_model(), quick(precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError("mine")
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_reason_for_another_precision_is_printed(tiny_model, capsys):
    fit(tiny_model(), make_rows(4), config=quick(epochs=1, precision="bf16", progress=True))
    assert capsys.readouterr().out == "precision bf16: as asked\n"
    fit(tiny_model(), make_rows(4), config=quick(epochs=1, progress=True))
    fit(tiny_model(), make_rows(4), config=quick(epochs=1, precision="bf16"))
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("unpadded", [False, True])
def test_ragged_batches_compile_nothing_new(tiny_model, eager_backend, unpadded):
    rows = make_rows(120, shortest=2, longest=30)
    model, twin = tiny_model(num_hidden_layers=5), tiny_model(num_hidden_layers=5)
    if unpadded:
        unpad(model), unpad(twin)
    before, seen, shapes = attributes(model), [], set()  # seen: graphs after each batch

    def note(module, args, kwargs, output):
        seen.append(counters["stats"]["unique_graphs"])
        shapes.add(tuple(kwargs["input_ids"].shape))

    model.register_forward_hook(note, with_kwargs=True)
    run = fit(model, rows, config=quick(epochs=1, compile=True))
    plain = fit(twin, rows, config=quick(epochs=1, shortcuts=False))
    assert len(seen) == 30 and len(shapes) > 10
    assert seen == [seen[0]] * 30 and 1 <= seen[0] <= 2  # five layers: one graph, and one for the first where packed
    assert sum(counters["graph_break"].values()) == 0
    assert steps(run) == pytest.approx(steps(plain), abs=1e-6) and len(eager_backend) == 5
    assert attributes(model) == before
    for name, value in weights(model).items():
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, of which AdamW makes steps
            assert_close(value, weights(twin)[name], atol=1e-5, rtol=0, msg=name)
    pickle.loads(pickle.dumps(copy.deepcopy(model.bert)))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"precision": "bf16", "max_tokens": 40}])
def test_compiled_layers_under_other_choices(tiny_model, eager_backend, options):
    rows, runs = make_rows(24, "token-classification", shortest=2), []
    for wanted in (False, True):
        model = unpad(tiny_model("token-classification", LABELS["token-classification"]))
        runs.append(fit(model, rows, eval_dataset=rows[:6], config=quick(batch_size=8, compile=wanted, **options)))
    close = 1e-2 if "precision" in options else 1e-6  # half precision is rounded at other places
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=close)
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], abs=close)


@pytest.mark.parametrize("model_type", ["albert", "modernbert"])
def test_other_layers_are_found(tiny_model, eager_backend, model_type):
    rows = make_rows(12, shortest=2)
    model, twin = tiny_model(model_type=model_type), tiny_model(model_type=model_type)
    run = fit(model, rows, config=quick(epochs=1, compile=True))
    assert steps(run) == pytest.approx(steps(fit(twin, rows, config=quick(epochs=1))), abs=1e-6)
    assert all(options == {"dynamic": True} for options in eager_backend) and eager_backend


def test_a_model_without_layers_is_compiled_whole(eager_backend):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    expected = model(torch.ones(3, 2))
    with training_modes(model, quick(compile=True)):
        assert "forward" in vars(model) and torch.equal(model(torch.ones(3, 2)), expected)
        assert counters["stats"]["unique_graphs"] == 1
    assert "forward" not in vars(model)


def test_many_models_in_one_process_are_all_compiled(eager_backend):
    for width in range(2, 14):  # the usual limit is 8 variants of the same code
        model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(width, width)]))
        (layer,) = model[0]
        with training_modes(model, quick(compile=True)):
            layer(torch.ones(3, width))
    assert counters["stats"]["unique_graphs"] == 12
    assert torch._dynamo.config.recompile_limit < 64


def test_an_error_leaves_an_uncompiled_model(tiny_model, eager_backend):
    model = tiny_model()
    model.bert.encoder.layer[0].forward = mine = model.bert.encoder.layer[0].forward
    before = attributes(model)
    with pytest.raises(RuntimeError, match="mine"):
        config = quick(compile=True, gradient_checkpointing=True)
        fit(model, make_rows(8), config=config, loss=raising(RuntimeError("mine")))
    assert attributes(model) == before and vars(model.bert.encoder.layer[0])["forward"] is mine


def test_out_of_memory_in_a_compiled_run(tiny_model, eager_backend):
    rows, runs = make_rows(16, shortest=2), []
    for wanted in (False, True):
        model = tiny_model()

        def check(module, args, kwargs):
            if len(kwargs["input_ids"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(check, with_kwargs=True)
        with pytest.warns(UserWarning, match="micro_batch_size 4 instead of 8"):
            runs.append(fit(model, rows, config=quick(batch_size=8, compile=wanted)))
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=1e-6)


# ------------------------------------------------------------------------------------------------------- on a GPU


@CUDA
@pytest.mark.parametrize("unpadded", [False, True])
def test_compiled_layers_on_cuda(tiny_model, unpadded):
    torch._dynamo.reset()
    rows, runs = make_rows(48, shortest=2, longest=37), []
    for how in (False, True):
        model = tiny_model().cuda()
        if unpadded:
            unpad(model)
        runs.append(fit(model, rows, config=quick(compile=how, precision="fp32")))
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-4)


@CUDA
def test_tf32_and_memory_on_cuda(tiny_model):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 came with compute capability 8.0")
    runs = [fit(tiny_model().cuda(), make_rows(16), config=quick(precision=p)) for p in ("fp32", "tf32")]
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=0.02) and runs[1].precision == "tf32"
    assert 0 < runs[1].peak_memory_mb < 1000
