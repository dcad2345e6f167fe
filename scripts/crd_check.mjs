// Holds custom resources of Istio, the Gateway API and the Prometheus operator against their published schemas.
//
//   node scripts/crd_check.mjs FOLDER < objects.json      FOLDER holds node_modules with scripts/crd-packages.txt
//
// Twice: by the validators of @kubernetes-models, which know values and required fields, and by the TypeScript compiler
// with the types of the same packages, which knows a field that does not exist. Prints one line a mistake.
import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "gateway.networking.k8s.io": "gateway-api",
  "networking.istio.io": "istio",
  "security.istio.io": "istio",
  "install.istio.io": "istio",
  "monitoring.coreos.com": "prometheus-operator",
};

const folder = resolve(process.argv[2]);
const mistakes = [];
let source = "";

for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${object.kind} ${object.metadata?.name}`;
  const [group, version] = object.apiVersion.split("/");
  const known = PACKAGES[group];
  const path = `@kubernetes-models/${known}/${group}/${version}/${object.kind}`;
  const file = join(folder, "node_modules", `${path}.js`);
  if (!known || !existsSync(file)) {
    mistakes.push(`${name}: no schema for ${object.apiVersion}`);
    continue;
  }
  const model = await import(pathToFileURL(file));
  try {
    new model[object.kind](object).validate();
  } catch (error) {
    mistakes.push(`${name}: ${error.message}`);
  }
  // The types leave apiVersion and kind to the class, but for some.
  const { apiVersion, kind, ...rest } = object;
  source += `{ const it: Omit<import("${path}").I${kind}, "apiVersion" | "kind"> = ${JSON.stringify(rest)}; void it; } // ${name}\n`;
}

// Inside, so that the compiler finds node_modules.
const work = mkdtempSync(join(folder, "check-"));
try {
  writeFileSync(join(work, "objects.mts"), source);
  const tsc = join(folder, "node_modules/.bin/tsc");
  const options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022"];
  try {
    execFileSync(tsc, [...options, "objects.mts"], { cwd: work, encoding: "utf8" });
  } catch (error) {
    const lines = source.split("\n");
    for (const line of `${error.stdout ?? ""}`.split("\n").filter((line) => line.includes("error"))) {
      const number = Number(/\((\d+),/.exec(line)?.[1] ?? 0);
      const name = lines[number - 1]?.split("; void it; } // ")[1];
      mistakes.push(`${name}: ${line.replace(/^.*?error /, "")}`);
    }
    if (!mistakes.length) mistakes.push(`tsc: ${error.message}`);
  }
} finally {
  rmSync(work, { recursive: true });
}

for (const mistake of mistakes) console.log(mistake);
process.exit(mistakes.length ? 1 : 0);
