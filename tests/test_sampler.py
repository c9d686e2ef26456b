"""extras/sampler.py gives what grpo.generate gives, on buffers that stay where they are, step by step or as
CUDA graphs. Where there is no GPU, a graph is a list of operations, with the addresses that they read and
write."""
import contextlib
import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, BloomConfig, CohereConfig, Gemma2Config, GraniteConfig,
                          MistralConfig, Qwen2Config, Qwen3NextConfig)

import grpo
import rewards
import toys
from extras.sampler import Sampler

ENDS = {0, 1, 2}
PROMPTS = [[5, 6, 7], [9] * 11, [30, 31], [8, 7, 6, 5, 4]]
BLOCKS = {"blocks": (4, 8)}                                     # few shapes, as graphs want, and small
CHANGED = {                                                         # models that scale or cap their logits
    "scaled": (GraniteConfig, {"logits_scaling": 4.0}), "times": (CohereConfig, {"logit_scale": 0.25}),
    "capped": (Gemma2Config, {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None,
                              "layer_types": ["full_attention"] * 2})}
ALL = {name: kind for name, kind in (toys.KINDS | CHANGED).items() if "sliding_window" not in kind[1]}


def noise(n=16, limit=20, seed=0):
    return grpo.uniforms([[seed, 1, i] for i in range(n)], limit)


def call(sampler, lm, prompts, u, group_size, limit=20, temperature=1.2, **options):
    return sampler(lm, prompts, u, group_size, limit, temperature, ENDS, **options)


def assert_same(found, wanted):
    assert found[0] == wanted[0]
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def assert_as_generate(sampler, lm, *args, **options):
    wanted = call(grpo.generate, lm, *args, **options)
    assert_same(call(sampler, lm, *args, **options), wanted)
    return wanted


def tensors(sampler):
    """All that a captured step may read and write, besides the weights."""
    return [x for x in tree_leaves([vars(sampler), vars(sampler.cache)]) if isinstance(x, torch.Tensor)]


# ------------------------------------------------------------------------------------------- the same results
@pytest.mark.parametrize("kind", ALL)
def test_it_gives_the_tokens_and_log_probabilities_of_generate(kind):
    lm = toys.small(ALL[kind][0], **ALL[kind][1])
    for sampler in (Sampler(grpo.pick), Sampler(grpo.pick, **BLOCKS)):
        ids, _ = assert_as_generate(sampler, lm, PROMPTS, noise(), 4)
        assert len(set(map(len, ids))) > 2              # they end here and there, and leave the batch
        assert_as_generate(sampler, lm, PROMPTS, None, 1)
        with torch.inference_mode():
            for x in tensors(sampler):                              # what lies in the buffers weighs nothing
                x.fill_(torch.nan if x.is_floating_point() else 10 ** 9)
        assert_as_generate(sampler, lm, PROMPTS[2:], noise(6, 5, 1), 3, 5, 0.7)
        assert_as_generate(sampler, lm, PROMPTS[:1], noise(1, 1), 1, 1)
        assert_as_generate(sampler, lm, PROMPTS, noise(24, 30), 6, 30)      # they grow


@pytest.mark.parametrize("kind", ["qwen3", *CHANGED])
def test_log_probabilities_are_those_of_a_whole_forward_and_of_the_update(kind):
    lm = toys.small(ALL[kind][0], **ALL[kind][1])
    completions, logps = call(Sampler(grpo.pick, **BLOCKS), lm, PROMPTS, noise(), 4)
    for i, (ids, logp) in enumerate(zip(completions, logps)):
        prompt = PROMPTS[i // 4]
        row = torch.tensor([prompt + ids])
        with torch.no_grad():
            logits = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1:-1]
            start, mask = torch.tensor([len(prompt)]), torch.ones(1, len(ids))
            trained, _ = grpo.completion_logps(lm, row, start, mask, 1.2)
        whole = (logits.double() / 1.2).log_softmax(-1).gather(1, row[0, len(prompt):, None]).squeeze(1)
        torch.testing.assert_close(logp, whole.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(logp, trained[0], rtol=0, atol=1e-5)


def test_a_completion_depends_on_its_prompt_and_noise_alone_not_on_its_company():
    lm, u, sampler = toys.small(), noise(16, 30), Sampler(grpo.pick, **BLOCKS)
    together, _ = call(sampler, lm, PROMPTS, u, 4, 30)
    assert len(set(map(tuple, together))) == 16
    for i in range(4):
        assert call(sampler, lm, PROMPTS[i:i + 1], u[4 * i:4 * i + 4], 4, 30)[0] == together[4 * i:4 * i + 4]
    assert call(sampler, lm, [PROMPTS[2], PROMPTS[0]], u[[9, 1]], 1, 30)[0] == [together[9], together[1]]


@pytest.mark.parametrize("last", [0, 1, 5])
def test_steps_that_end_early_give_what_there_is_so_far(last):
    lm, sampler, asked = toys.small(), Sampler(grpo.pick, **BLOCKS), []
    whole, _ = call(sampler, lm, PROMPTS, noise(), 4)
    steps = lambda n: asked.append(n) or range(last)                # noqa: E731
    ids, logps = assert_as_generate(sampler, lm, PROMPTS, noise(), 4, steps=steps)
    assert ids == [x[:last] for x in whole] and list(map(len, logps)) == list(map(len, ids))
    assert set(asked) == {20}
    assert_as_generate(sampler, lm, PROMPTS, noise(), 4)            # and nothing of it is left behind


def test_no_end_and_many_ends():
    lm, sampler = toys.small(), Sampler(grpo.pick, **BLOCKS)
    for ends in (set(), set(range(60))):
        args = lm, PROMPTS, noise(), 4, 20, 1.2, ends
        assert_same(sampler(*args), grpo.generate(*args))


def test_a_run_with_the_flag_is_the_run_without_it(tmp_path, monkeypatch):
    def score_batch(tasks, texts, rows, *_, **__):                  # any two completions are likely to differ
        nothing = dict.fromkeys(rewards.WEIGHTS, 0.0)
        return [nothing | {"reward": sum(map(ord, text)) % 7 / 6} for text in texts]

    monkeypatch.setattr(rewards, "score_batch", score_batch)
    toys.save(tmp_path)
    flags = ["--model", f"{tmp_path}/model", "--data", f"countdown={tmp_path}/countdown", "--steps", "2",
             "--eval_data", f"countdown={tmp_path}/countdown", "--group_size", "4", "--prompts_per_step", "4",
             "--max_new_tokens", "12", "--beta", "0.1", "--lr", "1e-3"]
    for name, more in (("plain", []), ("buffers", ["--cuda_graphs"])):
        grpo.main([*flags, "--output_dir", f"{tmp_path}/{name}", *more])
    plain, buffers = (Path(tmp_path, name, "model.safetensors").read_bytes() for name in ("plain", "buffers"))
    assert plain == buffers != Path(tmp_path, "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind, config", [
    (MistralConfig, {"sliding_window": 4}), (Gemma2Config, {}), (BloomConfig, {"n_head": 4}),
    (Qwen3NextConfig, {"num_experts": 4, "moe_intermediate_size": 16, "linear_num_value_heads": 4,
                       "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                       "layer_types": ["linear_attention", "full_attention"]})],
    ids=["window", "mixed", "alibi", "linear"])
def test_a_model_with_another_cache_or_no_positions_is_refused_in_one_line(kind, config, capfd):
    lm = toys.small(kind, **config)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(Sampler(grpo.pick), lm, PROMPTS, None, 1)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and lm.config.model_type in err
    assert "keys and values" in err and "leave --cuda_graphs away" in err


# ------------------------------------------------------------------------------------------- graphs
class OnDevice(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or a shape depend on data."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        assert not any(x is not None and x.dtype == torch.bool for x in indices), name
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2",
                            "equal", "isin"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "capped"])
def test_a_step_never_waits_for_the_host_has_few_shapes_and_reads_the_same_addresses(kind):
    lm, sampler = toys.small(ALL[kind][0], **ALL[kind][1]), Sampler(grpo.pick, **BLOCKS)
    shapes, addresses, forward = [], [], sampler.forward

    def watched(rows, columns):
        with OnDevice():
            forward(rows, columns)
        shapes.append((rows, columns))
        addresses.append([x.data_ptr() for x in tensors(sampler)])

    def steps(n):
        for t in range(n):                                          # nor does what is around the model
            with OnDevice() if t % 4 else contextlib.nullcontext():
                yield t

    sampler.forward = watched
    for prompts, u in ((PROMPTS, noise(16)), (PROMPTS[:2], noise(8)), (PROMPTS, None)):
        call(sampler, lm, prompts, u, 1 if u is None else 4, steps=steps)
    assert len(shapes) > 30 and all(rows % 4 == 0 and columns % 8 == 0 for rows, columns in shapes)
    assert len({rows for rows, _ in shapes}) > 2                    # rows leave
    assert len(addresses[0]) == 9 and all(x == addresses[0] for x in addresses)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnDevice():
        torch.ones(3).sum().item()


class Graph(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations with the addresses that they read and write."""
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
                if isinstance(x, torch.Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)                                      # it was neither a view nor in place


@pytest.fixture
def graphs(monkeypatch):
    """-> function that makes a sampler with such graphs."""
    made = []

    @contextlib.contextmanager
    def capture(graph, **_):                                        # as on a GPU it changes nothing
        before = [x.clone() for x in tensors(made[-1])]
        with graph:
            yield
        for x, y in zip(tensors(made[-1]), before):
            x.copy_(y)

    def make(pick=grpo.pick):
        made.append(Sampler(pick, graphs=True, **BLOCKS))
        return made[-1]

    for name, value in {"graph": capture, "CUDAGraph": Graph, "graph_pool_handle": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return make


def replays(sampler):
    return sum(graph.replays for graph in sampler.captured.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "scaled", "capped"])
def test_captured_steps_give_the_tokens_of_generate_and_see_new_weights(kind, graphs):
    lm, sampler = toys.small(ALL[kind][0], **ALL[kind][1]), graphs()
    for seed in range(2):
        for prompts, u in ((PROMPTS, noise(16, 20, seed)), (PROMPTS, None),
                           (PROMPTS[1:3], noise(8, 12, seed))):
            size = (1, 20) if u is None else (4, u.shape[1])
            found = assert_as_generate(sampler, lm, prompts, u, *size, temperature=1.2 - 0.5 * seed)
        with torch.no_grad():                                       # in place, as copy_weights() does
            for p in lm.parameters():
                p.copy_(p * 1.1)
        assert call(grpo.generate, lm, prompts, u, *size)[0] != found[0]
    assert replays(sampler) > 20 and 5 < len(sampler.captured) < 40
    assert_as_generate(sampler, lm, PROMPTS[:2], noise(2, 30), 1, 30)       # they grow, and start anew
    assert sampler.graphs


@pytest.mark.parametrize("in_4bit", [False, True], ids=["lora", "qlora"])
def test_captured_steps_see_an_adapter_that_moves(in_4bit, graphs, tmp_path):
    if in_4bit:
        pytest.importorskip("bitsandbytes")
    toys.save(tmp_path)
    args = SimpleNamespace(load_in_4bit=in_4bit, lora_rank=4, lora_alpha=32.0, fsdp=False, optim="adamw",
                           activation_checkpointing=True, seed=0)
    policy, lm = grpo.load_policy(f"{tmp_path}/model", args, torch.device("cpu"), torch.float32)
    trained = grpo.fp32_masters(policy)
    sampler, found = graphs(), []
    for seed in range(3):
        found.append(assert_as_generate(sampler, lm, PROMPTS, noise(), 4)[0])
        captured = dict(sampler.captured)
        torch.manual_seed(seed)
        for _, master in trained.values():
            master.data += 0.1 * torch.randn_like(master)
        grpo.copy_weights(trained.values())
    assert found[0] != found[1] != found[2]
    assert captured and all(sampler.captured[shape] is graph for shape, graph in captured.items())
    assert replays(sampler) > 20
    with policy.disable_adapter():                                  # another sampler sees the base
        assert assert_as_generate(graphs(), lm, PROMPTS, noise(), 4)[0] == found[0]


def test_a_weight_in_bf16_that_is_rounded_from_its_master_is_seen(graphs):
    lm, sampler = toys.small().bfloat16(), graphs()
    trained, found = grpo.fp32_masters(lm), []
    for _ in range(3):
        found.append(call(sampler, lm, PROMPTS, noise(), 4))
        again = call(Sampler(grpo.pick, **BLOCKS), lm, PROMPTS, noise(), 4)
        assert_same(found[-1], again)
        for _, master in trained.values():
            master.data *= 1.2
        grpo.copy_weights(trained.values())
    assert found[0][0] != found[1][0] != found[2][0] and replays(sampler) > 10


def test_graphs_belong_to_one_model_and_to_the_places_of_its_weights(graphs):
    first, second, sampler = toys.small(), toys.small(seed=1), graphs()
    for lm in (first, second, first):
        call(sampler, lm, PROMPTS, noise(), 4)
        before = list(sampler.captured.values())
        assert_as_generate(sampler, lm, PROMPTS, noise(), 4)
        assert list(sampler.captured.values()) == before != []
    for p in first.parameters():
        p.data = p.detach() * 1.2                                   # not in place
    assert_as_generate(sampler, first, PROMPTS, noise(), 4)
    assert not set(sampler.captured.values()) & set(before)


def test_a_pick_of_ones_own_with_plain_numbers_counts_in_captured_steps(graphs, monkeypatch):
    def pick(logits, temperature, u, top_k):
        least = logits.topk(top_k).values[:, -1:]
        return usual(logits.masked_fill(logits < least, -torch.inf), temperature, u)

    lm, sampler, found, usual = toys.small(), graphs(), [], grpo.pick
    for top_k in (64, 3, 1):
        sampler.pick = functools.partial(pick, top_k=top_k)
        found.append(call(sampler, lm, PROMPTS, noise(), 4))
        monkeypatch.setattr(grpo, "pick", sampler.pick)
        assert_same(found[-1], call(grpo.generate, lm, PROMPTS, noise(), 4))
        monkeypatch.setattr(grpo, "pick", usual)
    greedy, _ = call(grpo.generate, lm, PROMPTS, None, 1)
    assert found[0][0] != found[1][0] and found[2][0] == [ids for ids in greedy for _ in range(4)]
    assert replays(sampler) > 20


def test_a_capture_that_fails_costs_one_warning_and_memory_that_is_short_is_not_hidden(monkeypatch, capfd):
    lm, errors = toys.small(), [RuntimeError("operation not permitted when stream is capturing")]

    def graph(*args, **kwargs):
        raise errors[-1]

    @contextlib.contextmanager
    def full(*args, **kwargs):                                      # and to leave the capture fails on top
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    sampler, wanted = Sampler(grpo.pick, graphs=True, **BLOCKS), call(grpo.generate, lm, PROMPTS, noise(), 4)
    for _ in range(2):
        assert_same(call(sampler, lm, PROMPTS, noise(), 4), wanted)
    assert capfd.readouterr().err.count("without CUDA graphs") == 1
    errors.append(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        call(Sampler(grpo.pick, graphs=True), lm, PROMPTS, noise(), 4)
    for name, value in {"graph": full, "CUDAGraph": object, "graph_pool_handle": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(torch.OutOfMemoryError):
        call(Sampler(grpo.pick, graphs=True), lm, PROMPTS, noise(), 4)


# ------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.skipif(not torch.version.cuda, reason="this build of torch knows no CUDA; it takes no GPU")
def test_on_a_gpu_nothing_lies_on_two_devices_and_no_step_waits_for_the_host(monkeypatch):
    """On tensors that are on the GPU by name only: PyTorch computes their shapes and devices, no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 0)      # they have no address either
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(dtype=torch.bfloat16, config=Qwen2Config(
            vocab_size=20_480, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2))

    def move(module):
        for place in (module._parameters, module._buffers):
            for name, x in place.items():
                new = None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
                is_parameter = isinstance(x, torch.nn.Parameter)
                place[name] = torch.nn.Parameter(new, requires_grad=False) if is_parameter else new

    with FakeTensorMode(), torch.inference_mode():
        lm = lm.eval().apply(move)
        sampler, cuda = Sampler(grpo.pick), {"dtype": torch.bfloat16, "device": "cuda"}
        filled = [torch.zeros(5, 2, 20, 8, **cuda) for _ in range(4)]
        sampler.allocate(lm, filled, torch.zeros(5, 20_480, **cuda), 40, 150)
        assert sampler.graphs and (sampler.rows, sampler.columns) == (64, 256)
        sampler.forward(64, 128)
        sampler.graphs = False                                      # and around the model, with the pick
        sampler.advance(32, 130)
        token, _ = grpo.pick(sampler.logits[:32], 1.0, torch.rand(32, device="cuda"))
        sampler.token[:32] = token
        assert {x.device.type for x in tensors(sampler)} == {"cuda"} and len(tensors(sampler)) == 9
        with pytest.raises(Exception, match="devices"):             # the ruler measures
            sampler.token + torch.ones(len(sampler.token))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            int(sampler.token.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a CUDA device")
@pytest.mark.parametrize("kind", ALL)
def test_on_a_gpu_captured_steps_give_the_tokens_of_the_same_steps_uncaptured(kind):
    lm = toys.small(ALL[kind][0], **ALL[kind][1]).cuda()
    fast, plain = Sampler(grpo.pick, **BLOCKS), Sampler(grpo.pick, graphs=False, **BLOCKS)
    for seed in range(3):
        u = noise(16, 20, seed)
        assert_same(call(fast, lm, PROMPTS, u, 4), call(plain, copy.deepcopy(lm), PROMPTS, u, 4))
        with torch.no_grad():
            for p in lm.parameters():
                p.copy_(p * 1.1)
    assert fast.graphs and fast.captured
