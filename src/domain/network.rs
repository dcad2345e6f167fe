//! Client addresses and the networks of an address list.

use std::net::IpAddr;

use ipnet::IpNet;

/// One entry of `allowed_ips`: an address or a CIDR network. A v4-mapped v6 network counts as its v4 form, so that
/// either spelling of a client is met by either spelling of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkRule(IpNet);

impl NetworkRule {
    /// Strict parsing: no octal, no short forms, no zone ids. `None` = the entry is no network.
    pub fn parse(text: &str) -> Option<Self> {
        let Some((address, length)) = text.split_once('/') else {
            return Some(Self(canonical_network(IpNet::from(text.parse::<IpAddr>().ok()?))));
        };
        // Not by `IpNet`'s own reader, which takes `010` for ten where others take it for eight.
        let is_plain =
            length.bytes().all(|byte| byte.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
        let length = length.parse().ok().filter(|_| is_plain)?;
        IpNet::new(address.parse().ok()?, length).ok().map(|network| Self(canonical_network(network)))
    }

    /// Whether the client is in this network.
    pub fn contains(&self, client: IpAddr) -> bool {
        self.0.contains(&client.to_canonical())
    }
}

fn canonical_network(network: IpNet) -> IpNet {
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
    {
        return IpNet::new(IpAddr::V4(v4), length).unwrap_or(network);
    }
    network
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_networks_and_mapped_forms() {
        for (rule, client, expected) in [
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "::ffff:10.1.2.3", true),
            ("::ffff:10.1.2.3", "10.1.2.3", true),
            ("::ffff:10.0.0.0/104", "10.9.9.9", true),
            ("10.1.2.3/8", "10.200.0.1", true),
            ("2001:db8::/32", "2001:db8::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("::/0", "10.1.2.3", false),
            ("0.0.0.0/0", "2001:db8::1", false),
        ] {
            let network = NetworkRule::parse(rule).unwrap();
            assert_eq!(network.contains(client.parse().unwrap()), expected, "{rule} {client}");
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "10.1",
            "010.0.0.1",
            "010.0.0.1/8",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "10.0.0.0/8/8",
            "10.0/8",
            "::010.0.0.1/120",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/-1",
            "fe80::1%eth0",
            "example.com",
            " 10.0.0.1",
        ] {
            assert_eq!(NetworkRule::parse(text), None, "{text:?}");
        }
    }
}
