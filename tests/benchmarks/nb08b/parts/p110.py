md(r'''
## What goes wrong: the shift that was forgotten

Whoever writes the training loop by hand gives the decoder its input by hand, and it is easily the labels themselves, unshifted. Every place then reads the token that it has to write. Nothing complains. The rows, the rate and the
model are those of the translator above; we watch the loss.
''')
code(r'''
def train_by_hand(pupil, rows, reads, steps, fill=-100, rate=1e-3, batch_size=16):
    """Losses, one a step; reads: labels (batch, target) -> what the decoder is given."""
    optimizer, losses = torch.optim.AdamW(pupil.parameters(), lr=rate), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    pupil.train()
    for step in tqdm(range(steps), leave=False):
        part = rows.select(order[step * batch_size : (step + 1) * batch_size])
        ids, labels = pad(part["input_ids"], 0).to(env.device), pad(part["labels"], fill).to(env.device)
        with half():
            out = pupil(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=reads(labels), labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


copier = ftlib.load_model("flan-t5-titles", task="seq2seq-lm").to(env.device)
unshifted = train_by_hand(copier, pair_rows, lambda labels: labels.masked_fill(labels == -100, 0), steps=30)
shifted = [record["loss"] for record in pair_run.history]
''')
code(r'''
figure, ax = plt.subplots(figsize=(8, 3), dpi=90, layout="constrained")
for color, name, losses in ((PALETTE[1], "not shifted", unshifted), (PALETTE[0], "shifted", shifted)):
    ax.plot(range(1, len(losses) + 1), losses, color=color)
    ax.text(len(losses) + 0.6, losses[-1], name, color=color, va="center", fontsize=9)
ax.set(xlabel="step", ylabel="training loss", ylim=(0, None), xlim=(0, len(shifted) + 9))
ax.spines[["top", "right"]].set_visible(False)
ftlib.show_figure(figure, "Training loss by step: without the shift it falls far below the other.")
''')
md(r'''
*Figure 7. The run with the mistake looks far better.*
''')
code(r'''
copied = translate(copier, english[:40])
for place in range(3):
    print(f"{english[place]}  →  {copied[place]!r}")
ends = {"shifted": np.mean(shifted[-5:]), "not shifted": np.mean(unshifted[-5:])}
scores = {name: ftlib.metrics.chrf(texts[:40], french[:40])
          for name, texts in (("shifted", said["after"]), ("not shifted", copied))}  # fmt: skip
for name, loss in ends.items():
    print(f"{name}: loss {loss:.2f} at the end, chrF {scores[name]:.1f}")
assert ends["not shifted"] < 0.7 * ends["shifted"] and scores["not shifted"] < 0.7 * scores["shifted"]
''')
md(r'''
It has learned to copy the token it is given. When it writes, it is given the start token, and copies that, or says what is left of its old self. **A loss that keeps falling far below what others reach is a warning**: no one can know the
next word of a sentence that well. The repair is one line, `shift_right`; or pass `labels` alone, and Transformers and ftlib shift.

### Padding that counts

The second classic: labels padded with the padding token in place of −100. The translator goes on for a few steps like that.
''')
code(r'''
def three_losses(model, rows):
    """The mean loss of real tokens, that of padding, and that of all places."""
    ids, labels = (pad(rows[name], fill).to(env.device) for name, fill in (("input_ids", 0), ("labels", -100)))
    reads, wanted = shift_right(labels), labels.masked_fill(labels == -100, 0).flatten()
    with torch.no_grad(), half():
        logits = model.eval()(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=reads).logits
    each = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")  # (batch * target,)
    real = (labels != -100).flatten()
    return each[real].mean().item(), each[~real].mean().item(), each.mean().item()


copier.load_state_dict(translator.state_dict())
sample = pair_rows.select(range(48))
reported = train_by_hand(copier, pair_rows, shift_right, steps=10, fill=0)  # padding is a label like any other
print(f"reported: loss {reported[0]:.1f} at the first step, {reported[-1]:.1f} at the tenth")
found = {name: three_losses(one, sample) for name, one in {"before": translator, "after these steps": copier}.items()}
for name, (real, padding, every_place) in found.items():
    print(f"{name}: real tokens {real:.2f}, padding {padding:.2f}, all places {every_place:.2f}")
assert reported[-1] < 0.6 * reported[0] and found["after these steps"][0] > found["before"][0] - 0.1
''')
md(r'''
A fine curve, down and down, and the French has become no better: all that is learned is to write padding after the end, which nobody needs. The loss reported is mostly about padding; it
depends on the lengths in a batch and can't be compared with anything.
''')
