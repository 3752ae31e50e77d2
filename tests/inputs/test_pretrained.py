"""Names, heads, seeds and refusals on tiny random checkpoints; then the real MiniLM."""

import json
import logging

import pytest
import torch
from torch.testing import assert_close

import ftlib
from ftlib.inputs import assets
from ftlib.inputs.pretrained import load_model, load_tokenizer

CLASSES = {
    "sequence-classification": ("BertForSequenceClassification", "single_label_classification"),
    "multi-label-classification": ("BertForSequenceClassification", "multi_label_classification"),
    "regression": ("BertForSequenceClassification", "regression"),
    "token-classification": ("BertForTokenClassification", None),
}


@pytest.fixture
def encoder_folder(tiny_model, tmp_path):
    folder = tmp_path / "encoder"
    tiny_model("encoder").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", CLASSES)
def test_every_task_gets_its_class_and_config(encoder_folder, task):
    names = ["score"] if task == "regression" else ["a", "b", "c"]
    model = load_model(encoder_folder, task, label_names=names)
    class_name, problem_type = CLASSES[task]
    assert type(model).__name__ == class_name and model.config.problem_type == problem_type
    assert model.config.num_labels == model.classifier.out_features == len(names)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert model.dtype == torch.float32 and not model.training


def test_encoder_comes_without_head_and_keeps_its_weights(encoder_folder, tiny_model):
    original, loaded = tiny_model("encoder"), load_model(str(encoder_folder))
    assert type(loaded).__name__ == "BertModel"
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert type(load_model(encoder_folder, "encoder")).__name__ == "BertModel"


def test_head_depends_on_the_seed_alone_and_the_global_generator_is_untouched(encoder_folder):
    torch.manual_seed(1)
    first = load_model(encoder_folder, "sequence-classification", 3)
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(2))  # as if nothing had been drawn for the head
    again = load_model(encoder_folder, "sequence-classification", 3)
    other = load_model(encoder_folder, "sequence-classification", 3, seed=1)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert_close(first.classifier.bias, torch.zeros(3))


def test_half_precision_files_still_give_float32_unless_asked(tiny_model, tmp_path):
    tiny_model("encoder").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_saved_head_keeps_its_number_of_labels_and_weights(encoder_folder, tmp_path):
    model = load_model(encoder_folder, "sequence-classification", label_names=["neg", "neutral", "pos"], seed=3)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "sequence-classification")
    assert again.config.id2label == {0: "neg", 1: "neutral", 2: "pos"}
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    message = r"classifier\.weight \(3, 16\) in the file, \(5, 16\) asked for.*num_labels of a saved head"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "saved", "sequence-classification", 5)
    fresh = load_model(tmp_path / "saved", "sequence-classification", 5, ignore_mismatched_sizes=True)
    assert fresh.classifier.out_features == 5
    with pytest.raises(ValueError, match="needs num_labels"):
        load_model(tmp_path / "saved", "token-classification")


def test_config_values_and_attention_choice_pass_through(encoder_folder):
    options = dict(hidden_dropout_prob=0.25, attn_implementation="eager")
    model = load_model(encoder_folder, "sequence-classification", 2, **options)
    assert model.config.hidden_dropout_prob == 0.25 and model.config._attn_implementation == "eager"


def test_new_head_is_not_reported_but_other_warnings_are(encoder_folder, capsys):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        load_model(encoder_folder, "sequence-classification", 2)
        assert records == [] and capsys.readouterr().err == ""
        logger.warning("something else")
        assert [record.getMessage() for record in records] == ["something else"]
        assert logger.filters == []
    finally:
        logger.removeHandler(handler)


def test_hole_in_the_encoder_is_an_error(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("encoder").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.layer.1.attention.self.query.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for task, labels in ((None, None), ("sequence-classification", 2)):
        with pytest.raises(ValueError, match=rf"lacks 1 weights of the encoder itself .*{lost}"):
            load_model(tmp_path, task, labels)


def test_missing_pooler_is_allowed_to_start_new(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("encoder").save_pretrained(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one, two = (load_model(tmp_path, "sequence-classification", 2) for _ in range(2))
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(task="classify", num_labels=2), "task='classify': choose one of encoder, sequence-"),
        (dict(task="token-classification"), "needs num_labels=… or label_names="),
        (dict(task="multi-label-classification", num_labels=0), "num_labels=0: need a whole number of at least 1"),
        (dict(task="sequence-classification", num_labels=2.0), "whole number"),
        (dict(task="sequence-classification", num_labels=True), "whole number"),
        (dict(task="sequence-classification", num_labels=1), "task='regression'"),
        (
            dict(task="sequence-classification", num_labels=3, label_names=["a", "b"]),
            "num_labels=3 but .* 2 names",
        ),
        (dict(task="sequence-classification", label_names=["a", "b", "a"]), "'a' more than once"),
        (dict(num_labels=2), "belong to a head"),
        (dict(trust_remote_code=True), "trust_remote_code is refused"),
    ],
)
def test_contradictions_are_refused(encoder_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(encoder_folder, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini-lm", "did you mean minilm"),
        ("MiniLM", "did you mean minilm"),
        ("imdb", r"is a corpus; load it with load_corpus\('imdb'\)"),
        ("./no-such-folder", "there is no folder"),
        ("/no/such/folder", "there is no folder"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_names_that_lead_nowhere(name, message, load):
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize("problem", ["no list", "a broken list"])
def test_a_folder_needs_no_list_of_assets(encoder_folder, tiny_tokenizer, tmp_path, monkeypatch, problem):
    listed = tmp_path / "sources.toml"
    if problem == "a broken list":
        listed.write_text("[")
    monkeypatch.setattr(assets, "_manifest_path", lambda: listed)
    tiny_tokenizer.save_pretrained(encoder_folder)
    assert type(load_model(encoder_folder)).__name__ == "BertModel" and len(load_tokenizer(str(encoder_folder))) > 9
    model = load_model(encoder_folder, "sequence-classification", 2)
    ftlib.tune(model, "lora")
    if problem == "no list":
        assert ftlib.load(ftlib.save(model, tmp_path / "m")).config.num_labels == 2
        with pytest.raises(ValueError, match="there is no folder"):
            load_model("./elsewhere")


def test_an_asset_is_called_by_its_hub_id_elsewhere(encoder_folder, monkeypatch):
    from ftlib.inputs.pretrained import local_name, public_name

    place = str(assets.cache_dir() / "minilm")
    assert public_name(place) == "sentence-transformers/all-MiniLM-L6-v2"
    assert local_name("sentence-transformers/all-MiniLM-L6-v2") == "minilm"
    monkeypatch.chdir(encoder_folder.parent)
    assert public_name("encoder") == str(encoder_folder) and public_name("") is None
    assert local_name("someone/some-model") == public_name("someone/some-model") == "someone/some-model"
    assert local_name("stanfordnlp/imdb") == "stanfordnlp/imdb"  # a corpus


def test_hub_failure_names_what_works_without_it(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("cannot connect\nmany lines more")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"'someone/some-model' is no asset .* cannot connect .*one of: minilm"):
        load_model("someone/some-model")


def test_hub_id_goes_to_transformers_without_remote_code(monkeypatch):
    import transformers

    seen = {}

    def remember(place, **kwargs):
        seen.update(kwargs, place=place)
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", remember)
    with pytest.raises(OSError):
        load_tokenizer("someone/some-model", revision="abc")
    assert seen == {"place": "someone/some-model", "trust_remote_code": False, "revision": "abc"}


@pytest.mark.parametrize("load", [load_model, ftlib.load])
def test_a_config_that_wants_code_from_a_hub_is_refused(tiny_model, tmp_path, load):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for inside in ({"_attn_implementation": "kernels-community/x@main"}, {"a": {"experts_implementation": "me/x"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | inside))
        with pytest.raises(ValueError, match=r"_implementation is '.*/x.*', code from a hub; refused"):
            load(tmp_path)


def test_settings_that_make_no_sense_are_our_error(tiny_model, tmp_path):
    tiny_model("encoder").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"hidden_act": "evil"}, {"layer_norm_eps": "much"}, {"quantization_config": 5}):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises((ValueError, TypeError)):
            load_model(tmp_path)


def test_folder_without_tokenizer_files_is_refused(encoder_folder):
    with pytest.raises(ValueError, match="has no tokenizer files"):
        load_tokenizer(encoder_folder)


def test_baked_in_truncation_and_padding_are_removed(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "first")
    loaded = load_tokenizer(tmp_path / "first")
    loaded.backend_tokenizer.enable_truncation(6)
    loaded.backend_tokenizer.enable_padding(length=6)
    loaded.save_pretrained(tmp_path / "second")
    again = load_tokenizer(tmp_path / "second")
    assert len(again.backend_tokenizer.encode("the film is good " * 3).ids) == 14
    assert len(again.backend_tokenizer.encode("film").ids) == 3
    assert [len(ids) for ids in again(["the film is good " * 3, "film"])["input_ids"]] == [14, 3]


def test_minilm_is_what_the_card_says():
    model, tokenizer = load_model("minilm"), load_tokenizer("minilm")
    assert model.num_parameters() == 22_713_216 and model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (
        6,
        384,
        12,
    )
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 512
    assert [len(ids) for ids in tokenizer(["word " * 300, "word"])["input_ids"]] == [302, 3]
    assert len(tokenizer("word " * 600, truncation=True)["input_ids"]) == 512
    assert assets.verify("minilm").is_dir()


def test_minilm_puts_like_sentences_closer():
    model, tokenizer = load_model("minilm"), load_tokenizer("minilm")
    texts = ["A man plays the guitar.", "Someone is playing a guitar.", "The bank raised its interest rate."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state  # (texts, tokens, hidden)
    mask = inputs["attention_mask"].unsqueeze(-1)  # (texts, tokens, 1)
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)  # (texts, hidden)
    similarity = means @ means.T  # (texts, texts)
    assert similarity[0, 1] > 0.8 and similarity[0, 2] < 0.2
