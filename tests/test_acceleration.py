"""accelerate and restore: what is found, what is left alone and why, and what must not change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import attnext
from attnext.compat._recipe import Recipe
from attnext.definitions import by_definition


class Pasted(nn.Module):
    """An additive attention as people paste it: ESPnet's names, under another one."""

    def __init__(self, states: int = 6, query: int = 5, features: int = 4) -> None:
        super().__init__()
        self.mlp_enc = nn.Linear(states, features)
        self.mlp_dec = nn.Linear(query, features, bias=False)
        self.gvec = nn.Linear(features, 1)
        self.dunits = query
        self.reset()

    def reset(self) -> None:
        self.h_length = self.enc_h = self.pre_compute_enc_h = self.mask = None

    def score(self, total: Tensor) -> Tensor:
        return self.gvec(torch.tanh(total)).squeeze(2)

    def forward(self, enc_hs_pad: Tensor, enc_hs_len: Any, dec_z: Any, att_prev: Any, scaling: float = 2.0) -> Any:
        if self.pre_compute_enc_h is None:
            self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.size(1)
            self.pre_compute_enc_h = self.mlp_enc(enc_hs_pad)
        if self.mask is None:
            ends = torch.as_tensor(enc_hs_len).unsqueeze(1)
            self.mask = torch.arange(enc_hs_pad.shape[1]) >= ends
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), self.dunits)
        scores = self.score(self.pre_compute_enc_h + self.mlp_dec(dec_z).unsqueeze(1))
        weights = (scaling * scores.masked_fill(self.mask, -torch.inf)).softmax(1)
        return (weights.unsqueeze(1) @ self.enc_h).squeeze(1), weights


class Different(Pasted):
    """The same names, sizes and arguments, and another score."""

    def score(self, total: Tensor) -> Tensor:
        return self.gvec(torch.relu(total)).squeeze(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.attend = Pasted()
        self.heads = nn.ModuleList([Pasted(), Different()])


LENGTHS = [7, 3]


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int], Tensor, None]:
    states = torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)
    return states, LENGTHS, torch.randn(2, 5, dtype=dtype, requires_grad=True), None


def both(dtype: torch.dtype = torch.float32) -> tuple[Pasted, Pasted]:
    plain = Pasted().to(dtype)
    swapped = copy.deepcopy(plain)
    assert attnext.accelerate(swapped)
    return plain, swapped


def calls(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records whose forward serves each call of a swapped module."""
    served: list[str] = []
    original = Pasted.forward

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        served.append("original")
        return original(self, *positional, **named)

    monkeypatch.setattr(Pasted, "forward", forward)
    return served


def test_report_and_restore() -> None:
    model = Model()
    report = attnext.accelerate(model)
    assert [(one.name, one.kind, one.recipe, one.swapped) for one in report] == [
        ("attend", "Pasted", "espnet.AttAdd", True),
        ("heads.0", "Pasted", "espnet.AttAdd", True),
        ("heads.1", "Different", "espnet.AttAdd", False),
    ]
    assert "differs from the original's" in report.left[0].reason
    assert report
    assert len(report.swapped) == 2
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "recipe"]
    assert lines[1].split() == ["attend", "Pasted", "espnet.AttAdd", "swapped"]
    assert isinstance(model.attend, Pasted)
    assert type(model.attend).__name__ == "Pasted"
    assert attnext.accelerate(model).found == report.found  # once more changes nothing
    attnext.restore(model)
    assert [type(m) for m in (model.attend, *model.heads)] == [Pasted, Pasted, Different]
    assert not attnext.accelerate(nn.Linear(2, 2))
    assert str(attnext.accelerate(nn.Linear(2, 2))) == "no module found that attnext knows"
    for function in (attnext.accelerate, attnext.restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            function(3)  # type: ignore[operator]


def test_an_attention_without_a_recipe_is_reported() -> None:
    class MyAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    class AttentionalDecoder(MyAttention):
        """Which has one, and is none."""

    (one,) = attnext.accelerate(nn.Sequential(MyAttention(), AttentionalDecoder()))
    assert one.name == "0"
    assert one.reason == "no recipe for its parameters and arguments"


@pytest.mark.parametrize(("options", "names"), [
    ({"only": "attend"}, ["attend"]),
    ({"only": ["heads.*"]}, ["heads.0"]),
    ({"only": "espnet"}, ["attend", "heads.0"]),
    ({"only": "espnet.AttLoc"}, []),
    ({"skip": "attend"}, ["heads.0"]),
    ({"skip": ["espnet.*"]}, []),
    ({"probe": False}, []),
])  # fmt: skip
def test_only_and_skip(options: dict[str, Any], names: list[str]) -> None:
    report = attnext.accelerate(Model(), **options)
    assert [one.name for one in report.swapped] == names
    with pytest.raises(TypeError, match="only must be names"):
        attnext.accelerate(Model(), only=[3])  # type: ignore[list-item]


class Adapted(nn.Linear):
    """As low-rank adapters are: a subclass that adds to the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def adapted(module: Pasted) -> None:
    module.mlp_dec = Adapted(5, 4, bias=False)


def hooked(module: Pasted) -> None:
    module.mlp_dec.register_forward_hook(lambda *_: None)


def weight_norm(module: Pasted) -> None:
    torch.nn.utils.weight_norm(module.gvec)  # by a hook


def parametrized(module: Pasted) -> None:
    parametrizations.spectral_norm(module.mlp_dec)


def pruned(module: Pasted) -> None:
    prune.l1_unstructured(module.mlp_dec, "weight", 3)


def quantised(module: Pasted) -> None:
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)


def replaced(module: Pasted) -> None:
    module.forward = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [adapted, hooked, weight_norm, parametrized, pruned, quantised, replaced])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_that_do_more_are_left_alone(change: Callable[[Pasted], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Pasted()
    change(module)
    assert not attnext.accelerate(module)
    assert type(module) is Pasted
    if change is replaced:
        return
    swapped = Pasted()  # and where it is changed afterwards, the original serves
    assert attnext.accelerate(swapped)
    served = calls(swapped, monkeypatch)
    change(swapped)
    swapped(*arguments())
    assert served == ["original"]


def test_the_probe_disturbs_nothing() -> None:
    module, seen = Pasted(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    module.register_buffer("count", torch.zeros(()), persistent=False)
    module(*arguments())  # keeps keys that have a graph
    kept, state = module.pre_compute_enc_h, torch.random.get_rng_state()
    with torch.no_grad():
        assert attnext.accelerate(module)
    assert len(seen) == 1
    assert module.pre_compute_enc_h is kept
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.training
    module(*arguments())
    assert len(seen) == 2  # a hook of the module itself is called as before


def test_where_the_code_is_looked_at_the_original_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, swapped = (module.requires_grad_(False) for module in both())  # as a trace takes them
    served = calls(swapped, monkeypatch)
    states, lengths, query, _ = (x.detach() if isinstance(x, Tensor) else x for x in arguments())

    def context(query: Tensor) -> Tensor:
        swapped.reset()
        return swapped(states, lengths, query, None)[0]

    context(query)
    assert served == []
    torch.jit.trace(context, query, check_trace=False)
    torch.func.vmap(context)(query.unsqueeze(0))
    torch.func.jvp(context, (query,), (query,))
    with attnext.use_backend("reference"):
        context(query)
    with torch.autocast("cpu", torch.bfloat16):
        assert context(query).dtype == plain(states, lengths, query, None)[0].dtype
    assert len(served) == 6  # of which the last is the plain one's


def test_compiled_and_exported_as_the_original() -> None:
    plain, swapped = both()
    inputs = arguments()
    found = torch.compile(swapped, backend="eager")(*inputs)
    expected = plain(*inputs)
    assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))
    for module in (plain, swapped):
        module.reset()
    states, _, query, _ = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
    exported = torch.export.export(swapped, (states, LENGTHS, query, None), strict=False)
    assert not [node for node in exported.graph.nodes if "attnext" in str(node.target)]
    assert torch.equal(exported.module()(states, LENGTHS, query, None)[0], expected[0])


def test_second_derivatives() -> None:
    plain, swapped = both(torch.float64)
    inputs = arguments(torch.float64)
    found = []
    for module in (plain, swapped):
        total = sum(y.sin().sum() for y in module(*inputs))
        grads = torch.autograd.grad(total, [inputs[0], inputs[2], *module.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(penalty, [inputs[0], inputs[2], *module.parameters()], allow_unused=True))
        module.reset()
    for one, right in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros(()) if one is None else one, torch.zeros(()) if right is None else right,
                                   check_dtype=False)  # fmt: skip


@pytest.mark.parametrize("steps", [False, True], ids=["calls", "steps"])
def test_second_derivatives_by_the_definition(steps: bool) -> None:
    shapes = {"query": (2, 4), "key": (2, 5, 4), "value": (2, 5, 3), "score_weight": (4,)}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    filters = torch.randn(4, 1, 3, dtype=torch.float64)

    def results(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with by_definition():
            if not steps:
                context, weights = attnext.additive_attention(query, key, value, v, need_weights=True)
                assert weights is not None
                return context, weights, attnext.additive_scores(query, key, v)
            memory, shared = attnext.prepare(key, value, v), attnext.prepare(key, None)
            context, weights = attnext.additive_attention(query, memory, need_weights=True)
            assert weights is not None
            return (*attnext.additive_step(query, memory, filters, None, weights), context,
                    attnext.dot_attention(query, shared)[0])  # fmt: skip

    assert torch.autograd.gradcheck(results, inputs)
    assert torch.autograd.gradgradcheck(results, inputs)


def test_scripting_compiles_the_original() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class Slower(Recipe):
        original = "nowhere:Plain"

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    from attnext.compat._recipe import swapped

    module, x = Plain(), torch.randn(2, 3)
    expected = module(x)
    module.__class__ = swapped(Slower, Plain)
    holder = nn.Sequential(module)
    assert torch.equal(torch.jit.script(holder)(x), expected)
    assert isinstance(module, Slower)  # which is as it was


def test_training_saving_and_going_on_with_the_original(tmp_path: Any) -> None:
    """A few steps with an optimizer made before the swap, a checkpoint, and the same with the original's class."""
    torch.manual_seed(1)
    losses = []
    for accelerated in (False, True):
        torch.manual_seed(2)
        model = Pasted().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if accelerated:
            assert attnext.accelerate(model)
        states, lengths, query, _ = arguments(torch.float64)
        found = []
        for step in range(6):
            if step == 3:
                torch.save(model.state_dict(), tmp_path / "model.pt")
                model = Pasted().double()
                model.load_state_dict(torch.load(tmp_path / "model.pt"))
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            model.reset()
            loss = model(states, lengths, query, None)[0].square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0.0)


def test_a_pickle_reads_without_attnext() -> None:
    _, swapped = both()
    file = io.BytesIO()
    torch.save(swapped, file)
    assert b"attnext" not in file.getvalue()
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is Pasted


def test_empty_rows_are_zero() -> None:
    _, swapped = both()
    states, _, query, _ = arguments()
    context, weights = swapped(states, [7, 0], query, None)
    assert not context[1].any()
    assert not weights[1].any()
    grads = torch.autograd.grad(context.sum(), [states, query, *swapped.parameters()], allow_unused=True)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


def test_a_class_by_name_needs_its_code_base() -> None:
    import attnext.compat

    assert {"espnet"} <= set(attnext.compat.CODE_BASES)
    with pytest.raises(AttributeError, match="no class 'Nothing': there are Att"):
        attnext.compat.espnet.Nothing  # noqa: B018
    with pytest.raises(ImportError, match="BahdanauAttention of GNMT is not there to be made"):
        attnext.compat.gnmt.BahdanauAttention  # noqa: B018


def test_a_layer_may_have_a_name_that_recipes_use() -> None:
    class Layered(Pasted):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            self.version = nn.Identity()

    module = Layered()
    assert attnext.accelerate(module)
    assert isinstance(module.layers, nn.ModuleList)
    assert isinstance(module.version, nn.Identity)
