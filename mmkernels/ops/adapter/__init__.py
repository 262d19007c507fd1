from mmkernels.ops.adapter.api import adapter

__all__ = ["adapter"]
