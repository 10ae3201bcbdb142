"""Measure the simple models of :mod:`koala_lab.claims.references` on the data of runs, and store them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from koala_lab import tasks
from koala_lab.claims import references
from koala_lab.claims.references import Reference
from koala_lab.config import RunConfig
from koala_lab.files import write_json
from koala_lab.runs.provenance import provenance
from koala_lab.runs.store import locked


def key_of(config: RunConfig) -> str:
    """Return the key of the reference that a run has to beat."""
    return references.key(config.task, config.dataset, config.train_size, dict(config.task_args))


def measure(config: RunConfig) -> Reference:
    """Measure the reference for the data of a configuration, through its task, so that both see the same samples."""
    torch.manual_seed(0)
    return _MEASURES[config.task](tasks.create(config, torch.device("cpu")))


def _images(task: Any) -> Reference:
    data = task.data
    arrays = [data.train_images.numpy(), data.train_labels.numpy(), data.test_images.numpy(), data.test_labels.numpy()]
    train, test = (x.astype("float32") / (255 if x.dtype == "uint8" else 1) for x in arrays[::2])
    return Reference("test_error", references.linear_error(train, arrays[1], test, arrays[3]), "logistic regression")


def _text(task: Any) -> Reference:
    data = task.data
    loss = references.unigram_loss(data.train.numpy(), data.test.numpy(), len(data.vocabulary))
    return Reference("test_loss", loss, f"{data.unit} frequencies")


def _pairs(task: Any) -> Reference:
    data = task.data
    sides = ([data.tokenizer.decode(line).strip() for line in _lines(side)] for side in data.train)
    train = list(zip(*sides, strict=True))
    source, target = (lines[: task.test_size] for lines in data.test_lines)
    bleu = references.neighbour_bleu(train, list(zip(source, target, strict=True)))
    return Reference("bleu", bleu, "nearest training sentence", higher=True)


def _lines(sentences: Any) -> list[list[int]]:
    from koala_lab.data.pairs import PAD

    every = sentences.padded(torch.arange(len(sentences)).numpy())
    return [[int(t) for t in line if t != PAD] for line in every]


def _gan(task: Any) -> Reference:
    from koala_lab.tasks.gan import CHUNK, frechet_distance, gaussian

    images = task.data.train_images
    scale = 255 if images.dtype == torch.uint8 else 1
    drawn = references.gaussian_images(images.numpy() / scale, task.samples)
    real = task.reference()
    with torch.no_grad():
        features = torch.cat([real.features(part) for part in torch.split(torch.from_numpy(drawn), CHUNK)])
    return Reference("frechet_distance", frechet_distance(gaussian(features), real.test), "Gaussian pixels")


_MEASURES: dict[str, Callable[[Any], Reference]] = {
    "classification": _images,
    "language_model": _text,
    "translation": _pairs,
    "gan": _gan,
}


def store(configs: Iterable[RunConfig], say: Callable[[str], Any] = print) -> None:
    """Measure what the file of references lacks for some runs, and write it.

    Args:
        configs: The runs.
        say: Called with a line per reference.
    """
    path, entries = references.file(), references.entries()
    for config in configs:
        key = key_of(config)
        if key in entries:
            continue
        found = measure(config)
        value = float(f"{found.value:.6g}")
        entries[key] = found._asdict() | {"value": value, "provenance": provenance("cpu")}
        say(f"{key}: {found.model} has {found.metric} {found.value:.4g}")
        with locked("references"):  # somebody else may have measured others meanwhile
            write_json(path, {"references": dict(sorted((references.entries() | {key: entries[key]}).items()))})
