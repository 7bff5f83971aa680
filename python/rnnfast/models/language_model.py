"""The recurrent language model (Mikolov et al. 2010; with LSTM, Sundermeyer et al. 2012).

It reads a text token by token and gives, after each, a distribution over the next one: embedding,
a stack of RNN or LSTM layers, and a softmax over the vocabulary. Trained by teacher forcing, it
always reads the true text; the loss is the cross-entropy averaged over all steps.

The model takes a state and returns one, so that the caller decides how long it is carried and where
it is detached (truncated backpropagation through time).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import recurrent_class

#: what is carried from chunk to chunk: h, or (h, c) for an LSTM, each (layers, batch, nhid).
State = Tensor | tuple[Tensor, Tensor]

# The decoder starts small, so that the first predictions are close to uniform.
INITIAL_RANGE = 0.1


class LanguageModel(nn.Module):
    """A distribution over the next token for every token of a text.

    Args:
        vocabulary_size: number of tokens V.
        cell: `lstm` or `rnn`.
        nonlinearity: of an `rnn`: `tanh` or `relu`; an LSTM has its own.
        emsize: size of the embedding of a token.
        nhid: hidden units of each layer.
        nlayers: recurrent layers.
        dropout: probability of zeroing an element of the embedding, between layers, and before the
            decoder (Zaremba et al. 2014: never on the way from step to step).
        tied: the decoder uses the embedding's matrix (Press & Wolf 2017).
        backend: `rnnfast`, `torch` or `reference`: who computes the recurrent stack.
        memory: of an `lstm` by `rnnfast`, see there: `normal` or `low`; the others know none.
        bidirectional: must be False, see below.
        device, dtype: of all parameters.

    Raises:
        ValueError: `bidirectional`, since the backward direction would read the very tokens that
            the model is to predict; `tied` with different emsize and nhid; a size below one; an
            unknown cell or backend.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        cell: str = "lstm",
        nonlinearity: str = "tanh",
        emsize: int = 128,
        nhid: int = 256,
        nlayers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
        backend: str = "rnnfast",
        memory: str = "normal",
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if bidirectional:
            raise ValueError(
                "bidirectional makes no sense for a language model: the backward direction would "
                "read the tokens that are to be predicted"
            )
        sizes = {
            "vocabulary_size": vocabulary_size,
            "emsize": emsize,
            "nhid": nhid,
            "nlayers": nlayers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if tied and emsize != nhid:
            raise ValueError(
                f"tied weights need emsize == nhid; emsize is {emsize} and nhid is {nhid}"
            )
        self.vocabulary_size = vocabulary_size
        placement = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary_size, emsize, **placement)
        # torch warns about dropout in a single layer, which has no place for it.
        between_layers = dropout if nlayers > 1 else 0.0
        options = {"num_layers": nlayers, "dropout": between_layers} | placement
        if cell == "rnn":
            options["nonlinearity"] = nonlinearity
        elif backend == "rnnfast":
            options["memory"] = memory
        self.recurrent = recurrent_class(cell, backend)(emsize, nhid, **options)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(nhid, vocabulary_size, **placement)
        if tied:
            self.decoder.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new parameters.

        The recurrent layers keep torch.nn's initialisation, except that an LSTM's forget gate
        starts with a bias of one, so that it remembers from the first step on (Jozefowicz et al.
        2015).
        """
        self.recurrent.reset_parameters()
        self.embedding.reset_parameters()
        # Last, since it may be the embedding's matrix too.
        nn.init.uniform_(self.decoder.weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.decoder.bias)
        if isinstance(self.recurrent, nn.LSTM):
            hidden = self.recurrent.hidden_size
            for layer in range(self.recurrent.num_layers):
                getattr(self.recurrent, f"bias_ih_l{layer}")[hidden : 2 * hidden] = 1.0
                getattr(self.recurrent, f"bias_hh_l{layer}")[hidden : 2 * hidden] = 0.0

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores of every possible next token.

        Args:
            tokens: token numbers, int64, shape (T, B).
            state: where the text before these tokens left the model; None is the state at the
                beginning of a text, all zeros.

        Returns:
            logits (T, B, V), those at step t for the token of step t + 1, and the state after step
            T.
        """
        embedded = self.dropout(self.embedding(tokens))
        hidden, state = self.recurrent(embedded, state)
        return self.decoder(self.dropout(hidden)), state


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over all steps and rows.

    Args:
        logits: (T, B, V).
        targets: the tokens that came next, int64, shape (T, B).
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
