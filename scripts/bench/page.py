"""docs/performance.md: a table for each part between its markers, and plots beside it."""

import datetime
import os
import subprocess
from pathlib import Path

from servers import ROOT

PAGE = ROOT / "docs/performance.md"
PLOTS = ROOT / "docs/performance"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(part, head, rows):
    text = PAGE.read_text()
    begin, end = f"<!-- bench:{part} -->\n", f"<!-- /bench:{part} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"docs/performance.md has no place for {part}")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    said = f"{datetime.date.today()}, {os.cpu_count()} shared x86-64 cores, commit {commit}\n"
    PAGE.write_text(f"{before}{begin}{table(head, rows)}\n\n{said}{end}{after}")
    if part in PLOT:
        label, value, unit, title = PLOT[part]
        bars = [(row[label], number(row[value])) for row in rows]
        PLOTS.mkdir(exist_ok=True)
        (PLOTS / f"{part}.svg").write_text(bar_chart(title, bars, unit))


# Part: column of the label, column of the value, unit, title.
PLOT = {
    "hot": (0, 1, "", "CPU a check, Keyward / constant server (connections × streams)"),
    "envoy": (0, 1, "", "Throughput behind Envoy, against the constant server"),
    "cold": (0, 1, " µs", "First check of a key"),
    "memory": (0, 3, " B", "Memory for each hot key, by their number"),
    "growth": (0, 1, " µs", "First check of a key, by the number of keys in Postgres"),
}


def number(text):
    return float("".join(c for c in text if c.isdigit() or c == "."))


def bar_chart(title, bars, unit):
    """Horizontal bars that can be read on a light and on a dark page."""
    largest = max(value for _, value in bars) or 1
    row, left, width = 26, 250, 380
    parts = [f'<text x="0" y="16" font-weight="bold">{title}</text>']
    for index, (label, value) in enumerate(bars):
        y = 30 + index * row
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{label.replace("&", "&amp;")}</text>')
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{max(width * value / largest, 1):.1f}" height="18" fill="#3b82f6"/>')
        parts.append(f'<text x="{left + width * value / largest + 6:.1f}" y="{y + 15}">{value:g}{unit}</text>')
    height = 36 + len(bars) * row
    style = "text{font:13px sans-serif;fill:#555}@media(prefers-color-scheme:dark){text{fill:#bbb}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img">'
    return f"{head}<style>{style}</style>{''.join(parts)}</svg>\n"
