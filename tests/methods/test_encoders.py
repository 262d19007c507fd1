"""Every path and fact of the table of descriptions, against a tiny model of each type, and `Encoder`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_encoders import BASE_VARIANT, TINY, make_input
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from mmtransfer.encoders import DESCRIPTIONS, Encoder, default_taps, describe
from mmtransfer.mam.projections import find_projections

LINEARS = ("layer_query", "layer_key", "layer_value", "layer_attention_output")


def test_every_row_has_a_tiny_model():
    assert TINY.keys() == DESCRIPTIONS.keys()
    assert all(row.model_type == name for name, row in DESCRIPTIONS.items())


@pytest.mark.parametrize("model_type", TINY)
def test_paths_resolve(model_type):
    bare, with_head = TINY[model_type].build(), TINY[model_type].build(head=True)
    row = describe(bare)
    assert row.model_type == model_type
    encoder = Encoder(bare)
    assert encoder.root is bare
    assert encoder.description is row
    assert type(Encoder(with_head).model) is type(encoder.model)
    assert Encoder(encoder.model).model is encoder.model
    assert encoder.model.main_input_name == row.main_input or model_type == "whisper"
    assert encoder.hidden_size == 16
    assert encoder.num_layers == len(encoder.layers) == 4
    assert encoder.layers == encoder.all_layers
    for layer in encoder.layers:
        for name in LINEARS:
            thrice = row.fused is not None and name != "layer_attention_output"
            assert _sizes(layer.get_submodule(getattr(row, name))) == (16, 48 if thrice else 16)
        rise, fall = (layer.get_submodule(path) for path in row.layer_mlp)
        assert (_sizes(rise), _sizes(fall)) == ((16, 24), (24, 16))


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Of the input and the output of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _attend(model: nn.Module, model_type: str) -> torch.Tensor:
    """The output of the attention of layer 1, projected."""
    encoder, seen = Encoder(model), []
    attention = encoder.layers[1].get_submodule(encoder.attention_path)
    handle = attention.register_forward_hook(lambda _m, _a, output: seen.append(output))
    inputs = make_input(model_type)
    with torch.no_grad():
        encoder.model(inputs.double() if inputs.is_floating_point() else inputs)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("model_type", TINY)
def test_queries_keys_and_values_are_told_apart(model_type):
    """Without values all positions get the same; a shift of all keys changes nothing, one of queries does."""
    model = TINY[model_type].build().double().eval()
    found = find_projections(model, [1], bias=True)
    weights = {each.part: each for each in found if each.kind == "weight"}
    biases = {each.part: each for each in found if each.kind == "bias"}
    assert [*weights] == ["q", "k", "v"]
    # Whisper's keys have none.
    assert [*biases] == [part for part in "qkv" if (model_type, part) != ("whisper", "k")]
    for each in found:
        assert each.view.shape == ((16, 16) if each.kind == "weight" else (16,))
        assert model.get_parameter(each.name) is each.parameter
    before = _attend(model, model_type)
    with torch.no_grad():
        if "k" in biases:
            biases["k"].view.add_(3.0)
        torch.testing.assert_close(_attend(model, model_type), before)
        biases["q"].view.add_(3.0)
        assert not torch.allclose(_attend(model, model_type), before, atol=1e-3)
        weights["v"].view.zero_()
        biases["v"].view.zero_()
    constant = _attend(model, model_type)
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant))
    assert not torch.allclose(before, before[:1, :1].expand_as(before), atol=1e-3)


@pytest.mark.parametrize("model_type", TINY)
def test_calls_within_a_layer_come_in_the_described_order(model_type):
    """The attention returns what its output projection made; the feed-forward block follows."""
    encoder = Encoder(TINY[model_type].build().eval())
    row, layer = encoder.description, encoder.layers[1]
    seen = []
    for name, path in (
        *((name, getattr(row, name)) for name in LINEARS),
        ("layer_attention", row.layer_attention),
        ("mlp_0", row.layer_mlp[0]),
        ("mlp_1", row.layer_mlp[1]),
    ):
        layer.get_submodule(path).register_forward_hook(lambda *_, name=name: seen.append(name))
    encoder.model(make_input(model_type))
    order = [name for name in seen if name in ("layer_attention", "mlp_0", "mlp_1")]
    assert order == ["layer_attention", "mlp_0", "mlp_1"]
    # WavLM hands its projections' weights to one functional call.
    assert (set(seen) >= set(LINEARS)) == row.calls_projections
    assert row.calls_projections == (model_type != "wavlm")


@pytest.mark.parametrize("model_type", TINY)
def test_activation_is_that_of_the_mlp(model_type):
    encoder = Encoder(TINY[model_type].build().eval())
    first, second = (encoder.layers[1].get_submodule(path) for path in encoder.description.layer_mlp)
    seen = []
    first.register_forward_hook(lambda _m, _a, output: seen.append(output))
    second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder.model(make_input(model_type))
    known = {"gelu": nn.functional.gelu, "swish": nn.functional.silu, "gelu_new": ACT2FN["gelu_new"]}
    assert encoder.activation in known
    torch.testing.assert_close(known[encoder.activation](seen[0]), seen[1])


@pytest.mark.parametrize("model_type", TINY)
def test_final_norm_and_last_state(model_type):
    encoder = Encoder(TINY[model_type].build().eval())
    norm = encoder.final_norm
    seen = []
    encoder.layers[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    outputs = encoder.model(make_input(model_type), output_hidden_states=True)
    # Of the layer itself: some releases of transformers before 5.16 give it normed in `hidden_states`.
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if norm is None:
        torch.testing.assert_close(last, outputs.last_hidden_state)
        return
    assert isinstance(norm, nn.LayerNorm)
    torch.testing.assert_close(norm(last), outputs.last_hidden_state)
    assert not torch.allclose(last, outputs.last_hidden_state, atol=1e-2)
    if encoder.description.last_state_normed:
        torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"])
def test_post_norm_variants_have_no_final_norm(model_type):
    assert Encoder(TINY[model_type].build(**BASE_VARIANT)).final_norm is None


@pytest.mark.parametrize("model_type", [name for name, row in DESCRIPTIONS.items() if row.frames != "fixed"])
def test_frame_lengths_are_those_of_the_model(model_type):
    encoder = Encoder(TINY[model_type].build().eval())
    row = encoder.description
    sizes = [60] if model_type == "whisper" else [11, 12, 15, 16, 17, 23, 24, 25, 26]
    sizes = [max(size, encoder.minimum_length) for size in sizes]
    for size in sizes:
        inputs = make_input(model_type, batch=1, size=size)
        assert inputs.shape[row.time_dim] == size
        assert inputs.dim() == row.input_dims
        made = encoder.model(inputs).last_hidden_state.shape[1]
        assert encoder.frame_lengths(torch.tensor(size)).item() == made


def test_frame_lengths_never_fall_below_zero():
    encoder = Encoder(TINY["wav2vec2"].build())
    least = encoder.minimum_length
    lengths = encoder.frame_lengths(torch.arange(least + 1))
    assert lengths.tolist() == [0] * least + [1]


def test_prefix_tokens_and_fixed_frames_of_the_spectrogram_transformer():
    encoder = Encoder(TINY["audio-spectrogram-transformer"].build())
    row = encoder.description
    patches = ((8 - 4) // 2 + 1) * ((20 - 4) // 2 + 1)
    made = encoder.model(make_input(row.model_type)).last_hidden_state.shape[1]
    assert made == row.prefix_tokens + patches
    with pytest.raises(ValueError, match="same number of frames"):
        encoder.frame_lengths(torch.tensor(5))


class TestLayers:
    def test_up_to_the_last_tap(self):
        encoder = Encoder(TINY["bert"].build(head=True))
        part = encoder.up_to((2, "embeddings", 0))
        assert part.layers == encoder.all_layers[:3]
        assert part.all_layers == encoder.all_layers
        assert part.num_layers == 4
        assert part.root is encoder.root
        assert encoder.layers == encoder.all_layers
        assert encoder.up_to(("embeddings",)).layers == []

    def test_up_to_keeps_a_given_description(self):
        model, row = TINY["bert"].build(), replace(DESCRIPTIONS["bert"], padding="leaks")
        assert Encoder(model, row).up_to((1,)).description is row

    def test_select(self):
        encoder = Encoder(TINY["bert"].build()).up_to((2,))
        layers = encoder.all_layers
        assert encoder.select(None) == layers[:3]
        assert encoder.select((2, 0)) == [layers[0], layers[2]]
        assert encoder.select((-2, -4)) == [layers[0], layers[2]]

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ((4,), r"rows must be layer indices in \[-4, 3\], got 4"),
            ((-5,), r"rows must be layer indices in \[-4, 3\], got -5"),
            (("embeddings",), r"rows must be layer indices in \[-4, 3\], got 'embeddings'"),
            ((True,), r"layer indices in \[-4, 3\], got True"),
            ((), "at least one"),
            ((0, -4), "rows must be distinct, got layer 0 twice"),
            ((0, 3), "rows must not lie past the last tap, layer 2, .* got 3"),
            ((-1,), "rows must not lie past the last tap, layer 2, .* got 3"),
        ],
    )
    def test_select_refuses(self, layers, message):
        encoder = Encoder(TINY["bert"].build()).up_to((2,))
        with pytest.raises(ValueError, match=message):
            encoder.select(layers, "rows")

    def test_embeddings_alone_leave_nothing_to_select(self):
        encoder = Encoder(TINY["bert"].build()).up_to(("embeddings",))
        for layers in (None, (0,)):
            with pytest.raises(ValueError, match="taps the embeddings only"):
                encoder.select(layers)

    @pytest.mark.parametrize(
        ("layers", "taps"),
        [(4, ("embeddings", 0, 1, 2, 3)), (12, ("embeddings", *range(12))), (14, tuple(range(1, 14, 2)))],
    )
    def test_default_taps(self, layers, taps):
        encoder = Encoder(TINY["bert"].build(num_hidden_layers=layers))
        assert default_taps(encoder) == taps
        # A readout that was cut to lower layers has the same defaults.
        assert default_taps(encoder.up_to((0,))) == taps


class TestErrors:
    def test_no_transformers_model(self):
        for call in (describe, Encoder):
            with pytest.raises(TypeError, match=r"transformers model.*Linear"):
                call(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
            Encoder({})

    def test_a_type_without_a_description(self):
        unknown = TINY["bert"].build()
        unknown.config.model_type = "sew"
        for call in (describe, Encoder):
            with pytest.raises(
                ValueError, match=r"'sew' is not in .*DESCRIPTIONS, .*pass a ModelDescription"
            ):
                call(unknown)
        assert Encoder(unknown, DESCRIPTIONS["bert"]).num_layers == 4

    def test_a_model_without_its_encoder(self):
        misplaced = nn.Module()
        misplaced.config = TINY["bert"].build().config
        with pytest.raises(ValueError, match="no bert encoder"):
            Encoder(misplaced)

    def test_no_layers(self):
        model = TINY["bert"].build()
        model.encoder.layer = nn.ModuleList()
        with pytest.raises(ValueError, match="no layers"):
            Encoder(model)
