"""Sampling: a prompt is prefilled once and forked for its group, finished rows leave the batch, and a row's noise is its
own, so that its completion depends neither on its company nor on the batch size.

`generate` is the whole of it, to be read: a loop over any Hugging Face decoder. `Sampler` gives the same results faster, for
decoders with plain attention: every step has the shapes of the one before, so that a GPU replays it from a CUDA graph.
"""
import bisect
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer


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


def prefill(model, prompts, pad_id):
    """-> logits [P, V] of the first token, the cache, the mask [P, W] of prompts padded on the left."""
    assert not model.training, "sampling in training mode with activation checkpointing drops the cache without a word"
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)   # by length, not by id
    out = model(input_ids=ids, attention_mask=mask if min(map(len, prompts)) < width else None, use_cache=True, logits_to_keep=1,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return out.logits[:, -1], out.past_key_values, mask


@torch.inference_mode()
def generate(model, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id=0, group_size=1, forbid=(), check=lambda: None):
    """P prompts (lists of ids), each prefilled once and forked for its group -> P * G completions (lists of ids that end with
    an end token, unless cut off at max_new_tokens) and the log-probability of each of their tokens.
    noise: [P * G, max_new_tokens] from `uniforms`, or None for greedy (then temperature 0 may be, and counts as 1). forbid: (a, b, ...): no token b right after a token a.
    check: called at every token; what it raises ends the sampling."""
    device, (logits, cache, mask) = model.device, prefill(model, prompts, pad_id)
    padded, logits = len(set(map(len, prompts))) > 1, logits.repeat_interleave(group_size, 0)         # [n, V]
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    position, n = mask.sum(1), len(mask)                                                              # [n] of the next token
    rows, done = torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)      # rows still in the batch
    tokens, length = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.full((n,), max_new_tokens, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    stop, forbid = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device), torch.tensor(forbid, dtype=torch.long, device=device)
    noise, temperature = None if noise is None else noise.to(device), temperature or 1.0
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


# ------------------------------------------------------------------------------------------- fixed shapes
BATCHES = (*range(8, 32, 8), 32, 48, 64, 96, 128, 192, *range(256, 1024, 128), *range(1024, 8193, 1024))  # rows of a captured step
COLUMNS = 128                       # its attention reads a multiple of so many tokens
LOOK = 8                            # steps between looks at which rows have ended


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Attention of one new token. The query heads [B, H, 1, D] that share a key head are rows of one product, so that keys and
    values [B, H / g, columns, D] are read once. attention_mask [B, 1, 1, columns] is added to the scores."""
    known = ("position_ids", "use_cache", "is_causal")
    if strange := [name for name, value in others.items() if value is not None and name not in known]:
        raise NotImplementedError(f"attention with {', '.join(strange)}")       # a window, capped scores, sinks ...
    rows, heads, _, size = query.shape
    out = F.scaled_dot_product_attention(query.reshape(rows, key.shape[1], -1, size), key, value, attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("one_query", attend)


class Sampler:
    """generate(model, ...) as sampler(...), its results the same, faster. All rows start together and right-aligned, so that
    step t writes the same column of every row's keys and values: one step is the same operations on the same addresses as
    the next, whatever t, and all it needs lies on the device. On a GPU it is captured once for each size in a CUDA graph.

    Weights are read where they are, so that an update in place is seen by the next call. Buffers and graphs stay between
    calls; `release` gives their memory back. `graphs=False` runs the same steps one operation at a time (the default without a
    GPU). A model with other than plain attention gets `generate`, and `plain` says why."""

    def __init__(self, model, graphs=None):
        self.model, self.plain, self.probed = model, None, False
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self.batches, self.multiple, self.look = (BATCHES, COLUMNS, LOOK) if self.graphs else (range(1 << 20), 1, 4)
        self.norms = fused_norms(model)
        self.release()

    def release(self):
        self.captured, self.addresses, self.keys, self.values, self.size, self.pool = {}, None, [], [], (0, 0), None

    @torch.inference_mode()
    def __call__(self, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id=0, group_size=1, forbid=(),
                 check=lambda: None):
        if not self.plain and not forbid:
            try:
                return self.sample(prompts, noise, max_new_tokens, temperature, eos_ids, pad_id, group_size, check)
            except NotImplementedError as why:
                self.plain = str(why)
            except torch.OutOfMemoryError:
                self.release()
                raise
        return generate(self.model, prompts, noise, max_new_tokens=max_new_tokens, temperature=temperature, eos_ids=eos_ids,
                        pad_id=pad_id, group_size=group_size, forbid=forbid, check=check)

    def sample(self, prompts, noise, T, temperature, eos_ids, pad_id, G, check):
        check()
        logits, cache, mask = prefill(self.model, prompts, pad_id)
        if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
            raise NotImplementedError("a cache that is not all keys and values")
        n, W, greedy = len(prompts) * G, mask.shape[1], noise is None
        rows = self.fit(n)
        self.allocate(rows, W + T, cache, logits.shape[1])
        for buffer, prompt in zip(self.keys + self.values, [x.keys for x in cache.layers] + [x.values for x in cache.layers]):
            if self.multiple > 1:
                buffer[:rows].zero_()                           # masked columns are read: nothing but numbers may be there
            buffer[:n].unflatten(0, (-1, G))[..., :W, :] = prompt[:, None]
        self.bias.fill_(torch.finfo(self.bias.dtype).min / 4)   # finite: a stretch of nothing but padding must not give NaN
        self.bias[:n, :W].masked_fill_(mask.repeat_interleave(G, 0).bool(), 0)
        self.ends.fill_(False)[torch.tensor(sorted(eos_ids), dtype=torch.long)] = True
        self.row.copy_(torch.arange(len(self.row)))             # of the results, for each row of the batch
        self.position.zero_()[:n] = mask.sum(1).repeat_interleave(G) - 1     # of the last token there is
        self.t.zero_()
        self.column.fill_(W - 1)                                # where that token's keys and values are
        self.temperature.fill_(temperature or 1.0)
        if not greedy:
            self.noise[:n, :T] = noise
        self.done.fill_(True)[:n] = False                       # rows that only fill the batch up have ended
        self.token.zero_()
        self.choose(logits.repeat_interleave(G, 0), n, greedy)
        if not self.probed and T > 1:
            self.probe(cache, mask, n, G)
        del cache, logits
        with self.fast():
            for t in range(1, T):
                if t % self.look == 1 or self.look == 1:
                    check()
                    rows = self.compact(rows, W + t - 1)
                    if not rows:
                        break
                self.advance(rows, -(-(W + t) // self.multiple) * self.multiple, greedy)
        tokens, logps = self.tokens[:n, :T], self.logps[:n, :T].cpu()
        ended = self.ends[tokens]
        length = torch.where(ended.any(1), ended.int().argmax(1) + 1, T).tolist()       # what comes after the end is anything
        return [row[:k] for row, k in zip(tokens.tolist(), length)], [row[:k].clone() for row, k in zip(logps, length)]

    def fit(self, n):
        return self.batches[bisect.bisect_left(self.batches, n)]

    def allocate(self, rows, columns, cache, vocabulary):
        """Buffers of at least that size. Those there are stay if they do, as graphs hold their addresses and the weights'."""
        if rows > self.size[0] or columns > self.size[1]:
            rows, columns = max(rows, self.size[0]), max(-(-columns // COLUMNS) * COLUMNS, self.size[1])
            self.release()                                      # before there are others
            self.size, device, of = (rows, columns), self.model.device, cache.layers
            self.keys = [x.keys.new_zeros(rows, x.keys.shape[1], columns, x.keys.shape[3]) for x in of]         # [B, H / g, C, D]
            self.values = [x.values.new_zeros(rows, x.values.shape[1], columns, x.values.shape[3]) for x in of]
            self.bias = of[0].keys.new_zeros(rows, columns)     # of a column's score: 0, or so low that it weighs nothing
            self.noise, self.logps = torch.zeros(2, rows, columns, device=device)
            self.tokens = torch.zeros(rows, columns, dtype=torch.long, device=device)
            self.token, self.position, self.row = torch.zeros(3, rows, dtype=torch.long, device=device)
            self.done, self.ends = (torch.zeros(k, dtype=torch.bool, device=device) for k in (rows, vocabulary))
            self.t, self.column = torch.zeros(2, 1, dtype=torch.long, device=device)
            self.temperature = torch.ones((), device=device)
        addresses = [x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers())]
        if addresses != self.addresses:
            self.addresses, self.captured = addresses, {}

    @contextlib.contextmanager
    def fast(self):
        """Within it the model attends by `attend` and its norms are one kernel; else it is as it was."""
        config = self.model.config
        usual, config._attn_implementation = config._attn_implementation, "one_query"
        for norm, eps in self.norms:
            norm.forward = lambda x, norm=norm, eps=eps: F.rms_norm(x, norm.weight.shape, norm.weight, eps)
        try:
            yield
        finally:
            config._attn_implementation = usual
            for norm, _ in self.norms:
                del norm.forward

    def update(self, key, value, layer, *_, **__):
        """What the model calls its cache for: [rows, H / g, 1, D] of the new token -> those of all columns in use."""
        rows, columns = self.shape
        key, value = (x[:rows].index_copy_(2, self.column, new) for x, new in ((self.keys[layer], key), (self.values[layer], value)))
        return key[:, :, :columns], value[:, :, :columns]

    def forward(self, rows, columns):
        """-> logits [rows, V] that follow self.token"""
        self.shape = rows, columns
        self.bias.index_fill_(1, self.column, 0)
        return self.model(input_ids=self.token[:rows, None], position_ids=self.position[:rows, None], past_key_values=self,
                          attention_mask=self.bias[:rows, None, None, :columns], use_cache=True).logits[:, -1]

    def choose(self, logits, rows, greedy):
        row = self.row[:rows]
        token, logp = pick(logits, self.temperature, None if greedy else self.noise[row, self.t])
        self.tokens[row, self.t], self.logps[row, self.t], self.token[:rows] = token, logp, token
        self.done[:rows] |= self.ends[token]
        for x in (self.t, self.column, self.position):
            x += 1

    def advance(self, rows, columns, greedy):
        """One step. A size's first is taken one kernel at a time, which sets up the libraries, then captured for the next."""
        size = rows, columns, greedy
        if size in self.captured:
            return self.captured[size].replay()
        if not self.graphs:
            return self.choose(self.forward(rows, columns), rows, greedy)
        self.pool, self.stream = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.choose(self.forward(rows, columns), rows, greedy)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, error = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            try:
                self.choose(self.forward(rows, columns), rows, greedy)
            except torch.OutOfMemoryError as err:               # raised once the capture is over, so that it is this one
                error = err
        if error:
            raise error
        self.captured[size] = graph

    def compact(self, rows, columns):
        """Drops ended rows if a smaller batch will do: the last ones that go on move to the places of the first that do not.
        -> rows of the batch, 0 if all have ended"""
        alive = ~self.done[:rows]
        count = int(alive.sum())
        size = self.fit(count) if count else 0
        if size < rows:
            last = size + alive[size:].nonzero().squeeze(1)
            free = (~alive[:size]).nonzero().squeeze(1)[:len(last)]
            for x in (self.token, self.position, self.row, self.done, self.bias):
                x[free] = x[last]
            for x in self.keys + self.values:
                x[free, :, :columns] = x[last, :, :columns]
        return size

    def probe(self, cache, mask, n, G):
        """Once: from these prompts, a step of the plain path must give the same logits, and this one must not wait for the host."""
        plain = self.model(input_ids=self.token[:n:G, None], attention_mask=F.pad(mask, (0, 1), value=1),
                           position_ids=self.position[:n:G, None], past_key_values=cache, use_cache=True).logits[:, -1]
        waits = torch.cuda.get_sync_debug_mode() if self.graphs else 0
        try:
            self.graphs and torch.cuda.set_sync_debug_mode("error")
            with self.fast():
                ours = self.forward(n, -(-(mask.shape[1] + 1) // self.multiple) * self.multiple)[::G]
        except torch.OutOfMemoryError:
            raise
        except Exception as err:                                # of whatever kind: a model that this is not made for
            raise NotImplementedError(f"{type(err).__name__}: {err}") from err
        finally:
            self.graphs and torch.cuda.set_sync_debug_mode(waits)
        plain, ours = (x.float().masked_fill(x == -math.inf, 0) for x in (plain, ours))
        error = ((ours - plain).std() / plain.std()).item()
        if not error < (1e-3 if self.bias.dtype == torch.float32 else 0.1):
            raise NotImplementedError(f"logits that differ by {error:.1%} from the plain path's")
        self.probed = True


@torch.no_grad()
def fused_norms(model):
    """[(module, eps)] of the norms for which torch's one kernel gives what their own seven do"""
    found = []
    for m in model.modules():
        eps, weight = getattr(m, "variance_epsilon", getattr(m, "eps", None)), getattr(m, "weight", None)
        if type(m).__name__.endswith("RMSNorm") and eps and weight is not None and weight.dtype == model.dtype and "forward" not in vars(m):
            x = torch.linspace(-3, 3, 3 * len(weight), dtype=weight.dtype, device=weight.device).view(3, -1)
            x = x * x.new_tensor([[1e-3], [1], [10]])
            if torch.allclose(m(x), F.rms_norm(x, weight.shape, weight, eps), rtol=4 * torch.finfo(x.dtype).eps):
                found.append((m, eps))
    return found
