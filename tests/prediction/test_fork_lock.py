"""A child process that is forked while another thread predicts answers as its parent does."""

import os
import threading
import time

import pytest
import torch

import sparse_ft

TEXTS = ["the weather loved", "Ada met Mozart in London", "half boring of the table"] * 4


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def exit_code(child: int, *, seconds: float = 60) -> int:
    """Wait for a process; end it if it hangs."""
    for _ in range(int(seconds / 0.05)):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_another_thread_predicts_answers_the_same(toys, two_threads):
    model = sparse_ft.load(toys, device="cpu")
    expected = model.predict(TEXTS, ["mood", "names"])
    labels = [answer.tasks["mood"]["label"] for answer in expected]
    done = threading.Event()

    def predict_on():
        while not done.is_set():
            model.predict(TEXTS, ["mood", "names"])

    thread = threading.Thread(target=predict_on)
    thread.start()
    try:
        for _ in range(2):
            time.sleep(0.03)
            child = os.fork()
            if child == 0:
                answers = model.predict(TEXTS, ["mood", "names"])
                os._exit(0 if [answer.tasks["mood"]["label"] for answer in answers] == labels else 1)
            assert exit_code(child) == 0
    finally:
        done.set()
        thread.join()
    assert model.predict(TEXTS[:3], ["mood", "names"]) == model.predict(TEXTS[:3], ["mood", "names"])
