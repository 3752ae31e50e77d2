"""Entities are those of Transformers' pipeline on the same model, where its rules are the same; the rest by hand."""

import copy

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close

from ftlib.engine.entities import AGGREGATIONS, entities
from ftlib.engine.prediction import predict
from ftlib.inputs.pretrained import load_model, load_tokenizer
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.sequences import CRF, bio_transitions, viterbi
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.tagging import bio_errors, spans_to_tags, tag_groups, tags_to_spans

NAMES = ["O", "B-city", "I-city", "B-day", "I-day"]
SPACED = [
    "we book a flight from boston to denver",
    "the films is not veryfun unfun unfuns",
    "zebra good quaggas bad",
    "flight",
]
MARKED = [
    "  great   plot \n dull\tfilm  ",
    "the film, is (very) good.",
    "boston-denver",
    "plot... and fun!!",
    "we’re in boston",
]
ODD = [
    "caf\u00e9 boston",
    "👍 good 👍🏽 film 🎉",
    "東京 is great",
    "good\u200bfun",
    "a\u00a0film",
    "[SEP] is [UNK] fun",
]


def named(model, names=NAMES):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def spread(model, by=40.0):
    """With the small weights of a new head all labels are about equally likely; larger ones make clear tags."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("classifier"):
                parameter.mul_(by)
    return model


# so that every word begins with a piece that holds its first letter
LETTERS = [" ".join("abcdefghijklmnopqrstuvwxyz")] * 9


def trained_bpe(prefix_space=True):
    """A RoBERTa tokenizer: byte-level BPE of a few merges."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SPACED + LETTERS, trainers.BpeTrainer(vocab_size=310, special_tokens=special, initial_alphabet=alphabet)
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix_space)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="<s>", sep_token="</s>", model_max_length=60, **names
    )


def unigram():
    """As SentencePiece makes them for XLM-R: "▁" for the space before a word."""
    letters = [chr(n) for n in range(97, 123)]
    vocabulary = {"<s>": 0, "<pad>": 0, "</s>": 0, "<unk>": 0, "▁": -9, ",": -4}
    vocabulary |= dict.fromkeys([f"▁{one}" for one in letters] + letters, -4)
    vocabulary |= dict.fromkeys(["▁film", "▁bo", "ston", "den", "fun", "▁un", "▁the", "▁ver", "▁den", "oo"], -2)
    core = Tokenizer(models.Unigram([*vocabulary.items()], unk_id=3))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=60,
    )  # fmt: skip


def built(kind, tiny_model, tiny_tokenizer):
    """(model, tokenizer) of a family, small and random, with clear tags."""
    if kind in ("bert", "distilbert"):
        tokenizer = tiny_tokenizer
        if kind == "distilbert":
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tiny_tokenizer.backend_tokenizer, model_max_length=40, pad_token="[PAD]",
                unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                model_input_names=["input_ids", "attention_mask"],
            )  # fmt: skip
        return spread(named(tiny_model("token-classification", 5, model_type=kind, seed=3))), tokenizer
    tokenizer = trained_bpe() if kind == "roberta" else unigram()
    options = dict(vocab_size=len(tokenizer), max_position_embeddings=70, pad_token_id=tokenizer.pad_token_id)
    model = tiny_model("token-classification", 5, model_type=kind, seed=3, type_vocab_size=1, **options)
    return spread(named(model)), tokenizer


@pytest.fixture(params=["bert", "distilbert", "roberta", "xlm-roberta"])
def family(request, tiny_model, tiny_tokenizer):
    return request.param, *built(request.param, tiny_model, tiny_tokenizer)


def theirs(model, tokenizer, texts, aggregation, **options):
    """The pipeline's entities in our form; its white space at the ends is cut off."""
    work = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=aggregation, device="cpu",
        **options,
    )  # fmt: skip
    out = []
    for text in texts:
        own = []
        for one in work(text):
            held = text[one["start"] : one["end"]]
            start, end = one["end"] - len(held.lstrip()), one["start"] + len(held.rstrip())
            label = one.get("entity_group", one.get("entity"))
            own.append({"label": label, "start": start, "end": end, "text": held.strip(), "score": float(one["score"])})
        out.append([one for one in own if one["text"]])
    return out


def same(found, expected):
    plain = [[{k: v for k, v in one.items() if k != "score"} for one in own] for own in found]
    assert plain == [[{k: v for k, v in one.items() if k != "score"} for one in own] for own in expected]
    scores = [[one["score"] for own in both for one in own] for both in (found, expected)]
    assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- Transformers' pipeline


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entities_are_those_of_the_pipeline(family, aggregation):
    kind, model, tokenizer = family
    texts = SPACED + (MARKED + ODD if kind.endswith("bert") or aggregation in ("simple", "none") else [])
    found = entities(model, texts, tokenizer=tokenizer, aggregation=aggregation)
    expected = theirs(model, tokenizer, texts, aggregation)
    assert sum(map(len, expected)) > len(texts) and len({one["label"] for own in expected for one in own}) > 1
    same(found, expected)
    for text, own in zip(texts, found, strict=True):
        assert all(text[one["start"] : one["end"]] == one["text"] == one["text"].strip() != "" for one in own)


@pytest.mark.parametrize("names", [["O", "NOUN", "VERB", "ADP", "DET"], [f"LABEL_{i}" for i in range(5)]])
def test_labels_that_are_no_bio(tiny_model, tiny_tokenizer, names):
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    named(model, names)
    texts = SPACED + MARKED
    for aggregation in AGGREGATIONS:
        found = entities(model, texts, tokenizer=tokenizer, aggregation=aggregation)
        same(found, theirs(model, tokenizer, texts, aggregation))


@pytest.mark.parametrize("aggregation", ["first", "average", "max", "simple"])
def test_minilm_gives_the_pipelines_entities(aggregation):
    try:
        tokenizer = load_tokenizer("minilm")
        model = load_model("minilm", task="token-classification", num_labels=5, label_names=NAMES)
    except (OSError, ValueError) as error:
        pytest.skip(f"minilm is not on this machine: {error}")
    spread(model, 20)
    texts = [
        "The U.N. official Ekéus heads for Baghdad on Monday, 2-3 days after the AT&T-deal (worth $5.2bn).",
        "Aspirin-induced asthma: N-acetyl-p-aminophenol 🎉 in Łódź, 東京 & São Paulo…",
        "x",
    ]
    found = entities(model, texts, tokenizer=tokenizer, aggregation=aggregation)
    expected = theirs(model, tokenizer, texts, aggregation)
    assert min(map(len, expected[:2])) > 2
    same(found, expected)


def test_a_comma_is_no_part_of_the_word_before_it(tiny_model, tiny_tokenizer):
    """Where the pipeline, which warns of it, takes all up to the next space for one word."""
    model, tokenizer = built("roberta", tiny_model, tiny_tokenizer)
    bias = torch.tensor([-1e4, 1e4, -1e4, -1e4, -1e4])
    with torch.no_grad():
        model.classifier.bias.copy_(bias)  # every word is a city
    text = "boston, denver"
    with pytest.warns(UserWarning, match="does not support real words"):
        (pipeline,) = theirs(model, tokenizer, [text], "first")
    (found,) = entities(model, [text], tokenizer=tokenizer)
    assert [one["text"] for one in pipeline] == ["boston,", "denver"]
    assert [one["text"] for one in found] == ["boston", ",", "denver"] == spans_to_tags(text, [])[0]
    model, tokenizer = built("xlm-roberta", tiny_model, tiny_tokenizer)
    with torch.no_grad():
        model.classifier.bias.copy_(bias)
    (found,) = entities(model, [text], tokenizer=tokenizer)
    assert [one["text"] for one in found] == ["boston", ",", "denver"]


def test_what_is_read_is_what_is_trained(family):
    """Words apart, as rows for training have them, each read at the piece that `tokenize` labels: the same entities."""
    _, model, tokenizer = family
    for text in (*SPACED, "👍 good 👍🏽 film 🎉", "zéro ( plot ) , 東 + x"):
        words, starts, _ = spans_to_tags(text, [])
        assert words == text.split()
        (names,) = predict(model, [words], tokenizer=tokenizer, output="names")
        (found,) = entities(model, [text], tokenizer=tokenizer)
        plain = [{key: one[key] for key in ("start", "end", "label")} for one in found]
        assert plain == tags_to_spans(words, starts, names)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_white_space_is_no_word_and_no_part_of_one(tiny_model, tiny_tokenizer, kind):
    model, tokenizer = built(kind, tiny_model, tiny_tokenizer)
    text = "  we   book \n a\tflight "
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-1e4, 1e4, -1e4, -1e4, -1e4]))
    for aggregation in AGGREGATIONS:
        (found,) = entities(model, [text], tokenizer=tokenizer, aggregation=aggregation)
        assert "".join(one["text"] for one in found) == "webookaflight"
        if aggregation in ("first", "average", "max"):
            assert [one["text"] for one in found] == ["we", "book", "a", "flight"]


def test_a_second_space_does_not_part_an_entity(tiny_model, tiny_tokenizer, monkeypatch):
    model, tokenizer = built("roberta", tiny_model, tiny_tokenizer)
    table = by_words(model, monkeypatch, {}, size=len(tokenizer))
    for piece, tag in (("Ġb", 1), ("Ġd", 2)):
        table[tokenizer.convert_tokens_to_ids(piece), tag] = 9.0
    assert "Ġ" in tokenizer.tokenize("boston  denver")
    (found,) = entities(model, ["boston  denver"], tokenizer=tokenizer)
    assert [one["text"] for one in found] == ["boston  denver"]


def test_bioes_is_read_right(tiny_model, tiny_tokenizer, monkeypatch):
    names = ["O", "B-city", "I-city", "E-city", "S-city"]
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    by_words(model, monkeypatch, {"boston": 1, "denver": 2, "flight": 3, "plot": 4, "the": 0})
    named(model, names)
    text = "the boston denver flight plot plot the"
    (found,) = entities(model, [text], tokenizer=tokenizer)
    assert [one["text"] for one in found] == ["boston denver flight", "plot", "plot"]


# ----------------------------------------------------------------------------------------- windows of a long text


def by_words(model, monkeypatch, tags, size=64):
    """Let a word's id alone decide its tag, the others "O"."""
    words = "the a film is good bad great dull we you book flight from to boston denver and not very plot fun".split()
    table = torch.full((size, 5), -3.0)
    table[:, 0] = 3.0
    for word, tag in tags.items():
        table[5 + words.index(word)] = torch.nn.functional.one_hot(torch.tensor(tag), 5) * 5.0

    def forward(input_ids, attention_mask=None, **inputs):
        return transformers.modeling_outputs.TokenClassifierOutput(logits=table[input_ids])

    monkeypatch.setattr(model, "forward", forward)
    return table


LONG = " ".join(["the film is good and we book a flight from boston denver to denver"] * 12)


@pytest.mark.parametrize("stride", [4, 8, 15])
def test_where_windows_agree_the_pipeline_joins_them_alike(tiny_model, tiny_tokenizer, monkeypatch, stride):
    """Words of one piece, logits that do not depend on neighbors, entities shorter than the stride."""
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    by_words(model, monkeypatch, {"boston": 1, "denver": 2, "film": 3})
    found = entities(model, [LONG, "boston"], tokenizer=tokenizer, stride=stride, max_length=40)
    assert len(found[0]) == 3 * 12
    same(found[:1], theirs(model, tokenizer, [LONG], "first", stride=stride))
    same(found[1:], theirs(model, tokenizer, ["boston"], "first"))
    (whole,) = entities(model, [LONG], tokenizer=tokenizer, stride=stride, max_length=20)
    same([whole], found[:1])  # any windows: the same


def test_half_a_word_is_no_entity(tiny_model, tiny_tokenizer, monkeypatch):
    """Where the pipeline keeps what a window makes of the rest of a word at its beginning."""
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    table = by_words(model, monkeypatch, {})
    table[tokenizer.convert_tokens_to_ids("##s"), 1] = 9.0  # which is read only where it stands first
    text = " ".join(["the film is good films"] * 5)  # 30 pieces, each sixth one "##s"
    (whole,) = entities(model, [text], tokenizer=tokenizer)
    (found,) = entities(model, [text], tokenizer=tokenizer, stride=2, max_length=2 + 7)  # windows at 0, 5, 10, ...
    assert whole == found == []
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 2 + 7
    (pipeline,) = theirs(model, tokenizer, [text], "first", stride=2)
    assert {one["text"] for one in pipeline} == {"s"}


def test_rows_are_the_tokenizers_own_windows(tiny_model, tiny_tokenizer, monkeypatch):
    from ftlib.engine import entities as module

    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    seen, work = [], module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda model, rows, **o: seen.append(rows) or work(model, rows, **o))
    for stride, length in ((0, 12), (3, 12), (5, 12), (4, 40), (0, 3)):
        entities(model, [LONG, "boston to denver"], tokenizer=tokenizer, stride=stride, max_length=length)
        expected = tokenizer(
            [LONG, "boston to denver"], truncation=True, max_length=length, stride=stride,
            return_overflowing_tokens=True,
        )  # fmt: skip
        assert [row["input_ids"] for row in seen[-1]] == expected["input_ids"]
        assert [row["token_type_ids"] for row in seen[-1]] == expected["token_type_ids"]
    entities(model, [LONG], tokenizer=tokenizer, stride=1000, max_length=12)  # at most half a window
    expected = tokenizer([LONG], truncation=True, max_length=12, stride=5, return_overflowing_tokens=True)
    assert [row["input_ids"] for row in seen[-1]] == expected["input_ids"]


def test_a_word_is_read_where_it_is_farthest_from_both_ends(tiny_model, tiny_tokenizer):
    """By hand: every word's window, and in it the model's own logits."""
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    text = " ".join(["the unfuns film is veryfuns good plots"] * 6)
    room, stride = 18, 7
    found = entities(model, [text], tokenizer=tokenizer, stride=stride, max_length=room + 2, aggregation="none")[0]
    first = entities(model, [text], tokenizer=tokenizer, stride=stride, max_length=room + 2)[0]
    full = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ids, words, n = full["input_ids"], full.word_ids(), len(full["input_ids"])
    starts = range(0, n - stride, room - stride)
    logits = {}
    for start in starts:
        own = [2, *ids[start : start + room], 3]
        with torch.no_grad():
            logits[start] = torch.log_softmax(model(torch.tensor([own])).logits[0, 1:-1], -1)

    def read(first, last):
        """Log-probabilities where the pieces first to last are farthest from both ends; the earlier of two."""
        inside = [start for start in starts if start <= first and last < start + room]
        start = max(inside, key=lambda start: (min(first - start, min(start + room, n) - 1 - last), -start))
        return logits[start][first - start]

    expected, tags = [], []
    for piece, (start, end) in enumerate(full["offset_mapping"]):
        values = read(piece, piece)
        label, score = NAMES[int(values.argmax())], float(values.max().exp())
        one = {"label": label, "start": start, "end": end, "text": text[start:end], "score": score}
        expected += [one] if label != "O" else []
    same([found], [expected])
    for word in range(max(words) + 1):  # "first": a word's pieces, all in one window
        own = [k for k in range(n) if words[k] == word]
        tags.append(NAMES[int(read(own[0], own[-1]).argmax())])
    groups = tag_groups(tags)
    assert [one["label"] for one in first] == [label for label, _, _ in groups] and len(groups) > 5
    edges = [(full.word_to_chars(a)[0], full.word_to_chars(b - 1)[1]) for _, a, b in groups]
    assert [(one["start"], one["end"]) for one in first] == edges


def test_windows_change_nothing_for_a_model_that_sees_no_neighbours(tiny_model, tiny_tokenizer):
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    text = " ".join(["the unfuns film is not good plot"] * 3)
    for aggregation in AGGREGATIONS:
        whole = entities(model, [text], tokenizer=tokenizer, aggregation=aggregation)
        for stride, length in ((0, 5), (2, 8), (64, 9), (3, 30)):
            options = dict(stride=stride, max_length=length, aggregation=aggregation)
            same(entities(model, [text], tokenizer=tokenizer, **options), whole)


def test_a_word_of_5000_characters(tiny_model, tiny_tokenizer):
    for kind in ("bert", "roberta"):
        model, tokenizer = built(kind, tiny_model, tiny_tokenizer)
        text = "boston " + "a" * 5000 + " denver"
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([-1e4, 1e4, -1e4, -1e4, -1e4]))
        for aggregation in ("first", "average", "max"):
            (found,) = entities(model, [text], tokenizer=tokenizer, aggregation=aggregation, stride=8)
            assert [(one["start"], one["end"]) for one in found] == [(0, 6), (7, 5007), (5008, 5014)]


# --------------------------------------------------------------------------------------- constrained, with a CRF


def test_constrained_tags_never_break_bio(family):
    _, model, tokenizer = family
    texts = SPACED * 2
    free = entities(model, texts, tokenizer=tokenizer, aggregation="none")
    bound = entities(model, texts, tokenizer=tokenizer, aggregation="none", constrained=True)

    def errors(found):
        count = 0
        for text, own in zip(texts, found, strict=True):
            offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
            ends = {one["end"]: one["label"] for one in own}
            count += len(bio_errors([ends.get(end, "O") for start, end in offsets if text[start:end].strip()]))
        return count

    assert errors(free) > 0 == errors(bound)
    model.config.id2label = dict(enumerate(["O", "NOUN", "VERB", "ADP", "DET"]))
    with pytest.raises(ValueError, match="tag 1 is 'NOUN'"):
        entities(model, texts, tokenizer=tokenizer, constrained=True)


def test_viterbi_by_hand_on_the_logits_of_first_pieces(tiny_model, tiny_tokenizer):
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    crf = CRF(5)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.normal_(std=3)
    for given, constrained in ((None, True), (crf.transitions, False), (crf.transitions, True)):
        allowed = bio_transitions(NAMES)
        both = [allowed if constrained else None, given]
        scores = [sum(parts) for parts in zip(*(one for one in both if one is not None), strict=True)]
        for text in SPACED + MARKED:
            encoded = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = model(**encoded).logits
            words = encoded.word_ids(0)
            first = [k for k, word in enumerate(words) if word is not None and word != words[k - 1]]
            path = viterbi(logits[:, first], scores)[0].tolist()
            (found,) = entities(model, [text], tokenizer=tokenizer, constrained=constrained, transitions=given)
            groups = tag_groups([NAMES[n] for n in path])
            edges = [(w, encoded.word_to_chars(0, a).start, encoded.word_to_chars(0, b - 1).end) for w, a, b in groups]
            assert [(one["label"], one["start"], one["end"]) for one in found] == edges
            chances = logits[0, first].softmax(-1)[range(len(path)), path]
            assert_close(
                torch.tensor([one["score"] for one in found]),
                torch.stack([chances[a:b].mean() for _, a, b in groups]) if groups else torch.tensor([]),
                atol=1e-5, rtol=0,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------- models and bad input


def test_unpadded_lora_and_heads_of_several_tasks(tiny_model, tiny_tokenizer):
    model, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    texts = [*SPACED, *MARKED, LONG]
    options = dict(tokenizer=tokenizer, stride=4)
    expected = entities(model, texts, **options)
    for batch_size in (1, 3):
        same(entities(model, texts, batch_size=batch_size, **options), expected)
    same([entities(model, [text], **options)[0] for text in texts], expected)  # each with its row alone
    model.train()
    same(entities(model, texts, **options), expected)
    assert model.training
    same(entities(unpad(model.eval()), texts, **options), expected)
    several = MultiTaskModel(
        tiny_model("encoder"), {"ner": Head("token-classification", 5, tuple(NAMES)), "intent": Head(num_labels=2)}
    )
    several.heads["ner"].classifier.weight.data.mul_(40)
    same(entities(several, texts, task="ner", **options), entities(several.export("ner"), texts, **options))
    lora, tokenizer = built("bert", tiny_model, tiny_tokenizer)
    tune(lora, "lora", rank=2)
    same(entities(lora, texts, **options), expected)  # new adapters change nothing
    config = peft.LoraConfig(target_modules=["query"])
    wrapped = peft.get_peft_model(built("bert", tiny_model, tiny_tokenizer)[0], config)
    same(entities(wrapped, texts, **options), expected)
    assert sum(map(len, expected)) > 10


def test_bad_input_is_refused_by_place(tiny_model, tiny_tokenizer):
    model = named(tiny_model("token-classification", 5))
    for texts, kind, said in (
        (["fun", ""], ValueError, "row 1, column 'text': the text is empty"),
        (["fun", " \n "], ValueError, "row 1, column 'text': the text is empty"),
        (["fun", None], TypeError, "row 1, column 'text': expected text, got None"),
        ([["a", "film"]], TypeError, r"row 0, column 'text': expected text, got \['a', 'film'\] \(list\)"),
        ([("a", "film")], TypeError, "row 0, column 'text': expected text"),
        ("fun", TypeError, r"pass a list of texts, even for one: \[text\]"),
        (["\ud800"], ValueError, "row 0, column 'text': not valid Unicode"),
    ):
        with pytest.raises(kind, match=said):
            entities(model, texts, tokenizer=tiny_tokenizer)
    for options, said in (
        (dict(aggregation="last"), "aggregation='last': choose one of first, average"),
        (dict(stride=-1), "stride=-1: need a whole number"),
        (dict(max_length=2), "max_length=2: need a whole number of at least 3"),
        (dict(max_length=0), "max_length=0"),
        (dict(task="ner"), "task='ner': entities are read off a tagger's labels"),
        (dict(transitions=CRF(4).transitions), "the logits 5 labels"),
    ):
        with pytest.raises(ValueError, match=said):
            entities(model, ["fun"], tokenizer=tiny_tokenizer, **options)
    for other in (tiny_model("sequence-classification", 2), tiny_model("regression", 1)):
        with pytest.raises(ValueError, match="entities are read off a tagger's labels"):
            entities(other, ["fun"], tokenizer=tiny_tokenizer)
    assert entities(model, [], tokenizer=tiny_tokenizer) == []


def test_a_text_without_pieces_has_no_entities(tiny_model):
    tokenizer = transformers.BertTokenizerFast(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fun"])}, model_max_length=40
    )
    model = spread(named(tiny_model("token-classification", 5)))
    found = entities(model, ["\x00", "fun", "\u200b"], tokenizer=tokenizer, constrained=True)
    assert tokenizer("\x00")["input_ids"] == [2, 3] and found[0] == []
    assert found[1] == entities(model, ["fun"], tokenizer=tokenizer, constrained=True)[0]
    assert tokenizer("\u200b")["input_ids"] == [2, 3] and found[2] == []
