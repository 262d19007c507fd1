from mmkernels.ops.merge.api import merge

__all__ = ["merge"]
