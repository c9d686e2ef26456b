"""Tables, pictures and pages of what sft.py, grpo.py and eval.py have written. Loads no model; eval.py calls it.

--table: what eval.py prints: a row for each model and task, then breakdowns and behaviours with a column for each model.
--curves: small multiples, a panel for each metric of the runs' metrics.jsonl and a colour for each run. The faint line is every
    step, the strong one a running mean over 4 % of the run, points are held-out rows.
--report: one self-contained HTML page:
1. the table of --results (what eval.py wrote), with its breakdowns;
2. the curves of the runs;
3. suspects of reward hacking, from the evaluation's completions and the runs' samples.jsonl: wrong ones that were paid, and right
   ones, that show the most of the signs listed at `signs`. A sign is a reason to read, not a verdict;
4. the same problems answered by the first and by the last model: learned, unlearned, and then the largest change of reward;
5. the best and the worst completions of the last model.

    python report.py --curves runs/sft runs/grpo --output curves.png
    python report.py --report runs/sft runs/grpo --results runs/eval.json --output report.html
"""
import argparse
import base64
import html
import io
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

PANELS = {"loss": "loss", "token_accuracy": "token accuracy", "reward": "reward", "correct": "accuracy", "format": "format",
          "length": "length penalty", "process": "process", "efficiency": "efficiency",
          "completion_length": "completion length, tokens", "truncated": "cut off at the limit", "entropy": "entropy, nats",
          "kl": "KL to the reference", "frac_reward_zero_std": "dead groups (no spread of rewards)", "grad_norm": "gradient norm"}
PARTS = ("reward", "correct", "format", "length", "process", "efficiency")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def fail(message):
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                fail(f"{path}, line {number}: not JSON")


def read_summary(path):
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all({"model", "task", "accuracy", "by", "behaviour"} <= set(row) for row in summary) or not summary:
            raise ValueError
    except OSError:
        fail(f"{path}: no such file; eval.py --model ... --output {path} writes it")
    except (ValueError, TypeError, LookupError):
        fail(f"{path}: not a file that eval.py --output wrote")
    return summary


def read_metrics(run):
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        fail(f"{run}: holds no metrics.jsonl; name the --output_dir of a run of sft.py or grpo.py")
    metrics = list(read_lines(path))
    if any("token_accuracy" in m for m in metrics):
        return metrics
    return [{k: v for k, v in m.items() if k != "loss"} for m in metrics]   # the loss of a policy gradient says nothing


# ---------------------------------------------------------------- tables

def tables(summary):
    """eval.py's rows -> lists of lines of cells, the head first, shares as floats: the main one, then for each task one for each
    breakdown and one for the behaviours."""
    K, paired = max(row["samples"] for row in summary), any("p" in row for row in summary)
    table = [["model", "task", "n", "strict", "95 % interval", "flexible", "format", *[f"pass@{K}", f"maj@{K}"] * (K > 1),
              "tokens", "cut off", *["better : worse", "p"] * paired]]
    for row in summary:
        table.append([row["model"], row["task"], row["n"], row["accuracy"],
                      f"{100 * row['accuracy_low']:.1f} - {100 * row['accuracy_high']:.1f}", row["accuracy_flexible"], row["format"],
                      *[row["pass_at_k"], row["maj_at_k"]] * (K > 1), round(row["completion_length"] or 0) or None, row["truncated"],
                      *([f"{row['better']} : {row['worse']}", f"{row['p']:.2g}"] if "p" in row else [None, None] * paired)])
    yield table
    for task in dict.fromkeys(row["task"] for row in summary):
        rows = [row for row in summary if row["task"] == task]
        models = [row["model"] for row in rows]
        for kind, values in rows[0]["by"].items():
            yield [[task, "by " + kind, "n", *models]] + [
                ["", value, cell["n"], *(row["by"].get(kind, {}).get(value, {}).get("accuracy") for row in rows)]
                for value, cell in values.items()]
        if names := {name: None for row in rows for name in row["behaviour"]}:
            yield [[task, "in the reasoning", *models]] + [
                ["", name, *(f"{row['behaviour'].get(name, math.nan):.2f}" for row in rows)] for name in names]


def written(cell):
    return "" if cell is None else f"{100 * cell:.1f} %" if isinstance(cell, float) else str(cell)


def show(table):
    """-> text in columns: names to the left, figures to the right."""
    text = [[written(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "\n".join("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
                     for line in text)


# ---------------------------------------------------------------- curves

def draw(runs):
    """-> a matplotlib figure"""
    import matplotlib
    import numpy as np
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.grid": True,
                         "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.titlesize": 9.5, "axes.titlelocation": "left",
                         "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelsize": 8, "ytick.labelsize": 8,
                         "axes.xmargin": 0.02, "axes.axisbelow": True})
    data = {run: read_metrics(run) for run in runs}
    used = [key for key in PANELS if any(m.get(k) for run in runs for m in data[run] for k in (key, "eval_" + key))]
    if not used:
        fail(f"{' '.join(runs)}: no metrics yet")
    columns = min(4, len(used))
    lines = -(-len(used) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(max(6.5, 3.5 * columns), 2.4 * lines + 0.5), squeeze=False)
    for axis, key in zip(axes.flat, used):
        for colour, run in zip(COLOURS * len(runs), runs):
            x, y = (np.array([m[k] for m in data[run] if m.get(key) is not None], float) for k in ("step", key))
            if len(y):
                half, total, at = len(y) // 50, np.insert(np.cumsum(y), 0, 0), np.arange(len(y))
                left, right = (at - half).clip(0), (at + half + 1).clip(max=len(y))
                axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
                axis.plot(x, (total[right] - total[left]) / (right - left), color=colour, linewidth=1.6)
            points = [(m["step"], m["eval_" + key]) for m in data[run] if m.get("eval_" + key) is not None]
            if points:
                axis.plot(*zip(*points), "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.7)
        axis.set_title(PANELS[key])
    for axis in axes.flat[len(used):]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(used) - columns):len(used)]:
        axis.set_xlabel("step", fontsize=8, color="#555555")
    handles = [plt.Line2D([], [], color=colour, linewidth=2, label=run) for colour, run in zip(COLOURS * len(runs), runs)]
    handles.append(plt.Line2D([], [], color="#777777", marker="o", linestyle="", markersize=5, label="held out"))
    figure.legend(handles=handles, loc="upper left", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.12 + 0.22 * -(-len(handles) // 4)) / figure.get_figheight()))
    return figure


# ---------------------------------------------------------------- samples

def signs(r):
    """What is odd about a completion that was paid: each a reason to read it."""
    match = re.search(r"<(reasoning|think)>(.*)</\1>", r["completion"], re.DOTALL)
    reasoning = match[2].strip() if match else ""
    lines = Counter(line.strip() for line in reasoning.splitlines() if len(line.strip()) > 3)
    words = Counter(reasoning.split())
    found = {
        "paid, though wrong": not r["correct"],
        "right, in an odd form": r["correct"] and not r["format"],
        "right, without working": r["correct"] and len(reasoning) < 8,
        "says a line again and again": lines and max(lines.values()) >= 3,
        "one word is most of it": len(reasoning.split()) >= 20 and max(words.values()) > len(reasoning.split()) / 2,
        "several answers": r["completion"].count("<answer>") > 1,
        "cut off": r.get("truncated", not r.get("ended", True)),
    }
    return [sign for sign, shown in found.items() if shown]


def suspects(records, n=4):
    """Completions with a reward and a sign, each text once: n that are wrong and n that are right, the most signs first, then the
    best paid."""
    paid = [(r, signs(r)) for r in {r["completion"]: r for r in records}.values() if r["reward"] > 0]
    odd = sorted([(r, s) for r, s in paid if s], key=lambda pair: (-len(pair[1]), -pair[0]["reward"]))
    return [pair for right in (0, 1) for pair in [(r, s) for r, s in odd if r["correct"] == right][:n]]


def pairs(records):
    """(heading, before, after) of the problems that the first and the last model of the evaluation answered, most changed first."""
    models = list(dict.fromkeys(r["model"] for r in records))
    of = {(r["model"], r["task"], r["row"]): r for r in reversed(records)}           # a problem's first completion
    both = [(of[models[0], *key], of[models[-1], *key]) for key in dict.fromkeys((r["task"], r["row"]) for r in records)
            if (models[0], *key) in of and (models[-1], *key) in of] if len(models) > 1 else []
    both.sort(key=lambda pair: -abs(pair[1]["reward"] - pair[0]["reward"]))
    learned, lost, same = [[p for p in both if p[1]["correct"] - p[0]["correct"] == change] for change in (1, -1, 0)]
    return [(title, *pair) for title, some in (("learned", learned[:4]), ("unlearned", lost[:2]), ("reward changed", same[:2]))
            for pair in some if title != "reward changed" or pair[0]["reward"] != pair[1]["reward"]]


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light; --line: #e3e5e8; --soft: #f6f7f8; --dim: #667; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2026; max-width: 1280px; margin: 2.2rem auto 5rem; padding: 0 1.4rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem } p { margin: .2rem 0 .8rem; color: var(--dim) }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums }
th, td { padding: .34rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--dim); font-size: .85rem } .name { text-align: left }
.bar { position: relative; display: inline-block; width: 80px; height: 11px;
       background: #e9ebee; border-radius: 3px; margin-left: .6rem }
.bar i { position: absolute; inset: 0 auto 0 0; background: #0072B2; border-radius: 3px }
.bar b { position: absolute; top: 4px; height: 3px; background: #1c2026 }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem } h3 { font-size: .95rem; margin: 1rem 0 .2rem }
table { font-size: .87rem } td.name { white-space: normal; overflow-wrap: anywhere; min-width: 7rem }
img { width: 100%; border: 1px solid var(--line); border-radius: 8px }
.card { border: 1px solid var(--line); border-radius: 8px; margin: 0 0 1rem; overflow: hidden }
.ask { background: var(--soft); padding: .5rem .9rem; border-bottom: 1px solid var(--line); white-space: pre-wrap;
       max-height: 9rem; overflow: auto }
.two { display: grid; grid-template-columns: 1fr 1fr } .two > div + div { border-left: 1px solid var(--line) }
.who { padding: .5rem .9rem 0; font-size: .85rem; color: var(--dim); overflow-wrap: anywhere }
pre { margin: 0; padding: .5rem .9rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow: auto;
      font: 12.5px/1.5 ui-monospace, monospace }
.chip { display: inline-block; font-size: .78rem; padding: .05rem .5rem; border-radius: 9px; background: #eceef1;
        margin: .1rem .25rem .1rem 0 }
.good { background: #d6efe2 } .bad { background: #f9dcd0 } .tag { color: #a33a8f }
@media (max-width: 760px) { .two { grid-template-columns: 1fr } .two > div + div { border-left: 0; border-top: 1px solid var(--line) } }
"""


def html_table(table, rows=()):
    """rows: those of the evaluation that the lines of its main table show; their accuracy gets a bar with its interval."""
    def cell(i, c, tag="td", more=""):
        return f'<{tag}{" class=name" if i < 1 + bool(rows) else ""}>{html.escape(written(c))}{more}</{tag}>'
    lines = ["".join(cell(i, c, "th") for i, c in enumerate(table[0]))]
    for k, line in enumerate(table[1:]):
        bar = ""
        if rows:
            low, high, at = (100 * rows[k][name] for name in ("accuracy_low", "accuracy_high", "accuracy"))
            bar = f'<span class=bar><i style="width:{at:.1f}%"></i><b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></span>'
        lines.append("".join(cell(i, c, more=bar if i == 3 else "") for i, c in enumerate(line)))
    return f'<div class=scroll><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def one(r):
    chips = "".join(f'<span class="chip {"good" if p == "correct" and r[p] else "bad" if p == "correct" else ""}">{p} {r[p]:.3g}</span>'
                    for p in PARTS if p in r and (r[p] or p in PARTS[:3]))
    text = re.sub(r"(&lt;/?(?:reasoning|think|answer)&gt;)", r"<span class=tag>\1</span>", html.escape(r["completion"]))
    where = r["model"] if "model" in r else f"{r['run']}, step {r['step']}"
    return f"<div><div class=who>{html.escape(where)} &nbsp; {chips}</div><pre>{text}</pre></div>"


def card(prompt, *completions, chips=()):
    two = " two" if len(completions) > 1 else ""
    marks = "".join(f'<span class="chip {"good" if c == "learned" else "bad"}">{html.escape(c)}</span>' for c in chips)
    return (f'<div class=card><div class=ask>{marks}{"<br>" if marks else ""}{html.escape(prompt)}</div>'
            f'<div class="body{two}">{"".join(map(one, completions))}</div></div>')


def page(runs, results):
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Report</title>"
           f"<style>{STYLE}</style><h1>Report</h1><p>{html.escape(' · '.join(runs))}</p>"]
    records, trained = [], []
    if os.path.exists(results):                                                                                      # 1
        samples = results.removesuffix(".json") + ".samples.jsonl"
        records = list(read_lines(samples)) if os.path.exists(samples) else []
        out.append("<h2>Held-out accuracy</h2><p>Black: 95 % interval. Better and worse: problems solved more or less often than by "
                   "the first model; p: McNemar's exact test of that split, above 0.05 it may well be chance.</p>")
        summary = read_summary(results)
        main_table, *others = tables(summary)
        out.append(html_table(main_table, summary))
        out.append("<div class=side>" + "".join(f"<div><h3>{' '.join(table[0][:2])}</h3>{html_table([line[1:] for line in table])}</div>"
                                                for table in others) + "</div>")
    picture = io.BytesIO()                                                                                           # 2
    draw(runs).savefig(picture, format="svg", facecolor="white")
    out.append("<h2>Training</h2><p>Faint: every step. Strong: running mean. Points: held-out rows.</p>"
               f'<img alt="training curves" src="data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}">')
    for run in runs:
        if Path(run, "samples.jsonl").exists():
            trained += [{"run": run, **r} for r in read_lines(Path(run, "samples.jsonl"))]
    found = suspects(records + trained)                                                                              # 3
    if found:
        out.append("<h2>Suspects of reward hacking</h2><p>Completions that were paid and look odd, the oddest first. "
                   "Read them: a sign is not a verdict.</p>")
        out += [card(r["prompt"], r, chips=why) for r, why in found]
    changed = pairs(records)                                                                                         # 4
    if not changed and trained:
        first, last = ([r for r in trained if r["step"] == step] for step in (min(r["step"] for r in trained),
                                                                              max(r["step"] for r in trained)))
        out.append("<h2>First and last logged step</h2><p>Different problems: what training looked like then and at the end.</p>")
        out += [card("", *pair) for pair in list(zip(first, last))[:3]]
    if changed:
        out.append("<h2>Before and after</h2>")
        out += [card(a["prompt"], a, b, chips=[title]) for title, a, b in changed]
    if records:                                                                                                      # 5
        of_last = sorted((r for r in records if r["model"] == records[-1]["model"]), key=lambda r: -r["reward"])
        for title, some in (("Best", of_last[:3]), ("Worst", of_last[:-4:-1])):
            out.append(f"<h2>{title} of {html.escape(records[-1]['model'])}</h2>")
            out += [card(r["prompt"], r) for r in some]
    return "\n".join(out)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--table", metavar="FILE", help="print the tables of an evaluation, the FILE that eval.py wrote")
    p.add_argument("--curves", nargs="+", metavar="RUN", help="draw the training curves of these runs (their --output_dir)")
    p.add_argument("--report", nargs="+", metavar="RUN", help="write a page on these runs")
    p.add_argument("--results", metavar="FILE", help="evaluation that the page shows; None: runs/eval.json, if it is there")
    p.add_argument("--output", metavar="FILE", help="None: runs/curves.png or runs/report.html")
    args = p.parse_args(argv)
    if [args.table, args.curves, args.report].count(None) != 2:
        p.error("one of --table FILE, --curves RUN ..., --report RUN ...")
    if args.table:
        return print(*("\n" + show(table) for table in tables(read_summary(args.table))), sep="\n")
    output = Path(args.output or ("runs/curves.png" if args.curves else "runs/report.html"))
    if args.results:
        read_summary(args.results)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.curves:
            draw(args.curves).savefig(output, dpi=150, facecolor="white")
        else:
            output.write_text(page(args.report, args.results or "runs/eval.json"), encoding="utf-8")
    except (OSError, ValueError) as e:                   # ValueError: a picture format that matplotlib does not know
        fail(f"--output {output}: cannot be written ({e})")
    print(output)


if __name__ == "__main__":
    main()
