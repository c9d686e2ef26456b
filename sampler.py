"""Sampling: a prompt is prefilled once and forked for its group, finished rows leave the batch, and a row's noise is its
own, so that its completion depends neither on its company nor on the batch size.

`generate` is the whole of it, to be read: a loop over any Hugging Face decoder. `Sampler` gives the same results faster, for
decoders with plain attention: every step has the shapes of the one before, so that a GPU replays it from a CUDA graph.
"""
import bisect
import contextlib
import math
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange
from transformers.cache_utils import DynamicLayer

from attention import same

BLOCK = 128                         # ids; large vocabularies are mostly multiples of it
SHARED = 64                         # tokens that all prompts must begin with, to be worth a pass of their own
BAR = dict(desc="sampling", unit=" tokens a row", delay=2, leave=False, disable=None if os.environ.get("RANK", "0") == "0" else True)


def uniforms(seed, step, rows, n):
    """[len(rows), n] numbers in [0, 1): the noise of a row depends on (seed, step, row) alone."""
    streams = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])) for row in rows)
    return torch.from_numpy(np.stack([stream.random(n, dtype=np.float32) for stream in streams]))


def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n] and their log-probabilities [n] at `temperature`.

    Inverse CDF: the first id whose cumulated probability exceeds u. Long rows are added up in blocks first, then within the one
    that it lies in: a GPU is slow at one long cumulated sum."""
    p = (logits.float() / temperature).softmax(-1)
    if u is None:
        ids = logits.argmax(-1, keepdim=True)
    elif p.shape[1] < BLOCK ** 2 or p.shape[1] % BLOCK:
        ids = first_above(p.cumsum(1), u[:, None])
    else:
        blocks = p.unflatten(1, (-1, BLOCK))                                                        # [n, K, BLOCK]
        ends = blocks.sum(2).cumsum(1)
        block = first_above(ends, u[:, None])                                                       # [n, 1]
        within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(1)      # [n, BLOCK]
        ids = block * BLOCK + first_above(within, u[:, None] - (ends.gather(1, block) - within[:, -1:]))
    return ids.squeeze(1), p.gather(1, ids).log().squeeze(1)


def first_above(ends, u):
    """ends [n, k] cumulated masses, u [n, 1] -> [n, 1]: the first place above u; one with mass, whatever rounding did to u."""
    return torch.searchsorted(ends, torch.minimum(u.clamp(min=0), ends[:, -1:].nextafter(u.new_zeros(()))), right=True)


def prefill(model, prompts, pad_id):
    """-> logits [P, V] of the first token, the cache, and the mask [P, W] of its columns: a beginning that all prompts share
    (instructions, worked examples) is read once, the rest of each is padded on the left."""
    assert not model.training, "sampling in training mode with activation checkpointing drops the cache without a word"
    device, cache = model.device, None
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if len(prompts) > 1 and shared >= SHARED:
        cache = model(input_ids=torch.tensor([prompts[0][:shared]], device=device), use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):      # none, or one with a window
        shared, cache = 0, None
    rest = [prompt[shared:] for prompt in prompts]
    width = max(map(len, rest))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in rest], device=device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in rest], device=device)  # by length, not by id
    padded = min(map(len, rest)) < width
    out = model(input_ids=ids, attention_mask=mask if padded else None, past_key_values=cache, use_cache=True, logits_to_keep=1,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:])
    return out.logits[:, -1], out.past_key_values, mask


@torch.inference_mode()
def generate(model, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id=0, group_size=1, forbid=(),
             check=lambda: None):
    """P prompts (lists of ids), each prefilled once and forked for its group -> P * G completions (lists of ids that end with
    an end token, unless cut off at max_new_tokens) and the log-probability of each of their tokens.
    noise: [P * G, max_new_tokens] from `uniforms`, or None for greedy (temperature 0 then counts as 1).
    forbid: (a, b, ...): no token b right after a token a. check: called at every token; what it raises ends the sampling."""
    device, (logits, cache, mask) = model.device, prefill(model, prompts, pad_id)
    padded, logits = len(set(map(len, prompts))) > 1, logits.repeat_interleave(group_size, 0)         # [n, V]
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    position, n = mask.sum(1), len(mask)                                                              # [n] of the next token
    rows, done = torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)      # rows still in the batch
    tokens, length = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.full_like(rows, max_new_tokens)
    logps = torch.zeros(n, max_new_tokens, device=device)
    stop, forbid = (torch.tensor(list(ids), dtype=torch.long, device=device) for ids in (eos_ids, forbid))
    noise, temperature = None if noise is None else noise.to(device), temperature or 1.0
    for t in trange(max_new_tokens, **BAR):
        check()
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
        if len(forbid):
            after = (token == forbid[0]).nonzero()                                                    # [m, 1]
            logits = logits.index_put((after, forbid[1:]), logits.new_tensor(-math.inf))
    length = length.tolist()
    return [row[:k] for row, k in zip(tokens.tolist(), length)], [row[:k] for row, k in zip(logps.cpu(), length)]


# ------------------------------------------------------------------------------------------- fixed shapes
BATCHES = (8, 16, 24, 32, 48, 64, 96, 128, 192, *range(256, 1024, 128), *range(1024, 2 ** 17, 1024))  # rows of a captured step
COLUMNS = 128                                                   # its attention reads a multiple of so many tokens
LOOK = 8                                                        # steps between looks at which rows have ended


def round_up(n, multiple):
    return -(-n // multiple) * multiple


class Sampler:
    """sampler(...) gives what generate(model, ...) gives, faster. All rows start together, their prompts end in the same
    column, and so step t writes the same column of every row's keys and values: a step is the same operations on the same
    addresses as the step before, and all that it needs lies on the device. On a GPU it is captured in a CUDA graph, once for
    each size of the batch and number of columns.

    Weights are read where they are: an update in place is seen by the next call. Buffers and graphs stay between calls;
    `release` frees them. graphs=False takes the same steps one operation at a time, as is the default without a GPU. `forbid`,
    and models that have more than plain attention or cannot be captured, get `generate`; `why_plain` then says why."""

    def __init__(self, model, graphs=None):
        self.model, self.probed, self.why_plain = model, False, None
        self.weights = sum(x.numel() for x in model.parameters())
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self.batches, self.multiple, self.look = (BATCHES, COLUMNS, LOOK) if self.graphs else (range(1 << 20), 1, 4)
        self.stream = torch.cuda.Stream() if self.graphs else None
        self.release()

    def release(self):
        self.captured, self.addresses, self.keys, self.values, self.size, self.pool = {}, None, [], [], (0, 0), None

    @torch.inference_mode()
    def __call__(self, prompts, noise, *, forbid=(), **options):
        if not self.why_plain and not forbid:
            try:
                return self.sample(prompts, noise, **options)
            except RuntimeError as err:
                self.release()
                for error in (err, err.__context__):            # a capture that fails may hide that memory was full
                    if isinstance(error, torch.OutOfMemoryError):
                        raise error
                if not (self.graphs or isinstance(err, NotImplementedError)):
                    raise
                self.why_plain = str(err)
                warnings.warn(f"this model is sampled by the plain loop, which is slower: {err}")
        return generate(self.model, prompts, noise, forbid=forbid, **options)

    def sample(self, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id=0, group_size=1, check=lambda: None):
        check()
        logits, cache, mask = prefill(self.model, prompts, pad_id)
        T, G, W, greedy = max_new_tokens, group_size, mask.shape[1], noise is None
        n = len(prompts) * G
        rows = self.start(n, T, G, logits, cache, mask, noise, temperature or 1.0, eos_ids)
        self.choose(logits.repeat_interleave(G, 0), n, greedy)
        if not self.probed and T > 1:
            self.probe(cache, mask, n, G)
        del cache, logits
        with self.fast():
            for t in trange(1, T, **BAR):
                if (t - 1) % self.look == 0:
                    check()
                    rows = self.compact(rows, W + t - 1)
                    if not rows:
                        break
                    if rows * self.weights < 2 ** 24:           # to wake another thread takes longer than it would save
                        torch.set_num_threads(1)
                self.advance(rows, round_up(W + t, self.multiple), greedy)
        tokens, logps = self.tokens[:n, :T], self.logps[:n, :T].cpu()
        ended = self.ends[tokens]                               # after a row's first end comes what its place was then used for
        length = torch.where(ended.any(1), ended.int().argmax(1) + 1, T).tolist()
        return [row[:k] for row, k in zip(tokens.tolist(), length)], [row[:k].clone() for row, k in zip(logps, length)]

    def fit(self, n):
        return self.batches[bisect.bisect_left(self.batches, n)]

    def start(self, n, T, G, logits, cache, mask, noise, temperature, eos_ids):
        """Sets the buffers for n rows, those there are if they are large enough: graphs hold their addresses. -> batch size"""
        if any(type(x) is not DynamicLayer or x.keys is None for x in getattr(cache, "layers", [None])):
            raise NotImplementedError("a cache of more than keys and values")
        rows, W, device = self.fit(n), mask.shape[1], mask.device
        prompt = [x.keys for x in cache.layers], [x.values for x in cache.layers]
        if rows > self.size[0] or W + T > self.size[1]:
            B, C = size = max(rows, self.size[0]), max(round_up(W + T, COLUMNS), self.size[1])
            self.release()                                      # the old ones go before the new ones come
            self.keys, self.values = ([x.new_zeros(B, x.shape[1], C, x.shape[3]) for x in part] for part in prompt)
            self.bias, self.size = prompt[0][0].new_zeros(size), size           # of a column's score
            self.noise, self.logps = torch.zeros(2, B, C, device=device)
            self.tokens = torch.zeros(size, dtype=torch.long, device=device)
            self.token, self.position, self.row = torch.zeros(3, B, dtype=torch.long, device=device)
            self.done, self.ends = (torch.zeros(k, dtype=torch.bool, device=device) for k in (B, logits.shape[1]))
            self.t, self.column = torch.zeros(2, 1, dtype=torch.long, device=device)
            self.temperature = torch.zeros((), device=device)
        addresses = [x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers())]
        if addresses != self.addresses:
            self.addresses, self.captured = addresses, {}
        for buffer, part in zip(self.keys + self.values, prompt[0] + prompt[1]):
            if self.multiple > 1:
                buffer[:rows].zero_()                           # masked columns are read: nothing but numbers may be there
            buffer[:n].unflatten(0, (-1, G))[..., :W, :] = part[:, None]
        self.bias.fill_(torch.finfo(self.bias.dtype).min / 4)   # finite: a stretch of nothing but padding must not give NaN
        self.bias[:n, :W].masked_fill_(mask.repeat_interleave(G, 0).bool(), 0)
        self.ends.zero_()[torch.tensor(list(eos_ids), dtype=torch.long)] = True
        self.row.copy_(torch.arange(len(self.row)))             # where a row of the batch puts its tokens, and has its noise
        self.position.zero_()[:n] = mask.sum(1).repeat_interleave(G) - 1       # of the last token there is
        self.column.fill_(W - 1)                                # of its keys and values
        self.t.zero_()
        self.temperature.fill_(temperature)
        self.done.fill_(True)[:n] = False                       # rows that only fill the batch up have ended
        if noise is not None:
            self.noise[:n, :T] = noise
        return rows

    @contextlib.contextmanager
    def fast(self):
        """Within it the model attends by attention.one_query; after it, it is as it was."""
        config, threads = self.model.config, torch.get_num_threads()
        usual, config._attn_implementation = config._attn_implementation, "one_query"
        try:
            yield
        finally:
            config._attn_implementation = usual
            torch.set_num_threads(threads)

    def update(self, key, value, layer, *_, **__):
        """What the model calls its cache for: [rows, H / g, 1, D] of the new token -> those of all columns in use."""
        rows, columns = self.shape
        new = (self.keys[layer], key), (self.values[layer], value)
        return tuple(x[:rows].index_copy_(2, self.column, y)[:, :, :columns] for x, y in new)

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

    def step(self, rows, columns, greedy):
        self.choose(self.forward(rows, columns), rows, greedy)

    def advance(self, *size):
        """One step. On a GPU the first of its size runs as it is, which loads libraries, and is captured for those to come."""
        if not self.graphs:
            return self.step(*size)
        if size in self.captured:
            return self.captured[size].replay()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(*size)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self.step(*size)                                    # is written down, not run
        self.captured[size] = graph

    def compact(self, rows, columns):
        """The last rows that go on move to the places of the first that do not, if a smaller batch then does. -> its size"""
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
        """Once: a step from these prompts must give the plain path's logits, and the host must not have to wait for it."""
        plain = self.model(input_ids=self.token[:n:G, None], attention_mask=F.pad(mask, (0, 1), value=1), use_cache=True,
                           position_ids=self.position[:n:G, None], past_key_values=cache).logits[:, -1]
        self.graphs and torch.cuda.set_sync_debug_mode("error")
        try:
            with self.fast():
                ours = self.forward(n, round_up(mask.shape[1] + 1, self.multiple))[::G]
        except torch.OutOfMemoryError:
            raise
        except Exception as err:                                # of any kind: a model that this is not made for
            raise NotImplementedError(f"{type(err).__name__}: {err}") from err
        finally:
            self.graphs and torch.cuda.set_sync_debug_mode("default")
        same(plain, ours)
        self.probed = True
