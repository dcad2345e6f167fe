//! Faults of the sidecars themselves, of Envoy and of the machine.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

use super::catalogue::Fault;
use super::site::Site;
use crate::support::process::Process;
use crate::truth::fleet::request;

/// The one that suffers where only one does.
const VICTIM: usize = 2;
/// File descriptors that a starved sidecar may have: about as many as it has open.
const FEW_DESCRIPTORS: usize = 40;

impl Site {
    pub(super) async fn harm_machine(&mut self, fault: Fault) {
        let victim = &self.fleet.replicas[VICTIM].keyward;
        match fault {
            Fault::SidecarKilled => self.fleet.replace(VICTIM).await,
            Fault::SidecarStopped => victim.freeze(),
            Fault::BadReload => victim.hangup(),
            Fault::DescriptorsExhausted => {
                limit_descriptors(victim.id(), FEW_DESCRIPTORS);
                let address = victim.grpc_addr();
                for _ in 0..FEW_DESCRIPTORS * 2 {
                    self.held.connections.push(TcpStream::connect(address).await.unwrap());
                }
            }
            Fault::BusyCores => {
                let shell = Path::new("/bin/sh");
                let spin = ["-c".to_owned(), "while :; do :; done".to_owned()];
                for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
                    self.held.processes.push(Process::start("sh", shell, &std::env::temp_dir(), &spin));
                }
            }
            Fault::EnvoyReplaced => self.replace_envoy().await,
            Fault::ChecksCancelled => {
                for replica in &self.fleet.replicas {
                    let authorizer = replica.authorizer.clone();
                    self.held.tasks.spawn(async move {
                        let mut tick = interval(Duration::from_millis(5));
                        for number in 0_usize.. {
                            tick.tick().await;
                            let check = request(&format!("x{:07}_nobody-has-this", number % 10_000_000));
                            let _ = timeout(Duration::from_millis(1), authorizer.try_check(check)).await;
                        }
                    });
                }
            }
            other => panic!("{other:?} is no fault of the machine"),
        }
    }

    pub(super) fn heal_machine(&mut self, fault: Fault) {
        let victim = &self.fleet.replicas[VICTIM].keyward;
        match fault {
            Fault::SidecarStopped => victim.resume(),
            Fault::DescriptorsExhausted => limit_descriptors(victim.id(), 1024),
            _ => {}
        }
    }
}

fn limit_descriptors(pid: u32, count: usize) {
    let limited =
        Command::new("prlimit").args([format!("--pid={pid}"), format!("--nofile={count}:4096")]).status();
    assert!(limited.unwrap().success(), "prlimit of process {pid} to {count}");
}
