md(r'''
## From probabilities to a sentence

The model gives a probability for each next token; the probability of a sentence is their product. **Greedy** search takes the likeliest token each time. It never goes
back, so it can miss a likelier sentence that begins with a less likely word. A table of next words is enough to see it:
''')
code(r'''
WORDS = ["<start>", "a", "the", "cat", "dog", "sleeps", "<end>"]
NEXT = {"<start>": {"a": 0.48, "the": 0.36, "<end>": 0.16}, "a": {"cat": 0.45, "dog": 0.35, "<end>": 0.20},
        "the": {"cat": 0.70, "<end>": 0.30}, "cat": {"<end>": 0.55, "sleeps": 0.45},
        "dog": {"<end>": 0.60, "sleeps": 0.40}, "sleeps": {"<end>": 1.0}}  # fmt: skip
table = torch.zeros(7, 7)  # (word before, next word)
for before, after in NEXT.items():
    for word, p in after.items():
        table[WORDS.index(before), WORDS.index(word)] = p


def sentences(beginning=("<start>",), p=1.0):
    """All sentences that the table allows, with their probabilities."""
    if beginning[-1] == "<end>":
        yield beginning[1:], p
        return
    for word, q in NEXT[beginning[-1]].items():
        yield from sentences((*beginning, word), p * q)


every = sorted(sentences(), key=lambda one: -one[1])
assert math.isclose(sum(p for _, p in every), 1)
for words, p in every[:5]:
    print(f"{p:.3f}", *words)
''', "nbval-check-output")
md(r'''
### Beam search

**Beam search** keeps the `width` likeliest unfinished sentences. In each round every one of them is continued with every word; of all these, the likeliest `width` go on, and
those among the best `width` that end are put aside as finished. With width 1, and a stop at the first end, this is greedy search.

Sums of logarithms take the place of products. Long sentences have smaller probabilities, so scores of different lengths are compared as

$$\text{score}(y) = \frac{\ln p(y)}{|y|^{\alpha}}$$

with the **length penalty** $\alpha$: 0 compares probabilities, 1 the mean per token (end token included), more favors long ones. (Wu et al. 2016 use another formula to the same end.)
''')
code(r'''
def beam_search(log_p, start, end, width, alpha=1.0, longest=20):
    """log_p: (beams, tokens so far) -> (beams, vocabulary).  Returns the best tokens, and their score."""
    beams, scores = torch.tensor([[start]]), torch.zeros(1)  # (beams, tokens so far), (beams,)
    finished = []
    for length in range(1, longest + 1):
        total = scores[:, None] + log_p(beams)  # (beams, vocabulary)
        best, places = total.flatten().topk(min(2 * width, total.numel()))  # half of them may end
        rows, words = places // total.shape[1], places % total.shape[1]
        ends = words == end  # (candidates,)
        for place in (ends[:width] & best[:width].isfinite()).nonzero()[:, 0].tolist():
            done = [*beams[rows[place]].tolist(), end]
            finished.append((best[place].item() / length**alpha, done))
        beams = torch.cat([beams[rows], words[:, None]], dim=1)[~ends][:width]
        scores = best[~ends][:width]
        if scores.isinf().all() or (width == 1 and finished):  # nothing goes on; greedy search ends at its first end
            break
    else:
        finished += [(s / longest**alpha, b) for s, b in zip(scores.tolist(), beams.tolist(), strict=True)]
    score, tokens = max(finished)
    return tokens[1:], score
''')
md(r'''
For the comparison we make a model out of the table, one that `generate` of Transformers accepts. All that a model has to do there is to give logits.
''')
code(r'''
class TableModel(PreTrainedModel, GenerationMixin):
    """A language model whose next word depends on the last one alone, by a table of probabilities."""

    config_class = PreTrainedConfig

    def __init__(self, table):
        super().__init__(PreTrainedConfig(vocab_size=len(table), is_encoder_decoder=False, num_hidden_layers=1))
        self.log_p = torch.nn.Parameter(table.log())  # (word before, next word)
        self.post_init()

    def forward(self, input_ids, **unused):
        return CausalLMOutput(logits=self.log_p[input_ids])  # (batch, words, vocabulary)


def by_transformers(table, width, alpha):
    options = {"num_beams": width, "length_penalty": alpha, "early_stopping": "never"} if width > 1 else {}
    options |= {"max_new_tokens": 20, "do_sample": False, "use_cache": False, "eos_token_id": 6, "pad_token_id": 6}
    config = GenerationConfig(**options)
    out = TableModel(table).generate(torch.tensor([[0]]), generation_config=config)[0, 1:].tolist()
    return out[: [*out, 6].index(6) + 1]
''')
code(r'''
def from_table(table):
    return lambda beams: table.log()[beams[:, -1]]  # (beams, tokens so far) -> (beams, vocabulary)


lines = []
for width, alpha in product((1, 2, 3), (0.0, 1.0)):
    tokens, score = beam_search(from_table(table), 0, 6, width, alpha)
    assert tokens == by_transformers(table, width, alpha)
    p = math.exp(score * len(tokens) ** alpha)
    lines.append({"width": width, "α": alpha, "sentence": " ".join(WORDS[token] for token in tokens), "probability": p})
results_table(lines, digits={"α": 0, "probability": 3})
''', "nbval-check-output")
code(r'''
found = {(line["width"], line["α"]): line["sentence"] for line in lines}
p_of = {" ".join(words): p for words, p in every}
assert p_of[found[1, 0.0]] < p_of[found[2, 0.0]] < p_of[found[3, 0.0]] == every[0][1]
assert found[3, 0.0] == "<end>" and len(found[2, 1.0]) > len(found[2, 0.0])

for seed in range(8):  # the same for eight random tables
    torch.manual_seed(seed)
    random_table = torch.rand(7, 7).pow(3)
    random_table[6] = 0
    random_table = (random_table / random_table.sum(1, keepdim=True)).nan_to_num()
    for width, alpha in product((1, 2, 4), (0.5, 1.0)):
        ours, _ = beam_search(from_table(random_table), 0, 6, width, alpha)
        assert ours == by_transformers(random_table, width, alpha)
''')
code(r'''
def draw(ax, beginning, p, low, high, paths):
    """The tree of all sentences from here on, each in a share of the height by its probability."""
    x, y, span = len(beginning) - 1, (low + high) / 2, high - low
    for word, q in NEXT.get(beginning[-1], {}).items():
        whole = (*beginning, word)
        color, line = next(((c, 2.5) for c, path in paths.items() if path[: len(whole)] == whole), ("0.8", 1))
        middle = low + q * span / 2
        ax.plot([x + 0.16, x + 0.78], [y, middle], color=color, linewidth=line)
        ax.text(x + 0.5, (y + middle) / 2, f"{q:.2f}", fontsize=7, color="0.4", ha="center", va="center",
                bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip
        text = f"{word}  {p * q:.3f}" if word == "<end>" else word
        ax.text(x + 0.82, middle, text, va="center", fontsize=9, color=color if line > 1 else "0.3")
        draw(ax, whole, p * q, low, low + q * span, paths)
        low += q * span


figure, ax = plt.subplots(figsize=(9.5, 4.6), dpi=90, layout="constrained")
colors = {1: PALETTE[1], 2: PALETTE[0], 3: PALETTE[2]}  # by width
paths = {color: ("<start>", *found[width, 0.0].split()) for width, color in colors.items()}
ax.text(0.14, 0.5, "<start>", ha="right", va="center", fontsize=9)
draw(ax, ("<start>",), 1.0, 0.0, 1.0, paths)
ax.set(xlim=(-0.5, 4.6), ylim=(1, 0))
ax.axis("off")
ftlib.show_figure(figure, "A tree of sentences. Greedy search finds a cat, width 2 the cat, width 3 the empty one.")
''')
md(r'''
*Figure 3. All sentences of the table, with the probability of each at its end. Red: greedy. Blue: two beams. Green: three beams, which find the likeliest of all: the empty one.*

Three things to take along. **Greedy loses**: "the cat" is likelier than "a cat", but its first word is not. **A better search is not a better sentence**: the likeliest
sentence of all may be empty, and the wider the beam, the surer it is found. Real translators do this (Stahlberg & Byrne 2019), and their BLEU falls with wide beams: the **beam-search
curse** (Koehn & Knowles 2017). **The length penalty** answers that, and is tuned on validation data like any other setting.
''')
