"""One encoder, several heads: computed once, equal to the stock models, summed as promised."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.saving import load, save
from ftlib.engine.settings import TrainConfig
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.unpadding import is_unpadded, unpad

HEADS = {
    "topic": Head("sequence-classification", 3, ("a", "b", "c")),
    "flags": Head("multi-label-classification", 4),
    "stars": Head("regression", 1),
    "tags": Head("token-classification", 5),
}
ROWS = [
    {"input_ids": [2, 9, 10, 3], "labels": {"topic": 2, "stars": 0.5}},
    {"input_ids": [2, 11, 3], "labels": {"flags": [1.0, 0.0, 0.0, 1.0]}},
    {"input_ids": [2, 12, 13, 14, 15, 3], "labels": {"tags": [-100, 1, 2, -100, 4, -100]}},
    {"input_ids": [2, 16, 3], "labels": {"topic": 0, "tags": [-100, 0, -100]}},
    {"input_ids": [2, 17, 18, 3], "labels": {"stars": -1.0, "flags": [0.0, 0.0, 1.0, 0.0]}},
]


@pytest.fixture
def build(tiny_model):
    return lambda model_type="bert", heads=None, seed=0, **options: MultiTaskModel(
        tiny_model("encoder", model_type=model_type, **options), heads or HEADS, seed=seed
    ).eval()


TYPES = ["bert", "distilbert", "roberta", "electra", "albert"]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("unpadded", [False, True])
def test_a_mixed_batch_gives_what_each_task_gives_and_runs_the_trunk_once(build, model_type, unpadded):
    model = build(model_type)
    if unpadded:
        unpad(model)
        assert is_unpadded(model)
    calls = []
    model.encoder.register_forward_hook(lambda *args: calls.append(1))
    batch = collate(ROWS)
    labels, rows = batch.pop("labels"), batch.pop("rows")
    mixed = model(**batch, rows=rows)
    assert len(calls) == 1
    assert set(mixed) == set(HEADS)
    assert {task: tuple(logits.shape) for task, logits in mixed.items()} == {
        "topic": (2, 3), "flags": (2, 4), "stars": (2, 1), "tags": (2, 6, 5),
    }  # fmt: skip
    for task in HEADS:
        alone = model(**batch, task=task)[rows[task]]
        if task == "tags":
            real = batch["attention_mask"][rows[task]].bool()
            assert_close(mixed[task][real], alone[real], atol=1e-6, rtol=0)
        else:
            assert_close(mixed[task], alone, atol=1e-6, rtol=0)
    assert labels["stars"].tolist() == [0.5, -1.0]


@pytest.mark.parametrize("model_type", TYPES)
def test_an_exported_task_is_a_stock_model(build, model_type, tmp_path):
    model = build(model_type)
    batch = {key: collate(ROWS)[key] for key in ("input_ids", "attention_mask")}
    for name, head in HEADS.items():
        exported = model.export(name)
        kind = "Token" if name == "tags" else "Sequence"
        assert type(exported).__name__.endswith(f"For{kind}Classification")
        expected = model(**batch, task=name)
        assert_close(exported(**batch).logits, expected, atol=1e-6, rtol=0)
        assert exported.config.num_labels == head.num_labels and exported.config.num_hidden_layers == 2
        exported.save_pretrained(tmp_path / name)
        auto = getattr(transformers, f"AutoModelFor{kind}Classification")
        stock, info = auto.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_close(stock(**batch).logits, expected, atol=1e-6, rtol=0)
        assert set(stock.state_dict()) == set(exported.state_dict())
    assert model.export("topic").config.id2label == {0: "a", 1: "b", 2: "c"}


def test_an_exported_task_has_weights_of_its_own(build):
    model = build()
    exported = model.export("topic")
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert model.encoder.embeddings.word_embeddings.weight.abs().sum() > 0
    assert not any(a is b for a in exported.parameters() for b in model.parameters())


def test_export_of_an_unpadded_model_stays_unpadded(build):
    model = unpad(build())
    batch = {key: collate(ROWS)[key] for key in ("input_ids", "attention_mask")}
    exported = model.export("topic")
    assert is_unpadded(exported)
    seen = []
    exported.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    assert_close(exported(**batch).logits, model(**batch, task="topic"), atol=1e-6, rtol=0)
    assert seen == [1]
    assert not is_unpadded(build().export("topic"))


def test_token_types_reach_the_encoder(build):
    model = build()
    ids, types = torch.tensor([[2, 9, 3, 10, 3]]), torch.tensor([[0, 0, 0, 1, 1]])
    plain, typed = model(ids, task="topic"), model(ids, token_type_ids=types, task="topic")
    assert not torch.allclose(plain, typed)
    exported = model.export("topic")
    assert_close(exported(input_ids=ids, token_type_ids=types).logits, typed, atol=1e-6, rtol=0)


def test_gradients_reach_trunk_and_own_head_only(build):
    model = build().train()
    model(**{k: v for k, v in collate(ROWS).items() if k not in ("labels", "rows")}, task="stars").sum().backward()
    touched = {
        name.split(".")[1] for name, p in model.named_parameters() if name.startswith("heads.") and p.grad is not None
    }
    assert touched == {"stars"}
    assert model.encoder.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_heads_are_drawn_from_the_seed_and_leave_the_global_state(build, tiny_model):
    state = torch.get_rng_state()
    same, other = [build(seed=1), build(seed=1)], build(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.heads["topic"].classifier.weight for m in (*same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(same[0].heads["topic"].classifier.weight[:1], same[0].heads["stars"].classifier.weight)


def test_the_heads_hold_no_encoder(build):
    model = build()
    assert {name.split(".", 2)[2] for name, _ in model.heads.named_parameters(prefix="heads")} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert model.tasks == {"topic": ("sequence-classification", 3), "flags": ("multi-label-classification", 4),
                           "stars": ("regression", 1), "tags": ("token-classification", 5)}  # fmt: skip


def test_heads_follow_the_encoders_dtype(tiny_model):
    model = MultiTaskModel(tiny_model("encoder").to(torch.bfloat16), {"a": Head()})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[2, 9, 3]]), task="a").dtype == torch.bfloat16


def test_a_deep_copy_is_independent(build):
    model = build()
    twin = copy.deepcopy(model)
    ids = torch.tensor([[2, 9, 3]])
    assert torch.equal(twin(ids, task="topic"), model(ids, task="topic"))
    with torch.no_grad():
        twin.encoder.embeddings.word_embeddings.weight.zero_()
    assert not torch.equal(twin(ids, task="topic"), model(ids, task="topic"))


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [
        ({}, ValueError, "heads is {}"),
        ([Head()], ValueError, "pass {task name: ftlib.Head"),
        (None, ValueError, "heads is None"),
        ({"a": "regression"}, TypeError, r"heads\['a'\] is 'regression'; use ftlib.Head"),
        ({"a.b": Head()}, ValueError, "task name 'a.b': use letters"),
        ({"": Head()}, ValueError, "task name ''"),
        ({3: Head()}, ValueError, "task name 3"),
        ({"type": Head()}, ValueError, "task name 'type': use letters.*taken by PyTorch"),
        ({"keys": Head()}, ValueError, "task name 'keys': use letters.*taken by PyTorch"),
    ],
)
def test_heads_that_are_none(tiny_model, heads, kind, message):
    with pytest.raises(kind, match=message):
        MultiTaskModel(tiny_model("encoder"), heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(task="ner"), "task='ner': choose one of sequence-classification"),
        (dict(num_labels=0), "num_labels=0: need a whole number of at least 1"),
        (dict(num_labels=2.0), "num_labels=2.0"),
        (dict(num_labels=True), "num_labels=True"),
        (dict(num_labels=2, label_names=("a",)), "1 label_names for num_labels=2"),
        (dict(weight=-1.0), "weight=-1.0: need a number from 0"),
        (dict(weight=float("nan")), "weight=nan"),
    ],
)
def test_a_head_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        Head(**options)


def test_encoders_that_do_not_fit(tiny_model):
    with pytest.raises(ValueError, match="BertForSequenceClassification has a head already"):
        MultiTaskModel(tiny_model(), HEADS)
    encoder = tiny_model("encoder")
    encoder.pooler = None
    with pytest.raises(ValueError, match="task 'topic' needs the encoder's pooler"):
        MultiTaskModel(encoder, HEADS)
    MultiTaskModel(encoder, {"tags": HEADS["tags"]})  # a tagger needs none


def test_forward_says_what_is_missing(build):
    model, ids = build(), torch.tensor([[2, 9, 3]])
    with pytest.raises(ValueError, match="pass either task=name"):
        model(ids)
    with pytest.raises(ValueError, match="pass either task=name"):
        model(ids, task="topic", rows={"topic": torch.tensor([0])})
    with pytest.raises(ValueError, match="unknown task 'x'; this model has topic, flags, stars, tags"):
        model(ids, task="x")
    with pytest.raises(ValueError, match="unknown task 'x'"):
        model(ids, rows={"x": torch.tensor([0])})
    with pytest.raises(ValueError, match="unknown task 'x'"):
        model.export("x")


# ------------------------------------------------------------------------------------------------- any structure

_SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=3,
)  # fmt: skip
_GROUPED = dict(_SIZES, num_key_value_heads=1, head_dim=16)
_GPT = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=0)
_PAIR = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, bos_token_id=1,
    eos_token_id=3, decoder_start_token_id=2,
)  # fmt: skip
_T5 = dict(
    vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=3,
    decoder_start_token_id=0,
)  # fmt: skip
_RELATIVE = dict(_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
STRUCTURES = {  # model type -> a tiny config
    "bert": _SIZES, "roberta": _SIZES, "electra": _SIZES, "mpnet": _SIZES,
    "distilbert": dict(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64),
    "albert": dict(_SIZES, embedding_size=8), "modernbert": dict(_SIZES, cls_token_id=1, sep_token_id=3),
    "longformer": dict(_SIZES, attention_window=[4, 4]), "deberta": _RELATIVE,
    "deberta-v2": dict(_RELATIVE, position_biased_input=False, norm_rel_ebd="layer_norm", share_att_key=True),
    "xlnet": dict(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64, pad_token_id=0),
    "gpt2": _GPT, "llama": _GROUPED, "qwen3": _GROUPED, "gpt_neox": _SIZES, "falcon": _SIZES,
    "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0),
    "mixtral": dict(_GROUPED, num_local_experts=4),
    "qwen3_moe": dict(_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "t5": _T5, "umt5": _T5, "bart": _PAIR, "mbart": _PAIR,
}  # fmt: skip
AUTO = {"tags": "AutoModelForTokenClassification"}
FUNNEL = {  # whose classifiers stand on a part of it
    "funnel": dict(vocab_size=64, d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1], pad_token_id=0)
}


def structured(model_type, auto=None, seed=0, **options):
    """A tiny model of this type without dropout: the bare one, or that of an Auto class."""
    config = transformers.AutoConfig.for_model(model_type, **(STRUCTURES | FUNNEL)[model_type], **options)
    config.update({key: 0.0 for key in config.to_dict() if "drop" in key and isinstance(getattr(config, key), float)})
    kind = transformers.AutoModel._model_mapping[type(config)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if auto:
            return getattr(transformers, auto).from_config(config).eval()
        return kind(config).eval()


def stock(model, name, config):
    """Transformers' own model for one task, with the weights of trunk and head, every one of them."""
    spec, config = HEADS[name], copy.deepcopy(config)
    config.num_labels, config.problem_type = spec.num_labels, None
    single = getattr(transformers, AUTO.get(name, "AutoModelForSequenceClassification")).from_config(config).eval()
    weights = {f"{single.base_model_prefix}.{key}": value for key, value in model.encoder.state_dict().items()}
    weights |= model.heads[name].state_dict()
    single.load_state_dict({key: weights[key] for key in single.state_dict()})
    return single


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_every_structure_gives_its_stock_models_logits_on_each_row_alone(model_type, tmp_path):
    encoder = structured(model_type)
    config = copy.deepcopy(encoder.config)
    names = [name for name in HEADS if name != "tags" or model_type not in ("bart", "mbart", "t5", "umt5")]
    model = MultiTaskModel(encoder, {name: HEADS[name] for name in names}).eval()
    rows = [row | {"labels": {k: v for k, v in row["labels"].items() if k in names}} for row in ROWS]
    rows = [row for row in rows if row["labels"]]
    side = "left" if model_type == "xlnet" else "right"  # its head reads the last place of the row
    batch = collate(rows, padding_side=side)
    batch.pop("labels")
    places = batch.pop("rows")
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    with torch.no_grad():
        found = [model(**batch, rows=places), again(**batch, rows=places)]
        if model_type in ("bert", "modernbert"):
            found.append(unpad(model)(**batch, rows=places))
        for name in names:
            single, exported = stock(model, name, config), model.export(name)
            assert type(exported) is type(single) and exported.state_dict().keys() == single.state_dict().keys()
            for i, place in enumerate(places[name].tolist()):
                ids = torch.tensor([rows[place]["input_ids"]])
                expected = single(input_ids=ids).logits[0]
                assert_close(exported(input_ids=ids).logits[0], expected, atol=1e-5, rtol=0)
                for logits in found:
                    own = logits[name][i]
                    real = own if name != "tags" else own[: ids.shape[1]] if side == "right" else own[-ids.shape[1] :]
                    assert_close(real, expected, atol=1e-5, rtol=0)


def test_one_pass_where_the_heads_read_the_same_and_else_one_a_task_over_its_own_rows():
    """ROWS have two topics, two flags, two stars and two tags."""
    passes = {}
    for model_type, part in (("gpt2", "h.0"), ("longformer", "encoder")):
        model, sizes = MultiTaskModel(structured(model_type), HEADS).eval(), []
        inside = model.encoder.get_submodule(part)
        inside.register_forward_pre_hook(lambda module, args, kwargs, sizes=sizes: sizes.append(
            len(next(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)))
        ), with_kwargs=True)  # fmt: skip
        batch = collate(ROWS)
        batch.pop("labels")
        model(**batch)
        passes[model_type] = sorted(sizes)
    assert passes == {"gpt2": [5], "longformer": [2, 2, 2, 5]}


@pytest.mark.parametrize("model_type", ["bert", "xlnet", "llama", "distilbert", "modernbert"])
def test_heads_are_drawn_as_transformers_draws_them(model_type):
    """Of 64,000 weights the deviation is that of the stock model's head, to 5 %; biases and norms are equal."""
    sizes = {"dim": 256, "hidden_dim": 64} if model_type == "distilbert" else {"hidden_size": 256}
    sizes = {"d_model": 256} if model_type == "xlnet" else sizes
    name = "AutoModelForSequenceClassification"
    config = transformers.AutoConfig.for_model(model_type, **{**STRUCTURES[model_type], **sizes}, num_labels=250)
    single = getattr(transformers, name).from_config(config)
    encoder = transformers.AutoModel.from_config(copy.deepcopy(config))
    head = MultiTaskModel(encoder, {"a": Head(num_labels=250)}).heads["a"]
    expected = {n: p for n, p in single.named_parameters() if not n.startswith(f"{single.base_model_prefix}.")}
    assert {n: p.shape for n, p in head.named_parameters()} == {n: p.shape for n, p in expected.items()}
    for n, p in head.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(expected[n].std().item(), rel=0.05)
        else:
            assert torch.equal(p, expected[n])


@pytest.mark.parametrize(
    ("model_type", "task", "message"),
    [
        ("bart", "token-classification", "'a': Transformers has no head for token-classification on bart models"),
        ("falcon", "relation-classification", None),
        ("t5", "relation-classification", "no head for relation-classification on t5 .*is both"),
    ],
)
def test_what_has_no_head_of_the_kind_is_refused_by_name(model_type, task, message):
    if message is None:
        MultiTaskModel(structured(model_type), {"a": Head(task)})
        return
    with pytest.raises(ValueError, match=message):
        MultiTaskModel(structured(model_type), {"a": Head(task)})


def test_a_trunk_that_the_head_does_not_stand_on_is_refused():
    encoder = structured("t5").get_encoder()
    with pytest.raises(ValueError, match="stands on a T5Model, and can't share this T5Stack; pass that"):
        MultiTaskModel(encoder, {"a": Head()})
    with pytest.raises(ValueError, match="T5ForTokenClassification stands on a T5EncoderModel, "):
        MultiTaskModel(structured("t5"), {"a": Head("token-classification")})
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="has a head already, or is PEFT's wrapper; pass the bare encoder"):
        MultiTaskModel(peft.get_peft_model(structured("bert"), config), {"a": Head()})


@pytest.mark.parametrize("model_type", ["longformer", "llama", "modernbert"])
def test_a_step_moves_trunk_and_heads(model_type):
    model = MultiTaskModel(structured(model_type), {"topic": HEADS["topic"], "tags": HEADS["tags"]})
    rows = [row for row in ROWS if row["labels"].keys() <= {"topic", "tags"}] * 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, rows, config=TrainConfig(epochs=1, batch_size=4, learning_rate=0.1, warmup_fraction=0, progress=False))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in still if "embed" not in name and "pooler" not in name and "key.bias" not in name}
