"""The fused losses of the kinds of tasks: against the formulas of methods/losses.py, by hand, and refused options."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from ftlib.methods.losses import IGNORE, binary_cross_entropy, cross_entropy, mean_squared_error
from ftlib.tasks.task import TASKS, count_labelled, task_loss

KINDS = ("sequence-classification", "token-classification", "multi-label-classification", "regression")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_same_loss_and_gradient(ours, theirs, logits):
    results = []
    for function in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    (our_loss, our_gradient), (their_loss, their_gradient) = results
    close(our_loss, their_loss)
    close(our_gradient, their_gradient)


def labels_for(kind, device="cpu"):
    """Labels for logits (2, 3)."""
    classes = kind in ("sequence-classification", "token-classification")
    return torch.zeros(2, dtype=torch.long, device=device) if classes else torch.zeros(2, 3, device=device)


def test_every_kind_has_a_loss_and_a_count():
    assert set(KINDS) <= set(TASKS)
    for kind in TASKS:
        assert callable(task_loss(kind))


def test_task_loss_same_as_the_hand_written_ones():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 3, generator=generator)
    labels = torch.randint(3, (4, 6), generator=generator)
    labels[1, 2:] = IGNORE
    targets = (torch.rand(4, 3, generator=generator) > 0.5).float()
    targets[2, 1] = IGNORE
    cases = [
        ("sequence-classification", logits[:, 0], labels[:, 0], cross_entropy, {}),
        ("sequence-classification", logits[:, 0], labels[:, 0], cross_entropy, {"label_smoothing": 0.1}),
        ("token-classification", logits, labels, cross_entropy, {}),
        ("token-classification", logits, labels, cross_entropy, {"label_smoothing": 0.2}),
        ("multi-label-classification", logits[:, 0], targets, binary_cross_entropy, {}),
        ("regression", logits[:, 0], torch.randn(4, 3, generator=generator), mean_squared_error, {}),
    ]
    for task, z, y, by_hand, options in cases:
        fused = task_loss(task, **options)
        assert_same_loss_and_gradient(
            lambda z, y=y, fused=fused: fused(z, y),
            lambda z, y=y, by_hand=by_hand, options=options: by_hand(z, y, reduction="sum", **options),
            z,
        )
        close(fused(z, y) / count_labelled(y, task), by_hand(z, y, **options))  # sum / count = mean


def test_micro_batches_add_up_to_the_whole_batch():
    """Why the loss is summed: averaged per micro-batch, labels in sparse ones would weigh more."""
    logits = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.full((4, 6), IGNORE)
    labels[0], labels[3, 0] = 1, 2  # six labels in the first half, one in the second
    loss, halves = task_loss("token-classification"), [slice(0, 2), slice(2, 4)]
    total = sum(loss(logits[half], labels[half]) for half in halves)
    count = sum(count_labelled(labels[half], "token-classification") for half in halves)
    assert count == 7
    close(total / count, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    mean_of_means = sum(cross_entropy(logits[half], labels[half]) for half in halves) / 2
    assert (mean_of_means - total / count).abs() > 0.1


def test_task_loss_regression_shapes():
    loss = task_loss("regression")
    assert loss(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0])).item() == 4.0
    assert loss(torch.tensor([1.0, 2.0]), torch.tensor([3, 2])).item() == 4.0
    assert loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])).item() == 13.0
    assert loss(torch.tensor([[1.0]]), torch.tensor([[3.0]])).item() == 4.0
    with pytest.raises(ValueError, match=r"labels has shape \(2, 1\) but logits \(2,\)"):
        loss(torch.zeros(2), torch.zeros(2, 1))


def test_task_loss_accepts_integer_multi_labels():
    loss = task_loss("multi-label-classification")
    close(loss(torch.zeros(1, 2), torch.tensor([[1, IGNORE]])), torch.tensor(math.log(2)))


def test_task_loss_can_be_copied_and_pickled():
    for task in KINDS:
        loss = task_loss(task)
        logits, labels = torch.zeros(2, 3), labels_for(task)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert other(logits, labels) == loss(logits, labels)


def test_count_labelled_by_hand():
    ids = torch.tensor([[0, IGNORE, 2], [IGNORE, IGNORE, 1]])
    assert count_labelled(ids, "token-classification").item() == 3
    assert count_labelled(ids[:, 0], "sequence-classification").item() == 1
    assert count_labelled(ids.float(), "multi-label-classification").item() == 3
    assert count_labelled(torch.zeros(4, 2), "regression").item() == 8
    for task in KINDS:
        count = count_labelled(torch.zeros(2, 2), task)
        assert count.shape == () and count.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 5, generator=generator) * 8).to(dtype)
    labels = torch.randint(5, (64,), generator=generator)
    targets = (torch.rand(64, 5, generator=generator) > 0.5).float()
    whole = logits.float()
    pairs = [
        (task_loss("sequence-classification")(logits, labels), F.cross_entropy(whole, labels) * 64),
        (task_loss("regression")(logits, targets), F.mse_loss(whole, targets) * 320),
        (
            task_loss("multi-label-classification")(logits, targets),
            F.binary_cross_entropy_with_logits(whole, targets) * 320,
        ),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        close(ours, theirs)


def test_a_batch_without_a_label_gives_zero_and_no_gradient():
    logits, labels = torch.randn(3, 2, requires_grad=True), torch.full((3,), IGNORE)
    loss = task_loss("sequence-classification")(logits, labels)
    assert loss.item() == 0.0 and count_labelled(labels, "sequence-classification") == 0
    assert torch.all(torch.autograd.grad(loss, logits)[0] == 0)


def test_float_labels_of_classes_are_refused():
    for task in ("sequence-classification", "token-classification"):
        with pytest.raises(TypeError, match=r"labels is torch\.float32.*cast with \.long\(\)"):
            task_loss(task)(torch.zeros(3, 4), torch.zeros(3))


def test_errors_of_options():
    with pytest.raises(ValueError, match=r"label_smoothing.*-0\.1"):
        task_loss("token-classification", label_smoothing=-0.1)
    with pytest.raises(ValueError, match=r"label_smoothing.*1\.5"):
        task_loss("sequence-classification", label_smoothing=1.5)
    for task in ("regression", "multi-label-classification"):
        with pytest.raises(ValueError, match=rf"label_smoothing 0\.1 has no meaning for {task}"):
            task_loss(task, label_smoothing=0.1)
    with pytest.raises(ValueError, match="task='ner': choose one of sequence-classification"):
        task_loss("ner")
    with pytest.raises(ValueError, match="task='encoder': choose"):
        count_labelled(torch.tensor([0, 1]), "encoder")


def test_values_are_not_read_off_the_cpu():
    """On the meta device, which has no values, any read raises: so on a GPU no loss waits for the device."""
    for task in KINDS:
        logits, labels = torch.empty(2, 3, device="meta", requires_grad=True), labels_for(task, "meta")
        task_loss(task)(logits, labels).backward()
        assert count_labelled(labels, task).device.type == "meta"
