"""Models of masked tokens in `fit`, `evaluate` and `predict`: as Transformers computes, padded or not, cut or not."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_config
from test_fit import before_steps, quick, same, steps, weights

import ftlib
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, predict
from ftlib.methods.token_losses import in_chunks
from ftlib.tasks import masked

ROOT = Path(__file__).parents[2]
TEXTS = ["the film is good", "a dull plot and unfun films", "we book a flight from boston to denver", "you book",
         "not very fun", "great films", "a flight", "the plot is not fun and the film is dull"]  # fmt: skip
PLAIN = {"hidden_activation": "gelu", "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
KINDS = ["bert", "roberta", "distilbert", "modernbert", "albert", "electra"]


def build(kind="bert", head=None, **options):
    options |= PLAIN if kind == "modernbert" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = transformers.AutoModelForMaskedLM.from_config if head is None else getattr(transformers, head)
        model = auto(tiny_config(kind, **options)).eval()
        for p in model.parameters():  # biases too, that a head which forgets one is seen
            torch.nn.init.normal_(p, std=0.2) if p.ndim == 1 and not p.any() else None
    return model


@pytest.fixture
def rows(tiny_tokenizer):
    return ftlib.tokenize([{"text": t} for t in TEXTS], tiny_tokenizer, task="masked-lm", mask_probability=0.4)


@pytest.fixture
def pairs(tiny_tokenizer):
    """Rows of both kinds of pairs."""
    table = [{"text": a, "text_pair": b, "label": i % 2} for i, (a, b) in enumerate(pairwise(TEXTS))]

    def made(name):
        named = [{name if k == "label" else k: v for k, v in row.items()} for row in table]
        return ftlib.tokenize(named, tiny_tokenizer, task="masked-lm", mask_probability=0.4)

    return made


def by_hand(model, rows, keys):
    """(summed loss by Transformers' own forward, right, count) of the rows one by one, masked by these keys."""
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in masked.draw(list(rows), keys):
            labels = torch.tensor([row["labels"]])
            output = model(input_ids=torch.tensor(np.array(row["input_ids"])[None]), labels=labels)
            n, chosen = int((labels != -100).sum()), labels != -100
            total += float(output.loss) * n if n else 0.0
            right += int((output.logits.argmax(-1) == labels)[chosen].sum())
            count += n
    return total, right, count


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_accuracy_are_those_of_transformers_padded_and_unpadded(rows, kind, tiny_tokenizer):
    model = build(kind)
    total, right, count = by_hand(model, rows, [(0, 0, i) for i in range(len(rows))])
    for _ in range(2):
        found = evaluate(model, rows, tokenizer=tiny_tokenizer)
        assert found["loss"] == pytest.approx(total / count, abs=1e-5) and found["accuracy"] == right / count
        assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4) and len(found) == 3
        assert evaluate(model, rows, batch_size=1)["loss"] == pytest.approx(found["loss"], abs=1e-5)
        ftlib.unpad(model)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_unpadded_and_by_micro_batches(rows, kind):
    found = []
    for change in ({}, {"micro_batch_size": 1}, {"unpad": True}):
        model = build(kind)
        model = ftlib.unpad(model) if change.pop("unpad", False) else model
        run = fit(model, rows, config=quick(max_steps=3, schedule="constant", **change))
        found.append((steps(run), weights(model)))
    for losses, moved in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5)
        assert all(torch.allclose(moved[n], w, atol=2e-5) for n, w in found[0][1].items())


def test_a_step_divides_by_its_masked_tokens_with_masks_new_in_every_epoch(rows):
    """The first steps of two epochs, by Transformers' own loss on masks drawn by (seed, epoch, row)."""
    model, seen = build(), []
    before = {}
    with pytest.MonkeyPatch.context() as patch:
        before_steps(patch, lambda number, step: before.update({number: (list(step.places), weights(model))}))
        run = fit(model, rows, config=quick(max_steps=4, seed=5))  # two steps of four rows an epoch
    for number, (places, state) in before.items():
        twin = build()
        twin.load_state_dict(state)
        own = [rows[i] for _, i in places]
        total, _, count = by_hand(twin, own, [(5, number // 2, i) for _, i in places])
        assert steps(run)[number] == pytest.approx(total / count, abs=1e-5)
        seen += [i for _, i in places]
    assert sorted(seen) == sorted([*range(8)] * 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_run_goes_on_with_the_same_masks(rows, stream, tmp_path, monkeypatch, tiny_tokenizer):
    texts = [{"text": text} for text in TEXTS] * 3

    def data():
        packed = ftlib.PackedText(texts, tiny_tokenizer, 12, task="masked-lm", mask_probability=0.4)
        return packed if stream else rows

    def new():
        return build(hidden_dropout_prob=0.1)

    whole = new()
    undisturbed = fit(whole, data(), config=quick(max_steps=7, shuffle_buffer=5))

    def interrupt(number, step):
        if number == 4:
            raise KeyboardInterrupt

    config = quick(max_steps=7, shuffle_buffer=5, checkpoint_dir=str(tmp_path), resume="auto")
    with monkeypatch.context() as patch:
        before_steps(patch, interrupt)
        assert fit(new(), data(), config=config).steps == 4
    model = new()
    run = fit(model, data(), config=config)
    assert steps(run) == steps(undisturbed) and same(weights(model), weights(whole))


def test_a_micro_batch_without_a_masked_token(rows):
    few = rows.map(lambda row: {"masking": [*row["masking"][:2], 0.02]})
    run = fit(build(), few, config=quick(max_steps=3, micro_batch_size=1))
    assert len(steps(run)) == 3 and all(np.isfinite(steps(run)))


# --------------------------------------------------------------------------------------------------------- pairs

BOTH = [
    ("bert", "BertForPreTraining", "next_sentence_label"),
    ("albert", "AlbertForPreTraining", "sentence_order_label"),
]


@pytest.mark.parametrize("kind, head, name", BOTH)
def test_a_loss_of_masked_tokens_and_pairs_is_the_models_own(pairs, kind, head, name, tiny_tokenizer):
    model, data = build(kind, head), pairs(name)
    drawn = masked.draw(list(data), [(0, 0, i) for i in range(len(data))])
    batch = ftlib.collate([{k: v for k, v in row.items() if k != "pair_weight"} for row in drawn])
    with torch.no_grad():
        own = model(**batch)
    count = int((batch["labels"] != -100).sum())
    right = own[{"bert": "seq_relationship_logits", "albert": "sop_logits"}[kind]].argmax(-1) == batch[name]
    for _ in range(2):
        found = evaluate(model, data, tokenizer=tiny_tokenizer, batch_size=3)
        assert found["loss"] == pytest.approx(float(own.loss), abs=1e-5)
        assert found["pair_accuracy"] == float(right.double().mean())
        assert found["perplexity"] == pytest.approx(np.exp(found["loss"] - found["pair_loss"]), rel=1e-5)
        with torch.no_grad(), in_chunks(model):
            assert float(model(**batch).loss) / count == pytest.approx(float(own.loss), abs=1e-5)
        ftlib.unpad(model)


@pytest.mark.parametrize("kind, head, name", BOTH)
def test_pairs_train_alike_however_a_step_is_cut(pairs, kind, head, name):
    found = []
    for size in (None, 1, 3):
        model = build(kind, head)
        run = fit(model, pairs(name), config=quick(max_steps=3, batch_size=7, micro_batch_size=size, shuffle=False))
        found.append((steps(run), weights(model)))
    drawn = masked.draw(list(pairs(name)), [(0, 0, i) for i in range(7)])
    batch = ftlib.collate([{k: v for k, v in row.items() if k != "pair_weight"} for row in drawn])
    assert found[0][0][0] == pytest.approx(float(build(kind, head)(**batch).loss.detach()), abs=1e-5)
    for losses, moved in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5)
        assert all(torch.allclose(moved[n], w, atol=2e-5) for n, w in found[0][1].items())


def test_a_model_without_a_head_on_pairs_reads_no_label_of_theirs(pairs, tiny_tokenizer):
    assert evaluate(build(), pairs("next_sentence_label"), tokenizer=tiny_tokenizer).keys() == {
        "loss", "perplexity", "accuracy"
    }  # fmt: skip
    model, data = build("bert", "BertForPreTraining"), pairs("next_sentence_label")
    rows = data.remove_columns("next_sentence_label")
    assert "pair_loss" not in evaluate(model, rows, tokenizer=tiny_tokenizer)


# ------------------------------------------------------------------------------------------------------- filling


@pytest.mark.parametrize("unpadded", [False, True])
def test_predict_fills_masks_as_transformers_pipeline(tiny_tokenizer, unpadded):
    model = build(vocab_size=31)
    texts = ["the [MASK] is good", "[MASK] book a flight from [MASK] to denver", "a [MASK]"]
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tiny_tokenizer, device="cpu")
    wanted = [[one] if isinstance(one[0], dict) else one for one in pipe(texts, top_k=4)]
    model = ftlib.unpad(model) if unpadded else model
    found = predict(model, texts, tokenizer=tiny_tokenizer, top_k=4, batch_size=2)
    assert [len(masks) for masks in found] == [1, 2, 1]
    for masks, theirs in zip(found, wanted, strict=True):
        for best, other in zip(masks, theirs, strict=True):
            assert [one["token"] for one in best] == [one["token"] for one in other]
            assert [one["text"] for one in best] == [one["token_str"] for one in other]
            assert [one["score"] for one in best] == pytest.approx([one["score"] for one in other], abs=1e-5)
    assert predict(model, [], tokenizer=tiny_tokenizer) == []


@pytest.mark.parametrize(
    "texts, options, error, said",
    [
        (["a [MASK]", "a film"], {}, ValueError, r"text 1: no mask token \[MASK\] in 'a film'"),
        (["a film is [MASK]"], {"max_length": 5}, ValueError, "text 0: 1 of 1 masks are behind token 5; shorten"),
        (["a [MASK]"], {"top_k": 0}, ValueError, "top_k=0: need a whole number of at least 1"),
        ([{"input_ids": [2, 4, 3]}], {}, TypeError, "text 0: .*; pass texts with the mask token"),
    ],
)
def test_what_can_not_be_filled(tiny_tokenizer, texts, options, error, said):
    with pytest.raises(error, match=said):
        predict(build(), texts, tokenizer=tiny_tokenizer, **options)


# ------------------------------------------------------------------------------------- tuning, saving, command line


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_lora_trains_and_is_saved_without_the_head_that_is_there(rows, kind, tmp_path):
    folder = tmp_path / "base"
    build(kind).save_pretrained(folder)
    model = ftlib.load_model(folder, task="masked-lm")
    report = ftlib.tune(model, "lora", rank=2, targets="all-linear")
    assert set(report.groups) >= {"adapters"} and report.groups.get("head", (0, 0))[0] == 0
    fit(model, rows, config=quick(max_steps=3, learning_rate=1e-2))
    before = evaluate(model, rows)
    ftlib.save(model, tmp_path / "adapter")
    assert evaluate(ftlib.load(tmp_path / "adapter"), rows) == before
    assert evaluate(ftlib.merge(model), rows)["loss"] == pytest.approx(before["loss"], abs=1e-5)


@pytest.mark.parametrize("kind, head", [("bert", None), ("bert", "BertForPreTraining"), ("modernbert", None)])
def test_saved_and_loaded(rows, kind, head, tmp_path, tiny_tokenizer):
    model = build(kind, head)
    before = evaluate(model, rows, tokenizer=tiny_tokenizer)
    ftlib.save(model, tmp_path / "m", tiny_tokenizer)
    again = ftlib.load(tmp_path / "m")
    assert type(again) is type(model) and evaluate(again, rows) == before
    assert type(model).from_pretrained(tmp_path / "m").get_output_embeddings().weight.shape == (64, 16)


def test_a_checkpoint_without_such_a_head_is_refused(tmp_path):
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"lacks cls.*starts random.*start one on an encoder: ftlib\.masked_head"):
        ftlib.load_model(tmp_path / "bert", task="masked-lm")


def test_text_is_not_generated_and_no_loss_is_taken(rows, tiny_tokenizer):
    with pytest.raises(ValueError, match="generate= is for language models"):
        evaluate(build(), rows, tokenizer=tiny_tokenizer, generate={})
    with pytest.raises(ValueError, match="compares predicted distributions of classes; not for masked-lm"):
        fit(build(), rows, config=quick(r_drop=1.0))


def test_a_run_toml_trains_on_masked_tokens(tmp_path, tiny_tokenizer):
    build(vocab_size=31).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "run.toml").write_text(
        f'model = "{tmp_path / "model"}"\ntask = "masked-lm"\ncorpus = "{tmp_path / "data.jsonl"}"\n'
        f'output = "{tmp_path / "out"}"\nvalidation = 0.5\nmask_probability = 0.3\nwhole_words = true\n'
        "[train]\nepochs = 1\nbatch_size = 4\n"
    )
    command = [sys.executable, "-m", "ftlib", "train", str(tmp_path / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"loss", "perplexity", "accuracy"} == numbers["validation"].keys()


def test_a_dataset_streams_into_fit_as_it_is_tokenized(tiny_tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in TEXTS]))
    stream = ftlib.tokenize(stream, tiny_tokenizer, task="masked-lm", whole_words=True, mask_probability=0.5)
    assert len(steps(fit(build(), stream, config=quick(max_steps=5)))) == 5


# ------------------------------------------------------------------------------------------------- two processes

TWO = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests" / room) for room in ("", "engine", "inputs")] + [str(ROOT)]!r}
import torch
torch.set_num_threads(1)
import ftlib
from ftlib.engine import distributed
from test_fit import quick, steps, weights
from test_masked_models import CASES, SGD, build, unmasked
distributed.start()
out = {{}}
for how in ("ddp", "fsdp"):
    for name, options in CASES.items():
        model = build()
        rows = unmasked() if name == "rows" else iter(unmasked())
        run = ftlib.fit(model, rows, eval_dataset=unmasked(5), config=quick(**options, **SGD, distributed=how))
        out[f"{{how}} {{name}}"] = (steps(run), run.metrics["loss"], weights(model))
if distributed.rank() == 0:
    torch.save(out, sys.argv[1])
distributed.stop()
"""
# three steps an epoch, the last of one row, which leaves none for the second process
CASES = {"rows": dict(epochs=2, batch_size=5, micro_batch_size=2), "stream": dict(max_steps=2, batch_size=5)}
SGD = dict(optimizer="sgd", learning_rate=0.1)  # Adam enlarges what rounding leaves


def unmasked(count=11):
    """Rows of tokens that are all masked with a share of 0.4, of different lengths."""
    lengths = [4 + i % 5 for i in range(count)]
    ids = [[2, *((7 * i + k) % 50 + 5 for k in range(n)), 3] for i, n in enumerate(lengths)]
    return [{"input_ids": own, "labels": [-100, *own[1:-1], -100], "masking": [4, 64, 0.4]} for own in ids]


def test_two_processes_mask_the_rows_as_one_does(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "two.py"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(found) == 2 * len(CASES)
    for key, (losses, loss, moved) in found.items():
        model, name = build(), key.split()[1]
        rows = unmasked() if name == "rows" else iter(unmasked())
        run = fit(model, rows, eval_dataset=unmasked(5), config=quick(**CASES[name], **SGD))
        assert losses == pytest.approx(steps(run), abs=1e-5) and loss == pytest.approx(run.metrics["loss"], abs=1e-5)
        assert all(torch.allclose(moved[n], w, atol=2e-5) for n, w in weights(model).items()), key
