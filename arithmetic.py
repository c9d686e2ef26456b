"""Exact arithmetic on text: the value of an expression, and which equations of a reasoning hold. Nothing is executed."""
import ast
import operator
import re
from fractions import Fraction
from functools import lru_cache

SIGNS = {"\u00d7": "*", "\u00b7": "*", "\\times": "*", "\\cdot": "*", "\u00f7": "/", "\\div": "/", "\u2212": "-"}
SIGN = re.compile("|".join(map(re.escape, SIGNS)))
ONE_STEP = re.compile(r"(0|[1-9][0-9]*)([-+*/])(0|[1-9][0-9]*)")
ARITHMETIC = re.compile(r"(?!.*(?<![0-9.])0[0-9])[-+*/(). 0-9]+")  # no leading zeros


def divide(a, b):
    return a // b if type(a) is type(b) is int and b and a % b == 0 else Fraction(a) / b


OPERATORS = {ast.Add: ("+", 1, operator.add), ast.Sub: ("-", 1, operator.sub),
             ast.Mult: ("*", 2, operator.mul), ast.Div: ("/", 2, divide)}
OPPOSITE = {"+": "-", "-": "+"}
APPLY = {sign: apply for sign, _, apply in OPERATORS.values()}


def plain_signs(text):
    """`×`, `·`, `\\times`, `\\cdot` as `*`; `÷`, `\\div` as `/`; U+2212 as `-`."""
    return text if text.isascii() and "\\" not in text else SIGN.sub(lambda match: SIGNS[match[0]], text)


def evaluate(text):
    """One expression over numbers, + - * /, unary minus and parentheses -> (exact value, shortest way to write it), or None.

    Nothing is executed: the characters are checked, Python's parser only reads, and `value` takes the few nodes of this
    grammar. The shortest way leaves out spaces and needless parentheses; the order of the numbers stays.
    """
    if len(text) > 200:
        return None
    return (int(text), text) if text.isdecimal() and text.isascii() and text[0] != "0" else cached_value(text)


@lru_cache(4096)
def cached_value(text):
    try:
        if step := ONE_STEP.fullmatch(text):  # most sides of a reasoning's equations: no parser needed
            return APPLY[step[2]](int(step[1]), int(step[3])), text
        if not ARITHMETIC.fullmatch(text):
            return None
        return value(ast.parse(text.strip(), mode="eval").body)[:2]
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def negated(node):
    return type(node) is ast.UnaryOp and type(node.op) is ast.USub


def value(node):
    """A parsed expression -> (exact value, shortest text, rank: how tightly its outermost sign binds).

    rank: 1 for + and -, 2 for * and /, 3 for a leading minus, 4 for a number.
    """
    if type(node) is ast.Constant:
        number = node.value if type(node.value) is int else Fraction(repr(node.value))
        return number, str(number) if number.denominator == 1 else repr(node.value), 4
    if negated(node):
        if negated(node.operand):  # --3 is a padded 3
            return value(node.operand.operand)
        a, text, rank = value(node.operand)
        if rank > 1 and text[0] == "-":  # and so is -(-3*4) a padded 3*4
            return -a, text[1:], rank
        return (-a, f"-({text})", 3) if rank == 1 else (-a, f"-{text}", min(rank, 3))
    if type(node) is ast.BinOp and type(node.op) in OPERATORS:
        (sign, rank, _), right = OPERATORS[type(node.op)], node.right
        while rank == 1 and negated(right):  # 2--3 is a padded 2+3
            sign, right = OPPOSITE[sign], right.operand
        (a, left, left_rank), (b, right, right_rank) = value(node.left), value(right)
        result = APPLY[sign](a, b)
        left = left if left_rank >= rank else f"({left})"
        if right_rank < rank or right_rank == rank and sign in "-/":
            right = f"({right})"
        elif rank == 1 and right[0] == "-":  # 2+(-3+4) is a padded 2-3+4
            sign, right = OPPOSITE[sign], right[1:]
        return result, left + sign + right, rank
    raise ValueError("not arithmetic")


# ---------------------------------------------------------------------------------------------- equations

TERM = r"(?:-?\(+)?-?[0-9]{1,12}(?:\.[0-9]{1,9})?\)*"
SIDE = rf"{TERM}(?: ?[-+*/] ?{TERM})*"
EQUATIONS = re.compile(rf"(?<![-+*/^=.()\w\\])(?<![-+*/^=(] ){SIDE}(?: ?= ?{SIDE})+(?![\w(^\\]| ?[-+*/^]|\.[0-9])")
STEP, OPERAND = re.compile("[0-9)][-+*/]"), re.compile("[0-9.]+")  # of a side that is more than a number
MARKUP = re.compile(r"\$|`|\\[()\[\]]|\*\*(?:(?![0-9(])|(?<![0-9)]\*\*))")  # but 2**3 is a power
SPACES = re.compile(r"[ \t]{2,}|\t")
BULLETS = re.compile("(?m)^ ?[-*\u2022] ")
TIMES = re.compile("(?<=[0-9]) ?[xX] ?(?=[0-9])")
GROUPS = re.compile("(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def unwrapped(side):
    """A side without a bracket of the text around its equation: `(so 3+5=8)`."""
    surplus = side.count("(") - side.count(")")
    if surplus > 0 and side.startswith("(" * surplus):
        return side[surplus:]
    return side[:surplus] if surplus < 0 and side.endswith(")" * -surplus) else side


def played(side, result, pools):
    """Countdown: the numbers at hand after a step, for each of `pools` (lists of numbers at hand) that holds its operands."""
    operands = [Fraction(number) if "." in number else int(number) for number in OPERAND.findall(side)]
    reached = []
    for pool in pools:
        pool = pool.copy()
        try:
            for operand in operands:
                pool.remove(operand)
        except ValueError:  # not at hand
            continue
        reached.append([*pool, result])
    return reached


def share_true(text, nums=None):
    """Share of the distinct equations `3+5=8` of a text that are true; 0 where there is none.

    Repeating one earns nothing more. With `nums` (countdown) the operands must also be at hand at that point: given numbers,
    or results of true equations so far, each used up by the step that takes it. A step may go on from any point reached
    before, so that several tries start afresh. At most 200 equations count, and 64 points.
    """
    text = "\n".join([line for line in text.split("\n") if "=" in line])
    text = BULLETS.sub("", SPACES.sub(" ", plain_signs(MARKUP.sub(" ", text))))
    text = GROUPS.sub("", text) if "," in text else text
    text = TIMES.sub("*", text) if "x" in text or "X" in text else text
    pools, verdicts = [sorted(nums or ())], {}
    for chain in EQUATIONS.findall(text):
        sides = chain.replace(" ", "").split("=")
        sides = list(map(unwrapped, sides)) if "(" in chain or ")" in chain else sides
        for one, other in zip(sides, sides[1:]):
            steps = [side for side in (one, other) if not side.isdecimal() and STEP.search(side)]
            if not steps or len(verdicts) >= 200:
                continue
            left, right = evaluate(one), evaluate(other)
            key = (left[1] if left else one, right[1] if right else other)  # `2 + 3`, `(2+3)`, `2.0+3` are the same
            if key in verdicts:
                continue
            true = left is not None and right is not None and left[0] == right[0]
            if true and nums is not None:
                # A difference may be written either way round, and goes on as a positive number.
                moves = [played(side, abs(left[0]), pools) for side in steps]
                true = all(moves)
                pools += moves[-1][:64 - len(pools)] if true else []
            verdicts[key] = true
    return sum(verdicts.values()) / len(verdicts) if verdicts else 0.0
