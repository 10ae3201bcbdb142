"""Models that anything trained must beat before it counts: one simple model per kind of data.

A comparison of optimizers says something once the task is learned. The bar is a model that needs no deep learning,
fitted to the same training samples and measured on the same test samples as the runs: logistic regression on the pixels
of images, word or character frequencies of a text, the translation of the nearest training sentence, and for GANs
images drawn from a Gaussian. `koala references` computes them once and stores them in
``data/results/references.json`` with their provenance; :mod:`koala_lab.runs.references` brings in the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from koala_lab import paths
from koala_lab.files import read_json

Array = np.ndarray[Any, Any]

# Options of a task that change the samples that a run is trained or tested on, or how distances are measured.
OF_DATA = ("validation_size", "evaluation_size", "max_tokens", "test_size", "features", "samples")


class Reference(NamedTuple):
    """What one simple model reaches.

    Attributes:
        metric: A test metric of the task.
        value: What the model has.
        model: Its name, for people.
        higher: Whether larger values are better.
    """

    metric: str
    value: float
    model: str
    higher: bool = False


def file() -> Path:
    """Return where the references are committed."""
    return paths.results_dir() / "references.json"


def key(task: str, dataset: str, train_size: int | None, task_args: Mapping[str, Any]) -> str:
    """Return what a reference is kept under: the data that a run is trained and measured on.

    >>> key("classification", "digits", 600, {"validation_size": 100, "landscape_size": 5})
    'classification digits 600 validation_size=100'
    """
    options = [f"{name}={task_args[name]}" for name in OF_DATA if task_args.get(name)]
    return " ".join([task, dataset, str(train_size or "all"), *options])


def load() -> dict[str, Reference]:
    """Return all stored references by key; none if there is no file."""
    return {k: Reference(e["metric"], float(e["value"]), e["model"], e["higher"]) for k, e in entries().items()}


def entries() -> dict[str, dict[str, Any]]:
    """Return what the file holds by key, with provenance; nothing if there is no file.

    Raises:
        ValueError: If it is damaged.
    """
    if not file().exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = read_json(file())["references"]
        for entry in found.values():
            Reference(entry["metric"], float(entry["value"]), entry["model"], entry["higher"])
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file()} is no file of references ({error!r}): restore it from git") from error


def linear_error(images: Array, labels: Array, test_images: Array, test_labels: Array) -> float:
    """Return the test error in % of logistic regression on pixels.

    Args:
        images: ``(N, ...)`` from 0 to 1.
        labels: ``(N,)``.
        test_images: ``(M, ...)``.
        test_labels: ``(M,)``.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    model = LogisticRegression(max_iter=300, tol=1e-3).fit(images.reshape(len(images), -1), labels)
    return 100 * float((model.predict(test_images.reshape(len(test_images), -1)) != test_labels).mean())


def unigram_loss(train: Array, test: Array, vocabulary: int) -> float:
    """Return the mean -log p in nats of the test tokens but the first, p from training frequencies plus one."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[test[1:]].mean())


def neighbour_bleu(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> float:
    """Return the BLEU of answering every test sentence with the translation of the most similar training sentence.

    Similar by the cosine of TF-IDF vectors of words.

    Args:
        train: Pairs of source and target.
        test: The same.
    """
    from sacrebleu import BLEU
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    words = TfidfVectorizer(token_pattern=r"\S+")
    known = words.fit_transform([source for source, _ in train])
    search = NearestNeighbors(n_neighbors=1, metric="cosine").fit(known)
    nearest = search.kneighbors(words.transform([source for source, _ in test]), return_distance=False)[:, 0]
    return float(BLEU().corpus_score([train[i][1] for i in nearest], [[target for _, target in test]]).score)


def gaussian_images(images: Array, count: int) -> Array:
    """Draw images from the Gaussian that has mean and covariance of the pixels of some images.

    Args:
        images: ``(N, ...)`` from 0 to 1.
        count: How many to draw.

    Returns:
        ``(count, ...)`` from 0 to 1.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    noise = np.random.default_rng(0).standard_normal((count, flat.shape[1]))
    drawn = flat.mean(0) + (noise * np.sqrt(values.clip(0))) @ vectors.T
    pictures: Array = drawn.clip(0, 1).reshape(count, *images.shape[1:]).astype(np.float32)
    return pictures
