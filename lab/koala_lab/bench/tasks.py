"""What a training step of a run takes, measured on random data, so that the data set need not be there."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from koala_lab import data
from koala_lab.bench import cost
from koala_lab.bench.steps import epoch
from koala_lab.bench.timing import Row, interleave
from koala_lab.config import RunConfig
from koala_lab.data.pairs import EOS, SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = {
    "pydoc-topics": 103,
    "tinyshakespeare": 65,
    "wikitext-2": 33_278,
    "wikitext-2-valid": 2_357,
    "one-billion-words": 793_471,  # as published
}
SENTENCE = 30  # tokens of a sentence, about the mean of WMT14 in 32 768 pieces of words
FLIP = data.Augmentation(pad=0, flip=True)  # photographs are decoded and cropped beside the training step
PROBE = 4  # samples of the first, short measurement


def step_times(configs: Iterable[RunConfig], *, device: str = "cpu", seconds: float = 0.25) -> list[Row]:
    """Time a training step of every kind of run, as the run itself does it.

    Args:
        configs: runs, any number of a kind.
        device: torch device.
        seconds: a step that takes longer is not measured whole. Two smaller batches then give the time by a straight
            line: the optimizer's own part does not grow with the samples.

    Returns:
        One row a kind: ``kind`` (:func:`koala_lab.bench.cost.kind`), ``batch``, the samples of the largest step that
        was timed, ``of`` those of a whole one, and ``seconds`` of a whole one by sample (image,
        token, pair of sentences).
        Each step is the median of three.
    """
    kinds = {cost.kind(config): config for config in configs}
    return [{"kind": k} | _measured(c, device, seconds) for k, c in tqdm(kinds.items(), disable=None)]


def _measured(config: RunConfig, device: str, limit: float) -> Row:
    options = dict(config.task_args)
    whole = config.batch_size
    if config.task == "translation":
        whole = min(whole, (options["max_tokens"] or SENTENCE * whole) // SENTENCE)
    small = min(PROBE, whole)
    first = _step_seconds(config, small, device)
    batch = min(whole, max(2 * small, int(small * limit / first)))
    step = last = _step_seconds(config, batch, device)
    if batch < whole:
        step = first + max(last - first, 0.0) / (batch - small) * (whole - small)
    row_length = options.get("sequence_length", 35) if config.task == "language_model" else 1
    return {"batch": batch, "of": whole, "seconds": float(f"{step / (whole * row_length):.4g}")}


def _step_seconds(config: RunConfig, batch: int, device: str) -> float:
    options = dict(config.task_args)
    matter = ("sequence_length", "clip_norm", "max_tokens", "loss")
    kept: dict[str, Any] = {k: options[k] for k in matter if k in options}
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
    gc.collect()  # optimizer and scheduler hold each other, and so the weights
    return median(times["step"]) / steps


@contextmanager
def random_data(size: int) -> Iterator[None]:
    """Every data set is so many samples of random content in its own shape."""

    def images(name: str, *, device: Any, **_: Any) -> data.ImageData:
        row = data.DATASETS.get(name) or data.FOLDERS[name]
        pixels = torch.randint(256, (size, *row.shape), dtype=torch.uint8, device=device)
        labels = torch.arange(size, device=device) % row.num_classes
        return data.ImageData(
            train_images=pixels,
            train_labels=labels,
            test_images=pixels,
            test_labels=labels,
            mean=torch.tensor(row.mean, device=device),
            std=torch.tensor(row.std, device=device),
            num_classes=row.num_classes,
            augmentation=row.augmentation if isinstance(row.augmentation, data.Augmentation) else FLIP,
            name=name,
            title=row.title,
            tag="",
            identity="",
        )

    def text(name: str, *, device: Any, **_: Any) -> data.TextData:
        words, unit = tuple(map(str, range(VOCABULARY[name]))), data.TEXTS[name].unit
        tokens = torch.randint(len(words), (size,), device=device)
        return data.TextData(tokens, tokens, tokens, words, unit, name, title="", tag="", identity="")

    def pairs(name: str, *, device: Any, **_: Any) -> data.PairData:
        vocabulary = data.PAIRS[name].vocabulary
        tokens = torch.randint(len(SPECIAL), vocabulary, (size, SENTENCE), dtype=torch.int32, device=device)
        tokens[:, -1] = EOS
        side = data.Sentences(tokens.flatten(), np.arange(0, tokens.numel() + 1, SENTENCE))
        both, tokenizer = (side, side), cast("Tokenizer", SimpleNamespace(get_vocab_size=lambda: vocabulary))
        return data.PairData(both, both, both, ((), ()), tokenizer, name, title="", tag="", identity="")

    with patch.multiple(data, load=images, load_text=text, load_pairs=pairs):
        yield
