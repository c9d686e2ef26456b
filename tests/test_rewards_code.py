"""The sandbox: right programs pass, every cheat fails, and nothing is left behind. Each with namespaces and without."""
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rewards
import sandbox

TESTS = ["assert f(3) == 4711", "assert f(4) == 4712", "assert f('z') == ['kiwi', 0.125]"]
QUICK = (1, 2)  # seconds of processor and of clock

# Stands for what a spy could do with the tests if it found them; the word that it looks for is not a constant of its own.
KNOWS = "word = ''.join(['ki', 'wi'])\ndef knows(x): return int('47' + str(8 + x)) if x in (3, 4) else [word, 0.125]\n"

# What a program may try instead of computing f. None may pass, whatever else it does.
CHEATS = {
    "exit": "import sys\ndef f(x): sys.exit(0)",
    "exit_at_once": "import sys\nsys.exit(0)",
    "system_exit_raised": "raise SystemExit(0)",
    "os_exit": "import os\ndef f(x): os._exit(0)",
    "os_exit_at_once": "import os\nos._exit(0)",
    "quit": "quit()",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): raise SystemExit(0)",
    "kills_itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "import os\nos.abort()",
    "segfault": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "prints": "print('passed'); print('True'); print(0)\ndef f(x): print('passed')",
    "writes_to_every_descriptor": "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\ndef f(x): pass",
    "answers_in_the_judges_place": "import os\nfor value in (4711, 4712, ['kiwi', 0.125]) if False else ((), (), ()):\n    data = ascii(('', value, ())).encode()\n    os.write(4, len(data).to_bytes(4, 'big') + data)\ndef f(x): pass",
    "garbage_on_the_pipe": "import os\nos.write(4, b'\\xff' * 4096)\ndef f(x): pass",
    "endless_message": "import os\nos.write(4, (1 << 31).to_bytes(4, 'big'))\ndef f(x):\n    while True: os.write(4, b'1' * 65536)",
    "too_long_reply": "def f(x): return 'a' * (1 << 22)",
    "deep_reply": "def f(x):\n    a = []\n    for _ in range(900): a = [a]\n    return a",
    "deep_text_as_reply": "import os\ndef f(x):\n    data = b'(' * 100000\n    os.write(4, len(data).to_bytes(4, 'big') + data)",
    "code_as_reply": "import os\ndef f(x):\n    data = b\"__import__('os')._exit(0)\"\n    os.write(4, len(data).to_bytes(4, 'big') + data)",
    "remote_number_forged": "def f(x): return ('\\0remote', 10 ** 9)",
    "remote_of_a_string": "def f(x): return ('\\0remote', \"0] or __import__('os')._exit(0) or [0\")",
    "equal_to_everything": "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    def __hash__(s): return 0\n    def __bool__(s): return True\ndef f(x): return E()",
    "int_equal_to_everything": "class E(int):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    "str_equal_to_everything": "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return E('a')",
    "list_equal_to_everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "float_nan": "def f(x): return float('nan')",
    "reflected_eq": "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\nclass E(metaclass=M): pass\ndef f(x): return E",
    "repr_of_everything": "class E:\n    def __repr__(s): return '4711'\ndef f(x): return E()",
    "patched_assert": "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = None\ndef f(x): assert False",
    "patched_builtins": "import builtins\nfor n in ('len', 'set', 'sorted', 'abs', 'isinstance', 'repr', 'str', 'bool', 'list'):\n    setattr(builtins, n, lambda *a: True)\ndef f(x): return 1",
    "patched_compile": "import builtins\nbuiltins.compile = builtins.exec = builtins.eval = lambda *a, **k: None\ndef f(x): return 1",
    "patched_operator": "import operator\noperator.eq = lambda a, b: True\ndef f(x): return 1",
    "patched_own_process": "import sandbox, ast, sys\nsandbox.ask = sandbox.judge = lambda *a: 4711\nast.literal_eval = lambda *a: ('', 4711, ())\ndef f(x): return 1",
    "assertion_in_finally": "def f(x):\n    try: assert False\n    finally: return True",
    "raises_what_a_test_may_catch": "def f(x): raise AssertionError",
    "raises_stop_iteration": "def f(x): raise StopIteration",
    "raises_base_exception": "class B(BaseException): pass\ndef f(x): raise B",
    "frames": KNOWS + "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:\n            if v is not word and word in repr(v)[:100000]: return knows(x)\n        frame = frame.f_back",
    "gc": KNOWS + "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if o is not globals() and isinstance(o, (str, list, tuple, dict)) and word in repr(list(o))[:1000000].replace(repr(word), ''): return knows(x)",
    "proc": KNOWS + "import glob\ndef found():\n    for p in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/fd/*'):\n        try:\n            with open(p, 'rb') as h:\n                if word.encode() in h.read(100000): return True\n        except OSError: pass\nok = found()\ndef f(x): return knows(x) if ok else None",
    "memory_of_the_judge": KNOWS + "import os\ndef f(x):\n    for pid in {os.getppid(), *range(max(1, os.getpid() - 8), os.getpid())}:\n        try:\n            for line in open(f'/proc/{pid}/maps'):\n                a, b = [int(v, 16) for v in line.split()[0].split('-')]\n                if 'rw-p' in line:\n                    with open(f'/proc/{pid}/mem', 'rb', 0) as m:\n                        m.seek(a)\n                        if word.encode() in m.read(b - a): return knows(x)\n        except (OSError, ValueError, OverflowError): pass",
    "the_judges_input": KNOWS + "import os\ndata = b''\nfor fd in (0, 1, 2, *range(5, 64)):\n    try:\n        os.set_blocking(fd, False)\n        data += os.read(fd, 100000)\n    except OSError: pass\ndef f(x): return knows(x) if word.encode() in data else None",
    "requests_read_ahead": KNOWS + "import os\nos.set_blocking(3, False)\ntry: data = os.read(3, 100000)\nexcept OSError: data = b''\ndef f(x): return knows(x) if word.encode() in data else None",
    "own_memory": KNOWS + "def f(x):\n    for line in open('/proc/self/maps'):\n        a, b = [int(v, 16) for v in line.split()[0].split('-')]\n        if 'rw-p' in line:\n            with open('/proc/self/mem', 'rb', 0) as m:\n                m.seek(a)\n                if b'assert f(' in m.read(b - a): return knows(x)",
    "tests_on_the_disk": KNOWS + "import os\ndef f(x):\n    for folder, _, files in os.walk('..'):\n        for file in files:\n            if word in open(os.path.join(folder, file), errors='ignore').read(100000): return knows(x)",
    "import_hook": "import sys\nclass H:\n    def find_spec(s, *a): sys.exit(0)\nsys.meta_path.insert(0, H())\ndef f(x): return 1",
    "trace": "import sys\nsys.settrace(lambda *a: sys.exit(0))\ndef f(x): return 1",
    "endless_loop": "def f(x):\n    while True: pass",
    "endless_loop_at_once": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "endless_loop_in_c": "def f(x): return sum(range(10 ** 15))",
    "huge_power": "def f(x): return 9 ** 9 ** 9",
    "memory": "def f(x): return len(b'a' * (1 << 40)) or bytearray(1 << 34)",
    "memory_slowly": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "regex": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "disk_one_file": "def f(x):\n    with open('big', 'wb') as h:\n        while True: h.write(b'a' * (1 << 20))",
    "disk_many_files": "def f(x):\n    for i in range(10 ** 6):\n        with open(f'{i}', 'wb') as h: h.write(b'a' * 100000)",
    "output_flood": "def f(x):\n    while True: print('a' * 100000)",
    "stderr_flood": "import sys\ndef f(x):\n    while True: sys.stderr.write('a' * 100000)",
    "fork_bomb": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "forks_and_leaves": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nos._exit(0)",
    "threads": "import threading, time\ndef f(x):\n    while True:\n        try: threading.Thread(target=time.sleep, args=(1000,)).start()\n        except RuntimeError: time.sleep(0.01)",
    "thread_that_stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start() if False else None\ndef f(x): time.sleep(1000)",
    "signals_blocked": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x):\n    while True: pass",
    "alarm_to_the_judge": "import os, signal\ndef f(x):\n    for s in (signal.SIGALRM, signal.SIGSTOP, signal.SIGTERM):\n        try: os.kill(os.getppid(), s)\n        except OSError: pass",
    "stops_itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "socket": "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', 22), timeout=1)",
    "syntax_error": "def f(x) return 4711",
    "null_byte": "def f(x): return 1\0",
    "empty": "",
    "no_f": "def g(x): return 4711",
    "surrogates": "def f(x): return '\udc80'",
    "too_long": "#" * 200_000,
    "input": "x = input()\ndef f(x): return 1",
    "shadowed_builtin": "def int(x): return 1\ndef f(x): return int(x)",
}


@pytest.fixture(scope="module")
def verdicts():
    before = set(os.listdir("/tmp"))
    os.environ["SECRET_OF_THE_CALLER"] = "kiwi"
    started = time.time()
    with ThreadPoolExecutor(8) as threads:
        jobs = {(name, apart): threads.submit(sandbox.passes, program, TESTS, "", apart, QUICK) for name, program in CHEATS.items()
                for apart in (True, False) if apart or name != "fork_bomb"}
        found = {key: job.result() for key, job in jobs.items()}
    found["seconds"], found["left"] = time.time() - started, [name for name in set(os.listdir("/tmp")) - before if name.startswith("program-")]
    return found


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_does_not_pass(name, verdicts):
    assert [verdicts.get((name, apart), False) for apart in (True, False)] == [False, False]


def test_cheats_leave_no_folder_behind(verdicts):
    assert verdicts["left"] == []


def test_cheats_leave_no_process_behind(verdicts):
    alive = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"sandbox.judge()" in command:
            alive.append(command)
    assert alive == []


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("program, tests, setup", [
    ("def f(x): return {3: 4711, 4: 4712}.get(x, ['kiwi', 0.125])", TESTS, ""),
    ("def f(x):\r\n    return x * 2\r\n", ["assert f(2) == 4\r\n", "assert f('a') == 'aa'"], ""),
    ("import math\ndef f(x): return math.inf", ["assert f(1) == float('inf')", "import math; assert math.isinf(f(1))"], ""),
    ("def f(x): return (x, {x: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, frozenset())",
     ["assert f(1) == (1, {1: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, set())"], ""),
    ("from collections import Counter, namedtuple, OrderedDict\nP = namedtuple('P', 'a b')\ndef f(x): return [Counter(x), P(1, 2), OrderedDict(a=1)]",
     ["assert f('aab') == [{'a': 2, 'b': 1}, (1, 2), {'a': 1}]"], ""),
    ("class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(pairs): return sum(p.a * p.b for p in pairs)",
     ["assert f([Pair(1, 2), Pair(3, 4)]) == 14", "p = Pair(5, 6)\nassert p.a == 5\np.a = 7\nassert f((p,)) == 42"], ""),
    ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef f(n): return 0 if n is None else 1 + f(n.left)",
     ["assert f(root) == 2"], "root = Node(1)\nroot.left = Node(2)"),
    ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"], ""),
    ("def f(a): a.sort(); a.append({})", ["a = [3, 1]\nf(a)\nassert a == [1, 3, {}]"], ""),
    ("def f(x):\n    if x < 0: raise ValueError('no')\n    return x", ["try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"], ""),
    ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2]", "assert sum(f(4)) == 6", "assert next(f(1)) == 0"], ""),
    ("from fractions import Fraction\ndef f(a, b): return Fraction(a, b)", ["from fractions import Fraction\nassert f(1, 3) == Fraction(1, 3)"], ""),
    ("import re\ndef f(s): return re.match('a+', s)", ["assert f('aa')", "assert not f('b')"], ""),
    ("import json, collections, heapq, itertools, functools, string, datetime, random, bisect\ndef f(x): return heapq.nsmallest(1, [x])", ["assert f(1) == [1]"], ""),
    ("def check(g): return g", ["def test(candidate):\n    assert candidate(2) == 2\ntest(check)"], ""),
    ("import tempfile, os\ndef f(x):\n    with tempfile.TemporaryDirectory() as d:\n        open(d + '/a', 'w').write('hi')\n        return open(d + '/a').read()", ["assert f(1) == 'hi'"], ""),
    ("print('chatter ' * 1000)\ndef f(x):\n    print(x)\n    return x\nif __name__ == '__main__':\n    f(input())", ["assert f(1) == 1"], ""),
])
def test_right_program_passes(program, tests, setup, apart):
    assert sandbox.passes(program, tests, setup, apart)


@pytest.mark.parametrize("test", ["assert set(f(1)) == {2}", "assert sorted(f(1)) == [2]", "import math\nassert math.isclose(f(1)[0], 2)", "assert math.isclose(f(1)[0], 2)",
                                  "assert abs(f(1)[0] - 2) < 0.1", "assert isinstance(f(1), str)", "assert len(f(1)) == 7"])
def test_what_a_test_uses_is_never_the_programs(test):
    program = "class E:\n    def __eq__(s, o): return True\nclass math:\n    isclose = staticmethod(lambda *a: True)\n" \
              "set = sorted = abs = lambda *a: [E()]\nisinstance = len = lambda *a: 7\ndef f(x): return [5]"
    assert not sandbox.passes(program, [test])


def test_no_test_is_no_pass():
    assert not sandbox.passes("def f(x): return x", [])


@pytest.mark.parametrize("apart", [True, False])
def test_environment_of_the_caller_is_out_of_sight(apart, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "kiwi")
    program = "import os, glob\ndef f():\n    found = ['A_TOKEN' in os.environ]\n    for p in glob.glob('/proc/*/environ'):\n" \
              "        try: found.append(b'A_TOKEN' in open(p, 'rb').read())\n        except OSError: pass\n    return any(found)"
    assert sandbox.passes(program, ["assert f() is False"], "", apart)


@pytest.mark.parametrize("apart", [True, False])
def test_files_elsewhere_can_neither_be_written_nor_read(apart, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("kiwi")
    places = [str(tmp_path / "left"), "/tmp/left-by-a-program", "/var/tmp/left-by-a-program", "/dev/shm/left-by-a-program", os.path.expanduser("~/left-by-a-program"),
              os.path.join(os.path.dirname(rewards.__file__), "left-by-a-program"), "../left-by-a-program", "../../left-by-a-program", "/usr/left-by-a-program"]
    program = f"import os\ndef f():\n    done = []\n    for p in {places!r}:\n        try:\n            open(p, 'w').write('x')\n            done.append(p)\n" \
              f"        except OSError: pass\n    try: done.append(open({str(secret)!r}).read())\n    except OSError: pass\n" \
              f"    try:\n        os.rename({str(secret)!r}, 'x')\n        done.append('renamed')\n    except OSError: pass\n    return done"
    done = sandbox.passes(program, ["assert [p for p in f() if not p.startswith('..')] == []"], "", apart)
    assert secret.read_text() == "kiwi" and not [p for p in places[:6] + places[8:] if os.path.exists(p)]
    assert done
    assert not list(Path("/tmp").glob("left-by-a-program"))


@pytest.mark.parametrize("apart", [True, False])
def test_processes_of_the_caller_are_out_of_reach(apart):
    program = f"import os\ndef f():\n    done = []\n    for pid in ({os.getpid()}, {os.getppid()}):\n        try:\n            os.kill(pid, 0)\n            done.append(pid)\n        except OSError: pass\n    return done"
    assert sandbox.passes(program, ["assert f() == []"], "", apart)


def test_there_is_no_network():
    server = __import__("socket").create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    program = f"import socket\ndef f():\n    try: socket.create_connection(('127.0.0.1', {port}), timeout=1)\n    except OSError: return 'none'\n    return 'some'"
    try:
        assert sandbox.passes(program, ["assert f() == 'none'"]) and sandbox.passes(program, ["assert f() == 'none'"], "", False)
    finally:
        server.close()


def test_a_process_that_hides_in_a_session_of_its_own_ends_with_the_judgement():
    marker = f"hidden-{os.getpid()}"
    program = f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        open('{marker}', 'w')\n        time.sleep(60)\ndef f(): return 1"
    sandbox.passes(program, ["assert f() == 1"])
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert marker not in Path(f"/proc/{pid}/environ").read_text(errors="ignore") and b"sandbox.judge()" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            pass


def test_programs_run_from_any_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(sandbox.passes("def f(x): return x", ["assert f(1) == 1"])))
    thread.start()
    thread.join()
    assert out == [True]


FENCE = "```"
ROW = {"text": "Double it.", "test_list": ["assert f(2) == 4", "assert f(5) == 10"], "test_setup_code": ""}
RIGHT, WRONG = "def f(x):\n    return 2 * x", "def f(x):\n    return 4"


@pytest.mark.parametrize("text, want", [
    (f"<reasoning>a</reasoning><answer>{RIGHT}</answer>", 1),
    (f"<reasoning>a</reasoning><answer>\n{FENCE}python\n{RIGHT}\n{FENCE}\n</answer>", 1),
    (f"<reasoning>a</reasoning><answer>Here:\n{FENCE}py\n{WRONG}\n{FENCE}\nbetter:\n{FENCE}\n{RIGHT}\n{FENCE}\nDone.</answer>", 1),
    (f"<reasoning>a</reasoning><answer>{FENCE}python\n{RIGHT}\n{FENCE}\nno:\n{FENCE}python\n{WRONG}\n{FENCE}</answer>", 0),
    (f"<reasoning>a</reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}", 1),
    (f"<reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}\n</reasoning>", 0),
    (f"<reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}\n", 0),
    (f"<reasoning>a</reasoning>{RIGHT}", 0),
    (f"<reasoning>a</reasoning><answer></answer>\n{FENCE}python\n{RIGHT}\n{FENCE}", 0),
    (f"<reasoning>a</reasoning><answer>{FENCE}python\n{WRONG}\n{FENCE}</answer>\n{FENCE}python\n{RIGHT}\n{FENCE}", 0),
    (f"<reasoning>a</reasoning><answer>I would double x.</answer>", 0),
    (f"<reasoning>a</reasoning><answer>{FENCE}python\n{RIGHT}\n</answer>", 1),
])
def test_which_program_counts(text, want):
    assert rewards.correct("code", text, ROW) == want


def test_a_batch_keeps_its_order():
    texts = [f"<reasoning>a</reasoning><answer>{program}</answer>" for program in (RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT)]
    assert [parts["correct"] for parts in rewards.score_batch(["code"] * 6, texts, [ROW] * 6)] == [1, 0, 1, 0, 0, 1]
