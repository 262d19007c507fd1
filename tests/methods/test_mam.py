"""MAM: merging in place, the sweep of shares, noise in place of a source, and the choice of layers."""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_encoders import TINY, make_input
from torch import nn

from mmtransfer import mam
from mmtransfer.encoders import DESCRIPTIONS, Encoder, ModelDescription
from mmtransfer.mam.layer_similarity import pool
from mmtransfer.mam.projections import find_projections
from mmtransfer.mam.sources import find_pairs

#: Layouts: separate, separate without a bias of the keys, transposed and fused.
TYPES = ("wav2vec2", "whisper", "gpt2")


def source_of(model_type: str = "bert", **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    return TINY[model_type].build(**changes)


def views(model: nn.Module, **options: Any) -> list[torch.Tensor]:
    return [each.view.detach().clone() for each in find_projections(model, **options)]


def others(model: nn.Module, merged: list[str]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name not in merged}


class TestMerge:
    @pytest.mark.parametrize("source_type", ["bert", "gpt2", "vit"])
    @pytest.mark.parametrize("target_type", TYPES)
    def test_every_pair_is_interpolated_and_nothing_else(self, target_type, source_type):
        target, source = TINY[target_type].build(head=True), source_of(source_type)
        before, names = copy.deepcopy(target), [each.name for each in find_projections(target)]
        biases = [each.view.detach().clone() for each in find_projections(target, bias=True)]
        report = mam.merge(target, source, 0.25)
        own, theirs, found = views(before), views(source), views(target)
        assert len(found) == 12
        for a, b, c in zip(own, theirs, found, strict=True):
            torch.testing.assert_close(c, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-7)
        kept = others(before, names)
        assert kept.keys() == others(target, names).keys()
        assert all(torch.equal(value, target.state_dict()[name]) for name, value in kept.items())
        after = [each.view for each in find_projections(target, bias=True)]
        assert sum(torch.equal(a, b) for a, b in zip(biases, after, strict=True)) == len(after) - 12
        assert (report.matrices, report.parameters, report.layers) == (12, 12 * 256, (0, 1, 2, 3))
        assert report.heads == (2, 2)
        assert "12 matrices, 3,072 parameters, of 4 layers" in str(report)

    @pytest.mark.parametrize("target_type", TYPES)
    def test_the_ends_are_exact(self, target_type):
        target, source = TINY[target_type].build(), source_of()
        before = views(target)
        mam.merge(target, source, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(views(target), before, strict=True))
        mam.merge(target, source, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(views(target), views(source), strict=True))

    @pytest.mark.parametrize("layers", [range(1, 3), [-3, 2], (2, 1)])
    def test_layers_outside_the_subset_are_untouched(self, layers):
        target, source = TINY["wav2vec2"].build(), source_of()
        before = views(target)
        assert sorted(mam.merge(target, source, 0.5, layers=layers).layers) == [1, 2]
        same = [torch.equal(a, b) for a, b in zip(views(target), before, strict=True)]
        assert same == [True] * 3 + [False] * 6 + [True] * 3

    def test_a_share_for_each_layer_in_the_order_of_the_layers(self):
        target, source = TINY["wav2vec2"].build(), source_of()
        before, theirs = views(target), views(source)
        mam.merge(target, source, [1.0, 0.5], layers=[3, 0])
        after = views(target)
        assert all(torch.equal(after[index], theirs[index]) for index in (9, 10, 11))
        for index in (0, 1, 2):
            torch.testing.assert_close(after[index], (before[index] + theirs[index]) / 2)

    def test_parts_and_biases(self):
        target, source = TINY["wav2vec2"].build(), source_of()
        before = copy.deepcopy(target)
        assert mam.merge(target, source, 1.0, parts=["v"], bias=True).matrices == 8
        for part, kind in [(part, kind) for part in "qkv" for kind in ("weight", "bias")]:
            pick = []
            for model in (target, source if part == "v" else before):
                found = find_projections(model, [2], [part], bias=True)
                pick.append(next(each.view for each in found if each.kind == kind))
            assert torch.equal(*pick)

    def test_a_source_without_a_bias_has_zeros(self):
        target, source = TINY["wav2vec2"].build(), source_of("whisper")
        before = views(target, layers=[0], parts=["k"], bias=True)[1]
        mam.merge(target, source, 0.25, bias=True)
        torch.testing.assert_close(views(target, layers=[0], parts=["k"], bias=True)[1], 0.75 * before)

    def test_layers_of_a_source_of_another_depth(self):
        target, source = TINY["wav2vec2"].build(), source_of(num_hidden_layers=3)
        before = views(target)
        with pytest.raises(ValueError, match=r"has 4 layers and the source 3.*layer_map=\[0, 1, 1, 2\]"):
            mam.merge(target, source, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(views(target), before, strict=True))
        mam.merge(target, source, 1.0, layer_map=[2, 2, -3, 1])
        expected = [theirs for layer in (2, 2, 0, 1) for theirs in views(source, layers=[layer])]
        assert all(torch.equal(a, b) for a, b in zip(views(target), expected, strict=True))

    def test_different_heads_are_warned_of(self):
        with pytest.warns(UserWarning, match="2 attention heads and the source 4"):
            report = mam.merge(TINY["wav2vec2"].build(), source_of(num_attention_heads=4), 0.5)
        assert report.heads == (2, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mam.merge(TINY["wav2vec2"].build(), source_of(), 0.5)

    def test_match_rms(self):
        target, source = TINY["wav2vec2"].build(), source_of()
        for each in find_projections(source):
            each.view.detach().mul_(7)
        own = [each.square().mean().sqrt() for each in views(target)]
        mam.merge(target, source, 1.0, match_rms=True)
        for found, theirs, rms in zip(views(target), views(source), own, strict=True):
            torch.testing.assert_close(found.square().mean().sqrt(), rms)
            torch.testing.assert_close(found / rms, theirs / theirs.square().mean().sqrt())

    def test_a_target_merged_with_itself_reads_before_it_writes(self):
        target = TINY["wav2vec2"].build()
        before = views(target)
        mam.merge(target, target, 1.0, layer_map=[1, 2, 3, 0])
        after = views(target)
        assert all(torch.equal(a, b) for a, b in zip(after, before[3:] + before[:3], strict=True))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes_of_the_two_may_differ(self, dtype):
        target, source = TINY["wav2vec2"].build().to(dtype), source_of()
        before = views(target)
        mam.merge(target, source, 0.25)
        for found, own, theirs in zip(views(target), before, views(source), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, (0.75 * own.double() + 0.25 * theirs.double()).to(dtype))

    def test_a_shared_layer_is_merged_once_or_refused(self):
        target, source = TINY["bert"].build(), source_of()
        target.encoder.layer[2] = target.encoder.layer[1]
        before = views(target)
        with pytest.raises(ValueError, match=r"layers 1 and 2 of the target share encoder.layer.1"):
            mam.merge(target, source, 0.5)
        assert mam.merge(target, source, 0.5, layer_map=[0, 1, 1, 3]).matrices == 9
        expected = (before[3] + views(source)[3]) / 2
        torch.testing.assert_close(views(target)[3], expected)

    def test_a_model_of_the_user(self):
        """timm's and torch's layouts, which have all three in one weight of rows."""

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attn = nn.MultiheadAttention(16, 2)
                self.fused = nn.Module()
                self.fused.qkv = nn.Linear(16, 48)
                self.proj = nn.Linear(16, 16)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Layer() for _ in range(4))

        for path in ("attn", "fused.qkv"):
            row = dict.fromkeys(("layer_attention", "layer_query", "layer_key", "layer_value"), path)
            description = ModelDescription(
                model_type="mine", encoder=("",), layers="layers", main_input="input_values", input_dims=3,
                time_dim=1, frames="same", padding="exact", layer_attention_output="proj",
                layer_mlp=("proj", "proj"), fused="rows", **row,
            )  # fmt: skip
            model, source = Model(), source_of()
            name = f"layers.0.{path}.{'in_proj_weight' if path == 'attn' else 'weight'}"
            before = model.get_parameter(name).detach().clone()
            assert mam.merge(Encoder(model, description), source, 0.5).matrices == 12
            theirs = torch.cat(views(source, layers=[0]))
            torch.testing.assert_close(model.get_parameter(name).detach(), (before + theirs) / 2)
            mam.merge(source, Encoder(model, description), 1.0)
            assert torch.equal(views(source)[4], model.get_parameter(name.replace("0", "1"))[16:32])

    def test_sizes_of_the_published_models(self):
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        with torch.device("meta"):
            for options, parameters, layers in ((large, 75_497_472, 24), ({}, 21_233_664, 12)):
                target = transformers.HubertModel(transformers.HubertConfig(**options))
                source = transformers.BertModel(transformers.BertConfig(**options))
                pairs = find_pairs(target, source)
                assert sum(pair.source.numel() for pair in pairs.pairs) == parameters
                assert len(set(pairs.groups)) == layers

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": [4]}, r"layers must be layer indices in \[-4, 3\], got 4"),
            ({"layers": range(3, 6)}, r"layers must be layer indices in \[-4, 3\]"),
            ({"layers": []}, "at least one"),
            ({"layers": "some"}, 'layers must be "all" or indices'),
            ({"parts": ["o"]}, "parts must be some of 'q', 'k', 'v'"),
            ({"parts": "qk"}, "parts must be some of"),
            ({"layer_map": [0, 1]}, "layer_map must have 4 entries"),
            ({"layer_map": [0, 1, 2, 4]}, r"in \[-4, 3\]"),
            ({"lam": 1.5}, r"lam must be a number in \[0, 1\]"),
            ({"lam": float("nan")}, r"lam must be a number in \[0, 1\]"),
            ({"lam": [0.5, 0.5]}, "one for each of the 4 layers"),
            ({"lam": True}, "lam must be a number"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        target = TINY["wav2vec2"].build()
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=message):
            mam.merge(target, source_of(), **{"lam": 0.5, **options})
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    def test_models_that_cannot_be_merged(self):
        target = TINY["wav2vec2"].build()
        with pytest.raises(
            ValueError, match="equally wide: the target, wav2vec2, has 16, the source, bert, 8"
        ):
            mam.merge(target, source_of(hidden_size=8), 0.5)
        with pytest.raises(ValueError, match="'albert' is not in"):
            mam.merge(target, transformers.AlbertModel(transformers.AlbertConfig(num_hidden_layers=1)), 0.5)
        with pytest.raises(TypeError, match="source must be a model"):
            mam.merge(target, 3, 0.5)  # type: ignore[arg-type]
        nn.utils.parametrizations.weight_norm(target.encoder.layers[1].attention.k_proj)
        with pytest.raises(ValueError, match="layer 1: the projection 'k' must have a plain floating weight"):
            mam.merge(target, source_of(), 0.5)

    def test_a_source_without_values(self):
        target = TINY["hubert"].build()
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match="the source is on the meta device and has no values"):
            mam.merge(target, source_of().to("meta"), 0.5)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    def test_a_source_from_a_folder(self, tmp_path):
        source = source_of(head=True)
        source.save_pretrained(tmp_path)
        target = TINY["wav2vec2"].build()
        mam.merge(target, tmp_path, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(views(target), views(source), strict=True))


class TestSweep:
    def test_points_equal_fresh_merges_and_the_model_comes_back(self):
        target, source = TINY["gpt2"].build(head=True), source_of()
        before = copy.deepcopy(target.state_dict())
        pointers = {name: value.data_ptr() for name, value in target.named_parameters()}
        fresh = {}
        for lam in (0.05, 0.1, 0.25):
            each = copy.deepcopy(target)
            mam.merge(each, source, lam, layers=[0, 2])
            fresh[lam] = views(each)
        points = mam.sweep(target, source, fresh, views, layers=[0, 2])
        assert [lam for lam, _ in points] == list(fresh)
        for lam, found in points:
            assert all(torch.equal(a, b) for a, b in zip(found, fresh[lam], strict=True))
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
        assert pointers == {name: value.data_ptr() for name, value in target.named_parameters()}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_leaves_the_model_as_it_was(self, error):
        target = TINY["wav2vec2"].build()
        before = copy.deepcopy(target.state_dict())

        def fail(model: nn.Module) -> None:
            assert model is target
            raise error

        with pytest.raises(error):
            mam.sweep(target, source_of(), [0.5], fail)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())

    def test_shares_are_checked_before_the_first_is_tried(self):
        tried: list[Any] = []
        with pytest.raises(ValueError, match="lam must be"):
            mam.sweep(TINY["wav2vec2"].build(), source_of(), [0.5, 2.0], tried.append)
        assert not tried


class TestNoise:
    def test_statistics(self):
        wide = {"hidden_size": 96, "num_hidden_layers": 1}
        target, source = TINY["bert"].build(**wide), source_of(**wide)
        for each in find_projections(source):
            each.view.detach().mul_(3).add_(1)
        matrix = views(source)[0]
        for like, mean, std in (("0,1", 0, 1), ("target", views(target)[0].mean(), views(target)[0].std()),
                                (source, matrix.mean(), matrix.std())):  # fmt: skip
            each = copy.deepcopy(target)
            mam.merge(each, mam.Noise(like), 1.0)
            assert float(views(each)[0].mean()) == pytest.approx(float(mean), abs=5 * float(std) / 96)
            assert float(views(each)[0].std()) == pytest.approx(float(std), rel=0.05)

    def test_seeds_and_text(self):
        target = TINY["bert"].build()
        found = {}
        for name, noise in {
            "first": mam.Noise("target"),
            "again": mam.Noise("target"),
            "text": "N(target)",
            "as in the paper": "N(Target)",
            "other": mam.Noise("target", seed=1),
        }.items():
            found[name] = [pair.source for pair in find_pairs(target, noise).pairs]
        assert all(torch.equal(a, b) for a, b in zip(found["first"], found["again"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found["first"], found["text"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found["first"], found["as in the paper"], strict=True))
        assert mam.Noise("0, 1") == mam.Noise()
        assert not any(torch.equal(a, b) for a, b in zip(found["first"], found["other"], strict=True))
        drawn = [pair.source for pair in find_pairs(target, mam.Noise()).pairs]
        assert len({float(each[0, 0]) for each in drawn}) == 12
        part = [pair.source for pair in find_pairs(target, mam.Noise(), layers=[2], parts=["v"]).pairs]
        assert torch.equal(part[0], drawn[8])

    def test_a_sweep_takes_it(self):
        target = TINY["bert"].build()
        ((_, found),) = mam.sweep(target, "N(0,1)", [1.0], views)
        assert torch.equal(found[0], find_pairs(target, mam.Noise()).pairs[0].source)

    def test_wrong_ones(self):
        for arguments in ((None,), ("",), ("Source",), (mam.Noise(),), ("0,1", -1), ("0,1", 0.5)):
            with pytest.raises(ValueError, match=r"like must be|seed must be"):
                mam.Noise(*arguments)


class TestSimilarity:
    def batches(self, model_type: str, mask: bool = True) -> list[Any]:
        inputs = make_input(model_type, batch=4)
        if not mask:
            return [inputs]
        lengths = torch.tensor([inputs.shape[1], inputs.shape[1] // 2, inputs.shape[1] // 3, inputs.shape[1]])
        valid = (torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)).long()
        name = DESCRIPTIONS[model_type].main_input
        return [{name: inputs[at : at + 2], "attention_mask": valid[at : at + 2]} for at in range(0, 4, 2)]

    @pytest.mark.parametrize("model_type", ["hubert", "gpt2", "bert"])
    def test_means_are_those_of_the_valid_frames(self, model_type):
        model = TINY[model_type].build().train()
        found = pool(model, self.batches(model_type))
        assert found.shape == (4, 4, 16)
        assert model.training
        model.eval()
        encoder = Encoder(model)
        for index, batch in enumerate(self.batches(model_type)):
            with torch.no_grad():
                outputs = model(**batch, output_hidden_states=True)
            counts = encoder.frame_lengths(batch["attention_mask"].sum(1))
            for layer in range(3):  # the last one is normed in some models
                state = outputs.hidden_states[layer + 1]
                for row, count in enumerate(counts.tolist()):
                    expected = state[row, :count].mean(0)
                    torch.testing.assert_close(found[layer, 2 * index + row], expected, atol=1e-5, rtol=1e-4)

    def test_metrics_written_out(self):
        target, source = TINY["hubert"].build(), source_of()
        table = mam.similarity(target, source, self.batches("hubert"), self.batches("bert", mask=False))
        mine, theirs = pool(target, self.batches("hubert")), pool(source, self.batches("bert", mask=False))
        assert table.samples == 4
        unit = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
        for layer in range(4):
            pairs = [*zip(mine[layer], theirs[layer], strict=True)]
            euclid = sum(float((a - b).norm()) for a, b in pairs) / 4
            inner = sum(float(a @ b) for a, b in pairs) / 4
            squares = []
            for direction in unit.T:
                axis = direction / direction.norm()
                squares.append(
                    ((mine[layer] @ axis).sort()[0] - (theirs[layer] @ axis).sort()[0]).square().mean()
                )
            assert table.euclid[layer] == pytest.approx(euclid, rel=1e-4)
            assert table.inner[layer] == pytest.approx(inner, rel=1e-4, abs=1e-5)
            assert table.swd[layer] == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-4)

    def test_a_model_is_most_like_itself(self):
        model = TINY["bert"].build()
        table = mam.similarity(model, model, self.batches("bert"), self.batches("bert"))
        assert max(*table.euclid, *table.swd) == 0.0
        shifted = mam.similarity(
            model, model, self.batches("bert"), self.batches("bert"), layer_map=[0, 2, 1, 3]
        )
        assert shifted.top(2) == shifted.top(2, "euclid") == (0, 3)
        assert mam.merge(model, source_of(), 0.5, layers=shifted.top(2)).layers == (0, 3)

    def test_top(self):
        table = mam.Similarity((3.0, 1.0, 2.0), (0.1, 0.3, 0.2), (5.0, 7.0, 6.0), samples=1)
        assert (table.top(1), table.top(2), table.top(1, "euclid")) == ((0,), (0, 2), (1,))
        assert (table.top(2, "inner"), table.top(3)) == ((1, 2), (0, 1, 2))
        for arguments in ((0,), (4,), (1.0,), (1, "cosine")):
            with pytest.raises(ValueError, match="must be"):
                table.top(*arguments)
        assert "0.3000" in str(table)

    def test_no_states_of_whole_sequences_are_kept(self, monkeypatch):
        """While the last layer runs, the outputs of those before it are gone."""
        model = TINY["bert"].build(max_position_embeddings=700)
        sizes = []

        def count(*_: Any) -> None:
            gc.collect()
            tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
            sizes.append(sum(each.shape == (2, 600, 16) for each in tensors))

        for layer in (1, 3):
            model.encoder.layer[layer].register_forward_hook(count)
        pool(model, [make_input("bert", batch=2, size=600)])
        assert sizes[0] == sizes[1]

    def test_samples_that_do_not_match(self):
        target, source = TINY["hubert"].build(), source_of()
        with pytest.raises(ValueError, match="same samples, at least one; got 4 and 8"):
            mam.similarity(target, source, self.batches("hubert"), self.batches("bert") * 2)
        with pytest.raises(ValueError, match="got 0 and 0"):
            mam.similarity(target, source, [], [])
        for batch, given in (
            ({"input_ids": 3}, r"a dictionary with input_ids \(int\)"),
            (({},), "tuple"),
            ("a.wav", "str"),
            ({}, "a dictionary with nothing"),
        ):
            with pytest.raises(ValueError, match=f"dictionary that has it; got {given}"):
                mam.similarity(target, source, [batch], [])
        for one in (make_input("hubert"), {"input_values": make_input("hubert")}):
            with pytest.raises(
                ValueError, match=r"batches must be an iterable of batches, such as \[batch\]"
            ):
                mam.similarity(target, source, one, [])

    @pytest.mark.parametrize("side", ["target", "source"])
    def test_states_that_are_not_finite_have_no_order(self, side):
        target, source = TINY["hubert"].build(), source_of()
        layer = target.encoder.layers[1] if side == "target" else source.encoder.layer[1]
        with torch.no_grad():
            [*layer.parameters()][-1][0] = float("nan")
        with pytest.raises(ValueError, match=f"the {side} has hidden states .* not finite, first in layer 1"):
            mam.similarity(target, source, self.batches("hubert"), self.batches("bert", mask=False))


def test_the_package_imports_no_torch():
    """The command line lists the folder's command in its help."""
    code = "import sys, mmtransfer.mam as mam; print('torch' in sys.modules, mam.COMPARED, dir(mam) != [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False () True\n"
    # A module of the package must not hide a function of its name, which comes with the first use.
    for name in mam.__all__:
        assert getattr(mam, name) == getattr(mam, name)
        assert not inspect.ismodule(getattr(mam, name))
