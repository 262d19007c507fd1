"""Make existing models use the kernels: ``accelerate(model)`` replaces slow fragments and reports it.

Three properties decide the mechanism.

*Per instance.* ``accelerate`` sets ``module.__class__`` to a subclass that overrides one method; ``revert``
sets it back. Other instances, the class and its Python module do not change; parameters, buffers, hooks and
``state_dict`` stay. A subclass, unlike a bound method stored on the instance, follows the module through
``copy``, ``deepcopy``, pickle and ``nn.DataParallel`` replicas, and ``torch.compile`` sees an ordinary
method. It keeps the name, qualified name and module of the original class, because saving and training code
reads them (``config.architectures``, registries keyed by class).

*Only the fragment.* Replacing a whole forward means a copy of another library's code, which goes out of date
with each release. Here the override is derived from the class's method (``patch/rewrite.py``): the statements
of a known pattern are replaced in its syntax tree, the other statements are compiled unchanged, and the
original statements stay as the ``else`` branch for inputs that the op does not serve. The wrapper functions
of decorators are copied around the new function; no decorator runs again.

*Proven or refused.* The pattern must occur exactly once, the names in it must be bound to the expected
objects, and the source must compile to the loaded code. A module whose call is replaced (an adapter) must
have a forward with the known source. Agreement on some inputs would prove little: a fork may differ in
training alone, or once an attribute is set. Every other module is left as it is and listed in the report with
the reason. All overrides are built before the first is installed.

To support another library, add a ``Recogniser`` in ``patch/recognisers/<library>.py`` and list it in
``patch/recognisers/__init__.py``. Nothing here imports
transformers.
"""

from __future__ import annotations

from mmkernels.patch.apply import accelerate
from mmkernels.patch.report import Report

__all__ = ["Report", "accelerate"]
