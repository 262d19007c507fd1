"""The fusions against their eager twins, their parameter counts, and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmkernels.nn import LayerProject
from mmtransfer.hff import LFF, HFFb, HFFub, WeightedSum, eager
from mmtransfer.hff.fusions import Chain, balanced_plan, chain_lengths

FUSIONS = {"weighted_sum": WeightedSum, "lff": LFF, "hff_b": HFFb, "hff_ub": HFFub}
EAGER = {
    "weighted_sum": eager.EagerWeightedSum,
    "lff": eager.EagerLFF,
    "hff_b": eager.EagerHFFb,
    "hff_ub": eager.EagerHFFub,
}
TAPS = (1, 2, 3, 5, 6, 7, 8, 12, 24)
OPTIONS = [
    ("weighted_sum", {}),
    ("weighted_sum", {"out_dim": 5, "norm": True}),
    ("lff", {"out_dim": 5, "depth": 1}),
    ("lff", {"out_dim": 5, "depth": 3}),
    ("hff_b", {"out_dim": 5}),
    ("hff_b", {"out_dim": 5, "norm": False, "activation": "gelu"}),
    ("hff_ub", {"out_dim": 5}),
    ("hff_ub", {"out_dim": 5, "norm": False, "activation": "silu"}),
]


def parameters(fusion: nn.Module) -> int:
    return sum(parameter.numel() for parameter in fusion.parameters())


def twins(kind, taps, dim, **options):
    """A fusion with random norms and weights in float64, and its twin with the same state dict."""
    torch.manual_seed(0)
    backend = {} if kind == "lff" else {"backend": "reference"}
    fusion = FUSIONS[kind](taps, dim, **backend, **options).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    twin = EAGER[kind](taps, dim, **options).double()
    twin.load_state_dict(fusion.state_dict())
    return fusion, twin


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the names of the state dict, the twin's slots stacked."""
    holder = copy.deepcopy(module)
    for target, parameter in zip(holder.parameters(), module.parameters(), strict=True):
        target.data = parameter.grad
    return holder.state_dict()


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_equals_the_eager_twin(kind, options, taps):
    """Values, parameter gradients and input gradients, in float64."""
    fusion, twin = twins(kind, taps, 8, **options)
    x = torch.randn(6, taps, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, fusion.out_dim, dtype=torch.float64)
    results = []
    for module in (fusion, twin):
        out = module(x)
        assert out.shape == (6, fusion.out_dim)
        x.grad = None
        (out * weights).sum().backward()
        results.append((out, x.grad, gradients(module)))
    (out, dx, grads), (twin_out, twin_dx, twin_grads) = results
    torch.testing.assert_close(out, twin_out)
    torch.testing.assert_close(dx, twin_dx)
    assert grads.keys() == twin_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, twin_grads[name], msg=name)
    as_list = [x[:, tap].detach().contiguous() for tap in range(taps)]
    torch.testing.assert_close(twin(as_list), twin_out)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_twins_share_one_state_dict(kind, options):
    fusion, twin = twins(kind, 7, 8, **options)
    ours, theirs = fusion.state_dict(), twin.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert parameters(fusion) == parameters(twin)
    missing = dict(ours)
    missing.pop(next(iter(missing)))
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(missing)


@pytest.mark.parametrize(("kind", "options"), [case for case in OPTIONS if case[0] != "lff"])
@pytest.mark.parametrize("frozen", [True, False])
def test_backends_agree(kind, options, frozen):
    """The op that serves here against its definition, float32, forward and backward; LFF has no op."""
    torch.manual_seed(0)
    fusion = FUSIONS[kind](12, 16, **options)
    twin = FUSIONS[kind](12, 16, backend="reference", **options)
    twin.load_state_dict(fusion.state_dict())
    x = torch.randn(40, 12, 16)
    inputs = [x.clone().requires_grad_(not frozen) for _ in range(2)]
    outs = [module(inp) for module, inp in zip((fusion, twin), inputs, strict=True)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for ours, theirs in zip(fusion.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    if not frozen:
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_no_frames(kind, options):
    fusion = FUSIONS[kind](7, 8, **options)
    out = fusion(torch.zeros(0, 7, 8))
    assert out.shape == (0, fusion.out_dim)
    out.sum().backward()


@pytest.mark.parametrize(
    ("kind", "taps", "options"),
    [
        ("weighted_sum", 12, {"out_dim": 5, "norm": True}),
        ("lff", 12, {"out_dim": 5, "depth": 3}),
        ("hff_b", 12, {"out_dim": 5}),
        ("hff_b", 7, {"out_dim": 5, "norm": False, "activation": "gelu"}),
        ("hff_ub", 7, {"out_dim": 5}),
    ],
)
def test_compiles_whole(kind, taps, options):
    torch.manual_seed(0)
    fusion = FUSIONS[kind](taps, 8, **options)
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, taps, 8)
    torch.testing.assert_close(compiled(x), fusion(x))
    compiled(x).sum().backward()
    ours = [parameter.grad.clone() for parameter in fusion.parameters()]
    fusion.zero_grad()
    fusion(x).sum().backward()
    for mine, parameter in zip(ours, fusion.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


class TestPaperCounts:
    """arXiv 2211.02712, tables 1, 2 and 4, width 1024: exact sizes behind its rounded ones."""

    @pytest.mark.parametrize(
        ("taps", "depth", "count"),
        [
            (1, 1, 656_000),
            (2, 1, 1_311_360),
            (4, 1, 2_622_080),
            (8, 1, 5_243_520),
            (12, 1, 7_864_960),
            (12, 2, 8_275_200),
            (12, 3, 8_685_440),
            (12, 4, 9_095_680),
        ],
    )
    def test_lff(self, taps, depth, count):
        with torch.device("meta"):
            assert parameters(LFF(taps, 1024, depth=depth)) == count

    @pytest.mark.parametrize("kind", ["hff_b", "hff_ub"])
    @pytest.mark.parametrize(("norm", "count"), [(True, 12_270_464), (False, 12_233_600)])
    def test_hff(self, kind, norm, count):
        with torch.device("meta"):
            fusion = FUSIONS[kind](12, 1024, norm=norm)
        assert parameters(fusion) == count
        assert parameters(fusion.projector) == 2_787_200
        projections = [module for module in fusion.modules() if isinstance(module, LayerProject)]
        assert sum(module.taps for module in projections) == 18
        per_projection = 524_800 + (2048 if norm else 0)
        assert sum(parameters(module) for module in projections) == 18 * per_projection

    def test_eager_twins_have_as_many(self):
        with torch.device("meta"):
            assert parameters(eager.EagerHFFb(12, 1024, norm=False)) == 12_233_600
            assert parameters(eager.EagerHFFub(12, 1024)) == 12_270_464


class TestTopology:
    @pytest.mark.parametrize(
        ("taps", "plan"),
        [
            (1, [1]),
            (2, [2]),
            (3, [3]),
            (5, [5, 3]),
            (6, [6, 3]),
            (7, [7, 4, 2]),
            (8, [8, 4, 2]),
            (12, [12, 6, 3]),
            (24, [24, 12, 6, 3]),
        ],
    )
    def test_balanced_plan(self, taps, plan):
        assert balanced_plan(taps) == plan
        fusion = HFFb(taps, 4)
        assert [level.taps for level in fusion.levels] == [count // 2 * 2 for count in plan[:-1]]
        assert fusion.projector[0].in_features == plan[-1] * 4

    def test_one_launch_per_level_and_no_concatenation(self, monkeypatch):
        shapes = []

        def batched_product(x, weight, bias, **_):
            shapes.append(tuple(x.shape))
            return torch.einsum("nlc,loc->nlo", x, weight).contiguous()

        monkeypatch.setattr("mmkernels.nn.layer_project.layer_project", batched_product)
        fusion = HFFb(24, 8)
        with torch.profiler.profile() as profile:
            fusion(torch.randn(4, 24, 8))
        assert shapes == [(4, 24, 8), (4, 12, 8), (4, 6, 8)]
        ops = {event.key for event in profile.key_averages()}
        assert "aten::addmm" in ops
        assert not ops & {"aten::cat", "aten::stack"}

    @pytest.mark.parametrize(
        ("taps", "lengths"), [(1, (1, 0)), (2, (1, 0)), (3, (1, 1)), (5, (2, 2)), (6, (3, 2)), (12, (6, 5))]
    )
    def test_chain_lengths(self, taps, lengths):
        assert chain_lengths(taps) == lengths
        assert sum(lengths) == taps - (taps > 1)

    @pytest.mark.parametrize(("upwards", "order"), [(True, [0, 1, 2, 3]), (False, [3, 2, 1, 0])])
    def test_chain_order(self, upwards, order):
        """Each step halves what came before; later taps in the chain therefore weigh more."""
        chain = Chain(4, 2, upwards=upwards, norm=False, activation="none", backend="reference")
        with torch.no_grad():
            for parameter in chain.parameters():
                parameter.fill_(0.25 if parameter.dim() == 3 else 0.0)
        reach = []
        for tap in range(4):
            x = torch.zeros(1, 4, 2)
            x[0, tap] = 1.0
            reach.append(chain(x).sum().item())
        by_weight = sorted(range(4), key=lambda tap: (-reach[tap], order.index(tap)))
        assert by_weight[0] == order[-1]
        assert by_weight[1] == order[-2]
        assert reach[order[0]] == reach[order[1]] < reach[order[2]]

    def test_middle_tap_goes_unprojected(self):
        """With the chains' projections at zero only the left-over tap, number 6 of 12, gets through."""
        fusion = HFFub(12, 4, backend="reference")
        with torch.no_grad():
            for module in fusion.modules():
                if isinstance(module, LayerProject):
                    module.weight.zero_()
        x = torch.randn(2, 12, 4)
        base = fusion(x)
        for tap in range(12):
            changed = x.clone()
            changed[:, tap] += 1
            assert torch.equal(fusion(changed), base) == (tap != 6)


class TestModules:
    def test_initialised_as_linears(self):
        torch.manual_seed(0)
        level = HFFb(12, 256).levels[0]
        for slot in range(12):
            for tensor in (level.weight[slot], level.bias[slot]):
                assert tensor.abs().max() <= 256**-0.5
                assert tensor.abs().max() > 0.9 * 256**-0.5
        assert torch.equal(level.norm_weight, torch.ones(12, 256))

    def test_weighted_sum_starts_as_the_mean(self):
        x = torch.randn(5, 4, 6)
        torch.testing.assert_close(WeightedSum(4, 6)(x), x.mean(1))
        assert [name for name, _ in WeightedSum(4, 6).named_parameters()] == ["weights"]

    def test_bfloat16_under_autocast(self):
        fusion = HFFb(12, 16, 8)
        x = torch.randn(9, 12, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = fusion(x.bfloat16())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), fusion(x), rtol=0.05, atol=0.05)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"features must be \(N, 5, 8\), got shape \(2, 4, 8\)"):
            HFFb(5, 8)(torch.zeros(2, 4, 8))
        for cls in (HFFb, HFFub):
            with pytest.raises(ValueError, match="dim must be even"):
                cls(5, 7)
        with pytest.raises(ValueError, match="taps must be an integer of at least 1, got 0"):
            LFF(0, 8)
        with pytest.raises(ValueError, match="depth must be"):
            LFF(2, 8, depth=0)
        with pytest.raises(ValueError, match=r"one of none, relu"):
            HFFb(5, 8, activation="tanh")
        with pytest.raises(ValueError, match="backend"):
            HFFb(5, 8, backend="cudnn")(torch.zeros(2, 5, 8))
