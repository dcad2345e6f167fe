use std::io::Write;

use tempfile::NamedTempFile;

use super::super::values::Shown;
use super::*;

fn environment(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn mistakes(given: Given) -> String {
    load(given).unwrap_err().to_string()
}

/// A text for each setting that is valid and not the default.
fn other_text(setting: &Setting) -> &'static str {
    match setting.flag {
        "grpc-listen" => "unix:/tmp/k,127.0.0.1:9190",
        "grpc-tls-cert" | "grpc-tls-key" | "grpc-tls-client-ca" | "http-tls-cert" | "http-tls-key"
        | "http-tls-client-ca" => "/pem",
        "socket-mode" => "0600",
        "grpc-tls-client-sans" | "http-tls-client-sans" => "envoy.example.com,spiffe://a/b,10.0.0.7",
        "http-listen" => "unix:/tmp/h",
        "http-profile" => "caddy",
        "admin-listen" => "127.0.0.1:1",
        "worker-threads" | "verify-threads" | "attempts-per-minute" | "lookups-per-second" => "77",
        "drain-delay"
        | "cache-record-ttl"
        | "record-ttl-without-feed"
        | "cache-verdict-ttl"
        | "cache-negative-ttl"
        | "last-used-interval"
        | "lease"
        | "outage-grace"
        | "max-connection-age"
        | "check-timeout" => "7s",
        "store" => "sqlite:other.db",
        "redis" => "redis://h",
        "cache-secret-file" => "/secret",
        "deny-file" => "/deny",
        "key-prefix-length" => "12",
        "credential-conflict" => "first",
        "credential-sources" => "query:key",
        "cache-max-entries" => "9",
        "response-header-prefix" => "x-a-",
        "response-headers" => "role",
        "client-ip" => "xff:2",
        "forward-credentials" | "canary" | "reuse-port" => "on",
        "on-unavailable" => "error",
        "new-key-prefix" => "ab_",
        "error-format" => "google",
        "shadow" => "endpoints,models",
        "model-paths" => "/m/{model}/*",
        "scope-paths" => "/v1/**=api",
        "max-check-bytes" => "4096",
        "otlp-endpoint" => "http://collector:4317",
        "otlp-protocol" => "http",
        "otlp-sample" => "0.5",
        "log-format" => "json",
        "log-level" => "debug",
        "decision-log" => "stdout",
        "decision-log-sample" => "0.5%",
        other => panic!("a setting without a test value: {other}"),
    }
}

fn yaml(setting: &Setting, text: &str) -> String {
    match setting.file_key() {
        (group, Some(key)) => format!("{group}: {{{key}: '{text}'}}\n"),
        (key, None) => format!("{key}: '{text}'\n"),
    }
}

fn value_of(loaded: &Loaded, flag: &str) -> (String, &'static str) {
    let effective = loaded.effective();
    let found = effective.iter().find(|effective| effective.setting.flag == flag).unwrap();
    (found.value.clone(), found.origin.layer())
}

#[test]
fn every_setting_can_be_given_in_every_layer_and_the_stronger_layer_wins() {
    for setting in TABLE {
        let text = other_text(setting);
        // Redis needs its secret; give it by a layer that does not matter here.
        let mut base = vec![];
        if setting.flag == "redis" {
            base.push(("KEYWARD_CACHE_SECRET_FILE", "/secret"));
        }
        // Nor does TLS stand by halves.
        base.extend(match setting.flag {
            "grpc-tls-cert" => vec![("KEYWARD_GRPC_TLS_KEY", "/pem")],
            "grpc-tls-key" => vec![("KEYWARD_GRPC_TLS_CERT", "/pem")],
            "grpc-tls-client-ca" => {
                vec![("KEYWARD_GRPC_TLS_CERT", "/pem"), ("KEYWARD_GRPC_TLS_KEY", "/pem")]
            }
            "grpc-tls-client-sans" => vec![
                ("KEYWARD_GRPC_TLS_CERT", "/pem"),
                ("KEYWARD_GRPC_TLS_KEY", "/pem"),
                ("KEYWARD_GRPC_TLS_CLIENT_CA", "/pem"),
            ],
            "http-tls-cert" => vec![("KEYWARD_HTTP_TLS_KEY", "/pem")],
            "http-tls-key" => vec![("KEYWARD_HTTP_TLS_CERT", "/pem")],
            "http-tls-client-ca" => {
                vec![("KEYWARD_HTTP_TLS_CERT", "/pem"), ("KEYWARD_HTTP_TLS_KEY", "/pem")]
            }
            "http-tls-client-sans" => vec![
                ("KEYWARD_HTTP_TLS_CERT", "/pem"),
                ("KEYWARD_HTTP_TLS_KEY", "/pem"),
                ("KEYWARD_HTTP_TLS_CLIENT_CA", "/pem"),
            ],
            _ => vec![],
        });
        let variable = setting.variable();
        let with = |in_flag: Option<&str>, in_environment: Option<&str>, in_file: Option<&str>| {
            let is_given = in_flag.or(in_environment).or(in_file).is_some();
            let mut pairs = if is_given { base.clone() } else { vec![] };
            pairs.extend(in_environment.map(|text| (variable.as_str(), text)));
            let written = in_file.map(|text| file(&yaml(setting, text)));
            let loaded = load(Given {
                file: written.as_ref().map(|file| file.path().to_owned()),
                flags: in_flag.map(|text| (setting.flag, text.to_owned())).into_iter().collect(),
                environment: environment(&pairs),
            });
            value_of(&loaded.unwrap(), setting.flag)
        };
        let (default, layer) = with(None, None, None);
        assert_eq!(layer, "default");
        for (expected, found) in [
            ("flag", with(Some(text), Some(setting.default), Some(setting.default))),
            ("environment", with(None, Some(text), Some(setting.default))),
            ("file", with(None, None, Some(text))),
        ] {
            assert_ne!(found.0, default, "--{}", setting.flag);
            assert_eq!(found.1, expected, "--{}", setting.flag);
        }
    }
}

/// What `config print` shows can be given back.
#[test]
fn shown_values_are_read_as_the_same_values() {
    let first = load(Given::default()).unwrap();
    let flags =
        first.effective().into_iter().map(|effective| (effective.setting.flag, effective.value)).collect();
    let second = load(Given { flags, ..Given::default() }).unwrap();
    assert_eq!(format!("{:?}", first.settings), format!("{:?}", second.settings));
}

#[test]
fn defaults_are_the_contracts() {
    let settings = load(Given::default()).unwrap().settings;
    assert_eq!(settings.grpc_listen.shown(), "127.0.0.1:9191");
    assert_eq!(settings.admin_listen.to_string(), "127.0.0.1:9193");
    assert_eq!(settings.store.expose_secret(), "sqlite:keyward.db");
    assert_eq!(settings.cache_record_ttl.as_secs(), 300);
    assert_eq!(settings.record_ttl_without_feed.as_secs(), 5);
    assert_eq!(settings.cache_verdict_ttl.as_secs(), 3600);
    assert_eq!(settings.cache_negative_ttl.as_secs(), 2);
    assert_eq!(settings.check_timeout.as_millis(), 180);
    assert_eq!(settings.max_check_bytes, 8 << 20);
    assert_eq!(settings.response_headers.len(), 15);
    let headers = settings.response_headers.shown();
    assert!(!headers.contains("name") && !headers.contains("email"), "{headers}");
    assert!(
        settings.redis.is_none() && settings.cache_secret_file.is_none() && !settings.forward_credentials
    );
}

/// Nothing is encrypted until it is asked for, so nothing may be reached from elsewhere until then either.
#[test]
fn nothing_listens_beyond_the_machine_by_default() {
    let settings = load(Given::default()).unwrap().settings;
    let address = |shown: &str| shown.parse::<std::net::SocketAddr>().unwrap().ip();
    assert!(address(&settings.grpc_listen.shown()).is_loopback());
    assert!(settings.admin_listen.ip().is_loopback());
    assert!(settings.http_listen.is_none());
}

#[test]
fn all_mistakes_of_all_layers_are_reported_each_with_its_place() {
    let written = file("grpc:\n  listen: nowhere\nkey: {prefix_length: 65}\n");
    let text = mistakes(Given {
        file: Some(written.path().to_owned()),
        flags: [("check-timeout", "0ms".to_owned())].into(),
        environment: environment(&[("KEYWARD_ON_UNAVAILABLE", "allow"), ("KEYWARD_GRPC_LISTN", "x")]),
    });
    let path = written.path().display();
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(
        text.contains(&format!("{path}:2 grpc.listen: \"nowhere\" is not valid, expected an IP address")),
        "{text}"
    );
    assert!(
        text.contains(&format!("{path}:3 key.prefix_length: \"65\" is not valid, expected a whole number")),
        "{text}"
    );
    assert!(text.contains("--check-timeout: \"0ms\" is not valid, expected a duration"), "{text}");
    assert!(
        text.contains("KEYWARD_ON_UNAVAILABLE: \"allow\" is not valid, expected one of deny, error"),
        "{text}"
    );
    assert!(text.contains("variable KEYWARD_GRPC_LISTN; did you mean KEYWARD_GRPC_LISTEN?"), "{text}");
}

#[test]
fn a_bad_value_is_refused_also_where_a_stronger_layer_overrules_it() {
    let text = mistakes(Given {
        flags: [("client-ip", "peer".to_owned())].into(),
        environment: environment(&[("KEYWARD_CLIENT_IP", "xff")]),
        ..Given::default()
    });
    assert!(text.starts_with("KEYWARD_CLIENT_IP: \"xff\""), "{text}");
}

#[test]
fn a_bad_url_is_not_repeated() {
    let text = mistakes(Given {
        environment: environment(&[
            ("KEYWARD_STORE", "mysql://u:hunter2@h/db"),
            ("KEYWARD_REDIS", "hunter2"),
        ]),
        ..Given::default()
    });
    assert!(!text.contains("hunter2"), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn redis_needs_the_secret_that_seals() {
    let given = |pairs| Given { environment: environment(pairs), ..Given::default() };
    let text = mistakes(given(&[("KEYWARD_REDIS", "redis://h")]));
    assert!(text.starts_with("KEYWARD_REDIS: expected --cache-secret-file"), "{text}");
    let both = given(&[("KEYWARD_REDIS", "redis://h"), ("KEYWARD_CACHE_SECRET_FILE", "/secret")]);
    assert!(load(both).is_ok());
}

/// It would be taken from the caller and set for the upstream under one name.
#[test]
fn a_header_for_the_upstream_is_no_credential_source() {
    let with = |source: &str, prefix: &str| {
        let flags =
            [("credential-sources", source.to_owned()), ("response-header-prefix", prefix.to_owned())];
        load(Given { flags: flags.into(), ..Given::default() }).is_ok()
    };
    assert!(!with("bearer,header:x-keyward-role", "x-keyward-"));
    assert!(with("bearer,header:x-keyward-role", "x-auth-"));
    assert!(with("bearer,header:x-keyward-secret", "x-keyward-"));
}

#[test]
fn the_file_is_found_by_its_variable_and_the_flag_beats_it() {
    let by_variable = file("log: {level: warn}");
    let by_flag = file("log: {level: error}");
    let pairs = environment(&[("KEYWARD_CONFIG", by_variable.path().to_str().unwrap())]);
    let given = Given { environment: pairs.clone(), ..Given::default() };
    assert_eq!(load(given).unwrap().settings.log_level, "warn");
    let given = Given { environment: pairs, file: Some(by_flag.path().to_owned()), ..Given::default() };
    assert_eq!(load(given).unwrap().settings.log_level, "error");
}

#[test]
fn an_unreadable_file_is_refused_by_name() {
    let text = mistakes(Given { file: Some("/nowhere/k.yaml".into()), ..Given::default() });
    assert!(text.starts_with("/nowhere/k.yaml: can't be read: "), "{text}");
    let directory = tempfile::tempdir().unwrap();
    assert!(load(Given { file: Some(directory.path().to_owned()), ..Given::default() }).is_err());
}

/// A service named `keyward` in the same namespace must not keep the sidecar from starting.
#[test]
fn variables_of_kubernetes_services_are_not_ours() {
    let pairs = environment(&[
        ("KEYWARD_SERVICE_HOST", "10.0.0.1"),
        ("KEYWARD_SERVICE_PORT", "9191"),
        ("KEYWARD_SERVICE_PORT_GRPC", "9191"),
        ("KEYWARD_PORT", "tcp://10.0.0.1:9191"),
        ("KEYWARD_PORT_9191_TCP", "tcp://10.0.0.1:9191"),
        ("KEYWARD_PORT_9191_TCP_ADDR", "10.0.0.1"),
        ("KEYWARD_REDIS_PORT_6379_TCP_PROTO", "tcp"),
        ("KEYWARD_REDIS_SERVICE_HOST", "10.0.0.2"),
        ("PATH", "/bin"),
    ]);
    assert!(load(Given { environment: pairs, ..Given::default() }).is_ok());
}

#[test]
fn a_misspelt_variable_is_refused_and_a_foreign_one_is_named() {
    for (misspelt, meant) in
        [("KEYWARD_STOR", "KEYWARD_STORE"), ("KEYWARD_CREDENTIAL_CONFLCT", "KEYWARD_CREDENTIAL_CONFLICT")]
    {
        let text = mistakes(Given { environment: environment(&[(misspelt, "x")]), ..Given::default() });
        assert!(text.contains(&format!("{misspelt}; did you mean {meant}?")), "{text}");
    }
    let pairs = environment(&[("KEYWARD_BIN", "/usr/bin/keyward"), ("KEYWARD_ENVOY", "/usr/bin/envoy")]);
    let loaded = load(Given { environment: pairs, ..Given::default() }).unwrap();
    assert_eq!(loaded.ignored, ["KEYWARD_BIN", "KEYWARD_ENVOY"]);
}

#[test]
fn a_file_without_end_and_an_empty_name_are_refused() {
    let text = mistakes(Given { file: Some("/dev/zero".into()), ..Given::default() });
    assert!(text.contains("larger than 1 MiB"), "{text}");
    let pairs = environment(&[("KEYWARD_CONFIG", "")]);
    let text = mistakes(Given { environment: pairs, ..Given::default() });
    assert!(text.contains("KEYWARD_CONFIG is empty"), "{text}");
}

#[test]
fn a_file_with_a_password_that_others_may_read_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keyward.yaml");
    let named = |text: &str, mode: u32| {
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let given = Given { file: Some(path.clone()), ..Given::default() };
        load(given).unwrap().open_file.is_some()
    };
    let secret = "store: postgres://u:pw@h/db";
    assert!(named(secret, 0o644) && named(secret, 0o640));
    assert!(!named(secret, 0o600));
    assert!(!named("store: postgres://u@h/db", 0o644), "nothing in it is a secret");
}

#[test]
fn a_changed_password_differs_though_it_is_never_shown() {
    let with = |variable: &str, text: &str| {
        let pairs = [(variable, text), ("KEYWARD_CACHE_SECRET_FILE", "/secret")];
        load(Given { environment: environment(&pairs), ..Given::default() }).unwrap().settings
    };
    let flags = |a: &Settings, b: &Settings| -> Vec<&str> {
        a.differing(b).iter().map(|setting| setting.flag).collect()
    };
    for (variable, flag, url) in
        [("KEYWARD_STORE", "store", "postgres://u:PASS@h/d"), ("KEYWARD_REDIS", "redis", "redis://:PASS@h")]
    {
        let one = with(variable, &url.replace("PASS", "one"));
        assert_eq!(flags(&one, &with(variable, &url.replace("PASS", "two"))), [flag]);
        assert!(flags(&one, &one.clone()).is_empty());
    }
    let (info, debug) = (with("KEYWARD_LOG_LEVEL", "info"), with("KEYWARD_LOG_LEVEL", "debug"));
    assert_eq!(flags(&info, &debug), ["log-level"]);
}

#[test]
fn tls_by_halves_is_told_with_what_is_missing() {
    for (given, expected) in [
        (&[("KEYWARD_GRPC_TLS_CERT", "/c")][..], "KEYWARD_GRPC_TLS_CERT: expected --grpc-tls-key too"),
        (&[("KEYWARD_GRPC_TLS_KEY", "/k")], "KEYWARD_GRPC_TLS_KEY: expected --grpc-tls-cert too"),
        (&[("KEYWARD_GRPC_TLS_CLIENT_CA", "/a")], "KEYWARD_GRPC_TLS_CLIENT_CA: expected --grpc-tls-cert and"),
        (
            &[("KEYWARD_GRPC_TLS_CLIENT_SANS", "a.b")],
            "KEYWARD_GRPC_TLS_CLIENT_SANS: expected --grpc-tls-client-ca",
        ),
        (&[("KEYWARD_HTTP_TLS_CERT", "/c")], "KEYWARD_HTTP_TLS_CERT: expected --http-tls-key too"),
        (&[("KEYWARD_HTTP_TLS_KEY", "/k")], "KEYWARD_HTTP_TLS_KEY: expected --http-tls-cert too"),
        (&[("KEYWARD_HTTP_TLS_CLIENT_CA", "/a")], "KEYWARD_HTTP_TLS_CLIENT_CA: expected --http-tls-cert and"),
        (
            &[("KEYWARD_HTTP_TLS_CLIENT_SANS", "a.b")],
            "KEYWARD_HTTP_TLS_CLIENT_SANS: expected --http-tls-client-ca",
        ),
    ] {
        let text = mistakes(Given { environment: environment(given), ..Given::default() });
        assert!(text.contains(expected) && text.lines().count() == 1, "{text}");
    }
}
