"""Hot checks while somebody guesses keys: guesses have to cost the guesser, not those whose keys are known."""

import multiprocessing
import random
import statistics
import time

import checks
from hot import warm
from servers import Store, keyward, metric

RATE = 5000
BATCH = 5
# Guesses that may wait for their answers at once.
WAITING = 500
SECONDS = 5
ROUNDS = 5


def random_key(beginning):
    return beginning + "".join(random.choices("abcdefghijkmnopqrstuvwxyz23456789", k=40 - len(beginning)))


def messages(next_key):
    """More checks than one flood sends, each of a key that `next_key` makes up and from another address. Made before it begins:
    the flooder shares the cores with what it floods."""
    made = []
    for _ in range(RATE * (SECONDS + 2)):
        source = f"10.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(256)}"
        made.append(checks.check(next_key(), source))
    return made


def flood(address, made, stop, sent):
    """Sends them, at most `RATE` a second, until it is told to stop."""
    client = checks.Client(address)
    due = time.monotonic()
    while not stop.is_set():
        client.send([made[(sent.value + number) % len(made)] for number in range(BATCH)])
        client.receive(still_waiting=WAITING)
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


def one_flood(server, message, next_key):
    """Percentiles of the hot key while it lasts, guesses a second, and bcrypt runs."""
    stop, sent = multiprocessing.Event(), multiprocessing.Value("l", 0)
    flooder = multiprocessing.Process(target=flood, args=(server.grpc, messages(next_key), stop, sent))
    before = metric(server.admin, "keyward_bcrypt_duration_seconds_count")
    flooder.start()
    time.sleep(1)
    count, began = sent.value, time.monotonic()
    busy = percentiles(latencies(server, message))
    rate = (sent.value - count) / (time.monotonic() - began)
    ran = metric(server.admin, "keyward_bcrypt_duration_seconds_count") - before
    stop.set()
    flooder.join()
    # What waits for bcrypt belongs to this flood, not to the next.
    while metric(server.admin, "keyward_bcrypt_busy_threads"):
        time.sleep(0.05)
    return busy, rate, ran


def under_floods(say):
    with Store() as store:
        message = checks.check(store.hot_key())
        proven, dormant = store.key("proven"), store.key("dormant")
        floods = {"no guesses, but as many checks of a key that is proven": lambda: proven,
                  "suffixes of a prefix whose key is proven": lambda: random_key(proven[:8]),
                  "suffixes of a prefix that nobody has used (bcrypt is saturated)": lambda: random_key(dormant[:8]),
                  "made-up prefixes": lambda: random_key("")}
        seen = {what: [] for what in floods}
        with keyward(store, "--record-ttl-without-feed", "300s") as server:
            warm(server, message)
            warm(server, checks.check(proven))
            for round_number in range(ROUNDS):
                for what, next_key in floods.items():
                    idle = percentiles(latencies(server, message))
                    busy, rate, ran = one_flood(server, message, next_key)
                    seen[what].append((busy[0] / idle[0], busy[1] / idle[1], idle[1], busy[1], rate, ran))
                    say(f"round {round_number + 1}, {what}: {rate:,.0f}/s, {ran:.0f} bcrypt runs, "
                        f"p99 {busy[1] / idle[1]:.2f} of idle")
    rows = []
    for what, rounds in seen.items():
        half, most, idle, busy, rate, ran = (statistics.median(values) for values in zip(*rounds))
        spread = f"{min(one[1] for one in rounds):.2f} to {max(one[1] for one in rounds):.2f}"
        rows.append([what, f"{rate:,.0f}", f"{ran:,.0f}", f"{half:.2f}", f"**{most:.2f}**", spread, f"{idle:.0f} → {busy:.0f} µs"])
    return rows
