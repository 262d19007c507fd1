"""``python -m mmkernels``: versions, devices, and which backend serves each op on this machine."""

from __future__ import annotations

from mmkernels._info import collect, render

if __name__ == "__main__":
    print(render(collect()))
