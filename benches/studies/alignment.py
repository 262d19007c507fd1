"""How exactly a CTC model finds when words are spoken, on speech whose times are known.

``python -m benches.studies.alignment`` trains CTC models on the encoder of Whisper tiny.en and the Czech
recordings of `make demo`, and aligns two materials from rooms that training has not seen: the recordings,
whose beginning is known, and their sentences synthesised by espeak-ng, which reports every word.
Each utterance is aligned by itself, and all of them joined, in one pass. Training takes minutes for each
model, the rest two; writes ``docs/alignment.json``, ``docs/alignment.svg`` and ``docs/align.png``, and prints
the tables of ``docs/alignment.md``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from rich.progress import Progress

import mmtransfer
from benches.measure.record import rounded
from benches.studies.alignment_report import draw, table
from benches.studies.boundaries import signed_errors, spread_evenly, summaries
from benches.studies.known_times import Utterance, joined, recorded, speech_of, synthesised
from mmkernels import ctc_align
from mmtransfer.align import AlignedText, Aligner, Posteriors
from mmtransfer.align.figure import draw as draw_alignment
from mmtransfer.data.recordings import Clip, Recordings
from mmtransfer.demo.czech import czech_dialogues
from mmtransfer.demo.espeak import Espeak
from mmtransfer.demo.whisper import whisper_tiny_en
from mmtransfer.model import AdaptedModel
from mmtransfer.training.finetune import finetune
from mmtransfer.training.finetune_settings import FinetuneSettings
from mmtransfer.training.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
RATE = 16_000
#: Of the test clips, which are from all rooms: 10 minutes of recordings.
EVERY = 2
#: The model of the picture of one sentence.
EXAMPLE = "head-synthesised"
#: dB above the background at which speech begins; the second shows how much the reference depends on it.
MARGINS = (6.0, 12.0)
#: As the recipes of the demo: epochs of methods whose features are stored, steps of the others.
SETTINGS = FinetuneSettings(task="ctc", epochs=6, batch_size=16, validation_fraction=0.0, cpu=True, workers=1)
TUNED = FinetuneSettings(
    task="ctc", max_steps=200, epochs=3, batch_size=16, learning_rate=3e-4, validation_fraction=0.0, cpu=True
)


@dataclass(frozen=True)
class Trained:
    """A model that is judged: its method, and the speech it is trained on."""

    method: str
    speech: str
    settings: FinetuneSettings

    @property
    def folder(self) -> str:
        return f"{self.method}-{self.speech}"


MODELS = (
    Trained("head", "recorded", SETTINGS),
    Trained("hff-b", "recorded", SETTINGS),
    Trained("full", "recorded", TUNED),
    Trained("head", "synthesised", SETTINGS),
)


def train(each: Trained, models: Path, data: Recordings, progress: Progress) -> tuple[AdaptedModel, float]:
    """The model and its character error on test clips; one that is in `models` is taken from there."""
    output = models / each.folder
    result = finetune(
        whisper_tiny_en(), each.method, data, output, each.settings, resume=True, progress=progress
    )
    return mmtransfer.load(output), result.test["cer"]


class Judge:
    """Aligns a material by a model, and measures.

    Args:
        aligner: of the model.
        advance: called after each recording with its seconds.
    """

    def __init__(self, aligner: Aligner, advance: Callable[[float], None]) -> None:
        self.aligner, self.advance = aligner, advance
        self.compared = self.identical = 0

    def alone(self, utterances: list[Utterance]) -> dict[str, Any]:
        """Errors where each utterance is aligned by itself; the paths are compared with the peer's."""
        errors: dict[str, list[float]] = {"start": [], "end": []}
        for utterance in utterances:
            found = self.aligner.align(utterance.samples, utterance.text)
            for edge, values in signed_errors(found.words, utterance.spans).items():
                errors[edge] += values
            if (aligned := peer()) is not None:
                self.compared += 1
                self.identical += same_path(found, aligned)
            self.advance(len(utterance.samples) / RATE)
        return summaries(errors)

    def in_one_pass(self, whole: Utterance) -> dict[str, Any]:
        """Errors in a long recording, how its frames are spent, and the time it took."""
        began = time.perf_counter()
        found = self.aligner.align(whole.samples, whole.text)
        seconds = time.perf_counter() - began
        self.advance(len(whole.samples) / RATE)
        op = time_op(found)
        frames = found.posteriors
        return {
            **summaries(signed_errors(found.words, whole.spans)),
            "character_error": jiwer.cer(whole.text, greedy_text(frames)),
            "seconds": len(whole.samples) / RATE,
            "blank": float((frames.path == 0).double().mean()),
            "frames_per_token": float((frames.path != 0).sum()) / len(frames.target),
            "emission_seconds": seconds - op,
            "op_seconds": op,
        }


def greedy_text(frames: Posteriors) -> str:
    """The best character of each frame, of those that occur in the text, repetitions and blanks dropped."""
    best = frames.log_probs[:, :-1].argmax(dim=1).tolist()
    return "".join(frames.classes[each] for each, _ in itertools.groupby(best))


def same_path(found: AlignedText, forced_align: Callable[..., Any]) -> bool:
    """Whether the peer finds the same path in the same frames."""
    frames = found.posteriors
    path, _ = forced_align(frames.log_probs[None], torch.tensor([frames.target]), blank=0)
    return bool((path[0] == frames.path).all())


def peer() -> Callable[..., Any] | None:
    """torchaudio's `forced_align`, where it is installed: ours would be compared with itself."""
    if importlib.util.find_spec("torchaudio") is None:
        return None
    import torchaudio

    return torchaudio.functional.forced_align


def peer_name() -> str | None:
    return None if peer() is None else f"torchaudio {importlib.metadata.version('torchaudio')}"


def time_op(found: AlignedText) -> float:
    """Median seconds of the alignment alone."""
    arguments = found.posteriors.log_probs[None], torch.tensor([found.posteriors.target])
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ctc_align(*arguments)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def evenly(utterances: list[Utterance]) -> dict[str, Any]:
    """Errors of words that are spread evenly between the ends of their utterance, where both are known."""
    errors: dict[str, list[float]] = {"start": [], "end": []}
    for utterance in utterances:
        start, end = utterance.spans[0].start, utterance.spans[-1].end
        if start is None or end is None:
            continue
        inner = list(utterance.spans)
        inner[0] = replace(inner[0], start=None)
        inner[-1] = replace(inner[-1], end=None)
        for edge, values in signed_errors(spread_evenly(utterance.text, start, end), inner).items():
            errors[edge] += values
    return summaries(errors)


@dataclass(frozen=True, eq=False)
class Material:
    """Utterances of one kind with their pauses, each alone, and all joined."""

    name: str
    alone: list[Utterance]
    whole: Utterance

    @classmethod
    def of(cls, name: str, utterances: list[Utterance]) -> Material:
        alone = [joined([each], RATE, seed) for seed, each in enumerate(utterances)]
        return cls(name, alone, joined(utterances, RATE))

    @property
    def seconds(self) -> float:
        return sum(len(each.samples) for each in (*self.alone, self.whole)) / RATE


def rows_of(
    trained: Trained, models: Path, data: Recordings, materials: list[Material], progress: Progress
) -> dict[str, Any]:
    """The rows of a model, and how many paths were the peer's."""
    model, error = train(trained, models, data, progress)
    bar = progress.add_task(
        f"Aligning by {trained.folder}", total=sum(material.seconds for material in materials)
    )
    judge = Judge(Aligner(model), partial(progress.advance, bar))
    about = {"model": trained.method, "trained_on": trained.speech, "test_character_error": error}
    rows = [
        {
            "material": material.name,
            **about,
            "alone": judge.alone(material.alone),
            "joined": judge.in_one_pass(material.whole),
        }
        for material in materials
    ]
    progress.remove_task(bar)
    return {"rows": rows, "compared": judge.compared, "identical": judge.identical}


def study(chosen: Sequence[Trained], models: Path, voice: Espeak, progress: Progress) -> dict[str, Any]:
    """The record but for date and machine."""
    recordings = czech_dialogues()
    data = {"recorded": recordings, "synthesised": speech_of(recordings, voice, RATE)}
    judged = recordings.test[::EVERY]
    texts = [clip.text or "" for clip in judged]
    materials = [
        Material.of("recorded", recorded(judged, RATE, MARGINS[0])),
        Material.of("synthesised", synthesised(texts, voice, RATE)),
    ]
    found = [rows_of(each, models, data[each.speech], materials, progress) for each in chosen]
    paths = {count: sum(each[count] for each in found) for count in ("compared", "identical")}
    spread = [{"material": each.name, "model": None, "joined": evenly(each.alone)} for each in materials]
    return {
        "utterances": len(judged),
        "reference": reference(judged),
        "paths": {"peer": peer_name(), **paths},
        "rows": [*spread, *(row for each in found for row in each["rows"])],
    }


def reference(clips: list[Clip]) -> dict[str, float]:
    """How far the known starts of recordings move, in milliseconds, with a higher threshold of sound."""
    low, high = ([each.spans[0].start or 0.0 for each in recorded(clips, RATE, margin)] for margin in MARGINS)
    moved = [1e3 * (b - a) for a, b in zip(low, high, strict=True)]
    return {"median": statistics.median(moved), "p95": float(np.percentile(moved, 95))}


def draw_example(models: Path, voice: Espeak, path: Path) -> None:
    """A sentence as `mmtransfer align --figures` draws it; synthesised, so that it is nobody's recording."""
    clip = next(clip for clip in czech_dialogues().test if 25 < len(clip.text or "") < 35)
    (sentence,) = synthesised([clip.text or ""], voice, RATE)
    aligner = Aligner(mmtransfer.load(models / EXAMPLE))
    found = aligner.align(sentence.samples, f"{sentence.text.capitalize()}.")
    draw_alignment(found, sentence.samples, RATE, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=ROOT / "build/alignment",
        help="trained models, kept between runs",
    )
    parser.add_argument("--record", type=Path, default=ROOT / "docs/alignment.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/alignment.svg")
    parser.add_argument("--example", type=Path, default=ROOT / "docs/align.png")
    names = [each.folder for each in MODELS]
    parser.add_argument("--skip", nargs="+", default=[], choices=names, help="models to leave out")
    parser.add_argument("--redraw", action="store_true", help="draw the record that is there")
    given = parser.parse_args()
    if not given.redraw:
        with Progress() as progress:
            chosen = [each for each in MODELS if each.folder not in given.skip]
            found = study(chosen, given.models, Espeak("cs"), progress)
        draw_example(given.models, Espeak("cs"), given.example)
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device("cpu")),
            "skipped": given.skip,
            **found,
        }
        given.record.write_text(json.dumps(rounded(record), indent=1) + "\n")
    record = json.loads(given.record.read_text())
    draw(record, given.figure)
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
