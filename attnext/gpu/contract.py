"""What the contract asks of a GPU family beyond the cases; the rules of all families.

    python -m attnext.gpu.contract cuda --device cuda

Small enough to be interpreted: with TRITON_INTERPRET=1 it is ``triton --device cpu``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext.alignments import forward_weights, normalize
from attnext.backends import backends
from attnext.functional import attend_step
from attnext.gpu.checking import Check, NotHere, On, close, main, operators, raises
from attnext.memory import Memory
from attnext.reference import additive_scores

__all__ = ["checks_of", "rules"]


def lengths_of(on: On) -> Tensor:
    """Of the sentences of :func:`inputs`."""
    return on.tensor([21, 4])


def ruled(on: On) -> tuple[Tensor, Tensor]:
    """Lengths for which the rules of steps are held, and windows of two queries."""
    windows = [[[0, 40], [3, 8]], [[-5, 99], [35, 30]], [[0, 7], [0, 7]]]
    return on.tensor([40, 33, 7]), on.tensor(windows)


def inputs(on: On, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((2, 9, 12), (2, 21, 12), (2, 21, 7), (12,))
    return [on.randn(size, dtype=dtype).requires_grad_() for size in sizes]


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


def grads_like(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Of context and weights."""
    return [torch.randn_like(x) for x in results[:2]]


def opcheck(on: On) -> None:
    op, x, none = operators(on.backend), inputs(on), None
    for options in (
        (none, none, lengths_of(on), none, none, 1.0, 0.0, True),
        (none, none, none, none, none, 0.5, 0.0, False),
    ):
        torch.library.opcheck(op("additive_attention"), (*x, *options))
    torch.library.opcheck(op("additive_scores"), (x[0], x[1], x[3], lengths_of(on), none, 1.0))
    torch.library.opcheck(op("additive_prepare"), (x[1].detach(), lengths_of(on), none))
    for value in (x[2], none):
        for rest in ((lengths_of(on), none, none, 1.0, 0.0, True), (none, none, none, 0.5, 0.0, False)):
            torch.library.opcheck(op("dot_attention"), (*x[:2], value, *rest))
        y = [None if t is none else t.detach() for t in (*x[:2], value)]
        results = op("dot_attention")(*y, lengths_of(on), none, none, 1.0, 0.0, True)
        torch.library.opcheck(
            op("dot_attention_backward"),
            (*grads_like(results), *y, lengths_of(on), none, none, 1.0, 0.0, *results),
            test_utils=("test_schema", "test_faketensor"),
        )


def determinism_and_any_subset(on: On) -> None:
    for attention, count in ATTENTIONS:
        deterministic_in_any_subset(attention, inputs(on)[:count], on)


def deterministic_in_any_subset(attention: Any, x: list[Tensor], on: On) -> None:
    def run(name: str) -> list[Tensor]:
        context, weights = attention(x, lengths=lengths_of(on), backend=name)
        # An expanded gradient comes in.
        return [context, weights, *torch.autograd.grad(context.sum() + weights.square().sum(), x)]

    def of_one(name: str, result: int) -> list[Tensor]:  # no gradient of the other comes in
        loss = attention(x, lengths=lengths_of(on), backend=name)[result].square().sum()
        return list(torch.autograd.grad(loss, x, materialize_grads=True))

    first, second = run(on.backend), run(on.backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    close(first, run("reference"))
    for result in (0, 1):
        close(of_one(on.backend, result), of_one("reference", result))


def heads(on: On) -> None:
    """The score weight may be one for each head, of which a batch is several rows."""
    query, key, value, _ = inputs(on)
    of_heads = on.randn(2, 12, requires_grad=True)
    rows = [x.repeat(2, 1, 1).detach().requires_grad_() for x in (query, key, value)]
    for x in ([query, key, value, of_heads], [*rows, of_heads]):
        grads = []
        for name in (on.backend, "reference"):
            context, weights = additive(x, backend=name)
            scores = attnext.additive_scores(x[0], x[1], x[3], backend=name)
            loss = context.square().sum() + weights.square().sum() + scores.tanh().sum()
            grads.append([context, weights, scores, *torch.autograd.grad(loss, x)])
        close(*grads)
    op, none = operators(on.backend), None
    torch.library.opcheck(op("additive_attention"), (*x, none, none, none, none, none, 1.0, 0.0, True))
    torch.library.opcheck(op("additive_scores"), (x[0], x[1], x[3], none, none, 1.0))


def prepared_memory(on: On) -> None:
    attention = attnext.BahdanauAttention(8, 7, 12).to(on.device)
    states, query = on.randn(2, 21, 7), on.randn(2, 8)
    with attnext.use_backend(on.backend):
        memory = attention.prepare(states, lengths=lengths_of(on))
        assert memory.prepared is not None
        assert memory.prepared.backend == on.backend
        mask = on.rand(2, 21) < 0.6
        a, _ = attention(query, memory)
        narrower, weights = attention(query, memory.with_mask(mask), need_weights=True)
        found = [a, narrower, weights, *torch.autograd.grad(a.sum() + narrower.sum(), attention.score_weight)]
    with attnext.use_backend("reference"):
        b, _ = attention(query, states, lengths=lengths_of(on))
        c, of_c = attention(query, states, lengths=lengths_of(on), mask=mask, need_weights=True)
        expected = [b, c, of_c, *torch.autograd.grad(b.sum() + c.sum(), attention.score_weight)]
    close(found, expected)


def direct_calls(on: On) -> None:
    """What compiled graphs could get wrong is refused before it is read; lengths that are too long count as Tk."""
    op, x = operators(on.backend), [t.detach() for t in inputs(on)]
    none = (None, None, None, 1.0, 0.0)
    found = op("additive_attention")(*x, None, None, *none, True)
    back = op("additive_attention_backward")
    exp_key, limit = op("additive_prepare")(x[1], None, None)
    dot, dot_back = op("dot_attention"), op("dot_attention_backward")
    of_dot = dot(x[0], x[1], None, *none, True)
    calls: tuple[Callable[[], object], ...] = (
        lambda: back(on.ones(2, 9, 3), None, *x, None, None, *none, *found),
        lambda: back(on.ones(2, 9, 7).double(), None, *x, None, None, *none, *found),
        lambda: back(None, on.ones(2, 9, 21), *x, None, None, *none, found[0], on.ones(0), found[2]),
        lambda: op("additive_attention")(*x, exp_key.transpose(1, 2), limit, *none, True),
        lambda: op("additive_attention")(
            *x, torch.cat([exp_key.flatten()] * 2)[1:][: exp_key.numel()].view_as(exp_key), limit, *none, True
        ),
        lambda: op("additive_attention")(*x, None, None, None, None, None, 1.0, 0.5, True),
        lambda: op("additive_scores_backward")(on.ones(2, 9, 5), x[0], x[1], x[3], None, None, 1.0),
        lambda: op("additive_prepare")(x[1], None, on.ones(2, 9, 21, dtype=torch.bool)),
        lambda: op("additive_attention")(*x[:3], on.ones(3, 12), None, None, *none, True),
        lambda: dot(x[0], x[1][:, :, :5], None, *none, True),
        lambda: dot(x[0], x[1], x[2][:, :3], *none, True),
        lambda: dot(x[0], x[1], None, None, None, None, 1.0, 0.5, True),
        lambda: dot_back(on.ones(2, 9, 3), None, x[0], x[1], None, *none, *of_dot),
    )
    for call in calls:
        with raises(RuntimeError, "attnext: "):
            call()
    grads = [
        back(found[0], None, *x, None, None, lengths, None, None, 1.0, 0.0, *found)
        for lengths in (on.tensor([21, 21]), on.tensor([25, 60]))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def weights_add_up_to_one(on: On) -> None:
    """Backward's, with the log-sum-exp of forward.

    Scores are so large that one weight of a row is 1, and an ulp 1% of it. One key is too large for the folded loop:
    forward, a step and backward have to take the same loop for the other keys.
    """
    for queries in (1, 1, 1, 1, 5):
        query, key, value = on.randn(16, queries, 64), on.randn(16, 128, 64), on.randn(16, 128, 1)
        key[:, 100] = -60
        value.requires_grad_()
        context, _ = attnext.additive_attention(query, key, value, 1e4 * on.randn(64), backend=on.backend)
        (grad,) = torch.autograd.grad(context.sum(), value)
        torch.testing.assert_close(grad.sum((1, 2)), on.ones(16) * queries, rtol=1e-5, atol=0.0)


def rows_that_attend_nothing(on: On) -> None:
    """What comes in for one may be NaN, as the gradient of the norm at a context of 0."""
    mask = on.ones(2, 9, 21, dtype=torch.bool)
    mask[0, 1] = False
    for attention, count in ATTENTIONS:
        x = inputs(on)[:count]
        for options in ({"lengths": on.tensor([0, 5])}, {"mask": mask}):
            context, weights = attention(x, **options, backend=on.backend)
            loss = context.square().sum(-1).sqrt().sum() + weights.square().sum(-1).sqrt().sum()
            grads = torch.autograd.grad(loss, x)
            assert all(grad.isfinite().all() for grad in grads)
            assert all((grad[1] != 0).any() for grad in grads[:3])


def what_comes_in_for_weights_of_hidden_slots(on: On) -> None:
    """They are constants: a NaN there reaches nothing."""
    visible = torch.arange(21, device=on.device) < lengths_of(on).unsqueeze(1)
    for attention, count in ATTENTIONS:
        x = inputs(on)[:count]
        for options in ({"lengths": lengths_of(on)}, {"mask": visible}):
            _, weights = attention(x, **options, backend=on.backend)
            grad = torch.randn_like(weights)
            found = [
                torch.autograd.grad(weights, x, grad.masked_fill(~visible.unsqueeze(1), hidden), retain_graph=True,
                                    materialize_grads=True)
                for hidden in (torch.nan, 0.0)
            ]  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_large_row(on: On) -> None:
    for large in (0, 1):  # of the queries, of the keys
        y = [on.randn(s) for s in ((1, 100, 6), (1, 100, 6), (1, 100, 3), (6,))]
        y[large][0, 80] *= 100
        as_the_reference(on, y)


def as_the_reference(on: On, x: list[Tensor]) -> None:
    """Holds context and gradients of query, key, value and score weight to the reference's."""
    found, x = [], [t.detach().requires_grad_() for t in x]
    for name in (on.backend, "reference"):
        context, _ = attnext.additive_attention(*x, backend=name)
        found.append([context, *torch.autograd.grad(context.square().sum(), x)])
    close(*found)


def both_large(on: On) -> None:
    """Queries and keys that are each within the range of the folded loop, and together beyond it."""
    for size in (12.0, 25.0, 35.0):
        for signs in ((1, 1), (-1, 1), (-1, -1)):
            y = [on.randn(s) for s in ((1, 20, 6), (1, 30, 6), (1, 30, 3), (6,))]
            y[0], y[1] = y[0] + signs[0] * size, y[1] + signs[1] * size
            as_the_reference(on, y)


def weights_out_of_range(on: On) -> None:
    x = [t.detach() for t in inputs(on)]
    for bad in (torch.inf, -torch.inf, torch.nan):
        w = x[3].clone()
        w[2] = bad
        context, _ = additive([*x[:3], w], backend=on.backend)
        assert context.isnan().all()
    w = on.ones(12) * 1e20
    scores = attnext.additive_scores(x[0], x[1], w, backend=on.backend)
    expected = attnext.additive_scores(*(t.double() for t in (x[0], x[1], w)), backend="reference")
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e15)


def gradcheck(on: On) -> None:
    if on.backend == "triton":  # the CUDA kernels have no float64
        for attention, count in ATTENTIONS:
            x = inputs(on, dtype=torch.float64)[:count]
            torch.autograd.gradcheck(
                lambda *t, of=attention: of(t, lengths=lengths_of(on), backend=on.backend), x, fast_mode=True
            )
    else:
        with raises(ValueError, "serves float32, float16, bfloat16, got tensors of float64"):
            attnext.additive_attention(*inputs(on, dtype=torch.float64), backend=on.backend)


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number of the device's, has a size that depends on one, or makes a tensor elsewhere."""

    def __init__(self, device: str) -> None:
        TorchDispatchMode.__init__(self)
        self.device = torch.device(device)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        bad = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        assert name.split("::")[1].split(".")[0] not in bad, name
        device = (kwargs or {}).get("device")
        assert device is None or torch.device(device).type == self.device.type, name
        return op(*args, **(kwargs or {}))


def nothing_waits(on: On) -> None:
    """A call can be captured into a CUDA graph. For Triton's launches: the CUDA kernels' are out of a mode's sight."""
    from attnext.kernels.launch import OPERATORS

    op, x = OPERATORS.__getitem__, [t.detach() for t in inputs(on)]
    lengths, mask, seed = lengths_of(on), on.rand(2, 9, 21) < 0.7, on.tensor(5)
    with NoWaiting(on.device):
        with raises(AssertionError, "_local_scalar_dense"):
            lengths[0].item()
        prepared = op("additive_prepare")(x[1], lengths, None)
        rest = (lengths, mask, seed, 1.0, 0.2)
        found = op("additive_attention")(*x, *prepared, *rest, True)
        op("additive_attention_backward")(*grads_like(found), *x, *prepared, *rest, *found)
        scores = op("additive_scores")(x[0], x[1], x[3], *rest[:2], 1.0)
        op("additive_scores_backward")(scores, x[0], x[1], x[3], *rest[:2], 1.0)
        for y in (x[:3], [*x[:2], None]):
            found = op("dot_attention")(*y, *rest, True)
            op("dot_attention_backward")(*grads_like(found), *y, *rest, *found)
        tensors, options = step_inputs(on)
        saved = [y.detach() for y in tensors]
        context, weights = op("additive_step")(*saved, *options, 1.0, 0.0, 2)
        op("additive_step_backward")(context, weights, *saved, *options, 1.0, 0.0, 2, weights)


def one_graph(on: On) -> None:
    x, mask = inputs(on), on.rand(2, 9, 21) < 0.7

    def loss(*x: Tensor) -> Tensor:
        total = attnext.additive_scores(x[0], x[1], x[3], lengths=lengths_of(on), backend=on.backend).exp().sum()
        for attention, count in ATTENTIONS:
            context, weights = attention(list(x[:count]), lengths=lengths_of(on), mask=mask, backend=on.backend)
            total = total + context.square().sum() + weights.square().sum()
        return total

    whole = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    close(list(torch.autograd.grad(whole(*x), x)), list(torch.autograd.grad(loss(*x), x)))


def step_inputs(on: On) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of a step that sees its past: what may have a gradient, for a beam of two; and lengths, mask, window, no seed."""
    shapes = ((2, 2, 12), (2, 21, 12), (2, 21, 7), (12,), (3, 2, 5), (12, 3))
    x = [on.randn(shape) for shape in shapes] + [on.rand(2, 2, 21) for _ in range(3)] + [on.rand(2, 2, 1)]
    window = on.tensor([[[0, 9], [2, 30]], [[-3, 3], [1, 2]]])
    return [y.requires_grad_() for y in x], [lengths_of(on), on.rand(2, 21) < 0.8, window, None]


def on_cpu(name: str, on: On, *args: Any) -> list[Tensor]:
    """What the CPU's operator makes of the same arguments.

    Raises:
        NotHere: it has none.
    """
    if not backends()["cpu"].available:
        raise NotHere(backends()["cpu"].reason)
    moved = (x.cpu() if isinstance(x, Tensor) else x for x in args)
    return [x.to(on.device) for x in operators("cpu")(name)(*moved)]


def steps(on: On) -> None:
    """Steps that see their past: the operators' contract, the same bits again, and any of the incoming gradients."""
    op = operators(on.backend)
    x, rest = step_inputs(on)
    for rule in range(3):
        inputs_ = [*x[:8], *(x[8:] if rule == 2 else (None, None))]
        torch.library.opcheck(op("additive_step"), (*inputs_, *rest, 1.0, 0.0, rule))
        saved = [None if y is None else y.detach() for y in inputs_]
        context, weights = op("additive_step")(*saved, *rest, 1.0, 0.0, rule)
        of = [torch.randn_like(context), on.randn(2, 2, 1).expand(weights.shape)]
        for grads in (of, [None, of[1]], [of[0], None]):
            args = (*grads, *saved, *rest, 1.0, 0.0, rule)
            first, second = (op("additive_step_backward")(*args, weights) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            close(first, on_cpu("additive_step_backward", on, *args, weights))
        close([context, weights], on_cpu("additive_step", on, *saved, *rest, 1.0, 0.0, rule))
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
        x[0], key, value, x[3], *(None,) * 6, on.tensor([0, 5]), None, None, None, 1.0, 0.0, 0
    )
    for grad in torch.autograd.grad(context.square().sum(-1).sqrt().sum(), (key, value)):
        assert grad.isfinite().all()
        assert (grad[1] != 0).any()


def by_rule(rule: str, scale: float, x: list[Tensor], on: On) -> tuple[Tensor, Tensor]:
    query, key, value, v, *of_forward = x
    previous, transition = of_forward or (None, None)
    lengths, window = ruled(on)
    memory = Memory(key, value, lengths, None, v, None)
    options: dict[str, Any] = {"window": window, "scale": scale, "backend": on.backend}
    return attend_step(query, memory, None, None, (), rule=rule, previous=previous, transition=transition, **options)


def by_alignments(rule: str, scale: float, x: list[Tensor], on: On) -> tuple[Tensor, Tensor]:
    query, key, value, v, *of_forward = x
    slots, (lengths, window) = torch.arange(40, device=on.device), ruled(on)
    hidden = slots >= lengths.view(-1, 1, 1)
    outside = hidden | (slots < window[..., :1]) | (slots >= window[..., 1:])
    scores = additive_scores(query, key, v, scale=scale).masked_fill(outside, -torch.inf)
    if of_forward:
        weights = forward_weights(scores, of_forward[0].masked_fill(hidden, 0.0), of_forward[1])
    else:
        weights = normalize(scores, rule)
    return weights @ value, weights


def rules(on: On) -> None:
    """Weights of steps that see their past, to the corners: where forward attention reaches no key, or not all, and
    another has by far the largest score; where every sigmoid is 0."""
    query, key, value = on.randn(3, 2, 5), on.rand(3, 40, 5) + 2, on.randn(3, 40, 3)
    slots = torch.arange(40, device=on.device)
    previous = on.rand(3, 2, 40) * (slots % 5 == 0)
    previous[0, 0], previous[1, 0] = 0.0, slots == 32  # nowhere; at the last key
    previous[2, 0] = 1e-34  # too little to divide by
    of_forward, far = [previous, on.rand(3, 2, 1)], -2 * key
    far[:, 3] = 4.0  # which is not reached
    for rule, keys, scale, more in (
        ("forward", key, 1.0, of_forward),
        ("forward", key, 30.0, of_forward),
        ("forward", far, 30.0, of_forward),
        ("sigmoid", key, -200.0, []),
    ):
        x = [t.clone().requires_grad_() for t in (query, keys, value, on.ones(5), *more)]
        found = []
        for results in (by_rule(rule, scale, x, on), by_alignments(rule, scale, x, on)):
            loss = torch.stack([(y * (k + 1)).cos().sum() for k, y in enumerate(results)]).sum()
            found.append([*results, *torch.autograd.grad(loss, x)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    key[2, 3] = torch.nan  # of a key that is attended: it shows
    context, _ = by_rule("softmax", 1.0, [query, key, value, on.ones(5)], on)
    assert context[2].isnan().all()
    assert context[:2].isfinite().all()


CHECKS: tuple[Check, ...] = (
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
OF_FAMILY: dict[str, Check] = {"triton": nothing_waits, "cuda": direct_calls}


def checks_of(backend: str) -> Sequence[Check]:
    """Those of a backend."""
    return *CHECKS, OF_FAMILY[backend]


if __name__ == "__main__":
    sys.exit(main("Hold a backend to the contract of all.", checks_of, deterministic=True))
