"""GRPO: teach a language model to reason with verifiable rewards and group sampling.

One step of the loop in train(), with the numbers that the code repeats:

 1. Draw prompts, in shuffled epochs.
 2. Sample a group of G completions for each. Token ids are never re-tokenised; end tokens are trained.
 3. Score every completion (rewards.py). A dead group, whose rewards are all equal, carries no gradient: fresh
    prompts replace it, up to --max_resample times (DAPO, arXiv 2503.14476, section 3.2).
 4. Advantage: (reward - mean of its group) / std of its group (GRPO, arXiv 2402.03300, section 4.1.2).
 5. Log-probabilities of the sampled ids under the reference and the policy, at the sampling temperature, in
    chunks: no [batch, time, vocabulary] tensor ever exists.
 6. Clipped policy loss, plus --beta times the k3 estimate of the KL to the frozen reference, normalised by a
    count over the whole step: neither micro-batches nor processes change the update.
 7. Clip the gradient, update the fp32 weights, refresh the copy of them that the sampler reads.
 8. Log metrics and samples, evaluate on held-out rows, save a checkpoint.

Unlike in the paper, the loss is a mean over tokens (see --loss), beta is small, dead groups are replaced, and
the old log-probabilities are the policy's own, as the sampler's kernels round differently.

    python grpo.py --model Qwen/Qwen2.5-3B-Instruct                 # Countdown on one GPU with the defaults
    python grpo.py @recipes/tiny/grpo.txt                           # minutes on two CPU cores
    torchrun --nproc_per_node 8 grpo.py --model ... --data gsm8k    # eight GPUs
"""
import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm, trange

import rewards

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STOP = []                       # the signals that asked this process to stop
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
LOGS = ("metrics.jsonl", "samples.jsonl")
HEAD_LOGITS = 2 ** 26           # logits that exist at a time: 256 MB in fp32
PARTS = ("loss", "kl", "clip_low", "clip_high", "entropy", "logp_gap", "seen")
MAY_CHANGE = {"resume", "output_dir", "save_every", "log_to", "micro_batch_size", "sample_batch_size", "fsdp",
              "merge", "activation_checkpointing", "offload_reference"}  # at --resume: they change no update
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------- flags
def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)

def note(message):
    """Print a line on stderr, on rank 0, that does not break a progress bar."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)

def flag_parser():
    """argparse that also reads @FILE, flags as in a shell with # comments, and whose errors are one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.error = fail
    return parser

def at_least(least, kind=int):
    """An argparse type: a finite number that is not below `least`."""
    def number(text):
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return kind(text)
    return number

NATURAL, POSITIVE, FLOAT = at_least(0), at_least(1), at_least(0, float)

def parse_args(argv=None):
    parser = flag_parser()
    add = parser.add_argument_group("task").add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="prompts: TASK[=PATH][:N]")
    add("--pass_rate", nargs=2, type=FLOAT, metavar=("LOW", "HIGH"), help="keep rows with a pass_rate within")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--weights", nargs="+", default=[f"{part}={w}" for part, w in rewards.WEIGHTS.items()],
        metavar="PART=WEIGHT", help="of the parts of the reward; parts that are not named weigh 0")
    add("--length_penalty", nargs=2, type=NATURAL, default=list(rewards.LENGTH), help="its tokens, START END")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, answered greedily")
    add("--eval_every", type=POSITIVE, default=50, help="steps between evaluations")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts_per_step", type=POSITIVE, default=32, help="groups per step, over all processes")
    add("--group_size", type=at_least(2), default=8, help="completions per prompt")
    add("--max_new_tokens", type=POSITIVE, default=1024, help="length limit of a completion, in tokens")
    add("--temperature", type=at_least(1e-3, float), default=1.0, help="of sampling and of what is trained")
    add("--temperature_end", type=at_least(1e-3, float), help="anneal linearly to this")
    add("--max_resample", type=NATURAL, default=2, help="rounds of fresh prompts a step for dead groups")
    add("--sample_batch_size", type=POSITIVE, default=512, help="completions sampled at once: memory only")
    add = parser.add_argument_group("loss").add_argument
    add("--steps", type=POSITIVE, default=500, help="number of training steps")
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "cispo", "gspo"], default="dapo", help="policy_loss")
    add("--scale", choices=["group", "batch", "none"], default="group", help="std that normalises advantages")
    add("--clip_low", type=FLOAT, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=FLOAT, default=0.2, help="the ratio is clipped above 1 + this")
    add("--beta", type=FLOAT, default=0.001, help="weight of the KL to the initial model; 0: off")
    add("--offload_reference", action="store_true", help="keep it on the CPU except during its forward pass")
    add("--mask_truncated", action="store_true", help="do not train on completions that were cut off")
    add("--inner_epochs", type=POSITIVE, default=1, help="updates per step on the same rollouts")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=FLOAT, default=1e-6, help="peak learning rate; LoRA takes ten times as much")
    add("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], default="constant", help="after warm-up")
    add("--max_grad_norm", type=FLOAT, default=1.0, help="clip the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "paged_adamw8bit", "muon"], default="adamw",
        help="8bit: moments of 2 bytes a parameter, not 8; paged: on the CPU if need be; muon: for matrices")
    add("--muon_lr", type=FLOAT, default=1e-3, help="peak learning rate of the layers' matrices under muon")
    add("--micro_batch_size", type=POSITIVE, default=8, help="rows per forward pass: speed and memory only")
    add = parser.add_argument_group("model and memory").add_argument
    add("--lora_rank", type=NATURAL, default=0, help="LoRA on all linear layers but the head; 0: whole model")
    add("--lora_alpha", type=FLOAT, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: keep the frozen base in nf4")
    add("--merge", action="store_true", help="LoRA: also write merged/, the base with the adapter merged in")
    add("--activation_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--dtype", choices=["float32", "bfloat16"], help="of compute; None: bfloat16 on a GPU, else float32")
    add("--fsdp", action="store_true", help="shard a whole model over torchrun's processes (FSDP2)")
    add = parser.add_argument_group("files and logs").add_argument
    add("--output_dir", default="runs/grpo", help="final model, checkpoints, logs")
    add("--save_every", type=NATURAL, default=50, help="steps between checkpoints; 0: only when stopped")
    add("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir, if any")
    add("--seed", type=NATURAL, default=0, help="of the data order, the sampling and new adapters")
    return parser.parse_args(argv)

def advantages(rewards, group_size, scale="group"):
    """[N] rewards, a group's completions side by side -> [N] advantages: r - mean(group), over a std.

    scale: `group` (arXiv 2402.03300, section 4.1.2), `batch` (one std, 2508.08221), `none` (2503.20783).
    A group of equal rewards gets exactly 0, whatever rounding makes of its mean."""
    r = rewards.float().view(-1, group_size)                            # [N / G, G]
    centred = r - r.mean(1, keepdim=True)
    if scale != "none":
        std = r.std(1, keepdim=True) if scale == "group" else r.std()
        centred = centred / (std + 1e-4)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)          # [N / G, 1]
    return centred.masked_fill(equal, 0.0).view(-1)

def policy_loss(logp, old_logp, ref_logp, adv, mask, *, loss="dapo", clip_low=0.2, clip_high=0.2, beta=0.0,
                num_tokens, num_seqs, max_new_tokens):
    """One micro-batch's share of the step's loss, to be minimised: the shares add up to the loss of the step.

    logp, old_logp, ref_logp: [n, T] log-probabilities of the sampled ids (ref_logp: None when beta is 0);
    adv: [n]; mask: [n, T], 1 on trained tokens; num_tokens, num_seqs: of the whole step, over all processes.
      grpo     mean over a sequence's tokens, then over sequences     arXiv 2402.03300, eq. 3
      dr_grpo  sum over tokens / (sequences * max_new_tokens)         arXiv 2503.20783, section 3.2
      dapo     mean over all tokens of the step                       arXiv 2503.14476, eq. 8
      cispo    REINFORCE weighted by the capped, detached ratio       arXiv 2506.13585, eq. 4
      gspo     one ratio per sequence, its tokens' geometric mean     arXiv 2507.18071, eqs. 5-7
    Returns the loss and its parts, which add up too. Where all advantages and beta are 0, the loss has no
    gradient, until you add a term of your own to per_token."""
    log_ratio = logp - old_logp                                         # [n, T]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                    # [n, 1]
    if loss == "gspo":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / lengths   # [n, 1]
    ratio, adv = log_ratio.exp(), adv[:, None]                          # [n, T] or [n, 1], [n, 1]
    per_token = kl = torch.zeros_like(logp)                             # [n, T]
    if adv.any() and loss == "cispo":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * adv * logp
    elif adv.any():                                                     # PPO, arXiv 1707.06347, eq. 7
        per_token = -torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    if beta:                                                            # k3, arXiv 2402.03300, eq. 4
        kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        per_token = per_token + beta * kl
    norm = {"grpo": lengths * num_seqs, "gspo": lengths * num_seqs, "dapo": num_tokens, "cispo": num_tokens,
            "dr_grpo": num_seqs * max_new_tokens}[loss]
    total = (per_token * mask / norm).sum()
    parts = {"kl": kl, "clip_low": (ratio < 1 - clip_low) * (adv < 0),
             "clip_high": (ratio > 1 + clip_high) * (adv > 0)}
    parts = {name: (x * mask).sum().detach() / num_tokens for name, x in parts.items()}
    return total, parts | {"loss": total.detach()}

def completion_logps(lm, ids, prompt_lengths, mask, temperature=1.0, chunk=HEAD_LOGITS):
    """Log-probabilities of the completions' ids at `temperature` and, without gradient, entropies, [n, T],
    0 where the mask is. ids [n, L]: prompt, completion, padding (needs no mask, as attention is causal);
    prompt_lengths [n]; mask [n, T]. At most `chunk` logits exist at once, of completions alone; the backward
    pass computes them again."""
    def head(h, targets):
        logps = (lm.get_output_embeddings()(h).float() / temperature).log_softmax(-1)   # [m, V]; bf16: noise
        frozen = logps.detach()                 # entropies of `logps` itself would keep their gradient
        return logps.gather(1, targets[:, None]).squeeze(1), -(frozen.exp() * frozen).sum(-1)

    states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state    # [n, L, H]
    row, t = mask.nonzero(as_tuple=True)                                        # [tokens] each
    place = prompt_lengths[row] + t
    hidden, targets = states[row, place - 1], ids[row, place]                   # [tokens, H], [tokens]
    size = max(1, chunk // lm.config.get_text_config().vocab_size)
    if len(targets) > size and torch.is_grad_enabled():
        head = partial(torch.utils.checkpoint.checkpoint, head, use_reentrant=False)
    pieces = [head(h, t) for h, t in zip(hidden.split(size), targets.split(size))]
    blank = torch.zeros_like(mask, dtype=torch.float32)
    return tuple(blank.index_put((row, t), torch.cat(part)) for part in zip(*pieces))


# ----------------------------------------------------------------------------------------- sampling
def uniforms(seed, step, rows, n):
    """[len(rows), n] numbers in [0, 1): the noise of a row is a function of (seed, step, row) alone."""
    streams = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])) for row in rows]
    return torch.tensor(np.array([stream.random(n, dtype=np.float32) for stream in streams])).view(-1, n)

def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n], their log-probabilities [n] at `temperature`.

    Inverse CDF: the first id whose cumulated probability exceeds u. u is kept below their sum, so that an id
    without probability is never picked, whatever rounding does."""
    p = (logits.float() / temperature).softmax(-1)
    if u is None:
        ids = logits.argmax(-1, keepdim=True)
    else:
        sums = p.cumsum(1)
        below = sums[:, -1:].nextafter(u.new_zeros(()))
        ids = torch.searchsorted(sums, torch.minimum(u[:, None], below), right=True)
    return ids.squeeze(1), p.gather(1, ids).log().squeeze(1)

def round_up(n, multiple):
    return -(-n // multiple) * multiple

class Sampler:
    """Samples groups of completions. All prompts end in the same column, so that each step is the same
    operations on the same addresses: on a GPU, a CUDA graph captured once for a number of rows and columns.
    Finished rows leave the batch. A Python number would be frozen in a graph: a sampling option of yours
    (top_p ...) must be a buffer, like self.temperature, that allocate() makes and start() fills."""

    def __init__(self, model, eos_ids, graphs=None):
        self.model, self.eos_ids = model, eos_ids
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self.blocks = (32, 128) if self.graphs else (1, 1)      # rows and columns come in multiples of these
        self.rows = self.columns = 0                            # of the buffers
        config = model.config.get_text_config()
        layers = transformers.DynamicCache(config=config).layers
        if set(map(type, layers)) != {transformers.cache_utils.DynamicLayer}:
            fail(f"--model: the cache of {config.model_type} is not keys and values alone: unsupported")
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1):
                fail(f"--model: it changes its logits ({name}), which a head in chunks leaves out")

    @torch.inference_mode()
    def __call__(self, prompts, noise, group_size, max_new_tokens, temperature):
        """P prompts, lists of ids -> P * G completions (with their end token, if any), the log-probabilities
        of their ids. noise [P * G, max_new_tokens]; None: greedy. A signal to stop cuts all short."""
        n, width = len(prompts) * group_size, max(map(len, prompts))
        rows = self.start(prompts, noise, group_size, width, max_new_tokens, temperature)
        for t in trange(max_new_tokens, desc="sampling", delay=2, leave=False, disable=RANK > 0 or None):
            if t % (8 if self.graphs else 4) == 0:              # to see which rows ended waits for the GPU
                rows = self.compact(rows, width + t)
                if rows == 0 or STOP:
                    break
            self.advance(rows, round_up(width + t, self.blocks[1]), noise is None)
        lengths, tokens = self.lengths[:n].tolist(), self.tokens[:n, width - 1:].tolist()
        logps = self.logps[:n, width - 1:].cpu()
        return [x[:k] for x, k in zip(tokens, lengths)], [x[:k].clone() for x, k in zip(logps, lengths)]

    def allocate(self, rows, columns):
        """Make larger buffers; captured graphs hold the addresses of the old ones."""
        self.rows, self.columns, self.captured, self.kv = rows, columns, {}, {}
        with self.model.device:
            self.bias = torch.zeros(rows, columns, dtype=self.model.dtype)      # added to attention scores
            self.noise, self.logps = torch.zeros(2, rows, columns)
            self.tokens = torch.zeros(rows, columns, dtype=torch.long)
            self.token, self.position, self.row, self.lengths = torch.zeros(4, rows, dtype=torch.long)
            self.done = torch.zeros(rows, dtype=torch.bool)
            self.next_column = torch.zeros(1, dtype=torch.long)
            self.temperature = torch.zeros(())
            self.eos = torch.tensor(sorted(self.eos_ids))

    def start(self, prompts, noise, group_size, width, max_new_tokens, temperature):
        """Prefill the prompts, left-padded, and fill the buffers -> number of rows of a step."""
        n, device = len(prompts) * group_size, self.model.device
        rows, columns = round_up(n, self.blocks[0]), round_up(width + max_new_tokens, self.blocks[1])
        if rows > self.rows or columns > self.columns:
            self.allocate(max(rows, self.rows), max(columns, self.columns))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)        # [P, W]
        lengths = torch.tensor([[len(p)] for p in prompts], device=device)                      # [P, 1]
        self.column, self.seen = torch.arange(width, device=device), width
        position = self.column - width + lengths                # [P, W], negative where there is padding
        prompt = torch.arange(n, device=device) // group_size   # of each row

        self.bias.fill_(torch.finfo(self.bias.dtype).min / 4)   # -inf would make NaN of rows of padding
        self.bias[:n, :width].masked_fill_(position[prompt] >= 0, 0)
        causal = self.column[:, None] >= self.column
        bias = self.bias[:n:group_size, None, None, :width].where(causal, self.bias.min())      # [P, 1, W, W]
        self.model.base_model(input_ids=ids, position_ids=position.clamp(min=0), attention_mask=bias,
                              past_key_values=self, use_cache=True)
        for x in self.kv.values():                              # a group shares its prompt's keys and values
            x[:, :n, :, :width] = x[:, prompt, :, :width]

        self.token[:n], self.position[:n] = ids[prompt, -1], position[prompt, -1]   # step 1 computes it again
        self.row.copy_(torch.arange(self.rows))
        self.done.copy_(self.row >= n)                          # rows that only fill up the batch
        self.lengths.zero_()
        self.column = self.next_column.fill_(width - 1)
        self.temperature.fill_(temperature)
        if noise is not None:
            self.noise[:n, width - 1:width - 1 + max_new_tokens] = noise
        return rows

    def update(self, key, value, layer, *_, **__):
        """Called by the model: keys, values [n, kv_heads, Q, D] of new tokens -> those of all columns."""
        if layer not in self.kv:
            self.kv[layer] = key.new_zeros(2, self.rows, key.shape[1], self.columns, key.shape[3])
        keys, values = self.kv[layer][:, :len(key)]
        keys.index_copy_(2, self.column, key)
        values.index_copy_(2, self.column, value)
        return keys[:, :, :self.seen], values[:, :, :self.seen]

    def step(self, rows, columns, greedy):
        """One token for each of the first `rows` rows, which attend to the first `columns` columns."""
        self.bias.index_fill_(1, self.column, 0)
        self.seen = columns
        logits = self.model(input_ids=self.token[:rows, None], position_ids=self.position[:rows, None],
                            attention_mask=self.bias[:rows, None, None, :columns],
                            past_key_values=self, use_cache=True).logits[:, -1]
        row = self.row[:rows]                                   # where its noise and tokens are
        token, logp = pick(logits, self.temperature, None if greedy else self.noise[row, self.column])
        self.tokens[row, self.column], self.logps[row, self.column], self.token[:rows] = token, logp, token
        self.lengths[row] += ~self.done[:rows]
        self.done[:rows] |= (token[:, None] == self.eos).any(1)
        self.position += 1
        self.column += 1

    def advance(self, *shape):
        """One step. On a GPU the first of a shape runs as it is, to load libraries, and is then captured."""
        if shape in self.captured:
            return self.captured[shape].replay()
        self.step(*shape)
        if self.graphs:
            try:
                graph = torch.cuda.CUDAGraph()
                self.pool = getattr(self, "pool", None) or torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    self.step(*shape)                           # is recorded, not run
                self.captured[shape] = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as err:
                self.graphs = False
                note(f"warning: sampling without CUDA graphs, which is slower ({err})")

    def compact(self, rows, columns):
        """Move the last unfinished rows into the places of finished ones -> rows of the smaller batch."""
        alive = ~self.done[:rows]
        size = min(rows, round_up(int(alive.sum()), self.blocks[0]))
        last = size + alive[size:].nonzero().squeeze(1)
        free = (~alive[:size]).nonzero().squeeze(1)[:len(last)]
        for x in (self.token, self.position, self.row, self.done, self.bias):
            x[free] = x[last]
        for x in self.kv.values():
            x[:, free, :, :columns] = x[:, last, :, :columns]
        return size


# ----------------------------------------------------------------------------------------- models
def load(kind, name, **options):
    try:
        return kind.from_pretrained(name, **options)
    except Exception as err:  # of a dozen types: not there, damaged, unknown, a missing package, no memory
        fail(f"--model {name}: no model's folder, nor a hub id, that can be loaded ({str(err)[:200]})")

def prompt_ids(tokenizer, chats):
    """The ids of each chat, a list of turns, up to where the assistant's next turn begins."""
    try:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                 for chat in chats]
    except Exception as err:  # whatever a template raises, or does not compile
        fail(f"--model {tokenizer.name_or_path}: its chat template does not take the prompt ({err})")
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

def load_lm(name, device, dtype, load_in_4bit=False):
    """The causal language model `name` in eval mode, in `dtype` or in nf4."""
    options = {"dtype": dtype, "output_loading_info": True}
    if load_in_4bit:
        options |= {"device_map": {"": device}, "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)}
    lm, found = load(transformers.AutoModelForCausalLM, name, **options)
    if found["missing_keys"]:  # transformers puts random numbers in their place
        fail(f"--model {name}: its files lack weights ({str(found['missing_keys'])[:200]})")
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it repacks 4-bit weights: no training
            module.support_avx512bf16_for_cpu = False
    sampling = lm.generation_config  # transformers refuses to save one with settings that it would not use
    sampling.do_sample = bool(sampling.do_sample or sampling.temperature or sampling.top_p)
    return lm.to(device).eval()

def load_policy(args, device, dtype, lm=None):
    """The model to train (`lm` or --model), whole in fp32 (an update of 5e-7 vanishes in bf16) or an fp32
    adapter on a frozen base -> the model, the transformers model in it."""
    if args.load_in_4bit and not args.lora_rank:
        fail("--load_in_4bit needs --lora_rank: 4-bit weights do not train")
    if args.fsdp and (WORLD == 1 or args.lora_rank or args.optim != "adamw"):
        fail("--fsdp shards a whole model, with --optim adamw, over the processes of torchrun")
    if args.lora_rank:
        import peft
        lm = load_lm(args.model, device, dtype, args.load_in_4bit)
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(lm, peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha,
                                                        task_type="CAUSAL_LM", target_modules="all-linear"))
    else:
        model = lm = lm or load_lm(args.model, "cpu" if args.fsdp else device, torch.float32)
    if args.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if args.fsdp:  # fp32 shards; a layer is gathered in `dtype` to run
        for module in (*lm.base_model.layers, lm):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return model, lm

@torch.no_grad()
def refresh(plain, lm):
    """Copy what the policy `lm` amounts to into `plain` (which it may be): 4-bit weights dequantised, shards
    gathered (collective), an adapter's delta added in fp32 to its base, which stays as it is."""
    for name, target in plain.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = lm.get_submodule(path)
        weight = getattr(getattr(layer, "base_layer", layer), leaf)
        if getattr(weight, "quant_state", None) is not None:
            import bitsandbytes
            weight = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        if hasattr(layer, "base_layer") and leaf == "weight":
            weight = weight.float() + layer.get_delta_weight("default")
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        target.copy_(weight)

class Muon(torch.optim.Optimizer):
    """Orthogonal steps (Jordan et al., 2024), in fp32: torch's bf16 is 10 times slower on CPUs without it."""
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x, ratio = p.grad.lerp(momentum, 0.95), p.size(0) / p.size(1)
                x = x.T if ratio > 1 else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):                              # Newton-Schulz: singular values to about 1
                    gram = x @ x.T
                    x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
                p.add_(x.T if ratio > 1 else x, alpha=-group["lr"] * max(1, ratio) ** 0.5)

def make_optimizers(model, args):
    """The optimisers of all trained parameters, at peak learning rates."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in trained.items() if args.optim == "muon" and p.ndim == 2 and ".layers." in n}
    rest = [p for name, p in trained.items() if name not in muon]
    adamw = partial(torch.optim.AdamW, fused=True)
    if "8bit" in args.optim:
        import bitsandbytes
        adamw = bitsandbytes.optim.PagedAdamW8bit if "paged" in args.optim else bitsandbytes.optim.AdamW8bit
    optimizers = [adamw(rest, lr=args.lr, weight_decay=0.0)]
    return optimizers + [Muon(muon.values(), {"lr": args.muon_lr})] if muon else optimizers

def update(optimizers, factor, args, usable):
    """Sum gradients over processes, clip, update at `factor` times the peak learning rates -> norm of the
    gradient before clipping. Where that is not finite, or not `usable`, no weight changes."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p.grad is None:                                      # another process may have one
            p.grad = torch.zeros_like(p)
        if WORLD > 1 and not args.fsdp:                         # FSDP has summed already
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    norm = float(norm.full_tensor() if args.fsdp else norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
        if usable and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm

def start_processes(dtype):
    """Join torchrun's other processes, if any -> this one's device, the compute dtype. From now on the first
    SIGINT or SIGTERM is kept in STOP; a second SIGINT ends the process."""
    def keep(number, frame):
        STOP.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping: saving a checkpoint first; Ctrl-C again leaves at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keep)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1:  # ranks may wait for hours while one samples or saves
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
        # after a restart torchrun's store still holds the addresses of the start before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK,
                                world_size=WORLD, timeout=store.timeout)
    return device, getattr(torch, dtype or ("bfloat16" if cuda else "float32"))

def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. Collective: call on every rank."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares

def open_run(args, defaults):
    """Lock --output_dir -> the state of its newest checkpoint that loads, or None for a new run.

    Refuses a folder that another process holds, or that holds a run, unless --resume comes with that run's
    flags (a flag it did not know yet had its default). The logs are set back to those of the checkpoint."""
    out, state = Path(args.output_dir), None
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        try:                                                    # this lock dies with its process
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {out} is in use by another run: take another folder")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: -int(folder.name[11:]))
    finished = not checkpoints and list(out.glob("*config.json"))
    if finished or checkpoints and not args.resume:
        fail(f"--output_dir {out} holds a run: remove it or, if there is a checkpoint, add --resume")
    for folder in checkpoints:
        try:
            state = dict(torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True))
            break
        except Exception:  # of many types: cut off, missing, something else
            note(f"{folder} is damaged: trying the checkpoint before it")
    if checkpoints and not state:
        fail(f"--resume: no checkpoint in {out} loads; remove the folder to start again")
    changed = [name for name, value in vars(args).items() if state and name not in MAY_CHANGE
               and state["args"].get(name, getattr(defaults, name)) != value]
    if changed:
        fail(f"--resume: not the flags of the run in {out}: --{', --'.join(changed)}")
    if RANK == 0:
        for name in LOGS:                                       # as they were at the checkpoint
            (out / name).write_bytes((folder / name).read_bytes() if state else b"")
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    return state

def save_checkpoint(out, state, save_model):
    """OUT/checkpoint-<step>: a model folder, the logs, and in trainer.pt all else that a run is. Renamed when
    complete, so that a kill at any moment leaves a whole one. The newest two stay. On rank 0."""
    folder, tmp = out / f"checkpoint-{state['step']}", out / "tmp-checkpoint"
    shutil.rmtree(tmp, ignore_errors=True)                      # of a process that was killed
    try:
        save_model(tmp)
        torch.save(state, tmp / "trainer.pt")
        for name in LOGS:
            shutil.copy(out / name, tmp)
    except Exception as err:  # a full disk, in the words of each library
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}): make room, then --resume")
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    for old in sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[:-2]:
        shutil.rmtree(old)

def append(path, rows):
    """Append JSON lines, on rank 0; a number that is not finite becomes null, as JSON has no NaN."""
    with open(path if RANK == 0 else os.devnull, "a") as f:
        for row in rows:
            f.write(json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n")

def open_board(args):
    """The TensorBoard writer that --log_to asks for, if any, on rank 0; W&B copies what is written there."""
    if args.log_to and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter
        if args.log_to == "wandb":
            import wandb
            wandb.init(config=vars(args), sync_tensorboard=True)
        return SummaryWriter(args.output_dir)

def log(args, board, metrics):
    """Write a line of metrics.jsonl, and points on the board's curves. On rank 0."""
    append(Path(args.output_dir) / "metrics.jsonl", [metrics])
    if board:
        for name, value in metrics.items():
            board.add_scalar(name, value, metrics["step"])

@dataclass
class Rollout:
    """One completion: what was asked, what the model wrote, what it earned."""
    index: int                  # of its row in the data
    prompt: list                # ids
    completion: list            # ids, with the end token
    logps: torch.Tensor         # [len(completion)], as the sampler saw them
    ended: bool                 # False: cut off at max_new_tokens
    text: str                   # without special tokens
    parts: dict = None          # of its reward
    advantage: float = 0.0

def read_prompts(sources, split, args, tokenizer):
    """Rows of all sources with their "prompt_ids". Default Countdown data that are not there yet are made."""
    countdown = "countdown" in [source.split(":")[0] for source in sources]
    if countdown and not Path("data/countdown").exists() and RANK == 0:
        subprocess.call([sys.executable, Path(__file__).with_name("countdown.py")])
    gather(0)                                                   # the other ranks wait for it
    rows = sum([rewards.load_rows(source, split) for source in sources], [])
    ids = prompt_ids(tokenizer, [rewards.messages(row["task"], row, args.style) for row in rows])
    return [row | {"prompt_ids": x} for row, x in zip(rows, ids)]

def sample(sampler, tokenizer, data, indices, noise, args, temperature=1.0):
    """A group of Rollouts for each index of data. noise [N, max_new_tokens]; None: one each, greedy."""
    rollouts, group_size = [], 1 if noise is None else args.group_size
    size = max(1, args.sample_batch_size // group_size)
    for at in range(0, len(indices), size):
        rows = np.repeat(indices[at:at + size], group_size).tolist()
        prompts = [data[i]["prompt_ids"] for i in indices[at:at + size]]
        part = None if noise is None else noise[at * group_size:(at + size) * group_size]
        completions, logps = sampler(prompts, part, group_size, args.max_new_tokens, temperature)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        for i, ids, logp, text in zip(rows, completions, logps, texts):
            ended = not sampler.eos_ids.isdisjoint(ids[-1:])
            rollouts.append(Rollout(i, data[i]["prompt_ids"], ids, logp, ended, text))
    return [rollouts[k:k + group_size] for k in range(0, len(rollouts), group_size)]

def score(groups, data, args, weights):
    """Fill in the rewards of this process's groups -> all processes' groups, in the order of their prompts.
    Collective. If a process was told to stop, its completions were cut short: KeyboardInterrupt on all."""
    rollouts = sum(groups, [])
    rows, texts = [data[r.index] for r in rollouts], [r.text for r in rollouts]
    tasks, lengths = [row["task"] for row in rows], [len(r.completion) for r in rollouts]
    scored = rewards.score_batch(tasks, texts, rows, args.style, weights, lengths, length=args.length_penalty)
    for r, parts in zip(rollouts, scored):
        r.parts = parts

    signals = sum(gather(STOP), [])
    if signals:
        raise KeyboardInterrupt(signals[0])
    shares = gather(groups)
    return [group for turn in zip_longest(*shares) for group in turn if group]

def is_dead(group):
    """Whether a group's rewards are all equal, so that its advantages are 0."""
    return len({r.parts["reward"] for r in group}) == 1

def means(groups, data):
    """Means over rollouts: every reward part (also by task, if there are several), length, share cut off."""
    rollouts = sum(groups, [])
    tasks = sorted({data[r.index]["task"] for r in rollouts})
    found = {name: fmean(r.parts[name] for r in rollouts) for name in rollouts[0].parts}
    if len(tasks) > 1:
        for task in tasks:
            mine = [r.parts for r in rollouts if data[r.index]["task"] == task]
            found |= {f"{name}/{task}": fmean(parts[name] for parts in mine) for name in mine[0]}
    found["completion_length"] = fmean(len(r.completion) for r in rollouts)
    found["truncated"] = fmean(not r.ended for r in rollouts)
    return found

def micro_batches(rollouts, args, device):
    """This process's micro-batches, padded: ids [n, L]; prompt_lengths, adv [n]; mask, sampled_logp [n, T].

    Sorted by length, which saves padding, the longest first, as too little memory then shows at once; those
    without advantage last, as they may need no backward pass. Under FSDP every rank makes as many passes."""
    def pad(rows):
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, rows)), batch_first=True).to(device)

    size, batches = args.micro_batch_size, []
    rows = sorted(rollouts, key=lambda r: (r.advantage == 0, -len(r.prompt) - len(r.completion)))
    if args.fsdp and rows:
        rows += [replace(rows[-1], completion=[], logps=torch.zeros(0))] * (-len(rows) % (size * WORLD))
    for at in range(RANK * size, len(rows), WORLD * size):
        part = rows[at:at + size]
        batches.append({"ids": pad([r.prompt + r.completion for r in part]),
                        "prompt_lengths": torch.tensor([len(r.prompt) for r in part], device=device),
                        "adv": torch.tensor([r.advantage for r in part], device=device),
                        "mask": pad([torch.ones(len(r.completion)) for r in part]),
                        "sampled_logp": pad([r.logps for r in part])})
    return batches


# ----------------------------------------------------------------------------------------- the loop
def train(args):
    device, dtype = start_processes(args.dtype)
    weights = rewards.parse_weights(args.weights)
    tokenizer = load(transformers.AutoTokenizer, args.model)
    data = read_prompts(args.data, "train", args, tokenizer)
    eval_data = read_prompts(args.eval_data, "test", args, tokenizer)
    if args.pass_rate:
        low, high = args.pass_rate
        data = [row for row in data if low <= row.get("pass_rate", -1) <= high]
        if not data:
            fail("--pass_rate: no row of --data has one in this range; eval.py --samples 8 writes it")
    state, board = open_run(args, parse_args(["--model", ""])), open_board(args)

    policy, lm = load_policy(args, device, dtype)
    lm.logps = partial(completion_logps, lm)
    register_fsdp_forward_method(lm, "logps")                   # without --fsdp this does nothing
    # autocast's cache would hold a second copy of all weights
    policy_logps = torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=False)(lm.logps)
    plain = lm  # what is sampled from and saved: the policy itself, or
    if args.lora_rank or args.fsdp or dtype != torch.float32:   # a copy of what it amounts to
        plain = load_lm(args.model, device, dtype)
    eos = plain.generation_config.eos_token_id                  # one id, a list of several, or None
    sampler = Sampler(plain, {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    reference, adapter_off = lm, getattr(policy, "disable_adapter", torch.no_grad)
    if args.beta and not args.lora_rank:
        reference = load_lm(args.model, "cpu" if args.offload_reference else device, dtype)
    home = reference.device                                     # where it is except during its forward pass
    optimizers = make_optimizers(policy, args)
    draws = args.steps * args.prompts_per_step * (1 + args.max_resample)        # at most
    epochs = range(math.ceil(draws / len(data)))
    order = np.concatenate([np.random.default_rng([args.seed, i]).permutation(len(data)) for i in epochs])
    done = {"step": 0, "drawn": 0, "evaluated": -1}             # steps, prompts, the last step evaluated
    if state:
        set_state_dict(policy, optimizers, model_state_dict=state["weights"],
                       optim_state_dict=state["optimizers"], options=WHOLE)
        done = {name: state[name] for name in done}
    policy.eval()
    refresh(plain, lm)

    def save_model(folder, model=policy if args.lora_rank else plain):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save():
        trained, moments = get_state_dict(policy, optimizers, options=WHOLE)            # collective
        if RANK == 0:
            state = done | {"args": vars(args), "weights": trained, "optimizers": moments}
            save_checkpoint(Path(args.output_dir), state, save_model)

    def evaluate():
        if eval_data and done["evaluated"] < done["step"]:
            mine = sample(sampler, tokenizer, eval_data, range(len(eval_data))[RANK::WORLD], None, args)
            found = means(score(mine, eval_data, args, weights), eval_data)
            log(args, board, {"step": done["step"], **{f"eval_{name}": x for name, x in found.items()}})
            note("step {}  held-out reward {reward:.3f}  correct {correct:.3f}".format(done["step"], **found))
            done["evaluated"] = done["step"]

    try:
        for step in range(done["step"] + 1, args.steps + 1):
            if done["step"] % args.eval_every == 0:             # 8, of the step before
                evaluate()
            started = time.perf_counter()
            progress = max(0, step - 1 - args.warmup) / max(1, args.steps - args.warmup)
            cosine = (1 + math.cos(math.pi * progress)) / 2
            factor = min(1.0, step / max(1, args.warmup))
            factor *= {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[args.lr_schedule]
            ends = [args.temperature, args.temperature_end or args.temperature]
            temperature = float(np.interp(step, [1, max(2, args.steps)], ends))
            torch.manual_seed(args.seed * 1_000_003 + step)     # for models with dropout

            groups, drawn = [], []                              # those to train on; all of this step
            for _ in range(1 + args.max_resample):
                # 1. Draw prompts.
                missing = args.prompts_per_step - len(groups)
                indices = order[done["drawn"] + len(drawn):][:missing].tolist()
                # 2. Sample a group for each; every process takes its share.
                places = range(len(drawn), len(drawn) + missing)[RANK::WORLD]
                rows = [place * args.group_size + g for place in places for g in range(args.group_size)]
                noise = uniforms(args.seed, step, rows, args.max_new_tokens)
                mine = sample(sampler, tokenizer, data, indices[RANK::WORLD], noise, args, temperature)
                # 3. Score, and replace dead groups in the next round.
                drawn += score(mine, data, args, weights)
                groups = [group for group in drawn if not is_dead(group)]
                if len(groups) == args.prompts_per_step:
                    break
            first = drawn[:args.prompts_per_step]  # what metrics describe: nothing has selected it
            if not groups or not args.max_resample:
                groups = first
            rollouts = sum(groups, [])

            # 4. Advantages.
            adv = advantages(torch.tensor([r.parts["reward"] for r in rollouts]), args.group_size, args.scale)
            for r, a in zip(rollouts, adv.tolist()):
                r.advantage = a
            trained = [r for r in rollouts if r.ended or not args.mask_truncated]
            num_tokens = sum(len(r.completion) for r in trained)
            batches = micro_batches(trained, args, device)
            sampled = time.perf_counter()

            # 5. Log-probabilities under the reference.
            if args.beta:
                reference.to(device)
                with adapter_off(), torch.no_grad():
                    for b in batches:
                        inputs = b["ids"], b["prompt_lengths"], b["mask"], temperature
                        b["ref"] = completion_logps(reference, *inputs)[0]
                reference.to(home)
            policy.train()
            skipped = 0.0                                       # updates
            for _ in range(args.inner_epochs):
                sums = dict.fromkeys(PARTS, 0.0)                # over micro-batches and processes
                for b in batches:
                    # 5. Log-probabilities under the policy; those of the first pass are the old ones.
                    logp, entropy = policy_logps(b["ids"], b["prompt_lengths"], b["mask"], temperature)
                    old = b.setdefault("old", logp.detach())
                    # 6. Loss and its gradient.
                    loss, parts = policy_loss(
                        logp, old, b.get("ref"), b["adv"], b["mask"], loss=args.loss, clip_low=args.clip_low,
                        clip_high=args.clip_high, beta=args.beta, num_tokens=num_tokens,
                        num_seqs=len(rollouts), max_new_tokens=args.max_new_tokens)
                    if args.fsdp:  # takes means over processes, all of which must take part
                        loss = (loss + 0 * logp.sum()) * WORLD
                    gap = ((old - b["sampled_logp"]) * b["mask"]).abs()
                    parts |= {"entropy": entropy.sum(), "logp_gap": gap.sum(), "seen": b["mask"].sum()}
                    for name, value in parts.items():
                        sums[name] += value.detach()
                    if not loss.requires_grad:
                        break  # nor do the rows that follow, without advantage, train any term of the loss
                    loss.backward()
                values = np.sum(gather([float(value) for value in sums.values()]), axis=0)
                sums = dict(zip(PARTS, values.tolist()))
                seen = max(1.0, sums.pop("seen"))
                sums |= {"entropy": sums["entropy"] / seen, "logp_gap": sums["logp_gap"] / seen}
                # 7. Clip the gradient and update the weights.
                sums["grad_norm"] = update(optimizers, factor, args, trained and math.isfinite(sums["loss"]))
                skipped += not math.isfinite(sums["loss"] + sums["grad_norm"])
            policy.eval()
            refresh(plain, lm)

            # 8. Log, evaluate, save.
            ended = time.perf_counter()
            done |= {"step": step, "drawn": done["drawn"] + len(drawn)}
            n_sampled = sum(len(r.completion) for r in sum(drawn, []))
            metrics = {
                "step": step, **means(first, data), **sums, "skipped": skipped, "groups_drawn": len(drawn),
                "temperature": temperature, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                "frac_reward_zero_std": fmean(map(is_dead, first)), "lr": args.lr * factor,
                "frac_reward_zero_std_after": fmean(map(is_dead, groups)), "step_seconds": ended - started,
                "sample_seconds": sampled - started, "update_seconds": ended - sampled,
                "sample_tokens_per_s": n_sampled / (sampled - started),
                "update_tokens_per_s": num_tokens * args.inner_epochs / (ended - sampled)}
            log(args, board, metrics)
            left = tqdm.format_interval((ended - started) * (args.steps - step))
            note("step {step}/{}  reward {reward:.3f}  correct {correct:.3f}  length {completion_length:.0f} "
                 " entropy {entropy:.3f}  {step_seconds:.1f} s  {} left".format(args.steps, left, **metrics))
            if skipped:
                note(f"warning: the gradient of step {step} is not finite and was not used; lower --lr")
            if step == 1 or step % 10 == 0 or skipped:
                append(Path(args.output_dir) / "samples.jsonl", [
                    {"step": step, "task": data[r.index]["task"], "prompt": tokenizer.decode(r.prompt),
                     "completion": r.text, "ended": r.ended, "advantage": r.advantage, **r.parts}
                    for r in sum(first[:2], [])])
            if args.save_every and step % args.save_every == 0:
                save()
        evaluate()
    except KeyboardInterrupt as stopped:
        if done["step"]:
            save()
        gather(0)                                               # torchrun ends all processes when one leaves
        note(f"stopped after step {done['step']} of {args.steps}: add --resume to the command to continue")
        raise SystemExit(128 + stopped.args[0]) from None
    if RANK == 0:
        save_model(args.output_dir)
        if args.merge:
            save_model(Path(args.output_dir) / "merged", plain)

def main(argv=None):
    try:
        args = parse_args(argv)
    except ValueError as err:                                   # a flag file: an open quote, no UTF-8
        fail(err)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro_batch_size or --sample_batch_size, add --offload_reference, "
             "--activation_checkpointing, --optim paged_adamw8bit or --load_in_4bit, and --resume")
    except (rewards.DataError, ImportError, OSError, SafetensorError) as err:   # a full disk, most of all
        fail(err)

if __name__ == "__main__":
    main()
