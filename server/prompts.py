"""From a checked body to what the engine is asked: prompt tokens, sampling parameters, grammar.

CPU work (templates, tokenising, compiling a schema): called in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.registry import AdapterRecord
from engine.api import GrammarSpec
from engine.errors import GrammarError
from engine.grammar import check_grammar
from server.chat_template import ChatTemplate, choose_template, no_template, render
from server.errors import bad_request
from server.generation import Job
from server.message_schemas import Message
from server.sampling import (
    DEFAULT_COMPLETION_TOKENS,
    check_prompt,
    check_text,
    clamp_max_tokens,
    sampling_params,
    structure_grammar,
)
from server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.state import Lease, ServerState
from server.tool_parser import CALL_BEGIN
from server.tools import ToolPlan, plan_response_format, plan_tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """A chat request, ready to run."""

    job: Job
    plan: ToolPlan


def chat_job(
    body: ChatCompletionRequest, state: ServerState, lease: Lease, request_id: str
) -> ChatJob:
    """Prepare a chat request.

    Raises:
        ApiError, EngineError: it cannot be served as it is.
    """
    info = state.info()
    template = template_for(state, lease.adapter, body.model)
    messages = template_messages(body.messages, template)
    format_body = _dump(body.response_format)
    plan = plan_tools(
        messages,
        tools=[_dump(tool) for tool in body.tools] if body.tools else None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=format_body,
        template=template.text(with_tools=bool(body.tools)),
    )
    grammar = _one_grammar(plan.grammar, body)
    token_ids = chat_tokens(
        plan.messages,
        template,
        state,
        tools=plan.template_kwargs.get("tools"),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        add_special_tokens=body.add_special_tokens,
    )
    check_prompt(token_ids, info, "messages")
    asked = (
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    params = sampling_params(
        body,
        max_tokens=clamp_max_tokens(asked, len(token_ids), info),
        asked_max_tokens=asked,
        logprobs=(body.top_logprobs or 0) if body.logprobs or _ranks(body) else None,
        prompt_logprobs=None,
        grammar=grammar,
        info=info,
    )
    # Some models write the markers of a call as control tokens; the parser has to see them.
    tokenizer = state.tokenizer
    shows_calls = bool(plan.tool_names) and any(
        tokenizer.piece(token_id) == CALL_BEGIN.encode() for token_id in tokenizer.special_ids
    )
    job = Job(
        request_id=request_id,
        prompts=(tuple(token_ids),),
        params=(params,),
        num_choices=body.best_of or body.n or 1,
        adapter=lease.ref,
        lora_scale=1.0 if body.lora_scale is None else body.lora_scale,
        priority=body.priority or 0,
        stops=tuple(dict.fromkeys((*body.stops(), *template.stops))),
        skip_special_tokens=_or_default(body.skip_special_tokens, not shows_calls),
        continues_prompt=bool(body.continue_final_message),
    )
    return ChatJob(job=job, plan=plan)


def completion_job(
    body: CompletionRequest, state: ServerState, lease: Lease, request_id: str
) -> tuple[Job, tuple[str, ...]]:
    """Prepare a completion request.

    Returns:
        The job, and the text of each prompt (empty texts unless echo asks for them).

    Raises:
        ApiError, EngineError: it cannot be served as it is.
    """
    info, tokenizer = state.info(), state.tokenizer
    grammar = _one_grammar(plan_response_format(_dump(body.response_format)), body)
    asked = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    prompts, params, texts = [], [], []
    for prompt in body.prompts():
        token_ids = prompt if isinstance(prompt, list) else _encode(prompt, state, body)
        check_prompt(token_ids, info, "prompt")
        prompts.append(tuple(token_ids))
        params.append(
            sampling_params(
                body,
                # The engine makes at least one token; with max_tokens=0 it is thrown away.
                max_tokens=max(clamp_max_tokens(asked, len(token_ids), info), 1),
                asked_max_tokens=body.max_tokens,
                logprobs=body.logprobs
                if body.logprobs is not None
                else 0
                if _ranks(body)
                else None,
                prompt_logprobs=body.logprobs if body.echo else None,
                grammar=grammar,
                info=info,
            )
        )
        if not body.echo:
            texts.append("")
        elif isinstance(prompt, str):
            texts.append(prompt)
        else:
            texts.append(
                tokenizer.decode(
                    token_ids, skip_special_tokens=body.skip_special_tokens is not False
                )
            )
    job = Job(
        request_id=request_id,
        prompts=tuple(prompts),
        params=tuple(params),
        num_choices=body.best_of or body.n or 1,
        adapter=lease.ref,
        lora_scale=1.0 if body.lora_scale is None else body.lora_scale,
        priority=body.priority or 0,
        stops=tuple(body.stops()),
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    return job, tuple(texts)


def chat_tokens(
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
    state: ServerState,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    add_special_tokens: bool | None = None,
) -> list[int]:
    """Messages to prompt tokens.

    Raises:
        ApiError: the template refuses them, or they are far too long.
    """
    text = render(
        template,
        messages,
        special_tokens=state.tokenizer.special_tokens,
        tools=tools,
        add_generation_prompt=_or_default(add_generation_prompt, not continue_final_message),
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
    )
    check_text(text, state.tokenizer, state.info(), "messages")
    return state.tokenizer.encode(
        text, add_special_tokens=_or_default(add_special_tokens, template.adds_special_tokens)
    )


def template_messages(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """Messages as templates take them: plain dicts, text content, no role they do not know."""
    knows_developer = "developer" in template.text(with_tools=False)
    plain = plain_messages(messages)
    for fields in plain:
        if fields["role"] == "developer" and not knows_developer:
            fields["role"] = "system"
    return plain


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain dicts with text content."""
    plain = []
    for message in messages:
        fields = _dump(message) or {}
        fields["content"] = message.text()
        for name in ("refusal", "annotations"):
            fields.pop(name, None)
        plain.append(fields)
    return plain


def template_for(state: ServerState, adapter: AdapterRecord | None, model: str) -> ChatTemplate:
    """The chat template of a model.

    Raises:
        ApiError: 400, there is none.
    """
    template = choose_template(
        state.chat_template, adapter=adapter, folder_template=state.tokenizer.chat_template
    )
    if template is None:
        raise no_template(model)
    return template


def _ranks(body: ChatCompletionRequest | CompletionRequest) -> bool:
    """Whether best_of has something to choose from, by log-probability."""
    return body.reward_adapter is None and (body.best_of or 1) > (body.n or 1)


def _one_grammar(first: GrammarSpec | None, body: GenerationRequest) -> GrammarSpec | None:
    """`first`, of response_format or tools, or that of structured_outputs or guided_*."""
    second_name = body.structure_name()
    second = structure_grammar(body.structure(), second_name)
    if first is not None and second is not None:
        raise bad_request(
            f"{second_name}: cannot be combined with response_format, or with tools that need "
            f"a grammar",
            second_name,
        )
    grammar = first or second
    if grammar is not None:
        try:
            check_grammar(grammar)
        except GrammarError as error:
            error.param = error.param or ("response_format" if first else second_name)
            raise
    return grammar


def _encode(prompt: str, state: ServerState, body: CompletionRequest) -> list[int]:
    tokenizer = state.tokenizer
    check_text(prompt, tokenizer, state.info(), "prompt")
    token_ids = tokenizer.encode(
        prompt, add_special_tokens=_or_default(body.add_special_tokens, True)
    )
    if not token_ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]  # an empty prompt is the beginning of any text
    return token_ids


def _dump(model: Any) -> Any:
    return None if model is None else model.model_dump(exclude_none=True, by_alias=True)


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value
