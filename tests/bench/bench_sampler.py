"""Useful sampled tokens a second, grpo.generate against transformers' generate: completions of ragged length, ends at random.

Useful are the tokens up to a completion's end; what is sampled in a row after it is waste. Without --model, the tiny model of
sft.py with random weights gets an end token whose probability is 1 / --mean_length at every position: lengths are geometric, cut
off at the limit. Both sample from the model's own distribution (no top-k, no top-p), the same left-padded prompts, in one batch,
alternately; ours draws its noise within the time measured.

    python tests/bench/bench_sampler.py                      # 256 rows: 16 prompts x 16, limit 160
    python tests/bench/bench_sampler.py --model runs/tiny-grpo
"""
import argparse
import contextlib
import io
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--model", help="checkpoint folder; without it a tiny one is made")
p.add_argument("--rounds", type=int, default=5, help="of each, after one that is not counted")
p.add_argument("--prompts", type=int, default=16, help="in the batch")
p.add_argument("--group_size", type=int, default=16, help="completions a prompt")
p.add_argument("--max_new_tokens", type=int, default=160, help="tokens of a completion at most")
p.add_argument("--mean_length", type=float, default=40, help="of the made model's completions, were there no limit")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()
os.environ |= {"OMP_NUM_THREADS": str(a.threads), "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin stall a shared machine

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
import countdown  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(a.threads)
folder, made = Path(tempfile.mkdtemp()), not a.model
if made:
    a.model, tokenizer = str(folder / "model"), sft.tiny_tokenizer()
    sft.tiny_model(tokenizer, 0).save_pretrained(a.model)
    tokenizer.save_pretrained(a.model)
with contextlib.redirect_stdout(io.StringIO()):
    countdown.main(["--out", str(folder), "--train", str(max(64, a.prompts)), "--test", "1", "--traces", "0",
                    "--numbers", "3", "--max_number", "12", "--max_target", "40"])
args = grpo.parse_args(["--model", a.model, "--data", f"countdown={folder}", "--max_new_tokens", str(a.max_new_tokens),
                        "--beta", "0"])
tokenizer, context = grpo.load_tokenizer(args)
prompts = [row["prompt_ids"] for row in grpo.read_rows(args, tokenizer, context, args.data, "train")[:a.prompts]]
run = grpo.build(args, tokenizer, prompts, [])
model, ends, pad = run.sampler, sorted(run.eos_ids), tokenizer.pad_token_id or 0


def ends_at_random(module, inputs, logits):
    """Gives the end token its probability, whatever the others' logits."""
    logits[..., ends] = -math.inf
    rest = logits.logsumexp(-1, keepdim=True)
    logits[..., ends[:1]] = rest - math.log(a.mean_length - 1)
    return logits


if made:
    model.get_output_embeddings().register_forward_hook(ends_at_random)


def ours(seed):
    noise = grpo.uniforms(seed, 0, range(a.prompts * a.group_size), a.max_new_tokens)
    ids, _ = grpo.generate(model, prompts, noise, group_size=a.group_size, max_new_tokens=a.max_new_tokens, temperature=1.0,
                           eos_ids=ends, pad_id=pad)
    return list(map(len, ids))


@torch.inference_mode()
def theirs(seed):
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(x)) + x for x in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends,
                         num_return_sequences=a.group_size, max_new_tokens=a.max_new_tokens, pad_token_id=pad)[:, width:]
    ended = torch.isin(out, torch.tensor(ends, device=out.device))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()


rates, lengths = {"grpo.py": [], "generate": []}, {"grpo.py": [], "generate": []}
for seed in range(a.rounds + 1):
    for name, sample in (("grpo.py", ours), ("generate", theirs)):
        start = time.perf_counter()
        found = sample(seed)
        took = time.perf_counter() - start
        if seed:
            rates[name].append(sum(found) / took)
            lengths[name] += found
size = sum(x.numel() for x in model.parameters()) / 1e6
print(f"{size:.1f} M parameters, {str(model.dtype)[6:]}, {a.threads} threads; {a.prompts} prompts x "
      f"{a.group_size}, at most {a.max_new_tokens} tokens; {a.rounds} alternating rounds")
for name, rate in rates.items():
    print(f"{name:9}  median {statistics.median(rate):,.0f} useful tokens/s  ({min(rate):,.0f} to {max(rate):,.0f}), mean completion "
          f"{statistics.mean(lengths[name]):.1f} tokens, "
          f"{sum(n == a.max_new_tokens for n in lengths[name]) / len(lengths[name]):.1%} at the limit")
print(f"ratio      {statistics.median(rates['grpo.py']) / statistics.median(rates['generate']):.2f}")
