"""Transformers folders open with the right head, tokenizer or image settings; no code of theirs runs."""

import json

import huggingface_hub
import pytest
import safetensors.torch
import torch

import tiny_text
from layerwise.errors import ModelError
from layerwise.sources.models import open_model, reopen, takes_texts
from layerwise.sources.opened import TASKS
from tiny_transformers import save_bert, save_gpt2, save_tokenizer, save_vit

pytest.importorskip("transformers")


def test_an_encoder_becomes_a_classifier(tmp_path):
    theirs = save_bert(tmp_path)
    opened = open_model(f"hf:{tmp_path}", num_classes=4)
    assert opened.task == "text_classification"
    assert opened.model(**opened.example_input).logits.shape == (2, 4)
    assert set(opened.replaced_head.modules) == {"bert.pooler.dense", "classifier"}
    assert torch.equal(
        opened.model.bert.embeddings.word_embeddings.weight, theirs.bert.embeddings.word_embeddings.weight
    )
    assert any("are not used (cls.predictions" in note for note in opened.notes)
    assert opened.preprocessing is None
    assert opened.num_classes == 4


def test_a_classifier_keeps_its_head_or_gets_one_for_other_classes(tmp_path):
    theirs = save_bert(tmp_path, "BertForSequenceClassification", num_labels=3)
    opened = open_model(f"hf:{tmp_path}")
    assert (opened.num_classes, opened.replaced_head) == (3, None)
    theirs.eval()
    assert torch.equal(opened.model(**opened.example_input).logits, theirs(**opened.example_input).logits)
    other = open_model(f"hf:{tmp_path}", num_classes=5)
    assert other.replaced_head.modules == ("classifier",)
    assert (other.replaced_head.old_classes, other.replaced_head.new_classes) == (3, 5)
    assert other.model.config.num_labels == 5


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("token_classification", "BertForTokenClassification"),
        ("masked_lm", "BertForMaskedLM"),
        ("causal_lm", "GPT2LMHeadModel"),
    ],
)
def test_other_tasks(tmp_path, task, kind):
    (save_gpt2 if task == "causal_lm" else save_bert)(tmp_path)
    opened = open_model(f"hf:{tmp_path}", task=task)
    assert type(opened.model).__name__ == kind
    assert opened.task == task
    logits = opened.model(**opened.example_input).logits
    assert logits.shape[:2] == opened.example_input["input_ids"].shape
    assert task in TASKS


def test_problem_is_written_to_the_configuration(tmp_path):
    save_bert(tmp_path)
    opened = open_model(f"hf:{tmp_path}", num_classes=3, problem="multi_label_classification")
    assert opened.model.config.problem_type == "multi_label_classification"
    with pytest.raises(ModelError, match="problem is 'multi'; expected one of single_label"):
        open_model(f"hf:{tmp_path}", problem="multi")


def test_a_decoder_without_padding_token_gets_one(tmp_path):
    save_gpt2(tmp_path)
    opened = open_model(f"hf:{tmp_path}", num_classes=2)
    assert opened.tokenizer.pad_token == "[SEP]"
    assert opened.model.config.pad_token_id == 3
    assert any("no padding token" in note for note in opened.notes)
    assert opened.model(**opened.example_input).logits.shape == (2, 2)


def test_an_image_model_brings_its_preprocessing(tmp_path):
    save_vit(tmp_path)
    opened = open_model(f"hf:{tmp_path}", num_classes=3)
    assert opened.task == "image_classification"
    assert opened.preprocessing.crop == opened.preprocessing.resize == (32, 32)
    assert opened.preprocessing.mean == (0.5, 0.5, 0.5)
    assert opened.model(opened.example_input).logits.shape == (1, 3)
    assert opened.tokenizer is None
    assert opened.replaced_head.modules == ("classifier",)


def test_image_settings_are_the_processors_with_the_defaults_of_its_class(tmp_path):
    # A file leaves out what its class has as default; what the transforms cannot do needs preprocessing=.
    save_vit(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    opened = open_model(f"hf:{tmp_path}", input_size=32).preprocessing
    assert (opened.crop, opened.mean, opened.std) == ((32, 32), (0.5,) * 3, (0.5,) * 3)
    file.write_text(json.dumps({"image_processor_type": "MobileViTImageProcessor"}))
    with pytest.raises(ModelError, match=r"do_flip_channel_order.*Pass preprocessing="):
        open_model(f"hf:{tmp_path}")
    assert open_model(f"hf:{tmp_path}", preprocessing=opened).preprocessing == opened


def test_a_grey_image_model_that_does_not_normalise_has_one_channel(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    file = {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**file, "do_normalize": False}))
    assert open_model(f"hf:{tmp_path}").preprocessing.input_size == (1, 28, 28)


def test_random_weights_and_a_file_of_weights(tmp_path):
    theirs = save_bert(tmp_path / "m", "BertForSequenceClassification", num_labels=3).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    random = open_model(f"hf:{tmp_path}/m", pretrained=False)
    assert random.weights == "random"
    assert not torch.equal(random.model.classifier.weight, theirs.classifier.weight)
    opened = open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.safetensors")
    assert torch.equal(opened.model(**opened.example_input).logits, theirs(**opened.example_input).logits)
    with pytest.raises(ModelError, match="is for 3 classes, not 5"):
        open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.safetensors", num_classes=5)
    dropped = open_model(
        f"hf:{tmp_path}/m", weights=tmp_path / "w.safetensors", num_classes=5, mismatched="drop_head"
    )
    assert dropped.replaced_head.modules == ("classifier",)
    assert torch.equal(dropped.model.bert.pooler.dense.weight, theirs.bert.pooler.dense.weight)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_file_of_the_body_goes_under_a_new_head(tmp_path, pooler):
    # as the body's folder does; a pooler that it lacks is new as well, and a lacking layer is refused
    theirs = save_bert(tmp_path / "m", "BertForSequenceClassification", num_labels=2)
    body = {k: v for k, v in theirs.bert.state_dict().items() if pooler or "pooler" not in k}
    torch.save(body, tmp_path / "w.pth")
    opened = open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)
    assert torch.equal(
        opened.model.bert.embeddings.word_embeddings.weight, body["embeddings.word_embeddings.weight"]
    )
    assert opened.replaced_head.modules == (() if pooler else ("bert.pooler.dense",)) + ("classifier",)
    assert "put 'bert.' before the names in w.pth" in opened.notes
    torch.save({k: v for k, v in body.items() if "layer.0." not in k}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"missing in the file \(bert\.encoder\.layer\.0"):
        open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)


def test_a_file_of_a_language_model_goes_under_a_new_head(tmp_path):
    # its own head is told and not used; what the body has not is refused, and so is a body of more layers
    theirs = save_bert(tmp_path / "m", "BertForMaskedLM").state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    opened = open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)
    own = opened.model.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own if name in theirs)
    assert opened.replaced_head.modules == ("bert.pooler.dense", "classifier")
    assert any("tensors of the file are not used (cls.predictions.bias, " in note for note in opened.notes)
    name = "bert.encoder.layer.1.output.dense.bias"
    more = name.replace("layer.1", "layer.2")
    torch.save({**theirs, more: theirs[name]}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"; 8 that the model has not \("):
        open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)


def test_a_file_of_the_body_with_more_than_the_body_goes_under_the_head(tmp_path):
    # what transformers reads itself: counted positions (as in MiniLM's file), a language model's head, and
    # the classifier's own; but not one layer more
    theirs = save_bert(tmp_path / "m", "BertForSequenceClassification", num_labels=3)
    body = theirs.bert.state_dict()
    ids, head = {"embeddings.position_ids": torch.arange(24)[None]}, theirs.classifier.state_dict()
    for more, told in (
        (ids, "1 tensor of the file is not used (bert.embeddings.position_ids)"),
        (
            {"cls.predictions.bias": torch.zeros(30)},
            "1 tensor of the file is not used (cls.predictions.bias)",
        ),
        ({f"classifier.{k}": v for k, v in head.items()}, "loaded 41 tensors of w.pth, matched by name"),
    ):
        torch.save({**body, **more}, tmp_path / "w.pth")
        opened = open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)
        assert all(torch.equal(value, body[name]) for name, value in opened.model.bert.state_dict().items())
        assert {"put 'bert.' before the names in w.pth", told} <= {*opened.notes}
    assert torch.equal(opened.model.classifier.weight, theirs.classifier.weight)
    assert opened.replaced_head is None
    layer = {k.replace("layer.1", "layer.2"): v for k, v in body.items() if "layer.1" in k}
    torch.save({**body, **ids, **layer}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"; 16 that the model has not \(bert\.encoder\.layer\.2"):
        open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)


def test_a_pooler_that_a_classifier_of_images_has_not_is_not_used(tmp_path):
    # an encoder's file has one, and the classifier reads the first token without it
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    theirs = transformers.ViTModel(config)
    theirs.save_pretrained(tmp_path / "m")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "m")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    opened = open_model(f"hf:{tmp_path}/m", weights=tmp_path / "w.pth", num_classes=3)
    assert torch.equal(opened.model.vit.embeddings.cls_token, theirs.embeddings.cls_token)
    assert "2 tensors of the file are not used (pooler.dense.weight, pooler.dense.bias)" in opened.notes


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("bert", "masked_lm")])
def test_a_new_output_layer_of_a_language_model_has_an_output_a_token(tmp_path, family, task):
    # where the folder has the body alone; not as many as the configuration has labels
    tiny_text.save_tiny(tmp_path, family)
    opened = open_model(f"hf:{tmp_path}", task=task)
    assert opened.notes[-1].endswith(f": {tiny_text.VOCABULARY} outputs")


def test_an_encoder_is_no_causal_language_model(tmp_path):
    # it would see the tokens that it is to predict; as a decoder it does not
    torch.manual_seed(7)  # the last token alone hardly changes what this one says at the first
    save_bert(tmp_path)
    with pytest.raises(ModelError, match=r"reads a text in both directions.*--task masked_lm"):
        open_model(f"hf:{tmp_path}", task="causal_lm")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert open_model(f"hf:{tmp_path}", task="causal_lm").task == "causal_lm"


def test_a_folder_without_weights(tmp_path):
    save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(it holds config.json.*pretrained=False"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_weights_of_another_model(tmp_path):
    save_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"do not fit its configuration: 6 tensors of the body"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_damaged_weights(tmp_path):
    save_bert(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ModelError, match="cannot be opened"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    save_bert(tmp_path)
    save_tokenizer(tmp_path, words=[f"w{index}" for index in range(40)])
    with pytest.raises(ModelError, match=r"does not fit its model: its ids go up to 44.*30 embeddings"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_a_tokenizer_that_cannot_pad(tmp_path):
    save_bert(tmp_path)
    tokenizer = save_tokenizer(tmp_path, decoder=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"neither a padding nor an end token.*Set pad_token in its"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_progress_bars_that_were_off_stay_off(tmp_path):
    from transformers.utils import logging

    save_bert(tmp_path)
    logging.disable_progress_bar()
    try:
        open_model(f"hf:{tmp_path}", num_classes=2)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    open_model(f"hf:{tmp_path}", num_classes=2)
    assert logging.is_progress_bar_enabled()


def test_a_configuration_without_a_class_is_told_apart_by_its_kind(tmp_path):
    # an image model by its type; one of sounds is refused, and how to open it is said
    save_vit(tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": None}))
    assert open_model(f"hf:{tmp_path / 'vit'}", num_classes=2).task == "image_classification"
    path.write_text(json.dumps({"model_type": "encodec"}))
    with pytest.raises(ModelError, match=r"a 'encodec' model, which .* no image or text classifier"):
        open_model(f"hf:{tmp_path / 'vit'}", num_classes=2)


def test_a_folder_without_tokenizer(tmp_path):
    save_bert(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        open_model(f"hf:{tmp_path}", num_classes=2)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    save_bert(tmp_path)
    victim = tmp_path / "victim"
    (tmp_path / "evil.py").write_text(
        f"open({str(victim)!r}, 'w')\nfrom transformers import BertConfig\n"
        f"class C(BertConfig):\n  model_type = 'evil'\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="brings its own Python code, which layerwise never runs"):
        open_model(f"hf:{tmp_path}", num_classes=2)
    assert not victim.exists()


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(f"hf:{tmp_path}")
    save_bert(tmp_path / "minilm")
    with pytest.raises(ModelError, match=r"there is no folder.*Did you mean 'minilm'"):
        open_model(f"hf:{tmp_path}/minilmm")


def test_an_unreachable_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'hf:nobody/nothing' could not be downloaded.*give hf:FOLDER"):
        open_model("hf:nobody/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody" / "something").mkdir(parents=True)
    told = r"^there is no folder 'nobody/nothing'\. Did you mean 'something'\?.* could not be downloaded"
    with pytest.raises(ModelError, match=told):
        open_model("hf:nobody/nothing")


def test_a_folder_below_home(monkeypatch, tmp_path):
    # a shell leaves the ~ of hf:~/bert as it is
    monkeypatch.setenv("HOME", str(tmp_path))
    save_bert(tmp_path / "bert")
    assert open_model("hf:~/bert", num_classes=2).num_classes == 2
    assert takes_texts("hf:~/bert")


def test_tasks_that_do_not_fit(tmp_path):
    save_bert(tmp_path)
    with pytest.raises(ModelError, match="task is 'translation'; expected one of"):
        open_model(f"hf:{tmp_path}", task="translation")
    with pytest.raises(ModelError, match="a model for masked_lm has no classes"):
        open_model(f"hf:{tmp_path}", task="masked_lm", num_classes=3)


def test_a_task_that_the_kind_of_model_has_no_class_for(tmp_path):
    # transformers' own message lists all of its classes.
    save_gpt2(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_model(f"hf:{tmp_path}", task="masked_lm")
    assert str(caught.value) == (
        f"the model of 'hf:{tmp_path}' is of a kind that transformers has no AutoModelForMaskedLM for, so it "
        "cannot do the task. Choose another --task (task=), or another model."
    )


def test_a_run_opens_the_same_network_again(tmp_path):
    save_bert(tmp_path)
    opened = open_model(f"hf:{tmp_path}", num_classes=3, problem="multi_label_classification")
    again = reopen(json.loads(json.dumps(opened.to_dict())))
    again.model.load_state_dict(opened.model.state_dict())
    assert again.model.config.problem_type == "multi_label_classification"
    assert torch.equal(again.model(**again.example_input).logits, opened.model(**opened.example_input).logits)


def test_the_longest_text_is_what_model_and_tokenizer_take(tmp_path):
    save_bert(tmp_path / "bert")
    assert open_model(f"hf:{tmp_path}/bert", num_classes=2).max_length == 24
    tokenizer = save_tokenizer(tmp_path / "bert")
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(tmp_path / "bert")
    assert open_model(f"hf:{tmp_path}/bert", num_classes=2).max_length == 12
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=26,
        pad_token_id=0,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    save_tokenizer(tmp_path / "roberta")
    assert open_model(f"hf:{tmp_path}/roberta", num_classes=2).max_length == 25


@pytest.mark.parametrize("family", tiny_text.CONFIGS)
def test_every_family_keeps_its_body_and_names_what_is_new(tmp_path, family):
    folder = tiny_text.save_tiny(tmp_path, family)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    opened = open_model(f"hf:{folder}", num_classes=3)
    assert opened.model(**opened.example_input).logits.shape == (2, 3)
    new = tuple(f"{module}." for module in opened.replaced_head.modules)
    body = f"{opened.model.base_model_prefix}."
    kept = [(n, p) for n, p in opened.model.named_parameters() if not n.startswith(new)]
    assert len(kept) >= len(saved) - 4  # a pooler that the classifier has no use for may stay behind
    for name, parameter in kept:
        assert torch.equal(parameter, saved[name.removeprefix(body)]), name
