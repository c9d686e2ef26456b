"""Peak memory of the recipes: each stage that trains runs for a few steps as a user would start it, in a child process, on a model of
the true shape with random weights and on made-up rows. No completion of such a model ends: lengths are the limit, memory the most.

    python tests/bench/bench_memory.py                           # GPU: all recipes, tens of GB of disk for a while
    python tests/bench/bench_memory.py --only smollm2            # those with that in their path
    python tests/bench/bench_memory.py --shape tiny --more --max_new_tokens 32       # CPU: that everything runs
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import shapes
import torch

ROOT = Path(__file__).parents[2]
#                     flag file, its model's shape, GB of the card that it is made for
STAGES = [("smollm2-135m-gsm8k/grpo.txt", "smollm2-135m", 8), ("qwen2.5-3b-qlora-gsm8k/grpo.txt", "qwen2.5-3b", 24),
          ("qwen2.5-3b-countdown/grpo.txt", "qwen2.5-3b", 48), ("qwen2.5-7b-r1/sft.txt", "qwen2.5-7b", 94),
          ("qwen2.5-7b-r1/grpo.txt", "qwen2.5-7b", 94), ("qwen2.5-14b-rlvr/grpo.txt", "qwen2.5-14b", 80)]

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--only", default="", help="part of a flag file's path")
p.add_argument("--shape", help="of the models, instead of the true ones")
p.add_argument("--steps", type=int, default=3)
p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags that grpo.py gets besides")
a = p.parse_args()
device, dtype = shapes.use(2)
rng = random.Random(0)


def text(n):
    return " ".join(rng.choice(["some", "made", "up", "words"]) for _ in range(n // 5))


ROWS = {"countdown": lambda: {"nums": [rng.randint(1, 99) for _ in range(4)], "target": rng.randint(10, 99), "solution": "1+2",
                              "trace": text(400), "trace_answer": "1+2"},
        "gsm8k": lambda: {"question": text(250), "answer": f"{text(900)}\n#### {rng.randint(1, 999)}"},
        "math": lambda: {"problem": text(250), "solution": text(900) + r" \boxed{5}", "answer": "5"},
        "code": lambda: {"text": text(150), "test_list": ["assert f(1) == 1"], "test_setup_code": "", "code": "f = int"}}

folder, of_shape = Path(tempfile.mkdtemp()), None
for task, row in ROWS.items():
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(300)))
for name, shape, card in STAGES:
    if a.only not in name:
        continue
    shape = a.shape or shape
    if shape != of_shape:                                       # one model at a time: they are large
        for path in (folder / "model").glob("*"):
            path.unlink()
        shapes.save(shape, folder / "model", device, dtype)
        of_shape = shape
        device.type == "cuda" and torch.cuda.empty_cache()
    recipe = (ROOT / "recipes" / name).read_text()
    tasks = [task for task in ROWS if f"{task}=" in recipe or f" {task}" in recipe.partition("--data")[2].partition("--")[0]]
    argv = [sys.executable, str(ROOT / f"{Path(name).stem}.py"), f"@{ROOT / 'recipes' / name}", "--model", str(folder / "model"),
            "--data", *(f"{task}={folder / task}.jsonl" for task in tasks or ["countdown"]), "--steps", str(a.steps), "--warmup", "0",
            "--eval_data", f"gsm8k={folder}/gsm8k.jsonl:2", "--eval_split", "train", "--save_every", "0",
            "--output_dir", str(folder / "run"), "--overwrite", *(a.more if "grpo" in name else [])]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
        continue
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    halved = [line for line in done.stderr.splitlines() if "out of GPU memory" in line]
    peak = max(step["peak_memory_gb"] for step in steps)
    print(f"{name}: {shape}, {len(steps)} steps, {steps[-1]['step_seconds']:.1f} s the last one, {peak:.1f} GB at the peak; "
          f"made for {card} GB{'; ' + ' '.join(halved) if halved else ''}", flush=True)
