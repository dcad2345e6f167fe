#!/usr/bin/env python3
"""Prints a bill of materials of the program: CycloneDX 1.6 as JSON, from Cargo.lock by way of `cargo metadata`.

What only tests or the build need is left out. Two runs on one lock file print the same.
"""

import json
import re
import subprocess
import sys

TARGET = "x86_64-unknown-linux-gnu"


def main() -> None:
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", TARGET]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    needs, wanted = {}, [root]
    while wanted:
        package = wanted.pop()
        if package not in needs:
            needs[package] = sorted(d["pkg"] for d in nodes[package]["deps"] if in_the_program(d))
            wanted.extend(needs[package])
    names = {package: purl(packages[package]) for package in needs}
    sums = checksums()
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component(packages[root], "application", sums)},
        "components": [component(packages[p], "library", sums) for p in sorted(needs, key=names.get) if p != root],
        "dependencies": [
            {"ref": names[p], "dependsOn": sorted({names[d] for d in needs[p]})} for p in sorted(needs, key=names.get)
        ],
    }
    json.dump(bill, sys.stdout, indent=2)
    print()


def in_the_program(dependency: dict) -> bool:
    return any(kind["kind"] is None for kind in dependency["dep_kinds"])


def purl(package: dict) -> str:
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package: dict, kind: str, sums: dict) -> dict:
    found = {"type": kind, "bom-ref": purl(package), "name": package["name"], "version": package["version"]}
    if package["license"]:
        # The older way of writing "or".
        found["licenses"] = [{"expression": re.sub(r"\s*/\s*", " OR ", package["license"])}]
    if checksum := sums.get((package["name"], package["version"])):
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    found["purl"] = purl(package)
    return found


def checksums() -> dict:
    with open("Cargo.lock", encoding="utf-8") as file:
        entries = re.findall(r'name = "(.+)"\nversion = "(.+)"\nsource = .+\nchecksum = "(.+)"', file.read())
    return {(name, version): checksum for name, version, checksum in entries}


main()
