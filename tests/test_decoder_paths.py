"""Decoders that attend, with what goes past the operator: other attentions and dtypes, hooks, compilers, threads."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from decoder_cases import (
    DTYPES,
    FORMS,
    SERVED,
    VECTORS,
    Case,
    Decoder,
    Given,
    assert_equal,
    assert_same_bits,
    call,
    formula,
    gradients,
    leaves_of,
    made,
    outcome,
    tensors,
    with_parts,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import attnext
from attnext import BahdanauAttention
from attnext.attention.family import STEPPED

pytestmark = pytest.mark.usefixtures("one_thread")

Calls = list[tuple[Any, ...]]


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by_steps(decoder: Any, given: Given) -> list[Tensor]:
    """As :func:`decoder_cases.call`, by a loop of ``step``."""
    memory, state, found = decoder.prepare(given.states, given.lengths, given.mask), given.state, []
    for y in given.x.unbind(1):
        output, context, state, weights = decoder.step(y, memory, state, need_weights=True)
        found.append((output, context, weights))
    return [*(torch.stack(one, 1) for one in zip(*found, strict=True)), *tensors(state)]


def by_hand(decoder: Any, given: Given) -> list[Tensor]:
    """The same by torch's cells and the attention's own steps, as users write it."""
    memory, parameters = decoder.prepare(given.states, given.lengths, given.mask), dict(decoder.named_parameters())
    first = given.state or decoder.first_state(len(given.x))

    def attend(query: Tensor, past: Any) -> Any:
        return decoder.attention.step(query, memory, past, need_weights=True)

    return formula(decoder, parameters, given.x, first, attend, keeps_past=True)


def with_gradients(results: list[Tensor], decoder: Any, given: Given) -> list[Tensor]:
    """The results that are numbers of their kind, and the gradients of all that has one."""
    results = [y for y in results if y.is_floating_point()]
    reached = [y for y in results if y.requires_grad]
    return [*results, *gradients(reached, leaves_of(decoder, given))]


def assert_by_steps(decoder: Any, given: Given, calls: Calls, **tolerance: float) -> None:
    """No call of the operator, and what a loop of steps gives."""
    del calls[:]
    found = with_gradients(call(decoder, given), decoder, given)
    assert calls == []
    expected = with_gradients(by_steps(decoder, given), decoder, given)
    assert calls == []
    assert_equal(found, expected, **tolerance)


# Whole sequences.


def test_a_loop_of_steps_is_the_whole(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    found = [*by_steps(decoder, given)]
    assert len(calls) == form.steps
    assert_equal([*found, *gradients(found, leaves_of(decoder, given))], outcome(decoder, given))


@pytest.mark.parametrize("options", [("before", ""), ("before", "fed"), ("after", "vector"), ("after", "fed")])
@pytest.mark.parametrize("name", STEPPED)
def test_the_family(kind: type[Decoder], name: str, options: tuple[str, str], calls: Calls) -> None:
    """Whatever serves it, as a loop that users write; results, every state, and gradients."""
    attention = STEPPED[name].make(8, 8, 6)
    decoder: Any = kind(5, 8, attention, 2, attend=options[0], **VECTORS[options[1]]).double()
    given = Case(memory=8, state=False).given(decoder)
    found = with_gradients(call(decoder, given), decoder, given)
    assert len(calls) == (1 if name in SERVED else 0)
    assert_equal(found, with_gradients(by_hand(decoder, given), decoder, given))
    assert_equal(found, with_gradients(by_steps(decoder, given), decoder, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_go_by_steps(kind: type[Decoder], form: Case, dtype: torch.dtype, calls: Calls) -> None:
    decoder, given = made(kind, form, dtype)
    assert_by_steps(decoder, given, calls, rtol=0.02, atol=0.02)
    wide = copy.deepcopy(decoder).double()
    leaves = [y.double() for y in given.leaves[:2]]
    exact = call(wide, given._replace(x=leaves[0], states=leaves[1], state=None))
    for y, right in zip(call(decoder, given._replace(state=None))[:3], exact, strict=False):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), right, rtol=0, atol=form.tolerance(dtype))


def test_autocast_with_another_attention(kind: type[Decoder], calls: Calls) -> None:
    for name in ("sigmoid", "several-heads", "monotonic"):
        decoder: Any = kind(5, 8, STEPPED[name].make(8, 8, 6), 2, attend="after", **VECTORS["fed"])
        given = Case(memory=8, state=False).given(decoder, torch.float32)
        expected = call(decoder, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = with_gradients(call(decoder, given), decoder, given)
            again = with_gradients(by_steps(decoder, given), decoder, given)
        assert calls == []
        assert all(y.dtype == torch.float32 for y in found[:3])
        assert_equal(found[:3], expected[:3], rtol=0, atol=0.05)
        assert_equal(found, again, rtol=0.05, atol=0.05)


def test_on_the_reference_backend(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    expected = outcome(decoder, given)
    with attnext.use_backend("reference"):
        assert_by_steps(decoder, given, calls)
        assert_equal(outcome(decoder, given), expected)


HOOKED: dict[str, Callable[[Any], nn.Module]] = {
    "attention": lambda decoder: decoder.attention,
    "query_projection": lambda decoder: decoder.attention.query_projection,
    "location_convolution": lambda decoder: decoder.attention.location_convolution,
    "location_projection": lambda decoder: decoder.attention.location_projection,
    "readout": lambda decoder: decoder.readout,
}


@pytest.mark.parametrize("vector", ["vector", "fed"])
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_are_run(kind: type[Decoder], where: str, vector: str, calls: Calls) -> None:
    """With whatever they do: here twice the result, as with twice the parameters."""
    attention = "additive" if where == "attention" else "location"
    decoder, given = made(kind, Case(attention, "before", vector))
    before, seen = call(decoder, given), []

    def hook(_: nn.Module, __: Any, result: Any) -> Any:
        seen.append(result)
        return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result

    handle = HOOKED[where](decoder).register_forward_hook(hook)
    assert_by_steps(decoder, given, calls)
    assert seen
    found = call(decoder, given)
    assert not torch.allclose(found[0], before[0])
    if where == "readout":
        handle.remove()
        with torch.no_grad():
            decoder.readout.weight.mul_(2.0), decoder.readout.bias.mul_(2.0)
        assert_equal(call(decoder, given), found)


@pytest.mark.parametrize("form", [*FORMS, Case("concat"), Case("dot", "after")], ids=str)
def test_global_hooks_are_run(kind: type[Decoder], form: Case, calls: Calls) -> None:
    """Of the modules that are called at all; concat and dot call none but the attention."""
    decoder, given = made(kind, form._replace(hidden=""))
    expected, seen = outcome(decoder, given), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert_by_steps(decoder, given, calls)
        assert_equal(outcome(decoder, given), expected)
    finally:
        handle.remove()
    assert seen.count(kind) == 2
    assert type(decoder.attention) in seen or seen.count(nn.Linear) > 8
    assert type(decoder.attention) in seen or form.attention not in ("concat", "dot")


class Sharper(BahdanauAttention):
    """A subclass with a score of its own."""

    def _project_query(self, query: Tensor) -> Tensor:
        return 3 * super()._project_query(query)


class Halved(BahdanauAttention):
    """A subclass with a call of its own."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        context, weights = super().forward(*args, **options)
        return context / 2, weights


class Counted(attnext.CoverageAttention):
    """A subclass with a step of its own."""

    steps = 0

    def step(self, *args: Any, **options: Any) -> Any:
        self.steps += 1
        return super().step(*args, **options)


class Scaled(nn.Linear):
    """A layer with a call of its own, as adapters have."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("attention", [Sharper, Halved, Counted])
def test_subclasses_of_an_attention(kind: type[Decoder], attention: Any, calls: Calls) -> None:
    decoder: Any = kind(5, 13, attention(13, 11, 10)).double()
    given = Case(state=False).given(decoder)
    assert_by_steps(decoder, given, calls)
    assert_equal(call(decoder, given), by_hand(decoder, given))
    plain: Any = kind(5, 13, attention.__base__(13, 11, 10)).double()
    plain.load_state_dict(decoder.state_dict())
    assert torch.allclose(call(decoder, given)[0], call(plain, given)[0]) == (attention is Counted)
    if attention is Counted:
        assert decoder.attention.steps == 5 * given.x.shape[1]


@pytest.mark.parametrize("vector", ["vector", "fed"])
def test_a_readout_with_a_call_of_its_own(kind: type[Decoder], vector: str) -> None:
    decoder, given = made(kind, Case("additive", "after", vector))
    other = copy.deepcopy(decoder)
    other.readout = Scaled(5 + 13 + 11, 7).double()
    other.readout.load_state_dict(decoder.readout.state_dict())
    with torch.no_grad():
        decoder.readout.weight.mul_(2.0), decoder.readout.bias.mul_(2.0)
    assert_equal(call(other, given), call(decoder, given))


@pytest.mark.parametrize("name", ["forward", "step"])
def test_an_attention_that_was_patched(kind: type[Decoder], name: str, calls: Calls) -> None:
    decoder, given = made(kind, Case())
    seen, original = [], getattr(decoder.attention, name)

    def patched(*args: Any, **options: Any) -> Any:
        seen.append(name)
        return original(*args, **options)

    setattr(decoder.attention, name, patched)
    assert_by_steps(decoder, given, calls)
    assert len(seen) == 2 * given.x.shape[1]


NORMED: dict[str, Callable[[Any], Any]] = {
    "weight_hh_l0": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "weight_ih_l0": lambda m: parametrizations.weight_norm(m, "weight_ih_l0"),
    "query_projection": lambda m: parametrizations.weight_norm(m.attention.query_projection),
    "location_convolution": lambda m: parametrizations.weight_norm(m.attention.location_convolution),
    "memory_projection": lambda m: parametrizations.weight_norm(m.attention.memory_projection),
    "readout": lambda m: parametrizations.weight_norm(m.readout),
}


@pytest.mark.parametrize("vector", ["vector", "fed"])
@pytest.mark.parametrize("what", NORMED)
def test_parametrized_weights(kind: type[Decoder], what: str, vector: str) -> None:
    """A norm is the weight that it was, with other gradients; changed, it is followed."""
    decoder, given = made(kind, Case("location", "before", vector))
    expected = call(decoder, given)
    NORMED[what](decoder)
    assert_equal(call(decoder, given), expected)
    found = outcome(decoder, given)
    with attnext.use_backend("reference"):
        assert_equal(outcome(decoder, given), found)
    with torch.no_grad():
        next(x for name, x in decoder.named_parameters() if name.endswith("original0")).mul_(2.0)
    assert not torch.allclose(call(decoder, given)[0], expected[0])


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0"])
def test_pruned_parameters(kind: type[Decoder], form: Case, name: str) -> None:
    decoder, given = made(kind, form)
    prune.l1_unstructured(decoder, name, 0.5)
    found = outcome(decoder, given)
    with attnext.use_backend("reference"):
        assert_equal(outcome(decoder, given), found)
    prune.remove(decoder, name)
    assert_equal(call(decoder, given), found[: len(call(decoder, given))])


@pytest.mark.parametrize("change", ["assigned", "assigned data", "tied", "frozen in part"])
def test_changed_parameters(kind: type[Decoder], form: Case, change: str) -> None:
    decoder, given = made(kind, form._replace(layers=2))
    before = call(decoder, given)[0]
    if change == "assigned":
        decoder.weight_ih_l0 = nn.Parameter(decoder.weight_ih_l0.detach() * 2)
    elif change == "assigned data":
        decoder.weight_hh_l1.data = decoder.weight_hh_l1.data * 2
    elif change == "tied":
        decoder.weight_hh_l1 = decoder.weight_hh_l0
    else:
        decoder.weight_hh_l0.register_hook(torch.zeros_like)
    found = outcome(decoder, given)
    assert torch.allclose(found[0], before) == (change == "frozen in part")
    with attnext.use_backend("reference"):
        assert_equal(outcome(decoder, given), found)


# Compiled, exported, transformed.


class Model(nn.Module):
    """A decoder with its preparation."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, contexts, state = self.decoder(x.sin(), self.decoder.prepare(states, lengths))
        return output.cos(), contexts, state.hidden


@pytest.mark.parametrize(
    "form",
    [Case("additive", "before", "fed"), Case("location", "after", "vector", 2), Case("general", "after")],
    ids=str,
)
@pytest.mark.usefixtures("compiling")
def test_compiled(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    model, lengths = Model(decoder), torch.tensor([9, 4, 1])
    results = torch.compile(model, backend="aot_eager", fullgraph=True)(given.x, given.states, lengths)
    found = [*results, *gradients(results, leaves_of(decoder, given))]
    assert calls == []
    results = model(given.x, given.states, lengths)
    assert len(calls) == 1
    assert_equal(found, [*results, *gradients(results, leaves_of(decoder, given))])


@pytest.mark.usefixtures("compiling")
def test_a_compiled_attention_is_called(kind: type[Decoder], calls: Calls) -> None:
    decoder, given = made(kind, Case())
    expected = call(decoder, given)
    decoder.attention.compile(backend="aot_eager")
    del calls[:]
    assert_equal(call(decoder, given), expected)
    assert calls == []


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_exported(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    model, lengths = Model(decoder).eval(), torch.tensor([9, 4, 1])
    program = torch.export.export(model, (given.x, given.states, lengths), strict=False)
    assert calls == []
    others = given.x.neg(), given.states.flip(0), lengths.flip(0)
    assert_equal(tensors(program.module()(*others)), tensors(model(*others)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_traced(kind: type[Decoder], calls: Calls) -> None:
    decoder, given = made(kind, Case())
    x, memory = given.x.detach(), decoder.requires_grad_(False).prepare(given.states.detach())

    def run(x: Tensor) -> Tensor:
        found: Tensor = decoder(x, memory)[0]
        return found

    traced = torch.jit.trace(run, (x,), check_trace=False)
    assert calls == []
    assert_equal([traced(x.neg())], [run(x.neg())])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_transforms(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    memory, x = decoder.prepare(given.states.detach()), given.x.detach()

    def run(x: Tensor) -> Tensor:
        found: Tensor = decoder(x, memory)[1]
        return found

    xs, y = torch.stack([x, 2 * x]), x.clone().requires_grad_()
    each, grad = [run(one) for one in xs], torch.autograd.grad(run(y).sin().sum(), y)
    del calls[:]
    assert_equal([torch.func.vmap(run)(xs)], [torch.stack(each)])
    with attnext.use_backend("reference"):  # as attention by itself
        found = torch.func.grad(lambda x: run(x).sin().sum())(x)
        pair: Any = torch.func.jvp(run, (x,), (x,))
    assert calls == []
    assert_equal([found, pair[0]], [*grad, each[0]])
    small = 1e-6 * x
    assert_equal([pair[1]], [(run(x + small) - run(x - small)) / 2e-6], rtol=1e-6, atol=1e-8)


def test_functional_call(kind: type[Decoder], form: Case, calls: Calls) -> None:
    decoder, given = made(kind, form)
    model, lengths = Model(decoder), torch.tensor([9, 4, 1])
    others = {name: (2 * x).detach().requires_grad_() for name, x in model.named_parameters()}
    before, found = model(given.x, given.states, lengths)[0], []
    for backend in ("cpu", "reference"):
        with attnext.use_backend(backend):
            results = torch.func.functional_call(model, others, (given.x, given.states, lengths))
            found.append([*results, *gradients(results, [given.x, *others.values()])])
    assert len(calls) == 2
    assert_equal(*found)
    assert not torch.allclose(before, found[0][0])
    assert torch.equal(model(given.x, given.states, lengths)[0], before)  # its own parameters are back


# Threads.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["additive", "general", "location"])
def test_same_inputs_give_the_same_bits_on_any_number_of_threads(
    kind: type[Decoder], attention: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    decoder, given = many(kind, attention, dtype)
    runs = []
    for number in (1, 2, 2, 3):
        threads(number)
        runs.append(outcome(decoder, given))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def many(kind: type[Decoder], attention: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Given]:
    """Steps that three threads share: each has more than 196608 multiply-adds."""
    return made(kind, Case(attention, "before", "fed", 2, 8, 3, 33, 20, 96, 70, 50), dtype)


@pytest.mark.parametrize("attention", ["additive", "general", "location"])
def test_opened_steps_have_the_same_bits_on_any_number_of_threads(
    kind: type[Decoder], attention: str, threads: Callable[[int], None]
) -> None:
    decoder, given = many(kind, attention)
    memory, runs = decoder.eval().prepare(given.states, given.lengths), []
    for number in (1, 2, 3):
        threads(number)
        step = decoder.opened()
        state = step(given.x[:, 0], memory, given.state)[2]
        runs.append(tensors(step(given.x[:, 1], memory, state, need_weights=True)))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_one_decoder_in_two_threads(kind: type[Decoder], threads: Callable[[int], None]) -> None:
    threads(2)
    decoder, given = many(kind, "location")
    cases = [given, given._replace(x=(2 * given.x).detach().requires_grad_(), state=None)]
    expected = [outcome(decoder, one) for one in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(partial(outcome, decoder), cases), expected, strict=True):
                assert_same_bits(found, right)


def test_in_a_fork(kind: type[Decoder], threads: Callable[[int], None]) -> None:
    """As a worker that loads data: with one thread, as OpenMP's others are not there."""
    threads(2)
    decoder, given = many(kind, "additive")
    expected = outcome(decoder, given)

    def run() -> None:
        torch.set_num_threads(1)
        assert_same_bits(outcome(decoder, given), expected)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


# Autocast.


def test_autocast(kind: type[Decoder], form: Case, calls: list[tuple[Any, ...]]) -> None:
    decoder, given = made(kind, form, torch.float32)
    expected = outcome(decoder, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = call(decoder, given)
    found = [*results, *gradients(results, leaves_of(decoder, given))]
    assert len(calls) == 2
    for y, right in zip(found, expected, strict=True):
        assert y.dtype == torch.float32
        # A rounding of the encoder states, the keys and v, which enter a few times; all else is as it was.
        within = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(y, right, rtol=0, atol=within)


def test_autocast_of_inputs_in_its_dtype(kind: type[Decoder], form: Case) -> None:
    """As a model's own layers give them there, first states among them."""
    decoder, given = made(kind, form, torch.float32)
    leaves = [y.detach().bfloat16() for y in given.leaves]
    assert given.state is not None
    low = given._replace(x=leaves[0], states=leaves[1], state=with_parts(given.state, leaves[2:]))
    high = low._replace(x=leaves[0].float(), states=leaves[1].float(), state=low.state.map(
        lambda y, _: y.float(), lambda past: past.map(lambda y: y.float())))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = call(decoder, low), call(decoder, high)
    assert_equal(found, expected, rtol=1e-5, atol=1e-5)
    assert all(y.dtype == torch.float32 for y in found)


def test_autocast_leaves_float64_alone(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    expected = outcome(decoder, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(decoder, given)
    assert_same_bits(found, expected)


def test_backward_inside_autocast(kind: type[Decoder], form: Case) -> None:
    """Of what is the operator's own: torch multiplies with a projection's matrix in autocast's dtype."""
    decoder, given = made(kind, form, torch.float32)
    assert given.state is not None
    results, wanted = call(decoder, given), [given.x, given.state.hidden, *decoder.parameters(recurse=False)]
    expected = gradients(results[1:2], wanted, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(results[1:2], wanted)
    assert_same_bits(found, expected)


@pytest.mark.filterwarnings("ignore:attnext has no kernels for 'meta':RuntimeWarning")
@pytest.mark.parametrize("make", [BahdanauAttention, attnext.LocationSensitiveAttention, attnext.CoverageAttention])
def test_steps_read_no_number(kind: type[Decoder], make: Any) -> None:
    """Tensors without numbers go through all of it: what a GPU's graph captures may not depend on any."""
    with torch.device("meta"):
        decoder: Any = kind(5, 7, make(7, 12, 4), 2, vector_size=3, input_feeding=True)
        memory, inputs = decoder.prepare(torch.randn(2, 9, 12)), torch.randn(2, 3, 5)
        output, contexts, state, weights = decoder(inputs, memory, need_weights=True)
        output.sum().backward()
        found = decoder.opened()(inputs[:, 0], memory, state)
    assert (output.shape, contexts.shape, weights.shape) == ((2, 3, 3), (2, 3, 12), (2, 3, 9))
    assert found[0].shape == (2, 3)
    assert all(x.grad is not None and x.grad.is_meta for x in decoder.parameters())
