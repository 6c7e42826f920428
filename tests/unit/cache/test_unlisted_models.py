"""Models that write their forward in unusual ways are trained exactly, or not cached for a named reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import assert_same, train
from unlisted_models import CASES, Net
from versions import needs_operators_in_modes


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_operators_in_modes) if n == "flexible attention" else n for n in CASES],
)
@pytest.mark.filterwarnings("ignore:The prefix cache is off", "ignore:flex_attention called without")
def test_exact_or_refused_with_a_reason(name) -> None:
    # two shuffled epochs with a smaller last batch: same losses, weights, buffers and random state
    case = CASES[name]
    samples = case.samples()
    plain = train(case.make, samples, *case.learning, cached=False, step=case.loss, epochs=2)
    cached = train(case.make, samples, *case.learning, cached=True, step=case.loss, epochs=2)
    assert_same(plain, cached)
    assert re.search(case.expected, cached.text), cached.text
    torch.manual_seed(0)
    start = case.make().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in cached.weights.items())


def test_a_batch_of_two_is_not_proved_by_a_batch_of_one() -> None:
    # a frozen module runs after a batch-norm that learns, which cannot train on a single sample
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.late = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x).mean((2, 3))
            return self.head(self.norm(x) + self.late(x))

    samples = CASES["u-net"].samples()
    plain = train(Late, samples, "norm", "head", cached=False, batch=2, epochs=2)
    cached = train(Late, samples, "norm", "head", cached=True, batch=2, epochs=2)
    assert_same(plain, cached)
    assert "late (" in cached.text


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
def test_the_layers_that_adapters_adapt_are_cached_too() -> None:
    # of a layer with LoRA only the adapter learns; its frozen products of the layer before are stored
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ids = torch.randint(0, 50, (16, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]

    def trained(cached: bool) -> tuple[dict[str, Tensor], str]:
        torch.manual_seed(0)
        bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        lora = peft.LoraConfig("SEQ_CLS", r=2, lora_dropout=0.1, layers_to_transform=[2])
        model = peft.get_peft_model(bert, lora)
        layers = layerwise.layer_map(model, {"input_ids": ids[:2]})
        plan = layerwise.top_k(layers, k=2, epochs=3)
        loader = DataLoader(data, 4, shuffle=True)
        tuner = layerwise.Tuner(model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=4, layers=layers)
        cache = layerwise.PrefixCache(model, loader, storage="memory", tuner=tuner)
        for _ in tuner.epochs():
            model.train()
            for batch in cache.batches() if cached else loader:
                model(**batch).loss.backward()
                tuner.step()
        return {n: p.detach().clone() for n, p in model.named_parameters()}, cache.describe()

    (plain, _), (weights, told) = trained(False), trained(True)
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)  # zero at the start
    assert "encoder.layer.1, " in told
    assert "layer.2.attention.self.query.base_layer" in told


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_layers_that_have_no_shape_yet() -> None:
    # they take it from the loop's first batch; from then on the model is cached
    def weights(cached: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8).requires_grad_(False), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(2)
        )
        loader = DataLoader(TensorDataset(torch.randn(12, 6), torch.arange(12) % 2), 4)
        cache = layerwise.PrefixCache(model, loader, storage="memory")
        for _ in range(3):
            for x, y in cache.batches() if cached else loader:
                loss = nn.functional.cross_entropy(model(x), y)
                learning = [p for p in model.parameters() if p.requires_grad]
                for p, gradient in zip(learning, torch.autograd.grad(loss, learning)):
                    p.data -= gradient
        assert not cached or "memory, cut at" in cache.describe()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(cached=True), weights(cached=False))
