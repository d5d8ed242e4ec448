"""The pictures of the docs: the bundled sample run in a terminal, its report, and SwanLab's dashboard of it.

    pip install -e '.[test-all]'
    python docs/pictures.py

The first line installs the dashboard. Chromium has to be on your system. The second line trains the sample, which takes
three minutes on two cores, and writes docs/pictures/.
"""

import contextlib
import html
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyte
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
RUN = ROOT / "outputs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS = 120
LINES = 40
TERMINAL = (
    "<body style='margin:0;background:#1d1f21;color:#d7d7d7'>"
    "<pre style='padding:12px;font:13px/1.45 monospace;white-space:pre-wrap'>"
)


def main() -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    PICTURES.mkdir(exist_ok=True)
    flags = ["--sample", "--swanlab", "local", "--logging_steps", "10", "--output_dir", str(RUN.relative_to(ROOT))]
    screen = []
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "terminal.html")
        for screen in seen_in_terminal([sys.executable, "recipes/wiki_zh_scratch.py", *flags]):
            # The first picture shows the run at step 650 of 900, or soon after it.
            if not page.exists() and re.search(r" 6[5-9]\d/900", " ".join(screen)):
                page.write_text(as_page(screen), encoding="utf-8")
        photograph(page.as_uri(), PICTURES / "terminal.png", 1000, 780)
        page.write_text(as_page(screen), encoding="utf-8")
        photograph(page.as_uri(), PICTURES / "terminal_end.png", 1000, 780)
    report = (RUN / "report.html").as_uri()
    photograph(report, PICTURES / "report.png", 1280, 1600)
    photograph(report, PICTURES / "report_phone.png", 390, 1700)
    with dashboard(RUN / "swanlog") as address:
        photograph(f"{address}/experiment/1/chart", PICTURES / "dashboard.png", 1280, 900)


def as_page(screen: list[str]) -> str:
    """Return an HTML page that looks like the terminal. Paths below the repository are shown without its folder."""
    return TERMINAL + html.escape("\n".join(screen).replace(f"{ROOT}/", ""))


def browse(url: str, *flags: str) -> str:
    """Open ``url`` in Chromium without a window, give its scripts 20 s of their time, and return what it prints."""
    installed = [path for path in map(shutil.which, BROWSERS) if path is not None]
    if not installed:
        sys.exit(f"None of {', '.join(BROWSERS)} is installed. Debian, Ubuntu: apt install chromium")
    command = [installed[0], "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=20000", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout


def photograph(url: str, picture: Path, width: int, height: int) -> None:
    """Write a screenshot of ``url`` to ``picture``, a .png file; the window is ``width`` x ``height`` pixels."""
    browse(url, f"--window-size={width},{height}", f"--screenshot={picture}")
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)  # 64 colours: a third of the size
    print(f"{picture}: {picture.stat().st_size / 1e3:,.0f} kB")


@contextlib.contextmanager
def dashboard(log_dir: Path) -> Iterator[str]:
    """Serve the runs in ``log_dir`` with ``swanlab watch``, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "swanlab"), "watch", str(log_dir), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while not answers(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    server.kill()
                    sys.exit(f"swanlab watch does not answer:\n{server.stdout.read()}")
                time.sleep(0.5)
            yield address
        finally:
            server.kill()


def answers(address: str) -> bool:
    """Whether a web server answers at ``address`` within 5 s."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def seen_in_terminal(command: list[str]) -> Iterator[list[str]]:
    """Run ``command`` in a pseudo-terminal, and yield the lines of its screen each time that it prints something."""
    # Imported here, because Windows has none of these modules. The other functions do not need them.
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    with contextlib.suppress(OSError):  # Linux raises it when the command has closed its end
        while True:
            output = os.read(leader, 65536)
            if not output:
                break
            stream.feed(output)
            yield list(screen.display)
    os.close(leader)
    if process.wait() != 0:
        sys.exit("\n".join(screen.display))


if __name__ == "__main__":
    main()
