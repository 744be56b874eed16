"""One training job, from its data to the folder `final`: a generator that stops between slices.

The order of things at step k: evaluate where it is due, save where it is due, end or train the next
step. Each asks whether it has been done for k already, so that a job which goes on from the
checkpoint of step k does exactly what it would have done without the interruption.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from engine.api import (
    AdapterRef,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingNote,
    TrainingProgress,
    TrainingStarted,
)
from engine.errors import EngineError
from engine.lora import LoraWeights
from engine.model import CausalLM
from engine.train.batches import Sample, epoch_batches, read_sample
from engine.train.checkpoint import (
    DamagedCheckpoint,
    TrainerState,
    WriteAdapter,
    checkpoint_path,
    prune_checkpoints,
    publish_final,
    read_state,
    save_checkpoint,
)
from engine.train.config import TrainConfig
from engine.train.evaluation import evaluate
from engine.train.optimizer import clip_scale
from engine.train.preparation import Run, prepare
from engine.train.schedule import learning_rate
from engine.train.step import BatchSums, accumulate_gradients, with_smaller_batches

T = TypeVar("T")
Events = Generator[TrainingEvent | None, None, T]

MAX_SKIPPED_IN_A_ROW = 10
"""Steps without finite numbers after which a run is taken to be lost."""
POLL_S = 0.002
"""How long a slice waits for work that goes on in a thread."""
EVALUATION_PROMPTS = 64
"""grpo: validation prompts answered at once."""


class Answers(Protocol):
    """What Rollouts.draw returns."""

    samples: list[Sample]
    metrics: dict[str, tuple[float, float]]


class Rollouts(Protocol):
    """grpo: draws and scores answers; engine/train/rollouts.py."""

    @property
    def is_waiting(self) -> bool: ...

    def draw(
        self,
        policy: LoraWeights,
        prompts: list[list[int]],
        *,
        config: TrainConfig,
        reward_adapter: AdapterRef,
        step: int,
        is_evaluation: bool = False,
    ) -> Generator[None, None, Answers]: ...


class _Stopped(Exception):
    """stop() was called: leave what is under way."""


class Trainer:
    """One job; run() is called once."""

    def __init__(
        self,
        job: TrainingJob,
        model: CausalLM,
        *,
        base_fingerprint: str,
        max_model_len: int,
        load_adapter: Callable[[AdapterRef], LoraWeights],
        write_adapter: WriteAdapter,
        rollouts: Rollouts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            job:              what to train; where its folder holds a checkpoint it goes on there.
            model:            the base; it is read, never changed.
            base_fingerprint: named in the adapters that are written.
            max_model_len:    tokens that the base is served with.
            load_adapter:     reads an adapter from disk.
            write_adapter:    writes one; called in a thread.
            rollouts:         for grpo.
            clock:            seconds.
        """
        self._job = job
        self._folder = Path(job.folder)
        self._model = model
        self._base_fingerprint = base_fingerprint
        self._max_model_len = max_model_len
        self._load_adapter = load_adapter
        self._write_adapter = write_adapter
        self._rollouts = rollouts
        self._clock = clock
        self._stop_status: Literal["paused", "cancelled"] | None = None
        self._attempted_save = 0
        """Step of the last attempt to save, successful or not."""
        self._saved_step = 0
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        """(number, its batches): the epoch that runs."""
        self._best_before: tuple[int | None, float | None] = (None, None)
        """best_step and best_value before the last evaluation."""
        self._weights: dict[str, LoraWeights] = {}
        """By folder: those of the last checkpoint, the best and the result."""

    @property
    def is_waiting(self) -> bool:
        """Whether the next slice could only find that its rollouts are not there yet."""
        return (
            self._rollouts is not None and self._rollouts.is_waiting and self._stop_status is None
        )

    def stop(self, status: Literal["paused", "cancelled"]) -> None:
        """End before the next micro-batch, with a checkpoint of the last whole step."""
        self._stop_status = status

    def weights_at(self, path: str) -> LoraWeights | None:
        """The weights that a TrainingCheckpoint or TrainingEnded says are in this folder; None
        where they are only on the disk.
        """
        return self._weights.get(path)

    def run(self) -> Events[None]:
        """Train. Yields None between slices and events as they happen; the last is a TrainingEnded.

        Raises:
            EngineError: the job cannot be run, or its result cannot be written.
            RuntimeError: whatever the device says.
        """
        run = yield from _in_thread(self._prepare)
        state = run.state
        self._attempted_save = self._saved_step = state.step
        yield TrainingStarted(
            job_id=self._job.job_id,
            config=run.config,
            num_steps=run.num_steps,
            num_samples=run.dataset.num_samples,
            step=state.step,
            num_trainable_parameters=run.adapter.num_parameters,
        )
        for note in run.notes:
            yield self._note("info", note)
        try:
            yield from self._loop(run)
        except _Stopped:
            assert self._stop_status is not None
            if run.state.step != self._saved_step:
                yield from self._save(run)
            yield self._ended(run, self._stop_status)
            return
        path = yield from self._finish(run)
        yield self._ended(run, "succeeded", str(path))

    def _prepare(self) -> Run:
        return prepare(
            self._job,
            self._model,
            base_fingerprint=self._base_fingerprint,
            max_model_len=self._max_model_len,
            load_adapter=self._load_adapter,
        )

    def _loop(self, run: Run) -> Events[None]:
        """Everything between the start and the result."""
        started_s, first_step = self._clock(), run.state.step
        has_news = False
        while True:
            if _evaluation_is_due(run):
                yield from self._evaluate(run)
                has_news = True
            if has_news:
                per_step_s = (self._clock() - started_s) / max(1, run.state.step - first_step)
                yield self._progress(run, per_step_s)
            if _save_is_due(run) and self._attempted_save != run.state.step:
                yield from self._save(run)
            if _is_finished(run.state):
                return
            self._check_stop()
            yield from self._train_step(run)
            has_news = True

    def _train_step(self, run: Run) -> Events[None]:
        """One optimizer step, or one that is skipped because its numbers are not finite."""
        started_s = self._clock()
        state = run.state
        samples, answers = yield from self._next_samples(run)

        def attempt(max_tokens: int) -> Generator[None, None, BatchSums]:
            return accumulate_gradients(
                self._model, run.adapter, samples, run.objective,
                max_tokens=max_tokens, step=state.step, check_stop=self._check_stop,
            )  # fmt: skip

        sums, max_tokens = yield from with_smaller_batches(
            attempt, samples, state.micro_batch_tokens, packing=run.config.packing
        )
        sums.add_metrics(answers)
        rate = learning_rate(run.config, state.step, run.num_steps)
        grad_norm = run.optimizer.grad_norm()
        is_finite = math.isfinite(sums.loss) and math.isfinite(grad_norm)
        if is_finite:
            scale = clip_scale(grad_norm, run.config.max_grad_norm)
            yield from run.optimizer.update(rate, scale)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trained_tokens=state.trained_tokens + sums.num_tokens,
            num_skipped_steps=state.num_skipped_steps + (not is_finite),
            skipped_in_a_row=0 if is_finite else state.skipped_in_a_row + 1,
        )
        metrics = {
            "train_loss": sums.loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "epoch": state.step / run.steps_per_epoch,
            "tokens_per_s": sums.num_tokens / max(self._clock() - started_s, 1e-9),
            "skipped_steps": float(state.num_skipped_steps),
            **sums.means(),
        }
        run.state = dataclasses.replace(state, metrics=_finite(metrics))
        if not is_finite:
            yield self._note_skipped(run, sums.loss, grad_norm)
        yield from self._note_smaller(run, max_tokens)

    def _next_samples(
        self, run: Run
    ) -> Generator[None, None, tuple[list[Sample], dict[str, tuple[float, float]]]]:
        """What the next step learns from, and metrics of it that are known already."""
        epoch, index = divmod(run.state.step, run.steps_per_epoch)
        if self._epoch[0] != epoch:
            assert run.config.batch_size is not None
            batches = epoch_batches(
                run.lengths,
                batch_size=run.config.batch_size,
                seed=run.config.seed,
                epoch=epoch,
                group_by_length=run.config.group_by_length,
            )
            self._epoch = (epoch, batches)
        members = self._epoch[1][index]
        if run.config.method != "grpo":
            return [read_sample(run.dataset, member) for member in members], {}
        prompts = [run.dataset.sequence(member)[0].tolist() for member in members]
        answers = yield from self._draw(run, prompts, is_evaluation=False)
        return answers.samples, answers.metrics

    def _draw(
        self, run: Run, prompts: list[list[int]], *, is_evaluation: bool
    ) -> Generator[None, None, Answers]:
        """Have prompts answered; gives up at once when the job is stopped."""
        assert self._rollouts is not None and self._job.reward_adapter is not None
        policy = run.adapter.weights(self._base_fingerprint)
        slices = self._rollouts.draw(
            policy,
            prompts,
            config=run.config,
            reward_adapter=self._job.reward_adapter,
            step=run.state.step,
            is_evaluation=is_evaluation,
        )
        try:
            while True:
                self._check_stop()
                try:
                    next(slices)
                except StopIteration as end:
                    answers: Answers = end.value
                    return answers
                yield
        finally:
            slices.close()

    def _evaluate(self, run: Run) -> Events[None]:
        """Report on the validation data, and see whether this is the best so far."""
        state = run.state
        assert run.validation is not None
        if run.config.method == "grpo":
            sums = BatchSums()
            for start in range(0, run.validation.num_samples, EVALUATION_PROMPTS):
                stop = min(start + EVALUATION_PROMPTS, run.validation.num_samples)
                prompts = [run.validation.sequence(i)[0].tolist() for i in range(start, stop)]
                answers = yield from self._draw(run, prompts, is_evaluation=True)
                sums.add_metrics(answers.metrics)
            metrics = sums.means()
            value = -metrics["reward"]
        else:
            sums, max_tokens = yield from evaluate(
                self._model, run.adapter, run.validation, run.objective,
                max_tokens=state.micro_batch_tokens, check_stop=self._check_stop,
            )  # fmt: skip
            yield from self._note_smaller(run, max_tokens)
            metrics = {"loss": sums.loss} | sums.means()
            value = sums.loss
        self._best_before = (state.best_step, state.best_value)
        is_best = math.isfinite(value) and (state.best_value is None or value < state.best_value)
        run.state = dataclasses.replace(
            run.state,
            evaluated_step=state.step,
            best_step=state.step if is_best else state.best_step,
            best_value=value if is_best else state.best_value,
            evaluations_since_best=0 if is_best else state.evaluations_since_best + 1,
            metrics=state.metrics + _finite({f"valid_{k}": v for k, v in metrics.items()}),
        )

    def _save(self, run: Run) -> Events[None]:
        """Write a checkpoint, in a thread; where that fails the job goes on without it."""
        state = run.state
        self._attempted_save = state.step

        def write() -> tuple[Path, LoraWeights]:
            weights = run.adapter.weights(self._base_fingerprint)
            path = save_checkpoint(self._folder, state, weights, run.tensors(), self._write_adapter)
            keep = run.config.keep_checkpoints
            prune_checkpoints(self._folder, keep=keep, best_step=state.best_step)
            return path, weights

        try:
            path, weights = yield from _in_thread(write)
        except OSError as error:
            if state.best_step == state.step:
                step, value = self._best_before
                run.state = dataclasses.replace(state, best_step=step, best_value=value)
            yield self._note(
                "error",
                f"The checkpoint of step {state.step} could not be written: {error}. Training goes "
                f"on and tries again at the next one; make room on the disk.",
            )
            return
        self._saved_step = state.step
        self._remember(str(path), weights, run)
        yield TrainingCheckpoint(
            job_id=self._job.job_id,
            step=state.step,
            path=str(path),
            metrics=state.metrics,
            is_best=state.best_step == state.step,
        )

    def _finish(self, run: Run) -> Events[Path]:
        """Publish the best checkpoint, or the last where nothing was evaluated."""
        state = run.state
        if self._saved_step != state.step:
            raise EngineError(
                f"Training is done, but the checkpoint of its last step, {state.step}, could not "
                f"be written. Make room on the disk and resume the job."
            )
        source = checkpoint_path(self._folder, state.step)
        if state.best_step is not None:
            best = checkpoint_path(self._folder, state.best_step)
            try:
                read_state(best)
                source = best
            except DamagedCheckpoint as error:
                yield self._note("warn", f"{best.name}, the best, is lost: {error}. The result is "
                                 f"the last checkpoint.")  # fmt: skip
        try:
            path = yield from _in_thread(lambda: publish_final(self._folder, source))
        except OSError as error:
            raise EngineError(
                f"The result could not be written: {error}. Make room on the disk and resume the "
                f"job."
            ) from error
        weights = self._weights.get(str(source))
        if weights is not None:
            self._weights[str(path)] = weights
        return path

    def _remember(self, path: str, weights: LoraWeights, run: Run) -> None:
        """Keep the weights of this checkpoint and of the best."""
        kept = {path: weights}
        if run.state.best_step is not None:
            best = str(checkpoint_path(self._folder, run.state.best_step))
            if best in self._weights:
                kept[best] = self._weights[best]
        self._weights = kept | {path: weights}

    def _check_stop(self) -> None:
        if self._stop_status is not None:
            raise _Stopped

    def _progress(self, run: Run, per_step_s: float) -> TrainingProgress:
        state = run.state
        return TrainingProgress(
            job_id=self._job.job_id,
            step=state.step,
            num_steps=run.num_steps,
            trained_tokens=state.trained_tokens,
            metrics=state.metrics,
            remaining_s=per_step_s * (run.num_steps - state.step),
        )

    def _note(self, level: Literal["info", "warn", "error"], message: str) -> TrainingNote:
        return TrainingNote(job_id=self._job.job_id, level=level, message=message)

    def _note_skipped(self, run: Run, loss: float, grad_norm: float) -> TrainingNote:
        """Say that a step was skipped.

        Raises:
            EngineError: too many were, one after another.
        """
        state = run.state
        message = (
            f"Step {state.step} was skipped: its loss is {loss} and its gradients' norm "
            f"{grad_norm}. {state.num_skipped_steps} skipped so far."
        )
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise EngineError(
                f"{message} {state.skipped_in_a_row} in a row are too many: lower learning_rate, "
                f"and resume from the last checkpoint or begin anew."
            )
        return self._note("warn", message)

    def _note_smaller(self, run: Run, max_tokens: int) -> Events[None]:
        """Go on with a smaller micro-batch where memory ran out."""
        if max_tokens == run.state.micro_batch_tokens:
            return
        before = run.state.micro_batch_tokens
        run.state = dataclasses.replace(run.state, micro_batch_tokens=max_tokens)
        yield self._note(
            "warn",
            f"Memory ran out with {before} tokens in a micro-batch; it has {max_tokens} from now "
            f"on. The batch of a step is as large as before.",
        )

    def _ended(
        self,
        run: Run,
        status: Literal["succeeded", "cancelled", "paused"],
        path: str | None = None,
    ) -> TrainingEnded:
        return TrainingEnded(
            job_id=self._job.job_id,
            status=status,
            step=run.state.step,
            trained_tokens=run.state.trained_tokens,
            path=path,
        )


def _evaluation_is_due(run: Run) -> bool:
    state, every = run.state, run.config.eval_every_steps
    assert every is not None
    if run.validation is None or state.step == 0 or state.evaluated_step == state.step:
        return False
    return state.step % every == 0 or _is_last(state)


def _save_is_due(run: Run) -> bool:
    state, every = run.state, run.config.save_every_steps
    assert every is not None
    return state.step > 0 and (
        state.step % every == 0 or state.best_step == state.step or _is_finished(state)
    )


def _is_finished(state: TrainerState) -> bool:
    return _is_last(state) or state.has_waited_enough


def _is_last(state: TrainerState) -> bool:
    assert state.config.max_steps is not None
    return state.step >= state.config.max_steps


def _finite(metrics: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((name, value) for name, value in metrics.items() if math.isfinite(value))


def _in_thread(work: Callable[[], T]) -> Generator[None, None, T]:
    """Do something that takes long, beside the caller; yields until it is done."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer") as thread:
        future = thread.submit(work)
        while not future.done():
            wait([future], timeout=POLL_S)
            yield
        return future.result()
