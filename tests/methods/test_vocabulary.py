"""Words that are added to a model, and a head on masked tokens for an encoder without one."""

import copy

import pytest
import torch
import transformers
from conftest import tiny_config
from tokenizers import AddedToken

import ftlib
from ftlib.engine.prediction import evaluate

HEADS = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "distilbert": "DistilBertForMaskedLM"}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def masked_model(kind="bert", **options):
    torch.manual_seed(0)
    model = getattr(transformers, HEADS[kind])(tiny_config(kind, **{"vocab_size": 31} | options)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_row_is_the_mean_of_its_pieces_and_the_head_stays_tied(kind, tokenizer, tmp_path):
    model = masked_model(kind)
    layers = model.get_input_embeddings().weight, model.get_output_embeddings().bias
    table, bias = (part.detach().clone() for part in layers)
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("unfun", "films")]
    assert list(map(len, pieces)) == [2, 2]
    assert ftlib.add_tokens(model, tokenizer, ["unfun", AddedToken("films", single_word=True)]) == [31, 32]
    assert tokenizer("unfun films", add_special_tokens=False)["input_ids"] == [31, 32]
    out = model.get_output_embeddings()
    assert out.weight is model.get_input_embeddings().weight and out.weight.shape == (33, 16)
    assert torch.equal(out.weight[:31], table) and torch.equal(out.bias[:31], bias)
    for row, own in zip((31, 32), pieces, strict=True):
        assert torch.allclose(out.weight[row], table[own].mean(0)) and torch.allclose(out.bias[row], bias[own].mean())
    assert model.config.vocab_size == 33
    rows = ftlib.tokenize([{"text": "the unfun films is good"}], tokenizer, task="masked-lm", mask_probability=0.9)
    before = evaluate(model, rows)
    ftlib.save(model, tmp_path / "m", tokenizer)
    again = ftlib.load(tmp_path / "m")
    assert evaluate(again, rows) == before
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert ftlib.load_tokenizer(tmp_path / "m")("unfun")["input_ids"] == [2, 31, 3]
    ids = torch.tensor([[2, 31, 3]])
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad[31].any()


def test_an_untied_head_gets_means_of_its_own_and_spare_rows_are_used(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, tie_word_embeddings=False, pad_token_id=0)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    table, out = model.get_input_embeddings().weight.clone(), model.lm_head.weight.clone()
    (number,) = ftlib.add_tokens(model, tokenizer, ["unfun"])
    own = [28, 29]
    assert torch.allclose(model.get_input_embeddings().weight[number], table[own].mean(0))
    assert torch.allclose(model.lm_head.weight[number], out[own].mean(0)) and model.lm_head.weight.shape == (32, 8)
    spare = masked_model(vocab_size=64)  # a table with rows to spare stays as large
    ftlib.add_tokens(spare, tokenizer, ["films"])
    assert spare.get_input_embeddings().weight.shape == (64, 16)
    assert torch.allclose(spare.get_input_embeddings().weight[32], spare.get_input_embeddings().weight[[7, 26]].mean(0))


@pytest.mark.parametrize(
    "tokens, said",
    [
        (["unfun", "film"], "token 1, 'film': is in the vocabulary already"),
        (["unfun", "unfun"], "token 1, 'unfun': was given twice"),
        ([" "], "token 0, ' ': is no word"),
        ([3], "token 0, 3: is no word"),
    ],
)
def test_words_that_are_refused_leave_all_as_it_was(tokenizer, tokens, said):
    model = masked_model()
    with pytest.raises(ValueError, match=said):
        ftlib.add_tokens(model, tokenizer, tokens)
    assert len(tokenizer) == 31 == len(model.get_input_embeddings().weight)


def test_a_tuned_model_is_refused(tokenizer):
    model = masked_model()
    ftlib.tune(model, "lora", rank=2)
    with pytest.raises(ValueError, match=r"add tokens before ftlib\.tune"):
        ftlib.add_tokens(model, tokenizer, ["unfun"])


# -------------------------------------------------------------------------------------------------------- a head


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_starts_with_the_encoders_embeddings_and_the_frequencies(kind, tiny_tokenizer, tiny_model):
    """Its logits: the hidden state, at mean 0 and variance 1, times the embeddings, and log of the tokens' shares."""
    encoder = tiny_model("encoder", model_type=kind)
    table = encoder.get_input_embeddings().weight
    rows = ftlib.tokenize([{"text": "the film is good"}, {"text": "the plot"}], tiny_tokenizer, task="masked-lm")
    model = ftlib.masked_head(encoder, rows)
    assert type(model).__name__ == HEADS[kind] and model.get_output_embeddings().weight is not None
    assert torch.equal(model.get_output_embeddings().weight, table)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        hidden = encoder(ids).last_hidden_state
        found = model(ids).logits
    counts = torch.ones(64)
    for token in (5, 7, 8, 9, 5, 24):
        counts[token] += 1
    wanted = torch.nn.functional.layer_norm(hidden, (16,), eps=1e-12) @ table.T + (counts / counts.sum()).log()
    assert torch.allclose(found, wanted, atol=0.1)  # the activation bends a little
    assert (found - wanted).std() < 0.02 * found.std()


def test_a_head_saves_as_a_plain_model_and_beats_a_new_one(tiny_tokenizer, tiny_model, tmp_path):
    rows = ftlib.tokenize([{"text": "the film is good"}] * 20, tiny_tokenizer, task="masked-lm")
    model = ftlib.masked_head(tiny_model("encoder"), rows)
    found = evaluate(model, rows)
    assert found["loss"] < evaluate(masked_model(vocab_size=64), rows)["loss"] - 1
    ftlib.save(model, tmp_path / "m", tiny_tokenizer)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "m")
    assert evaluate(again, rows) == found == evaluate(ftlib.load_model(tmp_path / "m", task="masked-lm"), rows)


def test_where_no_head_is_made(tiny_tokenizer, tiny_model):
    rows = ftlib.tokenize([{"text": "the film is good"}], tiny_tokenizer, task="masked-lm")
    for model, data, said in (
        (tiny_model("encoder"), [], "rows hold no tokens"),
        (tiny_model(), rows, "BertForSequenceClassification has a head; load the encoder alone"),
        (tiny_model("encoder", model_type="albert"), rows, "the head of albert makes hidden vectors of 16 .* of 8"),
    ):
        with pytest.raises(ValueError, match=said):
            ftlib.masked_head(model, data)
