"""Tasks by their names in ``run.json``, and the one that a first batch speaks for."""

import json

import pytest
import torch

from layerwise.errors import DataError
from layerwise.training.classification import Classification
from layerwise.training.known_tasks import TASKS, infer_task, is_known, task_from_dict
from layerwise.training.text_tasks import MultiLabel, Regression
from layerwise.training.token_tasks import LanguageModelling, TokenClassification

CLASSES = ("ant", "bee", "cat")
ALL = [
    Classification(CLASSES),
    Classification(CLASSES, "text_classification", class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1),
    MultiLabel(("a", "b"), threshold=0.3),
    Regression(("x", "y"), mean=(1.0, 2.0), scale=(3.0, 4.0)),
    TokenClassification(("O", "B-PER", "I-PER", "B-LOC", "I-LOC")),
    LanguageModelling(),
    LanguageModelling("masked_lm"),
]


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_a_task_comes_back_from_json(task):
    # run.json is all that a saved run knows of its task.
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_every_task_is_in_the_table():
    # A run of any task must be readable by load_run, which looks into TASKS.
    assert [task.name for task in ALL] == list(TASKS)
    assert all(is_known(task) for task in ALL)


def test_an_unknown_name_is_told_with_the_close_one() -> None:
    # A run of a later layerwise, or an edited one.
    with pytest.raises(DataError, match="Did you mean 'text_classification'"):
        task_from_dict({"name": "text_clasification"})
    with pytest.raises(DataError, match=r"the task 'regression' .*'robust'.* version"):
        task_from_dict({**Regression().to_dict(), "robust": True})
    with pytest.raises(DataError, match=r"task \[\] is not known"):
        task_from_dict({"name": []})


def test_the_first_batch_tells_the_task() -> None:
    # A pair is images, a mapping with labels is text; float labels are no classification.
    pair = infer_task((torch.zeros(2, 3), torch.tensor([0, 1])), classes=None, outputs=3)
    assert (pair.name, pair.classes) == ("image_classification", ("0", "1", "2"))
    mapping = {"input_ids": torch.zeros(2, 5), "labels": torch.tensor([0, 1])}
    assert infer_task(mapping, classes=CLASSES, outputs=3).name == "text_classification"
    assert infer_task(mapping, classes=[7, 8, 9], outputs=3).classes == ("7", "8", "9")
    with pytest.raises(DataError, match=r"float32.*text_tasks: task=MultiLabel.*Regression.fitted"):
        infer_task((torch.zeros(2, 3), torch.zeros(2)), classes=None, outputs=3)
