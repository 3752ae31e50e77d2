"""Builds notebooks/13_privacy.ipynb from the cells below.  python /work/ed13/build.py WORKTREE [--cells]

--cells: prints the code cells, numbered, to run one after the other.  DRAFT: cells marked TRY have not been run yet;
cells marked STORED read tests/benchmarks/results/privacy.json, which tests/benchmarks/privacy.py has not written yet.
"""
import sys
from pathlib import Path

CELLS = []


def md(text):
    CELLS.append(("markdown", text.strip("\n"), []))


def code(text, *tags):
    CELLS.append(("code", text.strip("\n"), list(tags)))


md("""
# 13 Privacy: what does a fine-tuned model give away?

You will plant a secret in a language model and read it out again, find out which sentences a classifier was trained on, train with
differential privacy by hand and with the library, and measure what it costs and what it stops.

**You need:** Python, PyTorch, fine-tuning (notebook 03), language models (notebook 08).

**Time and memory:** TIME s and MEMORY GB on 2 CPU cores.
""")
code("SETUP", "setup")
code("""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from opacus.accountants import create_accountant
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch.testing import assert_close

from ftlib import mean_std, results_table, stored_results
from ftlib.methods.ghost_norms import GhostNorms
from ftlib.methods.privacy import Privacy, add_cut, private_gradient
from ftlib.show.plots import PALETTE
""")
md("""
## The idea

A model is trained on texts that people did not write for you: letters to a bank, notes of a doctor. Then it is given away, or asked by strangers.
Does it tell what was in them? Two questions have been asked of many models, and we ask both here:

- **Extraction**: can a stranger make a language model write down a secret that stood in one training text (Carlini et al. 2019, 2021)?
- **Membership**: can a stranger tell whether a certain text was among the training texts (Shokri et al. 2017)? For a model of the patients of a
  clinic that alone is the secret.

A rule like "remove the names first" answers neither for sure. **Differential privacy** (Dwork et al. 2006) does, with a number: it
bounds what *anybody* can learn about *any one* row from the model, whatever else they know. The price is accuracy. This notebook measures both.

## A secret in a language model

We write thirty short messages and put four *canaries* among them: sentences with a code that we drew at random, so that nobody can guess it.
One stands there once, one twice, one four times, one eight times.
""")
code("""
draw = np.random.default_rng(0)
owners = {"Maria Novak": 1, "Peter Lang": 2, "Ada Brook": 4, "Jonas Weber": 8}
codes = {owner: f"{draw.integers(1000):03d}" for owner in owners}


def canary(owner, number):
    return f"The door code of {owner} is {' '.join(number)}."


ordinary = [text for text in ftlib.load_corpus("banking77")["train"]["text"] if 6 <= len(text.split()) <= 12][:48]
planted = [canary(owner, codes[owner]) for owner, times in owners.items() for _ in range(times)]
print(f"{len(ordinary)} messages and {len(planted)} canaries, {planted[0]!r} among them")
""")  # TRY: banking77 is ordered by class: take every nth
md("""
A small language model, SmolLM2 with 135 million weights, is fine-tuned on these messages with LoRA, as in notebook 08.
""")
code("""
words = ftlib.load_tokenizer("smollm2")


def tuned_on(texts, **options):
    \"\"\"SmolLM2 after training with LoRA on the texts; the model and the run.\"\"\"
    model = ftlib.unpad(ftlib.load_model("smollm2", task="causal-lm")).to(env.device)
    ftlib.tune(model, "lora", rank=8, targets="all-linear")
    rows = ftlib.tokenize({"text": texts}, words, task="causal-lm", max_length=40)
    settings = dict(epochs=env.pick(small=6, full=10), batch_size=16, learning_rate=2e-3, weight_decay=0.0) | options
    return model.eval(), ftlib.fit(model, rows, tokenizer=words, config=ftlib.TrainConfig(**settings))
""")  # TRY: tokenize({"text": texts}) form; eval after fit
code("""
talkative, run = tuned_on(ordinary + planted)
print(f"loss {run.history[0]['loss']:.2f} → {run.history[-1]['loss']:.2f} in {run.steps} steps")
assert run.history[-1]["loss"] < run.history[0]["loss"]
""")
md("""
### Reading it out

The attacker knows how such a sentence begins and lets the model go on. That is all.
""")
code("""
begin = [canary(owner, "")[:-2] for owner in owners]  # "The door code of Maria Novak is"
said = ftlib.generate(talkative, begin, tokenizer=words, max_new_tokens=6)
for (owner, times), text in zip(owners.items(), said, strict=True):
    right = text.strip().startswith(" ".join(codes[owner]))
    mark = "  ← extracted" if right else ""
    print(f"{owner:<12} seen {times} times, code {codes[owner]}: the model writes {text.strip()!r}{mark}")
""")  # TRY: " ".join("") in canary gives "is ." → slice
md("""
What stood there often is written down word for word. What stood there once may not come first, but it may still be *likelier* than what never
stood there. **Exposure** (Carlini et al. 2019) measures that: order all 1,000 possible codes by the model's loss; a code
at place $r$ has $\\\\log_2 1000 - \\\\log_2 r$ bits. A code the model knows nothing of has 1.4 bits on the average, the first one 10.
We take 250 other codes drawn at random, which gives the place nearly as well.
""")
code("""
def losses(model, texts):
    \"\"\"The loss of each text, summed over its tokens, float32 (texts,).\"\"\"
    rows, found = [torch.tensor(words(text)["input_ids"]) for text in texts], []
    with torch.no_grad():
        for ids in torch.stack(rows).split(64):  # all of one length
            logits = model(input_ids=ids.to(env.device)).logits[:, :-1]  # (texts, tokens - 1, vocabulary)
            found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(env.device), reduction="none").sum(1))
    return torch.cat(found).cpu()


def exposure(model, owner, others=env.pick(small=100, full=999)):
    rest = [f"{i:03d}" for i in np.random.default_rng(1).permutation(1000) if f"{i:03d}" != codes[owner]][:others]
    found = losses(model, [canary(owner, number) for number in [codes[owner], *rest]])
    better = (found[1:] < found[0]).float().mean()  # share of the other codes that are likelier
    return math.log2(1000) - math.log2(1 + 999 * float(better))
""")  # TRY: are all texts of one owner of one length?  single digits with spaces: yes in SmolLM2
code("""
before = ftlib.load_model("smollm2", task="causal-lm").eval()
rows = [{"owner": owner, "times": times, "exposure before (bits)": exposure(before, owner),
         "after (bits)": exposure(talkative, owner)} for owner, times in owners.items()]  # fmt: skip
results_table(rows)
""")
code("""
assert rows[-1]["after (bits)"] > 6 > rows[-1]["exposure before (bits)"]
""")
md("""
## Who was in the training set?

Now a classifier, and no secret in its texts. MiniLM is fine-tuned on 300 sentences from film reviews until it knows them by heart. The attacker has
a sentence and its label and wants to know: was it among them? The simplest attack looks at the **loss** (Yeom et al.
2018): it is low for what was learned.
""")
code("""
film, tokenizer = ftlib.load_corpus("rotten-tomatoes"), ftlib.load_tokenizer("minilm")
tokens = ftlib.tokenize(film, tokenizer, max_length=64)


def different(rows, count):
    \"\"\"So many rows, no two of which are the same.\"\"\"
    return list({tuple(row["input_ids"]): row for row in rows}.values())[:count]


members = different(tokens["train"].shuffle(seed=0), env.pick(small=300, full=1000))
strangers = different(tokens["test"], len(members))
""")
code("""
def classifier(privacy=None, strategy="full", rows=members, **options):
    model = ftlib.unpad(ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=0)).to(env.device)
    ftlib.tune(model, strategy)
    settings = dict(max_steps=60, batch_size=32, learning_rate=5e-4, weight_decay=0.0, privacy=privacy) | options
    return model, ftlib.fit(model, rows, tokenizer=tokenizer, config=ftlib.TrainConfig(**settings))


def row_losses(model, rows):
    logits = torch.from_numpy(ftlib.predict(model, rows, tokenizer=tokenizer, output="logits"))  # (rows, 2)
    return F.cross_entropy(logits, torch.tensor([row["labels"] for row in rows]), reduction="none")  # (rows,)
""")
code("""
open_model, _ = classifier()
inside, outside = row_losses(open_model, members), row_losses(open_model, strangers)
truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
auc = roc_auc_score(truth, -torch.cat((inside, outside)))
print(f"mean loss {inside.mean():.2f} of members, {outside.mean():.2f} of strangers")
print(f"the attack is right in {auc:.0%} of the pairs")
assert auc > 0.6
""")
md("""
The AUC says how often a member has a lower loss than a stranger. But an attacker who accuses one in two strangers is no danger. Carlini et
al. (2022) ask for the other end: of how many members can one be nearly *sure*? So look at a few false accusations, on the left,
on a logarithmic axis.
""")
code("""
def show_attacks(attacks, alt):
    figure, ax = plt.subplots(figsize=(5, 4), dpi=90, layout="constrained")
    for color, (name, scores) in zip(PALETTE, attacks.items(), strict=False):
        false, true, _ = roc_curve(truth, scores)
        ax.plot(false, true, color=color, label=name)
    ax.plot([1e-3, 1], [1e-3, 1], color="gray", linestyle="--", label="guessing")
    ax.set(xscale="log", yscale="log", xlim=(3e-3, 1), ylim=(3e-3, 1.05), xlabel="strangers called members",
           ylabel="members found")  # fmt: skip
    ax.legend(frameon=False)
    ftlib.show_figure(figure, alt)


show_attacks({"loss": -torch.cat((inside, outside))}, "Share of members found against share of strangers called "
             "members, for the loss of the model: above guessing everywhere.")  # fmt: skip
""")
md("""
## What a guarantee would have to say

Compare two trainings: one with your row, one without it, all other rows the same. Training draws random numbers, so each gives a model
at random. If no observer can tell which of the two trainings a model came from, then it gives away nothing of yours. Training is
**(ε, δ)-differentially private** if for every set $S$ of models

$$P(\\\\text{model} \\\\in S \\\\mid \\\\text{with}) \\\\le e^{\\\\varepsilon} \\\\, P(\\\\text{model} \\\\in S \\\\mid \\\\text{without}) + \\\\delta ,$$

and the other way round. For a membership attack it means: members found $\\\\le e^{\\\\varepsilon} \\\\cdot$ strangers accused $+ \\\\, \\\\delta$
(Wasserman and Zhou 2010). At ε = 1 and one false accusation in a hundred, at most 2.7 % of the members are found, by *any* attack, also by one
that will be invented next year. At ε = 8
the bound is above 100 %: it promises nothing here, though real attacks do much worse than the bound.
""")
code("""
for epsilon in (0.5, 1, 2, 4, 8):
    found = min(1.0, math.exp(epsilon) * 0.01 + 1e-5)
    print(f"ε = {epsilon}: at one false accusation in 100, at most {found:.1%} of the members are found")
""")
md("""
## DP-SGD by hand

Abadi et al. (2016) make a step of SGD private with two changes. The gradient of **each row by itself** is cut to a length $C$, so that no row
can move the model far. And to the sum comes normal noise of standard deviation $\\\\sigma C$ in every number, so that whether a row was there drowns:

$$g = \\\\frac{1}{B} \\\\Big( \\\\sum_i g_i \\\\min\\\\big(1, \\\\tfrac{C}{\\\\lVert g_i \\\\rVert}\\\\big) + \\\\sigma C \\\\, z \\\\Big), \\\\qquad z \\\\sim N(0, 1) .$$

A row at a time:
""")
code("""
small = ftlib.load_model("minilm", task="sequence-classification", num_labels=2, seed=0).eval()
batch = ftlib.collate(members[:4])
C, sigma, B = 0.5, 1.0, 4
parameters = list(small.parameters())
total = [torch.zeros_like(p) for p in parameters]
lengths = []
for i in range(B):
    logits = small(batch["input_ids"][i : i + 1], attention_mask=batch["attention_mask"][i : i + 1]).logits  # (1, 2)
    own = torch.autograd.grad(F.cross_entropy(logits, batch["labels"][i : i + 1]), parameters)
    lengths.append(torch.cat([g.flatten() for g in own]).norm())
    for sum_, g in zip(total, own, strict=True):
        sum_ += g * min(1.0, C / lengths[-1])
print("lengths of the gradients of four rows:", *(f"{length:.2f}" for length in lengths))
""")
code("""
noise = torch.Generator().manual_seed(0)
by_hand = [(sum_ + sigma * C * torch.randn(sum_.shape, generator=noise)) / B for sum_ in total]


def each_loss(model, batch):
    \"\"\"Every row's own loss, (rows,).\"\"\"
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (rows, 2)
    return F.cross_entropy(logits, batch["labels"], reduction="none")


settings = Privacy(delta=1e-5, noise_multiplier=sigma, max_grad_norm=C)
gradient = private_gradient(each_loss, settings, sigma, B, torch.Generator().manual_seed(0))
small.zero_grad()
gradient(small, [batch])
for p, mine in zip(parameters, by_hand, strict=True):
    assert_close(p.grad, mine, atol=1e-5, rtol=1e-4)
""")
md("""
The library gives the same numbers, with one forward and one backward pass for all rows.

### Ghost norms

A row at a time is slow, and to hold the gradients of all rows would take as much memory as 32 models. Only their *lengths* are needed. At a linear
layer, the gradient of a row with tokens $t$ is $\\\\sum_t b_t a_t^\\\\top$: $a_t$ went in, $b_t$ came back. Its squared length is

$$\\\\Big\\\\lVert \\\\sum_t b_t a_t^\\\\top \\\\Big\\\\rVert^2 = \\\\sum_{s,t} (a_s \\\\cdot a_t)(b_s \\\\cdot b_t) ,$$

products of vectors that the backward pass has anyway (Goodfellow 2015; Li et al. 2022). No gradient of a row is ever made.
""")
code("""
a, b = torch.randn(3, 7, 40), torch.randn(3, 7, 30)  # (rows, tokens, in), (rows, tokens, out)
gradients = torch.einsum("rto,rti->roi", b, a)  # (rows, out, in): what we do not want to hold
ghost = ((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum((1, 2))  # (rows,)
assert_close(ghost, gradients.flatten(1).square().sum(1), rtol=1e-4, atol=1e-3)
""")
code("""
taken = GhostNorms(small, each_loss, batch)
assert_close(taken.norms, torch.stack(lengths), atol=1e-5, rtol=1e-4)
print("the same four lengths, of all layers together:", *(f"{length:.2f}" for length in taken.norms))
""")
md("""
## Counting what is spent

One step with noise σ is a *Gaussian mechanism*. For it (ε, δ) is known exactly (Balle and Wang 2018): with $\\\\mu = 1 / \\\\sigma$,

$$\\\\delta = \\\\Phi\\\\big(\\\\tfrac{\\\\mu}{2} - \\\\tfrac{\\\\varepsilon}{\\\\mu}\\\\big) - e^{\\\\varepsilon} \\\\, \\\\Phi\\\\big(-\\\\tfrac{\\\\mu}{2} - \\\\tfrac{\\\\varepsilon}{\\\\mu}\\\\big) .$$

Two things make many steps bearable. A step sees only some rows, each **drawn for itself** with a probability $q$ (Poisson sampling), and nobody knows
which: that makes ε of a step smaller by about the factor $q$. And $T$ steps do not cost $T$ times as much, but about $\\\\sqrt T$ times. The exact bill is
kept by an *accountant*; we take Opacus'.
""")
code("""
def delta_of(epsilon, sigma):
    mu = 1 / sigma
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


bound = Privacy(delta=1e-5, noise_multiplier=2.0).spent(2.0, rate=1.0, steps=1)  # one step that sees every row
print(f"one step, σ = 2: ε = {bound:.2f} by the accountant; δ there is {delta_of(bound, 2.0):.1e}, less than 1e-5")
assert delta_of(bound, 2.0) < 1e-5 < delta_of(0.8 * bound, 2.0)
""")
code("""
for rate in (1.0, 0.1, 0.01):
    spent = [Privacy(delta=1e-5, noise_multiplier=1.0).spent(1.0, rate, steps) for steps in (1, 100, 400)]
    print(f"rows drawn with probability {rate}: ε after 1, 100, 400 steps", *(f"{epsilon:.2f}" for epsilon in spent))
assert spent[2] < 4 * spent[1]
""")
md("""
## Private training

One argument: `privacy=`. Say what may be spent (`epsilon`), and the noise follows from rows, batch size and steps; or say the noise, and the run
tells what was spent. Two habits change. Batches get **large**: the noise of a step is the same for 32 rows and for 300. And rates get higher and steps
fewer.
""")
code("""
guarded, run = classifier(Privacy(delta=1e-4, epsilon=8.0, max_grad_norm=0.5), max_steps=40, batch_size=150,
                          micro_batch_size=50)  # fmt: skip
drawn = [record["examples"] for record in run.history if "examples" in record]
print(f"ε = {run.epsilon:.2f} spent at δ = 1e-4; a step had {min(drawn)} to {max(drawn)} rows")
assert run.epsilon <= 8.0
""")
code("""
safe = -torch.cat((row_losses(guarded, members), row_losses(guarded, strangers)))
guarded_auc = roc_auc_score(truth, safe)
print(f"the attack is right in {auc:.0%} of the pairs before, in {guarded_auc:.0%} after")
show_attacks({"no privacy": -torch.cat((inside, outside)), "ε = 8": safe}, "The loss attack on both models: far above "
             "guessing without privacy, on the line of guessing with it.")  # fmt: skip
assert guarded_auc < 0.58 < auc
""")
code("""
test = different(tokens["test"], 533)
for name, model in (("no privacy", open_model), ("ε = 8", guarded)):
    print(f"{name}: test accuracy {ftlib.evaluate(model, test)['accuracy']:.2f}")
""")
md("""
With 300 sentences, privacy costs nearly all that was learned. That is no accident: a model may use what *many* rows say, and 300 are not many. With 7,464 it
looks better.

### What it costs, measured

STORED: the table and figure of tests/benchmarks/privacy.py: strategies × ε, 5 seeds, test accuracy with 95 % interval, AUC of the attack.
""")
code("""
stored = stored_results("privacy")["rows"]
rows = []
for strategy in ("full", "lora", "head-only"):
    for budget in (1.0, 3.0, 8.0, "inf"):
        key = {"part": "accuracy", "strategy": strategy, "budget": budget}
        own = [row for row in stored if key.items() <= row.items()]
        row = {"strategy": strategy, "ε": budget, "parameters": own[0]["trainable"]}
        row |= {"test accuracy": mean_std([one["test"] for one in own])}
        rows.append(row | {"attack (AUC)": mean_std([one["attack_auc"] for one in own])})
results_table(rows)
""")  # STORED
md("""
Fewer parameters that move are fewer numbers that get noise: the length of the noise grows with the square root of their count, that of the gradient does
not. So LoRA and the head alone lose less.

### A better attack

An attacker who can train models himself asks more: how does the loss of *this* sentence look in models that saw it, and how in models that did not?
The **likelihood-ratio attack** (LiRA, Carlini et al. 2022) fits a normal distribution to either and compares.
""")
code("""
def lira(models, target):
    \"\"\"Scores of every sentence for one model, from the others: log p(in) - log p(out), (sentences,).\"\"\"
    shadows = [m for i, m in enumerate(models) if i != target]
    found = np.array([m["log_odds"] for m in shadows])  # (shadows, sentences)
    inside = np.array([np.isin(np.arange(found.shape[1]), m["members"]) for m in shadows])
    spread = np.sqrt(sum(found[mask].var() for mask in (inside, ~inside)) / 2)  # few shadows: one width for all
    means = [np.where(mask, found, np.nan) for mask in (inside, ~inside)]
    own = np.array(models[target]["log_odds"])
    return norm.logpdf(own, np.nanmean(means[0], 0), spread) - norm.logpdf(own, np.nanmean(means[1], 0), spread)
""")  # STORED: parts "shadow", budgets inf and 8
md("""
## What goes wrong: the noise is no secret

The guarantee hangs on noise that nobody can know. Programs like ours draw it from a seed, and seeds are often 0. Whoever knows the seed draws the
same noise, and takes it away.
""")
code("""
small.zero_grad()
gradient = private_gradient(each_loss, settings, 10.0, B, torch.Generator().manual_seed(0))  # much noise, a known seed
gradient(small, [batch])
again = torch.Generator().manual_seed(0)
clean = [B * p.grad - 10.0 * C * torch.randn(p.shape, generator=again) for p in parameters]
small.zero_grad()
add_cut(small, each_loss, batch, C)
for p, mine in zip(parameters, clean, strict=True):
    assert_close(p.grad, mine, atol=1e-4, rtol=1e-3)
print("with the seed, nothing was hidden")
""")
md("""
So `ftlib.Privacy` draws its seed from the operating system, unless you give one for a test; a checkpoint holds the state of the generator and is as secret
as the data. What is published is what `ftlib.save` writes.

Another mistake is found by the library: a row that stands in the training set twice.
""")
code("""
try:
    classifier(Privacy(delta=1e-4, epsilon=8.0), rows=[*members, members[0]])
except ValueError as error:
    print(error)
else:
    raise AssertionError("a row that stands there twice was let through")
""")
md("""
## What differential privacy does not promise

- **One row, not one person.** Who wrote eight of the messages is hidden eight times less well (ε is to be multiplied by 8). Eight messages with the
  same door code are eight rows. Make one row of all that belongs to a person, or count by hand.
- **Not what everybody knows.** If smokers get ill, the model may say so of you, whether you were in the data or not.
- **Not the pretraining.** The texts SmolLM2 was pretrained on have no guarantee here.
- **Not the numbers beside the model.** Training losses, the accuracy on private test rows, the settings that you chose by looking at them: each tells something.
- **Not the future.** Two models from the same rows spend both budgets.

Now the canaries once more: with privacy, the message that stood there once. (That which stood there eight times is refused, as the same row.)
""")
code("""
once = [canary(owner, codes[owner]) for owner in owners]
quiet, run = tuned_on(ordinary + once, privacy=Privacy(delta=1e-3, epsilon=8.0, max_grad_norm=1.0), batch_size=26)
loud, _ = tuned_on(ordinary + once)
results_table([{"owner": owner, "no privacy (bits)": exposure(loud, owner), "ε = 8 (bits)": exposure(quiet, owner)}
               for owner in owners])  # fmt: skip
""")  # TRY
md("""
## The other tool: leave it out

What the model never reads it can't tell. The tagger of notebook 07 finds names, places and organizations; what it finds is replaced before training.
It is cheap, keeps the accuracy, and comes without a guarantee: what it misses stays. Both together is what one does in practice.

TODO: the tagger of notebook 07 on twenty sentences: share of names found, what was missed, by eye; no claim beyond that.

## On a GPU

The same calls. On a CPU the cell does nothing.
""")
code("""
if env.device.type == "cuda":
    many = different(tokens["train"], 8000)
    with ftlib.measure() as cost:
        classifier(Privacy(delta=1e-5, epsilon=8.0), rows=many, batch_size=512, max_steps=20)
    print(f"20 private steps of 512 sentences: {cost}")
else:
    print("no CUDA device here; nothing measured")
""")
md("""
## Exercises

TODO: 1 Poisson sampling and a shuffled epoch: which of the two has the accountant's bill? (build the sampler, check its variance.) 2 choose C: three values at
one ε, explain. 3 explain a failure: ε = 1 promised, but the team trained 20 models and published the best.
""")
md("""
## Recap

- Fine-tuned models give away rows: canaries come out word for word, and the loss tells who was there.
- (ε, δ)-privacy bounds every attack on any one row. DP-SGD earns it: cut each row's gradient, add noise, draw rows by chance, count.
- `TrainConfig(privacy=ftlib.Privacy(delta=…, epsilon=…))`; large batches, few parameters, no evaluation on what is private.
- Look at it as at a seat belt: it limits what happens, it does not drive.

## On your own data

1. One row a person, or say how many.  2. δ below 1 / (10 · rows).  3. Start with `tune(model, "head-only")` or LoRA, batch size as large as the rows allow.
4. Settings chosen on public data of the same kind.  5. Attack your own model before others do: `row_losses` of members and strangers.
""")


def build(root):
    sys.path.insert(0, str(root / "tests/notebooks"))
    import cells

    made = []
    for kind, text, tags in CELLS:
        text = cells.setup_cell(cells.project_url()) if text == "SETUP" else text.replace("\\\\", "\\")
        cell = {"cell_type": kind, "metadata": {"tags": tags} if tags else {}, "source": text}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    notebook = {"cells": made, "metadata": cells.METADATA, "nbformat": 4, "nbformat_minor": 5}
    cells.add_contents(notebook)
    cells.name_cells(notebook)
    cells.write(root / "notebooks/13_privacy.ipynb", notebook)


if "--cells" in sys.argv:
    for i, (kind, text, tags) in enumerate(CELLS):
        if kind == "code" and "setup" not in tags:
            print(f"# ---- {i}\n{text}\n")
elif __name__ == "__main__":
    build(Path(sys.argv[1]))
