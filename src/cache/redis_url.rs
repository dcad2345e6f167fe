//! The address of Redis, parsed. Never prints the password.

use std::fmt;

use redis::io::tcp::TcpSettings;
use redis::{
    Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo,
};
use thiserror::Error;

/// Where Redis is and how to log in there: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` (TLS, certificate
/// and host name verified against the system's roots), `redis+unix:///PATH[?db=N&user=U&pass=P]`.
///
/// TLS needs rustls' process-wide provider: `main` installs ring's before anything connects.
#[derive(Clone)]
pub struct RedisUrl(ConnectionInfo);

impl RedisUrl {
    /// Parses the setting. Errors never quote it, because it may hold a password.
    pub fn parse(text: &str) -> Result<Self, RedisUrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(RedisUrlError::NoUrl)?;
        let is_unix = match scheme {
            "redis" | "rediss" => false,
            "redis+unix" => true,
            other if other.contains("sentinel") => return Err(RedisUrlError::Sentinel),
            other if other.contains("cluster") => return Err(RedisUrlError::Cluster),
            _ => return Err(RedisUrlError::UnknownScheme),
        };
        if rest.contains('#') {
            return Err(RedisUrlError::Fragment);
        }
        if !is_unix {
            let authority = rest.split(['/', '?']).next().unwrap_or_default();
            let hosts = authority.rsplit('@').next().unwrap_or_default();
            if hosts.contains(',') {
                return Err(RedisUrlError::SeveralHosts);
            }
            if rest.contains('?') {
                return Err(RedisUrlError::Query);
            }
        }
        let info = text.into_connection_info().map_err(|_| RedisUrlError::Malformed)?;
        // RESP2 has everything that is used, on every Redis; and no CLIENT SETINFO, which a narrow ACL forbids.
        let settings =
            info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        // For TLS, whose connections redis-rs makes; see `links` for the others.
        let tcp = TcpSettings::default().set_nodelay(true);
        Ok(Self(info.set_redis_settings(settings).set_tcp_settings(tcp)))
    }

    pub(super) fn client(&self) -> Result<Client, RedisUrlError> {
        Client::open(self.0.clone()).map_err(|_| RedisUrlError::Malformed)
    }

    fn settings(&self) -> &RedisConnectionInfo {
        self.0.redis_settings()
    }
}

/// The address without user and password, as `/config` and logs show it.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let db = self.settings().db();
        let login = if self.settings().password().is_some() { "[redacted]@" } else { "" };
        match self.0.addr() {
            ConnectionAddr::Tcp(host, port) => write!(f, "redis://{login}{}:{port}/{db}", Host(host)),
            ConnectionAddr::TcpTls { host, port, .. } => {
                write!(f, "rediss://{login}{}:{port}/{db}", Host(host))
            }
            ConnectionAddr::Unix(path) => write!(f, "redis+unix://{}?db={db}", path.display()),
            _ => f.write_str("redis://[unknown]"),
        }
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisUrl({self})")
    }
}

struct Host<'a>(&'a str);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains(':') { write!(f, "[{}]", self.0) } else { f.write_str(self.0) }
    }
}

/// Why a Redis address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RedisUrlError {
    /// No `://`.
    #[error(
        "the Redis address is no URL; expected redis://HOST:PORT, rediss://HOST:PORT or redis+unix:///PATH"
    )]
    NoUrl,
    /// Something else than Redis.
    #[error("the Redis address has an unknown scheme; expected redis://, rediss:// or redis+unix://")]
    UnknownScheme,
    /// Sentinel.
    #[error(
        "Redis Sentinel addresses are not supported; name the primary, or a proxy or service that follows it"
    )]
    Sentinel,
    /// Cluster.
    #[error("Redis Cluster addresses are not supported; name one Redis, or a proxy before the cluster")]
    Cluster,
    /// `host1,host2`.
    #[error("the Redis address names several hosts; name one, or a proxy or service before them")]
    SeveralHosts,
    /// `?…` where it means nothing.
    #[error("the Redis address has settings after `?`, which only redis+unix:// takes (db, user, pass)")]
    Query,
    /// `#…`, above all `#insecure`.
    #[error("the Redis address has a `#` (`#insecure` is not supported; write %23 in a password)")]
    Fragment,
    /// A part is not what it should be.
    #[error(
        "the Redis address is malformed; expected redis://[USER:PASSWORD@]HOST[:PORT][/DB] with a password percent-encoded"
    )]
    Malformed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        use RedisUrlError::*;
        let rows: [(&str, Result<&str, RedisUrlError>); 16] = [
            ("redis://cache", Ok("redis://cache:6379/0")),
            ("redis://127.0.0.1:7000/3", Ok("redis://127.0.0.1:7000/3")),
            ("redis://[::1]:7000", Ok("redis://[::1]:7000/0")),
            ("redis://u:p%2Cw@cache:1", Ok("redis://[redacted]@cache:1/0")),
            ("redis://:p,w@cache:1", Ok("redis://[redacted]@cache:1/0")),
            ("rediss://:secret@cache:1/2", Ok("rediss://[redacted]@cache:1/2")),
            ("redis+unix:///run/redis.sock?db=4&pass=secret", Ok("redis+unix:///run/redis.sock?db=4")),
            ("cache:6379", Err(NoUrl)),
            ("http://cache", Err(UnknownScheme)),
            ("redis-sentinel://a:1/main", Err(Sentinel)),
            ("redis+cluster://a:1", Err(Cluster)),
            ("redis://a:1,b:2/0", Err(SeveralHosts)),
            ("redis://a/0?timeout=1", Err(Query)),
            ("rediss://a#insecure", Err(Fragment)),
            ("redis://a/notanumber", Err(Malformed)),
            ("redis://", Err(Malformed)),
        ];
        for (text, expected) in rows {
            let parsed = RedisUrl::parse(text).map(|url| url.to_string());
            assert_eq!(parsed.as_deref(), expected.as_ref().copied(), "{text}");
        }
    }

    #[test]
    fn no_form_of_output_has_the_password() {
        let url = RedisUrl::parse("rediss://user:hunter2@cache/1").unwrap();
        assert!(!format!("{url} {url:?}").contains("hunter2"));
        let error = RedisUrl::parse("redis://user:hunter2@cache/x").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
