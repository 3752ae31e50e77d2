"""Two processes take the steps of one, whether each holds the model (ddp) or a share of it (fsdp)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_fit import make_rows, quick
from torch import nn
from torch.testing import assert_close

from ftlib.engine import distributed
from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate

TESTS = Path(__file__).resolve().parents[1]
START = f"""
import json, shutil, sys
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "engine")!r}, {str(TESTS / "inputs")!r}, {str(TESTS.parent)!r}]
import torch
torch.set_num_threads(1)
"""

SCRIPT = """
import peft
import torch.distributed as dist
from conftest import make_tiny_model
from test_fit import before_steps, make_rows, quick
from ftlib.engine import fit as training
from ftlib.engine import distributed
from ftlib.methods.multitask import Head, MultiTaskModel
from ftlib.engine.prediction import evaluate, logits_of, predict
from ftlib.engine.fit import fit
from ftlib.methods.tuning import STRATEGIES, tune
from ftlib.methods.unpadding import unpad

class Patch:
    setattr = staticmethod(setattr)


folder = Path(sys.argv[1])
out = {}
distributed.start()
world, rank = distributed.world_size(), distributed.rank()
sent = 0
send = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
real_send = getattr(dist, send)


def counted(*args, **options):
    global sent
    sent += 1
    return real_send(*args, **options)


setattr(dist, send, counted)


def record(name, model, run):
    history = [{k: v for k, v in r.items() if k not in ("seconds", "micro_batches")} for r in run.history]
    out[name] = [history, run.stopped]
    assert not any(hasattr(p, "full_tensor") for p in model.parameters()) and type(model).__name__[:4] != "FSDP"
    torch.save(model.state_dict(), folder / f"{world}-{rank}-{name}.pt")


# 13 rows, 4 a step: the last step has one row, so the second process has none
rows = make_rows(13, "token-classification")
held_out = make_rows(5, "token-classification", seed=9)
cases = {
    "plain": {}, "micro": dict(micro_batch_size=1), "tokens": dict(max_tokens=12), "adamw": dict(optimizer="adamw"),
    "clipped": dict(max_grad_norm=0.05),
    "stops": dict(epochs=30, patience=1, eval_every=1, learning_rate=0.1), "frozen": {}, "shared layers": {},
    "checkpointing": dict(gradient_checkpointing=True),
    "bf16": dict(precision="bf16"), "r-drop": dict(r_drop=1.0, micro_batch_size=2),
    "lora": {}, "prompt": {}, "gradual-unfreezing": {}, "l2-sp": {},
}
for mode in ("ddp", "fsdp")[:world]:
    for name, options in cases.items():
        kind = "albert" if name == "shared layers" else "bert"
        model = unpad(make_tiny_model("token-classification", 3, model_type=kind))
        if name == "frozen":
            tune(model, "head-only")
        elif name == "prompt":
            tune(model, peft.PromptTuningConfig(num_virtual_tokens=2))
        elif name in STRATEGIES:
            tune(model, name)
        if mode == "fsdp" and name in ("gradual-unfreezing", "l2-sp"):
            try:
                fit(model, rows, config=quick(distributed="fsdp"))
            except ValueError as error:
                out[f"fsdp {name}"] = str(error)
            continue
        config = quick(**{"warmup_fraction": 0.0, "optimizer": "sgd", "distributed": mode, **options})
        sent = 0
        run = fit(model, rows, eval_dataset=held_out if name in ("plain", "stops") else None, config=config)
        record(f"{mode} {name}", model, run)
        out[f"{mode} {name} sent"] = sent

heads = {"a": Head(), "b": Head("token-classification", 3, weight=0.5)}
data = {"a": make_rows(3), "b": make_rows(5, "token-classification")}
model = MultiTaskModel(make_tiny_model("encoder"), heads)
if world > 1:
    try:
        fit(model, data, config=quick(distributed="fsdp"))
    except ValueError as error:
        out["several heads"] = str(error)
record("ddp tasks", model, fit(model, data, config=quick(batch_size=3, optimizer="sgd", micro_batch_size=1)))
for name, options in {
    "pcgrad": dict(task_gradients="pcgrad", task_cosines=2), "cosines": dict(task_cosines=2),
    "uncertainty": dict(task_weighting="uncertainty"), "gradnorm": dict(task_weighting="gradnorm"),
    # not together: MGDA makes the losses fall alike, and FAMO learns from the difference, which is then rounding
    "famo": dict(task_weighting="famo"), "mgda": dict(task_gradients="mgda"),
}.items():
    model = MultiTaskModel(make_tiny_model("encoder"), heads)
    config = quick(batch_size=3, optimizer="sgd", task_sampler="uniform", **options)
    record(f"ddp {name}", model, fit(model, data, config=config))

# not finite in one process's rows only: the processes skip the same steps
def nan_in_one(logits, labels):
    calls.extend([rank] * logits.requires_grad)
    bad = logits.requires_grad and len(calls) in (2, 3) and rank == world - 1
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * (float("nan") if bad else 1.0)


for mode in ("ddp", "fsdp")[:world]:
    calls = []
    model = make_tiny_model()
    run = fit(model, make_rows(16), config=quick(optimizer="sgd", distributed=mode), loss=nan_in_one)
    record(f"{mode} skips", model, run)
    calls = []
    try:
        fit(make_tiny_model(), make_rows(16), config=quick(distributed=mode, max_bad_steps=2), loss=nan_in_one)
    except ValueError as error:
        out[f"{mode} stopped"] = str(error)

# the processes that see a row, by its label; 12 rows and 4 a step, so that none runs only to take part
seen = []


def loss(logits, labels):
    seen.extend(labels.tolist() if logits.requires_grad else [])
    return ((logits[:, 0] - labels) ** 2).sum()


numbered = [row | {"labels": float(i)} for i, row in enumerate(make_rows(12))]
fit(make_tiny_model("regression", 1), numbered, config=quick(micro_batch_size=2), loss=loss)
out["seen"] = seen

# shared evaluation: every row once, whatever the number
model, forwards = make_tiny_model("token-classification", 3), []
model.register_forward_hook(lambda module, args, kwargs, output: forwards.append(1), with_kwargs=True)
out["evaluated"] = {}
for count in (1, 2, 3, 8):
    part = make_rows(count, "token-classification", seed=count)
    forwards.clear()
    found = logits_of(model, part, batch_size=2, shared=True)
    batches = len(forwards)
    same = all((a == b).all() for a, b in zip(found, logits_of(model, part, batch_size=2), strict=True))
    metrics = evaluate(model, part, batch_size=2, shared=True) if count > 1 else None
    out["evaluated"][count] = [same, batches, metrics]
out["classes"] = evaluate(make_tiny_model(), make_rows(7), batch_size=2, shared=True)
out["own rows"] = len(predict(model, [{"input_ids": [5, 6]}] * (rank + 1)))  # each its own number of them
out["shared rows"] = [p.tolist() for p in predict(model, [{"input_ids": [5, i]} for i in (6, 7, 8)], shared=True)]


def cut_short(limit, name, **options):
    real = training.steps

    def stop(number, step):
        if number >= limit:
            raise ValueError("stopped")

    before_steps(Patch, stop)
    try:
        model = make_tiny_model("token-classification", 3, **options)
        where = str(folder / name)
        fit(model, rows, config=quick(checkpoint_dir=where, checkpoint_every=1, resume="auto", distributed=mode))
    except ValueError as error:
        assert str(error) == "stopped"
    training.steps = real


def resumed(name, **options):
    model = make_tiny_model("token-classification", 3, **options)
    where = str(folder / name)
    return model, fit(model, rows, config=quick(checkpoint_dir=where, resume="auto", distributed=mode))


# resumed with dropout: every process must get its own random state back
for mode in ("ddp", "fsdp")[:world]:
    cut_short(3, f"dropout-{world}-{mode}", hidden_dropout_prob=0.3)
    model, run = resumed(f"dropout-{world}-{mode}", hidden_dropout_prob=0.3)
    other = make_tiny_model("token-classification", 3, hidden_dropout_prob=0.3)
    fit(other, rows, config=quick(distributed=mode))
    states = model.state_dict(), other.state_dict()
    out[f"{mode} resumed exactly"] = all(torch.equal(states[0][key], states[1][key]) for key in states[0])

# begun by one process and gone on by two, and the other way round (see test_resuming_with_another_number)
mode = "fsdp"
cut_short(3, f"begun-by-{world}")
if world == 2:
    distributed.barrier()
    out["begun by 1"] = [record["loss"] for record in resumed("begun-by-1")[1].history if "loss" in record]
    try:  # two machines with a folder each
        resumed("begun-by-1" if rank == 0 else "empty")
    except ValueError as error:
        out["not shared"] = str(error)

out["world"] = world
(folder / f"{world}-{rank}.json").write_text(json.dumps(out))
distributed.stop()
"""


def start(*arguments, processes=2, timeout=400, gpus="", restarts=0):
    """Run `python *arguments` under torchrun (alone for processes=1)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--master-addr=127.0.0.1", f"--master-port={port}", f"--max-restarts={restarts}"]
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *where]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def runs(folder):
    """What the script wrote: {(processes, rank): results}."""
    script = folder / "script.py"
    script.write_text(START + SCRIPT)
    for processes in (1, 2):
        done = start(script, folder, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count, rank in ((1, 0), (2, 0), (2, 1))
    }


def test_the_processes_found_each_other(runs):
    assert [runs[key]["world"] for key in ((1, 0), (2, 0), (2, 1))] == [1, 2, 2]


TASKS = ["tasks", "pcgrad", "cosines", "uncertainty", "gradnorm", "famo", "mgda"]
ALIKE = ["plain", "clipped", "micro", "tokens", "frozen", "shared layers", "checkpointing", "r-drop", "lora", "prompt"]
DDP = [*ALIKE, "stops", *TASKS, "gradual-unfreezing", "l2-sp"]


@pytest.mark.parametrize("name", [*(f"ddp {n}" for n in DDP), *(f"fsdp {n}" for n in ALIKE)])
def test_two_processes_take_the_steps_of_one(runs, folder, name):
    alone = name.replace("fsdp", "ddp")
    (one, one_end), (two, two_end), (other, other_end) = runs[1, 0][alone], runs[2, 0][name], runs[2, 1][name]
    assert len(one) == len(two) == len(other) and one_end == two_end == other_end
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=1e-6, rel=1e-6), key
    assert [record["loss"] for record in two if "loss" in record] == [r["loss"] for r in other if "loss" in r]
    expected, found, rest = (torch.load(folder / f"{f}.pt") for f in (f"1-0-{alone}", f"2-0-{name}", f"2-1-{name}"))
    for key in expected:
        assert_close(found[key], expected[key], atol=1e-6, rtol=1e-5)
        assert torch.equal(found[key], rest[key])  # the processes never part


@pytest.mark.parametrize("name", ["ddp adamw", "fsdp adamw", "fsdp stops"])
def test_two_processes_lose_as_one(runs, name):
    """Adam divides by the gradient's size, so parameters without influence (key biases) drift; the loss does not."""
    one, two = runs[1, 0][name.replace("fsdp", "ddp")], runs[2, 0][name]
    assert one[1] == two[1]
    for expected, found in zip(one[0], two[0], strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)


def losses(runs, world, name):
    return [record["loss"] for record in runs[world, 0][name][0] if "loss" in record]


def test_a_long_gradient_is_clipped_by_its_length_over_all_processes(runs):
    for mode in ("ddp", "fsdp"):
        records = [record for record in runs[2, 0][f"{mode} clipped"][0] if "grad_norm" in record]
        assert all(record["grad_norm"] > 0.05 for record in records)  # the length before it was cut
        assert losses(runs, 2, f"{mode} clipped")[-1] != pytest.approx(losses(runs, 2, f"{mode} plain")[-1], abs=1e-3)


def test_bf16(runs):
    """Sharded weights are sent and used in bfloat16, which has 8 bits of precision, and stay float32 themselves."""
    exact, found = losses(runs, 1, "ddp plain"), losses(runs, 2, "fsdp bf16")
    assert found == pytest.approx(exact, rel=2**-8) and found != pytest.approx(exact, rel=1e-6)


def test_micro_batches_do_not_exchange_gradients(runs):
    """A step reduces each unit's gradients (2 layers and the rest) once, however many micro-batches it has."""
    for rank in (0, 1):
        sent = {name: runs[2, rank][f"fsdp {name} sent"] for name in ("plain", "micro", "frozen")}
        steps = len(losses(runs, 2, "fsdp plain"))
        assert sent == {"plain": 3 * steps, "micro": 3 * steps, "frozen": steps}


def test_a_last_step_had_fewer_rows_than_processes(runs):
    for mode in ("ddp", "fsdp"):
        examples = [record["examples"] for record in runs[2, 0][f"{mode} plain"][0] if "loss" in record]
        assert examples == [4, 4, 4, 1] * 2


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_early_stopping_stops_all_and_keeps_the_best_weights(runs, folder, tiny_model, mode):
    (history, end), (_, other_end) = runs[2, 0][f"{mode} stops"], runs[2, 1][f"{mode} stops"]
    assert end == other_end == "early stopping"
    model = tiny_model("token-classification", 3)
    model.load_state_dict(torch.load(folder / f"2-1-{mode} stops.pt"))
    found = evaluate(model, make_rows(5, "token-classification", seed=9))["loss"]
    evaluations = [record["eval_loss"] for record in history if "eval_loss" in record]
    assert found == pytest.approx(min(evaluations), abs=1e-6) and min(evaluations) < evaluations[-1]


def test_what_looks_at_whole_weights_is_not_sharded(runs):
    for name in ("gradual-unfreezing", "l2-sp"):
        assert runs[2, 0][f"fsdp {name}"] == f"distributed='fsdp' has no {name}; use distributed='ddp'"


def test_several_heads_are_not_sharded(runs):
    assert "use distributed='ddp'" in runs[2, 0]["several heads"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_step_not_finite_in_one_process_is_skipped_by_all(runs, folder, mode):
    one, two, other = (runs[key][f"{m} skips"][0] for key, m in (((1, 0), "ddp"), ((2, 0), mode), ((2, 1), mode)))
    skipped = [record.get("skipped") for record in one]
    assert [rows is not None for rows in skipped] == [False, True, True, *[False] * 5]
    assert skipped == [r.get("skipped") for r in two] == [r.get("skipped") for r in other]
    files = ("1-0-ddp", f"2-0-{mode}", f"2-1-{mode}")
    weights = [torch.load(folder / f"{name} skips.pt") for name in files]
    for key, expected in weights[0].items():
        assert_close(weights[1][key], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(weights[1][key], weights[2][key])
    for rank in (0, 1):
        assert "not finite in 2 steps in a row" in runs[2, rank][f"{mode} stopped"]


def test_every_row_is_seen_once_an_epoch(runs):
    """12 rows, 2 epochs, 3 steps each: per epoch, each row in exactly one of the processes."""
    one, two = (Counter(), Counter())
    for rank in (0, 1):
        seen = runs[2, rank]["seen"]
        assert len(seen) == 12
        one.update(seen[:6])
        two.update(seen[6:])
    assert one == two == Counter(range(12)) and runs[2, 0]["seen"][:6] != runs[2, 0]["seen"][6:]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shared_evaluation(runs, tiny_model, count):
    """Bit-equal logits, because the batches are the same; each process runs half of them, rounded up."""
    one, two, other = (runs[key]["evaluated"][str(count)] for key in ((1, 0), (2, 0), (2, 1)))
    assert one[:2] == [True, -(-count // 2)] and two[:2] == other[:2] == [True, -(-count // 4)]
    assert one[2] == two[2] == other[2]  # the metrics
    if count > 1:
        rows = make_rows(count, "token-classification", seed=count)
        assert one[2] == pytest.approx(evaluate(tiny_model("token-classification", 3), rows), abs=1e-6)


def test_shared_evaluation_of_classes(runs, tiny_model):
    found = [runs[key]["classes"] for key in ((1, 0), (2, 0), (2, 1))]
    assert found[0] == found[1] == found[2] == pytest.approx(evaluate(tiny_model(), make_rows(7)), abs=1e-6)


def test_predict_is_plain_unless_asked(runs):
    assert [runs[2, rank]["own rows"] for rank in (0, 1)] == [1, 2]
    assert runs[2, 0]["shared rows"] == runs[2, 1]["shared rows"] == runs[1, 0]["shared rows"]


def test_resuming_with_dropout_is_exact_on_every_process(runs):
    found = [runs[key][f"{mode} resumed exactly"] for key in ((2, 0), (2, 1)) for mode in ("ddp", "fsdp")]
    assert found == [True] * 4 and runs[1, 0]["ddp resumed exactly"]


def test_resuming_with_another_number_of_processes(runs, folder, tiny_model):
    """One process goes on from what two sharded wrote, and two from what one wrote: the losses of one all through."""
    rows = make_rows(13, "token-classification")
    whole = fit(tiny_model("token-classification", 3), rows, config=quick())
    expected = [record["loss"] for record in whole.history]
    shutil.copytree(folder / "begun-by-2", folder / "gone-on")
    config = quick(checkpoint_dir=str(folder / "gone-on"), resume="auto")
    found = fit(tiny_model("token-classification", 3), rows, config=config)
    assert [record["loss"] for record in found.history] == pytest.approx(expected, abs=1e-6)
    for rank in (0, 1):
        assert runs[2, rank]["begun by 1"] == pytest.approx(expected, abs=1e-6)


def test_checkpoints_that_not_all_processes_see(runs):
    for rank in (0, 1):
        assert "checkpoints of the steps [8, 0]" in runs[2, rank]["not shared"]
        assert "one folder that all machines share" in runs[2, rank]["not shared"]


# ------------------------------------------------------------------------------------------------ the program

PROGRAM = """
import os, runpy
from datasets import ClassLabel, Dataset, DatasetDict
import ftlib

texts, labels = ["the film is good", "bad film", "great fun", "dull plot", "not very good"] * 2, [1, 0, 1, 0, 0] * 2
part = Dataset.from_dict({"text": texts, "label": labels}).cast_column("label", ClassLabel(names=["neg", "pos"]))
ftlib.load_corpus = lambda name: DatasetDict(train=part, validation=part.select(range(3)), test=part)


def bad(model, strategy):
    raise ValueError("one bad process")


if os.environ.get("RANK") == sys.argv[2]:
    ftlib.tune = bad
sys.argv = ["ftlib", "train", sys.argv[1]]
runpy.run_module("ftlib", run_name="__main__")
"""


@pytest.fixture
def program(tiny_model, tiny_tokenizer, tmp_path):
    """Writes run.toml, and starts `python -m ftlib train run.toml` on a corpus of ten sentences."""
    (tmp_path / "program.py").write_text(START + PROGRAM)
    tiny_model("encoder").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")

    def run(mode, processes=2, bad_rank="none"):
        output = tmp_path / f"{mode}-{processes}"
        (tmp_path / "run.toml").write_text(
            f'model = "{tmp_path / "tiny"}"\ntask = "sequence-classification"\ncorpus = "films"\noutput = "{output}"\n'
            "[train]\nepochs = 1\nbatch_size = 4\nlearning_rate = 1e-3\nprogress = false\n"
            f'distributed = "{mode}"\n'
        )
        return start(tmp_path / "program.py", tmp_path / "run.toml", bad_rank, processes=processes), output

    return run


def test_train_under_torchrun(program):
    expected = {}
    for mode, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        done, output = program(mode, processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished after") == done.stdout.count("strategy full") == 1  # process 0 alone prints
        assert {path.name for path in output.iterdir()} == {"checkpoints", "metrics.json", "model"}
        found = json.loads((output / "metrics.json").read_text())
        expected = expected or found  # those of one process
        assert found["steps"] == expected["steps"] == 3
        for split in ("validation", "test"):
            assert found[split] == pytest.approx(expected[split], abs=1e-5)


BAD = """
from conftest import make_tiny_model
from test_fit import make_rows, quick
from ftlib.engine import distributed
from ftlib.engine.fit import fit

calls = []


def loss(logits, labels):
    calls.append(1)
    if distributed.rank() == 1 and len(calls) == 2:
        raise ValueError("one bad process")
    return logits.sum()


fit(make_tiny_model(), make_rows(8), config=quick(distributed="fsdp"), loss=loss)
"""


def test_one_bad_process_ends_all(tmp_path):
    """In the middle of a step: no hang, the exit status says that it failed, the message what and where."""
    (tmp_path / "bad.py").write_text(START + BAD)
    done = start(tmp_path / "bad.py", timeout=200)
    assert done.returncode == 1
    assert "ValueError: one bad process" in done.stderr and "rank      : 1" in done.stderr


SILENT = """
import time
from conftest import make_tiny_model
from test_fit import before_steps, make_rows, quick
from ftlib.engine import distributed
from ftlib.engine.fit import fit


class Patch:
    setattr = staticmethod(setattr)


before_steps(Patch, lambda number, step: time.sleep(1000 if (number, distributed.rank()) == (2, 1) else 0))
fit(make_tiny_model(), make_rows(16), config=quick(distributed=sys.argv[1]))
"""


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_process_that_says_nothing_is_given_up(tmp_path, monkeypatch, mode):
    """As when a machine hangs: the other says how long it waited and what to do, and torchrun ends both."""
    monkeypatch.setenv("FTLIB_TIMEOUT", "20")
    (tmp_path / "silent.py").write_text(START + SILENT)
    done = start(tmp_path / "silent.py", mode, timeout=200)
    assert done.returncode == 1 and "rank      : 0" in done.stderr
    assert "lost another process, or waited more than FTLIB_TIMEOUT=20 seconds for it" in done.stderr
    assert "start all again: with checkpoints and resume='auto' they go on" in done.stderr


def test_two_hosts():
    """Hosts with a network of their own, one of them killed: tests/benchmarks/two_hosts.py, of which this is a part."""
    command = [sys.executable, str(TESTS / "benchmarks/two_hosts.py"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


KILLED = """
import os, signal
import torch
from conftest import make_tiny_model
from test_fit import before_steps, make_rows, quick, same, weights
from ftlib.engine import checkpoints
from ftlib.engine import fit as training
from ftlib.engine import distributed
from ftlib.engine.fit import fit

folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
distributed.start()
rank = distributed.rank()
rows, held_out = make_rows(13, "token-classification"), make_rows(5, "token-classification", seed=9)
real_save = checkpoints.save_file


def killed():
    (folder / f"killed-{attempt}-{rank}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def kill(number, step):  # in the middle of step 5, the other process waits for the gradients
    if disturbed and (attempt, rank, mode, number) == (0, 1, "ddp", 4):
        killed()


def save_file(tensors, path):  # in the middle of the checkpoint of step 6
    if disturbed and (attempt, rank, mode) == (1, 0, "fsdp") and "step-00000006" in str(path):
        path.write_bytes(b"half")
        killed()
    real_save(tensors, path)


class Patch:
    setattr = staticmethod(setattr)


before_steps(Patch, kill)
checkpoints.save_file = save_file


def run(**options):
    model = make_tiny_model("token-classification", 3, hidden_dropout_prob=0.3)
    done = fit(model, rows, eval_dataset=held_out, config=quick(distributed=mode, micro_batch_size=1, **options))
    return model, [{k: v for k, v in record.items() if k != "seconds"} for record in done.history]


out = []
for mode in ("ddp", "fsdp"):
    disturbed = True
    model, history = run(checkpoint_dir=str(folder / mode), checkpoint_every=2, resume="auto")
    disturbed = False
    whole, expected = run()
    out.append([same(weights(model), weights(whole)), history == expected, len(history)])
(folder / f"{rank}.json").write_text(json.dumps([attempt, out]))
distributed.stop()
"""


def test_torchrun_starts_again_from_the_last_checkpoint(tmp_path):
    """One process killed in a step, then the other while it writes: the end is that of the run nobody killed."""
    (tmp_path / "killed.py").write_text(START + KILLED)
    done = start(tmp_path / "killed.py", tmp_path, restarts=2, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("killed-*")} == {"killed-0-1", "killed-1-0"}
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [2, [[True, True, 10], [True, True, 10]]]
    assert sorted(path.name for path in (tmp_path / "fsdp").iterdir()) == ["step-00000006", "step-00000008"]


def test_one_bad_process_ends_the_program(program):
    done, output = program("ddp", bad_rank="1")
    assert done.returncode == 1 and not (output / "model").exists()
    assert re.search(r"error in process 1: .*run.toml: \[tune\] one bad process", done.stderr)


# -------------------------------------------------------------------------------------------------- one process


def test_alone_nothing_is_wrapped():
    model, tensor = nn.Linear(2, 2), torch.ones(2)
    distributed.start()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.wrap(model) is model
    with distributed.spread(model, "fsdp", torch.device("cpu")) as spread:
        assert spread is model and not hasattr(model, "set_requires_gradient_sync")
    assert distributed.all_sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert distributed.gather(0.1) == [0.1] and distributed.all_joined({"a": 1}) == {"a": 1}
    assert distributed.whole(tensor) is tensor and distributed.cut(tensor, like=model.bias) is tensor
    assert distributed.cut(torch.ones(2, 3), like=torch.ones(3, 2).T).stride() == (1, 2)  # in memory as it is there
    assert distributed.to_first({"a": tensor})["a"].tolist() == [1, 1]
    with distributed.one_first(), distributed.hold_gradients(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    distributed.barrier()
    distributed.stop()


def test_every_process_gets_as_many_batches(monkeypatch):
    batches = [[[4, 1], [0]], [[3]], []]
    found = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(distributed.evened(batches))
    assert found == [
        [([4, 1], 1.0), ([0], 1.0)],
        [([3], 1.0), ([4, 1], 0.0)],
        [([4, 1], 0.0), ([4, 1], 0.0)],
    ]


def test_what_is_lost_between_processes_is_explained(monkeypatch):
    """gloo's and NCCL's own words, once; other errors, and one process's, stay as they are."""
    for words in (
        "Timed out waiting 9ms for recv operation",
        "Read error [10.0.0.2]: Connection reset by peer",
        "NCCL",
    ):
        with pytest.raises(RuntimeError, match=f"^{re.escape(words)}$"), distributed.explained():
            raise RuntimeError(words)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for words in (
        "Timed out waiting 9ms for recv operation",
        "Read error [10.0.0.2]: Connection reset by peer",
        "NCCL",
    ):
        with pytest.raises(RuntimeError, match="FTLIB_TIMEOUT=600 seconds") as found:
            with distributed.explained(), distributed.explained():
                raise RuntimeError(words)
        assert str(found.value).count("start all again") == 1 and words in str(found.value)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), distributed.explained():
        raise RuntimeError("shapes differ")


def test_no_way_to_the_others(monkeypatch):
    """The interface that gloo shall use is not there: the message names the setting."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "nothere0"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"can't reach each other \(.*nothere0.*\); name .* GLOO_SOCKET_IFNAME=eth0"):
        distributed.start()
    assert distributed.world_size() == 1


def test_how_long_processes_wait(monkeypatch):
    monkeypatch.delenv("FTLIB_TIMEOUT", raising=False)
    assert distributed.patience().total_seconds() == 600
    monkeypatch.setenv("FTLIB_TIMEOUT", "90")
    assert distributed.patience().total_seconds() == 90
    for wrong in ("0", "-3", "1.5", "ten"):
        monkeypatch.setenv("FTLIB_TIMEOUT", wrong)
        with pytest.raises(ValueError, match=f"FTLIB_TIMEOUT='{wrong}' must be a number of seconds"):
            distributed.patience()


def test_settings():
    with pytest.raises(ValueError, match="distributed='dp': choose one of ddp, fsdp"):
        quick(distributed="dp")
    with pytest.raises(ValueError, match="compile=True with distributed='fsdp'"):
        quick(distributed="fsdp", compile=True)


GPUS = """
from conftest import make_tiny_model
from test_fit import make_rows, quick
from ftlib.engine import distributed
from ftlib.engine.fit import fit

rows = make_rows(13, "token-classification")
found = []
for mode in ("ddp", "fsdp"):
    config = quick(
        optimizer="sgd", precision="fp32", micro_batch_size=1, distributed=mode, checkpoint_dir=sys.argv[1] + mode
    )
    run = fit(make_tiny_model("token-classification", 3), rows, eval_dataset=rows, config=config)
    found.append([record.get("loss", record.get("eval_loss")) for record in run.history])
if distributed.rank() == 0:
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
distributed.stop()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path, tiny_model):
    (tmp_path / "gpus.py").write_text(START + GPUS)
    done = start(tmp_path / "gpus.py", tmp_path, gpus="0,1")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = make_rows(13, "token-classification")
    run = fit(tiny_model("token-classification", 3), rows, eval_dataset=rows, config=quick(optimizer="sgd"))
    expected = [record.get("loss", record.get("eval_loss")) for record in run.history]
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert found == pytest.approx(expected, rel=1e-4)
