md(r'''
## Titles for abstracts

Now a real task: the title of a medical article from its abstract (PubMed, articles of the 1970s). Titles tell what an article is about, often as a row of nouns; no sentence of the abstract has to be like that.
''')
code(r'''
articles = ftlib.load_corpus("pubmed-titles")


def subset(rows, count, seed=0):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return list(rows.select(order[:count].tolist()))


known = subset(articles["train"], env.pick(small=256, full=4000))
asked = subset(articles["test"], env.pick(small=60, full=1000))
print({split: len(rows) for split, rows in articles.items()})
print(asked[0]["title"])
print(asked[0]["abstract"][:300], "…")
''', "nbval-check-output")
md(r'''
### A baseline that does not read

Before any model: the **first sentence** of the abstract as its title, and the last one. And since length alone moves the scores, we compute what a *perfect* writer of so many words could get. With $c$ words written and
$r$ wanted, no ROUGE-L is above $2 \min(c, r) / (c + r)$.
''')
code(r'''
wanted = [row["title"] for row in asked]


def sentences_of(text):
    return re.split(r"(?<=[.?!])\s+", text)


def judge(written, wanted):
    """(texts, 3): ROUGE-L, the most that texts of these lengths can get, words written."""
    found = []
    for one, other in zip(written, wanted, strict=True):
        c, r = (len(re.findall(r"[a-z0-9]+", text.lower())) for text in (one, other))
        found.append((ftlib.metrics.rouge([one], [other])["rougeL"], 2 * min(c, r) / max(c + r, 1), c))
    assert all(score <= most + 1e-9 for score, most, _ in found)
    return np.array(found)


written = {"first sentence": [sentences_of(row["abstract"])[0] for row in asked],
           "last sentence": [sentences_of(row["abstract"])[-1] for row in asked]}  # fmt: skip
results = {name: judge(texts, wanted) for name, texts in written.items()}
for name, found in {"the authors' titles": judge(wanted, wanted), **results}.items():
    score, most, count = found.mean(0)
    print(f"{name:20} ROUGE-L {score:.2f}, at most {most:.2f}, {count:.0f} words")
''', "nbval-check-output")
md(r'''
### Before and after

First the model as it came. It was trained to write titles, but of other texts, and shorter ones. Sources are cut to 256 tokens; what that loses is asked below.
''')
code(r'''
LIMIT = 256


def rows_of(articles):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says how many are cut; so does a table below
        return ftlib.tokenize(articles, tokenizer, task="seq2seq-lm", text="abstract", label="title", max_length=LIMIT)


def write(model, rows, **options):
    options = {"max_new_tokens": 48, "autocast": half(), "progress": True} | options
    return ftlib.generate(model, [list(ids) for ids in rows["input_ids"]], tokenizer=tokenizer, **options)


rows, test_rows = (rows_of([{k: row[k] for k in ("abstract", "title")} for row in part]) for part in (known, asked))
written["before"] = write(model, test_rows)
results["before"] = judge(written["before"], wanted)
for title, text in zip(wanted[:3], written["before"], strict=False):
    print(f"{text!r}  for  {title!r}")
''')
code(r'''
config = ftlib.TrainConfig(epochs=1, batch_size=8, micro_batch_size=4, learning_rate=1e-3, seed=0)
with ftlib.measure() as cost:
    run = ftlib.fit(model, rows, tokenizer=tokenizer, config=config)
losses = [record["loss"] for record in run.history]
written["after"] = write(model, test_rows)
results["after"] = judge(written["after"], wanted)
early, late = np.mean(losses[:4]), np.mean(losses[-8:])
print(f"{run.steps} steps in {run.precision}, loss {early:.2f} at first, {late:.2f} at the end")
assert late < early - 0.5
''')
code(r'''
methods = ["first sentence", "last sentence", "before", "after"]
lines = []
for name in methods:
    found = results[name]
    score = ftlib.bootstrap(lambda own: own[:, 0].mean(), found)
    lines.append({"titles": name, "ROUGE-L": score.value, "95 % interval": f"{score.low:.2f} to {score.high:.2f}",
                  "at most, by length": found[:, 1].mean(), "share of that": found[:, 0].mean() / found[:, 1].mean(),
                  "chrF": ftlib.metrics.chrf(written[name], wanted), "words": found[:, 2].mean()})  # fmt: skip
names = {key: key for key in lines[0]}
display(results_table(lines, names, digits={"chrF": 1, "words": 1} | dict.fromkeys([*lines[0]][1:5], 2)))
print(f"training: {run.seconds:.0f} s, at most {cost.peak_mb / 1000:.1f} GB")
''')
code(r'''
def gap(one, other):
    """Mean ROUGE-L of one less the other's, on the same articles."""
    return ftlib.bootstrap(lambda a, b: (a[:, 0] - b[:, 0]).mean(), results[one], results[other])


def chrf_gap(one, other):
    counts = [counts_of(written[name], wanted) for name in (one, other)]
    return ftlib.bootstrap(lambda a, b: chrf_of(a) - chrf_of(b), *counts)


gaps = {pair: gap(*pair) for pair in (("after", "before"), ("after", "first sentence"), ("before", "first sentence"))}
for (one, other), found in gaps.items():
    print(f"ROUGE-L of {one} less {other}: {found:.2f}, {found.verdict}")
other_score = chrf_gap("after", "first sentence")
print(f"chrF of after less first sentence: {other_score:.1f}, {other_score.verdict}")
share = {name: results[name][:, 0].mean() / results[name][:, 1].mean() for name in methods}
longer = share["before"] * results["after"][:, 1].mean()
print(f"ROUGE-L of before, were its titles as long as after's and no better otherwise: {longer:.2f}")
''')
code(r'''
assert gaps["after", "before"].verdict == "more" and gaps["before", "first sentence"].verdict == "less"
assert gaps["after", "first sentence"].value > -0.02 and other_score.value < -2  # two scores, two winners
before, after = (results[name][:, 0].mean() for name in ("before", "after"))
assert 0 < longer - before < 0.5 * (after - before)  # length explains the smaller part
assert abs(share["after"] - share["first sentence"]) < 0.15
''')
code(r'''
figure, ax = plt.subplots(figsize=(8.5, 2.9), dpi=90, layout="constrained")
for place, line in enumerate(lines):
    low, high = (float(one) for one in line["95 % interval"].split(" to "))
    color = PALETTE[1] if line["titles"] in ("before", "after") else "0.45"
    ax.plot([low, high], [place, place], color=color, linewidth=2)
    ax.plot(line["ROUGE-L"], place, "o", color=color)
    ax.plot(line["at most, by length"], place, "|", color="0.3", markersize=14)
    ax.text(line["at most, by length"] + 0.015, place, f"{line['words']:.0f} words", va="center", fontsize=9)
ax.set_yticks(range(len(lines)), [line["titles"] for line in lines])
ax.set(xlabel="ROUGE-L; the bar: the most that titles of these lengths can get", xlim=(0, 1), ylim=(3.5, -0.5))
ax.spines[["top", "right"]].set_visible(False)
ftlib.show_figure(figure, "ROUGE-L of first and last sentence, of the model before and after, with intervals.")
''')
md(r'''
*Figure 4. ROUGE-L with its 95 % interval (over articles), and what a perfect writer could get with as many words.*
''')
