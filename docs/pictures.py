"""The pictures of the docs: the bundled sample run in a terminal, its report, a comparison, SwanLab's dashboard.

    pip install -e '.[test-all]'
    python docs/pictures.py

The first line installs the dashboard. Chromium and a font with Chinese letters have to be on your system. The second
line trains the sample twice, which takes four minutes on two cores, and writes docs/pictures/.
"""

import contextlib
import html
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyte
from PIL import Image

from common.run.compare import main as compare
from common.run.labels import labels
from common.run.record import RunRecord
from common.run.report import page

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
RUN = ROOT / "outputs" / "pictures"
OTHER = ROOT / "outputs" / "higher_rate"  # a third of the steps at three times the learning rate, to compare
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS, NARROW = 120, 46  # of a terminal on a desk, and on a phone
LINES = 40
DESK, PHONE = 1280, 390  # pixels
TERMINAL = (
    "<body style='margin:0;background:#1d1f21;color:#d7d7d7'>"
    "<pre style='padding:12px;font:13px/1.45 monospace;white-space:pre-wrap'>"
)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    middle, end = screens_of(RUN, COLUMNS, 900, ["--swanlab", "local"])
    photograph(middle, PICTURES / "terminal.png", 1000, 780)
    photograph(end, PICTURES / "terminal_end.png", 1000, 780)
    middle, _ = screens_of(OTHER, NARROW, 300, ["--swanlab", "off", "--learning_rate", "3e-3", "--eval_steps", "100"])
    photograph(middle, PICTURES / "terminal_phone.png", PHONE, 780)
    for language, ending in {"en": "", "zh": "_zh"}.items():
        report, comparison = RUN / f"report{ending}.html", RUN / f"compare{ending}.html"
        report.write_text(page(RunRecord.of(RUN), labels(language)), encoding="utf-8")
        compare([str(RUN), str(OTHER), "--output", str(comparison), "--language", language])
        for name, path in {"report": report, "compare": comparison}.items():
            photograph(path.as_uri(), PICTURES / f"{name}{ending}.png", DESK, 1600)
            photograph(path.as_uri(), PICTURES / f"{name}_phone{ending}.png", PHONE, 1700)
    with dashboard(RUN / "swanlog") as address:
        photograph(f"{address}/experiment/1/chart", PICTURES / "dashboard.png", DESK, 900)


def screens_of(folder: Path, columns: int, steps: int, flags: list[str]) -> list[str]:
    """Train the sample into ``folder``; return pages of its terminal after 7 of 10 steps and at its end."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--max_steps", str(steps), "--logging_steps", "10", "--output_dir", str(folder.relative_to(ROOT)), *flags]
    middle, screen = [], []
    for screen in seen_in_terminal([sys.executable, "recipes/wiki_zh_scratch.py", "--sample", *flags], columns):
        made = re.search(rf"\b(\d+)/{steps}\b", " ".join(screen))
        if not middle and made is not None and int(made[1]) >= 0.7 * steps:
            middle = screen
    pages = []
    for name, lines in {"middle": middle, "end": screen}.items():
        path = folder / f"terminal_{name}.html"
        path.write_text(as_page(lines), encoding="utf-8")
        pages.append(path.as_uri())
    return pages


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


def seen_in_terminal(command: list[str], columns: int) -> Iterator[list[str]]:
    """Run ``command`` in a pseudo-terminal, and yield the lines of its screen each time that it prints something."""
    # Imported here, because Windows has none of these modules. The other functions do not need them.
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen = pyte.Screen(columns, LINES)
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
