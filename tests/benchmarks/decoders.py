"""The ways to fine-tune a decoder that are compared, all on the same `Work`: TRL's SFTTrainer, a plain loop, ftlib.fit.

A way loads its model and returns the run.  The run calls `gate.begin()` before every step, but for what belongs to the
first, and `gate.end(...)` after it, so that whoever holds the gate has the clock, and may let others go first.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from roofline import synchronize
from torch import Tensor, nn

import ftlib

IGNORE = -100
RANK = 8
RATES = {"lora": 2e-4, "full": 2e-5}  # the second is TRL's own


class Gate:
    """Keeps a record a step: seconds, mean loss over the trained tokens, real tokens, trained tokens."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        synchronize()
        self.start = time.perf_counter()

    def end(self, loss: Any, rows: Callable[[], list[dict[str, list[int]]]]) -> None:
        synchronize()
        seconds = time.perf_counter() - self.start
        tokens, trained = sizes(rows())
        self.steps.append({"seconds": seconds, "loss": float(loss), "tokens": tokens, "trained": trained})


Run = Callable[[Gate], dict[str, Any]]  # trains; what else is to be kept


@dataclasses.dataclass(frozen=True)
class Work:
    """`steps` steps of `batch` rows in their order, AdamW at a constant rate without decay, clipping at 1."""

    make_model: Callable[[], nn.Module]
    rows: list[dict[str, list[int]]]  # input_ids and labels
    tokenizer: Any
    steps: int
    batch: int
    rate: float
    moves: str  # "full" or "lora": rank 8, alpha 16, on the query and value projections
    texts: list[dict[str, str]] | None = None  # prompt and completion of the rows: TRL makes its own tokens of them
    first: list[int] | None = None  # how every row begins: tells rows apart that were joined

    @property
    def batches(self) -> list[list[dict[str, list[int]]]]:
        return [self.rows[i * self.batch : (i + 1) * self.batch] for i in range(self.steps)]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def same_start(model: nn.Module) -> nn.Module:
    """LoRA's random matrices drawn alike for every way (in PEFT and in ftlib they have the same order and shapes)."""
    source = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.data.copy_(torch.randn(p.shape, generator=source) / p.shape[1] ** 0.5)
    return model


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A padded batch: (rows, tokens) each."""
    longest = max(len(row["input_ids"]) for row in rows)

    def of(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows], device=device())

    mask = torch.tensor([[int(i < len(row["input_ids"])) for i in range(longest)] for row in rows], device=device())
    return {"input_ids": of("input_ids", 0), "labels": of("labels", IGNORE), "attention_mask": mask}


def sizes(rows: list[dict[str, list[int]]]) -> tuple[int, int]:
    """Tokens, and trained tokens; a row's first is predicted by nothing."""
    trained = sum(label != IGNORE for row in rows for label in row["labels"][1:])
    return sum(len(row["input_ids"]) for row in rows), trained


def decoder_flops(model: nn.Module, lengths: list[int], *, lora: bool) -> float:
    """FLOPs of one step's matrix products on rows of so many tokens; multiply and add count as two.

    Forward: 2 N a token, N the weights of all linear layers and of the head (which may be the embeddings), and for
    attention 2 L² a row, layer and width of the queries: half of a full table, as a token sees those before it.
    Backward: twice that; with LoRA the N frozen weights get no gradient, so 4 N a token, and 6 for its own weights.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    own = sum(m.weight.numel() for m in layers if m.weight.requires_grad or not lora)
    held = sum(m.weight.numel() for m in layers) - own
    config = model.config.get_text_config()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * width * config.num_hidden_layers * sum(length**2 for length in lengths)
    return float((6 * own + 4 * held) * sum(lengths) + 3 * attention)


@torch.no_grad()
def loss_alone(model: nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss over the trained tokens in float32, a row at a time, nothing beside it."""
    total = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=device()) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum").item()
    return total / sizes(rows)[1]


# ---------------------------------------------------------------------------------------------------------- the ways


def plain(work: Work, *, bf16: bool) -> Run:
    """A loop as one writes it: padded batches, the model's own loss, autocast."""
    model = work.make_model()
    if work.moves == "lora":
        from peft import get_peft_model

        model = same_start(get_peft_model(model, lora_config()))
    model.to(device()).train()

    def run(gate: Gate) -> dict[str, Any]:
        alone = None if bf16 else loss_alone(model, work.batches[0])
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=work.rate, weight_decay=0.0)
        for rows in work.batches:
            gate.begin()
            with torch.autocast(device(), torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = model(**stacked(rows)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            gate.end(loss.detach(), lambda rows=rows: rows)
        return {"alone": alone}

    return run


def fit(work: Work, *, unpad: bool = True, **options: Any) -> Run:
    """ftlib.fit; `options` go to TrainConfig."""
    model = work.make_model()
    if unpad:
        ftlib.unpad(model)
    if work.moves == "lora":
        ftlib.tune(model, "lora", rank=RANK)
        same_start(model)
    model.to(device())
    config = ftlib.TrainConfig(
        max_steps=work.steps, batch_size=work.batch, learning_rate=work.rate, schedule="constant",
        warmup_fraction=0.0, weight_decay=0.0, shuffle=False, progress=False, **options,
    )  # fmt: skip

    def run(gate: Gate) -> dict[str, Any]:
        def told(record: dict[str, Any]) -> None:
            gate.end(record["loss"], lambda: work.batches[record["step"] - 1])
            if record["step"] < work.steps:
                gate.begin()

        gate.begin()  # before the first step there is all that `fit` prepares
        result = ftlib.fit(model, work.rows, config=config, tokenizer=work.tokenizer, on_record=told)
        return {"precision": result.precision, "reason": result.reason}

    return run


def trl(work: Work, **settings: Any) -> Run:
    """TRL's SFTTrainer; `settings` go to SFTConfig, `attn_implementation` to the model.

    Beside them is set what must be: the folder, the number of rows a step and their order, what the others have too
    (constant rate, AdamW, clipping), nothing written.  `alone`: what the first step's loss is with every row alone,
    found where the batches are not the others'.
    """
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = work.make_model()
    if attention := settings.pop("attn_implementation", None):
        model.set_attn_implementation(attention)
    own_batches = "packing" in settings or "train_sampling_strategy" in settings
    rows = datasets.Dataset.from_list(work.texts or work.rows)
    found: dict[str, Any] = {"alone": None}

    class Trainer(SFTTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
            if own_batches and not gates[0].steps:
                found["alone"] = loss_alone(model, pieces(inputs, work.first))
            loss = super().training_step(model, inputs, *rest)
            seen.append((loss, inputs))  # of a part of the step, where gradients are accumulated
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gates[0].begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            loss = sum(float(loss) for loss, _ in seen)
            gates[0].end(loss, lambda: [row for _, inputs in seen for row in pieces(inputs, work.first)])
            seen.clear()

    gates: list[Gate] = []
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    folder = tempfile.TemporaryDirectory()
    arguments = SFTConfig(
        output_dir=folder.name, max_steps=work.steps, learning_rate=work.rate,
        **{"per_device_train_batch_size": work.batch, "train_sampling_strategy": "sequential", **settings},
        lr_scheduler_type="constant", use_cpu=device() == "cpu", report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    adapter = lora_config() if work.moves == "lora" else None
    task = Trainer(
        model=model, args=arguments, train_dataset=rows, processing_class=work.tokenizer, peft_config=adapter
    )  # fmt: skip
    same_start(task.model)
    if not settings.get("packing"):  # the same tokens, and the same trained
        for own, row in zip(task.train_dataset, work.rows, strict=True):
            assert all(own[name] == row[name] for name in ("input_ids", "labels")), (own, row)
    task.remove_callback(PrinterCallback)
    task.add_callback(Clock())

    def run(gate: Gate) -> dict[str, Any]:
        gates.append(gate)
        with folder:
            task.train()
        return found

    return run


def pieces(inputs: dict[str, Any], first: list[int] | None) -> list[dict[str, list[int]]]:
    """The rows of a batch, also where they were joined: each begins like `first`, or is what was cut off one."""
    out = []
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], real, strict=True):
        ids, labels = ids[mask].tolist(), labels[mask].tolist()
        starts = range(1, len(ids)) if first else ()
        cuts = [0, *(i for i in starts if ids[i : i + len(first)] == first), len(ids)]
        out += [{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in itertools.pairwise(cuts)]
    return out
