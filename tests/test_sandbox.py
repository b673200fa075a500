"""The sandbox and its unit tests, on programs.py's corpus and on real rows of ../shared/data.

Each test runs what training runs: `passes`, which starts sandbox.py afresh.
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

import data
import sandbox
from sandbox import SandboxError, extract_program, passes

ROOT = pathlib.Path(sandbox.FILE).parent
SHARED = ROOT.parent / "shared"
ECHO = "print(input())"
ONE = {"inputs": ["1"], "outputs": ["1"]}
LISTS = {"good": programs.GOOD, "wrong": programs.WRONG, "hostile": programs.HOSTILE}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="model-written programs run on Linux only"
)


def verdict(program, tests=ONE, **more):
    return passes(program, json.dumps({**tests, **more}))


def asserts(source, **how):
    return {"asserts": {"source": source, **how}}


def rows(name):
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def processes(parent):
    """Ids of the processes below `parent`, at any depth."""
    children = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    below = [parent]
    for pid in below:
        below += children.get(pid, [])
    return below[1:]


def descriptors():
    gc.collect()  # servers that an expected error still held
    return len(os.listdir("/proc/self/fd"))


def servers():
    """The idle fork servers of this process."""
    return sum(sandbox.SERVERS.idle.values(), [])


@pytest.fixture
def no_servers():
    """The test starts its own, and leaves none behind."""
    stop_servers()
    yield
    stop_servers()


def stop_servers():
    for server in servers():
        server.control.close()
        server.process.wait()
    sandbox.SERVERS.idle.clear()


# -- the corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(verdicts by list name, what was left behind) of the whole corpus, graded side by side."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "secret").write_text("s")
    stop_servers()
    with programs.listener() as server:
        n_open, before = descriptors(), set(processes(os.getpid()))
        cases = sum(LISTS.values(), [])
        verdicts = iter(programs.decide(cases, str(folder), server.getsockname()[1]))
        left = {"children": [pid for s in servers() for pid in processes(s.process.pid)]}
        stop_servers()
        left["descriptors"] = descriptors() - n_open
        left["processes"] = set(processes(os.getpid())) - before
        left["files"] = [(p.name, p.read_text(), p.stat().st_mode) for p in folder.iterdir()]
        try:
            left["connection"] = server.accept()
        except BlockingIOError:
            left["connection"] = None
    return {name: dict(zip(cases, verdicts)) for name, cases in names().items()}, left


def names():
    return {name: [case.name for case in cases] for name, cases in LISTS.items()}


@pytest.mark.parametrize("kind, count", [("good", 40), ("wrong", 45), ("hostile", 110)])
def test_corpus(corpus, kind, count):
    verdicts = corpus[0][kind]
    assert [name for name, right in verdicts.items() if right != (kind == "good")] == []
    assert len(verdicts) == len(LISTS[kind]) >= count


def test_nothing_left_behind(corpus):
    assert corpus[1] == {
        "children": [],
        "descriptors": 0,
        "processes": set(),
        "files": [("secret", "s", 0o100644)],
        "connection": None,
    }


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_corpus_as_unprivileged_user():
    check = f"import sys; assert sys.version_info >= (3, 11); open({sandbox.FILE!r})"
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            subprocess.run([python, "-B", "-c", check], **nobody, check=True)
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("user 65534 can't read sandbox.py or any Python 3.11")
    command = [sys.executable, "-B", programs.__file__, "65534", python]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    count = sum(map(len, LISTS.values()))
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
    assert not verdict(f"{code}\nprint(1)")


def test_given_faults():
    """../shared/faults/programs: each decided as it says, in the time that it says."""
    paths = sorted((SHARED / "faults" / "programs").glob("*.json"))
    if not paths:
        pytest.skip("no ../shared/faults/programs")
    for case in map(json.loads, map(pathlib.Path.read_text, paths)):
        name = case.get("fn_name")
        outputs = [[test["output"]] if name else test["output"] for test in case["tests"]]
        tests = {"inputs": [test["input"] for test in case["tests"]], "outputs": outputs}
        start = time.monotonic()
        right = verdict(case["code"], tests, fn_name=name)
        assert right == (case["expect"] == "pass"), case["name"]
        assert time.monotonic() - start < case.get("max_seconds", 60), case["name"]


# -- fail closed


@pytest.fixture
def weaker(tmp_path, monkeypatch, no_servers):
    """Makes the grader start a sandbox.py in which `old` is `new`."""

    def change(old, new):
        source = pathlib.Path(sandbox.FILE).read_text()
        assert old in source
        (tmp_path / "sandbox.py").write_text(source.replace(old, new))
        monkeypatch.setattr(sandbox, "FILE", str(tmp_path / "sandbox.py"))

    return change


@pytest.mark.parametrize(
    "old, new, named",
    [
        ('libseccomp.so.2")', 'libnothere.so.2")', "apt-get install libseccomp2"),
        ("RULESET, None", "RULESET + 99999, None", "Linux 5.13 or later"),
        ("must(libc.syscall(LANDLOCK_RESTRICT_SELF", "(lambda *_: 0)((0", "open to them: open;"),
        ("must(libc.prctl(PR_SET_SECCOMP", "(lambda *_: 0)((0", "open to them: fork, socket;"),
        ("status = exit_status(job)", "pass", "the probe failed"),
        ("    control = socket.socket(", "    sys.exit(", "did not start"),
    ],
)
def test_fails_closed(weaker, old, new, named):
    weaker(old, new)
    with pytest.raises(SandboxError, match=named) as error:
        verdict("print(1)")
    assert "\n" not in str(error.value) and "--unsafe-code" in str(error.value)


def test_unsafe_accepts_less(weaker):
    weaker('libseccomp.so.2")', 'libnothere.so.2")')
    program = "import os\nif os.fork() == 0:\n    os._exit(0)\nprint(input())"
    assert verdict(program, unsafe=True)
    with pytest.raises(SandboxError):
        verdict(program)


def test_other_systems_are_refused(no_servers, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux only"):
        verdict("print(1)", unsafe=True)


# -- the fork server


@pytest.fixture
def jobs(monkeypatch):
    """The programs and calls that were sent to children."""
    assert verdict(ECHO)  # a server is up, and its probe is over
    sent = []
    run = sandbox.ForkServer.run

    def watched(self, *args, **named):
        sent.append((args, named))
        return run(self, *args, **named)

    monkeypatch.setattr(sandbox.ForkServer, "run", watched)
    return sent


def test_expected_outputs_stay_here(jobs):
    several = asserts("assert f(1) == 'needle1'\nassert set(f(2)) == set('needle2')")
    value = {"inputs": [[5]], "outputs": [[["needle", 5]]], "fn_name": "f"}
    assert verdict("def f(x): return 'needle' + str(x)", several)
    assert verdict("def f(x): return 'needle3'[:7 * x]", asserts("assert f(1) == 'needle3'"))
    assert verdict("print('needle' + input())", {"inputs": ["4"], "outputs": ["needle4"]})
    assert verdict("def f(x): return ['needle', x]", value)
    sent = [job for job in map(repr, jobs) if "def stub" not in job]  # a test's code runs alone
    assert len(sent) >= 4
    assert not any(f"needle{i}" in job for i in (1, 2, 4) for job in sent)


def test_server_killed_from_outside():
    assert verdict(ECHO)
    for server in servers():
        server.process.kill()
    assert verdict(ECHO)


def test_a_fork_has_servers_of_its_own():
    assert verdict(ECHO)
    pid = os.fork()
    if pid == 0:
        os._exit(len(servers()))
    assert os.waitpid(pid, 0)[1] == 0 and servers()


def test_all_end_with_the_trainer():
    """kill -9 of the grading process takes its fork server and the program that runs with it."""
    gold = json.dumps(ONE)
    code = f"import sandbox\nsandbox.passes('import time\\ntime.sleep(60)', {gold!r})"
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 20
    while len(processes(trainer.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    below = processes(trainer.pid)
    assert len(below) >= 2, "no server and program came up"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 5
    while alive := [pid for pid in below if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def test_idling_is_measured_by_the_clock(monkeypatch):
    """Where each look at the child takes long, a sleeping one ends as soon."""
    monkeypatch.setattr(sandbox, "IDLE_S", 1)
    monkeypatch.setattr(sandbox, "states", lambda pid: time.sleep(0.3) or b"SS")
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    control, theirs = socket.socketpair()
    with control, theirs:
        start = time.monotonic()
        assert sandbox.supervise(theirs, sleeper.pid) == -1
        assert time.monotonic() - start < 3
    sleeper.returncode = -9  # supervise has waited for it


def test_memory_and_descriptors_stay_flat():
    programs.verdicts_of([ECHO] * 50, [ONE] * 50)
    n_open, peak = descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert programs.verdicts_of([ECHO, "print(0)"] * 200, [ONE] * 400) == [True, False] * 200
    assert descriptors() == n_open
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096  # KiB
    assert len(servers()) <= 10


def test_no_way_to_the_server_from_a_process_with_many_files(no_servers):
    """A socket to the server with a high number is still out of the program's reach."""
    held = [open(os.devnull) for _ in range(400)]
    program = (
        "import os\nfor fd in range(4, 1024):\n"
        "    try: os.write(fd, b'0')\n    except OSError: continue\n    break\n"
        "else: os._exit(1)\nprint(1)"
    )
    assert not verdict(program)
    assert [verdict(ECHO), len(held)] == [True, 400]


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [[1]], "outputs": [], "fn_name": "f"},
        *map(asserts, ["", "assert True", "x = 1", "def f(x): assert f(x) == 1"]),
    ],
)
def test_no_tests_are_no_pass(tests):
    assert not verdict("def f(x): return 1\nprint(1)", tests)


# -- asserts


@pytest.mark.parametrize(
    "source, program, right",
    [
        ("assert f(2) == (1, 2)", "def f(n): return (1, n)", True),
        ("assert f(2) == (1, 2)", "def f(n): return [1, n]", False),
        ("assert f(2) == {1: {2 + 1j}}", "def f(n): return {1: {n + 1j}}", True),
        ("assert set(f(2)) == {1, 2}", "def f(n): return [2, 1, n]", True),
        ("assert abs(f(3) - 1.5) < 1e-6", "def f(n): return n / 2", True),
        ("assert abs(f(3) - 1.5) < 1e-6", "def f(n): return n", False),
        ("assert abs(f(3)) < 2", "import builtins\nbuiltins.abs = bool\ndef f(n): return n", False),
        ("assert f(1) is True\nassert not f(0)", "def f(n): return bool(n)", True),
        ("for i in range(3): assert f(i) == i * i", "def f(n): return n * n", True),
        (
            "assert f(2) and not f(3) and f(2)",
            "n = []\nf = lambda x: n.append(x) or not sum(n) % 2",
            False,
        ),
        ("assert 0 < f(1) and f(2)", "import random\ndef f(x): return random.random() + .5", True),
        (
            "assert f(1) < 2",
            "import atexit, os\natexit.register(os._exit, 1)\ndef f(x): return x",
            False,
        ),
        (
            "assert f(1) < 2",
            "class A:\n def __lt__(self, o): return True\ndef f(n): return A()",
            False,
        ),
        ("assert f(1) < 2", "import sys\ndef f(n):\n    print('passed')\n    sys.exit(0)", False),
        ("assert f(1) < 2", "import os\nos.write(3, b'\"\\'\"\\n')\ndef f(n): os._exit(0)", False),
    ],
)
def test_asserts(source, program, right):
    assert verdict(program, asserts(source)) == right


NEXT = "def f(x): return x + 1"
MANY = "for i in range(60): assert candidate(i) - 1 == i"
FEEDS = "x = 0\nfor i in range(1, 60):\n    x = candidate(x)\n    assert abs(x) == i"
EITHER = "x = candidate(0)\nassert x in (1, 2) and candidate(x) == x + 1"


def check(body):
    """HumanEval's form: a module with check(candidate), and the right program."""
    source = "def check(candidate):\n    " + body.replace("\n", "\n    ")
    return asserts(source, entry="f", reference=NEXT)


@pytest.mark.parametrize(
    "body, program, right, runs",
    [
        (MANY, NEXT, True, 3),
        (f"print('f(1)')\n{MANY}", NEXT, True, 3),
        (MANY, "def f(x): return x + 1 + (x == 59)", False, 3),
        (MANY, "def f(x): return 1 / (x - 59) and x + 1", False, 2),
        (FEEDS, NEXT, True, 3),
        (FEEDS, "def f(x): return x + 1 - (x == 40)", False, 3),
        (EITHER, NEXT, True, 3),
        (EITHER, "def f(x): return x + 1 + (x == 0)", True, 6),
        ("assert candidate(2)\nassert not candidate(3)", "def f(x): return x == 2", True, 3),
        ("assert candidate(random.SystemRandom().random()) > 1", NEXT, False, 3),
    ],
)
def test_a_reference_says_what_will_be_asked(jobs, body, program, right, runs):
    """The runs of children do not grow with the number of questions."""
    assert verdict(program, check(body)) == right
    assert len(jobs) == runs


@pytest.mark.parametrize(
    "state", ["len(sys._getframe(1).f_back.f_locals['job']['calls'])", "time.time_ns()"]
)
def test_answers_are_those_of_one_process(state):
    """Where another question follows, no earlier one is answered twice."""
    program = f"import sys, time\ndef f(x): return x + 2 + ({state} if x == 0 else 0)"
    assert not verdict(program, check("candidate(candidate(0))"))


# -- real rows


def code_rows(name):
    """(the row, its tests as training reads them) of each row."""
    return [(row, json.loads(data.code_row(name, row).gold)) for row in rows(name)]


def test_mbpp_references_pass(jobs):
    pairs = code_rows("mbpp/mbpp.jsonl")
    verdicts = programs.verdicts_of([row["code"] for row, _ in pairs], [t for _, t in pairs])
    failed = {row["task_id"] for (row, _), right in zip(pairs, verdicts) if not right}
    assert failed <= {123, 367, 927}  # 123 takes 3 to 4 s of CPU, and 4 are allowed
    assert sum("def stub" in repr(job) for job in jobs) == 8  # of rows 596 and 912


def test_humaneval_references_pass():
    pairs = code_rows("humaneval/HumanEval.jsonl.gz")
    tests = [t for _, t in pairs]
    source = [row["prompt"] + row["canonical_solution"] for row, _ in pairs]
    assert all(programs.verdicts_of(source, tests))
    assert not any(programs.verdicts_of([r["prompt"] + "    return" for r, _ in pairs], tests))


def test_apps_solutions_pass():
    pairs = []
    for row, tests in code_rows("apps/train.jsonl"):
        solutions = json.loads(row["solutions"] or "[]")[:12]
        pairs += [(row["problem_id"], solution, tests) for solution in solutions]
    ids, sources, tests = zip(*pairs)
    verdicts = programs.verdicts_of(sources, tests)
    failed = [i for i, right in zip(ids, verdicts) if not right]
    assert failed == [2287] * 3  # that problem accepts several answers
    assert not any(programs.verdicts_of(sources, tests[12:] + tests[:12]))


def test_apps_outputs_of_functions_are_wrapped_or_not_as_a_whole():
    """What unwrapping rests on: every Codewars row but five wraps all its outputs."""
    outputs = {}
    for row in rows("apps/train.jsonl") + rows("apps/test.jsonl"):
        tests = json.loads(row["input_output"])
        if "fn_name" in tests:
            outputs[row["problem_id"]] = tests["outputs"]
    lengths = {i: [isinstance(o, list) and len(o) for o in all_] for i, all_ in outputs.items()}
    whole = [i for i, of_row in lengths.items() if set(of_row) != {1}]
    assert (len(outputs), sorted(whole)) == (460, [2303, 2404, 2467, 2747, 4077])


# -- reading


@pytest.mark.parametrize(
    "text, program",
    [
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


UNITS = ["1", "1.", ".1", "1e", "-", "1e+", "0x", "1_", "\t1", "1 ", "1\n"]
FENCES = ["```", "```\n", "` ", " \n", "\n```"]


@pytest.mark.parametrize("unit", UNITS + FENCES)
@pytest.mark.parametrize("end", ["x", "", ".", "e"])
def test_reading_outputs_and_responses_is_linear(unit, end):
    text = unit * (60_000 // len(unit)) + end
    start = time.process_time()
    assert not sandbox.same_tokens(text.encode(), b"1.5")
    assert sandbox.decode(text.encode()) != 1.5
    extract_program(text), extract_program("```\n" + text)
    assert time.process_time() - start < 1
