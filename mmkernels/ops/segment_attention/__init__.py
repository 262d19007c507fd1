from mmkernels.ops.segment_attention.api import segment_attention

__all__ = ["segment_attention"]
