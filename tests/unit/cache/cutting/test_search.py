"""Where a forward pass is cut: nothing stale, nothing missing, and no more bytes than needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.cache.cutting.cut import Cut, NothingToSkipError
from layerwise.cache.cutting.search import find_cut
from layerwise.layers.recording import record


def cut(model: nn.Module, x, *learning: str, **options) -> Cut:
    names = frozenset(n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(learning))
    return find_cut(record(model, (x,)), names, **options)


def sites(found: Cut) -> list[str]:
    return [str(site) for site in found.frontier]


class Tokens(nn.Module):
    """A small transformer-like net: tokens, two blocks, a norm, the first token to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.randn(1, 10, 8))
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.blocks(self.embed(x) + self.position)
        return self.head(self.norm(x)[:, 0])


X = torch.zeros(4, 10, 6)


def test_pooling_before_the_head_is_stored_pooled() -> None:
    # one token of ten: 32 bytes instead of 320
    model = Tokens().eval()
    found = cut(model, X, "head")
    assert sites(found) == ["input of head"]
    assert found.bytes_per_sample == 32
    assert sites(cut(model, X, "head", at_inputs=False)) == ["norm"]


def test_cut_at_the_output_where_nothing_is_gained_by_the_input() -> None:
    assert sites(cut(Tokens().eval(), X, "blocks.1", "norm", "head")) == ["blocks.0"]


class Pair(nn.Module):
    """Mixes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, one, other):
        return (one * other) @ self.weight


class Sides(nn.Module):
    """A frozen body, pooled; a side that learns; `end(model, pooled, head's output)` is returned."""

    def __init__(self, end) -> None:
        super().__init__()
        self.body, self.side, self.head, self.tail = nn.Linear(6, 8), nn.Linear(6, 8), Pair(), nn.Linear(3, 3)
        self.end = end

    def forward(self, x):
        pooled = self.body(x).mean(1)
        return self.end(self, pooled, self.head(pooled, self.side(x).mean(1)))


@pytest.mark.parametrize(
    ("end", "where"),
    [
        (lambda model, pooled, y: model.tail(y), "input of head"),
        (lambda model, pooled, y: y * torch.ones_like(pooled)[:, :3], "input of head"),
        (lambda model, pooled, y: y * pooled[:, :3], "body"),
        (lambda model, pooled, y: model.tail(y) * pooled[:, :3], "body"),
    ],
    ids=["inside only", "its shape behind", "right behind", "later"],
)
def test_an_argument_is_stored_where_it_is_read_inside_the_call_only(end, where) -> None:
    assert sites(cut(Sides(end), X, "side", "head", "tail")) == [where]


def test_what_runs_without_being_read_gets_what_it_reads() -> None:
    # a batch-norm that only follows the statistics
    class Followed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.statistics = nn.BatchNorm1d(10)

        def forward(self, x):
            x = self.embed(x)
            self.statistics(x)
            return self.head(self.norm(x)[:, 0])

    assert sites(cut(Followed().train(), X, "head")) == ["embed", "input of head"]


def test_a_length_that_a_frozen_module_counts_and_python_reads_is_stored() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, ids):
            return self.linear(self.table(ids)), (ids != 0).sum(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Counted(), nn.Linear(6, 2)

        def forward(self, ids):
            x, lengths = self.body(ids)
            return self.head(x[:, : int(lengths.max())])

    ids = torch.ones(4, 10, dtype=torch.long)
    assert sites(cut(Net(), ids, "head", at_inputs=False)) == ["body", "body[1]"]


def test_a_trained_parameter_in_the_glue_is_dirty() -> None:
    # position belongs to no submodule: the add that reads it runs, and what feeds it is cached
    found = cut(Tokens().eval(), X, "position")
    assert sites(found) == ["embed"]


def test_what_is_read_is_named_for_the_fingerprint() -> None:
    found = cut(Tokens().eval(), X, "blocks.1", "norm", "head")
    (source,) = found.sources.values()
    assert source.tensors == ("blocks.0.bias", "blocks.0.weight", "embed.bias", "embed.weight", "position")
    assert 0 < found.skipped_flops < found.flops


def test_another_input_has_another_structure() -> None:
    class Chosen(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.body, self.head, self.number = nn.Linear(4, 4), nn.Linear(4, 2), number

        def forward(self, *inputs):
            return self.head(self.body(inputs[self.number]))

    pair = torch.zeros(3, 4), torch.zeros(3, 4)
    names = frozenset({"head.weight"})
    found = [find_cut(record(Chosen(number), pair), names).sources for number in (0, 0, 1)]
    one, same, other = ({source.structure for source in sources.values()} for sources in found)
    assert one == same != other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b, low, high: a - b, lambda a, b, low, high: b - a),
        (lambda a, b, low, high: torch.stack([a, b, a]), lambda a, b, low, high: torch.stack([a, b, b])),
        (lambda a, b, low, high: low / high, lambda a, b, low, high: high / low),  # results of one operation
        (lambda a, b, low, high: low, lambda a, b, low, high: high),
    ],
)
def test_arguments_and_results_in_another_order_have_another_structure(one, other) -> None:
    class Inner(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.low, self.function = nn.Linear(6, 6), function

        def forward(self, x):
            x = self.low(x)
            return self.function(x.sin(), x.cos(), *torch.aminmax(x, dim=-1))

    def structures(function) -> set[str]:
        model = nn.Sequential(Inner(function), nn.LazyLinear(3))
        model(X)
        return {source.structure for source in cut(model, X, "1").sources.values()}

    assert structures(one) == structures(one) != structures(other)


@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_another_constant_has_another_structure(form) -> None:
    # a graph along which features are mixed; it is no buffer
    class Mixed(nn.Module):
        def __init__(self, graph: torch.Tensor) -> None:
            super().__init__()
            self.graph = form(graph)

        def forward(self, x):
            graph = self.graph.to_dense() if self.graph.is_mkldnn else self.graph
            return (graph @ x.flatten(1).T).T

    def structures(graph: torch.Tensor) -> set[str]:
        model = nn.Sequential(nn.Linear(6, 6), Mixed(graph), nn.Linear(60, 3))
        return {source.structure for source in cut(model, X, "2").sources.values()}

    one, other = torch.eye(60), torch.eye(60).roll(1, 0)
    assert structures(one) == structures(one) != structures(other)


def test_other_operations_have_another_structure() -> None:
    # the same weights in another order of layers must not share a cache
    class Swapped(Tokens):
        def forward(self, x):
            x = self.embed(x) + self.position
            return self.head(self.norm(self.blocks[1](self.blocks[0](x.relu())))[:, 0])

    one, other = Tokens().eval(), Swapped().eval()
    first = cut(one, X, "norm", "head").sources
    second = cut(other, X, "norm", "head").sources
    assert {s.tensors for s in first.values()} == {s.tensors for s in second.values()}
    assert {s.structure for s in first.values()} != {s.structure for s in second.values()}


def test_tied_weights_train_under_each_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.outer = nn.Linear(6, 6)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return self.outer(self.inner(x))

    with pytest.raises(NothingToSkipError, match=r"reads 'inner\.weight', which learns"):
        cut(Tied(), X, "outer")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Dropout(0.5), "draws random numbers"),
        (nn.BatchNorm1d(10), "changes a buffer"),
        (nn.BatchNorm1d(10, track_running_stats=False), "normalises by the batch"),
    ],
)
def test_random_and_batch_dependent_modules_are_dirty(module, why) -> None:
    model = nn.Sequential(nn.Linear(6, 6), module, nn.Linear(6, 2)).train()
    found = cut(model, X, "2")
    assert sites(found) == ["0"]
    assert why in found.first_dirty


def test_weight_standardisation_of_a_frozen_layer_is_clean() -> None:
    # a batch-norm over weights is not batch-dependent: the input does not reach it
    class Standardised(nn.Conv1d):
        def forward(self, x):
            weight = nn.functional.batch_norm(self.weight.view(1, 4, 10), None, None, training=True)
            return nn.functional.conv1d(x, weight.view_as(self.weight), self.bias)

    model = nn.Sequential(Standardised(10, 4, 1), nn.Flatten(), nn.Linear(24, 2)).train()
    assert sites(cut(model, X, "2")) == ["0"]


def test_a_module_that_changes_lasting_state_is_not_skipped() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.conv(x)

    model = nn.Sequential(Counting(), nn.Linear(6, 2))
    found = cut(model, X, "1")
    assert sites(found) == ["0.conv"]


def test_everything_learns() -> None:
    with pytest.raises(NothingToSkipError, match="Freeze the groups before it"):
        cut(Tokens(), X, "")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("frozen", "why"),
    [
        (
            lambda: nn.Sequential(nn.Hardswish(), nn.Softplus()),
            r"no work is counted for hardswish, softplus\)",
        ),
        (lambda: torch.jit.script(nn.Linear(6, 6)), "calls of a ScriptModule, as 0 is, cannot be skipped"),
    ],
)
def test_what_stays_the_same_and_is_not_worth_storing_is_named(frozen, why) -> None:
    with pytest.raises(NothingToSkipError, match=why):
        cut(nn.Sequential(frozen(), nn.Linear(6, 2)), X, "1")


def test_frozen_output_next_to_a_trained_one() -> None:
    # a frozen by-product of the output is part of the frontier; the input is one, too, and is not stored
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            features = self.body(x)
            return {"logits": self.head(features.mean(1)), "features": features, "input": x}

    found = cut(Two(), X, "head")
    assert sites(found) == ["body"]
    assert found.inputs == {0}


@pytest.mark.parametrize(
    ("shape", "batch", "by_sample"),
    [((4, 8), 4, True), ((5, 8), 4, False), ((4,), 4, False), ((1, 8), 1, False)],
)
def test_a_table_as_long_as_the_batch_is_taken_for_one_of_its_samples(shape, batch, by_sample) -> None:
    # DETR repeats its positions for each sample; a vector, or what is one row long, is a constant
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(6, 8), nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return self.linear(x), self.table * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Positions(), nn.Linear(8, 2)

        def forward(self, x):
            x, table = self.body(x)
            return self.head(x).sum() * table.sum()

    found = cut(Net(), X[:batch], "head")
    assert ("body[1]" in sites(found)) == by_sample
    assert [str(site) for site in found.constants] == ([] if by_sample else ["body[1]"])


def test_what_is_stored_for_the_output_alone_is_told() -> None:
    # a decoder's keys and values: 10 tokens of 8 numbers, beside the one token that the head reads
    class WithKeys(Tokens):
        def forward(self, x):
            keys = self.blocks(self.embed(x) + self.position)
            return self.head(self.norm(keys)[:, 0]), keys

    found = cut(WithKeys().eval(), X, "head")
    assert sites(found) == ["blocks", "input of head"]
    assert (found.bytes_per_sample, found.returned_bytes_per_sample) == (352, 320)
    assert cut(Tokens().eval(), X, "head").returned_bytes_per_sample == 0


def test_the_input_itself_is_read_after_the_cut() -> None:
    # then it is loaded: input 0 stays real
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.body(x) + x)

    assert cut(Tokens().eval(), X, "head").inputs == frozenset()
    found = cut(Residual(), X, "head", at_inputs=False)
    assert found.inputs == {0}


@pytest.mark.parametrize("ids", [torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10)])
def test_what_only_looks_up_or_shapes_what_is_at_hand_runs(ids) -> None:
    # tokens are loaded anyway: their embeddings are not stored, but what is left of a layer's output is;
    # of numbers that are not loaded, what only shapes them is stored
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6)

        def forward(self, ids):
            words = self.table(ids) if not ids.is_floating_point() else ids[..., None].expand(-1, -1, 6)
            return words * 2 - 1

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.scaled, self.low = Words(), nn.Tanh(), nn.Sequential(Words(), nn.Linear(6, 6))
            self.pool, self.head = nn.MaxPool1d(2), nn.Linear(3, 2)

        def forward(self, ids):
            return self.head(self.pool(self.low(ids)) * self.scaled(self.words(ids))[..., :3])

    found = cut(Net(), ids, "head", at_inputs=False)
    assert sites(found) == (["pool", "scaled"] if ids.is_floating_point() else ["pool"])


@pytest.mark.parametrize("detached", [False, True])
def test_a_passed_through_value_is_not_stored_twice(detached) -> None:
    class Carry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, skip):
            return self.layer(x), skip.detach() if detached else skip

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second, self.third = Carry(), Carry()
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            skip = self.first(x)
            x, skip = self.second(skip, skip)
            x, skip = self.third(x, skip)
            return self.head(x.relu() * skip)

    assert sites(cut(Net(), X, "head", at_inputs=False)) == ["first", "third"]


def test_recorder_options_do_not_change_the_model() -> None:
    model = Tokens().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cut(model, X, "head")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_a_list_that_grows_after_the_call() -> None:
    # DenseNet hands its list of features to each layer and appends to it afterwards
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 6)

        def forward(self, features):
            return self.linear(torch.cat(features, -1))

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(6), Layer(12), Layer(18)])

        def forward(self, x):
            features = [x]
            for layer in self.layers:
                features.append(layer(features))
            return features[-1]

    assert sites(cut(Dense(), X, "layers.2")) == ["layers.0", "layers.1"]


def test_a_tensor_that_is_returned_twice_and_written_to_is_made_anew() -> None:
    # stored it would be two, and what is written to one would not be in the other
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 2
            return y, y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.twice, self.head = nn.Linear(6, 8), Twice(), nn.Linear(8, 3)

        def forward(self, x):
            one, other = self.twice(self.body(x))
            one += 1
            return self.head(one) + self.head(other)

    assert sites(cut(Model().eval(), X, "head", at_inputs=False)) == ["body"]


@pytest.mark.parametrize("whole", [True, False])
def test_hooks_that_collect_for_a_module_inside_are_no_reason_to_run_it(whole) -> None:
    # what they collect stays in the encoder that asks for it; where it is called in parts, nobody asks
    transformers = pytest.importorskip("transformers", minversion="5", reason="older ones collect otherwise")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=9, output_hidden_states=True, **sizes)
    ids = torch.ones(4, 5, dtype=torch.long)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.head = transformers.BertModel(config).eval(), nn.Linear(8, 3)
            self.bert(ids)  # hangs them on the layers for good

        def forward(self, ids):
            if whole:
                return self.head(self.bert(ids).last_hidden_state[:, 0])
            x = self.bert.embeddings(ids)
            for layer in self.bert.encoder.layer:
                x = layer(x)
            return self.head(x[:, 0])

    if whole:
        assert [call.path for call in cut(Net(), ids, "head").skipped] == ["bert"]
    else:
        found = cut(Net(), ids, "bert.encoder.layer.1.output", "head")
        assert sites(found) == ["bert.encoder.layer.1.attention", "bert.encoder.layer.1.intermediate"]
