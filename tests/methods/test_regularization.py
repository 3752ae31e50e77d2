"""L2-SP, L1, R-Drop, mixout and dropout rates against PyTorch's own functions and their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_fit import make_rows, quick, steps, weights
from torch import nn
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.settings import TrainConfig
from ftlib.methods import optimizing
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.regularization import add_mixout, dropout_rate, pull_, r_drop, remove_mixout, shrink_
from ftlib.methods.tuning import tune

# ------------------------------------------------------------------------------------------------------- L2-SP, L1


def test_pull_is_the_gradient_of_the_distance():
    torch.manual_seed(0)
    start, theta = torch.randn(3, 4), nn.Parameter(torch.randn(3, 4))
    other = nn.Parameter(theta.detach().clone())
    optimizer = torch.optim.SGD([other], lr=0.1)
    (0.3 / 2 * (other - start).square().sum()).backward()
    optimizer.step()
    pull_(theta, start, 0.1 * 0.3)
    assert_close(theta, other)


def test_l2_sp_in_fit_is_sgd_on_the_penalized_loss(tiny_model):
    """Momentum 0.9 gathers the loss' gradient alone; the pull stands beside it, as AdamW's decay does."""
    rows, rate, strength = make_rows(8), 0.1, 0.5
    model, twin = tiny_model(), tiny_model()
    tune(model, "l2-sp", strength=strength)
    config = quick(
        epochs=2, optimizer="sgd", learning_rate=rate, schedule="constant", warmup_fraction=0.0, weight_decay=0.2,
        shuffle=False, shortcuts=False, max_grad_norm=None,
    )  # fmt: skip
    fit(model, rows, config=config)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(4):
        twin.zero_grad()
        twin(**collate(rows[step % 2 * 4 :][:4])).loss.backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name.startswith("bert"):  # the gradient of strength / 2 * |θ - θ₀|², and no decay towards zero
                    extra = strength * (p - start[name])
                    speed[name] = 0.9 * speed[name] + p.grad
                else:  # the new head: weight decay, which PyTorch's SGD adds to the gradient
                    extra = 0.0
                    speed[name] = 0.9 * speed[name] + p.grad + (0.2 * p if name.endswith("weight") else 0)
                p -= rate * (speed[name] + extra)
    for name, p in model.named_parameters():
        assert_close(p, dict(twin.named_parameters())[name], atol=1e-5, rtol=1e-5, msg=name)


def test_l2_sp_has_no_decay_to_zero_even_when_all_decay(tiny_model):
    model = tiny_model()
    tune(model, "l2-sp", strength=0.0)
    before = weights(model)["bert.embeddings.word_embeddings.weight"]
    fit(model, make_rows(8), config=quick(epochs=1, decay_groups=False, weight_decay=0.5))
    after = weights(model)["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(after[60:], before[60:])  # words that never occur


def test_shrink_is_the_proximal_operator():
    """argmin of |z - θ|² / 2 + amount |z|, found by trying."""
    theta, amount = torch.linspace(-2, 2, 41), 0.55
    tried = torch.linspace(-3, 3, 6001)
    cost = (tried[:, None] - theta).square() / 2 + amount * tried[:, None].abs()
    parameter = nn.Parameter(theta.clone())
    shrink_(parameter, amount)
    assert_close(parameter.detach(), tried[cost.argmin(0)], atol=1e-3, rtol=0)
    assert int((parameter == 0).sum()) == int((theta.abs() <= amount).sum()) > 5


def test_l1_in_fit_makes_zeros_of_weights_alone(tiny_model):
    rows = make_rows(8)
    model = tiny_model()
    fit(model, rows, config=quick(epochs=4, l1=1.0, weight_decay=0.0))
    zeros = {name: float((p == 0).float().mean()) for name, p in model.named_parameters()}
    assert zeros["bert.encoder.layer.0.output.dense.weight"] > 0.5 and zeros["classifier.weight"] > 0.1
    spared = [name for name in zeros if name.endswith("bias") or "LayerNorm" in name]
    first = dict(tiny_model().named_parameters())
    assert all(zeros[name] <= float((first[name] == 0).float().mean()) for name in spared)
    words = model.bert.embeddings.word_embeddings.weight[60:]  # that never occur: they shrink too
    assert float(words.detach().abs().sum()) < float(
        first["bert.embeddings.word_embeddings.weight"].detach()[60:].abs().sum()
    )


def test_nothing_happens_in_a_step_that_overflowed(tiny_model):
    """GradScaler calls a fused optimizer all the same, and tells it by `found_inf`."""
    model = tiny_model()
    tune(model, "l2-sp", strength=0.5)
    optimizer = torch.optim.AdamW(optimizing.parameter_groups(model, learning_rate=0.1), fused=True)
    optimizing.attach(optimizer, model, l1=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
            p.grad = torch.ones_like(p)
    before = weights(model)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)


# ---------------------------------------------------------------------------------------------------------- R-Drop


def test_r_drop_is_kl_div_both_ways():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3, dtype=torch.float32).unbind(0)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    both = F.kl_div(q, p, reduction="none", log_target=True) + F.kl_div(p, q, reduction="none", log_target=True)
    labels = torch.tensor([0, 2, -100, 1, -100])
    expected = both[labels != -100].sum() / 2
    assert_close(r_drop(first, second, labels, "sequence-classification"), expected)
    assert r_drop(first, first, labels, "sequence-classification") == 0
    tags = r_drop(first.view(1, 5, 3), second.view(1, 5, 3), labels.view(1, 5), "token-classification")
    assert_close(tags, expected)


def test_r_drop_of_several_labels_is_bernoullis():
    torch.manual_seed(1)
    first, second = torch.randn(2, 4, 3).unbind(0)
    p, q = (torch.distributions.Bernoulli(logits=x) for x in (first, second))
    kl = torch.distributions.kl_divergence
    expected = (kl(p, q) + kl(q, p)).sum() / 2
    assert_close(r_drop(first, second, torch.ones(4, 3), "multi-label-classification"), expected)


def test_r_drop_leaves_labels_out_that_nobody_gave():
    """One label of each text by hand: (p - q)(logit p - logit q) / 2 with p = 1/2, q = 3/4; -100 counts nothing."""
    first, second = torch.zeros(2, 2), torch.full((2, 2), 3.0).log()
    labels = torch.tensor([[1.0, -100.0], [-100.0, 0.0]])
    expected = torch.tensor(2 * 0.25 * math.log(3) / 2)
    assert_close(r_drop(first, second, labels, "multi-label-classification"), expected)


def test_r_drop_has_the_gradient_of_its_definition():
    torch.manual_seed(2)
    first, second = (torch.randn(4, 3, dtype=torch.float64).float().requires_grad_() for _ in range(2))
    r_drop(first, second, torch.tensor([0, 1, 2, -100]), "sequence-classification").backward()
    found = first.grad.clone()
    first.grad = None
    p, q = first.softmax(-1), second.softmax(-1)
    ((p * (p / q).log() + q * (q / p).log()).sum(-1)[:3].sum() / 2).backward()
    assert_close(found, first.grad)


def test_r_drop_in_fit(tiny_model):
    rows = make_rows(8)
    runs = {r: fit(tiny_model(), rows, config=quick(r_drop=r, optimizer="sgd", micro_batch_size=2)) for r in (0.0, 1.0)}
    assert steps(runs[0.0]) == pytest.approx(steps(runs[1.0]), abs=1e-6)  # no dropout: both passes agree
    dropped = [
        fit(tiny_model(), rows, config=quick(r_drop=r, dropout=0.5, epochs=1, max_steps=1)).history[0]["loss"]
        for r in (1e-9, 10.0, 20.0)
    ]
    assert dropped[0] < dropped[1] < dropped[2]
    assert dropped[2] - dropped[1] == pytest.approx(dropped[1] - dropped[0], rel=0.02)  # linear in its weight


@pytest.mark.parametrize("task", ["token-classification", "multi-label-classification"])
def test_r_drop_of_other_tasks(tiny_model, task):
    run = fit(tiny_model(task, 3), make_rows(8, task), config=quick(r_drop=1.0, dropout=0.1, epochs=1))
    assert all(0 < loss < 10 for loss in steps(run))


def test_r_drop_of_several_tasks(tiny_model):
    heads = {"a": Head(), "b": Head("token-classification", 3)}
    rows = {"a": make_rows(6), "b": make_rows(6, "token-classification")}
    runs = [fit(MultiTaskModel(tiny_model("encoder"), heads), rows, config=quick(r_drop=r)) for r in (0.0, 1.0)]
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=1e-5)
    rows["b"], heads["b"] = make_rows(6, "regression"), Head("regression", 1)
    with pytest.raises(ValueError, match=r"compares predicted distributions of classes; not for regression$"):
        fit(MultiTaskModel(tiny_model("encoder"), heads), rows, config=quick(r_drop=1.0))


def test_a_number_has_no_distribution():
    with pytest.raises(ValueError, match="regression predicts numbers: leave r_drop at 0"):
        r_drop(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2), "regression")


# ---------------------------------------------------------------------------------------------------------- mixout


def mixed(p, draws, x=None):
    """Start 1, 2, 3, 4; now 2, 4, 6, 8; what the layer computes with in `draws` passes over the unit vectors."""
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    add_mixout([linear], p)
    with torch.no_grad():
        linear.weight.mul_(2)
    torch.manual_seed(0)
    return linear, torch.stack([linear(torch.eye(4)).detach()[:, 0] for _ in range(draws)])


def test_mixout_has_the_mean_of_the_weights():
    linear, found = mixed(0.5, 4000)
    start, now = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 4.0, 6.0, 8.0])
    assert set(found[:, 0].tolist()) == {1.0, 3.0}  # the pretrained weight, or W₀ + (W - W₀) / (1 - p)
    error = (found.mean(0) - now).abs() / (now - start)
    assert float(error.max()) < 5 / 4000**0.5  # five standard errors: each draw's is |W - W₀|
    assert_close(linear.eval()(torch.eye(4))[:, 0], now)
    remove_mixout(linear)
    assert_close(linear.train()(torch.eye(4))[:, 0], now)


def test_no_mixout_is_plain():
    assert_close(mixed(0.0, 3)[1], torch.tensor([2.0, 4.0, 6.0, 8.0]).expand(3, 4))


def test_the_next_tune_removes_mixout(tiny_model):
    model = tiny_model()
    tune(model, "mixout")
    assert sum("forward" in vars(m) for m in model.modules()) == 12  # the linear layers of both layers
    tune(model, "mixout", p=0.2)
    assert sum("forward" in vars(m) for m in model.modules()) == 12
    tune(model, "lora")
    assert not any("forward" in vars(m) for m in model.modules())


def test_mixout_keeps_a_trained_model_nearer(tiny_model):
    far = []
    for p in (0.0, 0.9):
        model = tiny_model()
        start = weights(model)
        tune(model, "mixout", p=p)
        fit(model, make_rows(8), config=quick(optimizer="sgd", learning_rate=0.05, max_grad_norm=None))
        assert all("forward" in vars(m) for n, m in model.named_modules() if n.endswith("self.query"))
        far.append(
            weights(model)["bert.encoder.layer.0.output.dense.weight"]
            - start["bert.encoder.layer.0.output.dense.weight"]
        )
    assert all(float(x.norm()) > 0 for x in far) and not torch.equal(*far)


# --------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "electra"])
def test_dropout_rates_are_set_and_come_back(tiny_model, model_type):
    options = {"distilbert": dict(attention_dropout=0.1), "modernbert": dict(attention_dropout=0.1)}
    model = tiny_model(model_type=model_type, **options.get(model_type, {}))
    places = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [m.p for m in places]
    batch = collate(make_rows(4))
    plain = model.eval()(**batch).logits
    with pytest.raises(RuntimeError, match="mine"), dropout_rate(model, 0.4):
        assert places and {m.p for m in places} == {0.4}
        rates = {vars(m)["attention_dropout"] for m in model.modules() if "attention_dropout" in vars(m)}
        assert rates <= {0.4}
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        raise RuntimeError("mine")
    assert [m.p for m in places] == before
    assert torch.equal(model.eval()(**batch).logits, plain)
    with dropout_rate(model, None):
        assert [m.p for m in places] == before


@pytest.mark.parametrize("model_type", ["bart", "opt", "t5", "marian"])
def test_rates_that_are_handed_to_functions_are_set_too(model_type):
    """At a rate of 0, training mode computes what evaluation does."""
    sizes = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    options = {
        "opt": dict(
            vocab_size=60,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
        )
    }
    options["t5"] = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, dropout_rate=0.3)
    chosen = options.get(model_type, sizes | dict(activation_dropout=0.3, dropout=0.3, attention_dropout=0.3))
    config = transformers.AutoConfig.for_model(model_type, **chosen, pad_token_id=0)
    model, ids = transformers.AutoModel.from_config(config), torch.tensor([[5, 6, 7, 8]])
    given = {"input_ids": ids} | ({} if model_type == "opt" else {"decoder_input_ids": ids})
    plain = model.eval()(**given)[0]
    assert not torch.allclose(model.train()(**given)[0], plain, atol=1e-5)
    with dropout_rate(model, 0.0):
        assert_close(model.train()(**given)[0], plain)
    assert not torch.allclose(model.train()(**given)[0], plain, atol=1e-5)


def test_dropout_in_fit(tiny_model):
    rows = make_rows(8)
    seen = []
    model = tiny_model(hidden_dropout_prob=0.25)
    model.bert.register_forward_hook(lambda *args: seen.append(model.dropout.p))
    fit(model, rows, config=quick(epochs=1, dropout=0.0))
    assert seen == [0.0, 0.0] and model.dropout.p == 0.25
    exact = fit(tiny_model(hidden_dropout_prob=0.25), rows, config=quick(dropout=0.0))
    assert steps(exact) == pytest.approx(steps(fit(tiny_model(), rows, config=quick())), abs=1e-6)
    with pytest.raises(ValueError, match=r"dropout=0.1: Linear has no dropout to set; leave dropout at None"):
        with dropout_rate(nn.Linear(2, 2), 0.1):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(l1=-1), "l1=-1: need a number from 0, finite"),
        (dict(l1=float("inf")), "l1=inf: need"),
        (dict(l1=True), "l1=True: need"),
        (dict(r_drop=-0.1), "r_drop=-0.1: need a number from 0, finite"),
        (dict(r_drop="1"), "r_drop='1': need"),
        (dict(dropout=1), "dropout=1: need a number from 0 to 0.99"),
        (dict(dropout=-0.1), "dropout=-0.1: need"),
        (dict(dropout="0"), "dropout='0': need"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
