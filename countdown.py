"""Countdown: reach a target from given numbers with + - * /, each used once. Makes problems, solves them, writes JSONL.

The solver, `solve(nums, target)` and `solutions(nums, target)`, is exact and goes through fractions where it must:
 1. A subset of the numbers is a bit mask. For each small subset, bottom-up, tabulate all values that it can reach.
    Negative values are left out: wherever a - b is below 0, b - a serves, with the sign moved outwards.
 2. From the target go top-down and meet the tables in the middle: split the numbers in two; each value a of the smaller
    part leaves at most six values b of the larger one with a ? b or b ? a equal to the target.
 3. Put the hits together in flat form: a sum is the terms added and the terms taken away, a product the factors above
    and below the line. So a-(b-c) = a+c-b, a/(b/c) = a*c/b and (a-b)*(c-d) = (b-a)*(d-c) are one solution. Two are
    distinct if no reordering, regrouping, moving of signs or swapping of equal numbers makes one from the other.
`solve` keeps only the shortest sum and the shortest product for each part: fewest parentheses, thus shortest overall.

The generator:
 4. Draw multisets of numbers in random order, none twice, and give each wholly to one of train, val and test: no two of
    the files share a multiset. A small space (3 numbers up to 12) is split in proportion to the rows asked for.
 5. Count for each multiset the expressions by value, as a player with whole numbers would try them: operands in either
    order are one expression, no result below 0 or above 9,999, exact division only.
 6. The search of a problem is how many expressions that player tries for each one that hits: all / hitting. easy: up to
    10, medium: up to 30, hard: more. (Up to 99: mostly 8-10 with 3 numbers, 25-500 with 4. Up to 12, 3 numbers: 7-40.)
    Extremes, under --min_search or above --max_search, and problems that need fractions are left out.
 7. Pick a target among those left, every one as likely. Once no fresh multiset is left, each gives further targets.
 8. Let the teacher play. It writes lines of running results, each with its verdict, until one hits:
        5+3=8 8*2=16 no
        5*2=10 10+3=13 ok
    With chance --aim a line is drawn among those that hit, else at random. After a miss it stops with chance --give_up,
    or at --max_lines, and answers with its last line. What RL has left to teach is aim and persistence.

Files in --out: train.jsonl, test.jsonl, val.jsonl (with --val), rows of {nums, target, solution, difficulty, trace,
trace_answer}; sft.jsonl: the train rows --traces times, each with its own trace. Same flags, same bytes on any machine.

    python countdown.py                                         # problems for Qwen2.5-3B, into data/countdown
    python countdown.py @recipes/tiny/countdown.txt             # three small numbers, for a model of 0.5 M parameters
"""
import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from itertools import chain, combinations_with_replacement, product, repeat
from math import comb, gcd
from operator import index
from pathlib import Path

from tqdm import tqdm

CLASSES = {"easy": 10, "medium": 30, "hard": float("inf")}  # name -> the largest search in it
LIMIT = 9_999                                               # the largest number of the player who defines the search
FRUITLESS = 1_000                                           # multisets drawn per problem found, beyond which we stop


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="countdown.py", description=__doc__.split("\n")[0], fromfile_prefix_chars="@",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    p.error = fail
    files, problems, teacher = (p.add_argument_group(title).add_argument for title in ("files", "problems", "teacher"))
    files("--out", default="data/countdown", help="folder whose train, val, test, sft.jsonl are replaced")
    files("--train", type=int, default=20_000, help="problems in train.jsonl")
    files("--val", type=int, default=0, help="problems in val.jsonl; 0: no such file")
    files("--test", type=int, default=1_000, help="problems in test.jsonl")
    files("--traces", type=int, default=1, help="rows of sft.jsonl per train problem; 0: no such file")
    files("--seed", type=int, default=0, help="same seed and flags, same bytes")
    problems("--numbers", type=int, nargs="+", default=[3, 4], help="how many numbers, in equal shares, 2 to 6")
    problems("--min_number", type=int, default=1, help="smallest given number")
    problems("--max_number", type=int, default=99, help="largest given number")
    problems("--max_target", type=int, default=99, help="targets are 1 to this")
    problems("--difficulty", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="keep these, see --max_search")
    problems("--min_search", type=float, default=2, help="leave out problems with fewer expressions per hit")
    problems("--max_search", type=float, default=10_000, help="and those with more; easy is up to 10, medium to 30")
    teacher("--max_lines", type=int, default=5, help="lines of a trace at most")
    teacher("--give_up", type=float, default=0.3, help="probability of stopping after a miss, 0 to 1")
    teacher("--aim", type=float, default=0.0, help="probability that a line is one that hits, 0 to 1")
    teacher("--max_value", type=int, default=99, help="largest result in a trace, if no given number is larger")
    try:
        a = p.parse_args(argv)
    except ValueError as e:  # a quote left open, bytes that are no text
        fail(f"a flag file cannot be read ({e})")
    bounds = {"train val test traces seed min_search": (0, 10**12), "max_lines max_value": (1, 10**12),
              "min_number max_number max_target": (1, LIMIT), "give_up aim": (0, 1), "numbers": (2, 6)}
    for names, (low, high) in bounds.items():
        for name in names.split():
            for value in a.numbers if name == "numbers" else [getattr(a, name)]:
                if not low <= value <= high:  # so written that nan is out of bounds
                    fail(f"--{name} {value}: must be from {low:,} to {high:,}")
    if not a.train + a.val + a.test:
        fail("--train, --val and --test are all 0: nothing to make")
    a.numbers = sorted(set(a.numbers))
    for low, high in (("min_number", "max_number"), ("min_search", "max_search")):
        if not getattr(a, low) <= getattr(a, high):
            fail(f"--{high} {getattr(a, high)}: must be at least --{low}, which is {getattr(a, low)}")
    return a


def fail(message):
    print(f"countdown.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- Solver. A value is a pair (numerator, denominator), reduced and never negative.
SUM, PRODUCT = 0, 1  # an expression is (kind, ups, downs): texts added and taken away, or above and below the line
LONGEST = {"key": lambda part: (len(part), part), "reverse": True}  # the order of the parts


@lru_cache(None)
def splits(mask):
    """All ways to cut a bit mask into two parts, the smaller one first. One side keeps the lowest bit: no cut twice."""
    cuts = [sub for sub in range(1, mask) if sub & mask == sub and sub & mask & -mask]
    return [sorted((sub, mask ^ sub), key=int.bit_count) for sub in cuts]


def reachable(nums, size):
    """Step 1: {mask: its values} for all subsets of up to `size` numbers."""
    tables = {1 << i: {(x, 1): None} for i, x in enumerate(nums)}  # dicts for sets: the same order in every process
    for mask in sorted((m for m in range(1, 1 << len(nums)) if 1 < m.bit_count() <= size), key=int.bit_count):
        values = tables[mask] = {}
        for (an, ad), (bn, bd) in chain(*(product(tables[left], tables[right]) for left, right in splits(mask))):
            x, y, d = an * bd, bn * ad, ad * bd  # a = x / d, b = y / d
            for n, m in ((x + y, d), (abs(x - y), d), (an * bn, d), (x, y), (y, x)):
                if m:
                    values[n // (g := gcd(n, m)), m // g] = None
    return tables


def partners(t, a):
    """Step 2: all (op, *b, swapped) with a op b = t, or b op a = t if swapped. b is not reduced, and may not exist."""
    (tn, td), (an, ad) = t, a
    x, y, d = tn * ad, an * td, td * ad  # t = x / d, a = y / d
    found = [("-", x + y, d, True), ("+" if x >= y else "-", abs(x - y), d, False)]
    if x == y:
        found.append(("-", 0, 1, False))
    if y:
        found += [("*", x, y, False), ("/", tn * an, d, True)]
    if x and y:
        found.append(("/", y, x, False))
    return found


def text(node):
    kind, ups, downs = node
    return "+*"[kind].join(ups) + "".join("-/"[kind] + part for part in downs)


def join(op, a, b, zero, unsigned):
    """Step 3: the flat form of a op b. zero: its value is 0, so that neither of its signs is the natural one. unsigned:
    the texts of value 0 met so far that are their own opposites, as (5-5) of two given fives; they are always added."""
    kind = SUM if op in "+-" else PRODUCT
    (a_ups, a_downs), (b_ups, b_downs) = (
        node[1:] if node[0] == kind else ((text(node) if kind == SUM else f"({text(node)})",), ()) for node in (a, b))
    if op in "-/":
        b_ups, b_downs = b_downs, b_ups
    ups, downs = sorted(a_ups + b_ups, **LONGEST), sorted(a_downs + b_downs, **LONGEST)
    own_opposite = kind == PRODUCT and not unsigned.isdisjoint(ups)
    if kind == SUM and (zero or unsigned):
        added = [s for s in ups + downs if s in unsigned]
        ups, downs = ([s for s in part if s not in unsigned] for part in (ups, downs))
        own_opposite = ups == downs
        if zero:
            ups, downs = max((ups, downs), (downs, ups))
        ups = sorted(ups + added, **LONGEST)
    node = kind, tuple(ups), tuple(downs)
    if zero and own_opposite:
        unsigned |= {text(node), f"({text(node)})"}
    return node


def expressions(nums, target, tables, every):
    """Steps 2 and 3: all flat forms that reach the target, or without `every` a shortest sum and product of them."""
    full, unsigned = (1 << len(nums)) - 1, set()

    @lru_cache(None)
    def find(mask, t):
        found = {}  # a dict for a set, as above
        for node in hits(mask, t):
            found[node] = None
            # Nothing beats a product without parentheses, nor, at the top, a sum without.
            if not every and "(" not in text(node) and (node[0] == PRODUCT or mask == full):
                break
        return list(found) if every else [min((node for node in found if node[0] == kind), key=lambda n: len(text(n)))
                                          for kind in sorted({node[0] for node in found})]

    def hits(mask, t):
        if mask.bit_count() == 1 and t in tables[mask]:
            yield PRODUCT, (str(t[0]),), ()
        for left, right in splits(mask):
            at_hand = tables.get(right)  # None: too large for a table, so that find() has to tell
            for a in tables[left]:
                choices = partners(t, a)
                if not t[0] and not a[0]:  # 0 = 0 * b = 0 / b whatever b is
                    choices += [(op, *b, False) for b in at_hand for op in "*/" if b[0] or op == "*"]
                for op, n, d, swapped in choices:
                    b = n // (g := gcd(n, d)), d // g
                    if at_hand is None or b in at_hand:
                        for x, y in product(find(left, a), find(right, b)):
                            yield join(op, *((y, x) if swapped else (x, y)), not t[0], unsigned)

    return find(full, target)


def solutions(nums, target, every=True):
    """All distinct solutions (see step 3), shortest first; without `every` a few of them, a shortest one first."""
    nums, target = [index(x) for x in nums], index(target)
    if not nums or min(nums) < 0:
        raise ValueError(f"nums {nums}: a problem has one or more numbers, none of them negative")
    # Tables of all but the two largest sizes are enough, unless a 0 makes "any value" an answer.
    tables = reachable(nums, len(nums) - (1 if 0 in (target, *nums) else 2))
    nodes = expressions(nums, (abs(target), 1), tables, every)
    if target < 0:
        nodes = [join("-", (SUM, (), ()), node, False, set()) for node in nodes]
    return sorted(map(text, nodes), key=lambda s: (len(s), s))


def solve(nums, target):
    """A shortest expression that uses each number once and equals the target, or None: solve([2, 3, 5], 13) = 5*2+3."""
    return next(iter(solutions(nums, target, every=False)), None)


# ---- Generator.
def count(nums):
    """Step 5: [mask] -> {value: number of whole-number expressions over the numbers in the mask that have it}."""
    tables = [{} for _ in range(1 << len(nums))]
    for i, x in enumerate(nums):
        tables[1 << i][x] = 1
    for mask, out in enumerate(tables):
        get = out.get
        for left, right in splits(mask):
            for (a, na), (b, nb) in product(tables[left].items(), tables[right].items()):
                n, (high, low) = na * nb, (a, b) if a >= b else (b, a)
                out[high - low] = get(high - low, 0) + n
                if (v := high + low) <= LIMIT:
                    out[v] = get(v, 0) + n
                if (v := high * low) <= LIMIT:
                    out[v] = get(v, 0) + n
                if low and not high % low:
                    out[high // low] = get(high // low, 0) + n
    return tables


def targets(ways, args):
    """Step 6: {target: difficulty} of the problems that numbers with these ways give."""
    total, fit = sum(ways.values()), {}
    for target, hitting in ways.items():
        search = total / hitting
        if 1 <= target <= args.max_target and args.min_search <= search <= args.max_search:
            fit[target] = next(name for name, largest in CLASSES.items() if search <= largest)
    return {target: difficulty for target, difficulty in fit.items() if difficulty in args.difficulty}


def multisets(k, low, high, rng):
    """Step 4: all multisets of k numbers from low to high, as sorted tuples, in random order."""
    seen, width = set(), high - low + 1
    while len(seen) < comb(width + k - 1, k) // 4:  # while most are fresh, drawing is cheaper than listing them all
        nums = tuple(sorted(low + int(rng.random() * width) for _ in range(k)))
        if nums not in seen:
            seen.add(nums)
            yield nums
    rest = [nums for nums in combinations_with_replacement(range(low, high + 1), k) if nums not in seen]
    rng.shuffle(rest)
    yield from rest


def draw(k, wanted, args, rng, bar):
    """Steps 4 to 7 for k numbers: {split: up to wanted[split] problems}."""
    made = {split: [] for split in wanted}       # problems
    used = {split: {} for split in wanted}       # multiset -> its targets so far
    room = dict.fromkeys(wanted, 0)              # how many problems the multisets allow in all

    def give(split, nums):
        """One more problem from these numbers to this split, if there is one. Returns how many they allow."""
        ways, taken = count(nums), used[split].setdefault(nums, [])
        fit = targets(ways[-1], args)
        if left := [t for t in fit if t not in taken]:
            target = left[int(rng.random() * len(left))]
            taken.append(target)
            tables = {mask: dict.fromkeys(zip(ways[mask], repeat(1))) for mask in range(1, len(ways) - 1)}
            solution = min(map(text, expressions(nums, (target, 1), tables, every=False)), key=len)
            problem = {"nums": rng.sample(nums, k), "target": target, "solution": solution, "difficulty": fit[target]}
            made[split].append(problem)
            bar.update()
        return len(fit)

    for drawn, nums in enumerate(multisets(k, args.min_number, args.max_number, rng)):
        short = [split for split in wanted if len(made[split]) < wanted[split]]
        if not short or drawn > FRUITLESS * (1 + sum(room.values())):
            break
        split = min(short, key=lambda split: room[split] / wanted[split])  # so that a small space is shared out evenly
        room[split] += give(split, nums)
    for split in wanted:  # no fresh multiset is left
        while len(made[split]) < min(wanted[split], room[split]):
            for nums in used[split]:
                if len(made[split]) < wanted[split]:
                    give(split, nums)
    return made


# ---- Teacher.
def teach(nums, target, rand, max_lines, give_up, aim, max_value):
    """Step 8: the trace and its answer, the last line's expression, right or wrong. No line comes twice."""
    lines, max_value = {}, max(max_value, *nums)  # line -> (verdict, expression), in the order of play
    for _ in range(50 * max_lines):  # few numbers give few lines: a bound, lest we wait for one that is not there
        for _ in range(200 if aim and rand() < aim else 1):  # 200: enough to hit with 3 numbers, nearly always
            line, value, expression = play(nums, rand, max_value)
            if value == target:
                break
        if line not in lines:
            lines[line] = "ok" if value == target else "no", expression
            if value == target or len(lines) == max_lines or rand() < give_up:
                break
    trace = "\n".join(f"{line} {verdict}" for line, (verdict, _) in lines.items())
    return {"trace": trace, "trace_answer": write([*lines.values()][-1][1])[0]}


def play(nums, rand, max_value):
    """One line of play: its text, its result and the expression it amounts to. Larger operand first, whole results."""
    hand, steps = [(x, x) for x in nums], []  # values, each with its expression: a number or (op, left, right)
    while len(hand) > 1:
        i, j = int(rand() * len(hand)), int(rand() * (len(hand) - 1))
        j += j >= i
        (a, x), (b, y) = (hand[i], hand[j]) if hand[i][0] >= hand[j][0] else (hand[j], hand[i])
        moves = [("-", a - b), ("+", a + b), ("*", a * b), ("/", a // b if b and not a % b else max_value + 1)]
        moves = [move for move in moves if move[1] <= max_value]
        op, value = moves[int(rand() * len(moves))]
        steps.append(f"{a}{op}{b}={value}")
        hand = [h for k, h in enumerate(hand) if k not in (i, j)] + [(value, (op, x, y))]
    return " ".join(steps), value, hand[0][1]


def write(expression):
    """The expression of a line in the line's own order, without needless parentheses, and how tightly it binds."""
    if isinstance(expression, int):
        return str(expression), 2
    op, a, b = expression
    (a, a_binds), (b, b_binds), binds = write(a), write(b), int(op in "*/")
    a = f"({a})" if a_binds < binds else a
    b = f"({b})" if b_binds < binds or (b_binds == binds and op in "-/") else b
    return a + op + b, binds


# ---- Files.
def save(folder, files):
    """Write {name: rows} into a temporary folder, then let them replace all that an earlier run left in this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            for name, rows in files.items():
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                Path(new, name).write_text(lines, encoding="utf-8", newline="\n")
            for name in ("train", "val", "test", "sft"):  # an old val.jsonl could share multisets with new train rows
                (folder / f"{name}.jsonl").unlink(missing_ok=True)
            for name in files:
                os.replace(Path(new, name), folder / name)
    except OSError as e:
        fail(f"--out {folder}: cannot write there ({e.strerror or e})")


def main(argv=None):
    args = parse_args(argv)
    rng, folder = random.Random(args.seed), Path(args.out)
    wanted = {split: n for split in ("test", "val", "train") if (n := getattr(args, split))}
    most = args.max_target * sum(comb(args.max_number - args.min_number + k, k) for k in args.numbers)
    if (n := sum(wanted.values())) > most:
        fail(f"--train, --val and --test ask for {n} problems, more than the {most} of --max_number and --max_target")
    if folder.is_file():
        fail(f"--out {folder}: is a file, not a folder")
    problems = {split: [] for split in wanted}
    with tqdm(total=sum(wanted.values()), desc="problems", unit="", delay=2, disable=None) as bar:
        for done, k in enumerate(args.numbers):  # the smallest space first: what it cannot give, the next ones do
            share = {split: -(-(n - len(problems[split])) // (len(args.numbers) - done)) for split, n in wanted.items()}
            for split, made in draw(k, {s: n for s, n in share.items() if n}, args, rng, bar).items():
                problems[split] += made
    if short := [f"{len(some)} of {wanted[s]} for --{s}" for s, some in problems.items() if len(some) < wanted[s]]:
        fail(f"only {', '.join(short)} fit these flags: ask for fewer, or raise --max_number, --max_target or --max_search")

    def taught(some, name):
        knobs = args.max_lines, args.give_up, args.aim, args.max_value
        some = tqdm(some, desc=f"traces of {name}", delay=2, disable=None)
        return [{**row, **teach(row["nums"], row["target"], rng.random, *knobs)} for row in some]

    for some in problems.values():
        rng.shuffle(some)
    files = {f"{split}.jsonl": taught(some, f"{split}.jsonl") for split, some in problems.items()}
    if args.traces and args.train:
        files["sft.jsonl"] = taught([row for row in problems["train"] for _ in range(args.traces)], "sft.jsonl")
        rng.shuffle(files["sft.jsonl"])
    save(folder, files)
    for name, rows in files.items():
        classes = Counter(row["difficulty"] for row in rows)
        print(f"{folder / name}: {len(rows):,} rows, {', '.join(f'{classes[c]:,} {c}' for c in CLASSES)}; "
              f"the teacher solves {sum(row['trace'].endswith('ok') for row in rows) / len(rows):.0%}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("countdown.py: interrupted, nothing written", file=sys.stderr)
        sys.exit(130)
