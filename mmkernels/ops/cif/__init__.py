from mmkernels.ops.cif.api import cif
from mmkernels.ops.cif.result import CIF

__all__ = ["CIF", "cif"]
