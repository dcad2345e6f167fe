"""Measures a release build of Keyward and writes docs/performance.md.

    make bench                    all parts
    make bench B="hot memory"     some of them
    make guard                    fails where a hot check takes more instructions than recorded (RECORD=1 records it)
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
# Not there by itself under PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

import bcrypt_candidates
import cold
import envoy
import flood
import hot
import instructions
import junk
import memory
import page
from servers import ROOT

PARTS = {
    "instructions": (instructions.instructions, ["what", "instructions", "of the constant server's"]),
    "hot": (hot.against_constant, ["connections × streams", "CPU, Keyward / constant", "spread of the pairs",
                                   "constant / itself", "checks a second, Keyward / constant", "CPU a check"]),
    "envoy": (envoy.through_envoy, ["filter", "throughput / with the constant server", "spread", "requests a second"]),
    "cold": (cold.cold_paths, ["first check of a key", "takes", "of that"]),
    "bcrypt": (bcrypt_candidates.compare, ["cost", "Keyward's", "libxcrypt", "Keyward's / libxcrypt"]),
    "flood": (flood.under_floods, ["flood of", "guesses a second", "bcrypt runs", "p50, under / idle", "p99, under / idle",
                                   "spread", "p99"]),
    "start": (cold.starts, ["store", "exec to ready, median", "range"]),
    "memory": (memory.for_each_key, ["hot keys", "idle", "with them", "each"]),
    "junk": (junk.send, ["keys that do not exist", "denied", "a second", "before", "most"]),
    "growth": (memory.growth, ["keys in Postgres", "first check", "query"]),
}


def main():
    # So that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))
    wanted = sys.argv[1:] or list(PARTS)
    for tool, package in (("valgrind", "valgrind"), ("h2load", "nghttp2-client")):
        if not shutil.which(tool):
            raise SystemExit(f"bench: {tool} is missing: scripts/install-tools.sh {tool} (Debian: {package})")
    if wanted[0] == "guard":
        return instructions.guard(record="record" in wanted)
    if wanted[0] == "junk" and len(wanted) == 2:
        return write("junk", lambda say: junk.send(say, int(wanted[1])))
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise SystemExit(f"bench: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for part in wanted:
        write(part, PARTS[part][0])


def write(part, measure):
    began = time.monotonic()

    def say(text):
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    page.write(part, PARTS[part][1], measure(say))
    say(f"written: {page.PAGE.relative_to(ROOT)}")


main()
