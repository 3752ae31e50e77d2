md(r'''
## Translation

The same model, another job. **Tatoeba** holds short English sentences with translations by volunteers. First a question that costs nothing and is often forgotten.

### Can it write the language at all?

A tokenizer has the pieces it was built with. T5's came from English, German, French and Romanian text; what it lacks becomes the **unknown token**, and is gone. So
we send the *right* answers through the tokenizer and back: no model that writes with it can do better than that.
''')
code(r'''
UNKNOWN = tokenizer.unk_token_id
spoken = {"French": ("tatoeba-en-fr", "fr"), "Spanish": ("tatoeba-en-es", "es")}
parts = {name: ftlib.load_corpus(corpus) for name, (corpus, _) in spoken.items()}
ceilings = {}
for name, (_, code) in spoken.items():
    texts = [row[code] for row in subset(parts[name]["validation"], 1000)]
    back = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts]
    ceilings[name] = ftlib.metrics.bleu(back, texts)
    letters = Counter(letter for text in texts for letter in set(text))
    missing = [letter for letter, _ in letters.most_common() if UNKNOWN in tokenizer(letter)["input_ids"]]
    print(f"{name}: BLEU {ceilings[name]:.0f} at best; it can't write {' '.join(missing[:6])}")
print(tokenizer.decode(tokenizer("¿Dónde está el niño? ¡Aquí!")["input_ids"], skip_special_tokens=True))
assert ceilings["French"] > 99 and ceilings["Spanish"] < 90
''', "nbval-check-output")
md(r'''
Spanish loses `í`, `ñ` and every opening question mark: with the best training in the world this model would stop short. No error is raised, and the loss falls as it should. **Send your
own text through the tokenizer and back before you train.**

French is nearly whole, but look at what is missing: `Ê` begins *Êtes-vous*, `À` and `Ç` begin sentences too. A score near 100 hides that a model would learn to begin its questions with the unknown token. In French capital letters may go
without their accents, so we write the training sentences that way, and `oe` for `œ`.

### A short training
''')
code(r'''
PREFIX = "translate English to French: "


PLAIN = str.maketrans({"À": "A", "Ç": "C", "Ê": "E", "œ": "oe", "ë": "e", "ï": "i", "\u202f": " ", "\xa0": " "})


def plain(french):
    return french.translate(PLAIN)


def pairs_of(rows, count, longest=10):
    """Sentences of at most so many words, drawn at random."""
    drawn = [row for row in subset(rows, 3 * count) if len(row["en"].split()) <= longest]
    return [{"source": row["en"], "target": plain(row["fr"])} for row in drawn[:count]]


lost = sum(UNKNOWN in tokenizer(plain(row["fr"]))["input_ids"] for row in parts["French"]["validation"])
print(f"{lost} of {len(parts['French']['validation'])} sentences can't be written now")
learnt = pairs_of(parts["French"]["train"], env.pick(small=800, full=20_000))
held_pairs = pairs_of(parts["French"]["test"], env.pick(small=100, full=1000))
english, french = ([pair[side] for pair in held_pairs] for side in ("source", "target"))
print(f"{english[0]}  →  {french[0]}")
''')
code(r'''
def translate(model, texts, **options):
    options = {"max_new_tokens": 24, "batch_size": 50, "autocast": half(), "progress": True} | options
    return ftlib.generate(model, [PREFIX + text for text in texts], tokenizer=tokenizer, **options)


del model  # its titles are written; one model at a time is enough for the memory
translator = ftlib.load_model("flan-t5-titles", task="seq2seq-lm").to(env.device)
said = {"before": translate(translator, english)}
pair_rows = ftlib.tokenize(learnt, tokenizer, task="seq2seq-lm", prefix=PREFIX)
config = ftlib.TrainConfig(epochs=1, batch_size=16, learning_rate=1e-3, seed=0)
pair_run = ftlib.fit(translator, pair_rows, tokenizer=tokenizer, config=config)
said["after"] = translate(translator, english)
''')
code(r'''
known_vectors = (vectors := TfidfVectorizer(ngram_range=(1, 2))).fit_transform([pair["source"] for pair in learnt])
nearest = (vectors.transform(english) @ known_vectors.T).toarray().argmax(1)  # (sentences,)
nearest_name = "the nearest known sentence's"
said |= {nearest_name: [learnt[place]["target"] for place in nearest], "none: the English": english}

lines, counts = [], {}
for name in ("none: the English", nearest_name, "before", "after"):
    counts[name] = counts_of(said[name], french)  # (sentences, 6, 3)
    score = ftlib.bootstrap(chrf_of, counts[name])
    lines.append({"translation": f"T5 {name}" if name in ("before", "after") else name,
                  "BLEU": ftlib.metrics.bleu(said[name], french), "chrF": score.value,
                  "95 % interval": f"{score.low:.0f} to {score.high:.0f}"})  # fmt: skip
display(results_table(lines, {key: key for key in lines[0]}, digits=1))
print(f"training: {pair_run.steps} steps, {pair_run.seconds:.0f} s")
''')
code(r'''
for other in ("before", nearest_name):
    gain = ftlib.bootstrap(lambda a, b: chrf_of(a) - chrf_of(b), counts["after"], counts[other])
    print(f"chrF of after less {other}: {gain:.1f}, {gain.verdict}")
    assert gain.verdict == "more"
for place in range(6):
    print(f"{english[place]}  →  {said['after'][place]}   ({french[place]})")
''')
md(r'''
The scores say that it has learned a good deal: more than looking up the nearest of the 800 known sentences would give. The sentences say what such scores are worth in themselves: it puts French words beside one another, often the right ones, and no one would call it a
translation. Real translators are trained on millions of pairs. **A BLEU without a sentence beside it says little.**
''')
