from mmkernels.ops.monotonic_align.api import monotonic_align

__all__ = ["monotonic_align"]
