"""Weights that come in half precision train in float32, and what `Run.precision` says of them is true."""

import copy

import pytest
import torch
from test_fit import make_rows, quick, same, steps, weights

from ftlib.core import device
from ftlib.engine.fit import fit
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import STRATEGIES, tune

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
OTHERS = {
    "distilbert": {}, "albert": {}, "electra": {}, "roberta": {"max_position_embeddings": 44},
    "llama": SIZES, "qwen3": SIZES | {"head_dim": 16},
    "gpt2": dict(
        n_embd=32, n_layer=2, n_head=2, n_positions=40, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "t5": dict(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, eos_token_id=1, decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def a_cpu_without_fast_bfloat16(monkeypatch):
    """Nobody has chosen a precision."""
    monkeypatch.delenv("FTLIB_PRECISION")
    monkeypatch.setattr(device, "fast_bf16", lambda: None)


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_training_is_that_of_the_float32_model(tiny_model, dtype):
    """The same steps as a float32 model that starts from the same numbers, and its weights, rounded."""
    rows, model = make_rows(12), tiny_model().to(dtype)
    twin = copy.deepcopy(model).float()
    config = quick(learning_rate=1e-4, eval_every=1)
    run = fit(model, rows, eval_dataset=rows, config=config)
    wanted = fit(twin, rows, eval_dataset=rows, config=config)
    assert steps(run) == steps(wanted) and run.metrics == wanted.metrics and run.precision == "fp32"
    assert {p.dtype for p in model.parameters()} == {dtype} and all(p.grad is None for p in model.parameters())
    assert same(weights(model), {name: value.to(dtype) for name, value in weights(twin).items()})


@pytest.mark.parametrize("strategy", [one for one in STRATEGIES if one not in ("full", "bitfit")])
def test_what_a_strategy_trains_moves(tiny_model, strategy):
    """By steps that bfloat16 would lose: 1e-3 beside a gain of 1, whose neighbors are 1/128 away."""
    model = tiny_model(hidden_size=32, vocab_size=400).to(torch.bfloat16)
    tune(model, strategy)
    before, training = weights(model), {name for name, p in model.named_parameters() if p.requires_grad}
    run = fit(model, make_rows(64), config=quick(epochs=12, batch_size=8, learning_rate=1e-3, warmup_fraction=0.0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    gains = {name for name in training if name.endswith("LayerNorm.weight")}
    assert moved(model, before) <= training and moved(model, before) >= gains
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    kept = frozen > sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert run.precision == ("bf16" if kept else "fp32") and ("frozen" in run.reason) == kept


@pytest.mark.parametrize("model_type", OTHERS)
def test_frozen_bfloat16_stays_near_the_float32_model(tiny_model, model_type):
    """bfloat16 has 8 bits, so losses agree to some percent; the float32 twin starts from the same numbers."""
    options = OTHERS[model_type]
    model = tiny_model(model_type=model_type, **options).to(torch.bfloat16)
    tune(model, "lora", targets="all-linear")
    twin, before = copy.deepcopy(model).float(), weights(model)
    rows = [row | {"input_ids": [*row["input_ids"], 1]} for row in make_rows(16, shortest=4)]
    inside = {}
    model.register_forward_hook(lambda module, given, out: inside.update(
        logits=out.logits.dtype, kinds={(p.dtype, p.requires_grad) for p in module.parameters()}
    ))  # fmt: skip
    run, wanted = (fit(one, rows, config=quick(epochs=4)) for one in (model, twin))
    assert inside == {"logits": torch.float32, "kinds": {(torch.bfloat16, False), (torch.float32, True)}}
    assert steps(run) == pytest.approx(steps(wanted), rel=0.04) and steps(run) != steps(wanted)
    assert moved(model, before) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(module._forward_hooks for module in model.modules() if module is not model)


@pytest.mark.parametrize("kind", ["frozen", "whole"])
def test_weights_in_bfloat16_on_a_cpu_that_multiplies_it_fast(tiny_model, monkeypatch, kind):
    model = tiny_model(hidden_size=32).to(torch.bfloat16)
    tune(model, "lora" if kind == "frozen" else "full")
    twin, before = copy.deepcopy(model).float(), weights(model)
    wanted = fit(twin, make_rows(16), config=quick(epochs=4))
    monkeypatch.setattr(device, "fast_bf16", lambda: "AMX")
    run = fit(model, make_rows(16), config=quick(epochs=4))
    assert run.precision == "bf16" and ("frozen" if kind == "frozen" else "AMX") in run.reason
    assert steps(run) == pytest.approx(steps(wanted), rel=0.04) and steps(run) != steps(wanted)
    assert moved(model, before) <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_asked_for_float32_it_computes_so(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    tune(model, "head-only")
    twin = copy.deepcopy(model).float()
    runs = [fit(one, make_rows(8), config=quick(precision="fp32")) for one in (model, twin)]
    assert steps(runs[0]) == steps(runs[1]) and runs[0].precision == "fp32"


def test_several_tasks_and_an_interrupt(tiny_model):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head(), "b": Head("regression", 1)}).to(torch.bfloat16)
    tune(model, "lora")
    before = weights(model)
    data = {"a": make_rows(16), "b": make_rows(16, "regression")}
    run = fit(model, data, config=quick(batch_size=8))
    assert run.precision == "bf16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert moved(model, before) == {name for name, p in model.named_parameters() if p.requires_grad}

    def stop(record):
        raise KeyboardInterrupt

    assert fit(model, data, config=quick(), on_record=stop).stopped == "interrupted"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_resuming_is_exact(tiny_model, tmp_path):
    """A checkpoint holds the float32 weights, not the rounded ones."""
    rows, undisturbed = make_rows(16), tiny_model().to(torch.bfloat16)
    options = dict(learning_rate=1e-4, epochs=3)
    wanted = fit(undisturbed, rows, config=quick(**options))
    config = quick(**options, checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")

    def stop(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    assert fit(tiny_model().to(torch.bfloat16), rows, config=config, on_record=stop).steps == 5
    model = tiny_model().to(torch.bfloat16)
    run = fit(model, rows, config=config)
    assert steps(run) == steps(wanted) and same(weights(model), weights(undisturbed))


def test_a_head_in_float32_on_a_body_in_bfloat16(tiny_model):
    model = tiny_model(vocab_size=400).to(torch.bfloat16)
    model.classifier.float()
    tune(model, "head-only")
    model.bert.pooler.requires_grad_(False)
    run = fit(model, make_rows(8), config=quick())
    assert run.precision == "bf16" and model.classifier.weight.dtype == torch.float32
    assert model.bert.pooler.dense.weight.dtype == torch.bfloat16


def test_an_own_loss_is_evaluated_in_float32(tiny_model):
    """Beside autocast the logits are bfloat16, whose sum over many rows has 8 bits."""
    rows, config = make_rows(32), quick(precision="bf16", epochs=1, learning_rate=0.0)
    own = fit(tiny_model(), rows, eval_dataset=rows, config=config, loss=torch.nn.CrossEntropyLoss(reduction="sum"))
    wanted = fit(tiny_model(), rows, eval_dataset=rows, config=config)
    assert own.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-5)
