//! Endpoint rules, against a matcher that tries every way.
//!
//! The first line is the rule, the second one the method and the path.

use keyward::domain::endpoint::EndpointRule;
use keyward::domain::path::{is_ambiguous, lenient};

use super::lines;

pub(crate) fn run(data: &[u8]) {
    let Some((rule, request)) = lines(data) else { return };
    let request = request.split('\n').next().unwrap_or_default();
    let (method, path) = request.split_once(' ').unwrap_or(("GET", request));
    // Trying every way takes long.
    if rule.len() > 64 || path.len() > 64 {
        return;
    }
    let parsed = EndpointRule::parse(rule);
    let read = naive_rule(rule);
    assert_eq!(parsed.is_some(), read.is_some(), "{rule:?}");
    let (Some(parsed), Some((wanted, pattern))) = (parsed, read) else { return };
    let covers = parsed.covers(method, path);
    let fits = path.strip_prefix('/').is_some_and(|rest| {
        let segments: Vec<&str> = rest.split('/').collect();
        fits(&pattern, &segments)
    });
    let by_method = wanted.is_none_or(|wanted| wanted == method);
    assert_eq!(covers, fits && by_method, "{rule:?} {method:?} {path:?}");
    // A rule with an empty segment in its middle is about no path that is let through to it.
    let is_sane = !rule.contains("//");
    if covers && is_sane && !is_ambiguous(path) {
        assert!(
            parsed.lenient().covers(method, &lenient(path)),
            "a lenient rule covers more: {rule:?} {path:?}"
        );
    }
}

fn naive_rule(rule: &str) -> Option<(Option<String>, Vec<&str>)> {
    let (method, path) = match rule.split_once(' ') {
        Some((method, path)) => (Some(method.to_ascii_uppercase()), path),
        None => (None, rule),
    };
    if let Some(method) = &method
        && (method.is_empty() || !method.chars().all(|letter| matches!(letter, 'A'..='Z' | '-')))
    {
        return None;
    }
    let pattern: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let is_good = |segment: &&str| match *segment {
        "*" | "**" => true,
        other => !other.chars().any(|letter| "*?# ".contains(letter)),
    };
    let too_many = pattern.iter().filter(|segment| **segment == "**").count() > 2;
    (!too_many && pattern.iter().all(is_good)).then_some((method, pattern))
}

/// `**` may stand for any number of segments: each number is tried.
fn fits(pattern: &[&str], segments: &[&str]) -> bool {
    match pattern.split_first() {
        None => segments.is_empty(),
        Some((&"**", later)) => (0..=segments.len()).any(|taken| fits(later, &segments[taken..])),
        Some((first, later)) => segments.split_first().is_some_and(|(segment, rest)| {
            (first == segment || (*first == "*" && !segment.is_empty())) && fits(later, rest)
        }),
    }
}
