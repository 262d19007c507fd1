"""A picture of an alignment: spectrogram, words, and the best path through the model's probabilities."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .aligner import AlignedText, Posteriors

#: Seconds of a picture; more would not be legible.
LONGEST = 20.0
_WINDOW_SECONDS, _HOP_SECONDS = 0.025, 0.01
_DECIBELS = 70.0


def draw(
    found: AlignedText,
    samples: np.ndarray,
    rate: int,
    path: Path,
    *,
    start: float = 0.0,
    seconds: float = LONGEST,
    title: str = "",
) -> None:
    """Draw a part of a recording; the suffix of `path` gives the format.

    Args:
        found: the alignment of the whole recording.
        samples: `(n,)` of the part, or more, from `start` on.
        rate: of the samples, in Hz.
        path: of the picture.
        start, seconds: the part.
        title: above it.
    """
    end = min(start + min(seconds, LONGEST), found.seconds)
    shown = [index for index, token in enumerate(found.tokens) if token.end > start and token.start < end]
    # A row for each token, as long as they fit.
    heights = 2.2, min(max(2.0, 0.12 * len(shown)), 8.0)
    figure = Figure(figsize=(max(6.0, 1.5 + 1.4 * (end - start)), sum(heights) + 0.8), layout="constrained")
    spectrum, path_axes = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    _draw_spectrogram(spectrum, samples[: round((end - start) * rate)], rate, start)
    _draw_words(spectrum, found, start, end)
    _draw_path(path_axes, found, shown, start, end)
    path_axes.set_xlim(start, end)
    path_axes.set_xlabel("seconds")
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        # Of characters that the font lacks, and words that are longer than the picture.
        warnings.simplefilter("ignore", UserWarning)
        # Without a date, the same alignment gives the same file.
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_spectrogram(axes: Axes, samples: np.ndarray, rate: int, start: float) -> None:
    size, hop = round(_WINDOW_SECONDS * rate), round(_HOP_SECONDS * rate)
    if len(samples) < size:
        samples = np.pad(samples, (0, size - len(samples)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    level = 10 * np.log10(power + 1e-12)
    top = level.max()
    extent = (start, start + len(frames) * hop / rate, 0.0, rate / 2000)
    axes.imshow(
        level, origin="lower", aspect="auto", extent=extent, cmap="Greys", vmin=top - _DECIBELS, vmax=top
    )
    axes.set_ylabel("kHz")


def _draw_words(axes: Axes, found: AlignedText, start: float, end: float) -> None:
    """Words above the spectrogram, their boundaries in it; dashed where a time is not of the model."""
    for number, word in enumerate(found.words):
        if word.end <= start or word.start >= end:
            continue
        colour = f"C{number % 2}"
        axes.axvspan(max(word.start, start), min(word.end, end), color=colour, alpha=0.18, linewidth=0)
        for edge in (word.start, word.end):
            if start <= edge <= end:
                axes.axvline(edge, color=colour, linewidth=0.9, linestyle="-" if word.exact else ":")
        middle = (max(word.start, start) + min(word.end, end)) / 2
        score = "" if word.score is None else f"\n{word.score:.2f}"
        axes.annotate(
            f"{word.text}{score}",
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=colour,
            parse_math=False,
        )


def _draw_path(axes: Axes, found: AlignedText, shown: list[int], start: float, end: float) -> None:
    """A row for each token shown, with its probability in each frame, and the path through them."""
    posteriors = found.posteriors
    hop = posteriors.seconds_per_frame
    first, last = (max(round((each - posteriors.start) / hop), 0) for each in (start, end))
    if not shown:
        axes.text(0.5, 0.5, "no token here", transform=axes.transAxes, ha="center")
        return
    columns = [posteriors.target[index] for index in shown]
    probabilities = posteriors.log_probs[first:last, columns].exp().T.numpy()
    left, right = (posteriors.start + frame * hop for frame in (first, first + probabilities.shape[1]))
    extent = (left, right, len(shown) - 0.5, -0.5)
    image = axes.imshow(
        probabilities, aspect="auto", extent=extent, cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.step(*_path(found, posteriors, shown, first, last), where="post", color="C3", linewidth=1.2)
    axes.set_yticks(range(len(shown)))
    labels = [found.tokens[index].text.replace(" ", "␣") for index in shown]
    axes.set_yticklabels(labels, fontsize=min(8.0, 480 / len(shown)), parse_math=False)
    axes.set_ylabel("token")
    axes.figure.colorbar(image, ax=axes, label="probability", fraction=0.03, pad=0.01)


def _path(
    found: AlignedText, posteriors: Posteriors, shown: list[int], first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times and rows of the path; blanks stay in the row of the token before them."""
    hop = posteriors.seconds_per_frame
    times = posteriors.start + np.arange(first, min(last, len(posteriors.path)) + 1) * hop
    starts = np.array([found.tokens[index].start for index in shown])
    # Half a frame later, so that rounding does not decide.
    rows = np.searchsorted(starts, times + hop / 2, side="right") - 1
    return times, rows.clip(min=0)
