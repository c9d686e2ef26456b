"""Countdown: make problems, solve them, write them as JSONL, with worked traces for a supervised cold start.

A problem: reach the target from the given numbers with + - * / and parentheses, each number used exactly once.

The solver, `solve(nums, target)` and `solutions(nums, target)`, is exact and goes through fractions where it must:
 1. A subset of the numbers is a bit mask. For the small subsets, bottom-up, make a table of all values that they can
    reach. Negative values are left out: wherever a - b is below 0, b - a serves, with the sign moved outwards.
 2. From the target go top-down and meet the tables in the middle: split the numbers in two; each value a of the smaller
    part leaves at most six values b of the larger one with a ? b or b ? a equal to the target.
 3. Put the hits together in flat form: a sum is the terms added and the terms taken away, a product the factors above
    and below the line. So a-(b-c) = a+c-b, a/(b/c) = a*c/b and (a-b)*(c-d) = (b-a)*(d-c) are one solution. Two
    solutions are distinct when no reordering, regrouping or moving of signs makes one from the other (8*1 and 8/1
    are distinct); equal numbers are not told apart.
For one solution step 3 keeps the best sum and the best product of each part: fewest parentheses, thus the shortest.

The generator:
 1. Draw multisets of numbers in random order, none twice, and give each wholly to one of train, val and test: no two of
    the files share a multiset. A small space (3 numbers up to 12) is split in proportion to the rows asked for.
 2. Count for each multiset the expressions by value, as a player with whole numbers would try them: operands in either
    order are one expression, nothing below 0 or above 9,999, exact division only.
 3. The search of a problem is how many expressions that player tries for each one that hits: all / hitting. easy: up to
    10, medium: up to 30, hard: more. Extremes, under --min_search or above --max_search, are left out, and so are
    problems that need fractions or larger numbers. (3 numbers up to 99: mostly 8-10; 4 numbers: mostly 25-500.)
 4. Pick a target among those left, every one as likely. Once no fresh multiset is left, each gives further targets.
 5. Let the teacher play each problem. It writes lines of running results, each with its verdict, until one hits:
        5+3=8 8*2=16 no
        5*2=10 10+3=13 ok
    It is impatient: after a miss it stops with probability --give_up, and always after --max_lines, and then answers
    with its last line. A model that starts from such traces knows the form, and RL has persistence and aim to teach.

Files in --out: train.jsonl, test.jsonl, val.jsonl (with --val) of rows {nums, target, solution, difficulty, trace,
trace_answer}, and sft.jsonl: the train rows --traces times, each with a trace of its own. All are written under
temporary names, then renamed. The same flags give the same bytes on any machine.

    python countdown.py                                                   # data for Qwen2.5-3B, into data/countdown
    python countdown.py --numbers 3 --max_number 12 --max_target 40 --train 2500 --test 500 --traces 16
    python countdown.py --numbers 4 --difficulty medium hard --train 0 --test 500 --out data/countdown-hard
    python -c "import countdown; print(countdown.solutions([3, 3, 8, 8], 24))"
"""
import argparse
import json
import os
import random
import shlex
import sys
import time
from collections import Counter
from functools import lru_cache
from itertools import combinations_with_replacement, product
from math import comb, gcd
from operator import index
from pathlib import Path

from tqdm import tqdm

CLASSES = {"easy": 10, "medium": 30, "hard": float("inf")}  # name -> the largest search in it
LIMIT = 9_999                                               # the largest number of the player who defines the search
FRUITLESS = 1_000                                           # multisets without a fit problem until we stop drawing
FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "sft.jsonl")


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="countdown.py", description=__doc__.split("\n")[0], fromfile_prefix_chars="@",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    p.error = fail
    g = p.add_argument_group("files")
    g.add_argument("--out", default="data/countdown", help="folder to write; the files named above are replaced")
    g.add_argument("--train", type=int, default=20_000, help="problems in train.jsonl")
    g.add_argument("--val", type=int, default=0, help="problems in val.jsonl; 0: no such file")
    g.add_argument("--test", type=int, default=1_000, help="problems in test.jsonl")
    g.add_argument("--traces", type=int, default=1, help="rows of sft.jsonl per train problem; 0: no such file")
    g.add_argument("--seed", type=int, default=0, help="same seed and flags, same bytes")
    g = p.add_argument_group("problems")
    g.add_argument("--numbers", type=int, nargs="+", default=[3, 4], help="how many numbers, in equal shares, 2 to 6")
    g.add_argument("--min_number", type=int, default=1, help="smallest given number")
    g.add_argument("--max_number", type=int, default=99, help="largest given number")
    g.add_argument("--max_target", type=int, default=99, help="targets are 1 to this")
    g.add_argument("--difficulty", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="classes to make")
    g.add_argument("--min_search", type=float, default=2, help="leave out problems with fewer expressions per hit")
    g.add_argument("--max_search", type=float, default=10_000, help="leave out problems with more expressions per hit")
    g = p.add_argument_group("teacher")
    g.add_argument("--max_lines", type=int, default=5, help="lines of a trace at most")
    g.add_argument("--give_up", type=float, default=0.3, help="probability of stopping after each miss, 0 to 1")
    g.add_argument("--aim", type=float, default=0.0, help="probability of hitting with a line's last operation when "
                                                          "one does; else it is drawn at random like the others")
    g.add_argument("--max_value", type=int, default=99, help="largest result in a trace; raised to max_number")
    a = p.parse_args(argv)

    lowest = dict(train=0, val=0, test=0, traces=0, min_number=1, max_target=1, min_search=0, max_lines=1, max_value=1)
    for name, low in lowest.items():
        if not getattr(a, name) >= low:
            fail(f"--{name} {getattr(a, name)}: must be at least {low}")
    for name in ("give_up", "aim"):
        if not 0 <= getattr(a, name) <= 1:
            fail(f"--{name} {getattr(a, name)}: a probability lies between 0 and 1")
    if not a.train + a.val + a.test:
        fail("--train, --val and --test are all 0: nothing to make")
    for n in a.numbers:
        if not 2 <= n <= 6:
            fail(f"--numbers {n}: must be 2 to 6")
    a.numbers = sorted(set(a.numbers))
    if a.max_number < a.min_number:
        fail(f"--max_number {a.max_number}: must be at least --min_number, which is {a.min_number}")
    if not a.max_search >= a.min_search:
        fail(f"--max_search {a.max_search:g}: must be at least --min_search, which is {a.min_search:g}")
    a.max_value = max(a.max_value, a.max_number)
    return a


def fail(message):
    print(f"countdown.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- Solver. A value is a pair (numerator, denominator), reduced and never negative.

SUM, PRODUCT = 0, 1  # an expression is (kind, ups, downs): texts added and taken away, or above and below the line


@lru_cache(None)
def splits(mask):
    """All ways to cut a bit mask into two parts, the smaller one first."""
    low, sub, cuts = mask & -mask, (mask - 1) & mask, []
    while sub:
        if sub & low:  # the lowest bit stays on one side, or each cut would come twice
            cuts.append(sorted((sub, mask ^ sub), key=int.bit_count))
        sub = (sub - 1) & mask
    return cuts


def reachable(nums, size):
    """Step 1: {mask: its values} for all subsets of up to `size` numbers."""
    tables = {1 << i: {(x, 1)} for i, x in enumerate(nums)}
    for mask in sorted(range(1, 1 << len(nums)), key=int.bit_count):
        if 1 < mask.bit_count() <= size:
            values = tables[mask] = set()
            for left, right in splits(mask):
                for an, ad in tables[left]:
                    for bn, bd in tables[right]:
                        x, y, d = an * bd, bn * ad, ad * bd  # a = x / d, b = y / d
                        for n, m in ((x + y, d), (abs(x - y), d), (an * bn, d), (x, y), (y, x)):
                            if m:
                                g = gcd(n, m)
                                values.add((n // g, m // g))
    return tables


def partners(t, a):
    """Step 2: all (op, *b, swapped) with a op b = t, or b op a = t if swapped. b is not reduced, and may not exist."""
    (tn, td), (an, ad) = t, a
    x, y, d = tn * ad, an * td, td * ad  # t = x / d, a = y / d
    found = [("-", x + y, d, True), ("+", x - y, d, False) if x >= y else ("-", y - x, d, False)]
    if x == y:
        found.append(("-", 0, 1, False))
    if y:
        found += [("*", x, y, False), ("/", tn * an, d, True)]
        if x:
            found.append(("/", y, x, False))
    return found


def text(node):
    kind, ups, downs = node
    return "+*"[kind].join(ups) + "".join("-/"[kind] + part for part in downs)


def join(op, a, b, zero, odd):
    """Step 3: the flat form of a op b. zero: its value is 0, so neither of its signs is the natural one.

    odd: the texts met so far that are their own opposites, as (5-5) is where 5 is given twice. Adding one or taking
    it away is the same, so it is always added.
    """
    kind, sides = SUM if op in "+-" else PRODUCT, []
    for node in (a, b):
        if node[0] == kind:
            sides.append(node[1:])
        else:
            sides.append(((text(node) if kind == SUM else f"({text(node)})",), ()))
    (au, ad), (bu, bd) = sides
    if op in "-/":
        bu, bd = bd, bu
    ups, downs = order(au + bu), order(ad + bd)
    if kind == SUM and (zero or odd):
        own = [s for s in ups + downs if s in odd]
        ups, downs = (tuple(s for s in part if s not in odd) for part in (ups, downs))
        opposite = ups == downs
        if zero:
            ups, downs = max((ups, downs), (downs, ups))
        ups = order((*ups, *own))
    else:
        opposite = any(s in odd for s in ups)
    node = kind, ups, downs
    if zero and opposite:
        odd |= {text(node), f"({text(node)})"}
    return node


def order(parts):
    return tuple(sorted(parts, key=lambda s: (len(s), s), reverse=True))


def expressions(nums, target, tables, every):
    """Steps 2 and 3: all flat forms that reach the target, or without `every` a shortest sum and product of them."""
    full, memo, odd = (1 << len(nums)) - 1, {}, set()

    def find(mask, t):
        if (mask, t) not in memo:
            found = {}  # used as an ordered set: the order of a real one differs from process to process
            for node in hits(mask, t):
                found[node] = None
                # Nothing beats a product without parentheses, nor, at the top, a sum without.
                if not every and "(" not in text(node) and (node[0] == PRODUCT or mask == full):
                    break
            if not every:
                found = [min((node for node in found if node[0] == kind), key=lambda node: (len(text(node)), node))
                         for kind in sorted({node[0] for node in found})]
            memo[mask, t] = found
        return memo[mask, t]

    def hits(mask, t):
        if mask.bit_count() == 1 and t in tables[mask]:
            yield PRODUCT, (str(t[0]),), ()
        for left, right in splits(mask):
            at_hand = tables.get(right)
            for a in tables[left]:
                choices = partners(t, a)
                if not t[0] and not a[0]:  # 0 = 0 * b = 0 / b whatever b is
                    choices += [(op, *b, False) for b in at_hand for op in "*/" if b[0] or op == "*"]
                for op, n, d, swapped in choices:
                    g = gcd(n, d)
                    b = (n // g, d // g)
                    if at_hand is None or b in at_hand:
                        for x, y in product(find(left, a), find(right, b)):
                            yield join(op, *((y, x) if swapped else (x, y)), not t[0], odd)

    return list(find(full, target))


def search(nums, target, every):
    nums, target = [index(x) for x in nums], index(target)
    if any(x < 0 for x in nums):
        raise ValueError(f"nums {nums}: the numbers of a problem are not negative")
    if not nums:
        return []
    # Tables of all but the two largest sizes are enough, unless a 0 makes "any value" an answer.
    size = len(nums) - (1 if 0 in (target, *nums) else 2)
    nodes = expressions(nums, (abs(target), 1), reachable(nums, size), every)
    if target < 0:
        nodes = [(SUM, node[2], node[1]) if node[0] == SUM and node[2] else
                 (SUM, (), (text(node) if node[0] == PRODUCT else f"({text(node)})",)) for node in nodes]
    return sorted((text(node) for node in nodes), key=lambda s: (len(s), s))


def solve(nums, target):
    """A shortest expression that uses each number once and equals the target, or None: solve([2, 3, 5], 13) is 5*2+3."""
    return min(search(nums, target, every=False), key=len, default=None)


def solutions(nums, target):
    """All distinct solutions (what that means: step 3 above), shortest first."""
    return search(nums, target, every=True)


# ---- Generator.

def count(nums):
    """Step 2: [mask] -> {value: number of whole-number expressions over the numbers in the mask that have it}."""
    tables = [{} for _ in range(1 << len(nums))]
    for i, x in enumerate(nums):
        tables[1 << i][x] = 1
    for mask, out in enumerate(tables):
        get = out.get
        for left, right in splits(mask):
            for a, na in tables[left].items():
                for b, nb in tables[right].items():
                    high, low = (a, b) if a >= b else (b, a)
                    for v in (high - low, high + low, high * low, high // low if low and not high % low else LIMIT + 1):
                        if v <= LIMIT:
                            out[v] = get(v, 0) + na * nb
    return tables


def targets(ways, args):
    """Step 3: {target: difficulty} of the problems that numbers with these ways give."""
    total, fit = sum(ways.values()), {}
    for target, n in ways.items():
        if 1 <= target <= args.max_target and args.min_search <= total / n <= args.max_search:
            difficulty = next(name for name, largest in CLASSES.items() if total / n <= largest)
            if difficulty in args.difficulty:
                fit[target] = difficulty
    return fit


def multisets(k, low, high, rand):
    """Step 1: all multisets of k numbers from low to high, as sorted tuples, in random order."""
    seen, width = set(), high - low + 1
    space = comb(width + k - 1, k)
    while len(seen) < space // 4:  # while most are fresh, drawing is cheaper than listing them all
        nums = tuple(sorted(low + int(rand() * width) for _ in range(k)))
        if nums not in seen:
            seen.add(nums)
            yield nums
    rest = [nums for nums in combinations_with_replacement(range(low, high + 1), k) if nums not in seen]
    while rest:
        i = int(rand() * len(rest))
        rest[i], rest[-1] = rest[-1], rest[i]
        yield rest.pop()


def draw(k, wanted, args, rand, bar):
    """Steps 1 to 4 for k numbers: {split: up to wanted[split] problems}."""
    homes = {split: [] for split in wanted}  # the multisets of each split, each with its targets so far
    made = {split: [] for split in wanted}
    room = dict.fromkeys(wanted, 0)

    def add(split, nums, used, tables, fit):
        left = [t for t in fit if t not in used]
        if left:
            target = left[int(rand() * len(left))]
            used.append(target)
            values = {mask: {(v, 1) for v in tables[mask]} for mask in range(1, len(tables) - 1)}
            solution = min(map(text, expressions(nums, (target, 1), values, every=False)), key=len)
            made[split].append({"nums": list(nums), "target": target, "solution": solution, "difficulty": fit[target]})
            bar.update()

    fruitless = 0
    for nums in multisets(k, args.min_number, args.max_number, rand):
        short = [split for split in wanted if len(made[split]) < wanted[split]]
        if not short or fruitless == FRUITLESS:
            break
        tables = count(nums)
        fit = targets(tables[-1], args)
        fruitless = 0 if fit else fruitless + 1
        if fit:  # to the split with the least room for what it wants, so that a small space is shared out evenly
            split = min(short, key=lambda split: room[split] / wanted[split])
            room[split] += len(fit)
            homes[split].append((nums, []))
            add(split, *homes[split][-1], tables, fit)
    for split in wanted:
        while len(made[split]) < min(wanted[split], room[split]):
            for nums, used in homes[split]:
                if len(made[split]) < wanted[split]:
                    tables = count(nums)
                    add(split, nums, used, tables, targets(tables[-1], args))
    return made


# ---- Teacher.

def play(nums, target, rand, aim, max_value):
    """One line of play: its text, its result and the expression it amounts to. Larger operand first, whole results."""
    hand, steps = [(x, x) for x in nums], []  # values, each with its expression: a number or (op, left, right)
    while len(hand) > 1:
        i, j = int(rand() * len(hand)), int(rand() * (len(hand) - 1))
        j += j >= i
        (a, x), (b, y) = sorted((hand[i], hand[j]), key=lambda h: -h[0])
        moves = [("-", a - b)]
        if a + b <= max_value:
            moves.append(("+", a + b))
        if a * b <= max_value:
            moves.append(("*", a * b))
        if b and not a % b:
            moves.append(("/", a // b))
        if len(hand) == 2 and (hits := [move for move in moves if move[1] == target]) and rand() < aim:
            moves = hits
        op, value = moves[int(rand() * len(moves))]
        steps.append(f"{a}{op}{b}={value}")
        hand = [h for k, h in enumerate(hand) if k not in (i, j)] + [(value, (op, x, y))]
    return " ".join(steps), value, hand[0][1]


def teach(nums, target, rand, *, max_lines=5, give_up=0.3, aim=0.0, max_value=99):
    """Step 5: (trace, answer). No line comes twice; the answer is the last line's expression, right or wrong."""
    lines = {}  # line -> (verdict, expression), in the order of play
    for _ in range(50 * max_lines):  # few numbers give few lines: a bound, lest we wait for one that is not there
        line, value, expression = play(nums, target, rand, aim, max_value)
        if line not in lines:
            lines[line] = "ok" if value == target else "no", expression
            if value == target or len(lines) == max_lines or rand() < give_up:
                break
    trace = "\n".join(f"{line} {verdict}" for line, (verdict, _) in lines.items())
    return trace, write(list(lines.values())[-1][1])[0]


def write(expression):
    """The expression of a line in the line's own order, and how tightly it binds; no needless parentheses."""
    if isinstance(expression, int):
        return str(expression), 2
    op, a, b = expression
    (a, a_binds), (b, b_binds) = write(a), write(b)
    binds = 0 if op in "+-" else 1
    a = f"({a})" if a_binds < binds else a
    b = f"({b})" if b_binds < binds or (b_binds == binds and op in "-/") else b
    return a + op + b, binds


# ---- Files.

def save(folder, files):
    """Write {name: rows} under temporary names, then put them all in the place of what an earlier run left there."""
    temporary = {folder / f".{name}.tmp": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(temporary, files.values()):
            with open(path, "w", encoding="utf-8", newline="\n") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        for name in FILES:  # an old val.jsonl could share multisets with the new train.jsonl
            (folder / name).unlink(missing_ok=True)
        for path, final in temporary.items():
            os.replace(path, final)
    except OSError as e:
        fail(f"--out {folder}: cannot write there ({e.strerror or e})")
    finally:
        for path in temporary:
            if path.exists():
                path.unlink()


def main(argv=None):
    args = parse_args(argv)
    rng, start = random.Random(args.seed), time.perf_counter()
    rand = rng.random
    wanted = {split: n for split in ("test", "val", "train") if (n := getattr(args, split))}
    most = args.max_target * sum(comb(args.max_number - args.min_number + k, k) for k in args.numbers)
    if sum(wanted.values()) > most:
        fail(f"--train, --val and --test ask for {sum(wanted.values())} problems; even if every target could be "
             f"reached there would be only {most}: ask for fewer, or raise --max_number or --max_target")

    problems = {split: [] for split in wanted}
    with tqdm(total=sum(wanted.values()), desc="problems", unit=" problems", delay=2) as bar:
        for done, k in enumerate(args.numbers):  # the smallest space first: what it cannot give, the next ones do
            share = {split: -(-(n - len(problems[split])) // (len(args.numbers) - done)) for split, n in wanted.items()}
            for split, made in draw(k, {s: n for s, n in share.items() if n}, args, rand, bar).items():
                problems[split] += made
    for split, n in wanted.items():
        if len(problems[split]) < n:
            fail(f"--{split} {n}: with these flags there are only {len(problems[split])} such problems: ask for fewer, "
                 "or raise --max_number, --max_target or --max_search, or allow every --difficulty")

    def rows(problem, times=1):
        for _ in range(times):
            trace, answer = teach(problem["nums"], problem["target"], rand, max_lines=args.max_lines,
                                  give_up=args.give_up, aim=args.aim, max_value=args.max_value)
            bar.update()
            yield {**problem, "trace": trace, "trace_answer": answer}

    files = {}
    with tqdm(total=sum(wanted.values()) + args.traces * args.train, desc="traces", unit=" traces", delay=2) as bar:
        for split, some in problems.items():
            rng.shuffle(some)
            for problem in some:
                rng.shuffle(problem["nums"])
            files[f"{split}.jsonl"] = [row for problem in some for row in rows(problem)]
        if args.traces and args.train:
            files["sft.jsonl"] = [row for problem in problems["train"] for row in rows(problem, args.traces)]
            rng.shuffle(files["sft.jsonl"])
    save(Path(args.out), files)
    for name, some in files.items():
        kinds = Counter(row["difficulty"] for row in some)
        solved = sum(row["trace"].endswith("ok") for row in some) / len(some)
        print(f"{Path(args.out, name)}: {len(some):,} rows, {', '.join(f'{kinds[c]:,} {c}' for c in CLASSES)}; "
              f"the teacher solves {solved:.0%}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("countdown.py: interrupted, nothing written", file=sys.stderr)
        sys.exit(130)
