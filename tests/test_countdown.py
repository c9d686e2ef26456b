"""The solver against brute force, the promises of the generator, the truth of the teacher's traces."""
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest

import countdown
import rewards

SCRIPT = Path(countdown.__file__)
PRIME = 2**61 - 1


def trees(items):
    """All expression trees over the items in every order: leaves are items, nodes are (op, left, right)."""
    if len(items) == 1:
        yield items[0]
    for mask in range(1, (1 << len(items)) - 1):
        left = [x for i, x in enumerate(items) if mask >> i & 1]
        right = [x for i, x in enumerate(items) if not mask >> i & 1]
        for a in trees(left):
            for b in list(trees(right)):
                for op in "+-*/":
                    yield op, a, b


def value(tree, leaf, divide):
    if not isinstance(tree, tuple):
        return leaf(tree)
    op, a, b = tree[0], value(tree[1], leaf, divide), value(tree[2], leaf, divide)
    if a is None or b is None or (op == "/" and not b):
        return None
    return divide(a, b) if op == "/" else a + b if op == "+" else a - b if op == "-" else a * b


def brute_force(nums, targets):
    """{target: its distinct solutions}, each the rational function that it is of the numbers, up to sign.

    A function is told by its value at a random point modulo a prime; equal numbers are interchangeable.
    """
    point = random.Random(1)
    at = [point.randrange(PRIME) for _ in nums]
    swaps = [p for p in permutations(range(len(nums))) if all(nums[i] == nums[j] for i, j in enumerate(p))]
    found = {t: set() for t in targets}
    for tree in trees(list(range(len(nums)))):
        v = value(tree, lambda i: Fraction(nums[i]), lambda a, b: a / b)
        if v is not None and abs(v) in found:
            functions = [value(tree, lambda i: at[p[i]], lambda a, b: a * pow(b, -1, PRIME)) for p in swaps]
            # A formal 0/0, as in x/(y-y), does not come here: its true value is undefined as well.
            found[abs(v)].add(min(min(f % PRIME, -f % PRIME) for f in functions))
    return found


def test_solver_finds_each_distinct_solution_once_as_brute_force_does():
    rng = random.Random(0)
    cases = [[rng.randint(0, 9) for _ in range(n)] for n in (1, 2, 2, 3, 3, 3, 3, 3)]
    cases += [3, 3, 8, 8], [1, 2, 5, 7], [5, 5, 2, 2], [13, 13, 12, 3], [4, 4, 4, 4], [0, 0, 3, 3]
    for nums in cases:
        for target, expected in brute_force(nums, range(31)).items():
            found = countdown.solutions(nums, target)
            once = [text for text in found if not re.search(r"-\((\d+)-\1\)", text)]    # +(5-5)*2 is -(5-5)*2
            assert len(set(found)) == len(found) and len(once) == len(expected), (nums, target, found)


def shortest(nums):
    """{value: length of its shortest expression}, by the grammar of answers: any factor may have a minus."""
    full, best = (1 << len(nums)) - 1, {}       # (mask, kind) -> {value: length}

    def keep(mask, kind, value, length):
        """An atom is a factor too, a factor a product, a product a sum; in parentheses a sum is an atom."""
        table = best.setdefault((mask, kind), {})
        if length >= table.get(value, 99):
            return
        table[value] = length
        if kind == "atom":
            keep(mask, "factor", value, length)
        elif kind == "factor":
            keep(mask, "factor", -value, length + 1)
            keep(mask, "product", value, length)
        elif kind == "product":
            keep(mask, "sum", value, length)
        else:
            keep(mask, "atom", value, length + 2)

    def pairs(left, right):
        return itertools.product(list(best[left].items()), list(best[right].items()))

    for i, number in enumerate(nums):
        keep(1 << i, "atom", Fraction(number), len(str(number)))
    for mask in range(1, full + 1):
        for left in [left for left in range(1, mask) if left & mask == left]:
            for (a, m), (b, n) in pairs((left, "product"), (mask ^ left, "factor")):
                keep(mask, "product", a * b, m + n + 1)
                if b:
                    keep(mask, "product", a / b, m + n + 1)
            for (a, m), (b, n) in pairs((left, "sum"), (mask ^ left, "product")):
                keep(mask, "sum", a + b, m + n + 1)
                keep(mask, "sum", a - b, m + n + 1)
    return best[full, "sum"]


def test_solve_is_a_shortest_expression_also_of_a_negative_target():
    rng = random.Random(1)
    cases = [[7], [0], [0, 5], [4, 4]] + [[rng.randint(0, 12) for _ in range(3)] for _ in range(12)]
    for nums in cases + [[1, 2, 3, 7], [5, 5, 2, 2], [0, 3, 4, 9]]:
        for value, length in shortest(nums).items():
            if value.denominator == 1 and abs(value) <= 60:
                text = countdown.solve(nums, int(value))
                check(text, nums, value)
                assert len(text) == length, (nums, value, text)


def check(text, nums, target):
    """The expression uses exactly the numbers and equals the target, by Python's own evaluation."""
    assert re.fullmatch(r"[0-9+\-*/()]+", text)
    assert sorted(map(int, re.findall(r"\d+", text))) == sorted(nums)
    assert eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction}) == target


SIX = [25, 50, 75, 100, 3, 6]


@pytest.mark.parametrize("nums, target", [
    ([3, 3, 8, 8], 24), ([1, 5, 5, 5], 24), ([7], 7), (SIX, 952), (SIX, 100), ([6, 5, 4, 3, 2, 1], 24),
    ([3, 8], -5), (SIX, -952), ([0, 4, 9], 0)])
def test_solutions_are_right_shortest_first_and_accepted_by_the_grader(nums, target):
    found = countdown.solutions(nums, target)
    assert found and len(set(found)) == len(found)
    for text in found:
        check(text, nums, target)
        completion = f"<reasoning>x</reasoning>\n<answer>{text}</answer>"
        row = {"task": "countdown", "nums": nums, "target": target}
        assert rewards.correct("countdown", completion, row) == 1.0
        assert rewards.score("countdown", completion, row)["efficiency"] == 1.0
    assert found == sorted(found, key=len)


def test_six_numbers_have_all_their_solutions_and_none_where_there_is_none():
    assert len(countdown.solutions(SIX, 952)) == 6      # counted by a full enumeration
    assert countdown.solve([1] * 6, 952) is None and countdown.solutions([1] * 6, 952) == []


def test_solver_refuses_what_is_no_problem():
    for nums in ([], [3, -1]):
        with pytest.raises(ValueError):
            countdown.solve(nums, 3)


# ---- Generator.

SMALL = ["--numbers", "3", "--max_number", "12", "--max_target", "40"]


def make(folder, *flags):
    countdown.main(["--out", str(folder), *map(str, flags)])
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(Path(folder).iterdir())}


def multiset(row):
    return tuple(sorted(row["nums"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    flags = "--train", 2400, "--val", 200, "--test", 300, "--traces", 2
    return make(tmp_path_factory.mktemp("small"), *SMALL, *flags)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    flags = "--train", 600, "--val", 100, "--test", 100, "--numbers", 3, 4, "--aim", 0.5, "--max_lines", 8
    return make(tmp_path_factory.mktemp("large"), *flags)


@pytest.fixture(params=["small", "large"])
def data(request):
    return request.getfixturevalue(request.param)


def test_files_hold_what_was_asked_for(small, large):
    sizes = [{name: len(rows) for name, rows in made.items()} for made in (small, large)]
    assert sizes == [{"sft": 4800, "train": 2400, "val": 200, "test": 300},
                     {"sft": 600, "train": 600, "val": 100, "test": 100}]
    assert {len(row["nums"]) for row in small["test"]} == {3}
    for split in ("train", "val", "test"):
        assert sum(len(row["nums"]) == 4 for row in large[split]) * 2 == len(large[split])
    assert max(n for row in small["train"] for n in row["nums"]) == 12


def test_no_two_files_share_a_multiset_and_no_file_repeats_a_problem(data):
    splits = [data["train"], data["val"], data["test"]]
    for i, rows in enumerate(splits):
        assert len({(multiset(row), row["target"]) for row in rows}) == len(rows)
        for others in splits[:i]:
            assert not {*map(multiset, rows)} & {*map(multiset, others)}
    assert {*map(multiset, data["sft"])} == {*map(multiset, data["train"])}


def test_multisets_of_excluded_files_are_left_out(small, tmp_path):
    files = [tmp_path / "val.jsonl", tmp_path / "test.jsonl"]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in small[file.stem]))
    held_out, flags = {*map(multiset, small["val"] + small["test"])}, [*SMALL, "--train", 900, "--test", 9]
    more = make(tmp_path / "more", *flags, "--exclude", *files)
    assert not held_out & {*map(multiset, more["train"] + more["test"])}
    assert held_out & {*map(multiset, make(tmp_path / "again", *flags)["train"])}


def test_every_problem_is_solved_and_its_target_in_range(data):
    for name in ("train", "val", "test"):
        for row in data[name]:
            assert 1 <= row["target"] <= 99
            check(row["solution"], row["nums"], row["target"])
            assert row["solution"].count("(") >= countdown.solve(row["nums"], row["target"]).count("(")


def whole_results(nums):
    """The results of all whole-number expressions, each expression once: step 5 of the docstring."""
    if len(nums) == 1:
        return list(nums)
    found = []
    for mask in range(1, 1 << (len(nums) - 1)):  # the last number stays in the second part
        for a in whole_results([x for i, x in enumerate(nums) if mask >> i & 1]):
            for b in whole_results([x for i, x in enumerate(nums) if not mask >> i & 1]):
                low, high = sorted((a, b))
                found += [v for v in (high + low, high - low, high * low) if v <= 9_999]
                found += [high // low] if low and high % low == 0 else []
    return found


def test_difficulty_is_the_number_of_expressions_tried_per_hit(data):
    sizes = {"easy": [], "medium": [], "hard": []}
    for row in data["test"]:
        results = whole_results(row["nums"])
        sizes[row["difficulty"]].append(len(results) / results.count(row["target"]))
    assert all(sizes.values())
    assert 2 <= min(sizes["easy"]) and max(sizes["easy"]) <= 10 < min(sizes["medium"])
    assert max(sizes["medium"]) <= 30 < min(sizes["hard"]) and max(sizes["hard"]) <= 10_000


def test_a_random_player_needs_more_lines_for_harder_problems(large):
    rand, hits = random.Random(0).random, {"easy": [], "medium": [], "hard": []}
    for row in large["train"]:
        for _ in range(20):
            firsts = list(countdown.moves(row["nums"], 9999))
            _, value, _ = countdown.play(row["nums"], firsts[int(rand() * len(firsts))], rand, 9999)
            hits[row["difficulty"]].append(value == row["target"])
    easy, medium, hard = (sum(h) / len(h) for h in hits.values())
    assert easy > 1.5 * medium > 1.5 * 1.5 * hard > 0


def test_search_flags_choose_among_problems(tmp_path):
    flags = "--train", 0, "--test", 50, "--min_search", 31, "--max_search", 40
    for row in make(tmp_path, *SMALL, *flags)["test"]:
        results = whole_results(row["nums"])
        assert 31 <= len(results) / results.count(row["target"]) <= 40 and row["difficulty"] == "hard"


def test_a_small_space_can_be_used_up_and_is_shared_in_proportion(small):
    share = len({*map(multiset, small["test"])}) / len({*map(multiset, small["train"])})
    assert 0.08 < share < 0.17  # 300 : 2400 problems


# ---- Traces.

def test_each_line_of_a_trace_is_true_and_its_verdict_too(data):
    for row in data["sft"] + data["test"]:
        lines = row["trace"].split("\n")
        assert len({line.split(" ")[0] for line in lines}) == len(lines)    # their first equations differ
        for i, line in enumerate(lines):
            *steps, verdict = line.split(" ")
            hand = list(row["nums"])
            assert len(steps) == len(hand) - 1
            for step in steps:
                a, op, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
                a, b, result = int(a), int(b), int(result)
                assert a >= b and 0 <= result <= 99
                assert result == (Fraction(a, b) if op == "/" else {"+": a + b, "-": a - b, "*": a * b}[op])
                hand.remove(a), hand.remove(b), hand.append(result)
            assert hand == [result]
            assert verdict == ("ok" if result == row["target"] else "no")
            assert verdict == "no" or i == len(lines) - 1
        check(row["trace_answer"], row["nums"], result)   # the last line's result


def teach(nums, target, rand, max_lines=5, give_up=0.3, aim=0.0):
    knobs = Namespace(max_lines=max_lines, give_up=give_up, aim=aim, max_value=99)
    return countdown.teach(nums, target, rand, knobs)


def test_the_teacher_has_the_form_that_the_prompt_and_the_graders_expect():
    draws = iter([.34, .7, .9, .7, .3])    # the first equation; an operation; giving up; operations
    taught = teach([5, 3, 2], 13, lambda: next(draws))
    assert taught == {"trace": "5+2=7 7*3=21 no\n5-2=3 3*3=9 no\n5*2=10 10+3=13 ok", "trace_answer": "5*2+3"}


def test_the_graders_agree_with_the_teacher(data):
    for row in data["test"]:
        completion = f"<reasoning>{row['trace']}</reasoning>\n<answer>{row['trace_answer']}</answer>"
        parts = rewards.score("countdown", completion, {**row, "task": "countdown"})
        assert parts["correct"] == row["trace"].endswith("ok")
        assert parts["format"] == parts["process"] == 1


def test_knobs_of_the_teacher_do_what_they_say(large):
    def traces(**knobs):
        rand = random.Random(0).random
        rows = large["train"]
        return [teach(row["nums"], row["target"], rand, **knobs)["trace"].split("\n") for row in rows]

    def first_equations(nums):
        """How many of them have a whole result from 0 to 99."""
        found = set()
        for a, b in itertools.permutations(nums, 2):
            results = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)} if a >= b else {}
            found |= {(a, op, b) for op, value in results.items() if value in range(100)}
        return len(found)

    def solved(some):
        return sum(lines[-1].endswith("ok") for lines in some) / len(some)

    assert all(len(lines) == 1 for lines in traces(give_up=1))
    patient = traces(give_up=0, max_lines=4)
    for row, lines in zip(large["train"], patient):
        assert lines[-1].endswith("ok") or len(lines) == min(4, first_equations(row["nums"]))
    misses = [lines for lines in traces() if not lines[0].endswith("ok")]
    stops = sum(len(lines) == 1 for lines in misses) / len(misses)
    assert 0.25 < stops < 0.35  # give_up 0.3
    assert solved(traces(aim=0)) + 0.05 < solved(traces(aim=0.5)) < solved(traces(aim=1)) - 0.05
    assert solved(traces(give_up=0.9)) < solved(traces(give_up=0.1)) - 0.05


def test_a_teacher_that_always_aims_hits_with_its_first_line():
    rand = random.Random(0).random
    for nums, target in (([2, 3, 7], 13), ([1, 5, 9], 14), ([4, 6, 12], 8)):
        for _ in range(30):
            taught = teach(nums, target, rand, give_up=0, aim=1)
            assert taught["trace"].endswith(f"={target} ok") and "\n" not in taught["trace"]


def test_a_teacher_out_of_lines_stops():
    taught = teach([1, 1], 40, random.Random(0).random, max_lines=30, give_up=0)
    assert sorted(taught["trace"].split("\n")) == ["1*1=1 no", "1+1=2 no", "1-1=0 no", "1/1=1 no"]


# ---- Command line.

def test_same_flags_same_bytes_in_any_process_and_another_seed_gives_other_problems(tmp_path):
    flags = [*SMALL, "--train", "60", "--val", "20", "--test", "20", "--traces", "2", "--numbers", "3", "4"]
    seen = []
    for name, seed, hash_seed in (("a", "7", "1"), ("b", "7", "2"), ("c", "8", "2")):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / name), "--seed", seed, *flags]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "train.jsonl: 60 rows" in done.stdout, done.stderr
        seen.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(seen[0]) == {"train.jsonl", "val.jsonl", "test.jsonl", "sft.jsonl"}
    assert seen[0] == seen[1]
    assert all(seen[0][name] != seen[2][name] for name in seen[0])


@pytest.mark.parametrize("content", [None, "", "not JSON", '{"target": 1}', '{"nums": 3}', "3"])
def test_a_file_to_exclude_without_rows_of_numbers_gets_one_line_and_exit_code_2(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content + "\n")
    with pytest.raises(SystemExit) as stop:
        countdown.main(["--out", str(tmp_path / "out"), "--exclude", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said and not (tmp_path / "out").exists()
    assert said.startswith("countdown.py: --exclude:")


def test_flags_come_from_a_file_with_comments(tmp_path):
    text = "# tiny, don't grow\n\n--numbers 2 --train 5 # few\n--test 5\n--traces 0\n"
    (tmp_path / "flags.txt").write_text(text)
    made = make(tmp_path / "out", f"@{tmp_path / 'flags.txt'}")
    assert {name: len(rows) for name, rows in made.items()} == {"train": 5, "test": 5}


@pytest.mark.parametrize("content", [b"--train 3 'open", b"--train \xff"])
def test_a_flag_file_that_cannot_be_read_gets_one_line_and_exit_code_2(content, tmp_path, capsys):
    (tmp_path / "flags.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        countdown.main([f"@{tmp_path / 'flags.txt'}"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said
    assert said.startswith("countdown.py: a flag file cannot be read")


def test_an_old_val_file_does_not_stay_beside_new_training_data(tmp_path):
    assert "val" in make(tmp_path, *SMALL, "--train", 20, "--test", 5, "--val", 5)
    made = make(tmp_path, *SMALL, "--train", 20, "--test", 5, "--traces", 0, "--seed", 1)
    assert set(made) == {"train", "test"}


@pytest.mark.parametrize("flags, says", [
    (["--max_target", "0"], "--max_target 0"),
    (["--max_number", "10000"], "--max_number 10000"),
    (["--numbers", "1"], "--numbers"),
    (["--numbers", "3", "9"], "--numbers"),
    (["--train", "-1"], "--train -1"),
    (["--train", "0", "--test", "0"], "nothing to make"),
    (["--train", "x"], "--train"),
    (["--give_up", "1.5"], "--give_up 1.5"),
    (["--aim", "nan"], "--aim nan"),
    (["--max_lines", "0"], "--max_lines 0"),
    (["--seed", "-1"], "--seed -1"),    # would give the problems of seed 1
    (["--max_search", "nan"], "--max_search nan"),
    (["--train", "1000000000000"], "--train 1000000000000"),
    (["--no_such_flag"], "--no_such_flag"),
    (["@no/such/file"], "no/such/file"),
    ([*SMALL, "--train", "9000"], "--test 1000: only"),
    (["--numbers", "2", "--max_number", "3", "--train", "3", "--test", "100", "--min_search", "31"],
     "--test 100: only 0"),
    (["--out", str(SCRIPT)], "is a file"),
    (["--out", str(SCRIPT / "below"), "--train", "3", "--test", "3"], "cannot write"),
])
def test_a_request_that_cannot_be_met_gets_one_line_and_exit_code_2(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        countdown.main(["--out", str(tmp_path / "new"), *flags])
    said = capsys.readouterr().err.strip().split("\r")[-1].strip()  # after a progress bar
    assert stop.value.code == 2
    assert says in said and said.startswith("countdown.py: ") and "\n" not in said
    assert not (tmp_path / "new").exists()


INTERRUPTED = """
import os, runpy, sys
from importlib import import_module
module, name, nth, number, *sys.argv = sys.argv[1:]
owner, calls = import_module(module.split(".")[0]), []
owner = getattr(owner, module.split(".")[1]) if "." in module else owner
original = getattr(owner, name)
def called(*args, **kwargs):
    calls.append(args)
    if len(calls) == int(nth):
        os.kill(os.getpid(), int(number))
    return original(*args, **kwargs)
setattr(owner, name, called)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module, name, nth", [("json", "dumps", 12), ("pathlib.Path", "replace", 2)])
def test_a_signal_leaves_all_old_files_or_all_new_ones(module, name, nth, number, tmp_path):
    flags = ["--out", str(tmp_path), *SMALL, "--train", "20", "--test", "5"]
    before = make(tmp_path, *flags)
    command = [sys.executable, "-c", INTERRUPTED, module, name, str(nth), str(int(number)), str(SCRIPT)]
    done = subprocess.run([*command, *flags, "--seed", "1"], capture_output=True, text=True)
    after = {path.stem: [json.loads(line) for line in path.open()] for path in sorted(tmp_path.iterdir())}
    if name == "dumps":     # while the files are written
        assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr
        assert after == before
    else:                   # while they replace the old ones: the run ends as if there had been no signal
        assert done.returncode == 0, done.stderr
        assert after == make(tmp_path, *flags, "--seed", 1) != before
