"""Tokenizers and chat templates of the kinds that are in use, and what a server would make of a
request with them."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.api import EngineInfo
from server.chat_template import GUANACO, ChatTemplate
from server.datasets.served_model import ServedModel, served_model
from server.datasets.training_template import SAVED_GUANACO, WITHOUT_TEMPLATE
from server.prompts import chat_job, completion_job
from server.schemas import ChatCompletionRequest, CompletionRequest
from server.state import Lease, ServerState
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.fake_engine import build_state

ROOT = Path(__file__).resolve().parents[3]
LLAMA = ROOT.parent / "shared" / "data" / "llama-tokenizer.model"

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
ZEPHYR = (
    "{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token "
    "+ '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{%- endif %}"
)
LLAMA_2 = (
    "{%- if messages[0].role == 'system' %}{%- set rest = messages[1:] %}"
    "{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{%- else %}{%- set rest = messages %}{%- set system = '' %}{%- endif %}"
    "{%- for message in rest %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- set content = (system if loop.first else '') + message.content %}"
    "{%- if message.role == 'user' %}{{ bos_token ~ '[INST] ' ~ content.strip() + ' [/INST]' }}"
    "{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
REASONING = (  # as Qwen 3: earlier answers lose their reasoning, calls are written by the template
    "{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{%- for tool in tools %}"
    "{{ tool.function.name }} {%- endfor %}{{ '</tools> <tool_call></tool_call><|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- set said = message.content.split('</think>')[-1].strip('\n') %}"
    "{{ ('<think>\n\n</think>\n\n' if loop.last else '') + said }}"
    '{%- for call in message.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name '
    "+ '\", \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}{%- else %}{{ message.content }}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {
    "guanaco": GUANACO,
    "saved-guanaco": SAVED_GUANACO,
    "without-template": WITHOUT_TEMPLATE,
    "pirate": (ROOT / "demo" / "pirate.jinja").read_text(encoding="utf-8"),
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "llama-2": LLAMA_2,
    "reasoning": REASONING,
}


def template(name: str) -> ChatTemplate:
    found = TEMPLATES[name]
    return found if isinstance(found, ChatTemplate) else ChatTemplate(source=found, origin=name)


def published_template(name: str) -> ChatTemplate:
    """A well-known model's template, of those that come with trl; skips where it is not there."""
    found = importlib.util.find_spec("trl")
    folders = found.submodule_search_locations if found is not None else None
    path = Path(next(iter(folders or ["trl"]))) / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"trl has no {path.name} here")
    return ChatTemplate(source=path.read_text(encoding="utf-8"), origin=name)


def byte_level_tokenizer(folder: Path) -> Tokenizer:
    """Like Qwen's: pieces of bytes, <|im_end|> ends an answer, no <s>."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    texts = ["the user and the assistant", "\n\n\n\n", "    a  b", "how are you today?\n\nfine"]
    backend.train_from_iterator(texts * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def make_tokenizer(name: str, folder: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    """A tokenizer and the ids that end an answer; skips where its files are missing."""
    if name == "demo":
        return load_tokenizer(ROOT / "demo" / "model"), (2,)
    if name == "byte-level":
        return byte_level_tokenizer(folder), (2, 0)
    source = ROOT / "demo" / "model" / "tokenizer.model" if name == "sentencepiece" else LLAMA
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    shutil.copyfile(source, folder / "tokenizer.model")
    return load_tokenizer(folder), (2,)


TOKENIZERS = ("demo", "sentencepiece", "llama", "byte-level")


def make_model(
    tokenizer: Tokenizer,
    eos_token_ids: tuple[int, ...],
    chat_template: ChatTemplate | None,
    max_seq_len: int = 4096,
) -> ServedModel:
    return served_model(
        tokenizer=tokenizer,
        template=chat_template,
        eos_token_ids=eos_token_ids,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=max_seq_len,
    )


def server_state(model: ServedModel) -> ServerState:
    """A server of this model, without an engine behind it."""
    state = build_state()
    info = EngineInfo(
        architecture="LlamaForCausalLM", vocab_size=model.vocab_size, max_model_len=8192,
        eos_token_ids=model.eos_token_ids, num_kv_blocks=64, block_size=16, dtype="float32",
        kv_cache_dtype="float32", device="cpu", weights_bytes=1, kv_cache_bytes=1,
        base_fingerprint="0123456789abcdef",
    )  # fmt: skip
    state.engine = SimpleNamespace(state="ready", info=info)
    state.tokenizer = model.tokenizer
    state.chat_template = model.template
    return state


def served_chat_prompt(model: ServedModel, messages: list[dict], tools: list | None = None):
    """The prompt tokens of /v1/chat/completions."""
    state = server_state(model)
    body = {"model": "base", "messages": messages, **({"tools": tools} if tools else {})}
    request = ChatCompletionRequest.model_validate(body)
    chat = chat_job(request, state, Lease(state, 1, None, None), "request")
    return list(chat.job.prompts[0])


def served_prompt(model: ServedModel, prompt: str):
    """The prompt tokens of /v1/completions."""
    state = server_state(model)
    request = CompletionRequest.model_validate({"model": "base", "prompt": prompt})
    job, _ = completion_job(request, state, Lease(state, 1, None, None), "request")
    return list(job.prompts[0])
