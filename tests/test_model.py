"""The reference model: its logits against the formulas."""

from __future__ import annotations

import pytest
import torch
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    VARIANTS,
    by_the_formulas,
    close,
    ten,
    tiny,
)

import attnext
from attnext.backends import cpu
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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "has_products"), [(torch.float16, True), (torch.bfloat16, False)])
def test_the_encoder_stays_in_float32_where_autocast_has_no_products_for_it(
    dtype: torch.dtype, has_products: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, whose gradients need a scaled loss, and in bfloat16 on a processor without instructions for it."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: has_products)
    encoder = tiny(dtype=torch.float32).encoder
    source = pad([LETTERS.read(word) for word in ("attention", "ox")])
    with torch.no_grad(), attnext.use_backend(backend), torch.autocast("cpu", dtype):
        found = encoder(*source)
    with torch.no_grad(), attnext.use_backend(backend):
        expected = encoder(*source)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
