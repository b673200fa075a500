"""Programs for test_sandbox.py: GOOD in contest style, plainly WRONG, HOSTILE; lists of Case records.

A hostile program reaches its answer only if its act succeeds, so a hole turns its verdict to True.
@DIR@ stands for a folder with a file `secret`, @PID@ for the grading process, @PORT@ for a TCP port
that listens there.

    python tests/programs.py [UID PYTHON]    grades all of them (as that user, with that interpreter
                                             in the sandbox), names those that are decided wrongly
"""

import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sandbox  # noqa: E402


class Case(NamedTuple):
    name: str
    program: str
    tests: dict


def stdin(name, program, *pairs):
    return Case(name, program, {"inputs": [i for i, _ in pairs], "outputs": [o for _, o in pairs]})


def calls(name, program, *pairs):
    """Pairs of the argument and the value of f."""
    tests = {"inputs": [[i] for i, _ in pairs], "outputs": [[o] for _, o in pairs]}
    return Case(name, program, {**tests, "fn_name": "f"})


def each(make, pair, programs):
    """A case for each program, all with the same test."""
    return [make(name, program, pair) for name, program in programs.items()]


BIG = f"{200_000}\n{' '.join(map(str, range(200_000)))}\n"
BIG_SUM = str(sum(range(200_000)))

# The input is read at once by the size of its file; what sys.stdout holds is flushed at the end.
FAST_IO = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO(os.read(0, os.fstat(0).st_size) if self._fd == 0 else b"")
    def readline(self): return self.buffer.readline().decode("ascii")
    def write(self, text): self.buffer.write(text.encode("ascii"))
    def flush(self): os.write(1, self.buffer.getvalue())
sys.stdin, sys.stdout = FastIO(sys.stdin), FastIO(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\\r\\n")
n = int(input())
print(sum(map(int, input().split())))
"""

RECURSE = "import sys, threading\nsys.setrecursionlimit(10 ** 7)\ndef f(n): return 1 if n == 0 else f(n - 1)\n"

GOOD = [
    *each(
        stdin,
        ("", "1"),
        {
            "unclosed output file": "f = open(1, 'w')\nf.write('1')",
            "unclosed local file, exit()": "def main():\n    f = open(1, 'w')\n    f.write('1')\n    exit()\nmain()",
            "quit()": "print(1)\nquit()",
            "exits with False": "import sys\nprint(1)\nsys.exit(False)",
            "exits with zero of an enumeration": "import enum, sys\nprint(1)\nsys.exit(enum.IntEnum('Status', [('GOOD', 0)]).GOOD)",
            "atexit": "import atexit, os\natexit.register(lambda: os.write(1, b'1'))",
            "thread outlives main": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.05), print(1))).start()",
            "recursion": RECURSE + "print(f(100000))",
            "recursion through C": RECURSE
            + "import functools\nf = functools.lru_cache(None)(f)\nprint(f(300))",
            "recursion in a thread": RECURSE
            + "threading.stack_size(512 << 20)\nt = threading.Thread(target=lambda: print(f(100000)))\nt.start()\nt.join()",
            "rlimit stack": "import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.getrlimit(r.RLIMIT_STACK)[1],) * 2)\nprint(1)",
            "huge integer": "print(len(str(2 ** 30000)) - 9030)",
            "dataclass": "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\nprint(max(P(1), P(0)).x)",
            "all kinds of imports": "import bz2, lzma, sqlite3, unittest, xml.etree.ElementTree, email.message, concurrent.futures, doctest\n"
            "print(*sqlite3.connect(':memory:').execute('select 1').fetchone(), 'é'.encode('cp437').decode('ascii', 'ignore'))\ndoctest.testmod()",
            "no such file": "import os, pathlib\nprint(1 - os.path.exists('a') - os.path.isfile('@DIR@/secret') - pathlib.Path('/etc/passwd').exists())",
            "stderr is free": "import sys\nprint('x' * 500000, file=sys.stderr)\nprint(1)",
            "200 MB of memory": "print(len([0] * (25 << 20)) >> 20 >> 4)",
            "two seconds of CPU": "import time\nwhile time.process_time() < 2: pass\nprint(1)",
            "denied, but catches it": "import os\ntry:\n    os.fork()\nexcept OSError:\n    print(1)",
        },
    ),
    stdin(
        "plain input",
        "a, b = map(int, input().split())\nprint(a + b)",
        ("1 2\n", "3\n"),
        ("5 6", "11"),
    ),
    stdin("open(0)", "n, *a = map(int, open(0).read().split())\nprint(sum(a))", (BIG, BIG_SUM)),
    stdin(
        "os.read",
        "import os\nd = b''\nwhile c := os.read(0, 1 << 16): d += c\nos.write(1, b'%d' % sum(map(int, d.split()[1:])))",
        (BIG, BIG_SUM),
    ),
    stdin("an input and output of its own", FAST_IO, (BIG, BIG_SUM)),
    stdin("/dev/stdin", "print(open('/dev/stdin').read().upper())", ("abc", "ABC")),
    stdin(
        "size of the input",
        "import mmap, os\nprint(os.fstat(0).st_size, len(mmap.mmap(0, 0, access=mmap.ACCESS_READ)), os.stat(0).st_size)",
        ("abc", "3 3 3"),
    ),
    stdin("end of input", "try:\n    input()\nexcept EOFError:\n    print('end')", ("", "end")),
    stdin(
        "under the guard", "if __name__ == '__main__':\n    print(int(input()) ** 2)", ("7", "49")
    ),
    stdin(
        "CRLF",
        "n = int(input())\r\nprint(n,\r\n  input().strip())\r\n",
        ("3\r\nabc\r\n", "3 abc\r\n"),
    ),
    stdin("unicode", "print(input()[::-1])", ("añ€", "€ña")),
    stdin(
        "trailing spaces",
        "for i in range(3): print(i, '', i, end=' \\n')\nprint()",
        ("", "0 0\n1 1\n2 2"),
    ),
    stdin(
        "more digits than asked", "print(1 / 3)\nprint('%.9f' % 2.5)", ("", "0.333333333\n2.50\n")
    ),
    stdin("long output", "print('ab ' * 100000)", ("", "ab " * 100000)),
    stdin("inputs as lists of lines", "print(int(input()) + int(input()))", (["1", "2"], ["3"])),
    calls("function", "def f(a):\n    return a + a", (2, 4), ("a", "aa")),
    calls(
        "method",
        "class Solution:\n    def f(self, xs: List[int]) -> List[int]: return xs * 2",
        ([1], [1, 1]),
    ),
    calls("tuples for lists", "def f(n): return (n, (n, {n: 1}))", (1, [1, [1, {"1": 1}]])),
    calls("prints on the way", "print('hello')\ndef f(x):\n    print(x)\n    return x", (1, 1)),
    calls("float", "def f(x): return x * .1", (3, 0.3)),
    calls("no value", "def f(x): pass", (3, None)),
    calls(
        "state between calls",
        "seen = {}\ndef f(x): return seen.setdefault(x, len(seen))",
        (1, 0),
        (2, 1),
        (1, 0),
    ),
    calls(
        "five seconds of CPU in two calls",
        "import time\ndef f(x):\n    end = time.process_time() + 2.5\n    while time.process_time() < end: pass\n    return x",
        (1, 1),
        (2, 2),
    ),
    calls(
        "demo under the guard",
        "def f(x): return x\nif __name__ == '__main__':\n    print(f(int(input())))",
        (1, 1),
    ),
    Case(
        "unwrapped outputs",
        "def f(x): return list(range(x))",
        {"inputs": [[2], [3]], "outputs": [[0, 1], [0, 1, 2]], "fn_name": "f"},
    ),
]

LIES = ["__and__", "__rand__", "__int__", "__index__", "__eq__", "__bool__", "__mod__"]

WRONG = [
    *each(
        stdin,
        ("", "1"),
        {
            "other number": "print(4)",
            "nothing": "pass",
            "syntax error": "print(1",
            "NUL in the source": "print(1)\0",
            "right, then raises": "print(1)\nraise ValueError",
            "right, then exits with a message": "print(1)\nexit('bad')",
            "right, then exits with 7 of another class": "import sys\nclass Lie:\n    __class__ = int\nprint(1)\nsys.exit(Lie())",
            "right, then exits with 2 ** 64": "import sys\nprint(1)\nsys.exit(2 ** 64)",
            "right, then os._exit(3)": "import os\nprint(1, flush=True)\nos._exit(3)",
            "right, then more": "print(1)\nprint(2)",
            "float for an integer": "print(1.0)",
            "to stderr": "import sys\nprint(1, file=sys.stderr)",
            "lost in a closed stdout": "import os\nprint(1)\nos.close(1)",
            "reads past the end": "input()\nprint(1)",
            "runaway recursion": "def f(n): return f(n + 1)\nprint(f(0))",
            "crash in C": "import sys\nprint(1, flush=True)\nsys.setrecursionlimit(10 ** 8)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a",
            **{
                f"right, then exits with an int that lies in {name}": f"import sys\nclass Lie(int):\n    {name} = lambda *a: 0\nprint(1)\nsys.exit(Lie(7))"
                for name in LIES
            },
            **{
                f"right, then exits with an object that lies in {name}": f"import sys\nclass Lie:\n    {name} = lambda *a: 0\nprint(1)\nsys.exit(Lie())"
                for name in LIES
            },
        },
    ),
    *each(
        calls,
        (3, 9),
        {
            "string for a number": "def f(x): return '9'",
            "list for its one item": "def f(x): return [9]",
            "other name": "def g(x): return 9",
            "right value, bad end": "import atexit, os\natexit.register(os._exit, 1)\ndef f(x): return 9",
            "cyclic value": "def f(x):\n    a = []\n    a.append(a)\n    return a",
        },
    ),
    stdin("second test fails", "print(1)", ("", "1"), ("", "2")),
    stdin("other lines", "print(1)\nprint(2)", ("", "1 2")),
    stdin("far float", "print(0.3334)", ("", "0.3333")),
    stdin("nan", "print('nan')", ("", "1.5")),
    stdin("infinite", "print('inf')", ("", "1e400")),
    stdin("underscore number", "print('1_0.0')", ("", "10.0")),
    stdin("not UTF-8", "import os\nos.write(1, b'\\xff')", ("", "ÿ")),
    calls("bool for a number", "def f(x): return True", (3, 1)),
    calls("number for a bool", "def f(x): return 1", (3, True)),
    calls("generator for a list", "def f(x): return (i for i in [1])", (3, [1])),
    calls("extra key", "def f(x): return {'a': 1, 'b': 2}", (3, {"a": 1})),
    calls("nan for nan", "def f(x): return float('nan')", (3, float("nan"))),
    calls("last test fails", "def f(x): return x", (1, 1), (2, 2), (3, 4)),
    calls(
        "total, never reset",
        "n = 0\ndef f(x):\n    global n\n    n += x\n    return n % 2 == 0",
        (2, True),
        (3, False),
        (2, True),
        (5, False),
    ),
]

# A hostile act raises where it is denied; the answer follows it.
ACT = """
import ctypes, os, struct, sys, socket
libc = ctypes.CDLL(None)
def raw(*a):
    r = libc.syscall(*[x if isinstance(x, bytes) else ctypes.c_long(x) for x in a])
    assert r >= 0
    return r
{code}
print('done')
"""


def acts(codes):
    """A case for each act."""
    return each(stdin, ("", "done"), {name: ACT.format(code=code) for name, code in codes.items()})


FILES = acts(
    {
        "read a file": "open('@DIR@/secret').read()",
        "list a folder": "os.listdir('@DIR@')",
        "read own /proc": "open('/proc/self/maps').read()",
        "read the trainer's command": "open('/proc/@PID@/cmdline').read()",
        "read the server's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "follow the trainer's descriptors": "os.listdir('/proc/@PID@/fd')",
        "read the standard library": "open(os.__file__).read()",
        "list site-packages": "[os.listdir(p) for name in ('site-packages', 'dist-packages') if os.path.lexists(p := os.path.dirname(os.__file__) + '/' + name)][0]",
        "import an installed package": "sys.path += [os.path.dirname(os.__file__) + '/site-packages', '/usr/lib/python3/dist-packages']\nimport pip",
        "times of a file": "os.stat(os.__file__)",
        "times of a link": "os.lstat('/proc/self')",
        "times of a link by newfstatat": "raw(262, -100, b'/proc/self', bytes(144), 0x1100)",
        "times of a link by statx": "raw(332, -100, b'/proc/self', 0x100, 0xfff, bytes(256))",
        "times of a path that is not opened": "os.open('@DIR@/secret', os.O_PATH | os.O_NOFOLLOW)",
        "does a file exist": "assert os.access('@DIR@/secret', os.F_OK)",
        "write a file": "open('@DIR@/new', 'w').write('x')",
        "truncate while reading": "os.open('@DIR@/secret', os.O_RDONLY | os.O_TRUNC)",
        "unnamed temporary file": "os.open('@DIR@', os.O_TMPFILE | os.O_RDWR)",
        "delete": "os.remove('@DIR@/secret')",
        "rename": "os.rename('@DIR@/secret', '@DIR@/gone')",
        "new folder": "os.mkdir('@DIR@/sub')",
        "symbolic link": "os.symlink('/', '@DIR@/root')",
        "hard link": "os.link('@DIR@/secret', '@DIR@/twin')",
        "named pipe": "os.mkfifo('@DIR@/fifo')",
        "chmod": "os.chmod('@DIR@/secret', 0o777)",
        "chown": "os.chown('@DIR@/secret', os.getuid(), os.getgid())",
        "touch": "os.utime('@DIR@/secret', (0, 0))",
        "extended attribute": "os.setxattr('@DIR@/secret', 'user.x', b'1')",
        "change folder": "os.chdir('@DIR@')",
        "openat2": "raw(437, -100, b'@DIR@/secret', struct.pack('QQQ', 0, 0, 0), 24)",
    }
)

PROCESSES = acts(
    {
        "fork": "if os.fork() == 0: os._exit(0)",
        "fork by clone": "if raw(56, 17, 0, 0, 0, 0) == 0: os._exit(0)",
        "fork by clone3": "if raw(435, struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) == 0: os._exit(0)",
        "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
        "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
        "exec": "os.execv('/bin/echo', ['echo', 'done'])",
        "file in memory": "fd = os.memfd_create('x')",
        "signal the server": "os.kill(os.getppid(), 0)",
        "kill the trainer": "os.kill(@PID@, 15)",
        "signal everyone": "os.kill(-1, 0)",
        "tgkill the trainer": "raw(234, @PID@, @PID@, 0)",
        "pidfd of the trainer": "raw(434, @PID@, 0)",
        "rt_sigqueueinfo": "raw(129, @PID@, 0, struct.pack('3i', 0, 0, -1) + bytes(116))",
        "signal by fcntl": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, @PID@)",
        "ptrace the trainer": "raw(101, 16, @PID@, 0, 0)",
        "read the trainer's memory": "raw(310, @PID@, bytes(16), 1, bytes(16), 1, 0)",
        "limit the trainer": "import resource\nresource.prlimit(@PID@, resource.RLIMIT_CORE)",
        "slow the trainer down": "os.setpriority(os.PRIO_PROCESS, @PID@, 5)",
        "pin the trainer": "os.sched_setaffinity(@PID@, os.sched_getaffinity(0))",
    }
)

KERNEL = acts(
    {
        "TCP": "socket.create_connection(('127.0.0.1', @PORT@)).send(b'x')",
        "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))",
        "unix socket": "socket.socket(socket.AF_UNIX)",
        "socketpair": "socket.socketpair()",
        "io_uring": "raw(425, 1, bytes(120))",
        "bpf": "raw(321, 0, struct.pack('4I', 2, 4, 4, 1) + bytes(112), 128)",
        "userfaultfd": "raw(323, 0)",
        "perf": "raw(298, struct.pack('2IQ', 1, 112, 0) + bytes(96), 0, -1, -1, 0)",
        "user namespace": "raw(272, 0x10000000)",
        "chroot": "os.chroot('/')",
        "shared memory": "raw(29, 0x5eed, 4096, 0o1666)",
        "kernel key": "raw(248, b'user', b'bstar', b'x', 1, -3)",
        "undo the death signal": "raw(157, 1, 0, 0, 0, 0)",
        "more CPU": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "two GiB": "bytearray(2 << 30)",
        "many descriptors": "fds = [os.dup(0) for _ in range(100)]",
        "descriptors inherited": "for fd in range(4, 1024):\n    try: os.fstat(fd)\n    except OSError: continue\n    break\nelse: sys.exit(1)",
        "grow stdin": "os.ftruncate(0, 1 << 40)",
    }
)

HUNT = """
import gc, os, re, sys
def hunt():
    frame, texts = sys._getframe(), []
    while frame:
        texts += [repr(frame.f_locals), repr(list(frame.f_globals.items()))]
        frame = frame.f_back
    texts += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str, bytes)) and len(o) < 100]
    for text in texts:
        if m := re.search("needle" + "[0-9]+", text): return m[0]
"""

EQUAL = "class Equal(VALUE.__class__):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\ndef f(x): return Equal(VALUE)"

# True on the first call of a process, False on the others: right if a wrong answer were asked again
# in a fresh process.
TWO_ANSWERS = {
    "by a global": "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n == 1",
    "by a default": "def f(x, n=[]):\n    n.append(x)\n    return len(n) == 1",
    "by an attribute": "class Solution:\n    def f(self, x):\n        first = not hasattr(Solution, 'n')\n        Solution.n = 1\n        return first",
    "by the time": "import time\nstart = time.monotonic()\ndef f(x):\n    first = time.monotonic() - start < .05\n    time.sleep(.06)\n    return first",
    "by CPU time": "import time\ndef f(x):\n    first = time.process_time() < .1\n    while time.process_time() < .15: pass\n    return first",
    "by frames": "import sys\ndef f(x):\n    outer = sys._getframe().f_back.f_back.f_locals\n    return x == outer['calls'][0][1][0]",
    "by a module": "import string\ndef f(x):\n    first = not hasattr(string, 'n')\n    string.n = 1\n    return first",
}

# The first test leaves a mark in a file's access time, which the second one sees.
MARK = """
import os, time
path = os.path.dirname(os.__file__) + '/turtledemo/clock.py'
if time.time() - os.stat(path).st_atime < 60: print('again')
else:
    open(path, 'rb').read(1)
    print('first')
"""
THREAD = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
THREADS = "import os, threading, time\nthreading.stack_size(32768)\n"

CHEATS = [
    stdin("mark in a file", MARK, ("a", "first"), ("b", "again")),
    stdin("exits 0 at once", "import sys\nsys.exit(0)", ("", "5")),
    stdin("os._exit(0)", "import os\nos._exit(0)", ("", "5")),
    stdin(
        "claims success", "print('True')\nprint('passed')\nprint('{\"passed\": true}')", ("", "5")
    ),
    stdin("hunts the output", HUNT + "print(hunt())", ("", "needle4711")),
    calls(
        "hunts the later values",
        HUNT + "def f(x): return x if x == 1 else hunt()",
        (1, 1),
        (2, "needle4711"),
    ),
    *[
        calls(f"equal to all, like {value!r}", EQUAL.replace("VALUE", repr(value)), (1, other))
        for value, other in ((4, 5), ("x", "5"), ([4], [5]))
    ],
    *[
        calls(f"two answers, {name}", source, *[(i, i % 3 == 0) for i in range(6)])
        for name, source in TWO_ANSWERS.items()
    ],
    *each(
        calls,
        (1, 5),
        {
            f"forges {name}": f"import os\nfor fd in range(3, 32):\n    try: os.write(fd, {line})\n    except OSError: pass\ndef f(x): os._exit(0)"
            for name, line in {
                "verdicts": r"b'true\n0\npassed\n5'",
                "deep nesting": r"b'[' * 60000 + b'\n'",
                "a giant": r"""b'{"bytes": 99999999999}\n'""",
                "digits": r"b'9' * 60000 + b'\n'",
                "a float's overflow": r"b'9' * 4000 + b'\n'",
                "a kind's parts": r"""b'{"set": [[1]]}\n'""",
                "two kinds": r"""b'{"tuple": [1], "set": [2]}\n'""",
                "another kind": r"""b'{"eval": "5"}\n'""",
            }.items()
        },
    ),
    *each(
        calls,
        (1, 5),
        {
            "patched builtins": "import builtins\nfor name in ('isinstance', 'all', 'len'): setattr(builtins, name, lambda *a: True)\nbuiltins.zip = lambda *a: []\ndef f(x): return 4",
            "patched modules": "import json, math, operator\njson.dumps = math.isclose = operator.eq = lambda *a, **k: 'true'\ndef f(x): return 4",
            "patched sandbox": "import sys\nf = sys._getframe()\nwhile f:\n    for k in ('plain', 'call', 'exit_status', 'lock', '_exit'):\n"
            "        if k in f.f_globals: f.f_globals[k] = lambda *a: 4\n    f = f.f_back\ndef f(x): return 4",
            "exit inside the call": "def f(x): raise SystemExit(0)",
            "os._exit inside the call": "import os\ndef f(x): os._exit(0)",
            "value as bytes": "def f(x): return b'5'",
            "imports the grader": "import sandbox\ndef f(x): return 5",
            "floods the answer": "import os\ndef f(x):\n    while True: os.write(3, b'5\\n' * 10000)",
            "a giant value": "def f(x): return 'x' * (200 << 20)",
        },
    ),
    *each(
        stdin,
        ("", "1"),
        {
            "swallows its own end": "import signal\nprint(1, flush=True)\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
            "while True: pass",
            "stops itself": "import os, signal\nprint(1, flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)",
            "floods stdout": "while True: print('1\\n' * 100000)",
            "threads without end": THREADS + "print(1, flush=True)\nwhile True: " + THREAD,
            "threads, then silence": THREADS
            + f"for _ in range(200): {THREAD}\ntime.sleep(.5)\nprint(1, flush=True)\nos._exit(0)",
            "compile bomb": "x = (" + "-" * 100000 + "1)\nprint(1)",
            "crashes the interpreter": "import ctypes\nprint(1, flush=True)\nctypes.string_at(0)",
        },
    ),
]

# These run into the limit of 12 s asleep, side by side.
SLOW = each(
    stdin,
    ("", "1"),
    {
        "right, then hangs": "import time\nprint(1, flush=True)\ntime.sleep(1000)",
        "closes stdout, then hangs": "import os, time\nprint(1, flush=True)\nos.close(1)\ntime.sleep(1000)",
        "thread never ends": "import threading\nthreading.Thread(target=threading.Event().wait).start()\nprint(1)",
        "main thread ends alone": "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nprint(1, flush=True)\nctypes.CDLL(None).syscall(60, 0)",
    },
)
SLOW.append(
    calls(
        "right value, then hangs",
        "import atexit, time\natexit.register(time.sleep, 1000)\ndef f(x): return x",
        (1, 1),
    )
)

HOSTILE = FILES + PROCESSES + KERNEL + CHEATS + SLOW


def listener():
    """A TCP port that nobody should reach."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    return server


def verdicts_of(sources, tests):
    """What the reward says of each program, side by side."""
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(sandbox.passes, sources, map(json.dumps, tests)))


def decide(cases, folder="", port=0):
    """The verdict on each case, its placeholders filled in."""
    places = {"@DIR@": folder, "@PID@": str(os.getpid()), "@PORT@": str(port)}
    sources = []
    for case in cases:
        source = case.program
        for mark, value in places.items():
            source = source.replace(mark, value)
        sources.append(source)
    return verdicts_of(sources, [case.tests for case in cases])


def become(uid, python):
    """This process turns into user `uid`; its fork servers run `python`."""
    decide(GOOD[:2])  # imports what the other user may not be able to read
    sandbox.SERVERS.idle.clear()
    sys.executable = python
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def main():
    cases = GOOD + WRONG + HOSTILE
    with tempfile.TemporaryDirectory() as folder, listener() as server:
        Path(folder, "secret").write_text("s")
        verdicts = decide(cases, folder, server.getsockname()[1])
        left = os.listdir(folder)
    for k, (case, verdict) in enumerate(zip(cases, verdicts)):
        if verdict != (k < len(GOOD)):
            print("wrongly decided:", case.name)
    if left != ["secret"]:
        print("left behind:", left)
    print("decided", len(cases), "as user", os.getuid())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        become(int(sys.argv[1]), sys.argv[2])
    main()
