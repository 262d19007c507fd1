"""The connector of SSR against its published form, and its own promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmtransfer.ssr.connector import Connector
from mmtransfer.ssr.eager import EagerConnector

OPTIONS: dict[str, Any] = {"layers": 3, "heads": 4, "key_heads": 2, "hidden": 48}
#: Three utterances of 12, 9 and 4 frames; the last two have fewer segments, and frames behind them.
LENGTHS = torch.tensor([12, 9, 4])
ENDS = torch.tensor([[3, 4, 9, 12], [1, 8, 8, 8], [4, 4, 4, 4]])
COUNTS = torch.tensor([4, 2, 1])


def build(dim: int = 10, **options: Any) -> Connector:
    torch.manual_seed(0)
    connector = Connector(dim, 32, **{**OPTIONS, **options})
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return connector


def frames(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 12, 10, dtype=dtype)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("lookback", [0, 1])
@pytest.mark.parametrize("attention", ["segment", "causal"])
def test_it_is_the_published_form(attention: str, lookback: int, pooling: str, backend: str) -> None:
    connector = build(attention=attention, lookback=lookback, pooling=pooling, backend=backend).double()
    eager = EagerConnector.of(connector)
    x = frames(torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(each, ENDS, LENGTHS) for module, each in zip((connector, eager), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    own, theirs = (dict(module.named_parameters()) for module in (connector, eager))
    assert own.keys() == theirs.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


def test_the_last_layer_computes_rows_of_boundaries_alone() -> None:
    connector = build()
    seen: dict[str, list[int]] = {"q_proj": [], "o_proj": [], "gate_proj": [], "k_proj": []}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen[name].append(inputs[0].shape[1])

    for layer in connector.layers:
        for name in ("q_proj", "o_proj", "k_proj"):
            getattr(layer.self_attn, name).register_forward_hook(note(name))
        layer.mlp.gate_proj.register_forward_hook(note("gate_proj"))
    connector(frames(), ENDS, LENGTHS)
    assert seen == {
        "q_proj": [12, 12, 4],
        "o_proj": [12, 12, 4],
        "gate_proj": [12, 12, 4],
        "k_proj": [12] * 3,
    }


def test_every_frame_is_a_segment_without_ends() -> None:
    connector = build()
    x = frames()
    out = connector(x, None, LENGTHS)
    whole = build(attention="causal")(x, torch.arange(1, 13).expand(3, -1).contiguous(), LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(out[row, :length], whole[row, :length])


def test_a_row_does_not_depend_on_its_batch() -> None:
    connector = build().eval()
    x = frames()
    out = connector(x, ENDS, LENGTHS)
    for row, (length, count) in enumerate(zip(LENGTHS.tolist(), COUNTS.tolist(), strict=True)):
        alone = connector(x[row : row + 1, :length], ENDS[row : row + 1, :count], LENGTHS[row : row + 1])
        torch.testing.assert_close(out[row, :count], alone[0])
        assert not out[row, count:].any()


def test_a_vector_sees_its_segment_and_one_frame_before_it() -> None:
    connector = build(layers=1)
    x = frames()[:1].requires_grad_()
    connector(x, ENDS[:1], LENGTHS[:1])[0, 2].sum().backward()
    seen = (x.grad[0].abs().sum(1) > 0).nonzero().flatten().tolist()
    assert seen == list(range(3, 9))  # the third segment is 4 to 8
    x.grad = None
    build(layers=1, lookback=0)(x, ENDS[:1], LENGTHS[:1])[0, 2].sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).nonzero().flatten().tolist() == list(range(4, 9))


def test_frames_past_the_last_segment_are_not_read() -> None:
    connector = build()
    x = frames()
    out = connector(x, ENDS, LENGTHS)
    x[1, 9:], x[2, 4:] = 1e3, 1e3
    assert torch.equal(connector(x, ENDS, LENGTHS), out)


def test_gradients_in_float64() -> None:
    """Of frames, by finite differences, which see the rounding of float32."""
    connector = build(layers=2).double()
    x = frames(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: connector(each, ENDS), (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(3, 12, 9), (12, 10), (3, 12)])
def test_frames_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be frames \(B, T, 10\), got shape"):
        build()(torch.zeros(shape), ENDS)


def test_dropout_is_that_of_training_alone() -> None:
    connector = build(dropout=0.5)
    x = frames()
    assert not torch.equal(connector(x, ENDS, LENGTHS), connector(x, ENDS, LENGTHS))
    connector.eval()
    assert torch.equal(connector(x, ENDS, LENGTHS), build()(x, ENDS, LENGTHS))


def test_its_size_at_the_shape_of_llama_3_8b() -> None:
    with torch.device("meta"):
        connector = Connector(768, 4096, layers=4, heads=32, key_heads=8, hidden=14336)
    assert sum(parameter.numel() for parameter in connector.parameters()) == 875_597_824


def test_names_are_those_of_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    layer: nn.Module = build().layers[0]
    layer.load_state_dict(LlamaDecoderLayer(config, 0).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookback": -1}, "lookback must be 0 or 1, got -1"),
        ({"lookback": 2}, "lookback must be 0 or 1, got 2: a segment may have one frame"),
        ({"heads": 3}, "heads must divide width"),
        ({"heads": 8}, "heads must divide width"),
        ({"key_heads": 3}, "key_heads must divide heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"attention": "block"}, "attention must be one of segment, causal"),
        ({"pooling": "max"}, "pooling must be one of last, mean"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([[3, 2, 9, 12], [1, 8, 8, 8], [4, 4, 4, 4]]), "decrease"),
        (torch.tensor([[3, 4, 9, 13], [1, 8, 8, 8], [4, 4, 4, 4]]), "13"),
    ],
)
def test_wrong_ends_name_the_row(ends: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(frames(), ends, LENGTHS)


def test_norm_and_feed_forward_are_llama_s() -> None:
    """They keep less for the backward pass."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from mmtransfer.ssr.decoder import RMSNorm

    layer: Any = build().layers[0]
    norm, theirs = RMSNorm(32), LlamaRMSNorm(32)
    with torch.no_grad():
        theirs.weight.copy_(norm.weight.normal_())
    x = frames().repeat(1, 1, 4)[..., :32]
    for own, other in [(norm, theirs), (layer._feed_forward, layer.mlp)]:
        found = []
        for function in (own, other):
            given = x.clone().requires_grad_()
            out = function(given)
            out.square().sum().backward()
            found.append((out, given.grad))
        for mine, expected in zip(*found, strict=True):
            torch.testing.assert_close(mine, expected)


def test_norm_and_feed_forward_have_derivatives_of_second_order() -> None:
    from mmtransfer.ssr.decoder import RMSNorm

    layer: Any = build().layers[0].double()
    norm = RMSNorm(32).double()
    x = frames(torch.float64)[:1, :2].repeat(1, 1, 4)[..., :32].requires_grad_()
    for function in (norm, layer._feed_forward):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def test_the_backward_pass_keeps_less_than_llama_s() -> None:
    connector = build(layers=2, hidden=256)
    kept: list[int] = []

    def bytes_of(module: nn.Module) -> int:
        kept.clear()
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in seen and not isinstance(tensor, nn.Parameter):
                seen.add(place)
                kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(frames(), ENDS, LENGTHS)
        del out
        return sum(kept)

    assert bytes_of(connector) < 0.6 * bytes_of(EagerConnector.of(connector))
