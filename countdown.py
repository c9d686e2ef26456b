"""Make Countdown problems (reach a target from given numbers with + - * /, each used once), as JSONL.

The solver (steps 1 to 3: `solve`, `solutions`) is exact, with fractions; steps 4 to 8 make the data.
 1. A subset of the numbers is a bit mask. Bottom-up, tabulate the values that each small subset reaches. None
    is negative: wherever a - b is below 0, b - a serves, with the sign moved outwards.
 2. Search top-down and meet the tables in the middle: split the numbers in two; each value a of the smaller
    part leaves at most six values b of the larger one with a ? b or b ? a equal to the target.
 3. Write each hit in flat form: terms added and subtracted, or factors above and below a line. It stands for
    all orders, groupings and signs: (a-b)*(c-d) = (b-a)*(d-c). But +(5-5)*2 and -(5-5)*2 count as two.
 4. Draw multisets of numbers in random order, none twice and none of --exclude; give each to one split only.
 5. Count its expressions by value, as a player with whole numbers would try them: operands in either order
    are one expression, no result is below 0 or above 9,999, divisions are exact.
 6. The search of a problem is the number of expressions tried per hit, all / hitting: easy up to 10, medium
    up to 30, else hard. Outside --min_search and --max_search, or if it needs fractions, it is left out.
 7. Pick a target uniformly. Once no fresh multiset is left, each gives further targets.
 8. The teacher writes lines of running results, each with its verdict, until one hits:
        5+3=8 8*2=16 no
        5-3=2 2+2=4 no
        5*3=15 15-2=13 ok
    It goes through the first equations in a fixed order, from a random one on, and then plays at random. With
    probability --aim it draws a line among those that hit. After its first miss it gives up with probability
    --give_up; else it plays on, up to --max_lines. It answers with its last line. RL has aim to teach.

Rows have nums, target, solution, difficulty, trace, trace_answer; sft.jsonl has --traces rows per
problem, each with its numbers in an order of its own.

    python countdown.py                                   # problems for Qwen2.5-3B, into data/countdown
    python countdown.py @recipes/tiny/countdown.txt       # three small numbers, for a tiny model
"""
import argparse
import json
import random
import shlex
import signal
import sys
import tempfile
from collections import namedtuple
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, cycle, product
from math import ceil, comb, gcd
from pathlib import Path

from tqdm import tqdm

CLASSES = {"easy": 10, "medium": 30, "hard": float("inf")}  # name -> the largest search in it
LIMIT = 9_999           # the largest number of the player of step 5

def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)

def flag_parser():
    """argparse that also reads @FILE, flags as in a shell with # comments, and whose errors are one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.error = fail
    return parser

def parse_args(argv=None):
    parser = flag_parser()
    add = parser.add_argument_group("files").add_argument
    add("--out", default="data/countdown", help="folder whose train, val, test and sft.jsonl are replaced")
    add("--train", type=int, default=20_000, help="problems in train.jsonl")
    add("--val", type=int, default=0, help="problems in val.jsonl; 0: no such file")
    add("--test", type=int, default=1_000, help="problems in test.jsonl")
    add("--traces", type=int, default=1, help="rows of sft.jsonl per train problem; 0: no such file")
    add("--seed", type=int, default=0, help="random seed; same seed and flags, same bytes")
    add = parser.add_argument_group("problems").add_argument
    add("--numbers", type=int, nargs="+", choices=range(2, 7), default=[3, 4],
        help="numbers per problem, in equal shares")
    add("--max_number", type=int, default=99, help="given numbers are 1 to this")
    add("--max_target", type=int, default=99, help="targets are 1 to this")
    add("--min_search", type=float, default=2, help="leave out problems with fewer expressions per hit")
    add("--max_search", type=float, default=10_000, help="and those with more; to 10 is easy, to 30 medium")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="JSONL files whose multisets are left out")
    add = parser.add_argument_group("teacher").add_argument
    add("--max_lines", type=int, default=5, help="maximum number of lines in a trace")
    add("--give_up", type=float, default=0.3, help="probability that it stops after its first miss")
    add("--aim", type=float, default=0.0, help="probability that a line is one that hits")
    add("--max_value", type=int, default=99, help="largest result in a trace, if no given number is larger")
    try:
        args = parser.parse_args(argv)
    except ValueError as err:                               # a quote left open, bytes that are not text
        fail(f"a flag file cannot be read: {err}")
    bounds = {"max_number": (1, LIMIT), "max_target": (1, LIMIT), "max_lines": (1, LIMIT), "give_up": (0, 1),
              "aim": (0, 1)}
    for name, value in vars(args).items():
        low, high = bounds.get(name, (0, 2**32))
        if isinstance(value, (int, float)) and not low <= value <= high:    # nan is out of bounds too
            fail(f"--{name} {value}: must be from {low:,} to {high:,}")
    if not args.train + args.val + args.test:
        fail("--train, --val and --test are all 0: nothing to make")
    if Path(args.out).is_file():
        fail(f"--out {args.out}: is a file, not a folder")
    return args


# ---- Solver. A value is a pair (numerator, denominator), reduced and never negative.
# node[SUM] is its text as a term, node[PRODUCT] as a factor; ups are added or above the line, downs not.
Node = namedtuple("Node", "text factor kind ups downs")
SUM, PRODUCT, NUMBER = 0, 1, 2
LONGEST = [lambda part: (len(part.text), part.text), lambda part: (len(part.factor), part.factor)]

@lru_cache(None)
def splits(mask):
    """All ways to cut a bit mask in two, smaller part first. One part keeps the lowest bit: no cut twice."""
    cuts = [sub for sub in range(1, mask) if sub & mask == sub and sub & mask & -mask]
    return [sorted((sub, mask ^ sub), key=int.bit_count) for sub in cuts]

def reachable(nums, size):
    """Step 1: {mask: its values} for all subsets of up to `size` numbers."""
    tables = {1 << i: {(x, 1): None} for i, x in enumerate(nums)}  # dicts as sets: their order is fixed
    for mask in [mask for mask in range(1 << len(nums)) if 1 < mask.bit_count() <= size]:
        values = tables[mask] = {}
        for left, right in splits(mask):
            for (an, ad), (bn, bd) in product(tables[left], tables[right]):
                x, y, d = an * bd, bn * ad, ad * bd         # a = x / d, b = y / d
                for n, m in ((x + y, d), (abs(x - y), d), (an * bn, d), (x, y), (y, x)):
                    if m:
                        divisor = gcd(n, m)
                        values[n // divisor, m // divisor] = None
    return tables

def partners(t, a):
    """Step 2: all (op, *b, swapped) with a op b = t, or b op a = t if swapped. b may not be reduced."""
    (tn, td), (an, ad) = t, a
    x, y, d = tn * ad, an * td, td * ad                     # t = x / d, a = y / d
    found = [("-", x + y, d, True), ("+" if x >= y else "-", abs(x - y), d, False)]
    if x == y:
        found.append(("-", 0, 1, False))
    if y:
        found += [("*", x, y, False), ("/", tn * an, d, True)]
    if x and y:
        found.append(("/", y, x, False))
    return found

def flat(kind, ups, downs):
    """The sum or product of these nodes, the longest first."""
    ups, downs = sorted(ups, key=LONGEST[kind], reverse=True), sorted(downs, key=LONGEST[kind], reverse=True)
    text = "+*"[kind].join([up[kind] for up in ups]) + "".join(["-/"[kind] + down[kind] for down in downs])
    return Node(text, f"({text})" if kind == SUM else text, kind, ups, downs)

def parts(node, kind):
    """(ups, downs) of a node inside a sum or product: its own if it is one too, else the node itself."""
    return (node.ups, node.downs) if node.kind == kind else ([node], [])

def join(op, a, b, zero):
    """Step 3: the flat form of a op b. zero: its value is 0, so neither of its signs is the natural one."""
    kind = SUM if op in "+-" else PRODUCT
    (a_ups, a_downs), (b_ups, b_downs) = parts(a, kind), parts(b, kind)
    if op in "-/":
        b_ups, b_downs = b_downs, b_ups
    node = flat(kind, a_ups + b_ups, a_downs + b_downs)
    if zero and kind == SUM:
        return max(node, flat(SUM, node.downs, node.ups), key=lambda either: either.ups)
    return node

def opposite(node):
    """The shortest form of -node: 3-8 for 8-3, (3-5)*2 for (5-3)*2. Only without a minus it is longer."""
    ups, downs = parts(node, SUM)
    if downs or "-" not in node.text:
        return flat(SUM, downs, ups)
    part = next(part for part in node.ups + node.downs if "-" in part.text)
    flipped = opposite(part)
    if node.kind == SUM:
        return flat(SUM, [flipped], [term for term in ups if term is not part])
    ups, downs = ([flipped if factor is part else factor for factor in side] for side in node[-2:])
    return flat(PRODUCT, ups, downs)

def expressions(nums, target, tables, every):
    """Steps 2 and 3: all flat forms that reach the target, or without `every` a shortest sum and product."""
    full = (1 << len(nums)) - 1

    @lru_cache(None)
    def find(mask, t):
        found = {}                                          # node by text, or the shortest by kind
        for node in hits(mask, t):
            key = node.text if every else node.kind
            if key not in found or len(node.text) < len(found[key].text):
                found[key] = node
            # Nothing is shorter than a product without parentheses, nor, at the top, than a sum without.
            if not every and "(" not in node.text and (node.kind == PRODUCT or mask == full):
                break
        return [found[key] for key in sorted(found)]

    def hits(mask, t):
        if mask.bit_count() == 1 and t in tables[mask]:
            yield Node(str(t[0]), str(t[0]), NUMBER, [], [])
        for left, right in splits(mask):
            at_hand = tables.get(right)                     # None: no table, find() has to tell
            for a in tables[left]:
                choices = partners(t, a)
                if not t[0] and not a[0]:                   # 0 = 0 * b = 0 / b whatever b is
                    choices += [(op, *b, False) for b in at_hand for op in "*/" if b[0] or op == "*"]
                for op, n, d, swapped in choices:
                    divisor = gcd(n, d)
                    b = n // divisor, d // divisor
                    if at_hand is None or b in at_hand:
                        for x, y in product(find(left, a), find(right, b)):
                            yield join(op, y, x, not t[0]) if swapped else join(op, x, y, not t[0])

    return find(full, target)

def solutions(nums, target, every=True):
    """All distinct solutions (see step 3), shortest first; without `every` a few, a shortest one first."""
    if not nums or min(nums) < 0:
        raise ValueError(f"nums {nums}: one or more numbers are needed, none of them negative")
    # Tables of all but the two largest sizes are enough, unless a 0 makes "any value" an answer.
    tables = reachable(nums, len(nums) - (1 if 0 in (target, *nums) else 2))
    found = expressions(nums, (abs(target), 1), tables, every or target < 0)
    if target < 0:                                          # this may change which is the shortest
        found = map(opposite, found)
    return sorted((node.text for node in found), key=lambda text: (len(text), text))

def solve(nums, target):
    """A solution of the fewest characters, or None: solve([2, 3, 5], 13) = "5*2+3"."""
    return next(iter(solutions(nums, target, every=False)), None)


# ---- Generator.
def count(nums):
    """Step 5: [mask] -> {value: number of whole-number expressions of the mask's numbers that have it}."""
    tables = [{} for _ in range(1 << len(nums))]
    for i, x in enumerate(nums):
        tables[1 << i][x] = 1
    for mask, ways in enumerate(tables):
        for left, right in splits(mask):
            for (a, a_ways), (b, b_ways) in product(tables[left].items(), tables[right].items()):
                high, low = (a, b) if a >= b else (b, a)
                values = [high - low, high + low, high * low]
                if low and high % low == 0:
                    values.append(high // low)
                for value in values:
                    if value <= LIMIT:
                        ways[value] = ways.get(value, 0) + a_ways * b_ways
    return tables

def multisets(k, high, rng):
    """Step 4: all multisets of k numbers from 1 to high, as sorted tuples, in random order."""
    seen = set()
    while len(seen) < comb(high + k - 1, k) // 4:           # while most are fresh: cheaper than listing
        nums = tuple(sorted(1 + int(rng.random() * high) for _ in range(k)))
        if nums not in seen:
            seen.add(nums)
            yield nums
    rest = [nums for nums in combinations_with_replacement(range(1, high + 1), k) if nums not in seen]
    rng.shuffle(rest)
    yield from rest

def draw(k, wanted, args, rng, bar):
    """Steps 4 to 7 for k numbers: {split: up to wanted[split] problems}."""
    made = {split: [] for split in wanted}      # problems
    used = {split: {} for split in wanted}      # multiset -> its targets so far
    room = dict.fromkeys(wanted, 0)             # how many problems the multisets allow in all

    def give(split, nums):
        """Add a problem with these numbers, if there is one left. Returns how many they allow."""
        ways = count(nums)
        total = sum(ways[-1].values())
        searches = {target: total / n for target, n in ways[-1].items() if 1 <= target <= args.max_target}
        searches = {target: n for target, n in searches.items() if args.min_search <= n <= args.max_search}
        taken = used[split].setdefault(nums, [])
        free = [target for target in searches if target not in taken]
        if free:
            target = free[int(rng.random() * len(free))]
            taken.append(target)
            tables = {mask: {(value, 1): None for value in ways[mask]} for mask in range(1, len(ways) - 1)}
            found = expressions(nums, (target, 1), tables, every=False)
            made[split].append({
                "nums": rng.sample(nums, k), "target": target,
                "solution": min((node.text for node in found), key=len),
                "difficulty": next(name for name, largest in CLASSES.items() if searches[target] <= largest)})
            bar.update()
        return len(searches)

    for drawn, nums in enumerate(multisets(k, args.max_number, rng)):
        short = [split for split in wanted if len(made[split]) < wanted[split]]
        if not short or drawn > 1_000 * (1 + sum(room.values())):     # hardly any fit
            break
        split = min(short, key=lambda split: room[split] / wanted[split])
        room[split] += 0 if nums in args.exclude else give(split, nums)
    for split in wanted:                                    # no fresh multiset is left
        for nums in cycle(used[split]):
            if len(made[split]) >= min(wanted[split], room[split]):
                break
            give(split, nums)
    return made


# ---- Teacher.
def moves(values, max_value):
    """All steps with two of these numbers, in a fixed order: {equation: (i, j, operator, result)}. Larger
    operand first, whole results up to max_value."""
    found = {}
    for i, j in combinations(range(len(values)), 2):
        if values[i] < values[j]:
            i, j = j, i
        a, b = values[i], values[j]
        results = {"+": a + b, "-": a - b, "*": a * b}
        if b and a % b == 0:
            results["/"] = a // b
        found |= {f"{a}{op}{b}={x}": (i, j, op, x) for op, x in results.items() if x <= max_value}
    return found

def play(nums, first, rand, max_value):
    """A line that begins with the equation `first`, then plays at random: its text, result, expression."""
    hand, steps = [(x, str(x), 2) for x in nums], []        # (value, expression, how tightly it binds)
    while len(hand) > 1:
        choices = moves([value for value, _, _ in hand], max_value)
        steps.append(list(choices)[int(rand() * len(choices))] if steps else first)
        i, j, op, value = choices[steps[-1]]
        (_, x, x_binds), (_, y, y_binds) = hand[i], hand[j]
        binds = int(op in "*/")
        if x_binds < binds:
            x = f"({x})"
        if y_binds < binds or (y_binds == binds and op in "-/"):
            y = f"({y})"
        hand = [held for k, held in enumerate(hand) if k not in (i, j)] + [(value, x + op + y, binds)]
    return " ".join(steps), value, hand[0][1]

def teach(nums, target, rand, args):
    """Step 8: the trace and its answer, the last line's expression, right or wrong."""
    lines, max_value = [], max(args.max_value, *nums)
    firsts = list(moves(nums, max_value))                   # those that are left
    start = int(rand() * len(firsts))
    firsts = firsts[start:] + firsts[:start]
    while True:
        aims = args.aim and rand() < args.aim
        for _ in range(200 if aims else 1):                 # 200 nearly always hit
            first = firsts[int(rand() * len(firsts)) if aims else 0]
            line, value, said = play(nums, first, rand, max_value)
            if value == target:
                break
        firsts.remove(first)
        lines.append(f"{line} {'ok' if value == target else 'no'}")
        gives_up = len(lines) == args.max_lines or len(lines) == 1 and rand() < args.give_up
        if value == target or gives_up or not firsts:
            return {"trace": "\n".join(lines), "trace_answer": said}


# ---- Files.
def save(folder, files):
    """Write {name: rows} to a temporary folder, then replace an earlier run's files, ignoring signals."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            for name, rows in files.items():
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                Path(new, f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
            handlers = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
            for name in ("train", "val", "test", "sft"):    # an old val.jsonl may share multisets
                (folder / f"{name}.jsonl").unlink(missing_ok=True)
            for name in files:
                Path(new, f"{name}.jsonl").replace(folder / f"{name}.jsonl")
            for n, handler in handlers.items():
                signal.signal(n, handler)
    except OSError as err:
        fail(f"--out {folder}: cannot write there ({err.strerror or err})")

def main(argv=None):
    args = parse_args(argv)
    try:
        args.exclude = {tuple(sorted(json.loads(row)["nums"])) for file in args.exclude for row in open(file)}
    except (OSError, ValueError, KeyError, TypeError) as err:
        fail(f"--exclude: {err!r}")
    rng, folder, kinds = random.Random(args.seed), Path(args.out), sorted(set(args.numbers))
    wanted = {"test": args.test, "val": args.val, "train": args.train}
    files = {split: [] for split, n in wanted.items() if n}
    with tqdm(total=sum(wanted.values()), desc="problems", unit="", delay=2, disable=None) as bar:
        for left, k in zip(range(len(kinds), 0, -1), kinds):  # the next ones fill the gaps of a small space
            share = {split: ceil((wanted[split] - len(rows)) / left) for split, rows in files.items()}
            for split, rows in draw(k, share, args, rng, bar).items():
                files[split] += rows
    for split, rows in files.items():
        if len(rows) < wanted[split]:
            fail(f"--{split} {wanted[split]}: only {len(rows)} problems; raise --max_number or --max_search")
        rng.shuffle(rows)
    if args.traces and args.train:
        files["sft"] = [{**row, "nums": rng.sample(row["nums"], len(row["nums"]))}
                        for row in files["train"] for _ in range(args.traces)]
    for name, rows in files.items():
        for i, row in enumerate(tqdm(rows, desc=f"traces of {name}", delay=2, disable=None)):
            rows[i] = {**row, **teach(row["nums"], row["target"], rng.random, args)}
    rng.shuffle(files.get("sft", []))
    save(folder, files)
    for name, rows in files.items():
        solved = sum(row["trace"].endswith("ok") for row in rows) / len(rows)
        counts = ", ".join(f"{sum(row['difficulty'] == x for row in rows):,} {x}" for x in CLASSES)
        print(f"{folder / name}.jsonl: {len(rows):,} rows, {counts}; the teacher solves {solved:.0%}")
    print(f"wrote {folder}: next, python sft.py (or grpo.py) --data countdown={folder}")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C: temporary files are removed
    try:
        main()
    except KeyboardInterrupt:
        print("countdown.py: interrupted, no file is half-written", file=sys.stderr)
        sys.exit(130)
