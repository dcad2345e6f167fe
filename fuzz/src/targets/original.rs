//! What a proxy asks over HTTP: only the proxy's own words may name the original request.
//!
//! The first line is profile, method and URI of the question; headers follow, then an empty line, then the body.

use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use keyward::server::check_view::CheckView;
use keyward::server::options::HttpProfile;
use keyward::server::original::describe;
use prost::Message as _;

use super::first_line;
use super::wire::header_lines;

pub(crate) fn run(data: &[u8]) {
    let (line, rest) = first_line(data);
    let Ok(line) = std::str::from_utf8(line) else { return };
    let mut words = line.split(' ');
    let (Some(Ok(profile)), Some(method), Some(uri), None) =
        (words.next().map(str::parse::<HttpProfile>), words.next(), words.next(), words.next())
    else {
        return;
    };
    let (head, body) = match rest.windows(2).position(|pair| pair == b"\n\n") {
        Some(end) => (&rest[..end], &rest[end + 2..]),
        None => (rest, &rest[rest.len()..]),
    };
    let Ok(request) = Request::builder().method(method).uri(uri).body(()) else { return };
    let (mut parts, ()) = request.into_parts();
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in header_lines(head) {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_bytes(value)) {
            parts.headers.append(&name, value.clone());
            headers.push((name, value));
        }
    }
    let values = |name: &str| -> Vec<&[u8]> {
        headers.iter().filter(|(own, _)| own.as_str() == name).map(|(_, value)| value.as_bytes()).collect()
    };
    let Ok(check) = describe(profile, &parts, Bytes::copy_from_slice(body)) else { return };
    let bytes = check.encode_to_vec();
    let view = CheckView::read(&bytes).expect("what prost writes is read");
    let http = view.http.expect("it is about HTTP");
    assert!(
        http.path.starts_with('/') && http.path.bytes().all(|byte| byte.is_ascii_graphic()),
        "{:?}",
        http.path
    );
    assert!(!http.method.is_empty());
    assert_eq!(view.headers.values(":path").collect::<Vec<_>>(), [http.path.as_bytes()]);
    assert_eq!(http.raw_body, body);

    let own: &[&str] = match profile {
        HttpProfile::Envoy => {
            assert_eq!(
                Some(format!("/check{}", http.path).as_str()),
                parts.uri.path_and_query().map(hyper::http::uri::PathAndQuery::as_str)
            );
            assert_eq!(http.method, method);
            &[]
        }
        HttpProfile::Nginx => {
            let urls = [values("x-original-uri"), values("x-original-url")].concat();
            let [url] = urls.as_slice() else { panic!("{} targets", urls.len()) };
            assert!(url.ends_with(http.path.as_bytes()));
            let before = &url[..url.len() - http.path.len()];
            assert!(before.is_empty() || before.starts_with(b"http://") || before.starts_with(b"https://"));
            assert!(
                !before.iter().skip(8).any(|byte| b"/?#@\\".contains(byte)),
                "{:?}",
                before.escape_ascii()
            );
            assert_eq!(values("x-original-method"), [http.method.as_bytes()]);
            &["x-original-method", "x-original-uri", "x-original-url"]
        }
        HttpProfile::Traefik | HttpProfile::Caddy => {
            assert_eq!(values("x-forwarded-uri"), [http.path.as_bytes()]);
            assert_eq!(values("x-forwarded-method"), [http.method.as_bytes()]);
            &["x-forwarded-method", "x-forwarded-uri"]
        }
    };
    for name in own {
        assert_eq!(view.headers.values(name).count(), 0, "{name} is the proxy's word");
    }
    // All others are there, unchanged; what Envoy alone may say of the body, nobody else says.
    let is_envoy = profile == HttpProfile::Envoy;
    for (name, value) in &headers {
        let name = name.as_str();
        let is_kept = if is_envoy { name != "content-length" } else { name != "x-envoy-auth-partial-body" };
        let is_kept = is_kept && !own.contains(&name);
        let is_there = view.headers.values(name).any(|own| own == value.as_bytes());
        assert_eq!(is_there, is_kept, "{name}");
    }
    let query = parts.uri.query().filter(|_| matches!(profile, HttpProfile::Nginx | HttpProfile::Traefik));
    let mut options = Vec::new();
    let query = query.unwrap_or_default().replace('+', "%2B");
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        assert!(["required_scopes", "model", "anonymous", "consistency"].contains(&&*name), "{name}");
        assert_eq!(view.extension(&name), Some(&*value));
        options.push(name);
    }
    assert_eq!(view.extensions.len(), options.len());
}
