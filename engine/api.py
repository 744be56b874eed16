"""Messages between the HTTP process and the engine worker: frozen data, no torch, no text.

Token ids cross this border, text does not. Requests and commands go in; step outputs and replies
come out. Every accepted GenerateRequest ends in exactly one RequestDelta with a finish_reason.

What is sent with every step has no slots: a frozen class with slots is pickled field by field in
Python, which takes twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.train.config import TrainConfig

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An EngineError as data: `code` is stable and machine-readable, `message` is for people."""

    code: str
    message: str
    param: str | None = None
    """The request parameter at fault, where one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One published generation of one adapter. Two refs are the same weights exactly when they are
    equal."""

    uid: int
    """Never reused while the server runs; names are, uids are not."""
    generation: int
    name: str
    path: str
    """Folder in PEFT format that nobody changes while this generation lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """What the output must match; compiled in the worker, checked before a request is accepted."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    source: str = ""
    """JSON Schema text, regular expression or Lark grammar; empty for json_object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked where requests enter the server; the engine trusts
    them."""

    max_tokens: int
    """Upper limit of generated tokens, at least 1; already clamped to the model's length."""
    min_tokens: int = 0
    """Until so many tokens are generated, eos and stop_token_ids cannot be chosen."""
    temperature: float = 1.0
    """0 means greedy: the largest logit, the lowest token id among equals."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Acts on prompt and output tokens, as in transformers; the two above on output tokens, as in
    OpenAI's API."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, amount added to its logit)."""
    seed: int | None = None
    """None: the engine draws one. The token at a position depends on seed, position and logits
    only."""
    stop_token_ids: tuple[int, ...] = ()
    """End the text besides the model's eos tokens; the stop token itself is reported in the last
    delta."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report each token's log-probability and those of this many most likely tokens; None: no
    report."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (the first has none). Such a request reads no prefix
    cache."""
    grammar: GrammarSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Continue a prompt, or score it with the adapter's reward head."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterRef | None = None
    """None: the base model."""
    lora_scale: float = 1.0
    """Multiplies the adapter's effect: 0 is the base, 1 the adapter as trained."""
    priority: int = 0
    """Lower runs earlier, as in vLLM; equals in order of arrival."""
    task: Literal["generate", "score"] = "generate"
    """score: run the prompt once and report the adapter's score head at its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    """Free the request within one step; it still ends in one final delta, finish_reason
    "cancelled"."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """Read, check and place an adapter before it is published; answered by one AdapterReply."""

    command_id: int
    ref: AdapterRef
    pinned: bool = False
    """A pinned adapter keeps its pool row until it is unloaded."""
    from_training: str | None = None
    """Folder that a TrainingCheckpoint or TrainingEnded has named: take those weights from the
    trainer's memory where they are still there (ref.path names the same weights on disk)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapter:
    """Forget a generation once no request uses it; answered by one AdapterReply."""

    command_id: int
    ref: AdapterRef


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One adapter to train, or to go on training: a job whose folder holds a checkpoint resumes."""

    job_id: str
    folder: str
    """The job's own: checkpoint-<step> folders are written here, and `final` at the end."""
    data_path: str
    """Tokens and loss weights, as engine/train/token_dataset.py stores them."""
    validation_path: str | None = None
    config: TrainConfig = field(default_factory=TrainConfig)
    start_from: AdapterRef | None = None
    """Adapter whose weights training begins with; None: a fresh one."""
    reference: AdapterRef | None = None
    """dpo and grpo: the frozen adapter to stay close to; None: the base."""
    reward_adapter: AdapterRef | None = None
    """grpo: who scores the answers."""
    chat_template: str | None = None
    """Of the prompts that it learns to answer, kept beside the adapter; None: the base's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTraining:
    """Train while serving; answered by TrainingEvents, the last one a TrainingEnded. One job runs
    at a time."""

    job: TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTraining:
    """End a job before its next micro-batch, with a checkpoint of the last whole step; it still
    ends in one TrainingEnded."""

    job_id: str
    status: Literal["paused", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Stop the worker; requests still running end as cancelled."""


Command = (
    GenerateRequest
    | CancelRequest
    | LoadAdapter
    | UnloadAdapter
    | StartTraining
    | StopTraining
    | Shutdown
)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token under the model (before temperature, penalties and masks)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first: (token id, logprob)."""


@dataclass(frozen=True, kw_only=True)
class RequestDelta:
    """What one step added to one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry per token id, where the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """In the first delta only, one entry per prompt token, where asked for."""
    num_cached_tokens: int = 0
    """In the first delta: prompt tokens taken from the prefix cache."""
    queued_s: float = 0.0
    """In the first delta: seconds from arrival in the worker to the first scheduled step."""
    score: float | None = None
    """The answer to task "score", in its final delta."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The eos or stop token that ended the text; it is also the last of token_ids."""
    error: ErrorInfo | None = None
    """Set exactly when finish_reason is "error"."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters and gauges at the end of a step; counters only grow while the worker lives."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of KV blocks held by running sequences, 0..1."""
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    step_s: float = 0.0
    num_step_tokens: int = 0
    resident_adapters: tuple[tuple[int, int], ...] = ()
    """(uid, generation) of each adapter in a pool row."""
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    adapter_load_s: float = 0.0
    """Seconds spent reading and placing adapters, in total."""
    num_drafts: int = 0
    """Times that tokens were guessed for a sequence."""
    num_draft_tokens: int = 0
    """Tokens guessed."""
    num_accepted_tokens: int = 0
    """Tokens guessed that became part of a text."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Everything one step has to say, in one message."""

    deltas: tuple[RequestDelta, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReply:
    """Answer to LoadAdapter or UnloadAdapter."""

    command_id: int
    error: ErrorInfo | None = None
    load_s: float = 0.0
    num_bytes: int = 0
    """Memory that the adapter takes in a pool row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStarted:
    """A job runs: what was chosen for it."""

    job_id: str
    config: TrainConfig
    """Every field that was None is filled in."""
    num_steps: int
    num_samples: int
    step: int = 0
    """Optimizer steps done before: 0, or where a resumed job goes on."""
    num_trainable_parameters: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """One optimizer step is done."""

    job_id: str
    step: int
    num_steps: int
    trained_tokens: int
    """Since the job began, over all epochs."""
    metrics: tuple[tuple[str, float], ...]
    """train_loss, learning_rate, grad_norm, tokens_per_s and the method's own."""
    remaining_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCheckpoint:
    """A checkpoint is on disk, complete. That which a job goes on from is told again."""

    job_id: str
    step: int
    path: str
    """PEFT folder; the trainer's own state lies in it besides."""
    metrics: tuple[tuple[str, float], ...]
    """Those of the step, and valid_ ones where there was an evaluation."""
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNote:
    """Something that the job's owner should know: a skipped step, a halved micro-batch."""

    job_id: str
    level: Literal["info", "warn", "error"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEnded:
    """The last word on a job, until it is started again."""

    job_id: str
    status: Literal["succeeded", "failed", "cancelled", "paused"]
    step: int = 0
    trained_tokens: int = 0
    path: str | None = None
    """succeeded: the PEFT folder of the result (the best checkpoint, else the last)."""
    error: ErrorInfo | None = None
    """Set exactly when the status is "failed"."""


TrainingEvent = (
    TrainingStarted | TrainingProgress | TrainingCheckpoint | TrainingNote | TrainingEnded
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """Start-up progress of the worker, for the console and for /health while loading."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingProgress:
    """The worker begins to record a decode step as a graph, or has ended, well or not."""

    num_recorded: int
    num_sizes: int
    """How many there may be: each is recorded when a batch first needs it, some perhaps never."""
    is_recording: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Sent once, when the worker is ready to take requests."""

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    dtype: str
    kv_cache_dtype: str
    device: str
    weights_bytes: int
    kv_cache_bytes: int
    base_fingerprint: str
    """Hash of the quantised base; adapters that name another are refused."""
    load_s: float = 0.0
    quantization: str = "nf4"
    memory: tuple[tuple[str, int], ...] = ()
    """What takes the device's memory, or is kept free for it, in bytes by name."""
    notes: tuple[str, ...] = field(default=())
    """Lines for the operator: where a quantised copy was cached, which kernels fell back and
    why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailed:
    """The worker cannot start or go on; it exits after this message."""

    error: ErrorInfo


Reply = (
    StepOutput
    | AdapterReply
    | TrainingEvent
    | LoadProgress
    | RecordingProgress
    | EngineInfo
    | WorkerFailed
)
