//! The model that a form names (`multipart/form-data`, RFC 7578): for uploads of sound and pictures.
//!
//! As strict as the JSON reader: it begins with the boundary, every part has one plain `content-disposition`, ends where
//! it says, and `model` is there once. Files are jumped over.

use super::body::BodyDefect;

const MAX_MODEL_BYTES: usize = 512;
const MAX_PARTS: usize = 256;
/// RFC 2046.
const MAX_BOUNDARY: usize = 70;
/// Of one part.
const MAX_HEADER_BYTES: usize = 8 * 1024;

/// The boundary of a form's content type: `None` where it is no form, an error where it is one that can't be read.
pub(super) fn boundary(content_type: &str) -> Option<Result<&str, BodyDefect>> {
    let (kind, parameters) = content_type.split_once(';').unwrap_or((content_type, ""));
    if !kind.trim().get(..10).is_some_and(|kind| kind.eq_ignore_ascii_case("multipart/")) {
        return None;
    }
    Some(read_boundary(kind.trim(), parameters).ok_or(BodyDefect::Unreadable))
}

fn read_boundary<'a>(kind: &str, parameters: &'a str) -> Option<&'a str> {
    if !kind.eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let mut found = None;
    for parameter in parameters.split(';') {
        let (name, value) = parameter.trim().split_once('=')?;
        if name.eq_ignore_ascii_case("boundary") {
            if found.is_some() {
                return None;
            }
            found = Some(value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value));
        }
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=?".contains(&byte);
    found.filter(|text| (1..=MAX_BOUNDARY).contains(&text.len()) && text.bytes().all(is_plain))
}

/// Calls `each` with the form's model.
pub(super) fn models(bytes: &[u8], boundary: &str, each: &mut dyn FnMut(&str)) -> Result<(), BodyDefect> {
    let delimiter = format!("\r\n--{boundary}");
    let finder = memchr::memmem::Finder::new(delimiter.as_bytes());
    // No preamble: some readers skip one, others read it.
    let mut rest = bytes.strip_prefix(delimiter.get(2..).unwrap_or_default().as_bytes());
    let mut model = None;
    for _ in 0..MAX_PARTS {
        let part = match rest.ok_or(BodyDefect::Unreadable)? {
            [b'-', b'-'] | [b'-', b'-', b'\r', b'\n'] => {
                each(model.ok_or(BodyDefect::NoModel)?);
                return Ok(());
            }
            [b'\r', b'\n', part @ ..] => part,
            _ => return Err(BodyDefect::Unreadable),
        };
        let end = memchr::memmem::find(part.get(..MAX_HEADER_BYTES).unwrap_or(part), b"\r\n\r\n");
        let (header, content) = part.split_at(end.ok_or(BodyDefect::Unreadable)?);
        // The blank line itself is not content; the boundary may follow at once, so its line break is left.
        let content = content.get(2..).unwrap_or_default();
        let length = finder.find(content).ok_or(BodyDefect::Unreadable)?;
        let name = field_name(header).ok_or(BodyDefect::Unreadable)?;
        let value = content.get(2..length);
        if name.eq_ignore_ascii_case("model") {
            if model.is_some() || name != "model" {
                return Err(BodyDefect::Duplicate);
            }
            let text = value.filter(|value| value.len() <= MAX_MODEL_BYTES).ok_or(BodyDefect::WrongType)?;
            model = Some(std::str::from_utf8(text).map_err(|_| BodyDefect::WrongType)?);
        }
        rest = content.get(length.saturating_add(delimiter.len())..);
    }
    Err(BodyDefect::Unreadable)
}

/// The name of a part: of its one `content-disposition`, quoted or a token, without escapes.
fn field_name(header: &[u8]) -> Option<&str> {
    let mut found = None;
    for line in std::str::from_utf8(header).ok()?.split("\r\n") {
        // A folded or odd line is read differently by different readers; to some a lone line break ends one.
        let (name, value) = line
            .split_once(':')
            .filter(|_| !line.contains(|letter: char| letter.is_ascii_control() && letter != '\t'))?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return None;
        }
        if !name.eq_ignore_ascii_case("content-disposition") {
            // An encoded value (RFC 7578 deprecates it) is one that we would not read.
            if name.eq_ignore_ascii_case("content-transfer-encoding") {
                return None;
            }
            continue;
        }
        if found.is_some() {
            return None;
        }
        found = Some(disposition_name(value)?);
    }
    found
}

fn disposition_name(value: &str) -> Option<&str> {
    let mut rest = value.trim().strip_prefix("form-data")?;
    let mut found = None;
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return found;
        }
        let (name, behind) = rest.strip_prefix(';')?.split_once('=')?;
        let (value, behind) = match behind.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => behind.split_at(behind.find([';', ' ']).unwrap_or(behind.len())),
        };
        let name = name.trim();
        // Otherwise a parameter without a value would hide the one behind it from us, but not from everybody.
        if !is_token(name) {
            return None;
        }
        // `name*` (RFC 5987) is read by some and not by others.
        if name.len() >= 4 && name.get(..4)?.eq_ignore_ascii_case("name") {
            if found.is_some() || name != "name" || value.contains(['\\', '%', '&']) {
                return None;
            }
            found = Some(value);
        } else if value.contains('\\') || looks_like_a_name(value) {
            // An escaped quote would move the end of this value; and some look for the name without a look at quotes.
            return None;
        }
        rest = behind;
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_*.".contains(&byte))
}

fn looks_like_a_name(value: &str) -> bool {
    value.contains('=') && value.to_ascii_lowercase().contains("name")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(body: &[u8]) -> Result<Vec<String>, BodyDefect> {
        let mut found = Vec::new();
        models(body, "b1", &mut |model| found.push(model.to_owned()))?;
        Ok(found)
    }

    fn part(disposition: &str, content: &str) -> String {
        format!("--b1\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{content}\r\n")
    }

    const FILE: &str = "name=\"file\"; filename=\"a b.mp3\"";

    #[test]
    fn the_model_is_found_among_files() {
        let whole = |parts: &[String]| of(format!("{}--b1--\r\n", parts.concat()).as_bytes());
        let (file, model) =
            (part(FILE, "\0\r\n--b\r\n\r\nname=\"model\""), part("name=\"model\"", "whisper-1"));
        assert_eq!(whole(&[file.clone(), model.clone()]), Ok(vec!["whisper-1".to_owned()]));
        assert_eq!(whole(&[model.clone(), file.clone()]), Ok(vec!["whisper-1".to_owned()]));
        assert_eq!(whole(&[part("name=model", "w")]), Ok(vec!["w".to_owned()]));
        assert_eq!(whole(&[part("name=\"model\"", "")]), Ok(vec![String::new()]));
        assert_eq!(whole(&[file]), Err(BodyDefect::NoModel));
        assert_eq!(whole(&[model.clone(), model]), Err(BodyDefect::Duplicate));
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let model = part("name=\"model\"", "w");
        let end = "--b1--\r\n";
        for body in [
            String::new(),
            "--b1--".replace("b1", "b2"),
            model.clone(),
            format!("preamble\r\n{model}{end}"),
            format!("{model}{end}epilogue"),
            format!("{}{end}", part("name=\"model\"; name=\"x\"", "w")),
            format!("{}{end}", part("name*=utf-8''model", "w")),
            format!("{}{end}", part("filename=\"a\\\"; name=\\\"model\"; name=\"x\"", "w")),
            format!("{}{end}", part("name=\"mo%64el\"", "w")),
            format!("--b1\r\n\r\nw\r\n{end}"),
            format!("--b1\r\nContent-Disposition: form-data; name=\"model\"\r\n folded: x\r\n\r\nw\r\n{end}"),
            format!(
                "--b1\r\nContent-Disposition: form-data; name=\"x\"\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nw\r\n{end}"
            ),
            format!(
                "--b1\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ndw==\r\n{end}"
            ),
            format!("--b1\nContent-Disposition: form-data; name=\"model\"\n\nw\n{end}"),
            format!(
                "{}{end}",
                part("name=\"x\"\r\nX: a\nContent-Disposition: form-data; name=\"model\"", "w")
            ),
            format!(
                "{}{end}",
                part("name=\"x\"\r\nX: a\rContent-Disposition: form-data; name=\"model\"", "w")
            ),
            format!("{}{end}", part("name=\"model\"; filename=\"a\0\"", "w")),
            format!("{}{end}", part("x; name=\"model\"; name=\"x\"", "w")),
            format!("{}{end}", part("filename=\"a name=model\"; name=\"x\"", "w")),
            format!("{}{end}", part("filename=\"a; Name = model;\"; name=\"x\"", "w")),
        ] {
            assert_eq!(of(body.as_bytes()), Err(BodyDefect::Unreadable), "{body:?}");
        }
        let odd = format!("{}{end}", part("name=\"Model\"", "w"));
        assert_eq!(of(odd.as_bytes()), Err(BodyDefect::Duplicate));
    }

    #[test]
    fn boundaries() {
        for (content_type, expected) in [
            ("multipart/form-data; boundary=b1", Some(Ok("b1"))),
            ("Multipart/Form-Data; charset=utf-8; Boundary=\"b1\"", Some(Ok("b1"))),
            ("application/json", None),
            ("", None),
            ("multipart/form-data", Some(Err(BodyDefect::Unreadable))),
            ("multipart/mixed; boundary=b1", Some(Err(BodyDefect::Unreadable))),
            ("multipart/form-data; boundary=a; boundary=b", Some(Err(BodyDefect::Unreadable))),
            ("multipart/form-data; boundary=\"a b\"", Some(Err(BodyDefect::Unreadable))),
            ("multipart/form-data; boundary=", Some(Err(BodyDefect::Unreadable))),
        ] {
            assert_eq!(boundary(content_type), expected, "{content_type}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[-b1\r\n:;=\" a-z]{0,120}") {
            let _ = of(&bytes);
            let _ = of(format!("--b1\r\n{text}").as_bytes());
            let _ = boundary(&text);
            let _ = field_name(text.as_bytes());
        }
    }
}
