r"""Whether two answers in LaTeX are equal as mathematics: equal(gold, said).

1. Both are brought to one spelling (tidy). What is then spelled the same is equal.
2. A value without its name and unit goes to math-verify if math-verify is known to read all of it as a person
   does (READABLE, UNCLEAR). All else (words, ratios, bases, ...) is compared by its spelling alone.
3. math-verify runs in a worker that is killed after 2 s: its own timeouts work in a main thread only.
"""
import os
import re
import resource
import select
import signal
import subprocess
import sys
from functools import lru_cache

SECONDS, MEMORY, LONGEST = 2, 2 << 30, 800  # of one comparison: processor time, bytes, characters
IDLE = []  # workers that wait for something to compare
os.register_at_fork(after_in_child=IDLE.clear)  # a pipe has one user
SIGNS = str.maketrans({
    "\u2212": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^\circ ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∪": r"\cup ", "√": r"\sqrt ", "~": " "})
COMMANDS = {old: new for new, names in (
    (r"\frac", "dfrac tfrac cfrac"), (r"\binom", "dbinom tbinom"), (r"\cdot ", "times"), ("/", "div"),
    (r"\le ", "leq leqslant"), (r"\ge ", "geq geqslant"), (r"\ne ", "neq"), ("%", "%"), ("|", "lvert rvert"),
    (r"\emptyset ", "varnothing"), (r"\text", "mbox textbf textrm mathrm"), ("...", "ldots dots cdots"),
    (r"^\circ ", "degree"), (" ", "left right displaystyle , ; : ( ) [ ]")) for old in names.split()}
REWRITES = [(re.compile(pattern, re.S), new) for pattern, new in (
    (r"\\!\s*", ""), (r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
    (r"\\q?quad(?![a-z])|(?<=[^\s{=,&\\])(?<!matrix\})[ \t]*\n(?!\s*(?:[}=,&]|\\end|$))", ", "),
    (r"\\([a-zA-Z]+|.)|\$", lambda match: COMMANDS.get(match[1], match[0]) if match[1] else " "),
    (r"^[\s*`]*\\(?:boxed|fbox|mathbf|boldsymbol)\s*\{(.*)\}[\s.*`]*$", r"\1"),
    (r"^\s*\*\*(.*)\*\*\s*$|^\s*`(.*)`\s*$", r"\1\2"),
    (r"\\text\s*\{\s*([ied])\s*\}", r" \1 "),  # an upright i, e or d is mathematics
    (r"\^\s*(?:\\circ(?![a-z])|\{ ?\\circ ?\})", r"\\text{degree}"), (r"%|\\text\{ ?percent\}", r"\\text{%}"),
    (r"([^a-zA-Z\s])\s*(?:\\text\s*\{\s*,?\s*(?:or|and)\s*\}|,?\s(?:or|and)\b(?![^{}]*\})|;)", r"\1, "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1"), (r"\{b?matrix\}", "{pmatrix}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\(frac|sqrt)\s*([0-9a-zA-Z])", r"\\\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"\\log\s*_\s*(?:\{([0-9a-z]+)\}|([0-9a-z]))", r"\\log_{\1\2}"),
    (r"(?:^\s*-?|= ?-?|\\\$ ?)[1-9]\d?\d?(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", "")),
    (r"\s+", " "), (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),  # one stays in `1 2` and in `\pi r`
    (r"(?<!\\log)_\{([0-9a-zA-Z])\}(?![0-9a-zA-Z])", r"_\1"), (r"^\+|(?<![.,])[.,]$", ""))]
UNITS = {alias: names.split()[0] for names in (
    "mm millimeter", "cm centimeter", "m meter", "km kilometer", "inch inche in", "foot feet ft", "day",
    "mile", "liter L", "gram g", "kg kilogram", "pound", "second s", "minute min", "hour h", "week", "month",
    "yard", "year", "cent", "dollar", "degree", "radian", "unit", "m/s", "%") for alias in names.split()}
NO_UNIT = re.compile(  # plurals that change a value
    r".*(?:[sui]s|ths|ties|teens|illions)|(?:hal[fv]e|half|third|quarter|dozen|hundred|thousand|pair|time"
    r"|couple|percent|percentile|negative|square|cube|factorial|root|power|base|log|double|triple|opposite"
    r"|score|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)s")
UNIT = re.compile(r"(?:\\text\{ ?(square |cubic )?([a-zA-Z%/]+)\.? ?\}|(?:(?<=[0-9]) |(?<=\}))([a-zA-Z]{2,}))"
                  r"(?:\^\{?([23])\}?)?$")
NAME = re.compile(r"(?:([a-zA-Z](?:_\w)?(?:\([a-z]\))?|[A-Z]{2,3}|\((?:x,y(?:,z)?|[ap],[bq]|a,b,c|m,n|r,s)\))"
                  r"(?:=|\\in(?![a-z])|∈))?(.*)", re.S)
FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log(?:_\{[0-9a-z]+\})?)(?![a-z])"
NUMBER = r"([-+]?)\(?(?:\\frac\{)?([0-9]+)(?:\}\{([1-9][0-9]*)\})?\)?"
READABLE = re.compile(
    rf"(?:[-+*/^(){{}}=<>!| \n0-9,\[\]&]|[a-zA-Z](?:_[0-9a-z]|_\{{[0-9a-z]+\}})?|{FUNCTION}|\\[{{}}\\]"
    r"|\\sqrt\[[0-9a-z]\]|\\(?:begin|end)\{pmatrix\}|\\(?:frac|sqrt|cdot|le|ge|ne|infty|cup|pm|binom|pi|alpha"
    r"|beta|gamma|delta|theta|lambda|mu|rho|sigma|(?:var)?phi|omega|[lr]floor|[lr]ceil)(?![a-zA-Z]))+")
UNCLEAR = re.compile("|".join((
    r"^[a-zA-Z ]{2,}$|(?<![\\a-z])(?!pmatrix)[a-z]{4}|(?<![\\a-zA-Z])[a-zA-Z]{2} [a-zA-Z]{2}|[A-Z]{2}",
    r"[0-9] [0-9]|(?<![\\a-zA-Z])[a-zA-Z]+[0-9]|[0-9]_|[0-9]e[0-9]|[0-9]\{|\*\*|--|^[*/^!]|[-+*/^_(=<>]$",
    r"\}(?<!matrix\})(?<!\\log_\{[0-9a-z]\})(?<!\\log_\{[0-9]{2}\})(?<!\^\{-1\})[0-9]",  # `\frac{1}{2}3`
    r"/(?!(?:[0-9]+|[a-z]|\\pi|\\sqrt\{[^{}]*\}|\([^()]*\))(?![0-9a-zA-Z(^]|\\(?!end|\\)))",  # `1/2x`
    FUNCTION + r"[^({+=\n]*/", r"[0-9a-zA-Z)}\]](?<!\\cup)[(\[][^)\]\n]*,", r",.*=|=.*,",  # f(1,2), x=1,y=2
    r"(?:^|, |\{)([^,(){}\n]+), (?:.*, )?\1(?:,|\\\}|$)|[a-zA-Z]\^\{?-1\}?\(|\\frac\{d[^{}]*\}\{d",  # 1,1,2
    r"(?<![0-9a-z)])!|\^[^{ \n]*!|\}!|!!|[0-9]{4}!|\)!\)?!|[0-9]\)!|\\binom\{?[0-9]{4}",  # factorials
    r"(?:[({][^)}\n]*){9}|\|.*\|.*\||\^[({]*-?[0-9]*\^|\^[{(-]*[0-9]{5}|(?:[)}]\^\{?[0-9]{2}.*){2}")), re.M)

def tidy(text):
    """One spelling for what is written in many ways. What goes leaves a space: `$7$ $2$` is not 72."""
    text = text.translate(SIGNS).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if text.count(r"\pm") == 1 and not re.search(r",|\\\{", text):  # `1\pm2` is a list
        text = text.replace(r"\pm", "+") + "," + text.replace(r"\pm", "-")
    return text

def spelled(text):
    r"""What is compared where math-verify is not asked: `\text{Yes}` is `yes`, `(C)` is `C`."""
    text = re.sub(" +", " ", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text))
    text = re.sub(r"(?<!\\)\b(?:[A-Z](?=[a-z]{2})|N(?=o\b))", lambda match: match[0].lower(), text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text))

def without_unit(text):
    r"""A tidy value -> (the value without its unit, its unit or ""): `12\text{cm}^2` -> (`12`, `cm2`)."""
    if text.startswith((r"\$", r"-\$")):
        return text.replace(r"\$", "", 1), "dollar"
    if (match := UNIT.search(text, 1)) and not re.search(FUNCTION, text):
        word = match[2] or match[3]
        unit = UNITS.get(word) or UNITS.get(word.removesuffix("s").replace("metre", "meter"))
        if not unit and re.search(r"[0-9]\\text\{ ?[a-z]{3,}s ?\}$", text) and not NO_UNIT.fullmatch(word):
            unit = word  # what is counted
        power = {"square ": "2", "cubic ": "3"}.get(match[1], match[4] or "")
        if unit:  # a list has it behind each item
            return text[:match.start()].replace(match[0] + ",", ","), unit + power
    return text, ""

def equal(gold, said):
    """True where `said` is equal to `gold`. Each side of a chain such as `3*6=18` must be the gold."""
    gold, said = ("", "") if len(said) > 2 * len(gold) + LONGEST else (tidy(gold), tidy(said))
    if "" in (gold, said) or spelled(gold) == spelled(said):
        return said != ""
    (name, value), (said_name, rest) = (NAME.fullmatch(text).groups() for text in (gold, said))
    value, rest = value.replace(f",{name}=", ","), rest.replace(f",{said_name}=", ",")
    if "=" in value or name and name != said_name and "=" in said:
        return "=" in said and asked(gold, said)
    return all(alike(*without_unit(value), *without_unit(side)) for side in rest.split("="))

def alike(value, unit, side, side_unit):
    """Whether the values are equal, and the units where both have one: 50% is 0.5 and not 50."""
    if "%" in (unit, side_unit) and "" in (unit, side_unit):
        percent, number = (value, side) if unit else (side, value)
        return asked(percent, rf"100\cdot({number})")
    return (unit == side_unit or "" in (unit, side_unit)) and asked(value, side)

def exact(text):
    """Decimals as fractions, mixed numbers as sums, `2(3)` as a product."""
    def fraction(match):
        whole, fixed, period = match[1], match[2], match[3] or ""
        top = int(whole + fixed + period) - (int(whole + fixed or 0) if period else 0)
        return rf"(\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1 or 1)}}})"
    decimal = r"([0-9]*)\.([0-9]*)(?:\\overline\{([0-9]+)\}|(?<=[0-9]))(?![0-9.]|\\overline)"
    text = re.sub(r"(?:(?<=matrix\})|(?<![0-9.}]))" + decimal, fraction, text)
    text = re.sub(r"(?<![\^_\d}])(\d+)(\\frac\{\d+\}\{\d+\}| \d+/\d+(?!\d))", r"(\1+\2)", text)
    return re.sub(r"(?<=[0-9)])(?=\(|\\binom)|(?<=\))(?=[0-9])", r"\\cdot ", text).replace(",", ", ")

@lru_cache(4096)
def asked(gold, said):
    """What math-verify says of two tidy values that it reads as a person does, else False."""
    if spelled(gold) == spelled(said):
        return True
    pair = exact(gold) + "\n" + exact(said)
    if two := re.fullmatch(rf"{NUMBER}\n{NUMBER}", pair):
        return int(two[1] + two[2]) * int(two[6] or 1) == int(two[4] + two[5]) * int(two[3] or 1)
    values = [text for text in (gold, said) if not re.search(r"[<>]|\\[lgn]e", text)]
    brackets = {"," in text and str(sorted(re.findall(r"[][]", text))) for text in values}  # [5,2] or (5,2)
    if len(brackets) > 1 or len(pair) > LONGEST or not READABLE.fullmatch(pair) or UNCLEAR.search(pair):
        return False
    try:
        worker = IDLE.pop()
    except IndexError:
        worker = subprocess.Popen([sys.executable, __file__], bufsize=0, start_new_session=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        worker.stdin.write(pair.encode())
        if select.select([worker.stdout], [], [], 60)[0] and (reply := worker.stdout.read(1)):
            IDLE.append(worker)
            return reply == b"1"
    except OSError:
        pass
    worker.kill()
    worker.communicate()
    return False

def work():
    """A worker: answers 1 or 0 to each pair, until its input ends with the process that asks."""
    import math_verify  # noqa: F401
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while request := os.read(0, 1 << 16):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills, also in the middle of a multiplication
        try:
            right = compared(*request.decode().split("\n"))
        except MemoryError:
            return
        except Exception:  # no mathematics, or of a kind that the library cannot do
            right = False
        os.write(1, b"1" if right else b"0")

def compared(gold, said):
    """What math-verify says of two expressions, matrices, relations, or sets (one may be a relation)."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import verify
    from sympy import Expr, FiniteSet, I, Rational, Rel, Symbol, Tuple, simplify
    config, i = ConversionConfig(lowercase_symbols=False), Symbol("i", real=True)
    a, b = (latex2sympy(text, None, True, False, None, config).subs(i, I) for text in (gold, said))
    if isinstance(a, Rel) and isinstance(b, Rel):  # one is the other, times a number
        ratios = [(a.lhs - a.rhs) / (c.lhs - c.rhs) for c in (b, b.reversed) if c.rel_op == a.rel_op]
        return any(ratio.is_number and ratio.is_positive for ratio in map(simplify, ratios))
    if isinstance(a, Expr) and isinstance(b, Expr):
        point = {symbol: Rational(100 + 37 * i, 71 + i) for i, symbol in enumerate((a - b).free_symbols)}
        if abs((a - b).doit().subs(point).evalf(30)) > 1e-12:  # different at one point
            return False
    return all(isinstance(a, kind) == isinstance(b, kind) for kind in (Expr, FiniteSet, Tuple)) and verify(
        a, b, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)

if __name__ == "__main__":
    work()
