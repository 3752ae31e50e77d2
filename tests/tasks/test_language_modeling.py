"""Rows of language models: which tokens are trained, by hand for the usual templates; twins: Transformers, TRL."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import ftlib
from ftlib.tasks import language_modeling
from ftlib.tasks.language_modeling import encode, last_answer, prompt_ids

IGNORE = -100
# The usual templates in our own words.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|/start|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|/start|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # a finished conversation ends with one more token
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # thoughts are kept in the last turn alone, which has some in any case
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (  # special tokens before what is said, and another end token in the last turn
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PLAIN = (  # without special tokens
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL = re.findall(r"<\|[/\w]+\|>", CHATML + LLAMA3 + GEMMA + CHANNELS + "<|user|> <|assistant|>")
SPECIAL = list(dict.fromkeys(SPECIAL))
TEXT = (
    "Hi you. Hello, dear. And now? Go on! user assistant model final think the theatre of the three [INST] [/INST] : "
)
TALK = [
    {"role": "user", "content": "Hi you"},
    {"role": "assistant", "content": "Hello, dear."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Go on!"},
]


def finished(core, template=None, **options):
    options |= dict(bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    made.chat_template = template
    return made


def byte_level(template=None, bos=False, size=340):
    """Byte-level BPE, as GPT-2's, Llama 3's and Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator([TEXT] * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return finished(core, template)


def metaspace(template=None, scheme="first"):
    """Pieces that begin with a space, and a begin token, as sentencepiece's in Llama 2 and Mistral."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=[*map(chr, range(33, 127)), "\n"]
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return finished(core, template, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_level, "bytes with bos": lambda t=None: byte_level(t, bos=True), "metaspace": metaspace}


def marked(row, tokenizer):
    """A row as text, what is trained in double brackets; a label is its token, or none."""
    assert all(label in (IGNORE, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    labels = row["labels"]
    edges = [i for i, (a, b) in enumerate(pairwise([IGNORE, *labels, IGNORE])) if (a == IGNORE) != (b == IGNORE)]
    parts = [tokenizer.decode(row["input_ids"][a:b]) for a, b in pairwise([0, *edges, len(labels)])]
    return "".join(f"⟦{part}⟧" if i % 2 else part for i, part in enumerate(parts))


# ------------------------------------------------------------------------------------------- conversations

EXPECTED = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n⟦Hello, dear.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Go on!<|im_end|>⟧\n",
    ),
    "llama 3": (
        LLAMA3,
        "<s><|start|>user<|/start|>\n\nHi you<|eot|><|start|>assistant<|/start|>\n\n⟦Hello, dear.<|eot|>⟧"
        "<|start|>user<|/start|>\n\nAnd now?<|eot|><|start|>assistant<|/start|>\n\n⟦Go on!<|eot|>⟧",
    ),
    "gemma": (
        GEMMA,
        "<s><|turn|>user\nHi you<|/turn|>\n<|turn|>model\n⟦Hello, dear.<|/turn|>⟧\n"
        "<|turn|>user\nAnd now?<|/turn|>\n<|turn|>model\n⟦Go on!<|/turn|>⟧\n",
    ),
    "mistral": (
        MISTRAL,
        "<s>[INST] Hi you [/INST]⟦ Hello, dear.</s>⟧[INST] And now? [/INST]⟦ Go on!</s>⟧",
    ),
    "phi 3": (
        PHI3,
        "<|user|>\nHi you<|end|>\n<|assistant|>\n⟦Hello, dear.<|end|>⟧\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦Go on!<|end|>⟧\n</s>",
    ),
    "qwen 3": (
        QWEN3,
        "<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n⟦Hello, dear.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nGo on!<|im_end|>⟧\n",
    ),
    "channels": (
        CHANNELS,
        "<|start|>user<|message|>Hi you<|end|><|start|>assistant⟦<|channel|>final<|message|>Hello, dear.<|end|>⟧"
        "<|start|>user<|message|>And now?<|end|><|start|>assistant⟦<|channel|>final<|message|>Go on!<|return|>⟧",
    ),
    "plain": (PLAIN, "User: Hi you\nAssistant:⟦ Hello, dear.\n⟧User: And now?\nAssistant:⟦ Go on!\n⟧"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", EXPECTED)
def test_trained_are_what_the_assistant_says_and_its_end_token(name, kind):
    template, expected = EXPECTED[name]
    tokenizer = TOKENIZERS[kind](template)
    row = encode(tokenizer, {"messages": TALK}, "row 0")
    text = marked(row, tokenizer)
    if kind == "metaspace":  # a part alone is decoded without its first space
        text, expected = text.replace("⟦ ", "⟦"), expected.replace("⟦ ", "⟦")
    assert text == expected
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole  # as Transformers makes them: one begin token
    # asked for an answer the model sees what it was trained on
    prompt = prompt_ids(tokenizer, TALK[:3], "prompt 0")
    assert row["input_ids"][: len(prompt)] == prompt
    before, answer = last_answer(row)
    assert before == prompt
    assert tokenizer.decode(answer) == re.findall("⟦(.*?)⟧", expected, re.S)[-1]
    theirs = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == theirs


@pytest.mark.parametrize("name", EXPECTED)
def test_one_turn(name):
    template, expected = EXPECTED[name]
    tokenizer = byte_level(template)
    text = marked(encode(tokenizer, {"messages": TALK[2:]}, "row 0"), tokenizer)
    assert text.removeprefix("<s>") == expected[expected.index(re.split("⟧\n?", expected)[1]) :].removeprefix("\n")


def test_thoughts_are_trained_where_the_template_keeps_them():
    tokenizer = byte_level(QWEN3)
    talk = [dict(turn) for turn in TALK]
    for place, thought in ((1, "hm"), (3, "so")):
        talk[place]["content"] = f"<think>\n{thought}\n</think>\n\n{talk[place]['content']}"
    assert marked(encode(tokenizer, {"messages": talk}, "row 0"), tokenizer) == (
        "<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n⟦Hello, dear.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nGo on!<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_said_may_be_a_word_of_the_template_or_hold_special_tokens(name):
    tokenizer = byte_level(EXPECTED[name][0])
    for said in ("user", "final", "assistant", "Hi you", "<|im_start|>user", "a<|end|>b", "<|eot|> x"):
        talk = [TALK[0], {"role": "assistant", "content": said}, {"role": "user", "content": said}, TALK[3]]
        row = encode(tokenizer, {"messages": talk}, "row 0")
        first, last = re.findall("⟦(.*?)⟧", marked(row, tokenizer), re.S)
        alike = re.findall("⟦(.*?)⟧", EXPECTED[name][1], re.S)
        assert first == alike[0].replace("Hello, dear.", said) and last == alike[1], said


def test_end_tokens_that_follow_each_other_are_trained_together():
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "<|end|><|im_end|>"))
    text = marked(encode(tokenizer, {"messages": TALK}, "row 0"), tokenizer)
    assert text == EXPECTED["chatml"][1].replace("<|im_end|>", "<|end|><|im_end|>")


def test_several_assistant_turns_and_a_system_turn():
    tokenizer = byte_level(CHATML)
    talk = [{"role": "system", "content": "Hi"}, *TALK[:2], {"role": "assistant", "content": "And?"}]
    assert marked(encode(tokenizer, {"messages": talk}, "row 0"), tokenizer) == (
        "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello, dear.<|im_end|>⟧\n<|im_start|>assistant\n⟦And?<|im_end|>⟧\n"
    )
    open_end = encode(tokenizer, {"messages": TALK[:3]}, "row 0")  # a last user turn is not trained
    assert marked(open_end, tokenizer).endswith("⟦Hello, dear.<|im_end|>⟧\n<|im_start|>user\nAnd now?<|im_end|>\n")


def test_tools_and_their_calls():
    template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ '\n' }}[{{ c.name }}]{% endfor %}"
        "{% if m.role == 'assistant' and not loop.last %} {% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(template)
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    talk = [TALK[0], call, {"role": "tool", "content": "It is."}, {"role": "assistant", "content": "Yes."}]
    row = encode(tokenizer, {"messages": talk, "tools": [{"name": "look"}]}, "row 0")
    assert marked(row, tokenizer) == (
        '<|im_start|>system\n[{"name": "look"}]<|im_end|>\n<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\n'
        "⟦\n[look] <|im_end|>⟧\n<|im_start|>tool\nIt is.<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    )


def test_prompt_and_completion_may_be_conversations():
    for template in (CHATML, with_marks("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}")):
        tokenizer = byte_level(template)
        row = encode(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]}, "row 0")
        whole = encode(byte_level(CHATML), {"messages": TALK}, "row 0")
        assert row["input_ids"] == whole["input_ids"]
        assert marked(row, tokenizer) == (
            "<|im_start|>user\nHi you<|im_end|>\n<|im_start|>assistant\nHello, dear.<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Go on!<|im_end|>⟧\n"
        )


# ------------------------------------------------------------------------------------------ the template's marks


def with_marks(around):
    """CHATML with generation marks around what `around` says of an assistant's turn."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + around + "{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    ("around", "newline"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}", ""),
        ("{%- generation -%}{{ m.content }}{%- endgeneration -%}<|im_end|>\n", ""),  # the end token left out of them
        ("{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", "\n"),  # a line break in them: as marked
    ],
)
def test_marks_give_the_tokens_that_are_found_without(around, newline):
    tokenizer = byte_level(with_marks(around))
    row, plain = encode(tokenizer, {"messages": TALK}, "row 0"), encode(byte_level(CHATML), {"messages": TALK}, "row 0")
    assert row["input_ids"] == plain["input_ids"]
    expected = EXPECTED["chatml"][1]
    assert marked(row, tokenizer) == (expected.replace("⟧\n", "\n⟧") if newline else expected)
    if not newline:
        assert row == plain


# -------------------------------------------------------------------------------------- texts and completions


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_trained_whole_with_its_end(kind):
    tokenizer = TOKENIZERS[kind]()
    row = encode(tokenizer, {"text": "Hi you."}, "row 0")
    begin = "" if kind == "bytes" else "<s>"
    assert marked(row, tokenizer).replace("> ", ">") == f"⟦{begin}Hi you.</s>⟧"
    assert row["input_ids"] == [*tokenizer("Hi you.")["input_ids"], tokenizer.eos_token_id]
    assert encode(tokenizer, {"text": "Hi you.</s>"}, "row 0") == row  # not ended twice


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "completion"), [("Hi you.", " Hello"), ("Hi you.\n", "Hello"), ("Go", " on!")])
def test_completion_alone_is_trained(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]()
    row = encode(tokenizer, {"prompt": prompt, "completion": completion}, "row 0")
    begin = [] if kind == "bytes" else [tokenizer.bos_token_id]
    before, answer = last_answer(row)
    assert before == prompt_ids(tokenizer, prompt, "prompt 0") == tokenizer(prompt)["input_ids"]
    assert before[: len(begin)] == begin and before.count(tokenizer.bos_token_id) == len(begin)
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [*begin, *whole, tokenizer.eos_token_id]
    assert [label for label in row["labels"] if label != IGNORE] == answer
    assert answer[-1] == tokenizer.eos_token_id


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_prompt():
    tokenizer = byte_level()
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    row = encode(tokenizer, {"prompt": "Hi you.", "completion": " Hello"}, "row 0")
    assert marked(row, tokenizer) == "<s>Hi you.⟦ Hello</s>⟧"  # one end token, and none in between
    assert prompt_ids(tokenizer, "Hi you.", "prompt 0") == tokenizer("Hi you.")["input_ids"][:-1]


def test_a_token_that_nothing_predicts_is_not_enough_to_train_on():
    tokenizer = byte_level(size=258)  # a byte each
    assert encode(tokenizer, {"text": "ab"}, "row 3", max_length=2)["labels"] == tokenizer("ab")["input_ids"]
    with pytest.raises(ValueError, match="row 3: no token would be trained"):
        encode(tokenizer, {"text": "ab"}, "row 3", max_length=1)


def test_a_prompt_has_the_tokens_it_has_alone_though_they_would_merge_with_what_follows():
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *"thear", "at", "eat", "th", "the", "theat", "re"])
    }
    core = Tokenizer(
        models.BPE(vocabulary, [("a", "t"), ("e", "at"), ("t", "h"), ("th", "e"), ("th", "eat"), ("r", "e")])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = finished(core)
    assert tokenizer.tokenize("the") == ["the"] and tokenizer.tokenize("theatre") == ["theat", "re"]
    row = encode(tokenizer, {"prompt": "the", "completion": "atre"}, "row 0")
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["the", "at", "re", "</s>"]
    assert marked(row, tokenizer) == "the⟦atre</s>⟧"
    assert last_answer(row)[0] == prompt_ids(tokenizer, "the", "prompt 0")


def test_metaspace_cannot_go_on_within_a_word_where_a_piece_alone_gets_a_space():
    tokenizer = metaspace()
    assert tokenizer("theatre")["input_ids"][: len(tokenizer("the")["input_ids"])] != tokenizer("the")["input_ids"]
    with pytest.raises(ValueError, match=r"row 0: the tokens of 'the' change with what follows, 'atre'; put the space"):
        encode(tokenizer, {"prompt": "the", "completion": "atre"}, "row 0")


def test_a_chat_that_merges_across_the_answers_begin():
    """'assistant:' and ' Hello' by a tokenizer that has ': ' as one piece, which the prompt does not have."""
    tokenizer = byte_level(PLAIN.replace("Assistant:{% endif", "Assistant: {% endif"))
    prompt = prompt_ids(tokenizer, TALK[:1], "prompt 0")
    row = encode(tokenizer, {"messages": TALK[:2]}, "row 0")
    assert marked(row, tokenizer) == "User: Hi you\nAssistant: ⟦Hello, dear.\n⟧"
    assert last_answer(row)[0] == prompt
    whole = tokenizer.apply_chat_template(TALK[:2], return_dict=True)["input_ids"]
    assert row["input_ids"] != whole and tokenizer.decode(row["input_ids"]) == tokenizer.decode(whole)


def test_truncation():
    tokenizer = byte_level(CHATML)
    row, where = {"messages": TALK}, "row 7"
    whole = encode(tokenizer, row, where)
    length = len(whole["input_ids"])
    assert encode(tokenizer, row, where, max_length=length) == whole
    cut = encode(tokenizer, row, where, max_length=length - 3)
    assert cut == {name: values[:-3] for name, values in whole.items()}
    with pytest.raises(ValueError, match=f"row 7: {length} tokens, the limit is {length - 1}; cut it"):
        encode(tokenizer, row, where, max_length=length - 1, truncation=False)
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORE)
    assert encode(tokenizer, row, where, max_length=first + 1)["labels"][-1] != IGNORE
    message = f"row 7: no token would be trained: what would be trained begins after max_length={first}; raise it"
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, row, where, max_length=first)
    tokenizer.model_max_length = length - 2
    assert len(encode(tokenizer, row, where)["input_ids"]) == length - 2


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"messages": TALK[:1]}, ValueError, "no token would be trained: no assistant turn, or drop the row"),
        ({"messages": []}, ValueError, "column 'messages': expected messages"),
        ({"messages": "Hi"}, ValueError, "column 'messages': expected messages"),
        ({"messages": [{"content": "Hi"}]}, ValueError, "column 'messages': expected messages"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, ValueError, "message 1: the text is empty"),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, ValueError, "message 1: no content"),
        ({"prompt": TALK[:1], "completion": "Hi"}, ValueError, "column 'completion': expected messages"),
        ({"prompt": "Hi", "completion": ""}, ValueError, "column 'completion': the text is empty"),
        ({"prompt": "Hi", "completion": None}, TypeError, "column 'completion': expected text, got None"),
        ({"text": "  "}, ValueError, "column 'text': the text is empty"),
        ({"text": 3}, TypeError, "column 'text': expected text, got 3"),
    ],
)
def test_rows_that_are_none(row, error, message):
    with pytest.raises(error, match=f"row 4.*{message}"):
        encode(byte_level(CHATML), row, "row 4")


def test_templates_that_do_not_fit():
    with pytest.raises(ValueError, match="row 2: messages, but the tokenizer has no chat template; load the tokenizer"):
        encode(byte_level(), {"messages": TALK}, "row 2")
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses the messages \(roles must alternate\)"):
        encode(byte_level(GEMMA), {"messages": TALK[1:]}, "row 2")
    thinks = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    with pytest.raises(ValueError, match=r"row 2: the template does not write turn 1 as it asks for an answer; end"):
        encode(byte_level(thinks), {"messages": TALK}, "row 2")
    hidden = CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.index0 != 1 or messages | length == 2 else 'so' }}"
    )
    with pytest.raises(ValueError, match=r"row 2: the template does not write turn 1"):
        encode(byte_level(hidden), {"messages": TALK}, "row 2")


# ------------------------------------------------------------------------------------------------- tokenize


def test_tokenize_takes_every_kind_of_table():
    tokenizer = byte_level(CHATML)
    rows = [{"messages": TALK, "note": 1}, {"messages": TALK[:2], "note": 2}]
    expected = [encode(tokenizer, row, "row") | {"attention_mask": None} for row in rows]
    for row in expected:
        row["attention_mask"] = [1] * len(row["input_ids"])
    table = datasets.Dataset.from_list(rows)
    for data in (rows, table, {"messages": [row["messages"] for row in rows]}, table.to_iterable_dataset()):
        found = ftlib.tokenize(data, tokenizer, task="causal-lm")
        assert [dict(row) for row in found] == expected
    both = ftlib.tokenize(datasets.DatasetDict(train=table, test=table.select([1])), tokenizer, task="causal-lm")
    assert [dict(row) for row in both["train"]] == expected and [dict(row) for row in both["test"]] == expected[1:]
    assert set(both["train"].column_names) == {"input_ids", "labels", "attention_mask"}


def test_tokenize_reads_the_first_form_that_is_there():
    tokenizer = byte_level(CHATML)
    row = {"text": "the text", "prompt": "Hi", "completion": " you", "messages": TALK, "other": "And now?"}
    forms = (
        ("", {"messages": TALK}),
        ("messages", {"prompt": "Hi", "completion": " you"}),
        ("prompt", {"text": "the text"}),
    )
    for lost, form in forms:
        row.pop(lost, None)
        (found,) = ftlib.tokenize([row], tokenizer, task="causal-lm")
        assert found["labels"] == encode(tokenizer, form, "row 0")["labels"]
    (found,) = ftlib.tokenize([row], tokenizer, task="causal-lm", text="other")
    assert found["labels"] == encode(tokenizer, {"text": "And now?"}, "row 0")["labels"]


def test_tokenize_names_the_row():
    tokenizer = byte_level(CHATML)
    rows = [{"messages": TALK}] * 3 + [{"messages": TALK[:1]}]
    with pytest.raises(ValueError, match="row 3: no token would be trained: no assistant turn, or drop the row"):
        ftlib.tokenize(rows, tokenizer, task="causal-lm")
    with pytest.raises(ValueError, match="split 'test': row 3: no token"):
        ftlib.tokenize({"train": rows[:2], "test": rows}, tokenizer, task="causal-lm")
    with pytest.raises(ValueError, match=r"row 0: .* begins after max_length=8"):
        ftlib.tokenize(rows[:3], tokenizer, task="causal-lm", max_length=8)


def test_messages_of_unlike_keys_in_arrow():
    """Arrow gives every message all keys, None where it has none: templates see none of these."""
    tokenizer = byte_level(CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' ' + m.name if m.name is defined }}"))
    talk = [{"role": "user", "content": "Hi you", "name": "Ann"}, TALK[1]]
    (found,) = ftlib.tokenize(datasets.Dataset.from_list([{"messages": talk}]), tokenizer, task="causal-lm")
    assert (
        marked(found, tokenizer)
        == "<|im_start|>user Ann\nHi you<|im_end|>\n<|im_start|>assistant\n⟦Hello, dear.<|im_end|>⟧\n"
    )


# --------------------------------------------------------------------------------------------- TRL's rows


def by_trl(rows, tokenizer, template=None):
    """What SFTTrainer makes of rows, without a model; template: one with marks, for what the assistant says alone."""
    import trl

    options = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=template is not None, max_length=None,
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss="prompt" in rows[0])
    data = datasets.Dataset.from_list(rows)
    made = trl.SFTTrainer._prepare_dataset(trainer, data, tokenizer, options, False, None, "train")
    return [{name: row[name] for name in ("input_ids", "labels")} for row in made]


@pytest.mark.parametrize("kind", ["bytes", "bytes with bos"])
def test_trl_twin_of_texts_and_completions(kind):
    tokenizer = TOKENIZERS[kind](CHATML)
    for rows in (
        [{"text": "Hi you."}, {"text": "Go on!</s>"}],
        [{"prompt": "Hi you.", "completion": " Hello, dear."}, {"prompt": "And now?\n", "completion": "Go on!"}],
    ):
        assert [encode(tokenizer, row, "row") for row in rows] == by_trl(rows, tokenizer)


def test_trl_twin_of_conversations_with_marks():
    template = with_marks("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}")
    tokenizer = byte_level(template)
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    expected = by_trl(rows, tokenizer, template)
    assert [encode(tokenizer, row, "row") for row in rows] == expected
    assert [encode(byte_level(CHATML), row, "row") for row in rows] == expected  # found without marks as well
    rows = [{"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": TALK[:1], "completion": TALK[1:2]}]
    assert [encode(tokenizer, row, "row") for row in rows] == by_trl(rows, tokenizer, template)


def templates_of_trl():
    import trl

    return Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize(
    "name", ["cohere", "cohere2", "gemma", "llama3", "phi3", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl"]
)
def test_trl_twin_of_real_templates(name):
    """A model's own template gives what TRL's copy of it with marks gives; the marks' line breaks aside."""
    folder = templates_of_trl()
    plain, training = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    found = [*SPECIAL, *re.findall(r"<\|\w+\|>|<start_of_turn>|<end_of_turn>", plain)]
    tokenizer = byte_level(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(found))})
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    for row, theirs in zip(rows, by_trl(rows, tokenizer, training), strict=True):
        own = encode(tokenizer, row, "row 0")
        assert own["input_ids"] == theirs["input_ids"]
        text = marked(theirs, tokenizer)
        assert marked(own, tokenizer) == re.sub(r"(\n(?:</s>)?)⟧", r"⟧\1", text).replace("⟦\n", "\n⟦")
        tokenizer.chat_template = training
        assert encode(tokenizer, row, "row 0") == theirs  # and with their marks just that
        tokenizer.chat_template = plain


# ------------------------------------------------------------------------------------------ loss and the rest


def test_loss_and_items_are_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(
        [[1, 2, 3, -100, 4, 5, 6], [-100, -100, 7, 8, -100, -100, -100], [9, -100, -100, -100, 1, 2, -100]]
    )
    items = language_modeling.items(labels)
    assert int(items) == 5 + 2 + 2  # the first of a row is not predicted
    ours = language_modeling.cross_entropy(logits, labels)
    torch.testing.assert_close(ours / items, ForCausalLMLoss(logits, labels, 11), atol=1e-6, rtol=1e-6)


def test_check_tokens():
    check = language_modeling.check_tokens
    assert check([-100, 5, -100], 6, 3, "row 0") == [-100, 5, -100]
    with pytest.raises(ValueError, match=r"row 1: no token is trained"):
        check([5, -100, -100], 6, 3, "row 1")
    with pytest.raises(ValueError, match="row 1"):
        check([-100, 6, -100], 6, 3, "row 1")


def test_last_answer_of_several_and_of_a_text():
    assert last_answer({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]}) == ([1, 2, 3], [4, 5])
    assert last_answer({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, -100]}) == ([1], [2, 3])
    assert last_answer({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}) == ([1], [2, 3])  # what nothing stands before


def test_tokens_a_byte_by_hand():
    tokenizer = byte_level(size=258)  # a byte each
    row = encode(tokenizer, {"prompt": "Hi", "completion": "né"}, "row 0")
    # three bytes, and the end token
    assert language_modeling.tokens_a_byte(tokenizer, [row["labels"][1:]]) == (3 + 1) / 3
    rows = [row, encode(tokenizer, {"text": "abc"}, "row 1")]
    assert language_modeling.tokens_a_byte(tokenizer, [row["labels"][1:] for row in rows]) == (4 + 3) / 5


def test_end_ids():
    tokenizer = SimpleNamespace(eos_token_id=3)
    for named, expected in ((None, [3]), (2, [2, 3]), ([7, 3], [3, 7])):
        assert language_modeling.end_ids(tokenizer, SimpleNamespace(eos_token_id=named)) == expected
    assert language_modeling.end_ids(SimpleNamespace(), None) == []
