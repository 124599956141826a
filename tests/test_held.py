"""Memories of float32 that are held in a half type: as exact as they say, on whatever attends them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from decoder_cases import ATTENTIONS, Decoder, assert_equal, gradients, tensors
from torch import Tensor, nn

import attnext
from attnext.attention.family import STEPPED
from attnext.backends import choose
from attnext.memory import Memory

HALVES = [torch.bfloat16, torch.float16]
CLOSE = {torch.bfloat16: {"rtol": 0.02, "atol": 0.01}, torch.float16: {"rtol": 0.003, "atol": 0.0015}}
"""Of small sizes: some roundings of 2^-8, or 2^-11."""
LENGTHS = torch.tensor([70, 41, 1])

pytestmark = pytest.mark.parametrize("held", HALVES, ids=str)


def inputs(magnitude: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, keys, features, values = 3, 5, 70, 33, 20
    query, key = (magnitude * torch.randn(batch, n, features) for n in (queries, keys))
    return query, key, torch.randn(batch, keys, values), torch.randn(features) / features**0.5


def roundoff(held: torch.dtype) -> float:
    return torch.finfo(held).eps / 2


def exact(call: Any, *x: Tensor, **options: Any) -> list[Tensor]:
    found: list[Tensor] = call(*(y.double() for y in x), need_weights=True, backend="reference", **options)
    return found


def assert_within(found: Any, expected: Any, value: Tensor, of_score: Any, held: torch.dtype) -> None:
    """Weights whose logarithm is off by twice the error of a score, and their sum of rounded values."""
    (context, weights), (exact_context, exact_weights) = found, expected
    assert context.dtype == weights.dtype == torch.float32
    error = exact_weights * (torch.as_tensor(2.02 * of_score + 1e-5).expm1())
    assert ((weights - exact_weights).abs() <= error).all()
    size = value.double().abs()
    bound = error @ size + (exact_weights @ size) * roundoff(held) * 1.01 + 1e-5
    assert ((context - exact_context).abs() <= bound).all()


@pytest.mark.parametrize("magnitude", [1.0, 4.0], ids=["within", "beyond"])
def test_an_additive_score_is_off_by_half_a_rounding_of_the_weights(
    instruction_set: str, held: torch.dtype, magnitude: float
) -> None:
    """Also where exp(2 k) is beyond a float16."""
    query, key, value, v = inputs(magnitude)
    assert (key.abs().max() > 5.6) == (magnitude > 1)
    memory = attnext.prepare(key, value, v, lengths=LENGTHS, dtype=held)
    assert memory.prepared is not None
    assert {memory.key.dtype, memory.value.dtype, memory.prepared.exp_key.dtype} == {held}
    assert memory.score_weight is not None
    assert memory.score_weight.dtype == torch.float32
    expected = exact(attnext.additive_attention, query, key, value, v, lengths=LENGTHS)
    # Rows that float16's exponentials can't say are taken by the rounded keys, of which those that are not saturated
    # are smaller than the queries reach.
    beyond = 2 * float(query.abs().max()) if magnitude > 1 and held == torch.float16 else 1.0
    of_score = float(v.abs().sum()) * roundoff(held) / 2 * beyond
    for queries in (query, query[:, :1]):
        found = attnext.additive_attention(queries, memory, need_weights=True)
        assert_within(found, [x[:, : queries.shape[1]] for x in expected], value, of_score, held)


def test_a_dot_product_is_off_by_the_rounding_of_its_terms(instruction_set: str, held: torch.dtype) -> None:
    query, key, value, _ = inputs()
    size = query.double().abs() @ key.double().abs().mT / 8
    for values in (value, None):
        memory = attnext.prepare(key, values, lengths=LENGTHS, dtype=held)
        found = attnext.dot_attention(query, memory, need_weights=True, scale=1 / 8)
        others = [key] if values is None else [key, values]
        expected = exact(attnext.dot_attention, query, *others, lengths=LENGTHS, scale=1 / 8)
        of_score = (size * roundoff(held)).amax(-1, keepdim=True)
        assert_within(found, expected, key if values is None else values, of_score, held)


@pytest.mark.parametrize("name", STEPPED)
def test_the_family_steps_over_it(name: str, held: torch.dtype) -> None:
    attn: Any = STEPPED[name].make(20, 20, 24)
    states, queries = torch.randn(3, 70, 20), (torch.randn(4, 3, 20) / 2).requires_grad_()
    found = []
    for dtype in (held, None):
        memory, state, all_of_it = attn.prepare(states, LENGTHS, dtype=dtype), None, []
        assert memory.key.dtype == memory.value.dtype == (dtype or torch.float32)
        for query in queries:
            context, weights, state = attn.step(query, memory, state, need_weights=True)
            all_of_it += [context, weights]
        loss = torch.stack([x.cos().sum() for x in all_of_it]).sum()
        grads = torch.autograd.grad(loss, [queries, *attn.parameters()], allow_unused=True, materialize_grads=True)
        found.append(([x.detach() for x in all_of_it], grads))
    (results, grads), (expected, expected_grads) = found
    if attn.__class__ is attnext.MonotonicAttention or "local" in name:  # their positions are roundings too
        results, expected, grads, expected_grads = results[:2], expected[:2], (), ()
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE[held])
    for x, y in zip(grads, expected_grads, strict=True):
        size = float(y.abs().max())
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.1 * size * (CLOSE[held]["rtol"] / 0.02) + 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scores_of_it(held: torch.dtype, backend: str) -> None:
    query, key, value, v = inputs()
    memory = attnext.prepare(key, value, v, lengths=LENGTHS, dtype=held)
    found = attnext.additive_scores(query, memory, backend=backend)
    assert found.dtype == torch.float32
    expected = attnext.additive_scores(query.double(), key.double(), v.double(), lengths=LENGTHS, backend="reference")
    hidden = expected == -torch.inf
    bound = (v.abs() * key.abs().amax((0, 1))).sum() * roundoff(held) + 1e-6
    assert ((found - expected).masked_fill(hidden, 0.0).abs() <= bound).all()
    assert torch.equal(found == -torch.inf, hidden)


def test_queries_of_the_half_type_attend_it_too(held: torch.dtype) -> None:
    query, key, value, v = inputs()
    memory = attnext.prepare(key, value, v, dtype=held)
    context, _ = attnext.additive_attention(query.to(held), memory)
    assert context.dtype == held
    torch.testing.assert_close(context.float(), attnext.additive_attention(query, memory)[0], **CLOSE[held])


def test_what_is_done_to_a_memory(held: torch.dtype) -> None:
    query, key, value, v = inputs()
    memory = attnext.prepare(key, value, v, lengths=LENGTHS, dtype=held)
    mask = torch.rand(3, 70) < 0.7

    def attended(memory: Memory, rows: Any = slice(None)) -> Tensor:
        return attnext.additive_attention(query[rows], memory)[0]

    indices = torch.tensor([2, 0, 0])
    assert torch.equal(attended(memory.select(indices), indices), attended(memory)[indices])
    assert torch.equal(attended(memory.detach()), attended(memory))
    assert torch.equal(attended(pickle.loads(pickle.dumps(memory))), attended(memory))
    expected, _ = attnext.additive_attention(query, key, value, v, lengths=LENGTHS, mask=mask)
    torch.testing.assert_close(attended(memory.with_mask(mask)), expected, **CLOSE[held])
    assert str(held) in repr(memory)
    assert memory.to("cpu") is memory
    wide = memory.to(torch.float32)
    assert wide.prepared is not None
    assert wide.prepared.exp_key.dtype == torch.float32
    torch.testing.assert_close(attended(wide), attended(memory), **CLOSE[held])
    with pytest.warns(RuntimeWarning, match="no kernels for 'meta'"):
        elsewhere = memory.to("meta")
    assert elsewhere.score_weight is not None
    assert (elsewhere.key.dtype, elsewhere.score_weight.dtype) == (held, torch.float32)


def test_a_dtype_that_no_memory_is_held_in(held: torch.dtype) -> None:
    attn = attnext.BahdanauAttention(4, 5, 6)
    others: tuple[Any, ...] = (torch.float64, torch.int8, "bfloat16")
    for wrong in others:
        with pytest.raises(TypeError, match="dtype must be None, bfloat16 or float16, in which a memory is held, got"):
            attn.prepare(torch.randn(2, 3, 5), dtype=wrong)
    states = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"dtype must be None for a memory of torch.float64, got torch.*: of float32"):
        attn.double().prepare(states, dtype=held)
    memory = attn.prepare(states)
    with pytest.raises(TypeError, match="memory must have query's dtype"):
        attn.float()(torch.randn(2, 4), memory)


def test_under_autocast_it_stays_as_it_is(held: torch.dtype) -> None:
    query, key, value, v = inputs()
    key.requires_grad_()
    v.requires_grad_()
    with torch.autocast("cpu", held):
        memory = attnext.prepare(key, value, v, dtype=held)
        context, _ = attnext.additive_attention(query, memory)
        attnext.additive_attention(query[:, 0], memory)[0].float().sum().backward()
    assert key.grad is not None
    assert v.grad is not None
    expected, _ = attnext.additive_attention(query[:, 0], key, value, v)
    grads = torch.autograd.grad(expected.sum(), (key, v))
    for found, right in zip((key.grad, v.grad), grads, strict=True):
        torch.testing.assert_close(found, right, rtol=0.0, atol=8 * roundoff(held) * float(right.abs().max()))
    plain = attnext.prepare(key.detach().to(held), value.to(held), v.to(held))
    assert attnext.additive_attention(query, plain)[0].dtype == torch.float32
    assert context.dtype == held
    expected, _ = attnext.additive_attention(query, key, value, v)
    torch.testing.assert_close(context.float(), expected, **CLOSE[held])


def test_a_step_of_it_compiles_and_exports(held: torch.dtype) -> None:
    attn = attnext.BahdanauAttention(8, 6, 12)
    with torch.no_grad():
        memory, query = attn.prepare(torch.randn(2, 9, 6), dtype=held), torch.randn(2, 8)
        expected = attn.step(query, memory)[0]
        compiled = torch.compile(lambda *given: attn.step(*given)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query, memory), expected)

        class Step(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attn = attn

            def forward(self, query: Tensor, memory: Memory) -> Tensor:
                context: Tensor = self.attn.step(query, memory)[0]
                return context

        program = torch.export.export(Step(), (query, memory))
        torch.testing.assert_close(program.module()(query, memory), expected)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_decoders_search_over_it(
    kind: type[Decoder], name: str, held: torch.dtype, calls: list[tuple[Any, ...]]
) -> None:
    """By their operator, as it is; opened, a sentence alone too, whose values are then multiplied ahead."""
    decoder = kind(6, 20, ATTENTIONS[name](20, 20, 20), vector_size=7, input_feeding=True)
    states, x = torch.randn(3, 9, 20), torch.randn(3, 4, 6)
    with torch.no_grad():
        for rows in (3, 1):
            memory, wide = (decoder.prepare(states[:rows], dtype=dtype) for dtype in (held, None))
            found = tensors(decoder(x[:rows], memory))
            assert len(calls) == 1
            expected = tensors(decoder(x[:rows], wide))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE[held])
            opened, state = decoder.opened(), decoder.first_state(rows)
            calls.clear()
            for t in range(4):
                output, _, state, *_ = opened(x[:rows, t], memory, state)
                torch.testing.assert_close(output, found[0][:, t], rtol=1e-4, atol=1e-5)
            assert len(calls) == 4
            calls.clear()


def test_decoders_train_over_it_step_by_step(kind: type[Decoder], held: torch.dtype, calls: list[Any]) -> None:
    decoder = kind(6, 16, attnext.BahdanauAttention(16, 20, 16))
    states, x = torch.randn(3, 9, 20), torch.randn(3, 4, 6)
    found = []
    for dtype in (held, None):
        results = tensors(decoder(x, decoder.prepare(states, dtype=dtype)))[:1]
        found.append([*results, *gradients(results, list(decoder.parameters()))])
    assert len(calls) == 1  # of the one that is not held
    assert_equal(*found, rtol=0.05, atol=0.05 if held == torch.bfloat16 else 0.01)


def test_backends_that_take_none_are_given_what_they_take(held: torch.dtype) -> None:
    query, key, value, v = inputs()
    assert choose(None, "cpu", torch.float32, held=True) == "cpu"
    for call, memory in (
        (attnext.additive_attention, attnext.prepare(key, value, v, dtype=held)),
        (attnext.dot_attention, attnext.prepare(key, value, dtype=held)),
    ):
        found, _ = call(query, memory, backend="reference")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, call(query, memory)[0], **CLOSE[held])
    past = torch.rand(3, 70)
    filters, memory = torch.randn(33, 1, 3), attnext.prepare(key, value, v, dtype=held)
    backends = (None, "reference")
    steps = [attnext.additive_step(query[:, 0], memory, filters, past=past, backend=name)[0] for name in backends]
    torch.testing.assert_close(*steps, **CLOSE[held])
