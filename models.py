"""What a policy is: a causal LM of transformers, loaded, wrapped in LoRA or sharded, with an optimiser that keeps fp32 masters.

sft.py, grpo.py and eval.py share this file, so that any of them takes any model that another one takes.

Every kind of policy (whole, LoRA, QLoRA, sharded) is trained and saved by the same code. What it amounts to as one whole plain
model, `refresh` writes: that is what grpo.py samples from, and what --merge and the end of a run save.
"""
import json
import math
import resource
import types
from pathlib import Path

import huggingface_hub
import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rewards
from attention import hidden_states, packs
from runs import RANK, WORLD, fail, note

HEAD_LOGITS = 2 ** 26                                           # that exist at a time: 256 MB in fp32
transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------- tokenizers
def base_of(name):
    """What the adapter in the folder `name` adapts; of any other model, `name` itself."""
    config = Path(name) / "adapter_config.json"
    try:
        return json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else name
    except (OSError, ValueError, KeyError):
        fail(f"--model {name}: its adapter_config.json names no base model")


def load_tokenizer(name, chat_template=None, trust_remote_code=False, train=False):
    """-> tokenizer, ids that end a completion (models have several), length of the model's context. Refuses what cannot work, with
    train=True what cannot be trained either."""
    base = base_of(name)
    if train and base != name:
        fail(f"--model {name} is an adapter: train on from its merged/, which --merge writes")
    if not Path(base).is_dir():                                 # one look at the hub: without a network transformers would
        try:                                                    # try again for a minute
            huggingface_hub.model_info(base, timeout=10)
        except Exception as err:
            huggingface_hub.constants.HF_HUB_OFFLINE = not isinstance(err, huggingface_hub.errors.HfHubHTTPError)
    elif not (Path(base) / "config.json").exists():
        inner = ", ".join(sorted({path.parent.name for path in Path(base).glob("*/*config.json")})) or "nothing"
        fail(f"--model {base}: holds no config.json; of the folders in it {inner} does")
    try:
        own = (Path(name) / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(name if own else base, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as err:                                    # any of a dozen kinds, for what is one thing to the user
        if "trust_remote_code" in str(err):
            fail(f"--model {name} comes with code of its own: read it, then pass --trust_remote_code to run it")
        of = "" if base == name else f"{base}, the base of this adapter, is "
        fail(f"--model {name}: {of}neither a folder with a model nor a hub id that can be reached now ({str(err)[:200]})")
    scaled = [k for k in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, k, None) not in (None, 1)]
    if train and scaled:
        fail(f"--model {name}: it scales its logits ({scaled[0]}), which a head in chunks would leave out")
    tokenizer.chat_template = Path(chat_template).read_text() if chat_template else tokenizer.chat_template
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template; pass one with --chat_template FILE (Jinja)")
    try:
        ends = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:                                             # no such file: transformers would make it of the config
        ends = config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not eos_ids:
        fail(f"--model {name}: neither its tokenizer nor its generation config names an end token")
    return tokenizer, eos_ids, getattr(config, "max_position_embeddings", math.inf)


def prompt_ids(tokenizer, rows, style, before=lambda row: ()):
    """The ids of each row's prompt, by the chat template; before(row): chat turns that come before the problem."""
    texts = []
    try:
        for row in rows:
            system, problem = rewards.messages(row["task"], row, style)
            texts.append(tokenizer.apply_chat_template([system, *before(row), problem], tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as err:
        fail(f"--model {tokenizer.name_or_path}: its chat template does not take the prompt ({err}); pass another with "
             "--chat_template FILE (Jinja)")
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


# ------------------------------------------------------------------------------------------- models
def load_lm(name, device, dtype, load_in_4bit=False, trust_remote_code=False):
    """The causal language model `name`, in `dtype` or in nf4 with double quantisation, in eval mode. Of an adapter's folder: its
    base with the adapter merged into it."""
    kwargs = dict(device_map={"": device}, quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)) if load_in_4bit else {}
    base = base_of(name)
    try:
        lm, found = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=trust_remote_code,
                                                         output_loading_info=True, **kwargs)
        if base != name:
            import peft
            lm = peft.PeftModel.from_pretrained(lm, name).merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except Exception as err:                                    # a damaged file, a missing package, an unknown architecture
        fail(f"--model {name}: cannot be loaded ({' '.join(str(err).split())[:200]})")
    if found["missing_keys"]:                                   # transformers would go on with random numbers in their place
        fail(f"--model {name}: its files lack weights ({', '.join(sorted(found['missing_keys']))[:200]})")
    for module in lm.modules():                                 # on a CPU a first pass would repack 4-bit weights, and break them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return fuse_norms(lm.to(device).eval())


@torch.no_grad()
def fuse_norms(lm):
    """Gives RMSNorms, which transformers writes as seven operations, the one that torch has: where both say the same."""
    for m in lm.modules():
        eps, weight = getattr(m, "variance_epsilon", getattr(m, "eps", None)), getattr(m, "weight", None)
        if type(m).__name__.endswith("RMSNorm") and eps and weight is not None and weight.dtype == lm.dtype:
            x = torch.linspace(-3, 3, 3 * len(weight), device=weight.device).view(3, -1).to(weight)
            x = x * x.new_tensor([[1e-3], [1], [10]])
            if torch.allclose(m(x), F.rms_norm(x, weight.shape, weight, eps), rtol=4 * torch.finfo(x.dtype).eps):
                m.forward = types.MethodType(lambda m, x, eps=eps: F.rms_norm(x, m.weight.shape, m.weight, eps), m)
    return lm


def load_policy(args, device, dtype):
    """The model to train: args.model whole, or frozen under a new LoRA adapter."""
    at, dtype = (torch.device("cpu"), torch.float32) if args.fsdp else (device, dtype)         # a shard moves to its own GPU
    lm = load_lm(args.model, at, dtype, args.load_in_4bit, args.trust_remote_code)
    if not args.lora_rank:
        return lm
    import peft
    torch.manual_seed(args.seed)
    model = peft.get_peft_model(lm, peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, task_type="CAUSAL_LM",
                                                    target_modules="all-linear"))
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return model


def prepare(model, args, dtype):
    """Activation checkpointing and FSDP2, where asked for -> completion_logps of the model, as a function of the rest."""
    lm = base_lm(model)
    if args.activation_checkpointing:                           # the second name: transformers before 5.2x
        (getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    lm.logps = types.MethodType(completion_logps, lm)
    packs(lm)                                                   # tries it out, while the model is still whole
    if args.fsdp:                                               # each process holds its part of every weight, in fp32; a layer
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)            # is gathered in dtype to run
        for module in (*lm.base_model.layers, lm):
            fully_shard(module, mp_policy=policy)
        register_fsdp_forward_method(lm, "logps")
    return lm.logps


def base_lm(model):
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def full(x):
    """A sharded tensor gathered; all processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def refresh(plain, model):
    """Copies the weights of the plain model that `model` amounts to into `plain`, in place: 4-bit weights dequantised, sharded
    ones gathered, B A scaling of an adapter added in fp32 to its base, which stays pristine. All processes must ask; plain is
    None where this one only helps to gather. A model that is one whole plain model already needs no copy."""
    if plain is model:
        return
    lm, target = base_lm(model), None if plain is None else dict(plain.named_parameters())
    for name, w in lm.named_parameters():
        layer, adapted, leaf = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if getattr(w, "quant_state", None) is not None:
            import bitsandbytes
            w = bitsandbytes.functional.dequantize_4bit(w, w.quant_state)
        if adapted and leaf == "weight":
            lora = lm.get_submodule(layer)
            w = w.float() + lora.scaling["default"] * (lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float())
        w = full(w)
        if target:
            target[name.replace(".base_layer.", ".")].copy_(w)


# ------------------------------------------------------------------------------------------- memory
def fitting(attempt, size, flag, least=1):
    """attempt(size), again with half as many while the GPU's memory is too small -> what it returned, the size that it took."""
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size <= least:
                raise
        torch.cuda.empty_cache()                                # out of the except, which holds on to the memory
        size = -(-size // 2)
        note(f"out of GPU memory: {flag(size)} from here on; the results are the same")


def peak_memory_gb():
    """Of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ------------------------------------------------------------------------------------------- the head
def completion_logps(lm, ids, prompt_lengths, mask, temperature=1.0, *, extra="entropy", chunk=HEAD_LOGITS):
    """Of the completions in ids, [n, T] each: log-probabilities at `temperature`, and without a gradient either the entropy there
    or (extra="hit") 1 where the id is the likeliest.

    ids [n, L]: prompt + completion, right-padded (causal attention then needs no mask); prompt_lengths [n]; mask [n, T].
    The head sees only completion positions, a few at a time, so that `chunk` logits exist at once, never [n, L, vocabulary]; the
    backward pass computes them again."""
    def head(h, t):
        logits = lm.get_output_embeddings()(h).float()                                             # fp32: bf16 ratios are noise
        logps = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        logp = logps.gather(1, t[:, None]).squeeze(1)
        with torch.no_grad():                                   # comes last: the backward pass computes again what is before it
            more = -(logps.exp() * logps).sum(-1) if extra == "entropy" else (logps.argmax(-1) == t).float()
        return logp, more

    (n, T), on = mask.shape, mask.bool()
    row, column = torch.arange(n, device=ids.device)[:, None], torch.arange(T, device=ids.device)
    used = prompt_lengths + F.pad(on * column, (1, 0)).amax(1)                                     # what comes before the last of on
    hidden, rows = hidden_states(lm, ids, used)                                                    # [M, H], [n, L]
    place = (prompt_lengths[:, None] + column).clamp(max=ids.shape[1] - 1)                         # [n, T]
    targets, hidden = ids[row, place][on], F.embedding(rows[row, place - 1][on], hidden)           # [tokens], [tokens, H]
    size = max(1, chunk // lm.config.get_text_config().vocab_size)
    whole = len(targets) <= size or not torch.is_grad_enabled()
    pieces = [head(h, t) if whole else checkpoint(head, h, t, use_reentrant=False)
              for h, t in zip(hidden.split(size), targets.split(size))]
    blank = torch.zeros_like(mask, dtype=torch.float32)         # fsdp casts the mask to bf16
    return tuple(blank.masked_scatter(on, torch.cat(x)) for x in zip(*pieces))


# ------------------------------------------------------------------------------------------- the optimiser
def learning_rate(step, steps, warmup, schedule):
    """Of step 1, 2, ..., as a share of the peak: linear warm-up, then a schedule that would reach 0 one step after the last."""
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def joined(p, low):
    """bf16 numbers and their low 16 bits -> fp32, to the bit."""
    return ((p.view(torch.int16).int() << 16) + low).view(torch.float32)


def parted(x):
    """fp32 -> the nearest bf16, and the low 16 bits by which it is off."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


class Optimizer:
    """AdamW, 8-bit AdamW or Muon on fp32 masters of all trained parameters: an update of 5e-7 would round to nothing in bf16.

    A parameter in fp32 is its own master. The master of one in bf16 is the parameter and 16 more bits: with fp32 gradients and
    8-bit moments that is 10 bytes a parameter. It exists in fp32 only while its own update runs, so it has an optimiser of its
    own. Gradients are added up in fp32 as they arrive, in `grads`."""

    def __init__(self, model, args):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.low = {p: torch.zeros(p.shape, dtype=torch.int16, device=p.device) for p in self.parameters if p.dtype == torch.bfloat16}
        self.sums, self.max_norm = {}, args.max_grad_norm or math.inf
        self.master = {p: torch.nn.Parameter(torch.empty([0] * p.ndim, device=p.device)) if p in self.low else p
                       for p in self.parameters}                # of as many dimensions, as Muon asks for two
        for p in self.low:
            p.register_post_accumulate_grad_hook(self.take)
        muon = {p for name, p in named.items() if args.optim == "muon" and p.ndim == 2 and ".layers." in name}
        adam = dict(lr=args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay)

        def make(parameters):
            masters = [self.master[p] for p in parameters]
            if parameters[0] in muon:
                return torch.optim.Muon(masters, lr=args.muon_lr, weight_decay=args.weight_decay), parameters
            if args.optim == "adamw8bit":
                import bitsandbytes
                return bitsandbytes.optim.AdamW8bit(masters, **adam), parameters
            return torch.optim.AdamW(masters, fused=True, **adam), parameters

        fp32 = [p for p in self.parameters if p not in self.low]
        parts = [[p for p in fp32 if p in muon], [p for p in fp32 if p not in muon], *([p] for p in self.low)]
        self.optimizers = [make(part) for part in parts if part]
        self.of = {p: optimizer for optimizer, part in self.optimizers for p in part}

    def take(self, p):
        self.sums[p] = p.grad.float() if p not in self.sums else self.sums[p].add_(p.grad)
        p.grad = None

    def grads(self):
        """{parameter: its fp32 gradient}, for those that have one."""
        return {p: g for p in self.parameters for g in (self.sums.get(p), p.grad) if g is not None}

    def zero_grad(self):
        self.sums.clear()
        for p in self.parameters:
            p.grad = None

    def step(self, factor, skip=False):
        """One update at `factor` times the peak learning rates. -> the gradient's norm before it was clipped; where that is not
        finite, or with skip, nothing is changed."""
        grads = self.grads()
        norm = full(torch.nn.utils.get_total_norm(list(grads.values()))) if grads else torch.tensor(0.0)
        if norm.isfinite() and not skip:
            torch._foreach_mul_(list(grads.values()), (self.max_norm / (norm + 1e-6)).clamp(max=1.0).item())
            for optimizer, part in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * factor
                for p in part if part[0] in self.low else ():
                    self.master[p].data = joined(p.data, self.low[p])
                    self.master[p].grad = grads.get(p)
                optimizer.step()
                for p in part if part[0] in self.low else ():
                    p.data[...], self.low[p][...] = parted(self.master[p].data)
                    self.master[p].data, self.master[p].grad = torch.empty([0] * p.ndim, device=p.device), None
        self.zero_grad()
        return float(norm)

    def reduce(self):
        """Adds the gradients of all processes up; one that has none adds zeros. Not for fsdp, which has done so."""
        for p in set(self.parameters) - set(self.grads()):
            if p in self.low:
                self.sums[p] = torch.zeros_like(p, dtype=torch.float32)
            else:
                p.grad = torch.zeros_like(p)
        for wait in [dist.all_reduce(g, async_op=True) for g in self.grads().values()] if WORLD > 1 else ():
            wait.wait()

    @torch.no_grad()
    def weights(self):
        """{name: fp32 master} of the trained parameters, on the CPU, in process 0 ({} in the others, which must ask too)."""
        masters = ((name, full(joined(p.data, self.low[p]) if p in self.low else p.data)) for name, p in zip(self.names, self.parameters))
        return {name: w.to("cpu", copy=True) for name, w in masters if RANK == 0}

    def state(self):
        """All that load_state needs, on the CPU, in process 0 ({} in the others, which must ask too). By parameter: it fits any number
        of processes, sharded or not."""
        moments = {name: {k: full(x).cpu() if torch.is_tensor(x) else x for k, x in self.of[p].state[self.master[p]].items()}
                   for name, p in zip(self.names, self.parameters)}
        weights = self.weights()
        return {"weights": weights, "moments": moments} if RANK == 0 else {}

    @torch.no_grad()
    def load_state(self, state):
        if {name: w.shape for name, w in state["weights"].items()} != {name: p.shape for name, p in zip(self.names, self.parameters)}:
            fail("the checkpoint is of another model than --model")
        for name, p in zip(self.names, self.parameters):
            shard = (lambda x: distribute_tensor(x.to(p.device), p.device_mesh, p.placements)) if isinstance(p, DTensor) else \
                (lambda x: x.to(p.device))
            w = state["weights"][name]
            if p in self.low:
                w, low = parted(w)
                self.low[p].copy_(low)
            p.copy_(shard(w))
            self.of[p].state[self.master[p]] = {k: shard(x) if torch.is_tensor(x) and x.shape == w.shape else
                                                x.to(p.device) if torch.is_tensor(x) else x for k, x in state["moments"][name].items()}
