"""Does a model-written program pass its unit tests: the client that compares, and the sandbox.

    program, tests -> fork server -> locked-in child -> its output -> compared here -> 0 or 1

    python -s -S -P sandbox.py FD [--unsafe]    the fork server; the client starts it, FD: a socket

No expected output enters a program's process, no child sees another's job. A child can compute,
import the standard library (from memory) and start threads. It cannot open a file, start a process,
use a socket, or signal or trace anyone. What this does NOT cover:
- Kernel bugs and CPU side channels. Hostile code at scale belongs in a virtual machine.
- The clock, free memory, the ids of user and process; whether a path exists, its size and times.
- Each child may use 1 GiB; thread floods (more than 64) are noticed every 50 ms.
- Good programs that need numpy, asyncio, ssl, a file or a second process are judged wrong.
- On a crowded machine a program that waits for a CPU may hold its place for 60 s.
- With --unsafe, whatever this machine lacks is left out, and nobody probes what is then open.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib.abc
import importlib.util
import json
import math
import operator
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import typing
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from os import _exit  # bound early: the program may replace os._exit in its own process
from pathlib import Path

if __name__ == "__main__":
    UserError = Exception  # the fork server sees the standard library alone
else:
    from data import UserError

FILE = os.path.abspath(__file__)

# -- the client: from a response to 0 or 1 --------------------------------------------------------

BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)


def extract_program(text: str) -> str | None:
    r"""The program of a response: its last fenced code block, else all of it without a stray fence.

    >>> extract_program("Here:\n```python\nprint(1)\n```\nIt prints.")
    'print(1)'
    >>> extract_program("print(1)"), extract_program("")
    ('print(1)', None)
    """
    blocks = [block for block in BLOCK.findall(text) if block.strip()]
    program = blocks[-1] if blocks else re.sub(r"(?m)^[ \t]*```.*", "", text)
    return program.strip("\n") or None


def passes(program: str, gold: str) -> bool:
    """1[y^ passes all unit tests of x]; there is no reward for half of them   [Eq. 1, Sec. 2.1]

    gold     JSON: {"inputs": [...], "outputs": [...]} as in APPS (stdin and stdout, or arguments
             and value of "fn_name"), or {"asserts": ...} for passes_asserts; with "unsafe": true
             the program also runs where isolation falls short
    raises   SandboxError where it does, unless "unsafe"

    >>> tests = {"fn_name": "square", "inputs": [[2], [3]], "outputs": [[4], [9]]}
    >>> passes("def square(x): return x + x", json.dumps(tests))
    False
    """
    tests = json.loads(gold)
    unsafe = tests.get("unsafe", False)
    for _ in range(2):  # once more where the fork server was killed from outside
        server = SERVERS.take(unsafe)
        verdict = passes_on(server, program, tests)
        if server.alive:
            SERVERS.idle[unsafe].append(server)
            break
    return verdict


def passes_on(server: ForkServer, program: str, tests: dict) -> bool:
    """`passes` on one fork server."""
    if "asserts" in tests:
        return passes_asserts(server, program, tests["asserts"])
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not inputs or len(inputs) != len(outputs):
        return False  # what is not tested is not right
    if name is None:
        return passes_stdin(server, program, inputs, outputs)
    calls = [[name, arguments] for arguments in inputs]
    # APPS's expected values: in 455 of 460 rows they stand as [9] for 9
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return passes_calls(server, program, calls, outputs, same_value)


def passes_stdin(server: ForkServer, program: str, inputs: list, outputs: list) -> bool:
    """1[the program prints each output for its input]; each input has a process of its own."""
    for given, want in zip(map(as_text, inputs), map(as_text, outputs)):
        # JSON can hold half a surrogate pair, which plain UTF-8 refuses
        want = want.encode("utf-8", "surrogatepass")
        ended, out = server.run(program, given, expected=len(want))
        if not ended or not same_tokens(out, want):
            return False
    return True


def as_text(lines: str | list[str]) -> str:
    """APPS gives some inputs and outputs as a list of lines."""
    return "\n".join(lines) if isinstance(lines, list) else lines


def passes_calls(
    server: ForkServer, program: str, calls: list, values: list, same: Callable
) -> bool:
    """1[each call has its value]; all in one process, where each is answered once."""
    lines = answers(server, program, calls, len(repr(values)))
    return lines != [] and all(map(same, map(decode, lines), values))


def answers(server: ForkServer, program: str, calls: list, expected: int) -> list[bytes]:
    """A line for each call, all from one process; no lines where it failed on one of them."""
    ended, out = server.run(program, calls=calls, expected=expected)
    lines = out.split(b"\n")[:-1]
    # a program that prints a line of its own on the descriptor makes one too many
    return lines if ended and len(lines) == len(calls) else []


def passes_asserts(server: ForkServer, program: str, asserts: dict) -> bool:
    """1[assert lines (MBPP) or check(candidate) (HumanEval) hold for the program].

    asserts  "source": assert lines; with "entry", a module whose check(candidate) tests that name
             "setup": runs after the program, before the calls (MBPP's test_setup_code)
             "reference": the right program (HumanEval's solution); it says what tests that are
             more than f(...) == literal will ask, and defines what else they need
    """
    source, entry = asserts["source"], asserts.get("entry")
    tree = ast.parse(source)
    program = f"{program}\n{asserts.get('setup', '')}"
    if entry:
        # behind the program: tests call `candidate`, whatever the function's name
        program += f"\ncandidate = {entry}"
        names, then = {"candidate"}, "check(candidate)"
        body = next(node for node in tree.body if getattr(node, "name", "") == "check").body
    else:
        functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {function.id for function in functions if isinstance(function, ast.Name)}
        # len and set around f(...) are the test's own tools, not what is tested
        names = names - set(dir(builtins)) or names  # a program may have its own `sum`
        body, then = tree.body, ""
    try:
        calls, values = literal_tests(body, names)
    except ValueError:  # some assert has another form
        # behind the reference: a stub keeps the function of its name, and takes its place
        stubs = [f"{name} = stub({entry or name!r})" for name in sorted(names)]
        code = "\n".join([asserts.get("reference", ""), *stubs, source, then])
        return passes_replay(server, program, code)
    return passes_calls(server, program, calls, values, operator.eq)


def literal_tests(body: list[ast.stmt], names: set[str]) -> tuple[list[str], list]:
    """(calls, their values); raises ValueError if an assert is not f(...) == literal.

    >>> literal_tests(ast.parse("assert add(2, 3) == 5").body, {"add"})
    (['add(2, 3)'], [5])
    """
    calls, values = [], []
    for node in body:
        match node:
            case ast.Pass() | ast.Expr(ast.Constant()) | ast.Assert(ast.Constant(True)):
                continue
            case ast.Assert(ast.Compare(ast.Call(ast.Name(name)) as call, [ast.Eq()], [value])):
                if name not in names:
                    raise ValueError(name)
                calls.append(ast.unparse(call))
                values.append(ast.literal_eval(value))
            case _:
                raise ValueError(node)
    return calls, values


# The test code of a data set, in a child of its own, without the program. Each call of a tested
# function is printed and answered: from `known`, then by the reference, on which no verdict rests.
REPLAY = """
import math, os, random, sys
inf, nan, known = math.inf, math.nan, iter([{known}])
asked, sys.stdout = sys.stdout, sys.stderr
def stub(name):
    reference = globals().get(name)
    def ask(*args, **named):
        question = f"{{name}}(*{{args!r}}, **{{named!r}})"
        print(question, file=asked, flush=True)
        for value in known: return value
        if reference is None: os._exit(1)
        return eval(question, {{**globals(), name: reference}})
    return ask
random.seed(0)
{code}
"""


def passes_replay(server: ForkServer, program: str, code: str) -> bool:
    """1[the test code passes on the program's answers], which one process gives, each once.

    The program is asked at once all that the reference's answers lead to. Where its own lead to
    another question, a new process is asked, which must answer those before as the last one did.
    """
    questions, lines, known = [], [], []
    while True:
        passed, asked = replay(server, code, lines)
        # commonprefix takes any lists, here of questions
        same = len(os.path.commonprefix([asked, questions]))
        # all that the test code asked was answered by the program, so its end is the verdict
        if same == len(asked):
            return passed and same > 0  # a test that asks nothing is none
        # the program's own answers led elsewhere; what is behind the parting was asked in vain
        if same < len(questions):
            if same <= len(known):
                return False  # the test asks something else each time
            # the same answers again, and from there the reference's, to learn what comes next
            _, asked = replay(server, code, lines[:same])
        known, questions = lines[:same], asked
        # one process for all questions, so a program with a state is asked as the test would
        lines = answers(server, program, questions, len(code))
        if not lines or lines[:same] != known:
            return False


def replay(server: ForkServer, code: str, lines: list[bytes]) -> tuple[bool, list[str]]:
    """(does the test code pass, the questions it asks); `lines` answer the first of them."""
    known = [repr(decode(line)) for line in lines]  # what is no plain data is no Python either
    program = REPLAY.format(known=", ".join(known), code=code)
    passed, out = server.run(program, expected=8 * OUTPUT)
    return passed, out.decode(errors="replace").split("\n")[:-1]


# -- comparing ------------------------------------------------------------------------------------

NUMBER = re.compile(rb"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")  # float() takes nan and 1_0, too
is_close = partial(math.isclose, rel_tol=1e-6, abs_tol=1e-9)


def same_tokens(out: bytes, want: bytes) -> bool:
    """Equal tokens on equal lines, blank lines aside.

    >>> same_tokens(b"1 2 \\n0.333333333\\n", b"1 2\\n\\n0.3333333")
    True
    >>> same_tokens(b"1\\n2\\n", b"1 2"), same_tokens(b"2.0", b"2")
    (False, False)
    """
    got, gold = token_lines(out), token_lines(want)
    if [*map(len, got)] != [*map(len, gold)]:
        return False
    return all(map(same_token, chain(*got), chain(*gold)))


def token_lines(text: bytes) -> list[list[bytes]]:
    """The tokens of each line that has one."""
    return list(filter(None, map(bytes.split, text.split(b"\n"))))


def same_token(got: bytes, want: bytes) -> bool:
    """Equal, or numbers within 1e-6 relative where the expected one has a . or an e."""
    if got == want:
        return True
    is_float = re.search(rb"[.eE]", want) and NUMBER.fullmatch(want) and NUMBER.fullmatch(got)
    return bool(is_float) and is_close(float(got), float(want))


def same_value(got: object, want: object) -> bool:
    """Equal as JSON values: a tuple is a list, a key its string, a bool no number.

    >>> same_value((1, 2.0), [1, 2]), same_value({1: "a"}, {"1": "a"}), same_value(True, 1)
    (True, True, False)
    """
    if isinstance(want, list):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return False
        return all(map(same_value, got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        got = {str(key): value for key, value in got.items()}
        return got.keys() == want.keys() and all(same_value(got[key], want[key]) for key in want)
    if isinstance(want, float) and isinstance(got, float) and is_close(got, want):
        return True
    return got == want and isinstance(got, bool) == isinstance(want, bool)


KINDS = dict.fromkeys((list, tuple, set, frozenset), iter)  # kind: its parts
KINDS |= {dict: dict.items, complex: lambda value: (value.real, value.imag)}


def plain(value: object) -> object:
    """A value as JSON that keeps Python's types; anything but plain data becomes nothing's equal.

    >>> plain([1, (2, {"a": None})])
    [1, {'tuple': [2, {'dict': [{'tuple': ['a', None]}]}]}]
    """
    for kind, parts in KINDS.items():
        if isinstance(value, kind):
            items = [plain(part) for part in parts(value)]
            return items if kind is list else {kind.__name__: items}
    if value is None or isinstance(value, (int, float, str)):
        return value
    return {"other": type(value).__name__}


def decode(line: bytes) -> object:
    """The value that `plain` wrote; equal to nothing where a hostile child sent other bytes."""
    kinds = {kind.__name__: kind for kind in KINDS}

    def value(record: dict) -> object:
        [(kind, parts)] = record.items()
        return complex(*parts) if kind == "complex" else kinds[kind](parts)

    try:
        return json.loads(line, object_hook=value)
    except Exception:  # no plain data, deep nesting, unhashable members, endless digits
        return object()


# -- the client's end of a fork server ------------------------------------------------------------

OUTPUT = 64 << 10  # bytes a program may print, beside twice what is expected
PROBE = """
import os, socket
acts = [(os.fork,), (socket.socket,), (open, {file!r}), (open, {file!r}, "r+"),
    (os.kill, os.getppid(), 0), (os.execv, {python!r}, [{python!r}, "-c", "print('execv')"])]
for act, *args in acts:
    try: act(*args), print(act.__name__, flush=True)
    except OSError: pass
"""


class SandboxError(UserError):
    """One line: model-written programs can't be run safely here, why, and what to do."""


class ForkServer:
    """This file as a process, and its control socket; it ends when that is closed."""

    def __init__(self, unsafe: bool):
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"model-written programs run on Linux only; this is {sys.platform}")
        self.alive = True
        # messages with edges: a reply is read whole, and an empty one means the other end has gone
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = ["--unsafe"] if unsafe else []
        # nothing of this process reaches the server but one end of the socket
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *"-s -S -P".split(), FILE, str(theirs.fileno()), *flags],
                # a fixed hash seed: a set's order, and what is printed of it, is the same each time
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
                pass_fds=[theirs.fileno()],
                cwd="/",
                # Ctrl-C in the terminal is for the trainer, which then closes the socket
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        state = self.control.recv(4096).decode() or "its fork server did not start"
        if state == "ready" and not unsafe:  # seen from inside: a wall may stand and hold nothing
            ended, out = self.run(PROBE.format(file=FILE, python=sys.executable))
            acts = sorted({*out.decode().split()})
            if acts or not ended:
                state = f"open to them: {', '.join(acts)}" if acts else "the probe failed"
        if state != "ready":
            problem = f"model-written programs can't be run safely here: {state}"
            raise SandboxError(f"{problem}; or accept less with --unsafe-code")

    def run(
        self, program: str, stdin: str = "", calls: list | None = None, expected: int = 0
    ) -> tuple[bool, bytes]:
        """One job; clears `alive` where the server has ended.

        calls    expressions or [fn_name, arguments]; None: stdin goes in, stdout comes out
        returns  (ended with exit status 0 in time, its output or a JSON line a call)
        """
        read, write = os.pipe()
        out, status = b"", b""
        most = OUTPUT + 2 * expected
        with open(read, "rb") as answer, contextlib.suppress(ConnectionError):
            # this end of the pipe is closed at once, or the read below would never see its end
            with open(write, "wb"), open(os.memfd_create("job"), "w+") as file:
                json.dump({"program": program, "stdin": stdin, "calls": calls}, file)
                file.seek(0)
                socket.send_fds(self.control, [b"run"], [file.fileno(), write])
            # one byte more than allowed tells a flood from a long answer
            out = answer.read(most + 1)
            answer.close()  # a flood meets a broken pipe
            status = self.control.recv(64)
        self.alive = status != b""
        return status == b"0" and len(out) <= most, out


class Servers:
    """The fork servers that wait for work; a forked process must not share its parent's."""

    def __init__(self):
        self.idle = defaultdict(list)  # by `unsafe`
        os.register_at_fork(after_in_child=self.idle.clear)

    def take(self, unsafe: bool) -> ForkServer:
        """One that waits, or a new one."""
        with contextlib.suppress(IndexError):
            # a list's pop and append are atomic, so the grader's threads need no lock
            return self.idle[unsafe].pop()
        return ForkServer(unsafe)


SERVERS = Servers()

# -- the child: what it gives up ------------------------------------------------------------------
#
# Two walls stand one behind the other. Landlock closes files, TCP and signals by what they are;
# seccomp admits the system calls below and no other. The limits hold what is left, computing.

LOOK_S, IDLE_S, WALL_S = 0.05, 12, 60  # how often a child is looked at; it may sleep, and last
# looked at, not limited: RLIMIT_NPROC would count all processes of the user
THREADS = 64
CPU_S, CALLS_CPU_S = 4, 16  # a program or a call; all calls
# A thread's stack, unless the program asks for more; else glibc would take RLIMIT_STACK.
STACK, THREAD_STACK = 256 << 20, 8 << 20
LIMITS = {
    resource.RLIMIT_AS: 1 << 30,  # memory, of which the trainer needs the rest
    resource.RLIMIT_FSIZE: 0,  # no file grows, should one be writable
    resource.RLIMIT_NOFILE: 32,  # duplicates of descriptors are kernel memory, outside RLIMIT_AS
    resource.RLIMIT_CORE: 0,  # a crash must not write the memory to the disk
    resource.RLIMIT_MEMLOCK: 0,  # pinned memory can't be swapped out
}

# Why a system call is harmless: its names. What is not named here or below fails with EPERM.
FREE = {
    "its own memory": "brk madvise mmap mprotect mremap munmap",
    "open descriptors, which are its input and output": """close close_range dup dup2 dup3 fstat
        fstatfs lseek poll ppoll pread64 pselect6 read readv select write writev""",
    "its own threads": """exit exit_group futex restart_syscall rseq sched_getaffinity sched_yield
        set_robust_list set_tid_address""",
    "signals and timers of its own": """alarm getitimer pause rt_sigaction rt_sigpending
        rt_sigprocmask rt_sigreturn rt_sigsuspend setitimer sigaltstack""",
    "clocks": "clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep time times",
    "who and where it is": """getcwd getegid geteuid getgid getgroups getpgrp getpid getppid
        getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid sysinfo uname""",
}
# To these, which tell whether a path exists and its times, there is no file.
HIDDEN = "access faccessat faccessat2 lstat stat statx".split()
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # seccomp's actions; FAIL | error number
NO_FILE, NO_CALL = FAIL | errno.ENOENT, FAIL | errno.ENOSYS
# Only to read: /dev/stdin is a path, and Landlock refuses all others, but not with O_PATH.
WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_PATH | os.O_TMPFILE & ~os.O_DIRECTORY
# (action, call, argument, mask, value): where argument & mask == value
RULES = [
    (ALLOW, "open", 1, WRITES, 0),
    (ALLOW, "openat", 2, WRITES, 0),
    (ALLOW, "clone", 0, 0x7E032000, 0x10000),  # a thread: CLONE_THREAD, no namespace, no trace
    (NO_CALL, "clone3"),  # its flags lie in memory, out of sight; without it glibc takes clone
    (ALLOW, "prlimit64", 0, -1, 0),  # its own limits; with an id, another process's
    (ALLOW, "newfstatat", 3, -1, 0x1000),  # AT_EMPTY_PATH: glibc's fstat
    (NO_FILE, "newfstatat", 3, 0x1000, 0),
    (ALLOW, "fcntl", 1, ~3, 0),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL; F_SETOWN sends signals
    (ALLOW, "fcntl", 1, -1, fcntl.F_DUPFD_CLOEXEC),
]

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP = 1, 4, 21, 22
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # glibc has no names for these calls
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 4
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4


def must(result: int) -> int:
    """The result of a C call, which reports failure as a negative number."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def make_landlock() -> Callable[[], int]:
    """A function that leaves its process no file, socket or signal."""
    abi = must(libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1, 0))
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1  # + REFER, TRUNCATE, IOCTL_DEV
    attributes = struct.pack("QQQ", rights, 3, 3)  # files; TCP; signals and abstract sockets
    known = 8 * (1 + (abi >= 4) + (abi >= 6))  # bytes of them
    ruleset = must(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, known, 0, 0))
    ruleset = fcntl.fcntl(ruleset, fcntl.F_DUPFD_CLOEXEC, 64)  # above a child's descriptors
    return lambda: must(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0, 0, 0))


def make_seccomp() -> Callable[[], int]:
    """A function that leaves its process the system calls above; all others fail with EPERM."""
    must(libc.prctl(PR_GET_SECCOMP, 0, 0, 0, 0))  # fails where the kernel was built without it
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(FAIL | errno.EPERM))

    rules = RULES + [(NO_FILE, name) for name in HIDDEN]
    rules += [(ALLOW, name) for name in " ".join(FREE.values()).split()]
    for action, name, *limit in rules:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # this machine has no such call
            continue
        test = None
        if limit:
            argument, mask, value = limit
            test = struct.pack("IiQQ", argument, 7, mask & (1 << 64) - 1, value)  # MASKED_EQ
        must(lib.seccomp_rule_add_array(context, action, number, len(limit) // 3, test))
    with open(os.memfd_create("filter"), "w+b") as file:  # made once, loaded by each child
        must(lib.seccomp_export_bpf(context, file.fileno()))
        file.seek(0)
        code = ctypes.create_string_buffer(file.read())
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code))
    # 2: SECCOMP_MODE_FILTER; the header points into `code`, which must live as long
    return lambda code=code: must(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0))


def lock(walls: list[Callable], cpu_seconds: int) -> None:
    """Give up everything this process will not need; any failure here ends it."""
    limits = LIMITS | {resource.RLIMIT_CPU: cpu_seconds}
    for what, most in limits.items():
        limit = min(most, resource.getrlimit(what)[1] % 2**64)  # infinity is -1
        resource.setrlimit(what, (limit, limit))
    # no exec may raise privileges; without it neither wall can be put up by a plain user
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # where the trainer is root: root's rights over files, processes and limits
    must(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))  # _LINUX_CAPABILITY_VERSION_3
    for put_up in walls:
        put_up()
    # the server's socket and this job's pipe: more than the server ever holds
    os.closerange(4, 256)


# -- the child: what it runs ----------------------------------------------------------------------


def child(descriptors: list[int], walls: list[Callable]) -> None:
    """Becomes the program; never returns."""
    status = 99
    try:
        os.setsid()  # a group of its own, to be killed whole
        must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # it ends with its server
        with open(descriptors[0], "rb") as file:
            job = json.load(file)
        null = os.open("/dev/null", os.O_RDWR)
        stdin = os.memfd_create("stdin")
        # pwrite leaves the offset where it is, at the start
        os.pwrite(stdin, job["stdin"].encode("utf-8", "surrogatepass"), 0)
        calls, out = job["calls"], descriptors[1]
        files = [stdin, out, null, null] if calls is None else [stdin, null, null, out]
        for number, source in enumerate(files):
            os.dup2(source, number)  # only `null` may be 3 itself, and 3 comes last
        lock(walls, min(CPU_S * len(calls or [None]), CALLS_CPU_S))
        status = exit_status(job)
    finally:
        _exit(status)


def exit_status(job: dict) -> int:
    """Run, then end as the interpreter would: threads, atexit, flush, globals (and their files)."""
    status = 0
    try:
        run_program(job)
    except SystemExit as end:
        # of the types themselves: an object may say that it is an int, an int that it equals 0
        is_zero = issubclass(type(end.code), int) and int.__eq__(end.code, 0)
        status = int(end.code is not None and not is_zero)
    except BaseException:
        status = 1
    steps = [
        threading._shutdown,
        atexit._run_exitfuncs,
        lambda: sys.stdout.flush(),
        lambda: vars(sys.modules["__main__"]).clear(),
        sys.__stdout__.flush,
    ]
    for step in steps:
        with contextlib.suppress(BaseException):
            step()
    return status


def run_program(job: dict) -> None:
    """Run the source as a real module, then its calls, one JSON line each on descriptor 3."""
    calls = job["calls"]
    name = "__main__" if calls is None else "solution"  # a function's demo under __main__ is silent
    module = types.ModuleType(name)
    sys.modules["__main__"] = sys.modules[name] = module
    space = vars(module)
    space["__builtins__"] = builtins
    if calls is not None:  # LeetCode's starter code, kept in APPS, annotates with List unimported
        space.update((name, getattr(typing, name)) for name in typing.__all__)
    answer = open(3, "w", closefd=False)
    random.seed(0)  # a question that is asked again has the same answer
    limit_cpu()
    # dont_inherit: this file's `from __future__ import annotations` is not the program's
    exec(compile(job["program"], "program.py", "exec", dont_inherit=True), space)
    for item in calls or ():
        limit_cpu()
        print(json.dumps(plain(call(space, item))), file=answer, flush=True)


def limit_cpu() -> None:
    """What comes next may take CPU_S; past the hard limit nothing goes on."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # from what is used by now: the limit counts a process's whole life
    soft = math.ceil(time.process_time()) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))


def call(space: dict, item: str | list) -> object:
    """The value of an expression, or of [fn_name, arguments] on Solution or the module."""
    if isinstance(item, str):
        return eval(item, space)
    name, arguments = item
    owner = space.get("Solution")
    function = getattr(owner(), name) if hasattr(owner, name) else space[name]
    return function(*arguments)


# -- the fork server ------------------------------------------------------------------------------

# Of the library's folders: what no program asks for, or no child could use.
SKIPPED = set("test tests idlelib lib2to3 turtledemo tkinter distutils pydoc_data".split())
# Shared objects that are not loaded (names begin so), since each makes every fork dearer.
NOT_LOADED = tuple(
    """_asyncio _codecs _crypt _ctypes_t _curses _dbm _gdbm _lsprof _multib _multip _posixsh _ssl
    _test _tkinter _xx audioop nis ossaudio readline spwd syslog termios xx""".split()
)
# Imported once here, so that no child pays for them.
PRELOADED = """bisect cmath collections copy dataclasses datetime decimal fractions functools
hashlib heapq itertools queue statistics string textwrap zlib""".split()


class Library(importlib.abc.InspectLoader):
    """Imports the standard library from memory, without site-packages: a child opens no file."""

    def __init__(self):
        self.sources = {}  # name: (is it a package, its source)
        root = Path(os.__file__).parent
        for folder, subfolders, _ in os.walk(root):
            # in place, so that os.walk does not enter the others; site-packages is no identifier
            subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in SKIPPED]
            for path in Path(folder).glob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                self.sources[name] = is_package, path.read_bytes()

    def find_spec(self, name: str, path: object = None, target: object = None):
        """What the import system asks for."""
        if name in self.sources:
            return importlib.util.spec_from_loader(name, self)

    def is_package(self, name: str) -> bool:
        return self.sources[name][0]

    def get_source(self, name: str) -> str:
        return importlib.util.decode_source(self.sources[name][1])


def preload() -> None:
    """Import what children often need, and what lies in shared objects; the rest from memory."""
    names = list(PRELOADED)
    for folder in filter(os.path.isdir, sys.path):
        objects = [file for file in os.listdir(folder) if file.endswith(".so")]
        # a shared object can't be loaded from memory, so it is loaded now or never
        names += [file.partition(".")[0] for file in objects]
    for name in names:
        if not name.startswith(NOT_LOADED):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    sys.meta_path[-1] = Library()  # in the place of the finder that reads files


def states(pid: int) -> bytes:
    """A letter for each thread of it: R runs or waits for a CPU, S sleeps, ...   [proc(5)]"""
    letters = b""
    with contextlib.suppress(OSError):  # a thread is gone, or all of it
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            letters += stat.read_bytes().rpartition(b") ")[2][:1]
    return letters


def supervise(control: socket.socket, pid: int) -> int:
    """The child's wait status; -1 where it was killed: time, threads, or the trainer is gone."""
    pidfd = os.pidfd_open(pid)
    start = last = time.monotonic()
    idle = 0.0
    while not (ready := select.select([pidfd, control], [], [], LOOK_S)[0]):
        threads, now = states(pid), time.monotonic()
        if b"R" not in threads:  # others' work should change no verdict; RLIMIT_CPU ends what runs
            # at most a few looks' worth: the supervisor itself may have waited for a CPU
            idle += min(now - last, 10 * LOOK_S)
        if idle > IDLE_S or now - start > WALL_S or len(threads) > THREADS:
            break
        last = now
    os.close(pidfd)
    # not waited for yet, so the number can't be another process's
    for kill in (os.killpg, os.kill):  # its whole session: a child alone, unless unsafe
        with contextlib.suppress(ProcessLookupError):  # too early for its own group
            kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return status if pidfd in ready else -1


def serve(control: socket.socket, walls: list[Callable]) -> None:
    """One child a message; its wait status goes back. It ends when the trainer does."""
    while descriptors := socket.recv_fds(control, 16, 2)[1]:
        pid = os.fork()
        if pid == 0:
            child(descriptors, walls)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(str(supervise(control, pid)).encode())


# what a child locks itself in with: what this machine needs for it
# in this order: seccomp admits no call of Landlock's
WALLS = {
    make_landlock: "Landlock, Linux 5.13 or later with `landlock` in the kernel's lsm= list",
    make_seccomp: "seccomp, libseccomp.so.2 (apt-get install libseccomp2)",
}


def main() -> None:
    """python sandbox.py FD [--unsafe]: says on FD "ready" or what isolation lacks, then serves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack = min(STACK, hard % 2**64)  # infinity is -1
    if soft != stack:  # the kernel lays the stack out at exec
        resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
        os.execv(sys.executable, sys.orig_argv)
    number = int(sys.argv[1])
    control = socket.socket(fileno=os.dup(number))  # low, so that a child closes it
    os.close(number)
    with contextlib.suppress(OSError):
        # where memory runs out, a program goes first, not the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    must(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # no child of the same user may trace it
    walls, missing = [], []
    for make, needs in WALLS.items():
        try:
            walls.append(make())
        except OSError as error:
            missing.append(f"it needs {needs}: {error}")
    if "--unsafe" in sys.argv:
        missing = []
    control.send("; ".join(missing).encode() or b"ready")
    preload()
    threading.stack_size(THREAD_STACK)
    sys.set_int_max_str_digits(0)  # contests print long integers
    sys.argv, builtins.exit, builtins.quit = ["program.py"], sys.exit, sys.exit  # -S lacks them
    gc.freeze()  # no collection in a child touches, and so copies, the server's pages
    with contextlib.suppress(ConnectionError):  # the trainer is gone, in the middle of a job
        serve(control, walls)


if __name__ == "__main__":
    main()
