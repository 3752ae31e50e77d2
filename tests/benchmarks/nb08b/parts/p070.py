md(r'''
## What a cut loses

An encoder's work grows with the length of the source, and attention's with its square, so long sources are cut. `tokenize` cuts only where `max_length` says so, and warns how many rows that were. **What did it cost?** The loss of the
right title is a fine measure: no generation is needed, and it tells of each article how much harder the title is to predict.
''')
code(r'''
held = subset(articles["validation"], env.pick(small=40, full=400))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    ftlib.tokenize(held, tokenizer, task="seq2seq-lm", text="abstract", label="title", max_length=LIMIT)
print(next(str(one.message) for one in warned if "cut" in str(one.message)))
columns = ([row[name] for row in held] for name in ("abstract", "title"))
sources, targets = (tokenizer(texts, verbose=False)["input_ids"] for texts in columns)
lengths = np.array(list(map(len, sources)))  # (articles,), in tokens
for limit in (64, 128, 256, 512):
    lost = 1 - np.minimum(lengths, limit).sum() / lengths.sum()
    print(f"limit {limit}: {(lengths > limit).mean():.0%} of the abstracts cut, {lost:.0%} of all tokens lost")
''', "nbval-check-output")
code(r'''
@torch.no_grad()
def title_losses(model, sources, targets, batch_size=20):
    """The summed loss of each target, (rows,)."""
    model.eval()
    found = []
    for first in range(0, len(sources), batch_size):
        own = [pad(part[first : first + batch_size], fill) for part, fill in ((sources, 0), (targets, -100))]
        ids, labels = ftlib.to_device(own, env.device)  # (batch, source), (batch, target)
        with half():
            logits = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        found += losses.view(labels.shape).sum(1).tolist()
    return np.array(found)


END = tokenizer.eos_token_id
kept = {f"first {n}": [[*ids[: min(n, len(ids)) - 1], END] for ids in sources] for n in (64, 128, 256)}
kept |= {f"last {n}": [ids[-n:] for ids in sources] for n in (64, 128)}
tokens_of = np.array(list(map(len, targets)))  # (articles,)
per_title = {name: title_losses(model, ids, targets) for name, ids in kept.items()}
''')
code(r'''
def rise(one, other, counts):
    """How much more loss a token."""
    return (one.sum() - other.sum()) / counts.sum()


lines, most = [], per_title["first 256"]
for name, found in per_title.items():
    more = ftlib.bootstrap(rise, found, most, tokens_of)
    lines.append({"tokens kept": name, "loss of the title, a token": found.sum() / tokens_of.sum(),
                  "more than with the first 256": "–" if found is most else f"{more:.2f}"})  # fmt: skip
end_first = ftlib.bootstrap(rise, per_title["last 64"], per_title["first 64"], tokens_of)
print(f"last 64 less first 64: {end_first:.2f}, {end_first.verdict}")
assert end_first.verdict == "more" and ftlib.bootstrap(rise, per_title["first 64"], most, tokens_of).verdict == "more"
results_table(lines, digits=2)
''')
md(r'''
More of the abstract helps. **Which end is cut matters as much as how much**: the last 64 tokens are worth far less than the first 64. That is about these abstracts, whose first sentence is the better title too; and about this model, which was trained on
beginnings. For a dialogue or a report it may be the other way round: measure it. The limit of 256 is a choice for two CPU cores. Nothing else stops T5: with distances in place of positions it reads on, and distances from 128 on look alike to it.
''')
