"""A few generated words on the small random Whisper encoder, and models of it."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
from prepared_models import complete
from transformers import set_seed

from mmtransfer import AdaptedModel
from mmtransfer.compare import step
from mmtransfer.compare.experiment import Experiment
from mmtransfer.data import Recordings, synthetic
from mmtransfer.data.features import Collator
from mmtransfer.demo import experiments
from mmtransfer.encoders import TappedEncoder
from mmtransfer.tasks import Task, find_task
from mmtransfer.training.caching import CachedInputs, EncoderCollator, cache_inputs
from mmtransfer.training.settings import Training

# Four, so that HFF-b has a level of projections.
TAPS = ("embeddings", 0, 1, 3)
QUICK = Training(epochs=2, batch_size=8, learning_rate=3e-3, cpu=True)


def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at no time and at no memory: each is measured once or twice."""
    monkeypatch.setattr(step, "ROUNDS", (1, 2))
    monkeypatch.setattr(step, "_MEMORY_STEPS", 1)


def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and shorter words for `mmtransfer compare --synthetic`; as many classes."""
    few = functools.partial(synthetic, train_clips=5, test_clips=3, seconds=0.5)
    monkeypatch.setattr(experiments, "synthetic", few)


@functools.cache
def _base() -> Experiment:
    return replace(
        experiments.synthetic_experiment(),
        recordings=synthetic(classes=4, train_clips=6, test_clips=3, seconds=0.4),
    )


def words_of_two_lengths(classes: int = 4) -> Recordings:
    short, long = (synthetic(classes=classes, train_clips=3, test_clips=2, seconds=s) for s in (0.25, 0.5))
    return replace(short, train=short.train + long.train, test=short.test + long.test)


def small_experiment(recordings: Recordings | None = None) -> Experiment:
    """The model and the lists of clips are the caller's own; each call gives the same."""
    base = _base()
    given = base.recordings if recordings is None else recordings
    own = replace(given, train=[*given.train], test=[*given.test])
    return replace(base, model=copy.deepcopy(base.model), recordings=own)


def task_of(experiment: Experiment, name: str = "classification") -> Task:
    return find_task(name).of(experiment.recordings)


def collator(experiment: Experiment, encoder: TappedEncoder, task: str = "classification") -> EncoderCollator:
    return EncoderCollator(
        Collator(experiment.recordings, experiment.extractor), encoder, task_of(experiment, task)
    )


def build(
    experiment: Experiment, method: str, seed: int = 0, task: str = "classification", **options: Any
) -> AdaptedModel:
    """An untrained model on a copy of the experiment's encoder."""
    model = copy.deepcopy(experiment.model)
    set_seed(seed)
    return AdaptedModel(model, complete(method, **options), task_of(experiment, task))


def inputs_of(
    experiment: Experiment, model: AdaptedModel, task: str = "classification"
) -> dict[str, CachedInputs]:
    collate = collator(experiment, model.encoder, task)
    return {
        "train": cache_inputs(experiment.recordings.train, collate),
        "test": cache_inputs(experiment.recordings.test, collate),
    }
