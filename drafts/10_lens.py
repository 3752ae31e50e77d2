import time, torch, numpy as np, ftlib
t0=time.process_time()
def say(*a): print(f"[{time.process_time()-t0:.1f}]", *a, flush=True)
tok=ftlib.load_tokenizer("smollm2")
ids=[tok(f"The Eiffel Tower is in Paris. The Colosseum is in Rome. The {t} is in")["input_ids"] for t in ("Eiffel Tower","Colosseum")]
say([len(i) for i in ids],[tok.decode([j]) for j in ids[0]],[tok.decode([j]) for j in ids[1]])
for a,b in (("France","Italy"),("Germany","Japan"),("Spain","Russia"),("Poland","Egypt")):
    say(a,b,[tok(f"The capital of {c} is")["input_ids"] for c in (a,b)])
from ftlib.methods.patching import logit_lens, activation_patching
m=ftlib.load_model("smollm2", task="causal-lm"); say("loaded", m.dtype)
clean,corr=({"input_ids":tok(f"The capital of {c} is")["input_ids"]} for c in ("France","Italy"))
lens=logit_lens(m,clean); say(lens.shape)
for k in range(0,len(lens),3): say(k+1,repr(tok.decode(lens[k,-1].argmax())))
say(30,repr(tok.decode(lens[-1,-1].argmax())))
p,r=(tok(" "+c)["input_ids"][0] for c in ("Paris","Rome"))
say(tok.decode([p]),tok.decode([r]))
f=lambda l: l[:,-1,p]-l[:,-1,r]
out=activation_patching(m,clean,corr,f); say(out.shape); print(out.round(2),flush=True)
