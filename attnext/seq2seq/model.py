"""The reference encoder-decoder: a bidirectional recurrent encoder, and a decoder that attends to it.

With h_j the encoder states, h'_t the decoder's and y_t the outputs (Bahdanau, Cho and Bengio, 2015):

    e_tj = w(h'_{t-1}, h_j)      a_tj = softmax_j e_tj      C_t = sum_j a_tj h_j
    h'_t = f(h'_{t-1}, y_{t-1}, C_t)                        y_t = g(y_{t-1}, h'_t, C_t)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnext import BahdanauAttention, Memory

__all__ = ["CELLS", "ModelConfig", "Seq2Seq", "State"]

State = tuple[Tensor, ...]
"""What a cell carries from step to step: h' (B, S), which is also its output, and c for an LSTM."""


def _gru(inputs: Tensor, recurrent: Tensor, hidden: Tensor) -> State:
    """Gated recurrent unit; as in :class:`torch.nn.GRU`, the reset gate multiplies the projected state."""
    size = hidden.shape[-1]
    reset, update = torch.sigmoid(inputs[:, : 2 * size] + recurrent[:, : 2 * size]).chunk(2, -1)
    candidate = torch.tanh(torch.addcmul(inputs[:, 2 * size :], reset, recurrent[:, 2 * size :]))
    return (torch.lerp(candidate, hidden, update),)


def _lstm(inputs: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> State:
    """Long short-term memory, with the gates in the order of :class:`torch.nn.LSTM`."""
    gates = inputs + recurrent
    keep_new, keep_old, candidate, show = gates.chunk(4, -1)
    cell = keep_old.sigmoid() * cell + keep_new.sigmoid() * candidate.tanh()
    return show.sigmoid() * cell.tanh(), cell


class _Kind(NamedTuple):
    encoder: type[nn.GRU] | type[nn.LSTM]
    step: Callable[..., State]
    gates: int
    states: int


CELLS = {"gru": _Kind(nn.GRU, _gru, gates=3, states=1), "lstm": _Kind(nn.LSTM, _lstm, gates=4, states=2)}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model.

    Attributes:
        source_symbols: how many symbols the input vocabulary has, marks included.
        target_symbols: likewise of the output vocabulary.
        cell: "gru" or "lstm", in the encoder and the decoder.
        embedding_size: of a symbol, on both sides.
        encoder_size: states of the encoder, in each of its two directions.
        decoder_size: states of the decoder.
        attention_size: size of the space in which states are compared.
        dropout: on embeddings, encoder states and the output layer, in training.

    Raises:
        ValueError: a size is below 1, the cell is unknown, or dropout is not in [0, 1).
    """

    source_symbols: int
    target_symbols: int
    cell: str = "gru"
    embedding_size: int = 64
    encoder_size: int = 128
    decoder_size: int = 192
    attention_size: int = 96
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        for name, value in vars(self).items():
            if name not in ("cell", "dropout") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {self.dropout!r}")


class Seq2Seq(nn.Module):
    """An attentive encoder-decoder model over symbols.

    Shapes: source (B, Tx) and previous outputs (B, Ty) int64; logits (B, Ty, target_symbols). A source has a
    length of at least 1. Number 0 is padding on both sides.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        """The memory to attend, and the decoder's first state."""
        states, last = self.encoder(source, lengths)
        memory: Memory = self.decoder.attention.prepare(states, lengths)
        return memory, self.decoder.first_state(last)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """Logits of every output, given the right outputs before it (teacher forcing)."""
        logits: Tensor = self.decoder(previous, *self.encode(source, lengths))
        return logits


class _Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.source_symbols, config.embedding_size, padding_idx=0)
        self.recurrent = CELLS[config.cell].encoder(
            config.embedding_size, config.encoder_size, batch_first=True, bidirectional=True
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The states h_j (B, Tx, H), and the last state of either direction side by side (B, H)."""
        embedded = self.dropout(self.embedding(source))
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed_states, last = self.recurrent(packed)
        states, _ = pad_packed_sequence(packed_states, batch_first=True, total_length=source.shape[1])
        hidden = last[0] if isinstance(last, tuple) else last
        return self.dropout(states), hidden.transpose(0, 1).flatten(1)


class _Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory_size, size = 2 * config.encoder_size, config.decoder_size
        self.kind = CELLS[config.cell]
        self.dropout = nn.Dropout(config.dropout)
        self.embedding = nn.Embedding(config.target_symbols, config.embedding_size, padding_idx=0)
        self.attention = BahdanauAttention(size, memory_size, config.attention_size, bias=True)
        self.first = nn.Linear(memory_size, self.kind.states * size)
        # f's and g's matrices, cut into the part of each argument: y's is applied to all steps at once.
        self.input_gates = nn.Linear(config.embedding_size, self.kind.gates * size)
        self.context_gates = nn.Linear(memory_size, self.kind.gates * size, bias=False)
        self.state_gates = nn.Linear(size, self.kind.gates * size)
        self.readout = nn.Linear(config.embedding_size + size + memory_size, size)
        self.output = nn.Linear(size, config.target_symbols)

    def first_state(self, last: Tensor) -> State:
        """h'_0, from the last encoder states."""
        return self.first(last).tanh().chunk(self.kind.states, -1)  # type: ignore[no-any-return]

    def embed(self, previous: Tensor) -> Tensor:
        """The previous outputs, (B, Ty) or (B,), as vectors."""
        embedded: Tensor = self.dropout(self.embedding(previous))
        return embedded

    def step(
        self, inputs: Tensor, state: State, memory: Memory, *, need_weights: bool = False
    ) -> tuple[State, Tensor, Tensor | None]:
        """One step: the next state, the context and the attention weights.

        Args:
            inputs: (B, gates * S), the previous output's part of the gates.
            state: the previous state.
            memory: the encoder states.
            need_weights: also return the weights (B, Tx).
        """
        context, weights = self.attention(state[0], memory, need_weights=need_weights)
        state = self.kind.step(inputs + self.context_gates(context), self.state_gates(state[0]), *state)
        return state, context, weights

    def logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """g(y_{t-1}, h'_t, C_t), for one step or many."""
        readout = self.readout(torch.cat((embedded, hidden, context), -1)).tanh()
        logits: Tensor = self.output(self.dropout(readout))
        return logits

    def forward(self, previous: Tensor, memory: Memory, state: State) -> Tensor:
        embedded = self.embed(previous)
        hidden, contexts = [], []
        for inputs in self.input_gates(embedded).unbind(1):
            state, context, _ = self.step(inputs, state, memory)
            hidden.append(state[0])
            contexts.append(context)
        return self.logits(embedded, torch.stack(hidden, 1), torch.stack(contexts, 1))
