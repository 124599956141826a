"""The ops as functions: each checks its arguments and makes one op call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from attnext import _checks, reference
from attnext.backends import choose, chosen_freely
from attnext.memory import Memory
from attnext.ops import RULES, accumulator, differentiable, operators
from attnext.steps import Steps

__all__ = ["additive_attention", "additive_scores", "dot_attention"]


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Additive attention: ``softmax_j(scale * v . tanh(query_i + key_j))`` and its weighted sum of the values.

    Score, softmax and context in one pass, forward and backward, without the (B, Tq, Tk, D) tensor. From Bahdanau, Cho
    and Bengio, "Neural machine translation by jointly learning to align and translate", 2015.

    Args:
        query: (B, Tq, D) or (B, D) projected queries, W h'. float32, float64, float16 or bfloat16, any strides; all
            four tensors have one dtype and device (under autocast, its dtype). Half types are computed in float32.
        key: (B, Tk, D) projected keys, U h.
        value: (B, Tk, H) encoder states, h.
        score_weight: (D,) the weight vector of the score, v; or (heads, D), where the batch is one of sentences times
            heads: row b has the vector b % heads.
        lengths: (B,) integers: how many leading keys of each row are real.
        mask: bool (B, Tk) or (B, Tq, Tk), True where a key may be attended. What stands in other slots, NaN included,
            reaches neither a result nor a gradient.
        scale: multiplies the scores (inverse temperature, "sharpening").
        dropout_p: probability that a weight is dropped, the rest scaled by 1 / (1 - dropout_p); drawn from torch's
            generator, and the same on every backend.
        need_weights: also return the weights.
        backend: None chooses by device; "reference", "cpu", "triton" or "cuda" is exactly that one, or an error.

    Returns:
        The context, (B, Tq, H) or (B, H), and the weights, (B, Tq, Tk) or (B, Tk), or None. The weights are those that
        made the context, after dropout, and differentiable. A row without a key to attend has context and weights 0.
        The backward pass reads both: don't change them in place.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available. Also when a second derivative is taken of a backend other
            than "reference".
    """
    query, key, score_weight = _checks.additive(query, key, score_weight)
    value = _checks.tensor("value", value, 3)
    _checks.size("value", value, 0, key.shape[0], "key")
    _checks.size("value", value, 1, key.shape[1], "key")
    _checks.same_kind(query, key=key, value=value, score_weight=score_weight)
    memory = Memory(
        key,
        value,
        _checks.lengths(lengths, key),
        _checks.mask(mask, key, _queries(query)),
        score_weight,
        None,
    )
    return attend(
        query,
        memory,
        _checks.scale(scale),
        _checks.probability("dropout_p", dropout_p),
        _checks.flag("need_weights", need_weights),
        backend,
    )


def attend(
    query: Tensor,
    memory: Memory,
    scale: float,
    dropout_p: float,
    need_weights: bool,
    backend: str | None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Additive attention of checked arguments; the memory may be prepared, and dropout draws its own seed for None."""
    assert memory.score_weight is not None
    family = choose(backend, query.device.type, query.dtype)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (), device=query.device)
    if family == "reference":
        return reference.additive_attention(
            *autocast(query, memory.key, memory.value, memory.score_weight),
            lengths=memory.lengths,
            mask=memory.mask,
            scale=scale,
            dropout_p=dropout_p,
            need_weights=need_weights,
            seed=seed,
        )
    prepared = memory.prepared if memory.prepared is not None and memory.prepared.backend == family else None
    context, weights, _ = _call(
        operators[family].attention,
        query,
        memory.key,
        (memory.value, memory.score_weight),
        prepared.exp_key if prepared else None,
        prepared.key_limit if prepared else None,
        memory.lengths,
        memory.mask,
        seed,
        scale,
        dropout_p,
        need_weights,
        steps=memory.steps,
    )
    return context, weights if need_weights else None


def attend_step(
    query: Tensor,
    memory: Memory,
    filters: Tensor | None,
    projection: Tensor | None,
    past: Sequence[Tensor],
    *,
    rule: str,
    previous: Tensor | None = None,
    transition: Tensor | None = None,
    window: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A step that sees its past, of checked arguments; the weights are in the dtype of the arithmetic."""
    assert memory.score_weight is not None
    family = choose(backend, query.device.type, query.dtype)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (), device=query.device)
    linear = (memory.score_weight, filters, projection)
    if family == "reference":
        query, key, value, *others = autocast_some(query, memory.key, memory.value, *linear)
        wide = accumulator(query.dtype)
        context, weights = reference.additive_step(
            *(None if x is None else x.to(wide) for x in (query, key, value, *others)),
            past,
            rule=rule,
            previous=previous,
            transition=transition,
            lengths=memory.lengths,
            mask=memory.mask,
            window=window,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        return context.to(query.dtype), weights
    first, second = (*past, None, None)[:2]
    context, weights = _call(
        operators[family].step,
        query,
        memory.key,
        (memory.value, *linear, first, second, previous, transition),
        memory.lengths,
        memory.mask,
        window,
        seed,
        scale,
        dropout_p,
        RULES.index(rule),
        steps=memory.steps,
    )
    return context, weights


def additive_scores(
    query: Tensor,
    key: Tensor,
    score_weight: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The scores of additive attention before the softmax: logits over the keys.

    For pointer networks (Vinyals, Fortunato and Jaitly, 2015). Arguments as in :func:`additive_attention`. The kernels'
    error is absolute, about 1e-7 of ``scale * sum |v|`` in float32, also where the score is tiny.

    Returns:
        (B, Tq, Tk), or (B, Tk) for a query of shape (B, D); minus infinity in masked slots, whose incoming gradient is
        not read.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available.
    """
    query, key, score_weight = _checks.additive(query, key, score_weight)
    _checks.same_kind(query, key=key, score_weight=score_weight)
    lengths = _checks.lengths(lengths, key)
    mask = _checks.mask(mask, key, _queries(query))
    scale = _checks.scale(scale)
    family = choose(backend, query.device.type, query.dtype)
    if family == "reference":
        query, key, score_weight = autocast(query, key, score_weight)
        return reference.additive_scores(query, key, score_weight, lengths=lengths, mask=mask, scale=scale)
    scores: Tensor = _call(operators[family].scores, query, key, (score_weight,), lengths, mask, scale)
    return scores


def dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dot-product attention: ``softmax_j(scale * query_i . key_j)`` and its weighted sum of the values.

    From Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation", 2015. Beside
    what ``torch.nn.functional.scaled_dot_product_attention`` does, it returns weights, takes lengths, and reads keys
    that are the values once, which is half the memory of a decoder step.

    Args:
        query: (B, Tq, D) or (B, D). float32, float64, float16 or bfloat16, any strides; all tensors have one dtype and
            device (under autocast, its dtype). Half types are computed in float32.
        key: (B, Tk, D).
        value: (B, Tk, H), or None where the keys are the values.
        lengths: (B,) integers: how many leading keys of each row are real.
        mask: bool (B, Tk) or (B, Tq, Tk), True where a key may be attended. What stands in other slots, NaN included,
            reaches neither a result nor a gradient.
        scale: multiplies the scores; 1 / sqrt(D) is that of the Transformer.
        dropout_p: probability that a weight is dropped, the rest scaled by 1 / (1 - dropout_p); drawn from torch's
            generator, and the same on every backend.
        need_weights: also return the weights.
        backend: None chooses by device, and PyTorch's own attention where that is faster: float32 and float64 with 128
            or more queries and keys and H = D, without lengths, mask, dropout and weights. "reference", "cpu", "triton"
            or "cuda" is exactly that one, or an error.

    Returns:
        The context, (B, Tq, H) or (B, H), and the weights, (B, Tq, Tk) or (B, Tk), or None, as
        :func:`additive_attention` does.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available. Also when a second derivative is taken of a backend other
            than "reference", or of PyTorch's own attention.

    A score that overflows to minus infinity counts as masked.
    """
    query, key = _checks.dot(query, key)
    others = {"key": key}
    if value is not None:
        value = others["value"] = _checks.tensor("value", value, 3)
        _checks.size("value", value, 0, key.shape[0], "key")
        _checks.size("value", value, 1, key.shape[1], "key")
    _checks.same_kind(query, **others)
    lengths, mask = _checks.lengths(lengths, key), _checks.mask(mask, key, _queries(query))
    return attend_by_dot(
        query,
        Memory(key, key if value is None else value, lengths, mask, None, None),
        _checks.scale(scale),
        _checks.probability("dropout_p", dropout_p),
        _checks.flag("need_weights", need_weights),
        backend,
    )


def attend_by_dot(
    query: Tensor,
    memory: Memory,
    scale: float,
    dropout_p: float,
    need_weights: bool,
    backend: str | None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dot-product attention of checked arguments; dropout draws its own seed for None."""
    key, lengths, mask = memory.key, memory.lengths, memory.mask
    family = choose(backend, query.device.type, query.dtype)
    extras = need_weights or dropout_p > 0.0 or lengths is not None or mask is not None
    if not extras and chosen_freely(backend) and _sdpa_is_faster(query, memory):
        # With an axis of one head, which its kernels want.
        q, k, v = (x.unsqueeze(1) for x in (query, key, memory.value))
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1), None
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (), device=query.device)
    inputs = (query, key) if memory.shared else (query, key, memory.value)
    if family == "reference":
        return reference.dot_attention(
            *autocast(*inputs),
            lengths=lengths,
            mask=mask,
            scale=scale,
            dropout_p=dropout_p,
            need_weights=need_weights,
            seed=seed,
        )
    context, weights, _ = _call(
        operators[family].dot_attention,
        query,
        key,
        (None if memory.shared else memory.value,),
        lengths,
        mask,
        seed,
        scale,
        dropout_p,
        need_weights,
        steps=memory.steps,
    )
    return context, weights if need_weights else None


_MANY_QUERIES = 128


def _sdpa_is_faster(query: Tensor, memory: Memory) -> bool:
    """Whether PyTorch's own attention is the faster one for a call without lengths, mask, weights and dropout.

    That is where a call is two large matrix products (the table is in ``benchmarks/NOTES.md``) and it has a kernel:
    values as large as keys. Not in half types: it rounds the weights to them. Not in an exported program, whose sizes
    are open, and not under ``torch.func``, of which this project's operators take what they can.
    """
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and _checks.in_transforms()):
        return False
    key, device_type = memory.key, query.device.type
    products = query.dim() == 3 and query.shape[1] >= _MANY_QUERIES and key.shape[1] >= _MANY_QUERIES
    of_float64 = query.dtype == torch.float64 and device_type == "cpu"
    exact = (query.dtype == torch.float32 or of_float64) and not _checks.autocasts(device_type)
    return products and exact and memory.value.shape[2] == key.shape[2]


def dot_scores(
    query: Tensor,
    key: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The scores of dot-product attention, of checked arguments: a matrix product, which has its kernel.

    Half types are computed in float32.
    """
    query, key = autocast(query, key)
    flat, dtype = query.dim() == 2, query.dtype
    query, key = ((x.unsqueeze(1) if x.dim() == 2 else x).to(accumulator(dtype)) for x in (query, key))
    off = torch.autocast(query.device.type, enabled=False) if _checks.autocasts(query.device.type) else nullcontext()
    with off:
        scores = reference.dot_scores(query, key, lengths=lengths, mask=mask, scale=scale).to(dtype)
    return scores.squeeze(1) if flat else scores


def _queries(query: Tensor) -> int:
    return 1 if query.dim() == 2 else query.shape[1]


def _call(
    op: Any, query: Tensor, key: Tensor, others: tuple[Tensor | None, ...], *options: Any, steps: Steps | None = None
) -> Any:
    """Calls an operator; where no derivative can be asked for, past autograd, which costs more than a small step.

    With the steps of a memory, their key and value are attended, where they still are those of the call.
    """
    inputs = (query, key, *others)
    if torch.compiler.is_compiling():
        return op(*inputs, *options)
    if _checks.in_transforms():
        _refuse_transforms(inputs)
    elif not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs, *options)
    elif steps is not None and steps.serve(op, key, others[0]) and autocast(key)[0] is key:  # not in a new dtype
        return steps.attend(op, *autocast(query), *others[1:], *options)
    elif not _checks.autocasts(query.device.type):
        return differentiable(op, inputs, options)
    return op(*inputs, *options)


def _refuse_transforms(inputs: tuple[Tensor | None, ...]) -> None:
    """Of torch.func, vmap works on the operators; derivatives taken there would be silently 0."""
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or []
    in_transform = any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)
    if in_transform or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "attnext's kernels have no forward-mode derivative and none for torch.func.grad: call the op with "
            "backend='reference', or take the gradient with torch.autograd"
        )


def autocast_some(*inputs: Any) -> tuple[Any, ...]:
    """The same of inputs of which some may be None."""
    present = iter(autocast(*(x for x in inputs if x is not None)))
    return tuple(None if x is None else next(present) for x in inputs)


def autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The dtypes that autocast makes of the inputs, for the reference; the operators have their own rule for it."""
    device_type = inputs[0].device.type
    if not _checks.autocasts(device_type):
        return inputs
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)
