"""The sampler of grpo.py on buffers that stay where they are, with CUDA graphs: --cuda_graphs.

What it is. Sampler(pick) is called as grpo.generate is, and gives the same completions. A step of the model,
from the embedding of one token a row to the logits, is launched kernel by kernel, about 44 to a layer, by
Python. A CUDA graph is such a step recorded once and started by one call. It reads and writes fixed
addresses: so keys, values and the mask lie in buffers, and there is a graph for each number of rows and of
columns that is met; they come in multiples of 32 and 128.

 1. Prefill each prompt once, on transformers' own cache; copy its keys and values to each row of its group.
 2. A step writes one column of the buffers, as all prompts end in the same one. The first step of a shape
    runs as it is, to load libraries, and is then captured; the next ones are replays.
 3. Tokens are picked outside of the graph.
 4. Every few steps the last unfinished rows move into the places of finished ones, and the batch shrinks.

When to use it. On a GPU that waits for Python while sampling: small models, few rows. NO GPU HAS RUN IT
YET: 25 to 30 ms a step of 36 layers without graphs and 6 to 10 with them are estimates, of launches counted.
On a CPU it works, without graphs: with 0.5 M parameters it makes 1.2 to 1.35 times the tokens a CPU second of
grpo.generate, where each step copies the cache (tests/bench/bench_sampler.py).

What it costs. The buffers stay while the policy is trained, and hold rows x columns tokens, each of 2 x
layers x key-value heads x head size numbers. Lower --sample_batch_size if that is too much.

What a fork must know
- pick() and what follows the logits is not captured: its options are Python numbers (temperature, top_p).
- A number or a branch of Python in the model, or an adapter's being on, is recorded as it was. Do not sample
  under disable_adapter() from a model that was captured with its adapter.
- Weights are read where they lie: a change in place is seen. Where one has moved, or another model is passed,
  all is captured again.
- Only models that take position_ids and whose cache is plain keys and values: no ALiBi, no sliding windows,
  no linear attention; any other is refused. The mask has four dimensions and is added to the scores.
- A step that makes Python wait for the GPU (some experts, some rotary embeddings) cannot be captured: one
  warning, and sampling goes on without graphs.
"""
import inspect
import sys

import torch
from torch.nn.functional import pad
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

def round_up(n, multiple):
    return -(-n // multiple) * multiple

class Buffers(Cache):
    """Keys and values in places that stay: a step writes column `at`, a tensor, and sees the first `seen`."""

    def __init__(self, filled, rows, columns):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        # keys and values of the first layer, of the second ...
        self.kv = [x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in filled]
        self.at, self.seen = torch.zeros(1, dtype=torch.long, device=filled[0].device), 0

    def update(self, keys, values, layer, *_, **__):
        """Called by the model: those of one new token a row -> those of all columns that are seen."""
        n, kv = len(keys), self.kv[2 * layer:2 * layer + 2]
        for buffer, new in zip(kv, (keys, values)):
            buffer[:n].index_copy_(2, self.at, new)
        return [buffer[:n, :, :self.seen] for buffer in kv]

    def get_seq_length(self, *_):
        return self.seen

class Sampler:
    """grpo.generate on buffers. pick: grpo.py's. graphs: None: where there is a GPU. blocks: rows and columns
    of a batch come in multiples of these."""

    def __init__(self, pick, graphs=None, blocks=None):
        self.pick, self.graphs, self.blocks = pick, graphs, blocks
        self.weights, self.rows, self.columns = None, 0, 0      # what the buffers are for

    @torch.inference_mode()
    def __call__(self, lm, prompts, noise, group_size, max_new_tokens, temperature, ends, steps=range):
        """P prompts, lists of ids -> P * G completions (with their end token, if any), the log-probabilities
        of their ids. noise [P * G, max_new_tokens]; None: greedy. steps(n) counts to n, or ends early."""
        n, width = len(prompts) * group_size, max(map(len, prompts))
        self.start(lm, prompts, group_size, width, width + max_new_tokens)
        row = torch.arange(round_up(n, self.blocks[0]), device=lm.device)   # where a row's tokens go
        done = row >= n                                         # these only fill up the batch
        if noise is not None:
            noise = pad(noise.to(lm.device), (0, 0, 0, len(row) - n))
        tokens, ends = row.new_zeros(len(row), max_new_tokens), row.new_tensor(sorted(ends))
        logps, lengths = torch.zeros_like(tokens, dtype=torch.float32), torch.zeros_like(row)
        for t in steps(max_new_tokens):
            if t % (8 if self.graphs else 4) == 0 and done.any():           # waits for the GPU
                row, done = self.compact(row, done, width + t)
                if len(row) == 0:
                    break
            if t:
                self.advance(len(row), width + t - 1)
            u = None if noise is None else noise[row, t]
            token, logp = self.pick(self.logits[:len(row)], temperature, u)
            self.token[:len(row)] = token
            tokens[row, t], logps[row, t] = token, logp
            lengths[row] += ~done
            done |= (token[:, None] == ends).any(1)             # isin() may wait for the GPU
        tokens, logps, lengths = tokens.tolist(), logps.cpu(), lengths[:n].tolist()
        return [x[:k] for x, k in zip(tokens, lengths)], [x[:k].clone() for x, k in zip(logps, lengths)]

    def start(self, lm, prompts, group_size, width, columns):
        """Prefill the prompts, left-padded, and fill the buffers."""
        cache, device = DynamicCache(config=lm.config.get_text_config()), lm.device
        placed = "position_ids" in inspect.signature(lm.forward).parameters
        if not placed or set(map(type, cache.layers)) != {DynamicLayer}:
            print(f"sampler.py: {lm.config.model_type} takes no position_ids, or its cache is not keys and "
                  "values alone: leave --cuda_graphs away", file=sys.stderr, flush=True)
            raise SystemExit(2)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)            # [P, W]
        lengths = torch.tensor([[len(p)] for p in prompts], device=device)                          # [P, 1]
        position = torch.arange(width, device=device) - width + lengths         # [P, W]; padding is below 0
        inputs = {"attention_mask": (position >= 0).long(), "position_ids": position.clamp(min=0)}
        logits = lm(ids, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        n = len(prompts) * group_size
        filled = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        self.allocate(lm, filled, logits, n, columns)

        prompt = torch.arange(n, device=device) // group_size   # of each row
        for x in (self.token, self.position, self.logits, *self.cache.kv):
            x.zero_()                                           # an old NaN would count where nothing is seen
        self.logits[:n], self.position[:n] = logits[prompt], position[prompt, -1]
        self.bias.fill_(torch.finfo(self.bias.dtype).min)
        self.bias[:n, :width].masked_fill_(position[prompt] >= 0, 0)
        for x, once in zip(self.cache.kv, filled):
            x[:n, :, :width] = once[prompt]

    def allocate(self, lm, filled, logits, rows, columns):
        """Make buffers, unless those of the last call serve. Captured graphs hold their addresses."""
        if self.graphs is None:
            self.graphs = lm.device.type == "cuda"
        self.blocks = self.blocks or ((32, 128) if self.graphs else (1, 1))
        weights = [lm, *(p.data_ptr() for p in lm.parameters())]
        if weights == self.weights and rows <= self.rows and columns <= self.columns:
            return
        self.rows = round_up(max(rows, self.rows), self.blocks[0])
        self.columns = round_up(max(columns, self.columns), self.blocks[1])
        self.weights, self.captured = weights, {}
        self.pool = self.cache = None                           # what there was is given back first
        self.cache = Buffers(filled, self.rows, self.columns)
        self.logits = logits.new_zeros(self.rows, logits.shape[1])
        self.bias = filled[0].new_zeros(self.rows, self.columns)        # added to attention scores
        self.token, self.position = torch.zeros(2, self.rows, dtype=torch.long, device=lm.device)

    def advance(self, rows, column):
        """Logits after one more token, in `column`, of each of the first `rows` rows."""
        shape = rows, round_up(column + 1, self.blocks[1])
        self.position += 1
        self.bias[:rows, column] = 0
        self.cache.at.fill_(column)
        if shape in self.captured:
            self.captured[shape].replay()
            return
        self.forward(*shape)
        if self.graphs:
            try:
                graph = torch.cuda.CUDAGraph()
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    self.forward(*shape)                        # is recorded, not run
                self.captured[shape] = graph
            except RuntimeError as err:
                for cause in (err, err.__context__):            # to leave a capture may have failed as well
                    if isinstance(cause, torch.OutOfMemoryError):
                        raise cause
                self.graphs = False
                tqdm.write(f"warning: sampling without CUDA graphs: slower ({err})", file=sys.stderr)

    def forward(self, rows, columns):
        """What a graph is made of: the model's step for the first rows, which see the first columns."""
        self.cache.seen = columns
        out = self.weights[0](input_ids=self.token[:rows, None], position_ids=self.position[:rows, None],
                              attention_mask=self.bias[:rows, None, None, :columns],
                              past_key_values=self.cache, use_cache=True)
        self.logits[:rows] = out.logits[:, -1]

    def compact(self, row, done, seen):
        """Move the last unfinished rows into places of finished ones -> row and done of the smaller batch."""
        size = min(len(row), round_up(int((~done).sum()), self.blocks[0]))
        last = size + (~done[size:]).nonzero().squeeze(1)
        free = done[:size].nonzero().squeeze(1)[:len(last)]
        if len(last):
            for x in (row, done, self.token, self.position, self.bias):
                x[free] = x[last]
            for x in self.cache.kv:
                x[free, :, :seen] = x[last, :, :seen]
        return row[:size], done[:size]
