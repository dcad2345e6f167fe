#!/usr/bin/env python3
"""Shows Keyward at work: a real Envoy, a stand-in for an LLM behind it, and real requests.

Run it with `make demo`. Only the standard library; everything listens on loopback, lives in a temporary folder and is
stopped at the end, also after Ctrl-C or a failure. Exits 1 when an answer is not what it should be.
"""

import argparse
import contextlib
import ctypes
import http.client
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds that anything here may take to start or to happen
CHAT = "/v1/chat/completions"


class Failure(Exception):
    """Something is not as it should be; the text says what."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keyward", default=ROOT / "target/debug/keyward", help="the keyward binary")
    parser.add_argument("--envoy", default=os.environ.get("KEYWARD_ENVOY", ROOT / ".tools/envoy"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with contextlib.ExitStack() as stack:
            show(Demo(stack, options))
    except (Failure, OSError, subprocess.TimeoutExpired) as failure:
        print(f"\n{paint('31', 'demo failed:')} {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; all stopped", file=sys.stderr)
        return 130
    return 0


def show(demo):
    """The story, top to bottom."""
    title("Setting up")
    demo.start()
    step("keyward (SQLite), Envoy and a stand-in for an LLM are up", f"ready in {demo.ready_ms:.0f} ms")
    demo.cli("user", "create", "--username", "ada", "--email", "ada@example.com")
    key = demo.create_key("demo", "--allowed-models", "gpt-4o*,claude-*", "--rate-limit-per-minute", "60")
    secret = key["key"]
    step("keyward key create --user ada --name demo", f"{secret[:8]}… (shown once)")

    title("Who gets in")
    status, reason, _ = demo.chat()
    step("no key", says(status, reason), (status, reason) == (401, "missing_credentials"))
    # The service that Keyward replaces cached by prefix alone and let this one in.
    wrong = with_checksum(secret[:8] + "".join("a" if letter != "a" else "b" for letter in secret[8:-7]))
    status, reason, _ = demo.chat(wrong)
    step("a wrong key with the right first 8 characters", says(status, reason), (status, reason) == (401, "invalid_api_key"))
    status, _, answer = demo.chat(secret, {"x-keyward-user-id": "1000", "x-keyward-superuser": "true"})
    step("the key", f"{status} {answer}", status == 200)
    status, reason, _ = demo.chat(wrong)
    step("the wrong key again, now that the right one is remembered", says(status, reason), (status, reason) == (401, "invalid_api_key"))

    title("What the upstream saw")
    seen = demo.upstream.last_headers
    step("authorization", "removed: the key stays here", "authorization" not in seen)
    for name, sent, expected in [("user-id", "1000", "1"), ("superuser", "true", "false")]:
        got = seen.get(f"x-keyward-{name}", "(absent)")
        step(f"x-keyward-{name}", f"{got} (the caller claimed {sent})", got == expected)
    for name, expected in [("allowed-models", "gpt-4o*,claude-*"), ("rate-limit-minute", "60")]:
        got = seen.get(f"x-keyward-{name}", "(absent)")
        step(f"x-keyward-{name}", got, got == expected)

    title("What it costs")
    before = demo.metric("keyward_bcrypt_duration_seconds_count")
    began = time.monotonic()
    answers = [demo.chat(secret)[0] for _ in range(200)]
    each_ms = (time.monotonic() - began) * 1000 / len(answers)
    more = demo.metric("keyward_bcrypt_duration_seconds_count") - before
    step("200 more requests with the key", f"{answers.count(200)} × 200, {each_ms:.1f} ms each, all told", answers.count(200) == 200)
    step("bcrypt runs for them", f"{more:.0f} (the proof is remembered, the decision is not)", more == 0)
    hits = demo.metric("keyward_cache_requests_total", result="hit", tier="memory")
    step("answers from memory (keyward cache stats has more)", f"{hits:.0f}", hits > 0)
    demo.cli("cache", "stats")

    title("What a key may do")
    narrow = demo.create_key("embeddings only", "--allowed-endpoints", "POST /v1/embeddings")
    status, reason, _ = demo.chat(narrow["key"])
    step(f"a key for /v1/embeddings asks for {CHAT}", says(status, reason), (status, reason) == (403, "endpoint_not_allowed"))
    status, reason, answer = demo.chat(secret, model="o3-pro")
    step("a model that is not on the key's list", f"{says(status, reason)}: {answer}", (status, reason) == (403, "model_not_allowed"))
    status, reason, _ = demo.chat(secret, model="gpt-4o", more=',"model":"o3-pro"')
    step("the same model, named behind one that is", says(status, reason), (status, reason) == (400, "ambiguous_request"))
    spent = demo.create_key("nothing left", "--budget-limit-cents", "0")
    status, reason, _ = demo.chat(spent["key"])
    step("a key whose budget is used up", says(status, reason), (status, reason) == (402, "insufficient_quota"))
    demo.cli("key", "revoke", str(key["id"]))
    began = time.monotonic()
    status, reason, requests = 200, "", 0
    while status == 200 and time.monotonic() - began < PATIENCE:
        status, reason, _ = demo.chat(secret)
        requests += 1
        time.sleep(0.005)
    took = time.monotonic() - began
    step(f"keyward key revoke {key['id']}", f"{says(status, reason)}, {took * 1000:.0f} ms later", (status, reason) == (401, "key_inactive"))
    print()
    print(f"  All as it should be. {demo.upstream.requests} requests reached the upstream, none of them refused ones.")
    if demo.upstream.requests != 201 + requests - 1:
        raise Failure(f"{201 + requests - 1} requests were let in, {demo.upstream.requests} reached the upstream")


class Demo:
    """The three processes and what can be asked of them."""

    def __init__(self, stack, options):
        self.stack = stack
        self.keyward = str(options.keyward)
        self.envoy = str(options.envoy)
        for binary in (self.keyward, self.envoy):
            if not os.access(binary, os.X_OK):
                raise Failure(f"{binary} can't be executed; run this with: make demo")
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keyward-demo-")))
        self.store = f"sqlite:{self.folder / 'keyward.db'}"
        self.grpc, self.admin, self.envoy_admin, self.port = free_ports(4)
        self.upstream = Upstream(stack)
        # Settings of the person who runs this must not leak in.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYWARD_")}

    def start(self):
        began = time.monotonic()
        keyward = self.launch(
            self.keyward, "serve", "--store", self.store,
            "--grpc-listen", f"127.0.0.1:{self.grpc}", "--admin-listen", f"127.0.0.1:{self.admin}", "--drain-delay", "0s",
            # bcrypt on a machine that is busy building may take longer than the default allows.
            "--check-timeout", "450ms",
        )  # fmt: skip
        self.await_ready(keyward, self.admin, "/readyz")
        self.ready_ms = (time.monotonic() - began) * 1000
        config = (ROOT / "envoy/envoy.yaml").read_text()
        for shipped, ours in [(10000, self.port), (9901, self.envoy_admin), (9191, self.grpc), (8000, self.upstream.port)]:
            if config.count(f"port_value: {shipped}}}") != 1:
                raise Failure(f"envoy/envoy.yaml should name port {shipped} once")
            config = config.replace(f"port_value: {shipped}}}", f"port_value: {ours}}}")
        path = self.folder / "envoy.yaml"
        path.write_text(config)
        envoy = self.launch(self.envoy, "-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
        self.await_ready(envoy, self.envoy_admin, "/ready")

    def launch(self, *command):
        """Starts a process that ends with this one, whatever happens; its output goes to a file."""
        log = self.folder / f"{pathlib.Path(command[0]).name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder, env=self.environment,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        process.log = log
        self.stack.callback(stop, process)
        return process

    def await_ready(self, process, port, path):
        answer = "no answer"
        for _ in patiently():
            if process.poll() is not None:
                answer = f"it exited with {process.returncode}"
                break
            try:
                status, _, body = get(port, path)
            except OSError:
                continue
            if status == 200:
                return
            answer = f"{status} {body.strip()}"
        tail = "\n".join(process.log.read_text(errors="replace").splitlines()[-15:])
        raise Failure(f"{process.args[0]} is not ready: {answer}\n{tail}")

    def cli(self, *arguments):
        """Runs a keyward command against the demo's store, or its running sidecar."""
        where = ["--admin-listen", f"127.0.0.1:{self.admin}"] if arguments[0] == "cache" else ["--store", self.store]
        done = subprocess.run(
            [self.keyward, *arguments, *where],
            capture_output=True, text=True, timeout=PATIENCE, cwd=self.folder, env=self.environment,
        )  # fmt: skip
        if done.returncode != 0:
            raise Failure(f"keyward {' '.join(arguments)} exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def create_key(self, name, *rights):
        key = json.loads(self.cli("key", "create", "--user", "ada", "--name", name, *rights, "--output", "json"))
        if not {"id", "key"} <= key.keys():
            raise Failure(f"key create printed {sorted(key)}, without id and key")
        return key

    def chat(self, key=None, headers=(), model="gpt-4o-mini", more=""):
        """One request through Envoy: status, reason of a denial, what the model or the denial said."""
        messages = json.dumps([{"role": "user", "content": "Hello!"}])
        body = f'{{"model":{json.dumps(model)},"messages":{messages}{more}}}'
        sent = {"content-type": "application/json", **dict(headers)}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        status, answered, text = post(self.port, CHAT, body, sent)
        reason = answered.get("x-keyward-reason", "")
        answer = json.loads(text)
        spoken = answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]["message"]
        return status, reason, spoken

    def metric(self, name, **labels):
        """The sum of the series of that name that carry these labels."""
        _, _, text = get(self.admin, "/metrics")
        found = re.findall(rf"^{name}(?:\{{(.*)\}})? ([0-9.eE+-]+)", text, re.MULTILINE)
        if not found and name.rsplit("_", 1)[0] not in text:
            raise Failure(f"there is no metric {name}")
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for label, value in found if all(part in label for part in wanted))


class Upstream:
    """Answers like a chat completion API and remembers what it was sent."""

    def __init__(self, stack):
        self.last_headers = {}
        self.requests = 0
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                upstream.requests += 1
                upstream.last_headers = {name.lower(): value for name, value in self.headers.items()}
                message = {"role": "assistant", "content": "Hello from the model."}
                answer = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
                body = json.dumps(answer).encode()
                # In one piece: two small writes would wait for each other's acknowledgement.
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self._headers_buffer.append(b"\r\n" + body)
                self.flush_headers()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)


def with_checksum(text):
    """A key that is not mistyped, and wrong all the same: its last characters fit (see src/domain/key_format.rs)."""
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    rest, checksum = zlib.crc32(text.encode()), ""
    for _ in range(6):
        rest, place = divmod(rest, 58)
        checksum = alphabet[place] + checksum
    return f"{text}_{checksum}"


def get(port, path):
    return exchange(port, "GET", path, None, {})


def post(port, path, body, headers):
    return exchange(port, "POST", path, body, headers)


def exchange(port, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    except http.client.HTTPException as error:
        raise Failure(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()


def free_ports(count):
    """Ports that are free now; held until all are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def patiently():
    """Yields until PATIENCE is used up, often at first."""
    end, pause = time.monotonic() + PATIENCE, 0.005
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)


def die_with_parent():
    """In the child: ask the kernel to end it when this script is killed in a way that runs no clean-up."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process):
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def title(text):
    print(f"\n{paint('1', text)}")


def step(what, outcome, is_right=True):
    mark = paint("32", "✓") if is_right else paint("31", "✗")
    print(f"  {mark} {what:<58} {outcome}", flush=True)
    if not is_right:
        raise Failure(f"{what}: {outcome}")


def says(status, reason):
    return f"{status} {reason}".strip()


def paint(code, text):
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


if __name__ == "__main__":
    sys.exit(main())
