"""The one trainable model: an encoder with an edit, a readout of its layers, and the head of a task."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as recomputation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from mmtransfer import registry, saving
from mmtransfer.data.inputs import AudioInput
from mmtransfer.encoders.autocast import autocast_takes
from mmtransfer.encoders.edit import Edit, check_editable, untouched_on_error
from mmtransfer.encoders.encoder import Encoder, resolve_layers
from mmtransfer.encoders.precision import check_trained
from mmtransfer.encoders.recompute import add_recompute, find_recomputed
from mmtransfer.encoders.tapped import TappedEncoder
from mmtransfer.encoders.taps import Taps
from mmtransfer.method import Compressed, Compressor, Group, Method, check_readout
from mmtransfer.tasks.base import Task, check_task


@dataclass
class AdaptedOutput(ModelOutput):
    """The output of a call.

    Attributes:
        loss: scalar, if there were labels.
        logits: of the task's head; None with labels for a head that computes its loss without them.
        last_hidden_state: without a task: `(B, T, out_dim)`, zero past each length.
        lengths: `(B,)` int64 valid frames, or vectors of a readout that compresses.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class AdaptedModel(nn.Module):
    """A pretrained encoder adapted by a method: edit inside, readout of its layers, head of a task on top.

    transformers' Trainer and accelerate can train it; with `ignore_keys=["lengths"]` its predictions
    are the logits alone. The encoder has no dropout and no augmentation.
    Features are cast to the dtype of the readout's (or head's) weights, except under autocast.

    Args:
        model: a transformers model, changed in place: its encoder is frozen, then edited.
        method: a `Method`, or its name: `"aat-ms"`, `"hff-b+aat-ms"`.
        task: brings head and loss; None gives the sequence of fused frames, for a decoder of the caller.
        dtype: of the encoder, as for `TappedEncoder`.
        options: of the method.

    Attributes:
        encoder: the `TappedEncoder`, with its `edit`.
        readout, head: the modules on top of it; `head` is None without a task.
        audio: how audio files become its input, for `recognize`; kept in checkpoints. None until it is set.

    Raises:
        TypeError, ValueError, ImportError: an encoder that cannot be tapped so or cannot have the method,
            or a wrong option. The model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method,
        task: Task | None = None,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_task(task)
        self.method = registry.find(method, **options).fit(task)
        self.reverted = self._frozen_checked = False
        self.audio: AudioInput | None = None
        self.task = task
        parts = Encoder(Encoder(model).model)
        check_editable(model, parts)
        taps = resolve_layers("taps", self.method.select_taps(parts), parts.num_layers, embeddings=True)
        # Readout and head are drawn first: methods that differ in their edit alone start from the same ones.
        readout: Any = self.method.readout(parts)
        check_readout(self.method, readout)
        self.readout = readout
        if not isinstance(readout, Compressor) and getattr(task, "token_each", False):
            raise ValueError(
                f"{self.method.name} has a vector for each frame, and the task wants one for each token of "
                "the text; choose a method that compresses speech, such as ssr"
            )
        self.head = None if task is None else task.head(readout.out_dim)
        if isinstance(readout, Compressor):
            readout.attach(task, self.head)
        with untouched_on_error(parts.model):
            self.encoder = TappedEncoder(model, taps, dtype=dtype)
            edit: Edit | None = None
            try:
                edit = self.method.edit(self.encoder.parts)
                self.encoder.edit = edit
                check_trained(self.named_parameters())
                saving.install(edit)
            except BaseException:
                if edit is not None:
                    saving.remove(edit)
                    edit.revert()
                raise

    @property
    def edit_is_empty(self) -> bool:
        """Whether the encoder's features never change, so that they may be computed once and stored."""
        return self.encoder.edit.is_empty

    def extract(self, inputs: torch.Tensor, lengths: torch.Tensor | None = None) -> Taps:
        """The tapped features; see `TappedEncoder.forward`. They may be stored if the edit is empty."""
        return self.encoder(inputs, lengths)

    def fuse(self, taps: Taps) -> torch.Tensor:
        """The frames `(N, out_dim)` that the readout makes of tapped features."""
        return self.compress(taps).frames

    def compress(self, taps: Taps, labels: torch.Tensor | None = None) -> Compressed:
        """The frames `(N, out_dim)` that the readout makes of tapped features, with their places.

        Args:
            taps: as `extract` gives them.
            labels: of a readout that compresses, by which it finds its segments; None: as in prediction.
        """
        weight = next(self._top_parameters(), None)
        if weight is not None and not autocast_takes(taps.features):
            taps = replace(taps, features=taps.features.to(weight.dtype))
        if isinstance(self.readout, Compressor):
            return self.readout.compress(taps, labels)
        return Compressed(self.readout(taps.features), taps, labels)

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> AdaptedOutput:
        """Read out an input of the encoder, or stored features.

        Args:
            input_values, input_features, input_ids, pixel_values: the encoder's main input, by its name.
            attention_mask: `(B, S)`, right-padded, along the main input's time axis; it wins over `lengths`.
            lengths: `(B,)`, valid positions of the main input; with `features`, their frames per utterance.
            labels: the second argument of the task's loss.
            features: `(N, L, C)` valid frames of all utterances, as `extract` gives them; the encoder is not
                run, so stored features train no edit.
            text: of a readout that compresses, the transcripts as the task's collate makes labels: the
                segments are those of the text, and there is no loss.

        Raises:
            ValueError: labels without a task or without utterances, features with an input, without lengths
                or of other taps, float16 weights in training, or as `TappedEncoder.forward`.
        """
        inputs = {
            "input_values": input_values,
            "input_features": input_features,
            "input_ids": input_ids,
            "pixel_values": pixel_values,
        }
        named = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_trained(self.named_parameters())  # the model may have been cast since it was built
        if features is not None:
            if named or attention_mask is not None or lengths is None:
                raise ValueError("features go with lengths (their frames per utterance) and with no input")
            taps = Taps.pack(features, lengths)
            expected = len(self.encoder.taps), self.encoder.hidden_size
            if tuple(features.shape[1:]) != expected:
                raise ValueError(
                    f"features must be (N, {expected[0]}, {expected[1]}), the taps "
                    f"{', '.join(map(str, self.encoder.taps))}, got shape {tuple(features.shape)}"
                )
        else:
            if self.training and torch.is_grad_enabled():
                self._check_frozen()
            taps = self.encoder(lengths=lengths, attention_mask=attention_mask, **named)
        if labels is not None and not len(taps.lengths):
            raise ValueError("a batch of 0 utterances has no loss")
        if labels is not None and self.head is None:
            raise ValueError("labels need a task; without one the caller computes the loss")
        if text is not None and (labels is not None or not isinstance(self.readout, Compressor)):
            raise ValueError("text is for a readout that compresses speech, without labels")
        found = self.compress(taps, labels if text is None else text)
        taps = found.taps
        if self.head is None or self.task is None:
            return AdaptedOutput(last_hidden_state=taps.scatter(found.frames), lengths=taps.lengths)
        logits, loss = None, None
        head: Any = self.head
        if labels is None:
            logits = head(found.frames, taps)
        elif hasattr(head, "loss"):
            loss = head.loss(found.frames, taps, found.labels)
        else:
            assert found.labels is not None
            logits = head(found.frames, taps)
            loss = self.task.loss(logits, found.labels, taps.lengths)
        if loss is not None and found.loss is not None:
            loss = loss + found.loss
        return AdaptedOutput(loss=loss, logits=logits, lengths=taps.lengths)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that training changes or the method brings, by name, for a checkpoint."""
        edited = {id(parameter) for parameter in self.encoder.edit.parameters}
        edited |= {id(buffer) for buffer in self.encoder.edit.added_buffers()}
        thawed = set(self.thawed())
        tensors: dict[str, torch.Tensor] = {
            f"encoder.{name}": tensor
            for name, tensor in self.encoder.state_dict(keep_vars=True).items()
            if id(tensor) in edited or f"encoder.{name}" in thawed
        }
        for name in ("readout", "head"):
            part = getattr(self, name)
            if part is not None:
                # A head with a frozen language model leaves that out.
                trained = getattr(part, "trained_tensors", None)
                found = part.state_dict(keep_vars=True) if trained is None else trained()
                tensors |= {f"{name}.{key}": value for key, value in found.items()}
        return tensors

    def thawed(self) -> list[str]:
        """Names of the encoder's parameters that ask for gradients and that the method does not train."""
        edited = {id(parameter) for parameter in self.encoder.edit.parameters}
        return [
            f"encoder.{name}"
            for name, parameter in self.encoder.named_parameters()
            if parameter.requires_grad and id(parameter) not in edited
        ]

    def parameter_groups(self) -> dict[str, Group]:
        """Parameters whose rate is not that of the run; see `Method.parameter_groups`."""
        return self.method.parameter_groups(self)

    #: Asked by transformers' Trainer.
    supports_gradient_checkpointing = True

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        top = any(layer.gradient_checkpointing for layer in self._top_layers())
        return top or any(each.active for each in find_recomputed(self.encoder.parts.layers))

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Have the layers computed again in the backward pass, as the option `recompute="full"` has them.

        So are transformers' layers in readout and head: those of a connector, and of a language model.
        A method with `recompute` keeps its own; while the edit is empty the encoder records no graph anyway.
        The arguments are those that transformers' Trainer gives.

        Raises:
            ValueError: an argument other than `use_reentrant=False`.
        """
        wrong = {key: value for key, value in (gradient_checkpointing_kwargs or {}).items() if value}
        if wrong or every_n_layers != 1 or offload:
            raise ValueError(
                "gradient checkpointing of an AdaptedModel is that of recompute='full': use_reentrant=False "
                "is needed, and every_n_layers and offload have no place; "
                f"got {wrong}, {every_n_layers}, {offload}"
            )
        parts = self.encoder.parts
        recomputed = find_recomputed(parts.layers)
        if not recomputed and not self.edit_is_empty:
            add_recompute(self.encoder.edit, parts, parts.layers, "full")
        for each in recomputed:
            each.active = True
        recompute: Any = functools.partial(recomputation.checkpoint, use_reentrant=False)
        for layer in self._top_layers():
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = recompute

    def gradient_checkpointing_disable(self) -> None:
        """Have the layers keep what the backward pass needs."""
        for each in find_recomputed(self.encoder.parts.layers):
            each.active = False
        for layer in self._top_layers():
            layer.gradient_checkpointing = False

    def _top_layers(self) -> Iterator[GradientCheckpointingLayer]:
        """The layers of readout and head that transformers can compute again."""
        for part in (self.readout, self.head):
            if part is not None:
                yield from (each for each in part.modules() if isinstance(each, GradientCheckpointingLayer))

    def begin_with(self, trained: AdaptedModel) -> None:
        """Copy readout and head from a model of the method that this one starts from."""
        self.readout.load_state_dict(trained.readout.state_dict())
        if self.head is not None and trained.head is not None:
            self.head.load_state_dict(trained.head.state_dict())

    def copy(self) -> AdaptedModel:
        """A deep copy, which shares the pretrained model if nothing in it is changed or trained."""
        if not self.edit_is_empty:
            return copy.deepcopy(self)
        twin = copy.deepcopy(self, {id(self.encoder): self.encoder})
        # Its own, so that reverting one of the two leaves the model frozen for the other.
        twin.encoder = self.encoder.share()
        return twin

    def revert(self) -> None:
        """Give the encoder back as it was, but for its dtype, eval mode, and weights trained in place."""
        saving.remove(self.encoder.edit)
        self.encoder.revert()
        self.reverted = True

    def exchange(self, method: Method) -> None:
        """Have the edit of another method with the same readout. Trained values stay, those of additions too
        where the other edit makes the same."""
        before = self.trained_tensors()
        saving.remove(self.encoder.edit)
        self.encoder.edit.revert()
        self.method = method
        self.encoder.edit = method.edit(self.encoder.parts)
        saving.install(self.encoder.edit)
        with torch.no_grad():
            for name, tensor in self.trained_tensors().items():
                if name in before and tensor is not before[name]:
                    tensor.copy_(before[name])

    def save_pretrained(self, folder: str | Path) -> None:
        """`checkpoint.save` of this model."""
        from mmtransfer import checkpoint

        checkpoint.save(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module | None = None, **runtime: Any
    ) -> AdaptedModel:
        """`checkpoint.load`: the model that `save_pretrained` wrote, in eval mode."""
        from mmtransfer import checkpoint

        return checkpoint.load(folder, model, **runtime)

    def _check_frozen(self) -> None:
        """ValueError, in the first step of training, for parameters that were thawed in vain."""
        if not self._frozen_checked and self.edit_is_empty and (thawed := self.thawed()):
            raise ValueError(
                f"{thawed[0]} asks for a gradient, but {self.method.name} runs the encoder without a graph; "
                "choose a method that trains in the encoder, or freeze the parameter"
            )
        self._frozen_checked = True

    def _top_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.readout.parameters()
        if self.head is not None:
            yield from self.head.parameters()
