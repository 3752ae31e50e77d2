"""The ways to train that are compared, all on the same `Work`: the stock Trainer and ftlib.fit."""

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from paired import Method, run_rounds, spread, timed
from roofline import synchronize
from torch import nn

import ftlib

DEFAULT, BEST = "Trainer, as it comes", "Trainer, best settings found"

# Tried in this order, each on top of what was kept so far.  A fused AdamW is the Trainer's default since torch 2.8,
# SDPA attention is the model's.  Settings that change the mathematics (clipping, dropout) are not tried; on a GPU all
# methods compute in bf16, on a CPU the Trainer as it comes does not, and its best settings may.
HALF = {"bf16": True}
CANDIDATES = (
    {"train_sampling_strategy": "group_by_length"},
    {"optim": "adamw_torch_fused"},
    {"attn_implementation": "eager"},
    {"logging_nan_inf_filter": False},  # saves a wait for the GPU every step
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    {"torch_compile": True},
)


@dataclass(frozen=True)
class Work:
    """One pass over `rows` in batches of `batch`, AdamW, linear schedule with a tenth of warm-up, clipping at 1."""

    make_model: Callable[[], nn.Module]
    rows: Any  # examples with input_ids and labels
    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    batch: int = 32
    precision: str = "fp32"  # of fit; the Trainer as it comes has bf16 where this says so
    trainer: str = "Trainer"  # or "Seq2SeqTrainer"

    @property
    def steps(self) -> int:
        return -(-len(self.rows) // self.batch)


def _starting(work: Work) -> Callable[[], nn.Module]:
    """The same model object every time, with its first weights, so that what was compiled for it stays good."""
    kept: dict[str, Any] = {}

    def start() -> nn.Module:
        if not kept:
            model = work.make_model().to("cuda" if torch.cuda.is_available() else "cpu")
            kept.update(model=model, weights=copy.deepcopy(model.state_dict()))
        kept["model"].load_state_dict(kept["weights"])
        return kept["model"]

    return start


def _own_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def trainer(work: Work, **settings: Any) -> Method:
    """The stock Trainer; `settings` go to TrainingArguments, attn_implementation to the model.

    Timed from the first step to the last: its set-up, a second or so, is left out, while fit's is counted.
    """
    import transformers
    from transformers import PrinterCallback, TrainerCallback

    arguments_class = getattr(transformers, work.trainer.replace("Trainer", "TrainingArguments"))

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.marks:
                self.mark()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark()

        def mark(self) -> None:
            synchronize()
            self.marks.append(time.perf_counter())

    start = _starting(work)
    settings = {"bf16": work.precision == "bf16", **settings}
    attention = settings.pop("attn_implementation", None)

    def run() -> dict[str, Any]:
        model = start()
        if attention:
            model.set_attn_implementation(attention)
        with tempfile.TemporaryDirectory() as folder:
            arguments = arguments_class(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=work.batch, learning_rate=1.5e-4,
                warmup_steps=round(0.1 * work.steps), weight_decay=0.01,
                use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no", logging_strategy="no",
                disable_tqdm=True, **settings,
            )  # fmt: skip
            kind = getattr(transformers, work.trainer)
            task = kind(model=model, args=arguments, train_dataset=work.rows, data_collator=work.collator)
            task.remove_callback(PrinterCallback)
            task.add_callback(clock := Clock())
            loss = task.train().training_loss
        begin, end = clock.marks
        return {"seconds": end - begin, "loss": loss, "own_bytes": _own_bytes(model)}

    return run


def fit(work: Work, *, unpad: bool = False, **options: Any) -> Method:
    """ftlib.fit; `options` go to TrainConfig."""
    start = _starting(work)
    config = ftlib.TrainConfig(
        epochs=1, batch_size=work.batch, learning_rate=1.5e-4, precision=work.precision, progress=False, **options
    )

    def train(model: nn.Module) -> float:
        run = ftlib.fit(model, work.rows, config=config)
        return statistics.fmean(record["loss"] for record in run.history)

    def run() -> dict[str, Any]:
        model = start()
        if unpad:
            ftlib.unpad(model)
        return {**timed(lambda: train(model), "loss"), "own_bytes": _own_bytes(model)}

    return run


def stock_methods(work: Work, best: dict[str, Any] | None) -> dict[str, Method]:
    """The Trainer as it comes and with the settings found; empty where accelerate, which it needs, is missing."""
    if importlib.util.find_spec("accelerate") is None:
        return {}
    methods = {DEFAULT: trainer(work)}
    return methods if best is None else methods | {BEST: trainer(work, **best)}


def our_methods(work: Work, *, compiled: bool = True) -> dict[str, Method]:
    methods = {"ftlib.fit": fit(work), "ftlib.fit, unpad": fit(work, unpad=True)}
    if not torch.cuda.is_available():  # what each part gives
        single = replace(work, precision="fp32")
        methods = {
            "ftlib.fit without shortcuts, unpad": fit(work, unpad=True, shortcuts=False),
            "ftlib.fit, unpad, fp32": fit(single, unpad=True),
            **methods,
        }
    if compiled:
        methods["ftlib.fit, unpad, compile"] = fit(work, unpad=True, compile=True)
    return methods


def search(work: Work, candidates: Sequence[dict[str, Any]] = CANDIDATES, rounds: int = 2) -> dict[str, Any]:
    """The Trainer's best settings found: {"best": settings, "tried": what each change gave}.

    Greedy: each change is measured against what was kept so far, and kept if it is faster by 1 % or more.
    """
    best: dict[str, Any] = {}
    tried = []
    for change in candidates:
        pair = {"kept": trainer(work, **best), "changed": trainer(work, **best, **change)}
        results = run_rounds(pair, rounds)
        seconds = {name: [r["seconds"] for r in runs[1:]] for name, runs in results.items()}
        gain = spread([a / b for a, b in zip(seconds["kept"], seconds["changed"], strict=True)])
        if gain["median"] >= 1.01:
            best |= change
        tried.append({"change": change, "faster": gain, "kept": gain["median"] >= 1.01})
        print(tried[-1], flush=True)
    return {"best": best, "tried": tried}
