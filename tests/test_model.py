"""The reference model: its cells against PyTorch's, and its logits against the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    VARIANTS,
    by_the_formulas,
    close,
    of_torch,
    ten,
    tiny,
)
from torch import Tensor
from torch.nn import functional as F

import attnext
from attnext.seq2seq.cells import CELLS, Product, over_steps
from attnext.seq2seq.checkpoint import tensors_of
from attnext.seq2seq.data import (
    PAD,
    START,
    UNKNOWN,
    Batch,
    pad,
)
from attnext.seq2seq.training import loss

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain(weight: Tensor) -> Product:
    return lambda x, base: base + F.linear(x, weight)


class Chain:
    """Three steps h' = tanh(bias + W [h, z]), each from the last, and what they end in."""

    def __init__(self, *rows: int) -> None:
        torch.manual_seed(0)
        self.weight, self.bias, self.first = drawn(4, 6), drawn(4), drawn(*rows, 4)
        self.others = [drawn(*rows, 2) for _ in range(3)]
        self.leaves = [self.weight, self.bias, self.first, *self.others]

    def outputs(self, of: Callable[[Tensor], Product]) -> list[Tensor]:
        product, h, found = of(self.weight), self.first, []
        for z in self.others:
            h = product(torch.cat((h, z), -1), self.bias.expand_as(h)).tanh()
            found.append(h)
        return found

    def total(self, of: Callable[[Tensor], Product]) -> Tensor:
        return torch.stack([(x.cos() * (place + 1)).sum() for place, x in enumerate(self.outputs(of))]).sum()


@pytest.mark.parametrize("rows", [(3,), (3, 2)])
def test_over_steps_is_a_linear_layer(rows: tuple[int, ...]) -> None:
    chain = Chain(*rows)
    close(chain.outputs(over_steps), chain.outputs(plain))
    got, expected = (torch.autograd.grad(chain.total(of), chain.leaves) for of in (over_steps, plain))
    close(got, expected)


def test_over_steps_when_some_gradients_are_asked_for_first() -> None:
    chain = Chain(3)
    of_weight, of_bias, of_first = torch.autograd.grad(chain.total(plain), chain.leaves[:3])
    value = chain.total(over_steps)
    close(torch.autograd.grad(value, chain.first, retain_graph=True)[0], of_first)
    close(torch.autograd.grad(value, chain.weight, retain_graph=True)[0], of_weight)
    close(torch.autograd.grad(value, chain.bias, retain_graph=True)[0], of_bias)
    value.backward(inputs=[chain.first], retain_graph=True)
    value.backward()
    assert chain.weight.grad is not None
    assert chain.first.grad is not None
    close(chain.weight.grad, of_weight)
    close(chain.first.grad, 2 * of_first)


def test_over_steps_with_two_backward_passes() -> None:
    chain = Chain(3)
    (expected,) = torch.autograd.grad(chain.total(plain), chain.weight)
    value = chain.total(over_steps)
    value.backward(retain_graph=True)
    value.backward()
    assert chain.weight.grad is not None
    close(chain.weight.grad, 2 * expected)
    chain.weight.grad = None
    early, _, late = chain.outputs(over_steps)
    early.sum().backward(retain_graph=True)
    late.sum().backward()
    plain_early, _, plain_late = chain.outputs(plain)
    close(chain.weight.grad, torch.autograd.grad(plain_early.sum() + plain_late.sum(), chain.weight)[0])


def test_over_steps_of_a_fixed_matrix_or_fixed_inputs() -> None:
    weight, x, base = drawn(4, 6), drawn(3, 6), drawn(3, 4)
    fixed = over_steps(weight.detach())(x, base).square().sum()
    (expected,) = torch.autograd.grad(plain(weight)(x, base).square().sum(), x)
    close(torch.autograd.grad(fixed, x)[0], expected)
    alone = over_steps(weight)(x.detach(), base.detach()).square().sum()
    (expected,) = torch.autograd.grad(plain(weight)(x, base).square().sum(), weight)
    close(torch.autograd.grad(alone, weight)[0], expected)


def test_over_steps_without_gradients() -> None:
    chain = Chain(3)
    with torch.no_grad():
        found = chain.outputs(over_steps)
        close(found, chain.outputs(plain))
    assert not any(x.requires_grad for x in found)


def test_over_steps_has_second_derivatives() -> None:
    chain, found = Chain(3), []
    for of in (over_steps, plain):
        value = chain.total(of)
        grads = torch.autograd.grad(value, [chain.weight, chain.first], create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        found.append(torch.autograd.grad(value + penalty, chain.leaves))
    close(*found)


def test_over_steps_after_a_pass_that_was_broken_off() -> None:
    chain, breaks = Chain(3), [True]
    (expected,) = torch.autograd.grad(chain.total(plain), chain.weight)
    outputs = chain.outputs(over_steps)

    def broken(gradient: Tensor) -> None:
        if breaks:
            raise OSError("broken")

    outputs[0].register_hook(broken)
    value = torch.stack([(x.cos() * (place + 1)).sum() for place, x in enumerate(outputs)]).sum()
    with pytest.raises(OSError, match="broken"):
        torch.autograd.grad(value, chain.weight, retain_graph=True)
    breaks.clear()
    close(torch.autograd.grad(value, chain.weight)[0], expected)


def test_over_steps_of_a_pass_within_a_pass() -> None:
    chain, inner = Chain(3), []
    (expected,) = torch.autograd.grad(chain.total(plain), chain.weight)
    outputs = chain.outputs(over_steps)
    value = torch.stack([(x.cos() * (place + 1)).sum() for place, x in enumerate(outputs)]).sum()

    def again(gradient: Tensor) -> None:
        if not inner:
            inner.append(gradient)  # once
            inner[0] = torch.autograd.grad(value, chain.weight, retain_graph=True)[0]

    outputs[0].register_hook(again)
    (outer,) = torch.autograd.grad(value, chain.weight, retain_graph=True)
    close(outer, expected)
    close(inner[0], expected)


def test_over_steps_with_a_batch_of_gradients() -> None:
    chain, many = Chain(3), torch.randn(5, 3, 4, dtype=torch.float64)
    found = [
        torch.autograd.grad(chain.outputs(of)[-1], chain.leaves[:3], many, is_grads_batched=True)
        for of in (over_steps, plain)
    ]
    close(*found)


def test_over_steps_under_autocast() -> None:
    chain = Chain(3)
    expected = torch.autograd.grad(chain.total(plain), chain.weight)[0].float()
    leaves = [x.detach().float().requires_grad_() for x in (chain.weight, chain.first, chain.bias)]
    weight, h, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        product, found = over_steps(weight), []
        for z in chain.others:
            h = product(torch.cat((h, z.float()), -1), bias.expand_as(h)).tanh()
            found.append(h)
    assert {x.dtype for x in found} == {torch.bfloat16}
    value = torch.stack([(x.float().cos() * (place + 1)).sum() for place, x in enumerate(found)]).sum()
    grads = torch.autograd.grad(value, leaves)
    assert {x.dtype for x in grads} == {torch.float32}
    assert F.cosine_similarity(grads[0].flatten(), expected.flatten(), 0) > 0.999  # bfloat16 has 8 bits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert over_steps(weight)(torch.ones(3, 6), bias.expand(3, 4)).dtype == torch.bfloat16
        assert over_steps(chain.weight)(torch.ones(3, 6), bias.expand(3, 4)).dtype == torch.float64


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_cells_are_those_of_torch(kind: str) -> None:
    cell = CELLS[kind]
    size = 5
    recurrent, recurrent_bias = drawn(cell.gates * size, size), drawn(cell.gates * size)
    state, gates = [drawn(3, size) for _ in range(cell.states)], [drawn(3, cell.gates * size) for _ in range(4)]
    leaves = [recurrent, *state, *gates, *([recurrent_bias] if cell.recurrent_bias else [])]

    def ours() -> list[Tensor]:
        product, last = over_steps(recurrent), tuple(state)
        found: list[Tensor] = []
        for one in gates:
            last = cell.step(one, product, recurrent_bias if cell.recurrent_bias else None, *last)
            found += last
        return found

    def torchs() -> list[Tensor]:
        last, found = tuple(state), list[Tensor]()
        identity = torch.eye(cell.gates * size, dtype=torch.float64)
        for one in gates:
            if kind == "gru":
                last = (torch.gru_cell(one, last[0], identity, recurrent, None, recurrent_bias),)
            else:
                last = torch.lstm_cell(one, last, of_torch(identity), of_torch(recurrent), None, None)
            found += last
        return found

    close(ours(), torchs())
    got, expected = (
        torch.autograd.grad(torch.stack([(x.cos() * (i + 1)).sum() for i, x in enumerate(of())]).sum(), leaves)
        for of in (ours, torchs)
    )
    close(got, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_follows_the_formulas(variant: str, cell: str, backend: str) -> None:
    model = tiny(cell, **VARIANTS[variant])
    words = [LETTERS.read(word) for word in ("tomato", "a", "night")]
    previous = [[START, 7, 9, 11], [START, 4, PAD, PAD], [START, UNKNOWN, 20, 8]]
    with torch.no_grad(), attnext.use_backend(backend):
        logits = model(*pad(words), torch.tensor(previous))
        expected = torch.stack([by_the_formulas(model, *pair) for pair in zip(words, previous, strict=True)])
    assert logits.shape == (3, 4, len(PHONEMES))
    close(logits, expected)


def test_tied_embeddings_are_one_matrix() -> None:
    model = tiny(tied_embeddings=True)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    assert "decoder.output.weight" not in tensors_of(model)
    assert "decoder.output.weight" in tensors_of(tiny())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant: str, cell: str) -> None:
    model = tiny(cell, **VARIANTS[variant])
    words = ["attention", "ox", "box"]
    source, lengths = pad([LETTERS.read(word) for word in words])
    previous = torch.tensor([[START, 5, 6, 7]]).expand(3, 4)
    with torch.no_grad():
        together = model(source, lengths, previous)
        noisy = source.masked_fill(source == PAD, 17)
        assert torch.equal(model(noisy, lengths, previous), together)
        for row, word in enumerate(words):
            alone = model(*pad([LETTERS.read(word)]), previous[:1])
            close(together[row], alone[0])


@pytest.mark.parametrize("attention", ["additive", "none"])
def test_padding_gets_no_loss_and_no_gradient(attention: str) -> None:
    model, pairs = tiny(attention=attention), ten()
    batch = pairs.batch(range(len(pairs)))
    assert int(batch.target.eq(PAD).sum()) > 0
    separate = torch.stack([loss(model, pairs.batch([row])) for row in range(len(pairs))]).sum()
    together = loss(model, batch)
    close(together, separate)
    together.backward()
    weight = model.encoder.embedding.weight
    assert weight.grad is not None
    assert weight.grad[LETTERS.read("t")].abs().sum() > 0
    assert weight.grad[PAD].abs().sum() == 0
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    loss(model, Batch(batch.source.masked_fill(batch.source == PAD, 17), *batch[1:])).backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert torch.equal(grad, parameter.grad)
