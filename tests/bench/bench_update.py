"""Model FLOPs utilisation of an update of grpo.py and of sft.py: 6 x parameters x tokens (prompts included, padding not), over the
seconds that an update takes, gradient clipping and the optimiser included, over the rate of a matrix product measured here.

A model of the true shape with random weights is trained on random ids, in grpo.py on --group_size completions a prompt. A prompt is
computed once for those of its completions that are in one micro-batch; so there are two figures: with every completion's prompt
counted, as one that computes them all would have to, and with only the tokens that are computed. Log-probabilities, entropies, the
KL's reference pass (with --beta) and the second forward of --activation_checkpointing cost time and are not counted.

    python tests/bench/bench_update.py                                                       # CPU: the tiny shape
    python tests/bench/bench_update.py --shape qwen2.5-3b --micro_batch_size 16              # GPU
    python tests/bench/bench_update.py --shape qwen2.5-3b --optim adamw8bit --activation_checkpointing --micro_batch_size 32
    python tests/bench/bench_update.py --shape qwen2.5-3b --what sft --rows 64 --prompt_length 100 --completion_length 400
"""
import argparse
import random
import statistics
import tempfile
from types import SimpleNamespace

import shapes
import torch

import grpo
import models
import sft

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model; see shapes.py")
p.add_argument("--what", choices=["grpo", "sft"], nargs="+", default=["grpo", "sft"])
p.add_argument("--rows", type=int, default=256, help="completions an update")
p.add_argument("--group_size", type=int, default=8, help="completions a prompt, of grpo.py")
p.add_argument("--prompt_length", type=int, help="tokens; 150, tiny: 12")
p.add_argument("--completion_length", type=int, help="tokens at most, a quarter of it at least; 512, tiny: 64")
p.add_argument("--rounds", type=int, default=5, help="updates of each, after one that is not counted")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a, more = p.parse_known_args()                                  # the rest are flags of grpo.py and sft.py


device, dtype = shapes.use(a.threads)
prompt, longest = a.prompt_length or (12 if a.shape == "tiny" else 150), a.completion_length or (64 if a.shape == "tiny" else 512)
bandwidth, rate = shapes.peaks(device, dtype)
print(shapes.machine(device, bandwidth, rate))
rng, vocabulary = random.Random(0), shapes.SHAPES[a.shape][5]
lengths = [rng.randint(longest // 4, longest) for _ in range(a.rows)]


def draw(group):
    """Rows of ids, of which each `group` have a prompt in common."""
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(0, a.rows, group)]
    return [prompts[i // group] + [rng.randrange(vocabulary) for _ in range(n)] for i, n in enumerate(lengths)]


def grpo_update(folder, ids):
    args = grpo.parse_args(["--model", folder, "--group_size", str(a.group_size), "--max_new_tokens", str(longest), "--beta", "0",
                            "--warmup", "0", *more])
    tokenizer, eos_ids, _ = models.load_tokenizer(folder)
    run = grpo.build(args, tokenizer, eos_ids, [{}] * a.rows, [], device, dtype)
    rollouts = [grpo.Rollout(i // a.group_size, x[:prompt], x[prompt:], torch.zeros(len(x) - prompt), True, "", {}, rng.choice([-1.0, 1.0]))
                for i, x in enumerate(ids)]
    return lambda: grpo.update(run, rollouts, 1.0, 1.0), run.model


def sft_update(folder, ids):
    args = sft.parse_args(["--model", folder, "--batch_size", str(a.rows), "--steps", "100", *more])
    model = models.load_policy(args, device, dtype)
    logps, optimizer = models.prepare(model, args, dtype), models.Optimizer(model, args)
    rows, stop = [{"ids": torch.tensor(x), "prompt": prompt} for x in ids], SimpleNamespace(signal=0)
    model.train()
    return lambda: sft.train_step(rows, logps, optimizer, device, args, 1, 100, stop), model


for what in a.what:
    ids = draw(a.group_size if what == "grpo" else 1)
    with tempfile.TemporaryDirectory() as folder:
        shapes.save(a.shape, folder, device, dtype)
        update, model = {"grpo": grpo_update, "sft": sft_update}[what](folder, ids)
    lm, took, computed = models.base_lm(model), [], []
    count = lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel())              # noqa: E731
    with lm.base_model.register_forward_pre_hook(count, with_kwargs=True):
        shapes.once(update)
    for _ in range(a.rounds):
        took.append(shapes.once(update))
    size, tokens, median = sum(x.numel() for x in lm.parameters()), sum(map(len, ids)), statistics.median(took)
    rate = max(rate, shapes.peaks(device, dtype)[1])            # a busy machine is measured twice
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at the peak" if device.type == "cuda" else ""
    print(f"{what}.py {' '.join(more)}: {size / 1e6:,.1f} M parameters, {str(dtype)[6:]}, {a.rows} rows of {prompt} + {min(lengths)} to "
          f"{max(lengths)} tokens: {median:.3f} s an update ({min(took):.3f} to {max(took):.3f}), {tokens / median:,.0f} tokens/s, "
          f"{6 * size * tokens / median / rate:.1%} of the matrix rate; {sum(computed) / tokens:.0%} of the tokens are computed: "
          f"{6 * size * sum(computed) / median / rate:.1%}{memory}", flush=True)
    del update, model, lm
    torch.cuda.empty_cache()
    device.type == "cuda" and torch.cuda.reset_peak_memory_stats()
