r"""Whether two answers in LaTeX are equal as mathematics: equal(gold, said, problem).

Both are brought to one spelling; names, units, chains and labels of choices are taken off. The rest is equal
if it is spelled the same, or if math-verify says so and is known to read it as a person (READABLE, UNCLEAR).
It runs in a worker that is killed after 2 s: its own timeouts work in a main thread only.
"""
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

SECONDS, MEMORY, LONGEST = 2, 2 << 30, 800  # of one call of equal(): processor time, bytes, characters
IDLE = []  # workers that wait for something to compare
LEFT = threading.local()  # .seconds: what this thread's call of equal() may still take
os.register_at_fork(after_in_child=IDLE.clear)  # a pipe has one user
SIGNS = str.maketrans(dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉\u2212–\u00a0~÷", "0123456789+-0123456789--  /")) | {
    sign: new.replace("_", " ") for sign, new in zip("×·⋅°∞≤≥≠±∪∈∅ℝ¢½⅓⅔¼¾αβθπ", (
        r"\cdot_ \cdot_ \cdot_ ^\circ_ \infty_ \le_ \ge_ \ne_ \pm_ \cup_ \in_ \emptyset_ \mathbb{R}"
        r" \text{cent} \frac12 \frac13 \frac23 \frac14 \frac34 \alpha_ \beta_ \theta_ \pi_").split())})
COMMANDS = {old: new for new, names in {
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\cdot ": "times", "/": "div", "%": "%",
    r"\le ": "leq leqslant", r"\ge ": "geq geqslant", r"\ne ": "neq", "|": "lvert rvert mid", r"\{": "lbrace",
    r"\}": "rbrace", r"\emptyset ": "varnothing", r"\text": "mbox textbf textrm mathrm", "\n": "quad qquad",
    "...": "ldots dots cdots", r"^\circ ": "degree", " ": "left right displaystyle bigl bigr Bigl Bigr big "
    "Big , ; : ( ) [ ]"}.items() for old in names.split()}
FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log(?:_\{[0-9a-z]+\})?)(?![a-z])"
REWRITES = [(re.compile(pattern, re.S | re.A), new) for pattern, new in {
    r"√ ?(?=[({])": r"\\sqrt", r"√ ?(\d+|[a-z])(?![0-9a-zA-Z^(]|[.,]\d)": r"\\sqrt{\1}",
    r"(?<=\d)(?:\{,\}|,?\s?\\[,!]\s?)(?=\d{3}(?!\d))": "", r"\\!\s*": "", r"\{,\}": ",",
    r"\\(?:begin|end)\{(?:align|equation|gather)(?:ed)?\*?\}": " ", r"^\s*```[a-z]*\s([^`]*)```\s*$": r"\1",
    r"\\([a-zA-Z]+|.)|\$": lambda match: COMMANDS.get(match[1], match[0] if (match[1] or " ") > " " else " "),
    r"(?:^\s*-?|= ?-?|\\\$ ?|boxed\{)[1-9]\d?\d?(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)":
        lambda match: re.sub("[, ]", "", match[0]), r"(\\text\s*\{[^{}\n]*)\n": r"\1 ",
    r"(?<=[^\s{=,&\\])(?<!matrix\})[ \t]*\n(?!\s*(?:[}=,&]|\\end|$))": ", ", r"\s+": " ",
    r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])": "", r"^(?i:(?:the )?(?:final )?answer is)\b[: ]*": "",
    r"^(.*=)?[ *`]*\\(?:boxed|fbox|mathbf|boldsymbol)\{(.*)\}[ .*`]*$": r"\1\2",
    r"^\*\*(.*)\*\*$|^`(.*)`$": r"\1\2", r"\\mathbb(?:\{R\}| ?R)": r"(-\\infty,\\infty)",
    r"\\text\{([ied])\}": r" \1 ", r"\^(?:\\circ(?![a-z]) ?|\{\\circ\})": r"\\text{degree}",
    r"\\text\{degree\}(?:\\text\{([CF])\}|([CF])(?![a-zA-Z]))": r"\\text{degree \1\2}",
    r"%|\\text\{percent\}|(?<=[0-9}]) ?percent(?![a-z])": r"\\text{%}", r"_\{\\text\{two\}\}": "_2",
    r"([^a-zA-Z ]) ?(?:\\text\{,?(or|and)\}|,?(?<![a-zA-Z])(or|and)(?![a-zA-Z])(?![^{}]*\})) ?": r"\1\\\2\3 ",
    r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])": r"\\\1", "<=": r"\\le ", ">=": r"\\ge ",
    r"\\(sin|cos|tan|cot)\^(?:\{-1\}|-1)": r"\\arc\1", r"(?<=\d) ?(\\text\{)?thousand\b": r"\\cdot10^{3}\1",
    r"\\(frac|sqrt(?:\[[0-9a-z]\])?) ?([0-9a-zA-Z]|\\pi(?![a-z]))": r"\\\1{\2}", " and ": ",", ";": ",",
    r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([0-9a-zA-Z]|\\pi(?![a-z]))": r"\1{\2}",
    r"\\log_(?:\{([0-9a-z]+)\}|([0-9a-z]))": r"\\log_{\1\2}", r"\\dot\{?(\d)\}?": r"\\overline{\1}",
    r"(?<=\d) ?(\\text\{)?million\b": r"\\cdot10^{6}\1", r"(?<=\d) ?(\\text\{)?billion\b": r"\\cdot10^{9}\1",
    r"(?<=\d)(?:\\text\{to\}| to )(?=\d)": ":", r"(?<=[0-9A-F])_\{\(?(\d+)\)?\}": r"_{\1}",
    r"\\text\{\}": " ", r" +(?![0-9a-zA-Z])|(?<![0-9a-zA-Z]) +": "", r"(?<=[)\]]) ?U ?(?=[(\[])": r"\\cup",
    r"(\\(?:sin|cos|tan|cot|sec|csc)) ?(?:\((\d+)\\text\{degree\}\)|(\d+)\\text\{degree\})":
        r"\1(\\frac{\2\3\\pi}{180})", r"\\sqrt\[([3579])\]\{-(\d+)\}": r"(-\\sqrt[\1]{\2})",
    r"^([\d.]+)\\\$$|^(-?)\\\$(.*?)\.?(?=\\text|$)": r"\1\2\3\\text{dollar}", r"\\exp\(([^()]*)\)": r"e^{\1}",
    r"\\text\{dollar\}\\text\{": r"\\text{dollar ", r"\\sqrt\(([^()]*)\)": r"\\sqrt{\1}",
    r"^(-?\d+\.\d+|-?\d+(?=e[-+]\d{2}))e\+?(-?)0*(\d{1,3})$": r"\1\\cdot10^{\2\3}",
    r"^\(([0-9A-F]+)\)_": r"\1_", r"_\{\\text\{eight\}\}": "_8", r"\{b?matrix\}": "{pmatrix}",
    r"^([0-9A-F]+)(?:\\text\{ ?| ?)\(?(?:in )?base ?\}?[ -]?([a-z0-9]+)\)?\}?$": r"\1_{\2}",
    r"^\\\{([a-z])(?:\\in\(-\\infty,\\infty\))?[|:]((?=[^{}]*\1)(?=[^{}]*(?:[<>]|\\[lgn]e)).*)\\\}$": r"\2",
    r"(?<!\\log)_\{([0-9a-zA-Z])\}(?![0-9a-zA-Z])": r"_\1", r"^\+|^,|(?<![.,])[.,]$": "",
    r"\\and ?(?!.*(?:[<>]|\\[lgn]e(?![a-z])))": ",", r"\\or ?(?!.*(?:[=<>]|\\[lgn]e(?![a-z])))": ",",
    r"([a-z])=([^=<>]*)\\or ?(?=\1=)": r"\1=\2,", r"^([a-z])_1=([^=,]+),\1_2=": r"\1=\2,",
    r"^\(\\pm([^,()]+),([^()]+)\)$": r"(\1,\2),(-\1,\2)", r"^([bynqsv]=[^=,]+),([axmpru]=[^=,]+)$": r"\2,\1",
    r"^([axmpru])=([^=,]+),([bynqsv])=([^=,]+)$": r"(\1,\3)=(\2,\4)",
    r"^([axp])=([^=,]+),([byq])=([^=,]+),([czr])=([^=,]+)$": r"(\1,\3,\5)=(\2,\4,\6)",
    r"^((?:(?!\\pm|\\\{)[^,])*)\\pm((?:(?!\\pm)[^,])*)$": r"\1+\2,\1-\2"}.items()]
UNITS = {alias: names.split(",")[0] for names in (
    "mm,millimeter|cm,centimeter|m,meter|km,kilometer|inch,inche,in|foot,feet,ft|day|mile|liter,L|mL|gram,g"
    "|gm|kg,kilogram|pound,lb|second,s|minute,min|hour,h|week|month|yard|year|cent|dollar|degree|C|F|unit"
    "|square,sq|cubic,cu|/,per|mile / hour,mph|km / hour,kph").split("|") for alias in names.split(",")}
NOUNS = re.compile(r"(?!.*\b(?:half|hal[fv]es|(?:pair|couple|percent|square|cube|root|power|base|log|opposite"
    r"|negative|double|triple|quarter|equal|fail|one|two|three|four|five|seven|eight|nine)s|sixes|was|has)\b"
    r"|.*(?:ty|teen|illion)s)[a-z ]*(?:[a-z]{2}(?<![sui])s|\b(?:people|children|(?:wo)?men))")  # are counted
UNIT = re.compile(r"(?:\\text\{ ?([a-zA-Z%/][a-zA-Z%/. ]*)\}|(?:(?<=\d) ?|(?<=\})|(?<=\\pi) )"
                  r"([a-zA-Z][a-zA-Z/ .]*))(?:\^\{?([23])\}?)?$")
NAME = re.compile(
    r"(?:([a-zA-Z](?:_\w|_\{\w+\})?'?(?:\([a-zA-Z]\)|(?<=[f-hpqF-HP-TNEV])\(-?\d{1,4}\))?|\|[A-Z]{2}\|"
    r"|[A-Z]{2,4}|\\(?:theta|alpha|beta|phi|angle ?(?:[A-Z]{1,3}|\d)|overline\{[A-Z]{2}\}|text\{[a-zA-Z ]+\})"
    r"|[A-Z][a-z]{2,}(?: [a-z]+){0,4}|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z])))?(.*)", re.S)
CHOICE = re.compile(r"(?:\\text\{)?\(([A-E])\) ?+\}?+(?!$|[+*/,;^!=.])((?:\\(?!text|or|and)[a-z]++|\\[^a-z]"
                    r"|[^a-zA-Z\\]|[a-z](?![a-zA-Z]))+)", re.S)  # `(C)12`
PERCENT = re.compile(r"(?i)\b(?:what|which|how many|(?:what (?:is|was|are)|find|determine|compute|as|in|to)"
                     r" (?:an?|the) [a-z -]*|as a|in) ?percent")  # does a problem ask for a percentage?
NUMBER = r"([-+]?)\(?(?:\\frac\{)?([0-9]+)(?:\}\{([1-9][0-9]*)\})?\)?"
READABLE = re.compile(
    rf"(?:[-+*/^(){{}}=<>!| \n0-9,\[\]&]|[a-zA-Z](?:_[0-9a-z]|_\{{[0-9a-z]+\}})?|{FUNCTION}|\\[{{}}\\]"
    r"|\\(?:begin|end)\{pmatrix\}|\\(?:frac|sqrt|cdot|le|ge|ne|infty|cup|pm|binom|pi|alpha|beta|gamma|delta"
    r"|theta|lambda|mu|rho|sigma|(?:var)?phi|omega|[lr](?:floor|ceil)|setminus|or|and)(?![a-zA-Z]))++")
UNCLEAR = re.compile(r"^[a-zA-Z ]{2,}$|(?<![\\a-z])(?:(?!pmat)[a-z]{4}|not)|(?<![\\a-zA-Z])(?:[a-zA-Z]+ ?\d"
    r"|[a-zA-Z]{2} [a-zA-Z]{2})|[A-Z]{2}|\d \d|\d[_{]|\de\d|\*\*|--|^[*/^!]|[-+*/^_(=<>]$|,.*=|=.*,|[fgFG]\("
    r"|\}(?<!matrix\})(?<!\\log_\{[0-9a-z]\})(?<!\\log_\{\d{2}\})(?<!\^\{-1\})\d|\\frac\{d[^{}]*\}\{d|!!"
    r"|/(?!(?:(?:\d+|[a-z])(?:\^(?:\d(?!\d)|\{\d+\}))?|\\pi|\\sqrt\{[^{}]*\}|\([^()]*\))(?![0-9a-zA-Z(^]"
    r"|\\(?!end|\\)))|" + FUNCTION + r"[^({+=\n]*/|[0-9a-zA-Z)}\]](?<!\\cup)(?<!\\setminus)[(\[][^)\]\n]*,"
    r"|(?:^|, |\{)([^,(){}\n]+), (?:[^()\n]*, )?\1(?:,|\\\}|$)|[a-zA-Z]\^\{?-1\}?\(|\|.*\|.*\|"  # 1,1,2
    r"|(?<![0-9a-z)])!|\^[^{ \n]*!|\}!|\d{4}!|\)!\)?!|\d\)!|\\binom\{?\d{4}|(?:[({][^)}\n]*){9}"  # factorials
    r"|\^[({]*-?\d*\^|\^[{(-]*\d{5}|(?:[)}]\^\{?\d{2}.*){2}", re.M)

def tidy(text):
    """One spelling for what is written in many ways. What goes leaves a space: `$7$ $2$` is not 72."""
    text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text)).translate(SIGNS).strip()
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text

def spelled(text):
    r"""What is compared where math-verify is not asked: `\text{Yes}` is `yes`, `(C)` is `C`."""
    text = re.sub(" +", " ", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text))
    text = re.sub(r"(?i)(?<=\d) ?([ap])\.? ?m\b\.?", lambda match: match[1].lower() + "m", text)
    text = re.sub(r"(?<!\\)\b(?:[A-Z](?=[a-z]{2})|N(?=o\b))", lambda match: match[0].lower(), text)
    return re.sub(r"^\(?([A-Z])\)$", r"\1", re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text))

def unit_of(words):
    """The unit that words behind a value name, or what they count; "" where they may change the value."""
    from rewards import keeps_value
    known = [UNITS.get(word) or UNITS.get(word.removesuffix("s").replace("metre", "meter"))
             for word in re.findall("[a-zA-Z]+|/", words)]
    if all(known) and known[-1] not in ("square", "cubic", "/"):
        return " ".join(known)
    return words.strip(" .") if NOUNS.fullmatch(words.strip(" .")) and keeps_value(" " + words) else ""

def without_unit(text):
    r"""A tidy value -> (it without its unit, its unit or ""): `12\text{cm}^2` -> (`12`, `square cm`)."""
    if (match := UNIT.search(text, 1)) and not re.search(FUNCTION, text):
        word, before = match[2] or "", text[match.start() - 1]
        product = match[0] == word and (len(word) < 2 or before not in "} " and word not in UNITS)  # 2m, 2abs
        if not product and (unit := unit_of(match[1] or word)):  # a list has it behind each item
            power = {"2": "square ", "3": "cubic "}.get(match[3], "")
            return text[:match.start()].replace(match[0] + ",", ","), power + unit
    return text, ""

@lru_cache(4096)
def equal(gold, said, problem=""):
    """Is `said` equal to `gold`? 10% is 10 where the problem asks for a percentage, elsewhere a tenth."""
    number = r"\1" if PERCENT.search(problem) else r"\\frac{\1}{100}"
    gold, said = (re.sub(r"([^,=({]*(?:\{[^{}]*\}){0,2})\\text\{%\}", number, tidy(text))
                  if len(text) <= 2 * len(gold) + LONGEST else "" for text in (gold, said))
    LEFT.seconds = SECONDS
    try:
        return bool(spelled(gold).strip(".,")) and bool(spelled(said)) and matches(gold, said)
    except TimeoutError:
        return False

def matches(gold, said):
    """Two tidy answers. Each side of a chain such as `3*6=18` must be the gold, which may be such a chain."""
    from rewards import CHANGES_VALUE
    if spelled(gold) == spelled(said):
        return True
    if CHOICE.fullmatch(gold) or CHOICE.fullmatch(said):  # what both have, label or value, must be equal
        halves = [(CHOICE.fullmatch(text) or re.fullmatch("([A-E]?)(.*)", spelled(text))).groups()
                  for text in (gold, said)]
        return any(map(all, zip(*halves))) and all(matches(*pair) for pair in zip(*halves) if all(pair))
    (name, value), (said_name, rest) = (NAME.fullmatch(text).groups() for text in (gold, said))
    if CHANGES_VALUE.search((name or said_name or "").replace("_", " ")):  # `\text{Twice the area}=`
        return False
    value, rest = value.replace(f",{name}=", ","), rest.replace(f",{said_name}=", ",")  # x=1,x=2
    *sides, last = value.split("=")
    if sides and all(asked(last, side) for side in sides):  # `2^{10}=1024`
        value, sides = last, []
    if sides or name and name != said_name and (said_name or "=" in said):
        return asked(gold, said) if gold.count("=") == said.count("=") == 1 else (
            sorted(map(spelled, gold.split("="))) == sorted(map(spelled, said.split("="))))
    return all(alike(value, side) for side in rest.split("="))

def alike(value, side):
    """Are two values equal, and their units where both have one? `degree` and `degree C` are alike."""
    (number, unit), (said, said_unit) = without_unit(value), without_unit(side)
    short, long = sorted((f"{unit} ", f"{said_unit} "), key=len)
    fits = (short == " " or long.startswith(short)) and asked(number, said)
    return fits or long != " " and asked(value, side)  # what looks like a unit may be a variable

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

def asked(gold, said):
    """What math-verify says of two tidy values that it reads as a person does, else False."""
    if spelled(gold) == spelled(said) or len(gold) + len(said) > LONGEST:
        return spelled(gold) == spelled(said)
    pair = exact(gold) + "\n" + exact(said)
    if two := re.fullmatch(rf"{NUMBER}\n{NUMBER}", pair):
        return int(two[1] + two[2]) * int(two[6] or 1) == int(two[4] + two[5]) * int(two[3] or 1)
    values = [text for text in (gold, said) if not re.search(r"[<>]|\\[lgn]e(?![a-z])", text)]
    brackets = {"," in text and str(sorted(re.findall(r"[][]", text))) for text in values}  # [5,2] or (5,2)
    if len(brackets) > 1 or not READABLE.fullmatch(pair) or UNCLEAR.search(pair):
        return False
    try:
        worker = IDLE.pop()
    except IndexError:
        worker = subprocess.Popen([sys.executable, __file__], bufsize=0, start_new_session=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with suppress(OSError):
        worker.stdin.write(f"{max(LEFT.seconds, 0.001)}\n{pair}".encode())
        if select.select([worker.stdout], [], [], 60)[0] and (reply := worker.stdout.read(20)):
            IDLE.append(worker)
            LEFT.seconds = float(reply[1:])
            return reply[:1] == b"1"
    worker.kill()
    worker.communicate()
    raise TimeoutError

def work():
    """A worker: answers 1 or 0 and the seconds left, until its input ends with the process that asks."""
    import math_verify  # noqa: F401
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while request := os.read(0, 1 << 16):
        seconds, *pair = request.decode().split("\n")
        signal.setitimer(signal.ITIMER_PROF, float(seconds))  # kills, also in the middle of a multiplication
        try:
            right = same(*map(parsed, pair))
        except MemoryError:
            return
        except Exception:  # no mathematics, or of a kind that the library cannot do
            right = False
        os.write(1, f"{right:d}{signal.setitimer(signal.ITIMER_PROF, 0)[0]}".encode())

def parsed(text):
    """A tidy text as sympy has it; inequalities with `or` and `and` as the set in which they hold."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import I, Intersection, MatrixExpr, Set, Symbol, Union, sympify
    for word, join in ((r"\or", Union), (r"\and", Intersection)):
        if word in text:
            return join(*(parsed(part).as_set().doit() for part in text.split(word)))
    found = latex2sympy(text, None, True, False, None, ConversionConfig(lowercase_symbols=False))
    found = sympify(found.subs(Symbol("i", real=True), I))
    return found.doit() if isinstance(found, (Set, MatrixExpr)) else found

def same(a, b):
    """What math-verify says of the parts of both. Numbers are told apart here: it takes tiny ones for 0."""
    from math_verify import verify
    from sympy import And, Expr, FiniteSet, Interval, MatrixBase, Rational, Rel, Tuple, Union, simplify
    if isinstance(a, Rel) and isinstance(b, Rel):  # one is the other, times a number
        ratios = [(a.lhs - a.rhs) / (c.lhs - c.rhs) for c in (b, b.reversed) if c.rel_op == a.rel_op]
        return bool(simplify(a.lhs - a.rhs).free_symbols) and any(
            ratio.is_number and ratio.is_positive for ratio in map(simplify, ratios))
    a, b = (x.as_set().doit() if isinstance(x, (And, Rel)) else x for x in (a, b))
    for kind in (FiniteSet, Union, Interval, MatrixBase, Tuple):
        if isinstance(a, kind) and isinstance(b, kind):
            of = [b.args] * len(a.args) if kind in (FiniteSet, Union) else [[y] for y in b.args]
            return len(of) == len(b.args) and all(any(same(x, y) for y in ys) for x, ys in zip(a.args, of))
    if isinstance(a, Expr) and isinstance(b, Expr):
        point = {symbol: Rational(100 + 37 * i, 71 + i) for i, symbol in enumerate((a - b).free_symbols)}
        parts = (a - b).doit().subs(point).evalf(30, maxn=1000).as_real_imag()
        if any(part != 0 and getattr(part, "_prec", 0) > 1 for part in parts):  # 1: no digit of it is sure
            return False
    return all(isinstance(a, kind) == isinstance(b, kind) for kind in (Expr, FiniteSet, Tuple)) and verify(
        a, b, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)

if __name__ == "__main__":
    work()
