//! The naive implementation. It shares no parser with Keyward and works on what the generator *meant* (lists of entries,
//! "this column is broken", "this body is cut off"), while Keyward reads what the generator *wrote*.

use std::net::IpAddr;

use keyward::domain::denial::Denial;
use keyward::domain::row::CandidateRow;

use super::NOW;
use super::bodies::Asked;
use super::generate::{Ask, Column, DENIED_ID, DENIED_PREFIX, Key, Settings};

/// One way to fail: the reason, the word that puts it in shadow (none: never), and whether it holds.
type Failure = (Denial, &'static str, fn(&Settings, &Key, &Ask) -> bool);

/// The rules in the contract's order: the first that is broken is the reason. A new rule is one more line.
pub(super) const FAILURES: [Failure; 13] = [
    (Denial::KeyInactive, "", |_, key, _| key.row.is_active != Some(true) || is_on_the_deny_list(key)),
    (Denial::KeyExpired, "", |_, key, _| matches!(key.row.expires_at, Some(end) if end < NOW)),
    (Denial::UserInactive, "", |_, key, _| !owner_may_act(&key.row)),
    (Denial::PolicyInvalid, "", |_, key, _| is_unreadable(key)),
    (Denial::IpNotAllowed, "ips", |_, key, ask| {
        let inside = |client| key.networks().iter().any(|network| is_inside(*network, client));
        key.lists.ips.is_restricting() && !ask.client.map(number).is_some_and(inside)
    }),
    (Denial::AmbiguousRequest, "endpoints", |_, key, ask| {
        key.lists.endpoints.is_restricting() && is_odd(ask.path.as_bytes())
    }),
    (Denial::EndpointNotAllowed, "endpoints", |_, key, ask| {
        key.lists.endpoints.is_restricting()
            && !key.lists.endpoints.entries().iter().any(|rule| endpoint_fits(rule, ask))
    }),
    (Denial::AmbiguousRequest, "scopes", |settings, key, ask| {
        let has_table = !settings.scope_paths.is_empty();
        has_table && key.row.is_superuser != Some(true) && is_odd(ask.path.as_bytes())
    }),
    (Denial::ScopeMissing, "scopes", |settings, key, ask| {
        let own = key.lists.scopes.entries();
        let by_path =
            settings.scope_paths.iter().filter(|(rule, _)| endpoint_fits_in_any_spelling(rule, ask));
        let mut all = ask.scopes.iter().chain(by_path.map(|(_, scope)| scope));
        key.row.is_superuser != Some(true) && all.any(|scope| !own.iter().any(|one| one == scope))
    }),
    (Denial::AmbiguousRequest, "models", |_, key, ask| {
        key.lists.models.is_restricting() && is_odd(ask.path.as_bytes())
    }),
    (Denial::ModelNotAllowed, "models", |_, key, ask| {
        let fits = |rule: &String, model: &String| text_fits(rule.as_bytes(), model.as_bytes());
        let is_admitted = |model: &String| key.lists.models.entries().iter().any(|rule| fits(rule, model));
        key.lists.models.is_restricting() && !models(ask).iter().all(is_admitted)
    }),
    (Denial::AmbiguousRequest, "models", |_, key, ask| {
        let asks_nothing = ["GET", "DELETE"].contains(&ask.method);
        let may_be_so = match (takes_model(&ask.path), &ask.body.asked) {
            (Takes::Named(_), _) | (_, Asked::For(_)) => true,
            (_, Asked::Twice) | (Takes::Body, Asked::Unclear) => false,
            (Takes::None, _) => true,
            (Takes::Body, Asked::Nothing) => !ask.model.is_empty() || asks_nothing,
            (Takes::Body, Asked::OnlyFallbacks(_)) => !ask.model.is_empty(),
        };
        key.lists.models.is_restricting() && !may_be_so
    }),
    (Denial::InsufficientQuota, "budget", |_, key, _| {
        match (key.row.is_unlimited, key.row.budget_limit_cents) {
            (Some(true), _) | (_, None) => false,
            (_, Some(limit)) => spent(&key.row) >= limit,
        }
    }),
];

pub(super) fn decide(settings: &Settings, key: &Key, ask: &Ask) -> Option<Denial> {
    let counts = |shadow: &str| !settings.shadow.contains(&shadow);
    FAILURES
        .iter()
        .find(|(_, shadow, is_broken)| counts(shadow) && is_broken(settings, key, ask))
        .map(|(reason, ..)| *reason)
}

/// What the paths that the generator writes say about models, in the standard table.
enum Takes {
    None,
    Body,
    Named(String),
}

fn takes_model(path: &str) -> Takes {
    if is_odd(path.as_bytes()) {
        return Takes::None;
    }
    let plain = unescaped(path);
    let plain = plain.strip_suffix('/').unwrap_or(&plain);
    match plain.split('/').collect::<Vec<_>>()[..] {
        ["", "model", model, _] => Takes::Named(model.to_owned()),
        _ if ["/v1/chat/completions", "/v1/completions", "/v1/messages"]
            .contains(&plain.to_lowercase().as_str()) =>
        {
            Takes::Body
        }
        _ => Takes::None,
    }
}

/// Each that the request names, wherever.
fn models(ask: &Ask) -> Vec<String> {
    let mut models = vec![ask.model.to_owned()];
    if let Takes::Named(model) = takes_model(&ask.path) {
        models.push(model);
    }
    models.retain(|model| !model.is_empty());
    if let Asked::For(named) | Asked::OnlyFallbacks(named) = &ask.body.asked {
        models.extend(named.iter().map(|model| (*model).to_owned()));
    }
    models
}

fn unescaped(path: &str) -> String {
    let mut parts = path.split('%');
    let mut bytes = parts.next().unwrap().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(part[2..].bytes());
    }
    String::from_utf8(bytes).unwrap()
}

fn is_on_the_deny_list(key: &Key) -> bool {
    key.row.key_id == DENIED_ID || key.row.key_prefix.as_deref() == Some(DENIED_PREFIX)
}

fn owner_may_act(row: &CandidateRow) -> bool {
    match (row.user_id, row.user_is_active, row.account_locked, row.account_locked_until) {
        (Some(_), Some(true), _, Some(end)) => end < NOW,
        (Some(_), Some(true), Some(true), None) => false,
        (Some(_), Some(true), _, None) => true,
        _ => false,
    }
}

fn is_unreadable(key: &Key) -> bool {
    let row = &key.row;
    let numbers =
        [row.rate_limit_per_minute, row.rate_limit_per_hour, row.rate_limit_per_day, row.budget_limit_cents];
    !row.unreadable.is_empty()
        || key.lists.all().iter().any(|column| matches!(column, Column::Broken(_)))
        || numbers.into_iter().flatten().any(|number| number < 0)
        || !matches!(row.budget_type.as_deref(), None | Some("total" | "monthly"))
}

fn spent(row: &CandidateRow) -> i64 {
    match (row.budget_type.as_deref(), row.month_cost, row.total_cost) {
        (Some("monthly"), Some(month), _) => month,
        (_, _, total) => total.unwrap_or(0),
    }
}

/// Every address is one number; v4 lies where v6 has its mapped form.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => 0xffff_0000_0000 + u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// A network that is wider than the mapped range is about v6 alone.
fn is_inside((base, length): (u128, u32), client: u128) -> bool {
    let is_mapped = client >> 32 == 0xffff;
    (0..length).all(|bit| base >> (127 - bit) & 1 == client >> (127 - bit) & 1)
        && (length >= 96 || !is_mapped)
}

/// Reads the spellings that the generator writes: dotted, hexadecimal, `::`, and a `/length`.
pub(super) fn network(text: &str) -> (u128, u32) {
    let (address, length) =
        text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
    let length = length.map(|length| length.parse::<u32>().unwrap());
    if !address.contains(':') {
        return (0xffff_0000_0000 + dotted(address), length.unwrap_or(32) + 96);
    }
    let (left, right) = address.split_once("::").unwrap_or((address, ""));
    let (left, right) = (groups(left), groups(right));
    let gap = vec![0; 8 - left.len() - right.len()];
    let all = [left, gap, right].concat();
    (all.iter().fold(0, |sum, group| sum << 16 | group), length.unwrap_or(128))
}

fn groups(text: &str) -> Vec<u128> {
    let parts = text.split(':').filter(|part| !part.is_empty());
    parts
        .flat_map(|part| {
            if part.contains('.') {
                vec![dotted(part) >> 16, dotted(part) & 0xffff]
            } else {
                vec![u128::from_str_radix(part, 16).unwrap()]
            }
        })
        .collect()
}

fn dotted(text: &str) -> u128 {
    text.split('.').fold(0, |sum, part| sum << 8 | part.parse::<u128>().unwrap())
}

fn endpoint_fits(rule: &str, ask: &Ask) -> bool {
    let (method, pattern) = rule.split_once(' ').unwrap_or((ask.method, rule));
    let (pattern, path): (Vec<&str>, Vec<&str>) =
        (pattern.split('/').collect(), ask.path.split('/').collect());
    method.to_uppercase() == ask.method && segments_fit(&pattern, &path)
}

/// Where a rule asks for something, no spelling gets around it.
fn endpoint_fits_in_any_spelling(rule: &str, ask: &Ask) -> bool {
    let (method, pattern) = rule.split_once(' ').unwrap_or((ask.method, rule));
    let path = unescaped(&ask.path).to_lowercase();
    let path = if path == "/" { &path } else { path.strip_suffix('/').unwrap_or(&path) };
    let (pattern, path): (Vec<&str>, Vec<&str>) = (pattern.split('/').collect(), path.split('/').collect());
    method.to_uppercase() == ask.method && segments_fit(&pattern, &path)
}

fn segments_fit(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        (["**", later @ ..], []) => segments_fit(later, path),
        (["**", later @ ..], [_, rest @ ..]) => segments_fit(later, path) || segments_fit(pattern, rest),
        (["*", later @ ..], [one, rest @ ..]) => !one.is_empty() && segments_fit(later, rest),
        ([own, later @ ..], [one, rest @ ..]) => own == one && segments_fit(later, rest),
        _ => false,
    }
}

fn text_fits(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', later @ ..], []) => text_fits(later, text),
        ([b'*', later @ ..], [_, rest @ ..]) => text_fits(later, text) || text_fits(pattern, rest),
        ([own, later @ ..], [one, rest @ ..]) => own == one && text_fits(later, rest),
        _ => false,
    }
}

fn is_odd(path: &[u8]) -> bool {
    match path {
        [b'/', rest @ ..] => is_odd_behind_slash(rest, Vec::new()),
        _ => true,
    }
}

/// `segment` is what has been read of this segment, decoded. An empty one is fine at the path's end alone.
fn is_odd_behind_slash(rest: &[u8], mut segment: Vec<u8>) -> bool {
    let ends_badly = |segment: &[u8]| {
        matches!(segment.trim_ascii(), b"." | b"..") || std::str::from_utf8(segment).is_err()
    };
    match rest {
        [] => ends_badly(&segment),
        [b'/', ..] if segment.is_empty() => true,
        [b'/', later @ ..] => ends_badly(&segment) || is_odd_behind_slash(later, Vec::new()),
        [b'%', high, low, later @ ..] => match (hexadecimal(*high), hexadecimal(*low)) {
            (Some(high), Some(low)) => {
                let byte = high * 16 + low;
                segment.push(byte);
                matches!(byte, b'/' | b'%') || is_special(byte) || is_odd_behind_slash(later, segment)
            }
            _ => true,
        },
        [b'%', ..] => true,
        [byte, later @ ..] => {
            segment.push(*byte);
            is_special(*byte) || is_odd_behind_slash(later, segment)
        }
    }
}

fn is_special(byte: u8) -> bool {
    br"\;#?".contains(&byte) || byte.is_ascii_control()
}

fn hexadecimal(digit: u8) -> Option<u8> {
    let place = b"0123456789abcdef".iter().position(|own| *own == digit.to_ascii_lowercase())?;
    u8::try_from(place).ok()
}
