"""SSR-Connector as a method: both stages from the command line, checkpoints, combinations, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Result, fails, run
from finetune_data import finetune, json_lines, results, write_model, write_speech
from tiny_encoders import TINY
from tiny_language_models import TEXTS, tiny_language_model

import mmtransfer
from mmtransfer import AdaptedModel, registry
from mmtransfer.ssr.eager import EagerConnector
from mmtransfer.tasks import CTC, Classification, Text
from mmtransfer.training.finite import NotFiniteError

SMALL = ("--set", "depth=2", "hidden=40")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speech model, transcribed recordings, a language model, and a CTC model of the speech model."""
    folder = tmp_path_factory.mktemp("ssr")
    write_model(folder / "model")
    write_speech(folder / "clips")
    tiny_language_model(folder / "language")
    done = finetune(folder / "ctc", *source(folder, "hff-b"), "--task", "ctc", "--epochs", "4")
    assert done.code == 0, done
    return folder


def source(folder: Path, method: str = "ssr") -> list[Any]:
    return ["--method", method, "--model", folder / "model", "--data", folder / "clips/speech.jsonl"]


def stage(number: int, output: Path, place: Path, *more: Any, model: str = "ctc") -> Result:
    language = () if "--language-model" in more else ("--language-model", place / "language")
    begun = "--begin-with" in more
    aligner = () if begun or not model else (f"aligner_model={place / model}",)
    return finetune(output, *source(place), *language, "--stage", str(number), *more, *SMALL, *aligner)


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    done = stage(1, place / "first", place, "--epochs", "3")
    assert done.code == 0, done
    return place / "first"


class TestStages:
    def test_the_first_draws_vectors_to_embeddings(self, place: Path, first: Path) -> None:
        record = results(first)
        assert record["task"] == {"name": "text", "metric": "wer", "title": "Word error"}
        assert record["test"].keys() == {"wer", "cer", "ter"}
        losses = [point["scores"]["cer"] for point in record["curve"]]
        assert len(losses) == 3
        # Errors of nearest texts do not say which weights are best.
        assert record["validation"] is None
        weights = json.loads((first / "config.json").read_text())
        # Neither the table nor the language model is in the checkpoint, and the aligner is.
        from safetensors import safe_open

        with safe_open(first / "model.safetensors", "pt") as file:
            names = list(file.keys())
        assert all(name.startswith("readout.") for name in names)
        assert any(name.startswith("readout.aligner.head.") for name in names)
        assert "aligner_model" not in weights["options"]["ssr"]
        assert weights["options"]["ssr"]["width"] == 32

    def test_predict_and_evaluate(self, place: Path, first: Path) -> None:
        done = run("predict", first, place / "clips", "--json", "--cpu")
        assert done.code == 0, done
        rows = json_lines(done.stdout)
        assert len(rows) == 24
        assert all(isinstance(row["text"], str) for row in rows)
        scored = run("evaluate", first, "--data", place / "clips/speech.jsonl", "--cpu")
        assert scored.code == 0, scored

    def test_a_checkpoint_needs_no_folder_of_the_aligner(self, first: Path) -> None:
        model = mmtransfer.load(first)
        assert model.readout.aligner.task.name == "ctc"
        inputs = torch.randn(2, 16000)
        torch.testing.assert_close(model(input_values=inputs).logits, mmtransfer.load(first)(inputs).logits)

    @pytest.mark.parametrize("tuning", ["vanilla", "lora", "multitask"])
    def test_the_second_begins_with_it(self, place: Path, first: Path, tuning: str, tmp_path: Path) -> None:
        options = [f"text.tuning={tuning}", "frozen=true", "text.template=hear <speech> write "]
        if tuning == "multitask":
            (tmp_path / "text.txt").write_text("\n".join(TEXTS))
            options.append(f"text.text={tmp_path / 'text.txt'}")
        done = stage(2, tmp_path / "second", place, "--begin-with", first, "--set", *options)
        assert done.code == 0, done
        before, after = mmtransfer.load(first), mmtransfer.load(tmp_path / "second")
        assert after.method.frozen
        own = after.readout.state_dict()
        assert own.keys() == before.readout.state_dict().keys()
        for name, tensor in before.readout.state_dict().items():
            assert torch.equal(tensor, own[name]), name
        predicted = run("predict", tmp_path / "second", place / "clips/test0.wav", "--cpu")
        assert predicted.code == 0, predicted
        assert predicted.stdout.count("\t") == 1

    def test_the_second_may_train_the_connector(self, place: Path, first: Path, tmp_path: Path) -> None:
        done = stage(2, tmp_path / "second", place, "--begin-with", first)
        assert done.code == 0, done
        before, after = (mmtransfer.load(folder).readout for folder in (first, tmp_path / "second"))
        changed = {
            name.split(".")[0]
            for name, tensor in before.state_dict().items()
            if not torch.equal(tensor, after.state_dict()[name])
        }
        assert changed == {"connector"}

    def test_a_pair_begins_with_its_own_first_stage(self, place: Path, tmp_path: Path) -> None:
        """Not with the readout that a pair is otherwise started from."""
        for number, more in ((1, ()), (2, ("--begin-with", tmp_path / "1", "--set", "frozen=true"))):
            aligner = (f"aligner_model={place / 'ctc'}",) if number == 1 else ()
            done = finetune(
                tmp_path / str(number), *source(place, "ssr+lora"), "--language-model", place / "language",
                "--stage", str(number), "--epochs", "1", *more, *SMALL, *aligner,
            )  # fmt: skip
            assert done.code == 0, done
        before, after = (mmtransfer.load(tmp_path / name) for name in "12")
        own = after.readout.state_dict()
        for name, tensor in before.readout.state_dict().items():
            assert torch.equal(tensor, own[name]), name
        assert any(
            not torch.equal(tensor, after.trained_tensors()[name])
            for name, tensor in before.trained_tensors().items()
            if name.startswith("encoder.")
        )

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_killed_run_goes_on(
        self, place: Path, first: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        more = ["--epochs", "3", *(["--begin-with", first] if number == 2 else [])]
        whole = stage(number, tmp_path / "whole", place, *more)
        assert whole.code == 0, whole
        from mmtransfer.training import loop

        real, calls = loop.save_trained, []

        def killed(model: Any, folder: Path) -> None:
            real(model, folder)
            calls.append(folder)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "save_trained", killed)
        assert stage(number, tmp_path / "cut", place, *more).code == 130
        monkeypatch.undo()
        again = stage(number, tmp_path / "cut", place, *more, "--resume")
        assert again.code == 0, again
        assert results(tmp_path / "cut")["test"] == results(tmp_path / "whole")["test"]
        own, other = (mmtransfer.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
        assert all(torch.equal(own[name], other[name]) for name in own)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ((), "has task.options.tuning 'lora', not 'vanilla'; resume it as it began"),
            (("text.tuning=lora", "text.lora_rank=4"), "has task.options.lora_rank 8, not 4"),
            (("text.tuning=lora", "dropout=0.1"), "has options.ssr.dropout 0.0, not 0.1"),
        ],
    )
    def test_a_run_does_not_go_on_with_other_options(
        self,
        place: Path,
        first: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        more: tuple[str, ...],
        message: str,
    ) -> None:
        from mmtransfer.training.run import Run

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Run, "train", killed)
        begin = ("--begin-with", first)
        output = tmp_path / "out"
        assert stage(2, output, place, *begin, "--set", "text.tuning=lora").code == 130
        chosen = ("--set", *more) if more else ()
        done = stage(2, output, place, *begin, "--resume", *chosen)
        assert done.code == 1
        assert message in done.stderr


class TestVariants:
    @pytest.mark.parametrize(
        "options",
        [
            ["pooling=mean"],
            ["attention=causal"],
            ["lookback=0"],
            ["dropout=0.1"],
            ["aligner=fixed", "frames_per_token=4"],
            ["aligner=cif"],
            ["fusion=hff-b"],
            ["layer=1"],
            ["textless=true"],
        ],
        ids=lambda options: options[0],
    )
    def test_both_stages(self, place: Path, tmp_path: Path, options: list[str]) -> None:
        textless = "textless" in options[0]
        if not textless:
            done = stage(1, tmp_path / "1", place, "--epochs", "1", "--set", *options)
            assert done.code == 0, done
        begin = () if textless else ("--begin-with", tmp_path / "1")
        done = stage(2, tmp_path / "2", place, "--epochs", "1", *begin, "--set", *options)
        assert done.code == 0, done
        assert run("predict", tmp_path / "2", place / "clips/test0.wav", "--cpu").code == 0

    def test_unity2_is_scored_with_the_text(self, place: Path, tmp_path: Path) -> None:
        done = stage(1, tmp_path / "1", place, "--set", "aligner=unity2", "aligner_width=16", model="")
        assert done.code == 0, done
        assert any("known from the transcript" in note for note in results(tmp_path / "1")["notes"])
        said = run("predict", tmp_path / "1", place / "clips/test0.wav", "--cpu")
        fails(said, "the aligner unity2 needs the text")
        fails(
            run(
                "compare", "--methods", "ssr+lora", "--task", "ctc", "--model", place / "model", "--data",
                place / "clips/speech.jsonl", "--output", tmp_path / "2", "--set", "aligner=unity2",
            ),
            "ssr+lora cannot be scored",
        )  # fmt: skip

    def test_unity2_learns_with_the_connector(self, place: Path) -> None:
        from mmtransfer.encoders.loading import load_model

        task = Text(language_model=str(place / "language"), alphabet="abcde")
        model = AdaptedModel(
            load_model(str(place / "model")), "ssr", task, aligner="unity2", aligner_width=16, depth=1
        ).train()
        assert model.method.alphabet == "abcde"
        inputs, labels = torch.randn(2, 24000), task.collate(["abc de", "ab"])
        losses = []
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 3e-3)
        for _ in range(12):
            loss = model(input_values=inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(parameter.grad is not None for parameter in model.readout.aligner.parameters())


def build(place: Path, method: str = "ssr", number: int = 1, **options: Any) -> AdaptedModel:
    from mmtransfer.encoders.loading import load_model

    task = Text(language_model=str(place / "language"), stage=number)
    options = {"aligner_model": str(place / "ctc"), "depth": 1, "hidden": 40, **options}
    return AdaptedModel(load_model(str(place / "model")), method, task, **options)


def batch(model: AdaptedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "input_values": torch.randn(2, 24000),
        "attention_mask": (torch.arange(24000) < torch.tensor([[24000], [16000]])).long(),
        "labels": model.task.collate(["abc de a", "ab e"]),
    }


class TestModel:
    def test_the_baseline_is_the_same(self, place: Path) -> None:
        model = build(place).train()
        twin = model.method.baseline(model)
        assert twin is not None
        assert isinstance(twin.readout.connector, EagerConnector)
        own, theirs = (each(**batch(model)).loss for each in (model, twin))
        torch.testing.assert_close(own, theirs)

    def test_the_language_model_is_not_built_in_the_first_stage(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoModelForCausalLM

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
        build(place)

    def test_vectors_begin_with_the_scale_of_the_embeddings(self, place: Path) -> None:
        for matched in (True, False):
            model = build(place, match_scale=matched)
            found = model.compress(model.encoder(**{k: v for k, v in batch(model).items() if k != "labels"}))
            size, expected = (
                each.float().square().mean().sqrt() for each in (found.frames, model.head.table)
            )
            assert (abs(size / expected - 1) < 1e-3) == matched

    def test_prediction_does_not_see_the_labels(self, place: Path) -> None:
        from mmtransfer.training.caching import CachedInputs
        from mmtransfer.training.loop import predict
        from mmtransfer.training.settings import Training

        model = build(place).eval()
        seen: list[Any] = []
        compress = model.readout.compress
        model.readout.compress = lambda taps, labels: (seen.append(labels), compress(taps, labels))[1]
        given = batch(model)
        length, targets = 24000, ["abc de a", "ab e"]
        inputs = CachedInputs(
            list(given["input_values"]),
            [length, 16000],
            targets,
            model.task,
            main_input="input_values",
            time_dim=0,
        )
        predict(model, inputs, inputs.collate, Training(cpu=True))
        assert seen == [None]

    def test_a_row_alone_has_the_same_vectors(self, place: Path) -> None:
        model = build(place).eval()
        given = batch(model)
        labels = given.pop("labels")
        together = model.compress(model.encoder(**given), labels)
        alone = model.compress(model.encoder(given["input_values"][1:, :16000]), labels[1:])
        first = int(together.taps.lengths[0])
        torch.testing.assert_close(together.frames[first:], alone.frames, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize("number", [1, 2])
    def test_recomputed_layers_give_the_same_gradients(self, place: Path, number: int) -> None:
        found = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = build(place, number=number, depth=2).train()
            if recompute:
                model.gradient_checkpointing_enable()
                assert model.is_gradient_checkpointing
            model(**batch(model)).loss.backward()
            found.append(
                {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
            )
            if recompute:
                model.gradient_checkpointing_disable()
                assert not model.is_gradient_checkpointing
        assert found[0].keys() == found[1].keys()
        assert any("connector" in name for name in found[0])
        for name, grad in found[0].items():
            torch.testing.assert_close(grad, found[1][name], msg=name)

    @pytest.mark.parametrize("aligner", ["ctc", "unity2", "cif", "fixed"])
    @pytest.mark.parametrize("number", [1, 2])
    def test_under_autocast(self, place: Path, number: int, aligner: str) -> None:
        options = {} if aligner == "ctc" else {"aligner_model": None, "aligner": aligner}
        model = build(place, number=number, aligner_width=16, **options).train()
        given = batch(model)
        plain = model(**given).loss.item()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**given).loss
        loss.backward()
        assert loss.item() == pytest.approx(plain, rel=0.1)
        assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in model.parameters())

    def test_a_language_model_that_was_moved(self, place: Path, first: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(first, tmp_path / "first")
        config = json.loads((tmp_path / "first/config.json").read_text())
        config["task"]["options"]["language_model"] = "/nowhere"
        (tmp_path / "first/config.json").write_text(json.dumps(config))
        clip = place / "clips/test0.wav"
        fails(run("predict", tmp_path / "first", clip, "--cpu"), "/nowhere")
        moved = run("predict", tmp_path / "first", clip, "--language-model", place / "language", "--cpu")
        assert moved.stdout == run("predict", first, clip, "--cpu").stdout
        assert moved.stdout
        fails(
            run("predict", place / "ctc", clip, "--language-model", place / "language", "--cpu"),
            "the task ctc has no language model",
        )

    def test_any_task_may_follow(self, place: Path) -> None:
        from mmtransfer.encoders.loading import load_model

        for task in (Classification(num_labels=2), CTC(vocabulary=("", "a", "b"))):
            model = AdaptedModel(
                load_model(str(place / "model")), "ssr", task, aligner_model=str(place / "ctc"), depth=1
            )
            assert model.readout.out_dim == 16
            logits = model(input_values=torch.randn(2, 24000)).logits
            assert logits.isfinite().all()

    def test_without_a_task_the_vectors_are_the_output(self, place: Path) -> None:
        from mmtransfer.encoders.loading import load_model

        model = AdaptedModel(
            load_model(str(place / "model")), "ssr", aligner="fixed", depth=1, width=24, heads=3
        )
        out = model(input_values=torch.randn(2, 24000))
        assert out.last_hidden_state.shape == (2, int(out.lengths.max()), 24)

    def test_four_methods_in_one_model(self, place: Path) -> None:
        """HFF-b's taps are SSR's features, over adapters of AAT and merged attention with learnt shares."""
        encoder = TINY["wav2vec2"].build(num_feat_extract_layers=2, layerdrop=0.0, mask_time_prob=0.0)
        torch.manual_seed(0)
        task = Text(language_model=str(place / "language"))
        model = AdaptedModel(
            encoder,
            "ssr+l-mam+aat-ms",
            task,
            aligner="cif",
            fusion="hff-b",
            depth=2,
            hidden=40,
            source=TINY["bert"].build(),
            initial=0.1,
        ).train()
        names = dict(model.named_parameters())
        trained = {name for name, parameter in names.items() if parameter.requires_grad}
        parts = ("adapter", ".lam", "readout.features", "readout.connector", "readout.aligner")
        for part in parts:
            assert any(part in name for name in trained), (part, sorted(trained))
        before = {name: names[name].detach().clone() for name in trained}
        optimizer = torch.optim.AdamW((names[name] for name in trained), 1e-2)
        labels = task.collate(["abc de", "ab"])
        losses = []
        for _ in range(8):
            loss = model(
                input_values=torch.randn(2, 800, generator=torch.Generator().manual_seed(0)), labels=labels
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        moved = {name for name in trained if not torch.equal(before[name], names[name])}
        for part in parts:
            assert any(part in name for name in moved), part


class TestWrongInput:
    def test_patience_in_the_first_stage(self, place: Path, tmp_path: Path) -> None:
        fails(
            stage(1, tmp_path / "1", place, "--patience", "2"),
            "patience needs a score that tells when to stop",
        )

    def test_no_aligner_model(self) -> None:
        with pytest.raises(ValueError, match="the aligner ctc needs aligner_model"):
            registry.find("ssr", aligner="ctc")

    @pytest.mark.parametrize("lookback", [-1, 2])
    def test_lookback(self, lookback: int) -> None:
        with pytest.raises(ValueError, match="lookback must be"):
            registry.find("ssr", lookback=lookback)

    def test_an_aligner_that_is_none(self, place: Path, tmp_path: Path) -> None:
        fails(stage(1, tmp_path / "1", place, model="nowhere"), "config.json")
        done = finetune(tmp_path / "tuned", *source(place, "bitfit"), "--task", "ctc")
        assert done.code == 0, done
        with pytest.raises(ValueError, match="trained by bitfit, which changes its encoder"):
            registry.find("ssr", aligner_model=str(tmp_path / "tuned"))

    def test_an_aligner_that_compresses(self, place: Path, tmp_path: Path) -> None:
        options = ("--task", "ctc", "--epochs", "1", "--set", "aligner=cif", "depth=1")
        done = finetune(tmp_path / "ctc", *source(place), *options)
        assert done.code == 0, done
        with pytest.raises(ValueError, match="trained by ssr, which has no logits of frames"):
            build(place, aligner_model=str(tmp_path / "ctc"))

    def test_an_aligner_of_another_encoder(self, place: Path) -> None:
        task = Text(language_model=str(place / "language"))
        with pytest.raises(ValueError, match="trained on an encoder of model_type 'wav2vec2'"):
            AdaptedModel(TINY["hubert"].build(), "ssr", task, aligner_model=str(place / "ctc"))

    def test_a_fusion_that_changes_the_encoder(self, place: Path) -> None:
        for name in ("aat-ms", "ssr"):
            with pytest.raises(ValueError, match="fusion must be a method with a readout alone"):
                build(place, fusion=name)

    def test_a_width_that_is_not_the_language_model_s(self, place: Path) -> None:
        with pytest.raises(ValueError, match="24 numbers and the embeddings of the language model 32"):
            build(place, width=24, heads=3, key_heads=3)

    def test_nan_in_a_prediction_names_the_row(self, place: Path) -> None:
        model = build(place).train()
        with torch.no_grad():
            model.readout.connector.norm.weight.fill_(torch.nan)
        with pytest.raises(NotFiniteError, match="vectors of utterance 0 of the batch are not finite"):
            model(**batch(model))

    @pytest.mark.parametrize("aligner", ["ctc", "cif", "fixed"])
    @pytest.mark.parametrize("number", [1, 2])
    def test_nan_in_the_sound_is_that_of_its_row(self, place: Path, number: int, aligner: str) -> None:
        """No transcript without a word, and no word of frames that are too few."""
        options = {} if aligner == "ctc" else {"aligner_model": None, "aligner": aligner}
        model = build(place, number=number, **options).train()
        given = batch(model)
        given["input_values"][1, 5000] = torch.nan
        with pytest.raises(NotFiniteError, match="vectors of utterance 1 of the batch are not finite"):
            model(**given)
        del given["labels"]
        output = model.eval()(**given)
        assert model.task is not None
        assert output.lengths is not None
        assert model.task.sound(output.logits, output.lengths) == [True, False]

    @pytest.mark.parametrize("aligner", ["cif", "fixed"])
    def test_the_first_stage_without_text_and_tokens(self, place: Path, aligner: str) -> None:
        with pytest.raises(
            ValueError, match="textless training of a vector for each token needs the aligner"
        ):
            build(place, aligner_model=None, aligner=aligner, textless=True)
        build(place, aligner_model=None, aligner=aligner, textless=True, number=2)
        build(place, textless=True)

    def test_a_text_without_room_is_left_out_of_training(self, place: Path, tmp_path: Path) -> None:
        rows = (place / "clips/speech.jsonl").read_text().splitlines()
        row = json.loads(rows[0])
        rows[0] = json.dumps({**row, "path": str(place / "clips" / row["path"]), "text": "abcde " * 40})
        others = [json.loads(each) for each in rows[1:]]
        lines = [
            rows[0],
            *(json.dumps({**each, "path": str(place / "clips" / each["path"])}) for each in others),
        ]
        (tmp_path / "long.jsonl").write_text("\n".join(lines) + "\n")
        words = source(place)
        words[-1] = tmp_path / "long.jsonl"
        done = finetune(
            tmp_path / "out", *words, "--language-model", place / "language", "--stage", "1", "--epochs", "1",
            *SMALL, f"aligner_model={place / 'ctc'}",
        )  # fmt: skip
        assert done.code == 0, done
        assert any(
            "cannot hold its text and is left out" in note for note in results(tmp_path / "out")["notes"]
        )

    def test_options_of_other_tasks(self, place: Path, tmp_path: Path) -> None:
        fails(
            finetune(tmp_path / "o", *source(place, "head"), "--task", "ctc", "--stage", "1"),
            "the task ctc takes no stage",
        )
        fails(
            stage(1, tmp_path / "o", place, "--set", "text.nothing=1"),
            "the task text has no option 'nothing'",
        )
        fails(
            finetune(tmp_path / "o", *source(place), "--stage", "1", "--set", "aligner=cif"),
            "needs a language model",
        )
        fails(stage(3, tmp_path / "o", place), "stage must be at most 2")

    @pytest.mark.parametrize("aligner", ["ctc", "fixed"])
    def test_a_text_that_the_aligner_does_not_know(
        self, place: Path, first: Path, tmp_path: Path, aligner: str
    ) -> None:
        """The second stage would teach the language model to write it after no vector at all."""
        rows = [json.loads(row) for row in (place / "clips/speech.jsonl").read_text().splitlines()]
        for row in rows:
            row["path"] = str(place / "clips" / row["path"])
        rows[1]["text"] = "日本 語"
        (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = source(place)
        words[-1] = tmp_path / "clips.jsonl"
        more = ("--begin-with", first) if aligner == "ctc" else ("--set", "aligner=fixed", "depth=1")
        done = finetune(
            tmp_path / "out", *words, "--language-model", place / "language", "--stage", "2", "--epochs", "1",
            *more,
        )  # fmt: skip
        assert done.code == 0, done
        noted = any(
            "train1.wav (no character that the aligner knows)" in note
            for note in results(tmp_path / "out")["notes"]
        )
        assert noted == (aligner == "ctc")

    def test_it_is_known_without_a_number_of_frames(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Encoders of fixed windows give none before they run."""
        from mmtransfer.training import batches

        monkeypatch.setattr(batches, "frame_counts", lambda *_: None)
        model = build(place)
        examples = [{"target": "日本"}, {"target": "ab"}, {"target": "  é"}]
        assert model.task is not None
        found = batches.find_infeasible(examples, None, model.encoder, model.task, model.readout)
        assert list(found) == [0, 2]
        plain = batches.find_infeasible(examples, None, model.encoder, model.task)
        assert plain == {}

    def test_an_utterance_longer_than_the_language_model_takes(self, place: Path, tmp_path: Path) -> None:
        """Its file is named, and the others are predicted."""
        import soundfile

        done = stage(2, tmp_path / "o", place, "--epochs", "1", "--set", "aligner=fixed", model="")
        assert done.code == 0, done
        soundfile.write(tmp_path / "long.wav", torch.randn(16000 * 12).numpy() / 9, 16000)
        files = [place / "clips/test0.wav", tmp_path / "long.wav", place / "clips/test1.wav"]
        found = run("predict", tmp_path / "o", *files, "--cpu", "--json")
        assert found.code == 1
        message = f"{tmp_path / 'long.wav'} has 75 vectors of speech, which leave its text no room in the 64"
        assert message in found.stderr
        plain = run("predict", tmp_path / "o", files[0], files[2], "--cpu", "--json")
        assert [row for row in json_lines(found.stdout) if "text" in row] == json_lines(plain.stdout)
        rows = [
            {"path": str(file), "text": "abc", "split": part}
            for part, file in zip(("train", "test", "test"), files, strict=True)
        ]
        (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
        fails(run("evaluate", tmp_path / "o", "--data", tmp_path / "clips.jsonl", "--cpu"), message)

    def test_a_comparison_has_no_language_model(self, place: Path, tmp_path: Path) -> None:
        fails(
            run(
                "compare", "--methods", "ssr", "--task", "text", "--model", place / "model", "--data",
                place / "clips/speech.jsonl", "--output", tmp_path / "o",
            ),
            "the task text has a language model and stages, which a comparison has not; train by finetune",
        )  # fmt: skip

    def test_nothing_to_train(self, place: Path, tmp_path: Path) -> None:
        fails(
            stage(1, tmp_path / "o", place, "--set", "frozen=true"),
            "no parameter of ssr with these options asks for a gradient, so there is nothing to train",
        )

    def test_a_tokenizer_of_another_task(self, place: Path, tmp_path: Path) -> None:
        fails(
            stage(1, tmp_path / "o", place, "--tokenizer", place / "language"),
            "tokenizer is for the task ctc; the task text has the language model's",
        )

    def test_a_readout_that_does_not_compress(self, place: Path) -> None:
        from mmtransfer.encoders.loading import load_model

        task = Text(language_model=str(place / "language"))
        with pytest.raises(ValueError, match="hff-b has a vector for each frame, and the task wants one for"):
            AdaptedModel(load_model(str(place / "model")), "hff-b", task, out_dim=32)

    @pytest.mark.parametrize("text", ["x", "{}", "[1]"])
    def test_a_description_that_is_no_option(self, text: str) -> None:
        with pytest.raises(ValueError, match="the option that is given is aligner_model"):
            registry.find("ssr", aligner_description=text)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("depth=3", "trained with depth 2, not 3"),
            ("aligner=cif", "trained with aligner None, not 'cif'"),
            ("fusion=hff-b", "trained with fusion None, not 'hff-b'"),
        ],
    )
    def test_a_beginning_with_other_options(
        self, place: Path, first: Path, tmp_path: Path, option: str, message: str
    ) -> None:
        words = ("--language-model", place / "language", "--stage", "2", "--begin-with", first)
        fails(finetune(tmp_path / "o", *source(place), *words, "--set", option), message)

    def test_a_beginning_has_an_aligner(self, place: Path, first: Path, tmp_path: Path) -> None:
        words = ("--language-model", place / "language", "--stage", "2", "--begin-with", first)
        given = f"aligner_model={place / 'ctc'}"
        fails(
            finetune(tmp_path / "o", *source(place), *words, "--set", given),
            "aligner_model and begin_with exclude each other",
        )

    def test_a_beginning_of_another_method(self, place: Path, tmp_path: Path) -> None:
        fails(
            stage(2, tmp_path / "o", place, "--begin-with", place / "ctc"),
            "was trained by hff-b; ssr cannot begin with it",
        )
