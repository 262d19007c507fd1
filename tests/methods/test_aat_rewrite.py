"""Adapters computed inside the frozen products: values and gradients equal those of separate adapters."""

from __future__ import annotations

import pytest
import torch
from prepared_models import build, encode, gradients, layers_of, prepared, rewritten
from tiny_encoders import BASE_VARIANT, TINY, make_input

import mmtransfer

# Models whose MLP has another activation, and the one of adapters that equals it.
OWN_ACTIVATION = {"wav2vec2-bert": "silu"}
# The linear layers of GPT-2 are of another class.
VARIANTS = [(name, {}) for name in TINY if name != "gpt2"] + [
    ("wav2vec2", BASE_VARIANT),
    ("whisper", {"activation_function": "relu"}),
]


@pytest.mark.parametrize("method", ["aat-ms", "aat-m", "aat-s"])
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_outputs_and_gradients_are_equal(model_type, changes, method):
    if model_type == "wavlm" and method == "aat-s":
        pytest.skip("wavlm does not call its output projection")
    plain = build(model_type, **changes)
    activation = changes.get("activation_function", OWN_ACTIVATION.get(model_type, "gelu"))
    options = {"activation": activation, "scale": 0.7}
    apart, inside = (prepared(plain, method, rewrite=rewrite, **options) for rewrite in (False, True))
    places = {"aat-ms": ("attention", "mlp"), "aat-m": ("mlp",), "aat-s": ("attention",)}[method]
    expected = tuple(place for place in places if (model_type, place) != ("wavlm", "attention"))
    assert rewritten(inside) == expected
    assert rewritten(apart) == ()
    torch.testing.assert_close(encode(inside), encode(apart), rtol=1e-10, atol=1e-12)
    wanted, found = gradients(apart), gradients(inside)
    assert found.keys() == wanted.keys() == set(mmtransfer.get_prepared(inside).trainable)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_what_cannot_be_rewritten_stays_separate():
    assert rewritten(prepared(build("wav2vec2-bert"), rewrite=True)) == ("attention",)


def test_new_parameters_are_the_same():
    plain = build("audio-spectrogram-transformer")
    apart, inside = prepared(plain), prepared(plain, rewrite=True)
    assert list(apart.state_dict()) == list(inside.state_dict())
    inside.load_state_dict(apart.state_dict())
    torch.testing.assert_close(encode(inside), encode(apart), rtol=1e-10, atol=1e-12)


def test_projections_without_bias():
    def unbias(model):
        for layer in layers_of(model):
            for path in ("attention.o_proj", "mlp.fc1", "mlp.fc2"):
                layer.get_submodule(path).bias = None
        return model

    plain = unbias(build("audio-spectrogram-transformer"))
    apart, inside = prepared(plain), prepared(plain, rewrite=True)
    torch.testing.assert_close(encode(inside), encode(apart), rtol=1e-10, atol=1e-12)
    wanted, found = gradients(apart), gradients(inside)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-8) for name in wanted)


def test_frozen_weights_that_are_thawed_later_get_their_gradients():
    plain = build("audio-spectrogram-transformer")
    apart, inside = prepared(plain), prepared(plain, rewrite=True)
    for model in (apart, inside):
        model.requires_grad_(True)
    wanted, found = gradients(apart), gradients(inside)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_autocast_is_as_close_to_float64_as_without_rewriting():
    exact = prepared(build("audio-spectrogram-transformer"))
    apart = prepared(build("audio-spectrogram-transformer"), backend="auto").float()
    inside = prepared(build("audio-spectrogram-transformer"), rewrite=True).float()
    inputs = make_input("audio-spectrogram-transformer")
    wanted = encode(exact)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(inputs).last_hidden_state for model in (apart, inside)]
    for output in outputs:
        output.float().square().sum().backward()
    errors = [(output.detach() - wanted).pow(2).mean().sqrt() for output in outputs]
    # The op keeps sums in float32; the rewritten products round as torch's linear layers do: 1.56 times here.
    assert 0 < errors[1] <= 2 * errors[0]
    for name in mmtransfer.get_prepared(inside).trainable:
        one, other = apart.get_parameter(name).grad, inside.get_parameter(name).grad
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("derivative", ["penalty", "jvp", "per-sample gradient"])
def test_derivatives_are_those_of_separate_adapters_or_refused(derivative):
    plain = build("audio-spectrogram-transformer")
    plain.set_attn_implementation("eager")  # torch's fused attention has the first derivative only
    found = []
    for rewrite in (False, True):
        model = prepared(plain, rewrite=rewrite)
        layer = layers_of(model)[0]
        hidden = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64, generator=seeded())

        def run(x, layer=layer):
            out = layer(x)
            return out[0] if isinstance(out, tuple) else out

        def squared(x, run=run):
            return run(x).square().sum()

        if derivative == "penalty":
            x = hidden.requires_grad_()
            if rewrite:
                with pytest.raises(RuntimeError, match="rewrite=True has first derivatives only"):
                    torch.autograd.grad(squared(x), x, create_graph=True)
                return
            (first,) = torch.autograd.grad(squared(x), x, create_graph=True)
            trained = [p for p in layer.parameters() if p.requires_grad]
            found.append(torch.autograd.grad(first.square().sum(), [x, *trained], allow_unused=True))
        elif derivative == "jvp":
            found.append([torch.func.jvp(run, (hidden,), (torch.ones_like(hidden),))[1]])
        else:
            each = torch.func.vmap(torch.func.grad(lambda x, squared=squared: squared(x[None])))
            found.append([each(hidden)])
    for separate, inside in zip(*found, strict=True):
        assert (separate is None) == (inside is None)
        if separate is not None:
            assert separate.abs().max() > 0
            torch.testing.assert_close(inside, separate, rtol=1e-8, atol=1e-10)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)
