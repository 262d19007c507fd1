"""Module around ``mmkernels.ctc_align``."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.ops.ctc_align import ctc_align
from mmkernels.ops.ctc_align.alignment import Alignment


class CTCAligner(nn.Module):
    """CTC forced alignment of a batch, with the blank of a model; it has no parameters.

    Equivalent to (for a ``CTCAligner`` named ``module``)::

        out = mmkernels.ctc_align(log_probs, targets, blank=module.blank)

    Args:
        blank: the class of blanks.
        backend: passed to ``mmkernels.ctc_align``.
    """

    def __init__(self, blank: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.blank, self.backend = blank, backend

    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Alignment:
        """Align ``log_probs (B, T, C)`` with ``targets (B, U)``; see ``mmkernels.ctc_align``."""
        return ctc_align(
            log_probs, targets, input_lengths, target_lengths, blank=self.blank, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"blank={self.blank}"
