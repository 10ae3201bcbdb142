"""What a training step of a run takes, measured on random data, so that the data set need not be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from koala_lib import cost, data
from koala_lib.bench import epoch
from koala_lib.data.pairs import EOS, SPECIAL
from koala_lib.timing import Row, interleave
from koala_lib.train import RunConfig

VOCABULARY = {"pydoc-topics": 103, "tinyshakespeare": 65, "wikitext-2": 33_278, "wikitext-2-valid": 2_357}
SENTENCE = 30  # tokens of a sentence, about the mean of WMT14 in 32 768 pieces of words
PROBE = 8  # samples of the first, short measurement


def step_times(configs: Iterable[RunConfig], *, device: str = "cpu", seconds: float = 0.5) -> list[Row]:
    """Time a training step of every kind of run, as the run itself does it.

    Args:
        configs: runs, any number of a kind.
        device: torch device.
        seconds: a step that takes longer is measured with fewer samples, at least ``PROBE``, of which the cost is taken
            to be proportional. That counts too much where the optimizer's own share is large.

    Returns:
        One row a kind: ``kind`` (:func:`koala_lib.cost.kind`), ``batch``, the samples of the steps timed, ``of`` those
        of a whole step, and ``seconds`` a sample (image, token, pair of sentences), median of three epochs of one step.
    """
    kinds = {cost.kind(config): config for config in configs}
    return [{"kind": k} | _measured(c, device, seconds) for k, c in tqdm(kinds.items(), disable=None)]


def _measured(config: RunConfig, device: str, limit: float) -> Row:
    options = dict(config.task_args)
    whole = config.batch_size
    if config.task == "translation":
        whole = min(whole, (options["max_tokens"] or SENTENCE * whole) // SENTENCE)
    batch = min(PROBE, whole)
    step = _step_seconds(config, batch, device)
    larger = min(whole, int(batch * limit / step))
    if larger > batch:
        batch, step = larger, _step_seconds(config, larger, device)
    row_length = options.get("sequence_length", 35) if config.task == "language_model" else 1
    return {"batch": batch, "of": whole, "seconds": float(f"{step / (batch * row_length):.4g}")}


def _step_seconds(config: RunConfig, batch: int, device: str) -> float:
    options = dict(config.task_args)
    kept = {k: options[k] for k in ("sequence_length", "clip_norm", "max_tokens", "loss") if k in options}
    size, steps = batch, 1
    if config.task == "language_model":
        size = batch * options.get("sequence_length", 35) + 1
    if config.task == "gan":  # the classifier that judges it, no part of a step, cannot do with less than 64 images
        kept |= {"features": "resnet8", "samples": 2}
        steps = -(-64 // batch)
        size = steps * batch
    changed = config.but(task_args=kept, train_size=size, batch_size=batch, wrapper="", wrapper_args=())
    with random_data(size):
        times = interleave({"step": epoch(changed, device=device)}, 3, device=device)
    return median(times["step"]) / steps


@contextmanager
def random_data(size: int) -> Iterator[None]:
    """Every data set is so many samples of random content in its own shape."""
    known = {"tag": "", "identity": ""}

    def images(name: str, *, device: Any, **_: Any) -> data.ImageData:
        row = data.DATASETS[name]
        pixels = torch.randint(256, (size, *row.shape), dtype=torch.uint8, device=device)
        labels = torch.arange(size, device=device) % row.num_classes
        statistics = (torch.tensor(values, device=device) for values in (row.mean, row.std))
        content = (pixels, labels, pixels, labels, *statistics, row.num_classes, row.augmentation)
        return data.ImageData(*content, name, row.title, **known)

    def text(name: str, *, device: Any, **_: Any) -> data.TextData:
        words = tuple(map(str, range(VOCABULARY[name])))
        tokens = torch.randint(len(words), (size,), device=device)
        return data.TextData(tokens, tokens, tokens, words, data.TEXTS[name].unit, name, "", **known)

    def pairs(name: str, *, device: Any, **_: Any) -> data.PairData:
        vocabulary = data.PAIRS[name].vocabulary
        tokens = torch.randint(len(SPECIAL), vocabulary, (size, SENTENCE), dtype=torch.int32, device=device)
        tokens[:, -1] = EOS
        side = data.Sentences(tokens.flatten(), np.arange(0, tokens.numel() + 1, SENTENCE))
        both, tokenizer = (side, side), SimpleNamespace(get_vocab_size=lambda: vocabulary)
        return data.PairData(both, both, both, ((), ()), tokenizer, name, "", **known)  # type: ignore[arg-type]

    with patch.multiple(data, load=images, load_text=text, load_pairs=pairs):
        yield
