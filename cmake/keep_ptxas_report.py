"""Runs nvcc and keeps its messages in NAME.o.ptxas next to the object file: registers, memory.

A compiler launcher of CMake: keep_ptxas_report.py nvcc ARGUMENTS... Only what is no report is printed.
"""

import re
import subprocess
import sys

REPORT = re.compile(
    r"ptxas info |\s+\d+ bytes stack frame|ptxas \S+ *: Function properties|\s*Function properties for"
)


def main() -> int:
    command = sys.argv[1:]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    for line in done.stderr.splitlines(keepends=True):
        if not REPORT.match(line):
            sys.stderr.write(line)
    if done.returncode == 0 and "-o" in command:
        with open(f"{command[command.index('-o') + 1]}.ptxas", "w") as report:
            report.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
