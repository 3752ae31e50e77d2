code(r'''
bias = {}  # {side: what is added, (distances, heads)}
for side, span in (("encoder", range(-30, 31)), ("decoder", range(-30, 1))):
    learned = getattr(model, side).block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    bias[side] = learned[[bucket(distance, side == "encoder") for distance in span]].detach().cpu()
named = {"encoder": {2: "the tokens that follow", 1: "the token before, and not itself"},
         "decoder": {3: "the last few tokens", 1: "anything but itself"}}  # fmt: skip
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), dpi=90, layout="constrained", sharey=True)
for ax, (side, values) in zip(axes, bias.items(), strict=True):
    span = range(-30, len(values) - 30)
    ax.plot(span, values, color="0.85", linewidth=1)
    for color, (head, name) in enumerate(named[side].items()):
        ax.plot(span, values[:, head], color=PALETTE[color])
        ax.text(-30, -18 - 4 * color, f"head {head}: {name}", color=PALETTE[color], fontsize=9)
    ax.set(title=side, xlabel="place of the key less place of the query")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("added to the score")
ftlib.show_figure(figure, "Two panels of six lines: what a head adds by distance. Most rise towards the token before.")
''')
md(r'''
*Figure 2. What T5's six heads add to a score, by distance; two of each side in color. The first layer holds these numbers for all eight. They are large:
10 less, and $e^{-10}$ is as good as a mask.*
''')
code(r'''
own, before, after = (bias["encoder"][30 + k] for k in (0, -1, 1))  # (heads,) at distances 0, -1, 1
last, last_but_one = bias["decoder"][[-1, -2]]  # (heads,) at distances 0, -1
print("encoder heads that shun their own token:", (own < before - 10).nonzero()[:, 0].tolist())
print("that favor the token before:", ((before > own) & (before > after)).nonzero()[:, 0].tolist())
print("decoder heads that shun their own token:", (last < last_but_one - 10).nonzero()[:, 0].tolist())
''', "nbval-check-output")
md(r'''
### The whole model by hand

T5's layers are those of notebook 08 with other positions: a norm without a mean (RMSNorm), a feed-forward part with a gate (here through GELU). New is that
**one function does all three attentions**. `x` asks and `memory` answers: in the encoder, and in the first step of a decoder layer, both are the same text; in
cross-attention `memory` is what the encoder made of the source.
''')
code(r'''
def rms_norm(x, norm):  # (tokens, hidden) -> (tokens, hidden)
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def feed_forward(x, mlp):  # (tokens, hidden) -> (tokens, hidden)
    return mlp.wo(F.gelu(mlp.wi_0(x), approximate="tanh") * mlp.wi_1(x))


def attend(x, memory, layer, bias):  # (queries, hidden), (keys, hidden), (heads, queries, keys)
    """The answer, (queries, hidden), and the weights, (heads, queries, keys)."""
    q = layer.q(x).unflatten(-1, (-1, 64)).transpose(0, 1)  # (heads, queries, 64)
    k, v = (project(memory).unflatten(-1, (-1, 64)).transpose(0, 1) for project in (layer.k, layer.v))
    weights = (q @ k.transpose(1, 2) + bias).softmax(-1)  # (heads, queries, keys), no division by √64
    return layer.o((weights @ v).transpose(0, 1).flatten(1)), weights


def position_bias(attention, count, both_ways):  # -> (heads, count, count)
    buckets = torch.tensor([[bucket(key - query, both_ways) for key in range(count)] for query in range(count)])
    values = attention.relative_attention_bias.weight[buckets].permute(2, 0, 1)
    mask = torch.ones(count, count, dtype=torch.bool, device=values.device).tril()  # what is written so far
    return values if both_ways else values.masked_fill(~mask, -torch.inf)
''')
code(r'''
@torch.no_grad()
def encode(model, ids):  # (source,) -> (source, hidden)
    x = model.shared(ids)
    bias = position_bias(model.encoder.block[0].layer[0].SelfAttention, len(ids), both_ways=True)
    for block in model.encoder.block:
        look, think = block.layer
        read = rms_norm(x, look.layer_norm)  # (source, hidden)
        x = x + attend(read, read, look.SelfAttention, bias)[0]
        x = x + feed_forward(rms_norm(x, think.layer_norm), think.DenseReluDense)
    return rms_norm(x, model.encoder.final_layer_norm)


@torch.no_grad()
def decode(model, ids, memory):  # (target,), (source, hidden) -> (target, vocabulary), [(heads, target, source)]
    x, looks = model.shared(ids), []
    bias = position_bias(model.decoder.block[0].layer[0].SelfAttention, len(ids), both_ways=False)
    for block in model.decoder.block:
        look, cross, think = block.layer
        read = rms_norm(x, look.layer_norm)  # (target, hidden)
        x = x + attend(read, read, look.SelfAttention, bias)[0]
        told, weights = attend(rms_norm(x, cross.layer_norm), memory, cross.EncDecAttention, bias=0)
        x, looks = x + told, [*looks, weights]
        x = x + feed_forward(rms_norm(x, think.layer_norm), think.DenseReluDense)
    return model.lm_head(rms_norm(x, model.decoder.final_layer_norm)), looks
''')
code(r'''
abstract = ("Adenosine was given to 40 patients with chest pain. It widened the arteries of the heart in all of "
            "them, and the pain ended in 31.")  # fmt: skip
title = "Adenosine against chest pain."
ids = torch.tensor(tokenizer(abstract)["input_ids"], device=env.device)  # (source,), the end token is the last
labels = torch.tensor(tokenizer(title)["input_ids"], device=env.device)  # (target,), the end token is the last
start = labels.new_tensor([model.config.decoder_start_token_id])  # (1,)
written = torch.cat([start, labels[:-1]])  # (target,), what the decoder reads

memory = encode(model, ids)  # (source, hidden)
logits, looks = decode(model, written, memory)  # (target, vocabulary), 8 of (heads, target, source)
with torch.no_grad():
    theirs = model(input_ids=ids[None], decoder_input_ids=written[None])
assert_close(memory, theirs.encoder_last_hidden_state[0], atol=1e-5, rtol=1e-5)
assert (logits - theirs.logits[0]).abs().max() < 1e-5 * theirs.logits.abs().max()
print(f"source {len(ids)} tokens, target {len(labels)}; memory {tuple(memory.shape)}, logits {tuple(logits.shape)}, "
      f"{len(looks)} layers of weights {tuple(looks[0].shape)}")  # fmt: skip
''', "nbval-check-output")
md(r'''
No position enters cross-attention: `bias=0`. Where in the source to look is a question of content alone, which is why a translation may turn the order of the words
around.

**A question before the next cell.** We change one word near the end of the *source*. At how many places of the target do the logits change? And when we change the last
word of the *target* instead?
''')
code(r'''
other_ids, other_written = ids.clone(), written.clone()
other_ids[-3] = other_written[-1] = tokenizer.convert_tokens_to_ids("▁never")
source_changed = decode(model, written, encode(model, other_ids))[0]  # (target, vocabulary)
target_changed = decode(model, other_written, memory)[0]
for name, changed in {"another source word": source_changed, "another last target word": target_changed}.items():
    moved = (changed - logits).abs().amax(-1) > 1e-3  # (target,)
    print(f"{name}: logits change at {moved.sum()} of {len(moved)} places")
''', "nbval-check-output")
md(r'''
The encoder sees its text in both directions, so one word of the source moves everything. The decoder is causal: a word of the target moves only what
comes after it. That is what lets us train all its places at once.
''')
