"""Plans on encoders, decoders and encoder-decoders: order, rates, unfreezing, tied embeddings."""

import itertools

import pytest
import torch

import layerwise
from layerwise.training.classification import Classification
from layerwise.training.token_tasks import LanguageModelling
from layerwise.tuning.reinit import reinit
from layerwise.tuning.tuner import Tuner
from tiny_text import CONFIGS, DECODERS, ENCODERS, tiny_model, tiny_tokenizer

pytest.importorskip("transformers")

TEXTS = ["red engine of the road", "flour and sugar", "the goal of a fast team and a ball"]
CLASSES = ("cars", "food", "sport")
LAYER = {  # the i-th layer of the tiny models, in order of execution
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "roberta": ["roberta.encoder.layer.0", "roberta.encoder.layer.1"],
    "deberta": ["deberta.encoder.layer.0", "deberta.encoder.layer.1"],
    "modernbert": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "qwen": ["model.layers.0", "model.layers.1"],
    "t5": [f"transformer.{half}.block.{i}" for half in ("encoder", "decoder") for i in (0, 1)],
    "bart": [f"model.{half}.layers.{i}" for half in ("encoder", "decoder") for i in (0, 1)],
}


def batch_of_texts():
    batch = dict(tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    return {key: batch[key] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor([0, 1, 2])}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def classifier(family):
    model = tiny_model(family, num_labels=3)
    batch = batch_of_texts()
    example = {key: value for key, value in batch.items() if key != "labels"}
    return model, batch, layerwise.layer_map(model, example, granularity="blocks")


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_stand_in_order_between_embeddings_and_head(family):
    # Embeddings first, then every layer on its own in order of execution, the head last.
    model, _, layers = classifier(family)
    places = [layers.names.index(layers.group_of(name)) for name in first_parameters(model, LAYER[family])]
    assert places == sorted(set(places))
    embeddings = model.get_input_embeddings().weight
    name = next(name for name, p in model.named_parameters() if p is embeddings)
    assert layers.names.index(layers.group_of(name)) == 0 < places[0]
    assert layers.head is layers.groups[-1]
    assert sorted(name for group in layers for name in group.parameters) == sorted(
        name for name, _ in model.named_parameters()
    )


def first_parameters(model, paths):
    return [next(name for name, _ in model.named_parameters() if name.startswith(f"{p}.")) for p in paths]


@pytest.mark.parametrize("family", CONFIGS)
def test_gradual_unfreezing_moves_one_group_more_each_phase(family):
    # In phase i exactly the last i groups move, at rates that fall by the decay from group to group.
    model, batch, layers = classifier(family)
    task = Classification(CLASSES, "text_classification")
    plan = layerwise.gradual_unfreezing(layers, decay=0.5, steps_per_group=1, last_steps=1, join_steps=0)
    tuner = Tuner(model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(layers), layers=layers)
    assert len(plan.phases) == len(layers)
    model.train()
    for _ in tuner.epochs():
        while not tuner.done:
            learning = layers.groups[-(tuner.phase_index + 1) :]
            rates = list(tuner.rates().values())
            assert rates[-1] == pytest.approx(1e-2)
            assert all(a == pytest.approx(b / 2) for a, b in itertools.pairwise(rates) if a)
            before = weights(model)
            task.loss(task.forward(model, batch), batch).backward()
            tuner.step()
            changed = moved(model, before)
            assert changed <= {name for group in learning for name in group.parameters}
            assert {layers.group_of(name) for name in changed} == {group.name for group in learning}


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_bert_like_decay_counts_embeddings_one_below_the_first_layer(family):
    # The published table for BERT: the head learns at eta, each layer below at a times the one above.
    model, _, layers = classifier(family)
    table = layerwise.discriminative(layers, decay=0.9).phases[0].rates
    powers = [0.9**depth for depth in range(len(layers))]
    assert [table[name] for name in reversed(layers.names)] == pytest.approx(powers)
    first = layers.names.index(layers.group_of(first_parameters(model, LAYER[family])[0]))
    assert (layers.head.name, first) == (layers.names[-1], 1)
    assert min(table, key=table.get) == layers.names[0]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "CausalLM"), ("qwen", "CausalLM"), ("bert", "MaskedLM"), ("roberta", "MaskedLM")],
)
def test_tied_embeddings_learn_once_or_not_at_all(family, kind):
    # One tensor under two names: frozen with the embeddings, it does not move through the output layer;
    # trained, it is stepped once and stays one tensor.
    model = tiny_model(family, kind)
    batch = batch_of_texts()
    batch["labels"] = batch["input_ids"].clone()
    example = {key: value for key, value in batch.items() if key != "labels"}
    layers = layerwise.layer_map(model, example, granularity="blocks")
    task = LanguageModelling("causal_lm" if kind == "CausalLM" else "masked_lm")
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    assert layers.aliases

    for plan, learns in (
        (layerwise.blocks(layers, layers.names[1:], steps=1), False),
        (layerwise.full(layers, steps=1), True),
    ):
        before = tied.detach().clone()
        tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
        held = [p for group in tuner.optimizer.param_groups for p in group["params"] if p is tied]
        assert len(held) == learns
        model.train()
        task.loss(task.forward(model, batch), batch).backward()
        gradient = None if tied.grad is None else tied.grad.clone()
        for _ in tuner.epochs():
            tuner.step()
        if learns:
            torch.testing.assert_close(tied, before - 0.1 * gradient)
        else:
            assert torch.equal(tied, before)
        assert model.get_output_embeddings().weight is tied


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_frozen_part_has_no_dropout_noise(family):
    # Frozen means frozen: in train mode the states below the trained layers are those of eval mode.
    options = {
        "bert": {"hidden_dropout_prob": 0.5},
        "llama": {"attention_dropout": 0.5},
        "t5": {"dropout_rate": 0.5},
    }
    model = tiny_model(family, num_labels=3, **options[family])
    batch = batch_of_texts()
    example = {key: value for key, value in batch.items() if key != "labels"}
    layers = layerwise.layer_map(model, example, granularity="blocks")
    plan = layerwise.top_k(layers, k=2, steps=1)
    frozen_layer = model.get_submodule(LAYER[family][0])
    with torch.no_grad():
        expected = states_after(model.eval(), frozen_layer, example)
        Tuner(model, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=1, layers=layers)
        assert torch.equal(states_after(model.train(), frozen_layer, example), expected)


def states_after(model, layer, example):
    found = []
    handle = layer.register_forward_hook(
        lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        model(**example)
    finally:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lisa_trains_embeddings_output_layer_and_drawn_blocks(family):
    # With the output layer tied to the embeddings (GPT-2) or not (Llama), both learn at any time.
    model = tiny_model(family, "CausalLM")
    layers = layerwise.layer_map(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    plan = layerwise.lisa(layers, groups=1, every_steps=1, steps=4)
    tuner = Tuner(model, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=4, layers=layers)
    drawn = set()
    for _ in tuner.epochs():
        while not tuner.done:
            learning = {name for name, rate in tuner.rates().items() if rate}
            drawn |= learning & set(LAYER[family])
            assert len(learning & set(LAYER[family])) == 1
            assert model.get_input_embeddings().weight.requires_grad
            assert model.get_output_embeddings().weight.requires_grad
            ids = torch.randint(5, 20, (2, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            tuner.step()
    assert drawn == set(LAYER[family])


def run_steps(model, layers, plan, batch, steps):
    task = Classification(CLASSES, "text_classification")
    tuner = Tuner(model, plan, torch.optim.SGD, lr=0.5, steps_per_epoch=steps, layers=layers)
    model.eval()  # no dropout: two runs differ in the plan alone
    for _ in tuner.epochs():
        while not tuner.done:
            task.loss(task.forward(model, batch), batch).backward()
            tuner.step()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_l2_sp_holds_the_pretrained_weights_of_a_transformer(family):
    # With the pull, the body ends nearer to where it started; the head, which is new, is not pulled.
    drift = {}
    for strength in (0.0, 0.5):
        model, batch, layers = classifier(family)
        before = weights(model)
        run_steps(model, layers, layerwise.full(layers, steps=6, l2_sp=strength), batch, 6)
        body = [name for group in layers if group.role != "head" for name in group.parameters]
        after = dict(model.named_parameters())
        drift[strength] = sum(float((after[name].detach() - before[name]).square().sum()) for name in body)
    assert 0 < drift[0.5] < 0.8 * drift[0.0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_last_layer_starts_anew_and_no_other(family):
    # reinit_last(k=1): the last layer before the head, and the head, are drawn again; the rest stays.
    model, _, layers = classifier(family)
    before = weights(model)
    plan = layerwise.reinit_last(layers, k=1, steps=1)
    tuner = Tuner(model, plan, torch.optim.SGD, lr=1e-9, steps_per_epoch=1, layers=layers)
    tuner.begin_epoch()
    changed = {layers.group_of(name) for name in moved(model, before)}
    last = layers.group_of(first_parameters(model, LAYER[family])[-1])
    assert last in changed
    assert not changed & set(layers.names[: layers.names.index(last)])


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_that_start_anew_are_spread_as_those_of_a_new_model(family):
    # T5, ModernBERT and GPT-2 draw some where transformers gives them the module around a layer.
    model, _, layers = classifier(family)
    new = weights(tiny_model(family, num_labels=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    names = reinit(model, layers, layers.names[-2:], seed=0)
    assert {layers.group_of(name) for name in names} == set(layers.names[-2:])
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, torch.full_like(parameter, 9.0))
        elif parameter.ndim == 2 and parameter.numel() >= 48:
            assert float(parameter.detach().std()) == pytest.approx(float(new[name].std()), rel=0.4), name
