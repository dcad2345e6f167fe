//! The model of a form, against the crate `multer`.
//!
//! Ours refuses much that `multer` reads, so one direction is held: of a form that ours reads, `multer` must not read
//! another model. The first line is the content type, the rest is the body.

use keyward::domain::body::{self, Body};

use super::first_line;

pub(crate) fn run(data: &[u8]) {
    let (content_type, bytes) = first_line(data);
    let Ok(content_type) = std::str::from_utf8(content_type) else { return };
    let content_type = content_type.trim_end_matches('\r');
    let body = Body { bytes: Some(bytes), is_whole: true, encoding: "", content_type };
    let mut found = Vec::new();
    let outcome = body::models(&body, true, &mut |model| found.push(model.to_owned()));
    let is_form = content_type.to_ascii_lowercase().trim_start().starts_with("multipart/");
    if outcome.is_err() || !is_form {
        assert!(found.is_empty() || !is_form, "{found:?} of a form that is refused");
        return;
    }
    assert_eq!(found.len(), 1);
    // What `multer` can't read it does not take for anything.
    if let Ok(theirs) = models(content_type, bytes) {
        assert_eq!(theirs, found);
    }
}

fn models(content_type: &str, bytes: &[u8]) -> Result<Vec<String>, multer::Error> {
    let boundary = multer::parse_boundary(content_type)?;
    let bytes = hyper::body::Bytes::copy_from_slice(bytes);
    let stream = tokio_stream::once(Ok::<_, std::convert::Infallible>(bytes));
    let mut form = multer::Multipart::new(stream, boundary);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut models = Vec::new();
        while let Some(field) = form.next_field().await? {
            let is_model = field.name().is_some_and(|name| name.eq_ignore_ascii_case("model"));
            let value = field.bytes().await?;
            if is_model {
                models.push(String::from_utf8_lossy(&value).into_owned());
            }
        }
        Ok(models)
    })
}
