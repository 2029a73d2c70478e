"""A server under many clients, some of them rude, for a long time: what leaks, sticks or is lost.

usage: python bench/soak.py MODEL [--minutes 30] [--clients 64] [--max-queue 32] [-o OUT]

Starts `optiq serve` on MODEL. Clients in eight processes stream and do not stream, break off, send
what is wrong, read slowly, and are stopped for seconds (SIGSTOP). The server keeps 4 MB of prompts
at most, so that their growth is over early. Afterwards it must be idle, its counters must add up to
what the clients sent, and its memory must not have grown since the first third. Exit status 1 if
one of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy import stats

OPTIQ = str(Path(sys.executable).parent / "optiq")
PROCESSES = 8
STUCK_S = 180.0
SAMPLE_S = 5.0
LEAK_MB_AN_HOUR = 20.0
BAD: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"messages": "no list"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stop": [1]}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"99999999": 5}},
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "nonsense": 1}),
    ("/v1/completions", {"prompt": [[10**9]]}),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}),
    ("/v1/messages", {"max_tokens": 4, "messages": []}),
    ("/v1/nothing", {}),
]


# -- one process of clients ------------------------------------------------------------------------


async def client(url: str, chance: random.Random, end: float, tally: dict[str, int]) -> None:
    """Requests one after the other until the time is over."""
    async with httpx.AsyncClient(base_url=url, timeout=STUCK_S) as http:
        while time.monotonic() < end:
            kind = chance.choices(
                ["plain", "stream", "leave_stream", "leave", "bad", "slow"], [4, 3, 1, 0.5, 1, 0.3]
            )[0]
            try:
                outcome = await asyncio.wait_for(ask(http, kind, chance), STUCK_S)
            except TimeoutError:
                outcome = "STUCK"
            except httpx.TimeoutException:
                outcome = "STUCK"
            except httpx.HTTPError as error:
                outcome = f"BROKEN {type(error).__name__}"
            tally[f"{kind}: {outcome}"] += 1
            if outcome == "busy":
                await asyncio.sleep(chance.uniform(0.1, 1.0))


def body_of(chance: random.Random, *, stream: bool) -> dict[str, Any]:
    words = " ".join(chance.choice(["red", "blue", "four", "tree", "sum"]) for _ in range(12))
    prompt = words * chance.choice([1, 1, 1, 8])
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": chance.choice([1, 8, 24, 64]),
        "seed": chance.randrange(1000),
        "stream": stream,
    }


async def ask(http: httpx.AsyncClient, kind: str, chance: random.Random) -> str:
    """One request, and how it ended."""
    if kind == "bad":
        path, body = chance.choice(BAD)
        reply = await http.post(path, json=body)
        return "refused" if 400 <= reply.status_code < 500 else f"WRONG {reply.status_code}"
    stream = kind in {"stream", "leave_stream", "slow"}
    body = body_of(chance, stream=stream)
    if kind == "leave":
        try:
            reply = await http.post("/v1/chat/completions", json=body, timeout=0.3)
        except httpx.ReadTimeout:
            return "left"
        return ended(reply.status_code, reply.text)
    if not stream:
        reply = await http.post("/v1/chat/completions", json=body)
        return ended(reply.status_code, reply.text)
    stay = chance.randrange(1, 6) if kind == "leave_stream" else None
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        text = ""
        async for part in reply.aiter_text():
            text += part
            if kind == "slow":
                await asyncio.sleep(0.5)
            if stay is not None and text.count("data:") >= stay:
                return "left"
        return ended(reply.status_code, text, stream=True)


def ended(status: int, text: str, *, stream: bool = False) -> str:
    if status == 429:
        return "busy"
    if status != 200:
        return f"WRONG {status}"
    if not stream:
        return "done" if json.loads(text)["choices"][0]["finish_reason"] else "WRONG no end"
    if '"error"' in text:
        return "error event"
    return "done" if text.rstrip().endswith("[DONE]") else "WRONG cut off"


async def clients(url: str, count: int, seconds: float, seed: int) -> dict[str, int]:
    tally: dict[str, int] = collections.Counter()
    end = time.monotonic() + seconds
    each = [client(url, random.Random(f"{seed} {i}"), end, tally) for i in range(count)]
    await asyncio.gather(*each)
    return dict(tally)


# -- the run ---------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and those it started."""
    found = [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += family(int(path.parent.name))
    return found


def resident_mb(pid: int) -> tuple[float, float]:
    """MB of a process, and of those it started."""
    pages = [0, 0]
    for each in family(pid):
        with contextlib.suppress(OSError):
            pages[each != pid] += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    front, engine = (count * os.sysconf("SC_PAGE_SIZE") / 1e6 for count in pages)
    return front, engine


def metrics(url: str) -> dict[str, float]:
    """Values of all samples, by name and labels."""
    out = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            out[name] = float(value)
    return out


def total(values: dict[str, float], name: str) -> float:
    return sum(v for key, v in values.items() if re.fullmatch(rf"{name}(\{{.*\}})?", key))


def start_server(args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    options = ["--port", "0", "--max-queue", str(args.max_queue), "--cache-limit", "4MB"]
    command = [OPTIQ, "serve", "--model", args.model, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    for line in process.stdout:
        if found := re.search(r"http://[\d.]+:\d+", line):
            break
    else:
        raise SystemExit("the server did not start")
    log = args.log.open("w", encoding="utf-8")
    subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
    for _ in range(600):
        try:
            if httpx.get(f"{found[0]}/ready", timeout=5).status_code == 200:
                return process, found[0]
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def run_clients(args: argparse.Namespace, url: str, server: int) -> tuple[Any, Any]:
    """Tallies of the clients, and the server's memory: (seconds, MB in front, MB of engines)."""
    seconds = 60 * args.minutes
    count = str(args.clients // PROCESSES)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, args.model, "--as-client", url, "--clients", count]
            + ["--minutes", str(args.minutes), "--seed", str(args.seed + number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    chance, memory = random.Random(args.seed), []
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        memory.append((now, *resident_mb(server)))
        victim = chance.choice(processes)
        if chance.random() < 0.2 and now < seconds - 30:
            victim.send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(1, 10))
            victim.send_signal(signal.SIGCONT)
        time.sleep(SAMPLE_S)
    tally: dict[str, int] = collections.Counter()
    for process in processes:
        out, _ = process.communicate(timeout=2 * STUCK_S)
        tally.update(json.loads(out))
    return tally, np.array(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-queue", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.as_client:
        job = clients(args.as_client, args.clients, 60 * args.minutes, args.seed)
        print(json.dumps(asyncio.run(job)))
        return
    process, url = start_server(args)
    before = metrics(url)
    tally, memory = run_clients(args, url, process.pid)
    for _ in range(120):
        after = metrics(url)
        if not total(after, "optiq:num_requests_running") + total(
            after, "optiq:num_requests_waiting"
        ):
            break
        time.sleep(1)
    ready = httpx.get(f"{url}/ready", timeout=10).status_code
    process.send_signal(signal.SIGTERM)
    code = process.wait(120)
    seconds, parts, whole = memory[:, 0], memory[:, 1:], memory[:, 1:].sum(axis=1)
    late = slice(len(memory) // 3, None)
    slope = float(stats.theilslopes(whole[late], seconds[late])[0]) * 3600
    minutely = np.unique(np.searchsorted(seconds, np.arange(0, seconds[-1], 60)))
    sent = sum(tally.values())
    counted = total(after, "optiq:requests_total") - total(before, "optiq:requests_total")
    posts = {k: v - before.get(k, 0) for k, v in after.items() if 'method="POST"' in k}
    result = {
        "model": Path(args.model).name,
        "minutes": args.minutes,
        "clients": args.clients,
        "sent": sent,
        "counted_posts": total(posts, "optiq:requests_total"),
        "counted_all": counted,
        "tally": dict(sorted(tally.items())),
        "memory_mb": {
            "first": round(float(whole[0]), 1),
            "after_a_third": round(float(whole[late][0]), 1),
            "last": round(float(whole[-1]), 1),
            "slope_an_hour": round(slope, 1),
            "front_by_minute": parts[minutely, 0].round(1).tolist(),
            "engines_by_minute": parts[minutely, 1].round(1).tolist(),
        },
        "left_running": total(after, "optiq:num_requests_running"),
        "left_waiting": total(after, "optiq:num_requests_waiting"),
        "ready": ready,
        "exit_status": code,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    wrong = sum(n for what, n in tally.items() if re.search("STUCK|WRONG|BROKEN|error", what))
    sound = ready == 200 and code == 0 and not result["left_running"] + result["left_waiting"]
    sound = sound and abs(sent - result["counted_posts"]) == 0
    sys.exit(0 if sound and not wrong and slope < LEAK_MB_AN_HOUR else 1)


if __name__ == "__main__":
    main()
