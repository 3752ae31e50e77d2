"""Builds notebooks/10_interpretation.ipynb from the cells below.  python /work/ed10/build.py WORKTREE [--cells]

--cells: prints the code cells, numbered, to run one after the other.  DRAFT: cells marked TRY have not been run yet.
"""
import sys
from pathlib import Path

CELLS = []


def md(text):
    CELLS.append(("markdown", text.strip("\n"), []))


def code(text, *tags):
    CELLS.append(("code", text.strip("\n"), list(tags)))


md("""
# 10 Interpretation: which words made the model say that?

You will compute six explanations of one answer by hand and with the library, color a text by them, measure which of them to believe, find
a word that a model should never have learned, ask what its layers know, and see where a language model looks a fact up.

**You need:** Python, PyTorch, attention (notebook 01), fine-tuning (notebook 03), frozen features (notebook 04).

**Time and memory:** TIME s and MEMORY GB on 2 CPU cores.
""")
code("SETUP", "setup")
code("""
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from ftlib import against, results_table
from ftlib.methods.attention import attention_flow, attention_maps, rollout
from ftlib.show.plots import PALETTE
""")
md("""
## The idea

A classifier says "positive" of a review. A customer, an auditor or you ask: because of which words? An **attribution** is an answer
in numbers, one for each token: how much it counts for the logit $f(x)$ of the class. $x$ is not the text, which can't be
changed a little, but the vectors that the embedding table gives for its tokens, one row each. "Because of a word" always
means "in comparison with its absence", and we must say what absence is: a **baseline** $x_0$, here vectors of zeros.

There is no one right attribution. There are ways to compute some, and ways to find out which of them tell the truth
about the model. The second is the more important half of this notebook.

First we need a model to explain: MiniLM, fine-tuned on sentences from film reviews (Pang and Lee 2005).
""")
code("""
film = ftlib.load_corpus("rotten-tomatoes")
tokenizer = ftlib.load_tokenizer("minilm")
count = env.pick(small=1200, full=7464)


def trained(rows, seed=0):
    \"\"\"MiniLM after two passes over the rows.\"\"\"
    model = ftlib.load_model("minilm", task="sequence-classification", label_names=["neg", "pos"]).to(env.device)
    ftlib.unpad(model)
    config = ftlib.TrainConfig(epochs=2, batch_size=32, learning_rate=3e-4, seed=seed)
    ftlib.fit(model, ftlib.tokenize(rows, tokenizer, max_length=64), tokenizer=tokenizer, config=config)
    return model.eval()


model = trained(film["train"].select(range(count)))
accuracy = ftlib.evaluate(model, ftlib.tokenize(film["test"], tokenizer, max_length=64))["accuracy"]
print(f"test accuracy {accuracy:.2f}")
assert accuracy > 0.65
""")
md("""
## Gradient times input

If a token's vector moves a little, how does $f$ move? That is the gradient, one number for each of its 384 entries. Times
the vector itself, and summed, it is what the token adds to a linear model with these slopes:

$$\\\\text{score}_t = \\\\sum_d \\\\frac{\\\\partial f}{\\\\partial x_{td}} \\\\, (x_{td} - x_{0,td}) .$$
""")
code("""
text = "A dull plot, but the actors are a joy."
encoding = tokenizer([text])
ids = torch.tensor(encoding["input_ids"], device=env.device)  # (1, tokens)
table = model.get_input_embeddings()
x = table(ids).detach().requires_grad_()  # (1, tokens, hidden)
f = lambda vectors: model(inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2])).logits[:, 1]  # noqa: E731
f(x).sum().backward()
by_hand = (x.grad * x).sum(-1)[0].detach()  # (tokens,)
(ours,) = ftlib.attribute(model, encoding, "gradient-x-input", target=1)
assert_close(by_hand, torch.from_numpy(ours), atol=1e-4, rtol=1e-3)
""")
md("""
## Integrated gradients

A gradient tells of a small step, and absence is a large one: where $f$ is flat at $x$, a word that decided everything may
get a score near zero. Integrated gradients (Sundararajan et al. 2017) go the whole way from $x_0$ to $x$ in a straight line and take
the mean of the gradients met. For one number at a time that is the fundamental theorem of calculus, so the scores
**add up to what the text changed**: $\\\\sum_t \\\\text{score}_t = f(x) - f(x_0)$, the axiom of *completeness*.
""")
code("""
steps = 200
shares = (torch.arange(steps) + 0.5) / steps  # (steps,), middles of equal parts
points = (shares[:, None, None] * x.detach()).requires_grad_()  # (steps, tokens, hidden)
f(points).sum().backward()
by_hand = (points.grad.mean(0) * x[0]).sum(-1).detach()  # (tokens,)
moved = (f(x) - f(0 * x)).item()
(ours,) = ftlib.attribute(model, encoding, "integrated-gradients", target=1, steps=100)
print(f"f moves by {moved:.3f}; the scores add up to {ours.sum():.3f}, by hand {by_hand.sum():.3f}")
assert abs(ours.sum() - moved) < 1e-3 * max(1, abs(moved))
assert_close(by_hand, torch.from_numpy(ours), atol=0.05, rtol=0)
""")
md("""
The library places its points as Gauss and Legendre did, so that far fewer are needed, and warns where the sum is off.
""")
code("""
off = {}
for number in (2, 5, 10, 20, 50):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that is what we want to see
        (few,) = ftlib.attribute(model, encoding, "integrated-gradients", target=1, steps=number)
    off[number] = abs(few.sum() - moved)
print({number: f"{gap:.4f}" for number, gap in off.items()})
assert off[50] < off[2]
""")
md("""
## Taking words away

No gradient at all: put a token's vector to $x_0$ and see how far $f$ falls (**occlusion**). In a sentence with "great" and
"superb" either may go without harm, and each gets too little. **Shapley values** ask in all orders: how much does $f$ gain
when the word comes, whoever is there already? The mean over orders is the only way to share $f(x) - f(x_0)$ that is fair in
the sense of four axioms (Shapley 1953; Lundberg and Lee 2017). There are too many orders, so we draw some. Pieces of one
word come and go together: `whole_words=True`.
""")
code("""
(fall,) = ftlib.attribute(model, encoding, "occlusion", target=1)
without = x.detach().clone()
without[0, 2] = 0
assert_close(torch.tensor(fall[2]), (f(x) - f(without))[0].detach(), atol=1e-4, rtol=1e-3)
(shared,) = ftlib.attribute(model, encoding, "shapley", target=1, whole_words=True, samples=20)
words = ftlib.words_of([shared], encoding, [text])[0]
print(*(f"{word['text']} {word['score']:+.2f}" for word in words), sep=", ")
""")
md("""
This is how one would show it to a customer. Blue speaks for "positive", orange with a broken line against it. `heat.html` is the source for a
page, `heat.figure()` the picture below.
""")
code("""
heat = ftlib.TextHeatmap(text, words)
ftlib.show_figure(heat.figure())
""")
md("""
## Attention maps, and what they are not

BERT shows its weights readily, and they make fine pictures. Rollout (Abnar and Zuidema 2020) multiplies them through the
layers, with half of each layer for the residual connection; attention flow asks how much can flow from a token to the output at most.
""")
code("""
ftlib.repad(model)
maps = attention_maps(model, input_ids=ids)  # (layers, 1, heads, tokens, tokens)
reach = torch.eye(ids.shape[1])
for weights in maps[:, 0].mean(1):  # (tokens, tokens)
    reach = (weights + torch.eye(len(weights))) / 2 @ reach  # (tokens, tokens)
assert_close(reach, rollout(maps)[0])
flow = attention_flow(maps)[0]  # (tokens,), to [CLS], which the classifier reads
ftlib.unpad(model)
print("rollout", reach[0].numpy().round(2), "flow", flow.numpy().round(2), sep="\\\\n")
""")
md("""
Two things these numbers can't do. They have **no sign**: a word for and a word against the answer look alike. And they do **not
know the question**: the map is the same whether you ask why it is positive or why negative, while attributions to the two logits differ.
What a token carries when it is looked at stands in the values, which maps leave out. Jain and Wallace (2019) found that other maps can
give the same answer. Look at maps to see how a model works, not why it decided.
""")
code("""
both = [ftlib.attribute(model, encoding, "integrated-gradients", target=target)[0] for target in (0, 1)]
print(f"correlation of the scores for the two classes: {np.corrcoef(*both)[0, 1]:.2f}")
assert np.corrcoef(*both)[0, 1] < 0.5
""")
md("""
## Faithful, or only pleasant?

An explanation that looks sensible to us tells about us. To measure it we let the model answer: take words away, those with the
highest scores first. If they are what the answer hung on, its probability falls at once (**deletion**, a small area below the
curve). Put them into an empty text in the same order, and it rises at once (**insertion**, a large area; Petsiuk et al. 2018). Random
scores are the line to beat.
""")
code("""
held = film["test"].select(range(env.pick(small=40, full=200)))
texts = list(held["text"])
batch = tokenizer(texts, truncation=True, max_length=64)
draws = np.random.default_rng(0)
scores = {"random": [draws.normal(size=len(row)) for row in batch["input_ids"]]}
for method, how in {"gradient-x-input": {}, "smoothgrad": {"samples": 8}, "integrated-gradients": {"steps": 20},
                    "occlusion": {}, "shapley": {"samples": 4}}.items():  # fmt: skip
    scores[method] = ftlib.attribute(model, batch, method, whole_words=True, **how)
""")
code("""
ftlib.repad(model)
with torch.no_grad():
    rolled = [rollout(attention_maps(model, input_ids=torch.tensor([row])))[0, 0].numpy() for row in batch["input_ids"]]
ftlib.unpad(model)
scores["rollout"] = rolled
curves = {name: ftlib.faithfulness(model, batch, own, whole_words=True) for name, own in scores.items()}
gained = {name: own["insertion_area"] - own["deletion_area"] for name, own in curves.items()}
better = against({name: own.tolist() for name, own in gained.items()}, "random")
rows = [{"method": name, "deletion": curves[name]["deletion_area"].mean(), "insertion": curves[name]["insertion_area"].mean(),
         "insertion - deletion, against random": better.get(name)} for name in sorted(gained, key=lambda n: -gained[n].mean())]  # fmt: skip
results_table(rows)
""")
code("""
assert all(better[name].verdict == "more" for name in ("occlusion", "shapley"))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, sharey=True, layout="constrained")
for ax, kind in zip(axes, ("deletion", "insertion"), strict=True):
    for color, name in zip(PALETTE, ("shapley", "integrated-gradients", "random"), strict=False):
        ax.plot(np.linspace(0, 100, 21), curves[name][kind].mean(0), color=color, label=name)
    ax.set(xlabel="% of the words", title=kind)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("probability of the answer")
axes[1].legend(frameon=False)
ftlib.show_figure(figure, "Mean probability of the predicted class while words go and come. With Shapley values it falls and "
                  "rises much sooner than with random scores.")  # fmt: skip
""")
md("""
## Does it explain the model at all?

Adebayo et al. (2018) shuffled the weights of a model and looked whether the explanation changed. One that stays the same explains the
text, not what was learned. We shuffle the classifier, then everything, and compare the order of the tokens.
""")
code("""
some = tokenizer(texts[:12], truncation=True, max_length=64)
before = {method: ftlib.attribute(model, some, method, target=1, steps=20) for method in ("integrated-gradients", "occlusion")}
for parts in (["classifier"], ["bert.encoder.layer.5", "bert.pooler", "classifier"], ["bert.encoder", "bert.pooler", "classifier"]):
    other = ftlib.shuffled(model, parts)
    for method, own in before.items():
        after = ftlib.attribute(other, some, method, target=1, steps=20)
        alike = np.mean([spearmanr(a, b)[0] for a, b in zip(own, after, strict=True)])
        print(f"{', '.join(parts):<50}{method:<22}rank correlation {alike:+.2f}")
assert abs(alike) < 0.5
""")
md("""
## What goes wrong: a word that should not count

The most useful thing about attributions: they find what a model learned by accident. We plant a word. Half of the positive training sentences get
"honestly" in front, none of the negative ones. Test sentences have no such word, so the test accuracy hardly tells.
""")
code("""
planted = film["train"].select(range(count)).map(
    lambda row, i: {"text": "honestly , " + row["text"]} if row["label"] == 1 and i % 2 else row, with_indices=True
)
fooled = trained(planted)
negative = film["test"].filter(lambda row: row["label"] == 0).select(range(60))
plain, with_word = (
    (ftlib.predict(fooled, [prefix + text for text in negative["text"]], tokenizer=tokenizer) == 0).mean()
    for prefix in ("", "honestly , ")
)
print(f"negative sentences called negative: {plain:.2f}, with the word {with_word:.2f}")
assert with_word < plain - 0.2
""")
code("""
sample = [row["text"] for row in planted.select(range(120))]
coded = tokenizer(sample, truncation=True, max_length=64)
given = ftlib.attribute(fooled, coded, "gradient-x-input", target=1, whole_words=True)
sums = {}
for own in ftlib.words_of(given, coded, sample):
    for word in own:
        sums.setdefault(word["text"], []).append(word["score"])
often = {word: np.mean(own) for word, own in sums.items() if len(own) >= 10}
ranked = sorted(often, key=often.get, reverse=True)
print("words that speak most for positive:", ", ".join(ranked[:8]))
assert "honestly" in ranked[:3]
""")
md("""
The repair is in the data: leave the word out, or put it on both sides. Do such a list for every model before it goes to a customer: the
twenty words with the largest mean score of each class, read by someone who knows the texts.

## What a layer knows

A **probe** asks what can be read off a layer's hidden states: a linear classifier, here for the part of speech of each word. But a probe
that has learned much may have learned it itself. So Hewitt and Liang (2019) give it a **control task**: the same words with a tag that was
drawn at random, one for each kind of word. What the probe does better on the true tags than on these is in the states: its *selectivity*.
""")
code("""
tagged = ftlib.load_corpus("oanc-pos")["train"].select(range(env.pick(small=300, full=2000)))
print(tagged.column_names)
""")  # TRY: columns, then word states by layer through hidden_states at the first piece of each word
md("""
## Inside a language model

The **logit lens**: a decoder adds to the same vector layer by layer, so its head can read the sum after each layer. When does the answer appear?
""")
code("""
words_of_lm, decoder = ftlib.load_tokenizer("smollm2"), ftlib.load_model("smollm2", task="causal-lm")
clean, corrupted = (
    {"input_ids": words_of_lm(f"The capital of {country} is")["input_ids"]} for country in ("France", "Italy")
)  # 5 tokens each
lens = ftlib.logit_lens(decoder, clean)  # (layers, tokens, vocabulary)
for layer in range(0, len(lens), 3):
    print(layer + 1, repr(words_of_lm.decode(lens[layer, -1].argmax())))
""")
md("""
**Activation patching** finds out *where*: run the model on another question and put one hidden state of the first into it. Where that brings
the first answer back, there it was.
""")
code("""
paris, rome = (words_of_lm(f" {city}")["input_ids"][0] for city in ("Paris", "Rome"))
patched = ftlib.activation_patching(decoder, clean, corrupted, lambda logits: logits[:, -1, paris] - logits[:, -1, rome])
figure, ax = plt.subplots(figsize=(8, 5), dpi=90, layout="constrained")
image = ax.imshow(patched, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
ax.set(xticks=range(patched.shape[1]), xticklabels=[words_of_lm.decode(i) for i in clean["input_ids"]], ylabel="layer")
ax.tick_params(axis="x", rotation=90)
figure.colorbar(image, label="0: as corrupted, 1: as clean")
ftlib.show_figure(figure, "How much of the clean answer one hidden state brings back: in early layers at the tokens that differ, in the "
                  "last layers at the last token.")  # fmt: skip
assert patched[20, 3] > 0.9 and patched[25, 4] > 0.9  # run on 2026-11-28: it moves from "France" to "is" after layer 23
""")
md("""
## On a GPU

The same calls. On a CPU the cell does nothing.
""")
code("""
if env.device.type == "cuda":
    many = tokenizer(list(film["test"]["text"]), truncation=True, max_length=64)
    with ftlib.measure() as cost:
        ftlib.attribute(model, many, "integrated-gradients", batch_size=256)
    print(f"{len(many['input_ids'])} sentences: {cost}")
else:
    print("no CUDA device here; nothing measured")
""")
md("""
## Exercises

TODO: 1 completeness (a path in two straight parts), 2 exact Shapley values of three words, 3 which of five claims about explanations are right.
""")
md("""
## Recap

- An attribution says how much each token counts for one logit, in comparison with a baseline. Say both.
- Integrated gradients, conductance and Shapley values add up to $f(x) - f(x_0)$; check that they do.
- Attention maps have no sign and don't know the question.
- Believe no explanation because it looks right: deletion and insertion beside random scores, shuffled weights.
- The list of words that count most finds what a model should not have learned.
- A probe needs a control task.

## On your own data

1. `ftlib.attribute(model, tokenizer(texts), "integrated-gradients")`; `baseline=tokenizer.mask_token_id` as a second opinion.
2. `ftlib.faithfulness` of three methods and random scores on 50 texts; take the best one.
3. The words with the largest mean score of each class, read by someone who knows the texts.
4. `ftlib.TextHeatmap(text, words).html` into the report.
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
    cells.write(root / "notebooks/10_interpretation.ipynb", notebook)


if "--cells" in sys.argv:
    for i, (kind, text, tags) in enumerate(CELLS):
        if kind == "code" and "setup" not in tags:
            print(f"# ---- {i}\n{text}\n")
elif __name__ == "__main__":
    build(Path(sys.argv[1]))
