//! Networks and addresses, against `std::net` and plain bits.
//!
//! The first line is the rule, the second one the client.

use std::net::IpAddr;

use keyward::domain::network::NetworkRule;

use super::lines;

pub(crate) fn run(data: &[u8]) {
    let Some((rule, client)) = lines(data) else { return };
    let parsed = NetworkRule::parse(rule);
    let read = naive_network(rule);
    assert_eq!(parsed.is_some(), read.is_some(), "{rule:?}");
    let (Some(parsed), Some((network, length))) = (parsed, read) else { return };
    // The network's own address is in it, and so is the client that the fuzzer found, or not.
    let own = rule.split('/').next().unwrap_or_default();
    for text in [own, client] {
        let Ok(client) = text.parse::<IpAddr>() else { continue };
        assert_eq!(parsed.contains(client), contains(network, length, client), "{rule:?} {client}");
    }
}

/// Address and length.
fn naive_network(text: &str) -> Option<(IpAddr, u8)> {
    let Some((address, length)) = text.split_once('/') else {
        let address: IpAddr = text.parse().ok()?;
        return Some((address, bits(address)));
    };
    let address: IpAddr = address.parse().ok()?;
    let value: u8 = length.parse().ok()?;
    // The one way to write it.
    let length = Some(value).filter(|value| value.to_string() == length)?;
    (length <= bits(address)).then_some((address, length))
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Everything as 128 bits, in which version 4 has its place at `::ffff:0:0/96`.
fn contains(network: IpAddr, length: u8, client: IpAddr) -> bool {
    let wide = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let is_mapped = |address: IpAddr| wide(address) >> 32 == 0xffff;
    let length = if network.is_ipv4() { length + 96 } else { length };
    // A wide version 6 network is about version 6, although the mapped addresses would lie in it.
    if is_mapped(client) && (length < 96 || !is_mapped(network)) {
        return false;
    }
    let kept = 128 - u32::from(length);
    let cut = |address: u128| address.checked_shr(kept).unwrap_or(0);
    cut(wide(network)) == cut(wide(client))
}
