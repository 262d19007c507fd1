"""``accelerate`` on the attention adapters of transformers' speech models, against the unchanged models."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from agreement import assert_within_rule
from safetensors.torch import load_file, save_file
from tiny_models import LAYERS, RELEASE, make_inputs
from tiny_models import make_model as make_tiny
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import mmkernels
from mmkernels.patch import Report, bottleneck
from op_tests.tolerance import assert_close_to_reference

BOTTLENECK = 8
DEPTH = LAYERS - 1
FUSED = "hidden_states + adapter_layer(hidden_states) -> adapter"
ALONE = "norm, linear_1, act_fn, linear_2 -> adapter, to which the caller adds the residual"


def adapter_classes() -> dict[str, type[nn.Module]]:
    """Every attention adapter of the installed transformers, by the prefix of its family."""
    found = {}
    models = pathlib.Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        for family in re.findall(r"^class (\w+)AttnAdapterLayer\(", file.read_text(encoding="utf-8"), re.M):
            module = f"transformers.models.{file.parent.name}.{file.stem}"
            found[family] = getattr(__import__(module, fromlist=["_"]), f"{family}AttnAdapterLayer")
    return found


ADAPTERS = adapter_classes()
every_family = pytest.mark.parametrize("family", ADAPTERS)


def randomise(module: nn.Module) -> None:
    """Parameters so large that a wrong adapter shows in every result."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def make_model(class_name: str = "Wav2Vec2ForCTC", **overrides: Any) -> Any:
    settings = {"adapter_attn_dim": BOTTLENECK, "do_stable_layer_norm": True, "vocab_size": 12}
    model = make_tiny(class_name, **settings | overrides)
    for adapter in adapters_of(model):
        randomise(adapter)
    return model.train()


def adapters_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, tuple(ADAPTERS.values()))]


def layers_of(model: nn.Module) -> Any:
    return next(m.layers for m in model.modules() if type(m).__name__.endswith("EncoderStableLayerNorm"))


def run(model: nn.Module, class_name: str = "Wav2Vec2ForCTC", autocast: bool = False) -> dict[str, Tensor]:
    """Loss, logits, and the gradients of each kind of the adapters' parameters and of all others."""
    model.zero_grad()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        outputs = model(**make_inputs(class_name, next(model.parameters()).dtype))
    outputs.loss.backward()
    results = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach()}
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = name.partition("adapter_layer.")[2] or "others"
            kinds.setdefault(kind, []).append(parameter.grad.flatten().clone())
    return results | {kind: torch.cat(gradients) for kind, gradients in kinds.items()}


def assert_agree(model: nn.Module, twin: nn.Module, **options: Any) -> None:
    """``model``, accelerated, is as near to float64 as ``twin`` is."""
    exact = run(copy.deepcopy(twin).double(), **options | {"autocast": False})
    actual, eager = run(model, **options), run(twin, **options)
    assert actual.keys() == eager.keys() == exact.keys()
    dtype = torch.bfloat16 if options.get("autocast") else next(twin.parameters()).dtype
    for name, result in actual.items():
        assert_within_rule(result, eager[name], exact[name], torch.finfo(dtype).eps)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call of the op by a replacement: whether it adds the input."""
    recorded: list[bool] = []
    op = bottleneck.adapter

    def recorder(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        recorded.append(kwargs["residual"] is x)
        return op(x, *args, **kwargs)

    monkeypatch.setattr(bottleneck, "adapter", recorder)
    return recorded


class Layer(nn.Module):
    """The statement that is replaced, and nothing else."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter_layer = adapter

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.adapter_layer(hidden_states)
        return hidden_states


class ScaledLayer(Layer):
    """A fork that adds its adapter in another way."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + 0.5 * self.adapter_layer(hidden_states)
        return hidden_states


class CallsParent(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


class AddsTwice(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.adapter_layer(hidden_states)
        hidden_states = hidden_states + self.adapter_layer(hidden_states)
        return hidden_states


def make_adapter(cls: type[nn.Module] = ADAPTERS["Wav2Vec2"], width: int = 48) -> Any:
    config = transformers.Wav2Vec2Config(hidden_size=width, adapter_attn_dim=BOTTLENECK)
    torch.manual_seed(0)
    adapter = cls(config)
    randomise(adapter)
    return adapter


def make_input(dtype: torch.dtype = torch.float32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 50, width, generator=generator).to(dtype).requires_grad_()


def value_and_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    output = module(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    output.backward(grad.to(output.dtype))
    assert x.grad is not None
    results = {"output": output.detach(), "x": x.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[name.removeprefix("_orig_mod.")] = parameter.grad.clone()
    return results


def assert_layers_agree(layer: nn.Module, twin: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    exact = value_and_gradients(
        copy.deepcopy(twin).double(), make_input(dtype).detach().double().requires_grad_()
    )
    actual, eager = (value_and_gradients(module, make_input(dtype)) for module in (layer, twin))
    assert actual.keys() == eager.keys()
    for name, result in actual.items():
        assert result.dtype == eager[name].dtype
        assert_close_to_reference(result, exact[name], eager[name], dtype, name)


def test_the_families_are_those_that_the_docs_name() -> None:
    assert set(ADAPTERS) == {"Hubert", "UniSpeech", "UniSpeechSat", "Wav2Vec2"}


@every_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_agrees_with_the_unchanged_model(family: str, autocast: bool, calls: list[bool]) -> None:
    name = f"{family}ForCTC"
    model, twin = make_model(name), make_model(name)
    report = mmkernels.accelerate(model)
    assert [(r.class_name, r.what) for r in report.replaced] == [
        (f"{family}EncoderLayerStableLayerNorm", FUSED)
    ] * DEPTH
    assert report.skipped == []
    assert_agree(model, twin, class_name=name, autocast=autocast)
    assert calls == [True] * DEPTH


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_agrees_by_the_rule_of_the_ops(family: str, dtype: torch.dtype, calls: list[bool]) -> None:
    layer = Layer(make_adapter(ADAPTERS[family])).to(dtype)
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    assert_layers_agree(layer, twin, dtype)
    assert calls == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype, calls: list[bool]) -> None:
    model, twin = make_model().to(dtype), make_model().to(dtype)
    mmkernels.accelerate(model)
    assert_agree(model, twin)
    assert calls == [True] * DEPTH


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_under_autocast_are_those_of_the_layer(source: torch.dtype, calls: list[bool]) -> None:
    layer = Layer(make_adapter())
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = layer(make_input(source)), twin(make_input(source))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=5e-2)
    # float16 plus bfloat16 is float32, which the op does not make.
    assert len(calls) == (source != torch.float16)


def test_together_with_the_sum_of_layers(calls: list[bool]) -> None:
    name = "HubertForSequenceClassification"
    model, twin = make_model(name), make_model(name)
    report = mmkernels.accelerate(model)
    assert [r.name for r in report.replaced] == ["", *(f"hubert.encoder.layers.{i}" for i in range(DEPTH))]
    assert_agree(model, twin, class_name=name)
    assert calls == [True] * DEPTH


def test_the_report() -> None:
    model = make_model()
    handle = layers_of(model)[1].adapter_layer.register_forward_hook(lambda *args: None)
    layers_of(model)[2].adapter_layer.act_fn = nn.Tanh()
    report = mmkernels.accelerate(model)
    place, cls = "wav2vec2.encoder.layers", "Wav2Vec2EncoderLayerStableLayerNorm"
    assert str(report).splitlines() == [
        "mmkernels.accelerate: 2 replaced, 2 skipped",
        f"  replaced {place}.0 ({cls}): {FUSED}",
        f"  replaced {place}.1.adapter_layer (Wav2Vec2AttnAdapterLayer): {ALONE}",
        f"  skipped  {place}.1: adapter_layer has hooks, which the op would not call",
        f"  skipped  {place}.2.adapter_layer: its activation is Tanh; "
        "the op has none, relu, gelu, gelu_tanh, silu",
    ]
    again = mmkernels.accelerate(model)
    assert again.replaced == []
    assert (f"{place}.0", "already accelerated") in again.skipped
    assert f"{place}.0.adapter_layer" not in [s.name for s in again.skipped]
    # Without its hook the layer of an accelerated adapter is recognised.
    handle.remove()
    assert [r.name for r in mmkernels.accelerate(model).replaced] == [f"{place}.1"]


def test_models_without_adapters() -> None:
    unset = mmkernels.accelerate(make_tiny("Wav2Vec2ForCTC", do_stable_layer_norm=True))
    assert (unset.replaced, unset.skipped) == ([], [])
    without = mmkernels.accelerate(make_tiny("Wav2Vec2ForCTC", adapter_attn_dim=8))
    assert (without.replaced, without.skipped) == ([], [])
    assert [note.text for note in without.notes] == [
        "config.adapter_attn_dim is 8, but its layers have no adapters; transformers makes them with "
        "config.do_stable_layer_norm=True"
    ]


# Languages: the flow of the library's users.

LANGUAGES = {"eng": "abcdefg", "fra": "abcdefghijk"}


def tokenizer_of(folder: pathlib.Path) -> Any:
    vocabulary = {
        language: {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *letters])}
        for language, letters in LANGUAGES.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return transformers.Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"),
        target_lang="eng",
        pad_token="<pad>",
        unk_token="<unk>",
        word_delimiter_token="|",
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with the adapters and heads of two languages of different alphabets, and its tokenizer."""
    folder = tmp_path_factory.mktemp("mms")
    tokenizer = tokenizer_of(folder)
    for seed, language in enumerate(reversed(LANGUAGES)):
        tokenizer.set_target_lang(language)
        model = make_model(vocab_size=len(tokenizer.encoder))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model._get_adapters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        weights = {name: value.detach().clone() for name, value in model._get_adapters().items()}
        save_file(weights, folder / f"adapter.{language}.safetensors", metadata={"format": "pt"})
    model.save_pretrained(folder)
    return folder


Accelerate = Callable[[nn.Module], Report]


def train(model: Any, tokenizer: Any, words: list[str], steps: int = 4) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    inputs = make_inputs("Wav2Vec2ForCTC")
    encoded = [tokenizer(word).input_ids for word in words]
    longest = max(map(len, encoded))
    inputs["labels"] = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in encoded])
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapt(folder: pathlib.Path, out: pathlib.Path, accelerate_at: dict[str, Any]) -> dict[str, Any]:
    """Train new adapters and a head, save them, go on with those of another language."""
    tokenizer = tokenizer_of(out)
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder).train()
    reports = {}

    def stage(name: str) -> None:
        if name in accelerate_at:
            accelerate_at[name](model, reports)

    stage("loaded")
    torch.manual_seed(5)
    model.init_adapter_layers()
    for adapter in adapters_of(model):
        randomise(adapter)  # init_adapter_layers of some releases changes nothing
    stage("initialised")
    model.freeze_base_model()
    trained = model._get_adapters()
    for parameter in trained.values():
        parameter.requires_grad = True
    losses = train(model, tokenizer, ["abc", "g"])
    stage("trained")
    save_file(dict(model._get_adapters()), out / "adapter.new.safetensors", metadata={"format": "pt"})
    model.save_pretrained(out)
    tokenizer.set_target_lang("fra")
    model.load_adapter("fra")
    assert model.lm_head.out_features == len(tokenizer.encoder)
    stage("switched")
    losses += train(model, tokenizer, ["kij", "h"])
    return {
        "model": model,
        "names": list(trained),
        "losses": torch.tensor(losses),
        "new": load_file(out / "adapter.new.safetensors"),
        "saved": load_file(out / "model.safetensors"),
        "config": (out / "config.json").read_text(),
        "files": sorted(path.name for path in out.iterdir()),
        "state": model.state_dict(),
    }


def do(model: Any, reports: dict[str, Report]) -> None:
    reports["last"] = mmkernels.accelerate(model)
    assert len(reports["last"].replaced) == DEPTH


def undo(model: Any, reports: dict[str, Report]) -> None:
    reports["last"].revert()


@pytest.mark.parametrize(
    ("stages", "count"),
    [
        ({"loaded": do}, 8),
        ({"initialised": do}, 8),
        ({"switched": do}, 4),
        ({"loaded": do, "trained": undo}, 4),
        ({"loaded": do, "initialised": undo, "trained": do}, 4),
    ],
    ids=["loaded", "initialised", "switched", "reverted", "reverted and again"],
)
def test_adapting_to_languages_gives_the_same_losses_and_files(
    stages: Any, count: int, checkpoint: pathlib.Path, tmp_path: pathlib.Path, calls: list[bool]
) -> None:
    for name in ("plain", "accelerated"):
        (tmp_path / name).mkdir()
    expected = adapt(checkpoint, tmp_path / "plain", {})
    got = adapt(checkpoint, tmp_path / "accelerated", stages)
    assert calls == [True] * (count * DEPTH)
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    assert expected["losses"][3] < expected["losses"][0]
    for same in ("names", "config", "files"):
        assert got[same] == expected[same]
    for weights in ("new", "saved", "state"):
        assert list(got[weights]) == list(expected[weights])
        for name, value in expected[weights].items():
            assert got[weights][name].dtype == value.dtype
            # AdamW's steps have the size of the rate, whatever that of a gradient near zero.
            torch.testing.assert_close(got[weights][name], value, rtol=1e-3, atol=1e-3)


def test_a_language_named_in_from_pretrained(checkpoint: pathlib.Path, calls: list[bool]) -> None:
    load = functools.partial(
        transformers.Wav2Vec2ForCTC.from_pretrained,
        checkpoint,
        target_lang="fra",
        ignore_mismatched_sizes=True,
    )
    model, twin = load().train(), load().train()
    mmkernels.accelerate(model)
    assert_agree(model, twin)
    assert calls == [True] * DEPTH


def test_trained_weights_load_into_an_unchanged_model(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = transformers.Wav2Vec2ForCTC.from_pretrained(checkpoint).train()
    mmkernels.accelerate(model)
    train(model, tokenizer_of(tmp_path), ["abc", "g"])
    extra = {} if RELEASE >= (5, 0) else {"safe_serialization": False}
    for name, options in {"safe": {}, "other": extra}.items():
        model.save_pretrained(tmp_path / name, **options)
        loaded = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / name)
        assert loaded.config.architectures == ["Wav2Vec2ForCTC"]
        assert list(loaded.state_dict()) == list(model.state_dict())
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


# What else happens to models.


def test_revert_restores_everything() -> None:
    model = make_model()
    modules = dict(model.named_modules())
    before = {name: (type(module), dict(vars(module))) for name, module in modules.items()}
    keys = list(model.state_dict())
    report = mmkernels.accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(type(adapter) in ADAPTERS.values() for adapter in adapters_of(model))
    report.revert()
    assert {name: (type(module), vars(module)) for name, module in modules.items()} == before


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_copies_and_pickles_stay_accelerated(protocol: int | None, calls: list[bool]) -> None:
    model, twin = make_model(), make_model()
    mmkernels.accelerate(model)
    if protocol is None:
        model = copy.deepcopy(model)
    else:  # torch refuses to pickle the model: the weights of its convolution are parametrised
        encoder = model.wav2vec2.encoder
        encoder.layers = pickle.loads(pickle.dumps(encoder.layers, protocol))
    assert_agree(model, twin)
    assert calls == [True] * DEPTH
    model.load_state_dict(twin.state_dict(), strict=True)


@pytest.mark.parametrize("first", [True, False], ids=["accelerated first", "accelerated last"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(first: bool, reentrant: bool, calls: list[bool]) -> None:
    model, twin = make_model(), make_model()
    if first:
        mmkernels.accelerate(model)
    for module in (model, twin):
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not first:
        mmkernels.accelerate(model)
    assert_agree(model, twin)
    assert calls == [True] * (2 * DEPTH)


def test_dropout_draws_the_same_numbers(calls: list[bool]) -> None:
    rates = {f"{name}_dropout": 0.2 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
    model, twin = make_model(**rates, layerdrop=0.3), make_model(**rates, layerdrop=0.3)
    mmkernels.accelerate(model)
    results = []
    for module in (model, twin):
        torch.manual_seed(7)
        results.append([run(module) for _ in range(4)])
    assert 0 < len(calls) < 4 * DEPTH
    for got, expected in zip(*results, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_frozen_adapters_and_evaluation(calls: list[bool]) -> None:
    model, twin = make_model().eval(), make_model().eval()
    mmkernels.accelerate(model)
    for module in (model, twin):
        for adapter in adapters_of(module):
            adapter.requires_grad_(False)
    assert_agree(model, twin)
    inputs = make_inputs("Wav2Vec2ForCTC")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)
    assert calls == [True] * (3 * DEPTH)


@pytest.mark.parametrize("return_dict", [True, False])
def test_recorded_outputs(return_dict: bool) -> None:
    model, twin = make_model().eval(), make_model().eval()
    mmkernels.accelerate(model)
    inputs = make_inputs("Wav2Vec2ForCTC")
    options = {"output_hidden_states": True, "return_dict": return_dict}
    got, expected = (module(**inputs, **options) for module in (model, twin))
    assert type(got) is type(expected)
    states, wanted = got[2] if not return_dict else got.hidden_states, expected[2]
    assert len(states) == len(wanted) == LAYERS
    for state, want in zip(states, wanted, strict=True):
        torch.testing.assert_close(state, want)


def graphs_with(seen: list[str]) -> Any:
    """A backend for torch.compile that runs the graphs, and notes the ops of mmkernels in them."""

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if "mmkernels" in str(node.target))
        return graph

    return aot_autograd(fw_compiler=note, bw_compiler=note)


def test_compiled_models_call_the_op() -> None:
    model, twin = make_model(), make_model()
    mmkernels.accelerate(model)
    seen: list[str] = []
    compiled = torch.compile(model, backend=graphs_with(seen))
    results = []
    for module in (compiled, twin):
        loss = module(**make_inputs("Wav2Vec2ForCTC")).loss
        loss.backward()
        results.append((loss, [adapter.linear_1.weight.grad for adapter in adapters_of(module)]))
    torch.testing.assert_close(*results)
    # Once: the layers share their code.
    assert seen == ["mmkernels.adapter_fwd.default", "mmkernels.adapter_bwd.default"]


def test_the_layer_compiles_in_one_graph() -> None:
    layer = Layer(make_adapter())
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    seen: list[str] = []
    compiled = torch.compile(layer, backend=graphs_with(seen), fullgraph=True, dynamic=True)
    assert_layers_agree(compiled, twin)
    assert seen == ["mmkernels.adapter_fwd.default", "mmkernels.adapter_bwd.default"]


def test_distributed_data_parallel(tmp_path: pathlib.Path, calls: list[bool]) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        twin = make_model()
        model = nn.parallel.DistributedDataParallel(make_model())
        report = mmkernels.accelerate(model)
        assert report.replaced[0].name == "module.wav2vec2.encoder.layers.0"
        assert_agree(model, twin)
    finally:
        torch.distributed.destroy_process_group()
    assert calls == [True] * DEPTH


def test_lora_on_other_layers_leaves_the_adapters_fused(calls: list[bool]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(make_model(), config))
    report = mmkernels.accelerate(models[0])
    assert [r.what for r in report.replaced] == [FUSED] * DEPTH
    assert_agree(*models)
    assert calls == [True] * DEPTH


@pytest.mark.parametrize("first", [True, False], ids=["accelerated first", "accelerated last"])
def test_lora_inside_adapters_runs(first: bool, calls: list[bool]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["linear_1"], init_lora_weights=False)
    models, reports = [], []
    for accelerated in (True, False):
        model = make_model()
        if accelerated and first:
            mmkernels.accelerate(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        if accelerated and not first:
            reports.append(mmkernels.accelerate(model))
        models.append(model)
    for report in reports:
        assert report.replaced == []
        assert len(report.skipped) == DEPTH
        assert report.skipped[0].reason.startswith(
            "it has LayerNorm, peft.tuners.lora.layer.Linear, ReLU, Linear"
        )
    assert_agree(*models)
    assert calls == []


def test_adapters_that_peft_trains_and_saves(calls: list[bool]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["adapter_layer"], init_lora_weights=False
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(make_model(), config))
    report = mmkernels.accelerate(models[0])
    assert {r.what for r in report.replaced} == {ALONE}
    assert_agree(*models)
    assert calls == [False] * DEPTH


# Near misses: never another result.


class FifthModule(ADAPTERS["Wav2Vec2"]):  # type: ignore[misc]
    """With a module after the four."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states)
        hidden_states = self.linear_1(hidden_states)
        hidden_states = self.act_fn(hidden_states)
        hidden_states = self.linear_2(hidden_states)
        hidden_states = self.gate(hidden_states)
        return hidden_states


class DropsHidden(ADAPTERS["Wav2Vec2"]):  # type: ignore[misc]
    """A fork that differs among the four."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states)
        hidden_states = self.linear_1(hidden_states)
        hidden_states = self.act_fn(hidden_states * 2)
        hidden_states = self.linear_2(hidden_states)
        return hidden_states


class CallsTwice(ADAPTERS["Wav2Vec2"]):  # type: ignore[misc]
    """A call that does more than the forward."""

    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class Inherits(ADAPTERS["Wav2Vec2"]):  # type: ignore[misc]
    """A subclass in name alone, with a module that its forward does not use."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unused = nn.Dropout(0.5)


def without_norm() -> nn.Module:
    adapter = make_adapter()
    adapter.norm = nn.Identity()
    return adapter


def without_act() -> nn.Module:
    adapter = make_adapter()
    del adapter.act_fn
    adapter.act_fn = torch.relu
    return adapter


def changed(change: Callable[[Any], Any]) -> nn.Module:
    adapter = make_adapter()
    change(adapter)
    return adapter


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def tripled(module: Any, x: Tensor) -> Tensor:
    result: Tensor = 3 * type(module).forward(module, x)
    return result


def wrap(module: Any) -> None:
    module.forward = functools.partial(tripled, module)


def weight_norm(adapter: Any) -> None:
    nn.utils.parametrizations.weight_norm(adapter.linear_2)


OTHER = "the expected statements occur {} times in its forward"


@pytest.mark.parametrize(
    ("make", "skipped", "added"),
    [
        # The layer is another: its adapter is served alone, once for each call.
        (lambda: ScaledLayer(make_adapter()), {"": OTHER.format(0)}, [False]),
        (lambda: CallsParent(make_adapter()), {"": OTHER.format(0)}, [False]),
        (lambda: AddsTwice(make_adapter()), {"": OTHER.format(2)}, [False, False]),
        # A call of the adapter does more.
        (lambda: Layer(changed(hook)), {"": "adapter_layer has hooks"}, [False]),
        (lambda: Layer(make_adapter(CallsTwice)), {"": "adapter_layer overrides __call__"}, [False]),
        # The adapter's forward is another, but holds the statements.
        (lambda: Layer(make_adapter(FifthModule)), {}, [False]),
        # Nothing can be served.
        (lambda: Layer(make_adapter(DropsHidden)), {"adapter_layer": OTHER.format(0)}, []),
        (lambda: Layer(changed(wrap)), {"adapter_layer": "forward is overridden on the instance"}, []),
        (lambda: Layer(changed(lambda a: hook(a.linear_1))), {"adapter_layer": "linear_1 has hooks"}, []),
        (lambda: Layer(changed(weight_norm)), {"adapter_layer": "linear_2 is parametrised"}, []),
        (lambda: Layer(without_norm()), {"adapter_layer": "it has Identity, Linear, ReLU, Linear"}, []),
        (lambda: Layer(without_act()), {"adapter_layer": "it does not have the layers norm, linear_1"}, []),
    ],
    ids=[
        *("scaled", "calls parent", "adds twice", "hooked", "own call", "fifth module"),
        *("other statements", "wrapped", "hook inside", "parametrised", "no norm", "no module"),
    ],
)
def test_near_misses(make: Any, skipped: dict[str, str], added: list[bool], calls: list[bool]) -> None:
    layer = make()
    twin = copy.deepcopy(layer)
    report = mmkernels.accelerate(layer)
    assert [name for name, _ in report.skipped] == list(skipped)
    for name, reason in report.skipped:
        assert skipped[name] in reason
    assert [(r.name, r.what) for r in report.replaced] == ([("adapter_layer", ALONE)] if added else [])
    assert_layers_agree(layer, twin)
    assert calls == added


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Identity()])
def test_other_activations_of_the_op_and_subclasses(activation: nn.Module, calls: list[bool]) -> None:
    adapter = make_adapter(Inherits)
    adapter.act_fn = activation
    layer = Layer(adapter)
    twin = copy.deepcopy(layer)
    assert [r.what for r in mmkernels.accelerate(layer).replaced] == [FUSED]
    assert_layers_agree(layer, twin)
    assert calls == [True]


def test_a_layer_that_is_wrapped_is_left_alone(calls: list[bool]) -> None:
    layer = Layer(make_adapter())
    wrap(layer)
    report = mmkernels.accelerate(layer)
    assert [s.name for s in report.skipped] == [""]
    assert report.skipped[0].reason == "forward is overridden on the instance, by a hook or a wrapper"
    other = Layer(make_adapter())
    torch.testing.assert_close(layer(make_input()), 3 * other(make_input()))
    assert calls == [False]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: hook(layer.adapter_layer),
        lambda layer: hook(layer.adapter_layer.norm),
        lambda layer: weight_norm(layer.adapter_layer),
        lambda layer: setattr(layer.adapter_layer, "act_fn", nn.Tanh()),
        lambda layer: setattr(layer, "adapter_layer", make_adapter(DropsHidden)),
        lambda layer: setattr(layer, "adapter_layer", nn.Linear(48, 48)),
    ],
    ids=["hook", "hook inside", "parametrised", "activation", "another adapter", "another module"],
)
def test_changes_after_the_replacement_are_respected(change: Any, calls: list[bool]) -> None:
    layer = Layer(make_adapter())
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    for module in (layer, twin):
        torch.manual_seed(0)
        change(module)
    assert_layers_agree(layer, twin)
    assert calls == []


def test_a_forward_that_was_replaced_on_its_class_runs(
    monkeypatch: pytest.MonkeyPatch, calls: list[bool]
) -> None:
    layer = Layer(make_adapter())
    mmkernels.accelerate(layer)
    cls = ADAPTERS["Wav2Vec2"]
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states: 2 * forward(self, hidden_states))
    x = make_input()
    torch.testing.assert_close(layer(x), x + 2 * forward(layer.adapter_layer, x))
    assert calls == []


@pytest.mark.parametrize(
    "x", [torch.ones(2, 7), torch.ones(2, 48, dtype=torch.bfloat16), torch.ones(2, 48).int(), None, 1.0]
)
def test_inputs_that_the_op_does_not_take_raise_what_the_layer_raises(x: Any) -> None:
    for make in (Layer, lambda adapter: adapter):
        layer, twin = make(make_adapter()), make(make_adapter())
        assert len(mmkernels.accelerate(layer).replaced) == 1
        errors = []
        for module in (layer, twin):
            with pytest.raises((RuntimeError, TypeError)) as error:
                module(x)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
