"""Ends a run at random moments, starts the same command again each time, and compares what it leaves with an undisturbed run, bit for bit.

    python tests/faults.py [--kills 30] [flags of bstar.py]

The run writes to a pseudo-terminal, and its bars tell where it is: the ends are spread over all phases (SFT, the PRM's annotation and training,
balance, sampling, training, evaluation), each at a random point of its phase or in what has no bar after it; two in three are kill -9, one in
three a Ctrl-C, which must save, say how to go on and exit with 130.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAME = ("metrics.jsonl", "ledger.jsonl", "samples/*")


def live(cwd, flags, order, target=None, part=1.0, sig=signal.SIGKILL):
    """One life of the run: to its end, or to `part` of the phase `target` (or the first that comes later), there ended by `sig`.

    returns  (exit code, its phases in order, the last bar before the signal, all that it printed)
    """
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))                                           # without a width there is no bar
    p = subprocess.Popen([sys.executable, str(ROOT / "bstar.py"), *flags], cwd=cwd, stdout=slave, stderr=slave, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),        # a shell's background jobs ignore it
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(slave)
    text, phases, at = "", [], ""
    while True:
        try:
            text += os.read(master, 1 << 16).decode(errors="replace")
        except OSError:                                                              # the other end is closed: it has ended
            break
        for name, percent in re.findall(r"\r([A-Za-z][\w ]*):\s+(\d+)%\|", text[-2000:]):
            phases += [name] * (name not in phases and name != "score")
            late = name in order and target in order and order.index(name) > order.index(target)
            if not at and (late or name == target and int(percent) >= 100 * part):
                time.sleep(random.random() * 0.3)
                at = f"{name} {percent} %"
                os.killpg(p.pid, sig) if sig == signal.SIGINT else p.send_signal(sig)
    os.close(master)
    return p.wait(), phases, at, text


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    args, flags = parser.parse_known_args(argv)
    flags += ["--out", "run"]
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        code, order, _, text = live(whole, flags, [])
        assert code == 0, text
        ends = []
        for i in range(args.kills):
            target, sig = order[i * len(order) // args.kills], random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
            code, _, at, text = live(broken, flags, order, target, random.random(), sig)
            print(f"{i + 1}: {sig.name} at {at}", flush=True)
            if sig == signal.SIGINT and at:
                assert code == 130 and "the same command goes on" in text, (code, text[-200_000:])
            ends += [(at, sig)] * bool(at)
        code, _, _, text = live(broken, flags, order)
        assert code == 0, text
        files = [f.relative_to(Path(whole) / "run") for name in SAME for f in sorted((Path(whole) / "run").glob(name))]
        differ = [str(f) for f in files if (Path(whole) / "run" / f).read_bytes() != (Path(broken) / "run" / f).read_bytes()]
        print(f"{len(ends)} of {args.kills} ended it ({sum(s == signal.SIGINT for _, s in ends)} by Ctrl-C) in {len({a.rsplit(' ', 2)[0] for a, _ in ends})} of "
              f"{len(order)} phases; {len(files)} files, " + (f"not the same: {', '.join(differ)}" if differ else "the same bits"))
        assert not differ and len(files) > 2 and len(ends) > 0.8 * args.kills
        return ends


if __name__ == "__main__":
    main()
