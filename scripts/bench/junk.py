"""Resident memory while millions of keys that do not exist are sent: half with made-up prefixes, half with made-up suffixes of a
prefix that exists."""

import random
import time

import checks
from hot import warm
from servers import Store, keyward, metric, resident

BATCH = 400
# What it may take beyond its caches, which are bounded by --cache-max-entries.
OVERHEAD = 64 << 20
PLACE = "k" * 40
SOURCE = "10.200.200.200"
LETTERS = "abcdefghijkmnopqrstuvwxyz23456789"


def messages(template, prefix, count):
    """Checks that differ in key and address; both keep their length."""
    made = []
    for number in range(count):
        beginning = prefix if number % 2 else ""
        key = beginning + "".join(random.choices(LETTERS, k=len(PLACE) - len(beginning)))
        source = f"10.{random.randrange(100, 256)}.{random.randrange(100, 256)}.{random.randrange(100, 256)}"
        made.append(template.replace(PLACE.encode(), key.encode()).replace(SOURCE.encode(), source.encode()))
    return made


def send(say, count=1_000_000):
    with Store() as store:
        key = store.hot_key()
        # Every look-up is let through, so that what is remembered of them is what is measured.
        limits = ["--lookups-per-second", "1000000", "--record-ttl-without-feed", "300s"]
        with keyward(store, *limits) as server:
            warm(server, checks.check(key))
            template = checks.check(PLACE, SOURCE)
            idle, most, sent, began = resident(server), 0, 0, time.monotonic()
            client = checks.Client(server.grpc)
            while sent < count:
                client.send(messages(template, key[:8], BATCH))
                client.receive()
                sent += BATCH
                if sent % (BATCH * 250) == 0:
                    most = max(most, resident(server))
                    say(f"{sent:,} junk keys: {resident(server) / 2**20:.1f} MiB")
            most = max(most, resident(server))
            if not checks.is_allow(client.ask(checks.check(key))):
                raise SystemExit("bench: the hot key is not allowed any more")
            denied = metric(server.admin, "keyward_checks_total", decision="deny")
    rate = sent / (time.monotonic() - began)
    if most > idle + OVERHEAD:
        raise SystemExit(f"bench: {sent:,} junk keys took {(most - idle) / 2**20:.0f} MiB")
    return [[f"{sent:,}", f"{denied:,.0f}", f"{rate:,.0f}", f"{idle / 2**20:.1f} MiB", f"**{most / 2**20:.1f} MiB**"]]
