"""The fusions of HFF, with and without its adapters, as adapted models: outputs, training, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_cases import model_state
from hff_models import FUSIONS, LABELS, LENGTHS, WITH_ADAPTERS, make_model
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainingArguments

from mmtransfer import AdaptedModel, TappedEncoder, hff
from mmtransfer.encoders import Taps
from mmtransfer.model import AdaptedOutput
from mmtransfer.tasks import Classification

both = pytest.mark.parametrize("method", ["hff-b", WITH_ADAPTERS])


class TestForward:
    @both
    @pytest.mark.parametrize("model_type", TINY)
    def test_every_model_classifies(self, model_type, method):
        model, inputs = make_model(method, model_type), make_input(model_type)
        out = model(**{model.encoder.description.main_input: inputs}, labels=LABELS)
        assert out.logits.shape == (3, 4)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, LABELS))
        out.loss.backward()
        trained = [*model.encoder.edit.parameters, *model.readout.parameters(), *model.head.parameters()]
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
        for parameter in model.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad

    @pytest.mark.parametrize("method", FUSIONS)
    def test_logits_are_the_mean_of_valid_frames(self, method):
        model, inputs = make_model(method), make_input("wav2vec2")
        logits = model(inputs, lengths=LENGTHS).logits
        for row, length in enumerate(LENGTHS.tolist()):
            frames = model.readout(model.encoder(inputs[row : row + 1, :length]).features)
            expected = model.head.classifier(frames.mean(0))
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)

    @both
    def test_an_utterance_without_frames_is_zeros(self, method):
        model = make_model(method)
        out = model(make_input("wav2vec2"), lengths=torch.tensor([120, 0, 50]))
        torch.testing.assert_close(out.logits[1], model.head.classifier.bias)
        assert out.lengths[1] == 0

    @both
    def test_fused_sequence_without_a_task(self, method):
        model, inputs = make_model(method, num_labels=None), make_input("wav2vec2")
        assert model.head is None
        out = model(inputs, attention_mask=(torch.arange(120) < LENGTHS[:, None]).long())
        assert isinstance(out, AdaptedOutput)
        taps = model.extract(inputs, LENGTHS)
        assert out.lengths.tolist() == taps.lengths.tolist()
        torch.testing.assert_close(out.last_hidden_state, taps.scatter(model.fuse(taps)))
        assert out.last_hidden_state.shape == (3, taps.steps, 6)
        assert out.last_hidden_state[2, out.lengths[2] :].count_nonzero() == 0
        out.last_hidden_state.sum().backward()
        with pytest.raises(ValueError, match="labels need a task"):
            model(inputs, labels=LABELS)

    @pytest.mark.parametrize("num_labels", [4, None])
    def test_stored_features_give_the_same(self, num_labels, monkeypatch):
        model, inputs = make_model(num_labels=num_labels), make_input("wav2vec2")
        assert model.edit_is_empty
        taps = model.extract(inputs, LENGTHS)
        expected = model(inputs, lengths=LENGTHS)
        stored = [utterance.clone() for utterance in taps.split()]
        monkeypatch.setattr(model.encoder, "forward", None)
        again = model(features=torch.cat(stored), lengths=taps.lengths)
        for ours, theirs in zip(expected.to_tuple(), again.to_tuple(), strict=True):
            assert torch.equal(ours, theirs)

    def test_extract_and_fuse_train_the_adapters(self):
        model, inputs = make_model(WITH_ADAPTERS, num_labels=None), make_input("wav2vec2")
        assert not model.edit_is_empty
        model.fuse(model.extract(inputs, LENGTHS)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.encoder.edit.parameters)

    @both
    def test_bfloat16_features_meet_float32_weights(self, method):
        model, inputs = make_model(method, dtype=torch.bfloat16), make_input("wav2vec2")
        out = model(inputs, labels=LABELS)
        assert model.extract(inputs).features.dtype == torch.bfloat16
        assert out.logits.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(inputs, labels=LABELS)
        assert cast.logits.dtype == torch.bfloat16
        assert cast.loss.dtype == torch.float32
        torch.testing.assert_close(cast.loss, out.loss, rtol=0.05, atol=0.05)

    def test_input_errors(self):
        model, inputs = make_model(), make_input("wav2vec2")
        features = model.extract(inputs).features
        with pytest.raises(ValueError, match="called 'input_values', got 'input_ids'"):
            model(input_ids=inputs)
        with pytest.raises(ValueError, match="features go with lengths"):
            model(features=features)
        with pytest.raises(ValueError, match="features go with lengths"):
            model(inputs, features=features, lengths=LENGTHS)
        with pytest.raises(ValueError, match="give the main input once"):
            model()
        with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
            Classification(num_labels=0)


class TestTraining:
    @both
    def test_learns_and_leaves_the_encoder_alone(self, method):
        model, inputs = make_model(method, num_labels=3), make_input("wav2vec2")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = model.trained_tensors()
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(30):
            loss = model(inputs, lengths=LENGTHS, labels=LABELS).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trained), name

    def test_gradients_through_the_fusion(self):
        """The adapters' gradients by finite differences of the loss, along random directions."""
        model = make_model(WITH_ADAPTERS, layers=(1, 3)).double()
        inputs = make_input("wav2vec2").double()

        def loss():
            return nn.functional.cross_entropy(model(inputs, lengths=LENGTHS).logits, LABELS)

        loss().backward()
        generator = torch.Generator().manual_seed(4)
        for parameter in model.encoder.edit.parameters:
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            with torch.no_grad():
                for step in (1e-6, -2e-6):
                    parameter.add_(step * direction)
                    losses.append(float(loss()))
                parameter.add_(1e-6 * direction)
            slope = (losses[0] - losses[1]) / 2e-6
            assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-8)

    @pytest.mark.parametrize("bf16", [False, True])
    @both
    def test_trains_with_the_transformers_trainer(self, tmp_path, method, bf16):
        model, inputs = make_model(method, num_labels=3), make_input("wav2vec2")
        edited = [parameter.clone() for parameter in model.encoder.edit.parameters]
        rows = [{"input_values": inputs[i], "lengths": LENGTHS[i], "labels": LABELS[i]} for i in range(3)] * 4
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=0,
            bf16=bf16,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        assert trainer.predict(rows, ignore_keys=["lengths"]).predictions.shape == (12, 3)
        assert not model.encoder.training
        for parameter, was in zip(model.encoder.edit.parameters, edited, strict=True):
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, was)


class TestCopies:
    def test_deep_copy_stands_alone(self):
        model, inputs = make_model(WITH_ADAPTERS), make_input("wav2vec2")
        expected = model(inputs, lengths=LENGTHS).logits
        for twin in (copy.deepcopy(model), model.copy()):
            assert torch.equal(twin(inputs, lengths=LENGTHS).logits, expected)
            with torch.no_grad():
                for parameter in twin.encoder.edit.parameters:
                    parameter.zero_()
            assert torch.equal(model(inputs, lengths=LENGTHS).logits, expected)
            assert not torch.allclose(twin(inputs, lengths=LENGTHS).logits, expected)
            twin(inputs, labels=LABELS).loss.backward()
            assert all(parameter.grad is not None for parameter in twin.encoder.edit.parameters)
            assert all(parameter.grad is None for parameter in model.parameters())
            twin.revert()
            assert not any("adapter" in name for name, _ in twin.named_modules())
            assert torch.equal(model(inputs, lengths=LENGTHS).logits, expected)

    def test_a_copy_shares_an_encoder_that_is_not_edited(self):
        model = make_model()
        twin = model.copy()
        assert twin.encoder.model is model.encoder.model
        assert twin.readout is not model.readout
        assert copy.deepcopy(model).encoder.model is not model.encoder.model

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("method", [*FUSIONS, WITH_ADAPTERS])
    def test_the_published_twin_computes_the_same(self, method, dtype):
        model, inputs = make_model(method).to(dtype), make_input("wav2vec2")
        twin = model.method.baseline(model)
        assert (twin.encoder.model is model.encoder.model) == model.edit_is_empty
        assert type(twin.readout).__name__.startswith("Eager")
        ours, theirs = (
            model(inputs, lengths=LENGTHS, labels=LABELS),
            twin(inputs, lengths=LENGTHS, labels=LABELS),
        )
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        assert theirs.logits.dtype == dtype
        assert model.state_dict().keys() == twin.state_dict().keys()
        for each in (ours, theirs):
            each.loss.backward()
        assert all(p.grad is not None for p in twin.readout.parameters())


class TestRevert:
    @pytest.mark.parametrize("method", [*FUSIONS, WITH_ADAPTERS])
    def test_gives_the_model_back(self, method):
        model = TINY["wav2vec2"].build().eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 2 > 0)
        before = model_state(model)
        for _ in range(2):
            adapted = make_model(method, model=model)
            assert not any(p.requires_grad for p in model.feature_extractor.parameters())
            adapted.revert()
            assert adapted.edit_is_empty
            assert model_state(model) == before

    def test_one_edit_at_a_time(self):
        model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
        frozen = make_model(model=model)
        expected = frozen(inputs).logits
        adapted = make_model(WITH_ADAPTERS, model=model)
        state = model_state(model)
        for method in ("hff-b", WITH_ADAPTERS):
            with pytest.raises(ValueError, match="edited already, by method 'hff-adapters'"):
                make_model(method, model=model, dtype=torch.bfloat16)
        assert model_state(model) == state
        with pytest.raises(ValueError, match="edited elsewhere"):
            frozen(inputs)
        adapted.revert()
        assert torch.equal(frozen(inputs).logits, expected)


@pytest.mark.parametrize("method", FUSIONS)
def test_draws_do_not_depend_on_the_edit(method):
    """Readout and head come first, so methods that differ in the edit alone start from the same ones."""
    plain, edited = make_model(method), make_model(f"{method}+hff-adapters")
    for name in ("readout", "head"):
        ours, theirs = getattr(plain, name).state_dict(), getattr(edited, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_begins_with_a_trained_readout_and_head():
    trained, model = make_model(seed=1), make_model(WITH_ADAPTERS, seed=2)
    model.begin_with(trained)
    for name in ("readout", "head"):
        ours, theirs = getattr(model, name).state_dict(), getattr(trained, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_insights():
    taps = ("embeddings", 2, -1)
    for method in ("weighted-sum", "lff"):
        model = make_model(method, taps=taps)
        (figures,) = model.method.insights(model).values()
        assert list(figures) == ["embeddings", "layer 2", "layer 3"]
        assert len({round(value, 6) for value in figures.values()}) == (1 if method == "weighted-sum" else 3)


def test_parts_compose_by_hand():
    encoder = TappedEncoder(TINY["wav2vec2"].build(), (1, 3))
    taps = encoder(make_input("wav2vec2"))
    assert isinstance(taps, Taps)
    for fusion in (hff.HFFb(2, 16, 6), hff.WeightedSum(2, 16)):
        assert taps.scatter(fusion(taps.features)).shape[2] == fusion.out_dim


def test_defaults_of_the_paper():
    model = AdaptedModel(TINY["bert"].build(hidden_size=32, num_hidden_layers=14), WITH_ADAPTERS)
    assert model.encoder.taps == tuple(range(1, 14, 2))
    assert model.readout.out_dim == 20
    assert len(model.encoder.edit.parameters) == 14 * 6
