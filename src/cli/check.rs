//! `keyward check`: one described request, decided and explained, by the store or by a running sidecar.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use hyper::body::Bytes;
use zeroize::Zeroizing;

use super::admin_client::{Answer, ask_with};
use super::arguments::plain;
use super::block_on;
use super::doors::responder;
use super::failure::{Exit, Failure};
use super::flags::{CheckSettings, SettingFlags};
use super::output::{Format, Output, note, print, print_json, visible};
use super::parts::{Parts, Purpose};
use crate::config::Settings;
use crate::server::explain::{Described, Explainer, MAX_BODY_BYTES};
use crate::server::report::{Report, StepReport};
use crate::telemetry::metrics::Metrics;

/// Most that is read of a key. A key has at most 72 bytes, so what is longer is none, whatever comes behind.
const MAX_KEY_TEXT: u64 = 4096;

/// How long the store and bcrypt may take for an answer that nobody's request waits for.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Read the key from standard input, where neither other users nor the shell's history see it
    #[arg(long)]
    key_stdin: bool,
    /// Method of the request
    #[arg(long, value_name = "METHOD", default_value = "POST", value_parser = plain)]
    method: String,
    /// Path of the request, with its query
    #[arg(long, value_name = "PATH", default_value = "/v1/chat/completions", value_parser = plain)]
    path: String,
    /// Address of the client
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<IpAddr>,
    /// Fixed model of the route
    #[arg(long, value_name = "MODEL", value_parser = plain)]
    model: Option<String>,
    /// Body of the request
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// Scopes that the route asks for
    #[arg(long, value_name = "LIST", value_parser = plain)]
    required_scopes: Option<String>,
    /// Type of the body, application/json where there is one
    #[arg(long, value_name = "TYPE", value_parser = plain)]
    content_type: Option<String>,
    /// Have the running sidecar answer, from its caches as they are
    #[arg(long)]
    running: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<CheckSettings>,
}

impl Check {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        self.decide().map_err(Failure::undecided)
    }

    fn decide(self) -> Result<Exit, Failure> {
        let (output, is_running) = (self.output, self.running);
        let settings = self.settings.clone().load()?.settings;
        let described = self.described()?;
        described.validate().map_err(|error| Failure::usage(error.into()))?;
        let report = if is_running {
            block_on(ask_running(&settings, &described))?
        } else {
            block_on(ask_store(&settings, &described))?
        };
        match output.output {
            Format::Json => print_json(&report)?,
            Format::Table => print(&table(&report, colours()))?,
        }
        Ok(match report.decision.as_str() {
            "allow" => Exit::Done,
            "deny" => Exit::Refused,
            _ => Exit::Unreachable,
        })
    }

    fn described(self) -> Result<Described, Failure> {
        if !self.key_stdin {
            return Err(Failure::usage(anyhow!(
                "the key comes from standard input: keyward check --key-stdin < FILE (never as an argument, which \
                 every user of the machine can read)"
            )));
        }
        let body = self.body.as_deref().map(read_body).transpose().map_err(Failure::usage)?;
        let key = read_key().map_err(Failure::usage)?;
        let content_type = self.content_type.or_else(|| body.as_ref().map(|_| "application/json".to_owned()));
        let described = Described {
            key,
            method: self.method,
            path: self.path,
            ip: self.ip,
            model: self.model,
            required_scopes: self.required_scopes,
            content_type,
            body: None,
            body_base64: None,
        };
        Ok(match body {
            Some(body) => described.with_body(&body),
            None => described,
        })
    }
}

/// The first line; a file or `echo` ends it with a line break, which belongs to no key.
fn read_key() -> anyhow::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::new());
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        note("type or paste the key, then press Enter and Ctrl-D; it's shown as you type");
    }
    stdin.take(MAX_KEY_TEXT).read_to_end(&mut bytes).context("read the key from standard input")?;
    let key = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let key = key.strip_suffix(b"\r").unwrap_or(key);
    if key.is_empty() {
        return Err(anyhow!("there is no key on standard input"));
    }
    // What is no UTF-8 becomes what no key has, as it does in Envoy.
    Ok(Zeroizing::new(String::from_utf8_lossy(key).into_owned()))
}

fn read_body(path: &Path) -> anyhow::Result<Vec<u8>> {
    let most = u64::try_from(MAX_BODY_BYTES).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    // One more, so that what is too large is refused and not cut.
    File::open(path)
        .and_then(|file| file.take(most.saturating_add(1)).read_to_end(&mut bytes))
        .with_context(|| format!("read --body {}", path.display()))?;
    Ok(bytes)
}

async fn ask_store(settings: &Settings, described: &Described) -> Result<Report, Failure> {
    let parts = Parts::build(settings, &Metrics::new(), Purpose::CheckOnce).await?;
    let explainer = Explainer::new(Arc::clone(&parts.authorizer), responder(settings), DEADLINE);
    let report = explainer.explain(described).await.context("describe the request")?;
    if report.decision == "unavailable"
        && let Err(error) = parts.store.ping().await
    {
        for line in Failure::from(error).lines() {
            note(&format!("error: {line}"));
        }
    }
    Ok(report)
}

async fn ask_running(settings: &Settings, described: &Described) -> Result<Report, Failure> {
    let body = serde_json::to_vec(described).map(Zeroizing::new).context("write the question")?;
    let Answer { body } = ask_with(settings.admin_listen, "POST", "/check", Bytes::from_owner(body)).await?;
    Ok(serde_json::from_str(&body).context("read the answer of /check")?)
}

/// Whether anybody sees them and nobody minds (<https://no-color.org>).
fn colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

const GREEN: u8 = 32;
const RED: u8 = 31;
const YELLOW: u8 = 33;
const GREY: u8 = 90;

fn table(report: &Report, has_colours: bool) -> String {
    let painted = |text: &str, colour: u8| {
        if has_colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    };
    let width = report.steps.iter().map(|step| step.step.chars().count()).max().unwrap_or_default();
    let mut text = String::new();
    for step in &report.steps {
        let (mark, colour) = match step.outcome.as_str() {
            "passed" => ("✓", GREEN),
            "failed" => ("✗", RED),
            "shadowed" => ("~", YELLOW),
            "undecided" => ("?", YELLOW),
            _ => ("-", GREY),
        };
        let _ = writeln!(text, "{} {:width$}  {}", painted(mark, colour), visible(&step.step), line(step));
    }
    let colour = match report.decision.as_str() {
        "allow" => GREEN,
        "deny" => RED,
        _ => YELLOW,
    };
    let _ = write!(text, "\n{}", painted(&visible(&report.decision), colour));
    match (report.status, &report.reason) {
        (Some(status), Some(reason)) => {
            let _ = write!(text, ": {status} {}", visible(reason));
        }
        (None, Some(reason)) => {
            let _ = write!(text, ": {}, left to Envoy's failure mode (--on-unavailable)", visible(reason));
        }
        (_, None) => {}
    }
    if let Some(reason) = &report.shadow_reason {
        let _ = write!(text, " (without shadow mode: {})", visible(reason));
    }
    if let Some(message) = &report.message {
        let _ = write!(text, "\n{}", visible(message));
    }
    let _ = write!(
        text,
        "\n\n{}",
        if report.decision == "allow" { "to the upstream:" } else { "to the caller:" }
    );
    for (name, value) in &report.headers {
        let _ = write!(text, "\n  {}: {}", visible(name), visible(value));
    }
    text
}

fn line(step: &StepReport) -> String {
    let facts = visible(&step.facts);
    match (&step.reason, step.outcome.as_str()) {
        (_, "not_reached") => "not reached".to_owned(),
        (Some(reason), _) if facts.is_empty() => visible(reason),
        (Some(reason), _) => format!("{}: {facts}", visible(reason)),
        (None, _) => facts,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn step(outcome: &str, reason: Option<&str>, facts: &str) -> StepReport {
        StepReport {
            step: "ips".into(),
            outcome: outcome.into(),
            reason: reason.map(str::to_owned),
            facts: facts.into(),
            source: None,
            age_seconds: None,
            feed: None,
        }
    }

    fn report() -> Report {
        Report {
            decision: "deny".into(),
            reason: Some("ip_not_allowed".into()),
            cause: None,
            status: Some(403),
            message: Some("No.".into()),
            key_id: Some(7),
            tier: Some("store".into()),
            shadow_reason: None,
            steps: vec![
                step("passed", None, "evil \x1b[31mname"),
                step("failed", Some("ip_not_allowed"), "client 10.1.2.3"),
                step("shadowed", Some("scope_missing"), "required: a"),
                step("undecided", Some("store"), ""),
                step("not_reached", None, ""),
            ],
            headers: BTreeMap::from([("x-keyward-reason".to_owned(), "ip_not_allowed".to_owned())]),
        }
    }

    #[test]
    fn a_line_for_each_step_and_then_the_decision() {
        assert_eq!(
            table(&report(), false),
            "✓ ips  evil \\u{1b}[31mname\n\
             ✗ ips  ip_not_allowed: client 10.1.2.3\n\
             ~ ips  scope_missing: required: a\n\
             ? ips  store\n\
             - ips  not reached\n\
             \n\
             deny: 403 ip_not_allowed\n\
             No.\n\
             \n\
             to the caller:\n  \
               x-keyward-reason: ip_not_allowed"
        );
        assert!(table(&report(), true).contains("\x1b[31m✗\x1b[0m"));
    }

    #[test]
    fn what_is_left_to_envoy_says_so() {
        let report = Report {
            decision: "unavailable".into(),
            reason: Some("unavailable".into()),
            status: None,
            ..report()
        };
        assert!(table(&report, false).contains("\nunavailable: unavailable, left to Envoy's failure mode"));
    }
}
