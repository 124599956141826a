"""Decoders that attend: their arguments, their parameters, copies and files, and the operators called directly."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_cases import (
    ATTENTIONS,
    Case,
    Decoder,
    assert_equal,
    assert_same_bits,
    call,
    made,
    outcome,
    recorded,
    tensors,
    with_parts,
)
from torch import Tensor, nn

import attnext
from attnext import AttentiveGRU, AttentiveLSTM, BahdanauAttention, DecoderState, Past
from attnext.recurrent import _operators

pytestmark = pytest.mark.usefixtures("one_thread")


# Arguments.


def small(kind: type[Decoder], attention: str = "additive", **options: Any) -> Any:
    """E is 3, S 4, H 5, D 6."""
    return kind(3, 4, ATTENTIONS[attention](4, 5, 6), **options)


CONSTRUCTED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "input_size": ((0, 4), {}, "input_size must be an integer of at least 1"),
    "hidden_size": ((3, 4.0), {}, "hidden_size must be an integer"),
    "num_layers": ((3, 4), {"num_layers": 0}, "num_layers must be an integer"),
    "bias": ((3, 4), {"bias": 1}, "bias must be a bool"),
    "dropout": ((3, 4), {"dropout": 1.5}, "dropout must be between 0 and 1"),
    "dropout, a word": ((3, 4), {"dropout": "0.5"}, "dropout must be a number"),
    "attend": ((3, 4), {"attend": "during"}, "attend must be one of 'before', 'after'"),
    "vector_size": ((3, 4), {"vector_size": 0}, "vector_size must be an integer"),
    "input_feeding": ((3, 4), {"input_feeding": None}, "input_feeding must be a bool"),
    "input_feeding alone": ((3, 4), {"input_feeding": True}, "input_feeding needs a vector_size"),
    "query_size": ((3, 5), {}, "attention must have query_size=5, as hidden_size, got 4"),
}


@pytest.mark.parametrize("wrong", CONSTRUCTED)
def test_wrong_options(kind: type[Decoder], wrong: str) -> None:
    sizes, options, message = CONSTRUCTED[wrong]
    make: Any = kind
    with pytest.raises((TypeError, ValueError), match=message):
        make(*sizes, BahdanauAttention(4, 5, 6), **options)


@pytest.mark.parametrize("attention", [None, nn.Linear(4, 5), BahdanauAttention, attnext.AttentionPooling(5, 6)])
def test_an_attention_that_a_decoder_does_not_step(kind: type[Decoder], attention: Any) -> None:
    with pytest.raises(TypeError, match="attention must be one of attnext's modules"):
        kind(3, 4, attention)


def zeros(*size: int, **options: Any) -> Tensor:
    return torch.zeros(size, **options)


def state_with(kind: type[Decoder], **changes: Any) -> DecoderState:
    """Of a decoder with input feeding that attends after its step, and so has no context; of two sentences."""
    cell = zeros(2, 2, 4) if kind is AttentiveLSTM else None
    return DecoderState(zeros(2, 2, 4), cell, None, zeros(2, 7))._replace(**changes)


WRONG: dict[str, Callable[[type[Decoder]], tuple[dict[str, Any], str]]] = {
    "inputs, a list": lambda _: ({"inputs": [0.0]}, "inputs must be a torch.Tensor"),
    "inputs of one step's rank": lambda _: ({"inputs": zeros(2, 3)}, "inputs must have 3 dimensions"),
    "inputs of a rank too many": lambda _: ({"inputs": zeros(2, 2, 2, 3)}, "inputs must have 3 dimensions"),
    "inputs' size": lambda _: ({"inputs": zeros(2, 2, 4)}, "inputs must have size 3 in dimension 2, as input_size"),
    "inputs' dtype": lambda _: ({"inputs": zeros(2, 2, 3).double()}, "inputs must have the module's dtype"),
    "integers": lambda _: ({"inputs": zeros(2, 2, 3).long()}, "inputs must be float32"),
    "sparse inputs": lambda _: ({"inputs": zeros(2, 2, 3).to_sparse()}, "inputs must be a dense tensor"),
    "inputs' device": lambda _: ({"inputs": zeros(2, 2, 3, device="meta")}, "inputs must be on the module's device"),
    "no step": lambda _: ({"inputs": zeros(2, 0, 3)}, "inputs must have at least one step"),
    "no memory": lambda _: ({"memory": None}, "memory must be what prepare"),
    "encoder states": lambda _: ({"memory": zeros(2, 6, 5)}, "memory must be what prepare"),
    "memory's batch": lambda _: ({"memory": memory_of(zeros(3, 6, 5))}, "memory must have size 2 in dimension 0"),
    "memory for dot products": lambda _: (
        {"memory": attnext.LuongAttention(4, 5).prepare(zeros(2, 6, 5))},
        "memory must be prepared for an additive score",
    ),
    "memory of another size": lambda _: (
        {"memory": BahdanauAttention(4, 8, 6).prepare(zeros(2, 6, 8))},
        "memory must have values of size 5",
    ),
    "memory of another attention size": lambda _: (
        {"memory": BahdanauAttention(4, 5, 8).prepare(zeros(2, 6, 5))},
        "memory must have size 6 in dimension 2, as attention_size",
    ),
    "memory in float64": lambda _: ({"memory": memory_of(zeros(2, 6, 5)).to(dtype=torch.float64)}, "memory must have"),
    "state, a tensor": lambda _: ({"state": zeros(2, 2, 4)}, "state must be None or a DecoderState, got Tensor"),
    "state, a pair": lambda _: ({"state": (zeros(2, 2, 4), None)}, "state must be None or a DecoderState, got tuple"),
    "state's batch": lambda kind: ({"state": state_with(kind, hidden=zeros(2, 3, 4))}, "hidden of shape"),
    "state's layers": lambda kind: ({"state": state_with(kind, hidden=zeros(1, 2, 4))}, "hidden of shape"),
    "state's size": lambda kind: ({"state": state_with(kind, hidden=zeros(2, 2, 5))}, "hidden of shape"),
    "state of a beam": lambda kind: ({"state": state_with(kind, hidden=zeros(2, 2, 3, 4))}, "hidden of shape"),
    "state in float64": lambda kind: ({"state": state_with(kind, hidden=zeros(2, 2, 4).double())}, "state.hidden must"),
    "state on meta": lambda kind: (
        {"state": state_with(kind, hidden=zeros(2, 2, 4, device="meta"))}, "state.hidden must be on",
    ),
    "the other kind's state": lambda kind: (
        {"state": state_with(kind, cell=zeros(2, 2, 4) if kind is AttentiveGRU else None)}, "state must have cell of",
    ),
    "state's cell": lambda kind: ({"state": state_with(kind, cell=zeros(2, 2, 5))}, "state must have cell of"),
    "a context too many": lambda kind: ({"state": state_with(kind, context=zeros(2, 5))}, "context of shape None"),
    "no vector": lambda kind: ({"state": state_with(kind, vector=None)}, r"vector of shape \(2, 7\), got None"),
    "vector's size": lambda kind: ({"state": state_with(kind, vector=zeros(2, 6))}, r"vector of shape \(2, 7\)"),
    "a past": lambda kind: (
        {"state": state_with(kind, attention=Past(zeros(2, 6), zeros(2, 6)))}, "state must be None for Bahdanau",
    ),
    "need_weights": lambda _: ({"need_weights": 1}, "need_weights must be a bool"),
}  # fmt: skip


def memory_of(states: Tensor) -> Any:
    return BahdanauAttention(4, 5, 6).prepare(states)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(kind: type[Decoder], wrong: str) -> None:
    """Each by itself, of a whole sequence and of a step."""
    decoder = small(kind, num_layers=2, attend="after", vector_size=7, input_feeding=True)
    right = {"inputs": zeros(2, 2, 3), "memory": decoder.prepare(zeros(2, 6, 5)), "state": None, "need_weights": False}
    changes, message = WRONG[wrong](kind)
    given = right | changes
    with pytest.raises((TypeError, ValueError), match=message):
        decoder(given["inputs"], given["memory"], given["state"], need_weights=given["need_weights"])
    if "inputs" not in changes:
        with pytest.raises((TypeError, ValueError), match=message):
            decoder.step(zeros(2, 3), given["memory"], given["state"], need_weights=given["need_weights"])
        if wrong != "need_weights":
            with pytest.raises((TypeError, ValueError), match=message):
                decoder.opened()(zeros(2, 3), given["memory"], given["state"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0], "input must be a torch.Tensor"),
        (zeros(3), "input must have 2 or 3 dimensions"),
        (zeros(1, 2, 2, 3), "input must have 2 or 3 dimensions"),
        (zeros(2, 4), "input must have size 3 in dimension 1"),
        (zeros(2, 2, 4), "input must have size 3 in dimension 2"),
        (zeros(2, 3).double(), "input must have the module's dtype"),
        (zeros(2, 3).long(), "input must be float32"),
        (zeros(2, 3, device="meta"), "input must be on the module's device"),
    ],
)
def test_wrong_inputs_of_a_step(kind: type[Decoder], given: Any, message: str) -> None:
    decoder = small(kind).eval()
    memory = decoder.prepare(zeros(2, 6, 5))
    state = decoder.first_state(2)
    for step in (decoder.step, decoder.opened()):
        for first in (None, state):
            with pytest.raises((TypeError, ValueError), match=message):
                step(given, memory, first)


@pytest.mark.parametrize("weights", [zeros(2, 5), zeros(3, 6), zeros(2, 1, 6)])
def test_a_past_of_other_sizes(kind: type[Decoder], weights: Tensor) -> None:
    decoder = small(kind, "coverage")
    memory, state = decoder.prepare(zeros(2, 6, 5)), decoder.first_state(2)
    with pytest.raises(ValueError, match="state must have weights of shape"):
        decoder(zeros(2, 2, 3), memory, state._replace(attention=Past(weights, weights)))
    with pytest.raises(TypeError, match="state must be None or a Past, got Tensor"):
        decoder(zeros(2, 2, 3), memory, state._replace(attention=weights))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0.0] * 3], "table must be a torch.Tensor"),
        (zeros(3), "table must have 2 dimensions"),
        (zeros(9, 4), "table must have size 3 in dimension 1"),
        (zeros(9, 3).double(), "table must have the module's dtype"),
        (zeros(9, 3).long(), "table must be float32"),
        (zeros(9, 3, device="meta"), "table must be on the module's device"),
    ],
)
def test_wrong_tables(kind: type[Decoder], given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(kind).opened(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([0, 9]), "input must lie between 0 and 8, got 9"),
        (torch.tensor([-1, 0]), "input must lie between 0 and 8, got -1"),
        (zeros(2), "input must be a tensor of integers"),
        (zeros(2, 2, 2).long(), "input must have 1 or 2 dimensions"),
        (0, "input must be a torch.Tensor"),
        (zeros(3).long(), "hidden of shape"),
    ],
)
def test_wrong_numbers_of_a_table(kind: type[Decoder], given: Any, message: str) -> None:
    decoder = small(kind).eval()
    with pytest.raises((TypeError, ValueError), match=message):
        decoder.opened(zeros(9, 3))(given, decoder.prepare(zeros(2, 6, 5)), decoder.first_state(2))


@pytest.mark.parametrize(
    ("beam", "given", "message"),
    [
        (None, [0], "indices must be a torch.Tensor"),
        (None, torch.tensor(0), "indices must have 1 or 2 dimensions"),
        (None, torch.tensor([0.0]), "indices must be a tensor of integers"),
        (None, torch.tensor([2]), "indices must lie between 0 and 1, got 2"),
        (None, torch.tensor([[0], [0]]), "need a state of"),
        (3, torch.tensor([[0], [3]]), "indices must lie between 0 and 2, got 3"),
        (3, torch.tensor([[0], [0], [0]]), "indices must have size 2 in dimension 0, as the state's batch"),
        (3, torch.tensor([-1]), "indices must lie between 0 and 1, got -1"),
        (3, torch.tensor([0], device="meta"), "indices must be on"),
    ],
)
def test_wrong_selections(kind: type[Decoder], beam: int | None, given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(kind).first_state(2, beam).select(given)


@pytest.mark.parametrize(
    ("states", "options", "message"),
    [
        (zeros(2, 6, 4), {}, "encoder_states must have size 5"),
        (zeros(6, 5), {}, "encoder_states must have 3 dimensions"),
        (zeros(2, 6, 5).double(), {}, "encoder_states must have the module's dtype"),
        (zeros(2, 6, 5), {"lengths": torch.tensor([7, 1])}, "lengths must lie between 0 and the number of keys, 6"),
        (zeros(2, 6, 5), {"mask": zeros(2, 6)}, "mask must be a bool tensor"),
    ],
)
def test_wrong_encoder_states(kind: type[Decoder], states: Tensor, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(kind).prepare(states, **options)


# Parameters, copies and files.


def test_names_and_sizes_of_the_parameters() -> None:
    decoder = AttentiveGRU(3, 4, BahdanauAttention(4, 5, 6), 2, vector_size=7, input_feeding=True)
    expected = {
        "weight_ih_l0": (12, 3 + 5 + 7), "weight_hh_l0": (12, 4), "bias_ih_l0": (12,), "bias_hh_l0": (12,),
        "weight_ih_l1": (12, 4), "weight_hh_l1": (12, 4), "bias_ih_l1": (12,), "bias_hh_l1": (12,),
        "attention.score_weight": (6,), "attention.query_projection.weight": (6, 4),
        "attention.memory_projection.weight": (6, 5), "readout.weight": (7, 3 + 4 + 5), "readout.bias": (7,),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in decoder.state_dict().items()} == expected
    lstm = AttentiveLSTM(3, 4, BahdanauAttention(4, 5, 6), attend="after", vector_size=7, input_feeding=True)
    assert lstm.weight_ih_l0.shape == (16, 3 + 7)
    bare = AttentiveLSTM(3, 4, BahdanauAttention(4, 5, 6), bias=False, attend="after")
    assert [name for name, _ in bare.named_parameters(recurse=False)] == ["weight_ih_l0", "weight_hh_l0"]
    assert bare.weight_ih_l0.shape == (16, 3 + 5)
    assert bare.bias_ih_l0 is None


def test_parameters_are_a_cells(kind: type[Decoder]) -> None:
    """As users have them who step a cell and an attention in a loop of their own, and load its file into ours."""
    cell: Any = (nn.GRUCell if kind is AttentiveGRU else nn.LSTMCell)(3 + 5, 4, dtype=torch.float64)
    decoder = small(kind).double()
    missing = decoder.load_state_dict({f"{name}_l0": x for name, x in cell.state_dict().items()}, strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"attention"}
    assert missing.unexpected_keys == []
    attention = BahdanauAttention(4, 5, 6, bias=True).double()
    attention.load_state_dict(decoder.attention.state_dict())
    x, states = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    memory, hidden = attention.prepare(states), torch.zeros(2, 4, dtype=torch.float64)
    carried: Any = hidden if kind is AttentiveGRU else (hidden, hidden)
    outputs = []
    for y in x.unbind(1):
        context, _ = attention(hidden, memory)
        carried = cell(torch.cat((y, context), 1), carried)
        hidden = carried if isinstance(carried, Tensor) else carried[0]
        outputs.append(hidden)
    assert_equal([decoder(x, decoder.prepare(states))[0]], [torch.stack(outputs, 1)])
    back: Any = type(cell)(3 + 5, 4, dtype=torch.float64)
    back.load_state_dict({name[:-3]: y for name, y in decoder.state_dict().items() if name.endswith("_l0")})
    assert_same_bits(list(back.parameters()), list(cell.parameters()))


def test_copies_and_pickles(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    expected, file = outcome(decoder, given), io.BytesIO()
    torch.save(decoder, file)
    file.seek(0)
    for one in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), torch.load(file, weights_only=False)):
        assert type(one) is kind
        assert_same_bits(outcome(one, given), expected)
        with torch.no_grad():
            one.get_parameter("bias_hh_l0").add_(1.0)  # its own
        assert not torch.equal(outcome(one, given)[0], expected[0])
    assert_same_bits(outcome(decoder, given), expected)


def test_parameters_from_a_file(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    file = io.BytesIO()
    torch.save(decoder.state_dict(), file)
    file.seek(0)
    other = form.decoder(kind)
    assert not torch.equal(outcome(other, given)[0], outcome(decoder, given)[0])
    assert str(other.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert_same_bits(outcome(other, given), outcome(decoder, given))


def test_states_are_pickled(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    state = decoder(given.x, decoder.prepare(given.states), given.state)[2].map(
        lambda x, _: x.detach(), lambda past: past.map(torch.Tensor.detach)
    )
    found = pickle.loads(pickle.dumps(state))
    assert type(found) is DecoderState
    assert_same_bits(tensors(found), tensors(state))


def test_parameters_are_drawn_anew(kind: type[Decoder], form: Case) -> None:
    decoder = form.decoder(kind)
    before = {name: x.detach().clone() for name, x in decoder.named_parameters()}
    decoder.reset_parameters()
    for name, x in decoder.named_parameters():
        assert not torch.equal(x, before[name]), name
        assert x.abs().max() <= 1.0
    own = torch.cat([x.flatten() for x in decoder.parameters(recurse=False)]).abs()
    assert 0.9 * 13**-0.5 < own.max() <= 13**-0.5
    assert abs(own.mean() - 0.5 * 13**-0.5) < 0.02


def test_layers_begin_within_their_bound(kind: type[Decoder]) -> None:
    torch.manual_seed(2)
    decoder = small(kind)
    first = [x.detach().clone() for x in decoder.parameters(recurse=False)]
    assert all(x.abs().max() <= 0.5 for x in first)
    torch.manual_seed(2)
    assert_same_bits(list(small(kind).parameters(recurse=False)), first)


def test_parameters_of_a_subclass_are_left_to_it(kind: type[Decoder]) -> None:
    decoder = small(kind)
    decoder.register_parameter("temperature", nn.Parameter(torch.full((1,), 7.0)))
    before = decoder.weight_hh_l0.detach().clone()
    decoder.reset_parameters()
    assert float(decoder.temperature.detach()) == 7.0
    assert not torch.equal(decoder.weight_hh_l0, before)


def test_how_a_decoder_is_shown(kind: type[Decoder]) -> None:
    assert small(kind).extra_repr() == "3, 4, num_layers=1, attend='before'"
    decoder = small(kind, num_layers=2, dropout=0.5, attend="after", vector_size=7, input_feeding=True)
    shown = "3, 4, num_layers=2, attend='after', vector_size=7, input_feeding=True, dropout=0.5"
    assert decoder.extra_repr() == shown
    assert re.match(rf"{kind.__name__}\(\n  3, 4.*\n  \(attention\): BahdanauAttention\(", repr(decoder))


def test_converted_after_it_was_made(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form, torch.float32)
    low = outcome(decoder, given)
    leaves = [y.detach().double().requires_grad_() for y in given.leaves]
    assert given.state is not None
    high = given._replace(x=leaves[0], states=leaves[1], state=with_parts(given.state, leaves[2:]))
    found = outcome(decoder.double(), high)
    assert all(y.dtype == torch.float64 for y in found)
    assert_equal([y.float() for y in found], low, rtol=1e-4, atol=1e-4)
    assert_equal(outcome(decoder.float(), given), low)


def test_results_follow_an_optimizer(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form)
    losses = []
    for backend in ("cpu", "reference"):
        model = copy.deepcopy(decoder)
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
        with attnext.use_backend(backend):
            for _ in range(4):
                output, contexts, *_ = call(model, given)
                loss = output.square().mean() + contexts.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append(loss.detach())
        losses.append(torch.stack(seen))
    assert (losses[0].diff() < 0).all()
    assert_equal(losses[:1], losses[1:])


def test_first_states() -> None:
    lstm = small(AttentiveLSTM, num_layers=2, attend="after", vector_size=7).double()
    state = lstm.first_state(2, 3)
    assert [tuple(x.shape) for x in tensors(state)] == [(2, 2, 3, 4), (2, 2, 3, 4), (2, 3, 5)]
    assert [x is None for x in state] == [False, False, False, True, True]
    assert all(x.dtype == torch.float64 and (x == 0).all() for x in tensors(state))
    gru = small(AttentiveGRU, vector_size=7, input_feeding=True)
    assert [None if x is None else tuple(x.shape) for x in gru.first_state(2)] == [(1, 2, 4), None, None, (2, 7), None]
    one = gru.first_state(2).one_hypothesis()
    assert_same_bits(tensors(one), tensors(gru.first_state(2, 1)))
    with pytest.raises(ValueError, match="before the first step"):
        one._replace(attention=Past(zeros(2, 6), zeros(2, 6))).one_hypothesis()


# The operators' contract.

FIELDS, BACKWARD_FIELDS = (
    [field.split()[-1] for field in schema[1:].split(") ->")[0].split(", ")]
    for schema in (_operators.SCHEMA, _operators.BACKWARD_SCHEMA)
)
OPERATED = (
    Case(),
    Case("location", "after", "vector", 2, hidden="both"),
    Case("general", "before", "fed", 2, hidden="mask"),
    Case("coverage", "after", "fed"),
)
UNREAD = {"gates", "w_query", "b_query", "score_weight", "key"}
"""What may be of some other sizes: more steps where nothing else says how many, columns that are not used, the bias of
a query in the backward pass, v as that of one head, more keys where they are the values."""


def broken(x: Any) -> list[Any]:
    """Arguments that don't fit in place of one that does."""
    if isinstance(x, Tensor):
        found = [x.new_zeros(0), x.unsqueeze(0), x.new_zeros(*(n + 1 for n in x.shape))]
        for dim in range(x.dim()):
            found.append(x.new_zeros(*(n + (dim == k) for k, n in enumerate(x.shape))))
            found.append(x.new_zeros(*(n - (dim == k) for k, n in enumerate(x.shape))))
        return [*found, x.to(torch.float16), x.double() if x.dtype == torch.float32 else x.float(), x.to("meta")]
    if isinstance(x, list) and x:
        return [[], x[:-1], [*x, x[0]], *([other, *x[1:]] for other in broken(x[0]))]
    return []


HELD = ("key", "value", "exp_key")
"""What may be of a half type beside float32."""


def copy_of(x: Any) -> Any:
    """As the operators write into some of their arguments."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    return [y.detach().clone() for y in x] if isinstance(x, list) else x


def attempted(operator: Callable[..., list[Tensor]], given: tuple[Any, ...], place: int, other: Any) -> bool:
    """Whether the operator takes another argument in this place; then its results are numbers."""
    changed = [copy_of(y) for y in given]
    changed[place] = copy_of(other)
    try:
        results = operator(*changed)
    except (RuntimeError, NotImplementedError):
        return False
    assert all(y.isfinite().all() for y in results)
    return True


@pytest.mark.parametrize("case", OPERATED, ids=lambda case: "-".join(map(str, case[:3])))
@pytest.mark.parametrize(("name", "fields"), [("forward", FIELDS), ("backward", BACKWARD_FIELDS)])
def test_operators_refuse_what_would_read_outside(
    kind: type[Decoder], case: Case, name: str, fields: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program comes to them without the modules' checks: each tensor by itself of other sizes or dtypes."""
    operator, calls = getattr(_operators, name), recorded(monkeypatch, name)
    outcome(*made(kind, case, torch.float32))
    (given,) = calls
    assert len(given) == len(fields)
    taken, tried = set(), 0
    for place, x in enumerate(given):
        for other in broken(x):
            tried += 1
            held = fields[place] in HELD and isinstance(other, Tensor) and other.dtype == torch.float16
            if attempted(operator, given, place, other) and not held:
                taken.add(fields[place])
    assert tried > 100
    assert taken <= UNREAD


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("lengths", torch.tensor([10, 1, 1]), "lengths must lie between 0 and the number of keys, 9"),
        ("lengths", torch.tensor([1, -1, 1]), "lengths must lie between 0 and the number of keys, 9"),
        ("key", torch.zeros(2, 9, 10), "the decoder has no step, or no row"),  # three rows for two sentences
        ("score", 3, "there is no score 3"),
        ("score", -1, "there is no score -1"),
        ("rule", 2, "the rule of a decoder must be softmax or sigmoid"),
        ("dropout_p", 0.5, "dropout of a decoder needs seeds"),
        ("dropout_p", -1.0, "dropout of a decoder needs seeds"),
        ("after", False, "a first context is what a decoder needs that attends after its step"),
        ("feeds_vector", True, "w_outer has 11 columns"),
        ("projected", True, "w_outer has 11 columns|projected values are for"),
        ("w_outer", None, "w_outer has 0 columns"),
        ("w_query", None, "b_query has size 10"),
        ("value", None, "needs value|w_outer has"),
        ("score_weight", None, "this score needs value, score_weight"),
        ("filters", None, "this score needs value, score_weight, filters"),
        ("projection", None, "filters has size 4 in dimension 0, needs 10"),
        ("past", None, "filters has size 2 in dimension 1, needs 1"),
        ("feeds", None, "the matrix of the output vector needs what inputs add"),
        ("w_readout", None, "the matrix of the output vector needs what inputs add"),
        ("context", None, "a first context is what a decoder needs"),
        ("packed", torch.zeros(3), "packed is of other matrices"),
        ("b_hidden", [], "biases are of all layers, or of none"),
        ("w_hidden", [], "w_hidden must have a matrix a layer"),
    ],
)
def test_operators_say_what_is_wrong(
    kind: type[Decoder], field: str, wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, calls = _operators.forward, recorded(monkeypatch)
    decoder, given = made(kind, Case("location", "after", "vector", state=False), torch.float32)
    step = decoder.eval().opened()
    step(given.x[:, 0], decoder.prepare(given.states, given.lengths), decoder.first_state(3))
    changed = [copy_of(y) for y in calls[-1]]
    changed[FIELDS.index(field)] = wrong
    with pytest.raises(RuntimeError, match=message):
        operator(*changed)


@pytest.mark.parametrize("bad", [-1, 8])
def test_operators_refuse_symbols_that_a_table_lacks(
    kind: type[Decoder], bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the modules check before."""
    operator, calls = _operators.forward, recorded(monkeypatch)
    decoder, given = made(kind, Case(), torch.float32)
    layer = torch.nn.Linear(decoder.hidden_size, 8)
    opened = decoder.eval().opened(torch.randn(8, 5), layer.weight, layer.bias)
    opened.greedy(torch.tensor([0, 7, 1]), decoder.prepare(given.states), decoder.first_state(3), 2)
    changed = [copy_of(y) for y in calls[-1]]
    changed[FIELDS.index("previous")] = torch.tensor([0, bad, 1])
    with pytest.raises(RuntimeError, match="previous must be numbers of symbols"):
        operator(*changed)


def test_operators_are_not_for_graphs(kind: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    operator, calls = _operators.forward, recorded(monkeypatch)
    outcome(*made(kind, Case()))
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="the modules run their steps one by one"),
    ):
        operator(*calls[0])
