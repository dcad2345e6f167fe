"""User-space instructions, counted by callgrind: they repeat within half a percent on machines whose time does not.

What starting and stopping costs falls out: a program does few and, in a second run, many of the same, and the difference
counts.
"""

import contextlib
import os
import platform
import re
import tempfile
from pathlib import Path

import checks
from hot import prepared, warm
from servers import ROOT, Store, constant, constant_binary, keyward, load_checks, metric, run, running

RECORDED = ROOT / "benches/instructions.txt"
FEW, MANY = 1000, 5000
# More than repeats differ by, less than reading the message a second time would cost.
ALLOWED_GROWTH = 0.05
# The variants of memcpy and its like that every x86-64 machine has, so that newer ones count the same.
TUNABLES = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-ERMS,-FSRM"
STEPS = {"decode": "read the message", "decide": "decide", "encode": "write the answer",
         "decode-with-envoy-types": "read the message with envoy-types, for comparison"}


@contextlib.contextmanager
def callgrind():
    """A wrapper for a command, and the file that holds its total afterwards."""
    with tempfile.TemporaryDirectory(prefix="keyward-bench-") as folder:
        out = Path(folder) / "out"
        yield ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "-q"], out


def total(out):
    return int(re.search(r"^totals: (\d+)", out.read_text(), re.MULTILINE).group(1))


def of_server(start, ask):
    """For each check of a server: `start` makes it from a wrapper, `ask` sends it so many checks."""
    totals = []
    for count in (FEW, MANY):
        with callgrind() as (wrapper, out):
            with start(wrapper) as server:
                ask(server, count)
            totals.append(total(out))
    return (totals[1] - totals[0]) / (MANY - FEW)


def of_keyward(store, message, file):
    def start(wrapper):
        # Under valgrind bcrypt takes longer than a check may.
        patient = ["--record-ttl-without-feed", "300s", "--check-timeout", "60s", "--drain-delay", "0s"]
        return keyward(store, *patient, wrapper=wrapper, environment={"GLIBC_TUNABLES": TUNABLES})

    def ask(server, count):
        warm(server, message)
        before = metric(server.admin, "keyward_checks_total", decision="allow")
        load_checks(server, file, count, 4, 25)
        allowed = metric(server.admin, "keyward_checks_total", decision="allow") - before
        if allowed != count:
            raise SystemExit(f"bench: {allowed:.0f} of {count} checks were allowed, so the figure would mean nothing")

    return of_server(start, ask)


def of_constant(binary, answer, file):
    start = lambda wrapper: constant(binary, answer, wrapper=wrapper, environment={"GLIBC_TUNABLES": TUNABLES})
    return of_server(start, lambda server, count: load_checks(server, file, count, 4, 25))


def of_step(binary, step, store, file):
    totals = []
    for count in (FEW, MANY):
        with callgrind() as (wrapper, out):
            command = [*wrapper, binary, "step", step, str(count), str(file), store.url]
            run(command, environment={"GLIBC_TUNABLES": TUNABLES})
            totals.append(total(out))
    return (totals[1] - totals[0]) / (MANY - FEW)


def instructions(say):
    binary = constant_binary()
    rows = []
    with Store() as store:
        message, file = prepared(store)
        with keyward(store) as ours:
            answer = warm(ours, message)
        base = of_constant(binary, answer, file)
        counted = {"**Keyward, a whole hot check**": of_keyward(store, message, file), "constant server, a whole check": base}
        counted |= {f"step: {what}": of_step(binary, step, store, file) for step, what in STEPS.items()}
    for what, count in counted.items():
        rows.append([what, f"{count:,.0f}", f"{count / base:.2f}"])
        say(f"{what}: {count:,.0f} instructions, {count / base:.2f} of the constant server")
    return rows


def recorded():
    """Instructions of a hot check, by machine (as `uname -m` names it)."""
    lines = [line.split() for line in RECORDED.read_text().splitlines() if line and not line.startswith("#")]
    return {machine: int(count) for machine, count in lines}


def guard(record=False):
    """Fails where a hot check takes more instructions than it is recorded to take."""
    with Store() as store:
        count = of_keyward(store, *prepared(store))
    machine, known = platform.machine(), recorded()
    print(f"instructions of a hot check: {count:,.0f}")
    if record:
        known[machine] = round(count)
        comments = [line for line in RECORDED.read_text().splitlines() if line.startswith("#")]
        RECORDED.write_text("\n".join(comments + [f"{name} {figure}" for name, figure in sorted(known.items())]) + "\n")
        return
    if machine not in known:
        print(f"guard: NOTHING IS RECORDED FOR {machine}, so nothing is held; record it with make guard RECORD=1")
        return
    growth = count / known[machine] - 1
    print(f"recorded: {known[machine]:,}; growth {growth:+.1%}, allowed {ALLOWED_GROWTH:+.0%}")
    if growth > ALLOWED_GROWTH:
        raise SystemExit("guard: a hot check takes more instructions than it did. If that is meant: make guard RECORD=1, "
                         "and say why in the commit")
