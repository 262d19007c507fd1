"""Module around ``mmkernels.distill_loss``."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.ops.distill_loss import distill_loss


class DistillLoss(nn.Module):
    """Distance of predicted vectors from the embeddings of tokens in a frozen language model.

    It owns nothing: the table is an argument, so that neither checkpoints nor DDP copy it.

    Equivalent to (for a ``DistillLoss`` named ``module``)::

        table = table.detach()
        out = mmkernels.distill_loss(pred, table, ids, cosine_weight=module.cosine_weight)

    Args:
        cosine_weight: factor of the cosine's part.
        backend: passed to ``mmkernels.distill_loss``.

    Source: Tan et al., SSR-Connector (arXiv 2410.00168), the loss of the first stage.
    """

    def __init__(self, cosine_weight: float = 5.0, backend: str = "auto") -> None:
        super().__init__()
        if not cosine_weight >= 0:
            raise ValueError(f"cosine_weight must not be negative, got {cosine_weight}")
        self.cosine_weight, self.backend = cosine_weight, backend

    def forward(self, pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """The loss of vectors ``(B, M, H)`` for the rows ``ids`` ``(B, M)`` of ``table`` ``(V, H)``, as
        ``model.get_input_embeddings().weight``, which gets no gradient."""
        return distill_loss(
            pred,
            table.detach(),
            ids,
            counts=counts,
            cosine_weight=self.cosine_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"cosine_weight={self.cosine_weight}"
