from mmkernels.ops.layer_mix.api import layer_mix

__all__ = ["layer_mix"]
