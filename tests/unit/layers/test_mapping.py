"""What stands in which group, at each granularity, and what the map says about it."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from layer_nets import ConvBlock, Residual, SmallResNet, Texts, Tokens, image
from layerwise import layer_map
from layerwise.errors import ModelError, PlanError, RecordingError
from layerwise.layers.layermap import GRANULARITIES, Granularity, LayerMap
from layerwise.layers.table import trainable_numel


def test_granularities_of_a_residual_network() -> None:
    # stages, residual blocks, and modules with parameters of their own
    model = SmallResNet()
    assert layer_map(model, granularity="stages").names == ("conv1", "layer1", "layer2", "fc")
    assert layer_map(model).names == ("conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc")
    layers = layer_map(model, granularity="layers")
    assert layers.names[:4] == ("conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1")
    assert layers.names[-1] == "fc"
    assert all(len({name.rpartition(".")[0] for name in group.parameters}) == 1 for group in layers)


def test_head_is_the_same_at_every_granularity() -> None:
    # a linear probe trains the same parameters whatever the granularity
    class Pooled(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.fc_norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(self.fc_norm(self.norm(x).mean(1)))

    heads = [layer_map(Pooled(), image(), g).head for g in ("stages", "blocks", "layers")]  # type: ignore[arg-type]
    expected = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias", "cls_token", "pos_embed")
    assert all(head is not None and head.parameters == expected for head in heads)


def test_flattened_features_are_no_pooling() -> None:
    # VGG's hidden linear layers read positions; the head is the last one alone
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 144, 8), nn.ReLU(),
        nn.Linear(8, 5),
    )  # fmt: skip
    layers = layer_map(net, image())
    assert layers.names == ("0", "2", "4", "6")
    assert layers.head is not None
    assert layers.head.parameters == ("6.weight", "6.bias")


def test_layers_between_blocks_join_the_block_they_feed() -> None:
    # one step of depth is one block: a downsampling layer is no step of its own
    class Downsamples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.first = nn.ModuleList([ConvBlock(4, 4), ConvBlock(4, 4)])
            self.norm, self.down = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, 2)
            self.second = nn.ModuleList([ConvBlock(8, 8), ConvBlock(8, 8)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.first:
                x = block(x)
            x = self.down(self.norm(x))
            for block in self.second:
                x = block(x)
            return self.head(x.mean((2, 3)))

    layers = layer_map(Downsamples(), image())
    assert layers.names == ("stem", "first.0", "first.1", "second.0", "second.1", "head")
    assert layers.group_of("down.weight") == layers.group_of("norm.weight") == "second.0"
    assert layer_map(Downsamples(), image(), "stages").names == ("stem", "first", "second", "head")


class Towers(nn.Module):
    """Images and tokens, each embedded, put through blocks and projected; `cross` reads one in the other."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.cross = cross
        self.patches, self.words = nn.Conv2d(3, 8, 4, 4), nn.Embedding(9, 8)
        self.see = nn.ModuleList(Residual() for _ in range(2))
        self.read = nn.ModuleList(Attending() for _ in range(2))
        self.seen, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.see:
            x = block(x)
        x = self.seen(x).mean(1, keepdim=True)
        y = self.words(tokens)
        for block in self.read:
            y = block(y, x if self.cross else None)
        y = self.head(y.mean(1))
        return y if self.cross else x[:, 0] @ y.T


class Attending(Residual):
    """A block that may read a second input."""

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if other is None else x + other)


@pytest.mark.parametrize("cross", [False, True])
def test_a_second_tower_has_embeddings_of_its_own(cross: bool) -> None:
    # also behind a projection of the first tower: an output layer, or read by a decoder's blocks
    layers = layer_map(Towers(cross), (torch.zeros(2, 3, 8, 8), torch.ones(2, 5, dtype=torch.long)))
    assert layers.names[:-1] == ("patches", "see.0", "see.1", "words", "read.0", "read.1")
    assert layers.head is not None
    assert layers.group_of("seen.weight") == ("see.1" if cross else layers.head.name)


def test_positions_added_between_blocks_are_no_tower() -> None:
    # a table looked up after a downsampling joins the block with it
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 8), Residual(), Residual(16)
            self.down, self.positions, self.head = nn.Linear(8, 16), nn.Embedding(5, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.down(self.a(self.stem(x)))
            return self.head(self.b(x + self.positions(torch.arange(5))))

    layers = layer_map(Net(), torch.zeros(2, 5, 4))
    assert layers.names == ("stem", "a", "b", "head")
    assert layers.group_of("positions.weight") == layers.group_of("down.weight") == "b"


def test_flat_list_of_blocks_is_cut_where_positions_change() -> None:
    # MobileNet's features: stages are named after their first block
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        *[ConvBlock(4, 4), ConvBlock(4, 8, 2), ConvBlock(8, 8), ConvBlock(8, 8, 2)],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    assert layer_map(net, image(), "stages").names == ("0", "1", "2", "4", "7")


def test_plain_transformer_has_one_stage_per_block() -> None:
    # nothing changes its resolution, so each encoder layer is a stage
    assert layer_map(Tokens(), image(), "stages").names == layer_map(Tokens(), image()).names


def test_modules_without_parameters_stand_where_they_run() -> None:
    # pooling and activations with what they follow; dropout before the output layer belongs to the head
    layers = layer_map(SmallResNet(), granularity="stages")
    assert layers["fc"].modules == ("drop", "fc")
    assert layers["layer1"].modules == ("layer1",)
    assert layers["conv1"].modules == ("conv1", "bn1")


def test_costs_per_sample() -> None:
    # FLOPs and handed-on bytes are for one sample, whatever the batch of the example
    one, four = layer_map(SmallResNet(), image(1)), layer_map(SmallResNet(), image(4))
    assert [group.flops for group in one] == [group.flops for group in four]
    assert one["conv1"].flops == 2 * 4 * 8 * 8 * 27
    assert [group.activation_bytes for group in one] == [group.activation_bytes for group in four]
    assert one["conv1"].activation_bytes == 4 * 4 * 8 * 8
    assert one["fc"].activation_bytes == 4 * 5


def test_example_inputs_are_derived_and_named() -> None:
    # from the first layer, and the note says from which and what
    for net, source, shape in [
        (nn.Sequential(nn.Linear(7, 3)), "first linear layer", "2x7"),
        (nn.Sequential(nn.Conv1d(2, 3, 3)), "first convolution", "2x2x1024"),
        (nn.Sequential(nn.Conv2d(1, 3, 3)), "usual image size", "2x1x224x224"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), "first embedding", "2x8"),
        (nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), "first embedding", "2x8"),
        (Recurrent(), "first recurrent layer", "2x8x5"),
        (nn.Sequential(nn.Conv3d(2, 3, 3, stride=8)), "first convolution", "2x2x16x112x112"),
    ]:
        note = layer_map(net).notes[0]
        assert source in note
        assert shape in note
    assert not layer_map(nn.Linear(7, 3), torch.zeros(2, 7)).notes


class OnPatches(nn.Module):
    """Begins with a linear layer on patches of an image, as vision transformers may."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3 * 32 * 32, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 32, 32, width // 32, 32).permute(0, 2, 4, 1, 3, 5)
        return self.head(self.embed(patches.reshape(batch, -1, 3 * 32 * 32)).mean(1))


class Pooled(nn.Module):
    """Blocks, a pooler as BERT has one, and the mean of the sequence beside it."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(encoder) for _ in range(2))
        self.pooler, self.head, self.wide = nn.Linear(8, 8), nn.Linear(8, 3), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        pooled = self.pooler(x[:, 0])
        return self.head(pooled if self.wide else x.mean(1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_pooler_whose_result_is_left_aside_is_unused_and_not_in_the_head(granularity: Granularity) -> None:
    # as in a model that takes the mean over transformers' AutoModel; a probe would train it in vain
    x = torch.randn(2, 4, 8)
    used, aside = (layer_map(Pooled(wide), x, granularity) for wide in (True, False))
    assert used.head is not None
    assert aside.head is not None
    assert (used.unused, used.head.parameters[:2]) == ((), ("pooler.weight", "pooler.bias"))
    assert (aside.unused, aside.head.parameters) == (
        ("pooler.weight", "pooler.bias"),
        ("head.weight", "head.bias"),
    )
    assert aside.group_of("pooler.weight") == aside.names[-2]
    assert len(aside) == len(used)


def test_a_pooler_whose_result_is_kept_for_the_loop_is_used() -> None:
    class Keeping(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            self.kept = self.pooler(x[:, 0])  # for a second loss
            return logits

    layers = layer_map(Keeping(wide=False), torch.randn(2, 4, 8))
    assert layers.unused == ()
    assert layers.head is not None
    assert "pooler.weight" in layers.head.parameters


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet18", {"in_chans": 1}, "2x1x224x224"),
        ("vit_tiny_patch16_224", {"img_size": 64}, "2x3x64x64"),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "in_chans": 4}, "2x4x32x64"),
    ],
)
def test_timm_models_made_for_other_images(name: str, options: dict[str, Any], shape: str) -> None:
    # timm's configuration of the weights does not follow the channels and size that a model is made with
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    layers = layer_map(model)
    assert shape in layers.notes[0]
    assert layers.head is not None


def test_videos_are_derived_from_the_configuration() -> None:
    # several frames a sample
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.VideoMAEConfig(image_size=32, num_frames=4, **sizes)
    with torch.device("meta"):
        model = transformers.VideoMAEForVideoClassification(config)
    assert "pixel_values 2x4x3x32x32" in layer_map(model).notes[0]


def test_a_model_of_texts_may_register_its_output_layer_first() -> None:
    # registration order plays no part, in the input that is derived either
    layers = layer_map(Texts())
    assert layers.names == ("embed", "out")
    assert layers.notes == ("example input made up from the first embedding: 2x8",)


def test_where_the_derived_input_does_not_do_an_image_is_tried() -> None:
    layers = layer_map(OnPatches())
    assert layers.names == ("embed", "head")
    assert "example input made up from the usual image size: 2x3x224x224" in layers.notes
    with pytest.raises(RecordingError, match=r"not enough values to unpack"):
        layer_map(OnPatches(), torch.zeros(2, 3072))
    with pytest.raises(RecordingError, match=r"\(2, 4\) float32"):  # the first one is reported
        layer_map(nn.Sequential(nn.Linear(4, 8), nn.Conv1d(3, 3, 1)))


def test_transformers_inputs_are_derived_from_the_configuration() -> None:
    # text and image, of the configured sizes
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 50, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    note = layer_map(transformers.CLIPModel(config)).notes[0]
    assert "CLIPConfig" in note
    assert "pixel_values 2x3x32x32" in note
    assert "input_ids 2x8" in note


def test_wrong_arguments() -> None:
    # an example of another type, a granularity that does not exist
    with pytest.raises(ModelError, match="example_input is a str"):
        layer_map(SmallResNet(), "image")
    with pytest.raises(ModelError, match=r"granularity 'block' is unknown.*Did you mean 'blocks'"):
        layer_map(SmallResNet(), granularity="block")  # type: ignore[arg-type]


# -- the map as data --------------------------------------------------------------------------------


def test_equality_and_difference() -> None:
    # the same architecture gives an equal map; the difference names what moved
    one, other = layer_map(SmallResNet(), image()), layer_map(SmallResNet(), image(side=32))
    assert one == other
    assert not one.diff(other)
    assert str(one.diff(other)) == "no difference"
    model = SmallResNet()
    model.layer2.append(ConvBlock(8, 8))
    longer = layer_map(model, image())
    difference = one.diff(longer)
    assert one != longer
    assert difference
    assert difference.groups_new == ("layer2.2",)
    assert not difference.groups_gone
    assert "layer2.2.conv1.weight" in difference.parameters_new
    stages = one.diff(layer_map(SmallResNet(), image(), "stages"))
    assert stages.granularity == ("blocks", "stages")
    assert stages.moved["layer1.0.conv1.weight"] == ("layer1.0", "layer1")
    assert "groups only in the first: layer1.0" in str(stages)


def test_survives_a_state_dict_reload_and_json() -> None:
    # names hold for another instance with loaded weights, and for a map that went through JSON
    model, again = SmallResNet(), SmallResNet()
    layers = layer_map(model, image())
    again.load_state_dict(model.state_dict())
    assert layer_map(again, image()) == layers
    loaded = LayerMap.from_dict(json.loads(json.dumps(layers.to_dict())))
    assert loaded.norms == layers.norms
    assert loaded == layers
    assert loaded["fc"].flops == layers["fc"].flops
    assert loaded.depth_of("conv1.weight") == len(loaded) - 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data.pop("groups"), "'groups'"),
        (lambda data: data["groups"][0].pop("role"), "'role'"),
        (lambda data: data.update(granularity="block"), "'block'.*stages, blocks, layers"),
        (lambda data: data.update(groups=3), "int"),
    ],
)
def test_what_is_no_layer_map_is_told(change: Callable[[Any], Any], told: str) -> None:
    # the message names what is missing or wrong, and where a map comes from
    data = layer_map(SmallResNet(), image()).to_dict()
    change(data)
    with pytest.raises(PlanError, match=rf"no layer map.*{told}.*to_dict"):
        LayerMap.from_dict(data)


def test_aliases_of_group_names() -> None:
    # "stem", "head" and modules inside one group are accepted; a module over several is not
    layers = layer_map(SmallResNet(), image())
    assert layers["stem"].name == "conv1"
    assert layers["head"].name == "fc"
    assert layers["layer1.0.bn1"].name == "layer1.0"
    with pytest.raises(PlanError, match=r"covers 2 groups.*layer1\.0, layer1\.1"):
        layers["layer1"]


class HoldsTwice(nn.Module):
    """Its layer also stands in a module that is never called, as T5's embeddings do in ``shared``."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.act, self.used = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.used.weight, self.used.bias = self.shared.weight, self.shared.bias
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = self.act(x)
        return self.last(self.used(x))


def test_a_module_that_is_never_called_comes_last_in_its_group() -> None:
    """However often others were called before those of its group."""
    layers = layer_map(HoldsTwice(), torch.zeros(2, 4))
    assert layers["used"].modules == ("act", "used", "shared")


def test_the_text_of_a_map_has_no_colours(monkeypatch) -> None:
    """A log or a file gets no escape codes, though the environment asks for colours everywhere."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(layer_map(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))


def test_prints_as_a_table() -> None:
    # group, depth, modules, parameters, share; with the live model also what is trainable now
    model = SmallResNet()
    model.layer1.requires_grad_(False)
    layers = layer_map(model, granularity="stages")
    text = str(layers)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["layer1"][1] == "2"  # depth
    assert rows["fc"][1:3] == ["(head)", "0"]
    assert f"{layers.numel:,}" in rows["total"]
    assert "note: example input made up" in text
    assert "trainable" not in text
    counts = trainable_numel(layers, model)
    assert counts["layer1"] == 0
    assert counts["layer2"] == layers["layer2"].numel
    told = str(layers.table(model))
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.strip()}
    assert "trainable" in rows["group"]
    assert rows["layer1"][4] == "0"
    assert rows["total"][2] == f"{layers.numel - layers['layer1'].numel:,}"
    with pytest.raises(PlanError, match="is not in this layer map of"):
        layers.table(nn.Sequential(nn.Linear(2, 2)))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(layers)
    assert "layer2" in console.export_text()


def test_names_of_groups_are_no_markup() -> None:
    # the key of a ModuleDict may be anything without a dot; a closing tag ended in a traceback
    names = ["[/x]", "[red]", ":fire:"]
    layers = layer_map(nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names)))
    layers = dataclasses.replace(layers, unused=("[/y]",))
    assert all(name in str(layers) for name in [*names, "[/y]"])


@pytest.mark.parametrize("width", [46, 56, 66])
def test_a_narrow_table_leaves_out_columns_and_cuts_no_name_or_number(width) -> None:
    model = SmallResNet()
    layers = layer_map(model, granularity="stages")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(layers.table(model))
    text = console.export_text()
    assert "parameters" in text
    assert "modules" not in text
    assert "\u2026" not in text
    assert all(name in text for name in layers.names)


# -- cost -------------------------------------------------------------------------------------------


@pytest.mark.slow  # bounds CPU time
def test_cost_of_a_large_language_model() -> None:
    # a 7B Llama on meta within the bound of issue 3, with room for a busy machine
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    ids = {"input_ids": torch.ones(2, 64, dtype=torch.long)}
    layer_map(nn.Linear(2, 2))
    start = time.process_time()
    layers = layer_map(model, ids)
    assert time.process_time() - start < 2 * 1.5
    assert len(layers) == 34
    assert layers.numel == 6_738_415_616


@pytest.mark.slow  # bounds CPU time
def test_cost_of_a_resnet() -> None:
    # ResNet-50 within the bound of issue 3, with room for a busy machine
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50()
    layer_map(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image())
    start = time.process_time()
    layer_map(model)
    assert time.process_time() - start < 2 * 0.5


def test_cost_grows_with_the_number_of_blocks() -> None:
    # four times the blocks take little more than four times the function calls of recording and map
    def calls(blocks: int) -> int:
        net = nn.Sequential(*(Residual() for _ in range(blocks)), nn.Linear(8, 2))
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            layer_map(net, torch.zeros(2, 8))
        finally:
            sys.setprofile(None)
        return count

    calls(2)  # what is imported and looked up once
    assert calls(80) < 4.4 * calls(20)


class Voting(nn.Module):
    """A classifier after each stage; a bare parameter weighs their votes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(8, 5) for _ in range(3)])
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, votes = self.weights.softmax(0), []
        for body, norm, head in zip(self.body, self.norms, self.heads):
            x = body(x)
            votes.append(head(norm(x)))
        return sum(vote * weight for vote, weight in zip(votes, weights))


@pytest.mark.parametrize("granularity", ["stages", "blocks", "layers"])
def test_what_weighs_the_votes_of_several_heads_belongs_to_the_head(granularity) -> None:
    # timm's efficientvim: `weights` is first needed long before the last classifier
    layers = layer_map(Voting(), torch.zeros(2, 8), granularity)
    assert "weights" in layers.head.parameters
    assert len(set(layers.names)) == len(layers.names)
    assert layers.names[-1] == "heads.0"


def test_bare_parameters_between_blocks_have_a_name_of_their_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.last(torch.cos(self.first(x)) * self.scale))

    for granularity in ("stages", "blocks", "layers"):
        layers = layer_map(Scaled(), torch.zeros(2, 8), granularity)
        assert len(set(layers.names)) == len(layers.names)
        assert sum("scale" in group.parameters for group in layers.groups) == 1


def test_a_model_that_calls_none_of_its_modules_has_a_group_with_a_name() -> None:
    # it is one layer to the map; "" could not be typed
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.first.weight * self.second.weight

    layers = layer_map(Scales(), torch.zeros(2, 4))
    assert layers.names == ("first",)
    assert set(layers["first"].modules) == {"first", "second"}


def test_groups_in_another_order_or_of_another_size_are_told() -> None:
    # neither is visible in the names alone
    one = layer_map(SmallResNet(), image())
    turned = dataclasses.replace(one, groups=(one.groups[1], one.groups[0], *one.groups[2:]))
    assert one.diff(turned).reordered
    assert str(one.diff(turned)) == "the groups that both have come in another order"
    model = SmallResNet()
    model.fc = nn.Linear(8, 10)
    wider = layer_map(model, image())
    assert one.diff(wider).resized == {"fc": (45, 90)}
    assert str(one.diff(wider)) == "groups of another size: fc (45 -> 90)"


def test_a_parameter_that_is_not_there_is_told() -> None:
    # with the closest names
    with pytest.raises(PlanError, match=r"'fc.weigth' is not in this layer map.*Did you mean 'fc.weight'"):
        layer_map(SmallResNet(), image()).group_of("fc.weigth")


@pytest.mark.parametrize("place", [0, -1, slice(0, 2)])
def test_a_group_is_taken_by_its_name_and_by_its_place_from_the_tuple_of_groups(place) -> None:
    # In a Sequential names are numbers, and layers[0] would be another group than layers["0"].
    with pytest.raises(PlanError, match=r"expected the name of a group.* layers.groups\[0\]"):
        layer_map(SmallResNet(), image())[place]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x)[0][:, -1])


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("ASTForAudioClassification", {"max_length": 48, "num_mel_bins": 32}, "input_values 2x48x32"),
        (
            "WhisperForAudioClassification",
            {"d_model": 16, "max_source_positions": 20, "num_mel_bins": 16},
            "input_features 2x16x40",
        ),
        (
            "Wav2Vec2ForSequenceClassification",
            {
                "conv_dim": (8, 8),
                "conv_stride": (5, 2),
                "conv_kernel": (10, 3),
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
            },
            "input_values 2x16000",
        ),
    ],
)
def test_sounds_are_derived_from_the_configuration(kind: str, options: dict, told: str) -> None:
    # spectrograms of the configured size, or a second of a waveform
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, kind)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind.startswith("Whisper"):
        small = {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
        }
    layers = layer_map(model_class(model_class.config_class(**{**small, **options})))
    assert told in layers.notes[0]
    assert layers.head is not None
