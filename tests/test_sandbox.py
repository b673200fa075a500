"""The sandbox and its unit tests, on programs.py's corpus and on real rows of ../shared/data.

Each test runs what training runs: run_unit_tests and grade_programs, which start sandbox.py afresh.
"""

import gc
import gzip
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import programs
import pytest

import sandbox
from sandbox import SandboxError, assert_tests, extract_program, grade_programs, run_unit_tests

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
ONE = {"inputs": ["1"], "outputs": ["1"]}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="model-written programs run on Linux only"
)


def rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def processes(parent):
    """Ids of the processes below `parent`, at any depth."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [parent]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def descriptors():
    gc.collect()  # servers that an expected error still held
    return len(os.listdir("/proc/self/fd"))


def servers():
    """The idle fork servers of this process."""
    return sum(sandbox.SERVERS.idle.values(), [])


def stop_servers():
    for server in servers():
        server.control.close()
        server.process.wait()
    sandbox.SERVERS = sandbox.Servers()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(verdicts by list name, what was left behind) of the whole corpus, graded side by side."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "secret").write_text("s")
    stop_servers()
    lists = {"good": programs.GOOD, "wrong": programs.WRONG, "hostile": programs.HOSTILE}
    with programs.listener() as server:
        before = descriptors(), set(processes(os.getpid()))
        decided = programs.decide(sum(lists.values(), []), str(folder), server.getsockname()[1])
        below = {pid for s in servers() for pid in processes(s.process.pid)}
        stop_servers()
        left = {
            "descriptors": descriptors() - before[0],
            "processes": set(processes(os.getpid())) - before[1],
            "children": below,
            "files": {p.name: (p.read_text(), p.stat().st_mode & 0o777) for p in folder.iterdir()},
        }
        try:
            left["connection"] = server.accept()
        except BlockingIOError:
            left["connection"] = None
    verdicts = iter([v for _, v in decided])
    return {name: [(c.name, next(verdicts)) for c in cases] for name, cases in lists.items()}, left


@pytest.mark.parametrize("kind", ["good", "wrong", "hostile"])
def test_corpus(corpus, kind):
    wrongly_decided = [name for name, verdict in corpus[0][kind] if verdict != (kind == "good")]
    assert not wrongly_decided
    assert len(corpus[0][kind]) >= {"good": 25, "wrong": 14, "hostile": 59}[kind]


def test_nothing_left_behind(corpus):
    left = corpus[1]
    assert left["files"] == {"secret": ("s", 0o644)}
    assert left["connection"] is None
    assert not left["processes"] and not left["children"]
    assert left["descriptors"] == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_corpus_as_unprivileged_user():
    root = pathlib.Path(sandbox.__file__).parent
    check = [
        "-B",
        "-c",
        f"import sys; assert sys.version_info >= (3, 11); open({str(root / 'sandbox.py')!r})",
    ]
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if (
                subprocess.run(
                    [python, *check], user=65534, group=65534, extra_groups=[], cwd="/"
                ).returncode
                == 0
            ):
                break
        except OSError:
            continue
    else:
        pytest.skip("user 65534 can't read sandbox.py or any Python 3.11")
    command = [sys.executable, "-B", str(HERE / "programs.py"), str(root), "65534", python]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    count = len(programs.GOOD + programs.WRONG + programs.HOSTILE)
    assert (done.stdout, done.returncode) == (f"decided {count} as user 65534\n", 0), done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "open('{dir}/secret').read()",
        "open('{dir}/new', 'w')",
        "import os\nos.remove('{dir}/secret')",
        "import socket\nsocket.create_server(('127.0.0.1', 0))",
        "import os\nif os.fork() == 0: os._exit(0)",
    ],
)
def test_acts_are_possible_outside(tmp_path, code):
    """What the corpus expects to be denied is allowed to a plain process here."""
    (tmp_path / "secret").write_text("s")
    code = code.format(dir=tmp_path)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    (tmp_path / "secret").write_text("s")
    assert not run_unit_tests(f"{code}\nprint(1)", ONE)


# -- fail closed


def weaker(tmp_path, monkeypatch, old, new):
    """Makes the grader start a sandbox.py in which `old` is `new`."""
    source = pathlib.Path(sandbox.__file__).with_name("sandbox.py").read_text()
    assert old in source
    (tmp_path / "sandbox.py").write_text(source.replace(old, new))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    stop_servers()


@pytest.mark.parametrize(
    "old, new, named",
    [
        ('libseccomp.so.2")', 'libnothere.so.2")', "apt-get install libseccomp2"),
        ("libc.syscall(444, None", "libc.syscall(100000, None", "Linux 5.13 or later"),
        (
            "lambda: must(libc.syscall(446, ruleset, 0, 0, 0))",
            "lambda: None",
            "open to them: open;",
        ),
        (
            "lambda code=code: must(libc.prctl(22, 2, header, 0, 0))",
            "lambda: None",
            "open to them: fork, socket;",
        ),
        ("status = exit_status(job)", "pass", "the probe failed"),
        ("    control = socket.socket(", "    sys.exit(", "did not start"),
    ],
)
def test_fails_closed(tmp_path, monkeypatch, old, new, named):
    weaker(tmp_path, monkeypatch, old, new)
    with pytest.raises(SandboxError, match=named) as error:
        run_unit_tests("print(1)", ONE)
    assert "\n" not in str(error.value) and "--unsafe-code" in str(error.value)


def test_unsafe_accepts_less(tmp_path, monkeypatch):
    weaker(tmp_path, monkeypatch, 'libseccomp.so.2")', 'libnothere.so.2")')
    program = "import os\nif os.fork() == 0:\n    os._exit(0)\nprint(input())"
    assert run_unit_tests(program, ONE, unsafe=True)
    with pytest.raises(SandboxError):
        run_unit_tests(program, ONE)
    stop_servers()


def test_other_systems_are_refused(monkeypatch):
    stop_servers()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux only"):
        run_unit_tests("print(1)", ONE, unsafe=True)


# -- the fork server


def test_expected_outputs_stay_here(monkeypatch):
    sent = []
    run = sandbox.ForkServer.run
    monkeypatch.setattr(
        sandbox.ForkServer,
        "run",
        lambda self, *a, **k: sent.append(repr((a, k))) or run(self, *a, **k),
    )
    asserts = assert_tests("assert f(1) == 'needle1'\nassert set(f(2)) == set('needle2')")
    literal = assert_tests("assert f(1) == 'needle3'")
    assert run_unit_tests("def f(x): return 'needle' + str(x)", asserts)
    assert run_unit_tests("def f(x): return 'needle3'[:7 * x]", literal)
    assert run_unit_tests("print('needle' + input())", {"inputs": ["4"], "outputs": ["needle4"]})
    assert run_unit_tests(
        "def f(x): return ['needle', x]", {"inputs": [[5]], "outputs": [[["needle", 5]]]}, "f"
    )
    programs_sent = [
        s for s in sent if "def stub" not in s and "os.fork" not in s
    ]  # the data set's own test code runs alone
    assert not any(f"needle{i}" in s for i in (1, 2, 4) for s in programs_sent)


def test_server_killed_from_outside():
    assert run_unit_tests("print(input())", ONE)
    for server in servers():
        server.process.kill()
    assert run_unit_tests("print(input())", ONE)


def test_all_end_with_the_trainer():
    """kill -9 of the grading process takes its fork server and the program that runs with it."""
    code = (
        "import sys\nsys.path[:0] = %r\nimport sandbox\n"
        "program = 'import time\\nprint(1)\\ntime.sleep(60)'\n"
        "sandbox.run_unit_tests(program, {'inputs': [''], 'outputs': ['1']})" % [sys.path]
    )
    trainer = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while len(below := processes(trainer.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(below) >= 2, "no server and program came up"
    time.sleep(0.2)
    below = processes(trainer.pid)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 5
    while alive := [p for p in below if os.path.exists(f"/proc/{p}")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def test_idling_is_measured_by_the_clock(monkeypatch):
    """Where each look at the child takes long, a sleeping one ends as soon."""
    monkeypatch.setattr(sandbox, "IDLE_S", 1)
    monkeypatch.setattr(sandbox, "states", lambda pid: time.sleep(0.3) or "SS")
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    control, theirs = socket.socketpair()
    with control, theirs:
        start = time.monotonic()
        assert sandbox.supervise(theirs, sleeper.pid) == -1
        assert time.monotonic() - start < 3
    sleeper.returncode = -9  # supervise has waited for it


def test_memory_and_descriptors_stay_flat():
    grade_programs(["print(input())"] * 50, [ONE] * 50, workers=2)
    before, peak = descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = grade_programs(["print(input())", "print(0)"] * 200, [ONE] * 400, workers=2)
    assert verdicts == [True, False] * 200
    assert descriptors() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096  # KiB
    assert len(servers()) <= 10


@pytest.mark.parametrize("tests", [{"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}])
def test_no_tests_are_no_pass(tests):
    with pytest.raises(ValueError, match="outputs"):
        run_unit_tests("print(1)", tests)


@pytest.mark.parametrize("source", ["", "assert True", "x = 1", "def f(x): assert f(x) == 1"])
def test_asserts_that_ask_nothing_are_no_pass(source):
    try:
        assert not run_unit_tests("def f(x): return 1", assert_tests(source))
    except ValueError as error:
        assert "one at least" in str(error)


def test_no_way_to_the_server_from_a_process_with_many_files():
    """A socket to the server with a high number is still out of the program's reach."""
    stop_servers()
    held = [open(os.devnull) for _ in range(400)]
    program = (
        "import os\nfor fd in range(4, 1024):\n"
        "    try: os.write(fd, b'0')\n    except OSError: continue\n    break\n"
        "else: os._exit(1)\nprint(1)"
    )
    assert not run_unit_tests(program, ONE)
    assert [run_unit_tests("print(input())", ONE), len(held)] == [True, 400]
    stop_servers()


def test_each_program_meets_its_own_tests():
    tests = [{"inputs": [[i]], "outputs": [[i + 1]]} for i in range(6)]
    source = ["def f(x): return x + 1", "def g(x): return x + 1"] * 3
    assert grade_programs(source, tests, ["f"] * 6) == [True, False] * 3
    assert grade_programs(source, tests, ["f", "g"] * 3, workers=1) == [True] * 6
    assert grade_programs([], [], []) == []


# -- asserts


@pytest.mark.parametrize(
    "source, program, verdict",
    [
        ("assert f(2) == (1, 2)", "def f(n): return (1, n)", True),
        ("assert f(2) == (1, 2)", "def f(n): return [1, n]", False),
        ("assert f(2) == {1: {2 + 1j}}", "def f(n): return {1: {n + 1j}}", True),
        ("assert set(f(2)) == {1, 2}", "def f(n): return [2, 1, n]", True),
        ("assert abs(f(3) - 1.5) < 1e-6", "def f(n): return n / 2", True),
        ("assert abs(f(3) - 1.5) < 1e-6", "def f(n): return n", False),
        (
            "assert abs(f(3) - 1.5) < 1e-6",
            "import builtins\nbuiltins.abs = lambda x: 0\ndef f(n): return n",
            False,
        ),
        ("assert f(1) is True\nassert not f(0)", "def f(n): return bool(n)", True),
        (
            "assert f(2) is True\nassert not f(3)\nassert f(2) is True",
            "n = 0\ndef f(x):\n    global n\n    n += x\n    return n % 2 == 0",
            False,
        ),
        (
            "assert 0 < f(1) < 2\nassert 0 < f(2) < 2",
            "import random\ndef f(x): return random.random() + .5",
            True,
        ),
        (
            "assert f(1) < 2\nassert f(2) < 3",
            "import atexit, os\natexit.register(os._exit, 1)\ndef f(x): return x",
            False,
        ),
        ("for i in range(3):\n    assert f(i) == i * i", "def f(n): return n * n", True),
        (
            "assert f(1) < 2",
            "class A:\n    def __lt__(self, o): return True\ndef f(n): return A()",
            False,
        ),
        ("assert f(1) < 2", "import sys\ndef f(n):\n    print('passed')\n    sys.exit(0)", False),
        ("assert f(1) < 2", "import os\nos.write(3, b'\"\\'\"\\n')\ndef f(n): os._exit(0)", False),
    ],
)
def test_asserts(source, program, verdict):
    assert run_unit_tests(program, assert_tests(source)) == verdict


def check(body, reference, **names):
    """HumanEval's form: a module with check(candidate), and the right program."""
    source = "def check(candidate):\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    return assert_tests(source, entry="f", reference=reference)


NEXT = "def f(x): return x + 1"
MANY = "for i in range(60): assert candidate(i) - 1 == i"
FEEDS = "x = 0\nfor i in range(1, 60):\n    x = candidate(x)\n    assert abs(x) == i"
EITHER = "x = candidate(0)\nassert x in (1, 2) and candidate(x) == x + 1"


@pytest.mark.parametrize(
    "body, program, verdict, runs",
    [
        (MANY, NEXT, True, 3),
        (f"print('f(1)')\n{MANY}", NEXT, True, 3),
        (MANY, "def f(x): return x + 1 + (x == 59)", False, 3),
        (MANY, "def f(x): return 1 / (x - 59) and x + 1", False, 2),
        (FEEDS, NEXT, True, 3),
        (FEEDS, "def f(x): return x + 1 - (x == 40)", False, 3),
        (EITHER, NEXT, True, 3),
        (EITHER, "def f(x): return x + 1 + (x == 0)", True, 6),
        (
            EITHER,
            "n = 0\ndef f(x):\n    global n\n    n += 1\n    return x + 1 + (n == 1)",
            True,
            6,
        ),
        ("assert candidate(2)\nassert not candidate(3)", "def f(x): return x == 2", True, 3),
        ("assert candidate(random.SystemRandom().random()) > 1", NEXT, False, 3),
    ],
)
def test_a_reference_says_what_will_be_asked(monkeypatch, body, program, verdict, runs):
    """The runs of children do not grow with the number of questions."""
    jobs = []
    run = sandbox.ForkServer.run
    assert run_unit_tests("print(1)", {"inputs": [""], "outputs": ["1"]})  # a server is up
    monkeypatch.setattr(
        sandbox.ForkServer, "run", lambda self, *a, **k: jobs.append(a) or run(self, *a, **k)
    )
    assert run_unit_tests(program, check(body, NEXT)) == verdict
    assert len(jobs) == runs


@pytest.mark.parametrize(
    "state", ["len(sys._getframe(1).f_back.f_locals['job']['calls'])", "time.time_ns()"]
)
def test_answers_are_those_of_one_process(state):
    """Where another question follows, no earlier one is answered twice."""
    program = f"import sys, time\ndef f(x): return x + 2 + ({state} if x == 0 else 0)"
    assert not run_unit_tests(program, check("candidate(candidate(0))", NEXT))


def test_mbpp_references_pass():
    data = rows("mbpp/mbpp.jsonl")
    tests = [assert_tests("\n".join(r["test_list"]), setup=r["test_setup_code"]) for r in data]
    assert [r["task_id"] for r, t in zip(data, tests) if "replay" in t] == [596, 912]
    verdicts = grade_programs([r["code"] for r in data], tests)
    assert {r["task_id"] for r, v in zip(data, verdicts) if not v} <= {
        123,
        367,
        927,
    }  # 123 takes 3 to 4 s of CPU, and 4 are allowed


def test_humaneval_references_pass():
    data = rows("humaneval/HumanEval.jsonl.gz")
    source = [r["prompt"] + r["canonical_solution"] for r in data]
    tests = [assert_tests(r["test"], r["entry_point"], reference=s) for r, s in zip(data, source)]
    verdicts = grade_programs(source, tests)
    assert [r["task_id"] for r, v in zip(data, verdicts) if not v] == []
    assert not any(grade_programs([r["prompt"] + "    return None" for r in data], tests))


def test_apps_outputs_of_functions_are_wrapped_or_not_as_a_whole():
    """What unwrapping rests on: every Codewars row but one wraps all its outputs."""
    data = [
        (r, json.loads(r["input_output"]))
        for name in ("train", "test")
        for r in rows(f"apps/{name}.jsonl")
    ]
    functions = [(r, io["outputs"]) for r, io in data if "fn_name" in io]
    whole = [
        r["problem_id"]
        for r, outputs in functions
        if not all(isinstance(o, list) and len(o) == 1 for o in outputs)
    ]
    assert (len(functions), sorted(whole)) == (460, [2303, 2404, 2467, 2747, 4077])


def test_apps_solutions_pass():
    data = [r for r in rows("apps/train.jsonl") if r["solutions"]]
    pairs = [
        (r["problem_id"], s, json.loads(r["input_output"]))
        for r in data
        for s in json.loads(r["solutions"])[:12]
    ]
    verdicts = grade_programs([s for _, s, _ in pairs], [t for _, _, t in pairs])
    failed = [i for (i, _, _), v in zip(pairs, verdicts) if not v]
    assert failed == [2287] * 3  # that problem accepts several answers
    shifted = [pairs[(k + 12) % len(pairs)][2] for k in range(len(pairs))]
    assert not any(grade_programs([s for i, s, t in pairs], shifted))


@pytest.mark.parametrize(
    "text, program",
    [
        ("print(1)", "print(1)"),
        ("", None),
        ("```\n```", None),
        ("Draft:\n```\nx\n```\nThen\n```python\nprint('``')\n```\nDone.", "print('``')"),
        ("```py\nprint(1)", "print(1)"),
        ("def f(x):\n  return x\n```", "def f(x):\n  return x"),
        ("print(1)\n```\n", "print(1)"),
        ("x = '```'", "x = '```'"),
    ],
)
def test_extract(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1.",
        ".1",
        "1e",
        "-",
        "1e+",
        "0x",
        "1_",
        "\t1",
        "1 ",
        "1\n",
        "```",
        "```\n",
        "` ",
        " \n",
        "\n```",
    ],
)
@pytest.mark.parametrize("end", ["x", "", ".", "e"])
def test_reading_outputs_and_responses_is_linear(unit, end):
    text = unit * (60_000 // len(unit)) + end
    start = time.process_time()
    assert not sandbox.same_tokens(text.encode(), b"1.5")
    assert sandbox.decode(text.encode()) != 1.5
    extract_program(text), extract_program("```\n" + text)
    assert time.process_time() - start < 1


def test_given_faults():
    """../shared/faults/programs: each decided as it says, in the time that it says."""
    cases = [
        json.loads(path.read_text())
        for path in sorted((DATA.parent / "faults" / "programs").glob("*.json"))
    ]
    if not cases:
        pytest.skip("no ../shared/faults/programs")
    for case in cases:
        outputs = [[t["output"]] if "fn_name" in case else t["output"] for t in case["tests"]]
        tests = {"inputs": [t["input"] for t in case["tests"]], "outputs": outputs}
        start = time.monotonic()
        assert run_unit_tests(case["code"], tests, case.get("fn_name")) == (
            case["expect"] == "pass"
        ), case["name"]
        assert time.monotonic() - start < case.get("max_seconds", 60), case["name"]
