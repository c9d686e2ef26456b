"""The fast sampler gives what the plain one gives, and the plain one what the model's distribution says."""
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

import sampler
from toys import KINDS
from toys import small as model

ENDS = [0, 1, 2]
PROMPTS = [[5, 6, 7], [9] * 11, [30, 31], [8, 7, 6, 5, 4]]


def bucketed(lm, **options):
    """A sampler with the few sizes that graphs would be captured for."""
    fast = sampler.Sampler(lm, **options)
    fast.batches, fast.multiple, fast.look = (2, 4, 8, 12, 16, 24, 32), 8, 3
    return fast


def keywords(T=30, G=4, **more):
    return dict(max_new_tokens=T, temperature=1.2, eos_ids=ENDS, group_size=G) | more


def noise(T=30, n=16, seed=0):
    return sampler.uniforms(seed, 1, range(n), T)


def assert_same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [sampler.Sampler, bucketed])
def test_fast_tokens_are_the_plain_ones(kind, make):
    lm = model(KINDS[kind][0], **KINDS[kind][1])
    fast = make(lm)
    for T, G, prompts, seed in ((30, 4, PROMPTS, 0), (50, 6, PROMPTS[:3], 1), (5, 1, PROMPTS[::-1], 2), (1, 2, PROMPTS, 3),
                                (9, 1, PROMPTS[:1], 4)):
        for u in (noise(T, len(prompts) * G, seed), None):
            plain = sampler.generate(lm, prompts, u, **keywords(T, G))
            assert_same(fast(prompts, u, **keywords(T, G)), plain)
            assert u is None or T < 30 or len(set(map(len, plain[0]))) > 3      # ends at random, so that rows leave the batch
    assert fast.why_plain is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_beginning_is_read_once_and_changes_nothing(kind, monkeypatch):
    lm, begin, read = model(KINDS[kind][0], **KINDS[kind][1]), [7] * 5 + [3, 9, 4], []
    prompts = [begin + p for p in PROMPTS]
    plain = sampler.generate(lm, prompts, noise(), **keywords())
    monkeypatch.setattr(sampler, "SHARED", 8)
    lm.get_input_embeddings().register_forward_hook(lambda m, ids, out: read.append(tuple(ids[0].shape)))
    assert_same(sampler.generate(lm, prompts, noise(), **keywords()), plain)
    assert read[:2] == [(1, 8), (4, 11)]
    assert_same(sampler.Sampler(lm)(prompts, noise(), **keywords()), plain)
    assert_same(sampler.Sampler(lm)([begin] * 4, noise(), **keywords()), sampler.generate(lm, [begin] * 4, noise(), **keywords()))


def test_log_probs_are_those_of_a_full_forward():
    lm = model(Qwen2Config)
    ids, logps = bucketed(lm)(PROMPTS, noise(), **keywords())
    for i, (row, found) in enumerate(zip(ids, logps)):
        prompt = PROMPTS[i // 4]
        logits = lm(input_ids=torch.tensor([prompt + row])).logits[0, len(prompt) - 1:-1]
        expected = (logits / 1.2).log_softmax(-1).gather(1, torch.tensor(row)[:, None]).squeeze(1)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_a_changed_weight_is_seen_by_the_very_next_call():
    lm = model()
    fast, u = bucketed(lm), noise()
    before = fast(PROMPTS, u, **keywords())
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.mul_(1.5)       # in place
    second = fast(PROMPTS, u, **keywords())
    assert_same(second, sampler.generate(lm, PROMPTS, u, **keywords()))
    lm.model.norm.weight = torch.nn.Parameter(lm.model.norm.weight * 0.5)       # replaced
    third = fast(PROMPTS, u, **keywords())
    assert_same(third, sampler.generate(lm, PROMPTS, u, **keywords()))
    assert before[0] != second[0] != third[0]


def test_graphs_are_dropped_when_weights_move_but_not_when_they_change():
    lm = model()
    fast = bucketed(lm)
    fast(PROMPTS, noise(), **keywords())
    fast.captured = kept = {"size": "graph"}
    lm.model.norm.weight.data.mul_(2)
    fast(PROMPTS, noise(), **keywords())
    assert fast.captured is kept
    lm.model.norm.weight.data = lm.model.norm.weight.data.clone()
    fast(PROMPTS, noise(), **keywords())
    assert not fast.captured


def tensors(fast):
    values = [x for value in vars(fast).values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in values if isinstance(x, torch.Tensor)]


def test_addresses_stay_over_steps_and_calls():
    lm, seen = model(), []
    fast = bucketed(lm)
    forward = fast.forward
    fast.forward = lambda *shape: (seen.append([x.data_ptr() for x in tensors(fast)]), forward(*shape))[1]
    for T, prompts, seed in ((50, PROMPTS, 0), (30, PROMPTS[:2], 1), (20, PROMPTS[::-1], 2)):
        fast(prompts, noise(T, len(prompts) * 4, seed), **keywords(T))
    assert len(seen) > 60 and len(seen[0]) > 14 and all(x == seen[0] for x in seen)


class OnDevice(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or a shape depend on data."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        assert not any(x is not None and x.dtype == torch.bool for x in indices), name
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal", "bincount"}, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_step_never_waits_for_the_host(kind, greedy):
    fast = bucketed(model(KINDS[kind][0], **KINDS[kind][1]))
    advance, calls = fast.advance, []

    def watched(*size):
        with OnDevice():
            advance(*size)
        calls.append(size)

    fast.advance = watched
    fast(PROMPTS, None if greedy else noise(), **keywords())
    assert len(calls) > 20 and all(rows in fast.batches and columns % 8 == 0 for rows, columns, _ in calls)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnDevice():
        torch.ones(3).sum().item()


@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch knows no CUDA; it takes no GPU")
def test_on_a_gpu_nothing_lies_on_two_devices_and_no_step_waits_for_the_host(monkeypatch):
    """On tensors that are on the GPU by name only: PyTorch computes their shapes and devices, and refuses to look into one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    real = torch.tensor
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: id(x))
    monkeypatch.setattr(torch, "tensor", lambda x, device=None, **kw: torch.zeros(
        real(x, **kw).shape, dtype=real(x, **kw).dtype, device=device))
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(dtype=torch.bfloat16, config=Qwen2Config(
            vocab_size=20_480, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))

    def move(module):
        for kind in (module._parameters, module._buffers):
            for name, x in kind.items():
                new = None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
                kind[name] = torch.nn.Parameter(new, requires_grad=False) if isinstance(x, torch.nn.Parameter) else new

    with FakeTensorMode(), torch.inference_mode():
        lm = lm.eval().apply(move)
        fast, u = sampler.Sampler(lm), torch.rand(8, 30)
        assert fast.graphs and fast.multiple == sampler.COLUMNS
        for prompts in ([[5] * 20] * 2, [[5] * 90 + [i] for i in range(2)]):                   # the second with a shared beginning
            logits, cache, mask = sampler.prefill(lm, prompts, 0)
            rows = fast.start(8, 30, 4, logits, cache, mask, u, 1.0, [1, 2])
            fast.choose(logits.repeat_interleave(4, 0), 8, False)
            with fast.fast():
                for greedy in (False, True):
                    fast.step(rows, sampler.COLUMNS, greedy)
            assert {x.device.type for x in tensors(fast)} == {"cuda"}
        hidden = torch.zeros(1, 9, dtype=torch.long, device="cuda")
        layout = [torch.zeros(2, 5, dtype=torch.long, device="cuda"), torch.zeros(1, 3, dtype=torch.long, device="cuda")], hidden[0]
        lm.config._attn_implementation = "packed"
        here = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
        out = lm.base_model(input_ids=hidden, position_ids=hidden, attention_mask=here, layout=layout, use_cache=False)
        assert out.last_hidden_state.shape == (1, 9, 32) and out.last_hidden_state.device.type == "cuda"
        with pytest.raises(Exception, match="devices"):         # the ruler measures
            fast.token + torch.ones(8)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            int(fast.done.sum())


def test_the_model_is_left_as_it_was_also_after_an_exception():
    lm, calls = model(Qwen3Config), []
    usual = lm.config._attn_implementation

    def stop():
        calls.append(lm.config._attn_implementation)
        if len(calls) == 4:
            raise KeyboardInterrupt

    fast = bucketed(lm)
    with pytest.raises(KeyboardInterrupt):
        fast(PROMPTS, noise(), **keywords(check=stop))
    assert "one_query" in calls and lm.config._attn_implementation == usual
    assert_same(fast(PROMPTS, noise(), **keywords()), sampler.generate(lm, PROMPTS, noise(), **keywords()))


class Graph(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the list of operations, with the addresses they read and write, that `replay` repeats.
    As on a GPU, the capture itself changes nothing."""
    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for x, y in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(x, torch.Tensor) and x.data_ptr() != y.data_ptr():            # neither a view nor in place
                    x.copy_(y)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_captured_steps_give_the_plain_tokens_and_see_new_weights(kind, monkeypatch):
    lm, current = model(KINDS[kind][0], **KINDS[kind][1]), contextlib.nullcontext()
    current.wait_stream = lambda other: None

    @contextlib.contextmanager
    def capture(graph, **_):
        before = [x.clone() for x in tensors(fast)]
        with graph:
            yield
        for x, y in zip(tensors(fast), before):
            x.copy_(y)

    for name, value in {"Stream": lambda: current, "current_stream": lambda: current, "stream": lambda stream: stream,
                        "graph": capture, "CUDAGraph": Graph, "graph_pool_handle": object,
                        "set_sync_debug_mode": lambda mode: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    fast = bucketed(lm, graphs=True)
    for seed in range(3):
        for u in (noise(seed=seed), None):
            assert_same(fast(PROMPTS, u, **keywords()), sampler.generate(lm, PROMPTS, u, **keywords()))
        assert_same(fast(PROMPTS[1:3], noise(n=8), **keywords()), sampler.generate(lm, PROMPTS[1:3], noise(n=8), **keywords()))
        with torch.no_grad():
            lm.model.layers[0].mlp.up_proj.weight.mul_(1.1)
            lm.model.norm.weight.mul_(1.1)
    assert sum(graph.replays for graph in fast.captured.values()) > 100 and 5 < len(fast.captured) < 40


UNFIT = {"sliding window": (MistralConfig, {"sliding_window": 4}), "mixed layers": (Gemma2Config, {}),
         "capped scores": (Gemma2Config, {"layer_types": ["full_attention"] * 2})}


@pytest.mark.parametrize("kind", UNFIT)
def test_other_models_get_the_plain_sampler(kind):
    lm = model(UNFIT[kind][0], **UNFIT[kind][1])
    fast = bucketed(lm)
    for _ in range(2):
        assert_same(fast(PROMPTS, noise(), **keywords()), sampler.generate(lm, PROMPTS, noise(), **keywords()))
    assert fast.why_plain


def test_a_step_that_is_not_the_models_own_is_noticed(monkeypatch):
    """Attention that forgets a column stands for whatever a model may do that the fast step does not."""
    lm = model()
    fast, update = sampler.Sampler(lm), sampler.Sampler.update
    monkeypatch.setattr(sampler.Sampler, "update", lambda *x: tuple(y * (torch.arange(y.shape[2]) != y.shape[2] - 2)[:, None]
                                                                    for y in update(*x)))
    assert_same(fast(PROMPTS, noise(), **keywords()), sampler.generate(lm, PROMPTS, noise(), **keywords()))
    assert "differ" in fast.why_plain


def test_padding_and_what_lies_in_the_buffers_weigh_nothing():
    lm = model()
    fast = bucketed(lm)
    fast(PROMPTS, noise(), **keywords())
    with torch.inference_mode():
        for x in fast.keys + fast.values:
            x.fill_(float("nan"))
    short = [[5, 6], [7] * 60]                                  # a row whose first columns are padding
    plain = sampler.generate(lm, short, noise(n=8), **keywords())
    assert_same(fast(short, noise(n=8), **keywords()), plain)
    alone = fast(short[:1], noise(n=4), **keywords())
    assert alone[0] == plain[0][:4]


def test_release_and_running_out_of_memory_free_the_buffers():
    lm = model()
    fast, u = bucketed(lm), noise()
    expected = fast(PROMPTS, u, **keywords())
    fast.release()
    assert not tensors(fast) or not fast.keys
    assert_same(fast(PROMPTS, u, **keywords()), expected)

    def full(*size):
        raise torch.OutOfMemoryError("full")

    fast.advance = full
    with pytest.raises(torch.OutOfMemoryError):
        fast(PROMPTS, u, **keywords())
    assert not fast.keys and fast.why_plain is None
    del fast.advance
    assert_same(fast(PROMPTS, u, **keywords()), expected)


def test_a_capture_that_fails_costs_no_run_but_another_error_is_not_hidden():
    lm = model(Qwen2Config)
    fast, plain = sampler.Sampler(lm), sampler.generate(lm, PROMPTS, noise(), **keywords())

    def fail(*size):
        raise RuntimeError("operation not permitted when stream is capturing")
    fast.advance = fail
    with pytest.raises(RuntimeError, match="capturing"):        # nothing was to be captured: something else is wrong
        fast(PROMPTS, noise(), **keywords())
    fast.graphs = fast.probed = True
    with pytest.warns(UserWarning, match="capturing"):
        assert_same(fast(PROMPTS, noise(), **keywords()), plain)
    assert "capturing" in fast.why_plain and not fast.keys


def test_temperature_zero_is_greedy():
    lm = model()
    expected = sampler.generate(lm, PROMPTS, None, **keywords(temperature=1.0))
    assert_same(sampler.generate(lm, PROMPTS, None, **keywords(temperature=0.0)), expected)
    assert_same(sampler.Sampler(lm)(PROMPTS, None, **keywords(temperature=0.0)), expected)


def test_a_completion_depends_on_its_own_noise_alone():
    lm, u = model(), noise()
    together, _ = sampler.generate(lm, PROMPTS, u, **keywords())
    for i in range(4):
        assert sampler.generate(lm, PROMPTS[i:i + 1], u[4 * i:4 * i + 4], **keywords())[0] == together[4 * i:4 * i + 4]


@pytest.mark.parametrize("vocab", [50, 20_480, 20_500])         # one sum, two in blocks, too many for one block and no multiple
def test_no_id_of_probability_zero_is_picked(vocab):
    torch.manual_seed(0)
    logits = torch.randn(500, vocab)
    logits[:, ::7] = logits[:, -5:] = logits[:, 2000:4000] = -torch.inf
    for u in (0.0, 0.5, 1 - 2 ** -24):                          # the last is the largest that `uniforms` gives
        ids, logps = sampler.pick(logits, 1.0, torch.full((500,), u))
        assert logps.isfinite().all() and logits.gather(1, ids[:, None]).isfinite().all()


@pytest.mark.parametrize("vocab, n, atol", [(20, 40_000, 1e-4), (20_480, 2000, 1.01 / 2000), (20_500, 2000, 1.01 / 2000)])
def test_ids_come_as_often_as_their_probability_says(vocab, n, atol):
    torch.manual_seed(0)
    logits = torch.full((1, vocab), -torch.inf)
    logits[0, torch.randperm(vocab)[:20]] = torch.randn(20)
    ids, logps = sampler.pick(logits.expand(n, -1), 0.7, torch.arange(n) / n)
    expected = (logits[0] / 0.7).softmax(-1)
    torch.testing.assert_close(torch.bincount(ids, minlength=vocab) / n, expected, rtol=0, atol=atol)
    torch.testing.assert_close(logps, expected.log()[ids])
    assert ids.tolist() == sorted(ids.tolist())                 # the inverse of the distribution function rises


@pytest.mark.parametrize("vocab", [50, 20_480, 20_500])
def test_the_id_is_the_first_whose_cumulated_probability_exceeds_u(vocab):
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(200, vocab), torch.rand(200)
    ids, logps = sampler.pick(logits, 1.3, u)
    p = (logits.double() / 1.3).softmax(-1)
    ends = p.cumsum(1).gather(1, ids[:, None]).squeeze(1)
    assert (ends > u - 1e-6).all() and (ends - p.gather(1, ids[:, None]).squeeze(1) <= u + 1e-6).all()
    torch.testing.assert_close(logps.double(), p.gather(1, ids[:, None]).squeeze(1).log(), rtol=0, atol=1e-5)
    assert torch.equal(sampler.pick(logits, 1.3, None)[0], logits.argmax(-1))


def test_noise_is_a_function_of_seed_step_and_row():
    a, b = sampler.uniforms(1, 2, [3, 4, 5], 8), sampler.uniforms(1, 2, [5, 3], 8)
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0]) and 0 <= a.min() and a.max() < 1
    others = [sampler.uniforms(0, 2, [3], 8), sampler.uniforms(1, 1, [3], 8), a[1:2]]
    assert not any(torch.equal(a[:1], x) for x in others)


def test_a_forbidden_token_never_follows():
    lm, u = model(), noise(60)
    free, _ = sampler.generate(lm, PROMPTS, u, **keywords(60))
    pairs = [pair for row in free for pair in zip(row, row[1:])]
    a, b = max(set(pairs), key=pairs.count)
    assert b in ENDS or pairs.count((a, b)) > 1
    for sample in (lambda *x, **y: sampler.generate(lm, *x, **y), sampler.Sampler(lm)):
        held, _ = sample(PROMPTS, u, **keywords(60, forbid=(a, b)))
        assert (a, b) not in [pair for row in held for pair in zip(row, row[1:])] and any(a in row for row in held)


def test_check_is_called_throughout():
    for sample in (lambda *x, **y: sampler.generate(model(), *x, **y), bucketed(model())):
        calls = []
        sample(PROMPTS, None, **keywords(eos_ids=[], check=lambda: calls.append(1)))
        assert len(calls) >= 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a CUDA device")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_graphs_give_the_plain_tokens(kind):
    lm = model(KINDS[kind][0], **KINDS[kind][1]).cuda()
    fast = bucketed(lm)
    for seed in range(4):
        for u in (noise(seed=seed), None):
            assert_same(fast(PROMPTS, u, **keywords()), sampler.generate(lm, PROMPTS, u, **keywords()))
        with torch.no_grad():
            lm.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    assert fast.why_plain is None and fast.captured
