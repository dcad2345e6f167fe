use super::*;

#[test]
fn passwords_are_not_shown() {
    for (url, shown) in [
        ("postgres://u:pw@h/db", "postgres://u:[redacted]@h/db"),
        ("postgres://u:p@w/x@h/db", "postgres://u:[redacted]@h/db"),
        ("postgres://u@h/db", "postgres://u@h/db"),
        ("redis://:pw@h:6379/0", "redis://:[redacted]@h:6379/0"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("postgres://h/db?user=u&password=pw&a=b", "postgres://h/db?user=u&password=[redacted]&a=b"),
        ("postgres://u:p?w@h/db", "postgres://u:[redacted]@h/db"),
        ("sqlite:keyward.db", "sqlite:keyward.db"),
    ] {
        let secret = SecretUrl::from(url.to_owned());
        assert_eq!(secret.to_string(), shown);
        assert!(!format!("{secret:?}").contains("pw"), "{secret:?}");
        assert_eq!(secret.expose_secret(), url);
    }
}

#[test]
fn sizes_with_and_without_unit() {
    let read = |text| size(text, 1024..=(1 << 30));
    for (text, bytes) in
        [("8MiB", 8 << 20), ("8 MiB", 8 << 20), ("8388608", 8 << 20), ("2 kB", 2000), ("1GiB", 1 << 30)]
    {
        assert_eq!(read(text), Ok(bytes), "{text}");
    }
    for text in ["", "MiB", "8mib", "8 Mi", "-1", "1.5MiB", "1023", "2GiB", "99999999999999999999GiB", "é"] {
        assert!(read(text).is_err(), "{text:?}");
    }
}

#[test]
fn durations_need_a_unit_and_stay_in_range() {
    let read = |text| duration(text, SECOND..=DAY);
    assert_eq!(read("5m"), Ok(Duration::from_mins(5)));
    assert_eq!(read("1h 30m"), Ok(Duration::from_mins(90)));
    for text in ["", "300", "0s", "25h", "-5s", "5 parsecs"] {
        assert!(read(text).is_err(), "{text:?}");
    }
    assert!(read("0s").unwrap_err().contains("from 1s to 1day"));
}

#[test]
fn threads_are_never_zero() {
    assert!(threads("auto", 0).unwrap() >= 1);
    assert_eq!(threads("auto", usize::MAX), Ok(1));
    assert_eq!(threads("1024", 0), Ok(1024));
    assert!(threads("0", 0).is_err());
    assert!(threads("1025", 0).is_err());
}

#[test]
fn a_response_header_prefix_can_not_reach_envoys_own_headers() {
    for text in ["", "X-Keyward-", "x-envoy-", "x-envoy-auth-", ":", "a b", "x\n"] {
        assert!(header_prefix(text).is_err(), "{text:?}");
    }
    assert_eq!(header_prefix("x-auth-").as_deref(), Ok("x-auth-"));
}

#[test]
fn a_misspelt_level_is_no_module() {
    for text in ["", "inof", "INFO,", "keyward=loud", "=debug"] {
        assert!(log_level(text).is_err(), "{text:?}");
    }
    assert!(log_level("info,keyward::cache=debug").is_ok());
}

#[test]
fn a_list_names_its_bad_item_and_refuses_repetitions() {
    assert_eq!(list::<IdentityHeader>("key-id, role"), Ok(vec![IdentityHeader::KeyId, IdentityHeader::Role]));
    assert_eq!(list::<IdentityHeader>("none"), Ok(Vec::new()));
    assert!(list::<IdentityHeader>("key-id,key-id").unwrap_err().contains("only once"));
    assert!(list::<IdentityHeader>("key-id,").is_err());
    assert!(credential_sources("none").is_err());
}
