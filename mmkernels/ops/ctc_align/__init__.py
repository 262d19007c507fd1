from mmkernels.ops.ctc_align.api import ctc_align

__all__ = ["ctc_align"]
