"""The speed programs run, at toy size; their FLOPs, ratios and grouping agree with counts by hand and by torch."""

import copy
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ftlib

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests/benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAMS))
    return importlib.import_module


def test_flops_are_torchs_own_count(program, tiny_model):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("encoder", hidden_size=32, intermediate_size=64)
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 60, (3, 20))
    with FlopCounterMode(display=False) as forward:
        hidden = model.encoder(model.embeddings(ids)).last_hidden_state
    encoder_flops = program("roofline").encoder_flops
    assert encoder_flops(model, [20] * 3, training=False) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    assert encoder_flops(model, [20] * 3, training=True) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("lora", [False, True])
def test_flops_of_a_decoder_are_torchs_own_count(program, lora):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    if lora:
        ftlib.tune(model, "lora", rank=4)
    ids = torch.randint(0, 50, (3, 20))
    with FlopCounterMode(display=False) as counted:
        model(ids, labels=ids).loss.backward()
    both_halves = 3 * 2 * 2 * 32 * 3 * 20**2  # eager attention multiplies the masked half too
    # below the first layer nothing trains: its projections and the A of its adapters have no gradient of their inputs
    # to find, and its scores none of their keys
    spared = 2 * 60 * 32 * (32 + 16 + 16 + 4 + 4) + 2 * 32 * 3 * 20**2 if lora else 0
    expected = program("decoders").decoder_flops(model, [20] * 3, lora=lora)
    assert counted.get_total_flops() == expected + both_halves - spared


def test_rows_that_were_joined_are_told_apart(program):
    pieces = program("decoders").pieces
    ids, labels = torch.tensor([[7, 8, 9, 7, 8, 5, 0]]), torch.tensor([[-100, -100, 9, -100, -100, 5, -100]])
    mask = (ids > 0).long()
    found = pieces({"input_ids": ids, "labels": labels, "attention_mask": mask}, [7, 8])
    assert [row["input_ids"] for row in found] == [[7, 8, 9], [7, 8, 5]]
    assert [row["labels"] for row in found] == [[-100, -100, 9], [-100, -100, 5]]
    assert program("decoders").sizes(found) == (6, 2)
    [whole] = pieces({"input_ids": ids, "labels": labels}, None)
    assert whole["input_ids"] == ids[0].tolist()


def test_matrix_product_rate_counts_two_flops_a_multiply_add(program, monkeypatch):
    roofline = program("roofline")
    clock = iter(range(1000))
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: float(next(clock)))  # every burst takes one second
    rate = roofline.product_rate(3, 4, 5, device="cpu", dtype=torch.float32, seconds=7.0)
    assert rate == 2 * 3 * 4 * 5 * 21  # 3 products took a second, so 7 seconds hold 21
    found = roofline.best_rate({"a": (2, 2, 2), "b": (3, 4, 5)}, device="cpu", dtype=torch.float32, seconds=7.0)
    assert found["shape"] == "b (3, 4, 5)" and found["rate"] == rate


def test_summary_by_hand(program):
    slow = [{"seconds": s, "rate": 10.0, "shape": "a"} for s in (9.0, 4.0, 6.0, 5.0)]  # the first warms up
    fast = [{"seconds": s, "rate": 20.0, "shape": "a", "loss": 0.5} for s in (9.0, 2.0, 2.0, 1.0)]
    first, second = program("paired").summary({"slow": slow, "fast": fast}, count=10, against=["slow", "no"], flops=8)
    assert first["per_second"] == 2.0 and second["per_second"] == 5.0 and second["loss"] == 0.5
    assert second["against"] == {"slow": {"median": 3.0, "min": 2.0, "max": 5.0}}  # not 5 / 2
    assert second["utilisation"] == {"median": 8 / 40, "min": 8 / 40, "max": 8 / 20}
    assert second["first_seconds"] == 9.0 and second["rounds"] == 3


def test_rows_of_one_comparison_replace_each_other(program, tmp_path):
    table = program("record").Table("x", "a command", "about", folder=tmp_path)
    table.replace({"part": "a"}, [{"method": "old"}, {"method": "older"}])
    table.replace({"part": "b"}, [{"method": "other"}])
    table.replace({"part": "a"}, [{"method": "new"}])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["part"], row["method"]) for row in rows] == [("b", "other"), ("a", "new")]
    assert all(row["versions"]["torch"] and row["date"] and row["device"] for row in rows)


@pytest.mark.parametrize(
    "names, group",
    [
        (["aten::mm", "AddmmBackward0"], "matrix products"),
        (["aten::mul", "aten::native_dropout"], "dropout"),
        (["aten::bmm", "aten::matmul", "aten::scaled_dot_product_attention"], "attention"),
        (["aten::add_", "Optimizer.step#AdamW.step"], "optimizer and clipping"),
        (["aten::add", "aten::linear_thing"], None),
    ],
)
def test_operator_groups(program, names, group):
    event = None
    for name in reversed(names):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert program("step_profile").group_of(event) == group


def test_stored_lengths_are_whole(program):
    lengths = program("lengths").measured_lengths()
    [row] = json.loads((PROGRAMS / "results/lengths.json").read_text())["rows"]
    assert len(lengths) == row["sentences"] and 3 <= min(lengths) and max(lengths) <= 128
    assert lengths != sorted(lengths)


def test_word_tokenizer_keeps_the_lengths(program):
    ids = program("bert_base").word_tokenizer(words=9)(["w0 w8 w3", "w1"])["input_ids"]
    assert ids == [[2, 5, 13, 8, 3], [2, 6, 3]]


def test_encode_loop_is_the_mean_over_real_tokens(program, tiny_model, tiny_tokenizer):
    model = tiny_model("encoder")
    texts = ["a film", "the plot is not very good", "dull"]
    vectors = program("bert_base").encode_loop(model, tiny_tokenizer, texts, batch_size=2)
    with torch.no_grad():
        for text, vector in zip(texts, vectors, strict=True):
            alone = model(**tiny_tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(vector, alone.numpy(), atol=1e-5)


def test_report_picks_the_best_method_against_the_fastest_rival(program, monkeypatch):
    report = program("report")
    stamp = {"device": "GPU X", "threads": 4, "command": "c", "date": "2026-01-01", "versions": {"torch": "2"}}

    def row(method: str, against: dict, utilisation: float) -> dict:
        ratios = {base: {"median": m, "min": m - 1, "max": m + 1} for base, m in against.items()}
        share = {"median": utilisation, "min": utilisation, "max": utilisation}
        return {"work": "w", "method": method, "against": ratios, "utilisation": share, "per_second": 7.0, **stamp}

    encodes = ("sentence-transformers encode, a", "sentence-transformers encode, b")
    rows = [
        row("sentence-transformers encode, a", dict.fromkeys(encodes, 1.0), 0.9),
        row("ftlib.x", dict(zip(encodes, (3.0, 2.0), strict=True)), 0.3),
        row("ftlib.y", dict(zip(encodes, (9.0, 1.5), strict=True)), 0.4),
    ]
    other = [rows[0] | {"device": "CPU, Y (avx2, amx_bf16)"}]
    monkeypatch.setattr(report, "speed_rows", lambda part: [*rows, *other] if part == "features" else [])
    value, best = report.reached("features", "", report.ENCODE)
    assert (value["median"], best["method"]) == (2.0, "ftlib.x")
    value, best = report.reached("features", "w", None)
    assert (value["median"], best["method"]) == (0.4, "ftlib.y")
    assert report.reached("features", "v", None) is None and report.reached("features", "", "ONNX") is None
    heading, _, *lines = [line for line in report.goals().splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in heading.split("|")]
    assert columns[4:6] == ["GPU X", "CPU, Y (avx2, amx_bf16)"]  # side by side
    [encode] = [[cell.strip() for cell in line.split("|")] for line in lines if "`encode`" in line]
    assert encode[3:6] == ["≥ 1.40 ×, with AMX ≥ 2.00 ×", "2.00 × (1.00 × to 3.00 ×), ftlib.x", ""]
    assert not any("ONNX" in line or "fine-tune" in line for line in lines)  # what nobody measured has no line
    search = {"work": "w", "tried": [{"change": {"a": 1}, "faster": {"median": 1.2}, "kept": True}], "best": {"a": 1}}
    shown = report.measured([search | stamp, *rows])
    assert "a=1: 1.20 ×" in shown and "`c`; GPU X, 4 threads; torch 2; 2026-01-01" in shown


def test_pins_are_what_is_imported_and_their_tests_are_counted(program, tmp_path):
    installed = program("record").installed(("torch", "transformers"))
    pair = ",".join(f"{name}=={number}" for name, number in installed.items())
    options = ["--results", str(tmp_path), "--tests", "tests/methods/test_masking.py", "--", pair]
    subprocess.run([sys.executable, str(PROGRAMS / "pins.py"), *options], check=True, capture_output=True)
    [row] = json.loads((tmp_path / "pins.json").read_text())["rows"]
    assert row["pins"] == pair and row["outcome"] == "passed" and row["tests"] > 5 and row["failed"] == 0


def test_other_cpus_are_those_that_this_one_can_be(program, monkeypatch):
    pins = program("pins")
    monkeypatch.setattr(pins, "capability", lambda environment: "AVX2")
    monkeypatch.setattr(pins, "counted", lambda environment, tests: {"outcome": environment["ONEDNN_MAX_CPU_ISA"]})
    row = pins.as_on("AVX2", [])
    assert row["outcome"] == "AVX2" and row["settings"]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2" and row["cpu_model"]
    row = pins.as_on("AVX512", [])
    assert row["outcome"] == "skipped" and row["why"] == "this CPU has no AVX512 (torch finds AVX2)"
    with pytest.raises(RuntimeError, match="asked for DEFAULT, but torch uses AVX2"):
        pins.as_on("DEFAULT", [])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory as Linux tells it")
def test_million_rows_program_at_toy_size(tmp_path):
    command = [sys.executable, str(PROGRAMS / "million_rows.py"), "--rows", "7000", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "million_rows.json").read_text())["rows"]
    assert [(row["kind"], row["rows"]) for row in rows] == [("a Dataset on disk", 7000), ("a list of dicts", 700)]
    assert all(0.1 < row["before_gb"] <= row["peak_gb"] and row["own_gb"] < row["peak_gb"] < 3 for row in rows)


def test_many_rows_program_at_toy_size(tmp_path):
    command = [sys.executable, str(PROGRAMS / "long_features.py"), "2000", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "long_features.json").read_text())["rows"]
    assert [(row["part"], row["rows"]) for row in rows] == [("tokenize", 2000), ("extract_features", 2000)]
    assert all(0.1 < row["before_gb"] <= row["at_tenth_gb"] <= row["peak_gb"] for row in rows)


def toy(folder: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(PROGRAMS / arguments[0]), "--toy", "--results", str(folder), *arguments[1:]]
    subprocess.run(command, check=True, capture_output=True)
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())["rows"]


def test_few_labels_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "few_labels.py")
    found = {(row["corpus"], row["method"], row["shots"]) for row in rows if row["part"] == "accuracy"}
    methods = {("zero-shot", 0), ("prototypes", 2), ("probe", 2), ("fine-tuning", 2), ("contrastive", 2)}
    assert found >= {(corpus, *one) for corpus in ("rotten-tomatoes", "banking77") for one in methods}
    assert all(0 <= row["accuracy"] <= 1 for row in rows if row["part"] in ("accuracy", "rates"))
    assert all(row["seconds"] > 0 for row in rows if row.get("method") in ("fine-tuning", "contrastive"))
    fresh = {row["method"]: (row["1"], row["5"]) for row in rows if row["part"] == "new intents"}
    assert len(fresh) == 7 and all(0 <= value <= 1 for pair in fresh.values() for value in pair)
    bought = [row for row in rows if row["part"] == "active"]
    assert len(bought) == 7 and all(len(row["accuracy"]) == len(row["labels"]) == 2 for row in bought)
    first = [row["accuracy"][0] for row in bought if row["corpus"] == "banking77"]
    assert len({*first}) == 1  # all ways begin with the same labels
    before = len(rows)
    assert len(toy(tmp_path, "few_labels.py")) == before  # it resumes: nothing is measured twice


def test_few_labels_of_a_draw_are_a_part_of_more(program):
    few = program("few_labels")
    small, large = few.drawn("banking77", 2, 3), few.drawn("banking77", 8, 3)
    labels = few.corpus_of("banking77")[0]["train"][1]
    assert set(small) < set(large) and sorted(labels[small]) == [label for label in range(10) for _ in range(2)]
    assert set(small) != set(few.drawn("banking77", 2, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["bert_base.py", "gpu_day.py"])
def test_gpu_programs_leave_stored_rows_alone_without_a_gpu(name):
    done = subprocess.run([sys.executable, str(PROGRAMS / name)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("no GPU")


def test_rounds_end_with_the_time_and_a_method_that_fails_is_a_row(program, monkeypatch):
    bert_base = program("bert_base")
    clock = iter([0.0] * 3 + [1.0, 9.0, 9.0])  # of three warm-ups; before round 2; before round 3 the time is over
    monkeypatch.setattr(bert_base.time, "monotonic", lambda: next(clock))
    turns, stored = iter(range(100)), []

    def breaks():
        raise ValueError("no\nsuch kernel")

    def later():
        if next(turns) == 2:
            raise RuntimeError("out of memory")
        return {"seconds": 2.0}

    rivals = {"good": lambda: {"seconds": 1.0}, "breaks": breaks, "later": later}
    rate = {"rate": 1.0, "shape": "a"}
    put = lambda results, missing: stored.append((copy.deepcopy(results), dict(missing)))  # noqa: E731
    bert_base.rounds_until(rivals, 5, lambda: rate, 5.0, put)
    assert [(len(results["good"]), sorted(results)) for results, _ in stored] == [(2, ["good", "later"]), (3, ["good"])]
    assert stored[0][1] == {"breaks": "ValueError: no such kernel"}
    assert stored[1][1] == stored[0][1] | {"later": "RuntimeError: out of memory"}
    monkeypatch.setattr(bert_base.time, "monotonic", lambda: 9.0)
    bert_base.rounds_until({"good": rivals["good"]}, 5, lambda: rate, 5.0, put)
    assert stored[2] == ({}, {"good": "no time was left"})


def test_cpus_in_names(program, monkeypatch):
    record = program("record")
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(record.os, "cpu_count", lambda: 2)
    text = "model name\t: Intel(R) Xeon(R) Processor @ 2.70GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n" * 2
    monkeypatch.setattr(record.Path, "read_text", lambda self: text)
    monkeypatch.setattr(record.Path, "exists", lambda self: True)
    assert record.device_name() == "CPU, 2 cores, Intel Xeon (avx2, avx512f, avx512_bf16, amx_bf16)"
    assert record.device_slug() == "cpu-2-cores-intel-xeon-amx-bf16"
    text = "model name\t: AMD EPYC 7B13 64-Core Processor\nflags\t\t: fpu avx2\n"
    assert record.device_slug() == "cpu-2-cores-amd-epyc-7b13-avx2"


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """Every part of the GPU day, tiny, without `datasets`, as on the machines it is for."""
    folder = tmp_path_factory.mktemp("day")
    blocked = 'import sys\nsys.modules["datasets"] = sys.modules["evaluate"] = None\n'
    (folder / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, str(PROGRAMS / "gpu_day.py"), "--toy", "--results", str(folder / "results")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "results"


def rows_of(folder: Path, part: str) -> list[dict]:
    [path] = folder.glob(f"gpu-day-{part}-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["device"] and row["date"] and row["command"] and row["versions"]["torch"] for row in rows)
    return rows


def test_the_gpu_day_at_toy_size(day):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    log = json.loads((day / "gpu-day-log.json").read_text())["rows"]
    assert [(row["part"], row["outcome"]) for row in log] == [(part, "done") for part in (1, 2, 3, 4, 6, 5)]
    assert len([*day.iterdir()]) == 7 and all(path.stat().st_size < 16 * 2**20 for path in day.iterdir())
    tests = rows_of(day, "1-tests")
    assert len(tests) > 40 and {row["outcome"] for row in tests} <= {"passed", "skipped"}
    if not torch.cuda.is_available():
        skipped = [row for row in tests if row["test"].startswith("tests/test_cuda.py")]
        assert all("needs a CUDA GPU" in row["message"] for row in skipped) and len(skipped) > 30
    speed = rows_of(day, "2-speed")
    assert {row["work"] for row in speed} == {"train, batch 32", "features, batch 32"}
    assert not [row for row in speed if "missing" in row]
    profile, memory = rows_of(day, "3-profile"), rows_of(day, "4-memory")
    assert [row["method"] for row in profile] == ["ftlib.fit, unpad", "Trainer, bf16, grouped by length"]
    assert {one["name"]: one["times"] for one in profile[0]["operators"]}["aten::addmm"] == 14  # 2 * 6 + pooler + head
    assert all(row["seconds_a_step"] > 0 and 0.5 < row["loss"] < 0.9 for row in memory)
    accuracy = json.loads((day / "multitask.json").read_text())["rows"]
    assert {row["part"] for row in accuracy} >= {"atis", "balancing", "transfer"}


def test_part_2_trains_at_toy_size(day):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    search, *rows = [row for row in rows_of(day, "2-speed") if row["work"] == "train, batch 32"]
    assert search["best"] in ({}, search["tried"][0]["change"])
    methods = ["Trainer, as it comes", "Trainer, bf16=True", "Trainer, best settings found"]
    assert [row["method"] for row in rows[:3]] == methods
    assert {"ftlib.fit", "ftlib.fit, unpad"} <= {row["method"] for row in rows}
    for row in rows:
        assert row["steps"] == 3 and 0.5 < row["loss"] < 0.9
        assert 0 < row["utilisation"]["median"] < 1 and row["against"]["Trainer, as it comes"]["median"] > 0


def test_part_2_extracts_features_at_toy_size(day):
    rows = [row for row in rows_of(day, "2-speed") if row["work"] == "features, batch 32"]
    assert len(rows) == 5 and all(row["difference"] < 0.05 for row in rows)  # bfloat16


def test_part_6_trains_a_decoder_at_toy_size(day):
    rows = rows_of(day, "6-decoders")
    methods = ["ftlib.fit, unpad", *["TRL, as it comes", "TRL, no checkpointing, padding_free"], "plain loop, bf16"]
    assert [(row["method"], row["moves"]) for row in rows] == [
        (m, moves) for m in methods for moves in ("lora", "full")
    ]
    trl = [row for row in rows if row["method"].startswith("TRL")]
    assert all("missing" in row for row in trl)  # it needs `datasets`, which is not there
    for row in rows:
        if row not in trl:
            assert 5.0 < row["losses"][0] < 5.6 and row["tokens"] > 60 and row["utilisation"]["median"] > 0  # log 200
    first, *others = [row["losses"] for row in rows if row["moves"] == "full" and row not in trl]
    assert all(own == pytest.approx(first, abs=0.05) for own in others)  # bfloat16


def test_the_gpu_day_becomes_tables(program, monkeypatch, day):
    report = program("report")
    assert report.NO_GPU in report.gpu_day() or [*report.RESULTS.glob("gpu-day-*")]
    monkeypatch.setattr(report, "RESULTS", day)
    text = report.gpu_day()
    headings = ("Tests that need CUDA", "Where the time", "Llama of 1.2 billion")
    assert all(f"**{heading}" in text for heading in headings), text
    assert "| – " not in text + report.speed() + report.memory() and "nan" not in text  # a cell without a number
    assert "fine-tune BERT-base, GPU, batch 32" in report.speed() and "micro-batches of 8" in report.memory()


def test_a_part_that_hangs_or_dies_is_told_and_the_others_go_on(program, monkeypatch, tmp_path, capsys):
    gpu_day = program("gpu_day")
    script = tmp_path / "day.py"
    script.write_text(
        "import sys, time\npart = sys.argv[sys.argv.index('--alone') + 1]\n"
        "time.sleep(60) if part == '2' else sys.exit('no luck') if part == '3' else print('fine')\n"
    )
    monkeypatch.setattr(gpu_day, "__file__", str(script))
    monkeypatch.setattr(gpu_day, "SHARES", {1: 1, 2: 1, 3: 50})
    args = SimpleNamespace(part=[1, 2, 3], seconds=100.0, toy=True, results=tmp_path, earlier=tmp_path)
    assert gpu_day.whole(args) == 2
    rows = json.loads((tmp_path / "gpu-day-log.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["done", "stopped after 2 s", "ended with 1"]
    assert "no luck" in rows[2]["said"] and gpu_day.numbers("2,1") == [1, 2]


def square(table, number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    table.row({"number": number}, lambda: {"square": number**2, "process": os.getpid()})


def test_jobs_side_by_side(program, tmp_path):
    record = program("record")
    table = record.Table("squares", "command", "about", folder=tmp_path)
    table.row({"number": 2}, lambda: {"square": 4})
    jobs = [record.Job("late", (square, 5), "3"), *(record.Job(str(n), (square, n)) for n in (2, 3, -1)),
            record.Job("never", (square, 7), "-1")]  # fmt: skip
    with pytest.raises(ValueError, match="-1 is negative"):  # the others are done before it is raised
        record.side_by_side(table, jobs)
    rows = json.loads((tmp_path / "squares.json").read_text())["rows"]
    assert [(row["number"], row["square"]) for row in rows] == [(2, 4), (3, 9), (5, 25)]
    assert all(row["device"] and row["date"] for row in rows) and rows[1]["process"] != os.getpid()
    record.side_by_side(table, jobs[:1], until=0)  # no time: nothing more
    record.side_by_side(table, [record.Job("here", (square, 6))], workers=0)
    assert table.content["rows"][-1]["process"] == os.getpid() and len(table.content["rows"]) == 4


@pytest.mark.skipif(
    not (ROOT / "data/cache/minilm/model.safetensors").is_file(), reason="packs MiniLM: make data fetches it"
)
def test_what_is_packed_is_what_the_corpora_give(program, monkeypatch, tmp_path):
    accuracy, multitask = program("gpu_accuracy"), program("multitask")
    own = multitask.heads_and_rows
    for name in ("MODEL", "heads_and_rows"):
        monkeypatch.setattr(multitask, name, getattr(multitask, name))  # using a pack sets them
    folder = accuracy.pack(tmp_path / "pack")
    assert 40e6 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < accuracy.LIMIT
    accuracy.use(folder)
    for corpus in ("atis", "similarity"):
        (heads, rows), (found, packed) = own(corpus), multitask.heads_and_rows(corpus)
        assert heads == found and {s: len(part) for s, part in rows.items()} == {s: len(p) for s, p in packed.items()}
        assert packed["test"][7] == rows["test"][7] and packed["train"][11] == rows["train"][11]
    labels = [row["labels"] for row in packed["train"]]
    assert abs(statistics.fmean(labels)) < 1e-9 and statistics.stdev(labels) == pytest.approx(1)
    gap = program("ftlib").load_model(str(folder / "model")).get_input_embeddings().weight
    gap = gap - program("ftlib").load_model("minilm").get_input_embeddings().weight
    assert 0 < gap.abs().max() < 1e-3  # float16's rounding


def test_memory_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "memory.py", "--steps", "2")
    assert [row["method"] for row in rows] == ["unpad, micro-batches of 8, SGD"]
    assert rows[0]["peak_mb"] > 100 and rows[0]["seconds_a_step"] > 0 and 0.5 < rows[0]["loss"] < 0.9


@pytest.mark.skipif(
    not (ROOT / "data/cache/smollm2/model.safetensors").is_file(), reason="SmolLM2's tokenizer: make data fetches it"
)
def test_language_model_program_at_toy_size(program, monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="what ftlib is compared with")
    rows = toy(tmp_path, "language_model.py", "--part", "lora")
    search, found = ([row for row in rows if row["part"] == part] for part in ("lora, search", "lora"))
    assert [row["method"] for row in search] == ["TRL, no checkpointing, packing"] and search[0]["off_alone"] < 1e-3
    named = {row["method"]: row for row in found}
    loop, ours = named["plain loop, float32"], named["ftlib.fit, unpad, float32"]
    assert list(named) == ["TRL, as it comes", "TRL, best settings found", loop["method"], ours["method"]]
    assert loop["off_plain"] == 0 and loop["off_alone"] < 1e-5 and ours["off_plain"] < 1e-5
    assert named["TRL, as it comes"]["off_plain"] < 0.05  # bfloat16
    for row in found:
        assert row["peak_mb"] > row["above_mb"] > 0 and row["rounds"] == 1 and len(row["losses"]) == 2
        assert row["versions"]["trl"] and 60 < row["lengths"]["median"] < 200
        assert row["against"]["TRL, as it comes"]["median"] > 0
    report = program("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    [text] = report.language_models()
    assert "SmolLM2-135M, LoRA, 16 rows a step" in text and "| TRL, as it comes" in text and "| – " not in text


def test_the_fastest_settings_are_those_whose_loss_is_right(program):
    rows = [
        {"method": "leaks", "per_second": 9.0, "off_alone": 1.5},
        {"method": "packs", "per_second": 5.0, "off_alone": 1e-3},
        {"method": "pads", "per_second": 4.0},
        {"method": "more", "per_second": 6.0},
        {"method": "no", "missing": "why"},
    ]
    assert program("language_model").fastest(rows) == ["more", "packs", "pads"]


def test_a_process_that_dies_is_a_row_and_the_others_go_on(program, monkeypatch, tmp_path):
    language_model = program("language_model")
    script = tmp_path / "way.py"
    script.write_text(
        "import json, os, sys\nname = sys.argv[sys.argv.index('--serve') + 1]\n"
        "say = lambda **what: print('@' + json.dumps(what), flush=True)\nsay(ready=True)\n"
        "if name == 'dies at once': os.kill(os.getpid(), 9)\n"
        "for i in (1, 2):\n    sys.stdin.readline()\n"
        "    if name == 'refuses': sys.exit('no such setting')\n"
        "    say(seconds=2.0 / i, loss=1.0, tokens=10, trained=5)\nsay(alone=1.5, peak_mb=3.0, above_mb=1.0)\n"
    )
    monkeypatch.setattr(language_model, "__file__", str(script))
    names = {"dies at once": {}, "TRL, as it comes": {}, "refuses": {"packing": True}}
    dead, good, refused = language_model.compared("lora", names, 1, True)
    assert dead == {"method": "dies at once", "missing": "ended with -9: killed, as where memory runs out"}
    assert refused["missing"] == "ended with 1: no such setting"
    assert (good["per_second"], good["off_alone"], good["peak_mb"]) == (10.0, 0.5, 3.0)


def test_an_answer_has_the_words_of_every_slot(program):
    answer = program("language_model").answer
    tags = ["O", "B-city", "I-city", "B-day", "I-day"]
    row = {"tokens": "to new york or boston on monday".split(), "tags": [0, 1, 2, 0, 1, 0, 3], "intent": 1}
    said = json.loads(answer(row, tags, ["fare", "flight"]))
    assert said == {"intent": "flight", "slots": {"city": ["new york", "boston"], "day": "monday"}}


def test_slots_of_an_answer_are_counted_by_pairs(program):
    atis = program("atis_json")
    tags = ["O", "B-city", "I-city", "B-day"]
    row = {"tokens": "to new york or boston on monday".split(), "tags": [0, 1, 2, 0, 1, 0, 3]}
    wanted = atis.slots(row, tags)
    assert wanted == {"city": ["new york", "boston"], "day": "monday"}
    said = 'Here: {"city": ["boston", "york"], "day": "monday"} and more'
    assert atis.scores([said], [wanted]) == {"valid": 0.0, "exact": 0.0, "f1": 4 / 6}  # 2 of 3 said, 2 of 3 wanted
    assert atis.scores([json.dumps(wanted), "none"], [wanted, {"day": "friday"}]) == {
        "valid": 0.5, "exact": 0.5, "f1": 6 / 7,
    }  # fmt: skip
    assert atis.read('["a"]') is None and atis.read("{'a': 1}") is None


@pytest.mark.skipif(
    not (ROOT / "data/cache/smollm2/model.safetensors").is_file(), reason="SmolLM2's weights: make data fetches them"
)
def test_atis_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "atis_json.py")
    assert {row["part"] for row in rows} == {
        "prompts", "rates", "general", "lora", "nearest", "copy", "few-shot", "tagger rates", "tagger", "longer",
    }  # fmt: skip
    assert all(0 <= row["f1"] <= 1 for row in rows if row["part"] != "general")
    changed = [row["general"] for row in rows if row["part"] in ("general", "lora")]
    assert 0.5 < changed[0] < 3 and 0 < abs(changed[1] - changed[0]) < 0.1  # bits a byte; two steps


def test_tagging_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "tagging.py")
    assert {row["part"] for row in rows} == {
        "dictionary", "counts", "tagger rates", "tagger", "relation rates", "relations", "words", "pos rates", "pos",
        "whole",
    }  # fmt: skip
    assert {row["way"] for row in rows if row["part"] == "tagger"} == {"first", "all", "crf"}
    assert all(0 <= row.get("f1", row.get("accuracy")) <= 1 for row in rows)


def test_smaller_program_at_toy_size(tmp_path, program):
    pytest.importorskip("onnxruntime.transformers", reason="one way is ONNX Runtime's; pip install onnx onnxruntime")
    rows, smaller = toy(tmp_path, "smaller.py"), program("smaller")
    assert [row["way"] for row in rows if row["part"] == "accuracy"] == [*smaller.WAYS]
    assert {row["way"] for row in rows if row["part"] == "rates"} == {*smaller.TRAINED}
    assert {row["way"] for row in rows if row["part"] == "before"} == {*smaller.PRUNED}
    assert all(0 <= row["accuracy"] <= 1 for row in rows if row["part"] != "speed")
    speed = {row["way"]: row for row in rows if row["part"] == "speed"}
    assert [*speed] == [*smaller.WAYS] and all(0 < row["p50_ms"] <= row["p99_ms"] for row in speed.values())
    sizes = {way: round(row.get("mb_without_words", 0), 1) for way, row in speed.items()}
    # MiniLM's 6 layers have 10.6 million weights in them and 0.4 million around them
    assert sizes["6 layers"] == 41.9 and sizes["3 layers"] == sizes["3 layers, distilled"] == 21.6
    assert sizes["int8 weights"] == sizes["int8 dynamic"] and 11.5 < sizes["int8 weights"] < 12.5
    assert abs(sizes["torch.ao int8 dynamic"] - sizes["int8 weights"]) < 0.6  # it rounds the head as well
    assert sizes["4-bit weights"] < 8 and speed["int8 weights and words"]["mb"] < 25 < speed["int8 weights"]["mb"]
    assert sizes["half of the neurons out"] < 28.5 and sizes["both out"] < sizes["a third of the heads out"] < 38
    again = toy(tmp_path, "smaller.py")  # all is there
    assert again == rows


def test_what_the_tagging_program_looks_up(program):
    """The longest run of words that training marked, by its most frequent type; F1 by hand."""
    tagging = program("tagging")
    text = "salt or rock salt"
    words = {"tokens": text.split(), "starts": [0, 5, 8, 13]}
    marks = [(0, 4, "Chemical"), (8, 17, "Disease")]
    known = words | {"entities": [dict(zip(("start", "end", "label"), mark, strict=True)) for mark in marks]}
    asked = {"tokens": "Rock salt , salt or rock".split(), "starts": [0, 5, 10, 12, 17, 20]}
    [found] = tagging.looked_up([known], [asked])
    assert found == {(0, 9, "Disease"), (12, 16, "Chemical")}
    scores = tagging.by_type([found], [{(0, 9, "Disease"), (12, 16, "Disease"), (20, 24, "Chemical")}])
    assert scores["f1"] == pytest.approx(2 / 5) and scores["Disease"] == pytest.approx(2 / 3)
    assert scores["Chemical"] == 0
    assert tagging.best_threshold(np.array([0.9, 0.2, 0.6, 0.1]), np.array([1, 1, 0, 0])) == 0.2  # F1 4/5, not 2/3


def test_pairs_of_an_abstract(program):
    """The nearest mentions, in one sentence where there is one; an identifier of several counts for each."""
    text = "Fever after zinc. Zinc was given. Pain or fever came with zinc."
    marks = [("Fever", 0, "Disease", "F"), ("zinc", 12, "Chemical", "Z"), ("Zinc", 18, "Chemical", "Z|Y"),
             ("Pain", 34, "Disease", "-1"), ("fever", 42, "Disease", "F"), ("zinc", 58, "Chemical", "Z")]  # fmt: skip
    entities = [{"start": s, "end": s + len(w), "label": kind, "identifier": own} for w, s, kind, own in marks]
    row = {"text": text, "entities": entities, "relations": [{"chemical": "Z", "disease": "F"}]}
    found = {tuple(pair["counts"]): pair for pair in program("tagging").pairs_of(row)}
    zinc, other = found[3, 2, 2, 0, 1, 1], found[1, 2, 0, 1, 0, 1]  # mentions, sentences with both, distance, in title
    assert len(found) == 2 and (zinc["label"], other["label"]) == (1, 0) and zinc["one"] and not other["one"]
    for pair, said in ((zinc, ["zinc", "Fever"]), (other, ["Zinc", "Fever"])):
        assert [pair["text"][a:b] for a, b in pair["spans"]] == said
    assert other["text"] == "Fever after zinc. Zinc was given. "


@pytest.mark.skipif(
    not (ROOT / "data/cache/smollm2/model.safetensors").is_file(), reason="SmolLM2's weights: make data fetches them"
)
def test_answers_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "answers.py")
    assert {row["part"] for row in rows} == {"retrieval", "rates", "reader", "prompts", "chat", "longer"}
    assert {row["way"] for row in rows if row["part"] in ("reader", "longer")} == {"answerable", "all"}


def test_thresholds_of_the_answers_program(program):
    answers = program("answers")
    doubts, said, empty = np.array([3.0, -1.0, 0.0]), np.array([0.5, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])
    assert answers.by_share(doubts, said, empty) == pytest.approx(np.array([1, 2, 1, 1.5]) / 3)
    assert answers.best_threshold(doubts, said, empty) == -0.5  # between the surest and the next
    similar = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    found = answers.recall(similar, np.array([2, 2]))
    assert (found["recall_1"], found["recall_3"]) == (0.0, 1.0)
    rows = [{"answers": {"text": ["Rome"]}}, {"answers": {"text": []}}, {"answers": {"text": ["1990", "in 1990"]}}]
    assert answers.holding(["It was rome.", "x y", "1991"], rows) == {"holds": 0.5, "words": 2.0}


@pytest.mark.skipif(
    not (ROOT / "data/cache/flan-t5-titles/tokenizer.json").is_file(), reason="T5's tokenizer: make data fetches it"
)
def test_titles_and_french_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "seq2seq.py")
    found = {name: [row["way"] for row in rows if row["part"] == name] for name in ("titles", "french", "opus")}
    assert found == {
        "titles": ["as it comes", "first sentence", "first words", "4", "8", "8, LoRA"],
        "french": ["as it comes", "the English sentence", "4", "8"],
        "opus": ["as it comes", "4", "8"],
    }  # fmt: skip
    searched = [(row["part"], row["way"]) for row in rows if row["part"].endswith("rates")]
    assert searched == [(f"{name}, rates", way) for name in found for way in found[name] if way[0] in "48"]
    for row in rows:
        assert len(row["each"]) == (2 if row["part"].endswith("rates") else 3)
        assert 0 <= row["score"] <= (1 if "titles" in row["part"] else 100)
        assert ("address" in row) == ("titles" not in row["part"])
    first = next(row for row in rows if row["way"] == "first sentence")
    assert first["score"] == pytest.approx(statistics.mean(first["each"]), abs=1e-4) and first["score"] > 0.05


def test_what_costs_nothing_beside_trained_titles(program, monkeypatch):
    seq2seq = program("seq2seq")
    assert seq2seq.first_sentence("Is it so? It is. No.", 3) == "Is it so?"
    assert seq2seq.first_words("one two three four", 3) == "one two three"
    part = seq2seq.PARTS["titles"]
    found = seq2seq.scored(part, ["a dog barks", "no"], [{"target": "the dog barks"}, {"target": "a cat"}])
    assert found["each"] == [0.6667, 0] and found["score"] == pytest.approx(1 / 3) and found["words"] == 2
    texts = ["Vous venez, et vos amis ?", "Que t'a-t-il dit ? Tes mots.", "Viens avec toi et vous.", "A-t-il mangé ?"]
    assert seq2seq.address(texts) == {"vous": 0.5, "tu": 0.5}
    rows = [{"target": text} for text in texts]
    french = seq2seq.scored(seq2seq.PARTS["opus"], [*texts[:2], "?", "A-t-il mangé ?"], rows)
    assert french["others"] > 99.9 > french["score"] and french["address"]["vous"] == 0.25
    french = seq2seq.rows_of("french", "test", 5, 0)
    assert all(len(row["source"].split()) <= 7 for row in french) and len(french) == 5
    monkeypatch.setenv("FTLIB_DATA", "/nowhere")
    assert seq2seq.lacking("titles") is None and "data fetch opus-mt-en-fr" in seq2seq.lacking("opus")
    assert "Êtes-vous là ?".translate(seq2seq.PARTS["french"].letters) == "Etes-vous là ?"


@pytest.mark.skipif(
    not (ROOT / "data/cache/minilm/tokenizer.json").is_file(), reason="MiniLM's tokenizer: make data fetches it"
)
def test_generalizing_program_at_toy_size(tmp_path, program):
    rows, generalizing = toy(tmp_path, "generalizing.py"), program("generalizing")
    of = {part: [row for row in rows if row["part"] == part] for part in ("masked words", "search", "test")}
    remedies = {(way, 8) for way in (*generalizing.REMEDIES, "together")}
    changed = {(way, count) for way in generalizing.AUGMENTED for count in (4, 8)}
    assert {(row["way"], row["count"]) for row in of["test"]} == changed | remedies and len(of["test"]) == 17
    assert {(row["way"], row["count"]) for row in of["search"]} == {
        one for one in changed | remedies if one[0] not in generalizing.RATE_OF
    }
    for way, (_, strengths) in generalizing.REMEDIES.items():
        tried = {row["strength"]: row["cooled_loss"] for row in of["search"] if row["way"] == way}
        [row] = [row for row in of["test"] if row["way"] == way]
        assert {*tried} == {*strengths[:2]} and row["strength"] == min(tried, key=tried.get)
    for row in of["search"] + of["test"]:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["cooled_error"] <= 1 and 0 < row["cooled_loss"] < 1
    [masked] = of["masked words"]
    assert 5 < masked["loss"] < 15 and (tmp_path / "masked/config.json").is_file()
    assert toy(tmp_path, "generalizing.py") == rows  # it resumes: nothing is measured twice


def test_what_generalizing_trains_on_and_with(program):
    generalizing = program("generalizing")
    plain, swapped = (generalizing.training_rows(ROOT, way, 50, 3)["input_ids"][:] for way in ("nothing", "swap"))
    assert len(plain) == 50 and len(swapped) == 50 * 9 and swapped[:50] == plain
    assert all(sorted(copy) == sorted(plain[i // 8]) for i, copy in enumerate(swapped[50:]))  # words change places
    assert generalizing.training_rows(ROOT, "nothing", 500, 3)["input_ids"][:50] == plain
    off = {"dropout": 0.0, "weight_decay": 0.0}
    assert generalizing.settings("mixup", None) == generalizing.settings("nothing", None) == off
    assert generalizing.settings("weight decay", 10.0) == off | {"weight_decay": 10.0}
    assert generalizing.settings("R-Drop", 4.0) == off | {"dropout": 0.1, "r_drop": 4.0}
    assert generalizing.settings("together", 0.1).keys() == off.keys() | {"l1", "label_smoothing", "r_drop", "mixout"}
    logits, labels = np.array([[0.0, np.log(9)], [np.log(9), 0.0]]), np.array([1, 1])  # sure 0.9, right of two one
    assert generalizing.losses(logits, labels) == pytest.approx((-(np.log(0.9) + np.log(0.1)) / 2, 0.4))
    assert generalizing.losses(logits, labels, 2.0) == pytest.approx((-(np.log(0.75) + np.log(0.25)) / 2, 0.25))
    assert generalizing.best_temperature(logits, labels) == 1e6  # no better than chance
    assert generalizing.losses(logits, labels, 1e6) == pytest.approx((np.log(2), 0.0), abs=1e-5)


@pytest.mark.skipif(
    not (ROOT / "data/cache/flan-t5-titles/tokenizer.json").is_file(), reason="T5's tokenizer: make data fetches it"
)
def test_pretraining_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "pretraining.py")
    three = ["PubMed", "WikiText-2", "MiniLM"]
    expected = {"heads": ["counts", "random"], "going on": three[:2], "films": three, "names": three, "spans": ["T5"]}
    of = {part: [row for row in rows if row["part"] == part] for part in (*expected, "start")}
    assert {part: [row["way"] for row in own] for part, own in of.items() if part != "start"} == expected
    searched = {part: [row["way"] for row in rows if row["part"] == f"{part}, rates"] for part in expected}
    assert searched == expected | {"going on": ["PubMed"]}  # the control takes its rate
    for row in of["going on"]:
        assert row["loss"] == row[row["way"]] and all(8 < row[text] < 13 for text in ("PubMed", "WikiText-2"))
    assert of["going on"][0]["PubMed"] != of["going on"][1]["PubMed"] != of["start"][0]["PubMed"]
    assert all(0 <= row["score"] <= 1 for part in ("films", "names") for row in of[part])
    assert all(row["loss"] != row["before"] for part in ("heads", "spans") for row in of[part])
    assert toy(tmp_path, "pretraining.py") == rows  # it resumes


def test_an_encoder_goes_over_to_a_task_as_a_whole(program, monkeypatch):
    pretraining, seen = program("pretraining"), {}
    for name, value in pretraining.TOY.items():
        monkeypatch.setattr(pretraining, name, value)

    def fitted(model, *args, **options):
        seen.update({key: value.clone() for key, value in model.bert.state_dict().items()})
        return 0.0

    monkeypatch.setattr(pretraining, "fitted", fitted)
    weights = pretraining.model_for("masked-lm", seed=7).bert.state_dict()
    pretraining.downstream("films", weights, 0, "validation", 1e-3)
    assert all(torch.equal(seen[key], value) for key, value in weights.items()) and len(seen) == len(weights) + 2
    with pytest.raises(AssertionError, match="not all of the encoder"):
        left = {key: value for key, value in weights.items() if "layer.1" not in key}
        pretraining.downstream("films", left, 0, "validation", 1e-3)


def test_scaling_program_at_toy_size(tmp_path, program, monkeypatch):
    rows, scaling = toy(tmp_path, "scaling.py"), program("scaling")
    found = {(row["width"], row["updates"], row["seed"]): row for row in rows if row["part"] == "loss"}
    assert found.keys() == {(width, updates, 0) for width in (32, 64) for updates in (1, 2)} | {(32, 2, 1)}
    size = 512 * 32 + 4 * 32 * 32 + 3 * 32 * 96 + 3 * 32  # words; attention; three products; norms
    assert (found[32, 2, 0]["parameters"], found[32, 2, 0]["tokens"]) == (size, 2 * 2 * 64)
    assert found[32, 2, 0]["operations"] == 6 * size * 256 and found[32, 2, 0]["loss"] != found[32, 2, 1]["loss"]
    assert all(5 < row["loss"] < 8 for row in found.values())  # an even guess: 6.24
    assert toy(tmp_path, "scaling.py") == rows
    monkeypatch.setattr(scaling, "searched", lambda table, width, layers: {32: 8e-3, 128: 2e-3}[width])
    assert [scaling.rate_for(None, width) for width in (32, 64, 128)] == [8e-3, 4e-3, 2e-3]


@pytest.mark.skipif(
    not (ROOT / "data/cache/albert-tiny-zh/config.json").is_file(), reason="ALBERT's tokenizer: make data fetches it"
)
def test_another_language_program_at_toy_size(tmp_path, program):
    rows, chinese = toy(tmp_path, "another_language.py"), program("another_language")
    searched, tests = ([row for row in rows if row["part"] == part] for part in ("search", "test"))
    assert [row["way"] for row in tests] == [*chinese.WAYS] and all(0 <= row["accuracy"] <= 1 for row in rows)
    for row in tests:
        own = [one for one in searched if one["way"] == row["way"]]
        best = max(own, key=lambda one: one["accuracy"])
        assert len(own) == (2 if "ALBERT" in row["way"] else 5)
        assert all(best[name] == row[name] for name in ("epochs", "rate", "C") if name in best)
    assert toy(tmp_path, "another_language.py") == rows
    traditional, simplified = (chinese.reviews(script)["test"][0] for script in ("Traditional", "as they come"))
    assert traditional != simplified and [*map(len, traditional)] == [*map(len, simplified)]
    order = np.random.default_rng(3).permutation(5565)  # as the notebook draws them
    assert chinese.drawn(3) == order[:640].tolist()


def made_up(part, means, **beside):
    """Rows of five seeds; values are off by the same from a mean, so that what differs is told at once."""
    off = (-0.02, -0.01, 0.0, 0.01, 0.021)
    return [{"part": part, "way": way, "seed": seed, "rate": 1e-4, "steps": 10, **beside,
             **{key: mean + gap * (1 + 0.1 * place) for key, mean in own.items()}}
            for place, (way, own) in enumerate(means.items()) for seed, gap in enumerate(off)]  # fmt: skip


def cells(table, first):
    """The cells of the line that begins so."""
    [line] = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.fixture
def made_up_report(program, monkeypatch):
    def given(rows):
        report = program("report")
        monkeypatch.setattr(report, "rows_of", lambda name, **wanted: report.chosen(rows, **wanted))
        monkeypatch.setattr(report, "source", lambda name: "stamp")
        return report

    return given


def test_tables_of_few_labels(made_up_report):
    """The names alone are one number; fine-tuning loses on 2 and gains on 64; entropy buys worse labels than chance."""
    off, rows = (-0.02, -0.01, 0.0, 0.01, 0.021), []
    known = {("zero-shot", 0): 0.7, ("probe", 2): 0.6, ("fine-tuning", 2): 0.5, ("probe", 64): 0.7}
    for place, ((way, shots), mean) in enumerate([*known.items(), (("fine-tuning", 64), 0.8)]):
        rows += [{"part": "accuracy", "corpus": corpus, "method": way, "shots": shots, "seed": seed,
                  "accuracy": mean + gap * (1 + 0.1 * place)}
                 for corpus in ("rotten-tomatoes", "banking77")
                 for seed, gap in enumerate(off if shots else off[:1])]  # fmt: skip
    rows += [{"part": "new intents", "method": way, "seed": seed, "1": mean + gap, "5": 0.9 + gap}
             for way, mean in (("prototypes", 0.8), ("maml", 0.7)) for seed, gap in enumerate((0, 0.01, 0.02))]
    rows += [{"part": "active", "corpus": corpus, "how": how, "seed": seed, "labels": [10, 20], "accuracy": [0.1, mean]}
             for corpus in ("rotten-tomatoes", "banking77") for how, mean in (("random", 0.6), ("entropy", 0.5))
             for seed in range(3)]  # fmt: skip
    text = made_up_report(rows).few_labels()
    films, others = text.split("| bank intents ")[0], text.split("Twenty of clinc150's")[1]
    assert cells(films, "zero-shot")[0] == "0.680" and cells(films, "zero-shot")[1:] == [""] * 6
    tuned = cells(films, "fine-tuning")
    assert tuned[1].startswith("0.500") and tuned[6].startswith("0.800") and tuned[1][-1] + tuned[6][-1] == "↓↑"
    assert cells(others, "maml") == ["0.710 ± 0.010 ↓", "0.910 ± 0.010"] and "↓" in others.split("| entropy ")[1][:40]


def test_tables_of_generalizing(made_up_report):
    """Deletion gains at 50 labels and nothing at 500; L1 lowers the loss, and what a temperature leaves not."""

    def scores(accuracy, loss=0.9):
        return {"accuracy": accuracy, "loss": loss, "cooled_loss": 0.5, "error": loss / 9, "cooled_error": 0.03}

    rows = made_up("test", {"nothing": scores(0.6), "deletion": scores(0.65)}, count=50, strength=None, batch=16)
    rows += made_up("test", {"nothing": scores(0.7), "deletion": scores(0.7)}, count=500, strength=None, batch=16)
    rows += made_up("test", {"L1": scores(0.7, loss=0.6)}, count=500, strength=0.5, batch=16)
    text = made_up_report([*rows, {"part": "masked words", "loss": 6.25}]).generalizing()
    more, held = text.split("**What holds a model back**")
    assert cells(more, "deletion") == ["0.650 ± 0.018 ↑", "+0.050 ± 0.002 ↑", "0.500 ± 0.018", "0.700 ± 0.018",
                                       "+0.000 ± 0.002", "0.500 ± 0.018"]  # fmt: skip
    assert cells(more, "nothing")[:2] == ["0.600 ± 0.016", ""] and "L1" not in more and "deletion" not in held
    assert cells(held, "L1")[:4] == ["0.5", "0.0001", "0.700 ± 0.016", "+0.000 ± 0.000"]
    assert cells(held, "L1")[4] == "0.600 ± 0.016 ↓" and cells(held, "L1")[5] == "0.500 ± 0.016"
    assert "500 labels" in held and "10 of 16 on 50, 10 of 16 on 500;" in more and "of loss 6.25" in more


def test_tables_of_pretraining(made_up_report):
    """PubMed's loss falls below the control's; names gain against the control, and lose against MiniLM as it comes."""
    rows = made_up("heads", {"random": {"before": 10.6, "loss": 7.5, "accuracy": 0.1},
                             "counts": {"before": 7.8, "loss": 6.6, "accuracy": 0.1}})  # fmt: skip
    gone = {"WikiText-2": {"PubMed": 6.5, "WikiText-2": 6.0}, "PubMed": {"PubMed": 5.5, "WikiText-2": 6.0}}
    rows += made_up("going on", gone)
    rows += made_up("films", {way: {"score": 0.7} for way in ("WikiText-2", "PubMed", "MiniLM")})
    rows += made_up("names", {"WikiText-2": {"score": 0.4}, "PubMed": {"score": 0.5}, "MiniLM": {"score": 0.6}})
    rows += made_up("spans", {"T5": {"before": 17.0, "loss": 5.0}})
    text = made_up_report([*rows, {"part": "start", "PubMed": 7.25, "WikiText-2": 6.75}]).pretraining()
    heads, on, tasks = text.split("**Going on")[0], *text.split("**Going on")[1].split("What tasks have")
    assert cells(heads, "counts") == ["7.800 ± 0.018 ↓", "6.600 ± 0.018 ↓", "-0.900 ± 0.002 ↓", "0.100 ± 0.018"]
    assert cells(on, "the common start") == ["7.250", "", "6.750", ""]
    assert cells(on, "PubMed") == ["5.500 ± 0.018 ↓", "-1.000 ± 0.002 ↓", "6.000 ± 0.018", "+0.000 ± 0.002"]
    films, names = cells(tasks, "PubMed")[:3], cells(tasks, "PubMed")[3:]
    assert films[1:] == ["+0.000 ± 0.002", "-0.000 ± 0.002"]
    assert names[1:] == ["+0.100 ± 0.002 ↑", "-0.100 ± 0.002 ↓"]
    assert cells(tasks, "MiniLM")[2] == "" and cells(tasks, "WikiText-2")[1] == ""
    assert "falls from 16.98 to 5.00 ± 0.02 (-12.000 ± 0.000 ↓, 5 seeds)" in tasks


def test_tables_of_scaling_and_of_another_language(made_up_report):
    runs = ((32, 1024, 5.0, 0), (32, 2048, 4.0, 0), (32, 2048, 4.0, 1), (64, 1024, 4.5, 0))
    rows = [{"part": "loss", "width": width, "layers": 2, "seed": seed, "rate": 0.004, "parameters": 1000 * width,
             "tokens": tokens, "loss": loss + seed / 10} for width, tokens, loss, seed in runs]  # fmt: skip
    text = made_up_report(rows).scaling()
    assert cells(text, "32 × 2") == ["32,000", "0.004", "5.000", "4.000", "3.9e+08"]
    assert cells(text, "64 × 2")[2:4] == ["4.500", "–"]
    assert "2 seeds of the smallest at the most tokens have 4.050" in text
    means = {"counting, whole": 0.86, "counting, first 62": 0.82, "ALBERT, first 62": 0.82, "ALBERT, first 254": 0.8}
    rows = made_up("test", {way: {"accuracy": mean} for way, mean in means.items()}, epochs=4)
    text = made_up_report(rows).another_language()
    first = cells(text, "ALBERT, first 62")
    assert first[0] == "epochs 4, rate 0.0001" and first[2:] == ["-0.040 ± 0.004 ↓", "+0.000 ± 0.002"]
    assert cells(text, "ALBERT, first 254")[3] == ""  # counting on as much is on its way
    assert cells(text, "counting, whole")[1:] == ["0.860 ± 0.016", "", ""]


def test_every_remedy_trains(program):
    memory = program("memory")
    losses = {name: memory.one(name, steps=2, toy=True)["loss"] for name in memory.REMEDIES}
    full = losses["full fine-tuning, float32"]
    assert losses["gradient checkpointing"] == pytest.approx(full, abs=1e-5)  # the same step, dropout included
    assert all(abs(loss - full) < 0.1 for loss in losses.values()), losses


def test_profile_program_at_toy_size(tmp_path):
    rows = toy(tmp_path, "step_profile.py", "--steps", "2")
    methods = ["ftlib.fit without shortcuts, unpad", "ftlib.fit, unpad, fp32", "ftlib.fit", "ftlib.fit, unpad"]
    assert [row["method"] for row in rows] == methods[0 if not torch.cuda.is_available() else 2 :]
    for row in rows:
        assert row["groups"]["matrix products"] > 0 and row["groups"]["optimizer and clipping"] > 0
        assert sum(row["groups"].values()) == pytest.approx(row["profiled_seconds_a_step"], rel=0.3)


def test_arrows_show_what_differs_from_the_base(program):
    rows = [
        {"way": way, "seed": seed, "value": value}
        for way, values in {"base": (1, 2, 3), "up": (2.1, 3, 4.1), "odd": (0, 4, 2), "part": (9,)}.items()
        for seed, value in reversed([*enumerate(values)])
    ]
    report = program("report")
    runs = report.runs_of(rows, "way", lambda row: row["value"])
    assert runs["up"] == [2.1, 3, 4.1]
    shown = report.compared(runs, "base")
    assert shown == {"base": "2.000 ± 1.000", "up": "3.067 ± 1.002 ↑", "odd": "2.000 ± 2.000"}  # "part" is on its way


def test_tables_of_several_tasks(program, monkeypatch):
    """Numbers by hand: b loses with every partner, seed by seed; of the methods only "far" differs."""
    off, report = (-0.001, 0.0, 0.001), program("report")

    def ways(part, means):
        return [{"part": part, "way": way, "seed": seed, "rate": 1e-4, "steps": 10, "mean": sum(scores.values()),
                 "scores": {task: score + gap * (1 + len(way)) for task, score in scores.items()}}
                for way, scores in means.items() for seed, gap in enumerate(off)]  # fmt: skip

    alone = {way: {task: 0.5} for task in "abc" for way in (task, f"{task}, half batches", f"{task}, twice as long")}
    pairs = {"a+b": {"a": 0.5, "b": 0.3}, "a+c": {"a": 0.5, "c": 0.5}, "b+c": {"b": 0.3, "c": 0.5}}
    atis = {"intent": {"intent": 0.9}, "slots": {"slots": 0.9}, "intent+slots": {"intent": 0.9, "slots": 0.8}}
    methods = {how: dict.fromkeys("abc", 0.2 if how == "far" else 0.5) for how in ("fixed", "near", "far")}
    rows = ways("transfer", alone | pairs) + ways("balancing", methods) + ways("atis", atis)
    monkeypatch.setattr(report, "rows_of", lambda name, **wanted: report.chosen(rows, **wanted))
    monkeypatch.setattr(report, "source", lambda name: "stamp")
    monkeypatch.setattr(report, "TASKS", ("a", "b", "c"))

    def arrows(table, name):
        """What its cells end in, a dash for a tie or no cell."""
        [line] = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
        ends = [cell.rstrip()[-1:] for cell in line.split("|")[2:-1]]
        return "".join(end if end and end in "↑↓" else "-" for end in ends)

    assert [arrows(report.transfers(), task) for task in "abc"] == ["------", "---↓-↓", "------"]
    assert [arrows(report.balancing(), f"`{how}`") for how in ("fixed", "near", "far")] == ["----", "----", "↓↓↓↓"]
    assert arrows(report.multitask(), "both on one encoder")[:2] == "-↓" and "0.800 ± 0.013 ↓" in report.multitask()


def test_training_texts_of_every_class(program):
    labels = [0] * 50 + [1] * 30 + [2] * 20
    strategies = program("strategies")
    rows = strategies.chosen(labels, 30, seed=1)
    assert sorted(labels[row] for row in rows) == [0] * 10 + [1] * 10 + [2] * 10 and len(set(rows)) == 30
    assert rows == strategies.chosen(labels, 30, seed=1) != strategies.chosen(labels, 30, seed=2)


def test_a_rate_is_searched_with_two_seeds_until_it_is_inside(program, monkeypatch, tmp_path):
    strategies, record = program("strategies"), program("record")
    scores = {100: {5e-5: 0.8, 1.5e-4: 0.85, 5e-4: 0.9, 1.5e-3: 0.88}, 101: {1.5e-3: 0.9}}  # 100 alone: 5e-4

    def fit(model, rows, config):
        model.update(config)
        return SimpleNamespace(history=[{"loss": 1.0}], seconds=0.0)

    def evaluate(model, rows):
        return {"accuracy": scores.get(model["seed"], {}).get(model["learning_rate"], 0.5)}

    monkeypatch.setattr(strategies, "tuned", lambda *_: ({}, SimpleNamespace(trainable=1)))
    monkeypatch.setattr(strategies, "ftlib", SimpleNamespace(TrainConfig=dict, fit=fit, evaluate=evaluate))
    table = record.Table("rates", "command", "about", folder=tmp_path)
    tokens = {split: [{"labels": row % 2} for row in range(8)] for split in ("train", "validation", "test")}
    strategies.accuracies((0, 1), ["full"], tokens, table, {4: (2, 10, "fp32")})
    of = {part: [(row["rate"], row["seed"], row["steps"]) for row in table.content["rows"] if row["part"] == part]
          for part in ("rates", "twice", "accuracy")}  # fmt: skip
    assert {rate for rate, seed, _ in of["rates"] if seed == 100} == {5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3}
    assert {rate for rate, seed, _ in of["rates"] if seed == 101} == {1.5e-4, 5e-4, 1.5e-3} and len(of["rates"]) == 8
    assert of["twice"] == [(1.5e-3, 100, 20)] and of["accuracy"] == [(1.5e-3, 0, 10), (1.5e-3, 1, 10)]


def test_multitask_program_at_toy_size(program, monkeypatch, tmp_path):
    accuracy, multitask = program("gpu_accuracy"), program("multitask")
    for name in (*multitask.TOY, "heads_and_rows"):
        monkeypatch.setattr(multitask, name, getattr(multitask, name))  # using a pack sets them
    accuracy.toy(tmp_path)
    rows = json.loads((tmp_path / "multitask.json").read_text())["rows"]
    of = {part: [row for row in rows if row["part"] == part] for part in multitask.PARTS}
    assert {part: len(own) for part, own in of.items()} == {"transfer": 9 + 3, "atis": 3, "balancing": 9}
    for own in of.values():
        assert all(set(row["scores"]) and row["mean"] <= 1 for row in own)
    pairs = {row["way"]: row for row in of["transfer"] if "+" in row["way"]}
    assert pairs["sentiment+intents"]["scores"].keys() == {"sentiment", "intents"}
    steps = {row["way"]: row["steps"] for row in of["transfer"]}
    assert steps["intents, half batches"] == steps["intents, twice as long"] == 2 * steps["intents"]
    assert steps["sentiment+intents"] == 2 * steps["intents"]
    assert len({row["steps"] for row in of["atis"]}) == len({row["rate"] for row in of["balancing"]}) == 1
    monkeypatch.setattr(multitask, "train", None)
    with_all = multitask.table(tmp_path)
    program("record").side_by_side(with_all, multitask.jobs(), workers=0)  # the second time all rows are there
    assert with_all.content["rows"] == rows


def test_growth_program_at_toy_size(program, monkeypatch, tmp_path):
    options = ["--toy", "--steps", "1", "--rounds", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["task_growth.py", *options])
    program("task_growth").main()
    rows = json.loads((tmp_path / "task_growth.json").read_text())["rows"]
    assert [row["tasks"] for row in rows] == [0, 1, *[2] * 8]
    assert rows[0]["against_stock"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert all(row["seconds_a_step"]["median"] > 0 and row["peak_mb"] > 100 for row in rows)


def test_the_best_rate_is_inside_of_what_was_tried(program, tmp_path):
    record, asked = program("record"), []

    def measure(rate):
        asked.append(rate)
        return {"score": -abs(rate - 1.0)}

    table = record.Table("t", "", "", folder=tmp_path)
    given = {"part": "rates"}, (4.0, 8.0), measure, lambda row: row["score"]
    assert table.best_rate(*given) == 1.0 and asked == [4.0, 8.0, 2.0, 1.0, 0.5]
    assert table.best_rate(*given) == 1.0 and len(asked) == 5  # all rows are there
    assert table.best_rate({"part": "one"}, (4.0,), *given[2:]) == 4.0
