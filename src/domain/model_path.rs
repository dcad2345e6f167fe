//! Which paths take a model, and which of them name it themselves (`--model-paths`).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use super::path::decode;

/// The paths of the APIs in use: OpenAI, Anthropic, Azure OpenAI, Gemini, Bedrock.
pub const STANDARD_MODEL_PATHS: &str = "/v1/chat/completions,/v1/completions,/v1/responses,/v1/embeddings,\
/v1/images/*,/v1/audio/*,/v1/moderations,/v1/messages,/v1/messages/count_tokens,/openai/deployments/{model}/**,\
/v1/models/{model}:*,/v1beta/models/{model}:*,/model/{model}/*";

/// The name that stands for the model in a pattern.
const MODEL: &str = "{model}";

/// A list of patterns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    paths: Box<[ModelPath]>,
    /// As it was written.
    text: Box<str>,
}

/// One pattern: `*` stands for a segment, `**` at the end for the rest, `{model}` for the model, `{model}:*` for the model
/// and a verb.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelPath {
    segments: Box<[Segment]>,
    takes_rest: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    /// Lower case.
    Literal(Box<str>),
    Any,
    Model,
    ModelAndVerb,
}

/// A path that takes a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakesModel {
    /// The model that the path names; where it names none, the body has to.
    pub named: Option<String>,
    /// Whether the body may be a form.
    pub takes_forms: bool,
}

impl ModelPaths {
    /// What the path says about models; `None` where it takes none.
    ///
    /// A path is taken for one of these wherever a lenient upstream might: in any case, with escapes, with a slash at its
    /// end. To be asked about paths that are not ambiguous.
    pub fn of(&self, path: &str) -> Option<TakesModel> {
        let decoded = if path.contains('%') {
            Cow::Owned(String::from_utf8(decode(path)?).ok()?)
        } else {
            Cow::Borrowed(path)
        };
        let path = decoded.strip_prefix('/')?.trim_end_matches('/');
        self.paths.iter().find_map(|pattern| pattern.matches(path))
    }
}

/// A comma list of patterns, or `none`.
impl FromStr for ModelPaths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "none" {
            return Ok(Self { paths: Box::default(), text: text.into() });
        }
        let paths: Result<Box<[ModelPath]>, String> = text
            .split(',')
            .map(|pattern| {
                let pattern = pattern.trim();
                ModelPath::parse(pattern).ok_or_else(|| {
                    format!("a list of paths, as in /v1/chat/completions,/model/{{model}}/*, or none; not {pattern:?}")
                })
            })
            .collect();
        Ok(Self { paths: paths?, text: text.into() })
    }
}

/// As it is read.
impl fmt::Display for ModelPaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The standard ones.
impl Default for ModelPaths {
    fn default() -> Self {
        STANDARD_MODEL_PATHS.parse().unwrap_or_else(|_| Self { paths: Box::default(), text: Box::default() })
    }
}

impl ModelPath {
    fn parse(text: &str) -> Option<Self> {
        let mut texts: Vec<&str> = text.strip_prefix('/')?.split('/').collect();
        let takes_rest = texts.last() == Some(&"**");
        if takes_rest {
            texts.pop();
        }
        let segments: Option<Box<[Segment]>> = texts.into_iter().map(parse_segment).collect();
        let segments = segments?;
        let models =
            segments.iter().filter(|segment| matches!(segment, Segment::Model | Segment::ModelAndVerb));
        (models.count() <= 1).then_some(Self { segments, takes_rest })
    }

    /// Held against each request of a key with a list, so it copies nothing but a model that it finds.
    fn matches(&self, path: &str) -> Option<TakesModel> {
        let mut rest = path.split('/');
        let mut named = None;
        for pattern in &self.segments {
            let segment = rest.next()?;
            match pattern {
                Segment::Literal(literal) if segment.eq_ignore_ascii_case(literal) => {}
                Segment::Any if !segment.is_empty() => {}
                Segment::Model if !segment.is_empty() => named = Some(segment),
                Segment::ModelAndVerb => {
                    let (model, _) = segment.rsplit_once(':').filter(|(model, _)| !model.is_empty())?;
                    named = Some(model);
                }
                Segment::Literal(_) | Segment::Any | Segment::Model => return None,
            }
        }
        if !self.takes_rest && rest.next().is_some() {
            return None;
        }
        // Pictures and sound are uploaded; everything else speaks JSON.
        let takes_forms = path
            .split('/')
            .any(|segment| ["images", "audio"].iter().any(|kind| segment.eq_ignore_ascii_case(kind)));
        Some(TakesModel { named: named.map(str::to_owned), takes_forms })
    }
}

fn parse_segment(text: &str) -> Option<Segment> {
    match text {
        "*" => Some(Segment::Any),
        MODEL => Some(Segment::Model),
        "{model}:*" => Some(Segment::ModelAndVerb),
        "" => None,
        _ if text.contains(['*', '{', '}', '?', '#', '%', ' ']) => None,
        _ => Some(Segment::Literal(text.to_ascii_lowercase().into())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the standard paths say of it: `none`, `body`, or the model.
    fn named(path: &str) -> String {
        match ModelPaths::default().of(path) {
            None => "none".to_owned(),
            Some(taken) => taken.named.unwrap_or_else(|| "body".to_owned()),
        }
    }

    #[test]
    fn the_paths_of_the_apis_in_use() {
        for body in [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/embeddings",
            "/v1/images/generations",
            "/v1/audio/transcriptions",
            "/v1/moderations",
            "/v1/messages",
            "/v1/chat/completions/",
            "/V1/Chat/Completions",
            "/v1/%63hat/completions",
        ] {
            assert_eq!(named(body), "body", "{body}");
        }
        for (path, model) in [
            ("/openai/deployments/my-gpt/chat/completions", "my-gpt"),
            ("/v1beta/models/gemini-2.5-pro:generateContent", "gemini-2.5-pro"),
            ("/v1beta/models/gemini-2.5-pro%3AstreamGenerateContent", "gemini-2.5-pro"),
            ("/v1/models/gemini-2.5-pro:countTokens", "gemini-2.5-pro"),
            ("/model/anthropic.claude-v2%3A0/invoke", "anthropic.claude-v2:0"),
            ("/model/x/invoke-with-response-stream", "x"),
        ] {
            assert_eq!(named(path), model, "{path}");
        }
        for none in [
            "/",
            "/v1/models",
            "/v1/models/gpt-4o",
            "/v1/files",
            "/v1/chat",
            "/v1/chat/completions/x",
            "v1/chat",
        ] {
            assert_eq!(named(none), "none", "{none}");
        }
    }

    #[test]
    fn forms_are_for_sound_and_pictures() {
        let forms = |path: &str| ModelPaths::default().of(path).unwrap().takes_forms;
        assert!(forms("/v1/audio/transcriptions") && forms("/v1/images/edits"));
        assert!(!forms("/v1/chat/completions"));
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        for text in ["v1/chat", "/v1//x", "/v1/ch*t", "/{model}/{model}", "/a/{name}", "/a/**/b", "/a b", ""]
        {
            let error = text.parse::<ModelPaths>().unwrap_err();
            assert!(error.ends_with(&format!("not {text:?}")), "{error}");
        }
        assert!("none".parse::<ModelPaths>().unwrap().of("/v1/chat/completions").is_none());
        assert_eq!("/x/**".parse::<ModelPaths>().unwrap().of("/x/y/z").unwrap().named, None);
        assert_eq!(ModelPaths::default().to_string(), STANDARD_MODEL_PATHS);
    }

    proptest! {
        #[test]
        fn any_path_is_read_without_a_panic(path in "[/a-z%0-9{}:.*é]{0,60}") {
            let _ = ModelPaths::default().of(&path);
            let _ = path.parse::<ModelPaths>();
        }
    }
}
