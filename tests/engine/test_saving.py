"""A model in a folder comes back and predicts the same, whatever was trained of it, here and in PEFT."""

import json
import os
import re
import shutil
import signal
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_fit import LABELS, make_rows, quick, same, weights
from torch.testing import assert_close

from ftlib.core.batches import collate
from ftlib.engine.fit import fit
from ftlib.engine.saving import load, save
from ftlib.inputs.files import fingerprint
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import STRATEGIES, merge, tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.task import auto_class, names_of

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
        "README.md",
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


@pytest.mark.parametrize("own", [True, False])
def test_an_output_layer_of_its_own_is_not_tied_by_loading_nor_later(tmp_path, caplog, own):
    """T5Config says tied whatever the file says, and `resize_token_embeddings` would then tie: the weights decide."""
    kinds = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if own else {}
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **kinds
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if own:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(30, 16))
    ids = torch.tensor([[5, 6, 1]])
    save(model, tmp_path / "m")
    for again in (load(tmp_path / "m"), load(save(load(tmp_path / "m"), tmp_path / "n"))):
        with torch.no_grad():
            assert torch.equal(again(ids, labels=ids).logits, model(ids, labels=ids).logits)
        assert again.config.tie_word_embeddings is not own and again.config.scale_decoder_outputs is not own
        again.resize_token_embeddings(32)
        assert (again.lm_head.weight is not again.shared.weight) == own
        assert again.shared.weight is again.encoder.embed_tokens.weight is again.decoder.embed_tokens.weight
    assert not [record for record in caplog.records if record.funcName == "tie_weights"]


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
    if strategy in ("lora", "pfeiffer"):  # what went with the head, the pooler, is not taken for another base
        without(folder, "pooler")
        with pytest.raises(ValueError, match=r"lacks the task head \(.*classifier.*\), which would start random"):
            load(folder)


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
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: .*No such file"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk"), "adapter_model.safetensors: not a whole"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
        (lambda f: (f / "ftlib.json").write_text("[]"), "ftlib.json: not JSON with an object"),
        (lambda f: edited(f / "ftlib.json", options=3), "make no adapter .*mapping, not int"),
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


# ------------------------------------------------------------------------------------------ what else is in the folder

OTHERS = {
    "README.md": "mine", "notes.txt": "a", "results.json": "{}", "train.log": "b", "model.onnx": "c", "code.py": "d",
    "1_Pooling/config.json": "{}", "runs/1/events": "e", "tokenizer.json": "{}", "vocab.txt": "f",
}  # fmt: skip


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def several(tiny_model):
    return MultiTaskModel(tiny_model("encoder"), {"a": Head(num_labels=3)}).eval()


def lora_on(where):
    model = with_head(where)
    tune(model, "lora", rank=2)
    return model


def test_a_model_takes_the_place_of_a_model_and_of_nothing_else(base, tiny_model, tmp_path):
    """Sharded, several heads, an adapter, whole, in turn over each other: what is read is always the last one."""
    where, folder = base(), tmp_path / "m"
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    sharded = tiny_model(seed=3)
    stock = sharded.save_pretrained
    sharded.save_pretrained = lambda place: stock(place, max_shard_size="5KB")
    makes = {
        "sharded": {"config.json", "model.safetensors.index.json"}, "one": {"config.json", "model.safetensors"},
        "adapter": {"adapter_config.json", "adapter_model.safetensors", "ftlib.json"},
        "heads": {"multitask.json", "heads.safetensors", "encoder/config.json", "encoder/model.safetensors"},
    }  # fmt: skip
    models = {"sharded": sharded, "one": tiny_model(seed=4), "adapter": lora_on(where), "heads": several(tiny_model)}
    for name in (
        "sharded",
        "heads",
        "one",
        "adapter",
        "sharded",
        "adapter",
        "heads",
        "adapter",
        "one",
        "sharded",
        "one",
    ):
        save(models[name], folder)
        found = tree(folder)
        assert {key: found.pop(key).decode() for key in OTHERS} == OTHERS
        shards = {key for key in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", key)}
        assert found.keys() - shards == makes[name] and bool(shards) == (name == "sharded")
        assert same(weights(load(folder)), weights(models[name]))


def test_a_tokenizer_goes_only_for_another(tiny_model, tiny_tokenizer, tmp_path, capsys):
    folder = save(tiny_model(), tmp_path, tiny_tokenizer)
    (folder / "vocab.txt").write_text("of an older one")
    before = tree(folder)["tokenizer.json"]
    save(tiny_model(), folder)
    assert tree(folder)["tokenizer.json"] == before and (folder / "vocab.txt").is_file()
    save(tiny_model(), folder, tiny_tokenizer)
    assert tree(folder)["tokenizer.json"] == before and not (folder / "vocab.txt").exists()
    load(folder)
    assert capsys.readouterr() == ("", "")  # no bars


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_usual_rights(base, tiny_model, tmp_path, umask):
    """safetensors 0.8 lets only the owner read; the right value is what `open` gives under the umask."""
    before = os.umask(umask)
    try:
        for name, model in {"one": tiny_model(), "several": several(tiny_model), "adapter": lora_on(base())}.items():
            save(model, tmp_path / name)
            assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).rglob("*.*")} == {0o666 & ~umask}
    finally:
        os.umask(before)


def test_folders_that_can_not_be_renamed(tiny_model, tmp_path, monkeypatch):
    """The current folder, one with the longest name there is, a link, one with a file that is a mount point."""
    model, real = tiny_model(seed=2), os.rename
    (tmp_path / ("long" * 60)).mkdir()
    monkeypatch.chdir(tmp_path / ("long" * 60))
    save(model, ".")
    assert os.getcwd().endswith("long") and same(weights(load(".")), weights(model))
    (tmp_path / "link").symlink_to("later")
    save(model, tmp_path / "link")
    assert same(weights(load(tmp_path / "later")), weights(model))
    save(tiny_model(), tmp_path / "m")

    def busy(old, new):
        if os.path.isdir(old) or os.path.basename(new) in ("config.json", ".saving.json"):
            raise OSError(16, "Device or resource busy")
        real(old, new)

    monkeypatch.setattr(os, "rename", busy)
    save(model, tmp_path / "m")
    assert same(weights(load(tmp_path / "m")), weights(model)) and len(tree(tmp_path / "m")) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_any_line_it_is_the_old_one_or_the_new(tiny_model, tmp_path):
    """SIGKILL before every 47th line of the writing, over several heads' files and a model's, and other people's."""
    old, new = tiny_model(seed=1, num_labels=3), tiny_model(seed=2)
    save(several := MultiTaskModel(tiny_model("encoder"), {"a": Head()}), tmp_path / "first")
    save(old, tmp_path / "second")
    kept, number = [], 1
    for number in range(1, 2000, 47):
        name, before = (("first", several), ("second", old))[number % 2]
        shutil.copytree(tmp_path / name, place := tmp_path / f"{name}-{number}")
        (place / "notes.txt").write_text("mine")
        if not killed_at(number, lambda p=place: save(new, p)):
            break
        found = weights_of(load(place))
        assert found in (weights_of(before), weights_of(new)) and (place / "notes.txt").read_text() == "mine"
        kept.append(found)
        save(new, place)
        assert set(tree(place)) == {"README.md", "config.json", "model.safetensors", "notes.txt"}
        assert weights_of(load(place)) == weights_of(new)
    assert len(kept) > 10 and set(kept) == {weights_of(several), weights_of(old), weights_of(new)}


def weights_of(model):
    return fingerprint(weights(model))


def killed_at(number, call):
    """Whether a child process that is killed before line `number` of the files that write came to that line."""
    count = [0]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(("inputs/files.py", "shutil.py")):
            return None
        count[0] += event == "line"
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    sys.settrace(trace)
    try:
        call()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that write")
def test_two_that_save_and_one_that_loads_are_no_mixture(tiny_model, tmp_path):
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    for number, model in enumerate(models):
        model.config.id2label = {0: f"no {number}", 1: f"yes {number}"}
    right = [(model.config.id2label, weights_of(model)) for model in models]
    save(models[0], tmp_path / "m")
    children = []
    for model in models:
        if not (pid := os.fork()):
            try:
                for _ in range(5):
                    save(model, tmp_path / "m")
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    for _ in range(15):
        found = load(tmp_path / "m")
        assert (found.config.id2label, weights_of(found)) in right
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert set(tree(tmp_path / "m")) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("link", [".saving", "encoder", "base", None])
def test_a_folder_that_would_write_elsewhere_is_refused(tiny_model, tmp_path, link):
    """What looks like a save that was cut short, with a link in it, or names of files elsewhere."""
    folder, victim = save(tiny_model(), tmp_path / "m"), tmp_path / "victim"
    for place in (victim, folder / ".saving"):
        (place / "encoder").mkdir(parents=True)
        (place / "whole").write_text(f"../victim/model.safetensors\n{victim}/model.safetensors")
        for name in ("model.safetensors", "encoder/model.safetensors"):
            (place / name).write_text(place.name)
    before = tree(victim)
    if link:
        shutil.rmtree(folder / link, ignore_errors=True)
        (folder / link).symlink_to(victim)
    for call in (load, lambda place: save(tiny_model(), place)) if link else (load,):
        with pytest.raises(
            ValueError, match=rf"through the link '{link}'; refused" if link else "not a whole safetensors"
        ):
            call(folder)
    assert tree(victim) == before


def test_folders_of_other_people_called_like_a_models_parts_stay(base, tiny_model, tmp_path):
    for name, model in {"adapter": lora_on(base()), "whole": tiny_model()}.items():
        for part in ("base", "encoder"):
            tiny_model("encoder").save_pretrained(tmp_path / name / part)
        before = tree(tmp_path / name)
        assert before.items() <= tree(save(model, tmp_path / name)).items()


# ------------------------------------------------------------------------------------------------ what would be lost


class Own(transformers.BertForSequenceClassification):
    """A class of the user's."""


def untied(tiny_model):
    model = transformers.BertForMaskedLM(tiny_model("encoder").config)
    model.cls.predictions.decoder.weight = torch.nn.Parameter(model.cls.predictions.decoder.weight * 2)
    return model


def changed(tiny_model, change):
    model = tiny_model()
    change(model)
    return model


@pytest.mark.parametrize(("make", "said"), [
    (lambda t: Own(t().config), "names no Transformers model"),
    (lambda t: changed(t, lambda m: m.add_module("more", torch.nn.Linear(2, 2))), "more.(bias|weight) and 1 more"),
    (lambda t: changed(t, lambda m: m.bert.set_input_embeddings(torch.nn.Embedding(70, 16))), "weight|describes"),
    (lambda t: changed(t, lambda m: setattr(m, "classifier", torch.nn.Linear(16, 5))), "classifier.bias"),
    (lambda t: changed(t, lambda m: m.bert.encoder.layer.pop(1)), "weights missing|layer.1"),
], ids=["an own class", "more", "other words", "another head", "a layer less"])  # fmt: skip
def test_what_would_not_come_back_is_refused_and_the_old_model_stays(tiny_model, tmp_path, make, said):
    old = tiny_model(seed=1)
    save(old, tmp_path / "m")
    with pytest.raises(ValueError, match=said):
        save(make(tiny_model), tmp_path / "m")
    assert same(weights(load(tmp_path / "m")), weights(old))
    assert set(tree(tmp_path / "m")) == {"README.md", "config.json", "model.safetensors"}


def test_what_stock_saves_in_its_own_way_comes_back(base, tiny_model, tmp_path):
    """Numbers that are not finite, half precision (float32 afterwards), a compiled model, label numbers as text."""
    odd, half = tiny_model(), tiny_model(seed=2).to(torch.bfloat16)
    odd.classifier.weight.data[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    assert weights_of(load(save(odd, tmp_path / "odd"))) == weights_of(odd)
    back = load(save(half, tmp_path / "half"))
    assert back.dtype == torch.float32 and weights_of(back) == weights_of(half)
    assert weights_of(load(save(torch.compile(odd), tmp_path / "compiled"))) == weights_of(odd)
    two = transformers.AutoConfig.for_model("bart", **KINDS["bart"], num_labels=2)  # as from_pretrained can't, 5.23
    two = transformers.BartForSequenceClassification(two)
    sines = transformers.AutoConfig.for_model("marian", **KINDS["bart"])  # computed tables are not in the file
    for model in (two, transformers.MarianMTModel(sines), untied(tiny_model)):
        assert weights_of(load(save(model, tmp_path / "two"))) == weights_of(model)
    where, names = base(), {i: f"class {chr(97 + i)}" for i in range(12)}  # "10" sorts before "2"
    for strategy in ("full", "lora"):
        model = with_head(where, labels=12)
        model.config.id2label = {str(i): name for i, name in names.items()}
        assert names_of(model) == names
        tune(model, strategy)
        assert load(save(model, tmp_path / strategy)).config.id2label == names


# ------------------------------------------------------------------------------------------- the base of an adapter


def edited_weight(model):
    model.base_model.get_parameter("encoder.layer.1.output.dense.weight").data[3, 2] += 1e-3


def stage(strategy):
    def run(model):
        tune(model, strategy)
        fit(model, make_rows(8), config=quick(epochs=1, learning_rate=0.05, warmup_fraction=0.0))
        merge(model)

    return run


BASES = {
    "one weight": edited_weight, "full": stage("full"), "lora": stage("lora"), "mixout": stage("mixout"),
    "head only": stage("head-only"), "nothing": lambda model: None,
}  # fmt: skip


@pytest.mark.parametrize(("change", "strategy"), [
    ("one weight", "lora"), ("one weight", "ia3"), ("full", "lora"), ("full", "int8"), ("lora", "houlsby"),
    ("lora", "peft"), ("mixout", "lora"), ("head only", "lora"), ("nothing", "peft"), ("nothing", "int8"),
])  # fmt: skip
def test_an_adapter_brings_the_base_that_is_not_on_disk(base, tmp_path, change, strategy):
    """Here, in PEFT by the name it wrote, and after a move; right: the logits before."""
    where = base()
    model = with_head(where, labels=3)
    BASES[change](model)
    kinds = {"peft": peft.LoraConfig(r=2, bias="all"), "ia3": peft.IA3Config(), "int8": "lora"}
    tune(model, kinds.get(strategy, strategy), **({"base_bits": 8} if strategy == "int8" else {}))
    fit(model, make_rows(8), config=quick(epochs=1, learning_rate=0.05, warmup_fraction=0.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = save(model, tmp_path / "m")
    brought = change not in ("nothing", "head only")
    assert (folder / "base").is_dir() == brought
    assert any("base model is saved too" in str(one.message) for one in said) == brought
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder / "base" if brought else where)
    if strategy not in ("houlsby", "int8"):
        theirs = peft.PeftModel.from_pretrained(with_head(named, labels=3, seed=7), folder)
        assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)
    expected = logits(model)
    back = load(shutil.move(folder, tmp_path / "moved"))
    assert_close(logits(back), expected, atol=1e-5, rtol=0)
    again = save(back, tmp_path / "moved")  # over itself, the base that it came from included
    assert (again / "base").is_dir() == brought
    shutil.rmtree(where) if brought else None
    assert_close(logits(load(again)), expected, atol=1e-5, rtol=0)
    elsewhere = save(load(again), tmp_path / "elsewhere")  # does not lean on the folder of another adapter
    shutil.rmtree(again)
    assert_close(logits(load(elsewhere)), expected, atol=1e-5, rtol=0)


def test_a_setting_given_when_loading_brings_the_base(base, tmp_path):
    from ftlib.inputs.pretrained import load_model

    for options in (dict(num_hidden_layers=1), dict(layer_norm_eps=0.5)):
        model = load_model(base(), "sequence-classification", 2, **options)
        tune(model, "lora")
        with pytest.warns(UserWarning, match=f"another {next(iter(options))} in its config"):
            folder = save(model, tmp_path / "m")
        assert_close(logits(load(folder)), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("several_heads", [False, True])
def test_another_base_is_refused_and_a_given_one_is_said(base, tiny_model, tmp_path, several_heads):
    from ftlib.inputs.pretrained import load_model

    where = base()
    model = MultiTaskModel(load_model(where), {"a": Head()}) if several_heads else with_head(where)
    tune(model, "lora")
    folder = save(model, tmp_path / "m")
    shutil.copytree(where, tmp_path / "copy")
    edited(where / "config.json", layer_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"not the one the adapter was trained on \(another layer_norm_eps"):
        load(folder)
    tiny_model("encoder", seed=9).save_pretrained(where)
    with pytest.raises(
        ValueError, match=r"trained on \(weights [0-9a-f]{16}, then [0-9a-f]{16}\); .*pass base="
    ) as error:
        load(folder)
    assert len(set(re.findall("[0-9a-f]{16}", str(error.value)))) == 2
    with pytest.warns(UserWarning, match="not the one the adapter was trained on"):
        load(folder, base=where)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert weights_of(load(folder, base=tmp_path / "copy")) == weights_of(model)


@pytest.mark.parametrize(("model_type", "strategy"), [
    ("bert", "lora"), ("distilbert", "lora"), ("albert", "lora"), ("t5", "lora"), ("llama", "lora"), ("t5", "pfeiffer"),
    ("bert", "peft"), ("t5", "peft"), ("llama", "peft"), ("bert", "prompt"), ("llama", "prompt"),
])  # fmt: skip
def test_new_words_travel_with_the_adapter(tmp_path, model_type, strategy):
    """Resized embeddings: logits of the trained model, on the base by name, on one resized again, on a moved one."""
    where = built(model_type, tmp_path / "base")

    def larger(seed):
        model = with_head(where, labels=3)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(72, mean_resizing=False)
        model.config.pad_token_id = 70
        return model

    model = larger(1)
    kinds = {"peft": peft.LoraConfig(r=2), "prompt": peft.PromptTuningConfig(num_virtual_tokens=2)}
    tune(model, kinds.get(strategy, strategy))
    moved(model)
    folder = save(model, tmp_path / "m")
    assert not (folder / "base").exists()
    rows = {"input_ids": torch.tensor([[5, 71, 68, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        expected = model.eval()(**rows).logits
        for given in (None, larger(2)):
            back = load(folder, base=given)
            assert (back.config.vocab_size, back.config.pad_token_id) == (72, 70)
            assert_close(back(**rows).logits, expected, atol=1e-6, rtol=0)
        if strategy in ("lora", "peft"):
            theirs = peft.PeftModel.from_pretrained(larger(3), folder).eval()
            assert_close(theirs(**rows).logits, expected, atol=1e-6, rtol=0)


def test_a_head_that_peft_was_not_told_of_is_refused(base, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match=r"PEFT does not save the head 'classifier'; name it in .*modules_to_save"):
        save(peft.get_peft_model(with_head(base()), config), tmp_path / "m")
    assert not any((tmp_path / "m").iterdir())


# --------------------------------------------------------------------------------------- what others open, in pairs

SIZES = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "bert": SIZES, "roberta": SIZES | {"pad_token_id": 1},
    "albert": SIZES | {"embedding_size": 8}, "mpnet": SIZES | {"pad_token_id": 1},
    "distilbert": dict(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40),
    "deberta-v2": SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": SIZES | dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    "xlnet": dict(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0),
    "gpt2": dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=40, pad_token_id=0),
    "llama": SIZES | {"num_key_value_heads": 2}, "qwen3": SIZES | dict(num_key_value_heads=2, head_dim=8),
    "t5": dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "bart": dict(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_attention_heads=2, decoder_ffn_dim=32, max_position_embeddings=40, pad_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
THROUGH_PEFT = {
    "peft lora": lambda: peft.LoraConfig(r=2), "dora": lambda: peft.LoraConfig(r=2, use_dora=True),
    "ia3": lambda: peft.IA3Config(), "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
}  # fmt: skip
ALL_TASKS = [*LABELS, "relation-classification"]


def built(model_type, folder):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **KINDS[model_type])
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def moved(model):
    """As after training: all that trains has other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3) if p.requires_grad else None


@pytest.mark.filterwarnings(TOLD)
@pytest.mark.parametrize("model_type", KINDS)
def test_every_strategy_opens_elsewhere(tmp_path, model_type):
    """Every strategy on every other kind of model, the tasks in turn: the same logits by `load`, stock and PEFT."""
    from ftlib.inputs.pretrained import load_model

    where, tried = built(model_type, tmp_path / "base"), 0
    shift = list(KINDS).index(model_type)
    for number, strategy in list(enumerate([*STRATEGIES, *THROUGH_PEFT]))[shift % 2 :: 2]:
        task = ALL_TASKS[(number + shift) % len(ALL_TASKS)]
        without = {"bart": ("token-classification", ALL_TASKS[-1]), "t5": ALL_TASKS[-1:]}.get(model_type, ())
        tasks = [task for task in ALL_TASKS if task not in without]
        if task not in tasks or (strategy == "prompt" and (model_type in ("t5", "bart") or task == ALL_TASKS[-1])):
            task, strategy = tasks[0], "full" if strategy == "prompt" else strategy  # which these heads do not take
        labels = LABELS.get(task, 3)
        model = load_model(where, task, labels)
        try:
            tune(model, THROUGH_PEFT[strategy]() if strategy in THROUGH_PEFT else strategy)
        except ValueError:  # no biases here, layers that share their weights, no default targets
            continue
        moved(model)
        row = {"input_ids": torch.tensor([[5, 9, 6, 7, 1]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
        row |= {"marker_positions": torch.tensor([[0, 2]])} if task == ALL_TASKS[-1] else {}
        with torch.no_grad():
            expected = model.eval()(**row).logits
            folder = save(model, tmp_path / "m")
            opened = {"load": load(folder)}
            if (folder / "config.json").is_file():
                opened["stock"] = auto_class(task).from_pretrained(folder)
            elif strategy not in ("houlsby", "pfeiffer"):
                fresh = load_model(where, task, labels, seed=5)
                opened["PEFT"] = peft.PeftModel.from_pretrained(fresh, folder)
                # Transformers opens adapters too; a DoRA that PEFT wrote itself comes out otherwise there
                if strategy in ("lora", "ia3") and task != ALL_TASKS[-1]:
                    opened["stock"] = auto_class(task).from_pretrained(folder, num_labels=labels)
            for name, other in opened.items():
                found = other.eval()(**row).logits
                found = found[:, -5:] if strategy == "prompt" and expected.ndim == 3 else found
                assert_close(found, expected, atol=1e-5, rtol=0, msg=f"{strategy}, {task}, {name}")
        tried += 1
    assert tried >= 5


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "albert"])
def test_an_encoder_opens_in_sentence_transformers(tiny_tokenizer, tmp_path, model_type):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from ftlib.inputs.pretrained import load_model
    from ftlib.methods.features import extract_features

    texts = ["the film is good", "a bad plot and not very fun"]
    built(model_type, tmp_path / "base")
    for name, model in {
        "encoder": load_model(tmp_path / "base"), "classifier": with_head(tmp_path / "base"),
        "several": MultiTaskModel(load_model(tmp_path / "base"), {"a": Head("token-classification", 3)}),
    }.items():  # fmt: skip
        moved(model)
        folder = save(model, tmp_path / name, tiny_tokenizer)
        if name == "several":
            tiny_tokenizer.save_pretrained(folder := folder / "encoder")
        theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
        ours = extract_features(model, texts, tokenizer=tiny_tokenizer)
        assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ model card


def test_a_model_card_says_what_the_folder_holds(base, tiny_model, tmp_path):
    """Read by the Hub's own reader of cards, which checks licence and ids."""
    from huggingface_hub import ModelCard

    about = {
        "data": "imdb",
        "licence": "MIT",
        "metrics": {"accuracy": 0.91},
        "command": "python -m ftlib train run.toml",
    }
    model = tiny_model(num_labels=3)
    model.config.id2label = {0: "bad", 1: "so: so", 2: "good"}
    model.config._name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    folder = save(model, tmp_path / "m", about=about)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "mit", "datasets": ["imdb"],
        "library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["ftlib"],
    }  # fmt: skip
    for said in ("bad, so: so, good", "accuracy 0.91", "python -m ftlib train run.toml", transformers.__version__):
        assert said in card.content
    tagger = with_head(where := base(), "token-classification", 3)
    tune(tagger, "lora")
    card = ModelCard.load(save(tagger, folder, about={"data": ["a b", "x/y"], "licence": "our own"}) / "README.md")
    assert card.data.to_dict() == {
        "license": "other", "license_name": "our own", "datasets": ["x/y"], "library_name": "peft",
        "pipeline_tag": "token-classification", "tags": ["ftlib"],
    }  # fmt: skip
    assert "lora" in card.content and str(where.parent) not in card.content  # no path of this machine
    (folder / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README.md is your own and stays"):
        save(tagger, folder, about=about)
    save(tagger, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert "a: sequence-classification" in (save(several(tiny_model), tmp_path / "s") / "README.md").read_text()
