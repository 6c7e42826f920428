"""Losses and metrics of the text tasks, against definitions written out and known figures."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import map_by_children
from layerwise.errors import DataError
from layerwise.plans.strategies import full
from layerwise.sources.encoding import IGNORED
from layerwise.training.entities import spans
from layerwise.training.fit import fit
from layerwise.training.text_tasks import MultiLabel, Regression
from layerwise.training.token_tasks import LanguageModelling, TokenClassification

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def count(task, *batches):
    """Return the scores of (output, labels) pairs."""
    metrics = task.metrics()
    for output, labels in batches:
        task.update(metrics, output, {"labels": labels})
    return task.scores(metrics)


def one_hot(rows, width):
    """Return logits whose argmax is `rows`."""
    return 9.0 * F.one_hot(torch.tensor(rows), width).float()


# ---------------------------------------------------------------------------------------------- multi-label


def test_multi_label_loss_is_binary_cross_entropy_of_each_output():
    task, logits = MultiLabel(("a", "b", "c")), torch.randn(4, 3)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    p = logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), expected)
    torch.testing.assert_close(task.loss(logits, {"labels": labels.float()}), expected)


def test_multi_label_metrics_by_hand():
    # a: 1 right of 2 named and 1 there; b: nothing named of 1 there; both rows together: 1 of 2 exact.
    task = MultiLabel(("a", "b"))
    logits = torch.tensor([[5.0, -5.0], [5.0, -5.0]])
    scores = count(task, (logits[:1], torch.tensor([[1, 0]])), (logits[1:], torch.tensor([[0, 1]])))
    assert scores.values["exact_match"] == pytest.approx(0.5)
    assert scores.values["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores.values["micro_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert [row["samples"] for row in scores.tables["per_class"]] == [1, 1]
    assert scores.tables["per_class"][0]["precision"] == 0.5


def test_multi_label_decodes_what_reaches_the_threshold():
    decoded = MultiLabel(("a", "b"), threshold=0.6).decode(torch.tensor([[0.0, 3.0]]))
    assert decoded[0]["labels"] == ["b"]
    assert decoded[0]["probabilities"]["a"] == pytest.approx(0.5)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_multi_label_metrics_and_predictions_are_of_one_mind(threshold):
    # A probability of exactly the threshold is on, in both: float32 of 0.3 is a little above 0.3.
    task = MultiLabel(("a", "b"), threshold=threshold)
    output = torch.tensor([threshold, 0.1]).logit()[None]
    assert float(output.sigmoid()[0, 0]) == float(torch.tensor(threshold))
    on = [[float(name in row["labels"]) for name in task.classes] for row in task.decode(output)]
    assert on == [[1.0, 0.0]]
    assert count(task, (output, torch.tensor(on))).values["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("output", "labels", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), "expected \\[N, 2\\]"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), "expected \\[2, 2\\]"),
        (torch.zeros(2, 2), torch.full((2, 2), 3.0), "go from 3.0 to 3.0"),
    ],
)
def test_multi_label_refuses_what_does_not_fit(output, labels, words):
    with pytest.raises(DataError, match=words):
        MultiLabel(("a", "b")).check(output, {"labels": labels})


# ----------------------------------------------------------------------------------------------- regression


def test_regression_learns_standardised_and_reports_in_the_own_unit():
    # A prediction one standard deviation off is a loss of 1, and an error of one unit of the data.
    labels = torch.tensor([1000.0, 3000.0])
    task = Regression.fitted(labels)
    assert (task.mean, task.scale) == ((2000.0,), (1000.0,))
    output = torch.tensor([[0.0], [0.0]])  # both predicted as the mean
    assert float(task.loss(output, {"labels": labels})) == pytest.approx(1.0)
    scores = count(task, (output, labels))
    assert scores.values["rmse"] == pytest.approx(1000.0)
    assert scores.values["mae"] == pytest.approx(1000.0)
    assert scores.values["r2"] == pytest.approx(0.0)
    assert scores.values["pearson"] == 0.0  # not defined for equal predictions
    assert task.decode(torch.tensor([[2.0]])) == [{"value": 4000.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_keeps_numbers_far_from_zero_apart(dtype):
    # Years in bfloat16 and seconds since 1970 in float32 are rounded only once they are standardised.
    for labels in (torch.tensor([1987.0, 1990.0, 1993.0]), 1.7e9 + torch.tensor([0, 1, 2]).double()):
        exact = (labels.double() - labels.double().mean()) / labels.double().std(correction=0)
        loss = Regression.fitted(labels).loss(torch.zeros(3, 1, dtype=dtype), {"labels": labels})
        assert float(loss) == pytest.approx(float((exact**2).mean()), rel=1e-5)


def test_regression_metrics_equal_their_definitions():
    # Against numpy's own formulas, over two batches and two numbers a sample.
    import numpy as np

    torch.manual_seed(0)
    labels, output = torch.randn(20, 2), torch.randn(20, 2)
    scores = count(Regression(("x", "y")), (output[:7], labels[:7]), (output[7:], labels[7:]))
    y, p = labels.double().numpy(), output.double().numpy()
    rmse = np.sqrt(((y - p) ** 2).mean(0))
    r2 = 1 - ((y - p) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    pearson = [np.corrcoef(y[:, i], p[:, i])[0, 1] for i in range(2)]
    assert scores.values["rmse"] == pytest.approx(rmse.mean(), rel=1e-5)
    assert scores.values["r2"] == pytest.approx(r2.mean(), rel=1e-4)
    assert scores.values["pearson"] == pytest.approx(np.mean(pearson), rel=1e-4)
    assert scores.tables["per_number"][1]["rmse"] == pytest.approx(rmse[1], abs=1e-5)


def test_regression_of_a_single_sample_has_finite_scores():
    # run.json holds no NaN; a validation set of one sample must not end the run.
    scores = count(Regression(), (torch.tensor([[1.0]]), torch.tensor([3.0])))
    assert scores.values["rmse"] == pytest.approx(2.0)
    assert all(math.isfinite(value) for value in scores.values.values())


@pytest.mark.parametrize(("value", "samples"), [(2.0, 2), (0.1, 3), (1e9 + 0.1, 7)])
def test_regression_refuses_a_constant_column(value, samples):
    # The deviation of three times 0.1 is 1e-17: rounding, by which no number can be divided.
    with pytest.raises(DataError, match="'price' is the same in all samples"):
        Regression.fitted(torch.full((samples,), value, dtype=torch.float64), ("price",))


def test_regression_refuses_labels_that_are_not_finite():
    with pytest.raises(DataError, match="not all finite"):
        Regression().check(torch.zeros(2, 1), {"labels": torch.tensor([1.0, float("nan")])})


# -------------------------------------------------------------------------------------- token classification


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-a I-a", [("a", 0, 2)]),
        ("B-a B-a", [("a", 0, 1), ("a", 1, 2)]),
        ("I-a I-a O I-a", [("a", 0, 2), ("a", 3, 4)]),  # no B: still entities, as conlleval counts
        ("B-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("O B-a", [("a", 1, 2)]),  # ends with the sequence
        ("B-x-y I-x-y", [("x-y", 0, 2)]),  # a type may hold a hyphen
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_entity_f1_equals_the_published_example():
    # The example in seqeval's README: one of two entities right, one named too long: F1 0.50.
    tags = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER")
    true = [[0, 0, 0, 1, 2, 2, 0], [3, 4, 0, IGNORED, IGNORED, IGNORED, IGNORED]]
    guess = [[0, 0, 1, 2, 2, 2, 0], [3, 4, 0, 1, 1, 1, 1]]
    task = TokenClassification(tags)
    scores = count(task, (one_hot(guess, 5), torch.tensor(true)))
    assert scores.values["entity_f1"] == pytest.approx(0.5)
    per_class = {row["class"]: row for row in scores.tables["per_class"]}
    assert per_class["PER"]["f1"] == 1.0
    assert per_class["MISC"]["f1"] == 0.0
    assert task.monitor == "entity_f1"


def test_entities_are_counted_over_words_not_pieces():
    # Pieces of a word that are not scored stand between the scored tags and must not end an entity.
    labels = torch.tensor([[IGNORED, 1, IGNORED, 2, 0, IGNORED]])
    scores = count(TokenClassification(TAGS), (one_hot([[0, 1, 0, 2, 0, 0]], 5), labels))
    assert scores.values["entity_f1"] == 1.0
    assert scores.values["accuracy"] == 1.0


def test_entity_counts_add_up_over_batches():
    # Micro F1 of a data set is not the mean of the batches' F1.
    task = TokenClassification(TAGS)
    first = (one_hot([[1, 0, 3]], 5), torch.tensor([[1, 0, 3]]))  # two of two
    second = (one_hot([[0, 0, 0]], 5), torch.tensor([[0, 1, 0]]))  # none of one
    scores = count(task, first, second)
    assert scores.values["entity_precision"] == 1.0
    assert scores.values["entity_recall"] == pytest.approx(2 / 3)


def test_token_loss_is_a_mean_over_scored_tokens_only():
    task, logits = TokenClassification(TAGS), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 4]])
    picked = [
        logits[0, 0].log_softmax(-1)[1],
        logits[0, 2].log_softmax(-1)[2],
        logits[1, 2].log_softmax(-1)[4],
    ]
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), -torch.stack(picked).mean())
    assert task.size({"labels": labels}) == 3


@pytest.mark.parametrize("task", [TokenClassification(TAGS), LanguageModelling()], ids=lambda task: task.name)
def test_integers_of_any_width_are_labels_of_tokens(task):
    # torch's loss takes int64 alone.
    output, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORED, 2], [0, 4, 3]])
    assert torch.equal(task.loss(output, {"labels": labels.int()}), task.loss(output, {"labels": labels}))
    assert count(task, (output, labels.int())) == count(task, (output, labels))


def test_plain_tags_are_judged_by_token():
    # Parts of speech have no entities.
    task = TokenClassification(("NOUN", "VERB"))
    scores = count(task, (one_hot([[0, 1, 1]], 2), torch.tensor([[0, 1, 0]])))
    assert task.monitor == "macro_f1"
    assert scores.values["accuracy"] == pytest.approx(2 / 3)
    assert "entity_f1" not in scores.values


def test_mixed_tags_are_refused():
    with pytest.raises(DataError, match="'PER' are not BIO"):
        TokenClassification(("O", "B-PER", "PER"))


def test_token_labels_out_of_range_are_refused():
    with pytest.raises(DataError, match="go from 0 to 7"):
        TokenClassification(TAGS).check(torch.zeros(1, 2, 5), {"labels": torch.tensor([[0, 7]])})


# ---------------------------------------------------------------------------------------- language modelling


def test_causal_loss_and_perplexity_equal_a_loop_over_positions():
    # The output at a position speaks of the next token; prompt tokens (-100) are not scored.
    torch.manual_seed(0)
    task, logits = LanguageModelling(), torch.randn(2, 4, 7)
    labels = torch.tensor([[IGNORED, 3, 5, 1], [2, 6, IGNORED, IGNORED]])
    nll = [
        -logits[row, at].log_softmax(-1)[labels[row, at + 1]]
        for row in range(2)
        for at in range(3)
        if labels[row, at + 1] != IGNORED
    ]
    mean = torch.stack(nll).mean()
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), mean)
    assert task.size({"labels": labels}) == len(nll) == 4
    scores = count(task, (logits[:1], labels[:1]), (logits[1:], labels[1:]))
    assert scores.values["perplexity"] == pytest.approx(math.exp(float(mean)), rel=1e-5)


def test_a_uniform_model_hesitates_between_all_tokens():
    scores = count(LanguageModelling(), (torch.zeros(3, 5, 11), torch.randint(11, (3, 5))))
    assert scores.values["perplexity"] == pytest.approx(11.0, rel=1e-5)


def test_causal_loss_equals_that_of_transformers():
    # The same shift as transformers' own loss.
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(13, (2, 9))
    labels = ids.clone()
    labels[:, :3] = IGNORED
    theirs = model(input_ids=ids, labels=labels).loss
    batch = {"input_ids": ids, "labels": labels}
    task = LanguageModelling()
    torch.testing.assert_close(task.loss(task.forward(model, batch), batch), theirs)


def test_masked_loss_looks_at_the_same_position():
    task, logits = LanguageModelling("masked_lm"), torch.randn(1, 3, 7)
    labels = torch.tensor([[IGNORED, 4, IGNORED]])
    expected = -logits[0, 1].log_softmax(-1)[4]
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), expected)


def test_a_batch_without_scored_tokens_has_loss_zero_and_a_gradient():
    # Prompts cut before their answers must not turn the weights into NaN.
    logits = torch.randn(1, 3, 7, requires_grad=True)
    loss = LanguageModelling().loss(logits, {"labels": torch.full((1, 3), IGNORED)})
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_first_batch_of_prompts_only_is_refused():
    with pytest.raises(DataError, match="no token of the first batch is scored"):
        LanguageModelling().check(torch.zeros(1, 3, 7), {"labels": torch.full((1, 3), IGNORED)})


# ------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("task", "output", "labels"),
    [
        (TokenClassification(("O",)), torch.zeros(2, 3, 1), torch.zeros(2, 3).long()),
        (MultiLabel(("O",)), torch.zeros(2, 1), torch.zeros(2, 1)),
    ],
)
def test_one_tag_or_label_is_nothing_to_tell_apart(task, output, labels):
    # Said before training, and not by torchmetrics, which names no task.
    with pytest.raises(DataError, match=r"there is one (tag|label) \(O\); expected at least two"):
        task.check(output, {"labels": labels})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mean": (1.0,)}, "mean has 1 values for 2 numbers"),
        ({"scale": (1.0, 0.0)}, r"scale is \(1.0, 0.0\); expected finite numbers above 0"),
        ({"mean": (1.0, math.nan)}, r"mean is \(1.0, nan\); expected finite numbers\."),
    ],
)
def test_regression_refuses_a_mean_or_scale_that_is_none(options, told):
    # Dividing by 0 would make every prediction NaN.
    with pytest.raises(DataError, match=told):
        Regression(("x", "y"), **options)


@pytest.mark.parametrize(
    ("task", "output", "labels", "told"),
    [
        (Regression(), torch.zeros(2, 1), torch.zeros(3), r"float32 of shape \(3,\); expected \[2, 1\]"),
        (Regression(), torch.zeros(2, 1), [0.0, 1.0], r"labels are a list; expected \[2, 1\]"),
        (
            TokenClassification(TAGS),
            torch.zeros(2, 5),
            torch.zeros(2),
            r"has shape \(2, 5\); expected \[N, tokens, 5\]. Open the model for this task",
        ),
        (
            TokenClassification(TAGS),
            torch.zeros(2, 3, 5),
            torch.zeros(2),
            r"float32 of shape \(2,\); expected integers \[2, 3\]",
        ),
        (
            LanguageModelling(),
            torch.zeros(2, 5),
            torch.zeros(2),
            r"has shape \(2, 5\); expected \[N, tokens, vocabulary\]",
        ),
        (LanguageModelling(), torch.zeros(2, 3, 7), None, r"labels are a NoneType; expected integers"),
    ],
)
def test_outputs_and_labels_that_do_not_fit_are_told(task, output, labels, told):
    # What came, and what the task expects.
    with pytest.raises(DataError, match=told):
        task.check(output, {"labels": labels})


@pytest.mark.parametrize("task", [TokenClassification(TAGS), LanguageModelling()])
def test_a_batch_in_which_nothing_is_scored_does_not_count(task):
    # Its mean would be 0 / 0, and the metrics of the others with it.
    torch.manual_seed(0)
    width = len(TAGS)
    scored = (torch.randn(2, 4, width), torch.randint(width, (2, 4)))
    ignored = (torch.randn(2, 4, width), torch.full((2, 4), IGNORED))
    assert count(task, scored, ignored).values == count(task, scored).values


def test_token_tasks_train_on_plain_data_sets(tmp_path):
    # Samples of equal length, without a collator of their own: stacked by the task.
    class Tagger(nn.Module):
        def __init__(self, width):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, width)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    ids = torch.arange(40).reshape(10, 4) % 5
    for task, width in ((TokenClassification(TAGS), 5), (LanguageModelling(), 5)):
        samples = [{"input_ids": row, "labels": row} for row in ids]
        model = Tagger(width)
        layers = map_by_children(model)
        plan = full(layers, epochs=8)
        options = {"task": task, "layers": layers, "lr": 0.1, "cache": "off", "progress": False}
        result = fit(model, samples, samples, plan=plan, **options)
        assert result.metrics["loss"] < 0.2
