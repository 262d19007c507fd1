"""Times of words, on speech whose times are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from finetune_data import write_model
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tone_model import HOP, LETTER, LETTERS, RATE, ToneModel, speak, true_times
from transformers import AutoModelForCTC

from mmtransfer.align import Aligner, Emissions, Normalizer, Token, load_ctc, pretrained_ctc
from mmtransfer.align.aligner import _time_words
from mmtransfer.align.emissions import _windows
from mmtransfer.align.text import encode
from mmtransfer.data import DataError
from mmtransfer.data.inputs import AudioInput
from mmtransfer.demo.experiments import synthetic_experiment
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks.classification import Classification
from mmtransfer.tasks.ctc import CTC
from mmtransfer.training.finite import NotFiniteError

SENTENCE = "abc_ab dd fac_g h bad_ cafe"


def long_text(words: int, seed: int = 0) -> str:
    """Words without a letter twice: these would part at a blank that no sound shows."""
    rng = np.random.default_rng(seed)
    letters = list(LETTERS)
    return " ".join("".join(rng.permutation(letters)[: rng.integers(1, 6)]) for _ in range(words))


def check_times(found, text: str, places: list[int] | None = None) -> None:
    """Every word is where it was spoken."""
    times = true_times(text)
    for index, word in enumerate(found.words if places is None else [found.words[each] for each in places]):
        start, end = times[index]
        assert math.isclose(word.start, start, abs_tol=1e-6), word
        assert math.isclose(word.end, end, abs_tol=1e-6), word


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def test_words_are_where_they_were_spoken() -> None:
    found = Aligner(ToneModel()).align(speak(SENTENCE), SENTENCE.replace("_", ""))
    check_times(found, SENTENCE)
    assert [word.text for word in found.words] == SENTENCE.replace("_", "").split()
    assert all(word.exact and word.score > 0.9 for word in found.words)
    assert found.seconds == len(speak(SENTENCE)) / RATE
    assert found.score > 0.9
    letters = [token for token in found.tokens if token.word is not None]
    assert "".join(token.text for token in letters) == SENTENCE.replace("_", "").replace(" ", "")
    assert [token.word for token in found.tokens if token.text == "g"] == [2]


@pytest.mark.parametrize(("window", "context"), [(2.0, 0.5), (1.0, 0.0), (3.1, 0.33), (1.3, 0.64)])
def test_windows_give_what_one_pass_gives(window: float, context: float) -> None:
    """The frames of the tone model depend on their own samples, so not a bit may differ."""
    text = long_text(60)
    samples = speak(text)
    whole = Aligner(ToneModel(), window=1000).align(samples, text)
    model = ToneModel()
    cut = Aligner(model, window=window, context=context, batch_size=3).align(samples, text)
    assert len(model.seen) > 5
    assert max(model.seen) <= window
    assert torch.equal(whole.posteriors.log_probs, cut.posteriors.log_probs)
    assert whole.words == cut.words


@pytest.mark.parametrize("rest", [1, HOP - 1, HOP, 2 * HOP + 5, 20 * HOP, 21 * HOP + 1])
def test_any_length_has_its_frames(rest: int) -> None:
    """Windows of 50 frames, 10 of context: the last one may be of any length."""
    emissions = Emissions(ToneModel(), window=1.0, context=0.2, batch_size=2)
    for full in (0, 1, 2, 5):
        samples = np.zeros(50 * HOP + full * 30 * HOP + rest, np.float32)
        assert len(emissions([samples], [0])) == len(samples) // HOP


@pytest.mark.parametrize("context", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("window", [1.3, 2.0, 5.0])
def test_frames_that_overlap_in_the_audio(tmp_path: Path, window: float, context: float) -> None:
    """wav2vec2's own kernels look 400 samples wide every 320: a window has a frame less than hops."""
    sizes = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_dim": [8] * 7}
    folder = write_model(tmp_path / "model", head=True, num_feat_extract_layers=7, **sizes)
    emissions = Emissions(pretrained_ctc(folder), window=window, context=context)
    for size in (80_050, 81_000, 96_000, 96_079, 96_080):
        samples = np.random.default_rng(size).standard_normal(size).astype(np.float32) * 0.1
        assert len(emissions([samples], [0])) == (size - 400) // 320 + 1
    with pytest.raises(DataError, match="too short for one frame"):
        emissions([np.zeros(399, np.float32)], [0])


def test_a_file_is_streamed(tmp_path: Path) -> None:
    """At any rate, with any channels; no more than a window and a block wait in memory."""
    text = long_text(150, seed=1)
    samples = speak(text)
    stereo = np.stack([samples * 1.2, samples * 0.8], 1)
    found = Aligner(ToneModel(), window=4.0, context=0.5).align(write(tmp_path / "a.wav", stereo), text)
    check_times(found, text)
    pulled = []

    def blocks():
        for start in range(0, len(samples), 4000):
            pulled.append(start)
            yield samples[start : start + 4000]

    windows = _windows(blocks(), 16_000, 8_000)
    next(windows)
    assert len(pulled) == 5
    assert sum(1 for _ in windows) == -(-(len(samples) - 16_000) // 8_000)


def test_another_rate(tmp_path: Path) -> None:
    """48 kHz is resampled block by block; times hold to a frame."""
    samples = speak(SENTENCE)
    size = 3 * len(samples)
    spectrum = np.fft.rfft(samples)
    upsampled = np.fft.irfft(np.pad(spectrum, (0, size // 2 + 1 - len(spectrum))), size) * 3
    found = Aligner(ToneModel()).align(
        write(tmp_path / "a.wav", upsampled, 3 * RATE), SENTENCE.replace("_", "")
    )
    for word, (start, end) in zip(found.words, true_times(SENTENCE), strict=True):
        assert abs(word.start - start) <= HOP / RATE + 1e-6
        assert abs(word.end - end) <= HOP / RATE + 1e-6
    assert abs(found.seconds - len(samples) / RATE) < 0.001


def test_ten_minutes_in_one_alignment() -> None:
    text = long_text(2400, seed=2)
    samples = speak(text)
    assert len(samples) / RATE > 500
    check_times(Aligner(ToneModel()).align(samples, text), text)


def test_what_the_model_cannot_write_gets_the_time_between() -> None:
    """The digits are spoken as letters that the text does not say."""
    spoken = "abc hhgh ghgg cad"
    found = Aligner(ToneModel()).align(speak(spoken), "Abc, 25% 1234567 (cad)!")
    times = true_times(spoken)
    abc, percent, number, cad = found.words
    check_times(found, "abc hhgh ghgg cad", [0])
    assert math.isclose(cad.start, times[3][0], abs_tol=1e-6)
    assert abc.exact
    assert cad.exact
    assert not percent.exact
    assert percent.score is None
    assert number.score is None
    # By their lengths, 3 and 7 characters.
    assert percent.end == number.start
    assert math.isclose(7 * (percent.end - percent.start), 3 * (number.end - number.start), rel_tol=1e-6)
    assert percent.start >= abc.end
    assert number.end <= cad.start
    # Together the sound that is there, but for the silences around it.
    assert percent.start <= times[1][0] + HOP / RATE
    assert number.end >= times[2][1] - HOP / RATE


def test_punctuation_takes_no_time() -> None:
    """Dashes of dialogues, quotes, and words that a rule makes silent: the others are where they were."""
    text = "abc ab fac h bad cafe"
    samples = speak(text)
    plain = Aligner(ToneModel()).align(samples, text).words
    aligner = Aligner(ToneModel(), rules={r"\[.*\]": ""}, wildcards=["start", "end"])
    silent = Aligner(ToneModel(), rules={r"\[.*\]": ""})
    dashed = "– abc – ab fac „ h [laughs] bad ... cafe – –"
    for each in (silent.align(samples, dashed), aligner.align(samples, "[x] " + text)):
        spoken = [word for word in each.words if word.score is not None]
        assert [word.text for word in spoken] == text.split()
        if each.words[0].text == "–":
            assert [(word.start, word.end) for word in spoken] == [(word.start, word.end) for word in plain]
    found = silent.align(samples, dashed)
    assert all(word.exact for word in found.words)
    quiet = [word for word in found.words if word.score is None]
    assert all(word.start == word.end for word in quiet)
    starts = [word.start for word in found.words]
    assert starts == sorted(starts)
    only = Aligner(ToneModel()).align(speak("abc"), "– abc")
    assert [(word.start, word.end) for word in only.words] == [(0.0, 0.0), (0.0, 3 * LETTER * HOP / RATE)]


def test_unwritable_words_at_both_ends() -> None:
    spoken = "hgh abc ghg"
    found = Aligner(ToneModel()).align(speak(spoken), "12 abc 34")
    assert [word.score is None for word in found.words] == [True, False, True]
    assert math.isclose(found.words[1].start, true_times(spoken)[1][0], abs_tol=1e-6)
    assert found.words[0].end <= found.words[1].start
    assert found.words[2].start >= found.words[1].end


def test_rules_spell_what_the_model_cannot_write() -> None:
    spoken = "abc bad cafe had"
    rules = [("2(\\d)", r"bad \1"), ("5", "cafe"), ("%", "")]
    found = Aligner(ToneModel(), rules=rules).align(speak(spoken), "abc 25% had")
    assert [word.text for word in found.words] == ["abc", "25%", "had"]
    times = true_times(spoken)
    assert math.isclose(found.words[1].start, times[1][0], abs_tol=1e-6)
    assert math.isclose(found.words[1].end, times[2][1], abs_tol=1e-6)
    assert found.words[1].exact


@pytest.mark.parametrize(
    ("place", "spoken", "lacks"),
    [
        ("start", "aaaa abc bad cafe", 0),
        ("end", "abc bad cafe eeee", 3),
        ("between", "abc cccc bad cafe", 1),
    ],
)
def test_wildcards_take_audio_that_the_text_lacks(place: str, spoken: str, lacks: int) -> None:
    """A long sound next to a word that has it too: without a wildcard the word takes it."""
    times = [each for index, each in enumerate(true_times(spoken)) if index != lacks]
    samples, text = speak(spoken), "abc bad cafe"
    found = Aligner(ToneModel(), wildcards=[place]).align(samples, text)
    for word, (start, end) in zip(found.words, times, strict=True):
        assert abs(word.start - start) <= HOP / RATE + 1e-6, word
        assert abs(word.end - end) <= HOP / RATE + 1e-6, word
        assert word.score > 0.9
    plain = Aligner(ToneModel()).align(samples, text)
    wrong = [
        max(abs(word.start - start), abs(word.end - end))
        for word, (start, end) in zip(plain.words, times, strict=True)
    ]
    assert max(wrong) > 0.2


CZECH = CTC(vocabulary=("", " ", *"aábcčdďeéěfghiíjklmnňoópqrřsštťuúůvwxyýzž"))
UPPER = CTC(
    vocabulary=("<pad>", "<s>", "</s>", "<unk>", "'", " ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"), case="upper"
)


@pytest.mark.parametrize(
    ("task", "written", "spoken", "exact"),
    [
        (CZECH, "„Příliš", "příliš", True),
        (CZECH, "ŽLUŤOUČKÝ,", "žluťoučký", True),
        # The same letters, with the accents as separate characters.
        (CZECH, "ku\u030an\u030c!", "kůň", True),
        (CZECH, "chceš-li", "chceš li", True),
        (CZECH, "3.", "", False),
        (CZECH, "5krát", "krát", False),
        (CZECH, "Größe", "grosse", True),
        (CZECH, "naïve…", "naive", True),
        (CZECH, "— ", "", True),
        (CZECH, "Москва", "", False),
        (CZECH, "a/b", "a b", True),
        (CZECH, "ﬁn", "fin", True),
        (CZECH, "don’t", "dont", True),
        (UPPER, "don’t", "DON'T", True),
        (UPPER, "Café", "CAFE", True),
        (UPPER, "x²", "X", False),
        (UPPER, "$5", "", False),
        (UPPER, "A&B", "AB", False),
        (UPPER, "&", "", False),
        (UPPER, "50%", "", False),
    ],
)
def test_spelling(task: CTC, written: str, spoken: str, exact: bool) -> None:
    (word,) = Normalizer(task).words(written)
    assert (word.text, word.spoken, word.exact) == (written.strip(), spoken, exact)


def test_lines_are_kept() -> None:
    words = Normalizer(CZECH).words("Dobrý\x0c den.\r\n\n  Jak se\tmáte?\u2028\n")
    assert [(word.text, word.line) for word in words] == [
        ("Dobrý", 0),
        ("den.", 0),
        ("Jak", 2),
        ("se", 2),
        ("máte?", 2),
    ]


@pytest.mark.parametrize("rules", [["ab"], [("a", 1)], {1: "a"}])
def test_rules_are_pairs_of_texts(rules) -> None:
    with pytest.raises(TypeError, match="rules must be pairs"):
        Normalizer(CZECH, rules)
    assert Normalizer(CZECH, {"25": "bé"}).words("25")[0].spoken == "bé"


@pytest.mark.parametrize(("pattern", "replacement"), [("(", "a"), ("a", r"\2")])
def test_wrong_rules(pattern: str, replacement: str) -> None:
    with pytest.raises(ValueError, match="the rule"):
        Normalizer(CZECH, [(pattern, replacement)])


def word_pieces() -> CTC:
    vocabulary = {"[UNK]": 0, "ab": 1, "##c": 2, "ba": 3, "##d": 4, "cafe": 5, "h": 6}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return CTC.of_tokenizer(tokenizer)


def test_word_pieces_take_the_nearest_spelling() -> None:
    words = Normalizer(word_pieces()).words("ABC bäd! ba-cafe bad/25 x— —")
    assert [(word.spoken, word.exact) for word in words] == [
        ("abc", True),
        ("bad", True),
        ("ba cafe", True),
        ("bad", False),
        ("", False),
        ("", True),
    ]


def test_word_pieces_lead_back_to_words() -> None:
    task = word_pieces()
    words = Normalizer(task).words("Abc, bad xyz cafe h!")
    assert [word.spoken for word in words] == ["abc", "bad", "", "cafe", "h"]
    star = len(task.vocabulary)
    target = encode(words, task)
    assert target.ids == (1, 2, 3, 4, star, 5, 6)
    assert target.words == ((0,), (0,), (1,), (1,), (2,), (3,), (4,))
    between = encode(words, task, ("start", "between", "end"))
    assert between.ids == (star, 1, 2, star, 3, 4, star, 5, star, 6, star)


def test_tokens_of_several_words() -> None:
    """Without a pre-tokenizer, merges go over spaces."""
    vocabulary = {"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4, "c": 5, " c": 6}
    model = BPE(vocabulary, merges=[("a", " "), ("a ", "b"), (" ", "c")])
    task = CTC.of_tokenizer(Tokenizer(model))
    words = Normalizer(task).words("a b c")
    target = encode(words, task)
    assert target.ids == (4, 6)
    assert target.words == ((0, 1), (2,))
    tokens = [Token("a b", 1.0, 2.0, 0.5, None), Token(" c", 2.0, 3.0, 0.25, 2)]
    timed = _time_words(words, target, tokens)
    assert [(word.start, word.end, word.exact) for word in timed] == [
        (1.0, 1.5, True),
        (1.5, 2.0, True),
        (2.0, 3.0, True),
    ]
    assert [round(word.score, 6) for word in timed] == [0.5, 0.5, 0.25]


def test_spaces_belong_to_no_word() -> None:
    words = Normalizer(CZECH).words("ne-li 1 2 tak")
    target = encode(words, CZECH)
    symbols = [(*CZECH.vocabulary, "*")[index] for index in target.ids]
    assert "".join(symbols) == "ne li * tak"
    assert target.words == ((0,),) * 5 + ((), (1, 2), ()) + ((3,),) * 3


def test_audio_and_text_that_cannot_belong_together(tmp_path: Path) -> None:
    aligner = Aligner(ToneModel())
    short = write(tmp_path / "short.wav", speak("abc"))
    with pytest.raises(DataError, match=r"short\.wav is too short for its text: 0\.18 s are 9 frames, .* 13"):
        aligner.align(short, "abcabca babca")
    # A repeat needs a blank: 6 letters and 4 repeats.
    with pytest.raises(DataError, match="9 frames, and the text takes 10"):
        aligner.align(short, "aaabbb")
    for text in ("", "...", "123", " \n"):
        with pytest.raises(DataError, match=r"the text of .*short\.wav has nothing that the model can write"):
            aligner.align(short, text)
    with pytest.raises(DataError, match=r"missing\.wav does not exist"):
        aligner.align(tmp_path / "missing.wav", "abc")
    with pytest.raises(ValueError, match=r"audio must have the shape \(samples,\)"):
        aligner.align(np.zeros((2, 1000), np.float32), "abc")
    with pytest.raises(TypeError, match="divide int16"):
        aligner.align(np.zeros(16_000, np.int16), "abc")
    model = ToneModel()
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"the logits of .*short\.wav are not finite"):
        Aligner(model).align(short, "abc")


def test_wrong_options() -> None:
    model = ToneModel()
    for options, message in (
        ({"window": 1.0, "context": 0.5}, "window must be longer than two contexts of 0.5 s, got 1 s"),
        ({"window": 0.2, "context": 0.0}, r"window must be at least 0\.32 s"),
        ({"context": -1.0}, "two contexts"),
        ({"wildcards": "middle"}, "got 'middle'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"wildcards": ["middle"]}, "wildcards must be of start, end, between, got 'middle'"),
        ({"penalty": -1.0}, "penalty must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Aligner(model, **options)
    model.task = Classification(num_labels=2)
    with pytest.raises(ValueError, match="model has the task classification; alignment needs the task ctc"):
        Aligner(model)
    model = ToneModel()
    model.audio = None
    with pytest.raises(ValueError, match="does not know its feature extractor"):
        Aligner(model)


def test_a_model_of_transformers_keeps_its_logits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head=True)
    emissions = Emissions(pretrained_ctc(folder))
    assert emissions.hop == HOP
    samples = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) * 0.1
    classes = [0, *range(5, 10)]
    found = emissions([samples], classes)
    original = AutoModelForCTC.from_pretrained(folder).eval()
    inputs = load_ctc(folder).audio.extract([samples])
    with torch.no_grad():
        logits = original(inputs["input_values"], attention_mask=inputs["attention_mask"]).logits[0]
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found[:, :-1], expected[:, classes], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, -1], expected.amax(1), rtol=0, atol=1e-5)


def test_a_frame_is_where_the_model_hears_it(tmp_path: Path) -> None:
    """wav2vec2's first convolutions hear samples 320 t to 320 t + 400; Whisper's are centred on 320 t."""
    sizes = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_dim": [8] * 7}
    folder = write_model(tmp_path / "model", head=True, num_feat_extract_layers=7, **sizes)
    emissions = Emissions(pretrained_ctc(folder))
    assert (emissions.hop, emissions.shift) == (320, 40)
    found = Aligner(pretrained_ctc(folder)).align(np.zeros(8000, np.float32), "A")
    assert found.posteriors.start == 40 / RATE
    assert math.isclose((found.words[0].start - 40 / RATE) % 0.02, 0.0, abs_tol=1e-9)

    experiment = synthetic_experiment(transcribed=True)
    model = AdaptedModel(experiment.model, "head", CTC(vocabulary=("", " ", *"abcde")))
    model.audio = AudioInput(experiment.extractor, experiment.max_seconds)
    whisper = Aligner(model)
    assert (whisper.emissions.hop, whisper.emissions.shift) == (320, -160)
    times = whisper.align(np.zeros(8000, np.float32), "a b")
    assert times.tokens[0].start == 0.0 or math.isclose(times.tokens[0].start % 0.02, 0.01, abs_tol=1e-9)
    assert times.words[-1].end <= times.seconds == 0.5


def test_context_makes_windows_agree_with_one_pass(tmp_path: Path) -> None:
    """Of a transformer: the more context, the nearer; without, farthest at the seams."""
    samples = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32) * 0.1
    model = pretrained_ctc(write_model(tmp_path / "model", head=True))
    whole = Emissions(model, window=20.0)([samples], [0, 5])
    errors = []
    for context in (0.0, 0.5, 1.0):
        found = Emissions(model, window=3.0, context=context)([samples], [0, 5])
        assert found.shape == whole.shape
        errors.append(float((found - whole).abs().max()))
    assert errors[-1] < errors[0]


def test_a_letter_lasts_as_long_as_its_sound() -> None:
    found = Aligner(ToneModel()).align(speak("abc"), "abc")
    assert [round((token.end - token.start) * RATE / HOP) for token in found.tokens] == [LETTER] * 3
