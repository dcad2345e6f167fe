//! The request's body as far as a decision reads it: which models it names.
//!
//! The upstream will read the same bytes, perhaps with another reader. So a body whose meaning two readers could differ
//! about is not interpreted but refused; see [`BodyDefect`].

use super::{json_body, multipart_body};

/// The body of one request, as Envoy handed it over.
#[derive(Debug, Clone, Copy, Default)]
pub struct Body<'a> {
    /// The bytes; `None` where Envoy sent none (it is not configured to, or there is no body).
    pub bytes: Option<&'a [u8]>,
    /// Whether they are all of it, unchanged.
    pub is_whole: bool,
    /// `content-encoding`; empty where there is none.
    pub encoding: &'a str,
    /// `content-type`; empty where there is none.
    pub content_type: &'a str,
}

/// Why it can't be said for certain which model a body names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyDefect {
    /// There is none.
    Missing,
    /// Envoy's buffer was too small for it. What is behind the cut could say otherwise.
    Partial,
    /// It is compressed.
    Compressed,
    /// It is not exactly one JSON object in UTF-8, or is nested too deeply; or not a plain form.
    Unreadable,
    /// `model` is named twice, or in another spelling that some readers take for the same.
    Duplicate,
    /// `model`, or a list of fallbacks, is there and is not what it should be.
    WrongType,
    /// It names no model.
    NoModel,
}

impl BodyDefect {
    /// What the caller reads: what is wrong and what to do.
    pub const fn message(self) -> &'static str {
        match self {
            Self::Missing => {
                "This API key may be used for certain models only, and the request's body, which names the model, did not reach the authorization. Send a JSON body; if you did, ask the operator to let Envoy pass it on (with_request_body)."
            }
            Self::Partial => {
                "This API key may be used for certain models only, and the request's body is too large to read its model. Send a smaller body."
            }
            Self::Compressed => {
                "This API key may be used for certain models only, and the request's body is compressed. Send it without content-encoding."
            }
            Self::Unreadable => {
                "This API key may be used for certain models only, and the request's body can't be read. Send one JSON object in UTF-8 (or, for files, a multipart form)."
            }
            Self::Duplicate => {
                "The request's body names its model more than once. Send the field \"model\" once, in lower case."
            }
            Self::WrongType => {
                "The request's body names its model in a form that is not understood. Send \"model\" as a string, and fallbacks as a list of strings."
            }
            Self::NoModel => {
                "This API key may be used for certain models only. Name one of them in the request's field \"model\"."
            }
        }
    }
}

/// Calls `each` with every model that the body names, the main one first. Forms are read only where the path takes them:
/// otherwise a body could be a form to us and JSON to the upstream.
pub fn models(body: &Body<'_>, takes_forms: bool, each: &mut dyn FnMut(&str)) -> Result<(), BodyDefect> {
    let bytes = body.bytes.filter(|bytes| !bytes.is_empty()).ok_or(BodyDefect::Missing)?;
    if !body.is_whole {
        return Err(BodyDefect::Partial);
    }
    if !body.encoding.is_empty() && !body.encoding.eq_ignore_ascii_case("identity") {
        return Err(BodyDefect::Compressed);
    }
    match multipart_body::boundary(body.content_type) {
        Some(boundary) if takes_forms => multipart_body::models(bytes, boundary?, each),
        Some(_) => Err(BodyDefect::Unreadable),
        None => json_body::models(bytes, each),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &Body<'_>) -> Result<Vec<String>, BodyDefect> {
        let mut found = Vec::new();
        models(body, true, &mut |model| found.push(model.to_owned()))?;
        Ok(found)
    }

    #[test]
    fn what_does_not_hold_the_whole_request_says_nothing() {
        let whole = Body { bytes: Some(b"{\"model\":\"a\"}"), is_whole: true, ..Body::default() };
        assert_eq!(of(&whole), Ok(vec!["a".to_owned()]));
        assert_eq!(of(&Body { encoding: "identity", ..whole }), Ok(vec!["a".to_owned()]));
        assert_eq!(of(&Body { bytes: None, ..whole }), Err(BodyDefect::Missing));
        assert_eq!(of(&Body { bytes: Some(b""), ..whole }), Err(BodyDefect::Missing));
        assert_eq!(of(&Body { is_whole: false, ..whole }), Err(BodyDefect::Partial));
        for encoding in ["gzip", "br", "identity, gzip", "x"] {
            assert_eq!(of(&Body { encoding, ..whole }), Err(BodyDefect::Compressed), "{encoding}");
        }
    }

    #[test]
    fn a_form_is_read_as_one_only_where_the_path_takes_forms() {
        let form = Body {
            bytes: Some(b"--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nw\r\n--b--\r\n"),
            is_whole: true,
            content_type: "multipart/form-data; boundary=b",
            ..Body::default()
        };
        assert_eq!(of(&form), Ok(vec!["w".to_owned()]));
        let mut ignored = |_: &str| {};
        assert_eq!(models(&form, false, &mut ignored), Err(BodyDefect::Unreadable));
    }
}
