"""Layer maps of models that other tools get wrong; each test is one difficulty."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from layer_nets import ConvBlock, Residual, SmallResNet, Tokens, image
from layerwise.errors import ModelError
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.layers.mapping import layer_map
from layerwise.layers.recording import record
from layerwise.plans.strategies import linear_probe
from versions import needs_operators_in_modes

RESNET_STAGES = ("conv1", "layer1", "layer2", "fc")


def assert_complete(layers: LayerMap, model: nn.Module) -> None:
    """Every parameter of `model` stands in exactly one group, under its first name."""
    names = [name for group in layers for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in unwrap(model).named_parameters())
    assert layers.numel == sum(parameter.numel() for parameter in model.parameters())


# -- order ------------------------------------------------------------------------------------------


def test_registration_order_plays_no_part() -> None:
    # the head is registered first and the patch embedding last; the map has them as they run
    layers = layer_map(Tokens(), image())
    assert layers.names == ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "head")
    assert [group.role for group in layers] == ["stem", "trunk", "trunk", "trunk", "head"]


def test_backbone_registered_last_comes_first() -> None:
    # as in DETR
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 3)
            self.encoder = nn.Sequential(Residual(), Residual())
            self.backbone = SmallResNet()
            self.backbone.fc = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.encoder(self.backbone(x)))

    layers = layer_map(Detector(), image(), "stages")
    assert layers.names == (
        "backbone.conv1",
        "backbone.layer1",
        "backbone.layer2",
        "encoder.0",
        "encoder.1",
        "classifier",
    )


def test_bare_parameters_stand_where_they_are_needed() -> None:
    # class token and positions belong to the embedding, the final norm to the last block
    layers = layer_map(Tokens(), image())
    assert layers.group_of("cls_token") == layers.group_of("pos_embed") == "patch_embed"
    assert layers.group_of("norm.weight") == "blocks.2"


def test_prepared_constants_stand_at_first_use() -> None:
    # weight standardisation and an interpolated table read parameters before the input is there
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 4))
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.second.weight - self.second.weight.mean(1, keepdim=True)
            table = self.table * 2
            return nn.functional.linear(self.first(x).relu(), weight, self.second.bias) + table

    layers = layer_map(Prepared(), torch.zeros(2, 4), "layers")
    assert layers.names == ("first", "second")
    assert layers.group_of("table") == "second"


def test_weight_used_without_calling_its_module() -> None:
    # attention reads out_proj.weight itself; the map sees the operation, not the call
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)
            )
            self.out = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return nn.functional.linear(x.mean(1), self.out.weight, self.out.bias)

    model = Attends()
    layers = layer_map(model, torch.zeros(2, 5, 4))
    assert layers.names == ("embed", "blocks.0", "blocks.1", "out")
    assert layers.group_of("blocks.1.self_attn.out_proj.weight") == "blocks.1"
    assert layers.head is not None
    assert_complete(layers, model)


# -- sharing ----------------------------------------------------------------------------------------


def test_a_block_called_twice_is_one_group_at_its_first_use() -> None:
    # ALBERT's shared layer; its FLOPs are those of all calls
    class Shared(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times
            self.embed, self.block, self.head = nn.Linear(4, 8), Residual(), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for _ in range(self.times):
                x = self.block(x)
            return self.head(x)

    once, thrice = (layer_map(Shared(times), torch.zeros(2, 4)) for times in (1, 3))
    assert once.names == thrice.names == ("embed", "block", "head")
    flops_once, flops_thrice = once["block"].flops, thrice["block"].flops
    assert flops_once is not None
    assert flops_thrice == 3 * flops_once


def test_norms_stay_with_their_layers_in_a_network_called_on_each_of_three_inputs() -> None:
    # a triplet network, which runs wholly before it runs again
    class Triplet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
            )
            self.out = nn.Linear(8, 2)

        def forward(self, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.out(self.body(x).mean((2, 3))) for x in images)

    layers = layer_map(Triplet(), (image(), image(), image()))
    assert [group.modules for group in layers] == [
        ("body.0", "body.1", "body.2"),
        ("body.3", "body.4"),
        ("out",),
    ]


def test_tied_weights_stand_at_their_first_use_and_know_their_names() -> None:
    # a language model whose decoder is its embedding has no head of its own, and says so
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.blocks = nn.Sequential(Residual(), Residual())
            self.decoder = nn.Linear(8, 11, bias=False)
            self.decoder.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.blocks(self.embed(ids)))

    layers = layer_map(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert layers.names == ("embed", "blocks.0", "blocks.1")
    assert layers.aliases == {"decoder.weight": "embed.weight"}
    assert layers.group_of("decoder.weight") == "embed"
    assert layers.outputs == ("decoder",)
    assert layers.head is None
    assert any("tied to embed.weight" in note for note in layers.notes)


def test_tied_decoder_with_a_bias_keeps_a_head() -> None:
    # BERT's masked language model: transform and bias are the head, the tied weight is not
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    layers = layer_map(transformers.BertForMaskedLM(config))
    assert layers.names == (
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        layers.names[-1],
    )
    assert layers.group_of("cls.predictions.decoder.weight") == "bert.embeddings"
    assert layers.head is not None
    assert "cls.predictions.transform.dense.weight" in layers.head.parameters
    assert "cls.predictions.bias" in layers.head.parameters


# -- shapes of networks -----------------------------------------------------------------------------


class Branches(nn.Module):
    """An Inception-like module: parallel convolutions, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x)], 1)


def test_parallel_branches_stay_together() -> None:
    # the branches of one Inception module are one block
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Branches(), Branches(), nn.Flatten(), nn.LazyLinear(4))
    net(image())
    layers = layer_map(net, image())
    assert layers.names == ("0", "1", "2", "4")
    assert len(layers["1"].parameters) == 4


def test_two_towers_follow_one_another() -> None:
    # towers that meet at the end are mapped one after the other, each with its own embedding
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Sequential(nn.Linear(4, 8), Residual(), Residual())
            self.image = nn.Sequential(nn.Linear(6, 8), Residual(), Residual())
            self.head = nn.Linear(16, 2)

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            seen = self.image(image)
            return self.head(torch.cat([seen, self.text(text)], 1))

    layers = layer_map(Towers(), {"text": torch.zeros(2, 4), "image": torch.zeros(2, 6)})
    assert layers.names == ("image.0", "image.1", "image.2", "text.0", "text.1", "text.2", "head")


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_a_tower_that_applies_a_bare_weight_last_is_no_head(granularity: Any) -> None:
    # CLIP of open_clip: `visual.proj` and `text_projection` belong to the modules that hold the blocks
    class Tower(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Identity()
            self.proj = nn.Parameter(torch.zeros(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ self.proj

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Sequential(nn.Linear(6, 8), Residual(), Residual())
            self.visual = Tower()
            self.text_projection = nn.Parameter(torch.zeros(8, 4))

        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.visual(x) @ (self.text(text) @ self.text_projection).T

    layers = layer_map(TwoTowers(), (image(), torch.zeros(2, 6)), granularity)
    assert layers.head is not None
    assert layers.head.parameters == ("visual.proj", "text_projection")
    assert layers.outputs == ("visual.proj", "text_projection")
    if granularity == "blocks":
        assert layers.names[:4] == ("visual.patch_embed", *(f"visual.blocks.{n}" for n in range(3)))


def test_dense_connections_come_out_in_dense_layers() -> None:
    # every layer reads all before it, and yet each is a group
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        net = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5)
    blocks, stages = layer_map(net, image(side=64)), layer_map(net, image(side=64), "stages")
    assert blocks.names == (
        "features.conv0",
        "features.denseblock1.denselayer1",
        "features.denseblock1.denselayer2",
        "features.denseblock2.denselayer1",
        "features.denseblock2.denselayer2",
        "classifier",
    )
    assert blocks.group_of("features.norm5.weight") == "features.denseblock2.denselayer2"
    assert stages.names == ("features.conv0", "features.denseblock1", "features.denseblock2", "classifier")


def test_skip_connections_over_stages() -> None:
    # a U-Net: encoder and decoder blocks are groups, in order
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([ConvBlock(4, 4), ConvBlock(4, 8, 2)])
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.up = nn.ConvTranspose2d(8, 4, 2, 2)
            self.outer = ConvBlock(8, 8)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.inner[0](self.stem(x))
            up = self.up(self.inner[1](first))
            return self.head(self.outer(torch.cat([first, up], 1)))

    layers = layer_map(UNet(), image())
    assert layers.names == ("stem", "inner.0", "inner.1", "outer", "head")
    assert layers.group_of("up.weight") == "outer"


def test_layers_written_as_lists_in_a_list() -> None:
    # `for attention, mlp in self.layers` with the residual connections between: many own transformers
    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.norm(x)).relu())

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList([Feed(), Feed()]) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for mix, mlp in self.layers:
                x = mix(x.mT.mT) + x
                x = mlp(x) + x
            return x

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.transformer, self.head = nn.Linear(4, 8), Transformer(), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.transformer(self.embed(x)).mean(1))

    model = Whole()
    layers = layer_map(model, torch.zeros(2, 5, 4))
    blocks = tuple(f"transformer.layers.{number}" for number in range(3))
    assert layers.names == ("embed", *blocks, "head")
    assert_complete(layers, model)


@pytest.mark.parametrize("side", [1, 3])
def test_a_stage_whose_input_passes_by_a_side_branch_alone_is_opened(side: int) -> None:
    # as GCViT's, which makes a query for its blocks; also where the branch is larger than the blocks
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Sequential(*(Residual() for _ in range(side)))
            self.blocks = nn.Sequential(Residual(), Residual())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x + self.side(x).mean(-1, keepdim=True))

    layers = layer_map(nn.Sequential(Stage(), Stage(), nn.Linear(8, 2)), torch.zeros(2, 8))
    assert layers.names[: side + 2] == (*(f"0.side.{n}" for n in range(side)), "0.blocks.0", "0.blocks.1")


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_layer_of_two_wrappers_of_what_differs_is_one_group(kind: type[nn.Module]) -> None:
    # `Residual(attention)` and `Residual(mlp)`; two wrappers of the same are two blocks, as a ResNet's are
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(8), inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.norm(x)) + x

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.values(x).mean(1, keepdim=True))

    class Whole(nn.Module):
        def __init__(self, *second: nn.Module) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            layers = [[Wrapped(Mix()), Wrapped(mlp)] for mlp in second]
            self.layers = nn.ModuleList(
                kind(layer) if kind is nn.ModuleList else kind(*layer) for layer in layers
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for first, second in self.layers:
                x = second(first(x))
            return self.head(x.mean(1))

    mlps = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)]
    assert layer_map(Whole(*mlps), torch.zeros(2, 5, 4)).names == (
        "embed",
        *(f"layers.{number}" for number in range(3)),
        "head",
    )
    alike = layer_map(Whole(Mix(), Mix(), Mix()), torch.zeros(2, 5, 4))
    assert alike.names == ("embed", *(f"layers.{n}.{part}" for n in range(3) for part in range(2)), "head")


def test_a_first_list_without_a_norm_is_kept_whole_as_the_others_are() -> None:
    # the FT-Transformer: its first block normalises nothing
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.blocks = nn.ModuleList()
            for number in range(3):
                block = nn.ModuleDict({"mix": Residual(), "mlp": Residual()})
                if number:
                    block["norm"] = nn.LayerNorm(8)
                self.blocks.append(block)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.blocks:
                y = block["norm"](x) if "norm" in block else x
                x = x + block["mlp"](x + block["mix"](y))
            return self.head(x)

    layers = layer_map(Tabular(), torch.zeros(2, 4))
    assert layers.names == ("embed", "blocks.0", "blocks.1", "blocks.2", "head")


def test_a_network_inside_itself() -> None:
    # the U-net of pix2pix: each level holds the next one in its middle
    class Level(nn.Module):
        def __init__(self, width: int, inner: nn.Module | None) -> None:
            super().__init__()
            middle = [] if inner is None else [inner]
            self.model = nn.Sequential(
                nn.Conv2d(width, width, 4, 2, 1), *middle,
                nn.ConvTranspose2d(width * (1 + bool(middle)), width, 4, 2, 1),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.model(x)], 1)

    inner: nn.Module | None = None
    for _ in range(3):
        inner = Level(4, inner)
    assert inner is not None
    model = nn.Sequential(nn.Conv2d(3, 4, 1), inner, nn.Conv2d(8, 2, 1))
    layers = layer_map(model, image())
    assert layers.names == (
        *("0", "1.model.0", "1.model.1.model.0", "1.model.1.model.1.model.0"),
        *("1.model.1.model.1.model.1", "1.model.1.model.2", "1.model.2", "2"),
    )
    assert_complete(layers, model)


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoder_decoder(family: str) -> None:
    # all encoder layers, then all decoder layers, though the decoder's input is another
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = (
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        if family == "T5"
        else {
            "d_model": 16,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
        }
    )
    config = getattr(transformers, f"{family}Config")(vocab_size=99, **options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for granularity in ("blocks", "stages"):
        layers = layer_map(model, granularity=granularity)  # type: ignore[arg-type]
        numbered = [name for name in layers.names if name[-1].isdigit()]
        word = "block" if family == "T5" else "layers"
        prefix = "" if family == "T5" else "model."
        assert numbered == [f"{prefix}{s}.{word}.{n}" for s in ("encoder", "decoder") for n in (0, 1)]
    assert_complete(layers, model)


def test_several_heads_are_one_group() -> None:
    # a distilled DeiT has two output layers; they learn together
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    layers = layer_map(model)
    assert layers.outputs == ("head", "head_dist")
    assert layers.head is not None
    assert set(layers.head.parameters) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_the_second_classifier_of_an_ordered_dictionary_belongs_to_the_head() -> None:
    # torchvision's FCN, of which training also uses an auxiliary classifier of the same class
    class Classifier(nn.Sequential):
        def __init__(self, width: int) -> None:
            super().__init__(nn.Conv2d(width, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.ModuleList([ConvBlock(3, 8, 2), ConvBlock(8, 8), ConvBlock(8, 8)])
            self.classifier, self.aux_classifier = Classifier(8), Classifier(8)

        def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
            inner = self.backbone[1](self.backbone[0](x))
            out = self.classifier(self.backbone[2](inner))
            return OrderedDict(out=out, aux=self.aux_classifier(inner))

    layers = layer_map(Segmenter(), image())
    assert layers.names == ("backbone.0", "backbone.1", "backbone.2", "classifier.2")
    assert layers.outputs == ("classifier.2", "aux_classifier.2")
    assert layers.head is not None
    assert layers.head.modules == ("classifier", "aux_classifier")


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_an_output_layer_that_embeds_its_input_gives_no_name_to_two_groups(granularity: Any) -> None:
    # the wide part of deepctr's networks: embeddings and a weight of its own in one module
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.columns = nn.ModuleList(nn.Embedding(9, 1) for _ in range(2))
            self.weight = nn.Parameter(torch.zeros(2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            embedded = [column(x[:, n].long()) for n, column in enumerate(self.columns)]
            return embedded[0] + embedded[1] + x[:, 2:] @ self.weight

    class WideAndDeep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.deep, self.out = Wide(), nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(x) + self.out(self.deep(x).relu())

    layers = layer_map(WideAndDeep(), torch.zeros(2, 4), granularity)
    assert len(set(layers.names)) == len(layers)
    assert layers.head is not None
    assert set(layers.head.parameters) == {"wide.weight", "out.weight", "out.bias"}
    linear_probe(layers)


class Factor(nn.Module):
    """Multiplies by a number that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize("one", [Factor, nn.PReLU])
def test_a_layer_of_one_number_hides_no_layers_after_the_pooling(one: type[nn.Module]) -> None:
    # a 0-dimensional parameter has no first length, and one number tells nothing of the features
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), one(), nn.Conv2d(8, 8, 3), one(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 8), one(), nn.Linear(8, 2),
    )  # fmt: skip
    layers = layer_map(net, image())
    assert [set(group.modules) & {"0", "2", "6", "7", "8"} for group in layers] == [
        {"0"}, {"2"}, {"6", "7", "8"}
    ]  # fmt: skip


def test_no_head() -> None:
    # a network that ends in a residual block, or in a norm, has no head
    blocks = nn.Sequential(nn.Linear(4, 8), Residual(), Residual())
    assert layer_map(blocks, torch.zeros(2, 4)).head is None
    assert layer_map(nn.Sequential(*blocks, nn.LayerNorm(8)), torch.zeros(2, 4)).head is None


def test_features_beside_the_logits_do_not_hide_the_head() -> None:
    # (logits, features): the last block is no output layer
    class Both(SmallResNet):
        def forward(self, x: torch.Tensor) -> Any:
            features = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
            return self.fc(features.mean((2, 3))), features

    assert layer_map(Both(), image()).outputs == ("fc",)


def test_unused_parameters_are_reported_and_stay_with_their_neighbours() -> None:
    # a parameter that the pass does not read stands in the group of its module
    model = SmallResNet()
    model.layer1[1].spare = nn.Linear(3, 3)
    model.auxiliary = nn.Linear(8, 5)
    layers = layer_map(model, image())
    assert set(layers.unused) == {
        "layer1.1.spare.weight",
        "layer1.1.spare.bias",
        "auxiliary.weight",
        "auxiliary.bias",
    }
    assert layers.group_of("layer1.1.spare.weight") == "layer1.1"
    assert_complete(layers, model)


def test_control_flow_that_depends_on_data() -> None:
    # the branch is decided on real samples, and the map says so
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.gate(x)
            return self.head(self.left(x) if x.sum() > 0 else self.right(x))

    model = Routed()
    layers = layer_map(model, torch.randn(5, 4))
    assert any("real samples" in note for note in layers.notes)
    assert len(layers.unused) == 2
    assert_complete(layers, model)


def test_mixture_of_experts_without_data() -> None:
    # the experts' grouped product is recorded on meta, whatever its size
    transformers = pytest.importorskip("transformers", minversion="5", reason="experts looped over before")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=4))
    layers = layer_map(model)
    assert layers.names == ("model.embed_tokens", *(f"model.layers.{n}" for n in range(4)), "lm_head")
    assert not any("real samples" in note for note in layers.notes)
    assert_complete(layers, model)


def test_a_model_of_one_layer() -> None:
    # a layer by itself is its own head
    layers = layer_map(nn.Linear(4, 2))
    assert len(layers) == 1
    assert layers.head is not None
    assert set(layers.head.parameters) == {"weight", "bias"}


def test_layer_called_by_its_forward() -> None:
    # SqueezeBERT calls layer.forward(x), which hooks do not see
    class Bypasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block.forward(x)
            return self.head(x)

    assert layer_map(Bypasses(), torch.zeros(2, 4)).names == (
        "embed",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "head",
    )


# -- states and wrappers ----------------------------------------------------------------------------


def test_model_on_meta() -> None:
    # a model without data has the same map
    assert layer_map(SmallResNet().to("meta"), image()) == layer_map(SmallResNet(), image())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    # the derived input has the model's precision
    model = SmallResNet().to(dtype)
    assert layer_map(model) == layer_map(SmallResNet())


def test_already_partly_frozen() -> None:
    # what learns has no say in where it stands, and stays as it was
    model = SmallResNet()
    model.layer1.requires_grad_(False)
    assert layer_map(model, image()) == layer_map(SmallResNet(), image())
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert model.fc.weight.requires_grad


def test_lazy_modules() -> None:
    # there is nothing to group yet, and the message says what to do
    with pytest.raises(ModelError, match="Run one real batch"):
        layer_map(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), torch.zeros(2, 4))
    with pytest.raises(ModelError, match="Run one real batch"):  # before an example is derived from shapes
        layer_map(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


def test_no_parameters() -> None:
    # a model that cannot learn has no layer map
    with pytest.raises(ModelError, match="no parameters"):
        layer_map(nn.ReLU())


def test_dictionary_inputs_and_outputs() -> None:
    # keyword arguments as a dict, outputs by name
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.kind, self.box = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, features: torch.Tensor, *, scale: float) -> dict[str, torch.Tensor]:
            x = self.body(features * scale).relu()
            return {"kind": self.kind(x), "box": self.box(x)}

    layers = layer_map(Named(), {"features": torch.zeros(2, 4), "scale": 2.0})
    assert layers.outputs == ("kind", "box")
    assert layers.names == ("body", "kind")


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process on the CPU."""
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_wrapped(process_group: None) -> None:
    # the map has the names of the model inside
    model = SmallResNet()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert layer_map(wrapped, image()) == layer_map(model, image())
    assert wrapped(image()).shape == (2, 5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # FSDP on a CPU warns of itself
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs alone")
def test_fsdp_wrapped(process_group: None) -> None:
    # parameters sharded by fully_shard are mapped by their full shapes, and training goes on
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = SmallResNet()
    expected = layer_map(model, image())
    mesh = init_device_mesh("cpu", (1,))
    for stage in (model.layer1, model.layer2, model):
        fully_shard(stage, mesh=mesh)
    layers = layer_map(model, image())
    assert [(g.name, g.parameters, g.numel) for g in layers] == [
        (g.name, g.parameters, g.numel) for g in expected
    ]
    model(image()).sum().backward()
    assert model.fc.weight.grad is not None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_old_fsdp_wrapped(process_group: None) -> None:
    # FullyShardedDataParallel that keeps the original parameters
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = SmallResNet()
    expected = layer_map(model, image())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    layers = layer_map(wrapped, image())
    assert layers.names == expected.names
    assert wrapped(image()).shape == (2, 5)


def test_compiled_without_compiling() -> None:
    # torch.compile'd models are mapped by the model inside; nothing is compiled for it
    calls: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        calls.append(1)
        return graph.forward

    model = SmallResNet()
    expected = layer_map(model, image())
    assert layer_map(torch.compile(model, backend=backend), image()) == expected
    in_place = copy.deepcopy(model)
    in_place.compile(backend=backend)
    assert layer_map(in_place, image()) == expected
    inner = copy.deepcopy(model)
    inner.layer1 = torch.compile(inner.layer1, backend=backend)
    assert len(layer_map(inner, image())) == len(expected)
    assert not calls


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers renames
def test_peft_wrapped() -> None:
    # adapters stand with the layer that they adapt, under the names of the wrapped model
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    layers = layer_map(model)
    assert_complete(layers, model)
    layer = "base_model.model.bert.encoder.layer"
    assert layers.names[1:3] == (f"{layer}.0", f"{layer}.1")
    assert layers.group_of(f"{layer}.1.attention.self.query.lora_B.default.weight") == f"{layer}.1"
    assert layers.head is not None
    assert "base_model.model.classifier.modules_to_save.default.weight" in layers.head.parameters


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_a_parametrized_layer_is_one_layer(name: str, granularity: Any) -> None:
    # its weight lies in modules inside it; a probe that trained the bias alone would be no probe
    parametrized = getattr(nn.utils.parametrizations, name)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), parametrized(nn.Linear(8, 8)), parametrized(nn.Linear(8, 2))
    )
    layers = layer_map(model, torch.zeros(2, 4), granularity=granularity)
    assert layers.names == ("0", "2", "3")
    assert layers.outputs == ("3",)
    assert layers.head is not None
    assert set(layers.head.parameters) == {
        name for name, _ in model.named_parameters() if name.startswith("3.")
    }
    assert len(layers.head.parameters) > 1


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_a_tied_language_model_of_single_layers_has_no_head(granularity: Any) -> None:
    # the shape of AWD-LSTM: the weight of the output layer is the embedding's, so its bias alone is no head
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(11, 8)
            self.rnns = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(2))
            self.decoder = nn.Linear(8, 11)
            self.decoder.weight = self.encoder.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.encoder(ids)
            for rnn in self.rnns:
                x, _ = rnn(x)
            return self.decoder(x)

    layers = layer_map(Recurrent(), torch.zeros(2, 3, dtype=torch.long), granularity=granularity)
    assert layers.head is None
    assert layers.names[-3:] == ("rnns.0", "rnns.1", "decoder.bias")
    assert layers.notes[-1].endswith("it is tied to encoder.weight, so there is no head group")


@pytest.mark.parametrize("granularity", ["layers", "blocks"])
def test_an_embedding_that_is_applied_again_as_the_output_layer_is_no_head(granularity: Any) -> None:
    """The weight has one name, and is used first in a call of its module: what comes after it is no head."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.first = nn.LSTM(8, 8, batch_first=True)
            self.second = nn.LSTM(8, 8, batch_first=True)
            self.bias = nn.Parameter(torch.zeros(11))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x, _ = self.first(self.embedding(ids))
            x, _ = self.second(x)
            return nn.functional.linear(x, self.embedding.weight, self.bias)

    class AutoEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            code = self.inner(self.outer(x).relu())
            return (code @ self.inner.weight).relu() @ self.outer.weight

    layers = layer_map(Recurrent(), torch.zeros(2, 3, dtype=torch.long), granularity=granularity)
    assert layers.head is None
    assert layers.names[-2:] == ("first", "second")
    layers = layer_map(AutoEncoder(), torch.zeros(2, 8), granularity=granularity)
    assert layers.head is None
    assert layers.names == ("outer", "inner")


def test_what_is_no_model_is_refused() -> None:
    # a name in place of a model would end in an AttributeError
    with pytest.raises(ModelError, match=r"'resnet18', a str; expected a torch\.nn\.Module"):
        layer_map("resnet18")  # type: ignore[arg-type]


def test_the_head_does_not_depend_on_the_size_of_the_images() -> None:
    # at 32 pixels the map before the last convolution is one position, as a pooled one is
    class Net(nn.Sequential):
        def __init__(self) -> None:
            body = [ConvBlock(3, 4, 2), *(ConvBlock(4, 4, 2) for _ in range(4))]
            last = [nn.Conv2d(4, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
            super().__init__(*body, *last)

    small, large = (layer_map(Net(), torch.zeros(2, 3, side, side)) for side in (32, 224))
    assert small.names == large.names
    assert small.head is not None
    assert small.head.parameters == ("9.weight", "9.bias")
    assert small.groups[0].flops < large.groups[0].flops  # costs are those of the images given


def test_larger_images_are_left_out_where_a_model_goes_through_positions_one_by_one() -> None:
    # with 16 times the height it takes 16 times the steps; over pixels it would be 256 times
    steps: list[int] = []

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cell, self.fc = nn.Conv2d(3, 3, 1), nn.GRUCell(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(len(x), 4)
            for row in self.stem(x).mean(3).unbind(2):
                steps.append(1)
                state = self.cell(row, state)
            return self.fc(state)

    assert layer_map(Rows(), torch.zeros(2, 3, 8, 8)).names == ("stem", "cell", "fc")
    assert len(steps) < 8 + 128 // 2


class Bare(nn.Module):
    """Has parameters of its own before, between and instead of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 5)
        self.weight, self.shift = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x * self.scale) @ self.weight + self.shift)


def test_bare_parameters_of_the_model_itself() -> None:
    # one that is no weight joins the layer it feeds or follows, a weight is a group of its own
    layers = layer_map(Bare(), torch.zeros(2, 4), "layers")
    assert [(group.name, group.parameters) for group in layers] == [
        ("layer", ("scale", "layer.weight", "layer.bias")),
        ("weight", ("weight", "shift")),
        ("out", ("out.weight", "out.bias")),
    ]


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
@pytest.mark.parametrize("in_a_list", [True, False])
def test_a_network_of_bare_weights_alone_is_cut_at_each_of_them(in_a_list: bool, granularity: Any) -> None:
    # as in meta-learning, where forward takes all weights from one ParameterList
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(4, 4)) for _ in range(3))
            self.shifts = nn.ParameterDict({f"at{n}": nn.Parameter(torch.zeros(4)) for n in range(3)})
            if not in_a_list:
                for n in range(3):
                    self.register_parameter(f"weight{n}", self.weights[n])
                del self.weights

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n in range(3):
                weight = self.weights[n] if in_a_list else self.get_parameter(f"weight{n}")
                x = nn.functional.linear(x.relu(), weight, self.shifts[f"at{n}"])
            return x

    layers = layer_map(Learner(), torch.zeros(2, 4), granularity)
    names = [f"weights.{n}" if in_a_list else f"weight{n}" for n in range(3)]
    assert [set(group.parameters) for group in layers] == [
        {name, f"shifts.at{n}"} for n, name in enumerate(names)
    ]
    assert [group.role for group in layers] == ["trunk", "trunk", "head"]
    assert layers.outputs == (names[2],)


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_a_model_of_one_bare_parameter(granularity: Any) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    layers = layer_map(Scale(), torch.zeros(2, 4), granularity)
    assert [(group.name, group.parameters) for group in layers] == [("scale", ("scale",))]


def test_a_pass_that_reads_no_parameter_is_told() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with pytest.raises(ModelError, match=r"Idle reads none of its 2 parameters.*Check the example input"):
        layer_map(Idle(), torch.zeros(2, 4))


@needs_operators_in_modes
def test_a_branch_written_as_an_operator() -> None:
    # torch.cond: the branch that is taken is seen, on real samples
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = torch.cond(x.sum() > 0, lambda x: self.inner(x).relu(), lambda x: self.inner(x).tanh(), (x,))
            return self.out(x)

    layers = layer_map(Conditional(), torch.zeros(2, 4))
    assert layers.names == ("stem", "inner", "out")
    assert not layers.unused
    assert "real samples" in layers.notes[-1]


def test_a_call_whose_error_the_model_catches() -> None:
    # it has no output, and the model's own call ends as ever
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wrong, self.out = nn.Linear(4, 4), nn.Linear(5, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.out(x)

    calls = {call.path: call for call in record(Trying(), (torch.zeros(2, 4),)).calls}
    assert calls["wrong"].output is None
    assert calls[""].output_keys == calls["out"].output_keys != ()
    layers = layer_map(Trying(), torch.zeros(2, 4))
    assert layers.names == ("stem", "out")
    assert layers.unused == ("wrong.weight", "wrong.bias")
    assert "note: not read in the forward pass: wrong.weight, wrong.bias" in str(layers)


def test_a_layer_called_again_after_an_error_that_the_model_catches() -> None:
    # as in speechbrain: a layer that takes no lengths refuses them, and what runs next is not inside of it
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.out = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                try:
                    x = block(x, lengths=None)
                except TypeError:
                    x = block(x)
            return self.out(x)

    made = record(Trying(), (torch.zeros(2, 8),))
    assert {
        call.parent for call in made.calls if call.path.startswith("blocks.") and call.path[7:].isdigit()
    } == {made.root}
    assert layer_map(Trying(), torch.zeros(2, 8)).names == ("blocks.0", "blocks.1", "blocks.2", "out")


def test_sparse_matrices() -> None:
    # a graph network's neighbours, which have no memory of the usual kind
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("neighbours", torch.eye(5).to_sparse())
            self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.sparse.mm(self.neighbours, self.first(x)).relu())

    layers = layer_map(Graph(), torch.zeros(5, 4))
    assert layers.names == ("first", "out")
    assert not any("real samples" in note for note in layers.notes)


class Sentences(nn.Module):
    """An embedding, a recurrent layer and a classifier of two layers on its mean."""

    def __init__(self, recurrent: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.rnn = recurrent(8, 8, batch_first=True, **options)
        self.embedding = nn.Embedding(30, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.rnn(self.embedding(ids))[0].mean(1))


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_embedding_before_a_recurrent_layer_is_a_stem(recurrent: Any, precision: torch.dtype) -> None:
    # LSTMs of one layer too, whatever kernel they take in that precision
    for number in (1, 2):
        layers = layer_map(Sentences(recurrent, num_layers=number).to(precision))
        assert layers.names == ("embedding", "rnn", "classifier.2")
        assert [group.role for group in layers] == ["stem", "trunk", "head"]


class Reader(nn.Module):
    """Convolutions over an image, and a recurrent layer that reads the columns."""

    def __init__(self, recurrent: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cnn = nn.ModuleList(nn.Conv2d(1 if n == 0 else 4, 4, 3, padding=1) for n in range(5))
        self.rnn = recurrent(4, 8, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.cnn:
            x = layer(x).relu()
        return self.out(self.rnn(x.mean(2).transpose(1, 2))[0])


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_all_kinds_weigh_alike(recurrent: Any) -> None:
    # the weights of a GRU's kernels do not outnumber the convolutions where those of an LSTM do not
    convolutions = [f"cnn.{number}" for number in range(5)]
    for precision in (torch.float32, torch.bfloat16):
        layers = layer_map(Reader(recurrent).to(precision), torch.zeros(2, 1, 8, 16, dtype=precision))
        assert layers.names == (*convolutions, "rnn", "out")


class Searching(nn.Module):
    """A convolutional network of texts: an embedding, parallel convolutions, a maximum over each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.widths = nn.ModuleList(nn.Conv1d(8, 4, width) for width in (2, 3, 4))
        self.out = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids).transpose(1, 2)
        return self.out(torch.cat([layer(x).amax(2) for layer in self.widths], 1))


def test_an_embedding_before_single_layers_is_a_stem() -> None:
    # it is a layer of its own, which one may want frozen; the norm of an input is not
    layers = layer_map(Searching())
    assert layers.names == ("words", "widths.0", "widths.1", "widths.2", "out")
    assert layers["stem"].parameters == ("words.weight",)
    normed = layer_map(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert normed.names == ("1", "3")


class Ensemble(nn.Module):
    """The mean of networks that are kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(SmallResNet() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def test_members_of_an_ensemble_in_a_list_are_no_stages() -> None:
    # each has its first layers apart from its blocks, as if it stood alone
    alone = layer_map(SmallResNet(), image()).names[:-1]
    layers = layer_map(Ensemble(), image())
    assert layers.names == (*(f"nets.{n}.{name}" for n in range(2) for name in alone), "nets.0.fc")
    assert layers["stem"].modules == ("nets.0.conv1", "nets.0.bn1")


class Branched(nn.Module):
    """Branches of one kind beside one another, as experts and Inception modules have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * width, width, 1), nn.ReLU(), nn.Conv2d(width, width + 1, 3, padding=1)
            )
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def test_branches_of_one_kind_are_no_stack() -> None:
    # none reads another, so they are one step of depth
    branched = [Branched(width) for width in (2, 3, 4)]
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), *branched, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(15, 2)
    )
    assert layer_map(net, torch.zeros(2, 3, 8, 8)).names == ("0", "1", "2", "3", "6")
