from mmkernels.ops.segment_pool.api import segment_pool

__all__ = ["segment_pool"]
