"""One sentence on standard error, and the end of the program."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str, status: int = 1) -> NoReturn:
    """Exit: status 1 for the user's data and runs, 2 for wrong options."""
    print(f"mmtransfer: {message}", file=sys.stderr)
    sys.exit(status)
