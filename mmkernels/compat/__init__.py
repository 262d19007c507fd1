"""Functions of other packages, with their signatures and results, on the ops of mmkernels.

    from mmkernels.compat import cif_function, forced_align, maximum_path, merge_tokens, segment_csr

Each docstring lists where the function differs from the original. All take the devices and dtypes of the ops.
"""

from __future__ import annotations

from mmkernels.compat.monotonic_align import maximum_path
from mmkernels.compat.torch_cif import cif_function
from mmkernels.compat.torch_scatter import segment_csr
from mmkernels.compat.torchaudio import forced_align, merge_tokens

__all__ = ["cif_function", "forced_align", "maximum_path", "merge_tokens", "segment_csr"]
