"""The operators' contracts with PyTorch: schema, fake (shapes without data), autograd and autocast.

Every kernel family has the same operators under its own suffix, ``attnext::additive_attention_cpu`` and so on; the
family's own code only registers the kernels. Kernels take query (B, Tq, D) or (B, D), key (B, Tk, D), value (B, Tk, H)
and score_weight (D,), or (heads, D) where row b has vector b % heads, in one dtype, on one device, with checked
arguments (:mod:`attnext.functional`). Keys, values and what is prepared of them may be of a half type beside float32,
in the families that take it (``backends.takes_held``). For a query of (B, D), context, weights and scores are without
Tq too; log_sum_exp is always (B, Tq). Of dot products, no value means that the keys are the values: the gradient of
both is the keys', and the value's has no elements.

``additive_step`` is one query, or the hypotheses of a beam, each with a past of its own: ``past``, ``second_past`` and
``previous`` are (B, Tk) for a query of (B, D), else (B, Tq, Tk), ``transition`` likewise with 1 in the last place and
``window`` with 2: the first key and the one after the last, int64. These but for the window, and the weights that come
back, are in the dtype of the arithmetic (:func:`accumulator`). ``filters`` are (F, C, width), C the number of pasts,
``projection`` (D, F), or None where F is D; the score weight is (D,) and the mask (B, Tk). ``rule`` is the place in
:data:`RULES`. The gradient of a tensor that isn't there has no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from attnext import definitions

__all__ = [
    "FEATURE_BLOCK",
    "KEY_BLOCK",
    "RULES",
    "OfSteps",
    "Operators",
    "accumulator",
    "define",
    "differentiable",
    "implement",
    "of_steps",
    "operators",
]

FEATURE_BLOCK = 32
"""Features of a memory prepared by the CPU kernels are padded to a multiple of this many (``kFeatureBlock`` in C++)."""
KEY_BLOCK = 128
"""Keys of a memory prepared for a GPU are padded to a multiple of this many (``kernels/tiles.py``, ``kKeyBlock``)."""
PAIR_CHUNK = 8
"""Pairs of features of a memory prepared by the CUDA kernels, likewise (``kPairChunk``)."""

RULES = ("softmax", "sigmoid", "forward")
"""What makes weights of the scores of a step: see :func:`attnext.normalize` and :func:`attnext.forward_weights`."""

_library = torch.library.Library("attnext", "DEF")

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor score_weight, "
_SCORE_INPUTS = "Tensor query, Tensor key, Tensor score_weight, "
_DOT_INPUTS = "Tensor query, Tensor key, Tensor? value, "
_SLOTS = "Tensor? lengths, Tensor? mask, "
_DOT_OPTIONS = _SLOTS + "Tensor? seed, float scale, float dropout_p"
_OPTIONS = "Tensor? exp_key, Tensor? key_limit, " + _DOT_OPTIONS
_INCOMING = "Tensor? grad_context, Tensor? grad_weights, "
_STEP_INPUTS = (
    _INPUTS + "Tensor? filters, Tensor? projection, Tensor? past, Tensor? second_past, Tensor? previous, "
    "Tensor? transition, "
)
_STEP_OPTIONS = _SLOTS + "Tensor? window, Tensor? seed, float scale, float dropout_p, int rule"
_RESULTS = "Tensor context, Tensor weights, Tensor log_sum_exp"
_OF_QUERY = "Tensor grad_query, Tensor grad_scores, Tensor kept"
_SCHEMAS = {
    "additive_prepare": "(Tensor key, Tensor? lengths, Tensor? mask) -> (Tensor exp_key, Tensor key_limit)",
    "additive_attention": f"({_INPUTS}{_OPTIONS}, bool need_weights) -> ({_RESULTS})",
    "additive_attention_backward": f"({_INCOMING}{_INPUTS}{_OPTIONS}, {_RESULTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "additive_scores": f"({_SCORE_INPUTS}{_SLOTS}float scale) -> Tensor",
    "additive_scores_backward": f"(Tensor grad, {_SCORE_INPUTS}{_SLOTS}float scale) -> (Tensor, Tensor, Tensor)",
    "dot_attention": f"({_DOT_INPUTS}{_DOT_OPTIONS}, bool need_weights) -> ({_RESULTS})",
    "dot_attention_backward": f"({_INCOMING}{_DOT_INPUTS}{_DOT_OPTIONS}, {_RESULTS}) -> (Tensor, Tensor, Tensor)",
    "additive_step": f"({_STEP_INPUTS}{_STEP_OPTIONS}) -> (Tensor context, Tensor weights)",
    "additive_step_backward": f"({_INCOMING}{_STEP_INPUTS}{_STEP_OPTIONS}, Tensor weights) -> "
    f"({', '.join(['Tensor'] * 10)})",
}
_OF_STEPS_SCHEMAS = {
    "additive_attention_wide": f"({_INPUTS}{_OPTIONS}, bool need_weights) -> ({_RESULTS}, Tensor wide)",
    "additive_attention_backward_query": f"({_INCOMING}{_INPUTS}{_OPTIONS}, Tensor wide) -> ({_OF_QUERY})",
    "dot_attention_wide": f"({_DOT_INPUTS}{_DOT_OPTIONS}, bool need_weights) -> ({_RESULTS}, Tensor wide)",
    "dot_attention_backward_query": f"({_INCOMING}{_DOT_INPUTS}{_DOT_OPTIONS}, Tensor wide) -> ({_OF_QUERY})",
    "additive_step_backward_into": f"({_INCOMING}{_STEP_INPUTS}{_STEP_OPTIONS}, Tensor weights, Tensor(a!) sum_key) -> "
    f"({', '.join(['Tensor'] * 9)})",
}
"""For the steps of one memory (:mod:`attnext.steps`), of the CPU alone. ``wide`` are the weights in the dtype of the
arithmetic, before dropout. Backward passes that give the gradient of the query and of its scores, and the weights that
values have in the context; of ``additive_step`` all but the key's, which is added to a sum (B, Tk, D), and the
value's, for which the last result are those weights (without elements where there is no dropout)."""
_DIFFERENTIABLE = {"additive_attention": 4, "additive_scores": 3, "dot_attention": 3, "additive_step": 10}
"""How many leading tensors of an operator have a gradient; they take the dtype of autocast."""
_PAST = 6
"""The first of the leading tensors of ``additive_step`` that are in the dtype of the arithmetic, as its weights are."""


@dataclass(frozen=True)
class Operators:
    """The operators of one kernel family, as ``torch.ops`` callables."""

    prepare: Callable[..., tuple[Tensor, Tensor]]
    attention: Callable[..., tuple[Tensor, Tensor, Tensor]]
    scores: Callable[..., Tensor]
    dot_attention: Callable[..., tuple[Tensor, Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]


class OfSteps(NamedTuple):
    """An operator for the steps of one memory.

    Attributes:
        forward: its last result are weights in the dtype of the arithmetic, before dropout.
        whole: the backward pass that returns all gradients.
        part: the one that leaves those of keys and values to the end of all steps.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    whole: Callable[..., tuple[Tensor, ...]]
    part: Callable[..., tuple[Tensor, ...]]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What inputs of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_prepare_cpu(key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(key.dtype)
    batch, keys, size = key.shape
    padded = (size + FEATURE_BLOCK - 1) // FEATURE_BLOCK * FEATURE_BLOCK
    return key.new_empty(batch, keys, padded, dtype=dtype), key.new_empty(batch, keys, dtype=dtype)


def _fake_prepare_triton(key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(key.dtype)
    batch, keys, size = key.shape
    padded = (max(keys, 1) + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK
    features = 2 * max(1, (size + 1) // 2)
    return key.new_empty(batch, features, padded, dtype=dtype), key.new_empty(batch, padded, dtype=dtype)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    value = key if value is None else value
    need_weights: bool = options[-1]
    weights = query.new_empty((*query.shape[:-1], key.shape[1]) if need_weights else (0,))
    queries = query.shape[1] if query.dim() == 3 else 1
    log_sum_exp = query.new_empty(query.shape[0], queries, dtype=accumulator(query.dtype))
    return query.new_empty(*query.shape[:-1], value.shape[2]), weights, log_sum_exp


def _fake_attention_backward(_: Tensor | None, __: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


def _fake_dot_attention_backward(_: Tensor | None, __: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs[0].new_empty((0,) if x is None else x.shape) for x in inputs[:3])


def _fake_wide(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, ...]:
    wide = query.new_empty(*query.shape[:-1], key.shape[1], dtype=accumulator(query.dtype))
    return *_fake_attention(query, key, *others), wide


def _fake_backward_query(_: Tensor | None, __: Tensor | None, query: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weights = others[-1]
    return query.new_empty(query.shape), weights.new_empty(weights.shape), weights.new_empty(weights.shape)


def _fake_step_into(_: Tensor | None, __: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    query, _key, _value, *others = _fake_step_backward(_, __, *inputs)
    weights, dropout_p = inputs[-2], inputs[15]
    return query, *others, weights.new_empty(weights.shape if dropout_p > 0.0 else 0)


def _fake_scores(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], key.shape[1])


def _fake_step(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    leading = query.shape[:-1]
    weights = query.new_empty(*leading, key.shape[1], dtype=accumulator(query.dtype))
    return query.new_empty(*leading, value.shape[2]), weights


def _fake_step_backward(_: Tensor | None, __: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    query = inputs[0]
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:10])


def _fake_scores_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _fake_prepare_cuda(key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(key.dtype)
    batch, keys, size = key.shape
    padded = (max(keys, 1) + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK
    pairs = ((max(size, 1) + 1) // 2 + PAIR_CHUNK - 1) // PAIR_CHUNK * PAIR_CHUNK
    return key.new_empty(batch, pairs, padded, 2, dtype=dtype), key.new_empty(batch, padded, dtype=dtype)


_FAKES_OF_PREPARE: dict[str, Callable[..., Any]] = {
    "cpu": _fake_prepare_cpu,
    "triton": _fake_prepare_triton,
    "cuda": _fake_prepare_cuda,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "additive_attention": _fake_attention,
    "additive_attention_backward": _fake_attention_backward,
    "additive_scores": _fake_scores,
    "additive_scores_backward": _fake_scores_backward,
    "additive_step": _fake_step,
    "additive_step_backward": _fake_step_backward,
    "dot_attention": _fake_attention,
    "dot_attention_backward": _fake_dot_attention_backward,
}


class _Gradient:
    """What an operator saves for its backward pass, and that pass."""

    def __init__(self, name: str, family: str) -> None:
        self._backward = getattr(torch.ops.attnext, f"{name}_backward_{family}").default
        self._name = name
        self._inputs = _DIFFERENTIABLE[name]
        self._options = 1 if name == "additive_scores" else 3
        self._kind = name.partition("_")[2]

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, options = inputs[: -self._options], inputs[-self._options :]
        results: tuple[Tensor, ...] = ()
        if self._kind == "attention":
            options, ctx.need_weights, results = options[:-1], options[-1], output
            ctx.mark_non_differentiable(output[2])
        elif self._kind == "step":
            results = output[1:]
        ctx.options, ctx.count, ctx.by_definition = options, len(tensors), definitions.wanted()
        ctx.save_for_backward(*tensors, *results)
        ctx.set_materialize_grads(False)

    def of_inputs(self, ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the leading tensors."""
        if self._kind == "attention":
            incoming = (incoming[0], incoming[1] if ctx.need_weights else None)
        if all(grad is None for grad in incoming):
            return (None,) * self._inputs
        saved = ctx.saved_tensors
        tensors, results = saved[: ctx.count], saved[ctx.count :]
        if ctx.by_definition and torch.is_grad_enabled():
            inputs, others = tensors[: self._inputs], (*tensors[self._inputs :], *ctx.options)
            return tuple(definitions.gradients(self._name, incoming, inputs, others))
        grads = self._backward(*incoming, *tensors, *ctx.options, *results)
        return tuple(None if x is None else grad for x, grad in zip(tensors[: self._inputs], grads, strict=True))

    def of_arguments(self, ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same for all arguments."""
        return *self.of_inputs(ctx, *incoming), *(None,) * (ctx.count - self._inputs + self._options)


_gradients: dict[Any, _Gradient] = {}


def _autograd(name: str, family: str) -> None:
    gradient = _Gradient(name, family)
    _gradients[getattr(torch.ops.attnext, f"{name}_{family}").default] = gradient
    torch.library.register_autograd(
        f"attnext::{name}_{family}", gradient.of_arguments, setup_context=gradient.save, lib=_library
    )


class _Differentiable(torch.autograd.Function):
    """An operator; its arguments without a gradient come in one piece, as each takes its time."""

    @staticmethod
    def forward(ctx: Any, op: Any, rest: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs, *rest)
        ctx.gradient = _gradients[op]
        ctx.gradient.save(ctx, (*inputs, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradient.of_inputs(ctx, *incoming)


def differentiable(op: Any, inputs: Sequence[Tensor | None], rest: tuple[Any, ...]) -> Any:
    """Calls an operator with its leading tensors and its other arguments, outside compilation, transforms and autocast.

    The way that ``torch.library`` has for gradients takes a tenth of a millisecond more, forward and again backward; it
    serves what is wrapped around an operator.
    """
    if op not in _gradients:
        return op(*inputs, *rest)
    return _Differentiable.apply(op, rest, *inputs)  # type: ignore[no-untyped-call]


def _refuse_second_derivative(name: str) -> None:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            "attnext's kernels have no second derivative: call the op with backend='reference', which follows "
            "autograd to any order"
        )

    torch.library.register_autograd(f"attnext::{name}", backward, lib=_library)


def _cast_under_autocast(name: str, family: str, device_type: str) -> None:
    """Under autocast the leading tensors take its dtype, as those of a matrix product would."""
    op = getattr(torch.ops.attnext, f"{name}_{family}").default
    tensors = _DIFFERENTIABLE[name]

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        wanted = [dtype] * min(tensors, _PAST) + [accumulator(dtype)] * (tensors - _PAST)
        cast = (
            x if x is None or x.dtype == torch.float64 else x.to(to)
            for x, to in zip(args[:tensors], wanted, strict=True)
        )
        with torch.autocast(device_type, enabled=False):
            return op(*cast, *args[tensors:])

    _library.impl(f"{name}_{family}", kernel, f"Autocast{device_type.upper()}")


def _define(family: str, device_type: str) -> Operators:
    fakes = _FAKES | {"additive_prepare": _FAKES_OF_PREPARE[family]}
    for name, schema in _SCHEMAS.items():
        _library.define(f"{name}_{family}{schema}")
        torch.library.register_fake(f"attnext::{name}_{family}", fakes[name], lib=_library)
    for name in _DIFFERENTIABLE:
        _autograd(name, family)
        _refuse_second_derivative(f"{name}_backward_{family}")
        _cast_under_autocast(name, family, device_type)
    ops = torch.ops.attnext
    return Operators(
        prepare=getattr(ops, f"additive_prepare_{family}").default,
        attention=getattr(ops, f"additive_attention_{family}").default,
        scores=getattr(ops, f"additive_scores_{family}").default,
        dot_attention=getattr(ops, f"dot_attention_{family}").default,
        step=getattr(ops, f"additive_step_{family}").default,
    )


def implement(family: str, dispatch_key: str, kernel: Callable[[str], Callable[..., Any]]) -> None:
    """Registers the kernels of a family that is written in Python: ``kernel`` gives that of an operator's name."""
    for name in _SCHEMAS:
        _library.impl(f"{name}_{family}", kernel(name), dispatch_key)


def define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of one family alone, without derivatives: its name with the family's, its schema, its shapes."""
    _library.define(name + schema)
    torch.library.register_fake(f"attnext::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.attnext, name).default
    return op


def _define_of_steps(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    return define(f"{name}_cpu", _OF_STEPS_SCHEMAS[name], fake)


def _attention_of_steps(name: str) -> OfSteps:
    return OfSteps(
        forward=_define_of_steps(f"{name}_wide", _fake_wide),
        whole=getattr(torch.ops.attnext, f"{name}_backward_cpu").default,
        part=_define_of_steps(f"{name}_backward_query", _fake_backward_query),
    )


operators: dict[str, Operators] = {
    "cpu": _define("cpu", "cpu"),
    "triton": _define("triton", "cuda"),
    "cuda": _define("cuda", "cuda"),
}
"""The operators of each kernel family, by backend name."""

of_steps: dict[Any, OfSteps] = {
    operators["cpu"].attention: _attention_of_steps("additive_attention"),
    operators["cpu"].dot_attention: _attention_of_steps("dot_attention"),
    operators["cpu"].step: OfSteps(
        forward=operators["cpu"].step,
        whole=torch.ops.attnext.additive_step_backward_cpu.default,
        part=_define_of_steps("additive_step_backward_into", _fake_step_into),
    ),
}
"""The operators that can leave the gradients of keys and values to the end of all steps."""
