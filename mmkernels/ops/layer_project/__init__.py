from mmkernels.ops.layer_project.api import layer_project

__all__ = ["layer_project"]
