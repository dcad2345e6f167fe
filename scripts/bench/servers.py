"""The programs that are measured, each a process of its own that ends with its `with` block."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEYWARD = ROOT / "target/release/keyward"
ENVOY = ROOT / ".tools/envoy"
GRPC = "envoy.service.auth.v3.Authorization"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu(process):
    """Seconds of CPU, user and system, of the whole process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process):
    """Bytes of memory that are resident."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def metric(port, name, **labels):
    """The sum of the series of this name that have these labels."""
    total = 0.0
    for line in get(port, "/metrics").splitlines():
        if line.startswith(name) and all(f'{label}="{value}"' in line for label, value in labels.items()):
            if line[len(name)] in " {":
                total += float(line.rsplit(" ", 1)[1])
    return total


def clean(more=None):
    """The environment, without the settings of whoever runs this."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KEYWARD_")}
    return kept | (more or {})


def run(command, environment=None):
    """To its end; what it printed. What it complained of is shown where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=clean(environment))
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def running(command, environment=None, **options):
    process = subprocess.Popen([str(word) for word in command], env=clean(environment), **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Store:
    """A database with one user, in a folder that goes with the `with` block."""

    def __init__(self, url=None):
        self.folder = Path(tempfile.mkdtemp(prefix="keyward-bench-"))
        self.url = url or f"sqlite:{self.folder / 'bench.db'}"
        self.cli("migrate")
        self.cli("user", "create", "--username", "bench", "--email", "bench@example.com")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def cli(self, *arguments):
        return run([KEYWARD, *arguments, "--store", self.url])

    def key(self, name, *options):
        created = self.cli("key", "create", "--user", "bench", "--name", name, "--output", "json", *options)
        return json.loads(created)["key"]

    def hot_key(self):
        return self.key("hot", "--allowed-models", "gpt-4o*,claude-*", "--rate-limit-per-minute", "60")


@contextlib.contextmanager
def keyward(store, *arguments, wrapper=(), environment=None):
    """A sidecar that is ready; it has `grpc` (an address) and `admin` (a port)."""
    grpc, admin = free_port(), free_port()
    command = [*wrapper, str(KEYWARD), "serve", "--store", store.url, "--log-level", "error"]
    command += ["--grpc-listen", f"127.0.0.1:{grpc}", "--admin-listen", f"127.0.0.1:{admin}"]
    if not any(argument == "--worker-threads" for argument in arguments):
        command += ["--worker-threads", "1"]
    with running([*command, *arguments], environment, cwd=store.folder) as process:
        process.grpc, process.admin = ("127.0.0.1", grpc), admin
        process.since = time.monotonic()
        while True:
            try:
                get(admin, "/readyz")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"keyward ended with {process.returncode}")
                time.sleep(0.001)
        process.start_seconds = time.monotonic() - process.since
        yield process


def constant_binary():
    """The bench binary, which is the constant server too."""
    build = ["cargo", "bench", "--locked", "--bench", "yardstick", "--no-run", "--message-format", "json"]
    output = subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    artifacts = [json.loads(line) for line in output.splitlines()]
    return next(a["executable"] for a in artifacts if a.get("target", {}).get("name") == "yardstick" and a["executable"])


@contextlib.contextmanager
def constant(binary, answer, wrapper=(), environment=None):
    """A tonic server that decodes each check with envoy-types and gives always this answer."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running([*wrapper, binary, "constant"], environment, **pipes) as process:
        process.stdin.write(answer)
        process.stdin.close()
        host, port = process.stdout.readline().decode().strip().rsplit(":", 1)
        process.grpc = (host, int(port))
        yield process


def h2load(arguments, url):
    """Runs it; requests a second."""
    output = run(["h2load", *arguments, url])
    status = next(line for line in output.splitlines() if line.startswith("status codes:"))
    done = int(next(line for line in output.splitlines() if line.startswith("requests:")).split()[1])
    if f"{done} 2xx" not in status:
        raise SystemExit(f"h2load {url}: {status}")
    finished = next(line for line in output.splitlines() if line.startswith("finished in"))
    return float(finished.split(",")[1].split()[0])


def load_checks(server, message_file, checks, connections, streams):
    """Many checks of one kind by h2load; (seconds of CPU a check, checks a second)."""
    arguments = ["-n", str(checks), "-c", str(connections), "-m", str(streams), "-d", str(message_file)]
    arguments += ["-H", "te: trailers", "-H", "content-type: application/grpc"]
    host, port = server.grpc
    before = cpu(server)
    rate = h2load(arguments, f"http://{host}:{port}/{GRPC}/Check")
    return (cpu(server) - before) / checks, rate
