"""A model in a folder comes back and predicts the same, whatever was trained of it, here and in PEFT."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fit import LABELS, make_rows, quick, same, weights
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.saving import load, save
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import STRATEGIES, merge, tune
from ftlib.methods.unpadding import unpad

peft = pytest.importorskip("peft")

ADAPTERS = {
    "lora": dict(rank=3, alpha=5, targets="all-linear"),
    "rslora": dict(rank=4, rslora=True, targets={"query", "dense"}),
    "lora in 8 bits": dict(base_bits=8),
    "houlsby": dict(reduction=4),
    "pfeiffer": dict(reduction=8, seed=3),
}
PEFT = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["query"]),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(),
    "vera": lambda: peft.VeraConfig(r=4),
    "layer norms": lambda: peft.LNTuningConfig(),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["query", "value"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4),
    "prefix, projected": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}
TOLD = "ignore:.*(tokenizer|save_embedding).*"


@pytest.fixture
def base(tiny_model, tmp_path):
    """Factory: the folder of a pretrained encoder."""

    def make(model_type="bert", **options):
        folder = tmp_path / f"base-{model_type}"
        tiny_model("encoder", model_type=model_type, **options).save_pretrained(folder)
        return folder

    return make


def with_head(folder, task="sequence-classification", labels=2, seed=0):
    from ftlib.inputs.pretrained import load_model

    return load_model(folder, task, labels, seed=seed)


def logits(model):
    batch = collate(make_rows(5, seed=8))
    batch.pop("labels")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train(model, rows=None, **options):
    before = logits(model)
    fit(model, rows or make_rows(8), config=quick(epochs=1, warmup_fraction=0.0, learning_rate=0.05, **options))
    assert float((logits(model) - before).abs().max()) > 1e-4  # the test would else show nothing


# ------------------------------------------------------------------------------------------------ every strategy


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("lora", "houlsby", "pfeiffer")])
def test_whole_models_come_back_with_from_pretrained(base, tmp_path, strategy):
    model = with_head(base())
    tune(model, strategy)
    train(model)
    folder = save(model, tmp_path / "m")
    assert_close(logits(load(folder)), logits(model), atol=1e-6, rtol=0)
    stock = type(model).from_pretrained(folder)
    assert_close(logits(stock), logits(model), atol=1e-6, rtol=0)
    assert same(weights(stock), weights(model))


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_come_back_with_their_head(base, tmp_path, name, model_type):
    model = with_head(base(model_type), labels=3)
    options = dict(ADAPTERS[name])
    if model_type != "bert" and "targets" in options:
        options["targets"] = "all-linear"
    tune(model, name if name in STRATEGIES else "lora", **options)
    train(model, make_rows(8))
    folder = save(model, tmp_path / "m")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftlib.json",
    }
    back = load(folder)
    assert type(back) is type(model) and not back.training and back.config.num_labels == 3
    assert_close(logits(back), logits(model), atol=1e-6, rtol=0)
    assert [n for n, p in back.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    save(back, folder)  # over itself
    assert_close(logits(load(folder)), logits(model), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings(TOLD)
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_adds_comes_back_here_and_in_peft(base, tmp_path, name):
    where = base()
    model = with_head(where, labels=3)
    tune(model, PEFT[name]())
    train(model)
    folder = save(model, tmp_path / "m")
    back = load(folder)
    assert_close(logits(back), logits(model), atol=1e-6, rtol=0)
    theirs = peft.PeftModel.from_pretrained(with_head(where, labels=3, seed=7), folder)
    assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)
    train(back)  # goes on
    save(back, folder)
    assert_close(logits(load(folder)), logits(back), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra"])
@pytest.mark.parametrize("options", [{}, dict(rank=4, rslora=True, targets="all-linear")])
def test_our_lora_opens_in_peft(base, tmp_path, model_type, options):
    where = base(model_type)
    model = with_head(where, labels=3)
    tune(model, "lora", **options)
    train(model)
    folder = save(model, tmp_path / "m")
    theirs = peft.PeftModel.from_pretrained(with_head(where, labels=3, seed=7), folder)
    assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert_close(logits(auto), logits(model), atol=1e-6, rtol=0)


def test_a_tagger_and_the_labels_names(base, tmp_path):
    from ftlib.inputs.pretrained import load_model

    where = base("roberta")
    for strategy in ("lora", peft.PromptTuningConfig(num_virtual_tokens=3)):
        model = load_model(where, "token-classification", label_names=["O", "A", "B"])
        tune(model, strategy)
        train(model, make_rows(8, "token-classification"))
        back = load(save(model, tmp_path / "m"))
        assert type(back) is type(model) and back.config.id2label == {0: "O", 1: "A", 2: "B"}
        assert_close(logits(back), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", LABELS)
def test_the_kind_of_head_comes_back(base, tmp_path, task):
    model = with_head(base(), task, LABELS[task])
    tune(model, "lora")
    back = load(save(model, tmp_path / "m"))
    assert type(back) is type(model) and back.config.problem_type == model.config.problem_type
    assert_close(logits(back), logits(model), atol=1e-6, rtol=0)


def test_an_adapter_that_peft_trained(base, tmp_path):
    where = base()
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(with_head(where, labels=3), config)
    theirs.save_pretrained(tmp_path / "m")
    head = weights(theirs)
    for loaded in (load(tmp_path / "m"), load(tmp_path / "m", base=where), load(tmp_path / "m", base=str(where))):
        # the pooler, which PEFT did not save, is in the base
        assert loaded.config.num_labels == 3
        assert_close(logits(loaded), logits(theirs), atol=1e-6, rtol=0)
    assert len(head)


# ------------------------------------------------------------------------------------------------- other places


def test_bases_by_name_folder_and_model(base, tmp_path):
    where = base()
    model = with_head(where, labels=3)
    tune(model, "lora")
    train(model)
    folder = save(model, tmp_path / "m")
    moved = shutil.move(where, tmp_path / "moved")
    with pytest.raises((OSError, ValueError), match=r"base-bert"):
        load(folder)
    other = with_head(moved, labels=3, seed=9)
    before = weights(other)
    for given in (moved, str(moved), other, unpad(with_head(moved, labels=3))):
        assert_close(logits(load(folder, base=given)), logits(model), atol=1e-5, rtol=0)
    assert same(weights(other), before)  # a copy was taken
    with pytest.raises(ValueError, match="does not fit its base model"):
        load(folder, base=with_head(moved, labels=4))
    tune(other, "lora")
    with pytest.raises(ValueError, match="the model has adapters already"):
        load(folder, base=other)
    with pytest.raises(ValueError, match="holds a whole model, which needs none"):
        load(moved, base="minilm")


@pytest.mark.parametrize("strategy", ["lora", "pfeiffer", "layer-norm"])
def test_several_heads(base, tmp_path, strategy):
    from ftlib.inputs.pretrained import load_model

    where = base()
    heads = {"a": Head(num_labels=3), "b": Head("token-classification", 3)}
    model = MultiTaskModel(load_model(where), heads)
    tune(model, strategy)
    data = {"a": make_rows(6), "b": make_rows(6, "token-classification")}
    fit(model, data, config=quick(epochs=1, learning_rate=0.05, warmup_fraction=0.0))
    folder = save(model.eval(), tmp_path / "m")
    batch = collate(make_rows(3))
    batch.pop("labels")
    for back in (load(folder), *([load(folder, base=load_model(where))] if strategy != "layer-norm" else [])):
        for task in heads:
            assert_close(back(**batch, task=task), model(**batch, task=task), atol=1e-6, rtol=0)
    save(back, folder)
    assert_close(load(folder)(**batch, task="a"), model(**batch, task="a"), atol=1e-6, rtol=0)


def test_an_exported_task_is_merged_first(tiny_model, tmp_path):
    model = MultiTaskModel(tiny_model("encoder"), {"a": Head()})
    tune(model, "lora")
    fit(model, {"a": make_rows(4)}, config=quick(epochs=1, learning_rate=0.05, warmup_fraction=0.0))
    alone = model.export("a")
    with pytest.raises(ValueError, match=r"adapters that ftlib.tune did not put there; ftlib.merge\(model\)"):
        save(alone, tmp_path / "m")
    expected = logits(alone)
    assert_close(logits(load(save(merge(alone), tmp_path / "m"))), expected, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------- broken ones


def without(folder, part):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("strategy", ["lora", "pfeiffer", "peft", "prompt"])
def test_a_lost_head_is_said(base, tmp_path, strategy):
    where = base()
    model = with_head(where)
    known = {"peft": peft.LoraConfig(r=2), "prompt": peft.PromptTuningConfig(num_virtual_tokens=2)}
    tune(model, known.get(strategy, strategy))
    train(model)
    folder = save(model, tmp_path / "m")
    without(folder, "classifier")
    with pytest.raises(ValueError, match=r"lacks .*classifier.* which would start random; if that is the task head"):
        load(folder)
    whole = with_head(where)
    with torch.no_grad():
        for mine, theirs in zip(whole.classifier.parameters(), _head(model), strict=True):
            mine.copy_(theirs)
    assert_close(logits(load(folder, base=whole)), logits(model), atol=1e-6, rtol=0)


def _head(model):
    return [p for n, p in model.named_parameters() if n.startswith("classifier") and "original" not in n]


@pytest.mark.parametrize("strategy", ["lora", "houlsby", "peft", "prompt"])
@pytest.mark.parametrize("given", [False, True])
def test_lost_adapter_weights_are_said_even_with_a_base(base, tmp_path, strategy, given):
    where = base()
    model = with_head(where)
    known = {"peft": peft.LoraConfig(r=2), "prompt": peft.PromptTuningConfig(num_virtual_tokens=2)}
    tune(model, known.get(strategy, strategy))
    folder = save(model, tmp_path / "m")
    without(folder, {"houlsby": "up.weight", "prompt": "prompt_embeddings"}.get(strategy, "lora_B"))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors lacks .*(lora_B|up.weight|prompt_embeddings)"):
        load(folder, base=with_head(where) if given else None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk"), "adapter_model.safetensors: not a whole"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
        (lambda f: (f / "ftlib.json").write_text("[]"), "ftlib.json: expected a JSON object"),
        (lambda f: edited(f / "ftlib.json", options=3), "ftlib.json: no 'options'"),
        (lambda f: edited(f / "ftlib.json", options={"rank": 0}), "rank=0"),
        (lambda f: edited(f / "ftlib.json", options={"rank": 5}), "does not fit its base model"),
        (lambda f: edited(f / "ftlib.json", options={"rank": 10**9}), "rank is 1000000000, too large for the weights"),
        (lambda f: edited(f / "ftlib.json", options={"speed": 5}), "make no adapter .*unknown option 'speed'"),
        (lambda f: edited(f / "ftlib.json", task="poetry"), "task='poetry': choose one of"),
        (lambda f: edited(f / "ftlib.json", num_labels=5), "does not fit its base model"),
        (lambda f: edited(f / "adapter_config.json", base_model_name_or_path=None), "names no base model; pass base="),
        (lambda f: edited(f / "adapter_config.json", base_model_name_or_path=3), "names no base model; pass base="),
    ],
)
def test_a_broken_adapter_folder_is_said(base, tmp_path, damage, message):
    model = with_head(base())
    tune(model, "lora")
    folder = save(model, tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_weights_that_the_model_lacks_are_said(base, tmp_path):
    for strategy in ("lora", peft.LoraConfig(r=2)):
        model = with_head(base())
        tune(model, strategy)
        folder = save(model, tmp_path / "m")
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | {"base_model.model.bert.lora_C.weight": torch.ones(2)}, path)
        with pytest.raises(ValueError, match=r"has weights that the model lacks: .*lora_C"):
            load(folder)


def test_settings_that_import_a_module_are_refused(base, tmp_path):
    model = with_head(base())
    tune(model, peft.LoraConfig(r=2))
    folder = save(model, tmp_path / "m")
    edited(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="os")
    with pytest.raises(ValueError, match="megatron_config would import a module; refused"):
        load(folder)


def test_a_bare_adapter_of_peft_needs_a_task(base, tmp_path):
    model = peft.get_peft_model(with_head(base()), peft.LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="task_type None; pass base=a model"):
        load(tmp_path / "m")
