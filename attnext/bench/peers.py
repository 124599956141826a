"""Who is timed: one small builder for each peer, and the check that it computes what it should."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnext import additive_attention, additive_scores, backends, dot_attention, functional, prepare, reference
from attnext.backends import choose, kernel_devices, use_backend
from attnext.bench.cases import Case
from attnext.cases import Inputs

__all__ = ["OTHERS", "Peer", "Unavailable", "Wrong", "checked", "cores", "exact", "off", "ours"]

Run = Callable[[], Any]
Function = Callable[..., Tensor]

# Rounding errors of n terms add up to about sqrt(n) units; eight times that is far below any error of method.
_MARGIN = 8


class Unavailable(Exception):
    """A peer can't serve here; the message says why in a line."""


class Wrong(RuntimeError):
    """A peer's result is not that of its formula: there is nothing to time."""


@dataclass(frozen=True)
class Peer:
    """Something that serves cases.

    Attributes:
        name: as in the table.
        build: gives the call to be timed, on inputs made ready; it may raise :class:`Unavailable`.
        formula: of query, key, value and score weight: what the results are held to, in float64; dot products have
            one of their own, of query and key.
        half: it serves float16 and bfloat16.
        inside: it gives scores before the softmax, and weights.
    """

    name: str
    build: Callable[[Case, Inputs], Run]
    formula: Function
    half: bool = True
    inside: bool = True

    def serves(self, case: Case) -> bool:
        return (self.half or case.dtype == torch.float32) and (self.inside or not (case.only_scores or case.weights))

    def formula_of(self, case: Case) -> Function:
        return _eager_dot if case.score == "dot" else self.formula


def _additive(*x: Tensor) -> Tensor:
    if len(x) == 3:
        return reference.additive_scores(x[0], x[1], x[2])
    return reference.additive_attention(x[0], x[1], x[2], x[3])[0]


def _dot_product(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
    scores: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value


def _eager_dot_and_weights(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    scores: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    weights = scores.softmax(-1)
    return weights @ key, weights


def _eager_dot(query: Tensor, key: Tensor) -> Tensor:
    return _eager_dot_and_weights(query, key)[0]


def _eager_function(case: Case) -> Callable[..., Any]:
    if case.score == "dot":
        return _eager_dot_and_weights if case.weights else _eager_dot
    return _eager_scores if case.only_scores else _eager_attention


def _eager_scores(query: Tensor, key: Tensor, score_weight: Tensor) -> Tensor:
    return torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    return _eager_scores(query, key, score_weight).softmax(-1) @ value


def _call(case: Case, function: Callable[..., Any], x: Sequence[Tensor], incoming: Tensor) -> Run:
    """What is timed of a function of tensors."""
    if case.kind == "forward + backward":
        return lambda: torch.autograd.grad(function(*x), x, incoming)
    if case.kind == "backward of the scores":
        result = function(*x)
        return lambda: torch.autograd.grad(result, x, incoming, retain_graph=True)
    return lambda: function(*x)


def _attnext(backend: str, case: Case, inputs: Inputs) -> Run:
    x, incoming = case.arguments(inputs), case.incoming(inputs)
    if case.score == "dot":
        # Without its name where it would serve anyway: then the fastest way does, which may be a library's.
        named = None if backend == choose(None, inputs.query.device.type) else backend
        options: dict[str, Any] = {"scale": case.features**-0.5, "need_weights": case.weights, "backend": named}
        return _call(case, lambda *x: dot_attention(*x, **options)[0], x, incoming)
    if case.only_scores:
        return _call(case, partial(additive_scores, backend=backend), x, incoming)
    if case.kind != "step":
        return _call(case, lambda *x: additive_attention(*x, backend=backend)[0], x, incoming)
    query, key, value, score_weight = x
    query = query.squeeze(1)
    with use_backend(backend):
        memory = prepare(key, value, score_weight, dtype=case.held)
    return lambda: functional.attend(query, memory, 1.0, 0.0, False, backend)[0]


def _eager(case: Case, inputs: Inputs) -> Run:
    return _call(case, _eager_function(case), case.arguments(inputs), case.incoming(inputs))


def _compiled(case: Case, inputs: Inputs) -> Run:
    from torch._functorch import config

    torch._dynamo.reset()
    function = _eager_function(case)
    try:
        # The backward of scores runs again on the same buffers, which compiled code would otherwise write over.
        with config.patch(donated_buffer=not case.only_scores):
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            run = _call(case, compiled, case.arguments(inputs), case.incoming(inputs))
            run()
    except Exception as error:  # no compiler, a bug in one: more kinds of errors than can be named
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Unavailable(f"torch.compile failed: {reason}") from error
    return run


def _jax(case: Case, inputs: Inputs) -> Run:
    if inputs.query.device.type != "cpu":
        raise Unavailable("its work is not on torch's stream, whose events take the time")
    if torch.get_num_threads() < cores():
        raise Unavailable("it would take all cores, and its threads can't be set from here")
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Unavailable("jax is not installed: pip install 'attnext[bench]'") from error
    if jax.default_backend() != "cpu":
        raise Unavailable(f"jax runs on {jax.default_backend()} here; JAX_PLATFORMS=cpu keeps it on the CPU")

    def scores(query: Any, key: Any, score_weight: Any) -> Any:
        return jnp.tanh(query[:, :, None] + key[:, None]) @ score_weight

    def attention(query: Any, key: Any, value: Any, score_weight: Any) -> Any:
        return jax.nn.softmax(scores(query, key, score_weight), axis=-1) @ value

    def dot(query: Any, key: Any) -> Any:
        weights = jax.nn.softmax(query @ key.mT / query.shape[-1] ** 0.5, axis=-1)
        return (weights @ key, weights) if case.weights else weights @ key

    function: Any = dot if case.score == "dot" else scores if case.only_scores else attention
    x = [jnp.asarray(tensor.detach().numpy()) for tensor in case.arguments(inputs)]
    incoming = jnp.asarray(case.incoming(inputs).numpy())
    if case.kind == "forward + backward":
        gradients = jax.jit(lambda incoming, *x: jax.vjp(function, *x)[1](incoming))
        return lambda: jax.block_until_ready(gradients(incoming, *x))
    if case.kind == "backward of the scores":
        pullback = jax.jit(lambda *x: jax.vjp(function, *x)[1])(*x)
        pull = jax.jit(lambda pullback, incoming: pullback(incoming))
        return lambda: jax.block_until_ready(pull(pullback, incoming))
    forward = jax.jit(function)
    return lambda: jax.block_until_ready(forward(*x))


def _sdpa(case: Case, inputs: Inputs) -> Run:
    # One head: its fused kernels want four dimensions.
    count = 2 if case.score == "dot" else 3
    heads = (tensor.detach().unsqueeze(1) for tensor in case.arguments(inputs)[:count])
    x = [tensor.requires_grad_(case.differentiated) for tensor in heads]
    # Keys that are the values come twice.
    return _call(
        case, lambda *x: scaled_dot_product_attention(x[0], x[1], x[-1]), x, case.incoming(inputs).unsqueeze(1)
    )


OTHERS = {
    "eager": Peer("eager", _eager, _additive),
    "compile": Peer("compile", _compiled, _additive, half=False),
    "jax": Peer("jax", _jax, _additive, half=False),
    "sdpa": Peer("sdpa", _sdpa, _dot_product, inside=False),
}


def ours(device: str) -> list[Peer]:
    """This project's backends that serve a device: the one that is chosen first, then other kernels."""
    status = backends()
    kernels = [name for name, served in kernel_devices().items() if served == device and status[name].available]
    names = dict.fromkeys([choose(None, device), *kernels])
    return [Peer(f"attnext {name}", partial(_attnext, name), _additive) for name in names]


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exact(case: Case, inputs: Inputs, formula: Function) -> list[Tensor]:
    """The results of a case in float64: context or scores, or the gradients of its inputs.

    Taken from one batch row and 16 queries at a time, whose intermediate tensors stay in the caches.
    """

    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(case.differentiated)

    arguments, incoming = case.arguments(inputs), case.incoming(inputs).double()
    by_row = [x for x in arguments if x.dim() == 3]
    weights = [leaf(x) for x in arguments if x.dim() == 1]
    results, gradients = [], []
    for row in range(case.batch):
        query, *rest = (leaf(x[row : row + 1]) for x in by_row)
        for start in range(0, case.queries, 16):
            part = slice(start, start + 16)
            result = formula(query[:, part], *rest, *weights)
            if case.differentiated:
                result.backward(incoming[row : row + 1, part])
            else:
                results.append(result)
        gradients.append([x.grad for x in (query, *rest) if x.grad is not None])
    if not case.differentiated:
        return [torch.cat(results, 1).view(case.batch, case.queries, -1)]
    return [torch.cat(x) for x in zip(*gradients, strict=True)] + [x.grad for x in weights if x.grad is not None]


def checked(case: Case, peer: Peer, inputs: Inputs, expected: Sequence[Tensor] | None = None) -> Run:
    """The call to time of a peer, warmed up and compared with the exact results, which are computed for None.

    Raises:
        Unavailable: the peer can't serve here.
        Wrong: its results are off, in the largest element by more than the arithmetic explains.
    """
    expected = exact(case, inputs, peer.formula_of(case)) if expected is None else expected
    run = peer.build(case, inputs)
    found = run()
    results = [_tensor(x) for x in (found if isinstance(found, (tuple, list)) else (found,))]
    results = results[:1] if case.weights else results  # what made the context was right
    longest = max(case.features, case.values, case.keys)
    if case.differentiated:  # the score weight's gradient is a sum over all pairs
        longest = max(longest, case.batch * case.queries * case.keys)
    single, own = (torch.finfo(dtype).eps / 2 for dtype in (torch.float32, case.held or case.dtype))
    allowed = _MARGIN * max(longest**0.5 * single, own)
    for result, right in zip(results, expected, strict=True):
        error = float((result.to(right).reshape(right.shape) - right).abs().max() / right.abs().max())
        if not error <= allowed:  # NaN is not
            raise Wrong(f"{peer.name} is wrong on the case {case.name}: off by {error:.2g}, {allowed:.2g} is rounding")
    return run


def off(found: Tensor, right: Tensor) -> float:
    """The largest difference, as a part of the largest element; where all are tiny, of a thousandth."""
    found, right = found.detach().reshape(right.shape), right.detach()
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-3))


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    import numpy

    return torch.from_numpy(numpy.array(x))
