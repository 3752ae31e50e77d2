"""Generation against Transformers' own for one prompt, against loops by hand, and on models whose answers are known."""

import copy
import logging
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import ftlib
from ftlib import evaluate, generate
from ftlib.methods.unpadding import is_unpadded

WEIGHTS = Path(__file__).resolve().parents[2] / "data/cache/smollm2/model.safetensors"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer():
    """Bytes as tokens, an end token, roles, and a chat template."""
    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    extra = {"additional_special_tokens": ["<|user|>", "<|assistant|>"]}
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", **extra)
    made.chat_template = TEMPLATE
    return made


TOKENIZER = byte_tokenizer()
USER, ASSISTANT, END = TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])


class Numbers:
    """The tokenizer above, but every token is text: its number; no token ends an answer."""

    eos_token_id = None

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def __call__(self, *texts, **options):
        return TOKENIZER(*texts, **options)

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


NUMBERS = Numbers()
LLAMA = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
KINDS = {  # bart and bloom have no position ids: only prompts of one length go together
    "llama": LLAMA,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": LLAMA | dict(sliding_window=4, head_dim=8),
    "bart": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, is_decoder=True),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "gpt_neox": LLAMA,
    "mistral": LLAMA | dict(sliding_window=4),
    "qwen3": LLAMA | dict(head_dim=8),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
}


def tiny(kind="llama", seed=0, end=None, **options):
    """A random decoder with weights so large that its answers differ from prompt to prompt."""
    sizes = dict(
        vocab_size=len(TOKENIZER), pad_token_id=None, bos_token_id=1, eos_token_id=end, tie_word_embeddings=False
    )
    config = AutoConfig.for_model(kind, **{**sizes, **KINDS[kind], **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.normal_(0, 0.3)
    model.generation_config = GenerationConfig(eos_token_id=end)
    return model


def prompts_of(lengths=(3, 9, 1, 6, 9, 2), seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=random).tolist() for n in lengths]


def by_transformers(model, prompt, tokenizer=NUMBERS, **options):
    """What `model.generate` gives for one prompt's token ids."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0) | options
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(out[0, len(prompt) :].tolist(), skip_special_tokens=True)


def by_hand(model, prompt, steps=8):
    """The likeliest token each time, by whole forward passes without a cache."""
    model.eval()
    ids = list(prompt)
    for _ in range(steps):
        whole = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1].argmax()))
    return NUMBERS.decode(ids[len(prompt) :])


def answered(model, prompts, **options):
    return generate(model, prompts, **{"max_new_tokens": 8, "tokenizer": NUMBERS} | options)


def chain(words, script, ends=("<end>",)):
    """A model and its tokenizer: after the i-th word of the script comes the next, whatever stands before.

    A word is a token as it is, so a script says exactly how a text is cut into tokens; no word comes twice.
    """
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys([*words, *script, *ends])])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=ends[0]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=ends[0])
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size, hidden_size=2 * -(-size // 2), num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.model.layers.parameters():
        weight.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(size, config.hidden_size)
    model.lm_head.weight.data.zero_()
    for before, after in zip(script, [*script[1:], script[-1]], strict=True):
        model.lm_head.weight.data[vocabulary[after], vocabulary[before]] = 1.0
    model.generation_config = GenerationConfig()
    return model, tokenizer, vocabulary


# ------------------------------------------------------------------------------------- equal to Transformers


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_each_prompt_alone(kind, beams):
    model, prompts = tiny(kind), prompts_of()
    expected = [by_transformers(model, prompt, num_beams=beams) for prompt in prompts]
    assert len(set(expected)) == len(expected), "a test that can't tell the prompts' answers apart"
    for size in (1, 4, 16):
        assert answered(model, prompts, num_beams=beams, batch_size=size) == expected, size


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_greedy_is_the_likeliest_token_each_time(kind):
    model, prompts = tiny(kind), prompts_of()
    assert answered(model, prompts) == [by_hand(model, prompt) for prompt in prompts]


def test_answers_end_at_every_end_token_and_special_tokens_are_left_out():
    script = ["a", "b", "<note>", "c", "<end>", "d", "<other>", "e", "<pad>"]
    model, tokenizer, ids = chain([], script)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<note>"], "pad_token": "<pad>"})
    assert tokenizer.convert_tokens_to_ids("<note>") == ids["<note>"]
    options = dict(tokenizer=tokenizer, max_new_tokens=10)
    prompts = [[ids["a"]], [ids["d"]], [ids["b"], ids["b"]]]
    model.generation_config = GenerationConfig(eos_token_id=[ids["<other>"], ids["e"]])
    assert generate(model, prompts, **options) == ["bc", "", "c"]
    model.generation_config = GenerationConfig(eos_token_id=ids["e"])
    assert generate(model, prompts, **options) == ["bc", "<other>", "c"]  # as text: it is no special token
    model.generation_config = GenerationConfig()
    assert generate(model, [[ids["a"]]], **options) == ["bc"]  # the tokenizer's own
    found = generate(model, [[ids["a"]], [ids["e"]]], tokens=True, tokenizer=tokenizer, max_new_tokens=4)
    assert found == [[ids[word] for word in words] for words in (["b", "<note>", "c", "<end>"], ["<pad>"] * 4)]


def test_a_model_without_an_end_token_answers_to_the_last():
    model, tokenizer, ids = chain([], ["a", "b", "c"])
    tokenizer.eos_token = None
    assert generate(model, [[ids["a"]], [ids["b"]]], tokenizer=tokenizer, max_new_tokens=3) == ["bcc", "ccc"]


def test_the_models_generation_config_changes_nothing_but_the_end_tokens():
    model, prompts = tiny(), prompts_of()
    expected, sampled = answered(model, prompts), answered(model, prompts, temperature=1.0, seed=3)
    wide = answered(model, prompts, num_beams=2)
    odd = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=2, top_p=0.3, min_p=0.5, repetition_penalty=5.0, no_repeat_ngram_size=1,
        max_length=5, min_new_tokens=2, num_beams=4, num_return_sequences=3, length_penalty=-3.0, early_stopping=True,
        suppress_tokens=list(range(128)), forced_eos_token_id=177, bad_words_ids=[[200]], stop_strings=["a"],
        return_dict_in_generate=True, output_scores=True, use_cache=False, max_time=1e-9, pad_token_id=9,
        cache_implementation="static", renormalize_logits=True, guidance_scale=2.0,
    )  # fmt: skip
    model.generation_config, before = odd, copy.deepcopy(odd).to_dict()
    assert answered(model, prompts) == expected
    assert answered(model, prompts, temperature=1.0, seed=3) == sampled
    assert answered(model, prompts, num_beams=2) == wide
    assert model.generation_config is odd and odd.to_dict() == before


def test_any_padding_id_does(caplog):
    model, prompts = tiny(), prompts_of()
    expected = answered(model, prompts)
    assert TOKENIZER.pad_token_id is None and model.config.pad_token_id is None
    model.config.pad_token_id = 0  # the byte 0, which prompts may hold
    with caplog.at_level(logging.WARNING):
        assert answered(model, [*prompts, [0, 0, 5]])[:-1] == expected
        assert answered(model, [[0, 0, 5], *prompts])[0] == by_transformers(model, [0, 0, 5])


# -------------------------------------------------------------------------------------------------- prompts


def test_conversations_and_texts_become_the_tokens_they_are_in_training():
    model = tiny()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    hi, yo, why = ([i for i in TOKENIZER(text)["input_ids"]] for text in ("Hi", "Yo", "?"))
    first, whole = [USER, *hi, END, ASSISTANT], [USER, *hi, END, ASSISTANT, *yo, END, USER, *why, END, ASSISTANT]
    text = TOKENIZER("a text")["input_ids"]
    found = answered(model, [talk, "a text", talk[:1]])
    assert found == [by_transformers(model, ids) for ids in (whole, text, first)]
    assert answered(model, (text for text in ("one", "two"))) == answered(model, ["one", "two"])
    assert answered(model, np.array(["one", "two"])) == answered(model, ["one", "two"])


def test_a_column_of_a_dataset_is_a_list_of_prompts():
    import datasets
    import pandas as pd

    model, texts = tiny(), ["one", "three"]
    talks = [[{"role": "user", "content": text}] for text in texts]
    data = datasets.Dataset.from_dict({"text": texts, "messages": talks})
    assert answered(model, data["text"]) == answered(model, pd.Series(texts, index=[5, 3])) == answered(model, texts)
    assert answered(model, data["messages"]) == answered(model, talks)


def test_tokenizer_is_found_by_the_models_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer is unknown; pass tokenizer="):
        generate(tiny(), ["text"])
    TOKENIZER.save_pretrained(tmp_path)
    model = ftlib.load_model(tmp_path, task="causal-lm")
    assert generate(model, ["text"], max_new_tokens=8) == answered(tiny(), ["text"], tokenizer=TOKENIZER)


def test_longest_prompts_come_first_and_batches_are_of_about_one_length():
    model, shapes = tiny(), []
    hook = model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    answered(model, prompts_of((1, 7, 3, 8, 2)), batch_size=2, max_new_tokens=2)
    assert shapes == [(2, 8), (2, 1), (2, 3), (2, 1), (1, 1), (1, 1)]
    hook.remove()


def test_no_prompts_no_answers():
    assert answered(tiny(), []) == []


def test_progress(capsys):
    answered(tiny(), prompts_of(), progress=True, batch_size=2, max_new_tokens=1)
    assert "generate:   0%|" in (said := capsys.readouterr().err) and "0/3" in said
    answered(tiny(), prompts_of(), max_new_tokens=1)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------- sampling


def constant(logits):
    """A model that gives these logits whatever stands before."""
    model = tiny(vocab_size=len(logits), tie_word_embeddings=False)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0 if "norm" in name else 0.0)
    model.model.embed_tokens.weight.data.fill_(1.0)  # after the last norm: ones
    model.lm_head.weight.data[:, 0] = torch.tensor(logits)
    return model


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -9.0]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.9, "temperature": 2.0}]
)
def test_tokens_are_drawn_with_their_probabilities(options):
    """... which are those that Transformers' own sampling draws from."""
    options = {"temperature": 1.0} | options
    model = constant(LOGITS)
    answers = generate(model, [[1]] * 100, tokenizer=NUMBERS, max_new_tokens=60, batch_size=50, **options)
    drawn = np.array([answer.split() for answer in answers], dtype=int)  # (100, 60)
    their = dict(do_sample=True, output_scores=True, return_dict_in_generate=True, pad_token_id=0)
    ids = torch.ones(1, 1, dtype=torch.long)
    out = model.generate(ids, attention_mask=ids, max_new_tokens=1, **{"top_k": 0} | options | their)
    wanted = out.scores[0][0].double().softmax(-1).numpy()
    shares = np.bincount(drawn.ravel(), minlength=len(LOGITS)) / drawn.size
    assert (shares[wanted == 0] == 0).all()
    error = np.sqrt(wanted * (1 - wanted) / drawn.size)  # of a share, its standard deviation
    assert (np.abs(shares - wanted) <= 4 * error).all(), (shares, wanted)
    for rows in (drawn, drawn.T):  # neither steps nor prompts hang together
        same = np.mean(rows[1:] == rows[:-1])
        assert abs(same - (wanted**2).sum()) < 0.03


def test_a_draw_is_where_the_summed_probabilities_reach_the_rows_number():
    model, prompts, steps, seed = tiny(), prompts_of((2, 5)), 6, 11
    answers = generate(model, prompts, tokenizer=NUMBERS, max_new_tokens=steps, temperature=1.5, seed=seed)
    for i, prompt in enumerate(prompts):
        random, ids = torch.Generator().manual_seed(seed * 1_000_003 + i), list(prompt)
        for number in torch.rand(steps, 1, generator=random, dtype=torch.float64).flatten().tolist():
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1] / 1.5
            ids.append(int(np.searchsorted(np.cumsum(logits.double().softmax(-1).numpy()), number)))
        assert answers[i] == NUMBERS.decode(ids[len(prompt) :])


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (1 - 2**-53, 4)])  # the first and the last that there is
def test_what_has_no_probability_is_never_drawn(number, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *sizes, generator, dtype: torch.full(sizes, number, dtype=dtype))
    model = constant([-9.0, -8.0, 1.0, 2.0, 1.0, -9.0])
    answers = generate(model, [[1]], tokenizer=NUMBERS, temperature=1.0, top_k=3, max_new_tokens=5)
    assert set(answers[0].split()) == {str(token)}


def test_seed_and_place_alone_decide():
    model, prompts = tiny(), prompts_of((5, 3, 5, 4))
    first = answered(model, prompts, temperature=1.0, seed=1)
    assert answered(model, prompts, temperature=1.0, seed=1) == first
    assert answered(model, prompts, temperature=1.0, seed=1, batch_size=1) == first
    assert answered(model, prompts[:2], temperature=1.0, seed=1) == first[:2]
    torch.manual_seed(5)
    assert answered(model, prompts, temperature=1.0, seed=1) == first
    other = answered(model, prompts, temperature=1.0, seed=2)
    assert all(a != b for a, b in zip(first, other, strict=True))
    twice = answered(model, [prompts[0]] * 4, temperature=1.0)
    assert len(set(twice)) == 4  # several answers to one prompt


def test_global_random_state_is_left_alone():
    model = tiny()
    before = torch.get_rng_state()
    answered(model, prompts_of(), temperature=1.0, seed=1)
    answered(model, prompts_of(), num_beams=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    model, prompts = tiny(), prompts_of()
    expected = answered(model, prompts)
    assert answered(model, prompts, temperature=1.0, top_k=1) == expected
    assert answered(model, prompts, temperature=1.0, top_p=1e-6) == expected
    assert answered(model, prompts, temperature=1e-4) == expected


# --------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize(
    ("script", "stop", "answer"),
    [
        (["x", "go ", "st", "op", " on"], "stop", "go "),  # two tokens
        (["x", "las", "topper", " on"], "stop", "la"),  # begins inside a token, and ends inside one
        (["x", "one stop two", " on"], "stop", "one "),  # all inside one
        (["x", "one ", "s", "t", "o", "p"], "stop", "one "),
        (["x", "one ", "st", "o", "re"], "stop", "one store"),
        (["x", "a", "b", "c", "d"], ("d", "bc"), "a"),  # the first that comes
        (["x", "abc", "d"], ("c", "b"), "a"),  # the one that begins first
        (["x", "q"], (), "q"),
    ],
)
def test_stop_text_ends_an_answer_and_is_cut_off(script, stop, answer):
    model, tokenizer, ids = chain([], [*script, "<end>"])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, [[ids["x"]]], tokenizer=tokenizer, max_new_tokens=12, stop=stop) == [answer]
    whole, stop = "".join(script[1:]), (stop,) if isinstance(stop, str) else stop
    seen = [k for k in range(1, len(script)) if any(one in "".join(script[1 : k + 1]) for one in stop)]
    assert len(calls) == min(seen, default=len(script)), f"{whole} goes on behind what stops it"


def test_stop_across_bytes_of_one_sign():
    made = TOKENIZER("ab→cd", add_special_tokens=False)["input_ids"]
    script = [TOKENIZER.convert_ids_to_tokens(i) for i in made]
    assert len(script) == 7  # the arrow is three bytes
    model, _, ids = chain([TOKENIZER.convert_ids_to_tokens(i) for i in range(256)], script, ends=("<|end|>",))
    answers = generate(model, [[ids[script[0]]]], tokenizer=TOKENIZER, max_new_tokens=6, stop="→")
    assert answers == ["b"]


def test_a_prompts_end_is_no_part_of_a_stop_text():
    """As it is for Transformers, which ends this answer at its first token."""
    model, tokenizer, ids = chain(["abcdef"], ["<", "<go", "> on", "<<", "more"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # which their check asks for
    prompt = torch.tensor([[ids["<"]]])
    options = dict(max_new_tokens=4, pad_token_id=0, do_sample=False)
    theirs = model.generate(prompt, stop_strings=["<<"], tokenizer=tokenizer, **options)
    assert theirs[0].tolist() == [ids["<"], ids["<go"]]
    assert generate(model, [[ids["<"]]], tokenizer=tokenizer, max_new_tokens=4, stop="<<") == ["<go> on"]


def test_stop_in_a_batch_cuts_what_would_come_without():
    model, prompts = tiny(), prompts_of()
    whole = answered(model, prompts, max_new_tokens=20)
    stop = tuple(" ".join(text.split()[k : k + 2]) for k, text in enumerate(whole[:3], 2))
    expected = [min((text[: text.find(one)] for one in stop if one in text), key=len, default=text) for text in whole]
    assert len(set(map(len, expected))) > 3
    for options in ({}, {"batch_size": 2}):
        assert answered(model, prompts, max_new_tokens=20, stop=stop, **options) == expected


# ------------------------------------------------------------------------------ whatever was done to the model


def test_modes_come_back_and_dropout_is_off():
    model = tiny(attention_dropout=0.5)
    expected = answered(model, prompts_of())
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # as the Trainer leaves it
    assert answered(model, prompts_of()) == expected
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_our_adapters_and_pefts(kind):
    prompts = prompts_of()
    target = {"llama": "q_proj", "gpt2": "c_attn"}[kind]
    virtual = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
    for config in (
        "lora",
        peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[target]),
        peft.PromptTuningConfig(**virtual),
        peft.PrefixTuningConfig(**virtual),
    ):
        model = tiny(kind)
        if isinstance(config, str):
            ftlib.tune(model, config, rank=2)
        else:
            model = peft.get_peft_model(model, config)
        plain = answered(tiny(kind), prompts)
        random = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.5, generator=random)
        model.train()
        found = answered(model, prompts)
        assert all(module.training for module in model.modules())
        assert found == [by_hand(model, prompt) for prompt in prompts] != plain, config


def test_virtual_tokens_take_positions():
    model = peft.get_peft_model(tiny("gpt2"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert len(answered(model, prompts_of((53,)))) == 1
    with pytest.raises(ValueError, match="prompt 0: 54 tokens and 11 more, but the model has 64 positions"):
        answered(model, prompts_of((54,)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_an_unpadded_model_stays_one(kind):
    model, prompts = tiny(kind), prompts_of()
    expected = answered(model, prompts)
    ftlib.unpad(model)
    assert answered(model, prompts) == expected
    assert answered(model, prompts, num_beams=2) == answered(tiny(kind), prompts, num_beams=2)
    assert is_unpadded(model)


def test_under_autocast_as_transformers_and_each_weight_is_cast_once():
    model, prompt = tiny(), prompts_of()[1]
    autocast = torch.autocast("cpu", torch.bfloat16)
    frozen = [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]
    for weight in frozen:
        weight.requires_grad = False
    with autocast:
        expected = by_transformers(model, prompt)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count, half = 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                self.count += any(args[0].data_ptr() == weight.data_ptr() for weight in frozen)
            self.half += function is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16
            return function(*args, **kwargs or {})

    with Casts() as casts:
        assert answered(model, [prompt], autocast=autocast) == [expected]
    assert casts.count == len(frozen) and casts.half
    assert not any(weight.requires_grad for weight in frozen) and model.model.norm.weight.requires_grad
    assert not torch.is_autocast_enabled("cpu")
    assert answered(model, [prompt]) == [by_transformers(model, prompt)]


def test_after_an_error_all_is_as_it_was():
    model = tiny()
    model.train().lm_head.weight.requires_grad = False
    own = model.generation_config

    def broken(*_):
        raise RuntimeError("broken")

    hook = model.model.layers[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        answered(model, prompts_of(), autocast=torch.autocast("cpu", torch.bfloat16))
    hook.remove()
    assert model.generation_config is own and model.training and not model.lm_head.weight.requires_grad
    assert "forward" not in vars(model.lm_head)


def test_metrics_on_generated_text():
    model, _, ids = chain([TOKENIZER.convert_ids_to_tokens(i) for i in range(256)], list("abcd"), ends=("<|end|>",))
    model.lm_head.weight.data[END] = 0.0
    model.lm_head.weight.data[END, ids["d"]] = 2.0  # after a d the answer ends
    rows = [
        {"prompt": "xa", "completion": "bcd"},
        {"prompt": "c", "completion": "bd"},
        {"prompt": "b", "completion": "cd"},
    ]
    data = ftlib.tokenize(rows, TOKENIZER, task="causal-lm")
    found = evaluate(model, data, tokenizer=TOKENIZER, generate={"max_new_tokens": 5})
    assert {name: found[name] for name in ("exact_match", "f1", "valid_json")} == {
        "exact_match": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3), "valid_json": 0.0,
    }  # fmt: skip
    assert evaluate(model, data, tokenizer=TOKENIZER, generate={"max_new_tokens": 1})["exact_match"] == 0.0


# ------------------------------------------------------------------------------------------------- refusals


def test_positions_are_counted():
    model, prompts = tiny(), prompts_of((3, 60, 61))
    assert len(answered(model, prompts[:2], max_new_tokens=4)) == 2
    message = "prompt 2: 61 tokens and 4 more, but the model has 64 positions; shorten it, or lower max_new_tokens"
    with pytest.raises(ValueError, match=message):
        answered(model, prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("one text", TypeError, r"prompts is a str; pass a list of prompts, even for one: \[prompt\]"),
        ({"text": ["a"]}, TypeError, "prompts is a dict"),
        (3, TypeError, "prompts is a int"),
        ([{"role": "user", "content": "Hi"}], ValueError, r"prompt 0: expected messages, \[{'role'"),
        (["a", None], ValueError, "prompt 1: expected messages"),
        (["a", ""], ValueError, "prompt 1: the text is empty"),
        (["a", []], ValueError, "prompt 1: expected messages"),
        (["a", [5, 259]], ValueError, r"prompt 1: id 259 is outside 0..258; tokenizer and model differ"),
        (["a", [5, "b"]], TypeError, "prompt 1: 'b' is no whole number"),
        ([[5, 6], [{"role": "user"}]], ValueError, "prompt 1, message 0: no content"),
    ],
)
def test_what_is_no_list_of_prompts(prompts, error, message):
    with pytest.raises(error, match=message):
        answered(tiny(), prompts)


def test_a_table_is_no_list_of_prompts():
    import pandas as pd

    with pytest.raises(TypeError, match="prompts is a DataFrame"):
        answered(tiny(), pd.DataFrame({"text": ["a"]}))


def test_a_conversation_without_a_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompt 0: messages, but the tokenizer has no chat template"):
        generate(tiny(), [[{"role": "user", "content": "Hi"}]], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: need a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"temperature": -1}, "temperature=-1: need a number from 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"top_p": 0.9}, "need a temperature above 0"),
        ({"top_k": 5}, "need a temperature above 0"),
        ({"num_beams": 2, "temperature": 1.0}, "leave temperature at 0"),
        ({"stop": ("a", "")}, "none of them empty"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": [3]}, "need texts"),
        ({"stop": "a", "tokens": True}, "leave it out with tokens=True"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        answered(tiny(), ["a"], **options)


def test_models_that_cannot_go_on(tiny_model):
    from transformers import BertConfig, BertLMHeadModel

    sizes = dict(
        vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    remedy = "can't go on from a text; load a decoder with task='causal-lm'"
    encoder = tiny_model("encoder", vocab_size=len(TOKENIZER))
    for model, name in (
        (tiny_model(), "BertForSequenceClassification"), (encoder, "BertModel"), (tiny().model, "LlamaModel"),
        (ftlib.MultiTaskModel(encoder, {"a": ftlib.Head()}), "MultiTaskModel"),
        (BertLMHeadModel(BertConfig(**sizes)), "BertLMHeadModel"),  # reads both ways
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} {remedy}"):
            answered(model, ["a"])
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()
    assert answered(model, ["abc", "a"]) == [by_hand(model, TOKENIZER(text)["input_ids"]) for text in ("abc", "a")]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0}])
def test_nan_is_no_answer(options):
    model, prompts = tiny(), prompts_of((2, 4, 3))
    model.model.embed_tokens.weight.data[prompts[2][0]] = torch.nan
    with pytest.raises(ValueError, match="prompt 2: logits are nan"):
        answered(model, prompts, **options)


# --------------------------------------------------------------------------------------------- real weights


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs SmolLM2's weights: make data fetches them")
def test_smollm2_answers_as_transformers_does():
    model, tokenizer = ftlib.load_model("smollm2", task="causal-lm"), ftlib.load_tokenizer("smollm2")
    talks = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Name a color.")]
    found = generate(model, talks, max_new_tokens=12)
    for talk, answer in zip(talks, found, strict=True):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0] == "The capital of France is Paris."
