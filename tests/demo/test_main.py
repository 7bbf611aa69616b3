"""`python -m fastdpo.demo` is the demo, and its exit status is a program's."""

import subprocess
import sys


def test_mistakes_are_one_line_and_status_2():
    command = [sys.executable, "-m", "fastdpo.demo", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --steps must be at least 1, not 0\n" and not done.stdout
