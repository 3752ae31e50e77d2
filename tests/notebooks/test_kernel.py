"""What a reader does in JupyterLab while `fit` runs: the stop button, and then the cells after it."""

import os
import time

import cells
import run
from jupyter_client import KernelManager

SET_UP = """
import random, torch, transformers, ftlib

def build():
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=16))

draw = random.Random(0)
rows = [{"input_ids": [draw.randrange(5, 99) for _ in range(8)], "labels": draw.randrange(2)} for _ in range(64)]
options = dict(max_steps=300, batch_size=8, learning_rate=1e-3)
config = ftlib.TrainConfig(**options, checkpoint_dir="checkpoints", checkpoint_every=10, resume="auto")
model = build()
"""
STOPPED = """
assert run.stopped == "interrupted" and 20 <= run.steps < 300, run
assert [record["step"] for record in run.history] == list(range(1, run.steps + 1))
assert all(p.isfinite().all() and p.grad is None for p in model.parameters())
assert len(ftlib.predict(model, rows)) == len(rows)
"""
GO_ON = """
whole, again = build(), build()
expected = ftlib.fit(whole, rows, config=ftlib.TrainConfig(**options))
run = ftlib.fit(again, rows, config=config)
assert run.stopped == "finished" and run.steps == 300
without = lambda run: [{key: value for key, value in record.items() if key != "seconds"} for record in run.history]
assert without(run) == without(expected)
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
"""


def test_the_stop_button_ends_a_run_that_goes_on_exactly(tmp_path):
    manager = KernelManager(kernel_name="python3", kernel_spec_manager=run.ThisPython())
    manager.start_kernel(cwd=str(tmp_path), env=os.environ | {"PYTHONPATH": str(cells.ROOT)})
    client = manager.blocking_client()
    client.start_channels()

    def answer(message):
        while True:
            reply = client.get_shell_msg(timeout=300)
            if reply["parent_header"].get("msg_id") == message:
                content = reply["content"]
                assert content["status"] == "ok", "\n".join(content["traceback"])
                return

    try:
        client.wait_for_ready(timeout=120)
        answer(client.execute(SET_UP))
        fitting = client.execute("run = ftlib.fit(model, rows, config=config)")
        begun = time.monotonic()
        while not (tmp_path / "checkpoints" / "step-00000020").is_dir():
            assert manager.is_alive() and time.monotonic() < begun + 120
            time.sleep(0.005)
        manager.interrupt_kernel()
        answer(fitting)
        answer(client.execute(STOPPED))
        answer(client.execute(GO_ON))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
