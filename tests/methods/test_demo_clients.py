"""Package clients as subprocesses: their output, their environment, the bar, interruptions."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mmtransfer.demo.clients import Download, run_client

MEGABYTE = 1_000_000


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.mark.parametrize("download", [None, Download("a package", 10)])
def test_output_of_any_length(tmp_path, capfd, download):
    command = python("import sys; print('o' * 300_000); print('e' * 300_000, file=sys.stderr); sys.exit(3)")
    result = run_client(command, tmp_path, download)
    assert (result.stdout, result.stderr) == ("o" * 300_000 + "\n", "e" * 300_000 + "\n")
    assert result.returncode == 3
    assert result.args == command
    assert capfd.readouterr() == ("", "")


def test_the_client_works_in_the_folder(tmp_path):
    result = run_client(
        python("import os, tempfile; print(os.getcwd(), tempfile.gettempdir(), os.environ['LC_ALL'])"),
        tmp_path,
    )
    assert result.stdout.split() == [str(tmp_path.resolve()), str(tmp_path), "C"]


# A client that grows a file in two steps, as pip does: in a folder of its own, copied at the end.
CLIENT = f"""
import os, shutil, time
os.mkdir("unpack")
for part in range(2):
    with open("unpack/file", "ab") as file:
        file.write(bytes({MEGABYTE}))
    time.sleep(0.5)
shutil.copy("unpack/file", "file")
"""


def on_a_terminal(code: str) -> str:
    """The bytes that Python code writes to a terminal of 100 columns."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    try:
        while block := os.read(main, 4096):
            shown += block
    except OSError:  # Linux: the other end is closed
        pass
    os.close(main)
    assert process.wait() == 0
    return shown.decode()


def test_bytes_of_the_total_on_a_terminal(tmp_path):
    shown = on_a_terminal(
        "from pathlib import Path\n"
        "from mmtransfer.demo.clients import Download, run_client\n"
        f"run_client({[sys.executable, '-c', CLIENT]!r}, Path({str(tmp_path)!r}), "
        f"Download('a package', {2 * MEGABYTE}))"
    )
    assert "a package" in shown
    assert "1.0/2.0 MB" in shown
    assert "2.0/2.0 MB" in shown


def test_an_interruption_ends_the_client(tmp_path):
    command = python("import os, time; open('pid', 'w').write(f'{os.getpid()}\\n'); time.sleep(60)")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_client(command, tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not is_running(int((tmp_path / "pid").read_text()))


def is_running(pid: int) -> bool:
    """Whether the process is there, and no zombie, within the next five seconds."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True
