//! The entries of `allowed_endpoints`: an optional method and a path pattern.

/// `/v1/chat/completions`, `POST /v1/chat/*`: `*` stands for one whole segment, `**` for any number of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EndpointRule {
    method: Option<Box<str>>,
    segments: Box<[Segment]>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Segment {
    Literal(Box<str>),
    One,
    Any,
}

impl EndpointRule {
    /// `None` where the text is no rule: a path must begin with `/`, a method is letters, and a `*` stands alone.
    pub fn parse(text: &str) -> Option<Self> {
        let (method, path) = match text.split_once(' ') {
            Some((method, path)) => (Some(parse_method(method)?), path),
            None => (None, text),
        };
        let segments: Option<Box<[Segment]>> =
            path.strip_prefix('/')?.split('/').map(parse_segment).collect();
        let segments = segments?;
        // Each `**` multiplies the ways to match; two are enough for any rule a person writes.
        if segments.iter().filter(|segment| matches!(segment, Segment::Any)).count() > 2 {
            return None;
        }
        Some(Self { method, segments })
    }

    /// The same rule for paths that went through [`super::path::lenient`].
    pub fn lenient(self) -> Self {
        let mut segments = self.segments.into_vec();
        if segments.len() > 1
            && segments.last().is_some_and(|last| matches!(last, Segment::Literal(text) if text.is_empty()))
        {
            segments.pop();
        }
        for segment in &mut segments {
            if let Segment::Literal(text) = segment {
                *text = super::path::lenient(text).into();
            }
        }
        Self { method: self.method, segments: segments.into() }
    }

    /// Whether the rule covers this method and path (without query; not ambiguous, see [`super::path`]).
    pub fn covers(&self, method: &str, path: &str) -> bool {
        if self.method.as_deref().is_some_and(|wanted| wanted != method) {
            return false;
        }
        path.strip_prefix('/').is_some_and(|rest| covers(&self.segments, Some(rest)))
    }
}

fn parse_method(method: &str) -> Option<Box<str>> {
    let is_method =
        !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-');
    is_method.then(|| method.to_ascii_uppercase().into())
}

fn parse_segment(segment: &str) -> Option<Segment> {
    match segment {
        "*" => Some(Segment::One),
        "**" => Some(Segment::Any),
        _ if segment.contains(['*', '?', '#', ' ']) => None,
        _ => Some(Segment::Literal(segment.into())),
    }
}

/// `rest` is what is left of the path behind a slash, `None` when it has ended.
fn covers(pattern: &[Segment], rest: Option<&str>) -> bool {
    let Some((first, later)) = pattern.split_first() else {
        return rest.is_none();
    };
    if matches!(first, Segment::Any) && covers(later, rest) {
        return true;
    }
    let Some(path) = rest else {
        return false;
    };
    let (segment, tail) = match path.split_once('/') {
        Some((segment, tail)) => (segment, Some(tail)),
        None => (path, None),
    };
    match first {
        Segment::Literal(literal) => **literal == *segment && covers(later, tail),
        Segment::One => !segment.is_empty() && covers(later, tail),
        Segment::Any => covers(pattern, tail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_cover_whole_segments() {
        for (rule, method, path, expected) in [
            ("/v1/chat", "GET", "/v1/chat", true),
            ("/v1/chat", "GET", "/v1/chatX", false),
            ("/v1/chat", "GET", "/v1/chat/", false),
            ("/v1/chat", "GET", "/v1", false),
            ("POST /v1/chat/*", "POST", "/v1/chat/completions", true),
            ("post /v1/chat/*", "POST", "/v1/chat/completions", true),
            ("POST /v1/chat/*", "GET", "/v1/chat/completions", false),
            ("/v1/*", "GET", "/v1/chat/completions", false),
            ("/v1/*", "GET", "/v1/", false),
            ("/v1/**", "GET", "/v1/chat/completions", true),
            ("/v1/**", "GET", "/v1", true),
            ("/v1/**", "GET", "/v2", false),
            ("/**/completions", "GET", "/v1/chat/completions", true),
            ("/**/completions", "GET", "/completions", true),
            ("/**/completions", "GET", "/v1/completions/x", false),
            ("/**", "GET", "/", true),
            ("/", "GET", "/", true),
            ("/V1", "GET", "/v1", false),
        ] {
            assert_eq!(
                EndpointRule::parse(rule).unwrap().covers(method, path),
                expected,
                "{rule} {method} {path}"
            );
        }
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in ["", "v1/chat", "GET", "GET  /v1", "G3T /v1", "/v1/chat*", "/v1?x", "*", "/**/a/**/b/**"]
        {
            assert_eq!(EndpointRule::parse(text), None, "{text:?}");
        }
    }
}
