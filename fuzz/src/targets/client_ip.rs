//! Who the client is, by `x-forwarded-for`, by a header and by the peer, against a plain reading.
//!
//! The first line is the position from the right, the second one the peer, the others are values of `x-forwarded-for`.

use std::net::IpAddr;

use hyper::HeaderMap;
use keyward::server::check_view::CheckView;
use keyward::server::options::ClientIpSource;
use keyward::server::request::Inbound;

use super::lines;
use super::wire::Parts;

pub(crate) fn run(data: &[u8]) {
    let Some((position, rest)) = lines(data) else { return };
    let (peer, values) = rest.split_once('\n').unwrap_or((rest, ""));
    let Ok(source) = format!("xff:{position}").parse::<ClientIpSource>() else {
        assert!(!position.parse::<usize>().is_ok_and(|position| position > 0), "{position:?}");
        return;
    };
    let position: usize = position.parse().expect("a position is a number");
    let values: Vec<&str> = values.split('\n').collect();
    let headers = values.iter().map(|value| ("x-forwarded-for", value.as_bytes())).collect();
    let message = Parts { source: Some(peer), headers, ..Parts::default() }.encode();
    let view = CheckView::read(&message).expect("what prost writes is read");
    let client = |source: &ClientIpSource| {
        Inbound::read(&view, &HeaderMap::new(), source).expect("it is about HTTP").request.client
    };
    // Envoy joins with a comma what came in several lines.
    let joined = values.join(",");
    let all: Vec<&str> = joined.split(',').collect();
    let expected = all.len().checked_sub(position).and_then(|at| all[at].trim().parse::<IpAddr>().ok());
    assert_eq!(client(&source), expected, "{position} of {joined:?}");
    assert_eq!(client(&ClientIpSource::Peer), peer.parse().ok());
    // A header that holds one address is sent once.
    let alone = if values.len() == 1 { values[0].trim().parse().ok() } else { None };
    assert_eq!(client(&ClientIpSource::Header("x-forwarded-for".to_owned())), alone);
}
