"""What can be trained: each task owns its data and networks, :mod:`koala_lab.runs.training` owns the loop around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from koala_lab.tasks._base import PRECISIONS, Task, options
from koala_lab.tasks.classification import Classification
from koala_lab.tasks.gan import Gan
from koala_lab.tasks.language_model import LanguageModel
from koala_lab.tasks.translation import Translation

if TYPE_CHECKING:
    from koala_lab.config import RunConfig

__all__ = ["PRECISIONS", "TASKS", "Task", "create"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "gan": Gan,
    "language_model": LanguageModel,
    "translation": Translation,
}


def create(config: RunConfig, device: torch.device) -> Task:
    """Return the task of a configuration, its networks drawn from torch's generator as it stands."""
    cls = TASKS[config.task]
    return cls(config, device, **options(cls, config))
