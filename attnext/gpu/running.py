"""How a backend's kernels behave in a process of users': again and again, on streams and cards, captured, compiled.

    python -m attnext.gpu.running triton --device cuda

On the CPU, where there are no streams and graphs, the same calls are made without: a dry run.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import attnext
from attnext.backends import backends
from attnext.gpu.checking import Check, NotHere, On, close, main, operators, raises
from attnext.gpu.contract import NoWaiting

__all__ = ["checks_of"]

Call = Callable[[Sequence[Tensor]], list[Tensor]]
"""Of tensors that stay where they are: what can be captured."""

SIZES = ((3, 33, 70, 40, 24), (2, 1, 300, 17, 9), (2, 5, 130, 64, 64))
"""Of B, Tq, Tk, D and H: many queries, one, and few, each with keys of several tiles."""
MANY_ROWS = 70_000
"""Of a batch: more than a grid may have in its second and third dimension."""


def additive(on: On, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and score weight."""
    batch, queries, keys, features, values = sizes
    shapes = ((batch, queries, features), (batch, keys, features), (batch, keys, values), (features,))
    return [on.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def trained(on: On, of: str, x: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients of a loss: of additive attention, of dot products, of the scores, or of a step."""
    if of == "scores":
        results = [attnext.additive_scores(x[0], x[1], x[3], backend=on.backend)]
    elif of == "dot":
        results = [attnext.dot_attention(x[0], x[1], x[2], scale=x[0].shape[-1] ** -0.5, backend=on.backend)[0]]
    elif of == "step":
        with attnext.use_backend(on.backend):
            memory = attnext.prepare(x[1], x[2], x[3])
            context, weights = attnext.additive_attention(x[0][:, 0], memory, need_weights=True)
            assert weights is not None
            filters = x[3].view(-1, 1, 1).expand(-1, 1, 3)
            results = list(attnext.additive_step(x[0][:, 0], memory, filters, None, weights))
    else:
        context, weights = attnext.additive_attention(*x, need_weights=True, backend=on.backend)
        assert weights is not None
        results = [context, weights]
    loss = sum((y.square().sum() for y in results), x[0].new_zeros(()))
    return [*results, *torch.autograd.grad(loss, x, materialize_grads=True)]


OPS = ("additive", "dot", "scores", "step")


def same_bits_again(on: On) -> None:
    """Fifty runs of forward and backward, with other calls between them."""
    for sizes in SIZES:
        x = additive(on, sizes)
        for of in OPS:
            first = trained(on, of, x)
            for number in range(50 if on.on_gpu else 1):
                if number % 10 == 0:
                    trained(on, of, additive(on, (2, 3, 40, 8, 8)))
                again = trained(on, of, x)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (of, sizes, number)


def near_and_far_agree(on: On) -> None:
    """Scores of a tile by products of exponentials, and by exponentials of the sum: one row takes all of it there."""
    query, key, _, v = (t.detach() for t in additive(on, (2, 20, 60, 32, 8)))
    far = key.clone()
    far[:, -1] = 60.0
    scores = [attnext.additive_scores(query, k, v, backend=on.backend)[..., :-1] for k in (key, far)]
    exact = attnext.additive_scores(*(t.double() for t in (query, key, v)), backend="reference")[..., :-1]
    bound = 16 * torch.finfo(torch.float32).eps * v.abs().sum()
    for found in scores:
        assert (found - exact).abs().max() <= bound, (found - exact).abs().max() / bound


def tensors_on_other_devices(on: On) -> None:
    """An error that names the argument, from functions and from operators."""
    x = [t.detach() for t in additive(on, SIZES[0])]
    elsewhere = "cpu" if on.on_gpu else "meta"
    for number, name in enumerate(("key", "value", "score_weight"), start=1):
        mixed = [t.to(elsewhere) if k == number else t for k, t in enumerate(x)]
        with raises(ValueError, f"^{name} "):
            attnext.additive_attention(*mixed, backend=on.backend)
    with raises(ValueError, "^lengths "):
        attnext.additive_attention(*x, lengths=torch.ones(3, dtype=torch.int64, device=elsewhere), backend=on.backend)
    if on.on_gpu and on.backend == "cuda":
        with raises(RuntimeError, "attnext: key is on device -1"):
            rest = (None, None, None, None, None, 1.0, 0.0, False)
            operators("cuda")("additive_attention")(x[0], x[1].cpu(), *x[2:], *rest)


def two_streams(on: On) -> None:
    """Calls that run at the same time, each behind what its own stream has made."""
    if not on.on_gpu:
        raise NotHere("the CPU has no streams")
    batches = [additive(on, SIZES[0]) for _ in range(2)]
    expected = [trained(on, "additive", x) for x in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(20):
        found = []
        for stream, x in zip(streams, batches, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = [t.detach().clone() for t in x]  # what a kernel on another stream would read too early
                torch.cuda._sleep(200_000)
                late = [torch.add(t, 0.0).requires_grad_() for t in late]
                found.append(trained(on, "additive", late))
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(y, z) for y, z in zip(a, b, strict=True))


def several_cards(on: On) -> None:
    """A call is served on its tensors' card, whichever is the current one."""
    if not on.on_gpu or torch.cuda.device_count() < 2:
        raise NotHere(f"{torch.cuda.device_count()} cards here")
    x = additive(on, SIZES[0])
    expected = trained(on, "additive", x)
    for index in range(torch.cuda.device_count()):
        here = On(on.backend, f"cuda:{index}")
        moved = [t.detach().to(here.device).requires_grad_() for t in x]
        with torch.cuda.device((index + 1) % torch.cuda.device_count()):
            found = trained(here, "additive", moved)
        assert all(t.device == moved[0].device for t in found)
        close([t.to(on.device) for t in found], expected)


def _replayed(on: On, call: Call, x: list[Tensor]) -> Callable[[], list[Tensor]]:
    """What a call makes of tensors that are written over: captured into a graph, or made again where there is none."""
    if not on.on_gpu:
        with NoWaiting(on.device):
            call(x)
        return lambda: call(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's documentation has it: tuned and loaded before anything is captured
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(x)

    def replay() -> list[Tensor]:
        graph.replay()
        return [t.clone() for t in results]

    return replay


def captured(on: On) -> None:
    """Forward, a prepared step and a training step in a graph, which is replayed with other numbers."""
    memory_of = attnext.BahdanauAttention(17, 9, 17).to(on.device)

    def forward(x: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [attnext.additive_attention(*x, backend=on.backend)[0]]

    def step(x: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), attnext.use_backend(on.backend):
            return [memory_of(x[0][:, 0], memory_of.prepare(x[2]))[0]]

    def training(x: Sequence[Tensor]) -> list[Tensor]:
        return [y for of in ("additive", "dot", "step") for y in trained(on, of, x)]

    for call in (forward, step, training):
        x, other = additive(on, SIZES[1]), additive(on, SIZES[1])
        if not on.on_gpu and call is training:  # autograd's own bookkeeping is seen there, not captured
            continue
        replay, expected = _replayed(on, call, x), [t.clone() for t in call(other)]
        first = replay()
        with torch.no_grad():
            for old, new in zip(x, other, strict=True):
                old.copy_(new)
        second = replay()
        assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True)), call.__name__
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), call.__name__


def compiled(on: On) -> None:
    """One graph by inductor, forward and backward, of sizes that change."""
    triton = backends()["triton"]
    if on.on_gpu and not triton.available:
        raise NotHere(f"inductor takes Triton on a GPU: {triton.reason}")

    def loss(*x: Tensor) -> Tensor:
        context, weights = attnext.additive_attention(*x, need_weights=True, backend=on.backend)
        assert weights is not None
        return context.tanh().square().sum() + weights.square().sum()

    whole = torch.compile(loss, fullgraph=True, dynamic=True)
    for sizes in ((3, 33, 70, 40, 24), (5, 9, 21, 40, 24)):
        x = additive(on, sizes)
        found, expected = (of(*x) for of in (whole, loss))
        close([found], [expected])
        close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


def autocast(on: On) -> None:
    """A module under autocast, in both half types, beside the same without."""
    attention = attnext.BahdanauAttention(12, 10, 16).to(on.device)
    query, states = on.randn(3, 5, 12), on.randn(3, 40, 10)
    with attnext.use_backend(on.backend):
        exact = attention(query, states)[0]
        for dtype in (torch.bfloat16, torch.float16):
            attention.zero_grad()
            with torch.autocast(torch.device(on.device).type, dtype):
                context = attention(query, states)[0]
            assert context.dtype == dtype
            torch.testing.assert_close(context.float(), exact, rtol=0.05, atol=0.05)
            context.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def in_a_process_group(on: On) -> None:
    """DistributedDataParallel with one process: the same gradients."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    kind = "nccl" if on.on_gpu else "gloo"
    if not dist.is_available() or (on.on_gpu and not dist.is_nccl_available()):
        raise NotHere(f"this torch has no {kind}")
    attention = attnext.BahdanauAttention(12, 10, 16).to(on.device)
    query, states = on.randn(3, 5, 12), on.randn(3, 40, 10)
    with tempfile.TemporaryDirectory() as folder, attnext.use_backend(on.backend):
        attention(query, states)[0].square().sum().backward()
        expected = [p.grad.clone() for p in attention.parameters() if p.grad is not None]
        attention.zero_grad()
        dist.init_process_group(kind, init_method=Path(folder, "group").as_uri(), rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(attention)
            parallel(query, states)[0].square().sum().backward()
            close([p.grad for p in attention.parameters() if p.grad is not None], expected)
        finally:
            dist.destroy_process_group()


def _held(on: On) -> int:
    """Bytes of the tensors that are alive."""
    gc.collect()
    if on.on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    there = (x for x in gc.get_objects() if type(x) is Tensor and torch._C._has_storage(x))
    tensors = {x.data_ptr(): x.nbytes for x in there}
    return sum(tensors.values())


def memory_that_does_not_grow(on: On) -> None:
    """As many bytes after many training steps as after a few."""
    x = additive(on, SIZES[0])
    counts = []
    for _ in range(60 if on.on_gpu else 4):
        for of in OPS:
            trained(on, of, x)
        counts.append(_held(on))
    assert len(set(counts[len(counts) // 2 :])) == 1, counts


def more_rows_than_a_grid_is_high(on: On) -> None:
    """A batch of more than 65,535; on the CPU a small one."""
    batch = MANY_ROWS if on.on_gpu else 9
    for sizes in ((batch, 2, 3, 4, 4), (batch, 1, 5, 4, 4)):
        x = additive(on, sizes)
        for of in OPS:
            # No row differs from the same in a batch of its own; the shared weight's gradient is over all.
            last = [t[-2:].detach().requires_grad_() if t.dim() == 3 else t for t in x]
            found, expected = trained(on, of, x), trained(on, of, last)
            close([t[-2:] for t in found[:-1]], expected[:-1])


def offsets_beyond_32_bits(on: On) -> None:
    """Keys of more than 2^31 numbers, in a half type: the last rows are those of a small call."""
    wanted = 24 << 30
    if on.on_gpu:
        torch.cuda.empty_cache()
    if not on.on_gpu or torch.cuda.mem_get_info()[0] < wanted:
        raise NotHere(f"takes {wanted >> 30} GiB of a GPU's memory")
    batch, keys, features = 4, 1 << 20, 520
    key = torch.zeros(batch, keys, features, dtype=torch.float16, device=on.device)
    key[:, -64:].normal_()
    query, v = on.randn(batch, 1, features, dtype=torch.float16), on.randn(features, dtype=torch.float16)
    scores = attnext.additive_scores(query, key, v, backend=on.backend)[..., -64:]
    expected = attnext.additive_scores(query, key[:, -64:].contiguous(), v, backend=on.backend)
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=1e-3)
    dot = attnext.dot_attention(query, key, need_weights=True, scale=1.0, backend=on.backend)[1]
    assert dot is not None
    tail = torch.bmm(query.float(), key[:, -64:].float().transpose(1, 2)).softmax(-1)
    found = dot[..., -64:].float()
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), tail, rtol=0.02, atol=0.01)


CHECKS: tuple[Check, ...] = (
    same_bits_again,
    near_and_far_agree,
    tensors_on_other_devices,
    two_streams,
    several_cards,
    captured,
    compiled,
    autocast,
    in_a_process_group,
    memory_that_does_not_grow,
    more_rows_than_a_grid_is_high,
    offsets_beyond_32_bits,
)


def checks_of(backend: str) -> Sequence[Check]:
    """The same of all."""
    return CHECKS


if __name__ == "__main__":
    sys.exit(main("See how a backend's kernels behave in a process of users'.", checks_of))
