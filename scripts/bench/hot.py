"""A hot check: CPU and throughput against the constant server."""

import statistics

import checks
from servers import Store, constant, constant_binary, keyward, load_checks

SHAPES = [(1, 1), (4, 4), (4, 25)]


def warm(server, message):
    """Asks until the key is proven; the answer."""
    client = checks.Client(server.grpc)
    for _ in range(200):
        answer = client.ask(message)
        if checks.is_allow(answer):
            client.close()
            return answer
    raise SystemExit("the check is not allowed")


def prepared(store):
    message = checks.check(store.hot_key())
    file = store.folder / "check"
    file.write_bytes(message)
    return message, file


def against_constant(say, pairs=7, count=60_000):
    """Median ratios of pairs, for each number of connections and streams."""
    rows, binary = [], constant_binary()
    with Store() as store:
        message, file = prepared(store)
        with keyward(store, "--record-ttl-without-feed", "300s") as ours:
            answer = warm(ours, message)
            with constant(binary, answer) as base, constant(binary, answer) as twin:
                for connections, streams in SHAPES:
                    checks_each = count if connections * streams > 1 else count // 4
                    ratios = {"cpu": [], "twin": [], "rate": []}
                    for server in (ours, base, twin):
                        load_checks(server, file, checks_each // 10, connections, streams)
                    for _ in range(pairs):
                        of = lambda server: load_checks(server, file, checks_each, connections, streams)
                        (base_cpu, base_rate), (our_cpu, our_rate), (twin_cpu, _) = of(base), of(ours), of(twin)
                        ratios["cpu"].append(our_cpu / base_cpu)
                        ratios["twin"].append(twin_cpu / base_cpu)
                        ratios["rate"].append(our_rate / base_rate)
                    median = {name: statistics.median(values) for name, values in ratios.items()}
                    spread = f"{min(ratios['cpu']):.2f} to {max(ratios['cpu']):.2f}"
                    rows.append([f"{connections} × {streams}", f"**{median['cpu']:.2f}**", spread,
                                 f"{median['twin']:.2f}", f"{median['rate']:.2f}", f"{our_cpu * 1e6:.1f} µs"])
                    say(f"{connections} connections with {streams} streams: {median['cpu']:.2f} of the constant server's CPU")
    return rows
