md(r'''
## On a GPU

The same calls, with longer steps. On a CPU the cell does nothing. With `FTLIB_SIZE=full` the whole notebook takes 4,000 abstracts and 20,000 pairs of sentences, and tests on 1,000 of each.

`make gpu-day` measures training and memory on a GPU; what an NVIDIA H200 gave stands under ["The GPU day"](../tests/benchmarks/README.md#the-gpu-day) in
`tests/benchmarks/README.md`.
''')
code(r'''
if env.device.type == "cuda":
    larger = ftlib.load_model("flan-t5-titles", task="seq2seq-lm").to(env.device)
    many = rows_of([{k: row[k] for k in ("abstract", "title")} for row in articles["train"]])
    config = ftlib.TrainConfig(epochs=3, batch_size=32, max_tokens=16_384, learning_rate=1e-3)
    run = ftlib.fit(larger, many, tokenizer=tokenizer, config=config)
    spent = sum(record["tokens"] for record in run.history)
    found = judge(write(larger, test_rows, num_beams=4, batch_size=64), wanted)
    print(f"{spent / run.seconds:,.0f} tokens/s, {run.precision}; ROUGE-L {found[:, 0].mean():.3f}")
else:
    print("no CUDA device here; nothing measured")
''')
md(r'''
## Exercises

Replace `...` and run the check below it. Solutions are in `notebooks/solutions/08b_sequence_to_sequence.ipynb`.
''')
md(r'''
### Exercise 1: no run of words twice

`no_repeat_ngram_size=3` forbids every token that would make a run of three tokens occur a second time. Write it: which tokens may *not* come next after `tokens`, for runs of `n`? (`n` is at least 1; with
`n = 1` no token may come twice.)
''')
code(r'''
def answer_1(tokens, n):
    """Tokens so far (a list), length of runs -> the set of tokens that may not come next."""
    return ...
''', "exercise")
code(r'''
def check_1(answer):
    if answer([1, 2], 2) is ...:
        return "not answered yet"
    draw = torch.Generator().manual_seed(0)
    for n, length in product((1, 2, 3, 4), (0, 1, 2, 3, 5, 12, 40)):
        tokens = torch.randint(0, 4, (length,), generator=draw).tolist()
        forbidden = answer(list(tokens), n)
        assert isinstance(forbidden, set), "return a set of tokens"
        for token in range(5):  # 4 has never been said
            made = [*tokens, token]
            seen = [tuple(made[i : i + n]) for i in range(len(made) - n + 1)]
            twice = len(seen) > len(set(seen)) and seen[-1] in seen[:-1]
            text = f"after {tokens}, n = {n}: {token}"
            assert twice or token not in forbidden, f"{text} makes no new repetition, and is forbidden"
            assert not twice or token in forbidden, f"{text} repeats a run, and is allowed"
    return "correct"


print("Exercise 1:", check_1(answer_1))
''', "exercise-check", "nbval-check-output")
md(r'''
### Exercise 2: the candidate that agrees with the others

Draw several translations, and take neither the first nor the likeliest, but the one that has most in common with all the others (**minimum Bayes risk**, Kumar & Byrne 2004). Write a function that takes a list of candidates, two at least, and returns
the place of the one whose mean chrF against the *other* candidates is highest; each of the others is the reference once. The first place where several are equal.
''')
code(r'''
def answer_2(candidates):
    """A list of texts -> the place of the one that agrees most with the others."""
    return ...
''', "exercise")
code(r'''
def check_2(answer):
    lists = [["Il pleut.", "Il neige beaucoup.", "Il pleut beaucoup.", "Il pleut fort."],
             ["a b c", "the small dog barks", "the dog barks", "the small dog barked", "the dog barks now"],
             ["same words", "same words", "other things"], ["one", "two"],
             ["un chat dort", "le chat", "le chat noir dort sur le lit rouge", "le chat noir dort"]]  # fmt: skip
    places = [answer(list(texts)) for texts in lists]
    if places[0] is ...:
        return "not answered yet"
    assert all(isinstance(place, int) for place in places), "the place of a candidate, an int"
    assert all(0 <= place < len(texts) for place, texts in zip(places, lists, strict=True)), "there is no such place"
    assert places[2:4] == [0, 0], "where several are equal, the first"
    assert zlib.crc32(bytes(places)) == 3931152948, "not those that agree most; mind which text is the reference"
    return "correct"


print("Exercise 2:", check_2(answer_2))
''', "exercise-check", "nbval-check-output")
md(r'''
### Exercise 3: what is wrong with these rows?

Each of the five `suspects` is one row of a batch for a T5 (padding 0, end 1, start 0): what its decoder reads, and the labels. The target is always "A dog barks.", the tokens 71, 1782, 21696, 7, 5 and the end. Give for each letter one of `FAULTS`.
''')
code(r'''
NO = -100
suspects = {
    "a": {"reads": [71, 1782, 21696, 7, 5, 1, 0, 0], "labels": [71, 1782, 21696, 7, 5, 1, NO, NO]},
    "b": {"reads": [0, 71, 1782, 21696, 7, 5, 0, 0], "labels": [71, 1782, 21696, 7, 5, NO, NO, NO]},
    "c": {"reads": [0, 71, 1782, 21696, 7, 5, 1, 0], "labels": [71, 1782, 21696, 7, 5, 1, 0, 0]},
    "d": {"reads": [0, 71, 1782, 21696, 7, 5, 1, 0], "labels": [71, 1782, 21696, 7, 5, 1, NO, NO]},
    "e": {"reads": [71, 1782, 21696, 7, 5, 1, 0, 0], "labels": [1782, 21696, 7, 5, 1, NO, NO, NO]},
}
FAULTS = ("nothing is wrong", "it learns to copy what it reads", "it will not stop", "padding is trained too",
          "it never learns how to begin")  # fmt: skip
answer_3 = ...  # {"a": "...", "b": "...", ...}
''', "exercise")
code(r'''
def check_3(answer):
    if answer is ...:
        return "not answered yet"
    assert set(answer) == set(suspects), "one entry for each letter"
    assert set(answer.values()) <= set(FAULTS), "the words of FAULTS"
    assert len(set(answer.values())) == len(FAULTS), "each of FAULTS fits one row"
    seen = zlib.crc32("/".join(answer[letter] for letter in "abcde").encode())
    assert seen == 709747300, "not all of them: what does each place read, and what must it say?"
    return "correct"


print("Exercise 3:", check_3(answer_3))
''', "exercise-check", "nbval-check-output")
md(r'''
## Recap

* An encoder reads, a decoder writes; cross-attention is ordinary attention whose keys and values come from the encoder.
* In training the decoder reads the labels one place later, a start token before them. Padding of the labels is −100. Without the shift it learns to copy, and the loss looks wonderful.
* Greedy search misses sentences, wide beams find sentences that are too short: width and length penalty are settings to choose.
* BLEU, chrF and ROUGE-L count what is shared. They don't know what is true, and length alone moves them. Use sacreBLEU, give intervals, read outputs.
* Compare with what does not read: the first sentence, the nearest known translation.
* Send the right answers through the tokenizer and back: what it can't write, no training will.

## On your own data

A table with a source and a target; `text=` and `label=` name its columns, `prefix=` puts the same words before every source. Sources are cut only if you say so; a target that is too long is an error.
''')
code(r'''
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mine.csv"
    path.write_text("question,answer\nWhere is the tower?,In Paris.\nAnd the colosseum?,In Rome.\n")
    mine = ftlib.tokenize(str(path), tokenizer, task="seq2seq-lm", text="question", label="answer", prefix="answer: ")
print(tokenizer.decode(mine[0]["input_ids"]), "→", tokenizer.decode(mine[0]["labels"]))
scores = ftlib.evaluate(translator, mine, tokenizer=tokenizer, generate={"max_new_tokens": 8})
print(*scores)
''', "nbval-check-output")
md(r'''
**What to read next.** Notebook 08 has the decoder alone, notebook 08c what to do when a score is all there is to learn from, notebook 03b which parameters should move. In the library, `ftlib/tasks/seq2seq.py` makes
the rows, `ftlib/tasks/overlap.py` calls the scores.
''')
md(r'''
**References**

* Bahdanau, Cho & Bengio (2015): Neural machine translation by jointly learning to align and translate. ICLR, arXiv:1409.0473.
* Bengio, Vinyals, Jaitly & Shazeer (2015): Scheduled sampling for sequence prediction with recurrent neural networks. NeurIPS, arXiv:1506.03099.
* Brown et al. (2020): Language models are few-shot learners. NeurIPS, arXiv:2005.14165.
* He, Zhang, Zhou & Glass (2021): Exposure bias versus self-recovery. EMNLP, arXiv:1905.10617.
* Koehn & Knowles (2017): Six challenges for neural machine translation. arXiv:1706.03872.
* Kumar & Byrne (2004): Minimum Bayes-risk decoding for statistical machine translation. NAACL.
* Lewis et al. (2020): BART: denoising sequence-to-sequence pre-training. ACL, arXiv:1910.13461.
* Lin (2004): ROUGE: a package for automatic evaluation of summaries. ACL workshop.
* Papineni, Roukos, Ward & Zhu (2002): BLEU: a method for automatic evaluation of machine translation. ACL.
* Popović (2015): chrF: character n-gram F-score for automatic MT evaluation. WMT.
* Post (2018): A call for clarity in reporting BLEU scores. WMT, arXiv:1804.08771.
* Raffel et al. (2020): Exploring the limits of transfer learning with a unified text-to-text transformer (T5). JMLR, arXiv:1910.10683.
''')
md(r'''
* Ranzato, Chopra, Auli & Zaremba (2016): Sequence level training with recurrent neural networks. ICLR, arXiv:1511.06732.
* Stahlberg & Byrne (2019): On NMT search errors and model errors: cat got your tongue? EMNLP, arXiv:1908.10090.
* Sutskever, Vinyals & Le (2014): Sequence to sequence learning with neural networks. NeurIPS, arXiv:1409.3215.
* Szegedy et al. (2016): Rethinking the Inception architecture for computer vision. CVPR, arXiv:1512.00567.
* Vaswani et al. (2017): Attention is all you need. NeurIPS, arXiv:1706.03762.
* Williams & Zipser (1989): A learning algorithm for continually running fully recurrent neural networks. Neural Computation 1.
* Wu et al. (2016): Google's neural machine translation system. arXiv:1609.08144.
''')
