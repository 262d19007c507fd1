from mmkernels.ops.distill_loss.api import distill_loss

__all__ = ["distill_loss"]
