"""ftlib: fine-tune pretrained Transformers, with code short enough to read in a notebook.

Every model stays an ordinary `transformers` module; ftlib changes which parameters move, what the loss is,
which batches come, and how fast the step runs.  Names below are imported when they are first used, so
`import ftlib` itself loads nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> room and module that define it
    "load_corpus": "inputs.corpora",
    "load_tokenizer": "inputs.pretrained",
    "load_model": "inputs.pretrained",
    "tokenize": "inputs.tokenizing",
    "collate": "core.batches",
    "split_by_size": "core.batches",
    "to_device": "core.batches",
    "steps": "core.loop",
    "schedule_factor": "core.loop",
    "choose_precision": "core.device",
    "TaskSampler": "methods.multitask",
    "count_labelled": "tasks.task",
    "task_loss": "tasks.task",
    "unpad": "methods.unpadding",
    "repad": "methods.unpadding",
    "tune": "methods.tuning",
    "merge": "methods.tuning",
    "r_drop": "methods.regularization",
    "extract_features": "methods.features",
    "pool": "methods.features",
    "MultiTaskModel": "methods.multitask",
    "Head": "methods.multitask",
    "TrainConfig": "engine.settings",
    "Run": "engine.settings",
    "fit": "engine.fit",
    "find_learning_rate": "engine.range_test",
    "evaluate": "engine.prediction",
    "predict": "engine.prediction",
    "save": "engine.saving",
    "load": "engine.saving",
    "setup": "show.setup",
    "measure": "show.measuring",
    "stored_results": "show.tables",
    "results_table": "show.tables",
    "format_cell": "show.tables",
    "mean_std": "show.tables",
    "tie": "show.tables",
}
_ROOMS = {  # what stands where; a module whose name no function above has is an attribute of the package as well
    "core": ("anatomy", "batches", "device", "loop", "sampling"),
    "tasks": ("classification", "metrics", "relations", "tagging", "task"),
    "show": ("logging", "measuring", "plots", "setup", "tables"),
    "inputs": (
        "agreement", "assets", "corpora", "files", "pretrained", "reading", "rows", "sentence_folders",
        "tokenizing",
    ),
    "methods": (
        "adapters", "attention", "balancing", "features", "losses", "masking", "multitask", "optimizing",
        "regularization", "speedups", "through_peft", "tuning", "unpadding",
    ),
    "engine": (
        "bases", "checkpoints", "compiling", "distributed", "feeding", "fit", "prediction", "range_test",
        "recovery", "runfile", "saving", "settings", "task_gradients", "untrusted",
    ),
}  # fmt: skip
_MODULES = {module: f"{room}.{module}" for room, modules in _ROOMS.items() for module in modules if module not in _HOME}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES or name in _ROOMS:
        return import_module(f".{_MODULES.get(name, name)}", __name__)
    raise AttributeError(f"module 'ftlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, *_MODULES])
