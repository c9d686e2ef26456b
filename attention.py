"""Two ways to attend that transformers does not have, for any model whose attention goes through its AttentionInterface: of
one new token on keys and values that are read once (`one_query`, for sampling), and of rows of which nothing that two of them
have in common is computed twice, nor any padding (`packed`, for training).

Models that have more than plain causal attention (windows, capped scores, sinks, other kinds of memory) must not run this way:
who uses it tries it out first, see `same`."""
import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KNOWN = {"position_ids", "use_cache", "is_causal"}              # what a model may tell an attention that changes nothing


def plain_only(others):
    if strange := {k for k, x in others.items() if not (x is None or x is False)} - KNOWN:
        raise NotImplementedError(f"attention with {', '.join(sorted(strange))}")


def same(plain, ours):
    """Raises NotImplementedError where what should be equal but for rounding is not."""
    low, (plain, ours) = plain.dtype, (x.float().masked_fill(x == -math.inf, 0) for x in (plain, ours))
    error = ((ours - plain).std() / plain.std()).item()
    if not error < (1e-3 if low == torch.float32 else 0.1):
        raise NotImplementedError(f"results that differ from the plain path's by {error:.1%}")


def one_query(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Attention of one new token. The query heads [rows, H, 1, D] that share a key head are rows of one product, so that keys
    and values [rows, H / g, columns, D] are read once; attention_mask [rows, 1, 1, columns] is added to the scores."""
    plain_only(others)
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)                         # [rows, H / g, g, D]
    return F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling).reshape(rows, 1, heads, -1), None


# ------------------------------------------------------------------------------------------- packed rows
def pack(ids, lengths):
    """ids [n, L], of which row i's first lengths[i] >= 1 count. A row is packed without the beginning that it has in common with
    the row before -> place [M]: where in ids.flatten() the tokens left stand; rows [n, L]: which of these M stands for each token
    of ids; and the layout that `packed` asks for.

    A causal model makes the same of the same beginning, so that these M tokens are all that it has to compute. Rows that begin
    alike, as the completions of a prompt do, should be neighbours."""
    (n, L), real = ids.shape, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    shared = torch.zeros_like(real)
    shared[1:] = ((ids[1:] == ids[:-1]) & real[1:] & real[:-1]).cumprod(1).bool()
    own = real & ~shared
    place = own.flatten().nonzero().squeeze(1)
    rows = (own.flatten().cumsum(0) - 1).view(n, L).masked_fill(~own, 0).cummax(0).values           # shared: as in the row before
    lengths, order = lengths.sort(descending=True)
    lengths, parts, start, done, size = lengths.tolist(), [], torch.zeros_like(order), 0, 0
    for end in range(1, n + 1):                                 # rows of about one length attend together
        if end == n or lengths[end] < 0.75 * lengths[done]:
            part, longest = order[done:end], lengths[done]
            parts.append(rows[part, :longest])
            start[part] = size + longest * torch.arange(end - done, device=ids.device)
            done, size = end, size + longest * (end - done)
    return place, rows, (parts, start[place // L] + place % L)


def packed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **others):
    """Attention of packed rows, [1, heads, M, D] each: rows are put together, [n, L] at a time, attend causally, and give their own
    tokens back. Without a layout it is transformers' attention on ordinary batches."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    plain_only(others)
    parts, back = layout
    tokens, out = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)], []                # [M, heads * D] each
    for rows in parts:
        q, k, v = (F.embedding(rows, x).unflatten(-1, (-1, query.shape[-1])).transpose(1, 2) for x in tokens)       # [n, heads, L, D]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling,
                                                  enable_gqa=q.shape[1] != k.shape[1])
        out.append(attended.transpose(1, 2).flatten(0, 1))      # [n * L, heads, D]
    return torch.cat(out).index_select(0, back)[None], None     # [1, M, heads, D]


def hidden_states(lm, ids, lengths):
    """-> the last hidden states [M, H] of ids [n, L], of which row i's first lengths[i] count, and which of them is whose: [n, L]"""
    if not packs(lm):
        states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state                    # causal: right padding needs no mask
        return states.flatten(0, 1), torch.arange(ids.numel(), device=ids.device).view_as(ids)
    place, rows, layout = pack(ids, lengths)
    here = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)                              # or else a mask would be made
    return lm.base_model(input_ids=ids.flatten()[place][None], position_ids=(place % ids.shape[1])[None], attention_mask=here,
                         layout=layout, use_cache=False).last_hidden_state[0], rows


@torch.no_grad()
def packs(lm):
    """Whether this model can be given packed rows: tried once, on four short ones."""
    if hasattr(lm, "packed"):
        return lm.packed
    config = lm.config.get_text_config()
    lm.packed = config._attn_implementation == "sdpa" and {*(getattr(config, "layer_types", None) or ())} <= {"full_attention"}
    if lm.packed:
        ids, lengths = torch.arange(64, device=lm.device).view(4, 16) % config.vocab_size, torch.tensor([16, 11, 13, 5], device=lm.device)
        ids[1:3, :6], real = ids[0, :6], torch.arange(16, device=lm.device) < lengths[:, None]
        plain = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        config._attn_implementation = "packed"
        try:
            ours, rows = hidden_states(lm, ids, lengths)
            same(plain[real], ours[rows[real]])
        except Exception as err:                                # of any kind: a model that this is not made for
            lm.packed, config._attn_implementation = False, "sdpa"
            if isinstance(err, torch.OutOfMemoryError):
                del lm.packed
                raise
    return lm.packed


AttentionInterface.register("one_query", one_query)
AttentionInterface.register("packed", packed)
AttentionMaskInterface.register("packed", sdpa_mask)
