"""Hot checks while somebody guesses keys: guesses have to cost the guesser, not those whose keys are known."""

import multiprocessing
import random
import statistics
import time

import checks
from hot import warm
from servers import Store, keyward, metric

RATE = 5000
BATCH = 50
SECONDS = 8


def random_key(beginning):
    return beginning + "".join(random.choices("abcdefghijkmnopqrstuvwxyz23456789", k=32))


def flood(address, beginning, stop, sent):
    """Checks of keys that do not exist, each from another address, at most `RATE` a second."""
    client = checks.Client(address)
    due = time.monotonic()
    while not stop.is_set():
        keys = [random_key(beginning if beginning else random_key("")[:8]) for _ in range(BATCH)]
        sources = [f"10.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(256)}" for _ in keys]
        client.send([checks.check(key, source) for key, source in zip(keys, sources)])
        client.receive(BATCH)
        sent.value += BATCH
        due = max(due + BATCH / RATE, time.monotonic() - 0.1)
        time.sleep(max(0.0, due - time.monotonic()))


def latencies(server, message):
    """Microseconds of checks one after the other."""
    client, took = checks.Client(server.grpc), []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        began = time.perf_counter()
        answer = client.ask(message)
        took.append((time.perf_counter() - began) * 1e6)
        if not checks.is_allow(answer):
            raise SystemExit("bench: a hot key is not allowed under a flood")
        # A caller among others, not one more load.
        time.sleep(0.0005)
    client.close()
    return took


def percentiles(values):
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def under_floods(say):
    rows = []
    with Store() as store:
        message = checks.check(store.hot_key())
        proven, dormant = store.key("proven"), store.key("dormant")
        with keyward(store, "--record-ttl-without-feed", "300s", "--check-timeout", "2s") as server:
            warm(server, message)
            warm(server, checks.check(proven))
            idle = percentiles(latencies(server, message))
            floods = {"suffixes of a prefix whose key is proven": proven[:8],
                      "suffixes of a prefix that nobody has used (bcrypt is saturated)": dormant[:8],
                      "made-up prefixes": ""}
            for what, beginning in floods.items():
                stop, sent = multiprocessing.Event(), multiprocessing.Value("l", 0)
                flooder = multiprocessing.Process(target=flood, args=(server.grpc, beginning, stop, sent))
                before = metric(server.admin, "keyward_bcrypt_duration_seconds_count")
                flooder.start()
                time.sleep(1)
                count, began = sent.value, time.monotonic()
                busy = percentiles(latencies(server, message))
                rate = (sent.value - count) / (time.monotonic() - began)
                stop.set()
                flooder.join()
                ran = metric(server.admin, "keyward_bcrypt_duration_seconds_count") - before
                rows.append([what, f"{rate:,.0f}", f"{ran:,.0f}", f"{busy[0] / idle[0]:.2f}", f"**{busy[1] / idle[1]:.2f}**",
                             f"{idle[1]:.0f} → {busy[1]:.0f} µs"])
                say(f"flood of {what}: {rate:,.0f}/s, {ran:.0f} bcrypt runs, p99 {busy[1] / idle[1]:.2f} of idle")
    return rows
