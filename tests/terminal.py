"""Run a command in a pseudo-terminal of a given width."""

import os
import subprocess


def said_in_terminal(command: list[str], columns: int, environment: dict[str, str]) -> str:
    """Return what ``command`` writes to its terminal, which is ``columns`` wide."""
    import fcntl  # POSIX only, all of them
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=environment)
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so at the end
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    text = output.decode(errors="replace")
    assert process.wait() == 0, text
    return text
