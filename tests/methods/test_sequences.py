"""Viterbi and the CRF against every path counted one by one; trained by `fit`, a CRF learns what no word can tell."""

from itertools import pairwise, product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ftlib.engine.fit import fit
from ftlib.engine.prediction import evaluate, logits_of
from ftlib.engine.saving import load, save
from ftlib.engine.settings import TrainConfig
from ftlib.methods.sequences import CRF, bio_transitions, viterbi
from ftlib.methods.tuning import merge, tune
from ftlib.methods.unpadding import unpad
from ftlib.tasks.tagging import bio_errors

NAMES = ["O", "B-x", "I-x", "B-y", "I-y"]
INF = float("inf")


def random_transitions(labels, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(size, generator=generator, dtype=dtype) for size in ((labels,), (labels, labels), (labels,))
    )


def path_scores(logits, transitions):
    """{path: score} of every path of a row (words, labels), added up as the definition says, in float64."""
    start, transition, end = (t.double() for t in transitions)
    logits, scores = logits.double(), {}
    for path in product(range(logits.shape[1]), repeat=len(logits)):
        score = start[path[0]] + end[path[-1]] + sum(logits[t, y] for t, y in enumerate(path))
        scores[path] = float(score + sum(transition[a, b] for a, b in pairwise(path)))
    return scores


def random_crf(labels, seed=0):
    crf = CRF(labels)
    with torch.no_grad():
        for parameter, value in zip(crf.transitions, random_transitions(labels, seed), strict=True):
            parameter.copy_(value)
    return crf


MASKS = torch.tensor(
    [[0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
).bool()


# ------------------------------------------------------------------------------------------------ transitions


def test_bio_transitions_by_hand():
    start, transition, end = bio_transitions(NAMES)
    assert start.tolist() == [0, 0, -INF, 0, -INF] and end.tolist() == [0] * 5
    allowed = [[1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
    assert transition.exp().tolist() == allowed and start.dtype == torch.float32


def test_bioes_transitions_by_hand():
    start, transition, end = bio_transitions(["O", "B-x", "I-x", "E-x", "S-x"])
    assert start.exp().tolist() == [1, 1, 0, 0, 1] and end.exp().tolist() == [1, 0, 0, 1, 1]
    outside, inside = [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]
    assert transition.exp().tolist() == [outside, inside, inside, outside, outside]


def test_names_that_are_no_bio_are_refused():
    with pytest.raises(ValueError, match="tag 1 is 'NOUN'"):
        bio_transitions(["O", "NOUN"])
    with pytest.raises(ValueError, match=r"no 'B-y', so that no entity of it could begin"):
        bio_transitions(["O", "B-x", "I-x", "I-y"])


# ---------------------------------------------------------------------------------------------------- Viterbi


@pytest.mark.parametrize("bio", [False, True])
def test_viterbi_is_the_best_of_all_paths(bio):
    torch.manual_seed(1)
    transitions = random_transitions(5)
    if bio:
        transitions = tuple(a + b for a, b in zip(transitions, bio_transitions(NAMES), strict=True))
    logits = torch.randn(4, 7, 5)
    logits[0, 3, 2] = logits[2, 1, 0] = -INF
    found = viterbi(logits, transitions, MASKS)
    assert found.shape == (4, 7) and found.dtype == torch.int64
    for own, mask, path in zip(logits, MASKS, found, strict=True):
        scores = path_scores(own[mask], transitions)
        assert tuple(path[mask].tolist()) == max(scores, key=scores.get)
        assert (path[~mask] == -100).all()
        if bio:
            assert bio_errors([NAMES[i] for i in path[mask].tolist()]) == []


def test_viterbi_differs_from_argmax_where_bio_would_break():
    logits = torch.tensor([[[0.9, 0.8, 0.0, 0, 0], [0.0, 0.1, 2.0, 0, 0]]])
    assert logits.argmax(-1).tolist() == [[0, 2]]  # O I-x
    assert viterbi(logits, bio_transitions(NAMES)).tolist() == [[1, 2]]


def test_of_equal_paths_that_of_the_lowest_numbers():
    nothing = (torch.zeros(3), torch.zeros(3, 3), torch.zeros(3))
    assert viterbi(torch.zeros(2, 4, 3), nothing).tolist() == [[0] * 4] * 2
    for seed in range(20):  # many ties: the last label counts first, then the one before
        logits = torch.randint(0, 2, (1, 4, 3), generator=torch.Generator().manual_seed(seed)).float()
        transitions = tuple(t.round().clamp(0, 1) for t in random_transitions(3, seed))
        scores = path_scores(logits[0], transitions)
        best = [path for path, score in scores.items() if score == max(scores.values())]
        assert tuple(viterbi(logits, transitions)[0].tolist()) == min(best, key=lambda path: path[::-1])


def test_rows_without_words_and_no_rows():
    transitions = random_transitions(5)
    assert viterbi(torch.randn(2, 3, 5), transitions, torch.zeros(2, 3).bool()).tolist() == [[-100] * 3] * 2
    assert viterbi(torch.randn(0, 3, 5), transitions).shape == (0, 3)
    assert viterbi(torch.randn(2, 0, 5), transitions).shape == (2, 0)
    assert viterbi(torch.randn(1, 3, 5).bfloat16(), transitions).shape == (1, 3)


def test_transitions_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[\(5,\), \(5, 5\), \(5,\)\], the logits 4 labels"):
        viterbi(torch.randn(1, 3, 4), random_transitions(5))


# -------------------------------------------------------------------------------------------------------- CRF


def labels_of(masks, labels, seed=0):
    drawn = torch.randint(0, labels, masks.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(masks, drawn, -100)


def test_the_loss_is_that_of_all_paths_counted():
    torch.manual_seed(2)
    crf, logits, labels = random_crf(4), torch.randn(4, 7, 4), labels_of(MASKS, 4)
    expected = 0.0
    for own, mask, path in zip(logits, MASKS, labels, strict=True):
        scores = path_scores(own[mask], [p.detach() for p in crf.transitions])
        total = torch.logsumexp(torch.tensor(list(scores.values()), dtype=torch.float64), 0)
        expected += float(total) - scores[tuple(path[mask].tolist())]
    assert_close(crf(logits, labels).double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)
    decoded = viterbi(logits, crf.transitions, MASKS)
    for own, mask, path in zip(logits, MASKS, decoded, strict=True):
        scores = path_scores(own[mask], [p.detach() for p in crf.transitions])
        assert tuple(path[mask].tolist()) == max(scores, key=scores.get)


def plain_loss(crf, logits, labels):
    """A row's loss by the forward algorithm in probabilities, float64: another way to the same number."""
    start, transition, end = (p.double() for p in crf.transitions)
    kept, tags = logits.double()[labels != -100], labels[labels != -100]
    alpha = (start + kept[0]).exp()
    for emission in kept[1:]:
        alpha = (alpha @ transition.exp()) * emission.exp()
    score = start[tags[0]] + end[tags[-1]] + kept[range(len(tags)), tags].sum() + transition[tags[:-1], tags[1:]].sum()
    return (alpha @ end.exp()).log() - score


def test_loss_and_gradients_are_those_of_the_forward_algorithm_in_double():
    torch.manual_seed(3)
    crf, labels = random_crf(6), labels_of(torch.rand(5, 30) < 0.7, 6)
    logits = torch.randn(5, 30, 6, requires_grad=True)
    expected = sum(plain_loss(crf, own, path) for own, path in zip(logits, labels, strict=True))
    wanted = torch.autograd.grad(expected, [logits, *crf.parameters()])
    loss = crf(logits, labels)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, atol=0, rtol=1e-5)
    assert_close(torch.autograd.grad(loss, [logits, *crf.parameters()]), wanted, atol=1e-5, rtol=1e-5)
    assert_close(crf.double()(logits.double(), labels), expected, atol=1e-10, rtol=1e-10)


def test_padding_and_pieces_without_labels_change_nothing():
    torch.manual_seed(4)
    crf, logits, labels = random_crf(3), torch.randn(2, 4, 3), labels_of(torch.ones(2, 4).bool(), 3)
    wider, places = torch.full((2, 9, 3), 1e4), [1, 2, 5, 7]
    wider[:, places] = logits
    wider.requires_grad_()
    spread = torch.full((2, 9), -100)
    spread[:, places] = labels
    loss = crf(logits, labels)
    assert_close(crf(wider, spread), loss, atol=1e-5, rtol=0)
    alone = sum(crf(logits[i : i + 1], labels[i : i + 1]) for i in range(2))
    assert_close(alone, loss, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(crf(wider, spread), wider)
    assert gradient[:, [0, 3, 4, 6, 8]].abs().max() == 0 < gradient[:, places].abs().max()
    found = viterbi(wider, crf.transitions, spread != -100)[:, places]
    assert torch.equal(found, viterbi(logits, crf.transitions))
    empty = torch.cat([spread, torch.full((1, 9), -100)])
    assert_close(crf(torch.cat([wider, wider[:1]]), empty), loss, atol=1e-5, rtol=0)
    nothing = crf(wider, torch.full((2, 9), -100))
    assert nothing == 0 and nothing.requires_grad


def test_without_transitions_the_loss_is_cross_entropy():
    logits, labels = torch.randn(4, 7, 5), labels_of(MASKS, 5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(CRF(5)(logits, labels), expected, atol=1e-5, rtol=1e-5)


def test_probabilities_of_all_paths_add_up_to_one():
    crf, logits = random_crf(3), torch.randn(1, 4, 3)
    paths = torch.tensor(list(product(range(3), repeat=4)))
    total = sum(torch.exp(-crf(logits, path[None])) for path in paths)
    assert_close(total, torch.tensor(1.0), atol=1e-5, rtol=0)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    crf, logits, labels = CRF(3), torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a CRF trains in one process"):
        crf(logits, labels)
    with torch.no_grad():
        assert crf(logits, labels) > 0  # evaluation may be shared


# ------------------------------------------------------------------------------------------------ with the rest

# Three tags go round: 0 1 2 0 1 2 ...; the first word says where the round begins, all others are one and the same
# word, of which a tagger that sees no neighbors and no positions can't know the tag.
WORDS = [10, 11, 12]


def round_rows(lengths):
    rows = []
    for n, length in enumerate(lengths):
        first = n % 3
        tags = [(first + t) % 3 for t in range(length)]
        rows.append({"input_ids": [2, WORDS[first], *[20] * (length - 1), 3], "labels": [-100, *tags, -100]})
    return rows


def blind_tagger(tiny_model):
    """A random BERT whose layers are cut off from neighbors and positions: its logits depend on the word alone."""
    model = tiny_model("token-classification", 3)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    model.bert.requires_grad_(False)
    return model


def config(**options):
    return TrainConfig(**{"epochs": 30, "batch_size": 8, "learning_rate": 1e-2, "progress": False, **options})


def with_crf(model, rate=10.0):
    model.crf = CRF(model.config.num_labels)
    tune(model, "head-only")
    model.tuning.scales |= {f"crf.{name}": rate for name, _ in model.crf.named_parameters()}
    return model


def right(model, rows, transitions=None):
    found = [torch.from_numpy(one) for one in logits_of(model, rows)]
    hits = []
    for row, logits in zip(rows, found, strict=True):
        labels = torch.tensor(row["labels"])
        tags = logits.argmax(-1)
        if transitions is not None:
            tags = viterbi(logits[None], transitions, labels[None] != -100)[0]
        hits += (tags == labels)[labels != -100].tolist()
    return sum(hits) / len(hits)


ROWS = round_rows([3, 5, 8, 6, 4, 7, 9, 5, 6] * 4)


def test_fit_trains_a_crf_that_knows_what_the_words_do_not_tell(tiny_model, tmp_path):
    model = with_crf(blind_tagger(tiny_model))
    before = evaluate(model, ROWS)["accuracy"]
    run = fit(model, ROWS, eval_dataset=ROWS, loss=model.crf.forward, config=config())
    assert run.history[0]["loss"] == pytest.approx(1.1, abs=0.3)  # log 3 a word, as cross-entropy
    assert run.metrics["loss"] < 0.2
    crf = model.crf
    assert right(model, ROWS, crf.transitions) == 1.0  # 0 1 2 0 1 2 ...
    assert right(model, ROWS) < 0.7 and before < 0.7  # the logits alone can't
    best = crf.transition.argmax(1).tolist()
    assert best == [1, 2, 0]
    # what `save` writes is a stock model; the CRF lies beside it
    with pytest.raises(ValueError, match=r"crf\.\w+ and 2 more weights would not come back"):
        save(model, tmp_path / "m")
    del model.crf
    save(model, tmp_path / "m")
    save_file(crf.state_dict(), tmp_path / "m" / "crf.safetensors")
    again = load(tmp_path / "m")
    (found := CRF(3)).load_state_dict(load_file(tmp_path / "m" / "crf.safetensors"))
    assert right(again, ROWS, found.transitions) == 1.0
    assert_close(logits_of(again, ROWS[:3]), logits_of(model, ROWS[:3]), atol=1e-6, rtol=0)


def test_without_the_crf_the_same_tagger_can_not_learn_it(tiny_model):
    model = blind_tagger(tiny_model)
    tune(model, "head-only")
    fit(model, ROWS, config=config())
    assert right(model, ROWS) < 0.7


def test_a_run_goes_on_with_the_crf_as_if_it_had_not_stopped(tiny_model, tmp_path):
    whole = with_crf(blind_tagger(tiny_model))
    fit(whole, ROWS, loss=whole.crf.forward, config=config(epochs=4))
    folder = str(tmp_path / "run")
    options = dict(epochs=4, checkpoint_dir=folder, checkpoint_every=3)
    cut = with_crf(blind_tagger(tiny_model))

    def interrupt(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    fit(cut, ROWS, loss=cut.crf.forward, config=config(**options), on_record=interrupt)
    assert not torch.equal(cut.crf.transition, whole.crf.transition)
    fresh = with_crf(blind_tagger(tiny_model))
    fit(fresh, ROWS, loss=fresh.crf.forward, config=config(**options, resume="auto"))
    for name, value in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert whole.crf.transition.abs().max() > 0.1


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_unpadded_and_with_lora(tiny_model, tmp_path, strategy):
    model = tiny_model("token-classification", 3)
    model.crf = CRF(3)
    tune(model, strategy)
    model.tuning.scales |= {f"crf.{name}": 10.0 for name, _ in model.crf.named_parameters()}
    unpad(model)
    fit(model, ROWS, loss=model.crf.forward, config=config(epochs=3))
    crf = model.crf
    assert all(parameter.abs().max() > 0 for parameter in crf.parameters())
    del model.crf
    if strategy == "lora":
        merge(model)
    save(model, tmp_path / "m")
    assert_close(logits_of(load(tmp_path / "m"), ROWS[:3]), logits_of(model, ROWS[:3]), atol=1e-5, rtol=0)
