"""Tune a small decoder in three ways, and measure what each costs in memory.

    python examples/small_decoder.py            # a Llama of 38 M parameters: a few minutes on 2 cores
    python examples/small_decoder.py --layers 2 --width 64 --steps 2

The decoder has random weights (give ``--model hf:FOLDER`` for your own) and reads bytes, so nothing is
downloaded. It learns from the text of Python's own help pages. Each plan runs in a process of its own, so
that its peak is its own:

    full     every weight learns: gradients and two moments for all of them, activations of all layers
    last 2   two blocks and the head learn: the layers below keep no activations, gradients or moments
    lisa     embeddings, head and two blocks drawn anew every few steps: as few moments as above at any
             time, but gradients flow down to the embeddings
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import psutil  # comes with accelerate
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import layerwise
from layerwise.training.memory import peak_memory

MIB = 2**20


def build_model(options: argparse.Namespace) -> torch.nn.Module:
    """Return a Llama with random weights over bytes, or the decoder that was asked for."""
    if options.model:
        return layerwise.open_model(options.model, task="causal_lm").model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=options.tokens,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def batches(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield int64[batch, tokens]: stretches of Python's help pages, as bytes."""
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "ignore")))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - options.tokens, (options.batch,), generator=generator)
        yield torch.stack([text[start : start + options.tokens] for start in starts.tolist()])


def plan_called(name: str, layers: layerwise.LayerMap, options: argparse.Namespace) -> layerwise.Plan:
    """Return one of the plans that are compared; each is `options.steps` optimiser steps long."""
    if name == "full":
        return layerwise.full(layers, steps=options.steps)
    if name == "last 2":
        return layerwise.top_k(layers, k=3, steps=options.steps)
    return layerwise.lisa(layers, groups=2, every_steps=2, steps=options.steps)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train as one plan says; return its peak memory beyond the weights, its time and its losses."""
    model = build_model(options).to(options.device)
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    layers = layerwise.layer_map(model, example_input=example, granularity="blocks")
    plan = plan_called(name, layers, options)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=3e-4, steps_per_epoch=options.steps, layers=layers
    )
    model.train()
    most_trained, losses, began_s = 0, [], time.perf_counter()
    stream, before_bytes = batches(options), in_use(options.device)
    with peak_memory(torch.device(options.device)) as peak:
        for _ in tuner.epochs():
            while not tuner.done:
                ids = next(stream).to(options.device)
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                most_trained = max(most_trained, layerwise.count_parameters(model).trainable)
                tuner.step()
                losses.append(loss.item())
    seconds = time.perf_counter() - began_s
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "plan": name,
        "weights_bytes": 4 * total,
        "trained_frac": most_trained / total,
        "state_bytes": 12 * most_trained,  # float32 gradient and AdamW's two moments
        "peak_bytes": peak.bytes - before_bytes,
        "step_s": seconds / len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def in_use(device: str) -> int:
    """Return the bytes in use now: of the GPU's allocator, or of this whole process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of full, last-k and LISA-style tuning.")
    parser.add_argument("--model", help="a decoder, as hf:FOLDER_OR_ID; its text is still bytes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("plan", "learns at once", "gradients + moments", "measured peak", "s / step", "loss"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    context = multiprocessing.get_context("spawn")  # a fresh process, with a peak of its own
    for name in ("full", "last 2", "lisa"):
        with context.Pool(1) as pool:
            row = pool.apply(measure, (name, options))
        table.add_row(
            row["plan"],
            f"{row['trained_frac']:.1%}",
            f"{row['state_bytes'] / MIB:,.0f} MiB",
            f"{row['peak_bytes'] / MIB:,.0f} MiB",
            f"{row['step_s']:.2f}",
            f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}",
        )
    table.title = f"{row['weights_bytes'] / MIB:,.0f} MiB of weights; peak is what training adds to them"
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
