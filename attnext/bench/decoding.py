"""The study of decoding: greedy and beam search with the reference model, beside the same model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attnext.bench.eager import EagerModel
from attnext.bench.peers import Peer, Wrong
from attnext.bench.timing import Plan, interleaved
from attnext.seq2seq.config import Config
from attnext.seq2seq.data import END
from attnext.seq2seq.model import Seq2Seq
from attnext.seq2seq.search import Hypothesis, search

__all__ = ["study"]

_SYMBOLS, _STEPS, _SOURCE = 100, 20, 20


@dataclass(frozen=True)
class _Sizes:
    batch: int
    beam: int
    units: int

    def __str__(self) -> str:
        return f"B {self.batch}, beam {self.beam}, {self.units} units"


_SIZES = (_Sizes(1, 1, 128), _Sizes(1, 1, 256), _Sizes(1, 1, 512), _Sizes(64, 1, 256), _Sizes(64, 5, 256))
_QUICK = (_Sizes(1, 1, 128), _Sizes(4, 3, 64))


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[dict[str, Any]]:
    """Whole searches of 20 steps, the encoder included."""
    if plan.device != "cpu":
        plan.note("the study of decoding was left out: it takes a CPU")
        return []
    return [_of(cell, sizes, plan) for cell in ("gru", "lstm") for sizes in (_QUICK if quick else _SIZES)]


def _of(cell: str, sizes: _Sizes, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(0)
    units = sizes.units
    config = Config(cell=cell, epochs=1, embedding_size=units, encoder_size=units // 2, decoder_size=units,
                    attention_size=units)  # fmt: skip
    model = Seq2Seq(config, _SYMBOLS, _SYMBOLS).eval()
    with torch.no_grad():  # a model as drawn has no end to come to, or a chance one
        model.decoder.output.bias[END] = -100.0
    source = torch.randint(END + 1, _SYMBOLS, (sizes.batch, _SOURCE))
    lengths = torch.full((sizes.batch,), _SOURCE)
    models: dict[str, Any] = {"attnext": model, "eager": EagerModel(model).eval()}
    runs: dict[str, Callable[[], list[list[Hypothesis]]]] = {}
    for peer, one in models.items():
        opened = one.decoder.opened()  # once, as a service would
        runs[peer] = partial(search, one, source, lengths, beam=sizes.beam, max_steps=_STEPS, opened=opened)
    if not _agree(runs["attnext"](), runs["eager"]()):
        raise Wrong(f"attnext and eager find other outputs at {cell}, {sizes}")
    seconds = interleaved(runs, plan, f"decoding, {cell}, {sizes}")
    return {"cell": cell, "sizes": str(sizes), "steps": _STEPS, "seconds": seconds}


def _agree(found: list[list[Hypothesis]], right: list[list[Hypothesis]]) -> bool:
    """Whether the best outputs are as good; which comes first among equals is a matter of rounding."""
    ours, theirs = (torch.tensor([one[0].score for one in some]) for some in (found, right))
    return torch.allclose(ours, theirs, rtol=1e-3)
