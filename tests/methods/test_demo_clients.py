"""Package clients as subprocesses: output, environment, the bar, interruptions, the real apt-helper."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmtransfer.demo import download
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


# A client that grows a file in two steps, as pip does: in a folder of its own, copied at the end. After each
# step it waits for a file that says that the step has been shown, 20 seconds at most.
CLIENT = f"""
import os, shutil, time
os.mkdir("unpack")
for step in ("1", "2"):
    with open("unpack/file", "ab") as file:
        file.write(bytes({MEGABYTE}))
    for _ in range(2_000):
        if not os.path.exists(step):
            time.sleep(0.01)
shutil.copy("unpack/file", "file")
"""


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, signs: dict[bytes, Path]) -> Iterator[bytearray]:
    """The bytes shown on standard error, which is a terminal of 100 columns; complete after the block.

    The files of `signs` are made when their text has been shown.
    """
    main, other = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while block := os.read(main, 4096):
                shown.extend(block)
                for text, sign in signs.items():
                    if text in shown:
                        sign.touch()
        except OSError:  # Linux: the other end is closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(other, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield shown
    thread.join()
    os.close(main)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within ten seconds."""
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_bytes_of_the_total_on_a_terminal(monkeypatch, tmp_path):
    steps = {b"1.0/2.0 MB": tmp_path / "1", b"2.0/2.0 MB": tmp_path / "2"}
    with terminal(monkeypatch, steps) as shown:
        run_client([sys.executable, "-c", CLIENT], tmp_path, Download("a package", 2 * MEGABYTE))
    assert b"Downloading a package" in shown
    assert all(sign.exists() for sign in steps.values())


def test_an_interruption_ends_the_client(tmp_path):
    pid = tmp_path / "pid"
    command = python("""
        import os, time
        with open("new", "w") as file:
            file.write(str(os.getpid()))
        os.rename("new", "pid")
        time.sleep(60)
    """)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def send() -> None:
        wait_for(pid.exists)
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_client(command, tmp_path)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, previous)
    assert wait_for(lambda: not is_running(int(pid.read_text())))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `content`, the first time half of it; `ranges` are the parts asked for."""

    content = bytes(range(256)) * 8_000
    date = "Sun, 13 Sep 2020 12:26:40 GMT"
    ranges: list[str | None]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = 0
        if asked and self.headers.get("If-Range") == self.date:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("Last-Modified", self.date)
        self.end_headers()
        end = len(self.content) if self.ranges else len(self.content) // 2
        self.ranges.append(asked)
        self.wfile.write(self.content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[str]:
    Mirror.ranges = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/name.deb"
        server.shutdown()
        thread.join()


@pytest.fixture
def apt_helper() -> str:
    if not os.access(download._APT_HELPER, os.X_OK):
        pytest.skip("there is no apt here")
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    if "::Proxy" in settings or {"http_proxy", "HTTP_PROXY"} & os.environ.keys():
        pytest.skip("apt uses a proxy here")
    return download._APT_HELPER


def test_apt_helper_resumes(apt_helper, mirror, tmp_path):
    digest = hashlib.sha256(Mirror.content).hexdigest()
    command = [apt_helper, "download-file", mirror, "name.deb", f"SHA256:{digest}"]
    results = [run_client([*command, "-o", "Acquire::Retries=0"], tmp_path) for _ in range(2)]
    assert [result.returncode for result in results] == [100, 0]
    assert Mirror.ranges == [None, f"bytes={len(Mirror.content) // 2}-"]
    assert (tmp_path / "name.deb").read_bytes() == Mirror.content


def test_apt_helper_refuses_other_bytes(apt_helper, mirror, tmp_path):
    Mirror.ranges.append("whole from the first time")
    command = [apt_helper, "download-file", mirror, "name.deb", f"SHA256:{'0' * 64}"]
    result = run_client(command, tmp_path)
    assert result.returncode == 100
    assert "Hash Sum mismatch" in result.stderr
    assert not (tmp_path / "name.deb").exists()
