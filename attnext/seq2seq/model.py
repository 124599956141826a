"""The reference encoder-decoder: a recurrent encoder, and a decoder that attends to its states at every step.

With h_j the encoder states, h'_t the decoder's and y_t the outputs (Bahdanau, Cho and Bengio, 2015):

    e_tj = w(h'_{t-1}, h_j)      a_tj = softmax_j e_tj      C_t = sum_j a_tj h_j
    h'_t = f(h'_{t-1}, y_{t-1}, C_t)                        y_t = g(y_{t-1}, h'_t, C_t)

Without attention, C is the encoder's last state at every step (Cho et al., 2014). With input feeding, g's hidden
vector of the last step is an argument of f too (Luong, Pham and Manning, 2015). Of several layers the topmost asks and
answers.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnext.attention.base import has_own_hooks, plain_layer
from attnext.attention.family import STEPPED
from attnext.backends.cpu import rounds_products
from attnext.recurrent import GRU, LSTM, AttentiveGRU, AttentiveLSTM, DecoderState
from attnext.recurrent.opened import likeliest
from attnext.seq2seq.config import Config

__all__ = ["Opened", "Seq2Seq"]


class Seq2Seq(nn.Module):
    """An attentive encoder-decoder model over symbols.

    Shapes: source (B, Tx) and previous outputs (B, Ty) int64; logits (B, Ty, target_symbols). A source has a
    length of at least 1. Number 0 is padding on both sides.

    Args:
        config: its sizes and kinds.
        source_symbols: how many symbols the input vocabulary has, marks included.
        target_symbols: likewise of the output vocabulary.

    Raises:
        ValueError: the attention can't be of these sizes.
    """

    def __init__(self, config: Config, source_symbols: int, target_symbols: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config, source_symbols)
        self.decoder = _Decoder(config, target_symbols)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, DecoderState]:
        """The memory to attend, and the decoder's first state; source and lengths as in :meth:`forward`."""
        states, last = self.encoder(source, lengths)
        return self.decoder.recurrent.prepare(states, lengths), self.decoder.first_state(last)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """Logits of every output, given the right outputs before it (teacher forcing)."""
        logits: Tensor = self.decoder(previous, *self.encode(source, lengths))
        return logits


class _Encoder(nn.Module):
    def __init__(self, config: Config, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, config.embedding_size, padding_idx=0)
        self.recurrent = (GRU if config.cell == "gru" else LSTM)(
            config.embedding_size,
            config.encoder_size,
            config.encoder_layers,
            batch_first=True,
            bidirectional=config.bidirectional,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The top layer's states h_j (B, Tx, H), and its last state of either direction side by side (B, H)."""
        embedded = self.dropout(self.embedding(source))
        # Elsewhere autocast gives these layers types that a processor may lack, or float16 without a scaled loss.
        kind = source.device.type
        casts = torch.is_autocast_enabled(kind)
        keeps = not casts or (kind == "cpu" and rounds_products(embedded.dtype))
        with nullcontext() if keeps else torch.autocast(kind, enabled=False):
            if int(lengths.min()) == source.shape[1]:  # nothing to leave out: the library's fast path
                states, last = self.recurrent(embedded)
            else:
                packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
                packed_states, last = self.recurrent(packed)
                states, _ = pad_packed_sequence(packed_states, batch_first=True, total_length=source.shape[1])
        hidden = last[0] if isinstance(last, tuple) else last
        directions = 2 if self.recurrent.bidirectional else 1
        return self.dropout(states), hidden[-directions:].transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class _Summary:
    """The memory of a decoder without attention."""

    context: Tensor

    def select(self, indices: Tensor) -> _Summary:
        return _Summary(self.context.index_select(0, indices))


class _FixedContext(nn.Module):
    """No attention, with the interface of one: the context of every step is the encoder's last state."""

    def __init__(self, query_size: int, memory_size: int, bidirectional: bool) -> None:
        super().__init__()
        self.query_size, self.memory_size, self.bidirectional = query_size, memory_size, bidirectional

    def reset_parameters(self) -> None:
        """There are none."""

    def prepare(self, states: Tensor, lengths: Tensor, mask: None = None) -> _Summary:
        last = states[torch.arange(len(states), device=states.device), lengths.to(states.device) - 1]
        if not self.bidirectional:
            return _Summary(last)
        half = states.shape[2] // 2
        return _Summary(torch.cat((last[:, :half], states[:, 0, half:]), -1))

    def step(
        self, query: Tensor, memory: _Summary, state: None, *, need_weights: bool = False
    ) -> tuple[Tensor, None, None]:
        """The context of each query (B, Q) or (B, beam, Q)."""
        context = memory.context if query.dim() == 2 else memory.context.unsqueeze(1).expand(-1, query.shape[1], -1)
        return context, None, None


class _Decoder(nn.Module):
    def __init__(self, config: Config, symbols: int) -> None:
        super().__init__()
        memory_size = config.encoder_size * (2 if config.bidirectional else 1)
        size, embedded = config.decoder_size, config.embedding_size
        vector_size = embedded if config.tied_embeddings else size
        self.dropout = nn.Dropout(config.dropout)
        self.embedding = nn.Embedding(symbols, embedded, padding_idx=0)
        attention = (
            _FixedContext(size, memory_size, config.bidirectional)
            if config.attention == "none"
            else STEPPED[config.attention].make(size, memory_size, config.attention_size)
        )
        layers = AttentiveGRU if config.cell == "gru" else AttentiveLSTM
        self.recurrent = layers(
            embedded,
            size,
            attention,
            config.decoder_layers,
            dropout=config.dropout if config.decoder_layers > 1 else 0.0,
            vector_size=vector_size,
            input_feeding=config.input_feeding,
        )
        self.tensors = 2 if config.cell == "lstm" else 1
        self.first = nn.Linear(memory_size, config.decoder_layers * self.tensors * size)
        self.output = nn.Linear(vector_size, symbols)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight
            nn.init.normal_(self.embedding.weight, std=embedded**-0.5)

    def first_state(self, last: Tensor) -> DecoderState:
        """h'_0 of every layer, from the last encoder states."""
        drawn = self.first(last).tanh().to(last.dtype)
        states = drawn.view(len(last), -1, self.tensors, self.recurrent.hidden_size).permute(2, 1, 0, 3)
        zeros = self.recurrent.first_state(len(last))
        return zeros._replace(hidden=states[0], cell=states[1] if self.tensors == 2 else None)

    def embed(self, previous: Tensor) -> Tensor:
        """The previous outputs, of any shape, as vectors."""
        embedded: Tensor = self.dropout(self.embedding(previous))
        return embedded

    def opened(self) -> Opened:
        """The steps of searches, in evaluation mode, as long as the parameters stay as they are."""
        return Opened(self)

    def logits(self, vector: Tensor) -> Tensor:
        """Of output vectors, of one step or many."""
        logits: Tensor = self.output(self.dropout(vector))
        return logits

    def forward(self, previous: Tensor, memory: Any, state: DecoderState) -> Tensor:
        vectors, _, _ = self.recurrent(self.embed(previous), memory, state)
        return self.logits(vectors)


class Opened:
    """A decoder for the steps of searches."""

    def __init__(self, decoder: _Decoder) -> None:
        self._decoder, output = decoder, plain_layer(decoder, "output")
        table = decoder.embedding.weight if not has_own_hooks(decoder.embedding) else None
        self._has_table, self._chooses = table is not None, table is not None and output is not None
        layer = (output.weight, output.bias) if output is not None and self._chooses else ()
        self._steps = decoder.recurrent.opened(table, *layer)

    def __call__(
        self, previous: Tensor, state: DecoderState, memory: Any, *, need_weights: bool = False
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """From previous outputs (B,) or (B, beam), the last state and the memory to the logits, the next state and, if
        asked for, the attention weights."""
        inputs = previous if self._has_table else self._decoder.embed(previous)
        vector, _, state, *weights = self._steps(inputs, memory, state, need_weights=need_weights)
        return self._decoder.logits(vector), state, weights[0] if weights else None

    def greedy(
        self, previous: Tensor, state: DecoderState, memory: Any, steps: int, end: int, need_weights: bool
    ) -> tuple[Tensor, Tensor, DecoderState | None, Tensor | None]:
        """So many steps (B, steps), each taking the most likely output from number ``end`` on: numbers, their
        log-probabilities, the next state and weights; see :meth:`OpenedDecoder.greedy`."""
        if self._chooses:
            return self._steps.greedy(previous, memory, state, steps, first=end, end=end, need_weights=need_weights)
        return likeliest(partial(self, memory=memory, need_weights=need_weights), previous, state, steps, end, end)
