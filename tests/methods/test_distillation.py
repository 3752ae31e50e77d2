"""Students that are made of a teacher's layers, and a teacher's part in the loss, against plain PyTorch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_checkpoints import history, resumed
from test_fit import LABELS, make_rows, quick, same, weights
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.core.loop import steps
from ftlib.engine.fit import fit
from ftlib.methods.distillation import Distillation, evenly, shrink
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import is_unpadded, unpad
from ftlib.tasks.task import task_loss

PLAIN = dict(optimizer="sgd", schedule="constant", warmup_fraction=0.0, weight_decay=0.0, max_grad_norm=None,
             shuffle=False, batch_size=8, max_steps=1)  # fmt: skip


def teacher_of(tiny_model, task="sequence-classification", layers=6, **options):
    return tiny_model(task, LABELS[task], num_hidden_layers=layers, seed=1, **options)


# -------------------------------------------------------------------------------------------------------- students


def test_layers_are_spread_evenly():
    assert [evenly(n, 6) for n in (1, 2, 3, 4, 6)] == [[5], [2, 5], [1, 3, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert evenly(2, 5) == [1, 4]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra"])
def test_a_student_is_an_ordinary_model(tiny_model, tmp_path, model_type):
    teacher = teacher_of(tiny_model, model_type=model_type, **({"n_layers": 6} if model_type == "distilbert" else {}))
    before = weights(teacher)
    student = shrink(teacher, 3)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 3 and not student.training
    stack, own = ftlib.core.anatomy.layers(teacher), ftlib.core.anatomy.layers(student)
    for mine, theirs in zip(own, [stack[1], stack[3], stack[5]], strict=True):
        assert same(weights(mine), weights(theirs))
    batch = collate([{key: row[key] for key in ("input_ids",)} for row in make_rows(4)])
    with torch.no_grad():
        wanted = student(**batch).logits
        while len(stack) > 3:  # what a teacher computes whose other layers were cut out
            parent = next(m for m in teacher.modules() if isinstance(m, torch.nn.ModuleList) and stack[0] in [*m])
            kept, stack = torch.nn.ModuleList([stack[i] for i in (1, 3, 5)]), [1, 2, 3]
            for module in teacher.modules():
                for name, child in module.named_children():
                    if child is parent:
                        setattr(module, name, kept)
        assert_close(teacher(**batch).logits, wanted, atol=1e-6, rtol=0)
        student.save_pretrained(tmp_path)
        opened = type(teacher).from_pretrained(tmp_path)
        assert_close(opened(**batch).logits, wanted, atol=1e-6, rtol=0)
    assert len(before) > len(weights(student))


def test_decoders_and_mixed_layers_shrink(tmp_path):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    ids = torch.tensor([[5, 6, 7, 8]])
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=1, tie_word_embeddings=True, use_sliding_window=True,
                                      sliding_window=2, max_window_layers=3)  # fmt: skip
    teacher = transformers.Qwen2ForCausalLM(config).eval()
    student = shrink(teacher, [0, 3])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.config.layer_types == [config.layer_types[0], config.layer_types[3]] != config.layer_types[:2]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 6)
    student.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(opened(ids).logits, student(ids).logits, atol=1e-6, rtol=0)
    half = shrink(teacher.to(torch.bfloat16), 2)
    assert half.dtype == torch.bfloat16 and half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_student_is_unpadded_where_its_teacher_is(tiny_model):
    teacher, batch = teacher_of(tiny_model), collate(make_rows(4))
    labels = batch.pop("labels")
    wanted = shrink(teacher)(**batch).logits
    student = shrink(unpad(teacher))
    assert is_unpadded(student) and is_unpadded(teacher) and len(labels) == 4
    assert_close(student(**batch).logits, wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        student.bert.embeddings.word_embeddings.weight.zero_()
    assert teacher.bert.embeddings.word_embeddings.weight.any()


def test_what_can_not_shrink_is_said(tiny_model):
    model = teacher_of(tiny_model)
    for layers, said in ((0, "layers=0: choose one of 1, 2"), (7, "layers=7"), ([], "layers=[]: a number, or numbers"),
                         ([3, 1], "from 0 to 5 in order"), ([1, 6], "from 0 to 5"), ([1, 1], "each once")):  # fmt: skip
        with pytest.raises(ValueError) as error:
            shrink(model, layers)
        assert said in str(error.value)
    tune(model, "lora", rank=2)
    with pytest.raises(ValueError, match=r"has adapters: ftlib\.merge it first"):
        shrink(model)
    with pytest.raises(ValueError, match="shrink its encoder"):
        shrink(ftlib.MultiTaskModel(tiny_model("encoder"), {"a": ftlib.Head()}), 1)
    with pytest.raises(ValueError, match="ALBERT"):
        shrink(tiny_model(model_type="albert"), 1)
    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="t5 has layers on two sides"):
        shrink(transformers.T5ForConditionalGeneration(t5), 1)


# ------------------------------------------------------------------------------------------------------------ the loss


def by_hand(student, teacher, batch, task, parts, temperature=2.0, layers=(1, 3, 5)):
    """labels * L + logits * S + hidden * H + attention * A, row by row, with torch's own functions."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    asked = dict(output_hidden_states=True, output_attentions="attention" in parts)
    own = student(**inputs, **asked)
    with torch.no_grad():
        theirs = teacher(**inputs, **asked)
    labels = batch["labels"]
    items = labels.numel() if labels.is_floating_point() else int((labels != -100).sum())
    total = parts.get("labels", 0.5) * task_loss(task)(own.logits, labels)
    soft = 0.0
    if task == "regression":
        soft = F.mse_loss(own.logits, theirs.logits, reduction="sum")
    elif task == "multi-label-classification":
        for z, w in zip(own.logits.flatten() / temperature, theirs.logits.flatten() / temperature, strict=True):
            p, q = torch.sigmoid(w), torch.sigmoid(z)
            soft = soft + temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    else:
        kept = labels != -100
        soft = temperature**2 * F.kl_div(
            (own.logits[kept] / temperature).log_softmax(-1), (theirs.logits[kept] / temperature).softmax(-1),
            reduction="batchmean",
        ) * items  # fmt: skip
    total = total + parts.get("logits", 0.5) * soft
    for name, states in (("hidden", "hidden_states"), ("attention", "attentions")):
        for i, k in enumerate(layers) if name in parts else ():
            for row, mask in enumerate(batch["attention_mask"]):
                n, first = int(mask.sum()), 1 if name == "hidden" else 0
                mine, other = getattr(own, states)[i + first][row], getattr(theirs, states)[k + first][row]
                mine, other = (x[:n] if name == "hidden" else x[:, :n, :n] for x in (mine, other))
                here = labels[row].numel() if labels.is_floating_point() else int((labels[row] != -100).sum())
                total = total + parts[name] * here * F.mse_loss(mine, other) / len(layers)
    return total / items


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("sequence-classification", {}),
        ("sequence-classification", {"hidden": 2.0, "labels": 0.0}),
        ("sequence-classification", {"hidden": 1.0, "attention": 3.0, "logits": 0.0}),
        ("token-classification", {"hidden": 1.0, "attention": 1.0}),
        ("multi-label-classification", {"hidden": 0.5}),
        ("regression", {}),
    ],
)
def test_the_loss_is_the_one_by_hand(tiny_model, task, parts):
    """Value and gradients, whole and in micro-batches, in fit and in a plain loop; the teacher and its mode stay."""
    eager = {"attn_implementation": "eager"}
    teacher = teacher_of(tiny_model, task, hidden_dropout_prob=0.5, **eager).train()
    student, kept = shrink(teacher), weights(teacher)
    student.config.hidden_dropout_prob = 0.0
    for module in student.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    rows = make_rows(8, task, seed=3)
    plain, whole = copy.deepcopy(student), copy.deepcopy(student)
    loss = by_hand(plain.train(), copy.deepcopy(teacher).eval(), collate(rows), task, parts)
    loss.backward()
    distill = Distillation(teacher, **parts)
    batches = [[collate(rows[:3]), collate(rows[3:])]]
    sgd = torch.optim.SGD(whole.parameters(), lr=1.0)
    options = dict(total=1, schedule=lambda *_: 1.0, max_grad_norm=None)
    (record,) = steps(whole, batches, sgd, gradient=distill.gradient(), **options)
    assert_close(record["loss"], float(loss), atol=1e-5, rtol=1e-5)
    run = fit(student, rows, config=quick(**PLAIN, learning_rate=1.0, micro_batch_size=5, distill=distill))
    assert_close(run.history[0]["loss"], float(loss), atol=1e-5, rtol=1e-5)
    for name, p in plain.named_parameters():
        wanted = p.detach() - (0 if p.grad is None else p.grad)
        for found in (whole, student):
            got = found.get_parameter(name)
            # the pooler's optimizer in fit is SGD with momentum, which at a first step is the gradient itself
            assert_close(got, wanted, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert same(weights(teacher), kept) and teacher.training and next(teacher.parameters()).grad is None


@pytest.mark.parametrize("teacher_unpadded", [False, True])
@pytest.mark.parametrize("student_unpadded", [False, True])
def test_unpadded_or_not_it_is_the_same_run(tiny_model, teacher_unpadded, student_unpadded):
    rows, losses = make_rows(12), []
    for packed in ((False, False), (teacher_unpadded, student_unpadded)):
        teacher = teacher_of(tiny_model)
        student = shrink(teacher)
        for model, wanted in zip((teacher, student), packed, strict=True):
            if wanted:
                unpad(model)
        run = fit(student, rows, config=quick(learning_rate=1e-3, distill=Distillation(teacher, hidden=1.0)))
        losses.append([record["loss"] for record in run.history if "loss" in record])
    assert len(losses[0]) == 6
    assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)


def test_a_language_model_in_a_plain_loop():
    """Labels stand one place behind what predicts them; in fit it is refused."""
    sizes = dict(vocab_size=32, n_embd=16, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    teacher = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_layer=4)).eval()
    student = shrink(teacher, 2)
    with torch.no_grad():
        student.transformer.wpe.weight += 0.1
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])}
    batch["labels"] = torch.tensor([[-100, 6, 7, 8], [-100] * 3 + [2]])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    gradient, own = Distillation(teacher, temperature=3.0).gradient(), student(batch["input_ids"]).logits
    theirs = teacher(batch["input_ids"]).logits
    wanted = 0.5 * F.cross_entropy(own[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    for row, place in ((0, 0), (0, 1), (0, 2), (1, 2)):  # where labeled tokens are predicted
        p, q = (theirs[row, place] / 3).softmax(-1), (own[row, place] / 3).softmax(-1)
        wanted = wanted + 0.5 * 9 * (p * (p.log() - q.log())).sum()
    assert_close(gradient(student, [batch]), (wanted / 4).detach(), atol=1e-5, rtol=1e-5)
    assert student.transformer.wpe.weight.grad.abs().sum() > 0
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    with pytest.raises(ValueError, match=r"distill takes logits, which a language model .*distill.gradient\(\)"):
        fit(student, rows, config=quick(distill=Distillation(teacher)))


def test_lora_learns_from_a_teacher(tiny_model):
    """A student whose labels count nothing comes nearer to what its teacher says."""
    teacher = teacher_of(tiny_model, layers=2)
    with torch.no_grad():
        teacher.classifier.weight *= 20
    student, rows = unpad(tiny_model(seed=5)), make_rows(32)
    tune(student, "lora", rank=4)
    batch = collate(rows)
    batch.pop("labels")
    with torch.no_grad():
        target = teacher(**batch).logits.softmax(-1)
        before = F.kl_div(student(**batch).logits.log_softmax(-1), target, reduction="batchmean")
        fit(student, rows, config=quick(epochs=8, distill=Distillation(teacher, labels=0.0, logits=1.0)))
        after = F.kl_div(student(**batch).logits.log_softmax(-1), target, reduction="batchmean")
    assert after < before / 2


# ----------------------------------------------------------------------------------------------- resuming, refusing


def test_a_resumed_run_is_the_whole_one(tiny_model, tmp_path, monkeypatch):
    rows, held_out = make_rows(14), make_rows(6, seed=1)

    def build():
        return unpad(shrink(teacher_of(tiny_model, hidden_dropout_prob=0.3)))

    def distill():
        return Distillation(unpad(teacher_of(tiny_model)), hidden=1.0)

    expected = fit(whole := build(), rows, eval_dataset=held_out, config=quick(distill=distill()))
    options = dict(checkpoint_dir=str(tmp_path), checkpoint_every=1, resume="auto")
    config = quick(**options, distill=distill())
    model, run = resumed(monkeypatch, build, rows, config, (2, 5), eval_dataset=held_out)
    assert same(weights(model), weights(whole)) and history(run) == history(expected)
    assert math.isfinite(run.metrics["loss"])
    teachers = teacher_of(tiny_model), shrink(teacher_of(tiny_model), 4)
    for other in (None, Distillation(teachers[0], hidden=0.5), Distillation(teachers[1], hidden=1.0)):
        with pytest.raises(ValueError, match=r"from another run: config\.distill was"):
            fit(build(), rows, eval_dataset=held_out, config=quick(**options, distill=other))


def test_half_precision_and_evaluation_do_without_the_teacher(tiny_model):
    teacher, rows = teacher_of(tiny_model), make_rows(8)
    student = shrink(teacher)
    config = quick(precision="bf16", distill=Distillation(teacher, labels=0.0))
    run = fit(student, rows, eval_dataset=rows, config=config)
    assert_close(run.metrics["loss"], ftlib.evaluate(student, rows)["loss"], atol=2e-2, rtol=0)


def test_a_teacher_that_does_not_fit_is_said(tiny_model):
    teacher, student = teacher_of(tiny_model), tiny_model(num_hidden_layers=3)
    wide = tiny_model(hidden_size=32, num_attention_heads=4)
    eager = [tiny_model(num_attention_heads=n, attn_implementation="eager") for n in (2, 4)]
    for taught, options, learner, said in (
        (student, {}, student, "the teacher is the student itself"),
        (tiny_model(vocab_size=65), {}, student, "the teacher knows 65 tokens, the student 64"),
        (tiny_model(num_labels=3), {}, student, r"-classification', 3\), the student's \('sequence-.*logits=0"),
        (tiny_model("regression", 1), {}, student, r"\('regression', 1\)"),
        (wide, {"hidden": 1.0}, student, "hidden: the teacher is 32 wide, the student 16"),
        (teacher, {"attention": 1.0}, student, r"repad\(model\) and model.set_attn_implementation.* on both"),
        (eager[1], {"attention": 1.0}, eager[0], "attention: the teacher has 4 heads, the student 2"),
        (teacher, {"hidden": 1.0, "layers": [1, 3]}, student, r"layers=\[1, 3\]: need 3 of the teacher's layers, 0 to"),
        (teacher, {"hidden": 1.0, "layers": [1, 3, 6]}, student, "0 to 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"distill: .*{said}"):
            fit(learner, make_rows(4), config=quick(distill=Distillation(taught, **options)))
    fit(student, make_rows(4), config=quick(epochs=1, distill=Distillation(wide)))  # of logits any width will do
    with pytest.raises(ValueError, match="models with one head"):
        several = ftlib.MultiTaskModel(tiny_model("encoder"), {"a": ftlib.Head()})
        fit(several, {"a": make_rows(4)}, config=quick(distill=Distillation(teacher)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logits": 0}, "a teacher without a part"),
        ({"temperature": 0}, "temperature=0: need a number"),
        ({"hidden": -1.0}, "hidden=-1.0: need a number from 0"),
    ],
)
def test_weights_that_are_none_are_said(tiny_model, options, said):
    with pytest.raises(ValueError, match=said):
        Distillation(tiny_model(), **options)


def test_settings_take_a_teacher_only_so(tiny_model):
    with pytest.raises(ValueError, match=r"distill='minilm': need None or ftlib.Distillation\(teacher\)"):
        quick(distill="minilm")
    with pytest.raises(ValueError, match="r_drop and distill"):
        quick(distill=Distillation(tiny_model()), r_drop=1.0)
