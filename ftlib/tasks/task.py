"""What a kind of task is: one flat record of functions, and the plain table of them.

Everything else in ftlib asks the record: how a model is built, what a label may be, what the step divides by, the loss,
what is made of logits.  A new kind is a new record, and its functions in a file beside this one.

To copy: this file, core/batches.py, core/anatomy.py and the rest of tasks/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import anatomy
from ..core.batches import IGNORE, one_of, padded, stacked
from . import answers, classification, embedding, language_modeling, masked, relations, seq2seq, tagging
from .metrics import compute_metrics


def encode_plain(tokenized: Callable, first: list, second: list | None, columns: dict, wheres: list) -> tuple:
    """Texts as they are, and no further inputs."""
    return tokenized(first, second), {}


def keep_label(value: Any, *beside: Any) -> Any:
    return value


@dataclass(frozen=True)
class Task:
    """A kind of task.  Logits are of a batch, (batch, classes) or, of tags and answers, (batch, tokens, classes)."""

    auto: Any  # builds the model: the name of one of Transformers' Auto classes, or a class of that form
    architecture: str | tuple[str, ...]  # how the names of its model classes end
    check: Callable  # (label, number of labels, tokens, where) -> the label; ValueError, TypeError
    items: Callable  # labels, an array or a tensor -> how many items are labeled: what a step divides by
    loss: Callable  # (logits, labels) -> scalar, summed over the labeled items
    decide: Callable  # logits -> decisions
    score: Callable  # (predictions, labels, names of the labels or None) -> {metric: value}
    problem_type: str | None = None  # as in the model's config
    peft_type: str = "SEQ_CLS"  # PEFT's word for it
    use: str = "text-classification"  # the Hub's
    outputs: int | None = None  # of each such head
    columns: tuple[str, ...] = ()  # of a dataset, beside texts and label, that `encode` reads
    encode: Callable = encode_plain  # (tokenizer, texts, second texts, columns, wheres) -> encoding, further inputs
    align: Callable = keep_label  # (label, text, encoding, row of it, where) -> the label beside the token ids
    stack: Callable = stacked  # (labels, tokens of each row, padding side) -> tensor
    a_token: bool = False  # a label a token
    trim: Callable = keep_label  # (label, tokens that are kept of the row, where) -> the label of these, if it moves
    multi_hot: bool = False  # several classes a text, a 0 or 1 for each
    probabilities: Callable | None = None  # of logits; None: the task predicts numbers
    named: Callable | None = None  # (decisions, {number: name}) -> names
    divergence: Callable | None = classification.divergence_of_classes  # of two predictions, for R-Drop
    smooths: bool = False  # whether `loss` takes label_smoothing
    likelihood: float = 1.0  # of "uncertainty" weighting: 1/2 for a Gaussian, 1 for classes
    labeled: bool = True  # False: labels are tokens, whose loss the model's forward sums: methods/token_losses.py
    forms: tuple[tuple[str, ...], ...] = ()  # where a row is made of other columns than text and label: which
    rows: Callable | None = None  # (tokenizer, columns, wheres, max_length, truncation) -> token ids and labels
    reads: dict[str, str] = field(default_factory=dict)  # which column of a form text= and label= of `tokenize` name
    options: tuple[str, ...] = ()  # what `rows` takes as well
    windows: bool = False  # `rows` makes several rows of one
    encoder_decoder: bool = False  # a label is a row of its own, which a decoder writes
    prompt: Callable | None = None  # (tokenizer, prompt, where) -> token ids after which a model writes
    answer: Callable | None = None  # row -> (token ids of such a prompt, of the answer wanted)
    draw: Callable | None = None  # (rows, keys) -> rows as the model reads them, where this is new each time
    measures: Callable | None = None  # row -> names of what evaluation gives beside the loss, where this hangs on rows
    vectors: tuple[str, ...] = ()  # logits are vectors, one for each of a row's texts; what the config says of these


_classes = partial(
    Task, check=classification.check_class, items=classification.labeled, loss=classification.cross_entropy,
    decide=partial(torch.argmax, dim=-1), score=partial(compute_metrics, "sequence-classification"), smooths=True,
    probabilities=partial(torch.softmax, dim=-1), named=lambda decided, names: [names[int(value)] for value in decided],
)  # fmt: skip
_text = partial(_classes, auto="AutoModelForSequenceClassification", architecture="ForSequenceClassification")
_tokens = partial(
    Task, items=classification.labeled, loss=classification.cross_entropy, decide=partial(torch.argmax, dim=-1),
    stack=partial(padded, fill=IGNORE), divergence=None, smooths=True, labeled=False,
)  # fmt: skip

TASKS: dict[str, Task] = {
    "sequence-classification": _text(problem_type="single_label_classification"),
    "multi-label-classification": _text(
        check=classification.check_labels, loss=classification.binary_cross_entropy, probabilities=torch.sigmoid,
        decide=lambda logits: (logits > 0).long(), smooths=False, multi_hot=True,
        named=lambda decided, names: [[names[int(i)] for i in np.flatnonzero(values)] for values in decided],
        score=partial(compute_metrics, "multi-label-classification"), problem_type="multi_label_classification",
        divergence=classification.divergence_of_labels,
    ),
    "regression": _text(
        check=classification.check_numbers, items=lambda labels: len(labels.reshape(-1)), problem_type="regression",
        loss=classification.squared_error, decide=lambda logits: logits[:, 0] if logits.shape[-1] == 1 else logits,
        score=partial(compute_metrics, "regression"), probabilities=None, divergence=None, smooths=False,
        likelihood=0.5,
    ),
    "token-classification": _classes(
        auto="AutoModelForTokenClassification", architecture="ForTokenClassification", check=tagging.check_tags,
        score=partial(compute_metrics, "token-classification"), peft_type="TOKEN_CLS", align=tagging.align,
        stack=partial(padded, fill=IGNORE), a_token=True, named=tagging.named_tags, use="token-classification",
    ),
    "relation-classification": _classes(
        auto=relations.AutoModelForRelationClassification, architecture="ForRelationClassification",
        columns=("spans",), encode=relations.encode,
    ),
    "question-answering": Task(
        auto="AutoModelForQuestionAnswering", architecture=("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        peft_type="QUESTION_ANS", use="question-answering", outputs=2, check=answers.check_span, trim=answers.trim,
        items=lambda labels: (labels[..., 0] != IGNORE).sum(), loss=answers.cross_entropy, decide=answers.decide,
        stack=answers.stack, divergence=answers.divergence, probabilities=partial(torch.softmax, dim=-2),
        named=lambda decided, names: decided.tolist(), score=partial(compute_metrics, "question-answering"),
        forms=answers.FORMS, rows=answers.rows, options=("stride",), windows=True,
    ),
    "causal-lm": _tokens(
        auto="AutoModelForCausalLM", architecture=("ForCausalLM", "LMHeadModel"), peft_type="CAUSAL_LM",
        check=language_modeling.check_tokens, items=language_modeling.items, loss=language_modeling.cross_entropy,
        score=partial(compute_metrics, "causal-lm"), a_token=True, use="text-generation", reads={"text": "text"},
        forms=language_modeling.FORMS, rows=language_modeling.rows, prompt=language_modeling.prompt_ids,
        answer=language_modeling.last_answer,
    ),
    "masked-lm": _tokens(
        auto="AutoModelForMaskedLM", architecture=("ForMaskedLM", "BertForPreTraining", "AlbertForPreTraining"),
        peft_type="FEATURE_EXTRACTION", check=masked.check_tokens, a_token=True, use="fill-mask",
        score=partial(compute_metrics, "token-classification"), forms=masked.FORMS, rows=masked.rows,
        reads=masked.READS, options=masked.OPTIONS, draw=masked.draw, measures=masked.measures,
    ),
    "sentence-embedding": Task(
        auto=embedding.AutoModelForSentenceEmbedding, architecture="ForSentenceEmbedding", check=embedding.check_score,
        items=lambda labels: len(labels.reshape(-1)), loss=embedding.loss, decide=keep_label, score=embedding.score,
        peft_type="FEATURE_EXTRACTION", use="sentence-similarity", outputs=1, divergence=None, forms=embedding.FORMS,
        rows=embedding.rows, reads=embedding.READS, measures=embedding.measures,
        vectors=embedding.AutoModelForSentenceEmbedding.settings,
    ),
    "seq2seq-lm": _tokens(
        auto="AutoModelForSeq2SeqLM", architecture=("ForConditionalGeneration", "MTModel"), peft_type="SEQ_2_SEQ_LM",
        check=seq2seq.check_target, stack=seq2seq.stack, score=partial(compute_metrics, "seq2seq-lm"),
        forms=seq2seq.FORMS, rows=seq2seq.rows, reads=seq2seq.READS, options=seq2seq.OPTIONS,
        prompt=seq2seq.source_ids, answer=seq2seq.pair, encoder_decoder=True, use="text2text-generation",
    ),
}  # fmt: skip
KINDS = tuple(TASKS)
DEFAULT = KINDS[0]


def auto_class(kind: str) -> Any:
    """What builds a model of this kind: has from_pretrained(name) and from_config(config)."""
    import transformers

    auto = TASKS[kind].auto
    return getattr(transformers, auto) if isinstance(auto, str) else auto


def class_named(name: str, config: dict) -> type | None:
    """The model class that a saved config.json names: one of Transformers', or of a record's own; None for no such."""
    import transformers

    own = [task.auto for task in TASKS.values() if hasattr(task.auto, "class_of") and name.endswith(task.architecture)]
    try:
        if own:
            kind = own[0].class_of(transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config))
            return kind if kind.__name__ == name else None
        kind = getattr(transformers, name, None)
    except Exception:  # a class whose own needs are not installed, a config that is none
        return None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def kind_of(model: nn.Module) -> str | None:
    """The kind of a model with one head, by its class and config; None for what has none that is known here."""
    model = anatomy.unwrapped(model)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem is None:  # as Transformers' heads decide
        one = getattr(getattr(model, "config", None), "num_labels", 0) == 1
        problem = TASKS["regression" if one else DEFAULT].problem_type
    name = type(model).__name__ * (type(model).__name__ not in answers.SEARCHING)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # what hears or sees isn't, but Whisper
    both = both and getattr(model, "main_input_name", "") == "input_ids"
    found = [k for k, task in TASKS.items() if name.endswith(task.architecture) and (both or not task.encoder_decoder)]
    fitting = [kind for kind in found if TASKS[kind].problem_type in (None, problem)]
    return (fitting or found or [None])[0]


def tasks_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """{task name, "" for a stock model's one: (kind, number of labels)}; ValueError without a head that is known."""
    if hasattr(model, "tasks"):  # MultiTaskModel
        return model.tasks
    kind = kind_of(model)
    if kind and not TASKS[kind].labeled:
        own = getattr(model.config, "decoder_vocab_size", None)  # Marian's target may have words of its own
        return {"": (kind, own or model.get_input_embeddings().num_embeddings)}
    if kind is None:
        name = type(anatomy.unwrapped(model)).__name__
        raise ValueError(f"{name} has no classification head; load the model with task={DEFAULT!r}, num_labels=2, say")
    size = "hidden_size" if TASKS[kind].vectors else "num_labels"
    return {"": (kind, getattr(model.config, size, 0))}


def vectors_of(model: nn.Module) -> dict[str, Any]:
    """What the config of a model of vectors says of these, `pooling` and `normalize`; {} for another model."""
    kind = kind_of(model)
    return {name: getattr(model.config, name) for name in (TASKS[kind].vectors if kind else ())}


def names_of(model: nn.Module, task: str = "") -> dict[int, str]:
    """{label number: name}, also where the numbers are text, as in config.json."""
    names = (model.heads[task] if task else model).config.id2label or {}
    return {int(number): name for number, name in names.items()}


def given_names(names: dict[int, str]) -> list[str] | None:
    """The names in order, None where nobody gave any."""
    ordered = [name for _, name in sorted(names.items())]
    return None if ordered == [f"LABEL_{i}" for i in range(len(ordered))] else ordered


def formed(values: Any, output: str, record: Task, names: dict[int, str]) -> Any:
    """Logits, an array (texts, classes) or a text's (tokens, classes), as labels, names, probabilities or logits."""
    if output == "logits" or (record.probabilities is None and output != "labels"):
        return values
    scored = torch.from_numpy(values)
    if output == "probabilities":
        return record.probabilities(scored).numpy()
    decided = record.decide(scored).numpy()  # (texts,), (texts, labels) or (tokens,)
    if record.a_token:
        decided = np.where(np.isnan(values).all(-1), IGNORE, decided)
    return decided if output == "labels" else record.named(decided, names)


def task_loss(task: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a kind of task as a function (logits, labels) -> scalar, **summed** over labeled items.

    The caller divides by `count_labelled` of the whole optimizer step; a mean per micro-batch would weigh a label in a
    short batch more than one in a long batch.
    Raises ValueError for an unknown task, and for label_smoothing where it has no meaning.

    >>> loss = task_loss("regression")
    >>> loss(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0]))
    tensor(4.)
    """
    record = TASKS[one_of("task", task, TASKS)]
    if not label_smoothing:
        return record.loss
    if not record.smooths or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing} has no meaning for {task}; 0, or to 1 for classes")
    return partial(record.loss, label_smoothing=label_smoothing)


def count_labelled(labels: Tensor, task: str) -> Tensor:
    """How many items the summed loss runs over, int64 scalar on the labels' device, so that nothing waits for a GPU.

    >>> count_labelled(torch.tensor([[3, -100, -100], [0, 1, -100]]), "token-classification")
    tensor(3)
    """
    return torch.as_tensor(TASKS[one_of("task", task, TASKS)].items(labels), device=labels.device)
