"""Loss and gradients in chunks against the stock models' own, which hold all logits."""

import copy
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ftlib
from ftlib.core.batches import to_device
from ftlib.methods import token_losses
from ftlib.methods.speedups import shortcuts
from ftlib.methods.token_losses import (
    chunked_cross_entropy,
    in_chunks,
    label_log_probs,
    sequence_log_probs,
    token_log_probs,
)

close = partial(assert_close, rtol=1e-5, atol=1e-5)
WORDS = 97
SIZES = dict(
    vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)
MODELS = {  # name: (model type, what its tiny config needs beyond the sizes)
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 1.5}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 1.5}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "qwen2": ("qwen2", GROUPED),
    "phi": ("phi", {}),  # with a bias in its head
    "mistral": ("mistral", GROUPED),
    "falcon": ("falcon", {}),
    "olmo": ("olmo", {}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "granite": ("granite", {**GROUPED, "logits_scaling": 3.0}),
    "recurrent cap": ("modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2}),  # a head of several layers
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "mixtral, router": (
        "mixtral",
        {**GROUPED, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def tiny(name="llama", **options):
    kind, own = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **own, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # logits far from each other, so that what is done to them shows
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 4)
    return model


def batch(rows=3, tokens=11, seed=1):
    """Padded on the right; prompts of other lengths are not labeled, nor is padding."""
    ids = torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, tokens - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for row in range(rows):
        labels[row, : 2 * row] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def stock(model, given):
    """The summed loss and the gradients as Transformers has them: the mean of a step of one batch, times its tokens."""
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss * (given["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def ours(model, given, **options):
    model.zero_grad(set_to_none=True)
    with in_chunks(model, **options):
        output = model(**given)
    assert output.logits is None and output.loss.dtype == torch.float32
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def assert_same(found, wanted):
    close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            scale = max(float(gradient.abs().max()), 1.0)  # of gradients that are sums over tokens
            close(found[1][name] / scale, gradient / scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def rows(monkeypatch):
    """Few rows a chunk, so that tiny batches have several."""
    monkeypatch.setattr(token_losses, "_rows", lambda logits: 4)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_stock_model(name, rows):
    model, given = tiny(name), batch()
    assert_same(ours(model, given), stock(model, given))


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_stock_logits(name, rows):
    if "router" in name:
        pytest.skip("the router's loss is no log-probability; refused, see below")
    model, given = tiny(name), batch()
    logits = model(**{key: value for key, value in given.items() if key != "labels"}).logits
    labels = given["labels"][:, 1:]
    wanted = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    wanted = F.pad(wanted * (labels != -100), (1, 0))
    factors = torch.tensor([1.0, -2.0, 0.5])
    (wanted.sum(1) * factors).sum().backward()
    theirs = wanted.detach(), gradients(model)
    model.zero_grad(set_to_none=True)
    close(label_log_probs(model, given), theirs[0])
    found = sequence_log_probs(model, given)
    close(found, theirs[0].sum(1))
    (found * factors).sum().backward()
    assert_same((found.detach(), gradients(model)), (theirs[0].sum(1), theirs[1]))
    hot = (logits / 0.7)[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    close(label_log_probs(model, given, 0.7)[:, 1:], (hot * (labels != -100)).detach())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 4, 7, 100, None])
def test_every_size_of_a_chunk_is_the_whole(chunk, smoothing):
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(8, 50), torch.randn(13, 8, requires_grad=True), torch.randint(50, (13,))
    wanted = F.cross_entropy(head(hidden), targets, reduction="sum", label_smoothing=smoothing)
    theirs = torch.autograd.grad(3 * wanted, [hidden, head.weight, head.bias])
    found = chunked_cross_entropy(head, hidden, targets, label_smoothing=smoothing, chunk=chunk)
    close(found, wanted)
    close(torch.autograd.grad(3 * found, [hidden, head.weight, head.bias]), theirs)
    if not smoothing:
        factors = torch.randn(13)
        each = F.cross_entropy(head(hidden) / 2, targets, reduction="none")
        theirs = torch.autograd.grad((-each * factors).sum(), [hidden, head.weight, head.bias])
        values = token_log_probs(head, hidden, targets, chunk=chunk, temperature=2.0)
        close(values, -each)
        close(torch.autograd.grad((values * factors).sum(), [hidden, head.weight, head.bias]), theirs)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy (2.13 has)")
def test_torchs_own_chunks_give_the_same():
    torch.manual_seed(0)
    head, hidden, targets = (
        nn.Linear(8, 50, bias=False),
        torch.randn(70, 8, requires_grad=True),
        torch.randint(50, (70,)),
    )
    options = {"reduction": "sum", "options": nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None)}
    wanted = F.linear_cross_entropy(hidden, head.weight, targets, **options)
    found = chunked_cross_entropy(head, hidden, targets, chunk=16)
    close(found, wanted)
    parts = [hidden, head.weight]
    close(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts))


def test_smoothing_is_that_of_pytorch(rows):
    model, given = tiny(), batch()
    logits = model(given["input_ids"], given["attention_mask"]).logits[:, :-1]
    wanted = F.cross_entropy(
        logits.flatten(0, 1), given["labels"][:, 1:].flatten(), reduction="sum", label_smoothing=0.1
    )
    wanted.backward()
    theirs = wanted.detach(), gradients(model)
    assert_same(ours(model, given, label_smoothing=0.1), theirs)


def test_a_row_alone_has_the_same_loss(rows):
    model, given = tiny(), batch()
    with in_chunks(model), torch.no_grad():
        each = [float(model(**{key: value[i : i + 1] for key, value in given.items()}).loss) for i in range(3)]
        assert float(model(**given).loss) == pytest.approx(sum(each), rel=1e-5)
    close(sequence_log_probs(model, given).detach(), -torch.tensor(each))


def test_a_batch_without_labels_to_predict_costs_nothing_and_has_zero_gradients(rows):
    model, given = tiny("llama, tied"), batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    given["labels"][:, 0] = 5  # which nothing predicts
    loss, found = ours(model, given)
    assert loss == 0 and all(p is not None and not p.any() for p in found.values())
    values = sequence_log_probs(model, given)
    assert values.requires_grad and not values.any()


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "opt"])
def test_ftlib_lora(name, rows):
    model, given = tiny(name), batch()
    ftlib.tune(model, "lora", rank=2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    assert_same(ours(model, given), stock(model, given))


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_peft_lora_on_the_head(name, rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(name), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    model.eval()
    found = ours(model, batch())
    assert any("lm_head" in name and gradient.any() for name, gradient in found[1].items())
    assert_same(found, stock(model, batch()))


def test_peft_prompt_tuning_puts_tokens_before_the_labels(rows):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny(), config).eval()
    loss = model(**batch(), num_items_in_batch=1).loss  # the sum: a first token is predicted from the prompt
    loss.backward()
    wanted = loss.detach(), gradients(model)
    assert_same(ours(model, batch()), wanted)
    values = label_log_probs(model, batch())
    assert values.shape == (3, 11)
    close(values.sum(), -loss)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_that_tune_puts_before_the_tokens(config, rows):
    peft, model = pytest.importorskip("peft"), tiny()
    with in_chunks(model):
        pass  # now it is known, without a prompt
    ftlib.tune(model, getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for p in model.prompt_encoder.parameters():
        p.data.normal_()
    loss = model(**batch(), num_items_in_batch=1).loss
    loss.backward()
    assert_same(ours(model, batch()), (loss.detach(), gradients(model)))
    values = label_log_probs(model, batch())
    assert values.shape == (3, 11)
    close(values.sum(), -loss)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_the_shortcuts_of_fit(name, rows):
    model, given = tiny(name), batch()
    wanted = stock(model, given)
    with shortcuts(model):
        assert_same(ours(model, given), wanted)


def test_only_the_head_trains(rows):
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("lm_head")
    assert_same(ours(model, batch()), stock(model, batch()))


class Sizes(TorchDispatchMode):
    """The operations inside, and the largest number of rows as wide as the vocabulary that are not the head's."""

    def __init__(self, weight):
        super().__init__()
        self.words, self.weight, self.rows, self.called = len(weight), weight.data_ptr(), 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.called.append((str(function), args))
        wide = isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.words
        if wide and out.data_ptr() != self.weight:
            self.rows = max(self.rows, out.numel() // self.words)
        return out


def test_never_more_logits_than_a_chunk_and_no_gradient_for_a_frozen_head(rows):
    model, given = tiny(hidden_size=24), batch()
    model.lm_head.weight.requires_grad = False
    ours(model, given)  # where it is compared with the stock loss
    with Sizes(model.lm_head.weight) as sizes:
        ours(model, given)
    assert sizes.rows == 4
    made = [args for name, args in sizes.called if name == "aten.mm.default"]
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in made}
    assert ((4, WORDS), (WORDS, 24)) in shapes  # of the hidden states, and none of the weights:
    assert not {((WORDS, 4), (4, 24)), ((24, 4), (4, WORDS))} & shapes
    model.lm_head.weight.requires_grad = True
    with Sizes(model.lm_head.weight) as sizes:
        ours(model, given)
    made = [args for name, args in sizes.called if name == "aten.mm.default"]
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in made}
    assert {((WORDS, 4), (4, 24)), ((24, 4), (4, WORDS))} & shapes


@pytest.mark.parametrize("frozen", [True, False])
def test_under_autocast_the_head_is_cast_once(frozen, rows):
    model, given = tiny(), batch(rows=5)
    model.lm_head.weight.requires_grad = not frozen
    with torch.autocast("cpu", torch.bfloat16):
        whole = stock(model, given)
        ours(model, given)  # where it is compared with the stock loss
        with Sizes(model.lm_head.weight) as sizes:
            found = ours(model, given)
    assert model.lm_head.weight.requires_grad is not frozen
    cast = [args for name, args in sizes.called if name == "aten._to_copy.default" and args[0].shape == (WORDS, 32)]
    assert sum(x.dtype == torch.float32 for (x,) in cast) <= 2  # for the sample of the head, and for all chunks
    close(found[0], whole[0], rtol=1e-3, atol=1e-2)
    for name, gradient in whole[1].items():  # bfloat16 has 8 bits
        assert gradient is None or (found[1][name] - gradient).norm() < 0.03 * gradient.norm() + 1e-3, name


def test_weights_of_half_precision_sum_up_their_gradient_in_float32():
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(16, 40, bias=False), torch.randn(512, 16), torch.randint(40, (512,))
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), [head.weight])
    half = copy.deepcopy(head).bfloat16()
    loss = chunked_cross_entropy(half, hidden.bfloat16(), targets, chunk=2)
    assert loss.dtype == torch.float32
    (found,) = torch.autograd.grad(loss, [half.weight])
    assert found.dtype == torch.bfloat16
    assert (
        found.float() - wanted
    ).norm() < 0.01 * wanted.norm()  # 256 sums in bfloat16 are wrong by several times that


def test_fp16_keeps_small_probabilities():
    """Of words whose probability is below what fp16 can hold."""
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(16, 1000), torch.randn(6, 16), torch.randint(500, (6,))
    with torch.no_grad():
        head.bias[500:] -= 12
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), [head.weight])
    half = copy.deepcopy(head).half()
    (found,) = torch.autograd.grad(chunked_cross_entropy(half, hidden.half(), targets) * 2**10, [half.weight])
    found = found.float() / 2**10
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert (found - wanted)[500:].norm() < 0.1 * wanted[500:].norm()


def test_backward_runs_once_and_is_told_so(rows):
    model = tiny()
    with in_chunks(model):
        loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    hidden = torch.randn(3, 32, requires_grad=True)
    (slope,) = torch.autograd.grad(
        hidden.sum() * chunked_cross_entropy(model.lm_head, hidden, torch.arange(3)), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_without_gradients_there_is_only_the_loss(rows):
    model, given = tiny(), batch()
    with torch.no_grad(), in_chunks(model):
        loss = model(**given).loss
    assert not loss.requires_grad
    close(loss, stock(model, given)[0])


def test_without_labels_and_afterwards_the_model_answers_as_always(rows):
    model, given = tiny(), batch()
    ids = given["input_ids"]
    wanted = model(ids).logits
    with in_chunks(model):
        found = model(ids)
        assert torch.equal(found.logits, wanted) and found.loss is None and found.past_key_values is not None
        again = model(**given, output_hidden_states=True)
        assert again.past_key_values is None and len(again.hidden_states) == 3
        assert again.hidden_states[-1].shape == (3, 11, 32)
        assert torch.equal(model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)[:, :4], ids[:1, :4])
    assert "forward" not in vars(model)
    assert torch.equal(model(ids).logits, wanted)


def test_entering_changes_neither_modes_nor_random_numbers():
    model = tiny(attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with in_chunks(model):
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_in_a_head_is_that_of_its_log_probs_when_they_are_computed_again(rows):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model, given = peft.get_peft_model(tiny(), config).train(), batch()
    weight = next(p for name, p in model.named_parameters() if "lm_head.lora_B" in name)

    def value():
        torch.manual_seed(3)
        return sequence_log_probs(model, given).sum()

    value().backward()
    step = 1e-2 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += step
        above = value()
        weight -= 2 * step
        below = value()
    assert float(above - below) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=2e-2)


def test_labels_are_counted_on_the_host(rows):
    model, given = tiny(), batch()
    moved = to_device(given, torch.device("cpu"))
    moved["labels"] = given["labels"].clone()
    moved["labels"].host = given["labels"]
    wanted = stock(model, given)[0]
    with in_chunks(model):
        close(model(**moved).loss.detach(), wanted)


def test_a_loss_of_another_kind_is_refused_by_name():
    from transformers import BartConfig, BartForCausalLM

    bart = BartForCausalLM(
        BartConfig(**SIZES, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    )
    for use in (lambda: in_chunks(bart).__enter__(), lambda: sequence_log_probs(bart, batch())):
        with pytest.raises(ValueError, match=r"bart.*next token"):
            use()
    own = tiny()
    own.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    with pytest.raises(ValueError, match="llama"), in_chunks(own):
        pass


def test_the_loss_of_a_router_is_refused_where_only_log_probs_are_asked_for():
    with pytest.raises(ValueError, match="output_router_logits"):
        sequence_log_probs(tiny("mixtral, router"), batch())


def test_unpadded_decoders(rows):
    model, given = tiny(), batch()
    wanted = stock(model, given)
    packed = ftlib.unpad(copy.deepcopy(model))
    assert_same(ours(packed, given), wanted)


def test_in_the_loop_a_step_is_the_mean_over_its_tokens(rows):
    model, steps = tiny(), [[batch(), batch(rows=2, seed=2)]]
    twin = copy.deepcopy(model)
    tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in steps[0])

    def gradient(model, step):
        loss = sum(model(**one).loss for one in step) / tokens
        loss.backward()
        return loss.detach()

    with in_chunks(model):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        (record,) = ftlib.steps(model, steps, sgd, total=1, gradient=gradient, schedule=lambda *_: 1.0)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss = sum(twin(**one, num_items_in_batch=tokens).loss for one in steps[0])
    loss.backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    theirs.step()
    assert record["loss"] == pytest.approx(float(loss), rel=1e-5)
    for ours_, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        close(ours_, wanted)


SCRIPT = """
import sys, torch
sys.path[:0] = [{here!r}, {root!r}]
from test_token_losses import batch, gradients, in_chunks, sequence_log_probs, stock, tiny, token_losses
from ftlib.engine import distributed
token_losses._rows = lambda logits: 4
distributed.start()
rank, given = distributed.rank(), batch(rows=4)


def compare(name, how):  # a function: what holds the process group is gone before it is left
    whole, log_probs = tiny(name), sequence_log_probs(tiny(name), given).detach()
    wanted = stock(whole, given)
    model = tiny(name)
    spread = distributed.wrap(model) if how == "ddp" else distributed.shard(model, torch.device("cpu"))
    own = {{key: value[rank::2] for key, value in given.items()}}
    with in_chunks(spread):
        loss = spread(**own).loss
    (loss * 2).backward()  # both average over processes
    total = distributed.all_sum(loss.detach().clone())
    torch.testing.assert_close(total, wanted[0], rtol=1e-5, atol=1e-5)
    found = {{name.removeprefix("module."): distributed.whole(g) for name, g in gradients(spread).items()}}
    assert found.keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(found[key] / scale, gradient / scale, rtol=1e-5, atol=1e-5)
    spread.zero_grad()
    values = sequence_log_probs(spread, own)
    torch.testing.assert_close(values.detach(), log_probs[rank::2], rtol=1e-5, atol=1e-5)
    (-2 * values.sum()).backward()
    for key, gradient in gradients(spread).items():
        gradient, theirs = distributed.whole(gradient), wanted[1][key.removeprefix("module.")]
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, theirs / scale, rtol=1e-5, atol=1e-5)


for name in ("llama", "llama, tied"):
    for how in ("ddp", "fsdp"):
        compare(name, how)
distributed.stop()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Each with half of the rows, the model whole in both (DDP) or its weights spread over them (FSDP2)."""
    here = Path(__file__).resolve().parent
    (tmp_path / "script.py").write_text(SCRIPT.format(here=str(here), root=str(here.parents[1])))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = ["--master-addr=127.0.0.1", f"--master-port={probe.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *where, str(tmp_path / "script.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_program_that_measures_memory_runs(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks/head_memory.py"
    done = subprocess.run([sys.executable, program, "--toy", "--results", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = json.loads((tmp_path / "head_memory.json").read_text())["rows"]
    assert others and all(row["loss"] == pytest.approx(first["loss"], rel=1e-5) for row in others)


def test_an_encoder_in_a_language_models_place_is_refused():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes |= {"initializer_range": 0.5}  # with weights near 0 a token hardly changes others
    both, back = (transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=on)) for on in (False, True))
    with pytest.raises(ValueError, match="bert: a token sees those after it"):
        in_chunks(both)
    with in_chunks(back):
        assert back(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss > 0
