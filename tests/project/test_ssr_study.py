"""The study of SSR's connector: its small language model, its tables by hand, its figures."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benches are not installed

from benches.studies import small_language_model as language  # noqa: E402
from benches.studies import ssr, ssr_report  # noqa: E402
from benches.studies.small_language_model import (  # noqa: E402
    SmallLanguageModelSettings,
    small_language_model,
    text_perplexity,
    train_tokenizer,
)
from benches.studies.ssr_report import draw, draw_segments, table  # noqa: E402

# The verb follows from the subject, and the object from the verb.
SENTENCES = [
    f"{place} {who}"
    for place in ("tady", "někdy", "večer", "potom", "zřejmě", "jindy", "možná", "teď", "ráno", "dnes")
    for who in ("kočka loví myš", "žába chytá mouchu", "děda čte noviny", "řeka teče údolím")
]
TRAIN = [each for place, each in enumerate(SENTENCES) if place % 5]
TEST = [each for place, each in enumerate(SENTENCES) if place % 5 == 0]
TINY = SmallLanguageModelSettings(
    vocabulary=301,
    width=32,
    layers=2,
    heads=2,
    key_heads=1,
    hidden=64,
    epochs=30,
    batch_lines=8,
    learning_rate=1e-2,
    held_out=0.1,
    repeats=0,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("language") / "models/tiny"
    return folder, small_language_model(TRAIN, folder, test=TEST, settings=TINY)


class TestSmallLanguageModel:
    def test_learns_more_than_how_often_tokens_are(self, trained: tuple[Path, dict[str, Any]]):
        folder, facts = trained
        tokenizer = AutoTokenizer.from_pretrained(folder)
        counts = Counter(
            token for text in TEST for token in [*tokenizer.encode(text)[1:], tokenizer.eos_token_id]
        )
        total = sum(counts.values())
        # No model without context is better on the test's lines than their own frequencies.
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        assert facts["perplexity"] < 0.5 * math.exp(entropy)
        assert math.exp(entropy) < facts["unigram_perplexity"]

    def test_facts(self, trained: tuple[Path, dict[str, Any]]):
        folder, facts = trained
        model, tokenizer = _loaded(folder)
        assert facts["parameters"] == sum(each.numel() for each in model.parameters())
        assert facts["vocabulary"] == len(tokenizer) == model.config.vocab_size == TINY.vocabulary
        assert facts["characters"] == sum(map(len, TRAIN))
        counts = Counter(
            token for text in TRAIN for token in tokenizer.encode(text, add_special_tokens=False)
        )
        assert facts["tokens"] == counts.total()
        assert facts["unused_tokens"] == TINY.vocabulary - len(counts)
        rows = model.get_input_embeddings().weight[list(counts)].detach()
        assert facts["embedding_squared_norm"] == pytest.approx(float(rows.square().sum(1).mean()))
        assert 1 <= facts["best_epoch"] <= facts["epochs"] <= TINY.epochs
        assert facts["seconds"] > 0
        losses = [math.log(facts[f"{part}character_perplexity"]) for part in ("", "training_", "held_out_")]
        assert all(0 < loss < math.log(facts["vocabulary"]) for loss in losses)

    def test_is_read_by_transformers(self, trained: tuple[Path, dict[str, Any]]):
        folder, facts = trained
        model, tokenizer = _loaded(folder)
        assert model.config.model_type == "llama"
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        assert tokenizer.is_fast
        special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        assert special == ("<s>", "</s>", "<pad>")
        config = model.config
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == tuple(tokenizer.convert_tokens_to_ids(special))
        found = text_perplexity(model, tokenizer, TEST)
        assert found.token == pytest.approx(facts["perplexity"], rel=1e-5)
        assert found.character == pytest.approx(facts["character_perplexity"], rel=1e-5)
        prompt = tokenizer("večer žába", return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True) == "večer žába chytá mouchu"

    def test_a_complete_folder_is_read(
        self, trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ):
        folder, facts = trained
        monkeypatch.setattr(language, "_train", None)
        assert small_language_model(TRAIN, folder, test=TEST, settings=TINY) == facts
        assert not list(folder.parent.glob("*.partial"))
        with pytest.raises(ValueError, match="other seed;"):
            small_language_model(TRAIN, folder, test=TEST, settings=TINY, seed=1)
        with pytest.raises(ValueError, match="other texts, epochs;"):
            small_language_model(TRAIN[1:], folder, test=TEST, settings=replace(TINY, epochs=2))

    def test_learns_to_repeat(self, trained: tuple[Path, dict[str, Any]], tmp_path: Path):
        small_language_model(TRAIN, tmp_path / "model", settings=replace(TINY, repeats=16))
        losses = []
        for folder in (tmp_path / "model", trained[0]):
            model, tokenizer = _loaded(folder)
            repeat = tokenizer.convert_tokens_to_ids(language.REPEAT)
            torch.manual_seed(0)
            texts = language._random_texts(model, repeat, 64)
            assert min(map(min, texts)) > repeat
            losses.append(language._repeating_loss(model, repeat, texts).item())
        assert losses[0] < losses[1] - 0.5

    def test_what_is_left_of_a_run_that_was_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        few = replace(TINY, epochs=1)
        with monkeypatch.context() as patch:
            patch.setattr(language.PreTrainedTokenizerFast, "save_pretrained", None)
            with pytest.raises(TypeError):
                small_language_model(TRAIN, tmp_path / "model", settings=few)
        assert not (tmp_path / "model").exists()
        facts = small_language_model(TRAIN, tmp_path / "model", settings=few)
        assert "perplexity" not in facts  # no test is given
        assert small_language_model(TRAIN, tmp_path / "model", settings=few) == facts
        (tmp_path / "other").mkdir()
        with pytest.raises(ValueError, match="holds no small language model"):
            small_language_model(TRAIN, tmp_path / "other", settings=few)
        with pytest.raises(ValueError, match="two different lines"):
            small_language_model(["a", "a"], tmp_path / "third", settings=few)

    def test_repeats_by_its_seed_alone(self, tmp_path: Path):
        few = replace(TINY, epochs=2)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        weights = []
        for number, seed in enumerate((0, 0, 1)):
            folder = tmp_path / str(number)
            small_language_model(TRAIN, folder, seed=seed, settings=few)
            assert torch.equal(torch.get_rng_state(), state)
            weights.append(AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight)
            torch.rand(3)
            state = torch.get_rng_state()
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_the_best_epoch_is_kept(self):
        """Held-out lines that training contradicts: their loss rises soon, and training stops."""
        tokenizer = train_tokenizer(TRAIN, TINY.vocabulary)
        kept = language._encode(tokenizer, [text for text in TRAIN if "kočka" not in text])
        held = language._encode(tokenizer, ["kočka čte údolím", "mouchu loví tady"])
        settings = replace(TINY, patience=2)
        torch.manual_seed(0)
        model = language.LlamaForCausalLM(language._config(tokenizer, settings))
        history = language._train(model, 3, kept, held, settings)
        assert len(history) == history.index(min(history)) + 1 + settings.patience < settings.epochs
        assert language._loss(model, held) == pytest.approx(min(history), rel=1e-6)

    def test_equal_lines_are_on_one_side(self):
        torch.manual_seed(0)
        kept, held = language._split(["a", "b", "a", "c", "b", "d"], 0.5)
        assert len(held) == 2
        assert not set(kept) & set(held)
        assert sorted({*kept, *held}) == ["a", "b", "c", "d"]
        assert len(kept) == sum(text in kept for text in ["a", "b", "a", "c", "b", "d"])

    def test_perplexity_is_that_of_single_texts(self, trained: tuple[Path, dict[str, Any]]):
        model, tokenizer = _loaded(trained[0])
        texts = ["žába", *TEST[:3], ""]
        losses, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
            assert ids[0, 0] == tokenizer.bos_token_id
            with torch.no_grad():
                log_probs = model(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)
            losses -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        model.train()
        found = text_perplexity(model, tokenizer, texts, batch_lines=2)
        assert model.training
        assert found.token == pytest.approx(math.exp(losses / count), rel=1e-5)
        assert found.character == pytest.approx(math.exp(losses / (sum(map(len, texts)) + 5)), rel=1e-5)

    def test_classes_of_frequency(self):
        found = [language.frequency(count) for count in (0, 29, 30, 99, 100)]
        assert found == ["<30", "<30", "30-99", "30-99", ">=100"]
        tokenizer = train_tokenizer(TRAIN, TINY.vocabulary)
        assert language.token_counts(tokenizer, ["aa", "a"]).total() == len(
            tokenizer.encode("aa", add_special_tokens=False) + tokenizer.encode("a", add_special_tokens=False)
        )


class TestTokenizer:
    def test_offsets_are_those_of_characters(self, trained: tuple[Path, dict[str, Any]]):
        tokenizer = AutoTokenizer.from_pretrained(trained[0])
        text = "večer žába chytá mouchu"
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces = [text[start:end] for start, end in found["offset_mapping"]]
        assert "".join(pieces) == text.replace(" ", "")
        assert len(pieces) < len(text) / 1.5
        # A letter that training lacks has a token for each of its bytes, all at its place.
        found = tokenizer("a ů漢", add_special_tokens=False, return_offsets_mapping=True)
        assert [end for _, end in found["offset_mapping"]][-3:] == [4, 4, 4]

    def test_a_word_has_the_same_tokens_everywhere(self):
        tokenizer = train_tokenizer(TRAIN, TINY.vocabulary)
        first = tokenizer.encode("kočka žába", add_special_tokens=False)
        second = tokenizer.encode("žába kočka", add_special_tokens=False)
        half = len(tokenizer.encode("kočka", add_special_tokens=False))
        assert first == second[-half:] + second[:-half]

    @pytest.mark.parametrize("text", ["žába chytá mouchu", "Čím víc, tím líp! 漢字", "a", ""])
    def test_any_text_comes_back(self, text: str):
        tokenizer = train_tokenizer(TRAIN, TINY.vocabulary)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def _loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


RECORD: dict[str, Any] = {
    "date": "2024-01-01",
    "rows": [
        {
            "variant": "ctc characters",
            "seed": seed,
            "cosine": cosine,
            "squared_error": 0.15,
            "cosine_by_frequency": {"<30": cosine - 0.2, ">=100": cosine + 0.1},
            "frames_per_token": 11.26,
            "stage1_wer": 0.8,
            "token_error": 0.5,
            "word_error": error,
        }
        for seed, cosine, error in ((0, 0.6, 0.61), (1, 0.62, 0.63), (2, 0.64, 0.65))
    ]
    + [
        {"variant": "fixed rate", "seed": 0, "cosine": 0.3, "cosine_by_frequency": {"<30": 0.1}},
        {"variant": "fixed rate", "seed": 1, "cosine": None, "word_error": float("nan")},
    ],
    "tunings": [
        {
            "tuning": "lora",
            "seed": seed,
            "perplexity_before": 129.78,
            "perplexity_after": 150.0 + 10 * seed,
            "word_error": 0.7,
            "parameters": 40_960,
        }
        for seed in range(2)
    ],
    "steps": [
        {"case": "8 x 15 s", "path": "last rows", "step_ms": 400.4, "memory_mb": 301},
        {"case": "8 x 15 s", "path": "dense", "step_ms": 800.8, "memory_mb": 602, "baseline": True},
        {"case": "1 x 30 s", "path": "last rows", "step_ms": 90, "memory_mb": None},
    ],
}
TABLE = """\
| connector | seeds | cosine | squared error | cosine, seen <30 | cosine, seen >=100 | frames of a token | word error, stage 1 | token error, stage 2 | word error, stage 2 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| ctc characters | 3 | 0.620 ± 0.020 | 0.150 | 0.420 ± 0.020 | 0.720 ± 0.020 | 11.3 | 80.0 % | 50.0 % | 63.0 ± 2.0 % |
| fixed rate | 2 | 0.300 (1 of 2) | – | 0.100 (1 of 2) | – | – | – | – | – |

| stage 2 | seeds | trained weights | perplexity of text, before | after | word error |
| --- | ---: | ---: | ---: | ---: | ---: |
| lora | 2 | 40,960 | 129.8 | 155.0 ± 7.1 | 70.0 % |

| case | path | step | of the baseline | memory | of the baseline |
| --- | --- | ---: | ---: | ---: | ---: |
| 8 x 15 s | last rows | 400 ms | 0.50 | 301 MB | 0.50 |
| 8 x 15 s | dense | 801 ms | 1.00 | 602 MB | 1.00 |
| 1 x 30 s | last rows | 90 ms | – | – | – |"""  # noqa: E501


class TestTables:
    def test_by_hand(self):
        assert table(RECORD) == TABLE

    def test_lists_that_are_empty_or_missing_have_no_table(self):
        assert table({}) == table({"rows": [], "tunings": [], "steps": []}) == ""
        assert table({"steps": RECORD["steps"]}) == TABLE.split("\n\n")[-1]

    def test_a_field_that_is_not_known(self):
        with pytest.raises(TypeError, match="wrd_error"):
            table({"rows": [{"variant": "cif", "seed": 0, "wrd_error": 0.1}]})


class TestFigures:
    def test_a_panel_for_each_measure_that_is_there(self, tmp_path: Path):
        draw(RECORD, tmp_path / "all.svg")
        assert "<svg" in (tmp_path / "all.svg").read_text()
        draw(RECORD, tmp_path / "all.png")
        fewer = [{key: row.get(key) for key in ("variant", "seed", "cosine")} for row in RECORD["rows"]]
        draw({"rows": fewer}, tmp_path / "cosine.png")
        (tall, wide), (same, narrow) = (_size(tmp_path / name) for name in ("all.png", "cosine.png"))
        assert tall == same
        assert narrow < wide / 2

    def test_segments(self, tmp_path: Path):
        """As high as the tokens need, as long as the sentence, with colour where segments are."""
        rng = np.random.default_rng(0)
        spectrogram = rng.normal(size=(80, 400))
        tokens = ["vi", "díš", " to", "$x_1$", "oko"]
        cosines = [0.9, float("nan"), -0.1, 0.5, 0.2]
        short = {"column_seconds": 0.01, "title": "vidíš to $oko$"}
        draw_segments(
            tmp_path / "wide.png", spectrogram, 0.02, [40, 80, 80, 120, 190], tokens, cosines, **short
        )
        draw_segments(
            tmp_path / "narrow.png", spectrogram, 0.02, [100, 102, 104, 106, 108], tokens, cosines, **short
        )
        draw_segments(tmp_path / "short.png", spectrogram, 0.005, [], [], [])
        wide, narrow, small = (_size(tmp_path / f"{name}.png") for name in ("wide", "narrow", "short"))
        assert narrow[0] > wide[0] > small[0]
        assert narrow[1] == wide[1] > small[1]
        image = matplotlib.image.imread(tmp_path / "wide.png")[..., :3]
        coloured = (np.ptp(image, axis=2) > 0.3).mean(0)
        assert coloured[: image.shape[1] // 3].max() > 0.1  # bars and boundaries
        assert not coloured[-20:].any()

    def test_tokens_do_not_overlap(self):
        assert ssr_report._levels([0, 1, 2], [0.9, 0.9, 0.9]) == [0, 0, 0]
        assert ssr_report._levels([0, 0.1, 0.2, 1.2], [1, 1, 1, 1]) == [0, 1, 2, 0]
        assert ssr_report._levels([0, 0.1, 0.55], [0.2, 1, 0.2]) == [0, 1, 0]

    def test_lists_of_different_lengths(self, tmp_path: Path):
        with pytest.raises(ValueError, match="got 1, 2 and 1"):
            draw_segments(tmp_path / "x.png", np.zeros((2, 3)), 0.02, [1], ["a", "b"], [0.5])


def _size(path: Path) -> tuple[int, int]:
    height, width = matplotlib.image.imread(path).shape[:2]
    return height, width


class TestRecord:
    """What the documentation shows is what was recorded."""

    RECORD = json.loads((ROOT / "docs/ssr.json").read_text())
    PAGE = (ROOT / "docs/ssr.md").read_text()

    def test_the_page_has_the_tables(self):
        for line in ssr_report.table(self.RECORD).splitlines():
            assert line in self.PAGE

    def test_variants_seeds_and_tunings(self):
        rows = {(row["variant"], row["seed"]) for row in self.RECORD["rows"]}
        assert rows == {(variant.name, seed) for variant in ssr.VARIANTS for seed in range(3)}
        tunings = {(each["tuning"], each["seed"]) for each in self.RECORD["tunings"]}
        assert tunings == {(name, seed) for name in ssr.TUNINGS for seed in range(3)}
        assert {each["path"] for each in self.RECORD["steps"]} >= {"mmkernels"}
