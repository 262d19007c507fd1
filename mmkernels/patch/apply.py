"""``accelerate``: walk a model, ask the recognisers, exchange classes."""

from __future__ import annotations

from torch import nn

from mmkernels.patch.recogniser import Recogniser, Unsupported
from mmkernels.patch.report import Replaced, Report, Skipped, Swap
from mmkernels.patch.s3prl_featurizer import S3prlFeaturizer
from mmkernels.patch.subclass import accelerated_class, original_class
from mmkernels.patch.weighted_layer_sum import WeightedLayerSum

RECOGNISERS: tuple[Recogniser, ...] = (WeightedLayerSum(), S3prlFeaturizer())
"""Asked in this order; the first that claims a module decides on it."""


def accelerate(model: nn.Module) -> Report:
    """Let an existing model use the kernels of this package, in place and reversibly.

    Replaced today:
        * the sum over hidden states of transformers' audio classifiers (``use_weighted_layer_sum=True``:
          wav2vec2, HuBERT, WavLM, data2vec-audio, UniSpeech, UniSpeech-SAT, SEW, SEW-D, wav2vec2-BERT,
          wav2vec2-Conformer, Whisper; sequence and frame classification and x-vectors) by ``layer_mix``,
          which reads the layers where they are;
        * the same sum in s3prl's ``Featurizer``, with ``normalize`` too.

    Submodules are searched, so the model may sit in PEFT, DDP or wrapper modules of your own. Call it before
    ``torch.compile`` and before tools that store a bound ``forward`` on the module. Results agree with the
    unchanged model to rounding, in value and gradient; parameters, ``state_dict`` keys and saved checkpoints
    are the same. Where the op does not serve an input (a layer dropped in training, say), the module's own
    statements run. Copies and pickles of an accelerated module are accelerated as well.

    Args:
        model: any module.

    Returns:
        What was replaced, what was recognised but left alone and why, and ``.revert()``. A second call
        replaces nothing.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if original_class(type(module)) is not None:
            report.skipped.append(Skipped(name, "already accelerated"))
            continue
        recogniser = next((r for r in RECOGNISERS if r.claims(module)), None)
        if recogniser is None:
            continue
        try:
            recogniser.check(module)
            accelerated = accelerated_class(type(module), recogniser)
        except Unsupported as reason:
            report.skipped.append(Skipped(name, str(reason)))
        else:
            report._swaps.append(Swap(name, module, type(module), accelerated, recogniser.what))
    for swap in report._swaps:
        swap.apply()
        report.replaced.append(Replaced(swap.name, swap.original.__qualname__, swap.what))
    return report
