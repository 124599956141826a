"""Decoders that attend, step by step: hypotheses of a search, and the matrices that its steps keep."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoder_cases import (
    ATTENTIONS,
    FORMS,
    PASTS,
    SERVED,
    VECTORS,
    Case,
    Decoder,
    assert_equal,
    assert_same_bits,
    call,
    gradients,
    made,
    recorded,
    tensors,
)
from torch import Tensor, nn

import attnext
from attnext import AttentiveGRU, AttentiveLSTM, DecoderState, Memory
from attnext.attention.family import STEPPED

pytestmark = pytest.mark.usefixtures("one_thread")

Calls = list[tuple[Any, ...]]


# Steps of a search.


class Search:
    """Random symbols, of one hypothesis a sentence or of a beam, through ``opened`` and through the modules' steps."""

    def __init__(self, kind: type[Decoder], case: Case, beam: int | None = None, symbols: int | None = None) -> None:
        decoder, given = made(kind, case)
        self.decoder, self.beam, self.symbols = decoder.eval(), beam, symbols
        table = torch.randn(symbols or 11, case.inputs, dtype=torch.float64)
        self.step, self.table = self.decoder.opened(table if symbols else None), table
        self.memory: Memory = decoder.prepare(given.states.detach(), given.lengths, given.mask)
        self.state = self.expected = decoder.first_state(case.batch, beam)

    def go(self, need_weights: bool = True) -> list[Tensor]:
        """A step by both, which must agree; its results."""
        batch = self.state.hidden.shape[1]
        rows = (batch,) if self.beam is None else (batch, self.beam)
        numbers = torch.randint(len(self.table), rows)
        vectors = self.table[numbers]
        found = self.step(numbers if self.symbols else vectors, self.memory, self.state, need_weights=need_weights)
        with attnext.use_backend("reference"), torch.no_grad():
            right = self.decoder.step(vectors, self.memory, self.expected, need_weights=need_weights)
        assert type(found[2]) is DecoderState
        assert [y is None for y in found[2]] == [y is None for y in right[2]]
        assert_equal(tensors(found), tensors(right))
        assert not any(y.requires_grad for y in tensors(found))
        self.state, self.expected = found[2], right[2]
        return tensors(found)

    def select(self, indices: Tensor) -> None:
        self.state, self.expected = self.state.select(indices), self.expected.select(indices)
        assert_equal(tensors(self.state), tensors(self.expected))

    def leave(self, rows: list[int]) -> None:
        """Sentences that go on."""
        self.select(torch.tensor(rows))
        self.memory = self.memory.select(torch.tensor(rows))


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_opened(kind: type[Decoder], attention: str, attend: str, vector: str, calls: Calls) -> None:
    """One hypothesis and a beam, with and without a table, of values that are projected ahead and that are not."""
    for number, (beam, symbols) in enumerate(((None, None), (3, 5), (None, 300), (1, None))):
        layers, wide = 1 + number % 2, 40 if number > 1 else 11
        case = Case(attention, attend, vector, layers, 3 - number % 3, 1, 5, memory=wide, size=wide)
        search = Search(kind, case, beam, symbols)
        del calls[:]
        for _ in range(3):
            search.go()
        assert len(calls) == 3


@pytest.mark.parametrize("attention", ["additive", "general", "location", "coverage, sigmoid", "dot"])
def test_opened_with_a_beam_that_changes(kind: type[Decoder], attention: str) -> None:
    """Hypotheses fall and are copied, sentences leave."""
    for keys in (2, 9):  # few enough to be projected, or not
        search = Search(kind, Case(attention, "before", "fed", 2, keys=keys, memory=40, size=40), beam=4, symbols=300)
        search.go()
        for _ in range(2):
            search.select(torch.randint(4, (3, 4)))
            search.go()
        search.leave([2, 0])
        search.go()
        search.leave([1])
        search.select(torch.tensor([[3, 3, 0, 1]]))
        search.go()
        search.beam = 2
        search.select(torch.tensor([[1, 2]]))
        search.go()


def test_selected_hypotheses_are_those(kind: type[Decoder]) -> None:
    search = Search(kind, Case("coverage", "after", "fed"), beam=3)
    search.go()
    before, kept = search.state, torch.tensor([[2, 0, 2], [1, 1, 0], [0, 1, 2]])
    found = before.select(kept)
    for b in range(3):
        for k in range(3):
            assert_same_bits(
                [y[..., b, k, :] for y in tensors(found)], [y[..., b, int(kept[b, k]), :] for y in tensors(before)]
            )
    rows = before.select(torch.tensor([2, 0, 0, 1]))
    assert_same_bits([y[..., 1, :, :] for y in tensors(rows)], [y[..., 0, :, :] for y in tensors(before)])
    assert_same_bits([y[..., 0, :, :] for y in tensors(rows)], [y[..., 2, :, :] for y in tensors(before)])


def test_selected_states_have_their_gradients(kind: type[Decoder], form: Case) -> None:
    given = made(kind, form)[1]
    assert given.state is not None
    parts = tensors(given.state)
    found = tensors(given.state.select(torch.tensor([1, 1, 0])))
    for y, grad in zip(found, torch.autograd.grad([y.sum() for y in found], parts), strict=True):
        rows = grad.movedim(1 if y.dim() == 3 else 0, 0)
        assert [float(row.unique()) for row in rows] == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("projected", [False, True])
def test_values_are_projected_where_it_pays(kind: type[Decoder], projected: bool, calls: Calls) -> None:
    """Of at most four rows and of half as many keys as their size: the operator says."""
    for attend in ("before", "after"):
        for batch, keys in ((1, 20), (2, 10), (4, 5)) if projected else ((1, 21), (2, 11), (5, 1)):
            search = Search(kind, Case("additive", attend, "vector", 1, batch, 1, keys, memory=40))
            search.go()
            assert calls[-1][-3] == (projected and attend == "before")  # projected, need_weights, keep


def test_hidden_slots_of_projected_values(kind: type[Decoder], calls: Calls) -> None:
    """NaN there reaches nothing, as nothing is recorded that would have cleared it."""
    for attention in ("additive", "general", "location", "coverage"):
        decoder, given = made(kind, Case(attention, "before", "fed", 1, 2, 1, 4, memory=40))
        states = given.states.detach().clone()
        states[0, 2:], states[1, 3:] = torch.nan, torch.inf
        lengths = torch.tensor([2, 3])
        with torch.no_grad():
            memory = decoder.eval().prepare(states, lengths)
            clean = decoder.prepare(states.nan_to_num(0.0, 0.0, 0.0), lengths)
        x, state = given.x[:, 0].detach(), decoder.first_state(2)
        step = decoder.opened()
        found, right = step(x, memory, state), step(x, clean, state)
        assert calls[-1][-3]
        assert all(y.isfinite().all() for y in tensors(found))
        assert_equal(tensors(found), tensors(right))


def test_rows_of_a_memory_may_change(kind: type[Decoder]) -> None:
    """From one hypothesis to a beam of the same memory, and back: its values stay as they were projected, or not."""
    for beams in ((None, 6, None), (6, None, 6)):
        search = Search(kind, Case("additive", "before", "vector", 1, 1, 1, 4, memory=40))
        for beam in beams:
            search.beam = beam
            search.state = search.expected = search.decoder.first_state(1, beam)
            search.go()
            search.go()


def test_memories_may_take_turns(kind: type[Decoder], form: Case) -> None:
    search = Search(kind, form)
    memories = [search.memory]
    for keys in (2, 9, 14):
        states = torch.randn(3, keys, 11, dtype=torch.float64)
        memories.append(search.decoder.prepare(states, torch.randint(1, keys + 1, (3,))))
    past = isinstance(search.decoder.attention, PASTS)
    for number in (0, 1, 0, 2, 2, 3, 1):
        search.memory = memories[number]
        if past:
            search.state, search.expected = (y._replace(attention=None) for y in (search.state, search.expected))
        search.go()


def test_weights_may_be_asked_for_at_any_step(kind: type[Decoder], form: Case) -> None:
    search = Search(kind, form)
    counts = [len(search.go(need_weights)) for need_weights in (True, False, True, True, False, False, True)]
    assert len({counts[k] for k in (0, 2, 3, 6)}) == len({counts[k] for k in (1, 4, 5)}) == 1
    assert counts[0] == counts[1] + 1


def test_opened_without_a_state(kind: type[Decoder], form: Case) -> None:
    """The first step begins from zeros."""
    search = Search(kind, form)
    x = search.table[:3]
    found = search.step(x, search.memory, need_weights=True)
    assert_equal(tensors(found), tensors(search.step(x, search.memory, search.state, need_weights=True)))
    assert len(search.step(x, search.memory)) == 3


@pytest.mark.parametrize("symbols", [256, 257])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_numbers_of_a_table(kind: type[Decoder], dtype: torch.dtype, symbols: int) -> None:
    """Integers of any kind, for few symbols, whose products are made ahead, and for many."""
    search = Search(kind, FORMS[3], symbols=symbols)
    numbers = torch.tensor([5, 0, 255])
    for _ in range(2):
        found = search.step(numbers.to(dtype), search.memory, search.state)
        assert_equal(tensors(found), tensors(search.decoder.step(search.table[numbers], search.memory, search.state)))


def test_a_table_with_a_gradient(kind: type[Decoder]) -> None:
    """None flows."""
    embedding = nn.Embedding(9, 5, dtype=torch.float64)
    decoder, given = made(kind, Case("location", "after", "fed"))
    memory = decoder.prepare(given.states)
    step = decoder.opened(embedding.weight)
    state, numbers = given.state, torch.tensor([1, 2, 3])
    for training in (True, False):
        decoder.train(training)
        found = tensors(step(numbers, memory, state))
        assert not any(y.requires_grad for y in found)
        expected = decoder.step(embedding(numbers), memory, state)
        assert all(y.requires_grad for y in tensors(expected))
        assert_equal(found, tensors(expected))


@pytest.mark.parametrize("name", sorted(STEPPED.keys() - SERVED))
def test_opened_with_another_attention(kind: type[Decoder], name: str, calls: Calls) -> None:
    decoder: Any = kind(5, 8, STEPPED[name].make(8, 8, 6), 2, attend="after", **VECTORS["fed"]).double().eval()
    memory, table = decoder.prepare(torch.randn(2, 6, 8, dtype=torch.float64)), torch.randn(9, 5, dtype=torch.float64)
    step, state, right = decoder.opened(table), decoder.first_state(2, 3), decoder.first_state(2, 3)
    for _ in range(3):
        numbers, kept = torch.randint(9, (2, 3)), torch.randint(3, (2, 3))
        found = step(numbers, memory, state, need_weights=True)
        expected = decoder.step(table[numbers], memory, right, need_weights=True)
        assert_equal(tensors(found), tensors(expected))
        assert not any(y.requires_grad for y in tensors(found))
        state, right = found[2].select(kept), expected[2].select(kept)
    assert calls == []


def test_opened_in_training_and_under_autocast(kind: type[Decoder], form: Case) -> None:
    """As a step by itself: with dropout, or in the parameters' dtype."""
    decoder, given = made(kind, form._replace(layers=2), torch.float32, dropout=0.5)
    memory, x = decoder.prepare(given.states, given.lengths), given.x[:, 0]
    results = []
    for step in (decoder.opened(), decoder.step):
        torch.manual_seed(4)
        results.append(tensors(step(x, memory, given.state)))
    assert_same_bits(*results)
    step = decoder.eval().opened()
    plain = tensors(step(x, memory, given.state))
    assert not torch.allclose(results[0][0], plain[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(step(x, memory, given.state))
        assert_equal(found, tensors(decoder.step(x, memory, given.state)), rtol=0, atol=0)
    assert_equal(found, plain, rtol=0, atol=0.02)
    assert_equal(tensors(step(x, memory, given.state)), plain, rtol=0, atol=0)


def test_float32_steps(kind: type[Decoder], form: Case) -> None:
    decoder, given = made(kind, form, torch.float32)
    step, whole, state, found = decoder.eval().opened(), call(decoder, given), given.state, []
    memory = decoder.prepare(given.states, given.lengths, given.mask)
    for y in given.x.unbind(1):
        *results, state, weights = step(y, memory, state, need_weights=True)
        found.append([*results, weights])
    joined = [*(torch.stack(one, 1) for one in zip(*found, strict=True)), *tensors(state)]
    error = form.tolerance(torch.float32)
    assert_equal(joined, whole, rtol=error, atol=error)


@pytest.mark.usefixtures("instruction_set")
def test_opened_by_each_instruction_set(kind: type[Decoder], form: Case) -> None:
    search = Search(kind, form._replace(size=67, memory=70, keys=7), beam=3)
    for _ in range(3):
        search.go()


def test_step_with_a_beam_has_gradients(kind: type[Decoder], form: Case) -> None:
    """Of hypotheses that share a memory, as of as many sentences."""
    decoder, given = made(kind, form._replace(batch=2))
    memory, beam = decoder.prepare(given.states, given.lengths), 3
    x = torch.randn(2, beam, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    found, state = [], decoder.first_state(2, beam)
    many, of_many = memory.select(rows), decoder.first_state(6)
    expected: list[Tensor] = []
    for _ in range(2):
        output, context, state, weights = decoder.step(x, memory, state, need_weights=True)
        found.extend([output, context, weights])
        output, context, of_many, weights = decoder.step(x.flatten(0, 1), many, of_many, need_weights=True)
        expected.extend(y.view(2, beam, -1) for y in (output, context, weights))
    wanted = [x, given.states, *decoder.parameters()]
    assert_equal([*found, *gradients(found, wanted, retain_graph=True)], [*expected, *gradients(expected, wanted)])


# The matrices that are kept.


def change(decoder: Any, how: str) -> None:
    """All parameters, by other tensors or in their places."""
    with torch.no_grad():
        for module in decoder.modules():
            for name, x in list(module.named_parameters(recurse=False)):
                if how == "assigned":
                    setattr(module, name, nn.Parameter(1.5 * x))
                else:
                    x.mul_(1.5)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("how", ["assigned", "in place"])
def test_opened_keeps_the_parameters_that_there_were(kind: type[Decoder], how: str, used: bool) -> None:
    """Also where no step was made yet."""
    for form, symbols in ((FORMS[0], None), (FORMS[1], 5), (FORMS[2], 300), (FORMS[3], None)):
        search = Search(kind, form, symbols=symbols)
        decoder, numbers = search.decoder, torch.tensor([1, 0, 4])
        given = numbers if symbols else search.table[numbers]
        expected = tensors(decoder.step(search.table[numbers], search.memory, search.state))
        if used:
            assert_equal(tensors(search.step(given, search.memory, search.state)), expected)
        change(decoder, how)
        assert_equal(tensors(search.step(given, search.memory, search.state)), expected)


@pytest.mark.parametrize("how", ["assigned", "in place"])
def test_opened_anew_sees_what_has_changed(kind: type[Decoder], form: Case, how: str) -> None:
    for symbols in (None, 5, 300):
        search = Search(kind, form, symbols=symbols)
        seed = torch.get_rng_state()
        before, first = search.go(), search.decoder.first_state(3)
        change(search.decoder, how)
        search.state = search.expected = first
        search.step = search.decoder.opened(search.table if symbols else None)
        torch.set_rng_state(seed)
        assert not torch.allclose(search.go()[0], before[0])


def test_opened_matrices_are_packed_once(kind: type[Decoder], form: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    packs, calls = recorded(monkeypatch, "pack"), recorded(monkeypatch)
    search = Search(kind, form)
    for rows in ([0, 1, 2], [2, 0], [1]):
        search.leave(rows)
        search.go()
        search.go()
    assert len(packs) == 1
    assert len({one[FIELD].data_ptr() for one in calls}) == 1


FIELD = -17
"""Of the packed matrices, among the operator's arguments."""


def test_one_opened_step_for_each_decoder(kind: type[Decoder]) -> None:
    """They share nothing: two of them in turns."""
    searches = [Search(kind, Case("additive", "before", "fed", memory=40)) for _ in range(2)]
    for _ in range(2):
        for search in searches:
            search.go()


@pytest.mark.parametrize("of", [AttentiveGRU, AttentiveLSTM])
def test_greedy_search_is_teacher_forcing_of_what_it_finds(of: type[Decoder]) -> None:
    """A whole search, as users write it."""
    decoder, given = made(of, Case("location", "after", "fed", 2, steps=8))
    embedding, vocabulary = torch.randn(12, 5, dtype=torch.float64), nn.Linear(7, 12).double()
    memory = decoder.eval().prepare(given.states, given.lengths)
    step, state, symbol = decoder.opened(embedding), decoder.first_state(3), torch.zeros(3, dtype=torch.int64)
    symbols, outputs = [symbol], []
    for _ in range(8):
        output, _, state = step(symbol, memory, state)
        symbol = vocabulary(output).argmax(-1)
        symbols.append(symbol)
        outputs.append(output)
    forced = decoder(embedding[torch.stack(symbols[:-1], 1)], memory)[0]
    assert_equal([torch.stack(outputs, 1)], [forced])
    assert_same_bits([vocabulary(forced).argmax(-1)], [torch.stack(symbols[1:], 1)])


FORMS_OF_GREEDY = [
    Case("additive", "before", memory=40),  # projected values
    Case("additive", "before", "vector", memory=40),
    Case("general", "after", "fed", 2),
    Case("location", "after", "vector"),
    Case("coverage", "before", "fed"),
]


@pytest.mark.parametrize("symbols", [9, 300])
@pytest.mark.parametrize("form", FORMS_OF_GREEDY, ids=str)
@pytest.mark.parametrize("of", [AttentiveGRU, AttentiveLSTM])
def test_greedy_steps_take_the_likeliest(of: type[Decoder], form: Case, symbols: int) -> None:
    """As a loop does; of many symbols they are such a loop."""
    decoder, given = made(of, form)
    size = decoder.hidden_size if decoder.vector_size is None else decoder.vector_size
    table, layer = torch.randn(symbols, 5, dtype=torch.float64), nn.Linear(size, symbols).double()
    memory, first = decoder.eval().prepare(given.states, given.lengths), 2
    opened = decoder.opened(table, layer.weight, layer.bias)
    state, symbol = decoder.first_state(3), torch.tensor([0, 3, 1])
    found, scores, last, weights = opened.greedy(symbol, memory, state, 6, first=first, need_weights=True)
    expected: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(6):
            output, _, state, of_step = decoder.step(table[symbol], memory, state, need_weights=True)
            best, choice = layer(output)[:, first:].log_softmax(-1).max(-1)
            symbol = choice + first
            for some, x in zip(expected, (symbol, best, of_step), strict=True):
                some.append(x)
    assert torch.equal(found, torch.stack(expected[0], 1))
    assert weights is not None
    assert_equal(
        [scores, weights, *tensors(last)],
        [torch.stack(expected[1], 1), torch.stack(expected[2], 1), *tensors(state)],
    )
    both = opened.greedy(symbol, memory, state, 2, first=first)
    again = opened.greedy(symbol, memory, state, 1, first=first)
    rest = opened.greedy(again[0][:, 0], memory, again[2], 1, first=first)
    assert torch.equal(both[0], torch.cat((again[0], rest[0]), 1))
    assert both[3] is None


@pytest.mark.parametrize("symbols", [9, 300])
@pytest.mark.parametrize("form", FORMS_OF_GREEDY, ids=str)
def test_greedy_steps_stop_at_the_end(form: Case, symbols: int) -> None:
    """Any symbol may be the one that ends an output: up to there all is as without one."""
    decoder, given = made(AttentiveGRU, form)
    size, steps = decoder.hidden_size if decoder.vector_size is None else decoder.vector_size, 8
    layer = nn.Linear(size, symbols).double()
    memory = decoder.eval().prepare(given.states, given.lengths)
    opened = decoder.opened(torch.randn(symbols, 5).double(), layer.weight, layer.bias)
    state, symbol = decoder.first_state(3), torch.tensor([0, 3, 1])
    free, scores, last, weights = opened.greedy(symbol, memory, state, steps, need_weights=True)
    for end in {*free.flatten().tolist(), symbols - 1}:
        made_of = opened.greedy(symbol, memory, state, steps, end=end, need_weights=True)
        ended = (free == end).long().cumsum(1) > 0
        after = torch.cat((torch.zeros_like(ended[:, :1]), ended[:, :-1]), 1)
        assert torch.equal(made_of[0], free.masked_fill(after, end))
        assert torch.equal(made_of[1], scores.masked_fill(after, 0.0))
        assert torch.equal(made_of[3][~after], weights[~after])
        assert not made_of[3][:, after.all(0)].any()
        assert (made_of[2] is None) == bool(ended[:, -1].all())
        if made_of[2] is not None:
            assert torch.equal(made_of[2].hidden[:, ~ended[:, -1]], last.hidden[:, ~ended[:, -1]])


def test_greedy_steps_stop_together_on_threads() -> None:
    torch.manual_seed(3)
    attention = attnext.BahdanauAttention(320, 8, 16)
    decoder = AttentiveGRU(8, 320, attention).eval()
    memory, table, layer = decoder.prepare(torch.randn(12, 5, 8)), 4 * torch.randn(20, 8), nn.Linear(320, 20)
    opened = decoder.opened(table, layer.weight, layer.bias)
    symbol, state = torch.arange(12), decoder.first_state(12)
    free = opened.greedy(symbol, memory, state, 30)[0]
    often = free.flatten().bincount().argmax().item()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(opened.greedy(symbol, memory, state, 30, end=often))
    finally:
        torch.set_num_threads(threads)
    after = ((free == often).long().cumsum(1) - (free == often).long()) > 0
    assert bool((free == often).any(1).all())
    for symbols, scores, last, _ in found:
        assert torch.equal(symbols, free.masked_fill(after, often))
        assert torch.equal(scores, found[0][1])
        assert last is None


@pytest.mark.parametrize("symbols", [9, 300])
def test_of_equally_likely_symbols_greedy_steps_take_the_first(symbols: int) -> None:
    decoder, given = made(AttentiveGRU, Case())
    layer = nn.Linear(decoder.hidden_size, symbols).double()
    memory, table = decoder.eval().prepare(given.states), torch.randn(symbols, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.bias[[1, 4, 7]] = 2.0
    opened = decoder.opened(table, layer.weight, layer.bias)
    found = opened.greedy(torch.zeros(3, dtype=torch.int64), memory, decoder.first_state(3), 2, first=2)[0]
    assert (found == 4).all()


def test_greedy_steps_of_damaged_parameters() -> None:
    decoder, given = made(AttentiveGRU, Case())
    layer = nn.Linear(decoder.hidden_size, 9).double()
    memory, table = decoder.eval().prepare(given.states), torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.bias[4] = float("nan")
    opened = decoder.opened(table, layer.weight, layer.bias)
    scores = opened.greedy(torch.zeros(3, dtype=torch.int64), memory, decoder.first_state(3), 2)[1]
    assert bool(scores.isnan().all())


def test_what_greedy_steps_refuse() -> None:
    decoder, given = made(AttentiveGRU, Case())
    weight, table = torch.randn(9, decoder.hidden_size).double(), torch.randn(9, 5).double()
    memory, state = decoder.eval().prepare(given.states), decoder.first_state(3)
    opened, symbol = decoder.opened(table, weight), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="greedy needs the weight of an output layer"):
        decoder.opened(table).greedy(symbol, memory, state, 2)
    with pytest.raises(ValueError, match="steps must be"):
        opened.greedy(symbol, memory, state, 0)
    with pytest.raises(ValueError, match="first must be the number of a symbol, got 9"):
        opened.greedy(symbol, memory, state, 2, first=9)
    for end in (3, 9, True):
        with pytest.raises(ValueError, match="end must be None or the number of a symbol from first=4 on"):
            opened.greedy(symbol, memory, state, 2, first=4, end=end)
    with pytest.raises(ValueError, match="previous must have 1 dimension"):
        opened.greedy(symbol.view(3, 1), memory, state, 2)
    for bad in (9, -1):
        with pytest.raises((IndexError, ValueError), match="previous must lie between"):
            opened.greedy(torch.full((3,), bad), memory, state, 2)
    for arguments, message in (
        ((table, weight[:, 1:]), "weight must have size"),
        ((table, weight[1:]), "weight must have size 9"),
        ((table, weight, torch.zeros(3).double()), "bias must have size 9"),
        ((table, None, torch.zeros(9).double()), "bias needs a weight"),
        ((None, weight), "weight needs a table"),
        ((table, weight.float()), "weight must have"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            decoder.opened(*arguments)


def test_opened_steps_in_two_threads() -> None:
    """Of one decoder, each with a memory of its own and sizes of its own."""
    decoder = made(AttentiveGRU, Case("additive", "before", "vector", memory=40))[0].eval()
    opened, before = decoder.opened(), sys.getswitchinterval()

    def search(seed: int) -> list[Tensor]:
        drawn = torch.Generator().manual_seed(seed)
        states = torch.randn(1 + seed % 3, 5 + seed % 2, 40, dtype=torch.float64, generator=drawn)
        memory, state = decoder.prepare(states), decoder.first_state(len(states))
        found = []
        for _ in range(60):
            x = torch.randn(len(states), 5, dtype=torch.float64, generator=drawn)
            output, context, state = opened(x, memory, state)
            found += [output, context]
        return found

    expected = [search(seed) for seed in range(6)]
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(search, list(range(6)) * 3))
    finally:
        sys.setswitchinterval(before)
    for seed, found in zip(list(range(6)) * 3, results, strict=True):
        assert_same_bits(found, expected[seed])


def test_opened_with_an_attention_that_still_drops() -> None:
    """Dropout of weights while the rest is in evaluation mode: the operator has no seeds for it."""
    decoder, given = made(AttentiveLSTM, Case("additive", "before"))
    decoder.attention.dropout = 0.5
    decoder.eval().attention.train()
    memory, state, outputs = decoder.prepare(given.states), decoder.first_state(3), []
    for step in (decoder.opened(), decoder.step):
        torch.manual_seed(3)
        outputs.append(step(given.x[:, 0], memory, state)[0].detach())
    assert_same_bits(outputs[:1], outputs[1:])


def test_opened_under_autocast_and_used_outside() -> None:
    decoder, given = made(AttentiveGRU, Case("general", "after"), torch.float32)
    table = torch.randn(9, 5)
    memory, state, symbols = decoder.eval().prepare(given.states), decoder.first_state(3), torch.tensor([1, 8, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opened = decoder.opened(table)
    assert_same_bits([opened(symbols, memory, state)[0]], [decoder.opened(table)(symbols, memory, state)[0]])


def test_a_state_without_its_history(kind: type[Decoder]) -> None:
    decoder, given = made(kind, Case("location", "after", "fed"))
    memory = decoder.prepare(given.states)
    state = decoder(given.x, memory)[2]
    assert all(x.requires_grad for x in tensors(state))
    cut = state.detach()
    assert not any(x.requires_grad for x in tensors(cut))
    assert_same_bits(tensors(cut), tensors(state))
