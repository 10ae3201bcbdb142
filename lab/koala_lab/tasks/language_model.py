"""Language models: predict each token of a text from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from koala_lab import data
from koala_lab.checks import check_number, check_whole
from koala_lab.models.language import LANGUAGE_MODELS, State
from koala_lab.tasks._base import Task, autocast

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

COLUMNS = 16  # of validation and test text, read side by side


class Window(NamedTuple):
    """A piece of text: tokens and what comes after each, int64 ``(B, T)``; ``number`` counts from the text's start."""

    tokens: Tensor
    targets: Tensor
    number: int


class LanguageModel(Task):
    """Cross-entropy per token, in nats.

    The training text is cut into ``batch_size`` columns of equal length, which are read side by side, from top to
    bottom, in windows of ``sequence_length`` tokens. An LSTM goes into a window with the state that it left the last
    one in, without a gradient into the past (truncated backpropagation); an epoch starts anew. The order is the same in
    every epoch and for every seed, and fewer than ``batch_size * (sequence_length + 1)`` tokens at the ends are left
    out. A sample, whose loss a filter of the loss sees, is a row of a window: the mean over its tokens.

    Test metrics are ``test_loss``, ``perplexity`` = exp(test_loss), for characters also ``bits_per_character`` =
    test_loss / log 2, and ``validation_loss``. Every token of those texts is predicted once, but the first. Beside
    them stands ``unigram_loss``, the test loss of a model that knows how often each token stands in the training text
    (plus one), and no context.

    Args:
        config: ``train_size`` counts tokens from the beginning of the text.
        device: where everything lives.
        sequence_length: tokens in a row of a window.
        clip_norm: the gradient is shortened to this norm where it is longer, before the optimizer sees it; 0: never.
        pieces: an epoch's windows are also counted in so many pieces, one after the other, whose mean training losses
            are ``train_loss_1``, ``train_loss_2`` and so on: a run in more detail than by epochs; 0: they are not.
        evaluation_size: the metrics are those of so many tokens from the beginning of validation and test text, less
            if a text is shorter; 0: all.

    Raises:
        ValueError: for an option out of range, or a text shorter than one window.
    """

    datasets = data.names(data.Text)
    networks = LANGUAGE_MODELS

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        sequence_length: int = 35,
        clip_norm: float = 0.0,
        pieces: int = 0,
        evaluation_size: int = 0,
    ) -> None:
        check_whole("sequence_length", sequence_length, 1)
        check_number("clip_norm", clip_norm)
        check_whole("pieces", pieces, 2, also=(0,))
        check_whole("evaluation_size", evaluation_size, 2, also=(0,))
        if config.augment:
            raise ValueError("augment=True: there are no crops of a text")
        self.config, self.device = config, device
        self.sequence_length, self.clip_norm = sequence_length, clip_norm
        self.data = data.load(config.dataset, device=device, train_size=config.train_size)
        if evaluation_size:
            parts = {name: getattr(self.data, name)[:evaluation_size] for name in ("validation", "test")}
            self.data = replace(self.data, **parts)
        self._height = (len(self.data.train) - 1) // config.batch_size
        self.steps_per_epoch = self._height // sequence_length
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={config.batch_size} rows of sequence_length={sequence_length} need more than the "
                f"{len(self.data.train)} training tokens"
            )
        if pieces > self.steps_per_epoch:
            raise ValueError(f"pieces={pieces} exceeds the {self.steps_per_epoch} windows of an epoch")
        self.losses = ("train_loss", *(f"train_loss_{i}" for i in range(1, pieces + 1)))
        self._shares = _shares(self.steps_per_epoch, pieces).to(device)
        create = LANGUAGE_MODELS[config.model]
        network = create(len(self.data.vocabulary), context=sequence_length, **dict(config.model_args))
        self.network = network.to(device)
        self.parts = {"network": self.network}
        self.state: State = ()
        self._unigram_loss = _unigram_loss(self.data)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Window]:
        size = self._height * self.config.batch_size
        return windows(self.data.train[: size + 1], self.config.batch_size, self.sequence_length, start, whole=True)

    def _nats(self, network: nn.Module, window: Window, state: State) -> tuple[Tensor, State]:
        with autocast(self.config, self.device):
            nats, state = network(window.tokens, window.targets, state if window.number else ())
        return nats, tuple(s.detach() for s in state)

    def sample_losses(self, batch: Window) -> Tensor:
        """Return the mean loss of each row of a window, ``(B,)``; reading it moves the state on to the next window."""
        nats, self.state = self._nats(self.network, batch, self.state)
        return nats.mean(1)

    def step(self, batch: Window, optimizers: Mapping[str, Optimizer]) -> Tensor:
        return super().step(batch, optimizers) * self._shares[batch.number]

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        validation, test = (self._mean_nats(network, text) for text in (self.data.validation, self.data.test))
        bits = {"bits_per_character": test / math.log(2)} if self.data.unit == "character" else {}
        perplexity = math.exp(test) if test < 700 else math.inf  # math.exp raises where it overflows
        return {
            "test_loss": test,
            "perplexity": perplexity,
            **bits,
            "validation_loss": validation,
            "unigram_loss": self._unigram_loss,
        }

    def _mean_nats(self, network: nn.Module, text: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        state: State = ()
        for window in windows(text, COLUMNS, self.sequence_length):
            nats, state = self._nats(network, window, state)
            total += nats.sum(dtype=torch.float64)
        return total.item() / (len(text) - 1)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip("hc", self.state, strict=False))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = tuple(state.values())


def _shares(steps: int, pieces: int) -> Tensor:
    """Return the weight of each step's loss in the epoch's mean and in those of its pieces, ``(steps, 1 + pieces)``.

    Each column has the mean 1.
    """
    mine = torch.arange(steps)[:, None] * pieces // steps == torch.arange(pieces)
    return torch.cat([torch.ones(steps, 1), mine * steps / mine.sum(0)], dim=1)


def _unigram_loss(text: data.TextData) -> float:
    counts = text.train.bincount(minlength=len(text.vocabulary)).double() + 1
    return -(counts / counts.sum()).log()[text.test[1:]].mean().item()


def windows(text: Tensor, columns: int, length: int, start: int = 0, *, whole: bool = False) -> Iterator[Window]:
    """Cut a text into columns and these into windows, from window ``start`` on.

    Args:
        text: tokens, ``(N,)``, of any integer type.
        columns: rows of a window; each column of the text goes on in the same row of the next window.
        length: tokens in a row; the last window may be shorter.
        start: windows to leave out.
        whole: leave out a shorter last window.

    Yields:
        Windows that predict each token but the first once. Where the last column is shorter than the others, its
        targets are filled up with -1, which costs nothing.

    >>> first, last = windows(torch.arange(8), columns=2, length=3)
    >>> first.tokens.tolist(), first.targets.tolist()
    ([[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]])
    >>> last.targets.tolist()
    [[4], [-1]]
    """
    height = -(-(len(text) - 1) // columns)
    missing = height * columns - (len(text) - 1)
    tokens, targets = text[:-1], text[1:]
    if missing:  # never in training, where a copy of a large text would cost memory
        tokens = nn.functional.pad(tokens, (0, missing))
        targets = nn.functional.pad(targets, (0, missing), value=-1)
    tokens, targets = tokens.view(columns, height), targets.view(columns, height)
    count = height // length if whole else -(-height // length)
    for k in range(start, count):
        part = slice(k * length, (k + 1) * length)
        yield Window(tokens[:, part].long(), targets[:, part].long(), number=k)
