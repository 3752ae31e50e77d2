import re as _re
_lesson = load("lesson.py")
def _cell(start):
    found = [text for kind, text, tags in _lesson if kind == "code" and start in text]
    assert len(found) == 1, (start, len(found)); return found[0]
md(r'''
# 08b Sequence to sequence: how do I turn one text into another?: solutions

BADGE
''')
code(SETUP, "setup")
code(r'''
import zlib
from itertools import product

import numpy as np
import torch
from transformers import NoRepeatNGramLogitsProcessor
''')
md(r'''
The exercises need no model and no data.
''')
md(r'''
### Exercise 1: no run of words twice
''')
code(r'''
def answer_1(tokens, n):
    begun = tuple(tokens[len(tokens) - n + 1 :])  # the last n - 1 tokens: a run that the next one would complete
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return {run[-1] for run in runs if run[:-1] == begun}


print(answer_1([5, 6, 7, 5, 6], 3))
''', "solution")
code(_cell("def check_1("), "exercise-check", "nbval-check-output")
md(r'''
`begun` is empty for `n = 1`: every token said so far is forbidden. Note the index: `tokens[-(n - 1):]` would be the whole list there. Transformers does the same to a row of scores:
''')
code(r'''
tokens = torch.randint(0, 5, (1, 30), generator=torch.Generator().manual_seed(1))  # (batch, tokens)
for n in (2, 3, 4):
    scores = NoRepeatNGramLogitsProcessor(n)(tokens, torch.zeros(1, 5))  # (batch, vocabulary)
    assert set(scores.isinf().nonzero()[:, 1].tolist()) == answer_1(tokens[0].tolist(), n)
''')
code(r'''
try:
    def no_token_twice(tokens, n):
        return set(tokens)

    check_1(no_token_twice)
except AssertionError as hint:
    print("caught:", hint)
else:
    raise AssertionError("check_1 accepts what forbids every token for good")
''', "wrong-answer")
code(r'''
try:
    def cut_from_behind(tokens, n):
        begun = tuple(tokens[-(n - 1) :])
        runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return {run[-1] for run in runs if run[:-1] == begun}

    check_1(cut_from_behind)
except AssertionError as hint:
    print("caught:", hint)
else:
    raise AssertionError("check_1 accepts an index that fails for n = 1")
''', "wrong-answer")
md(r'''
### Exercise 2: the candidate that agrees with the others
''')
code(r'''
def answer_2(candidates):
    means = [np.mean([ftlib.metrics.chrf([one], [other]) for k, other in enumerate(candidates) if k != place])
             for place, one in enumerate(candidates)]  # fmt: skip
    return int(np.argmax(means))


print(answer_2(["Il pleut.", "Il neige beaucoup.", "Il pleut beaucoup.", "Il pleut fort."]))
''', "solution")
code(_cell("def check_2("), "exercise-check", "nbval-check-output")
md(r'''
chrF isn't symmetric: recall counts more, so it matters which text is the reference. `np.argmax` takes the first of equals. The idea: a good translation is a likely one under *many* draws, so it has near relatives among them; an odd
one has none. It costs a score for each pair of candidates, and the score that was maximized will look better than the texts are.
''')
code(r'''
try:
    def other_way_round(candidates):
        means = [np.mean([ftlib.metrics.chrf([other], [one]) for k, other in enumerate(candidates) if k != place])
                 for place, one in enumerate(candidates)]  # fmt: skip
        return int(np.argmax(means))

    check_2(other_way_round)
except AssertionError as hint:
    print("caught:", hint)
else:
    raise AssertionError("check_2 accepts the candidate as the reference")
''', "wrong-answer")
code(r'''
try:
    check_2(lambda candidates: 0)
except AssertionError as hint:
    print("caught:", hint)
else:
    raise AssertionError("check_2 accepts the first candidate")
''', "wrong-answer")
md(r'''
### Exercise 3: what is wrong with these rows?
''')
code(_cell("suspects = {").replace("answer_3 = ...  # {\"a\": \"...\", \"b\": \"...\", ...}", '''answer_3 = {"a": "it learns to copy what it reads", "b": "it will not stop", "c": "padding is trained too",
            "d": "nothing is wrong", "e": "it never learns how to begin"}'''), "solution")
code(_cell("def check_3("), "exercise-check", "nbval-check-output")
md(r'''
a: the same row twice, no shift; each place reads what it must write. b: the end token is not among the labels, so it is never trained. c: the places behind the end have the label 0, padding, and count. e: shifted by one, but without the
start token, so nothing is ever predicted from it; yet the start token is all that the model is given when it writes.
''')
code(r'''
try:
    check_3(dict(answer_3, d="it will not stop", b="nothing is wrong"))
except AssertionError as hint:
    print("caught:", hint)
else:
    raise AssertionError("check_3 accepts labels without an end")
''', "wrong-answer")
