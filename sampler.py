"""Sampling: a prompt is prefilled once and forked for its group, finished rows leave the batch, and a row's noise is its
own, so that its completion depends neither on its company nor on the batch size.

`generate` is the whole of it, to be read: a loop over any Hugging Face decoder.
"""
import math

import numpy as np
import torch


def uniforms(seed, step, rows, n):
    """[len(rows), n] numbers in [0, 1): the noise of a row depends on (seed, step, row) alone."""
    streams = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])) for row in rows)
    return torch.from_numpy(np.stack([stream.random(n, dtype=np.float32) for stream in streams]))


def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n] and their log-probabilities [n] at `temperature`."""
    logps = (logits.float() / temperature).log_softmax(-1)
    if u is None:
        ids = logps.argmax(-1)
    else:                                                       # inverse CDF: the first id whose cumulated mass exceeds u
        mass = logps.exp().cumsum(-1)
        ids = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return ids, logps.gather(1, ids[:, None]).squeeze(1)


@torch.inference_mode()
def generate(model, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id=0, group_size=1, forbid=(), check=lambda: None):
    """P prompts (lists of ids), each prefilled once and forked for its group -> P * G completions (lists of ids that end with
    an end token, unless cut off at max_new_tokens) and the log-probability of each of their tokens.
    noise: [P * G, max_new_tokens] from `uniforms`, or None for greedy. forbid: (a, b, ...): no token b right after a token a.
    check: called at every token; what it raises ends the sampling."""
    assert not model.training, "sampling in training mode with activation checkpointing drops the cache without a word"
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)             # left-padded [P, W]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)      # by length, not by id
    padded = min(map(len, prompts)) < width
    out = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=True, logits_to_keep=1,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)           # [n, V]
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    position, n = mask.sum(1), len(mask)                                                              # [n] of the next token
    rows, done = torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)      # rows still in the batch
    tokens, length = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.full((n,), max_new_tokens, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    stop, forbid = torch.tensor(sorted(eos_ids), device=device), torch.tensor(forbid, dtype=torch.long, device=device)
    noise = None if noise is None else noise.to(device)
    for t in range(max_new_tokens):
        check()
        if len(forbid) and t:
            after = (token == forbid[0]).nonzero()                                                    # [m, 1]
            logits = logits.index_put((after, forbid[1:]), logits.new_tensor(-math.inf))
        token, logp = pick(logits, temperature, None if noise is None else noise[rows, t])
        tokens[rows, t], logps[rows, t] = token, logp
        ended = torch.isin(token, stop) & ~done
        length[rows[ended]] = t + 1
        done = done | ended
        alive = len(done) - int(done.sum())
        if not alive or t + 1 == max_new_tokens:
            break
        if alive <= 0.9 * len(done):                            # a drop copies the cache: not one for every row that ends
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, done, token, mask, position = rows[keep], done[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=token[:, None], attention_mask=mask if padded else None, position_ids=position[:, None],
                    past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    length = length.tolist()
    return [row[:k] for row, k in zip(tokens.tolist(), length)], [row[:k] for row, k in zip(logps.cpu(), length)]
