"""The study of other code bases: each one's own attention and decoder, as it is and accelerated."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from attnext.acceleration import accelerate, class_name, label
from attnext.bench.code_bases import PROGRAMS
from attnext.bench.code_bases.packages import FOLDER
from attnext.bench.code_bases.program import Program, Sizes
from attnext.bench.peers import Peer, Wrong
from attnext.bench.steps_table import by_round
from attnext.bench.timing import Plan, interleaved
from attnext.compat import recipes

__all__ = ["SIZES", "markdown", "study"]

Row = dict[str, Any]

SIZES = {
    "speech": Sizes(16, 200, 320, 320, 320, (200,) * 16, steps=40, filters=10, reach=50),
    "translation": Sizes(32, 30, 256, 256, 256, (30,) * 32, steps=20),
    "one sentence": Sizes(1, 30, 256, 256, 256, (30,), steps=20),
}
"""What people run: of speech, of translation, and one sentence at a time."""
TIMED = (
    "nn.GRU of an encoder", "nn.GRU packed", "nn.LSTM of an encoder", "nn.LSTM packed",
    "espnet.AttAdd", "espnet.AttLoc", "espnet.AttLoc in a decoder", "espnet.AttCov", "espnet.AttCovLoc",
    "espnet.AttLocRec", "espnet.AttForward", "espnet.AttForwardTA", "espnet.AttDot", "espnet.AttMultiHeadAdd",
    "espnet.AttMultiHeadDot", "espnet.AttMultiHeadLoc", "espnet.AttMultiHeadMultiResLoc",
    "speechbrain.ContentBasedAttention in a decoder", "speechbrain.LocationAwareAttention in a decoder",
    "speechbrain.KeyValueAttention in a decoder",
    "tacotron2._Attention of torchaudio in a decoder", "tacotron2.Attention of SpeechBrain in a decoder",
    "coqui.OriginalAttention in a decoder softmax", "coqui.OriginalAttention in a decoder sigmoid",
    "coqui.OriginalAttention forward with an agent",
    "opennmt.GlobalAttention mlp in a decoder", "opennmt.GlobalAttention general in a decoder",
    "opennmt.GlobalAttention dot in a decoder", "opennmt.InputFeedRNNDecoder mlp",
    "opennmt.InputFeedRNNDecoder general", "opennmt.InputFeedRNNDecoder dot",
    "eole.GlobalAttention mlp", "eole.GlobalAttention general", "eole.InputFeedRNNDecoder mlp",
    "fairseq.AttentionLayer", "fairseq.MLPAttention", "fairseq.LSTMDecoder of translation",
    "fairseq.LSTMDecoder of speech", "joeynmt.BahdanauAttention", "joeynmt.LuongAttention",
    "joeynmt.RecurrentDecoder bahdanau", "joeynmt.RecurrentDecoder luong",
    "gnmt.BahdanauAttention normalised", "keras.AdditiveAttention", "stanza.BasicAttention",
    "stanza.SoftDotAttention", "stanza.LSTMAttention of weights", "rl4co.SimpleAttention",
    "rl4co.Decoder of a glimpse", "torchmil.AttentionPool", "doctr.AttentionModule", "doctr.SARDecoder of letters",
    "mmocr.ParallelSARDecoder", "mmocr.SequentialSARDecoder", "allennlp.AdditiveAttention",
    "openspeech.AdditiveAttention", "openspeech.LocationAwareAttention", "openspeech.LSTMAttentionDecoder additive",
    "openspeech.LSTMAttentionDecoder with filters", "tutorial.BahdanauAttention",
    "tutorial.AttnDecoderRNN of a sentence",
)  # fmt: skip
"""The programs that are timed: a code base's decoder where it has one, else steps of the attention alone."""
_QUICK = {"speech": Sizes(2, 40, 64, 64, 64, (40, 40), steps=3)}
_TOLERANCE = 1e-3
"""Of float32 results of some steps in another order."""


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """Other code bases' attention modules and decoders, as they are and accelerated, forward and training."""
    if plan.device != "cpu" or not FOLDER.is_dir():
        reason = "it takes a CPU" if plan.device != "cpu" else f"{FOLDER} is not there: run `make peers`"
        plan.note(f"the study of code bases was left out: {reason}")
        return []
    rows = []
    by_name = {program.name: program for program in PROGRAMS}
    for name in TIMED:
        for of, sizes in (_QUICK if quick else SIZES).items():
            rows += _timed(by_name[name], of, sizes, plan)
    return rows


def _timed(program: Program, name: str, sizes: Sizes, plan: Plan) -> list[Row]:
    torch.manual_seed(0)
    module = program.make(sizes).eval()  # without dropout, which would differ
    swapped = copy.deepcopy(module)
    accelerate(swapped, only=[program.recipe, f"{program.recipe}.*"])
    inputs = program.drawn(sizes, torch.float32)
    rows = []
    for kind in ("forward", "forward + backward"):
        runs = {
            peer: _run(program, one, sizes, inputs, kind)
            for peer, one in (("original", module), ("accelerated", swapped))
        }
        plan.show(f"{program.name}, {name}: {kind}, warming up")
        with torch.set_grad_enabled(kind != "forward"):
            for one, right in zip(runs["accelerated"](), runs["original"](), strict=True):
                # Beside 1: where a softmax is saturated, a gradient is all rounding.
                if not (error := float((one - right).abs().max()) / (1 + float(right.abs().max()))) <= _TOLERANCE:
                    raise Wrong(f"{program.name} and its original differ: off by {error:.2g}")
            seconds = interleaved(runs, plan, f"{program.name}, {name}, {kind}")
        rows.append({"program": program.name, "version": _version(program), "sizes": name, "kind": kind,
                     "seconds": seconds})  # fmt: skip
    return rows


def _run(
    program: Program, module: nn.Module, sizes: Sizes, inputs: Sequence[torch.Tensor], kind: str
) -> Callable[[], list[torch.Tensor]]:
    def forward() -> list[torch.Tensor]:
        return [x.detach() for x in program.run(module, sizes, *inputs) if x.is_floating_point()]

    def train() -> list[torch.Tensor]:
        outputs, grads = program.results(module, sizes, inputs)
        return [*outputs, *(grads[f"input {k}"] for k in range(len(inputs)) if f"input {k}" in grads)]

    return forward if kind == "forward" else train


def _version(program: Program) -> str:
    return next(recipe.version for recipe in recipes() if label(recipe) == program.recipe)


def markdown(rows: Sequence[Row]) -> str:
    """The table of the README, of a study's rows: how many times longer the original takes, forward / training."""
    sizes = list(dict.fromkeys(row["sizes"] for row in rows))
    lines = [
        f"| code base | class | looked at | served | {' | '.join(sizes)} |",
        "| --- " * (4 + len(sizes)) + "|",
    ]
    of_label = {label(recipe): recipe for recipe in recipes()}
    for name in dict.fromkeys(row["program"] for row in rows):
        recipe = of_label[name.partition(" ")[0]]
        cells = []
        for of in sizes:
            own = [row["seconds"] for row in rows if (row["program"], row["sizes"]) == (name, of)]
            cells.append(" / ".join(f"{_ratio(seconds):.1f}x" for seconds in own))
        kind = " ".join([f"`{class_name(recipe)}`", name.partition(" ")[2]]).strip()
        served = recipe.serves + ("" if recipe.pays else "; where asked for by name")
        lines.append(f"| {recipe.code_base} | {kind} | {recipe.version} | {served} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(seconds: Mapping[str, Sequence[float]]) -> float:
    return median(by_round(seconds["original"], seconds["accelerated"]))


if __name__ == "__main__":  # a file of `attnext bench --cases peers --json`
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["studies"]["peers"]))
