"""Beam search, greedy search, which is a beam of one, and texts translated with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnext._support import InputError
from attnext.seq2seq.checkpoint import Checkpoint
from attnext.seq2seq.data import END, START, pad
from attnext.seq2seq.model import Seq2Seq

__all__ = ["Hypothesis", "Output", "Translator", "search"]


_MOST_POWER = 16
"""Of a length: beyond, scores would overflow."""
_NOT_FINITE = "the model's logits are not finite: its parameters are damaged, or training diverged"


class Hypothesis(NamedTuple):
    """An output that was found.

    Attributes:
        symbols: without marks.
        score: its log-probability, divided by (symbols, end mark included) ** length_power.
        weights: (symbols, Tx), or None.
    """

    symbols: list[int]
    score: float
    weights: Tensor | None


@torch.inference_mode()
def search(
    model: Seq2Seq,
    source: Tensor,
    lengths: Tensor,
    *,
    beam: int = 1,
    length_power: float = 1.0,
    need_weights: bool = False,
    max_steps: int | None = None,
    longest: int = 0,
    opened: Any = None,
) -> list[list[Hypothesis]]:
    """The best outputs of each source of a batch, from the best, at most as many as the beam is wide.

    A source is done when so many of its hypotheses have ended, each of them among the best of its step. The hypotheses
    of a source share its memory; sources that are done leave the batch.

    Args:
        model: in evaluation mode.
        source: (B, Tx) int64.
        lengths: (B,) integers, at least 1 each.
        beam: hypotheses that are kept at every step; 1 is greedy search.
        length_power: what a longer output has in its favour: 0 nothing, 1 the mean over its symbols is compared.
        need_weights: also return the attention weights.
        max_steps: cuts outputs that have not ended by then; by default twice their source's length and ten, or
            ``longest`` and ten if that is more.
        longest: symbols of the longest output the model was trained on, but for a few.
        opened: what ``model.decoder.opened()`` gave, for many searches with the same parameters.

    Raises:
        ValueError: beam is below 1, length_power is beyond 16, max_steps is negative, weights are wanted of a model
            without attention, or the model's logits are not finite.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if not abs(length_power) <= _MOST_POWER:
        raise InputError(f"length_power must be from -{_MOST_POWER} to {_MOST_POWER}, got {length_power}")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps must not be negative, got {max_steps}")
    if need_weights and model.config.attention == "none":
        raise ValueError("need_weights must be False for a model without attention")
    limits = (2 * lengths).clamp(min=longest) + 10 if max_steps is None else torch.full_like(lengths, max_steps)
    if max_steps == 0:
        nothing = torch.empty(0, source.shape[1], device=source.device) if need_weights else None
        return [[Hypothesis([], 0.0, nothing)] for _ in lengths]
    opened = model.decoder.opened() if opened is None else opened
    if beam == 1:
        return _greedy(model, opened, source, lengths, limits.tolist(), length_power, need_weights)
    return _Search(model, opened, source, lengths, limits.to(source.device), beam, length_power, need_weights).run()


def _greedy(
    model: Seq2Seq,
    opened: Any,
    source: Tensor,
    lengths: Tensor,
    limits: list[int],
    length_power: float,
    need_weights: bool,
) -> list[list[Hypothesis]]:
    """What :class:`_Search` finds with a beam of one, with less to do at each step."""
    memory, state = model.encode(source, lengths)
    previous, rows = source.new_full((len(source),), START), list(range(len(source)))
    found = [_Path([], [], 0.0, limit) for limit in limits]
    while rows:
        # Of a few sources, several steps before what has ended is looked for; they stop by themselves where all have.
        steps = min(_STEPS_OF_FEW // len(rows) or 1, max(found[row].limit - len(found[row].symbols) for row in rows))
        # Padding and the start mark, numbered below the end mark, are no outputs.
        symbols, scores, state, weights = opened.greedy(previous, state, memory, steps, END, need_weights)
        for place, (row, *path) in enumerate(zip(rows, symbols.tolist(), scores.tolist(), strict=True)):
            found[row].add(path[0], path[1], None if weights is None else weights[place])
        previous = symbols[:, -1]
        places = [place for place, row in enumerate(rows) if not found[row].ended]
        if len(places) * 4 <= 3 * len(rows):  # sources that are done leave the batch, as in the other search
            rows = [rows[place] for place in places]
            kept = torch.tensor(places, dtype=torch.int64, device=source.device)
            if rows:
                memory, state, previous = memory.select(kept), state.select(kept), previous[kept]
    nothing = torch.empty(0, source.shape[1], device=source.device)
    return [[path.hypothesis(length_power, nothing if need_weights else None)] for path in found]


_STEPS_OF_FEW = 32
"""Of all sources together."""


@dataclass
class _Path:
    """An output as greedy search makes it."""

    symbols: list[int]
    weights: list[Tensor]
    score: float
    limit: int
    ended: bool = False

    def add(self, symbols: list[int], scores: list[float], weights: Tensor | None) -> None:
        """Goes on with what some steps have chosen, up to its end."""
        for step, (symbol, score) in enumerate(zip(symbols, scores, strict=True)):
            if self.ended:
                return
            if not math.isfinite(score):
                raise InputError(_NOT_FINITE)
            self.score += score
            self.symbols.append(symbol)
            if weights is not None:
                self.weights.append(weights[step].float())
            self.ended = symbol == END or len(self.symbols) >= self.limit

    def hypothesis(self, length_power: float, no_weights: Tensor | None) -> Hypothesis:
        steps = len(self.symbols)
        symbols = self.symbols[:-1] if self.symbols[-1] == END else self.symbols
        kept = self.weights[: len(symbols)]
        return Hypothesis(symbols, self.score / float(steps) ** length_power, torch.stack(kept) if kept else no_weights)


class _Search:
    """Hypotheses that have not ended, (B, beam), and those that have, by source."""

    def __init__(
        self,
        model: Seq2Seq,
        opened: Any,
        source: Tensor,
        lengths: Tensor,
        limits: Tensor,
        beam: int,
        length_power: float,
        need_weights: bool,
    ) -> None:
        self.step, self.limits, self.beam, self.length_power = opened, limits, beam, length_power
        self.memory, state = model.encode(source, lengths)
        self.state = state.one_hypothesis()  # at the first step, others would be the same again
        batch, device = len(source), source.device
        self.rows, self.open = torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.outputs = source.new_full((batch, 1, 1), START)
        self.scores = torch.zeros(batch, 1, device=device)
        self.weights = self.scores.new_empty(batch, 1, 0, source.shape[1]) if need_weights else None
        self.ended: list[list[Hypothesis]] = [[] for _ in range(batch)]

    def run(self) -> list[list[Hypothesis]]:
        while len(self.rows):
            logits, self.state, weights = self.step(
                self.outputs[..., -1], self.state, self.memory, need_weights=self.weights is not None
            )
            if self.weights is not None and weights is not None:
                self.weights = torch.cat((self.weights, weights.unsqueeze(2).float()), 2)
            # Padding and the start mark, numbered below the end mark, are no outputs.
            self._extend(logits[..., END:].float().log_softmax(-1))
            self._leave()
        if not all(self.ended):
            raise InputError(_NOT_FINITE)
        return [sorted(found, key=lambda one: -one.score)[: self.beam] for found in self.ended]

    def _extend(self, log_probabilities: Tensor) -> None:
        """Takes the best continuations: those that end are noted, others go on."""
        beam, choices = self.beam, log_probabilities.shape[-1]
        totals = (self.scores.unsqueeze(-1) + log_probabilities).flatten(1)
        # Of twice the beam, enough go on even where each hypothesis might end.
        best, places = totals.topk(min(2 * beam, totals.shape[1]), 1)
        parents, symbols = places // choices, places % choices + END
        at_end = symbols == END
        self._note(best[:, :beam], parents[:, :beam], symbols[:, :beam])
        order = at_end.to(torch.uint8).argsort(dim=1, stable=True)[:, :beam]
        parents, symbols = parents.gather(1, order), symbols.gather(1, order)
        self.scores = best.masked_fill(at_end, float("-inf")).gather(1, order)
        self.state, self.outputs = self.state.select(parents), _of_parents(self.outputs, parents)
        self.weights = None if self.weights is None else _of_parents(self.weights, parents)
        self.outputs = torch.cat((self.outputs, symbols.unsqueeze(2)), 2)

    def _note(self, best: Tensor, parents: Tensor, symbols: Tensor) -> None:
        """The candidates that end here, by their mark or by the limit, become hypotheses."""
        steps = self.outputs.shape[2]
        cut = self.limits[self.rows] <= steps
        ends = (cut.unsqueeze(1) | (symbols == END)) & self.open.unsqueeze(1) & best.isfinite()
        at = ends.nonzero(as_tuple=True)
        sources, of = self.rows[at[0]].tolist(), (at[0], parents[at])
        outputs = torch.cat((self.outputs[of], symbols[at].unsqueeze(1)), 1).tolist()
        scores = (best[at] / float(steps) ** self.length_power).tolist()
        weights = None if self.weights is None else self.weights[of]
        for i, (source, output, score) in enumerate(zip(sources, outputs, scores, strict=True)):
            found = output[1:-1] if output[-1] == END else output[1:]
            self.ended[source].append(Hypothesis(found, score, None if weights is None else weights[i, : len(found)]))
        self.counts += ends.sum(1)
        self.open &= (self.counts < self.beam) & ~cut

    def _leave(self) -> None:
        """Sources that are done leave the batch, a quarter of it at a time: each time the memory is copied."""
        if int(self.open.sum()) * 4 > 3 * len(self.open):
            return
        kept = self.open.nonzero().squeeze(1)
        self.memory, self.state = self.memory.select(kept), self.state.select(kept)
        self.rows, self.open, self.counts = self.rows[kept], self.open[kept], self.counts[kept]
        self.outputs, self.scores = self.outputs[kept], self.scores[kept]
        self.weights = None if self.weights is None else self.weights[kept]


def _of_parents(x: Tensor, parents: Tensor) -> Tensor:
    """(B, beam, ...) of the hypotheses that are gone on from."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), parents]


class Output(NamedTuple):
    """A source text and what was found for it, from the best: symbols, their score, and the weights (symbols, source
    symbols) if asked for."""

    source: str
    symbols: list[tuple[str, ...]]
    scores: list[float]
    weights: list[Tensor] | None

    @property
    def best(self) -> tuple[str, ...]:
        return self.symbols[0]


class Translator:
    """A trained model that answers one call after another: its matrices are read and packed once.

    Args:
        checkpoint: a model with its vocabularies, put into evaluation mode; its parameters must stay as they are.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model = checkpoint.model.eval()
        self._device = next(model.parameters()).device
        with torch.inference_mode():
            self._opened = model.decoder.opened()

    def __call__(
        self,
        texts: Sequence[str],
        *,
        beam: int = 1,
        length_power: float = 1.0,
        need_weights: bool = False,
        batch_size: int = 512,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Output]:
        """Outputs of source texts, in their order.

        Args:
            texts: with at least one symbol each; what is not in the vocabulary is unknown to the model.
            beam, length_power, need_weights: those of :func:`search`.
            batch_size: sources that are searched together.
            advance: called after each batch with the number of its sources, to show how far the search is.

        Raises:
            ValueError: a text has no symbol, or one of the options is not what :func:`search` takes.
        """
        checkpoint = self.checkpoint
        numbers = [checkpoint.source.read(text) for text in texts]
        if not all(numbers):
            empty = [not one for one in numbers].index(True)
            raise ValueError(f"texts must have a symbol each, got none in text {empty}")
        order = sorted(range(len(texts)), key=lambda index: len(numbers[index]))
        outputs: dict[int, Output] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            source, lengths = (x.to(self._device) for x in pad([numbers[row] for row in rows]))
            found = search(
                checkpoint.model, source, lengths, beam=beam, length_power=length_power, need_weights=need_weights,
                longest=checkpoint.longest, opened=self._opened,
            )  # fmt: skip
            for row, hypotheses in zip(rows, found, strict=True):
                weights = [one.weights[:, : len(numbers[row])].cpu() for one in hypotheses if one.weights is not None]
                symbols = [checkpoint.target.decode(one.symbols) for one in hypotheses]
                scores = [one.score for one in hypotheses]
                outputs[row] = Output(texts[row], symbols, scores, weights if need_weights else None)
            advance(len(rows))
        return [outputs[row] for row in range(len(texts))]
