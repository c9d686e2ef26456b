"""Useful sampled tokens a second: transformers' generate, grpo.generate and extras/sampler.py (on a GPU with
CUDA graphs), and the share of the physical limit (see shapes.limit) that they reach. A model of the true
shape with random weights is made on the device.

Useful tokens are those up to a completion's end. With --mean_length, a random set of ids ends a
completion; without, all are --max_new_tokens long. All sample from the model's own distribution (no
top-k, no top-p), the same prompts in one batch, in turn; drawing the noise counts. Seconds of this process's
CPU time count too: on a CPU that others use, with --threads 1, they are the figures to compare.

    python tests/bench/bench_sampler.py                          # CPU: 16 prompts x 16, limit 160, mean 40
    python tests/bench/bench_sampler.py --model runs/tiny-grpo   # a checkpoint, its own ends, Countdown
    python tests/bench/bench_sampler.py --shape qwen2.5-3b       # GPU: 32 prompts x 8, 512 tokens each
    python tests/bench/bench_sampler.py --shape qwen2.5-3b --mean_length 330
"""
import argparse
import itertools
import random
import statistics
import time
from functools import partial

import shapes
import torch

import grpo
import rewards
from extras.sampler import Sampler

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model that is made; see shapes.py")
p.add_argument("--model", help="checkpoint folder in its place; its prompts are Countdown problems")
p.add_argument("--rounds", type=int, default=5, help="of each, after one that is not counted")
p.add_argument("--prompts", type=int, help="in the batch; 32, tiny: 16")
p.add_argument("--group_size", type=int, help="completions per prompt; 8, tiny: 16")
p.add_argument("--prompt_length", type=int, help="tokens of a prompt, each half to all of it; 150, tiny: 12")
p.add_argument("--max_new_tokens", type=int, help="tokens of a completion at most; 512, tiny: 160")
p.add_argument("--mean_length", type=float, help="of completions without a limit; 0: none ends; 0, tiny: 40")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()
for flag, small, large in (("prompts", 16, 32), ("group_size", 16, 8), ("prompt_length", 12, 150),
                           ("max_new_tokens", 160, 512), ("mean_length", 40, 0)):
    if getattr(a, flag) is None:
        setattr(a, flag, small if a.shape == "tiny" else large)

device, dtype = shapes.use(a.threads)
torch.manual_seed(0)
if a.model:
    model, rng = grpo.load_lm(a.model, device, dtype), random.Random(0)
    tokenizer = grpo.load_tokenizer(a.model, "reasoning")
    rows = [{"nums": rng.choices(range(1, 13), k=3), "target": rng.randint(1, 40)} for _ in range(a.prompts)]
    texts = grpo.render(tokenizer, [rewards.messages("countdown", row) for row in rows])
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ends = sorted(grpo.end_ids(tokenizer, model.generation_config))
else:
    model, vocabulary = shapes.make(a.shape, device, dtype), shapes.SHAPES[a.shape][5]
    lengths = torch.linspace(a.prompt_length / 2, a.prompt_length, a.prompts).long().tolist()
    prompts = [torch.randint(vocabulary, (n,)).tolist() for n in lengths]
    ends = torch.randperm(vocabulary)[:round(vocabulary / a.mean_length)].tolist() if a.mean_length else []
width, buffered = max(map(len, prompts)), Sampler(grpo.pick)


def ours(sampler, seed):
    """Lengths of the completions."""
    noise = grpo.uniforms([[seed, i] for i in range(a.prompts * a.group_size)], a.max_new_tokens)
    return list(map(len, sampler(model, prompts, noise, a.group_size, a.max_new_tokens, 1.0, ends)[0]))


@torch.inference_mode()
def theirs(seed):
    torch.manual_seed(seed)
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                         top_p=1.0, repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=0,
                         num_return_sequences=a.group_size, max_new_tokens=a.max_new_tokens)[:, width:]
    ended = torch.isin(out, torch.tensor(ends, dtype=torch.long, device=device))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()


bandwidth, rate = shapes.peaks(device, dtype)
print(shapes.machine(device, bandwidth, rate))
size = sum(x.numel() for x in model.parameters())
print(f"{a.model or a.shape}: {size / 1e6:,.1f} M parameters, {str(dtype)[6:]};",
      f"{a.prompts} prompts of at most {width} x {a.group_size}, at most {a.max_new_tokens} tokens;",
      f"{a.rounds} rounds in turn", flush=True)
starts = [len(x) for x in prompts for _ in range(a.group_size)]
ways = {"transformers": theirs, "grpo.generate": partial(ours, grpo.generate),
        "extras.sampler": partial(ours, buffered)}
found = {name: [] for name in ways}
for seed in range(a.rounds + 1):
    for name, run in ways.items():
        lengths, before = [], time.process_time()
        took = shapes.once(lambda: lengths.extend(run(seed)))
        cpu = time.process_time() - before
        least = shapes.limit(model, starts, lengths, max(lengths), bandwidth, rate)
        if seed:
            n = sum(lengths)
            found[name].append((n / took, n / cpu, least / took, n / len(lengths)))
        elif name == "extras.sampler":
            print(f"extras.sampler: CUDA graphs {buffered.graphs}, first call {took:.1f} s", flush=True)
for name, rounds in found.items():
    rates, cpu, shares, means = zip(*rounds)
    median, per_cpu, share = map(statistics.median, (rates, cpu, shares))
    print(f"{name:14}  median {median:,.0f} useful tokens/s  ({min(rates):,.0f} to {max(rates):,.0f}), "
          f"{per_cpu:,.0f} per CPU second, mean completion {statistics.mean(means):.1f} tokens, "
          f"{share:.1%} of the limit")
for one, other in itertools.combinations(reversed(ways), 2):
    wall, cpu = (statistics.median(x[i] / y[i] for x, y in zip(found[one], found[other])) for i in (0, 1))
    print(f"{one} against {other}: {wall:.2f}, by CPU time {cpu:.2f}  (medians of rounds)")
