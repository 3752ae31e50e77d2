"""Attributions against captum, by hand, and on every kind of model."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_tiny_model

import ftlib
from ftlib.methods.interpretation import METHODS, attribute, faithfulness

ROWS = [{"input_ids": [2, 5, 6, 7, 8, 3]}, {"input_ids": [2, 9, 10, 3]}]


@pytest.fixture
def model():
    """With large weights, so that what tokens count is far from rounding."""
    return make_tiny_model(num_labels=3, initializer_range=0.4)


def twin(model, row, target):
    """captum's view of a row: (embeddings -> logit of the target, embeddings (1, tokens, hidden))."""
    x = model.get_input_embeddings()(torch.tensor([row["input_ids"]])).detach()
    return lambda vectors: model(inputs_embeds=vectors).logits[:, target], x


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), theirs.detach().float(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- against captum


def test_gradient_x_input_is_captums(model):
    from captum.attr import InputXGradient

    for row, ours in zip(ROWS, attribute(model, ROWS, "gradient-x-input", target=2), strict=True):
        f, x = twin(model, row, 2)
        close(ours, InputXGradient(f).attribute(x.requires_grad_()).sum(-1)[0])


def test_smoothgrad_is_captums_with_the_same_noise(model):
    from captum.attr import NoiseTunnel, Saliency

    (ours,) = attribute(model, ROWS[:1], "smoothgrad", target=1, samples=7, noise=0.2, seed=3, batch_size=3)
    f, x = twin(model, ROWS[0], 1)
    torch.manual_seed(3)
    deviation = 0.2 * float(x.max() - x.min())
    theirs = NoiseTunnel(Saliency(f)).attribute(x.requires_grad_(), nt_samples=7, stdevs=deviation, abs=False)
    close(ours, (theirs * x).sum(-1)[0])


@pytest.mark.parametrize("baseline", [None, 4])
def test_integrated_gradients_are_captums(model, baseline):
    from captum.attr import IntegratedGradients

    options = dict(target=0, baseline=baseline, steps=20)
    for row, ours in zip(ROWS, attribute(model, ROWS, "integrated-gradients", **options), strict=True):
        f, x = twin(model, row, 0)
        empty = torch.zeros_like(x)
        if baseline is not None:
            empty += model.get_input_embeddings().weight[baseline].detach()
        close(ours, IntegratedGradients(f).attribute(x, empty, n_steps=20, method="gausslegendre").sum(-1)[0])


@pytest.mark.parametrize("layer", [1, 2, -1])
def test_layer_conductance_is_captums_from_both_ends(model, layer):
    """captum takes the gradient at the beginning of every step; the trapezoidal rule also at its end."""
    from captum.attr import LayerConductance

    (ours,) = attribute(model, ROWS[:1], "layer-conductance", target=2, layer=layer, steps=40)
    f, x = twin(model, ROWS[0], 2)
    there = LayerConductance(f, model.bert.encoder.layer[layer - 1 if layer > 0 else layer])
    how = dict(n_steps=40, method="riemann_trapezoid")
    theirs = (there.attribute(x, x * 0, **how) - there.attribute(x * 0, x, **how)) / 2
    close(ours, theirs.sum(-1)[0])


def test_occlusion_is_captums(model):
    from captum.attr import Occlusion

    (ours,) = attribute(model, ROWS[:1], "occlusion", target=1, batch_size=4)
    f, x = twin(model, ROWS[0], 1)
    close(ours, Occlusion(f).attribute(x, sliding_window_shapes=(1, x.shape[-1]), baselines=0)[0, :, 0])


def test_shapley_is_captums_with_the_same_orders_and_whole_words(model):
    from captum.attr import ShapleyValueSampling

    f, x = twin(model, ROWS[0], 1)
    words = torch.arange(6)
    (ours,) = attribute(model, ROWS[:1], "shapley", target=1, samples=4, seed=5, batch_size=5)
    torch.manual_seed(5)
    theirs = ShapleyValueSampling(f).attribute(x, x * 0, feature_mask=words[None, :, None], n_samples=4)
    close(ours, theirs[0, :, 0])


def test_occlusion_and_shapley_of_whole_words_are_captums():
    """Pieces of a word are one feature, and what it counts is shared by its pieces; special tokens stay."""
    from captum.attr import FeatureAblation, ShapleyValueSampling

    model, encoding = wordy()
    f, x = twin(model, {"input_ids": encoding["input_ids"][0]}, 1)
    empty = torch.zeros_like(x)
    empty[:, [0, -1]] = x[:, [0, -1]]
    mask = torch.tensor([4, 0, 1, 1, 2, 3, 3, 3, 5])  # the special tokens' features change nothing
    size = torch.tensor([1, 1, 2, 2, 1, 3, 3, 3, 1])
    (ours,) = attribute(model, encoding, "occlusion", target=1, whole_words=True)
    close(ours, FeatureAblation(f).attribute(x, empty, feature_mask=mask[None, :, None])[0, :, 0] / size)
    (ours,) = attribute(model, encoding, "shapley", target=1, whole_words=True, samples=3, seed=2)
    generator, total = torch.Generator().manual_seed(2), torch.zeros(9)
    sampling = ShapleyValueSampling(f)
    orders = [[*torch.randperm(4, generator=generator).tolist(), 4, 5] for _ in range(3)]
    sampling.permutation_generator = lambda features, samples: orders
    total = sampling.attribute(x, empty, feature_mask=mask[None, :, None], n_samples=3)[0, :, 0]
    close(ours, total / size)
    assert ours[0] == ours[-1] == 0


def wordy(task="sequence-classification", **options):
    """A model and an encoding whose words have 1, 2, 1 and 3 pieces, between special tokens."""
    tokenizer = pieces()
    model = make_tiny_model(task, initializer_range=0.4, vocab_size=len(tokenizer) + 10, **options)
    encoding = tokenizer(["the unseen film gooddullgreat"])
    assert [word and word[1] for word in ftlib.tagging.text_words(encoding, 0)] == [None, 0, 1, 1, 2, 3, 3, 3, None]
    return model, encoding


def pieces():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the un ##seen film good ##dull ##great".split()
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


# ------------------------------------------------------------------------------------------------ by hand


def test_scores_add_up(model):
    for method, steps, most in (
        ("integrated-gradients", 100, 1e-3),
        ("layer-conductance", 400, 3e-3),
        ("shapley", 1, 1e-5),
    ):
        for row, ours in zip(ROWS, attribute(model, ROWS, method, target=1, steps=steps, samples=3), strict=True):
            f, x = twin(model, row, 1)
            moved = (f(x) - f(x * 0)).item()
            assert abs(moved) > 0.1 and ours.sum() == pytest.approx(moved, abs=most), method


def test_too_few_steps_are_said(model):
    with pytest.warns(UserWarning, match=r"add up to .*raise steps=1"):
        attribute(model, ROWS[:1], "integrated-gradients", target=1, steps=1)


def test_shapley_nears_the_mean_over_all_orders(model):
    f, x = twin(model, {"input_ids": [2, 5, 3]}, 0)
    value = {}
    for kept in itertools.product((0, 1), repeat=3):
        value[kept] = float(f(x * torch.tensor(kept)[None, :, None]))
    exact = np.zeros(3)
    for order in itertools.permutations(range(3)):
        kept = [0, 0, 0]
        for token in order:
            before, kept[token] = value[tuple(kept)], 1
            exact[token] += (value[tuple(kept)] - before) / 6
    (ours,) = attribute(model, [{"input_ids": [2, 5, 3]}], "shapley", target=0, samples=2000, batch_size=500)
    assert np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


def test_the_default_target_is_the_class_predicted_and_a_function_may_be_one(model):
    predicted = ftlib.predict(model, ROWS)
    for method in ("occlusion", "integrated-gradients"):
        plain = attribute(model, ROWS, method)
        for other in (predicted, predicted.tolist(), [lambda logits, n=n: logits[:, n] for n in predicted]):
            for a, b in zip(plain, attribute(model, ROWS, method, target=other), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6)
    (gap,) = attribute(model, ROWS[:1], "occlusion", target=lambda logits: logits[:, 0] - logits[:, 1])
    (first,), (second,) = (attribute(model, ROWS[:1], "occlusion", target=n) for n in (0, 1))
    np.testing.assert_allclose(gap, first - second, atol=1e-5)


def test_faithfulness_by_hand(model):
    """Two tokens: with both, without the one that counts more, without any; the areas are trapezoids."""
    row, scores = {"input_ids": [5, 9]}, [np.array([0.1, 0.7])]
    table = model.get_input_embeddings()

    def probability(first, second):
        x = table(torch.tensor([[5, 9]])) * torch.tensor([first, second])[None, :, None]
        return model(inputs_embeds=x).logits.softmax(-1)[0, 2].item()

    found = faithfulness(model, [row], scores, target=2, points=3)
    both, first, second, none = (probability(*kept) for kept in ((1, 1), (1, 0), (0, 1), (0, 0)))
    np.testing.assert_allclose(found["deletion"], [[both, first, none]], atol=1e-6)
    np.testing.assert_allclose(found["insertion"], [[none, second, both]], atol=1e-6)
    np.testing.assert_allclose(found["deletion_area"], [both / 4 + first / 2 + none / 4], atol=1e-6)
    np.testing.assert_allclose(found["insertion_area"], [none / 4 + second / 2 + both / 4], atol=1e-6)


def test_faithfulness_takes_words_together():
    model, encoding = wordy()
    scores = [np.array([9.0, 0, 1, 1, 0.5, -1, -1, -1, 9])]  # special tokens stay, whatever their scores
    found = faithfulness(model, encoding, scores, target=0, whole_words=True, points=5)
    ids = torch.tensor([encoding["input_ids"][0]])
    x, kept = model.get_input_embeddings()(ids), torch.ones(1, 9, 1)
    expected = []
    for word in ([], [2, 3], [4], [1], [5, 6, 7]):
        kept[:, word] = 0
        expected.append(model(inputs_embeds=x * kept).logits.softmax(-1)[0, 0].item())
    np.testing.assert_allclose(found["deletion"], [expected], atol=1e-6)


def test_words_of_adds_pieces_up():
    tokenizer = pieces()
    texts = ["the  unseen film", "film"]
    encoding = tokenizer(texts, padding=True)
    scores = [np.arange(6.0), np.arange(3.0)]
    assert ftlib.words_of(scores, encoding, texts) == [
        [
            {"text": "the", "start": 0, "end": 3, "score": 1.0},
            {"text": "unseen", "start": 5, "end": 11, "score": 5.0},
            {"text": "film", "start": 12, "end": 16, "score": 4.0},
        ],
        [{"text": "film", "start": 0, "end": 4, "score": 1.0}],
    ]
    pair = [("the film", "unseen")]
    found = ftlib.words_of([np.arange(7.0)], tokenizer(["the film"], ["unseen"]), pair)
    assert [(word["text"], word["score"]) for word in found[0]] == [("the", 1.0), ("film", 2.0), ("unseen", 9.0)]


# --------------------------------------------------------------------------------------- on every kind of model


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_as_among_others_and_batches_may_be_of_any_size(model, method):
    together = attribute(model, ROWS, method, target=0, steps=30)
    padded = [{"input_ids": [*ROWS[1]["input_ids"], 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]}]
    for rows, expected in ((ROWS[:1], together[0]), (ROWS[1:], together[1]), (padded, together[1])):
        (alone,) = attribute(model, rows, method, target=0, steps=30, batch_size=7)
        np.testing.assert_allclose(alone, expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_unpadded_is_as_padded(method, model_type):
    options = dict(intermediate_size=32, hidden_size=16, num_attention_heads=2, cls_token_id=2, sep_token_id=3)
    options = options if model_type == "modernbert" else {}
    model = make_tiny_model(model_type=model_type, initializer_range=0.2, **options)
    # ModernBERT divides vectors by their length first, so that on the way from zeros nothing moves
    how = dict(steps=60, samples=3, baseline=4 if model_type == "modernbert" else None)
    before = attribute(model, ROWS, method, **how)
    after = attribute(ftlib.unpad(model), ROWS, method, **how)
    for a, b in zip(before, after, strict=True):
        assert np.abs(a).max() > 1e-4
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_lora_is_as_merged(model):
    ftlib.tune(model, "lora", rank=2)
    for name, weight in model.named_parameters():
        if "lora" in name.lower() or name.endswith((".up", ".down")):
            torch.nn.init.normal_(weight.data, std=0.3)
    ours = attribute(model, ROWS, target=1)
    for a, b in zip(ours, attribute(ftlib.merge(model), ROWS, target=1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("unpadded", [False, True])
def test_a_head_of_several_is_as_alone(unpadded):
    encoder = make_tiny_model("encoder", initializer_range=0.4)
    heads = {"mood": ftlib.Head(num_labels=3), "tags": ftlib.Head("token-classification", num_labels=4)}
    several = ftlib.MultiTaskModel(encoder, heads)
    mood, tags = several.export("mood"), several.export("tags")
    several = ftlib.unpad(several) if unpadded else several
    for method in ("integrated-gradients", "occlusion", "layer-conductance"):
        for task, alone, target in (("mood", mood, 2), ("tags", tags, (-2, 3))):
            ours = attribute(several, ROWS, method, task=task, target=target)
            for a, b in zip(ours, attribute(alone, ROWS, method, target=target), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("unpadded", [False, True])
def test_a_language_models_token_hangs_on_those_before_it(unpadded):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    gpt = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    gpt = ftlib.unpad(gpt) if unpadded else gpt
    for method in METHODS:
        (ours,) = attribute(gpt, ROWS[:1], method, target=(2, 7), layer=1, samples=3)
        assert np.abs(ours[:3]).max() > 1e-3 and not ours[3:].any(), method


def test_tags_answers_and_decoders_that_classify():
    from transformers import AutoModelForQuestionAnswering, LlamaConfig, LlamaForSequenceClassification

    reader = AutoModelForQuestionAnswering.from_config(make_tiny_model(initializer_range=0.4).config).eval()
    (ours,) = attribute(reader, ROWS[:1], "occlusion", target=(3, 1))
    x = reader.get_input_embeddings()(torch.tensor([ROWS[0]["input_ids"]]))
    without = x.clone()
    without[:, 4] = 0
    expected = reader(inputs_embeds=x).end_logits[0, 3] - reader(inputs_embeds=without).end_logits[0, 3]
    assert ours[4] == pytest.approx(expected.item(), abs=1e-5)
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    llama = LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, initializer_range=0.3)).eval()
    (ours,) = attribute(llama, ROWS[:1], "gradient-x-input", target=1)
    x = llama.get_input_embeddings()(torch.tensor([ROWS[0]["input_ids"]])).detach().requires_grad_()
    llama(inputs_embeds=x).logits[0, 1].backward()
    close(ours, (x * x.grad).sum(-1)[0])


def test_modes_hooks_and_gradients_are_as_before(model):
    model.train()
    attribute(model, ROWS, "layer-conductance", target=0, steps=20)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(method="lime"), "method='lime': choose one of gradient-x-input, .*shapley"),
        (dict(target=3), "row 0: target=3; sequence-classification needs one of 3 classes"),
        (dict(target=-1), "row 0: target=-1"),
        (dict(target=[0, 7]), "row 1: target=7"),
        (dict(target=[0]), "target has 1 entries for 2 rows"),
        (dict(target=(1, 2)), r"row 0: target=\(1, 2\)"),
        (dict(task="mood"), "task='mood': say which, one of None"),
        (dict(baseline=64), r"baseline=64: None or a token's id, in range\(0, 64\)"),
        (dict(whole_words=True), "whole_words=True: rows don't know their words"),
        (dict(method="layer-conductance", layer=3), "layer=3: choose one of 1, 2, -1, -2"),
        (dict(steps=0), "steps=0"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model, options, said):
    with pytest.raises(ValueError, match=said):
        attribute(model, ROWS, **options)


def test_a_task_and_a_position_must_be_said():
    several = ftlib.MultiTaskModel(make_tiny_model("encoder"), {"a": ftlib.Head(), "b": ftlib.Head()})
    with pytest.raises(ValueError, match="task=None: say which, one of a, b"):
        attribute(several, ROWS)
    tagger = make_tiny_model("token-classification", num_labels=3)
    for target in (None, 1, (6, 0), (0, 3)):
        with pytest.raises(ValueError, match=r"row 0: target=.* needs \(position, class\) of 6 tokens and 3 classes"):
            attribute(tagger, ROWS, target=target)
    with pytest.raises(ValueError, match="id 99 is outside"):
        attribute(tagger, [{"input_ids": [99]}], target=(0, 0))


def test_scores_that_do_not_fit_their_row_are_refused(model):
    with pytest.raises(ValueError, match="row 1: 3 scores for 4 tokens"):
        faithfulness(model, ROWS, [np.ones(6), np.ones(3)])


def test_models_that_lay_rows_out_otherwise_are_refused():
    from transformers import BartConfig, BartForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    bart = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    with pytest.raises(ValueError, match="bart embeds two rows"):
        attribute(BartForSequenceClassification(bart), ROWS)
    xlnet = XLNetForSequenceClassification(XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(ValueError, match=r"Embedding gives \(6, 1, 16\) for 1 rows of 6 tokens"):
        attribute(xlnet, ROWS)


def test_every_method_is_in_the_docstring():
    assert all(f'"{name}":' in attribute.__doc__ for name in METHODS)
