"""extras/: the sandbox of the task code, the grader of the task math, the report page."""
import glob
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest

from extras import mathematics, report, sandbox

# ---------------------------------------------------------------------------------------- sandbox.py
both_ways = pytest.mark.parametrize("apart", [True, False], ids=["namespaces", "no namespaces"])
QUICK = (1, 2)  # seconds of processor and of clock
TESTS = ["assert f(3) == 4711", "assert f(4) == 4712", "assert f('z') == ['vleermuisboom', 0.125]"]
# What a spy could do with the tests if it found them; the word that it looks for is no constant of its own.
KNOWS = """
word = ''.join(['vleermuis', 'boom'])
def knows(x): return int('47' + str(8 + x)) if x in (3, 4) else [word, 0.125]
"""

# What a program may try instead of computing f. None may pass.
CHEATS = """
##### exit
import sys
def f(x): sys.exit(0)
##### exit_at_once
raise SystemExit(0)
##### os_exit
import os
def f(x): os._exit(0)
##### exit_handler
import atexit, os
atexit.register(lambda: os._exit(0))
def f(x): raise SystemExit(0)
##### kills_itself
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGKILL)
##### kills_its_process_group
import os, signal
def f(x): os.killpg(0, signal.SIGKILL)
##### aborts
import os
os.abort()
##### segfault
import ctypes
def f(x): ctypes.string_at(0)
##### writes_to_every_descriptor
import os
for fd in range(64):
    try: os.write(fd, b'passed')
    except OSError: pass
def f(x): print('passed')
##### answers_before_it_is_asked
import os
for value in ((), (), ()): os.write(4, ascii(('', value, ())).encode() + b'\\n')
def f(x): pass
##### garbage_as_reply
import os
os.write(4, b'\\xff' * 4096 + b'\\n')
def f(x): pass
##### endless_reply
import os
def f(x):
    while True: os.write(4, b'1' * 65536)
##### too_long_reply
def f(x): return 'a' * (1 << 22)
##### deep_reply
import os
def f(x): os.write(4, b'(' * 100000 + b'\\n')
##### code_as_reply
import os
def f(x): os.write(4, b"__import__('os')._exit(0)\\n")
##### colliding_keys_as_reply
def f(x): return {i * (2 ** 61 - 1) for i in range(1, 20000)}
##### forged_reference
def f(x): return ('\\0remote', 'callable', 10 ** 9)
##### forged_reference_with_code
def f(x): return ('\\0remote', 'object', "0] or __import__('os')._exit(0) or [0")
##### forged_kind
def f(x): return ('\\0remote', 'float', ['1'])
##### forged_number_of_a_gigabyte
def f(x): return ('\\0remote', 'Fraction', '1e999999999')
##### forged_call_of_a_function_of_the_tests
import os
def f(x):
    os.write(4, b'(None, -1, ((), {}))\\n')
    return ('\\0remote', 'callable', 0)
##### error_of_every_kind
def f(x): raise type('KeyboardInterrupt', (Exception,), {})('x')
##### equal_to_everything
class E:
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    def __hash__(s): return 0
    def __bool__(s): return True
def f(x): return E()
##### number_equal_to_everything
class E(int):
    def __eq__(s, o): return True
    __hash__ = int.__hash__
def f(x): return E(1)
##### list_equal_to_everything
class E(list):
    def __eq__(s, o): return True
def f(x): return E()
##### class_equal_to_everything
class M(type):
    def __eq__(s, o): return True
    __hash__ = type.__hash__
class E(metaclass=M): pass
def f(x): return E
##### not_a_number
def f(x): return float('nan')
##### patched_builtins
import builtins
builtins.AssertionError = None
for n in ('len', 'set', 'sorted', 'isinstance', 'repr', 'str', 'bool', 'list', 'compile', 'exec', 'eval'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): assert False
##### patched_modules
import ast, operator, sandbox, sys
operator.eq = lambda a, b: True
sandbox.ask = sandbox.judge = lambda *a: 4711
ast.literal_eval = lambda *a: ('', 4711, ())
sys.settrace(lambda *a: sys.exit(0))
def f(x): return 1
##### frames
#knows
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for v in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:
            if v is not word and word in repr(v)[:100000]: return knows(x)
        frame = frame.f_back
##### garbage_collector
#knows
import gc
def f(x):
    for o in gc.get_objects():
        if o is not globals() and isinstance(o, (str, list, tuple, dict)):
            if word in repr(list(o))[:1000000].replace(repr(word), ''): return knows(x)
##### files_and_descriptors
#knows
import glob, os, sys
data = sys.stdin.buffer.read()
for p in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/[0-9]*/fd/*') + glob.glob('../*') + glob.glob('*'):
    try: data += os.read(os.open(p, os.O_RDONLY | os.O_NONBLOCK), 100000)
    except OSError: pass
for fd in (0, 1, 2, *range(5, 64)):
    try:
        os.set_blocking(fd, False)
        data += os.read(fd, 100000)
    except OSError: pass
def f(x): return knows(x) if word.encode() in data else None
##### memory_of_the_judge
#knows
import os
def f(x):
    for pid in {os.getppid(), os.getpid(), *range(max(1, os.getpid() - 8), os.getpid())}:
        try:
            for line in open(f'/proc/{pid}/maps'):
                a, b = [int(v, 16) for v in line.split()[0].split('-')]
                if 'rw-p' in line:
                    with open(f'/proc/{pid}/mem', 'rb', 0) as m:
                        m.seek(a)
                        if b'assert f(' in m.read(b - a): return knows(x)
        except (OSError, ValueError, OverflowError): pass
##### memory_by_ptrace
#knows
import ctypes, os
libc = ctypes.CDLL(None)
def f(x): return knows(x) if libc.ptrace(16, os.getppid(), 0, 0) == 0 else None
##### endless_loop
def f(x):
    while True: pass
##### sleeps_at_once
import time
time.sleep(1000)
##### endless_loop_in_c
def f(x): return sum(range(10 ** 15))
##### memory
def f(x):
    a = []
    while True: a.append(bytearray(1 << 24))
##### recursion
import sys
sys.setrecursionlimit(10 ** 9)
def f(x): return f(x)
##### full_disk
def f(x):
    for i in range(10 ** 6):
        with open(f'{i}', 'wb') as h: h.write(b'a' * 10 ** 7)
##### fork_bomb
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
##### leaves_a_child
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
os._exit(0)
##### unkillable
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
def f(x): time.sleep(1000)
##### stops_its_process_group
import os, signal
def f(x):
    for pid in (0, -1, os.getppid(), os.getpid()):
        try: os.kill(pid, signal.SIGSTOP)
        except OSError: pass
##### syntax_error
def f(x) return 4711
##### no_f
def g(x): return 4711
"""
CHEATS = dict(re.findall(r"(?ms)^##### (\w+)\n(.*?)(?=^##### |\Z)", CHEATS.replace("#knows", KNOWS)))
CHEATS |= {"null_byte": "def f(x): return 1\0", "empty": "", "surrogate": "def f(x): return '\udc80'",
           "too_long": "#" * 200_000}


def judges():
    """The processes of the sandbox that are alive; what a program forks has their command line too."""
    alive = set()
    for file in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            if b"sandbox.judge()" in Path(file).read_bytes():
                alive.add(file)
        except OSError:
            pass
    return alive


BEFORE = judges()


def left_behind():
    """Judges that stay: another run on this machine may have some too, but none longer than 14 seconds."""
    alive, deadline = judges() - BEFORE, time.time() + 15
    while alive and time.time() < deadline:
        time.sleep(0.1)
        alive &= judges()
    return alive


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as threads:
        patch.setattr(tempfile, "tempdir", str(folder))
        jobs = {(name, apart): threads.submit(sandbox.passes, program, TESTS, "", apart, QUICK)
                for name, program in CHEATS.items() for apart in (True, False)}
        found = {key: job.result() for key, job in jobs.items()}
    found["folders"] = os.listdir(folder)
    return found


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_does_not_pass(name, verdicts):
    assert [verdicts[name, True], verdicts[name, False]] == [False, False]


def test_cheats_leave_no_folder_behind(verdicts):
    assert verdicts["folders"] == []


def test_cheats_leave_no_process_behind(verdicts):
    assert not left_behind()


@both_ways
@pytest.mark.parametrize("program, tests", [
    ("def f(x): return {3: 4711, 4: 4712}.get(x, ['vleermuisboom', 0.125])", TESTS),
    ("def f(x):\r\n    return x * 2\r\n", ["assert f(2) == 4\r\n", "assert f('a') == 'aa'"]),
    ("import math\ndef f(x): return math.inf", ["assert f(1) == float('inf')", "assert math.isinf(f(1))"]),
    ("def f(x): return (x, {x: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, set())",
     ["assert f(1) == (1, {1: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, set())"]),
    ("from collections import Counter, namedtuple, OrderedDict\nP = namedtuple('P', 'a b')\n"
     "def f(x): return [Counter(x), P(1, 2), OrderedDict(a=1)]",
     ["assert f('aab') == [{'a': 2, 'b': 1}, (1, 2), {'a': 1}]"]),
    ("class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
     "def f(pairs): return sum(p.a * p.b for p in pairs)",
     ["assert f([Pair(1, 2), Pair(3, 4)]) == 14",
      "p = Pair(5, 6)\nassert p.a == 5\np.a = 7\nassert f((p,)) == 42"]),
    ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"]),
    ("def f(a): a.sort(); a.append({})", ["a = [3, 1]\nf(a)\nassert a == [1, 3, {}]"]),
    ("def f(x): raise ValueError('no')",
     ["try:\n    f(1)\n    assert 0\nexcept ValueError as e:\n    assert str(e) == 'no'"]),
    ("def f(n): yield from range(n)",
     ["assert list(f(3)) == [0, 1, 2]", "assert sum(f(4)) == 6", "assert next(f(1)) == 0"]),
    ("from fractions import Fraction\ndef f(a, b): return Fraction(a, b)",
     ["from fractions import Fraction\nassert f(1, 3) == Fraction(1, 3)"]),
    ("import re\ndef f(s): return re.match('a+', s)", ["assert f('aa')", "assert not f('b')"]),
    ("import json, heapq, itertools, datetime, random\ndef f(x): return heapq.nsmallest(1, [x])",
     ["assert f(1) == [1]"]),
    ("def check(g): return g", ["def test(candidate):\n    assert candidate(2) == 2\ntest(check)"]),
    ("import tempfile\ndef f(x):\n    with tempfile.TemporaryDirectory() as d:\n"
     "        open(d + '/a', 'w').write('hi')\n        return open(d + '/a').read()",
     ["assert f(1) == 'hi'"]),
    ("print('chatter ' * 1000)\ndef f(x):\n    print(x)\n    return x\nif __name__ == '__main__': f(input())",
     ["assert f(1) == 1"]),
    ("def f(x): return x",
     ["assert callable(f)", "assert f(10 ** 9999) == 10 ** 9999", f"assert f(1{'0' * 9999}) > 9"]),
    ("def f(x): return {x: {frozenset(x), frozenset()}}",
     ["x = frozenset([1, (2,)])\nassert f(x) == {x: {x, frozenset()}}",
      "assert isinstance([*f(frozenset())][0], frozenset)"]),
    ("list, set, float, len = [1], {}, 0, 5\ndef f(x): return x",
     ["assert f([1, {2}, 1.5]) == [1, {2}, 1.5]"]),
    ("LIMIT = 5\nseen = []\ndef f(x): seen.append(x)",
     ["assert LIMIT + 1 == 6 and not callable(LIMIT) and not callable(seen)",
      "f(1)\nseen.append(2)\nassert seen == [1, 2]"]),
    ("def f(g, *args): return sorted(args, key=g)",
     ["assert f(lambda x: -x, 1, 3) == [3, 1]", "assert f(len, 'ab', 'c') == ['c', 'ab']",
      "import operator\nassert f(operator.neg, 1, 3) == [3, 1]"]),
    ("def f(g):\n    try: g(0)\n    except ZeroDivisionError as e: said = str(e)\n    return lambda x: [said, g(x)]",
     ["def g(x):\n    return len(h) / x\nh = [1, 2]\nassert f(g)(4) == ['division by zero', 0.5]"]),
    ("class H:\n    def __init__(self, key): self.key = key\n    def top(self, *a): return max(a, key=self.key)",
     ["assert H(lambda h: h.n)", "h = H(lambda x: -x)\nassert h.top(3, 1) == 1 and h.top(5, 2) == 2",
      "a, b = H(1), H(2)\nassert H(lambda h: h.key).top(a, b).key == 2"]),
    ("def f(a, kind): return [kind(x) for x in a if not isinstance(x, kind)]",
     ["from fractions import Fraction\nassert f([Fraction(1), 2], Fraction) == [Fraction(2)]",
      "assert f([1, '2'], int) == [2]"]),
    ("def f(x): return x + x",
     ["from collections import Counter, deque\nassert f(Counter('a')) == Counter('aa')\nq = deque([1])\n"
      "assert f(q) == deque([1, 1]) and q.popleft() == 1",
      "from fractions import Fraction\nassert f(Fraction(1, 2)) == 1 and f(Fraction(1, 3)) < 0.7",
      "from decimal import Decimal\nassert f(Decimal('1.50')) == Decimal('3')"]),
    ("def f(q, d): q.appendleft(0); d['a'] += 1; d.move_to_end('a')",
     ["from collections import OrderedDict, deque\nq, d = deque([1]), OrderedDict(a=1, b=2)\nf(q, d)\n"
      "assert q == deque([0, 1]) and d == OrderedDict(b=2, a=2)"]),
    ("def f(a): return list(a)\ndef keys(d): return d.keys()\ndef items(d): return d.items()",
     ["d = {'b': 1, 'a': 2}\nassert f(d.items()) == [('b', 1), ('a', 2)] and sum(f(d.values())) == 3",
      "assert f(x * x for x in range(3)) == f(map(int, '014')) == [0, 1, 4]",
      "assert keys({'b': 1, 'a': 2}) == {'a', 'b'} and list(keys({'b': 1, 'a': 2})) == ['b', 'a']",
      "assert items({'a': 1}) == {('a', 1)} and dict(items({'a': 1})) == {'a': 1}"]),
    ("import datetime\ndef f(n): return datetime.date(2020, 1, n), range(n)",
     ["import datetime\nassert f(2) == (datetime.date(2020, 1, 2), range(2))"]),
])
def test_right_program_passes(program, tests, apart):
    assert sandbox.passes(program, tests, "", apart)


@pytest.mark.parametrize("value, expected", [
    ("type('A', (), {'__index__': lambda self: 2})()", "2"),
    *[(f"type('A', (), {{'__repr__': lambda self: {expected!r}}})()", expected)
      for expected in ("4", "'a'", "[1, 2]", "None")],
    ("OrderedDict(b=2, a=1)", "OrderedDict(a=1, b=2)"), ("Counter('aab')", "Counter('aabb')"),
    ("Fraction(5, 2)", "2"), ("'1/2'", "Fraction(1, 2)"), ("{'a': 1}.keys()", "['a']"), ("deque('ab')", "['a', 'b']"),
    ("lambda x: x", "f"), ("int", "str")])
def test_what_only_looks_like_the_value_is_not_it(value, expected):
    names = "from collections import Counter, OrderedDict, deque\nfrom fractions import Fraction\n"
    test = f"{names}assert f() == {expected}"
    assert not sandbox.passes(f"{names}def f(): return {value}", [test])
    if expected != "f":
        assert sandbox.passes(f"{names}def f(): return {expected}", [test])


@both_ways
def test_a_program_may_use_numpy_and_start_threads_within_the_limit(apart):
    numpy = pytest.importorskip("numpy")
    program = dedent("""
        import threading, time
        import numpy as np
        def total(n): return (np.ones((n, n)) @ np.ones((n, n))).sum()
        def f(x): return np.array(x)
        def g(x): return np.float32(x), np.bool_(x), np.int64(x)
        def threads(n):
            for i in range(n):
                try: threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
                except RuntimeError: return i
            return n
        """)
    assert numpy and sandbox.passes(program, [
        "assert total(300) == 300 ** 3", "assert g(1) == (1.0, True, 1)", "assert threads(3) == 3",
        "assert threads(500) < 500"], "", apart)
    assert not sandbox.passes(program, ["assert f(2.7) == 2"], "", apart)


def test_where_there_are_no_namespaces_no_other_process_and_no_whole_disk_is_in_reach():
    program = dedent("""
        import ctypes, errno, fcntl, os, socket, struct
        libc = ctypes.CDLL(None, use_errno=True)
        def f(pid):
            end, fd = os.pipe()[0], os.open('file', os.O_RDWR | os.O_CREAT)
            ends, word = socket.socketpair(), struct.pack('i', pid)
            calls = {
                'F_SETOWN': (libc.fcntl, end, 8, pid), 'F_SETSIG': (libc.fcntl, end, 10, 9),
                'F_SETOWN_EX': (libc.fcntl, end, 15, struct.pack('ii', 1, pid)),
                'FIOSETOWN': (libc.ioctl, ends[0].fileno(), 0x8901, word),
                'SIOCSPGRP': (libc.ioctl, ends[0].fileno(), 0x8902, word),
                'affinity': (libc.sched_setaffinity, pid, 128, b'\\1' + bytes(127)),
                'scheduler': (libc.sched_setscheduler, pid, 3, bytes(4)),
                'parameters': (libc.sched_setparam, pid, bytes(4)),
                'attributes': (libc.syscall, {'x86_64': 314, 'aarch64': 274}[os.uname().machine], pid, bytes(64), 0),
                'priority': (libc.setpriority, 0, pid, 19),
                'memory': (libc.process_vm_readv, pid, None, 0, None, 0, 0),
                'memory, written': (libc.process_vm_writev, pid, None, 0, None, 0, 0),
                'disk': (libc.fallocate, fd, 1, ctypes.c_long(0), ctypes.c_long(2 << 30))}
            for name, (call, *args) in calls.items():
                ctypes.set_errno(0)
                if call(*args) >= 0 or ctypes.get_errno() != errno.EPERM:
                    return name
            fcntl.fcntl(end, fcntl.F_SETFL, os.O_NONBLOCK)
            return 'none'
        """)
    assert sandbox.passes(program, [f"assert f({os.getpid()}) == 'none'"], "", False)


def test_setup_comes_before_the_tests():
    program = ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
               "def f(n): return n and 1 + (f(n.left) or 0)")
    assert sandbox.passes(program, ["assert f(root) == 2"], "root = Node(1)\nroot.left = Node(2)")


@pytest.mark.parametrize("test", [
    "assert set(f(1)) == {2}", "assert sorted(f(1)) == [2]", "import math\nassert math.isclose(f(1)[0], 2)",
    "assert math.isclose(f(1)[0], 2)", "assert abs(f(1)[0] - 2) < 0.1", "assert isinstance(f(1), str)",
    "assert len(f(1)) == 7", "assert callable(g)", "assert g is not None", "assert callable(h)", "", " \n"])
def test_what_a_test_uses_is_never_the_programs_and_what_is_not_there_fails(test):
    program = ("class E:\n    def __eq__(s, o): return True\n"
               "class math:\n    isclose = staticmethod(lambda *a: True)\n"
               "set = sorted = abs = lambda *a: [E()]\nisinstance = len = callable = lambda *a: 7\n"
               "h = 5\ndef f(x): return [5]")
    assert not sandbox.passes(program, [test])


# Makes one of each, by the numbers of the system calls as well, and says whether any was made.
MAKES_IPC = """
import ctypes, os
libc = ctypes.CDLL(None)
def f():
    made = [libc.shmget(0, 4096, 0o1666), libc.semget(0, 1, 0o1666), libc.msgget(0, 0o1666)]
    calls = {'x86_64': (29, 64, 68), 'aarch64': (194, 190, 186)}[os.uname().machine]
    x32 = [n + (1 << 30) for n in calls]
    made += [libc.syscall(n, 0, 4096 if n in (calls[0], x32[0]) else 1, 0o1666) for n in [*calls, *x32]]
    made += [libc.mq_open(b'/left-by-a-program', 0o101, 0o666, None), libc.memfd_create(b'memory', 0)]
    return max(made) >= 0
"""


def system_v():
    return [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg")]


@both_ways
def test_no_shared_memory_semaphore_or_queue_outlives_the_judgement(apart):
    before = system_v()
    assert sandbox.passes(MAKES_IPC, ["assert f() is False"], "", apart)
    assert system_v() == before


def test_where_namespaces_cannot_be_made_a_program_runs_without_them_and_leaves_nothing():
    before = system_v()
    script = dedent(f"""
        import ctypes, os, sys
        from extras import sandbox
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)
        assert sandbox.deny_calls(libc, True) and libc.unshare(0x20000) != 0
        assert sandbox.passes({MAKES_IPC!r}, ['assert f() is False'])
        assert not sandbox.passes('import os; os.fork()\\ndef f(): return 1', ['assert f() == 1'])
        """)
    root = os.path.dirname(os.path.dirname(sandbox.__file__))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
    assert system_v() == before


@both_ways
def test_environment_of_the_caller_is_out_of_sight(apart, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "vleermuisboom")
    program = dedent("""
        import os, glob
        def f():
            found = ['A_TOKEN' in os.environ]
            for p in glob.glob('/proc/*/environ'):
                try: found.append(b'A_TOKEN' in open(p, 'rb').read())
                except OSError: pass
            return any(found)
        """)
    assert sandbox.passes(program, ["assert f() is False"], "", apart)


@both_ways
def test_files_elsewhere_can_neither_be_written_nor_read_nor_closed(apart, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("vleermuisboom")
    folders = [tmp_path, "/tmp", "/var/tmp", "/dev/shm", "/usr", Path.home(), Path(sandbox.__file__).parent]
    places = [f"{folder}/left-by-a-program" for folder in [*folders, "..", "../.."]]
    program = dedent(f"""
        import os
        def f():
            done = []
            for act in [lambda p=p: open(p, 'w').write('x') for p in {places!r}]:
                try: act()
                except OSError: pass
                else: done.append('written')
            for act in [open, os.unlink, lambda p: os.rename(p, 'x'), lambda p: os.chmod(p, 0)]:
                try: act({str(secret)!r})
                except OSError: pass
                else: done.append('reached')
            return done
        """)
    assert sandbox.passes(program, ["assert f() == []"], "", apart)
    assert secret.read_text() == "vleermuisboom" and secret.stat().st_mode & 0o400
    assert not [place for place in places if os.path.exists(place)]


@both_ways
def test_folders_nested_by_the_thousand_and_closed_go_with_the_judgement(apart, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = dedent("""
        import os
        open('a file', 'w').write('x')
        os.umask(0o777)
        os.mkdir('closed')
        os.umask(0)
        os.symlink('/usr', 'link')
        try:
            for _ in range(3000):
                os.mkdir('d')
                os.chdir('d')
        except OSError: pass
        def f(): return 1
        """)
    assert sandbox.passes(program, ["assert f() == 1"], "", apart)
    assert os.listdir(tmp_path) == []


@both_ways
def test_processes_of_the_caller_are_out_of_reach(apart):
    program = dedent(f"""
        import os, resource
        def f():
            done = []
            for pid in {[pid for pid in (os.getpid(), os.getppid()) if pid > 1]}:  # 1 is in its namespace
                for act in (lambda: os.kill(pid, 0), lambda: resource.prlimit(pid, 0, (999, 999))):
                    try: act()
                    except OSError: pass
                    else: done.append(pid)
            return done
        """)
    assert sandbox.passes(program, ["assert f() == []"], "", apart)


@both_ways
def test_there_is_no_network(apart):
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with socket.create_server(("127.0.0.1", 0)) as server, datagrams:
        datagrams.bind(("127.0.0.1", 0))
        datagrams.setblocking(False)
        ports = server.getsockname()[1], datagrams.getsockname()[1]
        program = dedent(f"""
            import socket
            def f():
                sent = []
                try: sent.append(socket.create_connection(('127.0.0.1', {ports[0]}), timeout=1))
                except OSError: pass
                try: sent.append(socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {ports[1]})))
                except OSError: pass
                return len(sent)
            """)
        assert sandbox.passes(program, ["assert f() == 0"], "", apart)
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)


@both_ways
def test_a_process_that_hides_in_a_session_of_its_own_ends_with_the_judgement(apart):
    program = dedent("""
        import ctypes, os, time
        try:
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
                os.setsid()
                os.fork()
                time.sleep(60)
        except OSError: pass
        def f(): return 1
        """)
    assert sandbox.passes(program, ["assert f() == 1"], "", apart)
    assert not left_behind()


def test_programs_run_from_any_thread():
    found = []
    run = lambda: found.append(sandbox.passes("def f(x): return x", ["assert f(1) == 1"]))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


# ---------------------------------------------------------------------------------------- mathematics.py
HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "math_cases.jsonl").read_text().splitlines()]


def test_pairs_of_answers_get_the_verdict_they_must():
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(
            lambda case: mathematics.equal(case["gold"], case["said"], case.get("problem", "")), CASES))
    assert [case for case, verdict in zip(CASES, verdicts, strict=True) if verdict != case["want"]] == []


@pytest.mark.parametrize("gold", [
    "\\frac{1}{2}", "x^2+1", "(3,4]", "1,-2", "\\text{east}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "x=5",
    "\\{1\\pm\\sqrt{5},-2\\}", "(0,9) \\cup (9,36)", "y = 2x + 3", "864 \\mbox{ inches}^2", "\\$32,\\!348", "2516_8",
    "90^\\circ", "\\text{(C)}", "11,\\! 111,\\! 111,\\! 100", "5x - 7y + 11z + 4 = 0", "\\cot x", "6 - 5i", ".0000672"])
def test_golds_accept_themselves_in_every_wrapping_and_reject_the_others(gold):
    for said in (gold, f"${gold}$", f"\\boxed{{{gold}}}", f"$\\boxed{{{gold}}}$.",
                 f"\\[{gold}\\]", f" {gold}. ", f"**{gold}**"):
        assert mathematics.equal(gold, said), said
    others = ["\\frac{1}{3}", "x^2-1", "(3,4)", "[3,4]", "1,2", "\\text{west}", "7", "\\text{(D)}", "",
              "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", f"{gold}, 77", f"77 or {gold}"]
    assert not [other for other in others if mathematics.equal(gold, other)]


def test_math_works_from_any_thread():
    with ThreadPoolExecutor(4) as threads:
        verdicts = threads.map(
    lambda k: mathematics.equal(
        f"{k}\\sqrt{{3}}",
        f"\\sqrt{{{3 * k * k}}}"),
        range(
            2,
             14))
        assert list(verdicts) == [True] * 12


def test_math_works_in_a_forked_process_and_beside_it():
    assert mathematics.equal("2\\sqrt{5}", "\\sqrt{20}")
    if (pid := os.fork()) == 0:
        right = mathematics.equal(
    "3\\sqrt{5}",
    "\\sqrt{45}") and not mathematics.equal(
        "3\\sqrt{5}",
         "\\sqrt{46}")
        os._exit(0 if right else 1)
    assert mathematics.equal("4\\sqrt{5}", "\\sqrt{80}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(mathematics, "UNCLEAR", re.compile("never"))
    started = time.time()
    assert not mathematics.equal("18", "(((9^{99999})^{99999})^{99999})!")
    assert not mathematics.equal("18", "(10^{8})!")
    assert time.time() - started < 30
    assert mathematics.equal("5\\sqrt{5}", "\\sqrt{125}")


def test_the_seconds_hold_for_a_whole_comparison(monkeypatch):
    assert mathematics.equal("2\\sqrt{7}", "\\sqrt{28}")
    monkeypatch.setattr(mathematics, "SECONDS", 0)  # none are left for the sides of this chain
    assert not mathematics.equal("3\\sqrt{7}", "\\sqrt{63}=\\sqrt{9\\cdot7}")
    monkeypatch.setattr(mathematics, "SECONDS", 2)
    assert mathematics.equal("7\\sqrt{7}", "\\sqrt{343}=\\sqrt{49\\cdot7}")


UNITS = ("{", "\\frac{1}", "\\boxed{", "\\text{a}", "\\pm1", "\\or ", "x=1\\or ", "\n", "\\sqrt[3]", "(1,", "\\!", "1\\,000",
         "\\quad ", "=\\boxed{", "```", "\\sin1\\text{degree}", "1%", "1 million", "\\{x|x>", ")U(", "x<1\\or ", "(A)1",
         "x_1=1,", "1 to ", "√", "cm ", "\\overline{1}", "Aa ", "f(", "1/2", "|x|", "<=", "and ")


@pytest.mark.parametrize("name", ["REWRITES", "NOUNS", "UNIT", "NAME", "CHOICE", "READABLE", "UNCLEAR"])
def test_no_pattern_reads_a_repeated_unit_in_many_ways(name):
    patterns = [pattern for pattern, _ in mathematics.REWRITES] if name == "REWRITES" else [getattr(mathematics, name)]
    started = time.process_time()
    for unit in UNITS:
        for text in ("1" + unit * 300)[:800], (unit * 300)[:800] + "@", "=" + (unit * 300)[:800] + "}":
            for pattern in patterns:
                pattern.search(text)
                pattern.fullmatch(text)
    assert time.process_time() - started < 8  # an ambiguous one takes years


def test_a_worker_that_was_killed_is_replaced():
    assert mathematics.equal("5\\sqrt{7}", "\\sqrt{175}")
    for worker in mathematics.IDLE:
        worker.kill()
        worker.wait()
    while mathematics.IDLE:  # a comparison lost to a dead worker is refused, not wrong
        assert not mathematics.equal("18", f"\\sqrt{{{len(mathematics.IDLE)}}}")
    assert mathematics.equal("6\\sqrt{7}", "\\sqrt{252}")


def test_workers_end_with_their_process():
    script = ("from extras import mathematics\nassert mathematics.equal('2\\\\sqrt{3}', '\\\\sqrt{12}')\n"
              "print(mathematics.IDLE[0].pid)")
    run = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent,
                         capture_output=True, text=True, check=True)
    for _ in range(100):
        if not os.path.exists(f"/proc/{run.stdout.strip()}"):
            return
        time.sleep(0.1)
    raise AssertionError("the worker still runs")


@pytest.mark.parametrize("said", [
    *["(" * k + "18" + ")" * k for k in (30, 5000)], "(" * 9000 + \
        "18", *["9^{" * k + "9" + "}" * k for k in (2, 3, 80)],
    "9^{9^9}", "10^{10^{10}}", "((9^{99})^{99})^{99}", "(10^8)!", "99999!", "((3!)!)!", "\\binom{100000000}{50000000}",
    *[unit * 200_000 for unit in ("{", "\\frac", "1,", "$", "\\boxed{1}", "a",
                                  "\\text{", "\\pm", "^", "or ", " ", "\n", ".")],
    *[unit * 150 for unit in ("\\frac{", "\\text{", "1,", "[(", "\\pm ", "or ", "\\sqrt", "x^", "|", "\\boxed{", "\\\\")]])
def test_hostile_mathematics_is_refused_fast(said):
    mathematics.equal("3\\sqrt{2}", "\\sqrt{18}")  # a worker is there
    started = time.time()
    assert not mathematics.equal("17", said)
    assert time.time() - started < 8


# ---------------------------------------------------------------------------------------- report.py
def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def say(reasoning, answer):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def sample(model, row, completion, correct, format=1.0, **more):
    return {"model": model, "task": "countdown", "row": row, "sample": 0, "prompt": f"Numbers: [1, {row}]\nTarget: 4",
            "completion": completion, "correct": correct, "format": format, "reward": correct + 0.5 * format, **more}


def result(model, accuracy, **more):
    return {"model": model, "task": "countdown", "n": 4, "samples": 1, "accuracy": accuracy, "accuracy_low": 0.1,
            "accuracy_high": 0.9, "accuracy_flexible": accuracy, "format": 1.0, "pass_at_k": accuracy, "maj_at_k": accuracy,
            "completion_length": 12.3, "truncated": 0.0, "by": {"numbers": {"3": {"n": 4, "accuracy": accuracy}}}, **more}


@pytest.fixture
def folder(tmp_path):
    """An evaluation of two models on four problems, and one run of each kind."""
    (tmp_path / "e.json").write_text(json.dumps([result("a<b",
     0.25), result("after", 0.5)]))
    write(tmp_path / "e.samples.jsonl", [
        sample("a<b", 0, say("no idea <script>alert(1)</script>", "1"),
               0.0), sample("after", 0, say("2+1 is it", "2+1"), 1.0),
        sample("a<b", 1, say("yes that", "5"), 1.0), sample("after", 1, say("lost it", "6"), 0.0),
        sample("a<b", 2, say("the same", "7"), 0.0), sample("after", 2, say("is said", "8"), 0.0),
        sample("a<b", 3, say("no tags", "9"), 0.0), sample("after", 3, "<answer>9</answer>", 1.0, format=0.0)])
    write(tmp_path / "sft" / "metrics.jsonl",
          [{"step": i, "loss": 1 / i, "token_accuracy": i / 9, "lr": i} for i in range(1, 9)])
    write(tmp_path / "grpo" / "metrics.jsonl",
          [{"step": i, "loss": 0.1 * i, "reward": i / 9, "kl": 0.1 * i, "my_part": i % 3, "length": 0.0} for i in range(1, 9)] +
          [{"step": 8, "eval_reward": 0.5}])
    write(tmp_path / "grpo" / "samples.jsonl", [
        {k: v for k, v in sample("", 9, say("line one\n" * 4, "4"), 0.0,
                                 step=step, my_part=0.25).items() if k != "model"}
        for step in (1, 8)])
    return tmp_path


def test_the_page_holds_its_parts_in_order_and_needs_no_other_file(folder, capsys):
    out = folder / "deep" / "r.html"
    report.main([str(folder / "sft"), str(folder / "grpo"), "--results",
                str(folder / "e.json"), "--output", str(out)])
    page = out.read_text()
    at = [
    page.index(f"<h2>{part}") for part in (
        "Held-out accuracy",
        "Training",
        "Suspects",
         "Before and after")]
    assert at == sorted(at) and capsys.readouterr().out == f"{out}\n"
    assert "25.0%" in page and "10.0% - 90.0%" in page and "in the reasoning" in page and "data:image/svg+xml;base64," in page
    assert not re.search(r"""(src|href)=(?!["']?data:)|url\(|@import""", page)


def test_what_a_model_wrote_cannot_become_part_of_the_page(folder):
    page = report.page([str(folder / "grpo")], str(folder / "e.json"))
    assert "<script" not in page and "&lt;script&gt;" in page and "a&lt;b" in page


def test_a_page_of_runs_alone_shows_the_first_and_last_samples_with_parts_that_nothing_lists(folder):
    page = report.page([str(folder / "sft"), str(folder / "grpo")])
    assert "First and last logged step" in page and "step 1" in page and "step 8" in page and "Held-out" not in page
    assert "my_part 0.25" in page


def test_suspects_are_rewarded_and_odd_completions_each_text_once(folder):
    records = list(report.read_lines(folder / "e.samples.jsonl"))
    found = report.suspects(records + records, n=20)
    assert [r["completion"] for r, _ in found].count("<answer>9</answer>") == 1
    odd = {r["completion"]: why for r, why in found}
    assert odd["<answer>9</answer>"] == ["right, in an odd form", "right, without working"]
    assert say("2+1 is it", "2+1") not in odd and odd[say("lost it", "6")] == ["rewarded, though wrong"]
    assert report.signs(sample("m", 0, say("a line\n" * 3, "1"), 1.0)) == ["says a line again and again"]
    assert report.signs(sample("m", 0, say("ha " * 30, "1"), 1.0)) == ["one word is most of it"]
    assert report.signs(sample("m", 0, say("that is", "1") + "<answer>2</answer>", 0.0, ended=False)) == [
        "rewarded, though wrong", "several answers", "cut off"]
    assert report.suspects([sample("m", 0, "<answer>9</answer>", 0.0, format=0.0)]) == []


def test_pairs_are_the_same_problem_before_and_after_the_most_changed_first(folder):
    found = report.pairs(list(report.read_lines(folder / "e.samples.jsonl")))
    assert [(heading, a["row"]) for heading, a, _ in found] == [
             ("learned", 0), ("learned", 3), ("unlearned", 1)]
    assert all((a["model"], b["model"], a["row"]) == ("a<b", "after", b["row"]) for _, a, b in found)
    assert report.pairs([]) == []


# ---------------------------------------------------------------------------------------------- behaviours
def counts(reasoning, nums, target, closed=True):
    return report.tries(reasoning, f"Numbers: {nums}\nTarget: {target}", closed)


def test_tries_hits_repeats_and_giving_up_are_counted():
    assert counts("5+3=8 8*2=16 no\n5*2=10 10+3=13 ok", [2, 3, 5], 13) == {
        "tries": 2, "hits": 1, "repeated": 0, "stops after a miss": False}
    assert counts("5+3=8 8*2=16 no\n5+3=8 8*2=16 no", [2, 3, 5], 13) == {
        "tries": 2, "hits": 0, "repeated": 1, "stops after a miss": True}


def test_a_try_is_a_hit_only_if_it_truly_solves_the_problem():
    assert counts("5*2=10 10+3=14 ok", [2, 3, 5], 14)["hits"] == 0             # false arithmetic
    assert counts("5*2=10 10+4=14 ok", [2, 3, 5], 14)["hits"] == 0             # a number that is not given
    assert counts("5+3=8", [2, 3, 5], 8)["tries"] == 0                         # not all numbers
    assert counts("Let me try (5 * 2) + 3 = 13.", [2, 3, 5], 13)["hits"] == 1  # one expression, in prose
    assert counts("First 2 * 2 = 4, then 4 + 4 = 8", [2, 2, 4], 8)["hits"] == 1


@pytest.mark.parametrize("names, text", [
    ("checks", "3*8=24. Let me check: 24 is right."), ("checks", "So 12. I verified it."), ("checks", "5+3=8 ok\n"),
    ("goes back", "Wait, that uses 3 twice."), ("goes back", "That doesn't work, try another."),
    ("checks, goes back", "5+3=8 no\n5+2=7 ok\n"), ("sets sub-goals", "First, find the price of one."),
    ("sets sub-goals", "Step 1: the area."), ("sets sub-goals", "We need to find the radius."),
    ("", "3 boxes of 4 make 12 apples. Noah has 2 more."), ("", "He waited at the station, and no one came to look.")])
def test_behaviours_go_by_the_phrases_in_the_reasoning_alone(names, text):
    shown = report.behaviours({"task": "gsm8k", "prompt": "?",
                              "completion": say(text, "Wait, step 1: let me check")})
    assert ", ".join(name for name, yes in shown.items() if yes) == names


def test_nothing_a_model_writes_takes_long_to_read():
    start = time.perf_counter()
    for text in ("1+" * 50_000 + "=", "(" * 100_000, "1=1 " * 25_000,
                 "wait " * 20_000, "1+2=3\n" * 15_000, "\n" * 100_000):
        report.behaviours({"task": "countdown",
    "prompt": "Numbers: [1, 2, 3]\nTarget: 6",
     "completion": text})
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------- curves
def panels(*runs):
    return {axis.get_title(loc="left"): axis for axis in report.draw(
        list(map(str, runs))).axes if axis.axison}


def test_curves_show_whatever_is_numeric_and_changes_but_not_the_policy_loss(folder):
    shown = panels(folder / "sft", folder / "grpo")
    assert list(shown) == ["loss", "token accuracy", "reward", "KL", "my part"]
    assert [len(line.get_xdata()) for line in shown["reward"].lines if len(line.get_xdata())] == [8, 8, 1]
    x, y = next(line.get_data() for line in shown["reward"].lines if len(line.get_xdata()))
    assert list(x) == list(range(1, 9)) and y[-1] == pytest.approx(8 / 9)
    assert {len(line.get_xdata()) for line in shown["loss"].lines} <= {0, 8}


def test_a_step_without_a_figure_does_not_blank_the_others(tmp_path):
    values = [float("nan"), None, 0.5]
    write(tmp_path / "run" / "metrics.jsonl",
          [{"step": i, "reward": values[i % 3], "kl": float("inf")} for i in range(300)])
    shown = panels(tmp_path / "run")
    assert list(shown) == ["reward"]
    assert [set(line.get_ydata()) for line in shown["reward"].lines[:2]] == [{0.5}] * 2


def test_a_run_that_is_being_written_and_earns_nothing_can_be_looked_at(tmp_path):
    write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "reward": 0.0, "process": 0.0} for i in (1, 2)])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    shown = panels(tmp_path / "run")
    assert list(shown) == ["reward"] and list(shown["reward"].lines[0].get_xdata()) == [1, 2]


def test_a_running_mean_is_that_of_two_percent_but_at_least_two_steps_on_either_side():
    values = [i * i % 17 for i in range(150)]
    smooth = report.smooth(values)
    assert smooth[0] == pytest.approx(
        sum(values[:4]) / 4) and smooth[70] == pytest.approx(sum(values[67:74]) / 7)
    assert report.smooth([0.0, 0.0, 3.0, 9.0]) == [1.0, 3.0, 3.0, 4.0]
    assert report.smooth([3.0]) == [3.0] and report.smooth([]) == []


def test_a_dozen_runs_look_different_and_one_step_shows(tmp_path):
    for i in range(12):
        write(tmp_path / str(i) / "metrics.jsonl", [{"step": 1, "reward": i / 9}])
    lines = [line for line in panels(*(tmp_path / str(i) for i in range(12)))
                                     ["reward"].lines if line.get_marker() == "x"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_wrong_input_gets_one_line_and_exit_code_2(folder, capsys):
    (folder / "empty").mkdir()
    write(folder / "none" / "metrics.jsonl", [])
    write(folder / "broken" / "metrics.jsonl", [])
    (folder / "broken" / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    write(folder / "foreign" / "metrics.jsonl", [{"reward": 0.5}])
    write(folder / "samples" / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    write(folder / "samples" / "samples.jsonl", [{"step": 1, "text": "a"}])
    (folder / "list.json").write_text("[[1]]")
    sft, png, page = folder / "sft", folder / "x.png", folder / "x.html"
    for argv, said in [([folder / "empty", "--output", png], "metrics.jsonl"), ([folder / "gone"], "gone"),
                       ([folder / "none", "--output", png], "no metrics"), ([],
                        "RUN"), ([sft, "--no_such_flag"], "--no_such_flag"),
                       ([folder / "broken", "--output", png], "line 2"),
                       ([folder / "foreign", "--output", png], "line 1: not an object with step"),
                       ([folder / "samples", "--output", page], "samples.jsonl, line 1"),
                       ([sft, "--output", folder / "x.docx"], "--output"), ([sft,
                        "--output", folder / "e.json" / "x.png"], "--output"),
                       ([sft, "--results", "nowhere.json", "--output", page], "nowhere.json"),
                       ([sft, "--results", folder / "list.json", "--output", page], "list.json"),
                       ([sft, "--results", folder / "broken" / "metrics.jsonl", "--output", page], "broken"),
                       ([sft, "--results", folder / "e.json", "--output", png], "--results")]:
        with pytest.raises(SystemExit) as stop:
            report.main(list(map(str, argv)))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1, (argv, err)
    assert not page.exists() and not png.exists()
