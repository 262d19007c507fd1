"""The task of texts: tokens and places, the table of a language model, and the heads of the two stages."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language_models import TEXTS, WIDTH, tiny_language_model, tiny_model, tiny_tokenizer, vectors
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Model,
    LlamaModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from mmtransfer.data import DataError, synthetic, synthetic_speech
from mmtransfer.tasks import TASKS, Text, default_task, find_task
from mmtransfer.tasks.language import embedding_head
from mmtransfer.tasks.language.embedding_head import EmbeddingHead
from mmtransfer.tasks.language.model_head import LanguageModelHead
from mmtransfer.tasks.language.passages import Passages
from mmtransfer.tasks.language.source import read_outline
from mmtransfer.tasks.language.table import read_embedding_table
from mmtransfer.tasks.language.tokenizer import TextTokenizer
from mmtransfer.tasks.language.vectors import NOT_FINITE
from mmtransfer.tokens import PADDING, TokenLabels
from mmtransfer.training.finite import NotFiniteError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama, untied."""
    return tiny_language_model(tmp_path_factory.mktemp("lm") / "llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    """By kind, and tied or not."""
    root = tmp_path_factory.mktemp("lms")
    found = {"llama": folder}
    found["llama tied"] = tiny_language_model(root / "llama-tied", tied=True)
    found["gpt2"] = tiny_language_model(root / "gpt2", "gpt2", tied=True)
    found["gpt2 untied"] = tiny_language_model(root / "gpt2-untied", "gpt2")
    return found


ALL = ("llama", "llama tied", "gpt2", "gpt2 untied")


def task_of(folder: Path, **options: Any) -> Text:
    return Text(language_model=str(folder), **options)


def text_tokenizer(tokenizer: Tokenizer) -> TextTokenizer:
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), "it")


def words(*symbols: str) -> TextTokenizer:
    """Of words, with a token for the unknown."""
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, **{s: i + 1 for i, s in enumerate(symbols)}}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return text_tokenizer(tokenizer)


def byte_fallback() -> Tokenizer:
    """In the manner of Llama 2: a space in front, characters that are unknown as bytes."""
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrdk"]
    tokenizer = Tokenizer(
        models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


class TestOptions:
    def test_it_is_registered_behind_the_default(self) -> None:
        assert find_task("text") is Text
        assert TASKS["text"] is Text
        assert default_task("text").name == "ctc"

    def test_a_checkpoint_builds_it_again(self) -> None:
        task = Text(language_model="lm", stage=2, tuning="multitask", text="passages.txt", alphabet=" ab")
        assert Text(**json.loads(json.dumps(task.options()))) == task
        assert Text(language_model=Path("lm")).language_model == "lm"  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"language_model": ""}, "language_model must be a folder or a hub name, got ''"),
            ({"language_model": 3}, "language_model must be"),
            ({"stage": 3}, "stage must be at most 2, got 3"),
            ({"stage": 0}, "stage must be at least 1, got 0"),
            ({"stage": True}, "stage must be an integer"),
            ({"stage": "1"}, "stage must be an integer"),
            ({"template": "Text:"}, "template must be a text with <speech> once, got 'Text:'"),
            ({"template": "<speech><speech>"}, "template must be a text with <speech> once"),
            ({"template": None}, "template must be a text"),
            ({"stage": 2, "tuning": "full"}, "tuning must be one of vanilla, lora, multitask, got 'full'"),
            ({"tuning": "lora"}, "tuning is for stage 2"),
            ({"stage": 2, "tuning": "multitask"}, "text must be given for tuning multitask"),
            ({"stage": 2, "text": "a.txt"}, "text is for tuning multitask, got tuning 'vanilla'"),
            ({"stage": 2, "tuning": "multitask", "text": ""}, "text must be a file of plain text"),
            ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
            ({"lora_rank": 1.5}, "lora_rank must be an integer"),
            ({"lora_alpha": 0}, "lora_alpha must be positive, got 0"),
            ({"lora_alpha": math.nan}, "lora_alpha must be finite"),
            ({"text_share": 0}, "text_share must lie between 0 and 1, got 0"),
            ({"text_share": 1.0}, "text_share must lie between 0 and 1, got 1.0"),
            ({"text_share": "half"}, "text_share must be a number"),
            ({"cosine_weight": -1}, "cosine_weight must be finite and not negative, got -1"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
            ({"alphabet": "ba"}, "alphabet must be sorted characters, each once, got 'ba'"),
            ({"alphabet": "aa"}, "alphabet must be sorted characters"),
        ],
    )
    def test_each_wrong_value_is_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Text(**{"language_model": "lm", **options})

    def test_of_recordings(self, tmp_path: Path) -> None:
        recordings = synthetic_speech(train_clips=8, test_clips=2)
        task = Text.of(recordings, language_model="lm", stage=2)
        assert task.stage == 2
        assert task.alphabet == "".join(sorted(set("".join(clip.text or "" for clip in recordings.train))))
        with pytest.raises(ValueError, match="needs a language model; give --language-model"):
            Text.of(recordings)
        with pytest.raises(ValueError, match=r"options language_model, stage, .*, got speed"):
            Text.of(recordings, language_model="lm", speed=3)
        with pytest.raises(ValueError, match="the task text needs transcripts"):
            Text.of(synthetic(classes=2, train_clips=1, test_clips=1), language_model="lm")
        missing = tmp_path / "none.txt"
        with pytest.raises(DataError, match=r"text .*none.txt is no file"):
            Text.of(recordings, language_model="lm", stage=2, tuning="multitask", text=str(missing))

    def test_tokens_that_are_predicted_have_no_loss(self, folder: Path) -> None:
        task = task_of(folder)
        with pytest.raises(ValueError, match="the loss of the task text is that of its head"):
            task.loss(torch.zeros(1, 1), task.collate(["a"]), torch.tensor([1]))


class TestPlaces:
    @pytest.mark.parametrize(
        ("text", "ends"),
        [
            # "the", " cat", " sat": the space behind a token belongs to it.
            ("the cat sat", [4, 8, 11]),
            ("the  cat", [5, 5, 8]),
            ("the cat ", [4, 8, 8]),
            (" the", [4]),
            ("  the", [2, 5]),
            ("", []),
            ("the\n\ncat", None),
        ],
    )
    def test_ends_by_hand(self, text: str, ends: list[int] | None) -> None:
        tokenizer = TextTokenizer(tiny_tokenizer(), "it")
        ids, found = tokenizer.encode_with_ends(text)
        assert tokenizer.decode(ids) == text
        if ends is not None:
            assert found == ends
        assert found == sorted(found)
        assert not found or found[-1] == len(text)

    def test_what_no_token_has_belongs_to_the_one_before(self) -> None:
        """Accents that normalisation joins to their letters."""
        tokenizer = Tokenizer(models.BPE({each: index for index, each in enumerate("ab é")}, []))
        tokenizer.normalizer = normalizers.NFC()
        found = text_tokenizer(tokenizer)
        assert found.encode_with_ends("ae\u0301b")[1] == [1, 3, 4]
        assert found.encode_with_ends("ae\u0301")[1] == [1, 3]

    def test_bytes_of_a_character_share_its_end(self) -> None:
        """The tokenizer has seen no Czech: each letter with a mark is two bytes, two tokens."""
        tokenizer = TextTokenizer(tiny_tokenizer(), "it")
        ids, ends = tokenizer.encode_with_ends("kůň sat")
        assert len(ids) == len(ends)
        assert ends[:5] == [1, 2, 2, 4, 4]
        assert ends[-1] == 7
        assert tokenizer.decode(ids) == "kůň sat"
        for text in (*TEXTS, "€ 𝄞x"):
            ids, ends = tokenizer.encode_with_ends(text)
            assert (tokenizer.decode(ids), ends, ends[-1]) == (text, sorted(ends), len(text))

    def test_a_tokenizer_in_the_manner_of_llama_2(self) -> None:
        tokenizer = text_tokenizer(byte_fallback())
        # The space that the tokenizer adds has no character.
        assert tokenizer.encode_with_ends("kůň ho")[1] == [0, 1, 2, 2, 4, 4, 4, 5, 6]
        assert tokenizer.encode_with_ends(" k")[1] == [1, 1, 2]
        assert tokenizer.decode(tokenizer.encode("kůň ho")) == "kůň ho"

    def test_special_tokens_in_a_transcript_are_text(self) -> None:
        tokenizer = TextTokenizer(tiny_tokenizer(), "it")
        assert tokenizer.encode_template("a</s>")[-1] == tokenizer.eos == 1
        ids, ends = tokenizer.encode_with_ends("a</s>")
        assert min(ids) >= 3
        assert ends == [1, 2, 3, 4, 5]
        for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert other.encode("a</s>") == ids

    def test_settings_of_the_file_do_not_cut(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=8)
        found = TextTokenizer(tokenizer, "it")
        assert found.encode("the cat sat") == tiny_tokenizer()("the cat sat")["input_ids"]

    def test_collate(self, folder: Path) -> None:
        task = task_of(folder)
        texts = ["the cat", "", "kůň "]
        labels = TokenLabels.unpack(task.collate(texts))
        tokenizer = tiny_tokenizer()
        for row, text in enumerate(texts):
            count = int(labels.counts[row])
            assert labels.ids[row, :count].tolist() == tokenizer(text)["input_ids"]
            assert (labels.ids[row, count:] == PADDING).all()
            assert task.frames_needed(text) == count
            assert "".join(chr(c) for c in labels.characters[row].tolist() if c >= 0) == text
        assert labels.counts.tolist()[1] == 0
        assert TokenLabels.unpack(task.collate([""])).counts.tolist() == [0]

    def test_empty_and_unknown(self, folder: Path) -> None:
        task = task_of(folder)
        assert (task.is_empty(""), task.is_empty(" \n"), task.is_empty("ů")) == (True, True, False)
        assert task.unknown("ůx") == []
        tokenizer = words("ab", "c")
        assert tokenizer.unknown("ab xy c z") == ["x", "y", "z"]
        assert (tokenizer.is_empty("xy z"), tokenizer.is_empty("xy c")) == (True, False)

    def test_a_slow_tokenizer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="tokenizer of it is not a fast one"):
            TextTokenizer(mock.Mock(is_fast=False), "it")


class TestScores:
    def test_decode_and_sound(self, folder: Path) -> None:
        task = task_of(folder)
        ids = task._tokenizer.encode("the cat")
        rows = torch.full((3, len(ids)), PADDING)
        rows[0] = torch.tensor(ids)
        rows[2, 0] = NOT_FINITE
        assert task.decode(rows, torch.tensor([9, 9, 9])) == ["the cat", "", ""]
        assert task.sound(rows, torch.tensor([9, 9, 9])) == [True, True, False]
        # Special tokens are no text; a table may have more rows than the tokenizer has tokens.
        assert task.decode(torch.tensor([[0, ids[0], 1, 309]]), torch.tensor([4])) == ["the"]

    def test_rates(self, folder: Path) -> None:
        task = task_of(folder)
        targets = ["the cat sat", "the hat", " "]
        assert task.score(targets, targets) == {"wer": 0.0, "cer": 0.0, "ter": 0.0}
        found = task.score(["the rat sat", "", "what"], targets)
        assert found["wer"] == pytest.approx(3 / 5)
        assert found["cer"] == pytest.approx(8 / 18)
        tokens = [task._tokenizer.encode(text) for text in targets]
        changed = task._tokenizer.encode("the rat sat")
        wrong = sum(a != b for a, b in zip(changed, tokens[0], strict=True))
        assert wrong == 1
        assert found["ter"] == pytest.approx((1 + len(tokens[1])) / (len(tokens[0]) + len(tokens[1])))
        assert {task.metric.name, *(each.name for each in task.further)} == found.keys()

    def test_no_reference(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="all references are empty"):
            task_of(folder).score(["a"], [" "])


class TestTable:
    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("size", ["5GB", "20KB"])
    def test_it_is_read_without_building_the_model(self, tmp_path: Path, kind: str, size: str) -> None:
        name, _, tied = kind.partition(" ")
        model = tiny_language_model(tmp_path / "lm", name, tied=tied == "tied" or kind == "gpt2", size=size)
        assert (tmp_path / "lm/model.safetensors.index.json").exists() == (size == "20KB")
        expected = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=AssertionError):
            table = read_embedding_table(str(model))
        assert torch.equal(table, expected)

    def test_one_tensor_is_read(self, folder: Path) -> None:
        from mmtransfer.tasks.language import table

        opened: list[str] = []

        class Spied:
            def __init__(self, *args: Any) -> None:
                self.inner = safe_open(*args)

            def __enter__(self) -> Spied:
                self.file = self.inner.__enter__()
                return self

            def __exit__(self, *args: Any) -> None:
                self.inner.__exit__(*args)

            def keys(self) -> list[str]:
                return self.file.keys()

            def get_tensor(self, name: str) -> torch.Tensor:
                opened.append(name)
                return self.file.get_tensor(name)

        safe_open = table.safe_open
        with mock.patch.object(table, "safe_open", Spied):
            read_embedding_table(str(folder))
        assert opened == ["model.embed_tokens.weight"]

    def test_under_the_name_of_the_output(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path, tied=True)
        expected = self._rename(model, {"model.embed_tokens.weight": "lm_head.weight"})
        assert torch.equal(read_embedding_table(str(model)), expected)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_files_of_the_model_without_its_head(self, tmp_path: Path, kind: str) -> None:
        model = tiny_language_model(tmp_path, kind, tied=True)
        whole = AutoModelForCausalLM.from_pretrained(model)
        inner: Any = (GPT2Model if kind == "gpt2" else LlamaModel).from_pretrained(model)
        inner.save_pretrained(model)
        keys = load_file(model / "model.safetensors").keys()
        assert {"wte.weight", "embed_tokens.weight"} & keys
        assert torch.equal(read_embedding_table(str(model)), whole.get_input_embeddings().weight)

    def test_parts_that_the_files_name_in_another_way(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path)
        expected = self._rename(model, {"model.embed_tokens.weight": "language.embed_tokens.weight"})
        assert torch.equal(read_embedding_table(str(model)), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_its_own_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = tiny_language_model(tmp_path)
        tiny_model().to(dtype).save_pretrained(model)
        assert read_embedding_table(str(model)).dtype == dtype
        self._without_safetensors(model)
        assert read_embedding_table(str(model)).dtype == dtype

    def test_other_weights_than_safetensors(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path)
        expected = read_embedding_table(str(model))
        self._without_safetensors(model)
        assert torch.equal(read_embedding_table(str(model)), expected)

    def test_more_rows_than_the_configuration_says(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path)
        self._change(model, "model.embed_tokens.weight", lambda table: torch.cat([table, table[:10]]))
        assert read_embedding_table(str(model)).shape == (320, WIDTH)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t[:200], r"lm has 200 rows, and its tokenizer has ids up to 279"),
            (lambda t: t[:, :16], r"lm must be \(V, 32\) in float32.*, got \(310, 16\)"),
            (lambda t: t.round().to(torch.int8), r"lm must be .* torch.int8"),
            (lambda t: t.to(torch.float8_e4m3fn), r"lm must be .* torch.float8"),
            (lambda t: t.index_fill(0, torch.tensor([7]), math.nan), "lm has values that are not finite"),
            (lambda t: t.index_fill(0, torch.tensor([7]), math.inf), "lm has values that are not finite"),
            (None, "lm has no embedding table: its files have no tensor model.embed_tokens.weight"),
        ],
    )
    def test_tables_that_do_not_fit(self, tmp_path: Path, change: Any, message: str) -> None:
        model = tiny_language_model(tmp_path / "lm")
        self._change(model, "model.embed_tokens.weight", change)
        with pytest.raises(ValueError, match=message):
            read_embedding_table(str(model))

    def test_the_second_stage_takes_no_table_with_nan(self, tmp_path: Path) -> None:
        """It would be found after training alone, and blamed on that."""
        model = tiny_language_model(tmp_path / "lm")
        self._change(
            model, "model.embed_tokens.weight", lambda t: t.index_fill(0, torch.tensor([7]), math.nan)
        )
        with pytest.raises(ValueError, match="lm has values that are not finite"):
            head_of(model)

    def test_an_untied_output_is_not_taken_for_it(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path)
        self._change(model, "model.embed_tokens.weight", None)
        assert "lm_head.weight" in load_file(model / "model.safetensors")
        with pytest.raises(ValueError, match="no embedding table"):
            read_embedding_table(str(model))

    @pytest.mark.parametrize("kind", ["wav2vec2", "bert"])
    def test_other_models(self, tmp_path: Path, kind: str) -> None:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        if kind == "bert":
            model: Any = BertForMaskedLM(BertConfig(vocab_size=310, **small))
        else:
            model = Wav2Vec2Model(Wav2Vec2Config(**small, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,)))
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        for call in (read_embedding_table, lambda source: task_of(source).shape):
            with pytest.raises(ValueError, match=rf"of type {kind}.* no causal language model") as found:
                call(str(tmp_path))
            assert str(tmp_path) in str(found.value)

    def test_a_speech_model(self, tmp_path: Path) -> None:
        """It has no tokenizer, which is not what is wrong with it."""
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = Wav2Vec2Config(**small, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,))
        Wav2Vec2Model(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"of type wav2vec2.* no causal language model"):
            task_of(tmp_path).collate(["a"])

    def test_folders_with_faults(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere does not exist"):
            read_embedding_table(str(tmp_path / "nowhere"))
        with pytest.raises(DataError, match=r"it has no config\.json"):
            read_embedding_table(str(tmp_path))
        model = tiny_language_model(tmp_path / "lm", size="20KB")
        shards = sorted((tmp_path / "lm").glob("*.safetensors"))
        shards[0].unlink()
        with pytest.raises(DataError, match=f"{shards[0].name} is missing"):
            read_embedding_table(str(model))
        plain = tiny_language_model(tmp_path / "plain")
        (plain / "model.safetensors").write_bytes(b"\x00" * 30)
        with pytest.raises(DataError, match=r"model.safetensors"):
            read_embedding_table(str(plain))

    def test_from_the_hub(self, tmp_path: Path) -> None:
        """A hub name, whose files are in the cache: of the shards, the one with the table alone."""
        cache = tmp_path / "hub/models--me--lm"
        snapshot = cache / "snapshots" / ("0" * 40)
        tiny_language_model(snapshot, size="20KB")
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("0" * 40)
        expected = read_embedding_table(str(snapshot))
        index = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
        for shard in set(index.values()) - {index["model.embed_tokens.weight"]}:
            (snapshot / shard).unlink()
        code = """
        import sys, torch
        from mmtransfer.data import DataError
        from mmtransfer.tasks import Text
        from mmtransfer.tasks.language.table import read_embedding_table
        torch.save(read_embedding_table("me/lm"), sys.argv[1])
        print(Text(language_model="me/lm").shape["width"])
        try:
            read_embedding_table("me/other")
        except DataError as error:
            print(error)
        """
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "table.pt")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        width, message = done.stdout.splitlines()
        assert width == "32"
        assert message.startswith("no configuration of a language model can be read from me/other (")
        assert torch.equal(torch.load(tmp_path / "table.pt"), expected)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(DataError, match="no tokenizer can be loaded from"):
            read_embedding_table(str(tmp_path))

    @staticmethod
    def _change(model: Path, name: str, change: Any) -> None:
        tensors = load_file(model / "model.safetensors")
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old).contiguous()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    @staticmethod
    def _rename(model: Path, names: dict[str, str]) -> torch.Tensor:
        """The tensor that the first name had."""
        tensors = load_file(model / "model.safetensors")
        found = tensors[next(iter(names))].clone()
        renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
        save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
        return found

    @staticmethod
    def _without_safetensors(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        torch.save(tensors, model / "pytorch_model.bin")


class TestShape:
    def test_of_the_configuration(self, folders: dict[str, Path]) -> None:
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", side_effect=AssertionError):
            found = task_of(folders["llama"]).shape
            other = task_of(folders["gpt2"]).shape
        assert found == {"width": 32, "heads": 4, "key_heads": 2, "hidden": 48, "eps": 1e-6}
        assert other == {"width": 32, "heads": 4, "key_heads": 4, "hidden": 128, "eps": 1e-5}

    def test_the_outline_has_no_weights(self, folder: Path) -> None:
        assert all(each.is_meta for each in read_outline(str(folder)).model.parameters())


class TestFirstStage:
    @staticmethod
    def head(folder: Path, **options: Any) -> EmbeddingHead:
        head = task_of(folder, **options).head(WIDTH)
        assert isinstance(head, EmbeddingHead)
        return head

    def test_the_width_must_be_that_of_the_table(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"speech have 64 numbers .* language model 32"):
            task_of(folder).head(64)

    def test_a_checkpoint_has_nothing_of_it(self, folder: Path) -> None:
        head = self.head(folder)
        assert head.trained_tensors() == {}
        assert head.state_dict() == {}
        assert list(head.parameters()) == []
        assert head.to(torch.bfloat16).table.dtype == torch.bfloat16

    @pytest.mark.parametrize("weight", [5.0, 0.0])
    def test_loss_by_its_formula(self, folder: Path, weight: float) -> None:
        task = task_of(folder, cosine_weight=weight)
        head = task.head(WIDTH)
        texts = ["the cat", "", "kůň sat"]
        labels = task.collate(texts)
        tokens = TokenLabels.unpack(labels)
        frames, taps = vectors(tokens.counts.tolist())
        frames.requires_grad_()
        loss = head.loss(frames, taps, labels)
        rows = read_embedding_table(str(folder))[tokens.ids[tokens.ids >= 0]]
        squared = (frames - rows).square().sum(-1)
        cosine = F.cosine_similarity(frames, rows, dim=-1)
        expected = squared.mean() + weight * (1 - cosine).mean()
        torch.testing.assert_close(loss, expected)
        (found,) = torch.autograd.grad(loss, frames)
        (wanted,) = torch.autograd.grad(expected, frames)
        torch.testing.assert_close(found, wanted)
        measured = head.quality(frames, taps, labels)
        torch.testing.assert_close(measured[0], cosine)
        torch.testing.assert_close(measured[1], squared)

    def test_a_batch_without_tokens(self, folder: Path) -> None:
        task = task_of(folder)
        frames, taps = vectors([0, 0])
        frames.requires_grad_()
        loss = task.head(WIDTH).loss(frames, taps, task.collate(["", ""]))
        loss.backward()
        assert loss.item() == 0
        assert task.head(WIDTH)(frames, taps).shape == (2, 0)

    def test_one_vector_for_each_token(self, folder: Path) -> None:
        task = task_of(folder)
        frames, taps = vectors([2, 5])
        with pytest.raises(ValueError, match="utterance 1 of the batch: 5 vectors and 2 tokens"):
            task.head(WIDTH).loss(frames, taps, task.collate(["the cat", "the hat"]))

    def test_vectors_that_are_not_finite(self, folder: Path) -> None:
        task = task_of(folder)
        labels = task.collate(["the cat", "the cat"])
        frames, taps = vectors([2, 2])
        frames[3, 5] = math.nan
        head = task.head(WIDTH)
        with pytest.raises(NotFiniteError, match="utterance 1 of the batch"):
            head.loss(frames, taps, labels)
        ids = head(frames, taps)
        assert (ids[0] >= 0).all()
        assert (ids[1] == NOT_FINITE).all()
        assert task.sound(ids, taps.lengths) == [True, False]

    @pytest.mark.parametrize("block", [1 << 24, 4 * WIDTH * 7, 1])
    def test_the_nearest_row_in_blocks(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, block: int
    ) -> None:
        monkeypatch.setattr(embedding_head, "_BLOCK", block)
        head = self.head(folder)
        frames, taps = vectors([4, 0, 9])
        found = head(frames, taps)
        scores = F.cosine_similarity(frames[:, None], head.table[None], dim=-1)
        assert found[0, :4].tolist() + found[2].tolist() == scores.argmax(-1).tolist()
        assert found[0, 4:].tolist() == [PADDING] * 5
        assert (found[1] == PADDING).all()

    def test_autocast_rounds_no_score(self, folder: Path) -> None:
        head = self.head(folder)
        head.table = head.table[:1] + 1e-3 * torch.randn(
            200, WIDTH, generator=torch.Generator().manual_seed(1)
        )
        frames, taps = vectors([40])
        with torch.autocast("cpu", torch.bfloat16):
            found = head(frames, taps)
        assert torch.equal(found, head(frames, taps))

    def test_scores_stay_small(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedding_head, "_BLOCK", 512)
        sizes: list[int] = []
        plain = torch.Tensor.__matmul__

        def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            found = plain(left, right)
            sizes.append(found.numel())
            return found

        monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
        self.head(folder)(*vectors([40]))
        assert len(sizes) > 1
        assert max(sizes) <= 512

    def test_embeddings_themselves_are_decoded(self, folder: Path) -> None:
        task = task_of(folder)
        texts = ["the cat sat", "kůň"]
        labels = task.collate(texts)
        tokens = TokenLabels.unpack(labels)
        head = self.head(folder)
        frames, taps = vectors(tokens.counts.tolist())
        frames = 3 * head.table[tokens.ids[tokens.ids >= 0]]
        assert task.decode(head(frames, taps), taps.lengths) == texts
        cosine, _ = head.quality(frames, taps, labels)
        torch.testing.assert_close(cosine, torch.ones(len(frames)))

    def test_a_table_of_another_dtype(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path)
        tiny_model().to(torch.bfloat16).save_pretrained(model)
        task = task_of(model)
        labels = task.collate(["the cat"])
        frames, taps = vectors([2])
        head = self.head(model)
        wide = EmbeddingHead(WIDTH, head.table.float())
        torch.testing.assert_close(head.loss(frames, taps, labels), wide.loss(frames, taps, labels))
        assert torch.equal(head(frames, taps), wide(frames, taps))


TEMPLATE = "Hear: <speech> Write:"


def head_of(folder: Path, **options: Any) -> LanguageModelHead:
    head = task_of(folder, stage=2, **options).head(WIDTH)
    assert isinstance(head, LanguageModelHead)
    return head.eval()


def by_hand(head: LanguageModelHead, speech: torch.Tensor, text: str, template: str) -> torch.Tensor:
    """The sequence of an utterance, and the mean cross-entropy of its last tokens."""
    tokenizer = tiny_tokenizer()
    before, after = template.split("<speech>")
    bos = [] if before.startswith("<s>") else [0]
    texts = [tokenizer(part)["input_ids"] for part in (before, after, text)]
    table = head.model.get_input_embeddings().weight
    tail = [*texts[2], 1]
    rows = [table[[*bos, *texts[0]]], speech, table[texts[1]], table[tail]]
    logits = head.model(inputs_embeds=torch.cat(rows)[None]).logits[0]
    return F.cross_entropy(logits[-len(tail) - 1 : -1], torch.tensor(tail))


class TestSecondStage:
    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("template", ["<speech>", TEMPLATE, f"<s>{TEMPLATE}"])
    def test_loss_of_one_utterance(self, folders: dict[str, Path], kind: str, template: str) -> None:
        head = head_of(folders[kind], template=template)
        task = task_of(folders[kind])
        frames, taps = vectors([5])
        frames.requires_grad_()
        loss = head.loss(frames, taps, task.collate(["the cat sat"]))
        expected = by_hand(head, frames, "the cat sat", template)
        torch.testing.assert_close(loss, expected)
        (found,) = torch.autograd.grad(loss, frames)
        (wanted,) = torch.autograd.grad(expected, frames)
        torch.testing.assert_close(found, wanted)
        assert found.abs().sum() > 0

    @pytest.mark.parametrize("kind", ALL)
    def test_padding_changes_nothing(self, folders: dict[str, Path], kind: str) -> None:
        """The mean over all tokens of a batch; and each prediction, as of the utterance alone."""
        head, task = head_of(folders[kind], max_tokens=6), task_of(folders[kind])
        texts = ["the cat", "a rat sat on that hat", ""]
        counts = [7, 2, 3]
        frames, taps = vectors(counts)
        total = head.loss(frames, taps, task.collate(texts))
        tokens = [len(task._tokenizer.encode(text)) + 1 for text in texts]
        parts = frames.split(counts)
        alone = [
            head.loss(part, vectors([len(part)])[1], task.collate([text]))
            for part, text in zip(parts, texts, strict=True)
        ]
        weighted = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
        torch.testing.assert_close(total, weighted)
        found = head(frames, taps)
        for row, part in zip(found, parts, strict=True):
            single = head(part, vectors([len(part)])[1])[0]
            assert row[row >= 0].tolist() == single[single >= 0].tolist()

    @pytest.mark.parametrize("kind", ALL)
    def test_greedy_generation(self, folders: dict[str, Path], kind: str) -> None:
        """Against all of the sequence at each step, without a cache."""
        head = head_of(folders[kind], template=TEMPLATE, max_tokens=8)
        frames, taps = vectors([5, 3])
        found = head(frames, taps)
        tokenizer, table = tiny_tokenizer(), head.model.get_input_embeddings().weight
        before, after = (tokenizer(part)["input_ids"] for part in TEMPLATE.split("<speech>"))
        for row, speech in zip(found, frames.split([5, 3]), strict=True):
            rows = torch.cat([table[[0, *before]], speech, table[after]])
            ids: list[int] = []
            for _ in range(8):
                best = int(head.model(inputs_embeds=rows[None]).logits[0, -1].argmax())
                if best == 1:
                    break
                ids.append(best)
                rows = torch.cat([rows, table[best : best + 1]])
            assert ids
            assert row[row >= 0].tolist() == ids

    def test_generation_of_transformers(self, folder: Path) -> None:
        head = head_of(folder, max_tokens=8)
        model = AutoModelForCausalLM.from_pretrained(folder)
        frames, taps = vectors([5])
        rows = torch.cat([model.get_input_embeddings().weight[:1], frames])
        expected = model.generate(
            inputs_embeds=rows[None], attention_mask=torch.ones(1, 6), max_new_tokens=8, do_sample=False
        )
        found = head(frames, taps)
        assert found[found >= 0].tolist() == [index for index in expected[0].tolist() if index != 1]

    def test_settings_of_the_model_do_not_change_it(self, tmp_path: Path) -> None:
        """Instruction models ask for sampling, and name several tokens that end a turn."""
        model = tiny_language_model(tmp_path)
        frames, taps = vectors([5, 2])
        plain = head_of(model, max_tokens=8)(frames, taps)
        settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0, "eos_token_id": [1, 5]}
        (model / "generation_config.json").write_text(json.dumps(settings))
        head = head_of(model, max_tokens=8)
        assert head.model.generation_config.eos_token_id == [1, 5]
        head.model.generation_config.eos_token_id = [1]
        assert torch.equal(head(frames, taps), plain)
        # The first token of the first utterance as one that ends.
        head.model.generation_config.eos_token_id = [1, int(plain[0, 0])]
        assert (head(frames, taps)[0] == PADDING).all()

    def test_max_tokens_and_positions(self, folder: Path) -> None:
        frames, taps = vectors([5])
        found = head_of(folder, max_tokens=3)(frames, taps)
        assert found.shape[1] <= 3
        task = task_of(folder)
        head = head_of(folder)
        assert head(*vectors([60])).shape[1] <= 64 - 61
        with pytest.raises(
            ValueError, match=r"row 1 of the batch has 63 vectors .* its text no room in the 64"
        ):
            head(*vectors([5, 63]))
        with pytest.raises(ValueError, match=r"row 0 .* 61 vectors .* its transcript and EOS no room"):
            head.loss(*vectors([61]), task.collate(["the cat"]))

    def test_a_long_row_does_not_cut_another_short(self, folder: Path) -> None:
        head = head_of(folder)
        alone = head(*vectors([5]))
        assert alone.shape[1] > 3
        frames, taps = vectors([5, 60])
        together = head(frames, taps)
        width = alone.shape[1]
        assert torch.equal(together[:1, :width], alone)
        assert (together[0, width:] == PADDING).all()
        assert (together[1, 3:] == PADDING).all()

    def test_without_bos(self, tmp_path: Path) -> None:
        """The first token of an utterance without vectors has nothing to be predicted from."""
        model = tiny_language_model(tmp_path, bos=False)
        head, task = head_of(model, max_tokens=4), task_of(model)
        frames, taps = vectors([0, 3])
        found = head(frames, taps)
        assert (found[0] == PADDING).all()
        assert found[1, 0] >= 0
        assert (head(*vectors([0])) == PADDING).all()
        assert head.loss(frames, taps, task.collate(["the cat", "the"])).isfinite()
        loss = head.loss(*vectors([0]), task.collate([""]))
        assert loss.item() == 0

    def test_values_that_are_not_finite(self, folder: Path) -> None:
        head, task = head_of(folder, max_tokens=4), task_of(folder)
        frames, taps = vectors([2, 3])
        clean = head(frames, taps)
        frames[1, 0] = math.inf
        with pytest.raises(NotFiniteError, match="utterance 0 of the batch"):
            head.loss(frames, taps, task.collate(["a", "b"]))
        found = head(frames, taps)
        assert task.sound(found, taps.lengths) == [False, True]
        assert found[1][found[1] >= 0].tolist() == clean[1][clean[1] >= 0].tolist()
        with torch.no_grad():
            head.model.lm_head.weight[5] = math.nan
        assert task.sound(head(*vectors([2, 3])), taps.lengths) == [False, False]

    def test_speech_has_the_scale_of_the_rows(self, tmp_path: Path) -> None:
        """Gemma multiplies embeddings by the square root of the width, and takes vectors as they are."""
        config = Gemma3TextConfig(
            vocab_size=310,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=16,
        )
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        head, task = head_of(tmp_path), task_of(tmp_path)
        ids = task._tokenizer.encode("the cat")
        _, taps = vectors([len(ids)])
        table = read_embedding_table(str(tmp_path))
        loss = head.loss(table[ids], taps, task.collate(["the hat"]))
        tail = [*task._tokenizer.encode("the hat"), 1]
        logits = head.model(input_ids=torch.tensor([[0, *ids, *tail]])).logits[0]
        expected = F.cross_entropy(logits[-len(tail) - 1 : -1], torch.tensor(tail))
        torch.testing.assert_close(loss, expected)

    def test_no_eos(self, tmp_path: Path) -> None:
        model = tiny_language_model(tmp_path, eos=False)
        with pytest.raises(ValueError, match=r"has no token for the end of a text \(EOS\)"):
            head_of(model)

    def test_models_that_do_not_fit(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"speech have 64 numbers .* language model 32"):
            task_of(folder, stage=2).head(64)
        small = tiny_language_model(tmp_path / "small", rows=270)
        with pytest.raises(ValueError, match="has 270 rows, and its tokenizer has ids up to 279"):
            head_of(small)
        # Its output weights would be drawn at random.
        headless = tiny_language_model(tmp_path / "headless")
        LlamaModel.from_pretrained(headless).save_pretrained(headless)
        with pytest.raises(DataError, match=r"lacks 1 weights of its language model \(lm_head.weight\)"):
            head_of(headless)

    def test_dropout_is_the_configuration_s(self, folders: dict[str, Path]) -> None:
        frames, taps = vectors([4])
        for kind, same in (("llama", True), ("gpt2", False)):
            head, task = head_of(folders[kind]).train(), task_of(folders[kind])
            labels = task.collate(["the cat"])
            losses = [head.loss(frames, taps, labels).item() for _ in range(2)]
            assert (losses[0] == losses[1]) == same


def train(head: LanguageModelHead, task: Text, texts: list[str], steps: int, rate: float) -> list[float]:
    frames, taps = vectors([3] * len(texts))
    labels = task.collate(texts)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=rate)
    losses = []
    head.train()
    for _ in range(steps):
        loss = head.loss(frames, taps, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head.eval()
    return losses


class TestTuning:
    @pytest.mark.parametrize("kind", ALL)
    def test_vanilla_learns_four_utterances(self, folders: dict[str, Path], kind: str) -> None:
        head, task = head_of(folders[kind], max_tokens=16), task_of(folders[kind])
        texts = ["the cat", "the hat", "a rat sat", "on that mat"]
        for module in head.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses = train(head, task, texts, 80, 5e-3)
        assert losses[-1] < 0.1 < losses[0]
        frames, taps = vectors([3] * 4)
        assert task.decode(head(frames, taps), taps.lengths) == texts

    @pytest.mark.parametrize("kind", ALL)
    def test_tensors_of_a_checkpoint(self, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
        head, task = head_of(folders[kind]), task_of(folders[kind])
        tied = kind in ("llama tied", "gpt2")
        tensors = head.trained_tensors()
        expected = set(head.state_dict()) - ({"model.lm_head.weight"} if tied else set())
        assert set(tensors) == expected
        assert all(tensor.is_leaf for tensor in tensors.values())
        train(head, task, ["the cat"], 2, 1e-2)
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "t.safetensors")
        other = head_of(folders[kind])
        with torch.no_grad():
            for name, tensor in load_file(tmp_path / "t.safetensors").items():
                other.trained_tensors()[name].copy_(tensor)
        frames, taps = vectors([4])
        labels = task.collate(["the mat"])
        assert torch.equal(other.loss(frames, taps, labels), head.loss(frames, taps, labels))

    @pytest.mark.parametrize("kind", ALL)
    def test_lora_leaves_the_weights_as_they_are(self, folders: dict[str, Path], kind: str) -> None:
        head, task = head_of(folders[kind], tuning="lora", lora_rank=4, lora_alpha=32), task_of(folders[kind])
        names = {name for name, each in head.named_parameters() if each.requires_grad}
        assert names == set(head.trained_tensors())
        assert names
        assert all("lora_" in name for name in names)
        assert all(min(each.shape) == 4 for each in head.trained_tensors().values())
        before = copy.deepcopy(head.state_dict())
        frames, taps = vectors([3])
        labels = task.collate(["the cat"])
        # An update starts as zero.
        plain = head_of(folders[kind])
        assert torch.equal(head.loss(frames, taps, labels), plain.loss(frames, taps, labels))
        losses = train(head, task, ["the cat", "the hat"], 12, 2e-2)
        assert losses[-1] < losses[0]
        after = head.state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved
        assert moved <= names
        frames.requires_grad_()
        head.loss(frames, taps, labels).backward()
        assert frames.grad is not None

    def test_lora_of_an_unknown_type(self, folder: Path) -> None:
        from peft.tuners.lora import model as lora

        known = lora.LoraModel.target_module_mapping
        rest = {name: value for name, value in known.items() if name != "llama"}
        with (
            mock.patch.object(lora.LoraModel, "target_module_mapping", rest),
            pytest.raises(ValueError, match=r"no projections for a model of type llama"),
        ):
            head_of(folder, tuning="lora")

    def test_lora_without_peft(self, folder: Path) -> None:
        with (
            mock.patch("importlib.util.find_spec", return_value=None),
            pytest.raises(ImportError, match="tuning lora needs peft"),
        ):
            head_of(folder, tuning="lora")

    @pytest.mark.parametrize("kind", ["llama", "llama tied"])
    def test_multitask_mixes_two_losses(self, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
        passages = tmp_path / "passages.txt"
        passages.write_text("the cat sat on the mat\n\n  \na rat\n", encoding="utf-8")
        options = {"tuning": "multitask", "text": str(passages), "text_share": 0.25}
        head, task = head_of(folders[kind], **options), task_of(folders[kind])
        frames, taps = vectors([3, 2])
        labels = task.collate(["the cat", "the hat"])
        speech = head.loss(frames, taps, labels)
        assert torch.equal(speech, head_of(folders[kind]).loss(frames, taps, labels))
        head.train()
        torch.manual_seed(3)
        mixed = head.loss(frames, taps, labels)
        torch.manual_seed(3)
        assert torch.equal(head.loss(frames, taps, labels), mixed)
        torch.manual_seed(3)
        drawn = Passages(str(passages)).draw(2)
        total, count = torch.zeros(()), 0
        for line in drawn:
            ids = torch.tensor([[0, *task._tokenizer.encode(line), 1]])
            logits = head.model(input_ids=ids).logits[0, :-1]
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            count += ids.shape[1] - 1
        torch.testing.assert_close(mixed, 0.75 * speech + 0.25 * total / count)
        assert set(head.trained_tensors()) == set(head_of(folders[kind]).trained_tensors())
        losses = train(head, task, ["the cat", "the hat"], 60, 5e-3)
        assert losses[-1] < 0.3 * losses[0]
        assert head.perplexity(["the cat sat on the mat", "a rat"]) < 3

    def test_passages(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_text("a\nb\n\nc\n")
        torch.manual_seed(0)
        drawn = Passages(str(path)).draw(50)
        assert set(drawn) == {"a", "b", "c"}
        torch.manual_seed(0)
        assert Passages(str(path)).draw(50) == drawn
        path.write_text("\n \n")
        with pytest.raises(DataError, match="is empty; it needs a passage a line"):
            Passages(str(path)).draw(1)
        path.write_bytes(b"\xff\xfe\xff")
        with pytest.raises(DataError, match="give a file in UTF-8"):
            Passages(str(path)).draw(1)
        with pytest.raises(DataError, match="cannot be read"):
            Passages(str(tmp_path / "none")).draw(1)

    def test_to_predict_needs_no_passages(self, folder: Path, tmp_path: Path) -> None:
        head = head_of(folder, tuning="multitask", text=str(tmp_path / "gone.txt"), max_tokens=2)
        assert head(*vectors([3])).shape[0] == 1

    def test_long_passages_are_cut(self, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "long.txt"
        path.write_text("the cat " * 200)
        head = head_of(folder, tuning="multitask", text=str(path), max_tokens=10).train()
        loss = head.loss(*vectors([3]), task_of(folder).collate(["the cat"]))
        assert loss.isfinite()


class TestPerplexity:
    @pytest.mark.parametrize("kind", ALL)
    def test_by_its_definition(self, folders: dict[str, Path], kind: str) -> None:
        head, task = head_of(folders[kind]).train(), task_of(folders[kind])
        texts = [*TEXTS[:3], "", "a", *["the rat"] * 6]
        found = head.perplexity(texts)
        assert head.training
        head.eval()
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([[0, *task._tokenizer.encode(text)]])
            if ids.shape[1] > 1:
                logits = head.model(input_ids=ids).logits[0, :-1]
                total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                count += ids.shape[1] - 1
        assert found == pytest.approx(math.exp(total / count), rel=1e-4)

    def test_of_nothing(self, folder: Path) -> None:
        head = head_of(folder)
        for texts in ([], [""]):
            with pytest.raises(ValueError, match="no token that is predicted"):
                head.perplexity(texts)

    def test_a_text_longer_than_the_positions(self, folder: Path) -> None:
        assert math.isfinite(head_of(folder).perplexity(["the cat " * 100]))


def test_a_copied_folder_gives_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    task = task_of(tmp_path / "copy")
    assert torch.equal(task.collate(["the cat"]), task_of(folder).collate(["the cat"]))
    assert dataclasses.replace(task, language_model=str(folder)) == task_of(folder)
