"""HFF's adapters in a TappedEncoder, against adapters hung into the layers by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_cases import (
    ALL_TAPS,
    VARIANTS,
    adapters,
    length_mask,
    make_adapted,
    model_state,
    ragged_lengths,
)
from tiny_encoders import TINY, make_input
from torch import nn

from mmkernels.nn import Adapter
from mmtransfer import AdaptedModel, registry
from mmtransfer.encoders import Encoder, TappedEncoder
from mmtransfer.tasks import Classification


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
    encoder = Encoder(model)
    description, layers = encoder.description, encoder.layers
    encoder.model.eval().requires_grad_(False)
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
    encoder.model(inputs, attention_mask=mask)
    for handle in handles:
        handle.remove()
    if description.last_state_normed:
        states[-1] = encoder.final_norm(states[-1])
    if description.frames == "fixed":
        return torch.stack(states, dim=2).flatten(0, 1)
    counts = encoder.frame_lengths(lengths).tolist()
    return torch.cat([torch.stack(states, dim=2)[row, :count] for row, count in enumerate(counts)])


class TestAgainstEager:
    @pytest.mark.parametrize("layers", [None, (3, 1)])
    @pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
    def test_features_and_gradients(self, model_type, changes, layers):
        model = TINY[model_type].build(**changes).double()
        inputs, lengths = make_input(model_type), ragged_lengths(model_type)
        if inputs.is_floating_point():
            inputs = inputs.double()
        encoder = make_adapted(taps=ALL_TAPS, model=copy.deepcopy(model), layers=layers)
        eager = {index: EagerAdapter(each, nn.ReLU()) for index, each in adapters(encoder).items()}
        assert list(eager) == ([0, 1, 2, 3] if layers is None else [1, 3])
        features = encoder(inputs, lengths).features
        expected = eager_features(model, eager, inputs, lengths)
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (features * weight).sum().backward()
        (expected * weight).sum().backward()
        for index, reference in eager.items():
            for name, parameter in reference.named.items():
                found = adapters(encoder)[index].get_parameter(name).grad
                torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-9)
                assert found.abs().max() > 1e-6

    @pytest.mark.parametrize(
        ("activation", "module"),
        [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU(approximate="tanh")), ("silu", nn.SiLU())],
    )
    def test_options(self, activation, module):
        model, inputs = TINY["bert"].build().double(), make_input("bert")
        encoder = make_adapted(
            taps=ALL_TAPS, model=copy.deepcopy(model), activation=activation, norm=False, bottleneck=7
        )
        eager = {index: EagerAdapter(each, module) for index, each in adapters(encoder).items()}
        expected = eager_features(model, eager, inputs, torch.full((3,), 11))
        torch.testing.assert_close(encoder(inputs).features, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("backend", ["reference", "native"])
    def test_backends_agree(self, backend):
        encoder, inputs = make_adapted(), make_input("wav2vec2")
        other = make_adapted(backend=backend)
        assert all(adapter.backend == backend for adapter in adapters(other).values())
        torch.testing.assert_close(encoder(inputs).features, other(inputs).features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TINY)
def test_starts_as_the_frozen_encoder(model_type):
    model, inputs, lengths = TINY[model_type].build(), make_input(model_type), ragged_lengths(model_type)
    encoder = TappedEncoder(model, ALL_TAPS)
    expected = encoder(inputs, lengths)
    encoder.edit = registry.find("hff-adapters").edit(encoder.parts)
    with torch.no_grad():
        taps = encoder(inputs, lengths)
    assert torch.equal(taps.features, expected.features)
    assert taps.lengths.tolist() == expected.lengths.tolist()
    assert taps.steps == expected.steps
    assert (taps.index is None) == (expected.index is None)
    assert taps.index is None or torch.equal(taps.index, expected.index)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize(("taps", "ran"), [((1, 0), [0, 1]), ((-1, "embeddings"), [0, 1, 2, 3])])
def test_nothing_runs_after_the_last_tap(model_type, taps, ran):
    model = TINY[model_type].build(head=True)
    encoder, calls = make_adapted(model=model, taps=taps), []
    for index, layer in enumerate(encoder.parts.all_layers):
        attention = layer.get_submodule(encoder.description.layer_attention)
        attention.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    encoder(make_input(model_type))
    assert calls == ran
    assert list(adapters(encoder)) == ran


def test_parameter_counts():
    model = TINY["bert"].build(hidden_size=1024, num_hidden_layers=2)
    encoder = make_adapted(model=model, taps=(0, 1), bottleneck=128)
    assert [sum(p.numel() for p in each.parameters()) for each in adapters(encoder).values()] == [265_344] * 2
    trainable = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trainable == 2 * 265_344
    assert 24 * 265_344 == 6_368_256
    encoder.revert()
    bare = make_adapted(model=model, taps=(0, 1), bottleneck=128, norm=False, layers=(1,))
    assert sum(p.numel() for p in bare.edit.parameters) == 263_296


class TestConstruction:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": (4,)}, r"layers must be layer indices in \[-4, 3\], got 4"),
            ({"layers": (-5,)}, r"layers must be layer indices in \[-4, 3\], got -5"),
            ({"layers": ("embeddings",)}, r"layers must be tuple\[int, \.\.\.\] .*got \('embeddings',\)"),
            ({"layers": (1.0,)}, r"layers must be tuple\[int, \.\.\.\] .*got \(1.0,\)"),
            ({"layers": (True,)}, r"layer indices in \[-4, 3\], got True"),
            ({"layers": ()}, "at least one"),
            ({"layers": 2}, r"layers must be tuple\[int, \.\.\.\] .*got 2"),
            ({"layers": (0, -4)}, "layers must be distinct"),
            ({"layers": (0, 3)}, "not lie past the last tap, layer 2, .* got 3"),
            ({"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
            ({"bottleneck": 1.5}, r"bottleneck must be int \| None, got 1.5"),
            ({"bottleneck": "128"}, r"bottleneck must be int \| None, got '128'"),
            ({"bottleneck": True}, r"bottleneck must be int \| None, got True"),
            ({"activation": "tanh"}, "activation must be one of .* got 'tanh'"),
            ({"dtype": torch.int8}, "floating dtype"),
            ({"taps": ("embeddings",)}, "taps the embeddings only"),
            ({"taps": (9,)}, r"taps must be layer indices in \[-4, 3\] or 'embeddings'"),
        ],
    )
    def test_errors_leave_the_model_untouched(self, options, message):
        model = TINY["bert"].build().train()
        before, task = model_state(model), Classification(num_labels=2)
        options = {"taps": (0, 2), "dtype": torch.bfloat16, **options}
        with pytest.raises(ValueError, match=message):
            AdaptedModel(model, "hff-b+hff-adapters", task, **options)
        assert model_state(model) == before

    def test_layers_count_from_the_end(self):
        assert list(adapters(make_adapted(layers=(-1, 0)))) == [0, 3]
        assert list(adapters(make_adapted(taps=(2, "embeddings")))) == [0, 1, 2]

    def test_default_is_the_papers_adapter(self):
        encoder = TappedEncoder(TINY["bert"].build(), (0,))
        encoder.edit = registry.find("hff-adapters").edit(encoder.parts)
        adapter = adapters(encoder)[0]
        assert isinstance(adapter, Adapter)
        assert (adapter.bottleneck, adapter.activation, adapter.residual) == (128, "relu", True)
        assert adapter.norm_weight is not None
        assert adapter.up_weight.count_nonzero() == 0
        assert adapter.down_weight.count_nonzero() > 0
