"""Supervised fine-tuning of SmolLM2-135M against TRL's SFTTrainer and a plain loop: tokens a second, memory, exactness.

    python tests/benchmarks/language_model.py    # writes results/language_model-<CPU>.json; goes on the same day

Real weights; the rows are questions of atis and their intent and slots as JSON, behind the chat template's system and
user turn: the answer is trained, the prompt is not.  16 rows a step, on a CPU even where there is a GPU.  All ways have
the same rows in the same batches (but where a setting of TRL's makes its own: packing, grouping by length), the same
trained tokens, rate, AdamW and clipping.  LoRA: rank 8 on the query and value projections.

Each way is a process of its own.  They take turns, a step each, so that a round is the same batch for all of them; the
first step, with all that is prepared in it, is left out.  At most four processes are there at once, as more do not fit
into 24 GB: three groups, each with TRL as it comes.  Seconds are of a step whole: batch, forward and backward pass,
clipping, optimizer (TRL fetches the next batch between the steps, unmeasured).  Tokens are those of the rows, padding
not counted.  Peak memory is of the whole process; and less what it held with the model loaded.  Exactness: how far the
loss of a step is at most from that of the plain loop in float32 with the same batches; of ways with other batches, how
far the first loss is from the same rows' loss one by one.

TRL's best settings are searched first, one of TRL_SETTINGS after the other, a measured step each: all of them for
LoRA, the three fastest of these for full fine-tuning.  Not among them: torch_compile (it compiles
for longer than these few steps take, and anew for other shapes), Liger's kernels (they are Triton's, for GPUs), further
processes that load data (the rows are tokenized already).
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch starts
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import decoders
import torch
from paired import spread
from record import RESULTS, Table, device_slug

import ftlib

PARTS = ("lora", "full")
BATCH = 16
ASKED = "Answer with one JSON object: the intent of the question, and its slots by name."
PACKED = {"packing": True, "per_device_train_batch_size": 2}  # of max_length=1024: about the tokens of 16 rows
FOURS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
NO_CHECKPOINTS = {"gradient_checkpointing": False}
DEFAULT, BEST = "TRL, as it comes", "TRL, best settings found"
PLAIN, SINGLE = "plain loop, float32", "ftlib.fit, unpad, float32"
LOOPS = (PLAIN, "plain loop, bf16")
OURS = ("ftlib.fit, unpad", "ftlib.fit, unpad, gradient_checkpointing")
SMALL = "ftlib.fit, unpad, max_tokens=512"
TRL_SETTINGS: dict[str, dict[str, Any]] = {  # what a careful user would try on a CPU
    DEFAULT: {},  # bf16, gradient checkpointing, SDPA, fused AdamW
    "TRL, packing": PACKED,
    "TRL, packing, wrapped": PACKED | {"packing_strategy": "wrapped"},
    "TRL, no checkpointing": NO_CHECKPOINTS,
    "TRL, no checkpointing, float32": NO_CHECKPOINTS | {"bf16": False},
    "TRL, no checkpointing, by length": NO_CHECKPOINTS | {"train_sampling_strategy": "group_by_length"},
    "TRL, no checkpointing, padding_free": NO_CHECKPOINTS | {"padding_free": True, "max_length": None},
    "TRL, no checkpointing, packing": NO_CHECKPOINTS | PACKED,
    "TRL, no checkpointing, 4 x 4 rows": NO_CHECKPOINTS | FOURS,  # pads less
    "TRL, no checkpointing, 4 x 4 rows, eager": NO_CHECKPOINTS | FOURS | {"attn_implementation": "eager"},
}
OTHERS: dict[str, Any] = {
    LOOPS[0]: functools.partial(decoders.plain, bf16=False),
    LOOPS[1]: functools.partial(decoders.plain, bf16=True),
    SINGLE: functools.partial(decoders.fit, precision="fp32"),
    OURS[0]: decoders.fit,
    OURS[1]: functools.partial(decoders.fit, gradient_checkpointing=True),
    SMALL: functools.partial(decoders.fit, max_tokens=512),
}
EXACT = 0.05  # a loss further from the right one than bf16 rounds it is of another sum


# ---------------------------------------------------------------------------------------------------------- the rows


def answer(row: dict[str, Any], tags: list[str], intents: list[str]) -> str:
    """{"intent": ..., "slots": {name: words, or a list of them}} of a sentence with BIO tags."""
    slots: dict[str, list[str]] = {}
    for word, tag in zip(row["tokens"], (tags[number] for number in row["tags"]), strict=True):
        if tag.startswith("B-"):
            slots.setdefault(tag[2:], []).append(word)
        elif tag.startswith("I-") and tag[2:] in slots:
            slots[tag[2:]][-1] += f" {word}"
    named = {name: words[0] if len(words) == 1 else words for name, words in slots.items()}
    return json.dumps({"intent": intents[row["intent"]], "slots": named})


def texts(count: int, tokenizer: Any) -> list[dict[str, str]]:
    """Prompt and completion of the first sentences of atis; the prompt ends where the template asks for the answer."""
    data = ftlib.load_corpus("atis")["train"].select(range(count))
    tags, intents = data.features["tags"].feature.names, data.features["intent"].names
    out = []
    for row in data:
        turns = [{"role": "system", "content": ASKED}, {"role": "user", "content": row["text"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        out.append({"prompt": prompt, "completion": answer(row, tags, intents)})
    return out


def work(part: str, steps: int, toy: bool) -> decoders.Work:
    import datasets

    tokenizer = ftlib.load_tokenizer("smollm2")
    pairs = texts(BATCH * (steps + 1), tokenizer)  # more than are needed: those who pack have full packs to the end
    rows = ftlib.tokenize(datasets.Dataset.from_list(pairs), tokenizer, task="causal-lm")
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    first = rows[0]["input_ids"][:8]
    assert all(row["input_ids"][:8] == first for row in rows)
    load = functools.partial(tiny if toy else ftlib.load_model, "smollm2", task="causal-lm")
    return decoders.Work(load, rows, tokenizer, steps, BATCH, decoders.RATES[part], part, pairs, first)


def tiny(name: str, task: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=49_152, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True))


def lengths(one: decoders.Work) -> dict[str, Any]:
    """How long the rows are, and what share of the padded batches is padding."""
    rows = [row for batch in one.batches for row in batch]
    found = sorted(len(row["input_ids"]) for row in rows)
    padded = sum(len(batch) * max(len(row["input_ids"]) for row in batch) for batch in one.batches)
    tokens, trained = decoders.sizes(rows)
    places = {"min": 0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "max": 1}
    quartiles = {name: found[round(place * (len(found) - 1))] for name, place in places.items()}
    return quartiles | {"mean": tokens / len(found), "padding": 1 - tokens / padded, "trained": trained / tokens}


# ------------------------------------------------------------------------------------------------------ one process


class Turns(decoders.Gate):
    """Waits for a line before each step, and answers with a line after it."""

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit("nobody asks for a step any more")
        super().begin()

    def end(self, loss: Any, rows: Any) -> None:
        super().end(loss, rows)
        say(self.steps[-1])


def say(what: dict[str, Any]) -> None:
    print(f"@{json.dumps(what)}", flush=True)


def serve(args: argparse.Namespace) -> None:
    """One way, a step whenever it is asked for; then its peak memory."""
    from ftlib.show.measuring import _status_mb

    one = work(args.part, args.steps, args.toy)
    way = OTHERS.get(args.serve) or functools.partial(decoders.trl, **args.settings)
    model = one.make_model()
    sum(p.sum() for p in model.parameters())  # weights in a mapped file are not resident before they are read
    run = way(dataclasses.replace(one, make_model=lambda: model))
    before = _status_mb("VmRSS")
    say({"ready": True})
    with ftlib.measure() as cost:
        found = run(Turns())
    say(found | {"peak_mb": cost.peak_mb, "above_mb": cost.peak_mb - before})


class Process:
    """A way in its process, seen from outside."""

    def __init__(self, name: str, part: str, settings: dict[str, Any], steps: int, toy: bool):
        command = [sys.executable, __file__, "--serve", name, "--part", part, "--settings", repr(settings)]
        command += ["--steps", str(steps), *(["--toy"] if toy else [])]
        self.said = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.said, text=True)
        self.steps: list[dict[str, Any]] = []
        self.missing = ""
        self.settings = settings

    def read(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        code = self.process.wait()
        why = "killed, as where memory runs out" if code == -9 else lines[-1][:300]
        self.missing = f"ended with {code}: {why}"
        print("\n".join(lines[-20:]), file=sys.stderr)
        return {}

    def step(self) -> None:
        if self.missing:
            return
        with contextlib.suppress(BrokenPipeError):  # it has died meanwhile: what it said is read now
            print(file=self.process.stdin, flush=True)
        if record := self.read():
            self.steps.append(record)

    def end(self) -> dict[str, Any]:
        found = {"missing": self.missing} if self.missing else self.read()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        return found


def compared(part: str, names: dict[str, dict[str, Any]], rounds: int, toy: bool) -> list[dict]:
    """A row a way: 1 + `rounds` steps each, in turn."""
    ways = {name: Process(name, part, settings, rounds + 1, toy) for name, settings in names.items()}
    for way in ways.values():
        way.read()  # that it is ready
    for _ in range(rounds + 1):
        for way in ways.values():
            way.step()
    found = {name: way.end() for name, way in ways.items()}
    rates = {n: [one["tokens"] / one["seconds"] for one in way.steps[1:]] for n, way in ways.items() if not way.missing}
    rows = []
    for name, way in ways.items():
        if way.missing:
            rows.append({"method": name, "missing": way.missing})
            continue
        losses, alone = [one["loss"] for one in way.steps], found[name].pop("alone", None)
        row = {"method": name, "per_second": statistics.median(rates[name]), "rounds": rounds} | found[name]
        row["against"] = {
            base: spread([a / b for a, b in zip(rates[name], rates[base], strict=True)])
            for base in (DEFAULT, BEST)
            if base in rates
        }
        row |= {"settings": way.settings, "losses": losses, "steps": way.steps}
        if alone is not None:
            row["off_alone"] = abs(losses[0] - alone)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ all of them


def fastest(rows: list[dict[str, Any]]) -> list[str]:
    """The settings whose loss is the right one, the fastest first."""
    right = [row for row in rows if "missing" not in row and row.get("off_alone", 0.0) < EXACT]
    return [row["method"] for row in sorted(right, key=lambda row: -row["per_second"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a tiny model, one round: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--serve", help="this way, a step for each line it reads")
    parser.add_argument("--settings", type=ast.literal_eval, default={}, help="of TRL, with --serve")
    parser.add_argument("--steps", type=int, help="with --serve")
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    if args.toy and args.results == RESULTS:
        parser.error("--toy needs --results FOLDER: toy numbers are no results")
    rounds = 1 if args.toy else args.rounds
    command = "python tests/benchmarks/language_model.py"
    about = "SmolLM2-135M fine-tuned on atis as JSON: TRL, a plain loop and ftlib, paired rounds"
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    name = f"language_model-{device_slug()}"
    table = Table(name, command, about, packages=packages, folder=args.results)
    table.stamp |= {"command": command, "threads": torch.get_num_threads()}
    for part in PARTS if args.part is None else (args.part,):
        measure(part, rounds, args.toy, table)


def measure(part: str, rounds: int, toy: bool, table: Table) -> None:
    """Search and comparison; what was measured today with these versions stays, by group."""

    def unit(name: str, groups: list[dict[str, dict]], rounds: int) -> list[dict]:
        """The rows of one comparison: those that are there, and new ones; few processes at a time fit into memory."""
        wanted = {method: settings for group in groups for method, settings in group.items()}
        held = [row for row in chosen(table, part=name, **table.stamp) if "missing" not in row]
        rows = {row["method"]: row for row in held if row["settings"] == wanted.get(row["method"])}
        words = f"SmolLM2-135M, {'LoRA' if part == 'lora' else 'full fine-tuning'}, {BATCH} rows a step"
        same = {"work": words, "lengths": lengths(work(part, rounds + 1, toy))}
        for group in groups:
            if not {*group} <= {*rows}:
                rows = {row["method"]: row for row in compared(part, group, rounds, toy)} | rows
                compare_losses(rows)
                table.replace({"part": name}, [same | rows[method] for method in wanted if method in rows])
        return chosen(table, part=name)

    settings = TRL_SETTINGS
    if part == "full" and (before := fastest(chosen(table, part="lora, search", **table.stamp))):
        settings = {name: settings[name] for name in settings if name in (DEFAULT, *before[:3])}
    if toy:
        settings = {"TRL, no checkpointing, packing": settings["TRL, no checkpointing, packing"]}
    found = fastest(unit(f"{part}, search", [{name: own} for name, own in settings.items()], 1))
    anchor, best = {DEFAULT: {}}, {BEST: TRL_SETTINGS[found[0]]}
    ours, others = ({name: {} for name in names} for names in (OURS, (SMALL, SINGLE)))
    groups = [anchor | best | ours, anchor | {name: {} for name in LOOPS}, anchor | others]
    if toy:
        groups = [anchor | best | {PLAIN: {}, SINGLE: {}}]
    unit(part, groups, rounds)


def compare_losses(rows: dict[str, dict[str, Any]]) -> None:
    """How far each way is at most from the plain loop in float32, where the batches are the same."""
    right = rows.get(PLAIN, {}).get("losses")
    for row in rows.values() if right else ():
        if "losses" in row and not own_batches(row["settings"]):
            row["off_plain"] = max(abs(a - b) for a, b in zip(row["losses"], right, strict=True))


def own_batches(settings: dict[str, Any]) -> bool:
    return "packing" in settings or "train_sampling_strategy" in settings


def chosen(table: Table, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in table.content["rows"] if all(row.get(name) == value for name, value in wanted.items())]


if __name__ == "__main__":
    main()
