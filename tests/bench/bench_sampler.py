"""Useful sampled tokens a second: sampler.Sampler, sampler.generate ("plain") and transformers' generate, and the fraction of
the physical limit that they reach. A model of the true shape with random weights is built on the device.

Useful are the tokens up to a completion's end; what is sampled in a row after it is waste. With --mean_length, so many ids end
a completion that it comes about at random; without, all are --max_new_tokens long. All sample from the model's own distribution
(no top-k, no top-p), the same prompts in one batch, alternately; ours draws its noise within the time measured.

The limit is the larger of two times: each step reads the weights and the keys and values of the rows alive once, at the copy
bandwidth measured here; each token costs 2 FLOPs a parameter and those of its attention, at the matrix rate measured here.

    python tests/bench/bench_sampler.py                               # CPU: 16 prompts x 16, limit 160, mean 40
    python tests/bench/bench_sampler.py --model runs/tiny-grpo        # a checkpoint, its own ends, Countdown prompts
    python tests/bench/bench_sampler.py --shape qwen2.5-3b            # GPU: 32 prompts x 8, 512 tokens each
    python tests/bench/bench_sampler.py --shape qwen2.5-3b --mean_length 330
"""
import argparse
import statistics
import time

import shapes
import torch
import transformers

import models
import sampler

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model that is made; see shapes.py")
p.add_argument("--model", help="checkpoint folder in its place; its prompts are Countdown problems")
p.add_argument("--rounds", type=int, default=5, help="of each, after one that is not counted")
p.add_argument("--prompts", type=int, help="in the batch; 32, tiny: 16")
p.add_argument("--group_size", type=int, help="completions a prompt; 8, tiny: 16")
p.add_argument("--prompt_length", type=int, help="tokens of a prompt, half to all of it for each; 150, tiny: 12")
p.add_argument("--max_new_tokens", type=int, help="tokens of a completion at most; 512, tiny: 160")
p.add_argument("--mean_length", type=float, help="of completions, were there no limit; 0: none ends; 0, tiny: 40")
p.add_argument("--samplers", nargs="+", default=["Sampler", "plain", "transformers"],
               help="what is compared, the first with the others")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()
tiny = a.shape == "tiny"
for flag, small, large in (("prompts", 16, 32), ("group_size", 16, 8), ("prompt_length", 12, 150),
                           ("max_new_tokens", 160, 512), ("mean_length", 40, 0)):
    if getattr(a, flag) is None:
        setattr(a, flag, small if tiny else large)


device, dtype = shapes.use(a.threads)
torch.manual_seed(0)


def made():
    model, vocabulary = shapes.make(a.shape, device, dtype), shapes.SHAPES[a.shape][5]
    lengths = torch.linspace(a.prompt_length / 2, a.prompt_length, a.prompts).long().tolist()
    prompts = [torch.randint(vocabulary, (n,)).tolist() for n in lengths]
    ends = torch.randperm(vocabulary)[:round(vocabulary / a.mean_length)].tolist() if a.mean_length else []
    return model, prompts, ends


def loaded():
    import random

    import rewards
    model = models.load_lm(a.model, device, dtype)
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(a.model), random.Random(0)
    rows = [{"nums": [rng.randint(1, 12) for _ in range(3)], "target": rng.randint(1, 40)} for _ in range(a.prompts)]
    prompts = [tokenizer.apply_chat_template(rewards.messages("countdown", row, "reasoning"), tokenize=True,
                                             add_generation_prompt=True, return_dict=False) for row in rows]
    return model, prompts, [tokenizer.eos_token_id]


model, prompts, ends = loaded() if a.model else made()
fast, width = sampler.Sampler(model), max(map(len, prompts))
keywords = dict(group_size=a.group_size, max_new_tokens=a.max_new_tokens, temperature=1.0, eos_ids=ends)


def ours(sample, seed):
    noise = sampler.uniforms(seed, 0, range(a.prompts * a.group_size), a.max_new_tokens)
    return list(map(len, sample(prompts, noise, **keywords)[0]))


@torch.inference_mode()
def theirs(seed):
    torch.manual_seed(seed)
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                         repetition_penalty=1.0, eos_token_id=ends or None, num_return_sequences=a.group_size,
                         max_new_tokens=a.max_new_tokens, pad_token_id=0)[:, width:]
    ended = torch.isin(out, torch.tensor(ends, dtype=torch.long, device=device))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()


bandwidth, rate = shapes.peaks(device, dtype)
print(shapes.machine(device, bandwidth, rate))
print(f"{a.model or a.shape}: {sum(x.numel() for x in model.parameters()) / 1e6:,.1f} M parameters, {str(dtype)[6:]}; {a.prompts} "
      f"prompts of at most {width} x {a.group_size}, at most {a.max_new_tokens} tokens; {a.rounds} alternating rounds", flush=True)

run = {"Sampler": lambda seed: ours(fast, seed), "transformers": theirs,
       "plain": lambda seed: ours(lambda *x, **y: sampler.generate(model, *x, **y), seed)}
found, starts = {name: [] for name in a.samplers}, [len(x) for x in prompts for _ in range(a.group_size)]
for seed in range(a.rounds + 1):
    for name in a.samplers:
        start = time.perf_counter()
        lengths = run[name](seed)
        took = time.perf_counter() - start
        if seed:
            least = shapes.limit(model, starts, lengths, max(lengths), bandwidth, rate)
            found[name].append((sum(lengths) / took, least / took, statistics.mean(lengths)))
        elif name == "Sampler":
            print(f"Sampler: {fast.why_plain or ('graphs' if fast.graphs else 'no graphs')}, the first time {took:.1f} s", flush=True)
for name, rounds in found.items():
    rates, fractions, means = zip(*rounds)
    print(f"{name:12}  median {statistics.median(rates):,.0f} useful tokens/s  ({min(rates):,.0f} to {max(rates):,.0f}), mean "
          f"completion {statistics.mean(means):.1f} tokens, {statistics.median(fractions):.1%} of the limit")
first, *others = (statistics.median(rate for rate, *_ in rounds) for rounds in found.values())
print(f"{a.samplers[0]} against", ", ".join(f"{name} {first / other:.2f}" for name, other in zip(a.samplers[1:], others)))
