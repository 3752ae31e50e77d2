"""Two processes take the steps of one, down to a last step with fewer rows than processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ftlib import distributed

SCRIPT = """
import json, sys
from pathlib import Path
from dataclasses import asdict
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from conftest import make_tiny_model
from test_training import make_rows, quick
from ftlib import distributed
from ftlib.multitask import Head, MultiTaskModel
from ftlib.training import fit
from ftlib.unpadding import unpad

torch.set_num_threads(1)
folder = Path({folder!r})
out = {{}}


def record(name, model, run):
    state = {{key: value.double().sum().item() for key, value in model.state_dict().items()}}
    history = [{{k: v for k, v in r.items() if k not in ("seconds", "micro_batches")}} for r in run.history]
    out[name] = [history, state, run.stopped]


# 13 rows, 4 a step: the last step has one row, so the second process has none
rows = make_rows(13, "token-classification")
for name, options in [("plain", {{}}), ("micro", dict(micro_batch_size=1)), ("tokens", dict(max_tokens=12)),
                      ("stops", dict(epochs=30, patience=1, eval_every=1, learning_rate=0.1))]:
    model = unpad(make_tiny_model("token-classification", 3))
    held_out = make_rows(5, "token-classification", seed=9) if name in ("plain", "stops") else None
    config = quick(**{{"warmup_fraction": 0.0, "optimizer": "sgd", **options}})
    record(name, model, fit(model, rows, eval_dataset=held_out, config=config))

heads = {{"a": Head(), "b": Head("token-classification", 3, weight=0.5)}}
model = MultiTaskModel(make_tiny_model("encoder"), heads)
data = {{"a": make_rows(3), "b": make_rows(5, "token-classification")}}
record("tasks", model, fit(model, data, config=quick(batch_size=3, optimizer="sgd", micro_batch_size=1)))

# resumed with dropout: every process must get its own random state back
states = []
for stop in (None, 3):
    where = str(folder / f"checkpoints-{{distributed.world_size()}}-{{stop}}")
    config = quick(checkpoint_dir=where, checkpoint_every=1, resume="auto")
    for limit in [stop, None] if stop else [None]:
        model = make_tiny_model("token-classification", 3, hidden_dropout_prob=0.3)
        import ftlib.training as training
        real = training._Loop.step
        if limit:
            def step(self, number, rows):
                if number >= limit:
                    raise ValueError("stopped")
                real(self, number, rows)
            training._Loop.step = step
        try:
            run = fit(model, rows, config=config)
        except ValueError as error:
            assert str(error) == "stopped"
        training._Loop.step = real
    states.append({{key: value.clone() for key, value in model.state_dict().items()}})
out["resumed exactly"] = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
out["world"] = distributed.world_size()
(folder / f"{{distributed.world_size()}}-{{distributed.rank()}}.json").write_text(json.dumps(out))
distributed.barrier()
distributed.stop()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the script wrote: {(processes, rank): results}."""
    folder = tmp_path_factory.mktemp("distributed")
    tests = Path(__file__).resolve().parent
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(tests), root=str(tests.parent), folder=str(folder)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for command in (
        [sys.executable, str(script)],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
         f"--master-port={port}", str(script)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count, rank in ((1, 0), (2, 0), (2, 1))
    }


def test_the_processes_found_each_other(runs):
    assert [runs[key]["world"] for key in ((1, 0), (2, 0), (2, 1))] == [1, 2, 2]


@pytest.mark.parametrize("name", ["plain", "micro", "tokens", "stops", "tasks"])
def test_two_processes_take_the_steps_of_one(runs, name):
    (one, one_state, one_end), (two, two_state, two_end), (other, other_state, other_end) = (
        runs[key][name] for key in ((1, 0), (2, 0), (2, 1))
    )
    assert len(one) == len(two) == len(other) and one_end == two_end == other_end
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=2e-6, rel=1e-5), key
    assert two_state == pytest.approx(one_state, abs=1e-4)
    assert two_state == other_state  # the processes never part
    assert [record["loss"] for record in two if "loss" in record] == [
        record["loss"] for record in other if "loss" in record
    ]


def test_a_last_step_had_fewer_rows_than_processes(runs):
    examples = [record["examples"] for record in runs[2, 0]["plain"][0] if "loss" in record]
    assert examples == [4, 4, 4, 1] * 2


def test_early_stopping_stops_all(runs):
    assert runs[2, 0]["stops"][2] == runs[2, 1]["stops"][2] == "early stopping"


def test_resuming_with_dropout_is_exact_on_every_process(runs):
    assert [runs[key]["resumed exactly"] for key in ((1, 0), (2, 0), (2, 1))] == [True] * 3


def test_alone_nothing_is_wrapped():
    model, tensor = nn.Linear(2, 2), torch.ones(2)
    distributed.start()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.wrap(model) is model
    assert distributed.all_sum(tensor) is tensor and tensor.tolist() == [1, 1]
    assert [part.tolist() for part in distributed.gather(tensor, torch.device("cpu"))] == [[1, 1]]
    assert distributed.from_first(0.1, torch.device("cpu")) == 0.1
    with distributed.hold_gradients(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    distributed.barrier()
    distributed.stop()
