"""Decoders that attend against their formulas in float64: results, gradients, and what autograd asks of them."""

from __future__ import annotations

import copy
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from decoder_cases import (
    ATTENTIONS,
    DTYPES,
    FORMS,
    VECTORS,
    Case,
    Decoder,
    Given,
    assert_equal,
    assert_same_bits,
    call,
    check,
    gradients,
    leaves_of,
    made,
    outcome,
    tensors,
    with_parts,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnext
from attnext import AttentiveLSTM, Past

pytestmark = pytest.mark.usefixtures("one_thread")  # where no test asks for more


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Against the formulas.


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_form(kind: type[Decoder], attention: str, attend: str, vector: str, calls: list[tuple[Any, ...]]) -> None:
    hiding = ["lengths", "mask", "both", ""]
    for layers in (1, 2, 3):
        for number, dtype in enumerate(DTYPES):
            case = Case(attention, attend, vector, layers, hidden=hiding[layers - number], state=layers + number != 2)
            check(case, kind, dtype)
    assert len(calls) == 6


AWKWARD = (
    Case("additive", "before", "fed", 1, 1, 1, 1, 1, 1, 1, 1),
    Case("location", "after", "vector", 2, 1, 1, 1, 1, 1, 1, 1),
    Case("additive", "before", "vector", 2, 2, 3, 70, 7, 67, 5, 33),
    Case("concat", "after", "fed", 1, 5, 2, 71, 3, 16, 129, 17, hidden="both"),
    Case("general", "before", "", 3, 17, 2, 3, 2, 17, 19, hidden="mask"),
    Case("general", "after", "vector", 1, 9, 5, 65, 1, 33, 2, hidden="", state=False, bias=False),
    Case("dot", "before", "fed", 2, 7, 3, 13, 31, 67, bias=False),
    Case("scaled_dot", "after", "", 1, 33, 1, 2, 5, 8),
    Case("location", "before", "fed", 1, 3, 3, 130, 5, 67, 31, 20, hidden="both"),
    Case("previous", "after", "fed", 2, 2, 7, 1, 3, 5, 40, 64, bias=False),
    Case("cumulative", "before", "", 1, 11, 2, 70, 4, 16, 3, 1, state=False),
    Case("coverage", "before", "vector", 1, 4, 23, 5, 3, 31, 17, 67),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.usefixtures("instruction_set")
def test_awkward_sizes(case: Case, kind: type[Decoder], dtype: torch.dtype) -> None:
    check(case, kind, dtype)


@pytest.mark.usefixtures("instruction_set")
def test_random_cases(kind: type[Decoder]) -> None:
    seed = secrets.randbits(32)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(20):
        sizes = [draw.randint(1, most) for most in (3, 7, 5, 40, 20, 40, 40, 30)]
        form = draw.choice(list(ATTENTIONS)), draw.choice(("before", "after")), draw.choice(list(VECTORS))
        hiding = draw.choice(("lengths", "mask", "both", ""))
        case = Case._make([*form, *sizes, hiding, draw.random() < 0.5, draw.random() < 0.5])
        try:
            check(case, kind, draw.choice(DTYPES))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, number {number}: {case}") from error


def test_long_sequences(kind: type[Decoder]) -> None:
    check(Case("location", "after", layers=2, steps=60), kind, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_threads_are_right(kind: type[Decoder], dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(3)
    for attention in ("additive", "location"):
        check(Case(attention, "before", "fed", 2, 8, 3, 40, 20, 96, 70, 50), kind, dtype)


def test_parts_of_a_sequence_are_the_whole(kind: type[Decoder], form: Case) -> None:
    """The state is carried on, with its gradient."""
    decoder, given = made(kind, form._replace(steps=7))
    memory = decoder.prepare(given.states, given.lengths, given.mask)
    found, state = [], given.state
    for x in given.x.split((3, 1, 3), 1):
        *results, state, weights = decoder(x, memory, state, need_weights=True)
        found.append([*results, weights])
    joined = [*(torch.cat(one, 1) for one in zip(*found, strict=True)), *tensors(state)]
    assert_equal([*joined, *gradients(joined, [*given.leaves, *decoder.parameters()])], outcome(decoder, given))


def test_weights_are_returned_where_they_are_asked_for(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    for state in (None, given.state):
        memory, again = (decoder.prepare(given.states, given.lengths, given.mask) for _ in range(2))
        found, expected = decoder(given.x, memory, state), decoder(given.x, again, state, need_weights=True)
        assert [len(found), len(expected)] == [3, 4]
        assert_same_bits(tensors(found), tensors(expected[:3]))
        wanted = [given.x, given.states, *decoder.parameters()]
        assert_equal(gradients(tensors(found), wanted), gradients(tensors(expected[:3]), wanted))


def test_sizes_of_the_results() -> None:
    decoder, given = made(AttentiveLSTM, Case("location", "after", "vector", 2))
    output, contexts, state, weights = decoder(given.x, decoder.prepare(given.states), given.state, need_weights=True)
    assert [tuple(y.shape) for y in (output, contexts, weights)] == [(3, 4, 7), (3, 4, 11), (3, 4, 9)]
    assert [tuple(y.shape) for y in tensors(state)] == [(2, 3, 13)] * 2 + [(3, 11)] + [(3, 9)] * 2


# Inputs as they come.


@pytest.mark.parametrize("how", ["transposed", "sliced", "shifted", "expanded"])
def test_inputs_that_are_not_contiguous(kind: type[Decoder], form: Case, how: str) -> None:
    decoder, given = made(kind, form)
    plain = [
        spread(y, how).detach().clone(memory_format=torch.contiguous_format).requires_grad_() for y in given.leaves
    ]
    odd = [spread(y, how) for y in plain]
    for y, right in zip(odd, plain, strict=True):
        y.data.copy_(right.data) if how != "expanded" else None

    def with_leaves(leaves: list[Tensor]) -> Given:
        assert given.state is not None
        return given._replace(x=leaves[0], states=leaves[1], state=with_parts(given.state, leaves[2:]))

    if how == "expanded":
        odd = [y.detach()[..., :1].expand(y.shape).requires_grad_() for y in plain]
        plain = [y.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for y in odd]
    assert not any(y.is_contiguous() for y in odd) or how == "shifted"
    assert_equal(outcome(decoder, with_leaves(odd)), outcome(decoder, with_leaves(plain)))


def spread(x: Tensor, how: str) -> Tensor:
    """The same numbers elsewhere in memory."""
    x = x.detach()
    if how == "transposed":
        return x.mT.contiguous().mT.requires_grad_()
    if how == "sliced":
        wide = x.new_zeros(*(n * 2 for n in x.shape))[(slice(None, None, 2),) * x.dim()]
        return wide.copy_(x).requires_grad_()
    if how == "shifted":  # by one number, as no allocation begins
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x).requires_grad_()
    return x.requires_grad_()


def test_incoming_gradients_that_are_not_contiguous(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    results, wanted = call(decoder, given), [*given.leaves, *decoder.parameters()]
    ask = partial(torch.autograd.grad, results, wanted, allow_unused=True, materialize_grads=True, retain_graph=True)
    incoming = [torch.randn_like(y)[..., :1].expand(y.shape) for y in results]
    assert_equal(ask(incoming), ask([y.clone(memory_format=torch.contiguous_format) for y in incoming]))


def test_parameters_that_are_not_contiguous(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    expected, others = outcome(decoder, given), copy.deepcopy(decoder)
    for module in others.modules():
        for name, x in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(spread(x, "sliced")))
    assert not others.weight_hh_l0.is_contiguous()
    assert_equal(outcome(others, given), expected)


@pytest.mark.parametrize("form", FORMS[::2], ids=str)
def test_a_memory_prepared_on_the_reference_backend(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    with attnext.use_backend("reference"):
        memory = decoder.prepare(given.states, given.lengths, given.mask)
    results = tensors(decoder(given.x, memory, given.state)[:2])
    expected = call(decoder, given)[:2]
    assert_equal(results, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_past_of_the_callers_own_making(kind: type[Decoder], dtype: torch.dtype) -> None:
    """In another dtype than the weights', as attention by itself takes it."""
    decoder, given = made(kind, Case("coverage", state=False), torch.float32)
    memory = decoder.prepare(given.states, given.lengths, given.mask)
    past = [torch.rand(3, 9) for _ in range(2)]
    state = decoder.first_state(3)
    found = decoder(given.x, memory, state._replace(attention=Past(*(y.to(dtype) for y in past))))
    expected = decoder(given.x, memory, state._replace(attention=Past(*past)))
    assert_equal(tensors(found), tensors(expected), rtol=1e-5, atol=1e-5)


def test_an_empty_batch(kind: type[Decoder], form: Case) -> None:
    decoder = form.decoder(kind)
    x, states = (torch.zeros(0, 4, n, dtype=torch.float64, requires_grad=True) for n in (5, 11))
    output, contexts, state, weights = decoder(x, decoder.prepare(states), need_weights=True)
    assert [output.shape[:2], contexts.shape, weights.shape] == [(0, 4), (0, 4, 11), (0, 4, 4)]
    assert state.hidden.shape == (form.layers, 0, 13)
    assert all((y == 0).all() for y in gradients([output, contexts, weights], [x, *decoder.parameters()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_key_at_all_is_a_context_of_0(kind: type[Decoder], dtype: torch.dtype) -> None:
    for attention in ("additive", "location", "general"):
        decoder, given = made(kind, Case(attention, state=False), dtype)
        output, contexts, _ = decoder(given.x, decoder.prepare(given.states[:, :0]))
        assert (contexts == 0).all()
        assert output.isfinite().all()


# Hidden slots.


def poisoned(given: Given) -> Given:
    """With NaN and infinity in each slot that is hidden, of the encoder states."""
    lengths, mask = torch.tensor([4, 9, 0]), torch.ones(3, 9, dtype=torch.bool)
    mask[1, [0, 3, 8]] = False
    hidden = ~mask | (torch.arange(9) >= lengths.unsqueeze(1))
    states = given.states.detach().masked_fill(hidden.unsqueeze(-1), torch.nan)
    states[0, 5], states[1, 3, 2], states[2, 8] = torch.inf, -torch.inf, torch.inf
    return given._replace(states=states.requires_grad_(), lengths=lengths, mask=mask)


@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.usefixtures("instruction_set")
def test_hidden_slots_reach_no_result_and_no_gradient(kind: type[Decoder], attention: str, attend: str) -> None:
    for dtype in DTYPES:
        decoder, given = made(kind, Case(attention, attend, "vector", memory=13), dtype)
        given = poisoned(given)
        clean = given._replace(states=given.states.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_())
        found = outcome(decoder, given)
        assert all(y.isfinite().all() for y in found)
        error = Case().tolerance(dtype)
        assert_equal(found, outcome(decoder, clean), rtol=error, atol=error)
        with torch.no_grad():
            assert_equal(call(decoder, given), call(decoder, clean), rtol=error, atol=error)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sentence_without_states_has_contexts_of_0(kind: type[Decoder], attention: str) -> None:
    decoder, given = made(kind, Case(attention, memory=13))
    _, contexts, weights, *_ = call(decoder, given._replace(lengths=torch.tensor([4, 9, 0])))
    assert (contexts[2] == 0).all()
    assert (weights[2] == 0).all()
    assert (contexts[:2] != 0).any(-1).all()


def test_nan_of_a_sentence_stays_in_it(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    clean = call(decoder, given)
    x = given.x.detach().clone()
    x[1, 2, 3] = torch.nan
    found = call(decoder, given._replace(x=x.requires_grad_()))
    assert_same_bits([y[[0, 2]] for y in found[:3]], [y[[0, 2]] for y in clean[:3]])
    assert_same_bits([y[1, :2] for y in found[:2]], [y[1, :2] for y in clean[:2]])
    assert found[0][1, 2:].isnan().all()
    (grad,) = torch.autograd.grad(found[0].square().sum(), x)
    assert grad[[0, 2]].isfinite().all()


# Dropout.


def seeded(decoder: Any, given: Given, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    return outcome(decoder, given)


DROPPED = ("additive", "general", "location", "coverage, sigmoid")


def dropping(kind: type[Decoder], case: Case, between: float, of_weights: float) -> tuple[Any, Given]:
    decoder, given = made(kind, case, dropout=between)
    decoder.attention.dropout = of_weights
    return decoder, given


@pytest.mark.parametrize(("between", "of_weights"), [(0.4, 0.0), (0.0, 0.4), (0.4, 0.4)])
@pytest.mark.parametrize("attention", DROPPED)
def test_dropout_is_of_its_seed_and_of_training_alone(
    kind: type[Decoder], attention: str, between: float, of_weights: float
) -> None:
    case = Case(attention, layers=2)
    decoder, given = dropping(kind, case, between, of_weights)
    plain = copy.deepcopy(decoder)
    plain.dropout = plain.attention.dropout = 0.0
    expected, found = outcome(plain, given), seeded(decoder, given)
    assert_same_bits(seeded(decoder, given), found)
    for others in (expected, seeded(decoder, given, 6)):
        assert not torch.allclose(found[0], others[0])
    assert_same_bits(outcome(decoder.eval(), given), expected)
    assert_same_bits(outcome(plain.eval(), given), expected)


@pytest.mark.parametrize("attention", ["additive", "general"])
def test_each_step_drops_other_weights(kind: type[Decoder], attention: str) -> None:
    decoder, given = dropping(kind, Case(attention), 0.0, 0.5)
    weights = outcome(decoder, given)[2]
    dropped = weights == 0
    assert (dropped[:, 0] != dropped[:, 1]).any()


def test_all_dropped_between_layers(kind: type[Decoder]) -> None:
    """As without the matrix of the layer above."""
    decoder, given = dropping(kind, Case(layers=3), 1.0, 0.0)
    other = copy.deepcopy(decoder)
    other.dropout = 0.0
    with torch.no_grad():
        other.weight_ih_l1.zero_(), other.weight_ih_l2.zero_()
    assert_equal(call(decoder, given), call(other, given))


@pytest.mark.parametrize("attention", DROPPED)
def test_all_weights_dropped(kind: type[Decoder], attention: str) -> None:
    decoder, given = dropping(kind, Case(attention), 0.0, 1.0)
    found = outcome(decoder, given)
    assert (found[1] == 0).all()
    assert all(y.isfinite().all() for y in found)
    with attnext.use_backend("reference"):
        assert_equal(found, outcome(decoder, given))


@pytest.mark.parametrize("attention", DROPPED)
def test_dropout_keeps_the_mean(kind: type[Decoder], attention: str) -> None:
    """Of contexts at the first step, over many sentences of the same states, and of a layer's input from below."""
    decoder, given = dropping(kind, Case(attention, batch=1, steps=1, hidden="", state=False), 0.0, 0.3)
    many = given._replace(x=given.x.expand(4000, -1, -1), states=given.states.expand(4000, -1, -1))
    with torch.no_grad():
        found, exact = call(decoder, many)[1], call(decoder.eval(), given)[1]
    error = found.std(0) / 4000**0.5
    assert (error > 0).all()
    assert ((found.mean(0) - exact[0]).abs() < 5 * error).all()


@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("attention", DROPPED)
def test_gradcheck_with_dropout(kind: type[Decoder], attention: str, attend: str) -> None:
    """Both kinds of it, with the same draws at each call."""
    decoder, given = dropping(kind, Case(attention, attend, "fed", 2, 2, 3, 4, 2, 3, 3, 3), 0.3, 0.3)
    function = partial(function_of_leaves, decoder, given, 8)
    assert torch.autograd.gradcheck(function, leaves_of(decoder, given), fast_mode=True)


# Automatic differentiation.


def function_of_leaves(decoder: Any, given: Given, seed: int, x: Tensor, states: Tensor, *others: Tensor) -> Any:
    """Of all that has a gradient, as torch's checks call it."""
    torch.manual_seed(seed)
    count = len(tensors(given.state))
    state = None if given.state is None else with_parts(given.state, others[:count])
    names = [name for name, _ in decoder.named_parameters()]
    holder = Holder(decoder)
    weights = {f"decoder.{name}": y for name, y in zip(names, others[count:], strict=True)}
    return tuple(torch.func.functional_call(holder, weights, (given._replace(x=x, states=states, state=state),)))


class Holder(nn.Module):
    """A call with its preparation, by the same parameters."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, given: Given) -> list[Tensor]:
        return call(self.decoder, given)


SMALL: dict[str, Any] = {"batch": 2, "steps": 3, "keys": 4, "inputs": 2, "size": 3, "memory": 3, "space": 3}


def test_gradcheck(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form._replace(**SMALL))
    assert torch.autograd.gradcheck(partial(function_of_leaves, decoder, given, 0), leaves_of(decoder, given))


def test_gradgradcheck_on_the_reference_backend(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form._replace(**SMALL | {"steps": 2}))
    with attnext.use_backend("reference"):
        function = partial(function_of_leaves, decoder, given, 0)
        assert torch.autograd.gradgradcheck(function, leaves_of(decoder, given), fast_mode=True)


@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_are_right_or_refused(kind: type[Decoder], form: Case, linear: bool) -> None:
    """Never missing, as from a penalty that is one term of a loss: of a linear loss too."""
    decoder, given = made(kind, form)

    def second() -> list[Tensor]:
        results = call(decoder, given)[:2]
        loss = torch.stack([(y if linear else y.sin()).sum() for y in results]).sum()
        first = torch.autograd.grad(loss, given.x, create_graph=True)[0]
        wanted = [given.x, decoder.weight_hh_l0]
        return list(torch.autograd.grad(torch.stack([y.square().sum() for y in (first, *wanted)]).sum(), wanted))

    with attnext.use_backend("reference"):
        expected = second()
    try:
        found = second()
    except RuntimeError as error:
        assert "second derivative" in str(error)  # noqa: PT017
        assert "use_backend('reference')" in str(error)  # noqa: PT017
    else:
        assert_equal(found, expected)


def test_second_derivatives_of_the_kernels_are_refused(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    first = torch.autograd.grad(call(decoder, given)[1].sin().sum(), given.x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative: run it inside"):
        torch.autograd.grad(first.square().sum(), given.x)


def test_gradients_may_be_asked_for_again(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    results, wanted = call(decoder, given), leaves_of(decoder, given)
    kept = [y.detach().clone() for y in results]
    first = gradients(results, wanted, retain_graph=True)
    assert_same_bits(gradients(results, wanted, retain_graph=True), first)
    assert_same_bits(gradients(results, wanted), first)
    assert_same_bits([y.detach() for y in results], kept)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(results, wanted)


def test_each_gradient_may_be_wanted_alone_or_not_at_all(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    leaves = leaves_of(decoder, given)
    expected = gradients(call(decoder, given), leaves)
    for k in range(len(leaves)):
        for wanted in ([k], [n for n in range(len(leaves)) if n != k]):
            for n, leaf in enumerate(leaves):
                leaf.requires_grad_(n in wanted)
            results = call(decoder, given)
            generator = torch.Generator().manual_seed(3)  # as `gradients` draws them
            factors = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in results]
            reached = [n for n, y in enumerate(results) if y.requires_grad]
            if not reached:  # the weights of a past of which the sum alone is seen
                assert (expected[wanted[0]] == 0).all()
                continue
            found = torch.autograd.grad(
                [results[n] for n in reached], [leaves[n] for n in wanted], [factors[n] for n in reached],
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            assert_equal(found, [expected[n] for n in wanted])


def test_each_result_may_be_used_alone(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    wanted = leaves_of(decoder, given)
    for k in range(len(call(decoder, given))):
        with attnext.use_backend("reference"):
            expected = gradients([call(decoder, given)[k]], wanted)
        assert_equal(gradients([call(decoder, given)[k]], wanted), expected)


def test_without_gradients_nothing_is_recorded(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    expected = [y.detach() for y in call(decoder, given)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = call(decoder, given)
        assert not any(y.requires_grad for y in found)
        assert_equal(found, expected)
    assert found[0].is_inference()
    decoder.requires_grad_(False)
    for leaf in given.leaves:
        leaf.requires_grad_(False)
    found = call(decoder, given)
    assert not any(y.requires_grad for y in found)
    assert_equal(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(kind: type[Decoder], form: Case, reentrant: bool) -> None:
    decoder, given = made(kind, form, dropout=0.3)
    decoder.attention.dropout = 0.3
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        decoder.zero_grad()
        given.x.grad = None

        def run(x: Tensor) -> Tensor:
            return call(decoder, given._replace(x=x))[1]

        contexts = checkpoint(run, given.x, use_reentrant=reentrant) if again else run(given.x)
        contexts.sin().sum().backward()
        found.append([contexts, *tensors([y.grad for y in (given.x, *decoder.parameters())])])
    assert_same_bits(*found)


def test_backward_in_another_thread(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    results, expected, found = call(decoder, given), outcome(decoder, given), []
    wanted = leaves_of(decoder, given)
    thread = threading.Thread(target=lambda: found.extend(gradients(results, wanted)))
    thread.start()
    thread.join(60)
    assert_same_bits([*results, *found], expected)


def test_results_may_be_changed_in_place(kind: type[Decoder], form: Case) -> None:
    """Or autograd says that they may not; a gradient is never wrong."""
    decoder, given = made(kind, form)
    wanted = leaves_of(decoder, given)
    output, contexts, *_ = call(decoder, given)
    try:
        for y in (output, contexts):
            y.mul_(3.0)
        found = gradients([output, contexts], wanted)
    except RuntimeError as error:
        assert "in" in str(error) and "place" in str(error)  # noqa: PT017, PT018
    else:
        output, contexts, *_ = call(decoder, given)
        assert_equal(found, gradients([output * 3.0, contexts * 3.0], wanted))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_state_is_its_own(kind: type[Decoder], backend: str) -> None:
    """What is done to the results in place doesn't change what the next step begins with."""
    for vector in ("", "fed"):
        decoder, given = made(kind, Case("location", "after", vector))
        memory = decoder.prepare(given.states)
        with torch.no_grad(), attnext.use_backend(backend):
            *results, state, weights = decoder(given.x, memory, given.state, need_weights=True)
            before = [y.clone() for y in tensors(state)]
            for y in (*results, weights):
                y.zero_()
        assert_same_bits(tensors(state), before)


@pytest.mark.parametrize("what", ["weight", "first state", "encoder states", "input"])
def test_what_changes_in_place_before_the_backward_pass(kind: type[Decoder], form: Case, what: str) -> None:
    """Is noticed, or was copied and doesn't matter; the backward pass reads a matrix and a state in their places."""
    decoder, given = made(kind, form)
    assert given.state is not None
    wanted, expected = leaves_of(decoder, given), outcome(decoder, given)
    results = call(decoder, given)
    changed = {"weight": decoder.weight_hh_l0, "first state": given.state.hidden, "encoder states": given.states}
    with torch.no_grad():
        changed.get(what, given.x).mul_(2.0)
    try:
        found = gradients(results, wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert what in ("encoder states", "input")
        assert_same_bits([*results, *found], expected)


def test_batches_of_gradients_are_refused(kind: type[Decoder]) -> None:
    """And are those of single ones where the error says."""
    decoder, given = made(kind, Case())
    for backend in ("cpu", "reference"):
        with attnext.use_backend(backend):
            contexts = call(decoder, given)[1]
            incoming = torch.randn(4, *contexts.shape, dtype=torch.float64)
            ask = partial(torch.autograd.grad, contexts, given.x, retain_graph=True)
            if backend == "cpu":
                with pytest.raises(RuntimeError, match=r"take one gradient at a time.*use_backend"):
                    ask(incoming, is_grads_batched=True)
                continue
            (found,) = ask(incoming, is_grads_batched=True)
            assert_equal([found], [torch.stack([ask(one)[0] for one in incoming])])
