md(r'''
## Where the decoder looks

Cross-attention can be read: our own `decode` returned its weights. A mean over 48 heads is a blur, so we ask which head **points at the word that is written next**. In six sentences we know a few pairs of words; on three of them we choose
the head, on the other three we test it. For comparison, the head that points best at the word *just read*.
''')
code(r'''
GLOSSES = [
    ("Tom lives in Boston with two cats.", "Tom habite à Boston avec deux chats.", "Tom with-avec two-deux"),
    ("Mary has a red car.", "Mary a une voiture rouge.", "Mary red-rouge car-voiture"),
    ("The small house is old.", "La petite maison est vieille.", "small-petite house-maison is-est"),
    ("I want a cup of black coffee.", "Je veux une tasse de café noir.", "I-Je black-noir coffee-café"),
    ("Three women read a long letter.", "Trois femmes lisent une longue lettre.", "women-femmes letter-lettre"),
    ("We have a big white dog.", "Nous avons un grand chien blanc.", "big-grand white-blanc dog-chien"),
]



def look(model, english, french):
    """Cross-attention weights, (layers, heads, target, source), and the tokens of both sides."""
    ids, labels = (torch.tensor(tokenizer(text)["input_ids"], device=env.device) for text in (PREFIX + english, french))
    weights = torch.stack(decode(model, shift_right(labels[None])[0], encode(model, ids))[1]).cpu()
    return weights, *(tokenizer.convert_ids_to_tokens(side.tolist()) for side in (ids, labels))


def pointing(model, english, french, words, later=0):
    """Of each known pair the weights on its English word, (pairs, layers, heads), where the French is written."""
    weights, source, target = look(model, english, french)
    pairs = [(word.split("-")[0], word.split("-")[-1]) for word in words.split()]
    return torch.stack([weights[:, :, target.index(f"▁{b}") + later, source.index(f"▁{a}")] for a, b in pairs])
''')
code(r'''
found = {}
for name, later in (("written next", 0), ("just read", 1)):
    chosen = torch.cat([pointing(translator, *gloss, later) for gloss in GLOSSES[:3]]).mean(0)  # (layers, heads)
    layer, head = divmod(chosen.argmax().item(), chosen.shape[1])
    tested = torch.cat([pointing(translator, *gloss, later) for gloss in GLOSSES[3:]])  # (pairs, layers, heads)
    found[name] = layer, head
    best, mean = tested[:, layer, head].mean(), tested.mean()
    print(f"the word {name}: layer {layer}, head {head} puts {best:.2f} on it; a head's mean is {mean:.2f}")
    assert best > max(0.3, 2 * mean)
assert found["just read"][0] < 3 < found["written next"][0]
''')
code(r'''
weights, source, target = look(translator, *GLOSSES[5][:2])
names = [[one.strip("▁") or "▁" for one in side] for side in (source, target)]
first = len(tokenizer(PREFIX.strip())["input_ids"]) - 1  # the prefix is not shown
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), dpi=90, layout="constrained", sharey=True)
for ax, (name, (layer, head)) in zip(axes, found.items(), strict=True):
    ax.imshow(weights[layer, head, :, first:], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(source) - first), names[0][first:], rotation=60, ha="right")
    ax.set(title=f"the word {name}: layer {layer}, head {head}", xlabel="looks at")
axes[0].set_yticks(range(len(target)), names[1])
axes[0].set_ylabel("has to write")
ftlib.show_figure(figure, "Two maps of weights near the diagonal; right, dog comes before white.")
at = weights[found["just read"]].argmax(1)  # (target,), the token looked at most
after = [source[at[target.index(f"▁{word}") + 1]] for word in ("chien", "blanc")]
assert after == ["▁dog", "▁white"]
''')
md(r'''
*Figure 5. Two heads of cross-attention, on a sentence they were not chosen on. Each row is a place of the decoder and the token that it has to write; blue: weight. "White dog" becomes "chien blanc": right, having read "chien" the head looks at "dog", and having read "blanc" back at "white".*

The early layers look at the word just read, the later ones at the word to come. Nobody told them which words belong together: Bahdanau et al. found such alignments in their first
attention. But weights of one head are a hint, no explanation; notebook 01 says why.
''')
