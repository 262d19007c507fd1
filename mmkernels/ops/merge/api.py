"""The public function :func:`merge`: checks, choice of backend, gradients."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference
from mmkernels.ops.merge import reference
from mmkernels.ops.merge.schema import OPS

_HALF = (torch.float16, torch.bfloat16)


class _Merge(torch.autograd.Function):
    """Arguments: the backend, the one asked for, the dtype of the results, `lam` and the groups; then all
    targets, and all sources."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, asked: str, dtype: torch.dtype, lam: Tensor, groups: list[int], *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(groups)
        ctx.save_for_backward(lam, *pairs)
        ctx.options = backend, asked, dtype, groups
        ctx.set_materialize_grads(False)
        merged = OPS[backend][0](list(pairs[:count]), list(pairs[count:]), lam, groups, dtype)
        _, _, _, of_lam, _, *of_pairs = ctx.needs_input_grad
        if not of_lam:
            frozen = [not (of_pairs[index] or of_pairs[count + index]) for index in range(count)]
            ctx.mark_non_differentiable(*[m for m, still in zip(merged, frozen, strict=True) if still])
        return tuple(merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        lam, *pairs = _common.saved_tensors("merge", ctx)
        backend, _, _, groups = ctx.options
        count, need_lam = len(groups), ctx.needs_input_grad[3]
        needed = ctx.needs_input_grad[5:]
        # A result that nobody used has no gradient, and costs nothing.
        used = [
            index
            for index, grad in enumerate(grads)
            if grad is not None and (need_lam or needed[index] or needed[count + index])
        ]
        some: Any = [grads[index] for index in used]
        target, source = [pairs[index] for index in used], [pairs[count + index] for index in used]
        need_target = [place for place, index in enumerate(used) if needed[index]]
        need_source = [place for place, index in enumerate(used) if needed[count + index]]
        arguments = (some, target, source, lam, [groups[index] for index in used], need_lam)
        d_lam: Tensor | None = None
        d_target: list[Any] = []
        d_source: list[Any] = []
        if used and _derivatives.beyond_kernels(*some):
            d_lam, d_target, d_source = _reference_gradients(ctx, *arguments, need_target, need_source)
        elif used:
            d_lam, d_target, d_source = OPS[backend][2](*arguments, need_target, need_source)
        inputs = [used[place] for place in need_target] + [count + used[place] for place in need_source]
        by_input: dict[int, Tensor] = dict(zip(inputs, [*d_target, *d_source], strict=True))
        of_pairs = (by_input.get(index) for index in range(2 * count))
        return (*(None, None, None), d_lam if need_lam else None, None, *of_pairs)


def _reference_gradients(
    ctx: Any,
    grads: Sequence[Tensor],
    target: list[Tensor],
    source: list[Tensor],
    lam: Tensor,
    groups: list[int],
    need_lam: bool,
    need_target: list[int],
    need_source: list[int],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The results of the op for these arguments, by the reference."""
    _, asked, dtype, _ = ctx.options
    count = len(target)

    def merged(lam: Tensor, *pairs: Tensor) -> list[Tensor]:
        return reference.merge(pairs[:count], pairs[count:], lam, groups=groups, dtype=dtype)

    needed = [place in need_target for place in range(count)]
    needed += [place in need_source for place in range(count)]
    d_lam, *of_pairs = _derivatives.reference_gradients(
        "merge", asked, merged, (lam, *target, *source), (need_lam, *needed), grads
    )
    return d_lam, [of_pairs[place] for place in need_target], [of_pairs[count + p] for p in need_source]


def merge(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    lam: Tensor | float | Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Interpolate many pairs of tensors at once: ``(1 - lam[g]) * target[k] + lam[g] * source[k]``.

    One launch reads every pair once. The extra memory is the results, or nothing with ``out``; the backward
    pass, also one launch and a small one for the sums, adds the gradients that it returns.

    Equivalent to (for tensors of one dtype)::

        groups = groups or [k % len(lam) for k in range(len(target))]
        out = [torch.lerp(t, s, lam[g]) for t, s, g in zip(target, source, groups)]

    Args:
        target: A list of tensors on one device, each of any shape, strides and dtype (float32, float16,
            bfloat16). A tensor that is not contiguous is copied once.
        source: As many tensors, of the same shapes. A source may have another dtype than its target.
        lam: Weight of the source: a number, or one entry for all pairs, one for each pair, or, with
            ``groups``, ``(G,)``. A tensor on the device of ``target`` of any floating dtype, read in float32
            (float64 for float64), or a sequence of numbers. Any finite values; outside ``[0, 1]`` the result
            lies beyond the ends. Values of a tensor on CUDA are not read by the host, and not checked; a
            sequence is copied there, which the capture of a CUDA graph does not allow.
        groups: For each pair the index of its entry of ``lam``, as Python integers.
        dtype: Of the results; by default each has its target's.
        out: Contiguous tensors of the shapes and dtypes of the results: they are written and returned, and
            there is no gradient. ``out[k]`` may be ``target[k]``, or ``source[k]``, itself; otherwise it
            shares no memory with another tensor of the call.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        One contiguous tensor for each pair, computed in float32 (float64) and rounded once. Where ``lam`` is
        0 or 1 it is a copy of the target or the source, also if the other holds infinities or NaN.

    Pairs of several dtypes are one launch for each combination. A pair of float16 and bfloat16 is first
    copied to float32 on one side. float64 is for the CPU, and for calls in which all tensors have it.
    Autocast changes nothing.

    Gradients flow to ``lam`` and to those ``target`` and ``source`` tensors that require them, in one pass;
    a result that nobody uses costs nothing there. Sums have a fixed order; the gradient of a float32 ``lam``
    is a float32 sum. The tensors are kept for the backward pass, not copied: overwriting one in between is
    an error there. Forward mode, ``torch.func`` and gradients of gradients are the reference's: ``"auto"``
    takes it by itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Lengths, shapes, devices or dtypes that do not match, a group that ``lam`` has no entry
            for, a value of ``lam`` that is not finite, ``out`` where a gradient is needed or over memory that
            another pair reads or writes, or a backend that cannot serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: the merged attention of MAM and L-MAM (arXiv 2312.14378).
    """
    _check_lists(target, source, dtype, out)
    if len(target) == 0:
        return []
    first = target[0]
    weights = _weights(lam, first)
    groups = _groups(groups, weights, len(target))
    asked = backend
    in_transform = forward_ad._current_level >= 0 or _derivatives.transforms_active()
    if in_transform:
        backend = _derivatives.backend_in_transforms("merge", backend, (weights, *target, *source))
    backend = _common.choose_backend("merge", backend, first)
    # The checks of 72 pairs take half of a small call's time. The compiled op compares the tensors too, so in
    # the usual call on the CPU they run only for their message, after the op has refused.
    alike = _have_one_dtype(target) and _have_one_dtype(source)
    op_checks = (
        backend == "native"
        and first.is_cpu
        and alike
        and (out is None or _have_one_dtype(out, dtype or first.dtype))
        and not torch.compiler.is_compiling()
    )
    if not op_checks:
        _check_tensors(target, source, dtype, out)
    try:
        if out is not None:
            _check_no_gradient(weights, target, source, out)
            if not torch.compiler.is_compiling() and not in_transform:
                _check_overlap(weights, target, source, out)
        if backend == "reference":
            merged = reference.merge(target, source, weights, groups=groups, dtype=dtype)
            return merged if out is None else _copy_into(out, merged)
        call = _Call(backend, asked, weights)
        if alike:
            return call.run(target, source, groups, dtype or first.dtype, out)
        return call.run_by_dtype(target, source, groups, dtype, out)
    except (RuntimeError, AttributeError, TypeError):
        if op_checks:
            _check_tensors(target, source, dtype, out)
        raise


@dataclass(frozen=True)
class _Call:
    """The part of a call that is the same for all pairs."""

    backend: str
    asked: str
    weights: Tensor

    def run(
        self,
        target: Sequence[Tensor],
        source: Sequence[Tensor],
        groups: Sequence[int],
        dtype: torch.dtype,
        out: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Pairs in which all targets have one dtype, and all sources have one."""
        target, source = _one_half_type(target, source, dtype)
        target, source, groups = list(target), list(source), list(groups)
        ops = OPS[self.backend]
        if out is not None:
            out = list(out)
            ops[1](target, source, self.weights, groups, out)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(out)
            return out
        if not _common.needs_gradient(self.weights, *target, *source):
            merged: list[Tensor] = ops[0](target, source, self.weights, groups, dtype)
            return merged
        options = self.backend, self.asked, dtype, self.weights, groups
        return list(_inference.apply(_Merge, target[0], *options, *target, *source))

    def run_by_dtype(
        self,
        target: Sequence[Tensor],
        source: Sequence[Tensor],
        groups: Sequence[int],
        dtype: torch.dtype | None,
        out: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for index, (a, b) in enumerate(zip(target, source, strict=True)):
            alike.setdefault((a.dtype, b.dtype), []).append(index)
        by_index: dict[int, Tensor] = {}
        for (of_target, _), indices in alike.items():
            results = self.run(
                [target[index] for index in indices],
                [source[index] for index in indices],
                [groups[index] for index in indices],
                dtype or of_target,
                None if out is None else [out[index] for index in indices],
            )
            by_index.update(zip(indices, results, strict=True))
        return [by_index[index] for index in range(len(target))]


def _have_one_dtype(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    # Something that is no tensor is found later.
    dtypes = {getattr(tensor, "dtype", None) for tensor in tensors}
    return len(dtypes) == 1 and (dtype is None or dtype in dtypes)


def _one_half_type(
    target: Sequence[Tensor], source: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The kernels take one type of half precision at a time; that of the result, or of the target, stays."""
    kept = dtype if dtype in _HALF else target[0].dtype
    if kept in _HALF:
        if target[0].dtype in _HALF and target[0].dtype != kept:
            target = [tensor.float() for tensor in target]
        if source[0].dtype in _HALF and source[0].dtype != kept:
            source = [tensor.float() for tensor in source]
    return target, source


def _copy_into(out: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    for tensor, result in zip(out, results, strict=True):
        tensor.copy_(result)
    return list(out)


def _check_lists(target: object, source: object, dtype: object, out: object) -> None:
    lists = {"target": target, "source": source} | ({} if out is None else {"out": out})
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"merge: {name} must be a list or tuple of tensors, got {type(value).__name__}")
        if len(value) != len(target):  # type: ignore[arg-type]
            raise ValueError(
                f"merge: {name} must have as many tensors as target, {len(target)}, got {len(value)}"  # type: ignore[arg-type]
            )
    if dtype is not None and dtype not in _common.FLOATING:
        raise TypeError(f"merge: dtype must be float32, float16, bfloat16 or float64, got {dtype}")


def _weights(lam: Tensor | float | Sequence[float], first: Tensor) -> Tensor:
    """``lam`` as ``(G,)`` in the accumulation type, on the device of the tensors."""
    _common.check_tensor("merge", "target[0]", first)
    wide, device = _common.accumulate_dtype(first.dtype), first.device
    if isinstance(lam, Tensor):
        _common.check_floating("merge", "lam", lam)
        if lam.device != device:
            raise ValueError(f"merge: lam is on {lam.device}, target[0] is on {device}")
        if lam.dim() > 1:
            raise ValueError(
                f"merge: lam must be a number or have one dimension, got shape {tuple(lam.shape)}"
            )
        _check_values(lam, wide)
        lam = lam.reshape(1) if lam.dim() == 0 else lam
        return lam if lam.dtype == wide else lam.to(wide)
    if isinstance(lam, (int, float)):
        _check_finite([lam], wide)
        return torch.full((1,), lam, dtype=wide, device=device)  # no copy from the host
    if not isinstance(lam, (list, tuple)):
        raise TypeError(
            f"merge: lam must be a tensor, a number or a list of numbers, got {type(lam).__name__}"
        )
    for index, value in enumerate(lam):
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"merge: lam[{index}] must be a number, got {type(value).__name__}; "
                "torch.stack makes one tensor of several"
            )
    _check_finite(lam, wide)
    return torch.tensor(lam, dtype=wide).to(device, non_blocking=True)


def _check_values(lam: Tensor, wide: torch.dtype) -> None:
    # Reading values back is free on the CPU only; while tracing and under vmap there is no number to read.
    readable = not torch.compiler.is_compiling() and not _derivatives.transforms_active()
    if lam.is_cpu and readable and type(lam) in (Tensor, torch.nn.Parameter):
        _check_finite(lam.reshape(-1).tolist(), wide)


def _check_finite(values: Sequence[float], wide: torch.dtype) -> None:
    limit = torch.finfo(wide).max
    for index, value in enumerate(values):
        if not abs(value) <= limit:  # as NaN is not
            raise ValueError(f"merge: lam must be finite, got {value} at index {index}")


def _groups(groups: Sequence[int] | None, weights: Tensor, count: int) -> Sequence[int]:
    entries = weights.shape[0]
    if groups is None:
        if entries not in (1, count):
            raise ValueError(
                f"merge: lam must have one entry, or one for each of the {count} pairs, got {entries}; "
                "groups gives each pair its entry"
            )
        return list(range(count)) if entries == count else [0] * count
    if not isinstance(groups, (list, tuple, range)):
        raise TypeError(f"merge: groups must be a list of integers, got {type(groups).__name__}")
    if len(groups) != count:
        raise ValueError(f"merge: groups must have an entry for each of the {count} pairs, got {len(groups)}")
    for index, group in enumerate(groups):
        if not isinstance(group, int):
            raise TypeError(f"merge: groups[{index}] must be an integer, got {type(group).__name__}")
        if not 0 <= group < entries:
            raise ValueError(
                f"merge: groups[{index}] must lie in [0, {entries}), the entries of lam, got {group}"
            )
    return groups


def _check_tensors(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    dtype: torch.dtype | None,
    out: Sequence[Tensor] | None,
) -> None:
    for name, tensors in (("target", target), ("source", source), ("out", out or ())):
        for index, tensor in enumerate(tensors):
            _check_tensor(f"{name}[{index}]", tensor, target, index)
    first, wide = target[0].dtype, torch.float64
    if dtype is not None and dtype != first and wide in (dtype, first):
        raise ValueError(f"merge: target[0] is {first}, and dtype {dtype}; float64 gives, and needs, float64")
    for index, tensor in enumerate(out or ()):
        expected = dtype or target[index].dtype
        if tensor.dtype != expected or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"merge: out[{index}] must be contiguous and {expected}, as the result, "
                f"got a tensor that is {layout} and {tensor.dtype}"
            )


def _check_tensor(name: str, tensor: Tensor, target: Sequence[Tensor], index: int) -> None:
    first = target[0]
    _common.check_tensor("merge", name, tensor)
    _common.check_floating("merge", name, tensor)
    if tensor.device != first.device:
        raise ValueError(f"merge: {name} is on {tensor.device}, target[0] is on {first.device}")
    shape = target[index].shape
    if tensor.shape != shape:
        raise ValueError(
            f"merge: {name} must have the shape of target[{index}], {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype != first.dtype and torch.float64 in (tensor.dtype, first.dtype):
        raise ValueError(
            f"merge: {name} is {tensor.dtype}, and target[0] {first.dtype}; float64 goes with float64 only"
        )


def _check_no_gradient(
    weights: Tensor, target: Sequence[Tensor], source: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    if _common.needs_gradient(weights, *target, *source, *out):
        raise ValueError(
            "merge: out is written without a gradient, and lam, target, source or out requires one; "
            "call it under torch.no_grad(), or without out"
        )


def _check_overlap(
    weights: Tensor, target: Sequence[Tensor], source: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """ValueError for a result that would be written over something that is still to be read or written: pairs
    are computed in no order."""
    spans = sorted((*_span(tensor), index) for index, tensor in enumerate(out) if _has_memory(tensor))
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"merge: out[{second}] shares memory with out[{first}]; each result must have its own, and a "
                "tensor that is there twice, as a tied weight, must be given once"
            )
    begins = [begin for begin, _, _ in spans]
    read = {"target": target, "source": source, "lam": [weights]}
    for name, tensors in read.items():
        for index, tensor in enumerate(tensors):
            # One that is not contiguous is copied before anything is written.
            if not spans or not _has_memory(tensor) or not tensor.is_contiguous():
                continue
            begin, end = _span(tensor)
            place = bisect_right(begins, begin)
            for out_begin, out_end, pair in spans[max(place - 1, 0) :]:
                if out_begin >= end:
                    break
                itself = name != "lam" and (pair, out_begin, out_end) == (index, begin, end)
                if out_end > begin and not itself:
                    which = name if name == "lam" else f"{name}[{index}]"
                    raise ValueError(
                        f"merge: out[{pair}] shares memory with {which}; it may be target[{pair}] or "
                        f"source[{pair}] itself, and overlap no other tensor"
                    )


def _has_memory(tensor: Tensor) -> bool:
    # Subclasses, such as the tensors of a trace, may have no address.
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a contiguous tensor, and the one behind its last."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()
