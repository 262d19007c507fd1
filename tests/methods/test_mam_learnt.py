"""L-MAM: values and gradients of the merged attention, merging once a step, checkpoints, and folding."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
import transformers
from classifiers import build_classifier
from prepared_models import build, encode, gradients, weigh
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainingArguments

import mmtransfer
from mmtransfer import AdaptedModel, mam, registry
from mmtransfer.encoders import Encoder, TappedEncoder
from mmtransfer.mam import learnable
from mmtransfer.mam.learnable import LayerMerge, Merging, find_merging
from mmtransfer.mam.projections import find_projections
from mmtransfer.tasks import Classification

#: Called, not called, without a bias of the keys, and transposed with all three in one weight.
TYPES = ("wav2vec2", "wavlm", "whisper", "gpt2")
TASK = Classification(num_labels=3)


def source_of(model_type: str = "bert", **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    return TINY[model_type].build(**changes)


def learnt(model: nn.Module, **options: Any) -> nn.Module:
    """A prepared copy whose layers have different shares."""
    model = copy.deepcopy(model)
    mmtransfer.prepare(model, "l-mam", **{"source": source_of(), "initial": 0.3, **options})
    with torch.no_grad():
        for index, lam in enumerate(shares_of(model)):
            lam.add_(0.1 * index)
    return model


def shares_of(model: nn.Module) -> list[nn.Parameter]:
    found = [each.lam for each in model.modules() if isinstance(each, LayerMerge)]
    return [lam for lam in found if lam is not None]


def merging_of(model: nn.Module) -> Merging:
    found = find_merging(model)
    assert found is not None
    return found


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


def disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in parameters:
            each.add_(0.05 * torch.randn(each.shape, generator=generator).to(each))


class TestValues:
    @pytest.mark.parametrize("model_type", TYPES)
    def test_share_0_is_the_target_bit_for_bit(self, model_type):
        plain = build(model_type)
        model = copy.deepcopy(plain)
        mmtransfer.prepare(model, "l-mam", source=source_of(), initial=0.0)
        assert torch.equal(encode(model), encode(plain))
        with torch.no_grad():
            shares_of(model)[2].fill_(0.2)
        assert not torch.allclose(encode(model), encode(plain), atol=1e-4)

    @pytest.mark.parametrize("model_type", TYPES)
    def test_it_is_the_model_that_merge_makes(self, model_type):
        plain, source = build(model_type), source_of()
        model = learnt(plain, source=source)
        shares = list(mam.shares(model).values())
        assert shares == pytest.approx([0.3, 0.4, 0.5, 0.6])
        mam.merge(plain, source, [float(each) for each in shares_of(model)])
        torch.testing.assert_close(encode(model), encode(plain))
        with torch.no_grad():
            for each in shares_of(model):
                each.fill_(1.0)
        encode(model)
        for slot, value in zip(merging_of(model).slots, merging_of(model)._held.values, strict=True):
            if slot.projection.fused is None:
                theirs = find_projections(source, [slot.projection.layer], [slot.projection.part])[0].view
                assert torch.equal(value, theirs.double())

    @pytest.mark.parametrize("constraint", ["none", "clamp", "sigmoid"])
    @pytest.mark.parametrize("per", ["layer", "matrix", "global"])
    @pytest.mark.parametrize("model_type", ["wav2vec2", "gpt2"])
    def test_gradients_are_those_of_the_expression(self, model_type, per, constraint):
        model = learnt(build(model_type), per=per, constraint=constraint, bias=True)
        found = gradients(model)
        merging_of(model).as_published = True
        expected = gradients(model)
        assert any(name.endswith(".lam") for name in expected)
        assert_same(found, expected)

    def test_gradients_against_finite_differences(self):
        model = learnt(
            build("wav2vec2", num_hidden_layers=2), per="matrix", source=source_of(num_hidden_layers=2)
        )
        found, step = gradients(model), 1e-6
        chosen = [name for name in found if name.endswith(("lam", "q_proj.weight", "v_proj.weight"))]
        assert len(chosen) == 2 + 4
        for name in chosen:
            parameter = model.get_parameter(name)
            flat = parameter.data.view(-1)
            for index in range(0, len(flat), max(len(flat) // 5, 1)):
                values = []
                for change in (step, -2 * step, step):
                    values.append(float(weigh(encode(model)).detach()))
                    with torch.no_grad():
                        parameter.view(-1)[index] += change
                # Before the changes, above, and below.
                numeric = (values[1] - values[2]) / (2 * step)
                assert float(found[name].view(-1)[index]) == pytest.approx(numeric, rel=1e-4, abs=1e-6)

    def test_layers_outside_the_subset_are_untouched(self):
        plain = build("wav2vec2")
        model = learnt(plain, layers=[1, 2])
        assert list(mam.shares(model)) == ["layer 1", "layer 2"]
        encode(model)
        touched = {slot.projection.layer for slot in merging_of(model).slots}
        assert touched == {1, 2}
        assert all("forward" not in each.__dict__ for each in model.encoder.layers[0].modules())

    def test_numbers_of_shares(self):
        for layers, width in ((24, 1024), (12, 768)):
            sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
            with torch.device("meta"):
                model = transformers.HubertModel(transformers.HubertConfig(**sizes)).to("meta")
                source = transformers.BertModel(transformers.BertConfig(**sizes)).to("meta")
            prepared = mmtransfer.prepare(model, "l-mam", source=source)
            lam = [name for name in prepared.trainable if name.endswith("attention_merge.lam")]
            assert sum(model.get_parameter(name).numel() for name in lam) == layers
            kept = [each for name, each in model.named_buffers() if "source_" in name]
            assert sum(each.numel() for each in kept) == 3 * layers * width**2

    def test_a_clamped_share_acts_as_the_end_and_comes_back(self):
        model = learnt(build("wav2vec2"), constraint="clamp")
        with torch.no_grad():
            shares_of(model)[0].fill_(1.2)
        assert mam.shares(model)["layer 0"] == 1.0
        grads = []
        for sign in (1, -1):
            model.zero_grad()
            (sign * weigh(encode(model))).backward()
            grads.append(float(shares_of(model)[0].grad))
        assert sorted(value == 0 for value in grads) == [False, True]
        assert max(grads) > 0  # descent leads back only


class TestTraining:
    def test_the_source_gets_no_gradient_and_is_not_changed(self):
        source = source_of()
        before = copy.deepcopy(source.state_dict())
        model = learnt(build("wav2vec2"), source=source)
        kept = {name: each.clone() for name, each in model.named_buffers() if "source_" in name}
        assert len(kept) == 12
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        weigh(encode(model)).backward()
        optimizer.step()
        assert all(each.grad is None for each in source.parameters())
        assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
        for name, value in kept.items():
            buffer = model.get_buffer(name)
            assert not buffer.requires_grad
            assert torch.equal(buffer, value)
        assert not any("source_" in name for name, _ in model.named_parameters())

    def test_accumulation_equals_one_batch_and_merges_once(self):
        model = learnt(build("wav2vec2")).train(False)
        inputs = make_input("wav2vec2", batch=8).double()
        merging = merging_of(model)
        weigh_all = torch.randn(encode(model, inputs).shape, dtype=torch.float64)
        model.zero_grad()
        (encode(model, inputs) * weigh_all).sum().backward()
        # Gradients that are set to None stand for a step.
        whole, count = grads_of(model), merging.count + 1
        model.zero_grad()
        for part, weights in zip(inputs.split(2), weigh_all.split(2), strict=True):
            (encode(model, part) * weights).sum().backward()
        assert_same(grads_of(model), whole)
        assert merging.count == count
        with torch.no_grad():
            encode(model)
        assert merging.count == count

    def test_accumulation_with_clipping_and_a_scaled_loss(self):
        model = learnt(build("wav2vec2"))
        twin = copy.deepcopy(model)
        merging_of(twin).as_published = True
        results = []
        for each in (model, twin):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                for part in make_input("wav2vec2", batch=4).double().split(2):
                    (weigh(encode(each, part)) / 2 * 1024).backward()
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= 1024
                nn.utils.clip_grad_norm_(each.parameters(), 0.1)
                optimizer.step()
            results.append({name: value.detach().clone() for name, value in each.named_parameters()})
        assert_same(*results)
        assert merging_of(model).count == 2

    @pytest.mark.parametrize("kind", ["SGD", "AdamW", "data"])
    def test_a_step_changes_the_merged_weights(self, kind):
        class ThroughData(torch.optim.Optimizer):
            """Writes past the version counters."""

            def __init__(self, parameters: Any) -> None:
                super().__init__(parameters, {})

            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.add_(parameter.grad.data, alpha=-0.1)

        model = learnt(build("wav2vec2"))
        twin = copy.deepcopy(model)
        merging_of(twin).as_published = True
        makers = {"data": ThroughData}
        results = []
        for each in (model, twin):
            parameters = [p for p in each.parameters() if p.requires_grad]
            weigh(encode(each)).backward()
            parameters = [p for p in parameters if p.grad is not None]
            maker = makers.get(kind) or (lambda of: getattr(torch.optim, kind)(of, lr=0.1))
            optimizer = maker(parameters)
            found = [encode(each).detach()]
            for _ in range(2):
                optimizer.step()
                optimizer.zero_grad()
                output = encode(each)
                weigh(output).backward()
                found.append(output.detach())
            results.append(found)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(results[0][0], results[0][1])
        assert not torch.allclose(results[0][1], results[0][2])
        assert merging_of(model).count == 3

    def test_a_step_without_an_optimiser(self):
        """Through `.data`, which no version counter sees."""
        model = learnt(build("wav2vec2"))
        twin = copy.deepcopy(model)
        merging_of(twin).as_published = True
        results = []
        for each in (model, twin):
            for _ in range(3):
                each.zero_grad()
                weigh(encode(each)).backward()
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.data.add_(parameter.grad, alpha=-0.1)
            results.append({name: value.detach().clone() for name, value in each.named_parameters()})
        assert_same(*results)
        assert merging_of(model).count == 3

    @pytest.mark.parametrize("change", ["in place", "new data", "load", "lam"])
    def test_other_changes_of_weights_are_seen(self, change):
        model = learnt(build("wav2vec2"))
        before = encode(model)
        weight = model.encoder.layers[1].attention.k_proj.weight
        with torch.no_grad():
            if change == "in place":
                weight.mul_(2)
            elif change == "new data":
                weight.data = weight.data * 2
            elif change == "load":
                state = model.state_dict()
                state["encoder.layers.1.attention.k_proj.weight"] = weight * 2
                model.load_state_dict(state)
            else:
                shares_of(model)[1].mul_(2)
        twin = copy.deepcopy(model)
        assert torch.equal(encode(model), encode(twin))
        assert not torch.allclose(encode(model), before)

    def test_averaged_weights_are_seen_in_eval_mode(self):
        """An average of weights is swapped in by `.data`, which no version counter sees."""
        model = learnt(build("wav2vec2")).train()
        encode(model)
        weight = model.encoder.layers[1].attention.k_proj.weight
        weight.data.mul_(2)
        model.eval()
        assert torch.equal(encode(model), encode(copy.deepcopy(model)))
        weight.data.mul_(0.5)
        model.train()
        encode(model)
        model.eval()
        assert torch.equal(encode(model), encode(copy.deepcopy(model)))

    @pytest.mark.parametrize("told_by", ["gradients", "mode"])
    def test_what_is_written_through_data(self, told_by):
        """By a loop without an optimiser, and by averaged weights that take the place of the trained ones."""
        model = learnt(build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        for step in range(2):
            weigh(encode(model)).backward()
            encode(model)
            for each in model.parameters():
                if each.grad is not None:
                    each.data -= 1e-3 * each.grad
            if told_by == "gradients":
                model.zero_grad()
            else:
                model.train(step == 1)
            assert torch.equal(encode(model), encode(copy.deepcopy(model)))

    def test_a_backward_pass_after_a_step_is_refused(self):
        model = learnt(build("wav2vec2"))
        loss = weigh(encode(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weigh(encode(model)).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"overwritten|modified by an inplace"):
            loss.backward()

    @pytest.mark.parametrize("model_type", ["wav2vec2", "wavlm", "gpt2"])
    def test_autocast_has_merged_weights_of_its_dtype(self, model_type):
        model = learnt(build(model_type).float())
        inputs = make_input(model_type)
        found = {}
        for name in ("ours", "published"):
            merging_of(model).as_published = name == "published"
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(inputs).last_hidden_state
            weigh(output.float()).backward()
            found[name] = output.detach(), grads_of(model)
        held = merging_of(model)._held
        assert held is not None
        assert {value.dtype for value in held.values} == {torch.bfloat16}
        for name, grad in found["published"][1].items():
            ours = found["ours"][1][name]
            assert ours.dtype == torch.float32
            assert (ours - grad).norm() <= 0.1 * grad.norm() + 1e-2
        count = merging_of(model).count
        merging_of(model).as_published = False
        model(inputs)
        assert merging_of(model).count == count + 1
        assert {value.dtype for value in merging_of(model)._held.values} == {torch.float32}

    @pytest.mark.parametrize("kind", ["full", "selective", "reentrant"])
    def test_recomputed_layers(self, kind):
        changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        plain = build("bert", **changes)
        expected = gradients(learnt(plain))
        model = learnt(plain, **({} if kind == "reentrant" else {"recompute": kind})).train()
        if kind == "reentrant":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        merging = merging_of(model)
        for _ in range(2):
            model.zero_grad()
            weigh(encode(model)).backward()
            assert_same(grads_of(model), expected)
        # Twice a step where layers run without a graph first.
        assert merging.count <= (4 if kind == "reentrant" else 2)

    def test_trained_shares_alone(self):
        model = learnt(build("wav2vec2"), train_target=False)
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        assert len(trained) == 4
        assert all(name.endswith("attention_merge.lam") for name in trained)
        found = gradients(model)
        merging_of(model).as_published = True
        assert_same(found, gradients(model))

    def test_gradients_of_gradients_and_transforms(self):
        model = learnt(
            build("wav2vec2", num_hidden_layers=1, attn_implementation="eager"),
            source=source_of(num_hidden_layers=1),
        )
        lam = shares_of(model)[0]
        found = []
        for published in (False, True):
            merging_of(model).as_published = published
            (first,) = torch.autograd.grad(encode(model).square().sum(), lam, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), lam)
            parameters = {"encoder.layers.0.attention_merge.lam": lam.detach()}

            def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
                output = torch.func.functional_call(model, given, make_input("wav2vec2").double())
                return output.last_hidden_state.square().sum()

            inside = torch.func.grad(loss)(parameters)
            found.append([first.detach(), second, *inside.values()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_memory_of_merging(self, monkeypatch):
        """The values of before are gone when new ones are made."""
        model = learnt(build("wav2vec2"))
        merging, seen = merging_of(model), []
        original = learnable.merge_blocks

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(merging._held)
            return original(*args, **kwargs)

        monkeypatch.setattr(learnable, "merge_blocks", spy)
        for _ in range(2):
            with torch.no_grad():
                shares_of(model)[0].add_(1)
            encode(model)
            assert sum(value.numel() for value in merging._held.values) == 12 * 256
        assert seen == [None, None]


class TestCopies:
    @pytest.mark.parametrize("model_type", TYPES)
    def test_a_deep_copy_is_of_its_own(self, model_type):
        model = learnt(build(model_type))
        weigh(encode(model)).backward()
        twin = copy.deepcopy(model)
        before = encode(model).detach()
        assert torch.equal(encode(twin), before)
        with torch.no_grad():
            for each in shares_of(twin):
                each.zero_()
        assert not torch.allclose(encode(twin), before, atol=1e-4)
        assert torch.equal(encode(model), before)
        mmtransfer.revert(twin)
        assert torch.equal(encode(model), before)

    def test_a_pickled_model(self):
        model = learnt(build("bert"))
        expected = encode(model).detach()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(encode(torch.load(file, weights_only=False)), expected)

    @pytest.mark.parametrize("model_type", TYPES)
    def test_reverting_gives_the_model_back(self, model_type):
        plain = build(model_type)
        model = copy.deepcopy(plain)
        prepared = mmtransfer.prepare(model, "l-mam", source=source_of(), initial=0.5)
        encode(model)
        prepared.revert()
        assert list(model.state_dict()) == list(plain.state_dict())
        assert torch.equal(encode(model), encode(plain))
        assert not any(type(each).__name__ == "MergedLinear" for each in model.modules())


class TestWithAdapters:
    @pytest.mark.parametrize("method", ["l-mam+aat-ms", "aat-ms+l-mam"])
    def test_both_edits_act_and_are_trained(self, method):
        """As merging first and adding the same adapters then."""
        source = source_of()
        model, merged = build("wav2vec2"), build("wav2vec2")
        mmtransfer.prepare(model, method, source=source, initial=0.3)
        mam.merge(merged, source, 0.3)
        mmtransfer.prepare(merged, "aat-ms")
        adapters = {name: each for name, each in model.named_parameters() if "adapter_" in name}
        disturb(adapters.values())
        merged.load_state_dict(adapters, strict=False)
        torch.testing.assert_close(encode(model), encode(merged), rtol=1e-12, atol=1e-12)
        weigh(encode(model)).backward()
        named = dict(model.named_parameters())
        for part in (
            "attention_merge.lam",
            "adapter_attention.up_weight",
            "adapter_mlp.down_weight",
            "q_proj",
        ):
            found = [each.grad for name, each in named.items() if part in name]
            assert found, part
            assert any(grad is not None and grad.any() for grad in found), part

    def test_lora_comes_afterwards(self):
        plain = build("wav2vec2")
        with pytest.raises(ValueError, match=r"got none; remove .* LoRA, .* \(l-mam\+lora\)"):
            mmtransfer.prepare(plain, "lora+l-mam", source=source_of())
        expected = encode(plain)
        mmtransfer.prepare(plain, "l-mam+lora", source=source_of(), initial=0.0)
        assert torch.equal(encode(plain), expected)

    def test_rates_and_taking_back(self):
        model = TINY["wav2vec2"].build()
        names = list(model.state_dict())
        adapted = AdaptedModel(model, "hff-b+l-mam+aat-ms", TASK, source=source_of(), lambda_rate=0.5)
        assert adapted.parameter_groups()["lambda"].learning_rate == 0.5
        # Adapters' rate would ruin the weights that are trained with them.
        assert adapted.method.training == registry.find("l-mam").training
        assert adapted.method.starts_from == "hff-b"
        adapted.revert()
        assert list(model.state_dict()) == names


class TestFolding:
    @pytest.mark.parametrize("model_type", TYPES)
    def test_a_prepared_model(self, model_type, tmp_path):
        model = learnt(build(model_type))
        expected, names = encode(model).detach(), list(build(model_type).state_dict())
        plain = mam.fold(model)
        assert plain is model
        assert type(plain).__name__ == TINY[model_type].model_class.replace("WhisperModel", "WhisperEncoder")
        assert list(plain.state_dict()) == names
        torch.testing.assert_close(encode(plain), expected, rtol=1e-12, atol=1e-12)
        if model_type != "whisper":
            plain.save_pretrained(tmp_path)
            again = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
            torch.testing.assert_close(encode(again), expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="no learnt merging in force"):
            mam.fold(plain)

    @pytest.mark.parametrize("method", ["l-mam", "hff-b+l-mam", "l-mam+aat-ms", "hff-b+aat-ms+l-mam"])
    def test_checkpoints_before_and_after(self, method, tmp_path):
        model = AdaptedModel(TINY["wav2vec2"].build(), method, TASK, source=source_of(), initial=0.2).eval()
        # Adapters start as zero.
        disturb(model.encoder.edit.parameters)
        inputs = make_input("wav2vec2")
        expected = model(inputs).logits.detach()
        model.save_pretrained(tmp_path / "merged")
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config["options"]["l-mam"]["source"] == "BertModel"
        # No source is at hand: `BertModel` is no folder.
        loaded = mmtransfer.load(tmp_path / "merged", TINY["wav2vec2"].build())
        assert torch.equal(loaded(inputs).logits, expected)
        for each in (model, loaded):
            folded = mam.fold(each)
            assert folded is each
            torch.testing.assert_close(folded(inputs).logits, expected)
            assert not shares_of(folded)
            folded.save_pretrained(tmp_path / "folded")
            again = mmtransfer.load(tmp_path / "folded", TINY["wav2vec2"].build())
            torch.testing.assert_close(again(inputs).logits, expected)

    def test_a_model_that_is_not_folded_is_not_merged(self):
        """Its parameters are not the weights that it computes with."""
        model, plain = learnt(build("wav2vec2")), build("wav2vec2")
        before = copy.deepcopy(model.state_dict())
        for target, source, name in ((model, plain, "target"), (plain, model, "source")):
            for call in (
                lambda target=target, source=source: mam.merge(target, source, 0.5),
                lambda target=target, source=source: mam.merge(target, mam.Noise(source), 0.5),
                lambda target=target, source=source: mam.sweep(target, source, [0.5], encode),
            ):
                with pytest.raises(ValueError, match=f"the {name} has learnt merging .* fold it first"):
                    call()
        assert_same(model.state_dict(), before)
        mam.merge(plain, mam.fold(model), 1.0)
        torch.testing.assert_close(encode(plain), encode(model))

    def test_a_prepared_model_with_adapters_is_left_alone(self):
        model = build("wav2vec2")
        mmtransfer.prepare(model, "l-mam+aat-ms", source=source_of(), initial=0.3)
        expected = encode(model)
        with pytest.raises(ValueError, match="the model has aat-ms too"):
            mam.fold(model)
        assert torch.equal(encode(model), expected)

    def test_a_prepared_checkpoint(self, tmp_path):
        model = learnt(build_classifier())
        expected = model(make_input("wav2vec2")).logits.detach()
        mmtransfer.save(model, tmp_path)
        fresh = build_classifier()
        mmtransfer.load_prepared(fresh, tmp_path)
        assert torch.equal(fresh(make_input("wav2vec2")).logits, expected)
        assert mam.shares(fresh) == mam.shares(model)


class Clips(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_values": make_input("wav2vec2", batch=8)[index], "labels": index % 3}


def test_the_trainer_resumes(tmp_path):
    """Two epochs in one go, and with an interruption after the first, are the same."""

    def trained(folder: str, resume: bool, epochs: int) -> nn.Module:
        model = build_classifier()
        mmtransfer.prepare(model, "l-mam", source=source_of(), initial=0.2)
        arguments = TrainingArguments(
            str(tmp_path / folder), num_train_epochs=epochs, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, save_strategy="epoch", report_to=[], disable_tqdm=True,
            lr_scheduler_type="constant", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Clips())
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained("whole", False, 2)
    trained("parts", False, 1)
    parts = trained("parts", True, 2)
    assert_same(dict(parts.named_parameters()), dict(whole.named_parameters()))
    assert mam.shares(whole) != pytest.approx({f"layer {index}": 0.2 for index in range(4)}, abs=1e-4)
    # Two steps an epoch, and what evaluates or saves merges no more.
    assert merging_of(whole).count <= 5


class TestMethod:
    def test_the_source_has_to_be_given(self):
        plain = build("wav2vec2")
        with pytest.raises(ValueError, match=r"'l-mam' needs a source .* width 16"):
            mmtransfer.prepare(plain, "l-mam")
        with pytest.raises(mmtransfer.data.DataError, match="does not exist"):
            mmtransfer.prepare(plain, "l-mam", source="/nowhere/at/all")
        with pytest.raises(ValueError, match="equally wide"):
            mmtransfer.prepare(plain, "l-mam", source=source_of(hidden_size=8))
        assert not any(isinstance(each, LayerMerge) for each in plain.modules())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"per": "head"}, "per must be one of"),
            ({"constraint": "sigmoid", "initial": 0.0}, "initial must be between 0 and 1"),
            ({"constraint": "clamp", "initial": 1.5}, r"initial must be in \[0, 1\]"),
            ({"projections": ["o"]}, "parts must be some of"),
            ({"source_dtype": "float16"}, "source_dtype must be one of"),
            ({"lambda_rate": -1.0}, "lambda_rate"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            registry.find("l-mam", **options)

    @pytest.mark.parametrize("form", ["model", "encoder", "folder", "noise", "text"])
    def test_forms_of_the_source(self, form, tmp_path):
        source = source_of()
        source.save_pretrained(tmp_path)
        forms = {"model": source, "encoder": Encoder(source), "folder": str(tmp_path), "noise": mam.Noise(),
                 "text": "N(0,1)"}  # fmt: skip
        plain = build("wav2vec2")
        model = learnt(plain, source=forms[form])
        mam.merge(plain, forms[form], [float(each) for each in shares_of(model)])
        torch.testing.assert_close(encode(model), encode(plain))

    def test_a_source_in_bfloat16(self):
        plain, source = build("wav2vec2").float(), source_of()
        model = learnt(plain, source=source, source_dtype="bfloat16")
        kept = [each for name, each in model.named_buffers() if "source_" in name]
        assert {each.dtype for each in kept} == {torch.bfloat16}
        mam.merge(plain, copy.deepcopy(source).bfloat16(), [float(each) for each in shares_of(model)])
        inputs = make_input("wav2vec2")
        torch.testing.assert_close(model(inputs).last_hidden_state, plain(inputs).last_hidden_state)

    def test_the_shares_have_a_rate_of_their_own(self):
        model = AdaptedModel(TINY["wav2vec2"].build(), "l-mam", TASK, source=source_of(), lambda_rate=0.5)
        (group,) = model.parameter_groups().values()
        assert (len(group.parameters), group.learning_rate) == (4, 0.5)
        assert list(model.method.insights(model)["lambda"]) == [f"layer {index}" for index in range(4)]

    def test_the_baseline_merges_in_every_call_and_has_the_same_state(self):
        model = AdaptedModel(TINY["wav2vec2"].build(), "hff-b+l-mam", TASK, source=source_of()).eval()
        twin = model.method.baseline(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        inputs = make_input("wav2vec2")
        torch.testing.assert_close(twin(inputs).logits, model(inputs).logits)
        assert (merging_of(twin).count, merging_of(model).count) == (0, 1)

    def test_only_layers_up_to_the_last_tap(self):
        encoder = TappedEncoder(TINY["bert"].build(), (0, 2))
        encoder.edit = registry.find("l-mam", source=source_of()).edit(encoder.parts)
        assert len(shares_of(encoder)) == 3

    def test_shares_of_what_has_none(self):
        with pytest.raises(ValueError, match="no learnt merging"):
            mam.shares(build("bert"))


def test_a_compiled_layer():
    model = learnt(build("bert"))
    expected, found = encode(model).detach(), gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    torch.testing.assert_close(encode(compiled), expected)
    model.zero_grad()
    weigh(encode(compiled)).backward()
    assert_same(grads_of(model), found)
