#!/usr/bin/env python3
"""Runs the fuzz targets of fuzz/ one after the other, each for some seconds, and says of each what came of it.

    scripts/fuzz.py [--seconds 60] [--sanitizer none|address|...] [TARGET...]

Goes on after a crash; fails at the end. What is found stays in target/fuzz/, where the next run goes on from; fuzz/corpus is
only read.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARGO_FUZZ = ROOT / ".tools/bin/cargo-fuzz"
FOUND = ROOT / "target/fuzz"

# Longest input, in bytes: the tests replay no longer ones.
LONGEST = 4096


def main():
    known = sorted(door.stem for door in (ROOT / "fuzz/fuzz_targets").glob("*.rs"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--sanitizer", default="none", help="none, or one that takes a nightly toolchain: address, ...")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default: " + ", ".join(known))
    options = parser.parse_args()
    if options.seconds < 1:
        parser.error("--seconds is at least 1")
    for name in options.targets:
        if name not in known:
            parser.error(f"there is no target {name}; there are {', '.join(known)}")
    cargo = cargo_fuzz(options.sanitizer)
    # cargo-fuzz builds one target or all of them.
    built = options.targets if len(options.targets) == 1 else []
    subprocess.run([*cargo, "build", "--sanitizer", options.sanitizer, *built], cwd=ROOT, check=True)
    print(f"{'target':<16} {'executions':>12} {'per second':>10} {'features':>9} {'corpus':>7}  outcome", flush=True)
    crashed = [name for name in options.targets or known if not run(cargo, options, name)]
    if crashed:
        print(f"fuzz: found something in {', '.join(crashed)}; see target/fuzz/TARGET.log, and keep the input in "
              "fuzz/regressions/TARGET/", file=sys.stderr)
        sys.exit(1)


def cargo_fuzz(sanitizer):
    """The command; sanitizers are switches of the compiler that only nightly has."""
    if sanitizer == "none":
        return [str(CARGO_FUZZ)]
    if subprocess.run(["cargo", "+nightly", "--version"], capture_output=True).returncode:
        sys.exit(f"fuzz: the sanitizer {sanitizer} needs a nightly toolchain, and there is none. "
                 "Get it with: rustup toolchain install nightly; or fuzz without a sanitizer")
    return ["rustup", "run", "nightly", str(CARGO_FUZZ)]


def run(cargo, options, name):
    """Whether nothing was found."""
    corpus, findings = FOUND / "corpus" / name, FOUND / "findings" / name
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    seeds = [ROOT / "fuzz" / kind / name for kind in ("corpus", "regressions")]
    command = [*cargo, "run", "--sanitizer", options.sanitizer, name, corpus, *(folder for folder in seeds if folder.exists()),
               "--", f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", "-rss_limit_mb=4096",
               "-print_final_stats=1", f"-artifact_prefix={findings}/"]
    log = FOUND / f"{name}.log"
    with log.open("wb") as output:
        ended = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                               env={**os.environ, "RUST_BACKTRACE": "1"})
    text = log.read_text(errors="replace")
    executions = last(r"stat::number_of_executed_units: (\d+)", text)
    speed = last(r"stat::average_exec_per_sec: +(\d+)", text)
    features, kept = last(r" ft: (\d+)", text), last(r" corp: (\d+)", text)
    said = "ok" if ended.returncode == 0 else outcome(text)
    print(f"{name:<16} {executions:>12} {speed:>10} {features:>9} {kept:>7}  {said}", flush=True)
    return ended.returncode == 0


def last(pattern, text):
    found = re.findall(pattern, text)
    return found[-1] if found else "0"


def outcome(text):
    said = re.search(r"panicked at [^\n]*\n([^\n]*)", text) or re.search(r"ERROR: ([^\n]*)", text)
    return "FAILED: " + (said.group(1)[:160] if said else "see the log")


if __name__ == "__main__":
    main()
