"""Kill real training runs, go on with them, and compare the end with that of the run nothing happened to.

    python tests/benchmarks/faults.py --kills 100    # rows of results/faults.json; half an hour on one core
    python tests/benchmarks/faults.py --quick        # a few of each, for CI; stores nothing without --results
    python tests/benchmarks/faults.py --only Ctrl-C  # only the faults whose names begin so

Every run is `ftlib.fit` on a tiny random model with dropout, and checkpoints at every step or two.  After each fault
the same call goes on with resume="auto", in a new process, possibly into the next fault.  At the end the SHA-256 of
all weights, of the optimizer's state, of the random state and of the history (without seconds) are compared with those
of an undisturbed run, and the rows of every step that any of the processes took with the undisturbed order.

The faults: SIGKILL at a random moment, and at a random moment after a checkpoint has begun to be written; SIGKILL
before every single line of the code that writes a checkpoint; Ctrl-C (SIGINT) at a random moment; a disk that is full;
a newest checkpoint with one file cut, with one bit flipped, missing, or of another run; a loss or gradient that is NaN
or infinite, whose step must move nothing and name its rows, in runs that are killed as well.  Not with --quick, as unit
tests do it: SIGKILL of one of two processes under torchrun, which starts both again; and the bad inputs that hypothesis
makes in tests/engine/test_untrusted.py.

A new process would import torch for seconds, so each is forked from this one, which has imported everything.  Forking
is sound only while there is one thread, so this process computes nothing itself, and checks that before every fork.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# before the imports: no thread may be running when this process forks
os.environ |= {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

import seqeval.metrics  # noqa: F401  imported here, so that no child has to
import sklearn.metrics  # noqa: F401
import torch
from record import RESULTS, Table
from transformers import BertConfig, BertForSequenceClassification, BertModel

import ftlib
from ftlib.engine import checkpoints, task_gradients
from ftlib.engine import fit as training
from ftlib.inputs import files
from ftlib.tasks import metrics  # noqa: F401

SIZES = dict(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=40, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
)  # fmt: skip


def rows(count: int, seed: int, tags: bool = False) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        ids = [draw.randrange(5, 150) for _ in range(draw.randrange(2, 12))]
        out.append({"input_ids": ids, "labels": [draw.randrange(3) for _ in ids] if tags else draw.randrange(2)})
    return out


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES))


def two_heads() -> torch.nn.Module:
    torch.manual_seed(0)
    heads = {"a": ftlib.Head(), "b": ftlib.Head("token-classification", 3)}
    return ftlib.MultiTaskModel(BertModel(BertConfig(**SIZES)), heads)


def gradual() -> torch.nn.Module:
    model = classifier()
    ftlib.tune(model, "gradual-unfreezing", until=0.7, decay=0.9)
    return model


def lora() -> torch.nn.Module:
    model = classifier()
    ftlib.tune(model, "lora", rank=2)
    return model


def last_layers() -> torch.nn.Module:
    model = ftlib.unpad(classifier())
    ftlib.tune(model, "last-layers", layers=1)
    return model


ONE, HELD_OUT = rows(26, 1), rows(6, 2)
TWO = {"a": rows(17, 3), "b": rows(9, 4, tags=True)}

# name: (model, training data, evaluation data, options of TrainConfig)
RUNS: dict[str, tuple[Callable, Any, Any, dict[str, Any]]] = {
    "linear schedule, evaluations": (classifier, ONE, HELD_OUT, dict(checkpoint_every=1)),
    "gradient accumulation, cosine schedule": (
        classifier, ONE, None, dict(micro_batch_size=3, schedule="cosine", checkpoint_every=2),
    ),
    "several tasks mixed by a temperature": (two_heads, TWO, None, dict(temperature=2.0, checkpoint_every=1)),
    "several tasks, weights that learn, joined gradients": (
        two_heads, TWO, None,
        dict(task_sampler="annealed", task_weighting="gradnorm", task_gradients="pcgrad", checkpoint_every=1),
    ),
    "early stopping, the best weights kept": (
        classifier, ONE, HELD_OUT,
        dict(epochs=9, patience=4, eval_every=2, learning_rate=0.1, keep_last=1, checkpoint_every=1),
    ),
    "gradual unfreezing, layer by layer": (
        gradual, ONE, HELD_OUT, dict(checkpoint_every=1, r_drop=0.5, l1=0.01),
    ),
    "LoRA": (lora, ONE, HELD_OUT, dict(checkpoint_every=1)),
    "last layers only, unpadded, tokens a batch, SGD": (
        last_layers, ONE, HELD_OUT, dict(max_tokens=40, optimizer="sgd", schedule="constant", checkpoint_every=2),
    ),
    "four steps": (classifier, ONE, None, dict(max_steps=4, checkpoint_every=1)),  # for `every_line` alone
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ one process


def digest(tensors: dict[Any, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), key=lambda item: str(item[0])):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def state_of(loop: Any) -> dict[str, torch.Tensor]:
    """What a step moves: weights, the optimizer's state, the weights of tasks."""
    state = dict(loop.model.state_dict())
    for index, values in loop.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items() if v is not None}
    return state | {f"tasks.{k}": v for k, v in (loop.joint.weights.state_dict() if loop.joint else {}).items()}


@contextmanager
def poisoned(model: torch.nn.Module, where: str, value: str):
    """In one step the loss, or a gradient, is `value`: nan or inf."""
    real, handles = task_gradients.Losses.parts, []
    if where == "loss":
        task_gradients.Losses.parts = lambda *a: {task: part * float(value) for task, part in real(*a).items()}
    else:
        moving = [p for p in model.parameters() if p.requires_grad]
        handles = [p.register_hook(lambda gradient: gradient * float(value)) for p in moving]
    try:
        yield
    finally:
        task_gradients.Losses.parts = real
        for handle in handles:
            handle.remove()


def around_steps(gradient: Callable, after: Callable[[int], None] = lambda number: None) -> None:
    """Let `fit` take its steps with gradient(its own gradient, model, step), and `after` each, before it goes on."""
    steps = training.steps

    def watched(*parts: Any, **options: Any):
        own = options.pop("gradient")
        for record in steps(*parts, **options, gradient=lambda model, step: gradient(own, model, step)):
            after(record["step"] - 1)
            yield record

    training.steps = watched


def fit_in_child(name: str, folder: Path, tell: int, bad: dict[int, str] | None = None) -> None:
    """The run, from wherever it stands; what came of it goes to folder/end.json, the rows of its steps to order.txt.

    A byte goes to the pipe `tell` whenever a step begins (s) and whenever a checkpoint begins to be written (w).
    bad: what goes wrong in which steps, see `poisoned`; folder/bad.txt gets a line for every one that moved nothing and
    is recorded with its rows.
    """
    build, data, held_out, options = RUNS[name]
    parts = data if isinstance(data, dict) else {"": data}
    places = {json.dumps(row["input_ids"]): f"{part}{i}" for part, rows in parts.items() for i, row in enumerate(rows)}
    order = os.open(folder / "order.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    loops, begun, aside = [], training.Training._run, checkpoints.aside
    before: list[Any] = []

    def kept(self: Any) -> None:
        loops.append(self)
        begun(self)

    def noted(gradient: Callable, model: torch.nn.Module, step: Any) -> torch.Tensor:
        names = [places[json.dumps(list(row["input_ids"]))] for row in step.rows]
        os.write(order, f"{step.number} {' '.join(names)}\n".encode())
        os.write(tell, b"s")
        if step.number not in (bad or {}):
            return gradient(model, step)
        before[:] = digest(state_of(loops[0])), names
        with poisoned(model, *bad[step.number].split()):
            return gradient(model, step)

    def looked(number: int) -> None:
        if number not in (bad or {}):
            return
        skipped = loops[0].result.history[-1].get("skipped", [])
        found = [
            f"{part}{i}" for part, own in (skipped if isinstance(skipped, dict) else {"": skipped}).items() for i in own
        ]
        if digest(state_of(loops[0])) == before[0] and sorted(found) == sorted(before[1]):
            with open(folder / "bad.txt", "a") as file:
                file.write(f"{number}\n")

    @contextmanager
    def announced(path: Path):
        os.write(tell, b"w")
        begin = time.perf_counter()
        with aside(path) as temporary:
            yield temporary
        written.append(time.perf_counter() - begin)

    written: list[float] = []
    training.Training._run, checkpoints.aside = kept, announced
    around_steps(noted, looked)
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 5e-3, **options}
    config = ftlib.TrainConfig(**settings, checkpoint_dir=str(folder / "c"), resume="auto", progress=False)
    model = build()
    try:
        run = ftlib.fit(model, data, eval_dataset=held_out, config=config)
    except OSError as error:
        (folder / "error.txt").write_text(str(error))
        return
    [loop] = loops
    end = {
        "stopped": run.stopped, "steps": run.steps, "metrics": run.metrics, "weights": digest(model.state_dict()),
        "optimizer and tasks": digest(state_of(loop)), "random state": digest(loop.random.now),
        "history": [{key: value for key, value in record.items() if key != "seconds"} for record in run.history],
    }  # fmt: skip
    (folder / "times.json").write_text(json.dumps(written))
    (folder / "end.json").write_text(json.dumps(end))


def start(
    name: str, folder: Path, prepare: Callable[[], None] | None = None, bad: dict[int, str] | None = None
) -> tuple[int, int]:
    """A child process on its way, and the pipe on which it tells that it writes a checkpoint."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads are running; a fork would copy one of them and the locks of all")
    folder.mkdir(parents=True, exist_ok=True)
    hear, tell = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can say that it came
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(tell)
        return pid, hear
    status = 1
    try:
        os.close(hear)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        sys.stderr = open(folder / "stderr.txt", "a")  # closed by nobody: the process ends without tidying up
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if prepare:
            prepare()
        fit_in_child(name, folder, tell, bad)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finish(pid: int, hear: int) -> int:
    """Wait for the child; its exit status, or minus the signal that ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(hear)
    return status


def go_on(name: str, folder: Path, bad: dict[int, str] | None = None, damaged: str = "") -> None:
    """To the end; the only checkpoint that may be skipped, and must be, is the damaged one."""
    before = (folder / "stderr.txt").stat().st_size if (folder / "stderr.txt").exists() else 0
    status = finish(*start(name, folder, bad=bad))
    said = (folder / "stderr.txt").read_text()[before:]
    if status or re.findall("skipped checkpoint ([^:]*)", said) != [damaged] * bool(damaged):
        raise RuntimeError(f"{name} in {folder} ended with {status}:\n{(folder / 'stderr.txt').read_text()[-2000:]}")


def same(folder: Path, whole: Path) -> bool:
    """Whether two runs ended alike, and all their steps had the same rows."""
    ends = [json.loads((place / "end.json").read_text()) for place in (folder, whole)]
    orders = [sorted(set((place / "order.txt").read_text().splitlines())) for place in (folder, whole)]
    if ends[0] == ends[1] and orders[0] == orders[1]:
        return True
    print(f"LOST: {[key for key in ends[1] if ends[0][key] != ends[1][key]]} differ; kept in {folder}", file=sys.stderr)
    return False


def torn(folder: Path) -> bool:
    """Whether a process was killed while it wrote a checkpoint: it left a folder that is not renamed."""
    return any(folder.glob("c/.step-*"))


# ---------------------------------------------------------------------------------------------------------- faults


class Trials:
    """Folders of runs, each compared with the undisturbed run of its kind."""

    def __init__(self, work: Path, seed: int):
        self.work, self.draw, self.count, self.took, self.writes = work, random.Random(seed), 0, {}, {}
        for name in RUNS:
            begin = time.perf_counter()
            go_on(name, self.whole(name))
            self.took[name] = time.perf_counter() - begin
            self.writes[name] = json.loads((self.whole(name) / "times.json").read_text())

    def whole(self, name: str) -> Path:
        return self.work / f"whole-{list(RUNS).index(name)}"

    def fresh(self) -> tuple[str, Path]:
        """The kinds of runs in turn, each in a new folder."""
        self.count += 1
        return list(RUNS)[self.count % (len(RUNS) - 1)], self.work / f"run-{self.count}"

    def ended(self, name: str, folder: Path, damaged: str = "") -> bool:
        """Let the run come to its end, and compare it."""
        (folder / "end.json").unlink(missing_ok=True)  # of a run that an interrupt ended
        if (folder / "order.txt").exists():
            (folder / "error.txt").unlink(missing_ok=True)
        go_on(name, folder, damaged=damaged)
        if alike := same(folder, self.whole(name)):
            shutil.rmtree(folder)
        return alike

    def hit(self, name: str, folder: Path, number: int, aimed: bool, bad: dict[int, str] | None = None) -> int:
        """Start or go on with the run and send it a signal; its status.  aimed: while it writes a checkpoint."""
        pid, hear = start(name, folder, bad=bad)
        writes, steps = self.writes[name], json.loads((self.whole(name) / "end.json").read_text())["steps"]
        left = self.draw.randrange(1, len(writes) + 1) if aimed else self.draw.randrange(steps + len(writes) + 1)
        last, apart = time.perf_counter(), self.took[name] / (steps + len(writes))  # seconds between two bytes
        while left and (byte := os.read(hear, 1)):  # no byte: it ended before
            left -= byte == b"w" or not aimed
            last, apart = time.perf_counter(), time.perf_counter() - last
        time.sleep(self.draw.uniform(0, 1.2 * sorted(writes)[len(writes) // 2] if aimed else apart))
        os.kill(pid, number)
        return finish(pid, hear)

    def killed(self, kills: int, aimed: bool) -> dict[str, Any]:
        """SIGKILL, up to three times a run."""
        tried = runs = lost = half = 0
        while tried < kills:
            name, folder = self.fresh()
            hits = 0
            for _ in range(min(self.draw.randrange(1, 4), kills - tried)):
                if self.hit(name, folder, signal.SIGKILL, aimed) == -signal.SIGKILL:
                    hits, half = hits + 1, half + torn(folder)
            tried, runs = tried + hits, runs + (hits > 0)
            lost += 0 if self.ended(name, folder) else max(hits, 1)
        return {"tried": tried, "runs": runs, "lost": lost, "left a half-written checkpoint": half}

    def interrupted(self, count: int) -> dict[str, Any]:
        """Ctrl-C; where `fit` returned, the newest checkpoint must be that of its last step."""
        tried, lost, returned = 0, 0, 0
        while tried < count:
            name, folder = self.fresh()
            self.hit(name, folder, signal.SIGINT, aimed=tried % 2 == 0)
            good = True
            if (folder / "end.json").exists():
                end = json.loads((folder / "end.json").read_text())
                if end["stopped"] != "interrupted":  # it came to its end before
                    shutil.rmtree(folder)
                    continue
                newest = [path.name for path in checkpoints._folders(folder / "c")][-1:]
                good = not end["steps"] or newest == [f"step-{end['steps']:08d}"]
                returned += 1
            elif "KeyboardInterrupt" not in (folder / "stderr.txt").read_text():
                raise RuntimeError((folder / "stderr.txt").read_text())
            tried, lost = tried + 1, lost + (not self.ended(name, folder) or not good)
        return {"tried": tried, "lost": lost, "returned a run with all its steps": returned}

    def every_line(self, most: int | None) -> dict[str, Any]:
        """SIGKILL before every line that Python runs while the third checkpoint is written and the first deleted."""
        name = list(RUNS)[-1]
        folder = self.work / "two-checkpoints"
        finish(*start(name, folder, lambda: die_at_line(1, folder, after=2)))
        counted = self.work / "counted"
        shutil.copytree(folder, counted)
        finish(*start(name, counted, lambda: die_at_line(None, counted, after=0)))
        total = int((counted / "lines.txt").read_text())
        chosen = range(1, total + 1)
        lost = half = 0
        for number in sorted(self.draw.sample(chosen, most)) if most and most < total else chosen:
            place = self.work / f"line-{number}"
            shutil.copytree(folder, place)
            status = finish(*start(name, place, lambda n=number, p=place: die_at_line(n, p, after=0)))
            if status != -signal.SIGKILL:
                raise RuntimeError(f"line {number} of {total} was not reached: {status}")
            half += torn(place)
            lost += not self.ended(name, place)
        tried = min(most or total, total)
        return {"tried": tried, "lines": total, "lost": lost, "left a half-written checkpoint": half}

    def damaged(self, count: int) -> dict[str, Any]:
        """A killed run whose newest checkpoint is then damaged: it goes on from the one before."""
        lost, tried = 0, 0
        kinds = [
            (how, file)
            for file in ("state.safetensors", "state.json", "manifest.json")
            for how in ("cut", "flipped", "missing", "foreign")
        ]
        while tried < count:
            name, folder = self.fresh()
            self.hit(name, folder, signal.SIGKILL, aimed=False)
            found = checkpoints._folders(folder / "c")
            if not found:
                shutil.rmtree(folder)
                continue
            how, file = kinds[tried % len(kinds)]
            self.damage(found[-1] / file, how, name)
            tried, lost = tried + 1, lost + (not self.ended(name, folder, found[-1].name))
        return {"tried": tried, "lost": lost}

    def damage(self, path: Path, how: str, name: str) -> None:
        content = bytearray(path.read_bytes())
        if how == "cut":
            content = content[: self.draw.randrange(len(content))]
        elif how == "flipped":
            while json_same(path, content):  # a flip between two kinds of white space is none
                content = bytearray(path.read_bytes())
                content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        elif how == "foreign":
            other = next(other for other in RUNS if other != name)
            content = (checkpoints._folders(self.whole(other) / "c")[-1] / path.name).read_bytes()
        path.unlink()
        if how != "missing":
            path.write_bytes(content)

    def full_disk(self, count: int) -> dict[str, Any]:
        """A file system, or where none can be mounted a largest file, too small for the run; then there is room."""
        lost = 0
        with small_disk(64) as mounted:
            how = "RLIMIT_FSIZE" if mounted is None else "tmpfs"
        for _ in range(count):
            name, folder = self.fresh()
            whole = checkpoints._folders(self.whole(name) / "c")[-1]
            size = sum(path.stat().st_size for path in whole.iterdir())
            room = 0.9 + RUNS[name][3].get("keep_last", 2)  # while the next is written there are so many and one more
            if how == "tmpfs":
                with small_disk(int(size * self.draw.uniform(1.2, room) / 1024)) as disk:
                    folder.mkdir()
                    (folder / "c").symlink_to(disk)
                    finish(*start(name, folder))
                    (folder / "c").unlink()
                    shutil.copytree(disk, folder / "c")
            else:
                most = int(size * self.draw.uniform(0.01, 0.8))
                finish(*start(name, folder, lambda most=most: limit_after(2, most)))
            said = (folder / "error.txt").read_text() if (folder / "error.txt").exists() else ""
            kept = checkpoints._folders(folder / "c")
            last = kept[-1].name if kept else "none"
            good = "could not write" in said and f"The last checkpoint is {last};" in said
            good = good and all(checkpoints.damage(path) is None for path in kept)
            lost += not self.ended(name, folder) or not good
        return {"tried": count, "lost": lost, "how": how}

    def not_finite(self, count: int) -> dict[str, Any]:
        """One to three bad steps a run; another run with the same ones is killed too and must end like it."""
        tried = lost = runs = 0
        kinds = [f"{where} {value}" for where in ("loss", "gradient") for value in ("nan", "inf")]
        while tried < count:
            name, folder = self.fresh()
            steps = json.loads((self.whole(name) / "end.json").read_text())["steps"]
            # early stopping may stop elsewhere, but not before its patience is over
            places = sorted(self.draw.sample(range(min(steps, 8)), min(self.draw.randrange(1, 4), count - tried)))
            bad = {place: kinds[(tried + i) % len(kinds)] for i, place in enumerate(places)}
            killed, runs = folder.with_name(f"{folder.name}-killed"), runs + 1
            go_on(name, folder, bad)
            moved = (folder / "bad.txt").read_text().split() if (folder / "bad.txt").exists() else []
            self.hit(name, killed, signal.SIGKILL, aimed=False, bad=bad)
            (killed / "end.json").unlink(missing_ok=True)
            go_on(name, killed, bad)
            good = moved == [str(place) for place in places] and same(killed, folder)
            tried, lost = tried + len(bad), lost + (0 if good else len(bad))
            if good:
                shutil.rmtree(folder)
                shutil.rmtree(killed)
        return {"tried": tried, "runs": runs, "lost": lost}

    def under_torchrun(self, kills: int) -> dict[str, Any]:
        """Two processes, "ddp" and "fsdp" in turn; one of them is killed, and torchrun starts both again."""
        tried = lost = 0
        whole = {mode: self.work / f"whole-{mode}" for mode in ("ddp", "fsdp")}
        seconds = {mode: max(end["seconds"] for end in torchrun(mode, folder, {})) for mode, folder in whole.items()}
        steps = len([one for one in json.loads((whole["ddp"] / "end-0.json").read_text())["history"] if "loss" in one])
        for place in range(3 * kills):  # some end before they are hit
            mode, folder = ("ddp", "fsdp")[place % 2], self.work / f"torchrun-{place}"
            moment = self.draw.uniform(0, 1.5 * seconds[mode] / steps)
            kill = f"{self.draw.randrange(2)} {self.draw.randrange(steps)} {moment}"
            ends = torchrun(mode, folder, {"FTLIB_KILL": kill})
            if not (folder / "killed").exists():
                continue
            expected = [json.loads((whole[mode] / f"end-{i}.json").read_text()) for i in (0, 1)]
            good = all({**a, "seconds": 0} == {**b, "seconds": 0} for a, b in zip(ends, expected, strict=True))
            tried, lost = tried + 1, lost + (not good)
            if tried == kills:
                break
        return {"tried": tried, "lost": lost}


def torchrun(mode: str, folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The run of two processes, started again once if one dies; what both ended with."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [__file__, "--process-of", mode, str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stderr[-9000:]}")
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in (0, 1)]


def one_process(mode: str, folder: Path) -> None:
    """One of the processes of `torchrun`; FTLIB_KILL: which one dies, how many seconds after which step begins."""
    from ftlib.engine import distributed

    distributed.start()
    rank, (victim, last, moment) = distributed.rank(), os.environ.get("FTLIB_KILL", "-1 0 0").split()

    def die() -> None:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(gradient: Callable, model: torch.nn.Module, step: Any) -> torch.Tensor:
        if (rank, step.number) == (int(victim), int(last)) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            clock = threading.Timer(float(moment), die)
            clock.daemon = True
            clock.start()
        return gradient(model, step)

    around_steps(watched)
    model = classifier()
    config = ftlib.TrainConfig(
        epochs=3, batch_size=4, micro_batch_size=1, learning_rate=5e-3, distributed=mode, progress=False,
        checkpoint_dir=str(folder / "c"), checkpoint_every=1, resume="auto",
    )  # fmt: skip
    begin = time.perf_counter()
    run = ftlib.fit(model, ONE, eval_dataset=HELD_OUT, config=config)
    history = [{key: value for key, value in record.items() if key != "seconds"} for record in run.history]
    end = {"weights": digest(model.state_dict()), "history": history, "seconds": time.perf_counter() - begin}
    (folder / f"end-{rank}.json").write_text(json.dumps(end))
    distributed.stop()


def untrusted() -> dict[str, Any]:
    """The examples of tests/engine/test_untrusted.py, and how many of its tests failed."""
    tests = Path(__file__).parents[1] / "engine/test_untrusted.py"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-show-statistics"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, str(tests)], capture_output=True, text=True)
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+) passing, (\d+) failing", done.stdout)]
    passed, failed = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    broken = sum(map(int, re.findall(r"(\d+) (?:failed|error)", done.stdout.splitlines()[-1])))
    if done.returncode not in (0, 1) or not passed:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return {"tried": passed + failed, "lost": max(failed, broken)}


def json_same(path: Path, content: bytearray) -> bool:
    """Whether the changed content of a file says what it said."""
    if path.suffix != ".json":
        return bytes(content) == path.read_bytes()
    try:
        return json.loads(content) == json.loads(path.read_bytes())
    except ValueError:
        return False


@contextmanager
def small_disk(kilobytes: int):
    """A file system of that size in memory; None where this user may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "ftlib-faults", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def limit_after(saves: int, size: int) -> None:
    """After so many checkpoints no file of this process may become larger than `size` bytes."""
    aside, count = checkpoints.aside, Counter()

    @contextmanager
    def limited(path: Path):
        count["saves"] += 1
        if count["saves"] > saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with aside(path) as temporary:
            yield temporary
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoints.aside = limited


def die_at_line(number: int | None, folder: Path, after: int) -> None:
    """SIGKILL before line `number` (None: count them) that the writing of a checkpoint runs, `after` so many others."""
    traced = {checkpoints.__file__, files.__file__, shutil.__file__}
    save, count = checkpoints.Checkpoints.save, Counter()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in traced or frame.f_code.co_name.endswith("comp>"):
            return None
        if event == "line":
            count["lines"] += 1
            if count["lines"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def saving(*parts: Any, **options: Any) -> Path:
        count["saves"] += 1
        if count["saves"] <= after:
            return save(*parts, **options)
        sys.settrace(trace)
        try:
            return save(*parts, **options)
        finally:
            sys.settrace(None)
            if number is None:
                (folder / "lines.txt").write_text(str(count["lines"]))
                os._exit(0)

    checkpoints.Checkpoints.save = saving


# ------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments, half of them in a write")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose names begin with this")
    parser.add_argument("--results", type=Path, help="folder for faults.json; default: that of the other results")
    parser.add_argument("--process-of", nargs=2, help=argparse.SUPPRESS)  # how this program starts itself
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.process_of:
        one_process(options.process_of[0], Path(options.process_of[1]))
        return 0
    half = 3 if options.quick else options.kills // 2
    lines, interrupts, disks, damages, steps = (8, 4, 3, 4, 4) if options.quick else (None, half, 20, 60, half)
    work = Path(tempfile.mkdtemp(prefix="ftlib-faults-"))
    command = f"python tests/benchmarks/faults.py --kills {options.kills} --seed {options.seed}"
    table = None
    if options.results or not options.quick:
        about = "Faults tried on training runs of fit, and whether the run ended as the undisturbed one"
        table = Table("faults", command, about, folder=options.results or RESULTS)
    trials = Trials(work, options.seed)
    faults = {
        "SIGKILL at a random moment": lambda: trials.killed(half, aimed=False),
        "SIGKILL while a checkpoint is written": lambda: trials.killed(half, aimed=True),
        "SIGKILL before each line of the writing": lambda: trials.every_line(lines),
        "Ctrl-C at a random moment": lambda: trials.interrupted(interrupts),
        "a full disk": lambda: trials.full_disk(disks),
        "the newest checkpoint damaged": lambda: trials.damaged(damages),
        "a loss or gradient that is NaN or infinite": lambda: trials.not_finite(steps),
    }
    if not options.quick:
        faults |= {
            "SIGKILL of one of two processes under torchrun": lambda: trials.under_torchrun(20),
            "files, data and settings made to break it": untrusted,
        }
    lost = 0
    for fault in (fault for fault in faults if fault.startswith(options.only)):
        begin = time.perf_counter()
        row = faults[fault]()
        row |= {"survived": row["tried"] - row["lost"], "seconds": time.perf_counter() - begin}
        lost += row["lost"]
        print(f"{fault}: {row}", flush=True)
        if table:
            table.replace({"fault": fault}, [row])
    if not lost:
        shutil.rmtree(work)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
