md(r'''
The same function on T5: its "table" is a pass through the decoder, over the memory of one source. So that nothing hides, our own `decode` gives the logits, without a cache.
''')
code(r'''
def from_t5(model, memory):
    def log_p(beams):  # (beams, tokens so far) -> (beams, vocabulary)
        return torch.stack([decode(model, one.to(memory.device), memory)[0][-1].log_softmax(-1).cpu() for one in beams])

    return log_p


likelier = []
for width in (1, 3):
    tokens, score = beam_search(from_t5(model, memory), 0, tokenizer.eos_token_id, width, longest=16)
    [theirs] = ftlib.generate(model, [abstract], tokenizer=tokenizer, max_new_tokens=16, num_beams=width)
    ours = tokenizer.decode(tokens, skip_special_tokens=True)
    print(f"width {width}: {ours!r}, {len(tokens)} tokens, {score:.2f} each")
    assert ours == theirs
    likelier.append(score)
assert likelier[1] > likelier[0]
''')
md(r'''
A likelier title, by the mean over its tokens. From here on we take `ftlib.generate` (which calls Transformers), whose beams compare the mean per token, $\alpha = 1$.

## Is it a good text? BLEU, chrF, ROUGE

There is no right answer to compare with letter by letter, but there is a text that a person wrote, the **reference**. The usual scores count what both have in common.

**BLEU** (Papineni et al. 2002) counts runs of 1 to 4 words. $p_n$ is the share of the model's runs of $n$ words that the reference has too, each no more often than there, summed over *all*
sentences before dividing. As only what the model says is looked at, short texts would win; so they pay, with $c$ words written and $r$ wanted:

$$\text{BLEU} = 100 \cdot \min\left(1, e^{1 - r/c}\right) \cdot \left(p_1 p_2 p_3 p_4\right)^{1/4}$$
''')
code(r'''
REFERENCES = ["the drug lowers the risk of stroke in adults", "the liver of the rat was not changed by it",
              "two new cases of a rare disease"]  # fmt: skip
WRITTEN = ["the drug lowers the risk of a stroke", "it has not changed the liver of the rat",
           "two cases of a rare disease"]  # fmt: skip


def runs(items, n):  # how often each run of n items occurs
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(written, references):
    right, said = np.zeros(4), np.zeros(4)  # runs of 1 to 4 words
    for one, other in zip(written, references, strict=True):
        for n in range(1, 5):
            mine, theirs = runs(one.split(), n), runs(other.split(), n)
            right[n - 1] += (mine & theirs).total()  # & keeps the smaller count of each
            said[n - 1] += mine.total()
    c, r = (sum(len(text.split()) for text in texts) for texts in (written, references))
    return 100 * min(1.0, math.exp(1 - r / c)) * np.prod(right / said) ** 0.25


assert abs(bleu(WRITTEN, REFERENCES) - corpus_bleu(WRITTEN, [REFERENCES]).score) < 1e-6  # sacreBLEU
assert abs(bleu(WRITTEN, REFERENCES) - ftlib.metrics.bleu(WRITTEN, REFERENCES)) < 1e-6
alone = [bleu([one], [other]) for one, other in zip(WRITTEN, REFERENCES, strict=True)]
print(f"BLEU {bleu(WRITTEN, REFERENCES):.1f}; of each alone {np.round(alone, 1)}, their mean {np.mean(alone):.1f}")
''', "nbval-check-output")
md(r'''
The BLEU of a corpus is not the mean of its sentences. Where the punctuation is cut off, and whether capital letters count, changes BLEU by points; so everyone is asked to use one program, **sacreBLEU**
(Post 2018), which `ftlib.metrics` calls.

**chrF** (Popović 2015) does the same with runs of 1 to 6 *characters*, spaces left out: "stroke" and "strokes" have much in common, for words they are strangers. It takes the mean
of precision $P$ and of recall $R$ over the six lengths, and $F_2$, in which recall counts twice as much: $F_2 = 5PR / (4P + R)$.
''')
code(r'''
def chrf_counts(one, other):
    """Of runs of 1 to 6 characters: how many both texts have, the first, the second; (6, 3)."""
    made = [[runs(text.replace(" ", ""), n) for text in (one, other)] for n in range(1, 7)]
    return [((mine & theirs).total(), mine.total(), theirs.total()) for mine, theirs in made]


def chrf_of(counts):  # (texts, 6, 3)
    both, mine, theirs = counts.sum(0).T  # (6,) each
    precision, recall = (both / mine).mean(), (both / theirs).mean()
    return 100 * 5 * precision * recall / (4 * precision + recall)


def counts_of(written, references):  # (texts, 6, 3)
    return np.array([chrf_counts(*both) for both in zip(written, references, strict=True)])


assert abs(chrf_of(counts_of(WRITTEN, REFERENCES)) - corpus_chrf(WRITTEN, [REFERENCES]).score) < 1e-6  # sacreBLEU
assert abs(chrf_of(counts_of(WRITTEN, REFERENCES)) - ftlib.metrics.chrf(WRITTEN, REFERENCES)) < 1e-6
''')
md(r'''
**ROUGE-L** (Lin 2004), made for summaries, looks for the longest row of words that both have in the same order, gaps allowed. With $\ell$ words in it, $P = \ell / c$, $R = \ell / r$ and $F_1 = 2PR / (P + R)$;
a corpus gets the mean of its texts.
''')
code(r'''
def longest_row(mine, theirs):
    """How many words two lists have in the same order."""
    best = [0] * (len(theirs) + 1)  # with the words of mine so far and the first i of theirs
    for word in mine:
        before = best.copy()
        for i, other in enumerate(theirs):
            best[i + 1] = before[i] + 1 if word == other else max(before[i + 1], best[i])
    return best[-1]


def rouge_l(one, other):
    mine, theirs = one.lower().split(), other.lower().split()
    return 2 * longest_row(mine, theirs) / (len(mine) + len(theirs))  # 2PR / (P + R), shortened
''')
code(r'''
scorer = rouge_scorer.RougeScorer(["rougeL"])
by_hand = [rouge_l(one, other) for one, other in zip(WRITTEN, REFERENCES, strict=True)]
theirs = [scorer.score(other, one)["rougeL"].fmeasure for one, other in zip(WRITTEN, REFERENCES, strict=True)]
assert_close(by_hand, theirs, atol=1e-6, rtol=0)
assert abs(np.mean(by_hand) - ftlib.metrics.rouge(WRITTEN, REFERENCES)["rougeL"]) < 1e-6
score = chrf_of(counts_of(WRITTEN, REFERENCES))
print(f"chrF {score:.1f}; ROUGE-L {np.mean(by_hand):.3f}, of each {np.round(by_hand, 3)}")
''', "nbval-check-output")
md(r'''
### Where they mislead

**A question before the next cell.** The reference is *"aspirin lowers the risk of stroke in diabetes"*. Order by score: the same fact in other words; its opposite; its first four words; the
words in alphabetical order.
''')
code(r'''
wanted = "aspirin lowers the risk of stroke in diabetes"
tries = {"other words": "fewer strokes among diabetic patients who take this drug",
         "the opposite": "aspirin never lowers the risk of stroke in diabetes",
         "its first four words": "aspirin lowers the risk",
         "in alphabetical order": " ".join(sorted(wanted.split())),
         "all of it, and more": f"in our study of several hundred men and women {wanted} as it seems"}  # fmt: skip
lines = []
for name, text in tries.items():
    scores = ftlib.metrics.compute_metrics("seq2seq-lm", [text], [wanted])
    lines.append({"text": name} | {key: scores[key] for key in ("bleu", "chrf", "rougeL")})
by_name = {line["text"]: line for line in lines}
assert by_name["other words"]["bleu"] == by_name["other words"]["rougeL"] == 0
for key in ("bleu", "chrf", "rougeL"):
    assert max(lines, key=lambda line: line[key])["text"] == "the opposite"
assert by_name["in alphabetical order"]["chrf"] > 2 * by_name["other words"]["chrf"]
assert by_name["its first four words"]["rougeL"] > by_name["all of it, and more"]["rougeL"] - 0.1
headings = {"text": "text", "bleu": "BLEU", "chrf": "chrF", "rougeL": "ROUGE-L"}
results_table(lines, headings, digits={"rougeL": 2, "bleu": 1, "chrf": 1})
''', "nbval-check-output")
md(r'''
The one that is *right* gets 0 from two of three, the one that is *wrong* gets the most. Length alone moves all three: too much costs precision, too little costs recall or the brevity
penalty. Such scores compare systems over many texts of one kind, and mean little for one text. None of them knows what is true: read some outputs, always.
''')
