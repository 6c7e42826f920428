"""Saving a tuned model as a transformers folder, and moving a body between two heads."""

import pytest
import torch
from torch import nn

from layerwise.errors import ModelError, RunError
from layerwise.training.classification import Classification
from layerwise.training.text_tasks import MultiLabel, Regression
from layerwise.training.token_tasks import TokenClassification
from layerwise.training.transformers_folder import move_body, save_transformers
from layerwise.tuning.modes import pin_eval
from tiny_text import CONFIGS, tiny_model, tiny_tokenizer

transformers = pytest.importorskip("transformers")
NAMES = ("cars", "food", "sport")


@pytest.mark.parametrize("family", CONFIGS)
def test_from_pretrained_gives_the_same_model(family, tmp_path):
    # What others load computes what we trained, bit for bit, and knows the names of the classes.
    model = tiny_model(family, num_labels=3)
    tokenizer = tiny_tokenizer()
    folder = save_transformers(
        model, tmp_path / "a" / "b", tokenizer=tokenizer, task=Classification(NAMES, "text_classification")
    )
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["red engine of the road", "flour and sugar"]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert loaded.config.problem_type == "single_label_classification"


def test_a_model_with_pinned_modules_is_saved(tmp_path):
    # fit may leave frozen modules pinned; that must not show in the folder.
    model = tiny_model("bert", num_labels=3)
    pin_eval(model.bert.modules())
    folder = save_transformers(model, tmp_path / "x")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    assert all(module.training for module in loaded.modules())


@pytest.mark.parametrize(
    ("task", "kind", "problem"),
    [
        (MultiLabel(NAMES), "SequenceClassification", "multi_label_classification"),
        (Regression(("price",), (3.0,), (2.0,)), "SequenceClassification", "regression"),
        (TokenClassification(("O", "B-x", "I-x")), "TokenClassification", None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_configuration_tells_the_task(task, kind, problem, tmp_path):
    model = tiny_model("bert", kind, num_labels=len(task.classes))
    config = transformers.AutoConfig.from_pretrained(save_transformers(model, tmp_path / "x", task=task))
    assert list(config.id2label.values()) == list(task.classes)
    assert config.problem_type == problem
    if task.name == "regression":
        assert config.task_specific_params["regression"] == {"mean": [3.0], "scale": [2.0]}


def test_an_existing_folder_is_replaced_whole(tmp_path):
    # A resumed run writes its folder again; nothing of the old one may stay.
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "old.bin").write_text("old")
    save_transformers(tiny_model("bert"), folder)
    assert not (folder / "old.bin").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        save_transformers(nn.Linear(2, 2), tmp_path / "x")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "MaskedLM"),
        ("roberta", "MaskedLM"),
        ("deberta", "MaskedLM"),
        ("modernbert", "MaskedLM"),
        ("gpt2", "CausalLM"),
        ("llama", "CausalLM"),
        ("qwen", "CausalLM"),
    ],
)
def test_the_whole_body_moves_and_nothing_else(family, kind):
    # The classifier's hidden states become the language model's; its head and pooler stay.
    source = tiny_model(family, kind, seed=1)
    target = tiny_model(family, num_labels=3, seed=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    moved = move_body(source, target)
    ids = torch.randint(5, 30, (2, 7))
    with torch.no_grad():
        theirs = source.base_model(input_ids=ids)[0]
        assert torch.equal(target.base_model(input_ids=ids)[0], theirs)
    prefix = target.base_model_prefix + "."
    for name, value in target.state_dict().items():
        own = not name.startswith(prefix) or name.removeprefix(prefix) in moved.kept
        assert torch.equal(value, before[name]) == own or not value.any() or bool((value == 1).all()), name
    assert all("pooler" in name for name in moved.kept)
    assert moved.left == ()


def test_bodies_of_other_shapes_are_refused():
    with pytest.raises(ModelError, match="differ in shape"):
        move_body(tiny_model("bert", "MaskedLM", intermediate_size=32), tiny_model("bert"))
    with pytest.raises(ModelError, match="no tensor has the same name"):
        move_body(tiny_model("gpt2", "CausalLM"), tiny_model("bert"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    # A file stands where the folder should go.
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"transformers folder .*file/model could not be written: "):
        save_transformers(tiny_model("bert", num_labels=3), tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_body_moves_between_transformers_models_only():
    # Which of the two is none is told.
    model = tiny_model("bert", num_labels=3)
    for source, target, name in ((nn.Linear(1, 1), model, "source"), (model, nn.Linear(1, 1), "target")):
        with pytest.raises(ModelError, match=f"{name} is a Linear, not a transformers model"):
            move_body(source, target)
