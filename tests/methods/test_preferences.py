"""DPO and GRPO against TRL on the same batches, and that they teach what they should."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_token_losses import gradients, tiny
from torch.testing import assert_close

import ftlib
from ftlib.methods.preferences import (
    advantages,
    dpo,
    grpo,
    keep_log_probs,
    preference_batch,
    preference_rows,
    reference_log_probs,
    rollouts,
    without_adapters,
)
from ftlib.methods.token_losses import label_log_probs, sequence_log_probs

close = partial(assert_close, rtol=1e-5, atol=1e-5)
WORDS = "a b c d e f g h red green blue one two three".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
DATA = [
    {"prompt": "a b c", "chosen": " red", "rejected": " green green one"},
    {"prompt": "d e", "chosen": " blue two three", "rejected": " one"},
    {"prompt": "f", "chosen": " two", "rejected": " green"},
    {"prompt": "g h a b", "chosen": " red blue", "rejected": " three three"},
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    own.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    own.chat_template = TEMPLATE
    return own


def moved(model, by=0.05, seed=3):
    """A copy whose trainable weights are a little elsewhere."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += p.requires_grad * by * torch.randn(p.shape, generator=draw)
    return model


def taken(gradient, model, step):
    model.zero_grad(set_to_none=True)
    return gradient(model, step), gradients(model)


def assert_same(found, wanted):
    close(found[0], wanted[0])
    for name, gradient in wanted[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            scale = max(float(gradient.abs().max()), 1.0)
            close(found[1][name] / scale, gradient / scale, msg=lambda text, name=name: f"{name}: {text}")


def as_conversations(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{k: [{"role": "assistant", "content": row[k].strip()}] for k in ("chosen", "rejected")},
    }


# ----------------------------------------------------------------------------------------------------------- rows


def test_rows_label_the_answers(tokenizer):
    pairs = preference_rows(DATA, tokenizer)
    assert tokenizer.decode(pairs[0]["chosen"]["input_ids"]) == "a b c red </s>"
    assert pairs[0]["chosen"]["labels"][:3] == [-100] * 3 and -100 not in pairs[0]["chosen"]["labels"][3:]
    batch = preference_batch(pairs[:2])
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]] == [
        "a b c red", "d e blue two three", "a b c green green one", "d e one",
    ]  # fmt: skip
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 4, 4, 2]


def test_rows_of_conversations(tokenizer):
    pairs = preference_rows([as_conversations(row) for row in DATA], tokenizer)
    row = pairs[0]["chosen"]
    trained = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(row["input_ids"]).split() == "<user> a b c </s> <assistant> red </s>".split()
    assert tokenizer.decode(trained).split() == ["red", "</s>"]


def test_rows_that_are_none_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"row 1: no \['rejected'\]"):
        preference_rows([DATA[0], {"prompt": "a", "chosen": "b"}], tokenizer)
    with pytest.raises(TypeError, match="row 0, rejected"):
        preference_rows([{"prompt": "a", "chosen": " b", "rejected": 3}], tokenizer)


# ------------------------------------------------------------------------------------------------------------ DPO


def dpo_trainer(model, reference, tokenizer, folder, data, **options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(data), report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True, max_length=None, **options,
    )  # fmt: skip
    rows = Dataset.from_list(data)
    return DPOTrainer(model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("form", ["texts", "conversations"])
def test_dpo_is_trls(tokenizer, tmp_path, form):
    pytest.importorskip("trl")
    data = [as_conversations(row) for row in DATA] if form == "conversations" else DATA
    reference = tiny()
    model = moved(reference)
    trainer = dpo_trainer(copy.deepcopy(model), copy.deepcopy(reference), tokenizer, tmp_path, data, beta=0.1)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch = preference_batch(reference_log_probs(reference, preference_rows(data, tokenizer)))
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert torch.equal(batch["labels"] != -100, inputs["completion_mask"].bool())
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    wanted = theirs.detach(), gradients(trainer.model)
    own = dpo(0.1)
    assert_same(taken(own, model, [batch]), wanted)
    for name, key in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"), ("chosen", "logps/chosen")):
        assert own.last[name] == pytest.approx(trainer._metrics["eval"][key][-1], rel=1e-4, abs=1e-5)
    assert_same(taken(dpo(0.1, reference=reference), model, [batch]), wanted)


def test_a_step_is_the_mean_over_its_pairs_however_cut(tokenizer):
    reference = tiny()
    model, pairs = moved(reference), reference_log_probs(reference, preference_rows(DATA, tokenizer), batch_size=3)
    own, cut = dpo(0.5), dpo(0.5)
    wanted = taken(own, model, [preference_batch(pairs)])
    assert_same(taken(cut, model, [preference_batch(pairs[:1]), preference_batch(pairs[1:])]), wanted)
    assert cut.last == pytest.approx(own.last, rel=1e-4)
    each = [taken(dpo(0.5), model, [preference_batch([pair])])[0] for pair in pairs]  # the rows alone, not padded
    close(wanted[0], torch.stack(each).mean())


@pytest.mark.parametrize("how", ["ftlib", "peft", "peft by tune"])
def test_the_reference_is_the_base_without_its_adapters(tokenizer, how):
    base = tiny("llama, tied", attention_dropout=0.3)
    model = copy.deepcopy(base)
    if how == "ftlib":
        ftlib.tune(model, "lora", rank=2)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
        model = peft.get_peft_model(model, config) if how == "peft" else (ftlib.tune(model, config), model)[1]
    model = moved(model, 0.3)
    batch = preference_batch(preference_rows(DATA, tokenizer))
    wanted = sequence_log_probs(base, batch).detach()
    assert not torch.allclose(sequence_log_probs(model, batch), wanted, atol=1e-3)
    with without_adapters(model):
        close(sequence_log_probs(model, batch).detach(), wanted)
    assert not torch.allclose(sequence_log_probs(model, batch), wanted, atol=1e-3)
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    kept = preference_batch(reference_log_probs(base, preference_rows(DATA, tokenizer)))
    model.train()  # dropout is off for the reference
    torch.manual_seed(0)
    first = taken(dpo(0.3), model, [kept])
    torch.manual_seed(0)
    assert_same(taken(dpo(0.3, reference=without_adapters), model, [batch]), first)
    assert model.training and moving == [name for name, p in model.named_parameters() if p.requires_grad]


def test_what_is_no_reference_is_refused(tokenizer):
    batch = preference_batch(preference_rows(DATA, tokenizer))
    with pytest.raises(ValueError, match="reference_log_probs"):
        dpo()(tiny(), [batch])
    with pytest.raises(ValueError, match="no adapters"):
        dpo(reference=without_adapters)(tiny(), [batch])
    model = tiny()
    ftlib.tune(model, "houlsby")
    with pytest.raises(ValueError, match=r"norm.*trains beside"), without_adapters(model):
        pass
    with pytest.raises(ValueError, match="hinge"):
        grpo(loss="hinge")
    with pytest.raises(ValueError, match="needs a reference"):
        grpo(beta=0.1)


def test_half_precision_and_a_scaler(tokenizer):
    reference = tiny()
    model, batch = moved(reference), preference_batch(preference_rows(DATA, tokenizer))
    loss, wanted = taken(dpo(reference=reference), model, [batch])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = taken(dpo(reference=reference, scaler=scaler), model, [batch])
    assert_same(found, (loss, {name: 8 * gradient for name, gradient in wanted.items()}))
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    found = taken(own := dpo(reference=reference, autocast=bf16), model, [batch])
    assert found[0].dtype == torch.float32 and abs(float(found[0] - loss)) < 0.05 and own.last["chosen"] < 0
    largest = max(wanted, key=lambda name: wanted[name].norm())
    assert (found[1][largest] - wanted[largest]).norm() < 0.1 * wanted[largest].norm()


def test_dpo_teaches_the_preference(tokenizer):
    model = tiny()
    pairs = reference_log_probs(model, preference_rows(DATA, tokenizer))
    own, records = dpo(0.5), []
    batches = ([preference_batch(pairs)] for _ in range(15))
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for record in ftlib.steps(model, batches, adam, total=15, gradient=own):
        records.append(record | own.last)
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and abs(records[0]["margin"]) < 1e-3
    assert records[-1]["margin"] > 1 and records[-1]["accuracy"] == 1 and records[-1]["loss"] < 0.3


# ----------------------------------------------------------------------------------------------------------- GRPO


def grpo_trainer(model, tokenizer, folder, reward=len, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=5, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True, **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e"}])
    model.save_pretrained(folder / "model")  # it loads its reference from there
    model.config._name_or_path = str(folder / "model")
    return GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer)


def drawn(model, prompts, tokenizer, temperature=1.0, new=5):
    """Token ids of answers, one prompt after the other."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        answer = model.generate(
            ids, max_new_tokens=new, do_sample=True, temperature=temperature, top_k=0, pad_token_id=0, eos_token_id=2
        )[0, ids.shape[1] :].tolist()
        out.append(answer[: answer.index(2) + 1] if 2 in answer else answer)
    return out


def share_of_red(prompt, answer):
    words = answer.split()
    return words.count("red") / len(words) if words else 0.0


def length(prompt, answer):
    return float(len(answer))


def a_step(model, tokenizer, reward=length, **options):
    torch.manual_seed(5)
    return rollouts(
        model, ["a b c", "d e"], reward, generate=partial(drawn, tokenizer=tokenizer), tokenizer=tokenizer,
        group_size=4, **options,
    )  # fmt: skip


def as_trl(step, tokenizer, **more):
    """TRL's inputs from a batch of ours: prompts padded on the left, answers on the right."""
    from trl.trainer.utils import pad

    (batch,) = step
    parts = {"prompt": [], "completion": []}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        parts["prompt"].append(ids[mask & (labels == -100)])
        parts["completion"].append(ids[mask & (labels != -100)])
    inputs = {"advantages": batch["advantages"], "num_items_in_batch": (batch["labels"] != -100).sum()}
    for (name, values), side in zip(parts.items(), ("left", "right"), strict=True):
        inputs[f"{name}_ids"] = pad(values, padding_value=0, padding_side=side)
        inputs[f"{name}_mask"] = pad([torch.ones_like(value) for value in values], padding_value=0, padding_side=side)
    for name, key in (("old", "old_per_token_logps"), ("reference", "ref_per_token_logps")):
        if name in more:
            values = [row[labels != -100] for row, labels in zip(more[name], batch["labels"], strict=True)]
            inputs[key] = pad(values, padding_value=0.0, padding_side="right")
    return inputs


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.4, 0.7)])
def test_grpo_is_trls(tokenizer, tmp_path, loss, beta, temperature):
    pytest.importorskip("trl")
    base = tiny()
    step = keep_log_probs(base, a_step(base, tokenizer), temperature)
    model = moved(base, 0.1)  # some ratios are clipped
    trainer = grpo_trainer(
        copy.deepcopy(model), tokenizer, tmp_path, loss_type=loss, beta=beta, temperature=temperature, epsilon=0.2
    )
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        kept = label_log_probs(base, {k: step[0][k] for k in ("input_ids", "attention_mask", "labels")}, temperature)
    theirs = trainer._compute_loss(trainer.model, as_trl(step, tokenizer, old=kept, reference=kept))
    theirs.backward()
    own = grpo(beta=beta, loss=loss, reference=base if beta else None, temperature=temperature)
    assert_same(taken(own, model, step), (theirs.detach(), gradients(trainer.model)))
    metrics = trainer._metrics["eval"]
    assert 0 < own.last["clipped"] == pytest.approx(metrics["clip_ratio/region_mean"][-1], rel=1e-5)
    if beta:
        assert 0 < own.last["kl"] == pytest.approx(metrics["kl"][-1], rel=1e-4)
    first = {key: value for key, value in step[0].items() if key != "old"}  # on the policy that answered
    theirs = trainer._compute_loss(trainer.model, as_trl([first], tokenizer, reference=kept))
    trainer.model.zero_grad(set_to_none=True)
    theirs.backward()
    assert_same(taken(own, model, [first]), (theirs.detach(), gradients(trainer.model)))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_a_step_is_the_mean_over_its_answers_however_cut(tokenizer, loss):
    model = tiny()
    own, cut = (grpo(loss=loss) for _ in range(2))
    wanted = taken(own, model, a_step(model, tokenizer))
    step = a_step(model, tokenizer, batch_size=3)
    assert len(step) == 3
    assert_same(taken(cut, model, step), wanted)
    assert cut.last == pytest.approx(own.last, rel=1e-4, abs=1e-6)


def test_advantages_are_trls(tokenizer, tmp_path):
    """Of the answers that its trainer draws and scores itself."""
    pytest.importorskip("trl")

    def reward(completions, **_):
        return [float(sum(map(len, text.split())) % 5) for text in completions]

    trainer = grpo_trainer(tiny(), tokenizer, tmp_path, reward, scale_rewards="group", temperature=1.0)
    torch.manual_seed(1)
    trainer.model.train()
    asked = [{"prompt": "a b c"}] * 4 + [{"prompt": "d e"}] * 4
    found = trainer._generate_and_score_completions(asked)
    texts = tokenizer.batch_decode(found["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(reward(texts))
    assert len(set(rewards.tolist())) > 1
    close(advantages(rewards, 4), found["advantages"])


def test_rollouts_hold_what_was_drawn_and_its_reward(tokenizer):
    model, asked = tiny(), []

    def reward(prompt, answer):
        asked.append((prompt, answer))
        return len(answer.split())

    (batch,) = a_step(model, tokenizer, reward)
    assert [prompt for prompt, _ in asked] == ["a b c"] * 4 + ["d e"] * 4
    assert batch["rewards"].sum() == sum(len(answer.split()) for _, answer in asked)
    torch.manual_seed(5)
    answers = drawn(model, ["a b c"] * 4 + ["d e"] * 4, tokenizer)
    labeled = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert sorted(labeled) == sorted(answers) and {len(answer) for answer in answers} != {5}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert tokenizer.decode(ids[(labels == -100) & mask.bool()]) in ("a b c", "d e")


def test_answers_of_ftlibs_generate(tokenizer):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[2] *= 3  # ends now and then
    options = {"tokenizer": tokenizer, "temperature": 1.0, "max_new_tokens": 5, "seed": 3}
    answers = ftlib.generate(model, ["a b c"] * 4 + ["d e"] * 4, tokens=True, **options)
    texts = ftlib.generate(model, ["a b c"] * 4 + ["d e"] * 4, **options)
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == texts
    assert {answer[-1] == 2 for answer in answers} == {True, False} == {len(answer) < 5 for answer in answers}
    assert all(2 not in answer[:-1] and (answer[-1] == 2 or len(answer) == 5) for answer in answers)
    generate = partial(ftlib.generate, tokens=True, **options)
    (batch,) = rollouts(model, ["a b c", "d e"], length, generate=generate, tokenizer=tokenizer, group_size=4)
    assert sorted(labels[labels != -100].tolist() for labels in batch["labels"]) == sorted(answers)
    with pytest.raises(ValueError, match="tokens=True"):
        ftlib.generate(model, ["a"], tokenizer=tokenizer, tokens=True, stop="b")


def test_conversations_are_asked_by_the_template(tokenizer):
    seen = []
    prompt = [{"role": "user", "content": "a b"}]

    def answer(model, prompts):
        seen.extend(prompts)
        return [[14, 2], [15, 2]]

    (batch,) = rollouts(tiny(), [prompt], lambda prompt, text: float(text == "red"), generate=answer,
                        tokenizer=tokenizer, group_size=2)  # fmt: skip
    assert seen == [prompt, prompt] and batch["rewards"].tolist() == [1.0, 0.0]
    assert tokenizer.decode(batch["input_ids"][0]).split() == "<user> a b </s> <assistant> red </s>".split()


def test_grpo_teaches_what_is_rewarded(tokenizer):
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():  # less sure of itself, so that it tries
            p /= 4 if p.dim() > 1 else 1
    generate, own, records = partial(drawn, tokenizer=tokenizer, new=4), grpo(), []
    torch.manual_seed(0)
    batches = (
        rollouts(model.eval(), ["a b c", "d e"], share_of_red, generate=generate, tokenizer=tokenizer, group_size=8)
        for _ in range(20)
    )
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for record in ftlib.steps(model, batches, adam, total=20, gradient=own, schedule=lambda *_: 1.0):
        records.append(record | own.last)
    first, last = (sum(record["reward"] for record in part) / 5 for part in (records[:5], records[-5:]))
    assert last > first + 0.3, (first, last)
    assert F.softmax(model(torch.tensor([tokenizer("d e")["input_ids"]])).logits[0, -1], -1).argmax() == 14
