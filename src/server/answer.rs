//! An answer as it goes over the wire, and how an allow is put together from what was written before.
//!
//! Most of an allow is the same for every request with a key. That part is written once, kept with the key's record, and
//! copied; what depends on the request is written behind it: in a message the order of fields does not matter.

use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
use hyper::body::Bytes;
use prost::Message;

use super::protobuf::{field_length, put_bytes, put_head};

/// What gRPC puts before a message: not compressed, and its length.
const GRPC_HEAD: usize = 5;

/// Fields of `CheckResponse`.
const OK_RESPONSE: u32 = 3;
const DYNAMIC_METADATA: u32 = 4;

/// Fields of `OkHttpResponse`.
const HEADERS: u32 = 2;
const HEADERS_TO_REMOVE: u32 = 5;
const QUERY_PARAMETERS_TO_REMOVE: u32 = 8;

/// The end of a `HeaderValueOption`: `append_action` with `OVERWRITE_IF_EXISTS_OR_ADD`. Explicitly, because the default
/// action appends on some Envoy versions.
const OVERWRITE: [u8; 2] = [0x18, 0x02];

/// `status` with the code 0, which *is* the allow: written out, although an empty message would say the same.
const ALLOWED: [u8; 2] = [0x0a, 0x00];

/// The bytes of a `CheckResponse`, behind the head that gRPC wants.
pub struct Answer(Vec<u8>);

impl Answer {
    /// Any answer; of an allow by [`AllowWriter`] there is less to do.
    pub fn of(response: &CheckResponse) -> Self {
        let mut bytes = Vec::with_capacity(response.encoded_len().saturating_add(GRPC_HEAD));
        bytes.resize(GRPC_HEAD, 0);
        // Only a buffer that can't grow could be too small.
        let _ = response.encode(&mut bytes);
        Self(bytes)
    }

    /// As one message of gRPC.
    pub fn into_grpc(mut self) -> Bytes {
        let length = u32::try_from(self.0.len().saturating_sub(GRPC_HEAD)).unwrap_or(u32::MAX);
        if let Some((head, _)) = self.0.split_first_chunk_mut::<GRPC_HEAD>() {
            let [_, length_bytes @ ..] = head;
            *length_bytes = length.to_be_bytes();
        }
        Bytes::from(self.0)
    }

    /// As others read it. `None` never happens to what was written here, and stands for no allow.
    pub fn read(&self) -> Option<CheckResponse> {
        CheckResponse::decode(self.0.get(GRPC_HEAD..)?).ok()
    }
}

/// What an allow consists of: fields of `OkHttpResponse`, and fields of the `Struct` of its metadata.
#[derive(Default)]
pub struct AllowWriter<'a> {
    /// Written before: for all allows, for all of a key, for all of its rights.
    pub prepared: [&'a [u8]; 3],
    /// Written for this request.
    pub response: Vec<u8>,
    /// Facts, written before: of a key, of its rights.
    pub prepared_facts: [&'a [u8]; 2],
    /// Facts, written for this request.
    pub facts: Vec<u8>,
}

impl AllowWriter<'_> {
    /// The allow. Whoever calls this has a permit, or the route's word that nobody needs one.
    pub(super) fn finish(self) -> Answer {
        let length = |parts: &[&[u8]], own: &[u8]| {
            parts.iter().map(|part| part.len()).fold(own.len(), usize::saturating_add)
        };
        let response = length(&self.prepared, &self.response);
        let facts = length(&self.prepared_facts, &self.facts);
        let message = ALLOWED
            .len()
            .saturating_add(field_length(OK_RESPONSE, response))
            .saturating_add(field_length(DYNAMIC_METADATA, facts));
        let mut bytes = Vec::with_capacity(message.saturating_add(GRPC_HEAD));
        bytes.extend_from_slice(&[0; GRPC_HEAD]);
        bytes.extend_from_slice(&ALLOWED);
        put_head(&mut bytes, OK_RESPONSE, response);
        for part in self.prepared {
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&self.response);
        put_head(&mut bytes, DYNAMIC_METADATA, facts);
        for part in self.prepared_facts {
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&self.facts);
        Answer(bytes)
    }
}

/// A header of an allow that overwrites what the caller sent under its name: a field of `OkHttpResponse`.
pub(super) fn put_header(to: &mut Vec<u8>, name: &str, value: &str) {
    let header = field_length(1, name.len()).saturating_add(field_length(2, value.len()));
    put_head(to, HEADERS, field_length(1, header).saturating_add(OVERWRITE.len()));
    put_head(to, 1, header);
    put_bytes(to, 1, name.as_bytes());
    put_bytes(to, 2, value.as_bytes());
    to.extend_from_slice(&OVERWRITE);
}

/// A header that is taken out of an allowed request: a field of `OkHttpResponse`.
pub(super) fn put_removal(to: &mut Vec<u8>, name: &str) {
    put_bytes(to, HEADERS_TO_REMOVE, name.as_bytes());
}

/// A query parameter that is taken out of an allowed request, by its spelling: a field of `OkHttpResponse`.
pub(super) fn put_query_removal(to: &mut Vec<u8>, spelling: &str) {
    put_bytes(to, QUERY_PARAMETERS_TO_REMOVE, spelling.as_bytes());
}
