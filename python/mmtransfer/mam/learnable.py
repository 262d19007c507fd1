"""L-MAM: attention merged with a learnt share of the source, once for each step of the optimiser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

import mmkernels
from mmkernels.nn.cached_merge import Block, can_reuse, merge_blocks
from mmkernels.nn.merge import constrain
from mmtransfer.encoders.autocast import autocast_dtype
from mmtransfer.encoders.edit import Edit
from mmtransfer.encoders.encoder import Encoder

from .projections import PARTS, Projection

#: The child of a layer that has its share and the source's matrices.
CHILD = "attention_merge"


class LayerMerge(nn.Module):
    """The part of L-MAM in a layer: the source's matrices, which are buffers, and the layer's own shares.

    Attributes:
        lam: `(1,)`, or one for each projection; before the constraint. None where the lowest merged layer has
            the one share of all.
        merging: of the whole encoder.
    """

    lam: nn.Parameter | None
    merging: Merging

    def __init__(self, sources: dict[str, torch.Tensor], lam: torch.Tensor | None) -> None:
        super().__init__()
        for name, tensor in sources.items():
            self.register_buffer(name, tensor)
        self.register_parameter("lam", None if lam is None else nn.Parameter(lam))


@dataclass(frozen=True)
class Slot:
    """One parameter of a projection: the place of its values among the merged ones of its layer.

    Attributes:
        layer: place of the layer among those that are merged.
        places: of its pairs in the layer's block, by part; one, unless the parameter has all three.
        projection: the first of them.
    """

    layer: int
    places: dict[str, int]
    projection: Projection


@dataclass(frozen=True)
class MergedLayer:
    """The pairs of a layer: projections of the target, buffers of `own`, and shares of `shares`."""

    own: LayerMerge
    shares: LayerMerge
    projections: tuple[Projection, ...]
    buffers: tuple[str, ...]
    groups: tuple[int, ...]

    def block(self) -> Block:
        lam = self.shares.lam
        assert lam is not None
        targets = [each.view for each in self.projections]
        return Block(lam, targets, [getattr(self.own, name) for name in self.buffers], [*self.groups])


class _Steps:
    """Steps that any optimiser has taken: some write through `.data`, which no version counter sees."""

    count = 0
    hook: Any = None

    @classmethod
    def watch(cls) -> None:
        if cls.hook is None:
            cls.hook = register_optimizer_step_post_hook(cls._add)

    @classmethod
    def _add(cls, *_: Any) -> None:
        cls.count += 1


@dataclass
class _Held:
    """Merged parameters, and the state of everything that they were made of."""

    values: list[torch.Tensor]
    blocks: list[Block]
    states: list[tuple[Any, ...]]
    steps: int
    dtype: torch.dtype | None
    graph: bool
    inference: bool
    #: Aliases that keep the memory, so that no other tensor has its address.
    aliases: list[torch.Tensor]


class Merging:
    """The merged attention of an encoder. It is made when the first projection is called, in one call for all
    layers, and used until a share, a weight, autocast's dtype or the mode (`train`, `eval`) changes, an
    optimiser takes a step, or gradients are set to None. Writes through `.data` alone are not seen before one
    of these.

    Refers to modules and not to their tensors, so that a deep copy of the model has its own.

    Attributes:
        layers: those that are merged.
        slots: their parameters.
        count: how often all was merged.
        as_published: merge in each call by the naive expression instead.
    """

    def __init__(self, layers: Sequence[MergedLayer], constraint: str, backend: str) -> None:
        self.layers = list(layers)
        self.constraint, self.backend = constraint, backend
        self.slots = [slot for index, layer in enumerate(self.layers) for slot in _slots(index, layer)]
        self.count = 0
        self.as_published = False
        self._held: _Held | None = None
        self._lock = threading.Lock()
        _Steps.watch()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files have no graph.
        return {**self.__dict__, "_held": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        _Steps.watch()

    def value(self, index: int) -> torch.Tensor:
        """The merged parameter of a slot."""
        if self.as_published or not can_reuse():
            return self._value_of_now(self.slots[index])
        dtype = self._autocast_dtype(index)
        held = self._held
        if held is None or not self._fits(held, index, dtype):
            with self._lock:
                held = self._held
                if held is None or not self._fits(held, index, dtype):
                    held = self._held = self._merge(dtype)
        return held.values[index]

    def shares(self) -> Iterator[tuple[MergedLayer, torch.Tensor]]:
        """The shares of the source, as they are used, of each layer that has its own."""
        for layer in self.layers:
            if layer.own.lam is not None:
                yield layer, constrain(layer.own.lam.detach(), self.constraint)

    @torch.no_grad()
    def write(self) -> None:
        """Write the merged values into the target's parameters."""
        held = self._merge(None)
        for slot, value in zip(self.slots, held.values, strict=True):
            slot.projection.parameter.copy_(value)

    def _autocast_dtype(self, index: int) -> torch.dtype | None:
        parameter = self.slots[index].projection.parameter
        dtype = autocast_dtype(parameter.device.type)
        return None if dtype == parameter.dtype or parameter.dtype == torch.float64 else dtype

    def _fits(self, held: _Held, index: int, dtype: torch.dtype | None) -> bool:
        state = self._state(self.slots[index])
        return (
            held.steps == _Steps.count
            and held.dtype == dtype
            and held.states[index] == state
            and not self._is_stepped(held, index)
            and (held.graph or not (torch.is_grad_enabled() and any(state[-1])))
            and (not held.inference or torch.is_inference_mode_enabled())
        )

    def _is_stepped(self, held: _Held, index: int) -> bool:
        """Whether the gradients of a backward pass are gone: a step that no optimiser has told of."""
        slot = self.slots[index]
        trained = self.layers[slot.layer].shares.lam, slot.projection.parameter
        gone = all(each.grad is None for each in trained if each is not None and each.requires_grad)
        return gone and held.blocks[slot.layer].passed

    def _state(self, slot: Slot) -> tuple[Any, ...]:
        """The mode, and of the tensors behind a slot: places, how often written, which want a gradient."""
        layer = self.layers[slot.layer]
        sources = (layer.own._buffers[layer.buffers[place]] for place in slot.places.values())
        tensors: tuple[Any, ...] = (slot.projection.parameter, layer.shares.lam, *sources)
        written = tuple([0 if each.is_inference() else each._version for each in tensors])
        places = tuple([each.data_ptr() for each in tensors])
        training = slot.projection.owner.training
        return training, written, places, (tensors[0].requires_grad, tensors[1].requires_grad)

    def _merge(self, dtype: torch.dtype | None) -> _Held:
        # The old values are dropped first: both need not be there at once.
        self._held = None
        for slot in self.slots:
            if hasattr(slot.projection.parameter, "device_mesh"):
                raise ValueError(
                    f"{slot.projection.name} is sharded, and merging needs all of it; use "
                    "DistributedDataParallel, or fold the model first"
                )
        steps, states = _Steps.count, [self._state(slot) for slot in self.slots]
        blocks = [layer.block() for layer in self.layers]
        merged = merge_blocks(blocks, constraint=self.constraint, dtype=dtype, backend=self.backend)
        values = [_assemble(slot, merged[slot.layer].__getitem__, dtype) for slot in self.slots]
        aliases = [slot.projection.parameter.detach() for slot in self.slots]
        aliases += [tensor for block in blocks for tensor in (block.weights.detach(), *block.source)]
        self.count += 1
        graph, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return _Held(values, blocks, states, steps, dtype, graph, inference, aliases)

    def _value_of_now(self, slot: Slot) -> torch.Tensor:
        """The merged parameter of a slot, of this call alone."""
        block = self.layers[slot.layer].block()
        lam = constrain(block.weights, self.constraint)

        def merge(place: int) -> torch.Tensor:
            target, source, share = block.target[place], block.source[place], lam[block.groups[place]]
            if self.as_published:
                return (share * source + (1 - share) * target).to(target.dtype)
            return mmkernels.merge([target], [source], share, backend=self.backend)[0]

        return _assemble(slot, merge, None)


def _slots(index: int, layer: MergedLayer) -> Iterator[Slot]:
    """One for each parameter; the parts of a fused one are together."""
    found: dict[tuple[int, str], Slot] = {}
    for place, each in enumerate(layer.projections):
        key = id(each.owner), each.attribute
        found.setdefault(key, Slot(index, {}, each)).places[each.part] = place
    yield from found.values()


def _assemble(slot: Slot, merged: Callable[[int], torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    """The whole parameter: in a fused layout all three parts, of which some may not be merged."""
    first = slot.projection
    if first.fused is None:
        return merged(slot.places[first.part])
    parts = []
    transposed = first.fused == "columns" and first.kind == "weight"
    for index, part in enumerate(PARTS):
        if part in slot.places:
            piece = merged(slot.places[part])
            parts.append(piece.t() if transposed else piece)
        else:
            own = first.parameter.chunk(3, dim=1 if transposed else 0)[index]
            parts.append(own if dtype is None else own.to(dtype))
    return torch.cat(parts, dim=1 if transposed else 0)


class MergedForward:
    """Called in place of a projection's `forward`: the same with merged parameters."""

    def __init__(self, module: nn.Module, merging: Merging, slots: dict[str, int]) -> None:
        self.module, self.merging, self.slots = module, merging, slots

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter of the module, merged if it is one that is."""
        slot = self.slots.get(name)
        return getattr(self.module, name) if slot is None else self.merging.value(slot)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.parameter("weight"), self.parameter("bias")
        assert weight is not None
        if isinstance(self.module, Conv1D):
            assert bias is not None
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)


class MergedLinear(nn.Linear):
    """In place of a linear layer whose parameters are read and that is not called: they read as merged.

    It shares the parameters, and all else, with the module that it stands for.
    """

    merged: MergedForward

    def __init__(self, module: nn.Linear, merged: MergedForward) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(module.__dict__)
        self.__dict__["merged"] = merged

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        found = self.merged.parameter("weight")
        assert found is not None
        return found

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.merged.parameter("bias")


def check_projections(encoder: Encoder, projections: Sequence[Projection]) -> None:
    """ValueError for projections whose parameters cannot be replaced by others in a call."""
    called = encoder.description.calls_projections
    for each in projections:
        kind = type(each.owner)
        # A subclass that computes as a linear layer does, such as one with a parametrised bias, is as good.
        plain = kind.forward in (nn.Linear.forward, Conv1D.forward) if called else kind is nn.Linear
        if not plain or "forward" in each.owner.__dict__:
            raise ValueError(
                f"{each.name} is in a {kind.__name__}, and learnt merging replaces the weights of plain "
                "linear layers; merge before training instead (mmtransfer.mam.merge)"
            )


def install(edit: Edit, encoder: Encoder, merging: Merging) -> None:
    """Have the projections use the merged parameters."""
    by_owner: dict[int, tuple[nn.Module, dict[str, int]]] = {}
    for index, slot in enumerate(merging.slots):
        owner = slot.projection.owner
        by_owner.setdefault(id(owner), (owner, {}))[1][slot.projection.attribute] = index
    if encoder.description.calls_projections:
        for owner, slots in by_owner.values():
            edit.override(owner, MergedForward(owner, merging, slots))
        return
    for parent in list(encoder.model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_owner and isinstance(child, nn.Linear):
                merged = MergedForward(child, merging, by_owner[id(child)][1])
                edit.note_child(parent, name)
                setattr(parent, name, MergedLinear(child, merged))


def find_merging(model: nn.Module) -> Merging | None:
    """The merged attention in a model that has L-MAM in force."""
    return next((each.merging for each in model.modules() if isinstance(each, LayerMerge)), None)
