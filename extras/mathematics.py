r"""Whether two answers in LaTeX are equal as mathematics: equal(gold, said).

1. Both are brought to one spelling (tidy). What is then spelled the same is equal.
2. Lists, sets, tuples and intervals are compared item by item, so that a list of guesses never equals one value.
3. A value without its unit goes to math-verify if it holds nothing but what math-verify is known to read as a person
   does (READABLE, UNCLEAR). Everything else (words, ratios, bases, names of angles, ...) has only its spelling.
4. math-verify runs in a worker that is killed after 2 s: its own timeouts work in a main thread only.
"""
import json
import os
import re
import select
import signal
import subprocess
import sys
from functools import lru_cache

SECONDS, MEMORY = 2, 2 << 30  # processor time of one comparison, bytes of a worker
LONGEST = 800  # characters of two values that math-verify gets to see
SIGNS = str.maketrans({
    "\u2212": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^\circ ", "π": r"\pi ", "~": " ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "±": r"\pm ", "∪": r"\cup ", "√": r"\sqrt "})
COMMANDS = {old: new for new, names in (
    (r"\frac", "dfrac tfrac cfrac"), (r"\binom", "dbinom tbinom"), (r"\cdot ", "times"), ("/", "div"), (r"\ne ", "neq"),
    (r"\le ", "leq leqslant"), (r"\ge ", "geq geqslant"), (r"\emptyset ", "varnothing"), (r"^\circ ", "degree"),
    (r"\text", "mbox textbf textrm mathrm"), ("...", "ldots dots cdots"), ("|", "lvert rvert"), (r"\{", "lbrace"),
    (r"\}", "rbrace"), (" ", "left right displaystyle , ; : ( ) [ ]"), ("%", "%")) for old in names.split()}
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in (
    (r"\\!\s*", ""), (r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
    # formulas with a wide space or a new line between them are a list
    (r"\\q?quad(?![a-z])|(?<=[^\s{=,&\\])(?<!matrix\})[ \t]*\n(?!\s*(?:[}=,&]|\\end|$))", ", "),
    (r"\\([a-zA-Z]+|.)|\$", lambda match: COMMANDS.get(match[1], match[0]) if match[1] else " "),
    (r"^[\s*`]*\\(?:boxed|fbox|mathbf|boldsymbol)\s*\{(.*)\}[\s.*`]*$|^\s*\*\*(.*)\*\*\s*$|^\s*`(.*)`\s*$", r"\1\2\3"),
    (r"\\text\s*\{\s*([ied])\s*\}", r" \1 "),  # an upright i, e or d is mathematics
    (r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})", r"\\text{degree}"), (r"%|\\text\s*\{\s*percent\s*\}", r"\\text{%}"),
    (r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|;", ", "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1"), (r"\{b?matrix\}", "{pmatrix}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\(frac|sqrt)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"\\log\s*_\s*(?:\{([0-9a-z]+)\}|([0-9a-z]))", r"\\log_{\1\2}"),
    (r"(?:^\s*-?|= ?-?|\\\$ ?)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", "")),
    (r"\s+", " "), (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),  # one stays in `1 2`, which is not 12, and in `\pi r`
    (r"(?<!\\log)_\{([0-9a-zA-Z])\}(?![0-9a-zA-Z])", r"_\1"), (r"^\+|(?<![.,])[.,]$", ""))]


def tidy(text):
    r"""One spelling for what is written in many ways: `\(\dfrac12\text{ cm}\)` and `$\frac{1}{2} \mathrm{~cm}$.`

    What is taken away leaves a space, so that `$7$ $2$` and `7 \quad 2` never become 72.
    """
    text = text.translate(SIGNS).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if text.count(r"\pm") == 1 and not re.search(r",|\\\{", text):  # `1\pm2` is a list
        text = text.replace(r"\pm", "+") + "," + text.replace(r"\pm", "-")
    return text


def spelled(text):
    r"""What two tidy texts are compared by where math-verify is not asked: `\text{Yes}` is `yes`, `(C)` is `C`."""
    text = re.sub(" +", " ", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text))
    text = re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)
    text = re.sub(r"\b(?:[A-Z](?=[a-z]{2})|N(?=o\b))", lambda match: match[0].lower(), text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)


UNITS = {alias: names.split()[0] for names in (
    "mm millimeter", "cm centimeter", "m meter", "km kilometer", "inch inche in", "foot feet ft", "yard yd", "mile mi",
    "acre", "liter L", "mL ml milliliter", "gram g", "kg kilogram", "pound lb", "second sec s", "minute min", "hour hr h",
    "day", "week", "month", "year", "cent", "dollar", "degree", "radian", "unit", "%", "mph", "m/s", "km/h",
) for alias in names.split()}
NO_UNIT = re.compile(  # plurals that change a value
    r".*(?:[sui]s|ths|ties|teens|illions)|(?:hal[fv]e|third|quarter|dozen|hundred|thousand|lakh|crore|pair|couple|time"
    r"|percent|percentile|negative|square|cube|factorial|root|power|base|log|one|two|three|four|five|six|seven|eight|nine"
    r"|ten|eleven|twelve|double|triple|score|opposite|inverse|reciprocal|half)s")
UNIT = re.compile(r"(?:\\text\{ ?(square |cubic )?([a-zA-Z%/]+)\.? ?\}|(?:(?<=[0-9]) |(?<=\}))([a-zA-Z]{2,}))"
                  r"(?:\^\{?([23])\}?)?$")
NAME = re.compile(r"(?:([a-zA-Z](?:_\w)?(?:\([a-z]\))?|\((?:x,y(?:,z)?|[ap],[bq]|a,b,c|m,n|r,s)\))(?:=|\\in(?![a-z])))?(.*)")


def without_unit(text):
    r"""A tidy value -> (the value without its unit, the unit): `12\text{cm}^2` -> (`12`, `cm2`); `7` -> (`7`, ``)."""
    if text.startswith((r"\$", r"-\$")):
        return text.replace(r"\$", "", 1), "dollar"
    if match := UNIT.search(text, 1):
        word = match[2] or match[3]
        unit = UNITS.get(word) or UNITS.get(word.removesuffix("s").replace("metre", "meter"))
        if not unit and re.search(r"[0-9]\\text\{ ?[a-z]{3,}s ?\}$", text) and not NO_UNIT.fullmatch(word):
            unit = word  # what is counted
        if unit:  # a list has it behind each item
            value = text[:match.start()].replace(match[0] + ",", ",")
            return value, unit + {"square ": "2", "cubic ": "3"}.get(match[1], match[4] or "")
    return text, ""


def equal(gold, said):
    """True where `said` is equal to `gold` as mathematics. Each side of a chain such as `3*6=18` must be the gold."""
    if len(said) > 2 * len(gold) + LONGEST:
        return False
    gold, said = tidy(gold), tidy(said)
    if "" in (gold, said) or spelled(gold) == spelled(said):
        return said != ""
    (name, value), (said_name, rest) = named(gold), named(said)
    if "=" in value or name and "=" in said and name != said_name:
        return "=" in said and asked(gold, said)
    value, unit = without_unit(value)
    return all(same_side(value, unit, *without_unit(side)) for side in rest.split("="))


def named(text):
    """A tidy text -> (the name that stands before its values, the values): `x=1,x=2` -> (`x`, `1,2`)."""
    name, values = NAME.fullmatch(text).groups()
    return name, values.replace(f",{name}=", ",")


def same_side(value, unit, side, side_unit):
    """Whether two values with their units, or without, are equal; 50% is 50 and 0.5, but 0.5% is not 0.5."""
    if unit == side_unit or "%" not in (unit, side_unit):
        return (not unit or not side_unit or unit == side_unit) and asked(value, side)
    percent, number = (value, side) if unit else (side, value)
    return asked(percent, rf"100\cdot({number})") or percent[0] in "123456789" and asked(percent, number)


def exact(text):
    """Decimals as fractions, mixed numbers as sums, `2(3)` as a product."""
    def fraction(match):
        whole, fixed, period = match[1], match[2], match[3] or ""
        top = int(whole + fixed + period) - (int(whole + fixed or 0) if period else 0)
        return rf"(\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1 or 1)}}})"
    decimal = r"(?:(?<=matrix\})|(?<![0-9.}]))([0-9]*)\.([0-9]*)(?:\\overline\{([0-9]+)\}|(?<=[0-9]))(?![0-9.]|\\overline)"
    mixed = r"(?<![\^_0-9}])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\}| [0-9]+/[0-9]+(?![0-9]))"
    text = re.sub(mixed, r"(\1+\2)", re.sub(decimal, fraction, text))
    return re.sub(r"(?<=[0-9)])(?=\(|\\binom)|(?<=\))(?=[0-9])", r"\\cdot ", text).replace(",", ", ")


FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log(?:_\{[0-9a-z]+\})?)(?![a-z])"
READABLE = re.compile(
    rf"(?:[-+*/^(){{}}=<>!| 0-9,\[\]&]|[a-zA-Z](?:_[0-9a-z]|_\{{[0-9a-z]+\}})?|{FUNCTION}|\\sqrt\[[0-9a-z]\]|\\[{{}}\\]"
    r"|\\(?:begin|end)\{pmatrix\}|\\(?:frac|sqrt|cdot|le|ge|ne|infty|cup|pm|binom|pi|alpha|beta|gamma|delta|theta|lambda"
    r"|mu|rho|sigma|(?:var)?phi|omega|[lr]floor|[lr]ceil)(?![a-zA-Z]))+")
UNCLEAR = re.compile("|".join((
    r"^[a-zA-Z ]{2,}$|(?<![\\a-z])(?!pmatrix)[a-z]{4}|(?<![\\a-zA-Z])[a-zA-Z]{2} [a-zA-Z]{2}|[A-Z]{2}",  # words, segments
    r"[0-9] [0-9]|(?<![\\a-zA-Z])[a-zA-Z]+[0-9]|[0-9]_|[0-9]e[0-9]|[0-9]\{|\*\*|^[*/^!]|[-+*/^_(=<>]$",  # x2, bases, 1e6
    r"\}(?<!matrix\})(?<!\\log_\{[0-9a-z]\})(?<!\\log_\{[0-9]{2}\})(?<!\^\{-1\})[0-9]",
    r"/(?!(?:[0-9]+|[a-z]|\\pi|\\sqrt\{[^{}]*\}|\([^()]*\))(?![0-9a-zA-Z(^]|\\(?!end|\\)))|" + FUNCTION + r"[^({+=]*/",  # `1/2x`
    r"[0-9a-zA-Z)}\]](?<!\\cup)[(\[][^)\]]*,|,.*=|=.*,",  # commas of functions, lists of equations
    r"[a-zA-Z]\^\{?-1\}?\(|\\frac\{d[^{}]*\}\{d",  # an inverse function, a derivative
    r"(?<![0-9a-z)])!|\^[^{ ]*!|\}!|!!|[0-9]{4}!|\)!\)?!|[0-9]\)!",  # factorials of what, or large ones
    r"(?:[({][^)}]*){9}|\|.*\|.*\||\^[({]*-?[0-9]*\^|\^[{(-]*[0-9]{5}|\\binom\{?[0-9]{4}|(?:[)}]\^\{?[0-9]{2}.*){2}")))


def asked(gold, said):
    """What math-verify says of two tidy values that it reads as a person does, else False."""
    if spelled(gold) == spelled(said):
        return True
    if re.fullmatch("[-+]?[0-9]+", gold) and re.fullmatch("[-+]?[0-9]+", said):
        return int(gold) == int(said)
    gold, said = exact(gold), exact(said)
    if len(gold + said) > LONGEST or not READABLE.fullmatch(gold + said) or UNCLEAR.search(gold) or UNCLEAR.search(said):
        return False
    commas, opened, closed = ([text.replace(r"\pm", ",").count(mark) for text in (gold, said)] for mark in ",[]")
    if all(commas) and any(counts[0] != counts[1] for counts in (commas, opened, closed)):
        return False  # a set forgets that it held something twice, and `[5,2]` is read as `(5,2)`
    return verdict(gold, said)


IDLE = []  # workers that wait for something to compare
os.register_at_fork(after_in_child=IDLE.clear)  # a pipe has one user


@lru_cache(4096)
def verdict(gold, said):
    """What a worker says; False where it cannot tell within its time."""
    try:
        worker = IDLE.pop()
    except IndexError:
        worker = subprocess.Popen([sys.executable, __file__], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        worker.stdin.write(json.dumps([gold, said]).encode())
        if select.select([worker.stdout], [], [], 60)[0] and (reply := worker.stdout.read(1)):  # 60 s: it may have to start
            IDLE.append(worker)
            return reply == b"1"
    except OSError:
        pass
    worker.kill()
    worker.communicate()
    return False


def work():
    """A worker: answers 1 or 0 to each pair, until its input ends with the process that asks, or a signal kills it."""
    import resource

    import math_verify  # noqa: F401
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while request := os.read(0, 1 << 16):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills, also in the middle of a multiplication of large numbers
        try:
            right = compared(*json.loads(request))
        except MemoryError:
            return
        except Exception:  # no mathematics, or of a kind that the library cannot do
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, b"1" if right else b"0")


def compared(gold, said):
    """What math-verify says of two expressions, two matrices, two relations, or two sets (one may be a relation)."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import verify
    from sympy import And, Expr, I, Interval, Rational, Symbol, Union, simplify
    from sympy.core.relational import Relational
    config = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
    a, b = (latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config).subs(
        Symbol("i", real=True), I) for text in (gold, said))
    if isinstance(a, Relational) and isinstance(b, Relational):  # one is the other, times a number
        ratios = [simplify((a.lhs - a.rhs) / (c.lhs - c.rhs)) for c in (b, b.reversed) if c.rel_op == a.rel_op]
        return any(ratio.is_number and ratio.is_positive for ratio in ratios)
    if isinstance(a, Expr) and isinstance(b, Expr):
        point = {symbol: Rational(100 + 37 * i, 71 + i) for i, symbol in enumerate((a - b).free_symbols)}
        gap = (a - b).doit().subs(point).evalf(30)
        if gap.is_number and abs(gap) > 1e-12:  # different at one point: no need to prove it
            return False
    relations, ranges = [[isinstance(x, kind) for x in (a, b)] for kind in ((Relational, And), (Interval, Union))]
    alike = type(a) is type(b) or isinstance(a, Expr) and isinstance(b, Expr) or any(relations) and any(ranges)
    return alike and verify(a, b, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)


if __name__ == "__main__":
    work()
