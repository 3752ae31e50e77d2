"""Logit lens and activation patching against the model's own hidden states; shuffled weights."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_model

import ftlib
from ftlib.methods.patching import activation_patching, logit_lens, shuffled

CLEAN, CORRUPTED = {"input_ids": [5, 6, 7, 8]}, {"input_ids": [5, 9, 7, 8]}


def decoder(kind="llama", **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, initializer_range=0.3, max_position_embeddings=40, **options)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("unpadded", [False, True])
def test_logit_lens_is_the_head_on_every_hidden_state(unpadded):
    model = decoder()
    with torch.no_grad():
        output = model(torch.tensor([CLEAN["input_ids"]]), output_hidden_states=True)
        expected = [model.lm_head(model.model.norm(hidden[0])) for hidden in output.hidden_states[1:-1]]
    found = logit_lens(ftlib.unpad(model) if unpadded else model, CLEAN)
    torch.testing.assert_close(found, torch.stack([*expected, output.logits[0]]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[-1], atol=0.1)


def test_logit_lens_keeps_what_a_head_does_beside_its_product():
    """Gemma 2 caps its logits."""
    model = decoder("gemma2", num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0)
    found = logit_lens(model, CLEAN)
    assert found.abs().max() <= 0.5
    torch.testing.assert_close(found[-1], model(torch.tensor([CLEAN["input_ids"]])).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unpadded", [False, True])
def test_patching_is_as_by_hand(unpadded):
    model = decoder()
    model = ftlib.unpad(model) if unpadded else model
    found = activation_patching(model, CLEAN, CORRUPTED, (-1, 11), batch_size=3)
    assert found.shape == (4, 4) and found.dtype == np.float32
    with torch.no_grad():
        clean, corrupted = (model(torch.tensor([row["input_ids"]])).logits[0, -1, 11] for row in (CLEAN, CORRUPTED))
    np.testing.assert_allclose(found[0], [0, 1, 0, 0], atol=1e-5)  # the token itself put back
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-5)  # what comes before the difference is the same in both
    np.testing.assert_allclose(found[-1], [0, 0, 0, 1], atol=1e-5)  # the head reads the last place alone
    ftlib.repad(model)
    states = []
    with torch.no_grad(), model.model.layers[0].register_forward_hook(lambda module, args, out: states.append(out)):
        model(torch.tensor([CLEAN["input_ids"]]))

    def put(module, args, output):
        output = output.clone()
        output[:, 2] = states[0][:, 2]
        return output

    with torch.no_grad(), model.model.layers[0].register_forward_hook(put):
        patched = model(torch.tensor([CORRUPTED["input_ids"]])).logits[0, -1, 11]
    assert found[1, 2] == pytest.approx(float((patched - corrupted) / (clean - corrupted)), abs=1e-4)


def test_patching_an_encoder_by_the_class_predicted_of_the_clean_row():
    model = make_tiny_model(num_labels=3, initializer_range=0.4)
    predicted = int(ftlib.predict(model, [CLEAN])[0])
    found = activation_patching(model, CLEAN, CORRUPTED, None)
    np.testing.assert_allclose(found, activation_patching(model, CLEAN, CORRUPTED, predicted), atol=1e-5)
    np.testing.assert_allclose(found[-1], [1, 0, 0, 0], atol=1e-5)  # the pooler reads the first


def test_rows_that_do_not_go_together_are_refused():
    model = decoder()
    with pytest.raises(ValueError, match="the clean row has 4 tokens, the other 2; make them equal"):
        activation_patching(model, CLEAN, {"input_ids": [5, 6]}, (-1, 11))
    with pytest.raises(ValueError, match="of both rows; there is nothing to bring back"):
        activation_patching(model, CLEAN, CLEAN, (-1, 11))
    with pytest.raises(ValueError, match="row 0: target=None; causal-lm needs"):
        activation_patching(model, CLEAN, CORRUPTED, None)


def test_shuffled_permutes_the_named_weights_of_a_copy():
    model = make_tiny_model()
    other = shuffled(model, ["bert.encoder.layer.1", "classifier"], seed=1)
    again = shuffled(model, ["bert.encoder.layer.1", "classifier"], seed=1)
    changed = set()
    for (name, a), b, c in zip(model.named_parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values) and torch.equal(b, c)
        changed |= {name} if not torch.equal(a, b) else set()
    assert {name for name in changed if not name.startswith(("bert.encoder.layer.1.", "classifier."))} == set()
    assert {"bert.encoder.layer.1.output.dense.weight", "classifier.weight"} <= changed
    with pytest.raises(ValueError, match="parts: no weight's name begins with 'head'"):
        shuffled(model, ["classifier", "head"])


def test_shuffled_copies_of_unpadded_models_run_alone():
    model = ftlib.unpad(make_tiny_model())
    before = model(torch.tensor([[5, 6]])).logits
    other = shuffled(model, ["bert"])
    assert not torch.allclose(other(torch.tensor([[5, 6]])).logits, before)
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, before)
