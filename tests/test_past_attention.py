"""Attention with a state (location-sensitive, coverage, monotonic, forward) against its formulas, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family import Recorded
from torch import Tensor

from attnext import (
    CoverageAttention,
    ForwardAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
    reference,
    use_backend,
)

BATCH, STEPS, KEYS, QUERY, MEMORY, SIZE = 3, 4, 7, 5, 6, 9
LENGTHS = torch.tensor([KEYS, 0, 4])
Module = LocationSensitiveAttention | CoverageAttention | MonotonicAttention | LocalAttention
KINDS: dict[str, tuple[type[Module], dict[str, Any]]] = {
    "previous": (LocationSensitiveAttention, {"features": "previous", "filters": 3, "kernel_size": 5}),
    "cumulative": (
        LocationSensitiveAttention,
        {"features": "cumulative", "filters": 2, "kernel_size": 1, "bias": True},
    ),
    "both": (LocationSensitiveAttention, {"features": "both", "filters": 4, "kernel_size": 31, "normalize": True}),
    "sparse": (LocationSensitiveAttention, {"features": "previous", "filters": 3, "normalizer": "sparsemax"}),
    "coverage": (CoverageAttention, {"temperature": 0.5}),
    "monotonic": (MonotonicAttention, {}),
    "recursive": (MonotonicAttention, {"mode": "recursive", "normalize": False, "temperature": 2.0}),
    "forward": (ForwardAttention, {"filters": 3, "kernel_size": 3}),
    "agent": (ForwardAttention, {"transition_agent": True, "features": "previous", "filters": 2}),
}
KINDS |= {
    "local-m": (LocalAttention, {"window": 1}),
    "local-p": (LocalAttention, {"window": 2, "position": "predicted"}),
    "window": (LocalAttention, {"window": 2, "position": "last", "normalizer": "sigmoid"}),
    "local, last": (LocalAttention, {"window": 3, "position": "last", "normalizer": "entmax15"}),
}
ONWARD = ("monotonic", "recursive", "forward", "agent")
APART = ("sparse", "monotonic", "recursive", "local-p", "local, last")
"""Those with a kernel for the scores and PyTorch for the rest; the others are one kernel."""


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with use_backend(name):
        yield name


def module(kind: str, dtype: torch.dtype = torch.float64) -> Module:
    cls, options = KINDS[kind]
    attn = cls(QUERY, MEMORY, SIZE, **options).to(dtype)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    return attn


def inputs(dtype: torch.dtype = torch.float64, keys: int = KEYS) -> tuple[Tensor, Tensor]:
    """Queries and encoder states."""
    query, states = torch.randn(BATCH, STEPS, QUERY, dtype=dtype), torch.randn(BATCH, keys, MEMORY, dtype=dtype)
    return query.requires_grad_(), states.requires_grad_()


def features(attn: Module, p: dict[str, Tensor], weights: Tensor, cumulative: Tensor) -> Tensor | float:
    """The definition: a filter sees so many weights to both sides of a key, and nothing beyond the ends."""
    if isinstance(attn, CoverageAttention):
        return cumulative[:, :, None] * p["coverage_weight"]
    if isinstance(attn, MonotonicAttention | LocalAttention):
        return 0.0
    seen = {"previous": [weights], "cumulative": [cumulative], "both": [weights, cumulative]}[attn.features]
    filters, keys = p["location_convolution.weight"], weights.shape[1]
    reach = filters.shape[2] // 2
    rows = []
    for j in range(keys):
        total = torch.zeros(weights.shape[0], filters.shape[0], dtype=weights.dtype)
        for channel, x in enumerate(seen):
            for m in range(max(0, j - reach), min(keys, j + reach + 1)):
                total = total + x[:, m, None] * filters[:, channel, m - j + reach]
        rows.append(total)
    return torch.stack(rows, 1) @ p["location_projection.weight"].T


def centre(
    attn: LocalAttention, p: dict[str, Tensor], query: Tensor, t: int, weights: Tensor, lengths: Tensor | None
) -> Tensor:
    """Of the window, (B, 1)."""
    size = torch.full((BATCH, 1), weights.shape[1]) if lengths is None else lengths[:, None]
    if attn.position == "steps":
        return torch.minimum(torch.tensor(t), (size - 1).clamp(min=0))
    if attn.position == "last":
        return weights.argmax(1, keepdim=True)
    guess = torch.tanh(query @ p["position_predictor.0.weight"].T) @ p["position_predictor.2.weight"].T
    return size / (1 + (-guess).exp())


def formula(attn: Module, kind: str, query: Tensor, states: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """All steps from the beginning, with the parameters by their names in a checkpoint."""
    p, options = dict(attn.named_parameters()), KINDS[kind][1]
    v = p["score_weight"]
    if "gain" in p:
        v = p["gain"] * v / v.square().sum().sqrt()
    q = query @ p["query_projection.weight"].T + p.get("query_projection.bias", 0.0)
    k = states @ p["memory_projection.weight"].T
    cumulative = torch.zeros(states.shape[:2], dtype=states.dtype)
    weights = cumulative.clone()
    if kind in ONWARD:
        weights[:, 0] = 1.0
    transition = torch.full((BATCH, 1), 0.5, dtype=states.dtype)
    contexts, all_weights = [], []
    for t in range(query.shape[1]):
        scores = reference.additive_scores(
            q[:, t], k + features(attn, p, weights, cumulative), v, lengths=lengths,
            scale=1 / options.get("temperature", 1.0),
        )  # fmt: skip
        if isinstance(attn, MonotonicAttention):
            weights = reference.monotonic_weights(scores + p["score_bias"], weights)
        elif isinstance(attn, ForwardAttention):
            weights = reference.forward_weights(scores, weights, transition)
        else:
            if isinstance(attn, LocalAttention):
                away = torch.arange(states.shape[1]) - centre(attn, p, q[:, t], t, weights, lengths)
                scores = scores.masked_fill(away.abs() > attn.window, -torch.inf)
            weights = reference.normalize(scores, options.get("normalizer", "softmax"))
            if kind == "local-p":
                weights = weights * (-away.square() / (2 * (attn.window / 2) ** 2)).exp()
        cumulative = cumulative + weights
        context = (weights[:, None] @ states)[:, 0]
        if kind == "agent":
            both = torch.cat([context, q[:, t]], 1)
            transition = 1 / (1 + (-both @ p["transition_agent.weight"].T - p["transition_agent.bias"]).exp())
        contexts.append(context)
        all_weights.append(weights)
    return torch.stack(contexts, 1), torch.stack(all_weights, 1)


def gradients(context: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(9)
    loss = (context * torch.randn(context.shape, generator=rng, dtype=context.dtype)).sum()
    return torch.autograd.grad(loss + (weights * torch.randn(weights.shape, generator=rng)).sum(), leaves)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_steps_in_one_call(kind: str, lengths: Tensor | None) -> None:
    attn, (query, states) = module(kind), inputs()
    context, weights = attn(query, states, lengths=lengths, need_weights=True)
    expected = formula(attn, kind, query, states, lengths)
    close((context, weights), expected)
    leaves = (query, states, *attn.parameters())
    close(gradients(context, weights, *leaves), gradients(*expected, *leaves))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    memory, state, steps = attn.prepare(states, LENGTHS), None, []
    assert (memory.steps is not None) == (kind not in APART)
    for one in query.unbind(1):
        context, weights, state = attn.step(one, memory, state, need_weights=True)
        steps.append((context, weights))
    expected = formula(attn, kind, query, states, LENGTHS)
    context, weights = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    close((context, weights), expected)
    leaves = (query, states, *attn.parameters())
    close(gradients(context, weights, *leaves), gradients(*expected, *leaves))
    expected = tuple(x.detach() for x in expected)
    assert state is not None
    close(state.cumulative, expected[1].sum(1))
    first, none, _ = attn.step(query[:, 0], memory)
    assert none is None
    close(first, expected[0][:, 0])
    close(attn(query[:, 0], memory)[0], expected[0][:, 0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_hypotheses_have_pasts_of_their_own(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    memory = attn.prepare(states, LENGTHS)
    second = torch.randn_like(query)
    beams = torch.stack([query, second], 2)  # (B, steps, beam, Q)
    _, _, state = attn.step(beams[:, 0], memory)
    # Each hypothesis of the first row, and of the last, goes on from the other's past.
    state = state.select(torch.tensor([[1, 0], [0, 1], [1, 1]]))
    context, weights, _ = attn.step(beams[:, 1], memory, state, need_weights=True)
    assert weights is not None
    for row, column, before in ((0, 0, second), (0, 1, query), (1, 0, query), (2, 0, second), (2, 1, second)):
        path = torch.stack([before[:, 0], beams[:, 1, column]], 1)
        expected = formula(attn, kind, path, states, LENGTHS)
        close((context[row, column], weights[row, column]), (expected[0][row, 1], expected[1][row, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_hypotheses_are_attended_in_one_call(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    memory = attn.prepare(states, LENGTHS)
    _, _, state = attn.step(query[:, :3], memory)
    with torch.no_grad(), Recorded() as recorded:
        attn.step(query[:, :3], memory, state)
    assert recorded.names == ["additive_scores_cpu" if kind in APART else "additive_step_cpu"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_state_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """Of the caller's, who may start with the same weight on each key."""
    attn, (query, states) = module(kind, torch.float32), inputs(torch.float32)
    memory, uniform = attn.prepare(states), torch.full((BATCH, KEYS), 0.125)
    _, _, state = attn.step(query[:, 0], memory)
    state = state._replace(weights=uniform, cumulative=uniform)
    expected = attn.step(query[:, 1], memory, state)
    found = attn.step(query[:, 1], memory, state._replace(weights=uniform.to(dtype), cumulative=uniform.to(dtype)))
    torch.testing.assert_close(found[0], expected[0])
    assert found[2].weights.dtype == torch.float32


def doubled(layer: torch.nn.Module, *results: Any) -> Any:
    return 2 * results[-1]


def with_a_hook(attn: Module, name: str) -> None:
    attn.get_submodule(name).register_forward_hook(doubled)


def with_another_forward(attn: Module, name: str) -> None:
    layer = attn.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def with_a_parametrization(attn: Module, name: str) -> None:
    torch.nn.utils.parametrize.register_parametrization(attn.get_submodule(name), "weight", Doubled())


def with_weights_of_old_norms(attn: Module, name: str) -> None:
    """Which a hook makes anew before each call."""
    layer = attn.get_submodule(name)
    weight = layer._parameters.pop("weight")
    layer.register_parameter("raw", weight)
    layer.weight = torch.zeros_like(weight)
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", 2 * layer.raw))


CHANGES = [with_a_hook, with_another_forward, with_a_parametrization, with_weights_of_old_norms]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["query_projection", "location_convolution", "location_projection"])
@pytest.mark.parametrize("kind", ["previous", "agent", "sparse"])
def test_layers_may_be_changed_from_outside(kind: str, name: str, change: Callable[[Module, str], None]) -> None:
    attn, (query, states) = module(kind), inputs()
    changed = copy.deepcopy(attn)
    change(changed, name)
    with torch.no_grad():
        attn.get_submodule(name).weight.mul_(2)
    expected = attn(query, states, lengths=LENGTHS)[0]
    close(changed(query, states, lengths=LENGTHS)[0], expected)


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_kernel_cannot_know_keeps_a_step_from_being_one(change: Callable[[Module, str], None]) -> None:
    attn, (query, states) = module("both"), inputs()
    change(attn, "location_convolution")
    with torch.no_grad(), Recorded() as recorded:
        attn(query[:, 0], states)
    assert recorded.names == ["additive_step_cpu" if change is with_a_parametrization else "additive_scores_cpu"]


def test_hooks_of_all_modules_are_called() -> None:
    attn, (query, states), seen = module("both"), inputs(), set()
    expected = attn(query, states)[0]
    hook = torch.nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.add(type(layer)))
    try:
        close(attn(query, states)[0], expected)
    finally:
        hook.remove()
    assert seen == {LocationSensitiveAttention, torch.nn.Linear, torch.nn.Conv1d}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_taken_from_the_batch(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    memory = attn.prepare(states, LENGTHS)
    _, _, state = attn.step(query[:, 0], memory)
    whole, _, _ = attn.step(query[:, 1], memory, state)
    rows = torch.tensor([2, 0])
    some, _, _ = attn.step(query[:, 1][rows], memory.select(rows), state.select(rows))
    close(some, whole[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# A window that a rounding moves has other keys: local-m alone has a centre that is exact.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"local-p", "local, last"}))
def test_half_types(kind: str, dtype: torch.dtype) -> None:
    attn, (query, states) = module(kind, dtype), inputs(dtype)
    with torch.no_grad():
        for parameter in attn.parameters():  # so that what the roundings of the keys do to the scores stays small
            parameter.mul_(0.3)
    context, weights, state = attn.step(query[:, 0], attn.prepare(states, LENGTHS), need_weights=True)
    _, _, state = attn.step(query[:, 1], attn.prepare(states, LENGTHS), state)
    assert context.dtype == weights.dtype == attn(query, states, need_weights=True)[1].dtype == dtype
    assert state.weights.dtype == state.cumulative.dtype == torch.float32
    exact = formula(attn.double(), kind, query.double(), states.double(), LENGTHS)
    # Keys and queries are of size 1 or so: with D weights of 0.3, scores are off by a few roundings, p by as many.
    close_to = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(weights.double(), exact[1][:, 0], rtol=0, atol=close_to)
    torch.testing.assert_close(state.weights.double(), exact[1][:, 1], rtol=0, atol=close_to)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_reaches_nothing(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    hidden = torch.arange(KEYS) >= LENGTHS[:, None]
    poisoned = states.detach().masked_fill(hidden[:, :, None], torch.nan).requires_grad_()
    results: list[tuple[Tensor, ...]] = []
    with torch.no_grad():  # where nothing is hidden for the gradients' sake
        close(attn(query, poisoned, lengths=LENGTHS), attn(query, states, lengths=LENGTHS))
    for x in (states, poisoned):
        context, weights = attn(query, x, lengths=LENGTHS, need_weights=True)
        results.append((context, weights, *gradients(context, weights, query, *attn.parameters())))
    close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    memory = attn.prepare(states, LENGTHS)
    torch._dynamo.reset()  # of one function only so many versions are compiled
    compiled = torch.compile(attn.step, fullgraph=True, backend="aot_eager")
    _, _, state = attn.step(query[:, 0], memory)
    expected, actual = attn.step(query[:, 1], memory, state), compiled(query[:, 1], memory, state)
    close(actual[0], expected[0])
    close(actual[2][:2], expected[2][:2])
    close(*(torch.autograd.grad(x[0].sum(), query, retain_graph=True) for x in (actual, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_attend(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(keys=0)
    context, weights = attn(query, states, need_weights=True)
    assert weights.shape == (BATCH, STEPS, 0)
    assert torch.equal(context, torch.zeros(BATCH, STEPS, MEMORY, dtype=context.dtype))
    assert attn(query[:, :0], states)[0].shape == (BATCH, 0, MEMORY)
    query, states = inputs()
    context, weights, _ = attn.step(query[:0, :3], attn.prepare(states[:0]), need_weights=True)
    assert (context.shape, weights.shape) == ((0, 3, MEMORY), (0, 3, KEYS))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_values_are_cleared_once_where_they_are_multiplied(kind: str) -> None:
    attn, (_, states) = module(kind), inputs()
    with torch.no_grad():
        memory = attn.prepare(states, LENGTHS)
    cleared = kind in APART and not kind.startswith("local")  # whose windows are cleared as they are cut out
    assert memory.cleared == cleared
    assert (memory.value[1] == 0).all() == cleared


def test_bad_arguments() -> None:
    attn, (query, states) = module("both"), inputs()
    memory = attn.prepare(states)
    _, _, state = attn.step(query[:, 0], memory)
    beams = state.map(lambda x: x[:, None].repeat(1, 2, 1))
    for error, name, call in (
        (TypeError, "memory", lambda: attn.step(query[:, 0], states)),
        (TypeError, "state", lambda: attn.step(query[:, 0], memory, (1, 2))),
        (ValueError, "state", lambda: attn.step(query[:, 0], memory, state.select(torch.tensor([0])))),
        (ValueError, "state", lambda: attn.step(query[:, :2], memory, state)),
        (ValueError, "query", lambda: attn.step(query[:, :0], memory)),
        (ValueError, "mask", lambda: attn(query, memory, mask=torch.ones(BATCH, KEYS).bool())),
        (ValueError, "mask", lambda: attn(query, states, mask=torch.ones(BATCH, STEPS, KEYS).bool())),
        (ValueError, "indices", lambda: state.select(torch.tensor([[0], [0], [0]]))),
        (ValueError, "indices", lambda: beams.select(torch.tensor([[0], [2], [0]]))),
        (ValueError, "indices", lambda: beams.select(torch.tensor([[0], [0]]))),
        (ValueError, "indices", lambda: beams.select(torch.tensor([3]))),
        (TypeError, "indices", lambda: beams.select(torch.tensor([0.0]))),
        (ValueError, "features", lambda: LocationSensitiveAttention(2, 3, 4, features="all")),
        (ValueError, "kernel_size", lambda: LocationSensitiveAttention(2, 3, 4, kernel_size=2)),
        (ValueError, "filters", lambda: LocationSensitiveAttention(2, 3, 4, filters=0)),
    ):
        with pytest.raises(error, match=name):
            call()


def test_a_hard_reader_stops_at_the_first_sure_state_from_where_it_stood() -> None:
    attn, (query, states) = module("monotonic").eval(), inputs()
    memory, state, before = attn.prepare(states, LENGTHS), None, [0, 0, 0]
    with torch.no_grad():
        for one in query.unbind(1):
            sure = attn.scores(one, memory) + attn.score_bias > 0
            context, weights, state = attn.step(one, memory, state, need_weights=True)
            for b in range(BATCH):
                stop = next((j for j in range(before[b], KEYS) if sure[b, j]), KEYS)
                expected = torch.nn.functional.one_hot(torch.tensor(stop), KEYS + 1)[:KEYS].double()
                assert torch.equal(weights[b], expected)
                close(context[b], states[b, stop] if stop < KEYS else torch.zeros_like(context[b]))
                before[b] = stop


def test_noise_is_for_training() -> None:
    attn = MonotonicAttention(QUERY, MEMORY, SIZE, noise=2.0, hard=False)
    query, states = inputs(torch.float32)
    first, second = (attn(query, states, need_weights=True)[1] for _ in range(2))
    assert not torch.equal(first, second)
    attn.eval()
    first, second = (attn(query, states, need_weights=True)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_forward_attention_stays_at_the_last_state() -> None:
    attn = ForwardAttention(QUERY, MEMORY, SIZE)
    query, states = torch.randn(BATCH, 30, QUERY), torch.randn(BATCH, 3, MEMORY)
    context, weights = attn(query, states, need_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, 30))
    grads = torch.autograd.grad(context.square().sum(), list(attn.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("position", ["steps", "predicted", "last"])
def test_nothing_is_read_outside_the_window(position: str) -> None:
    attn = LocalAttention(QUERY, MEMORY, SIZE, window=2, position=position)
    query, states = torch.randn(BATCH, QUERY), torch.randn(BATCH, 40, MEMORY)
    memory = attn.prepare(states)
    with torch.no_grad():
        _, _, state = attn.step(query, memory)
        context, weights, _ = attn.step(query, memory, state, need_weights=True)
        outside = weights == 0
        assert ((~outside).sum(1) <= 5).all()
        memory.key[outside], memory.value[outside] = torch.nan, torch.nan
        again, _, _ = attn.step(query, memory, state)
    assert torch.equal(again, context)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_states(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    visible = torch.arange(KEYS) < LENGTHS[:, None]
    context, weights = attn(query, states, mask=visible, need_weights=True)
    assert (weights == 0)[~visible[:, None].expand_as(weights)].all()
    if kind not in ("local-m", "local-p"):  # whose window is placed by the length
        close((context, weights), attn(query, states, lengths=LENGTHS, need_weights=True))


def test_a_window_stays_at_the_last_state() -> None:
    attn = LocalAttention(QUERY, MEMORY, SIZE, window=1)
    query, states = torch.randn(1, QUERY).expand(BATCH, 9, QUERY), torch.randn(BATCH, KEYS, MEMORY)
    _, weights = attn(query, states, lengths=torch.tensor([KEYS, 1, 4]), need_weights=True)
    for row, length in enumerate((KEYS, 1, 4)):
        seen = weights[row, -1] > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, length - 2), length))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    attn, (query, states) = module(kind, torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        memory = attn.prepare(states, LENGTHS)
        _, _, state = attn.step(query[:, 0], memory)
        context, weights, _ = attn.step(query[:, 1], memory, state, need_weights=True)
    assert weights is not None
    assert context.dtype == weights.dtype == torch.bfloat16
    grads = torch.autograd.grad(context.float().sum(), list(attn.parameters()), allow_unused=True)
    assert all(grad is None or (grad.isfinite().all() and grad.dtype == torch.float32) for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_states_hidden_in_front(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    mask = torch.arange(KEYS).expand(BATCH, KEYS) >= 4
    _, weights = attn(query, states, mask=mask, need_weights=True)
    if kind not in ("local-m", "local-p"):  # whose window may lie in front
        assert (weights[:, 0].sum(-1) > 0).all()
        assert (weights[:, :, :4] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_of_the_context_alone(kind: str) -> None:
    attn, (query, states) = module(kind), inputs()
    expected = attn(query, states, lengths=LENGTHS, need_weights=True)
    attn.dropout = 0.5
    hidden = torch.arange(KEYS) >= LENGTHS[:, None]
    with torch.no_grad():  # where states are not cleaned for the gradients' sake
        poisoned = states.masked_fill(hidden[:, :, None], torch.nan)
        context, weights = attn(query, poisoned, lengths=LENGTHS, need_weights=True)
    steps = 1 if kind == "agent" else STEPS  # which sees the context, so that its next weights change
    close(weights[:, :steps], expected[1][:, :steps].detach())
    assert context.isfinite().all()
    assert not torch.allclose(context, expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_drawn_anew(kind: str) -> None:
    cls, options = KINDS[kind]
    torch.manual_seed(3)
    fresh = cls(QUERY, MEMORY, SIZE, **options)
    attn = module(kind, torch.float32)
    changed = {name: x.detach().clone() for name, x in attn.named_parameters()}
    attn.reset_parameters()
    for name, x in attn.named_parameters():
        assert not torch.equal(x, changed[name]), name
        assert x.abs().max() <= max(1.0, 2 * fresh.get_parameter(name).abs().max().item()), name
