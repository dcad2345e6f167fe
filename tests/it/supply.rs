//! Where our code comes from: what the lock file may hold, what each direct dependency is for, and the switches that
//! Cargo.toml must not lose. Quick, and without a network; `make supply` asks more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// The first versions without a published hole that would touch us (RUSTSEC, CVE).
const AT_LEAST: [(&str, [u64; 3]); 7] = [
    ("bcrypt", [0, 19, 2]),
    ("h2", [0, 4, 16]),
    ("tonic", [0, 12, 3]),
    ("tokio-postgres", [0, 7, 18]),
    ("postgres-protocol", [0, 6, 12]),
    ("tracing-subscriber", [0, 3, 20]),
    ("lru", [0, 18, 2]),
];

/// Other implementations of what rustls and ring do here, and of what SQLite and tokio-postgres do.
const NOT_HERE: [&str; 5] = ["openssl", "openssl-sys", "native-tls", "sqlx", "serde_yaml"];

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

struct Locked {
    name: String,
    version: String,
    source: Option<String>,
    checksum: bool,
}

fn lock_file() -> Vec<Locked> {
    let text = read("Cargo.lock");
    let packages = text.split("[[package]]").skip(1).map(|package| {
        let value = |key: &str| {
            package.lines().find_map(|line| {
                Some(line.strip_prefix(key)?.strip_prefix(" = \"")?.trim_end_matches('"').to_owned())
            })
        };
        Locked {
            name: value("name").unwrap(),
            version: value("version").unwrap(),
            source: value("source"),
            checksum: value("checksum").is_some_and(|sum| sum.len() == 64),
        }
    });
    let packages: Vec<_> = packages.collect();
    assert!(packages.len() > 100, "the lock file was not understood");
    packages
}

fn version(text: &str) -> [u64; 3] {
    let mut numbers = text.split(['.', '-', '+']).map(|number| number.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

/// A table of Cargo.toml: its keys and what stands behind them.
fn table(name: &str) -> BTreeMap<String, String> {
    let text = read("Cargo.toml");
    let from = text.split_once(&format!("\n[{name}]\n")).unwrap_or_else(|| panic!("no [{name}]")).1;
    let lines = from.lines().take_while(|line| !line.starts_with('['));
    lines
        .filter_map(|line| line.split_once(" = "))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn every_package_comes_from_crates_io_with_a_checksum() {
    for package in lock_file() {
        if package.name == "keyward" {
            assert_eq!(package.source, None);
            continue;
        }
        let named = format!("{} {}", package.name, package.version);
        assert_eq!(package.source.as_deref(), Some(CRATES_IO), "{named}");
        assert!(package.checksum, "{named} has no checksum");
    }
}

#[test]
fn no_package_is_older_than_its_last_known_hole() {
    let packages = lock_file();
    let mut met = 0;
    for (name, least) in AT_LEAST {
        for package in packages.iter().filter(|package| package.name == name) {
            assert!(version(&package.version) >= least, "{name} {} is older than {least:?}", package.version);
            met += 1;
        }
    }
    assert!(met >= 5, "the list is about packages that are not here any more");
    assert!(version("0.19.1") < version("0.19.2") && version("0.4.9") < version("0.4.16"));
}

#[test]
fn what_has_a_better_replacement_here_is_not_brought_back() {
    let packages = lock_file();
    for name in NOT_HERE {
        assert!(packages.iter().all(|package| package.name != name), "{name} is back; see deny.toml");
    }
    let deny = read("deny.toml");
    for name in NOT_HERE {
        assert!(deny.contains(&format!("crate = \"{name}\"")), "deny.toml does not ban {name}");
    }
}

#[test]
fn every_direct_dependency_is_accounted_for_and_no_other() {
    let wanted: BTreeSet<String> =
        table("dependencies").into_keys().chain(table("dev-dependencies").into_keys()).collect();
    let page = read("docs/dependencies.md");
    let rows = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name.to_owned()));
    let rows: Vec<String> = rows.collect();
    let named: BTreeSet<String> = rows.iter().cloned().collect();
    assert_eq!(named, wanted);
    assert!(wanted.len() > 40, "Cargo.toml was not understood");
    for (name, value) in table("dependencies").into_iter().chain(table("dev-dependencies")) {
        assert!(!value.contains('*') && !value.contains("git ="), "{name} = {value}");
    }
}

#[test]
fn the_bill_of_materials_names_what_is_in_the_program_and_nothing_else() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3").arg("scripts/sbom.py").current_dir(root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bill: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&json!("CycloneDX"), &json!("1.6")));
    assert_eq!(bill["metadata"]["component"]["name"], "keyward");

    let components = bill["components"].as_array().unwrap();
    let names: BTreeSet<&str> = components.iter().map(|one| one["name"].as_str().unwrap()).collect();
    let direct: BTreeSet<String> = table("dependencies").into_keys().collect();
    let missing: Vec<_> = direct.iter().filter(|name| !names.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?}");
    for name in
        table("dev-dependencies").into_keys().filter(|name| ["tempfile", "proptest"].contains(&&**name))
    {
        assert!(!names.contains(name.as_str()), "{name} is only for tests");
    }
    for one in components {
        let version = format!("{}@{}", one["name"].as_str().unwrap(), one["version"].as_str().unwrap());
        assert_eq!(one["purl"], format!("pkg:cargo/{version}"));
        assert_eq!(one["hashes"][0]["content"].as_str().map(str::len), Some(64), "{version}");
        assert!(one["licenses"][0]["expression"].is_string(), "{version} has no licence");
    }
    let known: BTreeSet<&str> = components.iter().filter_map(|one| one["bom-ref"].as_str()).collect();
    let edges = bill["dependencies"].as_array().unwrap();
    assert_eq!(edges.len(), components.len() + 1);
    for needed in edges.iter().flat_map(|edge| edge["dependsOn"].as_array().unwrap()) {
        assert!(needed.as_str().is_some_and(|needed| known.contains(needed)), "{needed} is no component");
    }
}

#[test]
fn unsafe_code_is_forbidden_and_overflow_is_noticed_in_what_is_shipped() {
    assert_eq!(table("lints.rust").get("unsafe_code").map(String::as_str), Some("\"forbid\""));
    assert_eq!(table("profile.release").get("overflow-checks").map(String::as_str), Some("true"));
}
