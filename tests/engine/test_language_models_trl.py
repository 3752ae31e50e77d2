"""Training a decoder takes the steps that TRL's SFTTrainer takes: the ways of tests/benchmarks/decoders.py, tiny."""

import importlib
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ftlib

pytest.importorskip("trl", reason="what ftlib is compared with")
QUESTIONS = ("who flies", "where to now", "which one of the two", "when", "how far is it to the sea", "why so late")


@pytest.fixture
def decoders(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("decoders")


def letters() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and an end token."""
    signs = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def llama() -> LlamaForCausalLM:
    """Weights large enough that a token more or less in sight changes the loss."""
    sizes = dict(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def work(decoders, moves: str, steps: int = 5):
    tokenizer, batch = letters(), 4
    texts = [
        {"prompt": f"Q: {QUESTIONS[i % 6][: 4 + i]}? A: ", "completion": f"{i * i}" + "!" * (i % 5)}
        for i in range(batch * steps)
    ]
    rows = ftlib.tokenize(datasets.Dataset.from_list(texts), tokenizer, task="causal-lm")
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    first = rows[0]["input_ids"][:3]
    return decoders.Work(llama, rows, tokenizer, steps, batch, 1e-3, moves, texts, first)


def steps(decoders, way, one, **options) -> tuple[list[dict], dict]:
    gate = decoders.Gate()
    found = way(one, **options)(gate)
    return gate.steps, found


@pytest.mark.parametrize("moves", ["full", "lora"])
def test_the_same_losses_as_trl_step_by_step(decoders, moves):
    one = work(decoders, moves)
    theirs, _ = steps(decoders, decoders.trl, one, bf16=False)
    loop, _ = steps(decoders, decoders.plain, one, bf16=False)
    parts, _ = steps(
        decoders, decoders.trl, one, bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    for other in (loop, parts):
        assert [step["loss"] for step in other] == pytest.approx([step["loss"] for step in theirs], abs=1e-5)
        assert [step["tokens"] for step in other] == [step["tokens"] for step in theirs]
    still = llama()
    first, last = (decoders.loss_alone(still, one.batches[place]) for place in (0, -1))
    assert theirs[0]["loss"] == pytest.approx(first, abs=1e-5)
    assert abs(theirs[-1]["loss"] - last) > 1e-3  # the weights have moved, or every rate would do
    for options in ({}, {"unpad": False}, {"max_tokens": 40}, {"gradient_checkpointing": True}):
        ours, _ = steps(decoders, decoders.fit, one, precision="fp32", **options)
        for key in ("tokens", "trained"):
            assert [step[key] for step in ours] == [step[key] for step in theirs]
        assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=1e-5), options


def test_trl_makes_the_same_tokens_and_trains_the_same(decoders):
    one = work(decoders, "full")
    decoders.trl(one, bf16=False)
    one.rows[7]["labels"][-1] = -100  # as if the end token were not trained
    with pytest.raises(AssertionError):
        decoders.trl(one, bf16=False)


def test_packed_rows_are_alone_and_rows_that_are_cut_are_not(decoders):
    """TRL's best-fit packing leaks no longer where attention is SDPA's; "wrapped" joins and cuts rows."""
    one = work(decoders, "full", steps=1)
    packed = {"bf16": False, "packing": True, "per_device_train_batch_size": 1, "max_length": 60}
    [step], found = steps(decoders, decoders.trl, one, **packed)
    assert step["loss"] == pytest.approx(found["alone"], abs=1e-5)
    [step], found = steps(decoders, decoders.trl, one, **packed, packing_strategy="wrapped")
    assert abs(step["loss"] - found["alone"]) > 1e-2
    [step], _ = steps(decoders, decoders.fit, one, precision="fp32", max_tokens=60)
    assert step["loss"] == pytest.approx(decoders.loss_alone(llama(), one.rows), abs=1e-5)


def test_what_the_first_weights_of_lora_are(decoders):
    """The same in PEFT and here, or a comparison of losses would say nothing."""
    from peft import get_peft_model

    ours, theirs = llama(), decoders.same_start(get_peft_model(llama(), decoders.lora_config()))
    ftlib.tune(ours, "lora", rank=decoders.RANK)
    decoders.same_start(ours)
    moving = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    assert len(moving[0]) == len(moving[1]) == 2 * 2 * 2
    for own, their in zip(*moving, strict=True):
        torch.testing.assert_close(own, their, rtol=0, atol=0)
    assert sum(float(p.detach().abs().sum()) > 0 for p in moving[0]) == 4
