//! Connecting where a URL names several hosts: the first one that is a primary.
//!
//! tokio-postgres can look for a host that takes writes (`target_session_attrs=read-write`), but a role that may only
//! read looks read-only on the primary too, and ours is best such a role. So each host is asked whether it recovers.

use std::pin::Pin;
use std::time::Duration;

use deadpool_postgres::Connect;
use tokio::task::JoinHandle;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Config, Connection, Error, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How long one of several hosts may take where the URL does not say.
pub(super) const HOST_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection, to be driven.
type Driven = Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

/// Drives a connection in a task of its own.
type Drive<'a> = dyn Fn(Driven) -> JoinHandle<()> + Send + Sync + 'a;

/// Tries the hosts in turn.
pub(super) struct PrimaryFirst {
    /// One for each host, in the URL's order.
    hosts: Vec<Config>,
    all: Config,
    tls: MakeRustlsConnect,
}

impl PrimaryFirst {
    pub(super) fn new(config: &Config, tls: MakeRustlsConnect) -> Self {
        Self { hosts: single_hosts(config), all: config.clone(), tls }
    }

    /// A session on the first primary; where there is none, on a standby (whose use is refused, with the reason).
    pub(super) async fn connect_with(&self, drive: &Drive<'_>) -> Result<(Client, JoinHandle<()>), Error> {
        let mut standby = None;
        let mut failure = None;
        for host in &self.hosts {
            if self.hosts.len() == 1 {
                return connect(host, self.tls.clone(), drive).await;
            }
            let limit = host.get_connect_timeout().copied().unwrap_or(HOST_TIMEOUT);
            let attempt = async {
                let (client, task) = connect(host, self.tls.clone(), drive).await?;
                Ok((is_primary(&client).await, client, task))
            };
            match tokio::time::timeout(limit, attempt).await {
                Ok(Ok((true, client, task))) => return Ok((client, task)),
                Ok(Ok((false, client, task))) => standby = Some((client, task)),
                Ok(Err(error)) => failure = Some(error),
                // A frozen host must not keep us from the next one.
                Err(_) => {}
            }
        }
        match (standby, failure) {
            (Some(session), _) => Ok(session),
            (None, Some(error)) => Err(error),
            // All are silent: wait for any of them, until the pool gives up.
            (None, None) => connect(&self.all, self.tls.clone(), drive).await,
        }
    }
}

impl Connect for PrimaryFirst {
    fn connect(
        &self,
        _config: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + '_>> {
        // Ends with the client, which the pool owns; the error that ends it reaches the query that it ends.
        Box::pin(self.connect_with(&|connection| {
            tokio::spawn(async move {
                let _ = connection.await;
            })
        }))
    }
}

async fn connect(
    config: &Config,
    tls: MakeRustlsConnect,
    drive: &Drive<'_>,
) -> Result<(Client, JoinHandle<()>), Error> {
    let (client, connection) = config.connect(tls).await?;
    Ok((client, drive(connection)))
}

async fn is_primary(client: &Client) -> bool {
    let Ok(answer) = client.simple_query("SELECT pg_is_in_recovery()").await else {
        return false;
    };
    answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("f")))
}

fn single_hosts(config: &Config) -> Vec<Config> {
    let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
    let count = hosts.len().max(addresses.len());
    if count < 2 {
        return vec![config.clone()];
    }
    (0..count)
        .map(|index| {
            let mut single = without_hosts(config);
            match hosts.get(index) {
                Some(tokio_postgres::config::Host::Tcp(name)) => {
                    single.host(name);
                }
                Some(tokio_postgres::config::Host::Unix(path)) => {
                    single.host_path(path);
                }
                None => {}
            }
            if let Some(address) = addresses.get(index) {
                single.hostaddr(*address);
            }
            if let Some(port) = config.get_ports().get(index).or_else(|| config.get_ports().first()) {
                single.port(*port);
            }
            single
        })
        .collect()
}

fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(name) = config.get_dbname() {
        copy.dbname(name);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .channel_binding(config.get_channel_binding())
        .target_session_attrs(config.get_target_session_attrs())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_gets_all_the_options() {
        let url = "postgres://ada:pw@a:1,b:2/keys?application_name=x&keepalives_idle=7&sslmode=require\
                   &options=-c%20a%3Db&connect_timeout=3&tcp_user_timeout=4&target_session_attrs=read-write";
        let hosts = single_hosts(&url.parse().unwrap());
        assert_eq!(hosts.len(), 2);
        for (host, expected) in hosts.iter().zip(["a:1", "b:2"]) {
            let alone: Config = url.replace("a:1,b:2", expected).parse().unwrap();
            assert_eq!(*host, alone);
        }
    }
}
