"""Names, heads, seeds and refusals on tiny random checkpoints; then the real MiniLM and SmolLM2."""

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
        ("opencc", r"is a table; see ftlib.assets.path\('opencc'\)"),
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


def test_a_language_model_is_called_by_its_hub_id_too():
    from ftlib.inputs.pretrained import local_name, public_name

    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name(str(assets.cache_dir() / "smollm2")) == hub and local_name(hub) == "smollm2"


def test_an_asset_that_is_on_no_hub_is_called_by_its_name():
    """Not by its folder, which is another on another machine."""
    from ftlib.inputs.pretrained import local_name, public_name

    name = "flan-t5-titles"
    assert public_name(str(assets.cache_dir() / name)) == name and local_name(name) == name


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


# ------------------------------------------------------------------------------- language models


def decoder(kind: str, tied: bool):
    """A random decoder of 50 tokens, its head the embedding's weights or not."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    ends = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    if kind == "gpt2":
        return AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **ends))
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=1, **sizes, **ends))


def without(folder, *lost: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in lost:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_model_comes_back_with_its_head_tied_or_not(tmp_path, kind, tied):
    from transformers import AutoModelForCausalLM

    saved = decoder(kind, tied).eval()
    saved.save_pretrained(tmp_path)
    model = load_model(tmp_path, "causal-lm")
    assert type(model) is type(saved) and model.dtype == torch.float32 and not model.training
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    ids = torch.arange(12)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert torch.equal(model(ids).logits, stock) and torch.equal(stock, saved(ids).logits)
    saved.base_model.save_pretrained(tmp_path)  # without a head: enough where the embedding is the head
    if tied:
        assert torch.equal(load_model(tmp_path, "causal-lm")(ids).logits, stock)
    else:
        with pytest.raises(ValueError, match=r"lacks lm_head\.weight: a head that starts random over 50 tokens is no"):
            load_model(tmp_path, "causal-lm")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_has_no_hole(tmp_path, kind):
    decoder(kind, False).save_pretrained(tmp_path)
    table = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[kind]
    with pytest.raises(ValueError, match=r"do not fit .*\(50, 16\) in the file, \(60, 16\) asked for"):
        load_model(tmp_path, "causal-lm", vocab_size=60)
    with pytest.raises(ValueError, match=rf"lacks 1 weights of the encoder itself \({table}"):
        load_model(tmp_path, "causal-lm", vocab_size=60, ignore_mismatched_sizes=True)
    without(tmp_path, "lm_head.weight", f"{table}.weight")
    with pytest.raises(ValueError, match=rf"lacks 1 weights of the encoder itself \({table}"):
        load_model(tmp_path, "causal-lm")


def test_labels_of_a_language_model_are_tokens(tmp_path):
    decoder("llama", True).save_pretrained(tmp_path)
    for labels in (dict(num_labels=2), dict(label_names=["a", "b"]), dict(num_labels=50)):
        with pytest.raises(ValueError, match="labels of a language model are tokens: leave out num_labels and label_n"):
            load_model(tmp_path, "causal-lm", **labels)
    model = load_model(tmp_path, "sequence-classification", 3)  # its layers under a new head of classes
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.num_labels == 3


def test_an_encoder_is_no_language_model(encoder_folder, tmp_path):
    from transformers import AutoConfig, BertForMaskedLM, BertLMHeadModel

    with pytest.raises(ValueError, match=r"lacks cls\.predictions.* over \d+ tokens is no language model; load one"):
        load_model(encoder_folder, "causal-lm")
    config = AutoConfig.from_pretrained(encoder_folder)
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")  # whole, but every token sees those after it
    with pytest.raises(ValueError, match="no language model: in BertLMHeadModel each token sees all others"):
        load_model(tmp_path / "masked", "causal-lm")
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    assert load_model(tmp_path / "decoder", "causal-lm").config.is_decoder


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


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", "causal-lm"), load_tokenizer("smollm2")


def test_smollm2_is_what_the_card_says(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert len(tokenizer) == config.vocab_size == 49_152
    assert tokenizer.model_max_length == config.max_position_embeddings == 8192
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for holder in (tokenizer, config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)
    assert "{% generation %}" not in tokenizer.chat_template
    assert assets.verify("smollm2").is_dir()


# Token ids of the tokenizer on the hub, HuggingFaceTB/SmolLM2-135M-Instruct; what has two spaces before a digit, of
# llama.cpp's rule for it: each digit is set apart first, what is between is split as for GPT-2.
IDS = {
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "PHY302K": [16386, 73, 35, 32, 34, 59],
    "1_000_000": [33, 79, 32, 32, 32, 79, 32, 32, 32],
    "it''s": [269, 3816, 99],
    "can't won't shan't": [4055, 982, 3763, 982, 443, 276, 982],
    "many\n\n\n": [18431, 16506],
    "Zürich": [74, 7170, 5130],
    "日本語": [23274, 115, 40993, 179, 120, 248],
    "हिन्दी": [4300, 134, 27011, 30658, 16525, 44757, 37189],
    "a🎉b": [81, 10813, 232, 227, 82],
    "<|im_start|>system\nhi<|im_end|>\n": [1, 9690, 198, 6004, 2, 198],
    "before<|endoftext|>after": [17985, 0, 9110],
    "<|im_start": [44, 108, 306, 79, 3738],
    "a\x04b": [81, 82],  # one of six bytes without a token
    "a  1": [81, 256, 33],
}


@pytest.mark.parametrize("text", IDS)
def test_smollm2_splits_a_text_as_its_tokenizer_on_the_hub(smollm2, text):
    tokenizer = smollm2[1]
    ids = tokenizer(text)["input_ids"]
    assert ids == IDS[text]
    assert tokenizer.decode(ids) == text.replace("\x04", "")


def test_smollm2_answers_and_stops(smollm2, recwarn, caplog):
    model, tokenizer = smollm2
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    with caplog.at_level(logging.WARNING, "transformers"):
        rows = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**rows, max_new_tokens=20, do_sample=False)[0, rows["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id and len(answer) < 20
    assert not recwarn.list and not caplog.records


@pytest.fixture(scope="module")
def titler():
    from transformers import AutoModelForSeq2SeqLM

    place = assets.path("flan-t5-titles")
    return AutoModelForSeq2SeqLM.from_pretrained(place).eval(), load_tokenizer("flan-t5-titles")


def test_flan_t5_titles_is_what_the_card_says(titler):
    model, tokenizer = titler
    config = model.config
    assert model.num_parameters() == 76_961_152 and model.dtype == torch.float32
    assert (config.num_layers, config.num_decoder_layers, config.d_model, config.d_ff) == (8, 8, 512, 1024)
    assert (config.num_heads, config.d_kv, config.vocab_size, config.feed_forward_proj) == (6, 64, 32_128, "gated-gelu")
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.shared.weight) and not config.scale_decoder_outputs
    assert (len(tokenizer), tokenizer.model_max_length) == (32_100, 512)
    for holder in (tokenizer, config, model.generation_config):
        assert (holder.pad_token_id, holder.eos_token_id) == (0, 1)
    assert len(tokenizer("word " * 60)["input_ids"]) > 60  # the file says 48
    assert assets.verify("flan-t5-titles").is_dir()
    assert load_model("flan-t5-titles").shared.weight.equal(model.shared.weight)


# What ONNX Runtime 1.32 computes with the files (the rewriting of test_converting.py: activations are not rounded): the
# tokens it writes one by one, and the logit of each.
SAID = "We studied aspirin in 120 patients with hypertension. It lowered systolic pressure by 5 mmHg."
TITLE = [282, 2388, 77, 3, 22055, 3, 7, 63, 7, 235, 2176, 1666, 57, 305, 3, 635, 566, 122, 1]
LOGITS = [0.585, -1.010, 4.233, 2.910, 4.122, 2.349, 0.426, 1.268, 0.453, 2.423, -0.771, 3.545, 0.380, 5.005, 2.642]
LOGITS += [6.843, 7.105, 0.197, -1.950]


def test_flan_t5_titles_writes_what_its_onnx_files_do(titler):
    model, tokenizer = titler
    row = tokenizer(SAID, return_tensors="pt")
    out = model.generate(**row, max_new_tokens=30, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert out.sequences[0].tolist() == [0, *TITLE]
    assert tokenizer.decode(TITLE, skip_special_tokens=True) == "Aspirin lowered systolic pressure by 5 mmHg"
    assert_close(torch.stack(out.logits).max(-1).values[:, 0], torch.tensor(LOGITS), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("letters", "lost"),
    [("áéíóúñü¿¡", "¡¿íñú"), ("ÁÉÍÓÚÑÜ", "ÁÍÑÓÚ"), ("àâæçèéêëîïôùûüÿœ«»’", "æëïœÿ"), ("ÀÂÇÈÉÊËÎÏÔÙÛŒ", "ÀÂÇÈÊËÏÔÙÛŒ")],
)
def test_the_letters_that_flan_t5_titles_can_not_write(titler, letters, lost):
    unknown = [letter for letter in letters if 2 in titler[1](letter)["input_ids"]]
    assert "".join(sorted(unknown)) == "".join(sorted(lost))


def test_the_chinese_albert_is_what_the_card_says():
    model, tokenizer = load_model("albert-tiny-zh", "masked-lm"), load_tokenizer("albert-tiny-zh")
    assert model.num_parameters() == 4_044_312 and len(tokenizer) == 21_128
    (((best,),),) = ftlib.predict(model, ["北[MASK]是中國的首都。"], tokenizer=tokenizer, top_k=1)
    assert best["text"] == "京"
