"""The ops as functions: each checks its arguments and makes one op call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnext import _checks, dot, reference
from attnext.backends import choose, chosen_freely
from attnext.memory import Memory, prepared_memory
from attnext.memory import prepare as ahead
from attnext.ops import RULES, accumulator, differentiable, operators
from attnext.steps import Steps, gathered

__all__ = ["additive_attention", "additive_scores", "additive_step", "dot_attention", "prepare"]


def prepare(
    key: Tensor,
    value: Tensor | None,
    score_weight: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Memory:
    """Projected keys made ready for many steps: what is computed of them alone is computed once.

    What comes back stands in the place of the keys in :func:`additive_attention`, :func:`additive_scores` and
    :func:`additive_step`, or, without a score weight, in :func:`dot_attention`; modules take one of their sizes too.
    The gradients of all steps are summed without a copy for each. Under ``torch.no_grad`` it is without gradients.

    Args:
        key: (B, Tk, D) projected keys. float32, float64, float16 or bfloat16; the others have its dtype and device
            (under autocast, its dtype). Don't change it in place afterwards.
        value: (B, Tk, H) encoder states, or None where the keys are the values.
        score_weight: (D,) or (heads, D), the vector of an additive score, of which a copy is kept; None for dot
            products.
        lengths: (B,) integers: how many leading keys of each row are real.
        mask: bool (B, Tk), True where a key may be attended.
        dtype: that of the memory, to which all is cast once; by default the key's, under autocast that of autocast. Of
            float32, a half type is what keys and values, and what is computed of them, are held in for queries of
            float32, which reads half as many bytes a step; the steps compute in float32, and the score weight stays so.

    Returns:
        The memory. One held in bfloat16 (float16) is off by what the rounding of its numbers gives: of additive scores
        by up to ``|scale| * sum |v| * u / 2``, u being 2^-8 (2^-11), where the kernels take exponentials of the keys,
        and else, as dot products, as of keys rounded by the factor u; and values are rounded by u. Keys above 4.85 in
        size make the kernels slower in float16, values above 65504 are infinite there.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
    """
    key = _checks.sized("key", key, 3)
    given = {"key": key}
    if value is not None:
        given["value"] = _checks.value(value, key)
    if score_weight is not None:
        given["score_weight"] = _checks.weight_of_score(score_weight, key, "the key's last dimension")
    _checks.same_kind_as_key(**given)
    lengths, mask = _checks.lengths(lengths, key), _checks.mask(mask, key, None)
    held = None
    if dtype is not None:
        dtype = _checks.floating("dtype", dtype)
        if key.dtype == torch.float32 and dtype in _checks.HALVES:
            dtype, held = None, dtype
    elif _checks.autocasts(key.device.type) and key.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(key.device.type)
    of_memory = {name: x if torch.is_grad_enabled() else x.detach() for name, x in given.items()}
    if dtype is not None:
        of_memory = {name: x.to(dtype) for name, x in of_memory.items()}
    key, v = of_memory["key"], of_memory.get("score_weight")
    memory = Memory(key, of_memory.get("value", key), lengths, mask, None, None)
    if v is not None:
        heads = v.shape[0] if v.dim() == 2 else 1
        v = v.clone() if heads > 1 else v.reshape(-1).clone()
        memory = replace(memory, score_weight=v, heads=heads, prepared=ahead(key, lengths, mask, None, held))
    if held is not None:
        memory = memory.held(held)
    return replace(memory, steps=gathered(memory.key, memory.value, v), slots=(lengths, mask))


def additive_attention(
    query: Tensor,
    key: Tensor | Memory,
    value: Tensor | None = None,
    score_weight: Tensor | None = None,
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
        key: (B, Tk, D) projected keys, U h; or what :func:`prepare` made of them, with value, score_weight, lengths and
            mask in it.
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

    NaN and infinity: what stands in hidden slots reaches no result and no gradient, and what stands in a sentence none
    of another. Elsewhere all backends give what the formula gives:

    - NaN in a query or a key is NaN in its scores. A row with a NaN score, or one of plus infinity, has weights of NaN
      in its visible slots (by the sigmoid rule of a step plus infinity has a weight like others), and a context of NaN.
    - An infinite query or key saturates the tanh; infinities of both signs in a sum are NaN.
    - A score weight that is infinite, or becomes so by the scale, counts as NaN.
    - A score of minus infinity counts as masked: it has weight 0, and a row of them is one without a key to attend.
    - NaN or infinity in a value reaches the contexts of the rows that attend it. Through a weight that is exactly 0,
      dropped or too small for the dtype, NaN may reach context and gradients (as 0 times NaN) or not.
    - Gradients are finite where the formula's are, and NaN or infinite where those are; which of the two is open. So is
      what infinite numbers give backwards in dot products; and beside a score weight that is not finite all gradients
      may be NaN.

    Where one key has all the weight, the true gradient of the scores is 0. Of one query, and of a memory's steps on the
    CPU, it is that to the rounding of the weight; of several queries in a call roundings remain of about
    ``eps * |scale| * |dC| * |context|``, dC being what comes in for the context.
    """
    if isinstance(key, Memory):
        memory = _in_place_of_key(query, key, True, value, score_weight, lengths, mask)
    else:
        query, key, score_weight = _checks.additive(query, key, score_weight)
        value = _checks.value(value, key)
        _checks.same_kind(query, key=key, value=value, score_weight=score_weight)
        lengths, mask = _slots(query, key, lengths, mask)
        memory = Memory(key, value, lengths, mask, score_weight, None)
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
    family, memory = _served(query, memory, backend)
    assert memory.score_weight is not None
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
    if prepared is None and query.dim() == 2 and _as_a_step(memory, dropout_p, need_weights):
        options = (memory.lengths, memory.mask, None, seed, scale, dropout_p, 0)
        of_past = (None,) * 6
        others = (memory.value, memory.score_weight, *of_past)
        context, weights = _call(operators[family].step, query, memory.key, others, *options, steps=memory.steps)
        return context, weights.to(context.dtype) if need_weights else None
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


def _as_a_step(memory: Memory, dropout_p: float, need_weights: bool) -> bool:
    """Whether the operator of a step serves one query whose keys are not prepared.

    It takes exp of the sums, which for one query are no more than the keys. The weights that it returns are those
    before dropout.
    """
    of_one_head = memory.score_weight is not None and memory.score_weight.dim() == 1
    by_key = memory.mask is None or memory.mask.dim() == 2
    return of_one_head and by_key and not (need_weights and dropout_p > 0.0)


def additive_step(
    query: Tensor,
    memory: Memory,
    filters: Tensor | None = None,
    projection: Tensor | None = None,
    past: Tensor | Sequence[Tensor] = (),
    *,
    bias: Tensor | None = None,
    rule: str = "softmax",
    previous: Tensor | None = None,
    transition: Tensor | None = None,
    window: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    follow_past: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A decoder step that sees where it attended before: ``scale * v . tanh(query + key_j + P f_j)``, and its context.

    f_j are filters over the past weights around key j, with zeros beyond the ends: those of the last step (Chorowski,
    Bahdanau, Serdyuk, Cho and Bengio, "Attention-based models for speech recognition", 2015) or their sum over all
    steps, or both (Shen et al., "Natural TTS synthesis by conditioning WaveNet on mel spectrogram predictions", 2018).
    Filters of width 1 without a projection are coverage (See, Liu and Manning, "Get to the point: summarization with
    pointer-generator networks", 2017). Without filters it is a step of :func:`additive_attention` with another rule, or
    within a window. No feature is written to memory, and the backward pass makes them again.

    Args:
        query: (B, D), or (B, Tq, D) for the hypotheses of a beam, each with a past of its own. Of the memory's dtype,
            or float32 where that is held in a half type.
        memory: what :func:`prepare` made of the keys, with a score weight (D,).
        filters: (F, C, width) of an odd width, over C pasts, as the weight of a ``torch.nn.Conv1d``; of the query's
            dtype, as projection and bias are.
        projection: (D, F), P; None is for F = D.
        past: (B, Tk) or (B, Tq, Tk) as the query, or a sequence of one or two of them, in the order of the filters'
            channels; of any floating dtype, as previous and transition are. What they start from is the caller's: 0,
            1 at the first key, ``1 / length`` at each. What stands in hidden slots is not read.
        bias: (F,) of the filters: the same for every key, so that it enters with the query.
        rule: "softmax"; "sigmoid", ``sigmoid(s_j) / sum_j sigmoid(s_j)`` (Chorowski 2015); or "forward", which
            multiplies the softmax by ``previous_j + previous_{j-1}`` and normalises again: Zhang, Ling and Dai,
            "Forward attention in sequence-to-sequence acoustic modeling for speech synthesis", 2018; see
            :func:`attnext.forward_weights`.
        previous: the shape of a past: the last step's weights, for rule="forward" alone.
        transition: (B, 1) or (B, Tq, 1), from 0 to 1, how likely the reader moves on, likewise: the factor is then
            ``(1 - u) previous_j + u previous_{j-1}``.
        window: integers (B, 2) or (B, Tq, 2): the first key to be attended and the one after the last, which may lie
            beyond the ends. Other keys are not read at this step; the past is seen everywhere.
        scale: multiplies the scores.
        dropout_p: probability that a weight is dropped from the context, the rest scaled by 1 / (1 - dropout_p).
        follow_past: with False no gradient flows into past and previous. It flows into the transition all the same,
            by which an agent learns.
        backend: None chooses by device; "reference", "cpu", "triton" or "cuda" is exactly that one, or an error.

    Returns:
        The context, (B, H) or (B, Tq, H), and the weights before dropout, (B, Tk) or (B, Tq, Tk), both differentiable.
        The weights are in the dtype of the arithmetic, float64 for float64 and float32 for the others, so that their
        sum over many steps is not rounded. A row without a key to attend has context 0, and weights 0 (by
        rule="forward" the reader stays: ``previous`` in the visible slots). NaN and infinity as in
        :func:`additive_attention`; NaN in a past is one in the scores of the keys that the filters see it from, NaN in
        ``previous`` or ``transition`` one in the weights of all keys that forward attention reaches. An infinite number
        in these, which are weights, may count as NaN.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available. Also when a second derivative is taken of a backend other
            than "reference".

    Example:
        >>> memory = attnext.prepare(key, encoder_states, v, lengths=lengths)   # once a sentence
        >>> weights = total = key.new_zeros(key.shape[:2])
        >>> context, weights = attnext.additive_step(query, memory, filters, projection, (weights, total))
        >>> total = total + weights   # at every step
    """
    memory = _in_place_of_key(query, prepared_memory(memory), True, name="memory")
    if memory.heads > 1:
        raise ValueError(f"memory must be prepared with a score_weight of (D,), got one for heads={memory.heads}")
    rule, keys = _checks.choice("rule", rule, RULES), memory.key.shape[1]
    pasts = _checks.pasts(past, query, keys)
    _checks.filters(filters, projection, bias, len(pasts), query)
    previous, transition = _checks.previous(previous, rule, query, keys), _checks.transition(transition, rule, query)
    window = _checks.window(window, query)
    scale, dropout_p = _checks.scale(scale), _checks.probability("dropout_p", dropout_p)
    if not _checks.flag("follow_past", follow_past):
        pasts = tuple(x.detach() for x in pasts)
        previous = None if previous is None else previous.detach()
    if bias is not None:
        query = query + (bias if projection is None else projection @ bias)
    return attend_step(query, memory, filters, projection, pasts, rule=rule, previous=previous, transition=transition,
                       window=window, scale=scale, dropout_p=dropout_p, backend=backend)  # fmt: skip


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
    family, memory = _served(query, memory, backend)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**62, (), device=query.device)
    wide = accumulator(query.dtype)
    first, second = (*past, None, None)[:2]
    first, second, previous, transition = (
        x if x is None or x.dtype == wide else x.to(wide) for x in (first, second, previous, transition)
    )
    linear = (memory.score_weight, filters, projection)
    if family == "reference":
        query, *others = autocast_some(query, memory.key, memory.value, *linear)
        inputs: list[Any] = [
            *(None if x is None else x.to(wide) for x in (query, *others)),
            [x for x in (first, second) if x is not None],
        ]
        with _without_autocast(query.device.type):
            context, weights = reference.additive_step(*inputs, rule=rule, previous=previous,
                transition=transition, lengths=memory.lengths, mask=memory.mask, window=window, scale=scale,
                dropout_p=dropout_p, seed=seed)  # fmt: skip
        return context.to(query.dtype), weights
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
    key: Tensor | Memory,
    score_weight: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The scores of additive attention before the softmax: logits over the keys.

    For pointer networks (Vinyals, Fortunato and Jaitly, 2015). Arguments as in :func:`additive_attention`. The kernels'
    error is absolute, a few 1e-7 of ``scale * sum |v|`` in float32, also where the score is tiny.

    Returns:
        (B, Tq, Tk), or (B, Tk) for a query of shape (B, D); minus infinity in masked slots, whose incoming gradient is
        not read. NaN and infinity of the inputs as in :func:`additive_attention`.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available.
    """
    if isinstance(key, Memory):
        memory = _in_place_of_key(query, key, True, None, score_weight, lengths, mask)
    else:
        query, key, score_weight = _checks.additive(query, key, score_weight)
        _checks.same_kind(query, key=key, score_weight=score_weight)
        lengths, mask = _slots(query, key, lengths, mask)
        memory = Memory(key, key, lengths, mask, score_weight, None)
    return scores_of(query, memory, _checks.scale(scale), backend)


def scores_of(query: Tensor, memory: Memory, scale: float, backend: str | None = None) -> Tensor:
    """The scores of additive attention, of checked arguments."""
    family, memory = _served(query, memory, backend)
    key, score_weight, lengths, mask = memory.key, memory.score_weight, memory.lengths, memory.mask
    assert score_weight is not None
    if family == "reference":
        query, key, score_weight = autocast(query, key, score_weight)
        return reference.additive_scores(query, key, score_weight, lengths=lengths, mask=mask, scale=scale)
    scores: Tensor = _call(operators[family].scores, query, key, (score_weight,), lengths, mask, scale)
    return scores


def dot_attention(
    query: Tensor,
    key: Tensor | Memory,
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
        key: (B, Tk, D); or what :func:`prepare` made of them, with value, lengths and mask in it.
        value: (B, Tk, H), or None where the keys are the values.
        lengths: (B,) integers: how many leading keys of each row are real.
        mask: bool (B, Tk) or (B, Tq, Tk), True where a key may be attended. What stands in other slots, NaN included,
            reaches neither a result nor a gradient.
        scale: multiplies the scores; 1 / sqrt(D) is that of the Transformer.
        dropout_p: probability that a weight is dropped, the rest scaled by 1 / (1 - dropout_p); drawn from torch's
            generator, and the same on every backend.
        need_weights: also return the weights.
        backend: None chooses by device, and two matrix products or PyTorch's own attention where those are faster:
            float32 and float64 with many queries, without lengths, mask and dropout (``attnext.dot`` has the rule).
            "reference", "cpu", "triton" or "cuda" is exactly that one, or an error.

    Returns:
        The context, (B, Tq, H) or (B, H), and the weights, (B, Tq, Tk) or (B, Tk), or None, as
        :func:`additive_attention` does.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the message names it.
        RuntimeError: the backend asked for is not available. Also when a second derivative is taken of a backend other
            than "reference", or of PyTorch's own attention.

    NaN and infinity, those of scores that overflow included, give what :func:`additive_attention` says.
    """
    if lengths is None and mask is None and type(dropout_p) is float and dropout_p == 0.0 and chosen_freely(backend):
        found = dot.plain(query, key, value, scale, need_weights)
        if found is not None:
            return found
    if isinstance(key, Memory):
        memory = _in_place_of_key(query, key, False, value, None, lengths, mask)
    else:
        query, key = _checks.dot(query, key)
        value = key if value is None else _checks.value(value, key)
        _checks.same_kind(query, key=key, value=value)
        lengths, mask = _slots(query, key, lengths, mask)
        memory = Memory(key, value, lengths, mask, None, None)
    return attend_by_dot(
        query,
        memory,
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
    family, memory = _served(query, memory, backend)
    key, lengths, mask = memory.key, memory.lengths, memory.mask
    if chosen_freely(backend):
        found = dot.attend(query, memory, scale, dropout_p, need_weights)
        if found is not None:
            return found
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
    with _without_autocast(query.device.type):
        scores = reference.dot_scores(query, key, lengths=lengths, mask=mask, scale=scale).to(dtype)
    return scores.squeeze(1) if flat else scores


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For arithmetic in a dtype that was chosen."""
    return torch.autocast(device_type, enabled=False) if _checks.autocasts(device_type) else nullcontext()


def _slots(
    query: Tensor, key: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Lengths, and a mask of (B, Tk) or (B, Tq, Tk), of which one query (B, D) needs no more than the first."""
    queries = 1 if query.dim() == 2 else query.shape[1]
    lengths, mask = _checks.lengths(lengths, key), _checks.mask(mask, key, queries)
    return lengths, mask.squeeze(1) if mask is not None and mask.dim() > query.dim() else mask


def _in_place_of_key(
    query: Tensor,
    memory: Memory,
    additive: bool,
    value: Tensor | None = None,
    score_weight: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    name: str = "key",
) -> Memory:
    """The memory itself: what it holds was checked when it was made, the query is now."""
    if not (value is None and score_weight is None and lengths is None and mask is None):
        given = {"value": value, "score_weight": score_weight, "lengths": lengths, "mask": mask}
        refuse_beside_memory(**given)
    if (memory.score_weight is not None) != additive:
        wanted, got = ("an additive score", "dot products")[:: 1 if additive else -1]
        raise ValueError(f"{name} must be prepared for {wanted}, got one for {got}")
    key = memory.key
    if not _checks.fits(query, key.shape[2], key, held=True) or query.shape[0] != key.shape[0]:
        query = _checks.sized("query", query, 2, 3)
        _checks.size(name, key, 0, query.shape[0], "query's batch")
        _checks.size(name, key, 2, query.shape[-1], "query's last dimension")
        _checks.same_kind(query, **{name: key})
    return memory


def refuse_beside_memory(**given: Tensor | None) -> None:
    """Says which argument a prepared memory has of its own."""
    for name, x in given.items():
        if x is not None:
            got = type(x).__name__
            raise ValueError(f"{name} must be None with a prepared memory, got {got}: pass it to prepare() instead")


def _served(query: Tensor, memory: Memory, backend: str | None) -> tuple[str, Memory]:
    """The backend that serves a call, and the memory as it takes it: of a prepared memory the one that has prepared it,
    if no other is asked for."""
    held = memory.key.dtype != query.dtype and not _checks.autocasts(query.device.type)
    if memory.prepared is not None and chosen_freely(backend):
        family = memory.prepared.backend
    else:
        family = choose(backend, query.device.type, query.dtype, held, query.device.index)
    v = memory.score_weight
    if held:
        memory = memory.widened(query.dtype, family)
    if v is not None and v.dtype != query.dtype and not _checks.autocasts(query.device.type):
        memory = replace(memory, score_weight=v.to(query.dtype))  # one of float32 and the other of a half type
    return family, memory


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
