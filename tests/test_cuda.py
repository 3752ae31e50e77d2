"""What only a GPU can show: the CPU's numbers, half precision, memory that runs out, waits, torchrun with one process.

Needs no `datasets`.  `python tests/benchmarks/gpu_day.py --part 1` runs this file, and the tests with "cuda" or "gpu"
in their name that stand beside what they test.
"""

import copy
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fit import LABELS, make_rows, quick, same, steps, weights

from ftlib.core.device import choose_precision
from ftlib.engine import fit as training
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, predict
from ftlib.engine.saving import load, save
from ftlib.methods import packing
from ftlib.methods.features import extract_features
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HALF = [
    pytest.param("bf16", marks=pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA GPU with bf16 units (compute capability 8.0)",
    )),
    "fp16",
]  # fmt: skip
TESTS = Path(__file__).resolve().parent
START = f"""
import json, sys, torch
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "engine")!r}, {str(TESTS / "inputs")!r}, {str(TESTS.parent)!r}]
from conftest import make_tiny_model
from test_fit import make_rows, quick, same, steps, weights
from ftlib.engine.fit import fit
from ftlib.methods.unpadding import unpad
"""


def run_script(path: Path, code: str, *launcher: str, **environment: str) -> dict:
    """What a script of its own printed as JSON on its last line."""
    path.write_text(START + code)
    command = [sys.executable, *launcher, str(path), str(path.parent)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------- the CPU's numbers

CASES = {  # name: (task, what is done to the model, options)
    "plain": ("sequence-classification", None, {}),
    "adamw": ("sequence-classification", None, {"optimizer": "adamw"}),
    "unpadded": ("sequence-classification", unpad, {}),
    "tags": ("token-classification", unpad, {"micro_batch_size": 3}),
    "several labels": ("multi-label-classification", unpad, {"max_tokens": 20}),
    "numbers": ("regression", None, {"schedule": "cosine"}),
    "checkpointing": ("token-classification", unpad, {"gradient_checkpointing": True}),
    "smoothing, r-drop": ("sequence-classification", None, {"label_smoothing": 0.1, "r_drop": 1.0}),
    **{
        how: ("sequence-classification", lambda model, how=how: tune(unpad(model), how), {})
        for how in ("lora", "houlsby", "bitfit", "last-layers", "layer-decay", "l2-sp", "gradual-unfreezing")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_the_cpu(tiny_model, monkeypatch, name):
    task, change, options = CASES[name]
    rows, held_out = make_rows(14, task), make_rows(6, task, seed=1)
    runs, models = [], []
    for device in ("cuda", "cpu"):
        model = tiny_model(task, LABELS[task])
        if change:
            change(model)
        with monkeypatch.context() as patch:
            if device == "cpu":  # where a GPU is, `fit` takes it
                patch.setattr(training, "choose_device", lambda: torch.device("cpu"))
            config = quick(**{"optimizer": "sgd", "precision": "fp32"} | options)
            runs.append(fit(model, rows, eval_dataset=held_out, config=config))
        assert next(model.parameters()).device.type == device
        models.append(model)
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=1e-3 if name == "adamw" else 1e-4)
    assert steps(runs[0], "grad_norm") == pytest.approx(steps(runs[1], "grad_norm"), rel=1e-2)
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], abs=1e-3)
    assert 0 < runs[0].peak_memory_mb < 200  # tensors on the GPU, most of them cuBLAS' own; the process has some 1,000
    ours, theirs = (predict(model, held_out, output="logits") for model in models)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


METHODS = ("fixed", "uncertainty", "gradnorm", "dwa", "famo", "pcgrad", "cagrad", "mgda")


@pytest.mark.parametrize("method", METHODS)
def test_several_tasks_are_those_of_the_cpu(tiny_model, monkeypatch, method):
    kind = "task_weighting" if method in METHODS[:5] else "task_gradients"
    heads = {"a": Head(), "b": Head("token-classification", 3, weight=0.5)}
    data = {"a": make_rows(9), "b": make_rows(7, "token-classification")}
    runs = []
    for device in ("cuda", "cpu"):
        model = unpad(MultiTaskModel(tiny_model("encoder"), heads))
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(training, "choose_device", lambda: torch.device("cpu"))
            config = quick(optimizer="sgd", precision="fp32", **{kind: method})
            runs.append(fit(model, data, eval_dataset=data, config=config))
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), abs=1e-3)
    assert runs[0].metrics["a/loss"] == pytest.approx(runs[1].metrics["a/loss"], abs=1e-3)


def test_what_is_saved_on_a_gpu_is_the_same_elsewhere(tiny_model, tiny_tokenizer, tmp_path):
    model, rows = tiny_model(), make_rows(12)
    fit(model, rows, config=quick())
    expected = np.array(predict(model, rows, output="probabilities"))
    found = load(save(model, tmp_path / "model", tokenizer=tiny_tokenizer))
    model, _ = found if isinstance(found, tuple) else (found, None)
    np.testing.assert_allclose(np.array(predict(model.cpu(), rows, output="probabilities")), expected, atol=1e-5)


def test_unpadded_features_in_half_precision(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("FTLIB_PRECISION", raising=False)
    texts = ["the film is good and fun", "bad", "a great plot we book to boston", "dull film"] * 9
    model = tiny_model("encoder")
    expected = extract_features(model, texts, tokenizer=tiny_tokenizer)
    model = unpad(model).cuda()
    found = extract_features(model, texts, tokenizer=tiny_tokenizer, precision="auto")
    cosine = F.cosine_similarity(torch.tensor(found), torch.tensor(expected))
    assert cosine.min() > 0.999 and found.dtype == np.float32


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("precision", HALF)
def test_half_precision_stays_near_float32(tiny_model, monkeypatch, precision, unpadded):
    packed, attend = [], packing.attend_varlen
    monkeypatch.setattr(packing, "attend_varlen", lambda *args: packed.append(1) or attend(*args))
    rows, runs = make_rows(48, shortest=2), []
    for how in ("fp32", precision):
        model = tiny_model()
        if unpadded:
            unpad(model)
        runs.append(fit(model, rows, eval_dataset=rows, config=quick(precision=how, learning_rate=2e-3)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert runs[1].precision == precision and steps(runs[1]) != steps(runs[0])
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=0.03)
    assert runs[1].metrics["loss"] == pytest.approx(runs[0].metrics["loss"], abs=0.03)
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert bool(packed) == (unpadded and capable)  # and none of the float32 run: its count would be the same twice


def test_auto_is_the_best_this_gpu_has(tiny_model, monkeypatch):
    monkeypatch.delenv("FTLIB_PRECISION", raising=False)
    run = fit(tiny_model(), make_rows(8), config=quick())
    assert run.precision == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    assert (run.precision, run.reason) == choose_precision(torch.device("cuda", 0))


def test_the_fp16_scaler_leaves_out_what_overflows(tiny_model):
    """Losses a thousand times as large: 65,536 times that is no float16, so the scale falls first, then it learns."""
    model = tiny_model().cuda()
    before = weights(model)
    large = lambda logits, labels: 1e3 * F.cross_entropy(logits.float(), labels, reduction="sum")  # noqa: E731
    config = quick(epochs=12, precision="fp16", learning_rate=2e-3, warmup_fraction=0.0)
    run = fit(model, make_rows(16), config=config, loss=large)
    lengths = steps(run, "grad_norm")
    assert not np.isfinite(lengths[0]) and np.isfinite(lengths[-1])
    assert not any("skipped" in record for record in run.history)
    assert all(torch.isfinite(value).all() for value in weights(model).values()) and not same(weights(model), before)
    assert np.mean(steps(run)[-4:]) < np.mean(steps(run)[:4])


def test_a_step_that_is_not_finite_moves_nothing(tiny_model):
    calls = []

    def loss(logits, labels):
        calls.extend([1] * logits.requires_grad)  # of the steps, not of the checks before them
        factor = float("nan") if logits.requires_grad and len(calls) == 2 else 1.0
        return factor * F.cross_entropy(logits.float(), labels, reduction="sum")

    with pytest.warns(UserWarning, match="step 2"):
        run = fit(tiny_model(), make_rows(16), config=quick(precision="fp32"), loss=loss)
    assert [record["step"] for record in run.history if "skipped" in record] == [2]
    assert all(np.isfinite(value) for value in steps(run)[2:])


RESUMED = """
from ftlib.core.device import choose_device

torch.use_deterministic_algorithms(True)
rows, found = make_rows(16), {}
def stop(record):
    if record["step"] == 3:
        raise KeyboardInterrupt
for precision in ("fp32", "fp16", *(["bf16"] if torch.cuda.get_device_capability() >= (8, 0) else [])):
    for unpadded in (False, True):
        make = lambda: (unpad if unpadded else lambda m: m)(make_tiny_model(hidden_dropout_prob=0.3))
        options = dict(precision=precision, micro_batch_size=3)
        whole, folder = make(), f"{sys.argv[1]}/{precision}-{unpadded}"
        expected = fit(whole, rows, config=quick(**options))
        config = quick(**options, checkpoint_dir=folder, checkpoint_every=1, resume="auto")
        assert fit(make(), rows, config=config, on_record=stop).steps == 3
        model = make()
        run = fit(model, rows, config=config)
        found[f"{precision} {unpadded}"] = same(weights(model), weights(whole)) and steps(run) == steps(expected)
print(json.dumps(found))
"""


def test_resuming_is_exact_in_every_precision(tmp_path):
    """With deterministic settings, which are made before the GPU is first used; dropout draws on the GPU."""
    found = run_script(tmp_path / "resumed.py", RESUMED, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert len(found) >= 4 and all(found.values()), found


# ------------------------------------------------------------------------------------------------- memory


def test_memory_that_really_runs_out(tiny_model):
    """The allocator may have less than the whole step needs, and more than a quarter of it."""
    sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, max_position_embeddings=512)
    rows = make_rows(64, shortest=480, longest=512)

    def run(**options):
        torch.cuda.empty_cache()
        config = quick(epochs=1, batch_size=64, precision="fp32", optimizer="sgd", **options)
        return fit(tiny_model(**sizes), rows, config=config)

    small, whole = run(micro_batch_size=16), run()
    assert small.peak_memory_mb < 0.5 * whole.peak_memory_mb and small.micro_batch_size == 16
    limit = small.peak_memory_mb * 1.4 * 2**20
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(UserWarning, match="out of memory: the step is done again with micro_batch_size"):
            halved = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halved.micro_batch_size in (8, 16, 32) and halved.peak_memory_mb * 2**20 <= limit
    assert steps(halved) == pytest.approx(steps(whole), abs=1e-4)


def test_gradient_checkpointing_saves_memory_on_a_gpu(tiny_model):
    sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, max_position_embeddings=512)
    rows, runs = make_rows(16, shortest=256, longest=512), []
    for wanted in (False, True):
        model = tiny_model(hidden_dropout_prob=0.1, **sizes)
        config = quick(epochs=1, batch_size=16, precision="fp32", gradient_checkpointing=wanted)
        runs.append(fit(model, rows, config=config))
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-5)  # the same dropout when computed again
    assert runs[1].peak_memory_mb < 0.8 * runs[0].peak_memory_mb


# ------------------------------------------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("unpadded", "graphs"), [(False, False), (True, False), pytest.param(False, True, id="graphs")]
)
@pytest.mark.parametrize("precision", ["fp32", *HALF[:1]])
def test_fit_waits_for_the_gpu_once_a_step_at_most(tiny_model, precision, unpadded, graphs):
    def waits(count):
        model = tiny_model().cuda()
        if unpadded:
            unpad(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                config = quick(epochs=1, precision=precision, cuda_graphs=graphs)
                fit(model, make_rows(4 * count, shortest=2), config=config)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
        stock = [place for place in places if "masking_utils" in place]  # is there any padding? asks a stock model
        assert not (stock and unpadded)
        return [place for place in places if place not in stock]

    waits(2)  # what is set up once
    few, many = waits(4), waits(14)
    assert len(many) - len(few) <= 10, sorted(set(many))


# ------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("task", LABELS)
def test_graphs_take_the_steps_of_a_run_without(tiny_model, task, micro):
    rows, runs, models = make_rows(14, task, longest=37), [], [tiny_model(task, LABELS[task]) for _ in range(2)]
    for model in models:
        options = dict(precision="fp32", optimizer="sgd", micro_batch_size=micro, cuda_graphs=model is models[1])
        runs.append(fit(model, rows, eval_dataset=rows, config=quick(**options)))
    for key in ("loss", "grad_norm"):
        assert steps(runs[1], key) == pytest.approx(steps(runs[0], key), rel=1e-3, abs=1e-4)
    assert runs[1].metrics == pytest.approx(runs[0].metrics, abs=1e-3)
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(weights(models[1])[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("precision", HALF[:1])
def test_graphs_in_half_precision(tiny_model, precision):
    rows, options = make_rows(48, shortest=2, longest=37), dict(precision=precision, learning_rate=2e-3)
    runs = [fit(tiny_model(), rows, config=quick(cuda_graphs=on, **options)) for on in (False, True)]
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=0.03)


def test_dropout_in_graphs_draws_anew_each_step(tiny_model):
    config = quick(epochs=6, shuffle=False, precision="fp32", learning_rate=1e-9, cuda_graphs=True)
    runs = [fit(tiny_model(hidden_dropout_prob=0.5), make_rows(4), config=config) for _ in range(2)]
    assert len({round(loss, 4) for loss in steps(runs[0])}) > 3
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=1e-5)


GRAPHS = """
torch.use_deterministic_algorithms(True)
rows, found = make_rows(16, longest=37), {}
def stop(record):
    if record["step"] == 3:
        raise KeyboardInterrupt
make = lambda: make_tiny_model(hidden_dropout_prob=0.3)
options, whole = dict(precision="fp32", micro_batch_size=3, cuda_graphs=True), make()
expected = fit(whole, rows, config=quick(**options))
config = quick(**options, checkpoint_dir=sys.argv[1] + "/run", checkpoint_every=1, resume="auto")
fit(make(), rows, config=config, on_record=stop)
model = make()
run = fit(model, rows, config=config)
found["resumed"] = same(weights(model), weights(whole)) and steps(run) == steps(expected)
model = make()
hook = model.register_forward_hook(lambda module, args, out: [out, float(out.logits.detach().sum())][0])
try:
    fit(model, rows, config=quick(**options))
except RuntimeError as error:
    found["said"] = "asks the GPU for a number" in "".join(getattr(error, "__notes__", []))
hook.remove()
found["goes on"] = fit(make(), rows, config=quick(precision="fp32")).steps == 8
print(json.dumps(found))
"""


def test_graphs_that_are_resumed_and_that_fail(tmp_path):
    found = run_script(tmp_path / "graphs.py", GRAPHS, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert found == {"resumed": True, "said": True, "goes on": True}


# --------------------------------------------------------------------------------------- compiled, and in a group


@pytest.mark.parametrize("precision", HALF[:1])
def test_compiled_unpadded_layers_in_half_precision(tiny_model, precision):
    torch._dynamo.reset()
    rows, runs = make_rows(48, shortest=2, longest=37), []
    for how in (False, True):
        model = unpad(tiny_model().cuda())
        config = quick(compile=how, precision=precision, learning_rate=2e-3)
        runs.append(fit(model, rows, eval_dataset=rows, config=config))
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), abs=0.03)
    assert runs[1].metrics["loss"] == pytest.approx(runs[0].metrics["loss"], abs=0.03)


GROUP = """
from ftlib.core.batches import collate, to_device
from ftlib.core.device import choose_device
from ftlib.core.loop import steps as take, summed
from ftlib.engine import distributed

distributed.start()
device, rows, found = choose_device(), make_rows(24, "token-classification"), {}
batches = [[to_device(collate(rows[i : i + 4]), device)] for i in range(0, 24, 4)]
half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
for mode in ("alone", "ddp", "fsdp", "fsdp half"):
    model = make_tiny_model("token-classification", 3).to(device)
    alone = distributed.world_size
    distributed.world_size = (lambda: 2) if mode == "ddp" else alone  # a single process is not wrapped
    trained = distributed.wrap(model)
    distributed.world_size = alone
    if mode.startswith("fsdp"):
        trained = distributed.shard(model, device, half if "half" in mode else None)
    assert type(trained).__name__.startswith({"a": "Bert", "d": "Distributed", "f": "FSDP"}[mode[0]])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    found[mode] = [record["loss"] for record in take(trained, batches, optimizer, total=6, gradient=summed())]
for mode in ("ddp", "fsdp"):  # all that `fit` exchanges goes through the group of one
    options = dict(optimizer="sgd", precision="fp32", distributed=mode, checkpoint_every=2)
    config = quick(**options, checkpoint_dir=sys.argv[1] + "/" + mode)
    run = fit(make_tiny_model("token-classification", 3), rows, eval_dataset=rows, config=config)
    found[f"fit {mode}"] = steps(run)
distributed.stop()
print(json.dumps(found))
"""


def test_one_process_under_torchrun(tiny_model, tmp_path):
    """DDP's and FSDP2's own code on a GPU; that several processes agree is tested on CPUs, and on two GPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    alone = {"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    found = run_script(tmp_path / "group.py", GROUP, "-m", "torch.distributed.run", *where, **alone)
    for mode in ("ddp", "fsdp"):
        assert found[mode] == pytest.approx(found["alone"], abs=1e-5), mode
    assert found["fsdp half"] == pytest.approx(found["alone"], abs=0.05)
    rows = make_rows(24, "token-classification")
    config = quick(optimizer="sgd", precision="fp32")
    expected = steps(fit(tiny_model("token-classification", 3), rows, eval_dataset=rows, config=config))
    for mode in ("fit ddp", "fit fsdp"):
        assert found[mode] == pytest.approx(expected, abs=1e-5), mode


def test_evaluation_on_a_gpu_in_batches_of_any_size(tiny_model):
    model, rows = tiny_model("token-classification", 3), make_rows(33, "token-classification")
    expected = evaluate(copy.deepcopy(model), rows)
    for size in (1, 7, 64):
        assert evaluate(unpad(copy.deepcopy(model)).cuda(), rows, batch_size=size) == pytest.approx(expected, abs=1e-4)
