"""Runs inside a rehearsed server image, on its own Python: starts the server, looks at it, asks it to stop.

Arguments: the server's command line; the health check's command as JSON in HEALTHCHECK. What was seen goes to standard
output as one JSON object. Standard library only, since the image has nothing else that is ours.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

SERVER = "http://127.0.0.1:8000"


def ask(path: str, body: dict | None = None, key: str | None = None) -> tuple[int, str]:
    """(status, body) of one request."""
    request = urllib.request.Request(SERVER + path, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def healthy() -> bool:
    return subprocess.run(json.loads(os.environ["HEALTHCHECK"]), capture_output=True, check=False).returncode == 0


def main(command: list[str]) -> dict:
    started = time.monotonic()
    server = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    seen: dict = {"healthy_before": healthy()}
    try:
        while not healthy():
            if server.poll() is not None or time.monotonic() > started + 1200:
                return {**seen, "exit": server.poll(), "died": True}
            time.sleep(1)
        seen["seconds_to_start"] = round(time.monotonic() - started)
        key = os.environ["VLLM_API_KEY"]
        name = json.loads(ask("/v1/models", key=key)[1])["data"][0]["id"]
        prompt = {"model": name, "prompt": "The for statement", "max_tokens": 8, "temperature": 0}
        seen["without_key"] = ask("/v1/completions", prompt)[0]
        seen["completion"] = ask("/v1/completions", prompt, key)
        seen["info"] = ask("/v1/d2moe/info", key=key)
        time.sleep(3)  # workers write their counters every 2 seconds
        seen["metrics"] = ask("/metrics")
        # Asked to stop while it answers: the request is to come to its end first.
        long = {**prompt, "max_tokens": 400, "ignore_eos": True}
        late: list[tuple[int, str]] = []
        asking = threading.Thread(target=lambda: late.append(ask("/v1/completions", long, key)))
        asking.start()
        time.sleep(0.5)
        seen["running_at_sigterm"] = asking.is_alive()
        server.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        asking.join(60)
        seen["request_at_sigterm"] = late
        seen["exit"] = server.wait(60)
        seen["seconds_to_stop"] = round(time.monotonic() - stopped, 1)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
