"""Tacotron 2's attention: torchaudio's, and the copies of NVIDIA's; alone and in the decoders that come with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

MELS = 4
FILES = {
    "torchaudio": ("torchaudio", "torchaudio.models.tacotron2"),
    "NeMo": ("nemo_toolkit", "nemo.collections.tts.modules.submodules"),
    "SpeechBrain": ("speechbrain", "speechbrain.lobes.models.Tacotron2"),
    "tacotron2-model": ("tacotron2-model", "tacotron2_model.model"),
}


def _made(copy: str, name: str = "Attention") -> Any:
    return lambda s: getattr(load(*FILES[copy]), name)(s.query, s.states, s.features, s.filters, s.width)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _padding(s: Sizes) -> Tensor:
    return torch.arange(s.keys) >= torch.tensor(s.lengths).unsqueeze(1)


def _run(attend: Any, s: Sizes, memory: Tensor, *queries: Tensor, mask: Any = _padding) -> list[Tensor]:
    processed, mask, found = attend.memory_layer(memory), mask(s), []
    last, total = memory.new_zeros(s.batch, s.keys), memory.new_zeros(s.batch, s.keys)
    for query in queries:
        context, last = attend(query, memory, processed, torch.stack([last, total], 1), mask)
        total += last
        found += [context, last]
    return found


def _unmasked(attend: Any, s: Sizes, memory: Tensor, *queries: Tensor) -> list[Tensor]:
    return _run(attend, s, memory, *queries, mask=lambda _: None)


def _past_in_padding(attend: Any, s: Sizes, memory: Tensor, *queries: Tensor) -> list[Tensor]:
    """The filters see whatever the caller hands in."""
    processed, mask = attend.memory_layer(memory), _padding(s)
    past = torch.stack([memory.mean(2), memory.sum(2)], 1)
    return [x for query in queries for x in attend(query, memory, processed, past, mask)]


def _changing(attend: Any, s: Sizes, memory: Tensor, *queries: Tensor) -> list[Tensor]:
    """The same keys with other values, another mask, and with a gradient or not; then changed in place."""
    processed, past = memory.new_full((s.batch, s.keys, s.features), 0.5), memory.new_ones(s.batch, 2, s.keys)
    score = next(p for name, p in attend.named_parameters() if name.startswith("v."))
    mask, found = _padding(s), []
    for values in (memory, memory * 2):
        for hidden in (mask, torch.zeros_like(mask)):
            found += attend(queries[0], values, processed, past, hidden)
    with torch.no_grad():
        processed = processed.clone()
        for changed in (processed, score.data, processed, score.data):
            found += attend(queries[1], memory, processed, past, mask)
            changed.mul_(-1)
    return [*found, *attend(queries[2], memory, processed, past, mask)]


def _torchaudio_decoder(s: Sizes) -> Any:
    decoder = load(*FILES["torchaudio"])._Decoder
    return decoder(MELS, 1, s.states, 6, 10, 0.1, False, s.query, s.features, s.filters, s.width, 0.1, 3, 0.5)


def _speechbrain_decoder(s: Sizes) -> Any:
    decoder = load(*FILES["SpeechBrain"]).Decoder
    return decoder(MELS, 1, s.states, s.features, s.filters, s.width, s.query, 6, 3, 10, 0.5, 0.1, 0.1, False)


def _nvidia_decoder(s: Sizes) -> Any:
    decoder = load(*FILES["tacotron2-model"]).Decoder
    return decoder(MELS, 1, s.states, s.features, s.query, s.filters, s.width, 6, 3, 10, 0.5, 0.1, 0.1)


def _spoken(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), draw(s.batch, MELS, s.steps)]


def _decode(decoder: Any, s: Sizes, memory: Tensor, mels: Tensor) -> list[Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)  # of its dropout, which it has in evaluation too
        return list(decoder(memory, mels, torch.tensor(s.lengths)))


def _decode_in_steps(decoder: Any, s: Sizes, memory: Tensor, mels: Tensor) -> list[Tensor]:
    """As its forward and its inference do, whose mask is made on a GPU, or is None."""
    found: list[Tensor] = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        for mask in (_padding(s), None):
            decoder.initialize_decoder_states(memory, mask)
            for frame in mels.unbind(2):
                found += decoder.decode(decoder.prenet(frame))
    return found


_AUDIO = "tacotron2._Attention"
_MASKS = (("", _run), (" with a past in padding", _past_in_padding), (" changing", _changing))
PROGRAMS = [
    *(Program(f"{_AUDIO} of torchaudio{what}", _made("torchaudio", "_Attention"), _inputs, run)
      for what, run in _MASKS),
    *(Program(f"tacotron2.Attention of {copy}{what}", _made(copy), _inputs, run)
      for copy, more in (("NeMo", (" unmasked", _unmasked)), ("SpeechBrain", _MASKS[2]),
                         ("tacotron2-model", (" unmasked", _unmasked)))
      for what, run in (*_MASKS[:2], more)),
    Program(f"{_AUDIO} of torchaudio in a decoder", _torchaudio_decoder, _spoken, _decode, takes_half=False),
    Program("tacotron2.Attention of SpeechBrain in a decoder", _speechbrain_decoder, _spoken, _decode,
            takes_half=False),
    Program("tacotron2.Attention of tacotron2-model in a decoder", _nvidia_decoder, _spoken, _decode_in_steps,
            takes_half=False),
]  # fmt: skip
