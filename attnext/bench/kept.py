"""What a decoder's steps keep for their backward pass, in bytes.

Like a call's peak it is told by the whole process, so each measurement has one of its own: ``python -m
attnext.bench.kept``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import torch

from attnext.bench.loops import Decoder, Loop, Side
from attnext.bench.memory import in_new_process, peak_of, resident
from attnext.bench.timing import threads

__all__ = ["measured"]


def measured(loop: Loop, peer: str, device: str, count: int) -> tuple[int, int]:
    """Bytes after a decoder's last step, beside its contexts; and at the peak of forward and backward.

    Raises:
        Unavailable: the process failed; the message has its last words.
    """
    request = {"loop": asdict(loop), "peer": peer, "device": device, "threads": count}
    kept, peak = in_new_process("attnext.bench.kept", request, f"{loop.steps} steps")
    return int(kept), int(peak)


def _measure(loop: Decoder, peer: str, device: str) -> tuple[int, int]:
    _train(replace(loop, batch=1, steps=2).sides(device, ())[peer])  # whose threads and libraries stay
    side = loop.sides(device, ())[peer]
    before = resident(device)
    contexts = side.call()
    kept = resident(device) - before - contexts.nbytes
    del contexts
    return kept, peak_of(lambda: _train(side), device)


def _train(side: Side) -> None:
    contexts = side.call()
    torch.autograd.grad(contexts, side.leaves, contexts.detach(), materialize_grads=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with threads(asked["threads"]):
        print(json.dumps(_measure(Decoder(**asked["loop"]), asked["peer"], asked["device"])))
