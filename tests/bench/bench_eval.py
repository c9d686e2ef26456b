"""How fast eval.py answers problems with solved examples before them: prompts, prefilled and sampled tokens a second, against
its sampling loop alone on the same prompts and against the physical limit.

A model of the true shape with random weights; made-up prompts as long as GSM8K's with eight solved problems before each, which
are the same in all of them; so many ids end a completion that it ends at random, after --mean_length tokens on average. Each
round runs, one after the other,
- eval.py: eval.evaluate_model, with noise, decoding, scoring, and records to a file;
- loop: eval.complete on the same batches, noise ready;
- prefill: the same for one token.

The limit is the larger of two times for each phase, given --batch_size. Prefill: FLOPs of all prompts' tokens at the matrix rate
measured here. Decoding: FLOPs likewise, or bytes, every step reading the weights and the keys and values of the rows alive once,
at the copy bandwidth measured here.

    python tests/bench/bench_eval.py                                                   # CPU: 64 prompts, tiny
    python tests/bench/bench_eval.py --shape qwen2.5-3b --prompts 1319 --batch_size 256 # GPU
"""
import argparse
import contextlib
import os
import random
import statistics

import shapes

import numpy as np

import eval as ev
import rewards
import sft

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model, one of shapes.py")
p.add_argument("--prompts", type=int, default=64, help="GSM8K's test split has 1319")
p.add_argument("--shots_length", type=int, default=1000, help="tokens that all prompts begin with")
p.add_argument("--own_length", type=int, nargs=2, default=[40, 300], metavar=("LEAST", "MOST"), help="tokens of a prompt after those")
p.add_argument("--max_new_tokens", type=int, default=256, help="tokens of a completion at most")
p.add_argument("--mean_length", type=float, default=150, help="of completions, were there no limit")
p.add_argument("--batch_size", type=int, default=128, help="as eval.py's")
p.add_argument("--rounds", type=int, default=3, help="of each, after one that is not counted")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()


device, dtype = shapes.use(a.threads)
bandwidth, rate = shapes.peaks(device, dtype)
lm, rng = shapes.make(a.shape, device, dtype), random.Random(0)
config = lm.config
ids = range(config.vocab_size)
shots = rng.choices(ids, k=a.shots_length)
prompts = [shots + rng.choices(ids, k=rng.randint(*a.own_length)) for _ in range(a.prompts)]
tokenizer = sft.tiny_tokenizer()
lm.generation_config.eos_token_id = rng.sample(ids, round(config.vocab_size / a.mean_length))
ends = {tokenizer.eos_token_id, *lm.generation_config.eos_token_id}
rows = [{"task": "gsm8k", "question": f"What is {i} more than 1?", "answer": f"#### {i + 1}"} for i in range(a.prompts)]
args = ev.parse_args(["--model", a.shape, "--max_new_tokens", str(a.max_new_tokens), "--batch_size", str(a.batch_size),
                      "--temperature", "1"])
args.weights = rewards.WEIGHTS
order = sorted(range(a.prompts), key=lambda i: -len(prompts[i]))                               # as eval.evaluate_model
batches = [order[at:at + a.batch_size] for at in range(0, a.prompts, a.batch_size)]
noise = [np.stack([np.random.default_rng([args.seed, i, 0]).random(a.max_new_tokens, np.float32) for i in batch]) for batch in batches]


def evaluated():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        records = ev.evaluate_model(a.shape, lm, (tokenizer, prompts, []), rows, args, nowhere)
    return {record["row"]: record["n_tokens"] for record in records}


def sampled(max_new_tokens=a.max_new_tokens):
    lengths, options = {}, argparse.Namespace(samples=1, max_new_tokens=max_new_tokens, temperature=1.0)
    for batch, u in zip(batches, noise):
        found = ev.complete(lm, [prompts[i] for i in batch], ends, options, u)
        lengths |= zip(batch, map(len, found))
    return lengths


def limit(lengths):
    """Seconds of prefill and of decoding at the least"""
    layers, head = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    embedding = lm.get_input_embeddings().weight.numel()
    size = sum(x.numel() for x in lm.parameters()) - (0 if config.tie_word_embeddings else embedding)        # that a token meets
    attention = 4 * layers * config.num_attention_heads * head                                 # FLOPs of a token for each it looks at
    seen = sum(len(x) * (len(x) + 1) / 2 for x in prompts)
    prefill = 2 * (size - embedding) * sum(map(len, prompts)) + 2 * embedding * a.prompts + attention * seen
    new = [lengths[i] - 1 for i in range(a.prompts)]             # the first token comes of the prefill
    steps = sum(max(new[i] for i in batch) for batch in batches)
    return prefill / rate, shapes.limit(lm, map(len, prompts), new, steps, bandwidth, rate)


print(shapes.machine(device, bandwidth, rate))
print(f"{a.shape}, {str(dtype)[6:]}: {a.prompts} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
      f"{a.shots_length} of them the same in all; --batch_size {a.batch_size}; {a.rounds} alternating rounds", flush=True)
took, runs = {"eval.py": [], "loop": [], "prefill": []}, {"eval.py": evaluated, "loop": sampled, "prefill": lambda: sampled(1)}
for done in range(a.rounds + 1):
    lengths = {}
    for name, run in runs.items():
        seconds = shapes.once(lambda: lengths.update({name: run()}))
        if done:
            took[name].append(seconds)
        else:
            print(f"{name:8} first time {seconds:.1f} s", flush=True)
    assert a.shape != "tiny" or lengths["eval.py"] == lengths["loop"]                       # in bf16 batches of other sizes may differ
took = {name: statistics.median(seconds) for name, seconds in took.items()}
prefilled, new, least = sum(map(len, prompts)), sum(lengths["eval.py"].values()), limit(lengths["eval.py"])
for name in ("eval.py", "loop"):
    print(f"{name:8} {took[name]:6.1f} s: {a.prompts / took[name]:,.2f} prompts/s, {new / took[name]:,.0f} sampled tokens/s, "
          f"{prefilled / took[name]:,.0f} prefilled tokens/s, {sum(least) / took[name]:.1%} of the limit")
decode = took["loop"] - took["prefill"]
print(f"of which prefill {took['prefill']:.1f} s: {prefilled / took['prefill']:,.0f} tokens/s, {least[0] / took['prefill']:.1%} of "
      f"the limit; decoding {decode:.1f} s: {new / decode:,.0f} tokens/s, {least[1] / decode:.1%} of the limit")
cut = sum(n == a.max_new_tokens for n in lengths["eval.py"].values()) / a.prompts
print(f"mean completion {new / a.prompts:.0f} tokens, {cut:.0%} at the limit of {a.max_new_tokens}; eval.py has "
      f"{took['sampler'] / took['eval.py']:.2f} of its loop's speed")
