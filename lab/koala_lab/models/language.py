"""Language models: an LSTM and a causal Transformer, both over tokens of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LANGUAGE_MODELS", "LSTM", "State", "Transformer", "has_lstm"]

State = tuple[Tensor, ...]  # what a network remembers from one window of text to the next; empty at the beginning


class LSTM(nn.Module):
    """Embedding, LSTM, output layer, with dropout between them (Zaremba et al., arXiv 1409.2329).

    Weights of embedding and output are uniform in ±0.1 and the biases of the output are zero, as in torch's example
    ``word_language_model``; the LSTM has torch's initial weights.

    Args:
        vocabulary: Number of tokens.
        embedding, hidden, layers: Sizes.
        dropout: Probability; on embeddings, between the layers, and before the output.
        tied: Whether the output uses the embedding's weights (Press & Wolf, EACL 2017); both sizes must be equal then.
        cutoffs: Where given, the output is an adaptive softmax (Grave et al., ICML 2017), torch's with its initial
            weights: the first ``cutoffs[0]`` tokens have the full width, those up to the next cut-off a quarter of it,
            and so on. It is made for tokens numbered from the most frequent on, and is then faster, not better.

    Raises:
        ValueError: If ``tied`` is asked for with different sizes or with an adaptive softmax, or for cut-offs that do
            not increase or do not end below ``vocabulary``.
    """

    output: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss

    def __init__(
        self,
        vocabulary: int,
        *,
        embedding: int = 32,
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
        cutoffs: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if tied and cutoffs:
            raise ValueError(f"an adaptive softmax has no weights to tie: tied=True with cutoffs={list(cutoffs)}")
        if tied and embedding != hidden:
            raise ValueError(f"tied weights need embedding = hidden, got {embedding} and {hidden}")
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0  # torch warns where there is no between
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=between)
        if cutoffs:
            self.output = nn.AdaptiveLogSoftmaxWithLoss(hidden, vocabulary, [*cutoffs], div_value=4.0)
        else:
            self.output = nn.Linear(hidden, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if isinstance(self.output, nn.Linear):
            nn.init.uniform_(self.output.weight, -0.1, 0.1)
            nn.init.zeros_(self.output.bias)
            if tied:
                self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Return the negative log-likelihood of the next tokens.

        Args:
            tokens: int64, ``(B, T)``.
            targets: int64, ``(B, T)``; ``targets[:, t]`` is what comes after ``tokens[:, t]``. Where it is negative,
                the likelihood is 0.
            state: What the same rows of the window before left behind.

        Returns:
            Nats per token, ``(B, T)``, float32; and the state after the last token, ``(layers, B, hidden)`` twice.
        """
        embedded = self.dropout(self.embedding(tokens))
        hidden, (h, c) = self._recur(embedded, state)
        hidden = self.dropout(hidden)
        if isinstance(self.output, nn.Linear):
            return _nats(self.output(hidden), targets), (h, c)
        flat = targets.flatten()
        with torch.autocast(hidden.device.type, enabled=False):  # in half precision torch's layer mixes dtypes
            wide = hidden.flatten(0, 1).to(self.output.head.weight.dtype)
            likelihood = self.output(wide, flat.clamp(min=0)).output
        return -likelihood.masked_fill(flat < 0, 0.0).view_as(targets), (h, c)

    def _recur(self, embedded: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the LSTM; in the weights' own precision where autocast asks for one that this processor lacks."""
        device = embedded.device.type
        autocast = torch.is_autocast_enabled(device)
        if not autocast or has_lstm(device, torch.get_autocast_dtype(device)):
            return self.lstm(embedded, (state[0], state[1]) if state else None)  # type: ignore[no-any-return]
        state = tuple(s.to(embedded.dtype) for s in state)  # in half precision, if another processor left it behind
        with torch.autocast(device, enabled=False):
            return self.lstm(embedded, state or None)  # type: ignore[no-any-return]


@cache
def has_lstm(device: str, dtype: torch.dtype) -> bool:
    """Ask a device, by trying once, whether it trains an LSTM in a precision.

    On CPUs oneDNN has a bfloat16 LSTM only with AVX-512, and none in float16 (torch 2.11 to 2.13).

    Args:
        device: its type, such as ``"cpu"``.
        dtype: the precision of autocast.
    """
    with torch.random.fork_rng(devices=[]):  # the weights' random numbers would be missing in the run that asks
        lstm = nn.LSTM(1, 1).to(device)
    try:
        with torch.enable_grad(), torch.autocast(device, dtype=dtype):
            lstm(torch.zeros(1, 1, 1, device=device))[0].sum().backward()
    except RuntimeError:
        return False
    return True


class Transformer(nn.Module):
    """A causal pre-LayerNorm Transformer with learned positions, GPT-2's layout (Radford et al., 2019).

    Embeddings are normal with standard deviation 0.02; the layers have torch's initial weights, each its own.

    Args:
        vocabulary: Number of tokens.
        context: The longest window that it can read.
        width, heads, layers: Sizes; the layers between attention are four times as wide.
        dropout: Probability; on embeddings and in the layers.
        tied: Whether the output uses the embedding's weights.

    Raises:
        ValueError: If ``width`` is no multiple of ``heads``.
    """

    mask: Tensor

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int,
        width: int = 32,
        heads: int = 2,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        # A list, because nn.TransformerEncoder starts all its layers from the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        if tied:
            self.output.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Do as :meth:`LSTM.forward`, without a state: nothing is remembered between windows.

        Raises:
            ValueError: If the window is longer than ``context``.
        """
        length, context = tokens.shape[1], self.positions.num_embeddings
        if length > context:
            raise ValueError(f"a window of {length} tokens is longer than the context, {context}")
        hidden = self.dropout(self.embedding(tokens) + self.positions.weight[:length])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask[:length, :length], is_causal=True)
        return _nats(self.output(self.norm(hidden)), targets), ()


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    logits, flat = logits.flatten(0, 1).float(), targets.flatten()
    return functional.cross_entropy(logits, flat, ignore_index=-1, reduction="none").view_as(targets)


def _lstm(vocabulary: int, *, context: int, **options: Any) -> LSTM:
    return LSTM(vocabulary, **options)  # reads windows of any length


# Called with the number of tokens, ``context``, and the options of the class.
LANGUAGE_MODELS: Final[dict[str, Callable[..., nn.Module]]] = {"lstm": _lstm, "transformer": Transformer}
