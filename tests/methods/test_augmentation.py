"""Changed texts by hand and by EDA's rule; a masked language model's words by its own logits; mixup by soft labels."""

from functools import partial

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import WORDS, tiny_config
from test_fit import make_rows, quick
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate
from ftlib.methods.augmentation import (
    augment,
    back_translation,
    changes,
    delete_words,
    masked_words,
    mixup,
    swap_words,
)
from ftlib.methods.unpadding import unpad


def rng(seed=0):
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------- words of a text


def test_how_many_words_change():
    # EDA's code: max(1, int(alpha * words)); at 0.05 a second word from 40 words on, at 0.1 from 20
    assert [changes(words, 0.05) for words in (1, 10, 39, 40, 59, 60)] == [1, 1, 1, 2, 2, 3]
    assert [changes(words, 0.1) for words in (19, 20, 29, 30)] == [1, 2, 2, 3]


def test_deletion():
    text = "a film  is\ngood"
    assert delete_words(text, rng(), 0.0) == "a film is good"
    assert delete_words(text, rng(), 1.0) in text.split()  # one stays
    assert delete_words("dull", rng(), 1.0) == "dull"
    left = [len(delete_words(" ".join("ab" * 500), rng(seed), 0.1).split()) for seed in range(20)]
    assert abs(np.mean(left) / len(" ".join("ab" * 500).split()) - 0.9) < 0.01
    kept = delete_words("a b c d e f g h i j", rng(1), 0.5).split()
    assert kept == sorted(kept) and 0 < len(kept) < 10  # the order stays


def test_swaps():
    words = [str(i) for i in range(20)]
    for seed in range(20):
        once = swap_words(" ".join(words), rng(seed), 0.05).split()
        moved = [i for i in range(20) if once[i] != words[i]]
        assert sorted(once) == sorted(words) and len(moved) == 2
        assert once[moved[0]] == words[moved[1]] and once[moved[1]] == words[moved[0]]
    thrice = swap_words(" ".join(words), rng(), 0.15).split()
    assert sorted(thrice) == sorted(words) and 2 < sum(a != b for a, b in zip(thrice, words, strict=True)) <= 6
    assert swap_words("dull", rng()) == "dull" and swap_words("a b", rng()) == "b a"


# ------------------------------------------------------------------------------------ a masked language model


@pytest.fixture
def masked_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(tiny_config(initializer_range=0.5))
    return model.train()


def scores_at(model, tokenizer, text):
    """Logits of the tokenizer's whole words at the masks of a text, (masks, 25)."""
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits[0][batch["input_ids"][0] == tokenizer.mask_token_id]
    ids = tokenizer.convert_tokens_to_ids(WORDS)
    return logits[:, ids]


def test_a_word_gives_way_to_the_likeliest_other(masked_model, tiny_tokenizer):
    change = masked_words(masked_model, tiny_tokenizer, rate=0.3, top_k=1)
    words = "(the film) is very good, and not dull.".split()
    found = change(" ".join(words), rng()).split()
    assert masked_model.training  # as it was
    places = [i for i in range(len(words)) if found[i] != words[i]]
    assert len(places) == changes(8, 0.3) == 2
    bare = [word.strip("(),.") for word in words]
    with_masks = [word.replace(bare[i], "[MASK]") if i in places else word for i, word in enumerate(words)]
    expected = list(words)
    for i, logits in zip(places, scores_at(masked_model, tiny_tokenizer, " ".join(with_masks)), strict=True):
        logits[WORDS.index(bare[i])] = -torch.inf
        expected[i] = words[i].replace(bare[i], WORDS[int(logits.argmax())])  # the marks stay
    assert found == expected


def test_words_are_drawn_by_the_models_probabilities(masked_model, tiny_tokenizer):
    change = masked_words(masked_model, tiny_tokenizer, rate=0.1, top_k=5, temperature=2.0, keep=["film", "Dull"])
    drawn = [change("film was dull", generator) for generator in [rng()] for _ in range(400)]
    assert {text.split()[0] for text in drawn} == {"film"} and {text.split()[2] for text in drawn} == {"dull"}
    [logits] = scores_at(masked_model, tiny_tokenizer, "film [MASK] dull")
    best = logits.topk(5)
    shares = dict(zip((WORDS[i] for i in best.indices), (best.values / 2).softmax(-1).tolist(), strict=True))
    counts = {word: sum(text.split()[1] == word for text in drawn) / 400 for word in shares}
    assert sum(counts.values()) == 1
    assert counts == pytest.approx(shares, abs=0.1)  # four standard errors


def test_words_are_put_in(masked_model, tiny_tokenizer):
    change = masked_words(masked_model, tiny_tokenizer, rate=0.3, top_k=1, insert=True)
    words = "the film is (very) good and not".split()
    found = change(" ".join(words), rng(3)).replace("(", "( ").replace(")", " )").split()
    before = " ".join(words).replace("(", "( ").replace(")", " )").split()
    without = {(i, j): [word for k, word in enumerate(found) if k not in (i, j)] for j in range(11) for i in range(j)}
    i, j = next(pair for pair, left in without.items() if left == before)  # without two words it is the text that was
    masked = [("[MASK]" if k in (i, j) else word) for k, word in enumerate(found)]
    logits = scores_at(masked_model, tiny_tokenizer, " ".join(masked))
    for place, own in zip((i, j), logits, strict=True):
        own[WORDS.index(found[place + 1 + (found[place + 1] == "(")])] = -torch.inf  # not the word it stands before
        assert found[place] == WORDS[int(own.argmax())]


def test_nothing_to_change_and_texts_too_long(masked_model, tiny_tokenizer):
    change = masked_words(masked_model, tiny_tokenizer, rate=1.0, keep=["film"])
    assert change("film !! Film.", rng()) == "film !! Film."
    long = ["dull"] * 60  # the model takes 40 tokens, 38 of them words
    found = change(" ".join(long), rng()).split()
    assert [word == "dull" for word in found] == [False] * 38 + [True] * 22


def test_a_tokenizer_without_a_mask_is_refused(masked_model, tiny_tokenizer):
    import copy

    other = copy.deepcopy(tiny_tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        masked_words(masked_model, other)
    with pytest.raises(ValueError, match=r"has .MASK. in it: 'a .MASK. film'"):
        masked_words(masked_model, tiny_tokenizer)("a [MASK] film", rng())


def test_pieces_of_other_tokenizers_become_words(masked_model):
    """Byte pairs begin words with Ġ, and hold letters as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "<mask>", "Ġfilm", "film", "ĠfÃ¼r", "Ġ,", "s"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", mask_token="<mask>")
    change = masked_words(masked_model, tokenizer, rate=1.0)
    assert {change("x", rng(seed)) for seed in range(20)} == {"film", "für"}


def test_back_translation_goes_there_and_back():
    seeds = []

    def said(texts, seed, mark):
        seeds.append(seed)
        return [f"{text} {mark}" for text in texts]

    change = back_translation(partial(said, mark="fr"), partial(said, mark="en"))
    assert change("a film", rng(0)) == "a film fr en"
    change("a film", rng(1))
    assert len(set(seeds)) == 4  # other draws for every copy


# -------------------------------------------------------------------------------------------------------- rows


def table(count=4):
    texts = [f"{i} the film is very good" for i in range(count)]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    columns = {"text": texts, "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_rows_grow_and_labels_stay():
    rows = table()
    grown = augment(rows, swap_words, 3, seed=1)
    assert grown.features == rows.features and len(grown) == 16
    assert grown["text"][:4] == rows["text"][:] and grown["label"][:4] == rows["label"][:]
    for place, row in enumerate(grown.select(range(4, 16))):
        before = rows[place // 3]
        assert row["label"] == before["label"] and sorted(row["text"].split()) == sorted(before["text"].split())
    assert len(set(grown["text"][4:7])) > 1  # copies differ
    assert grown["text"][:] == augment(rows, swap_words, 3, seed=1)["text"][:]
    assert grown["text"][:] != augment(rows, swap_words, 3, seed=2)["text"][:]
    fewer = augment(rows.select([0, 1]), swap_words, 2, seed=1)  # a copy hangs on its row and number alone
    assert fewer["text"][2:] == [*grown["text"][4:6], *grown["text"][7:9]]


def test_changes_take_turns_and_other_columns_stay():
    rows = [{"id": 7, "review": "good film", "stars": 0.5}]
    first, second = (lambda text, _: f"1 {text}"), (lambda text, _: f"2 {text}")
    grown = augment(rows, [first, second], 3, text="review")
    assert grown["review"][:] == ["good film", "1 good film", "2 good film", "1 good film"]
    assert grown["id"][:] == [7] * 4 and grown["stars"][:] == [0.5] * 4


def test_only_train_grows():
    splits = datasets.DatasetDict({"train": table(4), "validation": table(3), "test": table(2)})
    grown = augment(splits, swap_words, 2)
    assert {split: len(rows) for split, rows in grown.items()} == {"train": 12, "validation": 3, "test": 2}
    assert type(grown) is datasets.DatasetDict and grown["test"]["text"][:] == splits["test"]["text"][:]
    with pytest.raises(ValueError, match="no split 'train' among test"):
        augment({"test": [{"text": "a", "label": 0}]}, swap_words)


@pytest.mark.parametrize(
    "rows, how, options, error, match",
    [
        ([{"text": "a", "label": 0}], swap_words, {"text": "review"}, ValueError, "no column 'review' among text"),
        ([{"text": "a"}, {"text": ""}], swap_words, {}, ValueError, "row 1, column 'text': the text is empty"),
        ([{"text": "a"}], lambda text, _: " ", {}, ValueError, "row 0, column 'text': the text is empty"),
        ([{"text": "a"}], lambda text, _: None, {}, TypeError, "row 0, column 'text': expected text, got None"),
        ([{"text": ["a", "b"]}], swap_words, {}, TypeError, "row 0, column 'text': expected text"),
        ([{"text": "a"}], swap_words, {"times": 0}, ValueError, "times=0"),
        ([{"text": "a"}], swap_words, {"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_bad_rows_are_named(rows, how, options, error, match):
    with pytest.raises(error, match=match):
        augment(rows, how, **options)


# ------------------------------------------------------------------------------------------------------- mixup


def soft(labels, share, turn, classes=3):
    """Targets as probabilities: share of the label, the rest of the label `turn` rows before."""
    hot = F.one_hot(labels, classes).float()
    return share * hot + (1 - share) * hot.roll(turn, 0)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_mixup_is_the_loss_of_soft_labels_on_mixed_vectors(tiny_model, kind):
    model = tiny_model(num_labels=3, model_type=kind)
    batch = collate(make_rows(6))
    batch["labels"] = torch.arange(6) % 3
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    turn = int(torch.randint(1, 6, ()))
    hidden = model.base_model(**inputs).last_hidden_state  # (6, tokens, 16)
    hidden = share * hidden + (1 - share) * hidden.roll(turn, 0)
    if kind == "bert":
        logits = model.classifier(model.bert.pooler(hidden))
    elif kind == "roberta":
        logits = model.classifier(hidden)
    else:
        logits = model.classifier(model.pre_classifier(hidden[:, 0]).relu())
    wanted = F.cross_entropy(logits, soft(batch["labels"], share, turn), reduction="sum")
    plain = F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")
    model.train()
    with mixup(model, 0.4) as loss:
        torch.manual_seed(3)
        found = loss(model(**inputs).logits, batch["labels"])
        assert_close(found, wanted)
        assert_close(loss(model.eval()(**inputs).logits, batch["labels"]), plain)
    assert_close(F.cross_entropy(model.train()(**inputs).logits, batch["labels"], reduction="sum"), plain)


def test_a_step_of_fit_with_mixup_is_one_of_soft_labels(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.3))
    rows, rate = make_rows(2), 0.1  # of two rows the other one is the partner
    model, twin = tiny_model(), tiny_model()
    config = quick(
        max_steps=1, batch_size=2, optimizer="sgd", learning_rate=rate, schedule="constant", warmup_fraction=0.0,
        weight_decay=0.0, shuffle=False, shortcuts=False, max_grad_norm=None,
    )  # fmt: skip
    with mixup(unpad(model)) as loss:
        run = fit(model, rows, eval_dataset=rows, config=config, loss=loss)
    assert run.metrics["loss"] == pytest.approx(evaluate(model, rows)["loss"], abs=1e-6)  # of whole rows
    batch = collate(rows)
    labels = batch.pop("labels")
    hidden = twin.bert(**batch).last_hidden_state
    logits = twin.classifier(twin.bert.pooler(0.3 * hidden + 0.7 * hidden.flip(0)))
    F.cross_entropy(logits, soft(labels, 0.3, 1, 2), reduction="mean").backward()
    for (name, p), own in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert_close(own, p - rate * p.grad if p.grad is not None else p, atol=1e-5, rtol=1e-5, msg=name)


def test_a_run_with_mixup_goes_on_with_the_same_bits(tiny_model, tmp_path):
    rows = make_rows(24)

    def run(folder, stop=None):
        model = tiny_model()
        config = quick(epochs=2, batch_size=4, checkpoint_dir=str(tmp_path / folder), checkpoint_every=4, resume="auto")

        def on_record(record):
            if record["step"] == stop:
                raise OSError("stop")

        with mixup(model) as loss:
            try:
                fit(model, rows, config=config, loss=loss, on_record=on_record)
            except OSError:
                assert stop
        return model.state_dict()

    whole = run("a")
    run("b", stop=6)
    for name, weight in run("b").items():
        assert torch.equal(weight, whole[name]), name


def test_mixup_of_numbers_and_of_several_labels(tiny_model):
    for task, labels in (
        ("regression", torch.tensor([1.0, 2.0])),
        ("multi-label-classification", torch.tensor([[1.0, 0.0], [0.0, 1.0]])),
    ):
        model = tiny_model(task, 1 if task == "regression" else 2).train()
        with mixup(model) as loss:
            torch.manual_seed(0)
            logits = model(torch.tensor([[5, 6], [7, 8]])).logits
            torch.manual_seed(0)
            share, own = float(torch.distributions.Beta(0.2, 0.2).sample()), ftlib.task_loss(task)
            assert_close(loss(logits, labels), share * own(logits, labels) + (1 - share) * own(logits, labels.flip(0)))


def test_mixup_refuses_what_it_cannot_mix(tiny_model):
    with pytest.raises(ValueError, match="not for token-classification"), mixup(tiny_model("token-classification")):
        pass
    with pytest.raises(ValueError, match="alpha=0"), mixup(tiny_model(), 0):
        pass
    sizes = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    decoder = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)).train()
    with mixup(decoder), pytest.raises(ValueError, match="gpt2's head reads the last token"):
        decoder(torch.tensor([[5, 6], [7, 8]]))
