"""Cold checks: how long the first check of a key takes, by what it has to ask, beside the round trips in it."""

import contextlib
import secrets
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import checks
from servers import Store, free_port, keyward, metric, running

SHA256 = ("--hash", "sha256")


def binary(name):
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if not found:
        raise SystemExit(f"{name} is missing: scripts/install-tools.sh")
    return str(found)


@contextlib.contextmanager
def redis():
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [binary("redis-server"), "--port", str(port), "--save", "", "--dir", folder, "--bind", "127.0.0.1"]
        with running(command, stdout=subprocess.DEVNULL):
            secret = Path(folder) / "secret"
            secret.write_text(secrets.token_hex(32) + "\n")
            secret.chmod(0o600)
            yield ["--redis", f"redis://127.0.0.1:{port}", "--cache-secret-file", str(secret)]


@contextlib.contextmanager
def postgres():
    """The URL of an empty database."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        # initdb refuses to run as root.
        as_user = []
        if Path("/proc/self").owner() == "root":
            shutil.chown(folder, "postgres")
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        data = f"{folder}/data"
        command = [*as_user, binary("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        command = [*as_user, binary("postgres"), "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
        with running(command, cwd=folder, stderr=subprocess.DEVNULL):
            url = f"postgres://postgres@127.0.0.1:{port}/postgres"
            while subprocess.run([binary("psql"), url, "-c", ""], capture_output=True).returncode:
                pass
            yield url


def psql(url, sql):
    subprocess.run([binary("psql"), url, "-q", "-v", "ON_ERROR_STOP=1", "-c", sql], check=True, capture_output=True)


def first_checks(server, keys):
    """Asks once for each key, one after the other."""
    client = checks.Client(server.grpc)
    for key in keys:
        if not checks.is_allow(client.ask(checks.check(key))):
            raise SystemExit("a key is not allowed")
    client.close()


def mean(server, name, **labels):
    """Microseconds, of all that was observed since the start."""
    count = metric(server.admin, f"{name}_count", **labels)
    return metric(server.admin, f"{name}_sum", **labels) / max(count, 1) * 1e6


def cold_paths(say, keys=300):
    rows = []

    def row(what, check, *parts):
        rows.append([what, f"{check:.0f} µs", *parts])
        say(f"{what}: {check:.0f} µs, {' '.join(parts)}")

    def store_of(server):
        return mean(server, "keyward_store_query_duration_seconds")

    with Store() as store:
        created = [store.key(f"cold {number}", *SHA256) for number in range(keys)]
        with keyward(store) as server:
            first_checks(server, created)
            row("SQLite", mean(server, "keyward_check_duration_seconds", tier="store"), f"query {store_of(server):.0f} µs")
    with postgres() as url, redis() as cache:
        with Store(url) as store:
            created = [store.key(f"cold {number}", *SHA256) for number in range(keys)]
            with keyward(store) as server:
                first_checks(server, created)
                row("Postgres", mean(server, "keyward_check_duration_seconds", tier="store"), f"query {store_of(server):.0f} µs")
            with keyward(store, *cache) as server:
                first_checks(server, created)
                trip = mean(server, "keyward_redis_duration_seconds")
                row("Redis asked in vain, then Postgres", mean(server, "keyward_check_duration_seconds", tier="store"),
                    f"query {store_of(server):.0f} µs, Redis {trip:.0f} µs")
            with keyward(store, *cache) as server:
                # Its change feed has to be older than what it may believe of others.
                first_checks(server, created)
            with keyward(store, *cache) as first, keyward(store, *cache) as second:
                more = [store.key(f"shared {number}", *SHA256) for number in range(keys)]
                first_checks(first, more)
                first_checks(second, more)
                trip = mean(second, "keyward_redis_duration_seconds")
                found = metric(second.admin, "keyward_cache_requests_total", cache="record", tier="redis", result="hit")
                row(f"Redis ({found:.0f} of {keys} found there)", mean(second, "keyward_check_duration_seconds", tier="redis"),
                    f"Redis {trip:.0f} µs")
    with Store() as store:
        created = [store.key(f"cold {number}", "--hash", "bcrypt") for number in range(8)]
        with keyward(store, "--check-timeout", "10s") as server:
            first_checks(server, created)
            bcrypt = mean(server, "keyward_bcrypt_duration_seconds")
            row("SQLite, bcrypt of cost 10", mean(server, "keyward_check_duration_seconds", tier="store"), f"bcrypt {bcrypt:.0f} µs")
    return rows


def starts(say, times=20):
    with Store() as store:
        seconds = []
        for _ in range(times):
            with keyward(store) as server:
                seconds.append(server.start_seconds)
    median = statistics.median(seconds) * 1e3
    say(f"start to ready: {median:.0f} ms")
    return [["SQLite", f"{median:.0f} ms", f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f} ms"]]
