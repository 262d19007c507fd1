"""A TappedEncoder with an edit in it: its graph, how it shares a model, and its dtypes."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from encoder_cases import ALL_TAPS, OpLog, adapters, add_adapters, make_adapted, model_state, ragged_lengths
from prepared_models import complete
from tiny_encoders import TINY, make_input
from torch import nn

from mmtransfer import registry
from mmtransfer.encoders import TappedEncoder
from mmtransfer.method import EditMethod

LENGTHS = torch.tensor([120, 77, 50])
EDITS = [name for name, each in registry.methods().items() if issubclass(each, EditMethod)]


def hooks(model: nn.Module) -> list[Any]:
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


class Logged:
    """A forward that notes when it is done."""

    def __init__(self, inner: Any, events: list[str | int], index: int) -> None:
        self.inner, self.events, self.index = inner, events, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.events.append(self.index)
        return output


class SavedLog:
    """Saved tensors, and forwards of layers that are done, but for their adapters, in the order of events."""

    def __init__(self, encoder: TappedEncoder) -> None:
        self.events: list[str | int] = []
        self.nbytes = 0
        for index, layer in enumerate(encoder.parts.all_layers):
            if (serial := layer.__dict__.get("forward")) is None:
                layer.forward = Logged(layer.forward, self.events, index)
            else:
                serial.inner = Logged(serial.inner, self.events, index)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.events.append("saved")
        self.nbytes += tensor.nbytes
        return tensor

    def run(self, encoder: TappedEncoder, inputs: torch.Tensor, lengths=None) -> torch.Tensor:
        self.events.clear()
        self.nbytes = 0
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            return encoder(inputs, lengths).features

    def before(self, layer: int) -> list[str | int]:
        """Events up to the end of this layer's own forward."""
        return self.events[: self.events.index(layer)]


class TestGraph:
    @pytest.mark.parametrize("model_type", TINY)
    def test_starts_at_the_lowest_adapter(self, model_type):
        encoder, inputs = make_adapted(model_type, ALL_TAPS, layers=(2, 3)), make_input(model_type)
        log = SavedLog(encoder)
        features = log.run(encoder, inputs)
        assert log.before(2) == [0, 1]
        assert "saved" in log.events[log.events.index(2) : log.events.index(3)]
        features.sum().backward()
        assert all(p.grad is not None for p in encoder.edit.parameters)
        trained = {id(p) for p in encoder.edit.parameters}
        assert all(p.grad is None for p in encoder.parameters() if id(p) not in trained)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "whisper"])
    def test_an_input_that_asks_for_a_gradient_gets_one(self, model_type):
        encoder, inputs = make_adapted(model_type, layers=(2, 3)), make_input(model_type)
        encoder(inputs).features.sum().backward()
        expected = [p.grad.clone() for p in encoder.edit.parameters]
        encoder.zero_grad()
        encoder(inputs.requires_grad_(True)).features.sum().backward()
        assert inputs.grad.any()
        for parameter, grad in zip(encoder.edit.parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "whisper", "bert"])
    def test_thawed_weights_change_no_gradient_of_the_adapters(self, model_type):
        encoder, inputs = make_adapted(model_type, layers=(2, 3)), make_input(model_type)
        encoder(inputs).features.sum().backward()
        expected = [p.grad.clone() for p in encoder.edit.parameters]
        encoder.zero_grad()
        encoder.model.requires_grad_(True)
        encoder(inputs).features.sum().backward()
        for parameter, grad in zip(encoder.edit.parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)

    def test_frozen_adapters_start_none(self):
        encoder, inputs = make_adapted(), make_input("wav2vec2")
        log = SavedLog(encoder)
        expected = log.run(encoder, inputs)
        each = adapters(encoder)
        for layer in (0, 1):
            each[layer].requires_grad_(False)
        features = log.run(encoder, inputs)
        assert log.before(2) == [0, 1]
        assert torch.equal(features, expected)
        features.sum().backward()
        assert all(p.grad is not None for layer in (2, 3) for p in each[layer].parameters())
        assert all(p.grad is None for layer in (0, 1) for p in each[layer].parameters())
        for layer in (2, 3):
            each[layer].requires_grad_(False)
        features = log.run(encoder, inputs)
        assert "saved" not in log.events
        assert not features.requires_grad

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_nothing_is_recorded_without_gradients(self, mode):
        encoder, inputs = make_adapted(), make_input("wav2vec2")
        log = SavedLog(encoder)
        with mode():
            features = log.run(encoder, inputs, LENGTHS)
            assert not torch.is_grad_enabled()
        assert log.events == [0, 1, 2, 3]
        assert not features.requires_grad
        torch.testing.assert_close(encoder(inputs, LENGTHS).features, features)

    def test_saves_less_with_fewer_adapters(self):
        saved = []
        for layers in [(3,), (2, 3), (1, 2, 3), None]:
            encoder = make_adapted(layers=layers)
            log = SavedLog(encoder)
            log.run(encoder, make_input("wav2vec2"))
            saved.append(log.nbytes)
        # The lowest adapter alone, then one layer more each time.
        steps = [more - less for less, more in itertools.pairwise(saved)]
        assert saved[0] < steps[0] / 3
        assert steps == pytest.approx([steps[0]] * 3, rel=0.01)

    def test_gradients_of_slots_are_not_copied(self):
        """One buffer is made forward and none backward; autograd's own slicing makes one per slot."""
        encoder, inputs = make_adapted(), make_input("wav2vec2")
        for lengths in (None, LENGTHS):
            with OpLog() as log:
                features = encoder(inputs, lengths).features
            made = [name for name, shape in log.calls if torch.Size(shape).numel() == features.numel()]
            assert made == ["aten.new_empty.default"]
            assert features.is_contiguous()
            grad = torch.randn_like(features)
            with OpLog() as log:
                features.backward(grad)
            assert log.calls
            assert not any(torch.Size(shape).numel() == features.numel() for _, shape in log.calls)


class TestSharing:
    def test_in_turns_with_a_frozen_encoder(self):
        model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
        frozen, other = TappedEncoder(model, (0, 3)), TappedEncoder(model, (0, 3))
        before, state = frozen(inputs, LENGTHS).features, model_state(model)
        found = []
        for layers in [(0, 2), (1,)]:
            add_adapters(other, layers=layers)
            with pytest.raises(ValueError, match="edited elsewhere, by method 'hff-adapters'; revert that"):
                frozen(inputs, LENGTHS)
            with pytest.raises(ValueError, match="edited already, by method 'hff-adapters'"):
                TappedEncoder(model, (0, 3))
            found.append(other(inputs, LENGTHS).features)
            other.edit.revert()
            for each in (frozen, other):
                assert torch.equal(each(inputs, LENGTHS).features, before)
        assert not torch.allclose(*found, atol=1e-2)
        assert not torch.allclose(found[0], before, atol=1e-2)
        assert model_state(model) == state

    @pytest.mark.parametrize("broken", [0, 2])
    def test_after_an_exception(self, broken):
        encoder, inputs = make_adapted(taps=(0, 3), layers=(1, 3)), make_input("wav2vec2")
        expected, found = encoder(inputs).features, hooks(encoder.model)
        flags = [parameter.requires_grad for parameter in encoder.parameters()]

        def fail(*_):
            raise KeyError("broken layer")

        handle = encoder.parts.all_layers[broken].register_forward_hook(fail)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                with pytest.raises(KeyError, match="broken layer"):
                    encoder(inputs)
                assert torch.is_grad_enabled() is grad
        handle.remove()
        assert [parameter.requires_grad for parameter in encoder.parameters()] == flags
        assert hooks(encoder.model) == found
        assert torch.equal(encoder(inputs).features, expected)

    @pytest.mark.parametrize("name", EDITS)
    def test_threads_share_an_encoder(self, name):
        encoder = TappedEncoder(TINY["bert"].build(), (0, 3))
        encoder.edit = complete(name).edit(encoder.parts)
        with torch.no_grad():
            for parameter in encoder.edit.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = [make_input("bert", batch=1 + i, size=9 + i) for i in range(3)]
        expected = [encoder(x).features for x in inputs]
        results: list[list[bool]] = [[] for _ in inputs]

        def work(index):
            for _ in range(20):
                with torch.set_grad_enabled(index != 1):
                    features = encoder(inputs[index]).features
                same = torch.equal(features, expected[index])
                results[index].append(same and features.requires_grad == (index != 1))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[True] * 20] * 3

    def test_stays_in_eval_mode(self):
        encoder, inputs = make_adapted("hubert"), make_input("hubert")
        expected = encoder(inputs).features
        encoder.train()
        encoder.model.train()
        assert torch.equal(encoder(inputs).features, expected)
        assert not any(module.training for module in encoder.modules())


class TestDtypes:
    @pytest.mark.parametrize(
        ("cast", "stored"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_adapters_in_an_encoder_of_a_dtype(self, cast, stored):
        encoder, inputs = make_adapted(dtype=cast), make_input("wav2vec2")
        assert {parameter.dtype for parameter in encoder.edit.parameters} == {stored}
        assert encoder.dtype == cast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder(inputs, LENGTHS).features
        assert features.dtype == cast
        features.float().sum().backward()
        assert all(p.grad.dtype == stored for p in encoder.edit.parameters)
        exact = make_adapted()(inputs, LENGTHS).features
        torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.25)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "whisper", "bert"])
    def test_autocast(self, model_type):
        # Not relu: rounding moves values across its kink, and whole terms of gradients with them.
        encoder, inputs = make_adapted(model_type, ALL_TAPS, activation="gelu"), make_input(model_type)
        lengths = ragged_lengths(model_type)
        exact = encoder(inputs, lengths).features
        weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
        (exact * weight).sum().backward()
        wanted = [parameter.grad.clone() for parameter in encoder.edit.parameters]
        encoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder(inputs, lengths).features
        (features * weight).sum().backward()
        torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.25)
        for parameter, grad in zip(encoder.edit.parameters, wanted, strict=True):
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - grad).norm() < 0.1 * grad.norm()

    def test_moves_as_a_whole(self):
        encoder = make_adapted().double()
        assert encoder(make_input("wav2vec2")).features.dtype == torch.float64
