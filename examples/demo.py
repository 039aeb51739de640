"""`make demo`: compress the bundled model at 60 %, serve it with vLLM, ask it a completion and a chat.

Every step is the command a user would type. Output goes to build/demo; the server is gone when this ends,
however it ends.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import language_reference
from openai import OpenAI

from offline.compare.server import Server, ServerError

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "tiny-mixtral"
BUILD = ROOT / "build" / "demo"
RATIO = "0.6"
WINDOWS, SEQ_LEN = "64", "256"


def say(text: str = "") -> None:
    print(text, flush=True)


def d2moe(*arguments: str | Path) -> dict[str, Any]:
    """Run the command, showing it and its progress; returns its JSON."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) and a.is_relative_to(ROOT) else str(a) for a in arguments]
    say(f"$ d2moe {' '.join(shown)}")
    command = [str(Path(sys.executable).with_name("d2moe")), *shown, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"demo: the command above failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def compress() -> Path:
    calibration, held_out = language_reference.write(BUILD / "texts")
    out = BUILD / "tiny-mixtral-d2-60"
    shutil.rmtree(out, ignore_errors=True)
    given = ("--calibration", calibration, "--windows", WINDOWS, "--seq-len", SEQ_LEN)
    d2moe("compress", SOURCE, out, "--ratio", RATIO, *given)
    after = d2moe("inspect", out)
    before = after["source"]
    quality = [d2moe("eval", folder, "--text", held_out, "--seq-len", SEQ_LEN) for folder in (SOURCE, out)]
    say()
    say(f"{'':24}{'before':>14}{'after':>14}")
    say(f"{'parameters':24}{before['parameters']:>14,}{after['parameters']:>14,}")
    say(f"{'bytes on disk':24}{before['bytes']:>14,}{after['bytes']:>14,}  ({100 * after['stored_ratio']:.1f} % gone)")
    say(f"stored: {after['stores']}")
    say(f"{'perplexity, in-domain':24}" + "".join(f"{q['perplexity']:>14.2f}" for q in quality))
    say("(topics of Python's language reference that calibration did not see: the domain it was calibrated on)")
    say()
    return out


def ask(server: Server, model: Path, prompt: str, question: str, tokens: int = 40) -> tuple[str, str]:
    """A completion and an answer, both the likeliest, which are also said."""
    client = OpenAI(base_url=server.base_url, api_key="none")
    completion = client.completions.create(model=str(model), prompt=prompt, max_tokens=tokens, temperature=0)
    say(f"completion  {prompt!r}")
    say(f"        ->  {completion.choices[0].text!r}")
    chat = client.chat.completions.create(
        model=str(model), messages=[{"role": "user", "content": question}], max_tokens=tokens, temperature=0
    )
    answer = chat.choices[0].message.content or ""
    say(f"chat        {question!r}")
    say(f"        ->  {answer!r}")
    return completion.choices[0].text, answer


def serve(out: Path) -> None:
    started = time.monotonic()
    log = BUILD / "server.log"
    arguments = ["--max-model-len", "512"]
    server = Server(out, arguments, log=log, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    say(f"$ vllm serve {out.relative_to(ROOT)} --trust-remote-code {' '.join(arguments)}")
    say(f"  (log in {log.relative_to(ROOT)}; a start takes one to two minutes on two cores)")
    with server:
        say(f"  answering after {time.monotonic() - started:.0f} s")
        say()
        ask(server, out, "The `for` statement is used to", "What is a Python list?")
        say("(a model of 4 M parameters: it has the form of English, not the sense)")
    say()
    say("server stopped")


def main() -> None:
    # A plain `kill` must run the `with` block's end as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # And Ctrl-C must work where a script started us in the background, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serve(compress())
    except ServerError as error:
        raise SystemExit(f"demo: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("demo: interrupted") from None


if __name__ == "__main__":
    main()
