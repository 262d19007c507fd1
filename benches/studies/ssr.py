"""SSR-Connector on real speech: aligners and baselines, both stages, forgetting of text, and cost.

``python -m benches.studies.ssr`` trains a small language model on the transcripts of the Czech recordings of
`make demo`, CTC models as aligners, and for each connector and seed the two stages on the encoder of Whisper
tiny.en. Rooms that no training has seen judge. Writes ``docs/ssr.json``, ``docs/ssr.svg`` and
``docs/ssr.png``, and prints the tables of ``docs/ssr.md``. It takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from transformers import AutoFeatureExtractor, set_seed

from benches.measure.record import rounded
from benches.studies.small_language_model import REPEAT, frequency, small_language_model
from benches.studies.ssr_report import Row, Step, Tuning, draw, draw_segments, table
from mmtransfer import AdaptedModel
from mmtransfer.compare.step import Step as TrainingStep
from mmtransfer.compare.step import compare_steps
from mmtransfer.data.features import Collator
from mmtransfer.data.inputs import AudioInput
from mmtransfer.data.recordings import Clip
from mmtransfer.demo.czech import LETTERS, czech_dialogues
from mmtransfer.demo.whisper import whisper_tiny_en
from mmtransfer.encoders.loading import load_model
from mmtransfer.encoders.tapped import TappedEncoder
from mmtransfer.encoders.taps import Taps
from mmtransfer.ssr.aligners import UnitY2Aligner
from mmtransfer.ssr.connector import Connector
from mmtransfer.ssr.eager import EagerConnector
from mmtransfer.tasks import Text
from mmtransfer.tokens import TokenLabels
from mmtransfer.training.batches import drop_infeasible
from mmtransfer.training.caching import CachedFeatures, EncoderCollator, cache_features
from mmtransfer.training.finetune import finetune
from mmtransfer.training.finetune_settings import FinetuneSettings
from mmtransfer.training.loop import predict, train
from mmtransfer.training.machine import describe_machine
from mmtransfer.training.settings import Training

ROOT = Path(__file__).resolve().parents[2]
CTC = FinetuneSettings(task="ctc", epochs=6, batch_size=16, validation_fraction=0.0, cpu=True, workers=1)
FIRST = Training(epochs=3, batch_size=16, learning_rate=2e-3, weight_decay=0.1, beta2=0.95, cpu=True)
SECOND = Training(epochs=1, batch_size=16, learning_rate=3e-4, weight_decay=0.1, beta2=0.95, cpu=True)
#: Many symbols are learnt more slowly than few.
SUB_WORDS_EPOCHS = 12
#: Low-rank updates start at zero and are few.
LORA = Training(epochs=1, batch_size=16, learning_rate=2e-3, weight_decay=0.0, beta2=0.95, cpu=True)
TUNINGS = {"vanilla": SECOND, "lora": LORA, "multitask": SECOND}
TEMPLATE = f"<speech>{REPEAT}"


@dataclass(frozen=True)
class Variant:
    """A connector that is judged: options of the method `ssr`, `aligner_model` the name of a CTC model."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


BASE = {"depth": 2, "aligner_model": "characters"}
MAIN = Variant("CTC, characters", BASE)
VARIANTS = (
    MAIN,
    Variant("CTC, sub-words", {**BASE, "aligner_model": "sub-words"}),
    Variant("UnitY2-style, learnt", {"depth": 2, "aligner": "unity2", "aligner_width": 128}),
    Variant("CIF", {"depth": 2, "aligner": "cif"}),
    Variant("fixed rate", {"depth": 2, "aligner": "fixed", "frames_per_token": 12}),
    Variant("mean of the segment", {**BASE, "pooling": "mean"}),
    Variant("no look-back", {**BASE, "lookback": 0}),
    Variant("no block mask", {**BASE, "attention": "causal"}),
)


class Material:
    """Recordings, models and stored features that all trainings share.

    Args:
        folder: for models, kept between runs.
        every: of the clips: all take twice as long as every second.
    """

    def __init__(self, folder: Path, progress: Progress, every: int) -> None:
        self.folder, self.progress = folder, progress
        self.whisper = whisper_tiny_en()
        recordings = czech_dialogues()
        self.recordings = recordings
        self.train, self.test = recordings.train[::every], recordings.test[::every]
        folder.mkdir(parents=True, exist_ok=True)
        texts = [clip.text or "" for clip in recordings.train]
        self.test_texts = [clip.text or "" for clip in recordings.test]
        self.language_model = folder / "language-model"
        self.facts = small_language_model(texts, self.language_model, test=self.test_texts)
        self.passages = folder / "passages.txt"
        self.passages.write_text("\n".join(texts) + "\n", encoding="utf-8")
        self.errors = {"characters": self._ctc("characters", CTC), "sub-words": self._sub_words()}
        task = self.task(1)
        self.counts = Counter(
            index for text in texts for index in TokenLabels.unpack(task.collate([text])).ids[0].tolist()
        )

    def _sub_words(self) -> float:
        settings = dataclasses.replace(CTC, tokenizer=self.language_model, epochs=SUB_WORDS_EPOCHS)
        return self._ctc("sub-words", settings)

    def _ctc(self, name: str, settings: FinetuneSettings) -> float:
        """The character error of a CTC model on test clips."""
        result = finetune(
            self.whisper,
            "hff-b",
            self.recordings,
            self.folder / name,
            settings,
            resume=True,
            progress=self.progress,
        )
        return result.test["cer"]

    def task(self, stage: int, tuning: str = "vanilla") -> Text:
        text = str(self.passages) if tuning == "multitask" else None
        return Text(
            language_model=str(self.language_model),
            stage=stage,
            tuning=tuning,
            text=text,
            template=TEMPLATE,
            alphabet="".join(sorted({" ", *LETTERS})),
        )

    def build(self, variant: Variant, task: Text, seed: int) -> AdaptedModel:
        """A model with random weights from a seed."""
        set_seed(seed)
        options = dict(variant.options)
        if "aligner_model" in options:
            options["aligner_model"] = str(self.folder / options["aligner_model"])
        return AdaptedModel(load_model(self.whisper), "ssr", task, **options)

    @functools.cached_property
    def features(self) -> tuple[CachedFeatures, CachedFeatures]:
        """Of training and test clips, at all layers."""
        encoder = TappedEncoder(load_model(self.whisper), self.taps)
        extractor = AutoFeatureExtractor.from_pretrained(self.whisper)
        collate = EncoderCollator(
            Collator(self.recordings, extractor, max_seconds=None), encoder, self.task(1)
        )
        found = []
        for name, clips in (("training", self.train), ("test", self.test)):
            bar = self.progress.add_task(f"Features of {name} clips", total=len(clips))
            found.append(
                cache_features(
                    encoder, clips, collate, on_clips=functools.partial(self.progress.advance, bar)
                )
            )
        return found[0], found[1]

    @property
    def taps(self) -> tuple[Any, ...]:
        return ("embeddings", 0, 1, 2, 3)

    def examples(self, model: AdaptedModel) -> tuple[CachedFeatures, CachedFeatures]:
        """Stored features at the taps of a model; training clips that it cannot use are left out."""
        assert model.task is not None
        slots = [self.taps.index(tap) for tap in model.encoder.taps]
        found = []
        for stored in self.features:
            chosen = stored.select(slots)
            chosen.task = model.task
            found.append(chosen)
        return self.usable(model, found[0]), found[1]

    def usable(self, model: AdaptedModel, examples: CachedFeatures) -> CachedFeatures:
        """Without clips that are too short for an alignment with their text."""
        assert model.task is not None
        return drop_infeasible(examples, examples.collate, model.encoder, model.task, model.readout)[0]


@torch.no_grad()
def judge_vectors(model: AdaptedModel, test: CachedFeatures, counts: Counter[int]) -> dict[str, Any]:
    """Cosine and squared error of each vector of the first stage, with segments by the transcript."""
    model.eval()
    cosines, errors, ids = [], [], []
    frames = vectors = 0
    for index in range(len(test)):
        batch = test.collate([test[index]])
        taps = model_taps(batch)
        found = model.compress(taps, batch["labels"])
        cosine, error = model.head.quality(found.frames, found.taps, found.labels)
        cosines.append(cosine)
        errors.append(error)
        ids += TokenLabels.unpack(found.labels).ids[0].tolist()
        frames += int(taps.lengths.sum())
        vectors += len(found.frames)
    cosine, error = torch.cat(cosines), torch.cat(errors)
    classes: dict[str, list[float]] = {}
    for value, token in zip(cosine.tolist(), ids, strict=True):
        classes.setdefault(frequency(counts[token]), []).append(value)
    return {
        "cosine": float(cosine.mean()),
        "squared_error": float(error.mean()),
        "cosine_by_frequency": {
            name: sum(classes[name]) / len(classes[name]) for name in sorted(classes, key=_order)
        },
        "frames_per_token": frames / vectors,
    }


def _order(name: str) -> int:
    return ("<", "3", ">").index(name[0])


def model_taps(batch: dict[str, torch.Tensor]) -> Taps:
    return Taps.pack(batch["features"], batch["lengths"])


def textless(model: AdaptedModel) -> bool:
    """Whether a connector finds segments without the text."""
    return not isinstance(model.readout.aligner, UnitY2Aligner)


def second_stage(
    material: Material, first: AdaptedModel, variant: Variant, seed: int, tuning: str
) -> tuple[AdaptedModel, dict[str, float]]:
    """The language model on the frozen connector of the first stage, and its figures."""
    model = material.build(
        Variant(variant.name, {**variant.options, "frozen": True}), material.task(2, tuning), seed
    )
    model.readout.load_state_dict(first.readout.state_dict())
    examples, test = material.examples(model)
    before = model.head.perplexity(material.test_texts)
    began = time.perf_counter()
    train(model, examples, examples.collate, _seeded(TUNINGS[tuning], seed))
    seconds = time.perf_counter() - began
    figures = {"seconds": seconds, "perplexity_before": before}
    figures["perplexity_after"] = model.head.perplexity(material.test_texts)
    if textless(model):
        predictions = predict(model, test, test.collate, SECOND)
        scores = model.task.score(predictions, test.targets)
        figures |= {"word_error": scores["wer"], "token_error": scores["ter"]}
    return model, figures


def _seeded(training: Training, seed: int) -> Training:
    return dataclasses.replace(training, seed=seed)


def judge(
    material: Material, variant: Variant, seed: int, on_first: Callable[[AdaptedModel], None]
) -> tuple[Row, list[Tuning]]:
    """Both stages of a connector; for the main one, the second by each tuning."""
    model = material.build(variant, material.task(1), seed)
    examples, test = material.examples(model)
    began = time.perf_counter()
    train(model, examples, examples.collate, _seeded(FIRST, seed))
    seconds = time.perf_counter() - began
    figures = judge_vectors(model, material.usable(model, test), material.counts)
    # Equal segments belong to no word, and UnitY2's aligner needs the text.
    if textless(model) and variant.options.get("aligner") != "fixed":
        predictions = predict(model, test, test.collate, FIRST)
        figures["stage1_wer"] = model.task.score(predictions, test.targets)["wer"]
    on_first(model)
    tunings = []
    if textless(model):
        for tuning in TUNINGS if variant == MAIN else ("vanilla",):
            tuned, found = second_stage(material, model, variant, seed, tuning)
            parameters = sum(each.numel() for each in tuned.head.parameters() if each.requires_grad)
            tunings.append(Tuning(tuning=tuning, seed=seed, parameters=parameters, **found))
        figures |= {name: getattr(tunings[0], name) for name in ("word_error", "token_error")}
        seconds += tunings[0].seconds or 0.0
    row = Row(variant=variant.name, seed=seed, seconds=seconds, **figures)
    return row, tunings if variant == MAIN else []


def measure_steps(material: Material) -> list[Step]:
    """Training steps of the first stage, by mmkernels and as published."""
    found = []
    for name, shape, clips in (
        ("small, 32 clips", {}, 32),
        (
            "width 512, 4 layers, 8 clips",
            {"width": 512, "heads": 8, "key_heads": 2, "hidden": 1408, "depth": 4},
            8,
        ),
    ):
        model = _CostModel(material, {**BASE, **shape}, clips)
        comparison = compare_steps(TrainingStep(model, model.batch), TrainingStep(model.twin(), model.batch))
        assert comparison.eager is not None
        assert comparison.agrees
        for path, cost, baseline in (
            ("dense mask, all frames in the last layer", comparison.eager, True),
            ("mmkernels", comparison.mmkernels, False),
        ):
            found.append(
                Step(
                    case=name,
                    path=path,
                    step_ms=cost.milliseconds,
                    memory_mb=cost.memory_mib,
                    baseline=baseline,
                )
            )
    return found


class _CostModel(nn.Module):
    """A connector on stored features whose segments are found already, as its own time is asked for."""

    def __init__(self, material: Material, options: dict[str, Any], clips: int) -> None:
        super().__init__()
        whole = material.build(
            Variant("", {name: value for name, value in options.items() if name != "width"}),
            material.task(1),
            0,
        )
        test = material.usable(whole, material.examples(whole)[1])
        order = sorted(range(len(test)), key=lambda index: test.lengths[index])[-clips:]
        batch = test.collate([test[index] for index in order])
        taps = model_taps(batch)
        with torch.no_grad():
            segments = whole.readout.segments(taps, batch["labels"])
            x = taps.scatter(taps.features[:, whole.readout.slots[0]])
        self.batch = {"x": x, "ends": segments.ends, "lengths": taps.lengths}
        shape = {"width": 256, "heads": 4, "key_heads": 2, "hidden": 704, "depth": 2, **options}
        set_seed(0)
        self.connector: nn.Module = Connector(
            x.shape[2],
            shape["width"],
            layers=shape["depth"],
            heads=shape["heads"],
            key_heads=shape["key_heads"],
            hidden=shape["hidden"],
        )

    def twin(self) -> _CostModel:
        twin = copy.copy(self)
        twin._modules = {"connector": EagerConnector.of(self.connector)}  # type: ignore[arg-type]
        return twin

    def forward(self, x: torch.Tensor, ends: torch.Tensor, lengths: torch.Tensor) -> Any:
        vectors = self.connector(x, ends, lengths)
        return SimpleNamespace(logits=vectors, loss=vectors.square().mean())


def draw_example(material: Material, model: AdaptedModel, path: Path) -> None:
    """A sentence of a test room: its segments, tokens, and how near their vectors came."""
    _, test = material.examples(model)
    index = min(
        range(len(test)),
        key=lambda index: abs(test.lengths[index] - 180) + (len(test.targets[index]) < 30) * 1000,
    )
    batch = test.collate([test[index]])
    taps = model_taps(batch)
    with torch.no_grad():
        model.eval()
        segments = model.readout.segments(taps, batch["labels"])
        found = model.compress(taps, batch["labels"])
        cosine, _ = model.head.quality(found.frames, found.taps, found.labels)
    text = test.targets[index]
    places = [0, *TokenLabels.unpack(found.labels).ends[0].tolist()]
    tokens = [text[start:end] for start, end in itertools.pairwise(places)]
    clip: Clip = material.test[index]
    extractor = AutoFeatureExtractor.from_pretrained(material.whisper)
    assert isinstance(clip.source, Path)
    samples = AudioInput(extractor).load(clip.source)
    mel = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np").input_features[0]
    columns = round(len(samples) / extractor.hop_length)
    draw_segments(
        path,
        mel[:, :columns],
        0.02,
        segments.ends[0, : len(tokens)].tolist(),
        tokens,
        cosine.tolist(),
        clip.text or "",
        column_seconds=extractor.hop_length / extractor.sampling_rate,
    )


def study(
    material: Material, variants: Sequence[Variant], seeds: int, example: Path, progress: Progress
) -> dict[str, Any]:
    """The record but for date and machine."""
    rows, tunings = [], []
    bar = progress.add_task("Connectors", total=len(variants) * seeds)
    for seed in range(seeds):
        for variant in variants:

            def on_first(model: AdaptedModel, variant: Variant = variant, seed: int = seed) -> None:
                if variant == MAIN and seed == 0:
                    draw_example(material, model, example)

            row, found = judge(material, variant, seed, on_first)
            rows.append(row)
            tunings += found
            progress.console.print(json.dumps(rounded(asdict(row))), markup=False, highlight=False)
            for each in found:
                progress.console.print(json.dumps(rounded(asdict(each))), markup=False, highlight=False)
            progress.advance(bar)
    order = [variant.name for variant in variants]
    rows.sort(key=lambda row: order.index(row.variant))
    return {
        "language_model": material.facts,
        "aligners": {name: {"character_error": error} for name, error in material.errors.items()},
        "training_clips": len(material.train),
        "test_clips": len(material.test),
        "stages": [asdict(FIRST), asdict(SECOND)],
        "rows": [asdict(row) for row in rows],
        "tunings": [asdict(each) for each in tunings],
        "steps": [asdict(each) for each in measure_steps(material)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "build/ssr", help="models, kept between runs")
    parser.add_argument("--record", type=Path, default=ROOT / "docs/ssr.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/ssr.svg")
    parser.add_argument("--example", type=Path, default=ROOT / "docs/ssr.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=2, help="of the clips")
    parser.add_argument("--only", nargs="+", default=[], help="names of variants")
    parser.add_argument("--redraw", action="store_true", help="draw the record that is there")
    given = parser.parse_args()
    if not given.redraw:
        with Progress() as progress:
            material = Material(given.models, progress, given.every)
            chosen = [each for each in VARIANTS if not given.only or each.name in given.only]
            found = study(material, chosen, given.seeds, given.example, progress)
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device("cpu")),
            **found,
        }
        given.record.write_text(json.dumps(rounded(record), indent=1) + "\n")
    record = json.loads(given.record.read_text())
    draw(record, given.figure)
    print(table(record))


if __name__ == "__main__":
    main()
