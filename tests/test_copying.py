"""A file says which others go with it: copied with just these, into a package of any name, it runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "ftlib"
FILES = sorted(path for path in HERE.glob("*/*.py") if path.name != "__init__.py")
NEVER = {"engine/fit.py", "engine/feeding.py", "engine/prediction.py"}  # core/loop.py is what to take home

# What runs after `import torch` and `from mylib.<room>.<module> import *`; a `model` is a tiny BERT classifier.
SNIPPETS = {
    "core/anatomy.py": "assert len(layers(model)) == 2 and head_modules(model) == ['bert.pooler', 'classifier']",
    "core/batches.py": "assert collate(ROWS)['labels'].tolist() == [1, 0]; assert split_by_size([0], [1])",
    "core/device.py": "assert choose_precision(torch.device('cpu'))[0] == 'fp32'",
    "core/loop.py": "sgd = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    "batch = {'input_ids': torch.tensor([[1, 2]]), 'labels': torch.tensor([1])}\n"
    "assert [r['step'] for r in steps(model, [[batch]] * 3, sgd, total=2)] == [1, 2]",
    "core/sampling.py": "assert next(plan({'': 1}, SimpleNamespace(shuffle=False, batch_size=1, seed=0))) == [('', 0)]",
    "tasks/answers.py": "assert span({'text': ['b'], 'answer_start': [2]}, 'a b', 'row 0') == (2, 3)",
    "tasks/calibration.py": "assert calibration_error([[0.75, 0.25]], [0]) == 0.25",
    "tasks/classification.py": "assert check_class(1, 2, 3, 'row 0') == 1",
    "tasks/language_modeling.py": "tokenizer.eos_token = '[UNK]'\n"
    "row = encode(tokenizer, {'prompt': 'a', 'completion': ' b'}, 'row 0')\n"
    "assert row == {'input_ids': [1, 2, 0], 'labels': [-100, 2, 0]} and last_answer(row) == ([1], [2, 0])",
    "tasks/masked.py": "row = {'input_ids': [0, 1], 'labels': [-100, 1], 'masking': [2, 3, 1.0]}\n"
    "assert mask(row, [0])['labels'] == [-100, 1] and labeled(torch.tensor([-100, 1])) == 1",
    "tasks/metrics.py": "assert accuracy([0, 1], [0, 0]) == 0.5",
    "tasks/overlap.py": "assert callable(bleu) and callable(rouge)",
    "tasks/seq2seq.py": "tokenizer.eos_token = '[UNK]'\n"
    "made = rows(tokenizer, {'source': ['a'], 'target': ['b a']}, ['row 0'], None, True)\n"
    "assert made['labels'] == [[2, 1, 0]] and pair({'input_ids': [1], 'labels': [2, 0]}) == ([1], [2, 0])",
    "tasks/relations.py": "m = AutoModelForRelationClassification.from_config(model.config)\n"
    "at = torch.tensor([[0, 1]]); assert m(torch.tensor([[5, 6]]), marker_positions=at).logits.shape == (1, 2)",
    "tasks/heads.py": "class Head(OnBase):\n"
    "    def forward(self, input_ids=None): return self.base_model(input_ids)[0]\n"
    "m = class_on(type(model.bert), Head, 'ForNothing')(model.config)\n"
    "assert type(m).__name__ == 'BertForNothing' and m(torch.tensor([[1, 2]])).shape == (1, 2, 16)",
    "tasks/embedding.py": "m = AutoModelForSentenceEmbedding.from_config(model.config)\n"
    "assert m(torch.tensor([[1, 2, 1]]), text_lengths=torch.tensor([[2, 1]])).logits.shape == (1, 2, 16)",
    "methods/fewshot.py": "assert contrastive_pairs([0, 1])[1].tolist() == [1, 0, 1, 0]\n"
    "assert k_center([[0.0], [1.0]], 1, [0]) == [1]",
    "tasks/tagging.py": "assert check_tags([0, -100], 2, 2, 'row 0') == [0, -100]",
    "tasks/task.py": "assert kind_of(model) == KINDS[0]\n"
    "assert task_loss('regression')(torch.ones(1, 1), torch.zeros(1)) == 1",
    "show/comparing.py": "assert paired([1.0], 0.5).verdict == 'tie'",
    "show/logging.py": "assert callable(tensorboard) and callable(trackio)",
    "show/measuring.py": "with measure() as cost: pass\nassert cost.seconds >= 0",
    "show/diagrams.py": "assert callable(attention_head)",
    "show/plots.py": "assert callable(learning_curves)",
    "show/heatmap.py": "words = [{'start': 0, 'end': 1, 'score': 1}]; assert 'solid' in TextHeatmap('a b', words).html",
    "show/sheet.py": "assert Box(0, 0, 2, 2).towards(5, 0) == (1, 0)",
    "show/setup.py": "assert setup(3).device.type in ('cpu', 'cuda', 'mps')",
    "show/tables.py": "assert mean_std([1.0, 1.0]) == (1.0, 0.0)",
    "inputs/assets.py": "assert is_safe('a/b') and not is_safe('../b')",
    "inputs/cleaning.py": "assert confident_errors([[0.9, 0.1], [0.9, 0.1]], [0, 1])[0]['suggested'] == 0",
    "inputs/converting.py": "assert callable(read_onnx)",
    "inputs/corpora.py": "assert callable(load_corpus)",
    "inputs/documents.py": "(folder / 'x.txt').write_text('A/DT cat/NN')\n"
    "assert read_oanc(folder / 'x.txt')[0]['tags'] == ['DT', 'NN'] and set(READERS) > {'squad-v2'}",
    "inputs/parts.py": "assert callable(join)",
    "inputs/sdist.py": "assert callable(save)",
    "inputs/files.py": "with aside(folder / 'x') as new: (new / 'a.json').write_text('{}')\n"
    "assert read_json(folder / 'x' / 'a.json') == {}",
    "inputs/pretrained.py": "model.save_pretrained(folder / 'm'); kind = 'sequence-classification'\n"
    "assert type(load_model(folder / 'm', task=kind)) is type(model)",
    "inputs/pretraining.py": "tokenizer.mask_token = '[UNK]'\n"
    "(row,) = PackedText(['a b', 'b'], tokenizer, 3, task='masked-lm'); assert row['input_ids'] == [1, 2, 2]",
    "inputs/agreement.py": "assert agree(model) == Padding(0, 'right', False) and inputs_of(model) > {'position_ids'}",
    "inputs/rows.py": "assert checked(ROWS, Door({'': ('sequence-classification', 2)}))[0]['labels'] == 1",
    "inputs/sentence_folders.py": "assert recipe_of(str(folder)).pooling == 'mean'",
    "inputs/reading.py": "assert callable(as_dataset) and callable(load_folder)",
    "inputs/tokenizing.py": "assert encode_texts(['a b'], tokenizer)[0]['input_ids'] == [1, 2]",
    "methods/sequences.py": "assert viterbi(torch.tensor([[[0.9, 0.8, 0.0], [0.0, 0.1, 2.0]]]), "
    "bio_transitions(['O', 'B-x', 'I-x'])).tolist() == [[1, 2]]",
    "methods/adapters.py": "add_lora(model.bert, rank=2); assert adapters_of(model); merge_own(model)",
    "methods/attention.py": "q = torch.ones(1, 2, 3, 4)\n"
    "assert scaled_dot_product_attention(q, q, q).shape == (1, 2, 3, 4)",
    "methods/augmentation.py": "assert changes(20, 0.1) == 2 and callable(augment)\n"
    "with mixup(model) as loss: assert callable(loss)",
    "methods/balancing.py": "assert mgda(torch.eye(2)).tolist() == [0.5, 0.5]; assert Weighting().how == 'fixed'",
    "methods/distillation.py": "assert shrink(model, 1).config.num_hidden_layers == 1\n"
    "assert callable(Distillation(model).gradient())",
    "methods/features.py": "assert extract_features(model, ['a b'], tokenizer=tokenizer).shape == (1, 16)",
    "methods/interpretation.py": "encoding = tokenizer(['a b', 'b'], return_token_type_ids=False)\n"
    "scores = attribute(model, encoding, 'shapley', whole_words=True, samples=2)\n"
    "assert [len(one) for one in scores] == [2, 1] and len(faithfulness(model, encoding, scores)['deletion']) == 2",
    "methods/losses.py": "assert cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1])) > 0.69",
    "methods/masking.py": "assert causal_mask(2).tolist() == [[True, False], [True, True]]",
    "methods/multitask.py": "m = MultiTaskModel(model.bert, {'a': Head()})\n"
    "m(torch.tensor([[5]]), task='a'); m.export('a')",
    "methods/optimizing.py": "assert parameter_groups(model, learning_rate=1.0)",
    "methods/packing.py": "packed, packing = unpad_input(torch.ones(1, 2, 3), torch.tensor([[True, False]]))\n"
    "assert packed.shape == (1, 1, 3) and pad_input(packed, packing).shape == (1, 2, 3)",
    "methods/patching.py": "rows = {'input_ids': [1]}, {'input_ids': [2]}\n"
    "assert activation_patching(model, *rows, 0).shape == (3, 1)\n"
    "assert shuffled(model, ['bert']) is not model",
    "methods/ghost_norms.py": "batch = dict.fromkeys(('input_ids', 'attention_mask'), torch.tensor([[5, 6], [7, 8]]))\n"
    "taken = GhostNorms(model, lambda model, batch: model(**batch).logits[:, 0], batch)\n"
    "taken.add(taken.norms); assert taken.norms.shape == (2,) and model.classifier.weight.grad is not None",
    "methods/privacy.py": "batch = dict.fromkeys(('input_ids', 'attention_mask'), torch.tensor([[5, 6], [7, 8]]))\n"
    "settings = Privacy(delta=1e-3, noise_multiplier=1.0); private = Private(settings, 9, 2, 5, torch.device('cpu'))\n"
    "private.gradient(lambda model, batch: model(**batch).logits[:, 0])(model, [batch]); next(private.places())\n"
    "assert model.classifier.weight.grad is not None",
    "methods/preferences.py": "assert advantages(torch.tensor([1.0, 1.0]), 2).tolist() == [0.0, 0.0] and dpo()",
    "methods/pruning.py": "assert [len(own) for own in importance(model, ROWS)] == [2, 2]\n"
    "assert prune(model, {0: [1]}).config.kept_units == {'heads': {'0': [2, [0]]}}",
    "methods/quantization.py": "assert quantize(model, dynamic=True)(torch.tensor([[5, 6]])).logits.shape == (1, 2)",
    "methods/regularization.py": "add_mixout([model.classifier], 0.5)\n"
    "assert model.classifier(torch.ones(1, 16)).shape == (1, 2)",
    "methods/speedups.py": "x = torch.ones(20, 3); assert linear(x, x).shape == (20, 20); assert dropout(x, 0.0) is x",
    "methods/through_peft.py": "assert callable(add_peft)",
    "methods/token_losses.py": "gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16,\n"
    "    n_layer=1, n_head=2)); ids = torch.tensor([[5, 6, 7]])\n"
    "with in_chunks(gpt):\n    assert gpt(input_ids=ids, labels=ids).loss > 0",
    "methods/tuning.py": "assert tune(model, 'lora', rank=2).trainable; assert merge(model) is model",
    "methods/vocabulary.py": "assert add_tokens(model, tokenizer, ['c']) == [3]",
    "methods/unpadding.py": "ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])\n"
    "before = model(ids, mask).logits; unpad(model)\n"
    "assert torch.allclose(model(ids, mask).logits, before, atol=1e-5); repad(model)",
    "engine/answering.py": "at = torch.tensor([[0, 1], [2, 3]]).numpy()\n"
    "assert _best(torch.ones(2, 2).numpy(), at, 'a b', 1)[:3] == (2, 0, 1)",
    "engine/bases.py": "model.save_pretrained(folder / 'm'); m = type(model).from_pretrained(folder / 'm')\n"
    "name, identity, words = put_down(m, {}, folder / 'x', folder / 'x')\n"
    "assert name == str(folder / 'm') and not words; fit_to(m, {}, identity, folder, given=False)",
    "engine/checkpoints.py": "prepare(folder / 'c', going_on=False); assert 'manifest' in damage(folder / 'c')",
    "engine/compiling.py": "asked = SimpleNamespace(gradient_checkpointing=True, compile=False, precision='fp32',\n"
    "    shortcuts=True, dropout=None, distill=None)\n"
    "with training_modes(model, asked):\n    assert model.bert.encoder.layer[0].gradient_checkpointing",
    "engine/distributed.py": "start(); assert (rank(), world_size()) == (0, 1)",
    "engine/generation.py": "gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16,\n"
    "    n_layer=1, n_head=2)); options = dict(tokenizer=tokenizer, max_new_tokens=2)\n"
    "assert len(generate(gpt, ['a b', 'b'], **options)) == 2",
    "engine/recovery.py": "assert out_of_memory(torch.OutOfMemoryError()); RandomState(torch.device('cpu')).take()",
    "engine/saving.py": "save(model, folder / 'saved'); assert type(load(folder / 'saved')) is type(model)\n"
    "from mylib.methods.tuning import tune\n"
    "for kind in ('lora', 'houlsby', 'pfeiffer'):\n"
    "    tune(adapted := load(folder / 'saved'), kind); save(adapted, folder / kind)\n"
    "    assert type(load(folder / kind)) is type(model) and not (folder / kind / 'base').exists()",
    "engine/search.py": "assert rungs(None, 1, 9) == [(9, 1), (3, 3), (1, 9)]",
    "engine/untrusted.py": "assert list(whole_numbers({'a': 3}))",
}  # fmt: skip

# What a reader does with copies of methods/: a plain loop of torch, and the stock Trainer.
TRAINING = """
from mylib.methods.losses import cross_entropy
from mylib.methods.speedups import shortcuts
from mylib.methods.tuning import merge, tune
from mylib.methods.unpadding import unpad

batch = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([0, 1]),
}
rows = [{name: value[i] for name, value in batch.items()} for i in (0, 1)]
report = tune(model, "lora", rank=2)
unpad(model)
moving = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
assert 0 < len(moving) < len(list(model.parameters()))
with shortcuts(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    losses = []
    for _ in range(2):
        loss = cross_entropy(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    arguments = transformers.TrainingArguments(
        str(folder / "trainer"), max_steps=2, per_device_train_batch_size=2, learning_rate=0.05, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
    )
    own = lambda outputs, labels, num_items_in_batch=None: cross_entropy(outputs.logits, labels)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=own)
    trainer.train()
logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
assert len(logged) == 2 and logged[1] < losses[0]
moved = {name for name, p in model.named_parameters() if name in moving and not torch.equal(p, moving[name])}
assert moved == set(moving), set(moving) - moved
assert type(merge(model)) is transformers.BertForSequenceClassification
"""
TRAINED = ["methods/losses.py", "methods/speedups.py", "methods/tuning.py", "methods/unpadding.py"]

# One process a package, forked from one that has loaded torch and transformers and nothing else.
PROGRAM = """
import importlib, json, os, sys, traceback
from pathlib import Path
from types import SimpleNamespace

# a machine with torch and transformers alone
for name in ("datasets", "evaluate", "sklearn", "seqeval", "matplotlib", "peft", "sentence_transformers", "pandas",
             "sacrebleu", "rouge_score"):
    sys.modules[name] = None
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import torch._dynamo  # what the first step of an optimizer imports
from transformers import AutoModel, CONFIG_MAPPING, BertForSequenceClassification, Trainer  # imported when asked for

torch.set_num_threads(1)
sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)

def attempt(folder, module, snippet):
    sys.path[0] = str(folder)
    importlib.invalidate_caches()
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    space = {
        "torch": torch, "transformers": transformers, "folder": folder, "SimpleNamespace": SimpleNamespace,
        "model": transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval(),
        "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[UNK]"),
        "ROWS": [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1], "labels": 0}],
    }
    if module:
        found = importlib.import_module(module)
        assert Path(found.__file__).is_relative_to(folder), found.__file__
        space |= {name: value for name, value in vars(found).items() if not name.startswith("__")}
    exec(snippet, space)
    assert not any(name.split(".")[0] == "ftlib" for name in sys.modules)

tried = json.loads(sys.argv[2])
for place, (module, snippet) in tried.items():
    folder = Path(sys.argv[1]) / place
    child = os.fork() if len(tried) > 1 else 0
    if child:
        os.waitpid(child, 0)
        continue
    try:
        attempt(folder, module, snippet)
        said = ""
    except BaseException:
        said = traceback.format_exc()
    (folder / "said").write_text(said)
    os._exit(0)
"""


def line(path):
    """What the `To copy:` of a file says, None where it has none."""
    said = ast.get_docstring(ast.parse(path.read_text("utf8"))) or ""
    found = re.search(r"(?:^|  )To copy: (.*?\.)$", said, re.S | re.M)
    return found and " ".join(found[1].split())


def named(text, path):
    """The files named in such a line, those of a room for `room/`."""
    text = re.sub(
        r"(\w+/)\{([\w,\s]+)\}\.py", lambda m: " ".join(f"{m[1]}{n.strip()}.py" for n in m[2].split(",")), text
    )
    files = {HERE / name for name in re.findall(r"\w+/\w+\.py", text)}
    rooms = re.findall(r"\b(\w+)/(?=[\s,.;)]|$)", text)
    return files | {other for room in rooms for other in FILES if other.parent == HERE / room and other != path}


def promised(path):
    """The files a file's head tells to copy; those in brackets are for some uses only."""
    return {path} | named(re.sub(r"\([^)]*\)", "", line(path)), path)


def relative(path, deep=False):
    """The files that a file imports: when it is imported itself, or anywhere."""
    found, nodes = set(), list(ast.parse(path.read_text("utf8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not deep:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            module = place.with_suffix(".py")
            found |= {module} if node.module and module.is_file() else {place / f"{a.name}.py" for a in node.names}
    return found


def closure(path):
    """The file and all that it needs to be imported."""
    seen, todo = set(), [path]
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            todo += relative(one)
    return seen


def short(path):
    return path.relative_to(HERE).as_posix()


COPIED = {short(path): path for path in FILES if line(path)}


def lay_out(folder, files):
    """The files as a package `mylib`, rooms as packages in it."""
    (folder / "mylib").mkdir(parents=True)
    (folder / "mylib" / "__init__.py").touch()
    for path in files:
        room = folder / "mylib" / path.parent.name
        room.mkdir(exist_ok=True)
        (room / "__init__.py").touch()
        shutil.copy(path, room)


def test_every_file_that_promises_is_tried():
    assert set(COPIED) == set(SNIPPETS) and not NEVER & set(COPIED)


@pytest.mark.parametrize("name", COPIED)
def test_a_file_names_what_it_imports_and_no_more(name):
    path = COPIED[name]
    own, needed = promised(path), closure(path)
    assert needed <= own, f"not named: {sorted(map(short, needed - own))}"
    rooms = {HERE / room for room in re.findall(r"\b(\w+)/(?=[\s,.;)]|$)", re.sub(r"\([^)]*\)", "", line(path)))}
    used = needed | relative(path, deep=True)
    in_vain = {other for other in own - used if other.parent not in rooms}
    assert not in_vain, f"named in vain: {sorted(map(short, in_vain))}"
    assert all(any(other.parent == room for other in used) for room in rooms)
    if "this file alone" in line(path):
        assert own == {path}


@pytest.mark.parametrize("name", COPIED)
def test_what_a_function_imports_is_named_too(name):
    """In brackets, most of it: it is for some uses only."""
    path = COPIED[name]
    assert relative(path, deep=True) <= promised(path) | named(line(path), path)


def attempted(folder, tried):
    """{folder: what went wrong} for {folder: (module to import or None, what to run)}."""
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(tried)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return {place: (folder / place / "said").read_text() for place in tried}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    tried = {}
    for name, path in COPIED.items():
        place = name.removesuffix(".py").replace("/", "-")
        lay_out(folder / place, promised(path))
        tried[place] = (f"mylib.{place.replace('-', '.')}", SNIPPETS.get(name, ""))
    return attempted(folder, tried)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for every file")
@pytest.mark.parametrize("name", COPIED)
def test_the_files_named_are_enough(results, name):
    assert results[name.removesuffix(".py").replace("/", "-")] == ""


def test_copies_train_in_a_plain_loop_and_in_the_stock_trainer(tmp_path):
    lay_out(tmp_path / "own", set().union(*(promised(COPIED[name]) for name in TRAINED)))
    assert attempted(tmp_path, {"own": (None, TRAINING)}) == {"own": ""}


# What the brackets of a head promise: with those files too, this runs, without data/sources.toml.
FURTHER = {
    "methods/features.py": "model.save_pretrained(folder / 'm'); tokenizer.save_pretrained(folder / 'm')\n"
    "assert extract_features(folder / 'm', ['a b']).shape == (1, 16)",
    "engine/saving.py": "from mylib.methods.multitask import Head, MultiTaskModel\n"
    "from mylib.methods.tuning import tune\n"
    "m = MultiTaskModel(model.bert, {'a': Head()})\n"
    "for strategy in ('full', 'lora'):\n"
    "    tune(m, strategy); save(m, folder / 'm'); assert load(folder / 'm').tasks == m.tasks",
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for every file")
def test_the_files_in_brackets_are_enough_for_their_uses(tmp_path):
    for name in FURTHER:
        more = named(line(COPIED[name]), COPIED[name])
        lay_out(
            tmp_path / name[:-3].replace("/", "-"),
            set().union(*(promised(p) for p in {COPIED[name], *more} if line(p))),
        )
    tried = {name[:-3].replace("/", "-"): (f"mylib.{name[:-3].replace('/', '.')}", FURTHER[name]) for name in FURTHER}
    assert attempted(tmp_path, tried) == dict.fromkeys(tried, "")
