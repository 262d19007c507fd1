"""A transformers encoder that hands out the outputs of chosen layers (HFF, arXiv 2211.02712)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from . import whisper
from .autocast import without_autocast
from .checks import FLOATING, check_not_parallel
from .edit import Edit, check_unedited, untouched_on_error
from .encoder import Encoder, Tap, resolve_layers
from .inputs import check_input
from .taps import Taps, attach_states, check_lengths, frame_index


class TappedEncoder(nn.Module):
    """Run an encoder without dropout up to its last tap: a feature extractor, until an edit trains in it.

    Tap k is the output of encoder layer k (0-based, the paper's {1, 3, ..., 23}), which transformers calls
    `hidden_states[k + 1]`; negative k count from the last layer; "embeddings" is the input of layer 0,
    `hidden_states[0]`. Each tapped layer writes its valid frames straight into its slot of one `(N, L, C)`
    buffer; no other state is kept. The order of `taps` is the order of the slots.

    The last layer's tap is what transformers reports as the last of `hidden_states`: after the encoder's
    final norm for Whisper, before it for the pre-norm variants of the wav2vec2 family and for the audio
    spectrogram transformer, and the layer's own output in the models without a final norm.

    The encoder's weights are frozen in place, so the model passed in is frozen too. Nothing else is changed:
    several tapped encoders may share one model. An edit is for one of them; the others refuse to run while it
    is in force, as their features would be those of the edited model. While `edit` is empty no graph is
    recorded; afterwards gradients reach the parameters that the edit trains, and inputs that ask for one, and
    layers below the lowest of them record no graph. Autocast of the caller applies, unless `dtype` is given
    or the weights are float16.
    The encoder runs eagerly: under `torch.compile` it is a graph break.

    Padding: with lengths given, the attention and the positional convolutions ignore padded frames, so an
    utterance gets the same features alone and in a padded batch, up to rounding. Exceptions, which the models
    do not permit: group-norm stems (wav2vec2-base, hubert-base: the norm's statistics include the padding),
    data2vec-audio and wav2vec2-conformer (unmasked convolutions), and Whisper with its full window of 3000
    mel frames, where it attends to the padding as it was trained to. Whisper also takes shorter inputs here;
    the position embeddings are cut to the input and padding is masked.

    Args:
        model: a transformers model of a type in `mmtransfer.encoders.DESCRIPTIONS`; one with a head or a
            decoder is used for its encoder.
        taps: layers to tap, no layer twice.
        dtype: cast the encoder to this floating dtype, in place; None keeps it as it is.

    Attributes:
        parts: the `Encoder`, whose `layers` are those up to the last tap.
        edit: the changes and trained parameters in it; empty at first.

    Raises:
        TypeError, ValueError: no such model type, tap or dtype; a repeated tap; weights on the meta device; a
            model that is edited already. The model is untouched.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype or None, got {dtype}")
        # The encoder alone: parameters of a head or a decoder are no part of it.
        parts = Encoder(Encoder(model).model)
        if any(parameter.is_meta for parameter in parts.model.parameters()):
            raise ValueError("model has weights on the meta device; load its weights before tapping it")
        check_unedited(parts.model)
        check_not_parallel(model)
        self.taps = resolve_layers("taps", taps, parts.num_layers, embeddings=True)
        self.parts = parts.up_to(self.taps)
        self.description, self.model = parts.description, parts.model
        self.num_layers, self.hidden_size = parts.num_layers, parts.hidden_size
        self.dtype_given = dtype is not None
        with untouched_on_error(self.model):
            if dtype is not None:
                self.model.to(dtype)
            self._freeze = self.edit = Edit.nothing(self.parts)
            self.eval()

    def train(self, mode: bool = True) -> TappedEncoder:
        """Stay in eval mode for either argument: dropout and layer drop would change the features."""
        return super().train(False)

    def revert(self) -> None:
        """Take the edit back, and give the weights the `requires_grad` flags that they had before tapping.

        The model keeps its dtype and stays in eval mode.
        """
        self.edit.check_alone()
        self.edit.revert()
        self._freeze.revert()

    def share(self) -> TappedEncoder:
        """Another tapped encoder of the same model and taps, without an edit."""
        other = TappedEncoder(self.model, self.taps)
        other.dtype_given = self.dtype_given
        return other

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder's weights."""
        dtypes = (parameter.dtype for parameter in self.model.parameters())
        return next((dtype for dtype in dtypes if dtype in FLOATING), torch.float32)

    def extra_repr(self) -> str:
        return f"{self.description.model_type}, taps={list(self.taps)}"

    @torch.compiler.disable
    def forward(
        self,
        inputs: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        **named_input: torch.Tensor,
    ) -> Taps:
        """The tapped layers' outputs for the valid frames.

        Args:
            inputs: the main input, positionally or by its own name (`input_values`, `input_features`,
                `input_ids`); floating inputs are cast to the encoder's dtype.
            lengths: `(B,)` integers, valid positions along the input's time axis: samples of a waveform,
                mel frames, tokens. None means that all are valid. The frames of an utterance that is too
                short for one are 0. Lengths on a GPU cost one synchronisation.
            attention_mask: `(B, S)`, the lengths as a right-padded mask; it wins over `lengths`.

        The audio spectrogram transformer has a fixed input, all of whose frames count: it ignores both.
        """
        self.edit.check_alone()
        inputs = self._main_input(inputs, named_input)
        counts = self._input_lengths(inputs, lengths, attention_mask)
        recorder = _Recorder(len(self.taps), None if counts is None else self.parts.frame_lengths(counts))
        if self.model.training:
            self.model.eval()
        call = self._call(inputs, counts)
        with (
            torch.no_grad() if self.edit.is_empty else contextlib.nullcontext(),
            self._autocast(inputs.device.type),
            recorder.listening(self._tap_points()),
        ):
            call()
        return recorder.taps()

    def _call(self, inputs: torch.Tensor, lengths: torch.Tensor | None) -> Callable[[], object]:
        """The encoder's forward with its inputs bound; `lengths` only where there is padding."""
        if lengths is not None:
            lengths = lengths.to(inputs.device)
        if self.description.model_type == "whisper" and inputs.shape[2] < whisper.window_length(self.model):
            return functools.partial(whisper.encode_short, self.model, inputs, lengths)
        mask = None
        if lengths is not None and self.description.takes_mask:
            # transformers' mask for an utterance without a single frame indexes out of range; its frames are
            # dropped, so it may as well have one.
            lengths = lengths.clamp(min=self.parts.minimum_length)
            positions = torch.arange(inputs.shape[self.description.time_dim], device=inputs.device)
            mask = (positions < lengths.unsqueeze(1)).long()
        options = {"use_cache": False} if self.description.keeps_keys else {}
        return functools.partial(self.model, inputs, attention_mask=mask, **options)

    def _tap_points(self) -> list[_TapPoint]:
        layers = self.parts.all_layers
        norm = self.parts.final_norm if self.description.last_state_normed else None
        points = []
        for slot, tap in enumerate(self.taps):
            if tap == "embeddings":
                points.append(_TapPoint(slot, -1, layers[0], takes_input=True))
            elif tap == self.num_layers - 1 and norm is not None:
                points.append(_TapPoint(slot, tap, norm))
            else:
                points.append(_TapPoint(slot, tap, layers[tap]))
        return points

    def _autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        # Not in float16: torch's norms refuse float16 weights next to the bfloat16 of autocast.
        own = self.dtype_given or self.dtype == torch.float16
        return without_autocast(device_type) if own else contextlib.nullcontext()

    def _main_input(self, inputs: torch.Tensor | None, named: dict[str, torch.Tensor]) -> torch.Tensor:
        name = self.description.main_input
        if wrong := [key for key in named if key != name]:
            raise ValueError(
                f"the main input of {self.description.model_type} is called {name!r}, "
                f"got {', '.join(map(repr, wrong))}"
            )
        if (inputs is None) == (name not in named):
            raise ValueError(f"give the main input once, positionally or as {name!r}")
        tensor = named[name] if inputs is None else inputs
        check_input(self.parts, tensor)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _input_lengths(
        self, inputs: torch.Tensor, lengths: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Checked lengths on the CPU, or None where nothing is padded."""
        if self.description.frames == "fixed" or (lengths is None and attention_mask is None):
            return None
        batch, size = inputs.shape[0], inputs.shape[self.description.time_dim]
        if attention_mask is not None:
            counts = _mask_lengths(attention_mask, batch, size)
        else:
            assert lengths is not None
            check_lengths("lengths", lengths)
            counts = lengths.to("cpu", torch.int64)
        if counts.shape[0] != batch:
            raise ValueError(f"lengths must have one entry per utterance ({batch}), got {counts.shape[0]}")
        if batch and (int(counts.min()) < 0 or int(counts.max()) > size):
            raise ValueError(
                f"lengths must be within [0, {size}], the time axis of {self.description.main_input} "
                f"{tuple(inputs.shape)}, got {counts.tolist()}"
            )
        return counts if bool((counts < size).any()) else None


class _TapPoint:
    """The place of one tap: the input or the output of a module, at `depth` in the order of execution."""

    def __init__(self, slot: int, depth: int, module: nn.Module, *, takes_input: bool = False) -> None:
        self.slot, self.depth, self.module, self.takes_input = slot, depth, module, takes_input


class _LastTapWrittenError(BaseException):
    """Leaves the encoder; not an Exception, so that no handler on the way takes it for a failure."""


# The run that hooks write for. Hooks of one run see the calls of others (threads share the modules).
_active: ContextVar[_Recorder | None] = ContextVar("mmtransfer_active_recorder", default=None)


class _Recorder:
    """One run: the buffer, made when the first tap tells its size, and the hooks that fill it."""

    def __init__(self, num_taps: int, lengths: torch.Tensor | None) -> None:
        self.num_taps = num_taps
        self.lengths = lengths
        self.index: torch.Tensor | None = None
        self.features: torch.Tensor | None = None
        # The tapped states that have a graph, by slot.
        self.states: dict[int, torch.Tensor] = {}
        self.batch = self.steps = 0

    @contextlib.contextmanager
    def listening(self, points: list[_TapPoint]) -> Iterator[None]:
        """Hook the tap points; leave the body as soon as the deepest tap is written."""
        deepest = max(point.depth for point in points)
        token = _active.set(self)
        handles = []
        try:
            for point in points:
                hook = functools.partial(self._hook, point, point.depth == deepest)
                if point.takes_input:
                    handles.append(point.module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(point.module.register_forward_hook(hook))
            yield
        except _LastTapWrittenError:
            pass
        finally:
            _active.reset(token)
            for handle in handles:
                handle.remove()

    def taps(self) -> Taps:
        if self.features is None:
            raise RuntimeError("the encoder did not run any tapped layer")
        device = self.features.device
        lengths = torch.full((self.batch,), self.steps) if self.lengths is None else self.lengths
        features = attach_states(self.features, self.index, self.states)
        return Taps(features=features, lengths=lengths.to(device), steps=self.steps, index=self.index)

    def _hook(
        self, point: _TapPoint, last: bool, module: nn.Module, args: tuple[Any, ...], extra: Any
    ) -> None:
        """A forward hook (`extra` is the output) or pre-hook (`extra` is the keyword arguments)."""
        if _active.get() is not self:
            return
        if point.takes_input:
            state = args[0] if args else extra["hidden_states"]
        else:
            state = extra[0] if isinstance(extra, tuple) else extra
        if torch.is_grad_enabled() and state.requires_grad:
            self.states[point.slot] = state
        self._write(point.slot, state)
        if last:
            raise _LastTapWrittenError

    @torch.no_grad()
    def _write(self, slot: int, state: torch.Tensor) -> None:
        if self.features is None:
            self._allocate(state)
        assert self.features is not None
        frames = state.reshape(self.batch * self.steps, state.shape[2])
        if self.index is None:
            self.features[:, slot].copy_(frames)
        elif frames.dtype == self.features.dtype:
            torch.index_select(frames, 0, self.index, out=self.features[:, slot])
        else:
            self.features[:, slot].copy_(frames.index_select(0, self.index))

    def _allocate(self, state: torch.Tensor) -> None:
        self.batch, self.steps, width = state.shape
        if self.lengths is not None:
            index = frame_index(self.lengths, self.steps)
            self.index = None if index is None else index.to(state.device)
        frames = self.batch * self.steps if self.index is None else self.index.shape[0]
        self.features = state.new_empty(frames, self.num_taps, width)


def tap_name(tap: Tap) -> str:
    """A tap in tables and figures."""
    return "embeddings" if tap == "embeddings" else f"layer {tap}"


def _mask_lengths(mask: torch.Tensor, batch: int, size: int) -> torch.Tensor:
    """Lengths of a right-padded mask, with one transfer from its device."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    if tuple(mask.shape) != (batch, size):
        raise ValueError(f"attention_mask must be {(batch, size)}, got shape {tuple(mask.shape)}")
    valid = mask.bool()
    counts = valid.sum(dim=1)
    holes = (valid != (torch.arange(size, device=mask.device) < counts.unsqueeze(1))).any()
    # An additive mask has 0 where positions are valid.
    others = (mask != valid).any()
    *lengths, has_others, has_holes = torch.cat([counts, torch.stack([others, holes]).long()]).tolist()
    if has_others:
        raise ValueError("attention_mask must be 1 for valid positions and 0 for padding")
    if has_holes:
        raise ValueError("attention_mask must be right-padded: ones, then zeros")
    return torch.tensor(lengths, dtype=torch.int64)
