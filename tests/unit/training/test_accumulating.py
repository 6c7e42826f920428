"""The gradient of a step is that of the mean over all that its batches hold."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.sources.encoding import IGNORED
from layerwise.training.accumulating import Window
from layerwise.training.classification import Classification
from layerwise.training.evaluate import evaluate
from layerwise.training.token_tasks import LanguageModelling, TokenClassification


class Processes:
    """What several threads share that stand for processes: sums, as accelerate gives them."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world)
        self.given: dict[int, torch.Tensor] = {}

    def reduce(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.given[rank] = value
        self.barrier.wait()
        total = sum(self.given.values())
        self.barrier.wait()
        return total


class OneOf:
    """The accelerator of one of several processes."""

    device = torch.device("cpu")

    def __init__(self, processes: Processes, rank: int) -> None:
        self.processes, self.rank, self.num_processes = processes, rank, processes.world

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return self.processes.reduce(self.rank, value)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def gradient_of(batches: list[torch.Tensor], accelerator: OneOf) -> torch.Tensor:
    """Return the gradient of the mean of all numbers times a weight; what a process has of it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    window = Window(accelerator, len(batches))
    for batch in batches:
        mean = model(batch[:, None]).sum() / max(len(batch), 1)
        window.backward(mean, len(batch))
    window.close(model)
    return model.weight.grad.flatten()[0]


@pytest.mark.parametrize(
    "sizes",
    [
        [[16, 16, 16, 16, 6]],
        [[16, 16], [16, 6]],
        [[3], [16]],
        [[0, 5, 2], [7, 0, 0]],  # prompts of which nothing is scored
        [[8], [8], [8], [4]],
    ],
    ids=str,
)
def test_a_window_is_the_mean_over_all_it_holds(sizes: list[list[int]]) -> None:
    # Whichever batches and processes hold it.
    numbers = [[torch.randn(size) for size in of_rank] for of_rank in sizes]
    processes = Processes(len(sizes))

    def run(rank: int) -> torch.Tensor:
        return gradient_of(numbers[rank], OneOf(processes, rank))

    with ThreadPoolExecutor(len(sizes)) as pool:
        found = torch.stack(list(pool.map(run, range(len(sizes)))))
    expected = torch.cat([batch for of_rank in numbers for batch in of_rank]).mean()
    torch.testing.assert_close(found.mean(), expected)  # processes average their gradients


def test_equal_batches_are_divided_by_their_number_and_no_more() -> None:
    # The bits of the line that is in everybody's loop: (loss / 3).backward().
    batches = [torch.randn(7) for _ in range(3)]
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    for batch in batches:
        (model(batch[:, None]).sum() / 7 / 3).backward()
    assert torch.equal(gradient_of(batches, OneOf(Processes(1), 0)), model.weight.grad.flatten()[0])


def test_a_window_with_nothing_scored_moves_nothing() -> None:
    assert gradient_of([torch.empty(0)] * 2, OneOf(Processes(1), 0)) == 0


class Table(nn.Module):
    """Logits of each token, by the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


@pytest.mark.parametrize(
    "task", [LanguageModelling(), LanguageModelling("masked_lm"), TokenClassification(tuple("abcdefghijk"))]
)
def test_tokens_of_short_and_long_texts_weigh_the_same(task: LanguageModelling | TokenClassification) -> None:
    # In one batch, padded, or in a batch each.
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 9))
    labels = ids.clone() if isinstance(task, LanguageModelling) else torch.randint(0, 11, ids.shape)
    labels[0, 3:] = IGNORED
    together, apart = Table(), Table()
    apart.load_state_dict(together.state_dict())
    batch = {"input_ids": ids, "labels": labels}
    task.loss(task.forward(together, batch), batch).backward()
    window = Window(OneOf(Processes(1), 0), 2)
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        window.backward(task.loss(task.forward(apart, one), one), task.size(one))
    window.close(apart)
    torch.testing.assert_close(apart.table.weight.grad, together.table.weight.grad)


class Given:
    """Batches of a data set that are given one by one."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.batches = batches

    def epoch(self, epoch: int, cache: None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_with_class_weights_does_not_depend_on_the_batches(smoothing: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.tensor([0] * 24 + [1] * 4 + [2] * 2)
    weights = (0.3, 1.0, 4.0)
    task = Classification(("a", "b", "c"), class_weights=weights, label_smoothing=smoothing, monitor="loss")
    model = nn.Linear(4, 3)
    expected = F.cross_entropy(model(x), y, weight=torch.tensor(weights), label_smoothing=smoothing).item()
    for size in (30, 7, 1):
        found = evaluate(model, Given(list(zip(x.split(size), y.split(size)))), task)
        assert found.values["loss"] == pytest.approx(expected, rel=1e-5)
