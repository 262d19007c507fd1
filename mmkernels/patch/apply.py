"""``accelerate``: visit the modules of a model, ask the recognisers, replace classes."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from mmkernels.patch.bottleneck import Mismatch
from mmkernels.patch.near_misses import near_misses
from mmkernels.patch.recogniser import Unsupported
from mmkernels.patch.recognisers import NAMED_ADAPTER, RECOGNISERS
from mmkernels.patch.report import Note, Replaced, Report, Skipped, Swap
from mmkernels.patch.subclass import accelerated_class, recogniser_of
from mmkernels.wrappers import is_wrapper, plain_name, unwrap


def accelerate(model: nn.Module, *, adapters: Sequence[str] = ()) -> Report:
    """Make an existing model use the kernels of this package, in place and reversibly.

    These fragments are replaced:
        * the sum over hidden states of transformers' audio classifiers (``use_weighted_layer_sum=True``:
          wav2vec2, HuBERT, WavLM, data2vec-audio, UniSpeech, UniSpeech-SAT, SEW, SEW-D, wav2vec2-BERT,
          wav2vec2-Conformer, Whisper; sequence and frame classification and x-vectors) by ``layer_mix``,
          which reads the layers where they are;
        * the same sum in s3prl's ``Featurizer``, with ``normalize`` too;
        * the attention adapters of transformers' speech models (``config.adapter_attn_dim``: MMS; wav2vec2,
          HuBERT, UniSpeech, UniSpeech-SAT) by ``adapter``, which adds them to the hidden states in the same
          pass. The encoder layer is replaced; an adapter that has hooks, or whose layer adds it in another
          way, is replaced alone. ``init_adapter_layers`` and ``load_adapter`` work as before. Under autocast
          hidden states are cast before the LayerNorm, not after it: float16 overflows beyond 65504;
        * the bottleneck adapters of the ``adapters`` library (AdapterHub): sequential (``seq_bn``,
          ``double_seq_bn``: Pfeiffer, Houlsby) and parallel (``par_bn``) ones, with or without ``ln_before``,
          by ``adapter``; constant scaling inside the op, learned and per-channel scaling after it. Adapters
          with gating, ``ln_after``, stochastic depth, PHM layers (Compacter) or an activation that
          ``adapter`` does not have are not replaced, and are listed; steps with active dropout run the
          library's code. The caller of an adapter is replaced (``BottleneckLayer.compose_single``), not
          ``Adapter.forward``, which returns the hidden activation and the up-projection too: it still runs
          for hooks on an adapter, for gating scores and where your code calls it. The layer drops the hidden
          activation; it reads the up-projection in compositions (``Fuse``, ``Parallel``, ...), and gets it
          there. Adapters added to a replaced layer later are served too;
        * the ``nn.Sequential`` bottlenecks that ``adapters`` names, by ``adapter``.

    Submodules are searched, so the model may be inside PEFT, DDP or another wrapper module, or compiled
    (torch compiles it anew in its next call). Call it after tools that replace a ``forward`` on a class, and
    before those that store a bound one on the module. Only statements that are those of the library are
    replaced: a fork that computes its sum or its adapter in another way is left alone. Results agree with the
    unchanged model to rounding, in value and gradient (first derivatives); parameters, ``state_dict`` keys
    and saved checkpoints are the same. If the op does not serve an input (for example a layer dropped in
    training, or half-precision activations with float32 adapters, which the adapters library refuses too),
    the module's original statements run. Copies and pickles of an accelerated module are accelerated too.

    Equivalent to (for a module that ``adapters`` names; iterating over it gives the plain layers)::

        down, activation, up = model.adapter
        out = up(activation(down(x)))

    Args:
        model: any module.
        adapters: names, or ``fnmatch`` patterns such as ``"encoder.layers.*.adapter"`` (``*`` matches dots
            too), in the model or in the one inside its wrappers, of ``nn.Sequential`` modules that hold a
            down-projection (``Linear``), an activation (relu, gelu, silu, identity) and an up-projection
            (``Linear``), after an optional ``LayerNorm``. As before, their input is not added to the result.
            ``Dropout(0)`` among them is ignored. Layers with hooks or ``torch.nn.utils.parametrize``, which
            the op would bypass, are skipped; if you add these later, the plain layers run.

    Returns:
        A report: the replaced modules, the recognised modules that were skipped with the reasons, notes
        (layer drop, which the sum over layers does not go with; near misses where nothing was recognised),
        and ``.revert()``. A second call replaces nothing.

    Raises:
        TypeError: ``model`` is not a module, or ``adapters`` not a sequence of strings.
        ValueError: an entry of ``adapters`` matches no module, or one that is no such bottleneck; then
            nothing is replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = _modules_named(model, adapters)
    report = Report()
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and module not in named
        if scripted or is_wrapper(module):
            # A wrapper hands out the attributes of the module inside, which has a name of its own.
            continue
        if module in covered and module not in named:
            continue
        if (previous := recogniser_of(type(module))) is not None:
            report.skipped.append(Skipped(name, "already accelerated"))
            covered.update(previous.covers(module))
            continue
        candidates = (NAMED_ADAPTER,) if module in named else (r for r in RECOGNISERS if r.claims(module))
        recogniser = next(iter(candidates), None)
        if recogniser is None:
            continue
        try:
            recogniser.check(module)
            accelerated = accelerated_class(type(module), recogniser)
        except Unsupported as reason:
            if module in named and isinstance(reason, Mismatch):
                raise ValueError(f"adapters: module {name!r} cannot be replaced: {reason}") from None
            report.skipped.append(Skipped(name, str(reason)))
        else:
            report._swaps.append(Swap.of(name, module, accelerated, recogniser.what))
            covered.update(recogniser.covers(module))
            report.notes += [Note(name, text) for text in recogniser.notes(module)]
            prefix = f"{name}." if name else ""
            report.skipped += [
                Skipped(prefix + inner, reason) for inner, reason in recogniser.exceptions(module)
            ]
    try:
        for swap in report._swaps:
            swap.apply()
            report.replaced.append(Replaced(swap.name, swap.original.__qualname__, swap.what))
    except BaseException:
        for swap in report._swaps:
            swap.revert()
        raise
    if not report.replaced and not report.skipped:
        report.notes += near_misses(model)
    return report


def _modules_named(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"adapters must be a list of module names or patterns, got {patterns!r}")
    modules = list(model.named_modules(remove_duplicate=False))
    # As the model inside wrappers has them, too.
    modules += [(plain_name(name), module) for name, module in unwrap(model).named_modules()]
    modules = [(name, module) for name, module in modules if not is_wrapper(module)]
    found: set[nn.Module] = set()
    for pattern in patterns:
        matches = {module for name, module in modules if fnmatch.fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"adapters: {pattern!r} matches no module of the model")
        found |= matches
    return found
