"""The recurrent layers against their formulas in float64, and against torch's own where users rely on what these do."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import pickle
import random
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu_build as harness
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)
from torch.utils.checkpoint import checkpoint

import attnext
from attnext import GRU, LSTM, _extension
from attnext.backends import cpu

EXTENSION = _extension.load()
assert EXTENSION is not None, _extension.status().reason
TORCHS: dict[type[nn.RNNBase], type[nn.RNNBase]] = {GRU: nn.GRU, LSTM: nn.LSTM}
EXACT = {"rtol": 1e-11, "atol": 1e-12}
"""Of float64: sums of up to some hundred terms of about 1, over some steps."""
DTYPES = (torch.float32, torch.float64)
pytestmark = pytest.mark.usefixtures("one_thread")  # where no test asks for more


@pytest.fixture(params=TORCHS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[nn.RNNBase]:
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own layers fail: what passes was served by the operator."""

    def fail(*_: Any) -> None:
        raise AssertionError("torch's own layer was called")

    for original in TORCHS.values():
        monkeypatch.setattr(original, "forward", fail)


# What is compared.


def both(kind: type[nn.RNNBase], *sizes: Any, **options: Any) -> tuple[nn.RNNBase, nn.RNNBase]:
    """A layer of ours and torch's own with the same parameters; in float64 unless said otherwise."""
    options = {"dtype": torch.float64} | options
    ours, theirs = kind(*sizes, **options), TORCHS[kind](*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def tensors(result: Any) -> list[Tensor]:
    """The output and the last states, or what else layers are given or give, without the brackets."""
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [x for one in result for x in tensors(one)]


def first_states(layer: nn.RNNBase, batch: int | None, dtype: torch.dtype = torch.float64) -> Any:
    """Random ones, that have gradients; without a batch where it is None."""
    size = [layer.num_layers * (2 if layer.bidirectional else 1), layer.hidden_size]
    if batch is not None:
        size.insert(1, batch)
    states = [torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(1 if layer.mode == "GRU" else 2)]
    return state_of(layer, states)


def inputs(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype, requires_grad=True)


def state_of(layer: nn.RNNBase, states: Sequence[Tensor]) -> Any:
    """As a layer takes it."""
    return None if not states else states[0] if layer.mode == "GRU" else tuple(states)


def random_like(results: Sequence[Tensor]) -> list[Tensor]:
    """The same for the same sizes."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in results]


def gradients(results: Sequence[Tensor], wanted: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Of a sum of the results with random factors."""
    return list(torch.autograd.grad(results, wanted, random_like(results), **options))


def outcome(layer: nn.Module, x: Any, state: Any = None) -> list[Tensor]:
    """The results of a call and all its gradients."""
    results = tensors(layer(x, state))
    return [*results, *gradients(results, [*tensors(x), *tensors(state), *layer.parameters()])]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or EXACT))


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_equal(found, expected, rtol=0, atol=0)


def attempt(call: Callable[[], Any]) -> list[Tensor] | type[Exception]:
    """What comes of a call, of which nobody has said whether it is an error."""
    try:
        return tensors(call())
    except Exception as error:
        return type(error)


def assert_as_torchs(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """The same numbers, dtypes and sizes, or the same kind of error."""
    found, expected = attempt(ours), attempt(theirs)
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected
    else:
        assert_equal(found, expected)


# The formulas, as torch's documentation has them.


def one_step(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    w_input, w_hidden, b_input, b_hidden = (*weights, *[torch.zeros((), dtype=x.dtype)] * 2)[:4]
    of_input, of_hidden = x @ w_input.T + b_input, state[0] @ w_hidden.T + b_hidden
    if len(state) == 2:
        i, f, g, o = (of_input + of_hidden).chunk(4, 1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    r, z, n = zip(of_input.chunk(3, 1), of_hidden.chunk(3, 1), strict=True)
    update = sum(z).sigmoid()
    return ((1 - update) * (n[0] + sum(r).sigmoid() * n[1]).tanh() + update * state[0],)


def formula(x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Sequence[Tensor]], both_ways: bool) -> list[Tensor]:
    """Of x (T, B, I), first states (layers directions, B, S) and the parameters of each layer and direction."""
    ended, directions = [], 2 if both_ways else 1
    for first in range(0, len(weights), directions):
        outputs = []
        for k in range(first, first + directions):
            backwards, states = k > first, [tuple(y[k] for y in state)]
            for row in x.flip(0) if backwards else x:
                states.append(one_step(row, states[-1], weights[k]))
            ended.append(states[-1])
            hidden = [one[0] for one in states[1:]]
            outputs.append(torch.stack(hidden[::-1] if backwards else hidden))
        x = torch.cat(outputs, 2)
    return [x, *map(torch.stack, zip(*ended, strict=True))]


def exactly(xs: Tensor) -> Tensor:
    return xs.detach().double().requires_grad_()


class Case(NamedTuple):
    """Sizes of a call. Without a batch (None) the input is (T, I)."""

    batch: int | None
    steps: int
    inputs: int
    size: int
    layers: int = 1
    both_ways: bool = False
    bias: bool = True
    batch_first: bool = False
    states: bool = True

    def layer(self, kind: type[nn.RNNBase], dtype: torch.dtype) -> nn.RNNBase:
        return kind(
            self.inputs, self.size, self.layers, self.bias, self.batch_first, bidirectional=self.both_ways, dtype=dtype
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        """In parts of the larger of 1 and a result.

        Rounding errors add up like the steps of a drunkard: of the I + S terms of a gate, of the T B terms of a
        gradient, of the steps that an error is handed on through; each layer adds its own. The constant is for the
        roundings of a step's other operations.
        """
        terms = self.inputs + self.size * (2 if self.both_ways else 1) + self.steps * (self.batch or 1)
        return 3 * self.layers * math.sqrt(terms) * torch.finfo(dtype).eps


def check(case: Case, kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """Results and gradients against the formulas in float64."""
    layer, batch = case.layer(kind, dtype), case.batch or 1
    x, states = inputs(case.steps, batch, case.inputs, dtype=dtype), tensors(first_states(layer, batch, dtype))
    given = x.transpose(0, 1).contiguous() if case.batch_first else x
    leaves = [x, *states] if case.states else [x]
    if case.batch is None:
        given, results = x[:, 0], tensors(layer(x[:, 0], state_of(layer, [y[:, 0] for y in leaves[1:]])))
        assert results[0].dim() == results[1].dim() == 2
        results = [y.unsqueeze(1) for y in results]
    else:
        results = tensors(layer(given, state_of(layer, leaves[1:])))
        assert results[0].shape[:2] == given.shape[:2]
        results[0] = results[0].transpose(0, 1) if case.batch_first else results[0]
    found = [*results, *gradients(results, [*leaves, *layer.parameters()])]
    exact, weights = [exactly(y) for y in (x, *states)], [[exactly(w) for w in one] for one in layer.all_weights]
    first = tuple(exact[1:] if case.states else [torch.zeros_like(y) for y in exact[1:]])
    expected = formula(exact[0], first, weights, case.both_ways)
    expected += gradients(expected, [*exact[: len(leaves)], *(w for one in weights for w in one)])
    error = case.tolerance(dtype)
    for y, right in zip(found, expected, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), right, rtol=0, atol=error * max(1.0, float(right.detach().abs().max())))


CASES = (
    Case(1, 1, 1, 1),
    Case(1, 7, 5, 3, both_ways=True),
    Case(2, 2, 5, 16, layers=2),
    Case(3, 7, 20, 17, layers=2, both_ways=True),
    Case(7, 2, 1, 31, layers=3, both_ways=True, bias=False),
    Case(8, 7, 5, 48, batch_first=True),
    Case(9, 2, 20, 65, both_ways=True, batch_first=True, states=False),
    Case(17, 7, 5, 16, both_ways=True, bias=False, batch_first=True),
    Case(33, 7, 20, 65, layers=2, both_ways=True),
    Case(33, 1, 1, 31, layers=3, states=False),
    Case(17, 2, 20, 1, layers=2, both_ways=True, states=False),
    Case(None, 7, 5, 17, layers=2, both_ways=True),
    Case(None, 1, 1, 3, states=False),
    Case(None, 2, 20, 65, bias=False),
    Case(2, 120, 3, 16),
    Case(9, 70, 4, 5, both_ways=True),  # more rows than the operator takes at once
    Case(5, 3, 40, 257, both_ways=True),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.usefixtures("instruction_set")
def test_table(case: Case, kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    check(case, kind, dtype)


@pytest.mark.usefixtures("instruction_set")
def test_random_cases(kind: type[nn.RNNBase]) -> None:
    seed = secrets.randbits(32)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(20):
        sizes = draw.choice((None, *range(1, 20))), draw.randint(1, 6), draw.randint(1, 24), draw.randint(1, 40)
        flags = [draw.random() < 0.5 for _ in range(4)]
        case = Case(*sizes, draw.choice((1, 1, 2, 3)), *flags)
        case = case._replace(batch_first=case.batch_first and case.batch is not None)
        try:
            check(case, kind, draw.choice(DTYPES))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, number {number}: {case}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("only_ours")
def test_the_operator_serves(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    for case in CASES:
        check(case, kind, dtype)
    layer = kind(3, 4, 2, dropout=0.5, dtype=dtype)
    outcome(layer, pack_sequence([inputs(n, 3, dtype=dtype) for n in (2, 4)], enforce_sorted=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs(2, 3, 3, dtype=dtype))


# Packed sequences.

LENGTHS = {
    "sorted": [7, 5, 5, 2, 1],
    "unsorted": [2, 7, 1, 5, 7],
    "of one step": [1, 1, 1],
    "equal": [4] * 4,
    "one": [6],
}


def each_alone(layer: nn.RNNBase, sequences: Sequence[Tensor], state: Any) -> list[Tensor]:
    """The outputs of all sequences one after the other, and their last states."""
    results = []
    for number, x in enumerate(sequences):
        first = tuple(y[:, number : number + 1] for y in tensors(state))
        results.append(formula(x.unsqueeze(1), first, layer.all_weights, layer.bidirectional))
    outputs, *last = zip(*results, strict=True)
    return [torch.cat(outputs)[:, 0], *(torch.cat(y, 1) for y in last)]


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences_are_as_each_alone(
    kind: type[nn.RNNBase], lengths: str, batch_first: bool, both_ways: bool
) -> None:
    layer = kind(5, 17, 2, batch_first=batch_first, bidirectional=both_ways, dtype=torch.float64)
    sequences = [inputs(n, 5) for n in LENGTHS[lengths]]
    state = first_states(layer, len(sequences))
    packed = pack_sequence(sequences, enforce_sorted=lengths != "unsorted")
    output, last = layer(packed, state)
    assert isinstance(output, PackedSequence)
    found, expected = [torch.cat(unpack_sequence(output)), *tensors(last)], each_alone(layer, sequences, state)
    assert_equal(found, expected)
    wanted = [*sequences, *tensors(state), *layer.parameters()]
    assert_equal(gradients(found, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_packed_result_is_packed_as_its_input(kind: type[nn.RNNBase], enforce_sorted: bool) -> None:
    ours, theirs = both(kind, 5, 6, batch_first=True)
    lengths = [4, 3, 1] if enforce_sorted else [1, 4, 3]
    packed = pack_padded_sequence(inputs(3, 4, 5), lengths, batch_first=True, enforce_sorted=enforce_sorted)
    found, expected = ours(packed)[0], theirs(packed)[0]
    assert torch.equal(found.batch_sizes, packed.batch_sizes)
    for one, other in ((found.sorted_indices, expected.sorted_indices), (found.unsorted_indices, expected[3])):
        assert one is None if other is None else torch.equal(one, other)
    padded = [pad_packed_sequence(y, batch_first=True, padding_value=-1.0)[0] for y in (found, expected)]
    assert_equal(padded[:1], padded[1:])
    assert_equal(outcome(ours, packed), outcome(theirs, packed))


# The interface is torch's own.

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True},
    {"num_layers": 2, "dtype": torch.float64, "device": "cpu"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_made_and_stored_as_torchs_own(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    layers = []
    for one in (kind, TORCHS[kind]):
        torch.manual_seed(1)
        layers.append(one(5, 6, **options))
    ours, theirs = layers
    assert isinstance(ours, TORCHS[kind])
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))
    for one, other in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            one.weight_hh_l0.add_(1.0)
        assert str(other.load_state_dict(one.state_dict())) == "<All keys matched successfully>"
    ours.flatten_parameters()
    x = inputs(2, 3, 5, dtype=ours.weight_hh_l0.dtype)
    assert_equal(outcome(ours.eval(), x), outcome(theirs.eval(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((0, 4), {}),
        ((3, 0), {}),
        ((3, 4.0), {}),
        ((3, 4, 0), {}),
        ((3, 4), {"dropout": 1.5}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"batch_first": None}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"nonlinearity": "relu"}),
    ],
)
def test_wrong_options_are_torchs_errors(kind: type[nn.RNNBase], sizes: tuple[Any, ...], options: Any) -> None:
    expected = attempt(lambda: TORCHS[kind](*sizes, **options))
    assert isinstance(expected, type)
    assert attempt(lambda: kind(*sizes, **options)) is expected


def test_dropout_of_one_layer_is_warned_of(kind: type[nn.RNNBase]) -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        kind(3, 4, dropout=0.5)


def test_copies_and_pickles(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 6, 2, bidirectional=True, dtype=torch.float64)
    x, file = inputs(3, 2, 5), io.BytesIO()
    expected = outcome(layer, x)
    torch.save(layer, file)
    file.seek(0)
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(one) is kind
        assert_same_bits(outcome(one, x), expected)
        with torch.no_grad():
            one.bias_hh_l1_reverse.add_(1.0)  # its own
        assert not torch.equal(one(x)[0], expected[0])
    assert_same_bits(outcome(layer, x), expected)


WRONG: dict[str, Callable[[Callable[..., Any]], tuple[Any, Any]]] = {
    "features": lambda zeros: (torch.ones(3, 2, 6), None),
    "one dimension": lambda zeros: (torch.ones(5), None),
    "four dimensions": lambda zeros: (torch.ones(1, 3, 2, 5), None),
    "a list": lambda zeros: ([1.0, 2.0], None),
    "nothing": lambda zeros: (None, None),
    "float64": lambda zeros: (torch.ones(3, 2, 5).double(), None),
    "integers": lambda zeros: (torch.ones(3, 2, 5, dtype=torch.int64), None),
    "states' size": lambda zeros: (torch.ones(3, 2, 5), zeros(1, 2, 5)),
    "states' batch": lambda zeros: (torch.ones(3, 2, 5), zeros(1, 3, 4)),
    "states' layers": lambda zeros: (torch.ones(3, 2, 5), zeros(2, 2, 4)),
    "states' dimensions": lambda zeros: (torch.ones(3, 2, 5), zeros(2, 4)),
    "states with a batch": lambda zeros: (torch.ones(3, 5), zeros(1, 1, 4)),
    "states in float64": lambda zeros: (torch.ones(3, 2, 5), zeros(1, 2, 4, dtype=torch.float64)),
    "states are numbers": lambda zeros: (torch.ones(3, 2, 5), (0.0, 0.0)),
    "a tensor of a pair": lambda zeros: (torch.ones(3, 2, 5), torch.zeros(2, 1, 2, 4)),
    "one state": lambda zeros: (torch.ones(3, 2, 5), (torch.zeros(1, 2, 4),)),
    "three states": lambda zeros: (torch.ones(3, 2, 5), (torch.zeros(1, 2, 4),) * 3),
    "no steps": lambda zeros: (torch.ones(0, 2, 5), None),
    "no steps, no batch": lambda zeros: (torch.ones(0, 5), None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_are_torchs_errors(kind: type[nn.RNNBase], wrong: str) -> None:
    ours, theirs = both(kind, 5, 4, dtype=torch.float32)

    def zeros(*size: int, **options: Any) -> Any:
        return state_of(ours, [torch.zeros(*size, **options)] * (1 if kind is GRU else 2))

    expected = attempt(lambda: theirs(*WRONG[wrong](zeros)))
    assert isinstance(expected, type)
    assert attempt(lambda: ours(*WRONG[wrong](zeros))) is expected


WRONG_PACKED: dict[str, tuple[Sequence[Tensor], tuple[int, ...]]] = {
    "features": ([torch.ones(3, 6)] * 2, (1, 2, 4)),
    "features, of other lengths": ([torch.ones(3, 6), torch.ones(1, 6)], (1, 2, 4)),
    "states' batch": ([torch.ones(3, 5)] * 2, (1, 3, 4)),
    "states' batch, of other lengths": ([torch.ones(3, 5), torch.ones(1, 5)], (1, 3, 4)),
    "states' layers": ([torch.ones(3, 5)] * 2, (2, 2, 4)),
    "states' size": ([torch.ones(3, 5)] * 2, (1, 2, 5)),
    "states' dimensions": ([torch.ones(3, 5)] * 2, (2, 4)),
}


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_wrong_packed_inputs_are_refused(kind: type[nn.RNNBase], wrong: str) -> None:
    """Torch's own LSTM looks at no size here, and reads what lies behind the tensors: it is not asked."""
    layer, (sequences, size) = kind(5, 4), WRONG_PACKED[wrong]
    state = state_of(layer, [torch.zeros(size)] * (1 if kind is GRU else 2))
    with pytest.raises(RuntimeError, match=r"must be equal to input_size|Expected hidden.* size|dimension"):
        layer(pack_sequence(sequences), state)


def test_packed_inputs_of_another_dtype_are_torchs_errors(kind: type[nn.RNNBase]) -> None:
    ours, theirs = both(kind, 5, 4, dtype=torch.float32)
    packed = pack_sequence([torch.ones(3, 5).double(), torch.ones(1, 5).double()])
    expected = attempt(lambda: theirs(packed))
    assert isinstance(expected, type)
    assert attempt(lambda: ours(packed)) is expected


def test_a_list_of_states(kind: type[nn.RNNBase]) -> None:
    ours, theirs = both(kind, 5, 4)
    x, states = inputs(3, 2, 5), [torch.zeros(1, 2, 4, dtype=torch.float64)] * (1 if kind is GRU else 2)
    assert_as_torchs(lambda: ours(x, states), lambda: theirs(x, states))


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(kind: type[nn.RNNBase], batch_first: bool) -> None:
    ours, theirs = both(kind, 5, 4, 2, batch_first=batch_first, bidirectional=True)
    x = inputs(0, 3, 5) if batch_first else inputs(3, 0, 5)
    assert_same_bits(outcome(ours, x), outcome(theirs, x))
    assert_as_torchs(lambda: ours(x.new_zeros(0, 0, 5)), lambda: theirs(x.new_zeros(0, 0, 5)))


def strided(shape: tuple[int, ...], how: str) -> Tensor:
    if how == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).mT
    if how == "steps reversed in memory":
        return torch.randn(shape[1], shape[0], *shape[2:], dtype=torch.float64).transpose(0, 1)
    if how == "sliced":
        return torch.randn(*(n * 2 + 1 for n in shape), dtype=torch.float64)[1::2, 1::2, 1::2]
    if how == "shifted":  # by one number, as no allocation begins
        return torch.randn(math.prod(shape) + 1, dtype=torch.float64)[1:].view(shape)
    return torch.randn(shape[-1], dtype=torch.float64).expand(shape)


@pytest.mark.parametrize("how", ["transposed", "steps reversed in memory", "sliced", "shifted", "expanded"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_that_are_not_contiguous(kind: type[nn.RNNBase], batch_first: bool, how: str) -> None:
    layer = kind(5, 17, 2, batch_first=batch_first, bidirectional=True, dtype=torch.float64)
    x = strided((3, 4, 5), how).requires_grad_()
    states = [strided((4, 3 if batch_first else 4, 17), how).requires_grad_() for _ in range(1 if kind is GRU else 2)]
    plain = [y.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for y in (x, *states)]
    expected = outcome(layer, plain[0], state_of(layer, plain[1:]))
    assert_equal(outcome(layer, x, state_of(layer, states)), expected)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_incoming_gradients_that_are_not_contiguous(kind: type[nn.RNNBase], how: str) -> None:
    layer = kind(5, 17, 2, bidirectional=True, dtype=torch.float64)
    x = inputs(3, 4, 5)
    results, wanted = tensors(layer(x)), [x, *layer.parameters()]
    incoming = [strided(tuple(y.shape), how) for y in results]
    found = torch.autograd.grad(results, wanted, incoming, retain_graph=True)
    plain = [y.clone(memory_format=torch.contiguous_format) for y in incoming]
    assert_equal(found, torch.autograd.grad(results, wanted, plain))


def test_weights_that_are_not_contiguous(kind: type[nn.RNNBase]) -> None:
    ours, theirs = both(kind, 5, 17)
    for layer in (ours, theirs):
        for name, one in list(layer.named_parameters()):
            spread = torch.randn(*(n * 2 for n in one.shape), dtype=torch.float64)[(slice(None, None, 2),) * one.dim()]
            setattr(layer, name, nn.Parameter(spread.copy_(one.detach())))
    x = inputs(3, 4, 5)
    assert not ours.weight_hh_l0.is_contiguous()
    assert_equal(outcome(ours, x), outcome(theirs, x))


# Which gradients are wanted.


@pytest.mark.parametrize("bias", [False, True])
def test_each_gradient_may_be_wanted_alone_or_not_at_all(kind: type[nn.RNNBase], bias: bool) -> None:
    layer = kind(5, 6, 2, bias, bidirectional=True, dtype=torch.float64)
    x, state = inputs(3, 2, 5), first_states(layer, 2)
    leaves = [x, *tensors(state), *layer.parameters()]
    results = tensors(layer(x, state))
    expected = gradients(results, leaves)
    for k in range(len(leaves)):
        for wanted in ([k], [n for n in range(len(leaves)) if n != k]):
            for n, leaf in enumerate(leaves):
                leaf.requires_grad_(n in wanted)
            again = tensors(layer(x, state))
            reached = [y for y in again if y.requires_grad]
            incoming = {id(y): g for y, g in zip(again, random_like(again), strict=True)}
            found = torch.autograd.grad(reached, [leaves[n] for n in wanted], [incoming[id(y)] for y in reached])
            assert_equal(found, [expected[n] for n in wanted])
            assert all(not leaves[n].requires_grad or leaves[n].grad is None for n in range(len(leaves)))


@pytest.mark.parametrize("packed", [False, True])
def test_each_result_may_be_used_alone(kind: type[nn.RNNBase], packed: bool) -> None:
    ours, theirs = both(kind, 5, 6, 2, bidirectional=True)
    x = inputs(3, 2, 5)

    def of_one(layer: nn.RNNBase, k: int) -> list[Tensor]:
        result = tensors(layer(pack_padded_sequence(x, [3, 1]) if packed else x))[k]
        return gradients([result], [x, *layer.parameters()], allow_unused=True)

    for k in range(2 if kind is GRU else 3):
        for y, right in zip(of_one(ours, k), of_one(theirs, k), strict=True):
            torch.testing.assert_close(torch.zeros_like(right) if y is None else y, right, **EXACT)


def test_states_are_carried_on(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 17, 2, dtype=torch.float64)
    x = inputs(7, 3, 5)
    output, last = layer(x)
    first, state = layer(x[:3])
    kept = [y.detach().clone() for y in tensors(state)]
    second, ended = layer(x[3:], state)
    assert_same_bits([y.detach() for y in tensors(state)], kept)
    wanted, found, expected = [x, *layer.parameters()], [first, second, *tensors(ended)], tensors((output, last))
    found = [torch.cat(found[:2]), *found[2:]]
    assert_equal([*found, *gradients(found, wanted)], [*expected, *gradients(expected, wanted)])


def test_without_gradients_nothing_is_recorded(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 17, 2, bidirectional=True)
    x = inputs(3, 4, 5, dtype=torch.float32)
    expected = tensors(layer(x))
    assert all(y.requires_grad for y in expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = tensors(layer(x))
        assert not any(y.requires_grad for y in found)
        assert_same_bits(found, [y.detach() for y in expected])
    assert all(y.is_inference() for y in found)
    found = tensors(layer.requires_grad_(False)(x.detach()))
    assert not any(y.requires_grad for y in found)


def test_results_may_be_changed_in_place(kind: type[nn.RNNBase]) -> None:
    """As models do that mask or scale them, or set dropout to work in place."""
    ours, theirs = both(kind, 5, 6, 2, bidirectional=True, batch_first=True)
    x, found = inputs(3, 2, 5), []
    for layer in (ours, theirs):
        results = tensors(layer(x))
        for y in results:
            y.mul_(3.0)
        found.append([*results, *gradients(results, [x, *layer.parameters()])])
    assert_equal(*found)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_changes_in_place_before_the_backward_pass_is_noticed(kind: type[nn.RNNBase], what: str) -> None:
    layer = kind(5, 6, dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    output, _ = layer(x)
    with torch.no_grad():
        (x if what == "input" else layer.weight_hh_l0).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Dropout.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_as_torchs_own(
    kind: type[nn.RNNBase], packed: bool, batch_first: bool, p: float, training: bool
) -> None:
    layers = both(kind, 5, 16, 3, batch_first=batch_first, dropout=p, bidirectional=True)
    x, found = inputs(4, 4, 5), []
    given = pack_padded_sequence(x, [4, 2, 2, 1], batch_first=batch_first) if packed else x
    for layer in layers:
        torch.manual_seed(7)
        found.append([*outcome(layer.train(training), given), torch.get_rng_state()])
    assert_equal(*found)


# What users do with the parameters.


def test_results_follow_an_optimizer(kind: type[nn.RNNBase]) -> None:
    x, losses = inputs(3, 4, 5), []
    for layer in both(kind, 5, 6, 2, bidirectional=True):
        optimizer, seen = torch.optim.Adam(layer.parameters(), 0.01), []
        for _ in range(4):
            loss = layer(x)[0].square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    assert (losses[0].diff() < 0).all()
    # Adam divides by the root of the squares: what a gradient is off by counts in parts of itself.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "assigned": lambda m: setattr(m, "weight_ih_l0", nn.Parameter(m.weight_ih_l0.detach() * 2)),
    "assigned data": lambda m: setattr(m.weight_hh_l1, "data", m.weight_hh_l1.data * 2),
    "tied": lambda m: setattr(m, "weight_hh_l1", m.weight_hh_l0),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval(), "weight_hh_l1"),
    "parametrized": lambda m: parametrize.register_parametrization(m, "bias_hh_l0", nn.Tanh()),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "frozen in part": lambda m: m.weight_hh_l0.register_hook(torch.zeros_like),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters(kind: type[nn.RNNBase], change: str) -> None:
    x, layers = inputs(3, 4, 5), both(kind, 5, 6, 2)
    before, found = layers[0](x)[0], []
    for layer in layers:
        layer(x)
        torch.manual_seed(2)  # of the vectors of a spectral norm
        CHANGES[change](layer)
        found.append([*outcome(layer, x), *outcome(layer, x)])  # again, as a norm's parameter is made anew
    assert_equal(*found)
    assert (change in ("weight_norm", "old weight_norm", "frozen in part")) == torch.allclose(before, found[0][0])


def test_a_parametrization_may_be_cached_and_removed(kind: type[nn.RNNBase]) -> None:
    x, found = inputs(3, 4, 5), []
    for layer in both(kind, 5, 6):
        parametrizations.weight_norm(layer, "weight_hh_l0")
        with parametrize.cached():
            found.append(outcome(layer, x))
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
        found[-1] += outcome(layer, x)
    assert_equal(*found)


def test_converted_after_it_was_made(kind: type[nn.RNNBase]) -> None:
    ours, theirs = both(kind, 5, 17, 2, bidirectional=True, dtype=torch.float32)
    x = inputs(3, 4, 5)
    assert_equal(outcome(ours.double(), x), outcome(theirs.double(), x))
    low = [y.to(torch.float32) for y in outcome(ours, x)]
    assert_equal(outcome(ours.float(), x.detach().float().requires_grad_()), low, rtol=1e-4, atol=1e-4)
    assert_equal(outcome(ours.to(torch.float64), x), outcome(theirs, x))


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes_are_torchs_own(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    ours, theirs = both(kind, 5, 17, 2, bidirectional=True, dtype=torch.float32)
    x = torch.randn(3, 4, 5).to(dtype)
    found, expected = tensors(ours.to(dtype)(x)), tensors(theirs.to(dtype)(x))
    assert [y.dtype for y in found] == [dtype] * len(found)
    assert_same_bits(found, expected)


def test_a_meta_layer_is_torchs_own(kind: type[nn.RNNBase]) -> None:
    ours, theirs = both(kind, 5, 6, device="meta")
    x = torch.empty(3, 4, 5, dtype=torch.float64, device="meta")
    assert [y.shape for y in tensors(ours(x))] == [y.shape for y in tensors(theirs(x))]
    ours.to_empty(device="cpu").load_state_dict(both(kind, 5, 6)[0].state_dict())
    assert ours(torch.ones(3, 4, 5, dtype=torch.float64))[0].isfinite().all()


@pytest.mark.parametrize("both_ways", [False, True])
def test_projections_are_torchs_own(both_ways: bool) -> None:
    ours, theirs = both(LSTM, 5, 6, 2, bidirectional=both_ways, proj_size=3)
    x = inputs(4, 2, 5)
    given = pack_padded_sequence(x, [4, 2])
    assert repr(ours) == repr(theirs)
    for y in (x, given):
        assert_same_bits(outcome(ours, y), outcome(theirs, y))


AUTOCAST = [
    (x, state, lengths)
    for x in (torch.float32, torch.bfloat16)
    for state in (None, torch.float32, torch.bfloat16)
    for lengths in (None, [4, 3, 1], [4, 4, 4])
]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("of_input", "of_state", "lengths"), AUTOCAST, ids=str)
def test_autocast(
    kind: type[nn.RNNBase], of_input: torch.dtype, of_state: Any, lengths: list[int] | None, recorded: bool
) -> None:
    """The dtypes are torch's own; the numbers, which torch rounds to bfloat16 at every step, are near."""
    layers, steps = both(kind, 5, 17, 2, dtype=torch.float32), 4
    x, found = torch.randn(steps, 3, 5).to(of_input), []
    states = [torch.randn(2, 3, 17).to(of_state) for _ in range(1 if kind is GRU else 2)] if of_state else []
    state, given = state_of(layers[0], states), x if lengths is None else pack_padded_sequence(x, lengths)
    for layer in layers:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(recorded):
            results = tensors(layer(given, state))
        of_weights = gradients(results, list(layer.parameters())) if recorded else []
        assert all(y.dtype == torch.float32 for y in of_weights)
        found.append([*results, *of_weights])
    for y, right in zip(*found, strict=True):
        assert y.dtype == right.dtype
        # A rounding of the weights, the input and the states at every step and layer.
        error = 2 * steps * torch.finfo(torch.bfloat16).eps * max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(y, right, rtol=0, atol=error)


@pytest.mark.parametrize(("of_input", "dtype"), [
    (torch.float64, torch.float64), (torch.float16, torch.float32), (torch.float64, torch.float32),
])  # fmt: skip
def test_autocast_of_what_it_leaves_alone(kind: type[nn.RNNBase], of_input: torch.dtype, dtype: torch.dtype) -> None:
    ours, theirs = both(kind, 5, 17, dtype=dtype)
    x = torch.randn(4, 3, 5).to(of_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_torchs(lambda: ours(x), lambda: theirs(x))


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case.batch or 0) > 1 < case.steps], ids=lambda case: "-".join(map(str, case))
)
@pytest.mark.parametrize("units", [False, True], ids=["no units", "matrix units"])
def test_products_under_autocast(
    case: Case, kind: type[nn.RNNBase], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those over all steps are of bfloat16 where the processor has instructions for it, else of float32."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: units)
    layer = case.layer(kind, torch.float32)
    x, states = inputs(case.steps, case.batch or 1, case.inputs, dtype=torch.float32), first_states(layer, case.batch)
    state = state_of(layer, [y.detach().float().requires_grad_() for y in tensors(states)])
    lengths = torch.randint(1, case.steps + 1, (case.batch,))
    lengths[0], lengths[-1] = 1, case.steps  # not all alike: torch's LSTM would give bfloat16

    def outcome(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = tensors(layer(pack_padded_sequence(x, lengths, enforce_sorted=False), state))
        return [*results, *gradients(results, [x, *tensors(state), *layer.parameters()])]

    found, expected = outcome(True), outcome(False)
    if not units:
        assert_same_bits(found, expected)
        return
    assert not all(map(torch.equal, found, expected))
    for y, right in zip(found, expected, strict=True):
        # Of sums of about 1 and more: roundings of the factors, a third of one each, and of the sum; layers hand it on.
        within = 2 * case.layers * torch.finfo(torch.bfloat16).eps * max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(y, right, rtol=0, atol=within)


# Automatic differentiation.


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(kind: type[nn.RNNBase], packed: bool, both_ways: bool) -> None:
    layer = kind(2, 3, 2, bidirectional=both_ways, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x, states = inputs(3, 2, 2), tensors(first_states(layer, 2))

    def call(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        state, weights = state_of(layer, others[: len(states)]), dict(zip(names, others[len(states) :], strict=True))
        given = pack_padded_sequence(x, [1, 3], enforce_sorted=False) if packed else x
        return tuple(tensors(torch.func.functional_call(layer, weights, (given, state))))

    assert torch.autograd.gradcheck(call, (x, *states, *parameters), fast_mode=True)


SECOND: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "grad": lambda y, x: torch.autograd.grad(y, x)[0],
    "grad, unused": lambda y, x: torch.autograd.grad(y, x, allow_unused=True)[0],
    "backward": lambda y, x: (y.backward(), x.grad)[1],
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("of", ["x", "weight_hh_l0"])
@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_are_right_or_refused(kind: type[nn.RNNBase], linear: bool, of: str, way: str) -> None:
    """Never missing: the size of the first, as a term of a loss that has others."""
    ours, theirs = both(kind, 3, 4)
    x, first = inputs(3, 2, 3), []

    def second(layer: nn.RNNBase) -> Tensor | None:
        wanted, results = [x, *layer.parameters()], tensors(layer(x))
        first.append(gradients(results if linear else [y.sin() for y in results], wanted, create_graph=True))
        x.grad = None
        loss = sum(y.square().sum() for y in (*first[-1], *wanted))
        return SECOND[way](loss, x if of == "x" else layer.weight_hh_l0)

    expected = second(theirs)
    try:
        found = second(ours)
    except RuntimeError as error:
        assert "second derivative" in str(error) or "twice" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, expected, **EXACT)
    assert_equal(*first)


def test_gradients_may_be_asked_for_again(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 17, 2, bidirectional=True)
    x = inputs(4, 3, 5, dtype=torch.float32)
    results, wanted = tensors(layer(x)), [x, *layer.parameters()]
    first = gradients(results, wanted, retain_graph=True)
    kept = [y.detach().clone() for y in results]
    assert_same_bits(gradients(results, wanted, retain_graph=True), first)
    assert_same_bits(gradients(results, wanted), first)
    assert_same_bits([y.detach() for y in results], kept)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(results, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(kind: type[nn.RNNBase], reentrant: bool) -> None:
    layer = kind(5, 17, 3, dropout=0.4)
    x, found = inputs(4, 3, 5, dtype=torch.float32), []
    for again in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant) if again else layer(x)[0]
        output.sin().sum().backward()
        found.append([output, x.grad, *(one.grad for one in layer.parameters())])
    assert_same_bits(*found)


def test_saved_tensors_may_be_kept_elsewhere(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 17, 2, bidirectional=True)
    x = inputs(4, 3, 5, dtype=torch.float32)
    expected = outcome(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y.clone(), lambda y: y.clone()):
        results = tensors(layer(x))
    assert_same_bits([*results, *gradients(results, [x, *layer.parameters()])], expected)


def test_batches_of_gradients(kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 6, dtype=torch.float64)
    x = inputs(3, 2, 5)
    output, _ = layer(x)
    incoming = torch.randn(4, *output.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(output, x, incoming, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in incoming]
    assert_equal([found], [torch.stack(one_by_one)])


# torch.func.


def test_functional_call(kind: type[nn.RNNBase]) -> None:
    layers, x = both(kind, 5, 6, 2, bidirectional=True), inputs(3, 2, 5)
    others = {name: (2 * one).detach().requires_grad_() for name, one in layers[0].named_parameters()}
    found, before = [], layers[0](x)[0]
    for layer in layers:
        results = tensors(torch.func.functional_call(layer, others, (x,)))
        found.append([*results, *gradients(results, [x, *others.values()])])
    assert_equal(*found)
    assert not torch.allclose(before, found[0][0])
    assert torch.equal(layers[0](x)[0], before)  # its own parameters are back


def transforms(layer: nn.RNNBase) -> dict[str, Callable[[Tensor], Any]]:
    parameters = {name: one.detach() for name, one in layer.named_parameters()}

    def call(x: Tensor) -> Tensor:
        output: Tensor = layer(x)[0]
        return output

    def of_parameters(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, parameters, (x,))[0]
        return output.sin().sum()

    def dual(x: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent

    several = {name: torch.stack([one, 2 * one]) for name, one in parameters.items()}
    return {
        "vmap": lambda x: torch.func.vmap(call)(torch.stack([x, 2 * x])),
        "vmap of parameters": lambda x: torch.func.vmap(of_parameters, (0, None))(several, x),
        "grad": torch.func.grad(lambda x: call(x).sin().sum()),
        "grad of parameters": lambda x: list(torch.func.grad(of_parameters)(parameters, x).values()),
        "grad of each": lambda x: torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(torch.stack([x, 2 * x])),
        "jacrev": torch.func.jacrev(call),
        "jacfwd": torch.func.jacfwd(call),
        "jvp": lambda x: torch.func.jvp(call, (x,), (x,)),
        "vjp": lambda x: (torch.func.vjp(call, x)[1](torch.ones(3, 2, 4, dtype=x.dtype)),),
        "hessian": torch.func.grad(lambda x: torch.func.grad(lambda y: call(y).sin().sum())(x).sum()),
        "forward mode": dual,
    }


@pytest.mark.parametrize("name", transforms(nn.GRU(5, 4)))
def test_transforms_are_torchs_own(kind: type[nn.RNNBase], name: str) -> None:
    ours, theirs = both(kind, 5, 4)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    assert_as_torchs(partial(transforms(ours)[name], x), partial(transforms(theirs)[name], x))


# Threads and processes.

LARGE = (96, 130)
"""Features and states of a layer that is split between threads."""


def many(kind: type[nn.RNNBase], dtype: torch.dtype = torch.float32) -> tuple[nn.RNNBase, Tensor]:
    torch.manual_seed(4)
    return kind(*LARGE, 2, bidirectional=True, dtype=dtype), torch.randn(6, 5, LARGE[0], dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_same_inputs_give_the_same_bits_on_any_number_of_threads(
    kind: type[nn.RNNBase], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    layer, x = many(kind, dtype)
    packed = pack_padded_sequence(x, [6, 6, 4, 2, 1])
    runs = []
    for number in (1, 2, 2, 3):
        threads(number)
        runs.append([*outcome(layer, x), *outcome(layer, packed)])
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_many_threads_are_right(kind: type[nn.RNNBase], threads: Callable[[int], None]) -> None:
    threads(3)
    check(Case(5, 6, *LARGE, layers=2, both_ways=True), kind, torch.float32)


def test_what_memory_held_before_does_not_matter(kind: type[nn.RNNBase]) -> None:
    assert EXTENSION is not None
    layer, x = many(kind)
    expected = outcome(layer, x)
    assert all(y.isfinite().all() for y in expected)
    EXTENSION.set_poison(False)
    torch.use_deterministic_algorithms(False)
    assert_same_bits(outcome(layer, x), expected)


def test_layers_in_threads_of_their_own(kind: type[nn.RNNBase], threads: Callable[[int], None]) -> None:
    threads(2)
    layers = [kind(5, 70, 2, bidirectional=True), *many(kind)[:1]]
    xs = [inputs(4, 3, 5, dtype=torch.float32), inputs(6, 5, LARGE[0], dtype=torch.float32)]
    expected = [outcome(layer, x) for layer, x in zip(layers, xs, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            runs = [pool.submit(outcome, layer, x) for layer, x in zip(layers, xs, strict=True)]
            for run, right in zip(runs, expected, strict=True):
                assert_equal(run.result(), right, rtol=1e-5, atol=1e-5)


def test_one_layer_in_two_threads(kind: type[nn.RNNBase], threads: Callable[[int], None]) -> None:
    threads(2)
    layer, x = many(kind)
    xs = [x, (2 * x).detach().requires_grad_()]
    expected = [outcome(layer, one) for one in xs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for found, right in zip(pool.map(partial(outcome, layer), xs), expected, strict=True):
                assert_equal(found, right, rtol=1e-5, atol=1e-5)


def test_in_a_fork(kind: type[nn.RNNBase], threads: Callable[[int], None]) -> None:
    """As a worker that loads data: with one thread, as OpenMP's others are not there."""
    threads(2)
    layer, x = many(kind)
    expected = outcome(layer, x)

    def run() -> None:
        torch.set_num_threads(1)
        assert_equal(outcome(layer, x), expected, rtol=1e-5, atol=1e-5)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0


# Compiled and exported.


class Model(nn.Module):
    """Both kinds, one after the other."""

    def __init__(self, gru: Any, lstm: Any) -> None:
        super().__init__()
        self.gru, self.lstm = gru(5, 6, 2, bidirectional=True), lstm(12, 7, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, last = self.gru(x.sin())
        output, (_, cell) = self.lstm(hidden.transpose(0, 1).relu())
        return output.cos(), last.sum() + cell.sum()


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.usefixtures("compiling")
def test_compiled(kind: type[nn.RNNBase], whole: bool) -> None:
    """torch lets its compiler look into no layer of these two classes or their subclasses, unless asked to."""
    layer = kind(5, 6, 2, bidirectional=True, dtype=torch.float64)

    def call(x: Tensor) -> list[Tensor]:
        output, last = layer(x.sin())
        return [output.cos(), *([last] if isinstance(last, Tensor) else last)]

    x = inputs(4, 3, 5)
    with torch._dynamo.config.patch(allow_rnn=whole):
        results = torch.compile(call, backend="aot_eager", fullgraph=whole)(x)
        found = [*results, *gradients(results, [x, *layer.parameters()])]
    results = call(x)
    assert_equal(found, [*results, *gradients(results, [x, *layer.parameters()])])


@pytest.mark.usefixtures("compiling")
def test_a_compiled_model() -> None:
    """As users compile it, without any setting."""
    model = Model(GRU, LSTM).double()
    compiled, x = torch.compile(model, backend="aot_eager"), inputs(4, 3, 5)
    results, expected, wanted = list(compiled(x)), list(model(x)), [x, *model.parameters()]
    assert_equal([*results, *gradients(results, wanted)], [*expected, *gradients(expected, wanted)])


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
def test_exported() -> None:
    model, x = Model(GRU, LSTM).double().eval(), torch.randn(4, 3, 5, dtype=torch.float64)
    program, file = torch.export.export(model, (x,), strict=False), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for one in (program, torch.export.load(file)):
        assert_equal(one.module()(x.neg()), model(x.neg()))


# NaN and infinities.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["input", "state"])
@pytest.mark.usefixtures("instruction_set")
def test_nan_reaches_what_comes_after_it_in_its_row_alone(
    kind: type[nn.RNNBase], where: str, dtype: torch.dtype
) -> None:
    layer, row, at = kind(5, 19, bidirectional=True, dtype=dtype), 3, 2
    x, state = torch.randn(5, 7, 5, dtype=dtype), first_states(layer, 7, dtype)
    clean = layer(x, state)[0]
    with torch.no_grad():
        if where == "input":
            x[at, row, 1] = torch.nan
        else:
            tensors(state)[-1][0, row, 4] = torch.nan
    x.requires_grad_()
    output, last = layer(x, state)
    others = [n for n in range(7) if n != row]
    assert torch.equal(output[:, others], clean[:, others])
    forward, reverse = output[:, row].split(19, 1)
    assert forward[at if where == "input" else 1 :].isnan().all()
    assert last[0][0, row].isnan().all() if kind is LSTM else last[0, row].isnan().all()
    if where == "input":
        assert reverse[: at + 1].isnan().all()
        assert torch.equal(
            torch.cat((forward[:at], clean[at + 1 :, row, 19:])), torch.cat((clean[:at, row, :19], reverse[at + 1 :]))
        )
    (grad,) = torch.autograd.grad(output.square().sum(), x)
    assert grad[:, others].isfinite().all()
    assert grad[at, row].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [80.0, 1e4, 3e38, math.inf])
@pytest.mark.usefixtures("instruction_set")
def test_large_inputs_saturate(kind: type[nn.RNNBase], size: float, dtype: torch.dtype) -> None:
    ours, theirs = both(kind, 1, 19, dtype=dtype)
    x = torch.tensor([size, -size, 1.0, size], dtype=dtype).view(4, 1, 1).expand(4, 3, 1).clone().requires_grad_()
    found, expected = tensors(ours(x)), tensors(theirs(x))
    error = 32 * torch.finfo(dtype).eps
    assert_equal(found, expected, rtol=error, atol=error)
    assert all(y.isfinite().all() for y in found)
    if size <= 1e4:
        found, expected = (gradients(y, [x]) for y in (found, expected))
        assert_equal(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, 1e30, math.inf])
@pytest.mark.usefixtures("instruction_set")
def test_large_states(kind: type[nn.RNNBase], size: float, dtype: torch.dtype) -> None:
    """Where torch's own has a number so have we. It may have NaN for 0 times infinity, where a gate is all but 0."""
    ours, theirs = both(kind, 2, 1, dtype=dtype)
    x = torch.randn(3, 4, 2, dtype=dtype)
    first = torch.tensor([size, -size, size, 0.0], dtype=dtype).view(1, 4, 1)
    state = first if kind is GRU else (torch.tanh(first), first)
    error = 32 * torch.finfo(dtype).eps
    for y, right in zip(tensors(ours(x, state)), tensors(theirs(x, state)), strict=True):
        assert right[:, 3].isfinite().all()
        torch.testing.assert_close(torch.where(right.isnan(), right, y), right, rtol=error, atol=error, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_small_numbers_keep_their_places(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """Gates near one half and a candidate near 0: the tangent of what is small is that itself."""
    layer = kind(3, 19, bias=False, dtype=dtype)
    x = 1e-6 * torch.randn(1, 4, 3, dtype=dtype)
    zeros = tuple(torch.zeros(1, 4, 19, dtype=torch.float64) for _ in range(1 if kind is GRU else 2))
    expected = formula(x.double(), zeros, [[w.double() for w in one] for one in layer.all_weights], False)
    # The candidate is a sum of three products, of which two may cancel: it may be off by an ulp of the largest.
    error = 16 * torch.finfo(dtype).eps
    for y, right in zip(tensors(layer(x)), expected, strict=True):
        torch.testing.assert_close(y.double(), right, rtol=0, atol=error * float(right.detach().abs().max()))


# Swapped inside of models.


def test_accelerate_swaps_torchs_layers_and_restores_them() -> None:
    model = Model(nn.GRU, nn.LSTM).double()
    before, x, keys = copy.deepcopy(model), inputs(4, 3, 5), list(model.state_dict())
    report = attnext.accelerate(model)
    assert [one.name for one in report.swapped] == ["gru", "lstm"]
    assert isinstance(model.gru, nn.GRU)
    assert type(model.gru) is not nn.GRU
    assert list(model.state_dict()) == keys
    for _ in range(2):
        found, expected = (
            [*results, *gradients(results, [x, *one.parameters()])]
            for one in (model, before)
            if (results := list(one(x)))
        )
        assert_equal(found, expected)
        attnext.restore(model)
        assert [type(model.gru), type(model.lstm)] == [nn.GRU, nn.LSTM]


def test_accelerate_within_a_tagger_that_trains() -> None:
    """A model as people have it: embedded, packed, both ways, read by its last states; its optimizer made before."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 5)
            self.rnns = nn.ModuleList([nn.LSTM(5, 8, 2, batch_first=True, dropout=0.3, bidirectional=True)])

        def forward(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
            output, (hidden, _) = self.rnns[0](packed)
            return pad_packed_sequence(output, batch_first=True)[0], torch.cat((hidden[-2], hidden[-1]), 1)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.reader, self.out = Encoder(), nn.GRU(16, 7), nn.Linear(7, 3)

        def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
            output, last = self.encoder(words, lengths)
            scores: Tensor = self.out(self.reader(output.transpose(0, 1))[0])
            return scores.square().mean() + last.square().mean()

    words, lengths, plain = torch.randint(11, (4, 6)), torch.tensor([3, 6, 1, 4]), Tagger().double()
    losses = []
    for model, swapped in ((copy.deepcopy(plain), True), (plain, False)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if swapped:
            assert [one.name for one in attnext.accelerate(model).swapped] == ["encoder.rnns.0", "reader"]
        torch.manual_seed(6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(words, lengths)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert losses[2] < losses[0]
    assert_equal(losses[:3], losses[3:])


# The operators' contract with PyTorch.


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("gates", [3, 4])
def test_operators(gates: int, directions: int) -> None:
    units, features = 5, 3
    hidden = torch.randn(directions, 3, units)
    cell = torch.randn_like(hidden) if gates == 4 else None
    x, sizes = torch.randn(6, features), torch.tensor([3, 2, 1])
    one = [torch.randn(gates * units, n) for n in (features, units)] + [torch.randn(gates * units) for _ in range(2)]
    both = [*one, *([y.clone() for y in one] if directions == 2 else [None] * 4)]
    given = (x, hidden, cell, sizes, *both, False)
    ops: Any = torch.ops.attnext
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.recurrent_layer_cpu.default, (*given, False), test_utils=tests)
    torch.library.opcheck(ops.recurrent_layer_cpu.default, (*given, True), test_utils=tests)
    output, last, last_cell, *kept = ops.recurrent_layer_cpu(*given, True)
    incoming = (output, last, last_cell if gates == 4 else None)
    for wanted in (0, 0b1, 0b111, 0b111111111):
        backward = ops.recurrent_layer_backward_cpu.default
        torch.library.opcheck(backward, (*incoming, *given, *kept, wanted), test_utils=tests)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (3, torch.tensor([3, 2, 2, 3]), "batch_sizes must start with the batch's and not grow"),
        (3, torch.tensor([2, 2, 2]), "batch_sizes must start with the batch's and not grow"),
        (3, torch.tensor([3, 3]).int(), "batch_sizes must be contiguous int64"),
        (3, torch.tensor([3, 2, 2]), "x has size 6 in dimension 0, needs 7"),
        (1, torch.zeros(1, 3, 0), "hidden has no units"),
        (4, torch.zeros(15, 4), "w_input has size 4 in dimension 1, needs 3"),
        (5, torch.zeros(15, 4), "w_hidden has size 4 in dimension 1, needs 5"),
        (6, torch.zeros(14), "b_input has size 14 in dimension 0, needs 15"),
        (0, torch.zeros(6, 3).double(), "the inputs differ in dtype"),
        (9, torch.zeros(15, 5), "half of a reverse direction"),
    ],
)
def test_operators_refuse_what_would_read_outside(place: int, wrong: Tensor, message: str) -> None:
    """As a compiled or exported program comes to them without the modules' checks."""
    given: list[Any] = [torch.zeros(6, 3), torch.zeros(1, 3, 5), None, torch.tensor([3, 2, 1]), torch.zeros(15, 3)]
    given += [torch.zeros(15, 5), torch.zeros(15), None, None, None, None, None, False]
    given[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.attnext.recurrent_layer_cpu(*given, True)


def test_operators_refuse_bfloat16_products_of_float64() -> None:
    given = [torch.zeros(size).double() for size in ((6, 3), (1, 3, 5), (15, 3), (15, 5))]
    x, hidden, *matrices = given
    with pytest.raises(RuntimeError, match="bfloat16 products are for float32"):
        torch.ops.attnext.recurrent_layer_cpu(
            x, hidden, None, torch.tensor([3, 2, 1]), *matrices, *(None,) * 6, True, False
        )


@pytest.mark.skipif(sys.platform != "linux" or not harness.COMPILER, reason="no g++ here")
@pytest.mark.parametrize("sanitizer", ["plain", "tsan"])
def test_threads_wait_for_each_step(sanitizer: str, tmp_path: Path) -> None:
    """Also one that comes late, and for what was written in the step before."""
    program, source = tmp_path / "team", Path(__file__).with_name("team.cpp")
    options = ("-std=gnu++17", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *harness.SANITIZERS[sanitizer])
    command = [str(harness.COMPILER), *options, f"-I{source.parents[1] / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = harness.run(program)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this compiler's TSan needs addresses that are not random, and this container forbids that")
    assert (done.returncode, done.stdout, done.stderr) == (0, "each part once, in turn\n", "")
