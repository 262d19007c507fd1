"""Every path and fact of the model table, against a tiny model of each type."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import BASE_VARIANT, TINY, make_input
from torch import nn

from mmtransfer.encoders import descriptions as models

LINEARS = ("layer_query", "layer_key", "layer_value", "layer_attention_output")


def test_every_row_has_a_tiny_model():
    assert TINY.keys() == models.MODELS.keys()


@pytest.mark.parametrize("model_type", TINY)
def test_paths_resolve(model_type):
    bare, with_head = TINY[model_type].build(), TINY[model_type].build(head=True)
    row = models.describe(bare)
    assert row.model_type == model_type
    encoder = models.find_encoder(bare)
    assert type(models.find_encoder(with_head)) is type(encoder)
    assert models.find_encoder(encoder) is encoder
    assert encoder.main_input_name == row.main_input or model_type == "whisper"
    assert models.hidden_size(encoder) == 16
    layers = models.get_layers(encoder)
    assert len(layers) == 4
    for layer in layers:
        for name in LINEARS:
            linear = layer.get_submodule(getattr(row, name))
            assert isinstance(linear, nn.Linear)
            assert (linear.in_features, linear.out_features) == (16, 16)
        rise, fall = (layer.get_submodule(path) for path in row.layer_mlp)
        assert (rise.in_features, rise.out_features) == (16, 24)
        assert (fall.in_features, fall.out_features) == (24, 16)


@pytest.mark.parametrize("model_type", TINY)
def test_calls_within_a_layer_come_in_the_described_order(model_type):
    """The attention returns what its output projection made; the feed-forward block follows."""
    model = TINY[model_type].build().eval()
    row, encoder = models.describe(model), models.find_encoder(model)
    layer = models.get_layers(encoder)[1]
    seen = []
    for name, path in (
        *((name, getattr(row, name)) for name in LINEARS),
        ("layer_attention", row.layer_attention),
        ("mlp_0", row.layer_mlp[0]),
        ("mlp_1", row.layer_mlp[1]),
    ):
        layer.get_submodule(path).register_forward_hook(lambda *_, name=name: seen.append(name))
    encoder(make_input(model_type))
    order = [name for name in seen if name in ("layer_attention", "mlp_0", "mlp_1")]
    assert order == ["layer_attention", "mlp_0", "mlp_1"]
    if model_type != "wavlm":  # wavlm hands its projections' weights to one functional call
        assert set(seen) >= set(LINEARS)


@pytest.mark.parametrize("model_type", TINY)
def test_final_norm_and_last_state(model_type):
    model = TINY[model_type].build().eval()
    row, encoder = models.describe(model), models.find_encoder(model)
    norm = models.get_final_norm(encoder)
    outputs = encoder(make_input(model_type), output_hidden_states=True)
    last = outputs.hidden_states[-1]
    if norm is None:
        torch.testing.assert_close(last, outputs.last_hidden_state)
        return
    assert isinstance(norm, nn.LayerNorm)
    if row.last_state_normed:
        torch.testing.assert_close(last, outputs.last_hidden_state)
    else:
        torch.testing.assert_close(norm(last), outputs.last_hidden_state)
        assert not torch.allclose(last, outputs.last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"])
def test_post_norm_variants_have_no_final_norm(model_type):
    model = TINY[model_type].build(**BASE_VARIANT)
    assert models.get_final_norm(models.find_encoder(model)) is None


@pytest.mark.parametrize("model_type", [name for name, row in models.MODELS.items() if row.frames != "fixed"])
def test_frame_lengths_are_those_of_the_model(model_type):
    model = TINY[model_type].build().eval()
    row, encoder = models.describe(model), models.find_encoder(model)
    sizes = [60] if model_type == "whisper" else [11, 12, 15, 16, 17, 23, 24, 25, 26]
    sizes = [max(size, models.minimum_length(encoder)) for size in sizes]
    for size in sizes:
        inputs = make_input(model_type, batch=1, size=size)
        assert inputs.shape[row.time_dim] == size
        assert inputs.dim() == row.input_dims
        made = encoder(inputs).last_hidden_state.shape[1]
        assert models.frame_lengths(encoder, torch.tensor(size)).item() == made


def test_frame_lengths_never_fall_below_zero():
    encoder = TINY["wav2vec2"].build()
    least = models.minimum_length(encoder)
    lengths = models.frame_lengths(encoder, torch.arange(least + 1))
    assert lengths.tolist() == [0] * least + [1]


def test_prefix_tokens_and_fixed_frames_of_the_spectrogram_transformer():
    model = TINY["audio-spectrogram-transformer"].build()
    row = models.describe(model)
    patches = ((8 - 4) // 2 + 1) * ((20 - 4) // 2 + 1)
    assert model(make_input(row.model_type)).last_hidden_state.shape[1] == row.prefix_tokens + patches
    with pytest.raises(ValueError, match="same number of frames"):
        models.frame_lengths(model, torch.tensor(5))


def test_errors():
    with pytest.raises(TypeError, match=r"transformers model.*Linear"):
        models.describe(nn.Linear(2, 2))
    unknown = TINY["bert"].build()
    unknown.config.model_type = "sew"
    with pytest.raises(ValueError, match=r"'sew'.*add a ModelDescription row"):
        models.describe(unknown)
    misplaced = nn.Module()
    misplaced.config = TINY["bert"].build().config
    with pytest.raises(ValueError, match="no bert encoder"):
        models.find_encoder(misplaced)
