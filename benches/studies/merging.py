"""The effect of merging a text model's attention on a speech recogniser, on the recordings of `make demo`.

``python -m benches.studies.merging`` trains linear CTC heads on the last layer of Whisper tiny.en's frozen
encoder, merges MiniLM-L6's queries, keys and values into it (MAM, arXiv 2312.14378) at several lambdas, with
the noise controls of the paper, and tests the same heads. Nothing is trained after merging. About 15 minutes
on two cores; writes ``docs/merging.json`` and ``docs/merging.svg``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from transformers import AutoModel, set_seed

from benches.measure.record import rounded
from mmtransfer import mam
from mmtransfer.compare.store import Store
from mmtransfer.data.features import Collator
from mmtransfer.demo.experiments import speech_experiment
from mmtransfer.demo.minilm import minilm_l6
from mmtransfer.encoders.tapped import TappedEncoder
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks import find_task
from mmtransfer.training.caching import EncoderCollator
from mmtransfer.training.loop import train
from mmtransfer.training.machine import describe_machine
from mmtransfer.training.settings import Training

ROOT = Path(__file__).resolve().parents[2]
LAMBDAS = (0.02, 0.05, 0.1, 0.2)
#: MiniLM's six layers, spread over Whisper's four.
LAYER_MAP = (0, 2, 3, 5)
#: Each noise control is drawn so often, for each head.
DRAWS = 3
BLOCKS = ((0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3))
#: As the recipe of the demo's comparison.
EPOCHS, BATCH_SIZE = 6, 16


@dataclass(frozen=True)
class Curve:
    """Error rates over lambda: `scores[i]` are those at `lambdas[i]`, of every head (and draw of noise)."""

    source: str
    layers: tuple[int, ...]
    lambdas: tuple[float, ...]
    scores: list[list[float]]

    def mean(self, lam: float) -> float:
        return statistics.fmean(self.scores[self.lambdas.index(lam)])


class Recogniser:
    """Whisper tiny.en's encoder with a trained head for each seed.

    Attributes:
        encoder: the model whose attention is merged.
    """

    def __init__(self, seeds: int, progress: Progress, cache: Path | None = None) -> None:
        experiment = speech_experiment(cache)
        self.recordings = experiment.recordings
        self.task = find_task("ctc").of(self.recordings)
        self.encoder = TappedEncoder(experiment.model, [-1])
        collate = EncoderCollator(
            Collator(self.recordings, experiment.extractor, max_seconds=experiment.max_seconds),
            self.encoder,
            self.task,
        )
        store = Store(self.recordings, self.encoder, collate, workers=1)
        store.cache_features(progress)
        store.drop_infeasible()
        self.heads = [self._train(store, seed) for seed in progress.track(range(seeds), description="Heads")]
        # Only test clips run again, at each lambda.
        store.clips = {"test": store.clips["test"]}
        store.cache_inputs(progress)
        self.inputs = store.inputs["test"]

    def _train(self, store: Store, seed: int) -> AdaptedModel:
        set_seed(seed)
        model = AdaptedModel(self.encoder.model, "head", self.task)
        rate = model.method.training.learning_rate
        settings = Training(epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=rate, seed=seed, cpu=True)
        train(model, *store.examples("train", model), settings)
        return model.eval()

    @torch.no_grad()
    def scores(self, _: object = None) -> list[float]:
        """The character error rate on the test clips by each head, with the encoder's present weights."""
        order = sorted(range(len(self.inputs)), key=self.inputs.lengths.__getitem__)
        found: list[dict[int, Any]] = [{} for _ in self.heads]
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = self.inputs.collate([self.inputs[index] for index in chosen])
            batch.pop("labels")
            taps = self.encoder(**batch)
            for predictions, model in zip(found, self.heads, strict=True):
                logits = model(features=taps.features, lengths=taps.lengths).logits
                decoded = self.task.decode(logits, taps.lengths)
                predictions |= dict(zip(chosen, decoded, strict=True))
        targets = self.inputs.targets
        return [
            self.task.score([predictions[index] for index in range(len(targets))], targets)[
                self.task.metric.name
            ]
            for predictions in found
        ]


def study(recogniser: Recogniser, progress: Progress) -> list[Curve]:
    """All curves: sources and controls in all layers, then the source in some."""
    target = recogniser.encoder.model
    minilm = AutoModel.from_pretrained(minilm_l6())
    every = tuple(range(len(LAYER_MAP)))
    sources: dict[str, list[tuple[Any, bool]]] = {
        "MiniLM-L6": [(minilm, False)],
        "MiniLM-L6, matched scale": [(minilm, True)],
        "N(source)": [(mam.Noise(minilm, seed), False) for seed in range(DRAWS)],
        "N(source), matched scale": [(mam.Noise(minilm, seed), True) for seed in range(DRAWS)],
        "N(target)": [(mam.Noise("target", seed), False) for seed in range(DRAWS)],
        "N(0,1)": [(mam.Noise("0,1", seed), False) for seed in range(DRAWS)],
    }
    wanted = [(name, every, LAMBDAS) for name in sources]
    wanted += [(name, block, (0.05, 0.1)) for block in BLOCKS for name in list(sources)[:2]]
    total = sum(len(sources[name]) * len(lambdas) for name, _, lambdas in wanted)
    bar = progress.add_task("Points", total=total)

    def scores(_: object) -> list[float]:
        progress.advance(bar)
        return recogniser.scores()

    curves = []
    for name, layers, lambdas in wanted:
        found: list[list[float]] = [[] for _ in lambdas]
        for source, match in sources[name]:
            options = {"layers": layers, "layer_map": LAYER_MAP, "match_rms": match}
            for place, (_, each) in zip(
                found, mam.sweep(target, source, lambdas, scores, **options), strict=True
            ):
                place += each
        curves.append(Curve(name, layers, lambdas, found))
    return curves


def draw(record: dict[str, Any], path: Path) -> None:
    """Error against lambda with the controls, and error by the layers that are merged."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    over_lambda, by_layers = figure.subplots(1, 2, width_ratios=(1.35, 1))
    base = 100 * statistics.fmean(record["unmerged"])
    curves = [Curve(**{**each, "layers": tuple(each["layers"])}) for each in record["curves"]]
    for curve in (each for each in curves if len(each.layers) == len(LAYER_MAP)):
        rates = [[100 * value for value in each] for each in ([record["unmerged"], *curve.scores])]
        means = [statistics.fmean(each) for each in rates]
        style = "o-" if curve.source.startswith("MiniLM") else "s:"
        line = over_lambda.plot((0, *curve.lambdas), means, style, ms=4, label=curve.source)[0]
        low, high = [min(each) for each in rates], [max(each) for each in rates]
        over_lambda.fill_between((0, *curve.lambdas), low, high, alpha=0.15, color=line.get_color())
    over_lambda.set_ylim(30, 102)
    over_lambda.set_xlabel("lambda, the share of the source, in all layers")
    over_lambda.set_ylabel("character error, %")
    _draw_blocks(by_layers, [each for each in curves if len(each.layers) < len(LAYER_MAP)], base)
    for axes, side in ((over_lambda, "left"), (by_layers, "right")):
        # Below the axes, where no line or bar is.
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc=f"outside lower {side}", ncols=2, frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _draw_blocks(axes: Axes, curves: Sequence[Curve], base: float) -> None:
    """Bars: the mean over heads at lambda 0.1, their dots, and the line of the model that is not merged."""
    lam = 0.1
    for offset, source in enumerate(dict.fromkeys(curve.source for curve in curves)):
        for row, layers in enumerate(BLOCKS):
            curve = next(each for each in curves if (each.source, each.layers) == (source, layers))
            place = row + 0.4 * (offset - 0.5)
            colour = f"C{offset}"
            label = None if row else f"{source}, lambda {lam:g}"
            axes.barh(place, 100 * curve.mean(lam), 0.36, color=colour, alpha=0.5, label=label)
            dots = [100 * value for value in curve.scores[curve.lambdas.index(lam)]]
            axes.plot(dots, [place] * len(dots), "o", color=colour, ms=3)
    axes.axvline(base, color="0.4", linestyle="--", linewidth=1, label="not merged")
    axes.set_yticks(
        range(len(BLOCKS)), ["layer" + "s" * (len(b) > 1) + f" {'-'.join(map(str, b))}" for b in BLOCKS]
    )
    axes.invert_yaxis()
    axes.set_xlim(34, None)
    axes.set_xlabel("character error, %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="heads that are trained and tested")
    parser.add_argument("--record", type=Path, default=ROOT / "docs/merging.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/merging.svg")
    parser.add_argument("--redraw", action="store_true", help="draw the record that is there")
    given = parser.parse_args()
    if not given.redraw:
        with Progress() as progress:
            recogniser = Recogniser(given.seeds, progress)
            unmerged = recogniser.scores()
            curves = study(recogniser, progress)
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device("cpu")),
            "metric": recogniser.task.metric.title,
            "target": "Whisper tiny.en, encoder",
            "source": "MiniLM-L6",
            "layer_map": LAYER_MAP,
            "seeds": given.seeds,
            "draws": DRAWS,
            "unmerged": unmerged,
            "curves": [asdict(curve) for curve in curves],
        }
        given.record.write_text(json.dumps(rounded(record), indent=1) + "\n")
    draw(json.loads(given.record.read_text()), given.figure)


if __name__ == "__main__":
    main()
