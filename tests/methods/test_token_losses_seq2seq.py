"""The loss of encoder-decoder models in chunks, and its gradients, against the stock models' own."""

import pytest
import torch
import torch.nn.functional as F
from test_token_losses import assert_same, close, gradients, ours, rows  # noqa: F401
from text_to_text import KINDS, batch, tiny

from ftlib.methods.token_losses import decoder_ids, in_chunks, label_log_probs


def stock(model, given):
    """The summed loss and its gradients as Transformers has them: a mean over labels, times these."""
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss * (given["labels"] != -100).sum()
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_transformers(name, rows):  # noqa: F811
    model, given = tiny(name), batch()
    assert_same(ours(model, given), stock(model, given))


def test_a_bias_and_a_scale_of_the_head_count():
    """Marian's and BART's final_logits_bias; T5 scales what a tied head gets: the fixtures would not hide a loss."""
    given = batch()
    for name, change in (("marian", "bias"), ("t5", "scale")):
        model = tiny(name)
        before = ours(model, given)[0]
        if change == "bias":
            model.final_logits_bias.zero_()
        else:
            model.config.scale_decoder_outputs = False
        assert abs(ours(model, given)[0] - before) > 0.1


def test_label_smoothing_is_pytorchs(rows):  # noqa: F811
    model, given = tiny("bart"), batch()
    logits = model(**given).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits, given["labels"].flatten(), label_smoothing=0.1, reduction="sum")
    close(ours(model, given, label_smoothing=0.1)[0], wanted.detach())


@pytest.mark.parametrize("name", KINDS)
def test_the_decoder_reads_what_transformers_collator_gives_it(name):
    model, labels = tiny(name), batch()["labels"]
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        wanted = model.prepare_decoder_input_ids_from_labels(labels)
    else:
        wanted = F.pad(labels[:, :-1], (1, 0), value=2).masked_fill(F.pad(labels[:, :-1], (1, 0)) == -100, 0)
    assert torch.equal(decoder_ids(model, labels), wanted)


def test_the_start_token_is_the_models_own_and_needed():
    given = batch()
    one, other = (tiny("bart", decoder_start_token_id=start) for start in (2, 5))
    assert abs(ours(one, given)[0] - ours(other, given)[0]) > 0.1
    for name in ("t5", "bart", "m2m_100"):
        model = tiny(name)
        model.config.decoder_start_token_id = None
        with pytest.raises(ValueError, match=rf"{name}: model.config has .*'decoder_start_token_id': None.*set both"):
            ours(model, given)


def test_a_model_with_another_loss_is_refused_by_name():
    model = tiny("bart")
    forward = type(model).forward
    kind = type("Odd", (type(model),), {"forward": lambda self, *a, **k: _doubled(forward(self, *a, **k))})
    model.__class__ = kind
    with pytest.raises(ValueError, match="bart: its own loss of 8 tokens is"), in_chunks(model):
        pass


def _doubled(output):
    output.loss = output.loss and output.loss * 2
    return output


def test_log_probabilities_of_labels(rows):  # noqa: F811
    model, given = tiny("t5"), batch()
    found = label_log_probs(model, given)
    logits, labels = model(**given).logits.log_softmax(-1), given["labels"]
    wanted = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    close(found.detach(), wanted.detach())
