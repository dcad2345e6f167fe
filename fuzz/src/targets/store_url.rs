//! Store URLs: whatever comes, nothing that is said about it holds the password.

use keyward::store::StoreUrl;

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if StoreUrl::parse(text).is_ok() {
        let is_known =
            ["postgres://", "postgresql://", "sqlite:"].iter().any(|scheme| text.starts_with(scheme));
        assert!(is_known, "{text:?}");
    }
    // The rest of a SQLite address is a path.
    let Some((_, rest)) = text.split_once("://").filter(|_| !text.starts_with("sqlite:")) else { return };
    hold_back(text, login_secret(rest), said);
    if let Some((_, query)) = rest.split_once('?') {
        for option in query.split('&') {
            hold_back(text, option.strip_prefix("password="), said);
        }
    }
}

fn said(text: &str) -> String {
    match StoreUrl::parse(text) {
        Ok(url) => format!("{url} {url:?}"),
        Err(error) => format!("{error} {error:?}"),
    }
}

/// What stands between the first colon and the first at sign.
pub(crate) fn login_secret(rest: &str) -> Option<&str> {
    let (login, _) = rest.split_once('@').filter(|(login, _)| !login.contains(['/', '?', '#']))?;
    login.split_once(':').map(|(_, secret)| secret)
}

/// What is said about an address does not follow its password.
pub(crate) fn hold_back(text: &str, secret: Option<&str>, said: fn(&str) -> String) {
    // One that stands elsewhere too may be said from there, and a short one is found in any text.
    let Some(secret) = secret.filter(|secret| secret.len() >= 4 && text.matches(*secret).count() == 1) else {
        return;
    };
    let with_another = text.replace(secret, &"Zq7".repeat(secret.len()));
    let (own, other) = (said(text), said(&with_another));
    assert!(!own.contains(secret) || other.contains(secret), "{own:?} holds the password");
}
