import sys; sys.path.insert(0,'/work/ed')
from nb import NB
n=NB('notebooks/03b_which_parameters_move.ipynb')
n.sub('''tokens["train"].select(range(1600)), tokenizer=tokenizer, highest=highest, steps=100,''','''tokens["train"].select(range(960)), tokenizer=tokenizer, highest=highest, steps=60,''')
n.set('SWAPS = {"LoRA at full\'s rate"','''SWAPS = {"LoRA at full's rate": ("lora", "full"), "full at LoRA's rate": ("full", "lora")}
swapped, broken, curves = {}, {}, {}
for name, (strategy, other) in SWAPS.items():
    broken[name], curves[name] = train(strategy, SEEDS[0], RATES[other])
    assert {curves[name].steps} == live_steps  # as many as in the live experiment
    loss = np.mean([record["loss"] for record in curves[name].history[-8:]])
    spread = ftlib.predict(broken[name], some_test, output="probabilities")[:, 1].std()
    swapped[name] = loss, ftlib.evaluate(broken[name], some_test)["accuracy"], spread
    print("{:<21}loss at the end {:.2f}, accuracy {:.2f}, spread of the answers {:.3f}".format(name, *swapped[name]))''','code')
n.sub("rate, and nothing else changes: the same sentences, as many steps, the same seeds.","rate, and nothing else changes: the same sentences, as many steps, the first of the seeds.")
n.sub("*Figure 6. Training loss of both, first seed; the dotted","*Figure 6. Training loss of both; the dotted")
n.sub('''encoders? The mean cosine between the vectors of fifty sentences, and the accuracies beside those at each strategy's own
rate, with the same seeds and as many steps:''','''encoders? The mean cosine between the vectors of fifty sentences, and the accuracies beside those at each strategy's own
rate, with the same seed and as many steps:''')
n.sub('''    repaired = np.mean([accuracy for accuracy, _ in live[strategy]])
''','''    repaired = live[strategy][0][0]  # of the same seed
''')
n.save()
