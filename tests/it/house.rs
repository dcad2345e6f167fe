//! The layout's own test: which part of `src/` may lean on which, how long a file may be, and that what has a name is
//! documented under it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use keyward::domain::denial::Denial;
use keyward::server::options::IdentityHeader;

/// Each part, and the parts that it may name. Arrows point down only.
const ARROWS: [(&str, &[&str]); 9] = [
    ("domain", &[]),
    ("clock", &["domain"]),
    ("telemetry", &["domain"]),
    ("store", &["domain", "clock"]),
    ("cache", &["domain", "clock", "telemetry"]),
    ("authorizer", &["domain", "clock", "telemetry", "store", "cache"]),
    ("server", &["domain", "clock", "telemetry", "store", "authorizer"]),
    ("config", &["domain", "telemetry", "server"]),
    ("cli", &["domain", "clock", "telemetry", "store", "cache", "authorizer", "server", "config"]),
];

/// Files that read secrets. Whoever adds one says here that they thought about it.
const READS_SECRETS: [&str; 17] = [
    "authorizer/bcrypt_pool.rs",
    "cache/names.rs",
    "cache/redis.rs",
    "cache/redis_url.rs",
    "cache/secrets.rs",
    "cache/verdict_name.rs",
    "cli/config.rs",
    "cli/migrate.rs",
    "cli/parts.rs",
    "cli/store.rs",
    "config/load.rs",
    "config/values.rs",
    "domain/hash.rs",
    "domain/key.rs",
    "domain/key_format.rs",
    "server/credentials.rs",
    "server/mask.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// Every source file: its path below `src/`, its text without the tests at its end.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root().join("src")).unwrap().display().to_string();
                let text = std::fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
                if !name.ends_with("tests.rs") {
                    found.push((name, text));
                }
            }
        }
    }
    assert!(found.len() > 50, "the sources were not found");
    found
}

#[test]
fn arrows_point_down_only() {
    for (name, text) in sources() {
        let part = name.split(['/', '.']).next().unwrap();
        let Some((_, allowed)) = ARROWS.iter().find(|(own, _)| *own == part) else {
            assert!(matches!(name.as_str(), "lib.rs" | "main.rs"), "{name} is in no part of the house");
            continue;
        };
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            for named in line.split("crate::").skip(1) {
                let target: String =
                    named.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
                let is_part = ARROWS.iter().any(|(own, _)| *own == target);
                assert!(
                    !is_part || target == part || allowed.contains(&target.as_str()),
                    "{name} leans on {target}: {line}"
                );
            }
        }
    }
}

#[test]
fn the_ground_floor_does_no_io_and_reads_no_clock() {
    for (name, text) in sources().into_iter().filter(|(name, _)| name.starts_with("domain/")) {
        for word in
            ["async ", ".await", "tokio", "tracing", "std::fs", "std::net::Tcp", "Instant::now", "SystemTime"]
        {
            assert!(!text.contains(word), "{name} has {word}");
        }
    }
}

#[test]
fn a_file_does_one_thing() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 500 || text.contains("long:"), "{name} has {lines} lines and does not say why");
        assert!(text.starts_with("//!"), "{name} does not say what it is for");
    }
}

#[test]
fn only_known_files_read_secrets() {
    for (name, text) in sources() {
        let reads = text.contains("expose_secret()");
        assert!(!reads || READS_SECRETS.contains(&name.as_str()), "{name} reads a secret");
    }
}

#[test]
fn only_one_file_builds_an_answer_to_envoy() {
    let builders: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| {
            text.contains("CheckResponse {") && !text.contains("-> CheckResponse {\n        unreachable")
        })
        .map(|(name, _)| name)
        .collect();
    assert_eq!(builders, ["server/response.rs"]);
    let writers: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| text.contains("AllowWriter"))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(writers, ["server/answer.rs", "server/response.rs"], "the bytes of an allow");
    for (name, text) in sources() {
        assert!(!text.contains("CheckResponse::default()"), "{name}: an empty answer is an allow");
    }
}

#[test]
fn every_denial_and_every_header_is_in_the_readme() {
    let readme = read("README.md");
    for denial in Denial::ALL {
        let row = format!("| {} | `{}` |", denial.http_status(), denial.code());
        assert!(readme.contains(&row), "README has no row {row}");
    }
    for header in IdentityHeader::ALL {
        let last = header.name().rsplit('-').next().unwrap();
        assert!(readme.contains(header.name()) || readme.contains(&format!("-{last}")), "{}", header.name());
    }
}

#[test]
fn every_metric_is_documented_and_nothing_else_is() {
    let mut exported = String::new();
    let registry = keyward::telemetry::metrics::Metrics::new().registry();
    prometheus_client::encoding::text::encode(&mut exported, &registry).unwrap();
    let described =
        |line: &str| line.strip_prefix("# HELP ").and_then(|rest| rest.split(' ').next()).map(str::to_owned);
    let exported: BTreeSet<String> = exported.lines().filter_map(described).collect();
    let page = read("docs/metrics.md");
    let named = |line: &str| {
        Some(line.strip_prefix("| `")?.split(['`', '{']).next()?.trim_end_matches("_total").to_owned())
    };
    let documented: BTreeSet<String> = page.lines().filter_map(named).collect();
    assert_eq!(exported, documented);
}
