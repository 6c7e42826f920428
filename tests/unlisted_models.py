"""Small models of kinds that are in no list: each writes its forward in another way.

`CASES` names them all. What a `Case` expects is where the model is cut, or why it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Attributes:
        make: the model.
        learning: children that learn.
        expected: regular expression found in `PrefixCache.describe`.
        samples: the dataset.
        loss: of a batch; default: cross-entropy of ``model(x)``.
    """

    make: Callable[[], nn.Module]
    learning: tuple[str, ...]
    expected: str
    samples: Callable[[], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


COUNT = 22


def pictures(*shape: int) -> Callable[[], list[Any]]:
    """Return what makes samples of random numbers of a shape, with a label each."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [(torch.randn(*shape, generator=generator), torch.tensor(i % 4)) for i in range(COUNT)]

    return make


PLACE = "the last bits of .* depend on a sample's place"  # of an LSTM of oneDNN's on a processor with AVX2


def words() -> list[Any]:
    """Return samples of eight token numbers, with a label each."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(1, 30, (8,), generator=generator), torch.tensor(i % 4)) for i in range(COUNT)]


def named(**shapes: tuple[int, ...]) -> Callable[[], list[Any]]:
    """Return what makes samples that are dictionaries of random numbers, with ``labels``."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [
            {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
            | {"labels": torch.tensor(i % 4)}
            for i in range(COUNT)
        ]

    return make


def by_name(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a model that takes its inputs by name."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs), batch["labels"])


def both(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a model that returns logits and a further loss."""
    logits, loss = model(batch[0])
    return nn.functional.cross_entropy(logits, batch[1]) + loss


image, vector, frames = pictures(3, 8, 8), pictures(16), pictures(5, 3, 8, 8)


class Stem(nn.Sequential):
    """Two convolutions; what most models below freeze."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3))


class Net(nn.Module):
    """A frozen `body`, and a `head` that learns."""

    def __init__(self, body: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body if body is not None else Stem()
        self.head = head if head is not None else nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).mean((2, 3)))


# -- weights and modules used twice ---------------------------------------------------------------


class FrozenWeightUsedAgain(Net):
    """The trained part reads a weight of the frozen one, as language models with tied embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        return self.head(x @ self.body[2].weight.mean((2, 3)))


class LearningWeightUsedEarly(nn.Module):
    """A weight that learns is read first: what follows it must not be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = nn.functional.linear(x, self.last.weight.new_ones(16, 16) * self.last.weight.mean())
        return self.last(self.middle(x))


class CalledTwice(nn.Module):
    """One frozen block is called before and after a layer that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.middle(self.block(self.block(x).relu())).relu()))


class Siamese(Net):
    """One frozen body sees two inputs."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.body(left).mean((2, 3)), self.body(right).mean((2, 3))
        return self.head((left - right).abs())


class SiameseInOne(Net):
    """One frozen body, and a layer that learns, see two inputs as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        features = self.body(torch.cat([left, right]))
        left, right = self.middle(features.movedim(1, -1)).mean((1, 2)).chunk(2)
        return self.head((left - right).abs())


class WithLossOfTheBatch(Net):
    """The frozen body also returns one number for the whole batch, as vector quantisers do."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return self.last(x.round()), (x - x.round()).pow(2).mean()

    def __init__(self) -> None:
        super().__init__(self.Body())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, loss = self.body(x)
        return self.head(x.mean((2, 3))), loss


class KeepsFeatures(Net):
    """Keeps what the frozen body gave, which the loss reads, and a map of it inside the body."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.map = nn.Conv2d(3, 8, 3), None

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.map = x.mean(1, keepdim=True).relu()
            return x * self.map

    def __init__(self) -> None:
        super().__init__(nn.Sequential(self.Attending(), nn.Conv2d(8, 8, 3)))
        self.kept: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.kept["features"] = [x.mean((2, 3))]
        return self.head(x.relu().mean((2, 3)))


class KeepsOutput(Net):
    """A frozen layer keeps just what it returns: were it skipped, that would be the last batch's."""

    class Keeping(nn.Conv2d):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 8, 3), self.Keeping(8, 8, 3)))


def kept_output_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with what the frozen layer kept."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return loss + model.head(model.body[1].kept.mean((2, 3))).pow(2).mean()


def kept_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with what the model kept."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return loss + model.head(model.kept["features"][0]).pow(2).mean() * model.body[0].map.mean()


# -- Python that decides --------------------------------------------------------------------------


class BranchOnTheBatch(nn.Module):
    """Takes a branch by the mean of the whole batch: a sample's value depends on its companions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * 2 if x.mean() > 0 else x - 1


class BranchBetweenModules(Net):
    """The same in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        x = x * 2 if x.mean() > 0 else x - 1
        return self.head(x)


class ScaledByTheBatch(nn.Module):
    """Divides by the largest number of the whole batch, as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x / float(x.abs().max().item())


class ReadsTraining(nn.Module):
    """Asks `self.training`, which is False while it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + torch.rand_like(x) if self.training else x


class CountsCalls(nn.Module):
    """Changes with a Python counter: a schedule inside the model, which no check on one batch can see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * (1 + 0.1 * self.calls)


# -- values that change in place, and buffers -----------------------------------------------------


class ChangesInPlace(Net):
    """The model's own forward writes into what the frozen body returned."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x[:, 0] = 0
        x.clamp_(min=-1).add_(0.5)
        return self.head(x.mean((2, 3)))


class RunningMean(nn.Module):
    """Keeps a moving average of what passes, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.average.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x


class CountedByNewTensor(RunningMean):
    """The same, with a new tensor in place of the buffer's."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        return x


def weight_norm() -> nn.Module:
    """Return a body whose weight is made of two parameters at each call."""
    body = Stem()
    nn.utils.parametrizations.weight_norm(body[0])
    return Net(body)


def spectral_norm() -> nn.Module:
    """Return a body whose weight is divided by a norm that a buffer estimates."""
    body = Stem()
    nn.utils.parametrizations.spectral_norm(body[2])
    return Net(body)


def old_weight_norm() -> nn.Module:
    """Return a body with weight normalisation by a forward pre-hook, as older checkpoints have it."""
    body = Stem()
    conv = body[0]
    conv.register_parameter("scale", nn.Parameter(torch.ones(8, 1, 1, 1)))
    conv.register_parameter("direction", nn.Parameter(conv.weight.detach().clone()))
    del conv._parameters["weight"]

    def compute(module: nn.Module, _: Any) -> None:
        module.weight = module.scale * module.direction / module.direction.norm()

    conv.register_forward_pre_hook(compute)
    return Net(body)


def hooked() -> nn.Module:
    """Return a body with a user's hook that changes its output."""
    body = Stem()
    body[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return Net(body)


# -- shapes and structures ------------------------------------------------------------------------


class Frames(Net):
    """Batch and time are one dimension in the frozen body: (batch, time, 3, 8, 8)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        x = self.body(x.flatten(0, 1)).mean((2, 3))
        return self.head(x.unflatten(0, (batch, time)).mean(1))


class TimeFirst(Net):
    """As recurrent networks like it: (time, batch, features) after the frozen body."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.transpose(0, 1).flatten(0, 1)).mean((2, 3))
        return self.head(x.unflatten(0, (5, -1)).amax(0))


class UNet(nn.Module):
    """The trained decoder reads three frozen levels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.three = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.up1, self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x).relu()
        two = self.two(one).relu()
        x = self.up1(self.three(two).relu())
        x = self.up2(torch.cat([x, two], 1))
        return self.head(torch.cat([x, one], 1).mean((2, 3)))


@dataclass
class Features:
    """What a module hands on."""

    maps: Tensor
    pooled: Tensor
    scale: float = 2.0


class GivesDataclass(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Features:
        x = self.conv(x)
        return Features(x, x.mean((2, 3)))


class TakesDataclass(Net):
    """Reads one, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__(GivesDataclass())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.body(x)
        return {"logits": self.head(found.pooled * found.scale), "maps": found.maps}


class Bag:
    """An object that is no dataclass: tensors in it cannot be seen."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps


class GivesObject(nn.Module):
    """Returns an object with a tensor in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Bag:
        return Bag(self.conv(x))


class TakesObject(Net):
    """Reads it."""

    def __init__(self) -> None:
        super().__init__(GivesObject())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).maps.mean((2, 3)))


class TwoInputs(nn.Module):
    """An image and a table row, each with a frozen encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.read, self.head = Stem(), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        return self.head(torch.cat([self.see(image).mean((2, 3)), self.read(row)], 1))


class Prototypes(nn.Module):
    """Compares each sample with the batch's own rows of a second input (few-shot learning)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(1, 4)

    def forward(self, query: Tensor, support: Tensor) -> Tensor:
        query, support = self.body(query), self.body(support).mean(0, keepdim=True)
        return self.head((query - support).pow(2).sum(1, keepdim=True))


# -- kinds of layers ------------------------------------------------------------------------------


class ConvRecurrent(nn.Module):
    """A recurrent network that learns on a frozen convolutional stem."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = Stem(), kind(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.stem(x).mean(2).transpose(1, 2)
        return self.head(self.rnn(sequence)[0][:, -1])


class FrozenRecurrent(nn.Module):
    """The recurrent network is frozen; it returns its states as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(30, 8), nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.rnn(self.embed(x))
        return self.head(torch.cat([hidden[0], hidden[1]], 1))


class Packed(nn.Module):
    """Packs sequences of different lengths for a frozen recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(30, 8), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x % 8 + 1)[:, 0]
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, True, enforce_sorted=False)
        _, hidden = self.rnn(packed)
        return self.head(hidden[0])


class Attention(nn.Module):
    """A frozen encoder of torch, with its fast path, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x), src_key_padding_mask=x < 4).mean(1))


class FlexibleAttention(nn.Module):
    """A frozen attention by an operator that takes a function, which reads a table of the model."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.table = nn.Linear(16, 48), nn.Parameter(torch.linspace(0, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
            mixed = flex_attention(query, key, value, score_mod=lambda s, b, h, i, j: s + self.table[j])
            assert isinstance(mixed, Tensor)
            return mixed[:, 0]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(30, 16), self.Mixing(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).mean(1))


class BareAttention(nn.Module):
    """A frozen `nn.MultiheadAttention`, which returns its weights as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(30, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed, weights = self.mix(x, x, x)
        return self.head((mixed * weights.mean(1)[..., None]).sum(1))


class Checkpointed(Net):
    """Frozen and learning parts recompute their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False)
        x = checkpoint(self.middle, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class CheckpointedTogether(Checkpointed):
    """One checkpoint is around frozen and learning parts."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: self.middle(self.body(x)), x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class CheckpointedLate(Checkpointed):
    """The cut lies in a checkpoint, the stored value before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = checkpoint(lambda x: self.middle(x) + 1, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class Experts(nn.Module):
    """Sends each sample to one of three experts, by a Python loop over masks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.gate(x).argmax(-1)
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().flatten()
            if len(rows):
                output[rows] = expert(x[rows])
        return output


class Mixture(nn.Module):
    """Frozen experts below a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(16, 16), Experts(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x).relu()))


class Sound(nn.Module):
    """A one-dimensional convolutional network on a wave, as for pitch and voice detection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.body = nn.Sequential(nn.Conv1d(9, 8, 3), nn.ReLU(), nn.BatchNorm1d(8), nn.MaxPool1d(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 16, 4, window=self.window, return_complex=True).abs()
        return self.head(self.body(spectrum.clamp(min=1e-5).log()).mean(2))


class Tokens(nn.Module):
    """Frozen embeddings and positions, integer inputs, positions made anew for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(30, 16), nn.Embedding(8, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x = self.embed(x) * math.sqrt(16) + self.places(places)
        return self.head(self.body(x).relu().mean(1))


class LearningPosition(Tokens):
    """A position table that learns between frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ParameterList([nn.Parameter(torch.randn(8, 16))])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.table[0]).mean(1))


class GradientInside(Net):
    """Asks for gradients with respect to its own features: an energy model."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3)).detach().requires_grad_(True)
        energy = self.head(x).pow(2).sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(x + slope)


class ScaledByLoneNumber(Net):
    """Takes the root of a tensor without dimensions, as disentangled attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x / torch.sqrt(torch.tensor(8.0))).mean((2, 3)))


class NoGradBody(Net):
    """Runs its frozen body under ``no_grad``, as many do by hand."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x.mean((2, 3)))


class MemoryOfLastBatch(nn.Module):
    """Remembers the last batch's features for the next call: a memory bank."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.last = nn.Linear(16, 8), nn.Linear(8, 4), torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        mixed = x + 0.1 * self.last
        self.last = x.detach().mean(0)
        return self.head(mixed)


def dictionary_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a model that returns a dictionary."""
    found = model(batch[0])
    return nn.functional.cross_entropy(found["logits"], batch[1]) + found["maps"].mean()


CASES = {
    "frozen weight used again": Case(FrozenWeightUsedAgain, ("head",), "cut at input of head ", image),
    "learning weight used early": Case(
        LearningWeightUsedEarly, ("last",), "cut at first .*reads 'last.weight'", vector
    ),
    "called twice": Case(CalledTwice, ("middle", "head"), "cut at block#1 ", vector),
    "siamese": Case(
        Siamese, ("head",), "cut at input of head ", named(left=(3, 8, 8), right=(3, 8, 8)), by_name
    ),
    "siamese in one batch": Case(
        SiameseInOne, ("middle", "head"), "cut at body ", named(left=(3, 8, 8), right=(3, 8, 8)), by_name
    ),
    "loss of the batch": Case(
        WithLossOfTheBatch,
        ("head",),
        "cut at body.conv, input of head .*a value that mixes the samples",
        image,
        both,
    ),
    "output kept": Case(KeepsOutput, ("head",), "cut at body.0 ", image, kept_output_loss),
    "features kept": Case(KeepsFeatures, ("head",), "cut at body.0.conv, body.1 ", image, kept_loss),
    "branch on the batch": Case(
        lambda: Net(BranchOnTheBatch()), ("head",), "cut at body.conv .*hands Python a value", image
    ),
    "branch between modules": Case(
        BranchBetweenModules, ("head",), "cut at body .*hands Python a value", image
    ),
    "scaled by the batch": Case(
        lambda: Net(ScaledByTheBatch()), ("head",), "cut at body.conv .*hands Python a value", image
    ),
    "reads training": Case(lambda: Net(ReadsTraining()), ("head",), "cut at input of head ", image),
    "counts calls": Case(
        lambda: Net(CountsCalls()),
        ("head",),
        "off: .*belongs to a module that changes its 'calls' from call to call",
        image,
    ),
    "changes in place": Case(ChangesInPlace, ("head",), "cut at input of head ", image),
    "running mean": Case(
        lambda: Net(RunningMean()),
        ("head",),
        "cut at body.conv .*changes a buffer 'body.average' in place",
        image,
    ),
    "running mean by a new tensor": Case(
        lambda: Net(CountedByNewTensor()),
        ("head",),
        "off: .*belongs to a module that changes its 'average' from call to call",
        image,
    ),
    "weight norm": Case(weight_norm, ("head",), "cut at input of head ", image),
    "weight norm by hook": Case(old_weight_norm, ("head",), "off: .*a module with a hook", image),
    "spectral norm": Case(spectral_norm, ("head",), "cut at input of head ", image),
    "hooked": Case(hooked, ("head",), "off: .*a module with a hook", image),
    "frames": Case(Frames, ("head",), "cut at input of head ", frames),
    "time first": Case(TimeFirst, ("head",), "cut at input of head ", frames),
    "u-net": Case(UNet, ("up1", "up2", "head"), "cut at one, two, three ", image),
    "dataclass": Case(TakesDataclass, ("head",), r"cut at body, body\[1\] ", image, dictionary_loss),
    "object": Case(TakesObject, ("head",), "cut at input of head ", image),
    "two inputs": Case(
        TwoInputs, ("head",), "cut at input of head ", named(image=(3, 8, 8), row=(16,)), by_name
    ),
    "prototypes": Case(
        Prototypes, ("head",), "cut at body, body#1 ", named(query=(16,), support=(16,)), by_name
    ),
    "lstm on a stem": Case(lambda: ConvRecurrent(nn.LSTM), ("rnn", "head"), "cut at stem ", image),
    "gru on a stem": Case(lambda: ConvRecurrent(nn.GRU), ("rnn", "head"), "cut at stem ", image),
    "frozen lstm": Case(FrozenRecurrent, ("head",), rf"cut at rnn\[1\] |off: {PLACE}", words),
    "packed": Case(Packed, ("head",), "off: no part .*in rnn hands Python a value", words),
    "transformer encoder": Case(Attention, ("head",), "cut at input of head ", words),
    "flexible attention": Case(FlexibleAttention, ("head",), "cut at input of head ", words),
    "multi-head attention": Case(BareAttention, ("head",), "cut at input of head ", words),
    "checkpointed": Case(Checkpointed, ("middle", "head"), "cut at body ", image),
    "checkpointed together": Case(
        CheckpointedTogether, ("middle", "head"), "off: gradient checkpointing runs frozen and", image
    ),
    "checkpointed late": Case(CheckpointedLate, ("middle", "head"), "cut at body ", image),
    "experts": Case(
        Mixture, ("head",), "cut at first, body.gate .*'nonzero' in body hands Python a value", vector
    ),
    "sound": Case(Sound, ("head",), "cut at input of head ", pictures(64)),
    "tokens": Case(Tokens, ("head",), "cut at input of head ", words),
    "position that learns": Case(
        LearningPosition, ("table", "head"), "off: no part .*reads 'table.0'", words
    ),
    "gradient inside": Case(GradientInside, ("head",), "cut at body ", image),
    "scaled by a lone number": Case(ScaledByLoneNumber, ("head",), "cut at input of head ", image),
    "no_grad by hand": Case(NoGradBody, ("head",), "cut at input of head ", image),
    "memory of the last batch": Case(
        MemoryOfLastBatch,
        ("head",),
        "off: .*belongs to a module that changes its 'last' from call to call",
        vector,
    ),
}
