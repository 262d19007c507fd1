"""How near the results of an accelerated model must be to those of the unchanged one."""

from __future__ import annotations

from torch import Tensor


def assert_within_rule(actual: Tensor, eager: Tensor, exact: Tensor, eps: float) -> None:
    """As near to float64 as eager torch is.

    The ops' own rule (twice the error of eager, plus 4 eps) is widened here: after a whole network the two
    errors are single draws from one distribution, and few of these tensors have enough entries for their
    maxima to settle.
    """
    assert actual.dtype == eager.dtype
    error, allowed = (actual.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 4 * allowed + 16 * eps * exact.abs().max()
