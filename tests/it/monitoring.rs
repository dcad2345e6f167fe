//! What watches Keyward: alert rules, dashboard and `/metrics` fit each other, by promtool's judgement and by name.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;

/// Labels that Prometheus adds to everything it scrapes.
const TARGET_LABELS: [&str; 2] = ["job", "instance"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs promtool with this on standard input; whether it was content, and what it said.
fn promtool(args: &[&str], input: &str) -> (bool, String) {
    let unpacked = root().join(".tools/promtool");
    let program = if unpacked.exists() { unpacked } else { PathBuf::from("promtool") };
    let mut child = Command::new(program)
        .args(args)
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (scripts/install-tools.sh promtool)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// One query: where it is, and what it says.
struct Query {
    place: String,
    expression: String,
}

fn rules() -> Vec<Value> {
    let text = std::fs::read_to_string(root().join("monitoring/alerts.yaml")).unwrap();
    let file: Value = serde_saphyr::from_str(&text).unwrap();
    let groups = file["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

fn alert_queries() -> Vec<Query> {
    let query = |rule: &Value| Query {
        place: rule["alert"].as_str().unwrap().to_owned(),
        expression: rule["expr"].as_str().unwrap().to_owned(),
    };
    rules().iter().map(query).collect()
}

fn dashboard() -> Value {
    let text = std::fs::read_to_string(root().join("monitoring/dashboard.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// As Grafana would send them.
fn dashboard_queries() -> Vec<Query> {
    let dashboard = dashboard();
    let mut queries = Vec::new();
    let mut add = |place: &Value, expression: &Value| {
        let expression = expression.as_str().unwrap();
        let sent = expression.replace("$__rate_interval", "5m").replace("$__range", "3h");
        let sent = sent.replace("$job", ".*").replace("$instance", ".*");
        assert!(!sent.contains('$'), "{place}: a variable that is not defined in {expression}");
        queries.push(Query { place: place.as_str().unwrap().to_owned(), expression: sent });
    };
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            add(&panel["title"], &target["expr"]);
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        add(&annotation["name"], &annotation["expr"]);
    }
    queries
}

/// The queries of docs/metrics.md's table for the night.
fn documented_queries() -> Vec<Query> {
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let (_, section) = page.split_once("\n## At three in the morning\n").expect("the section for the night");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ") && line.contains("` |"));
    let query = |row: &str| {
        let (question, rest) = row.trim_start_matches("| ").split_once(" | `").unwrap();
        let (expression, _) = rest.rsplit_once("` |").unwrap();
        let expression = expression.split("` |").next().unwrap().replace("\\|", "|");
        Query { place: question.to_owned(), expression }
    };
    rows.map(query).collect()
}

fn all_queries() -> Vec<Query> {
    let queries: Vec<Query> =
        alert_queries().into_iter().chain(dashboard_queries()).chain(documented_queries()).collect();
    assert!(queries.len() > 70, "queries were not found: {}", queries.len());
    queries
}

#[test]
fn promtool_takes_the_alert_rules_and_their_tests_pass() {
    for args in
        [["check", "rules", "monitoring/alerts.yaml"], ["test", "rules", "monitoring/alerts_test.yaml"]]
    {
        let (passed, said) = promtool(&args, "");
        assert!(passed, "promtool {args:?}: {said}");
    }
}

/// promtool is content with an alert that nobody tries.
#[test]
fn every_alert_is_tried_both_ways_and_says_what_to_do() {
    let tests = std::fs::read_to_string(root().join("monitoring/alerts_test.yaml")).unwrap();
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for rule in rules() {
        let name = rule["alert"].as_str().unwrap();
        assert!(tests.contains(&format!("  - name: {name} fires\n")), "{name} is not seen to fire");
        assert!(tests.contains(&format!("  - name: {name} is silent\n")), "{name} is not seen to be silent");
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&severity), "{name}: {severity}");
        for annotation in ["summary", "description"] {
            let text = rule["annotations"][annotation].as_str().unwrap_or_default();
            assert!(text.len() > 15, "{name} has no {annotation}");
        }
        let anchor = format!("docs/metrics.md#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook"], anchor, "{name}");
        assert!(page.contains(&format!("\n### {name}\n")), "docs/metrics.md has nothing on {name}");
    }
}

#[test]
fn every_query_of_the_dashboard_and_of_the_page_is_promql() {
    let rules: Vec<Value> = all_queries()
        .iter()
        .enumerate()
        .map(|(number, query)| {
            serde_json::json!({ "record": format!("query:{number}"), "expr": query.expression, "labels": { "place": query.place } })
        })
        .collect();
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    // JSON is YAML.
    let text = serde_json::json!({ "groups": [{ "name": "queries", "rules": rules }] }).to_string();
    std::fs::write(file.path(), text).unwrap();
    let (passed, said) = promtool(&["check", "rules", &file.path().display().to_string()], "");
    assert!(passed, "{said}");
}

#[test]
fn the_dashboard_can_be_imported_anywhere() {
    let dashboard = dashboard();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    assert!(
        variables.iter().any(|variable| variable["type"] == "datasource" && variable["name"] == "datasource")
    );
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let title = &panel["title"];
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title} shows nothing");
        let place = &panel["gridPos"];
        assert!(place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24, "{title} is too wide");
    }
}

/// What `/metrics` has: each series' name, and each label's values.
type Series = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn series(text: &str) -> Series {
    let mut found = Series::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let known = found.entry(name.to_owned()).or_default();
        for (label, value) in matchers(labels.trim_end_matches('}')) {
            known.entry(label).or_default().insert(value.trim_start_matches('=').to_owned());
        }
    }
    found
}

/// `a="b",c=~"d"` as pairs of a label, and operator and value. No value of ours holds a comma.
fn matchers(text: &str) -> Vec<(String, String)> {
    let split = |matcher: &str| {
        let at = matcher.find(['=', '!']).unwrap_or_else(|| panic!("no matcher: {matcher}"));
        let (label, rest) = matcher.split_at(at);
        (label.trim().to_owned(), rest.replace('"', ""))
    };
    text.split(',').filter(|matcher| !matcher.trim().is_empty()).map(split).collect()
}

/// What a query asks for that is not there.
fn missing(query: &str, series: &Series) -> Vec<String> {
    let mut missing = Vec::new();
    let mut labels_of_all: BTreeSet<&str> = TARGET_LABELS.into();
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let mut names = 0;
    for (at, _) in query.match_indices("keyward_").chain(query.match_indices("process_")) {
        if query[..at].ends_with(is_word) {
            continue;
        }
        names += 1;
        let rest = &query[at..];
        let name = &rest[..rest.find(|letter| !is_word(letter)).unwrap_or(rest.len())];
        let Some(labels) = series.get(name) else {
            missing.push(name.to_owned());
            continue;
        };
        labels_of_all.extend(labels.keys().map(String::as_str));
        let asked = rest[name.len()..].strip_prefix('{').map_or("", |rest| rest.split('}').next().unwrap());
        for (label, value) in matchers(asked) {
            let values = labels.get(&label);
            if TARGET_LABELS.contains(&label.as_str()) {
                continue;
            }
            let wanted: Vec<&str> = value.trim_start_matches(['=', '~', '!']).split('|').collect();
            if !wanted.iter().all(|wanted| values.is_some_and(|values| values.contains(*wanted))) {
                missing.push(format!("{name}{{{label}{value}}}"));
            }
        }
    }
    if names == 0 {
        missing.push("a metric of Keyward's".to_owned());
    }
    for word in ["by", "without", "ignoring", "on", "group_left"] {
        for (_, rest) in
            query.match_indices(&format!("{word} (")).map(|(at, word)| query.split_at(at + word.len()))
        {
            for label in rest.split(')').next().unwrap().split(',').map(str::trim) {
                if !labels_of_all.contains(label) {
                    missing.push(format!("{word} ({label})"));
                }
            }
        }
    }
    missing
}

/// `OpenMetrics` names a counter's family without `_total`, and promtool lints the older form, where it is with it.
fn in_the_older_form(text: &str) -> String {
    let counters: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let line = |line: &str| {
        let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        if line.starts_with("# ") && words.get(2).is_some_and(|name| counters.contains(name.as_str())) {
            words[2].push_str("_total");
        }
        words.join(" ") + "\n"
    };
    text.lines().filter(|line| *line != "# EOF").map(line).collect()
}

fn assert_labels_are_documented(series: &Series) {
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for line in page.lines() {
        let Some(named) = line.strip_prefix("| `").and_then(|rest| rest.split('`').next()) else { continue };
        let (name, labels) = named.split_once('{').unwrap_or((named, ""));
        let documented: BTreeSet<&str> =
            labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
        let count = format!("{name}_count");
        let found = series.get(name).or_else(|| series.get(&count)).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(found.keys().map(String::as_str).collect::<BTreeSet<_>>(), documented, "labels of {name}");
        for (label, values) in found {
            assert!(values.len() <= 32, "{name}: {label} has {} values", values.len());
        }
    }
}

/// All that can be switched on is on, and has been used.
#[tokio::test(flavor = "multi_thread")]
async fn rules_and_dashboard_ask_for_what_a_running_sidecar_has() {
    let (postgres, redis) = (Postgres::start().await, Redis::start().await);
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    let store = postgres.create_platform().await;
    let builder = Keyward::new().store(&store).redis(&redis.url(), &secret);
    let keyward = builder.arg("--canary", "on").arg("--cache-max-entries", "5000").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let ask = async |secret: &str| {
        authorizer.check(Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw)).await
    };
    assert!(ask(&key.secret).await.allows());
    assert!(!ask(&key.wrong()).await.allows());
    assert!(!ask("kw_unknown_0123456789").await.allows());

    let fed = eventually(async || (keyward.metric("keyward_change_feed_up", &[]).await > 0.0).then_some(()));
    assert!(fed.await.is_some(), "the feed does not come up");
    let entries = async |cache, kind| {
        keyward.metric("keyward_cache_entries", &[("cache", cache), ("kind", kind)]).await
    };
    assert!(entries("record", "present").await >= 1.0 && entries("record", "absent").await >= 1.0);
    assert!(entries("verdict", "match").await >= 1.0);
    for (name, at_least) in [
        ("keyward_ready", 1.0),
        ("keyward_store_up", 1.0),
        ("keyward_store_answer_age_seconds", 0.0),
        ("keyward_store_connections", 1.0),
        ("keyward_store_max_connections", 8.0),
        ("keyward_store_query_duration_seconds_count", 2.0),
        ("keyward_redis_enabled", 1.0),
        ("keyward_redis_connections", 1.0),
        ("keyward_redis_duration_seconds_count", 2.0),
        ("keyward_canary_enabled", 1.0),
        ("keyward_bcrypt_threads", 1.0),
        ("keyward_bcrypt_queue_limit", 64.0),
        ("keyward_cache_max_entries", 4000.0),
        ("keyward_freshness_window_seconds", 2.0),
        ("keyward_outage_limit_seconds", 32.0),
        ("process_resident_memory_bytes", 1_000_000.0),
        ("process_start_time_seconds", 1_500_000_000.0),
        ("process_open_fds", 3.0),
    ] {
        let value = keyward.metric(name, &[]).await;
        assert!(value >= at_least, "{name} is {value}");
    }
    let mode = async |mode| keyward.metric("keyward_change_feed_mode", &[("mode", mode)]).await;
    assert_eq!((mode("feed").await, mode("ttl").await, mode("starting").await), (1.0, 0.0, 0.0));

    let text = keyward.admin("/metrics").await.text();
    let (passed, said) = promtool(&["check", "metrics"], &in_the_older_form(&text));
    assert!(passed && said.trim().is_empty(), "promtool check metrics: {said}");
    let series = series(&text);
    assert_labels_are_documented(&series);
    let wrong: Vec<String> = all_queries()
        .iter()
        .flat_map(|query| {
            missing(&query.expression, &series).into_iter().map(|what| format!("{}: {what}", query.place))
        })
        .collect();
    assert!(wrong.is_empty(), "not in /metrics: {wrong:#?}");
}

/// What the alerts for the night wait for comes, and goes again.
#[tokio::test(flavor = "multi_thread")]
async fn backends_that_fail_are_seen_to_fail_and_to_come_back() {
    let (mut postgres, redis) = (Postgres::start().await, Redis::start().await);
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    let store = postgres.create_platform().await;
    let builder = Keyward::new().store(&store).redis(&redis.url(), &secret);
    let keyward = builder.arg("--lease", "500ms").arg("--outage-grace", "500ms").start().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let mut number = 0;
    let mut ask_for_unknown = async || {
        number += 1;
        let secret = format!("k{number:07}_0123456789");
        authorizer.check(Check::new("GET", "/v1/models").bearer(&secret).build(Encoding::Raw)).await
    };
    let is = async |name, expected: f64| {
        let value = keyward.metric(name, &[]).await;
        (value.to_bits() == expected.to_bits()).then_some(())
    };
    redis.freeze();
    let opened = eventually(async || {
        ask_for_unknown().await;
        is("keyward_redis_breaker_open", 1.0).await
    });
    assert!(opened.await.is_some(), "the breaker stays closed");
    let failed = async |kind| keyward.count("keyward_redis_failures_total", &[("kind", kind)]).await;
    assert!(failed("timeout").await + failed("connect_timeout").await >= 1);
    ask_for_unknown().await;
    assert!(failed("breaker_open").await >= 1);
    redis.resume();

    for name in ["keyward_ready", "keyward_store_up", "keyward_change_feed_up"] {
        assert!(eventually(async || is(name, 1.0).await).await.is_some(), "{name} is not 1 in health");
    }
    postgres.kill();
    for name in ["keyward_store_up", "keyward_change_feed_up", "keyward_ready"] {
        let fell = eventually(async || {
            ask_for_unknown().await;
            is(name, 0.0).await
        });
        assert!(fell.await.is_some(), "{name} is not 0 in an outage");
    }
    let unavailable = [("decision", "unavailable"), ("reason", "store")];
    assert!(keyward.count("keyward_checks_total", &unavailable).await >= 1);
    postgres.start_again().await;
    for name in ["keyward_store_up", "keyward_change_feed_up", "keyward_ready"] {
        assert!(eventually(async || is(name, 1.0).await).await.is_some(), "{name} does not come back");
    }
}

/// A checker that lets everything pass would be believed.
#[test]
fn what_is_not_there_is_missed() {
    let series = series("a 1\nkeyward_checks_total{decision=\"deny\",reason=\"x\"} 1");
    let found = |query| missing(query, &series);
    assert!(found(r#"sum by (reason) (keyward_checks_total{job=~".*",decision="deny"})"#).is_empty());
    assert_eq!(found("keyward_check_total"), ["keyward_check_total"]);
    assert_eq!(
        found(r#"keyward_checks_total{decision=~"deny|allow"}"#),
        ["keyward_checks_total{decision=~deny|allow}"]
    );
    assert_eq!(found(r#"keyward_checks_total{code="deny"}"#), ["keyward_checks_total{code=deny}"]);
    assert_eq!(found("sum by (tier) (keyward_checks_total)"), ["by (tier)"]);
    assert_eq!(found("up"), ["a metric of Keyward's"]);
}
