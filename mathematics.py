"""Whether an answer in LaTeX is equal to another as mathematics: equal(gold, said).

1. Both are brought to one spelling (tidy): fractions, degrees, units, \\text{}, spaces, \\left \\right, thousands separators,
   boxes. Two boxes, or two formulas with a wide space or a new line between them, are a list.
2. Both are taken apart (shape): a set or list, a tuple or interval by its brackets, a matrix, a union, or a single value.
   Shapes must agree, so that a list of guesses never equals one value; sets and lists are compared in any order, the others
   in theirs.
3. Single values are equal if they are spelled the same, or are the same rational number, exactly, or the same words;
   everything else is for math-verify, in a worker process. `x = 5` is 5; a chain `3*6 = 18` is 18 where each of its sides
   is. Decimals are turned into fractions first: nothing is ever rounded.
4. A worker that takes 2 s is killed and replaced. Text that would only keep it busy (long, deeply nested, towers of powers,
   factorials of large numbers, sums and integrals left to the grader) is not sent to it, unless the gold is of that kind.
"""
import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache

SECONDS = 2  # of processor time that one comparison may take
LONGEST = 500  # characters of an answer
WORK = "import sys; sys.path.append(sys.argv.pop()); import mathematics; mathematics.work()"

# ---------------------------------------------------------------------------------------------- one spelling

SPELLINGS = {
    "\u2212": "-", "\u00d7": "\\cdot ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/", "\u00b0": "^\\circ", "\u03c0": "\\pi ",
    "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u222a": "\\cup ", "\u2208": "\\in ", "\u00b1": "\\pm ",
    "\u221a": "\\sqrt ", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\times": "\\cdot", "\\div": "/",
    "\\degree": "^\\circ", "\\leqslant": "\\le", "\\leq": "\\le", "\\geqslant": "\\ge", "\\geq": "\\ge", "\\lbrace": "\\{",
    "\\rbrace": "\\}", "\\mbox": "\\text", "\\textbf": "\\text", "\\textrm": "\\text", "\\mathrm": "\\text", "\\mathbf": "",
    "\\boldsymbol": "", "{bmatrix}": "{pmatrix}", "{,}": ",",
}
SPELLING = re.compile("|".join(re.escape(old) + ("(?![a-zA-Z])" if re.fullmatch(r"\\[a-z]+", old) else "") for old in SPELLINGS))
# `\text{ cm}`, but nothing that says more than a unit: another value, or how far this one holds
MORE_THAN_A_UNIT = "hundred|thousand|million|billion|dozen|half|not?|or|and|than|less|more|least|most"
UNIT = rf"\\text\s*\{{(?![^{{}}]*\b(?:{MORE_THAN_A_UNIT})\b)[^{{}}0-9,]*\}}"


def tidy(text):
    """One spelling for what is written in many ways: `\\(\\dfrac12\\text{ cm}\\)` and `$\\frac{1}{2}$.` become `\\frac{1}{2}`.

    What is taken away leaves a space, so that `$7$ $2$`, `7**2`, `7 \\quad 2` never become 72.
    """
    text = SPELLING.sub(lambda match: SPELLINGS[match[0]], text)
    text = re.sub(r"\\!\s*", "", text)  # the one exception: 10,\!080
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])\.?|\\(?:displaystyle|limits)(?![a-zA-Z])|\*\*|`", " ", text)
    text = re.sub(r"(?<!\\)\\[,;: ()\[\]$]|~|\$", " ", text)  # spaces, the ends of formulas, dollars
    first, *others = re.split(r"\\(?:boxed|fbox)\s*(?=\{)", text)
    text = (first + ", ".join(others)).strip().rstrip(" .,\n")  # two boxes are a list
    if "\\begin" not in text:  # and so are two formulas with a wide space or a new line between them
        text = re.sub(r"\\q?quad(?![a-z])|(?<=[^\s{=,&])[ \t]*\n(?=\s*[^\s}=,&])", ",", text)
    if (inside := enclosed(text)) and inside[0] == "{":
        text = inside[1].strip()
    text = re.sub(r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|;", ",", text)
    text = re.sub(r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\?%", " ", text)  # degrees, percent
    text = re.sub(r"(?<=[^\s,=])\s*" + UNIT + r"(?:\s*\^\s*\{?[0-9]\}?)?(?=\s*(?:,|$))", " ", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=[0-9}])\s+(?:cm|mm|km|kg|ft|in|mi|ml|mL)\b(?:\s*\^\s*\{?[23]\}?)?\s*$", "", text)
    text = re.sub(r"\\(frac|sqrt)\s*([0-9a-zA-Z])", r"\\\1{\2}", text)  # \frac12, \sqrt2
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    if not re.search(r"[(\[{]", text):  # 1,100 is a number; `1, 100` is a list, and so is (1,100)
        text = re.sub(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)  # but one stays in `1 2`, which is not 12, and in `\pi r`
    text = re.sub(r"_\{([0-9a-zA-Z])\}", r"_\1", text)
    return re.sub(r"^\+|[.,]+$", "", text).strip()


def last_box(text):
    """What the \\boxed{...} that closes last holds, braces balanced; None where there is none."""
    opened, found = [], None
    for match in re.finditer(r"(\\boxed\s{0,9})?\{|\}|\\.", text):
        if match[0][-1] == "{" and match[0] != "\\{":
            opened.append((match[1], match.end()))
        elif match[0] == "}" and opened:
            box, start = opened.pop()
            found = text[start:match.start()] if box else found
    return found


# ---------------------------------------------------------------------------------------------- shape

NAME = re.compile(r"([a-zA-Z](?:_\w)?(?:\([a-zA-Z]\))?|\([a-zA-Z](?:,[a-zA-Z])+\))(?:=|\\in(?![a-z]))")
INTERVALS = {"()", "(]", "[)", "[]", "union"}
INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")


def split(text, at=","):
    """The parts between the separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|" + re.escape(at), text):
        if match[0] == at:
            if depth == 0:
                parts.append(text[start:match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "([{" else -1
    return [part for part in (part.strip() for part in [*parts, text[start:]]) if part]


def enclosed(text):
    """(opening bracket, what is inside, closing bracket), where one pair of brackets holds all of the text; else None."""
    match = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", text, re.S)
    depth = 1
    for c in match[2] if match else "":
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:  # the first bracket closes before the end
            return None
    return match and match.groups()


def shape(text):
    """A tidy text -> (kind, its items, each tidy)."""
    if match := re.fullmatch(r"\\begin\{(p?matrix)\}(.*)\\end\{\1\}", text, re.S):
        rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\", match[2]) if row.strip()]
        return f"matrix of {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    if len(parts := split(text, "\\cup")) > 1:
        return "union", parts
    if len(parts := split(text)) > 1:
        return "set", [item for part in parts for item in both_signs(part)]
    if match := NAME.match(text):
        kind, items = shape(text[match.end():])
        if kind != "value":
            return kind, items
    if found := enclosed(text):
        opening, inside, closing = found
        if opening == "{" or opening == "(" and closing == ")" and len(split(inside)) == 1:
            return shape(inside)
        if opening == "\\{":
            return "set", [item for part in split(inside) for item in both_signs(part)]
        if len(split(inside)) > 1:
            return opening + closing, split(inside)
    return ("value", [text]) if len(items := both_signs(text)) == 1 else ("set", items)


def both_signs(text):
    """`1\\pm\\sqrt2` -> both its values, as texts; any other text -> itself."""
    return [text.replace("\\pm", sign, 1).lstrip("+") for sign in "+-"] if text.count("\\pm") == 1 else [text]


def equal(gold, said):
    """True where `said` is equal to `gold` as mathematics."""
    if len(said) > max(LONGEST, 2 * len(gold)):
        return False
    percent = ("%" in gold, "%" in said)
    gold, said = tidy(gold), tidy(said)
    try:
        return gold == said != "" or same(gold, said, percent)
    except RecursionError:  # names or brackets by the hundred
        return False


def same(gold, said, percent=(False, False)):
    """equal(), for tidy texts. percent: whether a percent sign stood in gold, in said."""
    (kind, golds), (said_kind, saids) = shape(gold), shape(said)
    if kind != said_kind or len(golds) != len(saids):
        # The one pair of shapes that may be equal: an interval, and the same as an inequality.
        gold, said = (NAME.sub("", text, 1) if NAME.match(text) else text for text in (gold, said))
        mixed = "value" in (kind, said_kind) and INTERVALS & {kind, said_kind} and INEQUALITY.search(gold + said)
        return bool(mixed) and verified(gold, said)
    if kind == "value":
        return same_value(golds[0], saids[0], percent)
    if kind not in ("set", "union"):
        return all(map(same, golds, saids))
    for item in golds:  # any order: each gold takes one that is equal to it
        found = next((other for other in saids if same(item, other)), None)
        if found is None:
            return False
        saids.remove(found)
    return True


# ---------------------------------------------------------------------------------------------- single values

def rational(text):
    """`-3`, `.5`, `3/4`, `-\\frac{3}{4}`, `1\\frac{3}{4}`, `1 3/4`, `0.1\\overline{6}` -> its exact value, else None."""
    if match := re.fullmatch(r"([-+]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}", text):
        sign, whole, fixed, period = match.groups()
        value = Fraction(int(whole + fixed + period) - int(whole + fixed or 0), 10 ** len(fixed) * (10 ** len(period) - 1))
        return -value if sign == "-" else value
    number = r"[0-9]*\.?[0-9]+|[0-9]+\."
    fraction = rf"\\frac\{{([-+]?(?:{number}))\}}\{{([-+]?(?:{number}))\}}"
    match = re.fullmatch(rf"([-+]?)(?:([0-9]+)(?:(?=\\frac)| (?=[0-9]+/)))?(?:({number})(?:/([0-9]+))?|{fraction})", text)
    if not match:
        return None
    sign, whole, top, bottom, over, under = match.groups()
    top, bottom = Fraction(top or over), Fraction(bottom or under or 1)
    return None if bottom == 0 else (int(whole or 0) + top / bottom) * (-1 if sign == "-" else 1)


def related(text):
    """An equation or an inequality."""
    return re.search(r"[<>=]|\\[lg]e(?![a-z])|\\ne", text) is not None


def words(text):
    """Prose, which is compared as such: a long word, two words, or three letters alone (`yes`, but not `xy`)."""
    plain = re.sub(r"\\[a-zA-Z]+", "", text)
    return re.search(r"[a-zA-Z]{4}|[a-zA-Z]{2,} [a-zA-Z]{2,}", plain) or re.fullmatch("[a-zA-Z]{3,}", text)


def same_value(gold, said, percent):
    """Rule 3 for two single values. Of a chain `3*6=18` each side must be the gold."""
    if gold == said:
        return True
    name, said_name = NAME.match(gold), NAME.match(said)
    if name and said_name and name[1] != said_name[1]:
        return False
    wanted, sides = gold[name.end() if name else 0:], said[said_name.end() if said_name else 0:].split("=")
    if related(wanted) or name and not said_name and len(sides) > 1:
        return related(said) and verified(gold, said)
    for side in sides:
        a, b = rational(wanted), rational(side)
        if a is not None and b is not None:
            if a != b and not (percent[0] and a == 100 * b or percent[1] and 100 * a == b):
                return False
        elif words(wanted) or words(side):
            if wanted.casefold() != side.casefold():
                return False
        elif wanted != side and not verified(wanted, side):
            return False
    return True


def too_heavy(text):
    """Text that would keep a worker busy for nothing."""
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    heavy = (r"\^\{?[^a-z{}]*\^", r"\^\{?-?\(?[0-9]{5}",  # a tower of powers, a power by a large number
             r"[0-9]{4}!", r"[^0-9a-z]!", r"!!",  # factorials of large numbers, or of what may be large
             r"\\(?:sum|prod|i*nt|lim|binom\{?[0-9]{4})")
    return (deepest > 8 or text.count("|") > 8 or len(re.findall(r"[)}]\^\{?[0-9]{2}", text)) > 1
            or any(re.search(pattern, text) for pattern in heavy))


def letters(text):
    return set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def verified(gold, said):
    """What math-verify says of two tidy texts, where both are mathematics that it reads as a person does."""
    if said.count("'") != gold.count("'"):  # it reads over the mark of a derivative
        return False
    if letters(said) - letters(gold) - {"e", "i"} and not INEQUALITY.search(said):  # a variable that the gold does not have
        return False
    if not re.fullmatch(r"[-A-Za-z0-9 \\^_{}()\[\]+*/=<>.,!|&:']+", said) or too_heavy(said) and not too_heavy(gold):
        return False
    if re.search(r"[0-9]( [0-9]|e[0-9]|_)", gold + said):  # `1 2`, `1e6`, a number to some base: read otherwise there
        return False
    return asked(exact(gold), exact(said))


def exact(text):
    """Decimals as fractions, mixed numbers as sums, `2(3)` as a product."""
    text = re.sub(r"([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})", r"(\1+\2)", text)
    text = re.sub(r"([0-9])\(", r"\1\\cdot(", text)
    return re.sub(r"([0-9]*)\.([0-9]+)", lambda match: rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}", text)


# ---------------------------------------------------------------------------------------------- workers

IDLE = []  # workers that wait for something to compare
os.register_at_fork(after_in_child=IDLE.clear)  # a pipe has one user


@atexit.register
def end_workers():
    while IDLE:
        end(IDLE.pop())


def end(worker):
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.communicate()


@lru_cache(4096)
def asked(gold, said):
    """Has a worker compare; False where it cannot tell within its time."""
    try:
        worker = IDLE.pop()
    except IndexError:
        command = [sys.executable, "-c", WORK, os.path.dirname(os.path.abspath(__file__))]
        worker = subprocess.Popen(command, bufsize=0, start_new_session=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        worker.stdin.write(json.dumps([gold, said]).encode())
        in_time = select.select([worker.stdout], [], [], 60)[0]  # 60 s: it may have to start first
        if in_time and (reply := worker.stdout.read(1)):
            IDLE.append(worker)
            return reply == b"1"
    except OSError:
        pass
    end(worker)
    return False


def work():
    """A worker: loads math-verify once, then forks a process that compares until it dies of its alarm, or has done 200."""
    import math_verify  # noqa: F401
    while True:
        if (pid := os.fork()) == 0:
            try:
                compare_all()
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            os.write(1, b"0")
        elif os.WEXITSTATUS(status) == 0:
            return


def compare_all():
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for _ in range(200):  # then anew, so that memory does not grow
        if not (request := os.read(0, 1 << 16)):
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills, also in the middle of a multiplication of large numbers
        signal.alarm(5 * SECONDS)  # by the clock, for a machine that is busy with other things
        try:
            verdict = compared(*json.loads(request))
        except Exception:  # no mathematics, or of a kind that the library cannot do
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        os.write(1, b"1" if verdict else b"0")


def compared(gold, said):
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, I, Rational

    # units=False: 5m is no 5
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    config = LatexExtractionConfig(normalization_config=spelling)

    def read(text):
        found = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)[0]
        return found.xreplace({s: I for s in found.free_symbols if s.name == "i"})

    a, b = read(gold), read(said)
    if isinstance(a, Expr) and isinstance(b, Expr):
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        gap = (a - b).doit().subs({symbol: Rational(100 + 37 * i, 71 + i) for i, symbol in enumerate(symbols)}).evalf(30)
        if gap.is_number and abs(gap) > 1e-12:  # different at one point: no need to prove it
            return False
    return verify(a, b, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)
