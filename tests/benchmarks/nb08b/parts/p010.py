md(r'''
# 08b Sequence to sequence: how do I turn one text into another?

You will build the encoder, the decoder and the bridge between them by hand, search for the best sentence with beams, compute BLEU, chrF and ROUGE
yourself, and train one small model to write titles and another to translate, with baselines that it has to beat.

**You need:** Python, PyTorch, attention (notebook 01), cross-entropy (notebook 02), the next token's loss (notebook 08).

**Time and memory:** 3 min 0 s and 3 GB on 2 CPU cores.

BADGE
''')
code(SETUP, "setup")
code(r'''
import math
import re
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from datasets.utils.logging import disable_progress_bar
from rouge_score import rouge_scorer
from sacrebleu import corpus_bleu, corpus_chrf
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.testing import assert_close
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
''')
code(r'''
from ftlib import results_table
from ftlib.core.device import computing
from ftlib.show.plots import PALETTE

disable_progress_bar()  # of the datasets library
half = computing(env.device, env.precision)  # what to call around a forward pass: bf16 where that pays, else nothing
''')
md(r'''
## The idea

A title for an article, a French sentence for an English one, an answer for a question: one text goes in, another comes out, of another length and with
other words. Sutskever et al. (2014) split the work in two. An **encoder** reads the whole source; a **decoder** writes the target, token by token, and
is a language model that has been told what to write about.

In their model all that the decoder knew of the source was one vector, however long the text. Bahdanau et al. (2015) let it look back at *every*
token of the source, each time with the question "what do I need now?". That was the first **attention**, and in the Transformer (Vaswani et al. 2017) it is
called **cross-attention**: queries from the decoder, keys and values from the encoder.
''')
code(r'''
source, target = ["the", "house", "is", "small", "<end>"], ["<start>", "la", "maison", "est", "petite"]
figure, ax = plt.subplots(figsize=(9.5, 3.6), dpi=90, layout="constrained")
for place, (word, own, new) in enumerate(zip(source, target, [*target[1:], "<end>"], strict=True)):
    right = place + 6.2
    ax.text(place, 0, word, ha="center", va="center")
    ax.text(right, 0, own, ha="center", va="center", color="0.5" if place == 0 else "black")
    ax.text(right, 3.9, new, ha="center", va="center", color=PALETTE[0])
    for x, color in ((place, "#fbe3d6"), (right, "#cfe4f3")):
        ax.text(x, 1.9, " " * 6, bbox={"boxstyle": "round", "fc": color, "ec": "0.6"}, ha="center", va="center")
        ax.annotate("", (x, 1.45), (x, 0.35), arrowprops={"arrowstyle": "->", "color": "0.5"})
    ax.annotate("", (right, 3.6), (right, 2.35), arrowprops={"arrowstyle": "->", "color": PALETTE[0]})
    bridge = {"arrowstyle": "->", "color": PALETTE[1], "connectionstyle": "arc3,rad=-0.25", "alpha": 0.8}
    ax.annotate("", (6.2 + 2, 2.3), (place, 2.3), arrowprops=bridge)
for seen in range(2):
    before = {"arrowstyle": "->", "color": "0.45", "connectionstyle": "arc3,rad=0.35"}
    ax.annotate("", (8.2, 1.5), (6.2 + seen, 1.5), arrowprops=before)
ax.text(2, -0.75, "encoder: every token sees every other", ha="center", color="0.4", fontsize=9)
ax.text(8.2, -0.75, "decoder: each token sees those before it", ha="center", color="0.4", fontsize=9)
ax.text(4.2, 3.95, "cross-attention", ha="center", color=PALETTE[1])
ax.set(xlim=(-0.7, 11), ylim=(-1, 4.3))
ax.axis("off")
ftlib.show_figure(figure, "Left five tokens of a source, right the decoder's row; arcs lead from each to one place.")
''')
md(r'''
*Figure 1. Encoder and decoder. The decoder reads what has been written (below) and predicts the token after it (above, blue). Red: what one place of the decoder,
here the third, gets from the source; every place has such arcs of its own.*

## Encoder, decoder, and the bridge

Our model is a small **T5** (Raffel et al. 2020): `flan-t5-small`, which others trained further to write titles, 77 million parameters in 8 layers a
side. T5 stores the embeddings of 32,128 word pieces once, for both sides.
''')
code(r'''
tokenizer = ftlib.load_tokenizer("flan-t5-titles")
model = ftlib.load_model("flan-t5-titles", task="seq2seq-lm").to(env.device)
print(f"{model.num_parameters():,} parameters, {model.shared.weight.numel():,} of them embeddings of "
      f"{len(tokenizer):,} pieces, hidden size {model.config.d_model}, {model.config.num_heads} heads")  # fmt: skip
start = tokenizer.convert_ids_to_tokens(model.config.decoder_start_token_id)
print(f"end: {tokenizer.eos_token!r}, padding: {tokenizer.pad_token!r}, the decoder starts with: {start!r}")
print(tokenizer.tokenize("Adenosine protects the heart."))
''', "nbval-check-output")
md(r'''
### Positions as a bias

Nothing in attention knows order. Vaswani et al. added a vector for each position to the embeddings; SmolLM2 (notebook 08) rotates queries and keys. T5 does the plainest
thing: every head has a learned number for each *distance* between query and key, and adds it to the score.

$$\text{score}_{ij} = q_i \cdot k_j + b_{\text{bucket}(j - i)}$$

There is no division by $\sqrt{d}$: T5 leaves that to the size of its first weights. Distances share 32 buckets: near ones have one each, far ones share wider and
wider ones, and all from 128 on share the last.
''')
code(r'''
def bucket(distance, both_ways):
    """Place of the key less place of the query -> 0 to 31; a decoder looks backwards only."""
    count = 16 if both_ways else 32  # the encoder has 16 for each direction
    first = 16 if both_ways and distance > 0 else 0
    far = abs(distance) if both_ways else max(-distance, 0)
    exact = count // 2  # so many distances have a bucket of their own
    if far >= exact:
        far = exact + int(math.log(far / exact) / math.log(128 / exact) * (count - exact) + 1e-6)
    return first + min(far, count - 1)


attention = model.encoder.block[0].layer[0].SelfAttention
distances = range(-200, 201)
for both_ways in (True, False):
    theirs = attention._relative_position_bucket(torch.tensor(distances), bidirectional=both_ways)
    assert [bucket(one, both_ways) for one in distances] == theirs.tolist()
print("before the query:", {-one: bucket(-one, both_ways=True) for one in (0, 1, 2, 7, 8, 12, 20, 60, 128, 500)})
''', "nbval-check-output")
