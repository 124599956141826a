"""Greedy search, the most likely symbol at every step, and words pronounced with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnext.seq2seq.checkpoint import Checkpoint
from attnext.seq2seq.data import END, START, pad
from attnext.seq2seq.model import Seq2Seq

__all__ = ["Outputs", "Pronunciation", "greedy", "pronounce"]


class Outputs(NamedTuple):
    """What was found for each source: symbols without marks and, if asked for, weights (symbols, letters)."""

    symbols: list[list[int]]
    weights: list[Tensor] | None


@torch.inference_mode()
def greedy(
    model: Seq2Seq,
    source: Tensor,
    lengths: Tensor,
    *,
    need_weights: bool = False,
    max_steps: int | None = None,
) -> Outputs:
    """Outputs for a batch of sources, all in step; stops when each of them has ended.

    Args:
        model: in evaluation mode.
        source: (B, Tx) int64.
        lengths: (B,) integers, at least 1 each.
        need_weights: also return the attention weights.
        max_steps: cuts outputs that have not ended by then; by default twice their source's length and ten.

    Raises:
        ValueError: max_steps is negative.
    """
    batch, longest = source.shape
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps must not be negative, got {max_steps}")
    limits = 2 * lengths + 10 if max_steps is None else torch.full_like(lengths, max_steps)
    memory, state = model.encode(source, lengths)
    symbols = source.new_full((batch,), START)
    running = limits > 0
    steps: list[Tensor] = []
    weights: list[Tensor] = []
    while running.any():
        embedded = model.decoder.embed(symbols)
        inputs = model.decoder.input_gates(embedded)
        state, context, step_weights = model.decoder.step(inputs, state, memory, need_weights=need_weights)
        # Padding and the start mark, numbered below the end mark, are no outputs.
        symbols = model.decoder.logits(embedded, state[0], context)[:, END:].argmax(-1) + END
        symbols = symbols.where(running, END)
        steps.append(symbols)
        running &= (symbols != END) & (len(steps) < limits)
        if step_weights is not None:
            weights.append(step_weights)
    rows = torch.stack(steps, 1).tolist() if steps else [[] for _ in range(batch)]
    found = [row[: row.index(END)] if END in row else row for row in rows]
    if not need_weights:
        return Outputs(found, None)
    stacked = torch.stack(weights, 1) if weights else torch.empty(batch, 0, longest)
    return Outputs(found, [stacked[i, : len(row), : int(lengths[i])].clone() for i, row in enumerate(found)])


class Pronunciation(NamedTuple):
    """A word, its phonemes and, if asked for, the attention weights (phonemes, letters)."""

    word: str
    phonemes: tuple[str, ...]
    weights: Tensor | None


def pronounce(
    checkpoint: Checkpoint, words: Sequence[str], *, need_weights: bool = False, batch_size: int = 512
) -> list[Pronunciation]:
    """Pronounces words, in their order. Puts the model into evaluation mode.

    Raises:
        InputError: a word is empty, or has letters that the model does not know.
    """
    sources = [checkpoint.source.encode_word(word) for word in words]
    checkpoint.model.eval()
    order = sorted(range(len(words)), key=lambda index: len(sources[index]))
    found: dict[int, Pronunciation] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        outputs = greedy(checkpoint.model, *pad([sources[row] for row in rows]), need_weights=need_weights)
        for i, (row, symbols) in enumerate(zip(rows, outputs.symbols, strict=True)):
            weights = outputs.weights[i] if outputs.weights is not None else None
            found[row] = Pronunciation(words[row], checkpoint.target.decode(symbols), weights)
    return [found[row] for row in range(len(words))]
