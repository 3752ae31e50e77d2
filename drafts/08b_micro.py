"""Processor seconds of three steps of flan-t5 titles, by method (rough: the machine is busy)."""
import os, sys, time
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, "/work/w18/tests/benchmarks")
import torch; torch.set_num_threads(1)
import methods, speed
work = speed.titles(24)
print([len(x) for x in work.rows["input_ids"]], [len(x) for x in work.rows["labels"]], flush=True)
ours = speed.our_methods("titles", work, False)
arms = {"ftlib.fit": ours["ftlib.fit"], "ftlib.fit, unpad": ours["ftlib.fit, unpad"], "Trainer bf16": methods.trainer(work, bf16=True, optim="adamw_torch_fused"),
        "ftlib.fit, unpad, max_tokens=1024": ours["ftlib.fit, unpad, max_tokens=1024"],
        "Trainer bf16 grouped": methods.trainer(work, bf16=True, train_sampling_strategy="group_by_length"), "Trainer": methods.trainer(work)}
for name, run in arms.items():
    run_start = time.process_time(); out = run(); spent = time.process_time() - run_start
    print(name, round(spent, 2), {k: round(v, 3) for k, v in out.items() if isinstance(v, float)}, flush=True)
