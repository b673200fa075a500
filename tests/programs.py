"""Programs for test_sandbox.py: GOOD ones in contest style, plainly WRONG ones, HOSTILE ones; each list holds Case records.

A hostile program reaches its answer only if its act succeeds, so a hole in the sandbox turns its verdict to True.
@DIR@ stands for a folder with a file `secret`, @PID@ for the grading process, @PORT@ for a TCP port that listens there.
Run as a program, `programs.py FOLDER_OF_SANDBOX [UID PYTHON]`, it grades all of them (as that user, with that interpreter in
the sandbox) and prints the names of those decided wrongly, then `decided N as user UID`.
"""

import os
import socket
import sys
import tempfile
from typing import NamedTuple


class Case(NamedTuple):
    name: str
    program: str
    tests: dict
    fn_name: str | None = None


def stdin(name, program, *pairs):
    return Case(name, program, {"inputs": [i for i, _ in pairs], "outputs": [o for _, o in pairs]})


def calls(name, program, fn_name, *pairs):
    return Case(
        name,
        program,
        {"inputs": [list(i) for i, _ in pairs], "outputs": [[o] for _, o in pairs]},
        fn_name,
    )


BIG = f"{200_000}\n{' '.join(map(str, range(200_000)))}\n"
BIG_SUM = str(sum(range(200_000)))
DEEP = 100_000

GOOD = [
    stdin(
        "plain input",
        "a, b = map(int, input().split())\nprint(a + b)",
        ("1 2\n", "3\n"),
        ("5 6", "11"),
    ),
    stdin(
        "stdin iteration",
        "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])",
        ("ab\ncd\n", "ba\ndc\n"),
    ),
    stdin(
        "stdin.buffer",
        "import sys\nd = sys.stdin.buffer.read().split()\nprint(sum(map(int, d[1:])))",
        (BIG, BIG_SUM),
    ),
    stdin(
        "os.read os.write",
        "import os\nd = b''\nwhile c := os.read(0, 1 << 16): d += c\nos.write(1, str(sum(map(int, d.split()[1:]))).encode())",
        (BIG, BIG_SUM),
    ),
    stdin("open(0)", "n, *a = map(int, open(0).read().split())\nprint(sum(a))", (BIG, BIG_SUM)),
    stdin("/dev/stdin", "print(open('/dev/stdin').read().upper())", ("abc", "ABC")),
    stdin(
        "input override",
        "import sys\ninput = sys.stdin.readline\nn = int(input())\nprint(*sorted(int(input()) for _ in range(n)))",
        ("3\n3\n1\n2\n", "1 2 3\n"),
    ),
    stdin(
        "print override",
        "import sys\nout = []\nprint = lambda *a: out.append(' '.join(map(str, a)))\n"
        "for i in range(3): print(i, i * i)\nsys.stdout.write('\\n'.join(out))",
        ("", "0 0\n1 1\n2 4\n"),
    ),
    stdin(
        "pyrival fast io",
        """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\\r\\n")
n = int(input())
print(sum(map(int, input().split())))
""",
        (BIG, BIG_SUM),
    ),
    stdin("unclosed output file", "f = open(1, 'w')\nf.write('kept')", ("", "kept")),
    stdin(
        "unclosed local file, exit()",
        "def main():\n    f = open(1, 'w')\n    f.write('kept')\n    exit()\nmain()",
        ("", "kept"),
    ),
    stdin(
        "atexit", "import atexit, os\natexit.register(lambda: os.write(1, b'late'))", ("", "late")
    ),
    stdin(
        "thread outlives main",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.05), print('late'))).start()",
        ("", "late"),
    ),
    stdin(
        "twenty threads",
        "import threading\nout = []\nts = [threading.Thread(target=out.append, args=(i,)) for i in range(20)]\n"
        "for t in ts: t.start()\nfor t in ts: t.join()\nprint(sum(out))",
        ("", "190"),
    ),
    stdin(
        "recursion limit",
        f"import sys\nsys.setrecursionlimit(10 ** 6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f({DEEP}))",
        ("", str(DEEP)),
    ),
    stdin(
        "recursion through C",
        "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10 ** 6)\n@lru_cache(None)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(300))",
        ("", "300"),
    ),
    *[
        stdin(
            f"thread, {mb} MB stack",
            f"import sys, threading\nsys.setrecursionlimit(10 ** 7)\nthreading.stack_size({mb} << 20)\n"
            f"def f(n): return 0 if n == 0 else 1 + f(n - 1)\ndef main(): print(f({DEEP}))\n"
            "t = threading.Thread(target=main)\nt.start()\nt.join()",
            ("", str(DEEP)),
        )
        for mb in (128, 256, 512)
    ],
    stdin(
        "rlimit stack",
        "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[1],) * 2)\nprint(1)",
        ("", "1"),
    ),
    stdin(
        "__main__ guard, exit()",
        "def main():\n    print(int(input()) ** 2)\nif __name__ == '__main__':\n    main()\n    exit()",
        ("7", "49"),
    ),
    stdin(
        "sys.exit(0) in a function",
        "import sys\ndef solve():\n    print('YES')\n    sys.exit(0)\nsolve()\nprint('NO')",
        ("", "YES"),
    ),
    stdin("exits with False", "import sys\nprint(1)\nsys.exit(False)", ("", "1")),
    stdin(
        "exits with zero of an enumeration",
        "import enum, sys\nprint(1)\nsys.exit(enum.IntEnum('Status', [('GOOD', 0)]).GOOD)",
        ("", "1"),
    ),
    stdin("quit()", "print(1)\nquit()", ("", "1")),
    stdin(
        "trailing spaces",
        "for i in range(3):\n    for j in range(2): print(i, end=' ')\n    print('  ')\nprint()",
        ("", "0 0\n1 1\n2 2"),
    ),
    stdin(
        "CRLF source and input",
        "n = int(input())\r\nprint(n,\r\n  input().strip())\r\n",
        ("3\r\nabc\r\n", "3 abc\r\n"),
    ),
    stdin(
        "more digits than asked", "print(1 / 3)\nprint('%.9f' % 2.5)", ("", "0.333333333\n2.50\n")
    ),
    stdin("unicode", "print(input()[::-1])", ("añ€", "€ña")),
    stdin("huge integer", "print(len(str(2 ** 30000)))", ("", "9031")),
    stdin(
        "heapq bisect deque",
        "import heapq, bisect\nfrom collections import deque, Counter, defaultdict\nq = [3, 1, 2]\nheapq.heapify(q)\n"
        "print(heapq.heappop(q), bisect.bisect([1, 2, 3], 2), deque([1, 2]).pop(), Counter('aab').most_common(1)[0][0])",
        ("", "1 2 2 a"),
    ),
    stdin(
        "late stdlib imports",
        "import calendar, csv, difflib, numbers, zlib, pprint, secrets, uuid, gzip, unicodedata\nprint(calendar.isleap(2024))",
        ("", "True"),
    ),
    stdin(
        "dataclass and NamedTuple",
        "from dataclasses import dataclass\nfrom typing import NamedTuple\n@dataclass(order=True)\nclass P:\n    x: int\n"
        "class Q(NamedTuple):\n    y: int\nprint(max(P(1), P(2)).x + Q(3).y)",
        ("", "5"),
    ),
    stdin(
        "all kinds of imports",
        "import bz2, lzma, sqlite3, unittest, xml.etree.ElementTree, email.message, concurrent.futures, doctest\n"
        "print('é'.encode('cp437'), sqlite3.connect(':memory:').execute('select 1').fetchone())\ndoctest.testmod()",
        ("", "b'\\x82' (1,)"),
    ),
    stdin(
        "no such file",
        "import os, pathlib\nprint(os.path.exists('input.txt'), os.path.isfile('@DIR@/secret'), pathlib.Path('/etc/passwd').exists())",
        ("", "False False False"),
    ),
    stdin(
        "size of the input",
        "import mmap, os, sys\nprint(os.fstat(0).st_size, len(mmap.mmap(0, 0, access=mmap.ACCESS_READ)), os.stat(0).st_size)",
        ("abc", "3 3 3"),
    ),
    stdin("end of input", "try:\n    input()\nexcept EOFError:\n    print('end')", ("", "end")),
    stdin(
        "stderr is free", "import sys\nprint('x' * 500000, file=sys.stderr)\nprint(1)", ("", "1")
    ),
    stdin("200 MB of memory", "a = [0] * (25 << 20)\nprint(len(a))", ("", str(25 << 20))),
    stdin(
        "two seconds of CPU",
        "import time\nwhile time.process_time() < 2: pass\nprint(1)",
        ("", "1"),
    ),
    stdin("long output", "print('ab ' * 100000)", ("", "ab " * 100000)),
    stdin(
        "denied, but catches it",
        "import os\ntry:\n    os.fork()\nexcept OSError:\n    print('alone')",
        ("", "alone"),
    ),
    stdin("inputs as lists of lines", "print(int(input()) + int(input()))", (["1", "2"], ["3"])),
    calls("function", "def add(a, b):\n    return a + b", "add", ((1, 2), 3), (("a", "b"), "ab")),
    calls(
        "method of Solution",
        "class Solution:\n    def twice(self, xs: List[int]) -> List[int]:\n        return [2 * x for x in xs]",
        "twice",
        (([1, 2],), [2, 4]),
    ),
    calls(
        "tuples for lists",
        "def f(n):\n    return (n, (n, {n: 1}))",
        "f",
        ((1,), [1, [1, {"1": 1}]]),
    ),
    calls(
        "prints on the way", "print('hello')\ndef f(x):\n    print(x)\n    return x", "f", ((1,), 1)
    ),
    calls("float result", "def f(x):\n    return x * .1", "f", ((3,), 0.3)),
    calls("no value", "def f(x): pass", "f", ((3,), None)),
    calls(
        "state between calls",
        "seen = {}\ndef f(x):\n    return seen.setdefault(x, len(seen))",
        "f",
        ((1,), 0),
        ((2,), 1),
        ((1,), 0),
    ),
    calls(
        "five seconds of CPU in two calls",
        "import time\ndef f(x):\n    end = time.process_time() + 2.5\n"
        "    while time.process_time() < end: pass\n    return x",
        "f",
        ((1,), 1),
        ((2,), 2),
    ),
    calls(
        "demo under guard",
        "def f(x): return x\nif __name__ == '__main__':\n    print(f(int(input())))",
        "f",
        ((1,), 1),
    ),
    Case(
        "unwrapped outputs",
        "def f(x): return list(range(x))",
        {"inputs": [[2], [3]], "outputs": [[0, 1], [0, 1, 2]], "fn_name": "f"},
    ),
]

WRONG = [
    stdin("other number", "print(4)", ("", "5")),
    stdin("second test fails", "print(1)", ("", "1"), ("", "2")),
    stdin("nothing", "pass", ("", "1")),
    stdin("syntax error", "print(1", ("", "1")),
    stdin("NUL in the source", "print(1)\0", ("", "1")),
    stdin("right, then raises", "print(1)\nraise ValueError", ("", "1")),
    stdin("right, then exits 1", "import sys\nprint(1)\nsys.exit(1)", ("", "1")),
    stdin("right, then exits with a message", "print(1)\nexit('bad')", ("", "1")),
    *[
        stdin(
            f"right, then exits with 7 that lies in {name}",
            f"import sys\nclass Lie{base}:\n    {name} = lambda *a: 0\nprint(1)\nsys.exit({value})",
            ("", "1"),
        )
        for base, value in (("(int)", "Lie(7)"), ("", "Lie()"))
        for name in ("__and__", "__rand__", "__int__", "__index__", "__eq__", "__bool__", "__mod__")
    ],
    stdin(
        "right, then exits with 7 of another class",
        "import sys\nclass Lie:\n    __class__ = int\nprint(1)\nsys.exit(Lie())",
        ("", "1"),
    ),
    stdin("right, then exits with 2 ** 64", "import sys\nprint(1)\nsys.exit(2 ** 64)", ("", "1")),
    stdin("right, then os._exit(3)", "import os\nprint(1, flush=True)\nos._exit(3)", ("", "1")),
    stdin("right, then more", "print(1)\nprint(2)", ("", "1")),
    stdin("other lines", "print(1)\nprint(2)", ("", "1 2")),
    stdin("glued", "print('12')", ("", "1 2")),
    stdin("float for an integer", "print(2.0)", ("", "2")),
    stdin("far float", "print(0.3334)", ("", "0.3333")),
    stdin("nan", "print('nan')", ("", "1.5")),
    stdin("infinite", "print('inf')", ("", "1e400")),
    stdin("underscore number", "print('1_0.0')", ("", "10.0")),
    stdin("other case", "print('yes')", ("", "YES")),
    stdin("to stderr", "import sys\nprint(1, file=sys.stderr)", ("", "1")),
    stdin("not UTF-8", "import os\nos.write(1, b'\\xff')", ("", "ÿ")),
    stdin("lost in a closed stdout", "import os\nprint('x' * 10)\nos.close(1)", ("", "x" * 10)),
    stdin("reads past the end", "input()\ninput()\nprint(1)", ("a\n", "1")),
    stdin("runaway recursion", "def f(n): return f(n + 1)\nprint(f(0))", ("", "1")),
    stdin(
        "crash in C",
        "import sys\nsys.setrecursionlimit(10 ** 8)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\nA().a",
        ("", ""),
    ),
    calls("string for a number", "def f(x): return '9'", "f", ((3,), 9)),
    calls("list for its one item", "def f(x): return [9]", "f", ((3,), 9)),
    calls("bool for a number", "def f(x): return True", "f", ((3,), 1)),
    calls("number for a bool", "def f(x): return 1", "f", ((3,), True)),
    calls("nested type", "def f(x): return [[1, '2']]", "f", ((3,), [[1, 2]])),
    calls("prints instead", "def f(x): print(9)", "f", ((3,), 9)),
    calls("other name", "def g(x): return 9", "f", ((3,), 9)),
    calls("generator for a list", "def f(x): return (i for i in [1])", "f", ((3,), [1])),
    calls("too short", "def f(x): return [1]", "f", ((3,), [1, 2])),
    calls("extra key", "def f(x): return {'a': 1, 'b': 2}", "f", ((3,), {"a": 1})),
    calls("nan for nan", "def f(x): return float('nan')", "f", ((3,), float("nan"))),
    calls("last test fails", "def f(x): return x", "f", ((1,), 1), ((2,), 2), ((3,), 4)),
    calls(
        "right value, bad end",
        "import atexit, os\natexit.register(os._exit, 1)\ndef f(x): return x",
        "f",
        ((1,), 1),
    ),
    calls(
        "state between calls, never reset",
        "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)",
        "f",
        ((1,), 1),
        ((2,), 1),
    ),
    calls(
        "total, never reset",
        "total = 0\ndef f(x):\n    global total\n    total += x\n    return total % 2 == 0",
        "f",
        ((2,), True),
        ((3,), False),
        ((2,), True),
        ((5,), False),
    ),
    calls("cyclic value", "def f(x):\n    a = []\n    a.append(a)\n    return a", "f", ((1,), [])),
]


def act(name, code):
    """A hostile act that raises where it is denied; the answer follows it."""
    return stdin(
        name,
        f"import ctypes, os, struct, sys, socket\nlibc = ctypes.CDLL(None)\n"
        f"def raw(*a):\n    r = libc.syscall(*[x if isinstance(x, bytes) else ctypes.c_long(x) for x in a])\n    assert r >= 0\n    return r\n"
        f"{code}\nprint('done')",
        ("", "done"),
    )


FILES = [
    act(name, code)
    for name, code in {
        "read a file": "open('@DIR@/secret').read()",
        "read /etc/passwd": "open('/etc/passwd').read()",
        "list a folder": "os.listdir('@DIR@')",
        "read own /proc": "open('/proc/self/maps').read()",
        "read the trainer's command": "open('/proc/@PID@/cmdline').read()",
        "read the server's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "follow the trainer's descriptors": "os.listdir('/proc/@PID@/fd')",
        "read the standard library": "open(os.__file__).read()",
        "list the standard library": "os.listdir(os.path.dirname(os.__file__))",
        "list site-packages": "[os.listdir(p) for name in ('site-packages', 'dist-packages') if os.path.lexists(p := os.path.dirname(os.__file__) + '/' + name)][0]",
        "list installed packages": "import importlib.metadata\nnext(importlib.metadata.distributions())",
        "import an installed package": "sys.path += [os.path.dirname(os.__file__) + '/site-packages', '/usr/lib/python3/dist-packages']\nimport pip",
        "times of a file": "os.stat(os.__file__)",
        "times of a link": "os.lstat('/proc/self')",
        "times of a link by newfstatat": "raw(262, -100, b'/proc/self', bytes(144), 0x1100)",
        "times of a link by statx": "raw(332, -100, b'/proc/self', 0x100, 0xfff, bytes(256))",
        "times of a path that is not opened": "os.open('@DIR@/secret', os.O_PATH | os.O_NOFOLLOW)",
        "does a file exist": "assert os.access('@DIR@/secret', os.F_OK)",
        "write a file": "open('@DIR@/new', 'w').write('x')",
        "append to a file": "open('@DIR@/secret', 'a').write('x')",
        "truncate while reading": "os.open('@DIR@/secret', os.O_RDONLY | os.O_TRUNC)",
        "truncate by name": "os.truncate('@DIR@/secret', 0)",
        "unnamed temporary file": "os.open('@DIR@', os.O_TMPFILE | os.O_RDWR)",
        "write into the standard library": "open(os.__file__, 'r+')",
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
    }.items()
]

PROCESSES = [
    act(name, code)
    for name, code in {
        "fork": "if os.fork() == 0: os._exit(0)",
        "fork by clone": "if raw(56, 17, 0, 0, 0, 0) == 0: os._exit(0)",
        "fork by clone3": "if raw(435, struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) == 0: os._exit(0)",
        "daemon left behind": "import time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)",
        "os.system": "assert os.system('true') == 0",
        "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
        "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
        "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()",
        "exec": "os.execv('/bin/echo', ['echo', 'done'])",
        "exec python": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"done\")'])",
        "file in memory": "fd = os.memfd_create('x')",
        "signal the server": "os.kill(os.getppid(), 0)",
        "kill the server": "os.kill(os.getppid(), 9)",
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
    }.items()
]

KERNEL = [
    act(name, code)
    for name, code in {
        "TCP": "socket.create_connection(('127.0.0.1', @PORT@)).send(b'x')",
        "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))",
        "unix socket": "socket.socket(socket.AF_UNIX)",
        "socketpair": "socket.socketpair()",
        "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "io_uring": "raw(425, 1, bytes(120))",
        "bpf": "raw(321, 0, struct.pack('4I', 2, 4, 4, 1) + bytes(112), 128)",
        "userfaultfd": "raw(323, 0)",
        "perf": "raw(298, struct.pack('2IQ', 1, 112, 0) + bytes(96), 0, -1, -1, 0)",
        "user namespace": "raw(272, 0x10000000)",
        "chroot": "os.chroot('/')",
        "shared memory": "raw(29, 0x5eed, 4096, 0o1666)",
        "message queue": "raw(68, 0x5eed, 0o1666)",
        "posix queue": "raw(240, b'bstar', 0o102, 0o600, 0)",
        "kernel key": "raw(248, b'user', b'bstar', b'x', 1, -3)",
        "undo the death signal": "raw(157, 1, 0, 0, 0, 0)",
        "dumpable again": "raw(157, 4, 1, 0, 0, 0)",
        "more CPU": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "two GiB": "bytearray(2 << 30)",
        "many descriptors": "fds = [os.dup(0) for _ in range(100)]",
        "descriptors inherited": "for fd in range(4, 1024):\n    try: os.fstat(fd)\n    except OSError: continue\n    break\nelse: sys.exit(1)",
        "grow stdin": "os.ftruncate(0, 1 << 40)",
        "set the host's name": "raw(170, b'x', 0)",
    }.items()
]

HUNT = """
import gc, os, re, sys
def hunt():
    frame, found = sys._getframe(), []
    while frame:
        found += [repr(frame.f_locals), repr(list(frame.f_globals.items()))]
        frame = frame.f_back
    found += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str, bytes)) and len(o) < 100]
    for text in found:
        if m := re.search("needle" + "[0-9]+", text): return m[0]
"""
EQUAL = "class Equal{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"

# True on the first call of a process, False on the others; right if a wrong answer were asked again in a fresh process.
TWO_ANSWERS = {
    "by a global": "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n == 1",
    "by a default": "def f(x, n=[]):\n    n.append(x)\n    return len(n) == 1",
    "by an attribute": "class Solution:\n    def f(self, x):\n        first = not hasattr(Solution, 'n')\n        Solution.n = 1\n        return first",
    "by the time": "import time\nstart = time.monotonic()\ndef f(x):\n    first = time.monotonic() - start < .05\n    time.sleep(.06)\n    return first",
    "by CPU time": "import time\ndef f(x):\n    first = time.process_time() < .1\n    while time.process_time() < .15: pass\n    return first",
    "by frames": "import sys\ndef f(x):\n    outer = sys._getframe().f_back.f_back.f_locals\n    return x == outer['calls'][0][1][0]",
    "by a module": "import string\ndef f(x):\n    first = not hasattr(string, 'n')\n    string.n = 1\n    return first",
}

# The first test leaves a mark in a time of PATH, which the second finds.
MARK = "import os, time\npath = {path}\nif time.time() - os.{stat}(path).st_{which}time < 60: print('again')\nelse:\n    {leave}\n    print('first')"

CHEATS = [
    *[
        stdin(
            f"mark in {name}",
            MARK.format(path=path, stat=stat, which=which, leave=leave),
            ("a", "first"),
            ("b", "again"),
        )
        for name, path, stat, which, leave in [
            (
                "a file's access time",
                "os.path.dirname(os.__file__) + '/turtledemo/clock.py'",
                "stat",
                "a",
                "open(path, 'rb').read(1)",
            ),
            (
                "a folder's access time",
                "os.path.dirname(os.__file__) + '/turtledemo'",
                "stat",
                "a",
                "os.listdir(path)",
            ),
            ("a link's access time", "'/etc/alternatives/awk'", "lstat", "a", "os.stat(path)"),
            ("the kernel's tables", "f'/proc/{os.getppid()}/fdinfo'", "stat", "m", "pass"),
        ]
    ],
    stdin("exits 0 at once", "import sys\nsys.exit(0)", ("", "5")),
    stdin("os._exit(0)", "import os\nos._exit(0)", ("", "5")),
    stdin(
        "claims success", "print('True')\nprint('passed')\nprint('{\"passed\": true}')", ("", "5")
    ),
    stdin("hunts the output", HUNT + "print(hunt())", ("", "needle4711")),
    calls("hunts the value", HUNT + "def f(x): return hunt()", "f", ((1,), "needle4711")),
    calls(
        "hunts the later values",
        HUNT + "def f(x): return x if x == 1 else hunt()",
        "f",
        ((1,), 1),
        ((2,), "needle4711"),
    ),
    calls("equal to all", EQUAL.format(base="") + "def f(x): return Equal()", "f", ((1,), 5)),
    calls(
        "a string equal to all",
        EQUAL.format(base="(str)") + "def f(x): return Equal('x')",
        "f",
        ((1,), "5"),
    ),
    calls(
        "an int equal to all",
        EQUAL.format(base="(int)") + "def f(x): return Equal(4)",
        "f",
        ((1,), 5),
    ),
    calls(
        "a list equal to all",
        EQUAL.format(base="(list)") + "def f(x): return Equal([4])",
        "f",
        ((1,), [5]),
    ),
    calls(
        "patched builtins",
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.all = lambda a: True\n"
        "builtins.len = lambda a: 1\nbuiltins.zip = lambda *a: []\ndef f(x): return 4",
        "f",
        ((1,), 5),
    ),
    calls(
        "patched json",
        "import json\njson.dumps = lambda *a, **k: 'true'\ndef f(x): return 4",
        "f",
        ((1,), 5),
    ),
    calls(
        "patched math",
        "import math, operator\nmath.isclose = lambda *a, **k: True\noperator.eq = lambda a, b: True\ndef f(x): return 4.5",
        "f",
        ((1,), 5.5),
    ),
    calls(
        "patched sandbox",
        "import sys\nf = sys._getframe()\nwhile f:\n    for k in ('plain', 'call', 'exit_status', 'lock', '_exit'):\n"
        "        if k in f.f_globals: f.f_globals[k] = lambda *a: 4\n    f = f.f_back\ndef f(x): return 4",
        "f",
        ((1,), 5),
    ),
    *[
        calls(f"two answers, {name}", source, "f", *[((i,), i % 3 == 0) for i in range(6)])
        for name, source in TWO_ANSWERS.items()
    ],
    calls("exit inside the call", "def f(x): raise SystemExit(0)", "f", ((1,), 5)),
    calls("os._exit inside the call", "import os\ndef f(x): os._exit(0)", "f", ((1,), 5)),
    calls(
        "forged verdicts",
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'true\\n0\\npassed\\n')\n    except OSError: pass\n"
        "def f(x): os._exit(0)",
        "f",
        ((1,), 5),
    ),
    calls(
        "forged deep nesting",
        "import os\nos.write(3, b'[' * 60000 + b'\\n')\ndef f(x): os._exit(0)",
        "f",
        ((1,), 5),
    ),
    calls(
        "forged giant",
        "import os\nos.write(3, b'{\"bytes\": 99999999999}\\n')\ndef f(x): os._exit(0)",
        "f",
        ((1,), ""),
    ),
    calls(
        "forged digits",
        "import os\nos.write(3, b'9' * 60000 + b'\\n')\ndef f(x): os._exit(0)",
        "f",
        ((1,), 1.5),
    ),
    calls(
        "forged float overflow",
        "import os\nos.write(3, b'9' * 4000 + b'\\n')\ndef f(x): os._exit(0)",
        "f",
        ((1,), 1.5),
    ),
    calls(
        "forged kinds",
        'import os\nos.write(3, b\'{"set": [[1]]}\\n{"tuple": 1, "set": 2}\\n{"eval": "1"}\\n{}\\n\')\ndef f(x): os._exit(0)',
        "f",
        ((1,), 5),
    ),
    calls("value as bytes", "def f(x): return b'5'", "f", ((1,), "5")),
    calls("imports the grader", "import sandbox\ndef f(x): return 5", "f", ((1,), 5)),
    stdin(
        "swallows its own end",
        "import os, signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        ("", ""),
    ),
    stdin("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", ("", "")),
    stdin("floods stdout", "while True: print('x' * 100000)", ("", "x")),
    calls(
        "floods the answer",
        "import os\ndef f(x):\n    while True: os.write(3, b'1\\n' * 10000)",
        "f",
        ((1,), 1),
    ),
    calls("a giant value", "def f(x): return 'x' * (200 << 20)", "f", ((1,), 1)),
    stdin(
        "threads without end",
        "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        ("", ""),
    ),
    stdin(
        "threads, then silence",
        "import os, threading, time\nthreading.stack_size(32768)\nfor _ in range(200):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\ntime.sleep(.5)\nprint(1, flush=True)\nos._exit(0)",
        ("", "1"),
    ),
    stdin("compile bomb", "x = (" + "-" * 100000 + "1)", ("", "")),
    stdin(
        "crashes the interpreter",
        "import ctypes\nprint(1, flush=True)\nctypes.string_at(0)",
        ("", "1"),
    ),
]

# These run into the wall-clock limit of 12 s, side by side.
SLOW = [
    stdin("right, then hangs", "import time\nprint(1, flush=True)\ntime.sleep(1000)", ("", "1")),
    stdin(
        "closes stdout, then hangs",
        "import os, time\nprint(1, flush=True)\nos.close(1)\ntime.sleep(1000)",
        ("", "1"),
    ),
    stdin(
        "thread never ends",
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\nprint(1)",
        ("", "1"),
    ),
    calls(
        "right value, then hangs",
        "import atexit, time\natexit.register(time.sleep, 1000)\ndef f(x): return x",
        "f",
        ((1,), 1),
    ),
    stdin(
        "main thread ends alone",
        "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nprint(1, flush=True)\n"
        "ctypes.CDLL(None).syscall(60, 0)",
        ("", "1"),
    ),
]

HOSTILE = FILES + PROCESSES + KERNEL + CHEATS + SLOW


def placed(case, folder, port):
    """The case with its placeholders filled in."""
    filled = (
        case.program.replace("@DIR@", folder)
        .replace("@PID@", str(os.getpid()))
        .replace("@PORT@", str(port))
    )
    return case._replace(program=filled)


def listener():
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    return server


def decide(cases, folder, port, workers=10):
    """[(case, verdict)] from sandbox.grade_programs."""
    from sandbox import grade_programs

    cases = [placed(c, folder, port) for c in cases]
    return list(zip(cases, grade_programs(*zip(*[c[1:] for c in cases]), workers=workers)))


def become(uid, python):
    """This process turns into user `uid`, once it has read all it needs; its fork servers run `python`."""
    import concurrent.futures.thread  # noqa: F401

    import sandbox  # noqa: F401

    sys.executable = python
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def main():
    with tempfile.TemporaryDirectory() as folder, listener() as server:
        with open(f"{folder}/secret", "w") as f:
            f.write("s")
        decided = decide(GOOD + WRONG + HOSTILE, folder, server.getsockname()[1])
        left = sorted(os.listdir(folder))
    for k, (case, verdict) in enumerate(decided):
        if verdict != (k < len(GOOD)):
            print("wrongly decided:", case.name)
    if left != ["secret"]:
        print("left behind:", left)
    print("decided", len(decided), "as user", os.getuid())


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    if len(sys.argv) > 2:
        become(int(sys.argv[2]), sys.argv[3])
    main()
