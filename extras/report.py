"""Curves of training runs, or one self-contained HTML page on runs and an evaluation. Loads no model.

A page (.html) has, in this order:
1. the tables of --results (what eval.py wrote), and how often the completions show which behaviour;
2. a panel per numeric metric in the runs' metrics.jsonl, a colour per run: faint is every step, strong a
   mean over 4 % of the run, at least 5 steps; points are held-out rows. Another --output is this picture;
3. suspects of reward hacking, from the evaluation and the runs' samples.jsonl: completions with a reward and
   most of the signs listed at `signs`. A sign is a reason to read, not a verdict;
4. problems answered by the first and by the last model: learned, unlearned, changed most in reward; if there
   is no evaluation, samples of the first and the last logged step.

    python extras/report.py runs/sft runs/grpo --output curves.png
    python extras/report.py runs/sft runs/grpo --results results/eval.json --output page.html
"""
import argparse
import base64
import html
import io
import json
import math
import re
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where rewards.py is
import rewards  # noqa: E402

FIRST = ["loss", "token_accuracy", "reward", "correct", "format"]   # these panels come first
TITLES = {"correct": "accuracy", "truncated": "share cut off", "entropy": "entropy, nats", "kl": "KL",
          "completion_length": "completion length, tokens", "logp_gap": "log-prob gap, sampler to trainer",
          "frac_reward_zero_std": "dead groups", "frac_reward_zero_std_after": "the same, resampled"}
NOT_DRAWN = re.compile(r"step|epoch|lr|tokens|temperature|.*_seconds|.*_per_s|.*memory_gb")
NO_PART = {"row", "sample", "step", "n_tokens", "truncated", "ended", "correct_flexible", "advantage"}
SAMPLE = ["task", "prompt", "completion", "reward", "correct", "format"]    # what is read of a completion
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------- files
def read_lines(path, needs=()):
    """The objects of a JSONL file, each with the keys in `needs`; not an unfinished last line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                fail(f"{path}, line {number}: not JSON")
            if not isinstance(found, dict) or not found.keys() >= set(needs):
                fail(f"{path}, line {number}: not an object with {', '.join(needs)}")
            yield found

def read_metrics(run):
    """The lines of a run's metrics.jsonl. The loss of a policy gradient is left out, as it says nothing."""
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        fail(f"{run}: holds no metrics.jsonl; name the --output_dir of a run of sft.py or grpo.py")
    metrics = list(read_lines(path, ["step"]))
    if not any("token_accuracy" in line for line in metrics):
        for line in metrics:
            line.pop("loss", None)
    return metrics

def read_samples(runs):
    """The completions that the runs of grpo.py have logged, each with its run."""
    files = {run: Path(run, "samples.jsonl") for run in runs}
    return [{"run": run, **record} for run, path in files.items() if path.is_file()
            for record in read_lines(path, [*SAMPLE, "step"])]

def read_results(path):
    """-> what eval.py --output wrote, its completions"""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        list(tables(results))
    except OSError:
        fail(f"--results {path}: no such file; eval.py --model ... --output {path} writes it")
    except (ValueError, TypeError, AttributeError, KeyError):
        fail(f"--results {path}: not a file that eval.py --output wrote")
    samples = Path(path.removesuffix(".json") + ".samples.jsonl")
    return results, list(read_lines(samples, [*SAMPLE, "model", "row"])) if samples.is_file() else []


# ---------------------------------------------------------------------------------------- behaviours
BEHAVIOURS = {  # after Gandhi et al. (2025): a completion shows one if its reasoning has one of these phrases
    "checks": r"\b(verif(y|ies|ied|ying)|double.check\w*|(let's|let me|to) check|check(ing)?:|checks out)\b"
              r"|\b(ok|no)$",
    "goes back": r"\b(wait|actually|hmm|no,|start(ing)? over|go(ing)? back|try (again|another|something else|"
                 r"a different)|(does|did)(n't| not) work|that('s| is) (wrong|incorrect|not)|instead)\b| no$",
    "sets sub-goals": r"\b(step [1-9]|first(ly)?,? |next, |finally, |we (first )?need to (find|get)|so that)",
}
OPERATORS = "-+*/×·÷−"
EQUATION = re.compile(r"([\d(][\d ()+*/×·÷−-]{2,80})= *(\d+)")

def behaviours(record):
    """{behaviour: how often} of a completion. It goes by words and arithmetic, not by meaning."""
    ends = [match.start() for match in re.finditer("</(?:reasoning|think)>", record["completion"])]
    reasoning = record["completion"][:ends[-1] if ends else None]
    found = {name: bool(re.search(rule, reasoning, re.I | re.M)) for name, rule in BEHAVIOURS.items()}
    return found | (tries(reasoning, record["prompt"], bool(ends)) if record["task"] == "countdown" else {})

def tries(reasoning, prompt, closed=True):
    """Countdown: a try is a line whose equations have as many operators as using all numbers takes. A result
    in a later equation of a line is the expression that made it: `5*2=10 10+3=13` is (5*2)+3. A try is a hit
    if this solves the problem, and repeated if the same equations came before."""
    *nums, target = map(int, re.findall(r"-?\d+", prompt))
    row, seen, hits, hit = {"nums": nums, "target": target}, [], 0, True
    for line in reasoning.splitlines():
        made, expression, operators = {}, "", 0
        for left, result in EQUATION.findall(line):
            operators += sum(c in OPERATORS for c in left)
            expression = re.sub(r"\d+", lambda number: made.pop(number[0], number[0]), left)
            made[result] = f"({expression})"
        if operators == len(nums) - 1:
            hit = bool(rewards.correct("countdown", f"<answer>{expression}</answer>", row))
            hits += hit
            seen.append(re.sub(r"[^\d()=×·÷−*/+-]", "", line))
    return {"tries": len(seen), "hits": hits, "repeated": len(seen) - len(set(seen)),
            "stops after a miss": closed and not hit}

def behaviour_tables(records):
    """-> tables, one per task, lists of lines {column: text}: the mean of each behaviour per model."""
    groups = {}
    for record in records:
        groups.setdefault(record["task"], {}).setdefault(record["model"], []).append(behaviours(record))
    for task, models in groups.items():
        lines = {}
        for model, group in models.items():
            means = {name: fmean(found[name] for found in group) for name in group[0]}
            if means.get("tries"):
                means["hits per try"] = means["hits"] / means["tries"]
            for name, mean in means.items():
                lines.setdefault(name, {f"{task}, in the reasoning": name})[model] = f"{mean:.2f}"
        yield list(lines.values())


# ---------------------------------------------------------------------------------------- curves
def series(metrics, key):
    """([step], [value]) of the steps with a finite value: one NaN would blank the running mean after it."""
    points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float))]
    points = [point for point in points if math.isfinite(point[1])]
    return [step for step, _ in points], [value for _, value in points]

def smooth(values):
    """The running mean: of each value and its neighbours, 2 % of the run, at least two, on either side."""
    n, half, total = len(values), max(2, len(values) // 50), [0, *accumulate(values)]
    bounds = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
    return [(total[end] - total[start]) / (end - start) for start, end in bounds]

def panels(runs):
    """The metrics of these runs to draw: all numeric ones that are not the same throughout."""
    found = {}
    for metrics in runs:
        for key in dict.fromkeys(key for line in metrics for key in line):
            name = key.removeprefix("eval_")
            if not NOT_DRAWN.fullmatch(name):
                found.setdefault(name, []).extend(series(metrics, key)[1])
    used = [name for name, values in found.items() if len(set(values)) > 1 or values and name in FIRST]
    return sorted(used, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))

def draw(runs):
    """-> a matplotlib figure with a panel per metric"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "font.size": 8, "grid.color": "#e6e6e6", "axes.titlelocation": "left"})
    looks = [{"color": colour, "ls": dash} for dash in ("-", "--", ":") for colour in COLOURS] * len(runs)
    data = [read_metrics(run) for run in runs]
    used = panels(data)
    if not used:
        fail(f"{' '.join(runs)}: no metrics yet")
    columns, lines = min(4, len(used)), -(-len(used) // 4)
    size = (max(6.5, 3.5 * columns), 2.4 * lines + 0.5)        # inches
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, key in zip(axes.flat, used):
        for metrics, look in zip(data, looks):
            steps, values = series(metrics, key)
            if values:
                axis.plot(steps, values, **look, alpha=0.22, linewidth=0.8)
                axis.plot(steps, smooth(values), **look, linewidth=1.6, marker="" if len(values) > 1 else "x")
            steps, values = series(metrics, f"eval_{key}")
            axis.plot(steps, values, "o", color=look["color"], markersize=5, markeredgecolor="white")
        axis.set_title(TITLES.get(key, key.replace("_", " ")))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
    for axis in axes.flat[len(used):]:
        axis.set_axis_off()
    handles = [plt.Line2D([], [], **look, label=run.replace("$", r"\$")) for run, look in zip(runs, looks)]
    handles.append(plt.Line2D([], [], color="#777777", marker="o", ls="", label="held out; x axis: step"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------- samples
def signs(r):
    """What is odd about a completion that was rewarded: each a reason to read it."""
    match = re.search(r"<(reasoning|think)>(.*)</\1>", r["completion"], re.DOTALL)
    reasoning = match[2].strip() if match else ""
    lines = Counter(line.strip() for line in reasoning.splitlines() if len(line.strip()) > 3)
    words = Counter(reasoning.split())
    found = {
        "rewarded, though wrong": not r["correct"],
        "right, in an odd form": r["correct"] and not r["format"],
        "right, without working": r["correct"] and len(reasoning) < 8,
        "says a line again and again": lines and max(lines.values()) >= 3,
        "one word is most of it": words.total() >= 20 and max(words.values()) > words.total() / 2,
        "several answers": r["completion"].count("<answer>") > 1,
        "cut off": r.get("truncated", not r.get("ended", True)),
    }
    return [sign for sign, shown in found.items() if shown]

def suspects(records, n=4):
    """[(record, its signs)]: completions with a reward and a sign, each text once, n wrong and n right; those
    with the most signs first, then those with the highest reward."""
    rewarded = [r for r in {r["completion"]: r for r in records}.values() if r["reward"] > 0]
    odd = [(r, found) for r, found in zip(rewarded, map(signs, rewarded)) if found]
    odd.sort(key=lambda pair: (-len(pair[1]), -pair[0]["reward"]))
    wrong = [pair for pair in odd if not pair[0]["correct"]]
    return wrong[:n] + [pair for pair in odd if pair[0]["correct"]][:n]

def pairs(records):
    """[(heading, before, after)]: problems of the first and the last model, the most changed first."""
    models = {}                                                 # model -> {problem: its first completion}
    for r in records:
        models.setdefault(r["model"], {}).setdefault((r["task"], r["row"]), r)
    if len(models) < 2:
        return []
    before, *_, after = models.values()
    both = [(before[key], after[key]) for key in before if key in after]
    both = [(a, b) for a, b in both if a["reward"] != b["reward"]]
    both.sort(key=lambda pair: -abs(pair[1]["reward"] - pair[0]["reward"]))
    found = {"learned": [], "unlearned": [], "reward changed": []}
    for a, b in both:
        change = b["correct"] - a["correct"]
        heading = "learned" if change > 0 else "unlearned" if change < 0 else "reward changed"
        found[heading].append((heading, a, b))
    return found["learned"][:4] + found["unlearned"][:2] + found["reward changed"][:2]


# ---------------------------------------------------------------------------------------- the page
def tables(results):
    """What FILE holds -> tables, lists of lines {column: text}: one of all models, then one per task."""
    lines = []
    for row in results:
        share = {name: f"{value:.1%}" for name, value in row.items() if isinstance(value, float)}
        line = {"model": row["model"], "task": row["task"], "n": str(row["n"]), "strict": share["accuracy"],
                "95 % interval": f"{share['accuracy_low']} - {share['accuracy_high']}",
                "flexible": share["accuracy_flexible"], "format": share["format"]}
        if row["samples"] > 1:
            line |= {f"pass@{row['samples']}": share["pass_at_k"], f"maj@{row['samples']}": share["maj_at_k"]}
        line |= {"tokens": f"{row['completion_length']:.0f}", "cut off": share["truncated"]}
        lines.append(line)
    yield lines
    for task in dict.fromkeys(row["task"] for row in results):
        rows, lines = [row for row in results if row["task"] == task], []
        for kind, cells in rows[0]["by"].items():
            for value, cell in cells.items():
                accuracy = {row["model"]: f"{row['by'][kind][value]['accuracy']:.1%}" for row in rows}
                lines.append({task: f"{kind} {value}", "n": str(cell["n"]), **accuracy})
        if lines:
            yield lines


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2026; max-width: 80rem; margin: auto; padding: 1rem }
h2 { font-size: 19px; margin: 2.6rem 0 .7rem } p { margin: .2rem 0 .8rem } .scroll, pre { overflow: auto }
.ask, .who { padding: 8px 14px } p, th, .who { color: #667 } .name { text-align: left }
table { border-collapse: collapse; margin-bottom: 1rem; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: .34rem .55rem; text-align: right; border-bottom: 1px solid #e3e5e8; white-space: nowrap }
.bar { position: relative; display: inline-block; width: 80px; height: 11px; background: #eee; margin: 0 9px }
.bar i { position: absolute; inset: 0 auto 0 0; background: #0072B2 }
.bar b { position: absolute; top: 4px; height: 3px; background: #1c2026 } .tag { color: #a3388f }
.who { font-size: 13px } .side { display: flex; flex-wrap: wrap; gap: 0 2.5rem } .side div { max-width: 100% }
img { width: 100%; min-width: 760px } .card { border: 1px solid #e3e5e8; border-radius: 8px; margin: 1rem 0 }
.ask { background: #f6f7f8; white-space: pre-wrap; max-height: 9rem; overflow: auto }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 0 1rem }
pre { margin: .5rem .9rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem }
.chip { display: inline-block; font-size: 12px; padding: 0 .5rem; border-radius: 9px; background: #eceef1 }
.chip { margin: .1rem .25rem .1rem 0 } .good { background: #d6efe2 } .bad { background: #f9dcd0 }
"""

def html_table(lines, results=()):
    """A table of `tables`. The main one comes with its results: a bar shows the accuracy and its interval."""
    head, out = list(max(lines, key=len)), []
    for i, line in enumerate([{name: name for name in head}, *lines]):
        cells = []
        for name in head:
            bar = ""
            if results and i > 0 and name == "strict":
                row = results[i - 1]
                low, width = row["accuracy_low"], row["accuracy_high"] - row["accuracy_low"]
                bar = (f'<span class=bar><i style="width:{row["accuracy"]:.1%}"></i>'
                       f'<b style="left:{low:.1%};width:{width:.1%}"></b></span>')
            tag, named = "td" if i else "th", " class=name" if name in (head[0], "task") else ""
            cells.append(f"<{tag}{named}>{bar}{html.escape(line.get(name, ''))}</{tag}>")
        out.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table>{''.join(out)}</table></div>"

def one(record):
    """A completion with its parts: those that are not 0, and always the three of SAMPLE."""
    chips = []
    for part, value in record.items():
        numeric = isinstance(value, (int, float)) and part not in NO_PART
        if numeric and (value or part in SAMPLE):
            colour = (" good" if value else " bad") if part == "correct" else ""
            chips.append(f'<span class="chip{colour}">{html.escape(part)} {value:.3g}</span>')
    text = html.escape(record["completion"])
    text = re.sub(r"(&lt;/?(reasoning|think|answer)&gt;)", r"<span class=tag>\1</span>", text)
    where = record["model"] if "model" in record else f"{record['run']}, step {record['step']}"
    return f"<div><div class=who>{html.escape(where)} &nbsp; {''.join(chips)}</div><pre>{text}</pre></div>"

def card(prompt, *completions, notes=()):
    marks = [f'<span class="chip {"good" if note == "learned" else "bad"}">{note}</span>' for note in notes]
    return (f"<div class=card><div class=ask>{''.join(marks)}<div>{html.escape(prompt)}</div></div>"
            f'<div class=two>{"".join(map(one, completions))}</div></div>')

def page(runs, path=None):
    """The page as HTML, in the order of the list at the top. path: of the evaluation, if it shows one."""
    out = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>"
           f"<title>Report</title><style>{STYLE}</style><h1>Report</h1><p>{html.escape(', '.join(runs))}</p>"]
    records, logged = [], read_samples(runs)
    if path:
        results, records = read_results(path)
        main_table, *others = [*tables(results), *behaviour_tables(records)]
        out.append("<h2>Held-out accuracy</h2><p>Black: 95 % interval.</p>"
                   f"{html_table(main_table, results)}")
        out.append(f"<div class=side>{''.join(map(html_table, others))}</div>")
    picture = io.BytesIO()
    draw(runs).savefig(picture, format="svg", facecolor="white")
    source = base64.b64encode(picture.getvalue()).decode()
    out.append("<h2>Training</h2><p>Faint: every step. Strong: running mean. Points: held-out rows.</p>"
               f'<div class=scroll><img alt=curves src="data:image/svg+xml;base64,{source}"></div>')
    odd, changed = suspects(records + logged), pairs(records)
    if odd:
        out.append("<h2>Suspects of reward hacking</h2><p>Odd-looking completions with a reward, the "
                   "oddest first. Read them: a sign is not a verdict.</p>")
        out += [card(record["prompt"], record, notes=found) for record, found in odd]
    if changed:
        out.append("<h2>Before and after</h2>")
        out += [card(before["prompt"], before, after, notes=[heading]) for heading, before, after in changed]
    elif logged:
        out.append("<h2>First and last logged step</h2><p>Different problems, as training saw them.</p>")
        steps = [record["step"] for record in logged]
        for step in (min(steps), max(steps)):
            out += [card(record["prompt"], record) for record in logged if record["step"] == step][:3]
    return "\n".join(out)

def main(argv=None):
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output_dir of a run of sft.py or grpo.py")
    parser.add_argument("--results", metavar="FILE", help="evaluation to show: --output of eval.py")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="a page, or else a picture")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if args.results and output.suffix != ".html":
        fail(f"--output {output}: only a page (.html) shows --results")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".html":
            output.write_text(page(args.runs, args.results), encoding="utf-8")
        else:
            draw(args.runs).savefig(output, dpi=150, facecolor="white")
    except ImportError:
        fail("the curves need matplotlib: pip install matplotlib")
    except (OSError, ValueError) as err:                        # ValueError: an unknown format of pictures
        fail(f"--output {output}: cannot be written ({err})")
    print(output)

if __name__ == "__main__":
    main()
