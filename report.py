"""Tables, pictures and pages of what sft.py, grpo.py and eval.py have written. Loads no model; eval.py calls it.

--table: what eval.py prints: a row for each model and task, then breakdowns and behaviours with a column for each model.
--curves: a panel for each metric of the runs' metrics.jsonl, a colour for each run. The faint line is every step, the
    strong one a running mean over 4 % of the run, points are held-out rows.
--report: one self-contained HTML page:
 1. the table of --results (what eval.py wrote), with its breakdowns;
 2. the curves of the runs;
 3. suspects of reward hacking, from the evaluation's completions and the runs' samples.jsonl: wrong ones that were paid,
    and right ones, that show the most of the signs listed at `signs`. A sign is a reason to read, not a verdict;
 4. the same problems answered by the first and by the last model: learned, unlearned, and then the largest change of
    reward; without an evaluation, samples of the first and the last logged step;
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
from itertools import accumulate
from pathlib import Path

PANELS = {"loss": "loss", "token_accuracy": "token accuracy", "reward": "reward", "correct": "accuracy", "format": "format",
          "length": "length penalty", "process": "process", "efficiency": "efficiency",
          "completion_length": "completion length, tokens", "truncated": "cut off at the limit", "entropy": "entropy, nats",
          "kl": "KL to the reference", "frac_reward_zero_std": "dead groups (no spread of rewards)", "grad_norm": "gradient norm"}
PARTS = ("reward", "correct", "format", "length", "process", "efficiency")
SAMPLE = ["task", "prompt", "completion", "reward", "correct", "format"]  # what the page needs to know of a completion
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def fail(message):
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_lines(path, needs=()):
    """The objects of a JSONL file, each with the keys in `needs`; not an unfinished last line: a run may be writing it."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                found = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                fail(f"{path}, line {number}: not JSON")
            if not isinstance(found, dict) or not found.keys() >= set(needs):
                fail(f"{path}, line {number}: not an object with {', '.join(needs)}")
            yield found


def read_summary(path):
    needs = {"model", "task", "n", "samples", "accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "format",
             "completion_length", "truncated", "by", "behaviour"}
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
        if not summary or not all(row.keys() >= needs for row in summary):
            raise ValueError
    except OSError:
        fail(f"{path}: no such file; eval.py --model ... --output {path} writes it")
    except (ValueError, TypeError, AttributeError):
        fail(f"{path}: not a file that eval.py --output wrote")
    return summary


def read_metrics(run):
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        fail(f"{run}: holds no metrics.jsonl; name the --output_dir of a run of sft.py or grpo.py")
    metrics = list(read_lines(path, ["step"]))
    if not any("token_accuracy" in m for m in metrics):  # grpo.py's: the loss of a policy gradient says nothing
        for m in metrics:
            m.pop("loss", None)
    return metrics


# ---------------------------------------------------------------- tables

def tables(summary):
    """eval.py's rows -> tables, each a list of lines of cells, the head first, shares as floats: the main one, then for each
    task one for each breakdown and one for the behaviours."""
    many, paired = max(row["samples"] for row in summary), any("p" in row for row in summary)
    head = ["model", "task", "n", "strict", "95 % interval", "flexible", "format"]
    head += [f"pass@{many}", f"maj@{many}"] if many > 1 else []
    head += ["tokens", "cut off"] + (["better : worse", "p"] if paired else [])
    table = [head]
    for row in summary:
        interval = f"{100 * row['accuracy_low']:.1f} - {100 * row['accuracy_high']:.1f}"
        line = [row["model"], row["task"], row["n"], row["accuracy"], interval, row["accuracy_flexible"], row["format"]]
        line += [row["pass_at_k"], row["maj_at_k"]] if many > 1 else []
        line += [round(row["completion_length"] or 0) or None, row["truncated"]]
        line += [f"{row['better']} : {row['worse']}", f"{row['p']:.2g}"] if "p" in row else [None, None] if paired else []
        table.append(line)
    yield table
    for task in dict.fromkeys(row["task"] for row in summary):
        rows = [row for row in summary if row["task"] == task]
        models = [row["model"] for row in rows]
        for kind, cells in rows[0]["by"].items():
            table = [[task, "by " + kind, "n", *models]]
            for value, cell in cells.items():
                table.append(["", value, cell["n"], *(row["by"].get(kind, {}).get(value, {}).get("accuracy") for row in rows)])
            yield table
        table = [[task, "in the reasoning", *models]]
        for name in dict.fromkeys(name for row in rows for name in row["behaviour"]):
            figures = [row["behaviour"].get(name) for row in rows]
            table.append(["", name, *(None if figure is None else f"{figure:.2f}" for figure in figures)])
        if len(table) > 1:
            yield table


def written(cell):
    """A cell as text. A float is a share; other figures come as text."""
    return "" if cell is None else f"{100 * cell:.1f} %" if isinstance(cell, float) else str(cell)


def show(table):
    """-> text in columns: names to the left, figures to the right."""
    cells = [[written(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
        figures = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        lines.append("  ".join(names + figures).rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------- curves

def series(metrics, key):
    """([step], [value]) of the steps that have a finite value: one NaN would blank the running mean from there on."""
    points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float)) and math.isfinite(m[key])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values):
    """The running mean: of each value and its neighbours, 2 % of the run on either side."""
    n, half, total = len(values), len(values) // 50, [0, *accumulate(values)]
    bounds = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
    return [(total[end] - total[start]) / (end - start) for start, end in bounds]


def draw(runs):
    """-> a matplotlib figure: a panel for each metric that is not 0 throughout, as a part without a weight is."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.grid": True,
                         "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.titlesize": 9.5, "axes.titlelocation": "left",
                         "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelsize": 8, "ytick.labelsize": 8,
                         "axes.xmargin": 0.02, "axes.axisbelow": True})
    data = [read_metrics(run) for run in runs]
    looks = [{"color": colour, "linestyle": line} for line in ("-", "--", ":") for colour in COLOURS] * len(runs)
    found = {key: [v for metrics in data for k in (key, "eval_" + key) for v in series(metrics, k)[1]] for key in PANELS}
    used = [key for key in PANELS if any(found[key]) or found[key] and key in ("reward", "correct")]
    if not used:
        fail(f"{' '.join(runs)}: no metrics yet")
    columns = min(4, len(used))
    lines = -(-len(used) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(max(6.5, 3.5 * columns), 2.4 * lines + 0.5), squeeze=False)
    held_out = False
    for axis, key in zip(axes.flat, used):
        for metrics, look in zip(data, looks):
            steps, values = series(metrics, key)
            if values:
                axis.plot(steps, values, **look, alpha=0.22, linewidth=0.8)
                axis.plot(steps, smooth(values), **look, linewidth=1.6, marker="" if len(values) > 1 else "x")
            steps, values = series(metrics, "eval_" + key)
            if values:
                axis.plot(steps, values, "o", color=look["color"], markersize=5, markeredgecolor="white", markeredgewidth=0.7)
                held_out = True
        axis.set_title(PANELS[key])
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", integer=True))
    for axis in axes.flat[len(used):]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(used) - columns):len(used)]:
        axis.set_xlabel("step", fontsize=8, color="#555555")
    handles = [plt.Line2D([], [], **look, linewidth=2, label=str(run).replace("$", r"\$")) for run, look in zip(runs, looks)]
    if held_out:
        handles.append(plt.Line2D([], [], color="#777777", marker="o", linestyle="", markersize=5, label="held out"))
    figure.legend(handles=handles, loc="upper left", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    legend_inches = 0.12 + 0.22 * -(-len(handles) // 4)
    figure.tight_layout(rect=(0, 0, 1, 1 - legend_inches / figure.get_figheight()))
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
        "one word is most of it": words.total() >= 20 and max(words.values()) > words.total() / 2,
        "several answers": r["completion"].count("<answer>") > 1,
        "cut off": r.get("truncated", not r.get("ended", True)),
    }
    return [sign for sign, shown in found.items() if shown]


def suspects(records, n=4):
    """[(record, its signs)] of completions with a reward and a sign, each text once: n wrong ones and n right ones, those
    with the most signs first, then the best paid."""
    paid = [r for r in {r["completion"]: r for r in records}.values() if r["reward"] > 0]
    odd = [(r, found) for r in paid if (found := signs(r))]
    odd.sort(key=lambda pair: (-len(pair[1]), -pair[0]["reward"]))
    wrong, right = ([pair for pair in odd if bool(pair[0]["correct"]) == verdict] for verdict in (False, True))
    return wrong[:n] + right[:n]


def pairs(records):
    """[(heading, before, after)] of problems that the first and the last model answered, most changed first."""
    models = list(dict.fromkeys(r["model"] for r in records))
    if len(models) < 2:
        return []
    before, after = ({(r["task"], r["row"]): r for r in reversed(records) if r["model"] == model}  # a problem's first completion
                     for model in (models[0], models[-1]))
    keys = dict.fromkeys((r["task"], r["row"]) for r in records)
    both = [(before[key], after[key]) for key in keys if key in before and key in after]
    both.sort(key=lambda pair: -abs(pair[1]["reward"] - pair[0]["reward"]))
    learned = [pair for pair in both if pair[0]["correct"] < pair[1]["correct"]]
    unlearned = [pair for pair in both if pair[0]["correct"] > pair[1]["correct"]]
    changed = [pair for pair in both if pair[0]["correct"] == pair[1]["correct"] and pair[0]["reward"] != pair[1]["reward"]]
    found = {"learned": learned[:4], "unlearned": unlearned[:2], "reward changed": changed[:2]}
    return [(title, *pair) for title, some in found.items() for pair in some]


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
.pair, .two { display: grid; grid-template-columns: 1fr 1fr } .pair { gap: 0 1rem }
.two > div + div { border-left: 1px solid var(--line) }
.who { padding: .5rem .9rem 0; font-size: .85rem; color: var(--dim); overflow-wrap: anywhere }
pre { margin: 0; padding: .5rem .9rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow: auto;
      font: 12.5px/1.5 ui-monospace, monospace }
.chip { display: inline-block; font-size: .78rem; padding: .05rem .5rem; border-radius: 9px; background: #eceef1;
        margin: .1rem .25rem .1rem 0 }
.good { background: #d6efe2 } .bad { background: #f9dcd0 } .tag { color: #a33a8f }
@media (max-width: 760px) { .pair, .two { grid-template-columns: 1fr }
                            .two > div + div { border-left: 0; border-top: 1px solid var(--line) } }
"""


def html_table(table, rows=()):
    """rows: those of the evaluation that the lines of its main table show; their accuracy gets a bar with its interval."""
    def cells(tag, line, bar=""):
        names = 2 if rows else 1
        return "".join(f"<{tag}{' class=name' if i < names else ''}>{html.escape(written(c))}{bar if i == 3 else ''}</{tag}>"
                       for i, c in enumerate(line))

    bars = [""] * len(table)
    for i, row in enumerate(rows):
        low, high, at = (100 * row[name] for name in ("accuracy_low", "accuracy_high", "accuracy"))
        bars[i] = f'<span class=bar><i style="width:{at:.1f}%"></i><b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></span>'
    lines = [cells("th", table[0]), *(cells("td", line, bar) for line, bar in zip(table[1:], bars))]
    return f'<div class=scroll><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def one(r):
    """A completion with its parts: those that are not 0, and always the first three."""
    chips = []
    for part in PARTS:
        if part in r and (r[part] or part in PARTS[:3]):
            colour = {True: " good", False: " bad"}[bool(r[part])] if part == "correct" else ""
            chips.append(f'<span class="chip{colour}">{part} {r[part]:.3g}</span>')
    text = re.sub(r"(&lt;/?(?:reasoning|think|answer)&gt;)", r"<span class=tag>\1</span>", html.escape(r["completion"]))
    where = r["model"] if "model" in r else f"{r['run']}, step {r['step']}"
    return f"<div><div class=who>{html.escape(where)} &nbsp; {''.join(chips)}</div><pre>{text}</pre></div>"


def card(prompt, *completions, chips=()):
    two = " two" if len(completions) > 1 else ""
    marks = "".join(f'<span class="chip {"good" if c == "learned" else "bad"}">{html.escape(c)}</span>' for c in chips)
    return (f'<div class=card><div class=ask>{marks}{"<br>" if marks else ""}{html.escape(prompt)}</div>'
            f'<div class="body{two}">{"".join(map(one, completions))}</div></div>')


def page(runs, results):
    """The report as HTML, in the order of the list at the top. results: an evaluation, left out where there is no such file."""
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Report</title>"
           f"<style>{STYLE}</style><h1>Report</h1><p>{html.escape(' · '.join(runs))}</p>"]
    records, trained = [], []
    if os.path.exists(results):
        samples = results.removesuffix(".json") + ".samples.jsonl"
        records = list(read_lines(samples, SAMPLE + ["model", "row"])) if os.path.exists(samples) else []
        out.append("<h2>Held-out accuracy</h2><p>Black: 95 % interval. Better and worse: problems solved more or less often than by "
                   "the first model; p: McNemar's exact test of that split, above 0.05 it may well be chance.</p>")
        summary = read_summary(results)
        main_table, *others = tables(summary)
        out.append(html_table(main_table, summary))
        out.append("<div class=side>")
        out += [f"<div><h3>{' '.join(table[0][:2])}</h3>{html_table([line[1:] for line in table])}</div>" for table in others]
        out.append("</div>")

    picture = io.BytesIO()
    draw(runs).savefig(picture, format="svg", facecolor="white")
    out.append("<h2>Training</h2><p>Faint: every step. Strong: running mean. Points: held-out rows.</p>"
               f'<img alt="training curves" src="data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}">')

    for run in runs:
        if Path(run, "samples.jsonl").exists():
            trained += [{"run": run, **r} for r in read_lines(Path(run, "samples.jsonl"), SAMPLE + ["step"])]
    if found := suspects(records + trained):
        out.append("<h2>Suspects of reward hacking</h2><p>Completions that were paid and look odd, the oddest first. "
                   "Read them: a sign is not a verdict.</p>")
        out += [card(r["prompt"], r, chips=why) for r, why in found]

    if changed := pairs(records):
        out.append("<h2>Before and after</h2>")
        out += [card(a["prompt"], a, b, chips=[title]) for title, a, b in changed]
    elif trained:
        steps = sorted({r["step"] for r in trained})
        first, last = ([r for r in trained if r["step"] == step] for step in (steps[0], steps[-1]))
        out.append("<h2>First and last logged step</h2><p>Different problems: what training looked like then and at the end.</p>")
        for a, b in list(zip(first, last))[:3]:
            out.append(f"<div class=pair>{card(a['prompt'], a)}{card(b['prompt'], b)}</div>")

    if records:
        of_last = sorted((r for r in records if r["model"] == records[-1]["model"]), key=lambda r: -r["reward"])
        for title, some in (("Best", of_last[:3]), ("Worst", of_last[:-4:-1])):
            out.append(f"<h2>{title} of {html.escape(records[-1]['model'])}</h2>")
            out += [card(r["prompt"], r) for r in some]
    return "\n".join(out)


def main(argv=None):
    p = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n")[0])
    p.error = fail
    p.add_argument("--table", metavar="FILE", help="print the tables of an evaluation, the FILE that eval.py wrote")
    p.add_argument("--curves", nargs="+", metavar="RUN", help="draw the training curves of these runs (their --output_dir)")
    p.add_argument("--report", nargs="+", metavar="RUN", help="write a page on these runs")
    p.add_argument("--results", metavar="FILE", help="evaluation that the page shows; default runs/eval.json, if it is there")
    p.add_argument("--output", metavar="FILE", help="picture or page to write; default runs/curves.png, runs/report.html")
    args = p.parse_args(argv)
    if [args.table, args.curves, args.report].count(None) != 2:
        fail("pass one of --table FILE, --curves RUN ..., --report RUN ...")
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
    except (OSError, ValueError) as e:  # ValueError: a picture format that matplotlib does not know
        fail(f"--output {output}: cannot be written ({e})")
    print(output)


if __name__ == "__main__":
    main()
