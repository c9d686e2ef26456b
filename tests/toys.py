"""A toy checkpoint and toy rows: what tests share. The tokenizer is one token a character, and its pad
token is its end token, as in Qwen's base models; the model has more ids than the tokenizer, as most have.
Its template leaves the instructions out, which keeps the prompts short: of a user's turn it shows only what
follows the last blank line."""
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, Cohere2Config, CohereConfig, Gemma2Config, Gemma3TextConfig,
                          GPT2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, Qwen3MoeConfig)

END, USER, ASSISTANT, UNKNOWN = "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"
TAGS = ["<reasoning>", "</reasoning>", "<think>", "</think>", "<answer>", "</answer>"]
TEMPLATE = ("{% for m in messages if m['role'] != 'system' %}"
            "<|{{ m['role'] }}|>{{ m['content'].split('\n\n')[-1] if m['role'] == 'user' else m['content'] }}"
            "<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
VOCAB = 128

COUNTDOWN = [{"nums": [3, 5, 8], "target": 16}, {"nums": [1, 2, 3, 4], "target": 24},
             {"nums": [7, 7, 2], "target": 16}, {"nums": [9, 4], "target": 5}, {"nums": [6, 2], "target": 12},
             {"nums": [10, 5, 3], "target": 18}, {"nums": [8, 3, 2], "target": 13},
             {"nums": [4, 4, 4], "target": 12}]
GSM8K = [{"question": "Tom has 3 bags of 4 apples. How many?", "answer": "He has 3*4=<<3*4=12>>12.\n#### 12"},
         {"question": "2+2?", "answer": "#### 4"},
         {"question": "A box holds 6. Five boxes?", "answer": "5*6=30\n#### 30"},
         {"question": "Half of 18?", "answer": "#### 9"}]


def tokenizer(chat_template=TEMPLATE):
    words = [END, USER, ASSISTANT, UNKNOWN, *TAGS, "\n", *map(chr, range(32, 127))]
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tok.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, pad_token=END, unk_token=UNKNOWN,
                                   additional_special_tokens=[USER, ASSISTANT])
    fast.chat_template = chat_template
    return fast


def model(seed=0, std=0.1, vocab=VOCAB, hidden=64, layers=2, tied=True, **config):
    """Logits of a random toy lie around +-`std` times ten: its choices are neither uniform nor certain."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 4,
        "num_hidden_layers": layers, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": std, "tie_word_embeddings": tied, "eos_token_id": 0, "bos_token_id": None,
        "pad_token_id": None} | config)).eval()


# Models of many kinds: name -> its config's class, what it is besides small. OFF undoes what is odd in them
KINDS = {"llama": (LlamaConfig, {}), "qwen2": (Qwen2Config, {}), "qwen3": (Qwen3Config, {}),
         "moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
         "untied": (Qwen2Config, {"tie_word_embeddings": False}),
         "one head each": (LlamaConfig, {"num_key_value_heads": 4}),
         "gpt2": (GPT2Config, {"n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
         "mistral": (MistralConfig, {"sliding_window": 4}),
         "gemma 2": (Gemma2Config, {"sliding_window": 4, "final_logit_softcapping": 2.0}),
         "gemma 3": (Gemma3TextConfig, {"sliding_window": 4,
                                        "layer_types": ["sliding_attention", "full_attention"]}),
         "granite": (GraniteConfig, {"logits_scaling": 4.0}), "cohere": (CohereConfig, {"logit_scale": 0.5}),
         "cohere 2": (Cohere2Config, {"sliding_window": 4, "logit_scale": 0.5})}
OFF = {"sliding_window": 99, "final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


def small(kind="llama", seed=0, **config):
    """A random model of this kind, a name above or a config's class, of 64 ids."""
    torch.manual_seed(seed)
    kind, config = (KINDS[kind][0], KINDS[kind][1] | config) if kind in KINDS else (kind, config)
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
              "initializer_range": 0.2, "head_dim": 8,
              "bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config
    lm = AutoModelForCausalLM.from_config(kind(**config)).eval()
    for name, x in lm.named_parameters():                       # norms and biases come as ones and zeros
        if x.dim() == 1:
            x.data += 0.2 * torch.randn_like(x)
    return lm


def write(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def save(folder, **kwargs):
    """folder/model: a checkpoint; folder/countdown, folder/gsm8k: train.jsonl and test.jsonl."""
    folder = Path(folder)
    model(**kwargs).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for split in ("train", "test"):
        write(folder / "countdown" / f"{split}.jsonl", COUNTDOWN)
        write(folder / "gsm8k" / f"{split}.jsonl", GSM8K)
    return folder


class Memory(TorchDispatchMode):
    """The largest tensor made, in elements, and the most bytes alive at once."""
    def __init__(self):
        super().__init__()
        self.largest, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // x.element_size())
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


# ---------------------------------------------------------------- processes
def as_process(rank, world):
    """Makes this process number `rank` of `world`, in all scripts that read these numbers when imported."""
    for module in map(sys.modules.get, ("sft", "grpo", "eval")):
        if hasattr(module, "RANK"):
            module.RANK = rank
        if hasattr(module, "WORLD"):
            module.WORLD = world


def fork(main, argv, env=(), rank=0, world=1, before=lambda: None, cpu_seconds=0):
    """main(argv) in a process that need not import torch again, killed after cpu_seconds -> its id"""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(120)                                       # a dead-lock fails one test, not the suite
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)       # SIGPROF kills: no handler, no clean-up
        os.environ.update(env)
        as_process(rank, world)
        before()
        main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(main, world, argv, before=lambda rank: None, env=()):
    """The same command in `world` processes. -> their exit codes"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(env, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(world),
                   LOCAL_WORLD_SIZE=str(world))
    pids = [fork(main, argv, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, r, world, lambda r=r: before(r))
            for r in range(world)]
    return [exit_code(pid) for pid in pids]
