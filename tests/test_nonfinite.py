"""NaN and infinity, seen and hidden: the CPU kernels as the reference, layers as torch's own, rules as their formulas.

The other backends are held to the same table by ``nonfinite.py``, in ``test_triton.py`` and ``test_cuda.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoder_cases import Case, Decoder, call, gradients, leaves_of, made, visible_slots
from nonfinite import CALLS, INF, NAN, SENTENCES, Call, called, departures, inputs, kinds, slots
from torch import Tensor, nn

import attnext
from attnext import reference
from attnext.alignments import NORMALIZERS

BAD = (NAN, INF, -INF)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_every_call_gives_what_the_formula_gives(case: Call) -> None:
    assert departures(case, "cpu") == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CALLS[::5], ids=str)
def test_in_other_dtypes(case: Call, dtype: torch.dtype) -> None:
    assert departures(case, "cpu", dtype) == []


def test_a_hidden_key_s_gradient_by_steps_of_a_query_that_is_nan() -> None:
    """Of dot products, whose gradients of keys are a product over all steps: 0 times NaN."""
    query, key = torch.randn(2, 5), torch.randn(2, 6, 5, requires_grad=True)
    query[1, 2] = NAN
    context, _ = attnext.dot_attention(query, attnext.prepare(key, None, lengths=torch.tensor([4, 4])))
    (grad,) = torch.autograd.grad(context.sum(), key)
    assert (grad[:, 4:] == 0).all()
    assert grad[1, :4].isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_whose_scores_are_all_minus_infinity_attends_nothing(backend: str) -> None:
    query, key = torch.full((1, 2, 3), -1e30), torch.full((1, 4, 3), 1e30)
    query[:, 1] = 0.0
    context, weights = attnext.dot_attention(query, key, torch.randn(1, 4, 2), need_weights=True, backend=backend)
    assert weights is not None
    assert torch.equal(weights[0], torch.tensor([[0.0] * 4, [0.25] * 4]))
    assert torch.equal(context[0, 0], torch.zeros(2))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("of_query", [True, False])
def test_products_that_pytorch_s_own_attention_makes(of_query: bool, bad: float) -> None:
    query, key, value = (torch.randn(2, 130, 8) for _ in range(3))
    (query if of_query else key)[0, 3, 2] = bad
    found, expected = attnext.dot_attention(query, key, value)[0], reference.dot_attention(query, key, value)[0]
    assert torch.equal(kinds(found), kinds(expected))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("case", [call for call in CALLS if call.op != "scores" and call.weight == 1.0], ids=str)
def test_what_comes_in_for_the_weights_alone_has_nothing_to_do_with_the_values(case: Call) -> None:
    """A weight that is NaN gives the values nothing, and a value that is NaN the weights' inputs nothing."""
    for name, places in SENTENCES.items():
        x = {of: y.requires_grad_() for of, y in inputs(case, False, torch.float32).items()}
        weights = called(case, x, slots(case))["weights"]
        grads = dict(zip(x, torch.autograd.grad(weights.sum(), list(x.values()), materialize_grads=True), strict=True))
        if "value" in x:
            assert (grads["value"] == 0).all()
        if case.op != "shared" and {place[0] for place in places} == {"value"}:
            row = list(SENTENCES).index(name)
            assert all(grads[of][row].isfinite().all() for of in ("query", "key"))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("width", [3, 5, 31])
def test_nan_reaches_a_past_no_further_than_its_filters(width: int) -> None:
    query, key, v = torch.full((1, 4), NAN), torch.randn(1, 80, 4), torch.randn(4)
    past, filters = torch.rand(1, 80, requires_grad=True), torch.randn(4, 1, width)
    memory, window = attnext.prepare(key, torch.randn(1, 80, 3), v), torch.tensor([[40, 42]])
    context, _ = attnext.additive_step(query, memory, filters, None, past, window=window, backend="cpu")
    (grad,) = torch.autograd.grad(context.sum(), past)
    near = (torch.arange(80) >= 40 - width // 2) & (torch.arange(80) < 42 + width // 2)
    assert torch.equal(grad[0].isnan(), near)


# Rules of weights.

SCORES = torch.tensor([[0.1, -0.4, 0.0, 0.3, -INF], [0.1, 0.2, 0.3, 0.4, 0.5]])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers(normalizer: str, bad: float) -> None:
    scores = SCORES.clone()
    scores[0, 2] = bad
    scores.requires_grad_()
    weights = attnext.normalize(scores, normalizer)
    (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    broken = bad != -INF and not (bad == INF and normalizer == "sigmoid")
    assert weights[0, :4].isnan().all() if broken else weights[0].isfinite().all()
    assert weights[0, 4] == 0
    assert weights[1].isfinite().all()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("mode", ["parallel", "recursive", "hard"])
def test_a_nan_energy_of_monotonic_attention_shows_from_there_on(mode: str) -> None:
    energies, previous = torch.tensor([[-3.0, -2.0, NAN, 0.4, -INF, 0.1]] * 2), torch.zeros(2, 6)
    energies[1, 1], previous[:, 1] = 9.0, 1.0  # the second reader has stopped before, if it reads hard
    weights = attnext.monotonic_weights(energies, previous, mode)
    assert weights[0, :2].isfinite().all()
    assert weights[0, 2].isnan()
    assert bool(weights[1].isfinite().all()) == (mode == "hard")
    assert mode == "hard" or torch.equal(kinds(weights), kinds(reference.monotonic_weights(energies, previous)))


def test_a_hard_reader_that_starts_at_nan() -> None:
    energies = torch.tensor([[-3.0, 2.0, -INF]] * 2)
    previous = torch.tensor([[NAN, 0.0, 0.0], [1.0, 0.0, NAN]])
    weights = attnext.monotonic_weights(energies, previous, "hard")
    assert weights[0, 0].isnan()
    assert torch.equal(weights[1], torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_forward_attention(bad: float) -> None:
    scores, previous = torch.tensor([0.1, -0.4, bad, 0.3, -INF, 0.2]), torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0, 0.0])
    expected = kinds(torch.tensor([0.0, NAN, NAN, NAN, 0.0, 0.0]))  # of the keys that are reached
    assert torch.equal(kinds(attnext.forward_weights(scores, previous)), expected)
    assert torch.equal(kinds(reference.forward_weights(scores, previous, None)), expected)


# Layers and decoders.


def assert_alike(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> None:
    """Results of the same kinds, and gradients that are finite in the same places."""
    for x, y in zip(found[0], expected[0], strict=True):
        assert torch.equal(kinds(x), kinds(y))
    for x, y in zip(found[1], expected[1], strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())


def layered(layer: Any, tensors: int, what: str, bad: float) -> tuple[list[Tensor], list[Tensor]]:
    """Results of three sentences and their gradients, the second with something bad in it."""
    layer = copy.deepcopy(layer)
    torch.manual_seed(1)
    x, state = torch.randn(6, 3, 5), [torch.randn(4, 3, 17) for _ in range(tensors)]
    with torch.no_grad():
        if what == "weight":
            layer.weight_hh_l0[3, 2] = bad
        else:
            of = {"input": (x, 2), "state": (state[0], 1), "cell": (state[-1], 1)}[what]
            of[0][of[1], 1, 3] = bad
    leaves = [y.requires_grad_() for y in (x, *state)]
    output, last = layer(x, state[0] if tensors == 1 else tuple(state))
    results = [output, *([last] if tensors == 1 else last)]
    return results, gradients(results, [*leaves, *layer.parameters()])


LAYERS: Any = ((attnext.GRU, nn.GRU, 1), (attnext.LSTM, nn.LSTM, 2))


@pytest.mark.usefixtures("instruction_set", "one_thread")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["input", "state", "cell", "weight"])
@pytest.mark.parametrize(("ours", "theirs", "tensors"), LAYERS, ids=("GRU", "LSTM"))
def test_recurrent_layers_are_as_torch_s_own(ours: Any, theirs: Any, tensors: int, what: str, bad: float) -> None:
    layer, peer = (of(5, 17, 2, bidirectional=True) for of in (ours, theirs))
    peer.load_state_dict(layer.state_dict())
    assert_alike(*(layered(one, tensors, what, bad) for one in (layer, peer)))


def decoded(kind: type[Decoder], case: Case, what: str, bad: float, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    decoder, given = made(kind, case, torch.float32)
    if given.lengths is not None:
        given = given._replace(lengths=torch.tensor([9, 4, 6]))
    with torch.no_grad():
        if what == "hidden":
            given.states[~visible_slots(given.states, given.lengths, given.mask)] = bad
        elif what == "weight":
            decoder.weight_hh_l0[3, 2] = bad
        else:
            assert given.state is not None
            {"input": given.x, "states": given.states, "state": given.state.hidden[0].unsqueeze(1)}[what][1, 0, 3] = bad
    with attnext.use_backend(backend):
        results = call(decoder, given)
        return results, gradients(results, leaves_of(decoder, given))


DECODERS = (
    Case(), Case("general", "after", "fed", layers=2), Case("location", "after", "vector", layers=2),
    Case("coverage, sigmoid", "before", "fed"), Case("dot"), Case("concat", hidden="mask"),
)  # fmt: skip


@pytest.mark.usefixtures("instruction_set", "one_thread")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["input", "states", "hidden", "state", "weight"])
@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.attention)
def test_decoders_are_as_their_steps_by_the_reference(
    kind: type[Decoder], case: Case, what: str, bad: float
) -> None:  # fmt: skip
    found = decoded(kind, case, what, bad, "cpu")
    assert_alike(found, decoded(kind, case, what, bad, "reference"))
    if what == "hidden":
        assert all(x.isfinite().all() for of in found for x in of)
