//! Who asks, as far as fairness goes: a client's address, or the network that one client can have to itself.

use std::net::{IpAddr, Ipv6Addr};

/// The bits of an IPv6 address that tell clients apart: whoever has one address has the 2^64 beside it.
const IPV6_NETWORK: u128 = 0xffff_ffff_ffff_ffff << 64;

/// One client, to share things fairly. All clients without an address are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source(Option<IpAddr>);

impl Source {
    /// Of the client that `--client-ip` yields.
    pub fn of(client: Option<IpAddr>) -> Self {
        Self(client.map(|client| match client.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & IPV6_NETWORK)),
            address @ IpAddr::V4(_) => address,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_and_an_ipv4_address_in_any_form_are_one_source_each() {
        let of = |text: &str| Source::of(Some(text.parse().unwrap()));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("10.1.2.3"), of("::ffff:10.1.2.3"));
        assert_ne!(of("10.1.2.3"), of("10.1.2.4"));
        assert_ne!(of("0.0.0.0"), Source::of(None));
    }
}
