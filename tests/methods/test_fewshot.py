"""Few labels: episodes, prototypes and one inner step by hand, pairs as SetFit makes them, which rows to label next."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import nn
from torch.testing import assert_close

import ftlib
from ftlib.core.batches import collate
from ftlib.core.loop import summed
from ftlib.methods.fewshot import (
    contrastive_pairs,
    episodes,
    first_order_maml,
    k_center,
    prototype_logits,
    prototypes,
    prototypical,
    reptile,
    uncertainty,
)
from ftlib.methods.tuning import tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.task import auto_class

LABELS = np.repeat([3, 7, 1, 4, 9], [6, 5, 9, 6, 5])


# -------------------------------------------------------------------------------------------------------- episodes


def test_episodes_hold_whole_classes_and_no_row_twice():
    seen = set()
    for support, query in islice(episodes(LABELS, ways=3, shots=2, queries=3, seed=1), 40):
        assert support.shape == (3, 2) and query.shape == (3, 3)
        rows = [*support.flatten(), *query.flatten()]
        assert len(set(rows)) == 15
        classes = [np.unique(LABELS[np.concatenate([a, b])]) for a, b in zip(support, query, strict=True)]
        assert all(len(own) == 1 for own in classes) and len({int(own[0]) for own in classes}) == 3
        seen.update(rows)
    assert seen == set(range(len(LABELS)))  # all rows come


def test_episodes_are_a_function_of_the_seed():
    def first(seed):
        return next(episodes(LABELS, ways=4, shots=1, queries=1, seed=seed))

    assert all(np.array_equal(a, b) for a, b in zip(first(0), first(0), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first(0), first(1), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 6}, "ways=6: there are 5 classes"),
        ({"queries": 4}, "class 7 has 5 rows, an episode takes 6; take fewer, or leave it out"),
        ({"shots": 0}, "shots=0: need a whole number of at least 1"),
        ({"ways": 1}, "ways=1: need a whole number of at least 2"),
        ({"queries": 1.0}, "queries=1.0"),
    ],
)
def test_episodes_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        episodes(LABELS, **{"ways": 3, "shots": 2, "queries": 2} | options)


# ------------------------------------------------------------------------------------------------------ prototypes


def test_prototypes_by_hand():
    vectors = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [0.0, 3.0]], requires_grad=True)
    means = prototypes(vectors, torch.tensor([0, 0, 1, 0]))
    assert_close(means, torch.tensor([[2 / 3, 1.0], [5.0, 5.0]]))
    logits = prototype_logits(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    assert logits.tolist() == [[-4.0, -2.0]]
    both = prototype_logits(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "cosine", scale=10)
    assert_close(both, torch.tensor([[6.0, 8.0]]))
    means.sum().backward()
    assert_close(vectors.grad, torch.tensor([[1 / 3, 1 / 3], [1 / 3, 1 / 3], [1.0, 1.0], [1 / 3, 1 / 3]]))
    with pytest.raises(ValueError, match="class 1 has no row, so it has no prototype"):
        prototypes(torch.ones(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="distance='dot': choose one of euclidean, cosine"):
        prototype_logits(torch.ones(1, 2), torch.ones(1, 2), "dot")


class Vectors(nn.Module):
    """The vector of a row is a learned scale times it: what a model of vectors gives, by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.scale * x)


def test_the_prototypical_loss_by_hand():
    model = Vectors()
    support = {"x": torch.tensor([[0.0], [1.0]]), "labels": torch.tensor([0, 1])}
    query = {"x": torch.tensor([[0.25], [2.0]]), "labels": torch.tensor([0, 1])}
    value = prototypical()(model, [(support, query)])
    gaps = torch.tensor([(2 * 0.75) ** 2 - (2 * 0.25) ** 2, (2 * 2.0) ** 2 - (2 * 1.0) ** 2])  # of squared distances
    assert_close(value, torch.log1p((-gaps).exp()).mean())
    assert_close(model.scale.grad, (-torch.sigmoid(-gaps) * gaps).mean())  # gaps grow with scale²: d/ds = 2 gap / s
    model.scale.grad = None
    twice = prototypical()(model, [(support, query), (support, query)])
    assert_close(twice, value)


# ----------------------------------------------------------------------------------------------------- inner loops


def square(model, step):
    """The gradient of the mean of (w x - y)², as `steps` takes a gradient function."""
    (batch,) = step
    loss = (model(batch["x"]) - batch["y"]).square().mean()
    loss.backward()
    return loss.detach()


def line(weight):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model


def at(x, y):
    return {"x": torch.tensor([[x]]), "y": torch.tensor([[y]])}


EPISODES = [(at(1.0, 2.0), at(2.0, 3.0)), (at(2.0, -1.0), at(1.0, 1.0))]


def test_one_step_of_first_order_maml_by_hand():
    model = line(1.0)
    loss = first_order_maml(0.1, gradient=square)(model, EPISODES)
    # the first: 2·(1·1 - 2)·1 = -2, to w = 1.2; there the query loses (2.4 - 3)², with gradient 2·(-0.6)·2 = -2.4
    # the second: 2·(2·1 + 1)·2 = 12, to w = -0.2; there (-0.2 - 1)², with gradient 2·(-1.2)·1 = -2.4
    assert loss.item() == pytest.approx((0.36 + 1.44) / 2)
    assert model.weight.grad.item() == pytest.approx((-2.4 - 2.4) / 2)
    assert model.weight.item() == 1.0  # where it began


def test_two_steps_of_reptile_by_hand():
    model = line(1.0)
    loss = reptile(0.1, steps=2, gradient=square)(model, EPISODES)
    # the first: 1 -> 1.2 -> 1.2 - 0.1·2·(-0.8) = 1.36
    # the second: 1 -> -0.2 -> -0.2 - 0.1·2·2·(2·(-0.2) + 1) = -0.44
    assert model.weight.grad.item() == pytest.approx(((1 - 1.36) + (1 + 0.44)) / 2)
    assert loss.item() == pytest.approx((0.64 + 0.36) / 2) and model.weight.item() == 1.0
    for record in ftlib.steps(
        model, [EPISODES] * 2, torch.optim.SGD(model.parameters(), lr=0.5), total=1, max_grad_norm=None,
        gradient=reptile(0.1, steps=2, gradient=square), schedule=lambda step, total: 1.0,
    ):  # fmt: skip
        assert record["loss"] == pytest.approx(0.5)
    assert model.weight.item() == pytest.approx(1 + 0.5 * ((1.36 - 1) + (-0.44 - 1)) / 2)


def classifier():
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)).eval()


def drawn(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"input_ids": torch.randint(5, 60, (n,), generator=generator).tolist(), "labels": n % 3}
        for n in range(3, 3 + count)
    ]
    return collate(rows)


def test_a_step_is_what_autograd_gives_with_the_inner_step_detached():
    model, step = classifier(), [(drawn(1), drawn(2)), (drawn(3), drawn(4))]
    first_order_maml(0.05, steps=2)(model, step)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for support, query in step:
        own = {name: p.detach() for name, p in model.named_parameters()}
        for batch in (support, support, query):
            own = {name: p.detach().requires_grad_() for name, p in own.items()}
            loss = torch.func.functional_call(model, own, kwargs=batch).loss
            found = torch.autograd.grad(loss, [*own.values()], allow_unused=True)
            gradients = {name: 0 if g is None else g for name, g in zip(own, found, strict=True)}
            if batch is not query:
                own = {name: p - 0.05 * gradients[name] for name, p in own.items()}
        wanted = {name: total + gradients[name] / 2 for name, total in wanted.items()}
    for name, p in model.named_parameters():
        assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4, msg=name)
    assert model.classifier.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("make", [first_order_maml, reptile])
def test_it_moves_an_adapter_alone_and_runs_unpadded(make):
    model = classifier()
    plain = make(0.5, steps=2)(model, [(drawn(1), drawn(2))])
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = make(0.5, steps=2)(unpad(model), [(drawn(1), drawn(2))])
    assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    tune(model, "lora", rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    list(ftlib.steps(model, [[(drawn(1), drawn(2))]] * 2, sgd, total=2, gradient=make(0.5)))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora" in name or "classifier" in name or "pooler" in name for name in moved)


def test_an_error_in_the_inner_loop_leaves_the_weights_as_they_were():
    model, calls = line(1.0), []

    def breaks(model, step):
        calls.append(model.weight.item())
        if len(calls) == 3:
            raise RuntimeError("as out of memory")
        return square(model, step)

    with pytest.raises(RuntimeError, match="as out of memory"):
        reptile(0.1, steps=4, gradient=breaks)(model, EPISODES)
    assert calls[2] != 1.0 and model.weight.item() == 1.0 and model.weight.grad is None


def test_what_an_inner_loop_can_not_be():
    for make in (first_order_maml, reptile):
        with pytest.raises(ValueError, match="rate=0: need a number"):
            make(0)
        with pytest.raises(ValueError, match="steps=0: need a whole number"):
            make(0.1, steps=0)


def test_encoders_learn_classes_from_episodes_with_prototypes(tiny_tokenizer):
    """Words tell the classes; those of the last two are never seen in training."""
    words = ["film", "flight", "plot", "denver", "boston", "book"]
    texts = [f"{word} {more}" for word in words for more in ("is good", "a the", "and not", "very dull", "to you")]
    labels = np.repeat(np.arange(6), 5)
    config = tiny_config()
    config.normalize = False
    torch.manual_seed(0)
    model = auto_class("sentence-embedding").from_config(config)
    rows = [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in texts]

    def batch(places):
        own = [rows[i] | {"labels": way} for way, line in enumerate(places) for i in line]
        return collate(own)

    def correct():
        right = []
        for support, query in islice(episodes(labels[20:], ways=2, shots=2, queries=2, seed=9), 20):
            known, asked = batch(support + 20), batch(query + 20)
            with torch.no_grad():
                vectors = [model(**{k: v for k, v in own.items() if k != "labels"}).logits for own in (known, asked)]
            found = prototype_logits(vectors[1], prototypes(vectors[0], known["labels"])).argmax(-1)
            right += (found == asked["labels"]).tolist()
        return np.mean(right)

    drawn_episodes = episodes(labels[:20], ways=3, shots=2, queries=2, seed=0)
    batches = ([(batch(support), batch(query))] for support, query in drawn_episodes)
    adam, gradient = torch.optim.AdamW(model.parameters(), lr=3e-3), prototypical()
    losses = [r["loss"] for r in ftlib.steps(model, batches, adam, total=30, gradient=gradient)]
    assert np.mean(losses[-5:]) < 0.3 < losses[0]
    assert correct() > 0.6  # 0.5 is chance


# ----------------------------------------------------------------------------------------------------------- pairs


def counted(labels, **options):
    pairs, scores = contrastive_pairs(labels, **options)
    assert pairs.shape == (len(scores), 2) and (pairs[:, 0] <= pairs[:, 1]).all()
    same = np.asarray(labels)[pairs[:, 0]] == np.asarray(labels)[pairs[:, 1]]
    assert np.array_equal(same.astype(float), scores)
    return [tuple(pair) for pair in pairs.tolist()], scores


@pytest.mark.parametrize("labels", [[0, 0, 1], [2, 0, 1, 0, 2, 1, 1], ["a", "b", "a", "b", "b"]])
def test_how_many_pairs_there_are(labels):
    n = len(labels)
    sizes = np.unique(labels, return_counts=True)[1]
    positive = int(sum(size * (size + 1) // 2 for size in sizes))  # a row is a pair with itself
    negative = n * (n + 1) // 2 - positive
    pairs, scores = counted(labels, strategy="unique")
    assert len(set(pairs)) == len(pairs) == positive + negative and scores.sum() == positive
    for strategy, size in (("oversampling", max(positive, negative)), ("undersampling", min(positive, negative))):
        pairs, scores = counted(labels, strategy=strategy)
        assert len(pairs) == 2 * size and scores.tolist() == [1.0, 0.0] * size
        assert len(set(pairs)) == min(positive, size) + min(negative, size)
    pairs, scores = counted(labels, iterations=3)
    assert len(pairs) == 2 * 3 * n and scores.tolist() == [1.0, 0.0] * 3 * n


def test_pairs_are_in_setfits_own_order():
    """Of 3 rows the 6 pairs are 00 01 02 11 12 22, in the order that numpy's old generator draws with 42."""
    order = np.random.RandomState(42).permutation(6)
    every = [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]]
    drawn = [every[i] for i in order]
    pairs, _ = contrastive_pairs([0, 0, 1])
    positives, negatives = [p for p in drawn if p not in ([0, 2], [1, 2])], [p for p in drawn if p in ([0, 2], [1, 2])]
    assert pairs[::2].tolist() == positives and pairs[1::2].tolist() == negatives * 2


@pytest.fixture
def sampler(monkeypatch):
    """setfit.sampler alone: the rest of the package asks for another Transformers."""
    import importlib.util
    import sys
    from types import ModuleType

    if (found := importlib.util.find_spec("setfit")) is None:
        pytest.skip("setfit is not installed")
    alone = ModuleType("setfit_alone")
    alone.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "setfit_alone", alone)
    yield importlib.import_module("setfit_alone.sampler")
    for name in [name for name in sys.modules if name.startswith("setfit_alone.")]:
        del sys.modules[name]


@pytest.mark.parametrize("strategy", ["oversampling", "undersampling", "unique"])
@pytest.mark.parametrize("iterations", [None, 1, 7])
@pytest.mark.parametrize("labels", [[0, 0, 1], [2, 0, 1, 0, 2, 1, 1], [0, 1, 2, 3, 0], [1, 1, 1, 1, 1, 0]])
def test_pairs_are_setfits_own(sampler, labels, iterations, strategy):
    rows = list(range(len(labels)))
    theirs = list(sampler.ContrastiveDataset(rows, labels, False, iterations, strategy))
    pairs, scores = contrastive_pairs(labels, strategy=strategy, iterations=iterations)
    assert [[one["sentence_1"], one["sentence_2"]] for one in theirs] == pairs.tolist()
    assert [one["label"] for one in theirs] == scores.tolist()


def test_pairs_of_several_labels_are_setfits_own(sampler):
    labels = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    theirs = list(sampler.ContrastiveDataset(list(range(5)), labels, True))
    pairs, scores = contrastive_pairs(labels)
    assert [[one["sentence_1"], one["sentence_2"]] for one in theirs] == pairs.tolist()
    assert [one["label"] for one in theirs] == scores.tolist()


def test_several_labels_share_one():
    pairs, scores = contrastive_pairs([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], strategy="unique")
    found = {tuple(pair): score for pair, score in zip(pairs.tolist(), scores, strict=True)}
    assert found == {(0, 0): 1, (1, 1): 1, (2, 2): 1, (3, 3): 1, (0, 1): 1, (1, 2): 1} | {
        pair: 0 for pair in [(0, 2), (0, 3), (1, 3), (2, 3)]
    }


def test_pairs_that_can_not_be():
    for labels in ([1, 1, 1], [1]):
        with pytest.raises(ValueError, match="labels: all pairs are of one kind; contrast needs two classes"):
            contrastive_pairs(labels)
    with pytest.raises(ValueError, match="strategy='all': choose one of oversampling"):
        contrastive_pairs([0, 1], strategy="all")
    with pytest.raises(ValueError, match="iterations=0"):
        contrastive_pairs([0, 1], iterations=0)


# -------------------------------------------------------------------------------------------------------- choosing


def test_uncertainty_by_hand():
    rows = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3]]
    expected = [0.5 * math.log(2) + 0.5 * math.log(4), 0.0, -0.4 * math.log(0.4) - 0.6 * math.log(0.3)]
    assert uncertainty(rows).tolist() == pytest.approx(expected)
    assert uncertainty(np.float32(rows), "margin").tolist() == pytest.approx([0.75, 0.0, 0.9], abs=1e-6)
    with pytest.raises(ValueError, match="how='least': choose one of entropy, margin"):
        uncertainty(rows, "least")


def test_k_center_by_hand():
    """On a line at 0 1 4 6 10: from 1 the farthest is 10 (by 9), then 6 (4 from 10), then 4 (2 from 6), then 0 (1)."""
    points = [[0.0], [1.0], [4.0], [6.0], [10.0]]
    assert k_center(points, 4, chosen=[1]) == [4, 3, 2, 0]
    assert k_center(points, 1, chosen=[0, 4]) == [2]  # 4 is 4 from 0, 6 is 4 from 10: the first
    assert k_center(points, 1) == [2]  # the mean is 4.2
    assert k_center([[0.0, 0.0], [3.0, 4.0], [0.0, 4.5]], 1, chosen=[0]) == [1]  # 5 is farther than 4.5


def test_k_center_takes_no_row_twice():
    points = [[1.0]] * 3 + [[2.0]]
    assert sorted(k_center(points, 4)) == [0, 1, 2, 3]
    assert sorted(k_center(points, 3, chosen=[1])) == [0, 2, 3]
    with pytest.raises(ValueError, match="count=4: 3 rows are left"):
        k_center(points, 4, chosen=[1])
    with pytest.raises(ValueError, match="count=0"):
        k_center(points, 0)


def test_it_halves_the_largest_gap_at_most():
    """The greedy cover is at most twice the best one: Gonzalez 1985."""
    points = np.random.default_rng(0).normal(size=(9, 2))

    def cover(rows):
        return np.linalg.norm(points[:, None] - points[list(rows)][None], axis=-1).min(1).max()

    import itertools

    best = min(cover(rows) for rows in itertools.combinations(range(9), 3))
    assert cover(k_center(points, 3)) <= 2 * best


def test_the_plain_gradient_is_the_inner_one():
    model, batch = classifier(), drawn(1)
    loss = summed()(model, [batch])
    expected = model.classifier.weight.grad.clone()
    model.zero_grad()
    found = first_order_maml(1e-9)(model, [(batch, batch)])
    assert_close(found, loss, atol=1e-5, rtol=1e-5)
    assert_close(model.classifier.weight.grad, expected, atol=1e-5, rtol=1e-4)
