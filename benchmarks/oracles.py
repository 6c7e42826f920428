"""Layer maps judged by what others wrote: timm's groups and classifiers, transformers' layer numbers.

Used by ``benchmarks/layer_maps.py`` over everything and by ``tests/parity`` over a sample.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from benchmarks.transformers_models import Small
from layerwise.layers.inputs import example_arguments
from layerwise.layers.layermap import Granularity, LayerMap
from layerwise.layers.mapping import map_recording
from layerwise.layers.recording import record


@dataclass
class Verdict:
    """What the oracles say about one model's map.

    Attributes:
        name: of the model.
        error: why it could not be mapped; ``""`` if it could.
        layers: the map at block granularity.
        pairs: pairs of parameters that the oracle puts in different groups.
        discordant: pairs among them that the map orders the other way round.
        worst: parameters with most discordant pairs.
        head: whether the output layers are the oracle's; None where it names none.
        first: whether its first convolution stands in the first group; None likewise.
        complete: whether every parameter stands in exactly one group, at every granularity.
        expected_blocks, found_blocks: number of encoder layers by the configuration and in the map.
    """

    name: str
    error: str = ""
    layers: LayerMap | None = None
    pairs: int = 0
    discordant: int = 0
    worst: tuple[str, ...] = ()
    head: bool | None = None
    first: bool | None = None
    complete: bool = False
    expected_blocks: int = 0
    found_blocks: int = 0


def disorder(position: Mapping[str, int], oracle: Mapping[str, int]) -> tuple[int, int]:
    """Return (discordant, all) pairs of parameters that `oracle` puts in different groups.

    A pair is discordant if `position` has the two strictly the other way round; the same group is fine.
    """
    by_group: dict[int, list[int]] = collections.defaultdict(list)
    for name, group in oracle.items():
        if name in position:
            by_group[group].append(position[name])
    discordant = pairs = 0
    earlier: list[int] = []
    for group in sorted(by_group):
        for place in by_group[group]:
            pairs += len(earlier)
            discordant += len(earlier) - bisect.bisect_right(earlier, place)
        for place in by_group[group]:
            bisect.insort(earlier, place)
    return discordant, pairs


def culprits(position: Mapping[str, int], oracle: Mapping[str, int]) -> tuple[str, ...]:
    """Return up to three parameters without which the order would be better, the worst first."""
    blame: collections.Counter[str] = collections.Counter()
    for name in oracle:
        for other in oracle:
            if oracle[name] < oracle[other] and position.get(name, 0) > position.get(other, 0):
                blame.update((name, other))
    return tuple(name for name, _ in blame.most_common(3))


def is_complete(layers: LayerMap, model: nn.Module) -> bool:
    """Whether each parameter of `model` stands in exactly one group under its first name."""
    stands = collections.Counter(name for group in layers for name in group.parameters)
    return stands == collections.Counter(dict(model.named_parameters()).keys())


def _mapped(model: nn.Module, example: Any = None) -> tuple[LayerMap, bool]:
    """Return the map by blocks, and whether it is complete at every granularity, from one recording."""
    (args, kwargs), notes = example_arguments(model, example)
    recording = record(model, args, kwargs, mode="eval")
    stages, blocks, layers = (map_recording(recording, g, notes=notes) for g in get_args(Granularity))
    return blocks, all(is_complete(one, model) for one in (stages, blocks, layers))


def _places(layers: LayerMap) -> dict[str, int]:
    return {name: place for place, group in enumerate(layers) for name in group.parameters}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own deprecations are not the subject here
        yield


def on_meta(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a model on meta, or for real if its constructor needs data."""
    try:
        with torch.device("meta"):
            model: nn.Module = build(*args, **kwargs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        model = build(*args, **kwargs)
    return model


# -- timm -----------------------------------------------------------------------------------------


def timm_names() -> list[str]:
    """Return a small architecture of each timm family, and the middle and last of larger families."""
    import timm

    registry = timm.models._registry._model_to_module
    families: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        families.setdefault((registry[name], re.split(r"[_\d.]", name)[0]), []).append(name)
    sizes = ("test", "pico", "nano", "tiny", "_xxs", "_xs", "_s0", "small", "_s", "base")
    names: dict[str, None] = {}
    for members in families.values():
        small = next((name for size in sizes for name in members if size in name), members[0])
        names[small] = None
        if len(members) >= 6:
            names |= dict.fromkeys((members[-1], members[len(members) // 2]))
    return list(names)


def timm_family(name: str) -> tuple[str, str]:
    """Return (module, first part of the name), the key of the families in `timm_names`."""
    import timm

    return timm.models._registry._model_to_module[name], re.split(r"[_\d.]", name)[0]


def judge_timm(name: str) -> Verdict:
    """Map a timm model and compare it with timm's ``group_matcher`` and ``default_cfg``."""
    import timm
    from timm.models._manipulate import group_parameters

    with _quiet():
        model = on_meta(timm.create_model, name)
        try:
            layers, complete = _mapped(model)
        except Exception as error:
            return Verdict(name, error=f"{type(error).__name__}: {error}"[:300])
        verdict = Verdict(name, layers=layers, complete=complete)
        places = _places(layers)
        if hasattr(model, "group_matcher"):
            oracle = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
            verdict.discordant, verdict.pairs = disorder(places, oracle)
            if verdict.discordant:
                verdict.worst = culprits(places, oracle)
    parameters = dict(model.named_parameters())

    def real(entry: Any) -> set[str]:
        paths = [entry] if isinstance(entry, str) else list(entry or ())
        return {path for path in paths if any(n.startswith(path + ".") for n in parameters)}

    if classifier := real(model.default_cfg.get("classifier")):
        verdict.head = set(layers.outputs) == classifier
    if first := real(model.default_cfg.get("first_conv")):
        verdict.first = all(
            places[name] == 0 for name in parameters if any(name.startswith(path + ".") for path in first)
        )
    return verdict


# -- torchvision ----------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """Return all torchvision models: classification, segmentation, detection, video."""
    from torchvision import models

    return models.list_models(include="*")


def judge_torchvision(name: str) -> Verdict:
    """Map a torchvision model; its registration order is the oracle for classification models."""
    from torchvision import models

    with _quiet():
        model = on_meta(models.get_model, name, weights=None, **_options(name)).eval()
        try:
            layers, complete = _mapped(model, _torchvision_input(model, name))
        except Exception as error:
            return Verdict(name, error=f"{type(error).__name__}: {error}"[:300])
    verdict = Verdict(name, layers=layers, complete=complete)
    places = _places(layers)
    if "." in type(model).__module__.removeprefix("torchvision.models."):
        return verdict  # only classification models are registered in the order in which they run
    registered = {
        parameter: number
        for number, (parameter, _) in enumerate(model.named_parameters())
        if parameter not in layers.unused
    }
    verdict.discordant, verdict.pairs = disorder(places, registered)
    if verdict.discordant:
        verdict.worst = culprits(places, registered)
    last = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(("AuxLogits", "aux"))
    ][-1:]
    verdict.head = list(layers.outputs) == (last or ["classifier.1"])  # SqueezeNet ends in a convolution
    return verdict


def _options(name: str) -> dict[str, Any]:
    """Return what keeps torchvision from downloading weights, and detection images small."""
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False}
    if name.startswith("ssd"):
        return {"weights_backbone": None}
    if any(word in name for word in ("rcnn", "fcos", "retina")):
        return {"weights_backbone": None, "min_size": 128, "max_size": 160}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        return {"weights_backbone": None}
    return {}


def _torchvision_input(model: nn.Module, name: str) -> Any:
    kind = type(model).__module__
    if "optical_flow" in kind:
        return (torch.zeros(2, 3, 128, 128), torch.zeros(2, 3, 128, 128))
    if "video" in kind:
        return (
            torch.zeros(2, 3, 16, 224, 224)
            if name.startswith(("mvit", "swin", "s3d"))
            else torch.zeros(2, 3, 8, 112, 112)
        )
    if "detection" in kind:
        return ([torch.rand(3, 128, 128), torch.rand(3, 128, 128)],)
    if "quantization" in kind or "inception" in name:
        return torch.zeros(2, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224)
    return None


# -- transformers ---------------------------------------------------------------------------------


def numbered_layers(layers: LayerMap, model: nn.Module) -> dict[str, list[int]]:
    """Return container path -> the places of the groups of its numbered children.

    Containers are the innermost ``nn.ModuleList`` or ``nn.Sequential``s whose children are of one class,
    and have at least two weight matrices each, of those that do not lie in such a child of a *residual
    kind*: the lists that a reader would call the network's layers.
    """
    places = _places(layers)
    result: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if type(module) not in (nn.ModuleList, nn.Sequential):
            continue
        children = list(module)
        if len(children) < 2 or len({type(child) for child in children}) != 1:
            continue
        owned = [[n for n in places if n.startswith(f"{path}.{number}.")] for number in range(len(children))]
        if all(sum(model.get_parameter(n).ndim > 1 for n in names) >= 2 for names in owned):
            result[path] = [
                collections.Counter(places[n] for n in names).most_common(1)[0][0] for names in owned
            ]
    return {
        path: spots
        for path, spots in result.items()
        if len(set(spots)) > 1
        and not any(other.startswith(path + ".") for other in result if len(set(result[other])) > 1)
    }


def judge_transformers(small: Small) -> Verdict:
    """Map a small transformers model and compare it with its layers' numbers and its configuration."""
    with _quiet():
        torch.manual_seed(0)
        model = small.build()
        try:
            layers, complete = _mapped(model, small.example())
        except Exception as error:
            return Verdict(small.name, error=f"{type(error).__name__}: {error}"[:300])
    verdict = Verdict(small.name, layers=layers, complete=complete, expected_blocks=small.layers)
    numbered = numbered_layers(layers, model)
    if not numbered:  # ALBERT's layers share one set of weights
        verdict.found_blocks = sum(group.role == "trunk" for group in layers)
    for spots in numbered.values():
        pairs = list(itertools.pairwise(spots))
        verdict.pairs += len(pairs)
        verdict.discordant += sum(one > other for one, other in pairs)
        verdict.found_blocks += len(set(spots))
    return verdict
