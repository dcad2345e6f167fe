//! What an operator chooses about policy, for all keys.

use std::fmt;
use std::str::FromStr;

use super::denial::Denial;
use super::endpoint::EndpointRule;
use super::model_path::ModelPaths;
use super::path::lenient;

/// The settings of policy.
#[derive(Debug, Clone, Default)]
pub struct PolicyRules {
    /// Which paths take a model.
    pub model_paths: ModelPaths,
    /// Which scopes a path asks for, besides those of its route.
    pub scope_paths: ScopePaths,
    /// Which rules are computed and reported, and deny nothing.
    pub shadow: Shadow,
}

/// One rule of policy that can be tried out first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `allowed_ips`
    Ips,
    /// `allowed_endpoints`
    Endpoints,
    /// Scopes of route and path.
    Scopes,
    /// `allowed_models`
    Models,
    /// `budget_limit_cents`
    Budget,
}

impl Rule {
    /// All of them, in the order in which they are applied.
    pub const ALL: [Self; 5] = [Self::Ips, Self::Endpoints, Self::Scopes, Self::Models, Self::Budget];

    /// The word in settings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ips => "ips",
            Self::Endpoints => "endpoints",
            Self::Scopes => "scopes",
            Self::Models => "models",
            Self::Budget => "budget",
        }
    }
}

/// The rules that are in shadow mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shadow {
    rules: [bool; Rule::ALL.len()],
}

impl Shadow {
    /// Whether this rule denies nothing.
    pub fn covers(self, rule: Rule) -> bool {
        Rule::ALL.iter().zip(self.rules).any(|(own, is_shadowed)| *own == rule && is_shadowed)
    }

    fn names(self) -> Vec<&'static str> {
        Rule::ALL.into_iter().filter(|rule| self.covers(*rule)).map(Rule::name).collect()
    }
}

/// As it is read.
impl fmt::Display for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names();
        f.write_str(&if names.is_empty() { "none".to_owned() } else { names.join(",") })
    }
}

/// A comma list of rules, `policy` for all of them, `none`.
impl FromStr for Shadow {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut shadow = Self::default();
        if text.trim() == "none" {
            return Ok(shadow);
        }
        for word in text.split(',').map(str::trim) {
            let mut is_known = word == "policy";
            for (rule, is_shadowed) in Rule::ALL.iter().zip(&mut shadow.rules) {
                if word == "policy" || word == rule.name() {
                    (*is_shadowed, is_known) = (true, true);
                }
            }
            if !is_known {
                return Err(
                    "a list of endpoints, models, ips, scopes and budget, or policy for all, or none"
                        .to_owned(),
                );
            }
        }
        Ok(shadow)
    }
}

/// Scopes by path: `PATTERN=SCOPE`, the pattern as in `allowed_endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScopePaths {
    entries: Box<[(EndpointRule, Box<str>)]>,
    /// As it was written.
    text: Box<str>,
}

impl ScopePaths {
    /// Whether no path asks for a scope by this table.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The scopes that this request needs; all of them, where several patterns fit. A pattern fits every spelling that a
    /// lenient upstream might take for it.
    pub fn required<'a>(&'a self, method: &str, path: &str) -> impl Iterator<Item = &'a str> {
        let path = lenient(path);
        self.entries
            .iter()
            .filter(move |(rule, _)| {
                // What answers GET answers HEAD.
                rule.covers(method, &path) || (method == "HEAD" && rule.covers("GET", &path))
            })
            .map(|(_, scope)| &**scope)
    }
}

/// A comma list, or `none`.
impl FromStr for ScopePaths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "none" {
            return Ok(Self::default());
        }
        let entry = |text: &str| {
            let (pattern, scope) = text.trim().rsplit_once('=')?;
            let scope = scope.trim();
            (!scope.is_empty())
                .then(|| Some((EndpointRule::parse(pattern.trim())?.lenient(), scope.into())))?
        };
        let entries: Result<Box<[_]>, String> = text
            .split(',')
            .map(|text| {
                entry(text).ok_or_else(|| {
                    format!(
                        "a list of PATTERN=SCOPE, as in POST /v1/chat/**=chat, or none; not {:?}",
                        text.trim()
                    )
                })
            })
            .collect();
        Ok(Self { entries: entries?, text: text.trim().into() })
    }
}

/// As it is read.
impl fmt::Display for ScopePaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "none" } else { &self.text })
    }
}

/// A rule in shadow mode that would have denied the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowDenial {
    /// Which rule.
    pub rule: Rule,
    /// What it would have said.
    pub reason: Denial,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadowed_rules_are_named_one_by_one_or_all_at_once() {
        let names = |text: &str| text.parse::<Shadow>().map(Shadow::names);
        assert_eq!(names("none"), Ok(vec![]));
        assert_eq!(names("models, endpoints"), Ok(vec!["endpoints", "models"]));
        assert_eq!(names("policy"), Ok(vec!["ips", "endpoints", "scopes", "models", "budget"]));
        for wrong in ["", "proof", "models,", "none,models"] {
            assert!(names(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn scopes_by_path() {
        let paths: ScopePaths = "/v1/embeddings=embed, POST /v1/chat/**=chat,/v1/**=api".parse().unwrap();
        let required = |method: &str, path: &str| paths.required(method, path).collect::<Vec<_>>().join(" ");
        assert_eq!(required("POST", "/v1/chat/completions"), "chat api");
        assert_eq!(required("GET", "/v1/chat/completions"), "api");
        assert_eq!(required("POST", "/v1/embeddings"), "embed api");
        assert_eq!(required("GET", "/healthz"), "");
        assert!("none".parse::<ScopePaths>().unwrap().is_empty());
        for wrong in ["", "/v1/chat", "/v1/chat=", "v1=x", "/a=b,"] {
            assert!(wrong.parse::<ScopePaths>().is_err(), "{wrong}");
        }
    }
}
