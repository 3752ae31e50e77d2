md(r'''
## A decoder with a prompt

An encoder-decoder has to be trained for its job. A decoder alone (notebook 08) takes source and target for one text, and can be *shown* the job (Brown et al. 2020): two abstracts with their titles as earlier turns of a conversation, then
the abstract in question. SmolLM2 has 135 million parameters, nearly twice as many as our T5, and is not trained here at all.
''')
code(r'''
few = env.pick(small=16, full=300)
lm_tokenizer = ftlib.load_tokenizer("smollm2")
lm = ftlib.unpad(ftlib.load_model("smollm2", task="causal-lm").to(env.device))
shots = sorted(known, key=lambda row: abs(len(row["abstract"]) - 500))[:2]  # rather short ones


def turns(abstract, title=None):
    asks = {"role": "user", "content": abstract}
    return [asks] if title is None else [asks, {"role": "assistant", "content": title}]


shown = [{"role": "system", "content": "Write the title of the article. Answer with the title alone."}]
for shot in shots:
    shown += turns(shot["abstract"], shot["title"])
read = tokenizer.batch_decode(test_rows["input_ids"][:few], skip_special_tokens=True)  # as much as T5 was given
options = dict(max_new_tokens=40, batch_size=8, autocast=half(), progress=True, stop="\n")
prompts = [shown + turns(text) for text in read]
written["prompt"] = ftlib.generate(lm, prompts, tokenizer=lm_tokenizer, **options)
del lm
for place in range(2):
    print(f"{written['prompt'][place]!r}  for  {wanted[place]!r}")
''')
code(r'''
lines = []
for name, title in {"first sentence": "first sentence", "before": "T5 before", "prompt": "SmolLM2, two examples shown",
                    "after": f"T5, trained on {len(known)} abstracts"}.items():  # fmt: skip
    found = judge(written[name][:few], wanted[:few])
    ahead = ftlib.bootstrap(lambda a, b: (a[:, 0] - b[:, 0]).mean(), results["after"][:few], found)
    lines.append({"titles": title, "ROUGE-L": found[:, 0].mean(), "at most, by length": found[:, 1].mean(),
                  "words": found[:, 2].mean(), "T5 trained is ahead by": "–" if name == "after" else f"{ahead:.2f}",
                  "that is": {"more": "ahead", "less": "behind", "tie": "a tie"}[ahead.verdict]})  # fmt: skip
lines[-1]["that is"] = "–"
chats = [lm_tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in prompts]
tokens_read = [np.mean([len(ids) for ids in texts]) for texts in (lm_tokenizer(chats)["input_ids"],
                                                                  test_rows["input_ids"][:few])]  # fmt: skip
print(f"tokens read for a title: {tokens_read[0]:.0f} by SmolLM2 with its examples, {tokens_read[1]:.0f} by T5")
assert tokens_read[0] > 2 * tokens_read[1]
results_table(lines, {key: key for key in lines[0]}, digits={"words": 1, "ROUGE-L": 2, "at most, by length": 2})
''')
md(r'''
Shown two examples, an untrained decoder writes titles too; on a handful of articles more can be said only where the last column says so. It pays at every title: it reads the examples again, more than twice the tokens, with a larger model. Training pays once. For ten titles take the prompt, for ten thousand the
training; and where a few hundred examples exist, try both.
''')
