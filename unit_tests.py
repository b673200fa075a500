"""Does a program pass its unit tests: programs run in sandbox.py's children, what they print is compared here."""
from __future__ import annotations

import ast
import builtins
import json
import math
import operator
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Sequence

from data import UserError

WORKERS = min(16, os.cpu_count() or 1)



# ---------------------------------------------------------------------------------------------------------------------
# 2. Unit tests
#
# Model-written programs run in sandbox.py's children: programs, inputs and calls go there, bytes come back and are compared
# here. No expected output enters a program's process.

_OUTPUT = 64 << 10  # bytes a program may print, beside twice what is expected
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_PROBE = """
import os, socket
for act, *args in [(os.fork,), (socket.socket,), (open, {file!r}), (open, {file!r}, "r+"), (os.kill, os.getppid(), 0),
                   (os.execv, {python!r}, [{python!r}, "-c", "print('execv')"])]:
    try: act(*args), print(act.__name__, flush=True)
    except OSError: pass
"""
_servers = {False: [], True: []}  # unsafe -> fork servers without work; a forked process must not share its parent's
os.register_at_fork(after_in_child=lambda: [idle.clear() for idle in _servers.values()])


class SandboxError(UserError):
    """One line: model-written programs can't be run safely here, why, and what to do."""


class ForkServer:
    """sandbox.py as a process, and the socket that controls it; it ends when the socket is closed."""

    def __init__(self, unsafe: bool):
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"model-written programs run on Linux only (Landlock, seccomp), and this is {sys.platform}")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).resolve().with_name("sandbox.py"))
        command = [sys.executable, "-s", "-S", "-P", script, str(theirs.fileno()), *["--unsafe"] * unsafe]
        with theirs:
            self.process = subprocess.Popen(command, env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}, pass_fds=[theirs.fileno()],
                                            cwd="/", start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        state = self.control.recv(4096).decode() or "its fork server did not start"
        if state == "ready" and not unsafe:
            ended, out = self.run(_PROBE.format(file=script, python=sys.executable))
            state = f"open to them: {', '.join(sorted({*out.decode().split()}))}" if out else "ready" if ended else "the probe failed"
        if state != "ready":
            raise SandboxError(f"model-written programs can't be run safely here: {state}; or accept less with --unsafe-code")

    def run(self, program: str, stdin: str = "", calls: list | None = None, expected: int = 0) -> tuple[bool, bytes]:
        """(ended with exit status 0 in time, what it printed, or the JSON lines of its calls' values); sets `alive`"""
        (read, write), out, status = os.pipe(), bytearray(), b""
        with open(read, "rb", buffering=0) as answer, suppress(ConnectionError):
            with open(write, "wb"), open(os.memfd_create("job"), "w+") as job:
                json.dump({"program": program, "stdin": stdin, "calls": calls}, job)
                job.seek(0)
                socket.send_fds(self.control, [b"run"], [job.fileno(), write])
            while len(out) <= _OUTPUT + 2 * expected and (chunk := answer.read(1 << 16)):
                out += chunk
            answer.close()  # a flood meets a broken pipe
            status = self.control.recv(64)
        self.alive = status != b""
        return status == b"0" and not chunk, bytes(out)


def same_tokens(out: bytes, want: bytes) -> bool:
    """Valid UTF-8, equal tokens on equal lines, blank lines aside; 1e-6 relative where the expected token has . or e

    >>> same_tokens(b"1 2 \\n0.333333333\\n", b"1 2\\n\\n0.3333333"), same_tokens(b"1\\n2\\n", b"1 2"), same_tokens(b"2.0", b"2")
    (True, False, False)
    """
    def same(x: bytes, y: bytes) -> bool:
        close = re.search(rb"[.eE]", y) and _NUMBER.fullmatch(x) and _NUMBER.fullmatch(y)
        return x == y or bool(close) and math.isclose(float(x), float(y), rel_tol=1e-6, abs_tol=1e-9)

    got, gold = ([line.split() for line in text.split(b"\n") if line.split()] for text in (out, want))
    same_shape = out.decode(errors="replace").encode() == out and [*map(len, got)] == [*map(len, gold)]
    return same_shape and all(map(same, chain(*got), chain(*gold)))


def same_value(got: object, want: object) -> bool:
    """Equal as JSON values: a tuple is a list, a key its string, a bool no number; floats within 1e-6 relative

    >>> same_value((1, 2.0), [1, 2]), same_value(True, 1), same_value({1: "a"}, {"1": "a"}), same_value(0.1 + 0.2, 0.3)
    (True, False, True, True)
    """
    if isinstance(want, list):
        return isinstance(got, (list, tuple)) and len(got) == len(want) and all(map(same_value, got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        got = {str(k): v for k, v in got.items()}
        return got.keys() == want.keys() and all(same_value(got[k], want[k]) for k in want)
    close = isinstance(want, float) and isinstance(got, float) and math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9)
    return close or got == want and isinstance(got, bool) == isinstance(want, bool)


def _decode(line: bytes) -> object:
    """The plain data that sandbox.plain wrote as a line; an object equal to nothing where a hostile child sent other bytes."""
    kinds = {"tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset, "complex": lambda v: complex(*v)}
    try:
        return json.loads(line, object_hook=lambda o: [kinds[kind](v) for kind, v in o.items()][0])
    except Exception:  # no plain data, deep nesting, unhashable members, endless digits
        return object()


# The test code of a data set, run in a child of its own, without the program: each call it makes of the tested function
# is answered from `known`; the first unknown one is printed, and the program answers it in another child.
_REPLAY = """
import math, os, random, sys
inf, nan, known = math.inf, math.nan, iter([{known}])
def stub(name):
    def ask(*args, **named):
        for value in known: return value
        os._exit(print(f"{{name}}(*{{args!r}}, **{{named!r}})", flush=True) or 0)
    return ask
random.seed(0)
{source}
print("passed")
"""


def assert_tests(source: str, entry: str | None = None, setup: str = "", reference: str = "") -> dict:
    """The `tests` of run_unit_tests from assert lines (MBPP), or from a module with check(candidate) for `entry` (HumanEval)

    `setup` runs after the program, before the calls (MBPP's test_setup_code); `reference` is code that the test needs and no
    program is asked for (HumanEval: prompt + canonical solution). Only f(...) == literal is compared in this process.

    >>> assert_tests("assert add(2, 3) == 5"), *assert_tests("assert abs(half(3) - 1.5) < 1e-6")
    ({'inputs': ['add(2, 3)'], 'outputs': ['5'], 'setup': ''}, 'replay')
    """
    tree = ast.parse(source)
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    names = {"candidate"} if entry else called - set(dir(builtins)) or called
    tests = {"inputs": [], "outputs": [], "setup": f"{setup}\ncandidate = {entry}" if entry else setup}
    try:
        for node in next(n for n in tree.body if getattr(n, "name", "") == "check").body if entry else tree.body:
            match node:
                case ast.Pass() | ast.Expr(ast.Constant()) | ast.Assert(ast.Constant(True)):
                    continue
                case ast.Assert(ast.Compare(ast.Call(ast.Name(f)) as call, [ast.Eq()], [value])) if f in names:
                    tests["inputs"].append(ast.unparse(call))
                    tests["outputs"].append(repr(ast.literal_eval(value)))
                case _:
                    raise ValueError
    except ValueError:  # some assert has another form
        stubs = [f"{n} = stub({entry or n!r})" for n in sorted(names)]
        return {"replay": "\n".join([reference, *stubs, source, "check(candidate)" * bool(entry)])}
    return tests


def _passes(server: ForkServer, program: str, tests: dict, fn_name: str | None) -> bool:
    known, same = [], same_value
    while "replay" in tests:
        ended, out = server.run(_REPLAY.format(known=", ".join(known), source=tests["replay"]))
        question = out.decode().rstrip("\n").rpartition("\n")[2]
        if not ended or question == "passed":
            return ended and known != []  # a test that asks nothing is none
        known.append(repr(_decode(server.run(program, calls=[question])[1])))  # what is no plain data is no Python either
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"tests need as many outputs as inputs, and one at least: {len(inputs)} inputs, {len(outputs)} outputs")
    if "setup" in tests:
        program, outputs, same = f"{program}\n{tests['setup']}", [*map(ast.literal_eval, outputs)], operator.eq
    elif fn_name is None:
        for pair in zip(inputs, outputs):
            given, want = ("\n".join(t) if isinstance(t, list) else t for t in pair)
            ended, out = server.run(program, given, expected=len(want := want.encode("utf-8", "surrogatepass")))
            if not ended or not same_tokens(out, want):
                return False
        return True
    else:
        # APPS wraps the value of most problems, [9] for 9: of 460 rows with a function that we looked at, 455 have one-item lists alone and
        # mean the item; in the other 5 some output is no such list, and all stand for themselves. So [9] is wrong for 9.
        inputs = [[fn_name, i] for i in inputs]
        outputs = [o[0] for o in outputs] if all(isinstance(o, list) and len(o) == 1 for o in outputs) else outputs
    while inputs:  # all calls in one process while all goes well; the first failure again in a fresh one, where it is final
        ended, out = server.run(program, calls=inputs, expected=len(repr(outputs)))
        pairs = [*zip(map(_decode, out.split(b"\n")[:-1]), outputs)]
        right = next((k for k, (value, want) in enumerate(pairs) if not same(value, want)), len(pairs))
        inputs, outputs = inputs[right:], outputs[right:]
        if right == 0 or not (inputs or ended):
            return False
    return True


def run_unit_tests(program: str, tests: dict, fn_name: str | None = None, unsafe: bool = False) -> bool:
    """1[the program passes every test], run in sandbox.py's fork server; no reward for half of them

    `tests`: {"inputs": [...], "outputs": [...]} as in APPS (stdin texts, or argument lists of `fn_name`), or what assert_tests
    returns; `fn_name` and `unsafe` may stand in them. Raises SandboxError where isolation falls short, unless `unsafe`.

    >>> run_unit_tests("def square(x): return x + x", {"inputs": [[2], [3]], "outputs": [[4], [9]]}, "square")
    False
    """
    unsafe = unsafe or tests.get("unsafe", False)
    for _ in range(2):  # once more where the fork server was killed from outside
        try:
            server = _servers[unsafe].pop()
        except IndexError:
            server = ForkServer(unsafe)
        verdict = _passes(server, program, tests, fn_name or tests.get("fn_name"))
        if server.alive:
            _servers[unsafe].append(server)
            break
    return verdict


_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)


def extract_program(text: str) -> str | None:
    r"""The program of a response: its last fenced code block, else all of it, without a stray fence.

    >>> extract_program("Here:\n```python\nprint(1)\n```\nIt prints."), extract_program("print(1)"), extract_program("")
    ('print(1)', 'print(1)', None)
    """
    blocks = [block for block in _BLOCK.findall(text) if block.strip()]
    return (blocks or [re.sub(r"(?m)^[ \t]*```.*", "", text)])[-1].strip("\n") or None


def passes(program: str, gold: str) -> bool:
    """1[y^ passes all unit tests of x]; gold is their JSON: those of APPS, or {"asserts": arguments of assert_tests}   [Eq. 1, Sec. 2.1]"""
    tests = json.loads(gold)
    return run_unit_tests(program, {**tests, **assert_tests(**tests["asserts"])} if "asserts" in tests else tests)


def grade_programs(programs: Sequence[str], tests: Sequence[dict], fn_names: Sequence[str | None] | None = None,
                   workers: int | None = None, unsafe: bool = False) -> list[bool]:
    """run_unit_tests for many programs, tests and fn_names one a program, in `workers` fork servers."""
    with ThreadPoolExecutor(workers or WORKERS) as pool:
        return list(pool.map(run_unit_tests, programs, tests, fn_names or repeat(None), repeat(unsafe)))
