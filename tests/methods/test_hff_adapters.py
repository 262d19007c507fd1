"""AdaptedEncoder against adapters hung into the layers by hand, what it records, and HFF with it."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from typing import Any

import pytest
import torch
from encoder_cases import ALL_TAPS, VARIANTS, OpLog, length_mask, ragged_lengths
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainingArguments

from mmtransfer.encoders import descriptions as models
from mmtransfer.encoders.taps import attach_states
from mmtransfer.hff import HFF, AdaptedEncoder, FrozenEncoder, HFFb, SequenceClassificationHead, make_fusion

LENGTHS = torch.tensor([120, 77, 50])
LABELS = torch.tensor([0, 2, 1])


def perturb(encoder: AdaptedEncoder) -> AdaptedEncoder:
    """Adapters start as the identity, which hides almost every mistake."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return encoder


def make_encoder(model_type="wav2vec2", taps=(0, 1, 2, 3), *, model=None, **options) -> AdaptedEncoder:
    torch.manual_seed(1)
    options.setdefault("bottleneck", 4)
    return perturb(AdaptedEncoder(model or TINY[model_type].build(), taps, **options))


def make_hff(model_type="wav2vec2", num_labels=4, **options) -> HFF:
    encoder = make_encoder(model_type, **options)
    fusion = make_fusion("hff_b", taps=len(encoder.taps), dim=16, out_dim=6)
    return HFF(encoder, fusion, None if num_labels is None else SequenceClassificationHead(6, num_labels))


def hooks(model: nn.Module) -> list[Any]:
    return [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


class EagerAdapter(nn.Module):
    """The adapter as one writes it down, with the parameters of another."""

    def __init__(self, adapter: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        bottleneck, width = adapter.down_weight.shape
        self.norm = nn.Identity() if adapter.norm_weight is None else nn.LayerNorm(width)
        self.down, self.activation, self.up = (
            nn.Linear(width, bottleneck),
            activation,
            nn.Linear(bottleneck, width),
        )
        self.double()
        own = {
            "down_weight": self.down.weight,
            "down_bias": self.down.bias,
            "up_weight": self.up.weight,
            "up_bias": self.up.bias,
        }
        if adapter.norm_weight is not None:
            own |= {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        self.named = own
        for name, parameter in own.items():
            parameter.data.copy_(adapter.get_parameter(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.activation(self.down(self.norm(x))))


def eager_features(model, adapters: dict[int, EagerAdapter], inputs, lengths) -> torch.Tensor:
    """Valid frames `(N, 5, C)` of the embeddings and all layers, with adapters in hooks, under autograd."""
    encoder = models.find_encoder(model).eval().requires_grad_(False)
    description, layers = models.describe(encoder), models.get_layers(encoder)
    states: list[torch.Tensor] = []
    handles = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]

    def adapt(index, output):
        state = output[0] if isinstance(output, tuple) else output
        states.append(adapters[index](state) if index in adapters else state)
        return (states[-1], *output[1:]) if isinstance(output, tuple) else states[-1]

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(lambda _m, _a, output, index=index: adapt(index, output)))
    mask = length_mask(lengths) if description.takes_mask else None
    encoder(inputs, attention_mask=mask)
    for handle in handles:
        handle.remove()
    if description.last_state_normed:
        states[-1] = models.get_final_norm(encoder)(states[-1])
    if description.frames == "fixed":
        return torch.stack(states, dim=2).flatten(0, 1)
    counts = models.frame_lengths(encoder, lengths).tolist()
    return torch.cat([torch.stack(states, dim=2)[row, :count] for row, count in enumerate(counts)])


class TestAgainstEager:
    @pytest.mark.parametrize("layers", [None, (3, 1)])
    @pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
    def test_features_and_gradients(self, model_type, changes, layers):
        model = TINY[model_type].build(**changes).double()
        inputs, lengths = make_input(model_type), ragged_lengths(model_type)
        if inputs.is_floating_point():
            inputs = inputs.double()
        encoder = make_encoder(taps=ALL_TAPS, model=model, layers=layers)
        eager = {index: EagerAdapter(encoder.adapters[str(index)], nn.ReLU()) for index in encoder.layers}
        assert list(eager) == ([0, 1, 2, 3] if layers is None else [1, 3])
        features = encoder(inputs, lengths).features
        expected = eager_features(model, eager, inputs, lengths)
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (features * weight).sum().backward()
        (expected * weight).sum().backward()
        for index, reference in eager.items():
            for name, parameter in reference.named.items():
                found = encoder.adapters[str(index)].get_parameter(name).grad
                torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-9)
                assert found.abs().max() > 1e-6

    @pytest.mark.parametrize(
        ("activation", "module"),
        [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU(approximate="tanh")), ("silu", nn.SiLU())],
    )
    def test_options(self, activation, module):
        model, inputs = TINY["bert"].build().double(), make_input("bert")
        encoder = make_encoder(taps=ALL_TAPS, model=model, activation=activation, norm=False, bottleneck=7)
        eager = {index: EagerAdapter(encoder.adapters[str(index)], module) for index in encoder.layers}
        expected = eager_features(model, eager, inputs, torch.full((3,), 11))
        torch.testing.assert_close(encoder(inputs).features, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("backend", ["reference", "native"])
    def test_backends_agree(self, backend):
        encoder, inputs = make_encoder(), make_input("wav2vec2")
        other = make_encoder(backend=backend)
        assert all(adapter.backend == backend for adapter in other.adapters.values())
        torch.testing.assert_close(encoder(inputs).features, other(inputs).features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TINY)
def test_starts_as_the_frozen_encoder(model_type):
    model, inputs, lengths = TINY[model_type].build(), make_input(model_type), ragged_lengths(model_type)
    adapted, frozen = AdaptedEncoder(model, ALL_TAPS), FrozenEncoder(model, ALL_TAPS)
    expected = frozen(inputs, lengths)
    with torch.no_grad():
        taps = adapted(inputs, lengths)
    assert torch.equal(taps.features, expected.features)
    assert taps.lengths.tolist() == expected.lengths.tolist()
    assert taps.steps == expected.steps
    assert (taps.index is None) == (expected.index is None)
    assert taps.index is None or torch.equal(taps.index, expected.index)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize(("taps", "ran"), [((1, 0), [0, 1]), ((-1, "embeddings"), [0, 1, 2, 3])])
def test_nothing_runs_after_the_last_tap(model_type, taps, ran):
    model = TINY[model_type].build(head=True)
    encoder, calls = make_encoder(model=model, taps=taps), []
    for index, layer in enumerate(models.get_layers(encoder.encoder)):
        attention = layer.get_submodule(encoder.description.layer_attention)
        attention.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    encoder(make_input(model_type))
    assert calls == ran
    assert encoder.layers == tuple(ran)


def test_parameter_counts():
    model = TINY["bert"].build(hidden_size=1024, num_hidden_layers=2)
    encoder = AdaptedEncoder(model, (0, 1), bottleneck=128)
    assert [sum(p.numel() for p in a.parameters()) for a in encoder.adapters.values()] == [265_344, 265_344]
    trainable = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trainable == 2 * 265_344
    assert 24 * 265_344 == 6_368_256
    bare = AdaptedEncoder(model, (0, 1), bottleneck=128, norm=False, layers=[1])
    assert sum(p.numel() for p in bare.adapters.parameters()) == 263_296


class SavedLog:
    """Saved tensors, and forwards of layers that are done, in the order of events."""

    def __init__(self, encoder: AdaptedEncoder) -> None:
        self.events: list[str | int] = []
        self.nbytes = 0
        for index, layer in enumerate(models.get_layers(encoder.encoder)):
            # Registered before the encoder's own hooks, so it runs before the adapter does.
            layer.register_forward_hook(lambda *_, index=index: self.events.append(index))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.events.append("saved")
        self.nbytes += tensor.nbytes
        return tensor

    def run(self, encoder: AdaptedEncoder, inputs: torch.Tensor, lengths=None) -> torch.Tensor:
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
        encoder, inputs = make_encoder(model_type, ALL_TAPS, layers=(2, 3)), make_input(model_type)
        log = SavedLog(encoder)
        features = log.run(encoder, inputs)
        assert log.before(2) == [0, 1]
        assert "saved" in log.events[log.events.index(2) : log.events.index(3)]
        features.sum().backward()
        assert all(p.grad is not None for p in encoder.adapters.parameters())

    @pytest.mark.parametrize("model_type", ["wav2vec2", "whisper", "bert"])
    def test_whoever_thaws_the_encoder(self, model_type):
        """Weights or inputs that ask for gradients get none, and no graph of their own."""
        model, inputs = TINY[model_type].build(), make_input(model_type)
        encoder = make_encoder(model=model, layers=(2, 3))
        log = SavedLog(encoder)
        log.run(encoder, inputs).sum().backward()
        expected, count = [p.grad.clone() for p in encoder.adapters.parameters()], len(log.events)
        encoder.adapters.zero_grad()
        model.requires_grad_(True)
        if inputs.is_floating_point():
            inputs.requires_grad_(True)
        log.run(encoder, inputs).sum().backward()
        assert log.before(2) == [0, 1]
        assert len(log.events) == count
        assert inputs.grad is None
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        for parameter, grad in zip(encoder.adapters.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)

    def test_frozen_adapters_start_none(self):
        encoder, inputs = make_encoder(), make_input("wav2vec2")
        log = SavedLog(encoder)
        expected = log.run(encoder, inputs)
        for layer in (0, 1):
            encoder.adapters[str(layer)].requires_grad_(False)
        features = log.run(encoder, inputs)
        assert log.before(2) == [0, 1]
        assert torch.equal(features, expected)
        features.sum().backward()
        assert all(p.grad is not None for layer in "23" for p in encoder.adapters[layer].parameters())
        assert all(p.grad is None for layer in "01" for p in encoder.adapters[layer].parameters())
        encoder.adapters.requires_grad_(False)
        features = log.run(encoder, inputs)
        assert "saved" not in log.events
        assert not features.requires_grad

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_nothing_is_recorded_without_gradients(self, mode):
        encoder, inputs = make_encoder(), make_input("wav2vec2")
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
            encoder = make_encoder(layers=layers)
            log = SavedLog(encoder)
            log.run(encoder, make_input("wav2vec2"))
            saved.append(log.nbytes)
        # The lowest adapter alone, then one layer more each time.
        steps = [more - less for less, more in itertools.pairwise(saved)]
        assert saved[0] < steps[0] / 3
        assert steps == pytest.approx([steps[0]] * 3, rel=0.01)

    def test_gradients_of_slots_are_not_copied(self):
        """One buffer is made forward and none backward; autograd's own slicing makes one per slot."""
        encoder, inputs = make_encoder(), make_input("wav2vec2")
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

    @pytest.mark.parametrize("padded", [False, True])
    def test_attached_states(self, padded):
        index = torch.tensor([0, 1, 3]) if padded else None

        def written(*states):
            frames = [state.detach().flatten(0, 1) for state in states]
            features = torch.stack([frames[0], torch.zeros_like(frames[0]), frames[1]], dim=1)
            features = features if index is None else features[index]
            return attach_states(features, index, {0: states[0], 2: states[1]})

        states = tuple(torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(written, states)
        assert torch.autograd.gradgradcheck(lambda *s: written(*(t.square() for t in s)), states)


class TestSharing:
    def test_in_turns_with_a_frozen_encoder(self):
        model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
        frozen = FrozenEncoder(model, (0, 3))
        before = frozen(inputs, LENGTHS).features
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = hooks(model)
        one, other = (make_encoder(model=model, taps=(0, 3), layers=layers) for layers in [(0, 2), (1,)])
        first = one(inputs, LENGTHS).features
        second = other(inputs, LENGTHS).features
        assert not torch.allclose(first, second, atol=1e-2)
        assert torch.equal(frozen(inputs, LENGTHS).features, before)
        first.sum().backward()
        assert torch.equal(one(inputs, LENGTHS).features, first)
        assert hooks(model) == found
        assert not any("adapter" in name for name, _ in model.named_modules())
        after = model.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())

    @pytest.mark.parametrize("broken", [0, 2])
    def test_after_an_exception(self, broken):
        model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
        frozen, adapted = FrozenEncoder(model, (0, 3)), make_encoder(model=model, layers=(1, 3))
        model.requires_grad_(True)
        before, expected, found = frozen(inputs).features, adapted(inputs).features, hooks(model)

        def fail(*_):
            raise KeyError("broken layer")

        handle = models.get_layers(frozen.encoder)[broken].register_forward_hook(fail)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                with pytest.raises(KeyError, match="broken layer"):
                    adapted(inputs)
                assert torch.is_grad_enabled() is grad
        handle.remove()
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert hooks(model) == found
        assert torch.equal(frozen(inputs).features, before)
        assert torch.equal(adapted(inputs).features, expected)

    def test_threads_share_a_model(self):
        model = TINY["wav2vec2"].build()
        encoders = [
            make_encoder(model=model, taps=(0, 3), layers=(0, 3)),
            FrozenEncoder(model, (3,)),
            make_encoder(model=model, taps=(2, 1), layers=(1,)),
        ]
        inputs = [make_input("wav2vec2", batch=1 + i, size=90 + 30 * i) for i in range(3)]
        expected = [encoder(x).features for encoder, x in zip(encoders, inputs, strict=True)]
        results: list[list[bool]] = [[] for _ in encoders]

        def work(index):
            for _ in range(10):
                features = encoders[index](inputs[index]).features
                same = torch.equal(features, expected[index])
                results[index].append(same and features.requires_grad == (index != 1))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[True] * 10] * 3

    def test_stays_in_eval_mode(self):
        encoder, inputs = make_encoder("hubert"), make_input("hubert")
        expected = encoder(inputs).features
        encoder.train()
        encoder.encoder.train()
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
    def test_adapters_beside_an_encoder_of_a_dtype(self, cast, stored):
        encoder, inputs = make_encoder(dtype=cast), make_input("wav2vec2")
        assert {parameter.dtype for parameter in encoder.adapters.parameters()} == {stored}
        assert encoder.dtype == cast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder(inputs, LENGTHS).features
        assert features.dtype == cast
        features.float().sum().backward()
        assert all(p.grad.dtype == stored for p in encoder.adapters.parameters())
        exact = make_encoder()(inputs, LENGTHS).features
        torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.25)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "whisper", "bert"])
    def test_autocast(self, model_type):
        # Not relu: rounding moves values across its kink, and whole terms of gradients with them.
        encoder, inputs = make_encoder(model_type, ALL_TAPS, activation="gelu"), make_input(model_type)
        lengths = ragged_lengths(model_type)
        exact = encoder(inputs, lengths).features
        weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
        (exact * weight).sum().backward()
        wanted = [parameter.grad.clone() for parameter in encoder.adapters.parameters()]
        encoder.adapters.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder(inputs, lengths).features
        (features * weight).sum().backward()
        torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.25)
        for parameter, grad in zip(encoder.adapters.parameters(), wanted, strict=True):
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - grad).norm() < 0.1 * grad.norm()

    def test_moves_as_a_whole(self):
        encoder = make_encoder().double()
        assert encoder(make_input("wav2vec2")).features.dtype == torch.float64


class TestConstruction:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": (4,)}, r"layers must be layer indices in \[-4, 3\], got 4"),
            ({"layers": (-5,)}, r"layers must be layer indices in \[-4, 3\], got -5"),
            ({"layers": ("embeddings",)}, r"layers must be layer indices in \[-4, 3\], got 'embeddings'"),
            ({"layers": (1.0,)}, r"layer indices in \[-4, 3\], got 1.0"),
            ({"layers": ()}, "at least one"),
            ({"layers": 2}, "at least one, got 2"),
            ({"layers": (0, -4)}, "layers must be distinct"),
            ({"layers": (0, 3)}, "not lie past the last tap, layer 2, .* got 3"),
            ({"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
            ({"activation": "tanh"}, "activation must be one of .* got 'tanh'"),
            ({"dtype": torch.int8}, "floating dtype"),
            ({"taps": ("embeddings",)}, "got the embeddings only"),
            ({"taps": (9,)}, r"taps must be layer indices in \[-4, 3\] or 'embeddings'"),
        ],
    )
    def test_errors_leave_the_model_untouched(self, options, message):
        model = TINY["bert"].build().train()
        with pytest.raises(ValueError, match=message):
            AdaptedEncoder(model, **{"taps": (0, 2), "dtype": torch.bfloat16, **options})
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("bottleneck", [1.5, "128", True])
    def test_bottleneck_is_an_int(self, bottleneck):
        with pytest.raises(TypeError, match="bottleneck must be an int"):
            AdaptedEncoder(TINY["bert"].build(), (0,), bottleneck=bottleneck)

    def test_layers_count_from_the_end_and_are_sorted(self):
        encoder = make_encoder(layers=(-1, 0))
        assert encoder.layers == (0, 3)
        assert list(encoder.adapters) == ["0", "3"]
        assert make_encoder(taps=(2, "embeddings")).layers == (0, 1, 2)

    def test_default_is_the_papers_adapter(self):
        adapter = AdaptedEncoder(TINY["bert"].build(), (0,)).adapters["0"]
        assert (adapter.bottleneck, adapter.activation, adapter.residual) == (128, "relu", True)
        assert adapter.norm_weight is not None
        assert adapter.up_weight.count_nonzero() == 0
        assert adapter.down_weight.count_nonzero() > 0


class TestHFF:
    @pytest.mark.parametrize("model_type", TINY)
    def test_what_is_trained(self, model_type):
        hff = make_hff(model_type, layers=(1, 3))
        out = hff(**{hff.encoder.description.main_input: make_input(model_type)}, labels=LABELS)
        out.loss.backward()
        parts = [*hff.encoder.adapters.parameters(), *hff.fusion.parameters(), *hff.head.parameters()]
        trainable = {id(parameter) for parameter in hff.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for parameter in parts}
        assert all(parameter.grad is not None for parameter in parts)
        assert all(parameter.grad is None for parameter in hff.encoder.encoder.parameters())

    def test_gradients_through_the_fusion(self):
        """The adapters' gradients by finite differences of the loss, along random directions."""
        hff, inputs = make_hff(layers=(1, 3)).double(), make_input("wav2vec2").double()

        def loss():
            return nn.functional.cross_entropy(hff(inputs, lengths=LENGTHS).logits, LABELS)

        loss().backward()
        generator = torch.Generator().manual_seed(4)
        for parameter in hff.encoder.adapters.parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            with torch.no_grad():
                for step in (1e-6, -2e-6):
                    parameter.add_(step * direction)
                    losses.append(float(loss()))
                parameter.add_(1e-6 * direction)
            slope = (losses[0] - losses[1]) / 2e-6
            assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-8)

    def test_learns_and_leaves_the_encoder_alone(self):
        hff, inputs = make_hff(num_labels=3), make_input("wav2vec2")
        before = {name: tensor.clone() for name, tensor in hff.encoder.encoder.state_dict().items()}
        adapters = copy.deepcopy(hff.encoder.adapters.state_dict())
        optimiser = torch.optim.Adam([p for p in hff.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(30):
            loss = hff(inputs, lengths=LENGTHS, labels=LABELS).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
        after = hff.encoder.encoder.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not any(torch.equal(hff.encoder.adapters.state_dict()[n], t) for n, t in adapters.items())

    @pytest.mark.parametrize("bf16", [False, True])
    def test_trains_with_the_transformers_trainer(self, tmp_path, bf16):
        hff, inputs = make_hff(num_labels=3, layers=(2, 3)), make_input("wav2vec2")
        before = hff.encoder.adapters["2"].down_weight.clone()
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
        trainer = Trainer(hff, arguments, train_dataset=rows, eval_dataset=rows)
        loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < loss
        assert not torch.equal(hff.encoder.adapters["2"].down_weight, before)
        assert all(p.dtype == torch.float32 for p in hff.encoder.adapters.parameters())
        assert not hff.encoder.training

    def test_deep_copy_stands_alone(self):
        hff, inputs = make_hff(), make_input("wav2vec2")
        expected = hff(inputs, lengths=LENGTHS).logits
        twin = copy.deepcopy(hff)
        assert torch.equal(twin(inputs, lengths=LENGTHS).logits, expected)
        with torch.no_grad():
            for parameter in twin.encoder.adapters.parameters():
                parameter.zero_()
        assert torch.equal(hff(inputs, lengths=LENGTHS).logits, expected)
        assert not torch.allclose(twin(inputs, lengths=LENGTHS).logits, expected)
        twin(inputs, labels=LABELS).loss.backward()
        assert all(parameter.grad is not None for parameter in twin.encoder.adapters.parameters())
        assert all(parameter.grad is None for parameter in hff.parameters())

    def test_extract_and_fuse_train_the_adapters(self):
        hff, inputs = make_hff(num_labels=None), make_input("wav2vec2")
        hff.fuse(hff.extract(inputs, LENGTHS)).sum().backward()
        assert all(parameter.grad is not None for parameter in hff.encoder.adapters.parameters())


class TestSaving:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"layers": (1, 3), "bottleneck": 5, "activation": "silu", "norm": False},
            {"taps": (2, "embeddings"), "dtype": torch.bfloat16},
        ],
    )
    def test_round_trip(self, tmp_path, options):
        hff = make_hff(**options)
        hff.save_pretrained(tmp_path)
        again = HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())
        assert isinstance(again.encoder, AdaptedEncoder)
        assert again.encoder.options == hff.encoder.options
        assert again.encoder.layers == hff.encoder.layers
        assert again.encoder.dtype == hff.encoder.dtype
        inputs = make_input("wav2vec2")
        assert torch.equal(again(inputs, lengths=LENGTHS).logits, hff(inputs, lengths=LENGTHS).logits)

    def test_the_reference_backend_gives_the_same(self, tmp_path):
        hff, inputs = make_hff(), make_input("wav2vec2")
        hff.save_pretrained(tmp_path)
        again = HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())
        for adapter in again.encoder.adapters.values():
            adapter.backend = "reference"
        torch.testing.assert_close(again(inputs).logits, hff(inputs).logits, rtol=1e-4, atol=1e-5)

    def test_configuration(self, tmp_path):
        make_hff(layers=(1, 3)).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["encoder"]["kind"] == "adapted"
        assert config["encoder"]["options"] == {
            "bottleneck": 4,
            "layers": [1, 3],
            "activation": "relu",
            "norm": True,
        }

    def test_frozen_replaces_adapted(self, tmp_path):
        hff = make_hff()
        hff.save_pretrained(tmp_path)
        HFF(FrozenEncoder(hff.encoder.encoder, (0, 1)), HFFb(2, 16, 6)).save_pretrained(tmp_path)
        again = HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())
        assert type(again.encoder) is FrozenEncoder

    def test_a_checkpoint_from_before_adapters(self, tmp_path):
        hff = HFF(FrozenEncoder(TINY["wav2vec2"].build(), (0, 3)), HFFb(2, 16, 6))
        hff.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        del config["encoder"]["kind"], config["encoder"]["options"]
        path.write_text(json.dumps(config))
        again, inputs = HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build()), make_input("wav2vec2")
        assert torch.equal(again(inputs).last_hidden_state, hff(inputs).last_hidden_state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"options": {"bottleneck": 8}}, r"adapters.0.down_weight has shape \(4, 16\), not \(8, 16\)"),
            ({"options": {"bottleneck": 4, "norm": False}}, "adapters.0.norm_weight is unknown"),
            ({"options": {"bottleneck": 4, "layers": [1]}}, "adapters.0.down_bias is unknown"),
            ({"options": {"bottleneck": 4, "layers": [9]}}, "layers must be layer indices"),
            ({"kind": "frozen", "options": {}}, "adapters.0.down_bias is unknown"),
            ({"kind": "tuned"}, "encoder kind must be one of frozen, adapted, got 'tuned'"),
        ],
    )
    def test_changed_configuration(self, tmp_path, change, message):
        make_hff().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["encoder"] |= change
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())

    def test_another_width_leaves_the_model_untouched(self, tmp_path):
        make_hff(dtype=torch.bfloat16).save_pretrained(tmp_path)
        model = TINY["wav2vec2"].build(hidden_size=32)
        with pytest.raises(ValueError, match="encoder of hidden_size 16, got 32"):
            HFF.from_pretrained(tmp_path, model)
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
