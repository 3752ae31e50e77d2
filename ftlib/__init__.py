"""ftlib: fine-tune pretrained Transformers, with code short enough to read in a notebook.

Every model stays an ordinary `transformers` module; ftlib changes which parameters move, what the loss is,
which batches come, and how fast the step runs.  Names below are imported when they are first used, so
`import ftlib` itself loads nothing heavy.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # room and module -> the public names it defines
    "inputs.corpora": "load_corpus", "inputs.pretrained": "load_tokenizer load_model", "inputs.tokenizing": "tokenize",
    "inputs.pretraining": "PackedText sentence_pairs corrupt_spans", "methods.vocabulary": "add_tokens masked_head",
    "core.batches": "collate split_by_size to_device", "core.loop": "steps schedule_factor",
    "core.device": "choose_precision", "tasks.task": "count_labelled task_loss", "tasks.tagging": "words_of",
    "methods.unpadding": "unpad repad", "methods.tuning": "tune merge",
    "methods.augmentation": "augment mixup", "methods.regularization": "r_drop",
    "methods.interpretation": "attribute faithfulness", "methods.patching": "activation_patching logit_lens shuffled",
    "methods.distillation": "Distillation shrink", "methods.pruning": "prune", "methods.quantization": "quantize",
    "methods.privacy": "Privacy",
    "methods.features": "extract_features", "tasks.embedding": "pool",
    "methods.multitask": "MultiTaskModel Head TaskSampler",
    "engine.settings": "TrainConfig Run", "engine.fit": "fit", "engine.range_test": "find_learning_rate",
    "engine.prediction": "evaluate predict", "engine.entities": "entities", "engine.generation": "generate",
    "engine.saving": "save load", "engine.search": "search",
    "show.setup": "setup", "show.measuring": "measure", "show.sheet": "show_figure",
    "show.heatmap": "TextHeatmap", "show.comparing": "Difference against bootstrap paired",
    "show.tables": "stored_results results_table format_cell mean_std show_tokens",
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
# what stands where; a module whose name no function above has is an attribute of the package as well
_ROOMS = {
    room: tuple(module.name for module in iter_modules([f"{__path__[0]}/{room}"]))
    for room in ("core", "tasks", "show", "inputs", "methods", "engine")
}
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
