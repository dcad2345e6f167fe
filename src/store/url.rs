//! Store URLs: `postgres://…`, `postgresql://…` and `sqlite:PATH`, parsed.
//!
//! The TLS options are read here, because tokio-postgres knows `disable`, `prefer` and `require` alone; everything else
//! is left to its parser. A URL holds a password, so nothing here repeats what was given: neither `Debug` nor `Display`
//! nor an error.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio_postgres::config::{Host, SslMode};

use crate::domain::hash::hex_digit;

/// Where the truth is.
#[derive(Clone)]
pub struct StoreUrl {
    target: Target,
    /// What may be shown.
    shown: String,
}

/// Which of the two stores, with all that is needed to open it.
#[derive(Clone)]
pub(super) enum Target {
    Postgres(Box<PostgresTarget>),
    Sqlite(PathBuf),
}

/// A Postgres URL, parsed.
#[derive(Clone)]
pub(super) struct PostgresTarget {
    pub(super) config: tokio_postgres::Config,
    pub(super) verification: Verification,
    pub(super) roots: Roots,
}

/// How far the server's certificate is looked at, by libpq's rules for `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verification {
    /// `allow`, `prefer`, `require`: encrypted where `sslmode` says so, against listeners alone.
    None,
    /// `verify-ca`, and `require` with a root certificate: any name that the authority has signed.
    Authority,
    /// `verify-full`: the host's own name.
    Full,
}

/// Who may sign the server's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Roots {
    /// `sslrootcert=system`, and the default.
    System,
    /// `sslrootcert=FILE`
    File(PathBuf),
}

impl StoreUrl {
    /// Parses a `--store` value.
    pub fn parse(text: &str) -> Result<Self, StoreUrlError> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            return parse_sqlite(path);
        }
        let rest = text
            .strip_prefix("postgres://")
            .or_else(|| text.strip_prefix("postgresql://"))
            .ok_or(StoreUrlError::UnknownScheme)?;
        parse_postgres(rest)
    }

    /// `postgres` or `sqlite`.
    pub fn kind(&self) -> &'static str {
        match self.target {
            Target::Postgres(_) => "postgres",
            Target::Sqlite(_) => "sqlite",
        }
    }

    /// The file of `SQLite`.
    pub fn sqlite_path(&self) -> Option<&Path> {
        match &self.target {
            Target::Postgres(_) => None,
            Target::Sqlite(path) => Some(path),
        }
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Why a text names no store. The text itself is not repeated.
#[derive(Debug, Error)]
pub enum StoreUrlError {
    /// Neither of the schemes.
    #[error("expected postgres://… or sqlite:PATH")]
    UnknownScheme,
    /// `sqlite:`, `sqlite::memory:`, `sqlite://…`
    #[error(
        "expected sqlite:PATH with the path of a file, as in sqlite:keyward.db or sqlite:/var/lib/keyward.db"
    )]
    NotAFile,
    /// A second `@` before the host, or one that makes a login of the options.
    #[error("the user or the password has an unescaped @ or ? (write %40 or %3F)")]
    UnescapedAt,
    /// No host, by name or as `host=`.
    #[error("the URL names no host")]
    NoHost,
    /// `sslmode` is none of libpq's.
    #[error("sslmode is none of disable, allow, prefer, require, verify-ca, verify-full")]
    SslMode,
    /// `sslrootcert=system` with anything less than `verify-full`, which libpq refuses too.
    #[error("sslrootcert=system needs sslmode=verify-full")]
    SystemRootsNeedVerifyFull,
    /// The rest is not understood.
    #[error("the URL can't be read: {0}")]
    Malformed(&'static str),
    /// An option is not understood.
    #[error("the URL's option {0} is unknown or has a bad value")]
    Option(String),
}

fn parse_sqlite(path: &str) -> Result<StoreUrl, StoreUrlError> {
    if path.is_empty() || path.starts_with(':') || path.starts_with("//") {
        return Err(StoreUrlError::NotAFile);
    }
    Ok(StoreUrl { target: Target::Sqlite(PathBuf::from(path)), shown: format!("sqlite:{path}") })
}

fn parse_postgres(rest: &str) -> Result<StoreUrl, StoreUrlError> {
    let (credentials, place) = rest.split_once('@').map_or((None, rest), |(who, place)| (Some(who), place));
    let (base, query) = place.split_once('?').unwrap_or((place, ""));
    // In `?user=ada&password=p@ss` all before the `@` would be taken for a user, and be shown.
    if base.contains('@') || credentials.is_some_and(|who| who.contains('?')) {
        return Err(StoreUrlError::UnescapedAt);
    }

    let mut options = TlsOptions::default();
    let mut kept = Vec::new();
    let mut shown = Vec::new();
    for option in query.split('&').filter(|option| !option.is_empty()) {
        let (name, value) =
            option.split_once('=').ok_or(StoreUrlError::Malformed("an option has no value"))?;
        match name {
            "sslmode" => options.mode = Some(value),
            "sslrootcert" => options.roots = Some(percent_decode(value)?),
            _ => kept.push(option),
        }
        shown.push(if name.contains("password") { format!("{name}=***") } else { option.to_owned() });
    }

    let authority = credentials.map(|who| format!("{who}@")).unwrap_or_default();
    // Option by option first, so that the error can name the one at fault.
    for option in &kept {
        if format!("postgres://host/?{option}").parse::<tokio_postgres::Config>().is_err() {
            let name = option.split_once('=').map_or(*option, |(name, _)| name);
            return Err(StoreUrlError::Option(name.to_owned()));
        }
    }
    let mut config: tokio_postgres::Config = format!("postgres://{authority}{base}?{}", kept.join("&"))
        .parse()
        .map_err(|_| StoreUrlError::Malformed("bad escape, host or port"))?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(StoreUrlError::NoHost);
    }
    let (verification, roots) = options.apply(&mut config)?;
    set_defaults(&mut config);

    let who = credentials.map(|who| match who.split_once(':') {
        Some((user, _)) => format!("{user}:***@"),
        None => format!("{who}@"),
    });
    let query = if shown.is_empty() { String::new() } else { format!("?{}", shown.join("&")) };
    let shown = format!("postgres://{}{base}{query}", who.unwrap_or_default());
    Ok(StoreUrl { target: Target::Postgres(Box::new(PostgresTarget { config, verification, roots })), shown })
}

#[derive(Default)]
struct TlsOptions<'a> {
    mode: Option<&'a str>,
    roots: Option<String>,
}

impl TlsOptions<'_> {
    fn apply(self, config: &mut tokio_postgres::Config) -> Result<(Verification, Roots), StoreUrlError> {
        let mode = self.mode.unwrap_or(match self.roots.as_deref() {
            Some("system") => "verify-full",
            _ => "prefer",
        });
        let (ssl, mut verification) = match mode {
            "disable" => (SslMode::Disable, Verification::None),
            "allow" | "prefer" => (SslMode::Prefer, Verification::None),
            "require" => (SslMode::Require, Verification::None),
            "verify-ca" => (SslMode::Require, Verification::Authority),
            "verify-full" => (SslMode::Require, Verification::Full),
            _ => return Err(StoreUrlError::SslMode),
        };
        if mode == "require" && self.roots.is_some() {
            verification = Verification::Authority;
        }
        let roots = match self.roots {
            Some(name) if name == "system" => {
                if verification != Verification::Full {
                    return Err(StoreUrlError::SystemRootsNeedVerifyFull);
                }
                Roots::System
            }
            Some(file) => Roots::File(PathBuf::from(file)),
            None => Roots::System,
        };
        // Postgres speaks no TLS on Unix sockets, and libpq ignores the mode there.
        let local = !config.get_hosts().is_empty()
            && config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)));
        config.ssl_mode(if local { SslMode::Disable } else { ssl });
        Ok((verification, roots))
    }
}

/// What a URL leaves open: a dead server must be noticed within seconds, not by TCP's own hours.
fn set_defaults(config: &mut tokio_postgres::Config) {
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(Duration::from_secs(1));
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(Duration::from_secs(3));
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_idle(Duration::from_secs(10));
        config.keepalives_interval(Duration::from_secs(3));
        config.keepalives_retries(3);
    }
    if config.get_application_name().is_none() {
        config.application_name("keyward");
    }
}

fn percent_decode(text: &str) -> Result<String, StoreUrlError> {
    let bad = || StoreUrlError::Malformed("bad percent escape");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let high = rest.next().and_then(hex_digit).ok_or_else(bad)?;
        let low = rest.next().and_then(hex_digit).ok_or_else(bad)?;
        bytes.push(high << 4 | low);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn postgres(text: &str) -> PostgresTarget {
        match StoreUrl::parse(text).unwrap().target {
            Target::Postgres(target) => *target,
            Target::Sqlite(_) => panic!("{text} is no Postgres"),
        }
    }

    #[test]
    fn passwords_are_never_shown() {
        for text in [
            "postgres://ada:s3cret@db:5432/keys?sslmode=disable",
            "postgresql://ada:s3cret@a,b:6432/keys",
            "postgres://ada@db/keys?password=s3cret&sslmode=require",
            "postgres://ada:s3cret/%3f@db/keys",
        ] {
            let url = StoreUrl::parse(text).unwrap();
            assert!(!format!("{url} {url:?}").contains("s3cret"), "{url}");
            assert!(format!("{url}").contains("***"), "{url}");
        }
        for text in [
            "postgres://ada:s3cret@x@db/keys",
            "postgres://db/keys?user=ada&password=s3cret@x",
            "postgres://db/keys?user=ada&password=x@s3cret",
            "postgres://ada:s3cret@db:s3cret/keys",
            "postgres://ada:s3cret@db/keys?sslmode=s3cret",
            "postgres://ada:s3cret@db/keys?port=s3cret",
            "s3cret",
        ] {
            let error = StoreUrl::parse(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn tls_modes_follow_libpq() {
        let mode = |query: &str| {
            let target = postgres(&format!("postgres://u@db/k?{query}"));
            (target.config.get_ssl_mode(), target.verification)
        };
        assert_eq!(mode(""), (SslMode::Prefer, Verification::None));
        assert_eq!(mode("sslmode=disable"), (SslMode::Disable, Verification::None));
        assert_eq!(mode("sslmode=require"), (SslMode::Require, Verification::None));
        assert_eq!(mode("sslmode=require&sslrootcert=/ca.pem"), (SslMode::Require, Verification::Authority));
        assert_eq!(mode("sslmode=verify-ca"), (SslMode::Require, Verification::Authority));
        assert_eq!(mode("sslmode=verify-full"), (SslMode::Require, Verification::Full));
        assert_eq!(mode("sslrootcert=system"), (SslMode::Require, Verification::Full));
        assert!(StoreUrl::parse("postgres://u@db/k?sslmode=on").is_err());
        assert!(StoreUrl::parse("postgres://u@db/k?sslmode=require&sslrootcert=system").is_err());
        let socket = postgres("postgres://u@%2Frun%2Fpg/k?sslmode=verify-full");
        assert_eq!(socket.config.get_ssl_mode(), SslMode::Disable);
        let roots = postgres("postgres://u@db/k?sslmode=verify-ca&sslrootcert=%2Fetc%2Fca.pem").roots;
        assert_eq!(roots, Roots::File(PathBuf::from("/etc/ca.pem")));
    }

    #[test]
    fn options_and_hosts_are_kept() {
        let target = postgres("postgres://u@a:1,b:2/k?target_session_attrs=read-write&connect_timeout=7");
        assert_eq!(target.config.get_hosts().len(), 2);
        assert_eq!(target.config.get_ports(), [1, 2]);
        assert_eq!(target.config.get_connect_timeout(), Some(&Duration::from_secs(7)));
        assert!(matches!(
            StoreUrl::parse("postgres://u@db/k?colour=red"),
            Err(StoreUrlError::Option(name)) if name == "colour"
        ));
    }

    #[test]
    fn sqlite_needs_a_file() {
        assert_eq!(StoreUrl::parse("sqlite:keyward.db").unwrap().to_string(), "sqlite:keyward.db");
        assert_eq!(StoreUrl::parse("sqlite:/var/lib/k.db").unwrap().kind(), "sqlite");
        for text in ["sqlite:", "sqlite::memory:", "sqlite:///k.db", "mysql://db/k", ""] {
            assert!(StoreUrl::parse(text).is_err(), "{text}");
        }
    }
}
