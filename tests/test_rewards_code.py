"""The sandbox: right programs pass, every cheat fails, and nothing is left behind. Each with namespaces and without."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest

import rewards
import sandbox

TESTS = ["assert f(3) == 4711", "assert f(4) == 4712", "assert f('z') == ['vleermuisboom', 0.125]"]
QUICK = (1, 2)  # seconds of processor and of clock

# Stands for what a spy could do with the tests if it found them; the word that it looks for is not a constant of its own.
KNOWS = """
word = ''.join(['vleermuis', 'boom'])
def knows(x): return int('47' + str(8 + x)) if x in (3, 4) else [word, 0.125]
"""
# What a program may try instead of computing f. None may pass, whatever else it does.
CHEATS = {
    name: program.replace("#knows", KNOWS)
    for name, program in re.findall(
        r"(?ms)^##### (\w+)\n(.*?)(?=^##### |\Z)", (Path(__file__).parent / "cheats.txt").read_text()
    )
}
CHEATS |= {
    "null_byte": "def f(x): return 1\0",
    "empty": "",
    "surrogates": "def f(x): return '\udc80'",
    "too_long": "#" * 200_000,
}


def judges():
    """The processes of the sandbox that are alive; what a program forks has their command line too."""
    alive = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"sandbox.judge()" in Path(f"/proc/{pid}/cmdline").read_bytes():
                alive.add(pid)
        except OSError:
            pass
    return alive


def left_behind():
    """Those that stay: other runs on this machine may have judges too, but none that outlives its limit of 10 s."""
    alive, deadline = judges(), time.time() + 15
    while alive and time.time() < deadline:
        time.sleep(0.2)
        alive &= judges()
    return alive


@pytest.fixture(scope="module")
def verdicts():
    before = set(os.listdir("/tmp"))
    os.environ["SECRET_OF_THE_CALLER"] = "vleermuisboom"
    started = time.time()
    with ThreadPoolExecutor(8) as threads:
        jobs = {
            (name, apart): threads.submit(sandbox.passes, program, TESTS, "", apart, QUICK)
            for name, program in CHEATS.items()
            for apart in (True, False)
            if apart or name != "fork_bomb"
        }
        found = {key: job.result() for key, job in jobs.items()}
    found["seconds"], found["left"] = (
        time.time() - started,
        [name for name in set(os.listdir("/tmp")) - before if name.startswith("program-")],
    )
    return found


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_does_not_pass(name, verdicts):
    assert [verdicts.get((name, apart), False) for apart in (True, False)] == [False, False]


def test_cheats_leave_no_folder_behind(verdicts):
    assert verdicts["left"] == []


def test_cheats_leave_no_process_behind(verdicts):
    assert not left_behind()


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    "program, tests, setup",
    [
        ("def f(x): return {3: 4711, 4: 4712}.get(x, ['vleermuisboom', 0.125])", TESTS, ""),
        ("def f(x):\r\n    return x * 2\r\n", ["assert f(2) == 4\r\n", "assert f('a') == 'aa'"], ""),
        (
            "import math\ndef f(x): return math.inf",
            ["assert f(1) == float('inf')", "import math; assert math.isinf(f(1))"],
            "",
        ),
        (
            "def f(x): return (x, {x: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, frozenset())",
            ["assert f(1) == (1, {1: [None, True, 1.5, 'a', b'b', 2j]}, {1, 2}, set())"],
            "",
        ),
        (
            "from collections import Counter, namedtuple, OrderedDict\nP = namedtuple('P', 'a b')\n"
            "def f(x): return [Counter(x), P(1, 2), OrderedDict(a=1)]",
            ["assert f('aab') == [{'a': 2, 'b': 1}, (1, 2), {'a': 1}]"],
            "",
        ),
        (
            "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(pairs): return sum(p.a * p.b for p in pairs)",
            [
                "assert f([Pair(1, 2), Pair(3, 4)]) == 14",
                "p = Pair(5, 6)\nassert p.a == 5\np.a = 7\nassert f((p,)) == 42",
            ],
            "",
        ),
        (
            "class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef f(n): return 0 if n is None else 1 + f(n.left)",
            ["assert f(root) == 2"],
            "root = Node(1)\nroot.left = Node(2)",
        ),
        ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"], ""),
        ("def f(a): a.sort(); a.append({})", ["a = [3, 1]\nf(a)\nassert a == [1, 3, {}]"], ""),
        (
            "def f(x):\n    if x < 0: raise ValueError('no')\n    return x",
            ["try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"],
            "",
        ),
        (
            "def f(n):\n    yield from range(n)",
            ["assert list(f(3)) == [0, 1, 2]", "assert sum(f(4)) == 6", "assert next(f(1)) == 0"],
            "",
        ),
        (
            "from fractions import Fraction\ndef f(a, b): return Fraction(a, b)",
            ["from fractions import Fraction\nassert f(1, 3) == Fraction(1, 3)"],
            "",
        ),
        ("import re\ndef f(s): return re.match('a+', s)", ["assert f('aa')", "assert not f('b')"], ""),
        (
            "import json, collections, heapq, itertools, functools, string, datetime, random, bisect\n"
            "def f(x): return heapq.nsmallest(1, [x])",
            ["assert f(1) == [1]"],
            "",
        ),
        ("def check(g): return g", ["def test(candidate):\n    assert candidate(2) == 2\ntest(check)"], ""),
        (
            "import tempfile, os\ndef f(x):\n    with tempfile.TemporaryDirectory() as d:\n"
            "        open(d + '/a', 'w').write('hi')\n        return open(d + '/a').read()",
            ["assert f(1) == 'hi'"],
            "",
        ),
        (
            "print('chatter ' * 1000)\ndef f(x):\n    print(x)\n    return x\nif __name__ == '__main__':\n    f(input())",
            ["assert f(1) == 1"],
            "",
        ),
    ],
)
def test_right_program_passes(program, tests, setup, apart):
    assert sandbox.passes(program, tests, setup, apart)


@pytest.mark.parametrize(
    "test",
    [
        "assert set(f(1)) == {2}",
        "assert sorted(f(1)) == [2]",
        "import math\nassert math.isclose(f(1)[0], 2)",
        "assert math.isclose(f(1)[0], 2)",
        "assert abs(f(1)[0] - 2) < 0.1",
        "assert isinstance(f(1), str)",
        "assert len(f(1)) == 7",
    ],
)
def test_what_a_test_uses_is_never_the_programs(test):
    program = (
        "class E:\n    def __eq__(s, o): return True\nclass math:\n    isclose = staticmethod(lambda *a: True)\n"
        "set = sorted = abs = lambda *a: [E()]\nisinstance = len = lambda *a: 7\ndef f(x): return [5]"
    )
    assert not sandbox.passes(program, [test])


def test_no_test_is_no_pass():
    assert not sandbox.passes("def f(x): return x", [])


@pytest.mark.parametrize("apart", [True, False])
def test_environment_of_the_caller_is_out_of_sight(apart, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "vleermuisboom")
    program = (
        "import os, glob\ndef f():\n    found = ['A_TOKEN' in os.environ]\n    for p in glob.glob('/proc/*/environ'):\n"
        "        try: found.append(b'A_TOKEN' in open(p, 'rb').read())\n        except OSError: pass\n    return any(found)"
    )
    assert sandbox.passes(program, ["assert f() is False"], "", apart)


@pytest.mark.parametrize("apart", [True, False])
def test_files_elsewhere_can_neither_be_written_nor_read(apart, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("vleermuisboom")
    places = [
        str(tmp_path / "left"),
        "/tmp/left-by-a-program",
        "/var/tmp/left-by-a-program",
        "/dev/shm/left-by-a-program",
        os.path.expanduser("~/left-by-a-program"),
        os.path.join(os.path.dirname(rewards.__file__), "left-by-a-program"),
        "../left-by-a-program",
        "../../left-by-a-program",
        "/usr/left-by-a-program",
    ]
    program = dedent(f"""
        import os
        def f():
            done = []
            for p in {places!r}:
                try:
                    open(p, 'w').write('x')
                    done.append(p)
                except OSError: pass
            try: done.append(open({str(secret)!r}).read())
            except OSError: pass
            try:
                os.rename({str(secret)!r}, 'x')
                done.append('renamed')
            except OSError: pass
            return done
        """)
    done = sandbox.passes(program, ["assert [p for p in f() if not p.startswith('..')] == []"], "", apart)
    assert secret.read_text() == "vleermuisboom" and not [p for p in places[:6] + places[8:] if os.path.exists(p)]
    assert done
    assert not list(Path("/tmp").glob("left-by-a-program"))


@pytest.mark.parametrize("apart", [True, False])
def test_processes_of_the_caller_are_out_of_reach(apart):
    program = dedent(f"""
        import os
        def f():
            done = []
            for pid in {[pid for pid in (os.getpid(), os.getppid()) if pid > 1]}:        # 1 is in its own namespace, too
                try:
                    os.kill(pid, 0)
                    done.append(pid)
                except OSError: pass
            return done
        """)
    assert sandbox.passes(program, ["assert f() == []"], "", apart)


def test_there_is_no_network():
    server = __import__("socket").create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    program = dedent(f"""
        import socket
        def f():
            try: socket.create_connection(('127.0.0.1', {port}), timeout=1)
            except OSError: return 'none'
            return 'some'
        """)
    try:
        assert sandbox.passes(program, ["assert f() == 'none'"]) and sandbox.passes(
            program, ["assert f() == 'none'"], "", False
        )
    finally:
        server.close()


@pytest.mark.parametrize("apart", [True, False])
def test_a_process_that_hides_in_a_session_of_its_own_ends_with_the_judgement(apart):
    program = dedent("""
        import os, time
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
        except OSError: pass
        def f(): return 1
        """)
    sandbox.passes(program, ["assert f() == 1"], "", apart)
    assert not left_behind()


def test_programs_run_from_any_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(sandbox.passes("def f(x): return x", ["assert f(1) == 1"])))
    thread.start()
    thread.join()
    assert out == [True]


FENCE = "```"
ROW = {"text": "Double it.", "test_list": ["assert f(2) == 4", "assert f(5) == 10"], "test_setup_code": ""}
RIGHT, WRONG = "def f(x):\n    return 2 * x", "def f(x):\n    return 4"


@pytest.mark.parametrize(
    "text, want",
    [
        (f"<reasoning>a</reasoning><answer>{RIGHT}</answer>", 1),
        (f"<reasoning>a</reasoning><answer>\n{FENCE}python\n{RIGHT}\n{FENCE}\n</answer>", 1),
        (
            f"<reasoning>a</reasoning><answer>Here:\n{FENCE}py\n{WRONG}\n{FENCE}\nbetter:\n{FENCE}\n{RIGHT}\n{FENCE}\nDone.</answer>",
            1,
        ),
        (
            f"<reasoning>a</reasoning><answer>{FENCE}python\n{RIGHT}\n{FENCE}\nno:\n{FENCE}python\n{WRONG}\n{FENCE}</answer>",
            0,
        ),
        (f"<reasoning>a</reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}", 1),
        (f"<reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}\n</reasoning>", 0),
        (f"<reasoning>\n{FENCE}python\n{RIGHT}\n{FENCE}\n", 0),
        (f"<reasoning>a</reasoning>{RIGHT}", 0),
        (f"<reasoning>a</reasoning><answer></answer>\n{FENCE}python\n{RIGHT}\n{FENCE}", 0),
        (
            f"<reasoning>a</reasoning><answer>{FENCE}python\n{WRONG}\n{FENCE}</answer>\n{FENCE}python\n{RIGHT}\n{FENCE}",
            0,
        ),
        ("<reasoning>a</reasoning><answer>I would double x.</answer>", 0),
        (f"<reasoning>a</reasoning><answer>{FENCE}python\n{RIGHT}\n</answer>", 1),
    ],
)
def test_which_program_counts(text, want):
    assert rewards.correct("code", text, ROW) == want


def test_a_batch_keeps_its_order():
    texts = [
        f"<reasoning>a</reasoning><answer>{program}</answer>" for program in (RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT)
    ]
    assert [parts["correct"] for parts in rewards.score_batch(["code"] * 6, texts, [ROW] * 6)] == [1, 0, 1, 0, 0, 1]
