md(r'''
## The shift

While it trains, the decoder is given the *right* beginning at every place, whatever it would have written itself. That is **teacher forcing** (Williams & Zipser
1989). For a target $y_1 \dots y_T$, the end token last, and a source $x$:

$$L = -\frac{1}{T} \sum_{t=1}^{T} \ln p(y_t \mid y_0, \dots, y_{t-1}, x), \qquad y_0 = \text{start}$$

Unlike in notebook 08, *every* token of the target is predicted, the first one too: something stands before it, the **start token**. T5 has none of its own and takes its padding
token, number 0. So labels and the decoder's input are the same row, one place apart.
''')
code(r'''
def shift_right(labels, start=0, pad=0):  # (batch, target) -> (batch, target)
    """What a decoder reads while it is trained on these labels."""
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, pad)  # -100: no label; as an input it would be no token


print("place     ", *range(1, len(labels) + 1), sep="\t")
for name, row in {"reads": shift_right(labels[None])[0], "must say": labels}.items():
    print(f"{name:10}", *tokenizer.convert_ids_to_tokens(row.tolist()), sep="\t")
assert shift_right(labels[None]).equal(model.prepare_decoder_input_ids_from_labels(labels[None]))  # Transformers
''', "nbval-check-output")
code(r'''
surprise = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]  # (target,)
with torch.no_grad():
    theirs = model(input_ids=ids[None], labels=labels[None]).loss  # Transformers shifts inside
[row] = ftlib.tokenize([{"source": abstract, "target": title}], tokenizer, task="seq2seq-lm")
ours = ftlib.evaluate(model, [row], tokenizer=tokenizer)["loss"]

assert_close(surprise.mean(), theirs, atol=1e-5, rtol=0)
assert abs(surprise.mean().item() - ours) < 1e-4
assert row["labels"] == labels.tolist() and row["input_ids"] == ids.tolist()
costly = tokenizer.convert_ids_to_tokens(labels[surprise.topk(3).indices].tolist())
print(f"loss {surprise.mean():.2f}; the three dearest tokens: {costly}")
''')
md(r'''
What a decoder starts with is a habit of the model: T5 takes padding, BART (Lewis et al. 2020) its end token, mBART the code of the language to be written. `decoder_start_token_id` in the model's configuration says which; training and
generation have to agree.

### A batch, and −100

Targets of a batch have different lengths, sources too. The source is padded with 0 and has an attention mask, for the encoder *and* for cross-attention. The labels are padded with
−100, which the loss leaves out; the decoder's input at those places doesn't matter, since nothing after it counts.
''')
code(r'''
pairs = [{"source": abstract, "target": title},
         {"source": "We kept 12 rats in the dark for a week.", "target": "Effect of a week of darkness on rats."},
         {"source": "Two cases of scurvy are described.", "target": "Scurvy."}]  # fmt: skip
rows = ftlib.tokenize(pairs, tokenizer, task="seq2seq-lm")


def pad(rows, fill):  # lists of tokens -> (batch, tokens of the longest)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


batch = {name: pad(rows[name], -100 if name == "labels" else 0) for name in ("input_ids", "attention_mask", "labels")}
batch = ftlib.to_device(batch, env.device)
for name, tensor in batch.items():
    print(f"{name:15}", tuple(tensor.shape))
print("last row, reads   ", shift_right(batch["labels"])[-1].tolist())
print("last row, must say", batch["labels"][-1].tolist())
''', "nbval-check-output")
code(r'''
with torch.no_grad():
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                   decoder_input_ids=shift_right(batch["labels"])).logits  # (batch, target, vocabulary)  # fmt: skip
    theirs = model(**batch).loss
counted = batch["labels"] != -100  # (batch, target)
known = batch["labels"].masked_fill(~counted, 0)  # (batch, target), any token where none is wanted
surprise = -logits.log_softmax(-1).gather(2, known[:, :, None])[:, :, 0]  # (batch, target)

assert_close(surprise[counted].mean(), theirs, atol=1e-5, rtol=0)
assert abs(ftlib.evaluate(model, rows, tokenizer=tokenizer)["loss"] - theirs.item()) < 1e-4
each = torch.stack([own[real].mean() for own, real in zip(surprise, counted, strict=True)])  # (batch,)
print(f"mean over tokens {theirs:.2f}, mean over rows of each row's mean {each.mean():.2f}")
assert abs(each.mean() - theirs) > 0.1
''')
md(r'''
The loss is a mean over *tokens* of the whole batch: a long title has more say than a short one.

### Label smoothing

A title could have been written otherwise, so the one we have should not get all the probability. **Label smoothing** (Szegedy et al. 2016; used for translation from Vaswani et al. on) keeps a share
$\varepsilon$ for all $V$ tokens alike:

$$L_\varepsilon = -(1 - \varepsilon) \ln p(y_t) - \frac{\varepsilon}{V} \sum_{v=1}^{V} \ln p(v)$$
''')
code(r'''
def smoothed(logits, labels, share):  # (tokens, vocabulary), (tokens,) -> (tokens,)
    log_p = logits.log_softmax(-1)
    return -(1 - share) * log_p.gather(1, labels[:, None])[:, 0] - share * log_p.mean(-1)


flat, wanted = logits[counted], batch["labels"][counted]  # (tokens, vocabulary), (tokens,)
by_hand = smoothed(flat, wanted, 0.1)
assert_close(by_hand.mean(), F.cross_entropy(flat, wanted, label_smoothing=0.1), atol=1e-5, rtol=0)
with ftlib.token_losses.in_chunks(model, label_smoothing=0.1), torch.no_grad():
    assert_close(by_hand.sum(), model(**batch).loss, atol=1e-3, rtol=0)  # ftlib gives the sum
print(f"plain {smoothed(flat, wanted, 0).mean():.2f}, with 0.1 smoothed {by_hand.mean():.2f}")

size = flat.shape[1]
for name, rest in {"right with 0.999999": 1e-6, "right with 0.9": 0.1}.items():
    p = torch.full((1, size), rest / (size - 1))  # (1, vocabulary)
    p[0, 0] = 1 - rest
    print(f"{name}: plain {smoothed(p.log(), p.new_zeros(1).long(), 0).item():.2f}, "
          f"smoothed {smoothed(p.log(), p.new_zeros(1).long(), 0.1).item():.2f}")  # fmt: skip
''')
md(r'''
With smoothing a model that is certain and right pays more than one that is right with 0.9, and no loss gets near 0. So losses with and without smoothing can't be compared. Here
`TrainConfig(label_smoothing=…)` sets it; `evaluate` reports the plain loss.
''')
