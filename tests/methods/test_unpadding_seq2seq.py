"""Unpadded encoders with a decoder give the stock ones' numbers: losses, logits, gradients, row by row, answers."""

import copy
from itertools import pairwise

import pytest
import test_unpadding as encoders
import torch
import transformers
from test_unpadding import assert_gradients_equal
from text_to_text import TOKENIZER, batch, talkative, tiny
from torch.testing import assert_close

import ftlib
from ftlib.methods import packing as packing_module
from ftlib.methods import speedups, unpadding
from ftlib.methods.token_losses import in_chunks
from ftlib.methods.unpadding import is_unpadded, repad, unpad

RELATIVE = ["t5", "t5, own head", "mt5", "umt5"]
KINDS = ["bart", "marian", "mbart", "pegasus", "plbart", *RELATIVE]


def twins(name, **options):
    relative = {"large": False} if name in RELATIVE else {}  # T5's embeddings and scores are large as they are drawn
    stock = tiny(name, **relative | options)
    return stock, unpad(copy.deepcopy(stock))


@pytest.fixture
def packed(monkeypatch):
    """The tokens that attention was given at once, (queries, keys), each time."""
    sizes, attend = [], unpadding.attend_packed

    def counted(query, key, *args, **options):
        sizes.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **options)

    monkeypatch.setattr(unpadding, "attend_packed", counted)
    monkeypatch.setattr(packing_module, "attend_packed", counted)
    return sizes


def both(model, given):
    output = model(**given, use_cache=False)
    output.loss.backward()
    return output


@pytest.mark.parametrize("name", KINDS)
def test_losses_logits_and_gradients_are_the_stock_models(name, packed):
    (stock, ours), given = twins(name), batch()
    theirs, mine = both(stock, given), both(ours, given)
    # sources of 9, 5 and 7 tokens; targets of 5 (the start, and 4 labels), 6 and 6
    assert packed == [(21, 21)] * 2 + [(17, 17), (17, 21)] * 2
    assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    real = given["labels"] != -100
    assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=0)
    seen = given["attention_mask"].bool()
    assert_close(mine.encoder_last_hidden_state[seen], theirs.encoder_last_hidden_state[seen], atol=1e-5, rtol=0)
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_gives_what_it_gives_alone(name):
    (stock, ours), given = twins(name), batch()
    with torch.no_grad():
        together = ours(**given, use_cache=False).logits
        for row in range(3):
            tokens, labels = int(given["attention_mask"][row].sum()), given["labels"][row]
            wanted = int((labels != -100).nonzero().max()) + 1
            alone = stock(input_ids=given["input_ids"][row : row + 1, :tokens], labels=labels[None, :wanted]).logits
            assert_close(together[row, :wanted], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bart", "pegasus", "t5", "t5, own head"])
def test_the_loss_in_chunks(name, packed):
    (stock, ours), given = twins(name), batch()
    theirs = stock(**given).loss
    with in_chunks(ours):
        packed.clear()  # of the comparison
        mine = ours(**given).loss
    assert_close(mine / (given["labels"] != -100).sum(), theirs, atol=1e-5, rtol=0)
    assert len(packed) == 6  # with each layer once, chunks or not


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]],
    "none": None,
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["bart", "marian", "t5", "umt5"])
def test_other_masks(name, masks):
    (stock, ours), given = twins(name), batch()
    given["input_ids"] = given["input_ids"][:, :6].clamp(min=4)
    given["attention_mask"] = MASKS[masks] and torch.tensor(MASKS[masks])
    theirs, mine = both(stock, given), both(ours, given)
    real = given["labels"] != -100
    assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=0)
    assert_gradients_equal(ours, stock)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_mask_of_the_target_and_vectors_for_ids(name):
    (stock, ours), given = twins(name), batch()
    given |= {"decoder_input_ids": torch.randint(4, 264, (3, 6)), "decoder_attention_mask": torch.ones(3, 6).long()}
    given["decoder_attention_mask"][0, 4:] = 0
    theirs, mine = stock(**given, use_cache=False), ours(**given, use_cache=False)
    seen = given["decoder_attention_mask"].bool()
    assert_close(mine.logits[seen], theirs.logits[seen], atol=1e-5, rtol=0)
    words = stock.get_input_embeddings()
    for name in ("input", "decoder_input"):
        given[f"{name}s_embeds"] = words(given.pop(f"{name}_ids"))
    assert_close(ours(**given, use_cache=False).logits[seen], theirs.logits[seen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_all_that_the_model_returns_is_put_back(name):
    (stock, ours), given = twins(name), batch()
    options = dict(output_hidden_states=True, use_cache=False)
    theirs, mine = stock(**given, **options), ours(**given, **options)
    for side, mask in (("decoder_hidden_states", given["labels"] != -100), ("encoder_hidden_states", None)):
        mask = given["attention_mask"].bool() if mask is None else mask
        assert len(mine[side]) == 3
        for a, b in zip(mine[side], theirs[side], strict=True):
            assert_close(a[mask], b[mask], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"an unpadded {name} keeps no attention weights"):
        ours(**given, output_attentions=True)
    if name == "t5":
        return
    plain = ours.model(**{k: v for k, v in given.items() if k != "labels"}, decoder_input_ids=given["input_ids"],
                       use_cache=False, return_dict=False)  # fmt: skip
    assert isinstance(plain, tuple) and plain[0].shape == plain[1].shape == (3, 9, 16)


@pytest.mark.parametrize(
    "more", [{"use_cache": True}, {"attention_mask": torch.ones(3, 1, 1, 9).bool()}, {"encoder_outputs": True}]
)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_what_runs_as_it_came(name, more, packed):
    (stock, ours), given = twins(name), batch()
    given = {name: value for name, value in given.items() if name != "labels"} | {"decoder_input_ids": torch.ones(3, 4)}
    given["decoder_input_ids"] = given["decoder_input_ids"].long() * 5
    if "encoder_outputs" in more:
        more = {"encoder_outputs": stock.get_encoder()(given.pop("input_ids"), given["attention_mask"])}
    given |= more
    assert_close(ours(**given).logits, stock(**given).logits, atol=1e-5, rtol=0)
    # T5's stacks pack each for itself: with a cache the encoder, with an encoder's output the decoder
    sides = {"use_cache": 2, "encoder_outputs": 4}.get(*more, 0) if name == "t5" else 0
    assert len(packed) == sides


@pytest.mark.parametrize("name", ["bart", "marian", "t5", "umt5"])
def test_an_unpadded_model_writes_the_same(name):
    model, sources = talkative(name), ["a", "a long source, this one", "no", "x" * 30]
    wanted = ftlib.generate(model, sources, tokenizer=TOKENIZER, max_new_tokens=8, tokens=True)
    assert ftlib.generate(unpad(model), sources, tokenizer=TOKENIZER, max_new_tokens=8, tokens=True) == wanted
    assert is_unpadded(model) and not is_unpadded(repad(model))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_repad_gives_the_stock_model_back(name, packed):
    (stock, ours), given = twins(name), batch()
    assert is_unpadded(ours) and is_unpadded(copy.deepcopy(ours)) and unpad(ours) is ours
    repad(ours)
    assert not any("forward" in vars(module) for module in ours.modules()) and not is_unpadded(ours)
    assert ours.config._attn_implementation == stock.config._attn_implementation
    assert torch.equal(ours(**given).logits, stock(**given).logits) and not packed


def test_an_error_half_way_leaves_no_positions_behind():
    (stock, ours), given = twins("bart"), batch()
    with pytest.raises(IndexError):
        ours(**given | {"labels": given["labels"].masked_fill(given["labels"] == 1, 999)}, use_cache=False)
    assert "forward" not in vars(ours.model.decoder.embed_positions)
    assert_close(ours(**given, use_cache=False).loss, stock(**given).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bart", "t5", "umt5"])
def test_with_gradient_checkpointing_and_dropout_left_out(name):
    (stock, ours), given = twins(name), batch()
    both(stock, given)
    ours.train().gradient_checkpointing_enable()
    both(ours, given)
    assert_gradients_equal(ours, stock)


def test_when_computed_by_the_packed_kernel(monkeypatch):
    """What a GPU in half precision does, on the CPU: queries and keys of other lengths."""
    import torch.nn.attention.varlen as module

    calls = []

    def by_loop(query, key, value, ends, key_ends, longest, key_longest, *, scale, window_size, **options):
        calls.append((ends.tolist(), key_ends.tolist(), longest, key_longest, window_size))
        out = []
        for (a, b), (c, d) in zip(pairwise(ends), pairwise(key_ends), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
            causal = window_size == (-1, 0)
            one = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
            out.append(one[0].transpose(0, 1))
        return torch.cat(out)

    by_loop.__kwdefaults__ = {**module.varlen_attn.__kwdefaults__, "scale": None, "window_size": (-1, -1)}
    monkeypatch.setattr(module, "varlen_attn", by_loop)
    monkeypatch.setattr(packing_module, "can_varlen", lambda q, packing, p: True)
    monkeypatch.setattr(speedups, "computed_in", lambda x: None)
    (stock, ours), given = twins("bart"), batch()
    theirs, mine = both(stock, given), both(ours, given)
    source, target = [0, 9, 14, 21], [0, 5, 11, 17]
    inside = [(source, source, 9, 9, (-1, -1))]
    across = [(target, target, 6, 6, (-1, 0)), (target, source, 6, 9, (-1, -1))]
    assert calls == inside * 2 + across * 2
    assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    assert_gradients_equal(ours, stock)


@encoders.needs_gpu
def test_on_the_gpu_in_half_precision():
    stock, ours = (model.cuda() for model in twins("bart", d_model=64, large=False))
    given = {name: value.cuda() for name, value in batch().items()}
    theirs = stock(**given, use_cache=False).logits
    with torch.autocast("cuda", torch.bfloat16):
        mine = ours(**given, use_cache=False).logits
    real = given["labels"] != -100
    assert (mine.float() - theirs)[real].norm() < 0.02 * theirs[real].norm()


@pytest.mark.parametrize("length", [20, 150])
def test_far_tokens_share_a_bias(length):
    """Rows whose distances share buckets, some longer than those that are padded to a multiple of 8."""
    (stock, ours), draw = twins("t5"), torch.Generator().manual_seed(2)
    mask = (torch.arange(length) < torch.tensor([[length], [length - 7], [3]])).long()
    given = batch() | {"input_ids": torch.randint(4, 264, (3, length), generator=draw) * mask, "attention_mask": mask}
    theirs, mine = both(stock, given), both(ours, given)
    assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    assert_gradients_equal(ours, stock)
    biased = ours.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
    assert (biased.abs().amax(1) > 0).sum() > 16  # buckets


def test_the_encoder_alone_and_dropout(monkeypatch):
    config = tiny("t5", dropout_rate=0.5).config
    stock = transformers.T5EncoderModel(config).eval()
    ours, given = unpad(copy.deepcopy(stock)), batch()
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    seen = given["attention_mask"].bool()
    assert_close(ours(**given)[0][seen], stock(**given)[0][seen], atol=1e-5, rtol=0)
    assert not ours(**given)[0][~seen].any()
    asked = []
    monkeypatch.setattr(speedups, "keep_mask", lambda like, p: asked.append(p) or torch.ones_like(like))
    ours.train()(**given)
    assert asked == [0.5, 0.5]  # of the weights of attention, in each layer


def test_what_t5_needs_of_transformers_is_said(monkeypatch):
    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "_supports_sdpa", False)
    with pytest.raises(ValueError, match=r"model type 't5' \(this Transformers gives .*upgrade it\)"):
        unpad(tiny("t5"))
    with pytest.raises(ValueError, match="no t5 as a decoder"):
        unpad(tiny("t5").decoder)


def test_other_decoders_with_cross_attention_are_refused():
    with pytest.raises(ValueError, match="can't handle model type 'm2m_100'"):
        unpad(tiny("m2m_100"))
    alone = transformers.BartForCausalLM(tiny("bart").config)
    with pytest.raises(ValueError, match="no bart as a decoder"):
        unpad(alone)
