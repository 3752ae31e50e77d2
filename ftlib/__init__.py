"""ftlib: fine-tune pretrained Transformers, with code short enough to read in a notebook.

Every model stays an ordinary `transformers` module; ftlib changes which parameters move, what the loss is,
which batches come, and how fast the step runs.  Names below are imported when they are first used, so
`import ftlib` itself loads nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "load_corpus": "corpora",
    "load_tokenizer": "pretrained",
    "load_model": "pretrained",
    "tokenize": "batching",
    "unpad": "unpadding",
    "repad": "unpadding",
    "tune": "tuning",
    "merge": "tuning",
    "extract_features": "features",
    "MultiTaskModel": "multitask",
    "Head": "multitask",
    "TaskSampler": "multitask",
    "TrainConfig": "training",
    "Run": "training",
    "fit": "training",
    "find_learning_rate": "search",
    "evaluate": "training",
    "predict": "training",
    "save": "saving",
    "load": "saving",
    "setup": "environment",
    "measure": "memory",
    "stored_results": "environment",
}
_MODULES = (
    "adapters", "assets", "attention", "balancing", "batching", "checkpoints", "corpora", "distributed",
    "environment", "features", "files", "joint", "losses", "masking", "memory", "metrics", "modes", "multitask",
    "optimizing", "plots", "prediction", "pretrained", "regularization", "rows", "saving", "search", "settings",
    "speedups", "steps", "training", "tuning", "unpadding", "wheels",
)  # fmt: skip

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ftlib.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"ftlib.{name}")
    raise AttributeError(f"module 'ftlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
