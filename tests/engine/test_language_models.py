"""A causal language model through every door: fit, evaluate, checkpoints, adapters, processes, disk, run.toml."""

import json
import math
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import ftlib
from ftlib import TrainConfig, evaluate, fit
from ftlib.engine.feeding import best_fit
from ftlib.methods.multitask import Head

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer():
    """Bytes as tokens, an end token and a chat template."""
    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    extra = {"additional_special_tokens": ["<|user|>", "<|assistant|>"]}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", **extra)
    made.chat_template = TEMPLATE
    return made


TOKENIZER = tokenizer()


def tiny(kind="llama", seed=0, **options):
    sizes = dict(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=128, pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    if kind == "gpt2":
        sizes = dict(vocab_size=264, n_embd=16, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, eos_token_id=1)
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | options)).eval()


def answers(count=12):
    said = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}" + "!" * (i % 5)} for i in range(count)]
    return ftlib.tokenize(said, TOKENIZER, task="causal-lm")


def quick(**options):
    usual = dict(batch_size=4, epochs=1, learning_rate=1e-2, warmup_fraction=0.0, shuffle=False, progress=False)
    return TrainConfig(**usual | options)


def losses(run):
    return [record["loss"] for record in run.history if "loss" in record]


def stock_loss(model, rows):
    """The mean over all trained tokens, each row by itself, by Transformers' own loss."""
    found, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            found += float(model(ids, labels=labels, num_items_in_batch=1).loss)
        count += int((labels[:, 1:] != -100).sum())
    return found / count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("unpadded", [True, False])
def test_a_step_has_transformers_loss_and_evaluate_too(kind, unpadded):
    rows = answers()
    model = ftlib.unpad(tiny(kind)) if unpadded else tiny(kind)
    expected = stock_loss(tiny(kind), rows)
    first = losses(fit(model, rows, config=quick(batch_size=12, max_steps=1)))[0]
    assert abs(first - expected) < 1e-5
    found, after = evaluate(model, rows, tokenizer=TOKENIZER), stock_loss(ftlib.repad(model), rows)
    assert after < expected - 0.01 and abs(found["loss"] - after) < 1e-5
    assert math.isclose(found["perplexity"], math.exp(found["loss"]))


def test_bits_per_byte_by_hand():
    rows = ftlib.tokenize([{"text": "ab"}, {"text": "abc"}], TOKENIZER, task="causal-lm")
    found = evaluate(tiny(), rows, tokenizer=TOKENIZER)
    # predicted are b <end>, b c <end>: 5 tokens, 3 bytes of text
    assert math.isclose(found["bits_per_byte"], found["loss"] / math.log(2) * 5 / 3, rel_tol=1e-9)
    assert "bits_per_byte" not in evaluate(tiny(), rows)


def test_a_model_that_learnt_its_answers_gives_them():
    rows, model = answers(8), ftlib.unpad(tiny(hidden_size=64, intermediate_size=128))
    before = evaluate(model, rows, tokenizer=TOKENIZER, generate={"max_new_tokens": 8})
    fit(model, rows, config=quick(batch_size=8, epochs=150, schedule="constant"))
    after = evaluate(model, rows, tokenizer=TOKENIZER, generate={"max_new_tokens": 8})
    assert before["exact_match"] == 0 and after["exact_match"] == 1 and after["loss"] < 0.1
    assert ftlib.generate(model, ["3+3="], tokenizer=TOKENIZER) == ["6!!!"]


@pytest.mark.parametrize("max_tokens", [14, 40, 1000])
def test_packed_micro_batches_hold_no_padding_and_change_nothing(max_tokens):
    rows = answers()
    whole, packed = ftlib.unpad(tiny()), ftlib.unpad(tiny())
    one = fit(whole, rows, config=quick(batch_size=6, epochs=2))
    two = fit(packed, rows, config=quick(batch_size=6, epochs=2, max_tokens=max_tokens))
    assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), atol=1e-5, rtol=0)
    assert_close(packed.state_dict(), whole.state_dict(), atol=1e-5, rtol=0)
    lengths = [len(row["input_ids"]) for row in rows][:6]
    assert two.history[0]["micro_batches"] == len(best_fit(lengths, max_tokens))


def test_best_fit_decreasing_by_hand():
    # 6 5 | 4 3 3 | 2: each into the fullest batch that has room for it
    assert best_fit([2, 3, 4, 6, 5, 3], 11) == [[3, 4], [2, 1, 5], [0]]
    assert best_fit([7, 3, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([10, 10], 10) == [[0], [1]]


def test_label_smoothing_is_pytorchs_and_not_the_evaluations():
    rows, model = answers(4), tiny()
    row = max(rows, key=lambda row: len(row["input_ids"]))
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = F.cross_entropy(logits, labels[0, 1:], label_smoothing=0.1)
    run = fit(model, [row], eval_dataset=[row], config=quick(max_steps=1, label_smoothing=0.1, learning_rate=0.0))
    assert abs(losses(run)[0] - float(expected)) < 1e-5
    assert abs(run.metrics["loss"] - float(F.cross_entropy(logits, labels[0, 1:]))) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 4, "targets": "all-linear"}, {"base_bits": 8}, {"dropout": 0.1}],
    ids=["lora", "all-linear", "8 bits", "dropout"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_train_save_and_load(kind, options, tmp_path):
    rows, base = answers(), tmp_path / "base"
    tiny(kind).save_pretrained(base)
    model = ftlib.unpad(ftlib.load_model(base, task="causal-lm"))
    ftlib.tune(model, "lora", **options)
    run = fit(model, rows, config=quick(epochs=4, learning_rate=0.05))
    assert losses(run)[-1] < losses(run)[0] - 0.02
    expected = evaluate(model, rows)["loss"]
    ftlib.save(model, tmp_path / "adapter", TOKENIZER)
    again = ftlib.load(tmp_path / "adapter")
    assert abs(evaluate(again, rows)["loss"] - expected) < 1e-5
    if "base_bits" not in options:
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        assert abs(stock_loss(theirs, rows) - expected) < 1e-5
        merged = ftlib.repad(ftlib.merge(again) or again)
        assert abs(stock_loss(merged, rows) - expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_is_no_new_head(tied):
    model = tiny(tie_word_embeddings=tied)
    ftlib.tune(model, "lora")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="'head-only' needs a task head"):
        ftlib.tune(tiny(tie_word_embeddings=tied), "head-only")


def test_through_peft_with_a_lora_on_the_head():
    rows, model = answers(), tiny(tie_word_embeddings=False)
    ftlib.tune(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, task_type="CAUSAL_LM"))
    run = fit(model, rows, config=quick(epochs=4, learning_rate=0.05))
    assert losses(run)[-1] < losses(run)[0] - 0.05
    assert abs(evaluate(model, rows)["loss"] - stock_loss(model, rows)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_comes_back_with_its_ties(tied, tmp_path):
    rows, model = answers(), ftlib.unpad(tiny(tie_word_embeddings=tied))
    fit(model, rows, config=quick())
    ftlib.save(ftlib.repad(model), tmp_path / "m", TOKENIZER)
    again = ftlib.load(tmp_path / "m")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert abs(evaluate(again, rows)["loss"] - evaluate(model, rows)["loss"]) < 1e-6
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert abs(stock_loss(stock, rows) - evaluate(model, rows)["loss"]) < 1e-5
    assert 'pipeline_tag: "text-generation"' in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True}, {"micro_batch_size": 1}, {"precision": "bf16"}, {"compile": True},
        {"shortcuts": False},
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_compute_a_step(options):
    rows, model, plain = answers(), ftlib.unpad(tiny()), ftlib.unpad(tiny())
    expected = losses(fit(plain, rows, config=quick(epochs=2)))
    found = losses(fit(model, rows, config=quick(epochs=2, **options)))
    far = 0.05 if "precision" in options else 1e-5
    assert_close(torch.tensor(found), torch.tensor(expected), atol=far, rtol=0)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_resuming_is_exact(tmp_path, strategy):
    rows, options = answers(), dict(epochs=3, checkpoint_dir=str(tmp_path / "c"), checkpoint_every=2, shuffle=True)
    options |= {"dropout": 0.1} if strategy == "lora" else {}

    def begun():
        model = ftlib.unpad(tiny(attention_dropout=0.1))
        ftlib.tune(model, strategy)
        return model

    whole = begun()
    expected = fit(whole, rows, config=quick(**options | {"checkpoint_dir": None, "checkpoint_every": None}))

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    assert fit(begun(), rows, config=quick(**options), on_record=stop).stopped == "interrupted"
    model = begun()
    run = fit(model, rows, config=quick(resume="auto", **options))
    assert losses(run) == losses(expected) and run.steps == 9
    assert_close(model.state_dict(), whole.state_dict(), atol=0, rtol=0)


SCRIPT = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "engine")!r}, {str(ROOT)!r}]
import torch
torch.set_num_threads(1)
import conftest
import ftlib
from ftlib.engine import distributed
from test_language_models import answers, losses, quick, tiny
distributed.start()
out = {{}}
for how in ("ddp", "fsdp"):
    for tied in (True, False):
        for strategy in ("full", "lora"):
            model = ftlib.unpad(tiny(tie_word_embeddings=tied))
            ftlib.tune(model, strategy)
            config = quick(epochs=2, batch_size=5, max_tokens=20, distributed=how)
            run = ftlib.fit(model, answers(13), eval_dataset=answers(5), config=config)
            out[f"{{how}} {{tied}} {{strategy}}"] = (losses(run), run.metrics["loss"], model.state_dict())
if distributed.rank() == 0:
    torch.save(out, sys.argv[1])
distributed.stop()
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "two.py"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(found) == 8
    for name, (steps, loss, weights) in found.items():
        model = ftlib.unpad(tiny(tie_word_embeddings="True" in name))
        ftlib.tune(model, name.split()[-1])
        run = fit(model, answers(13), eval_dataset=answers(5), config=quick(epochs=2, batch_size=5, max_tokens=20))
        assert_close(torch.tensor(steps), torch.tensor(losses(run)), atol=1e-5, rtol=0, msg=name)
        assert abs(loss - run.metrics["loss"]) < 1e-5
        assert_close(weights, dict(model.state_dict()), atol=1e-5, rtol=0)


def test_a_stream_of_texts_longer_than_memory_would_be():
    def stream():
        for i in range(10**6):
            yield {"input_ids": [i % 200 + 3, 4, 5, 6], "labels": [-100, 4, 5, 6]}

    run = fit(ftlib.unpad(tiny()), stream(), config=quick(max_steps=6, learning_rate=0.05, epochs=1))
    assert run.steps == 6 and losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"input_ids": [5, 6], "labels": [5, -100]}, "row 1, column 'labels': no token is trained"),
        ({"input_ids": [5, 6], "labels": [5]}, "row 1, column 'labels': 1 labels for 2 tokens"),
        ({"input_ids": [5, 6], "labels": [-100, 999]}, "row 1, column 'labels': label 999 is outside"),
        ({"input_ids": [5, 999], "labels": [-100, 6]}, "row 1, column 'input_ids': id 999 is outside"),
        ({"input_ids": [5] * 200, "labels": [5] * 200}, "200 tokens, the model takes 128"),
        ({"input_ids": [5, 6]}, "row 1: no 'labels'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_number(row, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        fit(tiny(), [{"input_ids": [5, 6], "labels": [-100, 6]}, row], config=quick())


def test_what_has_no_meaning_for_a_language_model_is_said():
    model, rows = tiny(), answers(4)
    for options, said in (
        (dict(loss=F.cross_entropy), "loss= takes logits"),
        (dict(config=quick(r_drop=1.0, dropout=0.1)), "r_drop"),
        (dict(config=quick(patience=1, metric="f1"), eval_dataset=rows), "'f1': evaluation gives loss, perplexity"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(model, rows, **{"config": quick()} | options)
    with pytest.raises(ValueError, match=r"ftlib\.generate"):
        ftlib.predict(model, ["a"], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="generate= needs tokenizer="):
        evaluate(model, rows, generate={})
    with pytest.raises(ValueError, match="generate= is for language models"):
        from conftest import make_tiny_model

        evaluate(make_tiny_model(), [{"input_ids": [5], "labels": 1}], generate={})
    with pytest.raises(ValueError, match="task='causal-lm': choose one of"):
        Head("causal-lm", 5)


def test_early_stopping_by_perplexity():
    rows = answers()
    run = fit(tiny(), rows, eval_dataset=rows, config=quick(epochs=3, patience=2, metric="perplexity"))
    assert {"loss", "perplexity"} == run.metrics.keys()


def test_a_run_toml_trains_a_language_model(tmp_path):
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    lines = "\n".join(json.dumps({"messages": said}) for _ in range(12))
    (tmp_path / "data.jsonl").write_text(lines)
    (tmp_path / "run.toml").write_text(
        f'model = "{folder}"\ntask = "causal-lm"\ncorpus = "{tmp_path / "data.jsonl"}"\noutput = "{tmp_path / "out"}"\n'
        'validation = 0.25\ntune = "lora"\n[train]\nepochs = 1\nbatch_size = 4\n'
    )
    command = [sys.executable, "-m", "ftlib", "train", str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"loss", "perplexity"} <= numbers["validation"].keys()
    assert evaluate(ftlib.load(tmp_path / "out" / "model"), answers(3))["loss"] > 0
