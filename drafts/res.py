import re,sys
def res(path, fn):
    s=open(path).read()
    s=re.sub(r'<<<<<<< HEAD\n(.*?)=======\n(.*?)>>>>>>> \w+\n', lambda m: fn(m[1],m[2]), s, flags=re.S)
    open(path,'w').write(s)
def readme(a,b):
    if a.startswith('[Several'): return a.replace('[Smaller models](#smaller-models) ·','[Smaller models](#smaller-models) · [Privacy](#privacy) ·')
    if a.startswith('| `methods`'): return a.replace('`quantization`','`quantization`, `ghost_norms`, `privacy`')
    if a.startswith('## Smaller'): return a+'\n'+b
    return a+b
res('ftlib/README.md',readme)
res('ftlib/__init__.py',lambda a,b: a.replace('    "methods.features"','    "methods.privacy": "Privacy",\n    "methods.features"'))
res('ftlib/engine/fit.py',lambda a,b:'''        how = config.r_drop, self.autocast, smoothed is not None, config.distill
        losses = task_gradients.Losses(functions, tasks, *how)
        plain = task_gradients.task_gradient(losses, self.joint, self.scaler, model)
        gradient = self.private.gradient(losses.rows) if self.private else plain
        self.gradient = recovery.halving(gradient, device)
''')
res('ftlib/engine/settings.py',lambda a,b:a+b)
res('pyproject.toml',lambda a,b:'''    "accelerate>=1.1", "captum>=0.8", "faiss-cpu>=1.10", "onnxruntime>=1.20", "opacus>=1.5", "optuna>=4.0",
    "peft>=0.15", "sentence-transformers>=5.0", "setfit>=1.1", "torchao>=0.18",
    "torchjd[quadprog-projector]>=0.18", "trl>=1.16",
''')
res('tests/benchmarks/README.md',lambda a,b:a+b)
