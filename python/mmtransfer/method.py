"""The one interface of the methods: an edit inside an encoder, and a readout of its layers."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import typeguard
from torch import nn

from mmkernels.activations import ACTIVATIONS
from mmkernels.backends import BACKENDS
from mmkernels.nn import Adapter
from mmtransfer.encoders.checks import check_distinct, check_unquantised
from mmtransfer.encoders.edit import Edit, Forward, check_layers
from mmtransfer.encoders.encoder import Encoder, Tap
from mmtransfer.encoders.recompute import RECOMPUTE, add_recompute
from mmtransfer.encoders.taps import Taps
from mmtransfer.training.settings import Training, check_number

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel
    from mmtransfer.tasks.base import Task


@dataclass(frozen=True)
class Group:
    """Trained parameters with a peak learning rate that differs from the run's; they have no weight decay.

    ValueError for a rate that is negative or not finite.
    """

    parameters: Iterable[nn.Parameter]
    learning_rate: float

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate)
        # An iterator would be empty for the second reader.
        object.__setattr__(self, "parameters", tuple(self.parameters))


def option(
    default: Any, *, choices: Iterable[str] = (), least: float | None = None, runtime: bool = False
) -> Any:
    """A field of a method, whose value is checked.

    Args:
        default: None where the method chooses.
        choices: the values allowed, if there are few.
        least: the smallest value allowed.
        runtime: the option changes the computation and not the parameters; checkpoints leave it out.
    """
    return field(default=default, metadata={"choices": tuple(choices), "least": least, "runtime": runtime})


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another library: the method, the names of the head's modules, and the tensors of a
    model that is prepared so."""

    method: Method
    head: Sequence[str]
    tensors: Mapping[str, torch.Tensor]


class Serial:
    """Called in place of a module's `forward`: `adapter(A)` for its (first) output A."""

    def __init__(self, inner: Forward, adapter: Adapter) -> None:
        self.inner, self.adapter = inner, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return self.adapter(output[0]), *output[1:]
        return self.adapter(output)


class LastLayer(nn.Module):
    """The readout of a single tap: its frames as they are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(N, 1, C)` to `(N, C)`."""
        return features.squeeze(1)


@dataclass(frozen=True)
class Compressed:
    """A batch after a readout that makes fewer vectors than there are frames.

    Attributes:
        frames: `(N', out_dim)` the vectors of all utterances, one after the other.
        taps: the place of each vector, as for frames; `lengths` (B,) are the vectors of each utterance.
        labels: those of the batch, without what the readout has no vector for.
        loss: of the readout itself, which is added to that of the task.
    """

    frames: torch.Tensor
    taps: Taps
    labels: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class Compressor(nn.Module, abc.ABC):
    """A readout that changes the number of frames.

    Attributes:
        out_dim: width of its vectors.
        needs_text: whether it finds no segments without the labels: predictions and scores are then of
            utterances whose text is known.
    """

    out_dim: int
    needs_text: bool = False

    @abc.abstractmethod
    def compress(self, taps: Taps, labels: torch.Tensor | None) -> Compressed:
        """The vectors of a batch; without labels, as in prediction, they are found without the target."""

    def frames_needed(self, target: Any) -> int:
        """The frames that a clip with this target of the task needs to be trained on."""
        return 0

    def knows(self, target: Any) -> bool:
        """Whether there is anything in a target that vectors could be found by."""
        return True

    def attach(self, task: Task | None, head: nn.Module | None) -> None:
        """Take from the task, and from its head as it is before training, what the readout needs of them."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a pretrained encoder. Its fields are its options: the command line (`--set
    bottleneck=64`), recipes, `config.json` and reports read them here; nothing outside the method's folder
    knows them.

    A subclass sets the class attributes and overrides `readout` (with `select_taps`), or `edit` (through
    `EditMethod`), or both, and is registered by its folder's `METHODS` or by `registry.register`.

    Attributes:
        name: everywhere: API, command line, checkpoint, benches.
        title: in tables and figures.
        paper: where it was published.
        training: epochs, batch size and rates that suit it.
        starts_from: a method that is trained first, whose readout and head this one begins with. Gradients
            through a random head would disturb an encoder before the head is of any use.
        FOREIGN_FILES: names of the files of another library that `foreign_files` may add to a checkpoint.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    training: ClassVar[Training] = Training()
    starts_from: ClassVar[str | None] = None
    FOREIGN_FILES: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):
            _check_option(self, each, hints[each.name])

    def fit(self, task: Task | None) -> Method:
        """This method with the options that a task decides, where they were left to the method."""
        return self

    def select_taps(self, encoder: Encoder) -> Sequence[Tap]:
        """The layers that the readout takes; see `TappedEncoder` for their numbers."""
        return (-1,)

    def readout(self, encoder: Encoder) -> nn.Module:
        """A module from `(N, L, C)`, the valid frames of the tapped layers, to `(N, out_dim)`, or a
        `Compressor`.

        It has an attribute `out_dim`. ValueError if there is none for this encoder.
        """
        return LastLayer(encoder.hidden_size)

    def edit(self, encoder: Encoder) -> Edit:
        """Change and train parts of the encoder, reversibly.

        Everything is checked before anything is touched: ValueError, or ImportError for a missing package.
        """
        return Edit.nothing(encoder)

    def parameter_groups(self, model: AdaptedModel) -> dict[str, Group]:
        """Parameters whose rate is not the run's, by the name of the group."""
        return {}

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        """A copy of the model as published, in plain PyTorch, with the same state dict.

        By default the modules of mmkernels in the copy compute by their reference; None if there are none.
        """
        twin = model.copy()
        ours = [module for module in twin.modules() if hasattr(module, "backend")]
        for module in ours:
            module.backend = "reference"  # type: ignore[assignment]
        return twin if ours else None

    def insights(self, model: AdaptedModel) -> dict[str, dict[str, float]]:
        """Figures of the trained model: `{"layer weight": {"layer 0": 0.08}}`."""
        return {}

    def foreign_files(
        self, model: nn.Module, head: Sequence[str], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Callable[[Path], object]]:
        """Further files of the checkpoint of a prepared model, in another library's format.

        Args:
            model: that is prepared.
            head: the names of the modules outside the encoder that are trained.
            tensors: all that is trained, by the model's names.

        Returns:
            Functions that write the files, by the names of these, which `FOREIGN_FILES` lists.
        """
        return {}

    @classmethod
    def read_foreign(cls, folder: Path, encoder: Encoder) -> Foreign | None:
        """The checkpoint of another library in a folder; None if the method knows none there.

        ValueError for one that it knows and that cannot be had.
        """
        return None

    @property
    def has_readout(self) -> bool:
        """Whether the method has a readout other than the last layer."""
        return type(self).readout is not Method.readout

    @property
    def has_edit(self) -> bool:
        """Whether the method may edit the encoder."""
        return type(self).edit is not Method.edit

    def needs_target(self) -> str | None:
        """Why a model of this method predicts nothing without its text, so that a run can score it for a task
        of texts alone; None if it does."""
        return None

    def weights_from(self) -> tuple[str, ...]:
        """The options that were given and say where trained weights are read from that a checkpoint of this
        method has too."""
        return ()

    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is made of: itself, or those of a combination."""
        return (self,)

    def options(self) -> dict[str, dict[str, Any]]:
        """The fields of each part that decide which parameters there are, for a checkpoint."""
        return {part.name: part.saved_fields() for part in self.parts()}

    def saved_fields(self) -> dict[str, Any]:
        """The fields of this method alone that a checkpoint has, as JSON takes them."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if not each.metadata.get("runtime")
        }

    def about(self) -> str:
        """A sentence on each part, the first of its docstring, and where it was published."""
        sentences = [
            " ".join((inspect.getdoc(type(part)) or "").split("\n\n")[0].split())
            .split("; options as")[0]
            .rstrip(".")
            for part in self.parts()
        ]
        return f"{'; '.join(sentences)} ({self.paper})"


@dataclass(frozen=True, kw_only=True)
class EditMethod(Method, abc.ABC):
    """A method that trains inside the encoder: a subclass says in `change` what becomes of the layers.

    Attributes:
        recompute: "none", "selective" or "full": what layers compute again in the backward pass instead of
            keeping it; see `encoders.recompute`.
    """

    #: An epoch through the encoder costs a hundred times that of a fusion on stored features.
    training: ClassVar[Training] = Training(epochs=5, batch_size=16)
    starts_from: ClassVar[str | None] = "head"

    recompute: str = option("none", choices=RECOMPUTE, runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.has_readout and self.starts_from == EditMethod.starts_from:
            # There is no trained model with this readout to start from.
            object.__setattr__(self, "starts_from", None)

    def edit(self, encoder: Encoder) -> Edit:
        return _edit(encoder, self.name, (self,))

    def select(self, encoder: Encoder) -> list[nn.Module]:
        """The layers that are changed; all that run unless there is an option for it."""
        return encoder.select(None)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        """Raise a ValueError or an ImportError if the encoder cannot have the method."""

    @abc.abstractmethod
    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        """Make the changes, through the edit alone."""


@dataclass(frozen=True, kw_only=True)
class LayerEditMethod(EditMethod):
    """An edit of chosen layers.

    Attributes:
        layers: their indices, negative ones from the end; None for all up to the last tap.
    """

    layers: tuple[int, ...] | None = None

    def select(self, encoder: Encoder) -> list[nn.Module]:
        return encoder.select(self.layers)


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(LayerEditMethod):
    """An edit that adds bottleneck adapters to chosen layers.

    Attributes:
        bottleneck: hidden width of the adapters; None for a quarter of the encoder's.
        activation: a name in `mmkernels.activations.ACTIVATIONS`.
        scale: constant factor of the adapters' outputs.
        backend: of `mmkernels.adapter`.
    """

    #: Standard deviation of the initial down-projections; None for that of a linear layer.
    initial_std: ClassVar[float | None] = 0.02

    bottleneck: int | None = option(None, least=1)
    activation: str = option("gelu", choices=ACTIVATIONS)
    scale: float = 1.0
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        check_layers(encoder, layers)

    def add(self, edit: Edit, encoder: Encoder, layer: nn.Module, name: str, **options: Any) -> Adapter:
        """A new adapter as a trained child of a layer; `options` are those of `mmkernels.nn.Adapter`."""
        width = encoder.hidden_size
        adapter = Adapter(
            width,
            max(width // 4, 1) if self.bottleneck is None else self.bottleneck,
            self.activation,
            scale=self.scale,
            backend=self.backend,
            **options,
        )
        if self.initial_std is not None:
            nn.init.trunc_normal_(adapter.down_weight, std=self.initial_std)
        return edit.add(layer, name, adapter.to(**edit.place(layer)).train(layer.training))

    def append(
        self, edit: Edit, encoder: Encoder, layer: nn.Module, name: str, module: nn.Module, **options: Any
    ) -> None:
        """A new adapter of the output of `module`, a part of the layer or the layer itself."""
        adapter = self.add(edit, encoder, layer, name, **options)
        edit.override(module, Serial(module.forward, adapter))


@dataclass(frozen=True, kw_only=True)
class Combination(Method):
    """The readout of one method over the edits of others: `registry.find("hff-b+aat-ms")`,
    `registry.find("l-mam+aat-ms")`.

    Attributes:
        of: the methods, a readout first, if there is one; the edits change the encoder in their order.
    """

    of: tuple[Method, ...]

    def __post_init__(self) -> None:
        check_combination(self.of)
        edits = [part for part in self.of if part.has_edit]
        starts_from = edits[0].starts_from if self._readout is None else self._readout.name
        # A combination takes from its parts, instance by instance, what other methods have on their class.
        taken = {
            "name": "+".join(part.name for part in self.of),
            "title": " + ".join(part.title for part in self.of),
            "paper": "; ".join(dict.fromkeys(part.paper for part in self.of)),
            # A rate that suits adapters would ruin weights that are trained with them.
            "training": min((part.training for part in edits), key=lambda training: training.learning_rate),
            "starts_from": starts_from,
        }
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    @property
    def _readout(self) -> Method | None:
        return self.of[0] if self.of[0].has_readout else None

    @property
    def has_readout(self) -> bool:
        return self._readout is not None

    def needs_target(self) -> str | None:
        return self.of[0].needs_target()

    def parts(self) -> tuple[Method, ...]:
        return self.of

    def fit(self, task: Task | None) -> Combination:
        return Combination(of=tuple(part.fit(task) for part in self.of))

    def select_taps(self, encoder: Encoder) -> Sequence[Tap]:
        return self.of[0].select_taps(encoder)

    def readout(self, encoder: Encoder) -> nn.Module:
        return self.of[0].readout(encoder)

    def edit(self, encoder: Encoder) -> Edit:
        edits = [part for part in self.of if part.has_edit]
        several = [part for part in edits if isinstance(part, EditMethod)]
        return edits[0].edit(encoder) if len(edits) == 1 else _edit(encoder, self.name, several)

    def parameter_groups(self, model: AdaptedModel) -> dict[str, Group]:
        return self._all([part.parameter_groups(model) for part in self.of])

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        twin = None
        for part in self.of:
            found = part.baseline(model if twin is None else twin)
            twin = twin if found is None else found
        return twin

    def insights(self, model: AdaptedModel) -> dict[str, dict[str, float]]:
        return self._all([part.insights(model) for part in self.of])

    def _all(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """The entries of all parts; where a name is in several, with the names of the methods."""
        count = Counter(name for entries in found for name in entries)
        return {
            f"{name} ({part.name})" if count[name] > 1 else name: value
            for part, entries in zip(self.of, found, strict=True)
            for name, value in entries.items()
        }


def check_combination(parts: Sequence[Method]) -> None:
    """ValueError unless the parts are at most one readout, first, and edits, each once."""
    name = "+".join(part.name for part in parts)
    kinds = [(part.has_readout, part.has_edit) for part in parts]
    edits = parts[1:] if kinds[:1] == [(True, False)] else parts
    if not edits or any((part.has_readout, part.has_edit) != (False, True) for part in edits):
        raise ValueError(
            f"{name!r} must be one method, or a readout + an edit, or several edits, a readout first; "
            "`mmtransfer methods` lists them"
        )
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"{name!r} names a method twice")
    alone = next((each for each in edits if not isinstance(each, EditMethod)), None)
    if len(edits) > 1 and alone is not None:
        raise ValueError(f"{name!r} has several edits, and {alone.name!r} goes with no other")


def _edit(encoder: Encoder, name: str, methods: Sequence[EditMethod]) -> Edit:
    """The changes of all methods, in their order, as one edit."""
    chosen = [method.select(encoder) for method in methods]
    check_distinct(encoder.all_layers)
    check_unquantised([encoder.root], encoder.root, "no gradient passes through it")
    kinds = sorted({method.recompute for method in methods if method.recompute != "none"})
    if len(kinds) > 1:
        raise ValueError(f"{name!r} needs one value of recompute for all, got {' and '.join(kinds)}")
    for method, layers in zip(methods, chosen, strict=True):
        method.check(encoder, layers)
    with Edit(encoder, name) as edit:
        for method, layers in zip(methods, chosen, strict=True):
            method.change(edit, encoder, layers)
        changed = [layer for layer in encoder.layers if any(layer in layers for layers in chosen)]
        add_recompute(edit, encoder, changed, kinds[0] if kinds else "none")
        return edit


def _check_option(method: Method, each: dataclasses.Field[Any], hint: Any) -> None:
    value = getattr(method, each.name)
    choices, least = each.metadata.get("choices"), each.metadata.get("least")
    problem = ""
    try:
        typeguard.check_type(value, hint)
        fits = not isinstance(value, bool) or bool in (hint, *typing.get_args(hint))
    except typeguard.TypeCheckError:
        fits = False
    if not fits:
        problem = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    elif choices and value is not None and value not in choices:
        problem = f"one of {', '.join(choices)}"
    elif least is not None and value is not None and not value >= least:
        problem = f"at least {least}"
    elif not _is_finite(value):
        problem = "finite"
    if problem:
        raise ValueError(f"{method.name}: {each.name} must be {problem}, got {value!r}")


def _is_finite(value: Any) -> bool:
    """False for NaN and infinity, in a tuple too."""
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_predicts(method: Method, *, texts: bool = False) -> None:
    """ValueError for a method whose models predict nothing without the target, which only `texts` give."""
    if not texts and (reason := method.needs_target()) is not None:
        raise ValueError(f"{method.name} cannot be scored: {reason}")


def check_readout(method: Method, readout: Any) -> None:
    """TypeError unless a readout is a module with the width of its result, which heads are made for."""
    width = getattr(readout, "out_dim", None)
    if not isinstance(readout, nn.Module) or isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(
            f"the readout of {method.name} must be a module with an integer attribute out_dim, the width of "
            f"its result, got {type(readout).__name__} with out_dim {width!r}"
        )
