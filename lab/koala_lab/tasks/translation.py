"""Translation: predict each token of a sentence from those before it and from a sentence of another language."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from koala_lab import data
from koala_lab.checks import check_number, check_whole
from koala_lab.data.formats import Array
from koala_lab.data.pairs import EOS, PAD
from koala_lab.models.beam import beam_search
from koala_lab.models.translation import TRANSLATION_MODELS, EncoderDecoder
from koala_lab.tasks._base import Task, autocast

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

SHOWN = 3  # translations that a result quotes


class Batch(NamedTuple):
    """Sentences and their translations, int64 ``(B, S)`` and ``(B, T)``, and the number of tokens of the latter."""

    source: Tensor
    target: Tensor
    tokens: int


class Translation(Task):
    """Cross-entropy per token of the target, in nats, with smoothed labels in training.

    An epoch reads every training pair once. A batch holds pairs of nearly equal length, as many as ``batch_size`` and
    ``max_tokens`` allow; which of those with equal length, and in which order the batches come, is drawn anew for every
    epoch. The smaller batch that is left at the end is not dropped, since it would always be the longest sentences.

    The loss of a step is the mean over the tokens of its batch, as is usual. A sample, whose loss a filter of the loss
    sees, is a sentence: the sum over its tokens, divided by the mean number of tokens of a sentence of the batch. So
    the mean of the samples' losses is the loss, and as the lengths are nearly equal, each is nearly its mean per token.

    Test metrics are ``test_loss`` and ``validation_loss``, without smoothing; ``perplexity`` = exp(test_loss); and
    ``bleu``, of the test translations as plain text, by sacrebleu, whose signature stands in the provenance of the
    result with a few translations.

    Args:
        config: ``train_size`` counts pairs.
        device: where everything lives.
        max_tokens: a batch has at most so many places for tokens on either side, padding included; longer sentences are
            left out. ``None``: any number.
        label_smoothing: probability that the target gives to all tokens alike (Szegedy et al., CVPR 2016).
        clip_norm: the gradient is shortened to this norm where it is longer, before the optimizer sees it; 0: never.
        beam, length_penalty: of :func:`koala_lab.models.beam.beam_search`; a translation has at most 10 tokens more
            than twice its source.
        test_size: so many test sentences are translated for ``bleu``, from the first on; ``None``: all.

    Raises:
        ValueError: for an option out of range.
    """

    datasets = data.names(data.Pairs)
    networks = TRANSLATION_MODELS

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        max_tokens: int | None = None,
        label_smoothing: float = 0.1,
        clip_norm: float = 0.0,
        beam: int = 1,
        length_penalty: float = 0.6,
        test_size: int | None = None,
    ) -> None:
        check_whole("max_tokens", max_tokens, 1, also=(None,))
        check_whole("beam", beam, 1)
        check_whole("test_size", test_size, 1, also=(None,))
        check_number("label_smoothing", label_smoothing, "in [0, 1)")
        check_number("clip_norm", clip_norm)
        check_number("length_penalty", length_penalty)
        if config.augment:
            raise ValueError("augment=True: there are no crops of a sentence")
        self.config, self.device = config, device
        self.label_smoothing, self.clip_norm, self.test_size = label_smoothing, clip_norm, test_size
        self.beam, self.length_penalty = beam, length_penalty
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.data = data.load(config.dataset, device=device, train_size=config.train_size)
        self._lengths = lengths(self.data.train)
        self._read = np.flatnonzero(self._lengths <= self.max_tokens)
        if len(self._read) == 0:
            raise ValueError(f"max_tokens={max_tokens} is less than the shortest pair of {self.data.title} needs")
        self._slices = self._cut(np.sort(self._lengths[self._read]))
        self.steps_per_epoch = len(self._slices)
        vocabulary = self.data.tokenizer.get_vocab_size()
        network = TRANSLATION_MODELS[config.model](vocabulary, **dict(config.model_args))
        self.network = network.to(device)
        self.parts = {"network": self.network}
        self._measured: dict[str, Any] = {}

    def _cut(self, ascending: Array) -> list[slice]:
        """Return where the batches begin and end in a list of lengths; what is too long stands alone."""
        cuts = [0]
        for i, longest in enumerate(ascending.tolist()):
            rows = i + 1 - cuts[-1]
            if rows > 1 and (rows > self.config.batch_size or rows * longest > self.max_tokens):
                cuts.append(i)
        return [slice(a, b) for a, b in pairwise([*cuts, len(ascending)])]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        generator = data.epoch_generator(self.config.seed, epoch)
        drawn = self._read[torch.randperm(len(self._read), generator=generator).numpy()]
        order = drawn[np.argsort(self._lengths[drawn], kind="stable")]
        for k in torch.randperm(len(self._slices), generator=generator).numpy()[start:]:
            yield _batch(self.data.train, order[self._slices[k]])

    def _logits(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of each token of the target, ``(B * T, vocabulary)``, float32."""
        given = functional.pad(batch.target[:, :-1], (1, 0), value=EOS)
        with autocast(self.config, self.device):
            logits: Tensor = network(batch.source, given)
        return logits.flatten(0, 1).float()

    def sample_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sentence, ``(B,)``; their mean is that of all tokens."""
        nats = functional.cross_entropy(
            self._logits(self.network, batch),
            batch.target.flatten(),
            ignore_index=PAD,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return nats.view_as(batch.target).sum(1) * (len(batch.target) / batch.tokens)

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        validation, test = (self._mean_nats(network, pairs) for pairs in (self.data.validation, self.data.test))
        return {
            "test_loss": test,
            "perplexity": math.exp(test) if test < 700 else math.inf,  # math.exp raises where it overflows
            "validation_loss": validation,
            "bleu": self._bleu(network),
        }

    def _mean_nats(self, network: nn.Module, pairs: tuple[data.Sentences, data.Sentences]) -> float:
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in (_batch(pairs, index) for index in self._by_length(lengths(pairs))):
            logits, target = self._logits(network, batch), batch.target.flatten()
            total += functional.cross_entropy(logits, target, ignore_index=PAD, reduction="sum").double()
            count += batch.tokens
        return total.item() / count

    def _by_length(self, length: Array) -> Iterator[Array]:
        order = np.argsort(length, kind="stable")
        return (order[part] for part in self._cut(length[order]))

    def _bleu(self, network: nn.Module) -> float:
        from sacrebleu import BLEU

        metric = BLEU()
        source, reference = (lines[: self.test_size] for lines in self.data.test_lines)
        translation = self.translate(network, self.data.test[0].first(self.test_size))
        score = float(metric.corpus_score(translation, [reference]).score)
        quoted = [list(triple) for triple in zip(source, reference, translation, strict=True)][:SHOWN]
        self._measured = {"bleu": str(metric.get_signature()), "translations": quoted}
        return score

    @torch.no_grad()
    def translate(self, network: nn.Module, sources: data.Sentences) -> list[str]:
        """Translate sentences, in their order, as text."""
        network = getattr(network, "module", network)  # the averaged one of SWA knows forward alone
        assert isinstance(network, EncoderDecoder)
        translations = [""] * len(sources)
        for index in self._by_length(sources.lengths):
            for i, tokens in zip(index.tolist(), self._search(network, sources.padded(index)), strict=True):
                translations[i] = self.data.tokenizer.decode(tokens).strip()
        return translations

    def _search(self, network: EncoderDecoder, source: Tensor) -> list[list[int]]:
        padding = source == PAD

        def log_probs(tokens: Tensor, of: Tensor) -> Tensor:
            with autocast(self.config, self.device):
                hidden = network.decode(tokens, memory[of], padding[of])[:, -1]
                return network.logits(hidden).float().log_softmax(1)

        with autocast(self.config, self.device):
            memory = network.encode(source)
        limits = (2 * (~padding).sum(1) + 10).tolist()
        options: Any = {"beam": self.beam, "length_penalty": self.length_penalty, "device": self.device}
        return beam_search(log_probs, limits, **options)

    def provenance(self) -> dict[str, Any]:
        """Return how BLEU was counted, and ``[source, reference, translation]`` of the first test sentences."""
        return self._measured


def lengths(pairs: tuple[data.Sentences, data.Sentences]) -> Array:
    """Return the number of tokens of the longer side of each pair."""
    return np.maximum(pairs[0].lengths, pairs[1].lengths)


def _batch(pairs: tuple[data.Sentences, data.Sentences], index: Array) -> Batch:
    return Batch(pairs[0].padded(index), pairs[1].padded(index), int(pairs[1].lengths[index].sum()))
