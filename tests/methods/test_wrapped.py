"""Models inside wrappers: compiled, parallel, in peft, in a class of the user; looked through, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from classifiers import HEADS, build_classifier, logits
from prepared_models import perturb
from safetensors.torch import load_file
from tiny_encoders import TINY, make_input
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import mmkernels
import mmtransfer
from mmkernels.wrappers import unwrap
from mmtransfer import AdaptedModel, TappedEncoder, prepare
from mmtransfer.encoders import DESCRIPTIONS, Encoder
from mmtransfer.tasks import Classification

peft = pytest.importorskip("peft")


class Own(nn.Module):
    """As people write them, for a loss or for a logger; some have the configuration, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class WithoutConfig(Own):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        del self.config


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def merged_by_peft(model: nn.Module) -> Any:
    """A peft model whose LoRA is not trained any more."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], inference_mode=True))
    return wrapped.requires_grad_(False)


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


SEEN_THROUGH: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "compile in place": compiled_in_place,
    "own": Own,
    "own without config": WithoutConfig,
    "own in own": lambda model: WithoutConfig(Own(model)),
    "sequential": nn.Sequential,
    "own of compiled": lambda model: nn.Sequential(compiled(model)),
    "averaged": AveragedModel,
    "checkpoint wrapper": checkpoint_wrapper,
    "peft": merged_by_peft,
    "compiled peft": lambda model: compiled(merged_by_peft(model)),
}
PARALLEL: dict[str, Callable[[nn.Module], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "dp": nn.DataParallel,
}


@pytest.mark.parametrize("model_type", HEADS)
@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_preparing_a_wrapped_model_trains_what_preparing_the_model_trains(name, model_type):
    if "peft" in name and model_type == "bert":
        pytest.skip("its projections have other names")
    expected = prepare(build_classifier(model_type), "aat-ms")
    assert {each.partition(".")[0] for each in expected.head} == HEADS[model_type]
    wrapped = SEEN_THROUGH[name](build_classifier(model_type))
    found = prepare(wrapped, "aat-ms")
    assert found.trainable == expected.trainable
    assert mmtransfer.get_prepared(wrapped) is found
    assert mmtransfer.get_prepared(unwrap(wrapped)) is found
    with pytest.raises(ValueError, match=r"prepared already, with 'aat-ms'"):
        prepare(wrapped, "aat-m")
    with pytest.raises(ValueError, match=r"(prepared|edited) already"):
        prepare(unwrap(wrapped), "aat-m")
    mmtransfer.revert(wrapped)
    with pytest.raises(ValueError, match="is not prepared"):
        mmtransfer.get_prepared(wrapped)


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place])
def test_a_compiled_model_that_ran_is_compiled_again_after_prepare(wrap):
    model = build_classifier()
    wrapped = wrap(model)
    before = logits(wrapped)
    prepared = prepare(wrapped, "aat-ms")
    perturb(model)
    torch.testing.assert_close(logits(wrapped), logits(copy.deepcopy(model)))
    assert not torch.allclose(logits(wrapped), before)
    logits(wrapped).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in prepared.trainable)
    mmtransfer.revert(wrapped)
    head = build_classifier()
    head.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(wrapped), logits(head))


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_model_is_prepared_before(name, group):
    model = build_classifier()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    wrapped = PARALLEL[name](model)
    for change in (
        lambda: prepare(wrapped, "aat-ms"),
        lambda: AdaptedModel(wrapped, "aat-ms"),
        lambda: TappedEncoder(wrapped, (0,)),
    ):
        with pytest.raises(ValueError, match=r"model is in D\w*DataParallel|model is in DataParallel"):
            change()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert Encoder(wrapped).root is model


def test_a_sharded_model_is_prepared_before(group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole = FullyShardedDataParallel(build_classifier(), device_id=torch.device("cpu"), use_orig_params=True)
    in_place = fully_shard(
        build_classifier(), mesh=torch.distributed.init_device_mesh("cpu", mesh_shape=(1,))
    )
    for model, name in ((whole, "FullyShardedDataParallel"), (in_place, "FSDPModule")):
        with pytest.raises(ValueError, match=f"model is in {name}, which would not see"):
            prepare(model, "aat-ms")


@pytest.mark.parametrize("method", ["aat-ms", "lora"])
@pytest.mark.parametrize("name", ["compile", "own", "own without config", "sequential", *PARALLEL])
def test_saved_from_inside_a_wrapper(name, method, group, tmp_path):
    model = build_classifier()
    prepare(model, method)
    perturb(model)
    wrapped = {**SEEN_THROUGH, **PARALLEL}[name](model)
    mmtransfer.save(wrapped, tmp_path / "wrapped")
    mmtransfer.save(model, tmp_path / "plain")
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("wrapped", "plain"))
    assert first.keys() == second.keys() == set(mmtransfer.get_prepared(model).trainable)
    assert all(torch.equal(first[key], second[key]) for key in second)
    other = build_classifier()
    mmtransfer.load_prepared(compiled(other), tmp_path / "wrapped")
    torch.testing.assert_close(logits(other), logits(model))
    # Again, now that it is prepared, through the wrapper of the training.
    mmtransfer.load_prepared({**SEEN_THROUGH, **PARALLEL}[name](other), tmp_path / "plain")


@pytest.mark.parametrize("name", ["compile", "ddp", "dp", "sequential"])
def test_an_adapted_model_saved_from_inside_a_wrapper(name, group, tmp_path):
    model = AdaptedModel(TINY["bert"].build(), "aat-ms", Classification(num_labels=3)).eval()
    mmtransfer.save({**SEEN_THROUGH, **PARALLEL}[name](model), tmp_path)
    other = mmtransfer.load(tmp_path, compiled(TINY["bert"].build()))
    inputs = make_input("bert")
    assert torch.equal(other(input_ids=inputs).logits, model(input_ids=inputs).logits)


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_adapting_a_wrapped_model(name):
    inputs = make_input("wav2vec2")
    expected = TappedEncoder(build_classifier(), (0, 3))(inputs).features
    wrapped = SEEN_THROUGH[name](build_classifier())
    assert torch.equal(TappedEncoder(wrapped, (0, 3))(inputs).features, expected)
    model = AdaptedModel(wrapped, "hff-b", taps=[0, 3])
    assert model.readout.taps == 2


def test_compiled_layers_are_changed_inside(tmp_path):
    """Names in the checkpoint are those of the plain model."""
    plain = build_classifier()
    expected = prepare(plain, "aat-ms")
    model = build_classifier()
    layers = model.wav2vec2.encoder.layers
    for index, layer in enumerate(layers):
        layers[index] = compiled(layer)
    before = logits(model)
    found = prepare(model, "aat-ms")
    assert found.trainable == expected.trainable
    assert torch.allclose(logits(model), before)
    perturb(model)
    mmtransfer.save(model, tmp_path)
    mmtransfer.load_prepared(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model))
    found.revert()
    assert not any("adapter" in name for name, _ in model.named_modules())


class TestPeft:
    def test_a_trained_lora_is_not_frozen_without_a_word(self):
        model = peft.get_peft_model(build_classifier(), peft.LoraConfig(target_modules=["q_proj"]))
        flags = [parameter.requires_grad for parameter in model.parameters()]
        for change in (prepare, AdaptedModel):
            for each in (model, model.get_base_model()):
                with pytest.raises(ValueError, match=r"q_proj\.lora_A of peft is trained.*merge"):
                    change(each, "aat-ms")
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert prepare(model.merge_and_unload(), "aat-ms").head == [
            "projector",
            "classifier",
            "layer_weights",
        ]

    def test_features_of_a_trained_lora(self):
        model = peft.get_peft_model(build_classifier(), peft.LoraConfig(target_modules=["q_proj"]))
        TappedEncoder(model, (0,))(make_input("wav2vec2"))


class TestHeads:
    """A head that is neither in the encoder nor next to it is not frozen without a word."""

    def test_beside_the_encoder_in_one_child(self):
        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wav2vec2 = build_classifier().wav2vec2
                self.top = nn.Linear(16, 3)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Body()
                self.last = nn.Linear(3, 3)

        model = Model()
        description = replace(DESCRIPTIONS["wav2vec2"], encoder=("body.wav2vec2",))
        with pytest.raises(ValueError, match=r"body\.top\.weight is neither in the encoder .* name the head"):
            prepare(model, "aat-m", description=description)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(key.startswith("_mmtransfer") for m in model.modules() for key in m.__dict__)
        found = prepare(model, "aat-m", description=description, head=["body.top", "last"])
        assert {"body.top.weight", "last.weight"} <= set(found.trainable)
        found.revert()
        assert prepare(model, "aat-m", description=description, head=[]).head == []

    def test_a_wrapper_with_a_parameter_of_its_own(self):
        """The encoder's path fits the wrapper, too, so its head would be inside the only child."""
        wrapper = Own(build_classifier("whisper"))
        wrapper.temperature = nn.Parameter(torch.ones(()))
        with pytest.raises(ValueError, match="name the head"):
            prepare(wrapper, "aat-m")
        names = prepare(wrapper, "aat-m", head=["temperature", "model.classifier"]).trainable
        assert {"temperature", "model.classifier.weight"} <= set(names)

    def test_a_prepared_part_is_named(self):
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = TINY["bert"].build()
                self.top = nn.Linear(16, 3)

        model = Pair()
        prepare(model.encoder, "aat-m")
        with pytest.raises(ValueError, match="Pair is not prepared; its part 'encoder' is, give that"):
            mmtransfer.get_prepared(model)


class TestAccelerate:
    def test_names_inside_and_outside_of_wrappers(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.adapter = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

        for name in ("adapter", "_orig_mod.adapter", "*.adapter"):
            report = mmkernels.accelerate(compiled(Net()), adapters=[name])
            assert [each.name for each in report.replaced] == ["_orig_mod.adapter"]
            assert report.skipped == []
            report.revert()

    def test_a_compiled_model_that_ran(self):
        model = build_classifier()
        wrapped = compiled(model)
        before = logits(wrapped)
        report = mmkernels.accelerate(wrapped)
        assert [each.name for each in report.replaced] == ["_orig_mod"]
        # The wrapper hands out the attributes of the model; it is no module with layer weights.
        assert report.skipped == []
        with torch.profiler.profile() as profile:
            after = logits(wrapped)
        assert any("mmkernels" in event.key for event in profile.key_averages())
        torch.testing.assert_close(after, before)
        report.revert()
        torch.testing.assert_close(logits(wrapped), before)

    @pytest.mark.parametrize("first", ["prepare", "accelerate"])
    @pytest.mark.parametrize("last", ["prepare", "accelerate"])
    def test_prepared_and_accelerated_in_any_order(self, first, last):
        model = build_classifier("whisper")
        plain = prepare(twin := build_classifier("whisper"), "aat-ms", backend="reference")
        perturb(twin)
        before = {type(module) for module in model.modules()}
        undo: dict[str, Any] = {}
        for step in (first, "prepare" if first == "accelerate" else "accelerate"):
            if step == "prepare":
                undo[step] = prepare(model, "aat-ms", backend="reference")
            else:
                undo[step] = mmkernels.accelerate(model)
                assert len(undo[step].replaced) == 1
        for name in plain.trainable:
            with torch.no_grad():
                model.get_parameter(name).copy_(twin.get_parameter(name))
        torch.testing.assert_close(logits(model, "whisper"), logits(twin, "whisper"))
        copied = copy.deepcopy(model)
        torch.testing.assert_close(logits(copied, "whisper"), logits(twin, "whisper"))
        for step in (last, "prepare" if last == "accelerate" else "accelerate"):
            undo[step].revert()
        assert {type(module) for module in model.modules()} == before
        mmtransfer.revert(twin)
        torch.testing.assert_close(logits(model, "whisper"), logits(twin, "whisper"))


def test_a_wrapper_of_a_model_without_a_library_is_no_wrapper():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    net = Net()
    assert unwrap(net) is net
    assert unwrap(nn.Sequential(net)) is not net


def test_the_configuration_names_the_model_and_not_the_wrapper(tmp_path):
    model = build_classifier()
    prepare(model, "head")
    mmtransfer.save(compiled(model), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"]["model_type"] == "wav2vec2"
    assert "thawed" not in config
