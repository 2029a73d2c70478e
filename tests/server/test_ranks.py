"""`optiq serve` on two ranks of this machine."""

import asyncio
import contextlib
import time

import httpx
import pytest

from tests.ranks import said, started
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

WAIT_S = 120.0
LOST_S = 20.0  # 0.2 s on a machine that does nothing else
PROGRAM = "import sys; from optiq.cli.main import run; sys.exit(run())"
LONG = {"max_tokens": 3000, "logit_bias": {"258": -100}}


@pytest.fixture
def ranks(tmp_path):
    """Two ranks with a tiny model that are ready; the processes and the URL."""
    folder = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=100_000)
    words = ["-c", PROGRAM, "serve", "--model", str(folder), "--port", "0", "--max-running", "4"]
    with started(tmp_path, *words) as processes:
        url = processes[0].stdout.readline().strip()
        assert url, said(tmp_path, 0)
        ready = until(lambda: httpx.get(f"{url}/ready"), lambda answer: answer.status_code == 200)
        assert ready.json() == {"status": "ready"}, said(tmp_path, 0) + said(tmp_path, 1)
        yield processes, url


def until(get, right):
    """What is found when it is right, or time is up."""
    end = time.monotonic() + WAIT_S
    while not right(found := get()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def body(number, **more):
    how = {"temperature": number % 2, "seed": number, "max_tokens": 12}
    return {"model": "llama", "prompt": f"number {number} " * (1 + number), **how, **more}


async def texts(url, *bodies):
    """Answers to requests that are sent at once."""
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=each) for each in bodies)
        )
    for answer in answers:
        answer.raise_for_status()
    return [[choice["text"] for choice in answer.json()["choices"]] for answer in answers]


async def load(url):
    """Answers to the same requests at once and one by one, with others cut off between them."""
    bodies = [body(number, n=1 + number % 2) for number in range(8)]
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(3):
                long = body(number, stream=True, **LONG)
                stream = client.stream("POST", "/v1/completions", json=long)
                answer = await stack.enter_async_context(stream)
                await anext(answer.aiter_lines())
            together = asyncio.create_task(texts(url, *bodies))
            unseeded = {"model": "llama", "prompt": "x", "max_tokens": 5}
            (await client.post("/v1/completions", json=unseeded)).raise_for_status()
            embedded = await client.post("/v1/embeddings", json={"model": "llama", "input": "ab"})
            embedded.raise_for_status()
        found = await together
    return found, [(await texts(url, each))[0] for each in bodies]


def test_answers_under_load_are_those_alone(ranks):
    processes, url = ranks
    together, alone = asyncio.run(load(url))
    assert together == alone
    assert [process.poll() for process in processes] == [None, None]


def test_the_end_of_a_rank_ends_answers_and_shows(ranks):
    processes, url = ranks
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body(1, stream=True, **LONG), timeout=WAIT_S
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        processes[1].kill()
        start = time.monotonic()
        rest = list(lines)
    assert any("rank 1 of 2 has ended" in line for line in rest)
    found = until(lambda: httpx.get(f"{url}/ready"), lambda answer: answer.status_code == 503)
    assert time.monotonic() - start < LOST_S
    assert found.status_code == 503
    assert "rank 1 of 2 has ended; all have to be started again" in found.json()["reason"]
    assert httpx.get(f"{url}/health").status_code == 200
    refused = httpx.post(f"{url}/v1/completions", json=body(1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")


def test_rank_0_takes_the_others_along(ranks, tmp_path):
    processes, _ = ranks
    processes[1].terminate()  # as a signal to the whole group would
    processes[0].terminate()
    assert processes[0].wait(WAIT_S) == 0, said(tmp_path, 0)
    assert processes[1].wait(WAIT_S) == 0, said(tmp_path, 1)
    assert "rank 0 has ended" in said(tmp_path, 1)
