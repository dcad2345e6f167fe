//! Redis addresses: whatever comes, nothing that is said about it holds the password.

use keyward::cache::redis_url::RedisUrl;

use super::store_url::{hold_back, login_secret};

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some((scheme, rest)) = text.split_once("://") else {
        assert!(RedisUrl::parse(text).is_err());
        return;
    };
    if let Ok(url) = RedisUrl::parse(text) {
        assert!(["redis", "rediss", "redis+unix"].contains(&scheme), "{text:?}");
        assert!(!rest.contains('#'), "a fragment switches verification off: {text:?}");
        let shown = url.to_string();
        assert!(shown.starts_with(&format!("{scheme}://")), "{text:?} became {shown:?}");
    }
    hold_back(text, login_secret(rest), said);
    if let (true, Some((_, query))) = (scheme == "redis+unix", rest.split_once('?')) {
        for option in query.split('&') {
            hold_back(text, option.strip_prefix("pass="), said);
        }
    }
}

fn said(text: &str) -> String {
    match RedisUrl::parse(text) {
        Ok(url) => format!("{url} {url:?}"),
        Err(error) => format!("{error} {error:?}"),
    }
}
