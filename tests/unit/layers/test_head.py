"""Replacing output layers that were found, not named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layer_nets import SmallResNet, Texts, image
from layerwise import layer_map, replace_head
from layerwise.errors import ModelError


def test_linear_head_is_replaced_and_the_rest_untouched() -> None:
    # a new layer of the same class, on the same device, in the same precision, that learns
    model = SmallResNet().double().requires_grad_(False).eval()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    change = replace_head(model, 7, example_input=image().double())
    assert change.modules == ("fc",)
    assert (change.old_classes, change.num_classes, change.in_features) == (5, 7, (8,))
    assert model.fc.weight.shape == (7, 8)
    assert model.fc.weight.dtype == torch.float64
    assert model.fc.weight.requires_grad
    assert not model.fc.training
    changed = {n for n, p in model.named_parameters() if id(p) != before[n]}
    assert changed == {"fc.weight", "fc.bias"}
    assert model(image().double()).shape == (2, 7)


def test_new_weights_come_from_the_global_generator() -> None:
    # the same seed gives the same new head, another one another
    heads = []
    for seed in (0, 0, 1):
        model = SmallResNet()
        torch.manual_seed(seed)
        replace_head(model, 3)
        heads.append(model.fc.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_input_is_derived_as_for_the_layer_map() -> None:
    # where what the first linear layer tells does not do, the first embedding does
    model = Texts()
    assert replace_head(model, 7).modules == ("out",)
    assert model.out.out_features == 7


def test_convolution_head() -> None:
    # SqueezeNet and segmentation models end in a 1x1 convolution
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False), nn.AdaptiveAvgPool2d(1)
    )
    assert replace_head(net, 4).modules == ("2",)
    assert net[2].weight.shape == (4, 8, 1, 1)
    assert net[2].bias is None
    assert net(image()).shape == (2, 4, 1, 1)


def test_timm_head_and_its_num_classes() -> None:
    # the attribute that timm reads follows
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", num_classes=11, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    change = replace_head(model, 3)
    assert change.modules == ("head.fc",)
    assert model.num_classes == 3
    assert "num_classes" in change.attributes
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_both_heads_of_a_distilled_model() -> None:
    # two output layers of one size are replaced together
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    assert replace_head(model, 3).modules == ("head", "head_dist")
    assert model.head.out_features == model.head_dist.out_features == 3


class LabelsEachStep(nn.Module):
    """Gives each step of a series a class, and in training once more from the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.aux = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 1), nn.Conv1d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.body(x).relu()
        return (self.out(x), self.aux(x)) if self.training else self.out(x)


def test_an_auxiliary_layer_of_any_kind_that_can_be_replaced_follows() -> None:
    """One that was left would still have the old number of outputs in training."""
    model = LabelsEachStep()
    assert replace_head(model, 2, example_input=torch.zeros(2, 3, 16)).auxiliary == ("aux",)
    assert [out.shape[1] for out in model.train()(torch.zeros(2, 3, 16))] == [2, 2]


def test_auxiliary_classifiers_follow() -> None:
    # GoogLeNet's extra classifiers run in training only, and must agree with the labels then
    models = pytest.importorskip("torchvision.models")
    model = models.googlenet(init_weights=False)
    change = replace_head(model, 3)
    assert change.modules == ("fc",)
    assert change.auxiliary == ("aux1.fc2", "aux2.fc2")
    assert model.aux1.fc2.out_features == 3


def test_transformers_head_and_its_configuration() -> None:
    # num_labels, id2label and label2id follow; the loss is computed over the new classes
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.RobertaForSequenceClassification(config).eval()
    change = replace_head(model, 3, class_names=["good", "bad", "ugly"])
    assert change.modules == ("classifier.out_proj",)
    assert model.config.num_labels == model.num_labels == 3
    assert model.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
    ids = torch.tensor([[0, 5, 6, 2]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([2]))
    assert output.logits.shape == (1, 3)
    assert torch.isfinite(output.loss)


def test_a_wrapped_model_gets_the_new_head_inside() -> None:
    # the wrapper keeps working
    wrapped = nn.DataParallel(SmallResNet())
    replace_head(wrapped, 3, example_input=image())
    assert wrapped.module.fc.out_features == 3


def test_layer_under_two_names_is_replaced_under_both() -> None:
    # a shared output layer stays shared
    model = SmallResNet()
    model.alias = model.fc
    replace_head(model, 3)
    assert model.alias is model.fc
    assert model.fc.out_features == 3


def test_meta_model_stays_on_meta() -> None:
    # a head for a model without data has none either
    model = SmallResNet().to("meta")
    replace_head(model, 3)
    assert model.fc.weight.is_meta


def test_heads_of_different_sizes_need_a_choice() -> None:
    # the message lists them, nothing is changed, and naming one replaces that one
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.kind, self.box = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.body(x)
            return self.kind(x), self.box(x)

    model = Tasks()
    with pytest.raises(ModelError, match=r"kind \(3 outputs\), box \(4 outputs\).*outputs="):
        replace_head(model, 6)
    assert model.kind.out_features == 3
    assert replace_head(model, 6, outputs=["kind", "kind"]).modules == ("kind",)
    assert (model.kind.out_features, model.box.out_features) == (6, 4)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (0, {}, "at least 1"),
        (2.0, {}, r"num_classes is 2\.0; expected a whole number of at least 1"),
        ("3", {}, "num_classes is '3'; expected a whole number"),
        (True, {}, "num_classes is True; expected a whole number"),
        (3, {"class_names": ["a"]}, "1 class_names were given for 3"),
        (3, {"class_names": ["a", "b", "a"]}, "class_names: 'a' names outputs 0 and 2; expected a name of"),
        (3, {"outputs": ["fcc"]}, "no module of SmallResNet.*Did you mean 'fc'"),
        (3, {"outputs": ["bn1"]}, "is a BatchNorm2d; expected nn.Linear"),
    ],
)
def test_bad_requests(classes: Any, options: dict[str, object], message: str) -> None:
    # each gets one message
    with pytest.raises(ModelError, match=message):
        replace_head(SmallResNet(), classes, **options)  # type: ignore[arg-type]


def test_models_without_a_replaceable_head() -> None:
    # none, a tied one and a bare parameter are told apart
    headless = SmallResNet()
    headless.fc = nn.Identity()
    with pytest.raises(ModelError, match="no output layer was found"):
        replace_head(headless, 3)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.decoder.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.embed(ids))

    with pytest.raises(ModelError, match="tied"):
        replace_head(Tied(), 3)

    class Mirrored(nn.Module):  # an autoencoder that decodes by the encoder's weights
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.first(x).relu()).relu()
            for layer in (self.second, self.first):
                x = nn.functional.linear(x, layer.weight.T)
            return x

    with pytest.raises(ModelError, match="'first' also runs earlier"):
        replace_head(Mirrored(), 3)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.projection = nn.Parameter(torch.zeros(8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).relu() @ self.projection

    with pytest.raises(ModelError, match="bare parameter 'projection'"):
        replace_head(Bare(), 3)
    assert layer_map(Bare()).head.name == "projection"  # type: ignore[union-attr]


def test_a_normalised_output_layer_is_not_replaced_by_a_plain_one() -> None:
    # its normalisation would be lost in silence
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), norm(nn.Linear(8, 5)))
        with pytest.raises(ModelError, match="makes its weight of others"):
            replace_head(model, 3)
        assert model(torch.zeros(2, 4)).shape == (2, 5)


def test_a_layer_that_is_called_as_torchs_is_told_with_its_home() -> None:
    # "is a Linear; expected nn.Linear" tells nothing (torch_geometric, deepctr)
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    with pytest.raises(ModelError, match=r"is a \S*test_head\.Linear; expected nn\.Linear"):
        replace_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Linear()), 3)


def test_layers_that_cannot_be_made_anew_are_told() -> None:
    # each message says what to do; nothing is changed
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    with pytest.raises(ModelError, match=r"'2' is a convolution in 2 groups.*Replace it yourself: model.2"):
        replace_head(grouped, 2, example_input=image())
    with pytest.raises(ModelError, match="the Linear is itself the output layer; make a new one instead"):
        replace_head(nn.Linear(4, 3), 2)

    assert grouped[2].out_channels == 4


class Scaled(nn.Linear):
    """A layer with an argument of its own, held under its name, and one held under another."""

    def __init__(self, features: int, classes: int, scale: float, *, shift: float = 0.0) -> None:
        super().__init__(features, classes, bias=False)
        self.scale, self.moved, self.names = scale, shift, [f"class {i}" for i in range(classes)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.moved


class Tempered(nn.Linear):
    """A layer whose argument has a default, and one that follows the number of classes."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, t: float = 1.0, k: int | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.t, self.k = t, k or out_features


def test_arguments_of_a_subclass_are_those_of_the_old_layer() -> None:
    # read from its attributes; at a default of the constructor's they were lost in silence
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Scaled(8, 5, 3.0))
    torch.manual_seed(0)
    replace_head(model, 2)
    assert (type(model[2]), model[2].scale, model[2].bias, len(model[2].names)) == (Scaled, 3.0, None, 2)
    torch.manual_seed(0)
    assert torch.equal(model[2].weight, nn.Linear(8, 2, bias=False).weight)
    for given, kept in (({"t": 0.5}, (0.5, 2)), ({}, (1.0, 2)), ({"bias": False}, (1.0, 2))):
        model[2] = Tempered(8, 5, **given)
        replace_head(model, 2)
        assert (type(model[2]), (model[2].t, model[2].k)) == (Tempered, kept)
        assert (model[2].bias is None) == ("bias" in given)


def test_a_convolution_of_a_class_of_its_own_keeps_its_form() -> None:
    # what its constructor does not take is fixed by it, or told as lost
    class Same(nn.Conv2d):
        def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1) -> None:
            super().__init__(inputs, outputs, kernel_size, stride, padding=1, padding_mode="reflect")

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Same(8, 5, 3, stride=2))
    replace_head(model, 300, example_input=image())
    replace_head(model, 4, example_input=image())
    assert (type(model[2]), model[2].stride, model[2].padding_mode) == (Same, (2, 2), "reflect")
    model[2].padding = (0, 0)
    with pytest.raises(ModelError, match=r"padding = \(1, 1\) and not \(0, 0\)"):
        replace_head(model, 2, example_input=image())


def test_a_subclass_whose_arguments_are_not_known_is_told() -> None:
    # nothing tells what it was built with: what a new one would lose is named, and the old one stays
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Scaled(8, 5, 3.0, shift=1.5))
    with pytest.raises(
        ModelError, match=r"'2' is a Scaled.* have moved = 0.0 and not 1.5.*yourself: model.2 ="
    ):
        replace_head(model, 2)
    assert model[2].moved == 1.5

    class Turned(nn.Linear):
        def __init__(self, turn: float, features: int, classes: int) -> None:
            super().__init__(features, classes)
            self.angle = turn

    model[2] = Turned(0.5, 8, 5)
    with pytest.raises(ModelError, match=r"'2' is a Turned, which cannot .*missing 1 required.*'classes'"):
        replace_head(model, 2)


def test_the_transposed_layer_of_transformers_is_replaced() -> None:
    # its weight is (features, classes), the other way round than nn.Linear's
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), conv1d(3, 5))
    change = replace_head(model, 2)
    assert (change.in_features, change.old_classes) == ((5,), 3)
    assert model[2].weight.shape == (5, 2)
    assert model(torch.zeros(7, 4)).shape == (7, 2)
