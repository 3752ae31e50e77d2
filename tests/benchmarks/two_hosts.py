"""Train on two hosts, break the network or a host in the middle, start again, and compare with one undisturbed process.

    python tests/benchmarks/two_hosts.py                    # rows of results/two_hosts.json; a quarter of an hour
    python tests/benchmarks/two_hosts.py --only "the link"  # only the cases whose names begin so
    python tests/benchmarks/two_hosts.py --toy              # losses, one fault, half a minute; stores nothing

Needs root and Linux: a host is a process with its own network, host name and mounts (unshare), and the two are joined
by a veth pair (ip).  Where that is not allowed it says so and ends with status 3.  On each, the guide's line for two
machines trains a tiny random model: `torchrun` with c10d rendezvous at node1:29500, gloo between the processes, ftlib's
own command line.  Model, corpus, run.toml and caches are each host's own; only `output` is shared.

A fault counts as survived when the model, the metrics and the last checkpoint (weights, Adam's moments, random state,
the losses of all steps) end with the SHA-256 of the undisturbed run's.  A run that ended in an error is started again
for that.  Lost: other bits, no error that says what is wrong, or no end within RETRIES seconds.

Nothing stays behind: everything dies with this program, even when that is killed (PR_SET_PDEATHSIG), and a network
without processes is gone.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from record import RESULTS, Table

ROOT = Path(__file__).resolve().parents[2]
LINE = "torchrun --nnodes 2 --nproc-per-node {count} --rdzv-id run1 --rdzv-backend c10d --rdzv-endpoint {where}"
RETRIES = {8: 200, 15: 1200}  # net.ipv4.tcp_retries2: seconds from the fault to the end of both; more is a hang
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
NOBODY = "02:00:00:00:00:99"  # a hardware address: what is sent there is lost without a word


# ------------------------------------------------------------------------------------------------------- two hosts


def tied(*command: str) -> list[str]:
    """The command, killed when this program ends."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


class Host:
    """A network, a host name and mounts of its own, held by a process that sleeps."""

    wait = 20  # FTLIB_TIMEOUT: seconds in which a process gives the other up; the default is 10 minutes
    retries = 8  # net.ipv4.tcp_retries2: a dead connection is given up after 102 seconds; with the kernel's 15, 924

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESSES.items()))
        steps = [f"hostname {name}", f"mount --bind {folder}/hosts /etc/hosts", "ip link set lo up"]
        steps += [f"echo {self.retries} > /proc/sys/net/ipv4/tcp_retries2", "echo up", "exec cat"]
        command = tied("unshare", "--net", "--uts", "--mount", "sh", "-c", " && ".join(steps))
        self.holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if self.holder.stdout.readline() != "up\n":
            raise PermissionError(self.holder.communicate()[1].strip())
        self.runs: list[subprocess.Popen] = []

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "--net", "--uts", "--mount", f"--wd={self.folder}", *command]

    def sh(self, *commands: str) -> None:
        for command in commands:
            done = subprocess.run(self.inside(*command.split()), capture_output=True, text=True)
            if done.returncode:
                raise PermissionError(f"{self.name}: {command}: {done.stderr.strip()}")

    def train(self, count: int = 1, where: str = "node1:29500", log: str = "log", more: str = "", **more_env: str):
        """The guide's line, in a process tree that dies with its first."""
        line = LINE.format(count=count, where=where).split()[1:] + more.split()
        command = [sys.executable, "-m", "torch.distributed.run", *line, "-m", "ftlib", "train", "run.toml"]
        own = {
            "HF_HOME": str(self.folder / "huggingface"), "FTLIB_DATA": str(self.folder / "data"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
            "FTLIB_TIMEOUT": str(self.wait),
        }  # fmt: skip
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        apart += ["true & wait; " * len(self.runs) + '"$@"; exit $?', "sh"]  # torchrun knows machines by name and pid
        with open(self.folder / f"{log}.txt", "a") as file:
            run = subprocess.Popen(
                tied(*self.inside(*apart, *command)), stdout=file, stderr=file,
                env=os.environ | own | more_env, start_new_session=True,
            )  # fmt: skip
        self.runs.append(run)
        return run

    def kill(self) -> None:
        for run in self.runs:
            if run.poll() is None:
                run.kill()  # --kill-child: with it, all of its process tree
                run.wait()

    def close(self) -> None:
        self.kill()
        self.holder.kill()
        self.holder.wait()


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


class Pair:
    """Two hosts and the link between them."""

    def __init__(self, work: Path, hosts: dict[str, Host]):
        self.work, self.hosts = work, hosts
        self.one, self.two = hosts.values()
        self.one.sh(f"ip link add eth0 type veth peer name eth0 netns {self.two.holder.pid}")
        for name, host in hosts.items():
            host.sh(f"ip addr add {ADDRESSES[name]}/24 dev eth0", "ip link set eth0 up")

    def down(self) -> None:
        self.two.sh("ip link set eth0 down")

    def up(self) -> None:
        """Whether it was down or dead."""
        for host in (self.one, self.two):
            host.sh("ip link set eth0 up", "ip neigh flush dev eth0 nud permanent")

    def drop(self) -> None:
        """All frames are lost, both ways, as `tc qdisc add dev eth0 root netem loss 100%` does where it is built in."""
        for host, other in ((self.one, "node2"), (self.two, "node1")):
            host.sh(f"ip neigh replace {ADDRESSES[other]} lladdr {NOBODY} dev eth0 nud permanent")


@contextmanager
def two_hosts(work: Path):
    """PermissionError where this user, kernel or container may not have them."""
    with ExitStack() as stack:
        hosts = {}
        for name in ADDRESSES:
            hosts[name] = Host(name, work / name)
            stack.callback(hosts[name].close)
        yield Pair(work, hosts)


# --------------------------------------------------------------------------------------------------------- the run


def prepare(
    folder: Path, output: Path, mode: str, *, dropout: float = 0.1, width: int = 32, tune: str = "full", **train: Any
) -> None:
    """Model, corpus and run.toml in a host's own folder."""
    import torch
    from bert_base import word_tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width)
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    model = BertModel(BertConfig(vocab_size=69, max_position_embeddings=40, **sizes, **drops))
    model.save_pretrained(folder / "model")
    word_tokenizer(words=64).save_pretrained(folder / "model")
    draw = random.Random(0)
    (folder / "corpus").mkdir()
    for split, count in (("train", 240), ("validation", 30)):
        rows = []
        for _ in range(count):
            words = [draw.randrange(64) for _ in range(draw.randrange(2, 12))]
            label = ("low", "high")[sum(words) / len(words) > 32]
            rows.append(json.dumps({"text": " ".join(f"w{i}" for i in words), "label": label}) + "\n")
        (folder / f"corpus/{split}.jsonl").write_text("".join(rows))
    keys = {"model": "./model", "task": "sequence-classification", "corpus": "./corpus", "output": str(output)}
    usual = {"epochs": 3, "batch_size": 4, "checkpoint_every": 10, "learning_rate": 1e-3, "precision": "fp32"}
    train = usual | {"distributed": mode} | train
    lines = [f"{key} = {json.dumps(value)}" for key, value in (keys | {"tune": tune}).items()]
    lines += ["[train]", *(f"{key} = {json.dumps(value)}" for key, value in train.items())]
    (folder / "run.toml").write_text("\n".join(lines) + "\n")


def numbers(output: Path) -> Any:
    """The last checkpoint's state without seconds: the record of every step is in it."""
    last = max((output / "checkpoints").glob("step-*"))
    drop = {"seconds", "checkpoint_dir"}
    return json.loads((last / "state.json").read_text(), object_hook=lambda d: {k: d[k] for k in d if k not in drop})


def losses(output: Path) -> list[float]:
    """The loss of every step."""

    def found(value: Any) -> list[float]:
        if isinstance(value, dict):
            own = [value["loss"]] if "loss" in value and "step" in value else []
            return own + [loss for one in value.values() for loss in found(one)]
        return [loss for one in value for loss in found(one)] if isinstance(value, list) else []

    return found(numbers(output))


def digest(output: Path) -> str:
    """SHA-256 of the model, the metrics and the last checkpoint; of seconds nothing."""
    metrics = json.loads((output / "metrics.json").read_text())
    found = hashlib.sha256(json.dumps([metrics | {"seconds": 0}, numbers(output)], sort_keys=True).encode())
    for path in (output / "model/model.safetensors", max((output / "checkpoints").glob("step-*/state.safetensors"))):
        found.update(path.read_bytes())
    return found.hexdigest()


class Run:
    """The run of two hosts, on its way."""

    def __init__(self, pair: Pair, mode: str, count: int = 1, **settings: Any):
        self.pair, self.count, self.output = pair, count, pair.work / "output"
        for host in pair.hosts.values():
            prepare(host.folder, self.output, mode, **settings)
        self.since = time.monotonic()

    def start(self, **options: Any) -> None:
        for host in self.pair.hosts.values():
            host.train(self.count, **options)

    def reach(self, step: int = 30) -> None:
        """Wait until the checkpoint of that step is there: the next steps are on their way."""
        end = time.monotonic() + 100
        while not (self.output / f"checkpoints/step-{step:08d}").exists():
            if time.monotonic() > end:
                raise RuntimeError(f"no step {step} in 100 seconds; see the logs in {self.pair.work}")
            time.sleep(0.02)
        self.since = time.monotonic()

    def wait(self) -> tuple[list[int | None], float]:
        """Exit status of each host's torchrun (None: it hangs), and seconds from `since` until the last ended."""
        runs = [host.runs[-1] for host in self.pair.hosts.values()]
        while any(run.poll() is None for run in runs) and time.monotonic() - self.since < RETRIES[Host.retries]:
            time.sleep(0.1)
        return [run.poll() for run in runs], time.monotonic() - self.since

    def said(self) -> list[str]:
        return [path.read_text() for path in sorted(self.pair.work.glob("node*/log.txt"))]


@contextmanager
def run_of(work: Path, mode: str, **settings: Any):
    with two_hosts(work) as pair:
        yield Run(pair, mode, **settings)


def undisturbed(work: Path, mode: str) -> Path:
    """Its output; made once."""
    if not (work / "output/metrics.json").exists():
        with run_of(work, mode) as run:
            run.start()
            statuses, _ = run.wait()
            if statuses != [0, 0]:
                raise RuntimeError(f"ended with {statuses}; see the logs in {work}")
    return work / "output"


def alone(work: Path, **settings: Any) -> Path:
    """One process on one host."""
    with two_hosts(work) as pair:
        prepare(pair.one.folder, work / "output", "ddp", **settings)
        command = [sys.executable, "-m", "ftlib", "train", "run.toml"]
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=pair.one.folder, env=os.environ | own, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
    return work / "output"


def difference(found: list[float], expected: list[float]) -> float:
    """The largest of two runs' losses; one of other length is an error, none at all as well."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def same_losses(work: Path, count: int = 2) -> list[dict[str, Any]]:
    """Two hosts of `count` processes each, without dropout, whose random numbers are each process's own."""
    rows = []
    # Adam divides by the gradient's size, so what is rounding elsewhere grows over the steps
    for optimizer, rate, most in (("sgd", 0.05, 1e-6), ("adamw", 1e-3, 1e-5)):
        settings = {"dropout": 0.0, "optimizer": optimizer, "learning_rate": rate}
        expected = losses(alone(work / f"alone-{optimizer}", **settings))
        for mode in ("ddp", "fsdp"):
            with run_of(work / f"{mode}-{optimizer}", mode, count=count, **settings) as run:
                run.start()
                statuses, seconds = run.wait()
                if statuses != [0, 0]:
                    raise RuntimeError(f"ended with {statuses}; see the logs in {run.pair.work}")
                found = losses(run.output)
            apart = difference(found, expected)
            rows.append({"distributed": mode, "optimizer": optimizer, "processes": 2 * count, "steps": len(found)})
            rows[-1] |= {"largest difference": apart, "lost": int(apart > most), "seconds": round(seconds, 1)}
    return rows


def traffic(work: Path) -> list[dict[str, Any]]:
    """Bytes that one of two processes sends a step: those of 25 steps less those of 5, over 20."""
    rows = []
    for mode in ("ddp", "fsdp"):
        for tune, micro in (("full", 2), ("full", 1), ("lora", 2)):
            sent = {}
            for steps in (5, 25):
                settings = dict(width=256, tune=tune, micro_batch_size=micro, max_steps=steps, checkpoint_every=1000)
                with run_of(work / f"bytes-{mode}-{tune}-{micro}-{steps}", mode, **settings) as run:
                    run.start()
                    if (statuses := run.wait()[0]) != [0, 0]:
                        raise RuntimeError(f"ended with {statuses}; see the logs in {run.pair.work}")
                    command = run.pair.one.inside("ip", "-s", "-j", "link", "show", "eth0")
                    about = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    sent[steps] = about[0]["stats64"]["tx"]["bytes"]
                    counts = re.search(r"^all +([\d,]+) +([\d,]+)", run.said()[0], re.MULTILINE).groups()
            trainable, every = (int(count.replace(",", "")) for count in counts)
            row = {"distributed": mode, "tune": tune, "micro-batches": 2 // micro}
            rows.append(row | {"trainable": trainable, "parameters": every, "bytes": (sent[25] - sent[5]) / 20})
    return rows


# ---------------------------------------------------------------------------------------------------------- faults

LOST = "lost another process, or waited more than FTLIB_TIMEOUT"  # what ftlib says
NO_STORE = "The connection to the C10d store has failed"  # what torchrun says


def frozen(run: Run, seconds: float = 15) -> None:
    pids = tree(run.pair.two.runs[-1].pid)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds if number == signal.SIGSTOP else 0)


def slow(run: Run) -> None:
    for host in run.pair.hosts.values():
        host.sh("tc qdisc add dev eth0 root tbf rate 5mbit burst 16kb latency 400ms")


def dropped(run: Run, seconds: float | None = None) -> None:
    run.pair.drop()
    if seconds:
        time.sleep(seconds)
        run.pair.up()


def returned(run: Run) -> None:
    """The machine without the endpoint dies, and is started again by itself: c10d still counts the dead one in."""
    run.pair.two.kill()
    time.sleep(5)
    run.pair.two.train(more="--max-restarts 3")


RETRY = {"more": "--max-restarts 3"}
# name: (what happens to the run at step 30, options of the start, what the hosts must say in an error; None: no error)
FAULTS: dict[str, tuple[Callable[[Run], Any], dict[str, str], tuple[str, str] | None]] = {
    "the link cut (`ip link set down`)": (lambda run: run.pair.down(), {}, (LOST, LOST)),
    "the link dead without a word": (dropped, {}, (LOST, LOST)),
    "the link dead for 10 seconds": (lambda run: dropped(run, 10), {}, None),
    "the link dead for 35 seconds, `--max-restarts 3`": (lambda run: dropped(run, 35), RETRY, None),
    "SIGKILL of the other machine": (lambda run: run.pair.two.kill(), {}, (LOST, "")),
    "SIGKILL of the machine of the endpoint": (lambda run: run.pair.one.kill(), {}, ("", NO_STORE)),
    "SIGKILL of the other machine, its line given again, `--max-restarts 3`": (returned, RETRY, ("DistStoreError", "")),
    "one machine stands still for 15 seconds (SIGSTOP)": (frozen, {}, None),
    "a slow link (5 Mbit/s, 0.4 s of queue)": (slow, {}, None),
}


def fault(name: str, work: Path, tries: int) -> dict[str, Any]:
    """DDP and FSDP in turn."""
    act, options, errors = FAULTS[name]
    lost, times, remedies = 0, [], 0
    for number in range(tries):
        mode = ("ddp", "fsdp")[number % 2]
        expected = digest(undisturbed(work / f"whole-{mode}", mode))
        with run_of(work / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{number}", mode) as run:
            run.start(**options)
            run.reach()
            act(run)
            statuses, seconds = run.wait()
            good = None not in statuses and any(statuses) == (errors is not None)
            good = good and all(word in text for word, text in zip(errors or ("", ""), run.said(), strict=True))
            if good and errors:
                good = mended(run)
            good = good and digest(run.output) == expected
        times.append(round(seconds, 1))
        remedies += errors is not None
        if not good:
            lost += 1
            print(f"LOST: {name}, {mode}: ended with {statuses}; kept in {run.pair.work}", file=sys.stderr)
    row = {"tried": tries, "survived": tries - lost, "lost": lost, "seconds": times}
    return row | {"started again": remedies}


def mended(run: Run, **environment: str) -> bool:
    """The network is whole, what hung is gone, the same line is given on both hosts; whether that ends well."""
    for host in run.pair.hosts.values():
        host.kill()
    run.pair.up()
    run.since = time.monotonic()
    run.start(log="again", **environment)
    return run.wait()[0] == [0, 0]


def late(work: Path, tries: int) -> dict[str, Any]:
    """The second machine's line is given 20 seconds after the first's."""
    lost, times = 0, []
    for number in range(tries):
        mode = ("ddp", "fsdp")[number % 2]
        expected = digest(undisturbed(work / f"whole-{mode}", mode))
        with run_of(work / f"late-{number}", mode) as run:
            run.pair.one.train()
            time.sleep(20)
            run.pair.two.train()
            statuses, seconds = run.wait()
            lost += statuses != [0, 0] or digest(run.output) != expected
        times.append(round(seconds, 1))
    return {"tried": tries, "survived": tries - lost, "lost": lost, "seconds": times, "started again": 0}


def once(what: str, good: bool, statuses: list[int], seconds: float, run: Any) -> dict[str, Any]:
    """The row of a fault tried once, after which all was started again."""
    if not good:
        print(f"LOST: {what}: ended with {statuses}; kept in {run.pair.work}", file=sys.stderr)
    counts = {"tried": 1, "survived": int(good), "lost": int(not good)}
    return counts | {"seconds": [round(seconds, 1)], "started again": 1}


def wrong(where: str, said: str, work: Path) -> dict[str, Any]:
    """The second machine is given another endpoint; then the right one.  The first waits, no longer than it is told."""
    expected = digest(undisturbed(work / "whole-ddp", "ddp"))
    with run_of(work / re.sub("[^a-z0-9]+", "-", where), "ddp") as run:
        run.pair.one.train(more="--rdzv-conf join_timeout=60")
        run.pair.two.train(where=where)
        statuses, seconds = run.wait()
        texts = run.said()
        good = statuses == [1, 1] and "RendezvousTimeoutError" in texts[0] and said in texts[1]
        good = good and mended(run) and digest(run.output) == expected
    return once(where, good, statuses, seconds, run)


def loopback(work: Path) -> dict[str, Any]:
    """As Debian has it: a machine's own name is 127.0.1.1, where gloo then waits for the others."""
    expected = digest(undisturbed(work / "whole-ddp", "ddp"))
    with run_of(work / "loopback", "ddp") as run:
        for name, host in run.pair.hosts.items():
            own = "".join(f"{address} {other}\n" for other, address in ADDRESSES.items() if other != name)
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{own}")
        run.start()
        statuses, seconds = run.wait()
        good = statuses == [1, 1] and any("GLOO_SOCKET_IFNAME=eth0" in text for text in run.said())
        good = good and mended(run, GLOO_SOCKET_IFNAME="eth0") and digest(run.output) == expected
    return once("loopback", good, statuses, seconds, run)


def toy(work: Path) -> dict[str, Any]:
    """One host killed, both started again: the losses of one process, which nothing happened to."""
    settings = {"dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.05, "epochs": 1}
    expected = losses(alone(work / "alone", **settings))
    with run_of(work / "two", "ddp", **settings) as run:
        run.start()
        run.reach()
        run.pair.two.kill()
        statuses, seconds = run.wait()
        good = 0 not in statuses and LOST in run.said()[0] and mended(run)
        apart = difference(losses(run.output), expected) if good else None
    return {"largest difference": apart, "lost": int(not good or apart > 1e-6), "seconds": round(seconds, 1)}


# ------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names begin with this")
    parser.add_argument("--tries", type=int, default=2, help="of each fault, DDP and FSDP in turn")
    parser.add_argument("--retries", type=int, default=8, choices=RETRIES, help="net.ipv4.tcp_retries2 of both hosts")
    parser.add_argument("--toy", action="store_true", help="one comparison of losses and one fault")
    parser.add_argument("--results", type=Path, help="folder for two_hosts.json; default: that of the other results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is closed
    Host.retries = options.retries
    work = Path(tempfile.mkdtemp(prefix="ftlib-two-hosts-"))
    try:
        with two_hosts(work / "try"):
            pass
    except (OSError, subprocess.SubprocessError) as error:
        print(f"skipped: two hosts need Linux, root, network namespaces and iproute2: {error}")
        shutil.rmtree(work)
        return 3
    table = None
    if options.results or not options.toy:
        about = "Two hosts joined by a veth pair: losses as one process's, and faults of network and hosts"
        command = "python tests/benchmarks/two_hosts.py"
        table = Table("two_hosts", command, about, folder=options.results or RESULTS)
        table.stamp |= {"FTLIB_TIMEOUT": Host.wait}
    cases: dict[str, Callable[[], Any]] = {"the same losses as one process": lambda: same_losses(work)}
    cases["bytes a step"] = lambda: traffic(work)
    cases |= {name: lambda name=name: fault(name, work, options.tries) for name in FAULTS}
    cases |= {
        "the other machine comes 20 seconds late": lambda: late(work, options.tries),
        "a machine's own name is 127.0.1.1, as on Debian": lambda: loopback(work),
        "the wrong port, `join_timeout=60`": lambda: wrong("node1:29999", "(node1, 29999)", work),
        "the wrong name, `join_timeout=60`": lambda: wrong("node9:29500", "node9", work),
    }
    if options.toy:
        Host.wait = 120  # on a machine that does much else; nothing waits so long
        cases = {"toy": lambda: toy(work)}
    lost = 0
    for case in (case for case in cases if case.startswith(options.only)):
        rows = cases[case]()
        rows = rows if isinstance(rows, list) else [rows]
        lost += sum(row.get("lost", 0) for row in rows)
        if table:
            table.replace({"fault": case, "tcp_retries2": Host.retries}, rows)
        else:
            print(case, rows, flush=True)
    if not lost:
        shutil.rmtree(work)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
