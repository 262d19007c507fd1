"""Freeze a model and make the parameters of one fine-tuning method trainable (AAT, arXiv 2401.10544)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmtransfer import models
from mmtransfer.activations import ACTIVATE
from mmtransfer.models import ModelDescription

from . import methods
from .methods import ADAPTER_METHODS, METHODS, Plan, Undo
from .recompute import RECOMPUTE

_RECORD = "_mmtransfer_aat"
_BACKENDS = ("auto", "native", "triton", "reference")
#: On the encoder inside a prepared model: the method.
_MARK = "_mmtransfer_aat_method"
#: Arguments of `prepare` that say what is trained.
OPTIONS = ("method", "bottleneck", "activation", "scale", "head", "layers", "prompt_tokens", "rank")
#: Activations of transformers' configurations that are ones of `mmkernels.adapter`.
_SAME_ACTIVATION = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass
class Prepared:
    """What `prepare` did to a model; `print` shows the counts.

    Attributes:
        method: the name of the method.
        options: `OPTIONS`, as `save_adapters` writes them.
        trainable: names of the trainable parameters, as the model's `named_parameters` has them.
        trainable_parameters, total_parameters: how many numbers those are, and how many the model now has.
        rewritten: which adapters are computed inside the frozen products: "attention", "mlp".
    """

    method: str
    options: dict[str, Any]
    trainable: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    rewritten: tuple[str, ...]
    _model: nn.Module
    _undo: Undo

    def revert(self) -> None:
        """Give the model its forwards and `requires_grad` flags back; the method's parameters are dropped.

        The head, and frozen weights that the method thawed, keep what they have learned.
        """
        if self._model.__dict__.get(_RECORD) is not self:
            raise ValueError("this preparation was reverted before")
        self._undo.revert()
        del self._model.__dict__[_RECORD]

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        rewritten = f", rewritten: {', '.join(self.rewritten)}" if self.rewritten else ""
        return (
            f"{self.method}: {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"({share:.3f} %) are trained{rewritten}"
        )


def prepare(
    model: nn.Module,
    method: str = "aat_ms",
    *,
    bottleneck: int | None = None,
    ratio: float = 0.25,
    activation: str = "gelu",
    scale: float = 1.0,
    head: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    prompt_tokens: int = 12,
    rank: int = 8,
    rewrite: bool = False,
    recompute: str = "none",
    backend: str = "auto",
    description: ModelDescription | None = None,
) -> Prepared:
    """Freeze `model` in place, except for what `method` trains in its encoder, and for its head.

    Methods, with A the output of a layer's attention, projected, and h the input of its MLP:

    - "aat_ms": the S adapter `x + (A + Adapter(A))` and the M adapter `x + MLP(h) + Adapter(h)`; "aat_m",
      "aat_s": one of the two. An adapter has no norm, and starts as zero.
    - "houlsby": `x + (A + Adapter(A))` and `x + (F + Adapter(F))`, F the output of the MLP.
    - "prompt": `prompt_tokens` learned tokens in front of the input of every layer (VPT-deep); their outputs
      are dropped. (The code released with the paper overwrites patches instead.)
    - "lora": rank `rank` on queries and values, by peft, which has to be installed.
    - "bitfit": the biases of the encoder. "partial": its last 6 layers. "head": nothing but the head.
      "full": everything.

    The adapters join the sub-layer's output where the model makes it, so that dropout, residual, norm (before
    or after the sub-layer) and a conformer's halving of its MLP are the model's own. New parameters are
    children of the layers: `...adapter_attention.*`, `...adapter_mlp.*` (of `mmkernels.nn.Adapter`), and
    `...prompt`; they are float32 (float64 in a float64 model). An adapter at 768 / 192 has 295,872
    parameters, AAT^MS in twelve layers 7,100,928.

    Layers below the lowest trained parameter record no autograd graph. Do the preparation before
    `torch.compile`, DDP or FSDP. Not for `torch.nn.DataParallel`: it runs several copies of a module at once.

    Args:
        model: of a type in `mmtransfer.models.MODELS`, or with its `description`.
        method: see above.
        bottleneck: hidden width of the adapters; by default `ratio` times the width of the model.
        activation: of the adapters: "relu", "gelu", "gelu_tanh", "silu" or "none".
        scale: constant factor of the adapters' outputs.
        head: names of submodules (or parameters) that stay trainable; by default the direct children of the
            model (and its own parameters) beside its encoder, unless it has a decoder, without what the
            encoder shares.
        layers: indices of the layers that get adapters, prompts, LoRA, or are thawed ("partial"); all by
            default, the last 6 for "partial". Negative ones count from the end.
        rewrite: compute the adapters inside the frozen products beside them, where that is exact: M where the
            MLP's activation is the adapters', S where the output projection is called as a module (not
            WavLM). `Prepared.rewritten` says which. With the model's activation dropout in training, the M
            adapter's hidden layer is dropped out too.
        recompute: "none"; "selective": layers keep their input, queries, keys, values and the attention's
            result, and compute norms, output projection, the MLP's first product and the adapters' hidden
            layers again in the backward pass; "full": layers keep their input only. See `aat.recompute`. Not
            under `torch.compile`.
        backend: of `mmkernels.adapter`.
        description: where things are in a model that is not in the table, or not of transformers.

    Raises:
        TypeError: `model` is no module, or not one of transformers and without a description.
        ValueError: no description for the model's type, a model that is prepared already, an unknown method
            or name, a value out of range, or a method that the model cannot have. The model is untouched.
        ImportError: "lora" without peft.

    Source: Liang et al., Adapting Audio Transformer for Various Acoustics Recognition Tasks (arXiv
    2401.10544); Houlsby et al. (arXiv 1902.00751).
    """
    _check_options(method, ratio, activation, recompute, backend, prompt_tokens=prompt_tokens, rank=rank)
    row, encoder = _describe(model, description)
    _check_unprepared(model)
    all_layers = list(models.get_layers(encoder, row))
    width = _check_layers(all_layers, row)
    if bottleneck is None:
        bottleneck = int(width * ratio)
    if type(bottleneck) is not int or bottleneck < 1:
        raise ValueError(f"bottleneck must be an integer of at least 1, got {bottleneck!r}")
    heads = _find_heads(model, encoder, head)
    indices = _resolve_layers(layers, len(all_layers), default_count=6 if method == "partial" else None)
    chosen = [all_layers[index] for index in indices]
    _check_method(method, row, heads, every_layer=len(chosen) == len(all_layers))
    plan = Plan(
        model=model,
        method=method,
        description=row,
        encoder=encoder,
        layers=chosen,
        width=width,
        bottleneck=bottleneck,
        activation=activation,
        scale=float(scale),
        backend=backend,
        prompt_tokens=prompt_tokens,
        rank=rank,
        rewritten=_rewritable(method, activation, row, encoder, chosen) if rewrite else (),
        recompute=recompute,
    )
    values = (method, bottleneck, activation, plan.scale, heads, indices, prompt_tokens, rank)
    return _apply(plan, heads, dict(zip(OPTIONS, values, strict=True)))


def get_prepared(model: nn.Module) -> Prepared:
    """What `prepare` returned for this model.

    Raises:
        ValueError: the model is not prepared.
    """
    record = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not prepared; call aat.prepare on it first")
    return record


def revert(model: nn.Module) -> None:
    """`Prepared.revert` of a prepared model."""
    get_prepared(model).revert()


def _apply(plan: Plan, heads: list[str], options: dict[str, Any]) -> Prepared:
    model, undo = plan.model, Undo()
    undo.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    undo.assign(plan.encoder, _MARK, plan.method)
    base = {id(parameter) for parameter, _ in undo.flags}
    try:
        trainable = {id(parameter) for parameter in METHODS[plan.method](plan, undo)}
        methods.add_recompute(plan, undo)
    except BaseException:
        undo.revert()
        raise
    encoder = {id(parameter) for parameter in plan.encoder.parameters()}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        in_head = id(parameter) in base - encoder and any(_is_inside(name, head) for head in heads)
        parameter.requires_grad_(id(parameter) in trainable or in_head)
    _freeze_inputs(plan.encoder, undo)
    names = tuple(name for name, parameter in named.items() if parameter.requires_grad)
    prepared = Prepared(
        method=plan.method,
        options=options,
        trainable=names,
        trainable_parameters=sum(named[name].numel() for name in names),
        total_parameters=sum(parameter.numel() for parameter in named.values()),
        rewritten=plan.rewritten,
        _model=model,
        _undo=undo,
    )
    model.__dict__[_RECORD] = prepared
    return prepared


def _freeze_inputs(encoder: nn.Module, undo: Undo) -> None:
    """Have frozen parts record no graph.

    In training the convolutions of the wav2vec2 family ask for the gradient of their input, unless this flag
    is off; everything up to the lowest adapter would be kept for the backward pass.
    """
    for module in encoder.modules():
        if module.__dict__.get("_requires_grad") and not any(p.requires_grad for p in module.parameters()):
            undo.assign(module, "_requires_grad", False)


def _check_options(
    method: str, ratio: float, activation: str, recompute: str, backend: str, **counts: int
) -> None:
    for name, value, allowed in (
        ("method", method, tuple(METHODS)),
        ("activation", activation, tuple(ACTIVATE)),
        ("recompute", recompute, RECOMPUTE),
        ("backend", backend, _BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio!r}")
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")


def _describe(model: nn.Module, description: ModelDescription | None) -> tuple[ModelDescription, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if description is None:
        try:
            description = models.describe(model)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; or pass one as description") from None
    return description, models.find_encoder(model, description)


def _check_unprepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _MARK in module.__dict__:
            where = f" in its part {name!r}" if name else ""
            raise ValueError(
                f"model is prepared already, with method {module.__dict__[_MARK]!r}{where}; revert that first"
            )


def _check_layers(layers: list[nn.Module], row: ModelDescription) -> int:
    """The width of the layers, each of which has what the description says."""
    width = 0
    paths = (row.layer_query, row.layer_key, row.layer_value, row.layer_attention_output, *row.layer_mlp)
    for index, layer in enumerate(layers):
        for path in (row.layer_attention, *paths):
            try:
                layer.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"layer {index} does not fit the description: {error}") from None
        width = int(getattr(layer.get_submodule(row.layer_attention_output), "out_features", 0))
        if width < 1:
            raise ValueError(f"layer {index}: {row.layer_attention_output!r} is not a linear layer")
    if not layers:
        raise ValueError("model has no layers")
    return width


def _check_method(method: str, row: ModelDescription, heads: list[str], *, every_layer: bool) -> None:
    """Whether a model of this type can have the method."""
    if method == "prompt" and not row.attention_alone_mixes:
        raise ValueError(
            "method 'prompt' needs layers whose tokens, dimension 1, meet in the attention only "
            f"(attention_alone_mixes of the description), which those of {row.model_type} do not"
        )
    if method == "prompt" and row.shares_position_bias and not every_layer:
        raise ValueError(
            f"method 'prompt' needs all layers of {row.model_type}, which share one position bias"
        )
    if method == "lora" and not row.calls_projections:
        raise ValueError(
            f"method 'lora' needs projections that are called; {row.model_type} hands their weights on"
        )
    if method == "lora" and not methods.peft_is_installed():
        raise ImportError("method 'lora' needs peft; install it with: pip install peft")
    if method == "head" and not heads:
        raise ValueError("method 'head' needs a head; the model has none beside its encoder, so name one")


def _resolve_layers(layers: Sequence[int] | None, count: int, *, default_count: int | None) -> list[int]:
    if layers is None:
        return list(range(count))[-default_count if default_count else 0 :]
    resolved = set()
    for index in layers:
        if type(index) is not int or not -count <= index < count:
            raise ValueError(f"layers must be indices in [{-count}, {count - 1}], got {index!r}")
        resolved.add(index % count)
    return sorted(resolved)


def _find_heads(model: nn.Module, encoder: nn.Module, head: str | Sequence[str] | None) -> list[str]:
    if head is None:
        return [] if model is encoder or _has_decoder(model) else _find_neighbours(model, encoder)
    names = [head] if isinstance(head, str) else list(head)
    parameters = [name for name, _ in model.named_parameters()]
    for name in names:
        if not any(_is_inside(parameter, name) for parameter in parameters):
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"head {name!r} has no parameters in the model, whose children are {children}")
    return names


def _has_decoder(model: nn.Module) -> bool:
    # Whisper's audio classifiers have the configuration of the whole model.
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
        name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()
    )


def _find_neighbours(model: nn.Module, encoder: nn.Module) -> list[str]:
    """Direct children and parameters of the model that are beside the encoder."""
    inside = {id(parameter) for parameter in encoder.parameters()}
    children = [
        name
        for name, child in model.named_children()
        if not any(module is encoder for module in child.modules())
        and any(id(parameter) not in inside for parameter in child.parameters())
    ]
    return children + [name for name, p in model.named_parameters(recurse=False) if id(p) not in inside]


def _is_inside(parameter: str, module: str) -> bool:
    return parameter == module or parameter.startswith(f"{module}.")


def _rewritable(
    method: str, activation: str, row: ModelDescription, encoder: nn.Module, layers: list[nn.Module]
) -> tuple[str, ...]:
    """The adapters of the method that can be computed inside the frozen products.

    Raises:
        ValueError: there are none.
    """

    def plain(*paths: str) -> bool:
        return all(type(layer.get_submodule(path)) is nn.Linear for layer in layers for path in paths)

    if method not in ADAPTER_METHODS or method == "houlsby":
        raise ValueError(f"rewrite is for the adapters of AAT (aat_ms, aat_m, aat_s), not for {method!r}")
    own = getattr(getattr(encoder, "config", None), row.activation, None)
    same = isinstance(own, str) and _SAME_ACTIVATION.get(own) == activation
    found = []
    if method != "aat_m" and row.calls_projections and plain(row.layer_attention_output):
        found.append("attention")
    if method != "aat_s" and same and plain(*row.layer_mlp):
        found.append("mlp")
    if not found:
        raise ValueError(
            f"rewrite has nothing to rewrite: {method} with activation {activation!r} in {row.model_type}, "
            f"whose MLP has {own!r}"
        )
    return tuple(found)
