//! How the text of a setting becomes its value, and how the value is shown.
//!
//! Each reader returns what was expected where it refuses; the caller adds where the text came from. No reader's error
//! repeats the text, which may be a secret.

use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::domain::key::{MAX_KEY_BYTES, PrefixLength};
use crate::domain::key_format::TAIL_CHARACTERS;
use crate::domain::model_path::ModelPaths;
use crate::domain::rules::{ScopePaths, Shadow};
use crate::server::client_san::ClientSan;
use crate::server::listen::{Listen, SocketMode};
use crate::server::options::{ClientIpSource, CredentialConflict, CredentialSource, ErrorFormat};
use crate::server::options::{HttpProfile, IdentityHeader, OnUnavailable, is_token};
use crate::telemetry::decision_log::{Sample, Target};
use crate::telemetry::logging::{LogFormat, is_filter};
use crate::telemetry::traces::{OtlpEndpoint, OtlpProtocol, SampleShare};

/// What stands where a password is.
pub(super) const HIDDEN: &str = "[redacted]";

/// A value, or what was expected.
pub(super) type Reading<T> = Result<T, String>;

/// A URL that may hold a password. `Debug` and `Display` print it without.
#[derive(Clone)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL as written, for whoever connects to it.
    pub fn expose_secret(&self) -> &str {
        &self.0
    }
}

impl From<String> for SecretUrl {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.0))
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretUrl({self})")
    }
}

/// Everything between the first `:` of the user part and the **last** `@` is taken for the password, because an
/// unescaped password may hold `@` and `/` itself: too much is hidden rather than too little. Parameters whose name
/// sounds secret are hidden too.
fn redacted(url: &str) -> String {
    let (address, query) = match url.split_once('?') {
        Some((address, query)) if !query.contains('@') => (address, Some(query)),
        _ => (url, None),
    };
    let mut shown = match (address.split_once("://"), address.rfind('@')) {
        (Some((scheme, rest)), Some(_)) => {
            let (user, host) = rest.rsplit_once('@').unwrap_or(("", rest));
            match user.split_once(':') {
                Some((name, _)) => format!("{scheme}://{name}:{HIDDEN}@{host}"),
                None => format!("{scheme}://{user}@{host}"),
            }
        }
        _ => address.to_owned(),
    };
    if let Some(query) = query {
        let parameters = query.split('&').map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if sounds_secret(name) => format!("{name}={HIDDEN}"),
            _ => parameter.to_owned(),
        });
        shown.push('?');
        shown.push_str(&parameters.collect::<Vec<_>>().join("&"));
    }
    shown
}

fn sounds_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["pass", "pwd", "secret", "token"].iter().any(|word| name.contains(word))
}

/// A value's text as it is shown to an operator: what a setting could be given as, less secrets.
pub trait Shown {
    /// The text.
    fn shown(&self) -> String;
}

macro_rules! shown_by_display {
    ($($type:ty),+ $(,)?) => { $(impl Shown for $type {
        fn shown(&self) -> String { self.to_string() }
    })+ };
}

shown_by_display!(
    SocketAddr,
    SocketMode,
    SecretUrl,
    String,
    u32,
    usize,
    ClientIpSource,
    CredentialConflict,
    ErrorFormat
);
shown_by_display!(OnUnavailable, CredentialSource, IdentityHeader, ModelPaths, ScopePaths, Shadow);
shown_by_display!(OtlpEndpoint, OtlpProtocol, SampleShare, Target, Sample, ClientSan, Listen, HttpProfile);
impl Shown for Duration {
    fn shown(&self) -> String {
        // "5m", "1h 30m": what the reader takes.
        humantime::format_duration(*self).to_string()
    }
}

impl Shown for PrefixLength {
    fn shown(&self) -> String {
        self.get().to_string()
    }
}

impl Shown for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl Shown for bool {
    fn shown(&self) -> String {
        if *self { "on" } else { "off" }.to_owned()
    }
}

impl Shown for LogFormat {
    fn shown(&self) -> String {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
        .to_owned()
    }
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or_else(|| "off".to_owned(), T::shown)
    }
}

impl<T: Shown> Shown for Vec<T> {
    fn shown(&self) -> String {
        if self.is_empty() {
            return "none".to_owned();
        }
        self.iter().map(T::shown).collect::<Vec<_>>().join(",")
    }
}

/// A type with its own reader.
pub(super) fn word<T: FromStr<Err = crate::server::options::Unexpected>>(text: &str) -> Reading<T> {
    text.parse().map_err(|error: T::Err| error.0)
}

/// What says itself what it expects.
pub(super) fn parsed<T: FromStr<Err = String>>(text: &str) -> Reading<T> {
    text.parse()
}

/// `off`, or what `read` reads.
pub(super) fn optional<T>(text: &str, read: impl Fn(&str) -> Reading<T>) -> Reading<Option<T>> {
    if text == "off" { Ok(None) } else { read(text).map(Some) }
}

pub(super) fn switch(text: &str) -> Reading<bool> {
    match text {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

/// A comma list of addresses, at least one.
pub(super) fn listens(text: &str) -> Reading<Vec<Listen>> {
    let mut addresses = Vec::new();
    for item in text.split(',') {
        let address = word(item.trim())?;
        if addresses.contains(&address) {
            return Err("each address only once".to_owned());
        }
        addresses.push(address);
    }
    Ok(addresses)
}

pub(super) fn socket_address(text: &str) -> Reading<SocketAddr> {
    text.parse().map_err(|_| "an IP address and port such as 127.0.0.1:9193".to_owned())
}

pub(super) fn file(text: &str) -> Reading<PathBuf> {
    if text.is_empty() { Err("a path, or off".to_owned()) } else { Ok(PathBuf::from(text)) }
}

/// A URL with one of these beginnings and something behind it.
pub(super) fn url(text: &str, beginnings: &[&str], expected: &str) -> Reading<SecretUrl> {
    let fits = |beginning: &str| text.strip_prefix(beginning).is_some_and(|rest| !rest.is_empty());
    if beginnings.iter().any(|beginning| fits(beginning)) {
        Ok(SecretUrl(text.to_owned()))
    } else {
        Err(expected.to_owned())
    }
}

pub(super) fn number(text: &str, range: RangeInclusive<usize>) -> Reading<usize> {
    let expected = || format!("a whole number from {} to {}", range.start(), range.end());
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(expected)
}

/// The same for what is never large.
pub(super) fn small(text: &str, range: RangeInclusive<u32>) -> Reading<u32> {
    let expected = || format!("a whole number from {} to {}", range.start(), range.end());
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(expected)
}

/// A number of threads; `auto` is what the machine has, less `spare`, at least one.
pub(super) fn threads(text: &str, spare: usize) -> Reading<usize> {
    const MOST: usize = 1024;
    if text == "auto" {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        return Ok(cores.saturating_sub(spare).clamp(1, MOST));
    }
    number(text, 1..=MOST).map_err(|expected| format!("auto, or {expected}"))
}

pub(super) fn duration(text: &str, range: RangeInclusive<Duration>) -> Reading<Duration> {
    let expected = || {
        format!("a duration from {} to {}, such as 300s or 5m", range.start().shown(), range.end().shown())
    };
    humantime::parse_duration(text).ok().filter(|duration| range.contains(duration)).ok_or_else(expected)
}

pub(super) const MILLISECOND: Duration = Duration::from_millis(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const MINUTE: Duration = Duration::from_mins(1);
pub(super) const DAY: Duration = Duration::from_hours(24);

/// Bytes, with or without a unit.
pub(super) fn size(text: &str, range: RangeInclusive<usize>) -> Reading<usize> {
    let expected = || format!("a size from {} to {} bytes, such as 8MiB", range.start(), range.end());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).unwrap_or((text, ""));
    let factor: usize = match unit.trim_start() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(expected()),
    };
    let bytes = number.parse::<usize>().ok().and_then(|number| number.checked_mul(factor));
    bytes.filter(|bytes| range.contains(bytes)).ok_or_else(expected)
}

/// A comma list without repetitions; `none` and the empty text are the empty list.
pub(super) fn list<T: FromStr<Err = crate::server::options::Unexpected> + PartialEq>(
    text: &str,
) -> Reading<Vec<T>> {
    let mut values = Vec::new();
    if matches!(text, "" | "none") {
        return Ok(values);
    }
    for item in text.split(',') {
        let value = word(item.trim()).map_err(|expected| format!("each item to be {expected}"))?;
        if values.contains(&value) {
            return Err("each item only once".to_owned());
        }
        values.push(value);
    }
    Ok(values)
}

pub(super) fn credential_sources(text: &str) -> Reading<Vec<CredentialSource>> {
    let sources = list(text)?;
    if sources.is_empty() { Err("at least one source".to_owned()) } else { Ok(sources) }
}

pub(super) fn prefix_length(text: &str) -> Reading<PrefixLength> {
    let length = text.parse().ok().and_then(PrefixLength::new);
    length.ok_or_else(|| "a whole number from 1 to 64".to_owned())
}

/// `x-envoy-` headers steer Envoy itself.
pub(super) fn header_prefix(text: &str) -> Reading<String> {
    let is_lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
    if is_token(text) && is_lower && text.len() <= 64 && !text.starts_with("x-envoy-") {
        Ok(text.to_owned())
    } else {
        Err("1 to 64 characters of a header name, lower case, not beginning with x-envoy-".to_owned())
    }
}

/// Most characters that `new-key-prefix` may have: four random ones more are a public prefix, behind which the secret has
/// its place.
pub(super) const LONGEST_NEW_KEY_PREFIX: usize = MAX_KEY_BYTES - TAIL_CHARACTERS - 4;

pub(super) fn new_key_prefix(text: &str) -> Reading<String> {
    let is_key_text = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',' && byte != b'!');
    if is_key_text && text.len() <= LONGEST_NEW_KEY_PREFIX {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "at most {LONGEST_NEW_KEY_PREFIX} visible ASCII characters without comma and exclamation mark"
        ))
    }
}

pub(super) fn log_format(text: &str) -> Reading<LogFormat> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("one of text, json".to_owned()),
    }
}

/// A bare word must be a level: the filter's own parser would take `inof` for the name of a module.
pub(super) fn log_level(text: &str) -> Reading<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_directive = |item: &str| match item.rsplit_once('=') {
        Some((module, level)) => !module.is_empty() && LEVELS.contains(&level),
        None => LEVELS.contains(&item),
    };
    if text.split(',').all(is_directive) && is_filter(text) {
        Ok(text.to_owned())
    } else {
        Err("off, error, warn, info, debug or trace, or a list such as info,keyward::cache=debug".to_owned())
    }
}

#[cfg(test)]
#[path = "values_tests.rs"]
mod tests;
