"""A fork server that runs model-written Python programs under Landlock, seccomp and rlimits; rewards.py starts it:

    python -s -S -P sandbox.py FD [--unsafe]      FD: one end of a SOCK_SEQPACKET socketpair

It first sends `ready`, or what this machine lacks. Then each message carries two descriptors: a job {"program": source,
"stdin": text, "calls": [...] or null} as JSON, and a pipe for the answer. The server forks a child, which locks itself in and
runs the program, and replies with the exit status. No verdict is made and no expected output comes here; only a job's own
child reads it and writes its answer, so that no child finds another's in its memory.

A child can compute, import the standard library and start threads. It cannot open a file outside the standard library, write
to any, start a process, use a socket, signal or trace anyone, or change a file's mode. What this does NOT cover:
- Kernel bugs and CPU side channels: one kernel is shared. Hostile code at scale belongs in a virtual machine.
- `stat` (a program learns that a path exists and how large it is), the clock, the CPU's name, the user's id stay visible.
- Each child may use 1 GiB; thread floods (more than 64) are noticed every 50 ms; nothing limits memory bandwidth.
- Good programs that need numpy, asyncio, sqlite3, lzma, a file (even /dev/null) or a second process are judged wrong.
- Waiting for a CPU is not idling: on a crowded machine a program may hold its place for up to 60 s.
- With --unsafe, whatever this machine lacks is left out, and nobody probes what is then open.
"""
import atexit, builtins, contextlib, ctypes, errno, fcntl, gc, json, os, resource, select, signal, socket, struct  # noqa: E401
import sys, threading, time, types, typing  # noqa: E401
# Imported once here, so that no child pays for them.
import bisect, cmath, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq  # noqa: E401,F401
import itertools, math, operator, queue, random, re, statistics, string, textwrap, zlib  # noqa: E401,F401
from collections.abc import Callable
from os import _exit  # bound early: the program may replace os._exit in its own process

IDLE_S, WALL_S, THREADS = 12, 60, 64
STACK, THREAD_STACK = 256 << 20, 8 << 20  # a thread's, unless the program asks for more; else glibc would take RLIMIT_STACK
LIMITS = {resource.RLIMIT_CPU: 4, resource.RLIMIT_AS: 1 << 30, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 32,
          resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0}
KINDS = {list: iter, tuple: iter, set: iter, frozenset: iter, dict: dict.items, complex: lambda z: (z.real, z.imag)}
ALLOW, DENY, ABSENT = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

# Plain calls that touch only the caller's own memory, its open descriptors, its clocks, or a file's metadata.
FREE = """access alarm brk clock_getres clock_gettime clock_nanosleep close close_range dup dup2 dup3 exit exit_group faccessat
faccessat2 fstat fstatfs futex getcwd getdents64 getegid geteuid getgid getgroups getitimer getpgrp getpid getppid getrandom
getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid lseek lstat madvise mmap mprotect mremap munmap
nanosleep newfstatat pause poll ppoll pread64 pselect6 read readv restart_syscall rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigreturn rt_sigsuspend sched_getaffinity sched_yield select set_robust_list set_tid_address setitimer
sigaltstack stat statx sysinfo time times uname write writev""".split()
WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY
# (call, argument, mask, value): allowed only where argument & mask == value. Left open, fcntl(F_SETOWN) and the like send
# signals, prlimit64 changes other processes' limits. clone: with CLONE_THREAD, without new namespaces and CLONE_PTRACE.
LIMITED = [("open", 1, WRITES, 0), ("openat", 2, WRITES, 0), ("clone", 0, 0x7E032000, 0x10000), ("prlimit64", 0, -1, 0)]
LIMITED += [("fcntl", 1, -1, c) for c in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL)]
LIMITED += [("ioctl", 1, -1, c) for c in (0x5401, 0x5413, 0x5450, 0x5451)]  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes, libc.prctl.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 4, [ctypes.c_int] + [ctypes.c_void_p] * 4


def must(result: int) -> int:
    """The result of a C call, which reports failure as a negative number."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def make_landlock() -> Callable[[], int]:
    """A function that leaves its process reading the standard library, and no other file, connection or signal, for ever."""
    abi = must(libc.syscall(444, None, 0, 1, 0))
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1  # + REFER, TRUNCATE, IOCTL_DEV
    attr = struct.pack("QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]  # files; TCP; signals, abstract sockets
    ruleset = must(libc.syscall(444, attr, len(attr), 0, 0))
    library = struct.pack("=Qi", 4 | 8, os.open(os.path.dirname(os.__file__), os.O_PATH))  # READ_FILE | READ_DIR
    must(libc.syscall(445, ruleset, 1, library, 0))
    ruleset = fcntl.fcntl(ruleset, fcntl.F_DUPFD_CLOEXEC, 64)  # out of the way of a child's descriptors 0 to 3
    return lambda: must(libc.syscall(446, ruleset, 0, 0, 0))


def make_seccomp() -> Callable[[], int]:
    """A function that leaves its process the system calls above for ever; all others fail with EPERM."""
    must(libc.prctl(21, 0, 0, 0, 0))  # PR_GET_SECCOMP fails where the kernel was built without it
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(DENY))
    # clone3's flags lie in memory, out of the filter's sight: told that it is absent, glibc takes clone
    for action, name, *rest in [(ALLOW, n) for n in FREE] + [(ALLOW, *r) for r in LIMITED] + [(ABSENT, "clone3")]:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            test = struct.pack("IiQQ", rest[0], 7, rest[1] & (1 << 64) - 1, rest[2]) if rest else None  # 7: SCMP_CMP_MASKED_EQ
            must(lib.seccomp_rule_add_array(context, action, number, len(rest) // 3, test))
    return lambda: must(lib.seccomp_load(context))


def lock(restrictions: list[Callable]) -> None:
    """Give up everything this process will not need; any failure here ends it."""
    for what, most in LIMITS.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard),) * 2)
    must(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    must(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    for restrict in restrictions:
        restrict()
    os.closerange(4, 256)  # more than the server ever holds


def plain(v: object) -> object:
    """A value as JSON that keeps Python's types; anything but plain data becomes nothing's equal.

    >>> plain([1, (2, {"a": None})]), plain(print)
    ([1, {'tuple': [2, {'dict': [{'tuple': ['a', None]}]}]}], {'other': 'builtin_function_or_method'})
    """
    for kind, parts in KINDS.items():
        if isinstance(v, kind):
            return [plain(x) for x in parts(v)] if kind is list else {kind.__name__: [plain(x) for x in parts(v)]}
    return v if v is None or isinstance(v, (int, float, str)) else {"other": type(v).__name__}


def call(space: dict, item: str | list) -> object:
    """The value of an expression, or of [fn_name, arguments] on class Solution or the module's function."""
    if isinstance(item, str):
        return eval(item, space)
    owner = space.get("Solution")
    return (getattr(owner(), item[0]) if hasattr(owner, item[0]) else space[item[0]])(*item[1])


def run_program(job: dict) -> None:
    """Run the source as a real module, then its calls, one JSON line each on descriptor 3."""
    name = "__main__" if job["calls"] is None else "solution"  # a tested function's demo under __main__ stays silent
    module = sys.modules["__main__"] = sys.modules[name] = types.ModuleType(name)
    space, answer = vars(module), open(3, "w", closefd=False)
    space["__builtins__"] = builtins
    if job["calls"] is not None:  # LeetCode's starter code, kept in APPS, annotates with List unimported
        space.update((k, getattr(typing, k)) for k in typing.__all__)
    exec(compile(job["program"], "program.py", "exec", dont_inherit=True), space)
    for item in job["calls"] or ():
        print(json.dumps(plain(call(space, item))), file=answer, flush=True)


def exit_status(job: dict) -> int:
    """Run, then end as the interpreter would: join threads, atexit, flush, drop globals (which flushes their files)."""
    status = 0
    try:
        run_program(job)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        status = 1
    for step in (threading._shutdown, atexit._run_exitfuncs, lambda: sys.stdout.flush(),
                 lambda: vars(sys.modules["__main__"]).clear(), sys.__stdout__.flush):
        with contextlib.suppress(BaseException):
            step()
    return status & 0xFF


def child(fds: list[int], restrictions: list[Callable]) -> None:
    """Becomes the program; never returns."""
    status = 99
    try:
        os.setsid()
        must(libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG
        with open(fds[0], "rb") as f:
            job = json.load(f)
        null, given = os.open("/dev/null", os.O_RDWR), os.memfd_create("stdin")
        os.pwrite(given, job["stdin"].encode("utf-8", "surrogatepass"), 0)
        stdout, answer = (fds[1], null) if job["calls"] is None else (null, fds[1])
        for fd, source in enumerate((given, stdout, null, answer)):  # only `null` may be 3 itself, and 3 comes last
            os.dup2(source, fd)
        lock(restrictions)
        status = exit_status(job)
    finally:
        _exit(status)


def states(pid: int) -> str:
    """A letter for each thread of it: R runs or waits for a CPU, S sleeps, T is stopped, ...   [proc(5)]"""
    letters = ""
    with contextlib.suppress(OSError):  # a thread is gone, or all of it
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat") as f:
                letters += f.read().rpartition(")")[2].split()[0]
    return letters


def supervise(control: socket.socket, pid: int) -> int:
    """The child's wait status; -1 where it was killed: for time, for threads, or because the trainer is gone."""
    pidfd, start, idle = os.pidfd_open(pid), time.monotonic(), 0
    while not (ready := select.select([pidfd, control], [], [], 0.05)[0]):
        threads = states(pid)
        idle += "R" not in threads  # others' work should change no verdict; RLIMIT_CPU ends what runs
        if idle * 0.05 > IDLE_S or time.monotonic() - start > WALL_S or len(threads) > THREADS:
            break
    os.close(pidfd)
    for kill in (os.killpg, os.kill):  # its whole session: a child alone, unless unsafe
        with contextlib.suppress(ProcessLookupError):  # too early for its own group
            kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return status if pidfd in ready else -1


def serve(control: socket.socket, restrictions: list[Callable]) -> None:
    """One child for each message: its job and output descriptors come in it, its wait status goes back; ends when the trainer does."""
    while (fds := socket.recv_fds(control, 16, 2)[1]):
        pid = os.fork()
        if pid == 0:
            child(fds, restrictions)
        for fd in fds:
            os.close(fd)
        control.send(str(supervise(control, pid)).encode())


def main() -> None:
    """python sandbox.py FD [--unsafe]: says "ready" or what isolation lacks on the control socket FD, then serves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != (stack := STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)):  # the kernel lays out a process's stack at exec
        resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
        os.execv(sys.executable, sys.orig_argv)
    control = socket.socket(fileno=os.dup(int(sys.argv[1])))  # low, so that a child closes it
    os.close(int(sys.argv[1]))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # where memory runs out, a program goes first, not the trainer
    must(libc.prctl(4, 0, 0, 0, 0))  # PR_SET_DUMPABLE
    restrictions, missing = [], []
    for make, what in ((make_landlock, "Landlock, Linux 5.13 or later with `landlock` in the kernel's lsm= list"),
                       (make_seccomp, "seccomp, libseccomp.so.2 (apt-get install libseccomp2)")):
        try:
            restrictions.append(make())
        except OSError as e:
            missing.append(f"it needs {what}: {e}")
    control.send(b"ready" if "--unsafe" in sys.argv else "; ".join(missing).encode() or b"ready")
    threading.stack_size(THREAD_STACK)
    sys.set_int_max_str_digits(0)
    sys.argv, builtins.exit, builtins.quit = ["program.py"], sys.exit, sys.exit  # -S leaves the two out
    gc.freeze()
    with contextlib.suppress(ConnectionError):  # the trainer is gone, in the middle of a job
        serve(control, restrictions)


if __name__ == "__main__":
    main()
