"""The reference encoder-decoder: a recurrent encoder, and a recurrent decoder that attends to its states.

With h_j the encoder states, h'_t the decoder's and y_t the outputs (Bahdanau, Cho and Bengio, 2015):

    e_tj = w(h'_{t-1}, h_j)      a_tj = softmax_j e_tj      C_t = sum_j a_tj h_j
    h'_t = f(h'_{t-1}, y_{t-1}, C_t)                        y_t = g(y_{t-1}, h'_t, C_t)

Without attention, C is the encoder's last state at every step (Cho et al., 2014). With input feeding, g's hidden
vector of the last step is an argument of f too (Luong, Pham and Manning, 2015). Of several layers the topmost asks and
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnext.attention.family import STEPPED
from attnext.seq2seq.cells import CELLS, over_steps
from attnext.seq2seq.config import Config

__all__ = ["Seq2Seq", "State"]


class State(NamedTuple):
    """What a decoder carries from step to step, for one hypothesis a sentence (B, ...) or several (B, beam, ...).

    Attributes:
        layers: of each layer, from the lowest: h' (B, S), and c for an LSTM.
        attention: the attention's own, None where it has none.
        feed: g's hidden vector of the last step, with input feeding.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    attention: Any
    feed: Tensor | None

    def select(self, indices: Tensor) -> State:
        """The state of other rows (N,), or for each sentence of the hypotheses that go on (B, beam)."""

        def take(x: Tensor) -> Tensor:
            if indices.dim() == 1:
                return x.index_select(0, indices)
            return x.gather(1, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))

        return self._map(take, lambda state: state.select(indices))

    def one_hypothesis(self) -> State:
        """The same as (B, 1, ...), before the first step."""
        return self._map(lambda x: x.unsqueeze(1), lambda state: state)

    def _map(self, change: Callable[[Tensor], Tensor], of_attention: Callable[[Any], Any]) -> State:
        layers = tuple(tuple(change(x) for x in layer) for layer in self.layers)
        attention = None if self.attention is None else of_attention(self.attention)
        return State(layers, attention, None if self.feed is None else change(self.feed))


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

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, State]:
        """The memory to attend, and the decoder's first state; source and lengths as in :meth:`forward`."""
        states, last = self.encoder(source, lengths)
        return self.decoder.attention.prepare(states, lengths), self.decoder.first_state(last)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """Logits of every output, given the right outputs before it (teacher forcing)."""
        logits: Tensor = self.decoder(previous, *self.encode(source, lengths))
        return logits


class _Encoder(nn.Module):
    def __init__(self, config: Config, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, config.embedding_size, padding_idx=0)
        self.recurrent = CELLS[config.cell].encoder(
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
        # Autocast gives these layers types that a processor may lack, or float16 without a scaled loss.
        with torch.autocast(source.device.type, enabled=False):
            if bool((lengths == source.shape[1]).all()):  # nothing to leave out: the library's fast path
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

    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional

    def prepare(self, states: Tensor, lengths: Tensor) -> _Summary:
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


class _Layer(nn.Module):
    """f of one layer, its matrix cut into the part of each argument."""

    def __init__(self, config: Config, arguments: Mapping[str, int]) -> None:
        super().__init__()
        self.cell = CELLS[config.cell]
        size = config.decoder_size
        rows, bound = self.cell.gates * size, size**-0.5

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weights = nn.ParameterDict({name: drawn(rows, width) for name, width in arguments.items()})
        self.weights["recurrent"] = drawn(rows, size)
        self.bias = drawn(rows)
        self.recurrent_bias = drawn(rows) if self.cell.recurrent_bias else None


class _Decoder(nn.Module):
    def __init__(self, config: Config, symbols: int) -> None:
        super().__init__()
        memory_size = config.encoder_size * (2 if config.bidirectional else 1)
        size, embedded = config.decoder_size, config.embedding_size
        readout_size = embedded if config.tied_embeddings else size
        self.kind, self.depth, self.feeds = CELLS[config.cell], config.decoder_layers, config.input_feeding
        self.dropout = nn.Dropout(config.dropout)
        self.embedding = nn.Embedding(symbols, embedded, padding_idx=0)
        self.attention: Any = (
            _FixedContext(config.bidirectional)
            if config.attention == "none"
            else STEPPED[config.attention].make(size, memory_size, config.attention_size)
        )
        self.first = nn.Linear(memory_size, self.depth * self.kind.states * size)
        lowest = {"embedded": embedded, "context": memory_size} | ({"feed": readout_size} if self.feeds else {})
        layers = [_Layer(config, lowest if layer == 0 else {"below": size}) for layer in range(self.depth)]
        self.layers = cast(Sequence[_Layer], nn.ModuleList(layers))
        self.readout = nn.Linear(embedded + size + memory_size, readout_size)
        self.output = nn.Linear(readout_size, symbols)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight
            nn.init.normal_(self.embedding.weight, std=embedded**-0.5)

    def first_state(self, last: Tensor) -> State:
        """h'_0 of every layer, from the last encoder states."""
        parts = self.first(last).tanh().to(last.dtype).chunk(self.depth * self.kind.states, -1)
        states = self.kind.states
        layers = tuple(tuple(parts[layer * states : (layer + 1) * states]) for layer in range(self.depth))
        feed = last.new_zeros(len(last), self.readout.out_features) if self.feeds else None
        return State(layers, None, feed)

    def embed(self, previous: Tensor) -> Tensor:
        """The previous outputs, of any shape, as vectors."""
        embedded: Tensor = self.dropout(self.embedding(previous))
        return embedded

    def opened(self) -> Callable[..., tuple[State, Tensor, Tensor | None]]:
        """The step for one sequence: from what the previous outputs add (:meth:`ahead`) for one step, (B, ...) or (B,
        beam, ...), the last state and the memory to the next state, the context and, if asked for, the attention
        weights.
        """
        products = [
            {name: over_steps(weight) for name, weight in layer.weights.items() if name != "embedded"}
            for layer in self.layers
        ]
        readout = over_steps(self.readout.weight[:, self.embedding.embedding_dim :]) if self.feeds else None

        def step(
            ahead: Sequence[Tensor], state: State, memory: Any, *, need_weights: bool = False
        ) -> tuple[State, Tensor, Tensor | None]:
            context, weights, attention = self.attention.step(
                state.layers[-1][0], memory, state.attention, need_weights=need_weights
            )
            gates = products[0]["context"](context, ahead[0])
            if state.feed is not None:
                gates = products[0]["feed"](state.feed, gates)
            layers: list[tuple[Tensor, ...]] = []
            for layer, product, last in zip(self.layers, products, state.layers, strict=True):
                if layers:
                    below = self.dropout(layers[-1][0])
                    gates = product["below"](below, layer.bias.expand(*below.shape[:-1], -1))
                layers.append(layer.cell.step(gates, product["recurrent"], layer.recurrent_bias, *last))
            feed = None
            if readout is not None:
                feed = readout(torch.cat((layers[-1][0], context), -1), ahead[1]).tanh()
            return State(tuple(layers), attention, feed), context, weights

        return step

    def ahead(self, embedded: Tensor) -> list[Tensor]:
        """What embedded previous outputs (..., E) add to the lowest layer's gates and, with input feeding, to the
        hidden vector of g: for all steps it is one product."""
        layer, size = self.layers[0], embedded.shape[-1]
        gates = F.linear(embedded, layer.weights["embedded"], layer.bias)
        return [gates, F.linear(embedded, self.readout.weight[:, :size], self.readout.bias)] if self.feeds else [gates]

    def logits(self, embedded: Tensor, hidden: Tensor, context: Tensor, feed: Tensor | None) -> Tensor:
        """g(y_{t-1}, h'_t, C_t), for one step or many; with input feeding its hidden vector is there."""
        vector = self.readout(torch.cat((embedded, hidden, context), -1)).tanh() if feed is None else feed
        logits: Tensor = self.output(self.dropout(vector))
        return logits

    def forward(self, previous: Tensor, memory: Any, state: State) -> Tensor:
        embedded, step = self.embed(previous), self.opened()
        hidden, contexts, feeds = [], [], []
        for ahead in zip(*(x.unbind(1) for x in self.ahead(embedded)), strict=True):
            state, context, _ = step(ahead, state, memory)
            hidden.append(state.layers[-1][0])
            contexts.append(context)
            if state.feed is not None:
                feeds.append(state.feed)
        feed = torch.stack(feeds, 1) if feeds else None
        return self.logits(embedded, torch.stack(hidden, 1), torch.stack(contexts, 1), feed)
