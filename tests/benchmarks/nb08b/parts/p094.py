md(r'''
## Its own words

In training the decoder reads beginnings that people wrote. When it writes, it reads its own, mistakes and all, and has never learned what to do then: **exposure bias** (Ranzato et al. 2016). Is that so here? We let the model read
the first $k$ tokens of something, and measure the loss of the *rest of the reference*: after the reference's own beginning, and after the model's.

But beware: the rest of one sentence need not fit another beginning, even a good one. So there is a control, the beginning of **another person's** translation of the same sentence.
''')
code(r'''
others = defaultdict(list)  # {English: its translations}
for row in parts["French"]["test"]:
    if 3 <= len(row["en"].split()) <= 10:
        others[row["en"]].append(plain(row["fr"]))
twice = {text: found[:2] for text, found in others.items() if len(found) > 1}
twice = dict(list(twice.items())[: env.pick(small=48, full=400)])
print(f"{len(twice)} sentences with two translations, {next(iter(twice.items()))}")

first, second = ([tokenizer(found[k])["input_ids"] for found in twice.values()] for k in (0, 1))
mine = translate(translator, list(twice), tokens=True)
sources = [tokenizer(PREFIX + text)["input_ids"] for text in twice]
''')
code(r'''
@torch.no_grad()
def losses_of_rest(model, encoded, mask, beginnings, references, k):
    """Loss of each reference's tokens from k on, summed, after the first k tokens of another text, (rows,)."""
    reads = pad([[0, *own[:k], *wanted[k:-1]] for own, wanted in zip(beginnings, references, strict=True)], 0)
    labels = pad([[-100] * k + wanted[k:] for wanted in references], -100).to(env.device)  # (rows, target)
    with half():
        logits = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=reads.to(env.device)).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1).cpu().numpy()
''')
code(r'''
translator.eval()
long = [i for i, three in enumerate(zip(first, second, mine, strict=True)) if min(map(len, three)) > 5]
reference, other, model_own = ([own[i] for i in long] for own in (first, second, mine))
ids = pad([sources[i] for i in long], 0).to(env.device)  # (rows, source)
with torch.no_grad(), half():
    encoded = translator.encoder(input_ids=ids, attention_mask=(ids != 0).long())  # once for all
ks = (1, 3, 5)
curves = {name: [losses_of_rest(translator, encoded, (ids != 0).long(), own, reference, k) for k in ks]
          for name, own in {"the reference": reference, "another person": other, "the model": model_own}.items()}
lengths = np.array([[len(wanted) - k for wanted in reference] for k in ks])  # (k, rows)
print(f"{len(long)} sentences with at least 6 tokens in all three")
''')
code(r'''
figure, ax = plt.subplots(figsize=(8, 3.2), dpi=90, layout="constrained")
for color, (name, found) in zip((PALETTE[2], PALETTE[0], PALETTE[1]), curves.items(), strict=True):
    means = np.sum(found, 1) / lengths.sum(1)  # (k,)
    ax.plot(ks, means, "o-", color=color)
    ax.text(5.15, means[-1], f"{name}'s beginning", color=color, va="center", fontsize=9)
ax.set(xlabel="tokens of the beginning, k", ylabel="loss of the rest, a token", xlim=(0.8, 7.2))
ax.set_xticks(ks)
ax.spines[["top", "right"]].set_visible(False)
ftlib.show_figure(figure, "Loss of the rest: lowest after the reference's own beginning, highest after the model's.")
''')
md(r'''
*Figure 6. The rest of a sentence is hardest to predict after a beginning that the model wrote itself.*
''')
code(r'''
compared = [("the model", "the reference"), ("another person", "the reference"), ("the model", "another person")]
for one, other in compared:
    found = ftlib.bootstrap(rise, np.sum(curves[one], 0), np.sum(curves[other], 0), lengths.sum(0))
    print(f"after {one}'s beginning less {other}'s: {found:.2f} a token, {found.verdict}")
    assert found.value > 0.05
''')
md(r'''
After another person's beginning the rest is less likely: another wording. After the model's own it is less likely still, and that is what its mistakes cost: having begun badly, it does not find back. (Some of it is no bias: after a
wrong beginning the right rest may really be out of place.) Good models suffer less than one might fear and often recover (He et al. 2021); ours is not good.

What helps? A model that errs less, above all. **Scheduled sampling** (Bengio et al. 2015) lets the decoder read its own choices now and then while it trains. Rewards for whole outputs go further (notebook 08c). And beams need not live
with a first mistake.
''')
md(r'''
### Going round in circles

The plainest sign of a model that is lost is that it repeats itself. We count texts in which a run of $n$ tokens occurs twice, and count the same in what people wrote.
''')
code(r'''
def repeats(tokens, n):
    """Whether a run of n tokens occurs twice."""
    made = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(made) > len(set(made))


circles = {}
for name, texts in {"before training": said["before"], "after": said["after"], "people": french}.items():
    rows_written = tokenizer(texts)["input_ids"]
    circles[name] = [np.mean([repeats(own, n) for own in rows_written]) for n in (3, 4)]
    print(f"{name:16} twice a run of 3: {circles[name][0]:.2f}, of 4: {circles[name][1]:.2f}")
print(max(said["before"], key=lambda text: len(text) if repeats(tokenizer(text)["input_ids"], 4) else 0))
assert min(circles["before training"][1], circles["after"][1]) > circles["people"][1] + 0.02
''')
md(r'''
The model goes round in circles far more often than people do, before its short training and after. Two remedies need no training: beams, and **`no_repeat_ngram_size`**, which forbids a run of tokens to come twice. We try them on sentences longer than any the model was trained on. `ftlib.generate` has no such ban, but the model is an ordinary
Transformers model.
''')
code(r'''
def search(model, texts, **options):
    encoded = tokenizer([PREFIX + text for text in texts], padding=True, return_tensors="pt").to(env.device)
    with torch.no_grad(), half():
        out = model.generate(**encoded, max_new_tokens=40, do_sample=False, **options).tolist()
    return [row[1 : [*row, END].index(END)] for row in out]  # without the start, up to the end


longer = parts["French"]["test"].filter(lambda row: 11 <= len(row["en"].split()) <= 16)
longer = subset(longer, env.pick(small=32, full=300))
people = [plain(row["fr"]) for row in longer]
searches = {"greedy": {}, "4 beams": {"num_beams": 4}, "greedy, no run of 4 twice": {"no_repeat_ngram_size": 4}}
wrote = {name: search(translator, [row["en"] for row in longer], **options) for name, options in searches.items()}
wrote["people"] = tokenizer(people)["input_ids"]
''')
code(r'''
lines, counts = [], {}
for name, rows_written in wrote.items():
    counts[name] = counts_of(tokenizer.batch_decode(rows_written, skip_special_tokens=True), people)
    shares = {f"a run of {n} twice": np.mean([repeats(own, n) for own in rows_written]) for n in (3, 4)}
    gain = ftlib.bootstrap(lambda a, b: chrf_of(a) - chrf_of(b), counts[name], counts["greedy"])
    lines.append({"written by": name, **shares, "chrF": chrf_of(counts[name]),
                  "less greedy": "–" if name in ("greedy", "people") else f"{gain:.1f}, {gain.verdict}"})  # fmt: skip
assert lines[2]["a run of 4 twice"] == 0 and lines[3]["a run of 3 twice"] > 0.05  # people repeat themselves too
assert abs(lines[2]["chrF"] - lines[0]["chrF"]) < 4
said_twice = next(text for text, own in zip(people, wrote["people"], strict=True) if repeats(own, 4))
print("a person:", said_twice)
results_table(lines, digits={"chrF": 1} | dict.fromkeys(shares, 2))
''')
md(r'''
The ban does what it says, and chrF gains nothing: it takes a symptom away, not the confusion. And **people repeat themselves too**, as the line above the table shows: a ban on runs of 3 tokens, which stands in many recipes, forbids good French. Count what your references
do before you choose $n$.
''')
