"""Memory for each hot key, and look-ups in tables of different sizes."""

import hashlib
import sqlite3

import checks
from bcrypt_candidates import libxcrypt
from cold import first_checks, mean, postgres, psql
from servers import Store, keyward, resident

def key_of(number):
    """A key with a prefix of its own, of no form that is made here."""
    return f"b{number:07}-a-secret-part-of-usual-length"


def sha256_of(key):
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def bcrypt_of(key):
    """Of the lowest cost: the hash is as long as any, and made and verified in a millisecond."""
    return libxcrypt().crypt(key.encode(), b"$2b$04$abcdefghijklmnopqrstuu").decode()


def insert_into_sqlite(store, count, hash_of):
    rows = (
        (number + 10, 1, f"key {number}", hash_of(key_of(number)), key_of(number)[:8], 1, '["gpt-4o*", "claude-*"]',
         '["chat"]', 60)
        for number in range(count)
    )
    with sqlite3.connect(store.url.removeprefix("sqlite:")) as database:
        database.executemany(
            "INSERT INTO api_keys (id, user_id, name, key_hash, key_prefix, is_active, allowed_models, scopes,"
            " rate_limit_per_minute) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


def make_hot(server, count, at_once):
    """Asks for each key until it is allowed."""
    client = checks.Client(server.grpc)
    left = list(range(count))
    while left:
        now, left = left[:at_once], left[at_once:]
        answers = client.ask_all([checks.check(key_of(number)) for number in now])
        # What could not be verified in time is asked again.
        left += [number for number, answer in zip(now, answers) if not checks.is_allow(answer)]
    client.close()


def for_each_key(say):
    """SHA-256 for all, and bcrypt, which has a verdict to remember besides, for as many as can be verified in time."""
    rows = []
    for size, name, hash_of, at_once in (
        (10_000, "bcrypt", bcrypt_of, 16),
        (10_000, "SHA-256", sha256_of, 16),
        (100_000, "SHA-256", sha256_of, 16),
        (1_000_000, "SHA-256", sha256_of, 16),
    ):
        with Store() as store:
            insert_into_sqlite(store, size, hash_of)
            with keyward(store, "--cache-max-entries", str(size * 2), "--record-ttl-without-feed", "300s",
                         "--last-used-interval", "1h") as server:
                idle = resident(server)
                make_hot(server, size, at_once)
                full = resident(server)
        each = (full - idle) / size
        rows.append([f"{size:,}, {name}", f"{idle / 2**20:.1f} MiB", f"{full / 2**20:.0f} MiB", f"**{each:.0f} B**"])
        say(f"{size:,} hot keys, {name}: {each:.0f} bytes each, idle {idle / 2**20:.1f} MiB")
    return rows


def growth(say, sizes=(1_000, 100_000, 1_000_000), keys=300):
    rows = []
    for size in sizes:
        with postgres() as url, Store(url) as store:
            # What has the checks' keys is part of the table; the rest only makes it large.
            psql(url, f"""INSERT INTO api_keys (id, user_id, name, key_hash, key_prefix, is_active)
                SELECT n + 1000, 1, 'filler ' || n, 'sha256:' || encode(sha256(n::text::bytea), 'hex'),
                       'f' || lpad(to_hex(n), 7, '0'), true FROM generate_series(1, {size}) AS n""")
            psql(url, "ANALYZE api_keys")
            created = [store.key(f"cold {number}", "--hash", "sha256") for number in range(keys)]
            with keyward(store) as server:
                first_checks(server, created)
                check = mean(server, "keyward_check_duration_seconds", tier="store")
                query = mean(server, "keyward_store_query_duration_seconds")
        rows.append([f"{size:,}", f"{check:.0f} µs", f"{query:.0f} µs"])
        say(f"{size:,} keys in Postgres: first check {check:.0f} µs, query {query:.0f} µs")
    return rows
