//! Models: as requests name them, and the entries of `allowed_models`, names and patterns with `*`.

use smallvec::SmallVec;

/// Names that are not longer lie within the value: nearly all of them.
const USUAL_BYTES: usize = 48;

/// A model as a request names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName(SmallVec<[u8; USUAL_BYTES]>);

impl ModelName {
    /// A copy of the text.
    pub fn new(text: &str) -> Self {
        Self(SmallVec::from_slice(text.as_bytes()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        // It was text when it was put in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// One model name or pattern. `*` stands for any characters, everything else for itself, and the whole name has to fit:
/// `bedrock/*` does not admit `bedrockz/x`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelRule(Box<str>);

impl ModelRule {
    /// Any text that is not empty.
    pub fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.into()))
    }

    /// The rule as stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the rule covers this model. Bytes are compared, so case counts.
    pub fn covers(&self, model: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = parts.next().and_then(|beginning| model.strip_prefix(beginning)) else {
            return false;
        };
        let Some(end) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            // The first place that fits leaves most for the parts behind it.
            let Some((_, behind)) = rest.split_once(part) else {
                return false;
            };
            rest = behind;
        }
        rest.ends_with(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_are_anchored_at_both_ends() {
        for (rule, model, expected) in [
            ("gpt-4o", "gpt-4o", true),
            ("gpt-4o", "gpt-4o-mini", false),
            ("gpt-4o", "GPT-4o", false),
            ("gpt-4o*", "gpt-4o", true),
            ("gpt-4o*", "gpt-4o-mini", true),
            ("bedrock/*", "bedrockz/x", false),
            ("*-mini", "gpt-4o-mini", true),
            ("*-mini", "gpt-4o-mini-2", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("ab*ba", "aba", false),
            ("a**b", "ab", true),
            ("*", "anything", true),
            ("*", "", true),
        ] {
            assert_eq!(ModelRule::parse(rule).unwrap().covers(model), expected, "{rule} {model}");
        }
    }

    /// Tries every way to fill the stars: slow and plainly right.
    fn reference(rule: &[u8], model: &[u8]) -> bool {
        match rule.split_first() {
            None => model.is_empty(),
            Some((b'*', rest)) => (0..=model.len()).any(|skip| reference(rest, &model[skip..])),
            Some((own, rest)) => {
                model.split_first().is_some_and(|(byte, behind)| own == byte && reference(rest, behind))
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_reference(rule in "[ab*]{1,8}", model in "[ab]{0,10}") {
            prop_assert_eq!(ModelRule::parse(&rule).unwrap().covers(&model), reference(rule.as_bytes(), model.as_bytes()));
        }
    }
}
