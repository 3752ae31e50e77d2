"""Encoder-decoder models through every door: fit as the Trainer, adapters, checkpoints, processes, disk, run.toml."""

import json
import math
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from test_language_models import losses, quick
from text_to_text import ROWS, TOKENIZER, talkative, tiny
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration

import ftlib
from ftlib import evaluate, fit, tokenize
from ftlib.methods.tuning import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
FIVE = ["t5", "bart", "marian", "pegasus", "mbart"]
UNPADDED = ["bart", "marian", "pegasus", "mbart"]


def rows(count=12):
    return tokenize(ROWS[:count], TOKENIZER, task="seq2seq-lm")


def together(data):
    """All rows in one batch, as Transformers' collator makes it."""
    return DataCollatorForSeq2Seq(TOKENIZER)([dict(row) for row in data])


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_step_has_transformers_loss_and_evaluate_too(name, unpadded):
    if unpadded and name not in UNPADDED:
        pytest.skip("relative positions")
    data, model = rows(), tiny(name, large=False)
    with torch.no_grad():
        expected = float(tiny(name, large=False)(**together(data)).loss)
    model = ftlib.unpad(model) if unpadded else model
    run = fit(model, data, config=quick(batch_size=12, max_steps=1), tokenizer=TOKENIZER)
    assert abs(losses(run)[0] - expected) < 1e-5
    with torch.no_grad():
        after = float(ftlib.repad(model)(**together(data)).loss)
    found = evaluate(ftlib.unpad(model) if unpadded else model, data, batch_size=5, tokenizer=TOKENIZER)
    assert after < expected - 0.01 and abs(found["loss"] - after) < 1e-5
    assert math.isclose(found["perplexity"], math.exp(found["loss"]))
    tokens = sum(len(row["labels"]) for row in data)
    size = sum(len(row["target"].encode()) for row in ROWS)
    assert math.isclose(found["bits_per_byte"], found["loss"] / math.log(2) * tokens / size)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_the_trainer_loses_as_much_at_every_step(name, tmp_path):
    """Without accumulation: with it the Trainer sums the means of micro-batches for models that take no count."""
    data, theirs, ours = rows(), tiny(name, large=False), tiny(name, large=False)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.01,
        lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, optim="adamw_torch", train_sampling_strategy="sequential",
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(TOKENIZER, model=theirs)
    trainer = Seq2SeqTrainer(theirs, arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    run = fit(ours, data, config=quick(batch_size=4, epochs=2, weight_decay=0.01), tokenizer=TOKENIZER)
    assert len(logged) == 6
    assert_close(torch.tensor(losses(run)), torch.tensor(logged), atol=1e-4, rtol=0)
    for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(mine, other, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("options", [{"micro_batch_size": 1}, {"micro_batch_size": 5}, {"max_tokens": 24}])
def test_how_a_step_is_cut_changes_nothing(name, options):
    one, two = tiny(name, large=False), tiny(name, large=False)
    two = ftlib.unpad(two) if name == "bart" else two
    whole = fit(one, rows(), config=quick(batch_size=12, epochs=2))
    cut = fit(two, rows(), config=quick(batch_size=12, epochs=2, **options))
    assert cut.history[0]["micro_batches"] > 1
    assert_close(torch.tensor(losses(cut)), torch.tensor(losses(whole)), atol=1e-5, rtol=0)
    assert_close(two.state_dict(), one.state_dict(), atol=1e-4, rtol=0)


def test_label_smoothing_is_pytorchs_and_not_the_evaluations():
    data, model = rows(6), tiny("t5", large=False)
    batch = together(data)
    with torch.no_grad():
        logits = model(**batch).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.1)
    config = quick(batch_size=6, max_steps=1, label_smoothing=0.1, learning_rate=0.0)
    run = fit(model, data, eval_dataset=data, config=config)
    assert abs(losses(run)[0] - float(expected)) < 1e-5
    plain = F.cross_entropy(logits, batch["labels"].flatten())
    assert abs(run.metrics["loss"] - float(plain)) < 1e-5


def test_a_model_that_learnt_its_answers_gives_them():
    data, model = rows(4), ftlib.unpad(tiny("bart", large=False, d_model=32, max_position_embeddings=80))
    options = {"max_new_tokens": 8}
    before = evaluate(model, data, tokenizer=TOKENIZER, generate=options)
    fit(model, data, config=quick(batch_size=4, epochs=120, schedule="constant"))
    after = evaluate(model, data, tokenizer=TOKENIZER, generate=options)
    assert before["chrf"] < 30 and after["loss"] < 0.1 and after["chrf"] > 99 and after["rouge1"] == 1
    wanted = [row["target"] for row in ROWS[:4]]
    assert ftlib.generate(model, [row["source"] for row in ROWS[:4]], tokenizer=TOKENIZER) == wanted


def test_lora_moves_queries_and_values_of_all_attentions_and_is_pefts():
    for name, ends in (("t5", ("q", "v")), ("bart", ("q_proj", "v_proj"))):
        model = tiny(name)
        report = ftlib.tune(model, "lora", rank=2)
        held = {key.rsplit(".lora_A", 1)[0] for key, p in model.named_parameters() if "lora_A" in key}
        assert {key.rsplit(".", 1)[1] for key in held} == set(ends) and len(held) == 2 * (2 + 4)
        assert report.trainable == 12 * 2 * (16 + 16)
        mapped = peft.get_peft_model(tiny(name), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
        assert sum(p.numel() for p in mapped.parameters() if p.requires_grad) == report.trainable


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "head-only"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_strategy_trains(name, strategy):
    model = tiny(name, large=False)
    if (strategy, name) == ("bitfit", "t5"):
        with pytest.raises(ValueError, match="no biases found in T5ForConditionalGeneration"):
            ftlib.tune(model, strategy)
        return
    report = ftlib.tune(model, strategy)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    run = fit(model, rows(), config=quick(batch_size=6, epochs=2, learning_rate=0.05))
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved and losses(run)[-1] < losses(run)[0] and 0 < report.trainable <= report.total
    assert moved <= set(model.tuning.names)
    with pytest.raises(ValueError, match="'head-only' needs a task head"):
        ftlib.tune(tiny(name), "head-only")


@pytest.mark.parametrize("name", ["t5", "t5, own head", "bart", "marian"])
def test_a_saved_model_comes_back_with_its_head_and_bias(name, tmp_path):
    model, data = tiny(name), rows(6)
    if name == "t5, own head":
        assert model.lm_head.weight is not model.shared.weight and not model.config.scale_decoder_outputs
    wanted = evaluate(model, data)["loss"]
    ftlib.save(model, tmp_path / "m", TOKENIZER)
    for again in (
        ftlib.load(tmp_path / "m"), ftlib.load_model(str(tmp_path / "m"), task="seq2seq-lm"),
        type(model).from_pretrained(tmp_path / "m").eval(),
    ):  # fmt: skip
        assert type(again) is type(model) and abs(evaluate(again, data)["loss"] - wanted) < 1e-5
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == ("own" not in name)
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key
    assert 'pipeline_tag: "text2text-generation"' in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["lora", "pfeiffer", "peft"])
@pytest.mark.parametrize("name", ["t5", "t5, own head", "bart", "marian"])
def test_an_adapter_comes_back_on_its_base(name, strategy, tmp_path):
    tiny(name, large=False).save_pretrained(tmp_path / "base")
    model, data = ftlib.load_model(str(tmp_path / "base"), task="seq2seq-lm"), rows(6)
    ftlib.tune(model, peft.LoraConfig(r=2) if strategy == "peft" else strategy)
    fit(model, data, config=quick(epochs=2, learning_rate=0.05))
    ftlib.save(model, tmp_path / "a")
    assert not (tmp_path / "a" / "base").exists()
    again, wanted = ftlib.load(tmp_path / "a"), evaluate(model, data)["loss"]
    assert abs(evaluate(again, data)["loss"] - wanted) < 1e-5
    if strategy != "pfeiffer":
        settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_2_SEQ_LM"
        theirs = peft.PeftModel.from_pretrained(type(tiny(name)).from_pretrained(tmp_path / "base"), tmp_path / "a")
        with torch.no_grad():
            assert abs(float(theirs.eval()(**together(data)).loss) - wanted) < 1e-5
        assert abs(evaluate(ftlib.merge(again), data)["loss"] - wanted) < 1e-4


def test_a_changed_head_is_another_base(tmp_path):
    """T5's own output layer is part of its base: an adapter for another one is refused."""
    base = tiny("t5, own head", large=False)
    base.save_pretrained(tmp_path / "base")
    model = ftlib.load_model(str(tmp_path / "base"), task="seq2seq-lm")
    ftlib.tune(model, "lora")
    ftlib.save(model, tmp_path / "a")
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="this base model is not the one the adapter was trained on"):
        ftlib.load(tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with pytest.warns(UserWarning, match=r"another lm_head\.weight"):
        ftlib.save(model, tmp_path / "b")
    wanted = evaluate(model, rows(4))["loss"]
    assert abs(evaluate(ftlib.load(tmp_path / "b"), rows(4))["loss"] - wanted) < 1e-5


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    T5ForConditionalGeneration(tiny("t5").config).encoder.save_pretrained(tmp_path / "e")
    with pytest.raises(ValueError, match="lacks"):
        ftlib.load_model(str(tmp_path / "e"), task="seq2seq-lm")
    with pytest.raises(ValueError, match="leave out num_labels"):
        ftlib.load_model(str(tmp_path / "e"), task="seq2seq-lm", num_labels=3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_gradient_checkpointing_and_bf16(name):
    one, two = tiny(name, large=False), ftlib.unpad(tiny(name, large=False))
    plain = fit(one, rows(), config=quick(epochs=2))
    kept = fit(two, rows(), config=quick(epochs=2, gradient_checkpointing=True))
    assert_close(torch.tensor(losses(kept)), torch.tensor(losses(plain)), atol=1e-5, rtol=0)
    half = fit(tiny(name, large=False), rows(), config=quick(epochs=2, precision="bf16"))
    assert half.precision == "bf16"
    assert_close(torch.tensor(losses(half)), torch.tensor(losses(plain)), atol=0, rtol=0.05)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_resuming_is_exact_with_dropout(name, tmp_path):
    data = rows()
    dropout = {"dropout_rate": 0.2} if name == "t5" else {"dropout": 0.2}

    def begun():
        model = tiny(name, large=False, **dropout)
        ftlib.tune(model, "lora")
        return model

    options = dict(epochs=3, shuffle=True, checkpoint_every=2)
    whole = begun()
    expected = fit(whole, data, config=quick(**options | {"checkpoint_every": None}))

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    options |= {"checkpoint_dir": str(tmp_path)}
    assert fit(begun(), data, config=quick(**options), on_record=stop).stopped == "interrupted"
    model = begun()
    run = fit(model, data, config=quick(resume="auto", **options))
    assert losses(run) == losses(expected) and run.steps == 9
    assert_close(model.state_dict(), whole.state_dict(), atol=0, rtol=0)


SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "engine")!r}, {str(ROOT)!r}]
import torch
torch.set_num_threads(1)
import conftest
import ftlib
from ftlib.engine import distributed
from test_text_to_text import NAMES, STEPS, losses, prepared, quick, rows
distributed.start()
out = {{}}
for how in ("ddp", "fsdp"):
    for name, strategy in NAMES:
        model = prepared(name, strategy)
        config = quick(**STEPS, distributed=how)
        run = ftlib.fit(model, rows(11), eval_dataset=rows(5), config=config)
        out[f"{{how}}/{{name}}/{{strategy}}"] = (losses(run), run.metrics["loss"], model.state_dict())
if distributed.rank() == 0:
    torch.save(out, sys.argv[1])
distributed.stop()
"""
STEPS = dict(epochs=2, batch_size=5, max_tokens=24, learning_rate=1e-3)  # Adam enlarges noise up to the rate
NAMES = [("t5", "full"), ("t5, own head", "lora"), ("bart", "full"), ("marian", "lora")]


def prepared(name, strategy):
    model = ftlib.unpad(tiny(name, large=False))
    ftlib.tune(model, strategy)
    return model


def test_two_processes_take_the_steps_of_one(tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "two.py"), str(tmp_path / "out.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(found) == 2 * len(NAMES)
    for key, (steps, loss, weights) in found.items():
        model = prepared(*key.split("/")[1:])
        run = fit(model, rows(11), eval_dataset=rows(5), config=quick(**STEPS))
        assert_close(torch.tensor(steps), torch.tensor(losses(run)), atol=1e-5, rtol=0, msg=key)
        assert abs(loss - run.metrics["loss"]) < 1e-5
        assert_close(weights, dict(model.state_dict()), atol=1e-4, rtol=0)


def test_what_has_no_meaning_is_said():
    model, data = tiny("bart"), rows(4)
    for options, said in (
        (dict(loss=F.cross_entropy), "loss= takes logits"),
        (dict(config=quick(r_drop=1.0, dropout=0.1)), "r_drop"),
        (dict(config=quick(patience=1, metric="bleu"), eval_dataset=data), "'bleu': evaluation gives loss, perplexity"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(model, data, **{"config": quick()} | options)
    run = fit(model, data, eval_dataset=data, config=quick(epochs=3, patience=2, metric="perplexity"))
    assert {"loss", "perplexity"} == run.metrics.keys()


def test_a_run_toml_trains_and_writes(tmp_path):
    talkative("t5").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    lines = (json.dumps({"abstract": row["source"], "title": row["target"]}) for row in ROWS)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.toml").write_text(
        f'model = "{tmp_path / "model"}"\ntask = "seq2seq-lm"\ncorpus = "{tmp_path / "data.jsonl"}"\n'
        f'output = "{tmp_path / "out"}"\ntext = "abstract"\nlabel = "title"\nprefix = "add: "\nmax_target_length = 12\n'
        'validation = 0.25\ntune = "lora"\n[train]\nepochs = 1\nbatch_size = 4\n'
    )
    command = [sys.executable, "-m", "ftlib", "train", str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "with padding" not in done.stdout
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"loss", "perplexity"} <= numbers["validation"].keys()
    assert len(ftlib.generate(ftlib.load(tmp_path / "out" / "model"), ["add: 1+1="], tokenizer=TOKENIZER)) == 1
    run = (tmp_path / "run.toml").read_text().replace("max_target_length = 12", "max_target_length = 3")
    (tmp_path / "run.toml").write_text(run)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "raise max_target_length" in done.stderr
