"""A stand-in for the API: its wire shapes, answers by script, a record of what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.ui.fake_training import FakeTraining

LONG_ANSWER = [f"word{i} " for i in range(4000)]


@dataclass
class FakeApi:
    """The last message decides what happens: "slow", "fail", "break", "long", or a plain echo."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    response_ids: list[str] = field(default_factory=list)
    """Of chats; "<model>-<number>"."""
    judgements: list[dict[str, Any]] = field(default_factory=list)
    training: FakeTraining = field(default_factory=FakeTraining)
    num_disconnects: int = 0
    num_running: int = 0
    max_running: int = 0
    required_key: str | None = None
    is_ready: bool = True

    def reset(self) -> None:
        """Forget what was asked, and be an open, ready server again."""
        training = self.training  # whose routes are served
        vars(training).update(vars(FakeTraining()))
        vars(self).update(vars(FakeApi(training=training)))

    def build(self) -> FastAPI:
        """The API's app, ready for the page to be mounted."""
        app = FastAPI()
        app.add_api_route("/health", self.health)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        app.add_api_route("/v1/feedback", self.judge, methods=["POST"])
        self.training.add_routes(app)
        return app

    async def health(self) -> Response:
        if not self.is_ready:
            return error(503, "The model is being loaded (weights 1/3).", "engine_loading")
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        base = {"id": "herd-demo", "object": "model", "parent": None, "max_model_len": 512}
        names = self.training.generations if self.is_ready else ()
        cards = [
            base
            | {
                "id": name,
                "parent": "herd-demo",
                "generation": self.training.current[name],
                "has_score_head": name in self.training.judges,
            }
            for name in names
        ]
        return JSONResponse({"object": "list", "data": [base, *cards]})

    async def chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "herd-demo":
            return error(400, "The model herd-demo has no chat template.", "no_chat_template")
        text = body["messages"][-1]["content"]
        if text == "fail":
            return error(503, "The engine is restarting.", "engine_restarting")
        if text == "long":
            return error(
                400,
                "The prompt has 900 tokens, but this model holds 512.",
                "context_length_exceeded",
            )
        words = (
            LONG_ANSWER if text in ("slow", "burst") else f"{body['model']} says: {text}".split(" ")
        )
        response_id = f"{body['model']}-{len(self.response_ids)}"
        self.response_ids.append(response_id)
        return self._stream(
            body["model"],
            words,
            text,
            lambda word: {"delta": {"content": word}},
            id=response_id,
        )

    async def complete(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        words = ["and", "so", "on"]
        return self._stream(body["model"], words, body["prompt"], lambda word: {"text": word})

    async def judge(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        if body["response_id"] not in self.response_ids:
            return error(404, "No such response is remembered.", "response_not_found")
        self.judgements.append(body)
        return JSONResponse({"object": "feedback", **body})

    def _refusal(self, request: Request) -> JSONResponse | None:
        wanted = f"Bearer {self.required_key}"
        if self.required_key and request.headers.get("authorization") != wanted:
            return error(401, "The API key is not valid here.", "invalid_api_key")
        return None

    def _stream(self, model, words, text, choice, **envelope) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            self.num_running += 1
            self.max_running = max(self.max_running, self.num_running)
            is_finished = False
            try:
                for i, word in enumerate(words):
                    if text == "break" and i == 2:
                        yield sse(
                            {
                                "error": {
                                    "message": "The engine worker died.",
                                    "code": "engine_restarting",
                                }
                            }
                        )
                        is_finished = True
                        return
                    spaced = word if text == "slow" or i == 0 else " " + word
                    yield sse(
                        {
                            **envelope,
                            "choices": [{"index": 0, **choice(spaced), "finish_reason": None}],
                        }
                    )
                    if text == "cut":
                        return
                    if text == "garbage":
                        yield "data: {not json\n\n"
                    if text == "burst" and i == 1999:
                        break
                    await asyncio.sleep(0 if text == "burst" else 0.01)
                yield sse({"choices": [{"index": 0, **choice(""), "finish_reason": "stop"}]})
                yield sse(
                    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(words)}}
                )
                yield "data: [DONE]\n\n"
                is_finished = True
            finally:
                self.num_running -= 1
                self.num_disconnects += not is_finished

        headers = {"X-Herd-Adapter-Generation": "4"} if model != "herd-demo" else {}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def error(status: int, message: str, code: str) -> Response:
    body = {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    }
    return JSONResponse(
        body, status_code=status, headers={"retry-after": "2"} if status == 503 else {}
    )
