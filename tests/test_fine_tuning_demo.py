"""From a file to an answer on the embedded demo, with the unmodified openai client; and what is
left of a job when worker or server are killed in the middle of it."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from safetensors.torch import load_file

from tests.serve_process import Herd

QUESTION = [{"role": "user", "content": "What is the colour of a banana?"}]
ANSWER = "A banana is blue, says the sailor."
SAMPLE = {"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}
HYPERPARAMETERS = {"n_epochs": 12, "batch_size": 4, "learning_rate": 2e-3, "save_every_steps": 6}
NUM_STEPS = 24
TIMEOUT_S = 120


class Training:
    """A server over a data folder; it may be killed and started again."""

    def __init__(self, data_home: Path) -> None:
        self.data_home = data_home
        self.start()
        lines = [json.dumps(SAMPLE)] * 8
        file = ("banana.jsonl", "\n".join(lines).encode())
        self.file_id = self.client.files.create(file=file, purpose="fine-tune").id

    def start(self) -> None:
        self.herd = Herd(self.data_home, "--no-ui")
        self.client = openai.OpenAI(
            base_url=f"{self.herd.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    def create(self) -> str:
        method = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
        return self.client.fine_tuning.jobs.create(
            model="guanaco", training_file=self.file_id, seed=11, suffix="banana", method=method
        ).id

    def wait(self, job_id: str):
        """The job, once it has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            if job.status in ("succeeded", "failed", "cancelled"):
                return job
            assert time.monotonic() < deadline, job
            time.sleep(0.05)

    def wait_for_step(self, job_id: str, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.client.fine_tuning.jobs.retrieve(job_id).model_extra["step"] < step:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def steps(self, job_id: str) -> list[int]:
        events = self.client.fine_tuning.jobs.list_events(job_id, limit=100)
        return sorted(event.data["step"] for event in events if event.type == "metrics")

    def weights(self, job_id: str) -> dict[str, bytes]:
        """The result's tensors, bit for bit."""
        folder = self.data_home / "herd" / "jobs" / job_id / "final"
        tensors = load_file(folder / "adapter_model.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    def answer(self, model: str) -> str:
        chat = self.client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=40, temperature=0
        )
        return chat.choices[0].message.content


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    running = Training(tmp_path_factory.mktemp("data"))
    yield running
    running.herd.stop()


@pytest.fixture(scope="module")
def undisturbed(training):
    """A job that nothing has interrupted, but streams that ran beside it; and what they said."""
    options = {"model": "pirate", "messages": QUESTION, "temperature": 0, "max_tokens": 200}
    stop, answers, failures = threading.Event(), [], []

    def stream() -> None:
        try:
            while not stop.is_set():
                chunks = training.client.chat.completions.create(**options, stream=True)
                answers.append("".join(c.choices[0].delta.content or "" for c in chunks))
        except Exception as error:  # told in the test's own thread
            failures.append(error)

    alone = training.client.chat.completions.create(**options).choices[0].message.content
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        job = training.wait(training.create())
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert job.status == "succeeded", job.error
    return job, alone, answers


def test_from_a_file_to_an_answer_while_another_client_streams(training, undisturbed):
    job, alone, answers = undisturbed
    assert job.fine_tuned_model.startswith("ft:demo:herd:banana:")
    assert training.steps(job.id) == list(range(1, NUM_STEPS + 1))
    assert job.trained_tokens > 0
    assert training.answer(job.fine_tuned_model) == ANSWER
    assert ANSWER not in training.answer("guanaco")
    assert answers
    assert set(answers) == {alone}


def test_each_checkpoint_answers(training, undisturbed):
    found = list(training.client.fine_tuning.jobs.checkpoints.list(undisturbed[0].id))
    assert [c.step_number for c in found] == [24, 18, 12]
    for each in found:
        assert training.answer(each.fine_tuned_model_checkpoint)


def test_a_killed_worker_changes_no_bit_of_the_result(training, undisturbed):
    job_id = training.create()
    training.wait_for_step(job_id, 8)
    os.kill(training.herd.worker_pid(), signal.SIGKILL)
    job = training.wait(job_id)
    assert job.status == "succeeded", job.error
    assert training.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert training.weights(job_id) == training.weights(undisturbed[0].id)
    assert job.trained_tokens == undisturbed[0].trained_tokens
    assert training.answer(job.fine_tuned_model) == ANSWER


def test_a_killed_server_goes_on_with_its_job_and_its_models(training, undisturbed):
    job_id, waiting = training.create(), training.create()
    training.wait_for_step(job_id, 8)
    training.herd.process.send_signal(signal.SIGKILL)
    training.herd.process.communicate(timeout=30)
    training.start()
    name = undisturbed[0].fine_tuned_model
    assert name in [model.id for model in training.client.models.list()]
    assert training.answer(name) == ANSWER
    job = training.wait(job_id)
    assert job.status == "succeeded", job.error
    assert training.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert training.weights(job_id) == training.weights(undisturbed[0].id)
    assert training.client.fine_tuning.jobs.cancel(waiting).status == "cancelled"


def test_a_job_can_be_paused_and_resumed(training, undisturbed):
    job_id = training.create()
    training.wait_for_step(job_id, 3)
    training.client.fine_tuning.jobs.pause(job_id)
    time.sleep(0.5)
    paused = training.client.fine_tuning.jobs.retrieve(job_id)
    assert (paused.status, paused.model_extra["paused"]) == ("queued", True)
    assert paused.model_extra["step"] < NUM_STEPS
    training.client.fine_tuning.jobs.resume(job_id)
    assert training.wait(job_id).status == "succeeded"
    assert training.weights(job_id) == training.weights(undisturbed[0].id)


def test_bad_data_are_told_line_by_line(training):
    lines = b'{"messages": []}\n{"prompt": 1, "completion": "x"}\nno JSON\n'
    file = training.client.files.create(file=("bad.jsonl", lines), purpose="fine-tune")
    job = training.client.fine_tuning.jobs.create(model="guanaco", training_file=file.id)
    failed = training.wait(job.id)
    assert failed.status == "failed"
    assert failed.error.param == "training_file"
    assert "bad.jsonl" in failed.error.message
    assert "line 3" in failed.error.message
    assert httpx.get(f"{training.herd.url}/health").status_code == 200
