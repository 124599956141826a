"""What the contract asks of a GPU family beyond the cases, on one that serves CPU tensors here; the rules of all.

    python tests/gpu_contract.py triton
    python tests/gpu_contract.py cuda LIBRARY

A program of its own: Triton interprets where a variable was set before Python, and the CUDA kernels come in a library.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext.alignments import forward_weights, normalize
from attnext.backends import backends
from attnext.functional import attend_step
from attnext.memory import Memory
from attnext.reference import additive_scores

LENGTHS = torch.tensor([21, 4])
RULED = torch.tensor([40, 33, 7])
"""The lengths for which the rules of steps are held, and the windows of their queries."""
WINDOW = torch.tensor([[[0, 40], [3, 8]], [[-5, 99], [35, 30]], [[0, 7], [0, 7]]])


def inputs(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((2, 9, 12), (2, 21, 12), (2, 21, 7), (12,))
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def additive(x: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    context, weights = attnext.additive_attention(*x, need_weights=True, **options)
    assert weights is not None
    return context, weights


def dot(x: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    context, weights = attnext.dot_attention(*x, need_weights=True, scale=12**-0.5, **options)
    assert weights is not None
    return context, weights


ATTENTIONS = ((additive, 4), (dot, 3), (dot, 2))
"""Each with how many of the inputs it takes: dot products without a value, too."""


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def grads_like(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Of context and weights."""
    return [torch.randn_like(x) for x in results[:2]]


def operators(backend: str) -> Any:
    def operator(name: str) -> Any:
        return getattr(torch.ops.attnext, f"{name}_{backend}").default

    return operator


def opcheck(backend: str) -> None:
    op, x, none = operators(backend), inputs(), None
    for options in ((none, none, LENGTHS, none, none, 1.0, 0.0, True), (none, none, none, none, none, 0.5, 0.0, False)):
        torch.library.opcheck(op("additive_attention"), (*x, *options))
    torch.library.opcheck(op("additive_scores"), (x[0], x[1], x[3], LENGTHS, none, 1.0))
    torch.library.opcheck(op("additive_prepare"), (x[1].detach(), LENGTHS, none))
    for value in (x[2], none):
        for rest in ((LENGTHS, none, none, 1.0, 0.0, True), (none, none, none, 0.5, 0.0, False)):
            torch.library.opcheck(op("dot_attention"), (*x[:2], value, *rest))
        y = [None if t is none else t.detach() for t in (*x[:2], value)]
        results = op("dot_attention")(*y, LENGTHS, none, none, 1.0, 0.0, True)
        torch.library.opcheck(
            op("dot_attention_backward"),
            (*grads_like(results), *y, LENGTHS, none, none, 1.0, 0.0, *results),
            test_utils=("test_schema", "test_faketensor"),
        )


def determinism_and_any_subset(backend: str) -> None:
    for attention, count in ATTENTIONS:
        deterministic_in_any_subset(attention, inputs()[:count], backend)


def deterministic_in_any_subset(attention: Any, x: list[Tensor], backend: str) -> None:
    def run(name: str) -> list[Tensor]:
        context, weights = attention(x, lengths=LENGTHS, backend=name)
        # An expanded gradient comes in.
        return [context, weights, *torch.autograd.grad(context.sum() + weights.square().sum(), x)]

    def of_one(name: str, result: int) -> list[Tensor]:  # no gradient of the other comes in
        loss = attention(x, lengths=LENGTHS, backend=name)[result].square().sum()
        return list(torch.autograd.grad(loss, x, materialize_grads=True))

    first, second = run(backend), run(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    close(first, run("reference"))
    for result in (0, 1):
        close(of_one(backend, result), of_one("reference", result))


def heads(backend: str) -> None:
    """The score weight may be one for each head, of which a batch is several rows."""
    query, key, value, _ = inputs()
    of_heads = torch.randn(2, 12, requires_grad=True)
    rows = [x.repeat(2, 1, 1).detach().requires_grad_() for x in (query, key, value)]
    for x in ([query, key, value, of_heads], [*rows, of_heads]):
        grads = []
        for name in (backend, "reference"):
            context, weights = additive(x, backend=name)
            scores = attnext.additive_scores(x[0], x[1], x[3], backend=name)
            loss = context.square().sum() + weights.square().sum() + scores.tanh().sum()
            grads.append([context, weights, scores, *torch.autograd.grad(loss, x)])
        close(*grads)
    op, none = operators(backend), None
    torch.library.opcheck(op("additive_attention"), (*x, none, none, none, none, none, 1.0, 0.0, True))
    torch.library.opcheck(op("additive_scores"), (x[0], x[1], x[3], none, none, 1.0))


def prepared_memory(backend: str) -> None:
    attention = attnext.BahdanauAttention(8, 7, 12)
    states, query = torch.randn(2, 21, 7), torch.randn(2, 8)
    with attnext.use_backend(backend):
        memory = attention.prepare(states, lengths=LENGTHS)
        assert memory.prepared is not None
        assert memory.prepared.backend == backend
        mask = torch.rand(2, 21) < 0.6
        a, _ = attention(query, memory)
        narrower, weights = attention(query, memory.with_mask(mask), need_weights=True)
        found = [a, narrower, weights, *torch.autograd.grad(a.sum() + narrower.sum(), attention.score_weight)]
    with attnext.use_backend("reference"):
        b, _ = attention(query, states, lengths=LENGTHS)
        c, of_c = attention(query, states, lengths=LENGTHS, mask=mask, need_weights=True)
        expected = [b, c, of_c, *torch.autograd.grad(b.sum() + c.sum(), attention.score_weight)]
    close(found, expected)


def direct_calls(backend: str) -> None:
    """What compiled graphs could get wrong is refused before it is read; lengths that are too long count as Tk."""
    op, x = operators(backend), [t.detach() for t in inputs()]
    none = (None, None, None, 1.0, 0.0)
    found = op("additive_attention")(*x, None, None, *none, True)
    back = op("additive_attention_backward")
    exp_key, limit = op("additive_prepare")(x[1], None, None)
    dot, dot_back = op("dot_attention"), op("dot_attention_backward")
    of_dot = dot(x[0], x[1], None, *none, True)
    for call in (
        lambda: back(torch.ones(2, 9, 3), None, *x, None, None, *none, *found),
        lambda: back(torch.ones(2, 9, 7).double(), None, *x, None, None, *none, *found),
        lambda: back(None, torch.ones(2, 9, 21), *x, None, None, *none, found[0], torch.empty(0), found[2]),
        lambda: op("additive_attention")(*x, exp_key.transpose(1, 2), limit, *none, True),
        lambda: op("additive_attention")(
            *x, torch.cat([exp_key.flatten()] * 2)[1:][: exp_key.numel()].view_as(exp_key), limit, *none, True
        ),
        lambda: op("additive_attention")(*x, None, None, None, None, None, 1.0, 0.5, True),
        lambda: op("additive_scores_backward")(torch.ones(2, 9, 5), x[0], x[1], x[3], None, None, 1.0),
        lambda: op("additive_prepare")(x[1], None, torch.ones(2, 9, 21, dtype=torch.bool)),
        lambda: op("additive_attention")(*x[:3], torch.ones(3, 12), None, None, *none, True),
        lambda: dot(x[0], x[1][:, :, :5], None, *none, True),
        lambda: dot(x[0], x[1], x[2][:, :3], *none, True),
        lambda: dot(x[0], x[1], None, None, None, None, 1.0, 0.5, True),
        lambda: dot_back(torch.ones(2, 9, 3), None, x[0], x[1], None, *none, *of_dot),
    ):
        with pytest.raises(RuntimeError, match="attnext: "):
            call()
    grads = [
        back(found[0], None, *x, None, None, lengths, None, None, 1.0, 0.0, *found)
        for lengths in (torch.tensor([21, 21]), torch.tensor([25, 60]))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def weights_add_up_to_one(backend: str) -> None:
    """Backward's, with the log-sum-exp of forward.

    Scores are so large that one weight of a row is 1, and an ulp 1% of it. One key is too large for the folded loop:
    forward, a step and backward have to take the same loop for the other keys.
    """
    for queries in (1, 1, 1, 1, 5):
        query, key, value = torch.randn(16, queries, 64), torch.randn(16, 128, 64), torch.randn(16, 128, 1)
        key[:, 100] = -60
        value.requires_grad_()
        context, _ = attnext.additive_attention(query, key, value, 1e4 * torch.randn(64), backend=backend)
        (grad,) = torch.autograd.grad(context.sum(), value)
        torch.testing.assert_close(grad.sum((1, 2)), torch.full((16,), float(queries)), rtol=1e-5, atol=0.0)


def rows_that_attend_nothing(backend: str) -> None:
    """What comes in for one may be NaN, as the gradient of the norm at a context of 0."""
    mask = torch.ones(2, 9, 21, dtype=torch.bool)
    mask[0, 1] = False
    for attention, count in ATTENTIONS:
        x = inputs()[:count]
        for options in ({"lengths": torch.tensor([0, 5])}, {"mask": mask}):
            context, weights = attention(x, **options, backend=backend)
            loss = context.square().sum(-1).sqrt().sum() + weights.square().sum(-1).sqrt().sum()
            grads = torch.autograd.grad(loss, x)
            assert all(grad.isfinite().all() for grad in grads)
            assert all((grad[1] != 0).any() for grad in grads[:3])


def what_comes_in_for_weights_of_hidden_slots(backend: str) -> None:
    """They are constants: a NaN there reaches nothing."""
    visible = torch.arange(21) < LENGTHS.unsqueeze(1)
    for attention, count in ATTENTIONS:
        x = inputs()[:count]
        for options in ({"lengths": LENGTHS}, {"mask": visible}):
            _, weights = attention(x, **options, backend=backend)
            grad = torch.randn_like(weights)
            found = [
                torch.autograd.grad(weights, x, grad.masked_fill(~visible.unsqueeze(1), hidden), retain_graph=True,
                                    materialize_grads=True)
                for hidden in (torch.nan, 0.0)
            ]  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_large_row(backend: str) -> None:
    for large in (0, 1):  # of the queries, of the keys
        y = [torch.randn(s) for s in ((1, 100, 6), (1, 100, 6), (1, 100, 3), (6,))]
        y[large][0, 80] *= 100
        y = [t.requires_grad_() for t in y]
        found = []
        for name in (backend, "reference"):
            context, _ = attnext.additive_attention(*y, backend=name)
            found.append([context, *torch.autograd.grad(context.square().sum(), y)])
        close(*found)


def both_large(backend: str) -> None:
    """Queries and keys that are each within the range of the folded loop, and together beyond it."""
    for size in (12.0, 25.0, 35.0):
        for signs in ((1, 1), (-1, 1), (-1, -1)):
            y = [torch.randn(s) for s in ((1, 20, 6), (1, 30, 6), (1, 30, 3), (6,))]
            y[0], y[1] = y[0] + signs[0] * size, y[1] + signs[1] * size
            y = [t.requires_grad_() for t in y]
            found = []
            for name in (backend, "reference"):
                context, _ = attnext.additive_attention(*y, backend=name)
                found.append([context, *torch.autograd.grad(context.square().sum(), y)])
            close(*found)


def weights_out_of_range(backend: str) -> None:
    x = [t.detach() for t in inputs()]
    for bad in (torch.inf, -torch.inf, torch.nan):
        w = x[3].clone()
        w[2] = bad
        context, _ = attnext.additive_attention(*x[:3], w, backend=backend)
        assert context.isnan().all()
    w = torch.full((12,), 1e20)
    scores = attnext.additive_scores(x[0], x[1], w, backend=backend)
    expected = attnext.additive_scores(*(t.double() for t in (x[0], x[1], w)), backend="reference")
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e15)


def gradcheck(backend: str) -> None:
    if backend == "triton":  # the CUDA kernels have no float64
        for attention, count in ATTENTIONS:
            x = inputs(dtype=torch.float64)[:count]
            torch.autograd.gradcheck(
                lambda *t, of=attention: of(t, lengths=LENGTHS, backend=backend), x, fast_mode=True
            )
    else:
        with pytest.raises(ValueError, match="serves float32, float16, bfloat16, got tensors of float64"):
            attnext.additive_attention(*inputs(dtype=torch.float64), backend=backend)


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number of the device's, or has a size that depends on one."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        bad = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        assert name.split("::")[1].split(".")[0] not in bad, name
        assert (kwargs or {}).get("device") in (None, torch.device("cpu")), name
        return op(*args, **(kwargs or {}))


def nothing_waits(backend: str) -> None:
    """A call can be captured into a CUDA graph. For Triton's launches: the CUDA kernels' are out of a mode's sight."""
    from attnext.kernels.launch import OPERATORS

    op, x = OPERATORS.__getitem__, [t.detach() for t in inputs()]
    mask, seed = torch.rand(2, 9, 21) < 0.7, torch.tensor(5)
    with NoWaiting():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()
        prepared = op("additive_prepare")(x[1], LENGTHS, None)
        rest = (LENGTHS, mask, seed, 1.0, 0.2)
        found = op("additive_attention")(*x, *prepared, *rest, True)
        op("additive_attention_backward")(*grads_like(found), *x, *prepared, *rest, *found)
        scores = op("additive_scores")(x[0], x[1], x[3], *rest[:2], 1.0)
        op("additive_scores_backward")(scores, x[0], x[1], x[3], *rest[:2], 1.0)
        for y in (x[:3], [*x[:2], None]):
            found = op("dot_attention")(*y, *rest, True)
            op("dot_attention_backward")(*grads_like(found), *y, *rest, *found)
        tensors, options = step_inputs()
        saved = [y.detach() for y in tensors]
        context, weights = op("additive_step")(*saved, *options, 1.0, 0.0, 2)
        op("additive_step_backward")(context, weights, *saved, *options, 1.0, 0.0, 2, weights)


def one_graph(backend: str) -> None:
    x, mask = inputs(), torch.rand(2, 9, 21) < 0.7

    def loss(*x: Tensor) -> Tensor:
        total = attnext.additive_scores(x[0], x[1], x[3], lengths=LENGTHS, backend=backend).exp().sum()
        for attention, count in ATTENTIONS:
            context, weights = attention(x[:count], lengths=LENGTHS, mask=mask, backend=backend)
            total = total + context.square().sum() + weights.square().sum()
        return total

    whole = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    close(list(torch.autograd.grad(whole(*x), x)), list(torch.autograd.grad(loss(*x), x)))


def step_inputs() -> tuple[list[Tensor], list[Tensor | None]]:
    """Of a step that sees its past: what may have a gradient, for a beam of two; and lengths, mask, window, no seed."""
    shapes = ((2, 2, 12), (2, 21, 12), (2, 21, 7), (12,), (3, 2, 5), (12, 3))
    x = [torch.randn(shape) for shape in shapes] + [torch.rand(2, 2, 21) for _ in range(3)] + [torch.rand(2, 2, 1)]
    window = torch.tensor([[[0, 9], [2, 30]], [[-3, 3], [1, 2]]])
    return [y.requires_grad_() for y in x], [LENGTHS, torch.rand(2, 21) < 0.8, window, None]


def steps(backend: str) -> None:
    """Steps that see their past: the operators' contract, the same bits again, and any of the incoming gradients."""
    op = operators(backend)
    x, rest = step_inputs()
    for rule in range(3):
        inputs_ = [*x[:8], *(x[8:] if rule == 2 else (None, None))]
        torch.library.opcheck(op("additive_step"), (*inputs_, *rest, 1.0, 0.0, rule))
        saved = [None if y is None else y.detach() for y in inputs_]
        context, weights = op("additive_step")(*saved, *rest, 1.0, 0.0, rule)
        of = [torch.randn_like(context), torch.randn(2, 2, 1).expand(weights.shape)]
        for grads in (of, [None, of[1]], [of[0], None]):
            args = (*grads, *saved, *rest, 1.0, 0.0, rule)
            first, second = (op("additive_step_backward")(*args, weights) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            expected = torch.ops.attnext.additive_step_backward_cpu(*args, weights)
            close(list(first), list(expected))
        close([context, weights], list(torch.ops.attnext.additive_step_cpu(*saved, *rest, 1.0, 0.0, rule)))
    torch.library.opcheck(
        op("additive_step_backward"), (*of, *saved, *rest, 1.0, 0.0, 2, weights),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    # A NaN that forward attention sees is not taken for a key out of reach.
    previous = x[8].detach().clone()
    previous[0, 0, 3] = torch.nan
    _, weights = op("additive_step")(*saved[:4], *(None,) * 4, previous, None, None, None, None, None, 1.0, 0.0, 2)
    assert weights[0, 0].isnan().any()
    assert weights[0, 1].isfinite().all()
    assert weights[1].isfinite().all()
    # An empty row, for which what comes in is NaN.
    key, value = (y.detach().requires_grad_() for y in x[1:3])
    context, _ = op("additive_step")(
        x[0], key, value, x[3], *(None,) * 6, torch.tensor([0, 5]), None, None, None, 1.0, 0.0, 0
    )
    for grad in torch.autograd.grad(context.square().sum(-1).sqrt().sum(), (key, value)):
        assert grad.isfinite().all()
        assert (grad[1] != 0).any()


def by_rule(rule: str, scale: float, x: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    query, key, value, v, *of_forward = x
    previous, transition = of_forward or (None, None)
    memory, options = Memory(key, value, RULED, None, v, None), {"window": WINDOW, "scale": scale, "backend": backend}
    return attend_step(query, memory, None, None, (), rule=rule, previous=previous, transition=transition, **options)


def by_alignments(rule: str, scale: float, x: list[Tensor]) -> tuple[Tensor, Tensor]:
    query, key, value, v, *of_forward = x
    slots = torch.arange(40)
    hidden = slots >= RULED.view(-1, 1, 1)
    outside = hidden | (slots < WINDOW[..., :1]) | (slots >= WINDOW[..., 1:])
    scores = additive_scores(query, key, v, scale=scale).masked_fill(outside, -torch.inf)
    if of_forward:
        weights = forward_weights(scores, of_forward[0].masked_fill(hidden, 0.0), of_forward[1])
    else:
        weights = normalize(scores, rule)
    return weights @ value, weights


def rules(backend: str) -> None:
    """Weights of steps that see their past, to the corners: where forward attention reaches no key, or not all, and
    another has by far the largest score; where every sigmoid is 0."""
    query, key, value = torch.randn(3, 2, 5), torch.rand(3, 40, 5) + 2, torch.randn(3, 40, 3)
    previous = torch.rand(3, 2, 40) * (torch.arange(40) % 5 == 0)
    previous[0, 0], previous[1, 0] = 0.0, torch.arange(40) == 32  # nowhere; at the last key
    previous[2, 0] = 1e-34  # too little to divide by
    of_forward, far = [previous, torch.rand(3, 2, 1)], -2 * key
    far[:, 3] = 4.0  # which is not reached
    for rule, keys, scale, more in (
        ("forward", key, 1.0, of_forward),
        ("forward", key, 30.0, of_forward),
        ("forward", far, 30.0, of_forward),
        ("sigmoid", key, -200.0, []),
    ):
        x = [t.clone().requires_grad_() for t in (query, keys, value, torch.ones(5), *more)]
        found = []
        for results in (by_rule(rule, scale, x, backend), by_alignments(rule, scale, x)):
            loss = sum((y * (k + 1)).cos().sum() for k, y in enumerate(results))
            found.append([*results, *torch.autograd.grad(loss, x)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    key[2, 3] = torch.nan  # of a key that is attended: it shows
    context, _ = by_rule("softmax", 1.0, [query, key, value, torch.ones(5)], backend)
    assert context[2].isnan().all()
    assert context[:2].isfinite().all()


CHECKS = (
    opcheck,
    steps,
    rules,
    determinism_and_any_subset,
    prepared_memory,
    weights_add_up_to_one,
    rows_that_attend_nothing,
    what_comes_in_for_weights_of_hidden_slots,
    one_large_row,
    both_large,
    weights_out_of_range,
    gradcheck,
    one_graph,
    heads,
)
OF_FAMILY = {"triton": nothing_waits, "cuda": direct_calls}


def main(backend: str, *library: str) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    if library:
        from cuda_cases import serve_cuda_on_cpu

        serve_cuda_on_cpu(*library)
    assert backends()[backend].available, backends()[backend]
    for check in (*CHECKS, OF_FAMILY[backend]):
        check(backend)
        print(check.__name__)
    print("held")


if __name__ == "__main__":
    main(*sys.argv[1:])
