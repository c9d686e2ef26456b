"""Peak memory of the recipes: each stage that trains runs for a few steps as a user would start it, in a
child process, on a model of the true shape with random weights and on made-up rows. No completion of such
a model ends: lengths are the limit, and memory the most.

    python tests/bench/bench_memory.py                      # GPU: all recipes, tens of GB of disk for a while
    python tests/bench/bench_memory.py --only smollm2            # those with that in their path
    python tests/bench/bench_memory.py --shape tiny --more --max_new_tokens 32   # CPU: that everything runs
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import shapes
import torch

# flag file, shape of its model, GB of the GPU that it is made for
STAGES = [("smollm2-135m-gsm8k/grpo.txt", "smollm2-135m", 8),
          ("qwen2.5-3b-countdown/grpo.txt", "qwen2.5-3b", 48),
          ("qwen2.5-3b-qlora-gsm8k/grpo.txt", "qwen2.5-3b", 24),
          ("qwen2.5-7b-r1/sft.txt", "qwen2.5-7b", 94),
          ("qwen2.5-7b-r1/grpo.txt", "qwen2.5-7b", 94),
          ("qwen2.5-14b-rlvr/grpo.txt", "qwen2.5-14b", 80)]

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--only", default="", help="part of a flag file's path")
p.add_argument("--shape", help="of all models, instead of the true ones")
p.add_argument("--steps", type=int, default=3)
p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags for grpo.py")
a = p.parse_args()
device, dtype = shapes.use(2)
rng = random.Random(0)


def text(n):
    return " ".join(rng.choice(["some", "made", "up", "words"]) for _ in range(n // 5))


def rows_of(task):
    """300 rows of about the lengths of the real ones: a letter is a token here."""
    for _ in range(300):
        yield {"countdown": {"nums": [rng.randint(1, 99) for _ in range(4)], "target": rng.randint(10, 99)},
               "gsm8k": {"question": text(250), "answer": f"{text(900)}\n#### {rng.randint(1, 999)}"},
               "math": {"problem": text(250), "solution": text(900) + r" \boxed{5}", "answer": "5"},
               "code": {"text": text(150), "test_list": ["assert f(1) == 1"], "test_setup_code": ""}}[task]


def run(name, shape, card, folder):
    script, recipe = Path(name).stem, (shapes.ROOT / "recipes" / name).read_text()
    sources = recipe.partition("\n--data ")[2].partition("--")[0].split()
    tasks = [source.split("=")[0].split(":")[0] for source in sources]
    flags = ["--model", folder / "model", "--data", *(f"{task}={folder}/{task}.jsonl" for task in tasks),
             "--steps", a.steps, "--warmup", 0, "--save_every", 0, "--output_dir", folder / "run"]
    if script == "grpo":
        flags += a.more
    if "--eval_data" in recipe:
        flags += ["--eval_data", f"gsm8k={folder}/gsm8k.jsonl:2"]
    command = [sys.executable, shapes.ROOT / f"{script}.py", f"@{shapes.ROOT / 'recipes' / name}", *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
    else:
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "step_seconds" in line]
        peak = max(step["peak_memory_gb"] for step in steps)
        print(f"{name}: {shape}, {len(steps)} steps, {steps[-1]['step_seconds']:.1f} s the last one, "
              f"{peak:.1f} GB at the peak; made for {card} GB", flush=True)
    shutil.rmtree(folder / "run", ignore_errors=True)


with tempfile.TemporaryDirectory() as folder:
    folder, of_shape = Path(folder), None
    for task in ("countdown", "gsm8k", "math", "code"):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    for name, shape, card in STAGES:
        shape = a.shape or shape
        if a.only in name:
            if shape != of_shape:                               # one model at a time: they are large
                shutil.rmtree(folder / "model", ignore_errors=True)
                shapes.save(shape, folder / "model", device, dtype)
                torch.cuda.empty_cache()
                of_shape = shape
            run(name, shape, card, folder)
