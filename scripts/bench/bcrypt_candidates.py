"""Keyward's bcrypt beside libxcrypt's, which Linux itself verifies passwords with."""

import ctypes
import ctypes.util
import statistics
import time

from servers import constant_binary, run

TIMES = {4: 200, 8: 30, 10: 15}
ROUNDS = 3
SECRET = b"kw_a-secret-part-of-usual-length-0123456789"


def libxcrypt():
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    return library


def of_libxcrypt(library, cost, times):
    """Microseconds for each verification."""
    setting = b"$2b$%02d$abcdefghijklmnopqrstuu" % cost
    took = []
    for _ in range(times):
        began = time.perf_counter()
        made = library.crypt(SECRET, setting)
        took.append((time.perf_counter() - began) * 1e6)
        if not made or not made.startswith(setting[:7]):
            raise SystemExit("bench: this libcrypt has no bcrypt")
    return took


def compare(say):
    library, binary, rows = libxcrypt(), constant_binary(), []
    for cost, times in TIMES.items():
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(statistics.median(map(int, run([binary, "bcrypt", cost, times]).split())))
            theirs.append(statistics.median(of_libxcrypt(library, cost, times)))
        ratio = statistics.median(own / other for own, other in zip(ours, theirs))
        rows.append([str(cost), f"{statistics.median(ours):,.0f} µs", f"{statistics.median(theirs):,.0f} µs", f"**{ratio:.2f}**"])
        say(f"bcrypt of cost {cost}: {ratio:.2f} of libxcrypt's time")
    return rows
