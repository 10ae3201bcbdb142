"""Encoder-decoder Transformers for translation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from koala_lab.data.pairs import PAD

__all__ = ["TRANSLATION_MODELS", "EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """The Transformer of Vaswani et al. (NeurIPS 2017), in torch's layers.

    Normalisation comes after each residual sum, as there, or before each part with a last one at the end of both stacks
    (``norm_first``). One embedding serves the source, the target and the output; it is multiplied by √width at the
    inputs. Positions are sines and cosines, so that sentences of any length are read. Matrices have Glorot's uniform
    initial weights, biases are zero, and embeddings are normal with variance 1/width.

    Args:
        vocabulary: Number of tokens, the same for both languages.
        width, heads, layers: Sizes; ``layers`` for each of the two stacks, and the layers between attention are four
            times as wide.
        dropout: Probability; on embeddings, attention, and within and after each part of a layer.
        norm_first: See above.

    Raises:
        ValueError: If ``width`` is odd or no multiple of ``heads``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width must be even and a multiple of heads, got {width} and {heads}")
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        sizes = (width, heads, 4 * width)
        options: dict[str, Any] = {"dropout": dropout, "batch_first": True, "norm_first": norm_first}
        # Lists, because nn.TransformerEncoder starts all its layers from the same weights.
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, **options) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(width) if norm_first else nn.Identity() for _ in range(2))
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score what comes after each token of the target.

        Args:
            source: int64, ``(B, S)``, filled up with ``PAD`` on the right.
            target: int64, ``(B, T)``, filled up likewise; ``target[:, t]`` sees the whole source, and the target up to
                itself.

        Returns:
            Logits, ``(B, T, vocabulary)``.
        """
        return self.logits(self.decode(target, self.encode(source), source == PAD))

    def encode(self, source: Tensor) -> Tensor:
        """Return what the decoder sees of a source, ``(B, S, width)``."""
        hidden, padding = self._embed(source), source == PAD
        for layer in self.encoder:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return cast(Tensor, self.encoder_norm(hidden))

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Return the last hidden state per token of the target, ``(B, T, width)``, from what :meth:`encode` gave."""
        hidden, length = self._embed(target), target.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        for layer in self.decoder:
            hidden = layer(hidden, memory, tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=padding)
        return cast(Tensor, self.decoder_norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Score all tokens, ``(…, vocabulary)``, from hidden states ``(…, width)``."""
        return functional.linear(hidden, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        positions = sinusoids(tokens.shape[1], width, tokens.device)
        embedded: Tensor = self.dropout(self.embedding(tokens) * math.sqrt(width) + positions)
        return embedded


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Return positions 0, 1, … as sines and cosines, float32 ``(length, width)`` (Vaswani et al., section 3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


# Called with the number of tokens and the options of the class.
TRANSLATION_MODELS: Final[dict[str, Callable[..., EncoderDecoder]]] = {
    "transformer": EncoderDecoder,
    "transformer_base": partial(EncoderDecoder, width=512, heads=8, layers=6),
}
