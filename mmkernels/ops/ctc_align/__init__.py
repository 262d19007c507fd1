from mmkernels.ops.ctc_align.alignment import Alignment, TokenSpan
from mmkernels.ops.ctc_align.api import ctc_align
from mmkernels.ops.ctc_align.wildcard import with_wildcard

__all__ = ["Alignment", "TokenSpan", "ctc_align", "with_wildcard"]
