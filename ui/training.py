"""What happens on the events of the Train tab: choose, start, watch, compare, put in place.

Handlers take the raw values of all inputs by component and give back what changes, by component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ui.api_types import ApiError, Visitor
from ui.client import Client
from ui.handlers import Updates, Values, View, visitor_of
from ui.run_report import charts_html, error_html, status_html
from ui.training_api import Adapter, Job, Runs
from ui.training_form import FEEDBACK, Form


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainView:
    """The tab's components."""

    form: Form
    run: gr.Dropdown
    status: gr.HTML
    pause: gr.Button
    resume: gr.Button
    cancel: gr.Button
    charts: gr.HTML
    comparison: gr.Column
    place: gr.HTML
    """Says what is compared, and which generation answers under the old name."""
    talk: View
    """Before and after, side by side."""
    put_in_place: gr.Button
    roll_back: gr.Button
    timer: gr.Timer

    @property
    def watched(self) -> list[Any]:
        """What shows a run."""
        buttons = [self.pause, self.resume, self.cancel, self.put_in_place, self.roll_back]
        shown = [self.run, self.status, self.charts, self.comparison, self.place, self.timer]
        return [*shown, *buttons, *self.talk.pickers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The events of the tab."""

    client: Client
    api_key: str | None
    view: TrainView
    key_row: gr.Row
    runs: Runs

    async def open(self, values: Values, request: gr.Request) -> Updates:
        """Read what there is to learn from, to start from, and to watch."""
        visitor, view, form = visitor_of(request, self.api_key), self.view, self.view.form
        try:
            data = await self._data(visitor)
            cards = await self.client.models(visitor.key)
            jobs = await self.runs.jobs(visitor)
        except ApiError as error:
            return self._failed(error)
        files = [(title, name) for title, name in data if not name.startswith(FEEDBACK)]
        judges = [(card.name, card.name) for card in cards if card.scores]
        # Adapters first: what starts from one goes on chatting as it does.
        starts = [(card.name, card.name) for card in cards if card.parent and not card.scores]
        starts += [
            (f"{card.name} (a fresh adapter)", card.name) for card in cards if not card.parent
        ]
        updates: Updates = {
            form.data: _choices(data, values[form.data]),
            form.validation: gr.update(choices=[("none", ""), *files]),
            form.start_from: _choices(starts, values[form.start_from]),
            form.reward_adapter: _choices(judges, values[form.reward_adapter]),
            self.key_row: gr.update(visible=False),
        }
        titles = [(job.title, job.id) for job in jobs]
        chosen = next((job for job in jobs if job.id == values[view.run]), None)
        chosen = chosen or next(iter(jobs), None)
        updates |= await self._shown(chosen, values, visitor)
        updates[view.run] = gr.update(choices=titles, value=chosen.id if chosen else None)
        return updates

    async def take_upload(self, reply: str, request: gr.Request) -> Updates:
        """The browser has sent a file to the API, or the API has refused it."""
        visitor, form = visitor_of(request, self.api_key), self.view.form
        if not reply:
            return {form.uploaded: ""}  # the visitor chose none
        file_id, _, message = reply.partition(" ")
        try:
            if not file_id.startswith("file-"):
                raise ApiError(message or "The upload failed.")
            data = await self._data(visitor)
        except ApiError as error:
            return self._failed(error) | {form.uploaded: ""}
        return {form.data: gr.update(choices=data, value=file_id), form.uploaded: ""}

    async def start(self, values: Values, request: gr.Request) -> Updates:
        """Start a run and watch it."""
        visitor = visitor_of(request, self.api_key)
        try:
            body = self.view.form.body(values)
            if body["training_file"].startswith(FEEDBACK):
                kind = body["training_file"].removeprefix(FEEDBACK)
                body["training_file"] = await self.runs.export_feedback(kind, visitor)
            job = await self.runs.create(body, visitor)
            jobs = await self.runs.jobs(visitor)
        except ValueError as error:
            return self._failed(ApiError(str(error)))
        except ApiError as error:
            return self._failed(error)
        updates = await self._shown(job, values, visitor)
        titles = [(job.title, job.id) for job in jobs]
        return updates | {self.view.run: gr.update(choices=titles, value=job.id)}

    async def watch(self, values: Values, request: gr.Request) -> Updates:
        """Show how the chosen run stands."""
        return await self._with_job(values, request, self.runs.job)

    async def pause(self, values: Values, request: gr.Request) -> Updates:
        """Have the chosen run wait."""
        return await self._act("pause", values, request)

    async def resume(self, values: Values, request: gr.Request) -> Updates:
        """Have it go on."""
        return await self._act("resume", values, request)

    async def cancel(self, values: Values, request: gr.Request) -> Updates:
        """End it for good."""
        return await self._act("cancel", values, request)

    async def put_in_place(self, values: Values, request: gr.Request) -> Updates:
        """Let the result answer under the name that the run started from."""

        async def publish(job_id: str, visitor: Visitor) -> Job:
            job = await self.runs.job(job_id, visitor)
            assert job.result is not None  # the button is shown then only
            await self.runs.put_in_place(job.result, job.model, visitor)
            return job

        return await self._with_job(values, request, publish)

    async def roll_back(self, values: Values, request: gr.Request) -> Updates:
        """Let the generation before answer again."""

        async def undo(job_id: str, visitor: Visitor) -> Job:
            job = await self.runs.job(job_id, visitor)
            await self.runs.roll_back(job.model, visitor)
            return job

        return await self._with_job(values, request, undo)

    async def _act(self, action: str, values: Values, request: gr.Request) -> Updates:
        async def act(job_id: str, visitor: Visitor) -> Job:
            return await self.runs.act(job_id, action, visitor)

        return await self._with_job(values, request, act)

    async def _with_job(self, values: Values, request: gr.Request, work: Any) -> Updates:
        visitor = visitor_of(request, self.api_key)
        try:
            job_id = values[self.view.run]
            job = await work(job_id, visitor) if job_id else None
        except ApiError as error:
            return self._failed(error)
        return await self._shown(job, values, visitor)

    async def _shown(self, job: Job | None, values: Values, visitor: Visitor) -> Updates:
        """How a run stands: words, curves, and what can be done with it."""
        view = self.view
        if job is None:
            return {view.status: status_html(None, None), view.timer: gr.update(active=False)}
        try:
            history = await self.runs.history(job.id, visitor)
            adapters = await self.runs.adapters(visitor)
        except ApiError as error:
            return self._failed(error)
        place = next((adapter for adapter in adapters if adapter.name == job.model), None)
        can_chat = job.result is not None and job.method != "reward"
        updates: Updates = {
            view.status: status_html(job, history),
            view.charts: charts_html(history),
            view.pause: gr.update(visible=not job.has_ended and not job.is_paused),
            view.resume: gr.update(visible=job.is_paused),
            view.cancel: gr.update(visible=not job.has_ended),
            view.timer: gr.update(active=not job.has_ended and not job.is_paused),
            view.comparison: gr.update(visible=can_chat),
            view.place: _place_html(job, place),
            view.put_in_place: gr.update(
                visible=can_chat and place is not None, value=f"Use it as {job.model}"
            ),
            view.roll_back: gr.update(
                visible=can_chat and _has_older(place), value=f"Roll {job.model} back"
            ),
            self.key_row: gr.update(visible=False),
        }
        if can_chat:
            updates |= self._compared(job, adapters, values)
        return updates

    def _compared(self, job: Job, adapters: Sequence[Adapter], values: Values) -> Updates:
        """Before and after in the two columns, unless the visitor has picked others."""
        titles = {a.name: f"{a.name} · gen {a.generation}" for a in adapters if not a.scores}
        titles = {job.model: job.model, str(job.result): str(job.result)} | titles
        choices = [(title, name) for name, title in titles.items()]
        before, after = self.view.talk.pickers
        if values[after] == job.result:
            return {before: gr.update(choices=choices), after: gr.update(choices=choices)}
        return {
            before: gr.update(choices=choices, value=job.model),
            after: gr.update(choices=choices, value=job.result),
        }

    async def _data(self, visitor: Visitor) -> list[tuple[str, str]]:
        """What can be learnt from: collected feedback where there is any, and files."""
        counts = await self.runs.feedback(visitor)
        titles = {
            "supervised": ("good answer", "good answers"),
            "preference": ("pair of answers", "pairs of answers"),
        }
        collected = [
            (f"Collected feedback: {count} {titles[kind][count > 1]}", FEEDBACK + kind)
            for kind, count in counts.items()
            if count
        ]
        return collected + [(file.title, file.id) for file in await self.runs.files(visitor)]

    def _failed(self, error: ApiError) -> Updates:
        return {
            self.view.status: error_html(str(error)),
            self.view.timer: gr.update(active=False),
            self.key_row: gr.update(visible=error.wants_key),
        }


def _choices(choices: Sequence[tuple[str, str]], chosen: str | None) -> Any:
    """A picker that keeps what was picked where it still exists, else takes the first."""
    names = [name for _, name in choices]
    first = names[0] if names else None
    return gr.update(choices=list(choices), value=chosen if chosen in names else first)


def _place_html(job: Job, place: Adapter | None) -> str:
    """What the comparison is about."""
    text = "Ask both, and see what the training has changed."
    if place is not None:
        text += f" <b>{escape(job.model)}</b> answers in generation {place.generation}."
    return f"<h2>Before and after</h2><p>{text}</p>"


def _has_older(adapter: Adapter | None) -> bool:
    return adapter is not None and min(adapter.generations) < adapter.generation
