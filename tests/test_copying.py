"""A module that says which files a reader must copy is copied with just these, and runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "ftlib"

# What runs after `import torch` and `from ftlib.<module> import *`; a `model` is a tiny BERT classifier.
SNIPPETS = {
    "attention": "q = torch.ones(1, 2, 3, 4); assert scaled_dot_product_attention(q, q, q).shape == (1, 2, 3, 4)",
    "masking": "assert causal_mask(2).tolist() == [[True, False], [True, True]]",
    "losses": "assert task_loss('regression')(torch.ones(1, 1), torch.zeros(1)).item() == 1.0",
    "balancing": "assert mgda(torch.eye(2)).tolist() == [0.5, 0.5]; assert Weighting().how == 'fixed'",
    "rows": "assert checked_rows(ROWS, {'': ('sequence-classification', 2)})[0]['labels'] == 1",
    "batching": "assert collate(ROWS)['labels'].tolist() == [1, 0]; assert split_by_size([0], [1])",
    "unpadding": "unpad(model); model(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])); repad(model)",
    "adapters": "add_lora(model.bert, rank=2); assert adapters_of(model); merge_own(model)",
    "regularization": "add_mixout([model.classifier], 0.5); assert model.classifier(torch.ones(1, 16)).shape == (1, 2)",
    "optimizing": "assert parameter_groups(model, learning_rate=1.0); assert schedule_factor(0, 2) == 1",
    "tuning": "assert tune(model, 'lora', rank=2).trainable; assert merge(model) is model",
    "features": "assert extract_features(model, ['a b'], tokenizer=tokenizer).shape == (1, 16)",
    "multitask": "m = MultiTaskModel(model.bert, {'a': Head()}); m(torch.tensor([[5]]), task='a'); m.export('a')",
    "distributed": "start(); assert (rank(), world_size()) == (0, 1)",
    "wheels": "assert is_safe('a/b') and not is_safe('../b')",
    "files": "with aside(folder / 'x') as new: (new / 'a.json').write_text('{}')\n"
    "assert read_json(folder / 'x' / 'a.json') == {}",
    "saving": "save(model, folder / 'saved'); assert type(load(folder / 'saved')) is type(model)",
    "checkpoints": "prepare(folder / 'c', going_on=False); assert 'manifest' in damage(folder / 'c')",
    "memory": "with measure() as cost: pass\nassert cost.seconds >= 0",
    "speedups": "x = torch.ones(20, 3); assert linear(x, x).shape == (20, 20); assert dropout(x, 0.0) is x",
    "modes": "asked = SimpleNamespace(gradient_checkpointing=True, compile=False, precision='fp32', shortcuts=True,\n"
    "    dropout=None)\n"
    "with training_modes(model, asked):\n    assert model.bert.encoder.layer[0].gradient_checkpointing",
    "steps": "config = SimpleNamespace(shuffle=False, batch_size=2, task_gradients=None)\n"
    "run = SimpleNamespace(config=config, micro_batch_size=1, max_tokens=None)\n"
    "assert len(cut(next(plan({'': ROWS}, config)), run)) == 2",
    "joint": "config = SimpleNamespace(task_weighting='fixed', task_gradients=None, task_cosines=None, seed=0)\n"
    "tasks = SimpleNamespace(tasks={'a': ('regression', 1)}, encoder=model.bert)\n"
    "assert Joint(tasks, config, 'fp32', 1).how == 'fixed'",
    "settings": "assert TrainConfig(epochs=2).epochs == 2; assert choose_precision(torch.device('cpu'))[0] == 'fp32'",
    "prediction": "assert predict(model, ['a b'], tokenizer=tokenizer).shape == (1,); assert tasks_of(model)",
    "training": "config = TrainConfig(epochs=2, batch_size=1, progress=False, checkpoint_dir=str(folder / 'c'))\n"
    "assert fit(model, ROWS, config=config).steps == 4",
}

PROGRAM = """
import importlib, json, sys, traceback
from pathlib import Path
from types import SimpleNamespace

# a machine with torch and transformers alone
for name in ("datasets", "evaluate", "sklearn", "seqeval", "matplotlib", "peft", "sentence_transformers", "pandas"):
    sys.modules[name] = None
import torch
import transformers

torch.set_num_threads(1)
sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
results = {}
for module, snippet in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1]) / module
    for name in [name for name in sys.modules if name.split(".")[0] == "ftlib"]:
        del sys.modules[name]
    sys.path[0] = str(folder)
    importlib.invalidate_caches()
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        space = {
            "torch": torch, "folder": folder, "SimpleNamespace": SimpleNamespace,
            "model": transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval(),
            "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[UNK]"),
            "ROWS": [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1], "labels": 0}],
        }
        found = importlib.import_module(f"ftlib.{module}")
        assert Path(found.__file__).parent.parent == folder, found.__file__
        space |= {name: value for name, value in vars(found).items() if not name.startswith("__")}
        exec(snippet, space)
        results[module] = ""
    except BaseException:
        results[module] = traceback.format_exc()
(Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
"""


def promised(module):
    """The files a module's docstring tells to copy; those in brackets are for some uses only."""
    text = (HERE / f"{module}.py").read_text().split('"""')[1]
    if "To copy: this file alone" in text:
        return {f"{module}.py"}
    found = re.search(r"To copy this module you need: (.*?)(\n\n|\nSource|$)", text, re.DOTALL)
    return set(re.findall(r"\w+\.py", re.sub(r"\([^)]*\)", "", found[1]))) if found else set()


MODULES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__init__" and promised(path.stem))


def test_every_module_that_promises_is_tried():
    assert set(MODULES) == set(SNIPPETS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process tries all modules, each in a package folder of its own: {module: what went wrong}."""
    folder = tmp_path_factory.mktemp("copies")
    for module in MODULES:
        (folder / module / "ftlib").mkdir(parents=True)
        (folder / module / "ftlib" / "__init__.py").touch()
        for name in promised(module):
            shutil.copy(HERE / name, folder / module / "ftlib")
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps({name: SNIPPETS[name] for name in MODULES})]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("module", MODULES)
def test_the_files_named_are_enough(results, module):
    assert results[module] == ""


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_named_in_vain(module):
    """Every file named is imported by another of the files named."""
    names = {Path(name).stem for name in promised(module)} - {module}
    text = "\n".join((HERE / name).read_text() for name in promised(module))
    used = set(re.findall(r"from ftlib\.(\w+) import", text))
    for line in re.findall(r"from ftlib import (.*)", text):
        used |= set(re.findall(r"\w+", line))
    assert names <= used
