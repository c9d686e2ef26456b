"""Model FLOPs utilisation of a training step without its sampling, of grpo.py and of sft.py: 6 x parameters x
tokens (prompts included, padding not), over the seconds of the step, over the rate of a matrix product
measured here.

The scripts' own loops run on a model of the true shape with random weights; the sampler and the rows are
replaced by random ids. Log-probabilities, clipping and the optimiser count as time, and so do the
reference's pass (with --beta) and the second forward pass of --activation_checkpointing; their FLOPs do
not.

    python tests/bench/bench_update.py                                              # CPU: the tiny shape
    python tests/bench/bench_update.py --shape qwen2.5-3b --micro_batch_size 16     # GPU
    python tests/bench/bench_update.py --shape qwen2.5-3b --optim adamw8bit --activation_checkpointing
    python tests/bench/bench_update.py --shape qwen2.5-3b --what sft --rows 64 --completion_length 400
"""
import argparse
import random
import statistics
import tempfile
import time

import shapes
import torch

import grpo
import sft

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model; see shapes.py")
p.add_argument("--what", choices=["grpo", "sft"], nargs="+", default=["grpo", "sft"])
p.add_argument("--rows", type=int, default=256, help="completions per step")
p.add_argument("--group_size", type=int, default=8, help="completions per prompt, of grpo.py")
p.add_argument("--prompt_length", type=int, help="tokens; 150, tiny: 12")
p.add_argument("--completion_length", type=int, help="tokens, each a quarter to all of it; 512, tiny: 64")
p.add_argument("--rounds", type=int, default=5, help="steps of each, after one that is not counted")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a, more = p.parse_known_args()                                  # the others are flags of grpo.py and sft.py
tiny = a.shape == "tiny"
prompt, longest = a.prompt_length or (12 if tiny else 150), a.completion_length or (64 if tiny else 512)

device, dtype = shapes.use(a.threads)
bandwidth, rate = shapes.peaks(device, dtype)
print(shapes.machine(device, bandwidth, rate))
rng, vocabulary, ends = random.Random(0), shapes.SHAPES[a.shape][5], []
lengths = [rng.randint(longest // 4, longest) for _ in range(a.rows)]


def draw(n):
    return [rng.randrange(vocabulary) for _ in range(n)]


def log(*_):
    """In place of the scripts' own: keeps when each step has ended."""
    shapes.sync()
    ends.append(time.perf_counter())


def run_grpo(*flags):
    problems = [{"task": "countdown", "nums": [1, 2], "target": 3} for _ in range(a.rows // a.group_size)]

    def roll_out(sampler, tokenizer, rows, *_):
        """Random completions of the given lengths, in place of sampled ones."""
        groups = [[] for _ in rows]
        for n, (row, group) in zip(lengths, zip(rows * a.group_size, groups * a.group_size)):
            parts = dict.fromkeys(("reward", "correct", "format"), rng.random())
            group.append(grpo.Rollout(row | {"prompt_ids": draw(prompt)}, draw(n), torch.zeros(n), True, "", parts))
        return groups

    grpo.read_rows = lambda sources, *_: problems if sources else []
    grpo.roll_out, grpo.log = roll_out, log
    grpo.main([*flags, "--prompts_per_step", str(len(problems)), "--group_size", str(a.group_size),
               "--max_new_tokens", str(longest), "--max_resample", "0", "--beta", "0", *more])


def run_sft(*flags):
    encoded = [(torch.tensor(draw(prompt + n)), torch.tensor([-100] * prompt + draw(n))) for n in lengths]
    sft.rewards.load_rows, sft.encode, sft.append = lambda *_: [{}], lambda *_: encoded, log
    sft.main([*flags, "--batch_size", str(a.rows), *more])


for what, run in (("grpo", run_grpo), ("sft", run_sft)):
    if what in a.what:
        with tempfile.TemporaryDirectory() as folder:
            shapes.save(a.shape, f"{folder}/model", device, dtype)
            run("--model", f"{folder}/model", "--output_dir", f"{folder}/run", "--save_every", "0",
                "--steps", str(a.rounds + 1), "--warmup", "0")
        took = [after - before for before, after in zip(ends, ends[1:])]
        size = sum(x.numel() for x in shapes.make(a.shape, "meta", dtype).parameters())
        tokens, median = sum(lengths) + prompt * a.rows, statistics.median(took)
        share = 6 * size * tokens / median / rate
        print(f"{what}.py {' '.join(more)}: {size / 1e6:,.1f} M parameters, {str(dtype)[6:]},",
              f"{a.rows} rows of {prompt} + {min(lengths)} to {max(lengths)} tokens:",
              f"{median:.3f} s a step ({min(took):.3f} to {max(took):.3f}),",
              f"{tokens / median:,.0f} tokens/s, {share:.1%} of the matrix rate", flush=True)
        ends.clear()
