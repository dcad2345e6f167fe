//! Readers of single arguments. What they accept, the store can hold and the decision can use.

use std::time::Duration;

use crate::domain::endpoint::EndpointRule;
use crate::domain::network::NetworkRule;
use crate::domain::record::UserId;
use crate::domain::time::Timestamp;
use crate::store::admin::UserRef;

type Reading<T> = Result<T, String>;

/// Digits are an id, anything else a username.
pub(super) fn user_ref(text: &str) -> Reading<UserRef> {
    if text.is_empty() {
        return Err("expected an id or a username".to_owned());
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(UserRef::Username(text.to_owned()));
    }
    text.parse().map(|id| UserRef::Id(UserId::new(id))).map_err(|_| "expected a smaller id".to_owned())
}

/// A username that [`user_ref`] does not take for an id.
pub(super) fn username(text: &str) -> Reading<String> {
    let name = plain(text)?;
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("expected a name that is not a number, because a number means an id".to_owned());
    }
    Ok(name)
}

pub(super) fn email(text: &str) -> Reading<String> {
    let address = plain(text)?;
    let is_address = address.split_once('@').is_some_and(|(name, host)| !name.is_empty() && !host.is_empty());
    if is_address && !address.contains(' ') {
        Ok(address)
    } else {
        Err("expected an address with an @".to_owned())
    }
}

/// Text that is not empty, without control characters and blanks around it.
pub(super) fn plain(text: &str) -> Reading<String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("expected a text that is not empty".to_owned());
    }
    if text.contains(char::is_control) {
        return Err("expected a text without control characters".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn network(text: &str) -> Reading<String> {
    let text = plain(text)?;
    NetworkRule::parse(&text)
        .map(|_| text)
        .ok_or_else(|| "expected an address or a network such as 10.0.0.0/8 or 2001:db8::/32".to_owned())
}

pub(super) fn endpoint(text: &str) -> Reading<String> {
    let text = plain(text)?;
    EndpointRule::parse(&text).map(|_| text).ok_or_else(|| {
        "expected a path such as /v1/chat/completions or a method and a pattern such as 'POST /v1/chat/*'"
            .to_owned()
    })
}

/// A key's id.
pub(super) fn key_id(text: &str) -> Reading<i64> {
    let id = text.parse().ok().filter(|id| *id > 0);
    id.ok_or_else(|| "expected the id of a key, a number; see `keyward key list`".to_owned())
}

/// As many as the columns hold.
pub(super) fn count(text: &str) -> Reading<u32> {
    const MOST: u32 = i32::MAX.unsigned_abs();
    let count = text.parse().ok().filter(|count| *count <= MOST);
    count.ok_or_else(|| format!("expected a number from 0 to {MOST}"))
}

/// How long from now.
pub(super) fn lifetime(text: &str) -> Reading<Duration> {
    let duration = humantime::parse_duration(text).ok().filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| "expected a duration longer than none, such as 30d or 12h".to_owned())
}

/// RFC 3339, or a date or time without zone, which is UTC as in the store.
pub(super) fn moment(text: &str) -> Reading<Timestamp> {
    let time = text.parse::<jiff::Timestamp>().or_else(|_| {
        let naive: jiff::civil::DateTime = text.parse()?;
        naive.to_zoned(jiff::tz::TimeZone::UTC).map(|zoned| zoned.timestamp())
    });
    time.map(|time| Timestamp::from_microseconds(time.as_microsecond())).map_err(|_| {
        "expected a time such as 2030-01-31T12:00:00Z, or a date, which means 00:00 UTC".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_ids_and_no_username_is_digits() {
        assert_eq!(user_ref("7"), Ok(UserRef::Id(UserId::new(7))));
        assert_eq!(user_ref("alice"), Ok(UserRef::Username("alice".into())));
        assert_eq!(user_ref("7a"), Ok(UserRef::Username("7a".into())));
        assert!(user_ref("").is_err());
        assert!(user_ref("99999999999999999999").is_err());
        assert!(username("7").is_err());
        assert_eq!(username(" alice ").as_deref(), Ok("alice"));
    }

    #[test]
    fn times_without_zone_are_utc() {
        let micros = |text| moment(text).unwrap().as_microseconds();
        assert_eq!(micros("1970-01-02"), 86_400_000_000);
        assert_eq!(micros("1970-01-02T00:00:00"), 86_400_000_000);
        assert_eq!(micros("1970-01-02T00:00:00Z"), 86_400_000_000);
        assert_eq!(micros("1970-01-02T02:00:00+02:00"), 86_400_000_000);
        for text in ["", "tomorrow", "2030-13-01", "2030-02-30", "12:00"] {
            assert!(moment(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn restrictions_that_would_make_the_policy_invalid_are_refused() {
        for text in ["", "10.0.0.0/33", "example.com", "010.0.0.1"] {
            assert!(network(text).is_err(), "{text:?}");
        }
        for text in ["", "v1/chat", "POST", "/v1/cha*", "/v1?x=1"] {
            assert!(endpoint(text).is_err(), "{text:?}");
        }
        assert_eq!(endpoint(" POST /v1/chat/* ").as_deref(), Ok("POST /v1/chat/*"));
        assert!(plain("a\nb").is_err());
        assert!(email("alice").is_err() && email("@").is_err() && email("a b@c").is_err());
        assert!(lifetime("0s").is_err() && lifetime("soon").is_err() && lifetime("30d").is_ok());
    }
}
