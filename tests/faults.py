"""Ends a run at random moments, starts it again each time, and compares the bits it leaves.

    python tests/faults.py [--kills 30] [flags of bstar.py]

The bars that the run shows on a pseudo-terminal say which phase it is in. The ends are spread over
all phases. Two in three are kill -9, one in three is a Ctrl-C, which exits with 130.
"""

import argparse
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BAR = re.compile(r"\r([^\r\n:|]+):\s+(\d+)%\|")


class End(NamedTuple):
    """A signal at a share of a phase, or of the first later one that shows a bar."""

    phase: str
    share: float
    sig: signal.Signals

    def is_due(self, name: str, percent: int, order: list[str]) -> bool:
        late = name in order and order.index(name) > order.index(self.phase)
        return late or (name == self.phase and percent >= 100 * self.share)


def live(cwd: str, flags: list[str], order: list[str], end: End | None = None):
    """Exit code, phases, last bar before the signal, and output of one life of the run."""
    terminal, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))  # without a width there is no bar
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit: ignored
    argv = [sys.executable, str(ROOT / "bstar.py"), *flags]
    p = subprocess.Popen(argv, cwd=cwd, stdout=slave, stderr=slave, process_group=0)
    os.close(slave)
    text, phases, last_bar = "", [], ""
    with suppress(OSError):  # the other end is closed: the run has ended
        while True:
            text += os.read(terminal, 1 << 16).decode(errors="replace")
            for name, percent in BAR.findall(text[-2000:]):
                if name not in phases and name != "score":
                    phases.append(name)
                if end and not last_bar and end.is_due(name, int(percent), order):
                    time.sleep(random.random() * 0.3)
                    last_bar = f"{name} {percent} %"
                    # Ctrl-C goes to all of a terminal's processes, kill -9 to one
                    send = os.killpg if end.sig == signal.SIGINT else os.kill
                    send(p.pid, end.sig)
    os.close(terminal)
    return p.wait(), phases, last_bar, text


def differing(whole: Path, broken: Path) -> tuple[int, list[str]]:
    """How many files the whole run left, and which of them differ."""
    paths = [whole / "metrics.jsonl", whole / "ledger.jsonl", *whole.glob("samples/*")]
    names = [str(path.relative_to(whole)) for path in paths]
    return len(names), [x for x in names if (whole / x).read_bytes() != (broken / x).read_bytes()]


def main(argv: list[str] | None = None) -> list[End]:
    """Returns the ends that ended the run; raises AssertionError where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    args, flags = parser.parse_known_args(argv)
    flags += ["--out", "run"]
    ends = []
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        code, order, _, text = live(whole, flags, [])
        assert code == 0, text
        for i in range(args.kills):
            sig = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
            end = End(order[i * len(order) // args.kills], random.random(), sig)
            code, _, last_bar, text = live(broken, flags, order, end)
            print(f"{i + 1}: {sig.name} at {last_bar}", flush=True)
            if code:  # else it was at its end, or Python dropped the interrupt in a destructor
                ends.append(end)
                stopped = sig == signal.SIGINT and "the same command goes on" in text
                assert code == (130 if stopped else -signal.SIGKILL), (code, text[-200_000:])
        code, _, _, text = live(broken, flags, order)
        assert code == 0, text
        n, differ = differing(Path(whole, "run"), Path(broken, "run"))
    print(f"{len(ends)} of {args.kills} ended it; {n} files, {len(differ)} differ {differ or ''}")
    assert not differ and n > 2 and len(ends) > 0.7 * args.kills
    return ends


if __name__ == "__main__":
    main()
