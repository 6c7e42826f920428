"""A classification task: loss, metrics against scikit-learn, and messages for what does not fit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.errors import DataError
from layerwise.training.classification import Classification
from layerwise.training.data import open_batches
from layerwise.training.evaluate import evaluate

CLASSES = ("ant", "bee", "cat")


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 3, generator=generator), torch.randint(0, 3, (40,), generator=generator)


def test_metrics_agree_with_scikit_learn() -> None:
    # Accuracy, balanced accuracy, macro F1, per-class scores and confusion, counted over two batches.
    metrics = pytest.importorskip("sklearn.metrics")
    output, labels = predictions()
    task = Classification(CLASSES)
    counted = task.metrics()
    for part in (slice(0, 32), slice(32, 40)):
        task.update(counted, output[part], (None, labels[part]))
    scores = task.scores(counted)
    predicted = output.argmax(1)
    assert scores.values["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert scores.values["balanced_accuracy"] == pytest.approx(
        metrics.balanced_accuracy_score(labels, predicted)
    )
    assert scores.values["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert scores.tables["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted)
    for i, row in enumerate(scores.tables["per_class"]):
        assert row["class"] == CLASSES[i]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(
            (precision[i], recall[i], f1[i]), abs=1e-5
        )
        assert row["samples"] == support[i]


def test_a_class_without_samples_does_not_lower_balanced_accuracy() -> None:
    # As scikit-learn: it is the mean recall of the classes that are there, though all are predicted.
    metrics = pytest.importorskip("sklearn.metrics")
    output, labels = predictions()
    labels = labels.clamp(max=1)
    task = Classification(CLASSES)
    counted = task.metrics()
    task.update(counted, output, (None, labels))
    predicted = output.argmax(1)
    assert set(predicted.tolist()) == {0, 1, 2}
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = metrics.balanced_accuracy_score(labels, predicted)
    assert task.scores(counted).values["balanced_accuracy"] == pytest.approx(expected)


def test_loss_is_cross_entropy_with_the_task_s_options() -> None:
    # Weights and smoothing reach the loss; without them it is plain cross-entropy.
    output, labels = predictions()
    batch = (None, labels)
    assert torch.equal(Classification(CLASSES).loss(output, batch), F.cross_entropy(output, labels))
    task = Classification(CLASSES, class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1)
    expected = F.cross_entropy(output, labels, torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    assert torch.equal(task.loss(output, batch), expected)
    assert not torch.equal(expected, F.cross_entropy(output, labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("class_weights", [None, (0.0, 3.0)])
def test_integers_of_any_width_are_labels(
    dtype: torch.dtype, class_weights: tuple[float, ...] | None
) -> None:
    # torch's loss takes int64 and uint8 alone, and as an index uint8 and bool choose where they are not 0.
    output, labels = torch.randn(5, 2), torch.tensor([1, 0, 1, 1, 0])
    task = Classification(("ant", "bee"), class_weights=class_weights)
    task.check(output, (None, labels.to(dtype)))
    assert torch.equal(task.loss(output, (None, labels.to(dtype))), task.loss(output, (None, labels)))
    assert task.size((None, labels.to(dtype))) == task.size((None, labels))


def test_a_batch_of_classes_without_weight_has_loss_zero_and_a_gradient() -> None:
    # Torch's weighted mean of it is 0 / 0, which looked like training that diverged.
    output = torch.randn(4, 3, requires_grad=True)
    task = Classification(CLASSES, class_weights=(0.0, 1.0, 2.0), label_smoothing=0.1)
    loss = task.loss(output, (None, torch.zeros(4, dtype=torch.long)))
    loss.backward()
    assert loss == 0
    assert torch.equal(output.grad, torch.zeros(4, 3))


def test_a_class_of_weight_zero_is_left_out_with_smoothed_labels_too() -> None:
    # torch weighs only the true class's part by it; the smoothed rest pulled towards the other classes.
    output, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    task = Classification(CLASSES, class_weights=(0.0, 1.0, 2.0), label_smoothing=0.1)
    loss = task.loss(output, (None, labels))
    loss.backward()
    kept = labels > 0
    expected = F.cross_entropy(output[kept], labels[kept], torch.tensor([0.0, 1.0, 2.0]), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert not output.grad[~kept].any()


@pytest.mark.parametrize(
    ("output", "labels", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 1]), r"shape \(2, 5\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels go from 0 to 3"),
        (torch.zeros(2, 3), torch.zeros(2), "torch.float32"),
    ],
)
def test_what_does_not_fit_together_is_told(output: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    # Width of the output, range and kind of the labels; in the first batch and in any later one.
    task = Classification(CLASSES)
    with pytest.raises(DataError, match=message):
        task.check(output, (None, labels))
    task.check(torch.zeros(2, 3), (None, torch.tensor([0, 2])))


def test_a_label_out_of_range_in_a_late_batch_is_told() -> None:
    # torch's own message names neither the classes nor the label.
    with pytest.raises(DataError, match="labels go from 0 to 3; expected 0 to 2"):
        Classification(CLASSES).loss(torch.zeros(2, 3), (None, torch.tensor([0, 3])))


def test_predictions_are_readable() -> None:
    # The likeliest label, its probability, and all of them, which add up to 1.
    (row,) = Classification(CLASSES).decode(torch.tensor([[0.0, 2.0, 1.0]]))
    assert row["label"] == "bee"
    assert row["probability"] == pytest.approx(row["probabilities"]["bee"])
    assert sum(row["probabilities"].values()) == pytest.approx(1.0)


def test_evaluate_changes_nothing_and_averages_over_samples() -> None:
    # Loss is the mean over samples even with a smaller last batch; modes and statistics stay.
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    x, y = torch.randn(10, 4), torch.randint(0, 3, (10,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = torch.utils.data.TensorDataset(x, y)
    scores = evaluate(model, open_batches(data, train=False, batch_size=4), Classification(CLASSES))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    expected = F.cross_entropy(model.eval()(x), y).detach()
    assert scores.values["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_one_class_is_nothing_to_tell_apart() -> None:
    # Said before training, not by the metrics after it.
    with pytest.raises(DataError, match=r"there is one class \(only\); expected at least two"):
        Classification(("only",)).check(torch.zeros(4, 1), (torch.zeros(4, 3), torch.zeros(4).long()))
